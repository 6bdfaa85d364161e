"""train.py: the loop learns, a frozen network stays frozen, and nothing that was finished is ever lost."""

import ast
import contextlib
import csv
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REPO, on_fake_cuda, refused
from PIL import Image, ImageDraw
from torch import nn

import data
import models
import train

cross_entropy = F.cross_entropy
EPOCHS = 6  # of the runs that are interrupted
CPU = torch.device("cpu")
FLOAT32 = train.Precision(None, False, torch.contiguous_format)
SMOOTHING = 0.2
KINDS = {  # what is trained: everything from scratch, a last layer alone, a network of which all is fine-tuned
    "cnn": ["cnn"],
    "head": ["resnet18", "--weights", "none"],
    "all": ["resnet18", "--weights", "none", "--unfreeze"],
}
SMALL = "mnasnet0_5"  # has a tenth of resnet18's parameters; its features, untrained, are too small to compare
TIMES = {"seconds", "images_per_second"}  # what may differ between two runs of the same seed


def arguments(demo, runs, *more, arch="cnn", epochs=EPOCHS):
    """A training of the smallest size: 60 photos of 16 x 16 px, 2 steps an epoch."""
    crop = ["--crop", "16"] if arch == "cnn" or "--unfreeze" in more else []
    crop += ["--width", "16"] if arch == "cnn" else []
    return [arch, "--data", str(demo), "--runs", str(runs), "--device", "cpu", "--epochs", str(epochs), "--size", "16",
            "--looks", "16", *crop, "--batch-size", "32", *map(str, more)]


def training(*these, **options):
    """A training in this process, up to its end or to whatever stops it."""
    train.train(*train.parse_arguments(arguments(*these, **options)))


@contextlib.contextmanager
def full_disk(size):
    """Files of more bytes fail as on a full disk, in the middle of writing (Python ignores the signal)."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def stop_after(epochs, monkeypatch):
    """Ctrl-C right after that many epochs have been saved."""
    save = train.save_epoch

    def save_and_stop(*things):
        save(*things)
        if len(things[1]) == epochs:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "save_epoch", save_and_stop)


def plan(batches, rates):
    """What `train_epoch` wants to know of each step: its rate, and how many photos this process, the only one, has."""
    return [(rate, len(labels)) for (_, labels), rate in zip(batches, rates, strict=True)]


def accuracy_of(network, batches, precision):
    return train.val_scores(train.evaluate(network, batches, precision, 10))["val_accuracy"]


def log(folder):
    """The rows of log.csv, but for what the clock says."""
    with open(folder / "log.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


def contents(folder):
    """What lies in a run's folder, but for the lock."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "run.lock"}


def same(a, b):
    """Whether two nests of dicts, lists and tensors are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k not in TIMES)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def same_run(a, b):
    """Whether two run folders hold the same training: all that is in last.pt and best.pt, and the log."""
    weights = all(same(models.read(a / name), models.read(b / name)) for name in ("last.pt", "best.pt"))
    return weights and log(a) == log(b)


@pytest.fixture(scope="module")
def trained(demo, tmp_path_factory):
    """The folder of a run of EPOCHS epochs that nothing disturbed. Do not change it."""
    runs = tmp_path_factory.mktemp("trained")
    training(demo, runs)
    return runs / "cnn"


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """call("cnn", ...): the command in this process, in an empty folder, as if it had been run: starting Python and
    torch anew takes seconds. What should have been a sentence and is an exception fails the test."""
    monkeypatch.chdir(tmp_path)

    def call(*given):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, given)])
        status, handler = 0, signal.getsignal(signal.SIGTERM)
        try:
            train.main()
        except SystemExit as end:
            status = end.code or 0
        finally:
            signal.signal(signal.SIGTERM, handler)
        return subprocess.CompletedProcess(given, status, *capsys.readouterr())

    return call


def start(demo, runs):
    """The training of `trained` as a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(REPO / "train.py"), *arguments(demo, runs)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, env=environment, **pipes)


def wait_for_an_epoch(process):
    for line in process.stdout:
        if line.startswith("epoch"):
            return line
    raise AssertionError(process.stderr.read())


# ---------------------------------------------------------------- schedule, parameters, loop


@pytest.mark.parametrize("steps", [20, 100, 2960])
def test_schedule_rises_to_its_peak_once_and_falls(steps):
    rates = [train.one_cycle(step, steps) for step in range(steps)]
    peak = rates.index(max(rates))
    assert rates[peak] == 1 and rates.count(1) == 1
    assert 0.02 * steps <= peak <= 0.2 * steps
    assert 0 < rates[0] < 1 / peak if peak > 1 else rates[0] < 1
    assert 0 < rates[-1] <= 2 / steps
    for side in (rates[: peak + 1], rates[peak:]):  # straight lines
        assert np.allclose(np.diff(side, 2), 0, atol=1e-12) and (np.diff(side) != 0).all()


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 12, 148])
def test_schedule_never_stops_nor_exceeds_its_peak(steps):
    rates = [train.one_cycle(step, steps) for step in range(steps)]
    assert min(rates) > 0 and 1 - 1 / steps <= max(rates) <= 1 or steps == 1
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1]) and rates[peak:] == sorted(rates[peak:], reverse=True)


def recipe_of(*more):
    return train.parse_arguments([*map(str, more)])[0]


def test_crops_grow_to_their_side_and_photos_in_validation_with_them():
    recipe = recipe_of("cnn", "--epochs", 100)
    found = [train.sides(recipe, epoch) for epoch in range(100)]
    assert found == sorted(found) and set(found) == {(48, 72), (56, 84), (64, 96)}
    assert found[0] == (48, 72) and found[74:] == [(64, 96)] * 26
    assert train.sides(recipe_of("cnn", "--epochs", 1), 0) == (64, 64)
    assert [train.sides(recipe_of("cnn", "--epochs", 5, "--crop", 128, "--size", 128), epoch)[0]
            for epoch in range(5)] == [104, 112, 120, 128, 128]
    assert train.sides(recipe_of("cnn", "--crop", 20, "--size", 20), 0) == (16, 16)
    assert train.sides(recipe_of("cnn", "--crop", 5, "--size", 16), 0) == (5, 16)


@pytest.mark.parametrize("epochs, crop, size", [(100, 64, 96), (20, 64, 88), (5, 104, 128), (20, 96, 128), (1, 64, 64)])
def test_the_cnn_is_evaluated_on_photos_with_objects_as_large_as_in_its_crops(epochs, crop, size):
    assert recipe_of("cnn", "--crop", crop, "--epochs", epochs).size == size
    assert recipe_of("cnn", "--crop", crop, "--epochs", epochs, "--size", 100).size == 100
    assert train.matching_size(1, epochs) == 8  # a cell of the map
    photos = data.from_arrays([torch.zeros(400, 400, 3, dtype=torch.uint8)])
    boxes = data.random_boxes(photos, torch.zeros(20_000, dtype=torch.long), torch.Generator().manual_seed(0),
                              train.least_area(epochs))
    enlarged = (crop / (boxes[:, 2] * boxes[:, 3]).sqrt()).mean() * 400  # the side of a photo that is as much enlarged
    assert float(enlarged) == pytest.approx(size, abs=max(4.5, 0.02 * size))


def test_pieces_at_the_photos_own_scale_and_whole_photos_do_not_grow():
    assert train.sides(recipe_of("cnn", "--plain-crop", "--size", 160), 0) == (64, 160)
    assert train.sides(recipe_of("resnet18"), 0) == (0, 224)


