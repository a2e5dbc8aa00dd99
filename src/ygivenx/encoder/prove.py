"""Stage 2, prove: which characters a model has to produce, and what else a candidate has to be.

`candidates` gives, one after the other, what each strategy makes of a row: a `Candidate`, whose text is proven, or the
`RowError` that says why it isn't one.

The contract between a rendered conversation and inference: for an assistant message i,
P = render(messages[:i], add_generation_prompt=True) is what inference shows, and
F = render(messages[:i+1]). The output is O = F[len(P) : end of turn], and must satisfy: F starts with P; O ends
in the token that ends the turn. One text serves all turns if it starts with each P + O; else every turn gets its own.
What satisfies neither is refused with the place where the two texts part. The rest of the contract, that the ids of P
begin those of P + O, is checked when a candidate is encoded (`tokenize.borders_of`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

from ..errors import RowError
from ..templating.template import Renderer, common_prefix
from ..templating.tracing import Traced
from .content import checked, refuse_control
from .render import (
    SHOWN,
    USER,
    Candidate,
    Chat,
    Outline,
    Rendering,
    Renderings,
    Turn,
    quoted,
    render_or_none,
)
from .repairs import Strategy, last_resorts, strategies
from .segments import outline_of
from .tokenize import Tokens, ids_fault
from .turns import EMPTY_THOUGHTS, appended_end, end_of_turn, joined, stopping_once

# === candidates ==========================================================================================


def candidates(chat: Chat) -> Iterator[Candidate | RowError]:
    """What each strategy makes of a row, the least change first."""
    if chat.options.control == "refuse":
        refuse_control(chat.options.tokens, chat.inputs)
    o = chat.options
    by_reply = o.context == "inference" and len(chat.to_train) > 1 and bool(o.repairs)
    for of_chat in (strategies, last_resorts):
        for strategy in of_chat(chat):
            found = candidate(chat, strategy, chat.template)
            # Of a strategy that changes the row's inputs the refusal would speak of what the user didn't write.
            if isinstance(found, Candidate) or not strategy.notes:
                yield found
        if by_reply and isinstance(found := reply_by_reply(chat, of_chat is last_resorts), Candidate):
            yield found


def candidate(chat: Chat, strategy: Strategy, renderer: Renderer) -> Candidate | RowError:
    """The candidate that a strategy gives, or why it gives none. renderer: the chat's template, or placeholders'."""
    rendered = chat.renderings(renderer, strategy.inputs)
    try:
        renderings, to_train = _proven(chat, rendered, strategy)
        texts = checked(chat, strategy, renderings, rendered, to_train)
        outlines = tuple(outline_of(r, chat.row, cuts) for r, cuts in texts)
    except RowError as e:
        return e
    return Candidate(outlines, strategy.notes)


def _proven(chat: Chat, rendered: Renderings, strategy: Strategy) -> tuple[list[Rendering], set[int]]:
    """The proven texts of a strategy, and the replies that they train."""
    tokens, to_train = chat.options.tokens, list(chat.to_train)
    if chat.options.context == "rendered":
        return prove_as_rendered(tokens, rendered, to_train), set(to_train)
    to_train, notes = _asked_for(chat, rendered, strategy)
    renderings = prove(tokens, rendered, to_train, strategy.in_turns, strategy.forced)
    renderings[:1] = [replace(r, notes=r.notes + notes) for r in renderings[:1]]
    return renderings, set(to_train)


def _asked_for(chat: Chat, rendered: Renderings, strategy: Strategy) -> tuple[list[int], tuple[str, ...]]:
    """The wanted replies without those that nothing asks for, and a note for each of these.

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
    why = "the template can't ask for a reply before the first question, or after another reply: it isn't trained"
    return [i for i in to_train if i not in left], tuple(f"messages[{i}]: {why}" for i in left)


def reply_by_reply(chat: Chat, with_last_resort: bool) -> Candidate | RowError:
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
        for strategy in chain(strategies(alone), last_resorts(alone) if with_last_resort else ()):
            found = candidate(alone, strategy, chat.template)
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


# === the contract ========================================================================================


_STAND_IN = "\ue000"  # for private use: no template writes it
_HEADER = 256  # characters: a header is shorter
_REWRITTEN = (
    "the template writes earlier turns differently once they are history: each reply has its own sequence"
)


