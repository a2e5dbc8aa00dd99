"""Hostile chat templates through the whole encoder: each has to end within 5 s and 512 MB, in an error of ours.

Each template meets one short conversation in a process of its own, whose clock and memory are read from outside.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from ygivenx.templating import confined

SECONDS, MEGABYTES = 5.0, 512
BIG = "10**9"


def hostile() -> dict[str, str]:
    """Chat templates by name."""
    return {**_written(), **_padded(), **_filtered(), **_shared(), **_sources(), **_escaping()}


def _written() -> dict[str, str]:
    grow = "{%% set ns = namespace(x=%s) %%}{%% for i in range(99) %%}{%% set ns.x = %s %%}{%% endfor %%}"
    twice = "".join(
        f"{{% macro m{i + 1}() %}}{{{{ m{i}() }}}}{{{{ m{i}() }}}}{{% endmacro %}}" for i in range(60)
    )
    loops = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return {
        "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "loops that write": "{% for a in range(99999) %}{% for b in range(999) %}x{% endfor %}{% endfor %}",
        "loops in a macro": "{% macro f() %}{% for a in range(99999) %}{{ 'x' ~ a }}{% endfor %}{% endmacro %}"
        "{% for i in range(999) %}{% set y = f() %}{% endfor %}",
        "loops in a block": "{% set y %}{% for a in range(99999) %}{% for b in range(99) %}{{ a ~ b }}{% endfor %}{% endfor %}"
        "{% endset %}",
        "a macro calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "a macro calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "macros call macros twice": "{% macro m0() %}{% endmacro %}" + twice + "{{ m60() }}",
        "macros in a condition": "{% macro f(n) %}{% if n and f(n - 1) == f(n - 1) %}{% endif %}{% endmacro %}{{ f(60) }}",
        "a macro as an argument": "{% macro f(g, n) %}{% if n %}{{ g(g, n - 1) }}{{ g(g, n - 1) }}{% endif %}{% endmacro %}"
        "{{ f(f, 60) }}",
        "a macro in a namespace": "{% set ns = namespace() %}{% macro f(n) %}{% if n %}{{ ns.f(n - 1) }}{{ ns.f(n - 1) }}{% endif %}"
        "{% endmacro %}{% set ns.f = f %}{{ f(60) }}",
        "a call block": "{% macro f(n) %}{% if n %}{% call f(n - 1) %}{{ caller() }}{% endcall %}{{ caller() }}{{ caller() }}{% endif %}"
        "{% endmacro %}{% call f(60) %}x{% endcall %}",
        "a default calls": "{% macro f(n, a=0) %}{% if n %}{{ f(n - 1, f(n - 1)) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "generation inside": "{% macro f(n) %}{% generation %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endgeneration %}"
        "{% endmacro %}{{ f(60) }}",
        "a recursive loop": "{% for x in [[1], [2]] recursive %}{{ loop([[1], [2]]) }}{% endfor %}",
        "a recursive loop over text": "{% for x in 'ab' recursive %}{{ loop('ab') if loop.depth < 40 }}{% endfor %}",
        "the power of a power": "{{ 10**64**64**64**64 }}",
        "powers in steps": "{% set a = 10**64 %}{% set b = a**64 %}{% set c = b**64 %}{% set d = c**64 %}{{ d > 1 }}",
        "products of numbers": grow % ("10**60", "ns.x * ns.x") + "{{ ns.x > 1 }}",
        "a power without end": "{{ (2**64)**(2**64) > 1 }}",
        "a float's power": "{{ 9.9**9999 }}",
        "a remainder of powers": "{{ 7**(10**60) % 3 }}",
        "a number printed": "{% set a = 10**64 %}{% set b = a**60 %}{{ b**60 }}",
        "sums of a range": "{{ range(100000) | sum }}{{ range(100000) | map('string') | sum(start='') }}",
        "sums of lists": "{{ [messages] | sum(start=[]) }}{{ ([[1]] * 100000) | sum(start=[]) | length }}",
        "many ranges": "{% set a = range(99999) | list %}" * 400,
        "many lists": "".join(f"{{% set a{i} = range(99999) | map('string') | list %}}" for i in range(200)),
        "many texts": "{% set x = 'abcdefgh' * 15000 %}" + "".join(f"{{% set a{i} = x ~ {i} %}}" for i in range(900)),
        "many cases": "{% set x = 'é' * 120000 %}" + "".join(f"{{% set a{i} = x.upper() %}}" for i in range(400)),
        "many splits": "{% set x = 'a ' * 60000 %}" + "{% if x.split() %}{% endif %}" * 2000,
        "many splits kept": "{% set x = 'a ' * 60000 %}" + "".join(f"{{% set a{i} = x.split() %}}" for i in range(400)),
        "splits in a loop": "{% set x = 'a ' * 60000 %}{% for i in range(99999) %}{% set y = x.split() %}{% endfor %}",
        "lists of splits": grow % ("['a ' * 60000]", "ns.x + [ns.x[0].split()]"),
        "a text doubled by +": grow % ("'ab'", "ns.x + ns.x"),
        "a text doubled by ~": grow % ("'ab'", "ns.x ~ ns.x"),
        "a text doubled by *": grow % ("'ab'", "ns.x * 2"),
        "a text doubled by join": grow % ("'ab'", "[ns.x, ns.x] | join"),
        "a text doubled by a method": grow % ("'ab'", "''.join([ns.x, ns.x])"),
        "a text doubled by replace": grow % ("'ab'", "ns.x | replace('a', ns.x)"),
        "a text doubled by format": grow % ("'ab'", "'{}{}'.format(ns.x, ns.x)"),
        "a text doubled by %": grow % ("'ab'", "'%s%s' % (ns.x, ns.x)"),
        "a text doubled by JSON": grow % ("'\"'", "ns.x | tojson | tojson"),
        "a text doubled by quotes": grow % ("'\\\\'", "[ns.x] | string"),
        "a text doubled by escape": grow % ("'<'", "(ns.x | escape) ~ (ns.x | e)"),
        "a list doubled": grow % ("[1]", "ns.x + ns.x"),
        "a list doubled by *": grow % ("[1]", "ns.x * 2"),
        "a tuple doubled": grow % ("(1,)", "ns.x + ns.x"),
        "texts in a list": grow % ("[]", "ns.x + [messages[0].content ~ 'x' * 99999]") + loops,
        "a list within": "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = [ns.x, i] %}{% endfor %}{{ ns.x }}",
        "summands of one sum": "{% set x = 'a' * 99999 %}{{ " + " + ".join(["x"] * 3000) + " }}",
        "summands in brackets": "{% set x = 'a' * 99999 %}" + "{% set x = (x + x + x + x + x + x + x + x) %}" * 40,
        "a set block doubled": "{% set x = 'ab' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60,
        "a filter block": "{% filter upper %}{% for a in range(99999) %}{% for b in range(999) %}x{% endfor %}{% endfor %}{% endfilter %}",
        "with blocks": "{% with a = 'x' * 99999 %}" * 30 + "{{ a * 99999 }}" + "{% endwith %}" * 30,
        "the content again and again": "{% for i in range(99999) %}{{ messages[0].content * 999 }}{% endfor %}",
        "every prompt longer": "{{ 'x' * 900000 }}" + loops,
        "a generator": "{{ range(99999) | map('upper') | map('lower') | map('string') | list | length }}" * 300,
        "slices": "{% set x = range(99999) | list %}" + "{% set y = x[::-1] + x[1:] %}" * 900,
        "slices in a loop": "{% set x = 'ab' * 60000 %}{% for i in range(99999) %}{% set y = x[i:] ~ i %}{% endfor %}",
        "loop.changed": "{% for i in range(99999) %}{{ loop.changed(range(99999) | list) }}{% endfor %}",
        "cyclers": "{% set c = cycler('x' * 99999, 'y') %}{% for i in range(99999) %}{{ c.next() }}{% endfor %}",
        "joiners": "{% set j = joiner('x' * 99999) %}{% for i in range(99999) %}{{ j() }}{% endfor %}",
        "lipsum": "{{ lipsum(n=100000, min=1000, max=100000) }}",
        "the time": "{{ strftime_now('%c' * 60000) }}",
        "the time, wide": "{{ strftime_now('%900000000d') }}",
        "a wait for the other": "{% for m in messages %}{% for n in messages %}{{ m.content * 10**8 }}{% endfor %}{% endfor %}",
        "an error of megabytes": "{{ raise_exception('x' * 100000) }}",
        "errors without end": "{% for i in range(99999) %}{% for j in range(99999) %}{{ [][0] }}{% endfor %}{% endfor %}",
        "only in the prompt": "{% if add_generation_prompt %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
        "{% endif %}" + loops,
        "only with a reply": "{% if messages[-1].role == 'assistant' %}{{ 'x' * 10**9 }}{% endif %}" + loops,
        "only for a word": "{% if 'word' in messages[0].content %}{{ 'x'.center(10**9) }}{% endif %}" + loops,
        "nearly the whole time": "{% for a in range(900) %}{% for b in range(1000) %}{% endfor %}{% endfor %}" + loops,
    }  # fmt: skip


def _padded() -> dict[str, str]:
    calls = {
        "center": f"center({BIG})", "ljust": f"ljust({BIG})", "rjust": f"rjust({BIG})", "zfill": f"zfill({BIG})",
        "expandtabs": f"expandtabs({BIG})", "translate": "translate({97: 'x' * 10**8})",
        "encode": "encode('utf-16').hex() * 10**8", "join": "join(range(99999) | map('string'))[0] * 10**9",
        "replace": f"replace('', 'x' * {BIG})", "format": "format() * 10**9", "format_map": "format_map({}) * 10**9",
        "maketrans": "maketrans({'a': 'b'}) | string * 10**9",
    }  # fmt: skip
    found = {f"a.{name}": "{{ 'a\t'.%s }}" % call for name, call in calls.items()}
    for name in ("center", "ljust", "zfill"):
        found[f"a['{name}']"] = f"{{{{ 'a'['{name[:2]}' ~ '{name[2:]}']({BIG}) }}}}"
        found[f"a|attr('{name}')"] = f"{{{{ ('a'|attr('{name}'))({BIG}) }}}}"
        found[f"{name} of the content"] = (
            f"{{% for m in messages %}}{{{{ m.content.{name}({BIG}) }}}}{{% endfor %}}"
        )
    for field in (
        "{:1000000000}",
        "{:>1000000000}",
        "{0:{1}}",
        "{:.999999999f}",
        "{:1000000000d}",
        "{0.real}",
        "{:,}",
    ):
        found[f"format {field}"] = "{{ '%s'.format(1, 1000000000) * 10**6 }}" % field
    for pattern in ("%1000000000d", "%-1000000000s", "%.999999999f", "%*d"):
        found[f"percent {pattern}"] = "{{ '%s' %% (1000000000, 1)[:%d] }}" % (
            pattern,
            2 if "*" in pattern else 1,
        )
        found[f"percent filter {pattern}"] = "{{ '%s' | format(1000000000, 1) }}" % pattern
    found["fields again"] = "{% set x = 'x' * 99999 %}{{ ('{0}' * 30000).format(x) | length }}"
    found["a number's bytes"] = "{{ (1).to_bytes(10**9, 'big') }}"
    found["Markup"] = "{{ ('a' | safe).center(10**9) }}"
    found["Markup * n"] = "{{ ('a' | safe) * 10**9 }}"
    return found


def _filtered() -> dict[str, str]:
    filters = {
        "center": f"center({BIG})", "indent": f"indent({BIG})", "indent a text": "indent('x' * 99999)",
        "wordwrap": "wordwrap(1, wrapstring='x' * 10**8)", "replace": "replace('a', 'x' * 99999) | replace('x', 'y' * 99999)",
        "tojson": f"tojson(indent={BIG})", "tojson a text": "tojson(indent='x' * 10**8)",
        "tojson separators": "tojson(separators=('x' * 10**8, ':'))", "round": f"length | round({BIG})",
        "batch": f"batch({BIG}, 'x') | list", "slice": f"slice({BIG}) | list", "format": f"format({BIG})",
        "truncate": f"truncate({BIG}, end='x' * 10**9)", "urlize": "urlize", "pprint": "pprint", "striptags": "striptags",
        "wordcount": "wordcount", "urlencode": "urlencode", "xmlattr": "list | map('upper') | groupby(0) | list",
        "map": f"list | map('center', {BIG}) | list", "map format": "list | map('format', 1) | list", "sum": "list | sum(start='')",
        "random": "random * 10**9", "filesizeformat": "length | filesizeformat * 10**9", "unique": "list | unique | list",
        "sort": "list | sort | list", "groupby": "list | groupby('x') | list", "dictsort": "dictsort",
        "join": "join('x' * 99999)", "list": "list | list | string | list | string | list | string | list | string",
        "select": "select('divisibleby', 2) | list", "escape": "escape | escape | escape | escape | escape",
    }  # fmt: skip
    text = "('<a> ' * 30000)"
    found = {f"x|{name}": "{{ " + text + " | " + call + " }}" for name, call in filters.items()}
    found["odd"] = "{{ '%1000000000d' is odd }}"
    found["a test by name"] = "{{ ['%1000000000d'] | select('odd') | list }}"
    found["tests again"] = (
        "{% for i in range(99999) %}{{ range(99999) | select('odd') | list | length }}{% endfor %}"
    )
    return found


def _shared() -> dict[str, str]:
    lists = "{% set x = ['ab'] %}" + "{% set x = [x, x] %}" * 60
    dicts = "{% set x = {'a': 1} %}" + "{% set x = {'a': x, 'b': x} %}" * 60
    tuples = "{% set x = (1,) %}" + "{% set x = (x, x) %}" * 60
    others = "{% set y = ['ab'] %}" + "{% set y = [y, y] %}" * 60
    ns = "{% set ns = namespace(x=['a']) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
    return {
        "shared lists printed": lists + "{{ x }}",
        "shared lists joined": lists + "{{ x ~ 'a' }}",
        "shared lists as text": lists + "{{ x | string }}",
        "shared lists as JSON": lists + "{{ x | tojson }}",
        "shared lists compared": lists + others + "{{ x == y }}",
        "shared lists searched": lists + others + "{{ [x] in [y] }}",
        "shared lists sorted": lists + others + "{{ [x, y] | sort }}",
        "shared lists unique": lists + others + "{{ [x, y] | unique | list }}",
        "shared dicts printed": dicts + "{{ x }}",
        "shared dicts as JSON": dicts + "{{ x | tojson(indent=2) }}",
        "shared tuples as keys": tuples + "{{ {x: 1} }}",
        "shared tuples tested": tuples + "{{ x in {} }}",
        "shared in a namespace": ns + "{{ ns.x }}",
        "shared by namespace()": "{% set x = namespace(a=1) %}" + "{% set x = namespace(a=x, b=x) %}" * 60 + "{{ x }}",
        "namespaces in namespaces": "{% set x = namespace() %}{% for i in range(60) %}{% set y = namespace() %}"
        "{% set y.a = x.b %}{% set y.b = x.b %}{% set x.b = y %}{% endfor %}{{ x.b }}",
        "a namespace in itself": "{% set x = namespace() %}{% set x.x = x %}{{ x }}{{ [x] | tojson }}",
        "shared by keywords": "{% macro f(n) %}{% if n %}{{ f(n - 1, a=kwargs, b=kwargs) }}{% else %}{{ kwargs }}{% endif %}"
        "{% endmacro %}{{ f(60, a=1) }}",
        "shared by dict()": "{% set x = dict(a=1) %}" + "{% set x = dict(a=x, b=x) %}" * 60 + "{{ x }}",
        "shared in an argument": "{% macro f(x, n) %}{% if n %}{{ f([x, x], n - 1) }}{% else %}{{ x }}{% endif %}{% endmacro %}{{ f(1, 60) }}",
        "shared through a macro's varargs": "{% macro f(n) %}{% if n %}{{ f(n - 1, varargs, varargs) }}{% else %}{{ varargs }}{% endif %}"
        "{% endmacro %}{{ f(60, 1) }}",
        "messages in themselves": "{% set x = messages %}" + "{% set x = [x, x, x, x] %}" * 30 + "{{ x | tojson }}",
    }  # fmt: skip


def _sources() -> dict[str, str]:
    deep = 400
    return {
        "brackets, deep": "{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}",
        "lists, deep": "{{ " + "[" * 9000 + "]" * 9000 + " }}",
        "not not not": "{{ " + "not " * 9000 + "1 }}",
        "minus minus minus": "{{ " + "-" * 9000 + "1 }}",
        "ifs, deep": "{% if 1 %}" * deep + "x" + "{% endif %}" * deep,
        "loops, deep": "{% for a in 'a' %}" * 60 + "x" + "{% endfor %}" * 60,
        "macros, deep": "{% macro f() %}" * 60 + "x" + "{% endmacro %}" * 60,
        "sets, deep": "{% set a %}" * deep + "x" + "{% endset %}" * deep,
        "conditions, deep": "{{ " + "1 if x else " * 5000 + "2 }}",
        "filters, many": "{{ 'x'" + " | upper" * 9000 + " }}",
        "attributes, many": "{{ x" + ".a" * 9000 + " }}",
        "calls, many": "{{ x" + "()" * 9000 + " }}",
        "comparisons, many": "{{ 1" + " < 2" * 9000 + " }}",
        "sums of constants": "{{ 1" + " + 1" * 9000 + " }}",
        "texts of constants": "{{ 'a'" + " ~ 'a'" * 9000 + " }}",
        "outputs, many": "{{ x }}" * 9000,
        "a long source": "{{ messages }}" + "x" * (2 << 20),
        "a long source of code": "{% set a = 'b' ~ 'c' %}" * 20_000,
        "an opened comment": "{#" * 30_000,
        "an opened block": "{% if " * 20_000,
        "white space": ("{%- if x -%}" + " " * 2000 + "{%- endif -%}" + "\n" * 2000) * 12,
        "white space alone": " \n" * 30_000 + "{% x",
        "quotes": "{{ " + "'" * 60_001 + " }}",
        "backslashes": "{{ '" + "\\" * 60_000 + " }}",
        "a long number": "{{ " + "9" * 60_000 + " }}",
        "a long name": "{{ " + "a" * 60_000 + " }}",
        "arguments, many": "{% macro f(" + ", ".join(f"a{i}" for i in range(4000)) + ") %}{% endmacro %}{{ f() }}",
        "an argument twice": "{% macro f(a, a) %}{% endmacro %}{{ f() }}",
        "a keyword twice": "{{ dict(a=1, a=2) }}",
        "Python's names": "{{ print }}{{ None.x }}{% set def = 1 %}{{ def }}{% set class = 1 %}{{ lambda }}",
        "odd names": "{% set ª = 1 %}{{ ª }}{{ µ.x }}",
        "NUL": "{{ 'a\0b' }}\0{{ messages }}",
        "a lone surrogate": "{{ '\ud800' }}",
        "a lone surrogate outside": "\udfff{{ messages }}",
        "a surrogate by escape": "{{ '\\ud800' }}{% for m in messages %}{{ m.content }}{% endfor %}",
        "break without a loop": "{% break %}",
        "a block": "{% block a %}{% endblock %}" * 99,
        "an import": "{% import 'a' as a %}{% include 'b' %}{% extends 'c' %}",
        "a block within itself": "{% block a %}{{ self.a() }}{% endblock %}",
        "nothing": "",
    }  # fmt: skip


def _escaping() -> dict[str, str]:
    words = {
        "class": "''.__class__.__mro__[1].__subclasses__()", "globals": "lipsum.__globals__['os'].system('id')",
        "init": "cycler.__init__.__globals__.os", "builtins": "joiner.__init__.__globals__.__builtins__.open('/etc/passwd')",
        "format": "'{0.__class__.__mro__}'.format(1)", "format_map": "'{a.__class__}'.format_map({'a': 1})",
        "attr": "''|attr('__class__')", "item": "''['__class__']", "namespace": "namespace(_x=1)._x",
        "namespace by dict": "namespace({'__class__': 1})", "dict": "dict.__class__", "mutates": "messages.append(1)",
        "pops": "messages[0].pop('content')", "clears": "messages.clear()", "updates": "messages[0].update(a=1)",
        "self": "self.__init__.__globals__", "macro": "caller.__globals__", "generator": "(range(3)|map('string')).gi_frame.f_globals",
        "coroutine": "messages.__iter__.__self__", "strftime": "strftime_now.__globals__", "raise": "raise_exception.__code__",
        "from_json": "'x'|from_json", "state": "self['the state of this rendering']", "environment": "self._TemplateReference__context.environment",
        "loop": "[1]|map(attribute='__class__')|list", "undefined": "nothing.__class__.__init__", "context": "context.parent",
        "format spec": "'{:{0.__class__}}'.format('x')", "method": "''.join.__self__.__class__",
    }  # fmt: skip
    return {f"escape by {name}": "{{ " + text + " }}" for name, text in words.items()}


ROW = {"messages": [{"role": "user", "content": "a word"}, {"role": "assistant", "content": "yes"}]}


def outcome(tokenizer: Any, template: str) -> str:
    """What the encoder says: `accepted`, a reason, or the name of an error that isn't ours."""
    from ygivenx import Encoder
    from ygivenx.errors import YgivenxError

    tokenizer.chat_template = template
    try:
        Encoder(tokenizer)(ROW)
        return "accepted"
    except YgivenxError as error:
        str(error).encode()
        return str(getattr(error, "reason", type(error).__name__))
    except BaseException as error:
        return f"! {type(error).__name__}"


