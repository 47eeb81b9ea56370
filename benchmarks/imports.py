"""What ``import distplateau`` adds to ``import torch``.

    python benchmarks/imports.py

Fresh interpreters in turns; the import is timed inside them. Measured are the bare import and the import of what a
training script uses.
"""

from __future__ import annotations

import subprocess
import sys
from statistics import median

REPEATS = 7
TARGET = 0.05
ADDED = {
    "import distplateau": "import distplateau",
    "from distplateau import ReduceLROnPlateau, GlobalMean": "from distplateau import ReduceLROnPlateau, GlobalMean",
}
TIMED = """
import time
begin = time.perf_counter(); import torch; torch_seconds = time.perf_counter() - begin
begin = time.perf_counter(); {statement}; print(torch_seconds, time.perf_counter() - begin)
"""


def main() -> int:
    """Print the share of each import, and what misses its target."""
    shares: dict[str, list[float]] = {name: [] for name in ADDED}
    for _ in range(REPEATS):
        for name, statement in ADDED.items():
            code = TIMED.format(statement=statement)
            output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
            torch_seconds, ours = map(float, output.split())
            shares[name].append(ours / torch_seconds)
    missed = [name for name, values in shares.items() if median(values) >= TARGET]
    for name, values in shares.items():
        print(f"{100 * median(values):6.2f} % of import torch: {name}")
    for name in missed:
        print(f"MISSED: {name} adds < {100 * TARGET:g} %", file=sys.stderr)
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
