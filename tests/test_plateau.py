"""The decision against torch's scheduler bit for bit, and where ours does better with torch as negative control."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import ReduceLROnPlateau as TorchPlateau

from distplateau.lockstep import plateau, schedules
from distplateau.lockstep.plateau import NonFiniteMetricError, PlateauRule, advance, applied_lrs, round_lr, start

NAN, INF = math.nan, math.inf
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TORCH_SETTINGS = "mode factor patience threshold threshold_mode cooldown min_lr eps".split()

property_test = settings(deadline=None, derandomize=True, max_examples=300)


def torch_twin(rule, lrs):
    """Return torch's scheduler with the settings of `rule`; LRs are tensors unless ``lr_dtype`` is float64."""
    held = [torch.tensor(lr, dtype=DTYPES[rule.lr_dtype]) if rule.lr_dtype in DTYPES else lr for lr in lrs]
    optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(()))], "lr": lr} for lr in held])
    options = {name: getattr(rule, name) for name in TORCH_SETTINGS}
    if isinstance(rule.min_lr, tuple):
        options["min_lr"] = list(rule.min_lr)
    return TorchPlateau(optimizer, **options)


def observed(torch_scheduler):
    lrs = tuple(float(group["lr"]) for group in torch_scheduler.optimizer.param_groups)
    return torch_scheduler.best, torch_scheduler.num_bad_epochs, torch_scheduler.cooldown_counter, lrs


def of(state):
    return state.best, state.num_bad, state.cooldown, state.lrs


def run(rule, metrics, lrs=(1.0,), **fields):
    """Return the final state and all decisions."""
    state, decisions = replace(start(rule, lrs), **fields), []
    for metric in metrics:
        state, decision = advance(rule, state, metric)
        decisions.append(decision)
    return state, decisions


def kinds(rule, metrics, **fields):
    return [decision.kind for decision in run(rule, metrics, **fields)[1]]


def candidates(rule, best):
    """Return a few metrics around the bound that a better one has to pass: ties and neighbours on either side."""
    if not math.isfinite(best):
        return [1.0, 0.7]
    sign = -1 if rule.mode == "min" else 1
    bound = best * (1 + sign * rule.threshold) if rule.threshold_mode == "rel" else best + sign * rule.threshold
    around = [bound, math.nextafter(bound, INF), math.nextafter(bound, -INF)]
    return [*around, best, best - sign * 0.25, best * (1 - sign * rule.threshold), best + sign * 0.01]


def allowed(rule, metric):
    # In rel mode torch turns the margin around below zero, see the negative control further down.
    return math.isfinite(metric) and abs(metric) < 1e100 and (rule.threshold_mode == "abs" or metric >= 0)


@st.composite
def rules(draw):
    """Draw settings, learning rates and whether they are worth a trace: torch itself takes all of them."""
    groups = draw(st.integers(1, 3))
    dtype = draw(st.sampled_from(["float64", "float64", "float32", "float16", "bfloat16"]))
    lrs = tuple(round_lr(draw(st.sampled_from([1.0, 0.1, 0.03, 1e-3])), dtype) for _ in range(groups))
    floor = st.sampled_from([0.0, 1e-6, 0.01, 0.03, 2.0])
    mode, threshold_mode = draw(st.sampled_from(["min", "max"])), draw(st.sampled_from(["rel", "abs"]))
    # With min, rel and a threshold from 1 on torch computes inf * 0 = NaN or -inf at the start: see further down.
    thresholds = [0.0, 1e-4, 0.1, 0.5] + ([] if (mode, threshold_mode) == ("min", "rel") else [1.0, 1.5])
    rule = PlateauRule(
        mode=mode,
        factor=draw(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9, 0.999])),
        patience=draw(st.integers(0, 4)),
        threshold=draw(st.sampled_from(thresholds)),
        threshold_mode=threshold_mode,
        cooldown=draw(st.integers(0, 3)),
        min_lr=draw(floor | st.tuples(*[floor] * groups)),
        eps=draw(st.sampled_from([0.0, 1e-8, 1e-4, 0.02, 0.25])),  # 0.25: a tie on the way 1.0, 0.5, 0.25
        lr_dtype=dtype,
    )
    return rule, lrs


@settings(property_test, max_examples=800)
@given(rules(), st.integers(0, 2**32), st.integers(1, 400))
def test_advance_is_torchs_scheduler_bit_for_bit(drawn, seed, length):
    (rule, lrs), rng = drawn, random.Random(seed)
    try:
        state = start(rule, lrs)
    except ValueError:  # eps blocks every drop: refused here, without effect in torch
        assume(False)
    twin = torch_twin(rule, lrs)
    for _ in range(length):
        metric = rng.choice([m for m in candidates(rule, state.best) if allowed(rule, m)] or [1.0])
        twin.step(metric)
        state, decision = advance(rule, state, metric)
        assert of(state) == observed(twin)
        assert (decision.best, decision.num_bad, decision.cooldown, decision.lr_after) == of(state)
    assert state.validations == twin.last_epoch == length


