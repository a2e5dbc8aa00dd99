"""Conversations through the encoder: render, prove, tokenize, weigh.

`candidates` gives, one after the other, what each strategy makes of a row: a `Candidate`, whose text is proven, or the
`RowError` that says why it isn't one. `ChatWork` has a candidate encoded and `sequences_of` checks its ids and weighs
it; where the ids don't fit, the next candidate is taken. The refusal of a row that has none is that of the row as it
stands.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import RowError, nearest
from ..rows.messages import unread_keys
from ..rows.nouns import Conversation
from ..sequence import Segment, Sequence
from ..templating.inputs import Inputs, inputs_of
from ..templating.template import Template
from .assemble import Options, fitted, sequence_of
from .candidates import Candidate, Rendering, Renderings
from .contract import prove, prove_as_rendered, unasked
from .control import control_cuts, refuse_alike, refuse_control
from .dropped import lost_messages, lost_of_context, lost_of_reply, printed_arguments, unfaithful
from .policy import Part, weight_of
from .proofs import Proofs
from .refusals import dropped, dropped_message, not_json, straddle
from .refusals import unfaithful as says_otherwise
from .repairs import IN_TURNS, Strategy, strategies
from .segments import KIND_OF_ROLE, Outline, outline_of, segments_of, with_thoughts
from .spans import apply_spans, left_open
from .thoughts import Tags, tags_of
from .tokens import Encoded, Pieces, across

_KIND_OF_FIELD = {
    "reasoning_content": "reasoning",
    "thinking": "reasoning",
    "reasoning": "reasoning",
    "tool_calls": "tool_call",
}
_KINDS = ("answer", "reasoning", "tool_call", "end_of_turn")
_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"})


@dataclass(frozen=True)
class Chat:
    """A conversation under the template that it is written with.

    wanted: the replies of which some part would be trained; the others are context.
    """

    row: Conversation
    inputs: Inputs
    template: Template
    tags: Tags
    options: Options
    to_train: tuple[int, ...]

    def weight(self, kind: str, i: int) -> float:
        """The weight of a part of reply i, by the policy and the row."""
        last = max((k for k, m in enumerate(self.row.messages) if m.get("role") == "assistant"), default=-1)
        part = Part(kind, True, i, "assistant", i == last, self.row.messages[i].get("weight", 1.0))
        return weight_of(self.options.policy, part)


def chat_of(row: Conversation, options: Options, templates: dict[str, tuple[Template, Tags]]) -> Chat:
    """The chat of a row; templates that are met for the first time are compiled and kept in `templates`."""
    kwargs = {**options.template_kwargs, **row.template_kwargs}
    inputs = inputs_of(row.messages, row.tools, row.documents, kwargs, options.now)
    template, tags = _template(options.tokens.tokenizer, inputs, templates)
    for name in kwargs:
        if name in _RESERVED or name in template.variables or name.endswith("_token"):
            raise _reserved(name)
    replies = [i for i, m in enumerate(row.messages) if m.get("role") == "assistant"]
    chat = Chat(row, inputs, template, tags, options, ())
    return replace(chat, to_train=tuple(i for i in replies if any(chat.weight(k, i) for k in _KINDS)))


def _template(
    tokenizer: Any, inputs: Inputs, templates: dict[str, tuple[Template, Tags]]
) -> tuple[Template, Tags]:
    if not tokenizer.chat_template:
        raise RowError(
            "the tokenizer has no chat template, and this row is a conversation",
            reason="no_template",
            fix="set tokenizer.chat_template, or give the row as text: columns prompt and completion, or x and y",
        )
    try:
        source = tokenizer.get_chat_template(tools=inputs.tools)
    except ValueError as e:  # several by name, and none is the default
        fix = "name one of them 'default', or set tokenizer.chat_template to it"
        raise RowError("no chat template fits this row", reason="no_template", why=str(e), fix=fix) from e
    if source not in templates:
        template = Template(source, tokenizer.special_tokens_map)
        templates[source] = template, tags_of(template)
    return templates[source]


def _reserved(name: str) -> RowError:
    return RowError(
        f"{name!r} isn't a switch of the template's",
        reason="reserved_kwarg",
        field=f"chat_template_kwargs.{name}",
        why="set by a row, it would change which tokens are y",
        fix="remove it; messages, tools and documents are columns of the row",
    )


def notes_on(chat: Chat) -> tuple[str, ...]:
    """What a row says that neither the template nor the encoder reads."""
    source, read = chat.template.source, chat.template.undeclared
    keys = unread_keys(chat.row.messages, source)
    return (
        *(f"the message key {key!r} is read by neither the template nor ygivenx" for key in keys),
        *(
            f"the template doesn't read {name!r} of chat_template_kwargs{nearest(name, read)}"
            for name in chat.inputs.kwargs
            if name not in source
        ),
    )


# --- render and prove ------------------------------------------------------------------------------------


def candidates(chat: Chat) -> Iterator[Candidate | RowError]:
    """What each strategy makes of a row, the least change first."""
    if chat.options.control == "refuse":
        refuse_control(chat.options.tokens, chat.inputs)
    for strategy in strategies_for(chat):
        found = candidate(chat, Renderings(chat.template, strategy.inputs, chat.tags), strategy)
        # Of a strategy that changes the row's inputs the refusal would speak of what the user didn't write.
        if isinstance(found, Candidate) or not strategy.notes:
            yield found
    if chat.options.context == "inference" and len(chat.to_train) > 1 and chat.options.repairs:
        found = reply_by_reply(chat)
        if isinstance(found, Candidate):
            yield found


def strategies_for(chat: Chat) -> Iterator[Strategy]:
    """The strategies for a chat."""
    o = chat.options
    repairs = o.repairs if o.context == "inference" else o.repairs - IN_TURNS
    return strategies(chat.template, chat.inputs, chat.to_train, chat.tags, repairs, o.thoughts)


def candidate(chat: Chat, rendered: Renderings, strategy: Strategy) -> Candidate | RowError:
    """The candidate that a strategy gives, or why it gives none."""
    try:
        renderings = _rendered(chat, rendered, strategy)
        # What placeholders stand for is looked at once they are filled.
        cut = rendered.renderer is chat.template
        outlines = tuple(_outline(chat, r, cut) for r in renderings)
    except RowError as e:
        return e
    return Candidate(outlines, strategy.notes)


def _outline(chat: Chat, rendering: Rendering, cut: bool) -> Outline:
    cuts = control_cuts(chat.options.tokens, rendering, chat.options.control) if cut else ()
    outline = outline_of(rendering, chat.row.messages, cuts)
    return left_open(outline, len(chat.row.messages) - 1) if chat.row.continue_final_message else outline


def _rendered(chat: Chat, rendered: Renderings, strategy: Strategy) -> list[Rendering]:
    """The proven texts of a strategy, with notes of what the template leaves out."""
    tokens, to_train = chat.options.tokens, list(chat.to_train)
    if chat.options.context == "rendered":
        renderings = prove_as_rendered(tokens, rendered, to_train)
    else:
        to_train, notes = _asked_for(chat, rendered, strategy)
        renderings = prove(tokens, rendered, to_train, strategy.in_turns, strategy.forced)
        renderings[:1] = [replace(r, notes=r.notes + notes) for r in renderings[:1]]
    for rendering in renderings:
        _check_texts(chat, rendering, rendered, strategy)
    done = [_complete(chat, r, rendered) for r in renderings]
    done[-1] = _with_lost_context(chat, done[-1], set(to_train))
    return done


def _check_texts(chat: Chat, rendering: Rendering, rendered: Renderings, strategy: Strategy) -> None:
    """Raise RowError where a repair changes what a text of the row says."""
    is_repaired = strategy.notes or any(t.notes for t in rendering.turns)
    if not is_repaired or rendered.renderer is not chat.template:  # a placeholder is only ever written bare
        return
    plain = Renderings(chat.template, chat.inputs, chat.tags)
    try:
        traced = plain.traced(rendering.upto)
    except RowError:  # the template takes the row with the repair alone
        traced = None
    if path := unfaithful(rendering, chat.inputs.messages, chat.tags, traced):
        raise says_otherwise(path)


def _asked_for(chat: Chat, rendered: Renderings, strategy: Strategy) -> tuple[list[int], tuple[str, ...]]:
    """The wanted replies without those that open the conversation unasked, and a note for each of these.

    Nothing is left out if it is all that would be trained, or if the row itself gives it a weight.
    """
    to_train = list(chat.to_train)
    if "opening" not in strategy.in_turns:
        return to_train, ()
    left = [
        i for i in unasked(chat.options.tokens, rendered, to_train) if "weight" not in chat.row.messages[i]
    ]
    if len(left) == len(to_train):
        return to_train, ()
    why = "the template can't ask for a reply before the first question: it is context"
    return [i for i in to_train if i not in left], tuple(f"messages[{i}]: {why}" for i in left)


def _complete(chat: Chat, rendering: Rendering, rendered: Renderings) -> Rendering:
    """The rendering with notes of what its template leaves out of replies; raises RowError if that is trained."""
    for turn in rendering.turns:
        message = rendered.inputs.messages[turn.message]
        if path := printed_arguments(rendering, turn, message):
            raise not_json(f"messages[{turn.message}].{path}")
        for path, name in lost_of_reply(rendering, turn, message, chat.tags):
            kind = _KIND_OF_FIELD.get(name, "answer")
            if chat.options.dropped == "refuse" and chat.weight(kind, turn.message):
                raise dropped(path)
            rendering = replace(rendering, notes=(*rendering.notes, f"{path} is left out by the template"))
    return rendering


def _with_lost_context(chat: Chat, rendering: Rendering, to_train: set[int]) -> Rendering:
    """The rendering with notes of what the template leaves out around replies.

    Raises RowError where that is trained, or is a whole message before a trained reply.
    """
    lost = lost_of_context(rendering, to_train, rendering.upto, chat.tags)
    if chat.options.dropped == "refuse":
        if paths := [p for p in lost if _is_trained(chat.row, p, chat.options)]:
            raise dropped(paths[0], "a message")
        last = max((t.message for t in rendering.turns), default=0)
        if whole := lost_messages(rendering, last):
            raise dropped_message(whole[0], str(chat.row.messages[whole[0]].get("role")))
    notes = tuple(f"{path} is left out by the template" for path in lost)
    return replace(rendering, notes=(*rendering.notes, *notes))


def _is_trained(row: Conversation, path: str, options: Options) -> bool:
    """Whether the message of a path, if it isn't a reply, has a weight of its own."""
    found = _OF_MESSAGE.match(path)
    if not found:
        return False
    i = int(found[1])
    role, own = str(row.messages[i]["role"]), row.messages[i].get("weight", 1.0)
    part = Part(KIND_OF_ROLE.get(role, role), False, i, role, weight=own)
    return role != "assistant" and weight_of(options.policy, part) > 0


