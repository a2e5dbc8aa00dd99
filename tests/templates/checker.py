"""A slow check of a mask that shares nothing with the encoder: transformers' own rendering, ids and text.

For each reply that is trained:

1. the ids before it are those of `apply_chat_template(messages[:i], add_generation_prompt=True)` with the row's own
   switches, or of another spelling of the row (`Variant`), which a note has to tell; where such a prompt opens a
   thought, white space and the tag that closes it may follow as context, which a note has to tell, too;
2. it ends in a token at which the model's generation stops, and holds no other one;
3. what the row says of it stands in it, and nothing but the template's structure beside that;
4. it is what the template writes, or what a note says that it is;
5. what the other messages say stands in its context.

Texts are compared without white space, and as the tokenizer's own normaliser leaves them: of a decomposed accent it may
make a composed one, which is then all that any model sees. A reply before the first user's message is asked for by
nothing: it may be context.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from functools import lru_cache
from itertools import takewhile
from typing import Any, NamedTuple

from jinja2 import meta
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from ygivenx import Example, Sequence

Message = dict[str, Any]
NOW = datetime(2026, 6, 30, 12)
REASONING = ("reasoning_content", "reasoning", "thinking")
_AS_READ = (
    "as it is",
    "arguments as objects",
    "parts as one text",
)  # what reading a row does, without a note
_IGNORED = ("weight", "loss", "train")
_SWITCH = re.compile("think|reason|history|truncate|clear|keep|preserve")
_MARKS = re.compile(
    r"</?(?:seed:)?think(?:ing)?>|\[/?THINK\]|<\|channel>(?:thought)?|<channel\|>|<\|(?:START|END)_THINKING\|>"
)


class Variant(NamedTuple):
    """Another spelling of a row: its messages changed one by one, and switches of the template."""

    name: str
    change: Callable[[Message], Message]
    switches: Mapping[str, Any]


def faults(
    tokenizer: Any, row: Mapping[str, Any], example: Example, stops: Iterable[str], now: datetime = NOW
) -> list[str]:
    """What is wrong with a mask of policy "assistant", in words; empty if it satisfies the contract.

    stops: the tokens at which the model's generation ends. now: the time that the encoder had.
    """
    render = Renderer(tokenizer, row, now)
    ends = set(tokenizer.convert_tokens_to_ids(list(stops)))
    found: list[str] = []
    trained: list[int] = []
    for sequence in example.sequences:
        notes = bool(sequence.notes or example.notes)
        found += _of_weights(sequence, row)
        for i, start, stop in outputs(sequence):
            if not (sequence.weights[start:stop] > 0).any():
                continue
            trained.append(i)
            found += [f"reply {i}: {f}" for f in _of_reply(render, sequence, i, start, stop, ends, notes)]
        found += _of_context(render, sequence)
    return [*found, *_of_coverage(row, trained)]


def provable(tokenizer: Any, row: Mapping[str, Any], stops: Iterable[str], now: datetime = NOW) -> str | None:
    """The name of a spelling by which each reply of a row can be trained exactly; None if there is none."""
    render = Renderer(tokenizer, row, now)
    ends = set(tokenizer.convert_tokens_to_ids(list(stops)))
    replies = [
        i for i, m in enumerate(row["messages"]) if m["role"] == "assistant" and m.get("weight", 1) > 0
    ]
    for variant in render.variants():
        try:
            if replies and all(_is_provable(render, variant, i, ends) for i in replies):
                return variant.name
        except Exception:  # whatever a template raises
            continue
    return None


def rendered_in_full(tokenizer: Any, row: Mapping[str, Any], now: datetime = NOW) -> bool | None:
    """Whether the template writes all that the row says, in some spelling; None if it writes nothing.

    That a message is another role's is no spelling of the same row.
    """
    render, result = Renderer(tokenizer, row, now), None
    for variant in (v for v in render.variants() if _AS_SYSTEM not in v.name):
        try:
            texts = {
                i: _added(render, variant, i)
                for i, m in enumerate(row["messages"])
                if m["role"] == "assistant"
            }
        except Exception:  # whatever a template raises
            continue
        result = all(not missing(row["messages"][i], t) for i, t in texts.items()) and not list(
            _lacking(render, len(row["messages"]), render.text(variant, len(row["messages"])))
        )
        if result:
            return True
    return result


def _added(render: Renderer, variant: Variant, i: int) -> str:
    """What the rendering with reply i has after the beginning that it shares with the prompt before it."""
    shown, closed = render.try_text(variant, i, prompt=True) or "", render.text(variant, i + 1)
    same = takewhile(lambda pair: pair[0] == pair[1], zip(shown, closed, strict=False))
    return closed[len(list(same)) :]


# --- one reply -------------------------------------------------------------------------------------------


def _of_reply(
    render: Renderer, sequence: Sequence, i: int, start: int, stop: int, ends: set[int], notes: bool
) -> Iterator[str]:
    ids, tokenizer = sequence.ids.tolist(), render.tokenizer
    if ids[stop - 1] not in ends:
        yield f"its last token, {tokenizer.decode([ids[stop - 1]])!r}, isn't one at which generation stops"
    if any(t in ends for t in ids[start : stop - 1]):
        yield "generation stops before its end"
    said = tokenizer.decode(ids[start : stop - 1])
    content, closes = render.row["messages"][i].get("content"), len(re.findall("</think>", said))
    if isinstance(content, str) and "</think>" in content and closes > content.count("</think>"):
        thought = any(render.row["messages"][i].get(k) for k in REASONING)
        if not thought:
            yield "it closes more thoughts than the row has"
    for text in missing(render.row["messages"][i], said):
        if _bare(render.seen(text)) not in _bare(said):
            yield f"it lacks {text!r}"
    variant = render.spelling(ids, i, start, stop)
    if variant is None:
        yield "what stands before it isn't what inference shows"
        return
    if variant.name not in _AS_READ and not notes:
        yield f"no note says that it was rendered with {variant.name}"
    yield from _of_header(render, variant, i, said)
    yield from _of_thought(tokenizer.decode(ids[:start]), said)
    yield from _of_writing(render, variant, ids, i, start, stop, said, notes)


_OPENS = re.compile(
    r"(?:<(?:seed:)?think(?:ing)?>|\[THINK\]|<\|channel>thought|<\|START_THINKING\|>|Here are my reasoning steps:)\s*\Z"
)
_CLOSES = re.compile(
    r"</(?:seed:)?think(?:ing)?>|\[/THINK\]|<channel\|>|<\|END_THINKING\|>|\[BEGIN FINAL RESPONSE\]"
)


def _of_thought(context: str, said: str) -> Iterator[str]:
    """An answer that stands where the prompt has the model think, and no thought is closed."""
    if _OPENS.search(context) and not _CLOSES.search(said):
        yield "its answer is trained as a thought"


def _of_header(render: Renderer, variant: Variant, i: int, said: str) -> Iterator[str]:
    """A reply that begins with a header: the template ignores add_generation_prompt."""
    begins = re.match(r"\s*(<\|[^|>]+\|?>|<[a-z_]+>|<｜[^｜]+｜>|\[/?[A-Z]+\])", said)
    content = str(render.row["messages"][i].get("content") or "")
    if begins is None or _MARKS.match(begins[1]) or begins[1] in content:
        return
    user = render.try_text(variant, i + 1, {"role": "user", "content": "Zq"}) or ""
    header = user.partition("Zq")[0][-30:].strip()
    opens = begins[1] in header and not header.endswith(begins[1])  # the header's first token, not its last
    if opens or re.search("assistant|model|bot", begins[1], re.I):
        yield f"the prompt's header {begins[1]!r} is trained"


def _of_writing(
    render: Renderer,
    variant: Variant,
    ids: list[int],
    i: int,
    start: int,
    stop: int,
    said: str,
    notes: bool,
) -> Iterator[str]:
    """Whether the template writes the reply so; if not, a note must say so and only structure may differ."""
    closed = render.closes(variant, i)
    if closed[:stop] == ids[:stop]:
        return
    if not notes:
        yield "it isn't what the template writes for it, and no note says so"
    if closed[: stop - 1] == ids[: stop - 1]:
        rest = render.tokenizer.decode(closed[stop - 1 :]).strip()
        if rest:
            yield f"an end stands where the template goes on with {rest[:40]!r}"
        return
    left = said
    for text in sorted(texts_of(render.row["messages"][i]), key=len, reverse=True):
        left = left.replace(text.strip(), " ", 1)
    known = render.tokenizer.chat_template + render.tokenizer.decode(closed) + " null true false"
    said_by_none = (t for t in re.findall(r"<[^<>\s]+>|\w{3,}", left) if t not in known)
    strange = [t for t in said_by_none if not _MARKS.fullmatch(t)]
    if strange:
        yield f"it holds {strange[0][:40]!r}, which neither row nor template says"


def _is_provable(render: Renderer, variant: Variant, i: int, ends: set[int]) -> bool:
    shown, closed = render.ids(render.text(variant, i, prompt=True)), render.ids(render.text(variant, i + 1))
    at = next((n for n in range(len(shown), len(closed)) if closed[n] in ends), None)
    if at is None or closed[: len(shown)] != shown:
        return False
    said = render.tokenizer.decode(closed[len(shown) : at])
    context = render.tokenizer.decode(shown)
    wrong = [*_of_header(render, variant, i, said), *_of_thought(context, said)]
    whole = not missing(render.row["messages"][i], said) and not wrong
    return whole and not list(_lacking(render, i, context))


# --- the rest of a sequence ------------------------------------------------------------------------------


def _of_weights(sequence: Sequence, row: Mapping[str, Any]) -> Iterator[str]:
    at = 0
    for s in sequence.segments:
        if s.start != at or s.stop <= s.start:
            yield f"segments don't partition at {at}"
        at = s.stop
    if at != len(sequence):
        yield "segments end early"
    if ((sequence.weights > 0) & ~sequence.output).any():
        yield "a token that isn't output is trained"
    weighted = any(k in m for m in row["messages"] for k in _IGNORED)
    if not weighted and (sequence.output[1:] != (sequence.weights[1:] > 0)).any():
        yield "a token of the output isn't trained"


def _of_context(render: Renderer, sequence: Sequence) -> Iterator[str]:
    last = max((i for i, _, _ in outputs(sequence)), default=0)
    text = render.tokenizer.decode(sequence.ids.tolist())
    yield from _lacking(render, last, text)


def _lacking(render: Renderer, stop: int, text: str) -> Iterator[str]:
    """Whose texts before message `stop`, other than replies, don't stand in a context; the users' in order."""
    inside, at = _bare(text), 0
    for i, message in enumerate(render.row["messages"][:stop]):
        if message["role"] == "assistant":
            continue
        for said in _contents(message):
            is_user = message["role"] == "user"
            forms = map(_bare, (said, render.seen(said), json.dumps(said)))
            place, length = max((inside.find(f, at if is_user else 0), len(f)) for f in forms)
            if place < 0:
                yield f"message {i} ({message['role']}) isn't in the context as it is"
            elif is_user:
                at = place + length


def _of_coverage(row: Mapping[str, Any], trained: list[int]) -> Iterator[str]:
    for i in {i for i in trained if trained.count(i) > 1}:
        yield f"reply {i} is trained twice"
    roles = [m["role"] for m in row["messages"]]
    for i, message in enumerate(row["messages"]):
        wanted = message["role"] == "assistant" and message.get("weight", 1) > 0
        if i in trained and not wanted:
            yield f"message {i} is trained"
        if wanted and i not in trained and "user" in roles[:i] and roles[i - 1] != "assistant":
            yield f"reply {i} isn't trained"


def outputs(sequence: Sequence) -> list[tuple[int, int, int]]:
    """(message, start, stop) of each reply's output."""
    runs: dict[int, tuple[int, int]] = {}
    for s in sequence.segments:
        if s.output and s.message is not None:
            runs[s.message] = (min(s.start, runs.get(s.message, (s.start, 0))[0]), s.stop)
    return [(i, a, b) for i, (a, b) in runs.items()]


