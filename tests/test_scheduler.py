"""The scheduler people swap in: torch's interface, one decision on all ranks, every guard with its negative control."""

from __future__ import annotations

import copy
import math
import pickle
import random
import subprocess
import sys
import warnings

import pytest
import torch
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.lr_scheduler import ReduceLROnPlateau as TorchPlateau

from distplateau import GlobalMean, ReduceLROnPlateau
from distplateau.lockstep.consensus import DisagreementError
from distplateau.lockstep.metric import StaleMetricError
from distplateau.lockstep.plateau import PlateauRule
from distplateau.lockstep.scheduler import make_scheduler
from distplateau.lockstep.schedules import SCHEDULES, Length
from ranks import run_ranks


def sgd(lr=1.0, groups=1, tensor_lr=False, **options):
    value = torch.tensor(lr) if tensor_lr else lr
    params = [{"params": [torch.nn.Parameter(torch.ones(3))], "lr": copy.deepcopy(value)} for _ in range(groups)]
    return torch.optim.SGD(params, lr=value, **options)


# The interface of torch's class.


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_same_learning_rates_as_torch(mode, tensor_lr):
    rng = random.Random(1)
    options = {"mode": mode, "factor": 0.3, "patience": 2, "cooldown": 1, "threshold": 1e-2, "min_lr": 1e-4}
    ours, theirs = sgd(0.7, 2, tensor_lr), sgd(0.7, 2, tensor_lr)
    mine, torchs = ReduceLROnPlateau(ours, **options), TorchPlateau(theirs, **options)
    for _ in range(300):
        metric = rng.choice([0.5, 0.505, 0.51, 1.0, rng.random()])
        mine.step(metric)
        torchs.step(metric)
        assert [float(g["lr"]) for g in ours.param_groups] == [float(g["lr"]) for g in theirs.param_groups]
        assert (mine.best, mine.num_bad_epochs, mine.cooldown_counter, mine.in_cooldown, mine.last_epoch) == (
            torchs.best,
            torchs.num_bad_epochs,
            torchs.cooldown_counter,
            torchs.in_cooldown,
            torchs.last_epoch,
        )


def test_is_torchs_class_with_its_names_order_and_defaults():
    import inspect

    ours = list(inspect.signature(ReduceLROnPlateau).parameters.values())
    theirs = list(inspect.signature(TorchPlateau).parameters.values())
    for mine, torchs in zip(ours, theirs, strict=False):
        assert (mine.name, mine.default, mine.kind) == (torchs.name, torchs.default, torchs.kind)
    scheduler = ReduceLROnPlateau(sgd(), "max", 0.5, 3, 0.1, "abs", 1, 0.01, 1e-9)
    assert isinstance(scheduler, TorchPlateau)
    assert isinstance(scheduler, LRScheduler)
    assert (scheduler.mode, scheduler.factor, scheduler.patience, scheduler.threshold) == ("max", 0.5, 3, 0.1)
    assert (scheduler.threshold_mode, scheduler.cooldown, scheduler.min_lrs, scheduler.eps) == ("abs", 1, [0.01], 1e-9)


def test_a_tensor_learning_rate_keeps_its_identity():
    optimizer = sgd(tensor_lr=True)
    held = optimizer.param_groups[0]["lr"]
    scheduler = ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    scheduler.step(1.0)
    scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] is held
    assert held.item() == 0.5


def test_settings_can_be_changed_while_training():
    scheduler = ReduceLROnPlateau(sgd(), patience=10)
    scheduler.patience = 0
    scheduler.step(1.0)
    assert scheduler.step(1.0).kind == "reduced"
    scheduler.num_bad_epochs, scheduler.best, scheduler.cooldown_counter = 0, math.inf, 2
    assert scheduler.step(5.0).kind == "improved"
    assert scheduler.in_cooldown


def test_verbose_prints_one_line_per_reduction(capsys):
    scheduler = ReduceLROnPlateau(sgd(), patience=0, factor=0.5, verbose=True)
    for metric in (1.0, 2.0, 0.5, 3.0):
        scheduler.step(metric)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("validation 2: learning rate reduced 1 -> 0.5")


