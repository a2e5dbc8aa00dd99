"""`ygx` end to end: its entry point, called as a shell would."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from unittest.mock import patch

import pytest
from test_finetune import model_in
from tiny import llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner

from ygivenx import __version__
from ygivenx.cli import app, main
from ygivenx.commands import inputs
from ygivenx.commands.config import EncoderSection, ModelOptions
from ygivenx.commands.options import check_options, named_values
from ygivenx.errors import ConfigError

ROWS = [
    {"messages": [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "4"}]},
    {"messages": [{"role": "user", "content": "Hi <|im_end|>"}, {"role": "assistant", "content": "Hello"}]},
    {"messages": [{"content": "no role"}]},
]


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small random model whose template and control tokens are SmolLM2's."""
    return model_in(tmp_path_factory.mktemp("model"))


def ygx(*args: object) -> subprocess.CompletedProcess[str]:
    """In this process, as starting another one takes seconds; `test_a_process` starts one."""
    out, err = io.StringIO(), io.StringIO()
    with (
        redirect_stdout(out), redirect_stderr(err),
        patch.object(sys, "argv", ["ygx", *map(str, args)]), pytest.raises(SystemExit) as end,
    ):  # fmt: skip
        main()
    return subprocess.CompletedProcess(args, int(end.value.code or 0), out.getvalue(), err.getvalue())


def test_each_reason_comes_with_its_first_row(model, tmp_path):
    data = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "What is 2+2?", "chosen": chosen, "rejected": "5"} for chosen in ("4", "four", 4)]
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    done = ygx("train", "--data", data, "--model", model, "--output-dir", tmp_path / "run")
    said = " ".join(done.stderr.split())
    assert f"2 preference_row, such as {data}, row 0 (line 1)" in said
    assert "ygx train --objective dpo" in said
    assert f"1 wrong_type, such as {data}, row 2 (line 3), chosen: int where text belongs" in said


def test_a_conversation_without_a_reply_is_not_scored(model, tmp_path):
    data = tmp_path / "asked.jsonl"
    data.write_text(json.dumps({"messages": ROWS[0]["messages"][:1]}) + "\n")
    done = ygx("score", data, "--model", model, "--json")
    account = json.loads(done.stdout)
    assert (account["accepted"], account["reasons"]) == (0, {"no_reply": 1})
    assert "row 0 (line 1), messages: there is no reply to be scored" in done.stderr


def test_a_process():
    command = [sys.executable, "-m", "ygivenx", "show", "absent.jsonl", "--model", "absent"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "absent" in done.stderr, "Traceback" in done.stderr) == (2, True, False)


@pytest.mark.parametrize("has_products", [True, False])
def test_a_dtype_that_this_cpu_does_not_multiply_is_said(tmp_path, monkeypatch, capsys, has_products):
    llama().save_pretrained(tmp_path)
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    monkeypatch.setattr("ygivenx.head.edges.has_products", lambda dtype: has_products)
    inputs.open_model(ModelOptions(str(tmp_path)), "bfloat16")
    assert ("no products in bfloat16" in capsys.readouterr().err) is not has_products


def test_every_command_has_help_with_an_example():
    names = [c.name or c.callback.__name__ for c in app.registered_commands]
    assert {"demo", "show", "encode", "audit", "probe", "score", "ledger", "train", "doctor"} <= set(names)
    for name in names:
        shown = CliRunner().invoke(app, [name, "--help"])
        assert shown.exit_code == 0
        assert "Example" in shown.output
        assert "--json" in shown.output


def test_show(model, rows):
    done = ygx("show", rows, "--model", model)
    assert done.returncode == 0, done.stderr
    assert "⟦4<|im_end|>⟧" in done.stdout
    assert "messages" in done.stderr


def test_show_refuses_with_place_and_reason(model, rows):
    done = ygx("show", rows, "--model", model, "--row", 1)
    assert done.returncode == 2
    assert "<|im_end|>" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_escape_of_a_row_s_reaches_the_terminal(tmp_path):
    path, model = tmp_path / "rows.jsonl", model_in(tmp_path / "model")
    escapes = "\x1b]0;owned\x07\x9b2J\u202e"
    good = {"messages": ROWS[0]["messages"], f"id{escapes}": 1}
    bad = {
        "messages": [{"role": "user", "content": "?", f"{escapes}<|im_end|>": "x"}, ROWS[0]["messages"][1]]
    }
    path.write_text(json.dumps(good) + "\n" + json.dumps(bad) + "\n")
    for args in (["--row", 0], ["--row", 1], ["--row", 0, "--json"]):
        done = ygx("show", path, "--model", model, *args)
        assert done.returncode == (2 if args == ["--row", 1] else 0), done.stderr
        assert "]0;owned" in done.stdout + done.stderr
        assert not set("\x1b\x07\x9b\u202e") & set(done.stdout + done.stderr)


