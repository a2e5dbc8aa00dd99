"""tinker-cookbook: the supervised example of a family's renderer."""

from tinker_cookbook.renderers import TrainOnWhat, get_renderer

NAMES = {"qwen3": "qwen3", "llama3": "llama3", "gpt_oss": "gpt_oss_medium_reasoning"}


def encoder(tokenizer, family, what="ALL_ASSISTANT_MESSAGES"):
    """A function from a row to (ids, weights)."""
    renderer = get_renderer(NAMES[family], tokenizer)

    def encode(row):
        if row.get("tools"):
            raise ValueError("tools are given by another function of the renderer")
        result, weights = renderer.build_supervised_example(row["messages"], TrainOnWhat[what])
        return result.to_ints(), weights

    return encode
