"""The token that ends a turn, and turns that a repair puts together by hand (`joined`).

Let e be after the last character that comes from message i in F, G the next rendering (the next prompt, else one with
what could come next), L how much of F and G is the same. Three places are looked at: the control tokens of F[e:L],
which are still there when the conversation goes on; all of F[e:]; and, where F ends at L, the control token with which
G goes on, the header of the next turn. The first row that finds a token ends the turn:

| # | when                 | which token                                  | such as                                    |
|---|----------------------|----------------------------------------------|--------------------------------------------|
| 1 | a stop is in F[e:L]  | the first such stop                          | ChatML: `<|im_end|>`                       |
| 2 | stops are declared   | the first stop in F[e:]                      | gpt-oss, last turn: `<|return|>`           |
| 3 | stops are declared   | the next header, if it is a stop             | GLM: `<|observation|>` after `</tool_call>`|
| 4 | none is declared     | the last control token in F[e:L]             | Phi-3: `<|end|>`, before an `<|endoftext|>`|
| 5 | none is declared     | the first stop, else control token in F[e:]  | gpt-oss, its generation config unknown     |
| 6 | none is declared     | the next header                              | GLM's `<|user|>`, its config unknown       |

Stops are declared by `stops=` or a model's generation config; the tokenizer's eos alone declares nothing, since many
chat models end their turns in another token. Where stops are declared, an end at which nothing stops is refused;
where they aren't, the table's last three rows decide without a note. A template may write the next prompt unasked, as
Llama 3's first one, or a part of it: then, where no stop is known, a token that begins turns is none that ends one.
Where nothing ends a turn, a repair may put the token there by which generation would stop.
"""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import NamedTuple

from ..errors import RowError
from ..templating.origins import TEMPLATE, Text, within
from ..templating.tracing import Traced, marked
from .render import USER, Renderings, Turn, quoted
from .tokenize import Tokens

# What closes a thought that a reply lacks: as context, or trained (`thoughts="empty"`).
EMPTY_THOUGHTS = frozenset({"empty_think", "trained_empty_think"})


class End(NamedTuple):
    """Where the token that ends a turn stands in F, or is put; the note says why if F doesn't have it there.

    lead: white space that is put before it.
    """

    at: int
    token: str
    note: str = ""
    lead: str = ""


def end_of_turn(tokens: Tokens, rendered: Renderings, i: int, after: int) -> End | None:
    """What ends message i, whose last character stands before `after` in F.

    Raises RowError `no_end_of_turn` where stops are declared and generation doesn't stop there.
    """
    found = _by_stops(tokens, rendered, i, after) or _by_structure(tokens, rendered, i, after)
    if found is None:
        return None
    if tokens.declares_stops and found.token not in tokens.stops:
        raise _no_stop(tokens, i, found.token)
    if found.at < len(rendered.closed[i + 1]):
        return found
    return found._replace(note=f"messages[{i}]: the header of the next turn, {found.token!r}, ends it")


def _by_stops(tokens: Tokens, rendered: Renderings, i: int, after: int) -> End | None:
    """Rows 1 to 3."""
    text = rendered.closed[i + 1]
    stops = [m for m in tokens.control(text, after) if m[0] in tokens.stops]
    if len(stops) == 1 and tokens.declares_stops:  # rows 1 and 2 agree, whatever comes next
        return End(stops[0].start(), stops[0][0])
    then = rendered.following[i]
    common = rendered.renderer.common_prefix(text, then)
    # Phi-3 writes `<|end|>` after a reply and, where the conversation ends, `<|endoftext|>` after that: only the
    # first is still there when it goes on. gpt-oss ends its last turn in a stop that history lacks (row 2).
    shared = [m for m in stops if m.end() <= common]
    if shared or (stops and tokens.declares_stops):
        first = (shared or stops)[0]
        return End(first.start(), first[0])
    if not tokens.declares_stops:
        return None
    header = _header_at(tokens, text, then, common) or _next_header(tokens, rendered, i, after)
    return header if header and header.token in tokens.stops else None


