"""What AWS tells of an account, asked once and kept: for the looks, the price and the filled file.

Every question raises `Wrong` with AWS's own words when it is not answered, so each look that needs
an answer tells by itself why it has none.
"""

import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConfigParseError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
)

from droppos.errors import ConfigError
from pipelines.launch import stack
from pipelines.launch.check import Note, Wrong
from pipelines.launch.stack import EXPIRED, LOG_IN, Stack, reason

Answer = TypeVar("Answer")

PATIENCE = Config(connect_timeout=10, read_timeout=30, retries={"max_attempts": 4})


class Account:
    """One account, in one region."""

    def __init__(self, region: str | None, stack_name: str, mlflow_stack: str | None) -> None:
        """Take what identifies it; nothing is asked yet.

        Raises:
            ConfigError: If the profile of AWS_PROFILE is not there, or AWS's file is broken.
        """
        try:
            # boto3 reads AWS_DEFAULT_REGION only; AWS's other tools read AWS_REGION first.
            said = region or os.environ.get("AWS_REGION") or None
            self._session = boto3.Session(region_name=said)
        except (ProfileNotFound, ConfigParseError) as error:
            raise ConfigError(f"{error}; correct AWS_PROFILE, or ~/.aws/config") from error
        self._stack_name, self._mlflow_stack = stack_name, mlflow_stack
        self._clients: dict[tuple[str, str], Any] = {}

    @property
    def region(self) -> str:
        """Where it is.

        Raises:
            Wrong: If nobody said.
        """
        if self._session.region_name is None:
            raise Wrong("no region", "the one of the stack", "give --region, or set AWS_REGION")
        return self._session.region_name

    def client(self, service: str, region: str | None = None) -> Any:
        """Give a client whose requests end; it is made once, which takes a tenth of a second."""
        where = service, region or self.region
        if where not in self._clients:
            self._clients[where] = self._session.client(  # pyright: ignore[reportCallIssue]
                service, region_name=where[1], config=PATIENCE
            )
        return self._clients[where]

    @property
    def number(self) -> str:
        """Of the account that the credentials are of; raises Wrong as `identity`."""
        return self._caller["Account"]

    def identity(self) -> str:
        """Tell who asks.

        Raises:
            Wrong: If nobody does, or the right to do so is over.
        """
        return self._caller["Arn"]

    @cached_property
    def _caller(self) -> Mapping[str, str]:
        try:
            return self.client("sts").get_caller_identity()
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise Wrong(str(error), "credentials of the account", LOG_IN) from error
        except ClientError as error:
            over = error.response["Error"]["Code"] in EXPIRED
            found = "credentials that have expired" if over else reason(error)
            raise Wrong(found, "credentials that are valid", LOG_IN) from error
        except BotoCoreError as error:
            raise Wrong(str(error), "an answer of AWS", "look at the network") from error

    def region_is_there(self) -> str:
        """See that the region is one, and is switched on for the account."""

        def ask() -> str:
            self.client("ec2").describe_availability_zones()
            return self.region

        return asked(ask, "a region that is switched on", "give --region, or set AWS_REGION")

    @cached_property
    def stack(self) -> Stack:
        """The account's stack, with MLflow's outputs."""
        found = stack.read_stack(self.client("cloudformation"), self._stack_name)
        if self._mlflow_stack is None:
            return found
        team = stack.read_stack(self.client("cloudformation"), self._mlflow_stack)
        named = {name: team.outputs[name] for name in stack.MLFLOW if name in team.outputs}
        return Stack(found.name, {**found.outputs, **named}, found.cluster)

    @cached_property
    def zones(self) -> tuple[str, ...]:
        """Zones of the workers' subnets."""

        def ask() -> tuple[str, ...]:
            subnets = self.stack.subnets("Worker")
            found = self.client("ec2").describe_subnets(SubnetIds=subnets)["Subnets"]
            return tuple(sorted({each["AvailabilityZone"] for each in found}))

        return asked(ask, "the stack's subnets", "update the stack")

    def bucket_is_ours(self) -> str:
        """See that the stack's bucket is in this region and takes what is written."""
        bucket = self.stack.outputs["Bucket"]
        s3 = self.client("s3")
        key = f"droppos-launch/{uuid.uuid4()}"

        def ask() -> str:
            where = s3.get_bucket_location(Bucket=bucket)["LocationConstraint"] or "us-east-1"
            if where != self.region:
                raise Wrong(
                    f"s3://{bucket} is in {where}",
                    f"{self.region}, where the machines are",
                    "reading across regions costs per GB: take --region, or another bucket",
                )
            s3.put_object(Bucket=bucket, Key=key, Body=b"")
            s3.delete_object(Bucket=bucket, Key=key)
            return f"s3://{bucket}, in {where}, can be written"

        return asked(ask, f"s3://{bucket} that can be read and written", "ask for the rights to it")

    @cached_property
    def image(self) -> str:
        """Repository and digest of the newest tagged image."""
        repository = self.stack.outputs["ImageRepository"]

        def ask() -> str:
            pages = self.client("ecr").get_paginator("describe_images")
            name = repository.partition("/")[2]
            images = [
                image
                for page in pages.paginate(repositoryName=name, filter={"tagStatus": "TAGGED"})
                for image in page["imageDetails"]
            ]
            if not images:
                raise Wrong(
                    f"{repository} has no image",
                    "the image of infra/image/Dockerfile",
                    "build and push it: infra/README.md",
                )
            newest = max(images, key=lambda image: image["imagePushedAt"])
            return f"{repository}@{newest['imageDigest']}"

        return asked(ask, f"an image in {repository}", "build and push it: infra/README.md")

    def ami(self, parameter: str) -> str:
        """Look a public parameter of a machine image up."""

        def ask() -> str:
            return self.client("ssm").get_parameter(Name=parameter)["Parameter"]["Value"]

        return asked(ask, f"the public parameter {parameter}", "write ImageId into the file")

    def vcpus(self, types: Sequence[str]) -> dict[str, int]:
        """Count the vCPUs of machine types."""

        def ask() -> dict[str, int]:
            found = self.client("ec2").describe_instance_types(InstanceTypes=sorted(set(types)))
            return {
                each["InstanceType"]: each["VCpuInfo"]["DefaultVCpus"]
                for each in found["InstanceTypes"]
            }

        return asked(
            ask, "machine types that EC2 has", "correct InstanceType in the cluster's file"
        )

    def offered(self, types: Sequence[str]) -> str:
        """See in which of our zones each machine type is offered."""

        def ask() -> dict[str, set[str]]:
            pages = self.client("ec2").get_paginator("describe_instance_type_offerings")
            found: dict[str, set[str]] = {each: set() for each in types}
            for page in pages.paginate(
                LocationType="availability-zone",
                Filters=[{"Name": "instance-type", "Values": sorted(found)}],
            ):
                for offer in page["InstanceTypeOfferings"]:
                    found[offer["InstanceType"]].add(offer["Location"])
            return found

        offers = asked(ask, "what EC2 offers", "correct InstanceType in the cluster's file")
        ours = {name: sorted(where & set(self.zones)) for name, where in offers.items()}
        if nowhere := [name for name, where in ours.items() if not where]:
            raise Wrong(
                f"{', '.join(nowhere)}: in none of {', '.join(self.zones)}",
                "each type in one of the stack's zones",
                "take another type, or a stack with subnets in other zones",
            )
        few = [
            f"{name} only in {', '.join(w)}" for name, w in ours.items() if len(w) < len(self.zones)
        ]
        if few:
            raise Note("; ".join(few), "spot machines of one type run out in one zone first")
        return f"all types in {', '.join(self.zones)}"


def asked(work: Callable[[], Answer], expected: str, way_out: str) -> Answer:
    """Ask AWS; what it refuses is told in its words."""
    try:
        return work()
    except (ClientError, BotoCoreError) as error:
        raise Wrong(reason(error), expected, stack.way_out(error, way_out)) from error


def needs_program(name: str, way_out: str) -> str:
    """See that a program is there."""
    path = shutil.which(name)
    if path is None:
        raise Wrong(f"no {name}", f"{name} on this machine's PATH", way_out)
    return path
