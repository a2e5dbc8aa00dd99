"""Faults that users met, each with its right value: templates of today on a real vocabulary.

The vocabulary is SmolLM2's, split as Qwen's tokenizer splits: in every real BPE `\\n\\n` is one token, so that what
fits by text may not fit by ids.
"""

from __future__ import annotations

import copy
import re
from ast import literal_eval
from concurrent.futures import ThreadPoolExecutor
from typing import get_type_hints

import pytest
from templates.conversations import call, calls, reply, result, system, tool, user
from templates.real import tokenizer_of
from templates.stock import stock_templates
from tokenizers import Regex, pre_tokenizers

from ygivenx import Encoder, Example, Rejected, RowError
from ygivenx.commands.config import ColumnOptions, EncoderSection
from ygivenx.commands.inputs import Account, in_flags, open_rows
from ygivenx.encoder.encode import CHOICES, OPTIONS
from ygivenx.errors import ConfigError
from ygivenx.proof.auditing import audit

SHELF = stock_templates()
THINKERS = [n for n in ("qwen3_5_think", "qwen3_6", "qwen3_8") if n in SHELF]
needs_templates = pytest.mark.skipif(not THINKERS, reason="TRL is not installed")

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.fixture
def tokenizer(smol_tokenizer):
    made = copy.deepcopy(smol_tokenizer)
    words = pre_tokenizers.Split(Regex(QWEN), "isolated")
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    return made


def made(tokenizer, template: str, **options) -> Encoder:
    tokenizer.chat_template = SHELF.get(template, template)
    return Encoder(tokenizer, **options)


def trained(example: Example) -> str:
    return "".join(example.trained)


def refusal(encoder: Encoder, *messages: dict, **more) -> RowError:
    with pytest.raises(RowError) as e:
        encoder({"messages": list(messages), **more})
    return e.value


SWITCHED_OFF = "rendered with enable_thinking=False: use the same at inference"
WITHOUT_THOUGHTS = {
    "plain": [user(), reply("yo")],
    "turns": [user(), reply("yo"), user("And?"), reply("no")],
    "system": [system(), user(), reply("yo")],
    "calls": [user(), calls(call()), result("clear"), reply("yo")],
}


@needs_templates
@pytest.mark.parametrize("name", THINKERS)
@pytest.mark.parametrize("rows", WITHOUT_THOUGHTS)
def test_a_reply_without_a_thought_where_the_prompt_opens_one(tokenizer, name, rows):
    """Y1: P ends in `<think>\\n` and F goes on `\\n</think>`, so that `\\n\\n` would be one token across the border."""
    row = {"messages": WITHOUT_THOUGHTS[rows], "tools": [tool()] if rows == "calls" else None}
    example = made(tokenizer, name)(row)
    assert trained(example).endswith("yo<|im_end|>" if rows != "turns" else "no<|im_end|>")
    assert "think>" not in trained(example)
    for sequence in example.sequences:
        assert SWITCHED_OFF in sequence.notes
        first = int(sequence.output.argmax())
        before = row["messages"][: next(s.message for s in sequence.segments if s.output)]
        shown = tokenizer.apply_chat_template(
            before, tools=row["tools"], add_generation_prompt=True, enable_thinking=False, return_dict=False
        )
        assert sequence.ids[:first].tolist() == shown


@needs_templates
@pytest.mark.parametrize("name", THINKERS)
def test_a_reply_with_a_thought_stays_as_it_is(tokenizer, name):
    example = made(tokenizer, name)({"messages": [user(), reply("yo", reasoning_content="hm")]})
    assert (trained(example), example.only.notes) == ("hm\n</think>\n\nyo<|im_end|>", ())


