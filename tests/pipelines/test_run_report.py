"""The report of a run that was written by hand, on real photographs."""

import re
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from math import exp
from pathlib import Path

import pytest
import torch
from PIL import Image

from droppos.config import Method, Model, Optim
from droppos.model import DropPos
from pipelines import stored_state
from pipelines.checkpoints import Retention, Saved
from pipelines.cli import main
from pipelines.facts import facts
from pipelines.history import HistoryWriter
from pipelines.ledger import Ledger
from pipelines.prepare import prepare
from pipelines.recipe import Data, Measure, Recipe, Run, Tracking
from pipelines.run_report import run_report, verdict
from pipelines.shards import load_manifest
from pipelines.storage import open_place

# MLflow's own mapping of its tables uses what SQLAlchemy 2.1 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")

TINY = Model(
    size="tiny",
    image_size=(48, 48),
    patch_size=12,
    width=32,
    depth=1,
    heads=2,
    decoder_width=32,
    decoder_heads=2,
)
STEPS = 300
SECRET = "hunter2hunter2"
METRICS = {
    "holdout/position/accuracy": 0.42,
    "holdout/position/accuracy_low_95": 0.40,
    "holdout/position/accuracy_high_95": 0.44,
    "holdout/position/chance": 0.0625,
    "holdout/features/knn_accuracy": 0.5,
    "holdout/features/knn_skill": 0.4,
    "holdout/features/effective_rank": 12.3,
}


class Page(HTMLParser):
    """What a browser would fetch or run, and the words it shows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: set[str] = set()
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.words += " " + data


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, photographs: Path) -> Saved:
    folder = tmp_path_factory.mktemp("runs")
    data = str(folder / "data")
    prepare(str(photographs), data)
    recipe = Recipe(
        model=TINY,
        method=Method(mask_ratio=0.25),
        optim=Optim(epochs=3, warmup_epochs=1, global_batch=12),
        data=Data(path=data, holdout=data),
        run=Run(name="<by> hand", storage=str(folder)),
        measure=Measure(mask_ratio=0.25, pictures=24),
        tracking=Tracking(uri=f"sqlite:///{folder}/mlflow.db"),
    )
    home = open_place(recipe.home)
    writer = HistoryWriter(home, "group", 0)
    for step in range(1, STEPS + 1):
        writer.add(step, {"train/loss": 2.7 * exp(-step / 200), "data/images_per_s": 500.0})
    writer.add(STEPS, METRICS)
    writer.cut(STEPS)()
    manifest = load_manifest(open_place(data))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MY_SECRET_TOKEN", SECRET)
        with Ledger.open(recipe, manifest.digest, resume=False) as ledger:
            ledger.tag({"hardware.workers": "2 x Abacus", "command": f"droppos --x {SECRET}"})
            ledger.log(STEPS, {"cost/worker_hours": 3.5, "evaluation/cats/knn_accuracy": 0.61})
    told = {**facts(recipe, manifest), "previous": None, "metrics": METRICS}
    state = {"model": DropPos(recipe.model, recipe.method).state_dict()}
    return stored_state.save(home, STEPS, state, told, Retention(1))


@pytest.fixture(scope="module")
def text(saved: Saved) -> str:
    return run_report(saved)


def test_it_needs_nothing_else_and_runs_nothing(text: str) -> None:
    page = Page(text)
    assert page.sources and all(source.startswith("data:image/") for source in page.sources)
    assert not page.tags & {"script", "link", "iframe", "object"}


def test_its_pictures_are_pictures(text: str) -> None:
    encoded = re.findall(r"data:image/png;base64,([^\"]+)", text)
    assert len(encoded) == 4  # reassembly, confusion, attention, features
    for png in encoded:
        assert Image.open(BytesIO(b64decode(png))).width > 500


def test_it_tells_what_the_run_came_to(text: str, saved: Saved) -> None:
    words = Page(text).words
    for said in (
        "Run <by> hand",
        "42.0% (40.0% to 44.0%)",
        "40.0% to 44.0%",
        "12.3 directions",
        "2 x Abacus",
        "cats/knn_accuracy",
        "61.0%",
        "3.5",
        saved.sha256,
        saved.record["manifest"],
    ):
        assert said in words, said
    assert SECRET not in text


def test_words_follow_the_figures() -> None:
    assert "has learnt" in verdict(METRICS, 1, 1)[0]
    guessing = {**METRICS, "holdout/position/accuracy_low_95": 0.05}
    assert "is still guessing" in verdict(guessing, 1, 1)[0]
    assert "These figures are of step 5" in verdict(METRICS, 7, 5)[-1]
    assert "nothing was measured" in verdict({}, 7, None)[0]


def test_a_checkpoint_that_was_not_measured_is_given_no_later_figures(saved: Saved) -> None:
    """MLflow has the figures of a later step; the report is of the run as it was."""
    earlier = replace(saved, step=STEPS - 1, record={**saved.record, "metrics": {}})
    words = Page(run_report(earlier)).words
    assert "nothing was measured" in words and "42.0%" not in words


def test_without_mlflow_and_with_data_gone_the_rest_is_told(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines import run_report as module

    monkeypatch.setattr(module, "pointer", lambda home: {})
    recipe = {**saved.record["recipe"]}
    recipe["data"] = {**recipe["data"], "holdout": "/gone"}
    torn = Saved(
        saved.place, saved.step, saved.cursor, saved.files, {**saved.record, "recipe": recipe},
        saved.sha256,
    )  # fmt: skip
    words = Page(run_report(torn)).words
    assert "could not be drawn" in words and "MLflow could not be reached" in words
    assert "42.0%" in words


@pytest.mark.shares
def test_the_command_writes_it(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    main(["report", saved.uri, "--out", str(tmp_path / "new" / "report.html")])
    assert "42.0%" in (tmp_path / "new" / "report.html").read_text()
    monkeypatch.chdir(tmp_path)
    main(["report", saved.uri])  # one run's takes no other's place
    (file,) = (tmp_path / "droppos-runs").iterdir()
    assert file.name == f"{saved.home.name}-report.html"