def test_without_a_metric_is_an_error():
    with pytest.raises(TypeError, match="needs the validation metric"):
        ReduceLROnPlateau(sgd()).step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 1.0}, "factor=1.0"),
        ({"mode": "mn"}, "mode='mn'"),
        ({"patience": -1}, "patience=-1"),
        ({"min_lr": [0.1, 0.2, 0.3]}, "min_lr has 3 entries for 1"),
        ({"eps": 2.0}, "eps=2.0 blocks every drop"),
        ({"smoothing": 1.0}, "smoothing=1.0"),
    ],
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ReduceLROnPlateau(sgd(), **options)


# Warmup, hand edits, callbacks.


def test_warmup_through_the_optimizers_own_steps():
    optimizer = sgd(1.0)
    scheduler = ReduceLROnPlateau(optimizer, warmup_steps=4)
    seen = []
    for _ in range(6):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step_update()  # as well: nothing is counted twice
    assert seen == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_warmup_through_step_update_alone():
    optimizer = sgd(1.0)
    scheduler = ReduceLROnPlateau(optimizer, warmup_steps=4)
    for expected in (0.5, 0.75, 1.0, 1.0):
        scheduler.step_update()
        assert optimizer.param_groups[0]["lr"] == expected


def test_plateau_waits_for_the_warmup():
    optimizer = sgd(1.0)
    scheduler = ReduceLROnPlateau(optimizer, warmup_steps=3, patience=0)
    for _ in range(2):
        optimizer.step()
        assert scheduler.step(9.0).kind == "warmup"
    optimizer.step()
    assert scheduler.step(9.0).kind == "improved"
    assert scheduler.step(9.0).kind == "reduced"


def test_warmup_without_optimizer_steps_is_told():
    scheduler = ReduceLROnPlateau(sgd(), warmup_steps=5)
    with pytest.warns(UserWarning, match="no optimizer step was seen"):
        scheduler.step(1.0)


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_a_value_changed_by_hand_is_respected(tensor_lr):
    optimizer = sgd(1.0, tensor_lr=tensor_lr)
    scheduler = ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    scheduler.step(1.0)
    if tensor_lr:
        optimizer.param_groups[0]["lr"].fill_(0.25)
    else:
        optimizer.param_groups[0]["lr"] = 0.25
    decision = scheduler.step(1.0)
    assert (decision.lr_before, decision.lr_after) == ((0.25,), (0.125,))


@pytest.mark.parametrize("accumulation", [1, 4])
def test_step_update_more_often_than_the_optimizer_steps_counts_nothing_twice(accumulation):
    """With gradient accumulation a loop calls it for every micro-batch, and after a resume once more from the start."""
    optimizer = sgd(1.0)
    scheduler, seen = ReduceLROnPlateau(optimizer, warmup_steps=8), []
    for micro_batch in range(4 * accumulation):
        if micro_batch % accumulation == accumulation - 1:
            scheduler.step_update()  # before the step as well
            optimizer.step()
            seen.append(scheduler.state.step)
        scheduler.step_update()
    assert seen == [1, 2, 3, 4]


def test_the_first_step_is_made_with_the_first_rate_of_the_warmup():
    optimizer, used = sgd(1.0), []
    scheduler = ReduceLROnPlateau(optimizer, warmup_steps=8)
    optimizer.register_step_pre_hook(lambda *_: used.append(optimizer.param_groups[0]["lr"]))
    for _ in range(3):
        scheduler.step_update()
    optimizer.step()
    optimizer.step()
    assert used == [0.125, 0.25]


@pytest.mark.parametrize("way", [copy.deepcopy, lambda scheduler: pickle.loads(pickle.dumps(scheduler))])
def test_a_copy_follows_its_own_optimizer(way):
    scheduler = ReduceLROnPlateau(sgd(1.0), warmup_steps=5)
    scheduler.optimizer.step()
    twin = way(scheduler)
    twin.optimizer.step()
    twin.step_update()
    assert (twin.state.step, scheduler.state.step) == (2, 1)
    assert (twin.get_last_lr(), scheduler.get_last_lr()) == ([0.6], [0.4])


