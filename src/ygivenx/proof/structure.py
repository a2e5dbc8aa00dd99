"""Which tokens of a rendered chat are replies, read from the ids alone: by the headers that its template writes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from .evidence import ObservedRow, kind_code

ASK, SAY = "Zq", "Yx"


class Structure:
    """The token ids that open a reply under a chat template, and those at which generation stops.

    tokenizer: with a chat template. stops: further ids that end a turn. headers: what the generation prompt supplies,
    each with what the template may write behind it before a reply without a thought (Qwen3's empty thought): of that,
    ids alone can't tell whose it is. Empty where none could be found; nothing is said of rows then.
    """

    def __init__(self, tokenizer: Any, stops: Iterable[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.headers = sorted(self._headers(), key=lambda h: len(h[0]) + len(h[1]), reverse=True)
        self.stops = {int(i) for i in (tokenizer.eos_token_id, *stops, self._end()) if i is not None}

    def mark(self, seen: ObservedRow) -> bool:
        """Fill in codes, output and expected of a row; False where it holds no header of a reply.

        A reply of which nothing is trained may be meant as context: nothing is demanded of it.
        """
        ids = seen.ids.tolist()
        at = self._replies(ids)
        if not at:
            return False
        seen.codes[seen.attended] = kind_code("prompt")
        seen.expected[seen.attended] = 0
        borders = [header for header, _, _ in at[1:]] + [len(ids)]
        for (header, behind, start), following in zip(at, borders, strict=True):
            stop = next((i + 1 for i in range(start, following) if ids[i] in self.stops), following)
            ended = ids[stop - 1] in self.stops
            seen.codes[header:behind] = kind_code("template")
            seen.codes[behind:stop] = kind_code("answer")
            seen.codes[stop - ended : stop] = kind_code("end_of_turn")
            seen.codes[stop : min(stop + 1, following)] = kind_code("template")
            seen.output[start:stop] = True
            seen.expected[behind:start] = np.nan
            seen.expected[start:stop] = 1 if seen.trained[start:stop].any() else np.nan
        seen.output &= seen.attended
        return True

    def _replies(self, ids: list[int]) -> list[tuple[int, int, int]]:
        """(where its header begins, where it ends, where its text begins) of each reply."""
        found: list[tuple[int, int, int]] = []
        firsts = {own[0] for own, _ in self.headers}
        for i in (i for i, token in enumerate(ids) if token in firsts):
            fits = (h for h in self.headers if ids[i : i + len(h[0]) + len(h[1])] == h[0] + h[1])
            header = next(fits, None)
            if header is not None and (not found or i >= found[-1][2]):
                behind = i + len(header[0])
                found.append((i, behind, behind + len(header[1])))
        return found

    def _headers(self) -> list[tuple[list[int], list[int]]]:
        """The generation prompt, and what stands before a reply that is given."""
        ask = [{"role": "user", "content": ASK}]
        bare, prompt = self._text(ask), self._text(ask, add_generation_prompt=True)
        if bare is None or prompt is None or not prompt.startswith(bare) or prompt == bare:
            return []
        own = self.tokenizer.encode(prompt[len(bare) :], add_special_tokens=False)
        answered = self._text([*ask, {"role": "assistant", "content": SAY}]) or ""
        if not answered.startswith(bare) or SAY not in answered:
            return [(own, [])]
        given = self.tokenizer.encode(
            answered[len(bare) : answered.index(SAY, len(bare))], add_special_tokens=False
        )
        longer = (own, given[len(own) :]) if given[: len(own)] == own else (given, [])
        return [(own, []), longer] if given and longer != (own, []) else [(own, [])]

    def _end(self) -> int | None:
        """The first special token behind a reply's text."""
        messages = [("user", ASK), ("assistant", SAY), ("user", ASK)]
        text = self._text([{"role": r, "content": c} for r, c in messages]) or ""
        ids = self.tokenizer.encode(text.partition(SAY)[2], add_special_tokens=False)
        special = set(self.tokenizer.all_special_ids)
        return next((i for i in ids if i in special), None)

    def _text(self, messages: list[dict[str, str]], **options: Any) -> str | None:
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))
        except Exception:  # a template is someone's program: it may refuse this conversation
            return None
