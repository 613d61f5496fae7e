"""How many pictures a core delivers in a second: our stream beside the usual ways, in one run.

    make bench-ingest                                  # about ten minutes on two cores
    python -m tests.benchmarks.ingest --rounds 1 --only floor,ours

Each contender runs in a process of its own, one after another and round after round, so that a
machine whose speed drifts wrongs none. It prints a mark after its warm-up and one at its end;
this process then adds up the CPU seconds of the contender and of all processes below it (Ray's
daemons and workers, DataLoader's workers). The S3 server is not among them: it stands for the
object store. Start-up is told apart.

The pictures are like ImageNet's: 500 x 375 tiles of large photographs, JPEG quality 97, without
chroma subsampling, the more detailed half of all tiles.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import psutil
from rich.console import Console
from rich.table import Table

from pipelines.local_s3 import S3Server, s3_server
from tests.benchmarks import contenders
from tests.benchmarks.tiles import write_tiles

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Result:
    """One run of one contender."""

    per_core_s: float
    """Pictures per CPU second of all its processes, after the warm-up."""
    per_s: float
    """Pictures per second of the clock."""
    start_s: float
    """CPU seconds before the warm-up's end: imports, processes, first pictures."""


def main() -> None:
    """Run all contenders, print a table and one line that sums it up."""
    names = list(contenders.CONTENDERS)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", type=lambda text: text.split(","), default=names)
    parser.add_argument("--pictures", type=int, default=2048, help="distinct tiles")
    parser.add_argument("--photographs", type=Path, help="folder of large JPEGs to cut tiles from")
    parser.add_argument("--table", type=Path, default=ROOT / "droppos-runs" / "bench-ingest.csv")
    options = parser.parse_args()

    results: dict[str, list[Result]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, server(Path(folder)) as s3:
        sources = write_tiles(Path(folder) / "tiles", options.pictures, options.photographs)
        print(f"pictures: {sources}", flush=True)
        contenders.prepare(Path(folder), s3)
        for number in range(options.rounds):
            for name in options.only:
                result = run(name, Path(folder), s3)
                results[name].append(result)
                print(
                    f"round {number + 1} {name}: {result.per_core_s:.0f} a core-second", flush=True
                )
        difference = contenders.difference_from_pillow(Path(folder))
    show(results, options.table)
    print(summary(results, difference))


@contextmanager
def server(folder: Path) -> Iterator[S3Server]:
    """Start the S3 server, and point this process and its children at it."""
    with s3_server(folder / "s3") as s3:
        os.environ |= s3.env
        yield s3


def run(name: str, folder: Path, s3: S3Server) -> Result:
    """Run a contender once and measure it between its two marks."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.benchmarks.contenders",
        name,
        str(folder),
    ]
    environment = {**os.environ, **s3.env, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=ROOT,
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        marks = []
        for line in child.stdout:
            if line.startswith("MARK "):
                marks.append((int(line.split()[1]), perf_counter(), cpu_seconds(child.pid)))
                if len(marks) == 2:
                    break
        child.stdin.close()
        child.stdout.read()
    if len(marks) != 2:
        sys.exit(f"contender {name} ended with {child.returncode}, without its two marks")
    (n1, t1, c1), (n2, t2, c2) = marks
    return Result((n2 - n1) / (c2 - c1), (n2 - n1) / (t2 - t1), c1)


def cpu_seconds(pid: int) -> float:
    """Add up user and system time of a process, of all below it, and of those that ended."""
    total = 0.0
    top = psutil.Process(pid)
    for process in [top, *top.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def show(results: dict[str, list[Result]], table: Path) -> None:
    """Print medians with least and most, and write every run to a table."""
    shown = Table("contender", "pictures per core-second", "per second", "start-up, CPU s")
    table.parent.mkdir(parents=True, exist_ok=True)
    with table.open("w") as file:
        file.write("contender,round,per_core_second,per_second,startup_cpu_s\n")
        for name, runs in results.items():
            rates = [run.per_core_s for run in runs]
            shown.add_row(
                f"{name}: {contenders.CONTENDERS[name].says}",
                f"{median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f})",
                f"{median(run.per_s for run in runs):.0f}",
                f"{median(run.start_s for run in runs):.1f}",
            )
            for number, each in enumerate(runs, 1):
                row = (each.per_core_s, each.per_s, each.start_s)
                file.write(f"{name},{number}," + ",".join(f"{x:.2f}" for x in row) + "\n")
    Console().print(shown)
    print(f"every run: {table}")


def summary(results: dict[str, list[Result]], difference: float) -> str:
    """Sum it up in one line of ratios, each the median over rounds of the two in one round."""

    def ratio(one: str, other: str) -> float:
        if one not in results or other not in results:
            return float("nan")
        pairs = zip(results[one], results[other], strict=True)
        return median(a.per_core_s / b.per_core_s for a, b in pairs)

    return (
        f"ingest vs_torchvision={ratio('ours', 'torchvision'):.2f} "
        f"vs_read_images={ratio('ours', 'read_images'):.2f} "
        f"overhead={ratio('floor', 'ours') - 1:.3f} "
        f"prepared_vs_torchvision={ratio('prepared', 'torchvision'):.2f} "
        f"s3_vs_folder={ratio('s3', 'ours'):.2f} "
        f"float32_vs_torchvision={ratio('float32', 'torchvision'):.2f} "
        f"diff={difference:.3f}"
    )


if __name__ == "__main__":
    main()
