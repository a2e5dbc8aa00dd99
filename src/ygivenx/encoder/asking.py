"""The sandbox over holes: what could look into one without asking it is replaced, or undecided."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jinja2.filters import do_default

from .holes import Hole, Opaque, Sheet, Undecided, side_by_side, undecided, written
from .sandbox import Environment

_OF_STR = frozenset(dir(str))
_METHODS = frozenset(n for n in vars(Hole) if n in _OF_STR and n[0] != "_")
# What tests say of every text; the others compare, or aren't asked of what can't be looked into.
_TESTS = {
    **dict.fromkeys(("string", "sequence", "iterable", "defined"), True),
    **dict.fromkeys(
        (
            "mapping",
            "number",
            "integer",
            "float",
            "boolean",
            "none",
            "undefined",
            "callable",
            "true",
            "false",
        ),
        False,
    ),
}
_COMPARING = {"eq", "equalto", "==", "ne", "!=", "in"}
_FILTERS: dict[str, Callable[..., Any]] = {
    "trim": lambda text, chars=None: text.strip(chars),
    "string": lambda text: text,
    "_sized": lambda text: text,
    **dict.fromkeys(("default", "d"), do_default),
}


class AskingEnvironment(Environment):
    """The sandbox over holes: what could look into one without asking is replaced, or undecided."""

    concat: Any = staticmethod(side_by_side)
    size = staticmethod(lambda piece: 1)
    sheet = Sheet()

    @staticmethod
    def own_names() -> dict[str, Any]:
        join = side_by_side
        return {"str": written, "str_join": join, "markup_join": join}

    def __init__(self) -> None:
        super().__init__()
        tests: dict[str, Any] = dict(self.tests)
        self.tests = {k: _asking_test(k, f) for k, f in tests.items()}
        self.filters = {k: _asking_filter(k, f) for k, f in self.filters.items()}
        self.filters["random"] = self.globals["lipsum"] = undecided

    def getattr(self, obj: Any, attribute: str) -> Any:
        return self._of_hole(obj, attribute) if isinstance(obj, Opaque) else super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        return self._of_hole(obj, argument) if isinstance(obj, Opaque) else super().getitem(obj, argument)

    def _of_hole(self, obj: Any, name: Any) -> Any:
        """A method that a hole has; nothing where a str has nothing of this name."""
        if isinstance(name, str) and name not in _OF_STR:
            return self.undefined(obj="a text", name=name)
        if name in _METHODS and isinstance(obj, Hole):
            return getattr(obj, name)
        raise Undecided


def _asking_test(name: str, test: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(a, Opaque) for a in args) or name in _COMPARING:
            return test(*args, **kwargs)
        if name in _TESTS and isinstance(args[0], Opaque):
            return _TESTS[name]
        raise Undecided

    return _passed_alike(call, test)


def _asking_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(a, Opaque) for a in (*args, *kwargs.values())):
            return function(*args, **kwargs)
        return _FILTERS.get(name, undecided)(*args, **kwargs)

    return _passed_alike(call, function)


def _passed_alike(call: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """The mark by which Jinja knows that a function takes its environment or context first."""
    if hasattr(function, "jinja_pass_arg"):
        call.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
    return call
