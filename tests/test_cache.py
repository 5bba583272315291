"""The block cache of Sec. 3.4: what is skipped, what is added in its place, what it costs, and how it is stored."""

import argparse
import json
import shutil
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import cache
import commandline
import flow
import pipeline
from commandline import UserError
from mmdit import MMDiT

KINDS = {"SD3-Medium": {}, "SD3.5-Large": {"qk_norm": True}, "SD3.5-Medium": {"qk_norm": True, "dual": (0, 1)}}
BLOCKS = [(0, 0), (1, 2), (2, 4), (3, 5), (0, 5)]  # block 5 is the last


def random_network(**kind):
    torch.manual_seed(0)
    network = MMDiT(depth=6, width=128, heads=2, context_dim=24, pooled_dim=12, pos_max=8, **kind)
    torch.nn.init.normal_(network.pos_embed)
    return network.requires_grad_(False)


def random_inputs(n=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, 16, 8, 8, generator=generator), torch.rand(n, generator=generator),
            torch.randn(n, 5, 24, generator=generator), torch.randn(n, 12, generator=generator))


@torch.no_grad()
def test_the_reuse_error_is_how_far_a_blocks_residual_moves_between_the_first_two_steps():
    network, (noise, _, *cond) = random_network(), random_inputs()
    nodes = torch.tensor([1.0, 0.6, 0.0])
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
    in_bf16 = cache.reuse_errors(network.bfloat16(), noise, nodes, cond)
    assert in_bf16.dtype == torch.float32 and torch.allclose(in_bf16, errors, rtol=0.1, atol=0.01)


# ------------------------------------------------------------------------------------------------ the forward pass

