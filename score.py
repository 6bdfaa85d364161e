"""Where did the network look, and is that where the object is? Scores of maps, with their 95 % intervals.

    python score.py runs/resnet18/best.pt runs/cnn/best.pt --boxes FOLDER     one table for both networks

In code:

    boxes = read_boxes("localization.txt", "image_sizes.txt")                 # {name: (n, 4)}
    ious = best_iou_per_threshold(maps, [boxes[name] for name in names])      # (N, T)
    value, low, high, *_ = cross_fitted_interval(ious)                        # MaxBoxAccV2

Maps are (N, h, w) float32, one class per photo, signed, in logits, and cover the whole photo. Boxes are a list of N
tensors (n, 4), x0, y0, x1, y1 as fractions of the photo's width and height, which fit every copy of the photo,
squashed ones included. "Per photo" means (N,), to be handed to `mean_interval`; all scores are shares, 0 to 1.
The functions know no network: copy this file alone and they work. The command wants the other files beside it.
"""

import argparse
import csv
import io
import json
import math
import os
import re
import shlex
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_iou
from torchvision.transforms.functional import gaussian_blur

SIZE = 224  # maps meet boxes on a grid of SIZE x SIZE cells, as in Choe et al. 2020
THRESHOLDS = torch.arange(100) / 100  # of maps that run from 0 to 1
IOUS = (0.3, 0.5, 0.7)  # of MaxBoxAccV2
Z = 1.959964  # 95 % of a normal distribution lie within Z standard deviations
SEEDS, T = 5, 2.776445  # networks with random weights; the same for Student's t of SEEDS - 1 degrees of freedom


class ScoreError(Exception):
    """Something the user can mend; the message is one sentence that says what and how."""


# ---------------------------------------------------------------- means and their intervals


class Estimate(NamedTuple):
    """A mean over photos and its 95 % interval, all of them shares (differences: -1 to 1)."""

    value: float
    low: float | None  # None: there is no interval that holds
    high: float | None
    n: int  # photos
    per_photo: torch.Tensor | None = None  # (N,), what `difference` pairs

    def __str__(self):
        interval = "" if self.low is None else f" [{100 * self.low:.1f}, {100 * self.high:.1f}]"
        return f"{100 * self.value:.1f}{interval}"  # per cent


def wilson_interval(share, n):
    """The 95 % interval (low, high) of a share of n photos, which holds near 0 and 1 too (Wilson 1927)."""
    if not (0 <= share <= 1 and n > 0):
        raise ScoreError(f"{share} of {n} photos is no share: score at least one photo")
    centre, half = share + Z * Z / (2 * n), Z * math.sqrt(share * (1 - share) / n + (Z / (2 * n)) ** 2)
    return max(0.0, (centre - half) / (1 + Z * Z / n)), min(1.0, (centre + half) / (1 + Z * Z / n))


def interval_of_mean(mean, variance, n):
    """The interval (low, high) of a mean of values from 0 to 1 that is known with `variance`: Wilson's, of as many
    photos as have this variance when each is right or wrong (the effective sample size of Kish 1965)."""
    if mean in (0, 1):  # its variance of 0 says nothing
        return wilson_interval(mean, n)
    if n == 1:
        return None, None
    if variance < 1e-15:  # a constant; a few equal values may be chance
        return (mean, mean) if n >= 10 else wilson_interval(mean, n)
    effective = mean * (1 - mean) / variance
    return wilson_interval(mean, effective if n >= 10 else min(n, effective))  # the spread of a few may be chance


def mean_interval(values, variance=0.0):
    """The `Estimate` of the mean of values from 0 to 1: (N,), or (S, N) of networks of S seeds.

    variance: of the mean, where it is known to be larger than the spread of the values says. Several seeds stand for
    all: the spread between them is added to that between photos, and counts for more (Student's t), as they are few.
    """
    if values.numel() == 0:
        raise ScoreError("there is no photo to score: score at least one")
    values = values.double().clamp(0, 1).reshape(-1, values.shape[-1])
    seeds, n = values.shape
    per_photo = values.mean(0)
    variance = max(variance, float(per_photo.var(correction=0)) / n)
    if seeds > 1:
        variance += float(values.mean(1).var()) / seeds * (T / Z) ** 2
    mean = float(per_photo.mean())
    return Estimate(mean, *interval_of_mean(mean, variance, n), n, per_photo)


def class_mean_interval(correct, labels):
    """The `Estimate` of the mean of the classes' accuracies: correct (N,), 1 or 0; labels (N,) int64.
    A class's variance is that of (right + 1) / (n + 2), Laplace's rule: one of three photos is not certain of 100 %."""
    photos = torch.bincount(labels).double()
    right, photos = torch.bincount(labels, correct.double())[photos > 0], photos[photos > 0]
    smooth = (right + 1) / (photos + 2)
    variance = float((smooth * (1 - smooth) / photos).sum()) / len(photos) ** 2
    mean, effective = float((right / photos).mean()), len(photos) ** 2 / float((1 / photos).sum())
    return Estimate(mean, *interval_of_mean(mean, variance, effective), len(labels))


