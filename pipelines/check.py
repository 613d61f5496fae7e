"""What becomes of comparing: things that were looked at, and how two values of JSON differ."""

import json
import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from pipelines.secrets import MARK

SHOWN = 100
"""Characters of a value that are shown."""


class Check(NamedTuple):
    """One thing that was looked at."""

    what: str
    state: Literal["ok", "differs", "not reachable", "note"]
    """A note fails nothing: it may well differ."""
    told: str = ""
    """What was compared; what was expected and found; or why it cannot be reached."""


def differences(place: str, said: Any, found: Any) -> Iterator[Check]:
    """List the leaves in which two values differ, with a dotted name for each.

    Args:
        place: Name of the values.
        said: As a file for others has it: secrets may be blotted out in it.
        found: As it is.
    """
    if isinstance(said, dict) and isinstance(found, dict):
        for name in sorted(said.keys() | found.keys()):
            yield from differences(f"{place}.{name}", said.get(name), found.get(name))
    elif isinstance(said, list) and isinstance(found, list) and len(said) == len(found):
        for index, (ours, theirs) in enumerate(zip(said, found, strict=True)):
            yield from differences(f"{place}[{index}]", ours, theirs)
    elif json.dumps(said) != json.dumps(found) and not _blotted(said, found):
        yield Check(place, "differs", f"expected {_short(said)}, found {_short(found)}")


def _blotted(said: Any, found: Any) -> bool:
    """Whether texts differ only where secrets are blotted out, there or, in this process, here."""
    if not (isinstance(said, str) and isinstance(found, str)):
        return False
    return any(
        MARK in one
        and re.fullmatch(".*".join(map(re.escape, one.split(MARK))), other, re.DOTALL) is not None
        for one, other in ((said, found), (found, said))
    )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