# --- what a message says ---------------------------------------------------------------------------------


def missing(message: Mapping[str, Any], text: str) -> list[str]:
    """What a reply says that a text doesn't hold."""
    inside = _bare(text)
    return [t for t in texts_of(message) if _bare(t) not in inside and _bare(json.dumps(t)) not in inside]


def texts_of(message: Mapping[str, Any]) -> list[str]:
    """All that a reply says: its thought, its content without the marks of thoughts, its calls."""
    thought = next((str(message[k]) for k in REASONING if message.get(k)), "")
    parts = [p for c in _contents(message) for p in _MARKS.split(c)]
    for call in message.get("tool_calls") or []:
        function = call.get("function", call)
        arguments = function["arguments"]
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        parts += [function["name"], *_leaves(arguments)]
    return [t for t in (thought, *parts) if t.strip()]


def _contents(message: Mapping[str, Any]) -> list[str]:
    content = message.get("content")
    if isinstance(content, list):
        return [p["text"] for p in content if isinstance(p, Mapping) and p.get("text", "").strip()]
    return [content] if isinstance(content, str) and content.strip() else []


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        yield value


def _bare(text: str) -> str:
    """A text without what templates change in it: white space, and the marks of quoting."""
    return re.sub(r"""\\[nt]|[\s"'\\]|</?think>""", "", unicodedata.normalize("NFC", text))