def difference(a, b):
    """The `Estimate` of a - b, two of the same photos: the arms of their intervals, combined by the correlation of the
    photos' values, so that it holds near 0 and 1 too (Newcombe 1998, method 8)."""
    value = a.value - b.value
    if a.n == 1:
        return Estimate(value, None, None, a.n)
    correlation = float(torch.corrcoef(torch.stack([a.per_photo, b.per_photo]))[0, 1].nan_to_num())  # NaN: a constant

    def combined(x, y):
        return math.sqrt(max(0.0, x * x + y * y - 2 * correlation * x * y))

    low = value - combined(a.value - a.low, b.high - b.value)
    high = value + combined(a.high - a.value, b.value - b.low)
    return Estimate(value, low, high, a.n)


# ---------------------------------------------------------------- maps


def finite(maps):
    """The maps as they are, or a ScoreError that names the first photo with NaN or infinity in its map."""
    bad = (~maps.isfinite().flatten(1).all(1)).nonzero()
    if len(bad):
        raise ScoreError(f"the map of photo {int(bad[0])} holds NaN or infinity: train this network anew")
    return maps


def upsample(maps, size):
    """(N, h, w) -> (N, H, W), bilinear; size: one number or (H, W)."""
    return F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def min_max(maps):
    """Each map from 0, its minimum, to 1, its maximum. A map that is constant (up to rounding) becomes ones if it is
    positive, else zeros; torch-cam and wsolevaluation make it zeros."""
    low, high = finite(maps).amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    constant = high - low <= 1e-6 * maps.abs().amax((1, 2), keepdim=True)
    return torch.where(constant, (maps > 0).to(maps), (maps - low) / (high - low).masked_fill(constant, 1))


def centred_square(n, size=SIZE):
    """Control: a pyramid from 0 at the photo's edges to 1 in its middle, (n, size, size). Above a threshold t it is
    the centred square of side 1 - t, so that the boxes choose theirs (the centre baseline of Choe et al. 2020)."""
    distance = ((torch.arange(size) + 0.5) / size - 0.5).abs()
    return (1 - 2 * torch.maximum(distance[:, None], distance)).expand(n, -1, -1)


# ---------------------------------------------------------------- faithfulness: does the network need what is marked?


def masked(images, maps):
    """Normalised images (N, 3, H, W), each times its map from 0 to 1: the unmarked fades to the data set's mean.
    As in torch-cam, a map is scaled at its own size, then upsampled."""
    return images * upsample(min_max(maps), images.shape[2:])[:, None]


def average_drop_and_increase(probability_full, probability_masked):
    """Per photo: the share of its probability that is lost on the `masked` photo, and whether it rises instead (1, 0).
    Inputs (N,): after softmax, of the class that is likeliest on the full photo. Chattopadhay et al. 2018, equal to
    torch-cam's `ClassificationMetric`."""
    drop = (probability_full - probability_masked).relu() / (probability_full + 1e-7)
    return drop, (probability_full < probability_masked).to(drop)


@torch.no_grad()
def deletion_and_insertion(predict, images, maps, labels, steps=20):
    """Per photo: the mean probability of `labels` (N,) while its pixels go, and while they come, highest first: the
    area under the curve of Petsiuk et al. 2018, by trapezoids.

    predict: images -> probabilities (N, K); images: normalised, (N, 3, H, W). Deletion (lower is better) puts zero, the
    data set's mean, for a pixel; insertion (higher is better) starts at the photo blurred. Pixels of equal value go in
    a random order, always the same: row by row would be a preference of its own.
    """
    n, _, height, width = images.shape
    blurred = gaussian_blur(images, kernel_size=11, sigma=5)
    shuffle = torch.randperm(height * width, generator=torch.Generator().manual_seed(0)).to(images.device)
    shuffled = upsample(finite(maps), (height, width)).flatten(1)[:, shuffle]
    order = shuffle[shuffled.argsort(dim=1, descending=True, stable=True)]
    rank = order.argsort(1).view(n, 1, height, width)  # 0: the pixel that goes first
    curves = []
    for step in range(steps + 1):
        changed = rank < round(height * width * step / steps)
        pair = torch.where(changed, 0, images), torch.where(changed, images, blurred)
        curves.append(torch.stack([predict(x).gather(1, labels[:, None])[:, 0] for x in pair]))
    return torch.trapezoid(torch.stack(curves), dx=1 / steps, dim=0).unbind()  # (steps + 1, 2, N) -> (N,), (N,)


# ---------------------------------------------------------------- localisation: does the map lie where the object is?


