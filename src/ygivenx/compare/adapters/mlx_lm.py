"""mlx-lm: its ChatDataset, loaded by its file: the package needs Apple's mlx, and this module doesn't."""

import importlib.util
import sys
import types
from pathlib import Path


def encoder(tokenizer, family, **settings):
    """A function from a row to (ids, weights). The trainer's loss begins at the offset."""
    folder = Path(importlib.util.find_spec("mlx_lm").submodule_search_locations[0])
    for name in ("mlx_data", "mlx_data.tuner"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(folder)]
    stub = sys.modules["mlx_data.cli_ui"] = types.ModuleType("mlx_data.cli_ui")
    stub.rprint = print
    spec = importlib.util.spec_from_file_location("mlx_data.tuner.datasets", folder / "tuner" / "datasets.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    data = module.ChatDataset([], tokenizer, **settings)

    def encode(row):
        ids, offset = data.process(row)
        return ids, [i >= offset for i in range(len(ids))]

    return encode
