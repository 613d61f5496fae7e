"""The token that Ray asks of everyone who talks to a cluster.

It is found where Ray itself looks: RAY_AUTH_TOKEN, the file of RAY_AUTH_TOKEN_PATH, or
~/.ray/auth_token. Whoever holds it may run anything on the cluster, so it is read just before it is
sent, and nothing here prints or keeps it.
"""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from droppos.errors import ConfigError

BYTES = 32
"""Random bytes of a token."""


def token_file() -> Path:
    """Where the token is kept on this machine."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()


def read_token() -> str | None:
    """Read the token of this machine; None if there is none."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    try:
        return token_file().read_text().strip() or None
    except FileNotFoundError:
        return None


def ensure_token_file() -> str:
    """Make the file if it is missing, readable by its owner only.

    Returns:
        What was found or done, for a person.

    Raises:
        ConfigError: If others may read it, or requests would be sent with another token.
    """
    path, own = token_file(), os.environ.get("RAY_AUTH_TOKEN", "").strip()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Made with its mode, not changed to it afterwards: nobody can have opened it meanwhile.
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(own or secrets.token_hex(BYTES))
        return f"{path}, made just now"
    if not path.read_text().strip():
        raise ConfigError(f"{path} is empty; remove it, and it will be made anew")
    if own and own != path.read_text().strip():
        raise ConfigError(
            f"RAY_AUTH_TOKEN, which counts for requests, is another token than {path}, which the "
            "cluster gets; unset it, or write it there"
        )
    if mode := path.stat().st_mode & 0o077:
        raise ConfigError(f"{path} may be read by others (mode ...{mode:02o}); chmod 600 {path}")
    return str(path)


def headers(token: str | None) -> Mapping[str, str]:
    """Say who asks, in HTTP."""
    return {} if token is None else {"Authorization": f"Bearer {token}"}