@needs_templates
def test_thoughts_by_name(tokenizer):
    """Y2: an empty thought after a prompt that opens one is encoded apart, as inference would go on."""
    row = {"messages": [user(), reply("yo")]}
    example = made(tokenizer, "qwen3_5_think", thoughts="empty")(row)
    assert trained(example) == "\n</think>\n\nyo<|im_end|>"
    shown = tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True, return_dict=False)
    assert example.ids[: len(shown)].tolist() == shown
    masked = made(tokenizer, "qwen3_5_think", thoughts="empty_masked")(row)
    assert (trained(masked), masked.ids.tolist()) == ("yo<|im_end|>", example.ids.tolist())
    assert trained(made(tokenizer, "qwen3", thoughts="off")(row)) == "yo<|im_end|>"


@needs_templates
@pytest.mark.parametrize("name", THINKERS)
@pytest.mark.parametrize("first", [True, False])
def test_replies_with_and_without_a_thought_in_one_conversation(tokenizer, name, first):
    thought, plain = reply("yo", reasoning_content="hm"), reply("no")
    one, other = (thought, plain) if first else (plain, thought)
    example = made(tokenizer, name)({"messages": [user(), one, user("And?"), other]})
    assert sorted("".join(s.trained) for s in example) == ["hm\n</think>\n\nyo<|im_end|>", "no<|im_end|>"]


@pytest.mark.skipif("nemotron_3_nano" not in SHELF, reason="TRL is not installed")
def test_a_thought_is_neither_printed_nor_switched_off(tokenizer):
    """Y3 and Y4."""
    enc = made(tokenizer, "nemotron_3_nano")
    row = [user(), reply("<think>\nhm\n</think>\n\nyo")]
    error = refusal(enc, *row, chat_template_kwargs={"enable_thinking": False})
    assert error.reason == "not_continued"
    half = enc({"messages": [user(), reply("it is 4.\n</think>\n\n4")]})
    assert trained(half) == "it is 4.\n</think>\n\n4<|im_end|>"


@pytest.mark.skipif("qwen2_5" not in SHELF, reason="TRL is not installed")
def test_a_dict_in_a_thought_is_not_an_argument_as_python_prints_it(tokenizer):
    """Y5."""
    row = [user(), calls(call(arguments={"q": "concerts"}), content="I ask with {'q': 'concerts'}.")]
    example = made(tokenizer, "qwen2_5")({"messages": row, "tools": [tool()]})
    assert '"arguments": {"q": "concerts"}' in trained(example)
    assert not any("JSON" in n for n in example.only.notes)


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_name_that_is_written_as_the_calls_id_is_there(tokenizer):
    """Y6, as Kimi K2.5's template."""
    template = CHATML.replace(
        "m['content'] +", "m['content'] + (m.tool_calls[0].id if m.tool_calls else '') +"
    )
    row = [user(), calls(call(arguments={}, id="functions.weather:0"), content="")]
    assert trained(made(tokenizer, template)({"messages": row})) == "functions.weather:0<|im_end|>"


def test_ends_at_which_generation_stops_and_no_others(tokenizer):
    """Y7."""
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|call|>"]})
    headers = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.end %}<|call|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    row = {"messages": [user(), reply("yo", end=True)]}
    assert trained(made(tokenizer, headers, stops=["<|user|>"])(row)) == "yo<|call|><|user|>"
    error = refusal(made(tokenizer, headers, stops=["<|im_end|>"]), *row["messages"])
    assert (error.reason, "<|call|>" in error.what) == ("no_end_of_turn", True)


@pytest.mark.parametrize("name", ["eos_token", "bos_token"])
def test_an_end_that_the_vocabulary_lacks(tokenizer, name):
    """Y9."""
    tokenizer.add_special_tokens({})
    broken = copy.deepcopy(tokenizer)
    broken._special_tokens_map[name] = "</none>"
    with pytest.raises(ConfigError, match="no token of this tokenizer"):
        made(broken, CHATML)


def test_a_template_that_ignores_the_generation_prompt(tokenizer):
    """Y10: the header would be trained."""
    error = refusal(made(tokenizer, CHATML.partition("{% if add_")[0]), user(), reply())
    assert error.reason == "no_prompt"