def read_lines(path, form):
    """Yields (line number, name, [int, ...]) of a file whose lines have the `form` "val/NAME.JPEG,x,y,..."."""
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise ScoreError(f"{path} cannot be read ({error.strerror}): name another file (BOXES=)") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        file, *values = line.split(",")
        if len(values) != form.count(",") or not all(re.fullmatch(r"\s*-?[0-9]+\s*", value) for value in values):
            raise ScoreError(f"{path}, line {number}: {line[:80]!r} is not {form} in whole numbers")
        yield number, Path(file).stem, [int(value) for value in values]


def read_boxes(localization_path, sizes_path):
    """{NAME: (n, 4)} from the two files of wsolevaluation, in which x1 and y1 are the last pixel that belongs to the
    box. What reaches out of the photo is cut off; a box that has nothing in it is refused."""
    sizes = {name: size for _, name, size in read_lines(sizes_path, "val/NAME.JPEG,width,height")}
    boxes = {}
    for number, name, (x0, y0, x1, y1) in read_lines(localization_path, "val/NAME.JPEG,x0,y0,x1,y1"):
        if name not in sizes:
            raise ScoreError(f"{localization_path}, line {number}: {sizes_path} has no size for {name}")
        width, height = sizes[name]
        x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1 + 1, width), min(y1 + 1, height)
        if x0 >= x1 or y0 >= y1:
            raise ScoreError(f"{localization_path}, line {number}: the box ends before it begins, or lies outside "
                             f"the {width} x {height} pixels of {name}")
        boxes.setdefault(name, []).append((x0 / width, y0 / height, x1 / width, y1 / height))
    return {name: torch.tensor(of_photo) for name, of_photo in boxes.items()}


def pad_boxes(boxes):
    """A list of N boxes (n, 4) as one tensor (N, most, 4), filled up with boxes of no area."""
    for i, of_photo in enumerate(boxes):
        if len(of_photo) == 0:
            raise ScoreError(f"photo {i} has no box: leave it out of the scores that need one")
    return pad_sequence(boxes, batch_first=True)


def inside(boxes, height, width):
    """Which cells of a height x width grid have their centre in any box of the photo: (N, height, width) bool."""
    x0, y0, x1, y1 = pad_boxes(boxes)[..., None].unbind(2)  # (N, most, 1) each
    x, y = ((torch.arange(n, device=x0.device) + 0.5) / n for n in (width, height))
    columns, rows = (x0 <= x) & (x < x1), (y0 <= y) & (y < y1)
    return torch.einsum("nby,nbx->nyx", rows.float(), columns.float()) > 0


