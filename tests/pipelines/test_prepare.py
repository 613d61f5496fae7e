import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from droppos.errors import ConfigError, DataError
from pipelines.local_s3 import S3Server
from pipelines.prepare import PrepareReport, prepare, read_set_aside
from pipelines.shards import Picture, load_manifest, read_rows
from pipelines.storage import open_place

SHARD_BYTES = 100_000
"""So small that the 72 photographs fill several shards."""


def _prepare(source: Path | str, dest: Path | str) -> PrepareReport:
    return prepare(str(source), str(dest), shard_bytes=SHARD_BYTES, group_rows=5, workers=2)


def _rows(dest: Path | str) -> list[Picture]:
    place = open_place(str(dest))
    return list(read_rows(place, load_manifest(place)))


def _contents(dest: Path | str) -> dict[str, bytes]:
    """Every file of a data set but the one that names its source."""
    place = open_place(str(dest))
    return {
        f.name: (place / f.name).read_bytes() for f in place.files() if f.name != "prepare.json"
    }


@pytest.fixture(scope="module")
def prepared(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photographs, prepared without disturbance."""
    dest = tmp_path_factory.mktemp("prepared")
    _prepare(photographs, dest)
    return dest


@pytest.fixture
def soiled(photographs: Path, tmp_path: Path) -> Path:
    """Photographs of two classes, among things that are none."""
    folder = tmp_path / "soiled"
    for name in ("cat", "rocket"):
        shutil.copytree(photographs / name, folder / name)
    whole = (photographs / "cat/00.jpg").read_bytes()
    (folder / "cat/truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "cat/empty.jpg").write_bytes(b"")
    (folder / "cat/words.jpg").write_text("I am not a picture")
    (folder / "cat/notes.txt").write_text("taken in June")
    (folder / ".DS_Store").write_bytes(b"x")
    return folder


def test_a_folder_becomes_a_data_set(photographs: Path, prepared: Path) -> None:
    manifest = load_manifest(open_place(str(prepared)))
    assert manifest.classes == tuple(sorted(p.name for p in photographs.iterdir()))
    assert len(manifest.shards) > 3
    rows = _rows(prepared)
    files = [photographs / row.key for row in rows]
    assert sorted(files) == sorted(photographs.rglob("*.jpg"))
    assert [row.image for row in rows] == [file.read_bytes() for file in files]
    assert [manifest.classes[row.label or 0] for row in rows] == [f.parent.name for f in files]
    assert {(row.width, row.height) for row in rows} == {(160, 160)}


def test_pictures_of_a_class_do_not_lie_together(prepared: Path) -> None:
    """A window holds few row groups: packed by class, its batches would be of few classes."""
    labels = [row.label for row in _rows(prepared)]
    assert len(set(labels)) == 6
    alike = sum(a == b for a, b in itertools.pairwise(labels))
    assert alike < len(labels) / 3  # by class all but 5; by chance a sixth


def test_a_data_set_of_an_older_order_is_kept_with_a_warning(
    photographs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _prepare(photographs, tmp_path / "out")
    asked = tmp_path / "out/prepare.json"
    told = json.loads(asked.read_text())
    del told["mixed"]
    asked.write_text(json.dumps(told))
    assert _prepare(photographs, tmp_path / "out").nothing_to_do
    assert "in the order of its pictures' names" in caplog.text
    (tmp_path / "out/manifest.json").unlink()  # it had not ended
    with pytest.raises(DataError, match="an older droppos began it, in the order of names"):
        _prepare(photographs, tmp_path / "out")


def test_the_report_counts_what_was_done(photographs: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    report = prepare(
        str(photographs), str(tmp_path / "out"), on_progress=lambda *call: calls.append(call)
    )
    assert (report.pictures, report.shards, report.set_aside) == (72, 1, {})
    assert report.bytes == (tmp_path / "out/shard-00000.parquet").stat().st_size
    assert calls == [(i + 1, 72) for i in range(72)]
    assert not report.nothing_to_do


def test_done_twice_is_done_once(photographs: Path, prepared: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*")}
    report = _prepare(photographs, prepared)
    assert report.nothing_to_do
    assert report.pictures == 72
    assert {path: path.stat().st_mtime_ns for path in prepared.rglob("*")} == before


@pytest.mark.parametrize("kind", ["tar", "gztar", "zip"])
@pytest.mark.parametrize("with_folder", [True, False])
def test_an_archive_gives_the_same_as_its_folder(
    photographs: Path, prepared: Path, tmp_path: Path, kind: str, with_folder: bool
) -> None:
    root, base = (photographs.parent, photographs.name) if with_folder else (photographs, ".")
    archive = shutil.make_archive(str(tmp_path / "photos"), kind, root, base)
    _prepare(archive, tmp_path / "out")
    assert _contents(tmp_path / "out") == _contents(prepared)


def test_a_member_that_comes_twice_counts_as_last_written(
    photographs: Path, tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("cat/00.jpg", "cat/01.jpg"):
            archive.add(photographs / name, "x/1.jpg")
            archive.add(photographs / name, f"y/{name[-6:]}")
    _prepare(tmp_path / "a.tar", tmp_path / "out")
    rows = _rows(tmp_path / "out")
    rows.sort(key=lambda row: row.key)
    assert [row.key for row in rows] == ["x/1.jpg", "y/00.jpg", "y/01.jpg"]
    assert rows[0].image == (photographs / "cat/01.jpg").read_bytes()


def test_what_an_archive_has_besides_plain_files_is_kept_or_named(
    photographs: Path, tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(photographs / "cat/00.jpg", "x/00.jpg")
        archive.add(photographs / "cat/01.jpg", "y/\udce9.jpg")  # é, in Latin-1
        for name, kind, target in (
            ("x/hard.jpg", tarfile.LNKTYPE, "x/00.jpg"),
            ("x/soft.jpg", tarfile.SYMTYPE, "00.jpg"),
            ("x/pipe.jpg", tarfile.FIFOTYPE, ""),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
    _prepare(tmp_path / "a.tar", tmp_path / "out")
    rows = {row.key: row.image for row in _rows(tmp_path / "out")}
    assert rows == dict.fromkeys(
        ("x/00.jpg", "x/hard.jpg"), (photographs / "cat/00.jpg").read_bytes()
    )
    aside = {e.key: e.kind for e in read_set_aside(open_place(str(tmp_path / "out")))}
    assert aside == {
        "y/\\udce9.jpg": "name is not UTF-8",
        "x/soft.jpg": "no file",
        "x/pipe.jpg": "no file",
    }


def test_a_link_beside_the_folder_of_an_archive_costs_no_labels(
    photographs: Path, tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("cat", "rocket"):
            archive.add(photographs / name / "00.jpg", f"photos/{name}/00.jpg")
        latest = tarfile.TarInfo("latest")
        latest.type, latest.linkname = tarfile.SYMTYPE, "photos"
        archive.addfile(latest)
    assert _prepare(tmp_path / "a.tar", tmp_path / "out").classes == ("cat", "rocket")
    assert {row.key for row in _rows(tmp_path / "out")} == {"cat/00.jpg", "rocket/00.jpg"}


def test_a_damaged_member_of_a_zip_is_set_aside(photographs: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("00.jpg", "01.jpg"):
            archive.write(photographs / "cat" / name, name)
    raw = bytearray((tmp_path / "a.zip").read_bytes())
    raw[200] ^= 1  # in the first picture
    (tmp_path / "a.zip").write_bytes(raw)
    _prepare(tmp_path / "a.zip", tmp_path / "out")
    assert [row.key for row in _rows(tmp_path / "out")] == ["01.jpg"]
    (aside,) = read_set_aside(open_place(str(tmp_path / "out")))
    assert (aside.key, aside.kind) == ("00.jpg", "undecodable") and "CRC" in aside.reason


def test_a_folder_that_links_to_one_it_is_in_comes_once(photographs: Path, tmp_path: Path) -> None:
    shutil.copytree(photographs / "cat", tmp_path / "src/cat")
    shutil.copytree(photographs / "rocket", tmp_path / "src/rocket")
    (tmp_path / "src/cat/again").symlink_to("../../src")
    (tmp_path / "src/cat/other").symlink_to(photographs / "coffee")  # a link like any folder
    _prepare(tmp_path / "src", tmp_path / "out")
    keys = [row.key for row in _rows(tmp_path / "out")]
    each = len(list((photographs / "cat").iterdir()))
    assert len(keys) == len(set(keys)) == 3 * each
    (aside,) = read_set_aside(open_place(str(tmp_path / "out")))
    assert (aside.key, aside.kind) == ("cat/again", "link to itself")


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.zip", "a.parquet"])
def test_a_damaged_archive_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"neither of these" * 100)
    with pytest.raises(DataError, match=name):
        _prepare(tmp_path / name, tmp_path / "out")


def _hugging_face(path: Path, files: list[Path], labels: pa.Array, names: list[str] | None) -> None:
    rows = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(rows, kind), "label": labels})
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        info = {"info": {"features": features}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table, path, row_group_size=4)


def test_hugging_face_parquet_keeps_names_of_labels(photographs: Path, tmp_path: Path) -> None:
    files = sorted((photographs / "cat").iterdir())[:6]
    for i in range(2):
        labels = pa.array([0, 1, None, -1, 1, 0], pa.int64())
        _hugging_face(tmp_path / f"hf/train-{i}.parquet", files, labels, ["tabby", "lynx"])
    (tmp_path / "hf/README.md").write_text("a data set card")
    _prepare(tmp_path / "hf", tmp_path / "out")
    rows = _rows(tmp_path / "out")
    assert load_manifest(open_place(str(tmp_path / "out"))).classes == ("tabby", "lynx")
    assert [row.label for row in rows] == [0, 1, None, None, 1, 0] * 2
    assert [row.image for row in rows] == [file.read_bytes() for file in files] * 2
    assert rows[7].key == "train-1/00000001"


@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [
        (pa.array(["b", "a", "b"]), ("a", "b"), [1, 0, 1]),
        (pa.array([2, 0, 2]), ("0", "1", "2"), [2, 0, 2]),
        (pa.array([None, None, None], pa.int64()), None, [None, None, None]),
    ],
)
def test_parquet_without_names_of_labels(
    photographs: Path,
    tmp_path: Path,
    labels: pa.Array,
    classes: tuple[str, ...] | None,
    expected: list[int | None],
) -> None:
    files = sorted((photographs / "cat").iterdir())[:3]
    _hugging_face(tmp_path / "one.parquet", files, labels, None)
    report = _prepare(tmp_path / "one.parquet", tmp_path / "out")
    assert report.classes == classes
    assert [row.label for row in _rows(tmp_path / "out")] == expected


def test_a_prepared_data_set_can_be_prepared_again(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    for file in prepared.glob("*.parquet"):
        shutil.copy(file, tmp_path / "shards")
    _prepare(tmp_path / "shards", tmp_path / "out")
    assert [row.image for row in _rows(tmp_path / "out")] == [row.image for row in _rows(prepared)]
    assert (
        _prepare(prepared, tmp_path / "again").classes
        == load_manifest(open_place(str(prepared))).classes
    )  # its own names, not 0, 1, ...
    assert _rows(tmp_path / "again") == _rows(prepared)


def test_parquet_of_something_else_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"img": [b"1"], "depth": [b"1"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(
        DataError,
        match=r"a\.parquet has no column 'image', its columns are img, depth, id; name the one "
        r"that holds encoded pictures with --image-column, of img, depth say",
    ):
        _prepare(tmp_path / "a.parquet", tmp_path / "out")
    pq.write_table(pa.table({"image": ["1"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="column 'image' is string; expected encoded pictures"):
        _prepare(tmp_path / "b.parquet", tmp_path / "out")


def test_what_is_no_picture_is_set_aside_by_name(soiled: Path, tmp_path: Path) -> None:
    report = _prepare(soiled, tmp_path / "out")
    aside = {entry.key: entry for entry in read_set_aside(open_place(str(tmp_path / "out")))}
    assert {key: entry.kind for key, entry in aside.items()} == {
        ".DS_Store": "hidden file",
        "cat/empty.jpg": "empty",
        "cat/notes.txt": "not a picture",
        "cat/truncated.jpg": "undecodable",
        "cat/words.jpg": "undecodable",
    }
    assert "truncated" in aside["cat/truncated.jpg"].reason
    assert report.pictures == 24
    assert report.classes == ("cat", "rocket")
    assert report.set_aside == {
        "hidden file": 1,
        "empty": 1,
        "not a picture": 1,
        "undecodable": 2,
    }
    assert load_manifest(open_place(str(tmp_path / "out"))).set_aside == 5


def test_a_name_that_is_not_utf8_is_told(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg")).write_bytes(b"x")
    with pytest.raises(DataError, match=r"xff.jpg' is not UTF-8; rename the file"):
        _prepare(tmp_path, tmp_path.with_suffix(".out"))


def test_there_are_labels_only_when_every_picture_has_one(
    photographs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("one/cat", "mixed/cat", "mixed/rocket"):
        shutil.copytree(photographs / name.split("/")[1], tmp_path / name)
    shutil.copy(photographs / "cat/00.jpg", tmp_path / "mixed")
    for name in ("one", "mixed"):
        assert _prepare(tmp_path / name, tmp_path / f"{name}-out").classes is None
        assert {row.label for row in _rows(tmp_path / f"{name}-out")} == {None}
    (told,) = caplog.messages  # one folder is no class, and nobody would think so
    assert "mixed has 2 sub-folders, but pictures beside them, such as 00.jpg" in told


def test_a_turned_picture_is_kept_as_it_is_and_measured_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "in").mkdir()
    Image.new("RGB", (30, 20)).save(tmp_path / "in/turned.jpg", exif=exif)
    _prepare(tmp_path / "in", tmp_path / "out")
    (row,) = _rows(tmp_path / "out")
    assert (row.width, row.height) == (20, 30)
    assert row.image == (tmp_path / "in/turned.jpg").read_bytes()


def test_a_source_without_pictures_says_what_was_there(tmp_path: Path) -> None:
    source, dest = tmp_path / "in", tmp_path / "out"
    with pytest.raises(DataError, match="in does not exist"):
        _prepare(source, dest)
    source.mkdir()
    with pytest.raises(DataError, match="in is empty"):
        _prepare(source, dest)
    (source / "a.txt").write_text("x")
    (source / "b.jpg").write_text("x")
    with pytest.raises(
        DataError, match=r"all 2 files were set aside \(b.jpg: cannot decode.*a.txt"
    ):
        _prepare(source, dest)
    Image.new("RGB", (8, 8)).save(source / "c.png")
    assert _prepare(source, dest).pictures == 1  # and the failure is not in the way


def test_other_pictures_are_not_mixed_in(photographs: Path, tmp_path: Path) -> None:
    source, dest = tmp_path / "in", tmp_path / "out"
    shutil.copytree(photographs / "cat", source)
    _prepare(source, dest)
    with pytest.raises(DataError, match="its group_rows is 5, now 6 is asked"):
        prepare(str(source), str(dest), shard_bytes=SHARD_BYTES, group_rows=6)
    with pytest.raises(DataError, match=f"its source is {source}, now {photographs} is asked"):
        _prepare(photographs, dest)
    shutil.copy(photographs / "rocket/00.jpg", source / "new.jpg")
    with pytest.raises(DataError, match="names or sizes of the source's files have changed"):
        _prepare(source, dest)


def test_impossible_settings_are_refused(photographs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is inside of source"):
        _prepare(photographs, photographs / "shards")
    with pytest.raises(ConfigError, match="is inside of source"):
        _prepare(photographs, photographs)
    for name in ("shard_bytes", "group_rows", "workers"):
        with pytest.raises(ConfigError, match=f"{name} must be positive, got 0"):
            prepare(str(photographs), str(tmp_path), **{name: 0})


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 pictures that take a while to decode, so that there is time to kill."""
    folder = tmp_path_factory.mktemp("noise")
    random = np.random.default_rng(0)
    for i in range(24):
        image = Image.fromarray(random.integers(0, 256, (400, 400, 3), dtype=np.uint8))
        file = BytesIO()
        image.save(file, "JPEG")
        for j in range(10):
            (folder / f"{i:02d}-{j}.jpg").write_bytes(file.getvalue())
    (folder / "00-5x.jpg").write_bytes(file.getvalue()[:1000])
    return folder


@pytest.mark.shares
@pytest.mark.parametrize("where", ["folder", "s3"])
def test_killed_and_continued_it_ends_with_the_same_bytes(
    noise: Path, tmp_path: Path, where: str, request: pytest.FixtureRequest
) -> None:
    dest = str(tmp_path / "killed")
    if where == "s3":
        dest = f"{request.getfixturevalue('s3_env').bucket('killed')}/data"
    settings = {"shard_bytes": 1_000_000, "group_rows": 7, "workers": 1}
    code = f"from pipelines.prepare import prepare; prepare({str(noise)!r}, {dest!r}, **{settings})"
    shards = open_place(dest) / "progress"
    for finished in (2, 5):
        with subprocess.Popen([sys.executable, "-c", code]) as process:
            while len(shards.children()) < finished:
                assert process.poll() is None, "it ended before it could be killed"
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
    with pytest.raises(DataError, match="is not a prepared data set"):
        load_manifest(open_place(dest))
    first = open_place(dest) / "shard-00000.parquet"
    written = first.fs.get_file_info(first.path).mtime_ns
    prepare(str(noise), dest, **settings)
    assert first.fs.get_file_info(first.path).mtime_ns == written
    prepare(str(noise), str(tmp_path / "whole"), **settings)
    assert _contents(dest) == _contents(tmp_path / "whole")


def test_a_lost_last_record_costs_one_shard(
    photographs: Path, prepared: Path, tmp_path: Path
) -> None:
    dest = tmp_path / "out"
    shutil.copytree(prepared, dest)
    for name in ("manifest.json", "set_aside.jsonl", "progress/shard-00002.json"):
        (dest / name).unlink()
    _prepare(photographs, dest)
    assert _contents(dest) == _contents(prepared)


def test_pictures_go_from_and_to_s3(soiled: Path, tmp_path: Path, s3_env: S3Server) -> None:
    bucket = s3_env.bucket(f"pictures-{os.urandom(4).hex()}")
    for file in (path for path in soiled.rglob("*") if path.is_file()):
        name = file.relative_to(soiled).as_posix()
        (open_place(f"{bucket}/in") / name).write_bytes(file.read_bytes())
    _prepare(soiled, tmp_path / "local")
    _prepare(soiled, f"{bucket}/from-folder")
    report = _prepare(f"{bucket}/in", f"{bucket}/from-s3")
    assert _contents(f"{bucket}/from-folder") == _contents(tmp_path / "local")
    assert _contents(f"{bucket}/from-s3") == _contents(tmp_path / "local")
    assert report.pictures == 24
    assert _prepare(f"{bucket}/in", f"{bucket}/from-s3").nothing_to_do


def test_an_archive_on_s3_is_unpacked(
    photographs: Path, prepared: Path, tmp_path: Path, s3_env: S3Server
) -> None:
    bucket = s3_env.bucket(f"archive-{os.urandom(4).hex()}")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for file in photographs.rglob("*.jpg"):
            archive.write(file, file.relative_to(photographs))
    (open_place(bucket) / "a.zip").write_bytes((tmp_path / "a.zip").read_bytes())
    _prepare(f"{bucket}/a.zip", tmp_path / "out")
    assert _contents(tmp_path / "out") == _contents(prepared)


def test_a_missing_bucket_or_key_stops_before_anything_is_read(
    photographs: Path, tmp_path: Path, s3_env: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="there is no bucket 'nowhere'"):
        _prepare(photographs, "s3://nowhere/data")
    with pytest.raises(DataError, match="there is no bucket 'nowhere'"):
        _prepare("s3://nowhere/data", tmp_path / "out")
    bucket = s3_env.bucket(f"closed-{os.urandom(4).hex()}")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(DataError, match="access denied"):
        _prepare(photographs, f"{bucket}/data")
