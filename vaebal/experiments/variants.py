"""Variants of a config: the part of --config after ':'."""


def check(name: str, variant: str, variants: tuple[str, ...]) -> None:
    """Raises ValueError if the part of --config after ":" is not one of `variants`."""
    if variant not in variants:
        known = ", ".join(f"'{name}.py:{known}'" if known else f"'{name}.py'" for known in variants)
        raise ValueError(f"{name} has no variant {variant!r}: use one of {known}.")