def test_the_longer_a_training_the_less_of_a_photo_a_crop_shows(demo, tmp_path, monkeypatch):
    areas = []
    monkeypatch.setattr(data, "random_boxes", lambda photos, index, generator, area:
                        areas.append(area) or torch.tensor([[0.0, 0, 9, 9]]).expand(len(index), -1))
    for epochs, least in ((1, 1.0), (4, 0.5)):
        training(demo, tmp_path, "--name", epochs, epochs=epochs)
        assert areas[-1] == least == train.least_area(epochs)
    assert train.least_area(100) == pytest.approx(0.1)


def optimizer_of(kind, demo, runs, monkeypatch):
    """The module that a training trains, and the optimiser it makes for it."""

    class Caught(Exception):
        pass

    def catch(network, batches, rates, optimizer, *rest):
        raise Caught(network, optimizer)

    monkeypatch.setattr(train, "train_epoch", catch)
    arch, *more = KINDS[kind]
    with pytest.raises(Caught) as caught:
        training(demo, runs, *more, arch=arch)
    return caught.value.args


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 16)])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_orthogonalised_keeps_directions_and_evens_out_strengths(shape, dtype, error):
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    strengths = torch.linspace(10, 1, min(shape))
    result = train.orthogonalise(u * strengths @ v, dtype)
    assert result.dtype == torch.float32
    inner = u.T @ result @ v.T  # diagonal: the same directions
    assert (inner - inner.diag().diag()).abs().max() < error
    assert inner.diag().min() > 0.6 and inner.diag().max() < 1.3


def test_the_products_of_orthogonalisation_are_those_of_newton_schulz():
    """The shortcut, products of small matrices, against the steps one by one on the large one."""
    torch.manual_seed(0)
    for shape in ((3, 12, 40), (40, 12), (16, 16)):
        matrices = torch.randn(shape, dtype=torch.float64)
        x = matrices.mT if shape[-2] > shape[-1] else matrices
        x = x / x.norm(dim=(-2, -1), keepdim=True)
        for _ in range(3):
            a = x @ x.mT
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        x = x.mT if shape[-2] > shape[-1] else x
        assert torch.allclose(train.orthogonalise(matrices, torch.float64), x, atol=1e-6)


def test_the_average_is_a_mean_of_the_weights_and_statistics_of_the_latest_steps():
    module = nn.BatchNorm1d(2)
    average = train.Average(module)
    values = [torch.tensor([step, -step]) ** 2 for step in map(float, range(1, 101))]
    for step, value in enumerate(values, 1):
        module.weight.data, module.running_mean = value.clone(), 2 * value
        average.update(module)
        if step == 1:
            assert torch.equal(average.module.weight, value)  # what it began with counts for nothing
    shares = [1 - (1 - 1 / step) ** 16 for step in range(1, 101)]
    expected, left = torch.zeros(2), 1.0
    for value, share in zip(reversed(values), reversed(shares), strict=True):  # weights that sum to 1
        expected, left = expected + left * share * value, left * (1 - share)
    assert left == pytest.approx(0, abs=1e-6)
    assert torch.allclose(average.module.weight, expected, rtol=1e-4)
    assert torch.allclose(average.module.running_mean, 2 * expected, rtol=1e-4)
    assert not average.module.training and not average.module.weight.requires_grad


def test_what_is_validated_and_kept_is_the_average(trained):
    last, best = models.read(trained / "last.pt"), models.read(trained / "best.pt")
    assert not same(last["network"], last["average"])
    if best["epoch"] == EPOCHS:
        assert same(best["state"], last["average"])


def test_no_gradient_is_orthogonalised_to_no_step():
    assert not train.orthogonalise(torch.zeros(4, 9)).any()


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_trained_once_and_filter_banks_alone_decay(kind, demo, tmp_path, monkeypatch):
    module, optimizer = optimizer_of(kind, demo, tmp_path, monkeypatch)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, trained)) == sorted(id(p) for p in module.parameters() if p.requires_grad)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    first, *convolutions = [m for m in module.modules() if isinstance(m, nn.Conv2d)] or [None]
    banks = {id(m.weight) for m in convolutions}
    assert all((decay[id(p)] > 0) == (id(p) in banks) for p in trained)
    assert isinstance(module, nn.Linear) == (kind == "head")


def test_a_step_of_all_banks_at_once_is_that_of_each_alone():
    torch.manual_seed(0)
    network, rate, decay, momentum = models.cnn(), 0.1, 0.05, 0.9
    optimizer = train.Muon(network, rate, decay, momentum)
    expected = {p: (p.detach().clone(), torch.zeros_like(p)) for p in network.parameters()}
    for _ in range(2):
        for p in network.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        for p, (value, velocity) in expected.items():
            velocity.mul_(momentum).add_(p.grad)
            step, scale = p.grad + momentum * velocity, train.PLAIN_LR
            if p.ndim == 4 and p.shape[1] > 3:
                matrix = train.orthogonalise(step.reshape(len(p), -1))
                step, scale = matrix.view_as(p) * max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5, 1
                value.mul_(1 - rate * decay)
            value.sub_(rate * scale * step)
    for p, (value, _) in expected.items():
        assert torch.allclose(p, value, atol=1e-4)


def test_classes_of_few_photos_count_as_much_in_the_mean_of_classes():
    loss, right, photos = torch.tensor([8.0, 4.0, 0.0]), torch.tensor([9.0, 0.0, 0.0]), torch.tensor([9.0, 3.0, 0.0])
    assert train.val_scores(torch.stack([loss, right, photos])) == {
        "val_loss": 1.0, "val_accuracy": 0.75, "val_class_accuracy": 0.5}


def test_the_loop_fits_on_a_screen_and_has_backward_in_it():
    source = inspect.getsource(train.train_epoch)
    body = ast.parse(source).body[0].body
    first = body[1].lineno if isinstance(body[0], ast.Expr) else body[0].lineno  # after the docstring
    lines = [line for line in source.splitlines()[first - 1 :] if line.strip()]
    assert len(lines) + 1 <= 25  # and the line of the def
    assert any(".backward()" in line for line in lines)


def test_one_batch_can_be_learnt_by_heart(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "save_epoch", lambda *things: None)
    photos = data.load(demo, "train").subset(torch.arange(0, 60, 4))
    (batch,) = data.eval_batches(photos, 24, len(photos))
    recipe, _ = train.parse_arguments(arguments(demo, tmp_path, "--batch-size", len(photos), epochs=4))
    torch.manual_seed(0)
    network = models.cnn(width=32)
    batches = network, lambda epoch: [batch] * 8, lambda epoch: [batch]
    facts, precision = {"classes": photos.classes}, train.choose_precision(CPU)
    rows = train.run_epochs(tmp_path, recipe, network, batches, 8 * len(photos), facts, None, precision)
    assert len(rows) == 4 and rows[-1]["train_accuracy"] == 1 and rows[-1]["val_accuracy"] == 1
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] / 2


