"""The drill itself, on real nodes; and its referee, which must not call a loss a recovery."""

import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from droppos.config import Optim
from droppos.errors import ConfigError
from pipelines import drill as module
from pipelines.drill import Bout, DrillReport, Referee, Twin, drill
from pipelines.drill_faults import Fault, faults_for
from pipelines.drill_stage import Outage, Stage, stage_for
from pipelines.recipe import Recipe, Run
from pipelines.recipe_file import from_dict, read
from pipelines.report import show_drill
from pipelines.storage import open_place


@pytest.mark.slow
@pytest.mark.long
def test_a_run_that_everything_happens_to_loses_nothing(tmp_path: Path) -> None:
    """A notice, a killed node, one that comes; a worker leaves, is lost, moves.

    Each fault costs this suite most of a minute, so it has one of each kind of recovery. What the
    others need is tested by itself: storage away in test_storage_faults.py, MLflow away in
    test_ledger.py, a damaged checkpoint in test_saver.py, failures and hangs in test_supervisor.py.
    """
    only = ("notice", "node", "grow")
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pipelines.cli",
            "drill",
            "--outage-s",
            "5",
            "--only",
            *only,
            "--tracking.uri",
            f"sqlite:///{tmp_path}/mlflow.db",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=900,
    )
    said = done.stderr
    assert done.returncode == 0, said[-5000:]
    assert done.stdout == f"drill faults={len(only)} recovered={len(only)} lost=0 repeated=0\n"
    assert "a node is about to go, and 2 workers fit on the others" in said
    assert "there is room for 2 workers now, not only 1" in said
    assert "Traceback" not in said
    loss, twin = re.findall(r"last loss +(\S+), undisturbed (\S+)", said)[0]
    assert float(loss) == pytest.approx(float(twin), rel=1e-3)
    # Once per fault, the table tells how many steps were done again: none, after a notice.
    (notice,) = (line for line in said.splitlines() if line.strip().startswith("spot notice"))
    assert notice.split()[-3:] == ["0", "0", "0"]


def fault(key: str = "kill", **changed: Any) -> Fault:
    over = threading.Event()
    over.set()
    made = Fault(key, f"{key} it", lambda crew: over, frozenset({"lost"}))
    return replace(made, **changed)


class Told:
    """Tells a referee what a run of two workers would."""

    def __init__(self, *faults: Fault) -> None:
        self.said: list[str] = []
        self.referee = Referee(list(faults), 2, Stage(Recipe()), self.said.append, None)

    def start(self, step: int, workers: int = 2) -> None:
        self.referee({"kind": "group", "workers": workers})
        for rank in reversed(range(workers)):  # in whatever order they come
            self.referee(
                {
                    "kind": "started",
                    "rank": rank,
                    "node": "n",
                    "pid": 7 + rank,
                    "step": step,
                    "workers": workers,
                }
            )

    def steps(self, *steps: int) -> None:
        for step in steps:
            values = {"train/loss": 1.0}
            self.referee({"kind": "metrics", "step": step, "values": values})

    def save(self, step: int) -> None:
        self.referee({"kind": "checkpoint", "step": step})


def test_it_strikes_two_steps_after_a_checkpoint_and_counts_what_is_done_again() -> None:
    struck: list[list[tuple[str, int]]] = []
    over = threading.Event()
    over.set()
    run = Told(fault(strike=lambda crew: struck.append(crew) or over))
    run.start(0)
    run.steps(1, 2, 3)
    assert not struck  # nothing to go back to
    run.save(3)
    run.steps(4)
    assert not struck
    run.steps(5)
    assert struck == [[("n", 7), ("n", 8)]]
    run.steps(6)  # what was under way
    (bout,) = run.referee.bouts
    run.referee({"kind": "lost", "error": "", "step": 3})
    assert bout.noticed_s is not None and bout.recovered_s is None
    run.start(3)
    run.steps(4, 5)
    assert bout.recovered_s is None
    run.steps(6)
    assert bout.recovered_s is not None
    assert (bout.step, bout.redone, bout.workers) == (5, 3, 2)
    assert run.referee.is_over()


