"""Trained networks, to be asked what they see in photos and where.

    loaded = networks.load_networks(["runs/cnn/best.pt"])        # checkpoints
    loaded = networks.load_networks(["resnet18"])                # torchvision's, of ImageNet
    for network, facts in loaded:
        maps, logits, probabilities = networks.predict_with_maps(network, facts, photos)
        print(networks.describe(facts))                          # cnn, ..., right on 91.1% of ...

Copy cam.py, models.py, data.py and files.py with it.
"""

import difflib
import sys
import unicodedata
from pathlib import Path

import torch

import cam
import data
import files
import models


def add_options(parser):
    """Add to a parser what `load_networks` takes beside the networks' names."""
    add_looks_option(parser)
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps or auto")
    parser.add_argument("--weights", action="append", metavar="FILE", type=files.path,
                        help="of a network of torchvision's, its last layer with them; without it "
                        "ImageNet's; repeat it for several")
    parser.add_argument("--names", metavar="FILE", type=files.path,
                        help="names of its classes, a line each; without it ImageNet's, or numbers")


def add_looks_option(parser):
    """Add --looks to a parser: tuples of sizes, as `load_networks` takes them, or None."""
    parser.add_argument("--looks", nargs="+", metavar="SIZES", type=files.sizes,
                        help="sizes in px at which networks look at a photo, averaged: 224,320, "
                        "one list for all or one per checkpoint; without it, their own")


# ---------------------------------------------------------------- networks by file or name


def load_networks(paths, looks=None, device="cpu", weights=None, names=None):
    """Networks of the same classes in any order: [(network, facts), ...].

    paths: checkpoints, or names of torchvision's networks. looks: one list of sizes (px) for all,
    or one for each; None: their own. weights, names: of `load_from_torchvision`, the former a list,
    one for each name among the paths. Raises ValueError.
    """
    looks = looks or [None]
    if len(looks) not in (1, len(paths)):
        raise ValueError(f"--looks has {len(looks)} lists for {len(paths)} checkpoints: give one, "
                         "or one for each")
    looks = list(looks) * len(paths) if len(looks) == 1 else looks
    by_name = [path for path in paths if is_name(path)]
    for path in map(Path, paths):
        if path.name == str(path) and not (is_name(path) or path.exists() or path.suffix):
            near = difflib.get_close_matches(path.name, models.classifiers())
            raise ValueError(f"there is no file and no network of torchvision's called {path}: "
                             f"there are {', '.join(near or ['resnet18', 'mobilenet_v2'])}, ...")
    if weights and len(weights) != len(by_name) or names and not by_name:
        raise ValueError(f"--weights and --names are for networks of torchvision's, and "
                         f"{len(by_name)} are named: say --model resnet18, with one --weights for "
                         "each")
    weights = iter(weights or [None] * len(by_name))
    loaded = [load_from_torchvision(str(path), next(weights), names, sizes, device) if is_name(path)
              else models.load(path, device, looks=sizes)
              for path, sizes in zip(paths, looks, strict=True)]
    for path, (network, facts) in zip(paths, loaded, strict=True):
        if "how" not in facts:
            raise ValueError(f"{path} does not say how it was trained: use a checkpoint of "
                             "train.py (runs/*/best.pt)")
        check_numbers(path, network, facts)
        check_same_classes(path, facts["classes"], paths[0], loaded[0][1]["classes"])
        check_smallest_look(path, network, min(facts["looks"]))
    return loaded


def is_name(path):
    """Whether a path is no file's, but the name of a classifier of torchvision's."""
    return str(path) in models.classifiers() and not Path(path).is_file()


def load_from_torchvision(arch, weights=None, names=None, looks=None, device="cpu"):
    """torchvision's network `arch` with the last layer it was trained with: as of `models.load`.

    weights: a file, or torchvision's name of them; None: its best of ImageNet, downloaded.
    names: a file of the classes' names, a line each. looks: sizes in px; None: that at which
    torchvision evaluates it. Raises ValueError.
    """
    arch = str(arch)  # of a command line's paths
    by_name = models.named_weights(weights or "imagenet", arch)
    entry = by_name or models.named_weights("imagenet", arch)
    network = models.build(arch, None, entry.name if by_name else weights)
    evaluation = entry.transforms()
    looks = sorted(looks or evaluation.crop_size)
    how = f"torchvision's {entry.name}" if by_name else f"weights of {Path(weights).name}"
    facts = dict(arch=arch, mean=tuple(evaluation.mean), std=tuple(evaluation.std), looks=looks,
                 size=looks[-1], accuracy=None, accuracies={}, how=how,
                 classes=class_names(network.head.out_features, names, entry, weights))
    return models.with_looks(network, looks).to(device).eval(), facts


def class_names(count, names, entry, source):
    """The names of `count` classes: of the file `names`, of torchvision's weights, or numbers."""
    if names:
        try:
            text = names.read_text(encoding="utf-8-sig")
        except (ValueError, OSError) as error:
            raise ValueError(f"{names} is no text in UTF-8 that can be read: name a file with a "
                             "name a line (--names)") from error
        found = [unicodedata.normalize("NFC", line.strip()) for line in text.splitlines()
                 if line.strip()]
        if len(found) != count:
            raise ValueError(f"{names} names {len(found):,} classes, and {source or entry.name} "
                             f"has {count:,}: write a name a line")
        return found
    if count != len(entry.meta["categories"]):
        return [f"class {k}" for k in range(count)]
    if source and str(source) != entry.name:
        print(f"{source}: its {count:,} classes are called as ImageNet's; --names gives others",
              file=sys.stderr)
    return list(entry.meta["categories"])


