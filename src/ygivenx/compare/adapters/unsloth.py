"""Unsloth: TRL's SFTTrainer as it patches it, on rendered text, and its train_on_responses_only."""

import tempfile

import unsloth  # isort: skip (it patches what is imported after it)
from datasets import Dataset, fingerprint
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer
from unsloth.chat_templates import train_on_responses_only


def encoder(tokenizer, family, responses_only=False):
    """A function from a row to (ids, weights)."""
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, **size))
    model.unsloth_version = unsloth.__version__
    folder = tempfile.mkdtemp()
    # A name for each step of the data, which is otherwise a hash of the whole tokenizer: a second for every row.
    fingerprint.update_fingerprint = lambda *_: fingerprint.generate_random_fingerprint()

    def encode(row):
        text = tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"), tokenize=False)
        options = {"output_dir": folder, "report_to": [], "dataset_text_field": "text", "max_length": None}
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(**options, use_cpu=True, bf16=False, disable_tqdm=True, dataset_num_proc=1),
            train_dataset=Dataset.from_list([{"text": text}]),
            processing_class=tokenizer,
        )
        if responses_only:
            trainer = train_on_responses_only(trainer)
        batch = next(iter(trainer.get_train_dataloader()))
        return batch["input_ids"][0], batch["labels"][0] != -100

    return encode
