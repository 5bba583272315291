"""The SD3 autoencoder: images to latents of 16 channels, eight times smaller, and back. Differentiable both ways.

Shapes below are those of SD3; the tiny SD3 of this repository has 4 channels, and latents four times smaller.

Source: Rombach et al. 2022 (latent diffusion), Sec. 3.1; 16 channels as in Esser et al. 2024 (SD3), Sec. 5.2.1.
Parameter names are those of Stability's files; weights.py translates the diffusers names.
"""

from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import weights


class VAE(nn.Module):
    """`widths`: channels at each resolution, from the image's down. Latents are shifted and scaled to unit variance."""

    def __init__(self, widths=(128, 256, 512, 512), layers=2, channels=16, groups=32, scale=1.5305, shift=0.0609):
        super().__init__()
        self.encoder = Encoder(widths, layers, channels, groups)
        self.decoder = Decoder(widths, layers, channels, groups)
        self.channels, self.scale, self.shift = channels, scale, shift
        self.factor = 2 ** (len(widths) - 1)  # pixels per latent, a side

    def encode(self, images):
        """images (B, 3, H, W) in [-1, 1] -> latents (B, 16, H/8, W/8): the posterior's mean, shifted and scaled."""
        mean, _ = self.moments(images)
        return (mean - self.shift) * self.scale

    def moments(self, images):
        """images (B, 3, H, W) -> mean and log-variance of the posterior, (B, 16, H/8, W/8) each, unscaled."""
        return self.encoder(channels_last(images)).chunk(2, dim=1)

    def decode(self, latents):
        """latents (B, 16, h, w) -> images (B, 3, 8h, 8w), about [-1, 1], not clamped."""
        return self.decoder(channels_last(latents / self.scale + self.shift))


def channels_last(x):
    """The same tensor, in the order in which a CPU's convolutions take three quarters of the time.

    In bf16 their backward passes take longer so: where there is a gradient, the order stays.
    """
    on = x.device.type == "cpu" and not torch.is_grad_enabled()
    return x.contiguous(memory_format=torch.channels_last) if on else x


class Encoder(nn.Module):
    def __init__(self, widths, layers, channels, groups):
        super().__init__()
        self.conv_in = conv3(3, widths[0])
        self.down = nn.ModuleList()
        for level, (before, width) in enumerate(zip((widths[0], *widths), widths)):
            blocks = nn.ModuleList(ResBlock(before if i == 0 else width, width, groups) for i in range(layers))
            self.down.append(nn.ModuleDict({"block": blocks}))
            if level < len(widths) - 1:
                self.down[level]["downsample"] = downsample(width)
        self.mid = middle(widths[-1], groups)
        self.norm_out = group_norm(groups, widths[-1])
        self.conv_out = conv3(widths[-1], 2 * channels)

    def forward(self, x):
        h = self.conv_in(x)                                                             # (B, widths[0], H, W)
        for level in self.down:
            for block in level["block"]:
                h = block(h)
            if "downsample" in level:
                h = level["downsample"](h)                                              # sides halved
        h = self.mid(h)                                                                 # (B, widths[-1], H/8, W/8)
        return self.conv_out(F.silu(self.norm_out(h)))                                  # (B, 2 channels, H/8, W/8)


class Decoder(nn.Module):
    def __init__(self, widths, layers, channels, groups):
        super().__init__()
        self.conv_in = conv3(channels, widths[-1])
        self.mid = middle(widths[-1], groups)
        levels = []
        for level in reversed(range(len(widths))):
            before, width = widths[min(level + 1, len(widths) - 1)], widths[level]
            blocks = nn.ModuleList(ResBlock(before if i == 0 else width, width, groups) for i in range(layers + 1))
            levels.append(nn.ModuleDict({"block": blocks, "upsample": upsample(width)} if level else {"block": blocks}))
        self.up = nn.ModuleList(reversed(levels))  # stored from the image's resolution down, run from the latents' up
        self.norm_out = group_norm(groups, widths[0])
        self.conv_out = conv3(widths[0], 3)
        self.recompute = False  # training: keep only what enters each block, and run it again for the backward pass

    def forward(self, z):
        h = self.mid(self.conv_in(z))                                                   # (B, widths[-1], h, w)
        for level in reversed(self.up):
            for block in level["block"]:
                if self.recompute and torch.is_grad_enabled():
                    block = partial(checkpoint, block, use_reentrant=False)
                h = block(h)
            if "upsample" in level:
                h = level["upsample"](h)                                                # sides doubled
        return self.conv_out(F.silu(self.norm_out(h)))                                  # (B, 3, 8h, 8w)


