"""Conversations: rendered, proven, kept from forging control tokens, encoded, weighed and fitted."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import RowError
from ..rows.messages import unread_keys
from ..rows.nouns import Conversation
from ..sequence import Segment, Sequence
from .assemble import Job, Options, fitted, made, straddle
from .contract import Contract
from .control import control_cuts, refuse_alike, refuse_control
from .fields import lost_of_context, lost_of_reply, printed_arguments
from .inputs import Inputs, inputs_of
from .layout import KIND_OF_ROLE, Outline, outline_of, segments_of, with_thoughts
from .policy import Part, weight_of
from .renderings import Draft, Row
from .repair import IN_TURNS, alternatives
from .shapes import Shapes
from .spans import apply_spans, left_open
from .template import Template
from .tokens import Encoded, Pieces, across

_KIND_OF_FIELD = {
    "reasoning_content": "reasoning",
    "thinking": "reasoning",
    "reasoning": "reasoning",
    "tool_calls": "tool_call",
}


Cut = tuple[Outline, tuple[int, ...]]  # a text, and where it is cut so that no control token is a row's


class Chats:
    """Conversations to jobs."""

    def __init__(self, options: Options) -> None:
        self.options, self.tokens = options, options.tokens
        self.contract = Contract(self.tokens)
        self._templates: dict[str, Template] = {}
        self._shapes: dict[str, Shapes] = {}

    def job(self, row: Conversation, notes: tuple[str, ...] = ()) -> Job:
        kwargs = {**self.options.template_kwargs, **row.template_kwargs}
        inputs = inputs_of(row.messages, row.tools, row.documents, kwargs, self.options.now)
        texts = self._known(row, inputs)
        if texts is None:
            texts = self._made(row, inputs)
        if row.continue_final_message:
            texts = [(left_open(o, len(row.messages) - 1), cuts) for o, cuts in texts]
        if unread := unread_keys(row.messages, self._template(inputs).source):
            notes += tuple(
                f"the message key {key!r} is read by neither the template nor ygivenx" for key in unread
            )

        def finish(parts: list[Encoded]) -> list[Sequence]:
            try:
                return self._finish(row, texts, parts, notes)
            except RowError as e:
                if e.reason == "too_long" and self.options.overflow == "drop_turns":
                    return self._shorter(row, e)
                if e.reason == "straddling_token" and self.options.border == "refuse":
                    return self._repaired(row, inputs, notes, e)
                raise

        return Job([(outline.text, cuts) for outline, cuts in texts], finish)

    # --- texts -------------------------------------------------------------------------------------------

    def _template(self, inputs: Inputs) -> Template:
        tokenizer = self.tokens.tokenizer
        if not tokenizer.chat_template:
            raise RowError(
                "the tokenizer has no chat template, and this row is a conversation",
                reason="no_template",
                fix="set tokenizer.chat_template, or give the row as text: columns prompt and completion, or x and y",
            )
        source = tokenizer.get_chat_template(tools=inputs.tools)
        if source not in self._templates:
            self._templates[source] = Template(source, tokenizer.special_tokens_map)
            self._shapes[source] = Shapes(self._templates[source], self.tokens)
        return self._templates[source]

    def _known(self, row: Conversation, inputs: Inputs) -> list[Cut] | None:
        """The texts by what was proven of rows of the same shape."""

        def prove(holed: Row) -> list[Outline]:
            try:
                drafts = self._proven(holed, wanted, frozenset(), row)
            except RowError:
                drafts = self._proven(holed, wanted, self._certain(template, inputs), row)
            return [outline_of(d, row.messages) for d in drafts]

        template, wanted = self._template(inputs), self._wanted(row)
        outlines = self._shapes[template.source].outlines(row, inputs, prove)
        return None if outlines is None else [(o, ()) for o in outlines]

    def _certain(self, template: Template, inputs: Inputs) -> frozenset[str]:
        """Repairs that no text of the row has a part in, unless another would come before them: see `_attempts`."""
        others = any(alternatives(template, inputs, self.options.repairs))
        none = others or self.options.context != "inference"
        return frozenset() if none else self.options.repairs & {"opening", "only_end"}

    def _made(self, row: Conversation, inputs: Inputs) -> list[Cut]:
        """The texts by a proof of this row's own."""
        if self.options.control == "refuse":
            refuse_control(self.tokens, inputs)
        drafts, control = self._drafts(inputs, row), self.options.control
        return [(outline_of(d, row.messages), control_cuts(self.tokens, d, control)) for d in drafts]

    def _wanted(self, row: Conversation) -> list[int]:
        """The replies of which some part would be trained; the others are context."""
        replies = [i for i, m in enumerate(row.messages) if m.get("role") == "assistant"]
        return [i for i in replies if any(self._weight(row, k, i, replies[-1]) for k in _KINDS)]

    def _weight(self, row: Conversation, kind: str, i: int, last: int) -> float:
        part = Part(kind, True, i, "assistant", i == last, row.messages[i].get("weight", 1.0))
        return weight_of(self.options.policy, part)

    def _is_trained(self, row: Conversation, path: str) -> bool:
        """Whether the message of a path, if it isn't a reply, has a weight of its own."""
        found = _OF_MESSAGE.match(path)
        if not found:
            return False
        i = int(found[1])
        role, own = str(row.messages[i]["role"]), row.messages[i].get("weight", 1.0)
        part = Part(KIND_OF_ROLE.get(role, role), False, i, role, weight=own)
        return role != "assistant" and weight_of(self.options.policy, part) > 0

    def _drafts(self, inputs: Inputs, row: Conversation) -> list[Draft]:
        """The texts, as the row stands or, where that can't be proven, as the first repair that can makes them."""
        template, wanted = self._template(inputs), self._wanted(row)
        refusal: RowError | None = None
        for tried, notes, repairs in self._attempts(template, inputs):
            try:
                drafts = self._proven(Row(template, tried), wanted, repairs, row)
            except RowError as e:
                refusal = (
                    e if refusal is None or not notes else refusal
                )  # that of the row as it stands, repaired
                continue
            return [replace(d, notes=d.notes + notes) for d in drafts] if notes else drafts
        assert refusal is not None
        raise refusal

    def _repaired(
        self, row: Conversation, inputs: Inputs, notes: tuple[str, ...], refusal: RowError
    ) -> list[Sequence]:
        """The row by the first repair under which the ids of each prompt begin those of its reply, too."""
        template, wanted = self._template(inputs), self._wanted(row)
        for tried, told, repairs in self._attempts(template, inputs):
            try:
                drafts = self._proven(Row(template, tried), wanted, repairs, row)
                control = self.options.control
                texts = [(outline_of(d, row.messages), control_cuts(self.tokens, d, control)) for d in drafts]
                encoded = self.tokens.encode_cut([(outline.text, cuts) for outline, cuts in texts])
                return self._finish(row, texts, encoded, (*notes, *told))
            except RowError:
                continue
        raise refusal

    def _attempts(
        self, template: Template, inputs: Inputs
    ) -> Iterator[tuple[Inputs, tuple[str, ...], frozenset[str]]]:
        """(inputs, notes, repairs inside turns), the least change first."""
        repairs = self.options.repairs
        in_turns = repairs & IN_TURNS if self.options.context == "inference" else frozenset()
        for inside in (frozenset[str](), in_turns) if in_turns else (frozenset[str](),):
            yield inputs, (), inside
            yield from ((i, notes, inside) for i, notes in alternatives(template, inputs, repairs))

    def _proven(
        self, rendered: Row, wanted: list[int], repairs: frozenset[str], row: Conversation
    ) -> list[Draft]:
        if self.options.context == "rendered":
            drafts = self.contract.rendered(rendered, wanted)
        else:
            wanted, told = self._asked_for(rendered, wanted, repairs, row)
            drafts = self.contract.drafts(rendered, wanted, repairs)
            drafts[:1] = [replace(d, notes=d.notes + told) for d in drafts[:1]]
        done = [self._complete(d, rendered, row) for d in drafts]
        lost = lost_of_context(done[-1], set(wanted), done[-1].upto)
        if self.options.dropped == "refuse" and (paths := [p for p in lost if self._is_trained(row, p)]):
            raise _dropped(paths[0], "a message")
        done[-1] = replace(
            done[-1], notes=(*done[-1].notes, *(f"{p} is left out by the template" for p in lost))
        )
        return done

    def _asked_for(
        self, rendered: Row, wanted: list[int], repairs: frozenset[str], row: Conversation
    ) -> tuple[list[int], tuple[str, ...]]:
        """The wanted replies without those that open the conversation unasked, and a note for each of these.

        Nothing is left out if it is all that would be trained, or if the row itself gives it a weight.
        """
        unasked = self.contract.unasked(rendered, wanted) if "opening" in repairs else []
        unasked = [i for i in unasked if "weight" not in row.messages[i]]
        if len(unasked) == len(wanted):
            return wanted, ()
        said = "the template can't ask for a reply before the first question: it is context"
        return [i for i in wanted if i not in unasked], tuple(f"messages[{i}]: {said}" for i in unasked)

    def _complete(self, draft: Draft, rendered: Row, row: Conversation) -> Draft:
        """The draft with notes of what its template leaves out; raises RowError if that is part of a reply."""
        last = max(rendered.replies(), default=-1)
        for turn in draft.turns:
            said = rendered.inputs.messages[turn.message]
            if path := printed_arguments(draft.text[turn.start : turn.stop], said):
                raise _not_json(f"messages[{turn.message}].{path}")
            for path, name in lost_of_reply(draft, turn, said):
                kind = _KIND_OF_FIELD.get(name, "answer")
                if self.options.dropped == "refuse" and self._weight(row, kind, turn.message, last):
                    raise _dropped(path)
                draft = replace(draft, notes=(*draft.notes, f"{path} is left out by the template"))
        return draft

    # --- sequences ---------------------------------------------------------------------------------------

    def _finish(
        self, row: Conversation, texts: list[Cut], parts: list[Encoded], notes: tuple[str, ...]
    ) -> list[Sequence]:
        sequences: list[Sequence] = []
        for (outline, cuts), encoded in self._apart(texts, parts):
            if self.options.control != "parse":
                given = {"messages": row.messages, "tools": row.tools, "documents": row.documents}
                refuse_alike(self.tokens, encoded, given)
            outline = with_thoughts(outline)
            borders = self._borders(outline, encoded, cuts)
            segments = segments_of(outline, encoded, borders)
            weights = self._weights(row, segments, len(encoded.ids))
            of_spans = apply_spans(weights, segments, encoded, row.messages)
            if sequences:
                # What an earlier sequence has already weighed: no reply of this one, even if it begins alike.
                own = min((borders[start] for _, start, _, _ in outline.turns), default=len(weights))
                known = max(_common(s.ids, encoded.ids) for s in sequences)
                weights[: min(own, known)] = 0
            told = (*notes, *outline.notes, *of_spans, *([_AS_TEXT] if cuts else []))
            pieces = Pieces(encoded.text, encoded.starts, encoded.stops)
            sequences.append(made(encoded.ids, weights, segments, pieces, told))
        return fitted(sequences, self.options.max_length, self.options.overflow)

    def _apart(self, texts: list[Cut], parts: list[Encoded]) -> Iterator[tuple[Cut, Encoded]]:
        """With border="split", a turn whose first token would hold the end of x has a sequence of its own, in which x
        and y are encoded apart; for what follows it is history, as inference would encode it."""
        for (outline, cuts), encoded in zip(texts, parts, strict=True):
            split = self.options.border == "split"
            torn = [t for t in outline.turns if split and self.tokens.border(encoded, t[1], cuts) is None]
            if not torn:
                yield (outline, cuts), encoded
                continue
            self.tokens.need_plain_joints("border='split'")
            if whole := tuple(t for t in outline.turns if t not in torn):
                yield (outline.only(whole, len(outline.text)), cuts), encoded
            for turn in torn:
                message, start, _, stop = turn
                own = outline.only((turn,), stop, f"messages[{message}]: {_SPLIT}")
                at = tuple(sorted({start, *(c for c in cuts if c < stop)}))
                yield (own, cuts), self.tokens.encode_cut([(own.text, at)])[0]

    def _borders(self, outline: Outline, encoded: Encoded, cuts: tuple[int, ...]) -> dict[int, int]:
        borders: dict[int, int] = {}
        for message, start, end, stop in outline.turns:
            for at in (start, end, stop):
                border = self.tokens.border(encoded, at, cuts)
                if border is None and at == start and self.options.border == "mask":
                    token = across(encoded, at)
                    border = None if token is None else token + 1
                if border is None and at == stop:
                    border = self.tokens.after(encoded, end, stop)
                if border is None:
                    raise straddle(encoded, at, f"messages[{message}]")
                borders[at] = border
        for at in [r[0] for r in outline.runs if r[2] and not encoded.tiled]:  # else offsets tell
            if at not in borders and (within := self.tokens.border(encoded, at, cuts)) is not None:
                borders[at] = within
        return borders

    def _weights(self, row: Conversation, segments: list[Segment], length: int) -> np.ndarray:
        weights = np.zeros(length, np.float32)
        last = max((i for i, m in enumerate(row.messages) if m.get("role") == "assistant"), default=-1)
        for s in segments:
            message: Mapping[str, Any] = row.messages[s.message] if s.message is not None else {}
            part = Part(
                s.kind,
                s.output,
                s.message,
                message.get("role"),
                s.message == last,
                message.get("weight", 1.0),
            )
            weights[s.start : s.stop] = weight_of(self.options.policy, part)
        return weights * np.float32(row.weight)

    # --- length ------------------------------------------------------------------------------------------

    def _shorter(self, row: Conversation, refusal: RowError) -> list[Sequence]:
        """The row without its oldest turns, as few as fit; what stands before the first user stays."""
        first, *later = _turns(row.messages) or [0]
        chats = Chats(replace(self.options, overflow="refuse"))
        for n, start in enumerate(later, 1):
            kept = replace(row, messages=row.messages[:first] + row.messages[start:])
            note = f"the oldest {n} of {1 + len(later)} turns were dropped to fit max_length={self.options.max_length}"
            job = chats.job(kept, (note,))
            try:
                sequences = job.finish(self.tokens.encode_cut(job.texts))
            except RowError as e:
                if e.reason not in ("too_long", "nothing_trained"):
                    raise
                continue
            return [_renumbered(s, first, start - first) for s in sequences]
        raise refusal


