"""The table of all causal model types: a few of them here, all of them where there is time."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "models_table.py"
# (type, how its sequences are computed)
SLICE = [
    ("qwen3_moe", "shared"),
    ("deepseek_v3", "shared"),
    ("gemma4_text", "shared"),
    ("qwen3_5_text", "shared"),
    ("falcon_h1", "shared"),
    ("falcon", "shared"),
    ("bloom", "unshared"),
    ("bert", "looks ahead"),
]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def table():
    spec = importlib.util.spec_from_file_location("models_table", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["models_table"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("name", "kind"), SLICE)
def test_a_type_is_exact(name, kind, table):
    line = table.measure(name)
    assert line.kind == kind, line
    assert line.exact or kind == "looks ahead", line


@pytest.mark.full
def test_of_all_types_that_are_built_nearly_all_are_exact_and_most_share(table):
    lines = [table.measure(name) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    causal = [line for line in lines if line.kind not in ("looks ahead", "not built")]
    assert len(causal) > 150
    assert len([line for line in lines if line.kind == "not built"]) < 10
    assert not [line for line in causal if line.kind != "refused" and not line.exact]
    assert sum(line.exact for line in causal) >= 0.95 * len(causal)
    assert sum(line.kind == "shared" for line in causal) >= 0.75 * len(causal)