def test_the_loop_uses_the_rates_it_is_given():
    head, x, labels = nn.Linear(4, 10), torch.randn(8, 4), torch.arange(8)
    before = head.weight.detach().clone()
    optimizer = torch.optim.SGD(head.parameters(), 1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    batches = [(x, labels)] * 3
    more = optimizer, scaler, FLOAT32, SMOOTHING
    losses, right, seen = train.train_epoch(head, batches, plan(batches, [0.0] * 3), *more)
    assert torch.equal(head.weight, before) and losses.shape == (3,) and seen == 24
    assert int(right) == 3 * int((head(x).argmax(1) == labels).sum())
    expected = F.cross_entropy(head(x), labels, label_smoothing=SMOOTHING)
    assert torch.allclose(losses, expected.detach())
    (gradient,) = torch.autograd.grad(expected, head.weight)
    train.train_epoch(head, batches[:1], plan(batches[:1], [0.25]), *more)
    assert torch.allclose(head.weight, before - 0.25 * gradient, atol=1e-6)


def test_evaluation_is_a_mean_over_photos_not_over_batches():
    head, x, labels = nn.Sequential(nn.Dropout(0.9), nn.Linear(4, 10)), torch.randn(11, 4), torch.arange(11) % 10
    batches = [(x[:8], labels[:8]), (x[8:], labels[8:])]
    sums = train.evaluate(head, batches, FLOAT32, 10)
    loss, right, count = sums.sum(1).tolist()
    logits = head[1](x).detach()
    assert sums[2].tolist() == [2] + [1] * 9  # photos of each class
    assert sums[1].tolist() == torch.zeros(10).index_add_(0, labels, (logits.argmax(1) == labels).float()).tolist()
    assert loss / count == pytest.approx(float(F.cross_entropy(logits, labels)), abs=1e-6)
    assert (right, count) == (int((logits.argmax(1) == labels).sum()), 11)


# ---------------------------------------------------------------- device and precision


@pytest.mark.parametrize(("bf16", "amx", "dtype"), [(False, False, None), (True, False, torch.bfloat16),
                                                    (False, True, torch.bfloat16)])
def test_cpu_computes_in_bfloat16_only_where_it_has_it(monkeypatch, bf16, amx, dtype):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    precision = train.choose_precision(CPU)
    assert precision == (dtype, False, torch.channels_last)
    assert precision.name == ("bfloat16" if dtype else "float32")


@pytest.mark.parametrize(("capability", "expected"), [
    ((9, 0), (torch.bfloat16, False, torch.channels_last)), ((8, 0), (torch.bfloat16, False, torch.channels_last)),
    ((7, 5), (torch.float16, True, torch.channels_last)), ((7, 0), (torch.float16, True, torch.channels_last)),
])
def test_cuda_scales_gradients_where_it_must_use_float16(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)
    assert train.choose_precision(torch.device("cuda")) == expected


@pytest.mark.parametrize(("dtype", "products"), [
    (None, torch.float32), (torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_float16_is_for_the_network_alone(dtype, products):
    assert train.Precision(dtype, False, torch.channels_last).products == products


def test_mps_computes_in_float32_on_contiguous_images():
    assert train.choose_precision(torch.device("mps")) == (None, False, torch.contiguous_format)


@pytest.mark.parametrize("name", ["gpu", "", "cuda:99", "cpux"])
def test_unknown_devices_are_refused_by_name(name):
    with pytest.raises(train.TrainError, match=f"no device '{name}'.*--device"):
        train.choose_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_cuda_is_refused_where_there_is_none_and_auto_does_without():
    with pytest.raises(train.TrainError, match="no device 'cuda'"):
        train.choose_device("cuda")
    assert train.choose_device("auto").type in ("cpu", "mps")


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@torch.no_grad()
def test_passes_and_steps_ask_the_device_for_nothing(fake_device):
    """All of an epoch on CUDA but the backward pass, which no fake tensor can go: a number that is asked for raises."""
    photos = on_fake_cuda(data.from_arrays([torch.zeros(20, 24, 3, dtype=torch.uint8)] * 8, torch.arange(8)))
    precision = train.Precision(torch.bfloat16, False, torch.channels_last)
    fake_device.watches = False
    with torch.device("cuda"):
        network = models.cnn()
    fake_device.watches = True
    totals = train.evaluate(network, data.eval_batches(photos, 16, 4), precision, 10)
    assert totals.device.type == "cuda" and totals.shape == (3, 10)

    optimizer = train.Muon(network, 0.1, 0.05, dtype=precision.products)
    for p in network.parameters():
        p.grad = torch.empty_like(p)
    optimizer.step()
    assert {state["velocity"].device.type for state in optimizer.state.values()} == {"cuda"}
    average = train.Average(network)
    average.update(network)
    assert {p.device.type for p in average.module.parameters()} == {"cuda"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("capability", [(8, 0), (7, 5)])
def test_an_epoch_on_cuda(demo, tmp_path, monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)
    seen, epoch = [], train.train_epoch
    monkeypatch.setattr(train, "train_epoch", lambda *things: seen.append(things) or epoch(*things))
    training(demo, tmp_path, "--device", "cuda", epochs=2)
    network, _, _, _, scaler, precision = seen[0]
    assert all(p.is_cuda and p.dtype == torch.float32 for p in network.parameters())
    filters = [p for p in network.parameters() if p.ndim == 4 and min(p.shape[:2]) > 1]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in filters)
    assert scaler.is_enabled() == (capability < (8, 0)) == (precision.dtype == torch.float16)
    assert len(log(tmp_path / "cnn")) == 2
    network, _ = models.load(tmp_path / "cnn" / "best.pt")  # on the CPU
    assert all(p.isfinite().all() for p in network.parameters())


# ---------------------------------------------------------------- frozen


@pytest.mark.parametrize("unfreeze", [False, True])
def test_frozen_features_keep_every_parameter_and_buffer(demo, tmp_path, unfreeze):
    more = ["--weights", "none", "--seed", 3, *["--unfreeze"] * unfreeze]
    training(demo, tmp_path, *more, arch=SMALL, epochs=1)
    torch.manual_seed(3)
    before, after = models.build(SMALL).state_dict(), models.read(tmp_path / SMALL / "last.pt")["network"]
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    heads = {key for key in before if key.startswith("head.")}
    if unfreeze:
        assert changed == set(before)  # num_batches_tracked, running mean and variance included
    else:
        assert changed == heads


def frozen_resnet():
    torch.manual_seed(0)
    return models.build("resnet18").eval()


@torch.no_grad()
def features_of(network, photos, size, mirror):
    """Each photo's features, one by one, by the network as it is."""
    single = [photos.subset(torch.tensor([i])) for i in range(len(photos))]
    images = [x.flip(3) if mirror else x for photo in single for x, _ in data.eval_batches(photo, size, 1)]
    return torch.cat([network.features(x).mean((2, 3)) for x in images])


@pytest.mark.parametrize("mirrored", [False, True])
def test_stored_features_are_those_of_the_network(demo, mirrored):
    network, photos = frozen_resnet(), data.load(demo, "val")
    before = {k: v.clone() for k, v in network.state_dict().items()}
    stored, labels = train.stored_features(network, photos, 32, mirrored)
    assert torch.equal(labels, photos.labels)
    assert stored.dtype == torch.float32 and not stored.requires_grad and len(stored) == 1 + mirrored
    for side, mirror in zip(stored, (False, True), strict=False):
        assert torch.allclose(side, features_of(network, photos, 32, mirror), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


@pytest.mark.parametrize(("arch", "precision"), [(SMALL, "float32"), ("cnn", "bfloat16")])
def test_a_head_is_trained_in_the_precision_of_maps(demo, tmp_path, monkeypatch, arch, precision):
    bfloat16 = train.Precision(torch.bfloat16, False, torch.channels_last)
    monkeypatch.setattr(train, "choose_precision", lambda device: bfloat16)
    training(demo, tmp_path, *(["--weights", "none", "--looks", 32] if arch == SMALL else []), arch=arch, epochs=1)
    assert json.loads((tmp_path / arch / "result.json").read_text())["precision"] == precision


def test_training_on_stored_features_equals_training_through_the_network(demo, tmp_path):
    more = ["--weights", "none", "--looks", 32]
    recipe, _ = train.parse_arguments(arguments(demo, tmp_path, *more, arch="resnet18"))
    network, photos = frozen_resnet(), data.load(demo, "train")
    nn.init.normal_(network.head.weight, std=0.01)
    reference = frozen_resnet()
    reference.load_state_dict(network.state_dict())

    module, train_batches, _ = train.make_batches(recipe, network, photos, data.load(demo, "val"), FLOAT32)
    assert module is network.head
    batches = [batch for epoch in range(2) for batch in train_batches(epoch)]
    rates = [0.05 / (1 + i) for i in range(len(batches))]
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    optimizer = torch.optim.SGD(module.parameters(), momentum=0.9)
    losses, *_ = train.train_epoch(module, batches, plan(batches, rates), optimizer, scaler, FLOAT32, SMOOTHING)

    # The same photos, found again by their features, through the whole network in evaluation mode.
    both = torch.stack([features_of(reference, photos, 32, mirror) for mirror in (False, True)])
    ((images, labels),) = data.eval_batches(photos, 32, len(photos))
    images, used = torch.stack([images, images.flip(3)]), []
    optimizer = torch.optim.SGD(reference.head.parameters(), momentum=0.9)
    for (x, batch_labels), rate, loss in zip(batches, rates, losses, strict=True):
        distance, which = torch.cdist(x, both.flatten(0, 1), compute_mode="donot_use_mm_for_euclid_dist").min(1)
        assert distance.max() < 1e-3 and torch.equal(labels.repeat(2)[which], batch_labels)
        used.append(which)
        optimizer.param_groups[0]["lr"] = rate
        logits = reference.eval()(images.flatten(0, 1)[which])
        expected = F.cross_entropy(logits, batch_labels, label_smoothing=SMOOTHING)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        assert float(loss) == pytest.approx(float(expected.detach()), abs=1e-4)
    assert torch.allclose(network.head.weight, reference.head.weight, atol=1e-4)
    assert torch.allclose(network.head.bias, reference.head.bias, atol=1e-4)
    used = torch.cat(used)
    assert (used % len(photos)).bincount().tolist() == [2] * len(photos)  # every photo once an epoch
    assert 0.25 < (used >= len(photos)).float().mean() < 0.75  # half of them mirrored


# ---------------------------------------------------------------- a run and its files


def test_a_run_leaves_these_files(trained):
    assert contents(trained).keys() == {"best.pt", "last.pt", "log.csv", "curves.png", "config.json", "result.json"}
    with open(trained / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["epoch", "size", "train_loss", "train_accuracy", "val_loss", "val_accuracy",
                             "val_class_accuracy", "lr", "images_per_second", "seconds"]
    assert [int(row["epoch"]) for row in rows] == list(range(1, EPOCHS + 1))
    assert all(0 <= float(row["val_accuracy"]) <= 1 and float(row["train_loss"]) > 0 for row in rows)
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])  # it learns
    accuracy = [float(row["val_accuracy"]) for row in rows]

    config = json.loads((trained / "config.json").read_text())
    recipe = config["recipe"]
    assert (recipe["arch"], recipe["epochs"], recipe["crop"], recipe["seed"]) == ("cnn", EPOCHS, 16, 0)
    assert recipe["photos"] == [60, 20] and {"lr", "batch_size", "weight_decay", "width"} <= recipe.keys()
    assert {"command", "parameters", "device", "precision", "threads", "processes", "machine"} <= config.keys()
    result = json.loads((trained / "result.json").read_text())
    assert config.items() <= result.items() and result["seconds"] > 0
    assert (result["epochs_to_72"], result["seconds_to_72"]) == (None, None)  # it does not get that far
    assert result["best_accuracy"] == max(accuracy) and result["last_accuracy"] == accuracy[-1]
    assert result["best_epoch"] == accuracy.index(max(accuracy)) + 1
    with Image.open(trained / "curves.png") as picture:
        picture.load()
        assert picture.format == "PNG" and len(picture.convert("RGB").getcolors(1 << 20)) > 10


def test_best_checkpoint_has_exactly_the_accuracy_it_says(trained, demo):
    network, facts = models.load(trained / "best.pt")
    result = json.loads((trained / "result.json").read_text())
    assert (facts["accuracy"], facts["epoch"]) == (result["best_accuracy"], result["best_epoch"])
    assert facts["classes"] == list(data.CLASSES.values()) and facts["size"] == 16 and facts["arch"] == "cnn"
    batches = data.eval_batches(data.load(demo, "val"), facts["size"], 7)
    assert round(accuracy_of(network, batches, train.choose_precision(CPU)), 5) == facts["accuracy"]


def test_curves_are_the_values_they_show(tmp_path):
    quarter = [dict(epoch=i + 1, train_loss=2.0, val_loss=1.0, train_accuracy=0.5, val_accuracy=1.0) for i in range(4)]
    train.draw_curves(quarter, tmp_path / "curves.png")
    train.draw_curves(quarter[:1], tmp_path / "one.png")  # a single epoch is a point
    pixels = np.array(Image.open(tmp_path / "curves.png"))
    middle = pixels[:, [260, 710]].astype(int)  # a column in each diagram
    blue, red = ((np.abs(middle - colour).sum(2) < 40) for colour in ((0, 114, 178), (213, 94, 0)))
    heights = [[np.flatnonzero(hit[:, side]).mean() for hit in (blue, red)] for side in (0, 1)]
    top, bottom = heights[0][0], 2 * heights[0][1] - heights[0][0]  # losses: 2 is the top, 1 is half of it
    assert top < bottom and heights[1][1] == pytest.approx(top, abs=2)
    assert heights[1][0] == pytest.approx((top + bottom) / 2, abs=2)


def test_every_character_in_the_curves_is_in_the_font(tmp_path, monkeypatch):
    texts, write = [], ImageDraw.ImageDraw.text
    monkeypatch.setattr(ImageDraw.ImageDraw, "text",
                        lambda pen, xy, text, *rest, **options: texts.append((text, rest[1])) or
                        write(pen, xy, text, *rest, **options))
    row = dict(epoch=1, train_loss=2.0, val_loss=1.0, train_accuracy=0.5, val_accuracy=1.0)
    train.draw_curves([row], tmp_path / "curves.png")
    face = texts[0][1]
    missing = bytes(face.getmask("\U0010ffff"))
    printed = set("".join(text for text, _ in texts)) - {" "}
    assert len(printed) > 10 and not [c for c in printed if bytes(face.getmask(c)) == missing]


def test_the_same_seed_gives_the_same_run_and_another_does_not(trained, demo, tmp_path):
    torch.rand(7), np.random.rand(7)  # chance from before is none of the run's
    training(demo, tmp_path)
    assert same_run(tmp_path / "cnn", trained)
    training(demo, tmp_path, "--seed", 1, "--name", "other", epochs=1)
    assert log(tmp_path / "other")[0] != log(trained)[0]


def test_seed_and_epoch_decide_the_order_of_the_photos(demo, tmp_path, monkeypatch):
    orders, batches = [], data.train_batches

    def train_batches(*things, **options):
        orders.append([])
        for images, labels in batches(*things, **options):
            orders[-1] += labels.tolist()
            yield images, labels

    monkeypatch.setattr(data, "train_batches", train_batches)
    for seed in (0, 1):
        training(demo, tmp_path, "--seed", seed, "--name", seed, epochs=2)
    orders = [order for i, order in enumerate(orders) if i % 3]  # the first of a run is for the whitening
    assert len(orders) == 4 and all(sorted(order) == sorted(orders[0]) for order in orders)
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_given_is_of_the_recipe(kind):
    given = [word for word in KINDS[kind] if word not in ("--weights", "none")]
    recipe, _ = train.parse_arguments(given)
    assert train.DEFAULTS["scratch" if kind == "cnn" else kind].items() <= vars(recipe).items()
    assert recipe.weights == (None if kind == "cnn" else "imagenet")
    for key in ("epochs", "size", "batch_size", "lr"):
        flag = "--" + key.replace("_", "-")
        assert getattr(train.parse_arguments([*given, flag, "7"])[0], key) == 7


@pytest.mark.parametrize("kind", KINDS)
def test_dry_run_writes_everything_under_a_name_of_its_own(call, demo, tmp_path, kind):
    arch, *more = [word.replace("resnet18", SMALL) for word in KINDS[kind]]
    again = arguments(demo, "runs", *more, "--batch-size", 16, "--dry-run", arch=arch)
    result = call(*again)
    assert result.returncode == 0, result.stderr
    assert [p.name for p in (tmp_path / "runs").iterdir()] == [f"{arch}-dry-run"]
    folder = tmp_path / "runs" / f"{arch}-dry-run"
    assert {p.name for p in folder.iterdir()} == {"best.pt", "last.pt", "log.csv", "curves.png", "config.json",
                                                  "result.json", "run.lock"}
    assert len(log(folder)) == 1
    assert json.loads((folder / "config.json").read_text())["recipe"]["photos"] == [32, 20]  # two batches
    models.load(folder / "best.pt")
    if kind == "head":
        assert call(*again).returncode == 0  # and a second time


def test_holdout_is_taken_from_train_and_val_stays_unseen(demo, monkeypatch):
    load = data.load

    def load_train_alone(folder, split, *rest):
        assert split == "train"
        return load(folder, split, *rest)

    monkeypatch.setattr(data, "load", load_train_alone)
    halves = []
    for seed in (0, 1):
        recipe, _ = train.parse_arguments(arguments(demo, "runs", "--holdout", 0.25, "--seed", seed))
        halves.append([sorted(p.names) for p in train.prepare_photos(recipe, demo, False, None, CPU)])
    (rest, held), again = halves
    assert len(held) == 15 and not set(rest) & set(held)
    assert sorted(rest + held) == sorted(load(demo, "train").names)
    assert halves[0] == again  # settings are compared on the same photos whatever the seed
    for photos in train.prepare_photos(recipe, demo, False, None, CPU):
        wnids = list(data.CLASSES)
        assert [wnids.index(name.split("/")[0]) for name in photos.names] == photos.labels.tolist()


def test_a_checkpoint_says_what_its_accuracy_was_measured_on(trained, demo, tmp_path):
    training(demo, tmp_path, "--holdout", 0.25, epochs=1)
    for folder, measured in ((trained, ("val", 20)), (tmp_path / "cnn", ("held-out train", 15))):
        _, facts = models.load(folder / "best.pt")
        result = json.loads((folder / "result.json").read_text())
        assert (facts["accuracy_on"], facts["accuracy_n"]) == measured
        assert (result["accuracy_on"], result["accuracy_n"]) == measured


def test_without_holdout_it_validates_on_val(demo):
    recipe, _ = train.parse_arguments(arguments(demo, "runs"))
    photos, val = train.prepare_photos(recipe, demo, False, None, CPU)
    assert photos.names == data.load(demo, "train").names and val.names == data.load(demo, "val").names


def test_photos_of_val_that_are_in_train_are_counted(call, demo, tmp_path):
    photos = shutil.copytree(demo, tmp_path / "both", ignore=shutil.ignore_patterns("*.pixels", "*.lock"))
    for path in list((photos / "train").rglob("*.JPEG"))[:3]:
        shutil.copy(path, photos / "val" / path.parent.name / f"again_{path.name}")
    result = call(*arguments(photos, "runs", "--dry-run"))
    assert result.returncode == 0 and "3 of 23 val photos are in train too" in result.stderr


# ---------------------------------------------------------------- interrupted, and gone on with


@pytest.mark.parametrize("epoch", [1, EPOCHS - 1])
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(trained, demo, tmp_path, monkeypatch, epoch):
    with monkeypatch.context() as patch:
        stop_after(epoch, patch)
        with pytest.raises(KeyboardInterrupt):
            training(demo, tmp_path)
    assert len(log(tmp_path / "cnn")) == epoch
    training(demo, tmp_path)
    assert same_run(tmp_path / "cnn", trained)


def test_a_stopped_head_goes_on_too(demo, tmp_path, monkeypatch):
    arch, more = SMALL, ["--weights", "none"]
    training(demo, tmp_path, *more, "--name", "whole", arch=arch, epochs=2)
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        with pytest.raises(KeyboardInterrupt):
            training(demo, tmp_path, *more, "--name", "stopped", arch=arch, epochs=2)
    training(demo, tmp_path, *more, "--name", "stopped", arch=arch, epochs=2)
    assert same_run(tmp_path / "whole", tmp_path / "stopped")


def test_stopped_between_two_files_it_goes_on_from_the_epoch_before(trained, demo, tmp_path, monkeypatch):
    write = models.write

    def stop_at_third(path, contents):
        if path.name == "last.pt" and len(contents["rows"]) == 3:
            raise KeyboardInterrupt  # best.pt may be of epoch 3 by now
        write(path, contents)

    with monkeypatch.context() as patch:
        patch.setattr(models, "write", stop_at_third)
        with pytest.raises(KeyboardInterrupt):
            training(demo, tmp_path)
    assert len(models.read(tmp_path / "cnn" / "last.pt")["rows"]) == 2
    training(demo, tmp_path)
    assert same_run(tmp_path / "cnn", trained)


def test_terminated_and_killed_a_process_goes_on_by_the_same_command(trained, demo, tmp_path):
    process = start(demo, tmp_path)
    wait_for_an_epoch(process)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 130, error
    assert "Traceback" not in error and len([line for line in error.splitlines() if "train.py: " in line]) == 1
    done = len(models.read(tmp_path / "cnn" / "last.pt")["rows"])
    assert 1 <= done < EPOCHS

    process = start(demo, tmp_path)
    assert int(wait_for_an_epoch(process).split("/")[0].split()[1]) == done + 1
    process.kill()
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    assert done < len(models.read(tmp_path / "cnn" / "last.pt")["rows"]) < EPOCHS

    training(demo, tmp_path)
    assert same_run(tmp_path / "cnn", trained)


def test_an_epoch_may_take_less_than_a_tick_of_the_clock(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1e9)  # that of Windows ticks 64 times a second
    training(demo, tmp_path, "--weights", "none", arch=SMALL, epochs=1)
    assert len(log(tmp_path / SMALL)) == 1


def test_a_finished_run_does_nothing_and_says_so(trained, demo, tmp_path, call, monkeypatch):
    shutil.copytree(trained, tmp_path / "cnn")
    weights = {name: (tmp_path / "cnn" / name).stat().st_mtime_ns for name in ("best.pt", "last.pt", "log.csv")}
    monkeypatch.setattr(train, "train_epoch", lambda *things: pytest.fail("trained on"))
    result = call(*arguments(demo, tmp_path))
    assert result.returncode == 0 and f"{EPOCHS} of {EPOCHS} epochs are done" in result.stdout
    assert weights == {name: (tmp_path / "cnn" / name).stat().st_mtime_ns for name in weights}


@pytest.mark.parametrize("name", ["result.json", "log.csv", "curves.png"])
@pytest.mark.parametrize("damage", [os.unlink, lambda path: os.truncate(path, 0)])
def test_what_is_missing_of_a_finished_run_is_written(trained, demo, tmp_path, name, damage):
    """last.pt of the last epoch was written, and then the run was killed."""
    shutil.copytree(trained, tmp_path / "cnn")
    damage(tmp_path / "cnn" / name)
    training(demo, tmp_path)
    assert (tmp_path / "cnn" / name).read_bytes() == (trained / name).read_bytes()


def test_a_log_that_misses_the_last_epoch_is_completed(trained, demo, tmp_path):
    """last.pt of the last epoch was written, log.csv is still of the one before."""
    shutil.copytree(trained, tmp_path / "cnn")
    log = tmp_path / "cnn" / "log.csv"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:-1]))
    (tmp_path / "cnn" / "result.json").unlink()
    training(demo, tmp_path)
    assert log.read_bytes() == (trained / "log.csv").read_bytes()


OTHER = [(["--lr", 0.017], "lr"), (["--seed", 5], "seed"), (["--epochs", 13], "epochs"),
         (["--plain-crop"], "plain_crop"), (["--size", 24], "size"), (["--looks", "16,24"], "looks"),
         (["--batch-size", 15], "batch_size"),
         (["--holdout", 0.5], "holdout")]


@pytest.mark.parametrize(("more", "name"), OTHER)
def test_a_run_of_other_settings_is_refused_by_their_names(trained, demo, tmp_path, call, more, name):
    shutil.copytree(trained, tmp_path / "cnn")
    before = contents(tmp_path / "cnn")
    assert refused(call(*arguments(demo, tmp_path, *more)), "other settings", f"{name} ", "--name")
    assert before == contents(tmp_path / "cnn")


@pytest.mark.parametrize("what", ["garbage", "nothing", "a best.pt", "a list"])
def test_a_last_pt_that_is_none_is_refused(trained, demo, tmp_path, call, what):
    shutil.copytree(trained, tmp_path / "cnn")
    last = tmp_path / "cnn" / "last.pt"
    if what == "a best.pt":
        shutil.copy(trained / "best.pt", last)
    elif what == "a list":
        torch.save([1, 2, 3], last)
    else:
        last.write_bytes(b"garbage" * (what == "garbage"))
    assert refused(call(*arguments(demo, tmp_path)), "last.pt")


def test_a_run_knows_its_photos(trained, demo, tmp_path, call):
    """The same names and numbers, other pixels: neither done already, nor to be gone on with."""
    shutil.copytree(trained, tmp_path / "cnn")
    other = shutil.copytree(demo, tmp_path / "other", ignore=shutil.ignore_patterns("*.pixels", "*.lock"))
    path = next((other / "train").rglob("*.JPEG"))
    Image.open(path).rotate(180).save(path)
    assert refused(call(*arguments(other, tmp_path)), "other settings", "photos")


def test_a_run_on_other_classes_says_which(trained, demo, tmp_path, call):
    shutil.copytree(trained, tmp_path / "cnn")
    other = shutil.copytree(demo, tmp_path / "other", ignore=shutil.ignore_patterns("*.pixels", "*.lock"))
    for split in ("train", "val"):
        (other / split / "n01440764").rename(other / split / "pike")  # was: tench
    assert refused(call(*arguments(other, tmp_path)), "classes tench there alone, pike here alone")


@pytest.mark.parametrize("name", ["best.pt", "last.pt"])
def test_a_file_of_other_contents_is_no_checkpoint_of_a_run(trained, demo, tmp_path, call, name):
    shutil.copytree(trained, tmp_path / "cnn")
    models.write(tmp_path / "cnn" / name, ["a", "list"])
    assert refused(call(*arguments(demo, tmp_path)), tmp_path / "cnn" / name, "remove")


@pytest.mark.parametrize("facts", [{"epoch": 99}, {"settings": {"seed": 8}}])
def test_the_best_weights_of_another_training_are_refused(trained, demo, tmp_path, call, facts):
    shutil.copytree(trained, tmp_path / "cnn")
    best = tmp_path / "cnn" / "best.pt"
    models.write(best, models.read(best) | facts)
    assert refused(call(*arguments(demo, tmp_path)), best, "another training", "remove")


@pytest.mark.parametrize("damage", [os.unlink, lambda path: os.truncate(path, 20)])
def test_a_finished_run_that_lost_its_config_is_refused(trained, demo, tmp_path, call, damage):
    shutil.copytree(trained, tmp_path / "cnn")
    damage(tmp_path / "cnn" / "config.json")
    assert refused(call(*arguments(demo, tmp_path)), "config.json", "remove")


def test_a_share_that_leaves_a_class_without_photos_is_refused(call, demo, tmp_path):
    assert refused(call(*arguments(demo, tmp_path, "--holdout", 0.9)), "--holdout 0.9", "classes")


def test_processes_that_torchrun_did_not_start_are_refused(call, demo, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "WORLD", 2)
    monkeypatch.delenv("RANK", raising=False)
    assert refused(call(*arguments(demo, tmp_path)), "WORLD_SIZE", "torchrun")


def test_photos_that_were_copied_are_the_same_photos(trained, demo, tmp_path):
    shutil.copytree(trained, tmp_path / "cnn")
    other = tmp_path / "other"  # with times of its own
    shutil.copytree(demo, other, ignore=shutil.ignore_patterns("*.pixels", "*.lock"), copy_function=shutil.copyfile)
    training(other, tmp_path)
    assert same_run(tmp_path / "cnn", trained)


@pytest.mark.parametrize("name", ["best.pt", "last.pt"])
@pytest.mark.parametrize("damage", [os.unlink, lambda path: os.truncate(path, 1000)])
def test_a_run_that_lost_weights_is_neither_called_done_nor_trained_over(trained, demo, tmp_path, call, name, damage):
    shutil.copytree(trained, tmp_path / "cnn")
    best = tmp_path / "cnn" / "best.pt"
    models.write(best, models.read(best) | {"epoch": 2})  # one of epoch 1 without last.pt is a run that just began
    damage(tmp_path / "cnn" / name)
    before = contents(tmp_path / "cnn")
    assert refused(call(*arguments(demo, tmp_path)), tmp_path / "cnn" / name, "remove")
    assert contents(tmp_path / "cnn") == before


def test_a_run_killed_before_its_first_last_pt_begins_again(trained, demo, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        with pytest.raises(KeyboardInterrupt):
            training(demo, tmp_path)
    (tmp_path / "cnn" / "last.pt").unlink()
    training(demo, tmp_path)
    assert same_run(tmp_path / "cnn", trained)


def test_a_run_that_goes_on_has_no_result_until_it_ends(trained, demo, tmp_path, monkeypatch):
    stop_after(1, monkeypatch)
    (tmp_path / "cnn").mkdir()
    (tmp_path / "cnn" / "result.json").write_text("of an older run")
    with pytest.raises(KeyboardInterrupt):
        training(demo, tmp_path)
    assert not (tmp_path / "cnn" / "result.json").exists()


def test_a_second_run_in_a_folder_is_refused_while_the_first_lasts(demo, tmp_path, call):
    (tmp_path / "cnn").mkdir()
    with data.lock(tmp_path / "cnn" / "run"):
        assert refused(call(*arguments(demo, tmp_path)), tmp_path / "cnn", "another process")
    assert list(contents(tmp_path / "cnn")) == []


def test_a_run_goes_on_where_another_precision_began_it(trained, demo, tmp_path, monkeypatch):
    """On a device that scales gradients, from a checkpoint of one that does not."""
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        with pytest.raises(KeyboardInterrupt):
            training(demo, tmp_path, epochs=2)
    scaling = train.Precision(torch.float16, True, torch.channels_last)
    monkeypatch.setattr(train, "choose_precision", lambda device: scaling)
    scalers, epoch = [], train.train_epoch
    monkeypatch.setattr(train, "train_epoch", lambda *things: scalers.append(things[4]) or epoch(*things))
    monkeypatch.setattr(train.F, "cross_entropy", lambda logits, *a, **k: cross_entropy(logits.float(), *a, **k))
    training(demo, tmp_path, epochs=2)
    assert scalers and all(scaler.is_enabled() for scaler in scalers) and len(log(tmp_path / "cnn")) == 2


# ---------------------------------------------------------------- several looks


@pytest.mark.parametrize(("arch", "size", "looks"), [
    ("cnn", 96, (64, 96, 128)), ("cnn", 128, (88, 128, 168)), ("cnn", 2, (2, 8)),
    ("resnet18", 224, (224, 320)), ("resnet18", 160, (160, 224)), ("mobilenet_v2", 128, (128, 192)),
])
def test_the_looks_follow_from_the_size(arch, size, looks):
    assert train.default_looks(arch, size) == looks
    assert train.parse_arguments([arch, "--size", str(size)])[0].looks == looks
    assert train.parse_arguments([arch, "--size", str(size), "--looks", "40,20,40"])[0].looks == (20, 40)


def test_what_learned_from_plain_crops_looks_once():
    """It knows objects of one scale: at 104, 160, 216 px one of 40 epochs got 74.7 % in place of 88.1 %."""
    plain = ["cnn", "--plain-crop", "--size", "160"]
    assert train.parse_arguments(plain)[0].looks == (160,)
    assert train.parse_arguments([*plain, "--looks", "160,216"])[0].looks == (160, 216)


def test_a_network_that_was_trained_with_one_look_gets_the_accuracy_of_all(demo, tmp_path):
    training(demo, tmp_path, "--looks", "16,24,32", epochs=1)
    result = json.loads((tmp_path / "cnn" / "result.json").read_text())
    assert result["accuracies"].keys() == {"16", "16 24 32"} and result["accuracies"]["16"] == result["best_accuracy"]
    network, facts = models.load(tmp_path / "cnn" / "best.pt")
    assert (facts["looks"], facts["size"]) == ([16, 24, 32], 32)
    batches = list(data.eval_batches(data.load(demo, "val"), 32, 64))
    assert accuracy_of(network, batches, FLOAT32) == facts["accuracy"] == result["accuracies"]["16 24 32"]


def test_a_head_learns_from_the_mean_of_its_looks(demo, tmp_path):
    more = ["--weights", "none", "--looks", "32,64"]
    recipe, _ = train.parse_arguments(arguments(demo, tmp_path, *more, arch="resnet18"))
    photos = data.load(demo, "val")
    network = train.prepare_network(recipe, photos)
    assert not any(p.requires_grad for p in network.features.parameters())
    stored, _ = train.stored_features(network, photos, 64, mirrored=False)
    assert torch.allclose(stored[0], features_of(network, photos, 64, False), rtol=1e-4, atol=1e-4)
    small = features_of(models.with_looks(network, [32]), photos, 32, False)
    assert not torch.allclose(stored[0], small, atol=1e-3)


# ---------------------------------------------------------------- numbers that are not finite, disks that are full


def nan_from(epoch, step, monkeypatch):
    """Images without a number in them from that step of that epoch on."""
    batches, epochs = data.train_batches, []

    def train_batches(*things, **options):
        epochs.append(len(epochs))  # 0 is the whitening
        for i, (images, labels) in enumerate(batches(*things, **options), 1):
            yield (images * float("nan") if (epochs[-1], i) >= (epoch, step) else images), labels

    monkeypatch.setattr(data, "train_batches", train_batches)


def test_a_loss_that_is_not_finite_stops_the_run_by_epoch_and_step(trained, demo, tmp_path, call, monkeypatch):
    with monkeypatch.context() as patch:
        nan_from(3, 2, patch)
        assert refused(call(*arguments(demo, tmp_path)), "epoch 3", "step 2", "--lr")
    last = models.read(tmp_path / "cnn" / "last.pt")
    assert len(last["rows"]) == 2 and all(v.isfinite().all() for v in last["network"].values())
    models.load(tmp_path / "cnn" / "best.pt")
    training(demo, tmp_path)  # the epoch before is all there
    assert same_run(tmp_path / "cnn", trained)


def test_a_learning_rate_that_is_too_large_is_named(demo, tmp_path, call):
    assert refused(call(*arguments(demo, tmp_path, "--lr", "1e30")), "epoch 1", "--lr")
    assert not list(tmp_path.rglob("*.pt"))


def test_weights_that_give_no_number_are_never_saved(demo, tmp_path, call):
    """One step an epoch: its loss is still that of good weights, what it makes of them shows in validation alone."""
    result = call(*arguments(demo, tmp_path, "--lr", "1e30", "--batch-size", 64))
    assert refused(result, "finite", "epoch 1", "validation", "--lr")
    assert not list(tmp_path.rglob("*.pt"))


def test_the_only_step_of_an_epoch_is_called_a_step(demo, tmp_path, call, monkeypatch):
    nan_from(1, 1, monkeypatch)
    assert refused(call(*arguments(demo, tmp_path, "--batch-size", 64)), "epoch 1", "step 1", "--lr")


def test_a_full_disk_ends_in_a_sentence_and_the_epoch_before_is_intact(trained, demo, tmp_path, call, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        with pytest.raises(KeyboardInterrupt):
            training(demo, tmp_path)
    before = (tmp_path / "cnn" / "last.pt").read_bytes()
    with full_disk(100_000):  # bytes: enough for a log and a picture, not for weights
        result = call(*arguments(demo, tmp_path))
    assert refused(result, "too large", ".pt")
    assert (tmp_path / "cnn" / "last.pt").read_bytes() == before
    assert not list(tmp_path.rglob("*.part"))
    training(demo, tmp_path)  # there is room again
    assert same_run(tmp_path / "cnn", trained)


@pytest.mark.parametrize("name", ["best.pt", "last.pt", "log.csv", "curves.png"])
def test_no_file_is_ever_half_there(trained, demo, tmp_path, call, monkeypatch, name):
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        with pytest.raises(KeyboardInterrupt):
            training(demo, tmp_path, "--lr", 1e-9)
    folder = tmp_path / "cnn"
    before = contents(folder)

    def full(path, mode):
        file = open(path, mode)
        if os.path.basename(path).startswith(name):
            file.write(b"half of it")
            file.close()
            raise OSError(28, "No space left on device")
        return file

    monkeypatch.setattr(models, "open", full, raising=False)
    better = torch.tensor([[4.0] * 10, [1.8] * 10, [2.0] * 10])  # than before: best.pt is to be written too
    monkeypatch.setattr(train, "evaluate", lambda *things: better)
    result = call(*arguments(demo, tmp_path, "--lr", 1e-9))
    assert refused(result, "No space left on device", folder / name)
    assert (folder / name).read_bytes() == before[name]
    assert contents(folder).keys() == before.keys()


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1688 bytes."),
    MemoryError(),
])
def test_too_little_memory_names_the_batch_size(demo, tmp_path, call, monkeypatch, error):
    def epoch(*things):
        raise error

    monkeypatch.setattr(train, "train_epoch", epoch)
    assert refused(call(*arguments(demo, tmp_path)), "memory", "--batch-size")


# ---------------------------------------------------------------- bad input


def test_unknown_network_is_refused_by_the_command(call, demo, tmp_path):
    assert refused(call(*arguments(demo, tmp_path, arch="resnet1")), "resnet1", "resnet18")
    assert refused(call(*arguments(demo, tmp_path, arch="nets/resnet18")), "no network 'nets/resnet18'")
    assert not (tmp_path / "resnet1").exists()


@pytest.mark.parametrize(("more", "words"), [
    (["--device", "gpu"], ["gpu", "--device"]),
    (["--device", "meta"], ["meta", "--device"]),
    (["--data", "nowhere"], ["nowhere"]),
    (["--data", "garbage.tgz"], ["garbage.tgz"]),
    (["--plain-crop", "--crop", 2000], ["2000 x 2000", "--crop"]),
    (["--weights", "garbage.pt"], ["weights"]),
    (["--runs", "file/runs"], ["file"]),
    (["--runs", "file"], ["file"]),
    (["--data", "~no-such-user"], ["~no-such-user"]),
    (["--lr", -1], ["lr"]),
    (["--lr", "nan"], ["lr"]),
    (["--holdout", 0.999], ["--holdout"]),
    (["--crop", 1], ["--crop"]),
    (["--size", 1], ["--size"]),
    (["--looks", "1,64"], ["--looks"]),
    (["--seed", 10**20], ["seed"]),
])
def test_bad_input_is_refused(call, demo, tmp_path, more, words):
    (tmp_path / "garbage.tgz").write_bytes(b"no archive" * 50)
    (tmp_path / "garbage.pt").write_bytes(b"no weights" * 50)
    (tmp_path / "file").write_text("here first")
    assert refused(call(*arguments(demo, "runs", *more)), *words)
    assert not any(tmp_path.rglob("*.part")) and not any((tmp_path / "runs").rglob("*.pt"))
    assert (tmp_path / "file").read_text() == "here first"


@pytest.mark.parametrize(("weights", "words"), [
    ("garbage.pt", ["garbage.pt"]), ("missing.pt", ["missing.pt"]), ("other.pt", ["other.pt", "resnet18"]),
])
def test_weights_that_are_none_are_refused(call, demo, tmp_path, weights, words):
    (tmp_path / "garbage.pt").write_bytes(b"no weights" * 50)
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "other.pt")
    assert refused(call(*arguments(demo, "runs", "--weights", weights, arch="resnet18")), *words)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("more", [["--epochs", 0], ["--epochs", "many"], ["--batch-size", -1], ["--size", 0],
                                  ["--holdout", 1], ["--holdout", -0.1], ["--learning-rate", 1], ["--lr", 1e38],
                                  ["--looks", "0,8"], ["--looks", "a"], ["--looks", ""], ["--unfreeze"],
                                  ["--weights", ""], ["--name", ""], ["--data", ""], ["--name", "a-dry-run"],
                                  ["--name", ".."], ["--name", "."], ["--name", "a/b"], ["--name", "cnn-dry-run/"]])
