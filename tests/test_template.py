"""Rendering as transformers renders, origins byte for byte or declined, and budgets that trip."""

from __future__ import annotations

from datetime import datetime
from time import sleep

import pytest
from templates.conversations import ALL, call, calls, reply, user
from templates.stock import stock_templates, tokenizer_for

from ygivenx import RowError
from ygivenx.rows.formats import normalise
from ygivenx.templating import sandbox
from ygivenx.templating.inputs import Inputs, inputs_of
from ygivenx.templating.origins import OriginsLost, Text, join_texts
from ygivenx.templating.template import Template
from ygivenx.templating.tracing import marked

SHELF = stock_templates()
STOCK = [n for n in SHELF if not n.endswith("_training")]


def rendered(source: str, *messages: dict, **kwargs) -> str:
    return Template(source).render(Inputs(tuple(messages), kwargs=kwargs))


def owners(source: str, *messages: dict, tools=None, **kwargs) -> list[tuple[str, str]]:
    """(text, path) of each run of the traced rendering."""
    inputs = Inputs(tuple(messages), tools, kwargs=kwargs)
    template = Template(source)
    traced = template.trace(marked(inputs), template.render(inputs))
    assert traced is not None
    runs, at = [], 0
    for stop, s in traced.text.runs:
        runs.append((str.__str__(traced.text)[at:stop], traced.sources[s].path))
        at = stop
    return runs


@pytest.mark.skipif(not STOCK, reason="TRL is not installed")
@pytest.mark.parametrize("name", STOCK)
def test_the_same_text_and_the_same_refusals_as_transformers(name):
    tokenizer = tokenizer_for(name, SHELF[name])
    template = Template(SHELF[name], tokenizer.special_tokens_map)
    declined = 0
    for row in ALL.values():
        messages = [{k: v for k, v in m.items() if k != "weight"} for m in normalise(row).messages]
        inputs = inputs_of(messages, row.get("tools"), row.get("documents"), {}, datetime.now())
        for prompt in (False, True):
            try:
                expected = tokenizer.apply_chat_template(
                    messages, tokenize=False, tools=row.get("tools"), documents=row.get("documents"),
                    add_generation_prompt=prompt,
                )  # fmt: skip
            except Exception:
                with pytest.raises(RowError):
                    template.render(inputs, add_generation_prompt=prompt)
                continue
            assert template.render(inputs, add_generation_prompt=prompt) == expected
            traced = template.trace(marked(inputs), expected, add_generation_prompt=prompt)
            declined += traced is None
            assert traced is None or str.__str__(traced.text) == expected
    assert declined <= 2


@pytest.mark.parametrize(
    ("source", "runs"),
    [
        ("[{{ messages[0].content }}]", [("[", "template"), ("ab cd", "c"), ("]", "template")]),
        ("{{ '<' + messages[0]['content'] + '>' }}", [("<", "template"), ("ab cd", "c"), (">", "template")]),
        ("{{ '<' ~ messages[0].content ~ 1 }}", [("<", "template"), ("ab cd", "c"), ("1", "template")]),
        ("{{ messages[0].content.split(' ')[1] }}", [("cd", "c")]),
        ("{{ messages[0].content[1:4] }}", [("b c", "c")]),
        ("{{ messages[0].content | upper | trim }}", [("AB CD", "c")]),
        ("{{ messages[0].content | replace(' ', '_') }}", [("ab", "c"), ("_", "template"), ("cd", "c")]),
        ("{{ '-'.join(messages[0].content.split()) }}", [("ab", "c"), ("-", "template"), ("cd", "c")]),
        ("{{ messages[0].content.split() | join('+') }}", [("ab", "c"), ("+", "template"), ("cd", "c")]),
        ("{{ '%s!' % messages[0].content }}", [("ab cd", "c"), ("!", "template")]),
        ("{{ '%s%s' % ('x', messages[0].content) }}", [("x", "template"), ("ab cd", "c")]),
        ("{{ messages[0].content | tojson }}", [('"', "template"), ("ab cd", "c"), ('"', "template")]),
        ("{{ '{}:{}!'.format('x', messages[0].content) }}", [("x:", "template"), ("ab cd", "c"), ("!", "template")]),
        ("{{ '{}{a}'.format('x', a='y') ~ messages[0].content }}", [("xy", "template"), ("ab cd", "c")]),
        ("{% set x %}<{{ messages[0].content }}{% endset %}{{ x }}", [("<", "template"), ("ab cd", "c")]),
        ("{% macro f(x) %}({{ x }}{% endmacro %}{{ f(messages[0].content) }}", [("(", "template"), ("ab cd", "c")]),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", [("ab cd", "c")]),
        ("{{ messages[0].content | title }}", [("Ab Cd", "c")]),
        ("{% for c in messages[0].content %}{{ c }}{% endfor %}", [("ab cd", "c")]),
        ("{{ messages[0].content | indent(2, true) }}", [("  ", "template"), ("ab cd", "c")]),
    ],
)  # fmt: skip
def test_origins_survive(source, runs):
    expected = [(text, "messages[0].content" if path == "c" else path) for text, path in runs]
    assert owners(source, {"role": "user", "content": "ab cd"}) == expected


