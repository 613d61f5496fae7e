"""Is a receipt true? Everything it says is made again from what can be reached, and compared.

What cannot be reached is told as such: a checkpoint that retention has deleted still has its link
in the chain, data that moved are given by hand, and a receipt alone still shows that its chain
holds together. Whoever can write to the run's folder can make another past with hashes that fit; a
receipt that was handed out before then shows it.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

from droppos.errors import DataError, StorageError
from pipelines import chain
from pipelines.chain import PREVIOUS, Link
from pipelines.check import Check, differences
from pipelines.checkpoints import COMPLETE, FOLDER
from pipelines.receipt import Receipt, described, digest
from pipelines.receipt_data import data_checks
from pipelines.receipt_files import checkpoint_checks, export_checks
from pipelines.storage import Place, open_place


def verify(
    receipt: Receipt,
    *,
    run: str | None = None,
    data: str | None = None,
    backbone: str | None = None,
    shards: bool = True,
) -> list[Check]:
    """Compare a receipt with all that can be reached.

    Args:
        receipt: As :func:`pipelines.receipt.load` gives it.
        run: Folder of the run, if it is not where the receipt says.
        data: Prepared data set, likewise.
        backbone: Folder of the export that the receipt is for.
        shards: Read the whole data set, and hash its shards again.

    Raises:
        DataError: If the receipt lacks something that every receipt has.
    """
    try:
        home = open_place(run or receipt["run"]["home"])
        where = data or receipt["recipe"]["data.path"]
        return list(_checks(receipt, home, where, backbone, shards))
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"the receipt is damaged ({error!r}): something in it is missing or of another kind"
        ) from error


def _checks(
    receipt: Receipt, home: Place, data: str, backbone: str | None, shards: bool
) -> Iterator[Check]:
    yield _itself(receipt)
    yield from _holds_together(receipt)
    links = yield from _links(receipt, home)
    if links and links[-1] is not None:
        yield from _follows(receipt, links)
    folder = home / FOLDER / f"step-{receipt['checkpoint']['step']:08d}"
    whole = yield from checkpoint_checks(receipt["checkpoint"], folder)
    yield from data_checks(receipt["data"], data, shards)
    yield from export_checks(receipt.get("backbone"), backbone, folder if whole else None)
    yield _code_here(receipt)


def _itself(receipt: Receipt) -> Check:
    said, found = receipt["sha256"], digest(receipt)
    if said == found:
        return Check("receipt", "ok", "has its own hash")
    return Check("receipt", "differs", f"its own hash: expected {said}, found {found}")


def _holds_together(receipt: Receipt) -> Iterator[Check]:
    """Look whether each checkpoint of the receipt names the one before it."""
    entries, what = receipt["chain"], "chain in the receipt"
    broken = False
    for before, after in zip([None, *entries], entries, strict=False):
        if before is None and PREVIOUS not in after:
            yield Check(what, "not reachable", f"nothing is told before step {after['step']}")
            continue
        expected = after[PREVIOUS]
        found = before and {"step": before["step"], "sha256": before["sha256"]}
        if expected != found:
            broken = True
            yield Check(
                f"chain, before step {after['step']}",
                "differs",
                f"expected {_named(expected)}, found {_named(found)}",
            )
    newest = receipt["checkpoint"]
    if entries[-1]["sha256"] != newest["sha256"]:
        broken = True
        yield Check(
            "chain, its end", "differs", f"expected {_named(newest)}, found {_named(entries[-1])}"
        )
    if not broken:
        first, last = entries[0]["step"], entries[-1]["step"]
        yield Check(what, "ok", f"{len(entries)} checkpoints, step {first} to {last}")


def _named(link: Mapping[str, Any] | None) -> str:
    return "no checkpoint" if link is None else f"step {link['step']} ({link['sha256'][:12]})"


def _links(receipt: Receipt, home: Place) -> Generator[Check, None, list[Link | None]]:
    """Read every link in the run's folder.

    Returns:
        Each, None for one that is missing or was changed; empty if the folder cannot be reached.
    """
    what = "chain in the run's folder"
    links: list[Link | None] = []
    try:
        if not home.exists():
            yield Check(what, "not reachable", f"there is no {home}; name the run with --run")
            return []
        for told in receipt["chain"]:
            try:
                links.append(_link(home, told))
            except StorageError:
                raise
            except DataError as error:
                links.append(None)
                yield Check(f"chain, step {told['step']}", "differs", str(error))
    except StorageError as error:
        yield Check(what, "not reachable", str(error))
        return []
    if None not in links:
        yield Check(what, "ok", f"{len(links)} links, each with its hash")
    return links


def _link(home: Place, told: Receipt) -> Link:
    if PREVIOUS in told:
        return chain.read(home, told["step"], told["sha256"])
    # An older droppos kept no link: what it was stands in the checkpoint only.
    link = Link.of((home / FOLDER / f"step-{told['step']:08d}" / COMPLETE).read_bytes())
    if link.sha256 != told["sha256"]:
        raise DataError(f"expected sha256 {told['sha256']}, found {link.sha256}")
    return link


def _follows(receipt: Receipt, links: Sequence[Link | None]) -> Iterator[Check]:
    """Compare what the receipt tells with what follows from the run's own records.

    Args:
        receipt: All of it.
        links: Each of its checkpoints', the last of which is there.
    """
    made = described([link for link in links if link is not None])
    told = zip(receipt["chain"], links, strict=True)
    said = {
        **receipt,
        "chain": [entry for entry, link in told if link is not None],
        "data": {name: receipt["data"].get(name) for name in made["data"]},
    }
    if None in links:
        del made["code"]  # which speaks of all of them
    for name, found in made.items():
        differing = list(differences(name, said[name], found))
        yield from differing or [Check(name, "ok", "as the run's records have it")]


def _code_here(receipt: Receipt) -> Check:
    from pipelines.provenance import REVISION, provenance

    here, there = provenance().get(REVISION), receipt["code"][-1].get(REVISION)
    what = "code revision here"
    if here is None or there is None:
        whose = "this droppos" if here is None else "the run's"
        return Check(what, "note", f"{whose} was installed without a checkout: it has no revision")
    same = "the run's" if here == there else f"another than the run's {there[:12]}"
    return Check(what, "ok" if here == there else "note", f"{here[:12]}, {same}")
