"""What can be wrong with what the user gave us; each ends the program with exit code 2."""

from anabranch.cluster.errors import NoPeerLost


class ConfigError(ValueError):
    """A configuration, a flag or a user's factory is wrong."""


class DataError(ConfigError):
    """A dataset is missing, torn or of another kind."""


class CheckpointError(ConfigError):
    """A checkpoint is missing, torn or belongs to another model."""


class UnreadableError(NoPeerLost, OSError, CheckpointError):
    """A checkpoint whose store does not answer, or refuses: nothing is known to be wrong with it."""
