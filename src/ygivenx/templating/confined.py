"""A rendering in a process of its own, whose memory and time the operating system limits.

For templates that do what may take any amount of either (see sandbox.py). The process is started when it is first
needed, takes one request a line as JSON, and answers in one; where it is ended by a limit, the row is refused and the
next request starts another one. It can neither write files nor start processes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from time import monotonic
from typing import Any

from ..errors import RowError
from .inputs import Inputs
from .origins import OriginsLost, Text, text_with
from .writing import Owned

MEMORY = 256 << 20  # bytes beyond what the process has before its first request
SECONDS = 1.5  # of its processor's time; by the clock twice as many
_MAIN = "from ygivenx.templating.confined import serve; serve()"


def ask(request: dict[str, Any]) -> dict[str, Any]:
    """What the process answers. Raises RowError for what the template raises, and OriginsLost."""
    answer = _process.ask(json.dumps(request))
    if "refused" in answer:
        what, reason, why, fix = map(str, answer["refused"])
        raise RowError(what, reason=reason, why=why, fix=fix)
    if "lost" in answer:
        raise OriginsLost
    return answer


def render(source: str, variables: Mapping[str, Any], inputs: Inputs, prompt: bool, traced: bool) -> Any:
    """The text of a rendering, as a Text if traced; raises as `ask` does. Its time is that of the row."""
    begun, used = monotonic(), inputs.used
    try:
        answer = ask(
            {
                "source": source,
                "variables": _packed(variables),
                "inputs": _packed([inputs.messages, inputs.tools, inputs.documents, inputs.kwargs]),
                "now": inputs.now.isoformat(),
                "prompt": prompt,
                "traced": traced,
                "seconds": max(0.01, SECONDS + inputs.further_seconds - used.seconds),
            }
        )
    except (TypeError, RecursionError) as error:
        raise RowError(
            "this row can't be rendered by this template",
            reason="template_error",
            why=str(error),
            fix="give texts, numbers, lists and objects alone",
        ) from error
    finally:
        used.seconds += monotonic() - begun
    if not traced:
        return str(answer["text"])
    return text_with(str(answer["text"]), tuple((int(stop), int(source)) for stop, source in answer["runs"]))


def names(source: str) -> frozenset[str]:
    """The names that a template reads and its caller has to give."""
    return frozenset(map(str, ask({"source": source})["names"]))


# --- values on their way ----------------------------------------------------------------------------------


def _packed(value: Any) -> Any:
    if isinstance(value, Text):
        return ["text", str.__str__(value), value.runs]
    if isinstance(value, Owned):
        return ["owned", value.source, [[_packed(k), _packed(v)] for k, v in value.items()]]
    if isinstance(value, Mapping):
        return ["dict", [[_packed(k), _packed(v)] for k, v in value.items()]]
    if isinstance(value, list | tuple):
        return ["list", [_packed(v) for v in value]]
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"it has a value of type {type(value).__name__}")


def _unpacked(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    kind, *rest = value
    if kind == "text":
        return text_with(rest[0], tuple((stop, source) for stop, source in rest[1]))
    if kind == "list":
        return [_unpacked(v) for v in rest[0]]
    pairs = ((_unpacked(k), _unpacked(v)) for k, v in rest[-1])
    if kind == "dict":
        return dict(pairs)
    result = Owned(pairs)
    result.source = rest[0]
    return result


# --- the process, seen from outside -----------------------------------------------------------------------


class _Process:
    """The one process of this one, made when it is needed, and again after a fork."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.child: subprocess.Popen[str] | None = None
        os.register_at_fork(after_in_child=self.__init__)  # type: ignore[misc]

    def ask(self, line: str) -> dict[str, Any]:
        with self.lock:
            if self.child is None:
                self.child = _started()
            assert self.child.stdin is not None
            assert self.child.stdout is not None
            answer = ""
            with suppress(BrokenPipeError):
                self.child.stdin.write(line + "\n")
                self.child.stdin.flush()
                answer = self.child.stdout.readline()
            if not answer.endswith("\n"):
                self.child.kill()
                self.child.communicate()
                self.child = None
                raise _ended()
            return dict(json.loads(answer))


def _started() -> subprocess.Popen[str]:
    if sys.platform == "win32":
        raise RowError(
            "this chat template does what isn't done without limits of the operating system",
            reason="template_budget",
            fix="use it on Linux or macOS, or give another template",
        )
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-P", "-c", _MAIN],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        encoding="utf-8",
        start_new_session=True,  # Ctrl-C is for the program that waits
    )


def _ended() -> RowError:
    from .sandbox import over_budget

    return over_budget(f"more than {SECONDS:g} seconds, or {MEMORY >> 20} MB of memory")


_process = _Process()


# --- the process itself -----------------------------------------------------------------------------------


def serve() -> None:
    """Answer requests until there are none."""
    from .sandbox import Environment

    Environment.everything = True
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    before = _limit()
    for line in sys.stdin:
        request = json.loads(line)
        _allow(before + 24 * len(line), request.get("seconds", SECONDS))
        try:
            answer = _answer(request)
        except MemoryError:
            answer = {"refused": _fields(_ended())}
        _allow(before + 24 * len(line), 0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _limit() -> int:
    """Take away what a rendering doesn't need; returns the bytes of memory that this process has."""
    import resource

    for name in ("RLIMIT_FSIZE", "RLIMIT_NPROC", "RLIMIT_CORE"):
        with suppress(ValueError, OSError):
            resource.setrlimit(getattr(resource, name), (0, 0))
    try:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[0]) * resource.getpagesize()
    except OSError:  # not Linux
        return 1 << 30


def _allow(memory: int, seconds: float) -> None:
    """The memory and the time for one request; past its time the process is ended by a signal. 0: any time."""
    import resource

    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (memory + MEMORY, resource.RLIM_INFINITY))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 2 * seconds)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    from .template import Template

    try:
        template = Template(request["source"], _unpacked(request.get("variables")))
        if "inputs" not in request:
            return {"names": sorted(template.undeclared)}
        messages, tools, documents, kwargs = _unpacked(request["inputs"])
        inputs = Inputs(tuple(messages), tools, documents, kwargs, datetime.fromisoformat(request["now"]))
        return template.answer(inputs, request["prompt"], request["traced"])
    except RowError as error:
        return {"refused": _fields(error)}
    except OriginsLost:
        return {"lost": True}


def _fields(error: RowError) -> list[str]:
    return [error.what, error.reason, error.why or "", error.fix or ""]
