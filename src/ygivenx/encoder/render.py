"""Stage 1, render: a conversation under its template, and the nouns from there to the tokenizer.

A `Chat` is a row with the template that it is written with. It has many renderings (`Renderings` makes each once). A
`Turn` says which characters of one of them a reply is, a `Rendering` is a text with the turns that it trains, an
`Outline` says of which kind its characters are, and a `Candidate` is all the texts of a row, ready to be encoded. A
candidate is proven when its ids are, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any, TypeVar

from ..errors import RowError, nearest
from ..rows.messages import KNOWN_KEYS, unread_keys
from ..rows.nouns import Conversation
from ..templating.inputs import REASONING_FIELDS, Inputs, inputs_of
from ..templating.template import Renderer, Template
from ..templating.tracing import Marked, Traced, marked
from .policy import Options

SHOWN = 40  # characters of a text that an error quotes
USER = {"role": "user", "content": "x"}

V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Turn:
    """Message `message` is produced as text[start:stop], of which text[end:stop] is the token that ends it.

    `text` is at least P + O. cut: what stands before this character is encoded by itself. notes: what was mended.
    """

    message: int
    text: str
    start: int
    end: int
    stop: int
    traced: Traced | None = None  # of a text that a repair put together
    notes: tuple[str, ...] = ()
    cut: int | None = None

    @property
    def proven(self) -> str:
        """P + O."""
        return self.text[: self.stop]


@dataclass(frozen=True, slots=True)
class Rendering:
    """A text to be encoded, with the turns that it trains; `upto`: it renders messages[:upto]."""

    text: str
    turns: tuple[Turn, ...]
    upto: int
    traced: Traced | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Candidate:
    """The texts of a row, one or one for each turn. notes: what a strategy changed of the row's inputs."""

    outlines: tuple[Outline, ...]
    notes: tuple[str, ...] = ()

    @property
    def texts(self) -> list[tuple[str, tuple[int, ...]]]:
        """(text, the characters at which it is cut and its parts are encoded apart) of each."""
        return [(o.text, o.cuts) for o in self.outlines]


class Kept(dict[int, V]):
    """Values by number, each made when it is first asked for."""

    def __init__(self, make: Callable[[int], V]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, n: int) -> V:
        self[n] = self._make(n)
        return self[n]


@dataclass(frozen=True, eq=False)
class Renderings:
    """One conversation under one template: its renderings, each made once.

    Each table is filled when it is asked: see `Kept`. Asking raises RowError where the template fails.
    """

    renderer: Renderer
    inputs: Inputs
    tags: Tags

    def __len__(self) -> int:
        return len(self.inputs.messages)

    @cached_property
    def prompts(self) -> Kept[str]:
        """P by message: what inference shows before it."""
        return Kept(lambda i: self.renderer.render(self.inputs.upto(i), add_generation_prompt=True))

    @cached_property
    def shown(self) -> Kept[str | None]:
        """`prompts`, None where the template can write none."""
        return Kept(self._prompt_or_none)

    def _prompt_or_none(self, i: int) -> str | None:
        try:
            return self.prompts[i]
        except RowError:
            return None

    @cached_property
    def closed(self) -> Kept[str]:
        """F by its number of messages: these and nothing after them."""
        return Kept(lambda stop: self.renderer.render(self.inputs.upto(stop)))

    @cached_property
    def traced(self) -> Kept[Traced | None]:
        """`closed` with the origin of each character, where that can be known."""
        return Kept(lambda stop: self.renderer.trace(self.marked.upto(stop), self.closed[stop]))

    @cached_property
    def traced_prompts(self) -> Kept[Traced | None]:
        """`prompts` likewise."""
        trace = partial(self.renderer.trace, add_generation_prompt=True)
        return Kept(lambda i: trace(self.marked.upto(i), self.prompts[i]))

    @cached_property
    def begins(self) -> Kept[int | None]:
        """By message: how much of its F says all of its P, white space apart; None where F begins otherwise."""
        return Kept(lambda i: self._begin(self.prompts[i], self.closed[i + 1]))

    def _begin(self, shown: str, text: str) -> int | None:
        return len(shown) if self.renderer.begins(text, shown) else position_after(shown, text)

    @cached_property
    def begins_unthought(self) -> Kept[int | None]:
        """The same of P without the open or empty thought at its end."""
        return Kept(lambda i: position_after(self.tags.without(self.prompts[i]), self.closed[i + 1]))

    @cached_property
    def after_user(self) -> Kept[str | None]:
        """By the number of messages: the prompt after them and a user's; None where the template can write none."""
        return Kept(lambda stop: render_or_none(self.renderer, self.inputs.upto(stop, USER)))

    @cached_property
    def following(self) -> Kept[str]:
        """By message: the next prompt; where no message asks for it, the one after a user, or its calls' results.

        "" where the template can write none.
        """
        return Kept(lambda i: _following(self, i))

    @cached_property
    def thinks(self) -> Kept[bool]:
        """By message: whether it has a thought."""
        return Kept(lambda i: self.tags.thinks(self.inputs.messages[i]))

    @cached_property
    def marked(self) -> Marked:
        """The inputs, each text with its origin."""
        return marked(self.inputs)

    @cached_property
    def whole(self) -> str:
        """The rendering of all messages."""
        return self.closed[len(self)]

    @cached_property
    def replies(self) -> list[int]:
        """The messages that are the assistant's."""
        return [i for i, m in enumerate(self.inputs.messages) if m.get("role") == "assistant"]


