"""`ygx probe`: run somebody's training up to its first step, and look at the trainer or the loop found there."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..proof.auditing import Report
    from ..proof.probing import Probe

T = TypeVar("T")
TASK = "YGX_PROBE"  # the environment variable that a command's processes find their task by
# Where models that aren't transformers' keep the layer that makes logits.
HEADS = ("lm_head", "output", "head")
NO_STEP = (
    "the probe looks at the first trainer of transformers, TRL, … that is about to train, or at the first step of any "
    "other loop: a forward pass of a language model, backward, an optimiser's step"
)


@dataclass
class LoopStep:
    """The first step of a loop. batches: what the model was fed by name, a mapping for each forward pass."""

    model: Any
    probe: Probe
    batches: list[dict[str, Any]] = field(default_factory=list)
    head: Any = None  # of a model that isn't transformers'


class _Stop(BaseException):
    """Ends the script; a BaseException, so that no `except Exception` there stops it."""


def at_train(script: Path, arguments: list[str], look: Callable[[Any], T]) -> T:
    """What `look` says of the first trainer on which `script` calls train(), or of the LoopStep of a loop of its own.

    A trainer is one of transformers, TRL or others that derive from them; no step of it is made. A loop makes its first
    forward and backward passes, and ends before the optimiser's step; behind it, where that has a closure. The script
    runs as it would by itself, as `__main__`, from its own directory's modules, and `look` is called while everything
    that it has opened is open.
    Raises ConfigError if the script ends without training, and whatever `look` raises.
    """
    if not script.is_file():
        raise ConfigError("there is no such script or command", where=str(script))
    watch: FirstLook[T] = FirstLook(look)
    why = NO_STEP
    with _as_main(script, arguments), watch.patches():
        try:
            runpy.run_path(str(script), run_name="__main__")
        except _Stop:
            pass
        except SystemExit as left:
            why = f"it exited with {0 if left.code is None else left.code}; {why}"
        except Exception:
            # What the script's own clean-up makes of the interruption is no finding.
            if not watch.done:
                raise
        watch.look_at_loop()  # of a script that made no step of an optimiser
    if watch.done:
        return watch.result()
    raise ConfigError(
        "the script ended without training",
        where=str(script),
        why=why,
        fix="put `with yx.probe(model, head=...) as p:` around one step and print p.tokens()",
    )


class FirstLook(Generic[T]):
    """The first look and what came of it, kept whatever the script does with the exception that ends it."""

    def __init__(self, look: Callable[[Any], T], stop: Callable[[], None] | None = None) -> None:
        self.look, self._stop, self._values = look, stop, list[T]()
        self.failure: BaseException | None = None
        self._step: LoopStep | None = None
        self._looking = False
        self._open = ExitStack()

    @property
    def done(self) -> bool:
        return bool(self._values) or self.failure is not None

    def result(self) -> T:
        if self.failure is not None:
            raise self.failure
        return self._values[0]

    @contextmanager
    def patches(self) -> Iterator[None]:
        """Whatever trains inside is looked at; afterwards torch and transformers are what they were."""
        with self._open:
            self.watch_trainers()
            self.watch_loops()
            yield

    def watch_trainers(self) -> None:
        import transformers

        def train(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            self._look_at_first(trainer)
            self._end()

        self._replace(transformers.Trainer, "train", train)

    def watch_loops(self) -> None:
        from torch import nn
        from torch.optim import optimizer

        call = nn.Module.__call__

        def watched(module: Any, *args: Any, **inputs: Any) -> Any:
            if not self._looking:
                self._on_call(module, args, inputs)
            return call(module, *args, **inputs)

        def at_step(*_: Any) -> None:
            if self.look_at_loop():
                self._end()

        self._replace(nn.Module, "__call__", watched)
        # Afterwards, too: a closure makes its passes inside the step.
        for register in (
            optimizer.register_optimizer_step_pre_hook,
            optimizer.register_optimizer_step_post_hook,
        ):
            self._open.callback(register(at_step).remove)

    def look_at_loop(self) -> bool:
        """Look at the step of a loop, if backward has reached a model; whether it did."""
        if self._step is None or self._looking or not self._step.probe.reached:
            return False
        self._look_at_first(self._step)
        return True

    def _on_call(self, module: Any, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        """The first language model that is called with gradient is the one that is probed."""
        import torch

        if not torch.is_grad_enabled() or (self._step is not None and module is not self._step.model):
            return
        whole = [
            v for v in (*args, *inputs.values()) if isinstance(v, torch.Tensor) and not v.is_floating_point()
        ]
        ids = next((v for v in whole if v.dim() == 2), None)
        if self._step is None and ids is not None:
            self._step = _step_of(module)
            if self._step is not None:
                self._step.probe.__enter__()
        if self._step is not None:
            kept = {k: v.detach() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
            self._step.batches.append({"input_ids": ids, **kept})

    def _look_at_first(self, found: Any) -> None:
        if self._looking:
            return
        self._looking = True
        try:
            if self._step is not None:
                self._step.probe.__exit__(None, None, None)
            self._values.append(self.look(found))
        except BaseException as error:  # not the script's to catch: raised outside of it
            self.failure = error

    def _end(self) -> None:
        if self._stop is not None:
            self._stop()
        raise _Stop

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        kept = getattr(owner, name)
        setattr(owner, name, value)
        self._open.callback(setattr, owner, name, kept)


def _step_of(module: Any) -> LoopStep | None:
    """A step of a module that is a language model, by its head; None for any other."""
    from ..proof.probing import probe

    if getattr(module, "get_output_embeddings", lambda: None)() is not None:
        return LoopStep(module, probe(module))
    layers = (getattr(module, name, None) for name in HEADS)
    head = next((h for h in layers if getattr(getattr(h, "weight", None), "ndim", 0) == 2), None)
    return None if head is None else LoopStep(module, probe(module, head), head=head)


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


# -- commands ---------------------------------------------------------------------------------------------


def in_command(command: Sequence[str], options: Mapping[str, Any], html: str | None = None) -> Report:
    """Run a command (`trl sft`, `accelerate launch`, …) and return what is found in its first process to train.

    options: for `examined`. Whatever Python the command starts finds them, through `sitecustomize`, so ygivenx has to
    be installed in that Python. Raises ConfigError if none trains.
    """
    from ..proof.auditing import Report

    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        task = {"options": options, "result": str(result), "html": html and str(Path(html).absolute())}
        (Path(folder) / "task.json").write_text(json.dumps(task))
        (Path(folder) / "sitecustomize.py").write_text(SITE.format(folder=folder))
        source = Path(__file__).parents[2]
        # Where ygivenx is installed beside other packages, these aren't meant for the command's own Python.
        paths = [
            folder,
            "" if source.name == "site-packages" else str(source),
            os.environ.get("PYTHONPATH", ""),
        ]
        own = {TASK: f"{folder}/task.json", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        done = subprocess.run(command, env={**os.environ, **own}, check=False)
        if result.is_file():
            return Report.from_dict(json.loads(result.read_text()))
    raise ConfigError(
        f"the command ended with {done.returncode}, without training",
        where=" ".join(command),
        why=NO_STEP,
        fix="see what it printed; ygivenx has to be installed in the Python that it runs in",
    )


SITE = """import sys
sys.path.remove({folder!r})  # the environment's own sitecustomize, if it has one, comes next
own = sys.modules.pop("sitecustomize")
try:
    import sitecustomize
