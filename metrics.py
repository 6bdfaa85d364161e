"""Where did the network look, and is the object there? Scores of maps, with 95 % intervals.

    ious = metrics.best_iou_per_threshold(maps, boxes)              # (N, T)
    print(metrics.cross_fitted_interval(ious))                      # MaxBoxAccV2: 62.1 [55.0, 68.7]
    print(metrics.mean_interval(metrics.pointing_game(maps, boxes)))

Maps are (N, h, w), one class per photo, signed, in logits, and cover the whole photo. Boxes are a
list of N tensors (n, 4): x0, y0, x1, y1 as fractions of the photo's width and height. "Per photo"
means (N,), for `mean_interval`. All scores are shares, 0 to 1.
Whatever comes in, and from whichever device, scores are computed in float32 or more.
This file imports nothing of the project: copy it alone.
"""

import math
from itertools import repeat
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
STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776445, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306,
             10: 2.262}  # 95 %, of as many seeds


# ---------------------------------------------------------------- means and their intervals


class Estimate(NamedTuple):
    """A mean over photos and its 95 % interval: shares, or differences of shares."""

    value: float
    low: float | None  # None: there is no interval that holds
    high: float | None
    n: int  # photos
    per_photo: torch.Tensor | None = None  # (N,), what `difference` pairs

    def __str__(self):
        interval = "" if self.low is None else f" [{100 * self.low:.1f}, {100 * self.high:.1f}]"
        return f"{100 * self.value:.1f}{interval}"  # per cent


def wilson_interval(share, n):
    """The interval (low, high) of a share of n photos; it holds near 0 and 1 too (Wilson 1927)."""
    if not (0 <= share <= 1 and n > 0):
        raise ValueError(f"{share} of {n} photos is no share: score at least one photo")
    centre, whole = share + Z * Z / (2 * n), 1 + Z * Z / n
    half = Z * math.sqrt(share * (1 - share) / n + (Z / (2 * n)) ** 2)
    return max(0.0, (centre - half) / whole), min(1.0, (centre + half) / whole)


def interval_of_mean(mean, variance, n):
    """The interval (low, high) of a mean, known with `variance`, of n values from 0 to 1.

    Wilson's, of as many photos as have this variance when right or wrong (the effective sample size
    of Kish 1965).
    """
    if mean in (0, 1):  # its variance of 0 says nothing
        return wilson_interval(mean, n)
    if n == 1:
        return None, None
    effective = mean * (1 - mean) / max(variance, 1e-300)
    # Where most values are 0 (or 1), few photos carry the mean, and may be alike by chance.
    end = min(mean, 1 - mean)
    carriers = n / (1 + n * variance / end / end)  # (sum of x)^2 / sum of x^2
    if carriers < 10:
        effective = min(n, effective)
    return wilson_interval(mean, effective)


def mean_interval(values, variance=0.0):
    """The `Estimate` of the mean of values from 0 to 1: (N,), or (S, N) of networks of S seeds.

    variance: of the mean, if it is larger than the values' spread tells. Several seeds, ten at
    most, add the variance between them, which counts for more, as they are few (Student's t).
    """
    if values.numel() == 0:
        raise ValueError("there is no photo to score: score at least one")
    table = values.detach().cpu().double().clamp(0, 1).reshape(-1, values.shape[-1])  # (S, N)
    if table.isnan().any() or len(table) > max(STUDENT_T):
        raise ValueError(f"a score is NaN, or there are more than {max(STUDENT_T)} seeds: leave "
                         "some out")
    seeds, n = table.shape
    per_photo = table.mean(0)
    variance = max(variance, float(per_photo.var(correction=0)) / n)
    if seeds > 1:
        variance += float(table.mean(1).var()) / seeds * (STUDENT_T[seeds] / Z) ** 2
    mean = float(per_photo.mean())
    return Estimate(mean, *interval_of_mean(mean, variance, n), n, per_photo)


def class_mean_interval(correct, labels):
    """The `Estimate` of the mean of the classes' accuracies: correct (N,), 1 or 0; labels (N,).

    A class's variance is that of Laplace's (right + 1) / (n + 2): three of three are not certain.
    """
    labels, correct = labels.cpu(), correct.detach().cpu().double()
    counts = torch.bincount(labels).double()
    right, photos = torch.bincount(labels, correct)[counts > 0], counts[counts > 0]
    smooth = (right + 1) / (photos + 2)
    variance = float((smooth * (1 - smooth) / photos).sum()) / len(photos) ** 2
    mean, effective = float((right / photos).mean()), len(photos) ** 2 / float((1 / photos).sum())
    return Estimate(mean, *interval_of_mean(mean, variance, effective), len(labels))


