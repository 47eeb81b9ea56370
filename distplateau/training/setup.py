"""What a configuration describes, built and checked before there is a process group."""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object
from torch import nn

from distplateau.config import Config, load_config
from distplateau.errors import InputError
from distplateau.lockstep import schedules
from distplateau.lockstep.plateau import PlateauRule
from distplateau.lockstep.scheduler import LockstepScheduler, make_scheduler
from distplateau.record.ledger import FILE_NAME, read_ledger
from distplateau.record.tracking.tracker import check_trackers
from distplateau.training.data.augment import Augment, build_augment
from distplateau.training.data.datasets import load
from distplateau.training.data.samples import Split
from distplateau.training.parts.models import build_model
from distplateau.training.parts.objective import Objective, build_objective
from distplateau.training.parts.optimizers import build_optimizer
from distplateau.training.processes import check_launcher, launched_ranks, on_cpu
from distplateau.training.saving.checkpoint import CheckpointFolder
from distplateau.training.validation import first_two, metric_names, try_training

if TYPE_CHECKING:
    from distplateau.training.data.samples import DataSet

# What may differ between a run and its continuation without changing what is computed.
_FREE_SECTIONS = frozenset({"checkpoint", "tracking"})
# What each node may call by another name.
_OF_A_NODE = ("run.dir", "data.root", "data.workers")


@dataclass(frozen=True)
class Parts:
    """What the configuration describes, built on the CPU before any process group."""

    data: DataSet
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LockstepScheduler
    length: schedules.Length
    objective: Objective
    metrics: tuple[str, ...]
    augment: Augment


def prepare_parts(config: Config) -> Parts:
    """Build data, model, optimizer and schedule, and say what is wrong with any of them.

    Raises
    ------
    InputError
        With the dotted key, the value and the fix.
    """
    check_ranks(config)
    data = load(config.data, config.run.seed)
    torch.manual_seed(config.run.seed)
    model = build_model(config.model, data.image_shape, data.num_classes)
    return assemble_parts(config, data, model, build_objective(config.training, data.num_classes))


def check_ranks(config: Config) -> None:
    """Find out what is wrong without building anything."""
    check_launcher()
    ranks = launched_ranks()
    if config.data.global_batch_size < ranks:
        raise InputError(
            "data.global_batch_size",
            f"is smaller than the {ranks} ranks",
            f"use at least {ranks}, or fewer ranks",
            value=config.data.global_batch_size,
        )
    _check_precision(config)
    _check_early_stop(config)
    check_trackers(config)


def assemble_parts(config: Config, data: DataSet, model: nn.Module, objective: Objective) -> Parts:
    """Make what belongs to a model, its data and its objective: names of metrics, augmentation, optimizer, schedule."""
    _check_images(config, data)
    metrics = metric_names(objective, model, data)
    try_training(objective, model, data)
    if config.schedule.monitor not in metrics:
        raise InputError(
            "schedule.monitor",
            "there is no such metric",
            f"choose one of {', '.join(metrics)}",
            value=config.schedule.monitor,
        )
    data = replace(data, channels_last=config.training.channels_last)
    steps_per_epoch = math.ceil(len(data.train) / config.data.global_batch_size)
    length = schedules.Length(steps_per_epoch * config.training.epochs, steps_per_epoch)
    optimizer = build_optimizer(config.optimizer, model)
    scheduler = _build_scheduler(config, optimizer, length)
    if config.training.early_stop == "min_lr" and scheduler.at_floor():
        problem = f"schedule.min_lr is no lower than the rate at the start, {max(scheduler.get_last_lr()):g}"
        raise InputError("training.early_stop", problem, "lower schedule.min_lr", value="min_lr")
    augment = build_augment(config.data.augment)
    if config.data.augment:
        augment.check(torch.zeros_like(first_two(data.train)[0][:1]))
    return Parts(data, model, optimizer, scheduler, length, objective, metrics, augment)


def _check_images(config: Config, data: DataSet) -> None:
    """Refuse what is done to images where the inputs are none."""
    shape = data.train.shape
    wishes = {"data.augment": config.data.augment, "training.channels_last": config.training.channels_last}
    for key, wish in wishes.items():
        if wish and len(shape) != len(("channels", "height", "width")):
            raise InputError(key, f"the inputs are {list(shape)} and no images [c, h, w]", "remove it", value=wish)


def _build_scheduler(config: Config, optimizer: torch.optim.Optimizer, length: schedules.Length) -> LockstepScheduler:
    section = config.schedule
    factor = schedules.SCHEDULES[section.name].factor if section.factor is None else section.factor
    try:
        rule = PlateauRule(
            mode=section.resolved_mode,
            factor=tuple(factor) if isinstance(factor, list) else factor,
            patience=section.patience,
            threshold=section.threshold,
            threshold_mode=section.threshold_mode,
            cooldown=section.cooldown,
            min_lr=tuple(section.min_lr) if isinstance(section.min_lr, list) else section.min_lr,
            eps=section.eps,
            warmup_steps=section.warmup_steps,
            start_after=section.start_after,
            smoothing=section.smoothing,
            nonfinite=section.nonfinite,
        )
        return make_scheduler(optimizer, section.name, rule, section.args, length)
    except InputError:
        raise
    except ValueError as error:
        setting = re.match(r"\w*", str(error))
        known = setting is not None and setting[0] in PlateauRule.__slots__
        where = f"schedule.{setting[0]}" if setting and known else "schedule"
        raise InputError(where, str(error), "mend that setting") from None