def component_boxes(masks):
    """The box of every connected component (corners connect, holes are ignored) of masks (P, H, W) bool.
    Returns the mask it is in (M,), and x0, y0, x1, y1 in cells (M, 4), x1 and y1 exclusive, int64.

    Works on runs, the unbroken stretches of a row, of all masks in one line, with an empty column before each mask and
    an empty row after it. A run touches those runs one row on that neither begin after it ends nor end before it
    begins: cells 2 to 4 of a row those that hold any of 1 to 5 in the next. As runs are in order, these follow one
    another. All runs of a component are labelled with the first of it, found in rounds: of two that touch the larger
    label learns the smaller, then labels of labels are followed to their end, until none differ.
    """
    height, stride = masks.shape[1] + 1, masks.shape[2] + 1
    line = F.pad(masks, (1, 0, 0, 1)).flatten().cpu().numpy()  # NumPy finds changes faster
    changes = torch.from_numpy((line[1:] != line[:-1]).nonzero()[0] + 1).to(masks.device)
    start, end = changes.view(-1, 2).T.contiguous()  # (R,), of the runs
    first = torch.searchsorted(end, start + stride)  # (R,), of the runs that each touches in the next row; and how many
    count = torch.searchsorted(start, end + stride, right=True) - first
    runs = torch.arange(len(start), device=start.device)
    upper = runs.repeat_interleave(count)  # (pairs,), and `lower`: runs that touch
    before = count.cumsum(0) - count  # pairs of the runs before
    lower = (first - before)[upper] + torch.arange(len(upper), device=start.device)
    label = runs
    while not torch.equal(label[upper], label[lower]):
        one, other = label[upper], label[lower]
        label = label.scatter_reduce(0, torch.maximum(one, other), torch.minimum(one, other), "amin")
        while not torch.equal(label, label[label]):
            label = label[label]
    row, x0 = start // stride, start % stride - 1
    y0, x1 = row % height, x0 + end - start
    boxes = torch.stack([x0, y0, -x1, -y0 - 1], 1)  # ends are negative: one minimum serves all four
    boxes = boxes.scatter_reduce(0, label[:, None].expand(-1, 4), boxes, "amin") * boxes.new_tensor([1, 1, -1, -1])
    return (row // height)[label == runs], boxes[label == runs]


def best_iou_per_threshold(maps, boxes, thresholds=THRESHOLDS, size=SIZE):
    """The best IoU of any component's box with any of the photo's boxes at each threshold: (N, T).
    The map is upsampled, scaled from 0 to 1 and cut strictly above the threshold; 0 where nothing is left.

    Choe et al. 2020 with all contours. Their code, clovaai/wsolevaluation, upsamples with cubics, rounds maps to 256
    levels and boxes to whole cells, makes map boxes a cell too large, and adds a box for every hole: on 500 photos
    all of this together moved MaxBoxAccV2 by 0.2 points or less.
    """
    table, before = maps.new_zeros(len(maps), len(thresholds)), None
    thresholds = thresholds.to(maps)[:, None, None]
    for row, cells, of_photo in zip(table, finite(maps), pad_boxes(boxes).to(maps) * size, strict=True):
        if before is None or not torch.equal(cells, before):  # a control's map is the same for every photo
            mask, found = component_boxes(min_max(upsample(cells[None], size)) > thresholds)
            before = cells
        row.scatter_reduce_(0, mask, box_iou(found, of_photo).amax(1), "amax")
    return table


def max_box_acc_v2(tables, ious=IOUS):
    """The share of photos of tables (..., N, T) whose IoU reaches one of `ious`, at the threshold that is best for
    these very photos, mean over `ious` (Choe et al., wsolevaluation). As the literature reports it, which flatters."""
    return sum((tables >= iou).float().mean(-2).amax(-1) for iou in ious) / len(ious)


def cross_fitted(tables, ious=IOUS):
    """Per photo of tables (..., N, T): the share of `ious` that its IoU reaches, each at the threshold that is best for
    the other half of the photos. Every other photo makes a half: all are scored, and none serves its own threshold."""
    reached = torch.zeros(tables.shape[:-1], device=tables.device)  # (..., N)
    for iou in ious:
        right = (tables >= iou).float()
        for half in (0, 1):
            best = right[..., 1 - half :: 2, :].mean(-2, keepdim=True).argmax(-1, keepdim=True)  # (..., 1, 1)
            reached[..., half::2] += torch.take_along_dim(right[..., half::2, :], best, -1)[..., 0]
    return reached / len(ious)


def cross_fitted_interval(tables, scored=None):
    """The `Estimate` of MaxBoxAccV2, `cross_fitted`; tables (N, T), or (S, N, T) of S seeds. scored: it is that of the
    first `scored` photos, and the others help with the thresholds; None: of all.

    Its variance is that of 50 resamples in which each half's photos are drawn anew from that half, and thresholds
    fitted anew (Efron 1979): with thresholds as they are, the interval holds 86 to 92 % instead of 95.
    """
    n = tables.shape[-2]
    scored, generator, means = scored or n, torch.Generator().manual_seed(0), []
    for _ in range(50):
        draw = torch.empty(n, dtype=torch.long)
        for half in (0, 1):
            count = len(draw[half::2])
            draw[half::2] = half + 2 * torch.randint(max(1, count), (count,), generator=generator)
        means.append(cross_fitted(tables[..., draw, :])[..., draw < scored].mean())
    return mean_interval(cross_fitted(tables)[..., :scored], float(torch.stack(means).nan_to_num().double().var()))


def pointing_game(maps, boxes):
    """Per photo: is the map's maximum in a box (1, 0)? Of k equal maxima, the share that is. Zhang et al. 2016, without
    their tolerance of 15 pixels. Nothing is upsampled: the maximum of a bilinear surface is the centre of a cell."""
    top = finite(maps) == maps.amax((1, 2), keepdim=True)
    return (top & inside(boxes, *maps.shape[1:])).sum((1, 2)) / top.sum((1, 2))


def focus(maps, boxes, size=SIZE):
    """Per photo: the share of its area above half of the map's maximum; the share of the map's positive part in its
    boxes (the energy-based pointing game of Wang et al. 2020). Both are 0 for a map that is nowhere positive."""
    maps = upsample(finite(maps), size)
    positive = maps.relu()
    in_boxes = (positive * inside(boxes, *maps.shape[1:])).sum((1, 2))
    area = (maps > maps.amax((1, 2), keepdim=True) / 2).float().mean((1, 2))
    return area, in_boxes / positive.sum((1, 2)).clamp(min=torch.finfo(maps.dtype).tiny)


# ---------------------------------------------------------------- the scores of a trained network

OWN, RANDOM, SQUARE = "its own map", "random weights", "centred square"  # maps; the last two are controls
TO_SQUARE = f"{OWN} minus {SQUARE}"
BATCH = 20  # photos at once: small enough for a processor's cache
DROP_PHOTOS = 1000  # for average drop and increase in confidence, which take another pass for each map
RANDOM_PHOTOS = 50  # for the networks with random weights: the spread between them is larger than that of photos
TRAIN_BOXES = 400  # photos of train whose boxes are used


def batches(photos, size, label=None):
    """Yields images (B, 3, size, size) and which of the photos they are, a slice. label: of the progress shown."""
    import data

    done, started = 0, time.time()
    for images, _ in data.eval_batches(photos, size, BATCH) if len(photos) else ():
        yield images, slice(done, done + len(images))
        done += len(images)
        if label:
            data.progress(f"{label}:", done, len(photos), started, "photos")


@torch.no_grad()
def logits_and_maps(network, photos, size, classes=None, label=None):
    """The logits (N, K) of photos, and the maps (N, h, w) of `classes` (N,), or of each photo's likeliest class."""
    import cam

    all_logits, chosen_maps = [], []
    for images, part in batches(photos, size, label):
        maps, logits = cam.MapsAndLogits(network)(images)  # (B, K, h, w), (B, K)
        cam.check_identity(maps, logits, network.head.bias)  # NaN and weights beyond float32's precision end here
        chosen = logits.argmax(1) if classes is None else classes[part]
        all_logits.append(logits)
        chosen_maps.append(maps[torch.arange(len(images)), chosen])
    return torch.cat(all_logits), torch.cat(chosen_maps)


def random_network(facts, seed):
    """The network of `facts` with random weights, those of its last layer too: what a map owes to the architecture."""
    import models

    torch.manual_seed(seed)
    network = models.build(facts["arch"], len(facts["classes"]), width=facts["width"]).eval()
    torch.nn.init.normal_(network.head.weight, std=0.01)
    return models.with_looks(models.fold_norms(network), facts["looks"])


def with_controls(maps, facts, photos, classes):
    """A network's own maps (N, h, w) and the controls: {map: (S, N, h, w)}, S seeds. photos: N or fewer, `classes`
    (N,) theirs; those of random weights are of the first RANDOM_PHOTOS of them."""
    few, size = photos.subset(torch.arange(len(photos))[:RANDOM_PHOTOS]), facts["size"]
    random = [logits_and_maps(random_network(facts, seed), few, size, classes)[1] for seed in range(SEEDS)]
    return {OWN: maps[None], RANDOM: torch.stack(random), SQUARE: centred_square(len(maps), 64)[None]}


def accuracies(correct, labels, names):
    """{score: Estimate} of correct (N,), 1 or 0. Of ImageNette's photos those of ImageNet's own val are the only ones
    that a network pretrained on ImageNet has not seen."""
    scores = {"accuracy": mean_interval(correct)}
    if len(labels.bincount().unique()) > 1:
        scores["accuracy, mean of the classes"] = class_mean_interval(correct, labels)
    unseen = torch.tensor(["ILSVRC2012_val" in name for name in names])
    if unseen.any():
        scores["accuracy, photos not in ImageNet's training"] = mean_interval(correct[unseen])
    return scores


@torch.no_grad()
def faithfulness(network, photos, size, predicted, confidence, maps, deleted):
    """{score: Estimate} of one kind of map, (S, N, h, w), of the first N photos. predicted, confidence: the photos'
    likeliest classes, and their probabilities; deleted: how many photos serve for deletion and insertion."""

    def probabilities(images):
        return network(images).softmax(1)

    photos, few = (photos.subset(torch.arange(n)) for n in (maps.shape[1], min(deleted, maps.shape[1])))
    found = defaultdict(list)  # {score: (B,) of batch after batch, seed after seed}
    for of_seed in maps:
        for images, part in batches(photos, size):
            after = probabilities(masked(images, of_seed[part])).gather(1, predicted[part, None])[:, 0]
            drop, increase = average_drop_and_increase(confidence[part], after)
            found["average drop"].append(drop)
            found["increase in confidence"].append(increase)
        for images, part in batches(few, size):
            deletion, insertion = deletion_and_insertion(probabilities, images, of_seed[part], predicted[part])
            found["deletion"].append(deletion)
            found["insertion"].append(insertion)
    return {score: mean_interval(torch.cat(parts).view(len(maps), -1)) for score, parts in found.items()}


def localisation(maps, boxes, n):
    """{score: Estimate} of one kind of map, (S, N, h, w), of the true class, with the boxes of N photos. The scores are
    of the first n; the others help with thresholds, and with the score of "all". Best thresholds are the literature's,
    there to be compared; no interval of theirs holds."""
    boxes = boxes[: maps.shape[1]]
    per_seed = [(best_iou_per_threshold(of_seed, boxes), pointing_game(of_seed, boxes), *focus(of_seed, boxes))
                for of_seed in maps]
    tables, pointing, area, share = map(torch.stack, zip(*per_seed, strict=True))  # (S, N, T), the others (S, N)
    best = max_box_acc_v2(tables[:, :n]).mean()
    scores = {"pointing game": mean_interval(pointing[:, :n]),
              "MaxBoxAccV2, cross-fitted": cross_fitted_interval(tables, n),
              "MaxBoxAccV2, best thresholds": Estimate(float(best), None, None, min(n, len(boxes))),
              "share in the box": mean_interval(share[:, :n]), "area above half": mean_interval(area[:, :n])}
    if n < len(boxes):
        scores["MaxBoxAccV2, cross-fitted, all"] = cross_fitted_interval(tables)
    return scores


def confusion_matrix(labels, predicted, classes):
    """How many photos of each of K `classes` (rows) are taken for which (columns), (K, K). labels, predicted: (N,)."""
    return torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)