class ResBlock(nn.Module):
    def __init__(self, before, width, groups):
        super().__init__()
        self.norm1, self.conv1 = group_norm(groups, before), conv3(before, width)
        self.norm2, self.conv2 = group_norm(groups, width), conv3(width, width)
        self.nin_shortcut = nn.Conv2d(before, width, 1) if before != width else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class PixelAttention(nn.Module):
    """Single-head attention between all positions; its linear maps are stored as 1×1 convolutions."""

    def __init__(self, width, groups):
        super().__init__()
        self.norm = group_norm(groups, width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (m(h).flatten(2).transpose(1, 2)[:, None] for m in (self.q, self.k, self.v))  # (B, 1, h w, width)
        out = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.proj_out(out)


def middle(width, groups):
    return nn.Sequential(OrderedDict(block_1=ResBlock(width, width, groups), attn_1=PixelAttention(width, groups),
                                     block_2=ResBlock(width, width, groups)))


def downsample(width):
    """Padded on the right and at the bottom only."""
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(width, width, 3, stride=2)))


def upsample(width):
    return nn.Sequential(OrderedDict(nearest=nn.Upsample(scale_factor=2), conv=conv3(width, width)))


def conv3(before, width):
    return nn.Conv2d(before, width, 3, padding=1)


def group_norm(groups, width):
    return nn.GroupNorm(groups, width, eps=1e-6)


# -------------------------------------------------------------------------------------------------------- load and save

def load_vae(path, device="cpu", dtype=torch.float32):
    """The autoencoder of a Stability file, a diffusers folder, its `vae/`, or a Hugging Face repository id.

    Sizes are read off the tensors; the number of groups, scale and shift off `config.json`, if there is one. Raises
    UserError as mmdit.load_mmdit does.
    """
    source = weights.NetworkFiles(path, "vae")
    widths = [source.shape(f"encoder.down.{i}.block.0.conv2.weight", dimensions=4)[0] for i in range(source.blocks)]
    with torch.device("meta"), weights.library_errors(source.path, "be built: its settings make no sense"):
        scale, shift = (float(source.config.get(*pair)) for pair in (("scaling_factor", 1.5305), ("shift_factor", 0.0609)))
        if scale == 0:
            raise ValueError("scaling_factor is 0")
        model = VAE(widths, layers=source.count("encoder.down.0.block.{}.conv1.weight"),
                    channels=source.shape("decoder.conv_in.weight", dimensions=4)[1],
                    groups=source.config.get("norm_num_groups", 32), scale=scale, shift=shift)
    return weights.load_tensors(model, source, device, dtype).requires_grad_(False).eval()


def save_vae(vae, folder, dtype=None):
    """Write the autoencoder in the diffusers layout."""
    widths = [level["block"][0].conv2.out_channels for level in vae.encoder.down]
    weights.save_network(vae, folder, dtype=dtype, config={
        "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths), "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "layers_per_block": len(vae.encoder.down[0]["block"]), "latent_channels": vae.decoder.conv_in.in_channels,
        "norm_num_groups": vae.encoder.norm_out.num_groups, "scaling_factor": vae.scale, "shift_factor": vae.shift,
        "use_quant_conv": False, "use_post_quant_conv": False, "force_upcast": True})
