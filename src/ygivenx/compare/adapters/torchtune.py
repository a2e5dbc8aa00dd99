"""torchtune: its transform for OpenAI's messages under its tokenizer for Llama 3."""

import base64
import json
import tempfile
from pathlib import Path

from torchtune.data import OpenAIToMessages
from torchtune.datasets._sft import SFTTransform
from torchtune.models.llama3 import llama3_tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

NAMES = {"llama3": "llama3"}


def encoder(tokenizer, family, **settings):
    """A function from a row to (ids, weights)."""
    byte = {char: b for b, char in bytes_to_unicode().items()}
    ranks = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"]
    # The checkpoint's tokenizer.model, which torchtune reads: the same vocabulary in base64.
    lines = (f"{base64.b64encode(bytes(byte[c] for c in t)).decode()} {n}" for t, n in ranks.items())
    file = Path(tempfile.mkdtemp()) / "tokenizer.model"
    file.write_text("\n".join(lines))
    transform = SFTTransform(OpenAIToMessages(**settings), llama3_tokenizer(str(file)))

    def encode(row):
        result = transform({"messages": [dict(m) for m in row["messages"]]})
        return result["tokens"], [label != -100 for label in result["labels"]]

    return encode