def score_network(network, facts, val, boxed, deleted, label):
    """All scores of a network, {map: {score: Estimate}}, and its confusion matrix. val: Photos; boxed: of `load_boxes`;
    deleted: photos for deletion and insertion, 42 passes for each map; label: of the progress shown."""
    size, classes = facts["size"], facts["classes"]
    val = val.relabelled(classes)
    logits, maps = logits_and_maps(network, val, size, label=label)
    confidence, predicted = logits.softmax(1).max(1)
    scores = {OWN: accuracies((predicted == val.labels).float(), val.labels, val.names), RANDOM: {}, SQUARE: {}}
    drawn = torch.randperm(len(val), generator=torch.Generator().manual_seed(0))[:DROP_PHOTOS]
    photos, likeliest = val.subset(drawn), predicted[drawn]
    for kind, seeds in with_controls(maps[drawn], facts, photos, likeliest).items():
        scores[kind] |= faithfulness(network, photos, size, likeliest, confidence[drawn], seeds, deleted // len(seeds))
    if boxed:
        splits = [photos.relabelled(classes) for photos, _ in boxed]
        maps = torch.cat([logits_and_maps(network, photos, size, photos.labels)[1] for photos in splits])
        boxes = [of_photo for _, of_split in boxed for of_photo in of_split]
        for kind, seeds in with_controls(maps, facts, splits[0], splits[0].labels).items():
            scores[kind] |= localisation(seeds, boxes, len(splits[0]))
    return scores, confusion_matrix(val.labels, predicted, len(classes))


# ---------------------------------------------------------------- the tables of several networks

SUMMARY = ("accuracy", "accuracy, mean of the classes", "pointing game", "MaxBoxAccV2, cross-fitted",
           "MaxBoxAccV2, cross-fitted, all", "share in the box", "area above half")  # its rows
BESIDE = 2  # networks beside each other in the summary: more would be wider than a terminal's 100 columns


def compare(scores):
    """{network: {map: {score: Estimate}}} as {(score, network, map): Estimate}, with the differences that are of the
    same photos: own maps to the centred square, and each network's ("B minus A") to the first's."""
    results, first = {}, next(iter(scores))
    for score in scores[first][OWN]:
        for network, kinds in scores.items():
            results |= {(score, network, kind): kinds[kind][score] for kind in kinds if score in kinds[kind]}
            own = kinds[OWN][score]
            if own.per_photo is None:
                continue
            if score in kinds.get(SQUARE, {}):
                results[score, network, TO_SQUARE] = difference(own, kinds[SQUARE][score])
            if network != first:
                results[score, f"{network} minus {first}", OWN] = difference(own, scores[first][OWN][score])
    return results


def summary(results, networks, form="text"):
    """The summary of `compare`'s results as one string, in a `form` of `write_table`: BESIDE networks to a table, side
    by side with the square, the differences under each score."""
    blocks = [networks[i : i + BESIDE] for i in range(0, len(networks), BESIDE)]
    return "\n".join(write_table(summary_rows(results, block, networks[0]), form) for block in blocks)


def summary_rows(results, networks, first):
    """One table of the summary; first: the network that differences are to."""

    def cells(score, kind, names):
        return [str(results.get((score, name, kind), "")) for name in names]

    rows = [["%, [95 % interval]", "n", *networks, SQUARE]]
    for score in SUMMARY:
        if (score, first, OWN) not in results:
            continue
        arrow = "" if score == "area above half" else " ↑"  # which is better neither small nor large
        n = f"{results[score, first, OWN].n:,}"
        rows.append([score + arrow, n, *cells(score, OWN, networks), *cells(score, SQUARE, [first])])
        differences = {SQUARE: cells(score, TO_SQUARE, networks),
                       first: cells(score, OWN, [f"{network} minus {first}" for network in networks])}
        rows += [[f"  minus {other}", "", *row, ""] for other, row in differences.items() if any(row)]
    return rows if any(row[-1] for row in rows[1:]) else [row[:-1] for row in rows]  # without boxes, no square


def csv_table(results):
    """All of `compare`'s results as CSV, a line each, shares from 0 to 1; without an interval its ends are empty."""
    file = io.StringIO()
    lines = csv.writer(file, lineterminator="\n")
    lines.writerow(("score", "network", "map", "n", "value", "low", "high"))
    lines.writerows((*key, estimate.n, *estimate[:3]) for key, estimate in results.items())
    return file.getvalue()


def write_table(rows, form):
    """rows, lists of as many strings, the first the header, as one string, the first column to the left, the others to
    the right. form: "text", to read in a terminal, "markdown", or "latex" (with the package booktabs)."""
    if form == "latex":
        header, *body = (" & ".join(map(escape_latex, row)) + r" \\" for row in rows)
        begin = r"\begin{tabular}{l" + "r" * (len(rows[0]) - 1) + "}"
        return "\n".join([begin, r"\toprule", header, r"\midrule", *body, r"\bottomrule", r"\end{tabular}", ""])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[f"{cell:{'>' if i else '<'}{widths[i]}}" for i, cell in enumerate(row)] for row in rows]
    if form == "text":
        return "".join("  ".join(line) + "\n" for line in lines)
    lines.insert(1, ["-" * (width - 1) + (":" if i else "-") for i, width in enumerate(widths)])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def escape_latex(text):
    """Any text as LaTeX shows it; arrows, leading spaces and the minus of numbers as mathematics."""
    special = {c: "\\" + c for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}",
               "^": r"\textasciicircum{}", "↑": r"$\uparrow$"}
    shown = text.lstrip()
    indent = r"\quad " if shown != text else ""
    return indent + re.sub(r"(?<![^\s\[])-(?=\d)", "$-$", shown.translate(str.maketrans(special)))


