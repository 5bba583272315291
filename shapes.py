"""The tiny world: 64×64 scenes whose true distribution is known, their captions, and a recogniser that reads them back.

Not part of the paper. A scene has *structure* (shape, colour, size, position, background) and *detail* (a fine texture),
each attribute drawn uniformly. A caption names some attributes and leaves the others out, so what a caption leaves open has a
known, uniform truth: adherence to the prompt and diversity are measured here, not guessed.
"""

import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy.stats import wasserstein_distance
from torch import nn

import metrics
import weights

SIZE = 64  # pixels, a side

ATTRIBUTES = {
    "size": ("small", "large"),
    "texture": ("solid", "striped", "dotted", "checked"),
    "colour": ("red", "orange", "yellow", "green", "blue", "purple"),
    "shape": ("circle", "square", "triangle", "diamond", "cross"),
    "position": ("left", "right", "top", "bottom", "center"),
    "background": ("white", "gray", "black", "pink"),
}
NAMES = tuple(ATTRIBUTES)
CHOICES = tuple(len(values) for values in ATTRIBUTES.values())
NAMED_SHARE = 0.6  # of the attributes, in a random caption

COLOURS = torch.tensor([[220, 30, 40], [250, 140, 20], [250, 220, 40], [30, 160, 60], [40, 80, 220], [140, 50, 180]]) / 255
BACKGROUNDS = torch.tensor([[245, 245, 245], [128, 128, 128], [15, 15, 15], [250, 180, 200]]) / 255
CENTRES = torch.tensor([[-11., 0], [11, 0], [0, -11], [0, 11], [0, 0]]) + SIZE / 2  # (x, y); y points down
RADII = torch.tensor([11., 17])
JITTER = torch.tensor([1.5, 1.5, 1.0])  # of x, y and radius, in pixels, uniform in ±
DARK = 0.4       # the second tone of a texture, as a share of the first
PERIOD = 8.0     # of a texture, in pixels


# ------------------------------------------------------------------------------------------------------- scenes

def draw_scenes(n, generator):
    """n scenes: the index of each attribute's value, int64 (n, 6), and what no caption tells (x, y, radius), (n, 3) in ±1."""
    labels = torch.stack([torch.randint(k, (n,), generator=generator) for k in CHOICES], dim=1)
    return labels, 2 * torch.rand(n, 3, generator=generator) - 1


def render(labels, jitter):
    """labels (N, 6), jitter (N, 3) -> anti-aliased images (N, 3, 64, 64) in [-1, 1]."""
    size, texture, colour, shape, position, background = labels.T
    offset = jitter * JITTER
    centre = CENTRES[position] + offset[:, :2]                                          # (N, 2)
    radius = (RADII[size] + offset[:, 2])[:, None, None]                                # (N, 1, 1)
    pixels = torch.arange(SIZE) + 0.5
    x = pixels[None, None, :] - centre[:, 0, None, None]                                # (N, 1, 64), from the centre
    y = pixels[None, :, None] - centre[:, 1, None, None]                                # (N, 64, 1)

    distances = shape_distances(x / radius, y / radius) * radius[:, None]                        # (N, 5, 64, 64), in pixels
    distance = pick(distances, shape)
    inside = (0.5 - distance).clamp(0, 1)[:, None]                                      # (N, 1, 64, 64), share of the pixel
    dark = texture_patterns(pixels[None, :], pixels[:, None])[texture][:, None]         # (N, 1, 64, 64)

    colour, background = COLOURS[colour][:, :, None, None], BACKGROUNDS[background][:, :, None, None]
    paint = colour * (1 - dark + DARK * dark)                                           # (N, 3, 64, 64)
    return 2 * (inside * paint + (1 - inside) * background) - 1


def pick(maps, index):
    """maps (N, K, H, W), index (N,) -> the chosen map of each, (N, H, W)."""
    return maps[torch.arange(len(maps)), index]


def shape_distances(x, y):
    """Signed distance to the edge of each shape of radius 1 at (x, y), negative inside. -> (N, 5, H, W)."""
    x, y = torch.broadcast_tensors(x, y)
    circle = (x**2 + y**2).sqrt() - 1
    square = torch.maximum(x.abs(), y.abs()) - 0.85
    triangle = torch.maximum(0.866 * x.abs() - 0.5 * (y + 0.2), y - 0.75) - 0.4         # point up
    diamond = (x.abs() + y.abs()) * 0.7071 - 0.75
    arm = 0.36
    cross = torch.minimum(torch.maximum(x.abs() - 1, y.abs() - arm), torch.maximum(x.abs() - arm, y.abs() - 1))
    return torch.stack([circle, square, triangle + 0.15, diamond, cross], dim=1)


