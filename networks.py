"""The networks of a training run: which of them learn, how their weights are held, in what arithmetic they run."""

import math
from typing import NamedTuple

import torch

import parallel
from lora import add_lora, merge_lora
from mmdit import load_mmdit


class Arithmetic(NamedTuple):
    """What training and measuring run in: bf16 (autocast over fp32 weights) or fp32."""

    device: torch.device
    dtype: torch.dtype

    def passes(self):
        """The context of forward passes."""
        # no cache of weights in bf16: it would be a second copy of each network, without gradient if made without
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16,
                              cache_enabled=False)


def fast_bf16(device):
    """Whether bf16 is faster than fp32 there: on GPUs, and on CPUs with instructions for it."""
    return device.type != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def open_networks(path, copies, arithmetic, lora, everywhere, seed):
    """The frozen transformer of `path`, `copies` of it that learn, and what of each of them is trained, as modules.

    All weights are trained: so many networks beside the frozen one, shared out if there are many processes. With
    adapters (of rank `lora`, see add_lora): one frozen network that all share, which every process has whole, and
    adapters for each.
    """
    if lora:
        frozen = load_mmdit(path, arithmetic.device, arithmetic.dtype)
        torch.manual_seed(seed)  # for the adapters' initial weights alone
        networks, learned = zip(*(add_lora(frozen, lora, everywhere) for _ in range(copies)))
        return frozen, networks, learned
    networks = [trained_network(path, arithmetic) for _ in range(copies)]
    return frozen_network(path, arithmetic), networks, networks


def trained_network(path, arithmetic):
    """A transformer whose weights are all trained, in fp32, but for the stored table of positions."""
    network = load_mmdit(path, parallel.loading_device(arithmetic.device)).train().requires_grad_(True)
    network.pos_embed.requires_grad_(False)
    return parallel.shard(network, arithmetic.dtype, arithmetic.device)


def frozen_network(path, arithmetic):
    """A transformer that is only run, in the arithmetic's dtype: bf16 is what autocast would make of its weights."""
    network = load_mmdit(path, parallel.loading_device(arithmetic.device), arithmetic.dtype)
    return parallel.shard(network, arithmetic.dtype, arithmetic.device)


def whole(network, path):
    """A trained network as one that can be saved: adapters merged, shards put together.

    path: of a model of the same shape. With many processes all must ask; only the first has the result of merging.
    """
    if parallel.is_sharded(network):
        return parallel.gather(load_mmdit(path), network)
    return merge_lora(network) if parallel.is_first() else network


def trainable(network):
    return [p for p in network.parameters() if p.requires_grad]


def adamw(rates, betas, weight_decay):
    """AdamW over the trained parameters of (network, learning rate) pairs."""
    groups = [{"params": trainable(network), "lr": lr} for network, lr in rates]
    return torch.optim.AdamW(groups, betas=betas, weight_decay=weight_decay, eps=1e-8, fused=True)


class NotFinite(ArithmeticError):
    """A loss or a gradient that is infinite or no number; its argument says what it is of."""


def descend(optimizers, losses, max_norm, inputs=None, offload=False):
    """One step along the accumulated gradients. Returns their norm, of all together, before it was clipped.

    Raises NotFinite, before anything has changed, where a loss or the norm is not finite: to know it, the device is
    waited for once. losses: {name: tensor ()}. inputs: {name: what these are of}, to be told the user. offload: the
    optimisers' states wait in the CPU's memory between steps.
    """
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    norm = parallel.clip_gradients(parameters, max_norm) + 0 * sum(losses.values())  # 0 · ∞ is no number
    parallel.average([norm])  # all processes decide alike
    norm = norm.item()
    if not math.isfinite(norm):
        raise NotFinite(inputs or {})
    for optimizer in optimizers:
        for state in optimizer.state.values() if offload else ():
            state.update({name: tensor.to(parameters[0].device) for name, tensor in state.items()})
        optimizer.step()
        for state in optimizer.state.values() if offload else ():
            state.update({name: tensor.cpu() for name, tensor in state.items()})
        optimizer.zero_grad()
    return norm
