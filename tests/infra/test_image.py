"""The container image: what its Dockerfile promises, without building it."""

import re
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "infra" / "image" / "Dockerfile"
EXTRAS = ("server", "export")
"""Optional parts of the project that the image has."""


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions in order, each on one line, comments left out."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    whole = re.sub(r"\\\n", " ", "\n".join(lines))
    split = [line.strip().partition(" ") for line in whole.splitlines() if line.strip()]
    return [(name, rest.strip()) for name, _, rest in split]


def all_of(name: str) -> list[str]:
    return [rest for found, rest in instructions() if found == name]


def project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def locked() -> dict[str, str]:
    """Versions of the lock, by name."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith((" ", "#"))]
    parsed = [re.fullmatch(r"([A-Za-z0-9_.-]+)==(\S+)( ; .*)?", line) for line in pins]
    assert all(parsed), [line for line, match in zip(pins, parsed, strict=True) if not match]
    return {canonicalize_name(match[1]): match[2] for match in parsed if match}


def wanted() -> list[Requirement]:
    """What the project asks for itself, with the image's extras."""
    found = project()
    extras = found["optional-dependencies"]
    texts = [*found["dependencies"], *(text for extra in EXTRAS for text in extras[extra])]
    return [Requirement(text) for text in texts]


def test_the_base_is_an_exact_version_of_a_python_that_the_project_takes() -> None:
    assert set(all_of("FROM")) == {"${BASE} AS build", "${BASE}"}
    (base,) = [rest for rest in all_of("ARG") if rest.startswith("BASE=")]
    version = re.search(r"python:(\d+\.\d+\.\d+)-slim-\w+$", base)
    assert version is not None
    assert version[1] in SpecifierSet(project()["requires-python"])


def test_every_file_it_copies_is_there_and_reaches_the_builder() -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert next(line for line in ignore if not line.startswith("#")) == "*"
    let_through = [line[1:] for line in ignore if line.startswith("!")]
    for copy in all_of("COPY"):
        if copy.startswith("--from=build"):
            continue
        *sources, _ = copy.split()
        for source in sources:
            assert (ROOT / source).exists(), source
            assert source in let_through, source


def test_nothing_secret_reaches_the_builder() -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    let_through = {line[1:] for line in ignore if line.startswith("!")}
    copied = {source for copy in all_of("COPY") for source in copy.split()[:-1]}
    assert let_through - copied == {"infra"}  # without which infra/mlflow would not be seen
    assert "infra/*" in ignore
    assert "**/.env" in ignore


def test_nothing_is_downloaded_but_packages() -> None:
    assert all_of("ADD") == []
    for run in all_of("RUN"):
        assert not re.search(r"https?://|\bcurl\b|\bgit clone\b", run), run


def test_no_secret_is_built_in() -> None:
    for name in ("ARG", "ENV"):
        for rest in all_of(name):
            assert not re.search(r"secret|password|token|access_key", rest, re.I), rest


def test_it_runs_as_nobody_who_may_change_it() -> None:
    names = [name for name, _ in instructions()]
    assert all_of("USER") == ["1000:1000"]
    assert "RUN" not in names[names.index("USER") :]
    assert "COPY" not in names[names.index("USER") :]
    assert not any("--chown" in copy for copy in all_of("COPY"))
    created = " ".join(all_of("RUN"))
    assert "useradd --uid 1000 --gid 1000" in created


def test_signals_reach_what_runs_in_it() -> None:
    assert all_of("ENTRYPOINT") == ['["/usr/bin/tini", "--"]']


