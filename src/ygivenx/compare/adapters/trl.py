"""TRL: the SFTTrainer's data set and collator, for a model of one small layer."""

import tempfile

from datasets import Dataset, fingerprint
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer


def encoder(tokenizer, family, **settings):
    """A function from a row to (ids, weights)."""
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, **size))
    folder = tempfile.mkdtemp()
    # A name for each step of the data, which is otherwise a hash of the whole tokenizer: a second for every row.
    fingerprint.update_fingerprint = lambda *_: fingerprint.generate_random_fingerprint()

    def encode(row):
        options = {"output_dir": folder, "report_to": [], "use_cpu": True, "bf16": False, **settings}
        options |= {"max_length": None, "gradient_checkpointing": False, "disable_tqdm": True}
        trainer = SFTTrainer(
            model,
            args=SFTConfig(**options),
            train_dataset=Dataset.from_list([row]),
            processing_class=tokenizer,
        )
        batch = next(iter(trainer.get_train_dataloader()))
        return batch["input_ids"][0], batch["labels"][0] != -100

    return encode
