"""At which sizes should a network look? Scores of maps on photos of *train* that have boxes.

    python tests/looks.py runs/cnn/best.pt --boxes folder --looks 96 64,96,128 96,128

Val chooses nothing. A row for each list of sizes: does the map's maximum lie in the object more
often than the middle of the photo does, how well do its boxes fit, and how long does a photo take,
against the first list. With --mirror the maps of a photo and of its mirror image, turned back, are
averaged. Prints Markdown; per cent, 95 % intervals.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import boxes  # noqa: E402
import cam  # noqa: E402
import data  # noqa: E402
import files  # noqa: E402
import folders  # noqa: E402
import machine  # noqa: E402
import metrics  # noqa: E402
import models  # noqa: E402
import networks  # noqa: E402
import score  # noqa: E402
import tables  # noqa: E402


@torch.no_grad()
def maps_of(network, photos, size, mirror):
    """The maps (N, h, w) of the true classes of `photos`, in logits."""
    found = []
    for images, labels in data.eval_batches(photos, size, score.BATCH):
        sides = [images, images.flip(3)] if mirror else [images]
        maps = [cam.class_activation_maps(network.features(side), network.head.weight)
                for side in sides]
        mean = (maps[0] + maps[1].flip(3)) / 2 if mirror else maps[0]
        found.append(mean[range(len(images)), labels])
    return torch.cat(found)


def compare_looks(options):
    """Print a row for each list of sizes."""
    machine.keep_memory()
    folder = folders.prepare(options.data)
    boxed, missing = boxes.load_boxes(folder, options.boxes, folders.load(folder, "val"))
    if len(boxed) < 2:
        raise ValueError(f"{missing}; looks are chosen on photos of train: name boxes of them")
    train, truth = boxed[1]
    rows = [["looks, px", "n", "pointing", "minus square", "MaxBoxAccV2", "minus square", "time"]]
    first = None
    for sizes in options.looks:
        ((network, facts),) = networks.load_networks([options.model], [sizes])
        photos = train.relabelled(facts["classes"])
        started = time.time()
        maps = maps_of(models.fold_norms(network), photos, facts["size"], options.mirror)
        seconds = time.time() - started
        first = first or seconds
        own = score.localisation(maps[None], truth, len(truth))
        centred = metrics.centred_square(len(truth), 64)[None]
        square = score.localisation(centred, truth, len(truth), same=True)
        cells = [[str(own[name]), str(metrics.difference(own[name], square[name]))]
                 for name in ("pointing game", "MaxBoxAccV2, cross-fitted")]
        rows.append([", ".join(map(str, sizes)), f"{len(truth):,}", *cells[0], *cells[1],
                     f"{seconds / first:.1f}"])
    print(tables.write_table(rows, "markdown"), end="")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", type=files.path, help="checkpoint")
    add("--data", type=files.path, default="data/imagenette2-160", help="folder or archive")
    add("--boxes", type=files.path, required=True,
        help="folder of localization.txt and image_sizes.txt")
    add("--looks", nargs="+", type=files.sizes, required=True,
        help="lists of sizes in px, with commas")
    add("--mirror", action="store_true", help="average with the mirror image")
    files.run_command(compare_looks, parser.parse_args())


if __name__ == "__main__":
    main()
