"""folders.py against torchvision's ImageFolder, and against all that can be wrong with folders."""

import hashlib
import io
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from conftest import REPO, change, command, draw_classes, encoded, made_in, noise, refused
from PIL import Image

import data
import files
import folders

TENCH, LAST = "n01440764", "n03888257"


# ---------------------------------------------------------------- decoded once


@pytest.mark.parametrize("split", ["train", "val"])
def test_loads_what_imagefolder_loads(demo, split):
    photos, reference = folders.load(demo, split), torchvision.datasets.ImageFolder(demo / split)
    assert list(data.CLASSES) == reference.classes
    paths = [path for path, _ in reference.samples]
    assert [str(demo / split / name) for name in photos.names] == paths
    assert photos.labels.tolist() == reference.targets
    for i, (image, _) in enumerate(reference):
        assert np.array_equal(photos[i], image)


def test_demo_photos_keep_their_aspect(demo):
    photos, lines = folders.load(demo, "val"), (demo / "image_sizes.txt").read_text().splitlines()
    sizes = {Path(name).name: (int(height), int(width))
             for name, width, height in (line.split(",") for line in lines)}
    kept = list(zip(photos.height.tolist(), photos.width.tolist(), strict=True))
    assert kept == [sizes[Path(name).name] for name in photos.names]
    assert (photos.height != photos.width).any()
    assert photos.pixels.shape == (int((photos.height * photos.width).sum()), 3)
    assert photos.pixels.dtype == torch.uint8


def test_the_second_load_decodes_nothing(small, no_decoding, monkeypatch):
    first = folders.load(small, "train")
    no_decoding()
    monkeypatch.chdir(small)
    for again in (small, f"{small}/", "."):
        second = folders.load(again, "train")
        assert torch.equal(first.pixels, second.pixels) and first.names == second.names
    assert made_in(small) == {"train.pixels"}


