"""The block cache of Sec. 3.4: what is skipped, what is added in its place, what it costs, and how it is stored."""

import json
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import cache
import flow
import sample
import weights
from mmdit import MMDiT

KINDS = {"SD3-Medium": {}, "SD3.5-Large": {"qk_norm": True}, "SD3.5-Medium": {"qk_norm": True, "dual": (0, 1)}}
RANGES = [[(0, 0)], [(1, 2)], [(2, 4)], [(3, 5)], [(0, 5)], [(0, 1), (3, 4)], [(1, 2), (3, 5)]]  # block 5 is the last


def random_network(**kind):
    torch.manual_seed(0)
    network = MMDiT(depth=6, width=128, heads=2, context_dim=24, pooled_dim=12, pos_max=8, **kind)
    torch.nn.init.normal_(network.pos_embed)
    return network.requires_grad_(False)


def random_inputs(n=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, 16, 8, 8, generator=generator), torch.rand(n, generator=generator),
            torch.randn(n, 5, 24, generator=generator), torch.randn(n, 12, generator=generator))


# ------------------------------------------------------------------------------------------------ the forward pass

@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranges", RANGES, ids=str)
def test_a_cached_pass_on_the_same_input_with_the_identity_compensator_is_the_full_pass(kind, ranges):
    network, inputs = random_network(**KINDS[kind]), random_inputs()
    plain = network(*inputs)
    full, residuals = network(*inputs, ranges)
    again = network(*inputs, ranges, cache.new_cache(ranges, 128).correct(residuals))
    assert torch.equal(full, plain)
    assert torch.allclose(again, plain, atol=1e-5 * plain.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("ranges", RANGES, ids=str)
def test_residuals_are_what_the_range_adds_to_both_streams(ranges):
    network, inputs, seen = random_network(), random_inputs(), {}
    for i, block in enumerate(network.joint_blocks):
        block.register_forward_hook(lambda _, before, after, i=i: seen.update({i: (before[:2], after)}))
    _, residuals = network(*inputs, ranges)
    assert len(residuals) == len(ranges)
    for (first, last), pair in zip(ranges, residuals):
        for stream in (0, 1):
            assert torch.equal(pair[stream], seen[last][1][stream] - seen[first][0][stream])


@torch.no_grad()
@pytest.mark.parametrize("ranges", RANGES, ids=str)
def test_cached_blocks_do_not_run(ranges):
    network, inputs, ran = random_network(), random_inputs(), []
    _, residuals = network(*inputs, ranges)
    for i, block in enumerate(network.joint_blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    network(*inputs, ranges, residuals)
    assert ran == [i for i in range(6) if not any(first <= i <= last for first, last in ranges)]


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

    def model(x, sigma, context, pooled, ranges, residuals=None):
        calls.append(residuals)
        return x if residuals is not None else (x, [(torch.full((len(x), 1, 4), 1.0), torch.full((len(x), 1, 4), 2.0))])

    def double(image, text):
        return 2 * image, 2 * text

    cond = (torch.zeros(3, 1, 1), torch.zeros(3, 1))
    flow.sample(model, torch.ones(3, 1, 2, 2), flow.student_sigmas(4, 3.0), cond, cond, guidance,
                cache=cache.Cache([(1, 2)], [double]))
    assert calls[0] is None and len(calls) == 4
    for [(image, text)] in calls[1:]:
        assert len(image) == (3 if guidance == 1 else 6) and (image == 2).all() and (text == 4).all()


def test_a_student_that_carries_a_cache_needs_no_flag(tmp_path):
    pipeline = sample.load_pipeline(sample.TINY)
    pipeline.cache = cache.new_cache([(1, 4)], 128)
    torch.nn.init.normal_(pipeline.cache.compensators[0].image.fc2.weight, std=0.1)
    sample.save_pipeline(pipeline, tmp_path)
    loaded = sample.load_pipeline(tmp_path)
    assert loaded.cache.ranges == [(1, 4)]
    one, other = (sample.generate(p, ["a circle"], [0], steps=2, guidance=1) for p in (pipeline, loaded))
    loaded.cache.compensators = None
    plain = sample.generate(loaded, ["a circle"], [0], steps=2, guidance=1)
    loaded.cache = None
    full = sample.generate(loaded, ["a circle"], [0], steps=2, guidance=1)
    assert torch.allclose(one, other, atol=1e-4)
    assert (other - plain).abs().mean() > 1e-3 and (plain - full).abs().mean() > 1e-3


def test_the_cache_flag_re_uses_plainly_and_none_turns_a_students_cache_off(tmp_path, monkeypatch):
    pipeline = sample.load_pipeline(sample.TINY)
    pipeline.cache = cache.new_cache([(1, 4)], 128)
    sample.save_pipeline(pipeline, tmp_path / "student")
    used = []
    generate = sample.generate
    monkeypatch.setattr(sample, "generate", lambda p, *a, **k: used.append(p.cache) or generate(p, *a, **k))
    for flags in ([], ["--cache", "2-3"], ["--cache", "none"]):
        monkeypatch.setattr("sys.argv", ["sample.py", "--model", str(tmp_path / "student"), "--prompt", "a circle",
                                         "--steps", "2", "--out", str(tmp_path / "a.png"), *flags])
        sample.main()
    assert used[0].ranges == [(1, 4)] and used[0].compensators is not None
    assert used[1] == cache.Cache([(2, 3)]) and used[2] is None


# ------------------------------------------------------------------------------------------------------------ costs

@pytest.mark.parametrize("arguments, expected", [
    ((24, [(2, 9)], 2), 1.67), ((24, [(2, 7)], 2), 1.75), ((38, [(3, 12)], 2), 1.74), ((24, [], 2), 2.0),
    ((24, [(0, 3), (8, 11)], 4), 3.0), ((24, [], 28, True), 56), ((12, [(0, 11)], 2), 1.0)])
def test_effective_nfe_counts_the_blocks_that_run(arguments, expected):
    assert cache.effective_nfe(*arguments) == pytest.approx(expected, abs=5e-3)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranges", [[], [(1, 2)], [(0, 1), (3, 5)]], ids=str)
def test_flops_are_those_that_torch_counts(kind, ranges):
    network, cond = random_network(**KINDS[kind]), random_inputs(1)[2:]
    used = cache.new_cache(ranges, 128) if ranges else None
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it does not know the CPU's kernel
        flow.sample(network, torch.randn(1, 16, 8, 6), flow.student_sigmas(3, 3.0), cond, cache=used)
    assert cache.sampling_flops(network, 8, 6, 5, steps=3, cache=used) == counter.get_total_flops()


@pytest.mark.parametrize("kind, depth, width, extra, terra", [
    ("SD3-Medium", 24, 1536, {}, 8.9), ("SD3.5-Large", 38, 2432, {"qk_norm": True}, 31.1)])
def test_flops_at_official_size(kind, depth, width, extra, terra):
    """Nothing is computed: the networks have no memory. The compensator adds about 0.01 evaluations to the block count."""
    with torch.device("meta"):
        network = MMDiT(depth, width, width // 64, context_dim=4096, pooled_dim=2048, pos_max=192, **extra)
        used = cache.new_cache([(2, 9)] if depth == 24 else [(3, 12)], width, "meta")
    one = cache.forward_flops(network, 128, 128, 333)
    assert one / 1e12 == pytest.approx(terra, abs=0.06)
    nfe = cache.effective_nfe(depth, used.ranges, 2)
    assert nfe < cache.sampling_flops(network, 128, 128, 333, 2, used) / one < nfe + 0.02


@torch.no_grad()
def test_a_cached_step_saves_time(request):
    """In time of the one thread that works, since other processes may run: by count it is 0.83."""
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(1)
    network = sample.load_pipeline(sample.TINY).mmdit
    noise, cond = torch.randn(32, 16, 8, 8), (torch.randn(32, 27, 128), torch.randn(32, 128))
    times = {None: [], "cached": []}
    for _ in range(4):
        for name, used in ((None, None), ("cached", cache.new_cache([(2, 5)], 128))):
            start = time.thread_time()
            flow.sample(network, noise, flow.student_sigmas(2, 3.0), cond, cache=used)
            times[name].append(time.thread_time() - start)
    assert min(times["cached"]) < 0.97 * min(times[None])


# ------------------------------------------------------------------------------------------------------------ ranges

@pytest.mark.parametrize("text, ranges", [("4-7", [(4, 7)]), ("3-3", [(3, 3)]), ("0-1,4-7", [(0, 1), (4, 7)]), ("none", [])])
def test_ranges_are_read(text, ranges):
    assert cache.parse_ranges(text) == ranges


@pytest.mark.parametrize("text", ["", "4", "4-", "-4", "a-b", "4-7,", "4-7 8-9", "4:7", "4-7-9"])
def test_what_is_no_range_is_refused(text):
    with pytest.raises(ValueError):
        cache.parse_ranges(text)


@pytest.mark.parametrize("ranges, steps", [([(7, 4)], 2), ([(0, 12)], 2), ([(12, 12)], 2), ([(4, 7), (0, 1)], 2),
                                           ([(0, 4), (4, 7)], 2), ([(0, 3)], 1)])
def test_ranges_that_do_not_fit_are_refused(ranges, steps):
    with pytest.raises(weights.UserError):
        cache.check_ranges(ranges, 12, steps)
    cache.check_ranges([(0, 3), (4, 11)], 12, 2)


@pytest.mark.parametrize("damage", ["another width", "a range outside", "no range", "not JSON", "a tensor too few"])
def test_a_compensator_that_does_not_fit_the_student_is_refused(damage, tmp_path):
    student = random_network()
    cache.save_cache(cache.new_cache([(1, 2)], 128 if damage != "another width" else 64), tmp_path)
    file = cache.cache_file(tmp_path)
    tensors, header = load_file(file), {"ranges": "[[1, 2]]"}
    assert cache.load_cache(tmp_path, student).ranges == [(1, 2)] if damage != "another width" else True
    if damage == "a tensor too few":
        tensors.pop("0.text.fc1.bias")
    header = {"a range outside": {"ranges": "[[1, 9]]"}, "no range": {}, "not JSON": {"ranges": "1-2"}}.get(damage, header)
    save_file(tensors, file, header)
    with pytest.raises(weights.UserError, match="compensator") as error:
        cache.load_cache(tmp_path, student)
    assert "\n" not in str(error.value)
    shutil.rmtree(file.parent)
    assert cache.load_cache(tmp_path, student) is None


def test_the_range_is_in_the_header_of_the_compensators_file(tmp_path):
    cache.save_cache(cache.new_cache([(0, 1), (3, 4)], 8), tmp_path)
    with weights.open_safetensors(cache.cache_file(tmp_path)) as file:
        assert json.loads(file.metadata()["ranges"]) == [[0, 1], [3, 4]]
