"""The pipeline simulated as queues: no part is passed, and the slowest decides."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.plan.pipeline import Service, simulate

EXACT = Service(
    batch=256,
    window=1024,
    tasks=8,
    room=8 * 1024 + 1024,
    storage_s=0.1,
    latency_s=0.2,
    decode_s=4.0,
    hand_s=0.01,
    step_s=0.05,
    decode_spread=0,
    step_spread=0,
)


def slowest(service: Service) -> float:
    return min(service.bounds.values())


@pytest.mark.parametrize(
    ("part", "service"),
    [
        ("decode", EXACT),
        ("storage", replace(EXACT, storage_s=2.0)),
        ("hand-over", replace(EXACT, hand_s=0.5)),
        ("train", replace(EXACT, step_s=0.8)),
        ("train", replace(EXACT, step_s=0.4, checkpoint_steps=10, blocked_s=3.0, write_s=1.0)),
        ("checkpoints", replace(EXACT, step_s=0.1, checkpoint_steps=10, write_s=9.0)),
        ("cores", replace(EXACT, cores_s=0.6)),
    ],
)
def test_the_slowest_part_decides(part: str, service: Service) -> None:
    bounds = service.bounds
    assert min(bounds, key=lambda name: bounds[name]) == part
    found = simulate(service, 0, 3000)
    assert found.images_per_s == pytest.approx(slowest(service), rel=0.02)
    held_up = part in {"decode", "storage", "hand-over"}
    assert (found.waiting > 0.3) == held_up


services = st.builds(
    replace,
    st.just(EXACT),
    window=st.sampled_from([64, 256, 512, 4096]),
    tasks=st.integers(1, 20),
    room=st.integers(4096, 60_000),
    storage_s=st.floats(0, 2),
    latency_s=st.floats(0, 1),
    decode_s=st.floats(0.01, 20),
    hand_s=st.floats(0, 1),
    step_s=st.floats(0.001, 2),
    checkpoint_steps=st.integers(5, 200),
    blocked_s=st.floats(0, 5),
    write_s=st.floats(0, 5),
)


@given(service=services)
@settings(max_examples=40, deadline=None)
def test_no_pipeline_is_faster_than_any_of_its_parts(service: Service) -> None:
    service = replace(service, room=max(service.room, service.window + service.batch))
    # The checkpoints of a stretch are one more or less than their share of it.
    slack = 1 + service.checkpoint_steps / 600
    found = simulate(service, 0, 900)
    bounds = service.bounds
    saving = bounds.pop("train"), bounds.pop("checkpoints", float("inf"))
    assert found.images_per_s <= min(saving) * slack
    assert found.images_per_s <= service.batch / service.step_s * (1 + 1e-9)
    # Decode tasks hand on a window at a time, and begin together.
    window = service.tasks * max(service.window, service.batch)
    assert found.images_per_s <= min(bounds.values()) * (1 + window / (600 * service.batch))


@given(service=services)
@settings(max_examples=20, deadline=None)
def test_a_faster_part_never_makes_it_slower(service: Service) -> None:
    service = replace(service, room=max(service.room, service.window + service.batch))
    before = simulate(service, 0, 600).images_per_s
    for part in ("storage_s", "decode_s", "hand_s", "step_s"):
        faster = replace(service, **{part: getattr(service, part) / 2})
        assert simulate(faster, 0, 600).images_per_s >= before * 0.97


def test_chance_costs_a_little_and_only_where_parts_are_alike() -> None:
    even = replace(EXACT, step_s=EXACT.batch / EXACT.bounds["decode"], room=2048)
    uneven = replace(even, decode_spread=0.5, step_spread=0.2)
    quiet, noisy = simulate(even, 0, 2000).images_per_s, simulate(uneven, 0, 2000).images_per_s
    assert 0.6 * quiet < noisy < 0.99 * quiet
    slow_step = replace(uneven, step_s=5 * even.step_s, room=EXACT.room)
    assert simulate(slow_step, 0, 2000).images_per_s == pytest.approx(slowest(slow_step), rel=0.01)


def test_one_task_reads_and_decodes_in_turn() -> None:
    alone = replace(EXACT, tasks=1, room=4096, step_s=1e-4)
    expected = alone.window / (alone.storage_s + alone.latency_s + alone.decode_s)
    assert simulate(alone, 0, 800).images_per_s == pytest.approx(expected, rel=0.01)


def test_without_room_tasks_wait_for_training() -> None:
    """With room for one window besides the one in training, one task works at a time."""
    narrow = replace(EXACT, window=256, room=256, decode_s=1.0, step_s=0.05)
    wide = replace(narrow, room=8 * 256 + 1024)
    assert simulate(narrow, 0, 400).images_per_s < 0.3 * simulate(wide, 0, 400).images_per_s


def test_the_first_batch_comes_when_it_is_read_decoded_and_sent() -> None:
    first = EXACT.storage_s + EXACT.latency_s + EXACT.decode_s / 4 + EXACT.hand_s
    assert simulate(EXACT, 0).first_s == pytest.approx(first)


def test_the_same_seed_gives_the_same_flow() -> None:
    noisy = replace(EXACT, decode_spread=0.3, step_spread=0.1)
    assert simulate(noisy, 1, 300) == simulate(noisy, 1, 300)
    assert simulate(noisy, 1, 300) != simulate(noisy, 2, 300)
