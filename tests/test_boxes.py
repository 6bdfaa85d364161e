"""boxes.py: the files of boxes, and what is refused in them."""

import time

import pytest
import torch
from conftest import REPO

import data
from boxes import load_boxes, read_boxes

BOXES = REPO.parent / "shared" / "boxes"


def write(folder, boxes, sizes):
    (folder / "localization.txt").write_text(boxes)
    (folder / "image_sizes.txt").write_text(sizes)
    return folder / "localization.txt", folder / "image_sizes.txt"


def test_read_boxes(tmp_path):
    boxes = read_boxes(*write(
        tmp_path,
        "val/a.JPEG,0,0,99,49\nval/b.x.JPEG,10,5,10,5\nval/a.JPEG,50,25,60,30\n\n"
        "val/a.JPEG,-10,40,300,60\n",
        "val/a.JPEG,100,50\nval/b.x.JPEG,20,10\nval/c.JPEG,1,1\n",
    ))
    assert list(boxes) == ["a", "b.x"]
    three = torch.tensor([[0, 0, 1, 1], [0.5, 0.5, 0.61, 0.62], [0, 0.8, 1, 1]])
    torch.testing.assert_close(boxes["a"], three)
    one = torch.tensor([[0.5, 0.5, 0.55, 0.6]])  # one pixel is a box
    torch.testing.assert_close(boxes["b.x"], one)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("val/a.JPEG,1,2,3", "not val/NAME.JPEG,x0,y0,x1,y1"),
        ("val/a.JPEG,1,2,3,4,5", "not val/NAME.JPEG,x0,y0,x1,y1"),
        ("val/a.JPEG,1,2,3,four", "whole numbers"),
        ("val/a.JPEG,1.5,2,3,4", "whole numbers"),
        ("val/a.JPEG,1,2,3," + 5000 * "4", "whole numbers"),
        ("val/unknown.JPEG,1,2,3,4", "has no size for unknown"),
        ("val/a.JPEG,3,2,1,4", "ends before it begins"),
        ("val/a.JPEG,100,0,120,20", "outside the 100 x 50 pixels of a"),
        ("val/a.JPEG,-9,0,-1,20", "outside the 100 x 50 pixels of a"),
    ],
)
def test_a_bad_line_is_refused_by_file_and_number(tmp_path, line, message):
    paths = write(tmp_path, f"val/a.JPEG,0,0,9,9\n{line}\n", "val/a.JPEG,100,50\n")
    with pytest.raises(ValueError, match=message) as error:
        read_boxes(*paths)
    assert f"{paths[0]}, line 2:" in str(error.value)


def test_sizes_of_photos_that_are_told_apart_by_their_suffix_alone(tmp_path):
    paths = write(tmp_path, "val/a.1,0,0,9,9\n", "val/a.1,100,50\nval/a.1,100,50\nval/a.2,50,50\n")
    with pytest.raises(ValueError, match="line 3: a has another size above"):
        read_boxes(*paths)


def test_boxes_of_photos_that_are_turned_are_refused(tmp_path):
    write(tmp_path, "val/0.JPEG,0,0,9,9\n", "val/0.JPEG,60,40\n")
    photos = data.from_arrays([torch.zeros(60, 40, 3, dtype=torch.uint8)])
    with pytest.raises(ValueError, match="0 is turned .* to 40 x 60, and .* is of 60 x 40"):
        load_boxes(tmp_path, tmp_path, photos)


def test_bad_files_are_refused(tmp_path):
    paths = write(tmp_path, "val/a.JPEG,0,0,9,9\n", "val/a.JPEG,100\n")
    message = "image_sizes.txt, line 1: .* is not val/NAME.JPEG,width,height"
    with pytest.raises(ValueError, match=message):
        read_boxes(*paths)
    with pytest.raises(ValueError, match="absent.txt cannot be read"):
        read_boxes(paths[0], tmp_path / "absent.txt")


@pytest.mark.skipif(not BOXES.is_dir(), reason="no ../shared/boxes")
def test_the_boxes_of_imagenet():
    started = time.process_time()
    boxes = read_boxes(BOXES / "localization.txt", BOXES / "image_sizes.txt")
    assert time.process_time() - started < 5  # about 0.7 s
    photos, total = len(boxes), sum(map(len, boxes.values()))
    assert (photos, total) == (50_000, 80_477)
    first = torch.tensor([[111 / 500, 108 / 375, 442 / 500, 194 / 375]])
    torch.testing.assert_close(boxes["ILSVRC2012_val_00000001"], first)
    second = boxes["ILSVRC2012_val_00000002"]
    assert len(second) == 2 and second[0, 2] == 1
