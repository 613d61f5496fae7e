"""Signals as requests: once to stop, twice to end at once."""

import signal

import pytest

from pipelines import background
from pipelines.background import STOP_SIGNALS, stop_on_signal


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_first_asks_and_the_second_aborts(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    before = signal.getsignal(number)
    with stop_on_signal(lambda: asked.append("stop"), lambda: asked.append("abort")):
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)  # of the same press, through whoever started this
        assert asked == ["stop"]
        monkeypatch.setattr(background, "ONCE_S", 0.0)
        signal.raise_signal(number)
        assert asked == ["stop", "abort"]
    assert signal.getsignal(number) is before
