"""The benchmark's own arithmetic; its figures are in docs/step.md."""

import re

import pytest
import torch

from droppos.model import DropPos
from tests.benchmarks import guide


def test_the_exact_guide_agrees_with_itself_and_others_less() -> None:
    torch.manual_seed(0)
    tiles = torch.randint(256, (6, 64, 64, 3), dtype=torch.uint8)
    found = guide.agreement(DropPos(guide.SMALL, guide.METHOD).eval(), tiles)
    assert found[guide.EXACT] == pytest.approx(1)
    assert all(-1 <= value < 0.999 for variant, value in found.items() if variant != guide.EXACT)


@pytest.mark.slow
@pytest.mark.long
def test_it_prints_a_row_for_each_guide(capsys: pytest.CaptureFixture[str]) -> None:
    guide.main(["--quick", "--steps", "2", "--rounds", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"guide steps=2 held_out=8 skill=-?\d\.\d{3}", lines[-1])
    assert sum("│" in line for line in lines) >= len(guide.VARIANTS)
