"""score.py: every score on maps with known answers, and against slow or foreign references."""

import csv
import io
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import score

REPO = Path(__file__).resolve().parent.parent
BOXES = REPO.parent / "shared" / "boxes"


def box(*corners):
    """One photo's boxes, (n, 4), from corners in eighths of the photo."""
    return torch.tensor(corners, dtype=torch.float32).view(-1, 4) / 8


def box_map(*corners, size=8):
    """(1, size, size): 1 in the boxes, whose corners are in eighths of the photo, 0 elsewhere."""
    return score.inside([box(*corners)], size, size).float()


def iou_table(maps, boxes, **options):
    return score.best_iou_per_threshold(maps, boxes, size=options.pop("size", maps.shape[-1]), **options)


def noise(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- intervals and tables


def test_accuracy_interval_is_wilsons():
    assert score.accuracy_interval(81, 263) == pytest.approx((0.3080, 0.2553, 0.3662), abs=1e-4)  # Newcombe 1998
    assert score.accuracy_interval(0, 20) == pytest.approx((0, 0, 0.1611), abs=1e-4)
    assert score.accuracy_interval(20, 20) == pytest.approx((1, 1 - 0.1611, 1), abs=1e-4)
    for wrong in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(score.ScoreError, match="no share"):
            score.accuracy_interval(*wrong)


def test_bootstrap_of_a_mean_agrees_with_theory():
    values = noise(0, 2000) * 3 + 1
    value, low, high = score.bootstrap(values)
    error = 1.96 * float(values.std()) / 2000**0.5
    assert value == pytest.approx(float(values.mean()), abs=1e-5)
    assert (low, high) == pytest.approx((value - error, value + error), abs=0.15 * error)
    assert (value, low, high) == score.bootstrap(values)  # seeded
    assert (value, low, high) != score.bootstrap(values, seed=1)
    assert score.bootstrap(torch.ones(5)) == (1, 1, 1)
    assert score.bootstrap(torch.tensor([True, False]))[0] == 0.5
    with pytest.raises(score.ScoreError, match="no photo"):
        score.bootstrap(torch.tensor([]))


def test_bootstrap_takes_any_statistic():
    table = noise(1, 30, 7).sigmoid()
    value, low, high = score.bootstrap(table, score.max_box_acc)
    assert value == float(score.max_box_acc(table))
    draws = torch.randint(30, (1000, 30), generator=torch.Generator().manual_seed(0))
    slow = torch.stack([score.max_box_acc(table[index]) for index in draws])
    assert (low, high) == pytest.approx(slow.quantile(torch.tensor([0.025, 0.975])).tolist())


def test_table_as_text_markdown_and_csv():
    rows = [("pointing game", {"cnn": (0.5, 0.25, 0.75), "ones": (1, 1, 1)}), ("IoU 0.5, best", {"ones": (0, 0, 0.1)})]
    assert score.write_table(rows).splitlines() == [
        "%, [95 % interval]                cnn                  ones",
        "pointing game       50.0 [25.0, 75.0]  100.0 [100.0, 100.0]",
        "IoU 0.5, best                               0.0 [0.0, 10.0]",
    ]
    markdown = score.write_table(rows, "markdown").splitlines()
    assert markdown[1] == "| ------------------ | ----------------: | -------------------: |"
    assert markdown[2] == "| pointing game      | 50.0 [25.0, 75.0] | 100.0 [100.0, 100.0] |"
    assert {len(line) for line in markdown} == {len(markdown[0])}
    lines = list(csv.reader(io.StringIO(score.write_table(rows, "csv"))))
    assert lines[0] == ["score", "column", "value", "low", "high"]
    assert lines[1] == ["pointing game", "cnn", "0.5", "0.25", "0.75"]
    assert lines[3] == ["IoU 0.5, best", "ones", "0.0", "0.0", "0.1"]
    with pytest.raises(KeyError):
        score.write_table(rows, "html")


# ---------------------------------------------------------------- maps


def test_min_max():
    maps = torch.stack([torch.tensor([[-3.0, 1.0], [0.0, 5.0]]), *(torch.full((2, 2), v) for v in (0.0, -2.0, 7.0))])
    out = score.min_max(maps)
    assert out[0].tolist() == [[0, 0.5], [0.375, 1]]
    assert out[1:].mean((1, 2)).tolist() == [0, 0, 1]


@pytest.mark.parametrize("size", [5, 7, 20])
@pytest.mark.parametrize("value", [1.0, 0.37, 123.4])
def test_a_constant_map_stays_constant_when_upsampling_rounds(size, value):
    assert score.min_max(score.upsample(torch.full((1, size, size), value), 224)).eq(1).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_map_that_is_not_finite_is_refused_by_name(bad):
    maps, boxes = torch.ones(3, 4, 4), [box(0, 0, 4, 4)] * 3
    maps[1, 2, 3] = bad
    with pytest.raises(score.ScoreError, match="the map of b.JPEG holds NaN or infinity"):
        score.min_max(maps, ["a.JPEG", "b.JPEG", "c.JPEG"])
    labels, images = torch.zeros(3, dtype=torch.int64), torch.zeros(3, 3, 8, 8)
    for call in (
        lambda: score.best_iou_per_threshold(maps, boxes),
        lambda: score.pointing_game(maps, boxes),
        lambda: score.focus(maps, boxes),
        lambda: score.masked(images, maps),
        lambda: score.deletion_and_insertion(lambda x: x.mean((2, 3)), images, maps, labels),
    ):
        with pytest.raises(score.ScoreError, match="photo 1"):
            call()


def test_controls():
    assert score.ones(2, 5).shape == (2, 5, 5) and score.ones(2, 5).eq(1).all()
    square = score.centred_square(2, 8)
    assert square.shape == (2, 8, 8) and square.min() > 0 and square.max() < 1
    for side in (2, 4, 6):  # above 1 - side / 8 lies the centred square of `side` cells
        expected = box_map((4 - side / 2, 4 - side / 2, 4 + side / 2, 4 + side / 2))[0].bool()
        assert torch.equal(square[0] > 1 - side / 8, expected)


# ---------------------------------------------------------------- faithfulness


def test_average_drop_and_increase_by_hand():
    drop, increase = score.average_drop_and_increase(torch.tensor([0.8, 0.5, 0.4]), torch.tensor([0.2, 0.5, 0.9]))
    assert drop.tolist() == pytest.approx([0.75, 0, 0], abs=1e-6)
    assert increase.tolist() == [0, 0, 1]


def test_masking():
    images = noise(0, 2, 3, 8, 8)
    maps = torch.cat([box_map((0, 0, 4, 8)) * 6 - 2, score.ones(1, 8)])
    out = score.masked(images, maps)
    assert torch.equal(out[0, :, :, :4], images[0, :, :, :4]) and out[0, :, :, 4:].eq(0).all()
    assert torch.equal(out[1], images[1])


class Network(nn.Module):
    """features -> global average pooling -> one linear layer, with maps that have both signs."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 32, 5, stride=4, bias=False), nn.ReLU())
        self.head = nn.Linear(32, 4, bias=False)
        for i, parameter in enumerate(self.parameters()):
            parameter.data = noise(i, *parameter.shape) / 2

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


@pytest.fixture
def example():
    """A network, 16 images, the maps and labels of their likeliest classes, and their probabilities."""
    network, images = Network().eval(), nn.functional.interpolate(noise(9, 16, 3, 4, 5), (32, 40))  # coloured blocks
    with torch.no_grad():
        probabilities = network(images).softmax(1)
        labels = probabilities.argmax(1)
        maps = torch.einsum("nc,nchw->nhw", network.head.weight[labels], network.features(images))
    return network, images, maps, labels, probabilities.amax(1)


def test_average_drop_and_increase_equal_torchcams(example):
    methods, metrics = pytest.importorskip("torchcam.methods"), pytest.importorskip("torchcam.metrics")
    network, images, maps, labels, full = example
    with torch.no_grad():
        hidden = network(score.masked(images, maps)).softmax(1).gather(1, labels[:, None])[:, 0]
    drop, increase = score.average_drop_and_increase(full, hidden)
    with methods.CAM(network, "features", "head", input_shape=(3, 32, 40)) as extractor:
        metric = metrics.ClassificationMetric(extractor, lambda logits: logits.softmax(1))
        metric.update(images)
    assert 0 < float(increase.mean()) < 1 and len(labels.unique()) > 1
    assert metric.summary()["avg_drop"] == pytest.approx(float(drop.mean()), abs=1e-5)
    assert metric.summary()["conf_increase"] == pytest.approx(float(increase.mean()), abs=1e-5)


def test_deletion_equals_torchcams(example):
    methods, metrics = pytest.importorskip("torchcam.methods"), pytest.importorskip("torchcam.metrics")
    if not hasattr(metrics, "DeletionInsertionMetric"):
        pytest.skip("this torchcam has no deletion metric")
    network, images, labels = example[0], example[1][:4], example[3][:4]
    maps = noise(4, 4, 32, 40)  # not to be upsampled: that makes equal values, whose order is free
    deletion, _ = score.deletion_and_insertion(lambda x: network(x).softmax(1), images, maps, labels)
    with methods.CAM(network, "features", "head", input_shape=(3, 32, 40)) as extractor:
        extractor.compute_cams = lambda *_, **__: [maps.clone()]
        metric = metrics.DeletionInsertionMetric(extractor, lambda logits: logits.softmax(1), steps=20)
        metric.update(images)
    assert metric.summary()["deletion_auc"] == pytest.approx(float(deletion.mean()), abs=1e-5)


def brightness(images):
    """A "probability" of class 1 that is the mean of the image, so that curves can be drawn by hand."""
    mean = images.mean((1, 2, 3))
    return torch.stack([1 - mean, mean], 1)


def test_deletion_and_insertion_by_hand():
    images = torch.zeros(2, 3, 8, 8)
    images[:, :, :, :2] = 1  # the left quarter is all there is to see
    maps, labels = torch.cat([box_map((0, 0, 2, 8)), box_map((2, 0, 8, 8))]), torch.tensor([1, 1])
    deletion, insertion = score.deletion_and_insertion(brightness, images, maps, labels, steps=4)
    # Right map: 1/4, then 0. Wrong map: 1/4 until the last quarter of the pixels goes.
    assert deletion.tolist() == pytest.approx([0.25 / 8, 0.25 * 7 / 8])
    assert insertion[0] > insertion[1]
    opposite, _ = score.deletion_and_insertion(brightness, images, maps, torch.tensor([0, 0]), steps=4)
    assert (deletion + opposite).tolist() == pytest.approx([1, 1])


def test_insertion_begins_blurred_and_ends_with_the_photo():
    seen = []

    def predict(x):
        seen.append(x.clone())
        return brightness(x)

    images = noise(3, 1, 3, 32, 32) + 1
    score.deletion_and_insertion(predict, images, noise(1, 1, 4, 4), torch.tensor([1]), steps=5)
    deletion, insertion = seen[::2], seen[1::2]
    assert torch.equal(deletion[0], images) and deletion[-1].eq(0).all()
    assert torch.equal(insertion[-1], images)
    assert insertion[0].std() < images.std() / 3 and insertion[0][..., 8:-8, 8:-8].mean() == pytest.approx(1, abs=0.2)
    changed = [(x == 0).all(1).float().mean().item() for x in deletion]
    assert changed == pytest.approx([k / 5 for k in range(6)], abs=1e-3)


def test_pixels_of_equal_value_go_in_no_direction():
    images = torch.zeros(1, 3, 40, 40)
    images[:, :, :20] = 1  # deleted row by row, this half would go first
    deletion, insertion = score.deletion_and_insertion(brightness, images, score.ones(1, 8), torch.tensor([1]))
    assert deletion.item() == pytest.approx(0.25, abs=0.01)
    again, _ = score.deletion_and_insertion(brightness, images, score.ones(1, 8), torch.tensor([1]))
    assert torch.equal(deletion, again)


# ---------------------------------------------------------------- reading boxes


def write(folder, boxes, sizes):
    (folder / "localization.txt").write_text(boxes)
    (folder / "image_sizes.txt").write_text(sizes)
    return folder / "localization.txt", folder / "image_sizes.txt"


def test_read_boxes(tmp_path):
    boxes = score.read_boxes(*write(
        tmp_path,
        "val/a.JPEG,0,0,99,49\nval/b.x.JPEG,10,5,10,5\nval/a.JPEG,50,25,60,30\n\nval/a.JPEG,-10,40,300,60\n",
        "val/a.JPEG,100,50\nval/b.x.JPEG,20,10\nval/c.JPEG,1,1\n",
    ))  # fmt: skip
    assert list(boxes) == ["a", "b.x"]
    torch.testing.assert_close(boxes["a"], torch.tensor([[0, 0, 1, 1], [0.5, 0.5, 0.61, 0.62], [0, 0.8, 1, 1]]))
    torch.testing.assert_close(boxes["b.x"], torch.tensor([[0.5, 0.5, 0.55, 0.6]]))  # one pixel is a box


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("val/a.JPEG,1,2,3", "not val/NAME.JPEG,x0,y0,x1,y1"),
        ("val/a.JPEG,1,2,3,4,5", "not val/NAME.JPEG,x0,y0,x1,y1"),
        ("val/a.JPEG,1,2,3,four", "whole numbers"),
        ("val/a.JPEG,1.5,2,3,4", "whole numbers"),
        ("val/unknown.JPEG,1,2,3,4", "has no size for unknown"),
        ("val/a.JPEG,3,2,1,4", "ends before it begins"),
        ("val/a.JPEG,100,0,120,20", "outside the 100 x 50 pixels of a"),
        ("val/a.JPEG,-9,0,-1,20", "outside the 100 x 50 pixels of a"),
    ],
)
def test_a_bad_line_is_refused_by_file_and_number(tmp_path, line, message):
    paths = write(tmp_path, f"val/a.JPEG,0,0,9,9\n{line}\n", "val/a.JPEG,100,50\n")
    with pytest.raises(score.ScoreError, match=message) as error:
        score.read_boxes(*paths)
    assert f"{paths[0]}, line 2:" in str(error.value)


def test_bad_files_are_refused(tmp_path):
    paths = write(tmp_path, "val/a.JPEG,0,0,9,9\n", "val/a.JPEG,100\n")
    with pytest.raises(score.ScoreError, match="image_sizes.txt, line 1: .* is not val/NAME.JPEG,width,height"):
        score.read_boxes(*paths)
    with pytest.raises(score.ScoreError, match="absent.txt cannot be read"):
        score.read_boxes(paths[0], tmp_path / "absent.txt")


@pytest.mark.skipif(not BOXES.is_dir(), reason="no ../shared/boxes")
def test_the_boxes_of_imagenet():
    started = time.process_time()
    boxes = score.read_boxes(BOXES / "localization.txt", BOXES / "image_sizes.txt")
    assert time.process_time() - started < 5  # about 0.7 s
    photos, total = len(boxes), sum(map(len, boxes.values()))
    assert (photos, total) == (50_000, 80_477)
    first = torch.tensor([[111 / 500, 108 / 375, 442 / 500, 194 / 375]])
    torch.testing.assert_close(boxes["ILSVRC2012_val_00000001"], first)
    assert len(boxes["ILSVRC2012_val_00000002"]) == 2 and boxes["ILSVRC2012_val_00000002"][0, 2] == 1


# ---------------------------------------------------------------- components


def flood_fill_boxes(mask):
    """The literal way: from every cell not yet seen, walk over all eight neighbours."""
    height, width = mask.shape
    free, boxes = {(y, x) for y in range(height) for x in range(width) if mask[y, x]}, []
    while free:
        todo = [free.pop()]
        x0 = x1 = todo[0][1]
        y0 = y1 = todo[0][0]
        while todo:
            y, x = todo.pop()
            x0, x1, y0, y1 = min(x0, x), max(x1, x), min(y0, y), max(y1, y)
            for neighbour in [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]:
                if neighbour in free:
                    free.remove(neighbour)
                    todo.append(neighbour)
        boxes.append((x0, y0, x1 + 1, y1 + 1))
    return sorted(boxes)


def component_boxes(mask):
    planes, boxes = score.component_boxes(mask[None])
    assert planes.eq(0).all()
    return sorted(map(tuple, boxes.tolist()))


def drawn(*rows):
    return torch.tensor([[cell == "#" for cell in row] for row in rows])


@pytest.mark.parametrize(
    ("mask", "boxes"),
    [
        (drawn("...", "..."), []),
        (drawn("###", "###"), [(0, 0, 3, 2)]),
        (drawn("#..", "..#"), [(0, 0, 1, 1), (2, 1, 3, 2)]),
        (drawn("#..", ".#.", "..#"), [(0, 0, 3, 3)]),  # corners connect
        (drawn("..#", ".#.", "#.."), [(0, 0, 3, 3)]),
        (drawn("..#", "#.."), [(0, 1, 1, 2), (2, 0, 3, 1)]),  # the end of a row does not touch the next one's beginning
        (drawn("#.#.#", "#.#.#", "#####"), [(0, 0, 5, 3)]),
        (drawn("#####", "#...#", "#.#.#", "#...#", "#####"), [(0, 0, 5, 5), (2, 2, 3, 3)]),  # no box for the hole
        (drawn("#.###", "#.#.#", "#.#.#", "###.#"), [(0, 0, 5, 4)]),  # a snake
    ],
)
def test_component_boxes(mask, boxes):
    assert component_boxes(mask) == boxes == flood_fill_boxes(mask)


def test_component_boxes_do_not_cross_masks():
    planes, boxes = score.component_boxes(torch.ones(3, 2, 4, dtype=torch.bool))
    assert planes.tolist() == [0, 1, 2] and boxes.tolist() == [[0, 0, 4, 2]] * 3


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 12), st.floats(0, 1))
def test_component_boxes_equal_a_flood_fill(seed, height, width, share):
    mask = torch.rand(height, width, generator=torch.Generator().manual_seed(seed)) < share
    assert component_boxes(mask) == flood_fill_boxes(mask)


def test_component_boxes_of_a_long_spiral():
    mask, y, x, dy, dx = torch.zeros(61, 61, dtype=torch.bool), 0, 0, 0, 1
    mask[0, 0] = True
    for length in [60, 60, 60, *(n for n in range(58, 0, -2) for _ in (0, 1))]:  # a corridor of one cell
        for _ in range(length):
            y, x = y + dy, x + dx
            mask[y, x] = True
        dy, dx = dx, -dy
    assert component_boxes(mask) == [(0, 0, 61, 61)]


# ---------------------------------------------------------------- box accuracy


def slow_best_iou(heat, boxes, threshold):
    """Best IoU at one threshold, literally: flood fill, then areas counted by multiplication. heat: from 0 to 1."""
    best, size = 0.0, heat.shape[0]
    for x0, y0, x1, y1 in flood_fill_boxes(heat > threshold):
        for a0, b0, a1, b1 in (boxes * size).tolist():
            both = max(0, min(x1, a1) - max(x0, a0)) * max(0, min(y1, b1) - max(y0, b0))
            best = max(best, both / ((x1 - x0) * (y1 - y0) + (a1 - a0) * (b1 - b0) - both))
    return best


def test_best_iou_equals_the_slow_reference():
    maps, thresholds = noise(5, 6, 5, 7), torch.tensor([0.0, 0.3, 0.55, 0.9])
    corners = torch.rand(6, 3, 2, 2, generator=torch.Generator().manual_seed(6)).sort(2).values
    boxes = [b[: 1 + i % 3] for i, b in enumerate(corners.flatten(2))]
    table = iou_table(maps, boxes, thresholds=thresholds, size=32)
    heat = score.min_max(score.upsample(maps, 32))
    slow = [[slow_best_iou(h, b, t) for t in thresholds] for h, b in zip(heat, boxes, strict=True)]
    torch.testing.assert_close(table, torch.tensor(slow))
    assert len(table.unique()) > 10


def test_a_map_equal_to_the_box_scores_one():
    corners = [(1, 2, 5, 7), (0, 0, 8, 8), (7, 7, 8, 8)]
    maps = torch.cat([box_map(c, size=16) for c in corners]) * 3 - 1  # in logits, of both signs
    boxes = [box(c) for c in corners]
    table = iou_table(maps, boxes)
    assert table.shape == (3, 100) and table.eq(1).all()
    assert score.max_box_acc_v2(table) == 1
    assert score.pointing_game(maps, boxes).eq(1).all()
    area, share = score.focus(maps, boxes, size=16)
    assert area.tolist() == [20 / 64, 1, 1 / 64] and share.eq(1).all()


def test_ones_and_zeros():
    boxes = [box((0, 0, 4, 8)), box((0, 0, 8, 6), (1, 1, 2, 2))]
    assert iou_table(score.ones(2, 8), boxes).T.unique(dim=0).tolist() == [[0.5, 0.75]]  # a box around everything
    assert score.pointing_game(score.ones(2, 8), boxes).tolist() == [0.5, 0.75]  # a blind guess
    assert [v.tolist() for v in score.focus(score.ones(2, 8), boxes)] == [[1, 1], [0.5, 0.75]]
    zeros = torch.zeros(2, 8, 8)
    assert iou_table(zeros, boxes).eq(0).all()
    assert [v.tolist() for v in score.focus(zeros, boxes)] == [[0, 0], [0, 0]]
    assert [v.tolist() for v in score.focus(zeros - 1, boxes)] == [[0, 0], [0, 0]]


def test_two_components_and_several_boxes():
    left, right = (0, 0, 3, 3), (5, 5, 8, 8)
    maps = box_map(left, right)
    for boxes in ([left], [right], [left, right], [(0, 6, 1, 7), right]):
        assert iou_table(maps, [box(*boxes)]).eq(1).all()
        assert score.focus(maps, [box(*boxes)], size=8)[1] == (1 if boxes == [left, right] else 0.5)
    assert iou_table(maps, [box((0, 0, 8, 8))]).unique().item() == pytest.approx(9 / 64)  # two boxes, not one
    assert score.pointing_game(maps, [box(left)]) == 0.5  # of two equal maxima one lies inside


def test_a_corner_joins_two_squares_into_one_box():
    assert iou_table(box_map((0, 0, 4, 4), (4, 4, 8, 8)), [box((0, 0, 8, 8))]).eq(1).all()


def test_a_box_outside_the_frame():
    maps, outside, across = box_map((4, 0, 8, 8)), box((9, 0, 12, 8)), box((4, 0, 12, 8))
    assert iou_table(maps, [outside]).eq(0).all() and iou_table(maps, [across]).eq(0.5).all()
    assert score.pointing_game(maps, [outside]) == 0 and score.pointing_game(maps, [across]) == 1
    assert score.focus(maps, [outside], size=8)[1] == 0 and score.focus(maps, [across], size=8)[1] == 1


def test_a_photo_without_a_box_is_refused():
    boxes = [box((0, 0, 4, 4)), torch.zeros(0, 4)]
    for call in (score.best_iou_per_threshold, score.pointing_game, score.focus):
        with pytest.raises(score.ScoreError, match="photo 1 has no box"):
            call(score.ones(2, 8), boxes)
    with pytest.raises(ValueError):
        score.best_iou_per_threshold(score.ones(2, 8), boxes[:1])


def test_thresholds_are_strict_and_relative():
    maps = torch.tensor([[[0.0, 0.25, 0.5, 1.0]]]).expand(1, 4, 4) * 40 - 20  # columns
    widths = iou_table(maps, [box((0, 0, 8, 8))], thresholds=torch.tensor([0.0, 0.2, 0.25, 0.5, 0.9]))
    assert widths.tolist() == [[0.75, 0.75, 0.5, 0.25, 0.25]]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(-50, 50))
def test_scores_do_not_depend_on_scale_offset_or_mirroring(seed, scale, offset):
    generator = torch.Generator().manual_seed(seed)  # of whole numbers, so that no map rounds
    maps = torch.randint(-8, 9, (2, 6, 6), generator=generator).float()
    corners = torch.randint(25, (2, 3, 2, 2), generator=generator).sort(2).values.flatten(2) / 24
    mirrored = torch.stack([1 - corners[..., 2], corners[..., 1], 1 - corners[..., 0], corners[..., 3]], 2)
    table = iou_table(maps, list(corners), size=24)
    torch.testing.assert_close(table, iou_table(maps.flip(2) * scale + offset, list(mirrored), size=24))
    assert (0 <= table).all() and (table < 1.000001).all()
    for one, other in zip(score.focus(maps, list(corners), 24),
                          score.focus(maps.flip(2) * scale, list(mirrored), 24), strict=True):  # fmt: skip
        torch.testing.assert_close(one, other)


def test_the_threshold_of_one_set_on_another():
    here = torch.tensor([[0.2, 0.9, 0.4], [0.6, 0.8, 0.0], [0.1, 0.5, 0.9]])
    there = torch.tensor([[0.6, 0.1, 0.4], [0.55, 0.9, 0.0]])
    assert score.max_box_acc(here) == 1 and score.best_threshold(here) == 1
    assert score.max_box_acc(there) == 1  # its own best, the first
    assert score.max_box_acc(there, threshold_index=score.best_threshold(here)) == 0.5
    assert score.max_box_acc(here, iou=0.7) == pytest.approx(2 / 3)
    assert score.max_box_acc_v2(here) == pytest.approx((1 + 1 + 2 / 3) / 3)
    indices = [score.best_threshold(here, iou) for iou in (0.3, 0.5, 0.7)]
    assert score.max_box_acc_v2(here, indices) == score.max_box_acc_v2(here)
    assert score.max_box_acc_v2(there, indices) == 0.5
    assert score.max_box_acc(torch.stack([here, here])).shape == (2,)  # a batch, for the bootstrap


def test_the_centred_square_finds_centred_boxes():
    boxes = [box((2, 2, 6, 6)), box((1, 1, 7, 7))]
    table = iou_table(score.centred_square(2, 64), boxes)
    assert table[0, 50] == table[1, 25] == 1  # a side of a half, of three quarters


def test_pointing_game():
    maps = torch.zeros(2, 4, 4)
    maps[:, 1, 2] = 5.0  # its centre is at 5/8 of the width, 3/8 of the height
    maps[1] -= 10  # the sign does not matter
    assert score.pointing_game(maps, [box((4, 2, 6, 4))] * 2).tolist() == [1, 1]
    assert score.pointing_game(maps, [box((2, 4, 4, 6))] * 2).tolist() == [0, 0]  # x and y are not exchanged
    assert score.pointing_game(maps, [box((2, 4, 4, 6), (4, 2, 6, 4))] * 2).tolist() == [1, 1]
    near = [box((5.5, 2, 8, 4))] * 2
    assert score.pointing_game(maps, near).tolist() == [0, 0]
    assert score.pointing_game(maps, near, tolerance=1 / 15).tolist() == [1, 1]
    boxes = list(torch.rand(40, 1, 2, 2, generator=torch.Generator().manual_seed(1)).sort(2).values.flatten(2))
    maps = noise(2, 40, 7, 7)
    peak = score.upsample(maps, 7 * 33).flatten(1).argmax(1)  # odd: cells have a pixel at their centre
    x, y = (peak % 231 + 0.5) / 231, (peak // 231 + 0.5) / 231
    expected = [float(b[0, 0] <= i < b[0, 2] and b[0, 1] <= j < b[0, 3]) for b, i, j in zip(boxes, x, y, strict=True)]
    inner = maps[:, 1:-1, 1:-1].amax((1, 2)) == maps.amax((1, 2))  # at the photo's edge the maximum is a plateau
    assert score.pointing_game(maps, boxes)[inner].tolist() == torch.tensor(expected)[inner].tolist()
    assert 0 < sum(expected) < 40 and inner.sum() > 10


def test_focus_by_hand():
    maps = torch.full((1, 8, 8), -4.0)
    maps[:, :2, :4], maps[:, 4:, 4:] = 10.0, 4.0  # an eighth of the area; a quarter, below half of the maximum
    area, share = score.focus(maps, [box((0, 0, 8, 2))], size=8)
    assert area.item() == 1 / 8 and share.item() == pytest.approx(80 / 144)
    overlapping = [box((0, 0, 8, 2), (0, 0, 4, 4))]  # counted once
    assert score.focus(maps, overlapping, size=8)[1] == share


# ---------------------------------------------------------------- the file


def test_works_alone(tmp_path):
    shutil.copy(REPO / "score.py", tmp_path)
    code = "import score; print(score.pointing_game(score.ones(1, 4), [score.torch.tensor([[0, 0, .5, 1]])]).item())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "0.5", done.stderr
