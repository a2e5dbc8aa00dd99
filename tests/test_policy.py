"""Weights: named policies, factors, functions, messages' own weights, and what is refused."""

from __future__ import annotations

import pytest

from ygivenx.encoder.policy import Part, policy_of, weight_of
from ygivenx.errors import ConfigError

ANSWER = Part("answer", True, 3, "assistant", last=True)
EARLIER = Part("answer", True, 1, "assistant")
REASONING = Part("reasoning", True, 3, "assistant", last=True)
CALL = Part("tool_call", True, 3, "assistant", last=True)
END = Part("end_of_turn", True, 3, "assistant", last=True)
USER = Part("user", False, 0, "user")
GLUE = Part("template", False)
PARTS = (ANSWER, EARLIER, REASONING, CALL, END, USER, GLUE)


@pytest.mark.parametrize(
    ("train", "weights"),
    [
        ("assistant", (1, 1, 1, 1, 1, 0, 0)),
        ("last", (1, 0, 1, 1, 1, 0, 0)),
        ("all", (1, 1, 1, 1, 1, 1, 1)),
        ("roles=user", (0, 0, 0, 0, 0, 1, 0)),
        ("roles=user+assistant", (1, 1, 1, 1, 1, 1, 0)),
        ("roles=function", (0, 0, 0, 0, 0, 0, 0)),
        ("prompt=0.25", (1, 1, 1, 1, 1, 0.25, 0.25)),
        ("reasoning=0", (1, 1, 0, 1, 1, 0, 0)),
        ("last, tool_calls=0, end_of_turn=0.5", (1, 0, 1, 0, 0.5, 0, 0)),
        (["last", lambda p: 3.0 if p.kind == "answer" else 1.0], (3, 0, 1, 1, 1, 0, 0)),
        (lambda p: 0.5, (0.5,) * 7),
    ],
)
def test_policies(train, weights):
    policy = policy_of(train)
    assert tuple(weight_of(policy, p) for p in PARTS) == weights


def test_a_factor_is_for_what_the_model_produces():
    """A thought in the context of another reply is x: `all` trains it, whatever thoughts of replies weigh."""
    thought = Part("reasoning", False, 1, "assistant")
    assert weight_of(policy_of("all,reasoning=0"), thought) == 1
    assert weight_of(policy_of("roles=assistant"), thought) == 0


def test_the_older_name_of_a_role_is_its_own():
    """Rows have `tool` for OpenAI's `function`."""
    assert policy_of("roles=function+user")(Part("tool", False, 2, "tool")) == 1


def test_a_messages_own_weight_multiplies():
    part = Part("answer", True, 1, "assistant", weight=0.25)
    assert weight_of(policy_of("assistant"), part) == 0.25
    assert weight_of(policy_of(lambda p: 2.0), part) == 0.5


@pytest.mark.parametrize(
    "train", ["assistent", "prompt=2", "prompt=x", "end_of_turn=-1", "roles=", "reasoning"]
)
def test_what_a_name_cannot_be(train):
    with pytest.raises(ConfigError):
        policy_of(train)


def test_the_nearest_name_is_offered():
    with pytest.raises(ConfigError, match="'assistant'"):
        policy_of("assistent")


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_is_a_finite_number(weight):
    with pytest.raises(ConfigError, match="finite"):
        weight_of(policy_of(lambda p: weight), ANSWER)