@property_test
@given(rules(), st.lists(st.floats(-3, 3) | st.sampled_from([NAN, INF, -INF, 0.0, -1.0, 1.0]), max_size=60), st.data())
def test_advance_is_pure_and_continues_from_any_state_through_json(drawn, metrics, data):
    rule, lrs = drawn
    rule = replace(
        rule, smoothing=data.draw(st.sampled_from([0.0, 0.6])), start_after=data.draw(st.integers(0, 2)),
        warmup_steps=2, nonfinite=data.draw(st.sampled_from(["bad", "ignore"])), eps=0.0,
    )  # fmt: skip
    schedule, state = schedules.Plateau(rule), start(rule, lrs)
    for place, metric in enumerate(metrics):
        state, loaded = replace(state, step=place), schedule.load(json.loads(json.dumps(schedules.dump(state))))
        loaded = replace(loaded, step=place)
        before = asdict(state)
        after = advance(rule, state, metric)
        assert repr(advance(rule, state, metric)) == repr(after)  # repr: NaN is not equal to itself
        assert repr(advance(rule, loaded, metric)) == repr(after)
        assert asdict(state) == before
        state = after[0]
        assert math.isfinite(state.best) or state.best == rule.worst


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_trace_goes_on_from_any_validation(cut):
    rule = PlateauRule(patience=1, cooldown=1, smoothing=0.5, start_after=1, min_lr=(0.01, 0.0))
    metrics = [1.0, 0.9, 0.95, 0.95, 0.95, NAN, 0.95, 0.95, 0.2, 0.6, 0.95, 0.95]
    whole, decisions = run(rule, metrics, (1.0, 0.1))
    half, first = run(rule, metrics[:cut], (1.0, 0.1))
    state = schedules.Plateau(rule).load(json.loads(json.dumps(schedules.dump(half))))
    rest = []
    for metric in metrics[cut:]:
        state, decision = advance(rule, state, metric)
        rest.append(decision)
    assert state == whole
    assert repr(first + rest) == repr(decisions)
    assert any(decision.reduced for decision in decisions)


# Where torch is wrong.


@pytest.mark.parametrize(
    ("mode", "better", "worse"),
    [("min", [-1.0, -1.2, -1.5], [-1.0, -0.99]), ("max", [-1.5, -1.2, -1.0], [-1.0, -1.01])],
)
def test_negative_metrics_in_rel_mode(mode, better, worse):
    rule = PlateauRule(mode=mode, threshold=0.1, patience=0)
    assert kinds(rule, better) == ["improved"] * 3
    assert kinds(rule, worse) == ["improved", "reduced"]
    twin = torch_twin(rule, (1.0,))  # negative control: torch takes the worse one for an improvement
    for metric in worse:
        twin.step(metric)
    assert observed(twin) == (worse[1], 0, 0, (1.0,))


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_margin_below_zero_mirrors_the_one_above(sign):
    rule = PlateauRule(mode="min" if sign < 0 else "max", threshold=0.25)
    bound = -1.0 + sign * 0.25
    assert not plateau.is_better(rule, bound, -1.0)
    assert plateau.is_better(rule, math.nextafter(bound, sign * INF), -1.0)


@pytest.mark.parametrize("threshold_mode", ["rel", "abs"])
@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0, 1.5, 1e308])
@pytest.mark.parametrize("first", [0.0, 1.0, -1.0, 1e300, -1e300])
def test_any_finite_metric_beats_the_start(mode, threshold_mode, threshold, first):
    state, [decision] = run(PlateauRule(mode=mode, threshold=threshold, threshold_mode=threshold_mode), [first])
    assert (decision.kind, state.best) == ("improved", first)


@pytest.mark.parametrize("threshold", [1.0, 1.5])
def test_torch_never_gets_off_the_start_with_a_threshold_from_1_on(threshold):
    twin = torch_twin(PlateauRule(threshold=threshold), (1.0,))  # negative control: inf * 0 is NaN, inf * -0.5 is -inf
    twin.step(0.5)
    assert twin.best == INF


def test_a_threshold_above_1_asks_for_a_metric_below_zero():
    rule = PlateauRule(threshold=1.5, patience=9)
    assert kinds(rule, [1.0, 0.1, -0.5, -0.51]) == ["improved", "bad", "bad", "improved"]