except ImportError:
    sys.modules["sitecustomize"] = own
from ygivenx.commands.probe_script import watch_imports
watch_imports()
"""


def watch_imports() -> None:
    """In a process of a probed command: watch once it imports torch and transformers; most processes need not."""
    task = json.loads(Path(os.environ[TASK]).read_text())

    def look(found: Any) -> None:
        report = examined(found, **task["options"])
        if os.environ.get("RANK", "0") == "0":
            if task["html"]:
                report.to_html(task["html"])
            Path(task["result"]).write_text(report.to_json())

    def stop() -> None:
        if watch.failure is not None:
            traceback.print_exception(watch.failure)
        sys.stdout.flush()
        os._exit(int(watch.failure is not None))

    watch: FirstLook[None] = FirstLook(look, stop)
    callbacks = {"torch": watch.watch_loops, "transformers.trainer": watch.watch_trainers}
    sys.meta_path.insert(0, _Importing(callbacks))


class _Importing:
    """A finder that calls back once a module has been imported."""

    def __init__(self, callbacks: dict[str, Callable[[], None]]) -> None:
        self.callbacks = callbacks

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in self.callbacks:
            return None
        then = self.callbacks.pop(name)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                run(module)
                then()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def examined(
    found: Any,
    data: str | None,
    columns: Mapping[str, Any],
    tokenizer: str | None,
    suppress: Mapping[str, str],
) -> Report:
    """The audit of a trainer or of a LoopStep, with the rows of a file if there are any.

    tokenizer: a name or directory; by default the one that the model was loaded with.
    """
    from ..encoder.encode import Encoder
    from ..proof.auditing import audit, tokenizer_of
    from .config import ColumnOptions
    from .inputs import open_rows

    rows = None if data is None else list(open_rows(data, ColumnOptions(**columns)))
    if not isinstance(found, LoopStep):
        own = (
            None
            if tokenizer is None or tokenizer_of(found) is not None
            else Encoder.from_pretrained(tokenizer)
        )
        return audit(rows, own, trainer=found, suppress=suppress)
    name = tokenizer or getattr(found.model, "name_or_path", "")
    encoder = None
    if name:
        from transformers import AutoTokenizer

        encoder = Encoder(AutoTokenizer.from_pretrained(name))
    elif rows is not None:
        raise ConfigError("rows, and a model that names no tokenizer", fix="name one: --tokenizer DIRECTORY")
    encoder = Encoder.from_pretrained(name) if name else None
    model = found.model if found.head is None else None
    return audit(rows, encoder, probe=found.probe, batch=found.batches, model=model, suppress=suppress)
