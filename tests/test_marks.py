"""Planted marks: where they are, which cells are theirs, what hand-made maps say of them."""

import pytest
import torch

import data
import marks


@pytest.fixture
def photos():
    generator = torch.Generator().manual_seed(0)
    sizes = [(100, 130), (128, 96), (160, 160)] * 10
    images = [torch.randint(100, 130, (*size, 3), generator=generator).byte() for size in sizes]
    return data.from_arrays(images, torch.arange(30) % 3)


def test_marks_lie_in_their_boxes_and_nowhere_else(photos):
    before, marked = photos.pixels.clone(), torch.arange(30) % 2 == 0
    changed, boxes = marks.plant(photos, marked, seed=1)
    assert torch.equal(photos.pixels, before)
    assert torch.equal(changed.labels, photos.labels)
    for i in range(30):
        differs = (changed[i] != photos[i]).any(2)
        if not marked[i]:
            assert not differs.any()
            continue
        height, width = differs.shape
        x0, y0, x1, y1 = (boxes[i] * torch.tensor([width, height, width, height])).round().long()
        assert differs[y0:y1, x0:x1].all() and differs.sum() == (y1 - y0) * (x1 - x0)
        shorter = min(height, width)
        assert y1 - y0 == x1 - x0 and 0.055 * shorter < y1 - y0 < 0.085 * shorter
        edge = round(marks.EDGE * shorter)
        assert edge <= y0 and y1 <= height - edge and edge <= x0 and x1 <= width - edge


def test_a_mark_has_four_quarters(photos):
    changed, boxes = marks.plant(photos, torch.ones(30, dtype=torch.bool), seed=1)
    x0, y0, x1, y1 = (boxes[2] * 160).round().long()
    mark = changed[2][y0:y1, x0:x1].int()
    assert torch.equal(mark[0, 0], mark[-1, -1]) and torch.equal(mark[0, -1], mark[-1, 0])
    assert (mark[0, -1] - mark[0, 0]).abs().max() > 150
    assert len(mark.reshape(-1, 3).unique(dim=0)) == 2


def test_marks_are_never_at_the_same_place_and_a_seed_decides_where(photos):
    many = photos.subset(torch.zeros(200, dtype=torch.long))  # one photo, often
    everywhere = torch.ones(200, dtype=torch.bool)
    changed, boxes = marks.plant(many, everywhere, seed=3)
    assert len(boxes[:, :2].unique(dim=0)) > 190
    low, high = boxes.amin(0), boxes.amax(0)
    assert low[:2].max() < 0.12 and high[2:].min() > 0.88  # from edge to edge
    assert torch.equal(marks.plant(many, everywhere, seed=3)[0].pixels, changed.pixels)
    assert not torch.equal(marks.plant(many, everywhere, seed=4)[1], boxes)


def test_a_mark_is_seen_in_the_smallest_photos():
    small = data.from_arrays([torch.full((8, 8, 3), 128, dtype=torch.uint8)] * 20)
    changed, _ = marks.plant(small, torch.ones(20, dtype=torch.bool), seed=0)
    assert all((changed[i] != small[i]).sum() >= 12 for i in range(20))  # 2 x 2 pixels of 3


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (40, 1)])
def test_a_mark_is_no_larger_than_a_photo_of_one_line(size):
    line = data.from_arrays([torch.full((*size, 3), 128, dtype=torch.uint8)] * 20)
    changed, boxes = marks.plant(line, torch.ones(20, dtype=torch.bool), seed=0)
    assert all((changed[i] != line[i]).any(2).sum() == 1 for i in range(20))
    assert 0 <= boxes.min() and boxes.max() <= 1


def test_of_one_photo_there_is_no_interval():
    one = torch.tensor([[2.0]])
    assert str(marks.mean(one)) == "2.00" and marks.mean(one)[1:3] == (None, None)
    assert str(marks.correlated(one, one)) == "nan"


def test_the_cells_that_a_mark_touches():
    boxes = torch.tensor([[0.5, 0.25, 0.75, 0.5], [0.45, 0.0, 0.55, 0.1]])
    expected = torch.zeros(2, 4, 4, dtype=torch.bool)
    expected[0, 1, 2] = expected[1, 0, 1] = expected[1, 0, 2] = True
    assert torch.equal(marks.near(boxes, 4, 4, 0), expected)  # an edge shared is not touched
    around = marks.near(boxes, 4, 4, 1)
    assert torch.equal(around[0], torch.tensor([[0, 1, 1, 1]] * 3 + [[0] * 4]).bool())
    assert torch.equal(around[1], torch.tensor([[1] * 4] * 2 + [[0] * 4] * 2).bool())
    assert marks.near(boxes, 4, 4, 3).all()
    assert marks.near(boxes, 2, 8, 0).sum((1, 2)).tolist() == [2, 2]


