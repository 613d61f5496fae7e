"""What can go wrong with machines, and with the way to them."""

from droppos.errors import ConfigError, DropposError


class LaunchError(DropposError):
    """A cluster could not be brought up, reached or ended; the recipe may be perfect."""


class TakenError(ConfigError):
    """A job or a cluster of this name is there, and may be somebody's: it is not ours to end."""


class LineLostError(LaunchError):
    """The jobs API does not answer just now; the job may be going on."""
