"""launch.py: the command `python train.py`: its options, what is refused, and several processes."""

import inspect
import json
import shutil

import pytest
import torch
from conftest import PHOTOS_ALONE, SMALL, arguments, log, refused, training
from PIL import Image

import data
import folders
import launch
import machine
import models
import train

CPU = torch.device("cpu")
FLOAT32 = train.Precision(None, False, torch.contiguous_format)
KINDS = {  # everything from scratch, a last layer alone, a network of which all is fine-tuned
    "scratch": ["cnn"],
    "head": [SMALL],
    "all": [SMALL, "--unfreeze"],
}


def recipe_of(*more):
    return launch.parse_arguments([*map(str, more)])[0]


def prepare_photos(demo, *more):
    return launch.prepare_photos(recipe_of(*arguments(demo, "runs", *more)), demo, False, CPU)


# ---------------------------------------------------------------- options


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_given_is_of_the_recipe(kind):
    recipe = recipe_of(*KINDS[kind])
    assert train.DEFAULTS[kind].items() <= vars(recipe).items()
    assert recipe == train.make_recipe(KINDS[kind][0], "--unfreeze" in KINDS[kind])
    assert recipe.weights == (None if kind == "scratch" else "imagenet")
    for key in ("epochs", "size", "batch_size", "lr", "weight_decay"):
        flag = "--" + key.replace("_", "-")
        assert getattr(recipe_of(*KINDS[kind], flag, "7"), key) == 7


def test_weights_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert recipe_of("resnet18", "--weights=~/w.pth").weights == str(tmp_path / "w.pth")


def test_looks_are_sorted_and_weights_may_be_none():
    assert recipe_of("resnet18", "--size", 160, "--looks", "40,20").looks == (20, 40)
    assert recipe_of("cnn", "--plain-crop", "--size", 160, "--looks", "160,216").looks == (160, 216)
    assert recipe_of("resnet18", "--weights", "none").weights is None


def test_help_shows_every_default(call):
    result = call("train.py", "--help")
    text = " ".join(result.stdout.split())
    assert result.returncode == 0
    assert "(default: data/imagenette2-160)" in text and "(default: 0)" in text
    for recipe in train.DEFAULTS.values():  # of epochs, crop, size, ... each has its own
        assert all(str(recipe[name]) in text for name in (
            "epochs", "crop", "size", "lr", "weight_decay") if name in recipe)
    assert "96 for 64 px and 100 epochs" in text  # the cnn's size
    assert "(default: None)" not in text


@pytest.mark.parametrize("more", [
    ["--epochs", 0], ["--epochs", "many"], ["--batch-size", -1], ["--size", 0], ["--holdout", 1],
    ["--holdout", -0.1], ["--learning-rate", 1], ["--lr", 1e38], ["--looks", "0,8"],
    ["--looks", "a"], ["--looks", ""], ["--looks", "8,8"], ["--unfreeze"], ["--weights", ""],
    ["--name", ""], ["--data", ""], ["--runs", ""], ["--name", "a-dry-run"], ["--name", ".."],
    ["--name", "."], ["--name", "a/b"], ["--name", "cnn-dry-run/"], ["--weight-decay", -1]])
def test_options_fail_loudly_and_early(call, demo, tmp_path, more):
    result = call("train.py", *arguments(demo, "runs", *more))
    assert result.returncode == 2 and more[0] in result.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("more", [["--crop", 16], ["--plain-crop"]])
def test_crops_of_a_network_that_is_frozen_are_refused(call, demo, tmp_path, more):
    these = arguments(demo, "runs", *more, "--weights", "none", arch="resnet18")
    result = call("train.py", *these)
    assert result.returncode == 2 and "--unfreeze" in result.stderr
    assert not (tmp_path / "runs").exists()


def test_plain_crops_want_the_scale_of_whole_photos(call):
    assert refused(call("train.py", "cnn", "--plain-crop"), "--plain-crop", "--size")


def test_the_width_of_another_network_is_refused(call):
    assert refused(call("train.py", "resnet18", "--width", 64), "--width", "resnet18")


# ---------------------------------------------------------------- photos


