"""The ledger: MLflow's record of a run, kept by one writer, that never holds a step up.

One run is one MLflow run; the run's folder names it, and it is found again by the tag
`droppos.home`. What is logged goes to a journal on this machine's disk first, and from there to
MLflow in batches by a thread of its own, now or when the server is back (:mod:`pipelines.outbox`).
A step that MLflow has already is not logged twice, so a run that resumes, or goes back to a
checkpoint, leaves the same history as one that did not.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from types import TracebackType
from typing import TYPE_CHECKING, Self

from droppos.errors import ConfigError, DataError, StorageError
from pipelines.history import Logged
from pipelines.journal import (
    About,
    Artifact,
    Ended,
    Entry,
    Journal,
    Names,
    Row,
    Status,
    journals,
    next_writer,
    now_ms,
)
from pipelines.outbox import Outbox, last_steps, writer_of
from pipelines.provenance import packages, provenance
from pipelines.recipe import Recipe
from pipelines.recipe_file import flatten, to_yaml
from pipelines.secrets import redact, redact_uris
from pipelines.storage import Place, open_place
from pipelines.tracking import (
    active_run,
    client_of,
    experiment_id,
    local_folder,
    reachable,
    tracking_uri,
)

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

    from pipelines.checkpoints import Saved

HOME = "droppos.home"
"""Tag by which a run is found again."""
CHANGED = "changed."
"""Beginning of the tag of a field that was changed when the run was resumed."""
POINTER = "mlflow.json"
"""File of a run's folder that names its MLflow run."""

_PARAM_CHARS, _TAG_CHARS = 6000, 8000
"""MLflow's limits (mlflow.utils.validation)."""

_log = logging.getLogger(__name__)


def fields_of(params: Mapping[str, str], tags: Mapping[str, str]) -> dict[str, str]:
    """Give a recipe's fields as MLflow has them, with what resumes made of them."""
    changed = {
        name.removeprefix(CHANGED): value
        for name, value in tags.items()
        if name.startswith(CHANGED)
    }
    return {**params, **changed}


