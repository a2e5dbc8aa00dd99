"""Options: each stands once, as a field of a dataclass; flags, YAML, checks, help and the reference come from it.

Plain dataclasses rather than pydantic or tyro: most of a run's options are fields of transformers' TrainingArguments
and PEFT's LoraConfig, which are dataclasses, so one reader of fields (`fit`) serves ours and theirs, and typer, which
we have anyway, makes flags of annotations.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import typer

from ..errors import ConfigError, nearest, refuse_unknown

T = TypeVar("T")


@dataclass(frozen=True)
class Bounds:
    """Numbers from `least` to `most`; without `least` itself where it is `open`."""

    least: float = 0
    most: float = math.inf
    open: bool = False

    def __contains__(self, value: float) -> bool:
        return (self.least < value if self.open else self.least <= value) and (
            value <= self.most and value != math.inf
        )

    def __str__(self) -> str:
        if self.most < math.inf:
            return f"a number from {self.least} to {self.most}"
        return f"a number {'>' if self.open else '≥'} {self.least}"


COUNT, PAIR = Bounds(1), Bounds(2)


def option(
    default: Any, help: str, *, flags: str = "", bounds: Bounds | None = None, default_text: str = "",
    required: bool = False, bare: str = "",
) -> Any:  # fmt: skip
    """A field that is an option.

    flags: names on the command line, by default `--the-name`. default_text: what help shows for a default of None.
    bare: in an option of `name=value`, the name of a value that stands alone.
    """
    facts = {
        "help": help, "flags": flags.split(), "bounds": bounds, "default_text": default_text,
        "required": required, "bare": bare,
    }  # fmt: skip
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=facts)
    return field(default=default, metadata=facts)


def flags_of(f: Any) -> list[str]:
    """The flags of an option, the long one first."""
    return f.metadata["flags"] or [f"--{f.name.replace('_', '-')}"]


def key_of(f: Any) -> str:
    """The name of an option in a flat YAML file, and of a command's parameter: that of its long flag."""
    return flags_of(f)[0][2:].split("/")[0].replace("-", "_")


# -- values ------------------------------------------------------------------------------------------------


def fit(name: str, value: Any, hint: Any, where: str) -> Any:
    """`value` as the annotation `hint` has it, raising ConfigError where it can't be.

    YAML reads 2e-5 as text, and a bool is not a number.
    """
    for kind in _members(hint):
        try:
            return _as(kind, value)
        except (TypeError, ValueError):
            continue
    raise ConfigError(f"{name} must be {_described(hint)}, got {value!r}{_near(value, hint)}", where=where)


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _as(kind: Any, value: Any) -> Any:
    """Raises TypeError or ValueError where `value` is no `kind`."""
    kind_of = get_origin(kind) or kind
    if kind_of is Any:
        return value
    # A list would split a text into its letters.
    if kind_of is list and isinstance(value, str):  # one of them
        return [value]
    if kind_of is Literal:
        # True == 1 and 1.0 == 1: a choice has to be of the same type, too.
        if value in get_args(kind) and type(value) is type(get_args(kind)[get_args(kind).index(value)]):
            return value
    elif isinstance(kind_of, type) and issubclass(kind_of, Enum):
        return kind_of(value).value
    elif kind_of is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        return float(value)
    elif isinstance(value, kind_of) and (kind_of is bool or not isinstance(value, bool)):
        return value
    raise TypeError(kind)


def choices(hint: Any) -> list[Any]:
    """The values that an annotation lists."""
    found: list[Any] = []
    for kind in _members(hint):
        if get_origin(kind) is Literal:
            found += get_args(kind)
        elif isinstance(kind, type) and issubclass(kind, Enum):
            found += [member.value for member in kind]
    return found


def _near(value: Any, hint: Any) -> str:
    return nearest(str(value), map(str, choices(hint)))


def _described(hint: Any) -> str:
    """The type in words: `int`, `one of cosine, linear`."""
    if found := choices(hint):
        return f"one of {', '.join(map(str, found))}"
    kinds = [getattr(get_origin(k) or k, "__name__", str(k)) for k in _members(hint) if k is not type(None)]
    return " or ".join(kinds)


def checked(name: str, value: Any, f: Any, hint: Any, where: str) -> Any:
    """The value of an option of ours, in its type and bounds."""
    value = fit(name, value, hint, where)
    bounds = f.metadata["bounds"]
    if bounds is not None and value is not None and value not in bounds:
        raise ConfigError(f"{name} is {value!r}", where=where, fix=f"give {bounds}")
    return value


def fields_by_name(names: Iterable[str], kind: Any, what: str, where: str) -> dict[str, Any]:
    """The annotation of each of `names` in dataclass `kind` of another library. Raises ConfigError for others."""
    known = {f.name for f in fields(kind)}
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown {what} {name!r}{nearest(name, known)}", where=where)
    hints = get_type_hints(kind)
    return {name: hints[name] for name in names}


def named_values(given: Iterable[str] | None, flag: str, bare: str = "") -> dict[str, Any]:
    """`name=value` texts as a mapping; a value is JSON where it can be, else text. Raises ConfigError."""
    values: dict[str, Any] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not equals and not bare:
            raise ConfigError(f"{flag} {text}: no value", fix=f"{flag} name=value")
        name, value = (name, value) if equals else (bare, text)
        try:
            values[name] = json.loads(value)
        except json.JSONDecodeError:
            values[name] = value
    return values