def test_holdout_is_taken_from_train_and_val_stays_unseen(demo, monkeypatch):
    load = folders.load

    def load_train_alone(folder, split, *rest):
        assert split == "train"
        return load(folder, split, *rest)

    monkeypatch.setattr(folders, "load", load_train_alone)
    halves = []
    for seed in (0, 1):
        photos, held = prepare_photos(demo, "--holdout", 0.25, "--seed", seed)
        halves.append([sorted(photos.names), sorted(held.names)])
        for split in (photos, held):
            places = [list(data.CLASSES).index(name.split("/")[0]) for name in split.names]
            assert places == split.labels.tolist()
    rest, held = halves[0]
    assert len(held) == 15 and not set(rest) & set(held)
    assert sorted(rest + held) == sorted(load(demo, "train").names)
    assert halves[0] == halves[1]  # settings are compared on the same photos whatever the seed


def test_without_holdout_it_validates_on_val(demo):
    photos, val = prepare_photos(demo)
    assert photos.names == folders.load(demo, "train").names
    assert val.names == folders.load(demo, "val").names


def test_a_share_that_leaves_a_class_without_photos_is_refused(call, demo, tmp_path):
    result = call("train.py", *arguments(demo, tmp_path, "--holdout", 0.9))
    assert refused(result, "--holdout 0.9", "classes")


def test_photos_of_val_that_are_in_train_are_counted(call, demo, tmp_path):
    photos = shutil.copytree(demo, tmp_path / "both", ignore=PHOTOS_ALONE)
    for path in list((photos / "train").rglob("*.JPEG"))[:3]:
        shutil.copy(path, photos / "val" / path.parent.name / f"again_{path.name}")
    result = call("train.py", *arguments(photos, "runs", "--dry-run"))
    assert result.returncode == 0 and "3 of 23 val photos are in train too" in result.stderr
    for path in list((photos / "train").rglob("*.JPEG")):  # each twice
        shutil.copy(path, path.with_name(f"again_{path.name}"))
    result = call("train.py", *arguments(photos, "runs", "--dry-run", "--holdout", 0.2))
    assert result.returncode == 0 and "of 24 held-out photos are in train too" in result.stderr


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize("kind", KINDS)
def test_dry_run_writes_everything_under_a_name_of_its_own(call, demo, tmp_path, kind):
    arch, *more = KINDS[kind]
    more += ["--weights", "none"] if kind != "scratch" else []
    again = arguments(demo, "runs", *more, "--batch-size", 16, "--dry-run", arch=arch)
    result = call("train.py", *again)
    assert result.returncode == 0, result.stderr
    assert [p.name for p in (tmp_path / "runs").iterdir()] == [f"{arch}-dry-run"]
    folder = tmp_path / "runs" / f"{arch}-dry-run"
    assert {p.name for p in folder.iterdir()} == {
        "best.pt", "last.pt", "log.csv", "curves.png", "config.json", "result.json", "run.lock"}
    assert len(log(folder)) == 1
    config = json.loads((folder / "config.json").read_text())
    assert config["recipe"]["photos"] == [32, 20]  # two batches
    models.load(folder / "best.pt")
    if kind == "head":
        assert call("train.py", *again).returncode == 0  # and a second time


@pytest.mark.parametrize(("arch", "precision"), [(SMALL, "float32"), ("cnn", "bfloat16")])
def test_a_head_is_trained_in_the_precision_of_maps(demo, tmp_path, monkeypatch, arch, precision):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    more = ["--weights", "none", "--looks", 32] if arch == SMALL else []
    training(demo, tmp_path, *more, arch=arch, epochs=1)
    result = json.loads((tmp_path / arch / "result.json").read_text())
    assert result["precision"] == precision


def test_a_second_training_of_a_head_computes_no_features(demo, tmp_path, call, monkeypatch):
    photos = shutil.copytree(demo, tmp_path / "photos", ignore=PHOTOS_ALONE)
    these = "--weights", "none", "--looks", 32
    command = arguments(photos, tmp_path, *these, arch=SMALL, epochs=1)
    assert "features of train: 60 of 60" in call("train.py", *command).stderr
    result = call("train.py", *command, "--lr", 0.1, "--name", "other")
    assert result.returncode == 0 and "features" not in result.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("capability", [(8, 0), (7, 5)])
