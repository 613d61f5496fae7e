"""A network of our own: machines' addresses, and what their security groups let through.

All of it lives in one network namespace without a way out. Each machine has a namespace of its own
and a cable to the first, which passes packets on as a router does.
"""

import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROVIDER = "198.51.100.1"
"""Where AWS answers."""
OPERATOR = "203.0.113.10"
"""The laptop of whoever launches."""
OPERATORS = "203.0.113.0/24"
"""Where ssh may come from."""
STRANGER = "192.0.2.77"
"""Somebody else on the internet."""
ROUTER = "169.254.1.1"
METADATA = "169.254.169.254"
"""Where each machine finds its own metadata."""


def run(*command: str, check: bool = True, **kwargs: Any) -> "subprocess.CompletedProcess[str]":
    """Run a program of the system, and show what it says if it fails."""
    done = subprocess.run(command, text=True, capture_output=True, check=False, **kwargs)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.returncode} {done.stdout}{done.stderr}")
    return done


def set_up() -> None:
    """Make this process's own, empty namespace into the network's router."""
    run("ip", "link", "set", "lo", "up")
    for address in (PROVIDER, OPERATOR, STRANGER):
        run("ip", "address", "add", f"{address}/32", "dev", "lo")
    run("sysctl", "-qw", "net.ipv4.ip_forward=1")


@dataclass(frozen=True, slots=True)
class Cable:
    """What connects a machine's namespace with the router."""

    number: int
    """Of the machine."""
    process: int
    """A process in the machine's namespace, as this one sees it."""

    @property
    def name(self) -> str:
        """Its end at the router."""
        return f"m{self.number}"

    def plug_in(self, addresses: Iterable[str]) -> None:
        """Give the machine its addresses; the first is the one it sends from."""
        here, there = (Path(f"/proc/{each}/ns/net") for each in ("self", self.process))
        while there.readlink() == here.readlink():
            time.sleep(0.01)  # it has not left for its own yet
        peer = ("peer", "name", "eth0", "netns", str(self.process))
        run("ip", "link", "add", self.name, "type", "veth", *peer)
        run("ip", "address", "add", f"{ROUTER}/32", "dev", self.name)
        run("ip", "link", "set", self.name, "up")
        self.inside("ip", "link", "set", "lo", "up")
        self.inside("ip", "address", "add", f"{METADATA}/32", "dev", "lo")
        addresses = list(addresses)
        for address in addresses:
            self.inside("ip", "address", "add", f"{address}/32", "dev", "eth0")
        self.inside("ip", "link", "set", "eth0", "up")
        self.inside("ip", "route", "add", ROUTER, "dev", "eth0")
        self.inside("ip", "route", "add", "default", "via", ROUTER, "src", addresses[0])
        for address in addresses:
            run("ip", "route", "add", f"{address}/32", "dev", self.name, "src", OPERATOR)

    def inside(self, *command: str, **kwargs: Any) -> "subprocess.CompletedProcess[str]":
        """Run a program in the machine's network."""
        return run("nsenter", f"--net=/proc/{self.process}/ns/net", *command, **kwargs)

    def guard(self, rules: str) -> None:
        """Let in what these rules of nftables say, in place of those before."""
        self.inside("nft", "-f", "-", input=rules)


def rules_of(groups: Iterable[Mapping[str, Any]], members: Mapping[str, Iterable[str]]) -> str:
    """Turn a machine's security groups into rules of nftables.

    Args:
        groups: As EC2 describes them. What is not allowed is dropped, as there.
        members: Addresses of the machines in each group, by its identifier.
    """
    allowed = []
    for group in groups:
        for permission in group["IpPermissions"]:
            sources = [each["CidrIp"] for each in permission.get("IpRanges", [])]
            for pair in permission.get("UserIdGroupPairs", []):
                sources += sorted(members.get(pair["GroupId"], ()))
            if sources:
                allowed.append(f"ip saddr {{ {', '.join(sources)} }} {_ports(permission)} accept")
    lines = "\n".join(f"    {line}" for line in allowed)
    return f"""
table inet group
delete table inet group
table inet group {{
  chain input {{
    type filter hook input priority 0; policy drop;
    ct state established,related accept
    iif lo accept
{lines}
  }}
}}
"""


def _ports(permission: Mapping[str, Any]) -> str:
    if permission["IpProtocol"] == "-1":
        return ""
    return f"{permission['IpProtocol']} dport {permission['FromPort']}-{permission['ToPort']}"