# --- transformers' rendering -----------------------------------------------------------------------------


class Renderer:
    """transformers' rendering of a row in each of its spellings."""

    def __init__(self, tokenizer: Any, row: Mapping[str, Any], now: datetime) -> None:
        self.tokenizer, self.row = tokenizer, row
        self.more = {k: row[k] for k in ("tools", "documents") if row.get(k) is not None}
        self.more |= dict(row.get("chat_template_kwargs") or {})
        self.now = now
        self._texts: dict[Any, str] = {}
        self._ids: dict[str, list[int]] = {}

    def variants(self) -> Iterator[Variant]:
        """The row as it is, other spellings of its messages, and each with a switch that it leaves open."""
        plain = [Variant(name, change, {}) for name, change in _CHANGES.items() if self._changes(change)]
        plain.insert(0, Variant("as it is", dict, {}))
        yield from plain
        for switch in switches_of(self.tokenizer.chat_template):
            if switch not in self.more:
                for value in (False, True):
                    for v in plain:
                        name = f"{switch}={value}" + (f", {v.name}" if v.name != "as it is" else "")
                        yield Variant(name, v.change, {switch: value})

    def _changes(self, change: Callable[[Message], Message]) -> bool:
        return any(change(m) != m for m in self.row["messages"])

    def spelling(self, ids: list[int], i: int, start: int, stop: int) -> Variant | None:
        """A spelling whose prompt before message i has the ids before `start`; if any, one that writes the reply so."""
        first = None
        for variant in self.variants():
            text = self.try_text(variant, i, prompt=True)
            if text is None or not self._shows(text, ids[:start]):
                continue
            closed = self.closes(variant, i)
            if closed[:stop] == ids[:stop]:
                return variant
            if first is None or (closed and not self.closes(first, i)):
                first = variant
        return first

    def _shows(self, prompt: str, context: list[int]) -> bool:
        """Whether a context is what a prompt shows, or that with the thought which it opens closed at once."""
        shown = self.ids(prompt)
        rest = self.tokenizer.decode(context[len(shown) :])
        closed = not rest or (_OPENS.search(prompt) and _CLOSES.fullmatch(rest.strip()))
        return context[: len(shown)] == shown and bool(closed)

    def closes(self, variant: Variant, i: int) -> list[int]:
        """The ids of the rendering that ends with message i; none where the template fails."""
        text = self.try_text(variant, i + 1)
        return [] if text is None else self.ids(text)

    def seen(self, text: str) -> str:
        """A text as the tokenizer gives it back."""
        return str(self.tokenizer.decode(self.ids(text)))

    def ids(self, text: str) -> list[int]:
        if text not in self._ids:
            self._ids[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._ids[text]

    def try_text(self, variant: Variant, stop: int, *more: Message, prompt: bool = False) -> str | None:
        try:
            return self.text(variant, stop, *more, prompt=prompt)
        except Exception:  # whatever a template raises
            return None

    def text(self, variant: Variant, stop: int, *more: Message, prompt: bool = False) -> str:
        key = (variant.name, stop, prompt, len(more))
        if key not in self._texts:
            messages = [
                {k: v for k, v in variant.change(m).items() if k not in _IGNORED}
                for m in self.row["messages"][:stop]
            ]
            self._texts[key] = self._rendered([*messages, *more], prompt, {**self.more, **variant.switches})
        return self._texts[key]

    def _rendered(self, messages: list[Message], prompt: bool, more: Mapping[str, Any]) -> str:
        compiled = _compile_jinja_template(self.tokenizer.chat_template)  # cached: the one that renders
        present = compiled.globals["strftime_now"]
        compiled.globals["strftime_now"] = self.now.strftime
        try:
            return self._by_transformers(messages, prompt, more)
        finally:
            compiled.globals["strftime_now"] = present

    def _by_transformers(self, messages: list[Message], prompt: bool, more: Mapping[str, Any]) -> str:
        if messages:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt, **more
            )
        options = {**self.tokenizer.special_tokens_map, **more, "add_generation_prompt": prompt}
        (text,), _ = render_jinja_template([[]], chat_template=self.tokenizer.chat_template, **options)
        return text  # transformers refuses to render no message, though templates can