def test_a_learning_rate_tensor_that_torch_shares_between_groups():
    rate = torch.tensor(1.0)
    optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.ones(1))]} for _ in range(2)], lr=rate)
    assert optimizer.param_groups[0]["lr"] is optimizer.param_groups[1]["lr"]  # else there is nothing to test
    scheduler = ReduceLROnPlateau(optimizer, factor=(0.5, 0.25), patience=0)
    lrs = [scheduler.step(1.0).lr_after for _ in range(3)]
    assert lrs == [(1.0, 1.0), (0.5, 0.25), (0.25, 0.0625)]
    assert scheduler.get_last_lr() == [0.25, 0.0625]
    assert optimizer.param_groups[0]["lr"] is rate


def test_a_hand_edit_during_warmup_moves_the_peak():
    optimizer = sgd(1.0)
    scheduler = ReduceLROnPlateau(optimizer, warmup_steps=4)
    optimizer.param_groups[0]["lr"] = 0.5  # twice the 0.25 of the first step
    scheduler.step_update()
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_a_group_added_later_is_scheduled_too():
    optimizer = sgd(1.0)
    scheduler = ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    scheduler.step(1.0)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "lr": 0.2})
    assert scheduler.step(1.0).lr_after == (0.5, 0.1)


def test_on_reduce_is_called_with_the_decision():
    seen = []
    scheduler = ReduceLROnPlateau(sgd(), patience=0, on_reduce=[seen.append])
    decisions = [scheduler.step(metric) for metric in (1.0, 2.0, 0.5, 0.6)]
    assert seen == [d for d in decisions if d.kind == "reduced"]
    assert len(seen) == 2


# State.


def trace(scheduler, optimizer, metrics):
    lines = []
    for metric in metrics:
        optimizer.step()
        scheduler.step_update()
        decision = scheduler.step(metric)
        lines.append((decision.kind, decision.lr_after, decision.best, decision.num_bad))
    return lines


OPTIONS = {"factor": 0.6, "patience": 1, "cooldown": 1, "warmup_steps": 4, "start_after": 5, "smoothing": 0.7}


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_resume_at_every_validation_gives_the_same_trace(tensor_lr):
    rng = random.Random(7)
    metrics = [rng.uniform(0.5, 1.5) / (1 + 0.05 * i) for i in range(40)]
    optimizer = sgd(0.3, 2, tensor_lr)
    whole = trace(ReduceLROnPlateau(optimizer, **OPTIONS), optimizer, metrics)
    for cut in range(len(metrics)):
        first = sgd(0.3, 2, tensor_lr)
        scheduler = ReduceLROnPlateau(first, **OPTIONS)
        head = trace(scheduler, first, metrics[:cut])
        saved = copy.deepcopy((scheduler.state_dict(), first.state_dict()))
        second = sgd(0.3, 2, tensor_lr)
        resumed = ReduceLROnPlateau(second, **OPTIONS)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if cut % 2:  # either order of loading
                second.load_state_dict(saved[1])
                resumed.load_state_dict(saved[0])
            else:
                resumed.load_state_dict(saved[0])
                second.load_state_dict(saved[1])
            assert head + trace(resumed, second, metrics[cut:]) == whole, cut