def prove(
    tokens: Tokens,
    rendered: Renderings,
    to_train: Iterable[int],
    repairs: frozenset[str] = frozenset(),
    forced: bool = False,
) -> list[Rendering]:
    """The texts that train the wanted messages; raises RowError where no text can."""
    # One text for all turns costs one forward pass, and is right where each turn's own text begins it: then history
    # is written as inference shows it.
    text, begins = rendered.whole, rendered.renderer.begins
    turns = [_turn(tokens, rendered, i, repairs, forced) for i in to_train]
    if turns and begins(turns[-1].proven, text):  # the next header ends the last turn
        text = turns[-1].proven
    # Inference encodes history as a whole: where a turn is encoded apart from its prompt, later ones can't share it.
    shares = all(t.cut is None for t in turns[:-1])
    if shares and all(begins(text, t.proven) for t in turns):
        return [Rendering(text, tuple(turns), len(rendered), rendered.traced[len(rendered)])]
    notes = (_REWRITTEN,) if len(turns) > 1 else ()
    return [
        Rendering(t.text, (t,), t.message + 1, t.traced or rendered.traced[t.message + 1], notes)
        for t in turns
    ]


def prove_as_rendered(tokens: Tokens, rendered: Renderings, to_train: Iterable[int]) -> list[Rendering]:
    """One text as the template writes the whole; outputs by the contract, else by origins, with a note."""
    text, turns = rendered.whole, []
    for i in to_train:
        try:
            turn = _turn(tokens, rendered, i)
        except RowError:
            turn = None
        if turn is None or not rendered.renderer.begins(text, turn.proven):
            turn = _by_origin(tokens, rendered, i)
        turns.append(turn)
    return [Rendering(text, tuple(turns), len(rendered), rendered.traced[len(rendered)])]


def unasked(tokens: Tokens, rendered: Renderings, to_train: Iterable[int]) -> list[int]:
    """Of the wanted replies those for which the template writes no prompt: a greeting before the first question, and a
    reply right after another one."""
    roles = [m.get("role") for m in rendered.inputs.messages]
    first = roles.index("user") if "user" in roles else len(roles)
    maybe = (i for i in to_train if i < first or roles[i - 1] == "assistant")
    return [i for i in maybe if not _is_asked(tokens, rendered, i)]


def _is_asked(tokens: Tokens, rendered: Renderings, i: int) -> bool:
    """Whether what inference shows before reply i, thoughts apart, begins what the row holds."""
    if rendered.shown[i] is None or _writes_header(tokens, rendered, i):
        return False
    return rendered.begins_unthought[i] is not None


# --- a turn ----------------------------------------------------------------------------------------------


def _turn(
    tokens: Tokens, rendered: Renderings, i: int, repairs: frozenset[str] = frozenset(), forced: bool = False
) -> Turn:
    """The proof for message i."""
    shown, text = _prompt(rendered, i), rendered.closed[i + 1]
    continues = rendered.renderer.begins(text, shown)
    if _writes_header(tokens, rendered, i):
        raise _no_header(i)
    first, last = _spoken(rendered, i)
    if continues and _trains_header(tokens, rendered, i, shown, text, first):
        raise _no_header(i)
    lacks_thought = rendered.tags.opens(shown) and not rendered.thinks[i]
    if lacks_thought and not repairs & EMPTY_THOUGHTS:
        raise _no_thought(i, shown)
    # Where nothing of the message is found in F, its end stands behind P all the same.
    after = max(last, len(shown) if continues else 0)
    if not continues and not repairs:
        raise _not_continued(i, shown, text)
    end = end_of_turn(tokens, rendered, i, after) or appended_end(tokens, rendered, i, after, repairs)
    turn = joined(rendered, i, repairs, end, continues) if forced or lacks_thought or not continues else None
    if turn is None and lacks_thought:
        raise _no_thought(i, shown)
    if turn is None and not continues:
        raise _not_continued(i, shown, text)
    if turn is None:
        whole = text[: end.at] + end.lead + end.token if end.note else text
        notes, at = ((end.note,) if end.note else ()), end.at + len(end.lead)
        turn = Turn(i, whole, len(shown), at, at + len(end.token), notes=notes)
    return stopping_once(tokens, rendered, turn)


def _prompt(rendered: Renderings, i: int) -> str:
    try:
        return rendered.prompts[i]
    except RowError as e:
        what = "no reply can be asked for here: the template fails on what stands before it"
        fix = "give this message the weight 0, so that it is context"
        raise RowError(what, reason="no_prompt", field=f"messages[{i}]", why=e.why, fix=fix) from e


