"""Whether sequences of a model can share what they begin with, and if not, why.

The families in `families.PROVEN` are compared with unshared runs by the tests, gradients included. Any other model is
compared on a small forest before its first use: hidden states and their gradients have to be those of its sequences.
Where they aren't, or a layer is known to carry a state from token to token, sequences are run by themselves; that is
compared with single runs, too. What isn't exact even then is refused by name.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from ..choices import Route
from ..errors import ModelError
from ..forest import Forest
from . import attention, lightning, recurrent
from .adapters import refuse_unread
from .families import BY_HAND, PROVEN, config_of, decoder_of, embeddings_of, feed
from .logits import precisely
from .plan import Plan, automatic
from .streaming import ONE_PASS
from .unshared import UnsharedRun
from .wrappers import sharded

logger = logging.getLogger(__name__)

# Layers whose only way from token to token is attention that a forest's mask describes.
SHAREABLE_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
# Proven with full attention only: their sliding window stands in the mask alone.
WINDOW_IN_MASK = {"qwen2_moe"}
# Rounding of hidden states, and of gradients, in units of the dtype's eps; what mixes branches is off by far more.
HIDDEN_ROUNDING, GRADIENT_ROUNDING = 300, 3000
SMALL_WINDOW = 5  # tokens, of sequences of 15 to 17
FAR = 0.5  # relative, where eps is so large that the units above would allow anything


@dataclass(frozen=True)
class Sharing:
    """What is known of a model. reason: why its sequences can't share at all, empty where they can.

    window: a sliding window that only the model's own mask keeps; sequences up to it can share. in_one_pass: why a
    forest can't be computed in chunks, empty where it can.
    """

    reason: str = ""
    window: int | None = None
    in_one_pass: str = ""

    def reason_for(self, longest: int, in_chunks: bool) -> str:
        """Why sequences of at most `longest` read tokens can't share; empty where they can."""
        if self.reason:
            return self.reason
        if self.window is not None and longest > self.window:
            return f"its sliding window of {self.window:,} tokens stands in its own mask alone"
        return self.in_one_pass if in_chunks else ""


_known: WeakKeyDictionary[nn.Module, Sharing] = WeakKeyDictionary()
_announced: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def sharing_of(model: Any) -> Sharing:
    """What sequences of a model can share. Raises ModelError where they aren't exact even by themselves."""
    refuse_unread(model)
    decoder, config = decoder_of(model), config_of(model)
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(
            f"{type(model).__name__} is an encoder with a decoder",
            why="its tokens depend on what an encoder read, and rows here are one text",
            fix="use a decoder-only model",
        )
    # Judged once for each decoder, which is remembered no longer than it lives.
    if decoder not in _known:
        _known[decoder] = _judged(decoder, config)
    if not _known[decoder].reason:
        _prepare(decoder, config)
    return _known[decoder]


def reason_unshared(model: Any, forest: Forest, route: Route, in_chunks: bool) -> str:
    """Why the sequences of this forest are run by themselves; empty where they share. Says so once.

    Raises ModelError like `sharing_of`, and where the route is one that this model hasn't.
    """
    longest = max((len(path) - 1 for path in forest.paths), default=0)
    reason = sharing_of(model).reason_for(longest, in_chunks)
    if route == "unshared":
        return reason or "so it was asked"
    by_hand = config_of(model).model_type in BY_HAND
    if by_hand and not reason and route not in ("auto", "dense"):
        reason = "its attention is written by hand, and can only be given a whole mask"
    if not reason:
        return ""
    if route != "auto":
        raise ModelError(
            f"the route {route!r} can't be used: {reason}",
            where=type(decoder_of(model)).__name__,
            fix="leave route out: its sequences are then run by themselves",
        )
    announced = _announced.setdefault(decoder_of(model), set())
    if reason not in announced:
        announced.add(reason)
        logger.warning(
            "%s: sequences are run by themselves and share nothing: %s", type(model).__name__, reason
        )
    return reason


def _judged(decoder: Any, config: Any) -> Sharing:
    windowed = config.model_type in WINDOW_IN_MASK and getattr(config, "sliding_window", None)
    if config.model_type in PROVEN and not windowed:
        return Sharing()
    training = decoder.training
    decoder.eval()
    try:
        with precisely(decoder, embeddings_of(decoder).device), lightning.unrounded(decoder):
            return _compared(decoder, config)
    finally:
        decoder.train(training)