def test_score_counts_every_row(model, rows, tmp_path):
    done = ygx("score", rows, "--model", model, "-o", tmp_path / "out.jsonl", "--json")
    assert done.returncode == 0, done.stderr
    account = json.loads(done.stdout)
    assert (account["read"], account["accepted"], account["quarantined"]) == (3, 1, 2)
    assert "1 accepted + 2 quarantined = 3 read" in done.stderr
    (line,) = (tmp_path / "out.jsonl").read_text().splitlines()
    assert json.loads(line)["log_p_xy"] <= json.loads(line)["log_p_x"] < 0


def test_encode_writes_parquet_by_that_name_and_none_of_no_rows(model, tmp_path):
    import pyarrow.parquet as pq

    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    refused = CliRunner().invoke(
        app, ["encode", str(rows), "-m", str(model), "-o", str(tmp_path / "out.jsonl")]
    )
    assert isinstance(refused.exception, ConfigError)
    done = ygx("encode", rows, "--model", model, "-o", tmp_path / "out.parquet", "--json")
    assert (done.returncode, json.loads(done.stdout)["accepted"]) == (0, 0), done.stderr
    assert pq.read_table(tmp_path / "out.parquet").num_rows == 0


def test_encode_hands_over_what_other_trainers_read(model, rows, tmp_path):
    import pyarrow.parquet as pq

    done = ygx("encode", rows, "--model", model, "-o", tmp_path / "out.parquet", "--json")
    assert done.returncode == 0, done.stderr
    account = json.loads(done.stdout)
    assert (account["read"], account["accepted"], account["quarantined"], account["sequences"]) == (
        3,
        1,
        2,
        1,
    )
    (row,) = pq.read_table(tmp_path / "out.parquet").to_pylist()
    trained = [i for i, label in enumerate(row["labels"]) if label != -100]
    assert (
        AutoTokenizer.from_pretrained(model).decode([row["input_ids"][i] for i in trained]) == "4<|im_end|>"
    )
    assert [row["weights"][i] for i in trained] == [1, 1]


def test_audit_counts_what_the_reader_rejected(model, rows):
    done = ygx("audit", rows, "--model", model, "--json")
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["summary"] == report["summary"] | {"rows": 3, "accepted": 1, "quarantined": 2}
    assert {f["rule"] for f in report["findings"]} >= {"control-text", "rows-quarantined"}
    assert ygx("audit", rows, "--model", model, "--limit", 1).returncode == 0


def made_model(folder, rows, eos="<eos>"):
    """A directory with a tokenizer, a chat template, and configs without weights."""
    words = {
        w: i for i, w in enumerate(["<unk>", "<end>", "<eos>", *sorted({w for r in rows for w in r.split()})])
    }
    model = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token=eos, pad_token="<eos>", extra_special_tokens=["<end>"]
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ' ' + m.content + ' <end> ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    LlamaConfig(vocab_size=len(words), max_position_embeddings=4, eos_token_id=2).save_pretrained(folder)


def test_audit_knows_the_limits_of_a_model_without_its_weights(tmp_path):
    made_model(tmp_path / "model", ["user assistant what is it ? that"])
    data = tmp_path / "rows.jsonl"
    turns = [("user", "what is it ?"), ("assistant", "that")]
    data.write_text(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}))
    report = CliRunner().invoke(
        app, ["audit", str(data), "-m", str(tmp_path / "model"), "-e", "stops=<end>", "--json"]
    )
    found = {f["rule"] for f in json.loads(report.stdout)["findings"]}
    assert {"longer-than-the-model", "end-does-not-stop"} <= found
    (tmp_path / "model" / "config.json").unlink()
    report = CliRunner().invoke(
        app, ["audit", str(data), "-m", str(tmp_path / "model"), "-e", "stops=<end>", "--json"]
    )
    assert report.exit_code == 0, report.output


SCRIPT = """
import sys
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
text = "user what is it ? <end> assistant that <end>"
ids = tokenizer(text)["input_ids"]  # token ids alone: the messages are gone
made = LlamaConfig(
    vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
)
args = TrainingArguments(sys.argv[2], use_cpu=True, report_to=[])
rows = [{"input_ids": ids, "labels": ids}] * 8
Trainer(LlamaForCausalLM(made), args, train_dataset=rows, processing_class=tokenizer).train()
"""


