"""A page to look into class activation maps: one photo, any number of networks, one .html file.

    networks = [explore.Network("ResNet-18", classes, maps, logits, bias), ...]
    explore.write_page("photo.html", photo, "my photo", networks)     # opened by a double click
    IPython.display.IFrame("photo.html", "100%", 860)                 # in a notebook

The file is whole: it loads nothing and needs no server. Its template is explore.html.
"""

import base64
import io
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import cam

MOST_CLASSES = 20  # on a page
MOST_PIXELS = 72_000  # a larger photo is reduced: 268 x 268 keeps a page below 300 KB
STEPS = 33  # values in the table of colours, -1 to 1; the page interpolates between them


class Network(NamedTuple):
    """What a network says of the photo."""

    label: str
    classes: list  # K names
    maps: torch.Tensor  # (K, h, w), in logits
    logits: torch.Tensor  # (K,)
    bias: torch.Tensor  # (K,)
    about: str = ""  # a line below the label


def write_page(file, photo, title, networks, asked=()):
    """Write the page to `file`, a path or open for binary writing; the rest as for `page`."""
    contents = page(photo, title, networks, asked).encode()
    if hasattr(file, "write"):
        file.write(contents)
    else:
        Path(file).write_bytes(contents)


def page(photo, title, networks, asked=()):
    """The page, as text. photo: (H, W, 3) uint8, or a PIL image in RGB; networks: of `Network`.

    asked: indices of classes of the first network to show in any case; the page opens with the
    first of them, or with the likeliest class. Raises ValueError.
    """
    image, file = reduced(photo), io.BytesIO()
    image.save(file, "JPEG", quality=85)
    networks = in_one_order(networks)
    ranked = ranked_classes(networks, asked)
    contents = json.dumps({
        "title": title,
        "photo": "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode(),
        "width": image.width,
        "height": image.height,
        "grey": text_of(grey_levels(image)),
        "table": text_of(colour_table()),
        "steps": STEPS,
        "classes": [networks[0].classes[k] for k in ranked],
        "first": ranked.index(asked[0]) if asked else 0,
        "networks": [plain_values(network, ranked) for network in networks],
    }, allow_nan=False).replace("<", "\\u003c")  # no name can end the script element
    template = Path(__file__).with_name("explore.html").read_text(encoding="utf-8")
    return template.replace("{{DATA}}", contents, 1)


def in_one_order(networks):
    """The networks, their classes in the order of the first. ValueError where a network knows other
    classes, or its maps do not add up to its logits."""
    classes, ordered = list(networks[0].classes), []
    for network in networks:
        own = list(network.classes)
        if sorted(own) != sorted(classes):
            raise ValueError(f"{network.label} knows other classes than {networks[0].label}: "
                             "compare networks of the same classes")
        # ImageNet has names that two classes share: equal lists go by place.
        order = range(len(own)) if own == classes else [own.index(name) for name in classes]
        maps, logits, bias = (values.detach().cpu().float()[list(order)]
                              for values in (network.maps, network.logits, network.bias))
        cam.check_identity(maps[None], logits[None], bias)
        ordered.append(network._replace(classes=classes, maps=maps, logits=logits, bias=bias))
    return ordered


def ranked_classes(networks, asked=()):
    """Indices of at most MOST_CLASSES classes, the likeliest of all networks first: those asked for
    and the likeliest."""
    chance = torch.stack([network.logits.softmax(0) for network in networks]).mean(0)
    likeliest = chance.argsort(descending=True, stable=True).tolist()
    return sorted(list(dict.fromkeys([*asked, *likeliest]))[:MOST_CLASSES], key=likeliest.index)


def plain_values(network, ranked):
    """A network's numbers for the `ranked` classes, as JSON takes them."""
    label, _, maps, logits, bias, about = network
    return {"label": label, "about": about, "rows": maps.shape[1], "columns": maps.shape[2],
            "scale": cam.scale_of(maps[ranked]), "maps": [text_of(maps[k]) for k in ranked],
            "bias": bias[ranked].tolist(), "logits": logits[ranked].tolist(),
            "probabilities": logits.softmax(0)[ranked].tolist()}


def text_of(values):
    """A tensor as base64 of its bytes, row by row."""
    return base64.b64encode(values.contiguous().numpy().tobytes()).decode()


def reduced(photo):
    """The photo as a PIL image of at most MOST_PIXELS pixels."""
    image = Image.fromarray(photo.numpy() if torch.is_tensor(photo) else np.array(photo))
    share = min(1, (MOST_PIXELS / (image.width * image.height)) ** 0.5)
    return image.resize([int(side * share) or 1 for side in image.size], Image.Resampling.LANCZOS)


def grey_levels(image):
    """For each pixel of a PIL image the grey, 0..255, that is as light: (H, W) uint8."""
    greys = torch.arange(256, dtype=torch.uint8)[:, None, None].expand(256, 1, 3)
    ramp, light = cam.lightness(greys)[:, 0], cam.lightness(torch.from_numpy(np.array(image)))
    return torch.bucketize(light, (ramp[1:] + ramp[:-1]) / 2).to(torch.uint8)


def colour_table():
    """`cam.overlay`'s colours of each grey and each value / scale, -1 to 1: (256, STEPS, 3)."""
    greys = torch.arange(256, dtype=torch.uint8)[:, None, None].expand(256, STEPS, 3)
    return cam.overlay(greys, torch.linspace(-1, 1, STEPS).expand(256, STEPS), 1)
