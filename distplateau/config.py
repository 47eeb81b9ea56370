"""The typed run configuration: TOML in, validated and frozen, TOML out.

Every key of a run's ``config.toml`` is a field here. A wrong key or value raises `InputError` with the dotted
key, the value and the fix, before anything heavy is imported.
"""

from __future__ import annotations

import copy
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tomli_w
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticUndefined

from distplateau.errors import InputError, closest
from distplateau.lockstep.schedules import SCHEDULES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_INTERVAL = re.compile(r"(?P<count>[1-9]\d*) (?P<unit>epoch|epochs|step|steps)")
_DURATION = re.compile(r"(?P<count>[1-9]\d*) (?P<unit>s|min|h)")
_UNIT_SECONDS = {"s": 1, "min": 60, "h": 3600}

_EARLY_STOP = re.compile(r"(?P<count>[1-9]\d*) reductions?")


def _check_interval(text: str) -> str:
    if not _INTERVAL.fullmatch(text):
        raise ValueError('write "1 epoch" or "500 steps"')
    return text


def _check_interval_or_duration(text: str) -> str:
    if not _INTERVAL.fullmatch(text) and not _DURATION.fullmatch(text):
        raise ValueError('write "1 epoch", "500 steps" or "10 min"')
    return text


def _check_early_stop(text: str) -> str:
    if text != "min_lr" and not _EARLY_STOP.fullmatch(text):
        raise ValueError('write "3 reductions" or "min_lr"')
    return text


def _check_folder(name: str) -> str:
    if name in {".", ".."}:
        raise ValueError("write the name of a folder")
    return name


def interval_in_steps(text: str, steps_per_epoch: int) -> int:
    """Translate an interval such as ``"2 epochs"`` or ``"500 steps"`` to optimizer steps."""
    match = _INTERVAL.fullmatch(text)
    assert match, "the configuration checked this already"
    return int(match["count"]) * (steps_per_epoch if match["unit"].startswith("epoch") else 1)


def interval_in_seconds(text: str) -> int | None:
    """Translate an interval such as ``"10 min"`` to seconds; None if it is counted in epochs or steps."""
    match = _DURATION.fullmatch(text)
    return int(match["count"]) * _UNIT_SECONDS[match["unit"]] if match else None


