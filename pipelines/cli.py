"""The command line: recipes and flags go through one parser to the commands.

A recipe's YAML becomes flags before the command line's own, so a typo gets the same answer in both.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.metadata import version

import tyro
from rich.markup import escape

from droppos.errors import ConfigError, DropposError
from pipelines import recipe_file
from pipelines.commands import backbones, clusters, data, proofs, records, training
from pipelines.commands.speech import console

DESCRIPTION = "Pre-train vision transformers on your own pictures with DropPos."

COMMANDS = {
    "demo": proofs.demo,
    "demo-search": proofs.demo_search,
    "drill": proofs.drill,
    "evidence": proofs.evidence,
    "prepare": data.prepare,
    "pretrain": training.pretrain,
    "resume": training.resume,
    "runs": records.runs,
    "sync": records.sync,
    "search": training.search,
    "export": backbones.export,
    "evaluate": backbones.evaluate,
    "look": backbones.look,
    "finetune": backbones.finetune,
    "report": records.report,
    "doctor": data.doctor,
    "plan": clusters.plan,
    "audit": data.audit,
    "receipt": records.receipt,
    "register": backbones.register,
    "launch": clusters.launch,
    "attach": clusters.attach,
    "stop": clusters.stop,
    "down": clusters.down,
    "watch-spot": clusters.watch_spot,
}


def main(argv: list[str] | None = None) -> None:
    """Run a sub-command; an error meant for a person is printed without a traceback."""
    quiet()
    argv = sys.argv[1:] if argv is None else argv
    if argv == ["--version"]:
        print(f"droppos {version('droppos')}")
        return
    try:
        if argv:
            _refuse_unknown(argv[0])
        flags = with_recipe(argv)
        with _recipe_named(argv if flags != argv else []):
            if flags and flags[0] in COMMANDS:  # alone, or a typo is looked up in all of them
                tyro.cli(COMMANDS[flags[0]], prog=f"droppos {flags[0]}", args=flags[1:])
            else:
                run = tyro.extras.subcommand_cli_from_dict
                run(COMMANDS, prog="droppos", description=DESCRIPTION, args=flags)
    except DropposError as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(1)
    except (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        if error.filename is None:
            raise
        said = f"{error.filename} cannot be used: {error.strerror}; name another place"
        console.print(f"[bold red]error:[/] {escape(said)}", soft_wrap=True, highlight=False)
        sys.exit(1)
    except BrokenPipeError:  # whoever read the output has had enough, as `| head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        console.print("interrupted")
        sys.exit(130)


def _refuse_unknown(command: str) -> None:
    """Suggest the command that was meant.

    Raises:
        ConfigError: If there is one that is nearly called so.
    """
    if command not in COMMANDS and (near := get_close_matches(command, COMMANDS, 1)):
        raise ConfigError(f"there is no command {command}; did you mean {near[0]}?")


@contextmanager
def _recipe_named(argv: list[str]) -> Iterator[None]:
    """Add to the parser's complaint that the flag may stand in a file, as a field."""
    try:
        yield
    except SystemExit as error:
        if error.code == 2 and len(argv) > 1 and not argv[1].startswith("-"):
            console.print(f"the recipe {escape(argv[1])} is read as flags, too: look there as well")
        raise


def with_recipe(argv: list[str]) -> list[str]:
    """Put a recipe's fields, as flags, before the command line's own; the last one counts."""
    match argv:
        case [
            ("pretrain" | "search" | "drill" | "plan" | "launch") as command,
            name,
            *rest,
        ] if name[:1] != "-":
            return [command, *recipe_file.flags(recipe_file.read(name)), *rest]
        case [("demo" | "demo-search" | "drill") as command, *rest]:
            name = command.replace("-", "_")
            return [command, *recipe_file.flags(recipe_file.read(name)), *rest]
    return argv


def quiet() -> None:
    """Keep other projects' notices off the screen; warnings and errors of ours stay."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for name in ("ray.train", "ray.data", "ray.tune", "py.warnings"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
