"""train.py: the loop learns, a frozen network stays frozen, and a training can stop anywhere."""

import ast
import inspect
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    PHOTOS_ALONE,
    REPO,
    SMALL,
    features_one_by_one,
    frozen_resnet,
    import_alone,
    on_fake_cuda,
    same,
)
from torch import nn

import data
import folders
import frozen
import models
import train
from optim import Average

CPU = torch.device("cpu")
FLOAT32 = train.Precision(None, False, torch.contiguous_format)
SMOOTHING = 0.2
KINDS = {  # everything from scratch, a last layer alone, a network of which all is fine-tuned
    "cnn": dict(arch="cnn", width=16),
    "head": dict(arch=SMALL, weights=None),
    "all": dict(arch=SMALL, weights=None, unfreeze=True),
}


def small_recipe(kind="cnn", epochs=3, **given):
    """A training of the smallest size: 2 steps an epoch, of 60 photos of 16 x 16 px, or 32 x 32."""
    side = 16 if kind == "cnn" else 32
    crop = {} if kind == "head" else dict(crop=side)
    return train.make_recipe(**dict(KINDS[kind], epochs=epochs, size=side, looks=(side,),
                                    batch_size=32, **crop) | given)


@pytest.fixture(scope="module")
def photos(demo):
    return folders.load(demo, "train")


@pytest.fixture(scope="module")
def val(demo):
    return folders.load(demo, "val")


def accuracy_of(network, batches, precision):
    return train.val_scores(train.evaluate(network, batches, precision, 10))["val_accuracy"]


# ---------------------------------------------------------------- schedules


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
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_crops_grow_to_their_side_and_photos_in_validation_with_them():
    def sides(epochs, **given):
        recipe = train.make_recipe("cnn", epochs=epochs, **given)
        return [train.sides(recipe, epoch) for epoch in range(epochs)]

    found = sides(100)
    assert found == sorted(found) and set(found) == {(48, 72), (56, 80), (64, 96), (96, 96)}
    assert found[0] == (48, 72) and found[74:] == [(64, 96)] * 16 + [(96, 96)] * 10
    assert sides(1) == [(64, 64)]
    assert [crop for crop, _ in sides(5, crop=128, size=128)] == [104, 112, 120, 128, 128]
    assert sides(100, crop=20, size=20)[0] == (16, 16)
    assert sides(100, crop=5, size=16)[0] == (5, 16)


@pytest.mark.parametrize(("epochs", "crop", "size"), [
    (100, 64, 96), (20, 64, 88), (5, 104, 128), (20, 96, 128), (1, 64, 64)])
def test_the_cnn_is_evaluated_on_photos_with_objects_as_large_as_in_crops(epochs, crop, size):
    assert train.make_recipe("cnn", crop=crop, epochs=epochs).size == size
    assert train.make_recipe("cnn", crop=crop, epochs=epochs, size=100).size == 100
    assert train.matching_size(1, epochs) == 8  # a cell of the map
    photos = data.from_arrays([torch.zeros(400, 400, 3, dtype=torch.uint8)])
    index, generator = torch.zeros(20_000, dtype=torch.long), torch.Generator().manual_seed(0)
    boxes = data.random_boxes(photos, index, generator, train.least_area(epochs))
    # The side of a photo that is as much enlarged:
    enlarged = (crop / (boxes[:, 2] * boxes[:, 3]).sqrt()).mean() * 400
    assert float(enlarged) == pytest.approx(size, abs=max(4.5, 0.02 * size))


def test_pieces_at_the_photos_own_scale_and_whole_photos_do_not_grow():
    assert train.sides(train.make_recipe("cnn", plain_crop=True, size=160), 0) == (64, 160)
    assert train.sides(train.make_recipe("resnet18"), 0) == (0, 224)
    odd = train.make_recipe("cnn", crop=33, size=100)  # no multiples of a cell
    assert train.sides(odd, 89) == (33, 100) and train.sides(odd, 90) == (100, 100)


def test_the_longer_a_training_the_less_of_a_photo_a_crop_shows(photos, monkeypatch):
    areas, boxes = [], torch.tensor([[0.0, 0, 9, 9]])
    monkeypatch.setattr(data, "random_boxes", lambda photos, index, generator, area:
                        areas.append(area) or boxes.expand(len(index), -1))
    for epochs, least in ((1, 1.0), (4, 0.5)):
        list(train.epoch_batches(small_recipe(epochs=epochs), photos, 0, torch.float32))
        assert areas[-1] == least == train.least_area(epochs)
    assert train.least_area(100) == pytest.approx(0.1)
    for epoch, least in ((8, 20**-0.5), (17, 20**-0.5), (18, 0.5), (19, 0.5)):  # the last tenth
        list(train.epoch_batches(small_recipe(epochs=20), photos, epoch, torch.float32))
        assert areas[-1] == least