Interval = Annotated[str, AfterValidator(_check_interval)]
IntervalOrDuration = Annotated[str, AfterValidator(_check_interval_or_duration)]
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Factor = Annotated[float, Field(gt=0, lt=1)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Section(BaseModel):
    """What all sections share: no unknown keys, no silent conversions, no change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Model = TypeVar("Model", bound=Section)


class RunSection(Section):
    """Where the run lives and what its randomness is derived from."""

    name: Annotated[
        str,
        AfterValidator(_check_folder),
        Field(pattern=r"^[^/\x00-\x1f\x7f]+$", description="folder name of the run, without /"),
    ] = "run"
    dir: Annotated[str, Field(min_length=1, description="folder that holds the runs")] = "runs"
    seed: Annotated[int, Field(ge=0, lt=2**63, description="weights, data order and dropout follow from it")] = 0


class DataSection(Section):
    """The data set, its split and its batches. Batch sizes are global: they do not change with the ranks."""

    name: Annotated[
        str,
        Field(min_length=1, description="digits, mnist, fashion-mnist, cifar10, image-folder, package.module:function"),
    ] = "digits"
    root: Annotated[str, Field(min_length=1, description="where data sets are looked for and downloaded to")] = "data"
    global_batch_size: Annotated[Positive, Field(description="samples per optimizer step, over all ranks")] = 64
    eval_batch_size: Annotated[Positive, Field(description="samples per validation batch; fixed at any rank count")] = (
        256
    )
    validation_size: Annotated[
        Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)],
        Field(description="samples (or share) carved out of the training set"),
    ] = 0.1
    args: Annotated[dict[str, Any], Field(description="settings of image-folder, arguments of a function")] = {}
    workers: Annotated[NonNegative, Field(description="processes that read data which is not kept in memory")] = 2
    augment: Annotated[
        list[str | dict[str, Any]],
        Field(
            description='of the training images: "flip", "crop", "erase", a torchvision v2 transform, or {name = ...}'
        ),
    ] = []


class ModelSection(Section):
    """A torchvision model name, ``mlp``, or ``package.module:function`` with its keyword arguments."""

    name: Annotated[str, Field(min_length=1, description="mlp, a torchvision model, or package.module:function")] = (
        "mlp"
    )
    args: Annotated[dict[str, Any], Field(description="keyword arguments of the model")] = {}


class ParamGroup(Section):
    """Parameters whose name matches a regular expression get settings of their own."""

    match: Annotated[str, Field(description="regular expression searched in the parameter's name")]
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    weight_decay: Rate | None = None


class OptimizerSection(Section):
    """A `torch.optim` class by its lower-case name; further keys (``momentum``, ``betas``) go to it."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    name: Annotated[str, Field(description="torch.optim class in lower case: adam, adamw, sgd, ...")] = "adam"
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False, description="peak learning rate")] = 1e-3
    weight_decay: Annotated[Rate, Field(description="weight decay (L2 or decoupled, as the optimizer has it)")] = 0.0
    groups: Annotated[list[ParamGroup], Field(description="parameter groups with settings of their own")] = []

    @property
    def args(self) -> dict[str, Any]:
        """Return the further keyword arguments of the optimizer."""
        return dict(self.__pydantic_extra__ or {})


class ScheduleSection(Section):
    """How the learning rate moves. The names, their order and their defaults are torch's."""

    name: Annotated[str, Field(description=", ".join(SCHEDULES))] = "plateau"
    monitor: Annotated[str, Field(description="metric that decides: val/loss, val/accuracy, val/top5")] = "val/loss"
    mode: Annotated[Literal["min", "max"] | None, Field(description="default: max for accuracies, else min")] = None
    factor: Annotated[
        Factor | Annotated[list[Factor], Field(min_length=1)] | None,
        Field(description="number above 0 and below 1 that the LR is multiplied by, one or per group"),
    ] = None
    patience: Annotated[NonNegative, Field(description="bad validations that are tolerated")] = 10
    threshold: Annotated[Rate, Field(description="smallest change that counts as better")] = 1e-4
    threshold_mode: Annotated[Literal["rel", "abs"], Field(description="rel: a share of the best; abs: as it is")] = (
        "rel"
    )
    cooldown: Annotated[NonNegative, Field(description="validations to wait after a change")] = 0
    min_lr: Annotated[
        Rate | Annotated[list[Rate], Field(min_length=1)], Field(description="floor, one or per group")
    ] = 0.0
    eps: Annotated[Rate, Field(description="smaller changes of the LR are not made")] = 1e-8
    warmup_steps: Annotated[NonNegative, Field(description="optimizer steps of linear warmup")] = 0
    start_after: Annotated[NonNegative, Field(description="validations before the plateau logic begins")] = 0
    smoothing: Annotated[float, Field(ge=0, lt=1, description="EMA weight of the past metric, 0 = off")] = 0.0
    restore_best: Annotated[
        bool | Literal["reset"],
        Field(description='put the best weights back at a reduction; "reset" forgets the optimizer\'s state as well'),
    ] = False
    nonfinite: Annotated[Literal["bad", "ignore", "raise"], Field(description="what NaN or inf counts as")] = "bad"
    args: Annotated[dict[str, Any], Field(description="settings of one schedule, such as step_size or t_0")] = {}

    @property
    def resolved_mode(self) -> Literal["min", "max"]:
        """Return `mode`, or the direction that the monitored metric implies."""
        return self.mode or ("max" if self.monitor in {"val/accuracy", "val/top5"} else "min")

    @property
    def without_effect(self) -> list[str]:
        """Return the keys that were set and that this schedule does not heed."""
        heeded = SCHEDULES[self.name].decision_keys
        return sorted(self.model_fields_set & (SCHEDULES["plateau"].decision_keys - heeded))

    @model_validator(mode="after")
    def _check_schedule(self) -> ScheduleSection:
        if self.name not in SCHEDULES:
            raise InputError(
                "schedule.name", "there is no such schedule", closest(self.name, SCHEDULES), value=self.name
            )
        valid = SCHEDULES[self.name].args
        for key, value in self.args.items():
            if key not in valid:
                fix = closest(key, valid) if valid else f"the {self.name!r} schedule takes none"
                raise InputError(f"schedule.args.{key}", "unknown setting", fix, value=value)
        return self