class Ledger:
    """One MLflow run, from `with` to the end of its block.

    Leaving the block sends what is left, for a bounded time, and sets the run's status: an
    exception is FAILED, Ctrl-C is KILLED, all else FINISHED.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        run_name: str,
        home: str,
        spool: Path,
        *,
        resume: bool = False,
        parent_run: str | None = None,
        patience_s: float = 60,
    ) -> None:
        """Describe the run; nothing is asked of MLflow yet.

        Args:
            uri: Tracking server or database.
            experiment: MLflow experiment, made when missing.
            run_name: Name shown in MLflow.
            home: URI of the run's folder; with `resume`, its newest MLflow run goes on.
            spool: Folder of this machine for the journal.
            resume: Go on with the run of this home, if there is one.
            parent_run: Id of the MLflow run this one is a trial of.
            patience_s: Seconds to go on sending at the end, before what is left stays in the
                journal.
        """
        self.uri = uri
        self.experiment = experiment
        self.run_name = run_name
        self.home = redact_uris(home)
        self.spool = spool
        self.resume = resume
        self.parent_run = parent_run
        self.patience_s = patience_s
        self.run_id = ""
        """MLflow's id of the run, once entered."""
        self._place = open_place(home)
        self._ended = False
        self._journal: Journal
        self._outbox: Outbox
        self.reached = False
        """Whether MLflow answered at the start, so that what it has of the run is known."""
        self._params: dict[str, str] | None = None
        """Fields as MLflow has them, or will have them, changes included."""
        self._last: dict[str, int] = {}
        self._values: dict[str, float] = {}

    @classmethod
    @contextmanager
    def open(
        cls,
        recipe: Recipe,
        manifest: str,
        *,
        resume: bool = True,
        parent_run: str | None = None,
    ) -> Iterator[Self]:
        """Keep the ledger of a recipe's run: its fields, the code's versions, the data's digest.

        Args:
            recipe: The run.
            manifest: Digest of the data's manifest.
            resume: Go on with the MLflow run of this home, if there is one.
            parent_run: Id of the MLflow run this one is a trial of.
        """
        ledger = cls(
            tracking_uri(recipe),
            recipe.tracking.experiment,
            recipe.run.name,
            open_place(recipe.home).uri,
            local_folder(recipe) / "spool",
            resume=resume,
            parent_run=parent_run,
        )
        with ledger:
            ledger.describe(recipe, {**provenance(), "data.manifest": manifest})
            ledger.text("recipe.yaml", to_yaml(recipe))
            ledger.text("packages.txt", packages())
            yield ledger

    def __enter__(self) -> Self:
        """Find or make the run.

        What is logged is whole in the end but for what only the driver knows (cost, machines,
        skipped pictures): with its disk that goes, while metrics of the workers are in storage.

        A resumed run whose MLflow is away goes on, if it has been there before.

        Raises:
            ConfigError: If MLflow cannot be reached, within about 15 s.
        """
        known = self._known() if self.resume else {}
        client, run = self._reach(known)
        before = known.get("writer", "")
        if run is None:
            self.run_id = known["run_id"]
        else:
            self.run_id = run.info.run_id
            self.reached = True
            self._params = fields_of(run.data.params, run.data.tags)
            self._last, self._values = last_steps(run), dict(run.data.metrics)
            before = max(before, writer_of(run))
        about = About(redact(self.uri), self.run_id, self.run_name, self.home, next_writer(before))
        self._point(about)
        self._journal = self._begin_journal(about)
        self._outbox = Outbox(client, self._journal)
        self._adopt()
        self._outbox.start()
        return self

    def _reach(self, known: Mapping[str, str]) -> "tuple[MlflowClient, Run | None]":
        try:
            with reachable(self.uri):
                client = client_of(self.uri)
                experiment = experiment_id(client, self.uri, self.experiment)
                run = self._find(client, experiment, known) if self.resume else None
                if run is None:
                    tags = self._own_tags
                    run = client.create_run(experiment, run_name=self.run_name, tags=tags)
                else:
                    self._go_on(client, run)
                return client, run
        except ConfigError as error:
            if known.get("uri") != redact(self.uri):
                raise
            _log.warning("%s. The run goes on, and what it logs waits in %s", error, self.spool)
            return client_of(self.uri), None

    def _known(self) -> dict[str, str]:
        """Read which MLflow run the folder names: its own, unless the folder is a copy.

        Raises:
            StorageError: If storage cannot be asked: another MLflow run would be begun.
        """
        known = pointer(self._place)
        was = known.get("home", self.home)
        if was == self.home or (not self._place.is_s3 and _same_folder(was, self.home)):
            return known
        try:
            moved = pointer(open_place(was)).get("run_id") != known["run_id"]
        except (ConfigError, StorageError):
            moved = False  # two runs that both go on in one curve would spoil it
        if moved:
            return known
        _log.warning(
            "%s is a copy of %s, whose MLflow run is that one's: this one begins another",
            *(self.home, was),
        )
        return {"uri": "", "run_id": "", "writer": known["writer"]}

    def _go_on(self, client: "MlflowClient", run: "Run") -> None:
        """Have MLflow say that a run goes on, and where, if its folder has moved."""
        moved = run.data.tags.get(HOME, self.home) != self.home
        name = self.run_name if moved else None
        client.update_run(run.info.run_id, status="RUNNING", name=name)
        if moved:
            client.set_tag(run.info.run_id, HOME, self.home)

    def _point(self, about: About) -> None:
        """Have the run's folder name the MLflow run, for a start while the server is away."""
        record = {
            "uri": about.uri,
            "run_id": about.run_id,
            "writer": about.writer,
            "home": about.home,  # whoever finds this elsewhere knows that it was moved or copied
        }
        try:
            (self._place / POINTER).write_bytes(json.dumps(record, indent=1).encode() + b"\n")
        except DataError as error:
            _log.warning("%s was not written: %s", self._place / POINTER, error)

    def _begin_journal(self, about: About) -> Journal:
        try:
            return Journal.create(self.spool, about)
        except OSError as error:  # a container's working folder may be read-only
            spool = Path(mkdtemp(prefix="droppos-spool-"))
            _log.warning("%s cannot be written (%s); taking %s", self.spool, error, spool)
            self.spool = spool
            return Journal.create(spool, about)

    def _adopt(self) -> None:
        """Take over what earlier processes of this machine did not get to MLflow."""
        for path in journals(self.spool, self.run_id):
            try:
                left = None if path == self._journal.path else Journal.adopt(path)
            except DataError as error:
                _log.warning("%s", error)
                continue
            if left is None:
                continue
            for entry, end in left.pending(2**31):
                if isinstance(entry, Row):
                    self.log(entry.step, entry.values, entry.time_ms)
                elif not isinstance(entry, Ended):  # it has not ended: it goes on here
                    if isinstance(entry, Names) and self._params is not None:
                        self._params |= entry.params
                    self._put(entry)
                left.take(end)
            left.close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Send what is left and end the run."""
        if not self._ended:
            killed = kind is not None and issubclass(kind, KeyboardInterrupt)
            self.finish("KILLED" if killed else "FAILED" if kind else "FINISHED")

    @property
    def away(self) -> bool:
        """Whether MLflow does not answer at the moment; what is logged waits for it."""
        return self._outbox.failing

    def last_step(self, name: str) -> int:
        """Give the highest step of a metric that is known to be logged; -1 when there is none."""
        return self._last.get(name, -1)

    def last_value(self, name: str) -> float | None:
        """Give the value of a metric that was logged last; None if that is not known."""
        return self._values.get(name)

    def describe(self, recipe: Recipe, tags: Mapping[str, str]) -> None:
        """Record every field of a recipe, and tags: `provenance`, digests.

        MLflow never changes a parameter; what a resumed run changed is a tag `changed.<field>`.
        """
        fields = {
            name: _cut(redact(str(value)), _PARAM_CHARS) for name, value in flatten(recipe).items()
        }
        # With a server that was away at the start, they are those of an earlier start.
        known = fields if self._params is None else self._params
        changed = {
            f"{CHANGED}{name}": value
            for name, value in fields.items()
            if known.get(name, value) != value
        }
        new = {name: value for name, value in fields.items() if name not in known}
        self._params = {**known, **fields}
        self.tag({**tags, **changed}, new)

    def tag(self, tags: Mapping[str, str], params: Mapping[str, str] | None = None) -> None:
        """Record tags; a later value takes an earlier one's place."""
        safe = {name: _cut(redact(value), _TAG_CHARS) for name, value in tags.items()}
        self._put(Names(params or {}, safe))

    def log(self, step: int, values: Mapping[str, float], time_ms: int | None = None) -> None:
        """Record metrics of a step, named with their units; at once, whatever the server does.

        Values of a step that a metric has already, or has passed, are left out.

        Args:
            step: Optimizer step.
            values: By name.
            time_ms: When it was, in milliseconds since 1970; now when not given.
        """
        new = {name: float(value) for name, value in values.items() if step > self.last_step(name)}
        if new:
            self._last |= dict.fromkeys(new, step)
            self._values |= new
            self._put(Row(step, now_ms() if time_ms is None else time_ms, new))

    def replay(self, rows: Iterator[Logged]) -> None:
        """Record what storage has of the run's past, where MLflow lacks it."""
        for row in rows:
            self.log(row.step, row.values, row.time_ms)

    def picture(self, path: Path, name: str) -> None:
        """Keep a file as artifact `name`, such as `pictures/reassembly.png`."""
        try:
            self._put(Artifact(name, path.read_bytes()))
        except OSError as error:
            _log.warning("MLflow will not have %s: %s cannot be read (%s)", name, path, error)

    def text(self, name: str, text: str) -> None:
        """Keep a text as artifact `name`; a later one takes its place."""
        self._put(Artifact(name, redact(text).encode()))

    def checkpoint(self, saved: "Saved") -> None:
        """Record where a checkpoint is, its size, and the hash of its last file."""
        pointer = {
            "uri": redact(saved.uri),
            "step": saved.step,
            "bytes": saved.size,
            "complete_sha256": saved.sha256,
        }
        self.tag({f"droppos.checkpoint.{name}": str(value) for name, value in pointer.items()})
        self.text(f"checkpoints/{saved.place.name}.json", json.dumps(pointer, indent=1))

    def finish(self, status: Status) -> None:
        """Send what is left, for at most the patience, and set how the run ended."""
        self._ended = True
        self._put(Ended(status, now_ms()))
        self._outbox.close(self.patience_s)
        if left := self._journal.left():
            why = (
                "another process has taken the run over"
                if self._outbox.superseded
                else f"MLflow at {redact(self.uri)} did not take it in time"
            )
            _log.warning(
                "%d entries of run %s stay in %s: %s; `droppos sync %s` sends what MLflow lacks",
                *(left, self.run_name, self._journal.path, why, self.spool),
            )
        self._journal.close()

    def _put(self, entry: Entry) -> None:
        self._journal.append(entry)
        self._outbox.notify()

    @property
    def _own_tags(self) -> dict[str, str]:
        nested = {"mlflow.parentRunId": self.parent_run} if self.parent_run else {}
        return {HOME: self.home, **nested}

    def _find(
        self, client: "MlflowClient", experiment: str, known: Mapping[str, str]
    ) -> "Run | None":
        if "run_id" in known:
            if not known["run_id"]:  # see `begin_anew`
                return None
            if run := active_run(client, known["run_id"]):
                return run  # otherwise it was deleted, or this is another server than before
        return newest_run(client, experiment, self.home)


