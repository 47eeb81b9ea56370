"""fit(): objects instead of names."""

from __future__ import annotations

import contextlib
import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file
from torch.utils.data import Dataset, TensorDataset

from distplateau import fit
from distplateau.errors import InputError
from distplateau.record.ledger import read_ledger
from distplateau.training import mistakes
from distplateau.training.evaluate import evaluate
from distplateau.training.interruption import Interrupted
from distplateau.training.trainer import Trainer
from ranks import run_ranks


def settings(folder, **training):
    return {
        "run": {"name": "run", "dir": str(folder)},
        "data": {"global_batch_size": 16, "eval_batch_size": 32},
        "optimizer": {"lr": 0.05},
        "schedule": {"patience": 0},
        "training": {"epochs": 8, **training},
        "tracking": {"wandb": "disabled"},
    }


def points(count, seed):
    inputs = torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))
    return inputs, inputs @ torch.arange(5.0)


def absolute(outputs, targets):
    return (outputs[:, 0] - targets).abs()


def _regress(rank, folder, kind):
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 1)
    train, validation = points(200, 0), points(50, 1)
    if kind == "dataset":
        train, validation = list(zip(*train, strict=True)), TensorDataset(*validation)
    run_dir = fit(model, "mse" if kind == "name" else absolute, train, validation, settings(folder))
    events = read_ledger(run_dir).validations
    return [event["value"] for event in events], [event["count"] for event in events], model.weight.detach()


@pytest.mark.parametrize("kind", ["name", "tensors", "dataset"])
def test_a_regression_on_two_ranks(tmp_path, kind):
    (values, counts, weight), second = run_ranks(_regress, 2, tmp_path, kind)
    assert values == second[0]
    assert counts == [50] * 8
    assert values[-1] < 0.5 * values[0]
    assert torch.equal(weight, second[2])
    assert read_ledger(tmp_path / "run").validations[0]["metrics"].keys() == {"val/loss"}


def _classify(rank, folder):
    torch.manual_seed(0)
    inputs, values = points(300, 0)
    labels = (values > 0).long() + (values > 3).long()
    model = torch.nn.Sequential(torch.nn.Linear(5, 3))
    run_dir = fit(model, "cross_entropy", (inputs[:200], labels[:200]), (inputs[200:], labels[200:]), settings(folder))
    return read_ledger(run_dir).validations[-1]["metrics"]


def test_labels_bring_an_accuracy(tmp_path):
    [metrics] = run_ranks(_classify, 1, tmp_path)
    assert metrics.keys() == {"val/loss", "val/accuracy"}
    assert metrics["val/accuracy"] > 0.7


class Noisy(Dataset):
    """Points whose inputs are drawn anew each time they are read."""

    def __init__(self, count, seed):
        self.inputs, values = points(count, seed)
        self.labels = (values > 0).long()

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return self.inputs[index] + 0.1 * torch.randn(5), int(self.labels[index])


def _classify_noisy(rank, folder, workers, stop_at):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    config = settings(folder, epochs=4)
    config["data"]["workers"] = workers
    validate = Trainer._validate

    def stopping(self):
        event = validate(self)
        if event["validation"] == stop_at:
            self._save(wait=True)
            raise InterruptedError
        return event

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_validate", stopping)
        try:
            fit(model, "cross_entropy", Noisy(150, 0), Noisy(60, 1), config)
        except InterruptedError:
            return None
    events = read_ledger(folder / "run").validations
    return [event["metrics"] for event in events], [p.detach() for p in model.parameters()]


def test_a_data_set_is_read_anew_each_epoch_and_resumes_to_the_same_bits(tmp_path):
    whole = run_ranks(_classify_noisy, 2, tmp_path / "whole", 2, None)
    metrics, weights = whole[0]
    assert metrics[0].keys() == {"val/loss", "val/accuracy"} and metrics[-1]["val/accuracy"] > 0.8
    assert run_ranks(_classify_noisy, 2, tmp_path / "cut", 2, 2) == [None, None]
    for workers, folder in ((2, "cut"), (0, "without workers")):
        again = run_ranks(_classify_noisy, 2, tmp_path / folder, workers, None)
        assert again[0][0] == metrics
        assert all(torch.equal(one, other) for one, other in zip(again[0][1], weights, strict=True))


