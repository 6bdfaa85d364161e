"""Folders and archives of photos: what they hold, and photos from them with every guard.

    folder = folders.prepare("path/to/archive.zip")     # unpacked and checked; None: ImageNette
    photos = folders.load(folder, "train")              # decoded by one process, for all
"""

import argparse
import hashlib
import itertools
import os
import sys
from collections import Counter
from pathlib import Path

import torch

import archives
import data
import decoding
import files

URL = "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-160.tgz"
ARCHIVE_BYTES, ARCHIVE_MD5 = 99_003_388, "e793b78cc4c9e9a4ccc0c1155377a412"
IMAGENETTE = "data/imagenette2-160"  # where `prepare` puts it
COUNTS = {"train": 9_469, "val": 3_925}  # of the public ImageNette
TRAIN_NAMES = ("train", "training", "seg_train")
VAL_NAMES = ("val", "valid", "validation", "dev", "eval", "test", "testing", "seg_test")
VAL_SHARE = 0.15  # of each class, set aside to validate on where there is no folder for it
SAMPLE, FEW_LEVELS = 100, 32  # for `remarks_on`: photos; from their darkest to lightest pixel


# ---------------------------------------------------------------- what a folder holds


def set_aside(photos):
    """The photos {name: path} of a class in two: those to train on, those to validate on.
    A hash of the name decides. Adding photos moves no others, except in tiny classes."""

    def share(name):
        digest = hashlib.blake2b(os.fsencode(name), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64

    if len(photos) < 2:
        raise ValueError(f"{Path(*photos.values()).parent} holds one photo: a class needs two "
                         "where there is no val/")
    ranked = sorted(photos, key=share)
    count = sum(share(name) < VAL_SHARE for name in photos)
    val = set(ranked[: min(max(1, count), len(photos) - 1)])
    return ({name: path for name, path in photos.items() if name not in val},
            {name: path for name, path in photos.items() if name in val})


def inner_folder(folder, names=TRAIN_NAMES + VAL_NAMES):
    """Where the data begin: down while a folder holds nothing but one folder, to one that holds
    several, class folders, or one of `names`."""
    inside = data.subfolders(folder) if os.path.isdir(folder) else []
    while len(inside) == 1 and inside[0].lower() not in names:
        below = data.subfolders(folder / inside[0])
        if not below:
            break
        folder, inside = folder / inside[0], below
    return folder


def split_folders(folder):
    """The folder to train on, and those to validate on, the best first."""
    inside = data.subfolders(folder) if folder.is_dir() else []
    lowered = [name.lower() for name in inside]
    if twice := [name for name in TRAIN_NAMES + VAL_NAMES if lowered.count(name) > 1]:
        raise ValueError(f"{folder} holds two folders called {twice[0]}, in capitals or not: "
                         "rename or join them")
    by_name = dict(zip(lowered, (folder / name for name in inside), strict=True))
    train = [by_name[name] for name in TRAIN_NAMES if name in by_name]
    val = [by_name[name] for name in VAL_NAMES if name in by_name]
    if val and not train:
        raise ValueError(f"{folder / 'train'} is missing, beside {val[0].name}/: it holds a folder "
                         f"for each class ({val[0].name} too, if that is one)")
    return (train or [folder])[0], val


def choose_val(candidates, train_folder, classes):
    """The first of the folders that has class folders, or None; {class: {name: path}} of what it
    holds; and what is no photo there. ValueError where its classes are others."""
    for candidate in candidates:
        folder = inner_folder(candidate, [label.lower() for label in classes])
        found, others = data.class_folders(folder)
        unknown = [label for label in found if label not in classes]
        if not any(found.values()) or len(found) == len(unknown) == 1:
            continue  # photos without classes, in a folder of any name: test/unknown, val/images
        if unknown:
            raise ValueError(f"{folder / unknown[0]} is a class that {train_folder} lacks: add its "
                             "photos there, or remove it")
        return candidate, found, others
    return None, {}, []


def refuse_classes(folder, classes, hint):
    """ValueError where the class folders {class: {name: path}} of a folder are none to train on."""
    if len(classes) == 1 and any(classes.values()):
        raise ValueError(f"{folder} holds one class folder, {min(classes)}, and two or more are "
                         "needed: put the photos of another class into a folder beside it, or, "
                         "where it holds photos of several, give those of each class a folder")
    if len(classes) < 2:
        raise ValueError(f"{folder} holds {len(classes)} class folders: two or more are needed, "
                         "each with the photos of a class" + (where_photos_lie(folder) or
                         "; `python data.py` downloads ImageNette"))
    if empty := [label for label in classes if not classes[label]]:
        raise ValueError(f"{folder / empty[0]} holds no photo that can be read here{hint}: every "
                         "class needs one" + where_photos_lie(folder))
    for label, inside, *_ in (name.split("/") for photos in classes.values() for name in photos):
        if inside.lower() in TRAIN_NAMES:
            raise ValueError(f"{folder / label} holds a folder {inside}/ of its own: name "
                             f"{folder / label}, if these are the data")


def where_photos_lie(folder):
    """A clause that says in which folders below one photos lie, and what to name; "" where there
    are none, or where they lie in its class folders."""
    places = [Path(place) for place, _, names in itertools.islice(os.walk(folder), 10_000)
              if any(data.is_photo(name) for name in names)]
    if not places:
        return ""
    if places[0] == folder and folder.name.lower() in TRAIN_NAMES:
        return (f"; photos lie in it: give those of each class a folder, or, if {folder.name} is a "
                "class, move all class folders into a new folder called train")
    ((parent, count),) = Counter(place.parent for place in places).most_common(1)
    if parent == folder:
        return ""
    if count > 1:
        return f"; if {parent} holds the class folders, name it"
    return f"; photos lie in {places[0]}: give those of each class a folder there"


def unused_folders(folder, train, val):
    """Remarks on folders beside those to train and to validate on."""
    if train != folder:
        names = [f"{name}/" for name in sorted(data.subfolders(folder))
                 if folder / name not in (train, val)]
        return [f"not used: {', '.join(names)}"] if names else []
    siblings = data.subfolders(folder.resolve().parent) if folder.name in TRAIN_NAMES else []
    return [f"{name}/ beside it is not used: name {folder.parent} to validate on that"
            for name in sorted(siblings) if name.lower() in VAL_NAMES][:1]


def check(folder):
    """What a folder of photos holds: ({split: {name: path}}, [class folder], [remark]), sorted.

    train/<class>/ beside val/<class>/ (other names: TRAIN_NAMES, VAL_NAMES), or train/<class>/ or
    <class>/ alone, of which a share is set aside for "val". A class may have folders in its own;
    all may lie in folders around it. Raises ValueError elsewhere.
    """
    folder = inner_folder(files.path(folder))
    train_folder, candidates = split_folders(folder)
    classes_folder = folder if train_folder == folder else inner_folder(train_folder, ())
    train, others = data.class_folders(classes_folder) if folder.is_dir() else ({}, [])
    suffixes = [Path(path).suffix.lower() for path in others]
    refuse_classes(classes_folder, train, unread_hint(suffixes))
    val_folder, val, others_of_val = choose_val(candidates, train_folder, train)
    suffixes += [Path(path).suffix.lower() for path in others_of_val]
    remarks = unused_folders(folder, train_folder, val_folder)
    if val_folder is None:
        for label, photos in train.items():
            train[label], val[label] = set_aside(photos)
        remarks.append(f"{sum(map(len, val.values())):,} photos, about {VAL_SHARE:.0%} of each "
                       "class, one at least, set aside to validate on, as there is no val/ with "
                       "photos of the classes")
    elif val_folder.name != "val":
        remarks.append(f"{val_folder.name}/ is used to validate on")
    if lacking := [label for label in train if not val.get(label)]:
        remarks.append(f"no val photos of {len(lacking)} classes ({data.first_names(lacking)})")
    if suffixes:
        remarks.append(f"{len(suffixes):,} entries that are no photos skipped"
                       + unread_hint(suffixes))
    splits = {split: {name: path for label in train for name, path in found.get(label, {}).items()}
              for split, found in (("train", train), ("val", val))}
    return splits, list(train), remarks


def unread_hint(suffixes):
    """A clause on photos in formats that are not read here, for a sentence; "" where none is."""
    unread = [suffix for suffix in suffixes if suffix in data.UNREAD]
    return (f" ({len(unread)} of them {data.first_names(set(unread))}: convert them to JPEG)"
            if unread else "")


def prepare(source=None, root="data"):
    """The checked folder of photos that `source` stands for: a folder; an archive, unpacked under
    `root`; or None, ImageNette, downloaded there. Fast when it is there already.
    Raises ValueError with a sentence for the user."""
    if "" in (source, root):  # of a variable that is not set; as a path, the working folder
        raise ValueError("the name of the data, or of the folder to unpack them in, is empty: name "
                         "one, or leave it out (DATA=, --data, --root)")
    root = files.path(root)
    folder = root / Path(IMAGENETTE).name if source is None else files.path(source)
    if source is None and not folder.exists():
        folder = root / Path(URL).name
        files.make_writable(root, "name another folder with --root")
        with files.lock(folder):
            if not folder.exists():
                archives.download(URL, folder, ARCHIVE_BYTES, ARCHIVE_MD5)
    if folder.is_file():
        files.make_writable(root, "name another folder to unpack in with --root")
        folder = archives.unpacked(folder, root, inner_folder, check)
    if not folder.exists():
        raise ValueError(f"{folder} does not exist: `python data.py` downloads ImageNette, or name "
                         "a folder or an archive that is there (DATA= for make, --data for the "
                         "scripts)")
    folder = inner_folder(folder)
    splits, classes, remarks = check(folder)
    counts = {split: len(photos) for split, photos in splits.items()}
    if classes == list(data.CLASSES) and counts != COUNTS:
        remarks.insert(0, f"the public ImageNette has {COUNTS['train']:,} and {COUNTS['val']:,}")
    remarks.insert(0, f"{counts['train']:,} train and {counts['val']:,} val photos of "
                      f"{len(classes):,} classes")
    for remark in remarks:
        print(f"{folder}: {remark}", file=sys.stderr)
    return folder


# ---------------------------------------------------------------- decoded, with every guard


def pixels_path(folder, split):
    """The packed file of a split: in the photos' folder, or in ./data where that is read-only."""
    folder = Path(folder)
    if files.takes_files(folder):
        return folder / f"{split}.pixels"
    folder, cache = folder.resolve(), Path("data")
    files.make_writable(cache, f"the pixels of {folder}, which is read-only, go there: run this "
                                  "command in a folder that can be written to")
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]
    return cache / f"{folder.name}-{digest}-{split}.pixels"


