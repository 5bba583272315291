"""Low-rank adapters (LoRA, Hu et al. 2022): W x + b becomes W x + b + (alpha / r) B A x, and only A and B are trained.

alpha = r, A Gaussian, B zero. In Stage II of 1.x-Distill, on every attention and feed-forward matrix of every block; in
Stage I, where adapters are ours, on every linear map: with those of Stage II alone the student falls behind. The network
with adapters shares all its other weights with the one it is made from, which stays as it is.
"""

import copy
import re

import torch
import torch.nn.functional as F
from torch import nn

ADAPTED = re.compile(r"joint_blocks\.\d+\.(x|context)_block\.(attn2?\.(qkv|proj)|mlp\.fc[12])")


class LoRALinear(nn.Linear):
    """A frozen linear map with an adapter beside it. Weight and bias keep their names.

    A matrix that holds several maps (`parts`), such as queries, keys and values, has an adapter for each.
    """

    def __init__(self, base, rank, parts):
        super().__init__(base.in_features, base.out_features, device="meta")
        self.weight, self.bias = base.weight, base.bias  # in whatever dtype they are; the adapter is in fp32
        device = base.weight.device
        # drawn on the CPU: a seed makes the same run on any device
        self.lora_A = nn.Parameter((torch.randn(parts, rank, base.in_features) / rank).to(device))
        self.lora_B = nn.Parameter(torch.zeros(parts, base.out_features // parts, rank, device=device))

    def forward(self, x):
        """x (…, in) -> (…, out)."""
        low = F.linear(x, self.lora_A.flatten(0, 1)).unflatten(-1, self.lora_A.shape[:2])           # (…, parts, r)
        return super().forward(x) + torch.einsum("...pr,por->...po", low, self.lora_B).flatten(-2)  # alpha / r = 1

    def merged(self):
        """The plain linear map that does the same, in fp32, on the CPU: it is to be saved."""
        plain = nn.Linear(self.in_features, self.out_features, device="meta")
        weight = self.weight.float().cpu() + (self.lora_B @ self.lora_A).flatten(0, 1).float().cpu()
        plain.weight = nn.Parameter(weight, requires_grad=False)
        plain.bias = None if self.bias is None else nn.Parameter(self.bias.float().cpu(), requires_grad=False)
        return plain


def add_lora(model, rank, everywhere=False):
    """An MMDiT with fresh adapters over the frozen weights of `model`, and the list of the adapters.

    everywhere: on every linear map, not only on those of ADAPTED.
    """
    model.requires_grad_(False)
    adapted = {name: LoRALinear(module, rank, parts=3 if name.endswith("qkv") else 1)
               for name, module in model.named_modules()
               if (isinstance(module, nn.Linear) if everywhere else ADAPTED.fullmatch(name))}
    adapters = nn.ParameterList(p for linear in adapted.values() for p in (linear.lora_A, linear.lora_B))
    return replace_modules(model, adapted), adapters


def merge_lora(model):
    """The same network with plain weights; one without adapters is only copied."""
    return replace_modules(model, {name: module.merged() for name, module in model.named_modules()
                                   if isinstance(module, LoRALinear)})


def replace_modules(model, modules):
    """A copy that shares the weights of `model`, with some modules, {name: module}, in the place of its own."""
    network = copy.deepcopy(model, memo={id(p): p for p in model.parameters()})
    for name, module in modules.items():
        network.set_submodule(name, module)
    return network
