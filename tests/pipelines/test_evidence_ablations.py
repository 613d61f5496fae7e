"""The ablations as `make evidence` runs them: a real search, and going on with it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.evidence import ablations
from pipelines.evidence.ablations import RECIPE, RESULTS, ablate, read
from pipelines.evidence.cifar import Cifar
from pipelines.evidence.recipes import load_recipe
from pipelines.recipe import Recipe
from tests.pipelines.cifar_like import prepare_like

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

HELD_OUT = 60


@pytest.fixture
def data(photographs: Path, tmp_path: Path) -> Cifar:
    return prepare_like(tmp_path / "cifar", photographs, 400, HELD_OUT)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Search fewer settings, for an epoch each."""
    usual = load_recipe(RECIPE)

    def search_only(*space: str) -> None:
        def load(name: str = RECIPE) -> Recipe:
            return replace(
                usual,
                optim=replace(usual.optim, epochs=1),
                measure=replace(usual.measure, every_epochs=1, pictures=HELD_OUT),
                search=replace(usual.search, space=space),
            )

        monkeypatch.setattr(ablations, "load_recipe", load)

    return search_only


def test_a_search_writes_its_trials_and_goes_on(
    small: Callable[..., None], data: Cifar, tmp_path: Path, ray_cluster: None
) -> None:
    out, said = tmp_path / "out", []
    out.mkdir()
    small("method.sigma=grid(0, 1)")
    assert ablations.missing(out) == 2
    ablate(data, tmp_path, out, said.append)
    assert ablations.missing(out) == 0
    none, one = read(out / RESULTS)
    assert (none.sigma, one.sigma) == (0, 1)
    for trial in none, one:
        assert trial.mask_ratio == trial.position_mask_ratio == 0.75
        assert 0 < trial.low < trial.knn < trial.high < 1
        assert trial.knn * HELD_OUT == pytest.approx(round(trial.knn * HELD_OUT))
        assert trial.effective_rank > 1
        assert trial.seconds > 0
    assert sum("finished, k-NN" in text for text in said) == 2

    # Nothing is tried again (it would take another time), and what another machine knew stays.
    elsewhere = replace(none, sigma=2)
    ablations.write(out / RESULTS, [elsewhere])
    ablate(data, tmp_path, out, said.append)
    assert read(out / RESULTS) == [none, one, elsewhere]
