"""A cluster that stands, and that somebody else keeps: only its jobs are ours."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from urllib.parse import urlsplit

from droppos.errors import ConfigError
from pipelines.launch.backend import Address, Say
from pipelines.launch.check import Look
from pipelines.launch.cost import Cost
from pipelines.launch.jobs import Jobs
from pipelines.launch.request import check_data
from pipelines.launch.token import headers, private_token
from pipelines.recipe import Recipe
from pipelines.secrets import redact_uris

PORT = 8265
"""Of the jobs API, when not said."""
LOOPBACK = {"localhost", "127.0.0.1", "::1"}


class Standing:
    """Backend of `--on ADDRESS`."""

    mortal = False

    def __init__(self, address: str) -> None:
        """Take its address.

        Raises:
            ConfigError: If it is none of http, or holds a secret, for records would keep it.
        """
        self.url = url_of(address)
        self.where = f"the cluster at {self.url}"
        # Behind localhost may be a tunnel to anywhere. Whoever says localhost and an absolute
        # path is believed: it is how a cluster on this machine is used.
        self.remote = urlsplit(self.url).hostname not in LOOPBACK

    def place(self) -> Mapping[str, str]:
        """Nothing beside its address."""
        return {}

    def looks(self, recipe: Recipe, at_once: int = 1) -> Sequence[Look]:
        """See whether it lets us in, and whether the data are there."""
        return [
            Look("jobs API", self._answers),
            Look("data", partial(check_data, recipe, remote=self.remote), after=("places",)),
        ]

    def _answers(self) -> str:
        with self.address() as address:
            Jobs(address)
        return f"{self.url} answers" + ("" if address.headers else ", without a token")

    def adapted(self, recipe: Recipe) -> tuple[Recipe, list[str]]:
        """Leave all to the job, which sees the machines."""
        return recipe, []

    def job_env(self) -> Mapping[str, str]:
        """Nothing that the cluster would not have."""
        return {}

    def cost(self) -> Cost:
        """Leave it to the owner."""
        return Cost(note=f"{self.where} stands already; droppos neither starts nor ends machines")

    def up(self, say: Say) -> None:
        """Find it up."""
        with self.address() as address:
            Jobs(address)

    @contextmanager
    def address(self) -> Iterator[Address]:
        """Go there directly."""
        yield Address(self.url, headers(private_token() if self._wants_token() else None))

    def _wants_token(self) -> bool:
        """Tell whether the token may go there: not unasked to just any host, in clear."""
        asked = os.environ.get("RAY_AUTH_MODE") == "token" or "RAY_AUTH_TOKEN" in os.environ
        return asked or "RAY_AUTH_TOKEN_PATH" in os.environ or not self.remote

    def down(self, say: Say) -> list[str]:
        """End nothing."""
        say(f"{self.where} is not droppos's to end, and stays")
        return []


def url_of(address: str) -> str:
    """Spell an address as a URL: `10.0.0.5`, `10.0.0.5:8265` and `https://ray.example.org` do.

    Raises:
        ConfigError: If it is another kind of address.
    """
    url = address if "://" in address else f"http://{address}"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:  # which may name what stands before the host
        raise ConfigError(
            f"--on has an impossible host or port, got {redact_uris(url)}; write it as "
            f"http://10.0.0.5:{PORT} or http://[::1]:{PORT}"
        ) from error
    if redact_uris(url) != url:
        raise ConfigError(
            f"--on must hold no secret, got {redact_uris(url)}; the token goes into "
            "~/.ray/auth_token, or the file that RAY_AUTH_TOKEN_PATH names"
        )
    plain = parts.scheme in ("http", "https") and not parts.path.strip("/")
    if not plain or not parts.hostname or re.search(r"\s", url):
        raise ConfigError(
            f"--on takes aws, kube, or a cluster's jobs API such as http://10.0.0.5:{PORT}, "
            f"got {address!r}"
        )
    if port is None and parts.scheme == "http":
        url = f"http://{parts.netloc}:{PORT}"
    return url.rstrip("/")