def check_options(names: Iterable[str], where: str) -> None:
    """Raise ConfigError for a name that is no option of Encoder, or one that commands have a flag for."""
    from ..encoder.encode import OPTIONS

    refuse_unknown("option of the encoder", names, OPTIONS, where)


# -- flags -------------------------------------------------------------------------------------------------


def with_sections(command: Callable[..., T], unset: bool = False) -> Callable[..., T]:
    """A typer command whose parameters that are sections become the options of their fields.

    unset: every option is None until it is given, and the command gets the given ones as one mapping per section:
    what wasn't given may stand in a file.
    """
    parameters, sections = _expanded(command, unset)

    def flat(**values: Any) -> T:
        for name, section in sections.items():
            own = {f.name: values.pop(key_of(f)) for f in fields(section)}
            own = {f.name: _parsed(f, own[f.name]) for f in fields(section)}
            values[name] = (
                {k: v for k, v in own.items() if v is not None} if unset else _section_from(section, own)
            )
        return command(**values)

    # Typer reads names, annotations and help from the function itself.
    functools.update_wrapper(flat, command, ("__module__", "__name__", "__qualname__", "__doc__"))
    del vars(flat)["__wrapped__"]  # typer would look at the signature behind it
    vars(flat)["__signature__"] = inspect.Signature(parameters)
    flat.__annotations__ = {p.name: p.annotation for p in parameters}
    return flat


def _expanded(command: Callable[..., Any], unset: bool) -> tuple[list[inspect.Parameter], dict[str, Any]]:
    hints = get_type_hints(command, include_extras=True)
    parameters, sections = [], {}
    for p in inspect.signature(command).parameters.values():
        if is_dataclass(hints[p.name]):
            sections[p.name] = hints[p.name]
            parameters += _parameters(hints[p.name], unset)
        else:
            parameters.append(p.replace(annotation=hints[p.name], kind=inspect.Parameter.KEYWORD_ONLY))
    return parameters, sections


def _parameters(section: Any, unset: bool) -> list[inspect.Parameter]:
    """The options of a section, required ones first."""
    hints = get_type_hints(section)
    ordered = sorted(fields(section), key=lambda f: not f.metadata["required"])
    return [
        inspect.Parameter(
            key_of(f),
            inspect.Parameter.KEYWORD_ONLY,
            default=_parameter_default(f, unset),
            annotation=_annotation(f, hints[f.name], section.__name__.removesuffix("Section"), unset),
        )
        for f in ordered
    ]


def _annotation(f: Any, hint: Any, panel: str, unset: bool) -> Any:
    flag = _flag(f, hint, unset, panel if unset else None)
    return Annotated[_flag_type(hint, unset or f.metadata["required"]), flag]


def _parameter_default(f: Any, unset: bool) -> Any:
    if f.metadata["required"] and not unset:
        return inspect.Parameter.empty
    return None if unset or isinstance(default_of(f), dict) else default_of(f)


def _parsed(f: Any, value: Any) -> Any:
    """A flag's value; `name=value` texts become a mapping, or None where there are none."""
    if not isinstance(default_of(f), dict):
        return value
    return named_values(value, flags_of(f)[0], f.metadata["bare"]) or None


def _flag_type(hint: Any, unset: bool) -> Any:
    """What typer parses; choices are text here, since `fit` has the better message."""
    if any(get_origin(kind) in (dict, list) for kind in _members(hint)):
        return list[str] | None
    kinds = [k for k in _members(hint) if k is not type(None)]
    kind = str if any(get_origin(k) is Literal or k is str for k in kinds) else kinds[0]
    return kind | None if unset or len(kinds) < len(_members(hint)) else kind


def _flag(f: Any, hint: Any, unset: bool, panel: str | None) -> Any:
    flags, default = flags_of(f), default_of(f)
    if hint is bool and "/" not in flags[0]:
        flags = [f"{flags[0]}/--no-{flags[0][2:]}" if unset else flags[0], *flags[1:]]
    text = f.metadata["default_text"] or ("" if default in (None, {}) else str(default))
    return typer.Option(*flags, help=meaning_of(f, hint), show_default=text or False, rich_help_panel=panel)


def meaning_of(f: Any, hint: Any) -> str:
    """The help of an option, with its choices where the help doesn't name them."""
    found, text = list(map(str, choices(hint))), str(f.metadata["help"])
    return text if all(c in text for c in found) else f"{text} ({', '.join(found)})"


def default_of(f: Any) -> Any:
    """The default of a field."""
    return f.default_factory() if f.default_factory is not MISSING else f.default


def _section_from(section: type[T], values: Mapping[str, Any]) -> T:
    """A section from flags, checked; what wasn't given has its default."""
    hints = get_type_hints(section)
    named = {f.name: f for f in fields(cast(Any, section))}
    if "further" in named and values["further"]:
        check_options(values["further"], flags_of(named["further"])[0])
    return section(
        **{
            name: checked(flags_of(f)[0], values[name], f, hints[name], "")
            for name, f in named.items()
            if values[name] is not None
        }
    )