def _spoken(rendered: Renderings, i: int) -> tuple[int, int]:
    """The characters [first, stop) of F between which message i speaks; [all, 0) where origins aren't known.

    [0, 0) where F has nothing of it.
    """
    # The whole text is traced in any case; where it begins with F its origins are F's, which spares a rendering.
    text, whole = rendered.closed[i + 1], rendered.whole
    traced = rendered.traced[len(rendered) if rendered.renderer.begins(whole, text) else i + 1]
    runs = [r for r in traced.spoken[i] if r[1] <= len(text)] if traced else []
    if _answers_nothing(rendered.inputs.messages[i]):
        at = _place(rendered, i)
        runs = sorted([*runs, (at, at)])
    return (runs[0][0], runs[-1][1]) if runs else (0 if traced else len(text), 0)


# --- headers ---------------------------------------------------------------------------------------------


def _writes_header(tokens: Tokens, rendered: Renderings, i: int) -> bool:
    """Whether F begins message i, after P, as a prompt after a user ends: then nothing asks for it."""
    if i and rendered.inputs.messages[i - 1].get("role") == "user":
        return False
    text, begin = rendered.closed[i + 1], rendered.begins[i]
    if begin is None:
        return False
    head = text[begin : max(_spoken(rendered, i)[0], begin)].lstrip()
    is_thought = not rendered.tags.marks.sub("", head).strip()  # marks of a thought are no header
    prompted = None if is_thought else rendered.after_user[i]
    if prompted is None:
        return False
    prompted = rendered.tags.without(prompted).rstrip()
    # F goes on `<|im_start|>assistant\nHi`, and the prompt after a user ends in `<|im_start|>assistant\n`: a
    # beginning of the one is an end of the other. It counts if it holds a control token, or begins a word there.
    ends = [head[:n] for n in range(1, min(len(head), _HEADER) + 1) if prompted.endswith(head[:n])]
    return any(tokens.has_control(e) or prompted[: -len(e)][-1:].isspace() for e in ends)


def _trains_header(tokens: Tokens, rendered: Renderings, i: int, shown: str, text: str, first: int) -> bool:
    """Whether the template ignores add_generation_prompt, so that the header of a reply would count as output.

    What a template writes before the words of every reply, whatever it says, is the header's.
    """
    # Nothing stands between P and the reply's first word, or the template does write a generation prompt: then no
    # header can be trained.
    lead = text[len(shown) : max(first, len(shown))]
    if not rendered.tags.marks.sub("", lead).strip() or rendered.closed[i] != shown:
        return False
    if _has_header(tokens, rendered, i, shown):
        return False
    plain = {"role": "assistant", "content": _STAND_IN}
    try:
        probe = rendered.renderer.render(rendered.inputs.upto(i, plain))
    except RowError:
        return False
    # Marks of a thought are the model's to write; whatever else stands before every reply is a header.
    lead, found, _ = probe[len(shown) :].partition(_STAND_IN)
    return bool(found) and bool(rendered.tags.marks.sub("", lead).strip())


def _has_header(tokens: Tokens, rendered: Renderings, i: int, shown: str) -> bool:
    """Whether a prompt that the template writes in any case ends in a reply's header.

    Before another message of a user it would go on otherwise, once the turn before has ended in a control token.
    """
    traced = rendered.traced_prompts[i]
    other = render_or_none(rendered.renderer, rendered.inputs.upto(i, USER))
    if traced is None or other is None:
        return False
    spoken = max((stop for j in range(i) for _, stop in traced.spoken[j]), default=len(shown))
    common = rendered.renderer.common_prefix(shown, other)
    return common < len(shown) and bool(tokens.control(shown, spoken, common))


# --- a reply of no words ---------------------------------------------------------------------------------


def _answers_nothing(message: Mapping[str, Any]) -> bool:
    content = message.get("content") or ""
    return isinstance(content, str) and not content.strip() and not message.get("tool_calls")


def _place(rendered: Renderings, i: int) -> int:
    """Where in F the content of message i, which is blank, ends; raises RowError if that isn't known."""
    text, (*before, message) = rendered.closed[i + 1], rendered.inputs.upto(i + 1).messages
    marked = {**message, "content": (message.get("content") or "") + _STAND_IN}
    # The same rendering with one character for the missing words: where it appears is where the words would stand.
    filled = rendered.renderer.render(replace(rendered.inputs, messages=(*before, marked)))
    at = filled.find(_STAND_IN)
    if at < 0 or filled[:at] + filled[at + 1 :] != text:
        shown = rendered.prompts[i]  # a template may leave out a line break with the words
        if rendered.renderer.begins(text, shown) and text[len(shown) :].split() == filled[at + 1 :].split():
            return len(shown)
        what = "nothing shows where this empty reply stands: the template writes it otherwise than others"
        fix = "leave the message out, or give it the weight 0"
        raise RowError(what, reason="no_end_of_turn", field=f"messages[{i}]", fix=fix)
    return at