def test_null_and_empty_contents_are_one(tokenizer):
    """Y15."""
    template = CHATML.replace(
        "m['content'] +", "m.content + (m.tool_calls[0].function.name if m.tool_calls else '') +"
    )
    row = [user(), calls(call(arguments={}), content=None)]
    assert trained(made(tokenizer, template)({"messages": row})) == "weather<|im_end|>"


def test_a_greeting_before_a_system_prompt_of_the_templates_own(tokenizer, smol_tokenizer):
    """Y16."""
    example = Encoder(smol_tokenizer)({"messages": [reply("Hello"), user(), reply("yo")]})
    assert trained(example) == "yo<|im_end|>"
    assert any("before the first question" in n for n in example.only.notes)


def test_two_stops_in_a_row_and_templates_without_a_default(tokenizer):
    """Y17."""
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|stop|>"]})
    twice = CHATML.replace("<|im_end|>\n'", "<|stop|><|im_end|>\n'")
    assert trained(
        made(tokenizer, twice, stops=["<|stop|>", "<|im_end|>"])({"messages": [user(), reply("yo")]})
    ) == ("yo<|stop|>")
    enc = made(tokenizer, CHATML)
    tokenizer.chat_template = {"rag": CHATML, "tool_use": CHATML}
    assert refusal(enc, user(), reply()).reason == "no_template"


@pytest.mark.parametrize("name", ["add_generation_prompt", "messages", "eos_token"])
def test_a_row_sets_the_templates_switches_alone(tokenizer, name):
    error = refusal(made(tokenizer, CHATML), user(), reply(), chat_template_kwargs={name: False})
    assert (error.reason, error.field) == ("reserved_kwarg", f"chat_template_kwargs.{name}")
    row = {"messages": [user(), reply()], "chat_template_kwargs": {"enable_thinkng": False}}
    assert any("enable_thinkng" in n for n in made(tokenizer, CHATML)(row).only.notes)


@pytest.mark.parametrize("name", ["enable_thinkin", "thinking", "enable"])
def test_a_part_of_a_switchs_name_is_noted_as_unread(tokenizer, name):
    switch = "{% if enable_thinking is defined and enable_thinking %}{% set enable_thinking = 1 %}{% endif %}"
    row = {"messages": [user(), reply()], "chat_template_kwargs": {name: False, "enable_thinking": False}}
    (note,) = made(tokenizer, switch + CHATML)(row).only.notes
    assert f"doesn't read {name!r}" in note


def test_replies_that_do_not_fit_are_context(tokenizer):
    row = {"messages": [user(), reply("yo"), user("And?"), reply("no no no no no no")]}
    whole = made(tokenizer, CHATML)(row).only
    fitted = made(tokenizer, CHATML, max_length=len(whole) - 4, overflow="drop_reply")(row).only
    assert ("".join(fitted.trained), len(fitted)) == ("yo<|im_end|>", len(whole) - 4)
    assert any("1 replies that don't fit" in n for n in fitted.notes)


@needs_templates
def test_a_refusal_names_what_was_tried_and_works(tokenizer):
    """Y19: each option that a refusal names takes the row."""
    enc = made(tokenizer, "qwen3_5_think", repair="none")
    error = refusal(enc, user(), reply("yo"))
    named = re.findall(r"(\w+)='([^']*)'", error.fix)
    assert named
    for name, value in named:
        options = {"repair": "none", name: value}
        assert Encoder(tokenizer, **options)({"messages": [user(), reply("yo")]}).trained
    assert "none that was tried" in refusal(
        made(tokenizer, CHATML.partition("{% if add_")[0]), user(), reply()
    ).fix or ("context='rendered'" in refusal(enc, user(), reply("yo")).fix)