def test_an_epoch_on_cuda(demo, tmp_path, monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)
    seen, make = [], train.make_step
    names = inspect.signature(make)
    monkeypatch.setattr(train, "make_step", lambda *things: seen.append(
        names.bind(*things).arguments) or make(*things))
    steps, recorded = [], train.Recorded
    monkeypatch.setattr(train, "Recorded", lambda *these: steps.append(
        recorded(*these)) or steps[0])
    training(demo, tmp_path, "--device", "cuda", "--batch-size", 8, epochs=2)
    assert steps[0].held == (8, 3, 16, 16) and not steps[0].failed
    network, scaler, precision = (seen[0][name] for name in ("network", "scaler", "precision"))
    assert all(p.is_cuda and p.dtype == torch.float32 for p in network.parameters())
    filters = [p for p in network.parameters() if p.ndim == 4 and min(p.shape[:2]) > 1]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in filters)
    assert scaler.is_enabled() == (capability < (8, 0)) == (precision.dtype == torch.float16)
    assert len(log(tmp_path / "cnn")) == 2
    network, _ = models.load(tmp_path / "cnn" / "best.pt")  # on the CPU
    assert all(p.isfinite().all() for p in network.parameters())


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("arch", ["resnet1", "nets/resnet18"])
def test_an_unknown_network_is_refused(call, demo, tmp_path, arch):
    result = call("train.py", *arguments(demo, "runs", arch=arch))
    assert refused(result, f"no network '{arch}'", "resnet18")
    assert not (tmp_path / "runs").exists()


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
    assert refused(call("train.py", *arguments(demo, "runs", *more)), *words)
    assert not any(tmp_path.rglob("*.part")) and not (tmp_path / "runs").exists()
    assert (tmp_path / "file").read_text() == "here first"


@pytest.mark.parametrize(("weights", "words"), [
    ("garbage.pt", ["garbage.pt"]), ("missing.pt", ["missing.pt"]),
    ("other.pt", ["other.pt", "resnet18"]),
])
def test_weights_that_are_none_are_refused(call, demo, tmp_path, weights, words):
    (tmp_path / "garbage.pt").write_bytes(b"no weights" * 50)
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "other.pt")
    these = arguments(demo, "runs", "--weights", weights, arch="resnet18")
    assert refused(call("train.py", *these), *words)
    assert not (tmp_path / "runs").exists()


def test_a_batch_that_batch_normalisation_cannot_take_is_refused_before_anything(call, demo,
                                                                                 tmp_path):
    """61 photos in twos leave one; at 16 px the maps of a ResNet have one cell."""
    photos = shutil.copytree(demo, tmp_path / "odd", ignore=PHOTOS_ALONE)
    path = next((photos / "train").rglob("*.JPEG"))
    Image.open(path).rotate(180).save(path.with_name("one_more.png"))
    more = "--weights", "none", "--unfreeze", "--batch-size", 2
    result = call("train.py", *arguments(photos, "runs", *more, arch="resnet18"))
    assert refused(result, "--batch-size", "--crop") and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("file", ["runs", "runs/cnn"])
def test_a_file_where_a_folder_goes_is_named(call, demo, tmp_path, file):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    result = call("train.py", *arguments(demo, tmp_path / "runs"))
    refused(result, "runs/cnn cannot be written to", "--runs and --name")
    assert (tmp_path / file).read_bytes() == b""


def test_a_photo_too_small_for_plain_crops_is_refused_before_anything(call, demo, tmp_path):
    photos = shutil.copytree(demo, tmp_path / "photos", ignore=PHOTOS_ALONE)
    path = next((photos / "train").rglob("*.JPEG"))
    Image.open(path).resize((20, 10)).save(path)
    more = ["--weights", "none", "--unfreeze", "--plain-crop", "--crop", 64]
    result = call("train.py", *arguments(photos, "runs", *more, arch=SMALL))
    assert refused(result, path.name, "20 x 10", "--crop")
    assert not (tmp_path / "runs").exists()


