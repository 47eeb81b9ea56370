"""ExactSum against `fractions.Fraction`, rounded once."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distplateau.lockstep.exact import ExactSum, Partial, WeightError
from ranks import run_ranks

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


def any_bits(dtype: torch.dtype, count: int, seed: int) -> torch.Tensor:
    """Finite values of every exponent, subnormals and both zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**63), 2**63 - 1, (4 * count + 8,), generator=generator)
    if dtype == torch.bool:
        return bits[:count] % 2 == 0
    values = bits.view(dtype)
    if dtype.is_floating_point:
        values = values[torch.isfinite(values)]
        values[::7] = 0.0
        values[1::7] = -0.0
        values[2::7] = torch.finfo(dtype).smallest_normal / 2  # a subnormal
        values[3::7] = torch.finfo(dtype).max
    return values[:count].clone()


def rounded(exact: Fraction) -> float:
    try:
        return exact.numerator / exact.denominator
    except OverflowError:
        return math.inf if exact > 0 else -math.inf


def fraction_sum(values: torch.Tensor) -> Fraction:
    return sum((Fraction(value) for value in values.tolist()), Fraction(0))


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS, ids=str)
@settings(deadline=None, max_examples=25)
@given(count=st.integers(1, 400), shards=st.integers(1, 64), seed=st.integers(0, 2**32))
def test_any_split_in_any_order_is_the_rounded_fraction(dtype, count, shards, seed):
    values = any_bits(dtype, count, seed)
    shuffler = random.Random(seed)
    order = list(range(count))
    shuffler.shuffle(order)
    cuts = sorted(shuffler.randrange(count + 1) for _ in range(shards - 1))
    total = Partial()
    for begin, end in zip([0, *cuts], [*cuts, count], strict=True):
        shard = ExactSum()
        for part in values[order[begin:end]].split(7):
            shard.add(part)
        total += shard.partial()
    exact = fraction_sum(values)
    assert total.sum() == rounded(exact)
    assert total.mean() == rounded(exact / count)
    assert total.count() == count


@settings(deadline=None, max_examples=60)
@given(count=st.integers(1, 200), seed=st.integers(0, 2**32), dtype=st.sampled_from([*FLOATS, torch.int64]))
def test_weighted_mean_is_the_rounded_fraction(count, seed, dtype):
    values = any_bits(dtype, count, seed)
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-250, 250, (count,), generator=generator).double()
    weights = (1 + torch.rand(count, generator=generator, dtype=torch.float64)) * 2.0**exponents
    weights[::5] = 0.0
    total = ExactSum()
    for v, w in zip(values.split(9), weights.split(9), strict=True):
        total.add(v, w)
    products = sum(
        (Fraction(v) * Fraction(w) for v, w in zip(values.tolist(), weights.tolist(), strict=True)), Fraction(0)
    )
    if weight := fraction_sum(weights):
        assert total.mean() == rounded(products / weight)
        assert total.partial().count() == rounded(weight)


def test_float_addition_would_depend_on_the_order():
    """Negative control: plain float64 sums of the same values differ between two orders."""
    values = torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    forward, backward = sum(values.tolist()), sum(reversed(values.tolist()))
    assert forward != backward
    sums = []
    for order in (values, values.flip(0)):
        total = ExactSum()
        total.add(order)
        sums.append(total.sum())
    assert sums[0] == sums[1] == rounded(fraction_sum(values))


def test_overflow_past_float64_is_an_infinite_sum_and_a_finite_mean():
    largest = torch.finfo(torch.float64).max
    total = ExactSum()
    total.add(torch.full((10,), largest, dtype=torch.float64))
    assert total.sum() == math.inf
    assert total.mean() == largest


@pytest.mark.parametrize(
    ("values", "mean"),
    [
        ([1.0, math.nan], math.nan),
        ([1.0, math.inf], math.inf),
        ([1.0, -math.inf], -math.inf),
        ([math.inf, -math.inf], math.nan),
        ([0.0, -0.0], 0.0),
    ],
)
def test_nonfinite_values_are_counted_apart(values, mean):
    total = ExactSum()
    total.add(torch.tensor(values))
    partial = total.partial()
    assert partial.nan == sum(map(math.isnan, values))
    assert partial.pos_inf == values.count(math.inf)
    assert partial.neg_inf == values.count(-math.inf)
    assert partial.mean() == pytest.approx(mean, nan_ok=True)


def test_weight_zero_leaves_a_nan_out():
    total = ExactSum()
    total.add(torch.tensor([math.nan, 3.0]), torch.tensor([0.0, 2.0]))
    assert total.mean() == 3.0


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf, 2.0**300, 2.0**-300])
def test_weights_that_are_not_allowed_are_refused(weight):
    total = ExactSum()
    total.add(torch.tensor([1.0, 2.0]), torch.tensor([1.0, weight], dtype=torch.float64))
    with pytest.raises(WeightError, match="1 weights"):
        total.mean()


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (0,)])
@pytest.mark.parametrize("array", [False, True])
def test_values_and_weights_are_copied(shape, array):
    buffer, weights = torch.ones(shape), torch.ones(shape)
    total = ExactSum()
    total.add(2.0)
    total.add(*((buffer.numpy(), weights.numpy()) if array else (buffer, weights)))
    buffer.fill_(100.0)
    weights.fill_(7.0)
    assert total.mean() == rounded(Fraction(2 + buffer.numel(), 1 + buffer.numel()))