def test_a_drill_that_ended_before_it_struck_has_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, an IndexError."""
    run = Told(fault())
    saved = SimpleNamespace(step=4)
    monkeypatch.setattr(module.checkpoints, "newest", lambda home: saved)
    monkeypatch.setattr(module, "differences", lambda home, saved: iter([(3, 2, 1)]))
    recipe = Recipe(run=Run(storage=str(tmp_path)))
    report = module._report(recipe, run.referee, Twin(4, None), None, "out of memory")
    assert (report.missing, report.repeated) == (2, 1)
    assert (report.not_struck, report.error) == (["kill it"], "out of memory")


def test_steps_that_go_on_by_themselves_are_no_recovery_from_a_lost_worker() -> None:
    run = Told(fault())
    run.start(0)
    run.save(0)
    run.steps(*range(1, 50))
    assert run.referee.bouts[0].recovered_s is None and not run.referee.is_over()


def test_while_storage_is_away_and_before_a_checkpoint_it_is_not_recovered_from() -> None:
    over = threading.Event()
    run = Told(fault(strike=lambda crew: over, restarts=False, back="checkpoint"))
    run.start(0)
    run.save(0)
    run.steps(1, 2, 3)
    run.save(3)  # was under way
    run.steps(4)
    over.set()
    run.steps(5)
    assert run.referee.bouts[0].recovered_s is None
    run.save(6)
    run.steps(6)
    assert run.referee.bouts[0].recovered_s is not None


def test_while_the_run_is_smaller_than_it_could_be_only_a_new_node_comes() -> None:
    run = Told(fault("grow", any_size=True), fault())
    run.start(0, workers=1)
    run.save(0)
    run.steps(1, 2)
    assert [bout.fault for bout in run.referee.bouts] == ["grow it"]
    run.start(2)
    run.steps(3)
    assert run.referee.bouts[0].workers == 2
    run.save(3)
    run.steps(4, 5)
    assert [bout.fault for bout in run.referee.bouts] == ["grow it", "kill it"]


def report(**changed: Any) -> DrillReport:
    bout = Bout("worker killed (-9)", 12, 0.0, 0.5, 20.0, 3, 2)
    made = DrillReport(
        recipe=Recipe(),
        bouts=[bout],
        not_struck=[],
        error="",
        steps=30,
        missing=0,
        repeated=0,
        logged=30,
        loss=1.0,
        twin_loss=1.001,
    )
    return replace(made, **changed)


def test_nothing_lost_is_a_pass() -> None:
    assert report().passed
    assert report().line == "drill faults=1 recovered=1 lost=0 repeated=0"


@pytest.mark.parametrize(
    "changed",
    [
        {"missing": 1},
        {"repeated": 1},
        {"error": "the workers failed"},
        {"not_struck": ["node killed (-9)"]},
        {"logged": 29},
        {"logged": None},
        {"twin_loss": 1.1},
        {"twin_loss": None},
        {"loss": float("nan")},
        {"bouts": [Bout("worker killed (-9)", 12, 0.0)]},
    ],
)
def test_whatever_is_lost_is_no_pass(changed: dict[str, Any]) -> None:
    assert not report(**changed).passed


def test_the_table_fits_a_narrow_terminal() -> None:
    console = Console(width=80, record=True, file=StringIO())
    bouts = [
        Bout("worker told to go (SIGTERM)", 1234, 0.0, 12.5, 123.4, 100, 16),
        Bout("node comes", 12, 0.0),
    ]
    show_drill(console, report(bouts=bouts, error="node comes was not recovered from"))
    text = console.export_text()
    assert "worker told to go (SIGTERM)" in text
    assert re.search(r"told +back +size +again +lost +twice", text)
    assert re.search(r"1,234 +12\.5 +123\.4 +16 +100 +0 +0", text)
    assert re.search(r"node comes +12 +not +never", text)
    assert "error: node comes was not" in text


def test_what_cannot_be_drilled_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = from_dict(read("drill"))
    for run, words in (
        (replace(recipe.run, record_ids=False), "run.record_ids=False; add"),
        (replace(recipe.run, log_every=10), "run.log_every=10"),
        (replace(recipe.run, checkpoint_every=2), r"checkpoint_every=2; take 3 or more"),
    ):
        with pytest.raises(ConfigError, match=words):
            drill(replace(recipe, run=run), say=print)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ConfigError, match="name one that all nodes share"):
        stage_for(recipe, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_fault_that_is_none_or_cannot_be_had_here_is_refused(
    tmp_path: Path, ray_cluster: None
) -> None:
    stage = Stage(Recipe(optim=Optim(), run=Run()))  # a cluster that stands, of one node
    home = open_place(str(tmp_path))
    keys = [each.key for each in faults_for(stage, home, 5)]
    assert keys == ["kill", "term", "hang", "damage"]
    for unknown in ("fire", "storage", "node", "grow"):
        with pytest.raises(ConfigError, match=f"no fault '{unknown}' here; expected some of kill"):
            faults_for(stage, home, 5, [unknown])


def test_what_was_taken_away_comes_back() -> None:
    did: list[str] = []
    outage = Outage(lambda: did.append("stop"), lambda: did.append("start"), 0.05)
    assert did == ["stop"] and not outage.over.is_set()
    assert outage.over.wait(10) and did == ["stop", "start"]