@pytest.mark.parametrize(("arch", "size", "looks"), [
    ("cnn", 96, (64, 96, 128)), ("cnn", 128, (88, 128, 168)), ("cnn", 2, (2, 8)),
    ("resnet18", 224, (320,)), ("resnet18", 160, (224,)), ("mobilenet_v2", 128, (192,)),
])
def test_the_looks_follow_from_the_size(arch, size, looks):
    assert train.make_recipe(arch, size=size).looks == looks
    if arch != "cnn":
        assert train.make_recipe(arch, unfreeze=True, size=size).looks == (size, *looks)


def test_what_learned_from_plain_crops_looks_once():
    """It knows objects of one scale: at 104, 160, 216 px one of 40 epochs got 74.7 % in place of
    88.1 %."""
    assert train.make_recipe("cnn", plain_crop=True, size=160).looks == (160,)


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize(("bf16", "amx", "dtype"), [
    (False, False, None), (True, False, torch.bfloat16), (False, True, torch.bfloat16)])
def test_cpu_computes_in_bfloat16_only_where_it_has_it(monkeypatch, bf16, amx, dtype):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    float32 = (None, False, torch.channels_last, torch.float32)
    own = (dtype, False, torch.channels_last, dtype or torch.float32)
    assert train.choose_precision(CPU) == train.choose_precision(CPU, "all") == own
    assert train.choose_precision(CPU, "head") == float32  # the precision of maps


@pytest.mark.parametrize(("capability", "expected"), [  # float16 would lose the products' small
    ((9, 0), (torch.bfloat16, False, torch.channels_last, torch.bfloat16)),  # numbers
    ((8, 0), (torch.bfloat16, False, torch.channels_last, torch.bfloat16)),
    ((7, 5), (torch.float16, True, torch.channels_last, torch.float32)),
    ((7, 0), (torch.float16, True, torch.channels_last, torch.float32)),
])
def test_cuda_scales_gradients_where_it_must_use_float16(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)
    assert train.choose_precision(torch.device("cuda")) == expected
    assert train.choose_precision(torch.device("cuda"), "head")[:2] == (None, False)


def test_mps_computes_in_float32_on_contiguous_images():
    expected = (None, False, torch.contiguous_format, torch.float32)
    assert train.choose_precision(torch.device("mps")) == expected


# ---------------------------------------------------------------- optimiser, average, loop


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_trained_once_and_filter_banks_alone_decay(kind, photos):
    recipe = small_recipe(kind, weight_decay=0.05)
    network = train.start(recipe, photos, FLOAT32)
    module = network.head if kind == "head" else network
    groups = train.make_optimizer(recipe, module).param_groups
    trained = [p for group in groups for p in group["params"]]
    wanted = [p for p in network.parameters() if p.requires_grad]
    assert sorted(map(id, trained)) == sorted(map(id, wanted))
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    # Filters of a photo's channels, or of a single one (depthwise), are no banks.
    banks = {id(m.weight) for m in module.modules()
             if isinstance(m, nn.Conv2d) and m.weight.shape[1] > 3}
    assert all((decay[id(p)] > 0) == (id(p) in banks) for p in trained)
    assert bool(banks) == (kind != "head")


def test_any_optimiser_of_torch_will_do(photos, val, monkeypatch):
    monkeypatch.setattr(train, "make_optimizer", lambda recipe, module, products=None:
                        torch.optim.SGD(module.parameters(), recipe.lr, momentum=0.9))
    recipe = small_recipe(epochs=8, lr=0.1)
    network = train.start(recipe, photos, FLOAT32)
    rows = [epoch.row for epoch in train.train(recipe, network, photos, val, FLOAT32)]
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]


def test_classes_of_few_photos_count_as_much_in_the_mean_of_classes():
    loss, right = torch.tensor([8.0, 4.0, 0.0]), torch.tensor([9.0, 0.0, 0.0])
    photos = torch.tensor([9.0, 3.0, 0.0])
    assert train.val_scores(torch.stack([loss, right, photos])) == {
        "val_loss": 1.0, "val_accuracy": 0.75, "val_class_accuracy": 0.5}


def test_the_step_and_the_loop_fit_on_a_screen_and_have_backward_in_them():
    sources = [inspect.getsource(function) for function in (train.make_step, train.train_epoch)]
    for source in sources:
        body = ast.parse(source).body[0].body[1:]  # without the docstring
        lines = [line for line in source.splitlines()[body[0].lineno - 1 :] if line.strip()]
        assert len(lines) + 1 <= 25  # and the line of the def
    assert sources[0].count(".backward()") == 1