def settings_to_store(folder, split, skip_bad, side):
    """The side and skip_bad of a split: as given, or else as it is stored with, or, where it is
    not, as the other split is. ValueError where the two are stored at different sizes."""
    index = data.read_index(pixels_path(folder, split))
    other = data.read_index(pixels_path(folder, "val" if split == "train" else "train"))
    if not side and index and other and index["side"] != other["side"]:
        raise ValueError(f"{folder}: the photos of train and val are stored at different sizes: "
                         f"python data.py {folder} --side {max(index['side'], other['side'])}")
    stored = index or other or {"side": data.SHORT_SIDE, "skip_bad": False}
    return {"side": side or stored["side"], "skip_bad": skip_bad or stored["skip_bad"]}


def decode(folder, split, photos, classes, settings):
    """Decode the photos {name: path} of a split into its packed file; returns the index.
    settings: the key, side and skip_bad to store."""
    place, label_of = f"{folder}, {split}", {label: i for i, label in enumerate(classes)}
    labels = [label_of[name.split("/")[0]] for name in photos]
    with files.atomic(pixels_path(folder, split)) as file:
        try:
            index = data.pack(
                file, photos.values(), photos, labels, **settings, decode_all=decoding.decode_all,
                watch=lambda items: files.progress(items, f"decoding {place}:", len(photos)))
        except ValueError as error:  # of a damaged photo
            raise ValueError(f"{error}, or leave such files out: python data.py {folder} "
                             "--skip-bad") from error
        lost = {classes[label] for label in set(labels) - set(index["labels"])}
        if lost:
            raise ValueError(f"{place}: {data.first_names(lost)} without a single readable "
                             "photo: replace some")
    return index