# ---------------------------------------------------------------- the command


def check_out(out):
    """`out` without a suffix of ours; a ScoreError where no tables can be written, before the work, not after it."""
    base = re.sub(r"\.(md|csv|tex|json)$", "", out)
    if base.endswith(("/", os.sep)) or Path(base).is_dir():
        raise ScoreError(f"--out {out} is a folder: name the tables in it, for example {Path(out) / 'scores'}")
    folder = next(path for path in Path(base).absolute().parents if path.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ScoreError(f"--out {out} cannot be written, {folder} is no folder that takes files: name another place")
    return base


def same_network(network, facts, other, other_facts):
    """Whether two networks compute the same: equal weights, looks and classes."""
    weights, other_weights = network.state_dict(), other.state_dict()
    return all(facts[key] == other_facts[key] for key in ("arch", "looks", "classes")) and all(
        torch.equal(tensor, other_weights[key]) for key, tensor in weights.items())


def name_networks(paths, loaded):
    """{name: (path, network, facts)}, named after their architecture, numbered from the second on. A network that is
    given twice, by whatever path, is scored once, and it is said; the same weights with other looks are another one."""
    named = {}
    for path, (network, facts) in zip(paths, loaded, strict=True):
        if twin := next((known for known in named.values() if same_network(*known[1:], network, facts)), None):
            print(f"{path} is the same network as {twin[0]}: it is scored once", file=sys.stderr)
            continue
        others = sum(known["arch"] == facts["arch"] for *_, known in named.values())
        named[facts["arch"] + (f"-{others + 1}" if others else "")] = path, network, facts
    return named


def with_boxes(photos, boxes, most=None):
    """Those photos that have boxes, in an order that is drawn, `most` at most, and a list of their boxes (n, 4)."""
    stems = [Path(name).stem for name in photos.names]
    index = torch.tensor([i for i, stem in enumerate(stems) if stem in boxes], dtype=torch.long)
    index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))][:most]
    return photos.subset(index), [boxes[stems[i]] for i in index]


