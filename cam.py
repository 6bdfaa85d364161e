"""Class activation maps (Zhou et al. 2016), exact and in logits, and their colours over a photo.

    features = network.features(images)                              # (N, C, h, w)
    maps = cam.class_activation_maps(features, network.head.weight)  # (N, K, h, w), in logits
    pixels = cam.overlay(photo, maps[0, 3], cam.scale_of(maps[0]))   # (H, W, 3) uint8

The network is features -> global average pooling -> one linear layer. So the mean of a class's map
plus its bias *is* its logit: a cell, divided by the number of cells, is what that place adds to the
class's score (orange) or takes from it (blue). `cam.explain(network, images)` finds these parts in
any network of that shape, and refuses others. This file imports nothing of the project: copy it.

    python cam.py {figure,explain,gallery,predict}                   # pages of maps: see figures.py
"""

import os
import signal
import sys

if __name__ == "__main__":  # Ctrl-C while torch is imported
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def class_activation_maps(features, head_weight):
    """All classes' maps: features (N, C, h, w), head_weight (K, C) -> (N, K, h, w), in logits."""
    if features.dim() != 4 or head_weight.shape[1:] != features.shape[1:2]:
        raise ValueError(f"a linear head (K, C) on features (N, C, h, w) has maps, not "
                         f"{tuple(head_weight.shape)} on {tuple(features.shape)}")
    return torch.einsum("kc,nchw->nkhw", head_weight, features)


def upsample(maps, size):
    """Maps (N, h, w) on the pixels of the image, `size` = (H, W), bilinearly: (N, H, W)."""
    return F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def contrast_map(maps, a, b):
    """Why class a and not b? maps (N, K, h, w) -> (N, h, w): what each place adds to a minus b."""
    return maps[:, a] - maps[:, b]


