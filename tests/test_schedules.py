"""Every schedule by name against its well-known counterpart, alone, with warmup, with floors and through JSON."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import warnings
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from distplateau.errors import InputError
from distplateau.lockstep import schedules
from distplateau.lockstep.plateau import NonFiniteMetricError, PlateauRule
from distplateau.lockstep.schedules import SCHEDULES, Length, build
from distplateau.record import ledger

LENGTH = Length(total_steps=120, steps_per_epoch=6)
PEAKS = (0.3, 0.01)
TIMED = sorted(SCHEDULES.keys() - {"plateau", "greedy"})
# Settings that make each schedule move within LENGTH.
ARGS = {
    "step": {"step_size": 4, "gamma": 0.5},
    "exponential": {"gamma": 0.9},
    "cosine_restarts": {"t_0": 5, "gamma": 0.7},
    "greedy": {"max_lr": 2.0, "raise_cooldown": 1, "reset_after": 2},
}


def make(name, rule=PlateauRule(), length=LENGTH, **args):  # noqa: B008 (frozen)
    return build(name, rule, {**ARGS.get(name, {}), **args}, length)


def trace(schedule, steps=LENGTH.total_steps, lrs=PEAKS):
    """Return the applied learning rates of optimizer steps 0, 1, ..."""
    state = schedule.start(lrs)
    return [schedule.applied(replace(state, step=step)) for step in range(steps)]


def torch_trace(make_scheduler, every=1, steps=LENGTH.total_steps, lrs=PEAKS):
    """Return torch's learning rates of optimizer steps 0, 1, ...; its scheduler is stepped `every` so many."""
    optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(()))], "lr": lr} for lr in lrs])
    values = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a scheduler makes its first step in its constructor
        scheduler = make_scheduler(optimizer)
        for step in range(1, steps + 1):
            values.append(tuple(group["lr"] for group in optimizer.param_groups))
            optimizer.step()
            if step % every == 0 and step < steps:
                scheduler.step()
    return values


def assert_close(ours, theirs):
    assert len(ours) == len(theirs)
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        # Near the end of a cosine both are 0 up to the last bits of the peak.
        assert mine == pytest.approx(other, rel=1e-9, abs=1e-13), f"step {step}"


# Against torch.


@pytest.mark.parametrize("epochs", [1, 3, 7])
@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0])
def test_step(epochs, gamma):
    ours = trace(make("step", step_size=epochs, gamma=gamma))
    assert_close(ours, torch_trace(lambda o: lr_scheduler.StepLR(o, epochs, gamma), every=LENGTH.steps_per_epoch))


@pytest.mark.parametrize("gamma", [0.5, 0.95, 1.0])
def test_exponential(gamma):
    ours = trace(make("exponential", gamma=gamma))
    assert_close(ours, torch_trace(lambda o: lr_scheduler.ExponentialLR(o, gamma), every=LENGTH.steps_per_epoch))


@pytest.mark.parametrize("floor", [0.0, 1e-3])
def test_cosine(floor):
    ours = trace(make("cosine", PlateauRule(min_lr=floor)))
    assert_close(ours, torch_trace(lambda o: lr_scheduler.CosineAnnealingLR(o, LENGTH.total_steps, floor)))


@pytest.mark.parametrize("floor", [0.0, 1e-3])
@pytest.mark.parametrize(("t_0", "t_mult"), [(5, 1), (3, 1), (2, 2), (1, 3)])
def test_cosine_restarts(t_0, t_mult, floor):
    ours = trace(make("cosine_restarts", PlateauRule(min_lr=floor), t_0=t_0, t_mult=t_mult, gamma=1.0))
    first = t_0 * LENGTH.steps_per_epoch
    assert_close(ours, torch_trace(lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, first, t_mult, floor)))


@pytest.mark.parametrize("pct_start", [0.0, 0.1, 0.3, 0.55, 1.0])
@pytest.mark.parametrize(("div", "final_div"), [(25.0, 1e4), (10.0, 10.0), (1.0, 1.0)])
def test_onecycle(pct_start, div, final_div):
    ours = trace(make("onecycle", pct_start=pct_start, div_factor=div, final_div_factor=final_div))
    options = {"pct_start": pct_start, "div_factor": div, "final_div_factor": final_div, "cycle_momentum": False}
    theirs = torch_trace(lambda o: lr_scheduler.OneCycleLR(o, list(PEAKS), LENGTH.total_steps, **options))
    assert_close(ours, theirs)