@pytest.mark.parametrize("counter", ["num_bad", "cooldown", "validations", "step", "smoothed", "best"])
def test_leaving_out_one_counter_changes_the_trace(counter):
    """Negative control of the test above: each counter is needed."""
    rng = random.Random(7)
    metrics = [rng.uniform(0.5, 1.5) / (1 + 0.05 * i) for i in range(40)]
    optimizer = sgd(0.3)
    whole = trace(ReduceLROnPlateau(optimizer, **OPTIONS), optimizer, metrics)
    differs = False
    for cut in range(len(metrics)):
        first = sgd(0.3)
        scheduler = ReduceLROnPlateau(first, **OPTIONS)
        head = trace(scheduler, first, metrics[:cut])
        saved = copy.deepcopy((scheduler.state_dict(), first.state_dict()))
        fresh = ReduceLROnPlateau(sgd(0.3), **OPTIONS).state_dict()["lockstep"]
        saved[0]["lockstep"][counter] = fresh[counter]
        second = sgd(0.3)
        resumed = ReduceLROnPlateau(second, **OPTIONS)
        resumed.load_state_dict(saved[0])
        second.load_state_dict(saved[1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            differs |= head + trace(resumed, second, metrics[cut:]) != whole
    assert differs


def test_state_is_plain_and_torchs_class_reads_the_common_part():
    import json

    scheduler = ReduceLROnPlateau(sgd(), patience=3)
    for metric in (1.0, 2.0, 2.0):
        scheduler.step(metric)
    state = json.loads(json.dumps(scheduler.state_dict()))
    theirs = TorchPlateau(sgd())
    theirs.load_state_dict(state)
    assert (theirs.best, theirs.num_bad_epochs, theirs.patience, theirs.last_epoch) == (1.0, 2, 3, 3)


def test_reads_torchs_state():
    theirs = TorchPlateau(sgd(), patience=3, cooldown=2, factor=0.5)
    for metric in (1.0, 2.0, 2.0, 2.0, 2.0, 2.0):
        theirs.step(metric)
    ours_optimizer = sgd(theirs.get_last_lr()[0])
    ours = ReduceLROnPlateau(ours_optimizer, patience=3, cooldown=2, factor=0.5)
    ours.load_state_dict(theirs.state_dict())
    for metric in (2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 0.5, 2.0):
        ours.step(metric)
        theirs.step(metric)
        assert ours.get_last_lr() == theirs.get_last_lr()
        assert (ours.best, ours.num_bad_epochs, ours.cooldown_counter) == (
            theirs.best,
            theirs.num_bad_epochs,
            theirs.cooldown_counter,
        )


@pytest.mark.parametrize("state", [{"best": 0.25, "last_epoch": 4}, {"best": None, "last_epoch": 0}])
def test_reads_timms_state(state):
    scheduler = ReduceLROnPlateau(sgd())
    scheduler.load_state_dict(state)
    assert scheduler.best == (state["best"] or math.inf)
    assert scheduler.last_epoch == state["last_epoch"]


def test_a_foreign_state_is_refused():
    with pytest.raises(ValueError, match="not a state of a plateau scheduler"):
        ReduceLROnPlateau(sgd()).load_state_dict({"gamma": 0.1})
    with pytest.raises(ValueError, match="2 parameter groups, the optimizer has 1"):
        ReduceLROnPlateau(sgd()).load_state_dict(ReduceLROnPlateau(sgd(groups=2)).state_dict())


def test_new_settings_win_and_the_difference_is_told():
    state = ReduceLROnPlateau(sgd(), patience=3).state_dict()
    scheduler = ReduceLROnPlateau(sgd(), patience=7)
    with pytest.warns(UserWarning, match="patience 3 -> 7"):
        scheduler.load_state_dict(state)
    assert scheduler.patience == 7


def test_a_floor_that_changed_is_told():
    scheduler = ReduceLROnPlateau(sgd(), min_lr=0.2)
    with pytest.warns(UserWarning, match=r"min_lrs \[0.1\] -> \(0.2,\)"):
        scheduler.load_state_dict(ReduceLROnPlateau(sgd(), min_lr=0.1).state_dict())


def resumed_with(first, second, steps):
    """Make some steps, resume with another scheduler and its optimizer in either order, and give back both of them."""
    optimizer = sgd(1.0)
    scheduler = first(optimizer)
    for _ in range(steps):
        optimizer.step()
    scheduler.step(1.0)
    for scheduler_first in (True, False):
        fresh = sgd(1.0)
        resumed = second(fresh)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the settings
            states = [(resumed, scheduler.state_dict()), (fresh, optimizer.state_dict())]
            for target, state in states if scheduler_first else reversed(states):
                target.load_state_dict(copy.deepcopy(state))
        yield fresh, resumed


@pytest.mark.parametrize(("before", "now"), [(0, 100), (100, 0), (100, 200), (60, 20)])
def test_another_warmup_after_a_resume_is_no_edit_by_hand(before, now):
    for optimizer, resumed in resumed_with(
        lambda o: ReduceLROnPlateau(o, warmup_steps=before), lambda o: ReduceLROnPlateau(o, warmup_steps=now), 50
    ):
        used = []
        optimizer.register_step_pre_hook(lambda *_, o=optimizer, u=used: u.append(o.param_groups[0]["lr"]))
        optimizer.step()
        assert used == [51 / now if now > 51 else 1.0]
        for _ in range(200):
            optimizer.step()
        assert (optimizer.param_groups[0]["lr"], resumed.state.lrs) == (1.0, (1.0,))


def test_a_run_that_is_made_longer_follows_the_new_curve():
    def cosine(steps):
        return lambda o: make_scheduler(o, "cosine", PlateauRule(), {}, Length(steps, 10))

    for optimizer, resumed in resumed_with(cosine(100), cosine(200), 50):
        optimizer.step()
        assert resumed.state.lrs == (1.0,)
        assert optimizer.param_groups[0]["lr"] == pytest.approx((1 + math.cos(math.pi * 51 / 200)) / 2)


@pytest.mark.parametrize("name", ["plateau", "cosine", "onecycle"])
@pytest.mark.parametrize("steps", [3, 20])
def test_an_optimizer_that_is_restored_before_the_scheduler_is_made(name, steps):
    def make(optimizer):
        return make_scheduler(optimizer, name, PlateauRule(warmup_steps=10), {}, Length(40, 8))

    optimizer = sgd(1.0)
    scheduler = make(optimizer)
    for _ in range(steps):
        optimizer.step()
    fresh = sgd(1.0)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed = make(fresh)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.load_state_dict(scheduler.state_dict())
        for _ in range(15):
            assert fresh.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
            fresh.step()
            optimizer.step()
    assert resumed.state == scheduler.state


def test_a_scheduler_is_made_again_for_an_optimizer_at_the_end_of_its_decay():
    optimizer = sgd(1e-7)
    scheduler = ReduceLROnPlateau(optimizer, patience=0, factor=0.1)
    for _ in range(4):
        scheduler.step(1.0)
    assert scheduler.get_last_lr() == [1e-8]  # eps lets it go no further
    again = ReduceLROnPlateau(optimizer, patience=0, factor=0.1)
    again.load_state_dict(scheduler.state_dict())
    assert again.state == scheduler.state
    with pytest.raises(ValueError, match="eps=1e-08 blocks every drop"):
        ReduceLROnPlateau(sgd(1e-8))


def test_a_hand_edit_before_saving_survives():
    optimizer = sgd(1.0)
    scheduler = ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    optimizer.param_groups[0]["lr"] = 0.25
    fresh = sgd(1.0)
    resumed = ReduceLROnPlateau(fresh, patience=0, factor=0.5)
    resumed.load_state_dict(scheduler.state_dict())
    fresh.load_state_dict(optimizer.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert resumed.step(1.0).lr_after == (0.25,)


@pytest.mark.parametrize("state", [{"best": 0.25, "last_epoch": 4}, "torch"])
def test_a_foreign_state_is_beyond_the_warmup(state):
    saved = sgd(0.125)
    if state == "torch":
        theirs = TorchPlateau(saved)
        theirs.step(1.0)
        state = theirs.state_dict()
    optimizer = sgd(1.0)
    scheduler = ReduceLROnPlateau(optimizer, warmup_steps=10)
    scheduler.load_state_dict(state)
    optimizer.load_state_dict(saved.state_dict())
    for _ in range(20):
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == 0.125
    assert scheduler.step(0.1).kind == "improved"


@pytest.mark.parametrize("cls", [ReduceLROnPlateau, TorchPlateau])
def test_an_infinite_best_that_was_loaded_can_be_beaten(cls):
    saved = cls(sgd(), mode="max")  # starts from -inf, as does torch's best after a metric of -inf
    scheduler = ReduceLROnPlateau(sgd(), mode="min")
    with pytest.warns(UserWarning, match="'max' -> 'min'"):
        scheduler.load_state_dict(saved.state_dict())
    assert scheduler.step(1.0).kind == "improved"


@pytest.mark.parametrize(("saved", "loaded"), [("greedy", "plateau"), ("plateau", "greedy")])
def test_the_state_of_another_schedule_is_refused(saved, loaded):
    first, second = (make_scheduler(sgd(), name, PlateauRule(), {}, Length(40, 8)) for name in (saved, loaded))
    with pytest.raises(ValueError, match="the state is that of another schedule"):
        second.load_state_dict(first.state_dict())


def test_an_optimizer_that_was_not_restored_is_told():
    scheduler = ReduceLROnPlateau(sgd(), patience=0, factor=0.5)
    scheduler.step(1.0)
    scheduler.step(1.0)
    resumed = ReduceLROnPlateau(sgd(), patience=0, factor=0.5)
    resumed.load_state_dict(scheduler.state_dict())
    with pytest.warns(UserWarning, match="the optimizer holds the learning rate 1, the loaded scheduler state 0.5"):
        assert resumed.step(0.1).lr_after == (1.0,)


# Metrics.


def test_step_on_a_global_mean_uses_it_up():
    metric, scheduler = GlobalMean(), ReduceLROnPlateau(sgd())
    metric.update(torch.tensor([1.0, 3.0]))
    assert scheduler.step(metric).value == 2.0
    assert metric.compute() == 2.0  # free
    with pytest.raises(StaleMetricError):
        scheduler.step(metric)


# Real ranks.


def _prepared(rank, kind, fp16_like_skip):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    cls = ReduceLROnPlateau if kind == "ours" else TorchPlateau
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, cls(optimizer, patience=2, factor=0.5))
    for validation in range(6):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(1, 2)).sum())
        if fp16_like_skip:
            optimizer._is_overflow = True  # what the gradient scaler reports
        scheduler.step(10.0 - validation)
    return float(optimizer.param_groups[0]["lr"]), len(accelerator._schedulers)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("fp16_like_skip", [False, True])