def test_options_fail_loudly_and_early(call, demo, tmp_path, more):
    result = call(*arguments(demo, "runs", *more))
    assert result.returncode == 2 and more[0] in result.stderr and not (tmp_path / "runs").exists()


def test_plain_crops_want_the_scale_of_whole_photos(call):
    assert refused(call("cnn", "--plain-crop"), "--plain-crop", "--size")


@pytest.mark.parametrize(("group", "found"), [(dict(RANK="1"), "0 1"), (dict(WORLD_SIZE="", RANK=""), "0 1"),
                                              (dict(WORLD_SIZE="4", RANK="3"), "3 4")])
def test_a_rank_that_a_job_scheduler_left_is_no_process_of_torchrun(group, found):
    command = [sys.executable, "-c", "import train; print(train.RANK, train.WORLD)"]
    result = subprocess.run(command, env=os.environ | group, cwd=REPO, capture_output=True, text=True)
    assert result.stdout.strip() == found


def test_whitening_takes_no_more_pixels_from_larger_crops(demo, monkeypatch):
    counts, batches = [], data.train_batches
    monkeypatch.setattr(data, "train_batches", lambda photos, size, count, *more, **options:
                        counts.append(count) or batches(photos, 16, count, *more, **options))
    photos = data.load(demo, "train")
    for crop in (64, 128, 256, 4096):
        train.prepare_network(recipe_of("cnn", "--crop", crop, "--width", 8), photos)
    assert counts == [256, 256, 64, 1]