def load_boxes(folder, named, val):
    """[(Photos, boxes)] of val and of train, without what has none, and a sentence on what is missing, or "".
    named: the folder of boxes that the user names, or None: the data's own, if it has some."""
    import data

    source, boxes = Path(os.path.expanduser(named or folder)), {}
    if named or (source / "localization.txt").exists():
        boxes = read_boxes(source / "localization.txt", source / "image_sizes.txt")
    of_val = with_boxes(val, boxes)
    if not of_val[1]:
        if named:
            raise ScoreError(f"{source} has no boxes of photos in {folder}'s val: name other boxes (--boxes)")
        return [], "no boxes of val, so no localisation: name a folder with localization.txt, image_sizes.txt (--boxes)"
    train = data.load(folder, "train")
    stems = Counter(Path(name).stem for name in [*val.names, *train.names])
    if twice := next((stem for stem, count in stems.items() if count > 1 and stem in boxes), None):
        raise ScoreError(f"{source} has boxes of {twice}, but several photos in {folder} are named so: rename them")
    of_train = with_boxes(train, boxes, TRAIN_BOXES)
    if not of_train[1]:
        return [of_val], f"{source} has no boxes of train: thresholds are fitted on val's alone"
    return [of_val, of_train], ""


def relative(argument):
    """An absolute path as seen from the working folder, or, where it lies elsewhere, by its name alone; all else as it
    is: what is written down speaks of no machine's folders."""
    path = Path(argument)
    if not path.is_absolute():
        return argument
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name


