"""How exact the head's gradients are, against float64 on the same inputs, by confidence of the rows.

    python benchmarks/head_accuracy.py --out benchmarks/results/head_accuracy.json
    python benchmarks/head_accuracy.py --dtype float32 --shape 1000,384,80000 --out ..._float32.json  # on the kernel

Rows predict their targets with all degrees of certainty, as late in fine-tuning. Per contestant: relative error of the
loss and of dH per row (median and maximum) over the confident rows (p > 0.99) and over the others, and of dW.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from head import LOSSES, Cell

from ygivenx import reference


def confident_cell(rows: int, size: int, vocabulary: int, dtype: str) -> Cell:
    """A cell whose hidden states point at their targets' embeddings, some more than others."""
    cell = Cell(rows, size, vocabulary, 100, dtype)
    with torch.no_grad():
        weight = cell.weight * 5  # logits of a trained head spread over tens
        pull = torch.linspace(0.6, 1.6, rows)[:, None]
        hidden = weight[cell.targets].float() * pull + torch.randn(rows, size) * 0.3
        cell.weight, cell.hidden = weight.requires_grad_(), hidden.to(cell.hidden.dtype).requires_grad_()
    return cell


def errors(cell: Cell, name: str, truth: tuple[torch.Tensor, ...], sure: torch.Tensor) -> dict[str, float]:
    loss, d_hidden, d_weight = truth
    cell.hidden.grad = cell.weight.grad = None
    value = LOSSES[name](cell)
    value.backward()
    by_row = (cell.hidden.grad.double() - d_hidden).norm(dim=1) / d_hidden.norm(dim=1)
    off = (cell.weight.grad.double() - d_weight).norm() / d_weight.norm()
    found = {
        "loss": abs(float(value.detach().double() / loss - 1)),
        "dH confident, median": float(by_row[sure].median()), "dH confident, maximum": float(by_row[sure].max()),
        "dH others, median": float(by_row[~sure].median()), "dW": float(off),
    }  # fmt: skip
    return {key: float(f"{error:.3g}") for key, error in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="192,576,49152", metavar="ROWS,H,V")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--contestants", default="ours,ours without kernel,select,transformers,TRL,cut-cross-entropy"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    cell = confident_cell(*map(int, args.shape.split(",")), args.dtype)
    weights = torch.full((cell.trained,), 1 / cell.trained)
    leaves = [t.detach().double().requires_grad_() for t in (cell.hidden, cell.weight)]
    log_p, loss = reference.selective_cross_entropy(*leaves, cell.rows, cell.targets, weights)
    truth = (loss.detach(), *torch.autograd.grad(loss, leaves))
    # Beyond p = 1 - 1e-12 there is no gradient to speak of.
    sure = (log_p > -0.01) & (log_p < -1e-12)
    told: dict[str, object] = {
        "shape": args.shape,
        "dtype": args.dtype,
        "confident": int(sure.sum()),
        "rows": cell.trained,
    }
    for name in args.contestants.split(","):
        told[name] = errors(cell, name, truth, sure)
    print(json.dumps(told, indent=1))
    if args.out:
        args.out.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
