"""What a command line names: checkpoints, photos, classes, and files to write."""

import glob
import hashlib
import itertools
import os
import re
import sys
import unicodedata
from pathlib import Path

import torch

import data
import machine
import networks
import page

CHECKPOINTS = ["runs/resnet18/best.pt", "runs/cnn/best.pt"]  # compared by default
MOST_PHOTOS = 100  # of one's own in a picture
PAGES = (*page.PICTURES, ".html")  # what `explain` writes


def default_checkpoints(paths):
    """`paths`, of `make figure`; where none of them is there, those that `make demo` has left."""
    demo = [os.path.join("runs/demo", *Path(path).parts[1:]) for path in paths]
    if any(map(os.path.exists, paths)) or not all(map(os.path.exists, demo)):
        return paths
    print(f"{' and '.join(paths)} missing: shown is {' and '.join(demo)}, of `make demo`",
          file=sys.stderr)
    return demo


def load_networks(options, paths):
    """The networks `paths`, with the options of `networks.add_options`."""
    if list(paths) == CHECKPOINTS[-1:] and not os.path.exists(paths[0]):
        raise ValueError(f"{paths[0]} does not exist (`make train-cnn` makes one): name another "
                         "with --model; resnet18, ImageNet's, needs no training")
    for name in () if options.weights else filter(networks.is_name, map(str, paths)):
        if os.path.exists(own := f"runs/{name}/best.pt"):
            print(f"{name} is ImageNet's; the one that you trained is {own}", file=sys.stderr)
    device = machine.choose_device(options.device)
    machine.allow_tf32(device, False)
    return networks.load_networks(paths, options.looks, device, options.weights, options.names)


def known_classes(names, classes):
    """The classes that `names`, or numbers, stand for. Raises ValueError: one is no class."""
    return [classes[networks.class_index(name, classes)] for name in names]


# ---------------------------------------------------------------- photos


def photo_files(names):
    """The paths of photos that `names`, of files, folders and patterns, stand for."""
    paths = []
    for name in map(str, names):
        if os.path.isfile(name) or not (os.path.isdir(name) or glob.has_magic(name)):
            paths.append(Path(name))  # a missing one is refused when it is decoded
            continue
        inside = Path(name).iterdir() if os.path.isdir(name) else map(Path, glob.glob(name))
        inside = [path for path in inside if path.is_file() and path.name[0] != "."]
        if unread := {path.suffix for path in inside if path.suffix.lower() in data.UNREAD}:
            print(f"{name}: photos in {data.first_names(unread)} are left out: convert them to "
                  "JPEG", file=sys.stderr)
        found = sorted(path for path in inside if path.suffix.lower() in data.SUFFIXES)
        if not found:
            raise ValueError(f"{name} holds no photo: name a photo, or a folder that has some")
        paths += found
    return paths


def folder_of(path):
    """The name of the folder that a file lies in; of a link, not where it points."""
    return Path(os.path.abspath(path)).parent.name


def own_photos(paths, titles, truth, classes):
    """Photos of one's own, titles, classes: of `truth`, else their folders' names, else None."""
    if len(paths) > MOST_PHOTOS:
        raise ValueError(f"--images names {len(paths)} photos, too many for one picture: name at "
                         f"most {MOST_PHOTOS}")
    if truth and len(truth) == 1:
        truth = truth * len(paths)
    for option, given in (("--titles", titles), ("--truth", truth)):
        if given and len(given) != len(paths):
            raise ValueError(f"{option} has {len(given)} names for {len(paths)} photos: give "
                             "one for each")
    if truth:
        labels = known_classes(truth, classes)
    else:
        parents = map(folder_of, paths)
        words = [unicodedata.normalize("NFC", data.WORDS.get(name, name)) for name in parents]
        labels = [name if name in classes else None for name in words]
    titles = titles or [name or path.stem for path, name in zip(paths, labels, strict=True)]
    return [torch.from_numpy(data.decode(path)) for path in paths], titles, labels


# ---------------------------------------------------------------- files to write


def refuse_overwriting(outs, photos):
    """ValueError where a file to write is one of the photos to show, which would be lost."""
    for out, photo in itertools.product(filter(os.path.exists, outs), photos):
        if os.path.exists(photo) and os.path.samefile(out, photo):
            raise ValueError(f"--out {out} is a photo that is shown: name another file")


def digest(text):
    """Six letters that tell texts apart."""
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:6]


def shortened(text, limit):
    """A text of `limit` bytes or fewer; where it is cut, with its digest."""
    raw = os.fsencode(text)
    cut = raw[: limit - 7].decode(errors="ignore")
    return text if len(raw) <= limit else f"{cut}-{digest(text)}"


def name_of(path):
    """What names of files call a checkpoint: its folders as seen from here; elsewhere its folder.
    With a digest where another could be called so: no picture is written over another network's."""
    path = Path(os.path.abspath(path))
    inside = path.is_relative_to(Path.cwd())
    folders = path.relative_to(Path.cwd()).parts[:-1] if inside else [path.parent.name]
    own = [path.stem] if path.name != "best.pt" else []
    clear = inside and (not own or not path.suffix) and not any("-" in part for part in folders)
    return "-".join([*folders, *own, *([] if clear else [digest(path)])]) or path.parent.name


def plain(word):
    """A word as part of a file's name; where other signs are lost than spaces, with a digest."""
    lost = "" if re.fullmatch(r"[\w \-]*", word) else digest(word)
    return re.sub(r"\W+", "-", word) + lost


def explanation_names(photos, models, words, out):
    """Where the picture of each of `photos` goes: `out`, or in the folder `out`, named after it,
    the networks, and `words`."""
    suffix = out.suffix.lower()
    if suffix in PAGES or suffix and not out.is_dir():  # a folder may be photos.2026
        if len(photos) > 1:
            raise ValueError(f"{out} is one picture for {len(photos)} photos: name a folder with "
                             "--out")
        names = [out]
    else:
        shown = "-".join([*map(name_of, models), *map(plain, words)])
        # A file's name has 255 bytes at most, those of a half-written one included.
        stems = [f"{shortened(photo.stem, 100)}-{shortened(shown, 120)}" for photo in photos]
        equal = [unicodedata.normalize("NFC", stem).casefold() for stem in stems]  # to some disks
        numbers = [equal[:i].count(stem) + 1 for i, stem in enumerate(equal)]
        names = [out / (f"{stem}-{number}.png" if number > 1 else f"{stem}.png")
                 for stem, number in zip(stems, numbers, strict=True)]
    for name in names:
        page.check_picture_name(name, PAGES)
    return names
