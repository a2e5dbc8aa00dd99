"""torchtitan: ChatDataset's tokens of one sample, shifted back by one."""

from types import SimpleNamespace

from torchtitan.hf_datasets.text_datasets import ChatDataset


def encoder(tokenizer, family):
    """A function from a row to (ids, weights)."""

    def text(messages, **options):
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)

    def ids_of(text, add_bos, add_eos):
        bos = [tokenizer.bos_token_id] if add_bos and tokenizer.bos_token_id is not None else []
        ids = tokenizer.encode(text, add_special_tokens=False)
        return ids if ids[:1] == bos else bos + ids

    own = SimpleNamespace(apply_chat_template=text, encode=ids_of)
    data = SimpleNamespace(
        _tokenizer=own, _eos_id=tokenizer.eos_token_id, _sample_processor=lambda row: row["messages"], seq_len=1 << 20,
        _logged_first_sample=True, _validate_messages=ChatDataset._validate_messages, _sample_idx=0,
    )  # fmt: skip

    def encode(row):
        ids, labels = ChatDataset._tokenize_sample(data, row)
        return [*ids, labels[-1]], [False, *(label != -100 for label in labels)]

    return encode