@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_a_cached_pass_on_the_same_input_is_the_full_pass(kind, blocks):
    network, inputs = random_network(**KINDS[kind]), random_inputs()
    plain = network(*inputs)
    full, residual = network(*inputs, blocks)
    again = network(*inputs, blocks, cache.new_cache(blocks, 128).compensator(*residual))  # the identity at first
    assert torch.equal(full, plain)
    assert torch.allclose(again, plain, atol=1e-5 * plain.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("blocks", [(1, 2), (2, 4)], ids=str)
def test_a_pruned_step_is_that_of_a_network_without_these_blocks_and_none_corrects_nothing(blocks):
    network, inputs = random_network(), random_inputs()
    residual = network(*inputs, blocks)[1]
    unchanged, pruned = (cache.new_cache(blocks, 128, correction=name).compensator for name in ("none", "prune"))
    assert all(a is b for a, b in zip(unchanged(*residual), residual))
    without = network(*inputs, blocks, pruned(*residual))
    del network.joint_blocks[blocks[0]:blocks[1] + 1]
    assert torch.equal(without, network(*inputs))


@torch.no_grad()
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_the_residual_is_what_the_blocks_add_to_both_streams_and_then_they_do_not_run(blocks):
    network, inputs, seen, (first, last) = random_network(), random_inputs(), {}, blocks
    for i, block in enumerate(network.joint_blocks):
        block.register_forward_hook(lambda _, before, after, i=i: seen.update({i: (before[:2], after)}))
    _, residual = network(*inputs, blocks)
    for stream in (0, 1):
        assert torch.equal(residual[stream], seen[last][1][stream] - seen[first][0][stream])
    seen.clear()
    network(*inputs, blocks, residual)
    assert list(seen) == [i for i in range(6) if not first <= i <= last]


def test_the_compensator_is_the_formula_of_the_paper():
    torch.manual_seed(0)
    mlp = cache.ResidualMLP(8)
    assert torch.equal(mlp(torch.ones(1, 2, 8)), torch.ones(1, 2, 8))  # the identity at first
    torch.nn.init.normal_(mlp.fc2.weight)
    delta = torch.randn(3, 5, 8)
    mean, var = delta.mean(-1, keepdim=True), delta.var(-1, unbiased=False, keepdim=True)
    hidden = (delta - mean) / (var + 1e-5).sqrt() @ mlp.fc1.weight.T + mlp.fc1.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    assert torch.allclose(mlp(delta), delta + hidden @ mlp.fc2.weight.T + mlp.fc2.bias, atol=1e-5)
    assert mlp.fc1.out_features == 16


# --------------------------------------------------------------------------------------------------------- sampling

@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_only_the_first_step_runs_all_blocks_and_a_correction_is_never_corrected_again(guidance):
    calls = []

    def model(x, sigma, context, pooled, blocks, residual=None):
        assert blocks == (1, 2)
        calls.append(residual)
        return x if residual is not None else (x, (torch.full((len(x), 1, 4), 1.0), torch.full((len(x), 1, 4), 2.0)))

    def double(image, text):
        return 2 * image, 2 * text

    cond = (torch.zeros(3, 1, 1), torch.zeros(3, 1))
    steps = cache.CachedSteps(model, cache.Cache((1, 2), double))
    flow.sample(steps, torch.ones(3, 1, 2, 2), flow.student_sigmas(4, 3.0), cond, cond, guidance)
    assert calls[0] is None and len(calls) == 4
    for image, text in calls[1:]:
        assert len(image) == (3 if guidance == 1 else 6) and (image == 2).all() and (text == 4).all()


def test_a_student_that_carries_a_cache_needs_no_flag_and_one_can_be_asked_for_or_turned_off(tmp_path):
    student = pipeline.load_pipeline(pipeline.TINY)
    student.cache = cache.new_cache((1, 4), 128)
    torch.nn.init.normal_(student.cache.compensator.image.fc2.weight, std=1.0)
    pipeline.save_pipeline(student, tmp_path)

    def latents(model):
        sampler = pipeline.open_sampler(f"{model}@steps=2,guidance=1")
        return sampler.pipeline.cache, pipeline.generate(sampler.pipeline, ["a circle"], [0], **sampler.options)

    used, compensated = latents(tmp_path)
    assert used.blocks == (1, 4) and used.compensator is not None
    assert torch.allclose(compensated, pipeline.generate(student, ["a circle"], [0], steps=2, guidance=1), atol=1e-4)
    drawn = [compensated]
    for words, expected in (("cache=1-4", cache.Cache((1, 4))), ("cache=none", None)):
        sampler = pipeline.open_sampler(f"{tmp_path}@steps=2,guidance=1,{words}")
        assert sampler.pipeline.cache == expected
        drawn.append(pipeline.generate(sampler.pipeline, ["a circle"], [0], **sampler.options))
    assert all((a - b).abs().mean() > 1e-3 for a, b in zip(drawn, drawn[1:]))


# ------------------------------------------------------------------------------------------------------------ costs

@pytest.mark.parametrize("arguments, expected", [
    ((24, (2, 9), 2), 1.67), ((24, (2, 7), 2), 1.75), ((38, (3, 12), 2), 1.74), ((24, None, 2), 2.0),
    ((24, (0, 7), 4), 3.0), ((24, None, 28, True), 56), ((12, (0, 11), 2), 1.0)])
def test_effective_nfe_counts_the_blocks_that_run(arguments, expected):
    assert cache.effective_nfe(*arguments) == pytest.approx(expected, abs=5e-3)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocks", [None, (1, 2), (0, 4)], ids=str)
def test_flops_are_those_that_torch_counts(kind, blocks):
    network, cond = random_network(**KINDS[kind]), random_inputs(1)[2:]
    used = cache.new_cache(blocks, 128) if blocks else None
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it does not know the CPU's kernel
        flow.sample(cache.CachedSteps(network, used), torch.randn(1, 16, 8, 6), flow.student_sigmas(3, 3.0), cond)
    assert cache.sampling_flops(network, 8, 6, 5, steps=3, cache=used) == counter.get_total_flops()


@pytest.mark.parametrize("kind, depth, width, extra, terra", [
    ("SD3-Medium", 24, 1536, {}, 8.9), ("SD3.5-Large", 38, 2432, {"qk_norm": True}, 31.1)])
def test_flops_at_official_size(kind, depth, width, extra, terra):
    """Nothing is computed: the networks have no memory. The compensator adds about 0.01 evaluations to the block
    count."""
    with torch.device("meta"):
        network = MMDiT(depth, width, width // 64, context_dim=4096, pooled_dim=2048, pos_max=192, **extra)
        used = cache.new_cache((2, 9) if depth == 24 else (3, 12), width, "meta")
    one = cache.forward_flops(network, 128, 128, 333)
    assert one / 1e12 == pytest.approx(terra, abs=0.06)
    nfe = cache.effective_nfe(depth, used.blocks, 2)
    assert nfe < cache.sampling_flops(network, 128, 128, 333, 2, used) / one < nfe + 0.02


@torch.no_grad()
def test_a_cached_step_saves_time(request):
    """In time of the one thread that works, since other processes may run: by count it is 0.83."""
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(1)
    network = pipeline.load_pipeline(pipeline.TINY).mmdit
    noise, cond = torch.randn(16, network.channels, 16, 16), (torch.randn(16, 27, 128), torch.randn(16, 128))
    times = {None: [], "cached": []}
    for _ in range(4):
        for name, used in ((None, None), ("cached", cache.new_cache((2, 5), 128))):
            start = time.thread_time()
            flow.sample(cache.CachedSteps(network, used), noise, flow.student_sigmas(2, 3.0), cond)
            times[name].append(time.thread_time() - start)
    assert min(times["cached"]) < 0.97 * min(times[None])


# ----------------------------------------------------------------------------------------------- names and files

def test_cached_blocks_are_read_and_what_is_no_pair_is_refused():
    assert [commandline.blocks(text) for text in ("4-7", "3-3", "none")] == [(4, 7), (3, 3), None]
    for text in ("", "4", "4-", "-4", "a-b", "4-7,", "4-7,8-9", "4:7", "4-7-9"):
        with pytest.raises(argparse.ArgumentTypeError):
            commandline.blocks(text)


@pytest.mark.parametrize("blocks, steps", [((7, 4), 2), ((0, 12), 2), ((12, 12), 2), ((0, 3), 1)])
def test_blocks_that_do_not_fit_are_refused(blocks, steps):
    with pytest.raises(UserError):
        cache.check_blocks(blocks, 12, steps)
    cache.check_blocks((4, 11), 12, 2)
    cache.check_blocks(None, 12, 1)


@pytest.mark.parametrize("damage", ["another width", "blocks outside", "no blocks", "two ranges", "not JSON",
                                    "half a block", "NaN",
                                    "a tensor too few", "an unknown correction", "the tensors of another correction"])
def test_a_compensator_that_does_not_fit_the_student_is_refused(damage, tmp_path):
    student = random_network()
    cache.save_cache(cache.new_cache((1, 2), 128 if damage != "another width" else 64), tmp_path)
    file = cache.cache_file(tmp_path)
    tensors, header = load_file(file), {"blocks": "[1, 2]"}
    assert cache.load_cache(tmp_path, student).blocks == (1, 2) if damage != "another width" else True
    if damage == "a tensor too few":
        tensors.pop("text.fc1.bias")
    if damage == "NaN":
        tensors["text.fc1.bias"][0] = torch.nan
    header = {"blocks outside": {"blocks": "[1, 9]"}, "no blocks": {}, "two ranges": {"blocks": "[[1, 2], [3, 4]]"},
              "not JSON": {"blocks": "1-2"}, "half a block": {"blocks": "[1, 1.5]"},
              "an unknown correction": {**header, "correction": "mpl"},
              "the tensors of another correction": {**header, "correction": "prune"}}.get(damage, header)
    save_file(tensors, file, header)
    with pytest.raises(UserError, match="compensator") as error:
        cache.load_cache(tmp_path, student)
    assert "\n" not in str(error.value)
    shutil.rmtree(file.parent)
    assert cache.load_cache(tmp_path, student) is None


@pytest.mark.parametrize("correction", cache.CORRECTIONS)
def test_a_compensator_is_read_back_as_it_was_and_its_blocks_stand_in_the_header(correction, tmp_path):
    used = cache.new_cache((3, 4), 128, correction=correction)
    for parameter in used.compensator.parameters():
        torch.nn.init.normal_(parameter)
    cache.save_cache(used, tmp_path)
    with safe_open(cache.cache_file(tmp_path), "pt") as file:
        assert json.loads(file.metadata()["blocks"]) == [3, 4]
    again = cache.load_cache(tmp_path, random_network()).compensator
    assert type(again) is type(used.compensator)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in used.compensator.state_dict().items())
