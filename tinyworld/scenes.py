"""The tiny world: 4,800 scenes of 64×64 pixels and their captions. The distribution is known exactly.

Not part of the paper. A scene is its six attributes: *structure* (shape, colour, size, position, background) and
*detail* (a fine texture). All 2 × 4 × 6 × 5 × 5 × 4 combinations are equally likely. A caption names some attributes
and leaves the others out, so what a caption leaves open is uniform: adherence to the prompt and diversity are measured
here, not guessed.
"""

import math

import torch

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
LABELS = torch.cartesian_prod(*(torch.arange(k) for k in CHOICES))  # (4800, 6): all scenes, values by their index
NAMED_SHARE = 0.6  # of the attributes, in a random caption

COLOURS = torch.tensor([[220, 30, 40], [250, 140, 20], [250, 220, 40],
                        [30, 160, 60], [40, 80, 220], [140, 50, 180]]) / 255
BACKGROUNDS = torch.tensor([[245, 245, 245], [128, 128, 128], [15, 15, 15], [250, 180, 200]]) / 255
CENTRES = torch.tensor([[-11., 0], [11, 0], [0, -11], [0, 11], [0, 0]]) + SIZE / 2  # (x, y); y points down
RADII = torch.tensor([11., 17])  # pixels
DARK = 0.4       # the second tone of a texture, as a share of the first
PERIOD = 8.0     # of a texture, in pixels


# ------------------------------------------------------------------------------------------------------- scenes

def draw_labels(n, generator):
    """n random scenes, int64 (n, 6)."""
    return torch.stack([torch.randint(k, (n,), generator=generator) for k in CHOICES], dim=1)


def render(labels):
    """labels (N, 6) -> anti-aliased images (N, 3, 64, 64) in [-1, 1]."""
    size, texture, colour, shape, position, background = labels.T
    centre, radius = CENTRES[position], RADII[size][:, None, None]                      # (N, 2), (N, 1, 1)
    pixels = torch.arange(SIZE) + 0.5
    x = (pixels[None, None, :] - centre[:, 0, None, None]) / radius                     # (N, 1, 64), from the centre,
    y = (pixels[None, :, None] - centre[:, 1, None, None]) / radius                     # (N, 64, 1), in radii

    distance = torch.empty(len(labels), SIZE, SIZE)                                     # to the edge, in radii
    for i in range(len(ATTRIBUTES["shape"])):
        rows = shape == i
        distance[rows] = shape_distance(i, x[rows], y[rows])
    distance = distance * radius                                                        # (N, 64, 64), in pixels
    inside = (0.5 - distance).clamp(0, 1)[:, None]                                      # (N, 1, 64, 64), share of the pixel
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
    labels, named = draw_labels(n, generator), draw_named(n, generator)
    return [caption(*pair) for pair in zip(labels, named)], labels, named


def allowed(labels, named):
    """Which scenes a caption allows. labels, named (N, 6) -> bool (N, 4800), in the order of LABELS."""
    return ((LABELS[None] == labels[:, None]) | ~named[:, None]).all(2)


def true_labels(prompts, seeds):
    """A random scene for each prompt that agrees with it -> labels (N, 6)."""
    labels = torch.cat([draw_labels(1, torch.Generator().manual_seed(seed)) for seed in seeds])
    for row, prompt in zip(labels, prompts, strict=True):
        words = prompt.split()
        for i, values in enumerate(ATTRIBUTES.values()):
            row[i] = next((j for j, value in enumerate(values) if value in words), row[i])
    return labels


def true_latents(vae, prompts, seeds):
    """The latents of random true scenes that agree with the prompts: what a perfect generator would draw."""
    return encode(vae, true_labels(prompts, seeds))


@torch.no_grad()
def encode(vae, labels):
    """labels (N, 6) -> latents of the rendered scenes (N, C, h, w)."""
    weight = vae.encoder.conv_in.weight
    return torch.cat([vae.encode(render(part).to(weight)) for part in labels.split(64)])
