"""The tiny world: 64×64 scenes whose true distribution is known, their captions, and a recogniser that reads them back.

Not part of the paper. A scene has *structure* (shape, colour, size, position, background) and *detail* (a fine
texture), each attribute drawn uniformly. A caption names some attributes and leaves the others out. So what a caption
leaves open has a known, uniform truth: adherence to the prompt and diversity are measured here, not guessed.
"""

import math
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
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

COLOURS = torch.tensor([[220, 30, 40], [250, 140, 20], [250, 220, 40],
                        [30, 160, 60], [40, 80, 220], [140, 50, 180]]) / 255
BACKGROUNDS = torch.tensor([[245, 245, 245], [128, 128, 128], [15, 15, 15], [250, 180, 200]]) / 255
CENTRES = torch.tensor([[-11., 0], [11, 0], [0, -11], [0, 11], [0, 0]]) + SIZE / 2  # (x, y); y points down
RADII = torch.tensor([11., 17])
JITTER = torch.tensor([1.5, 1.5, 1.0])  # of x, y and radius, in pixels, uniform in ±
DARK = 0.4       # the second tone of a texture, as a share of the first
PERIOD = 8.0     # of a texture, in pixels


# ------------------------------------------------------------------------------------------------------- scenes

def draw_scenes(n, generator):
    """n scenes: the index of each attribute's value, int64 (n, 6), and (x, y, radius), in no caption, (n, 3) in ±1."""
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

    distance = torch.empty(len(labels), SIZE, SIZE)                                     # to the edge, in radii
    for i in range(len(ATTRIBUTES["shape"])):
        rows = shape == i
        distance[rows] = shape_distance(i, x[rows] / radius[rows], y[rows] / radius[rows])
    distance = distance * radius                                                        # (N, 64, 64), in pixels
    inside = (0.5 - distance).clamp(0, 1)[:, None]                                      # (N, 1, 64, 64), of the pixel
    dark = texture_patterns(pixels[None, :], pixels[:, None])[texture][:, None]         # (N, 1, 64, 64)

    colour, background = COLOURS[colour][:, :, None, None], BACKGROUNDS[background][:, :, None, None]
    paint = colour * (1 - dark + DARK * dark)                                           # (N, 3, 64, 64)
    return 2 * (inside * paint + (1 - inside) * background) - 1


def shape_distance(shape, x, y):
    """Signed distance to the edge of a shape (its number) of radius 1 at (x, y), negative inside."""
    if shape == 0:   # circle
        return (x**2 + y**2).sqrt() - 1
    if shape == 1:   # square
        return torch.maximum(x.abs(), y.abs()) - 0.85
    if shape == 2:   # triangle, point up
        return torch.maximum(0.866 * x.abs() - 0.5 * (y + 0.2), y - 0.75) - 0.4 + 0.15
    if shape == 3:   # diamond
        return (x.abs() + y.abs()) * 0.7071 - 0.75
    arm = 0.36       # cross
    return torch.minimum(torch.maximum(x.abs() - 1, y.abs() - arm), torch.maximum(x.abs() - arm, y.abs() - 1))


def texture_patterns(x, y):
    """How dark each texture is at pixel (x, y), from 0 to 1, edges softened; fixed to the picture. -> (4, H, W)."""
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
def look(recogniser, images, batch=256):
    """images (N, 3, 64, 64) -> the recogniser's features of them (N, 128), and the values it sees, int64 (N, 6)."""
    features = torch.cat([recogniser.features(part) for part in images.split(batch)])
    return features, torch.stack([head(features).argmax(1) for head in recogniser.heads], dim=1)


def recogniser_file(folder):
    return Path(folder) / "recogniser" / "model.safetensors"


def measures_file(folder):
    """What a model of the tiny world scores in `measure`, for some ways to sample it (report.py)."""
    return Path(folder) / "measures.json"


def teacher_file(folder):
    """Mean and covariance of a teacher's samples in the recogniser's features (report.py)."""
    return Path(folder) / "teacher_samples.safetensors"


def is_tiny_world(model):
    """Whether a model draws scenes of the tiny world: it has the recogniser beside it."""
    return recogniser_file(model).exists()


def load_recogniser(folder):
    """The recogniser of a tiny SD3 folder."""
    return weights.load_plain(Recogniser(), recogniser_file(folder)).requires_grad_(False).eval()


# ----------------------------------------------------------------------------------------------------- measures

THOROUGH = {"captions": 1024, "samples": 128}  # evaluate.py's measures; training takes fewer images


