"""Adapters and hooks on the head: part of the weight where they are a product, refused by name where they aren't."""

from __future__ import annotations

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from tiny import llama, score_sequences
from torch import nn
from trees import assert_same, gradients, tree

import ygivenx as yx
from ygivenx import reference
from ygivenx.errors import ModelError
from ygivenx.models.model import head_of

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
ROWS = tree(3)


def adapted(**options):
    torch.manual_seed(1)
    return get_peft_model(
        llama(), LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False, **options)
    )


def assert_equal_to_the_model(model, **options) -> None:
    """Loss, gradients and scores are those of the model's own logits."""
    wanted = gradients(model, reference.loss(model, ROWS))
    found = yx.loss(model, ROWS, **options)
    assert_same(gradients(model, found.value), wanted)
    assert any("lm_head" in name for name in wanted)
    for s, told in zip(ROWS[:3], score_sequences(model, ROWS[:3]), strict=True):
        ids = torch.from_numpy(s.ids.copy())[None]
        with torch.no_grad():
            log_p = model(input_ids=ids).logits[0].double().log_softmax(-1)
        own = log_p[:-1].gather(1, ids[0, 1:, None])[s.output[1:]].sum()
        assert told.log_p_y_given_x == pytest.approx(float(own), abs=1e-4)


@pytest.mark.parametrize("chunk", [None, 37])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "lora_alpha": 3}])
def test_lora_on_the_head_is_part_of_it(options, chunk):
    assert_equal_to_the_model(adapted(**options).eval(), chunk=chunk)


def test_an_adapter_may_have_a_bias():
    model = llama()
    model.lm_head.bias = nn.Parameter(torch.randn(model.config.vocab_size))
    config = LoraConfig(target_modules=["lm_head"], init_lora_weights=False, lora_bias=True)
    assert_equal_to_the_model(get_peft_model(model, config).eval())


def test_two_adapters_then_none_then_merged():
    model = adapted().eval()
    model.add_adapter("other", LoraConfig(target_modules=["lm_head"], init_lora_weights=False, r=3))
    model.base_model.set_adapter(["default", "other"])
    assert_equal_to_the_model(model)
    base = model.get_output_embeddings().base_layer.weight
    both = head_of(model).weight.detach()
    with model.disable_adapter():
        assert head_of(model).weight is base
    model.merge_adapter()
    torch.testing.assert_close(head_of(model).weight, both, rtol=0, atol=1e-5)
    assert head_of(model).weight is base
    with model.disable_adapter():  # PEFT takes merged adapters out again
        assert not torch.allclose(head_of(model).weight, both, atol=1e-3)


def test_a_small_adapter_is_not_rounded_away():
    model = adapted().to(torch.bfloat16)
    layer = model.get_output_embeddings()
    layer.lora_A.float()
    layer.lora_B.float()
    with torch.no_grad():
        layer.lora_B["default"].weight.mul_(1e-6)
    assert not head_of(model).weight.equal(layer.base_layer.weight.float())


def test_a_copy_that_is_trained_stands_in_for_the_head():
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])).eval()
    trained = model.get_output_embeddings().modules_to_save["default"].weight
    with torch.no_grad():
        trained.add_(torch.randn_like(trained))
    assert head_of(model).weight is trained
    assert_equal_to_the_model(model)
    with model.disable_adapter():
        assert head_of(model).weight is model.get_output_embeddings().original_module.weight


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_what_is_no_product_is_refused_by_name():
    dora = adapted(use_dora=True).eval()
    dropout = adapted(lora_dropout=0.1)
    ia3 = get_peft_model(llama(), IA3Config(target_modules=["q_proj", "lm_head"], feedforward_modules=[]))
    for model, name in (
        (dora, "DoRA"),
        (dropout.train(), "dropout of 0.1"),
        (ia3, "ia3"),
    ):
        with pytest.raises(ModelError, match=name):
            yx.loss(model, ROWS)
    assert_equal_to_the_model(dropout.eval())


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("chunk", [None, 37])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        TrainableTokensConfig(token_indices=[1, 2, 7], target_modules=["embed_tokens"]),
        LoraConfig(target_modules=["q_proj"], init_lora_weights=False, trainable_token_indices=[1, 2, 7]),
    ],
    ids=["alone", "beside LoRA"],
)
def test_tokens_trained_one_by_one_are_exact(config, tied, chunk):
    model = get_peft_model(llama(tie_word_embeddings=tied), config).eval()
    for name, p in model.named_parameters():
        if "trainable_tokens_delta" in name:
            torch.nn.init.normal_(p)
    wanted = gradients(model, reference.loss(model, ROWS))
    assert any("trainable_tokens_delta" in name and g.any() for name, g in wanted.items())
    assert_same(gradients(model, yx.loss(model, ROWS, chunk=chunk).value), wanted)
    with model.disable_adapter():
        assert head_of(model).weight.equal(model.base_model.model.model.embed_tokens.weight) == tied


@pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`", "ignore:Model has `tie_word_embeddings=True`"
)
@pytest.mark.parametrize("trained", ["whole tables", "single tokens"])
def test_an_adapter_of_a_model_with_added_tokens_loads(trained, tmp_path):
    tokenizer = reference.word_tokenizer("a b c d e f g h")
    base = llama(vocab_size=len(tokenizer), tie_word_embeddings=trained == "single tokens")
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    tokenizer.add_tokens(["<new>", "<newer>"])
    more = {"modules_to_save": ["embed_tokens", "lm_head"]}
    if trained == "single tokens":
        more = {"trainable_token_indices": [len(tokenizer) - 2, len(tokenizer) - 1]}
    model = yx.load(tmp_path / "base")[0]
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model = get_peft_model(
        model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False, **more)
    ).eval()
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    loaded, own = yx.load(tmp_path / "adapter")
    assert len(own) == len(tokenizer)
    rows = tree(3, vocab=len(tokenizer))
    if (
        trained == "single tokens"
    ):  # rows of the base that it lacked are drawn anew, and nobody trained the others
        loaded.get_input_embeddings().original_module.weight.data.copy_(
            model.get_input_embeddings().original_module.weight
        )
    assert yx.loss(loaded, rows).value.item() == pytest.approx(reference.loss(model, rows).item(), rel=1e-5)


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_are_refused_by_name(config):
    model = get_peft_model(llama(), config(task_type="CAUSAL_LM", num_virtual_tokens=3))
    for use in (yx.loss, score_sequences):
        with pytest.raises(
            ModelError, match=config.__name__.removesuffix("TuningConfig").lower() + " tuning"
        ):
            use(model, ROWS)


def test_lora_that_wakes_up_within_the_text_is_refused():
    model = get_peft_model(
        llama(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[5])
    )
    with pytest.raises(ModelError, match="activated LoRA"):
        yx.loss(model, ROWS)


def test_hooks_on_the_head_are_refused_by_name():
    model = llama()
    handle = model.lm_head.register_forward_hook(lambda module, inputs, out: out * 2)
    with pytest.raises(ModelError, match=r"has a hook, .*lambda"):
        yx.loss(model, ROWS)
    handle.remove()
    yx.loss(model, ROWS)
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model.lm_head)
    with pytest.raises(ModelError, match="has a hook, WeightNorm"):
        yx.loss(model, ROWS)
