"""lm-evaluation-harness on a forest: `--model ygivenx`, with the arguments of its `hf` model.

    python -m ygivenx.scores.harness run --model ygivenx --model_args pretrained=DIR,dtype=float32 --tasks ...

registers the model and hands over to the harness's own command. Releases of the harness that look for entry
points (group `lm_eval.models`; 0.4.13 doesn't) find it from `lm_eval` as well.

Texts become tokens exactly as in its HF class, which is the base class here, so values and accuracies are
its own. That rule moves white space at the end of a context into the continuation, and takes the ids after
as many as the context has by itself: with some tokenizers the model then reads a different text. Such requests
are counted, warned about and reported among the results' model info; `border=exact` scores x and y as they
are written instead.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    from ..errors import MissingExtra

    raise MissingExtra("lm-eval", "eval", needed_for="--model ygivenx") from error

from ..choices import HarnessBorder, require_choice
from ..encoder.tokenize import Tokens
from ..errors import ModelError
from ..models.memory import keep_freed_memory
from ..models.position_limits import PositionLimits
from .requests import WINDOW, Request, ScoredPart, pair_of_ids
from .scoring import Tally, scores

TokenRequest = tuple[Any, list[int], list[int]]

log = logging.getLogger(__name__)
AHEAD = 128  # requests whose texts are encoded together
SHOWN = 3  # requests named in the report
IMPOSSIBLE = (-math.inf, False)  # the answer to a request that can't be scored


@register_model("ygivenx")
class ForestLM(HFLM):
    """The harness's HF model with log-likelihoods from a forest; generation is the base class's.

    border: `harness` or `exact`. window: distinct tokens that are scored together. Other arguments are the
    base class's. Raises ConfigError for an unknown border, ModelError for a model that isn't causal.
    """

    def __init__(
        self, *args: Any, border: HarnessBorder = "harness", window: int = WINDOW, **options: Any
    ) -> None:
        require_choice("border", border, HarnessBorder)
        super().__init__(*args, **options)
        if self.backend != "causal":
            raise ModelError(f"{type(self.model).__name__} isn't a causal language model", fix="--model hf")
        if self.mixed_precision_dtype is not None:
            raise ModelError("mixed_precision_dtype has no effect here", fix="set dtype")
        PositionLimits.of(self.model).refuse_max_length(self.max_length)
        keep_freed_memory()
        self._batches: Iterator[dict[str, list[int]]] = iter(())
        self._encoded: dict[str, list[int]] = {}
        self.border, self.window = border, int(window)
        self.tally = Tally()
        self.requests = self.truncated = 0
        self.changed: list[tuple[str, str]] = []
        self.faults: list[tuple[Any, str]] = []  # requests that can't be scored, and why

    def tok_encode(self, string: str, *args: Any, **options: Any) -> list[int]:
        """As the base class; the texts of a log-likelihood request come from their batch."""
        if args or options:
            return list(super().tok_encode(string, *args, **options))
        # The base class asks for one text after another, in the order of its requests: a text that isn't there begins
        # the next batch.
        if string not in self._encoded:
            self._encoded = next(self._batches, {})
        ids = self._encoded.get(string)
        return super().tok_encode(string) if ids is None else list(ids)

    def _encode_ahead(self, pairs: list[tuple[str, str]]) -> Iterator[dict[str, list[int]]]:
        """Ids of what `_encode_pair` will ask for, by batches: each takes every core, and a context once."""
        for start in range(0, len(pairs), AHEAD):
            texts_of = ((x.rstrip(), x + y) for x, y in pairs[start : start + AHEAD] if x)
            yield self._encode_batch(list(dict.fromkeys(text for texts in texts_of for text in texts)))

    def _encode_batch(self, texts: list[str]) -> dict[str, list[int]]:
        """By the base class's rule: special tokens as asked for, but never a second BOS."""
        bos = self.tokenizer.decode(self.prefix_token_id)
        usual = {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
        encoded = dict[str, list[int]]()
        # A text that begins with the BOS itself gets no second one, which is the base class's rule for a single text.
        for begun, options in ((False, usual), (True, {"add_special_tokens": False})):
            if these := [t for t in texts if t.startswith(bos) == begun]:
                encoded |= zip(these, self.tokenizer(these, **options)["input_ids"], strict=True)
        return encoded

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if self.border == "harness":
            x, y = super()._encode_pair(context, continuation)
            self._compare(context + continuation, x + y)
            return x, y
        encoded = Tokens(self.tokenizer).encode([context + continuation])[0]
        if not encoded.tiled:
            raise ModelError("this tokenizer doesn't tell where its tokens stand", fix="border=harness")
        ids = encoded.ids.tolist()
        whole = self._begun(self.tok_encode(context + continuation), ids)
        # A token that reaches beyond the context is y, so log Pr(x) + log Pr(y|x) is that of the text as written.
        cut = len(whole) - int((encoded.stops > len(context)).sum())
        return (whole[:cut], whole[cut:]) if cut else ([self.prefix_token_id], whole)

    @staticmethod
    def _begun(whole: list[int], ids: list[int]) -> list[int]:
        """`ids` after the special tokens that the tokenizer puts before them; an EOS behind them is no part of y."""
        for start in range(len(whole) - len(ids) + 1):
            if whole[start : start + len(ids)] == ids:
                return whole[: start + len(ids)]
        raise ModelError(
            "this tokenizer reads the text otherwise with its special tokens", fix="border=harness"
        )

    def _compare(self, text: str, ids: list[int]) -> None:
        """Whether the ids that will be read are those of the text."""
        whole = self.tok_encode(text)
        if whole != ids and (read := self.tok_decode(ids, False)) != self.tok_decode(whole, False):
            self.changed.append((text, read))

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log Pr(continuation | context) in nats, whether it is greedy) per request, in their order."""
        before, cut, bad = len(self.changed), self.truncated, len(self.faults)
        written = [request for request in requests if request.args[1]]  # the base class fails on an empty one
        self.faults += [(r.args, "a continuation of no text") for r in requests if not r.args[1]]
        self._batches = self._encode_ahead([request.args for request in written])
        scored = iter(super().loglikelihood(written, disable_tqdm=disable_tqdm))
        answers = [next(scored) if request.args[1] else IMPOSSIBLE for request in requests]
        self.requests += len(requests)
        if cut := self.truncated - cut:
            log.warning(
                "%d of %d requests are longer than the %d tokens that the model reads: their contexts lost what "
                "didn't fit on their left, as with hf.", cut, len(requests), self.max_length,
            )  # fmt: skip
        if faults := self.faults[bad:]:
            indexes = [
                i for i, request in enumerate(requests) if request.args in {text for text, _ in faults}
            ]
            log.error(
                "%d of %d requests can't be scored; they count as impossible (-inf), the others are kept. Their "
                "indexes: %s. The first, %r: %s", len(faults), len(requests), indexes, *faults[0],
            )  # fmt: skip
        changed = self.changed[before:]
        if changed:
            log.warning(
                "%d of %d requests are not read as written: the harness's rule for borders changes their text. "
                "The first ends in %r and is read as ending in %r. border=exact scores them as written.",
                len(changed), len(requests), changed[0][0][-40:], changed[0][1][-40:],
            )  # fmt: skip
        return answers

    def _loglikelihood_tokens(
        self, requests: list[TokenRequest], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        or_faults = [self._request_or_fault(request) for request in requests]
        good = (r for r in or_faults if isinstance(r, Request))
        found = scores(self.model, good, marginal=False, window=self.window, tally=self.tally)
        answers = []
        for (text, _, _), request in zip(requests, or_faults, strict=True):
            if not isinstance(request, Request):
                self.faults.append((text, request))
                answers.append(IMPOSSIBLE)
                continue
            s = next(found)
            answers.append((s.log_p_y_given_x, s.greedy))
            if text is not None:  # windows of a rolling request have none: they are cached as a whole
                self.cache_hook.add_partial("loglikelihood", text, answers[-1])
        return answers

    def _request_or_fault(self, request: TokenRequest) -> Request | str:
        try:
            return self._request(request)
        except ModelError as error:
            return str(error)

    def _request(self, request: TokenRequest) -> Request:
        """As the base class cuts it: contexts lose what doesn't fit on their left."""
        _, x, y = request
        if not 0 < len(y) <= self.max_length:
            raise ModelError(f"a continuation of {len(y)} tokens; the model reads {self.max_length}")
        if not x:
            raise ModelError(
                "a context of no tokens: the continuation's first token has no probability",
                why="its white space was moved into the continuation, and hf fails there, too",
                fix="border=exact, or a context that isn't white space alone",
            )
        # The last token is never read, so one more fits than the model reads.
        lost = max(0, len(x) + len(y) - self.max_length - 1)
        self.truncated += lost > 0
        return Request((ScoredPart(pair_of_ids(x[lost:], y)),), truncated=lost)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results: the base class's, the border and what it changed."""
        info: dict[str, Any] = super().get_model_info()
        info["ygivenx"] = {
            "border": self.border,
            "requests": self.requests,
            "requests_read_as_another_text": len(self.changed),
            "requests_truncated": self.truncated,
            "requests_not_scored": [{"request": text, "why": why} for text, why in self.faults],
            "examples": [{"written": a[-80:], "read": b[-80:]} for a, b in self.changed[:SHOWN]],
            **self.tally.to_dict(),
        }
        return info


def main() -> None:
    """The harness's command, with `ygivenx` among its models."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