def reply_by_reply(chat: Chat) -> Candidate | RowError:
    """Each reply by the first strategy that is proven for it alone: a data set may mix replies with and without
    thoughts even in one conversation."""
    outlines: list[Outline] = []
    for i in chat.to_train:
        alone = replace(
            chat,
            row=replace(chat.row, messages=chat.row.messages[: i + 1]),
            inputs=chat.inputs.upto(i + 1),
            to_train=(i,),
        )
        refusal: RowError | None = None
        for strategy in strategies_for(alone):
            found = candidate(alone, Renderings(chat.template, strategy.inputs, chat.tags), strategy)
            error = found if isinstance(found, RowError) else ids_fault(found, chat.options)
            if error is None and isinstance(found, Candidate):
                break
            refusal = refusal or error
        else:
            assert refusal is not None
            return refusal
        assert isinstance(found, Candidate)
        outlines += [replace(o, notes=(*found.notes, *o.notes)) for o in found.outlines]
    return Candidate(tuple(outlines))


# --- tokenize --------------------------------------------------------------------------------------------


def ids_fault(found: Candidate, options: Options) -> RowError | None:
    """Why the ids of a candidate's prompts don't begin those of its texts; None where they do."""
    for outline, encoded in zip(found.outlines, options.tokens.encode_cut(found.texts), strict=True):
        try:
            _borders(outline, encoded, options, "refuse")
        except RowError as e:
            return e
    return None


