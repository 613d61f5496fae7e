"""The account's stack: deployed into a mock of AWS, and what came of it."""

from collections.abc import Iterator
from typing import Any

import boto3
import pytest
import yaml
from cfnlint.api import lint_file
from moto import mock_aws

from tests.infra.rights import allowed, listed, statements
from tests.infra.stacks import (
    ACCOUNT,
    AWS,
    REGION,
    Stack,
    accepts,
    deploy,
    template,
    unknown_kinds_are_left_out,
)

pytestmark = unknown_kinds_are_left_out

NAME = "account.yaml"
EC2 = f"arn:aws:ec2:{REGION}:123456789012"
WORKER_PROFILE = "arn:aws:iam::123456789012:instance-profile/droppos-ray-worker"
OURS = {"aws:ResourceTag/ray-cluster-name": "droppos"}
NEW = {
    "aws:RequestTag/ray-cluster-name": "droppos",
    "ec2:MetadataHttpTokens": "required",
    "ec2:InstanceProfile": WORKER_PROFILE,
}
"""What a request for a new machine carries."""


@pytest.fixture(scope="module")
def account() -> Iterator[Stack]:
    with mock_aws():
        yield deploy(NAME, ACCOUNT)


@pytest.fixture(scope="module")
def head(account: Stack) -> list[Any]:
    return statements("droppos-ray-head")


@pytest.fixture(scope="module")
def worker(account: Stack) -> list[Any]:
    return statements("droppos-ray-worker")


def subnets(ids: str) -> list[dict[str, Any]]:
    return boto3.client("ec2", REGION).describe_subnets(SubnetIds=ids.split(","))["Subnets"]


def properties(resource: str) -> dict[str, Any]:
    return template(NAME)["Resources"][resource]["Properties"]


def test_the_linter_has_nothing_to_say() -> None:
    assert lint_file(AWS / NAME) == []


def test_the_launch_finds_all_it_needs(account: Stack) -> None:
    assert set(account.outputs) == {
        *("Bucket", "VpcId", "HeadSubnetIds", "WorkerSubnetIds", "SecurityGroupId"),
        *("HeadProfile", "WorkerProfile", "KeyName", "ImageRepository", "Region"),
    }
    assert account.outputs["Region"] == REGION
    assert account.outputs["HeadProfile"] == "droppos-ray-head"
    assert account.outputs["WorkerProfile"] == "droppos-ray-worker"
    boto3.client("s3").head_bucket(Bucket=account.outputs["Bucket"])
    ecr = boto3.client("ecr", REGION)
    (images,) = ecr.describe_repositories(repositoryNames=["droppos"])["repositories"]
    assert images["repositoryUri"] == account.outputs["ImageRepository"]


def test_only_what_the_mock_does_not_know_was_left_out(account: Stack) -> None:
    missing = set(template(NAME)["Resources"]) - set(account.made)
    assert missing == {"Key", "BucketTls", "Budget"}


def test_workers_are_in_three_zones_and_have_no_public_addresses(account: Stack) -> None:
    for kind in ("Head", "Worker"):
        found = subnets(account.outputs[f"{kind}SubnetIds"])
        assert len({subnet["AvailabilityZone"] for subnet in found}) == 3
        assert {subnet["VpcId"] for subnet in found} == {account.outputs["VpcId"]}
        # Which the mock forgets.
        public = {properties(f"{kind}Subnet{zone}")["MapPublicIpOnLaunch"] for zone in "ABC"}
        assert public == {kind == "Head"}


def routes(account: Stack, table: str) -> dict[str, str]:
    """Gateways of a route table, by where they lead to."""
    ec2 = boto3.client("ec2", REGION)
    (found,) = ec2.describe_route_tables(RouteTableIds=[account.made[table]])["RouteTables"]
    return {
        route.get("DestinationCidrBlock", "s3"): route.get("NatGatewayId") or route["GatewayId"]
        for route in found["Routes"]
    }


def test_workers_reach_the_internet_by_nat_and_storage_without_it(account: Stack) -> None:
    workers, head = routes(account, "WorkerRoutes"), routes(account, "HeadRoutes")
    assert workers == {
        "10.42.0.0/16": "local",
        "0.0.0.0/0": account.made["Nat"],
        "s3": account.made["S3Endpoint"],
    }
    assert head["0.0.0.0/0"] == account.made["Internet"]
    assert head["s3"] == account.made["S3Endpoint"]


