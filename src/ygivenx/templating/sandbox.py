"""The sandbox in which chat templates run, as transformers has it, and a budget for each rendering.

The same globals, filters and tags as transformers' `apply_chat_template`; beyond them limits on loop rounds, seconds
and characters, since a template is untrusted code. An environment holds nothing that changes: what belongs to one
rendering (its budget, its time, the JSON of its row's values) is a `State` in the rendering's own context, so that
threads and encoders with different times share nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from functools import cache, lru_cache
from time import monotonic
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.utils
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import RowError
from .inputs import Inputs

MAX_CHARACTERS, MAX_ROUNDS, MAX_SECONDS = 64 << 20, 1_000_000, 20.0


def over_budget(what: str) -> RowError:
    return RowError(
        f"the chat template takes too much: {what}",
        reason="template_budget",
        why="a template is a program of someone else's, and this one may never end",
        fix="give a shorter row or another template",
    )


STATE = "the state of this rendering"  # with spaces, so that no template can name it


class State:
    """What belongs to one rendering: what is left of its budget, its time, and its row's values as JSON."""

    def __init__(self, inputs: Inputs) -> None:
        self.rounds, self.deadline = MAX_ROUNDS, monotonic() + MAX_SECONDS
        self.now, self.written = inputs.now, inputs.written

    def charge(self, rounds: int) -> None:
        self.rounds -= rounds
        if self.rounds < 0:
            raise over_budget(f"more than {MAX_ROUNDS:,} rounds of its loops")
        if monotonic() > self.deadline:
            raise over_budget(f"more than {MAX_SECONDS:g} seconds")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, a mark of other trainers': its body is rendered as any other text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(jinja2.utils.Namespace):
    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _public(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _public(name)
        super().__setitem__(name, value)


def _public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace can't hold the private attribute {name!r}")


class _Dict:
    """`dict` for templates, without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


_OF_DICT = frozenset(dir(dict))
_OF_STR = frozenset(n for n in dir(str) if n[0] != "_") - {"format", "format_map"}


class Environment(ImmutableSandboxedEnvironment):
    """transformers' environment with a meter at each loop and on each growing string."""

    intercepted_binops = frozenset({"*", "**"})
    texts: tuple[type, ...] = (str,)  # types whose methods are those of str
    size: Callable[[Any], int] = staticmethod(len)  # of a piece that is written

    @staticmethod
    def own_names() -> dict[str, Any]:
        """What generated code finds by name in place of Jinja's own, which would make plain strings."""
        return {"str_join": _join_checked, "markup_join": _join_checked}

    def __init__(self) -> None:
        loops = jinja2.ext.loopcontrols
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loops])
        self.filters |= {"tojson": _to_json, "_metered": _metered, "_sized": _sized}
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _Dict(),
            "namespace": _Namespace,
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        """The tree with a meter on what each loop runs over and on each text that a variable or call keeps."""
        # In the tree, not at run time: generated code then calls the meter by itself, and a template can't take it
        # away.
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(jinja2.nodes.For)):
            loop.iter = self._filtered(loop.iter, "_metered")
        for assignment in list(tree.find_all(jinja2.nodes.Assign)):
            if _grows(assignment.node):
                assignment.node = self._filtered(assignment.node, "_sized")
        for call in list(tree.find_all(jinja2.nodes.Call)):
            call.args = [self._filtered(a, "_sized") if _grows(a) else a for a in call.args]
        return tree

    def _filtered(self, node: Any, name: str) -> jinja2.nodes.Filter:
        result = jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)
        result.set_environment(self)
        return result

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        # Before it is computed: afterwards the memory or the time is gone.
        if operator == "**" and abs(right) > 64:
            raise over_budget(f"a number to the power {right}")
        if operator == "*":
            for sized, times in ((left, right), (right, left)):
                if isinstance(sized, str | list | tuple) and len(sized) * times > MAX_CHARACTERS:
                    raise over_budget(f"a text of more than {MAX_CHARACTERS:,} characters")
        return super().call_binop(context, operator, left, right)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """As the sandbox does it, in one step for what templates read most: fields, variables, loops."""
        # The sandbox's own way asks several questions for each access. These kinds are known to hold no harm under
        # such names; everything else goes the long way.
        kind = type(obj)
        if kind is dict and attribute not in _OF_DICT:
            try:
                return obj[attribute]
            except KeyError:
                return self.undefined(obj=obj, name=attribute)
        if kind in (_Namespace, LoopContext) and attribute[:1] != "_":
            try:
                return getattr(obj, attribute)
            except AttributeError:
                return self.undefined(obj=obj, name=attribute)
        if kind in self.texts and attribute in _OF_STR:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)


def _grows(node: jinja2.nodes.Node) -> bool:
    kinds = (jinja2.nodes.Add, jinja2.nodes.Concat)
    return isinstance(node, kinds) or next(node.find_all(kinds), None) is not None


def _sized(value: Any) -> Any:
    if isinstance(value, str | list) and len(value) > MAX_CHARACTERS:
        raise over_budget(f"a text of more than {MAX_CHARACTERS:,} characters")
    return value


@jinja2.pass_context
def _to_json(
    context: Context,
    x: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """json.dumps, once for each value of a row: its tools are written in every one of its renderings."""
    written = _state(context).written
    key = (id(x), ensure_ascii, indent, separators, sort_keys)
    if key not in written:
        text = json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
        written[key] = (x, text)  # x too, so that its id isn't given to another value
    return written[key][1]


@jinja2.pass_context
def _metered(context: Context, iterable: Any) -> Any:
    """What a loop runs over, its rounds charged to the rendering's budget."""
    state = _state(context)
    try:
        rounds = 1 + len(iterable)
    except TypeError:
        return _counted(state, iterable)
    state.charge(rounds)
    return iterable


def _counted(state: State, iterable: Iterable[Any]) -> Iterator[Any]:
    for item in iterable:
        state.charge(1)
        yield item


@jinja2.pass_context
def _strftime_now(context: Context, pattern: str) -> str:
    return _state(context).now.strftime(pattern)


def _state(context: Context) -> State:
    state: State = context.parent[STATE]
    return state


@cache
def environment(kind: Callable[[], Environment]) -> Environment:
    """The one environment of a kind (a class of them): nothing in it changes, so that threads can share it."""
    return kind()


@lru_cache(maxsize=256)
def compiled(source: str, kind: Callable[[], Environment]) -> jinja2.Template:
    """The template in an environment of this kind; raises RowError `template_syntax`."""
    try:
        result = environment(kind).from_string(source)
    except jinja2.TemplateSyntaxError as e:
        why = f"line {e.lineno}: {e.message}"
        raise RowError("the chat template isn't Jinja", reason="template_syntax", why=why) from e
    # Generated code finds Jinja's own functions in its globals, not in the environment.
    names: Any = result.root_render_func.__globals__
    names |= environment(kind).own_names()
    return result


def _join_checked(parts: Iterable[Any]) -> str:
    parts = [str(p) for p in parts]
    if sum(map(len, parts)) > MAX_CHARACTERS:
        raise over_budget(f"a text of more than {MAX_CHARACTERS:,} characters")
    return "".join(parts)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
