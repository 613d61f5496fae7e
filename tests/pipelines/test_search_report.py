"""The report of a search: nothing is lost, nothing is fetched, and chance is not sold as a win."""

from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from math import log, nan

import numpy as np
import pytest
from matplotlib.figure import Figure

from pipelines.findings import Findings, Row
from pipelines.page import svg
from pipelines.ranking import (
    chance_of_lead,
    correlations,
    importances,
    rank_correlation,
    repeats_of,
    settings_of,
)
from pipelines.search_figures import (
    courses_part,
    importance_part,
    parallel_part,
    ratios_part,
    search_figures,
)
from pipelines.search_report import search_report
from pipelines.search_tables import agreement_table, trials_table
from pipelines.space import Dimension, Point
from pipelines.verdict import short_names, verdict

MASK = Dimension("method.mask_ratio", "choice", (0.75, 0.5))
DROP = Dimension("method.position_mask_ratio", "uniform", (0.25, 0.95))
RATE = Dimension("optim.lr_per_256", "loguniform", (1e-5, 1e-3))
CLIP = Dimension("optim.clip", "choice", (None, 1.0, 5.0))
ATTENTIVE = Dimension("method.attentive", "choice", (True, False))
SPACE = (MASK, DROP, RATE, CLIP, ATTENTIVE)


def row(number: int, skill: float | None, point: Point, **changes) -> Row:
    measured = Row(
        name=f"ratios-{number:03d}-mask_ratio={point.get('method.mask_ratio')}",
        point=point,
        state="finished",
        figures={} if skill is None else {"position_skill": skill},
        history=[] if skill is None else [(50, skill / 2), (100, skill)],
        step=100,
        steps=100,
        seconds=3725.0,
        error=None,
        tracking_run=None,
    )
    return replace(measured, **changes)


def findings(rows: Sequence[Row], space: tuple[Dimension, ...] = SPACE, **changes) -> Findings:
    found = Findings(
        name="ratios",
        objective="position_skill",
        dimensions=space,
        rows=rows,
        best=None,
        best_yaml=None,
        protocol="All trials answered for the same pictures.",
        notes=[],
        sharing=None,
    )
    return replace(found, **changes)


def drawn_rows(number: int) -> list[Row]:
    """Trials whose skill depends on the mask ratio alone."""
    random = np.random.default_rng(0)
    rows = []
    for i in range(number):
        point: Point = {
            MASK.field: [0.75, 0.5][i % 2],
            DROP.field: float(random.uniform(0.25, 0.95)),
            RATE.field: float(np.exp(random.uniform(log(1e-5), log(1e-3)))),
            CLIP.field: [None, 1.0, 5.0][i % 3],
            ATTENTIVE.field: i % 4 < 2,
        }
        rows.append(row(i, 0.5 - 0.2 * (i % 2) + 1e-4 * float(random.normal()), point))
    return rows