class TrainingSection(Section):
    """The loop."""

    epochs: Annotated[Positive, Field(description="passes over the training data")] = 10
    loss: Annotated[
        str,
        Field(min_length=1, description="cross_entropy, mse, bce, or package.module:function"),
    ] = "cross_entropy"
    loss_args: Annotated[dict[str, Any], Field(description="settings of the loss, such as label_smoothing")] = {}
    metrics: Annotated[
        Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] | None,
        Field(description="package.module:function of (outputs, targets), returns per-sample values by name"),
    ] = None
    precision: Annotated[Literal["no", "bf16", "fp16"], Field(description="mixed precision through Accelerate")] = "no"
    grad_accumulation: Annotated[Positive, Field(description="micro-batches a global batch is computed in")] = 1
    max_grad_norm: Annotated[Annotated[float, Field(gt=0)] | None, Field(description="clip gradients to this norm")] = (
        None
    )
    micro_batch_size: Annotated[
        Positive | None, Field(description="most samples of a rank in one forward pass; a larger share is cut up")
    ] = None
    validate_every: Annotated[Interval, Field(description='"1 epoch" or "500 steps"')] = "1 epoch"
    early_stop: Annotated[
        Annotated[str, AfterValidator(_check_early_stop)] | None,
        Field(description='"3 reductions" or "min_lr": end the run when it has come to that'),
    ] = None
    ema: Annotated[
        Annotated[float, Field(gt=0, lt=1)] | None,
        Field(description="decay of a moving average of the weights, which is validated and saved in their place"),
    ] = None
    compile: Annotated[bool, Field(description="torch.compile the model")] = False
    channels_last: Annotated[bool, Field(description="keep images with their channels last in memory")] = False
    static_graph: Annotated[
        bool, Field(description="DDP may count on the same parameters being used in every step; some may be unused")
    ] = False
    deterministic: Annotated[
        bool, Field(description="only kernels that repeat themselves bit for bit; GPUs have others")
    ] = False
    sync_batchnorm_stats: Annotated[
        Literal["mean", "broadcast"], Field(description="make BatchNorm buffers equal before a validation")
    ] = "mean"

    @property
    def most_reductions(self) -> int | None:
        """Return after how many reductions a further one ends the run, None for no such end."""
        match = _EARLY_STOP.fullmatch(self.early_stop or "")
        return int(match["count"]) if match else None


class CheckpointSection(Section):
    """How often the run can be continued from, and how many checkpoints stay."""

    every: Annotated[IntervalOrDuration, Field(description='"1 epoch", "500 steps" or "10 min"')] = "1 epoch"
    keep: Annotated[
        Positive, Field(description="newest checkpoints that are kept, beside that of the best validation")
    ] = 2

    @property
    def seconds(self) -> int | None:
        """Return `every` in seconds, None if it is counted in epochs or steps."""
        return interval_in_seconds(self.every)


