"""Stage I: each formula of Sec. 3.2 and 3.3 against numbers worked out another way."""

import statistics

import numpy as np
import pytest
import torch

import dmd
import flow


# ------------------------------------------------------------------------------------------------ levels of noise

@pytest.mark.parametrize("name, anchors", [
    ("a", [(0, 1), (250, 0.8), (400, 0.2), (1000, 0.001)]),
    ("b", [(0, 1), (100, 1), (250, 1), (500, 0.3), (750, 0.05), (1000, 0.001)]),
    ("c", [(0, 0.6), (300, 1.3), (500, 0.05), (1000, 0.001)]),
    ("d", [(0, 0.01), (300, 0.1), (500, 0.95), (1000, 1)]),
    ("uniform", [(0, 1), (1000, 1)])])
def test_density_is_the_smoothed_interpolation_of_the_papers_anchors(name, anchors):
    log = np.log(np.interp(np.arange(1001), *zip(*anchors)))
    kernel = np.exp(-0.5 * (np.arange(-400, 401) / 100)**2)
    expected = np.exp(np.convolve(np.pad(log, 400, mode="edge"), kernel / kernel.sum(), mode="valid"))
    density = dmd.importance_density(name)
    assert density.shape == (1001,) and density.sum().item() == pytest.approx(1)
    assert np.allclose(density.numpy(), expected / expected.sum(), rtol=1e-4)


@pytest.mark.parametrize("n", [1, 4])
def test_windows_of_the_steps_share_out_all_levels_above_zero(n):
    windows = dmd.step_windows(n, 3.0)
    assert torch.cat([torch.arange(a, b) for a, b in zip(windows.first, windows.stop)]).tolist() == list(range(1000))
    assert torch.equal(windows.nodes, flow.student_sigmas(n, 3.0)) and torch.equal(windows.end, windows.nodes[1:])
    assert torch.equal(windows.grid[windows.first], windows.nodes[:-1])
    assert (windows.grid[windows.stop - 1] > windows.end).all()  # σ lies above the level that is renoised from


def test_whole_windows_compare_every_step_at_all_levels_of_its_clean_estimate():
    windows = dmd.step_windows(2, 3.0, whole=True)
    assert (windows.first.tolist(), windows.stop.tolist(), windows.end.tolist()) == ([0, 0], [1000, 1000], [0, 0])
    assert windows.nodes.tolist() == [1, 0.75, 0]


def test_steps_are_drawn_evenly_and_levels_from_the_density_inside_their_steps_window():
    windows, generator = dmd.step_windows(4, 3.0), torch.Generator().manual_seed(0)
    uniform, c = (dmd.draw_levels(windows, dmd.importance_density(name), (8000, 1, 1, 1), generator)
                  for name in ("uniform", "c"))
    assert (uniform.k == c.k).float().mean().item() == pytest.approx(1 / 4, abs=0.03)  # each loss has its own
    for levels in (uniform, c):
        assert torch.bincount(levels.k).tolist() == pytest.approx([2000] * 4, abs=200)
        assert torch.equal(levels.start, windows.nodes[levels.k]) and torch.equal(levels.end, windows.end[levels.k])
        assert (levels.sigma <= levels.start).all() and (levels.sigma > levels.end).all()
        assert levels.noise.shape == (8000, 1, 1, 1) and levels.noise.std().item() == pytest.approx(1, abs=0.05)
    upper = [(levels.sigma[levels.k == 2] > windows.grid[625]).float().mean().item() for levels in (uniform, c)]
    density = dmd.importance_density("c")
    assert upper == pytest.approx([0.5, (density[500:625].sum() / density[500:750].sum()).item()], abs=0.04)


@pytest.mark.parametrize("u, expected", [(0.0, [0, 500, 999]), (1.0, [499, 999, 999])])
def test_a_level_never_leaves_its_window(u, expected):
    start, stop = torch.tensor([0, 500, 999]), torch.tensor([500, 1000, 1000])
    assert dmd.draw_index(dmd.importance_density("c"), start, stop, torch.full((3,), u)).tolist() == expected


# --------------------------------------------------------------------------------------------------- guided teacher

UNCOND = torch.full((1, 3, 5), 0.5), torch.zeros(1, 2)


def test_guidance_is_on_up_to_alpha_and_off_above_sample_by_sample():
    def teacher(x, sigma, context, pooled):
        assert len(x) == len(sigma) == len(context) == len(pooled)
        return context[:, :1, :1, None].expand_as(x)

    sigma, cond = torch.tensor([1.0, 0.1, 0.961, 0.96]), (torch.ones(4, 3, 5), torch.zeros(4, 2))
    v = dmd.gated_velocity(teacher, torch.zeros(4, 1, 2, 2), sigma, cond, UNCOND, 7.0, alpha=0.96)
    assert v[:, 0, 1, 1].tolist() == [1.0, 0.5 + 7 * 0.5, 1.0, 0.5 + 7 * 0.5]


