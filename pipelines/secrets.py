"""Secrets: what must not reach MLflow, a file or a screen."""

import os
import re
from collections.abc import Iterator

MARK = "***"
SHORTEST = 8
"""Characters of a variable's value to be taken for a secret wherever it stands; a shorter one would
blot out words that mean something else."""

_NAMES = re.compile(
    r"secret|token|passw|pwd|credential|api_?key|access_?key|private_?key|_key$", re.I
)


def redact(text: str) -> str:
    """Blot out what a text holds of secrets.

    These are the values of this process's environment variables whose names say secret, token,
    password or key, and what `redact_uris` finds.
    """
    for value in _in_environment():
        text = text.replace(value, MARK)
    return redact_uris(text)


def redact_uris(text: str) -> str:
    """Blot out user:password@ and token-like query values of every URI; the same everywhere."""
    # A database's password may hold any character.
    text = re.sub(r"(\w*sql\w*(?:\+\w+)?://)\S*@", rf"\1{MARK}@", text)
    text = re.sub(r"(?<=://)[^/?#\s]*@", f"{MARK}@", text)
    secret = r"token|secret|passw|pwd|key|signature|credential|sig\b|auth"
    return re.sub(
        rf"([?&;][^=&;\s]*(?:{secret})[^=&;\s]*=)[^&;#\s]+", rf"\1{MARK}", text, flags=re.I
    )


def _in_environment() -> Iterator[str]:
    for name, value in os.environ.items():
        # A variable that names a file holds no secret itself. os.path: of a value that is too long
        # for a name, Path raises an error, in which the value stands.
        named = _NAMES.search(name) and len(value) >= SHORTEST
        if named and not os.path.exists(value):  # noqa: PTH110
            yield value