_AS_TEXT = "control tokens in the row's text are encoded as text: the ids differ from the template's"
_SPLIT = "x and y are encoded apart, as inference would: the ids differ from the template's"
_OF_MESSAGE = re.compile(r"messages\[(\d+)\]")
_KINDS = ("answer", "reasoning", "tool_call", "end_of_turn")


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


def _renumbered(sequence: Sequence, first: int, dropped: int) -> Sequence:
    """The sequence with the messages from `first` on numbered as they are in the row, where more stand before them."""
    segments = (
        replace(s, message=s.message + dropped) if s.message is not None and s.message >= first else s
        for s in sequence.segments
    )
    return replace(sequence, segments=tuple(segments))


def _common(a: npt.NDArray[np.int64], b: npt.NDArray[np.int64]) -> int:
    """The length of the common prefix of two arrays."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


def _not_json(path: str) -> RowError:
    return RowError(
        "the template writes these arguments as Python prints them",
        reason="not_json",
        field=path,
        why="a model would be trained on calls that no parser reads",
        fix="repair='arguments_as_text' gives them as JSON text, or give a template that writes JSON",
    )


def _dropped(path: str, of: str = "a reply") -> RowError:
    return RowError(
        f"the template leaves out this part of {of} that would be trained",
        reason="dropped_field",
        field=path,
        why="the model would be trained to answer without it",
        fix="give a template that writes it, remove the field, or dropped='warn'",
    )
