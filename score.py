"""Where did the network look? Maps, boxes and probabilities in, numbers out.

    python score.py runs/resnet18/best.pt runs/cnn/best.pt --boxes FOLDER     one table for both networks

In code:

    boxes = read_boxes("localization.txt", "image_sizes.txt")                 # {name: (n, 4)}
    table = best_iou_per_threshold(maps, [boxes[name] for name in names])     # (N, T)
    value, low, high, *_ = cross_fitted_interval(table, ious=IOUS)            # MaxBoxAccV2, 95 % interval

Maps are (N, h, w) float32, one class per photo, signed, in logits, and cover the whole photo. Boxes are a list of N
tensors (n, 4), x0, y0, x1, y1 as fractions of the photo's width and height, which fit every copy of the photo,
squashed ones included. "Per photo" means (N,), to be handed to `mean_interval`; all scores are shares, 0 to 1.
The functions know no network: copy this file alone and they work. The command wants the other files beside it.
"""

import argparse
import csv
import io
import math
import os
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

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


def accuracy_interval(correct, n):
    """The share `correct` of n with its 95 % interval, (value, low, high); Wilson 1927, honest near 0 and 1 too."""
    if not 0 <= correct <= n or n == 0:
        raise ScoreError(f"{correct} correct of {n} is no share: score at least one photo")
    share = correct / n
    centre, half = share + Z * Z / (2 * n), Z * (share * (1 - share) / n + (Z / (2 * n)) ** 2) ** 0.5
    return share, max(0.0, (centre - half) / (1 + Z * Z / n)), min(1.0, (centre + half) / (1 + Z * Z / n))


def share_interval(share, variance, n):
    """Wilson's interval for a share that is known with `variance`: that of as many photos as have this variance when
    each is right or wrong, share (1 - share) / variance (the effective sample size of Kish 1965); of n at 0 and 1."""
    if variance < 1e-15 and 0 < share < 1 and n >= 10:  # a constant; a few equal values may be chance
        return share, share, share
    effective = share * (1 - share) / variance if 0 < share < 1 and variance >= 1e-15 else n
    return accuracy_interval(share * effective, effective)


def mean_interval(values, variance=0.0):
    """The `Estimate` of the mean of values from 0 to 1: (N,), or (SEEDS, N) of networks of as many seeds.

    Values of 0 and 1 get Wilson's interval, others one as narrow as their spread says, but for a mean that is known to
    have a larger `variance`. With several seeds it holds for the mean over all seeds: the spread between seeds is added
    to that between photos, by the ratio of Student's t to the normal distribution wider, as seeds are few.
    """
    if values.numel() == 0:
        raise ScoreError("there is no photo to score: score at least one")
    values = values.double().clamp(0, 1).reshape(-1, values.shape[-1])
    seeds, n = values.shape
    per_photo = values.mean(0)
    variance = max(variance, float(per_photo.var(correction=0)) / n)
    if seeds > 1:
        variance += float(values.mean(1).var()) / seeds * (T / Z) ** 2
    value = float(per_photo.mean())
    if n == 1 and 0 < value < 1:  # of which no spread is known
        return Estimate(value, None, None, n, per_photo)
    return Estimate(*share_interval(value, variance, n), n, per_photo)


def class_mean_interval(correct, labels):
    """The `Estimate` of the mean of the classes' accuracies: correct (N,), 1 or 0; labels (N,) int64.
    A class's variance is that of (right + 1) / (n + 2), Laplace's rule: one of three photos is not certain of 100 %."""
    n = torch.bincount(labels).double()
    right, n = torch.bincount(labels, correct.double())[n > 0], n[n > 0]
    smooth = (right + 1) / (n + 2)
    variance = float((smooth * (1 - smooth) / n).sum()) / len(n) ** 2
    interval = share_interval(float((right / n).mean()), variance, len(n) ** 2 / float((1 / n).sum()))
    return Estimate(*interval, len(labels))


def difference(a, b):
    """The `Estimate` of a - b, two of the same photos: their intervals' arms combined as the sides of a triangle, by
    the correlation of the photos' values (Newcombe 1998, method 8), so that it holds near 0 and 1 too."""
    if a.n < 2:
        return Estimate(a.value - b.value, None, None, a.n)
    both = torch.stack([a.per_photo, b.per_photo])
    correlation = float(torch.corrcoef(both)[0, 1].nan_to_num())  # NaN: one is constant

    def combined(x, y):
        return math.sqrt(max(0.0, x * x + y * y - 2 * correlation * x * y))

    value = a.value - b.value
    return Estimate(value, value - combined(a.value - a.low, b.high - b.value),
                    value + combined(a.high - a.value, b.value - b.low), a.n)


