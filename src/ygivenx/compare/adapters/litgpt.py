"""LitGPT: its SFTDataset with the tokenizer and the prompt style of a checkpoint, whose name it goes by."""

import tempfile
from pathlib import Path

from litgpt.data import SFTDataset
from litgpt.prompts import PromptStyle, model_name_to_prompt_style
from litgpt.tokenizer import Tokenizer

NAMES = {
    "qwen3": "Qwen3-0.6B",
    "llama3": "Llama-3.1-8B-Instruct",
    "gemma3": "Gemma-3-1b-it",
    "chatml": "SmolLM2-135M-Instruct",
}


def encoder(tokenizer, family, prompt_style="alpaca", mask_prompt=False):
    """A function from a row to (ids, weights). The defaults are those of its data module for JSON files."""
    folder = Path(tempfile.mkdtemp()) / NAMES[family]
    tokenizer.save_pretrained(folder)
    own = model_name_to_prompt_style(folder.name)
    style = own if prompt_style == "model" else PromptStyle.from_name(prompt_style)

    def encode(row):
        if [m["role"] for m in row["messages"]] != ["user", "assistant"]:
            raise ValueError("a row is one instruction and one output")
        sample = dict(zip(("instruction", "output"), (m["content"] for m in row["messages"]), strict=True))
        result = SFTDataset([sample], Tokenizer(folder), style, mask_prompt=mask_prompt)[0]
        return result["input_ids"], result["labels"] != -100

    return encode
