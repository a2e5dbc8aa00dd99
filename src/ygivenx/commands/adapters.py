"""LoRA adapters of a run: made, saved so that they load from anywhere, and merged into a plain model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..disk import sync_all
from ..errors import ConfigError, MissingExtra
from ..models.resolve import located
from .config import LoraSection, ModelOptions

RANK = 16
CONFIG, BASE = "adapter_config.json", "base"
# What a base model consists of on disk; adapters have other names.
_BASE_FILES = ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json")


def adapted(model: Any, section: LoraSection) -> Any:
    """The model with LoRA adapters, if the section asks for them: by default on every linear layer but the head."""
    if not section.further:
        return model
    peft = _peft("lora")
    rank = section.further.get("r", RANK)
    # alpha / r is the factor of the adapter: 2 at any rank, so that another rank needs no other learning rate.
    settings = {
        "r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM",
        **section.further,
    }  # fmt: skip
    try:
        return peft.get_peft_model(model, peft.LoraConfig(**settings))
    except (TypeError, ValueError) as error:
        raise ConfigError("these adapters can't be made", where="lora", why=str(error)) from error


def write_base(model: Any, source: ModelOptions, output_dir: Path) -> None:
    """Write a base model that came from a GGUF file as safetensors, once, before it gets adapters."""
    _, gguf_file = located(str(source.path), source.gguf_file)
    if gguf_file is not None and not (output_dir / BASE / "config.json").exists():
        staged = output_dir / f"_{BASE}"
        shutil.rmtree(staged, ignore_errors=True)
        model.save_pretrained(staged)
        sync_all(staged)
        os.rename(staged, output_dir / BASE)


def embed_base(final: Path, source: ModelOptions, output_dir: Path) -> None:
    """Put the base model beside its adapter, so that `final` is complete and names no path.

    transformers loads a folder that holds both from anywhere. A model of the hub goes by its name instead, which
    is the same everywhere. Files are linked where the file system can, so that they take no room.
    """
    place, gguf_file = located(str(source.path), source.gguf_file)
    base = Path(place) if gguf_file is None else output_dir / BASE
    name: str | None = None if base.is_dir() else place
    if base.is_dir() and not (base / "config.json").is_file():  # an adapter that was trained further
        name = json.loads((base / CONFIG).read_text())["base_model_name_or_path"]
        if Path(str(name)).is_dir():
            base, name = Path(str(name)), None
    if name is None:
        for file in _files(base):
            _link(file, final / file.name)
    config = json.loads((final / CONFIG).read_text())
    (final / CONFIG).write_text(
        json.dumps(config | {"base_model_name_or_path": name}, indent=2, sort_keys=True)
    )


def merge(path: str, output: Path, dtype: Any) -> None:
    """Write the model of an adapter's folder as a plain model in `output`, which must not exist."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(path)
    if not (folder / CONFIG).is_file() and (folder / "config.json").is_file():
        raise ConfigError("it is a plain model already: there is nothing to merge", where=path)
    if not (folder / CONFIG).is_file():
        raise ConfigError(
            "there is no adapter", where=path, fix=f"give a folder with {CONFIG}, such as a run's final"
        )
    if output.exists() and any(output.iterdir()):
        raise ConfigError("the folder isn't empty", where=str(output), fix="name another one")
    peft = _peft("ygx merge")
    base = json.loads((folder / CONFIG).read_text())["base_model_name_or_path"]
    with TemporaryDirectory() as alone:  # the base without its adapter, which transformers would load too
        for file in _files(folder):
            os.symlink(file.resolve(), Path(alone) / file.name)
        place = alone if (folder / "config.json").is_file() else base
        model = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(path)
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer))
        merged = peft.PeftModel.from_pretrained(model, path).merge_and_unload(safe_merge=True)
        merged.save_pretrained(output)
    tokenizer.save_pretrained(output)


def _peft(needed_for: str) -> Any:
    try:
        import peft
    except ImportError as error:
        raise MissingExtra("peft", "lora", needed_for=needed_for) from error
    return peft


def _files(base: Path) -> Iterable[Path]:
    return [file for pattern in _BASE_FILES for file in sorted(base.glob(pattern))]


def _link(file: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(file.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copy2(file, target)
