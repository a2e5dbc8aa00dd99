"""Stage 3, tokenize: texts to ids, with the place of each token in the text where the tokenizer tells it truly.

The Rust tokenizer is called directly, as `apply_chat_template(tokenize=True)` calls it: no special tokens
added, no truncation, no padding. Its offsets are believed only if they tile the text without a gap; a border
is else proved by encoding what stands before it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, RowError, nearest

if TYPE_CHECKING:
    from .policy import Options
    from .render import Candidate, Outline

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Encoded:
    """A text's ids, int64 [T], and each token's characters [starts, stops), int64 [T].

    `tiled`: the offsets cover the text without a gap and in order, so that they can be believed. A slow
    tokenizer tells none: starts and stops are then all 0.
    """

    text: str
    ids: Ints
    starts: Ints
    stops: Ints
    tiled: bool


class TokenTexts(Sequence[str]):
    """The text of each token, for people: made when it is first asked for, and never encoded."""

    __slots__ = ("_texts",)

    def __init__(self) -> None:
        self._texts: tuple[str, ...] | None = None

    def _all(self) -> tuple[str, ...]:
        if self._texts is None:
            self._texts = tuple(self._cut())
        return self._texts

    def _cut(self) -> Iterator[str]:
        raise NotImplementedError

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> tuple[str, ...]: ...
    def __getitem__(self, i: int | slice) -> str | tuple[str, ...]:
        return self._all()[i]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __hash__(self) -> int:
        return hash(self._all())

    def __repr__(self) -> str:
        return repr(self._all())


class Pieces(TokenTexts):
    """By the tokens' places in a text. A character of several tokens is the first one's: together they are the text."""

    __slots__ = ("starts", "stops", "text")

    def __init__(self, text: str, starts: Ints, stops: Ints) -> None:
        super().__init__()
        self.text, self.starts, self.stops = text, starts, stops

    def __len__(self) -> int:
        return len(self.starts)

    def _cut(self) -> Iterator[str]:
        done = 0
        for start, stop in zip(self.starts.tolist(), self.stops.tolist(), strict=True):
            yield self.text[max(start, done) : stop]
            done = stop


class Tokens:
    """A tokenizer as the encoder needs it. `stops` are texts of tokens that end a turn, beside its eos.

    special: the tokens that structure a text, id by text: the tokenizer's special ones, the stops and the headers
    of turns, which some models have among their ordinary added tokens. Raises ConfigError for a stop that is no
    token of its own.
    """

    def __init__(self, tokenizer: Any, stops: Iterable[str] = (), headers: Iterable[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        special = {str(t): i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        special |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        _check_ends(tokenizer)
        special |= _added(tokenizer, (*stops, *headers))
        self.special: dict[str, int] = {t: i for t, i in special.items() if t}
        self.stops = frozenset({tokenizer.eos_token, *stops} & self.special.keys())
        self.declares_stops = bool(tuple(stops))
        self._ids_of = lru_cache(256)(self.ids)  # of what stands before a reply: mostly one header

    @cached_property
    def _control(self) -> re.Pattern[str]:
        longest_first = sorted(self.special, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def control(self, text: str, start: int = 0, stop: int | None = None) -> list[re.Match[str]]:
        """The special tokens written in text[start:stop]."""
        return list(self._control.finditer(text, start, len(text) if stop is None else stop))

    def has_control(self, text: str) -> re.Match[str] | None:
        return self._control.search(text)

    def alike(self, encoded: Encoded) -> Iterator[tuple[str, str]]:
        """(special token, what the text has in its place), where normalisation made the one of the other.

        A token that is looked for after a normaliser which lowercases is found in `<|IM_END|>`, too.
        """
        for k in np.flatnonzero(np.isin(encoded.ids, list(self._normalised))) if self._normalised else ():
            token, written = (
                self._normalised[int(encoded.ids[k])],
                encoded.text[encoded.starts[k] : encoded.stops[k]],
            )
            if written.strip() != token:
                yield token, written

    @cached_property
    def _normalised(self) -> dict[int, str]:
        """The special tokens that the tokenizer looks for in what it has normalised, by id."""
        if self.backend is None or self.backend.normalizer is None:
            return {}
        added = self.tokenizer.added_tokens_decoder
        return {i: t for t, i in self.special.items() if i in added and added[i].normalized}

    def cuts(self, text: str, foreign: Callable[[re.Match[str]], bool]) -> tuple[int, ...]:
        """Where to cut a text so that no foreign special token is left whole: after its first character."""
        cuts: list[int] = []
        at = 0
        while found := self._control.search(text, at):
            if foreign(found):
                if len(found[0]) == 1:
                    raise RowError(f"{found[0]!r} can't be encoded as text", reason="control_text")
                # "<" and "|im_end|>" apart are no special token; the rest is searched again, since a token may hold
                # another.
                cuts.append(found.start() + 1)
                at = found.start() + 1
            else:
                at = found.end()
        if cuts:
            self.need_plain_joints("control='text'")
        return tuple(cuts)

    def need_plain_joints(self, option: str) -> None:
        """Raise RowError if texts encoded apart don't join: the tokenizer puts a space before each."""
        if self._puts_space:
            raise RowError(
                f"{option} encodes texts apart, and this tokenizer puts a space before each",
                reason="prefix_space",
                why="the ids would say another text than the row does",
                fix="another choice of border= or control=, or a tokenizer without prefix space",
            )

    @cached_property
    def _puts_space(self) -> bool:
        if self.backend is None:
            first = self.tokenizer.convert_ids_to_tokens(
                self.tokenizer.encode("a", add_special_tokens=False)[:1]
            )
        else:
            first = self.backend.encode("a", add_special_tokens=False).tokens[:1]
        return bool(first) and first[0][:1] in ("▁", "Ġ")

    def encode_cut(self, texts: Sequence[tuple[str, tuple[int, ...]]]) -> list[Encoded]:
        """Each text, its pieces between the cuts encoded apart."""
        pieces = [[text[a:b] for a, b in pairwise((0, *cuts, len(text)))] for text, cuts in texts]
        encoded = iter(self.encode([p for some in pieces for p in some]))
        return [joined([next(encoded) for _ in some]) for some in pieces]

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Each text, its special tokens parsed; what stands between them is encoded once where it can be."""
        if self.backend is None:
            return [self._slow(t) for t in texts]
        cutting = self._cutting
        if cutting is None:
            return self.encode_whole(texts)
        parts = [_parts(cutting, t) for t in texts]
        # Turns of one row share most of their text, and rows a system prompt: each part is encoded once in a batch.
        unique = list(dict.fromkeys(chain.from_iterable(parts)))
        known = dict(zip(unique, self.encode_whole(unique), strict=True))
        return [joined([known[p] for p in some], t) for t, some in zip(texts, parts, strict=True)]

    @cached_property
    def _cutting(self) -> re.Pattern[str] | None:
        return cutting_tokens(self.backend)

    def encode_whole(self, texts: Sequence[str]) -> list[Encoded]:
        """Each text by one call of the tokenizer."""
        if self.backend.truncation is not None:
            self.backend.no_truncation()
        if self.backend.padding is not None:
            self.backend.no_padding()
        encodings = self.backend.encode_batch(list(texts), add_special_tokens=False)
        return [_encoded(t, e) for t, e in zip(texts, encodings, strict=True)]

    def ids(self, text: str) -> Ints:
        return self.encode([text])[0].ids

    def _slow(self, text: str) -> Encoded:
        ids = np.array(self.tokenizer.encode(text, add_special_tokens=False), np.int64)
        nowhere = np.zeros_like(ids)
        return Encoded(text, ids, nowhere, nowhere, tiled=False)

    def border(self, encoded: Encoded, character: int, cuts: tuple[int, ...] = ()) -> int | None:
        """How many tokens lie wholly before a character, if the ids before it are a prefix; else None.

        cuts: where the text was cut, as `encode_cut` does.
        """
        if not encoded.tiled:
            own_cuts = tuple(c for c in cuts if c < character)
            prefix = self.encode_cut([(encoded.text[:character], own_cuts)])[0].ids
            return len(prefix) if np.array_equal(prefix, encoded.ids[: len(prefix)]) else None
        if across(encoded, character) is not None:
            return None
        before = int(encoded.starts.searchsorted(character))
        # No token stands across, and yet white space that ends a text may be split otherwise if a word follows.
        if before and encoded.text[character - 1].isspace():
            first, start = self._part_of(encoded, before, max((c for c in cuts if c <= character), default=0))
            alone = self._ids_of(encoded.text[start:character])
            return before if np.array_equal(alone, encoded.ids[first:before]) else None
        return before

    def _part_of(self, encoded: Encoded, before: int, cut: int) -> tuple[int, int]:
        """(the first of the tokens that were encoded together with the one before token `before`, its character)."""
        # From the border back to the last special token or cut: so much was encoded together, and so much is encoded
        # again.
        first = before
        while first and encoded.starts[first - 1] >= cut:
            piece = encoded.text[encoded.starts[first - 1] : encoded.stops[first - 1]]
            if self._cutting is not None and self._cutting.fullmatch(piece):
                break
            first -= 1
        return first, max(cut, int(encoded.stops[first - 1]) if first else 0)

    def after(self, encoded: Encoded, start: int, stop: int) -> int | None:
        """One past the special token text[start:stop] that takes in white space behind it, as some tokenizers' do."""
        k = int(encoded.starts.searchsorted(start))
        if k == len(encoded.ids) or encoded.ids[k] != self.special.get(encoded.text[start:stop]):
            return None
        return k + 1 if encoded.text[stop : encoded.stops[k]].isspace() else None

    @cached_property
    def adds_bos(self) -> bool:
        """Whether the tokenizer itself begins a text with its BOS."""
        bos = self.tokenizer.bos_token_id
        return bos is not None and list(self.tokenizer("a")["input_ids"])[:1] == [bos]