def test_probe_is_told_the_rows(tmp_path):
    made_model(tmp_path / "model", ["user assistant what is it ? that"], eos="<end>")
    (tmp_path / "script.py").write_text(SCRIPT)
    data = tmp_path / "rows.jsonl"
    turns = [("user", "what is it ?"), ("assistant", "that")]
    data.write_text(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n")
    script = [str(tmp_path / "script.py"), str(tmp_path / "model"), str(tmp_path / "out")]
    blind = CliRunner().invoke(app, ["probe", "--json", *script], catch_exceptions=False)
    found = {f["rule"] for f in json.loads(blind.stdout)["findings"]}
    assert "rows-unrecognised" in found
    assert "loss-on-x" in found, "without rows, by the template's headers"
    assert blind.exit_code == 1
    told = CliRunner().invoke(app, ["probe", "--json", "--data", str(data), *script])
    report = json.loads(told.stdout)
    assert report["summary"]["rows recognised"] == "8 of 8", report["findings"]
    assert "prompt-header-trained" in {f["rule"] for f in report["findings"]}


def test_a_severity_that_is_none_is_told_before_the_work(tmp_path):
    for command, *rest in (["audit", "absent.jsonl", "--model", "absent"], ["probe", "absent.py"]):
        done = CliRunner().invoke(app, [command, "--fail-on", "warn", *rest])
        assert isinstance(done.exception, ConfigError)
        assert "did you mean 'warning'" in str(done.exception)


def test_sarif_makes_its_directory_as_the_page_does(tmp_path):
    made_model(tmp_path / "model", ["user assistant what is it ? that"], eos="<end>")
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"messages": [{"role": "user", "content": "what"}]}) + "\n")
    out = tmp_path / "deep" / "audit.sarif"
    done = CliRunner().invoke(app, ["audit", str(data), "-m", str(tmp_path / "model"), "--sarif", str(out)])
    assert done.exit_code == 1, done.output
    assert json.loads(out.read_text())["version"] == "2.1.0"
    assert "format: messages" in done.stderr


def test_ledger(model, rows):
    done = ygx("ledger", rows, "--model", model, "--json")
    assert done.returncode == 0, done.stderr
    book = json.loads(done.stdout)
    assert book["balanced"]
    assert sum(r["log_p"] for r in book["rows"]) == pytest.approx(book["joint"])


def test_train_then_the_model_is_there(model, rows, tmp_path):
    done = ygx(
        "train", "--data", rows, "--model", model, "--output-dir", tmp_path / "run", "--max-steps", 2,
        "--learning-rate", 1e-2, "--logging-steps", 1, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["steps"] == 2
    assert told["losses"][1] < told["losses"][0]
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()
    page = (tmp_path / "run" / "report.html").read_text()
    assert told["report"] == str(tmp_path / "run" / "report.html")
    assert '"loss that is trained","x":[1.0,2.0]' in page
    assert '"log_p":[null,' in page
    again = ygx("show", rows, "--model", tmp_path / "run" / "final")
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["show", "absent.jsonl", "--model", "absent"], "absent"),
        (["train", "--data", "x.jsonl"], "missing: --model, --output-dir"),
    ],
)
def test_input_errors_exit_with_2(args, message):
    done = ygx(*args)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_key_of_a_config_names_the_nearest(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("data: a\nmodel: b\noutput_dir: c\nlearning_rat: 1\n")
    done = ygx("train", path)
    assert done.returncode == 2
    assert "did you mean 'learning_rate'" in done.stderr


def test_doctor():
    done = ygx("doctor", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["packages"]["torch"]
    assert found["attention"]
    assert found["head"]


def test_options_of_the_encoder_by_name():
    told = ["repair=append_end,history", "max_length=40", 'stops=["</s>"]', "bos=false"]
    section = EncoderSection(train="last", further=named_values(told, "-e"))
    assert inputs.options_of(section) == {
        "train": "last", "control": "refuse", "overflow": "refuse",
        "repair": "append_end,history", "max_length": 40, "stops": ["</s>"], "bos": False,
    }  # fmt: skip
    for wrong, said in (
        ("repairs=all", "did you mean 'repair'"),
        ("repair", "no value"),
        ("train=all", "unknown option"),
    ):
        with pytest.raises(ConfigError, match=said):
            check_options(named_values([wrong], "-e"), "-e")


@pytest.mark.model
def test_a_refusal_s_repair_can_be_asked_for(smol_tokenizer, tmp_path):
    smol_tokenizer.save_pretrained(tmp_path / "model")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"x": "def f():\n", "y": "    return 4"}) + "\n")
    refused = ygx("show", path, "--model", tmp_path / "model", "--plain", "--x", "x", "--y", "y")
    assert (refused.returncode, "-e border=split" in refused.stderr) == (2, True), refused.stderr
    done = ygx(
        "show",
        path,
        "--model",
        tmp_path / "model",
        "--plain",
        "--x",
        "x",
        "--y",
        "y",
        "-e",
        "border=split",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sequences"][0]["tokens"][-1] == "<|im_end|>"


def test_the_version():
    out = CliRunner().invoke(app, ["--version"])
    assert (out.exit_code, out.output) == (0, f"ygivenx {__version__}\n")
