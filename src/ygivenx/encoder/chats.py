"""One conversation through all stages: render, prove, tokenize, weigh.

`ChatWork` has a proven candidate encoded, and `weigh.sequences_of` checks its ids and weighs it; where the ids don't
fit, the next candidate is taken. The refusal of a row that has none is that of the row as it stands.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from ..errors import RowError
from ..rows.nouns import Conversation
from ..sequence import Sequence
from ..templating.inputs import Inputs
from ..templating.template import Template
from .policy import Options
from .proofs import Proofs
from .render import (
    Candidate,
    Chat,
    Tags,
    chat_of,
    notes_on,
    template_of,
)
from .tokenize import Encoded
from .weigh import counted, renumbered, sequences_of, shorter_rows


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
        """See `weigh.Work`."""
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
        border = "split" if options.border == "auto" else options.border
        if border not in ("mask", "split"):
            raise self.refusal
        try:
            return sequences_of(self.chat, *self.straddling, self.notes, border)
        except RowError as e:
            if options.border == "auto" and e.reason == "prefix_space":
                raise self.refusal from e
            raise


class Chats:
    """Conversations to work, with what is kept from row to row: compiled templates, and proofs by shape."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._templates: dict[str, tuple[Template, Tags]] = {}
        self._proofs = Proofs()

    def job(self, row: Conversation, notes: tuple[str, ...] = ()) -> ChatWork:
        """The work of a row; raises RowError where no text of it can be proven."""
        chat = chat_of(row, self.options, self._templates)
        notes = (*notes, *notes_on(chat))
        return ChatWork(chat, self._proofs.candidates(chat), notes)

    def template(self, inputs: Inputs) -> Template:
        """The template that a row's inputs are written with."""
        return template_of(self.options.tokens.tokenizer, inputs, self._templates)[0]

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
            sequences = [renumbered(s, first, len(row.messages) - len(kept.messages)) for s in sequences]
            return counted(sequences, Chats(replace(self.options, max_length=None)).sequences(row))
        raise refusal
