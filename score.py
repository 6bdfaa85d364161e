"""Where did the network look? Maps, boxes and probabilities in, numbers out.

    python score.py runs/resnet18/best.pt runs/cnn/best.pt --boxes FOLDER     one table for both networks

In code:

    boxes = read_boxes("localization.txt", "image_sizes.txt")                 # {name: (n, 4)}
    table = best_iou_per_threshold(maps, [boxes[name] for name in names])     # (N, T)
    value, low, high = bootstrap(table, max_box_acc)                          # with its 95 % interval

Maps are (N, h, w) float32, one class per photo, signed, in logits, and cover the whole photo. Boxes are a list of N
tensors (n, 4), x0, y0, x1, y1 as fractions of the photo's width and height, which fit every copy of the photo,
squashed ones included. "Per photo" means (N,), to be averaged, or handed to `bootstrap`; all scores are shares, 0 to 1.
The functions know no network: copy this file alone and they work. The command wants the other files beside it.
"""

import argparse
import csv
import io
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

SIZE = 224  # maps meet boxes on a grid of SIZE x SIZE cells, as in Choe et al. 2020
THRESHOLDS = torch.arange(100) / 100  # of maps that run from 0 to 1


class ScoreError(Exception):
    """Something the user can mend; the message is one sentence that says what and how."""


# ---------------------------------------------------------------- intervals and tables


