"""Low-rank adapters: what they change, what they share, and that merging them away changes nothing."""

import pytest
import torch

import lora
from test_cache import KINDS, random_inputs, random_network


@torch.no_grad()
@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_start_as_nothing_and_merge_into_plain_weights(kind, everywhere):
    base, inputs = random_network(**KINDS[kind]), random_inputs()
    before = base(*inputs)
    network, adapters = lora.add_lora(base, 4, everywhere)
    assert torch.allclose(network(*inputs), before, atol=1e-6)
    for parameter in adapters:
        parameter.normal_(std=0.1)
    adapted, plain = network(*inputs), lora.merge_lora(network)
    assert (adapted - before).abs().mean() > 1e-2
    assert torch.allclose(plain(*inputs), adapted, atol=1e-5)
    assert plain.state_dict().keys() == base.state_dict().keys()
    assert torch.equal(base(*inputs), before)  # the network below stays as it is


def test_every_matrix_of_attention_and_feed_forward_has_an_adapter_and_no_other():
    network, adapters = lora.add_lora(random_network(dual=(0,)), rank=4)
    adapted = {name for name, module in network.named_modules() if isinstance(module, lora.LoRALinear)}
    matrices = {name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)
                and name.startswith("joint_blocks") and "adaLN" not in name}
    assert adapted == matrices and len(adapters) == 2 * len(matrices)
    trained = [p for p in network.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in adapters}


def test_in_stage_1_every_linear_map_has_an_adapter():
    network, adapters = lora.add_lora(random_network(dual=(0,)), 4, everywhere=True)
    assert len(adapters) > 2 * 50
    assert all(isinstance(module, lora.LoRALinear) for module in network.modules()
               if isinstance(module, torch.nn.Linear))


def test_queries_keys_and_values_have_an_adapter_each():
    linear = torch.nn.Linear(8, 24)
    adapted = lora.LoRALinear(linear, rank=2, parts=3)
    assert adapted.lora_A.shape == (3, 2, 8) and adapted.lora_B.shape == (3, 8, 2)
    torch.nn.init.normal_(adapted.lora_B)
    x = torch.randn(5, 8)
    q, k, v = (x @ a.T @ b.T for a, b in zip(adapted.lora_A, adapted.lora_B))
    assert torch.allclose(adapted(x), linear(x) + torch.cat([q, k, v], dim=1), atol=1e-5)


def test_the_frozen_weights_are_shared_not_copied():
    base = random_network()
    network, _ = lora.add_lora(base, rank=4)
    name = "joint_blocks.1.x_block.attn.qkv"
    assert network.get_submodule(name).weight is base.get_submodule(name).weight
    assert network.get_submodule(name) is not base.get_submodule(name)


def test_merged_weights_and_biases_are_in_fp32_on_the_cpu_whatever_they_lay_over():
    linear = torch.nn.Linear(8, 4).to(torch.bfloat16)
    adapted = lora.LoRALinear(linear, rank=2, parts=1)
    torch.nn.init.normal_(adapted.lora_B)
    plain, x = adapted.merged(), torch.randn(5, 8)
    assert {p.dtype for p in plain.parameters()} == {torch.float32} and plain.bias is not linear.bias
    expected = x @ (linear.weight.float() + adapted.lora_B[0] @ adapted.lora_A[0]).T + linear.bias.float()
    assert torch.allclose(plain(x), expected, atol=1e-5)