def test_mistakes_are_named(tmp_path):
    model, good = torch.nn.Linear(5, 1), points(20, 0)
    with pytest.raises(InputError, match="train_data: has 20 inputs and 19 targets"):
        fit(model, "mse", (good[0], good[1][:19]), good, settings(tmp_path))
    with pytest.raises(InputError, match="val_data: sample 0 is a int; give"):
        fit(model, "mse", good, [1, 2, 3], settings(tmp_path))
    with pytest.raises(InputError, match="val_data: sample 0 has no tensors"):
        fit(model, "mse", good, [("a", "b")], settings(tmp_path))
    with pytest.raises(InputError, match="train_data: has no samples"):
        fit(model, "mse", [], good, settings(tmp_path))
    with pytest.raises(InputError, match="train_data: is a generator without numbered samples"):
        fit(model, "mse", (pair for pair in zip(*good, strict=True)), good, settings(tmp_path))
    with pytest.raises(InputError, match="train_data: is a tuple of 3"):
        fit(model, "mse", (*good, good[0]), good, settings(tmp_path))
    with pytest.raises(InputError, match=r"training.loss = 'msee'"):
        fit(model, "msee", good, good, settings(tmp_path))
    with pytest.raises(InputError, match=r"training.loss = 'test_mistakes_are_named.*: gave shape \(\)"):
        fit(model, lambda outputs, targets: outputs.mean(), good, good, settings(tmp_path))
    with pytest.raises(InputError, match=r"training.epoks = 3: unknown key"):
        fit(model, "mse", good, good, settings(tmp_path, epoks=3))
    assert not (tmp_path / "run").exists()


def _uneven(rank, folder):
    samples = [*zip(*points(20, 0), strict=True), (torch.zeros(4), torch.zeros(()))]
    with pytest.raises(InputError) as error:
        fit(torch.nn.Linear(5, 1), "mse", samples, points(20, 1), settings(folder))
    return str(error.value)


def test_a_sample_unlike_the_others_is_named(tmp_path):
    [told] = run_ranks(_uneven, 1, tmp_path)
    assert "sample 20 of its training set has a float32 tensor [4] where others have float32 [5]" in told
    assert told.endswith("give (input, target): two tensors or numbers, of one shape and dtype for all samples")


def late(outputs, targets):
    """Fail behind the trial before training."""
    return {} if len(targets) > 2 else {"far": outputs[:, 0]}


def _work(rank, key):
    if rank == 1:
        raise InputError("training.metrics", "raised", "mend it", value="late")
    dist.distributed_c10d._get_default_store().wait([key])
    raise RuntimeError("connection closed by peer")


def _mistaken(rank):
    key = f"distplateau/mistake/{next(copy.copy(mistakes._STRETCHES))}"
    with pytest.raises(InputError) as error, mistakes.told_once():
        _work(rank, key)
    with pytest.raises(RuntimeError, match="of another kind"), mistakes.told_once():
        raise RuntimeError("of another kind")
    return str(error.value), error.value.rank


def test_all_ranks_name_the_mistake_of_one_and_who_tells_it():
    assert run_ranks(_mistaken, 2) == [("training.metrics = 'late': raised; mend it", 1)] * 2


def named_as_the_loss(outputs, _targets):
    return {"loss": outputs[:, 0]}


def complex_numbers(outputs, _targets):
    return {"phase": outputs[:, 0] + 1j}


def sparse(outputs, _targets):
    return {"gap": outputs[:, 0].to_sparse()}


def nameless(outputs, _targets):
    return {"two\nlines": outputs[:, 0]}


@pytest.mark.parametrize(
    ("metrics", "problem"),
    [
        ("named_as_the_loss", "the name loss is taken"),
        ("complex_numbers", "phase is complex"),
        ("sparse", "gap is a sparse tensor"),
        ("nameless", r"'two\\nlines' is no name to print"),
        ("late", "the function gave far for some batches and not for others"),
    ],
)
def test_metrics_that_cannot_be_are_refused(tmp_path, metrics, problem):
    with pytest.raises(InputError, match=f"training.metrics: {problem}"):
        fit(torch.nn.Linear(5, 1), "mse", points(9, 0), points(9, 1), settings(tmp_path, metrics=f"test_fit:{metrics}"))


