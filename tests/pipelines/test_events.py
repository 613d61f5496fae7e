import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import ray

from pipelines.events import Events, Wish, _Mailbox

pytestmark = pytest.mark.slow


@ray.remote(num_cpus=0)
def _send(events: Events, name: str, count: int) -> None:
    for i in range(count):
        events.send({"from": name, "i": i})
    events.flush(timeout_s=30)


def test_events_of_each_sender_arrive_once_and_in_order(ray_cluster: None) -> None:
    events = Events.start()
    ray.get([_send.remote(events, name, 300) for name in "ab"])
    arrived = events.drain()
    for name in "ab":
        assert [event["i"] for event in arrived if event["from"] == name] == list(range(300))
    assert events.drain() == []


def test_a_worker_may_send_from_several_threads(
    ray_cluster: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Its pulse has one of its own: once, a call that one settled was missed by the other."""
    events = Events.start()
    with ThreadPoolExecutor(3) as pool:
        list(
            pool.map(lambda name: [events.send({"from": name, "i": i}) for i in range(300)], "abc")
        )
    events.flush(timeout_s=30)
    assert "lost" not in caplog.text
    arrived = events.drain()
    for name in "abc":
        assert [event["i"] for event in arrived if event["from"] == name] == list(range(300))


@ray.remote(num_cpus=0)
class _Busy(_Mailbox):
    """Answers once, and late."""

    def drain(self, wished: Wish) -> tuple[list[bytes], int]:
        time.sleep(2)
        return super().drain(wished)


def test_events_whose_answer_comes_late_are_there_the_next_time(
    ray_cluster: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, the queue had given them away, and nobody took them."""
    events = Events(_Busy.remote(100))
    events.send({"i": 0})
    events.flush(timeout_s=30)
    assert events.drain(timeout_s=0.1) == []
    assert "cannot be fetched" in caplog.text
    events.send({"i": 1})
    assert [event["i"] for event in events.drain(timeout_s=30)] == [0, 1]
    assert events.drain(timeout_s=30) == []


def test_a_full_queue_loses_its_oldest_and_says_how_many(
    ray_cluster: None, caplog: pytest.LogCaptureFixture
) -> None:
    events = Events.start(capacity=10)
    ray.get(_send.remote(events, "a", 25))
    assert [event["i"] for event in events.drain()] == list(range(15, 25))
    assert "15 events" in caplog.text


@ray.remote(num_cpus=0)
def _hear(events: Events, wanted: Wish) -> bool:
    """Ask as a worker does after each step."""
    for _ in range(300):
        if events.ask() == wanted:
            return True
        time.sleep(0.01)
    return False


def test_a_wish_reaches_the_workers_at_the_next_drain(ray_cluster: None) -> None:
    events = Events.start()
    assert ray.get(_hear.remote(events, Wish()))
    events.wished = Wish(saves=1, leave=2)
    assert not ray.get(_hear.remote(events, events.wished))
    events.drain()
    assert ray.get(_hear.remote(events, events.wished))


def test_sending_survives_that_the_actor_is_gone(
    ray_cluster: None, caplog: pytest.LogCaptureFixture
) -> None:
    events = Events.start()
    events.send({"i": 0})
    events.flush(timeout_s=30)
    assert "lost" not in caplog.text
    ray.kill(events._mailbox, no_restart=True)
    for i in range(20):
        events.send({"i": i})
    events.flush(timeout_s=30)
    assert "20 events for the driver were lost" in caplog.text
    assert events.ask() == Wish()
    assert events.drain() == []
    assert "cannot be fetched" in caplog.text