def write_table(rows, form="text"):
    """rows, lists of as many strings, the first the header, as one string, the first column to the left, the others to
    the right. form: "text", to read in a terminal, "markdown", or "latex" (with the package booktabs)."""
    if form == "latex":
        header, *body = (" & ".join(map(escape_latex, row)) + r" \\" for row in rows)
        columns = "l" + "r" * (len(rows[0]) - 1)
        return "\n".join([rf"\begin{{tabular}}{{{columns}}}", r"\toprule", header, r"\midrule", *body, r"\bottomrule",
                          r"\end{tabular}", ""])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[f"{cell:{'>' if i else '<'}{widths[i]}}" for i, cell in enumerate(row)] for row in rows]
    left, between, right = {"text": ("", "  ", "\n"), "markdown": ("| ", " | ", " |\n")}[form]
    if form == "markdown":
        lines.insert(1, ["-" * (w - 1) + (":" if i else "-") for i, w in enumerate(widths)])
    return "".join(left + between.join(line) + right for line in lines)


def escape_latex(text):
    """Any text as LaTeX shows it; arrows, leading spaces and the minus of numbers as mathematics."""
    special = {c: "\\" + c for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}",
               "^": r"\textasciicircum{}", "\u2191": r"$\uparrow$", "\u2193": r"$\downarrow$"}
    escaped = "".join(special.get(character, character) for character in text.lstrip())
    return r"\quad " * (text != text.lstrip()) + re.sub(r"(?<![^\s\[])-(?=\d)", "$-$", escaped)


# ---------------------------------------------------------------- maps


def finite(maps, names=None):
    """The maps as they are, or a ScoreError that names the first photo with NaN or infinity in its map."""
    for i in (~maps.isfinite().flatten(1).all(1)).nonzero().flatten().tolist():
        name = names[i] if names else f"photo {i}"
        raise ScoreError(f"the map of {name} holds NaN or infinity: this network cannot be scored, train it anew")
    return maps


def upsample(maps, size):
    """(N, h, w) -> (N, H, W), bilinear; size: one number or (H, W)."""
    return F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def min_max(maps, names=None):
    """Each map from 0, its minimum, to 1, its maximum. A map that is constant (up to rounding) becomes ones if it is
    positive, else zeros: the control `ones` stays what it is, where torch-cam and wsolevaluation make it zeros."""
    low, high = finite(maps, names).amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    constant = high - low <= 1e-6 * maps.abs().amax((1, 2), keepdim=True)
    return torch.where(constant, (maps > 0).to(maps), (maps - low) / (high - low).masked_fill(constant, 1))


def ones(n, size=SIZE):
    """Control: the whole photo, (n, size, size)."""
    return torch.ones(n, size, size)


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
def deletion_and_insertion(predict, images, maps, labels, steps=20, seed=0):
    """Per photo: the mean probability of `labels` (N,) while its pixels go, and while they come, highest first.
    predict: images -> probabilities (N, K); images: normalised, (N, 3, H, W). Deletion (lower is better) puts zero,
    the data set's mean, for a pixel; insertion (higher is better) starts at the photo blurred (11 x 11 Gaussian of
    5 pixels). Area under the curve by trapezoids: Petsiuk et al. 2018. Pixels of equal value go in an order drawn
    from `seed`: row by row would be a preference of its own."""
    n, channels, height, width = images.shape
    line = torch.exp(-((torch.arange(11, device=images.device) - 5) ** 2) / 50)
    kernel = (torch.outer(line, line) / line.sum() ** 2).to(images).expand(channels, 1, 11, 11)
    blurred = F.conv2d(images, kernel, padding=5, groups=channels)
    shuffle = torch.randperm(height * width, generator=torch.Generator().manual_seed(seed)).to(images.device)
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
    """[(line number, name, int, ...)] of a file of lines of the `form` "val/NAME.JPEG,x,y,..."."""
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise ScoreError(f"{path} cannot be read ({error.strerror}): name another file (BOXES=)") from error
    rows = []
    for number, line in enumerate(lines, 1):
        file, *values = line.split(",")
        try:
            if len(values) != form.count(","):
                raise ValueError
            rows.append((number, file.rpartition("/")[2].rsplit(".", 1)[0], *map(int, values)))
        except ValueError:
            if line.strip():
                raise ScoreError(f"{path}, line {number}: {line[:80]!r} is not {form} in whole numbers") from None
    return rows


