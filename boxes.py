"""Boxes of objects: read from a folder, matched with photos.

    [(photos, boxes), *of_train], missing = load_boxes("data/demo", None, val)

The folder holds two files as wsolevaluation has them: localization.txt, of lines like
val/NAME.JPEG,x0,y0,x1,y1 in pixels, and image_sizes.txt, of lines like val/NAME.JPEG,width,height.
NAME alone says which photo it is. The boxes of a photo come out as (n, 4): x0, y0, x1, y1 as
fractions of its width and height.
"""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

import folders

TRAIN_BOXES = 400  # photos of train whose boxes are used


def read_lines(path, form):
    """Yields (line number, name, [int, ...]) of a file of lines like "val/NAME.JPEG,x,y"."""
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): name another file (BOXES=)"
                         ) from error
    pattern = re.compile("([^,]*)" + r",\s*(-?[0-9]{1,9})\s*" * form.count(","))
    for number, line in enumerate(lines, 1):
        if line.strip():
            if not (match := pattern.fullmatch(line)):
                raise ValueError(f"{path}, line {number}: {line[:80]!r} is not {form} in whole "
                                 "numbers")
            file, *values = match.groups()
            yield number, Path(file).stem, [int(value) for value in values]


def read_sizes(path):
    """{NAME: [width, height]} of a file of sizes. Raises ValueError: two of one NAME."""
    sizes = {}
    for number, name, size in read_lines(path, "val/NAME.JPEG,width,height"):
        if sizes.setdefault(name, size) != size:
            raise ValueError(f"{path}, line {number}: {name} has another size above: rename one "
                             "of the photos")
    return sizes


def read_boxes(localization, image_sizes, sizes=None):
    """{NAME: (n, 4)} from the two files of wsolevaluation, whose x1 and y1 are a box's last pixel.

    What reaches out of the photo is cut off. sizes: what `read_sizes` says of image_sizes, where it
    is read already. Raises ValueError: nothing is left, or no such lines.
    """
    sizes, boxes = sizes or read_sizes(image_sizes), {}
    for number, name, (x0, y0, x1, y1) in read_lines(localization, "val/NAME.JPEG,x0,y0,x1,y1"):
        if name not in sizes:
            raise ValueError(f"{localization}, line {number}: {image_sizes} has no size for {name}")
        width, height = sizes[name]
        box = max(x0, 0), max(y0, 0), min(x1 + 1, width), min(y1 + 1, height)
        if box[0] >= box[2] or box[1] >= box[3]:
            raise ValueError(f"{localization}, line {number}: the box ends before it begins, or "
                             f"lies outside the {width} x {height} pixels of {name}")
        shares = box[0] / width, box[1] / height, box[2] / width, box[3] / height
        boxes.setdefault(name, []).append(shares)
    return {name: torch.tensor(of_photo) for name, of_photo in boxes.items()}


def with_boxes(photos, boxes, most=None):
    """The photos that have boxes, in a drawn order, `most` at most, and a list of their boxes."""
    stems = [Path(name).stem for name in photos.names]
    index = torch.tensor([i for i, stem in enumerate(stems) if stem in boxes], dtype=torch.long)
    drawn = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))][:most]
    return photos.subset(drawn), [boxes[stems[i]] for i in drawn]


def check_upright(photos, sizes, source):
    """Raise ValueError where photos are turned (EXIF), and their boxes, by their sizes, are not."""
    for name, height, width in zip(photos.names, photos.height, photos.width, strict=True):
        listed_width, listed_height = sizes[Path(name).stem]
        if (width - height) * (listed_width - listed_height) < 0:
            raise ValueError(f"{name} is turned as its EXIF block says, to {int(width)} x "
                             f"{int(height)}, and {source} is of {listed_width} x "
                             f"{listed_height}: turn its boxes as well")


def load_boxes(folder, named, val):
    """[(Photos, boxes)] of val and of train, as far as there are boxes; what is missing, or "".

    named: the folder of boxes that the user names, or None: the data's own, if it has some.
    """
    source, boxes, sizes = Path(named or folder), {}, {}
    if named or (source / "localization.txt").exists():
        localization, image_sizes = source / "localization.txt", source / "image_sizes.txt"
        sizes = read_sizes(image_sizes)
        boxes = read_boxes(localization, image_sizes, sizes)
    of_val = with_boxes(val, boxes)
    check_upright(of_val[0], sizes, source)
    if named and not of_val[1]:
        raise ValueError(f"{source} has no boxes of photos in {folder}'s val: name other boxes "
                         "(--boxes)")
    if not of_val[1]:
        return [], ("no boxes of val, so no localisation: name a folder with localization.txt, "
                    "image_sizes.txt (--boxes)")
    train = replace(folders.load(folder, "train"), device=val.device)
    stems = Counter(Path(name).stem for name in [*val.names, *train.names])
    if twice := next((stem for stem, count in stems.items() if count > 1 and stem in boxes), None):
        raise ValueError(f"{source} has boxes of {twice}, but several photos in {folder} are named "
                         "so: rename them")
    of_train = with_boxes(train, boxes, TRAIN_BOXES)
    check_upright(of_train[0], sizes, source)
    if not of_train[1]:
        return [of_val], f"{source} has no boxes of train: thresholds are fitted on val's alone"
    return [of_val, of_train], ""
