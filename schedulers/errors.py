"""The error of this package."""


class PlanError(ValueError):
    """A plan, a plan file or a scheduler's answer breaks a rule; the message names the rule and the remedy."""