def test_one_batch_can_be_learnt_by_heart(photos, monkeypatch):
    few = photos.subset(torch.arange(0, 60, 4))
    (batch,) = data.eval_batches(few, 24, len(few))
    monkeypatch.setattr(train, "epoch_batches", lambda *things: [batch] * 8)
    monkeypatch.setattr(train, "val_batches", lambda *things: [batch])
    recipe = small_recipe(epochs=4, batch_size=len(few))
    repeated = few.subset(torch.arange(len(few)).repeat(8))  # for 8 steps an epoch
    torch.manual_seed(0)
    network, precision = models.cnn(width=32), train.choose_precision(CPU)
    rows = [epoch.row for epoch in train.train(recipe, network, repeated, few, precision)]
    assert len(rows) == 4 and rows[-1]["train_accuracy"] == 1 and rows[-1]["val_accuracy"] == 1
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] / 2


def epoch_of(head, batches, rates, optimizer):
    """An epoch of a linear layer."""
    average = Average(head)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    step = train.make_step(head, optimizer, scaler, average, FLOAT32, SMOOTHING)
    return train.train_epoch(step, batches, rates, average)


def test_the_loop_uses_the_rates_it_is_given():
    head, x, labels = nn.Linear(4, 10), torch.randn(8, 4), torch.arange(8)
    before = head.weight.detach().clone()
    optimizer, batches = torch.optim.SGD(head.parameters(), 1.0), [(x, labels)] * 3
    losses, right, count = epoch_of(head, batches, [0.0] * 3, optimizer)
    assert torch.equal(head.weight, before) and losses.shape == (3,) and count.tolist() == [8] * 3
    assert int(right) == 3 * int((head(x).argmax(1) == labels).sum())
    expected = F.cross_entropy(head(x), labels, label_smoothing=SMOOTHING)
    assert torch.allclose(losses, expected.detach())
    (gradient,) = torch.autograd.grad(expected, head.weight)
    epoch_of(head, batches[:1], [0.25], optimizer)
    assert torch.allclose(head.weight, before - 0.25 * gradient, atol=1e-6)


def test_evaluation_is_a_mean_over_photos_not_over_batches():
    head = nn.Sequential(nn.Dropout(0.9), nn.Linear(4, 10))
    x, labels = torch.randn(11, 4), torch.arange(11) % 10
    batches = [(x[:8], labels[:8]), (x[8:], labels[8:])]
    sums = train.evaluate(head, batches, FLOAT32, 10)
    loss, right, count = sums.sum(1).tolist()
    logits = head[1](x).detach()
    correct = (logits.argmax(1) == labels).float()
    assert sums[2].tolist() == [2] + [1] * 9  # photos of each class
    assert sums[1].tolist() == torch.zeros(10).index_add_(0, labels, correct).tolist()
    assert loss / count == pytest.approx(float(F.cross_entropy(logits, labels)), abs=1e-6)
    assert (right, count) == (int(correct.sum()), 11)


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@torch.no_grad()
def test_validation_asks_the_device_for_nothing(fake_device):
    """A number that is asked for raises; for steps see test_recorded.py."""
    black = torch.zeros(20, 24, 3, dtype=torch.uint8)
    photos = on_fake_cuda(data.from_arrays([black] * 8, torch.arange(8)))
    precision = train.Precision(torch.bfloat16, False, torch.channels_last, torch.bfloat16)
    fake_device.watches = False
    network = models.cnn(width=16).to("cuda")
    fake_device.watches = True
    totals = train.evaluate(network, data.eval_batches(photos, 16, 4), precision, 10)
    assert totals.device.type == "cuda" and totals.shape == (3, 10)


# ---------------------------------------------------------------- a head, on stored features


