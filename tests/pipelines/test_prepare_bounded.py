"""Preparing with a bound: the same job as without, of smaller pictures."""

import json
import shutil
from io import StringIO
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from droppos.bounded import Bound, bounded_copy
from droppos.errors import ConfigError, DataError
from pipelines.cli import main
from pipelines.prepare import PrepareReport, prepare, read_set_aside
from pipelines.report import show_prepare
from pipelines.shards import Manifest, Picture, load_manifest, read_rows
from pipelines.storage import open_place

SHARD_BYTES = 20_000
"""So small that 72 copies fill several shards."""


def _prepare(source: Path, dest: Path, **changes: object) -> PrepareReport:
    settings = {"shard_bytes": SHARD_BYTES, "group_rows": 5, "workers": 2, "short_side": 64}
    return prepare(str(source), str(dest), **(settings | changes))


def _manifest(dest: Path) -> Manifest:
    return load_manifest(open_place(str(dest)))


def _rows(dest: Path) -> list[Picture]:
    return list(read_rows(open_place(str(dest)), _manifest(dest)))


def _contents(dest: Path) -> dict[str, bytes]:
    files = (path for path in dest.rglob("*") if path.is_file())
    return {str(path.relative_to(dest)): path.read_bytes() for path in files}


def _shown(report: PrepareReport) -> str:
    console = Console(file=(file := StringIO()), width=200)
    show_prepare(console, report, "out")
    return " ".join(file.getvalue().split())