def score_checkpoints(paths, source, boxes_folder, deleted, out, looks, arguments):
    """Score the checkpoints `paths` on the data `source`, write and print the results. looks: of `cam.parse_looks`;
    arguments: of the command, to be written down."""
    import cam
    import data
    import models

    out = check_out(out)
    named = name_networks(paths, cam.load_models(paths, looks))
    folder = data.prepare(source)
    val = data.load(folder, "val")
    boxed, missing = load_boxes(folder, boxes_folder, val)
    notes = [missing] if missing else []
    if boxed:
        notes.append("cross-fitted: box thresholds of each half of the photos are the best of the other half"
                     + ("; all: with photos of train" if len(boxed) > 1 else ""))
    scores, pictures = {}, {}
    run = dict(command=shlex.join(["python", "score.py", *map(relative, arguments)]), networks={}, seconds={},
               machine=models.machine(), precision="float32")
    for name, (path, network, facts) in named.items():
        started = time.time()
        scores[name], matrix = score_network(models.fold_norms(network), facts, val, boxed, deleted, name)
        run["seconds"][name] = round(time.time() - started, 1)
        facts |= dict(accuracy=scores[name][OWN]["accuracy"].value, accuracy_on="val", accuracy_n=len(val))
        description = cam.describe(facts)
        run["networks"][name] = dict(
            path=relative(path), description=description, looks=facts["looks"], accuracy_n=len(val),
            epochs=facts["settings"].get("epochs"), best_epoch=facts.get("epoch"), seed=facts["settings"].get("seed"))
        pictures[name] = cam.confusion_picture(matrix, facts["classes"], description)
        notes.append(f"{name}: {relative(path)}, {description}")
    write_results(out, compare(scores), notes, run, pictures)


def write_results(out, results, notes, run, pictures):
    """Write the summary and all results as `out`.md, the summary as .tex, all results as .csv, how they came about (a
    dictionary, `run`) as .json, and {network: picture}; print the summary and the notes."""
    import cam
    import models

    networks = list(run["networks"])
    rows = [["score", "network", "map", "n", "%, [95 % interval]"]]
    rows += [[*key, f"{estimate.n:,}", str(estimate)] for key, estimate in results.items()]
    markdown = [summary(results, networks, "markdown"), *(f"- {note}" for note in notes), "",
                write_table(rows, "markdown")]
    texts = {".md": "\n".join(markdown), ".csv": csv_table(results), ".tex": summary(results, networks, "latex"),
             ".json": json.dumps(run, indent=1) + "\n"}
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    for suffix, text in texts.items():
        with models.atomic(out + suffix) as file:
            file.write(text.encode(errors="backslashreplace"))  # a path need not be text
    for name, picture in pictures.items():
        cam.save_picture(picture, f"{out}-confusion-{name}.png")
    print("\n".join([summary(results, networks), *notes, f"written: {out}.md, .csv, .tex, .json, -confusion-*.png; "
          f"in LaTeX \\usepackage{{booktabs}} and \\input{{{out}.tex}}"]))


def main(arguments=None):
    """The command line: the scores of trained networks, as one table."""
    try:
        import cam
        import data
        import models
    except ModuleNotFoundError as error:
        print(f"score.py: {error.name}.py is missing: the command needs cam.py, data.py and models.py beside score.py, "
              "whose functions alone work without", file=sys.stderr)
        sys.exit(2)

    parser = argparse.ArgumentParser(description="Accuracy, faithfulness and localisation of trained networks.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("models", nargs="+", help="checkpoints (runs/*/best.pt); differences are to the first")
    parser.add_argument("--data", default="data/imagenette2-160", help="folder or archive of photos in class folders")
    parser.add_argument("--boxes", help="folder of localization.txt and image_sizes.txt; by default the data's own")
    parser.add_argument("--deletion", type=int, default=100, help="photos for deletion and insertion, the slow scores")
    parser.add_argument("--out", default="figures/scores", help="where tables and pictures go, without suffix")
    cam.add_looks_option(parser)
    options = parser.parse_args(arguments)
    if options.boxes == "":  # of a variable that is not set, perhaps
        parser.error("--boxes is empty: name a folder, or leave it out")
    if options.deletion < 0:
        parser.error("--deletion takes a number of photos, 0 or more")
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")  # a name that this terminal cannot write
    models.keep_memory()
    try:
        score_checkpoints(options.models, options.data, options.boxes, options.deletion, options.out,
                          cam.parse_looks(options.looks), sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        print("score.py: stopped; no file is half-written, and the same command starts anew", file=sys.stderr)
        sys.exit(130)
    except (ScoreError, cam.CamError, data.DataError, models.ModelError, OSError) as error:
        print(f"score.py: {error}", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        if not models.out_of_memory(error):
            raise
        print(f"score.py: not enough memory ({error!r:.100}): use smaller --looks", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
