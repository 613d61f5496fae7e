"""The doctor: its judgement by properties of made-up numbers, its measuring by one real run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from pipelines.advice import group_rows, tasks_that_fit, window_that_fits
from pipelines.bottleneck import FAR_BELOW, HEAD_ROOM, allowed_per_s, bound_of, cores_for
from pipelines.cli import main
from pipelines.diagnosis import diagnose
from pipelines.doctor import Question, doctor
from pipelines.doctor_report import show_doctor
from pipelines.local_s3 import S3Server
from pipelines.prepare import prepare
from pipelines.readings import Contents, Cropping, Decoding, Reading, Readings, Site, Streaming
from pipelines.stream_gauge import Fit

RATES = st.floats(10, 1e5)
PICTURE_BYTES = 100_000


def readings(
    *,
    storage: float = 20_000,
    decode: float = 1_000,
    stream: float | None = None,
    **changes: dict[str, Any],
) -> Readings:
    """Make readings of two decode tasks on two cores, for one GPU of 1500; rates are pictures/s.

    Args:
        storage: Of storage alone.
        decode: Of decoding alone.
        stream: End to end; what the two allow when not given.
        changes: By part, fields that are to differ.
    """
    stream = 1 / (1 / storage + 1 / decode) if stream is None else stream
    reading = Reading(
        bytes=storage * PICTURE_BYTES,
        pictures=round(storage),
        seconds=1,
        cpu_seconds=1,
        group_seconds=0.1,
        latency_seconds=0.005,
    )
    parts: dict[str, Any] = {
        "site": Site(
            nodes=1,
            cores=2,
            decode_cpus=2,
            store_bytes=2e9,
            memory_bytes=32e9,
            local_data=False,
            gpus=1,
            gpu_images_per_s=1500,
            image_size=(224, 224),
            window=1024,
        ),
        "contents": Contents(
            pictures=10_000,
            bytes=10_000 * PICTURE_BYTES,
            group_bytes=100 * PICTURE_BYTES,
            sampled=500,
            width=500,
            height=375,
            quick=1,
            progressive=0,
            other=0,
            enlarged=0.2,
            copies=False,
        ),
        "alone": reading,
        "together": reading,
        "decoding": Decoding(
            crops=round(decode / 2) or 1,
            failed=0,
            seconds=1,
            decode_seconds=0.8,
            scaled_seconds=1,
            copied=48,
            copied_before_seconds=1,
            copied_seconds=1,
            copied_bytes=1,
            short_side=320,
        ),
        "cropping": Cropping(crops=round(decode * 1000), seconds=1000),
        "streaming": Streaming(
            pictures=round(stream * 1000),
            seconds=1000,
            cpu_seconds=1000,
            longest_wait=0.1,
            store_peak=1e8,
            spilled=0,
            others=0,
            batch=256,
            window=512,
        ),
    }
    return Readings(**{name: replace(p, **changes.get(name, {})) for name, p in parts.items()})


def advised(found: Readings) -> str:
    return " | ".join(f"{a.words} {a.command}" for a in diagnose(found).advice)


@given(storage=RATES, decode=RATES)
def test_the_slower_stage_bounds_a_stream_that_reaches_what_they_allow(
    storage: float, decode: float
) -> None:
    found = readings(storage=storage, decode=decode)
    slower = "storage" if found.storage_per_s < found.decode_per_s else "decode"
    assert bound_of(found) == slower
    assert allowed_per_s(found) <= min(found.storage_per_s, found.decode_per_s)


@given(storage=RATES, decode=RATES, share=st.floats(0.01, 0.95))
def test_what_idle_cpus_do_not_explain_lies_between_the_stages(
    storage: float, decode: float, share: float
) -> None:
    allowed = allowed_per_s(readings(storage=storage, decode=decode))
    stream = share * FAR_BELOW * allowed

    def bound(**streaming: float) -> str:
        return bound_of(
            readings(storage=storage, decode=decode, stream=stream, streaming=streaming)
        )

    assert bound() == "hand-over"
    assert bound(store_peak=1.5e9) == "object store"
    assert bound(spilled=1) == "object store"
    assert bound(cpu_seconds=1900) == "decode"
    assert bound(cpu_seconds=900, others=1.0) == "decode"


@given(demand=RATES, per_core=st.floats(1, 5000))
def test_the_cores_asked_for_meet_the_demand_with_head_room_and_none_to_spare(
    demand: float, per_core: float
) -> None:
    cores = cores_for(demand, per_core)
    assert cores * per_core >= HEAD_ROOM * demand * (1 - 1e-9)
    assert cores == 1 or (cores - 1) * per_core < HEAD_ROOM * demand


@given(gpus=st.integers(1, 64), speed=st.floats(100, 5000))
def test_needs_grow_with_the_gpus(gpus: int, speed: float) -> None:
    asked = diagnose(readings(site={"gpus": gpus, "gpu_images_per_s": speed}))
    assert asked.cores_per_gpu <= asked.cores <= gpus * asked.cores_per_gpu
    assert asked.network_bytes_per_s == pytest.approx(gpus * speed * PICTURE_BYTES)


@given(storage=RATES, decode=RATES, speed=RATES)
def test_enough_is_when_the_measured_stream_meets_the_demand(
    storage: float, decode: float, speed: float
) -> None:
    found = readings(storage=storage, decode=decode, site={"gpu_images_per_s": speed})
    diagnosis = diagnose(found)
    assert diagnosis.enough == (found.streaming.per_s >= speed)
    assert diagnosis.verdict.startswith("fast enough" if diagnosis.enough else "too slow")
    if diagnosis.enough:
        assert not diagnosis.advice  # nor of memory: the made-up store has plenty
    else:
        assert diagnosis.advice


def test_cores_are_counted_by_the_stream_where_its_cpu_time_is_known_and_its_clock_where_not() -> (
    None
):
    known = readings(decode=1000, streaming={"cpu_seconds": 2000})
    assert diagnose(known).per_core_s == pytest.approx(known.streaming.pictures / 2000)

    elsewhere = {"site": {"cores": None}, "streaming": {"cpu_seconds": None, "others": None}}
    busy = diagnose(readings(decode=1000, **elsewhere))
    assert busy.per_core_is_measured
    assert busy.per_core_s == pytest.approx(known.streaming.per_s / 2)

    waiting = diagnose(readings(storage=50, decode=1000, **elsewhere))
    assert not waiting.per_core_is_measured
    assert waiting.per_core_s == pytest.approx(500)


def test_advice_names_what_would_help_and_only_that() -> None:
    large = readings(
        decoding={"copied_seconds": 0.4, "copied_bytes": 0.3, "scaled_seconds": 0.5},
        contents={"quick": 0.5, "progressive": 0.3, "other": 0.2},
    )
    for words in ("--short-side 320", "2.5 times", "30%", "--data.scaled-decoding", "progressive"):
        assert words in advised(large)
    assert "CPU" in advised(readings())
    assert "--short-side" not in advised(readings())
    assert "--data.scaled-decoding" not in advised(readings())

    slow = advised(readings(storage=200))
    assert "Gbit/s" in slow and "--group-rows" not in slow and "CPU nodes" not in slow
    begins_late = readings(storage=200, together={"group_seconds": 0.1, "latency_seconds": 0.08})
    assert "--group-rows" in advised(begins_late) and "Gbit/s" not in advised(begins_late)

    spilled = readings(streaming={"spilled": 1e9}, site={"store_bytes": 8e8})
    assert "object-store-memory" in advised(spilled) and "--data.window 512" in advised(spilled)
    assert "object-store-memory" not in advised(readings(site={"store_bytes": 8e8}))


@given(share=st.floats(0.5, 1), rows=st.integers(1, 1000))
def test_row_groups_only_grow_and_stay_small_enough_to_hold(share: float, rows: int) -> None:
    found = readings(
        together={"group_seconds": 0.1, "latency_seconds": 0.1 * share},
        contents={"group_bytes": rows * PICTURE_BYTES},
    )
    more = group_rows(found)
    assert more >= rows
    assert more * PICTURE_BYTES <= max(64e6, rows * PICTURE_BYTES) + 100 * PICTURE_BYTES


@given(store=st.floats(1e8, 1e12), tasks=st.integers(1, 128))
def test_a_smaller_window_is_advised_where_it_lets_more_tasks_run(store: float, tasks: int) -> None:
    found = readings(site={"store_bytes": store, "decode_cpus": tasks})
    window = window_that_fits(found)
    assert 64 <= window <= 1024
    assert tasks_that_fit(found, window) >= tasks_that_fit(found, 1024)
    assert ("a run would use" in advised(found)) == (tasks_that_fit(found, 1024) < tasks)


def test_figures_that_mislead_are_noted() -> None:
    def noted(**changes: dict[str, Any]) -> str:
        return " | ".join(diagnose(readings(**changes)).notes)

    assert noted() == ""
    assert "page cache" in noted(site={"local_data": True})
    assert "other programs used 1.5" in noted(streaming={"others": 1.5})
    assert "share 2 cores" in noted(site={"decode_cpus": 6})
    assert "3 sampled pictures" in noted(decoding={"failed": 3})


@given(pictures=st.integers(1, 10**7), per_core=st.floats(0.1, 5000))
def test_batch_and_window_fit_any_data_set(pictures: int, per_core: float) -> None:
    fit = Fit.to(pictures, per_core, 1024)
    assert 1 <= fit.batch <= fit.window <= min(pictures, 1024)
    assert fit.window % fit.batch == 0 and fit.batch <= 256


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--gpus", "0"], ["--gpus", "positive", "0"]),
        (["--gpu-images-per-s", "-1"], ["--gpu-images-per-s", "-1"]),
        (["--decode-cpus", "0"], ["--decode-cpus", "0"]),
        (["--image-size", "0", "224"], ["--image-size", "(0, 224)"]),
        (["--seconds", "nan"], ["--seconds", "at least 5", "nan"]),
        ([], ["is not a prepared data set", "droppos prepare"]),
        (["--sceonds", "5"], ["--seconds"]),
    ],
)
def test_what_cannot_be_measured_is_refused_before_ray_starts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, flags: list[str], words: list[str]
) -> None:
    code, text = said(capsys, str(tmp_path), *flags)
    assert code in (1, 2)
    for word in words:
        assert word in text
    assert "Traceback" not in text


def test_a_cluster_that_does_not_answer_is_named(
    capsys: pytest.CaptureFixture[str],
    photographs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # whatever other tests have started
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    prepare(str(photographs), str(tmp_path / "data"))
    code, text = said(capsys, str(tmp_path / "data"))
    assert code == 1 and "RAY_ADDRESS=127.0.0.1:9" in text and "unset RAY_ADDRESS" in text


def test_help_tells_what_a_gpu_is_assumed_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = said(capsys, "--help")
    assert code == 0
    assert "usage: droppos doctor" in text and "assumption" in text


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *argv])
    captured = capsys.readouterr()
    return int(ended.value.code or 0), " ".join((captured.out + captured.err).split())


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster", "s3_env")
@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning:ray.data.context")
def test_a_real_run_measures_what_is_there(
    photographs: Path, s3: S3Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = f"{s3.bucket('doctor')}/data"
    prepare(str(photographs), data, group_rows=20)
    question = Question(seconds=8, decode_cpus=2, image_size=(96, 96), gpus=2, gpu_images_per_s=1e6)
    report = doctor(data, question, picture=tmp_path / "pictures" / "doctor.png")
    found, diagnosis = report.readings, report.diagnosis

    contents = found.contents
    sizes = [file.stat().st_size for file in photographs.rglob("*.jpg")]
    assert contents.pictures == contents.sampled == len(sizes)
    assert sum(sizes) <= contents.bytes <= 1.2 * sum(sizes)
    assert (contents.width, contents.height, contents.quick) == (160, 160, 1)
    assert 0.2 < contents.enlarged < 0.7

    # A size request to a server takes time; reading a row group takes more.
    assert 0 < found.alone.latency_seconds < found.alone.group_seconds
    assert found.together.pictures > 72 and found.decoding.per_core_s > 50
    assert 0.2 < found.decoding.decode_share <= 1
    # Nothing is brought faster than its stages allow, but for noise of a shared machine.
    assert 0 < found.streaming.per_s < 2 * allowed_per_s(found)
    assert found.streaming.per_core_s is not None
    assert found.streaming.per_core_s < 1.5 * found.decoding.per_core_s
    assert found.streaming.spilled == 0
    assert 0 < found.streaming.store_peak < found.site.store_bytes == 300 * 2**20

    assert not diagnosis.enough and diagnosis.bound in ("storage", "decode", "hand-over")
    with Image.open(report.picture) as picture:
        assert picture.width > 1000 and picture.convert("L").getextrema()[0] < 100
    show_doctor(Console(width=200), report)
    text = capsys.readouterr().out
    assert diagnosis.bound_words in text and f"{diagnosis.cores_per_gpu} (" in text