@pytest.fixture(scope="module")
def prepared(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dest = tmp_path_factory.mktemp("bounded")
    _prepare(photographs, dest)
    return dest


def test_every_row_is_the_copy_of_its_picture(photographs: Path, prepared: Path) -> None:
    bound = Bound(short_side=64, quality=90)
    rows = _rows(prepared)
    files = [photographs / row.key for row in rows]
    assert sorted(files) == sorted(photographs.rglob("*.jpg"))
    assert [row.image for row in rows] == [
        bounded_copy(file.read_bytes(), bound).image for file in files
    ]
    assert {(row.width, row.height) for row in rows} == {(64, 64)}
    classes = _manifest(prepared).classes or ()
    assert [classes[row.label or 0] for row in rows] == [file.parent.name for file in files]


def test_pictures_within_the_bound_give_the_data_set_without_one(
    photographs: Path, tmp_path: Path
) -> None:
    _prepare(photographs, tmp_path / "without", short_side=None)
    report = _prepare(photographs, tmp_path / "with", short_side=160)
    assert report.bounded is not None and report.bounded.copies == 0
    assert _manifest(tmp_path / "with").digest == _manifest(tmp_path / "without").digest
    assert _rows(tmp_path / "with") == _rows(tmp_path / "without")
    assert "bounded" not in json.loads((tmp_path / "without/manifest.json").read_bytes())


def test_manifest_and_report_count_what_was_made_smaller(photographs: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    shutil.copytree(photographs / "cat", source)
    Image.new("RGB", (64, 90), "red").save(source / "small.png")
    before = sum(file.stat().st_size for file in source.glob("*.jpg"))
    report = _prepare(source, tmp_path / "out", quality=80)
    rows = {row.key: row for row in _rows(tmp_path / "out")}
    assert rows["small.png"].image == (source / "small.png").read_bytes()
    after = sum(len(row.image) for key, row in rows.items() if key != "small.png")
    said = json.loads((tmp_path / "out/manifest.json").read_bytes())["bounded"]
    assert said == {
        "short_side": 64,
        "quality": 80,
        "copies": 12,
        "bytes_before": before,
        "bytes_after": after,
    }
    shown = _shown(report)
    saved = f"{1 - after / before:.0%} less"
    assert "made smaller 12 of 13, to a short side of 64" in shown and saved in shown
    again = _prepare(source, tmp_path / "out", quality=80)
    assert again.nothing_to_do and again.bounded == report.bounded
    assert saved in _shown(again)
    unbounded = _prepare(source, tmp_path / "whole", short_side=None)
    assert unbounded.bounded is None
    assert "made smaller" not in _shown(unbounded)


def test_copies_larger_than_their_originals_are_told(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.effect_noise((70, 70), 90).save(tmp_path / "in/coarse.jpg", quality=5)
    assert "more)" in _shown(_prepare(tmp_path / "in", tmp_path / "out", quality=100))


class _StoppedError(Exception):
    """Stands for whatever ends the job in the middle."""


@pytest.mark.parametrize("stops", [(1,), (40,), (20, 55), (72,)])
def test_stopped_and_continued_it_ends_with_the_same_bytes(
    photographs: Path, prepared: Path, tmp_path: Path, stops: tuple[int, ...]
) -> None:
    for stop in stops:

        def on_progress(done: int, total: int, stop: int = stop) -> None:
            if done == stop:
                raise _StoppedError

        with pytest.raises(_StoppedError):
            _prepare(photographs, tmp_path / "out", on_progress=on_progress)
        assert not (tmp_path / "out/manifest.json").exists()
    _prepare(photographs, tmp_path / "out")
    assert len(_manifest(prepared).shards) > 3
    assert _contents(tmp_path / "out") == _contents(prepared)


def test_the_number_of_threads_changes_nothing(
    photographs: Path, prepared: Path, tmp_path: Path
) -> None:
    _prepare(photographs, tmp_path / "out", workers=5)
    assert _contents(tmp_path / "out") == _contents(prepared)


def test_another_bound_is_another_data_set(photographs: Path, prepared: Path) -> None:
    before = _contents(prepared)
    for changes, told in (
        ({"short_side": 65}, "its short_side is 64, now 65 is asked"),
        ({"quality": 91}, "its quality is 90, now 91 is asked"),
        ({"short_side": None}, "its short_side is 64, now none is asked"),
    ):
        with pytest.raises(DataError, match=told):
            _prepare(photographs, prepared, **changes)
    assert _prepare(photographs, prepared, quality=90).nothing_to_do
    assert _contents(prepared) == before


def test_what_was_prepared_before_there_were_bounds_goes_on(
    photographs: Path, tmp_path: Path
) -> None:
    _prepare(photographs, tmp_path / "whole", short_side=None)
    old = tmp_path / "old"
    shutil.copytree(tmp_path / "whole", old)
    (old / "manifest.json").unlink()
    (old / "progress/shard-00002.json").unlink()
    for name in ("prepare.json", "progress/shard-00000.json", "progress/shard-00001.json"):
        text = json.loads((old / name).read_bytes())
        for key in ("short_side", "quality", "saved"):
            text.pop(key, None)
        (old / name).write_text(json.dumps(text))
    _prepare(photographs, old, short_side=None)
    manifest = "manifest.json"
    assert (old / manifest).read_bytes() == (tmp_path / "whole" / manifest).read_bytes()


def test_what_cannot_be_bounded_is_set_aside_by_name(photographs: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    shutil.copytree(photographs / "cat", source)
    whole = (source / "00.jpg").read_bytes()
    (source / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    Image.new("1", (200_000, 65)).save(source / "endless.png")
    report = _prepare(source, tmp_path / "out")
    aside = {entry.key: entry.kind for entry in read_set_aside(open_place(str(tmp_path / "out")))}
    assert aside == {"cut.jpg": "undecodable", "endless.png": "too long"}
    assert report.pictures == 12


def test_a_manifest_with_a_broken_bound_is_refused() -> None:
    text = json.loads(Manifest((), None).to_json())
    assert Manifest.from_json(json.dumps(text)).bounded is None
    for broken in ([], {"short_side": 320}, dict.fromkeys(("short_side", "quality"), "x")):
        with pytest.raises(DataError, match="bounded must be an object of whole numbers short_"):
            Manifest.from_json(json.dumps(text | {"bounded": broken}))


def test_the_command_line_makes_copies_and_refuses_nonsense(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = str(photographs / "cat"), str(tmp_path / "out")
    with pytest.raises(SystemExit):
        main(["prepare", source, out, "--quality", "80"])
    assert "give a short side too" in capsys.readouterr().err
    assert not Path(out).exists()
    main(["prepare", source, out, "--short-side", "48", "--quality", "80"])
    assert "12 of 12, to a short side of 48" in capsys.readouterr().err
    bounded = _manifest(Path(out)).bounded
    assert bounded is not None and (bounded.short_side, bounded.quality) == (48, 80)


def test_impossible_bounds_stop_before_anything_is_written(
    photographs: Path, tmp_path: Path
) -> None:
    for changes in ({"short_side": 15}, {"quality": 0}, {"short_side": None, "quality": 90}):
        with pytest.raises(ConfigError):
            _prepare(photographs, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()