@pytest.mark.parametrize("kind", ["Head", "Worker"])
@pytest.mark.parametrize("zone", "ABC")
def test_every_subnet_has_the_routes_of_its_kind(kind: str, zone: str) -> None:
    association = properties(f"{kind}Routes{zone}")
    assert association["SubnetId"] == {"Ref": f"{kind}Subnet{zone}"}
    assert association["RouteTableId"] == {"Ref": f"{kind}Routes"}


def test_without_nat_workers_still_reach_storage(account: Stack) -> None:
    second = deploy(NAME, {**ACCOUNT, "NatGateway": "false", "ClusterName": "second"}, "second")
    assert set(routes(second, "WorkerRoutes")) == {"10.42.0.0/16", "s3"}
    assert not {"Nat", "NatAddress", "WorkersToInternet"} & set(second.made)
    assert second.outputs["HeadProfile"] == "second-ray-head"


def test_only_ssh_from_the_administrators_comes_in(account: Stack) -> None:
    group = account.outputs["SecurityGroupId"]
    ec2 = boto3.client("ec2", REGION)
    (found,) = ec2.describe_security_groups(GroupIds=[group])["SecurityGroups"]
    ssh, members = sorted(found["IpPermissions"], key=lambda rule: rule["IpProtocol"], reverse=True)
    assert (ssh["IpProtocol"], ssh["FromPort"], ssh["ToPort"]) == ("tcp", 22, 22)
    assert [given["CidrIp"] for given in ssh["IpRanges"]] == [ACCOUNT["AdminCidr"]]
    assert ssh["UserIdGroupPairs"] == ssh["Ipv6Ranges"] == []
    assert members["IpProtocol"] == "-1"
    assert [pair["GroupId"] for pair in members["UserIdGroupPairs"]] == [group]
    assert members["IpRanges"] == members["Ipv6Ranges"] == []


def test_profiles_bear_the_roles_of_their_names(account: Stack) -> None:
    iam = boto3.client("iam")
    for name in ("droppos-ray-head", "droppos-ray-worker"):
        profile = iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]
        assert [role["RoleName"] for role in profile["Roles"]] == [name]
        trust = str(profile["Roles"][0]["AssumeRolePolicyDocument"])
        assert "ec2.amazonaws.com" in trust


@pytest.mark.parametrize("machine", ["head", "worker"])
def test_every_machine_uses_the_bucket_but_cannot_destroy_what_versions_keep(
    account: Stack, machine: str
) -> None:
    role = statements(f"droppos-ray-{machine}")
    bucket = f"arn:aws:s3:::{account.outputs['Bucket']}"
    for action in ("GetObject", "PutObject", "DeleteObject", "AbortMultipartUpload"):
        assert allowed(role, f"s3:{action}", f"{bucket}/runs/a/checkpoint"), action
        assert not allowed(role, f"s3:{action}", "arn:aws:s3:::another/runs"), action
    assert allowed(role, "s3:ListBucket", bucket)
    assert not allowed(role, "s3:DeleteObjectVersion", f"{bucket}/runs/a/checkpoint")
    for action in ("DeleteBucket", "PutBucketVersioning", "PutLifecycleConfiguration"):
        assert not allowed(role, f"s3:{action}", bucket), action


@pytest.mark.parametrize("machine", ["head", "worker"])
def test_every_machine_pulls_the_image_and_cannot_replace_it(account: Stack, machine: str) -> None:
    role = statements(f"droppos-ray-{machine}")
    images = f"arn:aws:ecr:{REGION}:123456789012:repository/droppos"
    assert allowed(role, "ecr:GetAuthorizationToken", "*")
    assert allowed(role, "ecr:BatchGetImage", images)
    assert not allowed(role, "ecr:PutImage", images)
    assert not allowed(role, "ecr:BatchGetImage", f"{images}-of-others")


def test_a_worker_has_no_say_over_machines_roles_or_secrets(worker: list[Any]) -> None:
    assert {action.split(":")[0] for one in worker for action in listed(one["Action"])} == {
        "s3",
        "ecr",
    }


