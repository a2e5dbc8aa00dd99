"""`ygx train` on a small random model: resumed, interrupted, refused before anything is loaded; rows by number."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from templates.stock import tokenizer_for
from test_chats import CHATML
from tiny import llama

from ygivenx.commands.config import TrainConfig
from ygivenx.commands.finetune import Precision, _resuming, finetune, precision_of, refuse_lone_ranks
from ygivenx.disk import locked
from ygivenx.errors import CheckpointError, ConfigError, LossError
from ygivenx.training import checkpoint

DATED = "{{ strftime_now('%H:%M:%S.%f') }}" + CHATML


def model_in(directory: Path, template: str = CHATML) -> str:
    tokenizer = tokenizer_for("x", template + "<|im_start|><|im_end|>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    llama(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id).save_pretrained(directory)
    return str(directory)


def rows_in(path: Path, count: int = 6, bad: int = 0) -> str:
    """`bad` rows that are quarantined, then `count` that aren't."""
    good = [{"question": f"What is {i}+{i}?", "answer": f"It is {2 * i}."} for i in range(count)]
    path.write_text("".join(json.dumps(r) + "\n" for r in [{"question": 4, "answer": 4}] * bad + good))
    return str(path)


@pytest.fixture
def settings(tmp_path):
    return {
        "data": rows_in(tmp_path / "rows.jsonl"), "model": model_in(tmp_path / "model"), "max_tokens": 64,
        "output_dir": str(tmp_path / "run"), "save_steps": 1, "logging_steps": 1, "learning_rate": 1e-3,
    }  # fmt: skip


def train(settings, **changed):
    """(what finetune returns, what it says on its console)."""
    said = io.StringIO()
    told = finetune(TrainConfig.of(None, settings | changed), Console(file=said, width=200))
    return told, said.getvalue()


def weights(settings, step):
    return (Path(settings["output_dir"]) / f"checkpoint-{step}" / "model.safetensors").read_bytes()


def test_a_run_goes_on_where_it_was_cut_off_and_then_says_that_it_is_done(settings, tmp_path):
    constant = settings | {"lr_scheduler": "constant", "output_dir": str(tmp_path / "other")}
    train(constant, max_steps=1)
    longer, said = train(constant, max_steps=2, resume="auto")
    assert f"going on from {tmp_path / 'other' / 'checkpoint-1'} (step 1 of 2)" in said
    assert "attention: one sequence plain, sequences that share nothing blocks, forest blocks" in said
    assert (longer["steps"], len(longer["losses"])) == (2, 2)
    again, said = train(constant, max_steps=2, resume="auto")
    assert "(step 2 of 2)" in said
    assert again["losses"] == longer["losses"]
    assert again["loss"] != again["loss"]  # NaN, null in JSON: nothing was trained


def test_a_run_in_a_used_directory_is_refused_before_anything_is_loaded(settings):
    train(settings, max_steps=1)
    with pytest.raises(CheckpointError, match="checkpoint-1"):
        train(settings, max_steps=1, model="no such model", data="no such data")


def test_what_is_longer_than_the_model_reads_is_said(settings, tmp_path):
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"question": "hi " * 300, "answer": "ho " * 300}))
    _, said = train(settings, data=str(long), max_steps=1)
    assert "1 sequence beyond the 512 tokens that the model was made for" in said
    assert "warning" not in train(settings, output_dir=str(tmp_path / "other"), max_steps=1)[1]


def test_a_checkpoint_is_hashed_once(settings, monkeypatch):
    train(settings, max_steps=1, lr_scheduler="constant")
    hashed, verify = [], checkpoint.verify
    monkeypatch.setattr(checkpoint, "verify", lambda path: (hashed.append(path.name), verify(path)))
    train(settings, max_steps=2, lr_scheduler="constant", resume="auto")
    assert hashed == ["checkpoint-1"]


@pytest.mark.parametrize("inside", ["", "deeper/"])
def test_an_output_directory_that_cannot_be_is_refused_before_anything_is_loaded(settings, tmp_path, inside):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(ConfigError, match=r"taken.*: the output directory can't be written to"):
        train(
            settings, output_dir=str(tmp_path / "taken" / inside), model="no such model", data="no such data"
        )


