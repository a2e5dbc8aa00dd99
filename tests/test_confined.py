"""What a chat template may do in our process, and the process with limits that does the rest."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import pytest
from templates.conversations import ALL, user
from templates.stock import stock_templates

from ygivenx import RowError
from ygivenx.rows.formats import normalise
from ygivenx.templating import confined
from ygivenx.templating.inputs import Inputs, inputs_of
from ygivenx.templating.sandbox import MAX_CALLS, MAX_NODES, MAX_SOURCE, ONE, VALUE
from ygivenx.templating.template import MAX_CHARACTERS, SMALL, Template
from ygivenx.templating.tracing import marked

SHELF = stock_templates()
GROW = "{%% set ns = namespace(x='ab') %%}{%% for i in range(99) %%}{%% set ns.x = %s %%}{%% endfor %%}"


def word() -> Inputs:
    return Inputs(({"role": "user", "content": "ab cd"},))


def rendered(source: str, inputs: Inputs | None = None) -> tuple[str, bool]:
    """(the text, whether it was rendered in the other process)"""
    template = Template(source)
    text = template.render(inputs or word())
    return text, template.is_outside


def refused(source: str, inputs: Inputs | None = None) -> str:
    with pytest.raises(RowError) as e:
        Template(source).render(inputs or word())
    return e.value.reason


@pytest.mark.skipif(not SHELF, reason="TRL is not installed")
def test_both_processes_render_and_trace_alike_and_templates_of_models_stay_in_ours():
    now, count = datetime(2025, 1, 1), 0
    for source in SHELF.values():
        template = Template(source, {"bos_token": "<s>", "eos_token": "</s>"})
        for row in list(ALL.values())[::9]:
            inputs = inputs_of(normalise(row).messages, row.get("tools"), row.get("documents"), {}, now)
            try:
                text = template.render(inputs)
            except RowError:
                continue
            assert confined.render(source, template.variables, inputs, False, False) == text
            if traced := template.trace(marked(inputs), text):
                other = confined.render(source, template.variables, marked(inputs).inputs, False, True)
                assert (str.__str__(other), other.runs) == (text, traced.text.runs)
            count += 1
        assert not template.is_outside
    assert count > 100


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ 'ab'.center(6) }}", "  ab  "),
        ("{{ 'ab'['cen' ~ 'ter'](6) }}", "  ab  "),
        ("{{ 'ab' | center(6) }}", "  ab  "),
        ("{{ ['ab'] | map('center', 6) | join }}", "  ab  "),
        ("{{ '%s!' % messages[0].content }}", "ab cd!"),
        ("{{ '%d' | format(3) }}", "3"),
        ("{{ 2 ** 70 }}", str(2**70)),
        ("{{ [1] * 3 }}", "[1, 1, 1]"),
        ("{{ 'ab'.encode() | length }}", "2"),
        ("{{ (5).bit_length() }}", "3"),
        ("{{ '{:>4}'.format(1) }}", "   1"),
        ("{{ [1, '2'] | tojson(indent=20) }}", f'[\n{" " * 20}1,\n{" " * 20}"2"\n]'),
        ("{{ strftime_now('%Y' * 501) | length }}", "2004"),
        ("{{ 2.5 | round(1) }}", "2.5"),
        ("{% for x in [1] recursive %}{{ x }}{% endfor %}", "1"),
        ("{% macro f() %}{{ varargs }}{% endmacro %}{{ f(1, 2) }}", "(1, 2)"),
        ("{{ namespace(a=1) }}", "<Namespace {'a': 1}>"),
        ("{% with a = 1 %}{{ a }}{% endwith %}", "1"),
        ("{{ 'x' }}" * MAX_NODES, "x" * MAX_NODES),
        ("{{ 'x' | trim }}" * (MAX_CALLS + 1), "x" * (MAX_CALLS + 1)),
        ("x" * (MAX_SOURCE + 1), "x" * (MAX_SOURCE + 1)),
        ("{{ '' " + "~ 'a'" * 9 + "+ 'a'" * 90 + " }}", "a" * 99),
        (f"{{% set x = 'a' * {VALUE} + 'b' * 9999 %}}{{{{ x | length }}}}", str(VALUE + 9999)),
        ("{{ 'a,b'.replace(',', 'x' * 100000).replace('x', 'y' * 50) | length }}", "5000002"),
        ("{{ ['a' * 100000] * 1 | join }}", None),
    ],
)  # fmt: skip
def test_what_may_take_any_amount_is_done_in_the_other_process(source, text):
    if text is None:
        assert refused(source) == "template_error"
    else:
        assert rendered(source) == (text, True)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content.strip().split(' ')[0].upper() | trim ~ [1, {'a': 'b'}] | tojson }}",
        "{{ '<tool{}>'.format(':x') ~ 'a-b'.replace('-', '+') ~ ', '.join(['a', 'b']) }}",
        "{% set ns = namespace(l=[]) %}{% for i in range(50) %}{% set ns.l = ns.l + [i ~ 'x'] %}{% endfor %}"
        "{{ ns.l | join }}",
        "{{ '    ' * 3 ~ 7 % 2 ~ 2 ** 3 }}",
        "{% macro f(n) %}{% if n %}{{ n }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(20) }}",
        "{% set x %}{% for m in messages %}{{ m.content }}{% endfor %}{% endset %}{{ x }}",
    ],
)
def test_what_templates_of_models_do_is_done_in_ours(source):
    text, is_outside = rendered(source)
    assert not is_outside
    assert text == confined.render(source, {}, word(), False, False)


@pytest.mark.parametrize(
    "more", ["ns.x + ns.x", "ns.x ~ ns.x", "[ns.x, ns.x] | join", "'{}{}'.format(ns.x, ns.x)"]
)
def test_texts_that_grow_end_in_the_other_process(more):
    assert refused(GROW % more) == "template_budget"


def test_a_limit_ends_the_process_and_the_next_request_starts_another():
    for source in ("{{ ('x' * 10**9) | length }}", "{{ 7 ** (10 ** 12) > 1 }}"):
        start = time.monotonic()
        assert refused(source) == "template_budget"
        assert time.monotonic() - start < 20  # 1.5 of the processor's
        assert rendered("{{ 'ab'.center(6) }}") == ("  ab  ", True)


@pytest.mark.parametrize("source", ["{{ cycler.__init__.x }}", "{{ ''.center.__self__.__class__.__mro__ }}"])
def test_the_sandbox_holds_in_the_other_process(source):
    assert refused("{{ 'ab'.center(6) }}" + source) == "template_error"


def test_the_other_process_writes_no_files(tmp_path):
    code = f"import ygivenx.templating.confined as c; c._limit(); open({str(tmp_path / 'a')!r}, 'w').write('x' * 9999)"
    os.environ["PYTHONPATH"], before = os.pathsep.join(sys.path), os.environ.get("PYTHONPATH", "")
    try:
        os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code])
    finally:
        os.environ["PYTHONPATH"] = before
    assert Path(tmp_path / "a").stat().st_size == 0


def test_threads_share_the_other_process():
    def one(n: int) -> str:
        return confined.render(
            "{{ messages[0].content.center(9) }}", {}, Inputs((user(str(n)),)), False, False
        )

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, range(40))) == [str(n).center(9) for n in range(40)]


def test_a_fork_has_a_process_of_its_own():
    assert rendered("{{ 'ab'.center(6) }}") == ("  ab  ", True)
    ours = confined._process.child
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(rendered, ("{{ 'ab'.center(8) }}",)) == ("   ab   ", True)
    assert confined._process.child is ours
    assert rendered("{{ 'ab'.center(6) }}") == ("  ab  ", True)


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def test_a_row_has_one_time_for_all_its_renderings():
    inputs = Inputs(({"role": "user", "content": "x" * SMALL},))
    template = Template("{% if add_generation_prompt %}" + LOOPS + "{% endif %}")
    with pytest.raises(RowError):
        template.render(inputs, add_generation_prompt=True)
    with pytest.raises(RowError) as e:  # the same row has no time left for long loops, another has
        template.render(inputs.upto(1), add_generation_prompt=True)
    assert e.value.reason == "template_budget"
    assert template.render(Inputs(inputs.messages)) == ""


def test_a_template_that_takes_too_much_for_a_short_row_is_refused_from_then_on():
    template = Template("{% if add_generation_prompt %}" + LOOPS + "{% endif %}")
    assert template.render(word()) == ""
    for prompt in (True, False):
        with pytest.raises(RowError) as e:
            template.render(word(), add_generation_prompt=prompt)
        assert e.value.reason == "template_budget"


def test_a_text_far_longer_than_its_row_is_refused():
    assert refused("{% for i in range(9) %}{{ 'x' * 131072 }}{% endfor %}") == "template_budget"
    long = Inputs(({"role": "user", "content": "x" * (MAX_CHARACTERS // 4)},))
    text, is_outside = rendered("{% for i in range(9) %}{{ messages[0].content }}{% endfor %}", long)
    assert (len(text), is_outside) == (9 * MAX_CHARACTERS // 4, False)
    assert MAX_CHARACTERS < ONE


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "template_syntax"),
        ("{% for a in 'a' %}" * 30 + "{% endfor %}" * 30, "template_syntax"),
        ("{{ dict(a=1, a=2) }}", "template_syntax"),
        ("{% macro f(a, a) %}{% endmacro %}", "template_syntax"),
        ("{{ '\ud800' }}", "template_error"),
        ("{{ '\\ud800' }}", "template_error"),
        ("{{ raise_exception('x' * 100000) }}", "template_error"),
    ],
)
def test_what_python_cannot_compile_or_print(source, reason):
    with pytest.raises(RowError) as e:
        Template(source).render(word())
    assert e.value.reason == reason
    assert len(str(e.value).encode()) < 2000


def test_values_that_are_no_json_are_refused_by_name():
    inputs = Inputs(({"role": "user", "content": "x", "when": datetime(2025, 1, 1)},))
    with pytest.raises(RowError, match="a value of type datetime"):
        Template("{{ 'ab'.center(6) }}").render(inputs)