@lru_cache(maxsize=512)
def switches_of(template: str) -> tuple[str, ...]:
    """The template's variables that turn thinking on or off, or say how much of it history shows."""
    environment = _compile_jinja_template(template).environment
    return tuple(
        sorted(n for n in meta.find_undeclared_variables(environment.parse(template)) if _SWITCH.search(n))
    )


def _with_text(message: Message) -> Message:
    made = json.loads(json.dumps(message))
    for c in made.get("tool_calls") or []:
        f = c.get("function", c)
        if isinstance(f["arguments"], dict):
            f["arguments"] = json.dumps(f["arguments"], ensure_ascii=False)
    return made


def _with_objects(message: Message) -> Message:
    made = json.loads(json.dumps(message))
    for c in made.get("tool_calls") or []:
        f = c.get("function", c)
        if isinstance(f["arguments"], str):
            f["arguments"] = json.loads(f["arguments"])
    return made


def _with_parts(message: Message) -> Message:
    content = message.get("content")
    return message | ({"content": [{"type": "text", "text": content}]} if isinstance(content, str) else {})


def _without_null(message: Message) -> Message:
    return {**message, "content": ""} if message.get("content") is None else message


def _without_nulls(message: Message) -> Message:
    return {k: v for k, v in message.items() if v is not None}