def _by_structure(tokens: Tokens, rendered: Renderings, i: int, after: int) -> End | None:
    """Rows 4 to 6."""
    text, then = rendered.closed[i + 1], rendered.following[i]
    common = rendered.renderer.common_prefix(text, then)
    inside = tokens.control(text, after)
    shared = [m for m in inside if m.end() <= common]
    # Llama 3's first template writes the next header unasked: of the tokens behind the reply those that begin turns
    # elsewhere in the text are then no ends, and one has to be left over.
    known = any(m[0] in tokens.stops for m in shared or inside)
    if not known and common >= after and text[common:].strip() and _asks(rendered, i + 1, text):
        beginning = _beginning(tokens, rendered, i)
        shared = [m for m in shared if m[0] not in beginning]
        if len(shared) != 1:
            return _next_header(tokens, rendered, i, after)
    if shared:
        return End(shared[-1].start(), shared[-1][0])
    if inside:
        stop = next((m for m in inside if m[0] in tokens.stops), None)
        end = stop or inside[0]
        # What stands there may be the beginning of the next prompt, which the template writes in any case.
        if stop is None and _begins_next(rendered, i, text[end.start() :]):
            return _next_header(tokens, rendered, i, after)
        return End(end.start(), end[0])
    header = _header_at(tokens, text, then, common) or _next_header(tokens, rendered, i, after)
    return None if header and _begins_reply(tokens, rendered, i, header.token) else header


def _begins_reply(tokens: Tokens, rendered: Renderings, i: int, token: str) -> bool:
    """Whether a token that isn't a stop stands in the header of reply i itself: it doesn't say that others speak."""
    traced = rendered.traced_prompts[i] if rendered.shown[i] else None
    if traced is None or token in tokens.stops:
        return False
    spoken = max((stop for j in range(i) for _, stop in traced.spoken[j]), default=len(traced.text))
    return token in {m[0] for m in tokens.control(rendered.prompts[i], spoken)}


def stopping_once(tokens: Tokens, rendered: Renderings, turn: Turn) -> Turn:
    """The turn; raises RowError if the template writes a token inside it by which generation would stop."""
    traced = turn.traced or rendered.traced[turn.message + 1]
    for found in tokens.control(turn.text, turn.start, turn.end):
        written = traced is None or TEMPLATE in within(traced.text.runs, *found.span())
        if found[0] in tokens.stops and written:
            raise RowError(
                f"the template writes {found[0]!r} inside this reply, and generation stops there",
                reason="stop_inside",
                field=f"messages[{turn.message}]",
                why="a model can't produce in one turn what stands after it",
                fix="split the message there in two, such as one with the content and one with the calls",
            )
    return turn


def appended_end(tokens: Tokens, rendered: Renderings, i: int, after: int, repairs: frozenset[str]) -> End:
    """The eos, put after message i, of which the template writes no more than white space; raises RowError."""
    eos, rest, field = tokens.tokenizer.eos_token, rendered.closed[i + 1][after:], f"messages[{i}]"
    what, why = "nothing ends this turn", "a model trained on it never stops"
    if rest.strip():
        fix = "if one of it ends a turn, name its token: stops=[...]; or give another template"
        why = f"after it the template writes {quoted(rest)}, of which nothing is known to stop generation: {why}"
        raise RowError(what, reason="no_end_of_turn", field=field, why=why, fix=fix)
    if not eos:
        raise RowError(what, reason="no_end_of_turn", field=field, why=why, fix="set tokenizer.eos_token")
    # With several stops the template could mean any of them; with one there is nothing to choose.
    needed = "append_end" if len(tokens.stops) > 1 else "only_end"
    if not repairs & {needed, "append_end"}:
        why = f"any of {', '.join(sorted(tokens.stops))} could, and none is written: {why}"
        fix = f"repair={needed!r} appends {eos!r}, or give another template"
        raise RowError(what, reason="no_end_of_turn", field=field, why=why, fix=fix)
    return End(after, eos, f"{field}: {eos!r} was appended, as nothing ends the turn")