def test_the_time_that_a_template_writes_is_that_of_the_run(settings, tmp_path, capsys):
    dated = settings | {"model": model_in(tmp_path / "dated", DATED), "lr_scheduler": "constant"}
    train(dated, max_steps=1)
    assert "the chat template writes the time" in capsys.readouterr().err
    told, _ = train(
        dated, max_steps=2, resume="auto"
    )  # microseconds later: other tokens but for the run's time
    assert told["steps"] == 2
    with pytest.raises(CheckpointError, match="packs changed"):
        train(dated, max_steps=2, resume="auto", encoder={"now": "2024-01-01"})


def test_a_run_on_a_base_of_which_one_weight_differs_is_refused(settings, tmp_path):
    train(settings, max_steps=1, lr_scheduler="constant")
    path = tmp_path / "model/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1  # one bit of the last weight
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"base_weights .* changed"):
        train(settings, max_steps=2, lr_scheduler="constant", resume="auto")
    data[-3] ^= 1
    path.write_bytes(data)
    assert train(settings, max_steps=2, lr_scheduler="constant", resume="auto")[0]["steps"] == 2


def test_rows_are_called_by_their_numbers_in_the_file(settings, tmp_path):
    data = rows_in(tmp_path / "some.jsonl", count=2, bad=3)
    told, _ = train(settings, data=data, max_steps=1)
    assert (told["read"], told["quarantined"]) == (5, 3)
    page = (Path(settings["output_dir"]) / "report.html").read_text()
    assert '"title":"row 3"' in page
    assert '"title":"row 0"' not in page
    (reason, count), *none = told["reasons"].items()
    assert (count, none) == (3, [])
    assert f'"rows":[["{reason}",3]]' in page
    assert '"verdict":"loss: ' in page
    assert "; 3 of 5 rows left out" in page


def test_a_loss_that_is_not_finite_names_the_row_and_gives_the_cursor_back(settings, tmp_path):
    data = rows_in(tmp_path / "some.jsonl", count=1, bad=2)
    said = io.StringIO()
    config = TrainConfig.of(None, settings | {"data": data, "max_steps": 40, "learning_rate": 1e30})
    with pytest.raises(LossError, match="in row 2"):
        finetune(config, Console(file=said, width=200, force_terminal=True))
    assert said.getvalue().count("\x1b[?25l") == said.getvalue().count("\x1b[?25h") > 0


def test_held_out_rows_are_needed_where_they_are_asked_for(settings, tmp_path):
    none = rows_in(tmp_path / "none.jsonl", count=0, bad=2)
    with pytest.raises(ConfigError, match=r"none\.jsonl: no row was accepted"):
        train(settings, eval_data=none)
    told, _ = train(settings, max_steps=1, eval_data=settings["data"], eval_limit=2, eval_steps=1)
    assert told["after"]["eval_loss"] > 0


def test_a_split_is_chosen(settings, tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra datasets is not installed")
    made = {
        name: datasets.Dataset.from_list([{"question": f"{i}?", "answer": "4"} for i in range(n)])
        for name, n in (("train", 3), ("test", 2))
    }
    datasets.DatasetDict(made).save_to_disk(tmp_path / "both")
    both = str(tmp_path / "both")
    told, _ = train(settings, data=both, split="train", eval_data=both, eval_split="test", max_steps=1)
    assert told["read"] == 3
    assert told["after"]["eval_loss"] > 0
    with pytest.raises(ValueError, match=r"--split"):
        train(settings, data=both, output_dir=str(tmp_path / "b"))


@pytest.mark.parametrize(
    ("dtype", "weights", "bf16"),
    [("float32", "float32", False), ("bf16", "float32", True), ("bfloat16", "bfloat16", False)],
)
def test_a_dtype_says_what_weights_and_products_are(dtype, weights, bf16):
    assert precision_of(dtype) == Precision(weights, bf16=bf16)


@pytest.mark.parametrize("has_products", [True, False])
def test_products_are_bfloat16_where_the_machine_has_them(monkeypatch, has_products):
    monkeypatch.setattr("ygivenx.commands.finetune.multiplies_bfloat16", lambda: has_products)
    assert precision_of("auto") == Precision("float32", bf16=has_products)


@pytest.mark.parametrize("dtype", ["fp16", "float16"])
def test_float16_without_a_gpu_is_refused_before_anything_is_loaded(settings, dtype):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match=rf"--dtype {dtype} needs a GPU(.|\n)*--dtype auto"):
        train(settings, dtype=dtype, model="no such model", data="no such data")


