"""What a candidate's text has of the row: all that is trained, unchanged, and no control.

What a template leaves out is refused or noted; after a repair each text has to say what the row says. A row's text is
not control: special tokens that it writes are refused, or cut so that they are encoded as text.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from re import Match
from typing import Any

from ..errors import RowError
from ..templating.inputs import REASONING_FIELDS, ROLES, Inputs
from ..templating.origins import Source, within
from ..templating.template import Template
from ..templating.tracing import Traced
from .render import Chat, Rendering, Renderings, Tags, Turn, quoted
from .repairs import Strategy
from .tokenize import Encoded, Tokens

_KIND_OF_FIELD = {
    "reasoning_content": "reasoning",
    "thinking": "reasoning",
    "reasoning": "reasoning",
    "tool_calls": "tool_call",
}
_NO_TAGS = Tags()
_OF_MESSAGE = re.compile(r"messages\[(\d+)\]")
_ARGUMENT = re.compile(r"\.arguments(?! \(key\)\Z)")  # not the name of the field itself


def checked(
    chat: Chat, strategy: Strategy, renderings: list[Rendering], rendered: Renderings, to_train: set[int]
) -> list[tuple[Rendering, tuple[int, ...]]]:
    """The proven texts of a row with notes of what the template leaves out, and where each is cut.

    Raises RowError where a part that is trained is left out, a text of the row is changed, or the row writes control
    tokens and the options refuse that.
    """
    renderings = [_with_its_texts(chat, r, rendered, strategy) for r in renderings]
    done = [_complete(chat, r, rendered) for r in renderings]
    done = [_with_lost_context(chat, r, to_train) for r in done]
    if (
        rendered.renderer is not chat.template
    ):  # what placeholders stand for is looked at once they are filled
        return [(r, ()) for r in done]
    return [(r, control_cuts(chat.options.tokens, r, chat.options.control)) for r in done]


def _with_its_texts(chat: Chat, rendering: Rendering, rendered: Renderings, strategy: Strategy) -> Rendering:
    """The rendering, with a note of a text that the template changes.

    Raises RowError where that is to be refused, and where a repair changes any text of the row.
    """
    if rendered.renderer is not chat.template:  # a placeholder is only ever written bare
        return rendering
    if path := changed(rendering, chat.row.messages, chat.tags):
        if chat.options.dropped == "refuse":
            raise refused("changed_text", path)
        rendering = replace(rendering, notes=(*rendering.notes, f"{path} is changed by the template"))
    if not strategy.notes and not any(t.notes for t in rendering.turns):
        return rendering
    try:
        traced = chat.as_given.traced[rendering.upto]
    except RowError:  # the template takes the row with the repair alone
        traced = None
    if path := unfaithful(rendering, chat.inputs.messages, chat.tags, traced):
        raise refused("changed_text", path)
    return rendering


def _complete(chat: Chat, rendering: Rendering, rendered: Renderings) -> Rendering:
    """The rendering with notes of what its template leaves out of replies; raises RowError if that is trained."""
    for turn in rendering.turns:
        message = rendered.inputs.messages[turn.message]
        if path := printed_arguments(rendering, turn, message):
            raise refused("not_json", f"messages[{turn.message}].{path}")
        for path, name in lost_of_reply(rendering, turn, message, chat.tags):
            kind = _KIND_OF_FIELD.get(name, "answer")
            if chat.options.dropped == "refuse" and (turn.message, kind) in chat.trained:
                raise refused("dropped_field", path)
            rendering = replace(rendering, notes=(*rendering.notes, f"{path} is left out by the template"))
        if rendered.renderer is chat.template:  # else it is done once placeholders are filled
            rendering = _with_its_words(chat, rendering, turn, message)
    return rendering


def _with_its_words(chat: Chat, rendering: Rendering, turn: Turn, message: Mapping[str, Any]) -> Rendering:
    """The rendering with notes of what a reply says otherwise than the row; raises RowError if that is trained."""
    output, path = turn.text[turn.start : turn.end], f"messages[{turn.message}].content"
    own = chat.inputs.messages[turn.message]
    texts = "".join(_texts(own))
    if not isinstance(message.get("content"), str) and len(_PART.findall(output)) > len(_PART.findall(texts)):
        raise refused(
            "changed_text", path, why="it is printed as a list of parts, which no model should write"
        )
    for reason, kind, why in misspoken(output, own, chat.tags):
        if chat.options.dropped == "refuse" and (turn.message, kind) in chat.trained:
            raise refused(reason, path, why=why)
        if not any(n.startswith(f"messages[{turn.message}].") for n in rendering.notes):
            note = f"{path} is changed by the template: {why}"
            rendering = replace(rendering, notes=(*rendering.notes, note))
    return rendering


_PART = re.compile(r"""\{\s*['"]type['"]: ['"](?:text|thinking)['"]""")


def misspoken(output: str, message: Mapping[str, Any], tags: Tags) -> Iterator[tuple[str, str, str]]:
    """(reason, kind, why) of what an output says otherwise than its reply, white space at the ends apart.

    The thought that a content begins with may stand between other tags; all other words stand as they are written,
    or as JSON. Tags close as many thoughts as the reply has, or one empty thought.
    """
    thought = next((t for n in REASONING_FIELDS if isinstance(t := message.get(n), str) and t.strip()), "")
    texts = _texts(message)
    closed = sum(len(tags.closings.findall(t)) for t in (thought, *texts))
    if len(tags.closings.findall(output)) > closed + bool(thought or not closed):
        yield "changed_text", "reasoning", "the template closes a thought of its own beside that of the reply"
    for text in texts:
        if _stands(text, output):
            continue
        begun = tags.begun.fullmatch(text)
        inner, answer = (begun[1], begun[2]) if begun else ("", text)
        if not _stands(answer, output):
            yield (
                "changed_text",
                "answer",
                f"its words {quoted(answer.strip())} don't stand in what would be trained",
            )
        elif not _stands(inner, output):
            yield (
                "dropped_field",
                "reasoning",
                f"its thought {quoted(inner.strip())} isn't in what would be trained",
            )
        elif inner.strip() and not tags.marks.search(output):
            yield (
                "changed_text",
                "reasoning",
                "nothing that is known as a tag stands between its thought and its answer",
            )
    if thought and not _stands(thought, output) and len(_bare(thought, tags)) <= len(_bare(output, tags)):
        yield "changed_text", "reasoning", "its thought doesn't stand as it is in what would be trained"


def _texts(message: Mapping[str, Any]) -> list[str]:
    """The texts of a content, parts of other types apart."""
    content = message.get("content")
    if isinstance(content, str):
        return [content]
    parts = [p for p in content if isinstance(p, Mapping)] if isinstance(content, list) else []
    return [p["text"] for p in parts if p.get("type") == "text" and isinstance(p.get("text"), str)]


def _stands(text: str, output: str) -> bool:
    """Whether a text stands in an output, bare or as JSON."""
    text = text.strip()
    return text in output or any(json.dumps(text, ensure_ascii=a)[1:-1] in output for a in (False, True))


def _with_lost_context(chat: Chat, rendering: Rendering, to_train: set[int]) -> Rendering:
    """The rendering with notes of what the template leaves out around replies.

    Raises RowError where that is trained, or is a whole message before a trained reply.
    """
    lost = lost_of_context(rendering, to_train, rendering.upto, chat.tags)
    if chat.options.dropped == "refuse":
        if paths := [p for p in lost if _is_trained(chat, p)]:
            raise refused("dropped_field", paths[0], "a message")
        last = max((t.message for t in rendering.turns), default=0)
        if whole := lost_messages(rendering, last):
            role = str(chat.row.messages[whole[0]].get("role"))
            raise refused("dropped_message", f"messages[{whole[0]}]", role)
    notes = tuple(f"{path} is left out by the template" for path in lost)
    return replace(rendering, notes=(*rendering.notes, *notes))


def _is_trained(chat: Chat, path: str) -> bool:
    """Whether the message of a path, if it isn't a reply, has a weight of its own."""
    found = _OF_MESSAGE.match(path)
    if found is None or chat.row.messages[int(found[1])]["role"] == "assistant":
        return False
    return any(message == int(found[1]) for message, _ in chat.trained)


def lost_of_reply(
    rendering: Rendering, turn: Turn, message: Mapping[str, Any], tags: Tags
) -> list[tuple[str, str]]:
    """(path, field) of what the reply holds and its output doesn't, such as `messages[3].tool_calls[0]...`."""
    traced = turn.traced or rendering.traced
    if traced is None:
        return list(_missing_text(rendering.text[turn.start : turn.stop], turn.message, message, tags))
    written = _written(traced, turn.start, turn.stop)
    return [(_key(s), s.field or "") for s in _lost(traced, written, tags, turn.message)]


def printed_arguments(rendering: Rendering, turn: Turn, message: Mapping[str, Any]) -> str | None:
    """The path of a call's arguments that a template writes as Python prints them, which isn't JSON.

    What the reply says in its content or reasoning doesn't count: it may well mention a dict.
    """
    calls = list(enumerate(message.get("tool_calls") or []))
    if not calls:
        return None
    text = _around_calls(rendering, turn, message)
    for i, call in calls:
        arguments = call.get("function", call).get("arguments")
        if isinstance(arguments, Mapping) and arguments and repr(arguments) in text:
            return f"tool_calls[{i}].function.arguments"
    return None


def _around_calls(rendering: Rendering, turn: Turn, message: Mapping[str, Any]) -> str:
    """The reply's text without what its content and reasoning say."""
    traced = turn.traced or rendering.traced
    if traced is None:
        text = rendering.text[turn.start : turn.stop]
        for name in ("content", *REASONING_FIELDS):
            value = message.get(name)
            text = text.replace(value.strip(), "\0") if isinstance(value, str) and value.strip() else text
        return text
    parts = []
    for start, stop, source in _runs(traced, turn.start, turn.stop):
        is_text = source.field in ("content", *REASONING_FIELDS)
        parts.append("\0" if is_text else rendering.text[start:stop])
    return "".join(parts)


def lost_of_context(rendering: Rendering, trained: set[int], upto: int, tags: Tags) -> list[str]:
    """Paths of what the messages around the trained replies, and tools and documents, hold in vain."""
    traced = rendering.traced
    if traced is None:
        return []
    written = _written(traced, 0, len(rendering.text))
    paths = [
        _key(s)
        for s in _lost(traced, written, tags)
        if s.message is not None and s.message not in trained and s.message < upto
    ]
    seen = {traced.sources[s].path.partition("[")[0] for _, s in traced.text.runs}
    given = {s.path.partition("[")[0] for s in traced.sources if s.message is None}
    return paths + sorted(({"tools", "documents"} & given) - seen)


def changed(rendering: Rendering, messages: tuple[Mapping[str, Any], ...], tags: Tags) -> str | None:
    """The path of a content that is written otherwise than the row has it; None where there is none.

    Bare or as JSON; a text that is left out whole is another matter (`lost_messages`), and so is a part of a reply.
    """
    traced = rendering.traced
    if traced is None:
        return None
    written = _written(traced, 0, len(rendering.text))
    for source in traced.sources:
        if source.message is None or source.field != "content" or not _matters(source):
            continue
        is_reply = messages[source.message].get("role") == "assistant"
        marks = tags if is_reply else _NO_TAGS  # a template reads those of replies, and writes them anew
        found, bare = marks.marks.sub("", written.get(source.path, "")), _bare(source.text, marks)
        if not found or bare in found or (is_reply and len(found) < len(bare)):
            continue
        as_json = (json.dumps(source.text, ensure_ascii=ascii_only)[1:-1] for ascii_only in (True, False))
        if not any(_bare(form, marks) in found for form in as_json):
            return source.path
    return None


def lost_messages(rendering: Rendering, upto: int) -> list[int]:
    """The messages before `upto` that say something, of which nothing at all is written."""
    traced = rendering.traced
    if traced is None:
        return []
    seen = {traced.sources[s].message for _, s in traced.text.runs if traced.sources[s].field != "role"}
    speaking = {
        s.message
        for s in traced.sources
        if s.message is not None and s.message < upto and _matters(s) and s.text.strip()
        if s.field not in REASONING_FIELDS  # history goes without thoughts under most templates
    }
    return sorted(i for i in speaking - seen if i is not None)


def unfaithful(
    rendering: Rendering, messages: tuple[Mapping[str, Any], ...], tags: Tags, plain: Traced | None
) -> str | None:
    """The path of a text that a repaired rendering doesn't say as the row does; None where it says all of them.

    What is written of a text has to be the text bare: neither quoted nor printed, unless the template does the same
    without a repair (`plain`). A reply of history may lack its thought, and whole messages may be missing, which is
    another matter (`lost_messages`).
    """
    traced = next((t.traced for t in rendering.turns if t.traced), rendering.traced)
    if traced is None:
        return _unfaithful_text(rendering, messages, tags)
    written = _written(traced, 0, len(rendering.text))
    unrepaired = _written(plain, 0, len(plain.text)) if plain else {}
    for source in traced.sources:
        if source.message is None or source.message >= rendering.upto or not _matters(source):
            continue
        expected, found = _bare(source.text, tags), tags.marks.sub("", written.get(_key(source), ""))
        is_reply = messages[source.message].get("role") == "assistant"
        alike = unrepaired.get(_key(source)) == written.get(_key(source))
        if found and not alike and expected not in found and not (is_reply and found in expected):
            return source.path
    return None


def _unfaithful_text(rendering: Rendering, messages: tuple[Mapping[str, Any], ...], tags: Tags) -> str | None:
    text, at = _bare(rendering.text, tags), 0
    for i, message in enumerate(messages[: rendering.upto]):
        content = message.get("content")
        if isinstance(content, str) and (expected := _bare(content, tags)):
            found = text.find(expected, at)
            if found < 0:
                return f"messages[{i}].content"
            at = found + len(expected)
    return None


def _lost(
    traced: Traced, written: Mapping[str, str], tags: Tags, message: int | None = None
) -> Iterator[Source]:
    done: set[str] = set()
    for source in traced.sources:
        if (message is None or source.message == message) and _matters(source):
            key = _key(source)
            expected = _bare(source.text, tags)
            is_short = len(written.get(key, "")) < len(expected) and key not in done
            if is_short and not _in_another_form(source, expected, written):
                done.add(key)
                yield source


def _in_another_form(source: Source, expected: str, written: Mapping[str, str]) -> bool:
    """Whether a call's name stands in what is written of the same call, such as its id `functions.weather:0`."""
    if source.field != "tool_calls" or not source.path.endswith(".name"):
        return False
    call = source.path.partition("].")[0] + "]." + source.path.partition("].")[2].partition("]")[0] + "]"
    return any(path.startswith(call) and expected in text for path, text in written.items())


def _written(traced: Traced, start: int, stop: int) -> dict[str, str]:
    """What text[start:stop] has of each field, white space apart."""
    by_source: dict[int, list[str]] = defaultdict(list)
    text = str.__str__(traced.text)
    for a, b, s in _numbered_runs(traced, start, stop):
        if s:
            by_source[s].append("".join(text[a:b].split()))
    written: dict[str, str] = {}
    for s, parts in by_source.items():  # reasoning stands under several names: one of them is enough
        key, joined_text = _key(traced.sources[s]), "".join(parts)
        if len(joined_text) >= len(written.get(key, "")):
            written[key] = joined_text
    return written


def _numbered_runs(traced: Traced, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    runs, at = traced.text.runs, start
    for end, s in runs[bisect_right(runs, start, key=lambda r: r[0]) :]:
        yield at, min(end, stop), s
        if end >= stop:
            break
        at = end


def _runs(traced: Traced, start: int, stop: int) -> Iterator[tuple[int, int, Source]]:
    return ((a, b, traced.sources[s]) for a, b, s in _numbered_runs(traced, start, stop))


def _key(source: Source) -> str:
    """The path, one for all names of reasoning."""
    return (
        f"messages[{source.message}].{REASONING_FIELDS[0]}"
        if source.field in REASONING_FIELDS
        else source.path
    )


def _matters(source: Source) -> bool:
    if source.field in ("content", *REASONING_FIELDS):
        return not source.path.endswith(("(key)", "].type"))
    return source.field == "tool_calls" and (
        source.path.endswith(".name") or _ARGUMENT.search(source.path) is not None
    )


def _bare(text: str, tags: Tags) -> str:
    """The text without white space and the marks of a thought, which a template writes anew."""
    return "".join(tags.marks.sub("", text).split())


def _missing_text(output: str, i: int, message: Mapping[str, Any], tags: Tags) -> Iterator[tuple[str, str]]:
    for name in ("content", "reasoning_content"):
        value = message.get(name)
        if isinstance(value, str) and _bare(value, tags) not in _bare(output, tags):
            yield f"messages[{i}].{name}", name
    for n, call in enumerate(message.get("tool_calls") or []):
        if call.get("function", call).get("name", "") not in output:
            yield f"messages[{i}].tool_calls[{n}].name", "tool_calls"


# === control =============================================================================================


# A reply may bring its thought in its text, marks and all.
_THOUGHT = re.compile("think|thought|reason", re.IGNORECASE)


def headers_of(tokenizer: Any) -> list[str]:
    """The ordinary added tokens that the chat template writes around what messages and tools say.

    DeepSeek's <｜User｜> and <｜tool▁outputs▁begin｜> aren't special to their tokenizer, but whoever writes one begins
    a turn or forges a result. What it writes around calls may be in a text: replies are made of it.
    """
    added = {str(t) for t in tokenizer.added_tokens_decoder.values() if not t.special}
    marks = [t for t in added if not t.isspace() and not t.isalnum() and not _THOUGHT.search(t)]
    if not marks or not tokenizer.chat_template:
        return []
    pattern = re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True))))

    def written(*conversations: list[dict[str, Any]], tools: Any = None) -> set[str]:
        return set(pattern.findall(_first_rendering(tokenizer, conversations, tools)))

    say = [{"role": role, "content": "word"} for role in ("system", "user", "assistant", "user")]
    call = {"role": "assistant", "content": "", "tool_calls": [{"id": "abcdefghi", **_FUNCTION}]}
    result = {"role": "tool", "content": "word", "name": "word", "tool_call_id": "abcdefghi"}
    results = written([say[1], call, result], tools=[_FUNCTION]) - written([say[1], call], tools=[_FUNCTION])
    return sorted(written(say, say[1:], say[1:2]) | results)


