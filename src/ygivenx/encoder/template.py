"""Chat templates, rendered as transformers renders them, and once more with the origin of every character.

Same sandbox, globals, filters and tags as transformers' `apply_chat_template`; beyond it a budget of loop
rounds, seconds and characters, since a template is untrusted code. `Template.trace` gives the same text as a
`Text` (see origins.py), or None where it can't be followed or differs by a byte.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property, lru_cache
from time import monotonic
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.utils
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import RowError
from ..rows.messages import WEIGHT_KEYS
from .origins import (
    TEMPLATE,
    OriginsLost,
    Owned,
    Source,
    Text,
    as_text,
    has_origin,
    join,
    join_any,
    owned,
    percent,
    to_json,
)

MAX_CHARACTERS, MAX_ROUNDS, MAX_SECONDS = 64 << 20, 1_000_000, 20.0
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")  # the names that transformers unites


@dataclass(frozen=True)
class Inputs:
    """What a template sees of a row: messages without nulls and weights, and its further arguments."""

    messages: tuple[dict[str, Any], ...]
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def upto(self, stop: int, *more: dict[str, Any]) -> Inputs:
        """The same with messages[:stop] and `more`."""
        return replace(self, messages=self.messages[:stop] + more)


def inputs_of(messages: Iterable[Mapping[str, Any]], tools: Any, documents: Any, kwargs: Any) -> Inputs:
    """Inputs as transformers prepares them: no nulls, reasoning under each of its names; and no weights."""
    return Inputs(tuple(map(_prepared, messages)), tools, documents, kwargs)


def _prepared(message: Mapping[str, Any]) -> dict[str, Any]:
    m = {k: v for k, v in message.items() if v is not None and k not in WEIGHT_KEYS}
    reasoning = next((m[k] for k in REASONING_FIELDS if k in m), None)
    return m if reasoning is None else {"thinking": reasoning, **m, "reasoning_content": reasoning}


class Template:
    """A compiled chat template; `variables` are the tokenizer's special tokens by name."""

    def __init__(self, source: str, variables: Mapping[str, Any] | None = None) -> None:
        self.source, self.variables = source, dict(variables or {})
        self._plain = _compiled(source, False)

    @cached_property
    def undeclared(self) -> frozenset[str]:
        """The names that the template reads and its caller has to give."""
        environment = _environment(False)
        names = jinja2.meta.find_undeclared_variables(environment.parse(self.source))
        return frozenset(names - set(environment.globals))

    def render(self, inputs: Inputs, *, add_generation_prompt: bool = False) -> str:
        """The text; raises RowError `template_error` with what the template says."""
        return "".join(self._pieces(self._plain, inputs, add_generation_prompt))

    def trace(self, marked: Marked, plain: str, *, add_generation_prompt: bool = False) -> Traced | None:
        """`plain` with the origin of each character, or None where that can't be known."""
        try:
            text = join(self._pieces(_compiled(self.source, True), marked.inputs, add_generation_prompt))
        except (RowError, OriginsLost):
            return None
        return Traced(text, marked.sources) if text == plain else None

    def _pieces(self, compiled: jinja2.Template, inputs: Inputs, prompt: bool) -> list[str]:
        variables = {**self.variables, **inputs.kwargs}
        context = compiled.new_context(
            {
                "messages": list(inputs.messages),
                "tools": inputs.tools,
                "documents": inputs.documents,
                "add_generation_prompt": prompt,
                **variables,
            }
        )
        environment: Any = compiled.environment
        environment.begin(inputs)
        pieces: list[str] = []
        size = 0
        try:
            for piece in compiled.root_render_func(context):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_CHARACTERS:
                    raise _spent(f"more than {MAX_CHARACTERS:,} characters")
        except (RowError, OriginsLost):
            raise
        except RecursionError:
            raise _spent("endless recursion") from None
        except Exception as e:  # a template is someone's program: whatever it raises is about this row
            raise RowError(
                "the chat template fails",
                reason="template_error",
                why=f"{type(e).__name__}: {e}",
                fix="mend the row as the template says, or give another template",
            ) from e
        return pieces


@dataclass(frozen=True)
class Traced:
    """A rendered text with runs of indices into `sources`; sources[0] is the template.

    complete: known to hold every field of its messages.
    """

    text: Text
    sources: tuple[Source, ...]
    complete: bool = False


@dataclass(frozen=True)
class Marked:
    """Inputs whose strings are `Text`s, each an index into `sources`."""

    inputs: Inputs
    sources: tuple[Source, ...]

    def upto(self, stop: int) -> Marked:
        return replace(self, inputs=self.inputs.upto(stop))