def test_the_head_starts_machines_like_its_own(head: list[Any], account: Stack) -> None:
    assert allowed(head, "ec2:RunInstances", f"{EC2}:instance/i-1", NEW)
    for subnet in account.outputs["WorkerSubnetIds"].split(","):
        assert allowed(head, "ec2:RunInstances", f"{EC2}:subnet/{subnet}")
    group = account.outputs["SecurityGroupId"]
    assert allowed(head, "ec2:RunInstances", f"{EC2}:security-group/{group}")
    assert allowed(head, "ec2:RunInstances", f"{EC2}:key-pair/droppos")
    for touched in ("network-interface/eni-1", "volume/vol-1", "spot-instances-request/sir-1"):
        assert allowed(head, "ec2:RunInstances", f"{EC2}:{touched}"), touched
    assert allowed(head, "ec2:RunInstances", f"arn:aws:ec2:{REGION}::image/ami-1")


def test_the_head_may_start_every_worker_of_cluster_yaml(head: list[Any], account: Stack) -> None:
    cluster = yaml.safe_load((AWS.parents[1] / "cluster.yaml").read_text())
    types = cluster["available_node_types"]
    workers = [types[name]["node_config"] for name in types if name != cluster["head_node_type"]]
    assert workers
    for node in workers:
        profile = f"arn:aws:iam::123456789012:instance-profile/{node['IamInstanceProfile']['Name']}"
        request = {
            "aws:RequestTag/ray-cluster-name": cluster["cluster_name"],
            "ec2:MetadataHttpTokens": node["MetadataOptions"]["HttpTokens"],
            "ec2:InstanceProfile": profile,
        }
        assert allowed(head, "ec2:RunInstances", f"{EC2}:instance/i-1", request)
        assert node["KeyName"] == account.outputs["KeyName"]


@pytest.mark.parametrize("missing", NEW)
def test_the_head_starts_no_machine_without_tag_worker_profile_or_imdsv2(
    head: list[Any], missing: str
) -> None:
    others = {key: value for key, value in NEW.items() if key != missing}
    for request in (others, {**others, missing: "another"}):
        assert not allowed(head, "ec2:RunInstances", f"{EC2}:instance/i-1", request)


def test_the_head_starts_nothing_in_networks_of_others(head: list[Any]) -> None:
    for foreign in ("subnet/subnet-1", "security-group/sg-1", "key-pair/another"):
        assert not allowed(head, "ec2:RunInstances", f"{EC2}:{foreign}"), foreign


@pytest.mark.parametrize("action", ["ec2:TerminateInstances", "ec2:CreateTags"])
def test_the_head_touches_machines_of_its_cluster_only(head: list[Any], action: str) -> None:
    machine = f"{EC2}:instance/i-1"
    assert allowed(head, action, machine, OURS)
    assert not allowed(head, action, machine)
    assert not allowed(head, action, machine, {"aws:ResourceTag/ray-cluster-name": "another"})


def test_the_head_tags_what_it_starts(head: list[Any]) -> None:
    for new in ("instance/i-1", "volume/vol-1", "spot-instances-request/sir-1"):
        assert allowed(head, "ec2:CreateTags", f"{EC2}:{new}", {"ec2:CreateAction": "RunInstances"})
        assert not allowed(head, "ec2:CreateTags", f"{EC2}:{new}")


def test_the_head_hands_on_the_workers_role_only(head: list[Any]) -> None:
    def passes(role: str, service: str) -> bool:
        arn = f"arn:aws:iam::123456789012:role/{role}"
        return allowed(head, "iam:PassRole", arn, {"iam:PassedToService": service})

    assert passes("droppos-ray-worker", "ec2.amazonaws.com")
    assert not passes("droppos-ray-worker", "lambda.amazonaws.com")
    assert not passes("droppos-ray-head", "ec2.amazonaws.com")
    assert not passes("admin", "ec2.amazonaws.com")


def test_the_head_reads_the_jobs_mlflow_password_and_no_other_secret(head: list[Any]) -> None:
    secrets = f"arn:aws:secretsmanager:{REGION}:123456789012:secret:droppos/mlflow"
    assert allowed(head, "secretsmanager:GetSecretValue", f"{secrets}/jobs-AbCdEf")
    for other in ("admin-AbCdEf", "database-AbCdEf", "jobs-of-others-AbCdEf"):
        assert not allowed(head, "secretsmanager:GetSecretValue", f"{secrets}/{other}"), other


