"""What `droppos prepare` makes of the ways in which pictures are handed out."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from droppos.errors import ConfigError, DataError
from pipelines.prepare import PrepareReport, prepare, read_set_aside
from pipelines.shards import Manifest, load_manifest, read_rows
from pipelines.sources import Wanted
from pipelines.storage import Place, open_place


def _prepare(source: Path, dest: Path, **wanted: str) -> PrepareReport:
    return prepare(str(source), str(dest), workers=2, wanted=Wanted(**wanted))


def _labels(dest: Path) -> dict[str, str | None]:
    """Name of each picture's class by its key."""
    place = open_place(str(dest))
    manifest = load_manifest(place)
    names = manifest.classes or ()
    return {
        row.key: None if row.label is None else names[row.label]
        for row in read_rows(place, manifest)
    }


def _tar(files: dict[str, bytes]) -> bytes:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return written.getvalue()


@pytest.fixture
def cat(photographs: Path) -> bytes:
    return (photographs / "cat/00.jpg").read_bytes()


@pytest.fixture
def rocket(photographs: Path) -> bytes:
    return (photographs / "rocket/00.jpg").read_bytes()


def test_a_tar_of_tars_has_their_names_for_classes(
    cat: bytes, rocket: bytes, tmp_path: Path
) -> None:
    # As ImageNet's training pictures are handed out.
    inner = {"n02": {"n02_1.JPEG": cat, "n02_2.JPEG": rocket}, "n17": {"n17_1.JPEG": rocket}}
    tars = {f"{name}.tar": _tar(files) for name, files in inner.items()}
    (tmp_path / "train.tar").write_bytes(_tar(tars))
    assert _prepare(tmp_path / "train.tar", tmp_path / "out").classes == ("n02", "n17")
    assert _labels(tmp_path / "out") == {
        "n02/n02_1.JPEG": "n02",
        "n02/n02_2.JPEG": "n02",
        "n17/n17_1.JPEG": "n17",
    }
    rows = {row.key: row.image for row in read_rows(*_opened(tmp_path / "out"))}
    assert rows["n02/n02_1.JPEG"] == cat and rows["n17/n17_1.JPEG"] == rocket
    # A folder of the same tars is the same, whether they are compressed or not.
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars/README.md").write_text("x")
    (tmp_path / "tars/n17.tar").write_bytes(tars["n17.tar"])
    with tarfile.open(tmp_path / "tars/n02.tar.gz", "w:gz") as archive:
        for name, data in inner["n02"].items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    _prepare(tmp_path / "tars", tmp_path / "again")
    assert _labels(tmp_path / "again") == _labels(tmp_path / "out")


def _opened(dest: Path) -> tuple[Place, Manifest]:
    place = open_place(str(dest))
    return place, load_manifest(place)


