"""A slow check of a mask that shares nothing with the encoder: transformers' own rendering, ids and text.

For each reply that is trained: the ids before it are those of the prompt that inference shows; the reply and
the ids before it begin the rendering that ends with it; its last token is one that ends turns; what the template writes
after that token doesn't change when the reply does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ygivenx import Example, Sequence

MENDED = re.compile(r"the ids differ from the template's")
UNASKED = re.compile(r"messages\[(\d+)\]: the template can't ask for a reply")


def faults(
    tokenizer: Any, row: Mapping[str, Any], example: Example, ends: Iterable[str] | None = None
) -> list[str]:
    """What is wrong with a mask of policy "assistant", in words; empty if it satisfies the contract.

    ends: the tokens that end a turn; where they aren't known, any added token will do.
    """
    found: list[str] = []
    trained: set[int] = set()
    for sequence in example.sequences:
        render = _Renderer(tokenizer, row, sequence, ends)
        found += _partition(sequence)
        if (sequence.output[1:] != (sequence.weights[1:] > 0)).any() and not any(
            "weight" in m for m in row["messages"]
        ):
            found.append("weights aren't the output")
        for i, start, stop in _outputs(sequence):
            if len(example.sequences) > 1 and i in trained:
                found.append(f"reply {i} is trained twice")
            trained.add(i)
            found += [f"reply {i}: {f}" for f in _reply(render, sequence, i, start, stop)]
        if not render.mended and not render.extended and not render.appended:
            stops = {len(row["messages"]), *(i + 1 for i, _, _ in _outputs(sequence))}
            if sequence.ids.tolist() not in [render.ids(stop) for stop in stops]:
                found.append("the ids aren't apply_chat_template's")
    wanted = {i for i, m in enumerate(row["messages"]) if m["role"] == "assistant" and m.get("weight", 1) > 0}
    unasked = {int(n) for s in example.sequences for n in UNASKED.findall("\n".join(s.notes))}
    found += [f"reply {i} could be asked for" for i in unasked if not _nothing_shown(render, i)]
    wanted -= unasked
    return found + ([f"trained {sorted(trained)}, wanted {sorted(wanted)}"] if trained != wanted else [])


def _reply(render: _Renderer, sequence: Sequence, i: int, start: int, stop: int) -> list[str]:
    found = []
    ids = sequence.ids.tolist()
    if ids[:start] != render.ids(i, add_generation_prompt=True):
        found.append("what stands before it isn't what inference shows")
    if ids[stop - 1] not in render.ends:
        found.append(f"its last token, {sequence.tokens[stop - 1]!r}, ends no turn")
    said = render.tokenizer.decode(ids[start : stop - 1]).strip()
    if render.kept and said not in render.text(render.messages[: i + 1]):
        found.append("the template doesn't write it so")
    if render.mended:
        return found
    if render.appended:
        return found + _appended(render, ids, i, stop)
    closed = render.ids(i + 1)
    if render.extended and len(closed) == stop - 1:
        closed = [*closed, ids[stop - 1]]
    if ids[:stop] != closed[:stop]:
        found.append("it isn't what the template writes for it")
    tail = render.tail(i)
    if (
        tail is not None
        and not render.extended
        and not tail.endswith(render.tokenizer.decode(closed[stop - 1 :]))
    ):
        found.append("it ends before its message does")
    return found


def _appended(render: _Renderer, ids: list[int], i: int, stop: int) -> list[str]:
    """An end that the template doesn't write: the only one there is, after all that it writes of the reply."""
    text, tokenizer = render.text(render.messages[: i + 1]), render.tokenizer
    whole = next((n for n in range(len(text), -1, -1) if render.encoded(text[:n]) == ids[: stop - 1]), None)
    found = [] if ids[stop - 1] == tokenizer.eos_token_id else ["its end isn't the eos"]
    if whole is None or text[whole:].strip() or (render.tail(i) or "").strip():
        found.append("the template goes on after it")
    return found