def pointer(home: Place) -> dict[str, str]:
    """Read which MLflow run a run's folder names, and where the folder was; nothing if none.

    Raises:
        StorageError: If storage cannot be asked: another MLflow run would be begun.
    """
    try:
        found = json.loads((home / POINTER).read_bytes())
        known = {name: found[name] for name in ("uri", "run_id", "writer")}
        if "home" in found:  # an older droppos did not write it
            known["home"] = found["home"]
        return known
    except StorageError:
        raise
    except (DataError, ValueError, KeyError, TypeError):
        return {}


def begin_anew(home: Place) -> None:
    """Have a run's next start make another MLflow run: it goes on from another run's weights.

    Raises:
        DataError: If storage refuses.
    """
    record = {"uri": "", "run_id": "", "writer": pointer(home).get("writer", "")}
    (home / POINTER).write_bytes(json.dumps(record, indent=1).encode() + b"\n")


def _same_folder(one: str, other: str) -> bool:
    """Tell whether two paths lead to one folder, by a link or another mount."""
    try:
        return Path(one).samefile(other)
    except OSError:
        return False


def newest_run(client: "MlflowClient", experiment: str, home: str) -> "Run | None":
    """Find the newest MLflow run of a run's folder."""
    quote = '"' if "'" in home else "'"
    runs = client.search_runs(
        [experiment],
        filter_string=f"tags.`{HOME}` = {quote}{home}{quote}",
        order_by=["attributes.start_time DESC"],
        max_results=1,
    )
    return runs[0] if runs else None


def _cut(text: str, most: int) -> str:
    mark = f" …[{len(text)} characters]"
    return text if len(text) <= most else text[: most - len(mark)] + mark