class Page(HTMLParser):
    """Reads a page: its text, its images, what it would fetch, and whether tags are closed."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.cells: list[list[str]] = []
        self.images: list[dict[str, str | None]] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag == "img":
            self.images.append(dict(attrs))
        if tag == "tr":
            self.cells.append([])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in {"td", "th"}:
            self.cells[-1].append(data)
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(self.text)


EVIL = "<script>alert('&')</script>"


@pytest.fixture(scope="module")
def whole() -> str:
    """A page of trials of every kind, whose words would break it if they could."""
    rows = drawn_rows(12)
    rows[1] = replace(rows[1], state="early", step=50, history=rows[1].history[:1])
    rows[3] = replace(rows[3], state="failed", figures={}, history=[], error=f"e{EVIL}", step=7)
    rows[5] = replace(rows[5], state="stopped", figures={"position_skill": nan}, seconds=None)
    rows[7] = replace(rows[7], name=f"t{EVIL}" + "y" * 200, tracking_run=EVIL)
    rows[8] = replace(rows[8], figures={"position_skill": 0.9, f"f{EVIL}": 1.0})
    return search_report(
        findings(
            rows,
            name=EVIL,
            best=rows[8].name,
            best_yaml=f"a: {EVIL}",
            protocol=f"p{EVIL}",
            notes=[f"n{EVIL}"],
            sharing={f"s{EVIL}": 1.0},
        )
    )


def test_a_page_fetches_nothing_and_runs_nothing(whole: str) -> None:
    page = Page(whole)
    assert not page.tags & {"script", "link", "iframe", "object", "base"}
    assert "url(" not in whole and "@import" not in whole and "://" not in whole
    sources = [value for name, value in page.attributes if name in {"src", "href", "srcset"}]
    assert sources
    assert all(source and source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_each_picture_is_told_in_words(whole: str) -> None:
    images = Page(whole).images
    assert len(images) == 5
    assert all(image["alt"] for image in images)


def test_words_of_users_are_shown_as_they_are(whole: str) -> None:
    page = Page(whole)
    for text in ("t", "e", "f", "a: ", "p", "n", "s"):
        assert text + EVIL in page.words


def test_each_trial_has_one_line_and_the_best_is_first(whole: str) -> None:
    page = Page(whole)
    lines = [line for line in page.cells if line and line[0].startswith(("ratios-", "t<"))]
    assert len(lines) == len({line[0] for line in lines}) == 12
    assert lines[0][0].startswith("ratios-008") and "1:02:05" in lines[0]
    assert {line[1] for line in lines[-2:]} == {"failed", "stopped"}
    assert [line[1] for line in lines if "7/100" in line] == ["failed"]
    assert f": e{EVIL}" in page.words


def test_names_leave_out_the_values_that_stand_beside_them() -> None:
    rows = drawn_rows(2)
    assert list(short_names(findings(rows)).values()) == ["ratios-000", "ratios-001"]
    alike = [replace(one, name=f"ratios-a={i}") for i, one in enumerate(rows)]
    assert list(short_names(findings(alike)).values()) == ["ratios-a=0", "ratios-a=1"]


def test_no_trial_is_no_failure() -> None:
    page = Page(search_report(findings([])))
    assert not page.images
    assert "No trial was run." in page.words and "no best setting" in page.words


def test_one_trial_is_drawn_and_what_is_missing_is_explained() -> None:
    found = findings(drawn_rows(1))
    assert list(search_figures(found)) == ["parallel", "fields", "ratios", "courses"]
    assert importance_part(found).drawn == "It takes 3 finished trials, and there is 1."
    assert "nothing to compare it with" in " ".join(verdict(found))
    assert "It takes two figures" in agreement_table(found)


def test_trials_are_counted_by_how_they_ended() -> None:
    rows = drawn_rows(6)
    rows[1:3] = [replace(one, state="early") for one in rows[1:3]]
    rows[3] = replace(rows[3], state="failed")
    assert "6 trials: 3 finished, 2 ended early, 1 failed." in verdict(findings(rows))


def test_trials_that_ended_early_are_drawn_but_make_no_winner() -> None:
    found = findings([replace(one, state="early") for one in drawn_rows(4)])
    assert list(search_figures(found)) == ["parallel", "fields", "courses"]
    assert ratios_part(found).drawn == "No trial has finished."
    assert "No trial finished" in verdict(found)[0]


def test_one_field_is_said_to_be_one() -> None:
    rows = [row(i, i / 10, {RATE.field: 10.0 ** (i - 5)}) for i in range(3)]
    found = findings(rows, (RATE,))
    assert "Only one field was searched" in str(importance_part(found).drawn)
    both = "method.mask_ratio and method.position_mask_ratio were not searched."
    assert ratios_part(found).drawn == both


def test_equal_objectives_have_no_winner() -> None:
    rows = [replace(one, figures={"position_skill": 0.3}) for one in drawn_rows(4)]
    found = findings(rows)
    assert list(search_figures(found)) == ["parallel", "fields", "ratios", "courses"]
    assert "none is better" in " ".join(verdict(found))
    assert "no field explains a difference" in str(importance_part(found).drawn)


def test_a_lead_is_held_against_what_chance_does() -> None:
    def said(*skills: tuple[float, float, int]) -> str:
        rows = [
            row(i, skill, {MASK.field: mask, "run.seed": seed})
            for i, (skill, mask, seed) in enumerate(skills)
        ]
        return " ".join(verdict(findings(rows, (MASK,))))

    assert "is within what chance does" in said((0.5, 0.75, 0), (0.44, 0.75, 1), (0.45, 0.5, 0))
    assert "stands clear" in said((0.5, 0.75, 0), (0.499, 0.75, 1), (0.4, 0.5, 0))
    # A pair is no good measure of chance: with one degree of freedom, Student's t is 12.7.
    assert "is within" in said((0.5, 0.75, 0), (0.49, 0.75, 1), (0.4, 0.5, 0))
    several = [(0.5 + i / 1000, 0.1 + i / 100, 0) for i in range(8)]
    assert "which is large" in said((0.9, 0.75, 0), *several)
    assert "which is small" in said((0.5071, 0.75, 0), *several)
    two = said((0.5001, 0.75, 0), (0.5, 0.5, 0))  # any lead of two is 1.41 of their deviations
    assert "which is" not in two and "No setting was run twice" in two
    assert "Only one setting has finished" in said((0.5, 0.75, 0), (0.4, 0.75, 1))


def test_repeats_are_those_that_differ_in_the_seed_alone() -> None:
    points: list[Point] = [{"method.sigma": 1.0, "run.seed": i} for i in range(3)]
    repeats = repeats_of(settings_of([*points, {"method.sigma": 2.0}], [1.0, 2.0, 3.0, 9.0]))
    assert repeats is not None
    assert (repeats.deviation, repeats.freedom) == (pytest.approx(1.0), 2)
    assert repeats_of(settings_of(points[:1], [1.0])) is None


def test_a_setting_is_as_good_as_its_seeds_are_on_average() -> None:
    skills = {(0.0, 0): 0.60, (0.0, 1): 0.50, (1.0, 0): 0.58, (1.0, 1): 0.59}
    rows = [
        row(i, skill, {"method.sigma": sigma, "run.seed": seed})
        for i, ((sigma, seed), skill) in enumerate(skills.items())
    ]
    found = findings(rows)
    assert found.winner is rows[3]
    best, belief, _ = verdict(found)
    assert "sigma 1: position skill 0.5850, the mean of 2 seeds" in best and "0.5900" in best
    assert "leads the next setting, sigma 0, by 0.0350" in belief


@pytest.mark.parametrize("settings", [3, 8, 30])
def test_equally_good_settings_lead_by_much_as_rarely_as_is_said(settings: int) -> None:
    random = np.random.default_rng(7)
    chances = []
    for _ in range(400):
        drawn = np.sort(random.normal(3.0, 0.2, settings))
        chances.append(chance_of_lead((drawn[-1] - drawn[-2]) / drawn.std(ddof=1), settings))
    assert np.mean(np.array(chances) < 0.05) == pytest.approx(0.05, abs=0.035)
    assert np.mean(np.array(chances) < 0.5) == pytest.approx(0.5, abs=0.08)
    assert chance_of_lead(0.0, settings) == 1.0 and chance_of_lead(9.0, settings) == 0.0


def test_what_changed_on_the_way_explains_no_score() -> None:
    found = findings(drawn_rows(12), scheduled=True)
    for part in (importance_part(found), ratios_part(found)):
        assert isinstance(part.drawn, str) and "changed while trials ran" in part.drawn


def test_the_field_that_matters_is_found(capfd: pytest.CaptureFixture[str]) -> None:
    rows = drawn_rows(24)
    points = [one.point for one in rows]
    shares = importances(SPACE, points, [one.figures["position_skill"] for one in rows])
    assert isinstance(shares, dict)
    assert max(shares, key=lambda name: shares[name]) == MASK.field
    assert shares[MASK.field] > 0.9
    assert sum(shares.values()) == pytest.approx(1)
    assert capfd.readouterr() == ("", "")


def test_an_importance_of_few_trials_is_not_to_be_trusted() -> None:
    few, enough = (importance_part(findings(drawn_rows(number))).caption for number in (9, 10))
    assert "stands on 9 finished trials" in few and "not to be trusted" in few
    assert "stands on 10 finished trials" in enough and "not to be trusted" not in enough


def test_monotone_figures_rank_alike_and_ties_share_a_rank() -> None:
    values = [0.1, 0.2, 0.3, 0.9]
    assert rank_correlation(values, [value**3 for value in values]) == pytest.approx(1)
    assert rank_correlation(values, [-value for value in values]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9486833)
    assert rank_correlation(values, [1, 1, 1, 1]) is None


def test_a_loss_ranks_as_what_it_costs() -> None:
    figures = [{"train_excess_nats": 3.0 - i, "knn": 0.1 * i} for i in range(3)]
    assert correlations(figures) == {("train_excess_nats", "knn"): (pytest.approx(1), 3)}
    assert correlations(figures[:2]) == {}


def test_agreement_counts_only_trials_that_have_both() -> None:
    rows = [
        replace(
            one,
            figures={**one.figures, **({"knn": 0.1 * i} if i < 4 else {})},
            state="early" if i == 3 else "finished",
        )
        for i, one in enumerate(drawn_rows(6))
    ]
    assert "n 3" in agreement_table(findings(rows))


def test_the_same_findings_give_the_same_picture() -> None:
    found = findings(drawn_rows(2))
    first, second = (courses_part(found).drawn for _ in range(2))
    assert isinstance(first, Figure) and isinstance(second, Figure)
    assert svg(first) == svg(second)


def test_hundreds_of_trials_fit() -> None:
    found = findings(drawn_rows(200))
    lines = [line for line in Page(trials_table(found)).cells if "ratios-" in line[0]]
    assert len(lines) == 200
    drawn = parallel_part(found).drawn
    assert isinstance(drawn, Figure) and len(svg(drawn)) < 5e5