def _borders(outline: Outline, encoded: Encoded, options: Options, border: str) -> dict[int, int]:
    """How many tokens stand before each border of each turn, by character; raises RowError `straddling_token`."""
    tokens, cuts = options.tokens, outline.cuts
    borders: dict[int, int] = {}
    for message, start, end, stop in outline.turns:
        for at in (start, end, stop):
            found = tokens.border(encoded, at, cuts)
            if found is None and at == start and border == "mask":
                token = across(encoded, at)
                found = None if token is None else token + 1
            if found is None and at == stop:
                found = tokens.after(encoded, end, stop)
            if found is None:
                raise straddle(encoded, at, f"messages[{message}]")
            borders[at] = found
    for at in [r[0] for r in outline.runs if r[2] and not encoded.tiled]:  # else offsets tell
        if at not in borders and (within := tokens.border(encoded, at, cuts)) is not None:
            borders[at] = within
    return borders


def _apart(texts: Iterable[tuple[Outline, Encoded]], options: Options) -> Iterator[tuple[Outline, Encoded]]:
    """With border="split", a turn whose first token would hold the end of x has a sequence of its own, in which x
    and y are encoded apart; for what follows it is history, as inference would encode it."""
    tokens = options.tokens
    for outline, encoded in texts:
        torn = [t for t in outline.turns if tokens.border(encoded, t[1], outline.cuts) is None]
        if not torn:
            yield outline, encoded
            continue
        tokens.need_plain_joints("border='split'")
        if whole := tuple(t for t in outline.turns if t not in torn):
            yield outline.only(whole, len(outline.text)), encoded
        for turn in torn:
            message, start, _, stop = turn
            own = outline.only((turn,), stop, f"messages[{message}]: {_SPLIT}")
            own = replace(own, cuts=tuple(sorted({start, *own.cuts})))
            yield own, tokens.encode_cut([(own.text, own.cuts)])[0]


