"""What a launch does around its cluster: look, ask, take back, keep record, pack."""

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from droppos.config import Compute, Optim
from droppos.errors import ConfigError, DataError
from pipelines import recipe_file
from pipelines.cli import main, with_recipe
from pipelines.lasting import LastingConsole
from pipelines.launch import cost as costs
from pipelines.launch import flow, folder, jobs, record, request
from pipelines.launch.backend import Address, Say
from pipelines.launch.check import Look, Note, Wrong, look, passed
from pipelines.launch.cost import Cost, Kind
from pipelines.launch.errors import LaunchError, TakenError
from pipelines.launch.on import On
from pipelines.launch.places import found, launch_name, planned
from pipelines.launch.record import Record
from pipelines.launch.request import Request
from pipelines.launch.standing import Standing, url_of
from pipelines.launch.terminal import signals_interrupt, terminal
from pipelines.launch.tunnel import tunnel
from pipelines.local_s3 import S3Server
from pipelines.prepare import prepare
from pipelines.recipe import Data, Recipe, Run, Search, Tracking
from tests.launch_person import Person


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DROPPOS_HOME", str(tmp_path / "home"))
    for name in ("MLFLOW_TRACKING_URI", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "home"


KEYS = (
    ".aws/credentials",
    ".docker/config.json",
    ".git-credentials",
    ".kube/config",
    ".mlflow/credentials",
    ".netrc",
    ".pgpass",
    ".ray/auth_token",
    ".ssh/id_ed25519",
    "deploy/id_rsa",
    "deploy/server.key",
)
"""Where tools keep what opens doors; it comes to lie in clones, too."""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A git clone with what is sent, and with what must stay."""
    top = tmp_path / "clone"
    for name, text in {
        "pipelines/cli.py": "code",
        "notes.txt": "not yet added",
        ".gitignore": "ignored/\n",
        "ignored/data.bin": "x" * 1000,
        ".env": "SECRET=1",
        "infra/.env.prod": "SECRET=1",
        "keys/droppos.pem": "PRIVATE",
        "droppos-runs/mlflow.db": "x",
        ".venv/bin/python": "x",
        **dict.fromkeys(KEYS, "SECRET=1"),
    }.items():
        file = top / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    subprocess.run(["git", "init", "-q", top], check=True)
    # Whoever has added a secret to git is protected all the same.
    subprocess.run(["git", "-C", top, "add", "-f", "pipelines", ".env", "keys"], check=True)
    return top


RECIPE = Recipe(data=Data(path="s3://b/data"), run=Run(name="vit", storage="file:///runs"))

SENT = {".gitignore", "notes.txt", "pipelines/cli.py", request.FILE}


@pytest.mark.parametrize("git", [True, False])
def test_what_git_would_take_is_sent_and_secrets_stay(
    clone: Path, tmp_path: Path, git: bool
) -> None:
    if not git:
        (clone / ".git").rename(tmp_path / "elsewhere")
        (clone / "ignored" / "data.bin").unlink()
    package = folder.pack(clone, tmp_path / "p.zip", Request(recipe=RECIPE).files)
    with zipfile.ZipFile(package.file) as archive:
        assert set(archive.namelist()) == (SENT if git else SENT - {".gitignore"})


def test_a_folder_that_has_the_home_folder_is_not_sent(
    clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(clone))
    for top in (clone, tmp_path):
        with pytest.raises(ConfigError, match="all your files"):
            folder.pack(top, tmp_path / "p.zip", {})
    assert not (tmp_path / "p.zip").exists()
    folder.pack(clone / "pipelines", tmp_path / "p.zip", {})


def test_the_clone_is_sent_from_anywhere_in_it(clone: Path) -> None:
    assert folder.top_of(clone / "pipelines") == clone


def test_the_same_files_make_the_same_package(clone: Path, tmp_path: Path) -> None:
    one = folder.pack(clone, tmp_path / "1.zip", {"x": "1"})
    os.utime(clone / "notes.txt", (1, 1))
    assert folder.pack(clone, tmp_path / "2.zip", {"x": "1"}).digest == one.digest
    assert folder.pack(clone, tmp_path / "3.zip", {"x": "2"}).digest != one.digest


def test_a_folder_that_is_too_large_is_refused_with_its_largest_files(
    clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "LIMIT", 2 * 2**20)
    (clone / "weights.bin").write_bytes(os.urandom(3 * 2**20))
    with pytest.raises(ConfigError, match=r"weights\.bin \(3 MiB\)") as error:
        folder.pack(clone, tmp_path / "p.zip", {})
    assert ".gitignore" in str(error.value) and not (tmp_path / "p.zip").exists()


def test_the_recipe_that_was_checked_is_the_one_that_runs(tmp_path: Path) -> None:
    """It goes as one file: what stood in a file and what was given as flags."""
    changed = replace(RECIPE, compute=Compute(device="cuda"), run=replace(RECIPE.run, workers=4))
    asked = Request(recipe=changed, resume=True, allow_changes=True)
    (tmp_path / request.FILE).write_text(asked.files[request.FILE])
    loaded = recipe_file.from_dict(recipe_file.read(str(tmp_path / request.FILE)))
    assert loaded == changed
    assert asked.entrypoint == (
        "exec python -m pipelines.cli pretrain droppos-launch.yaml --resume --allow-changes"
    )


def test_a_place_that_only_this_machine_sees_is_refused_before_money_is_spent() -> None:
    def places(**data: str | None) -> Recipe:
        return replace(RECIPE, data=replace(RECIPE.data, **data))

    request.check_places(places(holdout="file:///mnt/val"), remote=True)
    with pytest.raises(Wrong, match=r"data\.holdout /data/val.*s3://"):
        request.check_places(places(holdout="/data/val"), remote=True)
    request.check_places(places(holdout="/data/val"), remote=False)
    with pytest.raises(Wrong, match="whole paths"):
        request.check_places(places(holdout="data/val"), remote=False)
    with pytest.raises(Wrong, match="not set"):
        request.check_places(places(path=None), remote=True)
    assert "data" not in request.check_places(places(path=None), remote=True, job="drill")
    with pytest.raises(Wrong, match=r"run\.storage droppos-runs"):
        request.check_places(replace(RECIPE, run=Run()), remote=True)


def test_the_data_are_looked_for_where_this_machine_can(
    s3_env: S3Server, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = f"{s3_env.bucket('launch')}/data"
    prepare(str(photographs), data)

    def looked_for(path: str) -> str:
        return request.check_data(replace(RECIPE, data=Data(path=path)))

    assert looked_for(data) == f"{data}: 72 pictures"
    with pytest.raises(DataError, match="droppos prepare"):
        looked_for(f"{data}-of-another")
    assert "not looked at" in looked_for("file:///data")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    with pytest.raises(Note, match="the cluster may"):
        looked_for(data)


def test_a_run_that_is_there_is_refused_unless_it_is_resumed(tmp_path: Path) -> None:
    recipe = replace(RECIPE, run=Run(name="vit", storage=str(tmp_path)))
    kept = tmp_path / "vit" / "checkpoints" / "step-00000008"
    assert "is new" in request.check_run(Request(recipe=recipe), remote=False)
    kept.mkdir(parents=True)  # one that was not finished is none
    assert "is new" in request.check_run(Request(recipe=recipe), remote=False)
    (kept / "complete.json").touch()
    with pytest.raises(Wrong, match=r"step-00000008.*--resume"):
        request.check_run(Request(recipe=recipe), remote=False)
    for asked in (Request(recipe=recipe, resume=True), Request(recipe=recipe, job="search")):
        assert request.check_run(asked, remote=False) == recipe.home


def test_a_search_is_refused_before_money_is_spent_for_what_would_refuse_it_after(
    photographs: Path, tmp_path: Path
) -> None:
    data = str(tmp_path / "data")
    prepare(str(photographs), data)
    recipe = replace(
        RECIPE,
        optim=Optim(global_batch=12),
        data=Data(path=data, holdout=data),
        run=Run(name="ratios", storage=str(tmp_path)),
        search=Search(space=("method.sigma=grid(0, 1)",), algorithm="grid"),
    )

    def looked(recipe: Recipe, *, resume: bool = False, remote: bool = False) -> str:
        return request.check_search(recipe, resume=resume, remote=remote)

    assert looked(recipe) == "by knn, over method.sigma=grid(0, 1)"
    assert "not looked at" in looked(recipe, remote=True)
    assert not (tmp_path / "ratios").exists()
    with pytest.raises(ConfigError, match=r"data\.holdout is not set"):
        looked(replace(recipe, data=Data(path=data)), remote=True)
    with pytest.raises(ConfigError, match=r"method\.sigmaa"):
        looked(replace(recipe, search=Search(space=("method.sigmaa=grid(0, 1)",))), remote=True)
    (tmp_path / "ratios").mkdir()
    (tmp_path / "ratios" / "search.json").write_text("{}")
    with pytest.raises(ConfigError, match="already has a search; add --resume"):
        looked(recipe)
    with pytest.raises(ConfigError, match="was begun with other settings"):
        looked(recipe, resume=True)


def test_a_recipe_with_a_secret_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEAM_TOKEN", "abcdefghijkl")
    assert request.check_secrets(RECIPE)
    for secret in ("s3://key:secret@b/data", "s3://b/data?token=x", "s3://b/abcdefghijkl"):
        with pytest.raises(Wrong) as error:
            request.check_secrets(replace(RECIPE, data=Data(path=secret)))
        assert "data.path" in str(error.value) and "abcdefghijkl" not in str(error.value)


def test_mlflow_is_told_to_the_job_unless_it_is_local_or_holds_a_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def told(uri: str, recipe: Recipe = RECIPE, **env: str) -> Mapping[str, str]:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        return request.tracking(recipe, env)

    assert told("https://mlflow.example") == {"MLFLOW_TRACKING_URI": "https://mlflow.example"}
    assert told("sqlite:///x.db") == told("http://localhost:5000") == {}
    assert told("https://me:word@mlflow.example") == {}
    assert told("https://mine", MLFLOW_TRACKING_URI="https://teams") == {}
    assert told("https://mine", replace(RECIPE, tracking=Tracking(uri="https://its"))) == {}
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(Note, match="goes with it"):
        request.check_tracking(RECIPE, {}, remote=True)
    local = replace(RECIPE, tracking=Tracking(uri="sqlite:////x.db"))
    with pytest.raises(Wrong, match="that the cluster reaches"):
        request.check_tracking(local, {}, remote=True)


def test_all_is_looked_at_and_what_depends_on_a_failure_is_left_out() -> None:
    def bad() -> str:
        raise Wrong("this", "that", "do")

    def noted() -> str:
        raise Note("so", "mind")

    checks = look(
        [
            Look("a", bad),
            Look("b", lambda: "fine", after=("a",)),
            Look("c", lambda: "fine", after=("b",)),
            Look("d", noted),
            Look("e", lambda: "fine", after=("d",)),
        ]
    )
    assert [check.state for check in checks] == ["wrong", "left out", "left out", "note", "ok"]
    assert not passed(checks) and passed(checks[3:])


@given(
    dollars=st.lists(st.floats(0, 50), min_size=1, max_size=4),
    most=st.lists(st.integers(0, 9), min_size=4, max_size=4),
    total=st.integers(0, 30),
)
def test_at_most_is_no_less_than_any_choice_of_machines(
    dollars: list[float], most: list[int], total: int
) -> None:
    kinds = [
        Kind(name=f"{i}", machine="m", standing=0, most=most[i], dollars=each, source="s")
        for i, each in enumerate(dollars)
    ]
    cost = Cost(kinds, most_machines=total)
    left, chosen = total, 0.0
    for kind in kinds:  # in the file's order: one choice among many
        count = min(kind.most, left)
        chosen, left = chosen + count * (kind.dollars or 0), left - count
    assert cost.most >= chosen - 1e-9
    assert cost.standing == 0 and cost.most <= 50 * total + 1e-9


def test_a_price_that_nobody_knows_is_said_to_be_missing() -> None:
    known = Kind(name="head", machine="m", standing=1, most=1, dollars=0.2, source="s")
    unknown = replace(known, name="gpu", standing=0, dollars=None)
    assert "what gpu cost" in Cost([known, unknown]).line


def test_prices_can_be_read_in_a_terminal_of_eighty_columns() -> None:
    """Once, where a price was found stood in a column two letters wide."""
    catalogue = "catalogue, us-east-1, 2026-09-24"
    head = Kind(
        name="head", machine="m7i.xlarge, on demand", standing=1, most=1, dollars=0.2,
        source=catalogue,
    )  # fmt: skip
    gpu = Kind(
        name="gpu_single", machine="g6e.12xlarge, spot, else on demand", standing=0, most=2,
        dollars=4.1, dearest=10.49, source=f"spot price in us-east-1a, 2006-01-02; {catalogue}",
    )  # fmt: skip
    console = Console(width=80, file=StringIO())
    console.print(costs.table(Cost([head, gpu])))
    assert isinstance(console.file, StringIO)
    lines = console.file.getvalue().splitlines()
    (row,) = [line for line in lines if "gpu_single" in line]
    assert row.endswith("0     2   4.10 to 10.49   20.98  ")
    assert costs.sources(Cost([head, gpu, replace(head, name="decode")])) == [
        f"price of head, decode: {catalogue}",
        f"price of gpu_single: spot price in us-east-1a, 2006-01-02; {catalogue}",
    ]


class Machines:
    """A backend without machines, that tells what was asked of it."""

    where, remote, mortal = "nowhere", True, True

    def __init__(self, *, fails: BaseException | None = None, left: Sequence[str] = ()) -> None:
        self.fails, self.left = fails, list(left)
        self.did: list[str] = []
        self.phase_at_up: str | None = None

    def place(self) -> Mapping[str, str]:
        return {"account": "1", "region": "r"}

    def looks(self, recipe: Recipe, at_once: int = 1) -> Sequence[Look]:
        return [Look("machines", lambda: "some")]

    def adapted(self, recipe: Recipe) -> tuple[Recipe, list[str]]:
        return recipe, []

    def job_env(self) -> Mapping[str, str]:
        return {}

    def cost(self) -> Cost:
        head = Kind(name="head", machine="m", standing=1, most=1, dollars=0.25, source="s")
        return Cost([head])

    def up(self, say: Say) -> None:
        self.did.append("up")
        kept = record.find("vit")
        self.phase_at_up = kept and kept.phase
        if self.fails is not None:
            raise self.fails

    @contextmanager
    def address(self) -> Iterator[Address]:
        raise LaunchError("no way there")
        yield

    def down(self, say: Say) -> list[str]:
        self.did.append("down")
        return self.left


def launch(machines: Machines, person: Person, start: Path, **changes: object) -> int:
    made = replace(Record(name="vit", on="aws"), **changes)
    return flow.launch(Request(recipe=RECIPE), machines, made, person.terminal, start=start)


def test_the_price_is_told_before_the_question_and_no_starts_nothing(clone: Path) -> None:
    machines, person = Machines(), Person(answer=False)
    assert launch(machines, person, clone) == 1
    assert machines.did == [] and record.find("vit") is None
    assert "$0.25 an hour" in person.said[0] and len(person.asked) == 1


def test_nothing_is_asked_while_something_is_wrong(clone: Path) -> None:
    machines, person = Machines(), Person()
    with pytest.raises(ConfigError, match="nothing was spent: places"):
        flow.launch(
            Request(recipe=replace(RECIPE, data=Data(path="/here"))),
            machines,
            Record(name="vit", on="aws"),
            person.terminal,
            start=clone,
        )
    assert machines.did == person.asked == []
    states = {check.what: check.state for check in person.checks}
    assert states["places"] == "wrong" and states["machines"] == "ok"  # all were looked at


@pytest.mark.parametrize(
    "fails", [LaunchError("no capacity"), KeyboardInterrupt(), KeyError("a bug"), None]
)
def test_what_was_started_is_taken_back_if_the_job_is_not_handed_over(
    clone: Path, fails: BaseException | None
) -> None:
    machines, person = Machines(fails=fails), Person()
    with pytest.raises((LaunchError, KeyboardInterrupt, KeyError)):
        launch(machines, person, clone)
    assert machines.did == ["up", "down"]
    assert machines.phase_at_up == "starting"  # written before anything could cost money
    kept = record.find("vit")
    assert kept is not None and kept.phase == "ended" and "$0.25" in kept.costs
    assert kept.place == {"on": "aws", "account": "1", "region": "r"}  # for `down`


@pytest.mark.parametrize("kind", ["terminal", "pipe"])
def test_machines_are_ended_though_nobody_is_left_to_be_told(
    clone: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    end, ours = os.openpty() if kind == "terminal" else os.pipe()
    machines = Machines(fails=KeyboardInterrupt())
    planned = Record(name="vit", on="aws")
    with os.fdopen(ours, "w", closefd=False) as gone, tempfile.TemporaryFile("w") as output:
        monkeypatch.setattr(sys, "stdout", output)  # which rich closes for a broken pipe
        told = terminal(LastingConsole(file=gone), yes=True)
        os.close(end)
        with pytest.raises(KeyboardInterrupt):
            flow.launch(Request(recipe=RECIPE), machines, planned, told, start=clone)
        monkeypatch.setattr(sys, "stdout", gone)
        if kind == "terminal":
            told.show("the job's output")
        else:
            with pytest.raises(BrokenPipeError):  # by which following ends
                told.show("the job's output")
        os.dup2(output.fileno(), ours)  # for what is left in buffers
    os.close(ours)
    assert machines.did == ["up", "down"]
    kept = record.find("vit")
    assert kept is not None and kept.phase == "ended"


def interrupts(number: signal.Signals) -> bool:
    """Tell whether a signal does what Ctrl-C does."""
    try:
        os.kill(os.getpid(), number)
        time.sleep(0.01)
    except KeyboardInterrupt:
        return True
    return False


def test_only_ctrl_c_stops_the_ending_of_machines() -> None:
    heard: list[bool] = []

    class Signalled(Machines):
        def down(self, say: Say) -> list[str]:
            signals = (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)
            heard.extend(interrupts(each) for each in signals)
            return super().down(say)

    begun = record.begin(Record(name="vit", on="aws"))
    with signals_interrupt():
        assert flow.down(begun, Signalled(), Person().terminal) == 0
        assert heard == [False, False, True]
        assert interrupts(signal.SIGHUP)  # heard again
        assert not interrupts(signal.SIGHUP)  # the shell's, after the system's
        assert not interrupts(signal.SIGTERM)


def test_a_signal_that_is_ignored_stays_so_as_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_interrupt():
            assert not interrupts(signal.SIGHUP)
            assert interrupts(signal.SIGTERM)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_cluster_that_is_to_be_kept_stays_even_then(clone: Path) -> None:
    machines, person = Machines(fails=LaunchError("no capacity")), Person()
    with pytest.raises(LaunchError, match="no capacity"):
        launch(machines, person, clone, keep=True)
    assert machines.did == ["up"]
    assert any("droppos down vit" in said for said in person.said)


def test_a_cluster_with_somebodys_job_is_not_taken_back(clone: Path) -> None:
    machines, person = Machines(fails=TakenError("its job is still running")), Person()
    with pytest.raises(TakenError):
        launch(machines, person, clone)
    assert machines.did == ["up"]


def test_a_name_that_has_machines_is_not_launched_again(clone: Path) -> None:
    record.begin(Record(name="vit", on="aws")).at("submitted")
    machines, person = Machines(), Person()
    with pytest.raises(ConfigError, match=r"a launch vit already.*attach.*down"):
        launch(machines, person, clone)
    assert machines.did == [] and person.checks == []


@pytest.mark.parametrize("other", [{"on": "kube"}, {"account": "2"}, {"region": "s"}])
def test_a_launch_elsewhere_does_not_take_a_kept_clusters_name(
    clone: Path, other: Mapping[str, str]
) -> None:
    there = Record(name="vit", on="aws", account="1", region="r", keep=True)
    kept = record.begin(replace(there, **other)).at("up")
    machines, person = Machines(), Person()
    said = rf"{next(iter(other.values()))}.*another place.*droppos down vit"
    with pytest.raises(ConfigError, match=said):
        launch(machines, person, clone)
    assert machines.did == [] and record.find("vit") == kept


def test_down_asks_while_a_job_may_run_and_says_what_is_left() -> None:
    begun = record.begin(Record(name="vit", on="aws")).at("submitted", job="vit")
    no = Person(answer=False)
    machines = Machines(left=["i-1 (running)"])
    assert flow.down(begun, machines, no.terminal) == 1 and machines.did == []
    assert "whether the job vit still runs cannot be asked" in no.asked[0]
    yes = Person()
    assert flow.down(begun, machines, yes.terminal) == 1
    assert "STILL THERE" in yes.said[-1] and "i-1" in yes.said[-1]
    kept = record.find("vit")
    assert kept is not None and kept.phase == "ending"
    machines.left = []
    assert flow.down(kept, machines, yes.terminal) == 0
    assert record.find("vit") == replace(kept, phase="ended")


def test_records_are_their_owners_alone_and_survive_other_versions(home: Path) -> None:
    begun = record.begin(Record(name="vit", on="http://h:8265", keep=True))
    file = begun.file("record.json")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(begun.folder.stat().st_mode) == 0o700
    file.write_text(json.dumps({**json.loads(file.read_text()), "of_tomorrow": 1}))
    assert record.find("vit") == begun
    file.write_text("{")
    with pytest.raises(ConfigError, match=r"record\.json is damaged"):
        record.find("vit")


def test_a_kept_cluster_takes_another_launch_and_an_ended_one_leaves_nothing_behind() -> None:
    begun = record.begin(Record(name="vit", on="aws", keep=True)).at("submitted")
    assert not begun.again
    begun.at("up").file("cluster.yaml").write_text("x")
    again = record.begin(Record(name="vit", on="aws", keep=True))
    assert again.file("cluster.yaml").exists()
    again.at("ended")
    assert not record.begin(Record(name="vit", on="aws")).file("cluster.yaml").exists()


def test_a_launch_is_found_by_its_record_or_by_where_it_is_said_to_be() -> None:
    with pytest.raises(ConfigError, match=r"no launch vit \(it knows of none\)"):
        found("vit", On())
    other, backend = found("vit", On(on="10.0.0.5"))
    assert other.on == "http://10.0.0.5:8265" and isinstance(backend, Standing)
    begun = record.begin(Record(name="vit", on="http://here:8265"))
    assert found("vit", On())[0] == begun
    assert found("vit", On(on="here"))[0] == begun


def test_another_place_than_the_records_is_refused_until_that_launch_has_ended() -> None:
    begun = record.begin(Record(name="vit", on="aws", region="r", account="1", stack="s")).at("up")
    assert found("vit", On(on="aws", region="r", stack="s"))[0] == begun
    for other in (On(on="kube"), On(region="q"), On(stack="droppos"), On(namespace="n")):
        with pytest.raises(ConfigError, match=r"vit .* on aws, account 1, region r, stack s; .*"):
            found("vit", other)
    ended = begun.at("ended")
    elsewhere, _ = found("vit", On(on="kube", namespace="n"))
    assert elsewhere.place == {"on": "kube", "namespace": "n"}
    machines = Machines()
    machines.place = lambda: {}
    assert flow.down(elsewhere, machines, Person().terminal) == 0 and machines.did == ["down"]
    assert record.find("vit") == ended  # its own record is left as it is


def test_what_a_later_launch_wrote_is_left_to_it() -> None:
    earlier = record.begin(Record(name="vit", on="aws")).at("submitted")
    earlier.at("ended")
    later = record.begin(Record(name="vit", on="aws")).at("submitted")
    assert flow.down(earlier, Machines(), Person().terminal) == 0
    assert record.find("vit") == later


@pytest.mark.parametrize("name", ["", "Vit", "a_b", "-a", "a-", "9a", "a" * 51, "a/b"])
def test_an_impossible_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="--name"):
        planned(name, On(on="http://h"), keep=False)


def test_a_runs_name_becomes_a_launchs() -> None:
    assert launch_name("ViT_base.v2 ") == "vit-base-v2"


@pytest.mark.parametrize("address", ["ftp://h", "http://h/path", "http://me:secret@h", "ray://h"])
def test_an_address_that_is_none_of_a_jobs_api_is_refused(address: str) -> None:
    with pytest.raises(ConfigError) as error:
        url_of(address)
    assert "secret" not in str(error.value).replace("hold no secret", "")


def test_the_token_goes_to_a_far_host_only_when_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").touch(mode=0o600)
    (tmp_path / ".ray" / "auth_token").write_text("t" * 64)

    def sent(address: str) -> bool:
        with Standing(address).address() as opened:
            return bool(opened.headers)

    assert sent("localhost") and not sent("10.0.0.5")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert sent("10.0.0.5")
    with Standing("10.0.0.5").address() as opened:
        assert "t" * 64 not in repr(opened)


def test_a_tunnel_whose_program_fails_says_what_it_said(tmp_path: Path) -> None:
    def fails(port: int) -> list[str]:
        return [sys.executable, "-c", "import sys; sys.exit('no route to host')"]

    with (
        pytest.raises(LaunchError, match="no route to host"),
        tunnel(fails, tmp_path / "tunnel.log"),
    ):
        pass


def test_a_tunnel_ends_its_program(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    text = (
        "import os, socket, sys, time\n"
        "held = socket.create_server(('127.0.0.1', int(sys.argv[1])))\n"
        "open(sys.argv[2], 'w').write(str(os.getpid()))\n"
        "time.sleep(60)"
    )
    with tunnel(lambda port: [sys.executable, "-c", text, str(port), str(pid)], tmp_path / "log"):
        while not (pid.exists() and pid.read_text()):
            time.sleep(0.01)
        os.kill(int(pid.read_text()), 0)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


@pytest.mark.parametrize(
    ("job_id", "turn"),
    [("vit", 1), ("vit-2", 2), ("vit-10", 10), ("vit-1", 0), ("vit-02", 0), ("vit-x", 0), ("v", 0)],
)
def test_a_launchs_jobs_are_told_from_others_by_their_names(job_id: str, turn: int) -> None:
    assert jobs._turn("vit", job_id) == turn
    assert turn == 0 or jobs.name_of("vit", turn) == job_id


def test_without_a_terminal_and_without_yes_nothing_starts(
    clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(clone)
    monkeypatch.setattr(Standing, "looks", lambda self, recipe, at_once: [])
    command = ["launch", "demo", "--on", "http://127.0.0.1:9", "--data.path", "/d"]
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "places" in said and "run.storage droppos-runs" in said  # it is looked at first
    with pytest.raises(SystemExit) as ended:
        main([*command, "--run.storage", str(tmp_path)])
    assert ended.value.code == 1
    assert "say --yes" in " ".join(capsys.readouterr().err.split())
    assert record.find("demo") is None


def test_a_launchs_recipe_becomes_flags_as_a_runs_does() -> None:
    assert with_recipe(["launch", "demo", "--keep"])[1:] == [
        *with_recipe(["pretrain", "demo"])[1:],
        "--keep",
    ]