def test_views_that_are_not_contiguous():
    values, weights = torch.arange(12.0).view(3, 4), torch.arange(12.0).view(4, 3)
    total = ExactSum()
    total.add(values.t(), weights)
    total.add(values[:, ::2])
    total.add(torch.tensor(5.0).expand(2, 2))
    assert total.sum() == float((values.t() * weights).sum() + values[:, ::2].sum() + 20)


def test_numbers_and_scalar_weights():
    total = ExactSum()
    total.add(0.25, weights=64)
    total.add(torch.tensor(0.5), weights=36)
    total.add(7)
    assert total.partial().count() == 101
    assert total.mean() == rounded((Fraction(64, 4) + Fraction(36, 2) + 7) / 101)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="one weight per value"):
        ExactSum().add(torch.ones(3), torch.ones(2))


@pytest.mark.parametrize("values", [torch.ones(2, dtype=torch.complex64), torch.ones(2).to(torch.uint64)], ids=str)
def test_dtypes_without_an_exact_sum_are_refused(values):
    with pytest.raises(TypeError, match="cannot sum"):
        ExactSum().add(values)


def test_many_blocks_and_folds(monkeypatch):
    monkeypatch.setattr("distplateau.lockstep.exact._BLOCK", 16)
    monkeypatch.setattr("distplateau.lockstep.exact._FOLD", 200)
    values = any_bits(torch.float64, 3000, seed=5)
    total = ExactSum()
    for part in values.split(37):
        total.add(part)
    assert total._folded != Partial()  # it folded on the way, before the limbs could overflow
    assert total.sum() == rounded(fraction_sum(values))
    assert total.partial().count() == 3000


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_flush_to_zero_mode_changes_nothing(dtype):
    subnormal = torch.tensor([0.625 * torch.finfo(dtype).smallest_normal], dtype=dtype)
    value = subnormal.item()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no flush-to-zero mode")
    try:
        lost = (subnormal.double() * 2.0).item()  # negative control: arithmetic on it gives zero
        total = ExactSum()
        total.add(subnormal, 2.0**200)
        plain = ExactSum()
        plain.add(subnormal)
        weighted, unweighted = total.partial(), plain.partial()
    finally:
        torch.set_flush_denormal(False)
    assert dtype == torch.float16 or lost == 0.0  # all float16 are normal numbers in float32
    assert weighted.sum() == value * 2.0**200
    assert unweighted.sum() == value


@pytest.mark.parametrize("first", [True, False])
def test_blocks_that_fill_up_in_inference_mode(monkeypatch, first):
    monkeypatch.setattr("distplateau.lockstep.exact._BLOCK", 8)
    total = ExactSum()
    with torch.inference_mode(first):
        total.add(torch.ones(9), torch.ones(9))
    with torch.inference_mode(not first):
        total.add(torch.ones(10))
    assert total.partial().count() == total.sum() == 19


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("weight", [3.0, 3, torch.tensor(3), torch.tensor([3.0]), torch.tensor([[3.0]])], ids=repr)
def test_one_weight_for_all_whatever_the_size_of_the_batch(count, weight):
    """The last batch of one rank may have a single value: an error there would leave the others waiting."""
    total = ExactSum()
    total.add(torch.full((count,), 2.0), weight)
    total.add(torch.tensor(2.0), weight)
    assert (total.mean(), total.partial().count()) == (2.0, 3 * (count + 1))


def test_arrays_and_lists():
    import numpy as np

    total = ExactSum()
    total.add(np.array([2**60, 1]), np.array([1.0, 0.5]))
    total.add([0.1], [1])
    exact = 2**60 + Fraction(1, 2) + Fraction(0.1)
    assert total.sum() == rounded(exact)
    with pytest.raises(ValueError, match="one weight per value"):
        total.add(torch.ones(3), [1.0, 2.0])


def test_dtypes_that_torch_does_not_promote_may_be_mixed():
    total = ExactSum()
    for dtype in (torch.uint32, torch.int64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float32, torch.uint16):
        total.add(torch.ones(3).to(dtype))
    assert total.sum() == 18.0


def _add_dtensor(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    with pytest.raises(TypeError, match="cannot sum a DTensor: add its to_local"):
        ExactSum().add(distribute_tensor(torch.ones(2), init_device_mesh("cpu", (1,)), [Replicate()]))


def test_a_dtensor_is_refused_when_it_is_added():
    run_ranks(_add_dtensor, 1)
