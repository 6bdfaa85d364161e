"""score.py: the command, and what it asks of networks."""

import csv
import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import REPO, refused
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import boxes
import cam
import data
import folders
import machine
import metrics
import models
import networks
import score


def test_alone_it_names_what_is_missing(tmp_path):
    shutil.copy(REPO / "score.py", tmp_path)
    done = subprocess.run([sys.executable, "score.py", "best.pt"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert refused(done, "No module named 'cam'")


@pytest.fixture
def command(monkeypatch, capsys):
    """command(path, ...) -> (exit status, stdout, stderr); the command in this process."""

    def call(*arguments):
        capsys.readouterr()
        try:
            score.main([*map(str, arguments)])
            status = 0
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return status, out, err

    monkeypatch.setattr(sys, "argv", ["score.py"])
    monkeypatch.setattr(score, "RANDOM_PHOTOS", 4)
    monkeypatch.setattr(score, "DROP_PHOTOS", 8)
    monkeypatch.setattr(boxes, "TRAIN_BOXES", 20)
    coarse = metrics.THRESHOLDS[::10], 56
    monkeypatch.setattr(metrics.best_iou_per_threshold, "__defaults__", coarse)
    monkeypatch.setattr(metrics.deletion_and_insertion.__wrapped__, "__defaults__", (3,))  # steps
    handlers = {end: signal.getsignal(end) for end in (signal.SIGINT, signal.SIGTERM)}
    yield call
    for end, handler in handlers.items():
        signal.signal(end, handler)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """checkpoint(name, seed, order=None) -> the path of an untrained CNN; order: of its classes."""

    def make(name, seed, order=None, looks=(32,)):
        torch.manual_seed(seed)
        network, classes = models.cnn(10), list(data.CLASSES.values())
        nn.init.normal_(network.head.weight)
        if order is not None:
            classes = [classes[k] for k in order]
            network.head.weight.data = network.head.weight[order]
            network.head.bias.data = network.head.bias[order]
        path = tmp_path_factory.mktemp("runs") / f"{name}.pt"
        models.save(path, network, arch="cnn", classes=classes, mean=data.MEAN, std=data.STD,
                    looks=list(looks), accuracies={models.looks_key(looks): 0.5},
                    accuracy_on="val", accuracy_n=20, how="not trained",
                    settings={"epochs": 3, "seed": 7}, epoch=1)
        return path

    return make


@pytest.fixture(scope="session")
def paths(checkpoint):
    return checkpoint("a", 0), checkpoint("b", 1)


def lines_of(path):
    """{(score, network, map): line} of a .csv."""
    with open(path) as file:
        return {(line["score"], line["network"], line["map"]): line
                for line in csv.DictReader(file)}


def test_two_networks(command, paths, demo, tmp_path):
    status, out, err = command(*paths, "--data", demo, "--deletion", 5, "--out",
                               tmp_path / "t" / "0.15")
    assert status == 0, err
    written = {path.name for path in (tmp_path / "t").iterdir()}
    assert written == {f"0.15{end}" for end in (
        ".md", ".csv", ".tex", ".json", "-confusion-cnn.png", "-confusion-cnn-2.png")}
    lines = lines_of(tmp_path / "t" / "0.15.csv")
    assert lines["accuracy", "cnn", "its own map"]["n"] == "20"
    for name in ("pointing game, all", "MaxBoxAccV2, cross-fitted, all"):
        assert lines[name, "cnn", "its own map"]["n"] == "40"
    assert lines["MaxBoxAccV2, best thresholds", "cnn", "its own map"]["low"] == ""
    assert lines["pointing game", "cnn", "random weights"]["n"] == "4"
    assert lines["deletion", "cnn", "random weights"]["n"] == "1"
    for name in ("pointing game", "pointing game, all", "MaxBoxAccV2, cross-fitted",
                 "MaxBoxAccV2, cross-fitted, all"):
        own, square, difference = (lines[name, "cnn", kind] for kind in (
            "its own map", "centred square", "its own map minus centred square"))
        value, low, high = (float(difference[key]) for key in ("value", "low", "high"))
        assert value == pytest.approx(float(own["value"]) - float(square["value"]))
        assert low < value < high
        assert float(lines[name, "cnn-2 minus cnn", "its own map"]["value"]) == pytest.approx(
            float(lines[name, "cnn-2", "its own map"]["value"]) - float(own["value"]))
    for line in lines.values():
        assert not line["low"] or float(line["low"]) <= float(line["value"]) <= float(line["high"])
    table = out.split("\n\n")[0].splitlines()
    assert max(map(len, table)) <= 100
    assert "centred square" in table[0] and "  minus centred square" in out
    markdown, latex = ((tmp_path / "t" / f"0.15{suffix}").read_text() for suffix in (".md", ".tex"))
    assert markdown.index("| accuracy ↑") < markdown.index("| score ") and r"\midrule" in latex
    assert "less" not in out + markdown + latex and not list(tmp_path.rglob("*.part"))


def test_how_the_scores_came_about_is_written_beside_them(command, paths, demo, tmp_path,
                                                          monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(paths[0], tmp_path / "here.pt")
    status, _, err = command(tmp_path / "here.pt", paths[1], "--data", demo, "--deletion", 0,
                             "--out", "t")
    assert status == 0, err
    run = json.loads((tmp_path / "t.json").read_text())
    assert run["command"] == (f"python score.py here.pt {paths[1].name} --data {demo.name} "
                              "--deletion 0 --out t")
    assert list(run["networks"]) == list(run["seconds"]) == ["cnn", "cnn-2"]
    assert min(run["seconds"].values()) > 0
    cnn = run["networks"]["cnn"]
    description = cnn.pop("description")
    assert "not trained" in description
    assert cnn == dict(path="here.pt", looks=[32], accuracy_n=20, epochs=3, seed=7, best_epoch=1)
    assert run["machine"] == machine.facts() and run["precision"] == "float32"
    assert run["device"] == str(machine.choose_device("auto"))
    assert str(tmp_path.parent) not in "".join(path.read_text() for path in tmp_path.glob("t.*"))


def test_classes_are_compared_by_name(command, checkpoint, paths, demo, tmp_path):
    order = list(range(9, -1, -1))
    command(paths[0], "--data", demo, "--deletion", 0, "--out", tmp_path / "a")
    command(checkpoint("reversed", 0, order), "--data", demo, "--deletion", 0, "--out",
            tmp_path / "b")
    kept, reversed_ = lines_of(tmp_path / "a.csv"), lines_of(tmp_path / "b.csv")
    key = "accuracy", "cnn", "its own map"
    assert kept[key] == reversed_[key] and float(kept[key]["value"]) > 0
    key = "share in the box", "cnn", "its own map"
    assert float(kept[key]["value"]) == pytest.approx(float(reversed_[key]["value"]), abs=1e-4)


def test_networks_of_one_kind_are_numbered(paths):
    given = [paths[0], paths[0], "other looks"]
    loaded = [*map(models.load, given[:2]), models.load(paths[0], looks=[32, 64])]
    named = score.name_networks(given, loaded)
    assert [(name, path) for name, (path, *_) in named.items()] == [
        ("cnn", paths[0]), ("cnn-2", paths[0]), ("cnn-3", "other looks")]


@pytest.mark.parametrize(("out", "word"),
                         [(".", "is a folder"), ("new/", "is a folder"), ("file/x", "takes files")])
def test_out_is_checked_before_the_work(command, tmp_path, monkeypatch, out, word):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(networks, "load_networks", lambda *_: pytest.fail("the work began"))
    status, _, err = command("absent.pt", "--out", out)
    assert status == 2 and word in err and len(err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_ctrl_c_is_a_sentence(command, paths, demo, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(score, "score_network", interrupt)
    status, _, err = command(paths[0], "--data", demo, "--out", tmp_path / "t")
    assert status == 130 and "score.py: stopped" in err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_too_little_memory_is_a_sentence(command, paths, demo, tmp_path, monkeypatch):
    def full(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1688 "
                           "bytes.")

    monkeypatch.setattr(score, "score_network", full)
    status, _, err = command(paths[0], "--data", demo, "--out", tmp_path / "t")
    assert status == 2 and "memory" in err.splitlines()[-1] and "--looks" in err.splitlines()[-1]


def boxes_of(demo, folder, letter):
    """A folder with the boxes of the demo's photos of one split: letter "v" or "t"."""
    folder.mkdir()
    shutil.copy(demo / "image_sizes.txt", folder)
    lines = (demo / "localization.txt").read_text().splitlines(True)
    chosen = [line for line in lines if f"_{letter}0" in line]
    (folder / "localization.txt").write_text("".join(chosen))
    return folder


def test_boxes_that_cover_val_only_are_used_and_it_is_said(command, paths, demo, tmp_path):
    folder = boxes_of(demo, tmp_path / "boxes", "v")
    status, out, err = command(paths[0], "--data", demo, "--boxes", folder, "--deletion", 0,
                               "--out", tmp_path / "t")
    assert status == 0, err
    assert "has no boxes of train: thresholds are fitted on val's alone" in out
    assert "all: with" not in out
    lines = lines_of(tmp_path / "t.csv")
    assert lines["MaxBoxAccV2, cross-fitted", "cnn", "its own map"]["n"] == "20"


def test_boxes_of_other_photos_are_refused(command, paths, demo, tmp_path):
    folder = boxes_of(demo, tmp_path / "boxes", "t")
    status, _, err = command(paths[0], "--data", demo, "--boxes", folder, "--out", tmp_path / "t")
    assert status == 2 and "has no boxes of photos in" in err and not (tmp_path / "t.csv").exists()


def test_boxes_that_could_be_of_several_photos_are_refused(command, paths, demo, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(demo, folder, ignore=shutil.ignore_patterns("*.pixels", "*.lock"))
    photo = next((folder / "val" / "n03028079").iterdir())
    shutil.copy(photo, folder / "val" / "n01440764" / photo.name)
    status, _, err = command(paths[0], "--data", folder, "--out", tmp_path / "t")
    assert status == 2 and photo.stem in err


def test_data_without_boxes_of_classes_of_different_size(command, paths, demo, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(demo, folder, ignore=shutil.ignore_patterns("*.txt", "*.pixels", "*.lock"))
    next((folder / "val" / "n03028079").iterdir()).unlink()
    status, out, err = command(paths[0], "--data", folder, "--deletion", 0, "--out",
                               tmp_path / "t")
    assert status == 0, err
    assert "no localisation" in out and "accuracy, mean of the classes" in out
    assert "pointing" not in out and "centred square" not in out


def test_a_confusion_matrix_has_a_row_for_what_is_there():
    matrix = score.confusion_matrix(torch.tensor([0, 0, 2, 1]), torch.tensor([0, 2, 2, 1]), 4)
    assert matrix.tolist() == [[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]


def test_accuracy_on_photos_that_pretraining_has_not_seen():
    correct, labels = torch.tensor([1.0, 0, 1, 1]), torch.tensor([0, 0, 1, 1])
    names = ["a/n01_1.JPEG", "a/ILSVRC2012_val_1.JPEG", "b/n02_1.JPEG", "b/ILSVRC2012_val_2.JPEG"]
    scores = score.accuracies(correct, labels, names)
    assert list(scores) == ["accuracy", "accuracy, photos not in ImageNet's training"]
    assert scores["accuracy, photos not in ImageNet's training"][:1] == (0.5,)
    assert list(score.accuracies(correct, labels, ["x.jpg"] * 4)) == ["accuracy"]


def test_looks_are_what_is_scored(command, paths, demo, tmp_path):
    status, out, err = command(paths[0], paths[0], "--looks", "32", "32,64", "--data", demo,
                               "--deletion", 0, "--out", tmp_path / "t")
    assert status == 0, err
    assert "at 32 px" in out and "at 32, 64 px" in out
    lines = lines_of(tmp_path / "t.csv")
    one, two = (lines["area above half", name, "its own map"] for name in ("cnn", "cnn-2"))
    assert one["value"] != two["value"]


def test_random_networks_differ_and_look_as_the_network_does():
    facts = {"arch": "cnn", "classes": list("ab"), "looks": [32, 64], "width": 8}
    one, again, other = (score.random_network(facts, seed) for seed in (0, 0, 1))
    assert torch.equal(one.head.weight, again.head.weight)
    assert not torch.equal(one.head.weight, other.head.weight)
    assert isinstance(one.features, models.Looks)
    assert one.head.weight.shape == (2, 16)  # as wide as the network


def test_photos_of_val_that_were_trained_on_are_counted(command, paths, demo, tmp_path):
    val = folders.load(demo, "val")
    seen = models.read(paths[0])
    seen["trained_on"] = [val.digests[0], val.digests[7], "0" * 16]
    torch.save(seen, tmp_path / "seen.pt")
    status, out, err = command(paths[1], tmp_path / "seen.pt", "--data", demo, "--deletion", 0,
                               "--out", tmp_path / "t")
    assert status == 0, err
    sentence = "cnn-2: 2 of 20 val photos were trained on: "
    for text in (out, err, (tmp_path / "t.md").read_text()):
        assert text.count(sentence) == text.count("trained on") == 1
    assert networks.seen_in_training({"trained_on": val.digests}, val) == 20


def test_what_the_command_cannot_do_is_said_before_the_work(command, monkeypatch):
    monkeypatch.setattr(networks, "load_networks", lambda *_: pytest.fail("the work began"))
    for option, value, words in (("--device", "abacus", "there is no device 'abacus'"),
                                 ("--deletion", "-1", "argument --deletion"),
                                 ("--boxes", "", "argument --boxes: it is empty")):
        status, _, err = command("absent.pt", option, value)
        assert status == 2 and words in err.splitlines()[-1]


def test_tables_in_the_home_folder(command, paths, demo, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "demo").symlink_to(demo)
    status, _, err = command(paths[0], "--data", "~/demo", "--deletion", 0, "--out", "~/new/t")
    assert status == 0, err
    assert (tmp_path / "new" / "t.csv").exists()


def test_maps_and_scores_stay_on_the_device(monkeypatch):
    """Fake tensors know their device, and refuse to meet those of another one."""
    monkeypatch.setattr(  # these ask for numbers
        cam, "explain", lambda network, images: cam.MapsAndLogits(network)(images))
    monkeypatch.setattr(metrics, "finite", metrics.at_least_float32)
    monkeypatch.setattr(score, "mean_interval", lambda values: values)
    photos = data.from_arrays([torch.zeros(32, 32, 3, dtype=torch.uint8)] * 6)
    facts = {"arch": "cnn", "classes": list("ab"), "looks": [32], "size": 32, "width": 8}
    network = score.random_network(facts, 0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        batch = torch.zeros(6, 3, 32, 32, device="cuda"), photos.labels.to("cuda")
        monkeypatch.setattr(data, "eval_batches", lambda *_: [batch])
        network.to("cuda")
        logits, maps = score.logits_and_maps(network, [batch], likeliest=True)
        scores = score.drop_and_increase(network, photos, logits.amax(1), maps[None], facts)
        scores |= score.deletion_and_insertion(network, photos, maps[None], facts)
        assert {tensor.device.type for tensor in (logits, maps, *scores.values())} == {"cuda"}
        assert all(values.shape == (1, 6) for values in scores.values())


def test_a_network_is_scored_on_images_as_it_knows_them():
    """Normalised in its own way, in which the same weights say something else of a photo."""
    photo = torch.randint(0, 255, (32, 32, 3), dtype=torch.uint8)
    photos = data.from_arrays([photo] * 3)
    facts = {"size": 32, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    (images, _), = score.batches_of(photos, facts)
    expected = (photo.permute(2, 0, 1) / 255 - 0.5) / 0.25
    torch.testing.assert_close(images, expected.expand(3, 3, 32, 32))


def test_a_missing_checkpoint_is_a_sentence(run):
    assert refused(run("score.py", "absent.pt"), "absent.pt")