def marked(inputs: Inputs) -> Marked:
    """The inputs with each string of a message as a Text of a source of its own; tools, documents and
    arguments have one source each."""
    sources: list[Source] = [Source("template")]

    def mark(value: Any, path: str, message: int, name: str) -> Any:
        if isinstance(value, str):
            sources.append(Source(path, message, name, value))
            return Text.of(value, len(sources) - 1)
        if isinstance(value, Mapping):
            return {
                mark(k, f"{path}.{k} (key)", message, name): mark(v, f"{path}.{k}", message, name)
                for k, v in value.items()
            }
        if isinstance(value, list | tuple):
            return [mark(v, f"{path}[{i}]", message, name) for i, v in enumerate(value)]
        return value

    def mark_whole(value: Any, path: str) -> Any:
        sources.append(Source(path))
        return owned(value, len(sources) - 1)

    messages = tuple(
        {k: mark(v, f"messages[{i}].{k}", i, k) for k, v in m.items()} for i, m in enumerate(inputs.messages)
    )
    tools = None if inputs.tools is None else mark_whole(inputs.tools, "tools")
    documents = None if inputs.documents is None else mark_whole(inputs.documents, "documents")
    kwargs = {k: mark_whole(v, k) for k, v in inputs.kwargs.items()}
    return Marked(Inputs(messages, tools, documents, kwargs), tuple(sources))


# --- the environment -------------------------------------------------------------------------------------


def _spent(what: str) -> RowError:
    return RowError(
        f"the chat template takes too much: {what}",
        reason="template_budget",
        why="a template is a program of someone else's, and this one may never end",
        fix="give a shorter row or another template",
    )


class _Meter:
    """What is left to one rendering."""

    def __init__(self) -> None:
        self.rounds, self.deadline = MAX_ROUNDS, monotonic() + MAX_SECONDS

    def charge(self, rounds: int) -> None:
        self.rounds -= rounds
        if self.rounds < 0:
            raise _spent(f"more than {MAX_ROUNDS:,} rounds of its loops")
        if monotonic() > self.deadline:
            raise _spent(f"more than {MAX_SECONDS:g} seconds")


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


