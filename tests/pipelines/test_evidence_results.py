"""Raw results as a table, what is made of them, and that every arm may compute as much."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from droppos.errors import ConfigError, DataError
from droppos.flops import step_flops
from droppos.measure.finetune_recipe import Finetune
from pipelines.evidence import ablations, protocol
from pipelines.evidence.ablations import RECIPE, Trial, compare
from pipelines.evidence.arms import ARMS, BY_NAME, FIGURES, figures_of
from pipelines.evidence.budget import (
    TRAIN,
    at_budget,
    supervised_at_budget,
    supervised_flops,
)
from pipelines.evidence.outlook import outlooks
from pipelines.evidence.page import compared, curve, differences, fill, gains, line, outlook
from pipelines.evidence.pictures import draw
from pipelines.evidence.protocol import FINETUNE, digest
from pipelines.evidence.recipes import changed, load_recipe
from pipelines.evidence.results import Key, Row, estimate, known_rows, read_rows, write_rows
from pipelines.evidence.study import Study
from pipelines.evidence.work import RESULTS
from pipelines.storage import open_place
from pipelines.trials import Record, TrialTable

OUT = Path(__file__).parents[2] / "docs" / "evidence"
TRAINED = [arm for arm in ARMS if arm.kind == "pre-trained"]


def row(arm: str, budget: int, seed: int, figure: str, value: float) -> Row:
    epochs, gflops = (5, 1e4 * budget) if budget else (0, 0.0)
    low, high = value - 0.01, value + 0.01
    return Row(
        arm, budget, seed, figure, value, low, high, epochs, gflops, 1.5, digest(arm, figure)
    )


def keyed(*rows: Row) -> dict[Key, Row]:
    return {each.key: each for each in rows}


@pytest.mark.parametrize("arm", TRAINED, ids=lambda arm: arm.name)
def test_an_arm_computes_what_the_budget_allows(arm) -> None:
    recipe = load_recipe()
    for budget in (5, 10, 40):
        own = at_budget(recipe, arm, budget)
        ratio = (own.optim.epochs * step_flops(own.model, own.method)) / (
            budget * step_flops(recipe.model, recipe.method)
        )
        assert ratio == pytest.approx(1, abs=0.081)  # as docs/evidence.md says
        assert own.optim.warmup_epochs <= own.optim.epochs / 4


def test_supervised_training_computes_as_much() -> None:
    recipe = load_recipe()
    own, before = supervised_flops(recipe.model), 40 * step_flops(recipe.model, recipe.method)
    for rows, more in ((50_000, 2), (5_000, 15)):
        finetune = supervised_at_budget(recipe, FINETUNE, 40, more, rows)
        both = 50_000 * before + more * rows * own
        assert finetune.optim.epochs * rows * own == pytest.approx(both, rel=0.05)


def test_each_arm_is_another_method() -> None:
    recipe = load_recipe()
    methods = [changed(recipe, arm).method for arm in TRAINED]
    assert len(set(methods)) == len(TRAINED)
    assert methods[0] == recipe.method
    assert recipe.counts == (64, 16, 4)


def test_only_what_an_arm_has_is_asked_of_it() -> None:
    asked = {arm.name: set(figures_of(arm)) for arm in ARMS}
    assert asked["paper"] == set(FIGURES)
    assert "position" not in asked["pixels"] | asked["supervised"]  # no position head
    assert {"tenth", "all"} <= asked["random"]  # fine-tuned, that is training from scratch
    assert "rank" not in asked["raw"]


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    rows = [
        row("paper", 5, 1, "knn", 0.5),
        row("paper", 5, 0, "knn", 0.25),
        row("raw", 0, 0, "knn", 0),
    ]
    write_rows(tmp_path / RESULTS, rows)
    assert read_rows(tmp_path / RESULTS) == keyed(*rows)
    lines = (tmp_path / RESULTS).read_text().splitlines()
    assert lines[1].endswith(
        "droppos evidence --only paper/5/0 --again"
    )  # sorted, with its command


def test_rows_of_another_protocol_do_not_count(tmp_path: Path) -> None:
    ours = row("paper", 5, 0, "knn", 0.5)
    others = [replace(ours, protocol="another"), replace(ours, arm="given_up")]
    write_rows(tmp_path / RESULTS, others)
    assert read_rows(tmp_path / RESULTS) == {}


@pytest.mark.parametrize(
    ("name", "value", "figures"),
    [
        ("VERSION", -1, {"weights", "knn", "location", "tenth", "all"}),
        ("LOCATED", 7, {"location"}),
        ("TENTH_EPOCHS", 3, {"tenth"}),
        ("ALL_EPOCHS", 3, {"all"}),
        ("FINETUNE", Finetune(), {"tenth", "all"}),
        ("PEAK", 1.0, {"tenth", "all"}),
        ("SCRATCH_PEAK", 1.0, set()),
    ],
)
def test_what_decides_a_figure_decides_no_other(
    name: str, value: Any, figures: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = ("weights", "knn", "location", "tenth", "all")
    before = {figure: digest("paper", figure) for figure in shown}
    monkeypatch.setattr(protocol, name, value)
    assert {figure for figure in shown if digest("paper", figure) != before[figure]} == figures


def test_an_arms_method_and_a_supervised_arms_training_decide_its_figures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert len({digest(arm.name, "knn") for arm in TRAINED}) == len(TRAINED)
    before = {arm: digest(arm, "knn") for arm in ("supervised", "random")}
    monkeypatch.setattr(protocol, "SCRATCH_PEAK", 1.0)
    assert digest("supervised", "knn") != before["supervised"]
    assert digest("random", "knn") == before["random"]


def test_a_recipe_may_log_and_wait_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, before = load_recipe(), digest("paper", "position")
    idle = replace(recipe, run=replace(recipe.run, log_every=7))
    monkeypatch.setattr(protocol, "load_recipe", lambda: idle)
    assert digest("paper", "position") == before
    for other in (
        replace(recipe, optim=replace(recipe.optim, warmup_epochs=7)),
        replace(recipe, compute=replace(recipe.compute, guide_precision="bf16")),
        replace(recipe, data=replace(recipe.data, flip=False)),
    ):
        monkeypatch.setattr(protocol, "load_recipe", lambda other=other: other)
        assert digest("paper", "position") != before


@pytest.mark.parametrize("damage", ["", "[]", '{"knn": {"arm": "paper"}}', '{"knn": 1}'])
def test_damaged_figures_of_a_cell_are_taken_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert known_rows(tmp_path) == {}
    assert caplog.text == ""
    (tmp_path / "figures.json").write_text(damage)
    assert known_rows(tmp_path) == {}
    assert "figures.json is damaged" in caplog.text


def test_no_table_is_an_empty_one(tmp_path: Path) -> None:
    assert read_rows(tmp_path / RESULTS) == {}


@pytest.mark.parametrize(
    "damage", ["arm,budget\npaper,5\n", "{}\n1\n", "arm,value,command\na,b,c\n"]
)
def test_a_damaged_table_is_named(tmp_path: Path, damage: str) -> None:
    (tmp_path / RESULTS).write_text(damage)
    with pytest.raises(DataError, match=r"results\.csv is not a table of evidence"):
        read_rows(tmp_path / RESULTS)


def test_the_interval_is_students() -> None:
    three = estimate([0.1, 0.2, 0.3])
    assert three is not None
    assert three.mean == pytest.approx(0.2)
    assert three.half == pytest.approx(4.303 * 0.1 / 3**0.5)
    assert str(three) == "20.0 ± 24.8"
    one = estimate([0.123])
    assert one is not None
    assert (one.half, str(one)) == (None, "12.3")
    assert estimate([]) is None


def test_the_gain_is_taken_seed_by_seed() -> None:
    rows = keyed(
        *(row("paper", 5, seed, "tenth", 0.5 + seed / 10) for seed in range(3)),
        *(row("random", 0, seed, "tenth", 0.4 + seed / 10) for seed in range(2)),
    )
    study = Study(budget=5, curve=())
    assert "| DropPos (paper) | 5 | +10.0 ± 0.0 points |  |  |  | 2 |" in gains(study, rows)
    rows |= keyed(row("supervised", 5, 1, "tenth", 0.65))
    assert "| +10.0 ± 0.0 points |  | -5.0 points |  | 1 to 2 |" in gains(study, rows)
    assert "scratch_gain_10pct=0.100 seeds=3 budget=5" in line(study, rows)


def test_scripts_are_told_of_the_largest_budget_that_is_known() -> None:
    study = Study(budget=5, curve=(10, 20))
    few = keyed(row("paper", 5, 0, "knn", 0.5), row("paper", 5, 0, "linear", 0.5))
    assert line(study, few) == (
        "evidence knn=0.500 linear=0.500 scratch_gain_10pct=? seeds=1 budget=5"
    )
    few |= keyed(row("paper", 5, 1, "knn", 0.4), row("random", 0, 0, "tenth", 0.3))
    assert line(study, few).startswith(
        "evidence knn=0.450 linear=0.500 scratch_gain_10pct=? seeds=2"
    )
    more = few | keyed(
        *(row("paper", 10, 0, name, 0.6) for name in ("knn", "linear")),
        *(row("paper", 20, 0, name, 0.7) for name in ("knn", "linear", "tenth")),
    )
    assert line(study, more) == (
        "evidence knn=0.700 linear=0.700 scratch_gain_10pct=0.400 seeds=1 budget=20"
    )


def test_arms_are_compared_seed_by_seed() -> None:
    rows = keyed(
        *(row("paper", 5, seed, "knn", 0.5 + seed / 10) for seed in range(3)),
        *(row("pixels", 5, seed, "knn", 0.3 + seed / 10) for seed in range(2)),
        row("raw", 0, 0, "knn", 0.4),
    )
    table = differences(Study(curve=()), rows)
    assert "| masked autoencoding alone | +20.0 ± 0.0 points | ? | ? | ? | ? | ? | 2 |" in table
    assert "| raw pixels | +20.0 ± 24.8 points |" in table
    assert "DropPos (paper) | " not in table.replace("DropPos (paper) less", "")


def test_a_curve_points_where_its_last_doublings_went() -> None:
    study = Study(curve=(20, 40), curve_arms=("paper", "no_attentive"))
    rows = keyed(
        *(row("paper", budget, 0, "knn", value) for budget, value in ((5, 0.4), (20, 0.5))),
        row("paper", 5, 1, "knn", 0.2),  # of a seed that the larger budget has not
        row("paper", 20, 0, "linear", 0.5),
        row("no_attentive", 20, 0, "knn", 0.55),
        row("no_attentive", 40, 0, "knn", 0.65),
        row("no_attentive", 20, 0, "linear", 0.6),
        row("no_attentive", 40, 0, "linear", 0.6001),
    )
    ahead, there, flat = outlooks(study, rows)
    assert (ahead.arm, ahead.figure, ahead.hoped) == ("paper", "knn", 0.60)
    assert ahead.per_doubling == pytest.approx(0.05)
    assert ahead.doublings == pytest.approx(2)
    assert ahead.needed == pytest.approx(4 * ahead.tflop)
    assert (there.doublings, there.needed) == (0, there.tflop)
    assert (flat.figure, flat.doublings, flat.needed) == ("linear", None, None)
    table = outlook(study, rows)
    assert "| 60 | 50.0 | +5.0 points | 2.0 | " in table
    assert "| 60 | 65.0 | +10.0 points | reached | " in table
    assert "| 68 | 60.0 | +0.0 points | none in sight |  |" in table


def test_a_page_gets_its_tables_and_keeps_its_words(tmp_path: Path) -> None:
    page = tmp_path / "evidence.md"
    blocks = "".join(
        f"<!-- {name} -->\nold\n<!-- end -->\n"
        for name in ("compared", "differences", "curve", "outlook", "gains", "ablated")
    )
    page.write_text(f"before\n{blocks}after\n")
    study, rows = Study(curve=(10,)), keyed(row("paper", 5, 0, "knn", 0.512))
    fill(page, study, rows)
    once = page.read_text()
    fill(page, study, rows)
    assert page.read_text() == once
    assert once.startswith("before\n")
    assert once.endswith("after\n")
    assert "old" not in once
    assert "| DropPos (paper) | 51.2 |" in once
    page.write_text("no marker")
    with pytest.raises(DataError, match="0 places for the table compared"):
        fill(page, study, rows)


def test_pictures_are_drawn_of_what_is_known(tmp_path: Path) -> None:
    study = Study(curve=(10,))
    rows = keyed(*(row("paper", budget, 0, "knn", budget / 20) for budget in (5, 10)))
    rows |= keyed(row("raw", 0, 0, "knn", 0.459))
    assert draw(study, {}, tmp_path) == []
    assert [picture.name for picture in draw(study, rows, tmp_path)] == [
        "compared.png",
        "curve.png",
    ]


@pytest.mark.parametrize(
    ("told", "named"),
    [
        ({"budget": 0}, "--budget must be 1 or more, got 0"),
        ({"at_once": 0}, "--at-once must be 1 or more, got 0"),
        ({"minutes": -1.0}, "--minutes must be 0 or more, got -1"),
        ({"curve": (10, 0)}, "--curve must be of budgets of 1 or more, got 0"),
        ({"curve_arms": ("papr",)}, "--curve-arms must be of paper, .*got 'papr'"),
        ({"curve_arms": ("raw",)}, "got 'raw'; others have no budget"),
        ({"only": ("paper/5",)}, "'paper/5' names no cell; expected ARM/BUDGET/SEED"),
        ({"only": ("papr/5/0",)}, "'papr/5/0' names no cell"),
        ({"only": ("paper/-5/0",)}, "'paper/-5/0' names no cell"),
        ({"only": ("paper/0/0",)}, "the budget of paper is 1 or more"),
        ({"only": ("random/5/0",)}, "the budget of random is 0"),
        ({"again": True}, "--only names nothing"),
    ],
)
def test_a_study_that_cannot_be_is_refused(told, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Study(**told)


def test_every_arm_is_in_the_study_with_every_seed() -> None:
    study = Study(budget=5, seeds=2, curve=(10,), curve_arms=("paper",))
    names = [str(cell.name) for cell in study.cells()]
    assert len(names) == len(set(names)) == 2 * len(ARMS) - 1 + 1  # raw pixels have no seed
    assert names.index("paper/10/0") == names.index("paper/5/1") - 1  # once all arms have a seed
    assert {"random/0/1", "raw/0/0", "supervised/5/1"} <= set(names)
    only = replace(study, only=("random/0/1", "paper/7/9"))  # also of no study
    assert [str(cell.name) for cell in only.cells()] == ["random/0/1", "paper/7/9"]
    assert "all" in only.cells()[1].figures
    assert set(BY_NAME) == {arm.name for arm in ARMS}
    assert TRAIN == 50_000


def test_a_budget_of_the_curve_that_is_the_studys_own_is_one_cell() -> None:
    cells = Study(budget=10, seeds=1, curve=(10, 20)).cells()
    names = [str(cell.name) for cell in cells]
    assert len(names) == len(set(names))
    assert "all" in cells[names.index("paper/10/0")].figures
    assert "all" not in cells[names.index("paper/20/0")].figures


def test_the_page_of_the_repository_says_what_its_results_say(tmp_path: Path) -> None:
    """No number on it is typed, and none is older than the table."""
    page = OUT.with_suffix(".md")
    rows = read_rows(OUT / RESULTS)
    assert rows
    copy = tmp_path / "evidence.md"
    copy.write_text(page.read_text())
    fill(copy, Study(), rows, ablations.read(OUT / ablations.RESULTS))
    assert copy.read_text() == page.read_text()
    assert compared(Study(), rows) in page.read_text()
    assert curve(Study(), rows) in page.read_text()


def trial(knn: float, **told: Any) -> Trial:
    setting = {"mask_ratio": 0.75, "position_mask_ratio": 0.75, "sigma": 1.0, "sigma_decay": "step"}
    rest = {"position_skill": 0.1, "effective_rank": 9.0, "seconds": 60.0}
    rest["protocol"] = ablations.protocol()
    return Trial(**(setting | told), knn=knn, low=knn - 0.01, high=knn + 0.01, **rest)  # pyright: ignore[reportArgumentType]


def test_the_published_setting_is_held_against_each_other_one() -> None:
    trials = [
        trial(0.50),
        trial(0.40, mask_ratio=0.0),
        trial(0.60, position_mask_ratio=1.0),
        trial(0.51, sigma=2.0, sigma_decay="constant"),
        trial(0.50, sigma=2.0),
        trial(0.30, sigma=0.0),
        trial(0.30, sigma=0.0, sigma_decay="constant"),  # the same again: nothing decays
    ]
    assert [(each.question, each.other, each.verdict) for each in compare(trials)] == [
        ("mask ratio 0.75", "0", "to the paper's"),
        ("drop ratio 0.75", "1", "to the other"),
        ("sigma 1, decaying", "0", "to the paper's"),
        ("sigma 1, decaying", "2, decaying", "not told apart"),
        ("sigma 2, decaying", "2, constant", "not told apart"),
    ]


def test_nothing_is_compared_before_the_published_setting_is_known() -> None:
    assert list(compare([trial(0.4, mask_ratio=0.0)])) == []


def test_trials_come_back_as_they_were_written(tmp_path: Path) -> None:
    trials = [trial(0.5), trial(0.25, sigma=0.0)]
    ablations.write(tmp_path / "trials.csv", trials)
    assert ablations.read(tmp_path / "trials.csv") == sorted(trials)
    assert ablations.read(tmp_path / "none.csv") == []
    (tmp_path / "trials.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="no table of trials"):
        ablations.read(tmp_path / "trials.csv")


def test_settings_that_are_known_are_not_missing(tmp_path: Path) -> None:
    assert ablations.missing(tmp_path) == 12
    ablations.write(tmp_path / ablations.RESULTS, [trial(0.5), trial(0.5, mask_ratio=0.25)])
    assert ablations.missing(tmp_path) == 10
    stale = replace(trial(0.5, mask_ratio=0.0), protocol="another")
    ablations.write(tmp_path / ablations.RESULTS, [trial(0.5), stale])
    assert ablations.missing(tmp_path) == 11


def test_finished_trials_are_read_from_the_searchs_own_table(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPE)
    recipe = replace(recipe, run=replace(recipe.run, storage=str(tmp_path)))
    assert ablations.found(recipe) == []
    table = TrialTable(open_place(recipe.home))
    figures = {"knn": 0.4321, "position_skill": 0.2, "effective_rank": 12.0}
    for number, state in enumerate(["finished", "running"]):
        point = {"method.mask_ratio": 0.25}
        record = Record(number, f"trial-{number}", point, state=state, figures=figures)  # type: ignore[arg-type]
        table.records[record.name] = record
    table.write("knn")
    (only,) = ablations.found(recipe)
    assert only.setting == (0.25, 0.75, 1.0, "step")
    assert (only.knn, only.position_skill) == (0.4321, 0.2)
    assert only.low < only.knn < only.high
