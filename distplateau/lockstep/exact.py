"""Order-independent, correctly rounded sums of tensors.

A float64 is an integer times a power of two, so a sum of any number of them is one long integer. `ExactSum` adds into
limbs of that integer (a superaccumulator: Kulisch, "Computer Arithmetic and Validity"; Neal, "Fast exact summation
using small and large superaccumulators", arXiv 1505.05571). Integer addition is associative: the bits of the result do
not depend on the order, the batches or the number of ranks, and the mean is rounded once, at the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Values: TypeAlias = Tensor | float | int

# Numerators count in units of 2**-VALUE_SHIFT: the lowest bit of a float64 (2**-1074) times that of a weight.
WEIGHT_SHIFT = 308
VALUE_SHIFT = 1074 + WEIGHT_SHIFT
# Weights lie within 2**-256 .. 2**256, which keeps the payload of the all-reduce below 1 KiB.
MAX_WEIGHT_EXPONENT = 256
# Headroom for 2**40 samples and a sign.
VALUE_BITS = VALUE_SHIFT + 1024 + MAX_WEIGHT_EXPONENT + 41
WEIGHT_BITS = WEIGHT_SHIFT + MAX_WEIGHT_EXPONENT + 42

_LIMB_BITS = 32
_LIMB_MASK = (1 << _LIMB_BITS) - 1
_VALUE_LIMBS = VALUE_BITS // _LIMB_BITS + 3
_WEIGHT_LIMBS = WEIGHT_BITS // _LIMB_BITS + 3
_COUNTERS = 4  # nan, +inf, -inf, weights that are not allowed
_FRACTION_BITS = 52
_UNIT = 1074  # the position of 1 above the lowest bit of a float64
_HALF_BITS = 27
_BLOCK = 1 << 18  # elements per scatter: bounds the temporaries to a few MiB
_FOLD = 1 << 28  # additions after which an int64 limb might overflow


class WeightError(ValueError):
    """A weight is negative, NaN, infinite, or outside 2**-256 .. 2**256."""


@dataclass(frozen=True, slots=True)
class Partial:
    """An exact sum on the host: what one rank adds to the global mean, and what the all-reduce of them gives.

    Parameters
    ----------
    numerator
        Sum of value times weight in units of ``2**-1382``.
    weight
        Sum of the weights in units of ``2**-308``.
    nan, pos_inf, neg_inf
        How many values were not finite; they are counted apart and not part of `numerator`.
    bad_weights
        How many weights were not allowed.
    """

    numerator: int = 0
    weight: int = 0
    nan: int = 0
    pos_inf: int = 0
    neg_inf: int = 0
    bad_weights: int = 0

    @property
    def finite(self) -> bool:
        """Return whether all values were finite."""
        return not (self.nan or self.pos_inf or self.neg_inf)

    def __add__(self, other: Partial) -> Partial:
        return Partial(
            self.numerator + other.numerator,
            self.weight + other.weight,
            self.nan + other.nan,
            self.pos_inf + other.pos_inf,
            self.neg_inf + other.neg_inf,
            self.bad_weights + other.bad_weights,
        )

    def sum(self) -> float:
        """Return the sum of value times weight, correctly rounded; infinite where it is beyond float64."""
        return self._nonfinite() if self._has_nonfinite() else _divide(self.numerator, 1 << VALUE_SHIFT)

    def mean(self) -> float:
        """Return the weighted mean, correctly rounded; NaN for a NaN or infinities of both signs.

        Raises
        ------
        WeightError
            If a weight was not allowed.
        ZeroDivisionError
            If the weights sum to zero.
        """
        if self.bad_weights:
            raise WeightError(
                f"{self.bad_weights} weights are negative, not finite or outside 2**-256 .. 2**256: "
                f"pass sample counts, or scale them"
            )
        if self.weight == 0:
            raise ZeroDivisionError("the mean of no samples (the weights sum to zero)")
        if self._has_nonfinite():
            return self._nonfinite()
        return _divide(self.numerator, self.weight << (VALUE_SHIFT - WEIGHT_SHIFT))

    def count(self) -> float:
        """Return the total weight, correctly rounded: the number of samples where no weights were given."""
        return _divide(self.weight, 1 << WEIGHT_SHIFT)

    def _has_nonfinite(self) -> bool:
        return bool(self.nan or self.pos_inf or self.neg_inf)

    def _nonfinite(self) -> float:
        if self.nan or (self.pos_inf and self.neg_inf):
            return math.nan
        return math.inf if self.pos_inf else -math.inf


class ExactSum:
    """Sum of tensors whose bits depend on the values alone. Not a collective: it sums what this rank adds.

    Notes
    -----
    `add` copies and returns at once: no arithmetic, no host synchronisation. Blocks of 2**18 values are flushed into
    integer limbs on their own device; `partial` reads the limbs back, which is the one synchronisation.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[Tensor, Tensor | float | None]] = []
        self._pending_count = 0
        self._limbs: dict[torch.device, Tensor] = {}
        self._scattered = 0
        self._folded = Partial()
        self._unweighted_count = 0

    def add(self, values: Values, weights: Values | None = None) -> None:
        """Add values, each times its weight.

        Parameters
        ----------
        values
            Tensor of any shape, also empty, of a floating or integer dtype on any device; or a number. It is copied.
        weights
            Tensor of the same shape, or a number (also a tensor of one) that holds for all values; default 1. At
            least 0, and 0 leaves a value out whatever it is. Sums of products are exact as well.

        Raises
        ------
        TypeError
            For complex or unsigned 64-bit values, and for a DTensor.
        ValueError
            If the shapes differ.
        """
        values = _as_tensor(values)
        if weights is not None and not isinstance(weights, float | int):
            weights = _as_tensor(weights)
            if weights.numel() == 1:  # the last batch may have one value: this may not depend on its size
                weights = weights.reshape(()).expand(values.shape)
            if weights.shape != values.shape:
                raise ValueError(
                    f"weights of shape {tuple(weights.shape)} for values of shape {tuple(values.shape)}: "
                    f"give one weight per value"
                )
            weights = _flat_copy(weights).to(values.device)
        size = values.numel()
        if size:
            self._pending.append((_flat_copy(values), weights))
            self._pending_count += size
            if self._pending_count >= _BLOCK:
                self._flush()

    def absorb(self, partial: Partial) -> None:
        """Add a sum that was made elsewhere, or before an interruption."""
        self._folded += partial

    def partial(self) -> Partial:
        """Return the exact sum so far. Waits for the device."""
        self._flush()
        self._fold()
        return self._folded

    def sum(self) -> float:
        """Return the sum of value times weight, correctly rounded."""
        return self.partial().sum()

    def mean(self) -> float:
        """Return the weighted mean, correctly rounded. Raises as `Partial.mean` does."""
        return self.partial().mean()

    def _flush(self) -> None:
        """Scatter what is pending, one kind of it (device, dtype, weighted or not) at a time."""
        pending, self._pending, self._pending_count = self._pending, [], 0
        kinds: dict[tuple[torch.device, torch.dtype, bool], list[tuple[Tensor, Tensor | float | None]]] = {}
        for values, weights in pending:
            kinds.setdefault((values.device, values.dtype, weights is not None), []).append((values, weights))
        for (_, _, weighted), items in kinds.items():
            values = torch.cat([v for v, _ in items]) if len(items) > 1 else items[0][0]
            weights = torch.cat([_weight_tensor(v, w) for v, w in items]) if weighted else None
            for begin in range(0, len(values), _BLOCK):
                block = slice(begin, begin + _BLOCK)
                self._scatter_block(values[block], None if weights is None else weights[block])

    def _scatter_block(self, values: Tensor, weights: Tensor | None) -> None:
        limbs = self._limbs_on(values.device)
        self._scattered += 12 * len(values)
        if self._scattered > _FOLD:
            self._fold()
            limbs = self._limbs_on(values.device)
            self._scattered = 12 * len(values)
        value_limbs = limbs[:_VALUE_LIMBS]
        counters = limbs[-_COUNTERS:]
        if weights is None:
            self._unweighted_count += len(values)
            mantissas, positions = _decompose(values, counters, None)
            _scatter(value_limbs, mantissas, positions + WEIGHT_SHIFT)
            return
        weight_mantissas, weight_positions, used = _decompose_weights(weights, counters)
        _scatter(limbs[_VALUE_LIMBS:-_COUNTERS], weight_mantissas, weight_positions)
        mantissas, positions = _decompose(values, counters, used)
        repeats = len(mantissas) // len(weight_mantissas)
        _scatter_products(
            value_limbs, mantissas, positions, weight_mantissas.repeat(repeats), weight_positions.repeat(repeats)
        )

    def _limbs_on(self, device: torch.device) -> Tensor:
        if device not in self._limbs:
            size = _VALUE_LIMBS + _WEIGHT_LIMBS + _COUNTERS
            # What is made in inference mode, in which people validate, cannot be added to outside of it.
            with torch.inference_mode(mode=False):
                self._limbs[device] = torch.zeros(size, dtype=torch.int64, device=device)
        return self._limbs[device]

    def _fold(self) -> None:
        """Move the limbs of all devices into Python integers on the host."""
        for limbs in self._limbs.values():
            numbers = limbs.tolist()
            counters = numbers[-_COUNTERS:]
            self._folded += Partial(
                _from_limbs(numbers[:_VALUE_LIMBS]), _from_limbs(numbers[_VALUE_LIMBS:-_COUNTERS]), *counters
            )
        self._limbs = {}
        self._folded += Partial(weight=self._unweighted_count << WEIGHT_SHIFT)
        self._scattered = self._unweighted_count = 0