def test_encoders_of_different_times_share_nothing_in_threads(tokenizer):
    """Y18."""
    tokenizer.chat_template = "{{ strftime_now('%Y') }}" + CHATML
    encoders = [Encoder(tokenizer, now=f"{year}-01-01") for year in (2001, 2002)]
    rows = [{"messages": [user(), calls(call(), content=f"{n}")]} for n in range(30)]

    def years(enc: Encoder) -> set[str]:
        examples, rejected = Encoder.batch(enc, rows)
        assert {r.reason for r in rejected} <= {"dropped_field"}
        return {
            "".join(e.tokens)[:4] for e in [*examples, *enc.batch([{"messages": [user(), reply()]}] * 30)[0]]
        }

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(years, encoders)) == [{"2001"}, {"2002"}]


@pytest.mark.parametrize(
    ("python", "flags"),
    [
        ("dropped='warn'", "-e dropped=warn"),
        ('control="text"', "--control text"),
        ("max_length=512", "--max-length 512"),
        ("bos=True", "-e bos=true"),
        ("repair='default,append_end'", "-e repair=default,append_end"),
        ("stops=['<|end|>', '<|a|>']", """-e 'stops=["<|end|>", "<|a|>"]'"""),
        ("template_kwargs={'enable_thinking': False}", """-e 'template_kwargs={"enable_thinking": false}'"""),
        ("roles=['critic']", "--roles critic"),
        ("tokenizer.eos_token='x'", "tokenizer.eos_token='x'"),
    ],
)
def test_hints_in_the_spelling_of_commands(python, flags):
    """Y19: what a fix names as Python has it is an option that commands take; elsewhere texts stay as they are."""
    assert (
        in_flags(f"what: {python}\n  fix: {python}, or mend it")
        == f"what: {python}\n  fix: {flags}, or mend it"
    )


def test_commands_take_every_choice_that_a_hint_may_name():
    for name, hint in get_type_hints(EncoderSection).items():
        if name in CHOICES:
            assert hint == CHOICES[name]
    assert {*CHOICES, "repair", "stops", "template_kwargs", "max_length", "bos"} <= {*OPTIONS, "control"}


def test_a_long_row_has_a_flag(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"x": "a", "y": "b"}\n{"x": "' + "a" * 300 + '", "y": "b"}\n')
    _, refused = open_rows(str(path), ColumnOptions(max_row_bytes=100))
    assert refused.reason == "too_long"
    assert "--max-row-bytes 200" in in_flags(refused.message)
    assert not any(
        isinstance(row, Rejected) for row in open_rows(str(path), ColumnOptions(max_row_bytes=400))
    )


def test_a_role_of_the_templates_own_has_a_flag(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        '{"messages": [{"role": "critic", "content": "no"}, {"role": "assistant", "content": "yo"}]}\n'
    )
    (refused,) = open_rows(str(rows), ColumnOptions())
    assert "--roles critic" in in_flags(refused.message)
    (row,) = open_rows(str(rows), ColumnOptions(roles="critic"))
    assert row.value.messages[0]["role"] == "critic"


# --- prompts that open a thought, or close one ------------------------------------------------------------


def thinking_only(prompt: str, reply_begins: str) -> str:
    """A template without a switch: what its prompt ends with, and what it writes before the words of a reply."""
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        f"{{% if m.role == 'assistant' %}}{reply_begins}{{% endif %}}"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        f"{{% if add_generation_prompt %}}<|im_start|>assistant\n{prompt}{{% endif %}}"
    )