def test_training_on_stored_features_equals_training_through_the_network(photos, tmp_path):
    network, reference = frozen_resnet(), frozen_resnet()
    nn.init.normal_(network.head.weight, std=0.01)
    reference.load_state_dict(network.state_dict())
    recipe = train.make_recipe("resnet18", weights=None, looks=(32,), batch_size=32)
    stored = frozen.store(network, photos, 32, tmp_path / "train.features")
    batches = [batch for epoch in range(2)
               for batch in train.epoch_batches(recipe, stored, epoch, torch.float32)]
    rates = [0.05 / (1 + i) for i in range(len(batches))]
    optimizer = torch.optim.SGD(network.head.parameters(), momentum=0.9)
    losses, *_ = epoch_of(network.head, batches, rates, optimizer)

    # The same photos, found again by their features, go through the whole network.
    own, used = features_one_by_one(reference, photos, 32), []
    ((images, labels),) = data.eval_batches(photos, 32, len(photos))
    optimizer = torch.optim.SGD(reference.head.parameters(), momentum=0.9)
    for (x, batch_labels), rate, loss in zip(batches, rates, losses, strict=True):
        distance, which = torch.cdist(x, own, compute_mode="donot_use_mm_for_euclid_dist").min(1)
        assert distance.max() < 1e-3 and torch.equal(labels[which], batch_labels)
        used.append(which)
        optimizer.param_groups[0]["lr"] = rate
        logits = reference.eval()(images[which])
        expected = F.cross_entropy(logits, batch_labels, label_smoothing=SMOOTHING)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        assert float(loss) == pytest.approx(float(expected.detach()), abs=1e-4)
    assert torch.allclose(network.head.weight, reference.head.weight, atol=1e-4)
    assert torch.allclose(network.head.bias, reference.head.bias, atol=1e-4)
    used = torch.cat(used)
    assert used.bincount().tolist() == [2] * len(photos)  # each once an epoch


# ---------------------------------------------------------------- a training


def inputs_of(kind, network, photos, val, folder):
    """What `train` gets: photos, or the features of a frozen network."""
    if kind != "head":
        return photos, val
    return (frozen.store(network, photos, 32, folder / "train.features"),
            frozen.store(network, val, 32, folder / "val.features"))


@pytest.mark.parametrize(("kind", "epochs", "dtype"), [
    ("cnn", 3, None), ("cnn", 3, torch.bfloat16), ("head", 3, None), ("all", 2, None)])
def test_stopped_after_an_epoch_it_goes_on_bit_for_bit(kind, epochs, dtype, photos, val, tmp_path):
    recipe, precision = small_recipe(kind, epochs), FLOAT32._replace(dtype=dtype)
    network = train.start(recipe, photos, precision)
    inputs = inputs_of(kind, network, photos, val, tmp_path)
    whole = list(train.train(recipe, network, *inputs, precision))
    assert [epoch.row["epoch"] for epoch in whole] == [epoch.state["epoch"] for epoch in whole]

    first = next(train.train(recipe, train.start(recipe, photos, precision), *inputs, precision))
    other = train.start(recipe, photos, precision)
    for p in other.parameters():  # all that it goes on from is in the state
        p.data.fill_(1) if p.requires_grad or kind != "head" else None
    again = list(train.train(recipe, other, *inputs, precision, first.state))
    times = dict(images_per_second=0, seconds=0)
    rows = [first.row | times, *(epoch.row | times for epoch in again)]
    assert rows == [epoch.row | times for epoch in whole]
    assert same(again[-1].state, whole[-1].state)
    assert same(again[-1].network.state_dict(), whole[-1].network.state_dict())


def test_what_is_validated_and_kept_is_the_average(photos, val):
    recipe = small_recipe()
    network = train.start(recipe, photos, FLOAT32)
    *_, last = train.train(recipe, network, photos, val, FLOAT32)
    assert same(last.network.state_dict(), last.state["average"])
    assert not same(last.network.state_dict(), network.state_dict())
    batches = list(data.eval_batches(val, recipe.size, 7))
    assert accuracy_of(last.network, batches, FLOAT32) == last.row["val_accuracy"]


def test_a_frozen_network_keeps_every_parameter_and_buffer(photos, val, tmp_path):
    for kind in ("head", "all"):
        recipe = small_recipe(kind, epochs=1, seed=3)
        network = train.start(recipe, photos, FLOAT32)
        before = {k: v.clone() for k, v in network.state_dict().items()}
        inputs = inputs_of(kind, network, photos, val, tmp_path)
        *_, last = train.train(recipe, network, *inputs, FLOAT32)
        after = last.state["network"]
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        # Of a network that is not frozen even the number of batches and all statistics change; the
        # first filters of random weights are whitened, and stay.
        whitened = next(key for key, tensor in before.items() if tensor.dim() == 4)
        wanted = ({key for key in before if key.startswith("head.")} if kind == "head" else
                  {*before} - {whitened})
        assert before.keys() == after.keys() and changed == wanted