def render_or_none(renderer: Renderer, inputs: Inputs) -> str | None:
    """The prompt after these messages, or None where the template can't write one."""
    try:
        return renderer.render(inputs, add_generation_prompt=True)
    except RowError:
        return None


def _following(rendered: Renderings, i: int) -> str:
    # The row's own next message, such as a tool's result, shows better than an invented one how the turn is followed.
    following = next((j for j in rendered.replies if j > i), len(rendered))
    if i + 1 < len(rendered) and following != i + 1:
        return rendered.shown[following] or ""
    calls = rendered.inputs.messages[i].get("tool_calls") or []
    more = [_result(c) for c in calls] or [USER]
    return render_or_none(rendered.renderer, rendered.inputs.upto(i + 1, *more)) or ""


def _result(call: dict[str, Any]) -> dict[str, Any]:
    name = call.get("function", call).get("name", "f")
    result = {"role": "tool", "name": name, "content": "x"}
    return result | ({"tool_call_id": call["id"]} if "id" in call else {})


def position_after(shown: str, text: str) -> int | None:
    """How much of `text` says all of `shown`, white space apart; None if it doesn't begin with it."""
    # "a b" and "a\n b c" agree up to the place before " c": white space is skipped on both sides.
    expected, have = "".join(shown.split()), 0
    for at, character in enumerate(text):
        if have == len(expected):
            return at
        if not character.isspace():
            if character != expected[have]:
                return None
            have += 1
    return None


def quoted(text: str) -> str:
    """A text as an error shows it."""
    return repr(text) if len(text) <= SHOWN else repr(text[:SHOWN]) + "…"


# === outlines ============================================================================================


Run = tuple[int, str, bool, int | None]  # its first character, kind, output, message
Borders = tuple[
    int, int, int, int
]  # a turn's message; its output is [start, stop), its end token [end, stop)
Spans = Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Outline:
    """A text to be encoded: where its runs begin, and the borders of its turns.

    control: where control tokens must stand in the text, if that isn't known otherwise.
    cuts: the characters at which it is cut, its parts encoded apart.
    """

    text: str
    turns: tuple[Borders, ...]
    runs: tuple[Run, ...]
    notes: tuple[str, ...] = ()
    control: Spans = ()
    cuts: tuple[int, ...] = ()

    @property
    def places(self) -> Iterator[int]:
        """Every character that the outline speaks of."""
        for turn in self.turns:
            yield from turn[1:]
        for run in self.runs:
            yield run[0]
        for span in self.control:
            yield from span
        yield from self.cuts

    def moved(self, text: str, to: Mapping[int, int]) -> Outline:
        """The same of another text, in which each of its places stands elsewhere."""
        turns = tuple([(i, to[a], to[b], to[c]) for i, a, b, c in self.turns])
        runs = tuple([(to[at], kind, output, i) for at, kind, output, i in self.runs])
        control, cuts = [(to[a], to[b]) for a, b in self.control], tuple([to[at] for at in self.cuts])
        return Outline(text, turns, runs, self.notes, control, cuts)