def test_sizes_are_checked_on_the_network_as_it_is_and_change_nothing():
    """On its own device, and without its looks: one pass of each size, not of all looks each."""
    sizes = []

    class Features(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm2d(3)

        def forward(self, x):
            sizes.append(x.shape[2])
            assert x.device == self.norm.weight.device
            return self.norm(x)

    network = models.with_looks(models.CAMNet(Features(), torch.nn.Linear(3, 10)), [40, 64])
    before = {key: value.clone() for key, value in network.state_dict().items()}
    recipe = train.make_recipe("resnet18", unfreeze=True, crop=16, size=40, looks=(40, 64))
    launch.check_sizes(network, recipe, 60)
    assert sorted(sizes) == [16, 40, 64]
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    sizes.clear()
    launch.check_sizes(network.to("meta"), recipe, 60)
    assert sorted(sizes) == [16, 40, 64]


def test_crops_of_the_last_epochs_are_tried_too():
    recipe = train.make_recipe("cnn", crop=64, size=8, looks=(8,), epochs=10)
    network = models.cnn(width=8)
    launch.check_sizes(network, recipe, 2)
    with pytest.raises(ValueError, match="cannot take 1 x 3 x 8 x 8 px.*use a larger --crop or"):
        launch.check_sizes(network, recipe, 1)  # one value a channel: no batch normalisation


def test_a_dry_run_is_of_the_largest_crops_and_of_the_sizes_of_the_whole():
    whole, dry = recipe_of("cnn"), recipe_of("cnn", "--dry-run")
    assert (dry.epochs, dry.size, dry.looks) == (1, 96, (64, 96, 128))
    assert train.sides(dry, 0) == train.sides(whole, 99) == (96, 96)
    assert train.sides(recipe_of("cnn", "--dry-run", "--epochs", 5), 0) == (64, 80)


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to "
                 "allocate 1688 bytes."),
    MemoryError(),
])
def test_too_little_memory_names_the_batch_size(demo, tmp_path, call, monkeypatch, error):
    def epoch(*things):
        raise error

    monkeypatch.setattr(train, "train_epoch", epoch)
    result = call("train.py", *arguments(demo, tmp_path))
    assert refused(result, "memory", "--batch-size")


# ---------------------------------------------------------------- several processes


@pytest.mark.parametrize("group", [dict(RANK="1"), dict(WORLD_SIZE="", RANK="")])
def test_a_rank_that_a_job_scheduler_left_is_no_process_of_torchrun(monkeypatch, group):
    for name, value in group.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda name: pytest.fail("join"))
    launch.join_processes(CPU)
    assert train.processes() == (0, 1) and machine.choose_device("cpu") == CPU


def test_processes_that_torchrun_did_not_start_are_refused(call, demo, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    assert refused(call("train.py", *arguments(demo, tmp_path)), "WORLD_SIZE", "torchrun")


@pytest.mark.parametrize(("device", "nccl", "backend"), [  # Windows has no NCCL
    ("cuda", True, "nccl"), ("cuda", False, "gloo"), ("cpu", True, "gloo")])
def test_processes_add_up_with_what_there_is(monkeypatch, device, nccl, backend):
    begun = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: nccl)
    monkeypatch.setattr(torch.distributed, "init_process_group", begun.append)
    launch.join_processes(torch.device(device))
    assert begun == [backend]


def test_more_processes_than_photos_in_a_batch_are_refused(demo, tmp_path, call, monkeypatch):
    monkeypatch.setattr(train, "processes", lambda: (0, 64))
    result = call("train.py", *arguments(demo, tmp_path))
    assert refused(result, "64 processes", "--batch-size", "fewer processes")


def test_few_photos_are_said_to_be_few():
    recipe = train.make_recipe("cnn")
    few, val = launch.remarks_on(recipe, 37, 5)
    assert "37 photos make 100 steps in 100 epochs" in few and "--epochs 5,000" in few
    assert "5 photos to validate on: an accuracy is known to within 44 points" in val
    assert launch.remarks_on(recipe, 9469, 3925) == []
    (frozen,) = launch.remarks_on(train.make_recipe("resnet18", weights=None), 9469, 3925)
    assert "add --unfreeze" in frozen
    assert launch.remarks_on(train.make_recipe("resnet18"), 37, 500) == []
    assert launch.remarks_on(train.make_recipe("cnn", epochs=2), 600, 200) == []
