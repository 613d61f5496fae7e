import os

# Read by Ray once, when it is first imported. Without it `ray.init` turns token authentication
# on and leaves a token in the home folder.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

from collections.abc import Iterator

import pytest
import ray

from tests.s3_server import S3Server


@pytest.fixture(scope="session")
def ray_cluster(s3: S3Server) -> Iterator[None]:
    """A real local Ray with six logical CPUs, however many the machine has.

    Its processes reach the tests' S3 server by the standard variables.
    """
    ray.init(
        address="local",  # never another test's cluster that happens to stand
        num_cpus=6,
        object_store_memory=300 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="warning",
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", **s3.env}},
    )
    yield
    ray.shutdown()
