"""Text rows through the language model of a multimodal checkpoint, and what else such checkpoints bring."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import VOCAB
from trees import assert_same, gradients, tree

import ygivenx as yx
from ygivenx import reference
from ygivenx.errors import ModelError
from ygivenx.models.model import head_of
from ygivenx.models.sharing import sharing_of

TEXT = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TOWER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
QWEN = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32}
LLAMA4 = {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "attention_chunk_size": 8,
          "layer_types": ["chunked_attention"] * 3 + ["full_attention"]}  # fmt: skip
GEMMA4 = {"sliding_window": 6,
          "layer_types": ["sliding_attention", "full_attention"] * 2, "global_head_dim": 8, "num_kv_shared_layers": 0,
          "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB}  # fmt: skip
# By family (Gemma 3 with images leaves out the soft cap that its text config names):
# what its text's config needs beyond TEXT, and the config of what reads images.
CASES = {
    "Gemma3": (
        {"sliding_window": 6, "final_logit_softcapping": 3.0},
        TOWER | {"model_type": "siglip_vision_model"},
    ),
    "Gemma4": (GEMMA4, TOWER),
    "Llama4": (
        LLAMA4,
        TOWER | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
    ),
    "Mistral3": ({"model_type": "mistral"}, TOWER | {"model_type": "pixtral", "head_dim": 8}),
    "Qwen3_5": (DELTA, QWEN),
    "Qwen3VL": ({}, QWEN | {"deepstack_visual_indexes": [0]}),
}
ROWS = tree(2)


def build(family: str):
    text, vision = CASES[family]
    config = getattr(transformers, family + "Config")(text_config=TEXT | text, vision_config=vision)
    torch.manual_seed(0)
    return getattr(transformers, family + "ForConditionalGeneration")(config).eval()


@pytest.mark.parametrize("family", CASES)
def test_text_rows_go_through_the_language_model(family):
    model = build(family)
    expected = reference.loss(model, ROWS)
    wanted = gradients(model, expected)
    assert not sharing_of(model).reason
    for options in ({}, {"chunk": 37}, {"route": "unshared"}):
        out = yx.loss(model, ROWS, **options)
        assert out.value.item() == pytest.approx(expected.item(), rel=1e-5), options
        assert_same(gradients(model, out.value), wanted)


@pytest.mark.parametrize("family", CASES)
def test_a_checkpoint_with_a_vision_tower_loads_with_its_own_weights(family, tmp_path, smol_tokenizer):
    model = build(family)
    model.save_pretrained(tmp_path)
    smol_tokenizer.save_pretrained(tmp_path)
    loaded, _ = yx.load(tmp_path)
    assert yx.loss(loaded, ROWS).value.item() == pytest.approx(reference.loss(model, ROWS).item(), rel=1e-5)


def test_heads_that_predict_further_tokens_are_left_out(tmp_path, smol_tokenizer):
    """Checkpoints of Qwen3.5, GLM and others have them beside the model; its loss is that of the next token."""
    torch.manual_seed(0)
    model = transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**TEXT | DELTA)).eval()
    model.save_pretrained(tmp_path)
    smol_tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), "mtp.fc.weight": torch.randn(32, 64)}, file, {"format": "pt"})
    loaded, _ = yx.load(tmp_path)
    assert not any("mtp" in name for name, _ in loaded.named_parameters())
    assert yx.loss(loaded, ROWS).value.item() == pytest.approx(reference.loss(model, ROWS).item(), rel=1e-5)


def test_embeddings_that_were_resized_are_exact():
    model = build("Gemma3")
    model.resize_token_embeddings(VOCAB + 5, mean_resizing=False)
    rows = [yx.Sequence([*s.ids, VOCAB + 3], [*s.weights, 1.0]) for s in ROWS]
    expected = reference.loss(model, rows)
    wanted = gradients(model, expected)
    assert len(head_of(model).weight) == VOCAB + 5
    assert_same(gradients(model, yx.loss(model, rows).value), wanted)


def test_weights_that_the_files_lack_are_refused(tmp_path, smol_tokenizer):
    """transformers would fill them with random numbers and say so in a log that nobody reads."""
    build("Qwen3VL").save_pretrained(tmp_path)
    smol_tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["model.language_model.layers.1.mlp.down_proj.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 of its weights, such as model.language_model.layers.1.mlp"):
        yx.load(tmp_path)


def test_what_is_left_out_of_a_checkpoint_is_named(tmp_path, smol_tokenizer, caplog):
    build("Llama4").save_pretrained(tmp_path)
    smol_tokenizer.save_pretrained(tmp_path)
    with caplog.at_level("WARNING", "ygivenx"):
        yx.load(tmp_path)
    assert "not loaded, since text doesn't need it: multi_modal_projector, vision_model" in caplog.text