def class_index(name, classes):
    """The place of a class among `classes`, by its name or its number. Raises ValueError."""
    name = unicodedata.normalize("NFC", name)
    found = ([k for k, known in enumerate(classes) if known == name]
             or [k for k, known in enumerate(classes) if known.casefold() == name.casefold()])
    if len(found) > 1:
        raise ValueError(f"{name!r} is the name of classes {', '.join(map(str, found))}: say a "
                         "number")
    if not found and name.isdecimal() and int(name) < len(classes):
        found = [int(name)]
    if not found:
        near = list(classes)
        if len(near) > 20:
            near = [*(difflib.get_close_matches(name, classes, 5) or classes[:20]), "..."]
        raise ValueError(f"there is no class {name!r}: the networks know {', '.join(near)}")
    return found[0]


def check_numbers(path, network, facts):
    """Raise ValueError where a network has weights that are no numbers, or no two classes."""
    of = f"{path} ({facts['how']})"
    if not all(weights.isfinite().all() for weights in network.state_dict().values()):
        raise ValueError(f"{of} holds NaN or infinity among its weights: train it anew, or name "
                         "another file")
    check_outputs(of, network.head.out_features)


def check_outputs(name, count):
    """Raise ValueError where what is called `name` has fewer than two outputs."""
    if count < 2:
        raise ValueError(f"{name} has one output, which softmax makes 100 % for every photo: give "
                         "it an output for each of two classes")


def check_same_classes(path, classes, first_path, first_classes):
    """Raise ValueError unless two checkpoints know the same classes, in any order."""
    lacks, has = set(first_classes) - set(classes), set(classes) - set(first_classes)
    if lacks or has:
        raise ValueError(f"{path} knows other classes than {first_path} (without "
                         f"{data.first_names(lacks)}, but with {data.first_names(has)}): compare "
                         "networks of the same classes")


@torch.no_grad()
def check_smallest_look(path, network, size):
    """Raise ValueError where a network halves photos of `size` px until nothing is left."""
    weight = network.head.weight
    try:
        models.with_looks(network, [size])(weight.new_zeros(1, 3, size, size))
    except RuntimeError as error:
        raise ValueError(f"{path} cannot look at {size} x {size} px: name larger "
                         "--looks") from error


def seen_in_training(facts, photos):
    """How many of `photos` the network of `facts` was trained on, byte for byte; 0 where it does
    not say."""
    trained_on = set(facts.get("trained_on", ()))
    return sum(digest in trained_on for digest in photos.digests)


def val_fingerprint(facts):
    """`data.Photos.fingerprint` of the photos that a checkpoint was validated on; None: unknown."""
    return (facts.get("settings", {}).get("data") or [None])[-1]


def describe(facts):
    """A checkpoint in a line: what it is, how it was trained, its looks, how often it is right."""
    name = f"{facts['arch']}, {facts['how']}, at {', '.join(map(str, facts['looks']))} px"
    accuracy, at = facts["accuracy"], ""
    if accuracy is None and facts.get("accuracies"):  # it is known of other looks
        (looks, accuracy), *_ = facts["accuracies"].items()
        at = f" at {', '.join(looks.split())} px"
    if accuracy is None:
        return f"{name}: accuracy not measured"
    split = facts.get("accuracy_on") or "val"
    measured = f"{facts['accuracy_n']:,} {split} photos" if facts.get("accuracy_n") else split
    return f"{name}: right on {accuracy:.1%} of {measured}{at}"


# ---------------------------------------------------------------- predictions


def normalised(images, facts):
    """Images (N, 3, H, W) of data.py, normalised as the network of `facts` knows them."""
    mean, std = facts.get("mean", data.MEAN), facts.get("std", data.STD)
    if (tuple(mean), tuple(std)) == (data.MEAN, data.STD):
        return images
    mean, std, own_mean, own_std = (images.new_tensor(values)[:, None, None]
                                    for values in (mean, std, data.MEAN, data.STD))
    return (images * own_std + own_mean - mean) / std


def predict_with_maps(network, facts, photos):
    """What a network, of any device, float type and mode, says of N photos, each seen whole.

    facts["size"]: px, at which it sees them. photos: a list of (H, W, 3) uint8.
    Returns maps (N, K, h, w), logits (N, K), probabilities (N, K), on the CPU, float32 or finer.
    Raises ValueError: its maps do not explain its logits, or it has no probabilities.
    """
    network = getattr(network, "module", network)  # of DataParallel
    weight, predicted = next(network.parameters()), []
    for photo in photos:  # one by one: sizes differ, and a photo can be large
        alone = data.from_arrays([photo]).to(weight.device)
        ((images, _),) = data.eval_batches(alone, facts["size"], 1)
        images = normalised(images, facts).to(weight.dtype)
        predicted.append([values.cpu() for values in cam.explain(network, images)])
    maps, logits = (torch.cat(values) for values in zip(*predicted, strict=True))
    check_outputs("the network", logits.shape[1])
    precise = torch.promote_types(logits.dtype, torch.float32)
    maps, logits = maps.to(precise), logits.to(precise)
    return maps, logits, logits.softmax(1)