def _header_at(tokens: Tokens, text: str, then: str, common: int) -> End | None:
    """The control token with which the next rendering goes on where F ends."""
    header = next(iter(tokens.control(then, common)), None)
    if header is not None and header.start() == common == len(text):
        return End(len(text), header[0])
    return None


def _next_header(tokens: Tokens, rendered: Renderings, i: int, after: int) -> End | None:
    """The special token that follows message i once it is history, where F itself ends with its text."""
    text, then = rendered.closed[i + 1], rendered.inputs.upto(i + 1, USER)
    if text[after:].strip():
        return None
    plain = rendered.after_user[i + 1]
    traced = rendered.renderer.trace(marked(then), plain, add_generation_prompt=True) if plain else None
    # GLM ends a turn by nothing but the header of what comes next: with a user put behind it, the first control token
    # after the reply is that header.
    runs = traced.spoken[i] if traced else []
    if not runs or plain is None:
        return None
    found = next(iter(tokens.control(plain, runs[-1][1])), None)
    gap = plain[runs[-1][1] : found.start()] if found else ""
    if found is None or gap.strip():
        return None
    return End(len(text), found[0], lead=gap.removeprefix(text[after:]))


def _asks(rendered: Renderings, i: int, text: str) -> bool:
    """Whether the prompt of message i begins with a text."""
    prompt = rendered.shown[i]
    return prompt is not None and rendered.renderer.begins(prompt, text)


def _begins_next(rendered: Renderings, i: int, rest: str) -> bool:
    """Whether the prompt after a user, who follows message i, ends as F does: then no turn ends there."""
    prompted = rendered.after_user[i + 1]
    return prompted is not None and prompted.endswith(rest)


def _beginning(tokens: Tokens, rendered: Renderings, i: int) -> set[str]:
    """The special tokens before anything that a message says; all of them where that isn't known."""
    traced = rendered.traced[i + 1]
    runs = [run for j in range(i + 1) for run in traced.spoken[j]] if traced else []
    return {m[0] for m in tokens.control(rendered.closed[i + 1], 0, min(runs)[0] if runs else None)}


def _no_stop(tokens: Tokens, i: int, token: str) -> RowError:
    return RowError(
        f"this turn ends in {token!r}, at which generation doesn't stop",
        reason="no_end_of_turn",
        field=f"messages[{i}]",
        why=f"it stops at {', '.join(sorted(tokens.stops))} alone: a model trained on this would go on",
        fix=f"if generation stops at {token!r} too, name it: stops={sorted({*tokens.stops, token})}",
    )


# === turns put together by hand ==========================================================================


_KEPT = "its prompt differs from the rendered row in {}, and is kept"


def joined(rendered: Renderings, i: int, repairs: frozenset[str], end: End, continues: bool) -> Turn | None:
    """P with the reply put after it by hand, where a repair allows it; `end` is what ends the reply in F.

    continues: whether F begins with P; then nothing but a thought is put together.
    """
    shown = rendered.prompts[i]
    if rendered.tags.opens(shown) and (turn := _after_open_thought(rendered, i, repairs, end, continues)):
        return turn
    if continues:
        return None
    kept = _kept_prompt(rendered, i, repairs, end.at)
    return kept and _put_together(rendered, i, *kept, end)


