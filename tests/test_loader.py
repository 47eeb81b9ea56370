"""Data sets read by worker processes: which samples come, what they depend on, and what is left of the workers."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from distplateau.errors import InputError
from distplateau.training.data import loader as loader_module
from distplateau.training.data.loader import ItemSpec, StreamedSplit
from distplateau.training.data.order import split_validation
from distplateau.training.data.sources import IMAGENET_MEAN, check_streamed, is_streamed, load_streamed

CPU = torch.device("cpu")
SPEC = ItemSpec((1, 2, 2), torch.uint8, 10)
# torch's hint that a machine of two cores is small.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


class Numbers:
    """Sample i is an image full of i, of class i % 10; reading one of `bad` raises."""

    classes = tuple("abcdefghij")

    def __init__(self, samples: int = 100, bad: dict[int, object] | None = None, seconds: float = 0.0):
        self.samples, self.bad, self.seconds = samples, bad or {}, seconds

    def __len__(self):
        return self.samples

    def __getitem__(self, index):
        time.sleep(self.seconds)
        item = self.bad.get(index)
        if isinstance(item, Exception):
            raise item
        return item or (torch.full((1, 2, 2), index, dtype=torch.uint8), index % 10)


class Noise(Numbers):
    """Samples that depend on every global generator, and on how a sum is cut among threads."""

    def __getitem__(self, index):
        big = torch.rand(1, 300, 300)
        one = torch.stack([big.sum(), torch.tensor(random.random()), torch.tensor(np.random.rand()), big.mean()])
        return one.view(1, 2, 2), index % 10


NOISE_SPEC = ItemSpec((1, 2, 2), torch.float32, 10)


def slices(*parts):
    return [torch.tensor(part, dtype=torch.int64) for part in parts]


def cut(samples, size):
    return list(torch.randperm(samples, generator=torch.Generator().manual_seed(3)).split(size))


def read(split, parts, seeds=None):
    return [(inputs, labels) for inputs, labels in split.batches(parts, CPU, seeds)]


def equal(some, others):
    return len(some) == len(others) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(some, others, strict=True)
    )


def readers():
    """Return the workers; the warm ranks of other tests are children as well."""
    return [child for child in multiprocessing.active_children() if "ForkServer" not in type(child).__name__]


@pytest.fixture(autouse=True)
def _no_workers_left():
    yield
    assert readers() == []


# Which samples come.


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_exactly_the_asked_samples_come_in_the_asked_order(workers):
    split = StreamedSplit(Numbers(), SPEC, workers)
    parts = [*cut(100, 16), *slices([5, 5], [])]
    batches = read(split, parts)
    assert len(batches) == len(parts)
    for part, (inputs, labels) in zip(parts, batches, strict=True):
        assert (inputs.dtype, labels.dtype) == (torch.uint8, torch.int64)
        assert torch.equal(inputs, part.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2))
        assert torch.equal(labels, part % 10)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_rank_without_samples_gets_tensors_of_length_zero(workers):
    split = StreamedSplit(Numbers(), SPEC, workers)
    (inputs, labels), (one, _), (again, _) = read(split, slices([], [3], []))
    assert (inputs.shape, inputs.dtype) == ((0, 1, 2, 2), torch.uint8)
    assert (labels.shape, labels.dtype) == ((0,), torch.int64)
    assert (len(one), len(again)) == (1, 0)
    assert read(split, []) == []


def test_a_part_of_the_data_set_has_positions_of_its_own():
    split = StreamedSplit(Numbers(), SPEC, indices=torch.tensor([90, 80, 70]))
    assert len(split) == 3
    assert read(split, slices([2, 0]))[0][0][:, 0, 0, 0].tolist() == [70, 90]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_skipped_is_not_read(workers):
    parts = cut(100, 10)
    skipped = torch.cat(parts[:7]).tolist()
    split = StreamedSplit(Numbers(bad={index: ValueError("read") for index in skipped}), SPEC, workers)
    assert equal(read(split, parts[7:]), read(StreamedSplit(Numbers(), SPEC), parts)[7:])
    with pytest.raises(InputError, match="read"):  # negative control
        read(split, parts)


class EndlessSlices:
    """A sequence of a run's length, computed as it is looked up."""

    def __init__(self):
        self.asked = []

    def __len__(self):
        return 10**9

    def __getitem__(self, place):
        self.asked.append(place)
        return torch.tensor([place % 100])


