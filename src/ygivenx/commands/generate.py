"""`ygx generate`: what a model writes after the prompt that its template makes, streamed, up to its stops."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ..errors import ConfigError
from ..show import visible
from .config import EncoderSection, Sampling, Weights
from .inputs import open_encoder, open_model
from .quiet import quiet


def replies(
    weights: Weights, sampling: Sampling, prompts: list[str] | None, silent: bool = False
) -> list[dict[str, Any]]:
    """A reply to each prompt, or to each line of standard input as one chat; printed as they come unless `silent`."""
    with quiet(weights.verbose):
        model, tokenizer = open_model(weights, weights.dtype)
        stops = stop_ids(model, open_encoder(weights, EncoderSection()))
        torch.manual_seed(sampling.seed)
        found = []
        for messages in _conversations(sampling.system, prompts):
            text = reply(model, tokenizer, messages, sampling, stops, silent)
            messages.append({"role": "assistant", "content": text})
            found.append({"prompt": messages[-2]["content"], "reply": text})
    return found


def stop_ids(model: Any, encoder: Any) -> list[int]:
    """The tokens at which a reply ends: those that replies were trained to end in, and the model's own."""
    own = model.generation_config.eos_token_id
    ids = own if isinstance(own, list) else [own]
    trained = (encoder.tokens.special[text] for text in encoder.tokens.stops)
    return sorted({*trained, *(i for i in ids if i is not None)})


def _conversations(system: str | None, prompts: list[str] | None) -> Iterator[list[dict[str, str]]]:
    """Messages up to a user's: a new conversation for each prompt, or one that lines of standard input go on with."""
    first = [{"role": "system", "content": system}] if system else []
    if prompts:
        yield from ([*first, {"role": "user", "content": p}] for p in prompts)
        return
    chat = list(first)
    for line in sys.stdin:
        if line.strip():
            chat.append({"role": "user", "content": line.rstrip("\n")})
            yield chat


@torch.no_grad()
def reply(
    model: Any, tokenizer: Any, messages: list[dict[str, str]], sampling: Sampling, stops: Iterable[int],
    silent: bool = True,
) -> str:  # fmt: skip
    """What the model writes after the messages, without its stop token."""
    if tokenizer.chat_template is None:
        raise ConfigError(
            "the tokenizer has no chat template", why="a prompt is what a template makes of messages"
        )
    batch = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    settings: dict[str, Any] = {"do_sample": sampling.temperature > 0}
    if settings["do_sample"]:
        # top_k: transformers cuts to the 50 most probable tokens unless that is switched off.
        settings |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    ids = model.eval().generate(
        **batch,
        **settings,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=list(stops),
        # generate() warns without one, though a single prompt has no padding.
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(stops), 0),
        streamer=None if silent else _streamer(tokenizer),
    )
    return str(tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True))


def _streamer(tokenizer: Any) -> Any:
    from transformers import TextStreamer

    class Visible(TextStreamer):
        """Text as it comes, without what a terminal would obey."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(visible(text), stream_end)

    return Visible(tokenizer, skip_prompt=True, skip_special_tokens=True)
