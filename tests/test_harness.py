"""The plug-in for lm-evaluation-harness against the harness's own HF class, on real tasks."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from harness_tasks import write_tasks
from tiny import llama
from tokenizers import processors

if find_spec("lm_eval") is None:
    pytest.skip("lm-eval is not installed", allow_module_level=True)

# What the harness and what it imports warn about is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory, smol_tokenizer) -> Path:
    """A random model with the real tokenizer, as a directory; some requests are longer than it reads."""
    path = tmp_path_factory.mktemp("model")
    model = llama(vocab_size=len(smol_tokenizer), max_position_embeddings=300)
    model.save_pretrained(path)
    smol_tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, data_dir) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("tasks")
    return folder, write_tasks(folder, data_dir)


def run(model: str, arguments: dict, tasks: tuple[Path, list[str]], limit: int | None = None) -> dict:
    import lm_eval
    from lm_eval.tasks import TaskManager

    import ygivenx.scores.harness  # noqa: F401

    folder, names = tasks
    return lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=names, device="cpu", bootstrap_iters=0, limit=limit,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )  # fmt: skip


def answers(result: dict) -> dict[str, list]:
    return {
        name: [r[0] for s in sorted(samples, key=lambda s: s["doc_id"]) for r in s["resps"]]
        for name, samples in result["samples"].items()
    }


def accuracies(result: dict) -> dict:
    return {
        (task, metric): value
        for task, metrics in result["results"].items()
        for metric, value in metrics.items()
        if metric in ("acc,none", "acc_norm,none")
    }


def assert_equal(ours: dict, theirs: dict, rows: int = 12) -> None:
    compared = 0
    for name, told in answers(theirs).items():
        for a, b in zip(answers(ours)[name], told, strict=True):
            if name == "local_generation":
                assert a == b
            elif name == "local_rolling":
                assert a == pytest.approx(b, abs=1e-2)  # sums over hundreds of tokens
            else:
                assert a[0] == pytest.approx(b[0], abs=1e-3), name
                assert a[1] == b[1]
            compared += 1
    assert compared == 3 * rows * 4 + 2 + 2
    assert accuracies(ours) == accuracies(theirs)
    assert len(accuracies(ours)) == 6


def test_every_request_and_accuracy_equals_the_hf_class(tiny_model, tasks):
    arguments = {"pretrained": str(tiny_model), "dtype": "float32"}
    ours, theirs = run("ygivenx", arguments, tasks), run("hf", arguments, tasks)
    assert_equal(ours, theirs)
    info = ours["config"]["ygivenx"]
    assert info["sharing"] > 2
    assert info["requests"] == 3 * 12 * 4
    # ":(" is one token of SmolLM2: after "A:" the rule reads "72)" where "(72)" is written.
    assert info["requests_read_as_another_text"] == 12 * 4
    assert info["examples"][0]["written"].endswith("A:(72)")


@pytest.mark.full
@pytest.mark.model
def test_on_the_real_model(smol, tasks):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from ygivenx.scores.harness import ForestLM

    model, tokenizer = smol
    stem = "Q: What is the capital of France?\nA: Paris\n\nQ: What is the capital of Italy?\nA:"
    texts = [(stem, f" {city}") for city in ("Rome", "Paris", "Florence, of course")]
    texts += [("", "Hello there"), ("The", " end")]
    requests = [Instance("loglikelihood", {}, t, i) for i, t in enumerate(texts)]
    ours = ForestLM(pretrained=model, tokenizer=tokenizer).loglikelihood(requests, disable_tqdm=True)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer).loglikelihood(requests, disable_tqdm=True)
    for a, b in zip(ours, theirs, strict=True):
        assert a[0] == pytest.approx(b[0], abs=1e-3)
        assert a[1] == b[1]
    assert ours[0][0] > ours[1][0]


@pytest.mark.parametrize("add_bos", [None, True, False])
def test_texts_in_batches_are_those_of_the_hf_class(tiny_model, add_bos):
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    from ygivenx.scores.harness import ForestLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)]
    )
    lm = ForestLM(pretrained=str(tiny_model), tokenizer=tokenizer, device="cpu", add_bos_token=add_bos)
    texts = ["Once", "Once upon ", "", f"{tokenizer.bos_token}again", " 😀"]
    told = lm._encode_batch(texts)
    assert told == {t: HFLM.tok_encode(lm, t) for t in texts}
    assert (told["Once"][0] == tokenizer.bos_token_id) == (add_bos is not False)
    assert told[texts[3]].count(tokenizer.bos_token_id) == 1


def test_an_end_that_the_tokenizer_adds_is_no_part_of_y(tiny_model):
    """With border=exact a text is scored as it is written."""
    from transformers import AutoTokenizer

    from ygivenx.scores.harness import ForestLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}", special_tokens=[(t, tokenizer.convert_tokens_to_ids(t)) for t in (bos, eos)]
    )
    lm = ForestLM(pretrained=str(tiny_model), tokenizer=tokenizer, device="cpu", border="exact")
    x, y = lm._encode_pair("Paris is", " big")
    assert tokenizer.convert_ids_to_tokens(x) == [bos, "Paris", "Ġis"]
    assert tokenizer.convert_ids_to_tokens(y) == ["Ġbig"]


def test_what_the_harness_cuts_and_what_it_fails_on_is_said(tiny_model, caplog):
    from lm_eval.api.instance import Instance

    from ygivenx.scores.harness import ForestLM

    lm = ForestLM(pretrained=str(tiny_model), device="cpu", max_length=8)
    pairs = [("word " * 20, "end"), ("Well", " then"), ("a b c d e f g", " h i j")]
    lm.loglikelihood(
        [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)], disable_tqdm=True
    )
    assert "2 of 3 requests are longer than the 8 tokens" in caplog.text
    assert lm.get_model_info()["ygivenx"]["requests_truncated"] == 2


def test_a_bad_request_is_named_and_the_others_are_kept(tiny_model, caplog):
    from lm_eval.api.instance import Instance

    from ygivenx.scores.harness import ForestLM

    lm = ForestLM(pretrained=str(tiny_model), device="cpu")

    def ask(*pairs):
        requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        return lm.loglikelihood(requests, disable_tqdm=True)

    good = [("Well", " then"), ("So", " what")]
    expected = ask(*good)
    found = ask(good[0], ("hello wor", "ld"), (" \n", " hello world"), ("", ""), good[1])
    assert [a for a, _ in (found[0], found[4])] == pytest.approx([a for a, _ in expected])
    assert found[1:4] == [(float("-inf"), False)] * 3
    assert "3 of 5 requests can't be scored" in caplog.text
    assert "indexes: [1, 2, 3]" in caplog.text
    assert {tuple(f["request"]) for f in lm.get_model_info()["ygivenx"]["requests_not_scored"]} == {
        ("hello wor", "ld"), (" \n", " hello world"), ("", ""),
    }  # fmt: skip


def test_requests_are_encoded_once_and_in_batches(tiny_model, monkeypatch):
    from ygivenx.scores import harness

    monkeypatch.setattr(harness, "AHEAD", 4)
    lm = harness.ForestLM(pretrained=str(tiny_model), device="cpu")
    pairs = [(f"{'a' * (i // 2)} ", "b") for i in range(12)]
    one_by_one = [lm._encode_pair(*pair) for pair in pairs]
    batches, encode = [], lm._encode_batch
    monkeypatch.setattr(lm, "_encode_batch", lambda texts: batches.append(texts) or encode(texts))
    monkeypatch.setattr(lm.tokenizer, "encode", None)
    lm._batches = lm._encode_ahead(pairs)
    assert [lm._encode_pair(*pair) for pair in pairs] == one_by_one
    assert list(map(len, batches)) == [4, 4, 4]


@pytest.mark.full
@pytest.mark.model
def test_every_task_with_the_real_model(smol, tasks):
    model, tokenizer = smol
    arguments = {"pretrained": model, "tokenizer": tokenizer}
    assert_equal(*(run(name, arguments, tasks, limit=2) for name in ("ygivenx", "hf")), rows=2)


@pytest.mark.full
def test_the_harness_s_own_command(tiny_model, tasks, tmp_path):
    folder, _ = tasks
    done = subprocess.run(
        [
            sys.executable, "-m", "ygivenx.scores.harness", "run", "--model", "ygivenx",
            "--model_args", f"pretrained={tiny_model},dtype=float32,border=exact", "--device", "cpu",
            "--tasks", "local_parenthesis", "--include_path", folder, "--output_path", tmp_path, "--limit", "4",
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = tmp_path.rglob("results_*.json")
    info = json.loads(path.read_text())["config"]["ygivenx"]
    assert info["border"] == "exact"
    assert info["requests"] == 16
    assert info["requests_read_as_another_text"] == 0
