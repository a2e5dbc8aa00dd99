"""Rows per second and memory of `ygx audit --labels PREPARED`, with the rows and without, on rows of this script's own.

python benchmarks/prepared.py 10000 100000 >> benchmarks/results/prepared.jsonl

For each number of rows, in a process of its own: conversations of two turns and about 300 tokens are encoded, prepared
(half of them packed by four with positions), shuffled and audited, by themselves and against the rows. A row is one
conversation; peak memory is of one audit alone.
"""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WORDS = ("sum first even numbers adds up as each pair makes ten more than", "before so we count them twice")


def conversations(count: int) -> list[dict[str, Any]]:
    """Rows that differ in every text."""
    draw = random.Random(0)

    def text(words: int) -> str:
        return " ".join(draw.choices(" ".join(WORDS).split(), k=words)) + f" {draw.randrange(10**6)}"

    turns = [("user", 40), ("assistant", 80), ("user", 40), ("assistant", 80)]
    return [{"messages": [{"role": r, "content": text(n)} for r, n in turns]} for _ in range(count)]


def prepare(rows: Path, prepared: Path, tokenizer: Path) -> None:
    """What a trainer would have written."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from transformers import AutoTokenizer

    from ygivenx.encoder.encode import Encoder

    encoder = Encoder(AutoTokenizer.from_pretrained(tokenizer))
    made: list[dict[str, list[int]]] = []
    given = [json.loads(line) for line in rows.read_text().splitlines()]
    for start in range(0, len(given), 4096):
        for e in encoder.batch(given[start : start + 4096])[0]:
            n = len(e.ids)
            made.append(
                {
                    "input_ids": e.ids.tolist(),
                    "labels": e.only.labels.tolist(),
                    "position_ids": list(range(n)),
                }
            )
    half = len(made) // 2
    packs = [made[i : i + 4] for i in range(half, len(made), 4)]
    joined = [{k: [t for r in pack for t in r[k]] for k in pack[0]} for pack in packs]
    records = [*made[:half], *joined]
    random.Random(1).shuffle(records)
    pq.write_table(pa.Table.from_pylist(records), prepared)


def audit(rows: str, prepared: str, tokenizer: str, count: int, alone: bool) -> None:
    """Print the figures of one audit; alone: without the rows."""
    from transformers import AutoTokenizer

    from ygivenx import Encoder
    from ygivenx.proof.auditing import audit_prepared
    from ygivenx.proof.prepared import Prepared
    from ygivenx.rows.data import read

    encoder = Encoder(AutoTokenizer.from_pretrained(tokenizer))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, cpu = time.perf_counter(), time.process_time()
    report = audit_prepared(Prepared(prepared), None if alone else read(rows), encoder)
    seconds = time.perf_counter() - start
    summary = report.summary
    told = {
        "audit": "the set alone" if alone else "against the rows",
        "rows": count,
        "prepared rows": summary["prepared rows"],
        "tokens": summary["tokens"],
        "verdict": summary["verdict"],
        "recognised": summary["rows recognised"],
        "seconds": round(seconds, 1),
        "processor seconds": round(time.process_time() - cpu, 1),
        "rows per second": round(count / seconds),
        "memory before, MB": before // 1024,
        "peak memory, MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    print(json.dumps(told), flush=True)


def main(counts: list[int]) -> None:
    from transformers import AutoTokenizer

    from ygivenx.models.resolve import sample_model_path

    with tempfile.TemporaryDirectory() as folder:
        path, gguf_file = sample_model_path()
        AutoTokenizer.from_pretrained(path, gguf_file=gguf_file).save_pretrained(f"{folder}/tokenizer")
        for count in counts:
            rows, prepared = Path(folder) / f"{count}.jsonl", Path(folder) / f"{count}.parquet"
            rows.write_text("\n".join(map(json.dumps, conversations(count))))
            prepare(rows, prepared, Path(folder) / "tokenizer")
            for alone in ("alone", ""):
                arguments = [str(rows), str(prepared), f"{folder}/tokenizer", str(count), alone]
                subprocess.run([sys.executable, __file__, "--audit", *arguments], check=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--audit"]:
        audit(*sys.argv[2:5], int(sys.argv[5]), bool(sys.argv[6]))
    else:
        main([int(n) for n in sys.argv[1:] or ["10000"]])
