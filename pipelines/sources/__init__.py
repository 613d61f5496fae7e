"""Where pictures come from: a folder, archives, or Hugging-Face-style parquet.

All become the same: a list of :class:`Item`, each read when it is its turn. Those of a folder or of
archives are mixed, for names usually lie sorted by class, and a window of training holds few row
groups: packed as they lie, a batch would be of a few classes. Parquet is taken as it lies.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TypeVar

from PIL import Image

from droppos.errors import ConfigError, DataError
from pipelines.shards import MANIFEST, Manifest, load_manifest
from pipelines.sources import archives, labels, parquet
from pipelines.sources.archives import Members, is_archive, is_hidden, without_common_folder
from pipelines.sources.item import Item, Refusal, Source, Wanted, listed
from pipelines.storage import Entry, Place

__all__ = ["Item", "Source", "Wanted", "open_source"]

_log = logging.getLogger(__name__)

Thing = TypeVar("Thing")

NOT_PICTURES = {".pdf", ".eps", ".ps", ".mpg", ".mpeg", ".h5", ".hdf", ".grib", ".bufr", ".wmf"}
"""Extensions that Pillow has a reader for, if only to say that it can't."""


@contextmanager
def open_source(place: Place, wanted: Wanted) -> Iterator[Source]:
    """List what is at ``place``; the items can be read until the block ends.

    Args:
        place: Folder, archive or parquet file.
        wanted: What of it.

    Raises:
        ConfigError: If columns are asked for where there are none.
        DataError: If there is nothing, nothing that could be pictures, or if parts of a data set
            that are kept apart would be packed as one.
    """
    place.check_reachable()
    if not place.exists():
        raise DataError(f"source {place} does not exist; give a folder, archive or parquet file")
    alone = place.is_file()
    if alone and not is_archive(place.name) and not _is_parquet(place.name):
        raise DataError(
            f"source {place} is a file, but neither {', '.join(archives.SUFFIXES)} nor "
            f"{parquet.SUFFIX}; give the folder it is in"
        )
    files = [Entry("", place.size())] if alone else place.files()
    if not files:
        raise DataError(f"source {place} is empty; give a folder with pictures in it")
    tables = _all_that_count(place, files, _is_parquet)
    if not tables and (wanted.image_column or wanted.label_column):
        raise ConfigError(
            f"--image-column and --label-column are for parquet, and source {place} is none; leave "
            "them out"
        )
    if tables:
        prepared = MANIFEST in {file.name for file in files}
        yield _tables(place, tables, wanted, load_manifest(place) if prepared else None)
    elif alone:
        with archives.open_archive(place) as members:
            fingerprint = _fingerprint([Entry(place.name, place.size())])
            yield _packed(place, fingerprint, without_common_folder(members), wanted)
    elif packed := _all_that_count(place, files, is_archive):
        with archives.open_archives(place, [file.name for file in packed]) as members:
            yield _packed(place, _fingerprint(packed), members, wanted)
    else:
        again = {} if place.is_s3 else _links_back(place, files)
        if wanted.only is not None:
            files = _only(place, files, [file.name for file in files], wanted)
        fingerprint = _fingerprint(files)
        names = [file.name for file in files if not (again and _is_below(file.name, again))]
        del files  # of millions, each thing that is kept is gigabytes
        read = lambda name: (place / name).read_bytes()  # noqa: E731
        yield _folder(place.uri, fingerprint, names, read, again, (), (), wanted)


def _is_parquet(name: str) -> bool:
    return name.lower().endswith(parquet.SUFFIX)


def _all_that_count(
    place: Place, files: Sequence[Entry], kind: Callable[[str], bool]
) -> list[Entry]:
    """List the files of a kind, where nothing else is a picture by its name."""

    def is_one(name: str) -> bool:
        return kind(name or place.name) and not is_hidden(name)

    found = [file for file in files if is_one(file.name)]
    others = (file.name for file in files if not is_one(file.name))
    pictures = (name for name in others if Path(name).suffix and not _refusal(name))
    stray = next(pictures, None) if found else None
    if stray is not None:
        _log.warning(
            "%s holds pictures, such as %s, and beside them %d that are packed, such as %s: those "
            "are set aside; give each kind a folder of its own",
            *(place, stray, len(found), found[0].name),
        )
    return found if stray is None else []


def _only(
    place: Place, things: Sequence[Thing], names: Sequence[str], wanted: Wanted
) -> list[Thing]:
    """Keep those whose names are asked for.

    Raises:
        DataError: If none is.
    """
    kept = [
        thing
        for thing, name in zip(things, names, strict=True)
        if wanted.takes(name) or (name.endswith(labels.CLASS_FILE) and not is_hidden(name))
    ]
    if not kept:
        raise DataError(
            f"--only {wanted.only!r} is like none of the {len(names):,} files of source {place} "
            f"({listed(sorted(names), 3)}); a * stands for anything, slashes too"
        )
    return kept