def _nothing_shown(render: _Renderer, i: int) -> bool:
    """Whether the template fails to ask for reply i, or writes with it the header that asks after a user."""
    before = render.messages[:i]
    try:
        shown = render.text(before, add_generation_prompt=True)
    except Exception:  # whatever the template raises
        return True
    written, said = (
        render.text(render.messages[: i + 1]),
        str(render.messages[i].get("content") or "").strip(),
    )
    header = written[len(shown) : written.find(said, len(shown))].strip()
    asked = render.text([*before, {"role": "user", "content": "Zq"}], add_generation_prompt=True)
    return bool(header) and header in asked.rpartition("Zq")[2]


class _Renderer:
    """transformers' rendering of a row, with the switches that the sequence's notes name."""

    def __init__(
        self, tokenizer: Any, row: Mapping[str, Any], sequence: Sequence, ends: Iterable[str] | None
    ) -> None:
        notes = "\n".join(sequence.notes)
        self.tokenizer = tokenizer
        self.mended = bool(MENDED.search(notes))
        self.kept = "and is kept" in notes
        self.extended = "the header of the next turn" in notes
        self.appended = "was appended, as nothing ends the turn" in notes
        switches = {k: v == "True" for k, v in re.findall(r"rendered with (\w+)=(\w+)", notes)}
        self.more = {k: row.get(k) for k in ("tools", "documents")} | switches
        self.messages = [{k: v for k, v in m.items() if k != "weight"} for m in row["messages"]]
        if "arguments as text" in notes:
            self.messages = [_with_text(m) for m in self.messages]
        if "lists of parts" in notes:
            self.messages = [_with_parts(m) for m in self.messages]
        added = tokenizer.added_tokens_decoder
        self.ends = set(added if ends is None else tokenizer.convert_tokens_to_ids(list(ends)))

    def ids(self, stop: int, **options: Any) -> list[int]:
        return self.encoded(self.text(self.messages[:stop], **options))

    def encoded(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def text(self, messages: list[dict[str, Any]], **options: Any) -> str:
        if not messages:  # transformers refuses to render none, though templates can
            from transformers.utils.chat_template_utils import render_jinja_template

            options |= {**self.tokenizer.special_tokens_map, **self.more}
            (text,), _ = render_jinja_template([[]], chat_template=self.tokenizer.chat_template, **options)
            return text
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **self.more, **options)

    def tail(self, i: int) -> str | None:
        """What stays at the end of the rendering when the end of reply i changes; None if nothing changes."""
        message = dict(self.messages[i])
        if message.get("tool_calls") or not isinstance(message.get("content"), str):
            return None
        message["content"] = message["content"].rstrip() + " Zq"
        one, other = self.text(self.messages[: i + 1]), self.text([*self.messages[:i], message])
        n = 0
        while n < min(len(one), len(other)) and one[-1 - n] == other[-1 - n]:
            n += 1
        return one[len(one) - n :] if one != other else None


def _outputs(sequence: Sequence) -> list[tuple[int, int, int]]:
    """(message, start, stop) of each reply's output."""
    runs: dict[int, tuple[int, int]] = {}
    for s in sequence.segments:
        if s.output:
            assert s.message is not None
            runs[s.message] = (min(s.start, runs.get(s.message, (s.start, 0))[0]), s.stop)
    return [(i, a, b) for i, (a, b) in runs.items()]


def _partition(sequence: Sequence) -> list[str]:
    at = 0
    for s in sequence.segments:
        if s.start != at or s.stop <= s.start:
            return [f"segments don't partition at {at}"]
        at = s.stop
    return [] if at == len(sequence) else ["segments end early"]


def _with_text(message: dict[str, Any]) -> dict[str, Any]:
    made = json.loads(json.dumps(message))
    for c in made.get("tool_calls") or []:
        if isinstance(c["function"]["arguments"], dict):
            c["function"]["arguments"] = json.dumps(c["function"]["arguments"], ensure_ascii=False)
    return made


def _with_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return message | ({"content": [{"type": "text", "text": content}]} if isinstance(content, str) else {})