def drawn_prompts(captions, samples):
    """What `measure` has a generator draw, the same at every call -> prompts, seeds, the captions' labels and named.

    First `captions` random captions, once each; then, for every attribute, `samples` times a prompt that names only it.
    """
    prompts, labels, named = draw_captions(captions, torch.Generator().manual_seed(20_000))
    seeds = list(range(30_000, 30_000 + captions))
    for name, values in ATTRIBUTES.items():
        prompts += samples * [caption_of(**{name: values[0]})]
        seeds += range(40_000, 40_000 + samples)
    return prompts, seeds, labels, named


@cache
def look_at_truth(recogniser, renders, samples):
    """What `measure` compares with. It does not depend on what is measured and is made once for a recogniser.

    -> features of so many fresh `renders` (renders, 128), the mean distance between so many true `samples` of each
    prompt that names one attribute only, (6,), and the renders' mean power in the top octaves, (2,).
    """
    generator = torch.Generator().manual_seed(50_000)
    images = render(*draw_scenes(renders, generator))
    features, _ = look(recogniser, images)
    scenes, jitter = draw_scenes(len(NAMES) * samples, generator)
    for i in range(len(NAMES)):
        scenes[i * samples:(i + 1) * samples, i] = 0  # the value that the prompt names
    alone, _ = look(recogniser, render(scenes, jitter))                                 # (6 S, 128)
    diversity = metrics.pairwise_distance(alone.unflatten(0, (len(NAMES), samples)))
    return features, diversity, octave_power(images).mean(0)


@torch.no_grad()
def measure(draw, recogniser, captions=256, samples=64, renders=2048, draws=100, teacher=None):
    """What a generator's images are worth: {measure: {of what: (value, standard error)}}.

    draw(prompts, seeds) -> images (N, 3, 64, 64) in [-1, 1], on the CPU, of the prompts and seeds of drawn_prompts. The
    errors are those of so many images, by so many bootstrap `draws`. teacher: metrics.gaussian of a teacher's samples.

    adherence       share of right values among the attributes that the random captions name; "whole prompt": share of
                    the images in which all that is named is right
    coverage        normalised entropy of an attribute, mean over the prompts that leave it open; the truth scores 1
    distribution    Fréchet distance, precision and recall of the images of the random captions against so many
                    `renders`, in the recogniser's features; "to the teacher": Fréchet distance to its samples, the
                    paper's measure (Table 1); "diversity": mean distance between images of one prompt, as a share of
                    the truth's
    fidelity        distance of an image of the random captions to the nearest scene (nearest_scene): its mean, the
                    value that 90 % stay below, and the share of "clean" images, which are below CLEAN
    spectrum        power of these images in the top octaves, against that of the renders, in dB; the truth is at 0
    """
    prompts, seeds, labels, named = drawn_prompts(captions, samples)
    images = draw(prompts, seeds)
    with torch.autocast("cpu", enabled=False):  # images may be drawn in bf16, but are always read in fp32
        features, seen = look(recogniser, images)                                       # (captions + 6 S, 128), (…, 6)
        true_features, true_diversity, true_power = look_at_truth(recogniser, renders, samples)
        distances, _ = nearest_scene(images[:captions], seen[:captions])                # (captions,)
        power = octave_power(images[:captions])                                         # (captions, 2)
    alone, of_captions = features[captions:].unflatten(0, (len(NAMES), samples)), features[:captions]   # (6, S, 128)
    of_prompts = seen[captions:].unflatten(0, (len(NAMES), samples))                                    # (6, S, 6)
    inside, covered = metrics.precision_recall(of_captions, true_features)

    def followed(index):
        shares = adherence(seen[index], labels[index], named[index])
        whole = ((seen[index] == labels[index]) | ~named[index]).all(1).double().mean()
        return {"mean": shares.mean().item(), **dict(zip(NAMES, shares.tolist())), "whole prompt": whole.item()}

    def spread(index):  # the six prompts are resampled together, sample by sample
        values = {name: sum(metrics.entropy(of_prompts[j, index, i], CHOICES[i]) for j in range(len(NAMES)) if j != i)
                  / (len(NAMES) - 1) for i, name in enumerate(NAMES)}
        return {"mean": sum(values.values()) / len(NAMES), **values}

    true = metrics.gaussian(true_features)

    def distance(index):
        some = metrics.gaussian(of_captions[index])
        return {"Fréchet distance": metrics.frechet_distance(some, true),
                **({"to the teacher": metrics.frechet_distance(some, teacher)} if teacher else {})}

    def diversity(index):
        return {"diversity": (metrics.pairwise_distance(alone[:, index]) / true_diversity).mean().item()}

    def fidelity(index):
        some = distances[index]
        return {"mean": some.mean().item(), "90 %": some.quantile(0.9).item(),
                "clean": (some < CLEAN).double().mean().item()}

    def spectrum(index):
        return dict(zip(OCTAVES, (10 * (power[index].mean(0) / true_power).log10()).tolist()))

    boot = partial(metrics.bootstrap, draws=draws)
    return {
        "adherence": boot(followed, captions),
        "coverage": boot(spread, samples),
        "distribution": {
            **boot(distance, captions),
            **boot(lambda index: {"precision": inside[index].double().mean().item()}, captions),
            **boot(lambda index: {"recall": covered[index].double().mean().item()}, renders),
            **boot(diversity, samples)},
        "fidelity": boot(fidelity, captions),
        "spectrum": boot(spectrum, captions)}


