"""Templates of a few lines, each for one kind of fault that templates of models have shown, and what is right there."""

from __future__ import annotations

import copy

import pytest
from templates.conversations import call, calls, reply, user

from ygivenx import Encoder, RowError

END = "<|im_end|>"


def template(
    reply: str, prompt: str = "<|im_start|>assistant\n", asked: str = "add_generation_prompt"
) -> str:
    """ChatML whose replies, header and end included, are written by `reply`."""
    return (
        "{% for m in messages %}{% if m.role == 'assistant' %}" + reply + "{% else %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if " + asked + " %}{{ '" + prompt + "' }}{% endif %}"
    )


HEADER, CLOSE = "{{ '<|im_start|>assistant\n' }}", "{{ '<|im_end|>\n' }}"
THOUGHT = "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
CALL = "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + c.function.arguments }}{% endfor %}"
THINKING = "<|im_start|>assistant\n<think>"

# name: template, messages, what each sequence trains
EXACT = {
    "an answer between marks, after its own thought and after none": (
        template(HEADER + THOUGHT + "{{ '[' + m.content + ']' }}" + CLOSE, THINKING),
        [user(), reply("yo", reasoning_content="hm"), user(), reply("no")],
        ["hm</think>[yo]<|im_end|>", "[no]<|im_end|>"],
    ),
    "a thought that the template has between the marks of an answer": (
        template(HEADER + "{{ '<a>' + (m.content | trim) + '</a>' }}" + CLOSE, THINKING),
        [user(), reply("a\n", reasoning_content="hm")],
        ["hm\n</think>\n\na\n</a><|im_end|>"],
    ),
    "a prompt that is written in any case": (
        template(HEADER + "{{ '[' + m.content + ']' }}" + CLOSE, asked="true"),
        [user(), reply("yo"), user("And?"), reply("no")],
        ["[yo]<|im_end|>[no]<|im_end|>"],
    ),
    "an empty reply without the line break of others": (
        template(HEADER + "{% if m.content %}{{ m.content + '\n' }}{% endif %}" + CLOSE),
        [user(), reply("")],
        ["<|im_end|>"],
    ),
    "no content, and arguments as text, where contents may be parts": (
        template(
            HEADER
            + "{% if m.content is not string %}{{ m.content[0].type }}{% endif %}{{ m.content + '' }}"
            + CALL
            + CLOSE
        ),
        [user(), calls(call(arguments={"a": 1}), content=None)],
        ['<call>weather{"a": 1}<|im_end|>'],
    ),
    "a thought by its third name": (
        template(HEADER + THOUGHT.replace("_content", "") + "{{ m.content }}" + CLOSE),
        [user(), reply("yo", reasoning_content="hm")],
        ["<think>hm</think>yo<|im_end|>"],
    ),
    "a turn that is closed when the chat goes on, after a line break": (
        template(HEADER + "{{ m.content }}{% if not loop.last %}{{ '\n<|im_end|>\n' }}{% endif %}"),
        [user(), reply("yo"), user("And?"), reply("no")],
        ["yo\n<|im_end|>no\n<|im_end|>"],
    ),
    "an empty thought before a content, where it has one of its own": (
        template(HEADER + "<think>{{ m.reasoning_content or '' }}</think>{{ m.content }}" + CLOSE),
        [user(), reply("<think>hm</think>yo"), user(), reply("no")],
        ["<think>hm</think>yo<|im_end|><think></think>no<|im_end|>"],
    ),
    "the same where the prompt opens it": (
        template(HEADER + "<think>{{ m.reasoning_content or '' }}</think>{{ m.content }}" + CLOSE, THINKING),
        [user(), reply("<think>hm</think>yo")],
        ["hm</think>yo<|im_end|>"],
    ),
    "JSON of other scripts": (
        template(HEADER + "{{ m.content | tojson }}" + CLOSE),
        [user(), reply("你好")],
        ['"你好"<|im_end|>'],
    ),
}
# name: template, reply, reason
REFUSED = {
    "a reply in lower case": (
        template(HEADER + "{{ m.content | lower }}" + CLOSE), reply("It is Y"), "changed_text"),
    "a thought of which the template splits off all": (
        template(HEADER + "{{ m.content.split('</think>', 1)[-1] }}" + CLOSE),
        reply("<think>plan A</think>Write <think> and </think> around it."), "dropped_field"),
    "a word less after a thought": (
        template(HEADER + "{{ m.content | replace('secret', '') }}" + CLOSE),
        reply("<think>\nhm\n</think>\n\nthe secret is out."), "changed_text"),
    "a longer word after a thought": (
        template(HEADER + "{{ m.content | replace('4', 'four') }}" + CLOSE),
        reply("<think>hm</think>It is 4."), "changed_text"),
    "a thought without its tags": (
        template(HEADER + "{{ m.content | replace('<think>', '') | replace('</think>', '') }}" + CLOSE),
        reply("<think>hm</think>yo"), "changed_text"),
    "a thought between tags that nothing knows": (
        template(HEADER + "{{ m.content | replace('think>', 'thought>') }}" + CLOSE),
        reply("<think>hm</think>yo"), "changed_text"),
    "a reply without its indentation": (
        template(HEADER + "{{ m.content.split('\n') | map('trim') | join('\n') }}" + CLOSE),
        reply("def f():\n    return 1"), "changed_text"),
    "a reply of single spaces": (
        template(HEADER + "{{ m.content.split() | join(' ') }}" + CLOSE), reply("a\nb  c"), "changed_text"),
    "a blank reply that is printed as a list of parts": (
        template(HEADER + "{% if m.content is string %}{{ raise_exception('no') }}{% else %}{{ m.content | tojson }}"
                 "{% endif %}{% if false %}{{ m.content[0].type }}{% endif %}" + CLOSE),
        reply(" \n"), "template_error"),
    "a thought that is closed twice": (
        template(HEADER + "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think></think>{% endif %}"
                 "{{ m.content }}" + CLOSE),
        reply("", reasoning_content="Hmm hmm."), "changed_text"),
    "turns that end in words, and in the header of any message": (
        template(HEADER + "{{ m.content + '\n### End\n' }}"), reply("yo"), "no_end_of_turn"),
    "a prompt that is never written": (
        template(HEADER + "{{ m.content }}" + CLOSE, asked="false"), reply("yo"), "no_prompt"),
    "a prompt that is never written, where a second message of the user's joins the first": (
        "{% for m in messages %}{% if not loop.first and m.role == messages[loop.index0 - 1].role %}{{ ' ' }}"
        "{% else %}{{ '<|im_start|>' + m.role + '\n' }}{% endif %}{{ m.content }}"
        "{% if loop.last or m.role != messages[loop.index].role %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}",
        reply("yo"), "no_prompt"),
    "a thought that never ends, where only an empty one before it would let it through": (
        template(HEADER + "{{ m.content }}" + CLOSE, THINKING + "\n"), reply("<think>hm"), "no_thought"),
}  # fmt: skip