@pytest.mark.parametrize("more", [["--crop", 16], ["--plain-crop"]])
def test_crops_of_a_network_that_is_frozen_are_refused(call, demo, tmp_path, more):
    result = call(*arguments(demo, "runs", *more, "--weights", "none", arch="resnet18"))
    assert result.returncode == 2 and "--unfreeze" in result.stderr and not (tmp_path / "runs").exists()


def test_a_batch_that_batch_normalisation_cannot_take_is_refused_before_anything(call, demo, tmp_path):
    """61 photos in twos leave one; at 16 px the maps of a ResNet have one cell."""
    photos = shutil.copytree(demo, tmp_path / "odd", ignore=shutil.ignore_patterns("*.pixels", "*.lock"))
    path = next((photos / "train").rglob("*.JPEG"))
    Image.open(path).rotate(180).save(path.with_name("one_more.png"))
    result = call(*arguments(photos, "runs", "--weights", "none", "--unfreeze", "--batch-size", 2, arch="resnet18"))
    assert refused(result, "--batch-size", "--crop") and not (tmp_path / "runs").exists()


def test_a_photo_too_small_for_plain_crops_is_refused_before_anything(call, demo, tmp_path):
    photos = shutil.copytree(demo, tmp_path / "photos", ignore=shutil.ignore_patterns("*.pixels", "*.lock"))
    path = next((photos / "train").rglob("*.JPEG"))
    Image.open(path).resize((20, 10)).save(path)
    more = ["--weights", "none", "--unfreeze", "--plain-crop", "--crop", 64]
    assert refused(call(*arguments(photos, "runs", *more, arch=SMALL)), path.name, "20 x 10", "--crop")
    assert not (tmp_path / "runs").exists()


