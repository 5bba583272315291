"""The block cache (1.x-Distill, Sec. 3.4, Fig. 5b): what makes a step cost less than one network evaluation.

The transformer blocks a to b run in the first step only. What they add to the two streams there, the residual
Δ0 = h_after_b - h_before_a, is kept, corrected by a small MLP f, and added in their place in the steps that follow:

    h_img ← h_img + f_img(Δ0_img),        h_txt ← h_txt + f_txt(Δ0_txt)

The cache is an argument of the one forward pass (mmdit.py), so nothing here knows how a block works: this file has f,
which step runs which blocks (CachedSteps), and what a step then costs.
"""

import json
import re
from operator import index
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import flow
import weights


# --------------------------------------------------------------------------------------------------- compensator

class Compensator(nn.Module):
    """f of Sec. 3.4: an MLP for each of the two streams. The identity at first, that is, plain re-use."""

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


class Unchanged(nn.Module):
    """In place of f: Δ0 as it is, without compensation (Fig. 11). The student alone is to learn to live with it."""

    def forward(self, image, text):
        return image, text


class Pruned(nn.Module):
    """In place of f: nothing. The blocks are left out, as a pruned network would; the cache is not used."""

    def forward(self, image, text):
        return torch.zeros_like(image), torch.zeros_like(text)


# ------------------------------------------------------------------------------------------------------- sampling

class Cache(NamedTuple):
    """Which blocks are cached, and what corrects their residual."""

    blocks: tuple                           # (a, b): the first and the last, counted from 0
    compensator: nn.Module = Unchanged()    # that is, plain re-use


CORRECTIONS = {"mlp": Compensator, "none": Unchanged, "prune": Pruned}


def new_cache(blocks, width, device="cpu", correction="mlp"):
    """A cache whose compensator is still the identity; or one of the other two CORRECTIONS, which learn nothing."""
    f = Compensator(width) if correction == "mlp" else CORRECTIONS[correction]()
    return Cache(blocks, f.to(device))


class CachedSteps:
    """A network for one sampling run, called once a step: the first call runs all blocks and fills the cache.

    The residual is of the first step and is corrected once, however many steps re-use it. `cache` None: all blocks
    always run.
    """

    def __init__(self, model, cache):
        self.model, self.cache = model, cache
        self.residual = self.correction = None  # Δ0, and f(Δ0)

    def __call__(self, x, sigma, context, pooled):
        """x (B, C, H, W), sigma (B,), context (B, L, D), pooled (B, P) -> velocity (B, C, H, W)."""
        if self.cache is None:
            return self.model(x, sigma, context, pooled)
        blocks, f = self.cache
        if self.residual is None:
            velocity, self.residual = self.model(x, sigma, context, pooled, blocks)
            return velocity
        if self.correction is None:  # not in the first call, which training makes without gradient
            self.correction = f(*self.residual)
        return self.model(x, sigma, context, pooled, blocks, self.correction)


@torch.no_grad()
def reuse_errors(model, noise, nodes, cond):
    """How much each block's residual changes from the first step to the second (Fig. 5a): what re-using it would get
    wrong, the root mean square over tokens and channels. A range is chosen where both streams change little.

    noise (B, C, H, W), nodes σ_0, σ_1, …, cond = (context, pooled) -> (blocks, 2): of the image and the text stream
    """
    velocity = model(noise, nodes[0].expand(len(noise)), *cond)
    x = flow.euler_step(noise, velocity, nodes[0], nodes[1])
    errors = []
    for block in range(len(model.joint_blocks)):
        first, second = (model(state, sigma.expand(len(noise)), *cond, (block, block))[1]
                         for state, sigma in ((noise, nodes[0]), (x, nodes[1])))
        errors.append([(b.float() - a.float()).square().mean().sqrt() for a, b in zip(first, second, strict=True)])
    return torch.tensor(errors)


# ---------------------------------------------------------------------------------------------------------- costs

def effective_nfe(depth, cached, steps, guided=False):
    """Effective number of function evaluations (Sec. 3.4): the sum over the steps of (blocks run / blocks).

    cached: (a, b), left out in every step after the first, or None. `guided`: each step runs twice, as for a teacher.
    8 of 24 blocks in 2 steps: 1.67. The released SD3-Medium range, (2, 7): 1.75. 10 of 38: 1.74. A teacher, 28 × 2: 56.
    """
    left_out = cached[1] - cached[0] + 1 if cached else 0
    return (steps - (steps - 1) * left_out / depth) * (2 if guided else 1)


