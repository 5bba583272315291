"""Stage II: detail-focused adversarial refinement (1.x-Distill, Sec. 3.3), trained together with the block cache (Sec. 3.4).

The student is trained exactly as it samples: from pure noise, through all its steps, with cached blocks from the second
step on, down to the decoded image. A discriminator tells that image from one that a slower reference generator makes of the
same noise and prompt. It looks through a frozen ConvNeXt, at three of its feature maps and at its embedding of the image.

The file reads in the order of the data: sampling, losses, discriminator. All but the networks are pure functions.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

import flow
import weights

REAL_LABEL = 0.8  # one-sided label smoothing (Salimans et al. 2016), in the generator's turn as well


# ------------------------------------------------------------------------------------------- whose turn it is

def is_generator_turn(update, alone, ratio):
    """Turns (Sec. 3.3): the discriminator's alone at first, then one generator update, `ratio` discriminator updates, and so on."""
    return update >= alone and (update - alone) % (1 + ratio) == 0


def generator_turns(updates, alone, ratio):
    """How many of the first `updates` updates were the generator's."""
    return max(0, -(-(updates - alone) // (1 + ratio)))


# ------------------------------------------------------------------------------------- the student's own sampling

class CachedStep(NamedTuple):
    """What a cached step gave, with gradient, and what the whole of that step gives, without."""

    velocity: torch.Tensor          # (B, C, H, W)
    correction: list                # Δ̃1 = f(Δ0), for each range a pair (B, N, width), (B, L, width)
    full_velocity: torch.Tensor
    full_residuals: list            # Δ1


def refine(student, noise, sigmas, cond, cache, original=None):
    """The student's sample as it draws it (Sec. 3.3), with gradient through every step but the first.

    Step 0 runs all blocks, without gradient, and fills the cache; the steps after it use it. With two steps this is the
    paper's; with more, the gradient also runs from each cached step into the one before.

    original    the student as Stage I left it, to distil from (Fig. 13): it runs the whole of every cached step, from the
                same state. The paper does not say whose full step it takes; one that does not move keeps the student in place.
    noise (B, C, H, W), sigmas (n+1,), cond = (context, pooled), cache with or without ranges
    -> x_0 (B, C, H, W), and a CachedStep for each cached step, none without `original`.
    """
    steps = []
    with torch.no_grad():
        velocity, residuals = student(noise, sigmas[0].expand(len(noise)), *cond, cache.ranges)
        x = flow.euler_step(noise, velocity, sigmas[0], sigmas[1])                      # x_{σ_1}
    correction = cache.correct(residuals)                                               # Δ̃1, the compensator's gradient
    for sigma, sigma_next in zip(sigmas[1:-1], sigmas[2:]):
        velocity = student(x, sigma.expand(len(x)), *cond, cache.ranges, correction)
        if original is not None:
            with torch.no_grad():
                steps.append(CachedStep(velocity, correction, *original(x, sigma.expand(len(x)), *cond, cache.ranges)))
        x = flow.euler_step(x, velocity, sigma, sigma_next)
    return x, steps


# --------------------------------------------------------------------------------------------------------- losses

def discriminator_loss(backbone, heads, fake, real):
    """The discriminator's turn: real images to the label 0.8, generated ones to 0. Images (B, 3, H, W) in [-1, 1]."""
    with torch.no_grad():
        features = backbone(torch.cat([real, fake]))
    logits = heads(*features)
    return (multilevel_loss([level[:len(real)] for level in logits], REAL_LABEL)
            + multilevel_loss([level[len(real):] for level in logits], 0.0))


def generator_loss(backbone, heads, fake, recompute=False):
    """The generator's turn: its images to the label of real ones. recompute: see ConvNeXt.forward.

    With 0.8 rather than 1 the gradient turns round once a logit is above ln 4 = 1.39: what convinces is not pushed further.
    """
    return multilevel_loss(heads(*backbone(fake, recompute)), REAL_LABEL)


def multilevel_loss(logits, label):
    """Binary cross-entropy of each level's logits with one label: averaged over a level's batch and map, summed over levels."""
    return sum(F.binary_cross_entropy_with_logits(level.float(), torch.full_like(level, label, dtype=torch.float32))
               for level in logits)


def output_distillation(steps):
    """MSE(v_cache, v_full) (Fig. 13), mean over the cached steps."""
    return sum(F.mse_loss(step.velocity, step.full_velocity) for step in steps) / len(steps)


def feature_distillation(steps):
    """MSE(Δ̃1, Δ1) (Fig. 13): of the *prediction* Δ̃1 = f(Δ0); the plain Δ0 has no gradient and would train nothing.

    Summed over ranges and over the two streams, mean over the cached steps.
    """
    return sum(F.mse_loss(predicted, true) for step in steps
               for pair in zip(step.correction, step.full_residuals, strict=True)
               for predicted, true in zip(*pair, strict=True)) / len(steps)


def load_lpips(device, net="vgg"):
    """LPIPS (Zhang et al. 2018): lpips(a, b), images (B, 3, H, W) in [-1, 1] -> their mean distance.

    Its authors advise the network "vgg" for a loss and "alex" for a measure.
    """
    try:
        from lpips import LPIPS  # an extra: only this term needs it
    except ImportError as error:
        raise weights.UserError("--lpips needs the package lpips: pip install lpips, or leave the flag out") from error
    network = LPIPS(net=net, verbose=False).to(device).requires_grad_(False).eval()
    return lambda a, b: network(a, b).mean()


# ---------------------------------------------------------------------------------------------- the discriminator

class Heads(nn.Module):
    """The part of the discriminator that is trained: a small network on each feature map, one on the embedding.

    widths: channels of the maps; the last is the embedding's. Spectral norm (Miyato et al. 2018) and multi-level heads on a
    frozen backbone as in vision-aided GANs (Kumari et al. 2022).
    """

    def __init__(self, widths, hidden=512):
        super().__init__()
        *maps, embedding = widths
        self.maps = nn.ModuleList(nn.Sequential(
            BlurPool(), spectral_norm(nn.Conv2d(width, hidden, 3, stride=2, padding=1)), nn.LeakyReLU(0.2),
            BlurPool(), spectral_norm(nn.Conv2d(hidden, 1, 1, stride=2))) for width in maps)
        self.embedding = nn.Sequential(spectral_norm(nn.Linear(embedding, hidden)), nn.LeakyReLU(0.2),
                                       spectral_norm(nn.Linear(hidden, 1)))

    def forward(self, maps, embedding):
        """maps (B, width_i, h_i, w_i), embedding (B, D) -> logits: (B, 1, h_i / 4, w_i / 4) each, and (B, 1)."""
        return [head(x) for head, x in zip(self.maps, maps, strict=True)] + [self.embedding(embedding)]


class BlurPool(nn.Module):
    """A blur before a stride, against aliasing (Zhang 2019): the outer product of (1, 2, 1) / 4. The stride is the convolution's.

    The paper does not name the kernel.
    """

    def forward(self, x):
        row = x.new_tensor([0.25, 0.5, 0.25])
        kernel = (row[:, None] * row).expand(x.shape[1], 1, 3, 3)
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=x.shape[1])  # of the same size


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

    def forward(self, images, recompute=False):
        """images (B, 3, H, W) in [-1, 1] -> maps of the first three stages, of sides H/4, H/8, H/16, and the embedding (B, D).

        recompute: keep only what enters each block, and run it again for the backward pass.
        """
        mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
        x = self.trunk["stem"]((images / 2 + 0.5 - mean) / std)                         # (B, widths[0], H/4, W/4)
        maps = []
        for stage in self.trunk["stages"]:
            x = stage(x, recompute)                                                     # (B, widths[i], H/4/2^i, W/4/2^i)
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


NORM_EPS = 1e-5
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# -------------------------------------------------------------------------------------------------- load and save

BACKBONE_FILE = "open_clip_model.safetensors"


def load_backbone(path, device="cpu", dtype=torch.float32):
    """The image tower in an `open_clip_model.safetensors`, in a folder that holds one, or of a Hugging Face repository.

    Sizes are read off the tensors; a text tower beside it is left alone. Raises UserError as mmdit.load_mmdit does.
    """
    folder = weights.find_component(path, "backbone")
    source = weights.NetworkFiles(folder / BACKBONE_FILE if (folder / BACKBONE_FILE).exists() else folder, "backbone")
    count, shape = source.count, source.shape
    stages = count("trunk.stages.{}.blocks.0.gamma")
    with torch.device("meta"), weights.explained(source.path, "an OpenCLIP ConvNeXt"):
        network = ConvNeXt(
            depths=[count(f"trunk.stages.{i}.blocks.{{}}.gamma") for i in range(stages)],
            widths=[shape(f"trunk.stages.{i}.blocks.0.gamma")[0] for i in range(stages)],
            embedding=shape("head.proj.weight")[0])
    return weights.fill(network, source, device, dtype).requires_grad_(False).eval()


def save_backbone(network, folder, dtype=None):
    """Write the image tower in OpenCLIP's layout to folder/backbone."""
    state = {f"visual.{name}": tensor.detach().to("cpu", dtype).contiguous() for name, tensor in network.state_dict().items()}
    weights.write_safetensors(Path(folder) / "backbone" / BACKBONE_FILE, state)