# --------------------------------------------------------------------------------------------------- the two losses

def affine(*numbers):
    """A network of three numbers, which sees sample, level and text -> the network, its numbers."""
    numbers = torch.tensor(numbers, requires_grad=True)

    def network(x, sigma, context, pooled):
        return numbers[0] * x + numbers[1] * sigma.reshape(-1, 1, 1, 1) + numbers[2] * context[:, :1, :1, None]

    return network, numbers


def test_rollout_passes_through_the_states_of_sampling_and_keeps_no_gradient():
    noise, cond, nodes = torch.randn(3, 1, 2, 2), (torch.randn(3, 3, 5), torch.zeros(3, 2)), flow.student_sigmas(4, 3.0)
    student, _ = affine(0.3, -0.2, 0.5)
    x, v = dmd.rollout(student, noise, nodes, cond)
    assert x.shape == (5, 3, 1, 2, 2) and v.shape == (4, 3, 1, 2, 2) and not x.requires_grad and not v.requires_grad
    for k in range(5):
        assert torch.allclose(x[k], flow.sample(student, noise, nodes[:k + 1], cond), atol=1e-6)
    for k in range(4):
        assert torch.allclose(v[k], (x[k + 1] - x[k]) / (nodes[k + 1] - nodes[k]), atol=1e-5)


def by_hand(student, fake, teacher, x, levels, i, cond, w, alpha):
    """Sec. 3.2 and Eq. (4) for sample i alone, x its states as constants -> the two losses."""
    k, start, end, s, e = levels.k[i], levels.start[i], levels.end[i], levels.sigma[i], levels.noise[i:i + 1]
    words, x = [part[i:i + 1] for part in cond], x[k, i:i + 1]
    v = student(x, start[None], *words)
    y = x + (end - start) * v
    with torch.no_grad():
        x0, a = x - start * v, (1 - s) / (1 - end)
        z = a * y + (s**2 - a**2 * end**2).sqrt() * e
        v_c, v_0 = teacher(z, s[None], *words), teacher(z, s[None], *UNCOND)
        real = z + (end - s) * (v_0 + w * (v_c - v_0) if s <= alpha else v_c)
        faked = z + (end - s) * fake(z, s[None], *words)
    return ((fake(z, s[None], *words) - (z - x0) / s)**2).mean(), dmd.matching_loss(y, real, faked)


@pytest.mark.parametrize("steps, whole", [(4, False), (2, True)])
def test_both_losses_are_the_papers_sample_by_sample_and_each_teaches_its_own_network_through_one_step(steps, whole):
    generator = torch.Generator().manual_seed(steps)
    (student, g), (fake, f), (teacher, t) = affine(0.3, -0.2, 0.5), affine(0.1, 0.4, 0.3), affine(-0.3, 0.2, 0.1)
    windows, noise = dmd.step_windows(steps, 3.0, whole), torch.randn(16, 2, 4, 4, generator=generator)
    cond = torch.randn(16, 3, 5, generator=generator), torch.zeros(16, 2)
    levels = dmd.draw_levels(windows, dmd.importance_density("c"), noise.shape, generator)
    states, velocities = dmd.rollout(student, noise, windows.nodes, cond)
    of_fake = dmd.fake_loss(fake, states, velocities, levels, cond)
    of_student = dmd.student_loss(student, fake, teacher, states, levels, cond, UNCOND, 7.0, 0.9)
    singly = [by_hand(student, fake, teacher, states, levels, i, cond, 7.0, 0.9) for i in range(16)]
    for loss, alone, own in zip((of_fake, of_student), zip(*singly), (f, g)):
        expected = torch.stack(alone).mean()
        assert torch.allclose(loss, expected, rtol=1e-4)
        gradients = torch.autograd.grad(loss, (g, f, t), allow_unused=True)
        (learned,) = (gradient for gradient in gradients if gradient is not None)
        (by_formula,) = torch.autograd.grad(expected, own)
        assert torch.allclose(learned, by_formula, rtol=1e-3, atol=1e-5)