def read_boxes(localization_path, sizes_path):
    """{NAME: (n, 4)} from the two files of wsolevaluation, in which x1 and y1 are the last pixel that belongs to the
    box. What reaches out of the photo is cut off; a box that has nothing in it is refused."""
    sizes = {name: size for _, name, *size in read_lines(sizes_path, "val/NAME.JPEG,width,height")}
    boxes = {}
    for number, name, x0, y0, x1, y1 in read_lines(localization_path, "val/NAME.JPEG,x0,y0,x1,y1"):
        if name not in sizes:
            raise ScoreError(f"{localization_path}, line {number}: {sizes_path} has no size for {name}")
        width, height = sizes[name]
        x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1 + 1, width), min(y1 + 1, height)
        if x0 >= x1 or y0 >= y1:
            raise ScoreError(f"{localization_path}, line {number}: the box ends before it begins, or lies outside "
                             f"the {width} x {height} pixels of {name}")
        boxes.setdefault(name, []).append((x0 / width, y0 / height, x1 / width, y1 / height))
    flat = torch.tensor([box for photo in boxes.values() for box in photo]).view(-1, 4)  # 50,000 tensors are slow
    return dict(zip(boxes, flat.split([len(photo) for photo in boxes.values()]), strict=True))


def stack(boxes):
    """A list of N boxes (n, 4) as one tensor (N, most, 4), filled up with boxes of no area."""
    for i, photo in enumerate(boxes):
        if len(photo) == 0:
            raise ScoreError(f"photo {i} has no box: leave it out of the scores that need one")
    return pad_sequence(list(boxes), batch_first=True)


def inside(boxes, height, width):
    """Which cells of a height x width grid have their centre in any box of the photo: (N, height, width) bool."""
    x0, y0, x1, y1 = stack(boxes)[..., None].unbind(2)  # (N, most, 1) each
    x, y = ((torch.arange(n, device=x0.device) + 0.5) / n for n in (width, height))
    columns, rows = (x0 <= x) & (x < x1), (y0 <= y) & (y < y1)
    return torch.einsum("nby,nbx->nyx", rows.float(), columns.float()) > 0


def pairwise_iou(a, b):
    """Intersection over union of boxes (M, 4) and (B, 4): (M, B)."""
    start, end = torch.maximum(a[:, None, :2], b[:, :2]), torch.minimum(a[:, None, 2:], b[:, 2:])
    both = (end - start).clamp(min=0).prod(2)
    area_a, area_b = ((box[:, 2:] - box[:, :2]).prod(1) for box in (a, b))
    return both / (area_a[:, None] + area_b - both)


