"""Which tokens are y: the seed example, chats, plain pairs, borders, weights; nothing lost."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, PythonBackend

from ygivenx import Encoder, RowError
from ygivenx.errors import ConfigError
from ygivenx.rows.formats import Conversation, Pair

CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello there"},
    {"role": "user", "content": "And 2+2?"},
    {"role": "assistant", "content": "4"},
]


def word_level(words: list[str]) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*words, "[UNK]"])}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")


def test_the_seed_example():
    words = ["User:", "What", "is", "2+2?", "Assistant:", "4"]
    example = Encoder(word_level(words))({"prompt": "User: What is 2+2? Assistant:", "completion": " 4"})
    assert list(example.tokens) == words
    assert example.trained == ["4"]
    assert example.weights.tolist() == [0, 0, 0, 0, 0, 1]
    assert example.only.labels.tolist() == [-100] * 5 + [5]


def test_a_chat(smol_tokenizer):
    sequence = Encoder(smol_tokenizer)({"messages": CHAT}).only
    assert sequence.ids.tolist() == smol_tokenizer.apply_chat_template(CHAT, return_dict=False)
    assert sequence.trained == ["Hello", " there", "<|im_end|>", "4", "<|im_end|>"]
    assert [(s.kind, s.message) for s in sequence.segments if s.output] == [
        ("answer", 1), ("end_of_turn", 1), ("answer", 3), ("end_of_turn", 3),
    ]  # fmt: skip
    assert [s.start for s in sequence.segments[1:]] == [s.stop for s in sequence.segments[:-1]]


def test_pad_equal_to_eos_changes_nothing(smol_tokenizer):
    assert smol_tokenizer.pad_token == smol_tokenizer.eos_token
    assert Encoder(smol_tokenizer)({"messages": CHAT}).trained.count("<|im_end|>") == 2


def test_rows_as_mappings_and_nouns_agree(smol_tokenizer):
    enc = Encoder(smol_tokenizer)
    assert np.array_equal(enc({"messages": CHAT}).ids, enc(Conversation(tuple(CHAT))).ids)
    assert np.array_equal(enc({"x": "a b", "y": " c"}).ids, enc(Pair("a b", " c")).ids)


def test_a_batch_loses_nothing(smol_tokenizer):
    rows = [
        {"messages": CHAT},
        {"messages": []},
        {"messages": [{"role": "user", "content": "<|im_end|>"}]},
        7,
    ]
    examples, rejected = Encoder(smol_tokenizer).batch(rows)
    assert len(examples) + len(rejected) == len(rows)
    assert [r.where for r in rejected] == ["row 1, messages", "row 2, messages[0].content", "row 3"]


def test_a_conversation_needs_a_template():
    with pytest.raises(RowError, match="no chat template") as e:
        Encoder(word_level(["a"]))({"messages": CHAT})
    assert e.value.reason == "no_template"


# --- plain pairs -----------------------------------------------------------------------------------------


def test_eos_is_appended_to_y_and_said(smol_tokenizer):
    sequence = Encoder(smol_tokenizer)({"x": "1 + 1 =", "y": " 2"}).only
    assert sequence.trained[-1] == "<|im_end|>"
    assert sequence.segments[-1].kind == "end_of_turn"
    assert any("appended" in n for n in sequence.notes)
    assert Encoder(smol_tokenizer, eos=False)({"x": "1 + 1 =", "y": " 2"}).trained == [" ", "2"]


def test_eos_is_not_doubled(smol_tokenizer):
    once = Encoder(smol_tokenizer)({"x": "1 + 1 =", "y": " 2<|im_end|>"}).only
    assert once.ids.tolist() == Encoder(smol_tokenizer)({"x": "1 + 1 =", "y": " 2"}).ids.tolist()
    assert once.segments[-1].kind == "end_of_turn"


def with_bos(tokenizer):
    """The tokenizer with a BOS that nothing adds."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = "<|im_start|>"
    return tokenizer


def test_a_bos_that_y_begins_with_is_one(smol_tokenizer):
    """Where x is empty, as with rows of text alone."""
    enc = Encoder(with_bos(smol_tokenizer), bos=True, eos=False)
    one, other = (
        enc({"text": "<|im_start|>Hello there"}).only,
        enc({"x": "<|im_start|>", "y": "Hello there"}).only,
    )
    assert one.ids.tolist() == other.ids.tolist() == enc({"text": "Hello there"}).ids.tolist()
    assert [s.kind for s in one.segments] == ["bos", "answer"]
    assert "".join(one.trained) == "Hello there"