def test_with_a_cache_later_steps_are_compared_as_the_cached_student_makes_them_and_first_steps_as_before():
    """Both networks are called on all samples; the loss must take each sample's step from the right one."""
    (student, g), (cached, c), (fake, _), (teacher, _) = (affine(0.3, -0.2, 0.5), affine(0.2, 0.1, -0.4), affine(0.1, 0.4, 0.3),
                                                         affine(-0.3, 0.2, 0.1))
    windows, noise, cond = dmd.step_windows(2, 3.0), torch.randn(16, 2, 4, 4), (torch.randn(16, 3, 5), torch.zeros(16, 2))
    levels = dmd.draw_levels(windows, dmd.importance_density("c"), noise.shape, torch.Generator().manual_seed(0))
    states, _ = dmd.rollout(student, noise, windows.nodes, cond)
    loss = dmd.student_loss(student, fake, teacher, states, levels, cond, UNCOND, 7.0, 0.9, cached)
    singly = [by_hand(cached if levels.k[i] else student, fake, teacher, states, levels, i, cond, 7.0, 0.9)[1] for i in range(16)]
    expected = torch.stack(singly).mean()
    assert torch.allclose(loss, expected, rtol=1e-4)
    for found, by_formula in zip(torch.autograd.grad(loss, (g, c)), torch.autograd.grad(expected, (g, c)), strict=True):
        assert torch.allclose(found, by_formula, rtol=1e-3, atol=1e-5)


def test_matching_loss_is_the_pseudo_huber_distance_of_real_and_fake():
    """h = 1e-3 sqrt(4) / 128; y - y* = fake - real = (0.3, -h, 0, 0); weight = mean |y - real| = 1."""
    y, h = torch.tensor([[[[1.0, 2.0], [0.0, 0.0]]]]), 1e-3 * 2 / 128
    fake = y - 1 + torch.tensor([[[[0.3, -h], [0.0, 0.0]]]])
    assert dmd.matching_loss(y, y - 1, fake).item() == pytest.approx((0.3 - h + (2**0.5 - 1) * h) / 4, rel=1e-6)
    small = torch.tensor([[[[h]]]])  # one number: h is half as large
    loss = dmd.matching_loss(torch.zeros(1, 1, 1, 1), -torch.ones(1, 1, 1, 1), small - 1)
    assert loss.item() == pytest.approx((5**0.5 - 1) * h / 2, rel=1e-2)
    assert dmd.matching_loss(y, y, y).item() == 0  # a weight of zero


def test_the_students_gradient_is_the_sign_of_fake_minus_real_over_the_samples_own_distance():
    y = torch.randn(3, 2, 4, 4).requires_grad_()
    scale = torch.tensor([[1.0, 9.0], [5.0, 0.5], [2.0, 2.0]])[:, :, None, None]  # unlike in samples and in channels
    real, difference = y.detach() + scale * torch.randn(3, 2, 4, 4), torch.rand(3, 2, 4, 4) - 0.5
    difference += 0.1 * difference.sign()
    dmd.matching_loss(y, real, real + difference).backward()
    weight = (y.detach() - real).abs().mean(dim=(1, 2, 3), keepdim=True)
    assert torch.allclose(y.grad, difference.sign() / (3 * 32 * weight), rtol=1e-3)


# ---------------------------------------------------------------------------------------------- a Gaussian example

def gaussian_velocity(x, sigma, mean):
    """E[ε - x0 | x_σ = x] for data N(mean, 1), the network that rectified flow would learn: a closed form."""
    s = flow.per_sample(sigma, x)
    return (2 * s - 1) / ((1 - s)**2 + s**2) * (x - (1 - s) * mean) - mean


def test_stage_1_moves_a_students_mean_to_the_teachers():
    """The teacher's data are N(2, 1); student and fake score are the velocities of N(g, 1) and N(f, 1), and learn."""
    g, f, means = torch.zeros((), requires_grad=True), torch.zeros((), requires_grad=True), []
    student, fake, teacher = (lambda x, s, *_, m=m: gaussian_velocity(x, s, m) for m in (g, f, 2.0))
    windows, density, generator = dmd.step_windows(2, 3.0), dmd.importance_density("uniform"), torch.Generator()
    cond, uncond, optimizers = [torch.zeros(64, 1)] * 2, [torch.zeros(1, 1)] * 2, \
        [torch.optim.SGD([f], lr=0.3), torch.optim.SGD([g], lr=0.01)]
    for _ in range(400):
        shape = 64, 1, 8, 8
        states, velocities = dmd.rollout(student, torch.randn(shape, generator=generator), windows.nodes, cond)
        for network, optimizer in zip((fake, student), optimizers):
            levels = dmd.draw_levels(windows, density, shape, generator)
            loss = dmd.fake_loss(fake, states, velocities, levels, cond) if network is fake else \
                dmd.student_loss(student, fake, teacher, states, levels, cond, uncond, 1.0, 1.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        means.append(g.item())
    assert means[0] < 0.2 and statistics.median(means[-100:]) == pytest.approx(2, abs=0.15)