def _check_ends(tokenizer: Any) -> None:
    """Raise ConfigError for a bos or eos that the vocabulary lacks: its pieces would be trained in its place."""
    for name in ("bos_token", "eos_token"):
        token = getattr(tokenizer, name)
        if token and tokenizer.encode(token, add_special_tokens=False) != [
            tokenizer.convert_tokens_to_ids(token)
        ]:
            raise ConfigError(
                f"tokenizer.{name} is {token!r}, which is no token of this tokenizer",
                why="it would be written in pieces, at which no generation stops",
                fix=f"set tokenizer.{name} to a token of the vocabulary, or add it to tokenizer and model",
            )


def across(encoded: Encoded, character: int) -> int | None:
    """The token that holds characters before and after this place; None without, or where no offset is known."""
    token = int(encoded.starts.searchsorted(character)) - 1
    return token if encoded.tiled and token >= 0 and encoded.stops[token] > character else None


def _added(tokenizer: Any, stops: Iterable[str]) -> dict[str, int]:
    known = {str(t): i for i, t in tokenizer.added_tokens_decoder.items()}
    for stop in stops:
        if stop not in known:
            raise ConfigError(
                f"stops: {stop!r} is no token of its own in this tokenizer{nearest(stop, known)}",
                fix="name a special or added token, as tokenizer.added_tokens_decoder lists them",
            )
    return {stop: known[stop] for stop in stops}