def accuracy_interval(correct, n):
    """The share `correct` of n with its 95 % interval, (value, low, high); Wilson 1927, honest near 0 and 1 too."""
    if not 0 <= correct <= n or n == 0:
        raise ScoreError(f"{correct} correct of {n} is no share: score at least one photo")
    z, share = 1.959964, correct / n
    centre, half = share + z * z / (2 * n), z * (share * (1 - share) / n + (z / (2 * n)) ** 2) ** 0.5
    return share, max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def bootstrap(values, statistic=None, resamples=1000, seed=0):
    """A statistic over photos with its 95 % interval, (value, low, high), by drawing the photos anew (Efron 1979).
    values: (N, ...), differences of two networks on the same photos too; statistic: (R, N, ...) -> (R,), None: mean."""
    if len(values) == 0:
        raise ScoreError("there is no photo to score: score at least one")
    statistic = statistic or (lambda v: v.float().mean(1))
    draws = torch.randint(len(values), (resamples, len(values)), generator=torch.Generator().manual_seed(seed))
    chunk = max(1, 2**22 // values.numel())  # resamples at once, to bound the memory
    drawn = torch.cat([statistic(values[index]) for index in draws.to(values.device).split(chunk)])
    low, high = drawn.double().cpu().quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return float(statistic(values[None])), low, high


def write_table(rows, form="text"):
    """A string, from rows [(score, {column: (value, low, high)})] of shares; a column that a row lacks stays empty.
    form: "text" or "markdown", to read, in per cent; "csv", to compute with, a line per value."""
    if form == "csv":
        file = io.StringIO()
        lines = [(score, column, *map(float, cell)) for score, cells in rows for column, cell in cells.items()]
        csv.writer(file, lineterminator="\n").writerows([("score", "column", "value", "low", "high"), *lines])
        return file.getvalue()
    columns = list(dict.fromkeys(column for _, cells in rows for column in cells))
    grid = [["%, [95 % interval]", *columns]]
    for score, cells in rows:
        shown = ["{:.1f} [{:.1f}, {:.1f}]".format(*(100 * v for v in cells[c])) if c in cells else "" for c in columns]
        grid.append([score, *shown])
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    lines = [[f"{cell:{'>' if i else '<'}{widths[i]}}" for i, cell in enumerate(line)] for line in grid]
    left, between, right = {"text": ("", "  ", "\n"), "markdown": ("| ", " | ", " |\n")}[form]
    if form == "markdown":
        lines.insert(1, ["-" * (w - 1) + (":" if i else "-") for i, w in enumerate(widths)])
    return "".join(left + between.join(line) + right for line in lines)


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
    flat = F.pad(masks, (1, 0, 0, 1)).flatten()
    start, end = ((flat[1:] != flat[:-1]).nonzero() + 1).view(-1, 2).T.contiguous()
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


def max_box_acc(table, iou=0.5, threshold_index=None):
    """The share of photos whose IoU reaches `iou` at one threshold for all: (..., N, T) -> (...).
    None: the threshold that is best for these very photos, as the literature reports, which flatters."""
    share = (table >= iou).float().mean(-2)
    return share.amax(-1) if threshold_index is None else share[..., threshold_index]


def max_box_acc_v2(table, threshold_indices=None, ious=(0.3, 0.5, 0.7)):
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


# ---------------------------------------------------------------- the table of trained networks

COLUMNS = ("its own map", "random weights", "ones", "centred square")  # the last three are controls
BATCH = 20  # photos at once: small enough for a processor's cache


def untrained(facts):
    """The network of `facts` with random weights, those of its last layer too: what a map owes to the architecture."""
    import models

    torch.manual_seed(0)
    other = models.build(facts["arch"], len(facts["classes"])).eval()
    torch.nn.init.normal_(other.head.weight, std=0.01)
    return other


def four_maps(explained, other, images, labels=None):
    """The maps of `COLUMNS` for the classes `labels`, or the likeliest (None): {column: (N, h, w)}, logits (N, K)."""
    import cam

    maps, logits = explained(images)
    cam.check_identity(maps, logits, explained.network.head.bias)
    n, labels = torch.arange(len(images)), logits.argmax(1) if labels is None else labels
    maps = (maps[n, labels], other(images)[0][n, labels], ones(len(n), 8), centred_square(len(n), 64))
    return dict(zip(COLUMNS, maps, strict=True)), logits


@torch.no_grad()
def faithfulness(explained, other, facts, photos, deleted):
    """Accuracy, average drop and increase on all photos, deletion and insertion on the first `deleted`, which are
    drawn at random: {score: {column: per photo}}."""
    import data

    def predict(x):
        return explained.network(x).softmax(1)

    correct, after, before, areas, started = [], [], [], [], time.time()
    order = torch.randperm(len(photos), generator=torch.Generator().manual_seed(0))
    photos = photos.subset(order)
    for number, (images, labels) in enumerate(data.eval_batches(photos, facts["size"], BATCH)):
        maps, logits = four_maps(explained, other, images)
        before_, top = logits.softmax(1).max(1)
        correct.append(top == labels)
        before.append(before_)
        after.append(torch.stack([predict(masked(images, m)).gather(1, top[:, None])[:, 0] if column != "ones"
                                  else before_ for column, m in maps.items()]))  # ones change nothing: no pass
        if BATCH * number < deleted:
            areas.append(torch.stack([torch.stack(deletion_and_insertion(predict, images, m, top))
                                      for m in maps.values()]))  # (4, 2, B)
        done = min(BATCH * (number + 1), len(photos))
        data.progress(f"{facts['arch']}:", done, len(photos), started, "photos")
    correct, before, after = torch.cat(correct).float(), torch.cat(before), torch.cat(after, 1)  # (N,), (N,), (4, N)
    unseen = torch.tensor(["ILSVRC2012_val" in name for name in photos.names])
    scores = {"accuracy": {COLUMNS[0]: correct}}
    if unseen.any():
        scores["accuracy, photos not in ImageNet's training"] = {COLUMNS[0]: correct[unseen]}
    drops = [average_drop_and_increase(before, a) for a in after]
    for i, score in enumerate(("average drop", "increase in confidence")):
        scores[score] = {column: drop[i] for column, drop in zip(COLUMNS, drops, strict=True)}
    if areas:
        areas = torch.cat(areas, 2)[:, :, :deleted]
        for i, score in enumerate(("deletion", "insertion")):
            scores[score] = dict(zip(COLUMNS, areas[:, i], strict=True))
    return scores


@torch.no_grad()
def localisation(explained, other, facts, photos, boxes):
    """Maps of the true class against boxes. photos: {split: Photos}, all with boxes. The threshold of a box score is
    chosen on train and applied to val; in rows of `best threshold`, chosen on val itself: {score: {column: ...}}."""
    import data

    found = {}  # (split, column): maps of all photos
    for split, some in photos.items():
        batches = [four_maps(explained, other, x, y)[0] for x, y in data.eval_batches(some, facts["size"], BATCH)]
        for column in COLUMNS:
            found[split, column] = torch.cat([maps[column] for maps in batches])
    truth = {split: [boxes[Path(name).stem] for name in some.names] for split, some in photos.items()}
    scores = {}
    for column in COLUMNS:
        train, val = (best_iou_per_threshold(found[split, column], truth[split]) for split in ("train", "val"))
        right = [(val[:, best_threshold(train, iou)] >= iou).float() for iou in (0.3, 0.5, 0.7)]
        area, share = focus(found["val", column], truth["val"])
        cells = {
            "MaxBoxAcc": right[1],
            "MaxBoxAcc, best threshold": bootstrap(val, max_box_acc),
            "MaxBoxAccV2": sum(right) / 3,
            "MaxBoxAccV2, best thresholds": bootstrap(val, max_box_acc_v2),
            "pointing game": pointing_game(found["val", column], truth["val"]).float(),
            "focus: area above half of the maximum": area,
            "focus: share of the positive map in the box": share,
        }
        for score, cell in cells.items():
            scores.setdefault(score, {})[column] = cell
    return scores


def as_rows(networks):
    """{network: {score: {column: per photo (N,), or (value, low, high)}}} as the rows of `write_table`; where there are
    two networks, with their difference, photo by photo."""
    rows = []
    for score in next(iter(networks.values())):
        for name, scores in networks.items():
            cells, n = {}, None
            for column, values in scores[score].items():
                if isinstance(values, tuple):
                    cells[column] = values
                elif score.startswith("accuracy"):
                    cells[column], n = accuracy_interval(int(values.sum()), len(values)), len(values)
                else:
                    cells[column], n = bootstrap(values), len(values)
            rows.append((f"{score}: {name}" + (f" (n = {n:,})" if n else ""), cells))
        first, *second = (scores[score][COLUMNS[0]] for scores in networks.values())
        if len(second) == 1 and not isinstance(first, tuple):
            rows.append((f"    {' less '.join(networks)}", {COLUMNS[0]: bootstrap(first - second[0])}))
    return rows


def score(options):
    """The table of all scores of all networks, printed, and as Markdown and CSV in files."""
    import cam
    import data
    import models

    folder = data.prepare(options.data)
    photos = {split: data.load(folder, split) for split in ("train", "val")}
    source = Path(options.boxes or folder)
    boxes = {}
    if options.boxes or (source / "localization.txt").exists():
        boxes = read_boxes(source / "localization.txt", source / "image_sizes.txt")
    boxed = {}
    for split, some in photos.items():
        found = torch.tensor([i for i, name in enumerate(some.names) if Path(name).stem in boxes], dtype=torch.long)
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
        boxed[split] = some.subset(found[order[:400]] if split == "train" else found)  # 400 settle a threshold
    if options.boxes and not all(map(len, boxed.values())):
        raise ScoreError(f"{source} has no boxes of photos in {folder}'s train and val: name those of this data set")
    networks = {}
    for path, (network, facts) in zip(options.models, cam.load_models(options.models), strict=True):
        name = facts["arch"] if facts["arch"] not in networks else path
        other = cam.MapsAndLogits(models.fold_norms(untrained(facts)))
        explained = cam.MapsAndLogits(models.fold_norms(network))
        networks[name] = faithfulness(explained, other, facts, photos["val"], options.deletion)
        if all(map(len, boxed.values())):
            networks[name] |= localisation(explained, other, facts, boxed, boxes)
    rows = as_rows(networks)
    print(write_table(rows), end="")
    if not boxes:
        print("no boxes, so no localisation: name a folder of localization.txt and image_sizes.txt (BOXES=)")
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    for form, suffix in (("markdown", ".md"), ("csv", ".csv")):
        with models.atomic(out.with_suffix(suffix)) as file:
            file.write(write_table(rows, form).encode())


def main():
    """The command line: the scores of trained networks, as one table."""
    parser = argparse.ArgumentParser(description="Accuracy, faithfulness and localisation of trained networks.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    parser.add_argument("models", nargs="+", help="checkpoints (runs/*/best.pt)")
    parser.add_argument("--data", default="data/imagenette2-160", help="ImageNette folder or .tgz")
    parser.add_argument("--boxes", help="folder of localization.txt and image_sizes.txt; by default the data's own")
    parser.add_argument("--deletion", type=int, default=100, help="photos for deletion and insertion, the slow scores")
    parser.add_argument("--out", default="figures/scores", help="where .md and .csv go")
    options = parser.parse_args()
    import cam
    import data
    import models

    models.keep_memory()
    try:
        score(options)
    except (ScoreError, cam.CamError, data.DataError, models.ModelError, OSError) as error:
        print(f"score.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