TrackerName = Literal["tensorboard", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab", "trackio"]


class TrackingSection(Section):
    """What is mirrored to Weights & Biases and to other trackers."""

    wandb: Annotated[Literal["online", "offline", "disabled"], Field(description="offline needs no account")] = (
        "offline"
    )
    project: Annotated[str, Field(min_length=1, description="W&B project")] = "distplateau"
    entity: Annotated[str | None, Field(description="W&B user or team")] = None
    group: Annotated[str | None, Field(description="W&B group")] = None
    tags: Annotated[list[str], Field(description="list of W&B tags")] = []
    log_every: Annotated[
        IntervalOrDuration, Field(description='lines between validations where there is no terminal: "500 steps"')
    ] = "1 min"
    trackers: Annotated[
        list[TrackerName], Field(description='further trackers, such as "tensorboard"; all that Accelerate knows')
    ] = []


class Config(Section):
    """A whole run."""

    run: RunSection = RunSection()
    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    training: TrainingSection = TrainingSection()
    checkpoint: CheckpointSection = CheckpointSection()
    tracking: TrackingSection = TrackingSection()

    @property
    def run_dir(self) -> Path:
        """Return the run folder, ``<run.dir>/<run.name>``."""
        return Path(self.run.dir).expanduser() / self.run.name


def load_config(path: str | Path, overrides: dict[str, str] | None = None) -> Config:
    """Read a TOML file and put `overrides` (dotted key -> text as typed) on top of it.

    Raises
    ------
    InputError
        For a missing or broken file, an unknown key, a wrong type or a value out of range.
    """
    return parse_config(with_overrides(read_toml(Path(path)), overrides or {}))


def with_overrides(tree: Mapping[str, Any], overrides: Mapping[str, str]) -> dict[str, Any]:
    """Return a tree of plain values with `overrides` (dotted key -> text as typed) put on top of it.

    Raises
    ------
    InputError
        If a key leads through a value that is no table.
    """
    result = copy.deepcopy(dict(tree))
    for key, text in overrides.items():
        _set(result, key, _parse_value(key, text))
    return result


def read_overrides(words: Sequence[str]) -> dict[str, str]:
    """Read ``--section.key value`` and ``--section.key=value``.

    Raises
    ------
    InputError
        For a word that is neither, and for a key without a value.
    """
    overrides: dict[str, str] = {}
    rest = iter(words)
    for word in rest:
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or "." not in key:
            raise InputError(word, "is no option of train", _option_hint(word))
        if not equals:
            value = next(rest, "")
            if not value or value.startswith("--"):
                raise InputError(key, "has no value", f"write --{key} VALUE")
        overrides[key] = value
    return overrides


def _option_hint(word: str) -> str:
    name = word.removeprefix("--")
    matching = [key for key in dotted_keys() if key.endswith(f".{name}")]
    return f"did you mean --{matching[0]}?" if matching else closest(name, ["--section.key VALUE", "--resume"])


def parse_config(tree: dict[str, Any]) -> Config:
    """Validate a tree of plain values, as TOML gives it.

    Raises
    ------
    InputError
        For the first thing that is wrong.
    """
    return parse_model(Config, tree)


def parse_model(model: type[Model], tree: dict[str, Any]) -> Model:
    """Validate a tree of plain values against sections of typed keys.

    Raises
    ------
    InputError
        For the first thing that is wrong.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise _input_error(error, model) from None


def dump_config(config: Config) -> str:
    """Write the resolved configuration as TOML, without the settings that its schedule does not heed."""
    tree = config.model_dump(exclude_none=True)
    heeded = SCHEDULES[config.schedule.name].decision_keys
    for key in SCHEDULES["plateau"].decision_keys - heeded:
        tree["schedule"].pop(key, None)
    return tomli_w.dumps(tree)


def dotted_keys(model: type[Section] | None = None) -> dict[str, str]:
    """Return every dotted key with its description and default, for ``--help`` and for suggestions."""
    keys = {}
    for section, field in (model or Config).model_fields.items():
        inner_model = field.annotation
        if not (isinstance(inner_model, type) and issubclass(inner_model, Section)):
            keys[section] = field.description or ""
            continue
        for name, inner in inner_model.model_fields.items():
            default = "" if inner.default in (None, PydanticUndefined) else f"  [{inner.default}]"
            keys[f"{section}.{name}"] = f"{inner.description or ''}{default}"
    return keys


def read_toml(path: Path, what: str = "a run's TOML file") -> dict[str, Any]:
    """Read a TOML file; `what` is what it should have been.

    Raises
    ------
    InputError
        If there is no such file, or it is not valid TOML.
    """
    try:
        # Windows editors put a byte order mark in front.
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise InputError(str(path), "there is no such file", f"give the path of {what}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(str(path), f"cannot be read ({error})", f"give the path of {what}") from None
    except ValueError as error:  # TOMLDecodeError, or a number with thousands of digits
        raise InputError(str(path), f"is not valid TOML ({error})", "mend that line") from None


def _parse_value(key: str, text: str) -> Any:
    """Read an override as a TOML value; text that is none is a string."""
    section, _, name = key.partition(".")
    model = Config.model_fields.get(section)
    field = getattr(model.annotation, "model_fields", {}).get(name) if model else None
    if field is not None and field.annotation in {str, str | None}:
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        return text


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise InputError(key, f"{parent!r} is a value, not a table", "remove the part behind it", value=value)
    tree[last] = value


def _input_error(error: ValidationError, model: type[Section]) -> InputError:
    """Turn pydantic's first complaint into one line with the dotted key, the value and the fix."""
    errors = error.errors(include_url=False)
    alternatives = [detail for detail in errors if detail["loc"][:2] == errors[0]["loc"][:2]]
    # Where a key takes a number or a list, the complaint that counts is the one of the kind that was written.
    first = next((detail for detail in alternatives if not detail["type"].endswith("_type")), errors[0])
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InputError):
        return cause
    key, value, kind = _dotted(first["loc"], model), first["input"], first["type"]
    if kind == "extra_forbidden":
        return InputError(key, "unknown key", _key_suggestion(key, model), value=value)
    if kind in {"model_type", "model_attributes_type"}:
        return InputError(key, "is a table, not a value", f"write [{key}] and its keys below", value=value)
    return InputError(key, _problem(first), _expected(key, model), value=value)


