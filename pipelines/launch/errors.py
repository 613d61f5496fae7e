"""What can go wrong with machines, and with the way to them."""

from droppos.errors import DropposError


class LaunchError(DropposError):
    """A cluster could not be brought up, reached or ended; the recipe may be perfect."""


class LineLostError(LaunchError):
    """The jobs API does not answer just now; the job may be going on."""
