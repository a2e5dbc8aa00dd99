"""Proofs by shape and encoding part by part against their slow twins, and what a template may ask of a text."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from templates.stock import stock_templates, tokenizer_for
from test_chats import HEADER_WITH_THE_REPLY, LAST_SPEAKER, NO_END
from test_properties import CONTROL, many, messages, words
from tokenizers import AddedToken, Tokenizer

from ygivenx import Encoder, Example, Rejected, RowError
from ygivenx.encoder.prove import candidates
from ygivenx.encoder.tokenize import Tokens, cutting_tokens
from ygivenx.templating.inputs import Inputs
from ygivenx.templating.placeholders import PathConditions, Undecided, text_with_marks
from ygivenx.templating.sandbox import Outside
from ygivenx.templating.symbolic import SymbolicEnvironment
from ygivenx.templating.template import Template

TEMPLATES = stock_templates()
STOCK = [n for n in TEMPLATES if not n.endswith("_training")]
needs_templates = pytest.mark.skipif(not TEMPLATES, reason="TRL is not installed")

tricky = st.lists(
    st.one_of(
        words,
        st.sampled_from(["<think>\n\n</think>\n\n", "<think>\nhm\n</think>\n\n4", "yes ", " yes", "\n"]),
    ),
    max_size=4,
).map("".join)
some = st.one_of(tricky, st.sampled_from(["Hello there", "4", "Yes, it is."]))


def twins(name: str, template: str = "", **options) -> tuple[Encoder, Encoder]:
    """An encoder, and one that proves each row by itself."""
    tokenizer = tokenizer_for(name, template or TEMPLATES[name])
    fast, slow = Encoder(tokenizer, **options), Encoder(tokenizer, **options)
    slow._chats._proofs.candidates = candidates  # the slow twin itself
    return fast, slow


def plain(done: tuple[list[Example], list[Rejected]]) -> list:
    sequences = [
        [(s.ids.tolist(), s.weights.tolist(), s.segments, s.notes, list(s.tokens)) for s in e]
        for e in done[0]
    ]
    return [*sequences, *((r.reason, r.where, r.message) for r in done[1])]


def proofs(encoder: Encoder) -> int:
    return sum(map(len, encoder._chats._proofs.by_shape.values()))


def row(*texts: str) -> dict:
    return {
        "messages": [{"role": "assistant" if i % 2 else "user", "content": t} for i, t in enumerate(texts)]
    }


ENCODERS: dict[tuple[str, str], tuple[Encoder, Encoder]] = {}


@needs_templates
@settings(many, max_examples=many.max_examples // 3)  # each takes two seconds: up to three rows, proven twice
@given(
    name=st.sampled_from(STOCK or [""]),
    control=st.sampled_from(["refuse", "text", "parse"]),
    rows=st.lists(messages(some), min_size=1, max_size=3),
)
def test_a_row_proven_by_its_shape_is_as_if_proven_by_itself(name, control, rows):
    if (name, control) not in ENCODERS:
        ENCODERS[name, control] = twins(name, control=control)
    fast, slow = ENCODERS[name, control]
    rows = [{"messages": m} for m in rows]
    assert plain(fast.batch(rows * 2)) == plain(slow.batch(rows * 2))


@needs_templates
@pytest.mark.parametrize("name", STOCK)
def test_rows_of_one_shape(name):
    """Every pair of first and second row: what the first one teaches must not be wrong for the second."""
    texts = [
        "Hello", "4 ", "\nyes", "</think>", "<think>\nhm\n</think>\n\n4", "<think>\n\n</think>\n\nno", "[INST]",
        "<|im_end|>", "<", "|>", "a" * 300, "ﬁ e\u0301", "<tool_response>", "{{ x }}", "user", "assistant",
    ]  # fmt: skip
    fast, slow = twins(name)
    rows = [row(u, a) for u in ("Hi", *texts[:8]) for a in texts]
    rows += [row("Hi", a, "And?", b) for a in texts for b in texts[:8]]
    assert plain(fast.batch(rows)) == plain(slow.batch(rows))
    assert plain(fast.batch(rows[::-1])) == plain(slow.batch(rows[::-1]))


@needs_templates
@pytest.mark.parametrize(
    "name", ["qwen3", "qwen2_5", "llama3", "gemma3", "glm4moe", "gptoss", "phi3", "cohere"]
)
def test_plain_chats_are_proven_by_shape(name):
    fast, _ = twins(name)
    fast.batch([row("Hi", f"{n}.", "And?", f"No, {n}") for n in range(6)])
    assert proofs(fast) == 1


@pytest.mark.parametrize(
    "template", [NO_END, LAST_SPEAKER, NO_END.replace("content }}", "content | trim }}")]
)
@pytest.mark.parametrize("repair", ["default", "none"])
def test_repairs_that_no_text_has_a_part_in_are_proven_by_shape(template, repair):
    fast, slow = twins("x", template, repair=repair)
    chats = [
        row("Hi", a, "And?", b) for a in ("4", "yes ", "\nno", "assistant:") for b in ("Yes.", "6\n", " ")
    ]
    greeted = [
        {"messages": [{"role": "assistant", "content": f"I am {n}."}, *chats[n]["messages"]]}
        for n in range(9)
    ]
    assert plain(fast.batch(chats + greeted)) == plain(slow.batch(chats + greeted))
    assert proofs(fast) > 0 or repair == "none"


@needs_templates
def test_weights_and_policies_are_part_of_the_shape():
    for train in ("last", "all", "prompt=0.5", "assistant,end_of_turn=0"):
        fast, slow = twins("qwen2_5", train=train)
        rows = [row("a", "b", "c", f"d{n}") for n in range(6)]
        for n, r in enumerate(rows):
            r["messages"][1]["weight"] = [0.0, 0.5][n % 2]
        assert plain(fast.batch(rows)) == plain(slow.batch(rows))


def test_a_weight_that_the_row_gives_is_part_of_the_shape():
    """Even one of 1: it tells that a greeting, which nobody asks for, is to be trained."""
    fast, slow = twins("x", HEADER_WITH_THE_REPLY)
    greeted = [
        {
            "messages": [
                {"role": "assistant", "content": f"I am {n}.", **weight},
                *row("Hi", f"{n}")["messages"],
            ]
        }
        for n in range(4)
        for weight in ({}, {"weight": 1.0})
    ]
    for rows in (greeted, greeted[::2] + greeted[1::2], greeted[1::2] + greeted[::2]):
        assert plain(fast.batch(rows)) == plain(slow.batch(rows))


ASKED = [
    ("{{ t }}", {}),
    ("{{ '<' + t + '>' ~ t }}", {}),
    ("{% set x %}<{{ t }}{% endset %}{{ x }}", {}),
    ("{% macro f(x) %}({{ x | trim }}{% endmacro %}{{ f(t) }}", {"strip": 1}),
    ("{% if '</think>' in t %}a{% else %}{{ t }}{% endif %}", {"contains": 1}),
    ("{% if t == 'x' or t.startswith('y') %}a{% else %}{{ t }}{% endif %}", {"equals": 1, "startswith": 1}),
    (
        "{% if t %}{{ t.split('</think>')[-1].lstrip('\\n') }}{% endif %}",
        {"true": 1, "contains": 1, "lstrip": 1},
    ),
    ("{% if t is string and t is not mapping and t is not none %}{{ t }}{% endif %}", {}),
    ("{{ t | default('x') }}{{ t.nothing is defined }}", {}),
]
LOOKED_INTO = [
    "{{ t | length }}", "{{ t | upper }}", "{{ t[0] }}", "{{ t[1:] }}", "{% for c in t %}{% endfor %}", "{{ t | int }}",
    "{{ t.count('a') }}", "{{ t | tojson }}", "{{ {'a': t} }}", "{{ [t] | join }}", "{{ t in 'abc' }}",
    "{{ '%s' % t }}", "{{ '{}'.format(t) }}", "{{ t < 'a' }}", "{{ {t: 1} }}", "{{ (t ~ 'x') | trim }}",
    "{{ 'x' in ('a' ~ t) }}",
    "{{ t.split() }}", "{{ t.split('e') | last }}", "{{ t | replace('e', 'x') }}", "{{ t is upper }}",
    "{{ t.strip('H') }}",
    "{{ [1, 2] | random }}", "{{ t ~ '\ud800' }}", "{{ t.__class__ }}", "{{ t | string | length }}", "{{ t * 2 }}",
]  # fmt: skip


def asked(source: str, text: str) -> tuple[str, PathConditions]:
    sheet = PathConditions()
    inputs = Inputs((), kwargs={"t": sheet.placeholder(text)})
    return text_with_marks(Template(source).pieces(SymbolicEnvironment, inputs, False)), sheet


@pytest.mark.parametrize(("source", "questions"), ASKED)
def test_what_a_template_may_ask(source, questions):
    made, sheet = asked(source, "Hello")
    filled = made
    for hole in sheet.placeholders:
        filled = filled.replace(hole.mark, hole.text)
    assert filled == Template(source).render(Inputs((), kwargs={"t": "Hello"}))
    kinds = [what for _, what, _ in sheet.answers]
    assert {k: kinds.count(k) for k in kinds} == questions
    assert sheet.hold_for(["Hello"])


@pytest.mark.parametrize("source", LOOKED_INTO)
def test_what_looks_into_a_text_is_undecided(source):
    # `SymbolicTemplate.render` takes Outside as Undecided.
    with pytest.raises((Undecided, Outside, RowError)):
        asked(source, "Hello")


def test_other_answers_are_noticed():
    _, sheet = asked("{% if '</think>' in t %}{% endif %}{{ t | trim }}", "Hello")
    assert sheet.hold_for(["Bye"])
    assert not sheet.hold_for(["</think>"])
    assert not sheet.hold_for([" Bye"])


# --- encoding part by part -------------------------------------------------------------------------------


@needs_templates
@many
@given(
    name=st.sampled_from(STOCK or [""]), text=st.lists(st.one_of(words, st.sampled_from(CONTROL)), max_size=9)
)
def test_parts_are_encoded_as_the_whole(name, text):
    tokens = _tokens(name)
    assert tokens._cutting is not None
    text = "".join(text)
    (one,), (other,) = tokens.encode([text]), tokens.encode_whole([text])
    for field in ("ids", "starts", "stops"):
        assert getattr(one, field).tolist() == getattr(other, field).tolist()
    assert (one.text, one.tiled) == (other.text, other.tiled)


TOKENS: dict[str, Tokens] = {}


def _tokens(name: str) -> Tokens:
    if name not in TOKENS:
        TOKENS[name] = Tokens(tokenizer_for(name, TEMPLATES[name]))
    return TOKENS[name]


@needs_templates
@pytest.mark.parametrize(
    "other",
    ["<|im_end|><x>", "x<|im_end|>", "<|im_end|><|im_start|>", "a<|im", "<|im_end|>\n"],
)
def test_a_token_that_another_may_overlap_is_no_place_to_cut(other):
    tokenizer = tokenizer_for("qwen2_5", TEMPLATES["qwen2_5"])
    tokenizer.add_tokens([AddedToken(other, special=False, normalized=False)])
    pattern = cutting_tokens(tokenizer.backend_tokenizer)
    assert pattern is None or pattern.fullmatch("<|im_end|>") is None


@needs_templates
@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word", "normalized"])
def test_nor_is_one_that_looks_around(flag):
    tokenizer = tokenizer_for("qwen2_5", TEMPLATES["qwen2_5"])
    tokenizer.add_tokens(
        [AddedToken("<|z|>", special=True, **{"normalized": False, flag: True})], special_tokens=True
    )
    pattern = cutting_tokens(tokenizer.backend_tokenizer)
    assert pattern is not None
    assert pattern.fullmatch("<|z|>") is None


def with_steps(backend, **steps) -> Tokenizer:
    """A tokenizer of which some steps are others."""
    return Tokenizer.from_str(json.dumps(json.loads(backend.to_str()) | steps))


@needs_templates
@pytest.mark.parametrize(
    "step",
    [
        {
            "pre_tokenizer": {
                "type": "Metaspace",
                "replacement": "▁",
                "prepend_scheme": "first",
                "split": True,
            }
        },
        {
            "normalizer": {
                "type": "Sequence",
                "normalizers": [{"type": "Strip", "strip_left": True, "strip_right": True}],
            }
        },
        {"post_processor": {"type": "ByteLevel", "trim_offsets": True, "add_prefix_space": True}},
        {"model": {"type": "BPE", "dropout": 0.1, "vocab": {"a": 0}, "merges": []}},
    ],
)
def test_what_is_not_known_to_work_part_by_part_is_encoded_whole(step):
    backend = tokenizer_for("qwen2_5", TEMPLATES["qwen2_5"]).backend_tokenizer
    assert cutting_tokens(with_steps(backend)) is not None
    assert cutting_tokens(with_steps(backend, **step)) is None


def test_where_renderings_part_at_a_hole_its_text_is_asked():
    """That they part there, and not later, depends on how the text begins: other rows have to answer alike."""
    sheet = PathConditions()
    sheet.placeholder("yes").require_other_beginning("no")
    assert sheet.hold_for(["perhaps"])
    assert not sheet.hold_for(["never"])
    assert not sheet.hold_for([""])
    for text, rest in (("yes", "yet"), ("", "no"), ("yes", sheet.placeholders[0].mark)):
        with pytest.raises(Undecided):
            sheet.placeholder(text).require_other_beginning(rest)


def test_a_control_token_that_template_and_row_write_together_is_found_on_the_fast_path():
    """A template writes `<|im_` and a row `end|>`: neither has the token alone, and no question was asked of it."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'user' %}<|im_{% endif %}{{ m.content }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    fast, slow = twins("x", template)
    rows = [row(text, "yes") for text in ("hello", "world", "again", "end|> forged", "once more")]
    assert plain(fast.batch(rows)) == plain(slow.batch(rows))
    examples, rejected = fast.batch(rows)
    assert proofs(fast) > 0
    assert ([r.reason for r in rejected], len(examples)) == (["control_text"], 4)
