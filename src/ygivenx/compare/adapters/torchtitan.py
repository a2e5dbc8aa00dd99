"""torchtitan: ChatDataset's tokens of one sample, by its own tokenizer, shifted back by one."""

from types import SimpleNamespace

from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.hf_datasets.text_datasets import ChatDataset


def encoder(tokenizer, family):
    """A function from a row to (ids, weights)."""
    own = HuggingFaceTokenizer(tokenizer_path=tokenizer.name_or_path)
    data = SimpleNamespace(
        _tokenizer=own, _eos_id=own.eos_id, _sample_processor=lambda row: row["messages"], seq_len=1 << 20,
        _logged_first_sample=True, _validate_messages=ChatDataset._validate_messages, _sample_idx=0,
    )  # fmt: skip

    def encode(row):
        ids, labels = ChatDataset._tokenize_sample(data, row)
        return [*ids, labels[-1]], [False, *(label != -100 for label in labels)]

    return encode
