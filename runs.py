"""A training on disk: its checkpoints, going on with it, its log.

    runs/<name>/last.pt       all that is needed to go on, with the best weights so far
    runs/<name>/best.pt       the weights of the highest validation accuracy: an export of last.pt's
    runs/<name>/log.csv       a row an epoch; curves.png draws it
    runs/<name>/config.json   command, recipe, machine; result.json, written last: what came out

The same command after an interruption goes on from the last epoch, on a CPU bit for bit; after the
last epoch it does nothing.
"""

import ast
import copy
import csv
import hashlib
import io
import json
import math
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

import data
import files
import machine
import models
import train

REPORT = {"scratch": 0.72, "head": 0.96}  # accuracies of the course report behind this project
# What a run gives depends on:
DECIDES = ("train.py", "optim.py", "recorded.py", "frozen.py", "models.py", "data.py")


# ---------------------------------------------------------------- the run's folder


class Run:
    """The folder of a training. `save` after each epoch, `finish` after the last."""

    def __init__(self, folder, recipe, photos, val, source=None):
        self.folder, self.recipe = folder, recipe
        self.settings = dict(asdict(recipe), looks=list(recipe.looks),
                             photos=[len(photos), len(val)],
                             data=[photos.fingerprint, val.fingerprint])
        if recipe.weights and Path(recipe.weights).is_file():
            with open(recipe.weights, "rb") as file:
                digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8))
            self.settings["weights_digest"] = digest.hexdigest()
        how = {"head": "only its last layer trained", "scratch": "trained from scratch",
               "all": "every layer fine-tuned" if recipe.weights else "trained from scratch"}
        self.facts = dict(arch=recipe.arch, width=recipe.width, classes=photos.classes,
                          mean=data.MEAN, std=data.STD, looks=list(recipe.looks),
                          how=how[recipe.training],
                          accuracy_on="held-out train" if recipe.holdout else "val",
                          accuracy_n=len(val), settings=self.settings, code=code_digest(),
                          trained_on=list(photos.digests), data=source and Path(source).as_posix())
        self.rows = []  # of the log
        self.best = None  # state dict of the best epoch's network
        self.accuracies = {}  # of that, by its looks

    def resume(self):
        """What `train.train` goes on from, or None where the run begins.

        Raises ValueError where last.pt or best.pt is another run's, or last.pt alone is gone.
        """
        last, best = self.folder / "last.pt", self.folder / "best.pt"
        if not last.exists():
            if best.exists():
                raise ValueError(f"{last} is gone, and {best} is there: put it back, give this "
                                 f"run a --name of its own, or remove {self.folder} to train "
                                 "again")
            return None
        try:
            saved = models.read(last)
        except ValueError as error:
            raise ValueError(f"{error}; a copy may be put in its place, or remove {self.folder} to "
                             "train again") from error
        parts = {"facts", "rows", "best", "accuracies", "state"}
        known = {"settings", "code", "classes"}
        if not (isinstance(saved, dict) and saved.keys() >= parts
                and isinstance(saved["facts"], dict) and saved["facts"].keys() >= known):
            raise ValueError(f"{last} is no last.pt that this train.py wrote: remove "
                             f"{self.folder}, or give this run a --name of its own")
        self.check_same(saved["facts"])
        self.check_best(saved["facts"])
        self.rows, self.best = saved["rows"], saved["best"]
        self.accuracies, self.facts = saved["accuracies"], saved["facts"]
        return saved["state"]

    def check_same(self, facts):
        """Raise ValueError where `facts` are of a run of other settings, classes or photos."""
        old, ours, theirs = facts["settings"], set(self.facts["classes"]), set(facts["classes"])
        if old.get("version") != self.settings["version"]:
            raise ValueError(f"{self.folder} holds a run of version {old.get('version')} of the "
                             f"recipe, and this is {self.settings['version']}: go on with the code "
                             "that began it, give this one a --name of its own (make: RUNS=), or "
                             "remove the folder")
        digests = [settings.get("weights_digest") for settings in (old, self.settings)]
        files_of_weights = None not in digests  # the same file may be named in another way
        differ = [f"{key} {old.get(key)} there, {value} here"
                  for key, value in self.settings.items()
                  if old.get(key) != value and key not in ("data", "weights_digest")
                  and not (key == "weights" and files_of_weights)]
        if files_of_weights and digests[0] != digests[1]:
            differ.append(f"{self.recipe.weights} holds other weights now")
        if ours != theirs:
            differ.append(f"classes {data.first_names(theirs - ours)} there alone, "
                          f"{data.first_names(ours - theirs)} here alone")
        elif old.get("data") != self.settings["data"]:
            differ.append("data: the photos are others, or have changed")
        if differ:
            raise ValueError(f"{self.folder} holds a run of other settings ({'; '.join(differ)}): "
                             "repeat them to go on with it, give this one a --name of its own "
                             "(make: RUNS=), or remove the folder")
        if facts["code"] != self.facts["code"] and train.processes()[0] == 0:
            print(f"{self.folder} began with another {', '.join(DECIDES)}: what is done stays; a "
                  "--name of its own trains anew", file=sys.stderr)

    def check_best(self, facts):
        """Raise ValueError where best.pt is of another training than `facts`, of last.pt: `export`
        would overwrite weights that this run does not know."""
        best = self.folder / "best.pt"
        try:
            found = models.read(best)
        except ValueError:  # missing or damaged
            return
        if not isinstance(found, dict) or found.get("settings") != facts["settings"]:
            raise ValueError(f"{best} is of another training than {self.folder / 'last.pt'}: move "
                             "or remove it, and the one that belongs there is written again")

    def clear(self):
        """Remove what a run that was killed left half written; call it with the run's lock held."""
        for part in self.folder.glob("*.part"):
            part.unlink(missing_ok=True)

    def begin(self, network, precision):
        """Write config.json, and take result.json away, which says that a run has ended."""
        self.folder.mkdir(parents=True, exist_ok=True)
        config = dict(command=shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
                      recipe=self.settings, parameters=count_parameters(network),
                      device=next(network.parameters()).device.type,
                      precision=type_name(precision), threads=torch.get_num_threads(),
                      processes=train.processes()[1], machine=machine.facts())
        files.write(self.folder / "config.json", json.dumps(config, indent=1).encode())
        (self.folder / "result.json").unlink(missing_ok=True)

    def save(self, epoch):
        """Write what an epoch leaves, last.pt first, each file whole or not at all; say so."""
        row = rounded(epoch.row, self.recipe)
        self.rows.append(row)
        if row is self.best_row():
            plain = copy.deepcopy(models.with_looks(epoch.network, ())).eval()
            self.best = dict(plain.state_dict())
            self.facts["of_noise"] = models.said_of_noise(plain)
            self.accuracies = {row["size"]: row["val_accuracy"]}
        self.write_last(epoch.state)
        self.export()
        self.write_log()
        classes = ("" if row["val_accuracy"] == row["val_class_accuracy"] else
                   f" (classes {row['val_class_accuracy']:.2%})")
        print(f"epoch {len(self.rows):3d}/{self.recipe.epochs}  loss {row['train_loss']:.3f}  "
              f"train {row['train_accuracy']:6.2%}  val {row['val_accuracy']:6.2%}{classes}"
              f"{' *' if row is self.best_row() else '  '}  {row['images_per_second']:6,} "
              "images/s  "
              f"{clock(time_left(self.rows, self.recipe))} left", flush=True)

    def best_row(self):
        """The first row with the highest accuracy: that of the best weights."""
        return max(self.rows, key=lambda row: row["val_accuracy"])

    def write_last(self, state):
        """Write last.pt."""
        write_tensors(self.folder / "last.pt", dict(
            facts=self.facts, rows=self.rows, best=self.best, accuracies=self.accuracies,
            state=state))

    def export(self):
        """Write best.pt, an export of what last.pt holds, where it is missing or differs."""
        write_tensors(self.folder / "best.pt", models.checkpoint(
            self.best, **self.facts, epoch=self.best_row()["epoch"], accuracies=self.accuracies))

    def write_log(self):
        """Write the log, a row an epoch, and its curves."""
        text = io.StringIO()
        writer = csv.DictWriter(text, self.rows[0])
        writer.writeheader()
        writer.writerows(self.rows)
        imagenette = self.facts["classes"] == list(data.CLASSES.values())
        to_beat = REPORT.get(self.recipe.training) if imagenette else None
        try:
            files.write(self.folder / "log.csv", text.getvalue().encode())
            files.write(self.folder / "curves.png", draw_curves(self.rows, to_beat))
        except PermissionError as error:  # on Windows: somebody looks at it
            print(f"{error.filename} cannot be replaced ({error.strerror}): close what has it "
                  "open; the next epoch, or the same command, writes it", file=sys.stderr)

    def finish(self, state, val, precision):
        """Write result.json, the last file of a run. The best weights get the accuracy of all their
        looks, as val was seen at one, and in float32, as figures and scores compute; not those of a
        head, whose whole training takes less time."""
        self.export()
        key = models.looks_key(self.recipe.looks)
        if key not in self.accuracies and self.recipe.training != "head":
            network, facts = models.load(self.folder / "best.pt", val.device)
            network = models.fold_norms(network)  # as score.py does
            totals = train.evaluate(network, data.eval_batches(val, facts["size"], 64),
                                    precision._replace(dtype=None), len(facts["classes"]))
            self.accuracies[key] = round(train.val_scores(totals)["val_accuracy"], 5)
            self.write_last(state)
            self.export()
        self.write_log()
        best, last = self.best_row(), self.rows[-1]
        try:
            config = dict(json.loads((self.folder / "config.json").read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{self.folder / 'config.json'} is gone or damaged: put it back, or "
                             f"remove {self.folder} to train again") from error
        result = dict(
            best_accuracy=best["val_accuracy"], best_epoch=best["epoch"],
            last_accuracy=last["val_accuracy"], accuracies=self.accuracies,
            accuracy_on=self.facts["accuracy_on"], accuracy_n=self.facts["accuracy_n"],
            seconds=round(sum(row["seconds"] for row in self.rows), 1), **config)
        files.write(self.folder / "result.json", json.dumps(result, indent=1).encode())
        print(f"{self.folder}: best {best['val_accuracy']:.2%} (epoch {best['epoch']}), last "
              f"{last['val_accuracy']:.2%}, of photos seen at {best['size']} px")
        if key in self.accuracies and key != best["size"]:
            print(f"{self.folder}: the best at {key.replace(' ', ', ')} px, as figures and scores "
                  f"see them: {self.accuracies[key]:.2%}")


def rounded(row, recipe):
    """A row of `train.train` as the log shows it, with the size (px) at which val was seen."""
    size = train.sides(recipe, row["epoch"] - 1)[1]
    return dict(epoch=row["epoch"], size=models.looks_key([size]),
                train_loss=round(row["train_loss"], 4),
                train_accuracy=round(row["train_accuracy"], 5), val_loss=round(row["val_loss"], 4),
                val_accuracy=round(row["val_accuracy"], 5),
                val_class_accuracy=round(row["val_class_accuracy"], 5), lr=round(row["lr"], 6),
                images_per_second=round(row["images_per_second"]),
                seconds=round(row["seconds"], 2))


def time_left(rows, recipe):
    """How long the epochs to come take, s: as the last of `rows` did, by the pixels of crops.

    Of very long trainings a hundred of these epochs or more speak for all.
    """
    def pixels(epoch):
        return max(1, train.sides(recipe, epoch)[0]) ** 2  # a head has no crops

    left, done = recipe.epochs - len(rows), pixels(len(rows) - 1)
    asked = range(len(rows), recipe.epochs, max(1, left // 100))
    return rows[-1]["seconds"] * left * sum(map(pixels, asked)) / done / max(1, len(asked))


def clock(duration):
    """Seconds as "1:02:03", or, below an hour, "2:03"."""
    minutes, rest = divmod(round(duration), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def write_tensors(path, contents):
    """Write tensors and plain types, whole or not at all."""
    buffer = io.BytesIO()  # torch.save's own error on a full disk names no file
    torch.save(contents, buffer)
    files.write(path, buffer.getbuffer())


def code_digest():
    """A hash of the code that decides what a training gives; comments and layout do not count, but
    docstrings do."""
    trees = [ast.dump(ast.parse((Path(__file__).parent / name).read_text(encoding="utf-8")))
             for name in DECIDES]
    return hashlib.sha256("\n".join(trees).encode()).hexdigest()[:16]


def count_parameters(network):
    """How many parameters a network has, frozen ones too."""
    return sum(p.numel() for p in network.parameters())


def type_name(precision):
    """What autocast computes in: "bfloat16"."""
    return str(precision.dtype or torch.float32).removeprefix("torch.")


COLOURS = {"train": (0, 114, 178), "val": (213, 94, 0)}  # distinct to colour-blind eyes
SHOWN = {"train": "train, random crops", "val": "val, whole photos"}


def draw_curves(rows, to_beat=None):
    """Loss and accuracy of every epoch as two small diagrams: the bytes of a PNG.

    to_beat: an accuracy, drawn as a dashed line. Training may look worse than validation: it is
    measured on crops, and with the weights of the moment in place of their mean.
    """
    image = Image.new("RGB", (900, 380), "white")
    pen = ImageDraw.Draw(image)
    losses = [row[f"{split}_loss"] for row in rows for split in COLOURS]
    highest = math.ceil(5 * max(losses)) / 5 or 1.0  # so that ticks are multiples of 0.05
    draw_panel(pen, rows, "loss", 60, highest, "{:.2f}")
    draw_panel(pen, rows, "accuracy", 510, 1.0, "{:.0%}", to_beat)
    png = io.BytesIO()
    image.save(png, "PNG")
    return png.getvalue()


def draw_panel(pen, rows, quantity, left, highest, form, to_beat=None):
    """One diagram, whose axis goes from 0 to `highest`, with the last epoch's values beside it."""
    right, top, bottom, font = left + 320, 50, 330, ImageFont.load_default(15)

    def height(value):
        return bottom - (bottom - top) * value / highest

    pen.text((left, 16), quantity, "black", font)
    for value in (highest * tick / 4 for tick in range(5)):
        pen.line((left, height(value), right, height(value)), (225, 225, 225))
        pen.text((left - 8, height(value)), form.format(value), "black", font, anchor="rm")
    if to_beat:
        for x in range(left, right, 8):
            pen.line((x, height(to_beat), x + 4, height(to_beat)), (110, 110, 110))
        pen.text((right, height(to_beat) + 4), f"report: {to_beat:.0%}", (110, 110, 110), font,
                 anchor="ra")
    below = min(COLOURS, key=lambda split: rows[-1][f"{split}_{quantity}"])
    for place, (split, colour) in enumerate(COLOURS.items()):
        values = [row[f"{split}_{quantity}"] for row in rows]
        line = [(left + (right - left) * row["epoch"] / len(rows), height(value))
                for row, value in zip(rows, values, strict=True)]
        pen.line(line, colour, 2, joint="curve")
        x, y = line[-1]
        pen.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
        pen.text((right + 8, y), form.replace("0%", "1%").format(values[-1]), colour, font,
                 anchor="la" if split == below else "lb")  # never over the other's
        pen.text((left + 80 + 150 * place, 16), SHOWN[split], colour, font)
    pen.text((right, bottom + 8), f"epoch {rows[-1]['epoch']}", "black", font, anchor="ra")
    pen.text((left, bottom + 8), "0", "black", font)
