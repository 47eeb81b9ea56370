"""What the checksum over the weights costs: a model of 100 million parameters, against reading it once.

    python benchmarks/checksum.py

`check_weights` reads every bit of the parameters at each validation. The measure is a plain sum over the same tensors,
which reads them once; a training step reads them many times.
"""

from __future__ import annotations

import sys
import time
from statistics import median

import torch

from distplateau.lockstep.checksum import parameters_digest

PARAMETERS = 100_000_000
REPEATS = 7
TARGET = 10.0


def main() -> int:
    """Print seconds and ratio for float32 and bfloat16, on the GPU where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    worst = 0.0
    for dtype in (torch.float32, torch.bfloat16):
        layers = [torch.full((PARAMETERS // 20,), 0.5, dtype=dtype, device=device) for _ in range(20)]
        seconds: dict[str, list[float]] = {"checksum": [], "read once": []}
        for _ in range(REPEATS):
            for name, run in (("checksum", parameters_digest), ("read once", _read)):
                begin = time.perf_counter()
                run(layers)
                seconds[name].append(time.perf_counter() - begin)
        checksum, read = median(seconds["checksum"]), median(seconds["read once"])
        worst = max(worst, checksum / read)
        print(
            f"{str(dtype).removeprefix('torch.'):10}{PARAMETERS:,} parameters on {device.type}, 1 thread: checksum "
            f"{1e3 * checksum:.1f} ms, reading once {1e3 * read:.1f} ms, {checksum / read:.2f} x"
        )
    if worst > TARGET:
        print(f"MISSED: the checksum costs <= {TARGET:g} x reading the weights once", file=sys.stderr)
    return int(worst > TARGET)


def _read(layers: list[torch.Tensor]) -> float:
    return float(sum(layer.sum() for layer in layers))


if __name__ == "__main__":
    sys.exit(main())