def _check_precision(config: Config) -> None:
    if config.training.precision == "fp16" and on_cpu():
        raise InputError("training.precision", "fp16 needs a GPU", "use 'bf16' or 'no' on a CPU", value="fp16")


def _check_early_stop(config: Config) -> None:
    wish, section = config.training.early_stop, config.schedule
    if wish is None:
        return
    if section.name not in {"plateau", "greedy"}:
        problem = f"the {section.name!r} schedule makes no reductions"
        raise InputError("training.early_stop", problem, "remove it, or use the plateau schedule", value=wish)
    floors = section.min_lr if isinstance(section.min_lr, list) else [section.min_lr]
    if wish == "min_lr" and not all(floors):
        raise InputError("training.early_stop", "schedule.min_lr is 0, which is never reached", "set it", value=wish)


def check_run_folder(config: Config, *, override: bool) -> None:
    """Refuse to continue a run with settings that would make it another one."""
    run_dir = config.run_dir
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        # Not os.access: root may write anywhere but into a read-only file system.
        (run_dir / ".writable").touch()
        (run_dir / ".writable").unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            "run.dir", f"{run_dir} cannot be written ({error.strerror})", "choose another folder", value=config.run.dir
        ) from None
    saved = run_dir / "config.toml"
    was_trained = (run_dir / FILE_NAME).exists() or CheckpointFolder(run_dir).all()
    if override or not saved.exists() or not was_trained:
        return
    different = differences(load_config(saved), config)
    if different:
        raise InputError(
            str(run_dir),
            f"holds a run with other settings ({'; '.join(different)})",
            "choose another run.name, or continue it with --resume override",
        )


def check_samples(config: Config, data: DataSet, *, override: bool) -> None:
    """Refuse to continue a run with other data: its samples would not be those of the epoch it is in."""
    try:
        known = [event["samples"] for event in read_ledger(config.run_dir).events if "samples" in event]
    except InputError:  # there is none yet, or it cannot be read
        return
    if override or not known or not isinstance(known[-1], dict):
        return
    for part, word, samples in (("train", "training", data.train), ("validation", "validation", data.validation)):
        before = known[-1].get(part, len(samples))
        if before != len(samples):
            raise InputError(
                str(config.run_dir),
                f"holds a run with {before} {word} samples, and there are {len(samples)} now",
                "choose another run.name, or continue it with --resume override",
            )


def check_same(config: Config, parts: Parts) -> None:
    """Refuse ranks that were given different things: they would wait for each other, or train on what others validate.

    Collective.

    Raises
    ------
    InputError
        With what differs; the first rank tells it.
    """
    first, *others = gather_object([_given(config, parts)])
    for rank, other in enumerate(others, start=1):
        for key in sorted(first.keys() | other.keys()):
            if first.get(key) != other.get(key):
                problem = f"is {first.get(key)} on rank 0 and {other.get(key)} on rank {rank}"
                error = InputError(key, problem, "give every rank the same")
                error.rank = 0
                raise error


def _given(config: Config, parts: Parts) -> dict[str, object]:
    """Return what has to be the same on every rank."""
    tree = config.model_dump()
    given = {f"{section}.{key}": value for section in tree for key, value in tree[section].items()}
    for key in _OF_A_NODE:
        del given[key]
    for name, samples in {"training data": parts.data.train, "validation data": parts.data.validation}.items():
        given[f"the {name}"] = f"{len(samples)} samples"
        if isinstance(samples, Split):
            labels = samples.labels.cpu().contiguous().view(torch.uint8).numpy()
            given[f"the {name}"] += f" (labels {hashlib.sha256(labels.tobytes()).hexdigest()[:8]})"
    shapes = str([list(parameter.shape) for parameter in parts.model.parameters()])
    given["the model"] = hashlib.sha256(shapes.encode()).hexdigest()[:8]
    return given


def differences(old: Config, new: Config) -> list[str]:
    """Return what differs between two configurations and changes what is computed, as ``key old -> new``."""
    result = []
    tree_old, tree_new = old.model_dump(), new.model_dump()
    for section in tree_old.keys() - _FREE_SECTIONS - {"run"}:
        keys = sorted(tree_old[section].keys() | tree_new[section].keys())
        for key in keys:
            before, after = tree_old[section].get(key), tree_new[section].get(key)
            heeded = section != "schedule" or key not in new.schedule.without_effect
            if before != after and heeded and (section, key) not in {("data", "root"), ("data", "workers")}:
                result.append(f"{section}.{key} {before!r} -> {after!r}")
    if old.run.seed != new.run.seed:
        result.append(f"run.seed {old.run.seed} -> {new.run.seed}")
    return sorted(result)