# === a conversation under its template ===================================================================


KIND_OF_ROLE = {"assistant": "answer", "function": "tool", "ipython": "tool"}
_KINDS = ("answer", "reasoning", "tool_call", "end_of_turn")
_OF_REPLIES = tuple((kind, True) for kind in _KINDS)
_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"})


@dataclass(frozen=True)
class Chat:
    """A conversation under the template that it is written with.

    to_train: the replies of which some part would be trained; the others are context.
    """

    row: Conversation
    inputs: Inputs
    template: Template
    tags: Tags
    options: Options
    to_train: tuple[int, ...]

    @property
    def as_given(self) -> Renderings:
        """The renderings of the row as it stands."""
        return self.renderings(self.template, self.inputs)

    def renderings(self, renderer: Renderer, inputs: Inputs) -> Renderings:
        """The renderings of these inputs, made once however many strategies share them."""
        key = (id(renderer), id(inputs))  # both live as long as what is kept of them
        if key not in self._renderings:
            self._renderings[key] = Renderings(renderer, inputs, self.tags)
        return self._renderings[key]

    @cached_property
    def _renderings(self) -> dict[tuple[int, int], Renderings]:
        return {}

    @cached_property
    def trained(self) -> frozenset[tuple[int, str]]:
        """(message, kind) of every part of a message that the policy and the row give a weight."""
        weigh, messages = self.options.weigh, list(enumerate(self.row.messages))
        last = max((i for i, m in messages if m.get("role") == "assistant"), default=-1)
        parts = ((i, m, *part) for i, m in messages for part in _parts_of(str(m.get("role"))))
        return frozenset(
            (i, kind)
            for i, m, kind, output in parts
            if weigh(kind, output, i, str(m.get("role")), output and i == last, m.get("weight", 1.0))
        )


def _parts_of(role: str) -> tuple[tuple[str, bool], ...]:
    """(kind, output) of what a message of a role may hold."""
    return _OF_REPLIES if role == "assistant" else ((KIND_OF_ROLE.get(role, role), False),)


def chat_of(row: Conversation, options: Options, templates: dict[str, tuple[Template, Tags]]) -> Chat:
    """The chat of a row; templates that are met for the first time are compiled and kept in `templates`."""
    kwargs = {**options.template_kwargs, **row.template_kwargs}
    inputs = inputs_of(row.messages, row.tools, row.documents, kwargs, options.now)
    template, tags = template_of(options.tokens.tokenizer, inputs, templates)
    for name in kwargs:
        if name in _RESERVED or name in template.variables or name.endswith("_token"):
            raise _reserved(name)
    replies = [i for i, m in enumerate(row.messages) if m.get("role") == "assistant"]
    chat = Chat(row, inputs, template, tags, options, ())
    return replace(
        chat, to_train=tuple(i for i in replies if any((i, kind) in chat.trained for kind in _KINDS))
    )