def test_cut_rows_are_counted(settings, tmp_path, capsys):
    told, _ = train(settings, max_length=24, overflow="truncate", max_steps=1)
    assert told["accepted"] == sum(told["notes"].values()) == 6
    assert "6  accepted with a note, such as row 0: " in capsys.readouterr().err


def test_quarantined_rows_are_written_down(settings, tmp_path):
    data, file = rows_in(tmp_path / "some.jsonl", count=2, bad=3), tmp_path / "deep" / "bad.jsonl"
    told, _ = train(settings, data=data, max_steps=1, quarantine=str(file))
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(records) == told["quarantined"] == 3
    assert records[0]["row"] == {"question": 4, "answer": 4}
    assert {"reason", "where", "message"} < set(records[0])


def test_two_runs_do_not_write_into_one_directory(settings):
    Path(settings["output_dir"]).mkdir()
    with (
        locked(Path(settings["output_dir"]) / "training", "ygx train"),
        pytest.raises(ConfigError, match=rf"another process \(id {os.getpid()}\) is writing there"),
    ):
        train(settings, max_steps=1)
    assert train(settings, max_steps=1)[0]["steps"] == 1


def test_what_transformers_refuses_is_an_error_of_ours(settings):
    with pytest.raises(ConfigError, match=r"transformers refuses these settings(.|\n)*sgdd"):
        train(settings, optim="sgdd")


def test_a_logger_that_is_not_installed_is_an_error_of_ours(settings):
    with pytest.raises(ConfigError, match="comet_ml can't be reported to"):
        train(settings, report_to="comet_ml")


def test_ranks_are_one_run(settings, tmp_path):
    """torchrun, as people start it: two ranks, one writer, the losses of one process."""
    one, _ = train(settings, max_steps=2, dtype="float32", gradient_accumulation_steps=2)
    out = str(tmp_path / "ranks")
    options = [f"--{k.replace('_', '-')}={v}" for k, v in (settings | {"output_dir": out}).items()]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "ygivenx", "train"]
    done = subprocess.run(
        [sys.executable, *launch, *options, "--max-steps=2", "--dtype=float32", "--json"],
        capture_output=True, text=True, check=False, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads(done.stdout)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert done.stderr.count("accepted + 0 quarantined") == 1
    checkpoint.verify(Path(out) / "checkpoint-2")


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes were started, and accelerate found 1"):
        refuse_lone_ranks(SimpleNamespace(world_size=1))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_default_run_that_is_interrupted_can_be_gone_on_with(settings, number):
    del settings["save_steps"]
    options = [f"--{k.replace('_', '-')}={v}" for k, v in settings.items()]
    process = subprocess.Popen(
        [sys.executable, "-m", "ygivenx", "train", *options, "--max-steps=100000"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if line.startswith("step "):
            process.send_signal(number)
            break
    said += process.communicate(timeout=120)[1]
    assert process.returncode == 128 + number, said
    assert "Traceback" not in said
    last = checkpoint.newest(Path(settings["output_dir"]))
    assert f"this goes on from {last}: ygx " in " ".join(said.split())


def test_a_run_goes_on_by_its_own_command(monkeypatch):
    argv = ["/x/ygx", "train", "a b.yaml", "--resume", "auto", "--lora=4"]
    assert _resuming(argv) == "ygx train 'a b.yaml' --lora=4 --resume auto"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert _resuming(["x", "train"]) == "torchrun --nproc_per_node 2 -m ygivenx train --resume auto"


def test_ctrl_c_says_where_it_goes_on(settings):
    options = [f"--{k.replace('_', '-')}={v}" for k, v in settings.items()]
    command = [
        sys.executable,
        "-m",
        "ygivenx",
        "train",
        *options,
        "--max-steps=100000",
        "--save-total-limit=1",
    ]
    run_dir = Path(settings["output_dir"])
    # Where the tests run in the background, SIGINT would be ignored there, too.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while process.poll() is None and not checkpoint.listed(run_dir):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    said = stderr.decode()
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert f"this goes on from {checkpoint.newest(run_dir)}: ygx " in " ".join(said.split())
