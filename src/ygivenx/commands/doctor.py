"""What is installed, what will run where, and what is missing for what."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

# Optional packages: the extra that brings each, and what it is for.
OPTIONAL = {
    "gguf": ("quant", "loading GGUF weights"),
    "peft": ("lora", "LoRA adapters"),
    "datasets": ("train", "rows from a dataset of the hub"),
    "lm_eval": ("eval", "lm-evaluation-harness"),
    "ray": ("ray", "encoding and scoring on several machines"),
}
REQUIRED = ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy", "jinja2", "pyarrow")


def examine(model: tuple[str, str | None] | None = None) -> dict[str, Any]:
    """A document of plain types; `model` = (directory, GGUF file) adds what would run for that model."""
    import torch

    from .. import __version__
    from ..head.selective import explain as head
    from ..models.memory import keep_freed_memory
    from ..models.sharing import explain as attention

    found: dict[str, Any] = {
        "ygivenx": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in REQUIRED},
        "missing": {
            name: {"for": use, "install": f"pip install 'ygivenx[{extra}]'"}
            for name, (extra, use) in OPTIONAL.items()
            if _version(name) is None
        },
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "attention": attention(),
        "head": head(),
        "freed memory": "kept"
        if keep_freed_memory()
        else "given back: no glibc, or the environment settles it",
    }
    if model is not None:
        from ..models.model import load

        loaded, tokenizer = load(model[0], gguf_file=model[1])
        found["model"] = {
            "class": type(loaded).__name__,
            "parameters": sum(p.numel() for p in loaded.parameters()),
            "dtype": str(next(loaded.parameters()).dtype).removeprefix("torch."),
            "chat_template": tokenizer.chat_template is not None,
            "attention": attention(loaded),
        }
    return found


def as_text(found: dict[str, Any]) -> str:
    """The document as indented text."""
    return "\n".join(_lines(found, 0))


def _lines(value: dict[str, Any], depth: int) -> list[str]:
    lines = []
    for key, item in value.items():
        pad = "  " * depth
        if isinstance(item, dict):
            lines += [f"{pad}{key}:" + ("" if item else " none"), *_lines(item, depth + 1)]
        else:
            lines.append(f"{pad}{key}: {item}")
    return lines


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