def component_boxes(masks):
    """The box of every connected component (corners connect, holes are ignored) of masks (P, H, W) bool.
    Returns the mask it is in (M,), and x0, y0, x1, y1 in cells (M, 4), x1 and y1 exclusive, int64.

    Works on runs, the unbroken stretches of a row. All masks in one line, an empty row and column between them: then
    run i touches those runs, one row (`stride` cells) on, that neither begin after it ends nor end before it begins,
    and as runs are in order, these follow one another.
    """
    height, stride = masks.shape[1] + 1, masks.shape[2] + 1
    flat = F.pad(masks, (1, 0, 0, 1)).flatten().cpu().numpy()  # NumPy finds the few changes ten times as fast
    changes = torch.from_numpy((flat[1:] != flat[:-1]).nonzero()[0] + 1).to(masks.device)
    start, end = changes.view(-1, 2).T.contiguous()
    first = torch.searchsorted(end, start + stride)
    count = torch.searchsorted(start, end + stride, right=True) - first
    runs = torch.arange(len(start), device=start.device)
    upper = runs.repeat_interleave(count)
    lower = (first + count - count.cumsum(0))[upper] + torch.arange(len(upper), device=start.device)
    label, before = runs, None  # a run's component goes by the first run in it that is known so far
    while before is None or not torch.equal(label, before):
        before, lowest = label, torch.minimum(label[upper], label[lower])
        label = label.scatter_reduce(0, label[upper], lowest, "amin").scatter_reduce(0, label[lower], lowest, "amin")
        while not torch.equal(label, label[label]):
            label = label[label]
    row, x0 = start // stride, start % stride - 1
    y0 = row % height
    boxes = torch.stack([x0, y0, start - end - x0, -y0 - 1], 1)  # ends are negative: one minimum serves all four
    boxes = boxes.scatter_reduce(0, label[:, None].expand(-1, 4), boxes, "amin") * boxes.new_tensor([1, 1, -1, -1])
    return (row // height)[label == runs], boxes[label == runs]


def best_iou_per_threshold(maps, boxes, thresholds=THRESHOLDS, size=SIZE):
    """The best IoU of any component's box with any of the photo's boxes at each threshold: (N, T).
    The map is upsampled, scaled from 0 to 1 and cut strictly above the threshold; 0 where nothing is left.

    Choe et al. 2020 with all contours. Their code, clovaai/wsolevaluation, upsamples with cubics, rounds maps to 256
    levels and boxes to whole cells, makes map boxes a cell too large, and adds a box for every hole: on 500 photos
    all of this together moved MaxBoxAccV2 by 0.2 points or less.
    """
    table, thresholds = torch.zeros(len(maps), len(thresholds)).to(maps), thresholds.to(maps)[:, None, None]
    before = None
    for row, photo, photo_boxes in zip(table, finite(maps), stack(boxes).to(maps) * size, strict=True):
        if before is None or not torch.equal(photo, before):  # a control's map is the same for every photo
            mask, found = component_boxes(min_max(upsample(photo[None], size)) > thresholds)
            before = photo
        row.scatter_reduce_(0, mask, pairwise_iou(found, photo_boxes).amax(1), "amax")
    return table


def best_threshold(table, iou=0.5):
    """The index of the threshold at which most photos of a table (N, T) are right, for use on other photos."""
    return int((table >= iou).float().mean(0).argmax())


def cross_fitted(tables, iou=0.5):
    """Per photo of tables (..., N, T): does its IoU reach `iou` (1, 0) at the threshold that is best for the other half
    of the photos? Every other photo makes a half: all serve to be scored, and none for its own threshold."""
    right = (tables >= iou).float()
    values = torch.zeros_like(right[..., 0])  # (..., N)
    for half in (0, 1):
        best = right[..., 1 - half :: 2, :].mean(-2, keepdim=True).argmax(-1, keepdim=True)  # (..., 1, 1)
        values[..., half::2] = torch.take_along_dim(right[..., half::2, :], best, -1)[..., 0]
    return values


def cross_fitted_interval(tables, ious, scored=None, resamples=50):
    """The `Estimate` of `cross_fitted`, mean over `ious`, for the photos `scored` (N,) bool or all; tables (N, T), or
    (SEEDS, N, T). Its variance is that of `resamples` in which each half's photos are drawn anew from that half, and
    thresholds fitted anew (Efron 1979): with thresholds as they are, the interval holds 86 to 92 % instead of 95."""
    tables, n = tables.reshape(-1, *tables.shape[-2:]), tables.shape[-2]
    scored = torch.ones(n, dtype=torch.bool) if scored is None else scored
    draws, generator = torch.empty(resamples, n, dtype=torch.long), torch.Generator().manual_seed(0)
    for half in (0, 1):
        count = len(range(half, n, 2))
        draws[:, half::2] = half + 2 * torch.randint(max(1, count), (resamples, count), generator=generator)
    means = []
    for some in draws.split(max(1, 2**22 // tables.numel())):  # bounds the memory
        values = sum(cross_fitted(tables[:, some], iou) for iou in ious).mean(0) / len(ious)  # (R, N)
        means.append((values * scored[some]).sum(1) / scored[some].sum(1).clamp(min=1))
    values = sum(cross_fitted(tables, iou) for iou in ious) / len(ious)
    return mean_interval(values[:, scored], float(torch.cat(means).double().var()))


def max_box_acc(table, iou=0.5, threshold_index=None):
    """The share of photos whose IoU reaches `iou` at one threshold for all: (..., N, T) -> (...).
    None: the threshold that is best for these very photos, as the literature reports, which flatters."""
    share = (table >= iou).float().mean(-2)
    return share.amax(-1) if threshold_index is None else share[..., threshold_index]


def max_box_acc_v2(table, threshold_indices=None, ious=IOUS):
    """The mean of `max_box_acc` over `ious`, each with a threshold of its own (Choe et al., wsolevaluation)."""
    indices = threshold_indices or [None] * len(ious)
    return sum(max_box_acc(table, iou, index) for iou, index in zip(ious, indices, strict=True)) / len(ious)


def pointing_game(maps, boxes, tolerance=0.0):
    """Per photo: is the map's maximum in a box (1, 0)? Zhang et al. 2016; of k equal maxima, the share that is.
    Nothing is upsampled: the maximum of a bilinear surface is the centre of a cell. tolerance: fractions of width
    and height by which boxes are widened; Zhang et al. have 15 pixels, here it is none unless said."""
    wider = [photo + tolerance * photo.new_tensor([-1, -1, 1, 1]) for photo in boxes]
    top = finite(maps) == maps.amax((1, 2), keepdim=True)
    return (top & inside(wider, *maps.shape[1:])).sum((1, 2)) / top.sum((1, 2))


def focus(maps, boxes, size=SIZE):
    """Per photo: the share of its area above half of the map's maximum; the share of the map's positive part in its
    boxes. Both are 0 for a map that is nowhere positive."""
    maps = upsample(finite(maps), size)
    positive = maps.relu()
    in_boxes = (positive * inside(boxes, *maps.shape[1:])).sum((1, 2))
    area = (maps > maps.amax((1, 2), keepdim=True) / 2).float().mean((1, 2))
    return area, in_boxes / positive.sum((1, 2)).clamp(min=torch.finfo(maps.dtype).tiny)


# ---------------------------------------------------------------- the scores of a trained network

OWN, RANDOM, ONES, SQUARE = MAPS = "its own map", "random weights", "ones", "centred square"  # the last three: controls
TO_SQUARE = f"{OWN} minus {SQUARE}"
BATCH = 20  # photos at once: small enough for a processor's cache
DROP_PHOTOS = 1000  # for average drop and increase in confidence, which take another pass for each map
RANDOM_PHOTOS = 50  # for the networks with random weights: the spread between them is larger than that of photos
TRAIN_BOXES = 400  # photos of train whose boxes are used


def random_network(facts, seed):
    """The network of `facts` with random weights, those of its last layer too: what a map owes to the architecture."""
    import models

    torch.manual_seed(seed)
    network = models.build(facts["arch"], len(facts["classes"])).eval()
    torch.nn.init.normal_(network.head.weight, std=0.01)
    return models.with_looks(models.fold_norms(network), facts["looks"])


@torch.no_grad()
def in_batches(function, photos, size, *per_photo, label=None):
    """function(images, ...) -> tensors (B, ...), for all photos at size x size px, each joined to (N, ...). The tensors
    `per_photo` (N, ...) are cut into the same batches. label: of the progress that is shown."""
    import data

    parts, done, started = [], 0, time.time()
    for images, _ in data.eval_batches(photos, size, BATCH):
        parts.append(function(images, *(tensor[done : done + len(images)] for tensor in per_photo)))
        done += len(images)
        if label:
            data.progress(f"{label}:", done, len(photos), started, "photos")
    return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]


def predict_with_maps(network, photos, size, classes, label=None):
    """The logits (N, K) of photos, and the maps (N, h, w) of `classes` (N,) and of the likeliest class, in one pass."""
    import cam

    maps_and_logits = cam.MapsAndLogits(network)

    def of_batch(images, classes):
        maps, logits = maps_and_logits(images)
        cam.check_identity(maps, logits, network.head.bias)
        each = torch.arange(len(images))
        return logits, maps[each, classes], maps[each, logits.argmax(1)]

    return in_batches(of_batch, photos, size, classes, label=label)


def faithfulness(network, photos, size, predicted, confidence, maps, deleted):
    """{score: Estimate} of one kind of map. photos: N; predicted (N,): their likeliest classes, and confidence (N,),
    the probability of these; maps: (S, N, h, w) of S seeds; deleted: the first photos, for deletion and insertion."""

    def probabilities(images):
        return network(images).softmax(1)

    def when_masked(images, maps, classes):
        return (probabilities(masked(images, maps)).gather(1, classes[:, None])[:, 0],)

    def when_deleted(images, maps, classes):
        return deletion_and_insertion(probabilities, images, maps, classes)

    few, values = photos.subset(torch.arange(min(deleted, len(photos)))), []
    for of_seed in maps:
        found = average_drop_and_increase(confidence, *in_batches(when_masked, photos, size, of_seed, predicted))
        values.append([*found, *(in_batches(when_deleted, few, size, of_seed, predicted) if len(few) else ())])
    scores = ("average drop", "increase in confidence", "deletion", "insertion")
    return {score: mean_interval(torch.stack(of_seeds)) for score, *of_seeds in zip(scores, *values, strict=False)}


def localisation(maps, boxes, in_val):
    """{score: Estimate} of one kind of map. maps: (S, N, h, w) of S seeds, of the true class; boxes: N; in_val: (N,)
    bool, the photos that the scores are of; the others help with thresholds, and with the score of "all".

    A box score's threshold is the one that is best for the other half of all N photos (`cross_fitted`). That of the
    literature, best for the very photos that are scored, is there to be compared; no interval of it holds.
    """
    tables = torch.stack([best_iou_per_threshold(of_seed, boxes) for of_seed in maps])  # (S, N, T)
    area, share = (torch.stack(seeds) for seeds in zip(*(focus(of_seed, boxes) for of_seed in maps), strict=True))
    pointing = torch.stack([pointing_game(of_seed, boxes) for of_seed in maps])
    scores = {"pointing game": mean_interval(pointing[:, in_val]),
              "MaxBoxAccV2, cross-fitted": cross_fitted_interval(tables, IOUS, in_val),
              "MaxBoxAcc, cross-fitted": cross_fitted_interval(tables, [0.5], in_val),
              "share in the box": mean_interval(share[:, in_val]), "area above half": mean_interval(area[:, in_val])}
    if not in_val.all():
        scores["MaxBoxAccV2, cross-fitted, all"] = cross_fitted_interval(tables, IOUS)
    for score, best in (("MaxBoxAccV2, best thresholds", max_box_acc_v2), ("MaxBoxAcc, best threshold", max_box_acc)):
        scores[score] = Estimate(float(best(tables[:, in_val]).mean()), None, None, int(in_val.sum()))
    return scores


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


def score_network(network, facts, val, val_boxed, train_boxed, boxes, deleted, label):
    """All scores of a network, {map: {score: Estimate}}, and its confusion matrix. val: Photos, of which val_boxed (n,)
    have boxes; train_boxed: Photos that have; boxes: first val's, then train's.

    Passes: each photo of val, for accuracy and maps; `DROP_PHOTOS` of them masked by the own map and by the square;
    train_boxed; SEEDS x RANDOM_PHOTOS x 3 for random weights; 42 for each map of `deleted` photos.
    """
    size, classes = facts["size"], facts["classes"]
    val, train = val.relabelled(classes), train_boxed.relabelled(classes)
    logits, true_maps, likely_maps = predict_with_maps(network, val, size, val.labels, label)
    confidence, predicted = logits.softmax(1).max(1)
    drawn = torch.randperm(len(val), generator=torch.Generator().manual_seed(0))[:DROP_PHOTOS]
    few, few_boxed = drawn[:RANDOM_PHOTOS], val_boxed[:RANDOM_PHOTOS]
    chosen, few_classes = val.subset(torch.cat([few, few_boxed])), torch.cat([predicted[few], val.labels[few_boxed]])
    random_maps = torch.stack([predict_with_maps(random_network(facts, seed), chosen, size, few_classes)[1]
                               for seed in range(SEEDS)])  # (SEEDS, 100, h, w)
    scores = {kind: {} for kind in MAPS}
    scores[OWN] |= accuracies((predicted == val.labels).float(), val.labels, val.names)
    for kind, maps, deletions in ((OWN, likely_maps[drawn][None], deleted),
                                  (RANDOM, random_maps[:, : len(few)], deleted // SEEDS),
                                  (ONES, ones(min(deleted, len(drawn)), 8)[None], deleted),
                                  (SQUARE, centred_square(len(drawn), 64)[None], deleted)):
        if photos := maps.shape[1]:
            index = drawn[:photos]
            scores[kind] |= faithfulness(network, val.subset(index), size, predicted[index], confidence[index], maps,
                                         deletions)
    if len(val_boxed):
        own = true_maps[val_boxed]
        if len(train):
            own = torch.cat([own, predict_with_maps(network, train, size, train.labels)[1]])
        in_val = torch.arange(len(own)) < len(val_boxed)
        for kind, maps in ((OWN, own[None]), (RANDOM, random_maps[:, len(few) :]), (ONES, ones(len(own), 8)[None]),
                           (SQUARE, centred_square(len(own), 64)[None])):
            scores[kind] |= localisation(maps, boxes[: maps.shape[1]], in_val[: maps.shape[1]])
    return scores, confusion_matrix(val.labels, predicted, len(classes))


def confusion_matrix(labels, predicted, classes):
    """How many photos of each class are taken for which: (K, K) int64. Rows are what is there, columns what the network
    says; labels, predicted: (N,) int64; classes: K, how many there are."""
    return torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)


# ---------------------------------------------------------------- the tables of several networks

# The summary's rows; where an arrow is, higher is better.
SUMMARY = {"accuracy": " ↑", "accuracy, mean of the classes": " ↑", "pointing game": " ↑",
           "MaxBoxAccV2, cross-fitted": " ↑", "MaxBoxAccV2, cross-fitted, all": " ↑", "share in the box": " ↑",
           "area above half": ""}
WIDTH = 100  # of the summary in a terminal


def compare(networks):
    """{network: {map: {score: Estimate}}} as {score: {network: {map: Estimate}}}, with the differences that are of the
    same photos: own maps to the centred square, and each network's ("B minus A") to the first's."""
    results, first = {}, next(iter(networks))
    for network, scores in networks.items():
        for score, own in scores[OWN].items():
            cells = {kind: of_kind[score] for kind, of_kind in scores.items() if score in of_kind}
            results.setdefault(score, {})[network] = cells
            if own.per_photo is not None and SQUARE in cells:
                cells[TO_SQUARE] = difference(own, cells[SQUARE])
            if own.per_photo is not None and network != first:
                results[score][f"{network} minus {first}"] = {OWN: difference(own, networks[first][OWN][score])}
    return results


def shown(estimate, n=None):
    """An estimate in per cent, "58.0 [52.0, 63.9]", and its number of photos where it is not n; "" for None."""
    if estimate is None:
        return ""
    interval = "" if estimate.low is None else f" [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"
    return f"{100 * estimate.value:.1f}{interval}" + (f" (n = {estimate.n:,})" if n not in (None, estimate.n) else "")


def summary_tables(results, networks, form="text"):
    """The summary of `compare`'s results, networks and square side by side, differences under the scores; in a terminal
    as many networks beside each other as WIDTH holds."""
    first, lines = networks[0], [["%, [95 % interval]", "n", *networks, SQUARE]]
    for score, arrow in SUMMARY.items():
        if cells := results.get(score):
            own, squared, versus = ([cells.get(network, {}).get(kind) for network in names] for names, kind in (
                (networks, OWN), (networks, TO_SQUARE), ([f"{network} minus {first}" for network in networks], OWN)))
            lines.append([score + arrow * (form != "text"), f"{own[0].n:,}", *map(shown, own),
                          shown(cells[first].get(SQUARE))])
            lines += [[f"  minus {what}", "", *map(shown, of_networks), ""]
                      for what, of_networks in ((SQUARE, squared), (first, versus)) if any(of_networks)]
    lines = lines if any(line[-1] for line in lines[1:]) else [line[:-1] for line in lines]
    for beside in range(len(lines[0]) - 2, 0, -1):
        blocks = [[line[:2] + line[i : i + beside] for line in lines] for i in range(2, len(lines[0]), beside)]
        tables = [write_table(block, form) for block in blocks]
        if form != "text" or all(table.index("\n") <= WIDTH for table in tables):
            return "\n".join(tables)
    return "\n".join(tables)


def long_table(results):
    """All scores, maps and networks of `compare`'s results, in Markdown."""
    columns = [*MAPS, TO_SQUARE]
    rows = [[f"{score}: {network}", f"{cells[OWN].n:,}", *(shown(cells.get(c), cells[OWN].n) for c in columns)]
            for score, networks in results.items() for network, cells in networks.items()]
    return write_table([["%, [95 % interval]", "n", *columns], *rows], "markdown")


def csv_table(results):
    """All of `compare`'s results as CSV, a line each, shares from 0 to 1; without an interval its ends are empty."""
    file = io.StringIO()
    lines = [(score, network, kind, estimate.n, *estimate[:3]) for score, networks in results.items()
             for network, cells in networks.items() for kind, estimate in cells.items()]
    header = ("score", "network", "map", "n", "value", "low", "high")
    csv.writer(file, lineterminator="\n").writerows([header, *lines])
    return file.getvalue()


# ---------------------------------------------------------------- the command


def check_out(out):
    """`out` without a suffix of ours; a ScoreError where no tables can be written, before the work, not after it."""
    base = out.removesuffix(".md").removesuffix(".csv").removesuffix(".tex")
    if base.endswith(("/", os.sep)) or Path(base).is_dir():
        raise ScoreError(f"--out {out} is a folder: name the tables in it, for example {Path(out) / 'scores'}")
    folder = next(path for path in Path(base).absolute().parents if path.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ScoreError(f"--out {out} cannot be written, {folder} is no folder that takes files: name another place")
    return base


def same_network(a, b):
    """Whether two (network, facts) compute the same: equal weights, looks and classes."""
    states = [network.state_dict() for network, _ in (a, b)]
    return all(a[1][key] == b[1][key] for key in ("arch", "looks", "classes")) and all(
        torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())


def name_networks(paths, loaded):
    """{name: (path, network, facts)}, named after their architecture, numbered from the second on. A network that is
    given twice, by whatever path, is scored once, and it is said; the same weights with other looks are another one."""
    named = {}
    for path, (network, facts) in zip(paths, loaded, strict=True):
        if twin := next((known for known in named.values() if same_network(known[1:], (network, facts))), None):
            print(f"{path} is the same network as {twin[0]}: it is scored once", file=sys.stderr)
            continue
        others = sum(known["arch"] == facts["arch"] for *_, known in named.values())
        named[facts["arch"] + (f"-{others + 1}" if others else "")] = path, network, facts
    return named


def load_boxes(folder, named, val):
    """(which of val's photos have boxes, those of train that have, the boxes of both, a sentence on what is missing or
    ""). named: the folder of boxes that the user names, or None: the data's own, if it has some."""
    import data

    source, boxes, train = Path(named or folder).expanduser(), {}, val.subset(torch.arange(0))
    if named or (source / "localization.txt").exists():
        boxes, train = read_boxes(source / "localization.txt", source / "image_sizes.txt"), data.load(folder, "train")
    stems = [Path(name).stem for name in [*val.names, *train.names]]
    if twice := next((stem for stem, count in Counter(stems).items() if count > 1 and stem in boxes), None):
        raise ScoreError(f"{source} has boxes of {twice}, and {folder} has several photos of that name: rename them")
    chosen, found = [], []
    for photos, most in ((val, None), (train, TRAIN_BOXES)):
        index = torch.tensor([i for i, name in enumerate(photos.names) if Path(name).stem in boxes], dtype=torch.long)
        chosen.append(index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))][:most])
        found += [boxes[Path(photos.names[i]).stem] for i in chosen[-1]]
    if named and len(chosen[0]) == 0:
        raise ScoreError(f"{source} has no boxes of photos in {folder}'s val: name those of this data set (--boxes)")
    missing = ("" if len(chosen[0]) and len(chosen[1]) else
               f"{source} has no boxes of train: thresholds are fitted on val's alone" if len(chosen[0]) else
               "no boxes of val, so no localisation: name a folder of localization.txt and image_sizes.txt (--boxes)")
    return chosen[0], train.subset(chosen[1]), found, missing