def _with_reasoning(message: Message) -> Message:
    thought = next((message[k] for k in REASONING if message.get(k) is not None), None)
    return message if thought is None else {**message, **dict.fromkeys(REASONING, thought)}


def _as_system(message: Message) -> Message:
    return {**message, "role": "system"} if message["role"] == "developer" else message


def _joined(message: Message) -> Message:
    content = message.get("content")
    only_text = isinstance(content, list) and all(p.get("type") == "text" for p in content)
    return {**message, "content": "".join(p["text"] for p in content)} if only_text else message


def _out_of_content(message: Message) -> Message:
    content = message.get("content")
    if message["role"] != "assistant" or not isinstance(content, str) or "</think>" not in content:
        return message
    thought, _, answer = content.partition("</think>")
    return {**message, "content": answer.strip(), "reasoning_content": thought.replace("<think>", "").strip()}


_AS_SYSTEM = "the developer's message as the system's"


def _both(*changes: Callable[[Message], Message]) -> Callable[[Message], Message]:
    def change(message: Message) -> Message:
        for c in changes:
            message = c(message)
        return message

    return change


_CHANGES: dict[str, Callable[[Message], Message]] = {
    "arguments as text": _with_text,
    "arguments as objects": _with_objects,
    "contents as parts": _with_parts,
    "content of null as nothing": _without_nulls,
    "content of null as an empty text": _without_null,
    "the thought under each of its names": _with_reasoning,
    "the thought of a content in its field": _out_of_content,
    _AS_SYSTEM: _as_system,
    "parts as one text": _joined,
    "the thought under each name, arguments as objects": _both(_with_reasoning, _with_objects),
    "an empty text for null, arguments as text": _both(_without_null, _with_text),
    "contents as parts, arguments as text": _both(_with_parts, _with_text),
}
