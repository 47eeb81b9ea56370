"""What a validation measures, on this rank's share of the samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from distplateau.errors import InputError
from distplateau.training.data.loader import kind_of
from distplateau.training.data.order import deal_batches
from distplateau.training.data.samples import DataSet, Samples, Split
from distplateau.training.parts.imports import short

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from accelerate import Accelerator

    from distplateau.lockstep.metric import GlobalMean
    from distplateau.training.parts.objective import Objective


def metric_names(objective: Objective, network: nn.Module, data: DataSet) -> tuple[str, ...]:
    """Return what a validation measures, by running two samples through the network; they leave no trace in it."""
    images, labels = first_two(data.validation)
    with torch.no_grad():
        outputs = try_forward(network, data.normalize(images), training=False)
        return tuple(objective.metrics(outputs, labels))


def try_training(objective: Objective, network: nn.Module, data: DataSet) -> None:
    """Run two samples through network and loss as training does; they leave no trace.

    Raises
    ------
    InputError
        If one of them fails, or the loss has no gradient.
    """
    images, labels = first_two(data.train)
    losses = objective.loss(try_forward(network, data.normalize(images), training=True), labels)
    if not losses.requires_grad and any(parameter.requires_grad for parameter in network.parameters()):
        fix = "compute it from the model's outputs with torch's functions, without detach(), item() or numpy()"
        raise InputError("training.loss", "its values have no gradient", fix)


def try_forward(network: nn.Module, inputs: Tensor, *, training: bool) -> Tensor:
    """Return the outputs for a few samples; modes, buffers and random numbers are left as they were.

    Raises
    ------
    InputError
        If the network raises, or does not give one output for each sample.
    """
    _check_state(network)
    modes = [(module, module.training) for module in network.modules()]
    device = next((parameter.device for parameter in network.parameters()), inputs.device)
    network.train(training)
    held = [(buffer, buffer.clone()) for buffer in network.buffers() if not is_lazy(buffer)]
    try:
        # A model may draw random numbers even in evaluation mode; those of the run do not depend on this trial.
        with torch.random.fork_rng(devices=[]):
            outputs = network(inputs.to(device))
    except Exception as error:  # whatever a model says of inputs that it cannot take
        mode = "in training" if training else "in evaluation"
        kind = f"{str(inputs.dtype).removeprefix('torch.')} {list(inputs.shape[1:])}"
        problem = f"fails {mode} on inputs {kind} ({type(error).__name__}: {short(error)})"
        raise InputError("model", problem, "mend it, or give it other inputs") from error
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, values in held:
                buffer.copy_(values)
    if not isinstance(outputs, Tensor) or not outputs.dim() or len(outputs) != len(inputs):
        got = f"a tensor {list(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
        fix = "return one tensor of outputs [n, ...], in training and in evaluation"
        raise InputError("model", f"gives {got} for {len(inputs)} samples", fix)
    return _at_least_float32(outputs).to(inputs.device)


def _check_state(network: nn.Module) -> None:
    """Refuse a network whose state cannot be exchanged between ranks and saved without pickle."""
    for name, held in network.state_dict().items():
        if not isinstance(held, Tensor):
            problem = f"{name} in its state_dict() is {kind_of(held)}"
            raise InputError("model", problem, "keep tensors alone there: let get_extra_state() give one, or none")
    for name, buffer in network.named_buffers():
        if not is_lazy(buffer) and any(
            n > 1 and not step for n, step in zip(buffer.shape, buffer.stride(), strict=True)
        ):
            fix = "register buffer.clone() or buffer.contiguous()"
            raise InputError("model", f"the buffer {name} is an expanded tensor, which cannot be written to", fix)


def _at_least_float32(outputs: Tensor) -> Tensor:
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def first_two(samples: Samples) -> tuple[Tensor, Tensor]:
    """Return two samples, the only one twice: BatchNorm cannot train on one."""
    indices = torch.tensor([0, min(1, len(samples) - 1)])
    [batch] = samples.batches([indices], torch.device("cpu"), [0])
    return batch


def measure(
    accelerator: Accelerator,
    network: nn.Module,
    data: DataSet,
    split: str,
    batch_size: int,
    objective: Objective,
    metrics: Mapping[str, GlobalMean],
) -> None:
    """Add this rank's share of a split to the metrics. No communication; every sample is on exactly one rank.

    Whole batches of a fixed size are dealt out, so that a sample's loss is computed in the same shape, and with the
    same bits, at any number of ranks. `network` is not wrapped in DDP: nothing is exchanged here.
    """
    was_training = network.training
    network.eval()
    samples = getattr(data, split)
    with torch.inference_mode():
        ranges = deal_batches(len(samples), batch_size, accelerator.process_index, accelerator.num_processes)
        for images, labels in _blocks(samples, ranges, accelerator.device):
            inputs = data.normalize(images)
            # A model may change its inputs in place, and what needs no normalization are the user's own tensors.
            outputs = _at_least_float32(network(images.clone() if inputs is images else inputs))
            measured = objective.metrics(outputs, labels)
            if measured.keys() != metrics.keys():
                _tell_changed_names(measured.keys() ^ metrics.keys())
            for name, values in measured.items():
                metrics[name].update(values)
    network.train(was_training)


def _tell_changed_names(names: set[str]) -> NoReturn:
    """Refuse a metric that is there for some batches alone: it would be the mean over some of the samples."""
    listed = ", ".join(sorted(name.removeprefix("val/") for name in names))
    fix = "return the same names for every batch, with NaN where there is no value"
    raise InputError("training.metrics", f"the function gave {listed} for some batches and not for others", fix)


def _blocks(
    samples: Samples, ranges: Sequence[tuple[int, int]], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    if isinstance(samples, Split):  # neighbours in memory need not be copied
        return ((samples.images[begin:end], samples.labels[begin:end]) for begin, end in ranges)
    return samples.batches([torch.arange(begin, end) for begin, end in ranges], device)


def sync_buffers(model: nn.Module, how: str) -> None:
    """Make the buffers equal on all ranks, so that all of them validate the same network. Collective.

    DDP leaves each rank with the BatchNorm statistics of its own samples. ``mean`` averages floating buffers,
    ``broadcast`` takes those of the first rank; counters are always the first rank's.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    for dtype in dict.fromkeys(buffer.dtype for buffer in model.buffers()):
        buffers = [buffer for buffer in model.buffers() if buffer.dtype == dtype]
        flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
        if how == "mean" and dtype.is_floating_point:
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
        else:
            dist.broadcast(flat.view(torch.uint8), src=0)  # gloo does not know every dtype
        for buffer, values in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
            buffer.copy_(values.view_as(buffer))