def test_prepared_by_accelerate_it_makes_one_decision_per_validation(ranks, fp16_like_skip):
    assert run_ranks(_prepared, ranks, "ours", fp16_like_skip) == [(1.0, 1)] * ranks


def _stock_prepared(rank):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.SGD(torch.nn.Linear(2, 1).parameters(), lr=1.0)
    optimizer, scheduler = accelerator.prepare(optimizer, TorchPlateau(optimizer, patience=2, factor=0.5))
    for validation in range(6):
        scheduler.step(10.0 - validation)
    return float(optimizer.param_groups[0]["lr"])


def test_the_stock_scheduler_prepared_at_four_ranks_cuts_the_rate_64_times():
    """Negative control: the defect this package exists for."""
    assert run_ranks(_stock_prepared, 4) == [1 / 64] * 4


def _local_losses(rank, kind):
    torch.manual_seed(100 + rank)
    optimizer = sgd(1.0)
    if kind == "ours":
        scheduler, metric = ReduceLROnPlateau(optimizer, patience=2, factor=0.5, check_weights=False), GlobalMean()
    else:
        scheduler = TorchPlateau(optimizer, patience=2, factor=0.5)
    for epoch in range(20):
        losses = 1 / (1 + epoch) + torch.rand(5)
        if kind == "ours":
            metric.update(losses)
            scheduler.step(metric)
        else:
            scheduler.step(losses.mean())
    return optimizer.param_groups[0]["lr"]


