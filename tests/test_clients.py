"""Our class in place of torch's in the frameworks people use, on two real ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from distplateau import GlobalMean, ReduceLROnPlateau, ShardSampler
from distplateau.lockstep.plateau import NonFiniteMetricError
from ranks import run_ranks

CLIENTS = Path(__file__).parent / "clients"


def launch(script, *words, ranks=2):
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
         str(CLIENTS / script), *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]


def traces(folder, pattern="trace-{}.json", ranks=2):
    return [json.loads((folder / pattern.format(rank)).read_text()) for rank in range(ranks)]


def test_lightning_ranks_that_log_their_own_loss_stay_together(tmp_path):
    pytest.importorskip("lightning")
    launch("lightning_trainer.py", "ours", tmp_path)
    first, second = traces(tmp_path)
    assert first == second
    # The average falls by 0.05 a validation, less than the threshold of 0.055 away from the best: better every second.
    assert first == [0.1, 0.1, 0.05, 0.05, 0.025]


def test_lightning_with_torchs_class_drifts_apart(tmp_path):
    pytest.importorskip("lightning")
    launch("lightning_trainer.py", "torch", tmp_path)
    assert traces(tmp_path) == [[0.1] * 5, [0.1, 0.1, 0.05, 0.025, 0.0125]]


@pytest.mark.parametrize("saved_by", ["ours", "torch"])
def test_a_lightning_checkpoint_is_read(tmp_path, saved_by):
    pytest.importorskip("lightning")
    launch("lightning_trainer.py", saved_by, tmp_path, ranks=1)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=False)
    saved = checkpoint["lr_schedulers"][0]
    for state in (checkpoint, checkpoint["lr_schedulers"], saved):
        optimizer = torch.optim.SGD(
            [torch.nn.Parameter(torch.zeros(1))], lr=checkpoint["optimizer_states"][0]["param_groups"][0]["lr"]
        )
        scheduler = ReduceLROnPlateau(optimizer, patience=0, threshold=0.055, threshold_mode="abs", factor=0.5)
        scheduler.load_state_dict(state)
        assert (scheduler.best, scheduler.num_bad_epochs, scheduler.last_epoch) == (saved["best"], 0, 5)
        assert scheduler.get_last_lr() == saved["_last_lr"]
    with pytest.raises(ValueError, match="states of 2 schedulers"):
        scheduler.load_state_dict({"lr_schedulers": [saved, saved]})


def test_huggingface_steps_once_a_validation_and_resumes(tmp_path):
    pytest.importorskip("transformers")
    launch("huggingface_trainer.py", tmp_path / "whole", 6)
    whole = traces(tmp_path / "whole", "trace-{}-6.json")
    assert whole[0] == whole[1]
    assert [float.fromhex(lr) for lr, _ in whole[0]] == [0.1, 0.1, 0.1, 0.05, 0.05, 0.025, 0.025]
    launch("huggingface_trainer.py", tmp_path / "cut", 3)
    launch("huggingface_trainer.py", tmp_path / "cut", 6)
    begin, rest = traces(tmp_path / "cut", "trace-{}-3.json"), traces(tmp_path / "cut", "trace-{}-6.json")
    assert [begin[rank][:3] + rest[rank] for rank in range(2)] == whole


# A fixed curve per sample: what the ranks measure does not depend on the training, so that one process is the oracle.
CURVE = (1.0, 0.5, 0.5, 0.5, 0.6, 0.6, 0.2, 0.2)


def _accelerate_loop(rank, prepared, split_batches, folder):
    """A user's loop with Accelerate: accumulation, skipped steps, save_state and load_state half way."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=2,
        dataloader_config=DataLoaderConfiguration(split_batches=split_batches),
    )
    torch.manual_seed(0)
    samples = TensorDataset(torch.rand(37, 2, generator=torch.Generator().manual_seed(0)), torch.linspace(0, 1, 37))

    def start():
        model = torch.nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        scheduler = ReduceLROnPlateau(optimizer, patience=1, factor=0.5, warmup_steps=1)
        model, optimizer, train, validation = accelerator.prepare(
            model, optimizer, DataLoader(samples, batch_size=8, shuffle=True), DataLoader(samples, batch_size=8)
        )
        return model, optimizer, train, validation, accelerator.prepare(scheduler) if prepared else scheduler

    model, optimizer, train, validation, scheduler = start()
    trace, count = [], 0.0
    for epoch, scale in enumerate(CURVE):
        if prepared and epoch == 4:
            accelerator.save_state(str(folder))
            accelerator._models.clear(), accelerator._optimizers.clear(), accelerator._schedulers.clear()
            accelerator._dataloaders.clear()
            model, optimizer, train, validation, scheduler = start()
            accelerator.load_state(str(folder))
        for inputs, _ in train:
            with accelerator.accumulate(model):
                accelerator.backward(1e-3 * model(inputs).mean())
                optimizer.step()
                optimizer.zero_grad()
        metric = GlobalMean()
        for _, values in validation:
            metric.update(scale * (values + 1))
        decision = scheduler.step(metric)
        count = metric.count
        trace.append((decision.kind, decision.value.hex(), decision.lr_after[0].hex(), decision.num_bad))
    return trace, count


