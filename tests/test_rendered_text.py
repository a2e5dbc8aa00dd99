"""Rendered chats in a text column, read back: the tokens and weights of the messages that they were, or refused."""

from __future__ import annotations

import pytest
from templates.conversations import reply, system, user
from templates.stock import stock_templates, stops_for, tokenizer_for
from test_chats import CHATML, encoder, trained

from ygivenx import Encoder
from ygivenx.encoder.texts import Separator, read_back
from ygivenx.errors import RowError

CHATS = {
    "one turn": [user("What is 2+2?"), reply("It is 4.")],
    "two turns": [user("hi"), reply("Hello!\n\nWhat is it?"), user("user\nassistant"), reply("It is 4.\n")],
    "system": [system("Be brief."), user("hi"), reply("Hello!"), user("and?"), reply("Yes: 4")],
}


def sides(name: str, template: str, messages: list) -> tuple[Encoder, str] | None:
    """An encoder and the text of a conversation; None where the template or the encoder refuses it as messages."""
    enc = Encoder(tokenizer_for(name, template), stops=stops_for(name))
    try:
        enc({"messages": messages})
        return enc, enc.tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:
        return None


@pytest.mark.parametrize("name", [n for n in stock_templates() if not n.endswith("_training")])
def test_the_text_of_a_chat_is_encoded_as_its_messages(name):
    for messages in CHATS.values():
        both = sides(name, stock_templates()[name], messages)
        if both is None:
            continue
        enc, text = both
        right, (read, rejected) = enc({"messages": messages}), enc.batch([{"text": text}])
        assert {r.reason for r in rejected} <= {"rendered_chat", "control_text"}
        for got in read:
            assert [s.ids.tolist() for s in got] == [s.ids.tolist() for s in right]
            assert [s.weights.tolist() for s in got] == [s.weights.tolist() for s in right]
            assert "read back into" in got.sequences[0].notes[0]


def test_most_templates_are_read_back():
    """Of all chats that are accepted as messages; what isn't read back is refused, never trained whole."""
    tried = read = 0
    for name, template in stock_templates().items():
        if name.endswith("_training"):
            continue
        for messages in CHATS.values():
            if (both := sides(name, template, messages)) is not None:
                enc, text = both
                _, rejected = enc.batch([{"text": text}])
                tried, read = tried + 1, read + (not rejected)
    assert tried > 60
    assert read >= 0.9 * tried, (read, tried)


def text_of(*messages) -> str:
    return encoder(CHATML).tokenizer.apply_chat_template(list(messages), tokenize=False)


def test_white_space_at_the_end_and_the_bos_may_lack():
    text = text_of(user(), reply())
    for shown in (text, text.rstrip(), text + "\n"):
        assert trained(encoder(CHATML)({"text": shown})) == trained(
            encoder(CHATML)({"messages": [user(), reply()]})
        )


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.removesuffix("<|im_end|>\n"),
        lambda t: t + "<|im_start|>assistant\n",
        lambda t: t.replace("<|im_start|>assistant", "<|im_start|>assitant"),
        lambda t: "<|im_start|>" + t,
    ],
    ids=["no end", "generation prompt", "unknown role", "two beginnings"],
)
def test_what_the_template_does_not_write_is_refused(change):
    with pytest.raises(RowError) as e:
        encoder(CHATML)({"text": change(text_of(user(), reply()))})
    assert e.value.reason in ("rendered_chat", "control_text")


def test_a_control_token_in_a_text_that_is_no_chat_is_refused_as_before():
    with pytest.raises(RowError) as e:
        encoder(CHATML)({"text": "once <|im_end|> upon"})
    assert e.value.reason == "control_text"


def test_the_weight_of_the_row_and_the_policy_count():
    row = {"text": text_of(user(), reply("A."), user(), reply("B.")), "weight": 0.5}
    s = encoder(CHATML, train="last")(row).only
    assert trained(s) == "B.<|im_end|>"
    assert set(s.weights) == {0, 0.5}


def test_many_readings_end():
    """A text that can be cut in very many ways, none of which the template makes, is given up in time."""

    def render(messages):
        return "".join(f"{m['content']}\n" for m in messages).replace("x", "y")

    separators = {
        role: [Separator(r, "\n") for r in ("user", "assistant", "tool")]
        for role in ("user", "assistant", "tool")
    }
    separators |= {"start": [Separator("user", "")]}
    separators["assistant"].append(Separator("end", ""))
    assert read_back("\n" * 1000 + "x", render, separators) is None