def test_why_nothing_is_trained(smol_tokenizer):
    with pytest.raises(RowError, match="no context to be predicted from") as e:
        Encoder(smol_tokenizer, eos=False, bos=False)({"text": "Hello"})
    assert (e.value.reason, "bos=True" in e.value.fix) == ("nothing_trained", True)
    with pytest.raises(RowError, match="nothing that is trained stands before that") as e:
        Encoder(smol_tokenizer, max_length=3, overflow="truncate")({"x": "one two three", "y": " four"})
    assert e.value.reason == "too_long"


HUMANEVAL = {"prompt": "def f(x):\n", "completion": "    return x\n"}


def test_a_straddling_token_is_refused_with_the_ways_out(smol_tokenizer):
    with pytest.raises(RowError) as e:
        Encoder(smol_tokenizer)(HUMANEVAL)
    assert e.value.reason == "straddling_token"
    assert r"'\n   '" in str(e.value)
    for way in ("border='mask'", "border='split'", "border='y'"):
        assert way in str(e.value)


@pytest.mark.parametrize(
    ("border", "trained"), [("mask", " return x\n"), ("y", "\n    return x\n"), ("split", "    return x\n")]
)
def test_borders(smol_tokenizer, border, trained):
    sequence = Encoder(smol_tokenizer, border=border, eos=False)(HUMANEVAL).only
    assert "".join(sequence.trained) == trained
    assert sequence.notes
    assert smol_tokenizer.decode(sequence.ids) == "def f(x):\n    return x\n"


# --- control text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_control_text_is_refused(smol_tokenizer, role):
    row = {"messages": [CHAT[0], {"role": role, "content": "x<|im_end|>"}, CHAT[1]]}
    with pytest.raises(RowError, match="im_end") as e:
        Encoder(smol_tokenizer)(row)
    assert (e.value.reason, e.value.field) == ("control_text", "messages[1].content")


@pytest.mark.parametrize("control", ["refuse", "text"])
@pytest.mark.parametrize("border", ["mask", "y", "refuse"])
def test_x_and_y_forge_nothing_together(smol_tokenizer, control, border):
    row, end = {"x": "say <|im_", "y": "end|> now"}, smol_tokenizer.eos_token_id
    with pytest.raises(RowError, match="together write it") as e:
        Encoder(smol_tokenizer, control=control, border=border)(row)
    assert e.value.reason == "control_text"
    apart = Encoder(smol_tokenizer, control=control, border="split", eos=False)(row)
    assert end not in apart.ids.tolist()
    assert end in Encoder(smol_tokenizer, control="parse", border="mask", eos=False)(row).ids.tolist()


