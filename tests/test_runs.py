"""runs.py: what a training leaves, and that nothing that was finished is ever lost."""

import csv
import errno
import io
import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    EPOCHS,
    PHOTOS_ALONE,
    REPO,
    SMALL,
    arguments,
    end,
    full_disk,
    log,
    refused,
    run_files,
    same,
    same_run,
    training,
    training_stopped_after,
)
from PIL import Image, ImageDraw
from torch import nn

import data
import files
import folders
import launch
import models
import runs
import train

cross_entropy = F.cross_entropy
CPU = torch.device("cpu")


def accuracy_of(network, batches, precision):
    return train.val_scores(train.evaluate(network, batches, precision, 10))["val_accuracy"]


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of a finished run, of the same name in another folder, to be damaged."""
    return shutil.copytree(trained, tmp_path / "cnn")


def change_file(path, **changes):
    """Write a checkpoint anew, with other facts."""
    torch.save(models.read(path) | changes, path)


# ---------------------------------------------------------------- a run and its files


def test_a_run_leaves_these_files(trained):
    assert run_files(trained).keys() == {"best.pt", "last.pt", "log.csv", "curves.png",
                                         "config.json", "result.json"}
    with open(trained / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["epoch", "size", "train_loss", "train_accuracy", "val_loss",
                             "val_accuracy", "val_class_accuracy", "lr", "images_per_second",
                             "seconds"]
    assert [int(row["epoch"]) for row in rows] == list(range(1, EPOCHS + 1))
    assert all(0 <= float(row["val_accuracy"]) <= 1 and float(row["train_loss"]) > 0
               for row in rows)
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])  # it learns
    accuracy = [float(row["val_accuracy"]) for row in rows]

    config = json.loads((trained / "config.json").read_text())
    recipe = config["recipe"]
    assert (recipe["arch"], recipe["epochs"], recipe["crop"], recipe["seed"]) == (
        "cnn", EPOCHS, 16, 0)
    assert recipe["photos"] == [60, 20]
    assert recipe.keys() >= {"lr", "batch_size", "weight_decay", "width"}
    assert config.keys() >= {"command", "parameters", "device", "precision", "threads",
                             "processes", "machine"}
    result = json.loads((trained / "result.json").read_text())
    assert config.items() <= result.items() and result["seconds"] > 0
    assert result["best_accuracy"] == max(accuracy) and result["last_accuracy"] == accuracy[-1]
    assert result["best_epoch"] == accuracy.index(max(accuracy)) + 1
    with Image.open(trained / "curves.png") as picture:
        picture.load()
        assert picture.format == "PNG" and len(picture.convert("RGB").getcolors(1 << 20)) > 10


def test_the_log_is_rounded_and_says_the_size_of_photos_in_validation():
    row = dict(epoch=2, train_loss=1.23456, train_accuracy=1 / 3, val_loss=2.00004,
               val_accuracy=2 / 3, val_class_accuracy=0.1234567, lr=0.01234567,
               images_per_second=1234.5678, seconds=1.23456)
    rounded = runs.rounded(row, train.make_recipe("cnn", epochs=100))
    assert rounded == dict(epoch=2, size="72", train_loss=1.2346, train_accuracy=0.33333,
                           val_loss=2.0, val_accuracy=0.66667, val_class_accuracy=0.12346,
                           lr=0.012346, images_per_second=1235, seconds=1.23)
    assert runs.rounded(row, train.make_recipe("resnet18"))["size"] == "224"


def test_the_time_left_counts_the_pixels_of_the_crops_to_come():
    rows = [dict(seconds=40.0)] * 90
    assert runs.time_left(rows, train.make_recipe("cnn")) == 10 * 40 * (96 / 64) ** 2
    assert runs.time_left(rows[:2], train.make_recipe("resnet18")) == 3 * 40
    assert runs.time_left(rows[:5], train.make_recipe("resnet18")) == 0


@pytest.mark.parametrize(("seconds", "text"), [
    (0, "0:00"), (59.6, "1:00"), (61, "1:01"), (1019.9, "17:00"), (3599, "59:59"),
    (3600, "1:00:00"), (7325, "2:02:05")])
def test_the_time_left_is_that_of_a_clock(seconds, text):
    assert runs.clock(seconds) == text  # never "16:60"


def test_best_checkpoint_has_exactly_the_accuracy_it_says(trained, demo):
    network, facts = models.load(trained / "best.pt")
    result = json.loads((trained / "result.json").read_text())
    assert facts["accuracy"] == result["best_accuracy"] and facts["epoch"] == result["best_epoch"]
    assert facts["classes"] == list(data.CLASSES.values())
    assert facts["size"] == 16 and facts["arch"] == "cnn"
    batches = data.eval_batches(folders.load(demo, "val"), facts["size"], 7)
    accuracy = accuracy_of(network, batches, train.choose_precision(CPU))
    assert round(accuracy, 5) == facts["accuracy"]


def test_best_pt_is_an_export_of_last_pt(trained):
    last, best = models.read(trained / "last.pt"), models.read(trained / "best.pt")
    assert same(best["state"], last["best"]) and same(best["accuracies"], last["accuracies"])
    assert all(same(best[name], fact) for name, fact in last["facts"].items())
    accuracies = [row["val_accuracy"] for row in last["rows"]]
    assert best["epoch"] == accuracies.index(max(accuracies)) + 1
    if best["epoch"] == EPOCHS:
        assert same(best["state"], last["state"]["average"])


def test_a_checkpoint_knows_its_photos(trained, demo):
    facts = models.read(trained / "best.pt")
    assert facts["trained_on"] == folders.load(demo, "train").digests


@pytest.mark.parametrize(("more", "on", "count"), [
    ([], "val", 20), (["--holdout", 0.25], "held-out train", 15)])
def test_a_checkpoint_says_what_its_accuracy_was_measured_on(demo, tmp_path, more, on, count):
    training(demo, tmp_path, *more, epochs=1)
    _, facts = models.load(tmp_path / "cnn" / "best.pt")
    result = json.loads((tmp_path / "cnn" / "result.json").read_text())
    assert facts["accuracy_on"] == result["accuracy_on"] == on
    assert facts["accuracy_n"] == result["accuracy_n"] == count


@pytest.mark.parametrize(("these", "how"), [
    (["cnn"], "trained from scratch"), (["resnet18"], "only its last layer trained"),
    (["resnet18", "--unfreeze"], "every layer fine-tuned"),
    (["resnet18", "--unfreeze", "--weights", "none"], "trained from scratch")])
def test_a_checkpoint_says_how_it_was_trained(demo, tmp_path, these, how):
    recipe, _ = launch.parse_arguments(these)
    photos = folders.load(demo, "val")
    assert runs.Run(tmp_path, recipe, photos, photos).facts["how"] == how


def test_a_network_trained_with_one_look_gets_the_accuracy_of_all(demo, tmp_path):
    training(demo, tmp_path, "--looks", "16,24,32", epochs=1)
    result = json.loads((tmp_path / "cnn" / "result.json").read_text())
    assert result["accuracies"].keys() == {"16", "16 24 32"}
    assert result["accuracies"]["16"] == result["best_accuracy"]
    network, facts = models.load(tmp_path / "cnn" / "best.pt")
    assert (facts["looks"], facts["size"]) == ([16, 24, 32], 32)
    batches = list(data.eval_batches(folders.load(demo, "val"), 32, 64))
    float32 = train.Precision(None, False, torch.contiguous_format)
    accuracy = round(accuracy_of(network, batches, float32), 5)
    assert accuracy == facts["accuracy"] == result["accuracies"]["16 24 32"]


def test_a_network_of_ones_own_in_place_of_the_cnn_is_trained_and_kept(demo, tmp_path,
                                                                       monkeypatch):
    """Written into models.py alone: its width is what it makes of it."""

    def cnn(classes=10, width=192):
        features = nn.Sequential(nn.Conv2d(3, width, 7, 4, 3), nn.ReLU(), nn.Conv2d(width, 5, 3))
        return models.CAMNet(features, nn.Linear(5, classes))

    monkeypatch.setattr(models, "cnn", cnn)
    training(demo, tmp_path, "--looks", "16,32", epochs=2)
    network, facts = models.load(tmp_path / "cnn" / "best.pt")
    assert facts["width"] == 16 and network.head.in_features == 5
    assert facts["accuracy"] is not None


def drawn(rows):
    return Image.open(io.BytesIO(runs.draw_curves(rows)))


def test_curves_are_the_values_they_show():
    quarter = [dict(epoch=i + 1, train_loss=2.0, val_loss=1.0, train_accuracy=0.5,
                    val_accuracy=1.0) for i in range(4)]
    runs.draw_curves(quarter[:1])  # a single epoch is a point
    pixels = np.array(drawn(quarter))
    middle = pixels[:, [260, 710]].astype(int)  # a column in each diagram
    blue, red = ((np.abs(middle - colour).sum(2) < 40)
                 for colour in ((0, 114, 178), (213, 94, 0)))
    heights = [[np.flatnonzero(hit[:, side]).mean() for hit in (blue, red)] for side in (0, 1)]
    top = heights[0][0]  # losses: 2 is the top, 1 is half of it
    bottom = 2 * heights[0][1] - top
    assert top < bottom and heights[1][1] == pytest.approx(top, abs=2)
    assert heights[1][0] == pytest.approx((top + bottom) / 2, abs=2)


def test_the_accuracy_to_beat_is_a_dashed_line():
    row = dict(epoch=1, train_loss=2.0, val_loss=1.0, train_accuracy=0.5, val_accuracy=1.0)
    without, dashed = (np.array(Image.open(io.BytesIO(runs.draw_curves([row], to_beat))))
                       for to_beat in (None, 0.25))
    changed = (without != dashed).any(2)
    rows, columns = changed.nonzero()
    assert columns.min() >= 510 and rows.min() == 330 - 280 // 4  # of the right diagram alone
    assert 0.4 < changed[rows.min(), 510:830].mean() < 0.7


def test_every_character_in_the_curves_is_in_the_font(monkeypatch):
    texts, write = [], ImageDraw.ImageDraw.text
    monkeypatch.setattr(ImageDraw.ImageDraw, "text",
                        lambda pen, xy, text, *rest, **options: texts.append((text, rest[1])) or
                        write(pen, xy, text, *rest, **options))
    runs.draw_curves([dict(epoch=1, train_loss=2.0, val_loss=1.0, train_accuracy=0.5,
                           val_accuracy=1.0)])
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


# ---------------------------------------------------------------- interrupted, and gone on with


@pytest.mark.parametrize("epoch", [1, EPOCHS - 1])
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(trained, demo, tmp_path, epoch):
    training_stopped_after(epoch, demo, tmp_path)
    assert len(log(tmp_path / "cnn")) == epoch
    training(demo, tmp_path)
    assert same_run(tmp_path / "cnn", trained)


def test_a_stopped_head_goes_on_too(demo, tmp_path):
    these = demo, tmp_path, "--weights", "none"
    training(*these, "--name", "whole", arch=SMALL, epochs=2)
    training_stopped_after(1, *these, "--name", "stopped", arch=SMALL, epochs=2)
    training(*these, "--name", "stopped", arch=SMALL, epochs=2)
    assert same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize("name", ["last.pt", "best.pt", "log.csv", "curves.png", "result.json"])
def test_stopped_between_any_two_files_it_ends_as_if_it_had_not_been(trained, demo, tmp_path,
                                                                     monkeypatch, name):
    write = files.write

    def stop(path, contents):
        last = tmp_path / "cnn" / "last.pt"
        if path.name == name and (name == "result.json" or last.exists()
                                  and len(models.read(last)["rows"]) == 3):
            raise KeyboardInterrupt
        write(path, contents)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files, "write", stop)
        training(demo, tmp_path)
    training(demo, tmp_path)
    assert same_run(tmp_path / "cnn", trained)
    assert run_files(tmp_path / "cnn").keys() == run_files(trained).keys()


def wait_for_an_epoch(process):
    for line in process.stdout:
        if line.startswith("epoch"):
            return line
    raise AssertionError(process.stderr.read())


def test_terminated_and_killed_a_process_goes_on_by_the_same_command(start, trained, demo,
                                                                     tmp_path):
    command = [REPO / "train.py", *arguments(demo, tmp_path)]
    process = start(*command)
    wait_for_an_epoch(process)
    process.send_signal(signal.SIGTERM)
    result = end(process)
    assert result.returncode == 130 and "Traceback" not in result.stderr, result.stderr
    assert len([line for line in result.stderr.splitlines() if "train.py: " in line]) == 1
    done = len(models.read(tmp_path / "cnn" / "last.pt")["rows"])
    assert 1 <= done < EPOCHS

    process = start(*command)
    assert int(wait_for_an_epoch(process).split("/")[0].split()[1]) == done + 1
    process.kill()
    assert end(process).returncode == -signal.SIGKILL
    assert done < len(models.read(tmp_path / "cnn" / "last.pt")["rows"]) < EPOCHS

    training(demo, tmp_path)
    assert same_run(tmp_path / "cnn", trained)


def test_an_epoch_may_take_less_than_a_tick_of_the_clock(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1e9)  # that of Windows ticks 64 times a second
    training(demo, tmp_path, "--weights", "none", arch=SMALL, epochs=1)
    assert len(log(tmp_path / SMALL)) == 1


def test_a_finished_run_does_nothing_and_says_so(copied, demo, tmp_path, call, monkeypatch):
    before = {path.name: path.stat().st_mtime_ns for path in copied.iterdir()
              if path.name != "run.lock"}
    monkeypatch.setattr(train, "train_epoch", lambda *things: pytest.fail("trained on"))
    result = call("train.py", *arguments(demo, tmp_path))
    assert result.returncode == 0
    assert f"{EPOCHS} of {EPOCHS} epochs are done" in result.stdout
    assert before == {name: (copied / name).stat().st_mtime_ns for name in before}


def test_a_log_that_another_program_has_open_ends_no_training(demo, tmp_path, monkeypatch, capsys):
    write = files.write

    def refuse(path, contents):
        if path.name == "log.csv" and len(opened) < 2:  # in Excel, on Windows
            opened.append(path)
            raise PermissionError(errno.EACCES, "in use", str(path))
        write(path, contents)

    opened = []
    monkeypatch.setattr(files, "write", refuse)
    training(demo, tmp_path, epochs=3)
    assert capsys.readouterr().err.count("log.csv cannot be replaced (in use): close") == 2
    assert len(log(tmp_path / "cnn")) == 3 and (tmp_path / "cnn" / "result.json").exists()


@pytest.mark.parametrize("name", ["best.pt", "result.json", "log.csv", "curves.png"])
@pytest.mark.parametrize("damage", [os.unlink, lambda path: os.truncate(path, 1000)])
def test_what_is_missing_of_a_finished_run_is_written(trained, copied, demo, tmp_path, name,
                                                      damage):
    """last.pt of the last epoch was written, and then the run was killed; or somebody damaged
    it."""
    damage(copied / name)
    training(demo, tmp_path)
    if name == "best.pt":
        assert same(models.read(copied / name), models.read(trained / name))
    else:
        assert (copied / name).read_bytes() == (trained / name).read_bytes()


def test_a_log_that_misses_the_last_epoch_is_completed(trained, copied, demo, tmp_path):
    """last.pt of the last epoch was written, log.csv is still of the one before."""
    rows = (copied / "log.csv").read_bytes().splitlines(keepends=True)
    (copied / "log.csv").write_bytes(b"".join(rows[:-1]))
    (copied / "result.json").unlink()
    training(demo, tmp_path)
    assert (copied / "log.csv").read_bytes() == (trained / "log.csv").read_bytes()


def test_a_run_that_goes_on_has_no_result_until_it_ends(demo, tmp_path):
    (tmp_path / "cnn").mkdir()
    (tmp_path / "cnn" / "result.json").write_text("of an older run")
    training_stopped_after(1, demo, tmp_path)
    assert not (tmp_path / "cnn" / "result.json").exists()


def test_a_run_goes_on_where_another_precision_began_it(demo, tmp_path, monkeypatch):
    """On a device that scales gradients, from a checkpoint of one that does not."""
    training_stopped_after(1, demo, tmp_path, epochs=2)
    scaling = train.Precision(torch.float16, True, torch.channels_last)
    monkeypatch.setattr(train, "choose_precision", lambda *things: scaling)
    scalers, make = [], train.make_step
    monkeypatch.setattr(train, "make_step", lambda *things: scalers.append(things[2]) or
                        make(*things))
    monkeypatch.setattr(F, "cross_entropy", lambda logits, *rest, **options:
                        cross_entropy(logits.float(), *rest, **options))
    training(demo, tmp_path, epochs=2)
    assert len(scalers) == 1 and scalers[0].is_enabled() and len(log(tmp_path / "cnn")) == 2


def test_a_run_goes_on_without_the_weights_that_it_began_with(demo, tmp_path):
    torch.manual_seed(0)
    start = tmp_path / "start.pth"
    torch.save(models.torchvision_models.get_model(SMALL).state_dict(), start)
    these = demo, tmp_path, "--weights", start, "--looks", "32"
    training(*these, arch=SMALL, epochs=1)
    state = (tmp_path / SMALL / "last.pt").read_bytes()
    start.unlink()
    training(*these, arch=SMALL, epochs=1)
    assert (tmp_path / SMALL / "last.pt").read_bytes() == state
    with pytest.raises(ValueError, match="start.pth does not exist"):
        training(*these, "--name", "other", arch=SMALL, epochs=1)


# ---------------------------------------------------------------- another run's


@pytest.mark.parametrize(("more", "name"), [
    (["--lr", 0.017], "lr"), (["--seed", 5], "seed"), (["--epochs", 13], "epochs"),
    (["--plain-crop"], "plain_crop"), (["--size", 24], "size"), (["--looks", "16,24"], "looks"),
    (["--batch-size", 15], "batch_size"), (["--holdout", 0.5], "holdout"),
    (["--weight-decay", 0.1], "weight_decay")])
def test_a_run_of_other_settings_is_refused_by_their_names(copied, demo, tmp_path, call, more,
                                                           name):
    before = run_files(copied)
    result = call("train.py", *arguments(demo, tmp_path, *more))
    assert refused(result, "other settings", f"{name} ", "--name")
    assert before == run_files(copied)


def test_a_run_of_an_earlier_version_is_refused_with_what_can_be_done(copied, demo, tmp_path, call,
                                                                     monkeypatch):
    monkeypatch.setattr(train.Recipe.__init__, "__defaults__",
                        (*train.Recipe.__init__.__defaults__[:-1], 99))
    result = call("train.py", *arguments(demo, tmp_path))
    assert refused(result, f"version {train.Recipe.version} of the recipe, and this is 99",
                   "--name") and "repeat" not in result.stderr


def test_a_run_knows_its_photos(copied, demo, tmp_path, call):
    """The same names and numbers, other pixels: neither done already, nor to be gone on with."""
    other = shutil.copytree(demo, tmp_path / "other", ignore=PHOTOS_ALONE)
    path = next((other / "train").rglob("*.JPEG"))
    Image.open(path).rotate(180).save(path)
    result = call("train.py", *arguments(other, tmp_path))
    assert refused(result, "other settings", "photos")


def test_a_run_knows_the_weights_it_began_with(demo, tmp_path):
    weights = tmp_path / "weights.pth"
    these = demo, tmp_path, "--weights", weights, "--looks", 32
    for seed in (0, 1):
        torch.manual_seed(seed)
        network = models.torchvision_models.get_model(SMALL, weights=None)
        torch.save(network.state_dict(), weights)
        if seed == 0:
            shutil.copy(weights, tmp_path / "renamed.pth")
            training_stopped_after(1, *these, arch=SMALL, epochs=2)
    with pytest.raises(ValueError, match="weights.pth holds other weights now"):
        training(*these, arch=SMALL, epochs=2)
    with pytest.raises(ValueError) as refusal:
        training(*these[:3], tmp_path / "renamed.pth", "--looks", 32, "--size", 64, arch=SMALL,
                 epochs=2)
    assert "size" in str(refusal.value) and "renamed" not in str(refusal.value)
    weights.unlink()  # all is in last.pt
    training(*these, arch=SMALL, epochs=2)


def test_a_run_on_other_classes_says_which(copied, demo, tmp_path, call):
    other = shutil.copytree(demo, tmp_path / "other", ignore=PHOTOS_ALONE)
    for split in ("train", "val"):
        (other / split / "n01440764").rename(other / split / "pike")  # was: tench
    result = call("train.py", *arguments(other, tmp_path))
    assert refused(result, "classes tench there alone, pike here alone")


def test_photos_that_were_copied_are_the_same_photos(trained, copied, demo, tmp_path):
    other = tmp_path / "other"  # with times of its own
    shutil.copytree(demo, other, ignore=PHOTOS_ALONE, copy_function=shutil.copyfile)
    training(other, tmp_path)
    assert same_run(copied, trained)


@pytest.mark.parametrize("what", ["garbage", "nothing", "a best.pt", "a list", "half of it"])
def test_a_last_pt_that_is_none_is_refused(trained, copied, demo, tmp_path, call, what):
    last = copied / "last.pt"
    if what == "a best.pt":
        shutil.copy(trained / "best.pt", last)
    elif what == "a list":
        torch.save([1, 2, 3], last)
    elif what == "half of it":
        os.truncate(last, last.stat().st_size // 2)
    else:
        last.write_bytes(b"garbage" * (what == "garbage"))
    before = run_files(copied)
    assert refused(call("train.py", *arguments(demo, tmp_path)), last, "remove")
    assert run_files(copied) == before


def test_a_run_that_lost_last_pt_is_neither_called_done_nor_trained_over(copied, demo, tmp_path,
                                                                         call):
    (copied / "last.pt").unlink()
    before = run_files(copied)
    result = call("train.py", *arguments(demo, tmp_path))
    assert refused(result, copied / "last.pt", "is gone", "remove")
    assert run_files(copied) == before


@pytest.mark.parametrize("contents", [
    lambda best: best | {"settings": best["settings"] | {"seed": 8}}, lambda best: ["a", "list"],
    lambda best: best["state"]], ids=["other settings", "a list", "a state dict"])
@pytest.mark.parametrize("stopped", [False, True])
def test_the_best_weights_of_another_training_are_refused(copied, demo, tmp_path, call, contents,
                                                          stopped):
    """Somebody put them there: this run does not know them, and does not overwrite them."""
    if stopped:
        shutil.rmtree(copied)
        training_stopped_after(1, demo, tmp_path)
    torch.save(contents(models.read(copied / "best.pt")), copied / "best.pt")
    before = run_files(copied)
    result = call("train.py", *arguments(demo, tmp_path))
    assert refused(result, copied / "best.pt", "another training", "move or remove it")
    assert run_files(copied) == before


def test_best_weights_of_another_epoch_are_written_again(trained, copied, demo, tmp_path):
    """The run was killed between last.pt and best.pt."""
    change_file(copied / "best.pt", epoch=99, state={})
    training(demo, tmp_path)
    assert same_run(copied, trained)


@pytest.mark.parametrize("damage", [os.unlink, lambda path: os.truncate(path, 20)])
def test_a_finished_run_that_lost_its_config_is_refused(copied, demo, tmp_path, call, damage):
    damage(copied / "config.json")
    result = call("train.py", *arguments(demo, tmp_path))
    assert refused(result, "config.json", "remove")


def test_a_second_run_in_a_folder_is_refused_while_the_first_lasts(demo, tmp_path, call):
    (tmp_path / "cnn").mkdir()
    with files.lock(tmp_path / "cnn" / "run"):
        result = call("train.py", *arguments(demo, tmp_path))
    assert refused(result, tmp_path / "cnn", "another process")
    assert list(run_files(tmp_path / "cnn")) == []


# ---------------------------------------------------------------- under other code


def test_a_run_that_goes_on_under_other_code_says_so(copied, demo, tmp_path, call, monkeypatch):
    again = arguments(demo, tmp_path)
    assert "began with another" not in call("train.py", *again).stderr
    monkeypatch.setattr(runs, "code_digest", lambda: "another")
    result = call("train.py", *again)
    assert result.returncode == 0
    assert f"{copied} began with another train.py, " in result.stderr and "--name" in result.stderr


def test_comments_and_layout_are_no_other_code(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "runs.py"))
    for name in runs.DECIDES:
        shutil.copy(REPO / name, tmp_path)
    before = runs.code_digest()
    for name in runs.DECIDES:
        lines = (tmp_path / name).read_text().replace("return (", "return (\n# here\n")
        (tmp_path / name).write_text(f"# a comment\n\n{lines}\n# another\n")
        assert runs.code_digest() == before
        (tmp_path / name).write_text(f"{lines}\nA = 1\n")
        assert runs.code_digest() != before
        (tmp_path / name).write_text(lines)


class Adam(torch.optim.Adam):
    def __init__(self, module, *rest, **options):
        super().__init__([p for p in module.parameters() if p.requires_grad])


class SGD(torch.optim.SGD):
    def __init__(self, module, *rest, **options):
        super().__init__([p for p in module.parameters() if p.requires_grad], 0.1)


def change_optimizer(monkeypatch, kind):
    monkeypatch.setattr(train, "make_optimizer", lambda recipe, module, *rest: kind(module))


@pytest.mark.parametrize(("began", "goes_on"), [(None, SGD), (SGD, Adam), (Adam, SGD)])
@pytest.mark.parametrize("arch", ["cnn", SMALL])
def test_a_state_of_another_optimiser_is_refused(demo, tmp_path, call, monkeypatch, arch, began,
                                                 goes_on):
    more = [] if arch == "cnn" else ["--weights", "none", "--looks", 32]
    with monkeypatch.context() as patch:
        if began:
            change_optimizer(patch, began)
        training_stopped_after(1, demo, tmp_path, *more, arch=arch)
    before = run_files(tmp_path / arch)
    change_optimizer(monkeypatch, goes_on)
    result = call("train.py", *arguments(demo, tmp_path, *more, arch=arch))
    assert refused(result, tmp_path / arch / "last.pt", "another network or optimiser", "--name")
    assert run_files(tmp_path / arch) == before


def test_a_state_of_another_network_is_refused(demo, tmp_path, call, monkeypatch):
    training_stopped_after(1, demo, tmp_path)
    build = models.cnn
    monkeypatch.setattr(models, "cnn", lambda classes, width: build(classes, 2 * width))
    result = call("train.py", *arguments(demo, tmp_path))
    assert refused(result, tmp_path / "cnn" / "last.pt", "another network or optimiser", "--name")


# ---------------------------------------------------------------- no numbers, no room


def nan_from(epoch, step, monkeypatch):
    """Images without a number in them from that step of that epoch on."""
    batches, epochs = data.train_batches, []

    def train_batches(*things, **options):
        epochs.append(len(epochs))  # 0 is the whitening
        for i, (images, labels) in enumerate(batches(*things, **options), 1):
            yield (images * float("nan") if (epochs[-1], i) >= (epoch, step) else images), labels

    monkeypatch.setattr(data, "train_batches", train_batches)


def test_a_loss_that_is_not_finite_stops_the_run_by_epoch_and_step(trained, demo, tmp_path, call,
                                                                   monkeypatch):
    with monkeypatch.context() as patch:
        nan_from(3, 2, patch)
        result = call("train.py", *arguments(demo, tmp_path))
        assert refused(result, "epoch 3", "step 2", "--lr")
    last = models.read(tmp_path / "cnn" / "last.pt")
    assert len(last["rows"]) == 2
    assert all(tensor.isfinite().all() for tensor in last["state"]["network"].values())
    models.load(tmp_path / "cnn" / "best.pt")
    training(demo, tmp_path)  # the epoch before is all there
    assert same_run(tmp_path / "cnn", trained)


@pytest.mark.parametrize(("more", "where"), [([], "step"), (["--batch-size", 64], "validation")])
def test_weights_that_give_no_number_are_never_saved(demo, tmp_path, call, more, where):
    """Of one step an epoch the loss is still that of good weights: what it makes of them shows in
    validation alone."""
    result = call("train.py", *arguments(demo, tmp_path, "--lr", "1e30", *more))
    assert refused(result, "finite", "epoch 1", where, "--lr")
    assert not list(tmp_path.rglob("*.pt"))


def test_a_full_disk_ends_in_a_sentence_and_the_epoch_before_is_intact(trained, demo, tmp_path,
                                                                       call):
    training_stopped_after(1, demo, tmp_path)
    before = (tmp_path / "cnn" / "last.pt").read_bytes()
    with full_disk(100_000):  # bytes: enough for a log and a picture, not for weights
        result = call("train.py", *arguments(demo, tmp_path))
    assert refused(result, "too large", ".pt")
    assert (tmp_path / "cnn" / "last.pt").read_bytes() == before
    assert not list(tmp_path.rglob("*.part"))
    training(demo, tmp_path)  # there is room again
    assert same_run(tmp_path / "cnn", trained)


@pytest.mark.parametrize("name", ["best.pt", "last.pt", "log.csv", "curves.png"])
def test_no_file_is_ever_half_there(demo, tmp_path, call, monkeypatch, name):
    training_stopped_after(1, demo, tmp_path, "--lr", 1e-9)
    folder = tmp_path / "cnn"
    before = run_files(folder)

    def full(path, mode):
        file = open(path, mode)
        if os.path.basename(path).startswith(name):
            file.write(b"half of it")
            file.close()
            raise OSError(28, "No space left on device")
        return file

    monkeypatch.setattr(files, "open", full, raising=False)
    better = torch.tensor([[4.0] * 10, [1.8] * 10, [2.0] * 10])  # best.pt is to be written too
    monkeypatch.setattr(train, "evaluate", lambda *things: better)
    result = call("train.py", *arguments(demo, tmp_path, "--lr", 1e-9))
    assert refused(result, "No space left on device", folder / name)
    assert (folder / name).read_bytes() == before[name]
    assert run_files(folder).keys() == before.keys()
