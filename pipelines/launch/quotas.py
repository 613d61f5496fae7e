"""How many vCPUs of a kind of machine an account may have at once, and how many a cluster needs.

EC2 counts its limits in vCPUs, apart for spot and on demand, by families of types. New accounts
have 0 of the GPU ones, and asking for more takes hours to days: so it is looked at first.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from botocore.exceptions import BotoCoreError, ClientError

from pipelines.launch.check import Note, Wrong
from pipelines.launch.stack import reason

Market = Literal["spot", "on demand"]


class Family(NamedTuple):
    """Types of machine that share one limit, and the limit's codes in Service Quotas."""

    name: str
    letters: tuple[str, ...]
    spot: str
    on_demand: str


FAMILIES = (
    Family("G and VT", ("g", "gr", "vt"), "L-3819A6DF", "L-DB2E81BA"),
    Family("P", ("p",), "L-7212CCBC", "L-417A185B"),
    Family("standard", ("a", "c", "d", "h", "i", "m", "r", "t", "z"), "L-34B43A08", "L-1216C47A"),
)


@dataclass(frozen=True, slots=True)
class Use:
    """So many machines of one type."""

    machine: str
    market: Market
    most: int
    """That the cluster's file allows at once."""
    needed: int
    """That the recipe cannot do without."""


@dataclass(frozen=True, slots=True)
class _Need:
    most: int = 0
    needed: int = 0


def family_of(machine: str) -> Family | None:
    """Find the limit that a type counts against; None for a family that is not among ours."""
    match = re.match(r"[a-z]+", machine)
    letters = match[0] if match else ""
    # Such as im4gn, is4gen, inf, trn, dl, u: i and the like are read by their first letter only
    # where the family really is one of the standard ones.
    if letters in ("inf", "trn", "dl", "f", "x", "u", "hpc", "mac"):
        return None
    return next(
        (each for each in FAMILIES if letters in each.letters or letters[:1] in each.letters), None
    )


def check_quotas(client: Any, uses: Iterable[Use], vcpus: Mapping[str, int]) -> str:
    """Hold the limits against what the cluster needs.

    Args:
        client: boto3's, of Service Quotas.
        uses: Machines of the cluster.
        vcpus: Of each type.

    Raises:
        Wrong: If the recipe could not run for want of a limit.
        Note: If it could, but the cluster could not grow to what its file says.
    """
    needs: dict[tuple[Family, Market], _Need] = {}
    unknown: list[str] = []
    for use in uses:
        family = family_of(use.machine)
        if family is None:
            unknown.append(use.machine)
            continue
        before = needs.get((family, use.market), _Need())
        each = vcpus[use.machine]
        needs[family, use.market] = _Need(
            before.most + use.most * each, before.needed + use.needed * each
        )
    wrong, short, fine, notes = [], [], [], list[Note]()
    for (family, market), need in needs.items():
        code = family.spot if market == "spot" else family.on_demand
        try:
            has = _quota(client, code)
        except Note as note:  # another one may still be too small
            notes.append(note)
            continue
        line = f"{family.name} {market}: {has:.0f} vCPUs, the recipe needs {need.needed}"
        line += f", the file allows {need.most} ({code})"
        (wrong if has < need.needed else short if has < need.most else fine).append(line)
    ask = "ask for more: console, Service Quotas, Amazon EC2, by the code; it takes hours to days"
    if wrong:
        raise Wrong("; ".join(wrong), "as many vCPUs as the recipe needs", ask)
    if notes:
        raise notes[0]
    if short or unknown:
        said = short + [f"of {name} no limit is known here" for name in unknown]
        raise Note("; ".join(said), f"it will not grow beyond that; {ask}")
    return "; ".join(fine)


def _quota(client: Any, code: str) -> float:
    try:
        return client.get_service_quota(ServiceCode="ec2", QuotaCode=code)["Quota"]["Value"]
    except (ClientError, BotoCoreError) as error:
        raise Note(
            f"{code} cannot be asked for: {reason(error)}",
            "look in the console, Service Quotas, Amazon EC2; the right is "
            "servicequotas:GetServiceQuota",
        ) from error
