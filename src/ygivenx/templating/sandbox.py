"""The sandbox in which chat templates run, as transformers has it, and what it keeps a template from.

The same globals, filters and tags as transformers' `apply_chat_template`. A template is untrusted code, so a rendering
takes one of two ways:

1. In this process, as long as it does what templates of models do: loops, macros, and operations of which each takes
   time and memory in proportion to what it is given. Rounds, seconds and characters are counted.
2. Whatever else it does (`*` of texts, `**`, padding, most filters, ...) raises `Outside`, and the row is rendered
   again in a process with limits of the operating system (confined.py), where everything is allowed.

An environment holds nothing that changes: what belongs to one rendering (its limits, its time, the JSON of its row's
values) is a `State` in the rendering's own context, so that threads and encoders with different times share nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache, lru_cache
from time import monotonic, thread_time
from types import BuiltinMethodType, MethodType
from typing import Any

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.utils
from jinja2 import nodes
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range

from ..errors import RowError
from .inputs import Inputs

MAX_ROUNDS = 300_000
MAX_SECONDS = 1.0  # of all renderings of one row; longer rows get more of both
ONE = 4 << 20  # characters of one text that an operation makes, at most, in this process
VALUE, STORED = 128 << 10, 8 << 20  # characters of one value that is kept, and of all that are kept
ITEM = 64  # what an item of a list counts, in characters


class Outside(Exception):
    """A template does what may take any amount of memory or time: it is for a process with limits."""


def over_budget(what: str) -> RowError:
    return RowError(
        f"the chat template takes too much: {what}",
        reason="template_budget",
        why="a template is a program of someone else's, and this one may never end",
        fix="give a shorter row or another template",
    )


STATE = "the state of this rendering"  # with spaces, so that no template can name it


class State:
    """What belongs to one rendering: its limits, its time, and its row's values as JSON."""

    __slots__ = ("begun", "deadline", "inputs", "look", "now", "rounds", "stored", "written")

    def __init__(self, inputs: Inputs) -> None:
        self.inputs, self.now, self.written = inputs, inputs.now, inputs.written
        self.rounds, self.stored, self.look = MAX_ROUNDS, STORED, MAX_ROUNDS
        self.begun = monotonic()
        self.deadline = self.begun + MAX_SECONDS - inputs.used.seconds

    def charge(self, rounds: int) -> None:
        self.rounds -= rounds
        if self.rounds < self.look:  # at the clock, after a few rounds
            self.look = self.rounds - 16
            if self.rounds < 0 and self.rounds < -self.inputs.further_rounds:
                raise over_budget(
                    f"more than {MAX_ROUNDS + self.inputs.further_rounds:,} rounds of its loops"
                )
            if monotonic() > self.deadline:
                self._grant()

    def _grant(self) -> None:
        """Past its time by the clock, a row gets once what a long one may take of the processor's own time.

        A process may have been stopped for a while; the processor's time is too slow to be looked at always.
        """
        used, further = self.inputs.used, max(0.5, self.inputs.further_seconds)
        used.until = used.until or thread_time() + further
        if thread_time() > used.until:
            raise over_budget(f"more than {MAX_SECONDS + further:.2g} seconds")

    def keep(self, size: int) -> None:
        """Count a value of so many characters that the template keeps."""
        self.stored -= size
        if (size > VALUE or self.stored < 0) and not Environment.everything:
            more = self.inputs.size
            if size > VALUE + 8 * more or self.stored < -32 * more:
                raise Outside

    def end(self) -> None:
        self.inputs.used.seconds += monotonic() - self.begun


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, a mark of other trainers': its body is rendered as any other text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

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

    def __repr__(self) -> str:  # of namespaces in namespaces, as long as 2 to the power of their number
        if Environment.everything:
            return super().__repr__()
        raise Outside


def _public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace can't hold the private attribute {name!r}")