def test_what_hand_made_maps_say():
    boxes = torch.tensor([[0.5, 0.25, 0.75, 0.5]]).repeat(3, 1)
    before = torch.zeros(3, 4, 4)
    before[:, 3, 0] = 1  # an object, far away
    maps = before.clone()
    maps[:, 1, 2] = torch.tensor([3.0, 6, 0])  # the mark's cell
    maps[:, 0, 1] = torch.tensor([1.0, 2, 0])  # beside it
    maps[:, 0, 0] = -2
    added = maps.mean((1, 2)) - before.mean((1, 2))
    scores = marks.claims(before, maps, added, boxes)
    values = {name: score[1:] for name, score in scores.items()}
    assert values["near the mark: the map's maximum"][0].tolist() == [1, 1, 0]
    torch.testing.assert_close(values["near the mark: share of what adds"][0],
                               torch.tensor([4 / 5, 8 / 9, 0]))
    assert values["  without the mark"][0].tolist() == [0, 0, 0]
    assert values["  of the area"][0].tolist() == [9 / 16] * 3
    says, truth = values["its cells and 0 around, map: median share of that"]
    torch.testing.assert_close(says, torch.tensor([3.0, 6, 0]) / 16)
    torch.testing.assert_close(truth, torch.tensor([2.0, 6, -2]) / 16)
    change, _ = values["its cells and 3 around, change of map: the same"]
    torch.testing.assert_close(change, truth)  # all cells: the identity


def test_who_is_right_in_four_parts():
    without = torch.eye(3)[[0, 0, 1, 2]]  # predictions
    marked = torch.eye(3)[[0, 1, 0, 2]]
    labels = torch.tensor([0, 0, 1, 2])
    shares = {name: float(values.mean()) for name, (_, values) in
              marks.predictions(without, marked, labels, 0).items()}
    assert shares == {"the class, without the mark: own class": 1,
                      "the class, with the mark: own class": 0.5,
                      "others, without the mark: own class": 1,
                      "others, with the mark: own class": 0.5,
                      "others, without the mark: taken for the class": 0,
                      "others, with the mark: taken for the class": 0.5}
    assert list(marks.predictions(without, marked, labels, None)) == [
        "others, without the mark: own class", "others, with the mark: own class"]


def test_an_interval_of_photos_holds_its_statistic_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    held = {"mean": 0, "correlation": 0, "median ratio": 0}
    for _ in range(200):
        x = torch.randn(1, 150, generator=generator)
        y = 0.6 * x + 0.8 * torch.randn(1, 150, generator=generator)
        found = {"mean": (marks.mean(x), 0), "correlation": (marks.correlated(x, y), 0.6),
                 "median ratio": (marks.median_ratio(y, x), 0.6)}
        for name, (number, truth) in found.items():
            held[name] += number.low <= truth <= number.high
    assert all(180 <= count <= 199 for count in held.values()), held


def test_seeds_that_differ_widen_the_interval():
    values = torch.randn(1, 400, generator=torch.Generator().manual_seed(0))
    one, same = marks.mean(values), marks.mean(values.repeat(3, 1))
    apart = marks.mean(values + torch.tensor([[-1.0], [0], [1]]))
    assert one[:3] == pytest.approx(same[:3], abs=1e-6)
    assert apart.value == pytest.approx(one.value, abs=1e-6)
    half = 4.303 / 3**0.5  # of Student's t, two degrees of freedom, deviation 1
    assert apart.high - apart.value == pytest.approx((half**2 + (one.high - one.value)**2)**0.5)
    assert str(marks.Number(1.234, -0.5, 2, 3)) == "1.23 [-0.50, 2.00]"


def test_seeds_are_stacked():
    boxes, labels = torch.tensor([[0.5, 0.25, 0.75, 0.5]]).repeat(20, 1), torch.arange(20) % 2
    generator = torch.Generator().manual_seed(0)

    def answers():
        maps = torch.randn(20, 3, 4, 4, generator=generator)
        return maps, maps.mean((2, 3))

    seeds = [marks.measure(answers(), answers(), boxes, labels, 2) for _ in range(3)]
    found = marks.estimates(seeds)
    assert found.keys() == seeds[0].keys()
    assert found["others, with the mark: own class"].n == 20
    assert found["the mark adds to the logit"].value == pytest.approx(
        sum(float(seed["the mark adds to the logit"][1].mean()) for seed in seeds) / 3, abs=1e-6)
    everywhere = found["its cells and 3 around, change of map: the same"]
    assert everywhere[:3] == pytest.approx((1, 1, 1), abs=1e-4)
