"""Stage I: each formula of Sec. 3.2 and 3.3 against numbers worked out another way."""

import statistics

import numpy as np
import pytest
import torch

import dmd
import flow
from test_flow import gaussian_velocity


def uniforms(n, seed=0):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------------------------- levels

@pytest.mark.parametrize("name, anchors", [
    ("a", [(0, 1), (250, 0.8), (400, 0.2), (1000, 0.001)]),
    ("c", [(0, 0.6), (300, 1.3), (500, 0.05), (1000, 0.001)]),
    ("uniform", [(0, 1), (1000, 1)])])
def test_density_is_the_smoothed_interpolation_of_its_anchors(name, anchors):
    """Against a plain numpy convolution with edge padding."""
    log = np.log(np.interp(np.arange(1001), *zip(*anchors)))
    kernel = np.exp(-0.5 * (np.arange(-400, 401) / 100) ** 2)
    expected = np.exp(np.convolve(np.pad(log, 400, mode="edge"), kernel / kernel.sum(), mode="valid"))
    density = dmd.importance_density(name)
    assert density.shape == (1001,) and density.sum().item() == pytest.approx(1)
    assert np.allclose(density.numpy(), expected / expected.sum(), rtol=1e-4)


def test_density_c_prefers_high_noise_and_d_low():
    c, d = dmd.importance_density("c"), dmd.importance_density("d")
    assert c[:500].sum() > 0.9 and d[500:].sum() > 0.8  # index 0 is pure noise: the density goes by position, not by σ


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_windows_of_the_steps_share_out_all_levels_above_zero(n):
    start, stop, end = dmd.step_windows(n, 3.0)
    assert torch.cat([torch.arange(a, b) for a, b in zip(start, stop)]).tolist() == list(range(1000))
    grid = flow.teacher_grid(3.0)
    assert torch.equal(grid[end], flow.student_sigmas(n, 3.0)[1:])
    assert all(grid[b - 1] > grid[e] for b, e in zip(stop, end))  # σ stays above the level that is renoised from


def test_whole_windows_compare_every_step_at_all_levels_of_its_clean_estimate():
    start, stop, end = dmd.step_windows(2, 3.0, whole=True)
    assert start.tolist() == [0, 0] and stop.tolist() == [1000, 1000] and end.tolist() == [1000, 1000]


def test_levels_are_drawn_from_the_density_inside_their_window():
    density, n = dmd.importance_density("c"), 200_000
    index = dmd.draw_index(density, torch.full((n,), 500), torch.full((n,), 1000), uniforms(n))
    counts = torch.bincount(index, minlength=1001)[500:1000].reshape(5, 100).sum(1) / n
    expected = (density[500:1000] / density[500:1000].sum()).reshape(5, 100).sum(1)
    assert torch.allclose(counts.double(), expected, atol=0.005)


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
def test_the_ends_of_the_unit_interval_stay_inside_the_window(u):
    index = dmd.draw_index(dmd.importance_density("c"), torch.tensor([0, 500, 999]), torch.tensor([500, 1000, 1000]),
                           torch.full((3,), u))
    assert index.tolist() == ([0, 500, 999] if u == 0 else [499, 999, 999])


# ----------------------------------------------------------------------------------------------------------- scores

def constant_model(calls):
    """Velocity = the first context entry of each sample; the sizes of its batches are noted."""
    def model(x, sigma, context, pooled):
        calls.append(len(x))
        assert len(sigma) == len(context) == len(pooled) == len(x)
        return context[:, :1, :1, None].expand_as(x)
    return model


UNCOND = torch.full((1, 3, 5), 0.5), torch.zeros(1, 2)