def _small_forest(vocabulary: int, branches_branch: bool) -> Forest:
    """Sequences of up to 23 tokens.

    branches_branch: some segments, of unequal length and one of a single token, end in states that others begin in.
    """
    rng = np.random.default_rng(0)
    trunk, *tails = (rng.integers(0, vocabulary, n) for n in (9, 6, 8, 7))
    rows = [[*trunk, *tail] for tail in tails]
    # Recurrent layers hand states on by segments: these rows have segments that begin in states of others, at two
    # levels.
    if branches_branch:
        rows += [[*trunk, *before, *tail] for before in (tails[1], tails[2][:1]) for tail in tails[:2]]
    return Forest.of((ids, np.zeros(len(ids))) for ids in rows)


def _compared(decoder: Any, config: Any) -> Sharing:
    forest = _small_forest(config.vocab_size, branches_branch=bool(recurrent.mixers(decoder)))
    single = _attempted(decoder, lambda: UnsharedRun.of(decoder, decoder, forest, size=1).at_once())
    if isinstance(single, str):
        raise ModelError(
            f"it can't read a sequence: {single}",
            where=type(decoder).__name__,
            why="its decoder has to give hidden states for token ids alone",
            fix="use a causal language model that reads text",
        )
    plan = _plan(decoder, forest)
    reason = _known_reason(decoder, config) or _difference_shared(decoder, config, forest, plan, single)
    if not reason:
        window = plan.window_in_mask
        if window is not None and _window_is_kept(decoder, config, forest):
            window = None
        return Sharing("", window, _in_one_pass(decoder, config, plan))
    # What can't share has to be exact at least in a padded batch: else nothing that is computed here could be relied
    # upon.
    batch = _attempted(decoder, lambda: UnsharedRun.of(decoder, decoder, forest, size=ONE_PASS).at_once())
    if worse := _difference(batch, single):
        raise ModelError(
            f"its sequences can't be computed exactly: in a padded batch {worse}",
            where=type(decoder).__name__,
            why="its layers look ahead, or mix the rows of a batch, so log-probabilities would be wrong",
            fix="use a causal model; of a proven family are " + ", ".join(sorted(PROVEN)),
        )
    return Sharing(reason)


def _prepare(decoder: nn.Module, config: Any) -> None:
    if config.model_type not in BY_HAND:  # they ask for their attention by name, and would take another
        attention.prepare(config)
    recurrent.prepare(decoder)


def _known_reason(decoder: nn.Module, config: Any) -> str:
    """What is known without a comparison, or what a comparison of short sequences could not see."""
    types = set(getattr(config, "layer_types", None) or ()) - SHAREABLE_LAYERS
    mixers = recurrent.mixers(decoder)
    if types and not mixers:
        return f"its layers of type {', '.join(sorted(types))} may carry a state from token to token"
    if config.model_type == "gpt_neo" and "local" in config.attention_layers:
        return "its local attention goes by the order of the batch"
    if getattr(config, "index_topk", None):
        return "its layers choose which keys a token sees by their order in the batch"
    accepted = inspect.signature(decoder.forward).parameters
    if "attention_mask" not in accepted or ("position_ids" not in accepted and not mixers):
        return "it takes no positions or no mask, so a token can't know which path it stands on"
    return ""


def _window_is_kept(decoder: Any, config: Any, forest: Forest) -> bool:
    """Whether the model's own mask has the window that we take for it: compared where it is shorter than sequences."""
    # The real window is longer than the small forest's sequences, which could say nothing of it.
    window, config.sliding_window = config.sliding_window, SMALL_WINDOW
    try:
        single = _attempted(decoder, lambda: UnsharedRun.of(decoder, decoder, forest, size=1).at_once())
        plan = _plan(decoder, forest)
        return not isinstance(single, str) and not _difference_shared(decoder, config, forest, plan, single)
    finally:
        config.sliding_window = window


def _plan(decoder: Any, forest: Forest) -> Plan:
    return Plan.of(forest.fed_end, forest.depth[forest.fed], embeddings_of(decoder).device)


def _in_one_pass(decoder: nn.Module, config: Any, plan: Plan) -> str:
    if config.model_type in BY_HAND:
        return "its attention is written by hand and keeps no keys and values for later chunks"
    if recurrent.begins_with_no_state(decoder):
        return "some of its layers begin with no state, and this forest is longer than one pass"
    return "its layers attend twice, which can't be computed in chunks" if plan.attends_twice else ""


class _Outcome(NamedTuple):
    """Hidden states [F, H] of a forest, and their gradient [distinct ids, E] with respect to embeddings, if made."""

    hidden: Tensor
    gradient: Tensor | None


def _difference_shared(decoder: Any, config: Any, forest: Forest, plan: Plan, single: _Outcome) -> str:
    """How far a forest's hidden states are from those of single runs; empty where they are the same."""
    stock = config._attn_implementation
    _prepare(decoder, config)
    shared = _attempted(decoder, lambda: feed(decoder, plan, forest.token[forest.fed]))
    if worse := _difference(shared, single):
        config._attn_implementation = stock
        return f"over a small forest {worse}"
    return ""