# Non-finite metrics.


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("metric", [NAN, INF, -INF])
@pytest.mark.parametrize("begin", [[], [0.5]])
def test_nonfinite_metrics_are_bad_ignored_or_raise(mode, metric, begin):
    rule = PlateauRule(mode=mode, patience=1, nonfinite="bad")
    expected = start(rule, (1.0,)).best if not begin else 0.5
    state, decisions = run(rule, [*begin, metric, metric])
    assert [decision.kind for decision in decisions[len(begin) :]] == ["bad", "reduced"]
    assert state.best == expected

    ignoring = replace(rule, nonfinite="ignore")
    before, _ = run(ignoring, begin)
    state, decisions = run(ignoring, [*begin, metric, metric])
    assert [decision.kind for decision in decisions[len(begin) :]] == ["ignored"] * 2
    assert state == replace(before, validations=len(begin) + 2)

    with pytest.raises(NonFiniteMetricError, match=rf"validation {len(begin) + 1}: .* {metric!r}"):
        run(replace(rule, nonfinite="raise"), [*begin, metric])


@pytest.mark.parametrize(("mode", "metric"), [("min", -INF), ("max", INF)])
def test_torch_takes_an_infinity_for_an_unbeatable_best(mode, metric):
    twin = torch_twin(PlateauRule(mode=mode), (1.0,))  # negative control
    twin.step(metric)
    twin.step(0.5)
    assert twin.best == metric


def test_a_nonfinite_metric_stays_out_of_the_moving_average():
    rule = PlateauRule(smoothing=0.5)
    state, _ = run(rule, [1.0, NAN, INF, -INF, 2.0])
    assert state.smoothed == 1.5


# Settings that torch does not have.


def test_start_after_waits_and_then_is_torch():
    rule = PlateauRule(start_after=3, patience=1)
    metrics = [0.1, 0.1, 0.1, 1.0, 1.0, 1.0, 0.5]
    state, decisions = run(rule, metrics)
    assert [d.kind for d in decisions] == ["waiting"] * 3 + ["improved", "bad", "reduced", "improved"]
    assert of(state) == of(run(replace(rule, start_after=0), metrics[3:])[0])
    assert [d.validation for d in decisions] == [1, 2, 3, 4, 5, 6, 7]
    assert {d.best for d in decisions[:3]} == {INF}


@property_test
@given(st.lists(st.floats(-10, 10), min_size=1, max_size=50), st.sampled_from([0.1, 0.5, 0.9]))
def test_smoothing_is_an_exponential_moving_average_in_front_of_torch(metrics, weight):
    rule = PlateauRule(smoothing=weight, patience=1, threshold_mode="abs")
    twin, state, average = torch_twin(rule, (1.0,)), start(rule, (1.0,)), None
    for metric in metrics:
        average = metric if average is None else weight * average + (1 - weight) * metric
        twin.step(average)
        state, decision = advance(rule, state, metric)
        assert state.smoothed == average
        assert decision.value == metric
        assert of(state) == observed(twin)


@pytest.mark.parametrize("warmup_steps", [1, 2, 7])
def test_warmup_is_linear_from_a_first_share_and_then_exactly_1(warmup_steps):
    rule = PlateauRule(warmup_steps=warmup_steps)
    state = start(rule, (0.3,))
    applied = [applied_lrs(rule, replace(state, step=step))[0] for step in range(warmup_steps + 3)]
    assert applied[0] == pytest.approx(0.3 / warmup_steps, rel=1e-15)
    ramp = [0.3 * (step + 1) / warmup_steps for step in range(warmup_steps)]
    assert applied[:warmup_steps] == pytest.approx(ramp, rel=1e-15)
    assert applied[warmup_steps - 1 :] == [0.3] * 4


def test_no_warmup_multiplies_by_exactly_1():
    assert [plateau.warmup_multiplier(step, 0) for step in range(3)] == [1.0] * 3


def test_the_plateau_logic_waits_for_the_warmup():
    rule = PlateauRule(warmup_steps=10, patience=0)
    state, decisions = run(rule, [1.0, 1.0, 1.0], step=4)
    assert [d.kind for d in decisions] == ["warmup"] * 3
    assert (state.best, state.num_bad, state.validations, state.lrs) == (INF, 0, 3, (1.0,))
    assert decisions[0].lr_before == decisions[0].lr_after == (0.5,)
    assert kinds(rule, [1.0, 1.0], step=9) == ["warmup"] * 2
    assert kinds(rule, [1.0, 1.0], step=10) == ["improved", "reduced"]


def test_factor_and_floor_per_group():
    rule = PlateauRule(factor=(0.5, 0.1), min_lr=(0.3, 0.0), patience=0)
    _, decisions = run(rule, [1.0] * 4, (1.0, 1.0))
    assert [d.lr_after for d in decisions] == [(1.0, 1.0), (0.5, 0.1), (0.3, 0.1 * 0.1), (0.3, 0.1 * 0.1 * 0.1)]
    assert decisions[-1].lr_before == decisions[-2].lr_after
    assert decisions[-1].reduced