def test_a_damaged_tar_in_a_tar_costs_no_other(cat: bytes, rocket: bytes, tmp_path: Path) -> None:
    without_end = _tar({"1.jpg": rocket})[: 512 + -(-len(rocket) // 512) * 512]
    half = bytearray(_tar({"1.jpg": cat, "2.jpg": rocket}))
    half[half.index(b"2.jpg")] = 0
    tars = {
        "a.tar": b"no tar" * 200,
        "b.tar": _tar({"1.jpg": cat}),
        "c.tar": without_end,
        "d.tar": bytes(half),
    }
    (tmp_path / "all.tar").write_bytes(_tar(tars))
    _prepare(tmp_path / "all.tar", tmp_path / "out")
    assert set(_labels(tmp_path / "out")) == {"b/1.jpg", "c/1.jpg", "d/1.jpg"}
    first, second = read_set_aside(open_place(str(tmp_path / "out")))
    assert (first.key, first.kind) == ("a.tar", "undecodable")
    assert (second.key, second.kind) == ("d.tar", "undecodable")
    assert "what follows 1 files, at byte" in second.reason
    (tmp_path / "half.tar").write_bytes(half)  # by itself, half of it is nothing to go on with
    with pytest.raises(DataError, match=r"half\.tar is no archive, or a damaged one \(what foll"):
        _prepare(tmp_path / "half.tar", tmp_path / "other")


def test_numbered_archives_are_no_classes(cat: bytes, rocket: bytes, tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    for number, data in enumerate((cat, rocket)):
        files = {"a.jpg": data, "b.jpg": data}
        (tmp_path / f"web/train-00000{number}.tar").write_bytes(_tar(files))
    assert _prepare(tmp_path / "web", tmp_path / "out").classes is None
    assert set(_labels(tmp_path / "out")) == {
        f"train-00000{number}/{name}.jpg" for number in (0, 1) for name in "ab"
    }


def test_web_dataset_brings_its_labels(cat: bytes, rocket: bytes, tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    files = {"1.jpg": cat, "1.cls": b"3\n", "2.jpg": rocket, "2.cls": b"0", "3.jpg": cat}
    for number in range(2):
        (tmp_path / f"web/{number:05d}.tar").write_bytes(_tar(files))
    report = _prepare(tmp_path / "web", tmp_path / "out")
    assert report.classes == ("0", "1", "2", "3") and report.set_aside == {}
    labels = {"1": "3", "2": "0", "3": None}
    assert _labels(tmp_path / "out") == {
        f"{number:05d}/{name}.jpg": label for number in range(2) for name, label in labels.items()
    }
    for wrong in (b"cat", b"-1", b"", b"99999999"):
        (tmp_path / "web/00001.tar").write_bytes(_tar(files | {"2.cls": wrong}))
        with pytest.raises(DataError, match=r"00001/2\.cls holds .*; expected the number of a"):
            _prepare(tmp_path / "web", tmp_path / "other")


def test_a_class_file_of_another_kind_is_no_label(cat: bytes, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jpg").write_bytes(cat)
    (tmp_path / "in/thesis.cls").write_text(r"\NeedsTeXFormat{LaTeX2e}")
    assert _prepare(tmp_path / "in", tmp_path / "out").set_aside == {"not a picture": 1}


def test_folders_that_hold_all_are_looked_into(photographs: Path, tmp_path: Path) -> None:
    shutil.copytree(photographs, tmp_path / "in/ILSVRC/Data")
    report = _prepare(tmp_path / "in", tmp_path / "out")
    assert report.classes == tuple(sorted(path.name for path in photographs.iterdir()))
    assert _labels(tmp_path / "out")["ILSVRC/Data/cat/00.jpg"] == "cat"


def test_parts_that_are_kept_apart_are_not_packed_together_by_mistake(
    photographs: Path, tmp_path: Path
) -> None:
    for part in ("train", "val"):
        for name in ("cat", "rocket"):
            shutil.copytree(photographs / name, tmp_path / f"in/Data/{part}/{name}")
    archive = Path(shutil.make_archive(str(tmp_path / "in"), "tar", tmp_path / "in"))
    for source, root in ((tmp_path / "in", "Data/"), (archive, "")):
        with pytest.raises(
            DataError,
            match=rf"holds {root}train, {root}val, which are no classes.* --only '{root}train/\*'",
        ):
            _prepare(source, tmp_path / "out")
        dest = tmp_path / f"{source.name}-train"
        report = _prepare(source, dest, only=f"{root}train/*")
        assert report.classes == ("cat", "rocket")
        assert all(key.startswith(f"{root}train/{label}/") for key, label in _labels(dest).items())
        dest = tmp_path / f"{source.name}-all"
        report = _prepare(source, dest, only="*")
        assert report.classes == ("cat", "rocket") and report.pictures == 48


def test_a_pattern_that_nothing_is_like_is_told(photographs: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"--only 'dog/\*' is like none of the 72 files .* \(astronaut/00"
    ):
        _prepare(photographs, tmp_path / "out", only="dog/*")
    _prepare(photographs, tmp_path / "out", only="cat/*")
    with pytest.raises(DataError, match=r"its only is cat/\*, now rocket/\* is asked"):
        _prepare(photographs, tmp_path / "out", only="rocket/*")


def _parquet(path: Path, columns: dict[str, pa.Array], named: tuple[str, ...] = ()) -> None:
    table = pa.table(columns)
    features = {name: {"names": ["tabby", "lynx"], "_type": "ClassLabel"} for name in named}
    if features:
        info = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": info})
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table, path)


def test_columns_are_found_or_named(
    cat: bytes, rocket: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pictures, fine, coarse = pa.array([cat, rocket]), pa.array([0, 1]), pa.array([1, 1])
    # As Hugging Face has CIFAR-10, and CIFAR-100.
    _parquet(tmp_path / "10.parquet", {"img": pictures, "kind": fine}, ("kind",))
    assert _prepare(tmp_path / "10.parquet", tmp_path / "10").classes == ("tabby", "lynx")
    columns = {"img": pictures, "fine_label": fine, "coarse_label": coarse}
    _parquet(tmp_path / "100.parquet", columns, ("fine_label", "coarse_label"))
    assert _prepare(tmp_path / "100.parquet", tmp_path / "100").classes is None
    (told,) = caplog.messages
    assert "has no column 'label', but fine_label, coarse_label: no picture gets a label" in told
    _prepare(tmp_path / "100.parquet", tmp_path / "fine", label_column="fine_label")
    assert [*_labels(tmp_path / "fine").values()] == ["tabby", "lynx"]
    _parquet(tmp_path / "two.parquet", {"left": pictures, "right": pa.array([rocket, cat])})
    _prepare(tmp_path / "two.parquet", tmp_path / "two", image_column="right")
    assert next(read_rows(*_opened(tmp_path / "two"))).image == rocket
    with pytest.raises(DataError, match="no column 'up'; its columns are left, right"):
        _prepare(tmp_path / "two.parquet", tmp_path / "x", image_column="up")
    with pytest.raises(ConfigError, match="--label-column are for parquet"):
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder/a.jpg").write_bytes(cat)
        _prepare(tmp_path / "folder", tmp_path / "x", label_column="label")


def test_tables_of_other_columns_are_not_mixed_in(cat: bytes, tmp_path: Path) -> None:
    _parquet(tmp_path / "in/a.parquet", {"img": pa.array([cat]), "label": pa.array([0])})
    _parquet(tmp_path / "in/b.parquet", {"img": pa.array([cat])})
    with pytest.raises(DataError, match=r"b\.parquet has no column 'label', which the files befor"):
        _prepare(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("name", ["{part}-00000-of-00001", "data/{part}/0000"])
def test_tables_of_parts_are_not_packed_together_by_mistake(
    cat: bytes, tmp_path: Path, name: str
) -> None:
    for part in ("test", "train", "validation"):
        path = tmp_path / f"in/{name.format(part=part)}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        _parquet(path, {"image": pa.array([cat])})
    with pytest.raises(DataError, match=r"holds files of test, train, validation, parts of a"):
        _prepare(tmp_path / "in", tmp_path / "out")
    assert _prepare(tmp_path / "in", tmp_path / "train", only="*train*").pictures == 1
    assert _prepare(tmp_path / "in", tmp_path / "all", only="*").pictures == 3


def test_parts_are_told_wherever_they_are(cat: bytes, tmp_path: Path) -> None:
    def tree(name: str, files: list[str]) -> Path:
        for file in files:
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_tar({"1.jpg": cat}) if file.endswith(".tar") else cat)
        return tmp_path / name

    (tree("cls", ["train/0.jpg", "val/0.jpg"]) / "train/0.cls").write_text("1")
    tree("extra", ["train/a/0.jpg", "val/a/0.jpg", "extra/a/0.jpg"])
    tree("below", ["a/train/0.jpg", "a/val/0.jpg", "b/train/0.jpg"])
    tree("archives", ["in1k-train-0000.tar", "in1k-validation-00.tar"])
    for name in ("cls", "extra", "below", "archives"):
        with pytest.raises(DataError, match="parts of a data set that are kept apart"):
            _prepare(tmp_path / name, tmp_path / "out")
        assert _prepare(tmp_path / name, tmp_path / f"{name}-all", only="*").pictures >= 2


def test_archives_that_are_called_alike_lose_no_picture(
    cat: bytes, rocket: bytes, tmp_path: Path
) -> None:
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars/a.tar").write_bytes(_tar({"1.jpg": cat}))
    with tarfile.open(tmp_path / "tars/a.tgz", "w:gz") as archive:
        archive.add(tmp_path / "tars/a.tar", "1.jpg")
    with pytest.raises(DataError, match=r"holds two archives called a, such as a\.tgz"):
        _prepare(tmp_path / "tars", tmp_path / "out")
    files = {"a/1.jpg": rocket, "a.tar": _tar({"1.jpg": cat})}
    (tmp_path / "all.tar").write_bytes(_tar(files))
    _prepare(tmp_path / "all.tar", tmp_path / "out")
    rows = {row.key: row.image for row in read_rows(*_opened(tmp_path / "out"))}
    assert rows == {"a/1.jpg": rocket, "a.tar/1.jpg": cat}


def test_numbered_archives_of_which_some_are_missing_are_no_classes(
    cat: bytes, tmp_path: Path
) -> None:
    (tmp_path / "web").mkdir()
    for number in (5, 6, 8):
        (tmp_path / f"web/x-{number:04d}.tar").write_bytes(_tar({"cat/1.jpg": cat}))
    (tmp_path / "web/._x-0005.tar").write_bytes(b"what macOS leaves")
    (tmp_path / "web/LICENSE").write_text("x")
    report = _prepare(tmp_path / "web", tmp_path / "out")
    assert report.pictures == 3 and report.classes is None
    assert "x-0005/cat/1.jpg" in _labels(tmp_path / "out")


def test_files_of_labels_belong_to_names_with_dots(
    cat: bytes, rocket: bytes, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    for name, label in (("im.001", "1"), ("im.002", "2")):
        (tmp_path / f"in/{name}.jpg").write_bytes(cat)
        (tmp_path / f"in/{name}.cls").write_text(label)
    _prepare(tmp_path / "in", tmp_path / "out", only="*.jpg")
    assert _labels(tmp_path / "out") == {"im.001.jpg": "1", "im.002.jpg": "2"}


def test_labels_that_are_none_are_refused(cat: bytes, tmp_path: Path) -> None:
    picture = pa.array([cat])
    _parquet(tmp_path / "a.parquet", {"image": picture, "label": pa.array([[1, 2]])})
    with pytest.raises(DataError, match=r"'label' is list<.*; expected labels, as whole numbers"):
        _prepare(tmp_path / "a.parquet", tmp_path / "out")
    _parquet(tmp_path / "b.parquet", {"image": picture, "user": pa.array([30_000_000])})
    with pytest.raises(DataError, match="'user' holds 30000000, which is no number of a class"):
        _prepare(tmp_path / "b.parquet", tmp_path / "out", label_column="user")


def test_pictures_beside_archives_are_told(
    cat: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/preview.jpg").write_bytes(cat)
    (tmp_path / "in/a.tar").write_bytes(_tar({"1.jpg": cat}))
    assert _prepare(tmp_path / "in", tmp_path / "out").set_aside == {"not a picture": 1}
    assert "such as preview.jpg, and beside them 1 that are packed, such as a.tar" in caplog.text
