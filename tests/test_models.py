"""Models by name."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from distplateau.config import ModelSection, dump_config, parse_config
from distplateau.errors import InputError
from distplateau.training.parts.models import MLP, GrayToColor, build_model, check_model, load_model

DIGIT, COLOR = (1, 8, 8), (3, 32, 32)

USER_MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width, num_classes=3):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Linear(width, num_classes))

    def forward(self, images):
        return self.layers(images)

def small(image_shape, num_classes, width=4):
    assert image_shape == (1, 8, 8)
    return Net(width, num_classes)

def plain():
    return Net(4, 10)

def anything(**settings):
    return Net(settings.pop("width"), settings["num_classes"])

def no_module():
    return "a model"

def broken(num_classes):
    raise RuntimeError("first line\\nsecond line")

def noisy(num_classes):
    class Noisy(Net):
        def forward(self, images):
            return super().forward(images + torch.rand_like(images))
    return Noisy(4, num_classes)

NUMBER = 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current directory with a user's modules in it."""
    (tmp_path / "user_model_4711.py").write_text(USER_MODULE)
    (tmp_path / "user_broken_4711.py").write_text("import a_package_that_is_not_there")
    (tmp_path / "user_exits_4711.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield tmp_path
    for name in [name for name in sys.modules if name.endswith("_4711")]:
        del sys.modules[name]


def section(name: str, **args) -> ModelSection:
    return ModelSection(name=name, args=args)


def refusal(call, *args) -> str:
    with pytest.raises(InputError) as caught:
        call(*args)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


def refused_early_and_late(model: ModelSection, start: str) -> str:
    """Both the cheap check and the building refuse it."""
    message = refusal(check_model, model)
    assert message.startswith(start)
    assert refusal(build_model, model, DIGIT, 10) == message
    return message


# mlp


def test_mlp_has_the_layers_of_its_arguments():
    model = build_model(section("mlp"), (1, 28, 28), 10)
    linear = [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)]
    assert linear == [(784, 512), (512, 256), (256, 10)]
    assert sum(isinstance(m, nn.ReLU) for m in model.modules()) == 2
    assert not any(isinstance(m, nn.Dropout) for m in model.modules())
    assert model.training


def test_mlp_arguments():
    model = build_model(section("mlp", hidden=[7], dropout=0.25), DIGIT, 4)
    assert [m.out_features for m in model.modules() if isinstance(m, nn.Linear)] == [7, 4]
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.25]
    assert model(torch.zeros(5, *DIGIT)).shape == (5, 4)
    assert len(list(build_model(section("mlp", hidden=[]), DIGIT, 4).parameters())) == 2


@pytest.mark.parametrize(
    ("args", "start"),
    [
        ({"hiden": [3]}, "model.args.hiden = [3]: unknown argument of mlp; did you mean 'hidden'?"),
        ({"hidden": 3}, "model.args.hidden = 3: is no list"),
        ({"hidden": [3, 0]}, "model.args.hidden = [3, 0]: is no list"),
        ({"hidden": [True]}, "model.args.hidden = [True]: is no list"),
        ({"dropout": 1.0}, "model.args.dropout = 1.0: is no probability"),
        ({"dropout": "0.5"}, "model.args.dropout = '0.5': is no probability"),
        ({"num_classes": 3}, "model.args.num_classes = 3: cannot be set"),
    ],
)
def test_wrong_mlp_arguments_are_refused(args, start):
    refused_early_and_late(section("mlp", **args), start)


