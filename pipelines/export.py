"""Export: from a checkpoint to a backbone in the format that its users load."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from droppos.config import Heads
from droppos.errors import ConfigError
from droppos.export import FormatName
from droppos.export.classifiers import CLASSIFIERS
from droppos.export.flow import ExportReport, Format, export
from droppos.export.folder import OWN_CONFIG, refuse_foreign, unfinished
from droppos.export.formats import FORMATS
from droppos.export.sizes import at_size
from droppos.trained import Trained
from pipelines.backbone import open_backbone
from pipelines.storage import Place, open_place

_log = logging.getLogger(__name__)


def export_checkpoint(
    checkpoint: str,
    out: str,
    form: FormatName = "timm",
    image_size: tuple[int, int] | None = None,
    heads: Heads = Heads(),  # noqa: B008 - frozen
) -> ExportReport:
    """Write the encoder of a checkpoint (or of a run's newest one) in a format.

    Args:
        checkpoint: What :func:`open_backbone` opens: a checkpoint, a run, an export to timm, or
            another project's weights. Of a fine-tuning it is the whole classifier.
        out: Folder to write, path or s3:// URI.
        form: Whose format.
        image_size: Height and width of the pictures it will be given; those it was trained on when
            not given.
        heads: Attention heads, for weights of another project that don't tell.

    Raises:
        DataError: If there is no checkpoint.
        ConfigError: If ``out`` holds anything but a previous export, or the format cannot express
            the model.
        TrainingError: If what was written does not compute what was trained.
    """
    place = open_place(out)
    trained = open_backbone(checkpoint, heads, classifiers=True)
    written = _format(trained, form)
    if image_size is not None:
        trained = at_size(trained, image_size)
    _tell_replaced(place, form, bool(trained.classes))
    if not place.is_s3:
        return export(trained, Path(place.path), written)
    previous = _names(place)
    with TemporaryDirectory() as folder:
        # What S3 holds is loaded from a copy of the folder, under its own name.
        report = export(trained, Path(folder) / "export", written, shown=place.name)
        _put(report.path, place, previous)
    return replace(report, path=Path(place.name))


def _format(trained: Trained, form: FormatName) -> Format:
    if not trained.classes:
        return FORMATS[form]
    if form not in CLASSIFIERS:
        raise ConfigError(
            f"a fine-tuned classifier averages its patches, for which {form} has no words; "
            f"expected --format {' or '.join(CLASSIFIERS)}"
        )
    return CLASSIFIERS[form]


def _tell_replaced(place: Place, form: FormatName, classifier: bool) -> None:
    """Say that an export of another kind goes: it may not be meant."""
    own = place / OWN_CONFIG
    if own.exists():
        try:
            said = json.loads(own.read_bytes())
            before = _kind(said.get("for"), bool(said.get("classes")))
        except (ValueError, AttributeError):
            return
        now = _kind(form, classifier)
        if before != now:
            _log.warning("%s held %s, which this one, %s, replaces", place, before, now)


def _kind(form: str, classifier: bool) -> str:
    return f"{'a classifier' if classifier else 'an export'} for {form}"


def _names(place: Place) -> list[str]:
    """List a previous export on S3; refuse what is none."""
    names = place.children()
    own = (place / OWN_CONFIG).read_bytes() if OWN_CONFIG in names else None
    refuse_foreign(place.uri, names, own)
    return names


def _put(folder: Path, place: Place, previous: list[str]) -> None:
    """Copy to S3, which renames no folders: until the end droppos.json says that it is unfinished.

    Whose upload was cut short may export there again, and nobody loads half of it.
    """
    new = sorted(file.name for file in folder.iterdir() if file.name != OWN_CONFIG)
    (place / OWN_CONFIG).write_bytes(unfinished([*new, *previous]))
    for name in new:
        (place / name).write_bytes((folder / name).read_bytes())
    for name in set(previous) - {*new, OWN_CONFIG}:
        (place / name).delete()
    (place / OWN_CONFIG).write_bytes((folder / OWN_CONFIG).read_bytes())
