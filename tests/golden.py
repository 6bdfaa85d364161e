"""For moving code: does the new tree compute, bit for bit, what the old one did?

    python tests/golden.py OLD NEW                    # two checkouts; OLD may be a clone of aead783
    python tests/golden.py OLD NEW --only pictures    # seconds instead of minutes

Each tree runs in processes of its own. Compared by their hashes are pictures of seeded tensors and
texts, the weights after two epochs of each kind of training, on photos that tests/demo.py of OLD
draws, and the pictures that the commands make of the networks trained. Status 1: some differ.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

PICTURES = """
import hashlib, json, sys, torch
sys.path.insert(0, sys.argv[1])
import cam
try:
    import page
except ImportError:  # at aead783 it was in cam.py
    page = cam

def digest(pixels):
    return hashlib.sha256(bytes(pixels)).hexdigest()[:16]

torch.manual_seed(0)
photos = [torch.randint(256, (160, w, 3), dtype=torch.uint8) for w in (160, 213, 120, 300, 213)]
maps = torch.randn(5, 20, 20) * 3
found = {}
for i, (photo, class_map) in enumerate(zip(photos, maps)):
    pixels = cam.overlay(photo, class_map, cam.scale_of(class_map))
    found[f"overlay {i}"] = digest(pixels.numpy().tobytes())
    found[f"outline {i}"] = digest(cam.outline(photo, class_map).numpy().tobytes())

def compose(name, titles, captions, **options):
    rows = [page.Row("net", maps, captions, [True, False, None, True, True])]
    found[name] = digest(page.compose(photos, titles, rows, **options).tobytes())

long = ["English springer", "cassette player", "garbage truck", "French horn", "IMG_2024.jpg"]
compose("figure", list("abcde"), ["x 90%"] * 5, columns=3, dpi=150)
compose("figure with long names", long, [f"{name} 100%" for name in long], dpi=300, legend="Why.")
compose("figure, a scale each", long, ["x 90%"] * 5, scale="photo", dpi=100)
for classes in (10, 60):
    matrix, names = torch.randint(30, (classes, classes)), [f"class {i}" for i in range(classes)]
    found[f"confusion of {classes}"] = digest(page.confusion_picture(matrix, names, "t").tobytes())
print(json.dumps(found))
"""

WEIGHTS = """
import sys, torch
state = torch.load(sys.argv[1], weights_only=True)["state"]
floats = [values.contiguous().numpy() for values in state.values() if values.is_floating_point()]
sys.stdout.buffer.write(b"".join(values.tobytes() for values in floats))
"""

TRAININGS = {
    "scratch": "cnn --crop 48 --size 64",
    "head": "mobilenet_v2 --weights none --looks 64",
    "all": "mobilenet_v2 --weights none --unfreeze --crop 48 --size 64 --looks 64",
}


def run(*command):
    """The standard output of a Python command, bytes; where it fails, this ends in its stderr."""
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(done.stderr.decode(errors="replace"))
    return done.stdout


def digest(contents):
    """A short hash of bytes."""
    return hashlib.sha256(contents).hexdigest()[:16]


def trained(tree, options, photos, runs):
    """Train two epochs, draw the network's pictures: hashes by name."""
    run(tree / "train.py", *options.split(), "--epochs", 2, "--batch-size", 32, "--data", photos,
        "--runs", runs, "--name", "run", "--device", "cpu")
    best = runs / "run" / "best.pt"
    commands = {
        "figure": ("--models", best, "--data", photos, "--out", runs / "figure.png"),
        "gallery": ("--model", best, "--data", photos, "--out", runs / "gallery.png"),
        "explain": (min((photos / "val").glob("*/*")), "--model", best, "--contrast", "tench",
                    "church", "--out", runs / "explain.png"),
    }
    found = {"weights": digest(run("-c", WEIGHTS, best))}
    for command, arguments in commands.items():
        run(tree / "cam.py", command, *arguments)
        picture = runs / f"{command}.png"  # a gallery without mistakes has none
        found[command] = digest(picture.read_bytes()) if picture.exists() else None
    return found


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    names = ["pictures", *TRAININGS]
    parser.add_argument("--only", choices=names, nargs="+", default=names)
    options = parser.parse_args()
    old, new = options.old.resolve(), options.new.resolve()
    different = False
    with tempfile.TemporaryDirectory() as work:
        photos = Path(work) / "photos"
        run(old / "tests" / "demo.py", photos, "--train", 12, "--val", 3)
        for name in options.only:
            if name == "pictures":
                before, after = (json.loads(run("-c", PICTURES, tree)) for tree in (old, new))
            else:
                before, after = (trained(tree, TRAININGS[name], photos, Path(work) / age / name)
                                 for age, tree in (("old", old), ("new", new)))
            differ = [what for what in before if before[what] != after[what]]
            different |= bool(differ)
            verdict = f"DIFFERENT: {', '.join(differ)}" if differ else "equal"
            print(f"{name}: {len(before)} compared, {verdict}", flush=True)
    sys.exit(different)


if __name__ == "__main__":
    main()