def texture_patterns(x, y):
    """How dark each texture is at pixel (x, y), from 0 to 1, edges softened. It is fixed to the picture. -> (4, H, W)."""
    x, y = torch.broadcast_tensors(x, y)
    wave = 2 * math.pi / PERIOD
    striped = soft(torch.sin(wave * y))
    dotted = soft(torch.cos(wave * x) + torch.cos(wave * y) - 0.6)
    checked = soft(2 * torch.sin(wave * x) * torch.sin(wave * y))
    return torch.stack([torch.zeros_like(x), striped, dotted, checked])


def soft(wave):
    """A wave of slope about 1 per pixel at its zeros -> its sign as 0 or 1, with an edge one pixel wide."""
    return (0.5 + wave).clamp(0, 1)


# ----------------------------------------------------------------------------------------------------- captions

def draw_named(n, generator):
    """Which attributes n random captions name: bool (n, 6)."""
    return torch.rand(n, len(NAMES), generator=generator) < NAMED_SHARE


def caption(labels, named):
    """One scene's labels (6,) and which of them to name (6,) -> e.g. "a striped red circle on a gray background"."""
    word = {name: values[label] if tell else "" for (name, values), label, tell in
            zip(ATTRIBUTES.items(), labels.tolist(), named.tolist(), strict=True)}
    noun = " ".join(filter(None, ["a", word["size"], word["texture"], word["colour"], word["shape"] or "shape"]))
    place = {"": "", "center": "in the center"}.get(word["position"], f"on the {word['position']}")
    ground = f"a {word['background']} background" if word["background"] else ""
    return " ".join(filter(None, [noun, place, ("of " if place else "on ") + ground if ground else ""]))


def caption_of(**values):
    """The caption that names just these attributes, e.g. caption_of(colour="red") = "a red shape"."""
    labels = torch.tensor([ATTRIBUTES[name].index(values[name]) if name in values else 0 for name in NAMES])
    return caption(labels, torch.tensor([name in values for name in NAMES]))


def draw_captions(n, generator):
    """n random captions, with the labels (n, 6) of the scenes they are of and the attributes they name (n, 6)."""
    labels, _ = draw_scenes(n, generator)
    named = draw_named(n, generator)
    return [caption(*pair) for pair in zip(labels, named)], labels, named


VOCABULARY = sorted({word for values in ATTRIBUTES.values() for word in values} |
                    {"a", "shape", "on", "in", "the", "of", "background"})


# --------------------------------------------------------------------------------------------------- recogniser

