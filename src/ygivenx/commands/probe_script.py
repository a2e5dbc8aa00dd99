"""`ygx probe`: run somebody's training script up to its first `train()`, and look at the trainer found there."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Generic, TypeVar

import transformers

from ..errors import ConfigError

T = TypeVar("T")


class _Stop(BaseException):
    """Ends the script; a BaseException, so that no `except Exception` there stops it."""


def at_train(script: Path, arguments: list[str], look: Callable[[Any], T]) -> T:
    """What `look` says of the first transformers trainer (TRL's are such) on which `script` calls train().

    The script runs as it would by itself, as `__main__`, from its own directory's modules; no step is made, and it
    ends there. `look` is called in the place of train(), while everything that the script has opened is open.
    Raises ConfigError if the script ends without calling train(), and whatever `look` raises.
    """
    if not script.is_file():
        raise ConfigError("there is no such script", where=str(script))
    seen: _Look[T] = _Look(look)
    why = "the probe looks at the first transformers.Trainer (or TRL trainer) that is about to train"
    with _as_main(script, arguments), seen.instead_of_train():
        try:
            runpy.run_path(str(script), run_name="__main__")
        except _Stop:
            pass
        except SystemExit as left:
            why = f"it exited with {0 if left.code is None else left.code}; {why}"
        except Exception:
            # What the script's own clean-up makes of the interruption is no finding.
            if not seen.done:
                raise
    if seen.done:
        return seen.result()
    raise ConfigError(
        "the script ended without calling train()",
        where=str(script),
        why=why,
        fix="for a plain loop, put `with yx.probe(model) as p:` around one step and print p.tokens()",
    )


@contextmanager
def output_aside() -> Iterator[None]:
    """What is printed, by child processes too, goes to standard error: one document has standard output."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


class _Look(Generic[T]):
    """The first look and what came of it, kept whatever the script does with the exception that ends it."""

    def __init__(self, look: Callable[[Any], T]) -> None:
        self.look, self._values = look, list[T]()
        self._error: BaseException | None = None

    @property
    def done(self) -> bool:
        return bool(self._values) or self._error is not None

    def result(self) -> T:
        if self._error is not None:
            raise self._error
        return self._values[0]

    def _look_at_first(self, trainer: Any) -> None:
        if self.done:
            return
        try:
            self._values.append(self.look(trainer))
        except BaseException as error:  # not the script's to catch: raised outside of it
            self._error = error

    @contextmanager
    def instead_of_train(self) -> Iterator[None]:
        train = transformers.Trainer.train

        def stop(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            self._look_at_first(trainer)
            raise _Stop

        transformers.Trainer.train = stop
        try:
            yield
        finally:
            transformers.Trainer.train = train


@contextmanager
def _as_main(script: Path, arguments: list[str]) -> Iterator[None]:
    argv, path, folder = sys.argv, sys.path[:], os.getcwd()
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, path
        os.chdir(folder)  # what is written later has a place relative to it
