"""What can go wrong, by who can mend it.

DropposError
├── ConfigError      fix the recipe or the command line
├── DataError        fix the pictures, the shards or the storage they are on
│   └── StorageError storage does not answer just now; what it holds may be perfect
└── TrainingError    the run itself: a checkpoint that does not fit, a stream out of step
    └── DivergedError the loss is not finite, and would not be the next time

Every message names the thing, the value it had, what was expected and what to do.
"""


class DropposError(Exception):
    """Base of every error meant for a person; the command line prints it without a traceback."""


class ConfigError(DropposError):
    """A setting is out of its range, or two settings contradict each other."""


class DataError(DropposError):
    """Pictures, shards or storage are missing, unreadable or not what they claim to be."""


class StorageError(DataError):
    """Storage does not answer, refuses for now, or lets nobody in.

    What it holds may be perfect, so no picture may ever be counted as bad because of this. Who
    catches DataError to pass over a picture catches this before it, and lets it go on.
    """


class TrainingError(DropposError):
    """A run cannot go on, or cannot go on from where it was asked to."""


class DivergedError(TrainingError):
    """The loss is not finite any more; starting again as it is would only repeat it."""