def test_the_seed_decides_the_weights_and_only_initialisation_draws_from_it():
    torch.manual_seed(1)
    built = build_model(section("mlp", hidden=[5], dropout=0.5), DIGIT, 10)
    after_building = torch.get_rng_state()
    torch.manual_seed(1)
    plain = MLP(DIGIT, 10, (5,), 0.5)
    assert torch.equal(torch.get_rng_state(), after_building)
    for one, other in zip(built.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


# torchvision


def test_a_gray_image_is_shown_to_a_color_model():
    model = build_model(section("resnet18"), (1, 32, 32), 7)
    assert isinstance(model, GrayToColor)
    model.eval()
    gray = torch.rand(2, 1, 32, 32)
    assert model(gray).shape == (2, 7)
    assert torch.equal(model(gray), model.model(gray.repeat(1, 3, 1, 1)))
    # Negative control: without the wrapper it does not run.
    with pytest.raises(RuntimeError):
        model.model(gray)


def test_a_color_model_stays_as_it_is_and_takes_arguments():
    model = build_model(section("squeezenet1_1", dropout=0.125), COLOR, 5)
    assert not isinstance(model, GrayToColor)
    assert next(m.p for m in model.modules() if isinstance(m, nn.Dropout)) == 0.125


def test_googlenet_gives_one_tensor_while_it_trains():
    model = build_model(section("googlenet", init_weights=False), (3, 64, 64), 5)
    assert isinstance(model.train()(torch.zeros(2, 3, 64, 64)), torch.Tensor)


def test_a_model_that_cannot_take_the_images_is_refused():
    message = refusal(build_model, section("alexnet"), DIGIT, 10)
    assert message.startswith("model.name = 'alexnet': cannot take images of 1 x 8 x 8 (RuntimeError: ")
    check_model(section("alexnet"))  # this one does not know the images


def test_an_unknown_name_gets_few_suggestions():
    message = refused_early_and_late(section("resnet19"), "model.name = 'resnet19': there is no such model")
    assert "did you mean 'resnet18' or " in message
    assert message.count("resnet") <= 4
    assert "list_models" in message
    refused_early_and_late(section("fasterrcnn_resnet50_fpn"), "model.name")  # a detector, no classifier
    assert "did you mean 'mlp'?" in refusal(check_model, section("mpl"))


@pytest.mark.parametrize("key", ["weights", "num_classes", "aux_logits"])
def test_what_the_run_decides_cannot_be_set(key):
    refused_early_and_late(section("resnet18", **{key: 3}), f"model.args.{key} = 3: cannot be set")


def test_an_unknown_torchvision_argument_is_named():
    message = refusal(build_model, section("resnet18", widht=3), COLOR, 10)
    assert message.startswith("model.args.widht = 3: unknown argument of resnet18")
    message = refusal(build_model, section("resnet18", replace_stride_with_dilation=[True]), COLOR, 10)
    assert message.startswith("model.args = ")
    assert "3-element tuple" in message


# A user's function


@pytest.mark.parametrize(
    ("function", "args"),
    [("small", {}), ("small", {"width": 6}), ("plain", {}), ("anything", {"width": 6}), ("Net", {"width": 6})],
)
def test_a_function_gets_what_its_signature_takes(here, function, args):
    model = section(f"user_model_4711:{function}", **args)
    check_model(model)
    built = build_model(model, DIGIT, 10)
    assert built(torch.zeros(2, *DIGIT)).shape == (2, 10)
    assert built.layers[1].out_features == args.get("width", 4)


@pytest.mark.parametrize(
    ("model", "start", "says"),
    [
        (section("no_such_4711:f"), "model.name = 'no_such_4711:f': ", "ModuleNotFoundError"),
        (section("user_broken_4711:f"), "model.name = ", "a_package_that_is_not_there"),
        (section("user_exits_4711:f"), "model.name = ", "SystemExit"),
        (section(":f"), "model.name = ':f'", "cannot be imported"),
        (section("user_model_4711:smal"), "model.name = ", "did you mean 'small'"),
        (section("user_model_4711:NUMBER"), "model.name = ", "has no such function"),
        (section("user_model_4711:small", widht=3), "model.args.widht = 3: ", "did you mean 'width'? valid: width"),
        (section("user_model_4711:plain", width=3), "model.args.width = 3: ", "it takes none"),
        (section("user_model_4711:small", num_classes=3), "model.args.num_classes = 3: ", "follows from the data"),
        (section("user_model_4711:Net"), "model.args.width: ", "needs it"),
    ],
)
def test_a_wrong_function_or_argument_is_refused(here, model, start, says):
    assert says in refused_early_and_late(model, start)


def test_suggestions_from_a_large_module_stay_short():
    assert refusal(check_model, section("torchvision.models:resnet19")).count("resnet") <= 4


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("no_module", "returned a str"),
        ("broken", "raised RuntimeError: first line second line"),
    ],
)
def test_a_function_that_makes_no_model_is_refused(here, function, says):
    message = refusal(build_model, section(f"user_model_4711:{function}"), DIGIT, 10)
    assert message.startswith("model.name = ")
    assert says in message


