"""axolotl: the prompt strategy `chat_template` on a data set of messages, with the tokenizer's own template."""

from axolotl.prompt_strategies.chat_template import StrategyLoader
from axolotl.utils.dict import DictDefault


def encoder(tokenizer, family, **settings):
    """A function from a row to (ids, weights)."""
    cfg = DictDefault(
        {
            "train_on_inputs": False,
            "sequence_len": 1 << 20,
            "chat_template": "tokenizer_default",
            "special_tokens": {},
        }
    )
    ds_cfg = {"type": "chat_template", "field_messages": "messages", **settings}
    strategy = StrategyLoader()(tokenizer, cfg, ds_cfg)

    def encode(row):
        result = strategy.tokenize_prompt(dict(row))
        return result["input_ids"], [label != -100 for label in result["labels"]]

    return encode