def test_onecycle_with_a_rise_of_one_step():
    ours = trace(make("onecycle", pct_start=0.1, length=Length(10, 1)), 10)
    assert ours[0] == PEAKS  # torch divides by zero here
    with pytest.raises(ZeroDivisionError):
        torch_trace(lambda o: lr_scheduler.OneCycleLR(o, list(PEAKS), 10, pct_start=0.1, cycle_momentum=False))


def test_constant():
    assert set(trace(make("constant"))) == {PEAKS}


# cosine_restarts with warmup and decay, against CosineAnnealingWarmupRestarts (github.com/katsura-jp).


def warmup_restarts(steps, first, peak, warmup, gamma, mult=1):
    """Walk through the cycles as katsura's scheduler does, with min_lr = 0; its warmup starts at 0."""
    values, position, span, top = [], 0, first, peak
    for _ in range(steps):
        if position < warmup:
            values.append(top * position / warmup)
        else:
            values.append(0.5 * top * (1 + math.cos(math.pi * (position - warmup) / (span - warmup))))
        position += 1
        if position == span:
            position, span, top = 0, span * mult, top * gamma
    return values


@pytest.mark.parametrize("mult", [1, 2])
@pytest.mark.parametrize("gamma", [1.0, 0.6])
@pytest.mark.parametrize("warmup", [0, 1, 4, 11])
def test_cosine_restarts_with_warmup_and_decay(warmup, gamma, mult):
    first, steps = 2 * LENGTH.steps_per_epoch, 100
    schedule = make("cosine_restarts", PlateauRule(warmup_steps=warmup), t_0=2, t_mult=mult, gamma=gamma)
    ours = [lr for (lr,) in trace(schedule, steps, (0.3,))]
    theirs = warmup_restarts(steps + 1, first, 0.3, warmup, gamma, mult)
    begin, span = 0, first
    while begin < steps:
        for position in range(min(span, steps - begin)):
            # Ours warms up from 1/warmup_steps and not from 0: one step ahead until the peak.
            other = theirs[begin + position + (position < warmup)]
            assert ours[begin + position] == pytest.approx(other, rel=1e-9, abs=1e-13)
        begin, span = begin + span, span * mult


def test_a_decayed_cycle_stays_above_the_floor():
    schedule = make("cosine_restarts", PlateauRule(min_lr=0.1, warmup_steps=3), t_0=2, gamma=0.1)
    assert min(lr for (lr,) in trace(schedule, lrs=(1.0,))[3:]) >= 0.1


# Warmup, floors, the end of the run: for all of them.


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup", [1, 2, 5])
def test_warmup_in_front_of_every_schedule(name, warmup):
    schedule = make(name, PlateauRule(warmup_steps=warmup))
    whole = trace(schedule)
    # What spans the rest of the run is the same curve over a shorter run; what counts epochs or cycles goes on.
    if name == "cosine_restarts":
        begin = PEAKS
    else:
        shifted = name in {"cosine", "onecycle", "constant", "plateau", "greedy"}
        rest = Length(LENGTH.total_steps - warmup, LENGTH.steps_per_epoch) if shifted else LENGTH
        curve = trace(make(name, length=rest), rest.total_steps)
        begin = curve[0]
        assert whole[warmup:] == (curve if shifted else curve[warmup:])
    assert whole[0] == pytest.approx([lr / warmup for lr in begin], rel=1e-15)
    assert whole[warmup - 1] == begin
    for earlier, later in pairwise(whole[:warmup]):
        assert all(a < b for a, b in zip(earlier, later, strict=True))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 4])
def test_scale_is_the_factor_between_state_and_applied(name, warmup):
    schedule = make(name, PlateauRule(warmup_steps=warmup))
    state = schedule.start(PEAKS)
    for step in range(LENGTH.total_steps):
        at = replace(state, step=step)
        assert schedule.applied(at) == pytest.approx([lr * schedule.scale(at) for lr in PEAKS], rel=1e-12, abs=1e-18)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("floor", [1e-3, (0.05, 1e-3)])
