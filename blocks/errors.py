"""The error of this package."""


class ModelError(ValueError):
    """A network cannot be built or spread over branches; the message names the rule and the remedy."""


def at_least_one(**options: int) -> None:
    """Raises ModelError for an option below 1."""
    for name, value in options.items():
        if value < 1:
            raise ModelError(f"{name} is at least 1, got {value}")
