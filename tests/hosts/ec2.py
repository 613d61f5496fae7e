"""A mock of AWS that listens to HTTP, with what matters to Ray's launcher put right in moto.

As a program: `python -m tests.hosts.ec2 ADDRESS PORT FOLDER`. In the folder, `run_instances.jsonl`
gets each request for machines, and `no_capacity.json` may list what is sold out: `spot:TYPE` or
`on-demand:TYPE`.
"""

import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moto.core import DEFAULT_ACCOUNT_ID
from moto.ec2.exceptions import EC2ClientError
from moto.ec2.responses.instances import InstanceResponse
from moto.server import main
from moto.ssm.models import Parameter, ssm_backends

from pipelines.launch.clusterfile import AMI
from pipelines.local_s3 import REGION

REQUESTS, SOLD_OUT = "run_instances.jsonl", "no_capacity.json"


def put_right(folder: Path) -> None:
    """Have moto start as many machines as are asked for, refuse what is sold out, keep a record.

    moto starts MinCount machines, where EC2 starts MaxCount if it can, and gives the instance
    profile to the first of them only.
    """
    original: Callable[[InstanceResponse], Any] = InstanceResponse.run_instances

    def run_instances(self: InstanceResponse) -> Any:
        ask = self._get_param
        market = ask("InstanceMarketOptions.MarketType") or "on-demand"
        with (folder / REQUESTS).open("a") as file:
            file.write(json.dumps(dict(self.params), default=str) + "\n")
        sold_out = folder / SOLD_OUT
        if sold_out.exists() and f"{market}:{ask('InstanceType')}" in json.loads(
            sold_out.read_text()
        ):
            raise EC2ClientError(
                "InsufficientInstanceCapacity",
                f"We currently do not have sufficient {ask('InstanceType')} capacity in the "
                "Availability Zone you requested.",
            )
        renamed = {"MinCount": "MaxCount"}
        self._get_param = lambda name, *args, **kwargs: ask(  # type: ignore[method-assign]
            renamed.get(name, name), *args, **kwargs
        )
        answer = original(self)
        if profile := ask("IamInstanceProfile.Name"):
            for instance in answer.result.instances[1:]:  # the first one has it
                self.ec2_backend.associate_iam_instance_profile(instance.id, profile)
        return answer

    InstanceResponse.run_instances = run_instances  # type: ignore[method-assign]


def publish(name: str, value: str) -> None:
    """Give a public parameter a value: nobody but Amazon may write those that begin with /aws."""
    kept = ssm_backends[DEFAULT_ACCOUNT_ID][REGION]._parameters
    about = {"description": None, "allowed_pattern": None, "keyid": None, "data_type": "text"}
    kept[name].append(
        Parameter(
            DEFAULT_ACCOUNT_ID,
            name,
            value,
            "String",
            last_modified_date=datetime.now(UTC),
            version=1,
            **about,
        )
    )


if __name__ == "__main__":
    put_right(Path(sys.argv[3]))
    publish(AMI, "ami-12c6146b")  # one that moto has
    main(["-H", sys.argv[1], "-p", sys.argv[2]])