@pytest.mark.parametrize(
    "reply_begins",
    ["", "<think>\n\n</think>\n\n", "<think>\n"],
    ids=[
        "writes no thought (MiniMax M2)",
        "writes an empty one (Qwen3-VL)",
        "opens one alone (Nemotron Nano v2)",
    ],
)
@pytest.mark.parametrize("turns", [1, 2])
def test_a_reply_without_a_thought_under_a_template_that_only_thinks(tokenizer, reply_begins, turns):
    """The thought is closed as context: P's ids stand before it as inference has them, and the answer alone is y."""
    enc = made(tokenizer, thinking_only("<think>\n", reply_begins))
    row = [user(), reply("yo"), user("And?"), reply("\nno")][: 2 * turns]
    example = enc({"messages": row})
    assert sorted("".join(s.trained) for s in example) == sorted(["yo<|im_end|>", "\nno<|im_end|>"][:turns])
    for sequence in example:
        i = max(s.message for s in sequence.segments if s.output)
        shown = tokenizer.apply_chat_template(row[:i], add_generation_prompt=True, return_dict=False)
        start = int(sequence.output.argmax())
        assert sequence.ids[: len(shown)].tolist() == shown
        assert tokenizer.decode(sequence.ids[len(shown) : start]) == "\n</think>\n\n"
        assert any("closed at once, as context" in n for n in sequence.notes)
    error = refusal(made(tokenizer, enc.tokenizer.chat_template, repair="none"), *row)
    assert (error.reason, "thoughts='empty'" in error.fix) == ("no_thought", True)
    trained_too = made(tokenizer, enc.tokenizer.chat_template, thoughts="empty")({"messages": row[:2]})
    assert trained(trained_too) == "\n</think>\n\nyo<|im_end|>"


def test_an_empty_thought_that_prompt_and_reply_write_differently(tokenizer):
    """DeepSeek V3.2: the prompt ends in <think></think>, and the template writes </think> alone before a reply."""
    enc = made(tokenizer, thinking_only("<think></think>", "</think>"))
    example = enc({"messages": [user(), reply("\n\nyo")]})
    assert "".join(example.only.tokens).endswith("<think></think>\n\nyo<|im_end|>")
    assert trained(example) == "\n\nyo<|im_end|>"
    assert refusal(enc, user(), reply("hm</think>yo")).reason == "not_continued"


def test_a_token_across_the_border_is_encoded_as_inference_goes_on(tokenizer):
    """P ends in a line break and the reply begins with one: `\\n\\n` is one token, and P has the other."""
    row = {"messages": [user(), reply("\nyo")]}
    example = made(tokenizer, CHATML)(row)
    shown = tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True, return_dict=False)
    assert example.ids[: len(shown)].tolist() == shown
    assert (trained(example), "encoded apart" in example.only.notes[-1]) == ("\nyo<|im_end|>", True)
    assert refusal(made(tokenizer, CHATML, border="refuse"), *row["messages"]).reason == "straddling_token"


LAST_USER_HAS_THE_SYSTEM_PROMPT = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST]"
    "{{ messages[0].content + ' ' if loop.last and messages[0].role == 'system' }}{{ m.content }}[/INST]"
    "{% elif m.role != 'system' %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)


def test_a_message_that_one_of_the_sequences_lacks(tokenizer):
    """Mistral Nemo: the system prompt stands before the user's message that comes last, and nowhere after a result."""
    enc = made(tokenizer, LAST_USER_HAS_THE_SYSTEM_PROMPT)
    row = [system(), user(), reply("a"), result("b"), reply("c"), user("And?"), reply("d")]
    error = refusal(enc, *row)
    assert (error.reason, error.field) == ("dropped_field", "messages[0]")
    assert trained(enc({"messages": row[:3]})) == "a<|im_end|>"


def test_a_text_of_x_that_the_template_changes(tokenizer):
    """Nemotron Nano v2 takes tags out of what users write: of a question about them little is left."""
    enc = made(tokenizer, CHATML.replace("m['content'] +", "m['content'].replace('/think', '') +"))
    row = [user("What is </think> for?"), reply("yo")]
    error = refusal(enc, *row)
    assert (error.reason, error.field) == ("changed_text", "messages[0].content")
    warned = made(tokenizer, enc.tokenizer.chat_template, dropped="warn")({"messages": row})
    assert "messages[0].content is changed by the template" in warned.only.notes
    as_json = made(tokenizer, CHATML.replace("m['content'] +", "m['content'] | tojson +"))
    assert trained(as_json({"messages": [user('say "a"\n'), reply("yo")]})) == '"yo"<|im_end|>'


