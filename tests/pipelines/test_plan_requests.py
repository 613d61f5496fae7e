"""What a plan counts as requests to storage, beside those that reach a real S3 server."""

from pathlib import Path

import pytest

from pipelines.local_s3 import S3Server
from pipelines.order import Schedule
from pipelines.plan.workload import REQUESTS_PER_GROUP
from pipelines.prepare import prepare
from pipelines.shards import load_manifest
from pipelines.storage import open_place
from pipelines.windows import CropOptions, read_window
from tests.fault_proxy import FaultProxy


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's, of itself
def test_each_row_group_costs_the_requests_that_a_plan_counts(
    photographs: Path, ray_s3: FaultProxy, s3_env: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = s3_env.bucket("plan-requests")
    prepare(str(photographs), f"{bucket}/data", group_rows=6)
    for name, value in ray_s3.env.items():
        monkeypatch.setenv(name, value)
    data = open_place(f"{bucket}/data")
    manifest = load_manifest(data)
    schedule = Schedule(manifest=manifest, seed=0, global_batch=12, window=12, epochs=2)
    crop = CropOptions((32, 32), (0.2, 1.0), True)

    def read(epoch: int) -> tuple[int, int]:
        """Read an epoch; give its row groups, window by window, and the requests for them."""
        ray_s3.clear()
        windows = list(schedule.windows(epoch))
        for window in windows:
            list(read_window(window, 0, data=data, crop=crop, global_batch=12, block=12))
        asked = ray_s3.requests(key=".parquet")
        return sum(len(window.groups) for window in windows), len(asked)

    read(0)  # footers, once
    groups, requests = read(1)
    assert requests == REQUESTS_PER_GROUP * groups
