"""Low-rank adapters: what they change, what they share, and that merging them away changes nothing."""

import pytest
import torch

import lora
from test_cache import random_inputs, random_network


@torch.no_grad()
@pytest.mark.parametrize("everywhere", [False, True])
def test_adapters_start_as_nothing_merge_into_plain_weights_and_leave_the_network_below_as_it_is(everywhere):
    base, inputs = random_network(), random_inputs()
    before = base(*inputs)
    network, adapters = lora.add_lora(base, 4, everywhere)
    assert torch.allclose(network(*inputs), before, atol=1e-6)
    for parameter in adapters:
        parameter.normal_(std=0.1)
    adapted, plain = network(*inputs), lora.merge_lora(network)
    assert (adapted - before).abs().mean() > 1e-2
    assert torch.allclose(plain(*inputs), adapted, atol=1e-5)
    assert plain.state_dict().keys() == base.state_dict().keys()
    assert torch.equal(base(*inputs), before)


@pytest.mark.parametrize("everywhere", [False, True])
def test_adapters_alone_are_trained_in_stage_2_on_attention_and_feed_forward_and_in_stage_1_on_all_maps(everywhere):
    base = random_network().requires_grad_(True)
    network, adapters = lora.add_lora(base, 4, everywhere)
    adapted = {name for name, module in network.named_modules() if isinstance(module, lora.LoRALinear)}
    assert adapted == {name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)
                       and (everywhere or name.startswith("joint_blocks") and "adaLN" not in name)}
    trained = {id(p) for p in network.parameters() if p.requires_grad}
    assert len(trained) == 2 * len(adapted) and trained == {id(p) for p in adapters}


def test_queries_keys_and_values_have_an_adapter_each_and_are_merged_in_fp32_whatever_they_lay_over():
    linear, x = torch.nn.Linear(8, 24).bfloat16(), torch.randn(2, 5, 8)
    adapted = lora.LoRALinear(linear, rank=2, parts=3)
    torch.nn.init.normal_(adapted.lora_B)
    q, k, v = (x @ a.T @ b.T for a, b in zip(adapted.lora_A, adapted.lora_B, strict=True))
    expected = x @ linear.weight.float().T + linear.bias.float() + torch.cat([q, k, v], dim=-1)
    plain = adapted.merged()
    assert {p.dtype for p in plain.parameters()} == {torch.float32} and torch.allclose(plain(x), expected, atol=1e-5)
    network, _ = lora.add_lora(random_network(), 2)
    attention = network.joint_blocks[0].x_block.attn
    assert (len(attention.qkv.lora_A), len(attention.proj.lora_A)) == (3, 1)


def test_networks_with_adapters_share_the_frozen_weights():
    base = random_network()
    copies = [dict(lora.add_lora(base, 4)[0].named_parameters()) for _ in range(2)]
    for name, weight in base.named_parameters():
        assert all(copy[name] is weight for copy in copies), name
    name = "joint_blocks.1.x_block.attn.qkv.lora_A"
    assert not torch.equal(copies[0][name], copies[1][name])
