"""The journal: nothing that was appended is lost, whatever happens to its process."""

import multiprocessing
import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from droppos.errors import DataError
from pipelines import journal as module
from pipelines.journal import (
    About,
    Artifact,
    Ended,
    Entry,
    Journal,
    Names,
    Row,
    journals,
    next_writer,
)

ABOUT = About("sqlite:///x", "run1", "a run", "/runs/a", "000001-abc")


def create(folder: Path) -> Journal:
    return Journal.create(folder, ABOUT)


def adopted(path: Path) -> closing[Journal]:
    journal = Journal.adopt(path)
    assert journal is not None
    return closing(journal)


def entries(journal: Journal) -> list[Entry]:
    return [stored.entry for stored in journal.pending(2**31)]


@given(
    kinds=st.lists(
        st.one_of(
            st.builds(
                Row,
                step=st.integers(0, 2**40),
                time_ms=st.integers(0, 2**50),
                values=st.dictionaries(st.text(), st.floats(allow_nan=False)),
            ),
            st.builds(
                Names,
                params=st.dictionaries(st.text(), st.text()),
                tags=st.dictionaries(st.text(), st.text()),
            ),
            st.builds(Artifact, name=st.text(), content=st.binary()),
            st.builds(Ended, status=st.just("KILLED"), time_ms=st.integers(0)),
        )
    ),
    most=st.integers(1, 5),
)
def test_what_is_appended_comes_out_in_order(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[Entry], most: int
) -> None:
    journal = create(tmp_path_factory.mktemp("spool"))
    for entry in kinds:
        journal.append(entry)
    taken: list[Entry] = []
    while found := journal.pending(most):
        assert len(found) <= most
        taken += [stored.entry for stored in found]
        journal.take(found[-1].end)
    assert taken == kinds
    journal.close()
    assert journals(journal.path.parent) == []


def test_what_was_not_taken_is_there_for_the_next_process(tmp_path: Path) -> None:
    first = create(tmp_path)
    rows = [Row(step, 0, {"loss": 1.0}) for step in range(10)]
    for row in rows:
        first.append(row)
    first.take(first.pending(4)[-1].end)
    first.close()
    with adopted(first.path) as second:
        assert second.about == first.about
        assert entries(second) == rows[4:]
        assert second.left() == 6


def test_a_journal_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    with closing(create(tmp_path)) as journal:
        journal.append(Row(1, 0, {}))
        assert Journal.adopt(journal.path) is None


def append_for_ever(folder: Path) -> None:
    journal = create(folder)
    for step in range(10**9):
        journal.append(Row(step, 0, {"loss": 0.5}))
        print(step, flush=True)


@pytest.mark.parametrize("_", range(3))
def test_a_killed_process_loses_nothing_that_append_returned_from(tmp_path: Path, _: int) -> None:
    code = "import sys; from pathlib import Path; from tests.pipelines.test_journal import *; "
    code += "append_for_ever(Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path.cwd()) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) > 200:
                break
        process.send_signal(signal.SIGKILL)
        said = [line for line in process.stdout.read().splitlines(keepends=True) if "\n" in line]
    (path,) = journals(tmp_path)
    with adopted(path) as journal:
        steps = [entry.step for entry in entries(journal) if isinstance(entry, Row)]
    assert steps == list(range(len(steps)))
    assert len(steps) > (int(said[-1]) if said else 200)


def test_a_line_cut_short_is_dropped_and_a_damaged_one_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = create(tmp_path)
    first.append(Row(1, 0, {}))
    first.close()
    with first.path.open("ab") as file:
        file.write(b'{"kind": "nonsense"}\n12\n{"kind": "Row", "st')
    with adopted(first.path) as second:
        second.append(Row(2, 0, {}))
        assert entries(second) == [Row(1, 0, {}), Row(2, 0, {})]
    assert "damaged" in caplog.text


@pytest.mark.parametrize("text", ["hello\n", "", "12\n"])
def test_a_file_that_is_no_journal_is_told_and_left(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x-y.journal"
    path.write_text(text)
    with pytest.raises(DataError, match="is no journal"):
        Journal.adopt(path)
    assert path.read_text() == text


def test_a_journal_that_is_all_taken_starts_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ROOMY", 1000)
    journal = create(tmp_path)
    sizes = []
    for step in range(100):
        journal.append(Row(step, 0, {"loss": 0.5}))
        assert entries(journal) == [Row(step, 0, {"loss": 0.5})]
        journal.take(journal.pending(9)[-1].end)
        sizes.append(journal.path.stat().st_size)
    assert max(sizes) < 2000
    journal.append(Row(7, 0, {}))
    journal.close()
    with adopted(journal.path) as again:
        assert entries(again) == [Row(7, 0, {})]


def fill_the_disk(folder: Path) -> None:
    import resource

    journal = create(folder)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    size = journal.path.stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 130, resource.RLIM_INFINITY))
    rows = [Row(step, 0, {"loss": 0.5}) for step in range(6)]
    for row in rows:
        journal.append(row)
    assert 0 < len(entries(journal)) < 6
    assert journal.left() == 6
    taken = []
    while found := journal.pending(2):
        if found[0].end == -1 and len(rows) == 6:  # somebody makes room while it is being sent
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
            rows.append(Row(6, 0, {"loss": 0.5}))
            journal.append(rows[-1])
        taken += [stored.entry for stored in found]
        journal.take(found[-1].end)
    assert taken == rows and len(rows) == 7
    assert journal.left() == 0
    journal.close()
    os._exit(0)


def test_a_full_disk_loses_nothing_and_raises_nothing(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=fill_the_disk, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == 0


def test_names_of_writers_grow() -> None:
    names = [next_writer()]
    for _ in range(20):
        names.append(next_writer(*names[-2:]))
    assert names == sorted(names)
    assert next_writer(names[-1] + " ended", "") > names[-1] + " ended"
