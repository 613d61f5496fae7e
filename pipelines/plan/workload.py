"""What a run has to do: pictures, their bytes, and what each costs a CPU and the storage."""

from dataclasses import dataclass
from math import prod

from droppos.errors import ConfigError, DataError
from pipelines.order import window_rows
from pipelines.plan.question import Question
from pipelines.recipe import Recipe
from pipelines.shards import GROUP_ROWS, Manifest, load_manifest
from pipelines.storage import open_reachable

DECODE_S, DECODE_S_PER_KB = 1.22e-3, 13.3e-6
"""CPU seconds of all processes for a picture, and for each kB of it: measured, docs/stream.md (our
stream from a folder: 327 a core-second of 138 kB pictures, 545 of their copies of 46 kB; a line
through these two, on 2 CPUs of a busy host)."""
REQUESTS_PER_GROUP = 2
"""A HEAD and a GET: measured, tests/pipelines/test_plan_requests.py. The footer, once for each
shard and process, is left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """One run, in numbers that do not depend on machines."""

    pictures: int
    picture_bytes: float
    """Of an encoded picture, on average."""
    group_rows: float
    """Pictures that one request brings, on average."""
    steps_per_epoch: int
    steps: int
    window: int
    """Pictures of a window as the stream cuts it."""
    decode_s: float
    """CPU seconds to read, decode and hand on a picture."""
    crop_bytes: int
    """Of a decoded crop."""
    source: str
    """Where pictures and bytes are from."""
    decode_source: str
    """Where `decode_s` is from."""

    @property
    def images(self) -> int:
        """Pictures that the whole run trains on."""
        return self.steps * self._batch

    @property
    def _batch(self) -> int:
        return self.pictures // self.steps_per_epoch

    @property
    def requests_per_picture(self) -> float:
        """Requests to storage for a picture; a window's first and last group are read twice."""
        groups = self.window / self.group_rows
        return REQUESTS_PER_GROUP * (groups + 1) / groups / self.group_rows


def workload(recipe: Recipe, question: Question) -> Workload:
    """Read the data set's manifest, or take the question's word.

    Raises:
        ConfigError: If nobody says how many pictures there are and of which size, or a batch is
            larger than the data set.
        DataError: If the manifest cannot be read.
    """
    pictures, picture_bytes, group_rows, source = _pictures(recipe, question)
    batch = recipe.optim.global_batch
    if batch > pictures:
        raise ConfigError(
            f"optim.global_batch {batch} is larger than the data set of {pictures:,} pictures, so "
            f"an epoch has no step; take at most {pictures}"
        )
    decode_s = DECODE_S + DECODE_S_PER_KB * picture_bytes / 1e3
    decode_source = "measured on one machine, docs/stream.md"
    if question.decode_per_core is not None:
        decode_s, decode_source = 1 / question.decode_per_core, "given"
    per_epoch = pictures // batch
    return Workload(
        pictures=pictures,
        picture_bytes=picture_bytes,
        group_rows=group_rows,
        steps_per_epoch=per_epoch,
        steps=per_epoch * recipe.optim.epochs,
        window=min(window_rows(recipe.data.window, batch), per_epoch * batch),
        decode_s=decode_s,
        crop_bytes=3 * prod(recipe.model.image_size),
        source=source,
        decode_source=decode_source,
    )


def _pictures(recipe: Recipe, question: Question) -> tuple[int, float, float, str]:
    """Find pictures, bytes of one, rows of a group, and who says so."""
    if question.pictures is not None and question.picture_kb is not None:
        return question.pictures, 1e3 * question.picture_kb, GROUP_ROWS, "given"
    if recipe.data.path is None:
        raise ConfigError(
            "neither data.path nor --pictures and --picture-kb are set, so nobody says how much "
            "there is to train on; name a prepared data set (--data.path), or give both figures: "
            "ImageNet-1K is --pictures 1281167 --picture-kb 110"
        )
    manifest = _manifest(recipe.data.path)
    return (
        question.pictures or manifest.rows,
        1e3 * question.picture_kb if question.picture_kb else manifest.size / manifest.rows,
        manifest.rows / len(manifest.groups),
        "counted in the manifest",
    )


def _manifest(path: str) -> Manifest:
    place = open_reachable(path)
    manifest = load_manifest(place)
    if not manifest.rows:
        raise DataError(f"{place} has no pictures; prepare it again from a source that has some")
    return manifest