class Forward(torch.nn.Linear):
    """A layer with a forward pass of the test's."""

    def __init__(self, forward):
        super().__init__(5, 3)
        self.buffer = torch.nn.Buffer(torch.zeros(1))
        self.own = forward

    def forward(self, inputs):
        self.buffer += 1
        return self.own(self, super().forward(inputs))


def broken_in_training(model, outputs):
    return outputs[0 // 0] if model.training else outputs


@pytest.mark.parametrize(
    ("forward", "problem"),
    [
        (lambda _, outputs: (outputs, outputs), "gives a tuple for 1 samples"),
        (lambda model, outputs: [outputs] if model.training else outputs, "gives a list for 2 samples"),
        (lambda _, outputs: outputs.sum(), r"gives a tensor \[\] for 1 samples"),
        (lambda _, outputs: outputs @ outputs, r"fails in evaluation on inputs float32 \[5\] \(RuntimeError"),
        (broken_in_training, r"fails in training on inputs float32 \[5\] \(ZeroDivisionError"),
    ],
)
def test_a_model_that_fails_is_told_before_training_and_left_as_it_was(tmp_path, forward, problem):
    model, (inputs, values) = Forward(forward), points(20, 0)
    data = (inputs, (values > 0).long())
    random = torch.get_rng_state()
    with pytest.raises(InputError, match=f"model: {problem}"):
        fit(model, "cross_entropy", data, data, settings(tmp_path))
    assert model.training
    assert not model.buffer
    assert torch.equal(random, torch.get_rng_state())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("loss", "targets", "problem"),
    [
        ("cross_entropy", torch.arange(20), "train_data: has labels from 0 to 19, and the model gives 3 outputs"),
        ("mse", torch.arange(20) - 9, "train_data: has labels from -9 to 10, and the model gives 3 outputs"),
        ("cross_entropy", torch.zeros(20), "training.loss = 'cross_entropy': it raised RuntimeError"),
        ("mse", torch.zeros(20, 2), "training.loss = 'mse': it raised RuntimeError"),
        ("bce", torch.full((20, 3), 7.0), "train_data: has targets from 7 to 7; 'bce' takes targets from 0 to 1"),
        (lambda outputs, _: outputs.detach()[:, 0], torch.zeros(20), "training.loss: its values have no gradient"),
        (lambda outputs, _: unknown, torch.zeros(20), "training.loss = .*: it raised NameError"),  # noqa: F821
    ],
)
def test_targets_that_do_not_fit_are_told_before_training(tmp_path, loss, targets, problem):
    inputs, _ = points(20, 0)
    with pytest.raises(InputError, match=problem):
        fit(torch.nn.Linear(5, 3), loss, (inputs, targets), (inputs, targets), settings(tmp_path))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argument", "value", "problem"),
    [
        ("model", lambda inputs: inputs, "model: is a function"),
        ("config", 5, "config: is a int"),
        ("config", {"data": {"augment": ["flip"]}}, r"data.augment = \['flip'\]: the inputs are \[5\] and no images"),
        ("config", {"training": {"channels_last": True}}, r"training.channels_last = True: the inputs are \[5\]"),
    ],
)
def test_arguments_of_another_kind_are_named(argument, value, problem):
    given = {"model": torch.nn.Linear(5, 1), "loss": "mse", "train_data": points(9, 0), "val_data": points(9, 1)}
    with pytest.raises(InputError, match=problem):
        fit(**{**given, argument: value})


def _whole_numbers(rank, folder, loss, high, dtype, width):
    inputs, values = points(60, 0)
    targets = (values.abs() * 2).clamp(max=high).to(dtype)
    run_dir = fit(torch.nn.Linear(5, width), loss, (inputs, targets), (inputs, targets), settings(folder, epochs=2))
    return set(read_ledger(run_dir).validations[-1]["metrics"])


