"""ms-swift: its template of the model's family in training mode."""

from types import SimpleNamespace

from swift.template import TEMPLATE_MAPPING, get_template

NAMES = {
    "qwen3": "qwen3",
    "llama3": "llama3_2",
    "gpt_oss": "gpt_oss",
    "gemma3": "gemma3_text",
    "chatml": "chatml",
}


def encoder(tokenizer, family, **settings):
    """A function from a row to (ids, weights)."""
    assert NAMES[family] in TEMPLATE_MAPPING
    # What swift knows of a model beside its tokenizer: nothing that a text template reads.
    tokenizer.model_info = SimpleNamespace(
        config=None, task_type="causal_lm", max_model_len=None, model_dir="."
    )
    tokenizer.model_meta = SimpleNamespace(
        is_multimodal=False, template=NAMES[family], candidate_templates=[]
    )
    template = get_template(tokenizer, template_type=NAMES[family], **settings)
    template.set_mode("train")

    def encode(row):
        result = template.encode(dict(row))
        weights = result.get("loss_scale") or [1.0] * len(result["labels"])
        pairs = zip(result["labels"], weights, strict=True)
        return result["input_ids"], [w if label != -100 else 0 for label, w in pairs]

    return encode