# --- as rendered -----------------------------------------------------------------------------------------


def _by_origin(tokens: Tokens, rendered: Renderings, i: int) -> Turn:
    """Message i where the whole text has it, if no other message speaks between its beginning and its end."""
    traced, (first, last) = rendered.traced[len(rendered)], _spoken(rendered, i)
    runs = traced.spoken[i] if traced else []
    end = end_of_turn(tokens, rendered, i, last) if runs else None
    found = end and _end_in_whole(
        tokens, rendered, runs, rendered.closed[i + 1][first : end.at] + end.lead, end.token
    )
    if traced is None or end is None or found is None or _others(rendered, traced, i, runs[0][0], found):
        what = "the rendered text doesn't say where this reply begins and ends"
        raise RowError(what, reason="no_origin", field=f"messages[{i}]", fix="use context='inference'")
    start = _after_prompt(tokens, rendered, traced, i, runs[0][0])
    note = f"messages[{i}]: as rendered, which differs from what inference shows"
    return Turn(i, rendered.whole, start, found, found + len(end.token), notes=(note,))


def _end_in_whole(
    tokens: Tokens, rendered: Renderings, runs: list[tuple[int, int]], reply: str, token: str
) -> int | None:
    """Where the token that ends F's message ends it in the whole text: after the same words, or after its last."""
    at = runs[0][0]
    if rendered.renderer.begins(rendered.whole[at:], reply + token):
        return at + len(reply)
    return next((m.start() for m in tokens.control(rendered.whole, runs[-1][1]) if m[0] == token), None)


def _others(rendered: Renderings, traced: Traced, i: int, start: int, stop: int) -> bool:
    """Whether a message other than i speaks in [start, stop)."""
    others = (run for j in range(len(rendered)) if j != i for run in traced.spoken[j])
    return any(a < stop and b > start for a, b in others)


def _after_prompt(tokens: Tokens, rendered: Renderings, traced: Traced, i: int, first: int) -> int:
    """Where message i, which speaks from `first` on, begins in the whole text: after what its prompt ends with.

    That is after the last words of the messages before it, up to the special token with which the text parts from it;
    `first` itself where it parts without one.
    """
    shown, tags, whole = rendered.traced_prompts[i], rendered.tags, rendered.whole
    before = [run for j in range(i) for run in shown.spoken[j]] if shown else []
    spoken = [b for j in range(i) for _, b in traced.spoken[j] if b <= first]
    tail = rendered.prompts[i][max((b for _, b in before), default=0) :]
    at = max(spoken, default=0)
    for begun in (tail, tags.opened.sub("", tail), tags.closed.sub("", tail)):
        if whole[at:first].startswith(begun):
            return at + len(begun)
    part = at + common_prefix(whole[at:first], tail)
    parting = (m.start() for m in tokens.control(whole, at, first) if m.start() <= part < m.end())
    return next(parting, first)


# --- refusals --------------------------------------------------------------------------------------------


def _no_header(i: int) -> RowError:
    return RowError(
        "no reply can be asked for here: the template writes its header only with the reply",
        reason="no_prompt",
        field=f"messages[{i}]",
        why="the prompt that inference shows ends before it, so that the header would count as the model's output",
        fix="give this message the weight 0, so that it is context, or make it one with the reply before it",
    )


def _no_thought(i: int, shown: str) -> RowError:
    return RowError(
        "inference has the model think before this reply, and the reply has no thought",
        reason="no_thought",
        field=f"messages[{i}]",
        why=f"the prompt ends in {quoted(shown[-SHOWN:])}: the answer would be trained as a thought, or after none",
        fix="thoughts='empty_masked' closes the thought as context, thoughts='empty' trains that",
    )


def _not_continued(i: int, shown: str, text: str) -> RowError:
    at = common_prefix(shown, text)
    return RowError(
        "what the row holds doesn't continue what inference shows before this reply",
        reason="not_continued",
        field=f"messages[{i}]",
        why=f"after {quoted(shown[max(0, at - SHOWN) : at])} inference shows {quoted(shown[at:])} where "
        f"the rendered row has {quoted(text[at:])}",
        fix="make the reply begin as the prompt does",
    )
