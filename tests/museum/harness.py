"""What exhibits are made of: real rows, the real tokenizer, a tiny model, and the trainers as they are installed."""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from ygivenx.encoder.encode import Encoder
from ygivenx.proof.auditing import Report, audit

HEAD = """{%- if messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' -}}
{%- endif -%}"""
# ChatML with the markers that tell transformers which tokens the assistant writes.
MARKED = (
    HEAD
    + """{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- '<|im_start|>assistant\\n' -}}{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
{{- '\\n' -}}
{%- else -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""
)
MARKED_WITHOUT_END = MARKED.replace(
    "message['content'] + '<|im_end|>' -}}{%- endgeneration -%}",
    "message['content'] -}}{%- endgeneration -%}{{- '<|im_end|>' -}}",
)
# The generation prompt opens the reasoning, as several reasoning models' templates do.
PREFILLED = MARKED.replace(
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}",
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n' -}}",
)
# Earlier reasoning disappears once a new user turn follows, as in Qwen3's template.
FORGETFUL = HEAD + (
    """{%- set ns = namespace(last=0) -%}
{%- for message in messages -%}{%- if message['role'] == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- set content = message['content'] -%}
{%- if message['role'] == 'assistant' and loop.index0 < ns.last and '</think>' in content -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{- '<|im_start|>' + message['role'] + '\\n' + content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""
)
# Tools are declared in the system turn, calls and results have turns of their own.
TOOLS = """{%- if tools -%}{{- '<|im_start|>system\\nTools: ' + tools | tojson + '<|im_end|>\\n' -}}{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] -%}{{- message['content'] -}}{%- endif -%}
{%- if message['tool_calls'] is defined and message['tool_calls'] -%}
{%- for call in message['tool_calls'] -%}
{{- '<tool_call>' + call['function'] | tojson + '</tool_call>' -}}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""


@dataclass
class Setup:
    """Real rows and a real tokenizer; every trainer is made anew on a tiny random model with all its words."""

    tokenizer: Any
    data: Path
    dtype: torch.dtype = torch.float32
    _dirs: list[tempfile.TemporaryDirectory] = field(default_factory=list)

    def close(self) -> None:
        """Delete what the trainers wrote."""
        for folder in self._dirs:
            folder.cleanup()

    # -- rows

    def chats(self, count: int = 12, longest: int = 320) -> list[dict[str, Any]]:
        """Short question–answer pairs of GSM8K as conversations."""
        rows = []
        with (self.data / "gsm8k/train.jsonl").open() as lines:
            for line in lines:
                row = json.loads(line)
                if len(row["question"]) + len(row["answer"]) < longest:
                    user, reply = (
                        {"role": r, "content": row[k]}
                        for r, k in (("user", "question"), ("assistant", "answer"))
                    )
                    rows.append({"messages": [user, reply]})
                if len(rows) == count:
                    return rows
        raise ValueError("the data has fewer rows")

    def dialogues(self, count: int = 6) -> list[dict[str, Any]]:
        """Two turns each: two GSM8K pairs in a row."""
        single = self.chats(2 * count, longest=260)
        return [
            {"messages": a["messages"] + b["messages"]}
            for a, b in zip(single[::2], single[1::2], strict=True)
        ]

    def pairs(self, count: int = 12) -> list[dict[str, Any]]:
        """The same as prompt and completion messages."""
        return [{"prompt": r["messages"][:1], "completion": r["messages"][1:]} for r in self.chats(count)]

    def tool_chats(self, count: int = 4) -> list[dict[str, Any]]:
        """Conversations with tool calls and results, from glaive's function-calling set."""
        roles = {"human": "user", "gpt": "assistant", "observation": "tool"}
        rows = []
        for row in json.loads((self.data / "llamafactory/glaive_toolcall_en_demo.json").read_text()):
            turns = row["conversations"]
            if (
                not any(t["from"] == "function_call" for t in turns)
                or sum(len(t["value"]) for t in turns) > 900
            ):
                continue
            messages = []
            for t in turns:
                if t["from"] == "function_call":
                    call = json.loads(t["value"])
                    if isinstance(call["arguments"], str):
                        call["arguments"] = json.loads(call["arguments"])
                    messages.append(
                        {
                            "role": "assistant",
                            "content": "",
                            "tool_calls": [{"type": "function", "function": call}],
                        }
                    )
                else:
                    messages.append({"role": roles[t["from"]], "content": t["value"]})
            rows.append({"messages": messages})
            if len(rows) == count:
                break
        return rows

    # -- tokens

    def tok(self, template: str | None = None) -> Any:
        """A tokenizer of its own, with the template if one is given."""
        tokenizer = copy.deepcopy(self.tokenizer)
        if template is not None:
            tokenizer.chat_template = template
        return tokenizer

    def rendered(self, rows: list[dict[str, Any]], tokenizer: Any = None) -> list[str]:
        tokenizer = tokenizer or self.tokenizer
        return [tokenizer.apply_chat_template(r["messages"], tokenize=False) for r in rows]

    def encoded(self, rows: list[dict[str, Any]], **options: Any) -> list[dict[str, list[int]]]:
        """input_ids and labels of rows by our encoder: what a trainer should be given."""
        examples, rejected = Encoder(options.pop("tokenizer", self.tokenizer), **options).batch(rows)
        assert not rejected, rejected
        return [
            {"input_ids": s.ids.tolist(), "labels": s.labels.tolist()} for e in examples for s in e.sequences
        ]

    # -- models and trainers

    def model(self, **config: Any) -> LlamaForCausalLM:
        torch.manual_seed(0)
        settings = {
            "vocab_size": len(self.tokenizer), "hidden_size": 32, "intermediate_size": 32,
            "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
            "max_position_embeddings": 2048, "initializer_range": 0.1, "tie_word_embeddings": True,
            "eos_token_id": self.tokenizer.eos_token_id, "pad_token_id": self.tokenizer.pad_token_id,
            "bos_token_id": self.tokenizer.bos_token_id,
        }  # fmt: skip
        return LlamaForCausalLM(LlamaConfig(**settings | config)).to(self.dtype)

    def arguments(
        self, kind: type[TrainingArguments] = TrainingArguments, **options: Any
    ) -> TrainingArguments:
        self._dirs.append(tempfile.TemporaryDirectory())
        settings = {
            "output_dir": self._dirs[-1].name, "per_device_train_batch_size": 2, "report_to": [],
            "use_cpu": True, "bf16": False, "disable_tqdm": True, "gradient_checkpointing": False,
        }  # fmt: skip
        return kind(**settings | options)

    def sft(
        self, rows: list[dict[str, Any]], *, tokenizer: Any = None, model: Any = None, **options: Any
    ) -> Any:
        """TRL's SFTTrainer; everything that isn't given is its default."""
        from trl import SFTConfig, SFTTrainer

        extra = {k: options.pop(k) for k in ("peft_config", "eval_dataset") if k in options}
        return SFTTrainer(
            model=model or self.model(),
            args=self.arguments(SFTConfig, **options),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer or self.tok(),
            **extra,
        )

    def hf(
        self,
        features: list[dict[str, Any]],
        *,
        kind: type[Trainer] = Trainer,
        tokenizer: Any = None,
        **options: Any,
    ) -> Trainer:
        """transformers' Trainer over token ids; without a collator, one that pads labels with −100."""
        from transformers import DataCollatorForSeq2Seq

        tokenizer = tokenizer or self.tok()
        extra = {k: options.pop(k) for k in ("eval_dataset", "compute_loss_func") if k in options}
        collator = options.pop("data_collator", None) or DataCollatorForSeq2Seq(tokenizer)
        model = options.pop("model", None)
        return kind(
            model=model or self.model(),
            args=self.arguments(**options),
            train_dataset=Dataset.from_list(features),
            data_collator=collator,
            processing_class=tokenizer,
            **extra,
        )

    def on_two_ranks(self, features: list[dict[str, Any]], **options: Any) -> Report:
        """The audit of transformers' Trainer in two gloo processes, as rank 0 reports it."""
        with tempfile.TemporaryDirectory() as folder:
            task = {"features": features, "options": options, "vocab_size": len(self.tokenizer)}
            (Path(folder) / "task.json").write_text(json.dumps(task))
            command = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
            script = str(Path(__file__).with_name("ranks.py"))
            subprocess.run(
                [sys.executable, *command, script, folder], check=True, capture_output=True, timeout=150
            )
            told = json.loads((Path(folder) / "report.json").read_text())
        return Report.from_dict(told)

    def audit(
        self, trainer: Any = None, rows: Any = None, *, tokenizer: Any = None, **options: Any
    ) -> Report:
        """The audit as a user would call it, the encoder's options aside."""
        encoder = Encoder(tokenizer or self.tokenizer) if rows is not None else None
        return audit(rows, encoder, trainer=trainer, **options)


class quiet(warnings.catch_warnings):
    """Other libraries' warnings are not what is tested here."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)

    def __exit__(self, *error: object) -> None:
        logging.disable(logging.NOTSET)
        super().__exit__(*error)
