"""The working directory that is sent with a job: the clone one is in, without what must stay.

It is packed here and not by Ray, for three reasons: Ray leaves out what git ignores, but neither
.git nor a .env that git does not ignore; it tells of a folder that is too large only after the
machines are paid for; and the recipe is sent along as one file, wherever it stood.
"""

import hashlib
import subprocess
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from droppos.errors import ConfigError

LIMIT = 100 * 2**20
"""Bytes of the packed folder that Ray takes."""
NEVER = (
    *(".git", ".venv", "venv", "droppos-runs", "__pycache__"),
    *(".env", ".env.*", ".envrc", "*.pem", "*.key", "id_rsa", "id_ecdsa", "id_ed25519"),
    *(".aws", ".azure", ".boto", ".docker", ".droppos", ".gnupg", ".kube", "kubeconfig", ".mlflow"),
    *(".ray", ".s3cfg", ".ssh"),
    *(".git-credentials", ".netrc", ".npmrc", ".pgpass", ".pypirc"),
)
"""Names of files and folders that stay here, whatever git says: history, environments, secrets."""
LARGEST = 3
"""Files that are named when there is too much."""
_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Package:
    """A folder, packed."""

    file: Path
    files: int
    size: int
    """Bytes."""
    digest: str
    """SHA-256 of it: the same files give the same package."""

    def __str__(self) -> str:
        return f"{self.files} files, {self.size / 2**20:.1f} MiB"


def top_of(folder: Path) -> Path:
    """Find the clone that a folder is in; the folder itself if it is in none."""
    found = _git(folder, "rev-parse", "--show-toplevel")
    return Path(found.strip()) if found else folder


def files_of(top: Path) -> list[Path]:
    """List what is sent, relative to the top.

    What git has or would take; where there is no git, all but names with a dot before them, which
    is how tools call what they keep for themselves.
    """
    listed = _git(top, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    names = _walk(top) if listed is None else map(Path, filter(None, listed.split("\0")))
    return sorted({name for name in names if (top / name).is_file() and not _stays(name)})


def pack(top: Path, to: Path, also: Mapping[str, str]) -> Package:
    """Pack the folder.

    Args:
        top: The folder.
        to: Zip to write.
        also: Files that are put beside its own: name and text.

    Raises:
        ConfigError: If it is too large, with its largest files; or the home folder, or around it.
    """
    if Path.home().resolve().is_relative_to(top.resolve()):
        raise ConfigError(
            f"the working directory {top} has all your files, and it would be sent; "
            "go into the clone, or into a folder with nothing but what the job needs"
        )
    names = files_of(top)
    sizes = {name: (top / name).stat().st_size for name in names}
    # A folder of data is not worth packing to find out: nothing compresses to a tenth of that.
    if sum(sizes.values()) > 10 * LIMIT:
        raise ConfigError(_too_large(top, sum(sizes.values()), "MiB", sizes))
    with zipfile.ZipFile(to, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            _put(archive, name.as_posix(), (top / name).read_bytes(), (top / name).stat().st_mode)
        for name, text in also.items():
            _put(archive, name, text.encode(), 0o644)
        packed = {Path(entry.filename): entry.compress_size for entry in archive.infolist()}
    size = to.stat().st_size
    if size > LIMIT:
        to.unlink()
        raise ConfigError(_too_large(top, size, "MiB packed", packed))
    digest = hashlib.sha256(to.read_bytes()).hexdigest()
    return Package(to, len(names) + len(also), size, digest)


def _put(archive: zipfile.ZipFile, name: str, data: bytes, mode: int) -> None:
    # One date for all, or the same files would make another package each time.
    entry = zipfile.ZipInfo(name, _EPOCH)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = (mode & 0o777) << 16
    archive.writestr(entry, data)


def _too_large(top: Path, size: int, unit: str, sizes: Mapping[Path, int]) -> str:
    largest = sorted(sizes, key=lambda name: -sizes[name])[:LARGEST]
    named = ", ".join(f"{name} ({sizes[name] / 2**20:.0f} MiB)" for name in largest)
    return (
        f"the working directory {top} has {size / 2**20:.0f} {unit}, and a job takes "
        f"{LIMIT // 2**20}; the largest are {named}; put what the job does not need into "
        ".gitignore, and data into s3://"
    )


def _stays(name: Path) -> bool:
    return any(fnmatch(part, pattern) for part in name.parts for pattern in NEVER)


def _walk(top: Path, below: Path = Path()) -> Iterator[Path]:
    """List a folder that is in no clone, without going into what stays anyway."""
    for entry in (top / below).iterdir():
        name = below / entry.name
        if entry.name.startswith(".") or _stays(name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            yield from _walk(top, name)
        else:
            yield name


def _git(folder: Path, *command: str) -> str | None:
    """Ask git; None if there is none, or the folder is in no clone."""
    try:
        done = subprocess.run(["git", "-C", folder, *command], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None
