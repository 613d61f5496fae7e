"""What a machine costs an hour: asked of AWS, else from the catalogue that comes with droppos."""

import json
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any, NamedTuple

from botocore.exceptions import BotoCoreError, ClientError

from pipelines import instances
from pipelines.launch.quotas import Market

PRICE_LIST = "us-east-1"
"""Region that answers for the price list of all regions."""


class Price(NamedTuple):
    """US dollars an hour, and who said so when."""

    dollars: float | None
    source: str


def spot_price(client: Any, machine: str, zones: Iterable[str]) -> Price:
    """Take the dearest of the zones now, for nobody knows in which one a machine will come.

    Args:
        client: boto3's, of EC2.
        machine: Its type.
        zones: Where it may be.
    """

    def ask() -> Price:
        found = client.describe_spot_price_history(
            InstanceTypes=[machine],
            ProductDescriptions=["Linux/UNIX"],
            StartTime=datetime.now(UTC),  # which gives the one in force
        )["SpotPriceHistory"]
        wanted = set(zones)
        dearest = max(
            (each for each in found if each["AvailabilityZone"] in wanted),
            key=lambda each: float(each["SpotPrice"]),
        )
        when = dearest["Timestamp"].strftime("%Y-%m-%d")
        return Price(
            float(dearest["SpotPrice"]), f"spot price in {dearest['AvailabilityZone']}, {when}"
        )

    return _or_catalogue(ask, machine, "spot")


def on_demand_price(client: Any, machine: str, region: str) -> Price:
    """Take the list price of a region.

    Args:
        client: boto3's, of the price list.
        machine: Its type.
        region: Where it is.
    """

    def ask() -> Price:
        fields = {
            "instanceType": machine,
            "regionCode": region,
            "operatingSystem": "Linux",
            "preInstalledSw": "NA",
            "tenancy": "Shared",
            "capacitystatus": "Used",
        }
        found = client.get_products(
            ServiceCode="AmazonEC2",
            Filters=[{"Type": "TERM_MATCH", "Field": k, "Value": v} for k, v in fields.items()],
        )["PriceList"]
        offers = json.loads(found[0])
        (term,) = list(offers["terms"]["OnDemand"].values())[:1]
        (dimension,) = list(term["priceDimensions"].values())[:1]
        return Price(
            float(dimension["pricePerUnit"]["USD"]),
            f"AWS price list, {offers['publicationDate'][:10]}",
        )

    return _or_catalogue(ask, machine, "on demand")


def _or_catalogue(ask: Callable[[], Price], machine: str, market: Market) -> Price:
    """Ask AWS; take the catalogue where it does not answer, or has no such offer."""
    try:
        return ask()
    except (ClientError, BotoCoreError, LookupError, ValueError, TypeError):
        pass
    known = instances.catalogue().get(machine)
    if known is None:
        return Price(None, "neither AWS nor the catalogue could tell")
    dollars = known.spot if market == "spot" else known.on_demand
    typical = "typical, " if market == "spot" else ""
    return Price(dollars, f"catalogue, {typical}us-east-1, {known.priced}")