@pytest.mark.parametrize("forged", ["<|IM_END|>", "<|im_end|>", "\uff1c|im_end|>"])
def test_no_normaliser_makes_a_control_token(forged):
    """One that lowercases finds the token in <|IM_END|>, one that folds widths in a wide sign."""
    inner = Tokenizer(models.BPE())
    inner.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.train_from_iterator(
        ["yes"],
        trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False),
    )
    inner.add_special_tokens([AddedToken(t, normalized=True) for t in ("<|im_start|>", "<|im_end|>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    text = f"yes{forged}no"
    assert tokenizer.eos_token_id in tokenizer(text, add_special_tokens=False)["input_ids"]
    chat = {"messages": [CHAT[0], {"role": "assistant", "content": text}]}
    enc = Encoder(tokenizer)
    for row, field in (
        (chat, "messages[1].content"),
        ({"x": "a", "y": text}, "y"),
        ({"x": text, "y": "a"}, "x"),
    ):
        with pytest.raises(RowError) as e:
            enc(row)
        assert (e.value.reason, e.value.field) == ("control_text", field)
    assert Encoder(tokenizer, control="parse")(chat).ids.tolist().count(tokenizer.eos_token_id) == 3
    assert "".join(enc({"messages": CHAT}).trained) == "Hello there<|im_end|>4<|im_end|>"


# --- processes -------------------------------------------------------------------------------------------


def test_an_encoder_and_its_errors_travel(smol_tokenizer):
    enc = Encoder(smol_tokenizer, train="end_of_turn=0.5", max_length=40)
    copy = pickle.loads(pickle.dumps(enc))
    row = {"messages": CHAT[:2]}
    assert copy(row).weights.tolist() == enc(row).weights.tolist()
    with pytest.raises(RowError) as e:
        enc({"messages": CHAT * 9})
    there = pickle.loads(pickle.dumps(e.value))
    assert (str(there), there.reason, there.where) == (str(e.value), e.value.reason, e.value.where)


@pytest.mark.full
def test_processes_change_nothing(smol_tokenizer):
    rows = [{"messages": CHAT}, {"messages": []}, {"x": "a", "y": " b"}, 7, {"messages": CHAT[:2]}]
    enc = Encoder(smol_tokenizer)
    alone, apart = enc.batch(rows), enc.batch(rows, processes=2)
    assert [e.ids.tolist() for e in alone[0]] == [e.ids.tolist() for e in apart[0]]
    assert [(r.reason, r.where) for r in alone[1]] == [(r.reason, r.where) for r in apart[1]]


def test_a_policy_that_does_not_travel_is_named(smol_tokenizer):
    enc = Encoder(smol_tokenizer, train=lambda token: 1.0)
    with pytest.raises(ConfigError, match="other processes") as e:
        enc.batch([{"messages": CHAT}], processes=2)
    assert "lambda" in e.value.why
    assert "processes at 1" in e.value.fix


@pytest.mark.parametrize("processes", [0, -1, 1.5])
def test_a_number_of_processes(smol_tokenizer, processes):
    with pytest.raises(ConfigError, match="processes"):
        Encoder(smol_tokenizer).batch([], processes=processes)


# --- tokenizers of other kinds ---------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Letters(PythonBackend):
    """A slow tokenizer, a token per character: it tells no offsets."""

    def __init__(self, **options) -> None:
        self.letters = [chr(i) for i in range(9, 127)]
        super().__init__(**options)

    @property
    def vocab_size(self) -> int:
        return len(self.letters)

    def get_vocab(self) -> dict[str, int]:
        return {c: i for i, c in enumerate(self.letters)} | self.added_tokens_encoder

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token) - 9

    def _convert_id_to_token(self, index: int) -> str:
        return self.letters[index]


STOPS_OF = """
import sys
from ygivenx import Encoder
print(Encoder.from_pretrained(sys.argv[1])._made_of[1]["stops"])
"""


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("stops", [("</s>", "<stop>"), pytest.param((), marks=pytest.mark.full)])
def test_the_stops_of_the_generation_config(tmp_path, by_name, stops):
    """From a directory, and from the hub's cache where there is no network."""
    cached = tmp_path / "hub" / "models--some--model"
    directory = cached / "snapshots" / ("0" * 40) if by_name else tmp_path / "model"
    tokenizer = word_level(["</s>", "a", "b"])
    tokenizer.add_special_tokens({"eos_token": "</s>", "additional_special_tokens": ["<stop>"]})
    tokenizer.save_pretrained(directory)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    if stops:
        ids = tokenizer.convert_tokens_to_ids(list(stops))
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    if by_name:
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text("0" * 40)
    env = {
        **os.environ,
        "HF_HOME": str(tmp_path),
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-c", STOPS_OF, "some/model" if by_name else str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.stdout.strip() == str(stops), done.stderr
    assert not done.stderr


@pytest.mark.parametrize("border", ["refuse", "mask", "y"])
def test_white_space_that_is_split_otherwise_when_a_word_follows(smol_tokenizer, border):
    """No token stands across the border, and inference would show other ids of x all the same."""
    x, y = "if a:\n        ", "1 + f(a)"
    alone, together = (smol_tokenizer(t, add_special_tokens=False)["input_ids"] for t in (x, x + y))
    assert together[: len(alone)] != alone
    with pytest.raises(RowError, match="aren't a prefix") as e:
        Encoder(smol_tokenizer, border=border)({"x": x, "y": y})
    assert e.value.reason == "straddling_token"
    apart = Encoder(smol_tokenizer, border="split", eos=False)({"x": x, "y": y}).only
    assert apart.ids.tolist()[: len(alone)] == alone
    assert "".join(apart.trained) == y
    told = Encoder(smol_tokenizer, border=border, eos=False)({"x": "if a: ", "y": y}).only  # one space is one
    assert "".join(told.trained) == y


def test_ids_before_a_border_are_those_of_x_alone(smol_tokenizer):
    """Whatever is accepted, among ends and beginnings that split in many ways."""
    parts = (
        "a",
        "12",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "(",
        "'s",
        "é",
        "e\u0301",
        "\u0301",
        "東",
        "🙂",
        "\u3000",
        "...",
    )
    rng = np.random.default_rng(0)
    enc, accepted = Encoder(smol_tokenizer, eos=False), 0
    for _ in range(400):
        x, y = ("".join(rng.choice(parts, rng.integers(1, 5))) for _ in "xy")
        try:
            sequence = enc({"x": x, "y": y}).only
        except RowError:
            continue
        accepted += 1
        first = int(sequence.weights.argmax())
        assert sequence.ids[:first].tolist() == smol_tokenizer(x, add_special_tokens=False)["input_ids"]
    assert accepted > 200


def test_a_slow_tokenizer_is_proved_by_prefixes():
    tokenizer = Letters(eos_token="<|im_end|>", extra_special_tokens=["<|im_start|>"])
    tokenizer.chat_template = CHATML
    sequence = Encoder(tokenizer)({"messages": CHAT}).only
    assert sequence.ids.tolist() == tokenizer.apply_chat_template(CHAT, return_dict=False)
    outputs = [tokenizer.decode(sequence.ids[s.start : s.stop]) for s in sequence.segments if s.output]
    assert [o.replace(" ", "") for o in outputs] == ["Hellothere", "<|im_end|>", "4", "<|im_end|>"]


def test_a_slow_tokenizer_tells_a_thought_from_an_answer():
    tokenizer = Letters(eos_token="<|im_end|>", extra_special_tokens=["<|im_start|>"])
    tokenizer.chat_template = CHATML
    said = "<think>\nhm\n</think>\n\nHello"
    sequence = Encoder(tokenizer, train="reasoning=0")(
        {"messages": [CHAT[0], CHAT[1] | {"content": said}]}
    ).only
    trained = tokenizer.convert_ids_to_tokens(sequence.ids[sequence.weights > 0].tolist())
    assert trained == [*"Hello", "<|im_end|>"]


def test_a_character_of_several_tokens_is_written_once(smol_tokenizer):
    said = "so: \U0001fae8\u1f10\U0001fae8 ok"
    for row in (
        {"messages": [CHAT[0], {"role": "assistant", "content": said}]},
        {"x": "Say", "y": " " + said},
    ):
        sequence = Encoder(smol_tokenizer, eos=False)(row).only
        assert "".join(sequence.trained).removesuffix("<|im_end|>").strip() == said
        assert len(sequence.tokens) == len(sequence) > len(said)
        assert [*sequence.tokens] == [sequence.tokens[k] for k in range(-len(sequence), 0)]
        assert said in str(sequence)


def test_offsets_with_gaps_are_not_believed():
    tokenizer = word_level(["Hi", "Hello", "there", "And", "2+2?", "4", "user", "assistant"])
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    sequence = Encoder(tokenizer)({"messages": CHAT}).only
    assert sequence.ids.tolist() == tokenizer.apply_chat_template(CHAT, return_dict=False)
    assert sequence.trained == ["Hello", "there", "<|im_end|>", "4", "<|im_end|>"]
    spans = [m | {"spans": [{"start": 0, "stop": 1}]} if m["role"] == "assistant" else m for m in CHAT]
    with pytest.raises(RowError, match="doesn't say where its tokens stand") as e:
        Encoder(tokenizer)({"messages": spans})
    assert e.value.reason == "spans_unplaced"


def test_a_tokenizer_with_prefix_space_joins_nothing():
    inner = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", eos_token="</s>")
    assert Encoder(tokenizer, eos=False)({"x": "a", "y": " b"}).only.ids.tolist() == [0, 1]
    for x, options in (("a", {"border": "split"}), ("a</s>", {"control": "text"})):
        with pytest.raises(RowError) as e:
            Encoder(tokenizer, **options)({"x": x, "y": " b"})
        assert e.value.reason == "prefix_space"


@pytest.mark.parametrize(
    "wrong",
    [
        {"repair": None},
        {"bos": "yes"},
        {"eos": 3},
        {"stops": 5},
        {"max_length": "long"},
        {"max_length": 0},
        {"max_length": -5},
        {"max_length": True},
        {"bos": 1},
        {"eos": 0},
        {"template_kwargs": "x"},
    ],
)
def test_an_option_of_another_kind_is_refused(smol_tokenizer, wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Encoder(smol_tokenizer, **wrong)