# --- weigh -----------------------------------------------------------------------------------------------


def sequences_of(
    chat: Chat, found: Candidate, parts: list[Encoded], notes: tuple[str, ...], border: str
) -> list[Sequence]:
    """The sequences of a candidate with its ids; raises RowError `straddling_token` where these don't fit."""
    options, sequences = chat.options, list[Sequence]()
    texts: Iterable[tuple[Outline, Encoded]] = zip(found.outlines, parts, strict=True)
    for outline, encoded in _apart(texts, options) if border == "split" else texts:
        if options.control != "parse":
            given = {"messages": chat.row.messages, "tools": chat.row.tools, "documents": chat.row.documents}
            refuse_alike(options.tokens, encoded, given)
        outline = with_thoughts(outline, chat.tags, options.thoughts == "empty_masked")
        borders = _borders(outline, encoded, options, border)
        segments = segments_of(outline, encoded, borders)
        weights = _weights(chat, segments, len(encoded.ids))
        of_spans = apply_spans(weights, segments, encoded, chat.row.messages)
        if sequences:
            # What an earlier sequence has already weighed: no reply of this one, even if it begins alike.
            own = min((borders[start] for _, start, _, _ in outline.turns), default=len(weights))
            known = max(_common(s.ids, encoded.ids) for s in sequences)
            weights[: min(own, known)] = 0
        as_text = (_AS_TEXT,) if set(outline.cuts) - {t[1] for t in outline.turns} else ()
        pieces = Pieces(encoded.text, encoded.starts, encoded.stops)
        all_notes = (*notes, *outline.notes, *of_spans, *found.notes, *as_text)
        sequences.append(sequence_of(encoded.ids, weights, segments, pieces, all_notes))
    return fitted(sequences, options.max_length, options.overflow)


def _weights(chat: Chat, segments: list[Segment], length: int) -> npt.NDArray[np.float32]:
    row, weights = chat.row, np.zeros(length, np.float32)
    last = max((i for i, m in enumerate(row.messages) if m.get("role") == "assistant"), default=-1)
    for s in segments:
        message: Mapping[str, Any] = row.messages[s.message] if s.message is not None else {}
        own = message.get("weight", 1.0)
        part = Part(s.kind, s.output, s.message, message.get("role"), s.message == last, own)
        weights[s.start : s.stop] = weight_of(chat.options.policy, part)
    return weights * np.float32(row.weight)