def template_of(
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
    """What a row says that neither the template nor the encoder reads, and thoughts that aren't one thought."""
    source, read = chat.template.source, chat.template.undeclared
    keys = unread_keys(chat.row.messages, source)
    thoughts = ((i, chat.tags.oddity(chat.inputs.messages[i])) for i in chat.to_train)
    return (
        *(f"messages[{i}]: {oddity}" for i, oddity in thoughts if oddity),
        *(
            f"the message key {key!r} is read by neither the template nor ygivenx{nearest(key, KNOWN_KEYS)}"
            for key in keys
        ),
        *(
            f"the template doesn't read {name!r} of chat_template_kwargs{nearest(name, read)}"
            for name in chat.inputs.kwargs
            if name not in read
        ),
    )


# === thoughts ============================================================================================
# By whatever tags a template has: `<think>`, Mistral's `[THINK]`, Gemma's channel, Seed's, Kimi's. They are found in
# its source, or in what it writes around the reasoning of a reply.


# An opening tag whose closing one has a slash after its first character.
_SLASHED = re.compile(
    r"[<\[◁](?=[^<>\[\]◁▷\s'\"{}]*(?:think|thought|reason))[^<>\[\]◁▷\s'\"{}/]+[>\]▷]", re.IGNORECASE
)
_OTHERS = (
    ("<|channel>thought", "<channel|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),
    ("<|think_start|>", "<|think_end|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<unused94>thought", "<unused95>"),
)
_TAG = r"(?:<[^<>\s]*>|\[[^\[\]\s]*\]|◁[^◁▷]*▷)"
_BEFORE, _AFTER = re.compile(rf"{_TAG}\w*\s*\Z"), re.compile(rf"\s*({_TAG})")


@dataclass(frozen=True)
class Tags:
    """The tags around a thought: (opening, closing), those of the template first.

    joint: what the template writes between a thought and its answer, such as `\n</think>\n\n`; "" if it shows none.
    """

    pairs: tuple[tuple[str, str], ...] = ()
    joint: str = ""
    is_guessed: bool = (
        False  # the first pair is what stands around a thought, and may be no more than part of its tags
    )

    def opens(self, text: str) -> bool:
        """Whether a text ends in an open thought, by tags that are known."""
        return text.rstrip().endswith(self._openings)

    @cached_property
    def _openings(self) -> tuple[str, ...]:
        return tuple(a for a, _ in self.pairs[self.is_guessed :])

    def closes_at(self, text: str, start: int, stop: int) -> tuple[str, int] | None:
        """(closing, its end) where an empty thought, or no more than its closing tag, stands in text[start:stop]."""
        found = self._empty.match(text, start, stop)
        return (found[1], found.end()) if found else None

    @cached_property
    def _empty(self) -> re.Pattern[str]:
        openings, closings = ("|".join(re.escape(tags[n]) for tags in self.pairs) for n in (0, 1))
        return re.compile(rf"(?:\s*(?:{openings}))?(\s*(?:{closings})\s*)")

    @cached_property
    def opened(self) -> re.Pattern[str]:
        """A text that ends in an open thought."""
        return _any_of(rf"{re.escape(a)}\s*\Z" for a, _ in self.pairs)

    @cached_property
    def closed(self) -> re.Pattern[str]:
        """A text that ends in an empty thought, closed already."""
        return _any_of(rf"{re.escape(a)}\s*{re.escape(b)}\s*\Z" for a, b in self.pairs)

    @cached_property
    def thought(self) -> re.Pattern[str]:
        """A text that begins with a whole thought."""
        return _any_of(rf"\s*{re.escape(a)}.*?{re.escape(b)}\s*" for a, b in self.pairs)

    @cached_property
    def rest_of_thought(self) -> re.Pattern[str]:
        """A text that begins with the rest of a thought which its prompt opens."""
        return _any_of(rf".*?{re.escape(b)}\s*" for _, b in self.pairs)

    @cached_property
    def marks(self) -> re.Pattern[str]:
        """Any of the tags: a template reads them as marks, and writes them anew."""
        return _any_of(re.escape(tag) for pair in self.pairs for tag in pair)

    @cached_property
    def closings(self) -> re.Pattern[str]:
        """What closes a thought, by tags that are known."""
        return _any_of(dict.fromkeys(re.escape(b) for _, b in self.pairs[self.is_guessed :]))

    @cached_property
    def begun(self) -> re.Pattern[str]:
        """A text that begins with a thought, its opening tag or not: (thought, answer)."""
        openings, closings = ("|".join(re.escape(tags[n]) for tags in self.pairs) for n in (0, 1))
        return re.compile(rf"\s*(?:{openings})?(.*?)(?:{closings})(.*)", re.DOTALL)

    def pair_of(self, prompt: str) -> tuple[str, str]:
        """The tags of the thought that a prompt opens."""
        return max(self.pairs, key=lambda pair: prompt.rfind(pair[0]))

    def joint_of(self, pair: tuple[str, str]) -> str:
        """What stands between a thought with these tags and its answer."""
        return self.joint if pair[1] in self.joint else f"\n{pair[1]}\n\n"

    def closing_of(self, pair: tuple[str, str]) -> str:
        """As much of it as closes the thought: what a template writes before answers is no part of it."""
        found = re.search(rf"\s*{re.escape(pair[1])}\s*", self.joint_of(pair))
        return found[0] if found else pair[1]

    def without(self, text: str) -> str:
        """A text without the open or empty thought at its end."""
        return self.closed.sub("", self.opened.sub("", text))

    def thinks(self, message: Mapping[str, Any]) -> bool:
        """Whether a reply has a thought: in a field of its own, as a part of its content, or between tags in it."""
        if any(
            (m := message.get(name)) and (not hasattr(m, "strip") or m.strip()) for name in REASONING_FIELDS
        ):
            return True
        content = message.get("content")
        if isinstance(content, list):
            return any(
                part.get("type") in ("thinking", "reasoning") for part in content if isinstance(part, dict)
            )
        return content is not None and bool(content) and any(close in content for _, close in self.pairs)

    def oddity(self, message: Mapping[str, Any]) -> str:
        """What a reader has to know of a reply with two thoughts, or with one that never ends; "" of any other."""
        if opening := self.unclosed(message):
            return f"its content begins with {opening} and never closes it: an unfinished thought is trained"
        content, field = message.get("content"), next((n for n in REASONING_FIELDS if message.get(n)), None)
        if field is None or not isinstance(content, str) or not self.thought.match(content):
            return ""
        return f"two thoughts are trained: that of {field}, and that between tags in its content"

    def unclosed(self, message: Mapping[str, Any]) -> str | None:
        """The tag that opens a thought at the beginning of a content which never closes it."""
        content = message.get("content")
        if isinstance(content, list):
            content = next((part.get("text") for part in content if isinstance(part, dict)), None)
        if not content or not hasattr(content, "lstrip"):
            return None
        begun = content.lstrip()
        if not begun.startswith(self._all_openings):
            return None
        return next((a for a, b in self.pairs if begun.startswith(a) and b not in content), None)

    @cached_property
    def _all_openings(self) -> tuple[str, ...]:
        return tuple(a for a, _ in self.pairs)

    def own_thought(self, message: Mapping[str, Any], pair: tuple[str, str]) -> tuple[str, str, str] | None:
        """(reasoning, closing, answer) of a reply that brings its own, as it follows an open thought; else None.

        Closing is the text between the two, "" where the content has it.
        """
        content, reasoning = message.get("content") or "", message.get("reasoning_content")
        opening, closing = pair
        if not isinstance(content, str):
            return None
        if isinstance(reasoning, str) and reasoning.strip():
            return reasoning.strip(), self.joint_of(pair), content
        if closing not in content:
            return None
        begun = content.lstrip()
        return "", "", begun[len(opening) :].lstrip() if begun.startswith(opening) else content


def _any_of(patterns: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(patterns) or "(?!)", re.DOTALL)


@lru_cache(maxsize=256)
def _tags_in(source: str) -> tuple[tuple[str, str], ...]:
    # `<think>` → `</think>`, `[THINK]` → `[/THINK]`.
    slashed = [(t, t[0] + "/" + t[1:]) for t in dict.fromkeys(_SLASHED.findall(source))]
    pairs = [p for p in (*slashed, *_OTHERS) if p[0] in source and p[1] in source]
    think = ("<think>", "</think>")  # which data sets have, whether or not a template knows it
    return tuple(dict.fromkeys((*pairs, think)))


def tags_of(template: Template) -> Tags:
    """The tags of a template; those that only its renderings show among them."""
    pairs = _tags_in(template.source)
    if not re.search("reason|think", template.source):
        return Tags(pairs)
    before, joint = _around_thought(template)
    opening, closing = _BEFORE.search(before), _AFTER.match(joint)
    # Only `<think>`, which every template gets, and yet it reads reasoning: its tags are put together as it runs.
    if len(pairs) == 1 and opening and closing:
        guessed = (opening[0].strip(), closing[1])
        return Tags(tuple(dict.fromkeys((guessed, *pairs))), joint, guessed not in pairs)
    return Tags(pairs, joint)


def _around_thought(template: Template) -> tuple[str, str]:
    """What a template writes before the reasoning of a reply, and between that and its answer; "" where it has none."""
    thought, answer = "\ue000", "\ue001"  # for private use: no template writes them
    reply: dict[str, Any] = {
        "role": "assistant",
        "content": answer,
        **dict.fromkeys(REASONING_FIELDS, thought),
    }
    try:
        text = template.render(Inputs(({"role": "user", "content": "x"}, reply)))
    except RowError:
        return "", ""
    before, found, rest = text.partition(thought)
    return (before, rest.partition(answer)[0]) if found else ("", "")