def test_it_has_what_ray_calls_by_name() -> None:
    """Ray's launcher copies with rsync over ssh; KubeRay's health checks call bash and wget."""
    (packages,) = [run for run in all_of("RUN") if "apt-get install" in run]
    for program in ("bash", "openssh-client", "rsync", "tini", "wget", "ca-certificates"):
        assert f" {program} " in packages, program
    assert "--no-install-recommends" in packages
    for tool in ("build-essential", "gcc", "git", "sudo"):
        assert f" {tool} " not in packages, tool
    assert "rm -rf /var/lib/apt/lists/*" in packages


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The user's home, made by the Dockerfile's own commands, in a folder in place of the root."""
    (setup,) = [run for run in all_of("RUN") if "useradd" in run]
    commands = [part.strip() for part in setup.split("&&")]
    (user,) = [index for index, part in enumerate(commands) if part.startswith("useradd")]
    assert "--create-home" in commands[user]
    # Everything in the home is the user's, whatever was made before.
    assert commands[-1] == "chown -R ray:ray /home/ray"
    for folder in ("etc/profile.d", "home/ray", "opt/venv/bin"):
        (tmp_path / folder).mkdir(parents=True)
    moved = [
        re.sub(r"/(?=etc/|home/|opt/)", f"{tmp_path}/", part) for part in commands[user + 1 : -1]
    ]
    subprocess.run(["bash", "-ec", "\n".join(moved)], check=True)
    (tmp_path / "opt/venv/bin/ray").write_text("#!/bin/sh\necho of the image\n")
    (tmp_path / "opt/venv/bin/ray").chmod(0o755)
    return tmp_path / "home/ray"


def said(home: Path, *shell: str) -> str:
    """What a shell says on the image's files; it starts with nothing of this one's environment."""
    env = {"HOME": str(home), "PATH": "/usr/bin:/bin"}
    # In a session of its own, an interactive shell can't take this one's terminal.
    done = subprocess.run(
        shell, env=env, capture_output=True, text=True, check=True, start_new_session=True
    )
    return done.stdout.strip()


def test_rays_launcher_finds_ray(home: Path) -> None:
    """Exactly as it calls it; the login shell sets a PATH of its own first."""
    command = "source ~/.bashrc; export OMP_NUM_THREADS=1; ray --version"
    assert said(home, "bash", "--login", "-c", "-i", command) == "of the image"


def test_a_login_shell_finds_ray(home: Path) -> None:
    (profile,) = (home.parents[1] / "etc/profile.d").iterdir()
    assert said(home, "sh", "-c", f". {profile}; ray --version") == "of the image"


def test_a_plain_process_finds_ray() -> None:
    (env,) = all_of("ENV")
    assert " PATH=/opt/venv/bin:" in f" {env}"


def test_rays_launcher_is_told_where_home_is() -> None:
    """It mounts the token there, and reads only what the image itself says."""
    (env,) = all_of("ENV")
    assert "HOME=/home/ray" in env.split()


def test_the_tokens_folder_is_there_before_docker_mounts_into_it(home: Path) -> None:
    assert (home / ".ray").is_dir()
    assert list((home / ".ray").iterdir()) == []


def test_dependencies_are_installed_by_the_lock_and_never_built() -> None:
    (install,) = [run for run in all_of("RUN") if "--requirements" in run]
    for option in (
        *("--constraint /src/requirements.lock", "--requirements /src/pyproject.toml"),
        *("--no-build", "--torch-backend=cpu", *(f"--extra {extra}" for extra in EXTRAS)),
    ):
        assert option in install, option
    assert any(re.fullmatch(r"UV=\d+\.\d+\.\d+", rest) for rest in all_of("ARG"))


@pytest.mark.parametrize("asked", wanted(), ids=lambda asked: asked.name)
def test_the_lock_has_all_that_the_project_asks_for(asked: Requirement) -> None:
    assert locked()[canonicalize_name(asked.name)] in asked.specifier


def test_no_dependency_of_a_dependency_is_left_to_chance() -> None:
    lock, seen, waiting = locked(), set(), wanted()
    while waiting:
        asked = waiting.pop()
        name = canonicalize_name(asked.name)
        if (name, *asked.extras) in seen:
            continue
        seen.add((name, *asked.extras))
        assert name in lock, name
        try:
            texts = requires(name) or []
        except PackageNotFoundError:  # of another platform, or not installed here
            continue
        for text in texts:
            inner = Requirement(text)
            chosen = [{"extra": extra} for extra in ("", *asked.extras)]
            if inner.marker is None or any(inner.marker.evaluate(one) for one in chosen):
                waiting.append(inner)
    assert len(seen) > 100
