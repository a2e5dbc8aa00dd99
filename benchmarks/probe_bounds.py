"""How exactly the probe recovers weights on the real model: `python benchmarks/probe_bounds.py`.

Random float weights on the tokens of three chats in full (template tokens included, so 1 − p goes down to 1e-6), a
loss over logits and a fused one over hidden states, in float32 and bfloat16. Written to results/probe-bounds.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ygivenx as yx
from ygivenx.models.resolve import sample_model_path

ROOT = Path(__file__).parents[1]
QUESTIONS = (
    (
        "Name the capital of France, and one river that flows through it.",
        "Paris. The Seine flows through it.",
    ),
    ("What is 17+25? Think of tens and ones first.", "Tens: 10+20=30. Ones: 7+5=12. Together 42."),
    (
        "Write a sentence about rain without the letter e.",
        "Rain falls on a small town at dawn, and kids jump in it.",
    ),
)


def batch(tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": x}, {"role": "assistant", "content": y}], tokenize=False
        )
        for x, y in QUESTIONS
    ]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    width = min(map(len, ids))
    tokens = torch.tensor([i[:width] for i in ids])
    weights = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) + 0.05
    weights[:, 0] = 0
    return tokens, weights


def errors(model: Any, ids: torch.Tensor, weights: torch.Tensor, fused: bool) -> dict[str, Any]:
    with yx.probe(model) as probed:
        if fused:
            logits = model.model(input_ids=ids).last_hidden_state @ model.lm_head.weight.T
        else:
            logits = model(input_ids=ids).logits
        log_p = logits.float().log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
        (-(log_p * weights[:, 1:]).sum()).backward()
    rows = {(r.sequence, r.position): r for r in probed.trained()}
    true = {place: float(w) for place, w in np.ndenumerate(weights.numpy()) if w}
    right = [p for p in true if p in rows and rows[p].target == int(ids[p])]
    relative = np.array([abs(rows[p].weight / true[p] - 1) for p in right])
    return {
        "tokens": len(true),
        "targets_right": len(right),
        "others_trained": len(rows.keys() - true.keys()),
        "relative_error_max": float(relative.max()),
        "relative_error_median": float(np.median(relative)),
        "smallest_1_minus_p": float(min(-np.expm1(rows[p].log_p) for p in right)),
    }


def main() -> None:
    path, gguf_file = sample_model_path()
    told: dict[str, Any] = {"command": "python benchmarks/probe_bounds.py", "torch": torch.__version__}
    for dtype in (torch.float32, torch.bfloat16):
        model, tokenizer = yx.load(path, gguf_file=gguf_file, dtype=dtype)
        for fused in (False, True):
            name = f"{str(dtype).removeprefix('torch.')}, {'fused' if fused else 'logits'}"
            model.zero_grad()
            told[name] = errors(model, *batch(tokenizer), fused)
            print(name, told[name], flush=True)
    (ROOT / "benchmarks" / "results" / "probe-bounds.json").write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