def _attempted(decoder: nn.Module, compute: Callable[[], Tensor]) -> _Outcome | str:
    """What `compute` gives, or the error of whatever library was in the way."""
    try:
        with torch.set_grad_enabled(_differentiable(decoder)), _embedded(decoder) as embedded:
            hidden = compute()
            return _Outcome(hidden.detach().double(), _gradient(hidden, embedded))
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def _differentiable(decoder: nn.Module) -> bool:
    """Whether gradients can be compared: of sharded weights every rank would have to make them."""
    trained = any(p.requires_grad for p in decoder.parameters())
    return trained and not torch.is_inference_mode_enabled() and not any(map(sharded, decoder.modules()))


@contextmanager
def _embedded(decoder: Any) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """(ids, their embeddings as leaves of the graph) of each forward pass within it."""
    found = list[tuple[Tensor, Tensor]]()

    def keep(_module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled() or not inputs or output.shape[:-1] != inputs[0].shape:
            return None
        found.append((inputs[0], output.detach().requires_grad_()))
        return found[-1][1].clone()  # a leaf may not be written into, and some models scale it in place

    hook = decoder.get_input_embeddings().register_forward_hook(keep)
    try:
        yield found
    finally:
        hook.remove()


def _gradient(hidden: Tensor, embedded: list[tuple[Tensor, Tensor]]) -> Tensor | None:
    """Of a random mean of the hidden states, by id: the same however the ids are distributed over sequences."""
    if not hidden.requires_grad or not embedded:
        return None
    # A sum would hide errors that cancel, and a norm's gradient is 0 where rows are normalised.
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden)
    gradients = torch.autograd.grad((hidden * direction).sum(), [e for _, e in embedded])
    ids = torch.cat([i.flatten() for i, _ in embedded])
    which, place = ids.unique(return_inverse=True)
    flat = torch.cat([g.flatten(0, -2) for g in gradients]).double()
    return flat.new_zeros(len(which), flat.shape[-1]).index_add_(0, place, flat)


def _difference(found: _Outcome | str, single: _Outcome) -> str:
    """How far it is from the runs of single sequences, in words; empty where that is rounding."""
    if isinstance(found, str):
        return f"it fails with {found}"
    eps = torch.finfo(torch.float32).eps
    for what, ours, exact, units in (
        ("hidden states", found.hidden, single.hidden, HIDDEN_ROUNDING),
        ("gradients", found.gradient, single.gradient, GRADIENT_ROUNDING),
    ):
        if ours is None or exact is None:
            continue
        if what == "gradients":  # the norm of an embedding of zeros, as padding has it, has none
            finite = exact.isfinite().all(-1)
            ours, exact = ours[finite], exact[finite]
        off = float((ours - exact).norm() / exact.norm())
        # Written so that NaN is far as well.
        if not off < min(units * eps, FAR):
            return f"its {what} differ by {off:.1e} from those of single runs"
    return ""


# -- in words --------------------------------------------------------------------------------------------


def explain(model: Any = None) -> dict[str, str]:
    """Which routes forests take, by shape, on this machine or that of the model, and what its layers do to it."""
    if model is None:
        return _by_shape(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    sharing, config = sharing_of(model), config_of(model)
    routes = _by_shape(embeddings_of(decoder_of(model)).device)
    if sharing.reason:
        routes = dict.fromkeys(routes, "unshared") | {"why": f"nothing is shared: {sharing.reason}"}
    elif config.model_type == "gpt_oss":
        routes = dict.fromkeys(routes, "dense (attention sinks)")
    elif getattr(config, "attn_logit_softcapping", None):
        capped = "flex" if routes["forest"] == "flex" else "dense (other routes have no soft-cap)"
        routes = dict.fromkeys(routes, capped)
    if not sharing.reason and (window := getattr(config, "sliding_window", None)):
        longer = "are unshared" if sharing.window else "take the forest's route"
        routes["sliding window"] = f"{window}, and sequences longer than it {longer}"
    if hasattr(config, "router_aux_loss_coef"):
        routes["router loss"] = "not part of the loss"
    return routes


def describe_routes(model: Any) -> str:
    """`explain` in one line, for the log of a run."""
    return "attention: " + ", ".join(f"{what} {route}" for what, route in explain(model).items())


def _by_shape(device: torch.device) -> dict[str, str]:
    return {
        "one sequence": "plain",
        "sequences that share nothing": automatic(device, shared=False),
        "forest": automatic(device),
    }
