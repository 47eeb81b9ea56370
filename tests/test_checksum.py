"""The checksum over the bits of the parameters, and the parameters it leaves out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from distplateau import ReduceLROnPlateau
from distplateau.lockstep import checksum
from distplateau.lockstep.checksum import parameters_digest
from distplateau.lockstep.consensus import DisagreementError
from ranks import run_ranks

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.complex64]
SHAPES = [(1,), (3,), (7, 5), (1024,), (1025,), (40, 64), (3, 1024), (2, 3, 4, 5)]


def values(shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(50).to(dtype)


def flipped(tensor, place, bit):
    raw = bytearray(tensor.contiguous().view(torch.uint8).flatten().tolist() if tensor.dim() else b"")
    raw[place % len(raw)] ^= 1 << bit
    return torch.tensor(list(raw), dtype=torch.uint8).view(tensor.dtype).view(tensor.shape)


@given(shape=st.sampled_from(SHAPES), dtype=st.sampled_from(DTYPES), place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_any_flipped_bit_changes_it(shape, dtype, place, bit):
    tensor = values(shape, dtype)
    assert parameters_digest([tensor]) == parameters_digest([tensor.clone()])
    assert parameters_digest([tensor]) != parameters_digest([flipped(tensor, place, bit)])


@given(first=st.integers(0, 4095), second=st.integers(0, 4095))
@example(first=0, second=2048)  # of the same column in the folded view: the sums of the rows tell
@example(first=0, second=2)  # of the same row: those of the columns do
def test_two_values_that_change_places_are_seen(first, second):
    tensor = values((4096,), torch.float32)
    swapped = tensor.clone()
    swapped[[first, second]] = tensor[[second, first]]
    assert (parameters_digest([tensor]) == parameters_digest([swapped])) == torch.equal(tensor, swapped)


def test_order_layout_and_sign_of_zero():
    one, other = values((8, 8), torch.float32), values((8, 8), torch.float32, seed=1)
    assert parameters_digest([one, other]) != parameters_digest([other, one])
    assert parameters_digest([one.t().contiguous().t()]) == parameters_digest([one])
    assert parameters_digest([torch.zeros(3)]) != parameters_digest([-torch.zeros(3)])
    assert parameters_digest([torch.tensor(1.5)]) != parameters_digest([torch.tensor(2.5)])
    assert parameters_digest([torch.zeros(0)]) == parameters_digest([])
    base = values((65,), torch.bfloat16)
    assert parameters_digest([base[1:]]) == parameters_digest([base[1:].clone()])  # not aligned to a word


def _sharded(rank, kind, guarded):
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 2))
    if kind.startswith("fsdp1"):
        from torch.distributed.fsdp import FullyShardedDataParallel

        original = kind == "fsdp1, original parameters"
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=original)
        parameters = list(model.parameters())
    elif kind == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=mesh)
        parameters = list(model.parameters())
    else:
        from torch.distributed.tensor import Shard, distribute_tensor

        split = torch.nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh, [Shard(0)]))
        parameters = [split, model[1].weight]
    scheduler = ReduceLROnPlateau(torch.optim.SGD(parameters, lr=0.1))
    is_sharded = checksum.is_sharded
    if not guarded:
        checksum.is_sharded = lambda _parameter: False
        parameters[0].data = parameters[0].data
        held = [p.to_local().detach() if hasattr(p, "to_local") else p.detach() for p in parameters]
        scheduler.optimizer.param_groups[0]["params"] = [torch.nn.Parameter(p.clone()) for p in held]
    try:
        return scheduler.step(1.0).kind
    except DisagreementError as error:
        return str(error)
    finally:
        checksum.is_sharded = is_sharded


@pytest.mark.parametrize("kind", ["dtensor", "fsdp1", "fsdp1, original parameters", "fsdp2"])
def test_shards_are_meant_to_differ_and_are_left_out(kind):
    assert run_ranks(_sharded, 2, kind, True) == ["improved"] * 2
    assert all("weights: " in message for message in run_ranks(_sharded, 2, kind, False))  # negative control


@pytest.mark.parametrize("mark", ["device_mesh", "_is_flat_param", "_fsdp_flattened", "ds_id"])
def test_parameters_marked_as_sharded_are_left_out(mark):
    """Also those of libraries that are not installed here, such as DeepSpeed."""
    marked, plain = torch.nn.Parameter(torch.ones(3)), torch.ones(2)
    assert parameters_digest([marked, plain]) != parameters_digest([plain])
    setattr(marked, mark, True)
    assert parameters_digest([marked, plain]) == parameters_digest([plain])


def _replicated_beside_shards(rank):
    """What is not sharded is still compared."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    split = torch.nn.Parameter(distribute_tensor(torch.arange(8.0).view(4, 2), mesh, [Shard(0)]))
    whole = torch.nn.Parameter(torch.tensor([float(rank)]))
    try:
        return ReduceLROnPlateau(torch.optim.SGD([split, whole], lr=0.1)).step(1.0).kind
    except DisagreementError as error:
        return str(error)


def test_a_replicated_parameter_beside_shards_is_compared():
    assert all("weights: " in message for message in run_ranks(_replicated_beside_shards, 2))