def load(folder, split, skip_bad=False, side=None):
    """The `split` ("train" or "val") of a folder that `prepare` returned, as `Photos`, decoded if
    nobody has yet, and anew when a photo has been added, removed or changed.

    skip_bad: a damaged photo is left out and counted; else it is a ValueError. side: px, to which
    a larger shortest side is reduced. Both are stored; without them, what is stored holds.
    """
    if split not in COUNTS:
        raise ValueError(f"there is no split {split!r}: it is train or val")
    folder = inner_folder(files.path(folder))
    splits, classes, _ = check(folder)
    photos, packed = splits[split], pixels_path(folder, split)
    key = data.key_of(folder, photos.values(), classes)
    with files.lock(packed):
        settings = {"key": key, **settings_to_store(folder, split, skip_bad, side)}
        index = data.read_index(packed)
        if not settings.items() <= index.items():
            try:
                index = decode(folder, split, photos, classes, settings)
            except PermissionError as error:  # Windows replaces no file that a process has mapped
                index = data.read_index(packed)  # by another process, perhaps the same
                if not settings.items() <= index.items():
                    if not packed.exists():
                        raise
                    raise ValueError(f"{packed} cannot be replaced ({error.strerror}): end what "
                                     "uses it") from error
    if index["bad"]:
        count = len(index["bad"])
        print(f"{folder}, {split}: {count} damaged photo{'s' * (count > 1)} left out, "
              f"{index['bad'][0]}{' first' * (count > 1)}", file=sys.stderr)
    photos = data.map_photos(packed, index, classes)
    for remark in remarks_on(photos):
        print(f"{folder}, {split}: {remark}", file=sys.stderr)
    return photos