def test_local_losses_drift_apart_and_the_global_mean_does_not():
    assert len(set(run_ranks(_local_losses, 4, "stock"))) > 1  # negative control
    assert len(set(run_ranks(_local_losses, 4, "ours"))) == 1


def _step_float(rank, same):
    scheduler = ReduceLROnPlateau(sgd())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        values = [scheduler.step(0.1 if same else 0.1 * (rank + 1)).value for _ in range(2)]
    return values, len(caught)


def test_step_with_a_number():
    assert run_ranks(_step_float, 3, True) == [([0.1, 0.1], 0)] * 3
    results = run_ranks(_step_float, 3, False)
    assert all(values == results[0][0] for values, _ in results)
    assert results[0][0][0] == pytest.approx(0.2)
    assert [warned for _, warned in results] == [1, 0, 0]


def _tampered(rank, what, check_weights):
    torch.manual_seed(0)
    model = torch.nn.Linear(300, 20)
    optimizer = torch.optim.Adam(model.parameters(), lr=1.0)
    scheduler = ReduceLROnPlateau(optimizer, warmup_steps=2, check_weights=check_weights)
    optimizer.step()
    scheduler.step(1.0)
    if rank == 1:
        if what == "weights":
            model.weight.data.view(torch.int32)[7, 200] ^= 1
        elif what == "learning rates":
            optimizer.param_groups[0]["lr"] = math.nextafter(optimizer.param_groups[0]["lr"], 2)
        elif what == "step":
            optimizer.step()
        elif what == "scheduler state":
            scheduler.num_bad_epochs = 1
        elif what == "settings":
            scheduler.patience = 3
    try:
        scheduler.step(1.0)
    except DisagreementError as error:
        return str(error)
    return "agreed"


