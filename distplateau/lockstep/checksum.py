"""A checksum over the bits of a replica's parameters: replicas that drifted apart are found at the next validation."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distplateau.lockstep.consensus import digest

if TYPE_CHECKING:
    from collections.abc import Iterable

_ROW = 1024
_MULTIPLIER = 0x9E3779B97F4A7C15 - (1 << 64)  # odd: 2**64 divided by the golden ratio, as a signed number


def parameters_digest(parameters: Iterable[Tensor]) -> bytes:
    """Return a digest of the bits of the parameters: two passes over memory, one read-back for all of them.

    Not a cryptographic hash. Any single changed bit changes it, and so does any exchange of two different values;
    unrelated changes cancel with a probability of about 2**-64.

    Parameters
    ----------
    parameters
        Tensors of any dtype and shape, on one or several devices. Those that hold only a shard of a parameter
        (DTensor, FSDP, DeepSpeed ZeRO-3) are left out: they are meant to differ between ranks.
    """
    sums: dict[torch.device, list[Tensor]] = {}
    order: list[torch.device] = []
    for parameter in parameters:
        if parameter.numel() and not is_sharded(parameter):
            sums.setdefault(parameter.device, []).append(_checksum(parameter.detach()))
            order.append(parameter.device)
    read_back = {device: iter(torch.stack(values).tolist()) for device, values in sums.items()}
    return digest(b"".join(struct.pack("<2q", *next(read_back[device])) for device in order))


def is_sharded(parameter: Any) -> bool:
    """Return whether a rank holds only a part of this parameter by design."""
    return (
        hasattr(parameter, "device_mesh")  # DTensor: tensor parallelism and FSDP2
        or hasattr(parameter, "_is_flat_param")  # FSDP1
        or hasattr(parameter, "_fsdp_flattened")  # FSDP1 with use_orig_params, which is Accelerate's default
        or type(parameter).__name__ == "FlatParameter"
        or hasattr(parameter, "ds_id")  # DeepSpeed ZeRO-3
    )


def _checksum(parameter: Tensor) -> Tensor:
    """Sum the bits as integers modulo 2**64: the columns of a folded view and its rows, each times its own odd number.

    Two sums, int64 [2], which must not be added up: a change of the highest bit is 2**63 in both, and their sum 0.
    """
    words = _words(parameter)
    rows = len(words) // _ROW
    tail = _weighted(words[rows * _ROW :].to(torch.int64), 1)
    if not rows:
        return torch.stack([tail, torch.zeros_like(tail)])
    folded = words[: rows * _ROW].view(rows, _ROW)
    columns = _weighted(folded.sum(0, dtype=torch.int64), _ROW + 1)
    return torch.stack([tail + columns, _weighted(folded.sum(1, dtype=torch.int64), 1)])


def _weighted(values: Tensor, first: int) -> Tensor:
    """Multiply each entry with an odd number of its own and add, modulo 2**64."""
    places = torch.arange(first, first + len(values), dtype=torch.int64, device=values.device)
    return (values * ((places * _MULTIPLIER) | 1)).sum()


def _words(parameter: Tensor) -> Tensor:
    """View the bits as int64 where they fill whole words (the fast way), else as integers of the element's size."""
    flat = parameter.reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    if flat.numel() * flat.element_size() % 8 == 0 and flat.element_size() <= 8:
        if flat.data_ptr() % 8 or flat.storage_offset() * flat.element_size() % 8:
            flat = flat.clone()
        return flat.view(torch.int64)
    return flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