class MapsAndLogits(nn.Module):
    """A network that returns maps (N, K, h, w) and logits (N, K), for torch.export."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        features = self.network.features(images)
        maps = class_activation_maps(features, self.network.head.weight)
        return maps, self.network.head(features.mean((2, 3)))


def check_identity(maps, logits, bias=None):
    """Raise ValueError unless logits = mean of the map + bias: else the maps explain no logits."""
    if maps.shape[:2] != logits.shape:
        raise ValueError(f"maps {tuple(maps.shape)} are not of logits {tuple(logits.shape)}")
    tolerance = max(1e-3, 2 * torch.finfo(maps.dtype).eps, 2 * torch.finfo(logits.dtype).eps)
    dtype = torch.promote_types(logits.dtype, torch.float32)  # half precision adds up badly
    means = maps.detach().to(dtype).mean((2, 3)) + (0 if bias is None else bias.detach())
    error = (means - logits.detach()).abs().max()
    largest = max(maps.detach().abs().max(), logits.detach().abs().max())  # rounding grows with it
    if not error < tolerance * (1 + largest):  # NaN is refused too
        raise ValueError(f"the maps miss the logits by {error:.2g}: these are not their mean plus "
                         "a bias (is the last activation a function? make it a module, to be "
                         "seen), or they hold numbers that are not finite")


@torch.no_grad()
def explain(network, images):
    """Maps (N, K, h, w) and logits (N, K) of images (N, 3, H, W), as the network takes them.

    network: any that ends in global average pooling and one linear layer, torchvision's or one's
    own; its mode and weights stay as they are. Raises ValueError: it is of another shape.
    """
    features, head, logits = find_parts(network, images)
    maps = class_activation_maps(features, head.weight)
    check_identity(maps, logits, head.bias)
    return maps, logits


def find_parts(network, images):
    """A network, in evaluation mode, asked about images: its features (N, C, h, w), the linear head
    on their mean, and its logits (N, K). Raises ValueError: it has no such parts.

    Hooks see the output of every module. The head is the linear layer whose output is the logits;
    the features are the last map with as many channels as it takes.
    """
    network = getattr(network, "_orig_mod", network)  # torch.compile's wrapper calls no hooks
    refusal = ValueError(f"a {type(network).__name__} has no maps: it needs features (N, C, h, w), "
                         "their mean over places, and a linear head on that")
    widths = {m.in_features for m in network.modules() if isinstance(m, nn.Linear)}
    if not widths:
        raise refusal
    if not len(images):
        raise ValueError("there is no image to explain: give at least one")
    heads = []  # linear layers in the order in which they are asked: layer, input, output
    found = {}  # channels C that a linear layer takes -> the last output (N, C, h, w)

    def keep(module, inputs, output):
        """Note what a module was asked and said, if it may be the head or the features."""
        if isinstance(module, nn.Linear) and inputs:  # called by position
            heads.append((module, inputs[0], output))
        elif torch.is_tensor(output) and output.dim() == 4 and output.shape[1] in widths:
            earlier = found.get(output.shape[1])  # the map is kept, not its pooled 1 x 1 version
            if earlier is None or output[0, 0].numel() > 1 or earlier[0, 0].numel() == 1:
                found[output.shape[1]] = output

    training = [module for module in network.modules() if module.training]
    hooks = [module.register_forward_hook(keep) for module in network.modules()]
    try:
        logits = network.eval()(images)
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:  # only these: a frozen module may have been in evaluation mode
            module.training = True
    heads = [part for part in heads if part[2] is logits] or heads
    if not heads or not torch.is_tensor(logits):
        raise refusal
    head, vector, _ = heads[-1]
    features = found.get(vector.shape[-1])
    if features is None:
        raise refusal
    # No hook sees an F.relu after the last module: the features are what pools to the vector.
    if vector.shape == features.shape[:2]:
        features = min(features, features.relu(),
                       key=lambda seen: (seen.mean((2, 3)) - vector).abs().max())
    return features, head, logits


# ---------------------------------------------------------------- colour

HUES = {"adds": 50.0, "takes": 255.0}  # OKLab, degrees; the colour-blind tell them apart as well
CHROMA = 0.17  # at the end of the scale
SCALE_QUANTILE = 0.98  # of |values|: up to the largest, one strong cell would leave the rest grey


def oklab_to_srgb(lab):
    """OKLab (..., 3) (Ottosson 2020), where equal distances look equal, to sRGB, cut to 0..1."""
    to_lms = lab.new_tensor([[1, 0.3963377774, 0.2158037573],
                             [1, -0.1055613458, -0.0638541728],
                             [1, -0.0894841775, -1.2914855480]])
    to_rgb = lab.new_tensor([[4.0767416621, -3.3077115913, 0.2309699292],
                             [-1.2684380046, 2.6097574011, -0.3413193965],
                             [-0.0041960863, -0.7034186147, 1.7076147010]])
    linear = ((lab @ to_lms.T) ** 3 @ to_rgb.T).clamp(0, 1)
    return torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def lightness(photo):
    """OKLab's lightness, 0..1, of a photo (H, W, 3) uint8 seen in grey: (H, W)."""
    rgb = photo.float() / 255
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return (linear @ linear.new_tensor([0.2126, 0.7152, 0.0722])) ** (1 / 3)


def as_photo(photo):
    """A photo, a tensor, an array or a PIL image, as a tensor (H, W, 3) uint8 on the CPU."""
    pixels = photo if torch.is_tensor(photo) else np.array(photo)  # a copy: torch needs it writable
    if pixels.ndim != 3 or pixels.shape[2] != 3 or "uint8" not in str(pixels.dtype):
        raise ValueError("a photo is (H, W, 3) of uint8, or a PIL image in RGB, not "
                         f"{type(photo).__name__} {tuple(pixels.shape)} of {pixels.dtype}")
    return torch.as_tensor(pixels).cpu()


def as_map(class_map):
    """One map (h, w), of any device and float type, as float32 on the CPU, without its gradient."""
    cells = torch.as_tensor(class_map)
    if cells.dim() != 2 or not cells.isfinite().all():
        raise ValueError("a photo takes one map (h, w) of finite numbers, such as maps[0, 3]")
    return cells.detach().cpu().float()


