"""`ygx probe`: run somebody's training script up to its first `train()`, and audit the trainer found there."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers

from ..errors import ConfigError


class _Found(BaseException):
    """Carries the trainer out of the script; a BaseException, so that no `except Exception` there stops it."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer


def trainer_of(script: Path, arguments: list[str]) -> Any:
    """The first transformers trainer (TRL's are such) on which `script`, run with `arguments`, calls train().

    The script runs as it would by itself, as `__main__`, from its own directory's modules; no step is made.
    Raises ConfigError if it ends without calling train().
    """
    if not script.is_file():
        raise ConfigError("there is no such script", where=str(script))
    with _as_main(script, arguments), _stopped_at_train():
        try:
            runpy.run_path(str(script), run_name="__main__")
        except _Found as found:
            return found.trainer
    raise ConfigError(
        "the script ended without calling train()",
        where=str(script),
        why="the probe looks at the first transformers.Trainer (or TRL trainer) that is about to train",
        fix="for a plain loop, put `with yx.probe(model) as p:` around one step and print p.tokens()",
    )


@contextmanager
def _as_main(script: Path, arguments: list[str]) -> Iterator[None]:
    argv, path = sys.argv, sys.path[:]
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, path


@contextmanager
def _stopped_at_train() -> Iterator[None]:
    train = transformers.Trainer.train

    def stop(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise _Found(self)

    transformers.Trainer.train = stop
    try:
        yield
    finally:
        transformers.Trainer.train = train
