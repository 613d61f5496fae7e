"""What the benchmark of plans puts into the simulation."""

import os
from pathlib import Path

import pytest

from pipelines.plan.pipeline import simulate
from tests.benchmarks.plan import CASES, recipe_of, service_of
from tests.benchmarks.plan_parts import Decoding, Training


@pytest.mark.parametrize(
    ("case", "step_s", "picture_s", "bound"),
    [("decode-1", 0.02, 0.003, "decode"), ("train-1", 0.4, 0.003, "train")],
)
def test_the_measured_parts_decide(
    case: str, step_s: float, picture_s: float, bound: str, tmp_path: Path
) -> None:
    recipe = recipe_of(CASES[case], tmp_path, case)
    training = Training(step_s, cpu_s=1e-3, blocked_s=0.02, write_s=0.1)
    service = service_of(recipe, training, Decoding(picture_s, cpu_s=1e-3, others=0))
    expected = {"decode": 1 / picture_s, "train": 32 / (step_s + 0.02 / 40)}[bound]
    assert service.bounds[bound] == pytest.approx(expected)
    assert simulate(service, 0, CASES[case].steps).images_per_s == pytest.approx(expected, rel=0.02)


def test_more_work_than_the_cores_can_do_is_bound_by_them(tmp_path: Path) -> None:
    recipe = recipe_of(CASES["train-2"], tmp_path, "train-2")
    training = Training(step_s=0.2, cpu_s=0.2 * (os.cpu_count() or 1), blocked_s=0, write_s=0)
    service = service_of(recipe, training, Decoding(0.003, cpu_s=0.003, others=0))
    bounds = service.bounds
    assert min(bounds, key=lambda part: bounds[part]) == "cores"
    found = simulate(service, 0, 200).images_per_s
    assert found == pytest.approx(bounds["cores"], rel=0.02)