def _dotted(loc: tuple[int | str, ...], model: Any) -> str:
    """Drop the names of union members that pydantic adds behind the key; keep list positions."""
    path: list[str] = []
    for part in loc:
        if isinstance(part, int):
            path.append(str(part))
        elif model is not None and part in getattr(model, "model_fields", {}):
            path.append(part)
            annotation = model.model_fields[part].annotation
            inner = [a for a in getattr(annotation, "__args__", ()) if isinstance(a, type)]
            model = next((a for a in [annotation, *inner] if isinstance(a, type) and issubclass(a, Section)), None)
        elif model is not None:
            path.append(str(part))
            break
    return ".".join(path)


def _problem(detail: Any) -> str:
    message = str(detail["msg"]).removeprefix("Value error, ")
    return message[0].lower() + message[1:]


def _expected(key: str, model: type[Section]) -> str:
    section, _, name = key.partition(".")
    description = dotted_keys(model).get(f"{section}.{name.split('.')[0]}" if name else section, "")
    return f"expected: {description.strip()}" if description.strip() else "see distplateau train --help"


def _key_suggestion(key: str, model: type[Section]) -> str:
    section, _, name = key.partition(".")
    if not name:
        return closest(key, model.model_fields)
    if key.startswith("optimizer.groups."):
        return closest(key.rpartition(".")[2], ParamGroup.model_fields)
    names = {full.split(".", 1)[1] for full in dotted_keys(model) if full.startswith(f"{section}.")}
    return closest(name, names)