def encoder(smol_tokenizer, template: str, **options) -> Encoder:
    tokenizer = copy.deepcopy(smol_tokenizer)
    tokenizer.chat_template = template
    return Encoder(tokenizer, **options)


@pytest.mark.parametrize("name", EXACT)
def test_exact(smol_tokenizer, name):
    source, messages, expected = EXACT[name]
    example = encoder(smol_tokenizer, source)({"messages": messages})
    assert ["".join(s.trained) for s in example] == expected


@pytest.mark.parametrize("name", REFUSED)
def test_refused(smol_tokenizer, name):
    source, said, reason = REFUSED[name]
    with pytest.raises(RowError) as e:
        encoder(smol_tokenizer, source)({"messages": [user(), said]})
    assert e.value.reason == reason


def test_a_proof_for_a_shape_sees_the_words_of_each_row(smol_tokenizer):
    rows = [{"messages": [user(), reply(said)]} for said in ("a", "b", "c", "a  b", "d")]
    source = template(HEADER + "{{ m.content.replace('  ', ' ') }}" + CLOSE)
    done = encoder(smol_tokenizer, source).each(rows)
    assert [isinstance(d, RowError) for d in done] == [False, False, False, True, False]


def test_tags_in_a_question_are_words(smol_tokenizer):
    """Those of replies are marks, which templates write anew."""
    plain = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    source = template(HEADER + "{{ m.content }}" + CLOSE)
    changed = source.replace(plain, plain.replace("m.content", "m.content.replace('<think>', '')"))
    assert changed != source
    with pytest.raises(RowError, match="changes") as e:
        encoder(smol_tokenizer, changed)({"messages": [user("Why <think>?"), reply("yo")]})
    assert (e.value.reason, e.value.field) == ("changed_text", "messages[0].content")


def test_a_changed_reply_is_trained_as_it_is_written_if_so_asked(smol_tokenizer):
    source, said, _ = REFUSED["a reply in lower case"]
    example = encoder(smol_tokenizer, source, dropped="warn")({"messages": [user(), said]})
    assert "".join(example.trained) == "it is y<|im_end|>"
    assert example.only.notes == ("messages[1].content is changed by the template",)


@pytest.mark.parametrize(
    ("said", "word"),
    [
        (reply("<think>hm</think>yo", reasoning_content="so"), "two thoughts"),
        (reply("<think>hm"), "an unfinished thought"),
        (reply("<think>hm</think>yo"), ""),
        (reply("yo <think>", reasoning_content="so"), ""),
    ],
)
def test_a_note_of_two_thoughts_and_of_one_that_never_ends(smol_tokenizer, said, word):
    source = template(HEADER + THOUGHT + "{{ m.content }}" + CLOSE)
    (sequence,) = encoder(smol_tokenizer, source)({"messages": [user(), said]})
    assert [word in n for n in sequence.notes] == [True] * bool(word)


def test_a_reply_that_is_left_open_ends_with_its_words(smol_tokenizer):
    enc = encoder(smol_tokenizer, template(HEADER + "{{ m.content + '\n### End\n' }}" + CLOSE))
    example = enc({"messages": [user(), reply("It is", prefix=True)]})
    assert "".join(example.trained) == "It is"
    assert "".join(example.only.tokens).endswith("assistant\nIt is")