class _Dict:
    """`dict` for templates, without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


# --- what is done in this process -------------------------------------------------------------------------

_OF_DICT = frozenset(dir(dict))
# Methods of str whose result isn't longer than the text, and those that are looked at first.
_HARMLESS = frozenset(
    "strip lstrip rstrip split rsplit splitlines partition rpartition startswith endswith removeprefix removesuffix "
    "find rfind index rindex count upper lower title capitalize casefold swapcase".split()
).union(name for name in dir(str) if name.startswith("is"))
# Filters that take no longer than a copy of their text, and those that go through what they are given.
_CHEAP = frozenset(
    "default d trim upper lower title capitalize string length count int float abs safe escape e "
    "_metered _kept".split()
)
_CHARGED = frozenset(
    "tojson join replace indent list items dictsort map select reject selectattr rejectattr unique sort first last "
    "min max reverse sum".split()
)
_CONTAINERS = (list, tuple, dict)
_CALLED = frozenset({BuiltinMethodType, MethodType, Macro})
_STATEMENTS = (
    nodes.Output, nodes.For, nodes.If, nodes.Assign, nodes.AssignBlock, nodes.Macro, nodes.CallBlock,
    nodes.FilterBlock, nodes.Break, nodes.Continue,
)  # fmt: skip
# The work between two looks at the clock, in what a template's source holds.
MAX_SOURCE, MAX_NODES, MAX_CALLS, MAX_SUMMANDS = 64 << 10, 5_000, 500, 64
_MAKING = (
    nodes.BinExpr, nodes.Concat, nodes.Call, nodes.Filter, nodes.List, nodes.Tuple, nodes.Dict, nodes.Slice,
)  # fmt: skip


class Environment(ImmutableSandboxedEnvironment):
    """transformers' environment in which each operation is counted, or raises Outside.

    everything: the operating system limits this process, so that nothing raises Outside.
    """

    everything = False
    intercepted_binops = frozenset({"*", "**", "%"})
    texts: tuple[type, ...] = (str,)  # types whose methods are those of str
    size: Callable[[Any], int] = staticmethod(len)  # of a piece that is written

    @staticmethod
    def concat(parts: Iterable[Any]) -> Any:
        """What is written in a macro or a block, as one text."""
        return "".join(measured(parts))

    @staticmethod
    def own_names() -> dict[str, Any]:
        """What generated code finds by name in place of Jinja's own, which would make plain strings."""
        return {"str_join": _join_checked, "markup_join": _join_checked}

    def __init__(self) -> None:
        loops = jinja2.ext.loopcontrols
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loops])
        self.filters |= {"tojson": _to_json, "_metered": _metered, "_kept": _kept}
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _Dict(),
            "namespace": _Namespace,
            "range": _range,
        }
        self.adapt()
        if not self.everything:
            self.filters = {name: _limited(name, f) for name, f in self.filters.items()}
            tests: dict[str, Any] = self.tests
            self.tests |= {name: _of_numbers(tests[name]) for name in ("odd", "even", "divisibleby")}
            self.globals["lipsum"] = outside

    def adapt(self) -> None:
        """Replace filters, tests and globals by those of a subclass."""

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """The tree, with a meter on what each loop runs over and on each value that is kept."""
        if len(source) > MAX_SOURCE and not self.everything:
            raise Outside
        # In the tree, not at run time: generated code then calls the meter by itself.
        tree = super()._parse(source, name, filename)
        if not self.everything:
            _refuse_unusual(tree)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = self._filtered(loop.iter, "_metered")
        for node in list(
            tree.find_all((nodes.Assign, nodes.AssignBlock, nodes.Call, nodes.Macro, nodes.CallBlock))
        ):
            self._meter(node)
        for output in {id(o): o for o in _buffered(tree)}.values():
            output.nodes = self._metered_values(output.nodes)
        return tree

    def _meter(self, node: Any) -> None:
        if isinstance(node, nodes.Assign):
            (node.node,) = self._metered_values([node.node])
        elif isinstance(node, nodes.AssignBlock):
            node.filter = self._filtered(node.filter, "_kept", node.lineno)
        elif isinstance(node, nodes.Call):
            node.args = self._metered_values(node.args)
            for keyword in node.kwargs:
                (keyword.value,) = self._metered_values([keyword.value])
        else:
            node.defaults = self._metered_values(node.defaults)

    def _metered_values(self, values: list[Any]) -> list[Any]:
        return [self._filtered(v, "_kept") if _makes(v) else v for v in values]

    def _filtered(self, node: Any, name: str, line: int | None = None) -> nodes.Filter:
        result = nodes.Filter(node, name, [], [], None, None, lineno=line or node.lineno)
        result.set_environment(self)
        return result

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        # Before it is computed: afterwards the memory or the time is gone.
        if not self.everything:
            _refuse_growing(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """As the sandbox does it; methods of texts, lists and dicts, and macros, need none of what that looks for."""
        __context.parent[STATE].charge(1)
        kind = type(__obj)
        if kind in _CALLED or __obj is _Namespace:
            kwargs.pop("_loop_vars", None)
            kwargs.pop("_block_vars", None)
            return __obj(__context.eval_ctx, *args, **kwargs) if kind is Macro else __obj(*args, **kwargs)
        return super().call(__context, __obj, *args, **kwargs)

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
        if kind in self.texts and attribute in _HARMLESS:
            return getattr(obj, attribute)
        found = super().getattr(obj, attribute)
        if isinstance(obj, str | int | float) and not self.everything and hasattr(type(obj), attribute):
            return _looked_at(found, obj, attribute)
        return found

    def getitem(self, obj: Any, argument: Any) -> Any:
        try:
            return obj[argument]
        except (TypeError, LookupError):
            of_a_text = isinstance(argument, str) and isinstance(obj, str | int | float)
            return self.getattr(obj, argument) if of_a_text else super().getitem(obj, argument)


def outside(*args: Any, **kwargs: Any) -> Any:
    raise Outside


def measured(parts: Iterable[Any]) -> list[Any]:
    """The texts; raises Outside where they would be very long together."""
    texts = parts if isinstance(parts, list) else list(parts)
    if sum(map(len, texts)) > ONE and not Environment.everything:
        raise Outside
    return texts


def _refuse_unusual(tree: nodes.Template) -> None:
    """Raise Outside for statements that templates of models don't have, and for very much between two of them."""
    found = list(tree.find_all(nodes.Node))
    statements = (n for n in found if isinstance(n, nodes.Stmt))
    calls = sum(isinstance(n, nodes.Call | nodes.Filter | nodes.Slice) for n in found)
    if len(found) > MAX_NODES or calls > MAX_CALLS or not all(isinstance(n, _STATEMENTS) for n in statements):
        raise Outside
    for node in found:
        if isinstance(node, nodes.For) and node.recursive:
            raise Outside
        if isinstance(node, nodes.Name) and node.name in ("varargs", "kwargs"):  # values that nothing weighs
            raise Outside
        if isinstance(node, nodes.Add | nodes.Concat):
            summands = (nodes.Add, nodes.Concat)
            if sum(1 for _ in node.find_all(summands)) > MAX_SUMMANDS:
                raise Outside


def _buffered(tree: nodes.Template) -> Iterator[nodes.Output]:
    """What is written in macros and blocks, which is kept until their end."""
    for block in tree.find_all((nodes.Macro, nodes.CallBlock, nodes.AssignBlock, nodes.FilterBlock)):
        yield from block.find_all(nodes.Output)


def _makes(node: nodes.Node) -> bool:
    """Whether an expression may give a value that wasn't there before; `get` hands one on."""
    if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr) and node.node.attr == "get":
        return False
    return isinstance(node, _MAKING) or next(node.find_all(_MAKING), None) is not None


