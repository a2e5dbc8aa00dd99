"""`ygx pack --dry-run` against counts by hand: tokens, distinct ones, and those of packs."""

from __future__ import annotations

import json

import pytest
from test_finetune import model_in
from typer.testing import CliRunner

import ygivenx as yx
from ygivenx.cli import app
from ygivenx.errors import ConfigError
from ygivenx.rows.data import read


def pack(*args: object):
    return CliRunner().invoke(app, ["pack", *map(str, args)])


@pytest.mark.parametrize("rated", [False, True])
@pytest.mark.parametrize("max_tokens", [2, 100_000])
def test_the_limit_and_what_packs_reach(tmp_path, rated, max_tokens):
    prompt = "a long prompt that all rows have in common " * 3
    rows = [
        {"prompt": f"{prompt}{i // 2}", "chosen": f"yes {i}", "rejected": "no"} if rated
        else {"prompt": f"{prompt}{i // 2}", "completion": f"yes {i}"}
        for i in range(6)
    ]  # fmt: skip
    data, model = tmp_path / "rows.jsonl", model_in(tmp_path / "model")
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    done = pack(
        data, "--model", model, "--max-tokens", max_tokens, "--dry-run", "--json", *["--rated"] * rated
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    encode = yx.Encoder.from_pretrained(model)
    examples = [(yx.PreferenceEncoder(encode) if rated else encode)(row) for row in read(data)]
    forest = yx.Forest.of(examples)
    assert (found["tokens"], found["distinct"], found["sequences"]) == (
        forest.total,
        len(forest),
        6 * (1 + rated),
    )
    assert found["limit"] == pytest.approx(forest.total / len(forest))
    apart = [len(yx.Forest.of([e])) for e in examples]
    expected = len(forest) if max_tokens > 2 else sum(apart)
    assert found["packed"] == expected or (not rated and found["packed"] < expected)
    assert found["reached"] == pytest.approx(found["tokens"] / found["packed"])
    printed = pack(
        data, "--model", model, "--max-tokens", max_tokens, "--dry-run", *["--rated"] * rated
    ).stdout
    assert f"sharing limit {found['limit']:.2f}" in printed


def test_without_dry_run_it_says_who_packs(tmp_path):
    done = pack(tmp_path / "rows.jsonl", "--model", "m")
    assert isinstance(done.exception, ConfigError)
    assert "--dry-run" in done.exception.fix