@pytest.mark.parametrize(
    ("loss", "high", "dtype", "width", "names"),
    [
        ("mse", 99, torch.int64, 1, {"val/loss"}),
        ("bce", 1, torch.bool, 1, {"val/loss"}),
        ("cross_entropy", 2, torch.int32, 3, {"val/loss", "val/accuracy"}),
        ("mse", 2, torch.int16, 3, {"val/loss", "val/accuracy"}),
    ],
)
def test_targets_are_labels_where_the_model_tells_classes_apart(tmp_path, loss, high, dtype, width, names):
    [metrics] = run_ranks(_whole_numbers, 1, tmp_path, loss, high, dtype, width)
    assert metrics == names


TWO_RUNS = """
import sys, torch
from distplateau import fit
data = torch.ones(8, 5), torch.ones(8)
for name, precision in (("first", "no"), ("second", "bf16")):
    config = {"run": {"dir": sys.argv[1], "name": name}, "tracking": {"wandb": "disabled"}}
    fit(torch.nn.Linear(5, 1), "mse", data, data, {**config, "training": {"epochs": 1, "precision": precision}})
"""


def test_a_process_trains_one_run_after_the_other(tmp_path):
    (tmp_path / "two_runs.py").write_text(TWO_RUNS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*launch, tmp_path / "two_runs.py", tmp_path], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for name in ("first", "second"):
        event = read_ledger(tmp_path / name).finished
        assert event["validations"] == 1
        assert read_ledger(tmp_path / name).validations[0]["ranks"] == 2


def test_the_model_is_the_callers_again(tmp_path):
    """With bf16 Accelerate wraps its forward, and every further fit() would wrap it once more."""
    model = torch.nn.Linear(5, 1)
    fit(model, absolute, points(40, 0), points(9, 1), settings(tmp_path, precision="bf16", epochs=1))
    assert not {"forward", "_original_forward"} & set(vars(model))
    inputs, _ = points(3, 2)
    assert torch.equal(model(inputs), torch.nn.functional.linear(inputs, model.weight, model.bias))  # float32


def test_accelerate_set_up_with_another_precision_is_told(tmp_path):
    Accelerator(cpu=True)
    try:
        with pytest.raises(InputError, match=r"training.precision = 'bf16': this process has set up"):
            fit(torch.nn.Linear(5, 1), "mse", points(9, 0), points(9, 1), settings(tmp_path, precision="bf16"))
        assert PartialState._shared_state  # the caller's own
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_a_run_without_a_finite_metric_is_told_so(tmp_path, capsys):
    inputs, values = points(20, 0)
    nothing = inputs, values * torch.nan
    fit(torch.nn.Linear(5, 1), "mse", nothing, nothing, settings(tmp_path, epochs=1))
    assert "val/loss was never a finite number, so that there are no best weights, " in capsys.readouterr().out
    raising = {**settings(tmp_path / "raising", epochs=1), "schedule": {"nonfinite": "raise"}}
    with pytest.raises(InputError, match=r"schedule.nonfinite = 'raise': val/loss is nan after step 2, which ends"):
        fit(torch.nn.Linear(5, 1), "mse", nothing, nothing, raising)


def test_a_run_whose_model_is_not_described_cannot_be_evaluated(tmp_path):
    run_dir = fit(torch.nn.Linear(5, 1), "mse", points(9, 0), points(9, 1), settings(tmp_path, epochs=1))
    with pytest.raises(
        InputError, match=r"run: was trained by fit\(\) on a model that the run folder does not describe"
    ):
        evaluate(run_dir)


def _fewer_samples_than_ranks(rank, folder):
    layers = torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1)
    model = torch.nn.Sequential(*layers)
    run_dir = fit(model, "mse", points(1, 0), points(1, 1), settings(folder, epochs=3, ema=0.5))
    return [event["count"] for event in read_ledger(run_dir).validations], model[0].weight.detach()


def test_one_sample_for_two_ranks_with_batchnorm(tmp_path):
    (counts, weights), (_, others) = run_ranks(_fewer_samples_than_ranks, 2, tmp_path)
    assert counts == [1, 1, 1]
    assert torch.equal(weights, others)


# What belongs to the caller, and what the ranks are given.