def test_a_weight_key_that_is_misspelt_is_a_warning(tokenizer):
    """Y11: `weigth` asks for nothing, and a finding says which key was likely meant."""
    enc = made(tokenizer, CHATML)
    rows = [{"messages": [user(), reply("yo", weigth=0.0)]}, {"messages": [user(), reply("yo", zzz=1)]}]
    assert any("did you mean 'weight'" in n for n in enc(rows[0]).only.notes)
    found = {
        f.rule: f
        for f in audit(rows=rows, encoder=enc).findings
        if f.rule in ("key-misspelt", "encoder-notes")
    }
    assert (found["key-misspelt"].severity, found["key-misspelt"].count) == ("warning", 1)
    assert "'zzz'" in found["encoder-notes"].message


def test_a_conversation_in_which_nobody_answers(tokenizer):
    error = refusal(made(tokenizer, CHATML), system(), user())
    assert (error.reason, "no assistant message" in error.what) == ("nothing_trained", True)
    assert made(tokenizer, CHATML, train="roles=user")({"messages": [user()]}).only.weights.any()


def test_a_pair_whose_border_is_in_a_token_is_told_all_ways(tokenizer):
    with pytest.raises(RowError) as e:
        Encoder(tokenizer)({"x": "a =\n", "y": "\nb"})
    assert e.value.reason == "straddling_token"
    for name, value in re.findall(r"(\w+)='([^']*)'", e.value.fix):
        assert Encoder(tokenizer, **{name: value})({"x": "a =\n", "y": "\nb"}).only.weights.any()


@pytest.mark.parametrize("reply_begins", ["", "<think>\n\n</think>\n\n", "<think>\n"])
def test_closed_thoughts_by_shape_are_those_of_rows_alone(tokenizer, reply_begins):
    """What is proven once for all rows of a shape equals the proof of each by itself."""
    enc = made(tokenizer, thinking_only("<think>\n", reply_begins))
    texts = ["yo", "\n\nno", "hm</think>yo", "  so", "<b>{{ x }}</b>", "<think> is a tag"]
    rows = [{"messages": [user(f"{n}?"), reply(t)]} for n, t in enumerate(texts * 3)]
    examples, rejected = enc.batch(rows)
    assert [r.reason for r in rejected] == ["no_thought"] * 3  # after an empty thought one that never ends
    for example, row in zip(examples, [r for n, r in enumerate(rows) if n % 6 != 5], strict=True):
        (alone,) = made(tokenizer, enc.tokenizer.chat_template)(row).sequences
        (s,) = example.sequences
        assert (s.ids.tolist(), s.weights.tolist()) == (alone.ids.tolist(), alone.weights.tolist())
        assert (s.segments, s.notes) == (alone.segments, alone.notes)


EFFORT = thinking_only(
    "{{ '<think>' if effort_of_thinking in ['high'] else '<think></think>' }}", ""
).replace(
    "<|im_start|>{{ m.role }}\n",
    "<|im_start|>{{ m.role }}\n{{ '<think>' + m.thinking + '</think>' if m.thinking }}",
)


@pytest.mark.parametrize(
    ("template", "row", "ways"),
    [
        (
            EFFORT,
            {"messages": [user(), reply("yo", thinking="hm")]},
            ["template_kwargs={'effort_of_thinking': 'high'}", "context='rendered'"],
        ),
        (CHATML, {"messages": [user(), calls(call(), content="yo")]}, ["dropped='warn'"]),
        (CHATML.replace("m['content'] +", "m['content'][1].x +"), {"messages": [user(), reply("yo")]}, []),
    ],
    ids=["a switch with words", "dropped calls", "an error that nothing mends"],
)
def test_each_way_out_that_a_refusal_names_takes_the_row(tokenizer, template, row, ways):
    """Y19: by applying it."""
    error = refusal(made(tokenizer, template), *row["messages"])
    if not ways:
        assert "none that was tried takes this row" in error.fix
        return
    assert error.fix == f"{' or '.join(ways)} (tried: takes this row)"
    for way in ways:
        name, value = way.split("=", 1)
        assert made(tokenizer, template, **{name: literal_eval(value)})(row).sequences


