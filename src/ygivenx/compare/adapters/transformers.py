"""transformers: its collator for language models, or apply_chat_template's own mask of the assistant's tokens."""

from transformers import DataCollatorForLanguageModeling


def encoder(tokenizer, family, mask=False):
    """A function from a row to (ids, weights)."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)

    def encode(row):
        options = {"tools": row.get("tools"), "return_dict": True, "return_assistant_tokens_mask": mask}
        result = tokenizer.apply_chat_template(row["messages"], tokenize=True, **options)
        if mask:
            return result["input_ids"], result["assistant_masks"]
        batch = collator([{"input_ids": result["input_ids"]}])
        return batch["input_ids"][0], batch["labels"][0] != -100

    return encode