def test_guidance_is_on_at_low_noise_only_and_costs_only_there():
    calls, x, sigma = [], torch.zeros(4, 1, 2, 2), torch.tensor([1.0, 0.961, 0.96, 0.1])
    cond, guided = (torch.ones(4, 3, 5), torch.zeros(4, 2)), dmd.guided_samples(sigma, alpha=0.96, guidance=7.0)
    velocity = dmd.gated_velocity(constant_model(calls), x, sigma, cond, UNCOND, 7.0, guided)
    assert velocity[:, 0, 0, 0].tolist() == [1.0, 1.0, 0.5 + 7 * 0.5, 0.5 + 7 * 0.5]  # σ = α is guided
    assert calls == [4 + 2]  # one call, whoever is guided: processes that share the network must call it alike


@pytest.mark.parametrize("guidance, alpha, passes", [(7.0, 1.0, 8), (7.0, 0.05, 4), (1.0, 1.0, 4)])
def test_no_unconditional_pass_where_none_is_needed(guidance, alpha, passes):
    calls, cond, sigma = [], (torch.ones(4, 3, 5), torch.zeros(4, 2)), torch.linspace(0.1, 1, 4)
    guided = dmd.guided_samples(sigma, alpha, guidance)
    velocity = dmd.gated_velocity(constant_model(calls), torch.zeros(4, 1, 2, 2), sigma, cond, UNCOND, guidance, guided)
    assert calls == [passes] and (velocity == 1).all() == (passes == 4)


def test_fake_target_at_the_last_step_is_noise_minus_sample():
    x, v, noise = (torch.randn(3, 2, 4, 4) for _ in range(3))
    sigma_k, sigma = torch.full((3,), 0.75), torch.tensor([0.2, 0.5, 0.74])
    z, target = dmd.fake_target(x, v, sigma_k, torch.zeros(3), sigma, noise)
    sample = x - 0.75 * v
    assert torch.allclose(target, noise - sample, atol=1e-4)
    assert torch.allclose(z, flow.add_noise(sample, noise, sigma), atol=1e-5)


def test_fake_target_leads_back_to_the_clean_estimate_of_an_earlier_step():
    x, v, noise = (torch.randn(3, 2, 4, 4) for _ in range(3))
    sigma = torch.tensor([0.76, 0.9, 1.0])
    z, target = dmd.fake_target(x, v, torch.ones(3), torch.full((3,), 0.75), sigma, noise)
    assert torch.allclose(flow.velocity_to_x0(z, target, sigma), x - v, atol=1e-4)


def counting_gaussian(calls):
    def model(x, s, context, pooled):
        calls.append(len(x))
        return gaussian_velocity(x, s, 1.0, 0.5)
    return model


def test_rollout_stops_each_sample_at_its_step_on_the_way_that_sampling_goes():
    noise, sigmas, k, calls = torch.randn(6, 1, 2, 2), flow.student_sigmas(4, 3.0), [0, 0, 1, 1, 2, 3], []
    cond = torch.zeros(6, 1, 1), torch.zeros(6, 1)
    states = dmd.rollout(counting_gaussian(calls), noise, sigmas, k, cond)
    assert calls == [4, 2, 1]  # step j runs for the samples with k > j
    for i in range(6):
        expected = flow.sample(counting_gaussian([]), noise[i:i + 1], sigmas[:k[i] + 1], cond)
        assert torch.allclose(states[i:i + 1], expected, atol=1e-6)


def test_rollout_makes_the_passes_that_other_processes_need_and_changes_nothing_by_it():
    noise, sigmas, k, calls = torch.randn(3, 1, 2, 2), flow.student_sigmas(2, 3.0), [0, 0, 0], []
    cond = torch.zeros(3, 1, 1), torch.zeros(3, 1)
    assert torch.equal(dmd.rollout(counting_gaussian(calls), noise, sigmas, k, cond, passes=1), noise) and calls == [1]
    assert torch.equal(dmd.rollout(counting_gaussian(calls), noise, sigmas, k, cond), noise) and calls == [1]


# ------------------------------------------------------------------------------------------------------------ loss