class Recogniser(nn.Module):
    """A small convolutional network that reads every attribute off an image. It measures; no loss ever sees it."""

    def __init__(self, width=32):
        super().__init__()
        widths = (3, width, 2 * width, 3 * width, 4 * width)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 5 if a == 3 else 3, stride=2, padding=2 if a == 3 else 1)
                                   for a, b in zip(widths, widths[1:]))
        self.norms = nn.ModuleList(nn.GroupNorm(8, b) for b in widths[1:])
        self.hidden = nn.Linear(4 * width * (SIZE // 16) ** 2, 128)
        self.heads = nn.ModuleList(nn.Linear(128, k) for k in CHOICES)

    def features(self, images):
        """images (B, 3, 64, 64) in [-1, 1] -> (B, 128)."""
        h = images
        for conv, norm in zip(self.convs, self.norms):
            h = F.relu(norm(conv(h)))                                                   # sides halved: 32, 16, 8, 4
        return F.relu(self.hidden(h.flatten(1)))                                        # (B, 128)

    def forward(self, images):
        """images (B, 3, 64, 64) -> one tensor of logits per attribute, [(B, 2), (B, 4), …]."""
        h = self.features(images)
        return [head(h) for head in self.heads]


@torch.no_grad()
def recognise(recogniser, images, batch=256):
    """images (N, 3, 64, 64) -> the values seen, int64 (N, 6)."""
    return torch.cat([torch.stack([logits.argmax(1) for logits in recogniser(part)], dim=1) for part in images.split(batch)])


def recogniser_file(folder):
    return Path(folder) / "recogniser" / "model.safetensors"


def load_recogniser(folder):
    """The recogniser of a tiny SD3 folder."""
    return weights.load_plain(Recogniser(), recogniser_file(folder)).requires_grad_(False).eval()


# ----------------------------------------------------------------------------------------------------- measures

def drawn_prompts(captions, samples):
    """What `measure` has a generator draw: prompts and seeds, the same at every call, then the captions' labels and named.

    First `captions` random captions, once each; then, for every attribute, `samples` times a prompt that names it alone.
    """
    prompts, labels, named = draw_captions(captions, torch.Generator().manual_seed(20_000))
    alone = [caption_of(**{name: values[0]}) for name, values in ATTRIBUTES.items()]
    prompts = prompts + [prompt for prompt in alone for _ in range(samples)]
    return prompts, [*range(30_000, 30_000 + captions), *[40_000 + i for _ in alone for i in range(samples)]], labels, named


@torch.no_grad()
def measure(draw, recogniser, captions=256, samples=64, renders=2048, draws=100):
    """What a generator's images are worth: {measure: {of what: (value, standard error)}}. Errors are of the images drawn,
    by so many bootstrap `draws`.

    draw(prompts, seeds) -> images (N, 3, 64, 64), those of drawn_prompts.
    adherence           share of right values among the attributes that the random captions name; "whole prompt": share of the
                        images with all that is named right
    coverage            normalised entropy of an attribute, mean over the prompts that leave it open; the truth scores 1
    total variation     distance of its values from uniform, mean over the same prompts
    placement           Wasserstein distance of the object's centre (mean of x and y) and of its size (root of its area), over
                        the random captions, from the truth's; pixels
    distribution        Fréchet distance, precision and recall of the images of the random captions against so many `renders`,
                        in the recogniser's features; "diversity" is the mean distance between images of one prompt, as a share
                        of what the truth has
    """
    prompts, seeds, labels, named = drawn_prompts(captions, samples)
    images = draw(prompts, seeds)
    features = torch.cat([recogniser.features(part) for part in images.split(256)])
    seen = recognise(recogniser, images)
    generator = torch.Generator().manual_seed(50_000)
    truth = render(*draw_scenes(renders, generator))
    true_features = torch.cat([recogniser.features(part) for part in truth.split(256)])

    def over_captions(index):
        followed = dict(zip(NAMES, adherence(seen[index], labels[index], named[index]).tolist()))
        whole = ((seen[index] == labels[index]) | ~named[index]).all(1).double().mean().item()
        return {"mean": sum(followed.values()) / len(NAMES), **followed, "whole prompt": whole}

    # samples of one prompt: the six prompts are resampled together, sample by sample
    of_prompts = seen[captions:].unflatten(0, (len(NAMES), samples))                    # (6, S, 6)

    def over_samples(measure_of, index):
        values = {name: sum(measure_of(of_prompts[j, index, i], CHOICES[i]) for j in range(len(NAMES)) if j != i)
                  / (len(NAMES) - 1) for i, name in enumerate(NAMES)}
        return {"mean": sum(values.values()) / len(NAMES), **values}

    where, true_where = object_placement(images[:captions], seen[:captions]), object_placement(truth, recognise(recogniser, truth))

    def placed(index):
        x, y, size = (wasserstein_distance(where[index, i], true_where[:, i]) for i in range(3))
        return {"position": float(x + y) / 2, "size": float(size)}

    inside, covered = metrics.precision_recall(features[:captions], true_features)
    alone = features[captions:].unflatten(0, (len(NAMES), samples))                     # (6, S, D)
    scenes, jitter = draw_scenes(len(NAMES) * samples, generator)
    for j in range(len(NAMES)):
        scenes[j * samples:(j + 1) * samples, j] = 0  # the value that the prompt names
    true_diversity = metrics.pairwise_distance(recogniser.features(render(scenes, jitter)).unflatten(0, (len(NAMES), samples)))
    boot = partial(metrics.bootstrap, draws=draws)
    return {
        "adherence": boot(over_captions, captions),
        "coverage": boot(partial(over_samples, metrics.entropy), samples),
        "total variation": boot(partial(over_samples, metrics.total_variation), samples),
        "placement": boot(placed, captions),
        "distribution": {
            **boot(lambda index: {"Fréchet distance": metrics.frechet_distance(features[index], true_features)}, captions),
            **boot(lambda index: {"precision": inside[index].double().mean().item()}, captions),
            **boot(lambda index: {"recall": covered[index].double().mean().item()}, renders),
            **boot(lambda index: {"diversity": (metrics.pairwise_distance(alone[:, index]) / true_diversity).mean().item()},
                   samples)}}


def adherence(seen, labels, named):
    """Share of right values among those that the prompts name, for each attribute. seen, labels, named (N, 6) -> (6,)."""
    right = (seen == labels) & named
    return right.sum(0) / named.sum(0)


def object_placement(images, seen, threshold=0.12):
    """Centre (x, y) of the object and root of its area, in pixels. images (N, 3, 64, 64), seen (N, 6) -> (N, 3).

    The object is what differs from the background that the recogniser saw.
    """
    background = BACKGROUNDS[seen[:, NAMES.index("background")]][:, :, None, None]
    mask = ((images / 2 + 0.5 - background).abs().amax(1) > threshold).float()          # (N, 64, 64)
    area, pixels = mask.sum((1, 2)).clamp(min=1), torch.arange(SIZE) + 0.5
    return torch.stack([(mask.sum(1) * pixels).sum(1) / area, (mask.sum(2) * pixels).sum(1) / area, area.sqrt()], dim=1)
