"""The resident memory of a command and of all its processes together, at its most: `python scripts/resident.py CMD`.

`time -v` has the largest process alone. RSS counts pages that processes share in each of them, PSS once.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path


def processes(root: int) -> list[int]:
    """A process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            stat = Path(f"/proc/{name}/stat").read_text()
        except OSError:  # it has ended
            continue
        parent = int(stat.rpartition(")")[2].split()[1])  # a name may hold spaces and brackets
        children.setdefault(parent, []).append(int(name))
    found = [root]
    for process in found:
        found += children.get(process, [])
    return found


def memory(process: int) -> tuple[int, int]:
    """(RSS, PSS) in KiB; 0 of one that has ended."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().split("\n")
    except OSError:
        return 0, 0
    sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith("kB")}
    return sizes.get("Rss", 0), sizes.get("Pss", 0)


def main() -> int:
    command = subprocess.Popen(sys.argv[1:])
    most = (0, 0)
    while command.poll() is None:
        rss, pss = map(sum, zip(*map(memory, processes(command.pid)), strict=True))
        most = max(most[0], rss), max(most[1], pss)
        time.sleep(0.5)
    rss, pss = (kib * 1024 / 1e9 for kib in most)
    print(f"at most {rss:.2f} GB resident, {pss:.2f} GB with shared pages counted once")
    return command.returncode


if __name__ == "__main__":
    sys.exit(main())