def test_wrong_logits_are_refused(here):
    message = refusal(build_model, section("user_model_4711:plain"), DIGIT, 3)
    assert "gives (2, 10) for 2 images of 3 classes" in message


def test_the_trial_draws_nothing_from_the_random_state_of_the_run(here):
    def after(build) -> torch.Tensor:
        torch.manual_seed(1)
        build()
        return torch.get_rng_state()

    noisy = section("user_model_4711:noisy")
    check_model(noisy)
    import user_model_4711  # found because the check put the current directory on the path

    expected = after(lambda: user_model_4711.noisy(10))
    assert torch.equal(after(lambda: build_model(noisy, DIGIT, 10)), expected)
    # Negative control: this model does draw when it runs.
    assert not torch.equal(after(lambda: user_model_4711.noisy(10)(torch.zeros(2, *DIGIT))), expected)


# The best model of a run


@pytest.fixture
def run_dir(tmp_path):
    model = {"name": "mlp", "args": {"hidden": [6], "dropout": 0.5}}
    config = parse_config({"run": {"name": "run", "dir": str(tmp_path)}, "model": model})
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.toml").write_text(dump_config(config))
    (folder / "ledger.jsonl").write_text(
        json.dumps({"event": "start", "image_shape": [1, 8, 8], "num_classes": 10}) + "\n"
    )
    torch.manual_seed(3)
    save_file(MLP(DIGIT, 10, (6,), 0.5).state_dict(), folder / "model.safetensors")
    return folder


def test_load_model(run_dir):
    torch.manual_seed(3)
    trained = MLP(DIGIT, 10, (6,), 0.5).eval()
    before = torch.get_rng_state()
    model = load_model(str(run_dir))
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module.training for module in model.modules())
    images = torch.rand(4, *DIGIT)
    assert torch.equal(model(images), trained(images))


@pytest.mark.parametrize("missing", ["config.toml", "model.safetensors", "ledger.jsonl"])
def test_a_missing_piece_is_named(run_dir, missing):
    (run_dir / missing).unlink()
    message = refusal(load_model, run_dir)
    assert message.startswith(str(run_dir))
    assert missing in message


def test_a_folder_that_is_not_there_is_named(tmp_path):
    assert refusal(load_model, tmp_path / "nowhere").startswith(str(tmp_path / "nowhere"))


def test_damaged_or_foreign_weights_are_named(run_dir):
    path = run_dir / "model.safetensors"
    save_file(MLP(DIGIT, 10, (7,)).state_dict(), path)
    assert refusal(load_model, run_dir).startswith(f"{path}: does not fit the run's model")
    path.write_bytes(b"\x00" * 5)
    assert refusal(load_model, run_dir).startswith(f"{path}: does not fit the run's model")


@pytest.mark.parametrize("start", [{}, {"image_shape": [1, 8, 8]}, {"image_shape": [8], "num_classes": 10}])
def test_an_incomplete_start_event_is_refused(run_dir, start):
    path = run_dir / "ledger.jsonl"
    path.write_text(json.dumps({"event": "start", **start}) + "\n")
    assert refusal(load_model, run_dir).startswith(f"{path}: has no complete start event")
