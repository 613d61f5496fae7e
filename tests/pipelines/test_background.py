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


def test_under_nohup_a_terminal_may_close(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signal(lambda: asked.append("stop"), lambda: asked.append("abort")):
            signal.raise_signal(signal.SIGHUP)
        assert not asked and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
