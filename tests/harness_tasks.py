"""Small local tasks for lm-evaluation-harness, made from the open data: YAML beside JSON Lines."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml


def write_tasks(folder: Path, data: Path, rows: int = 12) -> list[str]:
    """Write the tasks into a folder for `--include_path`; their names."""
    tasks = {
        "local_xquad": _choice(folder, "xquad", _xquad(data, rows), "{{context}}\n\nQ: {{question}}\nA:"),
        "local_gsm8k": _choice(folder, "gsm8k", _gsm8k(data, rows), "Q: {{question}}\nA:")
        | {"num_fewshot": 3, "fewshot_split": "test", "fewshot_config": {"sampler": "first_n"}},
        "local_parenthesis": _choice(folder, "parenthesis", _gsm8k(data, rows, "({})"), "Q: {{question}}\nA:")
        | {"target_delimiter": ""},
        "local_rolling": _task(folder, "rolling", _xquad(data, 2))
        | {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{context}}",
            "metric_list": [{"metric": "byte_perplexity"}],
        },
        "local_generation": _task(folder, "generation", _gsm8k(data, 2))
        | {
            "output_type": "generate_until",
            "doc_to_text": "Q: {{question}}\nA:",
            "doc_to_target": "{{choices[0]}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, config in tasks.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | config))
    return list(tasks)


def _task(folder: Path, name: str, rows: list[dict]) -> dict:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    files = {"test": str(path)}
    return {"dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}


def _choice(folder: Path, name: str, rows: list[dict], text: str) -> dict:
    return _task(folder, name, rows) | {
        "output_type": "multiple_choice",
        "doc_to_text": text,
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }


def _xquad(data: Path, rows: int) -> list[dict]:
    """Four answers of one passage as the choices of each of its questions."""
    out = []
    for article in json.loads((data / "xquad/xquad.en.json").read_text())["data"]:
        for passage in article["paragraphs"]:
            answers = list(dict.fromkeys(q["answers"][0]["text"] for q in passage["qas"]))
            for question in passage["qas"] if len(answers) >= 4 else []:
                right = question["answers"][0]["text"]
                choices = sorted([right, *[a for a in answers if a != right][:3]])
                out.append(
                    {
                        "context": passage["context"],
                        "question": question["question"],
                        "choices": choices,
                        "label": choices.index(right),
                    }
                )
    return out[:rows]


def _gsm8k(data: Path, rows: int, form: str = "{}") -> list[dict]:
    out = []
    for line in (data / "gsm8k/train.jsonl").read_text().splitlines():
        row = json.loads(line)
        final = row["answer"].rpartition("#### ")[2]
        if re.fullmatch(r"\d+", final):
            n = int(final)
            choices = [form.format(v) for v in (n, n + 1, n + 10, n * 2 + 3)]
            out.append({"question": row["question"], "choices": choices, "label": 0})
        if len(out) == rows:
            return out
    return out