def overlay(photo, class_map, scale):
    """A map (h, w), in logits, over a photo (H, W, 3), in full colour at `scale`: a new photo."""
    photo = as_photo(photo)
    value = (upsample(as_map(class_map)[None], photo.shape[:2])[0] / float(scale)).clamp(-1, 1)
    strength = value.abs()  # chroma is proportional to it: equal steps in logits look equal
    hue = torch.deg2rad(torch.where(value > 0, HUES["adds"], HUES["takes"]))
    light = 0.38 + 0.52 * lightness(photo)  # the photo in grey; black and white have no colours
    # Where the map is strong, towards a lightness at which colours are strong; the photo shows on.
    light = torch.lerp(light, torch.full_like(light, 0.68), 0.55 * strength)
    lab = torch.stack([light, CHROMA * strength * hue.cos(), CHROMA * strength * hue.sin()], -1)
    return (oklab_to_srgb(lab) * 255).round().to(torch.uint8)


def widened(region, reach):
    """A region (H, W), of 0 and 1, and what lies up to `reach` px beside, above or below it."""
    columns = F.max_pool2d(region[None], (2 * reach + 1, 1), 1, (reach, 0))
    return F.max_pool2d(columns, (1, 2 * reach + 1), 1, (0, reach))[0]


def spread(seed, region):
    """A seed in a region, both (H, W) bool, along the region's rows: a run with some has it all."""
    ends = F.pad(~region, (0, 1), value=True)  # (H, W + 1): where a run ends, with its row at last
    run = ends.flatten().cumsum(0)  # the number of each pixel's run
    found = torch.zeros(len(run) + 1).index_add_(0, run, F.pad(seed, (0, 1)).flatten().float())
    return (found[run] > 0).view_as(ends)[:, :-1] & region


def connected(seed, region):
    """The connected parts of a region that have some of a seed in them; both (H, W) bool."""
    while True:  # a few times: a run, however long, is one step
        grown = spread(spread(seed, region).T, region.T).T
        if torch.equal(grown, seed):
            return grown
        seed = grown


def outline(photo, class_map, width=1.0, rim=2.4):
    """A photo with a line at half of the map's maximum, `width` px wide, in a rim of `rim` px."""
    photo = as_photo(photo)
    pixels = upsample(as_map(class_map)[None], photo.shape[:2])[0]  # (H, W)
    if pixels.max() <= 0:  # nothing adds
        return photo
    height = pixels - pixels.max() / 2  # above the region's edge
    # To first order the edge is |height| / slope pixels away, by the steeper of both sides.
    dy, dx = F.pad(height.diff(dim=0).abs(), (0, 0, 1, 1)), F.pad(height.diff(dim=1).abs(), (1, 1))
    slope = torch.hypot(torch.maximum(dy[1:], dy[:-1]), torch.maximum(dx[:, 1:], dx[:, :-1]))
    distance = height.abs() / slope.clamp(min=1e-12)
    # An edge has both sides near; a flat place at half of the maximum has one. A sliver, narrower
    # than the line, has no inside (erosion) and gets no line: it would be a blot.
    reach = math.ceil((rim + 1) / 2)
    for side in (height > 0, height <= 0):
        inside = 1 - widened((~side).float(), reach - 1)
        part = connected(inside > 0, side).float()
        distance[widened(part, reach) * widened(inside, 4 * reach) == 0] = torch.inf
    shown = photo.float()
    for grey, thickness in ((255, rim), (20, width)):
        cover = ((thickness + 1) / 2 - distance).clamp(0, 1)[..., None]  # of a pixel by the line
        shown = torch.lerp(shown, torch.full_like(shown, grey), cover)
    return shown.round().to(torch.uint8)


def scale_of(maps):
    """The end, in logits, of the scale that maps of any shape share."""
    values = torch.as_tensor(maps).detach().cpu().float().abs()
    # 1e-6 where all values are 0: any scale will do.
    return float(np.quantile(values.numpy(), SCALE_QUANTILE)) or float(values.max()) or 1e-6


if __name__ == "__main__":
    try:
        import figures
    except ModuleNotFoundError as error:
        print(f"cam.py: {error}: the command needs the packages of requirements.txt, and "
              "the project's files beside it; its functions work alone", file=sys.stderr)
        sys.exit(2)
    figures.main()
