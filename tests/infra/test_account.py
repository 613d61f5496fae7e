"""The account's stack: deployed into a mock of AWS, and what came of it."""

from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from cfnlint.api import lint_file
from moto import mock_aws

from tests.infra.rights import EC2, allowed, listed, statements
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
WORKER_PROFILE = "arn:aws:iam::123456789012:instance-profile/droppos-ray-worker"
OURS = ("droppos", "droppos-vit-base")
"""Names of clusters: by hand, and as `droppos launch` calls them."""
THEIRS = ("another", "dropposs", "another-droppos", "drop", "")
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
        *("Bucket", "VpcId", "SubnetIds", "HeadSecurityGroupId", "WorkerSecurityGroupId"),
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


def test_machines_are_in_three_zones_and_have_public_addresses(account: Stack) -> None:
    found = subnets(account.outputs["SubnetIds"])
    assert len({subnet["AvailabilityZone"] for subnet in found}) == 3
    assert {subnet["VpcId"] for subnet in found} == {account.outputs["VpcId"]}
    # Which the mock forgets.
    assert all(properties(f"Subnet{zone}")["MapPublicIpOnLaunch"] for zone in "ABC")


def test_machines_reach_the_internet_and_storage_by_a_way_of_its_own(account: Stack) -> None:
    ec2 = boto3.client("ec2", REGION)
    (found,) = ec2.describe_route_tables(RouteTableIds=[account.made["Routes"]])["RouteTables"]
    ways = {
        route.get("DestinationCidrBlock", "s3"): route["GatewayId"] for route in found["Routes"]
    }
    assert ways == {
        "10.42.0.0/16": "local",
        "0.0.0.0/0": account.made["Internet"],
        "s3": account.made["S3Endpoint"],
    }


@pytest.mark.parametrize("zone", "ABC")
def test_every_subnet_has_these_routes(zone: str) -> None:
    association = properties(f"Routes{zone}")
    assert association["SubnetId"] == {"Ref": f"Subnet{zone}"}
    assert association["RouteTableId"] == {"Ref": "Routes"}


def test_nothing_costs_while_no_machine_runs() -> None:
    kinds = {resource["Type"] for resource in template(NAME)["Resources"].values()}
    assert not kinds & {
        *("AWS::EC2::NatGateway", "AWS::EC2::EIP", "AWS::EC2::Instance"),
        *("AWS::EC2::TransitGateway", "AWS::EC2::ClientVpnEndpoint", "AWS::KMS::Key"),
    }
    assert properties("S3Endpoint")["VpcEndpointType"] == "Gateway"  # of the other kind they cost


def test_a_second_cluster_stands_beside_the_first(account: Stack) -> None:
    second = deploy(NAME, {**ACCOUNT, "ClusterName": "second"}, "second")
    assert second.outputs["HeadProfile"] == "second-ray-head"
    same = {name for name in second.outputs if second.outputs[name] == account.outputs[name]}
    assert same == {"Region"}


def ingress(group: str) -> set[tuple[str, int | None, str]]:
    """Rules of a group, as protocol, port (None is all), and who it lets in."""
    ec2 = boto3.client("ec2", REGION)
    (found,) = ec2.describe_security_groups(GroupIds=[group])["SecurityGroups"]
    rules = set()
    for rule in found["IpPermissions"]:
        assert rule.get("FromPort") == rule.get("ToPort")
        assert rule["Ipv6Ranges"] == rule["PrefixListIds"] == []
        sources = [given["CidrIp"] for given in rule["IpRanges"]]
        sources += [pair["GroupId"] for pair in rule["UserIdGroupPairs"]]
        rules |= {(rule["IpProtocol"], rule.get("FromPort"), source) for source in sources}
    return rules


def test_from_outside_only_ssh_comes_in_and_only_to_the_head(account: Stack) -> None:
    head, worker = (account.outputs[f"{kind}SecurityGroupId"] for kind in ("Head", "Worker"))
    members = {("-1", None, head), ("-1", None, worker)}
    assert ingress(head) == {("tcp", 22, ACCOUNT["AdminCidr"]), *members}
    assert ingress(worker) == members


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
    for action in ("GetObject", "PutObject", "DeleteObject"):  # MLflow's are its server's alone
        assert not allowed(role, f"s3:{action}", f"{bucket}/mlflow/1/run/artifacts/model"), action
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


@pytest.mark.parametrize("cluster", OURS)
def test_the_head_starts_machines_of_clusters_that_bear_the_stacks_name(
    head: list[Any], cluster: str
) -> None:
    request = {**NEW, "aws:RequestTag/ray-cluster-name": cluster}
    assert allowed(head, "ec2:RunInstances", f"{EC2}:instance/i-1", request)


@pytest.mark.parametrize("cluster", THEIRS)
def test_the_head_starts_no_machines_of_other_clusters(head: list[Any], cluster: str) -> None:
    request = {**NEW, "aws:RequestTag/ray-cluster-name": cluster}
    assert not allowed(head, "ec2:RunInstances", f"{EC2}:instance/i-1", request)


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
def test_the_head_touches_machines_of_its_clusters_only(head: list[Any], action: str) -> None:
    def may(cluster: str) -> bool:
        return allowed(head, action, f"{EC2}:instance/i-1", {tag: cluster})

    tag = "aws:ResourceTag/ray-cluster-name"
    assert all(may(cluster) for cluster in OURS)
    assert not any(may(cluster) for cluster in THEIRS)
    assert not allowed(head, action, f"{EC2}:instance/i-1")


def test_the_head_looks_up_images_of_machines_and_no_other_parameter(head: list[Any]) -> None:
    public = f"arn:aws:ssm:{REGION}::parameter/aws/service"
    ours = f"{public}/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"
    assert allowed(head, "ssm:GetParameters", ours)
    assert not allowed(head, "ssm:GetParameters", f"{public}/ami-amazon-linux-latest/x")
    own = f"arn:aws:ssm:{REGION}:123456789012:parameter/aws/service/deeplearning/x"
    assert not allowed(head, "ssm:GetParameters", own)


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
        ("VpcPrefix", "10.0", "192.168"),
        ("VpcPrefix", "10.255", "10.256"),
        ("ClusterName", "vision2", "Vision"),
        # Clusters of a stack droppos-b would be within the rights of a stack droppos.
        ("ClusterName", "droppos", "droppos-b"),
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