def test_no_schedule_goes_below_its_floor(name, floor):
    warmup = 3
    schedule = make(name, PlateauRule(min_lr=floor, warmup_steps=warmup, patience=0, factor=0.3))
    floors = floor if isinstance(floor, tuple) else (floor, floor)
    state, lowest = schedule.start(PEAKS), PEAKS
    for step in range(warmup, LENGTH.total_steps + 30):
        state, decision = schedule.advance(replace(state, step=step), 1.0)
        assert all(lr >= low for lr, low in zip(decision.lr_after, floors, strict=True))
        lowest = min(lowest, decision.lr_after)
    if name in {"plateau", "greedy", "cosine"}:
        assert lowest == floors
    with pytest.raises(ValueError, match="min_lr has 3 entries for 2"):
        make(name, PlateauRule(min_lr=(0.0, 0.0, 0.0))).start(PEAKS)


@pytest.mark.parametrize("name", TIMED)
def test_after_the_last_step_nothing_breaks(name):
    schedule = make(name)
    state = replace(schedule.start(PEAKS), step=LENGTH.total_steps)
    lrs = schedule.applied(state)
    assert all(0 <= lr <= peak for lr, peak in zip(lrs, PEAKS, strict=True))
    if name in {"cosine", "onecycle"}:
        later = schedule.applied(replace(state, step=10 * LENGTH.total_steps))
        assert later == lrs


@pytest.mark.parametrize("name", TIMED)
@pytest.mark.parametrize("length", [Length(1, 1), Length(2, 1), Length(3, 2)])
def test_the_shortest_runs(name, length):
    schedule = build(name, PlateauRule(), {}, length)
    assert schedule.timed
    for lrs in trace(schedule, length.total_steps):
        assert all(0 < lr <= peak for lr, peak in zip(lrs, PEAKS, strict=True))


@pytest.mark.parametrize("name", TIMED)
@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_timed_schedule_records_the_metric_and_obeys_the_clock(name, mode):
    schedule = make(name, PlateauRule(mode=mode, warmup_steps=2, threshold=0.5))
    state = schedule.start(PEAKS)
    rates, best, sign = trace(schedule), None, -1 if mode == "min" else 1
    for count, metric in enumerate([1.0, 1.1, 0.9, math.nan, sign * math.inf, 0.95], start=1):
        state, decision = schedule.advance(replace(state, step=6 * (count - 1)), metric)
        if math.isfinite(metric):
            best = metric if best is None else (min if mode == "min" else max)(best, metric)
        assert decision.kind == ("warmup" if count == 1 else "scheduled")
        assert decision.validation == state.validations == count
        assert decision.best == state.best == best
        assert decision.lr_before == rates[max(0, state.step - 1)]
        assert decision.lr_after == rates[state.step]
    with pytest.raises(NonFiniteMetricError):
        make(name, PlateauRule(nonfinite="raise")).advance(state, math.nan)


def test_rounded_to_the_dtype_of_the_learning_rate():
    for name in SCHEDULES:
        for lrs in trace(make(name, PlateauRule(lr_dtype="float32", warmup_steps=3)), lrs=(0.25,)):
            assert lrs == (torch.tensor(lrs[0]).item(),)


# greedy against transformers.


@pytest.fixture(scope="module")
def greedy_lr():
    return pytest.importorskip("transformers.optimization").GreedyLR


def test_greedy_is_transformers_bit_for_bit(greedy_lr):
    resets = []

    @settings(deadline=None, derandomize=True, max_examples=300)
    @given(greedy_settings(), st.integers(0, 2**32), st.integers(1, 400))
    def compare(drawn, seed, length):
        resets.append(compare_greedy(greedy_lr, *drawn, seed, length))

    compare()
    assert sum(resets) > 50  # else the traces are too tame to say anything about resets


@st.composite
def greedy_settings(draw):
    mode, threshold_mode = draw(st.sampled_from(["min", "max"])), draw(st.sampled_from(["rel", "abs"]))
    floor = st.sampled_from([0.0, 0.003, 0.02, 0.09, 0.5])
    groups = draw(st.integers(1, 2))
    rule = PlateauRule(
        mode=mode,
        factor=draw(st.sampled_from([0.1, 0.5, 0.8, 0.95])),
        patience=draw(st.integers(0, 3)),
        threshold=draw(st.sampled_from([0.0, 1e-6, 0.1])),
        threshold_mode=threshold_mode,
        cooldown=draw(st.integers(0, 3)),
        min_lr=draw(floor | st.tuples(*[floor] * groups)),
        eps=draw(st.sampled_from([0.0, 1e-8, 1e-3])),
    )
    lrs = tuple(draw(st.sampled_from([0.1, 0.03, 1.0])) for _ in range(groups))
    args = {
        "max_lr": draw(st.sampled_from([0.0, 0.2, 1.0])),
        "raise_cooldown": draw(st.integers(0, 3)),
        "reset_after": draw(st.integers(0, 3)),
    }
    return rule, args, lrs