class InPlace(torch.nn.Linear):
    """Doubles its inputs where they are."""

    def forward(self, inputs):
        return super().forward(inputs.mul_(2))


def test_a_model_that_changes_its_inputs_does_not_change_the_data(tmp_path):
    train, validation = points(40, 0), points(20, 1)
    before = [tensor.clone() for tensor in (*train, *validation)]
    config = {**settings(tmp_path, epochs=3), "optimizer": {"name": "sgd", "lr": 1e-30}, "schedule": {"eps": 0}}
    run_dir = fit(InPlace(5, 1), "mse", train, validation, config)
    assert all(map(torch.equal, (*train, *validation), before))
    first, *others = [event["value"] for event in read_ledger(run_dir).validations]
    assert others == [first, first]


def test_outputs_of_double_precision_are_measured_as_such(tmp_path):
    inputs, values = (part.double() for part in points(20, 0))
    model = torch.nn.Linear(5, 1).double()
    config = {**settings(tmp_path, epochs=1), "optimizer": {"name": "sgd", "lr": 1e-300}, "schedule": {"eps": 0}}
    run_dir = fit(model, absolute, (inputs, values), (inputs, values), config)
    expected = (model(inputs)[:, 0] - values).abs().mean().item()
    assert abs(read_ledger(run_dir).validations[0]["value"] / expected - 1) < 1e-14


class Shifted(TensorDataset):
    """Has two tensors, and gives others."""

    def __getitem__(self, index):
        inputs, target = super().__getitem__(index)
        return inputs + 1000, target


def test_a_subclass_of_tensor_dataset_is_asked_for_its_samples(tmp_path):
    seen = []
    model = torch.nn.Linear(5, 1)
    model.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].min().item()))
    fit(model, "mse", Shifted(*points(20, 0)), points(20, 1), settings(tmp_path, epochs=1))
    assert any(low > 900 for low in seen)


def _draws(rank, folder):
    model = torch.nn.Linear(5, 1)
    torch.manual_seed(5)
    expected = torch.rand(3, generator=torch.Generator().manual_seed(5))
    fit(model, "mse", points(40, 0), points(20, 1), settings(folder, epochs=1))
    return torch.equal(torch.rand(3), expected)


def test_the_random_numbers_of_the_ranks_are_put_back(tmp_path):
    assert run_ranks(_draws, 2, tmp_path) == [True, True]


def _unequal(rank, folder, what):
    config, train, validation = settings(folder, epochs=1), points(40, 0), points(20, 1)
    width = 1
    if rank == 1:
        if what == "batch":
            config["data"]["global_batch_size"] = 8
        elif what == "training":
            train = points(41, 0)
        elif what == "validation":
            validation = points(19, 1)
        elif what == "split":
            validation = points(20, 2)
        elif what == "model":
            width = 2
    try:
        fit(torch.nn.Sequential(torch.nn.Linear(5, width), torch.nn.Linear(width, 1)), "mse", train, validation, config)
    except InputError as error:
        return str(error), error.rank
    return None


@pytest.mark.parametrize(
    ("what", "problem"),
    [
        ("batch", "data.global_batch_size: is 16 on rank 0 and 8 on rank 1"),
        ("training", "the training data: is 40 samples"),
        ("validation", "the validation data: is 20 samples"),
        ("split", "the validation data: is 20 samples"),
        ("model", "the model: is "),
        ("nothing", None),
    ],
)
def test_ranks_that_are_given_different_things_are_told(tmp_path, what, problem):
    told = run_ranks(_unequal, 2, tmp_path, what)
    if problem is None:
        assert told == [None, None]
    else:
        assert told[0] == told[1]
        assert told[0][0].startswith(problem) and told[0][0].endswith("; give every rank the same")
        assert told[0][1] == 0


def test_a_run_is_not_continued_with_another_loss_or_other_data(tmp_path):
    def go_on(loss, count):
        return fit(torch.nn.Linear(5, 1), loss, points(count, 0), points(20, 1), settings(tmp_path, epochs=1))

    run_dir = go_on("mse", 40)
    assert 'loss = "mse"' in (run_dir / "config.toml").read_text()
    with pytest.raises(InputError, match=r"other settings \(training.loss 'mse' -> 'absolute'\)"):
        go_on(absolute, 40)
    with pytest.raises(InputError, match="holds a run with 40 training samples, and there are 56 now"):
        go_on("mse", 56)
    go_on("mse", 40)