def test_at_the_floor_a_bad_validation_is_no_reduction():
    rule = PlateauRule(factor=0.5, min_lr=0.5, patience=0, cooldown=1)
    assert kinds(rule, [1.0, 1.0, 1.0, 1.0]) == ["improved", "reduced", "cooldown", "bad"]


def test_a_better_metric_is_told_also_in_the_cooldown():
    rule = PlateauRule(factor=0.5, patience=0, cooldown=2)
    assert kinds(rule, [1.0, 1.0, 0.5, 0.5, 0.5]) == ["improved", "reduced", "improved", "cooldown", "reduced"]


@pytest.mark.parametrize(("name", "value"), [("factor", (0.5, 0.1)), ("min_lr", (0.1, 0.1, 0.1, 0.1))])
def test_a_tuple_of_another_length_than_the_groups(name, value):
    with pytest.raises(ValueError, match=f"{name} has {len(value)} entries for 3 parameter groups"):
        start(PlateauRule(**{name: value}), (1.0, 1.0, 1.0))


def test_eps_that_blocks_every_drop_is_refused():
    with pytest.raises(ValueError, match="eps=1e-08 blocks every drop"):
        start(PlateauRule(), (1e-8,))
    twin = torch_twin(PlateauRule(patience=0), (1e-8,))  # negative control: torch keeps quiet and never drops
    for _ in range(5):
        twin.step(1.0)
    assert observed(twin)[-1] == (1e-8,)
    with pytest.raises(ValueError, match="blocks every drop"):
        start(PlateauRule(factor=0.5, eps=0.5), (1.0,))  # a drop of exactly eps is not made
    start(PlateauRule(eps=0), (1e-8,))
    start(PlateauRule(), (1e-8, 1.0))  # one group can drop
    start(PlateauRule(min_lr=1.0), (1.0,))  # a floor says on purpose that nothing may drop


# Rounding.


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_lr_is_torchs_rounding_bit_for_bit(dtype):
    rng = random.Random(0)
    values = [rng.random() * 10 ** rng.uniform(-50, 39) for _ in range(20_000)]
    values += [0.0, -0.0, 5e-324, 1e-310, 1e-46, 7e-46, 1.4e-45, 65504.0, 65519.999, 65520.0, 1e39, 1.7e308, INF]
    values += [torch.finfo(DTYPES[dtype]).tiny, torch.finfo(DTYPES[dtype]).max, torch.finfo(torch.float32).max]
    # Halfway between two neighbours, and one double beside: where double rounding shows.
    some = torch.tensor(values[:2000], dtype=DTYPES[dtype])
    between = [(a + b) / 2 for a, b in zip(some.tolist(), torch.nextafter(some, some * 2).tolist(), strict=True)]
    values += [v for m in between for v in (m, math.nextafter(m, 0), math.nextafter(m, INF))]
    values += [-value for value in values]
    expected = torch.tensor(values, dtype=torch.float64).to(torch.float32).to(DTYPES[dtype]).tolist()
    assert [round_lr(value, dtype).hex() for value in values] == [value.hex() for value in expected]


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_lr_is_what_a_learning_rate_tensor_stores(dtype):
    held = torch.zeros((), dtype=DTYPES[dtype])
    rng = random.Random(1)
    values = [rng.random() * 10 ** rng.uniform(-12, 2) for _ in range(2000)]
    assert [round_lr(value, dtype) for value in values] == [held.fill_(value).item() for value in values]


def test_python_floats_are_not_rounded():
    assert round_lr(0.1, "float64") == 0.1
    assert math.isnan(round_lr(NAN, "float32"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mode", "best"), ("threshold_mode", "relative"), ("nonfinite", "skip"), ("lr_dtype", "float8"),
        ("factor", 1.0), ("factor", -0.1), ("factor", NAN), ("factor", (0.5, 1.5)), ("patience", -1),
        ("patience", NAN), ("cooldown", -1), ("warmup_steps", -1), ("start_after", -1), ("threshold", -1e-9),
        ("threshold", INF), ("threshold", NAN), ("eps", -1.0), ("eps", INF), ("eps", NAN), ("smoothing", 1.0),
        ("smoothing", -0.1), ("smoothing", NAN), ("min_lr", -1.0), ("min_lr", NAN), ("min_lr", INF),
        ("min_lr", (0.0, -1e-3)),
    ],
)  # fmt: skip
def test_an_invalid_setting_is_named(name, value):
    with pytest.raises(ValueError, match=rf"^{name}="):
        PlateauRule(**{name: value})


@pytest.mark.parametrize("edge", [{"factor": 0.0}, {"patience": 0}, {"threshold": 0.0}, {"eps": 0.0}, {"min_lr": 0.0}])
def test_the_edge_of_a_range_is_valid(edge):
    PlateauRule(**edge)
