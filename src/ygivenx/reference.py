"""What ygivenx computes, written down as plainly as it can be. Read this file first.

For an input x and an output y, the chain rule says

    log Pr([x, y]) = log Pr(x) + log Pr(y | x)

A language model gives log Pr(token | the tokens before it), and each of the three terms is a sum of such values.
Fine-tuning wants log Pr(y | x) alone: the model reads all of [x, y], and only the tokens of y count in the loss.
Six definitions follow from that, each with an example that runs:

    encode                    a conversation, or x and y   ->  token ids, and a weight for each: 1 in y, 0 in x
    log_probs                 token ids                    ->  log Pr of each token, given those before it
    loss                      ids and weights              ->  the weighted mean of -log Pr
    score                     ids of x and of y            ->  log Pr(x), log Pr([x, y]), log Pr(y | x) in two ways
    forest                    many sequences               ->  every distinct prefix once, with its weight
    selective_cross_entropy   hidden states                ->  the loss, from the rows that predict y

Nothing here is fast. There is one forward pass for each sequence, all logits are made, and sums are in float64.
The rest of the library computes the same numbers quickly, and its tests compare them with this file. `encode` uses
nothing but what transformers offers, and refuses each row for which these few lines can't prove the answer;
`ygivenx.Encoder` proves more rows, and gives the same answer for every row that is accepted here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Listed
from copy import deepcopy
from os.path import commonprefix
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .errors import LossError, RowError
from .sequence import Sequence

# Token ids [1, T] to an object with .logits [1, T, V], as the models of transformers are called, or to a tuple that
# begins with them, which they give where their config says return_dict=False.
Model = Callable[[Tensor], Any]


# 1. Which tokens are y ------------------------------------------------------------------------------------------------


def encode(tokenizer: Any, row: Mapping[str, Any], stops: Iterable[str] = ()) -> list[Sequence]:
    """Token ids with the weight of each token, for one row: {"x": ..., "y": ...} or {"messages": [...]}.

    The example of the name: of the tokens of x and y, only those of y have a weight.

    >>> words = word_tokenizer("User: What is 2+2? Assistant: 4")
    >>> [s] = encode(words, {"x": "User: What is 2+2? Assistant:", "y": " 4"})
    >>> words.convert_ids_to_tokens(s.ids)
    ['User:', 'What', 'is', '2+2?', 'Assistant:', '4']
    >>> s.weights.tolist()
    [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]

    In a conversation, y is every reply of the assistant, up to and including the token that ends its turn: the model
    has to produce that token, or it would never stop. `stops` are further tokens that end a turn, beside the
    tokenizer's eos. The result is one sequence, or one for each reply where the template rewrites earlier turns.
    Raises RowError where y can't be proven.

    >>> chat = word_tokenizer("user assistant hi hello bye <end>", eos="<end>", template=(
    ...     "{% for m in messages %}{{ m.role }} {{ m.content }} <end> {% endfor %}"
    ...     "{% if add_generation_prompt %}assistant {% endif %}"))
    >>> [s] = encode(chat, {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"},
    ...                                  {"role": "user", "content": "bye"}, {"role": "assistant", "content": "bye"}]})
    >>> " ".join(t if w == 0 else f"[{t}]" for t, w in zip(chat.convert_ids_to_tokens(s.ids), s.weights))
    'user hi <end> assistant [hello] [<end>] user bye <end> assistant [bye] [<end>]'
    """
    for text in _texts(row):
        if token := next((t for t in _special(tokenizer, stops) if t in text), None):
            raise RowError(f"the row's text holds the special token {token!r}", reason="control_text")
    if "messages" not in row:
        return [_encode_pair(tokenizer, row["x"], row["y"])]
    chat = _Chat(tokenizer, row, tuple(stops))
    weights = [float(m.get("weight", 1)) * (m["role"] == "assistant") for m in row["messages"]]
    turns = [_turn(chat, i) for i, weight in enumerate(weights) if weight > 0]
    if not turns:
        raise RowError("no reply has a weight", reason="nothing_trained")

    # If the whole conversation begins with every prompt and its reply, it serves all of them at once.
    whole = chat.ids(row["messages"])
    if all(whole[: t.stop] == t.ids[: t.stop] for t in turns):
        return [_weighed(whole, {(t.start, t.stop): weights[t.message] for t in turns})]
    return [_weighed(t.ids, {(t.start, t.stop): weights[t.message]}) for t in turns]


def _encode_pair(tokenizer: Any, x: str, y: str) -> Sequence:
    """x and y as one text. y begins after the tokens of x: so x's own tokens must come first in those of x + y."""
    before, both = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (x, x + y))
    if both[: len(before)] != before:
        raise RowError("one token holds the end of x and the beginning of y", reason="straddling_token")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and tokenizer(x)["input_ids"][:1] == [
        bos
    ]:  # the tokenizer begins every text with it: it is x
        before, both = [bos, *before], [bos, *both]
    ids = both if eos is None else [*both, eos]
    return _weighed(ids, {(max(1, len(before)), len(ids)): 1.0})