def test_the_bucket_is_private_encrypted_and_can_be_undone() -> None:
    bucket = properties("Bucket")
    assert set(bucket["PublicAccessBlockConfiguration"].values()) == {True}
    assert bucket["OwnershipControls"]["Rules"] == [{"ObjectOwnership": "BucketOwnerEnforced"}]
    (encryption,) = bucket["BucketEncryption"]["ServerSideEncryptionConfiguration"]
    assert encryption["ServerSideEncryptionByDefault"]["SSEAlgorithm"] == "AES256"
    assert bucket["VersioningConfiguration"] == {"Status": "Enabled"}
    uploads, versions = bucket["LifecycleConfiguration"]["Rules"]
    assert uploads["AbortIncompleteMultipartUpload"]["DaysAfterInitiation"] == 2
    assert versions["NoncurrentVersionExpiration"]["NoncurrentDays"] == {"Ref": "KeepDeletedDays"}
    assert {rule["Status"] for rule in (uploads, versions)} == {"Enabled"}
    for kept in ("Bucket", "Images"):
        resource = template(NAME)["Resources"][kept]
        assert resource["DeletionPolicy"] == resource["UpdateReplacePolicy"] == "Retain"


def test_the_bucket_refuses_plain_http_and_old_tls() -> None:
    document = properties("BucketTls")["PolicyDocument"]
    assert {rule["Effect"] for rule in document["Statement"]} == {"Deny"}
    assert [rule["Condition"] for rule in document["Statement"]] == [
        {"Bool": {"aws:SecureTransport": "false"}},
        {"NumericLessThan": {"s3:TlsVersion": "1.2"}},
    ]


def test_images_are_scanned_and_a_tag_stays_what_it_is() -> None:
    assert properties("Images")["ImageScanningConfiguration"] == {"ScanOnPush": True}
    assert properties("Images")["ImageTagMutability"] == "IMMUTABLE"


def test_the_key_is_the_given_one() -> None:
    key = properties("Key")
    assert key["PublicKeyMaterial"] == {"Ref": "PublicKey"}
    assert key["KeyName"] == template(NAME)["Outputs"]["KeyName"]["Value"]


def test_somebody_is_told_before_the_budget_is_spent() -> None:
    budget = properties("Budget")
    assert budget["Budget"]["BudgetLimit"] == {"Amount": {"Ref": "MonthlyBudget"}, "Unit": "USD"}
    kinds = [
        (told["Notification"]["NotificationType"], told["Notification"]["Threshold"])
        for told in budget["NotificationsWithSubscribers"]
    ]
    assert kinds == [("ACTUAL", 50), ("ACTUAL", 90), ("FORECASTED", 100)]
    for told in budget["NotificationsWithSubscribers"]:
        (subscriber,) = told["Subscribers"]
        assert subscriber == {"SubscriptionType": "EMAIL", "Address": {"Ref": "BudgetEmail"}}


@pytest.mark.parametrize(
    ("parameter", "right", "wrong"),
    [
        ("AdminCidr", "203.0.113.7/32", "0.0.0.0/0"),
        ("AdminCidr", "10.1.0.0/16", "128.0.0.0/1"),
        ("AdminCidr", "255.255.255.255/32", "256.0.0.1/32"),
        ("AdminCidr", "203.0.113.0/24", "203.0.113.7"),
        ("PublicKey", "ssh-rsa AAAAB3NzaC1yc2E=", "-----BEGIN OPENSSH PRIVATE KEY-----"),
        ("PublicKey", ACCOUNT["PublicKey"], "~/.ssh/droppos.pub"),
        ("BudgetEmail", "a@example.org", "nobody"),
        ("MonthlyBudget", "1", "0"),
        ("NatGateway", "false", "no"),
        ("VpcPrefix", "10.0", "192.168"),
        ("VpcPrefix", "10.255", "10.256"),
        ("ClusterName", "vision-team", "Vision"),
        ("KeepDeletedDays", "30", "0"),
    ],
)
def test_a_wrong_parameter_is_refused(parameter: str, right: str, wrong: str) -> None:
    assert accepts(NAME, parameter, right)
    assert not accepts(NAME, parameter, wrong)


def test_every_parameter_says_what_it_is_and_every_pattern_what_it_takes() -> None:
    for name, rule in template(NAME)["Parameters"].items():
        assert rule["Description"], name
        assert ("AllowedPattern" in rule) == ("ConstraintDescription" in rule), name