def forward_flops(model, height, width, text_tokens, cached=None):
    """Floating-point operations of one pass of an MMDiT for a latent of height × width, without the `cached` blocks.

    A multiplication and an addition count as two; matrix products only, as torch's FLOP counter has it.
    """
    first, last = cached or (0, -1)
    h, w = model.grid_size(height, width)
    tokens = {"x": h * w, "c": text_tokens, "cond": 1}
    total = 0
    for name, module in model.named_modules():
        block = re.match(r"joint_blocks\.(\d+)\.", name)
        if block and first <= int(block[1]) <= last:
            continue
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            vectors = "cond" if re.search(r"adaLN|\b[ty]_embedder", name) else "c" if "context_" in name else "x"
            total += 2 * module.weight.numel() * tokens[vectors]
        elif name.endswith("x_block.attn"):   # every token of both streams with every other: q kᵀ, and that with v
            total += 4 * module.qkv.in_features * (tokens["x"] + tokens["c"]) ** 2
        elif name.endswith("x_block.attn2"):  # image tokens among themselves
            total += 4 * module.qkv.in_features * tokens["x"] ** 2
    return total


def sampling_flops(model, height, width, text_tokens, steps, cache=None, guided=False):
    """Floating-point operations of the transformer for one image, counted as in forward_flops.

    The compensator, whose output all cached steps share, is included once.
    """
    one = forward_flops(model, height, width, text_tokens)
    total = steps * one
    if cache is not None:
        total -= (steps - 1) * (one - forward_flops(model, height, width, text_tokens, cache.blocks))
        h, w = model.grid_size(height, width)
        f = cache.compensator
        for mlp, tokens in ((f.image, h * w), (f.text, text_tokens)) if isinstance(f, Compensator) else ():
            total += tokens * 2 * (mlp.fc1.weight.numel() + mlp.fc2.weight.numel())
    return total * (2 if guided else 1)


def describe_cost(model, height, width, text_tokens, steps, cache):
    """What a few-step sample costs, in words."""
    by_blocks = effective_nfe(len(model.joint_blocks), cache and cache.blocks, steps)
    size = height, width, text_tokens
    by_flops = sampling_flops(model, *size, steps, cache) / forward_flops(model, *size)
    return f"{by_blocks:.2f} evaluations by the blocks that run, {by_flops:.2f} by FLOPs"


# ------------------------------------------------------------------------------------------- names, load and save

def check_blocks(cached, depth, steps):
    """Raise UserError where `cached`, a pair or None, is not inside `depth` blocks, or no use in so few steps."""
    if cached is None:
        return
    first, last = cached
    if not 0 <= first <= last < depth:
        raise weights.UserError(f"cached blocks {first}-{last}: the first comes first, and they are counted from 0 to "
                                f"{depth - 1}")
    if steps < 2:
        raise weights.UserError(f"a cache needs at least 2 steps, not {steps}: the first step fills it")


def cache_file(folder):
    return Path(folder) / "compensator" / "model.safetensors"


def load_cache(folder, model, device="cpu", dtype=torch.float32):
    """The cache that a Stage II student carries in its folder, or None. Raises UserError where it does not fit."""
    file = cache_file(folder)
    if not file.exists():
        return None
    with weights.open_safetensors(file) as opened:
        header = opened.metadata() or {}
    try:
        first, last = weights.parse_json(header.get("blocks", "[]"), "its range of blocks")
        check_blocks((index(first), index(last)), len(model.joint_blocks), steps=2)
        cache = new_cache((first, last), model.pos_embed.shape[2], correction=header.get("correction", "mlp"))
    except (ValueError, TypeError, KeyError, weights.UserError) as error:
        raise weights.UserError(f"{file}: a compensator that does not fit the student ({error})") from error
    weights.load_plain(cache.compensator, file)
    cache.compensator.to(device, dtype).requires_grad_(False).eval()
    return cache


def save_cache(cache, folder):
    """Write the compensator; its kind and the first and the last cached block stand in the header."""
    kind, = (name for name, kind in CORRECTIONS.items() if isinstance(cache.compensator, kind))
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in cache.compensator.state_dict().items()}
    weights.write_safetensors(cache_file(folder), state, {"blocks": json.dumps(cache.blocks), "correction": kind})
