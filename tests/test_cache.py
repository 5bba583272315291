"""The block cache (Sec. 3.4): what is skipped, what is added in its place, what it costs, and how it is stored."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import cache
import flow
from commandline import UserError
from mmdit import MMDiT, Residual


def random_network():
    """An SD3.5-Medium in little: with QK norm, and a second attention in two blocks."""
    torch.manual_seed(0)
    network = MMDiT(depth=6, width=128, heads=2, context_dim=24, pooled_dim=12, pos_max=8, qk_norm=True, dual=(0, 1))
    torch.nn.init.normal_(network.pos_embed)
    return network.requires_grad_(False)


def random_inputs():
    """Latents, levels, context and pooled text of two samples."""
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(2, 16, 8, 8, generator=generator), torch.rand(2, generator=generator),
            torch.randn(2, 5, 24, generator=generator), torch.randn(2, 12, generator=generator))


# ------------------------------------------------------------------------------------------------ the forward pass

@torch.no_grad()
@pytest.mark.parametrize("blocks", [(0, 0), (2, 4), (0, 5)], ids=str)  # block 5 is the last
def test_a_residual_is_what_its_blocks_add_and_then_only_the_others_run(blocks):
    network, inputs, seen, (first, last) = random_network(), random_inputs(), {}, blocks
    plain = network(*inputs)
    for i, block in enumerate(network.joint_blocks):
        block.register_forward_hook(lambda _, before, after, i=i: seen.update({i: (before[:2], after)}))
    residual = Residual(blocks)
    assert torch.equal(network(*inputs, residual), plain)
    for delta, before, after in zip(residual.streams, seen[first][0], seen[last][1], strict=True):
        assert torch.equal(delta, after - before)
    seen.clear()
    again = network(*inputs, residual)
    assert list(seen) == [i for i in range(6) if not first <= i <= last]
    assert torch.allclose(again, plain, atol=1e-5 * plain.abs().max())


@torch.no_grad()
def test_reuse_error_is_how_far_a_blocks_residual_moves_between_the_first_two_steps():
    network, (noise, _, *cond), nodes = random_network(), random_inputs(), torch.tensor([1.0, 0.6, 0.0])
    errors = cache.reuse_errors(network, noise, nodes, cond)
    x = flow.euler_step(noise, network(noise, nodes[0].expand(2), *cond), nodes[0], nodes[1])
    added = []
    network.joint_blocks[3].register_forward_hook(
        lambda _, before, after: added.append([b - a for a, b in zip(before[:2], after)]))
    for state, sigma in ((noise, nodes[0]), (x, nodes[1])):
        network(state, sigma.expand(2), *cond)
    expected = [(b - a).square().mean().sqrt() for a, b in zip(*added)]
    assert errors.shape == (6, 2) and torch.allclose(errors[3], torch.stack(expected), rtol=1e-4)
    assert errors[5, 1] == 0 and (errors[:, 0] > 0).all()  # the last block leaves the text as it is


# ------------------------------------------------------------------------------------------------ the compensator

def test_the_compensator_is_the_papers_mlp_for_each_stream_and_at_first_the_identity():
    torch.manual_seed(0)
    used, streams = cache.Compensator(8), torch.randn(2, 3, 5, 8)
    assert torch.equal(torch.stack(used(*streams)), streams)
    for mlp in (used.image, used.text):
        torch.nn.init.normal_(mlp.fc2.weight)
    for mlp, delta, found in zip((used.image, used.text), streams, used(*streams), strict=True):
        mean, var = delta.mean(-1, keepdim=True), delta.var(-1, unbiased=False, keepdim=True)
        hidden = (delta - mean) / (var + 1e-5).sqrt() @ mlp.fc1.weight.T + mlp.fc1.bias
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        assert torch.allclose(found, delta + hidden @ mlp.fc2.weight.T + mlp.fc2.bias, atol=1e-5)
        assert mlp.fc1.out_features == 16


@torch.no_grad()
def test_an_untrained_cache_is_plain_reuse_and_a_pruned_one_a_network_without_these_blocks():
    network, (noise, _, *cond), nodes = random_network(), random_inputs(), flow.student_sigmas(2, 3.0)
    drawn = {}
    for correction in cache.CORRECTIONS:
        steps = cache.CachedSteps(network, cache.new_cache((1, 2), 128, correction))
        drawn[correction] = [steps(x, sigma.expand(2), *cond) for x, sigma in zip((noise, 0.5 * noise), nodes)]
    plain = [network(x, sigma.expand(2), *cond) for x, sigma in zip((noise, 0.5 * noise), nodes)]
    assert all(torch.equal(first, plain[0]) for first, _ in drawn.values())
    assert torch.equal(drawn["mlp"][1], drawn["none"][1])
    assert (drawn["none"][1] - plain[1]).abs().mean() > 1e-3
    del network.joint_blocks[1:3]
    assert torch.equal(drawn["prune"][1], network(0.5 * noise, nodes[1].expand(2), *cond))


# ------------------------------------------------------------------------------------------------------- sampling

def test_only_the_first_step_fills_the_cache_and_all_later_ones_take_its_residual_corrected():
    calls = []

    def model(x, sigma, context, pooled, residual):
        assert residual.blocks == (1, 2)
        calls.append(residual.streams)
        if residual.streams is None:
            residual.streams = torch.ones(len(x), 1, 4), torch.full((len(x), 1, 4), 2.0)
        return x

    cond = torch.zeros(3, 1, 1), torch.zeros(3, 1)
    steps = cache.CachedSteps(model, cache.Cache((1, 2), lambda image, text: (2 * image, 2 * text)))
    flow.sample(steps, torch.ones(3, 1, 2, 2), flow.student_sigmas(4, 3.0), cond, cond, guidance=3.0)
    assert calls[0] is None and len(calls) == 4
    for image, text in calls[1:]:
        assert len(image) == 6 and (image == 2).all() and (text == 4).all()  # guided: both passes of three samples


@pytest.mark.parametrize("arguments, expected", [
    ((24, (2, 9), 2), 1.67), ((38, (3, 12), 2), 1.74), ((24, (0, 7), 4), 3.0), ((24, None, 28, True), 56)])
def test_effective_nfe_counts_the_blocks_that_run(arguments, expected):
    assert cache.effective_nfe(*arguments) == pytest.approx(expected, abs=5e-3)


# ---------------------------------------------------------------------------------------------------------- files

@pytest.mark.parametrize("correction", cache.CORRECTIONS)
def test_a_cache_is_read_back_as_it_was_written(correction, tmp_path):
    used = cache.new_cache((3, 4), 128, correction)
    for parameter in used.compensator.parameters():
        torch.nn.init.normal_(parameter)
    assert cache.load_cache(tmp_path, random_network()) is None
    cache.save_cache(used, tmp_path)
    again = cache.load_cache(tmp_path, random_network())
    assert again.blocks == (3, 4) and type(again.compensator) is type(used.compensator)
    assert all(torch.equal(tensor, again.compensator.state_dict()[name])
               for name, tensor in used.compensator.state_dict().items())
    assert not any(parameter.requires_grad for parameter in again.compensator.parameters())


@pytest.mark.parametrize("header, change", [
    ({}, None), ({"blocks": "[1, 9]"}, None), ({"blocks": "[1, 1.5]"}, None), ({"correction": "mpl"}, None),
    ({"correction": "mlp"}, lambda s: s.pop("text.fc1.bias")),
    ({"correction": "mlp"}, lambda s: s["text.fc1.bias"].fill_(torch.nan))],
    ids=["no header", "blocks outside", "half a block", "unknown correction", "a tensor too few", "NaN"])
def test_a_compensator_that_does_not_fit_the_student_is_refused_in_one_line(header, change, tmp_path):
    cache.save_cache(cache.new_cache((1, 2), 128), tmp_path)
    file, = tmp_path.rglob("*.safetensors")
    tensors = load_file(file)
    if change:
        change(tensors)
    save_file(tensors, file, header and {"blocks": "[1, 2]", "correction": "mlp", **header})
    with pytest.raises(UserError, match="compensator|cached blocks") as error:
        cache.load_cache(tmp_path, random_network())
    assert "\n" not in str(error.value)
