"""Trained networks, to be asked what they see in photos and where.

    loaded = networks.load_networks(["runs/resnet18/best.pt", "runs/cnn/best.pt"])
    for network, facts in loaded:
        maps, logits, probabilities = networks.predict_with_maps(network, facts, photos)
        print(networks.describe(facts))                          # cnn, ..., 91.1% of ... right

Copy cam.py, models.py, data.py and files.py with it.
"""

import contextlib

import torch

import data
import files
import models
from cam import MapsAndLogits, check_identity


def add_looks_option(parser):
    """Add --looks to a parser: tuples of sizes, as `load_networks` takes them, or None."""
    parser.add_argument("--looks", nargs="+", metavar="SIZES", type=files.sizes,
                        help="sizes in px at which networks look at a photo, averaged: 224,320, "
                        "one list for all or one per checkpoint; without it, their own")


def parse_looks(looks):
    """What --looks gave, which its type has parsed."""
    return looks


# ---------------------------------------------------------------- checkpoints


def load_networks(paths, looks=None, device="cpu"):
    """The checkpoints `paths`, of the same classes in any order: [(network, facts), ...].

    looks: one list of sizes (px) for all, or one for each; None: their own.
    Raises ValueError.
    """
    looks = looks or [None]
    if len(looks) not in (1, len(paths)):
        raise ValueError(f"--looks has {len(looks)} lists for {len(paths)} checkpoints: give one, "
                         "or one for each")
    looks = list(looks) * len(paths) if len(looks) == 1 else looks
    loaded = [models.load(path, device, looks=sizes)
              for path, sizes in zip(paths, looks, strict=True)]
    for path, (network, facts) in zip(paths, loaded, strict=True):
        if missing := {"size", "looks", "accuracy", "how"} - facts.keys():
            raise ValueError(f"{path} does not say its {min(missing)}: use a checkpoint of "
                             "train.py (runs/*/best.pt)")
        check_same_classes(path, facts["classes"], paths[0], loaded[0][1]["classes"])
        check_smallest_look(path, network, min(facts["looks"]))
    return loaded


def check_same_classes(path, classes, first_path, first_classes):
    """Raise ValueError unless two checkpoints know the same classes, in any order."""
    lacks, has = set(first_classes) - set(classes), set(classes) - set(first_classes)
    if lacks or has:
        lacks, has = (", ".join(sorted(names)[:3]) or "none" for names in (lacks, has))
        raise ValueError(f"{path} knows other classes than {first_path} (without {lacks}, ..., but "
                         f"with {has}, ...): compare networks of the same classes")


@torch.no_grad()
def check_smallest_look(path, network, size):
    """Raise ValueError where a network halves photos of `size` px until nothing is left."""
    weight = network.head.weight
    try:
        models.with_looks(network, [size])(weight.new_zeros(1, 3, size, size))
    except RuntimeError as error:
        raise ValueError(f"{path} cannot look at {size} x {size} px: name larger "
                         "--looks") from error


def describe(facts):
    """A checkpoint in a line: what it is, how it was trained, its looks, how often it is right."""
    name = f"{facts['arch']}, {facts['how']}, at {', '.join(map(str, facts['looks']))} px"
    if facts["accuracy"] is None:
        return f"{name}: accuracy not measured"
    split = facts.get("accuracy_on") or "val"
    measured = f"{facts['accuracy_n']:,} {split} photos" if facts.get("accuracy_n") else split
    return f"{name}: {facts['accuracy']:.1%} of {measured} right"


# ---------------------------------------------------------------- predictions


@contextlib.contextmanager
def evaluating(network):
    """`network` in evaluation mode; each of its modules goes back to its own mode afterwards."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def predict_with_maps(network, facts, photos):
    """What a network, of any device, float type and mode, says of N photos, each seen whole.

    facts["size"]: px, at which it sees them. photos: a list of (H, W, 3) uint8.
    Returns maps (N, K, h, w), logits (N, K), probabilities (N, K), on the CPU, float32 or finer.
    Raises ValueError: its maps do not explain its logits, or it has no probabilities.
    """
    network = getattr(network, "module", network)  # of DataParallel
    if not hasattr(network, "features") or not hasattr(network, "head"):
        raise ValueError(f"a {type(network).__name__} has no maps: it needs `features` and a "
                         "linear `head`, as a CAMNet has (models.py)")
    maps, logits = [], []
    with evaluating(network):
        for photo in photos:  # one by one: sizes differ, and a photo can be large
            ((images, _),) = data.eval_batches(data.from_arrays([photo]), facts["size"], 1)
            images = images.to(network.head.weight)  # its device and its float type
            maps.append(MapsAndLogits(network)(images)[0].cpu())
            logits.append(network(images).cpu())  # by its own forward, which the identity checks
    maps, logits, bias = torch.cat(maps), torch.cat(logits), network.head.bias
    check_identity(maps, logits, None if bias is None else bias.cpu())
    if logits.shape[1] < 2:
        raise ValueError("the network has one output, which softmax makes 100 % for every photo: "
                         "give it an output for each of two classes")
    precise = torch.promote_types(logits.dtype, torch.float32)
    maps, logits = maps.to(precise), logits.to(precise)
    return maps, logits, logits.softmax(1)
