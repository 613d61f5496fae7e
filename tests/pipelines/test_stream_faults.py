"""The stream on a real Ray from an S3 that fails every tenth read."""

import pytest

from pipelines.local_s3 import S3Server
from pipelines.storage import open_place
from tests.fault_proxy import Fault, FaultProxy
from tests.pipelines.test_stream import ROWS, consume, expected, jpeg, write

pytestmark = pytest.mark.filterwarnings(
    # Ray's own: it sets a setting it calls deprecated whenever it makes a DataContext.
    "ignore:.*deprecated:DeprecationWarning:ray.data.context"
)


@pytest.mark.slow
def test_what_arrives_is_the_schedule_though_every_tenth_read_fails(
    ray_faults: FaultProxy, s3_env: S3Server
) -> None:
    place = open_place(f"{s3_env.bucket('stream-faults')}/data")
    data = write(place, [jpeg(row, 32) for row in range(ROWS)])
    ways = [Fault.SLOW_DOWN, Fault.INTERNAL_ERROR, Fault.RESET, Fault.CUT, Fault.SLOW_START]
    ray_faults.fail(*ways, times=None, method="GET", probability=0.1, seconds=1.0, seed=1)
    assert consume(data, workers=2) == expected(data)
    befallen = {each.fault for each in ray_faults.requests(method="GET")} - {None}
    assert len(befallen) >= 3