CHANGES = {
    "changed": change,
    "touched": lambda photo: os.utime(photo, (1, 1)),
    "added": lambda photo: shutil.copy(photo, photo.with_name("a.png")),
    "removed": lambda photo: photo.unlink(),
    "renamed": lambda photo: photo.rename(photo.with_name("z.png")),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_folder_that_changed_is_decoded_anew(small, what, monkeypatch):
    folders.load(small, "train")
    CHANGES[what](small / "train" / TENCH / "0.png")
    decoded, decode = [], data.decode
    monkeypatch.setattr(data, "decode", lambda *given: decoded.append(given) or decode(*given))
    photos = folders.load(small, "train")
    reference = torchvision.datasets.ImageFolder(small / "train")
    assert len(decoded) == len(photos) == len(reference)
    assert all(np.array_equal(photos[i], image) for i, (image, _) in enumerate(reference))


TORN = {
    "empty": lambda raw: b"",
    "short": lambda raw: raw[:5],
    "cut": lambda raw: raw[: len(raw) // 2],
    "without its first pixel": lambda raw: raw[3:],
    "zeros": lambda raw: bytes(len(raw)),
    "ones": lambda raw: b"\xff" * len(raw),
    "noise": lambda raw: random.Random(0).randbytes(len(raw)),
    "another index": lambda raw: raw + b"[]" + (2).to_bytes(8, "little"),
    "an index of nothing": lambda raw: b'{"pixels": 0}' + (13).to_bytes(8, "little"),
}


@pytest.mark.parametrize("how", TORN)
def test_a_torn_pixels_file_is_made_anew(small, how):
    packed, pixels = small / "train.pixels", folders.load(small, "train").pixels.clone()
    packed.write_bytes(TORN[how](packed.read_bytes()))
    assert torch.equal(folders.load(small, "train").pixels, pixels)


def test_an_interrupted_decoding_leaves_nothing(small, monkeypatch):
    decode = data.decode

    def interrupt(file, name, side):
        if LAST in name:
            raise KeyboardInterrupt
        return decode(file, name, side)

    monkeypatch.setattr(data, "decode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        folders.load(small, "train")
    assert made_in(small) == set()


def test_the_pixels_are_mapped_and_never_written_back(small):
    photos, before = folders.load(small, "train"), (small / "train.pixels").read_bytes()
    if Path("/proc/self/maps").exists():
        assert str(small / "train.pixels") in Path("/proc/self/maps").read_text()
    photos.pixels.fill_(0)
    assert (small / "train.pixels").read_bytes() == before


def read_only(monkeypatch, *folders):
    """Folders that cannot be written to; root may write anywhere, whatever they say."""
    names = {folder.name for folder in folders}
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name not in names)


def test_a_read_only_folder_is_packed_elsewhere(small, tmp_path, monkeypatch, capsys, no_decoding):
    monkeypatch.chdir(tmp_path)
    read_only(monkeypatch, small)
    first = folders.load(small, "val")
    assert made_in(small) == set() and len(list(Path("data").glob("small-*-val.pixels"))) == 1
    no_decoding()
    assert torch.equal(folders.load(small, "val").pixels, first.pixels)


def test_the_command_says_where_the_pixels_of_a_read_only_folder_are(small, tmp_path, monkeypatch,
                                                                     capsys):
    monkeypatch.chdir(tmp_path)
    read_only(monkeypatch, small)
    monkeypatch.setattr(sys, "argv", ["data.py", str(small)])
    folders.main()
    said = [Path(line.split(": ")[0]) for line in capsys.readouterr().out.splitlines()]
    assert len(said) == 2 and all(path.exists() for path in said)


def test_two_processes_at_once_make_one_file(small, tmp_path):
    start = [sys.executable, str(REPO / "data.py"), str(small)]
    both = [subprocess.Popen(start, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
            for _ in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert made_in(small) == {"train.pixels", "val.pixels"}
    if files.fcntl:
        assert "".join(errors).count("decoding") == 2  # each split once, not twice
    assert len(folders.load(small, "train")) == 20


def test_where_the_file_system_has_no_locks_nobody_waits(small, monkeypatch):
    left = Path(f"{small}/train.pixels.{os.getpid()}1.part")  # perhaps still written
    left.write_bytes(b"half of it")

    def flock(file, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files, "fcntl", SimpleNamespace(flock=flock, LOCK_EX=2, LOCK_NB=4))
    assert len(folders.load(small, "train")) == 20 and left.exists()


@pytest.fixture
def busy(monkeypatch):
    """Another process holds every lock, and Ctrl-C is pressed while this one waits."""

    def flock(file, how):
        raise BlockingIOError if how & 4 else KeyboardInterrupt

    monkeypatch.setattr(files, "fcntl", SimpleNamespace(flock=flock, LOCK_EX=2, LOCK_NB=4))


def test_ctrl_c_while_waiting_for_another_process(small, busy, monkeypatch, capsys):
    status, lines = command(monkeypatch, capsys, small)
    assert status == 130 and "waiting" in lines[-2]
    assert lines[-1] == "data.py: stopped: the same command goes on"


@pytest.mark.parametrize("other", ["made it", "made another"])
def test_a_file_of_pixels_that_cannot_be_replaced(small, tmp_path, monkeypatch, other):
    """Windows replaces no file that another process has mapped: what that one made is used if it
    is the same."""
    folders.load(small, "train")
    change(small / "train" / TENCH / "0.png")
    replace = os.replace

    def refuse(source, target):
        if other == "made it":
            replace(source, target)
        raise PermissionError(13, "Access is denied", source, 5, target)

    monkeypatch.setattr(os, "replace", refuse)
    if other == "made it":
        assert folders.load(small, "train")[0].shape == (30, 30, 3)
    else:
        with pytest.raises(ValueError, match="train.pixels cannot be replaced .*end what uses it"):
            folders.load(small, "train")
    assert not list(small.glob("*.part"))


def test_the_demo_is_decoded_to_the_same_bytes_as_ever(demo):
    """Sorted by class and name: pixels and labels are those of the first version."""
    for split, count, digest in (("train", 6, "29ed9825413a7435"), ("val", 2, "419ec0dfaddb7c4f")):
        photos = folders.load(demo, split)
        assert hashlib.sha256(photos.pixels.numpy()).hexdigest()[:16] == digest
        assert photos.labels.tolist() == [k for k in range(10) for _ in range(count)]


# ---------------------------------------------------------------- damaged photos


DAMAGE = {
    "zero bytes": lambda raw: b"",
    "truncated": lambda raw: raw[: len(raw) // 2],
    "header alone": lambda raw: raw[:20],
    "text": lambda raw: b"<html>404 Not Found</html>",
}


def damage(folder, how, name="n02979186/0.JPEG"):
    """One photo of the train split, a damaged JPEG now."""
    photo = folder / "train" / name
    photo.with_suffix(".png").unlink()
    photo.write_bytes(DAMAGE[how](encoded(Image.fromarray(noise(40, 40)), "JPEG").getvalue()))
    return photo


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_photo_is_named(small, how):
    photo = damage(small, how)
    with pytest.raises(ValueError, match="--skip-bad") as error:
        folders.load(small, "train")
    assert str(photo) in str(error.value) and "\n" not in str(error.value)
    assert made_in(small) == set()


def test_skip_bad_leaves_damaged_photos_out_and_counts_them(small, capsys, no_decoding):
    bad = [damage(small, "truncated"), damage(small, "text", "n03425413/1.JPEG")]
    photos = folders.load(small, "train", skip_bad=True)
    assert "2 damaged photos left out" in capsys.readouterr().err
    assert len(photos) == 18 and not {f"{p.parent.name}/{p.name}" for p in bad} & set(photos.names)
    wnids = [name.split("/")[0] for name in photos.names]
    assert photos.labels.tolist() == [list(data.CLASSES).index(wnid) for wnid in wnids]
    assert np.array_equal(photos[17], Image.open(small / "train" / photos.names[17]))
    no_decoding()
    assert len(folders.load(small, "train")) == 18  # it is remembered
    assert "2 damaged photos left out" in capsys.readouterr().err


def test_skip_bad_is_remembered_when_photos_change(small, monkeypatch):
    damage(small, "truncated")
    folders.load(small, "train", skip_bad=True)
    damage(small, "text", "n03425413/1.JPEG")
    change(small / "train" / TENCH / "0.png")
    assert len(folders.load(small, "train")) == 18
    damage(small, "truncated", f"../val/{TENCH}/0.JPEG")
    assert len(folders.load(small, "val")) == 19  # of these data, not of this split alone


def test_skip_bad_is_remembered_where_nothing_was_damaged(small):
    folders.load(small, "train")
    folders.load(small, "train", skip_bad=True)
    damage(small, "truncated")
    assert len(folders.load(small, "train")) == 19


def test_a_photo_that_cannot_be_read_is_like_a_damaged_one(small, monkeypatch):
    read = Path.read_bytes

    def refuse(path):
        if path.name == "0.png" and TENCH in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    words = f"{TENCH}/0.png cannot be read .Permission denied.*--skip-bad"
    with pytest.raises(ValueError, match=words):
        folders.load(small, "train")
    assert len(folders.load(small, "train", skip_bad=True)) == 19


def test_skip_bad_needs_one_photo_of_every_class(small):
    for j in range(2):
        damage(small, "zero bytes", f"{TENCH}/{j}.JPEG")
    with pytest.raises(ValueError, match="without a single readable photo"):
        folders.load(small, "train", skip_bad=True)
    assert made_in(small) == set()


# ---------------------------------------------------------------- photos that look wrong


def remarks(folder, capsys):
    """What loading the photos to train on says about them."""
    capsys.readouterr()
    folders.load(folder, "train")
    error = capsys.readouterr().err.splitlines()
    return [line.removeprefix(f"{folder}, train: ") for line in error if "decoding" not in line]


def rewrite(folder, image_of):
    """Replace each photo of train/ by image_of(its pixels, its number)."""
    for i, path in enumerate(sorted((folder / "train").rglob("*.png"))):
        image_of(np.asarray(Image.open(path).convert("L"), np.uint16), i).save(path)


def test_ordinary_photos_are_not_remarked_on(small, demo, capsys):
    assert remarks(small, capsys) == remarks(demo, capsys) == []


def test_photos_of_few_grey_levels_are_named(small, capsys):
    rewrite(small, lambda pixels, i: Image.fromarray(pixels * 16 if i % 2 else pixels * 256))
    said = ["10 of 20 photos span fewer than 32 of 256 grey levels: are they dark, or 8 to 12 bits "
            "in files of 16? Store them with 8"]
    assert remarks(small, capsys) == remarks(small, capsys) == said  # each time, not once
    rewrite(small, lambda pixels, i: Image.fromarray(noise(9, 9, i) // 3))
    assert remarks(small, capsys) == []


def test_photos_that_are_all_equal_are_named(small, capsys):
    for i, path in enumerate((small / "train").rglob("*.png")):  # other files, the same pixels
        Image.new("RGB", (9, 9), (9, 200, 9)).save(path, compress_level=i % 10, dpi=(i + 1, 1))
    assert remarks(small, capsys) == ["all photos are equal, or the 20 that were looked at"]


def test_a_photo_in_two_classes_is_named(small, capsys):
    shutil.copy(small / "train" / TENCH / "0.png", small / "train" / LAST / "copy.png")
    shutil.copy(small / "train" / TENCH / "0.png", small / "train" / TENCH / "copy.png")  # its own
    assert remarks(small, capsys) == [f"1 photos are in two classes, byte for byte ({TENCH}/0.png "
                                      f"and {LAST}/copy.png): remove them from one"]


# ---------------------------------------------------------------- stored sizes


def test_a_large_photo_is_reduced_and_a_small_one_stays(tmp_path):
    folder = draw_classes(tmp_path / "ab", a=2, b=2)
    gradient = np.linspace(0, 255, 400 * 900 * 3).astype(np.uint8).reshape(900, 400, 3)
    for name in ("large.png", "large.jpg"):
        Image.fromarray(gradient).save(folder / "a" / name)
    photos = {name: p[i] for p in (folders.load(folder, s, side=100) for s in ("train", "val"))
              for i, name in enumerate(p.names)}
    for name, photo in photos.items():
        image = Image.open(folder / name)
        if "large" in name:
            assert photo.shape == (225, 100, 3)
            error = photo.numpy().astype(int) - np.asarray(image.resize((100, 225), Image.BOX), int)
            assert np.abs(error).max() <= (8 if name.endswith("jpg") else 2)
        else:
            assert np.array_equal(photo, image)


def test_the_side_is_stored_and_remembered(small, monkeypatch, capsys, no_decoding):
    photos = folders.load(small, "train")
    assert torch.minimum(photos.height, photos.width).max() == 15
    assert command(monkeypatch, capsys, small, "--side", 8)[0] == 0
    change(small / "val" / TENCH / "0.png")
    for split in folders.COUNTS:
        photos = folders.load(small, split)  # decoded anew
        assert torch.minimum(photos.height, photos.width).unique().tolist() == [8]
    no_decoding()
    folders.load(small, "val", side=8)
    with pytest.raises(AssertionError, match="decoded again"):
        folders.load(small, "val", side=9)


def test_splits_of_different_sizes_are_refused(small):
    folders.load(small, "train", side=8)
    folders.load(small, "val", side=9)
    with pytest.raises(ValueError, match="different sizes.*--side 9"):
        folders.load(small, "train")
    folders.load(small, "train", side=9)
    assert len(folders.load(small, "train")) == 20


def test_a_split_that_lost_its_pixels_is_stored_as_the_other_is(small):
    for split in folders.COUNTS:
        folders.load(small, split, side=8)
    os.truncate(small / "train.pixels", 5)
    photos = folders.load(small, "train")
    assert torch.minimum(photos.height, photos.width).max() == 8


# ---------------------------------------------------------------- what a folder holds


def test_what_is_no_photo_is_skipped_and_counted(small, capsys):
    tench = small / "train" / TENCH
    for name in (".hidden.JPEG", "._0.jpg", ".DS_Store", "notes.txt", "Thumbs.db"):
        (tench / name).write_text("no photo")
    (tench / "album.jpg").mkdir()
    for name in (".ipynb_checkpoints", "__MACOSX"):  # of Jupyter; of a Mac's zip
        (small / "train" / name).mkdir()
    folders.prepare(small)
    assert "5 entries that are no photos skipped\n" in capsys.readouterr().err
    assert len(folders.load(small, "train")) == 20


def test_photos_in_a_format_that_is_not_read_are_counted_by_name(small, capsys):
    for name in ("a.heic", "b.HEIC", "c.avif", "d.txt"):
        (small / "val" / TENCH / name).write_bytes(b"....ftypheic")
    folders.prepare(small)
    said = "4 entries that are no photos skipped (3 of them .avif, .heic: convert them to JPEG)"
    assert said in capsys.readouterr().err
    for j in range(2):
        (small / "train" / TENCH / f"{j}.png").rename(small / "train" / TENCH / f"{j}.heic")
    with pytest.raises(ValueError, match=f"{TENCH} holds no photo that can be read here .*convert"):
        folders.prepare(small)


def test_an_empty_class_asks_for_no_folders_in_the_others(tmp_path):
    draw_classes(tmp_path / "pets", cat=3)
    (tmp_path / "pets" / "dog").mkdir()
    with pytest.raises(ValueError, match="dog holds no photo .*: every class needs one$"):
        folders.prepare(tmp_path / "pets")


def test_symlinked_class_folders_are_class_folders(small, tmp_path, capsys):
    (small / "train").rename(tmp_path / "elsewhere")
    (small / "train").mkdir()
    for folder in (tmp_path / "elsewhere").iterdir():
        (small / "train" / folder.name).symlink_to(folder)
    (small / "train" / TENCH / "notes.txt").write_text("no photo")
    folders.prepare(small)
    assert len(folders.load(small, "train")) == 20
    error = capsys.readouterr().err
    assert "1 entries that are no photos skipped" in error
    assert "-" not in error.split("skipped")[0].split("photos")[-1]


def test_a_link_that_loops_is_no_photo(pets):
    (pets / "cat" / "loop.png").symlink_to(pets / "cat" / "loop.png")
    (pets / "loop").symlink_to(pets / "loop")
    assert len(folders.load(folders.prepare(pets), "train").classes) == 3


def test_two_folders_called_train_are_refused(small):
    if (small / "Train").exists():
        pytest.skip("names in this file system know no capitals")
    (small / "Train").mkdir()
    with pytest.raises(ValueError, match="two folders called train"):
        folders.check(small)


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def one_photo(folder):
    shutil.rmtree(folder / "val")
    (folder / "train" / LAST / "1.png").unlink()


def one_class(folder):
    for wnid in list(data.CLASSES)[1:]:
        shutil.rmtree(folder / "train" / wnid)


WRONG_FOLDERS = {  # what is done to it, what the sentence says
    "missing": (shutil.rmtree, ["small does not exist", "DATA="]),
    "empty": (empty, ["small holds 0 class folders", "two or more", "python data.py"]),
    "without train": (lambda f: shutil.rmtree(f / "train"), ["train is missing", "val/"]),
    "train empty": (lambda f: empty(f / "train"), ["train holds 0 class folders"]),
    "one class": (one_class, ["train holds one class folder", "two or more"]),
    "unknown class": (lambda f: shutil.copytree(f / "val" / TENCH, f / "val" / "pike"),
                      ["val/pike is a class that", "train lacks"]),
    "class missing": (lambda f: shutil.rmtree(f / "train" / TENCH),
                      [f"val/{TENCH} is a class that", "train lacks"]),
    "class empty": (lambda f: empty(f / "train" / LAST), [f"train/{LAST} holds no photo"]),
    "a class of one photo": (one_photo, [f"train/{LAST} holds one photo", "a class needs two"]),
}


@pytest.mark.parametrize("what", WRONG_FOLDERS)
def test_a_wrong_folder_is_refused(small, what, monkeypatch, capsys):
    spoil, words = WRONG_FOLDERS[what]
    spoil(small)
    with pytest.raises(ValueError) as error:
        folders.prepare(small)
    assert all(word in str(error.value) for word in words), error.value
    status, lines = command(monkeypatch, capsys, small)
    assert status == 2 and lines == [f"data.py: {error.value}"]


def test_a_folder_is_used_where_it_is(small, tmp_path, capsys):
    assert folders.prepare(small, tmp_path / "root") == small
    assert not (tmp_path / "root").exists() and made_in(small) == set()
    counts, usual = capsys.readouterr().err.splitlines()
    assert counts.endswith("20 train and 20 val photos of 10 classes")
    assert usual.endswith("the public ImageNette has 9,469 and 3,925")


def test_an_empty_name_is_not_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(draw_classes(tmp_path / "here", cat=3, dog=3))
    for names in (("",), (None, "")):
        with pytest.raises(ValueError, match="is empty.*--data"):
            folders.prepare(*names)


def test_usual_counts_are_not_remarked_on(small, capsys, monkeypatch):
    monkeypatch.setattr(folders, "COUNTS", {"train": 20, "val": 20})
    folders.prepare(small)
    assert capsys.readouterr().err.endswith("20 train and 20 val photos of 10 classes\n")


# ---------------------------------------------------------------- anybody's folders


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_the_folder_to_validate_on_has_several_names(pets, tmp_path, capsys, name):
    draw_classes(tmp_path / "both" / name, dog=4, cat=1)
    pets.rename(tmp_path / "both" / "train")
    folder = folders.prepare(tmp_path / "both")
    error = capsys.readouterr().err
    assert "45 train and 5 val photos of 3 classes" in error
    assert "no val photos of 1 classes (fish)" in error
    assert (f"{name}/ is used to validate on" in error) == (name != "val")
    train, val = (folders.load(folder, split) for split in ("train", "val"))
    assert train.classes == val.classes == ["cat", "dog", "fish"]
    assert val.names[0] == "cat/DSC00000.png" and val.labels.tolist() == [0, 1, 1, 1, 1]
    assert train.labels.tolist() == [0] * 40 + [1] * 3 + [2] * 2


def test_of_several_folders_to_validate_on_the_first_is_taken(pets, tmp_path, capsys):
    for name, dogs in (("test", 1), ("valid", 2), ("validation", 3)):
        draw_classes(tmp_path / "all" / name, dog=dogs)
    pets.rename(tmp_path / "all" / "train")
    assert len(folders.load(folders.prepare(tmp_path / "all"), "val")) == 2
    assert "valid/ is used to validate on" in capsys.readouterr().err


def test_folders_are_found_however_they_are_written(pets, tmp_path):
    pets.rename(tmp_path / "Train")
    draw_classes(tmp_path / "Test", cat=2, dog=2, fish=2)
    assert len(folders.load(folders.prepare(tmp_path), "val")) == 6


def is_val(label, name):
    digest = hashlib.blake2b(f"{label}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < 0.15 * 2**64


@pytest.mark.parametrize("layout", ["train alone", "class folders", "a test without classes"])
def test_without_a_folder_to_validate_on_a_share_is_set_aside(pets, tmp_path, capsys, layout):
    folder = pets
    if layout != "class folders":
        folder = tmp_path / "folder"
        folder.mkdir()
        pets.rename(folder / "train")
    if layout == "a test without classes":  # as Kaggle has it
        (folder / "test").mkdir()
        Image.fromarray(noise(6, 6)).save(folder / "test" / "1.png")
    assert folders.prepare(folder) == folder
    val = folders.load(folder, "val")
    names = folders.load(folder, "train").names + val.names
    paths = list(folder.rglob("*/DSC*.png"))
    assert sorted(names) == sorted(p.relative_to(p.parent.parent).as_posix() for p in paths)
    said = f"{len(val)} photos, about 15% of each class, one at least, set aside"
    assert said in capsys.readouterr().err
    expected = [name for name in names if name.startswith("cat") and is_val(*name.split("/"))]
    assert [name for name in val.names if name.startswith("cat")] == sorted(expected)
    assert 2 <= len(expected) <= 12
    assert {name.split("/")[0] for name in val.names} == {"cat", "dog", "fish"}


def test_photos_that_are_added_move_no_other_across(tmp_path):
    before = draw_classes(tmp_path / "before", cat=30, dog=40)
    after = draw_classes(tmp_path / "after", cat=60, dog=40, eel=9)
    old, new = ({split: set(folders.load(folder, split).names) for split in ("train", "val")}
                for folder in (before, after))
    assert all(old[split] < new[split] for split in old)


def test_a_class_whose_photos_all_fall_to_one_side_is_still_shared_out(tmp_path):
    low = [f"{i}.png" for i in range(60) if is_val("a", f"{i}.png")][:2]
    high = [f"{i}.png" for i in range(60) if not is_val("b", f"{i}.png")][:2]
    for label, names in (("a", low), ("b", high)):
        (tmp_path / "ab" / label).mkdir(parents=True)
        for name in names:
            Image.fromarray(noise(6, 6)).save(tmp_path / "ab" / label / name)
    photos = [folders.load(tmp_path / "ab", split) for split in ("train", "val")]
    assert [p.labels.tolist() for p in photos] == [[0, 1], [0, 1]]


def test_wordnet_ids_are_shown_as_words_and_all_others_by_their_folder(tmp_path, small):
    assert folders.load(small, "val").classes == list(data.CLASSES.values())
    dogs = draw_classes(tmp_path / "dogs", n02115641=2, n99999999=2, Zebra=2, apple=2)
    assert folders.load(dogs, "train").classes == ["Zebra", "apple", "dingo", "n99999999"]
    twice = draw_classes(tmp_path / "twice", n02115641=2, dingo=2)
    assert folders.load(twice, "train").classes == ["dingo", "n02115641"]  # no two of one name


def test_shown_names_have_their_accents_composed(tmp_path):
    draw_classes(tmp_path, **{"Ga\u0308nse": 4, "Enten": 4})
    assert folders.load(tmp_path, "train").classes == ["Enten", "G\u00e4nse"]


def test_every_photo_has_the_hash_of_its_file(pets):
    photos = folders.load(pets, "train")
    files = [(pets / name).read_bytes() for name in photos.names]
    assert photos.digests == [hashlib.blake2b(file, digest_size=8).hexdigest() for file in files]
    some = photos.subset(torch.tensor([3, 1]))
    assert some.digests == [photos.digests[3], photos.digests[1]] and some.classes == photos.classes


def test_the_fingerprint_is_that_of_names_files_and_stored_sizes(tmp_path):
    photos = folders.load(draw_classes(tmp_path / "a", cat=5, dog=5), "train")
    again = folders.load(draw_classes(tmp_path / "b", cat=5, dog=5), "train")
    assert photos.fingerprint == again.fingerprint
    os.utime(tmp_path / "b" / photos.names[0], (1, 1))
    assert folders.load(tmp_path / "b", "train").fingerprint == photos.fingerprint
    others = [folders.load(tmp_path / "b", "train", side=4), folders.load(tmp_path / "b", "val")]
    # Another photo of the same name and size:
    Image.fromarray(noise(6, 7, 99)).save(tmp_path / "b" / photos.names[0])
    others.append(folders.load(tmp_path / "b", "train", side=6))
    (tmp_path / "a" / photos.names[0]).rename(tmp_path / "a" / "cat" / "new.png")
    others.append(folders.load(tmp_path / "a", "train"))
    assert len({photos.fingerprint, *(other.fingerprint for other in others)}) == 5


def test_photos_in_both_splits_are_counted_and_said(small, monkeypatch, capsys):
    shutil.copy(small / "train" / TENCH / "0.png", small / "val" / LAST / "copy.png")
    photos = {split: folders.load(small, split) for split in folders.COUNTS}
    same = sum(p.read_bytes() in {q.read_bytes() for q in (small / "train").rglob("*.png")}
               for p in (small / "val").rglob("*.png"))
    assert folders.shared(**photos) == same == 21  # the fixture draws the same photos for both
    status, lines = command(monkeypatch, capsys, small)
    assert status == 0 and lines[-1] == f"{small}: 21 val photos are in train too, byte for byte"
    assert folders.shared(photos["train"], data.from_arrays([noise(3, 3)])) == 0


# ---------------------------------------------------------------- layouts


def test_photos_in_folders_of_a_class_are_read_as_imagefolder_reads_them(pets):
    for place in ("b", "a", "a/b", "a-b", "a.b"):
        (pets / "cat" / place).mkdir()
        for name in ("DSC00001.png", "0.png"):
            shutil.copy(pets / "cat" / "DSC00000.png", pets / "cat" / place / name)
    (pets / "dog" / "images").mkdir()
    for photo in list((pets / "dog").glob("*.png")):
        photo.rename(pets / "dog" / "images" / photo.name)
    shutil.copytree(pets, pets.with_name("both") / "train")
    shutil.copytree(pets, pets.with_name("both") / "val")
    reference = torchvision.datasets.ImageFolder(pets)
    photos = folders.load(pets.with_name("both"), "train")
    assert [str(pets / name) for name in photos.names] == [path for path, _ in reference.samples]
    assert photos.labels.tolist() == reference.targets
    assert data.load(pets.with_name("both")).fingerprint == photos.fingerprint
    names = [name for split in folders.COUNTS for name in folders.load(pets, split).names]
    assert sorted(names) == sorted(photos.names)  # a share set aside


def test_hidden_folders_of_a_class_and_links_that_lead_back_are_not_read(pets):
    (pets / "cat" / ".ipynb_checkpoints").mkdir()
    shutil.copy(pets / "cat" / "DSC00000.png", pets / "cat" / ".ipynb_checkpoints" / "0.png")
    (pets / "cat" / "up").symlink_to(pets)
    assert sum(map(len, folders.check(pets)[0].values())) == 45


def layout(tmp_path, *places):
    """Folders called `places`, each with two classes of four photos, but "name*" photos alone."""
    for k, place in enumerate(places):
        if place.endswith("*"):
            draw_classes(tmp_path, **{place.rstrip("*"): 3})
        else:
            draw_classes(tmp_path / place, cat=4 + k, dog=4)
    return tmp_path


LAYOUTS = {  # folders: (photos to train on, to validate on), words that are said
    "around train": (["a/b/train", "a/b/val"], (8, 9), []),
    "around classes": (["a/b"], None, ["set aside"]),
    "train in train": (["train/train", "test/test"], (8, 9), ["test/ is used to validate on"]),
    "Intel": (["seg_train/seg_train", "seg_test/seg_test", "seg_pred/seg_pred*"], (8, 9),
              ["seg_test/ is used to validate on", "not used: seg_pred/"]),
    "Training": (["Training", "Testing"], (8, 9), ["Testing/ is used to validate on"]),
    "dev": (["train", "dev", "test"], (8, 9), ["dev/ is used to validate on", "not used: test/"]),
    "eval": (["train", "eval"], (8, 9), ["eval/ is used to validate on"]),
    "unlabelled": (["train", "test/unknown*"], None, ["not used: test/", "set aside"]),
    "Tiny ImageNet": (["train", "val/images*", "test/images*"], None, ["not used: test/, val/"]),
    "unlabelled val": (["train", "val/images*", "dev"], (8, 10), ["not used: val/"]),
    "another folder": (["train", "val", "extra"], (8, 9), ["not used: extra/"]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_that_need_no_guess_are_read(tmp_path, name, capsys):
    places, counts, words = LAYOUTS[name]
    folder = folders.prepare(layout(tmp_path, *places))
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    found = tuple(len(folders.load(folder, split)) for split in ("train", "val"))
    assert found == counts if counts else sum(found) == 8 and min(found) > 1
    assert folders.load(tmp_path, "val").names == folders.load(folder, "val").names
    assert folders.load(tmp_path, "val").classes == ["cat", "dog"]


def test_train_alone_is_used_and_val_beside_it_is_named(tmp_path, capsys):
    folder = layout(tmp_path, "train", "val") / "train"
    assert folders.prepare(folder) == folder
    said = f"val/ beside it is not used: name {tmp_path} to validate on that"
    assert said in capsys.readouterr().err


UNCLEAR = {  # folders, what the sentence says
    "photos alone": (["photos*"], ["one class folder, photos", "give those of each class a"]),
    "beside another": (["photos", "docs*"], ["docs holds no photo", "if", "photos holds the class "
                                             "folders, name it"]),
    "train inside": (["photos/train", "photos/val", "figures"],
                     ["photos holds a folder train/ of its own: name"]),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_layouts_that_need_a_guess_are_refused_and_explained(tmp_path, name):
    places, words = UNCLEAR[name]
    layout(tmp_path, *places)
    for photo in (tmp_path / "docs").glob("*.png"):
        photo.rename(photo.with_suffix(".txt"))
    with pytest.raises(ValueError) as error:
        folders.prepare(tmp_path)
    assert all(word in str(error.value) for word in words), error.value


def test_a_split_of_another_name_is_refused(small):
    with pytest.raises(ValueError, match="no split 'test': it is train or val"):
        folders.load(small, "test")


# ---------------------------------------------------------------- the command


def test_a_home_is_found(small, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(small.parent))
    monkeypatch.setenv("USERPROFILE", str(small.parent))
    assert folders.prepare("~/small") == small and len(folders.load("~/small", "val")) == 20
    assert folders.check("~/small")[1] == list(data.CLASSES)
    assert command(monkeypatch, capsys, "~/small", "--root", "~/unpacked")[0] == 0


def test_where_nothing_can_be_written_there_is_a_way_out(small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mkdir = Path.mkdir

    def refuse(path, *arguments, **options):
        if path.name == "data":
            raise OSError(30, "Read-only file system", str(path))
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    read_only(monkeypatch, small)
    status, lines = command(monkeypatch, capsys, small)
    assert status == 2 and lines[-1].startswith("data.py: data cannot be written to (Read-only")
    assert "run this command in a folder that can be written to" in lines[-1]
    for arguments in ([], [shutil.make_archive(tmp_path / "photos", "zip", small)]):
        status, lines = command(monkeypatch, capsys, *arguments)
        assert status == 2 and "with --root" in lines[-1]
    (tmp_path / "locked").mkdir()
    read_only(monkeypatch, tmp_path / "locked")
    status, lines = command(monkeypatch, capsys, *arguments, "--root", tmp_path / "locked")
    assert status == 2 and "locked cannot be written to (read-only)" in lines[-1]


def test_the_command_gets_everything_ready(small, monkeypatch, capsys, no_decoding):
    assert command(monkeypatch, capsys, small)[0] == 0
    assert made_in(small) == {"train.pixels", "val.pixels"}
    no_decoding()
    assert command(monkeypatch, capsys, small)[0] == 0


def test_the_command_refuses_a_damaged_photo(small, run, monkeypatch, capsys):
    photo = damage(small, "truncated")
    assert refused(run("data.py", small), photo, "--skip-bad")
    status, lines = command(monkeypatch, capsys, small, "--skip-bad")
    assert status == 0 and any("1 damaged photo left out" in line for line in lines)


def test_a_side_of_nothing_is_refused(small, monkeypatch, capsys):
    status, lines = command(monkeypatch, capsys, small, "--side", 0)
    assert status == 2 and "argument --side: 0 is less than 1" in lines[-1]


def test_a_name_that_the_terminal_has_no_letters_for(small, monkeypatch):
    folder = small.rename(small.with_name("photos \N{CAMERA}"))
    Image.fromarray(noise(9, 9)).save(folder / "train" / TENCH / "\N{FISH}.png")
    written = [io.TextIOWrapper(io.BytesIO(), encoding="cp1252") for _ in range(2)]
    for name, stream in zip(("stdout", "stderr"), written, strict=True):
        monkeypatch.setattr(sys, name, stream)
    monkeypatch.setattr(sys, "argv", ["data.py", str(folder)])
    folders.main()
    for stream in written:
        stream.flush()
        assert b"photos \\U0001f4f7" in stream.buffer.getvalue()


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are POSIX")
def test_a_full_disk_keeps_the_older_pixels(small, run):
    """A limit on the size of a file fails as a full disk does: in the middle of writing."""
    import resource

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    folders.load(small, "train")
    before = (small / "train.pixels").read_bytes()
    assert len(before) > 4096
    change(small / "train" / TENCH / "0.png")
    assert refused(run("data.py", small, preexec_fn=full), "train.pixels")
    assert made_in(small) == {"train.pixels"} and (small / "train.pixels").read_bytes() == before