def _as_tensor(values: Values) -> Tensor:
    if not isinstance(values, Tensor):
        dtype = torch.int64 if isinstance(values, int) else None if hasattr(values, "dtype") else torch.float64
        values = torch.as_tensor(values, dtype=dtype)  # an array of NumPy keeps its own
    if hasattr(values, "device_mesh"):
        raise TypeError("cannot sum a DTensor: add its to_local() where it is sharded, its full_tensor() on one rank")
    if values.is_complex() or values.dtype == torch.uint64:
        raise TypeError(f"cannot sum values of dtype {values.dtype}: use a real floating or a signed integer dtype")
    return values


def _flat_copy(values: Tensor) -> Tensor:
    # Each call of torch costs about a microsecond, and this one is made for every batch.
    if values.requires_grad:
        values = values.detach()
    return values.clone() if values.dim() == 1 else values.clone().reshape(-1)


def _weight_tensor(values: Tensor, weights: Tensor | float | None) -> Tensor:
    if isinstance(weights, Tensor):
        return weights.double()
    return torch.full((len(values),), float(weights or 0.0), dtype=torch.float64, device=values.device)


def _decompose(values: Tensor, counters: Tensor, used: Tensor | None) -> tuple[Tensor, Tensor]:
    """Split values into signed integers below 2**53 and bit positions above 2**-1074; count the non-finite ones.

    The bits are read as they stand rather than through `frexp`, so that flush-to-zero modes change nothing.
    """
    if not values.is_floating_point():
        return _decompose_integers(values.to(torch.int64), wide=values.element_size() == 8)
    bits, fraction_bits, exponent_mask, lowest = _float_bits(values)
    exponent = (bits >> fraction_bits) & exponent_mask
    fraction = bits & ((1 << fraction_bits) - 1)
    nonfinite = exponent == exponent_mask
    negative = bits < 0
    mantissa = fraction | ((exponent > 0).to(torch.int64) << fraction_bits)
    mantissa = torch.where(negative, -mantissa, mantissa)
    # Looking costs nothing on the CPU, and a third of the work is for values that hardly ever come.
    if values.device.type != "cpu" or nonfinite.any():
        counted = nonfinite if used is None else nonfinite & used
        is_nan = fraction != 0
        counters[0] += (counted & is_nan).sum()
        counters[1] += (counted & ~is_nan & ~negative).sum()
        counters[2] += (counted & ~is_nan & negative).sum()
        mantissa.masked_fill_(nonfinite, 0)
    return mantissa, exponent.clamp_(min=1).add_(lowest - 1)