@pytest.mark.parametrize("what", ["weights", "learning rates", "step", "scheduler state", "settings"])
def test_one_changed_bit_is_found_at_the_next_validation(what):
    messages = run_ranks(_tampered, 3, what, True)
    assert len(set(messages)) == 1
    assert "validation 2" in messages[0]
    assert f"{'scheduler state' if what == 'settings' else what}: rank 1 (" in messages[0]
    assert "against ranks 0, 2" in messages[0]


def test_untouched_replicas_agree_and_the_weight_check_can_be_turned_off():
    assert run_ranks(_tampered, 3, "nothing", True) == ["agreed"] * 3
    assert run_ranks(_tampered, 3, "weights", False) == ["agreed"] * 3


def _group_of(rank, owner):
    """Two pairs of ranks, each with learning rates of its own; the group is the metric's or the scheduler's."""
    pairs = [torch.distributed.new_group([0, 2]), torch.distributed.new_group([1, 3])]
    pair = pairs[rank % 2]
    scheduler = ReduceLROnPlateau(sgd(1.0 + rank % 2), process_group=pair if owner == "scheduler" else None)
    metric = GlobalMean(pair if owner == "metric" else None)
    metric.update(float(rank))
    return scheduler.step(metric).value


@pytest.mark.parametrize("owner", ["scheduler", "metric"])
def test_pairs_of_ranks_decide_by_themselves(owner):
    assert run_ranks(_group_of, 4, owner) == [1.0, 2.0, 1.0, 2.0]


def _print_on(rank):
    import contextlib
    import io

    scheduler, output = ReduceLROnPlateau(sgd(), patience=0, verbose=True), io.StringIO()
    with contextlib.redirect_stdout(output):
        scheduler.step(1.0)
        scheduler.step(1.0)
    return output.getvalue().count("reduced")


def test_verbose_prints_on_one_rank():
    assert run_ranks(_print_on, 3) == [1, 0, 0]


def _all_schedules(rank, name):
    torch.manual_seed(rank)
    optimizer = sgd(0.5, 2)
    scheduler = make_scheduler(
        optimizer, name, PlateauRule(patience=1, warmup_steps=5, factor=0.9), {}, Length(40, 8), check_weights=True
    )
    metric, lines = GlobalMean(), []
    for _ in range(5):
        for _ in range(8):
            optimizer.step()
            scheduler.step_update()
        metric.update(torch.rand(10 * rank))
        decision = scheduler.step(metric)
        lines.append((decision.kind, decision.lr_after, scheduler.get_last_lr()))
    return lines


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_every_schedule_is_in_lockstep(name):
    results = run_ranks(_all_schedules, 3, name)
    assert results[0] == results[1] == results[2]
    assert all(list(after) == held for _, after, held in results[0])


def test_import_is_light():
    code = "import distplateau, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