@jinja2.pass_context
def _kept(context: Context, value: Any) -> Any:
    """A value that the template keeps, its size charged to the rendering."""
    if isinstance(value, str):
        context.parent[STATE].keep(16 + len(value))
    elif isinstance(value, _CONTAINERS):
        context.parent[STATE].keep(_weight(value))
    return value


def _weight(value: Any) -> int:
    """The characters of a value written out, roughly; no more is counted than what is too much anyway."""
    total, left = 0, [value]
    while left and total < ONE:
        item = left.pop()
        total += ITEM
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, dict):
            left += [*item, *item.values()]
        elif isinstance(item, list | tuple):
            left += item
    return total


def _limited(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter as this process has it."""
    if name in _CHEAP:
        return function
    if name not in _CHARGED:
        return outside
    look = _LOOKS.get(name)
    given = _GIVEN[getattr(function, "jinja_pass_arg", None)]

    @jinja2.pass_context
    def call(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        has_size = isinstance(value, str | list | tuple | dict)
        context.parent[STATE].charge(1 + len(value) // ITEM if has_size else 1)
        if look:
            look(value, *args, **kwargs)
        return function(*given(context), value, *args, **kwargs)

    return call


# What a filter takes first, by Jinja's mark on it.
_GIVEN: dict[Any, Callable[[Context], tuple[Any, ...]]] = {
    None: lambda context: (),
    jinja2.utils._PassArg.context: lambda context: (context,),
    jinja2.utils._PassArg.eval_context: lambda context: (context.eval_ctx,),
    jinja2.utils._PassArg.environment: lambda context: (context.environment,),
}


def _look_at_json(value: Any, *args: Any, **kwargs: Any) -> None:
    for option in (*args, *kwargs.values()):
        for o in option if isinstance(option, list | tuple) else [option]:
            if (isinstance(o, str) and len(o) > 16) or (isinstance(o, int) and o > 16):
                raise Outside


def _look_at_join(value: Any, d: Any = "", attribute: Any = None) -> None:
    between = len(str(d))
    if isinstance(value, str | list | tuple):
        if len(value) * between + _weight(value) > ONE:
            raise Outside
    elif between > ITEM:  # of what isn't known how many there are
        raise Outside


def _look_at_replace(text: Any, old: Any, new: Any, count: Any = -1) -> None:
    if len(text) * len(new) > ONE and len(text) + text.count(old) * len(new) > ONE:
        raise Outside


def _look_at_indent(text: Any, width: Any = 4, *args: Any, **kwargs: Any) -> None:
    by = len(width) if isinstance(width, str) else width
    if text.count("\n") * by + by > ONE:
        raise Outside


_LOOKS: dict[str, Callable[..., None]] = {
    "tojson": _look_at_json,
    "join": _look_at_join,
    "replace": _look_at_replace,
    "indent": _look_at_indent,
}
_FIELD = re.compile(r"\{\w*\}")


def _looked_at(method: Any, text: Any, name: str) -> Any:
    """A method of a text whose result may be longer than the text: it looks at its arguments first."""
    if name not in ("join", "replace", "format") or not isinstance(text, str):
        raise Outside

    def call(*args: Any, **kwargs: Any) -> Any:
        if name == "format":
            _look_at_format(text, (*args, *kwargs.values()))
        elif name == "replace":
            _look_at_replace(text, *args, **kwargs)
        else:
            args = (list(args[0]),)
            _look_at_join(args[0], text)
        return method(*args, **kwargs)

    return call


def _look_at_format(text: str, values: tuple[Any, ...]) -> None:
    fields = _FIELD.findall(text)
    if str.count(text, "{") != len(fields) or (len(fields) + 1) * _weight(values) > ONE:
        raise Outside


def _refuse_growing(operator: str, left: Any, right: Any) -> None:
    """Raise Outside for `*`, `**` and `%` unless of numbers of a usual size, or a short text a few times."""
    if isinstance(left, int | float) and isinstance(right, int | float):
        is_large = any(isinstance(v, int) and v.bit_length() > 64 for v in (left, right))
        if is_large or (operator == "**" and abs(right) > 64):
            raise Outside
    elif (
        operator != "*"
        or not isinstance(left, str)
        or not isinstance(right, int)
        or len(left) * right > VALUE
    ):
        raise Outside


def _of_numbers(test: Any) -> Callable[..., bool]:
    def call(value: Any, *args: Any) -> bool:
        if isinstance(value, str):
            raise Outside
        return bool(test(value, *args))

    return call


@jinja2.pass_context
def _range(context: Context, *args: Any) -> range:
    result = safe_range(*args)
    _state(context).charge(1 + len(result) // ITEM)
    return result


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
    if len(pattern) > 1000 and not Environment.everything:
        raise Outside
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
    """The template in an environment of this kind; raises RowError `template_syntax`, or Outside."""
    try:
        result = environment(kind).from_string(source)
    except jinja2.TemplateSyntaxError as e:
        why = f"line {e.lineno}: {e.message}"
        raise RowError("the chat template isn't Jinja", reason="template_syntax", why=why) from e
    except (RecursionError, SyntaxError, ValueError, MemoryError, OverflowError, SystemError) as e:
        why = f"Python can't compile it: {type(e).__name__}: {str(e)[:200]}"
        raise RowError("the chat template can't be read", reason="template_syntax", why=why) from e
    # Generated code finds Jinja's own functions in its globals, not in the environment.
    names: Any = result.root_render_func.__globals__
    names |= environment(kind).own_names()
    return result


def _join_checked(parts: Iterable[Any]) -> str:
    return "".join(measured(map(str, parts)))


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
