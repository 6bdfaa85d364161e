"""Where on a photo does a cell of the map lie?

    python tests/cell_position.py runs/mobilenet_v2/best.pt runs/cnn/best.pt --boxes FOLDER

Plain upsampling puts cell i of a stride-s network at s*i + (s-1)/2 px; the receptive field of a
ResNet's cell is centred near s*i. Measured three ways, with and without moving the map:

1. the centre of mass of the gradient that the middle cells send back to the pixels (effective
   receptive field),
2. how far the map of a photo and that of its mirror image, mirrored back, lie apart, in shares of
   their spread,
3. scores on val (MaxBoxAccV2, cross-fitted with boxes of train; pointing game on all pixels).
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import boxes  # noqa: E402
import cam  # noqa: E402
import data  # noqa: E402
import files  # noqa: E402
import folders  # noqa: E402
import metrics  # noqa: E402
import networks  # noqa: E402


def shifted(maps, size, shift):
    """Maps (N, h, w) at (N, size, size), bilinear, each cell `shift` cells up and left."""
    cells = maps.shape[1]
    cell = (torch.arange(size) + 0.5) / size * cells + shift
    at = cell / cells * 2 - 1  # -1 to 1 over the cells' edges
    grid = torch.stack(torch.meshgrid(at, at, indexing="ij")[::-1], -1)
    grid = grid.expand(len(maps), -1, -1, -1)
    return F.grid_sample(maps[:, None], grid, padding_mode="border", align_corners=False)[:, 0]


def receptive_centre(network, images):
    """The gradient's centre of mass, px (y, x) from the plain position, mean over middle cells."""
    size, offsets = images.shape[2], []
    cells = network.features(images[:1]).shape[2]
    stride = size / cells
    for i in range(cells // 2 - 1, cells // 2 + 1):
        x = images.clone().requires_grad_()
        network.features(x)[:, :, i, i].sum().backward()
        weight = x.grad.abs().sum((0, 1))
        pixels = torch.arange(size)
        centre = torch.stack([(weight.sum(side) * pixels).sum() for side in (1, 0)]) / weight.sum()
        offsets.append(centre - ((i + 0.5) * stride - 0.5))
    return torch.stack(offsets).mean(0).tolist(), stride


@torch.no_grad()
def true_maps(network, photos, size, mirrored=False):
    maps = []
    for x, labels in data.eval_batches(photos, size, 25):
        features = network.features(x.flip(3) if mirrored else x)
        of_all = cam.class_activation_maps(features, network.head.weight)
        maps.append(of_all[range(len(labels)), labels])
    return torch.cat(maps)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=files.path)
    parser.add_argument("--data", type=files.path, default=folders.IMAGENETTE)
    parser.add_argument("--boxes", type=files.path, required=True)
    options = parser.parse_args()
    files.run_command(compare_positions, options.models, options.data, options.boxes)


def compare_positions(paths, source, boxes_folder):
    """Print, for each of the checkpoints `paths`, what moving its cells changes."""
    folder = folders.prepare(source)
    boxed, missing = boxes.load_boxes(folder, boxes_folder, folders.load(folder, "val"))
    if len(boxed) < 2:
        raise ValueError(f"{missing}; name boxes of train too")
    of_split = dict(zip(("val", "train"), boxed, strict=True))
    truth = {split: of_photos for split, (_, of_photos) in of_split.items()}
    for path in paths:
        ((network, facts),) = networks.load_networks([path])
        photos = {split: some.relabelled(facts["classes"])
                  for split, (some, _) in of_split.items()}
        images, _ = next(iter(data.eval_batches(photos["val"], facts["size"], 32)))
        (y, x), stride = receptive_centre(network, images)
        print(f"{path}: size {facts['size']}, stride {stride:g}; the gradient's centre is "
              f"({y:+.1f}, {x:+.1f}) px off")
        maps = {split: true_maps(network, some, facts["size"]) for split, some in photos.items()}
        mirror = true_maps(network, photos["val"], facts["size"], mirrored=True)
        for shift in (0.0, (stride - 1) / 2 / stride):
            large = {split: shifted(m, metrics.SIZE, shift) for split, m in maps.items()}
            back = shifted(mirror, metrics.SIZE, shift).flip(2)
            apart = ((large["val"] - back).abs().mean((1, 2)) / large["val"].std((1, 2))).mean()
            both = torch.cat([large["val"], large["train"]])
            ious = metrics.best_iou_per_threshold(both, truth["val"] + truth["train"])
            box = metrics.cross_fitted_interval(ious, len(large["val"]))
            pointing = metrics.mean_interval(metrics.pointing_game(large["val"], truth["val"]))
            print(f"  moved {shift * stride:4.1f} px up and left: mirror images differ by "
                  f"{apart:.3f}; MaxBoxAccV2 {box} %, pointing {pointing} %")


if __name__ == "__main__":
    main()
