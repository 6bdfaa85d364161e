"""Where on a photo does a cell of the map lie? Plain upsampling puts cell i of a stride-s network at s*i + (s-1)/2 px;
the receptive field of a ResNet's cell is centred near s*i. Measured three ways, with and without moving the map:

    python tests/cell_position.py runs/mobilenet_v2/best.pt runs/cnn/best.pt --boxes FOLDER

1. the centre of mass of the gradient that the middle cells send back to the pixels (effective receptive field),
2. how far the map of a photo and that of its mirror image, mirrored back, lie apart, in shares of their spread,
3. scores on val (MaxBoxAccV2, cross-fitted on train's boxes too; pointing game at pixel resolution).
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cam  # noqa: E402
import data  # noqa: E402
import models  # noqa: E402
import score  # noqa: E402


def shifted(maps, size, shift):
    """Maps (N, h, w) at (N, size, size), bilinear, each cell `shift` cells up and left of the plain position."""
    cells = maps.shape[1]
    at = ((torch.arange(size) + 0.5) / size * cells + shift) / cells * 2 - 1  # -1..1 over the cells' edges
    grid = torch.stack(torch.meshgrid(at, at, indexing="ij")[::-1], -1).expand(len(maps), -1, -1, -1)
    return F.grid_sample(maps[:, None], grid, padding_mode="border", align_corners=False)[:, 0]


def receptive_centre(network, images):
    """How far, in pixels (y, x), the gradient's centre of mass lies from the plain position, mean over middle cells."""
    size, offsets = images.shape[2], []
    cells = network.features(images[:1]).shape[2]
    stride = size / cells
    for i in range(cells // 2 - 1, cells // 2 + 1):
        x = images.clone().requires_grad_()
        network.features(x)[:, :, i, i].sum().backward()
        weight = x.grad.abs().sum((0, 1))
        pixels = torch.arange(size)
        centre = torch.stack([(weight.sum(1) * pixels).sum(), (weight.sum(0) * pixels).sum()]) / weight.sum()
        offsets.append(centre - ((i + 0.5) * stride - 0.5))
    return torch.stack(offsets).mean(0).tolist(), stride


@torch.no_grad()
def true_maps(network, photos, size, mirrored=False):
    maps = []
    for x, labels in data.eval_batches(photos, size, 25):
        features = network.features(x.flip(3) if mirrored else x)
        maps.append(cam.class_activation_maps(features, network.head.weight)[range(len(labels)), labels])
    return torch.cat(maps)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--data", default="data/imagenette2-160")
    parser.add_argument("--boxes", required=True)
    options = parser.parse_args()
    try:
        compare_positions(options.models, data.prepare(options.data), options.boxes)
    except (cam.CamError, data.DataError, models.ModelError, score.ScoreError, OSError) as error:
        print(f"cell_position.py: {error}", file=sys.stderr)
        sys.exit(2)


def compare_positions(paths, folder, boxes_folder):
    """Print, for each of the checkpoints `paths`, what moving its cells changes."""
    boxed, missing = score.load_boxes(folder, boxes_folder, data.load(folder, "val"))
    if len(boxed) < 2:
        raise score.ScoreError(f"{missing}; name boxes of train too")
    of_split = dict(zip(("val", "train"), boxed, strict=True))
    truth = {split: boxes for split, (_, boxes) in of_split.items()}
    for path in paths:
        ((network, facts),) = cam.load_models([path])
        photos = {split: some.relabelled(facts["classes"]) for split, (some, _) in of_split.items()}
        images, _ = next(data.eval_batches(photos["val"], facts["size"], 32))
        (y, x), stride = receptive_centre(network, images)
        print(f"{path}: size {facts['size']}, stride {stride:g}; the gradient's centre is ({y:+.1f}, {x:+.1f}) px off")
        maps = {split: true_maps(network, some, facts["size"]) for split, some in photos.items()}
        mirror = true_maps(network, photos["val"], facts["size"], mirrored=True)
        for shift in (0.0, (stride - 1) / 2 / stride):
            large = {split: shifted(m, score.SIZE, shift) for split, m in maps.items()}
            back = shifted(mirror, score.SIZE, shift).flip(2)
            apart = ((large["val"] - back).abs().mean((1, 2)) / large["val"].std((1, 2))).mean()
            both = torch.cat([large["val"], large["train"]])
            ious = score.best_iou_per_threshold(both, truth["val"] + truth["train"])
            box = score.cross_fitted_interval(ious, len(large["val"]))
            pointing = score.mean_interval(score.pointing_game(large["val"], truth["val"]))
            print(f"  moved {shift * stride:4.1f} px up and left: mirror images differ by {apart:.3f}; "
                  f"MaxBoxAccV2 {box} %, pointing {pointing} %")


if __name__ == "__main__":
    main()