def _put_together(
    rendered: Renderings,
    i: int,
    what: str,
    parts: list[str],
    end: End,
    context: str = "",
    is_apart: bool = False,
) -> Turn:
    """P, `context` and the parts of a reply as one turn. is_apart: what follows P is encoded by itself."""
    shown, prompt = rendered.prompts[i], rendered.traced_prompts[i]
    parts = [*parts, end.lead]
    traced = prompt and Traced(reduce(add, [context, *parts, end.token], prompt.text), prompt.sources)
    start = len(shown) + len(context)
    stop = start + sum(map(len, parts))
    notes = (f"messages[{i}]: {what}; the ids differ from the template's", *([end.note] if end.note else []))
    text = "".join([shown, context, *parts, end.token])
    cut = len(shown) if is_apart else None
    return Turn(i, text, start, stop, stop + len(end.token), traced, notes, cut)


# --- a thought that the prompt opens ---------------------------------------------------------------------


def _after_open_thought(
    rendered: Renderings, i: int, repairs: frozenset[str], end: End, continues: bool
) -> Turn | None:
    """The reply's own reasoning after the thought that the prompt opens; or that thought closed at once."""
    shown, message = rendered.prompts[i], rendered.inputs.messages[i]
    pair = rendered.tags.pair_of(shown)
    own = rendered.tags.own_thought(message, pair)
    # P ends in `<think>` and the row has a thought: P + reasoning + `</think>` + answer, as the model would write it.
    if own and own[0] and continues and rendered.closed[i + 1][len(shown) :].lstrip().startswith(own[0]):
        return None  # the template itself has the thought where the prompt ends
    if own and "open_think" in repairs and not message.get("tool_calls"):
        field = "reasoning_content" if own[0] else "content"
        reasoning = _text_of(rendered, own[0], i, field)
        parts = [
            reasoning,
            own[1],
            _text_of(rendered, own[2], i, "content"),
            *_behind(rendered, i, end),
        ]
        what = f"its own reasoning continues the {pair[0]} that the prompt opens"
        return _put_together(rendered, i, what, [p for p in parts if p], end)
    if own or rendered.thinks[i] or not repairs & EMPTY_THOUGHTS:
        return None
    return _after_empty_thought(rendered, i, pair, end, continues, "empty_think" in repairs)


def _after_empty_thought(
    rendered: Renderings, i: int, pair: tuple[str, str], end: End, continues: bool, is_context: bool
) -> Turn | None:
    """The reply after the thought that the prompt opens, which is closed at once; as context, or as y."""
    if rendered.tags.unclosed(rendered.inputs.messages[i]):
        raise _unclosed(i, pair[1])
    # `\n` that ends P and `\n` that follows are one token together, which inference never sees: encoded apart.
    shown, text = rendered.prompts[i], rendered.closed[i + 1]
    begin = len(shown) if continues else rendered.begins_unthought[i]
    first = _first_word(rendered, i, end.at)
    if begin is None or first is None:
        return None
    closing, begin = rendered.tags.closes_at(text, begin, first) or (rendered.tags.closing_of(pair), begin)
    parts = _reply_beyond(rendered, i, begin, end.at)
    if parts is None:
        return None
    what = f"it has no thought, and the {pair[0]} that its prompt opens is closed at once"
    if is_context:
        what += ", as context: nothing of a thought is trained"
        return _put_together(rendered, i, what, parts, end, closing, is_apart=True)
    return _put_together(rendered, i, what, [closing, *parts], end, is_apart=True)


def _unclosed(i: int, closing: str) -> RowError:
    return RowError(
        f"the prompt opens a thought, and the reply begins with one that it never closes by {closing}",
        reason="no_thought",
        field=f"messages[{i}].content",
        why="trained after an empty thought, the model would learn to think again, and to stop while it does",
        fix="close the thought in the row, or leave the row out",
    )


def _behind(rendered: Renderings, i: int, end: End) -> list[str]:
    """What the template writes between a reply's words and the end of its turn, as Command A's `<|END_TEXT|>`."""
    whole = rendered.traced[i + 1]
    stop = max((stop for _, stop in whole.spoken[i]), default=end.at) if whole else end.at
    behind = rendered.closed[i + 1][stop : end.at]
    return [behind] if behind.strip() else []


