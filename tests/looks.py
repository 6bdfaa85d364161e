"""At which sizes should a network look? Scores of maps on photos of *train* that have boxes: val chooses nothing.

    python tests/looks.py runs/cnn/best.pt --boxes folder --looks 96 64,96,128 96,128

A row for each list of sizes: does the map's maximum lie in the object more often than the middle of the photo does, how
well do its boxes fit, and how long does a photo take, against the first list. With --mirror the maps of a photo and of
its mirror image, turned back, are averaged. Prints Markdown; per cent, 95 % intervals.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cam  # noqa: E402
import data  # noqa: E402
import models  # noqa: E402
import score  # noqa: E402


@torch.no_grad()
def maps_of(network, photos, size, mirror):
    """The maps (N, h, w) of the true classes of `photos`, in logits."""
    found = []
    for images, part in score.batches(photos, size):
        sides = [images, images.flip(3)] if mirror else [images]
        maps = [cam.class_activation_maps(network.features(side), network.head.weight) for side in sides]
        mean = (maps[0] + maps[1].flip(3)) / 2 if mirror else maps[0]
        found.append(mean[torch.arange(len(images)), photos.labels[part]])
    return torch.cat(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint")
    parser.add_argument("--data", default="data/imagenette2-160", help="folder or archive")
    parser.add_argument("--boxes", required=True, help="folder of localization.txt and image_sizes.txt")
    parser.add_argument("--looks", nargs="+", required=True, help="lists of sizes in px, with commas")
    parser.add_argument("--mirror", action="store_true", help="average with the mirror image")
    options = parser.parse_args()
    models.keep_memory()
    try:
        folder = data.prepare(options.data)
        boxed, missing = score.load_boxes(folder, options.boxes, data.load(folder, "val"))
        if len(boxed) < 2:
            raise score.ScoreError(f"{missing}; looks are chosen on photos of train: name boxes of them")
        rows, first = [["looks, px", "n", "pointing", "minus square", "MaxBoxAccV2", "minus square", "time"]], None
        for sizes in cam.parse_looks(options.looks):
            ((network, facts),) = cam.load_models([options.model], [sizes])
            photos, boxes = boxed[1][0].relabelled(facts["classes"]), boxed[1][1]
            started = time.time()
            maps = maps_of(models.fold_norms(network), photos, facts["size"], options.mirror)
            seconds = time.time() - started
            first = first or seconds
            scores, square = (score.localisation(kind[None], boxes, len(boxes))
                              for kind in (maps, score.centred_square(len(maps), 64)))
            cells = [[str(scores[name]), str(score.difference(scores[name], square[name]))]
                     for name in ("pointing game", "MaxBoxAccV2, cross-fitted")]
            rows.append([", ".join(map(str, sizes)), f"{len(boxes):,}", *cells[0], *cells[1], f"{seconds / first:.1f}"])
        print(score.write_table(rows, "markdown"), end="")
    except (cam.CamError, data.DataError, models.ModelError, score.ScoreError, OSError) as error:
        print(f"looks.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
