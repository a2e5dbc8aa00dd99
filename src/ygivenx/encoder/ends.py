"""The token that ends a turn.

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

from typing import Any, NamedTuple

from ..errors import RowError
from ..templating.inputs import Inputs
from ..templating.template import Renderer
from ..templating.tracing import marked
from .candidates import Renderings, quoted, runs_of_message
from .tokens import Tokens

USER = {"role": "user", "content": "x"}


class End(NamedTuple):
    """Where the token that ends a turn stands in F, or is put; the note says why if F doesn't have it there."""

    at: int
    token: str
    note: str = ""


def end_of_turn(tokens: Tokens, rendered: Renderings, i: int, after: int) -> End | None:
    """What ends message i, whose last character stands before `after` in F.

    Raises RowError `no_end_of_turn` where stops are declared and generation doesn't stop there.
    """
    found = _by_stops(tokens, rendered, i, after) or _by_structure(tokens, rendered, i, after)
    if found is None:
        return None
    if tokens.declares_stops and found.token not in tokens.stops:
        raise _no_stop(tokens, i, found.token)
    if found.at < len(rendered.closed(i + 1)):
        return found
    return found._replace(note=f"messages[{i}]: the header of the next turn, {found.token!r}, ends it")


def _by_stops(tokens: Tokens, rendered: Renderings, i: int, after: int) -> End | None:
    """Rows 1 to 3."""
    text, then = rendered.closed(i + 1), _next(rendered, i)
    common = rendered.renderer.common_prefix(text, then)
    stops = [m for m in tokens.control(text, after) if m[0] in tokens.stops]
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
    text, then = rendered.closed(i + 1), _next(rendered, i)
    common = rendered.renderer.common_prefix(text, then)
    inside = tokens.control(text, after)
    shared = [m for m in inside if m.end() <= common]
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
        if stop is None and _begins_next(rendered, i, text[end.start() :]):
            return _next_header(tokens, rendered, i, after)
        return End(end.start(), end[0])
    return _header_at(tokens, text, then, common) or _next_header(tokens, rendered, i, after)


def appended_end(tokens: Tokens, rendered: Renderings, i: int, after: int, repairs: frozenset[str]) -> End:
    """The eos, put after message i, of which the template writes no more than white space; raises RowError."""
    eos, rest, field = tokens.tokenizer.eos_token, rendered.closed(i + 1)[after:], f"messages[{i}]"
    what, why = "nothing ends this turn", "a model trained on it never stops"
    if rest.strip():
        fix = "if one of it ends a turn, name its token: stops=[...]; or give another template"
        why = f"after it the template writes {quoted(rest)}, of which nothing is known to stop generation: {why}"
        raise RowError(what, reason="no_end_of_turn", field=field, why=why, fix=fix)
    if not eos:
        raise RowError(what, reason="no_end_of_turn", field=field, why=why, fix="set tokenizer.eos_token")
    needed = "append_end" if len(tokens.stops) > 1 else "only_end"
    if not repairs & {needed, "append_end"}:
        why = f"any of {', '.join(sorted(tokens.stops))} could, and none is written: {why}"
        fix = f"repair={needed!r} appends {eos!r}, or give another template"
        raise RowError(what, reason="no_end_of_turn", field=field, why=why, fix=fix)
    return End(after, eos, f"{field}: {eos!r} was appended, as nothing ends the turn")


def render_or_none(renderer: Renderer, inputs: Inputs) -> str | None:
    """The prompt after these messages, or None where the template can't write one."""
    try:
        return renderer.render(inputs, add_generation_prompt=True)
    except RowError:
        return None


def _next(rendered: Renderings, i: int) -> str:
    """The prompt of the next reply; where no message asks for it, the one after a user, or its tool calls' results.

    "" where the template can write none.
    """
    following = next((j for j in rendered.replies() if j > i), len(rendered))
    if i + 1 < len(rendered) and following != i + 1:
        return _prompt_or_none(rendered, following) or ""
    calls = rendered.inputs.messages[i].get("tool_calls") or []
    more = [_result(c) for c in calls] or [USER]
    return render_or_none(rendered.renderer, rendered.inputs.upto(i + 1, *more)) or ""


def _prompt_or_none(rendered: Renderings, i: int) -> str | None:
    try:
        return rendered.prompt(i)
    except RowError:
        return None


def _result(call: dict[str, Any]) -> dict[str, Any]:
    name = call.get("function", call).get("name", "f")
    result = {"role": "tool", "name": name, "content": "x"}
    return result | ({"tool_call_id": call["id"]} if "id" in call else {})


def _header_at(tokens: Tokens, text: str, then: str, common: int) -> End | None:
    """The control token with which the next rendering goes on where F ends."""
    header = next(iter(tokens.control(then, common)), None)
    if header is not None and header.start() == common == len(text):
        return End(len(text), header[0])
    return None


def _next_header(tokens: Tokens, rendered: Renderings, i: int, after: int) -> End | None:
    """The special token that follows message i once it is history, where F itself ends with its text."""
    text, then = rendered.closed(i + 1), rendered.inputs.upto(i + 1, USER)
    if text[after:].strip():
        return None
    plain = render_or_none(rendered.renderer, then)
    traced = rendered.renderer.trace(marked(then), plain, add_generation_prompt=True) if plain else None
    runs = runs_of_message(traced, i) if traced else []
    if not runs or plain is None:
        return None
    gap = next(iter(tokens.control(plain, runs[-1][1])), None)
    return End(len(text), gap[0]) if gap and not plain[runs[-1][1] : gap.start()].strip() else None


def _asks(rendered: Renderings, i: int, text: str) -> bool:
    """Whether the prompt of message i begins with a text."""
    prompt = _prompt_or_none(rendered, i)
    return prompt is not None and rendered.renderer.begins(prompt, text)


def _begins_next(rendered: Renderings, i: int, rest: str) -> bool:
    """Whether the prompt after a user, who follows message i, ends as F does: then no turn ends there."""
    prompted = render_or_none(rendered.renderer, rendered.inputs.upto(i + 1, USER))
    return prompted is not None and prompted.endswith(rest)


def _beginning(tokens: Tokens, rendered: Renderings, i: int) -> set[str]:
    """The special tokens before anything that a message says; all of them where that isn't known."""
    traced = rendered.traced(i + 1)
    runs = [run for j in range(i + 1) for run in runs_of_message(traced, j)] if traced else []
    return {m[0] for m in tokens.control(rendered.closed(i + 1), 0, min(runs)[0] if runs else None)}


def _no_stop(tokens: Tokens, i: int, token: str) -> RowError:
    return RowError(
        f"this turn ends in {token!r}, at which generation doesn't stop",
        reason="no_end_of_turn",
        field=f"messages[{i}]",
        why=f"it stops at {', '.join(sorted(tokens.stops))} alone: a model trained on this would go on",
        fix=f"if generation stops at {token!r} too, name it: stops={sorted({*tokens.stops, token})}",
    )
