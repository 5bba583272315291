"""The SD3 transformer (MMDiT): latents, a noise level and text in, a velocity out.

Source: Esser et al. 2024 (SD3), Sec. 4, Fig. 2; QK norm and dual attention as in SD3.5. One class serves SD3-Medium,
SD3.5-Large (QK norm), SD3.5-Medium (dual attention in its first blocks, too) and the tiny SD3 of this repository.

Image tokens and text tokens run through two streams of weights, `x_block` and `context_block`, that meet only in the
attention, where every token sees all tokens of both. The condition (noise level and pooled text) shifts, scales and
gates each sub-layer ("adaLN"). Parameter names are those of Stability's files; weights.py translates diffusers' names.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import weights


class MMDiT(nn.Module):
    """`depth` blocks of `width` channels; those with an index in `dual` have a second attention, among image tokens."""

    def __init__(self, depth, width, heads, context_dim, pooled_dim, pos_max, channels=16, patch=2, hidden=None,
                 qk_norm=False, dual=()):
        super().__init__()
        hidden = hidden or 4 * width
        self.patch, self.channels, self.pos_max = patch, channels, pos_max
        self.recompute = False  # training: keep only what enters each block, and run it again for the backward pass
        self.metadata = {}  # what the files say beside the tensors: config.json and the header of a tensor file
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(channels, width, patch, stride=patch)})
        self.pos_embed = nn.Parameter(torch.zeros(1, pos_max**2, width), requires_grad=False)  # stored, never trained
        self.t_embedder = Embedder(TIMESTEP_FEATURES, width)
        self.y_embedder = Embedder(pooled_dim, width)
        self.context_embedder = nn.Linear(context_dim, width)
        self.joint_blocks = nn.ModuleList(
            JointBlock(width, heads, hidden, qk_norm, dual=i in dual, last=i == depth - 1) for i in range(depth))
        self.final_layer = FinalLayer(width, patch * patch * channels)

    def forward(self, latents, sigma, context, pooled, residual=None):
        """latents (B, C, H, W), sigma (B,) in [0, 1], context (B, L, D), pooled (B, P) -> velocity (B, C, H, W).

        residual    a Residual, for the block cache (1.x-Distill, Sec. 3.4). An empty one is filled with what its blocks
                    add to the two streams. With a filled one these blocks do not run: its content is added instead.
        """
        h, w = self.grid_size(*latents.shape[-2:])
        # without autocast, the dtype of the weights; with it, the streams stay in the dtype of the latents
        dtype = latents.dtype if torch.is_autocast_enabled(latents.device.type) else self.pos_embed.dtype
        t = timestep_features(1000 * sigma).to(latents.device, dtype)                   # (B, 256)
        cond = self.t_embedder(t) + self.y_embedder(pooled.to(dtype))                   # (B, width)
        c = self.context_embedder(context.to(dtype)).to(dtype)                          # (B, L, width)
        x = self.x_embedder["proj"](latents.to(dtype)).flatten(2).transpose(1, 2)       # (B, N, width), N = h w
        x = x.to(dtype).contiguous() + self.crop_pos_embed(h, w)                        # (B, N, width)
        first, last = residual.blocks if residual is not None else (None, None)
        reuse = residual is not None and residual.streams is not None
        for i, block in enumerate(self.joint_blocks):
            if i == first:
                x_before, c_before = x, c
            if reuse and first <= i <= last:
                if i == last:
                    x, c = x + residual.streams[0], c + residual.streams[1]
                continue
            if self.recompute and torch.is_grad_enabled():
                block = partial(checkpoint, block, use_reentrant=False)
            x, c = block(x, c, cond)                                                    # (B, N, width), (B, L, width)
            if i == last:
                residual.streams = x - x_before, c - c_before
        x = self.final_layer(x, cond)                                                   # (B, N, p p C)
        x = x.unflatten(2, (self.patch, self.patch, -1)).unflatten(1, (h, w))           # (B, h, w, p, p, C)
        x = x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)                     # (B, C, h p, w p)
        return x.to(latents.dtype)

    def grid_size(self, height, width):
        """Tokens down and across for a latent of this size. Raises UserError where the network cannot take it."""
        h, w = height // self.patch, width // self.patch
        if height % self.patch or width % self.patch or not 0 < h <= self.pos_max or not 0 < w <= self.pos_max:
            raise weights.UserError(f"a latent of {height}x{width} does not fit this model: sides must be multiples of "
                                    f"{self.patch} and at most {self.patch * self.pos_max}")
        return h, w

    def crop_pos_embed(self, h, w):
        """The centre h × w of the stored table of positions, (1, h w, width)."""
        top, left = (self.pos_max - h) // 2, (self.pos_max - w) // 2
        table = self.pos_embed.unflatten(1, (self.pos_max, self.pos_max))
        return table[:, top:top + h, left:left + w].flatten(1, 2)


class Residual:
    """Δ = h_after_b - h_before_a (1.x-Distill, Sec. 3.4): what the blocks a to b add to the two streams of tokens.

    blocks      (a, b), the first and the last, counted from 0
    streams     Δ of the image tokens (B, N, width) and of the text tokens (B, L, width); None while it is empty
    """

    def __init__(self, blocks, streams=None):
        self.blocks, self.streams = blocks, streams


class JointBlock(nn.Module):
    """Two streams, one attention. In the last block the text side only feeds it: nothing reads the text afterwards."""

    def __init__(self, width, heads, hidden, qk_norm, dual, last):
        super().__init__()
        self.x_block = StreamBlock(width, heads, hidden, qk_norm, dual=dual, last=False)
        self.context_block = StreamBlock(width, heads, hidden, qk_norm, dual=False, last=last)

    def forward(self, x, c, cond):
        """x (B, N, width), c (B, L, width), cond (B, width) -> x, c of the same shapes."""
        x_mod, c_mod = self.x_block.modulation(cond), self.context_block.modulation(cond)
        x_norm, c_norm = layer_norm(x), layer_norm(c)
        x_qkv = self.x_block.attn.qkv_heads(modulate(x_norm, *x_mod[0:2]))              # 3 × (B, heads, N, head width)
        c_qkv = self.context_block.attn.qkv_heads(modulate(c_norm, *c_mod[0:2]))        # 3 × (B, heads, L, head width)
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(x_qkv, c_qkv, strict=True))   # (B, heads, N + L, head width)
        x_out, c_out = attention(q, k, v).split([x.shape[1], c.shape[1]], dim=1)        # (B, N, width), (B, L, width)

        x = x + x_mod[2] * self.x_block.attn.proj(x_out)
        if self.x_block.attn2 is not None:  # reads the same x_norm, under a modulation of its own
            attn2 = self.x_block.attn2
            x = x + x_mod[8] * attn2.proj(attention(*attn2.qkv_heads(modulate(x_norm, *x_mod[6:8]))))
        x = x + x_mod[5] * self.x_block.mlp(modulate(layer_norm(x), *x_mod[3:5]))
        if self.context_block.mlp is not None:
            c = c + c_mod[2] * self.context_block.attn.proj(c_out)
            c = c + c_mod[5] * self.context_block.mlp(modulate(layer_norm(c), *c_mod[3:5]))
        return x, c


class StreamBlock(nn.Module):
    """One stream's weights in a block. `last`: a text side that gives queries, keys and values, and is then done."""

    def __init__(self, width, heads, hidden, qk_norm, dual, last):
        super().__init__()
        # (shift, scale, gate) for the attention, for the MLP and, with `dual`, for attn2; only (shift, scale) if last
        chunks = 2 if last else 9 if dual else 6
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, chunks * width))
        self.attn = Attention(width, heads, qk_norm, project=not last)
        self.attn2 = Attention(width, heads, qk_norm) if dual else None
        self.mlp = None if last else MLP(width, hidden)
        self.chunks = chunks

    def modulation(self, cond):
        """cond (B, width) -> a tuple of `chunks` tensors (B, 1, width)."""
        return self.adaLN_modulation(cond)[:, None].chunk(self.chunks, dim=2)


