"""Interruption: a signal to any rank, the same step boundary on all of them, and the same bits after a resume."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from distplateau.record.ledger import read_ledger
from distplateau.training import interruption, replica
from distplateau.training.interruption import SIGNALS, Call, Interrupted, Interruption
from distplateau.training.step import TrainStep
from distplateau.training.trainer import Trainer
from ranks import run_ranks
from test_trainer import _train, make_config, same_tensors

KEYS = ("validation", "step", "value", "decision", "lr_before", "lr_after", "best", "num_bad", "digest", "train_loss")


def trace(folder):
    return [[event[key] for key in KEYS] for event in read_ledger(folder / "run").validations]


def _signalled(rank, config, step, victims, number, settle=True, shared=True):
    """Train; the ranks in `victims` get a signal after that step. Return the exit code or the final weights."""
    interruption._ROUND_SECONDS = 0.0  # these runs take less than a second
    call, settle_buckets = TrainStep.__call__, TrainStep.settle_buckets

    def watched(self, at):
        result = call(self, at)
        if rank in victims and at + 1 == step + victims.index(rank):
            os.kill(os.getpid(), number)
        return result

    TrainStep.__call__ = watched
    if not settle:
        TrainStep.settle_buckets = lambda self: None
    share_gradients = replica.share_gradients
    if not shared:
        replica.share_gradients = lambda model: None
    before = [signal.getsignal(n) for n in SIGNALS]
    try:
        result = _train(rank, config)[1]
    except Interrupted as stop:
        result = stop.code, stop.reason, stop.step
    finally:
        TrainStep.__call__, TrainStep.settle_buckets = call, settle_buckets
        replica.share_gradients = share_gradients
        interruption._ROUND_SECONDS = 1.0
    assert [signal.getsignal(n) for n in SIGNALS] == before
    return result


SECTIONS = {
    "model": {"args": {"hidden": [32], "dropout": 0.2}},
    "data": {"augment": ["flip"]},
    "training": {"epochs": 4, "ema": 0.9},
}


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_an_interrupted_run_ends_with_the_bits_of_one_that_was_not(tmp_path, ranks):
    whole = run_ranks(_train, ranks, make_config(tmp_path / "whole", **SECTIONS))
    config = make_config(tmp_path / "cut", **SECTIONS)
    seen = []
    for step, victims, number in (
        (5, [ranks - 1], signal.SIGTERM),
        (25, [0], signal.SIGUSR2),
        (44, list(range(ranks)), signal.SIGUSR1),  # each rank one step later than the one before
    ):
        results = run_ranks(_signalled, ranks, config, step, victims, number)
        assert len(set(results)) == 1, results  # all of them, after the same step
        code, reason, at = results[0]
        assert (code, reason) == (75, number.name)
        seen.append(at)
    resumed = run_ranks(_train, ranks, config)
    for rank in range(ranks):
        assert same_tensors(resumed[rank][1], whole[rank][1])
    assert trace(tmp_path / "cut") == trace(tmp_path / "whole")
    events = [(e["event"], e.get("step")) for e in read_ledger(tmp_path / "cut" / "run").events]
    assert [step for event, step in events if event == "interrupted"] == seen
    assert [step for event, step in events if event == "resumed"] == seen


@pytest.mark.parametrize(
    ("settle", "shared", "same"), [(True, False, True), (False, False, False), (False, True, True)]
)
def test_without_settled_buckets_three_ranks_would_differ(tmp_path, settle, shared, same):
    """Negative control: DDP adds gradients in another order after its first backward pass. Shared memory does not."""
    sections = {"model": {"args": {"hidden": [700, 700]}}, "training": {"epochs": 1}, "optimizer": {"lr": 0.1}}
    whole = run_ranks(_signalled, 3, make_config(tmp_path / "whole", **sections), 0, [], 0, settle, shared)
    config = make_config(tmp_path / "cut", **sections)
    assert run_ranks(_signalled, 3, config, 8, [1], signal.SIGTERM, settle, shared)[0][0] == 75
    resumed = run_ranks(_signalled, 3, config, 0, [], 0, settle, shared)
    assert same_tensors(resumed[0], whole[0]) == same


def test_batchnorm_statistics_of_each_rank_survive(tmp_path):
    sections = {
        "data": {"validation_size": 1300, "global_batch_size": 16},
        "model": {"name": "resnet18", "args": {}},
        "training": {"epochs": 1, "validate_every": "4 steps"},
    }
    whole = run_ranks(_train, 2, make_config(tmp_path / "whole", **sections))
    config = make_config(tmp_path / "cut", **sections)
    assert run_ranks(_signalled, 2, config, 2, [0], signal.SIGTERM)[0][0] == 75
    resumed = run_ranks(_train, 2, config)
    assert same_tensors(resumed[0][1], whole[0][1])
    assert trace(tmp_path / "cut") == trace(tmp_path / "whole")


def _other_ranks(rank, config, step):
    return _signalled(rank, config, step, [0], signal.SIGTERM)


def test_other_ranks_go_on_in_the_middle_of_an_epoch(tmp_path):
    """2 -> 1 -> 4: every validation once, over the same samples, and each training sample once an epoch."""
    config = make_config(tmp_path, training={"epochs": 3})
    steps = [run_ranks(_other_ranks, ranks, config, step)[0][2] for ranks, step in ((2, 7), (1, 20))]
    results = run_ranks(_train, 4, config)
    assert all(same_tensors(weights, results[0][1]) for _, weights in results)
    history = read_ledger(tmp_path / "run")
    assert [event["validation"] for event in history.validations] == [1, 2, 3]
    assert [event["step"] for event in history.validations] == [22, 44, 66]
    assert [event["step"] for event in history.events if event["event"] == "resumed"] == steps


def _cost(rank, steps):
    with Interruption() as vote:
        begin = time.perf_counter()
        for _ in range(steps):
            time.sleep(0.001)
            assert vote.agreed() is Call.NOTHING
        return (time.perf_counter() - begin) / steps, vote._interval


def test_votes_are_rare(tmp_path):
    for seconds, interval in run_ranks(_cost, 2, 300):
        assert interval > 100
        assert seconds < 0.01


def _settles(rank, fast, slow):
    interruption._ROUND_SECONDS = 0.2
    try:
        with Interruption() as vote:
            for seconds in [0.001] * fast + [slow] * 40:
                time.sleep(seconds)
                vote.agreed()
            return vote._interval
    finally:
        interruption._ROUND_SECONDS = 1.0


@pytest.mark.parametrize(("fast", "slow"), [(12, 0.05), (0, 0.05)])
def test_rounds_follow_the_steps(fast, slow):
    """The first steps of a GPU only join its queue: taken at their word, a signal would wait for minutes."""
    first, second = run_ranks(_settles, 2, fast, slow)
    assert first == second
    assert 1 <= first <= 0.2 / slow


def test_rounds_grow_slowly_and_shrink_at_once():
    intervals = [1]
    for step_seconds in (0.01, 0.01, 0.01, 0.01, 3.0, 0.01, 1e-9):
        intervals.append(interruption.next_interval(intervals[-1], step_seconds))
    assert intervals == [1, 2, 4, 8, 16, 1, 2, 4]
    assert interruption.next_interval(900, 1e-9) == 1_000


def test_a_handler_that_is_not_python_s_is_no_error(monkeypatch):
    set_handler = signal.signal
    monkeypatch.setattr(signal, "signal", lambda number, handler: (set_handler(number, handler), None)[1])
    try:
        with Interruption():
            pass
    finally:
        monkeypatch.undo()
        for number in SIGNALS:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


SLOW_DISK = """
import os, signal, sys, threading, time
from distplateau.training.saving import checkpoint
from distplateau.training.step import TrainStep
call, sync = TrainStep.__call__, checkpoint._sync
def slow(path):
    if "partial" in str(path) and "step" in str(path) and int(str(path).split("step-")[1][:8]) >= {since}:
        time.sleep(60)
    sync(path)
