"""Stage II: detail-focused adversarial refinement (1.x-Distill, Sec. 3.3), with the block cache in place (Sec. 3.4).

The student is trained exactly as it samples: from pure noise, through all its steps, with cached blocks from the second
step on, down to the decoded image. A discriminator tells that image from one that a slower reference generator makes of
the same noise and prompt (of others, if they come from an ImagePool). It looks through a frozen ConvNeXt, at three of
its feature maps and at its embedding of the image. Both turns, which train.stage2 writes out:

    generator        refine(student, …), decode, generator_loss(discriminator(image))
    discriminator    the same image without gradient, the reference's image, discriminator_loss(…)

The losses are pure functions.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

import flow
import weights
from cache import CachedSteps
from mmdit import Residual

REAL_LABEL = 0.8  # one-sided label smoothing (Salimans et al. 2016), in the generator's turn as well


def generator_turn(update, warmup, ratio):
    """Whose turn an update is (Sec. 3.3): `warmup` of the discriminator, one of the generator, `ratio` of the
    discriminator, one of the generator, … -> which of the generator's turns it is, from 0, or None."""
    turn, rest = divmod(update - warmup, 1 + ratio)
    return turn if turn >= 0 and rest == 0 else None


# ------------------------------------------------------------------------------------- the student's own sampling

class LaterStep(NamedTuple):
    """A step after the first: its outputs, with gradient, and those of the same step with all blocks, without."""

    velocity: torch.Tensor          # (B, C, H, W)
    correction: tuple               # Δ̃1 = f(Δ0): (B, N, width), (B, L, width)
    full_velocity: torch.Tensor
    full_residual: tuple            # Δ1


def refine(student, cache, noise, nodes, cond, distil=False, first_step=False):
    """The student's sample as it draws it (Sec. 3.3), with gradient through every step but the first.

    The first step runs all blocks and fills the cache; the steps after it use it (cache.CachedSteps). With two steps
    this is the paper's method; with more, the gradient also runs from each cached step into the one before.

    student, cache        all weights or adapters; a Cache or None
    noise, nodes, cond    (B, C, H, W); σ_0 … σ_n, (n+1,); (context, pooled)
    distil                also run every later step with all blocks, from the same state and without gradient, to learn
                          from (Fig. 13). The paper does not say whose step that is; in the released code, as here, it
                          is the current student's own.
    first_step            the gradient runs through the first step, too. Not in the paper.
    -> x_0 (B, C, H, W), and a LaterStep for each step after the first (an empty list without `distil`).
    """
    x, model, later_steps = noise, CachedSteps(student, cache), []
    for k, (sigma, sigma_next) in enumerate(zip(nodes[:-1], nodes[1:])):
        level = sigma.expand(len(x))
        with torch.set_grad_enabled(torch.is_grad_enabled() and (k > 0 or first_step)):
            velocity = model(x, level, *cond)
        if distil and k > 0:
            full = Residual(cache.blocks)
            with torch.no_grad():
                full_velocity = student(x, level, *cond, full)
            later_steps.append(LaterStep(velocity, model.corrected.streams, full_velocity, full.streams))
        x = flow.euler_step(x, velocity, sigma, sigma_next)
    return x, later_steps


# --------------------------------------------------------------------------------------------------------- losses

def generator_loss(logits):
    """The generator's turn (Sec. 3.3): the discriminator should take its images for real. logits: one tensor per level."""
    return multilevel_loss(logits, REAL_LABEL)


def discriminator_loss(of_real, of_fake):
    """The discriminator's turn (Sec. 3.3): real images should get the label 0.8, the student's 0.

    Logits: one tensor per level.
    """
    return multilevel_loss(of_real, REAL_LABEL) + multilevel_loss(of_fake, 0.0)


def multilevel_loss(logits, label):
    """Binary cross-entropy of the logits with one label: mean over a level's batch and map, sum over levels.

    With a label of 0.8 in the generator's turn, its gradient changes sign once a logit is above ln 4 = 1.39: an image
    that convinces by more is pushed back.
    """
    return sum(F.binary_cross_entropy_with_logits(level.float(), torch.full_like(level, label, dtype=torch.float32))
               for level in logits)


@torch.no_grad()
def auc(of_real, of_fake):
    """Area under the ROC curve, mean over levels: how often a real image has a larger logit than a student's.

    A discriminator that sees no difference has 0.5. Logits: one tensor per level, whose maps are averaged first.
    """
    differences = [real.flatten(1).mean(1)[:, None] - fake.flatten(1).mean(1)           # (B, B): all pairs
                   for real, fake in zip(of_real, of_fake, strict=True)]
    return torch.stack([difference.sign().mean() / 2 + 0.5 for difference in differences]).mean()


def output_distillation(later_steps):
    """MSE(v_cache, v_full) (Fig. 13), mean over the steps after the first."""
    return sum(F.mse_loss(step.velocity, step.full_velocity) for step in later_steps) / len(later_steps)


