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
    """Read the token of this machine; None if there is none.

    Raises:
        ConfigError: If what is there can be no token.
    """
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return _one_word(token, "RAY_AUTH_TOKEN")
    path = token_file()
    return (_one_word(_text(path), str(path)) or None) if path.exists() else None


def private_token() -> str | None:
    """Read the token of this machine, unless others on it may do so, too.

    Raises:
        ConfigError: If they may, or what is there can be no token.
    """
    path = token_file()
    if "RAY_AUTH_TOKEN" not in os.environ and path.exists():
        _check_private(path)
    return read_token()


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
    token = _one_word(_text(path), str(path))
    if not token:
        raise ConfigError(f"{path} is empty; remove it, and it will be made anew")
    if own and own != token:
        raise ConfigError(
            f"RAY_AUTH_TOKEN, which counts for requests, is another token than {path}, which the "
            "cluster gets; unset it, or write it there"
        )
    _check_private(path)
    return str(path)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise ConfigError(
            f"the token's file {path} cannot be read ({error.strerror}); name the file itself in "
            "RAY_AUTH_TOKEN_PATH, or mend its rights"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"the token's file {path} holds no text, expected {2 * BYTES} characters of one line; "
            "put the cluster's token there, or name its file in RAY_AUTH_TOKEN_PATH"
        ) from error


def _one_word(text: str, place: str) -> str:
    """Take a token without the space around it; its value is in no error."""
    token = text.strip()
    # A header of HTTP takes nothing else, and a client tries it again for minutes.
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise ConfigError(
            f"{place} holds no token: {len(text.split())} words on {len(text.splitlines())} lines, "
            "expected one of plain letters and digits; put the cluster's token there, and no more"
        )
    return token


def _check_private(path: Path) -> None:
    if mode := path.stat().st_mode & 0o077:
        raise ConfigError(f"{path} may be read by others (mode ...{mode:02o}); chmod 600 {path}")


def headers(token: str | None) -> Mapping[str, str]:
    """Say who asks, in HTTP."""
    return {} if token is None else {"Authorization": f"Bearer {token}"}
