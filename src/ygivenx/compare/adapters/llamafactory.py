"""LLaMA-Factory: its converter for OpenAI's messages and its supervised processor, with its template of that name."""

import os

from datasets import Dataset

os.environ["DISABLE_VERSION_CHECK"] = "1"  # it asks for an older transformers than other trainers do

from llamafactory.data.converter import align_dataset
from llamafactory.data.parser import DatasetAttr
from llamafactory.data.processor import SupervisedDatasetProcessor
from llamafactory.data.template import get_template_and_fix_tokenizer
from llamafactory.hparams import DataArguments
from transformers import Seq2SeqTrainingArguments

NAMES = {"qwen3": "qwen3", "llama3": "llama3", "gpt_oss": "gpt_oss", "gemma3": "gemma3", "chatml": "smollm2"}


def encoder(tokenizer, family, **settings):
    """A function from a row to (ids, weights)."""
    args = DataArguments(template=NAMES[family], cutoff_len=1 << 20, preprocessing_num_workers=1, **settings)
    template = get_template_and_fix_tokenizer(tokenizer, args)
    names = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    names |= {"observation_tag": "tool", "system_tag": "system", "messages": "messages", "tools": "tools"}
    attr = DatasetAttr("file", "rows", formatting="openai", **names)
    processor = SupervisedDatasetProcessor(template, tokenizer, None, args)
    training = Seq2SeqTrainingArguments(output_dir="out", use_cpu=True)

    def encode(row):
        aligned = align_dataset(Dataset.from_list([row]), attr, args, training)
        result = processor.preprocess_dataset(aligned[:])
        return result["input_ids"][0], [label != -100 for label in result["labels"][0]]

    return encode
