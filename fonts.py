"""Fonts for letters that Pillow's own font lacks.

    font = fonts.choose(["Ελλάδα", "犬"])               # a file of the system's; None: not needed
    names = fonts.legible(classes, font)                # names, or "class 3"
    page.compose(photos, titles, rows, font=font)
"""

import os
import string
import sys
from pathlib import Path

from PIL import ImageFont

import page

FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts",
           "/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts", "C:/Windows/Fonts",
           "~/AppData/Local/Microsoft/Windows/Fonts")
SUFFIXES = {".ttf", ".otf", ".ttc"}
USUAL = set(string.ascii_letters + string.digits + string.punctuation + "±")


def system_fonts():
    """The fonts of this system, plain ones first: upright, without serifs, of a short name."""
    found = [Path(folder, name) for place in FOLDERS
             for folder, _, names in os.walk(os.path.expanduser(place)) for name in names]
    found = [path for path in found if path.suffix.lower() in SUFFIXES
             and not path.stem.startswith("LastResort")]  # a Mac's, of a box for every letter
    return sorted(found, key=lambda path: ("sans" not in path.stem.lower(), len(path.stem), path))


def missing(texts, has):
    """The letters of texts that a font has not, and that can be spelt in no other way."""
    return {c for c in set("".join(texts)) if "?" in page.spelt(c, has).replace(c, "")}


def letters_of(path):
    """letter -> whether the font `path` has it. Raises ValueError: it is no font."""
    try:
        return page.known_letters(ImageFont.truetype(path, 16))
    except OSError as error:
        raise ValueError(f"{path} is no font ({error}): name a .ttf, .otf or .ttc") from error


def choose(texts, wanted=None):
    """The file of a font to write `texts` in: `wanted`; else None, for Pillow's own, if that has
    their letters; else the system's that has the most of them. Raises ValueError."""
    if wanted:
        letters_of(wanted)
        return wanted
    best, fewest = None, missing(texts, page.Paper(72).has)
    for path in system_fonts():
        if not fewest:
            break
        try:
            has = letters_of(path)
        except ValueError:
            continue
        lacks = missing(texts, has)
        if len(lacks) < len(fewest) and all(map(has, USUAL)):
            best, fewest = path, lacks
    return best


def legible(classes, font):
    """How to write each class: its name or, where `font` lacks letters of it, its number."""
    has = page.Paper(72, font).has
    numbers = {k: name for k, name in enumerate(classes) if missing([name], has)}
    if numbers:
        listed = ", ".join(f"class {k} is {name}" for k, name in [*numbers.items()][:5])
        print(f"no font here has the letters of {len(numbers)} classes: {listed}"
              f"{', ...' * (len(numbers) > 5)}; --font names one", file=sys.stderr)
    return [f"class {k}" if k in numbers else name for k, name in enumerate(classes)]