def joined(parts: Sequence[Encoded], text: str | None = None) -> Encoded:
    """Texts encoded apart, one after the other; `text` is all of them, if it is known."""
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return _NOTHING
    shifts = [0, *accumulate(len(p.text) for p in parts[:-1])]
    shift = np.repeat(shifts, [len(p.ids) for p in parts])
    return Encoded(
        "".join([p.text for p in parts]) if text is None else text,
        np.concatenate([p.ids for p in parts]),
        np.concatenate([p.starts for p in parts]) + shift,
        np.concatenate([p.stops for p in parts]) + shift,
        all(p.tiled for p in parts),
    )


_NONE = np.zeros(0, np.int64)
_NOTHING = Encoded("", _NONE, _NONE, _NONE, tiled=True)


def _parts(cutting: re.Pattern[str], text: str) -> list[str]:
    """The text cut around these tokens."""
    parts: list[str] = []
    at = 0
    for found in cutting.finditer(text):
        start, stop = found.span()
        if at < start:
            parts.append(text[at:start])
        parts.append(text[start:stop])
        at = stop
    if at < len(text):
        parts.append(text[at:])
    return parts


def _encoded(text: str, encoding: Any) -> Encoded:
    ids = np.array(encoding.ids, np.int64)
    flat = np.fromiter(chain.from_iterable(encoding.offsets), np.int64, 2 * len(ids))
    starts, stops = flat[::2], flat[1::2]
    return Encoded(text, ids, starts, stops, _tiles(starts, stops, len(text)))


def _tiles(starts: Ints, stops: Ints, length: int) -> bool:
    if not len(starts):
        return length == 0
    # Every character lies in some token, and tokens come in order: then offsets can be relied upon. Tokens that hold
    # bytes of one character overlap.
    whole = starts[0] == 0 and stops[-1] == length
    if whole and np.array_equal(starts[1:], stops[:-1]):
        return True
    in_order = (starts[1:] >= starts[:-1]) & (stops[1:] >= stops[:-1])
    return bool(whole and (in_order & (starts[1:] <= stops[:-1])).all())


# === borders =============================================================================================
# The contract's last part: the ids of what inference shows begin those of the text.


def ids_fault(found: Candidate, options: Options) -> RowError | None:
    """Why the ids of a candidate's prompts don't begin those of its texts; None where they do."""
    for outline, encoded in zip(found.outlines, options.tokens.encode_cut(found.texts), strict=True):
        try:
            borders_of(outline, encoded, options, "refuse")
        except RowError as e:
            return e
    return None