def test_a_report_is_written_and_nobody_else_may_write_into_the_folder(tmp_path):
    mask = os.umask(0)
    try:
        run_dir = fit(torch.nn.Linear(5, 1), "mse", points(9, 0), points(9, 1), settings(tmp_path, epochs=1))
    finally:
        os.umask(mask)
    assert (run_dir / "report.html").is_file()
    assert not [path for path in run_dir.rglob("*") if path.stat().st_mode & 0o002]


# Models that are not plain.


class Counting(torch.nn.Linear):
    """A layer whose outputs depend on how often it was trained."""

    def __init__(self, *, persistent):
        super().__init__(5, 1)
        self.count = torch.nn.Buffer(torch.zeros((), dtype=torch.int16), persistent=persistent)

    def forward(self, inputs):
        if self.training:
            self.count += 1
        return super().forward(inputs) * (1 + self.count / 10)


def _counted(rank, folder, persistent, stop_at):
    torch.manual_seed(0)
    model = Counting(persistent=persistent)
    heed = Trainer._heed

    def stopping(self, call):
        if self.replica.step == stop_at:
            self._interrupt("TEST")
        heed(self, call)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_heed", stopping)
        with contextlib.suppress(Interrupted):
            fit(model, "mse", points(90, 0), points(20, 1), settings(folder, epochs=3))
    return model.weight.detach(), model.count.item()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("stop_at", [6, 8])  # at a validation and between two
def test_buffers_outside_the_state_dict_survive_as_the_others_do(tmp_path, ranks, persistent, stop_at):
    whole = run_ranks(_counted, ranks, tmp_path / "whole", persistent, None)
    cut = run_ranks(_counted, ranks, tmp_path / "cut", persistent, stop_at)
    assert cut[0][1] == stop_at
    resumed = run_ranks(_counted, ranks, tmp_path / "cut", persistent, None)
    for (weight, count), (expected, steps) in zip(resumed, whole, strict=True):
        assert count == steps == 18
        assert torch.equal(weight, expected)


def test_the_buffers_of_a_checkpoint_are_not_those_that_training_goes_on_with(tmp_path):
    seen = []

    def watched(self):
        seen.append((self._buffers(), dict(self.replica.network.named_buffers())))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_validate", lambda self: watched(self) or validate(self))
        fit(Counting(persistent=True), "mse", points(90, 0), points(20, 1), settings(tmp_path, epochs=1))
    [(saved, live)] = seen
    assert saved[0]["count"] == live["count"] and saved[0]["count"].data_ptr() != live["count"].data_ptr()


validate = Trainer._validate


class Remembering(torch.nn.Linear):
    """Keeps what its last forward pass gave."""

    def forward(self, inputs):
        self.features = super().forward(inputs)
        return self.features


def test_a_model_that_keeps_its_features_is_averaged(tmp_path):
    model = Remembering(5, 1)
    fit(model, "mse", points(40, 0), points(20, 1), settings(tmp_path, epochs=2, ema=0.5))
    average = load_file(next((tmp_path / "run" / "checkpoints").glob("step-*")) / "average.safetensors")
    assert average.keys() == {"weight", "bias"}
    assert not torch.equal(average["weight"], model.weight)


class Versioned(torch.nn.Linear):
    """Puts more than tensors into its state."""

    def get_extra_state(self):
        return {"version": 1}


def test_a_state_that_cannot_be_kept_is_told(tmp_path):
    expanded = torch.nn.Linear(5, 1)
    expanded.register_buffer("scale", torch.ones(1).expand(5))
    with pytest.raises(InputError, match="model: the buffer scale is an expanded tensor"):
        fit(expanded, "mse", points(9, 0), points(9, 1), settings(tmp_path))
    with pytest.raises(InputError, match=r"model: _extra_state in its state_dict\(\) is a dict"):
        fit(Versioned(5, 1), "mse", points(9, 0), points(9, 1), settings(tmp_path))
