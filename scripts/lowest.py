"""The lowest release of each dependency that pyproject.toml allows, as constraints for pip: for `make lowest`.

torch keeps the build that is given as the first argument, if one is: its old releases have wheels for CPUs on an index
of its own alone.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
GROUPS = ("train", "lora", "quant")


def lowest(torch: str | None = None) -> list[str]:
    """Lines `name==release`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *(r for g in GROUPS for r in project["optional-dependencies"][g])]
    pins = dict(found.groups() for text in needed if (found := re.match(r"([\w-]+)>=([\w.]+)", text)))
    return [f"{name}=={torch if torch and name == 'torch' else release}" for name, release in pins.items()]


if __name__ == "__main__":
    print("\n".join(lowest(*sys.argv[1:])))