def _decompose_integers(values: Tensor, *, wide: bool) -> tuple[Tensor, Tensor]:
    position = torch.full_like(values, _UNIT)
    if not wide:
        return values, position
    return torch.cat([values & _LIMB_MASK, values >> _LIMB_BITS]), torch.cat([position, position + _LIMB_BITS])


def _float_bits(values: Tensor) -> tuple[Tensor, int, int, int]:
    """Return the bits as int64, how many of them are the fraction, the mask of the exponent, and the lowest position.

    Only float16 and narrower are converted, to float32, where all their values are normal numbers: converting a
    subnormal float32 gives zero in the flush-to-zero mode.
    """
    if values.dtype == torch.float64:
        return values.view(torch.int64), _FRACTION_BITS, 0x7FF, 0
    if values.dtype == torch.bfloat16:
        bits = values.view(torch.int16).to(torch.int64) << 16
    else:
        bits = values.float().view(torch.int32).to(torch.int64)
    return bits, 23, 0xFF, _UNIT - 149


def _decompose_weights(weights: Tensor, counters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split weights into integers below 2**53 and bit positions above 2**-308; zero and forbidden ones become 0."""
    low, high = 2.0**-MAX_WEIGHT_EXPONENT, 2.0**MAX_WEIGHT_EXPONENT
    allowed = (weights >= low) & (weights <= high)
    counters[3] += (~allowed & (weights != 0)).sum()
    bits = torch.where(allowed, weights, 1.0).view(torch.int64)
    mantissa = (bits & ((1 << _FRACTION_BITS) - 1)) | (1 << _FRACTION_BITS)
    position = (bits >> _FRACTION_BITS) - 1 - (1074 - WEIGHT_SHIFT)
    return mantissa.masked_fill_(~allowed, 0), position, allowed


def _scatter_products(limbs: Tensor, m: Tensor, p: Tensor, w: Tensor, q: Tensor) -> None:
    """Add m * w * 2**(p + q); the 106-bit products are made of 27-bit halves that fit int64."""
    half = (1 << _HALF_BITS) - 1
    m_low, m_high, w_low, w_high = m & half, m >> _HALF_BITS, w & half, w >> _HALF_BITS
    position = p + q
    _scatter(limbs, m_low * w_low, position)
    _scatter(limbs, m_low * w_high + m_high * w_low, position + _HALF_BITS)
    _scatter(limbs, m_high * w_high, position + 2 * _HALF_BITS)


def _scatter(limbs: Tensor, mantissas: Tensor, positions: Tensor) -> None:
    """Add signed integers below 2**56 at their bit positions to limbs of 32 bits, in place."""
    index, shift = positions >> 5, positions & 31
    low = (mantissas & _LIMB_MASK) << shift  # below 2**63
    high = (mantissas >> _LIMB_BITS) << shift
    limbs.index_add_(0, index, low & _LIMB_MASK)
    limbs.index_add_(0, index + 1, (low >> _LIMB_BITS) + (high & _LIMB_MASK))
    limbs.index_add_(0, index + 2, high >> _LIMB_BITS)


def _from_limbs(limbs: list[int]) -> int:
    return sum(limb << (_LIMB_BITS * place) for place, limb in enumerate(limbs))


def _divide(numerator: int, denominator: int) -> float:
    """Divide integers with one rounding (Python's int / int is correctly rounded), overflowing to infinity."""
    try:
        return numerator / denominator
    except OverflowError:
        return math.inf if numerator > 0 else -math.inf
