"""Each way to compute a model's sequences, under each noun that computes them: a table of routes and nouns."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
import transformers
from test_trainer import make
from tiny import VOCAB, llama, score_sequences
from transformers import AutoModelForCausalLM
from trees import assert_same, gradients, tree

import ygivenx as yx
from ygivenx import reference
from ygivenx.errors import ConfigError, ModelError
from ygivenx.models.position_limits import PositionLimits
from ygivenx.models.sharing import reason_unshared
from ygivenx.scores.node_log_probs import node_log_probs
from ygivenx.scores.requests import pair_of_ids
from ygivenx.scores.scoring import context_window, request_builder_for

SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
CHUNKED = {
    "layer_types": ["chunked_attention"] * 3 + ["full_attention"], "attention_chunk_size": 8, "num_local_experts": 4,
    "num_experts_per_tok": 1, "intermediate_size_mlp": 48,
}  # fmt: skip
MAMBA2 = {"num_heads": 8, "state_size": 8, "n_groups": 2, "chunk_size": 16}
# By route: (family, what it needs beyond SIZES, whether its sequences share).
ROUTES = {
    "shared attention": ("Llama", {}, True),
    "sliding windows": ("Mistral", {"sliding_window": 6}, True),
    "chunked attention": ("Llama4Text", CHUNKED, True),
    "attention by hand": ("StableLm", {}, True),
    "recurrent forest": ("Qwen3_5Text", DELTA, True),
    "lightning attention": ("MiniMax", {"num_local_experts": 4}, True),
    "scan": ("Mamba", {"state_size": 4}, True),
    "scan beside attention": ("RecurrentGemma", {"lru_width": 48, "attention_window_size": 6}, True),
    "scan by two parts of a block": (
        "Rwkv",
        {"attention_hidden_size": 48, "rescale_every": 0, "use_cache": False},
        True,
    ),
    "unshared": ("Bloom", {}, False),
    "shared, in tuples": ("Mamba2", {**MAMBA2, "return_dict": False}, True),
    "unshared, in tuples": ("Bloom", {"return_dict": False}, False),
}
ROWS = tree(2)
CHUNK = 20  # tokens; the longest of ROWS has several times as many


def build(route: str):
    family, further, _ = ROUTES[route]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        getattr(transformers, family + "Config")(**SIZES | further)
    ).eval()


def loss(model, _path, chunk=None) -> None:
    expected = reference.loss(model, ROWS)
    exact = gradients(model, expected)
    out = yx.loss(model, ROWS, chunk=chunk)
    assert out.value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same(gradients(model, out.value), exact)


def streaming(model, path) -> None:
    loss(model, path, CHUNK)
    forest = yx.Forest.of(ROWS)
    log_p = node_log_probs(model, forest, chunk=CHUNK)
    for s, nodes in zip(ROWS, forest.paths, strict=True):
        assert log_p[nodes][1:] == pytest.approx(reference.log_probs(model, s.ids).detach().numpy(), abs=1e-4)


def scored(model, _path) -> None:
    cuts = [len(s.ids) // 2 for s in ROWS]
    pairs = [pair_of_ids(s.ids[:cut], s.ids[cut:]) for s, cut in zip(ROWS, cuts, strict=True)]
    for s, cut, score in zip(ROWS, cuts, score_sequences(model, pairs), strict=True):
        exact = reference.log_probs(model, s.ids).detach().numpy()
        assert score.log_p_y_given_x == pytest.approx(exact[cut - 1 :].sum(), abs=1e-3)
        assert score.log_p_xy == pytest.approx(exact.sum(), abs=1e-3)


def ledger(model, _path) -> None:
    found = yx.ledger(model, ROWS[0])
    assert found.joint == pytest.approx(reference.log_probs(model, ROWS[0].ids).sum().item(), abs=1e-3)
    assert found.balanced


def probe(model, _path) -> None:
    rows, expected = ROWS[:3], Counter[int]()
    for s in rows:
        for target, weight in zip(s.ids.tolist(), s.weights.tolist(), strict=True):
            expected[target] += weight / sum(float(r.weights.sum()) for r in rows)
    found = Counter[int]()
    with yx.probe(model) as seen:
        yx.loss(model, rows).value.backward()
    for token in seen.tokens():
        found[token.target] += token.weight
    assert {t: w for t, w in found.items() if w > 1e-6} == pytest.approx(
        {t: w for t, w in expected.items() if w}, rel=1e-2, abs=1e-5
    )


def trainer(model, path) -> None:
    """One step over several packs moves each weight by its gradient of the definition; so does what is evaluated."""
    expected = reference.loss(model, ROWS)
    exact = gradients(model, expected)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    options = {"max_steps": 1, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    trainer = make(path, ROWS, model, **options, learning_rate=1.0, max_tokens=80, eval_dataset=ROWS,
                   gradient_accumulation_steps=len(make(path, ROWS, model, max_tokens=80).train_dataset))  # fmt: skip
    assert len(trainer.train_dataset) > 1
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    trainer.train()
    moved = {n: before[n] - p.detach() for n, p in model.named_parameters()}
    assert_same(moved, exact, 3e-4)  # a difference of weights has fewer digits than a gradient


NOUNS = {f.__name__: f for f in (loss, streaming, scored, ledger, probe, trainer)}


@pytest.mark.parametrize("noun", NOUNS)
@pytest.mark.parametrize("route", ROUTES)
def test_a_noun_is_exact_by_a_route(route, noun, tmp_path):
    model = build(route)
    assert bool(reason_unshared(model, yx.Forest.of(ROWS), "auto", False)) != ROUTES[route][2]
    NOUNS[noun](model, tmp_path)


# -- how long rows can be: found before the first step, not at the row ---------------------------------------


def gpt2(positions: int):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": positions}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()


def rows_of(*lengths: int) -> list[yx.Sequence]:
    rng = np.random.default_rng(0)
    return [yx.Sequence(rng.integers(3, VOCAB, n), np.arange(n) > 0) for n in lengths]


def test_a_trainer_refuses_rows_beyond_the_positions_before_its_first_step(tmp_path):
    trainer = make(tmp_path, rows_of(20, 80, 30), gpt2(64), max_steps=1, eval_dataset=rows_of(20))
    with pytest.raises(ModelError, match="row 1: it has 64 positions, and a sequence of 80 tokens needs 79"):
        trainer.train()
    assert trainer.state.global_step == 0
    trainer = make(tmp_path, rows_of(20, 65), gpt2(64), max_steps=1, eval_dataset=rows_of(20, 66))
    with pytest.raises(ModelError, match="eval_dataset, row 1: it has 64 positions"):
        trainer.train()
    trainer = make(tmp_path, rows_of(20, 65), gpt2(64), max_steps=1, eval_dataset=rows_of(65))
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_trainer_refuses_lengths_that_change_the_frequencies_before_its_first_step(tmp_path):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    model = llama(rope_parameters=rope, max_position_embeddings=24)
    trainer = make(tmp_path, rows_of(20, 26), model, max_steps=1)
    with pytest.raises(ModelError, match=r"row 1: its rotary embedding \(dynamic\) changes beyond 24 tokens"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_scores_read_no_more_than_there_are_positions(smol_tokenizer):
    model = gpt2(64)
    assert context_window(model) == 64
    with pytest.raises(ConfigError, match="max_length=1,024, but it has 64 positions"):
        request_builder_for(model, smol_tokenizer, overflow="roll", max_length=1024)
    request_builder_for(model, smol_tokenizer, overflow="roll", max_length=65)


def test_positions_of_images_dont_bound_texts():
    """GIT reads both in one stack of layers; an image has five positions here."""
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
             "image_size": 28, "patch_size": 14}  # fmt: skip
    model = AutoModelForCausalLM.from_config(transformers.GitConfig(**SIZES, vision_config=tower)).eval()
    assert PositionLimits.of(model).most == SIZES["max_position_embeddings"]
    rows = rows_of(20, 30)
    assert yx.loss(model, rows).value.item() == pytest.approx(reference.loss(model, rows).item(), rel=1e-5)
