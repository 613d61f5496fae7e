"""The benchmark's own arithmetic on a tiny model; its figures are in docs/step.md."""

import re

import pytest
import torch

from tests.benchmarks import step


def test_it_says_in_its_last_line_how_much_faster_a_step_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    step.main(["--quick", "--rounds", "1"])
    last = capsys.readouterr().out.splitlines()[-1]
    number = r"\d+\.\d\d"
    assert re.fullmatch(
        rf"step device=\w+ vs_plain={number} vs_plain_bf16={number} mfu={number}", last
    )


def test_steps_that_disagree_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "_normalised", lambda images: images.permute(0, 3, 1, 2) / 255)
    setting = step.Setting("tiny", step.TINY, attentive=True, batch=2)
    with pytest.raises(AssertionError, match="tiny: loss"):
        step.measure(setting, torch.device("cpu"), rounds=0)


@pytest.mark.parametrize("attentive", [True, False])
def test_both_stay_together_over_several_steps(attentive: bool) -> None:
    setting = step.Setting("tiny", step.TINY, attentive, batch=4)
    state, batch = step.create(setting, torch.device("cpu")), step.pictures(setting)
    plain = step.Plain(state)
    for _ in range(5):
        theirs = plain.train_step(batch)
        ours = step.train_step(state, [batch]).metrics.loss
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
