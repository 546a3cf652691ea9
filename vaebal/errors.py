"""The errors a user can meet; main.py prints their one sentence instead of a traceback."""


class InputError(ValueError):
    """Bad input: one sentence naming the field, the value and the fix. Exit code 2."""


class Diverged(RuntimeError):
    """A non-finite loss or gradient; names what stopped, and its step. Exit code 1."""