def test_slices_are_looked_up_as_the_reading_proceeds():
    parts = EndlessSlices()
    batches = StreamedSplit(Numbers(), SPEC, 2).batches(parts, CPU)
    assert [int(next(batches)[1]) for _ in range(5)] == [0, 1, 2, 3, 4]
    assert 5 <= len(parts.asked) <= 10
    batches.close()


def test_under_inference_mode():
    with torch.inference_mode():
        batches = read(StreamedSplit(Numbers(), SPEC, 2), cut(100, 30))
    assert equal(batches, read(StreamedSplit(Numbers(), SPEC), cut(100, 30)))


# What a batch depends on.


def noisy(workers, first=0, seeds=range(1000, 1010)):
    return read(StreamedSplit(Noise(), NOISE_SPEC, workers), cut(100, 10)[first:], list(seeds)[first:])


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_random_transforms_follow_from_the_seed_of_the_batch(workers):
    reference = noisy(0)
    assert equal(noisy(workers), reference)
    assert equal(noisy(workers, first=4), reference[4:]), "resumed at step 4"
    assert not equal(noisy(workers, seeds=range(10)), reference)
    one, _ = reference[0]
    assert one[:, 0].unique().numel() == one[:, 0].numel(), "the generators and the samples differ from each other"


@pytest.mark.parametrize("workers", [1, 3])
def test_without_the_seeding_they_do_not(workers, monkeypatch):
    """Negative control."""
    reference = noisy(0)
    monkeypatch.setattr(loader_module, "repeatable", lambda seed: contextlib.nullcontext())
    assert not equal(noisy(workers), reference)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_process_of_several_threads_rounds_as_a_worker_does(two_threads, monkeypatch):
    reference = noisy(1)
    assert equal(noisy(0), reference)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # negative control
    assert not equal(noisy(0), reference)


def test_torchs_own_seeding_depends_on_the_number_of_workers():
    """Negative control: what a plain DataLoader would give."""

    def plain(workers, first=0):
        generator = torch.Generator().manual_seed(1)
        batches = DataLoader(Noise(), batch_sampler=cut(100, 10)[first:], num_workers=workers, generator=generator)
        return [tuple(batch) for batch in batches]

    assert equal(plain(1), plain(1))
    assert not equal(plain(1), plain(3))
    assert not equal(plain(1)[4:], plain(1, first=4))


def test_without_seeds_all_batches_have_the_same():
    split = StreamedSplit(Noise(), NOISE_SPEC, 2)
    (first, _), (second, _) = read(split, slices([1, 2], [1, 2]))
    assert torch.equal(first, second)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_callers_random_numbers_and_threads_are_left_alone(workers):
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state(), torch.get_num_threads()
    noisy(workers)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert torch.get_num_threads() == before[3]


