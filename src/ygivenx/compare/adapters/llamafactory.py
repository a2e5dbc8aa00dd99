"""LLaMA-Factory: its converter for messages and its supervised processor, with its template of that name."""

import json
import os
import sys
from importlib import machinery, util

from datasets import Dataset

os.environ["DISABLE_VERSION_CHECK"] = "1"  # it asks for an older transformers than other trainers do
# Imported for audio alone, and what the index builds for CUDA loads on no CPU.
sys.modules["torchaudio"] = util.module_from_spec(machinery.ModuleSpec("torchaudio", None))

# ruff: noqa: E402 (what stands first has to)
from llamafactory.data.converter import align_dataset
from llamafactory.data.parser import DatasetAttr
from llamafactory.data.processor import SupervisedDatasetProcessor
from llamafactory.data.template import get_template_and_fix_tokenizer
from llamafactory.hparams import DataArguments
from transformers import Seq2SeqTrainingArguments as Arguments

NAMES = {n: n for n in ("qwen3", "llama3", "gpt_oss", "gemma3")} | {"chatml": "smollm2"}


def encoder(tokenizer, family, formatting="openai", **settings):
    """A function from a row to (ids, weights)."""
    args = DataArguments(template=NAMES[family], cutoff_len=1 << 20, preprocessing_num_workers=1, **settings)
    template = get_template_and_fix_tokenizer(tokenizer, args)
    processor = SupervisedDatasetProcessor(template, tokenizer, None, args)
    tags = {f"{n}_tag": n for n in "role content user assistant system".split()} | {"observation_tag": "tool"}
    attr = DatasetAttr("file", "rows", formatting=formatting, messages="messages", tools="tools", **tags)
    training = Arguments(output_dir="out", use_cpu=True)

    def encode(row):
        row = {**row, "tools": json.dumps(row["tools"]) if row.get("tools") else ""}
        aligned = align_dataset(Dataset.from_list([row]), attr, args, training)
        result = processor.preprocess_dataset(aligned[:])
        return result["input_ids"][0], [label != -100 for label in result["labels"][0]]

    return encode