def borders_of(outline: Outline, encoded: Encoded, options: Options, border: str) -> dict[int, int]:
    """How many tokens stand before each border of each turn, by character; raises RowError `straddling_token`."""
    tokens, cuts = options.tokens, outline.cuts
    borders: dict[int, int] = {}
    for message, start, end, stop in outline.turns:
        for at in (start, end, stop):
            found = tokens.border(encoded, at, cuts)
            # The token that straddles is context: y begins with the one behind it.
            if found is None and at == start and border == "mask":
                token = across(encoded, at)
                found = None if token is None else token + 1
            # A stop may take in the line break behind it.
            if found is None and at == stop:
                found = tokens.after(encoded, end, stop)
            if found is None:
                raise straddle(encoded, at, f"messages[{message}]")
            borders[at] = found
    for at in [r[0] for r in outline.runs if r[2] and not encoded.tiled]:  # else offsets tell
        if at not in borders and (within := tokens.border(encoded, at, cuts)) is not None:
            borders[at] = within
    return borders


# === where a text can be cut =============================================================================
# A tokenizer of the Rust library first takes its added tokens out of the text, the leftmost and longest first, and then
# normalises, splits and encodes what stands between them, each part by itself. So a text can be cut before and after an
# added token that (1) is found as it stands, before normalisation, with no regard to its neighbours, and (2) no other
# added token can overlap or hold. What a row's turns have in common is then encoded once. Whatever isn't known to work
# part by part (`_APART`) is encoded whole, which is the slow twin.


# Steps that know nothing of what stands before their part.
_APART = {
    "normalizer": set(
        "NFC NFD NFKC NFKD Lowercase StripAccents Replace Sequence Prepend Precompiled".split()
    ),
    "pre_tokenizer": set("Split ByteLevel Digits Punctuation Whitespace WhitespaceSplit Sequence".split()),
    "post_processor": {"TemplateProcessing", "ByteLevel", "Sequence"},
}
_MODELS = {"BPE", "Unigram", "WordLevel", "WordPiece"}


def cutting_tokens(backend: Any) -> re.Pattern[str] | None:
    """A pattern of the tokens around which this tokenizer's texts can be cut; None if there are none."""
    model = backend.model
    if (
        type(model).__name__ not in _MODELS
        or getattr(model, "dropout", None)
        or backend.encode_special_tokens
    ):
        return None
    if not all(_works_by_parts(_settings(getattr(backend, step)), known) for step, known in _APART.items()):
        return None
    alone = sorted(_alone(list(backend.get_added_tokens_decoder().values())), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, alone))) if alone else None


def _settings(step: Any) -> dict[str, Any] | None:
    """What a step of the tokenizer is made of. The whole would come with its vocabulary, half a second's work."""
    return None if step is None else json.loads(step.__getstate__())


def _works_by_parts(step: Mapping[str, Any] | None, known: set[str]) -> bool:
    if step is None:
        return True
    inner: list[Any] = next(
        (v for k, v in step.items() if k in ("normalizers", "pretokenizers", "processors")), []
    )
    trims = step["type"] == "ByteLevel" and "processors" not in step and step.get("trim_offsets")
    moves = trims and known is _APART["post_processor"]  # its offsets depend on the place in the text
    return step["type"] in known and not moves and all(_works_by_parts(i, known) for i in inner)


def _alone(added: Sequence[Any]) -> list[str]:
    """The special tokens that nothing can overlap, by what they are and how they are found."""
    raw = [t.content for t in added if not t.normalized]
    tails = {t[i:] for t in raw for i in range(1, len(t))}
    everything = "\0".join(raw)
    return [
        t.content
        for t in added
        if t.special and not (t.normalized or t.lstrip or t.rstrip or t.single_word)
        if _bounded(t.content) and everything.count(t.content) == 1
        if not any(t.content[:n] in tails for n in range(1, len(t.content) + 1))
    ]


def _bounded(token: str) -> bool:
    """Whether it begins and ends in what is neither white space nor part of a word, to which flags of others look."""
    ends = (token[:1], token[-1:])
    return all(end and not end.isspace() and not end.isalnum() and end != "_" for end in ends)


# === refusals ============================================================================================


def straddle(encoded: Encoded, at: int, field: str) -> RowError:
    """A token across the border of x and y, or white space before it that is split otherwise if a word follows."""
    if (k := across(encoded, at)) is not None:
        token = repr(encoded.text[encoded.starts[k] : encoded.stops[k]])
        what = f"the token {token} holds the end of x and the beginning of y"
    else:
        what = "the ids of x aren't a prefix of the ids of x and y together"
    return RowError(
        what,
        reason="straddling_token",
        field=field,
        why="inference shows x encoded alone: the model would be trained on ids that it never sees",
        fix="border='y' counts a token that holds both as y, border='mask' as x, border='split' encodes x and y apart"
        if field == "y"
        else "border='split' encodes x and y apart, border='mask' leaves a token that holds both out of y",
    )