class Attention(nn.Module):
    """The weights around an attention: queries, keys and values in one matrix, their norms, the output projection."""

    def __init__(self, width, heads, qk_norm, project=True):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.ln_q = HeadNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.ln_k = HeadNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width) if project else None

    def qkv_heads(self, x):
        """x (B, N, width) -> q, k, v, each (B, heads, N, head width)."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.ln_q(q), self.ln_k(k), v


class HeadNorm(nn.RMSNorm):
    """RMSNorm in the dtype of what it norms, also where autocast hands fp32 weights bf16."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class MLP(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Embedder(nn.Module):
    """Two linear layers that bring the timestep features, or the pooled text, to the width of the network."""

    def __init__(self, features, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x):
        return self.mlp(x)


class FinalLayer(nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.linear = nn.Linear(width, out)

    def forward(self, x, cond):
        shift, scale = self.adaLN_modulation(cond)[:, None].chunk(2, dim=2)             # (B, 1, width) each
        return self.linear(modulate(layer_norm(x), shift, scale))                       # (B, N, p p C)


# ------------------------------------------------------------------------------------------------------- maths

TIMESTEP_FEATURES = 256


def timestep_features(t):
    """cos and sin of t at 128 frequencies exp(-ln(1e4) i / 128). t (B,), fp32 -> (B, 256), fp32."""
    half = TIMESTEP_FEATURES // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t.float()[:, None] * frequencies                                           # (B, 128)
    return torch.cat([angles.cos(), angles.sin()], dim=1)                               # (B, 256)


def layer_norm(x):
    """LayerNorm over the channels, without weights: adaLN supplies shift and scale."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulate(x, shift, scale):
    """x (1 + scale) + shift, in one pass over memory."""
    return torch.addcmul(shift, x, 1 + scale)


def attention(q, k, v):
    """Every token attends to every token. q, k, v (B, heads, N, head width) -> (B, N, heads · head width)."""
    if q.requires_grad and q.device.type == "cpu" and q.shape[2] < 256:  # here, PyTorch's kernels take twice the time
        out = torch.softmax(q / q.shape[-1]**0.5 @ k.mT, dim=-1) @ v                    # (B, heads, N, head width)
    else:
        out = F.scaled_dot_product_attention(q, k, v)                                   # the same
    return out.transpose(1, 2).flatten(2)


# ---------------------------------------------------------------------------------------------- load and save

def load_mmdit(path, device="cpu", dtype=torch.float32):
    """The transformer of a Stability file, a diffusers folder, its `transformer/`, or a Hugging Face repository id.

    Raises UserError, naming the tensor, where one is missing, left over, of the wrong shape or not finite.
    """
    source = weights.NetworkFiles(path, "transformer")
    model = empty_mmdit(source)
    model.metadata = {**source.config, **source.metadata}
    return weights.load_tensors(model, source, device, dtype).requires_grad_(False).eval()


def empty_mmdit(source):
    """A network of the size that the tensors of a file show, without memory for weights."""
    depth = source.blocks
    width, channels, patch, _ = source.shape("x_embedder.proj.weight", dimensions=4)
    heads = source.heads(width)
    with torch.device("meta"):
        return MMDiT(
            depth=depth, width=width, heads=heads, channels=channels, patch=patch,
            context_dim=source.shape("context_embedder.weight", dimensions=2)[1],
            pooled_dim=source.shape("y_embedder.mlp.0.weight", dimensions=2)[1],
            pos_max=math.isqrt(source.shape("pos_embed", dimensions=3)[1]),
            hidden=source.shape("joint_blocks.0.x_block.mlp.fc1.weight", dimensions=2)[0],
            qk_norm="joint_blocks.0.x_block.attn.ln_q.weight" in source,
            dual=[i for i in range(depth) if f"joint_blocks.{i}.x_block.attn2.proj.weight" in source])


def save_mmdit(model, folder, metadata=None, dtype=None, sample_size=128):
    """Write the transformer in the diffusers layout. `metadata` (text to text) goes into the header of the tensor file.

    sample_size: the side, in latents, of the images it is made for.
    """
    block = model.joint_blocks[0].x_block
    width = block.attn.qkv.in_features
    weights.save_network(model, folder, metadata=metadata, dtype=dtype, config={
        "_class_name": "SD3Transformer2DModel", "sample_size": sample_size, "patch_size": model.patch,
        "in_channels": model.channels, "out_channels": model.channels, "num_layers": len(model.joint_blocks),
        "num_attention_heads": block.attn.heads, "attention_head_dim": width // block.attn.heads,
        "caption_projection_dim": width, "joint_attention_dim": model.context_embedder.in_features,
        "pooled_projection_dim": model.y_embedder.mlp[0].in_features, "pos_embed_max_size": model.pos_max,
        "qk_norm": "rms_norm" if isinstance(block.attn.ln_q, nn.RMSNorm) else None,
        "dual_attention_layers": [i for i, b in enumerate(model.joint_blocks) if b.x_block.attn2 is not None]})
