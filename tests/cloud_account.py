"""An account in moto, in this process, with what infra/aws/account.yaml makes of an empty one."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import boto3
import pytest
from moto import mock_aws
from moto.servicequotas.models import ServiceQuotasBackend

REGION = "us-west-2"
STACK = "studio"
AMI_PARAMETER = "/droppos-tests/ami"
"""Amazon's own names are reserved in moto, and it has not the one of the deep learning image."""
QUOTAS = {"L-3819A6DF": 104, "L-DB2E81BA": 104, "L-1216C47A": 128}
"""vCPUs: GPU types on spot and on demand, standard ones on demand."""

TEMPLATE = {
    "Parameters": {"ClusterName": {"Type": "String"}},
    "Resources": {
        "Bucket": {"Type": "AWS::S3::Bucket"},
        "Vpc": {"Type": "AWS::EC2::VPC", "Properties": {"CidrBlock": "10.42.0.0/16"}},
        **{
            f"Subnet{zone}": {
                "Type": "AWS::EC2::Subnet",
                "Properties": {
                    "VpcId": {"Ref": "Vpc"},
                    "CidrBlock": f"10.42.{index}.0/24",
                    "AvailabilityZone": f"{REGION}{zone}",
                },
            }
            for index, zone in enumerate("ab")
        },
        **{
            f"{role}Group": {
                "Type": "AWS::EC2::SecurityGroup",
                "Properties": {"GroupDescription": role, "VpcId": {"Ref": "Vpc"}},
            }
            for role in ("Head", "Worker")
        },
    },
    "Outputs": {
        "Bucket": {"Value": {"Ref": "Bucket"}},
        "SubnetIds": {"Value": {"Fn::Join": [",", [{"Ref": "Subneta"}, {"Ref": "Subnetb"}]]}},
        "HeadSecurityGroupId": {"Value": {"Fn::GetAtt": ["HeadGroup", "GroupId"]}},
        "WorkerSecurityGroupId": {"Value": {"Fn::GetAtt": ["WorkerGroup", "GroupId"]}},
        "HeadProfile": {"Value": "studio-ray-head"},
        "WorkerProfile": {"Value": "studio-ray-worker"},
        "KeyName": {"Value": "studio"},
        "ImageRepository": {
            "Value": {"Fn::Sub": "${AWS::AccountId}.dkr.ecr.${AWS::Region}.amazonaws.com/studio"}
        },
    },
}
KIND = "application/vnd.docker.distribution.manifest.v2+json"
MLFLOW = {
    "Resources": {"Topic": {"Type": "AWS::SNS::Topic"}},
    "Outputs": {
        "MlflowUri": {"Value": "http://mlflow.studio.internal:5000"},
        "MlflowSecretArn": {
            "Value": "arn:aws:secretsmanager:us-west-2:1:secret:studio/mlflow/jobs"
        },
    },
}


@contextmanager
def account(patch: pytest.MonkeyPatch, quotas: Mapping[str, float] = QUOTAS) -> Iterator[None]:
    """Enter it, by the standard variables."""
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_SESSION_TOKEN", "AWS_REGION"):
        patch.delenv(name, raising=False)
    patch.setenv("AWS_ACCESS_KEY_ID", "AKIATEST")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "only-for-the-mock")
    patch.setenv("AWS_DEFAULT_REGION", REGION)

    def quota(self: object, service_code: str, quota_code: str) -> dict[str, Any]:
        return {"ServiceCode": service_code, "Value": quotas[quota_code]}

    patch.setattr(ServiceQuotasBackend, "get_service_quota", quota)  # which knows only VPC's
    with mock_aws():
        boto3.client("ssm").put_parameter(Name=AMI_PARAMETER, Value="ami-0123abcd", Type="String")
        ecr = boto3.client("ecr")
        ecr.create_repository(repositoryName="studio")
        yield


def deploy(template: Mapping[str, Any] = TEMPLATE, name: str = STACK, **parameters: str) -> None:
    """Make a stack."""
    boto3.client("cloudformation").create_stack(
        StackName=name,
        TemplateBody=json.dumps(template),
        Parameters=[
            {"ParameterKey": key, "ParameterValue": value} for key, value in parameters.items()
        ],
    )


def push(tag: str, layer: str = "1") -> str:
    """Push an image; gives its digest."""
    manifest = {
        "schemaVersion": 2,
        "mediaType": KIND,
        "config": {"digest": f"sha256:{layer}"},
        "layers": [],
    }
    pushed = boto3.client("ecr").put_image(
        repositoryName="studio", imageManifest=json.dumps(manifest), imageTag=tag
    )
    return pushed["image"]["imageId"]["imageDigest"]
