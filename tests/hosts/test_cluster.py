"""The launch on machines of our own; and what those machines are made of."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hosts.host import Image
from tests.hosts.network import OPERATORS, rules_of
from tests.hosts.proof import NotPermittedError, check_machine

SSH = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": OPERATORS}]}
MEMBERS = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": "sg-1"}]}


def test_a_group_lets_in_its_members_and_whom_it_names() -> None:
    rules = rules_of([{"IpPermissions": [SSH, MEMBERS]}], {"sg-1": ["10.0.0.1", "10.0.0.2"]})
    assert "policy drop" in rules
    assert f"ip saddr {{ {OPERATORS} }} tcp dport 22-22 accept" in rules
    assert "ip saddr { 10.0.0.1, 10.0.0.2 }  accept" in rules


def test_a_group_without_members_lets_nobody_in() -> None:
    rules = rules_of([{"IpPermissions": [MEMBERS]}], {})
    assert "ip saddr" not in rules


@pytest.mark.long
def test_a_launch_grows_loses_a_machine_falls_back_and_leaves_nothing() -> None:
    try:
        check_machine()
    except NotPermittedError as reason:
        pytest.skip(str(reason))
    done = subprocess.run(
        [sys.executable, "-m", "tests.hosts.proof"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    line = r"cluster up_s=\S+ scale_up_s=\S+ job=ok interrupted=ok scale_down_s=\S+ left=0"
    assert re.fullmatch(line, done.stdout.splitlines()[-1])


def test_a_container_has_the_variables_of_the_image() -> None:
    env = Image.of_the_dockerfile("x", MORE="1").env
    assert env["HOME"] == "/home/ray"
    assert env["PATH"].startswith(str(Path(sys.executable).parent))
    assert env["MORE"] == "1"