def _text_of(rendered: Renderings, text: str, i: int, field: str) -> Text:
    """A text that comes from a field of message i."""
    sources = enumerate(rendered.marked.sources)
    return Text.of(text, next((n for n, s in sources if (s.message, s.field) == (i, field)), TEMPLATE))


def _written_after(rendered: Renderings, i: int, begin: int, stop: int) -> list[str]:
    """F[begin:stop], with its origins where they are known."""
    whole = rendered.traced[i + 1]
    return [(whole.text if whole else rendered.closed[i + 1])[begin:stop]]


# --- a prompt that the row writes otherwise --------------------------------------------------------------


def _kept_prompt(
    rendered: Renderings, i: int, repairs: frozenset[str], end: int
) -> tuple[str, list[str]] | None:
    """What is kept of the prompt, and the reply that goes after it; in F it ends at `end`."""
    shown, text = rendered.prompts[i], rendered.closed[i + 1]
    first = _first_word(rendered, i, end)
    if (
        first is not None
        and "closed_think" in repairs
        and not rendered.thinks[i]
        and (begin := _after_closed(rendered, shown, text, first)) is not None
    ):
        what = _KEPT.format("an empty thought that it closes itself")
        return (what, _written_after(rendered, i, begin, end)) if begin <= end else None
    if "whitespace" in repairs and (begin := rendered.begins[i]) is not None:
        parts = _reply_beyond(rendered, i, begin, end)
        return (_KEPT.format("white space alone"), parts) if parts else None
    begin = _after_last(rendered, i) if "history" in repairs else None
    if begin is not None and begin <= end:
        return _KEPT.format("what stands before the last message"), _written_after(rendered, i, begin, end)
    return None


def _after_closed(rendered: Renderings, shown: str, text: str, first: int) -> int | None:
    """Where the reply begins in F, if P says the same before it, then thinks nothing, and the reply doesn't think.

    F, in which the reply's first word stands at `first`, may have that empty thought written otherwise: without its
    opening tag, as DeepSeek's, or none of it.
    """
    empty = rendered.tags.closed.search(shown)
    if not empty or not text.startswith(shown[: empty.start()]):
        return None
    if written := rendered.tags.closes_at(text, empty.start(), first):
        return written[1]
    has_own = empty.start() < first and rendered.tags.marks.match(text, empty.start())
    return None if has_own else empty.start()


def _reply_beyond(rendered: Renderings, i: int, begin: int, end: int) -> list[str] | None:
    """F[begin:end] without the template's own white space before the reply; None where that isn't known."""
    whole, first = rendered.traced[i + 1], _first_word(rendered, i, end)
    if whole is None or first is None or not begin <= first <= end:
        return None
    return [whole.text[begin:first].lstrip(), whole.text[first:end]]


def _first_word(rendered: Renderings, i: int, end: int) -> int | None:
    """Where in F message i begins to speak; `end` for one of no words, None where that isn't known."""
    whole = rendered.traced[i + 1]
    return None if whole is None else next((start for start, _ in whole.spoken[i]), end)


def _after_last(rendered: Renderings, i: int) -> int | None:
    """Where in F the reply begins, if from the first character of the last message before it F goes on as P does.

    Such a template writes what is further back otherwise once the reply stands there: a system prompt, for one, only
    with the user's message that comes last.
    """
    whole, prompt = rendered.traced[i + 1], rendered.traced_prompts[i]
    if (
        whole is None or prompt is None or i - 1 in rendered.replies
    ):  # between two replies nothing asks for one
        return None
    here, there = prompt.spoken[i - 1], whole.spoken[i - 1]
    if not here or not there:
        return None
    tail, at = str(prompt.text)[here[0][0] :], there[0][0]
    return at + len(tail) if str(whole.text).startswith(tail, at) else None