class _Turn(NamedTuple):
    """Message `message` as it is written when it is the last one: its output is ids[start:stop]."""

    message: int
    ids: list[int]
    start: int
    stop: int


def _turn(chat: _Chat, i: int) -> _Turn:
    """The proof for reply i: what inference shows before it, what the template writes for it, and where it ends."""
    if i == 0:
        raise RowError("nothing stands before this reply", reason="no_prompt", field="messages[0]")
    messages, field = chat.messages, f"messages[{i}]"

    # P is what inference shows: the messages before the reply, and whatever asks for one. F has the reply, too.
    P = chat.text(messages[:i], add_generation_prompt=True)
    F = chat.text(messages[: i + 1])
    if not F.startswith(P):
        raise RowError("the row doesn't continue what inference shows", reason="not_continued", field=field)
    thought, closed, _ = F[len(P) :].partition("</think>")
    if P.rstrip().endswith("<think>") and not (closed and thought.strip()):
        raise RowError("inference opens a thought, the reply has none", reason="no_thought", field=field)
    user = {"role": "user", "content": "x"}
    if not chat.asks(messages[:i]) and chat.asks([*messages[:i], user]):
        raise RowError("the template asks for no reply here", reason="no_prompt", field=field)

    # The same, in tokens. If the tokens of F don't begin with those of P, one token crosses the border.
    before, ids = chat.ids(messages[:i], add_generation_prompt=True), chat.ids(messages[: i + 1])
    if ids[: len(before)] != before:
        what = "one token holds the end of x and the beginning of y"
        raise RowError(what, reason="straddling_token", field=field)

    # The output ends with the token that ends the turn.
    until_end = chat.encoded(F[: _end_of_turn(chat, i, P, F)])
    start, stop = len(before), len(until_end)
    if ids[:stop] != until_end or any(t in chat.stop_ids for t in ids[start : stop - 1]):
        raise RowError("generation would stop inside this reply", reason="stop_inside", field=field)
    return _Turn(i, ids, start, stop)


def _end_of_turn(chat: _Chat, i: int, P: str, F: str) -> int:
    """The end, in F, of the token that ends the turn of message i.

    Which characters of F does the message write? Those that change when it does. So each of its parts is changed at
    its end, one at a time; what F and the changed text still end with alike, the template writes after that part.
    """
    before, message, field = chat.messages[:i], chat.messages[i], f"messages[{i}]"
    after = len(P)
    for part, changed in _changes(message):
        other = chat.text([*before, changed])
        if other == F:
            raise RowError(f"the template leaves out {part}", reason="dropped_field", field=f"{field}.{part}")
        alike = len(commonprefix([F[::-1], other[::-1]]))  # noqa: RUF071 - texts, not paths
        after = max(after, len(F) - alike)

    # Behind the message, a special token ends the turn. A template may write something else at the end of a whole
    # conversation; so those tokens come first that are still there when the conversation goes on.
    call_ids = [c.get("id") for c in message.get("tool_calls") or []]
    results = [{"role": "tool", "name": "f", "content": "x", "tool_call_id": c or "0"} for c in call_ids]
    longer = chat.text_or_empty([*before, message, *(results or [{"role": "user", "content": "x"}])])
    tail = chat.control_tokens(F, after)
    shared = [(token, end) for token, end in tail if longer.startswith(F[:end])]
    candidates = shared or tail

    # The first one at which generation stops ends it; or the only one, where none is known to do that.
    known = [end for token, end in candidates if token in chat.stops]
    if not known and len(candidates) != 1:
        raise RowError("no single token is known to end this turn", reason="no_end_of_turn", field=field)
    return known[0] if known else candidates[0][1]


