"""Which pictures are put aside, never to be trained on: by a hash of their names.

So a picture stays on its side whatever else is packed with it, in whatever order, and a larger
share puts aside all that a smaller one did.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal

from droppos.errors import ConfigError

HOLDOUT_SHARE = 0.05
"""A twentieth: of a thousand pictures enough to see whether anything is learnt, of more than a
hundred thousand more than any of our figures asks."""

HoldoutBy = Literal["picture", "folder"]


@dataclass(frozen=True)
class Side:
    """Some of a source's pictures."""

    share: float
    """Of all of them, how many are put aside, about; in (0, 1)."""
    by: HoldoutBy
    """What is put aside together: nothing, or what lies in one folder."""
    held_out: bool
    """Whether this is what is put aside, or the rest."""

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ConfigError(
                f"--holdout-share must be between 0 and 1, got {self.share:g}; 0.05 puts one "
                "picture of twenty aside"
            )

    def __str__(self) -> str:
        of = f"a share of {self.share:g} held out by {self.by}"
        return of if self.held_out else f"the rest of {of}"

    def takes(self, key: str) -> bool:
        """Whether a picture is of this side, by its path relative to the source."""
        name = key if self.by == "picture" else key.rpartition("/")[0]
        digest = hashlib.blake2b(name.encode(), digest_size=8, person=b"held out").digest()
        return (int.from_bytes(digest) < self.share * 2**64) == self.held_out


def sides(share: float, by: HoldoutBy) -> list[Side]:
    """Give what is trained on, and what is put aside.

    Raises:
        ConfigError: If there would be nothing for one of them.
    """
    return [Side(share, by, held_out) for held_out in (False, True)]
