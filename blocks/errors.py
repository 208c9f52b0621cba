"""The error of this package."""


class ModelError(ValueError):
    """A network cannot be built or spread over branches; the message names the rule and the remedy."""
