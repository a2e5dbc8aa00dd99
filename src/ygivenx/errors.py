"""One tree of errors. Each says what is wrong, where, why it matters and what to do.

YgivenxError
├── DataError            a file or its format can't be read at all
├── RowError             one row can't be used; batches turn it into `Rejected`
├── ConfigError          an option, a key of a config file or an argument
├── ModelError           a model, a head or a layer type that can't be computed exactly
├── LossError            a non-finite loss, or a step without any weight
├── CheckpointError      a checkpoint that is incomplete or was altered
└── MissingExtra         an optional dependency that is not installed
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from .show import visible


class YgivenxError(Exception):
    """Base of all errors raised on purpose.

    Args: `what` is wrong, `where` (file, line, row, message, field, character), `why` it matters and the
    `fix`. All but `what` may be empty.
    """

    def __init__(self, what: str, *, where: str = "", why: str = "", fix: str = "") -> None:
        self.what, self.where, self.why, self.fix = what, where, why, fix
        super().__init__(what)

    def __reduce__(self) -> Any:  # errors travel between processes, keyword arguments and all
        return _remade, (type(self), self.args, self.__dict__)

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        lines = [head]
        if self.why:
            lines.append(f"  why: {self.why}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return visible("\n".join(lines))  # it quotes rows and templates, and is read in terminals


def _remade(kind: type[YgivenxError], args: tuple[Any, ...], state: dict[str, Any]) -> YgivenxError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class DataError(YgivenxError, ValueError):
    """A file or its format can't be read at all."""


class RowError(YgivenxError, ValueError):
    """One row can't be used.

    `reason` is a short stable code (`"no_end_of_turn"`, `"control_text"`, ...) that counts are kept by;
    `field` names the place inside the row, such as `messages[2].content`.
    """

    def __init__(
        self, what: str, *, reason: str, field: str = "", where: str = "", why: str = "", fix: str = ""
    ) -> None:
        self.reason, self.field = reason, field
        super().__init__(what, where=", ".join(w for w in (where, field) if w), why=why, fix=fix)


class ConfigError(YgivenxError, ValueError):
    """An option, a key of a config file or an argument."""


class ModelError(YgivenxError, ValueError):
    """A model, a head or a layer type that can't be computed exactly."""


class LossError(YgivenxError, ArithmeticError):
    """A non-finite loss, or a step without any weight."""


class CheckpointError(YgivenxError):
    """A checkpoint that is incomplete or was altered."""


class MissingExtra(YgivenxError, ImportError):
    """An optional dependency that is not installed."""

    def __init__(self, package: str, extra: str, *, needed_for: str) -> None:
        super().__init__(
            f"the package {package!r} is not installed",
            why=f"it is needed for {needed_for}",
            fix=f"pip install 'ygivenx[{extra}]'",
        )


def nearest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the closest known word, or an empty string."""
    # 0.5: a guess that is wrong costs a glance, and none costs a search in the docs.
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def refuse_unknown(what: str, given: Iterable[object], known: Iterable[str], where: str = "") -> None:
    """Raise ConfigError for the first of `given` that isn't one of `known`."""
    known = list(known)
    for name in given:
        if name not in known:
            message = f"unknown {what} {name!r}{nearest(str(name), known)}"
            raise ConfigError(message, where=where, fix=f"known: {', '.join(known)}")