def _common(a: npt.NDArray[np.int64], b: npt.NDArray[np.int64]) -> int:
    """The length of the common prefix of two arrays."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


# --- length ----------------------------------------------------------------------------------------------


def shorter_rows(row: Conversation) -> Iterator[tuple[Conversation, int, int, int]]:
    """The row without its oldest turns, as few as can be first; what stands before the first user stays.

    Each with how many turns are dropped, and of how many; and how many messages stand before those that are.
    """
    first, *later = _turns(row.messages) or [0]
    for n, start in enumerate(later, 1):
        yield replace(row, messages=row.messages[:first] + row.messages[start:]), n, 1 + len(later), first


def _turns(messages: Iterable[Mapping[str, Any]]) -> list[int]:
    """Where turns begin: the first at the first user; each other after a reply or a call's result, if a user speaks
    before the next one."""
    begins: list[int] = []
    start = 0
    for i, role in enumerate(m.get("role") for m in messages):
        if role in ("assistant", "tool"):
            start = i + 1
        elif role == "user" and not begins:
            begins, start = [i], i
        elif role == "user" and start > begins[-1]:
            begins.append(start)
    return begins


def renumbered(sequence: Sequence, first: int, dropped_messages: int) -> Sequence:
    """The sequence with the messages from `first` on numbered as they are in the row, where more stand before them."""
    segments = (
        replace(s, message=s.message + dropped_messages)
        if s.message is not None and s.message >= first
        else s
        for s in sequence.segments
    )
    return replace(sequence, segments=tuple(segments))


# --- a row on its way ------------------------------------------------------------------------------------


@dataclass
class ChatWork:
    """The work of a conversation: its candidates, of which the first is encoded with those of other rows.

    refusal: why the row as it stands is none.
    """

    chat: Chat
    left: Iterator[Candidate | RowError]
    notes: tuple[str, ...] = ()
    refusal: RowError | None = None
    current: Candidate | None = field(default=None, init=False)
    straddling: tuple[Candidate, list[Encoded]] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.advance()

    @property
    def texts(self) -> list[tuple[str, tuple[int, ...]]]:
        """See `assemble.Work`."""
        return self.current.texts if self.current else []

    def advance(self) -> None:
        """Take the next candidate whose text is proven; raises the refusal where there is none."""
        for found in self.left:
            if isinstance(found, Candidate):
                self.current = found
                return
            if self.straddling is None:
                self.refusal = found
        self.current = None
        if self.straddling is None:
            assert self.refusal is not None
            raise self.refusal

    def finish(self, parts: list[Encoded]) -> list[Sequence]:
        """The sequences of the first candidate whose ids fit, or with another border as the options say."""
        options = self.chat.options
        while self.current is not None:
            try:
                return sequences_of(self.chat, self.current, parts, self.notes, "refuse")
            except RowError as e:
                if e.reason != "straddling_token":
                    raise
                if self.straddling is None:
                    self.refusal, self.straddling = e, (self.current, parts)
            self.advance()
            parts = options.tokens.encode_cut(self.texts)
        assert self.straddling is not None
        assert self.refusal is not None
        if options.border in ("mask", "split"):
            return sequences_of(self.chat, *self.straddling, self.notes, options.border)
        raise self.refusal


_AS_TEXT = "control tokens in the row's text are encoded as text: the ids differ from the template's"
_SPLIT = "x and y are encoded apart, as inference would: the ids differ from the template's"
_OF_MESSAGE = re.compile(r"messages\[(\d+)\]")


class Chats:
    """Conversations to work, with what is kept from row to row: compiled templates, and proofs by shape."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._templates: dict[str, tuple[Template, Tags]] = {}
        self._proofs = Proofs()

    def job(self, row: Conversation, notes: tuple[str, ...] = ()) -> ChatWork:
        """The work of a row; raises RowError where no text of it can be proven."""
        chat = chat_of(row, self.options, self._templates)
        return ChatWork(chat, self._proofs.candidates(chat), (*notes, *notes_on(chat)))

    def template(self, inputs: Inputs) -> Template:
        """The template that a row's inputs are written with."""
        return _template(self.options.tokens.tokenizer, inputs, self._templates)[0]

    def sequences(self, row: Conversation, notes: tuple[str, ...] = ()) -> list[Sequence]:
        """The sequences of one row by itself; raises RowError."""
        work = self.job(row, notes)
        return work.finish(self.options.tokens.encode_cut(work.texts))

    def shorter(self, row: Conversation, refusal: RowError) -> list[Sequence]:
        """The sequences of a row without as many of its oldest turns as it takes to fit; raises the refusal."""
        fitting = Chats(replace(self.options, overflow="refuse"))
        for kept, n, count, first in shorter_rows(row):
            most = self.options.max_length
            note = f"the oldest {n} of {count} turns were dropped to fit max_length={most}"
            try:
                sequences = fitting.sequences(kept, (note,))
            except RowError as e:
                if e.reason not in ("too_long", "nothing_trained"):
                    raise
                continue
            return [renumbered(s, first, len(row.messages) - len(kept.messages)) for s in sequences]
        raise refusal