_FUNCTION = {"type": "function", "function": {"name": "word", "arguments": {}}}


def _first_rendering(tokenizer: Any, conversations: Iterable[list[dict[str, Any]]], tools: Any) -> str:
    """The first of the conversations that the template takes, rendered; "" if it takes none."""
    try:  # what is wrong with it, chats will say; pairs don't need it
        template = Template(tokenizer.get_chat_template(tools=tools), tokenizer.special_tokens_map)
    except (RowError, ValueError):
        return ""
    for messages in conversations:
        try:
            return template.render(Inputs(tuple(messages), tools), add_generation_prompt=True)
        except RowError:
            continue
    return ""


def refuse_control(tokens: Tokens, inputs: Inputs) -> None:
    """Raise RowError if a text of the row, or the name of a field, holds a special token."""
    given = {
        "messages": inputs.messages,
        "tools": inputs.tools,
        "documents": inputs.documents,
        **inputs.kwargs,
    }
    if not tokens.has_control(json.dumps(given, ensure_ascii=False, default=str)):
        return
    for path, text in _leaves(given):
        if found := tokens.has_control(text):
            raise refused("control_text", path, found[0])


def refuse_alike(tokens: Tokens, encoded: Encoded, given: Mapping[str, Any]) -> None:
    """Raise RowError if the tokenizer made a special token of what is written otherwise; `given`: the row's texts."""
    for token, written in tokens.alike(encoded):
        path = next((path for path, text in _leaves(given) if written.strip() in text), "")
        why = f"it is written {written!r}, and the tokenizer normalises before it looks"
        raise refused("control_text", path, token, why)