def score(paths, source, boxes_folder, deleted, out, looks):
    """Score the checkpoints `paths` on the data `source`: prints the summary; writes it and all scores as `out`.md, the
    summary as .tex, all scores as .csv, and pictures of confusion matrices. looks: of `cam.parse_looks`, or None."""
    import cam
    import data
    import models

    out = check_out(out)
    named = name_networks(paths, cam.load_models(paths, looks))
    pictures = {name: f"{out}-confusion-{name}.png" for name in named}
    for picture in pictures.values():
        cam.check_picture_name(picture)
    folder = data.prepare(source)
    val = data.load(folder, "val")
    *boxed, missing = load_boxes(folder, boxes_folder, val)
    networks, notes = {}, [missing] * bool(missing)
    if len(boxed[0]):
        notes.append("cross-fitted: box thresholds of each half of the photos are the best of the other half; "
                     "all: with photos of train")
    for name, (path, network, facts) in named.items():
        networks[name], matrix = score_network(models.fold_norms(network), facts, val, *boxed, deleted, name)
        n = int(matrix.sum())
        measured = facts | dict(accuracy=float(matrix.diag().sum()) / n, accuracy_on="val", accuracy_n=n)
        pictures[name] = pictures[name], cam.confusion_picture(matrix, facts["classes"], cam.describe(measured))
        notes.append(f"{name}: {path}, {cam.describe(measured)}")
    results, names = compare(networks), list(networks)
    summary, bullets = summary_tables(results, names, "markdown"), "".join(f"- {note}\n" for note in notes)
    tables = {".md": f"{summary}\n{bullets}\n{long_table(results)}", ".csv": csv_table(results),
              ".tex": summary_tables(results, names, "latex")}
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    for suffix, text in tables.items():
        with models.atomic(out + suffix) as file:
            file.write(text.encode(errors="backslashreplace"))  # a path need not be text
    for picture, image in pictures.values():
        cam.save_picture(image, picture)
    print(summary_tables(results, names) + "\n".join(["", *notes, f"written: {out}.md, .csv, .tex, -confusion-*.png; "
          f"in LaTeX \\usepackage{{booktabs}} and \\input{{{out}.tex}}"]))