def test_json_of_arguments():
    message = calls(call(arguments={"k": ["v", 5]}))
    runs = owners("{{ messages[0].tool_calls[0].function.arguments | tojson }}", message)
    path = "messages[0].tool_calls[0].function.arguments"
    assert ("k", f"{path}.k (key)") in runs
    assert ("v", f"{path}.k[0]") in runs
    assert "".join(t for t, _ in runs) == '{"k": ["v", 5]}'


def test_tools_have_one_source():
    assert owners("{{ tools | tojson }}", user(), tools=[{"a": "b"}]) == [
        ("[", "template"),
        ('{"a": "b"}', "tools"),
        ("]", "template"),
    ]


def test_what_cannot_be_followed_is_declined():
    inputs = Inputs(({"role": "a", "content": "b c"},))
    template = Template("{{ (messages[0].role ~ messages[0].content) | wordwrap(1) | urlencode }}")
    assert template.trace(marked(inputs), template.render(inputs)) is None
    for source in ("{{ '{0}!'.format(messages[0].role) }}", "{{ messages[0].content.format(1) }}"):
        template = Template(source)
        assert template.trace(marked(inputs), template.render(inputs)) is None
    with pytest.raises(OriginsLost):
        Text.of("a", 1) % ()
    mixed = join_texts([Text.of("a", 1), Text.of("ß", 2)])
    with pytest.raises(OriginsLost):
        mixed.upper()
    assert mixed[1].runs == ((1, 2),)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for a in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for a in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{{ 'x' * 10**9 }}",
        "{{ 9 ** (9 ** (9 ** 9)) }}",
        "{% macro f(x) %}{{ f(x + x) }}{% endmacro %}{{ f('ab') }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_that_takes_too_much(source):
    with pytest.raises(RowError) as e:
        rendered(source, user())
    assert e.value.reason == "template_budget"


def test_the_time_of_others_on_the_machine_is_not_a_rows(monkeypatch):
    """A process that was stopped for a while has taken no time of the processor's."""

    class Waits:
        def __str__(self) -> str:
            sleep(0.3)
            return "late"

    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.2)
    inputs = Inputs((user("hi"),), kwargs={"x": Waits()})
    assert Template("{% for i in range(99) %}{{ x if i % 33 == 0 }}{% endfor %}").render(inputs) == "late" * 3


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__mro__[1] }}",
        "{{ messages.append(1) }}",
        "{% set n = namespace(_x=1) %}",
    ],
)
def test_the_sandbox_holds(source):
    with pytest.raises(RowError) as e:
        rendered(source, user())
    assert e.value.reason == "template_error"


def test_what_the_template_says_is_passed_on():
    with pytest.raises(RowError, match="roles must alternate"):
        rendered("{{ raise_exception('roles must alternate') }}", user())


def test_not_jinja():
    with pytest.raises(RowError) as e:
        Template("{% for %}")
    assert e.value.reason == "template_syntax"


def test_nulls_and_weights_are_not_shown_and_reasoning_has_every_name():
    (message,) = inputs_of(
        [reply(None, weight=0.5, reasoning="r", name=None)], None, None, {}, datetime.now()
    ).messages
    assert message == {"role": "assistant", "reasoning": "r", "thinking": "r", "reasoning_content": "r"}


def test_undeclared_switches():
    assert "enable_thinking" in Template("{% if enable_thinking %}x{% endif %}{{ messages }}").undeclared
