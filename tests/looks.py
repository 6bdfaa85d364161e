"""At which sizes should a network look? Accuracy on val, scores of maps, and what they cost.

    python tests/looks.py runs/cnn/best.pt --boxes folder --looks 96 64,96,128 96,128
    python tests/looks.py runs/a/best.pt runs/b/best.pt --boxes folder --looks 224 320 224,320

A row for each list of sizes, and for each of the checkpoints, which share their features and
differ in the head alone. Does the map's maximum lie in the object, how well do its boxes fit, how
much of what it adds lies there; each minus the first row's, on the same photos. Sizes are chosen on
the photos of *train* that have boxes, and reported on val's and on all. With --mirror the features
of a photo and of its mirror image, turned back, are averaged. Prints Markdown; per cent, 95 %
intervals; the seconds are those of val, for one photo.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import boxes  # noqa: E402
import cam  # noqa: E402
import files  # noqa: E402
import folders  # noqa: E402
import machine  # noqa: E402
import metrics  # noqa: E402
import models  # noqa: E402
import networks  # noqa: E402
import score  # noqa: E402
import tables  # noqa: E402

SCORES = "pointing game", "MaxBoxAccV2, cross-fitted", "share in the box"


@torch.no_grad()
def features_of(network, photos, facts, mirror=False):
    """Yields the features (B, C, h, w) and labels (B,) of `photos`, batch after batch."""
    for images, labels in score.batches_of(photos, facts):
        features = network.features(images)
        if mirror:
            features = (features + network.features(images.flip(3)).flip(3)) / 2
        yield features, labels


@torch.no_grad()
def maps_of(network, photos, facts, mirror, heads=None):
    """The maps (heads, N, h, w) of the true classes of `photos`, in logits."""
    found = []
    for features, labels in features_of(network, photos, facts, mirror):
        maps = [cam.class_activation_maps(features, head.weight)[range(len(labels)), labels]
                for head in heads or [network.head]]
        found.append(torch.stack(maps))
    return torch.cat(found, 1)


@torch.no_grad()
def right_about(network, photos, facts, mirror, heads):
    """Which of `photos` each head is right about, (heads, N), and the seconds that a photo took."""
    started, found = time.time(), []
    for features, labels in features_of(network, photos, facts, mirror):
        vectors = features.mean((2, 3))
        found.append(torch.stack([head(vectors).argmax(1) == labels for head in heads]))
    return torch.cat(found, 1).float(), (time.time() - started) / len(photos)


def load(paths, sizes):
    """The network that looks at `sizes`, the heads of all `paths`, and its facts. ValueError where
    their features are not the same."""
    (network, facts), *others = networks.load_networks(paths, [sizes] * len(paths))
    own = network.features.state_dict()
    for path, (other, other_facts) in zip(paths[1:], others, strict=True):
        theirs = other.features.state_dict()
        if own.keys() != theirs.keys() or not all(torch.equal(own[k], theirs[k]) for k in own):
            raise ValueError(f"{path} has other features than {paths[0]}: compare heads alone")
        if facts["classes"] != other_facts["classes"]:
            raise ValueError(f"{path} has other classes than {paths[0]}")
    return models.fold_norms(network), [network.head, *(other.head for other, _ in others)], facts


def with_difference(own, first):
    """The cells of a score, and of what it has more than the first row's."""
    return [str(own), "" if own is first else str(metrics.difference(own, first))]


def compare_looks(options):
    """Print two tables: accuracy and seconds; and scores of maps."""
    machine.keep_memory()
    folder = folders.prepare(options.data)
    val = folders.load(folder, "val")
    boxed, missing = boxes.load_boxes(folder, options.boxes, val)
    if len(boxed) < 2:
        raise ValueError(f"{missing}; looks are chosen on photos of train: name boxes of them")
    of_val, of_train = boxed
    sets = {f"train's {len(of_train[1])}": slice(len(of_val[1]), None),
            f"val's {len(of_val[1])}": slice(0, len(of_val[1])), "all": slice(None)}
    truth = of_val[1] + of_train[1]
    rows = [["looks, px", "head", "right", "minus first", "seconds"]]
    tables_of = {name: [["looks, px", "head", *(cell for score_name in SCORES
                         for cell in (score_name, "minus first"))]] for name in sets}
    first = {}
    for sizes in options.looks:
        network, heads, facts = load(options.models, sizes)
        photos = [found.relabelled(facts["classes"]) for found in (val, of_val[0], of_train[0])]
        right, seconds = right_about(network, photos[0], facts, options.mirror, heads)
        maps = torch.cat([maps_of(network, found, facts, options.mirror, heads)
                          for found in photos[1:]], 1)
        for number, (of_head, right_of_head) in enumerate(zip(maps, right, strict=True), 1):
            label = [", ".join(map(str, sizes)), str(number)]
            own = metrics.mean_interval(right_of_head)
            rows.append([*label, *with_difference(own, first.setdefault("right", own)),
                         f"{seconds:.4f}"])
            print(" | ".join(rows[-1]), file=sys.stderr)
            for name, part in sets.items():
                found = score.localisation(of_head[None, part], truth[part], len(truth[part]))
                cells = [cell for score_name in SCORES for cell in with_difference(
                    found[score_name], first.setdefault((name, score_name), found[score_name]))]
                tables_of[name].append([*label, *cells])
    print(tables.write_table(rows, "markdown"))
    for name, table in tables_of.items():
        print(f"Photos with boxes: {name}\n\n" + tables.write_table(table, "markdown"))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("models", type=files.path, nargs="+", help="checkpoints; of several, heads differ alone")
    add("--data", type=files.path, default=folders.IMAGENETTE, help="folder or archive")
    add("--boxes", type=files.path, required=True,
        help="folder of localization.txt and image_sizes.txt")
    add("--looks", nargs="+", type=files.sizes, required=True,
        help="lists of sizes in px, with commas")
    add("--mirror", action="store_true", help="average with the mirror image")
    files.run_command(compare_looks, parser.parse_args())


if __name__ == "__main__":
    main()