def main(arguments=None):
    """The command line: the scores of trained networks, as one table."""
    import cam
    import data
    import models

    parser = argparse.ArgumentParser(description="Accuracy, faithfulness and localisation of trained networks.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("models", nargs="+", help="checkpoints (runs/*/best.pt); differences are to the first")
    parser.add_argument("--data", default="data/imagenette2-160", help="folder or archive of photos in class folders")
    parser.add_argument("--boxes", help="folder of localization.txt and image_sizes.txt; by default the data's own")
    parser.add_argument("--deletion", type=int, default=100, help="photos for deletion and insertion, the slow scores")
    parser.add_argument("--out", default="figures/scores", help="where .md, .csv, .tex and pictures go, without suffix")
    cam.add_looks_option(parser)
    options = parser.parse_args(arguments)
    if options.deletion < 0:
        parser.error("--deletion takes a number of photos, 0 or more")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a name that this terminal cannot write
    models.keep_memory()
    try:
        looks = options.looks and cam.parse_looks(options.looks)
        score(options.models, options.data, options.boxes, options.deletion, options.out, looks)
    except KeyboardInterrupt:
        print("score.py: stopped; no file is half-written, and the same command starts anew", file=sys.stderr)
        sys.exit(130)
    except (ScoreError, cam.CamError, data.DataError, models.ModelError, OSError) as error:
        print(f"score.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