def test_seed_and_epoch_decide_the_order_of_the_photos(photos):
    orders = []
    for seed in (0, 1):
        for epoch in (0, 1):
            batches = train.epoch_batches(small_recipe(seed=seed), photos, epoch, torch.float32)
            orders.append(torch.cat([labels for _, labels in batches]).tolist())
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_whitening_takes_no_more_pixels_from_larger_crops(photos, monkeypatch):
    counts, batches = [], data.train_batches
    monkeypatch.setattr(data, "train_batches", lambda photos, size, count, *more, **options:
                        counts.append(count) or batches(photos, 16, count, *more, **options))
    for crop in (64, 128, 256, 4096):
        train.start(train.make_recipe("cnn", crop=crop, width=8), photos, FLOAT32)
    assert counts == [256, 256, 64, 1]


def test_what_is_not_finite_is_named():
    train.check_finite([1.0, 2.0, 3.0], 0)
    for losses, where in (([1.0, float("nan"), float("nan"), 1.0], "epoch 5, step 2"),
                          ([float("inf"), 1.0], "epoch 5, step 1"),
                          ([1.0, 2.0, float("nan")], "epoch 5, validation")):
        with pytest.raises(ValueError, match=f"not finite in {where}: .*--lr; .* of epoch 4"):
            train.check_finite(losses, 4)
    with pytest.raises(ValueError, match="nothing is saved"):
        train.check_finite([float("nan"), 1.0], 0)


# ---------------------------------------------------------------- by itself

watched = []  # what Python opens or changes on the disk, while there is a list in it


def watch(event, details):
    if watched and event in ("open", "os.mkdir", "os.remove", "os.rename", "os.scandir"):
        watched[-1].append((event, details))


def test_a_training_touches_no_disk_and_prints_nothing(photos, val, capfd):
    sys.addaudithook(watch)
    recipe = small_recipe(epochs=2)

    def trained():
        return list(train.train(recipe, train.start(recipe, photos, FLOAT32), photos, val, FLOAT32))

    trained()  # torch imports more of itself
    watched.append([])
    try:
        assert len(trained()) == 2
    finally:
        events = watched.pop()
    assert not events and capfd.readouterr() == ("", "")


CORE = ["train.py", "optim.py", "recorded.py", "data.py", "models.py"]
ALONE = import_alone("train") + """
import contextlib, io
found = [train.__file__, sorted(project)]
from train import *
import data
text = io.StringIO()
with contextlib.redirect_stdout(text):
    exec(sys.argv[1])
print(json.dumps([*found, sorted(os.listdir()), text.getvalue().splitlines()]))
"""


def test_five_files_alone_train_a_network_as_the_docstring_says(demo, tmp_path):
    folder = tmp_path / "imagenette2-160"
    shutil.copytree(demo, folder, ignore=PHOTOS_ALONE)
    (tmp_path / "alone").mkdir()
    for name in CORE:
        shutil.copy(REPO / name, tmp_path / "alone")
    lines = inspect.cleandoc(train.__doc__).splitlines()
    start = next(i for i, line in enumerate(lines) if line.lstrip().startswith("photos, val ="))
    code = inspect.cleandoc("\n".join(["", *lines[start:]]))
    code = code.replace('"imagenette2-160"', repr(str(folder)))
    code = code.replace("epochs=5", "epochs=2, width=8")
    options = dict(cwd=tmp_path / "alone", text=True, capture_output=True,
                   env=os.environ | {"OMP_NUM_THREADS": "1"})
    alone = subprocess.run([sys.executable, "-I", "-B", "-c", ALONE, code], **options)
    assert alone.returncode == 0, alone.stderr
    file, project, there, printed = json.loads(alone.stdout)
    assert file == str(tmp_path / "alone" / "train.py")
    assert project == ["data", "models", "optim", "recorded"] and there == sorted(CORE)
    rows = [ast.literal_eval(line) for line in printed]
    assert [row["epoch"] for row in rows] == [1, 2] and rows[1]["train_loss"] > 0
    command = subprocess.run([sys.executable, "-B", "train.py", "cnn"], **options)
    assert command.returncode == 2 and "Traceback" not in command.stderr
    assert command.stderr.startswith("train.py: No module named 'launch'")


@pytest.mark.parametrize(("goes_on", "weights"), [(False, None), (True, None), (True, "imagenet")])
def test_the_first_layer_of_random_weights_is_whitened(photos, goes_on, weights):
    """Of torchvision's networks too; a training of pretrained weights that goes on begins with
    random ones, and trains all of them."""
    recipe = train.make_recipe("resnet18", unfreeze=True, weights=weights, crop=32, size=32)
    network = train.start(recipe, photos, FLOAT32, goes_on)
    filters = network.features.conv1.weight
    assert filters.requires_grad == (weights is not None)
    assert torch.equal(filters[:32], -filters[32:]) == (weights is None)
