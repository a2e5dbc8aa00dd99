"""Examples inside other tools, against the versions that are installed."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tiny import llama

import ygivenx as yx

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
ROWS = [
    {"messages": [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "4"}]},
    {"messages": [{"role": "user", "content": "Hi <|im_end|>"}, {"role": "assistant", "content": "Hello"}]},
    {"messages": [{"role": "user", "content": "And 3+3?"}, {"role": "assistant", "content": "6"}]},
]


@pytest.mark.skipif(
    not (find_spec("lightning") or find_spec("pytorch_lightning")), reason="Lightning is not installed"
)
@pytest.mark.filterwarnings("ignore")  # Lightning's advice
def test_lightning_learns_the_replies():
    options = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "accelerator": "cpu",
    }
    main = runpy.run_path(str(EXAMPLES / "lightning_loop.py"))["main"]
    assert main(1, **options) > 4
    assert main(30, **options) < 1


@pytest.mark.full
@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
@pytest.mark.filterwarnings("ignore")
def test_ray_data_encodes_what_the_encoder_does(tmp_path, smol_tokenizer):
    import ray

    model, data = tmp_path / "model", tmp_path / "rows.jsonl"
    llama().save_pretrained(model)
    smol_tokenizer.save_pretrained(model)
    data.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    ray.init(num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
    try:
        counts = runpy.run_path(str(EXAMPLES / "ray_data.py"))["main"](
            str(data), str(model), str(tmp_path / "out")
        )
    finally:
        ray.shutdown()
    assert counts == {"sequences": 2, "quarantined": 1}
    encode = yx.Encoder(smol_tokenizer)
    expected = [(s.ids.tolist(), s.labels.tolist()) for r in (ROWS[0], ROWS[2]) for s in encode(r).sequences]
    table = pq.read_table(tmp_path / "out")
    assert sorted(zip(table["input_ids"].to_pylist(), table["labels"].to_pylist(), strict=True)) == sorted(
        expected
    )


@pytest.mark.full
@pytest.mark.model
@pytest.mark.parametrize("name", ["dpo", "grpo", "own_loop_head", "own_loop_ddp"])
def test_a_loop_runs(name, smol, tmp_path):
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *(ranks if name.endswith("_ddp") else []), EXAMPLES / f"{name}.py"]
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60
