"""Plain pairs: x and y as the model reads them, with a BOS and an end as the tokenizer has them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import ConfigError, RowError
from ..rows.nouns import Pair
from ..sequence import Segment, Sequence
from .assemble import Job, Options, fitted, sequence_of
from .control import refuse_alike
from .policy import Part, weight_of
from .refusals import control_text, straddle
from .tokens import Encoded, Pieces, across, joined


@dataclass(frozen=True)
class _Ends:
    """What is put before x and after y, and whether x already begins with the bos and y ends in the eos."""

    bos: tuple[str, ...]
    eos: tuple[str, ...]
    has_bos: bool
    has_eos: bool


class Pairs:
    """Pairs to jobs."""

    def __init__(self, options: Options) -> None:
        self.options, self.tokens = options, options.tokens

    def job(self, row: Pair) -> Job:
        if not row.x and not row.y:
            raise RowError("x and y are both empty", reason="empty_pair")
        bos = self.tokens.tokenizer.bos_token
        if bos and not row.x and row.y.startswith(bos):  # no model says it: it is x
            row = Pair(bos, row.y[len(bos) :], row.weight)
        ends = self._ends(row)
        cuts = self._controlled(row, ends)
        if self.options.border == "split" and row.x and row.y:
            self.tokens.need_plain_joints("border='split'")
        if self.options.border == "split" or not row.y or not row.x:
            texts = [(row.x, cuts[0]), (row.y, cuts[1])]
        else:
            texts = [(row.x + row.y, (*cuts[0], *(len(row.x) + c for c in cuts[1])))]
        o = self.options
        return Job(texts, lambda p: fitted([self._sequence(row, p, cuts[0], ends)], o.max_length, o.overflow))

    def _ends(self, row: Pair) -> _Ends:
        tokenizer, o = self.tokens.tokenizer, self.options
        bos, eos = tokenizer.bos_token, tokenizer.eos_token
        for name, choice, token in (("bos", o.bos, bos), ("eos", o.eos, eos)):
            if choice is True and not token:
                raise ConfigError(
                    f"{name}=True, but the tokenizer has no {name} token", fix=f"set tokenizer.{name}_token"
                )
        has_bos, has_eos = bool(bos) and row.x.startswith(bos), bool(eos) and row.y.endswith(eos)
        add_bos = o.bos is True or (o.bos == "auto" and self.tokens.adds_bos)
        add_eos = o.eos is True or (o.eos == "auto" and bool(eos))
        return _Ends((bos,) * (add_bos and not has_bos), (eos,) * (add_eos and not has_eos), has_bos, has_eos)

    def _controlled(self, row: Pair, ends: _Ends) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Where x and y are cut so that their control tokens are text; a BOS and an eos at the ends are meant."""
        if self.options.control == "parse":
            return (), ()
        tokenizer = self.tokens.tokenizer
        first = (
            len(tokenizer.bos_token) if tokenizer.bos_token and row.x.startswith(tokenizer.bos_token) else 0
        )
        last = len(row.y) - (len(tokenizer.eos_token) if ends.has_eos else 0)
        whole = row.x + row.y
        across = [m[0] for m in self.tokens.control(whole) if m.start() < len(row.x) < m.end()]
        if across and self.options.border != "split":
            raise control_text(across[0], "y", "x and y together write it; border='split' encodes them apart")
        if self.options.control == "refuse":
            for name, text, start, stop in (("x", row.x, first, len(row.x)), ("y", row.y, 0, last)):
                if found := self.tokens.control(text, start, stop):
                    raise control_text(found[0][0], name)
        x = self.tokens.cuts(row.x, lambda m: m.start() >= first)
        return x, self.tokens.cuts(row.y, lambda m: m.end() <= last)

    def _sequence(self, row: Pair, parts: list[Encoded], cuts: tuple[int, ...], ends: _Ends) -> Sequence:
        encoded, border, notes = self._bordered(row, parts, cuts)
        if self.options.control != "parse":
            refuse_alike(self.tokens, encoded, {"x": row.x, "y": row.y})
        head, tail = ([self._end(token) for token in some] for some in (ends.bos, ends.eos))
        whole = joined([*head, encoded, *tail])
        n, m = len(head), len(head) + len(encoded.ids)
        stop = m - (ends.has_eos and m > n + border)
        # A BOS that x itself begins with is one, too.
        start = n or int(ends.has_bos and border > 0 and encoded.ids[0] == self.tokens.tokenizer.bos_token_id)
        segments = [
            Segment(0, start, "bos"),
            Segment(start, n + border, "prompt"),
            Segment(n + border, stop, "answer", output=True),
            Segment(stop, m + len(tail), "end_of_turn", output=True),
        ]
        weights = np.zeros(m + len(tail), np.float32)
        for s in segments:
            weights[s.start : s.stop] = weight_of(self.options.policy, Part(s.kind, s.output, last=s.output))
        weights *= np.float32(row.weight)
        if ends.eos:
            notes += (f"{ends.eos[0]} was appended to y",)
        pieces = Pieces(whole.text, whole.starts, whole.stops)
        return sequence_of(whole.ids, weights, segments, pieces, notes)

    def _end(self, token: str) -> Encoded:
        """A bos or an eos by itself, as one token."""
        ids = np.array([self.tokens.tokenizer.convert_tokens_to_ids(token)], np.int64)
        return Encoded(token, ids, np.array([0]), np.array([len(token)]), tiled=True)

    def _bordered(
        self, row: Pair, parts: list[Encoded], cuts: tuple[int, ...]
    ) -> tuple[Encoded, int, tuple[str, ...]]:
        """The encoded pair, how many of its tokens are x, and what was done where one token holds both.

        cuts: where x was cut.
        """
        if len(parts) == 2:
            notes = ("x and y are encoded apart",) if self.options.border == "split" else ()
            return joined(parts), len(parts[0].ids), notes
        (encoded,) = parts
        border = self.tokens.border(encoded, len(row.x), cuts)
        if border is not None:
            return encoded, border, ()
        first = across(encoded, len(row.x))
        if self.options.border == "refuse" or first is None:
            raise straddle(encoded, len(row.x), "y")
        token = encoded.text[encoded.starts[first] : encoded.stops[first]]
        masked = self.options.border == "mask"
        side = "masked, as part of x" if masked else "counted as y"
        note = f"the token {token!r} holds the end of x and the beginning of y: {side}"
        return encoded, first + masked, (note,)