def test_student_loss_by_hand():
    """h = 1e-3 sqrt(4) / 128; y - y* = fake - real = (0.3, -0.4, 0, 0); weight = mean |y - real| = 1."""
    y = torch.tensor([[[[1.0, 2.0], [0.0, 0.0]]]], requires_grad=True)
    real = y.detach() - 1
    fake = real + torch.tensor([[[[0.3, -0.4], [0.0, 0.0]]]])
    h = 1e-3 * 2 / 128
    loss = dmd.student_loss(y, real, fake)
    loss.backward()
    huber = [(d * d + h * h) ** 0.5 - h for d in (0.3, 0.4)]
    assert loss.item() == pytest.approx(sum(huber) / 4, rel=1e-4)
    assert y.grad.flatten().tolist() == pytest.approx([0.25, -0.25, 0, 0], abs=1e-4)  # Huber: its sign, over the 4 entries


def test_student_loss_weighs_each_sample_by_itself_and_survives_a_zero_weight():
    y = torch.randn(3, 2, 4, 4)
    real, fake = y + torch.randn_like(y), y + torch.randn_like(y)
    alone = torch.stack([dmd.student_loss(y[i:i + 1], real[i:i + 1], fake[i:i + 1]) for i in range(3)])
    assert dmd.student_loss(y, real, fake).item() == pytest.approx(alone.mean().item(), rel=1e-5)
    scaled = dmd.student_loss(y, y + 10 * (real - y), y + 10 * (fake - y))
    assert scaled.item() == pytest.approx(dmd.student_loss(y, real, fake).item(), rel=1e-2)  # noisy levels weigh no more
    assert dmd.student_loss(y, y, y).item() == 0


def test_gradient_reaches_the_student_and_nothing_else():
    networks = [torch.nn.Conv2d(1, 1, 1) for _ in range(3)]
    student, teacher, fake = ((lambda x, s, c, p, net=net: net(x)) for net in networks)
    cond, s = (torch.zeros(2, 1, 1), torch.zeros(2, 1)), torch.tensor([0.9, 0.5])
    x, noise = torch.randn(2, 2, 1, 2, 2)
    velocity, uncond = student(x, torch.ones(2), *cond), [part[:1] for part in cond]
    dmd.student_objective(velocity, teacher, fake, x, torch.ones(2), torch.zeros(2), s, noise, cond, uncond, 2.0,
                          torch.arange(2)).backward()
    assert networks[0].weight.grad is not None and networks[1].weight.grad is None and networks[2].weight.grad is None


@pytest.mark.parametrize("steps", [1, 2])
def test_distribution_matching_moves_a_students_mean_to_the_teachers(steps):
    """Data N(2, 1) for the teacher; the student's velocity is that of N(m, 1), and the fake score knows it exactly."""
    def gaussian(mean):
        return lambda x, s, c, p: gaussian_velocity(x, s, mean, 1.0)

    m, means, nobody = torch.tensor(0.0, requires_grad=True), [], torch.zeros(0, dtype=torch.int64)
    generator, cond = torch.Generator().manual_seed(0), (torch.zeros(64, 1, 1), torch.zeros(64, 1))
    start, stop, end = dmd.step_windows(steps, 3.0)
    grid, density = flow.teacher_grid(3.0), dmd.importance_density("uniform")
    optimizer = torch.optim.SGD([m], lr=0.01)
    for _ in range(400):
        noise, again = torch.randn(2, 64, 1, 8, 8, generator=generator)
        now = gaussian(m.detach())
        k = torch.randint(steps, (64,), generator=generator).sort().values
        x = dmd.rollout(now, noise, flow.student_sigmas(steps, 3.0), k.tolist(), cond)
        sigma = grid[dmd.draw_index(density, start[k], stop[k], torch.rand(64, generator=generator))]
        loss = dmd.student_objective(gaussian(m)(x, grid[start[k]], *cond), gaussian(2.0), now, x, grid[start[k]], grid[end[k]],
                                     sigma, again, cond, [part[:1] for part in cond], guidance=1.0, guided=nobody)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        means.append(m.item())
    # the median, since a sample near σ = 0 may give a large step; of twelve seeds none is further off than 0.02
    assert means[0] < 0.2 and statistics.median(means[-100:]) == pytest.approx(2.0, abs=0.05)