CLEAN = 0.05  # of nearest_scene: a picture without a fault that one would point at
FAR = 1.5     # how far outside its range, ±1, a scene's jitter may be fitted
GRIDS = ((1.0, 4), (0.12, 3))  # of starts: how far they reach, and how many there are along each axis of the jitter
STEPS, TRY = 4, 0.02           # from the best of a grid; the step of the finite differences


def nearest_scene(images, labels):
    """How far images are from the nearest scene with these attributes; position and radius are fitted.

    Least squares over the jitter (x, y, radius): from the best of a grid of starts by Levenberg and Marquardt's method,
    and once more from a small grid around, since edges leave it valleys with kinks.
    images (N, 3, 64, 64) in [-1, 1], labels (N, 6) -> root mean square error over the pixels, as a share of the range
    of values, (N,), and the jitter (N, 3).
    """
    def residual(jitter):
        return ((render(labels, jitter) - images) / 2).flatten(1)                       # (N, P)

    jitter = torch.zeros(len(images), 3)
    for reach, count in GRIDS:
        axis = reach * ((torch.arange(count) + 0.5) * 2 / count - 1)
        starts = torch.cat([torch.zeros(1, 3), torch.cartesian_prod(axis, axis, axis)])
        jitter = jitter + starts[torch.stack([residual(jitter + start).square().mean(1) for start in starts]).argmin(0)]
        r, damping = residual(jitter), torch.full((len(images),), 0.01)
        error = r.square().mean(1)
        for _ in range(STEPS):
            slope = torch.stack([(residual(jitter + TRY * e) - r) / TRY for e in torch.eye(3)], dim=2)  # (N, P, 3)
            curvature, downhill = slope.mT @ slope, -slope.mT @ r[:, :, None]           # (N, 3, 3), (N, 3, 1)
            damped = curvature + torch.diag_embed(damping[:, None] * curvature.diagonal(dim1=1, dim2=2) + 1e-6)
            new = (jitter + torch.linalg.solve(damped, downhill)[:, :, 0].clamp(-0.5, 0.5)).clamp(-FAR, FAR)
            r_new = residual(new)
            better = r_new.square().mean(1) < error
            jitter, r = torch.where(better[:, None], new, jitter), torch.where(better[:, None], r_new, r)
            error, damping = r.square().mean(1), damping * torch.where(better, 0.25, 5.0)
    return error.sqrt(), jitter


OCTAVES = {"8-16 cycles": (8, 16), "16-32 cycles": (16, 32)}  # a picture: the finest that 64 pixels can show


def octave_power(images):
    """Power of the gray pictures in the top octaves of frequency. images (N, 3, 64, 64) -> (N, 2)."""
    power = torch.fft.fft2(images.mean(1)).abs().square()                               # (N, 64, 64)
    cycles = torch.fft.fftfreq(SIZE) * SIZE
    radius = torch.hypot(cycles[:, None], cycles[None, :])
    return torch.stack([power[:, (radius >= low) & (radius < high)].mean(1) for low, high in OCTAVES.values()], dim=1)


def true_scenes(prompts, seeds):
    """Scenes that captions describe; what these leave open is uniform. -> labels (N, 6), jitter (N, 3)."""
    labels, jitter = zip(*(draw_scenes(1, torch.Generator().manual_seed(seed)) for seed in seeds))
    labels, jitter = torch.cat(labels), torch.cat(jitter)
    for row, prompt in zip(labels, prompts, strict=True):
        words = prompt.split()
        for i, values in enumerate(ATTRIBUTES.values()):
            row[i] = next((j for j, value in enumerate(values) if value in words), row[i])
    return labels, jitter


@torch.no_grad()
def true_latents(vae, prompts, seeds):
    """The latents of true scenes that prompts describe: what a perfect generator's would be."""
    scenes = render(*true_scenes(prompts, seeds)).to(vae.encoder.conv_in.weight)
    return torch.cat([vae.encode(part) for part in scenes.split(64)])


def adherence(seen, labels, named):
    """Share of right values among those that the prompts name, by attribute. seen, labels, named (N, 6) -> (6,)."""
    right = (seen == labels) & named
    return right.sum(0) / named.sum(0)