def compare_greedy(greedy_lr, rule, args, lrs, seed, length):
    """Assert that both go the same way; return how often they began anew."""
    schedule = build("greedy", rule, args, LENGTH)
    try:
        state = schedule.start(lrs)
    except ValueError:  # eps blocks every drop
        assume(False)
    optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(()))], "lr": lr} for lr in lrs])
    names = "mode factor patience threshold threshold_mode cooldown eps".split()
    theirs = greedy_lr(
        optimizer,
        **{name: getattr(rule, name) for name in names},
        min_lr=list(rule.min_lr) if isinstance(rule.min_lr, tuple) else rule.min_lr,
        max_lr=args.get("max_lr") or [10 * lr for lr in lrs],
        warmup=args.get("raise_cooldown", 0),
        reset_start=args.get("reset_after") or 10**9,
    )
    rng, metric, resets = random.Random(seed), 1.0, 0
    drift = rng.choice([0.0, 0.0, 0.05])
    for _ in range(length):
        # Runs of better and of worse metrics, ties among them.
        metric = abs(metric + rng.choice([0.0, 0.1, -0.1, drift, -drift])) or 1e-3
        theirs.step(metric)
        state, decision = schedule.advance(state, metric)
        assert state.lrs == decision.lr_after == tuple(group["lr"] for group in optimizer.param_groups)
        assert (state.best, state.num_bad, state.num_good) == (
            theirs.best,
            theirs.num_bad_epochs,
            theirs.num_good_epochs,
        )
        assert (state.cooldown, state.raise_cooldown) == (theirs.cooldown_counter, theirs.warmup_counter)
        resets += math.isinf(state.best)
    assert state.validations == theirs.last_epoch == length
    return resets


@pytest.mark.parametrize("metric", [math.nan, math.inf, -math.inf])
def test_greedy_and_nonfinite_metrics(metric):
    def go(nonfinite, *metrics):
        schedule = make("greedy", PlateauRule(patience=1, nonfinite=nonfinite))
        state, kinds = schedule.start((0.1,)), []
        for value in metrics:
            state, decision = schedule.advance(state, value)
            kinds.append(decision.kind)
        return state, kinds

    assert go("bad", 1.0, metric, metric)[1] == ["improved", "bad", "reduced"]
    state, kinds = go("ignore", 1.0, metric, metric)
    assert (kinds[1:], state.best, state.num_good) == (["ignored"] * 2, 1.0, 1)
    with pytest.raises(NonFiniteMetricError, match="validation 2"):
        go("raise", 1.0, metric)


def test_greedy_waits_for_warmup_and_start_after():
    schedule = make("greedy", PlateauRule(patience=0, warmup_steps=4, start_after=2))
    state, kinds = schedule.start((0.1,)), []
    for count, metric in enumerate([3.0, 2.0, 1.0, 0.5]):
        state, decision = schedule.advance(replace(state, step=3 * count), metric)
        kinds.append(decision.kind)
    assert kinds == ["warmup", "warmup", "raised", "cooldown"]


def test_greedy_begins_anew_from_the_floor():
    rule = PlateauRule(patience=0, factor=0.5, min_lr=0.05, cooldown=1)
    schedule = make("greedy", rule, raise_cooldown=0, reset_after=2)
    state, seen = schedule.start((0.1,)), []
    for metric in [1.0] * 8:
        state, decision = schedule.advance(state, metric)
        seen.append((decision.kind, decision.lr_after[0], state.best))
    assert seen == [
        ("raised", 0.2, 1.0),
        ("reduced", 0.1, 1.0),
        ("cooldown", 0.1, 1.0),
        ("reduced", 0.05, 1.0),
        ("cooldown", 0.05, 1.0),
        ("raised", 0.1, math.inf),
        ("cooldown", 0.1, math.inf),
        ("raised", 0.2, 1.0),
    ]