MARK = "\ue000"  # a character for private use: no row ends with it, and no template writes it


def _changes(message: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(the name of a part, the message with that part changed at its end), for all that a reply says."""
    calls = message.get("tool_calls") or []
    for part in ("reasoning_content", "reasoning", "thinking", "content"):
        text = message.get(part)
        if text is not None and not isinstance(text, str):
            raise RowError("only texts are proven here", reason="wrong_type", field=part)
        if (text or "").strip() or (part == "content" and not calls):
            yield part, {**message, part: (text or "").rstrip() + MARK}
    for n, call in enumerate(calls):
        changed = deepcopy(dict(message))
        if isinstance(call["function"]["arguments"], str):
            what = "only arguments by name are proven here"
            raise RowError(what, reason="wrong_type", field=f"tool_calls[{n}]")
        changed["tool_calls"][n]["function"]["arguments"][MARK] = MARK
        yield f"tool_calls[{n}]", changed


class _Chat:
    """A row as transformers' own `apply_chat_template` renders and encodes it."""

    def __init__(self, tokenizer: Any, row: Mapping[str, Any], stops: tuple[str, ...]) -> None:
        self.tokenizer = tokenizer
        self.messages = [{k: v for k, v in m.items() if k != "weight"} for m in row["messages"]]
        self.fields = {k: row[k] for k in ("tools", "documents") if k in row}
        self.special = _special(tokenizer, stops)
        self.stops = {t for t in (tokenizer.eos_token, *stops) if t}
        self.stop_ids = set(tokenizer.convert_tokens_to_ids(sorted(self.stops)))

    def text(self, messages: Listed[Mapping[str, Any]], **options: Any) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **self.fields, **options))
        except Exception as error:  # whatever a template raises
            what = "the template can't render this"
            raise RowError(what, reason="template_error", why=str(error)) from error

    def text_or_empty(self, messages: Listed[Mapping[str, Any]]) -> str:
        try:
            return self.text(messages, add_generation_prompt=True)
        except RowError:
            return ""

    def ids(self, messages: Listed[Mapping[str, Any]], **options: Any) -> list[int]:
        options |= {"tokenize": True, "return_dict": False, **self.fields}
        return list(self.tokenizer.apply_chat_template(messages, **options))

    def encoded(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def asks(self, messages: Listed[Mapping[str, Any]]) -> bool:
        """Whether the template writes something that asks for a reply after these messages."""
        return len(self.text_or_empty(messages)) > len(self.text(messages))

    def control_tokens(self, text: str, start: int) -> list[tuple[str, int]]:
        """(special token, its end) for each one in text[start:], in order; the longest where several begin."""
        found, at = [], start
        while at < len(text):
            token = max((t for t in self.special if text.startswith(t, at)), key=len, default="")
            at += len(token) or 1
            if token:
                found.append((token, at))
        return found


def _special(tokenizer: Any, stops: Iterable[str]) -> set[str]:
    added = (str(t) for t in tokenizer.added_tokens_decoder.values() if t.special)
    return {t for t in (*tokenizer.all_special_tokens, *added, *stops) if t}


def _texts(value: Any) -> Iterator[str]:
    """All texts in a row, wherever they stand."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


def _weighed(ids: list[int], weights: Mapping[tuple[int, int], float]) -> Sequence:
    """Ids as a Sequence; weights: of the tokens from start to stop, by (start, stop). All others have the weight 0."""
    by_token = np.zeros(len(ids), np.float32)
    for (start, stop), weight in weights.items():
        by_token[start:stop] = weight
    return Sequence(np.array(ids), by_token)


# 2. Log-probabilities -------------------------------------------------------------------------------------------------


def log_probs(model: Model, ids: Iterable[int]) -> Tensor:
    """log Pr(ids[t] | ids[:t]) for t = 1, 2, ...: float64 [T - 1], in nats. The first token has nothing before it.

    A model that finds each of 4 tokens equally likely, whatever it has read:

    >>> log_probs(four_sided_die, [0, 3, 1]).exp()
    tensor([0.2500, 0.2500], dtype=torch.float64)
    """
    read = torch.tensor([int(i) for i in ids], device=getattr(model, "device", None))
    if len(read) < 2:
        return torch.zeros(0, dtype=torch.float64, device=read.device)
    out = model(read[None])
    logits = (out[0] if isinstance(out, tuple) else out.logits)[0]  # [T, V]: row t predicts token t + 1
    log_p: Tensor = logits[:-1].double().log_softmax(dim=-1).gather(1, read[1:, None])[:, 0]
    return log_p


# 3. The loss ----------------------------------------------------------------------------------------------------------


def loss(
    model: Model, sequences: Iterable[Sequence], denominator: float | Literal["tokens", "sequence"] = "tokens"
) -> Tensor:
    """The sum of w * -log Pr over all tokens, divided by W: a differentiable float64 scalar.

    W is the sum of all weights of the step ("tokens"), or a number; with "sequence" the result is the mean of the
    means of the sequences. A token with the weight 0 is read and not counted. Raises LossError where W is 0.

    >>> loss(four_sided_die, [Sequence([0, 3, 1], [0, 0, 1])]).exp()  # one token counts: perplexity 4
    tensor(4., dtype=torch.float64)
    """
    sums, weights = [], []
    for s in sequences:
        log_p = log_probs(model, s.ids)
        w = torch.tensor(s.weights[1:].tolist(), dtype=torch.float64, device=log_p.device)
        sums.append(-(w * log_p)[w > 0].sum())  # without a weight, not even an impossible token has a part
        weights.append(math.fsum(s.weights.tolist()))
    if denominator == "sequence":
        sums = [total / w for total, w in zip(sums, weights, strict=True) if w > 0]
        weights = [1.0] * len(sums)
    W = float(denominator) if isinstance(denominator, int | float) else math.fsum(weights)
    if not W > 0:
        raise LossError("no token has a weight", why="0 / 0 is no loss")
    return torch.stack(sums).sum() / W


# 4. Scores ------------------------------------------------------------------------------------------------------------


class Sums(NamedTuple):
    """Log-probabilities of one [x, y], in nats. Without a BOS they are conditional on the first token."""

    joint: float  # log Pr([x, y])
    marginal: float  # log Pr(x)
    conditional: float  # log Pr(y | x), as the sum over the tokens of y
    by_difference: float  # log Pr(y | x), as joint - marginal


def score(model: Model, x: Listed[int], y: Listed[int]) -> Sums:
    """log Pr([x, y]), log Pr(x) and log Pr(y | x); the last one directly, and by the chain rule.

    The marginal has a forward pass of its own, which hasn't seen y. As Pr([x, y]) <= Pr(x), no part is above 0.

    >>> [round(v / math.log(4), 3) for v in score(four_sided_die, [0, 3, 1], [2])]
    [-3.0, -2.0, -1.0, -1.0]
    """
    both = log_probs(model, [*x, *y])
    joint, marginal = both.sum().item(), log_probs(model, x).sum().item()
    conditional = (
        both[max(0, len(x) - 1) :].sum().item()
    )  # the first token has no value: y's begin one earlier
    return Sums(joint, marginal, conditional, joint - marginal)


# 5. The forest --------------------------------------------------------------------------------------------------------


def forest(sequences: Iterable[Sequence]) -> dict[tuple[int, ...], float]:
    """Every distinct prefix of the sequences, with the weight of its last token.

    A prefix is a token in its context, so log Pr of the token is a property of the prefix, and two sequences that
    begin alike share it. Where they meet, their weights add up: a token trained by three sequences weighs three times.

    >>> forest([Sequence([5, 6, 7], [0, 0, 1]), Sequence([5, 6, 8], [0, 1, 1])])
    {(5,): 0.0, (5, 6): 1.0, (5, 6, 7): 1.0, (5, 6, 8): 1.0}
    """
    weights: dict[tuple[int, ...], float] = {}
    for s in sequences:
        for t, w in enumerate(s.weights.tolist(), 1):
            prefix = tuple(s.ids[:t].tolist())
            weights[prefix] = weights.get(prefix, 0.0) + w
    return weights


def forest_loss(model: Model, sequences: Iterable[Sequence]) -> Tensor:
    """`loss`, with the same terms in another order: a sum over prefixes instead of sequences.

    >>> forest_loss(four_sided_die, [Sequence([0, 1, 2], [0, 0, 1]), Sequence([0, 1, 3], [0, 1, 1])]).exp()
    tensor(4., dtype=torch.float64)
    """
    trained = {prefix: w for prefix, w in forest(sequences).items() if w > 0}
    log_p = torch.stack([w * log_probs(model, prefix)[-1] for prefix, w in trained.items()])
    return -log_p.sum() / math.fsum(trained.values())


# 6. The last layer ----------------------------------------------------------------------------------------------------


def all_logits(
    hidden: Tensor, weight: Tensor, *, bias: Tensor | None = None, softcap: float | None = None, scale: float = 1.0
) -> Tensor:  # fmt: skip
    """z = scale * (hidden @ weight.T + bias), then softcap * tanh(z / softcap) if there is one: float64 [F, V].

    hidden [F, H] is what a model has before its last layer; weight [V, H] and bias [V] are that layer's.
    """
    z = hidden.double() @ weight.double().T
    if bias is not None:
        z = z + bias.double()
    z = z * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def selective_cross_entropy(
    hidden: Tensor, weight: Tensor, rows: Tensor, targets: Tensor, weights: Tensor, *,
    bias: Tensor | None = None, softcap: float | None = None, scale: float = 1.0, z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(log p [E], the sum of weights * (z_loss * logsumexp² - log p)), float64 and differentiable.

    Row rows[e] of `hidden` predicts targets[e], with weights[e]. Rows that predict nothing of y don't occur.

    >>> hidden, head = torch.zeros(3, 2), torch.zeros(4, 2)  # every token equally likely
    >>> log_p, total = selective_cross_entropy(
    ...     hidden, head, rows=torch.tensor([2]), targets=torch.tensor([1]), weights=torch.tensor([0.5]))
    >>> log_p.exp(), (total / 0.5).exp()
    (tensor([0.2500], dtype=torch.float64), tensor(4., dtype=torch.float64))
    """
    z = all_logits(hidden, weight, bias=bias, softcap=softcap, scale=scale)[rows]
    lse = torch.logsumexp(z, dim=-1)
    log_p = z.gather(1, targets[:, None])[:, 0] - lse
    return log_p, (weights.double() * (z_loss * lse**2 - log_p)).sum()


def ranks(z: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """How many tokens of the vocabulary have a higher logit than the target: int64 [E]."""
    z = z[rows]
    return (z > z.gather(1, targets[:, None])).sum(-1)


# For the examples -----------------------------------------------------------------------------------------------------


def four_sided_die(ids: Tensor) -> Any:
    """A model that finds each of four tokens equally likely, whatever it has read."""
    return SimpleNamespace(logits=torch.zeros(*ids.shape, 4))


def word_tokenizer(words: str, *, eos: str | None = None, template: str | None = None) -> Any:
    """A tokenizer with one token for each of these words, which white space separates."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(dict.fromkeys(words.split()))}))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer
