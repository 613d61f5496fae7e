import os

# Read by Ray once, when it is first imported. Without it `ray.init` turns token authentication
# on and leaves a token in the home folder.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch.distributed as dist

from pipelines.local_s3 import S3Server
from tests.fault_proxy import FaultProxy, fault_proxy


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def ray_s3(s3: S3Server) -> Iterator[FaultProxy]:
    """What Ray's processes take for the S3 server; take `ray_faults` to let them fail."""
    with fault_proxy(s3) as proxy:
        yield proxy


@pytest.fixture
def ray_faults(ray_s3: FaultProxy, ray_cluster: None) -> Iterator[FaultProxy]:
    """The proxy between Ray's processes and S3, for faults and counts of one test."""
    ray_s3.clear()
    yield ray_s3
    ray_s3.clear()


@pytest.fixture(scope="session")
def poison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the steps whose images are NaN, see poison/sitecustomize.py; none to begin with."""
    return tmp_path_factory.mktemp("poison") / "steps"


@pytest.fixture(scope="session")
def ray_cluster(ray_s3: FaultProxy, poison: Path) -> Iterator[None]:
    """A real local Ray with six logical CPUs, however many the machine has.

    Its processes reach the tests' S3 server by the standard variables, through a proxy.
    """
    ray.init(
        address="local",  # never another test's cluster that happens to stand
        num_cpus=6,
        object_store_memory=300 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="warning",
        runtime_env={
            "env_vars": {
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(
                    [str(Path(__file__).with_name("poison")), os.environ.get("PYTHONPATH", "")]
                ),
                "POISON": str(poison),
                **ray_s3.env,
            }
        },
    )
    yield
    ray.shutdown()