# Errors.


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("item", "message"),
    [
        (KeyError("no such row"), "cannot be loaded (KeyError: 'no such row'); mend or remove it"),
        ("text", "is a str; give (tensor"),
        ((torch.zeros(1, 2, 2), 1, 2), "is a tuple of 3; give"),
        ((np.zeros((1, 2, 2)), 1), "has a ndarray for its input; give"),
        ((torch.zeros(2, 2), 1), "has a float32 tensor [2, 2] for its input; give"),
        ((torch.zeros(1, 2, 2, dtype=torch.int64), 1), "has a int64 tensor [1, 2, 2] for its input; give"),
        ((torch.zeros(1, 2, 3, dtype=torch.uint8), 1), "is a uint8 tensor [1, 2, 3] where others are uint8 [1, 2, 2]"),
        ((torch.zeros(1, 2, 2), 1), "is a float32 tensor [1, 2, 2] where others are uint8 [1, 2, 2]"),
        ((torch.zeros(1, 2, 2, dtype=torch.uint8), 1.0), "has a float for its label; give"),
        ((torch.zeros(1, 2, 2, dtype=torch.uint8), 10), "has the label 10, and there are 10 classes; give"),
    ],
)
def test_a_bad_sample_is_named_when_its_turn_comes(workers, item, message):
    split = StreamedSplit(Numbers(bad={42: item}), SPEC, workers, source="my:data", part="test")
    batches = split.batches(list(torch.arange(100).split(10)), CPU)
    assert [int(next(batches)[1].sum()) for _ in range(4)] == [45] * 4
    with pytest.raises(InputError) as caught:
        next(batches)
    assert str(caught.value).startswith(f"data.name = 'my:data': sample 42 of its test set {message}")
    assert "\n" not in str(caught.value)
    assert readers() == []  # though the traceback is still held
    assert ("__getitem__" in str(caught.value.__cause__)) == isinstance(item, Exception)


def test_labels_may_be_integers_of_numpy_and_torch():
    bad = {0: (torch.zeros(1, 2, 2, dtype=torch.uint8), np.int64(7)), 1: (SPEC_ZERO, torch.tensor(8))}
    assert read(StreamedSplit(Numbers(bad=bad), SPEC), slices([0, 1]))[0][1].tolist() == [7, 8]


SPEC_ZERO = torch.zeros(1, 2, 2, dtype=torch.uint8)


def kill_one_and_go_on(batches):
    os.kill(readers()[0].pid, signal.SIGKILL)
    for _ in batches:
        pass


def test_a_worker_that_is_killed_is_one_clear_error():
    batches = StreamedSplit(Numbers(seconds=0.02), SPEC, 2).batches(cut(100, 10), CPU)
    next(batches)
    # torch's handler of SIGCHLD may raise it here, too.
    with pytest.raises((InputError, RuntimeError), match=r"DataLoader worker \(pid.*(kill|exited)") as caught:
        kill_one_and_go_on(batches)
    batches.close()
    if isinstance(caught.value, InputError):
        assert str(caught.value).startswith("data.workers = 2: a worker process died (DataLoader worker")


# What is left of the workers.


@pytest.mark.parametrize("end", ["exhausted", "closed", "dropped", "interrupted"])
def test_no_worker_outlives_the_iteration(end):
    batches = StreamedSplit(Numbers(), SPEC, 2).batches(cut(100, 10), CPU)
    next(batches)
    assert len(readers()) == 2
    if end == "exhausted":
        assert len(list(batches)) == 9
    elif end == "closed":
        batches.close()
    elif end == "interrupted":
        with pytest.raises(KeyboardInterrupt):
            batches.throw(KeyboardInterrupt)
    del batches
    assert readers() == []


def test_an_iterator_that_is_not_used_starts_nothing():
    batches = StreamedSplit(Numbers(), SPEC, 2).batches(cut(100, 10), CPU)
    assert readers() == []
    del batches


def test_reading_from_another_thread():
    with ThreadPoolExecutor(1) as pool:
        batches = pool.submit(read, StreamedSplit(Numbers(), SPEC, 2), cut(100, 10)).result(60)
    assert len(batches) == 10


def test_two_iterations_at_once():
    split = StreamedSplit(Numbers(), SPEC, 1)
    pairs = list(zip(split.batches(cut(100, 10), CPU), split.batches(cut(100, 10), CPU), strict=True))
    assert all(torch.equal(one[0], other[0]) for one, other in pairs)