def watched(self, at):
    if at == 25:
        os.kill(os.getpid(), signal.SIGINT)
        threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    return call(self, at)
checkpoint._sync, TrainStep.__call__ = slow, watched
from distplateau.cli import main
sys.exit(main(["train", "x.toml"]))
"""


@pytest.mark.parametrize("since", [25, 20])  # the main thread is writing; or waits for the thread that writes
def test_a_second_sigint_does_not_wait_for_the_disk(tmp_path, since):
    (tmp_path / "x.toml").write_text(
        "[data]\nglobal_batch_size = 48\n[tracking]\nwandb = 'disabled'\n[checkpoint]\nevery = '21 steps'\n"
    )
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", SLOW_DISK.format(since=since)],
        cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 75, done.stderr
    assert done.stderr.strip() == "interrupted; the same command continues from the newest checkpoint"
    assert time.monotonic() - begin < 45


EARLY = """
import os, signal, sys
from distplateau.training import setup
def preempted(*_):
    os.kill(os.getpid(), signal.{name})
setup.load = preempted
from distplateau.cli import main
sys.exit(main(["train", "x.toml"]))
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2"])
def test_a_signal_before_training_has_begun_is_an_interruption_too(tmp_path, name):
    (tmp_path / "x.toml").write_text("")
    command = [sys.executable, "-c", EARLY.format(name=name)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 75, done.stderr
    assert done.stderr.strip() == f"interrupted by {name} outside of training; the same command goes on"


def test_a_second_sigint_stops_at_once():
    with Interruption() as vote:
        os.kill(os.getpid(), signal.SIGINT)
        assert vote.agreed() is Call.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_sigterm_to_accelerate_launch(tmp_path):
    """Its agent passes the signal on and gives the workers 30 seconds."""
    root = Path(__file__).parent.parent
    (tmp_path / "long.toml").write_text(
        "[run]\nname = 'long'\n[model.args]\nhidden = [16]\n[training]\nepochs = 3000\n[tracking]\nwandb = 'disabled'\n"
    )
    process = subprocess.Popen(
        [Path(sys.executable).parent / "accelerate", "launch", "--config_file", root / "launch/cpu.yaml",
         "-m", "distplateau", "train", "long.toml"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip
    assert process.stdout is not None
    while not process.stdout.readline().startswith("epoch"):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    [event] = [e for e in read_ledger(tmp_path / "runs/long").events if e["event"] == "interrupted"]
    assert event["reason"] == "SIGTERM"
    assert f"interrupted by SIGTERM after step {event['step']}; the same command goes on from there" in error
    assert list((tmp_path / "runs/long/checkpoints").glob(f"step-{event['step']:08d}"))


def test_weights_stay_as_they_were_when_buckets_settle(tmp_path):
    run_ranks(_settle, 2, make_config(tmp_path, model={"name": "resnet18", "args": {}}, data={"validation_size": 1400}))


def _settle(rank, config):
    from accelerate import Accelerator

    from distplateau.training.setup import prepare_parts

    trainer = Trainer(config, prepare_parts(config), Accelerator(cpu=True))
    before = {name: tensor.clone() for name, tensor in trainer.replica.network.state_dict().items()}
    trainer.replica.model.train()
    trainer.train_step.settle_buckets()
    after = trainer.replica.network.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(p.grad is None for p in trainer.replica.network.parameters())
