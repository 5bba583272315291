"""The block cache (1.x-Distill, Sec. 3.4): what makes a step cost less than one network evaluation.

A range [a, b] of transformer blocks runs in the first step only. What it adds to the two streams there, the residual
Δ0 = h_after_b - h_before_a, is kept, corrected by a small MLP f, and added in place of the range in the steps that follow:

    h_img ← h_img + f_img(Δ0_img),        h_txt ← h_txt + f_txt(Δ0_txt)

The cache is an argument of the one forward pass (mmdit.py), so nothing here knows how a block works: this file has f, which
ranges are cached, and what a step then costs.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import weights


# --------------------------------------------------------------------------------------------------- compensator

class Compensator(nn.Module):
    """f of Sec. 3.4, for one range: an MLP for each of the two streams. The identity at first, that is, plain re-use."""

    def __init__(self, width):
        super().__init__()
        self.image, self.text = ResidualMLP(width), ResidualMLP(width)

    def forward(self, image, text):
        """Residuals of the image tokens (B, N, width) and of the text tokens (B, L, width) -> both, corrected."""
        return self.image(image), self.text(text)


class ResidualMLP(nn.Module):
    """f(Δ) = Δ + W2 GELU(W1 LayerNorm(Δ)), token by token, 2 · width hidden channels; W2 and its bias start at zero."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, residual):
        return residual + self.fc2(F.gelu(self.fc1(self.norm(residual))))               # (B, tokens, width)


# ------------------------------------------------------------------------------------------------------- sampling

@dataclass
class Cache:
    """Which blocks are cached, and what corrects their residuals (None: plain re-use)."""

    ranges: list                            # of inclusive pairs (first, last)
    compensators: nn.ModuleList = None      # one Compensator for each range

    def correct(self, residuals):
        """f(Δ0) for each range: a list of pairs (image tokens, text tokens)."""
        if self.compensators is None:
            return residuals
        return [compensator(*pair) for compensator, pair in zip(self.compensators, residuals, strict=True)]


def new_cache(ranges, width, device="cpu"):
    """A cache whose compensators are still the identity."""
    return Cache(ranges, nn.ModuleList(Compensator(width) for _ in ranges).to(device))


# ---------------------------------------------------------------------------------------------------------- costs

def effective_nfe(blocks, ranges, steps, guided=False):
    """Effective number of function evaluations (Sec. 3.4): the sum over the steps of (blocks run / blocks).

    ranges: inclusive pairs, cached in every step after the first. `guided`: each step runs twice, as for a teacher.
    8 of 24 blocks in 2 steps: 1.67. The released SD3-Medium range, (2, 7): 1.75. 10 of 38: 1.74. A teacher, 28 × 2: 56.
    """
    cached = sum(last - first + 1 for first, last in ranges)
    return (steps - (steps - 1) * cached / blocks) * (2 if guided else 1)


def forward_flops(model, height, width, text_tokens, ranges=()):
    """Floating-point operations of one forward pass of an MMDiT for one latent of height × width; those of `ranges` left out.

    A multiplication and an addition count as two; matrix products only, as torch's FLOP counter has it.
    """
    h, w = model.grid_size(height, width)
    tokens = {"x": h * w, "c": text_tokens, "cond": 1}
    total = 0
    for name, module in model.named_modules():
        block = re.match(r"joint_blocks\.(\d+)\.", name)
        if block and any(first <= int(block[1]) <= last for first, last in ranges):
            continue
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            vectors = "cond" if re.search(r"adaLN|\b[ty]_embedder", name) else "c" if "context_" in name else "x"
            total += 2 * module.weight.numel() * tokens[vectors]
        elif name.endswith("x_block.attn"):   # every token of both streams with every other: q kᵀ, and its product with v
            total += 4 * module.qkv.in_features * (tokens["x"] + tokens["c"]) ** 2
        elif name.endswith("x_block.attn2"):  # image tokens among themselves
            total += 4 * module.qkv.in_features * tokens["x"] ** 2
    return total


def sampling_flops(model, height, width, text_tokens, steps, cache=None, guided=False):
    """Floating-point operations of the transformer for one image, counted as in forward_flops.

    The compensator, whose output all cached steps share, is included once.
    """
    total = steps * forward_flops(model, height, width, text_tokens)
    if cache is not None:
        h, w = model.grid_size(height, width)
        total -= (steps - 1) * (forward_flops(model, height, width, text_tokens)
                                - forward_flops(model, height, width, text_tokens, cache.ranges))
        for compensator in cache.compensators or ():
            for mlp, tokens in ((compensator.image, h * w), (compensator.text, text_tokens)):
                total += tokens * 2 * (mlp.fc1.weight.numel() + mlp.fc2.weight.numel())
    return total * (2 if guided else 1)


# ------------------------------------------------------------------------------------------- ranges, load and save

def parse_ranges(text):
    """"4-7" -> [(4, 7)], "1-2,4-7" -> [(1, 2), (4, 7)], "none" -> []. Raises ValueError for anything else."""
    if text == "none":
        return []
    if not re.fullmatch(r"\d+-\d+(,\d+-\d+)*", text):
        raise ValueError(f"{text} is not A-B, the first and the last block to cache, counted from 0")
    return [tuple(map(int, part.split("-"))) for part in text.split(",")]


def check_ranges(ranges, depth, steps):
    """Raise UserError where ranges are not in order, not inside `depth` blocks, or cannot be used in so few steps."""
    end = -1
    for first, last in ranges:
        if not end < first <= last < depth:
            raise weights.UserError(f"cache range {first}-{last}: blocks are counted from 0 to {depth - 1}, the first comes "
                                    "before the last, and ranges follow one another without overlap")
        end = last
    if ranges and steps < 2:
        raise weights.UserError(f"a cache needs at least 2 steps, not {steps}: the first step fills it")


def cache_file(folder):
    return Path(folder) / "compensator" / "model.safetensors"


def load_cache(folder, model, device="cpu", dtype=torch.float32):
    """The cache that a Stage II student carries in its folder, or None. Raises UserError where it does not fit the model."""
    file = cache_file(folder)
    if not file.exists():
        return None
    with weights.open_safetensors(file) as opened, weights.explained(file, "a compensator"):
        ranges = [(int(first), int(last)) for first, last in json.loads(opened.metadata()["ranges"])]
    try:
        check_ranges(ranges, len(model.joint_blocks), steps=2)
    except weights.UserError as error:
        raise weights.UserError(f"{file}: a compensator that does not fit the student ({error})") from error
    cache = new_cache(ranges, model.pos_embed.shape[2])
    weights.load_plain(cache.compensators, file)
    cache.compensators.to(device, dtype).requires_grad_(False).eval()
    return cache


def save_cache(cache, folder):
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in cache.compensators.state_dict().items()}
    weights.write_safetensors(cache_file(folder), state, {"ranges": json.dumps(cache.ranges)})
