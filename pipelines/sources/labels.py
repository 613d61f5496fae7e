"""Labels of a folder or an archive: from the names of sub-folders, or WebDataset's `.cls` files.

Sub-folders are classes where every picture is in one and there are at least two. A folder that all
pictures are in, however deep, tells nothing, and what is below it is looked at. Folders called
`train` and `val` are no classes, but parts that somebody has kept apart: packed together by
mistake, a run would train on what it is to be measured by, so that has to be asked for.
"""

import logging
import re
from collections.abc import Callable, Container, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from droppos.errors import DataError
from pipelines.sources.item import listed

CLASS_FILE = ".cls"
"""WebDataset's: the number of the class, as text, beside the picture of the same name."""
PARTS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}
"""Names, in lower case, of what data sets are divided into."""
MOST_CLASSES = 1 << 20
"""More is a number of something else, and each class would get a name."""
READERS = 16
"""Files of labels that are asked for at once."""
AT_ONCE = 10_000
"""Of those in a queue: of millions, it would be gigabytes."""

log = logging.getLogger(__name__)


class Labels:
    """Which label each picture has; none of them, when nothing tells."""

    classes: tuple[str, ...] | None = None
    """Name of each label; none without labels."""

    def of(self, name: str) -> int | None:
        """Tell the label of a picture by its path relative to the source."""
        return None


class _Folders(Labels):
    def __init__(self, names: list[str], level: int) -> None:
        self.classes = tuple(names)
        self._numbers = {name: number for number, name in enumerate(names)}
        self._level = level

    def of(self, name: str) -> int | None:
        return self._numbers[name.split("/")[self._level]]


class _Files(Labels):
    def __init__(self, numbers: dict[str, int]) -> None:
        self.classes = tuple(str(number) for number in range(max(numbers.values()) + 1))
        self._numbers = numbers

    def of(self, name: str) -> int | None:
        return next((self._numbers[stem] for stem in stems(name) if stem in self._numbers), None)


def refuse_parts(uri: str, names: Iterable[str], archived: Container[str]) -> None:
    """Refuse a source of which folders side by side are parts such as train and val.

    Args:
        uri: The source, as a person named it.
        names: Of its pictures, relative to it.
        archived: Folders that are archives, so that a part's name is a word of theirs.

    Raises:
        DataError: If there are such folders.
    """
    folders: set[str] = set()
    for name in names:
        folder = name.rpartition("/")[0]
        while folder and folder not in folders:
            folders.add(folder)
            folder = folder.rpartition("/")[0]
    beside: dict[str, dict[str, str]] = {}
    for folder in sorted(folders):
        above, _, own = folder.rpartition("/")
        words = re.findall("[a-z]+", own.lower()) if folder in archived else [own.lower()]
        for part in PARTS.intersection(words):
            beside.setdefault(above, {}).setdefault(part, folder)
    for parts in beside.values():
        if len(parts) > 1:
            first = next(iter(parts.values()))
            raise DataError(
                f"source {uri} holds {listed(sorted(parts.values()))}, which are no classes, but "
                "parts of a data set that are kept apart; prepare each by itself, with --only "
                f"'{first}/*' say, or all of them as one with --only '*'"
            )


def of_folders(uri: str, names: Sequence[str], numbered: Container[str]) -> Labels:
    """Take sub-folders for classes, but those that are parts of a data set.

    Args:
        uri: The source, as a person named it.
        names: Of its pictures, relative to it.
        numbered: Folders, relative to it, whose names are only numbers of parts.
    """
    for level in range(max((name.count("/") for name in names), default=0)):
        folders = sorted({"/".join(name.split("/", level + 1)[: level + 1]) for name in names
                          if name.count("/") > level})  # fmt: skip
        own = sorted({folder.rpartition("/")[2] for folder in folders})
        if (stray := next((name for name in names if name.count("/") <= level), None)) is not None:
            if len(own) > 1:
                log.warning(
                    "%s has %d sub-folders, but pictures beside them, such as %s: no picture gets "
                    "a label; if each sub-folder is a class, move those away, and prepare again",
                    *(uri, len(own), stray),
                )
            return Labels()
        parts = len(PARTS.intersection(name.lower() for name in own)) > 1
        if len(own) > 1 and not parts and not all(folder in numbered for folder in folders):
            return _Folders(own, level)
    return Labels()


def of_files(uri: str, names: Sequence[str], read: Callable[[str], bytes]) -> Labels:
    """Read the labels that lie beside the pictures; one without such a file has none.

    Args:
        uri: The source, as a person named it.
        names: Of the files of labels.
        read: Fetch one.

    Raises:
        DataError: If one holds anything but a number.
    """

    def number(name: str) -> int:
        text = read(name)
        if not (text.strip().isdigit() and int(text) < MOST_CLASSES):
            raise DataError(
                f"source {uri}: {name} holds {text[:40]!r}; expected the number of a class, from "
                "0 on, as text: mend it, or take it away"
            )
        return int(text)

    numbers: dict[str, int] = {}
    with ThreadPoolExecutor(READERS) as pool:
        for first in range(0, len(names), AT_ONCE):
            some = names[first : first + AT_ONCE]
            stems = (name.removesuffix(CLASS_FILE) for name in some)
            numbers.update(zip(stems, pool.map(number, some), strict=True))
    return _Files(numbers)


def stems(name: str) -> tuple[str, str]:
    """Tell what a picture may have in common with its file of a label: all but its ending.

    WebDataset cuts a name at its first dot; with others the ending is what follows the last one.
    """
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.rpartition(".")[0], folder + slash + file.split(".", 1)[0]