def feature_distillation(later_steps):
    """MSE(Δ̃1, Δ1) (Fig. 13), on the prediction Δ̃1 = f(Δ0). It trains only f, because Δ0 has no gradient.

    Summed over the two streams, mean over the steps after the first.
    """
    return sum(F.mse_loss(predicted, true) for step in later_steps
               for predicted, true in zip(step.correction, step.full_residual, strict=True)) / len(later_steps)


# ---------------------------------------------------------------------------------------------- the discriminator

class Discriminator(nn.Module):
    """The frozen ConvNeXt and the trained heads on it: images (B, 3, H, W) in [-1, 1] -> logits, one tensor a level."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.heads = backbone, Heads(backbone.widths)

    def forward(self, images):
        maps, embedding = self.backbone(images)
        with torch.autocast(images.device.type, enabled=False):  # released: heads in fp32
            return self.heads([m.float() for m in maps], embedding.float())


class Heads(nn.Module):
    """The part of the discriminator that is trained: a small network on each feature map, one on the embedding.

    widths: channels of the maps; the last is the embedding's. Spectral norm (Miyato et al. 2018) and multi-level heads
    on a frozen backbone as in vision-aided GANs (Kumari et al. 2022).
    """

    def __init__(self, widths, hidden=512):
        super().__init__()
        *maps, embedding = widths
        self.maps = nn.ModuleList(nn.Sequential(
            BlurPool(rim=1), spectral_norm(nn.Conv2d(width, hidden, 3, stride=2)), nn.LeakyReLU(0.2),
            BlurPool(), spectral_norm(nn.Conv2d(hidden, 1, 1, stride=2))) for width in maps)
        self.embedding = nn.Sequential(spectral_norm(nn.Linear(embedding, hidden)), nn.LeakyReLU(0.2),
                                       spectral_norm(nn.Linear(hidden, 1)))

    def forward(self, maps, embedding):
        """maps (B, width_i, h_i, w_i), embedding (B, D) -> logits: (B, 1, h_i / 4, w_i / 4) each, and (B, 1)."""
        return [head(x) for head, x in zip(self.maps, maps, strict=True)] + [self.embedding(embedding)]


class BlurPool(nn.Module):
    """A blur before a stride, against aliasing (Zhang 2019): the outer product of (1, 3, 3, 1) / 8, padded with zeros.

    The convolution after it has the stride but no padding; `rim` more zeros on each side replace that padding: with one,
    as released, a 3×3 convolution of stride 2 halves an even map exactly.
    """

    def __init__(self, rim=0):
        super().__init__()
        self.rim = rim

    def forward(self, x):
        row = x.new_tensor([1, 3, 3, 1]) / 8
        kernel = (row[:, None] * row).expand(x.shape[1], 1, 4, 4)
        before, after = 1 + self.rim, 2 + self.rim
        return F.conv2d(F.pad(x, (before, after, before, after)), kernel, groups=x.shape[1])


class PyramidDiscriminator(nn.Module):
    """A small network for each level of a Laplacian pyramid, trained from scratch: images -> logits, one map a level.

    Deviation, for the tiny world: nothing like CLIP exists for its pictures. A frozen network that we trained to detect
    damage did detect it, but its gradient did not help the generator (docs/experiments.md). A level is what a blur
    takes away (Burt & Adelson 1983; Denton et al. 2015), so that fine detail is not drowned by large areas.
    """

    GAINS = 5, 3, 1  # fine detail is faint; the last level is the picture, at a quarter of its size

    def __init__(self, hidden=32):
        super().__init__()
        self.heads = nn.ModuleList(nn.Sequential(
            nn.Conv2d(3, hidden, 4, stride=2, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(hidden, 2 * hidden, 4, stride=2, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * hidden, 1, 1)) for _ in self.GAINS)

    def forward(self, images):
        """images (B, 3, H, W) in [-1, 1] -> logits (B, 1, H/4, W/4), (B, 1, H/8, W/8), (B, 1, H/16, W/16)."""
        logits = []
        for head, gain in zip(self.heads, self.GAINS):
            smaller = F.avg_pool2d(images, 2)                                           # (B, 3, H/2, W/2)
            coarse = F.interpolate(smaller, scale_factor=2, mode="bilinear") if gain > 1 else 0
            logits.append(head(gain * (images - coarse)))
            images = smaller
        return logits


class ImagePool(nn.Module):
    """Images that the discriminator learns from, where drawing new ones for each update would take most of the time.

    The real ones stay; each of the student's newest takes the place of its oldest (Shrivastava et al. 2017). They are
    buffers, so that a run's state has them. Both (N, 3, H, W).
    """

    def __init__(self, real, fake):
        super().__init__()
        self.register_buffer("real", real.contiguous())  # safetensors writes no other layout
        self.register_buffer("fake", fake.contiguous())

    def draw(self, n, generator):
        """n random images of either kind, (n, 3, H, W)."""
        return [images[torch.randint(len(images), (n,), generator=generator)] for images in (self.real, self.fake)]

    def add(self, images):
        """Images of the student, (n, 3, H, W)."""
        self.fake.copy_(torch.cat([self.fake[len(images):], images.detach().clamp(-1, 1)]))


class ConvNeXt(nn.Module):
    """The image tower of OpenCLIP's ConvNeXt (Liu et al. 2022; `convnext_xxlarge`, laion2b_s34b_b82k_augreg_soup).

    Module names are those of the published file, below its prefix `visual.`.
    """

    def __init__(self, depths, widths, embedding):
        super().__init__()
        stages = [Stage(depth, before, width) for depth, before, width in zip(depths, [None, *widths], widths)]
        self.widths = (*widths[:3], embedding)  # channels of what forward returns
        self.trunk = nn.ModuleDict({
            "stem": nn.Sequential(nn.Conv2d(3, widths[0], 4, stride=4), ChannelNorm(widths[0])),
            "stages": nn.ModuleList(stages), "head": nn.ModuleDict({"norm": nn.LayerNorm(widths[-1], eps=NORM_EPS)})})
        self.head = nn.ModuleDict({"proj": nn.Linear(widths[-1], embedding, bias=False)})
        self.recompute = False  # training: keep only what enters each block, and run it again for the backward pass

    def forward(self, images):
        """images (B, 3, H, W) in [-1, 1] -> maps of three stages, of sides H/4, H/8, H/16; the embedding (B, D)."""
        x = self.trunk["stem"](normalise(images))                                       # (B, widths[0], H/4, W/4)
        maps = []
        for stage in self.trunk["stages"]:
            x = stage(x, self.recompute and torch.is_grad_enabled())                    # (B, widths[i], H/4/2^i, …)
            maps.append(x)
        pooled = self.trunk["head"]["norm"](x.mean(dim=(2, 3)))                         # (B, widths[3])
        return maps[:3], self.head["proj"](pooled)


class Stage(nn.Module):
    def __init__(self, depth, before, width):
        super().__init__()
        self.downsample = nn.Identity() if before is None else nn.Sequential(
            ChannelNorm(before), nn.Conv2d(before, width, 2, stride=2))
        self.blocks = nn.ModuleList(ConvNeXtBlock(width) for _ in range(depth))

    def forward(self, x, recompute=False):
        x = self.downsample(x)
        for block in self.blocks:
            if recompute:
                block = partial(checkpoint, block, use_reentrant=False)
            x = block(x)
        return x


class ConvNeXtBlock(nn.Module):
    """x + gamma · MLP(LayerNorm(7×7 depthwise convolution of x)), channels last inside."""

    def __init__(self, width):
        super().__init__()
        self.conv_dw = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x):
        h = self.norm(self.conv_dw(x).permute(0, 2, 3, 1))                              # (B, h, w, width)
        h = self.gamma * self.mlp["fc2"](F.gelu(self.mlp["fc1"](h)))                    # (B, h, w, width)
        return x + h.permute(0, 3, 1, 2)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map (B, C, H, W)."""

    def __init__(self, width):
        super().__init__(width, eps=NORM_EPS)

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def normalise(images):
    """Images in [-1, 1] as CLIP's networks take them."""
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (images / 2 + 0.5 - mean) / std