def _tables(
    place: Place, tables: Sequence[Entry], wanted: Wanted, prepared: Manifest | None
) -> Source:
    tables = _only(place, tables, [table.name or place.name for table in tables], wanted)
    names = [table.name for table in tables]
    return parquet.read_parquet(place, names, _fingerprint(tables), wanted, prepared)


def _packed(place: Place, fingerprint: str, members: Members, wanted: Wanted) -> Source:
    names = list(members.fetch)
    names = _only(place, names, names, wanted)
    left_out = {name: why for name, why in members.left_out.items() if wanted.takes(name)}
    read = lambda name: members.fetch[name]()  # noqa: E731
    inner, numbered = members.inner, members.numbered
    return _folder(place.uri, fingerprint, names, read, left_out, inner, numbered, wanted)


def _links_back(place: Place, files: list[Entry]) -> dict[str, Refusal]:
    """Find folders that are links to one they are in: their pictures would come again and again."""
    real: dict[Path, Path] = {}
    found: dict[str, Refusal] = {}
    root = Path(place.path)
    for folder in sorted(map(Path, {file.name.rpartition("/")[0] for file in files})):
        for part in [*list(folder.parents)[::-1], folder]:
            if part in real:
                continue
            real[part] = (root / part).resolve()
            above = (real[parent] for parent in part.parents)
            if real[part] in above and not _is_below(part.as_posix(), found):
                found[part.as_posix()] = "link to itself", "it links to a folder that it is in"
    return found


def _is_below(name: str, folders: Container[str]) -> bool:
    return any(str(parent) in folders for parent in PurePosixPath(name).parents)


def _folder(
    uri: str,
    fingerprint: str,
    files: Sequence[str],
    read: Callable[[str], bytes],
    left_out: Mapping[str, Refusal],
    archived: Container[str],
    numbered: Container[str],
    wanted: Wanted,
) -> Source:
    refused = {name: reason for name in sorted(files) if (reason := _refusal(name))}
    names = sorted((name for name in files if name not in refused), key=_mixed)
    if wanted.only is None:
        labels.refuse_parts(uri, names, archived)
    if class_files := _class_files(names, refused):
        found = labels.of_files(uri, class_files, read)
        for name in class_files:
            del refused[name]
    else:
        found = labels.of_folders(uri, names, numbered)
    refused = {_shown(name): reason for name, reason in {**refused, **left_out}.items()}

    def items_from(first: int) -> Iterator[Item]:
        for place, name in islice(enumerate(names), first, None):
            yield Item(place, name, found.of(name), partial(read, name))

    return Source(uri, fingerprint, len(names), items_from, found.classes, True, refused)


def _class_files(names: Sequence[str], refused: Iterable[str]) -> list[str]:
    """List the files that tell the label of a picture beside them."""
    found = [name for name in refused if name.endswith(labels.CLASS_FILE) and not is_hidden(name)]
    pictures = {stem for name in names for stem in labels.stems(name)} if found else set()
    return [name for name in found if name.removesuffix(labels.CLASS_FILE) in pictures]


def _mixed(name: str) -> bytes:
    """Place a name among others as if at random, whatever the others are."""
    return hashlib.blake2b(
        name.encode(errors="surrogateescape"), digest_size=16, person=b"order"
    ).digest()


def _shown(name: str) -> str:
    """Write a name so that it can be stored, whatever its bytes."""
    return name.encode(errors="backslashreplace").decode()


def _refusal(name: str) -> Refusal | None:
    """Kind and reason why a file is no picture, by its name alone; none if it may be one.

    A name without extension may be one: data sets named by hash have no other.
    """
    if _shown(name) != name:
        return "name is not UTF-8", "rename it in the archive, or unpack and rename"
    if is_hidden(name):
        return "hidden file", "its name, or a folder's, starts with a dot"
    suffix = Path(name).suffix.lower()
    if suffix and (suffix in NOT_PICTURES or suffix not in Image.registered_extensions()):
        return "not a picture", f"Pillow reads no pictures from {suffix} files"
    return None


def _fingerprint(files: Sequence[Entry]) -> str:
    """Hash their JSON, piece by piece: of millions it is a gigabyte."""
    digest = hashlib.sha256(b"[")
    for number, file in enumerate(files):
        digest.update((", " * bool(number) + json.dumps(file)).encode())
    digest.update(b"]")
    return digest.hexdigest()
