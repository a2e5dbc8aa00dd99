"""Objectives of log-probabilities: preference, reinforcement and distillation, each its paper's formula.

Every function takes plain tensors: sums or means of log Pr(y|x) by sequence, or log p by token, as `yx.log_probs`
gives them from one forest. Each returns one loss per pair, sequence or batch as a differentiable tensor in nats; the
mean over what a step holds is the caller's. Constants (a reference, a sampler, advantages) carry no gradient.

    policy = yx.log_probs(model, batch)                  # chosen and rejected by turns
    with torch.no_grad():
        reference = yx.log_probs(model, batch, adapters=False)
    loss = dpo(policy.sums()[0::2], policy.sums()[1::2], reference.sums()[0::2], reference.sums()[1::2]).mean()
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .errors import ConfigError
from .targets import LogProbs

# -- pairs: [P] values of the preferred reply ("chosen") and of the other one ("rejected") --------------------------


def dpo(
    chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor,
    *, beta: float = 0.1, label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    """−log σ(β·margin), margin = log(π/π_ref)(chosen) − log(π/π_ref)(rejected); [P]. Arguments are sums [P].

    Rafailov et al. 2023 (arXiv 2305.18290), equation 7. label_smoothing ε is the share of pairs whose order is wrong:
    (1 − ε)·(−log σ(β·margin)) + ε·(−log σ(−β·margin)), the conservative form (cDPO).
    """
    margin = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)


def ipo(
    chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor,
    *, beta: float = 0.1,
) -> Tensor:  # fmt: skip
    """(margin − 1/(2β))²; [P]. Azar et al. 2023 (arXiv 2310.12036), equation 17, with τ = β.

    Give sums for the formula as it is printed, means for the form that its authors' results (and TRL) use.
    """
    margin = (chosen - reference_chosen) - (rejected - reference_rejected)
    return (margin - 1 / (2 * beta)) ** 2


def orpo(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1) -> Tensor:
    """−chosen − β·log σ(log odds(chosen) − log odds(rejected)); [P]. Arguments are means of log p by sequence.

    Hong et al. 2024 (arXiv 2403.07691), equations 6 and 7; odds = p / (1 − p) with p = exp(mean log p); β is λ there.
    """
    odds = (chosen - rejected) - (_log_complement(chosen) - _log_complement(rejected))
    return -chosen - beta * logsigmoid(odds)


def _log_complement(log_p: Tensor) -> Tensor:
    """log(1 − p) without loss of digits where p is close to 1."""
    # 1 - exp(log p) would be 0 in float32 from p = 1 - 6e-8 on, and its logarithm -inf.
    return torch.log(-torch.expm1(log_p))


def simpo(chosen: Tensor, rejected: Tensor, *, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """−log σ(β·(chosen − rejected) − γ); [P]. Arguments are means of log p by sequence; there is no reference.

    Meng et al. 2024 (arXiv 2405.14734), equation 6. γ is the margin itself, not its ratio to β.
    """
    return -logsigmoid(beta * (chosen - rejected) - gamma)


# -- single replies -------------------------------------------------------------------------------------------------


def kto(
    log_p: Tensor, reference: Tensor, desirable: Tensor, kl: Tensor | float,
    *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0,
) -> Tensor:  # fmt: skip
    """w·(1 − σ(±(β·log(π/π_ref) − β·kl))), + where desirable (bool [S]); [S]. log_p, reference are sums [S].

    Ethayarajh et al. 2024 (arXiv 2402.01306), equation 8. kl estimates KL(π‖π_ref), see `kto_kl`; it is a constant.
    """
    # σ(-z) = 1 - σ(z): an undesirable reply is pushed below the baseline as a desirable one is pushed above it.
    gain = beta * (log_p - reference - torch.as_tensor(kl, device=log_p.device).detach())
    sign = torch.where(desirable, 1.0, -1.0)
    weight = torch.where(desirable, desirable_weight, undesirable_weight)
    return weight * (1 - torch.sigmoid(sign * gain))


def kto_kl(log_p: Tensor, reference: Tensor) -> Tensor:
    """max(0, mean of log(π/π_ref)) over mismatched pairs (prompt i with reply j ≠ i), a detached scalar.

    The estimate of the same paper, section 4.1. log_p and reference are sums [S] of those pairs.
    """
    return (log_p - reference).mean().clamp_min(0).detach()


def reward_weighted(log_p: Tensor, rewards: Tensor) -> Tensor:
    """−reward·log Pr(y|x); [S]. log_p are sums [S]; rewards [S] of any sign, constants.

    With advantages as rewards and on-policy samples its gradient is REINFORCE's (Williams 1992).
    """
    return -rewards.detach() * log_p


# -- policy gradient ------------------------------------------------------------------------------------------------

Mean = Literal["sequence", "token"]
Level = Literal["token", "sequence"]


def group_advantages(
    rewards: Tensor, group: int, *, kind: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
) -> Tensor:
    """Advantages [S] of rewards [S] of which each `group` consecutive ones answer one prompt.

    grpo: (r − mean) / (std + 1e-4), DeepSeekMath (arXiv 2402.03300), section 4.1, std with n − 1 as TRL has it.
    dr_grpo: r − mean (arXiv 2503.20783). rloo: r − mean of the others (arXiv 2402.14740).
    Raises ConfigError where the rewards don't fall into such groups.
    """
    if group < 2 or len(rewards) % group:
        raise ConfigError(
            f"{len(rewards)} rewards in groups of {group}", why="a group is two replies or more to one prompt",
            fix="give the number of replies per prompt, in order of prompts",
        )  # fmt: skip
    by_prompt = rewards.to(torch.promote_types(rewards.dtype, torch.float32)).view(-1, group)
    centred = by_prompt - by_prompt.mean(1, keepdim=True)
    if kind == "grpo":
        centred = centred / (by_prompt.std(1, keepdim=True) + 1e-4)
    elif kind == "rloo":
        centred = centred * (group / (group - 1))
    return centred.view(-1)


def policy_gradient(
    policy: LogProbs, advantages: Tensor, old_log_p: Tensor | None = None,
    *, clip: tuple[float, float] = (0.2, 0.2), level: Level = "token", mean: Mean | float = "sequence",
    reference_log_p: Tensor | None = None, kl_weight: float = 0.0, kl_times_ratio: bool = False,
) -> Tensor:  # fmt: skip
    """The clipped surrogate −min(ρ·A, clip(ρ, 1 − clip[0], 1 + clip[1])·A), a scalar.

    advantages: [S], or [M] by token; constants of any sign. old_log_p: [M], of the policy that sampled; None means
    that it is this one (ρ = 1, with the gradient of log p). level: ρ by token (PPO, GRPO), or by sequence as the
    geometric mean over its tokens (GSPO, arXiv 2507.18071, equation 7). mean: over tokens within each sequence and
    then over sequences (GRPO, arXiv 2402.03300, equation 3), over all tokens of the batch (DAPO, arXiv 2503.14476,
    equation 8), or the sum divided by a number (Dr. GRPO: sequences times the longest allowed reply).
    kl_weight adds that much of `kl_estimate` to `reference_log_p` [M] per token; kl_times_ratio multiplies it by ρ,
    which corrects for tokens that an older policy sampled (DeepSeek-V3.2; TRL's default).
    """
    terms = clipped_terms(
        policy, advantages, old_log_p, clip=clip, level=level, reference_log_p=reference_log_p,
        kl_weight=kl_weight, kl_times_ratio=kl_times_ratio,
    )  # fmt: skip
    if mean == "sequence":
        return (policy.reduce(terms) / policy.lengths).mean()
    return terms.sum() / (len(terms) if mean == "token" else mean)


def clipped_terms(
    policy: LogProbs, advantages: Tensor, old_log_p: Tensor | None = None,
    *, clip: tuple[float, float] = (0.2, 0.2), level: Level = "token",
    reference_log_p: Tensor | None = None, kl_weight: float = 0.0, kl_times_ratio: bool = False,
) -> Tensor:  # fmt: skip
    """What `policy_gradient` takes the mean of, by token: [M]."""
    ratio = _log_ratio(policy, old_log_p, level).exp()
    token_advantages = advantages.detach()
    if len(advantages) != len(policy.log_p):
        token_advantages = token_advantages[policy.sequence]
    clipped = ratio.clamp(1 - clip[0], 1 + clip[1])
    terms = -torch.minimum(ratio * token_advantages, clipped * token_advantages)
    if kl_weight:
        if reference_log_p is None:
            raise ConfigError(
                "kl_weight without reference_log_p", fix="give the reference's log p, or kl_weight=0"
            )
        kl = kl_estimate(policy.log_p, reference_log_p)
        terms = terms + kl_weight * (kl * ratio if kl_times_ratio else kl)
    return terms


def _log_ratio(policy: LogProbs, old_log_p: Tensor | None, level: Level) -> Tensor:
    """log ρ by token, [M]."""
    old = policy.log_p if old_log_p is None else old_log_p
    by_token = policy.log_p - old.detach()
    if level == "token":
        return by_token
    by_sequence = policy.reduce(by_token) / policy.lengths
    return by_sequence[policy.sequence]


def kl_estimate(log_p: Tensor, reference_log_p: Tensor) -> Tensor:
    """exp(d) − d − 1 with d = log π_ref − log π, by token: never negative, unbiased under samples of π.

    Schulman 2020, "Approximating KL divergence" (k3), as in GRPO (arXiv 2402.03300), equation 4.
    """
    d = reference_log_p.detach() - log_p
    return torch.expm1(d) - d


# -- distillation ---------------------------------------------------------------------------------------------------


def on_policy_advantages(log_p: Tensor, teacher_log_p: Tensor) -> Tensor:
    """log teacher − log student, [M], detached: the per-token advantages of on-policy distillation.

    With tokens that the student sampled, `policy_gradient` of them lowers the reverse KL(student ‖ teacher).
    """
    return (teacher_log_p - log_p).detach()


def cross_entropy_to_teacher(log_p: Tensor, teacher_log_p: Tensor) -> Tensor:
    """−Σ_k q_k·log p_k, [M]: the student's loss under the teacher's top-k distribution q, renormalised over them.

    log_p, teacher_log_p: [M, k], of the teacher's k most probable tokens at each target. Hinton et al. 2015
    (arXiv 1503.02531) at temperature 1; with k = vocabulary it is KL(teacher ‖ student) plus the teacher's entropy.
    """
    q = torch.softmax(teacher_log_p.detach().double(), -1)
    return -(q * log_p.double()).sum(-1).to(log_p.dtype)


def reverse_kl_to_teacher(log_p: Tensor, teacher_log_p: Tensor) -> Tensor:
    """Σ_k p_k·(log p_k − log q_k), [M]: KL(student ‖ teacher), both renormalised over the k tokens that are given.

    log_p, teacher_log_p: [M, k]. MiniLLM (Gu et al. 2023, arXiv 2306.08543) uses its value per token.
    """
    p, q = log_p.double().log_softmax(-1), teacher_log_p.detach().double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).to(log_p.dtype)
