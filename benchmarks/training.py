"""Training speed: our trainer with everything switched on against loops by hand and Lightning, on 2 CPU processes.

    python benchmarks/training.py [EPOCHS]

Same model (784-512-256-10), optimizer (Adam), global batch (64) and data (Fashion-MNIST) for all. One repeat runs every
candidate in turn; what counts are the ratios of medians over the repeats. The time is that of a whole epoch with its
validation; the first epoch of each candidate is left out. Memory is the peak of one process. Ours writes its ledger, an
offline wandb run, checkpoints and progress lines meanwhile. Exits with 1 if a target is missed.

- by hand: DistributedDataParallel over torchvision's dataset and a DataLoader, as tutorials have it
- tuned: what a careful person writes: fused Adam, gradients as bucket views, tensors sliced in batches, no item()
- lightning: the same model in a Trainer, over torchvision and a DataLoader, and over tensors in memory
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

REPEATS = 3
RANKS = 2
GLOBAL_BATCH = 64
TARGETS = {"by hand": 2.0, "lightning": 2.5, "lightning, tensors": 1.7, "tuned": 0.97}
CANDIDATES = ("ours", "tuned", "by hand", "lightning", "lightning, tensors")


def main() -> int:
    """Print seconds per epoch, ratios and memory, and what misses its target."""
    epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in CANDIDATES}
    for _ in range(REPEATS):
        for name in CANDIDATES:
            results[name].append(_run(name, epochs))
    seconds = {name: median(pair[0] for pair in pairs) for name, pairs in results.items()}
    memory = {name: median(pair[1] for pair in pairs) for name, pairs in results.items()}
    print(f"Fashion-MNIST, 784-512-256-10, Adam, global batch {GLOBAL_BATCH}, {RANKS} CPU processes")
    for name in CANDIDATES:
        ratio = seconds[name] / seconds["ours"]
        print(f"  {name:20}{seconds[name]:8.2f} s an epoch  {ratio:6.2f} x ours  {memory[name]:7.0f} MiB peak")
    missed = [f"{name} >= {t:g} x ours" for name, t in TARGETS.items() if seconds[name] < t * seconds["ours"]]
    missed += [] if memory["ours"] < memory["lightning"] else ["memory below Lightning's"]
    for claim in missed:
        print(f"MISSED: {claim}", file=sys.stderr)
    return int(bool(missed))


def _run(name: str, epochs: int) -> tuple[float, float]:
    """Return the median seconds of an epoch and the peak memory of a process in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS),
            str(Path(__file__).with_name("_training_candidates.py")), name, str(epochs), folder,
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{name}:\n{done.stderr[-3000:]}")
        result = json.loads(Path(folder, "result.json").read_text())
    return median(result["seconds"][1:]), result["peak_mib"]


if __name__ == "__main__":
    sys.exit(main())
