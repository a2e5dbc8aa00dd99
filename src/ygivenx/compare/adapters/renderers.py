"""Prime Intellect's renderers: the renderer of a family, else the default one, and its training sample."""

from renderers.base import RENDERER_REGISTRY, _populate_registry, build_training_sample

NAMES = {
    "qwen3": "qwen3",
    "llama3": "llama-3",
    "gpt_oss": "gpt-oss",
    "gemma3": "default",
    "chatml": "default",
}


def encoder(tokenizer, family):
    """A function from a row to (ids, weights)."""
    _populate_registry()
    name = NAMES[family]
    renderer = RENDERER_REGISTRY[name](tokenizer)
    # The default renderer doesn't know what is sampled: there, the roles decide.
    options = {"role_to_mask": lambda m: m["role"] == "assistant"} if name == "default" else {}

    def encode(row):
        result = build_training_sample(renderer, row["messages"], tools=row.get("tools"), **options)
        return result.token_ids, result.loss_mask

    return encode