@pytest.mark.parametrize("split_batches", [False, True])
@pytest.mark.parametrize("prepared", [True, False])
def test_a_loop_with_accelerate(prepared, split_batches, tmp_path):
    [(oracle, _)] = run_ranks(_accelerate_loop, 1, False, False, tmp_path / "alone")
    assert [kind for kind, *_ in oracle].count("reduced") == 2
    for ranks in (2, 4):
        results = run_ranks(_accelerate_loop, ranks, prepared, split_batches, tmp_path / str(ranks))
        assert {count for _, count in results} == {37.0}
        assert all(trace == results[0][0] for trace, _ in results)
        # One optimizer step of warmup, which is over in the first epoch at any number of ranks.
        assert results[0][0] == oracle


def _plain_ddp_loop(rank):
    torch.manual_seed(0)
    data = TensorDataset(torch.rand(37, 2), torch.linspace(0, 1, 37))
    model = DistributedDataParallel(torch.nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler, metric = ReduceLROnPlateau(optimizer, patience=1, factor=0.5), GlobalMean()
    validation = DataLoader(data, batch_size=4, sampler=ShardSampler(data))
    trace = []
    for scale in CURVE:
        model.train()
        for inputs, _ in DataLoader(data, batch_size=4, sampler=DistributedSampler(data)):
            (1e-3 * model(inputs).mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
        for _, values in validation:
            metric.update(scale * (values + 1))
        decision = scheduler.step(metric)
        trace.append((decision.kind, decision.value.hex(), decision.lr_after[0].hex(), metric.count))
    return trace


def test_a_loop_with_plain_ddp():
    [oracle] = run_ranks(_plain_ddp_loop, 1)
    assert [kind for kind, *_ in oracle].count("reduced") == 2
    for ranks in (2, 3, 8):
        assert run_ranks(_plain_ddp_loop, ranks) == [oracle] * ranks


def _one_rank_is_nan(rank, nonfinite, value):
    scheduler = ReduceLROnPlateau(
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), patience=0, nonfinite=nonfinite
    )
    metric, trace = GlobalMean(), []
    for poisoned in (False, True, False):
        metric.update(torch.ones(3))
        if poisoned and rank == 1:
            metric.update(torch.tensor([value]))
        try:
            decision = scheduler.step(metric)
        except NonFiniteMetricError:
            trace.append("raised")
        else:
            trace.append((decision.kind, str(decision.value), decision.best))
    return trace


@pytest.mark.parametrize(
    ("nonfinite", "second"),
    [("bad", ("reduced", "{}", 1.0)), ("ignore", ("ignored", "{}", 1.0)), ("raise", "raised")],
)
@pytest.mark.parametrize("value", ["nan", "-inf", "inf"])
def test_one_nonfinite_value_on_one_rank_is_seen_by_all_alike(nonfinite, second, value):
    first, *others = run_ranks(_one_rank_is_nan, 3, nonfinite, float(value))
    assert others == [first, first]
    assert first[0] == ("improved", "1.0", 1.0)
    assert first[1] == (second if isinstance(second, str) else (second[0], value, second[2]))
