"""The block cache (1.x-Distill, Sec. 3.4, Fig. 5b): what makes a step cost less than one network evaluation.

The transformer blocks a to b run in the first step only. What they add to the two streams there, the residual
Δ0 = h_after_b - h_before_a, is kept, corrected by a small MLP f, and added in their place in the steps that follow:

    h_img ← h_img + f_img(Δ0_img),        h_txt ← h_txt + f_txt(Δ0_txt)

The residual is an argument of the one forward pass (mmdit.py), so nothing here knows how a block works. This file has
f, the choice of which step runs which blocks (CachedSteps), and the count of what a step then costs.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import flow
import weights
from mmdit import Residual


# --------------------------------------------------------------------------------------------------- compensator

class Compensator(nn.Module):
    """f of Sec. 3.4: an MLP for each of the two streams. At first it is the identity, which is plain re-use."""

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


class PlainReuse(nn.Module):
    """Instead of f: returns Δ0 unchanged (Fig. 11)."""

    def forward(self, image, text):
        return image, text


class Pruned(nn.Module):
    """Instead of f: zero. The blocks are left out, as in a pruned network."""

    def forward(self, image, text):
        return torch.zeros_like(image), torch.zeros_like(text)


CORRECTIONS = {"mlp": Compensator, "none": PlainReuse, "prune": Pruned}


# ------------------------------------------------------------------------------------------------------- sampling

class Cache(NamedTuple):
    """Which blocks are cached, and what corrects their residual."""

    blocks: tuple                           # (a, b): the first and the last, counted from 0
    compensator: nn.Module = PlainReuse()


def new_cache(blocks, width, correction="mlp", device="cpu"):
    """A cache at the start of training: f is the identity. The other two CORRECTIONS have nothing to train."""
    return Cache(blocks, (Compensator(width) if correction == "mlp" else CORRECTIONS[correction]()).to(device))


class CachedSteps:
    """A network for one sampling run, called once a step: the first call runs all blocks and fills the cache.

    Δ0 is that of the first step. If `cache` is None, every step runs all blocks.
    """

    def __init__(self, model, cache):
        self.model, self.cache = model, cache
        self.first = self.corrected = None  # Δ0 and f(Δ0)

    def __call__(self, x, sigma, context, pooled):
        """x (B, C, H, W), sigma (B,), context (B, L, D), pooled (B, P) -> velocity (B, C, H, W)."""
        if self.cache is None:
            return self.model(x, sigma, context, pooled)
        if self.first is None:
            self.first = Residual(self.cache.blocks)
            return self.model(x, sigma, context, pooled, self.first)
        self.corrected = Residual(self.cache.blocks, self.cache.compensator(*self.first.streams))
        return self.model(x, sigma, context, pooled, self.corrected)


@torch.no_grad()
def reuse_errors(model, noise, nodes, cond):
    """How much each block's residual changes from the first step to the second (Fig. 5a).

    This is the error of re-using it: the root mean square over tokens and channels. The paper caches a range of blocks
    for which both streams have low errors.

    noise (B, C, H, W), nodes σ_0, σ_1, …, cond = (context, pooled) -> (blocks, 2): of the image and the text stream
    """
    velocity = model(noise, nodes[0].expand(len(noise)), *cond)
    x = flow.euler_step(noise, velocity, nodes[0], nodes[1])
    errors = []
    for block in range(len(model.joint_blocks)):
        first, second = Residual((block, block)), Residual((block, block))
        model(noise, nodes[0].expand(len(noise)), *cond, first)
        model(x, nodes[1].expand(len(noise)), *cond, second)
        errors.append([(b.float() - a.float()).square().mean().sqrt()
                       for a, b in zip(first.streams, second.streams, strict=True)])
    return torch.tensor(errors)


# ---------------------------------------------------------------------------------------------------------- costs

def effective_nfe(depth, cached, steps, guided=False):
    """Effective number of function evaluations (Sec. 3.4): the sum over the steps of (blocks run / blocks).

    cached: (a, b), left out in every step after the first, or None. `guided`: each step runs twice, as for a teacher.
    8 of 24 blocks in 2 steps: 1.67. The released SD3-Medium range, (2, 7): 1.75. 10 of 38: 1.74. A teacher, 28 × 2: 56.
    """
    left_out = cached[1] - cached[0] + 1 if cached else 0
    return (steps - (steps - 1) * left_out / depth) * (2 if guided else 1)


# --------------------------------------------------------------------------------------------------- load and save

def check_blocks(cached, depth, steps):
    """Raise UserError if the cached blocks (a, b) are not among `depth` blocks, or if there is no second step."""
    if not cached:
        return
    first, last = cached
    if not 0 <= first <= last < depth:
        raise weights.UserError(f"cached blocks {first}-{last}: the first must not come after the last, and they are "
                                f"counted from 0 to {depth - 1}")
    if steps < 2:
        raise weights.UserError(f"a block cache needs at least 2 steps, not {steps}: the first step fills it")


def load_cache(folder, model, device="cpu", dtype=torch.float32):
    """The cache in a student's folder, or None. Raises UserError if it does not fit."""
    file = Path(folder) / "compensator" / "model.safetensors"
    if not file.exists():
        return None
    with weights.open_safetensors(file) as opened:
        header = opened.metadata() or {}
    with weights.library_errors(file, "be read as the compensator of this student"):
        first, last = map(range(len(model.joint_blocks)).index, json.loads(header["blocks"]))  # both are blocks
        check_blocks((first, last), len(model.joint_blocks), steps=2)
        cache = new_cache((first, last), model.pos_embed.shape[2], header["correction"], device)
    weights.load_plain(cache.compensator, file)
    cache.compensator.to(dtype).requires_grad_(False).eval()
    return cache


def save_cache(cache, folder):
    """Write the compensator. The header of its file says which blocks are cached and what corrects them."""
    correction = {kind: name for name, kind in CORRECTIONS.items()}[type(cache.compensator)]
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in cache.compensator.state_dict().items()}
    weights.write_safetensors(Path(folder) / "compensator" / "model.safetensors", state,
                              {"blocks": json.dumps(cache.blocks), "correction": correction})