def test_greedy_makes_no_change_of_eps_or_less(greedy_lr):
    rule = PlateauRule(patience=0, factor=0.5, eps=0.25)
    assert compare_greedy(greedy_lr, rule, {"max_lr": 0.0}, (1.0, 0.25), 0, 50) == 0
    schedule = make("greedy", rule)
    _, decision = schedule.advance(schedule.start((1.0, 0.25)), 1.0)
    assert decision.lr_after == (2.0, 0.25)


def test_greedy_smooths_with_the_moving_average():
    schedule = make("greedy", PlateauRule(smoothing=0.5))
    state = schedule.start((0.1,))
    for metric in (1.0, 2.0, 4.0):
        state, _ = schedule.advance(state, metric)
    assert (state.smoothed, state.best) == (2.75, 1.0)


# Names, settings, JSON.


def assert_one_line(error, *parts):
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(InputError) as error:
        build("cosin", PlateauRule(), {}, LENGTH)
    assert_one_line(error, "schedule.name = 'cosin'", "did you mean 'cosine'?", *SCHEDULES)


@pytest.mark.parametrize("name", SCHEDULES)
def test_an_unknown_setting_is_named(name):
    with pytest.raises(InputError) as error:
        build(name, PlateauRule(), {"gama": 3}, LENGTH)
    assert_one_line(error, "schedule.args.gama = 3", "unknown setting", *SCHEDULES[name].args)


INVALID = [
    ("step", "step_size", [0, -1, 2.0, True, "10", math.nan]),
    ("step", "gamma", [-0.1, 1.1, math.nan, math.inf, "x", False]),
    ("exponential", "gamma", [-0.1, 1.1, math.nan]),
    ("cosine_restarts", "t_0", [0, 1.5, "1"]),
    ("cosine_restarts", "t_mult", [0, 1.5]),
    ("cosine_restarts", "gamma", [-1, 2]),
    ("onecycle", "pct_start", [-0.1, 1.1, math.nan]),
    ("onecycle", "div_factor", [0, 0.5, math.inf, None]),
    ("onecycle", "final_div_factor", [0, math.nan]),
    ("greedy", "max_lr", [-1, math.inf, math.nan]),
    ("greedy", "raise_cooldown", [-1, 0.5]),
    ("greedy", "reset_after", [-1, [1]]),
]


@pytest.mark.parametrize(("name", "key", "value"), [(n, k, v) for n, k, values in INVALID for v in values])
def test_a_setting_out_of_range_is_named(name, key, value):
    with pytest.raises(InputError) as error:
        build(name, PlateauRule(), {key: value}, LENGTH)
    assert_one_line(error, f"schedule.args.{key} = {value!r}", "give a ")


def test_every_own_setting_is_covered_above():
    assert {(n, k) for n, k, _ in INVALID} == {(n, k) for n, entry in SCHEDULES.items() for k in entry.args}


def test_a_warmup_that_fills_the_cycle_is_refused():
    with pytest.raises(InputError) as error:
        make("cosine_restarts", PlateauRule(warmup_steps=30))
    assert_one_line(error, "schedule.warmup_steps = 30", "30 steps", "t_0")


def test_greedy_cannot_divide_by_zero():
    with pytest.raises(InputError) as error:
        make("greedy", PlateauRule(factor=(0.5, 0.0)))
    assert_one_line(error, "schedule.factor = 0", "greedy")


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_goes_on_from_any_state_through_json(name):
    schedule = make(name, PlateauRule(patience=1, cooldown=1, smoothing=0.3, start_after=1, warmup_steps=2))
    rng, state = random.Random(0), schedule.start(PEAKS)
    for count in range(60):
        state = replace(state, step=2 * count)
        dumped = schedules.dump(state)
        for copy in (
            json.loads(json.dumps(dumped)),
            ledger.decode(ledger.encode({"event": "start", "state": dumped}))["state"],
        ):
            assert schedule.load(copy) == state
        state, _ = schedule.advance(state, rng.choice([1.0, 0.9, 0.8, 1.1]))


def test_the_list_says_what_each_schedule_heeds():
    decides = SCHEDULES["plateau"].decision_keys
    assert SCHEDULES["greedy"].decision_keys == decides
    for name in TIMED:
        assert SCHEDULES[name].decision_keys < decides
    fields = set(PlateauRule.__dataclass_fields__)
    assert decides <= fields


def test_the_schedules_import_neither_torch_nor_pydantic():
    code = "import sys, distplateau.lockstep.schedules; print({'torch', 'pydantic', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