def remarks_on(photos):
    """Sentences on decoded photos that look as if something had gone wrong."""
    remarks, first, twice = [], {}, []
    for name, digest, label in zip(photos.names, photos.digests, photos.labels.tolist(),
                                   strict=True):
        other, other_label = first.setdefault(digest, (name, label))
        if label != other_label:
            twice.append(f"{other} and {name}")
    if twice:
        remarks.append(f"{len(twice):,} photos are in two classes, byte for byte ({twice[0]}): "
                       "remove them from one")
    index = torch.linspace(0, len(photos) - 1, min(len(photos), SAMPLE)).long()
    sample = [photos[i] for i in index.tolist()]
    dull = sum(int(photo.max()) - int(photo.min()) < FEW_LEVELS for photo in sample)
    if len(sample) > 1 and all(torch.equal(photo, sample[0]) for photo in sample):
        remarks.append(f"all photos are equal, or the {len(sample)} that were looked at")
    elif 10 * dull >= len(sample):
        remarks.append(f"{dull} of {len(sample)} photos span fewer than {FEW_LEVELS} of 256 grey "
                       "levels: are they dark, or 8 to 12 bits in files of 16? Store them with 8")
    return remarks


def shared(train, val):
    """How many photos of `val` are, byte for byte, in `train` too."""
    known = set(train.digests)
    return sum(digest in known for digest in val.digests)


# ---------------------------------------------------------------- the command


def main(arguments=None):
    """The command line: prepare the photos and decode them."""
    parser = argparse.ArgumentParser(
        prog="data.py", description="Photos in class folders: get them, check them, decode them.")
    add = parser.add_argument
    add("source", nargs="?", type=files.path,
        help="a folder, .tgz, .tar or .zip (default: ImageNette, downloaded)")
    add("--root", default="data", type=files.path,
        help="where archives are unpacked (default: data)")
    add("--skip-bad", action="store_true", help="leave damaged photos out, and remember it")
    add("--side", type=files.between(1), metavar="PX", help="shortest side that larger photos are "
        f"reduced to (default: what is stored, or {data.SHORT_SIDE})")
    options = parser.parse_args(arguments)
    files.run_command(decode_folder, options, interrupted="the same command goes on")


def decode_folder(options):
    """Prepare a folder or archive and decode both splits; says where the pixels are."""
    folder, photos = prepare(options.source, options.root), {}
    for split in COUNTS:
        photos[split] = load(folder, split, options.skip_bad, options.side)
        size = photos[split].pixels.numel() / 1e6
        print(f"{pixels_path(folder, split)}: {len(photos[split]):,} photos, {size:,.0f} MB")
    if count := shared(**photos):
        print(f"{folder}: {count:,} val photos are in train too, byte for byte", file=sys.stderr)