NORM_EPS = 1e-5
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# -------------------------------------------------------------------------------------------------- load

BACKBONE_FILE = "open_clip_model.safetensors"


def load_backbone(path, device="cpu", dtype=torch.float32):
    """The image tower in an `open_clip_model.safetensors`, in a folder that holds one, or of a Hugging Face repository.

    Sizes are read off the tensors; a text tower beside it is ignored. Raises UserError as mmdit.load_mmdit does.
    """
    folder = weights.find_model(path, [BACKBONE_FILE])
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise weights.UserError(f"{path}: holds no {BACKBONE_FILE}; docs/official.md says how to make it from a pickle")
    source = weights.NetworkFiles(folder / BACKBONE_FILE if (folder / BACKBONE_FILE).exists() else folder, "backbone")
    if source.blocks != 4:
        raise weights.UserError(f"{source.path}: holds no ConvNeXt of OpenCLIP (it has {source.blocks} stages, not 4)")
    with torch.device("meta"):
        network = ConvNeXt(
            depths=[source.count(f"trunk.stages.{i}.blocks.{{}}.gamma") for i in range(4)],
            widths=[source.shape(f"trunk.stages.{i}.blocks.0.gamma", dimensions=1)[0] for i in range(4)],
            embedding=source.shape("head.proj.weight", dimensions=2)[0])
    return weights.load_tensors(network, source, device, dtype).requires_grad_(False).eval()