def attacked(tokenizer: Any, template: str) -> tuple[str, float, int]:
    """(outcome, seconds of the processor, MB of growth) of a fork of this process and those that it starts."""
    reading, writing = os.pipe()
    start = time.monotonic()
    child = os.fork()
    if not child:
        os.close(reading)
        os.write(writing, outcome(tokenizer, template).encode())
        if confined._process.child is not None:
            confined._process.child.communicate()  # so that its time is counted
        os._exit(0)
    os.close(writing)
    before, most = _memory(child), 0
    while (ended := os.wait4(child, os.WNOHANG))[0] == 0:
        most = max(most, _memory(child) - before + sum(map(_memory, _children(child))))
        if time.monotonic() - start > 10 * SECONDS:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.004)
    taken = round(ended[2].ru_utime + ended[2].ru_stime, 2)
    with os.fdopen(reading) as pipe:
        return pipe.read() or "! died or never ended", taken, most >> 20


def _memory(pid: int) -> int:
    """The bytes that a process has in memory now."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):  # it has ended
        return 0


def _children(pid: int) -> list[int]:
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def run(scale: float = 1.0) -> dict[str, Any]:
    """Counts by outcome; `bad` lists what took too much or ended in an error that isn't ours."""
    from transformers import AutoTokenizer

    from ygivenx.models.resolve import sample_model_path

    path, gguf_file = sample_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path, gguf_file=gguf_file)
    outcome(tokenizer, "{{ messages[0].content }}")  # what is imported on first use isn't the template's
    table = {}
    for name, template in list(hostile().items())[:: max(1, round(1 / scale))]:
        table[name] = attacked(tokenizer, template)
        if os.environ.get("SHOW"):
            print(name, table[name], flush=True)
    counts: dict[str, int] = {}
    for word, _, _ in table.values():
        counts[word] = counts.get(word, 0) + 1
    bad = {n: o for n, o in table.items() if o[0].startswith("!") or o[1] > SECONDS or o[2] > MEGABYTES}
    return {
        "tried": len(table),
        "outcomes": dict(sorted(counts.items())),
        "longest_seconds": max(o[1] for o in table.values()),
        "most_megabytes": max(o[2] for o in table.values()),
        "bad": bad,
        "table": table,
    }