def control_cuts(tokens: Tokens, rendering: Rendering, control: str) -> tuple[int, ...]:
    """Where the text is cut so that no control token is made of a row's characters.

    Raises RowError where control="refuse" and the template and the row write such a token together, and where the
    origin of characters isn't known.
    """
    if control == "parse":
        return ()
    traced = next((t.traced for t in rendering.turns if t.traced), rendering.traced)
    if traced is None:
        what = "the origin of this text's characters can't be followed through the template"
        why = "so control tokens of the row's can't be distinguished from the template's"
        raise RowError(what, reason="no_origins", why=why, fix="control='parse' trusts the row")
    runs, sources = traced.text.runs, traced.sources

    def foreign(found: Match[str]) -> Source | None:
        inside = (sources[s] for s in within(runs, *found.span()) if s)
        return next((s for s in inside if s.field != "role" or s.text not in ROLES), None)

    cuts = tokens.cuts(rendering.text, lambda found: foreign(found) is not None)
    if cuts and control == "refuse":
        found = tokens.control(rendering.text, cuts[0] - 1)[0]
        source = foreign(found)
        why = "the template and the row write it together"
        raise refused("control_text", source.path if source else "", found[0], why)
    return cuts


def _leaves(value: Any, path: str = "") -> Iterable[tuple[str, str]]:
    """Each string of a row with its path; the names of its fields, which are text too, among them."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            here = f"{path}.{key}" if path else str(key)
            yield here, str(key)
            yield from _leaves(item, here)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _leaves(item, f"{path}[{i}]")


# === refusals ============================================================================================

# By reason and what it is about: what, why, what to do.
_REFUSALS: dict[str, tuple[str, str, str]] = {
    "control_text": (
        "{of!r} is a control token of the tokenizer, written in the row's text",
        "parsed, it would forge the structure of the conversation",
        "control='text' encodes it as ordinary text, control='parse' as the token; or mend the row",
    ),
    "not_json": (
        "the template writes these arguments as Python prints them",
        "a model would be trained on calls that no parser reads",
        "repair='arguments_as_text' gives them as JSON text, or give a template that writes JSON",
    ),
    "dropped_field": (
        "the template leaves out this part of {of} that would be trained",
        "the model would be trained to answer without it",
        "give a template that writes it, remove the field, or dropped='warn'",
    ),
    "dropped_message": (
        "the template leaves out this whole message of the {of}",
        "the model would be trained to answer without having seen it",
        "give a template that writes it, remove the message, or dropped='warn'",
    ),
    "changed_text": (
        "written so, the template changes what this text says",
        "the model would be trained on another text than the row has",
        "mend the text, or give another template; dropped='warn' trains it as it is written",
    ),
}


def refused(name: str, path: str, of: str = "a reply", why: str = "") -> RowError:
    """The refusal of a name in the table; `of`: the token, or whose part or message it is."""
    what, usual, fix = _REFUSALS[name]
    reason = "dropped_field" if name == "dropped_message" else name
    return RowError(what.format(of=of), reason=reason, field=path, why=why or usual, fix=fix)