def read_while_signalled(number):
    """Let a process of another parent send it; return what arrived and which processes ran this one's handler."""
    calls = []
    reader, writer = os.pipe()
    previous = signal.signal(number, lambda *_: os.write(writer, b"x"))
    received = []
    try:
        batches = StreamedSplit(Numbers(seconds=0.01), SPEC, 2).batches(cut(100, 10), CPU)
        received.append(next(batches))
        for worker in readers():
            subprocess.run(["kill", f"-{number.value}", str(worker.pid)], check=True)
        received += batches
    finally:
        signal.signal(number, previous)
        os.close(writer)
        calls = os.read(reader, 10)
        os.close(reader)
    return received, calls


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_signals_that_slurm_or_a_terminal_sends_to_all_do_not_concern_the_workers(number):
    received, calls = read_while_signalled(number)
    assert len(received) == 10
    assert calls == b""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_left_to_torch_a_worker_runs_the_handler_it_inherited(number, monkeypatch):
    """Negative control: submitit's would requeue the job once more for each worker."""
    monkeypatch.setattr(loader_module, "_start_worker", lambda *_: None)
    assert read_while_signalled(number)[1] == b"xx"


def test_a_worker_that_hangs_is_terminated():
    """In the middle of a sample: torch waits for 5 s, then terminates it."""
    batches = StreamedSplit(Hanging(), SPEC, 1).batches(slices([0], [1], [2]), CPU)
    next(batches)
    (worker,) = readers()
    start = time.monotonic()
    batches.close()
    worker.join(10)
    assert not worker.is_alive()
    assert time.monotonic() - start < 10


class Hanging(Numbers):
    def __getitem__(self, index):
        while index == 1:
            time.sleep(600)
        return super().__getitem__(index)


_ORPHANS = """
import multiprocessing, sys, time
sys.path.insert(0, {tests!r})
from test_loader import CPU, SPEC, Hanging, Numbers, StreamedSplit, loader_module, slices
if not {watch}:
    loader_module._start_worker = lambda *_: None
batches = StreamedSplit({dataset}(), SPEC, 2).batches(slices([0], [1], [2], [3], [4], [5], [6], [7], [8]), CPU)
next(batches)
print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
time.sleep(600)
"""


