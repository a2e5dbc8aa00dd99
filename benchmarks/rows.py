"""Memory of a run before its first step, by the number of its rows.

    python benchmarks/rows.py GSM8K.jsonl --rows 100000 300000 --model sample

Writes rows (questions and answers of GSM8K, each made another by a number in front of the question), starts `ygx train`
on them with an empty cache and samples the resident memory of it and of its processes until the first step begins;
then once more with what the first run kept. RssAnon is what the run itself holds; RSS counts pages of mapped files,
too, which the system takes back when it needs them.

    python benchmarks/rows.py GSM8K.jsonl --kept 1000000 --folder BIG

puts so many encoded rows into the cache without encoding them (2,000 rows of GSM8K, each made another by three tokens),
unless the folder has them already, and measures the run that finds them there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

import psutil

from ygivenx import Encoder, encoded
from ygivenx.commands import encoding
from ygivenx.commands.config import DataSection
from ygivenx.commands.inputs import Account
from ygivenx.rows.data import read
from ygivenx.sequence import Example, Sequence

GIB = 2**30
BEGUN = "sequences in"  # the line behind which the run's first step begins


def write_rows(source: Path, target: Path, count: int) -> None:
    """`count` different rows."""
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    with target.open("w") as file:
        for n, row in enumerate(islice(cycle(rows), count)):
            file.write(json.dumps({**row, "question": f"{n}. {row['question']}"}) + "\n")


def memory(process: psutil.Process) -> tuple[int, int, int]:
    """(RSS of the process, its anonymous part, RSS of it and its children), bytes."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
    own, anonymous = (int(status[key].split()[0]) * 1024 for key in ("VmRSS", "RssAnon"))
    children = 0
    for child in process.children(recursive=True):
        try:
            children += child.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return own, anonymous, own + children


def measured(command: list[str]) -> dict[str, object]:
    """Peaks and a curve of the memory of a command until its first step begins, or its failure."""
    began, curve = time.perf_counter(), []
    with tempfile.TemporaryFile("w+") as said, subprocess.Popen(command, stderr=said, stdout=said) as run:
        process = psutil.Process(run.pid)
        while run.poll() is None:
            try:
                curve.append((round(time.perf_counter() - began, 1), *memory(process)))
            except (psutil.NoSuchProcess, FileNotFoundError, KeyError):
                break
            said.seek(0)
            if BEGUN in said.read():
                break
            time.sleep(0.25)
        run.terminate()
        run.wait()
        said.seek(0)
        text = said.read()
    if BEGUN not in text:
        raise SystemExit(text)
    own, anonymous, everything = (max(c[i] for c in curve) for i in (1, 2, 3))
    return {
        "seconds": curve[-1][0],
        "peak_gib": round(own / GIB, 2),
        "peak_anonymous_gib": round(anonymous / GIB, 2),
        "peak_with_processes_gib": round(everything / GIB, 2),
        "curve": curve[:: max(1, len(curve) // 200)],
    }


def write_encoded(source: Path, model: str, count: int, target: Path) -> None:
    """`count` different encoded rows."""
    rows = list(read(source, x="question", y="answer", limit=2000))
    base = [s for example in Encoder.from_pretrained(model).batch(rows)[0] for s in example]

    def sequences() -> Iterator[Example]:
        for i, s in enumerate(islice(cycle(base), count)):
            ids, at = s.ids.copy(), len(s.ids) // 4
            ids[at : at + 3] = [1000 + i % 97, 1000 + i // 97 % 997, 1000 + i // 96_709]
            yield Example((Sequence(ids, s.weights, s.segments),), index=i)

    encoded.write(encoded.tables(sequences()), target)


def keep(source: Path, model: str, count: int, data: Path, cache: Path) -> None:
    """Write rows, and encoded ones into the cache as if they were what `ygx train` has made of them."""
    write_rows(source, data, count)
    options = DataSection(x="question", y="answer", cache=str(cache))
    folder = cache / encoding._key(str(data), options, Encoder.from_pretrained(model))
    folder.mkdir(parents=True)
    write_encoded(source, model, count, folder / encoding.ROWS)
    account = Account(read(data, x="question", y="answer").format, accepted=count)
    (folder / encoding.ACCOUNT).write_text(json.dumps(account.kept()))


def command_of(options: argparse.Namespace, folder: Path, output: str) -> list[str]:
    """One step of `ygx train` on the rows of a folder."""
    return [
        sys.executable, "-m", "ygivenx", "train", "--data", str(folder / "rows.jsonl"), "--x", "question", "--y",
        "answer", "--model", options.model, "--output-dir", str(folder / output), "--max-steps", "1",
        "--cache", str(folder / "cache"), "--processes", str(options.processes),
    ]  # fmt: skip


def svg(results: list[dict[str, object]]) -> str:
    """Curves of memory over time, one a run: RSS of the process and its children."""
    runs = [(f"{r['rows']:,} rows, {r['cache']}", r["curve"]) for r in results]
    most_t = max(c[-1][0] for _, c in runs)
    most_m = max(p[3] for _, c in runs for p in c) / GIB
    lines = []
    for n, (name, curve) in enumerate(runs):
        points = " ".join(
            f"{60 + 700 * t / most_t:.1f},{360 - 320 * m / GIB / most_m:.1f}" for t, _, _, m in curve
        )
        colour = f"hsl({n * 360 // len(runs)} 70% 40%)"
        lines.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{points}"/>')
        lines.append(f'<text x="560" y="{300 + 16 * n}" fill="{colour}">{name}</text>')
    axes = f'<path d="M60 40V360H760" fill="none" stroke="#888"/><text x="60" y="30">{most_m:.2f} GiB</text>'
    right = f'<text x="760" y="380" text-anchor="end">{most_t:.0f} s</text>'
    body = "".join([axes, right, *lines])
    head = 'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 400" font-family="sans-serif" font-size="12"'
    return f"<svg {head}>{body}</svg>"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="GSM8K as JSON Lines")
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 300_000])
    parser.add_argument("--model", default="sample")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/rows.json"))
    parser.add_argument("--kept", type=int, help="measure with so many rows that are kept already, alone")
    parser.add_argument("--folder", type=Path, help="where the kept rows are, or are put")
    options = parser.parse_args()
    results: list[dict[str, object]] = []
    if options.kept:
        if not (options.folder / "cache").exists():
            keep(
                options.source,
                options.model,
                options.kept,
                options.folder / "rows.jsonl",
                options.folder / "cache",
            )
        command = command_of(options, options.folder, "run")
        results.append({"rows": options.kept, "cache": "encoded before", **measured(command)})
    for count in () if options.kept else options.rows:
        with tempfile.TemporaryDirectory() as folder:
            write_rows(options.source, Path(folder) / "rows.jsonl", count)
            for number, cache in enumerate(("empty cache", "encoded before")):
                command = command_of(options, Path(folder), f"run{number}")
                results.append({"rows": count, "cache": cache, **measured(command)})
    for result in results:
        print({k: v for k, v in result.items() if k != "curve"}, flush=True)
    options.output.write_text(json.dumps(results) + "\n")
    options.output.with_suffix(".svg").write_text(svg(results))


if __name__ == "__main__":
    main()
