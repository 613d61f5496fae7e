"""Export: from a checkpoint to a backbone that timm loads."""

from pathlib import Path
from tempfile import TemporaryDirectory

from droppos.export.timm_vit import ExportReport, export
from pipelines.backbone import open_backbone
from pipelines.storage import open_place


def export_checkpoint(checkpoint: str, out: str) -> ExportReport:
    """Write the encoder of a checkpoint (or of a run's newest one) as a timm folder.

    Args:
        checkpoint: Folder of a checkpoint, or of a run.
        out: Folder to write, path or s3:// URI.

    Raises:
        DataError: If there is no checkpoint.
        ConfigError: If a local ``out`` holds anything but a previous export.
        TrainingError: If what was written does not compute what was trained.
    """
    backbone = open_backbone(checkpoint)
    model = backbone.whole
    place = open_place(out)
    if not place.is_s3:
        return export(model, backbone.model, Path(place.path))
    with TemporaryDirectory() as folder:
        report = export(model, backbone.model, Path(folder) / "export")
        for file in sorted(report.path.iterdir()):
            (place / file.name).write_bytes(file.read_bytes())
    return report
