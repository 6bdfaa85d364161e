"""Marks planted in photos, and what maps say of them, where the truth is known.

    marked, boxes = marks.plant(photos, torch.ones(len(photos), dtype=bool), seed=0)
    near = marks.near(boxes, 12, 12, margin=1)                      # (N, 12, 12) bool, cells
    scores = marks.measure(answers, answers_marked, boxes, labels, 0)

A photo is seen without a mark and with one: what the mark adds to a logit is known, and the map
says, in logits too, what the cells near the mark add. Copy data.py and metrics.py with it.
"""

from dataclasses import replace
from functools import partial
from math import hypot, nan

import torch

import data
from metrics import STUDENT_T, Estimate, difference, mean_interval

SIDE, EDGE = (0.06, 0.08), 0.08  # of a mark, and from it to the photo's edge, in shorter sides


def plant(photos, marked, seed):
    """A copy of the photos with a mark somewhere in those `marked` (N,), and its boxes (N, 4),
    x0, y0, x1, y1 as fractions. A mark has four quarters, yellow and black, as on the dummies of
    crash tests."""
    generator, boxes = torch.Generator().manual_seed(seed), torch.zeros(len(photos), 4)
    images = [photos[i].clone() for i in range(len(photos))]
    for i in marked.nonzero()[:, 0].tolist():
        height, width, _ = images[i].shape
        larger, v, u, yellow, black = torch.rand(5, generator=generator).tolist()
        shorter = min(height, width)
        side = min(shorter, max(2, round((SIDE[0] + (SIDE[1] - SIDE[0]) * larger) * shorter)))
        edge = round(EDGE * shorter)
        y, x = (edge + round(w * (n - side - 2 * edge)) for w, n in ((v, height), (u, width)))
        half = torch.arange(side) < side / 2
        colours = torch.tensor([220, 180, 0]) + 35 * yellow, torch.tensor(60 * black)
        square = torch.where((half[:, None] ^ half)[..., None], *colours)  # (side, side, 3)
        images[i][y : y + side, x : x + side] = square.to(torch.uint8)
        boxes[i] = torch.tensor([x / width, y / height, (x + side) / width, (y + side) / height])
    changed = data.from_arrays(images, photos.labels)
    return replace(changed, classes=list(photos.classes), device=photos.device), boxes


def near(boxes, height, width, margin):
    """The cells of maps that a mark touches, and `margin` around: (N, height, width) bool."""
    x0, y0, x1, y1 = boxes.T[..., None]  # (N, 1) each
    y, x = torch.arange(height), torch.arange(width)
    rows = (y - margin < y1 * height) & (y0 * height < y + 1 + margin)
    columns = (x - margin < x1 * width) & (x0 * width < x + 1 + margin)
    return rows[:, :, None] & columns[:, None]


# ---------------------------------------------------------------- numbers that are no shares


class Number(Estimate):
    """An `Estimate` that is not shown in per cent."""

    def __str__(self):
        interval = "" if self.low is None else f" [{self.low:.2f}, {self.high:.2f}]"
        return f"{self.value:.2f}{interval}"


def resampled(statistic, *values):
    """The `Number` of a statistic (..., N) -> (...) of values (S, N) of S seeds: its mean over
    seeds. The interval: of 500 resamples of the photos (Efron 1979), and of the spread of seeds."""
    (seeds, n), of_seeds = values[0].shape, statistic(*values)
    if n == 1:
        return Number(float(of_seeds.mean()), None, None, n)
    draws = torch.randint(n, (500, n), generator=torch.Generator().manual_seed(0))
    means = torch.stack([statistic(*(v[:, draw] for v in values)).mean() for draw in draws])
    low, high = means.nanquantile(torch.tensor([0.025, 0.975])).tolist()
    spread = STUDENT_T[seeds] * float(of_seeds.std()) / seeds**0.5 if seeds > 1 else 0.0
    mean = float(of_seeds.mean())
    return Number(mean, mean - hypot(mean - low, spread), mean + hypot(high - mean, spread), n)


def correlation(x, y):
    """Pearson's correlation of x and y (S, N), for each of S seeds: (S,); NaN if N is 1."""
    if x.shape[1] == 1:
        return x.new_full((len(x),), nan)
    return torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(x, y, strict=True)])


def paired(a, b):
    """The `Estimate` of a - b, shares (S, N) of the same photos."""
    return difference(mean_interval(a), mean_interval(b))


mean = partial(resampled, lambda x: x.mean(-1))
median_ratio = partial(resampled, lambda x, y: (x / y).median(-1).values)
correlated = partial(resampled, correlation)


# ---------------------------------------------------------------- what a map says of the mark


def predictions(without, marked, labels, k):
    """Which photos are taken for their own class, and for class k: {score: (how, (n,) 1 or 0)}.

    without, marked: logits (N, K) without and with marks. k: None counts all photos as others.
    """
    scores = {}
    of_class = labels == (-1 if k is None else k)
    for kind, chosen in (("the class", of_class), ("others", ~of_class)):
        for how, logits in (("without", without), ("with", marked)):
            predicted, name = logits.argmax(1)[chosen], f"{kind}, {how} the mark"
            scores[f"{name}: own class"] = mean_interval, (predicted == labels[chosen]).float()
            if kind == "others" and k is not None:
                scores[f"{name}: taken for the class"] = mean_interval, (predicted == k).float()
    return {name: score for name, score in scores.items() if len(score[1])}


def claims(before, maps, added, boxes):
    """What the maps of a class say of the mark: {score: (what makes an `Estimate`, (N,), ...)}.

    before, maps (N, h, w): without and with the mark; added (N,): to the logit, by the mark.
    """
    cells = [near(boxes, *maps.shape[1:], margin).float() for margin in range(4)]
    top = maps == maps.amax((1, 2), keepdim=True)
    parts = [(of_map.relu() * cells[1]).sum((1, 2)) / of_map.relu().sum((1, 2)).clamp(min=1e-9)
             for of_map in (maps, before)]
    scores = {"near the mark: the map's maximum": (mean_interval, (cells[1] * top).amax((1, 2))),
              "near the mark: share of what adds": (mean_interval, parts[0]),
              "  without the mark": (mean_interval, parts[1]),
              "  difference": (paired, *parts),
              "  of the area": (mean_interval, cells[1].mean((1, 2))),
              "the mark adds to the logit": (mean, added)}
    for margin, nearby in enumerate(cells):
        says, change = (values.mul(nearby).mean((1, 2)) for values in (maps, maps - before))
        where = f"its cells and {margin} around"
        scores |= {f"{where}, map: correlation with that": (correlated, says, added),
                   f"{where}, map: median share of that": (median_ratio, says, added),
                   f"{where}, change of map: the same": (median_ratio, change, added)}
    return scores


def measure(without, marked, boxes, labels, k=None):
    """All scores of maps (N, K, h, w) and logits (N, K), without and with marks, for class k, or,
    without k, for that predicted with the mark."""
    shown = marked[1].argmax(1) if k is None else torch.full_like(labels, k)
    each = torch.arange(len(labels))
    added = (marked[1] - without[1])[each, shown]
    return (predictions(without[1], marked[1], labels, k)
            | claims(without[0][each, shown], marked[0][each, shown], added, boxes))


def estimates(seeds):
    """{score: `Estimate`} of what `measure` says of the networks of several seeds."""
    return {name: how(*(torch.stack([of_seed[name][i] for of_seed in seeds])
                        for i in range(1, 1 + len(values))))
            for name, (how, *values) in seeds[0].items()}
