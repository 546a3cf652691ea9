"""The errors a user can meet; main.py prints their one sentence and ends with their exit code."""


class InputError(ValueError):
    """Bad input: one sentence naming the field, the value and the fix."""

    exit_code = 2


class Diverged(RuntimeError):
    """A non-finite loss or gradient; names what stopped, and its step."""

    exit_code = 1


class CheckpointError(RuntimeError):
    """A file of a run can be neither written nor read; names it, and the way on."""

    exit_code = 74  # EX_IOERR of sysexits.h


class Preempted(RuntimeError):
    """Stopped on notice, with everything saved: the same command goes on."""

    exit_code = 75  # EX_TEMPFAIL, "the user is invited to retry"