def difference(a, b):
    """The `Estimate` of a - b, two of the same photos; it holds near -1, 0 and 1 too.

    The arms of both intervals, combined by the correlation of photos (Newcombe 1998, method 8).
    """
    value = a.value - b.value
    if a.n == 1:
        return Estimate(value, None, None, a.n)
    pairs = torch.stack([a.per_photo, b.per_photo])
    correlation = float(torch.corrcoef(pairs)[0, 1].nan_to_num())  # NaN: of a constant

    def combined(x, y):
        return math.sqrt(max(0.0, x * x + y * y - 2 * correlation * x * y))

    low = value - combined(a.value - a.low, b.high - b.value)
    high = value + combined(a.high - a.value, b.value - b.low)
    return Estimate(value, low, high, a.n)


# ---------------------------------------------------------------- maps


def at_least_float32(values):
    """The values in float32, or in float64 if they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def finite(maps):
    """The maps, `at_least_float32`. Raises ValueError: a map holds NaN or infinity."""
    bad = (~maps.isfinite().flatten(1).all(1)).nonzero()
    if len(bad):
        raise ValueError(f"the map of photo {int(bad[0])} holds NaN or infinity: "
                         "train this network anew")
    return at_least_float32(maps)


def upsample(maps, size):
    """Maps (N, h, w) on the pixels of the image, `size` = (H, W), bilinearly: (N, H, W)."""
    return F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def min_max(maps):
    """Each map from 0, its minimum, to 1, its maximum. Constant (up to rounding): ones if positive,
    else zeros; torch-cam and wsolevaluation make it zeros."""
    cells = finite(maps)
    low, high = cells.amin((1, 2), keepdim=True), cells.amax((1, 2), keepdim=True)
    constant = high - low <= 1e-6 * cells.abs().amax((1, 2), keepdim=True)
    scaled = (cells - low) / (high - low).masked_fill(constant, 1)
    return torch.where(constant, (cells > 0).to(cells), scaled)


def centred_square(n, size=SIZE):
    """Control: a pyramid from 0 at the photo's edges to 1 in its middle, (n, size, size). Above a
    threshold t it is the centred square of side 1 - t (centre baseline of Choe et al. 2020)."""
    distance = ((torch.arange(size) + 0.5) / size - 0.5).abs()
    return (1 - 2 * torch.maximum(distance[:, None], distance)).expand(n, -1, -1)


# ---------------------------------------------------------------- faithfulness: is it needed?


def masked(images, maps):
    """Normalised images (N, 3, H, W), each times its map from 0 to 1: the rest fades to the mean.
    As in torch-cam, a map is scaled at its own size, then upsampled."""
    return (images * upsample(min_max(maps), images.shape[2:])[:, None]).to(images.dtype)


def average_drop_and_increase(probability_full, probability_masked):
    """Per photo: the share of its probability that is lost when `masked`; whether it rises (1, 0).

    Both inputs (N,): after softmax, of the class that is likeliest on the full photo. Chattopadhay
    et al. 2018; equal to torch-cam's `ClassificationMetric`.
    """
    before, after = map(at_least_float32, (probability_full, probability_masked))
    drop = (before - after).relu() / (before + 1e-7)
    return drop, (before < after).to(drop)


@torch.no_grad()
def deletion_and_insertion(predict, images, maps, labels, steps=20):
    """Per photo: the mean probability of `labels` (N,) while its pixels go, and while they come.

    predict: images (N, 3, H, W), normalised, -> probabilities (N, K). The highest pixels are first.
    Deletion (lower is better) puts zero, the data set's mean, for a pixel; insertion (higher is
    better) begins with the photo blurred. The area under the curve of Petsiuk et al. 2018.
    """
    n, _, height, width = images.shape
    blurred = gaussian_blur(images, kernel_size=11, sigma=5)
    # Equal pixels go in one random order, always the same: row by row would prefer the top.
    shuffle = torch.randperm(height * width, generator=torch.Generator().manual_seed(0))
    shuffle = shuffle.to(images.device)
    shuffled = upsample(finite(maps), (height, width)).flatten(1)[:, shuffle]
    order = shuffle[shuffled.argsort(dim=1, descending=True, stable=True)]
    rank = order.argsort(1).view(n, 1, height, width)  # 0: the pixel that goes first
    curves = []
    for step in range(steps + 1):
        changed = rank < round(height * width * step / steps)
        pair = torch.where(changed, 0, images), torch.where(changed, images, blurred)
        curves.append(torch.stack([predict(x).gather(1, labels[:, None])[:, 0] for x in pair]))
    curves = at_least_float32(torch.stack(curves))  # (steps + 1, 2, N)
    return torch.trapezoid(curves, dx=1 / steps, dim=0).unbind()


# ---------------------------------------------------------------- localisation: on the object?


def pad_boxes(boxes):
    """A list of N boxes (n, 4) as one tensor (N, most, 4), filled up with boxes of no area."""
    if not len(boxes):
        raise ValueError("there is no photo to score: score at least one")
    if empty := [i for i, of_photo in enumerate(boxes) if len(of_photo) == 0]:
        raise ValueError(f"photo {empty[0]} has no box: leave it out of the scores that need one")
    return pad_sequence(boxes, batch_first=True)


def check_count(maps, boxes):
    """Raise ValueError unless there is a list of boxes for each map, which could be broadcast."""
    if len(maps) != len(boxes):
        raise ValueError(f"{len(maps)} maps need as many lists of boxes, not {len(boxes)}")


def inside(boxes, height, width):
    """Which cells of a height x width grid have their centre in a box: (N, height, width) bool."""
    x0, y0, x1, y1 = pad_boxes(boxes)[..., None].unbind(2)  # (N, most, 1) each
    x, y = ((torch.arange(n, device=x0.device) + 0.5) / n for n in (width, height))
    columns, rows = (x0 <= x) & (x < x1), (y0 <= y) & (y < y1)
    return torch.einsum("nby,nbx->nyx", rows.float(), columns.float()) > 0


def component_boxes(masks):
    """The box of every connected component of masks (P, H, W) bool; corners connect.

    Returns the mask that each is in (M,), and x0, y0, x1, y1 in cells, x1 and y1 exclusive (M, 4).
    """
    # Runs are unbroken stretches of a row. All masks form one line, with an empty cell before each
    # row and an empty row after each mask: runs begin and end where the line changes.
    height, stride = masks.shape[1] + 1, masks.shape[2] + 1
    line = F.pad(masks, (1, 0, 0, 1)).flatten().cpu().numpy()  # NumPy finds changes faster
    changes = torch.from_numpy((line[1:] != line[:-1]).nonzero()[0] + 1).to(masks.device)
    start, end = changes.view(-1, 2).T.contiguous()  # (R,)
    # A run touches those of the next row that neither begin after it ends nor end before it begins.
    # Runs are in order, so these follow one another.
    first = torch.searchsorted(end, start + stride)  # (R,)
    count = torch.searchsorted(start, end + stride, right=True) - first
    runs = torch.arange(len(start), device=start.device)
    upper = runs.repeat_interleave(count)  # (pairs,), and `lower`: runs that touch
    before = count.cumsum(0) - count  # pairs of the runs before
    lower = (first - before)[upper] + torch.arange(len(upper), device=start.device)
    # A component is labelled with its first run: of two that touch, the larger label learns the
    # smaller; then labels of labels are followed to their end.
    label = runs
    while not torch.equal(label[upper], label[lower]):
        pair = torch.stack([label[upper], label[lower]])
        label = label.scatter_reduce(0, pair.amax(0), pair.amin(0), "amin")
        while not torch.equal(label, label[label]):
            label = label[label]
    row, x0 = start // stride, start % stride - 1
    y0, x1 = row % height, x0 + end - start
    boxes = torch.stack([x0, y0, -x1, -y0 - 1], 1)  # ends are negative: one minimum serves all four
    boxes = boxes.scatter_reduce(0, label[:, None].expand(-1, 4), boxes, "amin")
    return (row // height)[label == runs], (boxes * boxes.new_tensor([1, 1, -1, -1]))[label == runs]


def best_iou_per_threshold(maps, boxes, thresholds=THRESHOLDS, size=SIZE):
    """The best IoU of any component's box with any of the photo's boxes at each threshold: (N, T).

    maps: (N, h, w), or (1, h, w), one for all photos. Each is upsampled, scaled from 0 to 1 and cut
    strictly above the threshold; 0 where nothing is left. Choe et al. 2020 with all contours; their
    code, clovaai/wsolevaluation, upsamples with cubics, rounds maps to 256 levels and boxes to
    cells, makes map boxes a cell too large, adds a box for every hole and has 1,000 thresholds: on
    500 photos this moved MaxBoxAccV2 by 0.2 points or less.
    """
    cells = finite(maps)
    cuts = thresholds.to(cells)[:, None, None]
    found = (component_boxes(min_max(upsample(of_photo[None], size)) > cuts) for of_photo in cells)
    if len(maps) != 1:
        check_count(maps, boxes)
    else:
        found = repeat(next(found), len(boxes))
    table = cells.new_zeros(len(boxes), len(thresholds))
    padded = pad_boxes(boxes).to(cells) * size
    for row, (threshold, components), of_photo in zip(table, found, padded, strict=True):
        row.scatter_reduce_(0, threshold, box_iou(components, of_photo).amax(1), "amax")
    return table


def max_box_acc_v2(tables, ious=IOUS):
    """The share of photos of tables (..., N, T) whose IoU reaches `ious`, mean over these, each at
    the threshold best for these very photos: as the literature reports it, which flatters."""
    return sum((tables >= iou).float().mean(-2).amax(-1) for iou in ious) / len(ious)


def cross_fitted(tables, ious=IOUS):
    """Per photo of tables (..., N, T): the share of `ious` that it reaches, each at the threshold
    best for the other half of the photos. Every other photo makes a half."""
    reached = torch.zeros(tables.shape[:-1], device=tables.device)  # (..., N)
    for iou in ious:
        right = (tables >= iou).float()
        for half in (0, 1):
            others = right[..., 1 - half :: 2, :].mean(-2, keepdim=True)  # (..., 1, T)
            best = others.argmax(-1, keepdim=True)  # (..., 1, 1)
            reached[..., half::2] += torch.take_along_dim(right[..., half::2, :], best, -1)[..., 0]
    return reached / len(ious)


def cross_fitted_interval(tables, scored=None):
    """The `Estimate` of `cross_fitted` MaxBoxAccV2; tables (N, T), or (S, N, T) of S seeds.

    scored: photos at the beginning that it is of; the others help with thresholds. None: all.
    Its variance is that of 50 resamples of each half, thresholds fitted anew (Efron 1979): with
    thresholds as they are, it holds 86 to 92 % instead of 95.
    """
    tables, n = tables.detach().cpu(), tables.shape[-2]
    scored, generator, means = scored or n, torch.Generator().manual_seed(0), []
    for _ in range(50):
        draw = torch.empty(n, dtype=torch.long)
        for half in (0, 1):
            count = len(draw[half::2])
            draw[half::2] = half + 2 * torch.randint(max(1, count), (count,), generator=generator)
        means.append(cross_fitted(tables[..., draw, :])[..., draw < scored].mean())
    variance = float(torch.stack(means).nan_to_num().double().var())
    return mean_interval(cross_fitted(tables)[..., :scored], variance)


def pointing_game(maps, boxes):
    """Per photo: is the map's maximum in a box (1, 0)? Of k equal maxima, the share that is.

    Zhang et al. 2016, without their tolerance of 15 pixels. Nothing is upsampled: bilinear surfaces
    are highest at the centre of a cell.
    """
    check_count(maps, boxes)
    top = finite(maps) == maps.amax((1, 2), keepdim=True)
    in_box = inside(boxes, *maps.shape[1:]).to(maps.device)
    return (top & in_box).sum((1, 2)) / top.sum((1, 2))


def area_and_share(maps, boxes, size=SIZE):
    """Per photo: the share of its area above half of the map's maximum, and the share of the map's
    positive part in its boxes (energy-based pointing game, Wang et al. 2020). Both are 0 for a map
    that is nowhere positive."""
    check_count(maps, boxes)
    pixels = upsample(finite(maps), size)
    positive, in_box = pixels.relu(), inside(boxes, *pixels.shape[1:]).to(pixels.device)
    area = (pixels > pixels.amax((1, 2), keepdim=True) / 2).float().mean((1, 2))
    whole = positive.sum((1, 2)).clamp(min=torch.finfo(pixels.dtype).tiny)
    return area, (positive * in_box).sum((1, 2)) / whole