def test_ways_out_are_tried_on_so_many_rows(tokenizer):
    """Of a data set that a template never takes, each row costs no more than a look after the first hundred."""
    enc = made(tokenizer, CHATML.partition("{% if add_")[0])
    enc.batch([{"messages": [user(f"{n}"), reply("yo")]} for n in range(110)])
    assert enc._ways_out._rows["no_prompt"] == 110
    assert {way for _, way in enc._ways_out._helped} <= {"context='rendered'"}


@pytest.mark.parametrize("overflow", ["drop_turns", "drop_reply", "truncate"])
def test_what_does_not_fit_is_counted(tokenizer, overflow):
    row = {"messages": [user(), reply("yo"), user("And?"), reply("no no no no no no")]}
    whole = made(tokenizer, CHATML)(row).only
    kept = made(tokenizer, CHATML, max_length=len(whole) - 4, overflow=overflow)(row).only
    lost = int((whole.weights > 0).sum() - (kept.weights > 0).sum())
    assert kept.cut == (len(whole) - len(kept), lost)
    account = Account("messages")
    account.accept(Example((kept,)))
    account.accept(Example((whole,)))
    assert account.document()["cut"] == {"rows": 1, "tokens": len(whole) - len(kept), "trained": lost}


def test_an_empty_thought_by_other_tags_switches_nothing(tokenizer):
    """Y8: Gemma 4's larger templates end their prompt in an empty thought in a channel, and write none in replies."""
    tokenizer.add_tokens(["<|channel>", "<channel|>"])
    channel = "{{ '' if enable_thinking else '<|channel>thought\n<channel|>' }}"
    switched = "{{ '<|think|>' if enable_thinking and loop.first }}"
    template = thinking_only(channel, "").replace(
        "<|im_start|>{{ m.role }}\n", f"<|im_start|>{{{{ m.role }}}}\n{switched}"
    )
    example = made(tokenizer, template)({"messages": [user(), reply("yo")]})
    assert "".join(example.only.tokens).endswith(
        "assistant\n<|channel>thought\n<channel|>yo<|im_end|>\n"[:-1]
    )
    assert trained(example) == "yo<|im_end|>"
    assert not any("rendered with" in n for n in example.only.notes)
    assert "<|think|>" not in "".join(example.only.tokens)


@needs_templates
@pytest.mark.parametrize("name", [n for n in ("gemma4", "gemma4_v5") if n in SHELF])
def test_gemma_4_without_a_thought(name):
    """Y8 with the template itself and its vocabulary, where they are there."""
    real = tokenizer_of("gemma3")
    real.add_special_tokens(
        {"additional_special_tokens": ["<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>"]}
    )
    real.chat_template = SHELF[name]
    example = Encoder(real, stops=["<turn|>"])({"messages": [user(), reply("yo")]})
    assert (trained(example), "<|think|>" in "".join(example.only.tokens)) == ("yo<turn|>", False)


def test_tags_that_are_made_of_several_tokens_are_not_closed_by_one(tokenizer):
    """Kimi K3: <|open|>think<|sep|> … <|close|>think<|sep|>, of which a template's source has no whole."""
    tokens = ["<|open|>", "<|sep|>", "<|close|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tag = "{{ '<|' + 'NAME' + '|>think<|sep|>' }}"
    around = tag.replace("NAME", "open") + "{{ m.reasoning_content }}" + tag.replace("NAME", "close")
    template = thinking_only(tag.replace("NAME", "open"), around)
    example = made(tokenizer, template)({"messages": [user(), reply("yo")]})
    assert trained(example) == "<|close|>think<|sep|>yo<|im_end|>"
    thought = made(tokenizer, template)({"messages": [user(), reply("yo", reasoning_content="hm")]})
    assert trained(thought) == "hm<|close|>think<|sep|>yo<|im_end|>"