def orphans(dataset, seconds, *, watch=True):
    """Return how many workers are left some time after their parent was killed, and remove them."""
    code = _ORPHANS.format(tests=str(Path(__file__).parent), dataset=dataset, watch=watch)
    parent = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2 and all(map(_is_running, pids))
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    deadline = time.monotonic() + seconds
    while any(map(_is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [pid for pid in pids if _is_running(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return len(left)


@pytest.mark.parametrize("dataset", ["Numbers", "Hanging"])  # workers with nothing to do, and one inside a sample
def test_no_worker_outlives_a_parent_that_was_killed(dataset):
    assert orphans(dataset, 8) == 0


def test_left_to_torch_a_worker_inside_a_sample_outlives_its_parent():
    """Negative control."""
    assert orphans("Hanging", 8, watch=False) == 1


def _is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# GPUs.


def test_memory_is_pinned_for_a_gpu_only():
    requests = loader_module._Requests(slices([0]), None, None)
    split = StreamedSplit(Numbers(), SPEC)
    assert split._loader(requests, pin=True).pin_memory
    assert not split._loader(requests, pin=False).pin_memory


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_arrive_on_the_gpu(workers):
    torch.zeros(1, device="cuda")
    device = torch.device("cuda", 0)
    parts = [*cut(100, 10), *slices([])]
    batches = [(a.cpu(), b.cpu()) for a, b in StreamedSplit(Numbers(), SPEC, workers).batches(parts, device)]
    assert equal(batches, read(StreamedSplit(Numbers(), SPEC), parts))


# Folders of images.

COLORS = {"ant": (200, 0, 0), "bee": (0, 200, 0), "cat": (0, 0, 200)}


def write_images(folder, per_class, classes=tuple(COLORS), size=(40, 30), suffix="png"):
    """Write plain images of a color per class, with a gray left half."""
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            image = Image.new("RGB", size, COLORS[name])
            image.paste((100, 100, 100), (0, 0, size[0] // 2, size[1]))
            image.save(folder / name / f"{number:03d}.{suffix}")


@pytest.fixture
def root(tmp_path):
    """10 images of each of three classes to train on, 2 of each to test; spaces and non-ASCII in the path."""
    folder = tmp_path / "a röot"
    write_images(folder / "train", 10)
    write_images(folder / "test", 2)
    return folder


def load(root, name="image-folder", args=None, workers=0, validation_size=6, seed=0):
    return load_streamed(name, root, args or {}, validation_size, seed, workers)


def everything(split, seeds=None):
    (batch,) = read(split, [torch.arange(len(split))], seeds)
    return batch


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp"])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_folder(suffix, workers, tmp_path):
    write_images(tmp_path / "train", 10, suffix=suffix)
    write_images(tmp_path / "test", 2, suffix=suffix)
    data = load(tmp_path, args={"size": 24}, workers=workers)
    assert (len(data.train), len(data.validation), len(data.test)) == (24, 6, 6)
    assert data.classes == ("ant", "bee", "cat")
    assert (data.image_shape, data.num_classes, data.mean) == ((3, 24, 24), 3, IMAGENET_MEAN)
    images, labels = everything(data.test)
    assert (images.dtype, images.shape) == (torch.uint8, (6, 3, 24, 24))
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    for image, label in zip(images, labels, strict=True):
        color = torch.tensor(list(COLORS.values())[label])
        assert (image[:, 12, 23].int() - color).abs().max() < 12
        assert (image[:, 12, 0].int() - 100).abs().max() < 12


def test_the_validation_set_is_carved_out_and_seen_as_the_test_set_is(root):
    data = load(root, args={"size": 24})
    kept, held_out = split_validation(30, 6, 0)
    assert torch.equal(data.train.indices, kept)
    assert torch.equal(data.validation.indices, held_out)
    assert torch.equal(everything(data.validation)[1], held_out // 10)
    for split, varies in ((data.train, True), (data.validation, False), (data.test, False)):
        same = torch.equal(everything(split, [1])[0], everything(split, [2])[0])
        assert same is not varies, split.part


@pytest.mark.parametrize("workers", [1, 3])
def test_augmented_images_do_not_depend_on_the_workers(workers, root):
    parts = cut(24, 5)
    reference = read(load(root, args={"size": 24}).train, parts, range(len(parts)))
    assert equal(read(load(root, args={"size": 24}, workers=workers).train, parts, range(len(parts))), reference)


def test_val_is_the_test_set_or_the_validation_set_beside_one(root):
    (root / "test").rename(root / "val")
    alone = load(root, args={"size": 24})
    assert (len(alone.train), len(alone.validation), len(alone.test)) == (24, 6, 6)
    write_images(root / "test", 1)
    both = load(root, args={"size": 24})
    assert (len(both.train), len(both.validation), len(both.test)) == (30, 6, 3)


def test_arguments_of_an_image_folder(root):
    fixed = load(root, args={"size": 16, "resize": 16, "scale": [1.0, 1.0], "flip": False})
    assert fixed.image_shape == (3, 16, 16)
    flipped = load(root, args={"size": 16, "scale": [1, 1]})
    left = [everything(data.train, [0])[0][:, :, 8, 0].float().std(0).max() for data in (fixed, flipped)]
    assert left[0] == 0 < left[1], "without flips the gray half stays at the left"


def test_a_test_set_that_lacks_a_class_keeps_the_numbers_of_training(tmp_path):
    write_images(tmp_path / "train", 2)
    write_images(tmp_path / "test", 1, classes=("bee", "cat"))
    assert everything(load(tmp_path, validation_size=1).test)[1].tolist() == [1, 2]


def test_gray_palette_and_cmyk_images_become_rgb(tmp_path):
    write_images(tmp_path / "test", 1, classes=("ant",))
    folder = tmp_path / "train" / "ant"
    folder.mkdir(parents=True)
    for mode, suffix in (("L", "jpg"), ("L", "png"), ("P", "png"), ("CMYK", "jpg"), ("RGBA", "png"), ("RGB", "webp")):
        Image.new("RGB", (30, 20), (0, 128, 0)).convert(mode).save(folder / f"{mode}.{suffix}")
    images, _ = everything(load(tmp_path, validation_size=1, args={"size": 8}).train)
    assert images.shape == (5, 3, 8, 8)


def test_a_damaged_image_is_named(root):
    path = root / "train" / "bee" / "004.png"
    path.write_bytes(path.read_bytes()[:40])
    data = load(root, args={"size": 24}, workers=1)
    split = data.train if 14 in data.train.indices else data.validation
    with pytest.raises(InputError) as caught:
        everything(split)
    assert str(caught.value).startswith("data.name = 'image-folder': sample 14 of its training set cannot be loaded")
    assert f"(OSError: {path}: " in str(caught.value)


def test_a_truncated_jpeg_is_damaged(tmp_path):
    write_images(tmp_path / "train", 2, size=(200, 150), suffix="jpg")
    write_images(tmp_path / "test", 1)
    path = tmp_path / "train" / "ant" / "000.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    assert f"OSError: {path}: " in refusal(tmp_path, validation_size=1)


def refusal(root, *args, **kwargs):
    with pytest.raises(InputError) as caught:
        load(root, *args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_folders_that_are_not_laid_out_as_they_should_be(tmp_path):
    root = tmp_path / "data"
    start = f"data.root = {str(root)!r}: "
    assert refusal(root).startswith(start + "there is no such folder; lay it out as train/<class>/*.jpg")
    root.mkdir()
    assert refusal(root).startswith(start + "it has no folder 'train'")
    (root / "train").mkdir()
    assert refusal(root).startswith(start + "it has no folder 'test' or 'val'")
    (root / "test").mkdir()
    assert refusal(root).startswith(f"{root / 'train'}: has no folders of classes")
    write_images(root / "train", 1)
    assert refusal(root).startswith(f"{root / 'test'}: has no folders of classes")
    (root / "test" / "dog").mkdir()
    check_streamed("image-folder", root, {})
    assert refusal(root).startswith(f"{root / 'test' / 'dog'}: is no class of the training set")
    (root / "test" / "dog").rename(root / "test" / "ant")
    assert refusal(root).startswith(f"{root / 'test'}: holds no images (.jpg")
    (root / "train" / "cat" / "000.png").unlink()
    (root / "test" / "ant" / "0.png").write_bytes((root / "train" / "ant" / "000.png").read_bytes())
    assert refusal(root).startswith(f"{root / 'train'}: holds no image of the class 'cat'")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"sise": 3}, "data.args.sise = 3: unknown argument of image-folder; did you mean 'size'?"),
        ({"size": "big"}, "data.args.size = 'big': "),
        ({"size": True}, "data.args.size = True: "),
        ({"size": 0}, "data.args.size = 0: "),
        ({"resize": 100}, "data.args.resize = 100: is no number of pixels; use 224 or more"),
        ({"scale": 0.5}, "data.args.scale = 0.5: "),
        ({"scale": [0.5, 2]}, "data.args.scale = [0.5, 2]: "),
        ({"flip": 1}, "data.args.flip = 1: "),
    ],
)
def test_wrong_arguments_of_an_image_folder(args, message, root):
    assert refusal(root, args=args).startswith(message)
    with pytest.raises(InputError, match=re.escape(message)):
        check_streamed("image-folder", root, args)


def test_a_validation_size_that_leaves_nothing(root):
    assert refusal(root, validation_size=30).startswith("data.validation_size = 30: leaves no training sample")


# A function of the user's.

THIS = "test_loader"


def two_sets(root: Path, samples: int = 50, bad=None):
    assert isinstance(root, Path)
    return Numbers(samples), Numbers(10)


def three_sets(root):
    return Numbers(50), Numbers(20), Numbers(10)


def drawn_split(root):
    order = torch.randperm(100).tolist()
    return Subset(Numbers(), order[:90]), Subset(Numbers(), order[90:])


def plain_tensors(root):
    dataset = TensorDataset(torch.rand(20, 3, 4, 4), torch.arange(20) % 7)
    dataset.targets = dataset.tensors[1]
    dataset.mean, dataset.std = [0.5, 0.5, 0.5], torch.tensor([0.1, 0.2, 0.25])
    return dataset, dataset


def test_a_function_that_returns_two_data_sets(tmp_path):
    data = load(tmp_path, f"{THIS}:two_sets", {"samples": 40})
    assert (len(data.train), len(data.validation), len(data.test)) == (34, 6, 10)
    assert (data.image_shape, data.classes) == ((1, 2, 2), tuple("abcdefghij"))
    assert (data.mean, data.std) == ((0.0,), (255.0,))
    kept, held_out = split_validation(40, 6, 0)
    assert torch.equal(everything(data.train)[0][:, 0, 0, 0], kept.to(torch.uint8))
    assert torch.equal(everything(data.validation)[0][:, 0, 0, 0], held_out.to(torch.uint8))


def test_a_function_that_returns_three_data_sets(tmp_path):
    data = load(tmp_path, f"{THIS}:three_sets", workers=2)
    assert (len(data.train), len(data.validation), len(data.test)) == (50, 20, 10)
    assert everything(data.validation)[0][:, 0, 0, 0].tolist() == list(range(20))


def test_a_split_that_the_function_draws_is_the_same_on_every_rank(tmp_path):
    torch.manual_seed(1)
    first = everything(load(tmp_path, f"{THIS}:drawn_split").test)
    state = torch.get_rng_state()
    again = load(tmp_path, f"{THIS}:drawn_split")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(everything(again.test)[0], first[0])
    assert again.num_classes == 10, "of the data set that it is a subset of"
    assert not torch.equal(everything(load(tmp_path, f"{THIS}:drawn_split", seed=1).test)[0], first[0])


def test_classes_from_targets_and_normalization_from_the_data_set(tmp_path):
    data = load(tmp_path, f"{THIS}:plain_tensors")
    assert data.classes == tuple("0123456")
    assert data.mean == (0.5, 0.5, 0.5)
    assert data.std == pytest.approx((0.1, 0.2, 0.25))
    assert everything(data.train)[0].dtype == torch.float32


def raises(root):
    raise FileNotFoundError("no such\nfile")


def returns_one(root):
    return Numbers()


def returns_text(root):
    return Numbers(), "test"


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Numbers())


def returns_iterable(root):
    return Numbers(), Stream()


def returns_empty(root):
    return Numbers(), Numbers(0)


def with_first(first, test=None):
    return Numbers(bad={0: first}), Numbers(bad={0: test} if test else None)


def item_of_text(root):
    return with_first("text")


def item_that_raises(root):
    return with_first(ValueError("what"))


def item_of_another_shape(root):
    return with_first(None, (torch.zeros(1, 3, 3, dtype=torch.uint8), 0))


def label_above(root):
    return with_first(None, (SPEC_ZERO, 10))


def no_classes(root):
    images = TensorDataset(torch.rand(20, 3, 4, 4), torch.arange(20))
    return images, images


def normalized(mean, std, value=100):
    train = Numbers(bad={0: (torch.full((1, 2, 2), value, dtype=torch.uint8), 0)})
    train.mean, train.std = mean, std
    return train, Numbers()


def std_of_the_wrong_units(root):
    return normalized([0.4], [0.2])


def binary_images(root):
    return normalized([0.4], [0.2], value=1)


def std_of_zero(root):
    return normalized([100], [0])


def mean_of_another_length(root):
    return normalized([1, 2, 3], [1, 2, 3])


def mean_alone(root):
    return normalized([1], None)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("raises", "it raised FileNotFoundError: no such file; mend"),
        ("returns_one", "it returned a Numbers; return the data sets (train, test)"),
        ("returns_text", "it returned a str among the data sets"),
        ("returns_iterable", "it returned a Stream among the data sets"),
        ("returns_empty", "it returned a data set without samples"),
        ("item_of_text", "sample 0 of its training set is a str; give (tensor [c, h, w]"),
        ("item_that_raises", "sample 0 of its training set cannot be loaded (ValueError: what)"),
        ("item_of_another_shape", "sample 0 of its test set is a uint8 tensor [1, 3, 3] where others are uint8 [1, 2"),
        ("label_above", "sample 0 of its test set has the label 10, and there are 10 classes"),
        ("no_classes", "its data sets do not say how many classes there are"),
        ("std_of_the_wrong_units", "its images have values to 255, and its std [0.2] is one of values to 1; multiply"),
        ("std_of_zero", "its training set has mean [100] and std [0] for 1 channels"),
        ("mean_of_another_length", "its training set has mean [1, 2, 3] and std [1, 2, 3] for 1 channels"),
        ("mean_alone", "its training set has mean [1] and std None"),
        ("nothing_there", "test_loader has no such function"),
    ],
)
def test_mistakes_in_a_function(function, message, tmp_path):
    assert refusal(tmp_path, f"{THIS}:{function}").startswith(f"data.name = '{THIS}:{function}': {message}")


def test_binary_images_may_have_a_small_deviation(tmp_path):
    assert load(tmp_path, f"{THIS}:binary_images").std == (0.2,)


def test_arguments_are_compared_with_the_signature(tmp_path):
    name = f"{THIS}:two_sets"
    for call in (lambda args: load(tmp_path, name, args), lambda args: check_streamed(name, tmp_path, args)):
        with pytest.raises(InputError, match=rf"data\.args\.smaples = 3: unknown argument of {name}; did you mean"):
            call({"smaples": 3})
        with pytest.raises(InputError, match=r"data\.args\.root = 'x': unknown argument"):
            call({"root": "x"})
    with pytest.raises(InputError, match=r"data\.name = 'nowhere:f': 'nowhere' cannot be imported"):
        check_streamed("nowhere:f", tmp_path, {})


def test_names():
    assert is_streamed("image-folder") and is_streamed("package.module:function")
    assert not is_streamed("cifar10")


def test_a_list_of_images_is_not_made_of_objects(root):
    """A worker that reads a Python object has soon copied its page; of a million paths nothing is copied."""
    files = load(root, args={"size": 24}).train.dataset.files
    assert {type(value) for value in vars(files).values()} == {type(root), bytes, np.ndarray}
    assert files.path(29) == root / "train" / "cat" / "009.png"
    assert isinstance(load(root, args={"size": 24}).train.dataset[0][0], Tensor)


# What the process has left lying about.


class Trap:
    """Garbage in a cycle, of which only the collector can tell: a trained model and its process group."""

    def __init__(self, told):
        self.told, self.owner, self.itself = told, os.getpid(), self

    def __del__(self):
        if os.getpid() != self.owner:
            self.told.write_text("collected in a worker")


class Collecting:
    def __len__(self):
        return 8

    def __getitem__(self, index):
        gc.collect()
        return torch.zeros(1, 2, 2, dtype=torch.uint8), index


@pytest.mark.parametrize("frozen", [True, False])
def test_workers_do_not_collect_the_garbage_of_their_parent(tmp_path, monkeypatch, frozen):
    """It ends threads and process groups, which a fork has not. Negative control: without the freezing it does."""
    if not frozen:
        monkeypatch.setattr(loader_module.gc, "freeze", lambda: None)
    parts = [torch.arange(4), torch.arange(4, 8)]
    gc.collect()
    gc.disable()
    try:
        Trap(tmp_path / "told")
        list(StreamedSplit(Collecting(), SPEC, workers=2).batches(parts, CPU))
    finally:
        gc.enable()
    assert (tmp_path / "told").exists() != frozen