class _Environment(ImmutableSandboxedEnvironment):
    """transformers' environment with a meter at each loop and on each growing string."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        loops = jinja2.ext.loopcontrols
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loops])
        self.meter = _Meter()
        self.row: Any = None
        self.written: dict[Any, tuple[Any, str]] = {}
        self.filters["tojson"] = self._tojson
        self.filters |= {"_metered": self._metered, "_sized": _sized}
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": lambda pattern: datetime.now().strftime(pattern),
            "dict": _Dict(),
            "namespace": _Namespace,
        }

    def begin(self, inputs: Inputs) -> None:
        """A new budget for one rendering; what was written of another row is forgotten."""
        self.meter = _Meter()
        if inputs.tools is not self.row or inputs.tools is None:
            self.row = inputs.tools
            self.written.clear()

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        """The tree with a meter on what each loop runs over and on each text that a variable or call keeps."""
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
        made = jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)
        made.set_environment(self)
        return made

    def _tojson(
        self,
        x: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        """json.dumps, once for each value of a row: its tools are written in every one of its renderings."""
        key = (id(x), ensure_ascii, indent, separators, sort_keys)
        if key not in self.written:
            text = json.dumps(
                x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
            )
            self.written[key] = (x, text)  # x too, so that its id isn't given to another value
        return self.written[key][1]

    def _metered(self, iterable: Any) -> Any:
        try:
            rounds = 1 + len(iterable)
        except TypeError:
            return self._counted(iterable)
        self.meter.charge(rounds)
        return iterable

    def _counted(self, iterable: Iterable[Any]) -> Iterator[Any]:
        for item in iterable:
            self.meter.charge(1)
            yield item

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and abs(right) > 64:
            raise _spent(f"a number to the power {right}")
        if operator == "*":
            for sized, times in ((left, right), (right, left)):
                if isinstance(sized, str | list | tuple) and len(sized) * times > MAX_CHARACTERS:
                    raise _spent(f"a text of more than {MAX_CHARACTERS:,} characters")
        return super().call_binop(context, operator, left, right)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """As the sandbox does it, in one step for what templates read most: fields, variables, loops."""
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
        if kind in (str, Text) and attribute in _OF_STR:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)


def _grows(node: jinja2.nodes.Node) -> bool:
    kinds = (jinja2.nodes.Add, jinja2.nodes.Concat)
    return isinstance(node, kinds) or next(node.find_all(kinds), None) is not None


def _sized(value: Any) -> Any:
    if isinstance(value, str | list) and len(value) > MAX_CHARACTERS:
        raise _spent(f"a text of more than {MAX_CHARACTERS:,} characters")
    return value


# Filters that hand on what they are given.
_PASSING = {
    *["_metered", "_sized", "default", "d", "items", "map", "select", "reject", "selectattr", "rejectattr"]
}


class _TracingEnvironment(_Environment):
    """The same over `Text`: what would make a plain str of one is replaced."""

    concat = staticmethod(join)
    intercepted_binops = frozenset({"*", "**", "%"})  # a plain pattern % a tuple of texts would be plain

    def __init__(self) -> None:
        super().__init__()
        self.filters = {k: f if k in _PASSING else _guarded(f) for k, f in self.filters.items()}
        self.filters |= {
            "tojson": _tojson_traced,
            "join": jinja2.pass_environment(_join_filter),
            "replace": _replace_filter,
            "format": _format_filter,
            "indent": _indent_filter,
            "string": as_text,
        }

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            return percent(left, right)
        return super().call_binop(context, operator, left, right)

    def getattr(self, obj: Any, attribute: str) -> Any:
        return super().getattr(_wrapped(obj) if type(obj) is str else obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        return super().getitem(_wrapped(obj), argument)

    def wrap_str_format(self, value: Any) -> Any:
        made = super().wrap_str_format(value)
        return made and _guarded(made, str(value.__self__))


def _wrapped(obj: Any) -> Any:
    return Text.of(obj, TEMPLATE) if type(obj) is str else obj


@lru_cache(maxsize=2)
def _environment(tracing: bool) -> _Environment:
    return _TracingEnvironment() if tracing else _Environment()


@lru_cache(maxsize=256)
def _compiled(source: str, tracing: bool) -> jinja2.Template:
    try:
        compiled = _environment(tracing).from_string(source)
    except jinja2.TemplateSyntaxError as e:
        why = f"line {e.lineno}: {e.message}"
        raise RowError("the chat template isn't Jinja", reason="template_syntax", why=why) from e
    # Generated code finds these by name; its own would make plain strings.
    names: Any = compiled.root_render_func.__globals__
    if tracing:
        names |= {"str": as_text, "str_join": join_any, "markup_join": join_any}
    else:
        names |= {"str_join": _join_checked, "markup_join": _join_checked}
    return compiled


def _join_checked(parts: Iterable[Any]) -> str:
    parts = [str(p) for p in parts]
    if sum(map(len, parts)) > MAX_CHARACTERS:
        raise _spent(f"a text of more than {MAX_CHARACTERS:,} characters")
    return "".join(parts)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson_traced(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    options = {"ensure_ascii": ensure_ascii, "indent": indent, "separators": separators}
    if not isinstance(x, str | list | tuple | Mapping):
        return json.dumps(x, sort_keys=sort_keys, **options)
    if isinstance(x, Owned):
        return Text.of(json.dumps(x, sort_keys=sort_keys, **options), x.source)
    return to_json(x, sort_keys=sort_keys, **options)


def _guarded(function: Callable[..., Any], *given: str) -> Callable[..., Any]:
    """A function that knows nothing of origins: a str that it makes of one text keeps its source."""

    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if not isinstance(result, str) or isinstance(result, Text):
            return result
        texts = [a for a in (*given, *args, *kwargs.values()) if has_origin(a)]
        if not texts:
            return result
        if len(texts) > 1 or not isinstance(texts[0], Text):
            raise OriginsLost
        return texts[0].made_into(result)

    for mark in ("jinja_pass_arg",):
        if hasattr(function, mark):
            setattr(call, mark, getattr(function, mark))
    return call


def _join_filter(environment: Any, value: Any, d: str = "", attribute: Any = None) -> Text:
    if attribute is not None:
        get = jinja2.filters.make_attrgetter(environment, attribute)
        value = map(get, value)
    parts: list[Any] = []
    for i, item in enumerate(value):
        parts += [d, item] if i else [item]
    return join_any(parts)


def _replace_filter(s: Any, old: Any, new: Any, count: int | None = None) -> Text:
    return Text.replace(_wrapped(as_text(s)), as_text(old), as_text(new), -1 if count is None else count)


def _format_filter(value: Any, *args: Any, **kwargs: Any) -> Text:
    return percent(as_text(value), kwargs or args)


def _indent_filter(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> Text:
    indention = width if isinstance(width, str) else " " * width
    lines = Text.splitlines(join([s, "\n"]))
    out: list[str] = []
    for i, line in enumerate(lines):
        indented = first if i == 0 else bool(line) or blank
        out += ["\n"] if i else []
        out += [indention, line] if indented else [line]
    return join(out)