def test_processes_of_torchrun_are_on_devices_that_can_add_up(monkeypatch):
    monkeypatch.setattr(train, "WORLD", 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert train.choose_device("auto") == CPU
    with pytest.raises(train.TrainError, match="--device cuda"):
        train.choose_device("cuda:0")


@pytest.mark.parametrize(("nccl", "backend"), [(True, "nccl"), (False, "gloo")])  # Windows has no NCCL
def test_processes_on_gpus_add_up_with_what_there_is(demo, monkeypatch, nccl, backend):
    class Begun(Exception):
        pass

    def begin(name):
        raise Begun(name)

    monkeypatch.setattr(train, "WORLD", 2)
    monkeypatch.setattr(train, "choose_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(train, "choose_precision", lambda device: FLOAT32)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda name: None)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: nccl)
    monkeypatch.setattr(torch.distributed, "init_process_group", begin)
    with pytest.raises(Begun, match=backend):
        training(demo, "runs")


def test_a_run_goes_on_without_the_weights_that_it_began_with(demo, tmp_path):
    torch.manual_seed(0)
    start = tmp_path / "start.pth"
    torch.save(train.models.torchvision_models.get_model(SMALL).state_dict(), start)
    these = dict(arch=SMALL, epochs=1)
    training(demo, tmp_path, "--weights", start, "--looks", "32", **these)
    state = (tmp_path / SMALL / "last.pt").read_bytes()
    start.unlink()
    training(demo, tmp_path, "--weights", start, "--looks", "32", **these)
    assert (tmp_path / SMALL / "last.pt").read_bytes() == state
    with pytest.raises(models.ModelError, match="start.pth does not exist"):
        training(demo, tmp_path, "--weights", start, "--looks", "32", "--name", "other", **these)


def test_help_shows_every_default(call):
    text = " ".join(call("--help").stdout.split())
    assert call("--help").returncode == 0
    assert "(default: data/imagenette2-160)" in text and "(default: 0)" in text
    for recipe in train.DEFAULTS.values():  # of epochs, crop, size, ... there is one for each recipe
        assert all(str(recipe[name]) in text for name in ("epochs", "crop", "size", "lr") if name in recipe)
    assert "96 for 64 px and 100 epochs" in text  # the cnn's size
    assert "(default: None)" not in text
