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
    windows = dmd.step_windows(n, 3.0)
    assert torch.cat([torch.arange(a, b) for a, b in zip(windows.start, windows.stop)]).tolist() == list(range(1000))
    assert torch.equal(windows.nodes, flow.student_sigmas(n, 3.0)) and torch.equal(windows.end, windows.nodes[1:])
    # σ stays above the level that is renoised from
    assert all(windows.grid[stop - 1] > end for stop, end in zip(windows.stop, windows.end))


def test_whole_windows_compare_every_step_at_all_levels_of_its_clean_estimate():
    windows = dmd.step_windows(2, 3.0, whole=True)
    assert (windows.start.tolist(), windows.stop.tolist(), windows.end.tolist()) == ([0, 0], [1000, 1000], [0, 0])
    assert windows.nodes.tolist() == [1, 0.75, 0]


def test_the_two_losses_draw_their_steps_separately_and_the_rollout_covers_both():
    batch = dmd.draw_batch(4000, (1, 1, 1), dmd.step_windows(4, 3.0), dmd.importance_density("c"),
                           torch.Generator().manual_seed(0))
    (fake, student), windows = (batch.fake, batch.student), dmd.step_windows(4, 3.0)
    assert torch.equal(batch.steps, torch.maximum(fake.k + 1, student.k))
    assert torch.equal(batch.steps, batch.steps.sort().values)
    assert (fake.k == student.k).float().mean().item() == pytest.approx(1 / 4, abs=0.03)
    for levels in (fake, student):
        assert torch.bincount(levels.k).tolist() == pytest.approx([1000] * 4, abs=120)
        assert (levels.sigma <= windows.nodes[levels.k]).all() and (levels.sigma > windows.end[levels.k]).all()
    first = [(levels.sigma[levels.k == 2] - 0.625).sign().mean().item() for levels in (fake, student)]
    assert abs(first[0]) < 0.3 < first[1]  # window (0.5, 0.75]: uniform in the grid, or by c, nearer to its start


def test_an_iteration_at_the_released_settings_costs_12_4_passes_a_sample():
    """Rollout, fake score and student with recomputation (4 each), teacher and its guided share, fake score once
    more."""
    batch = dmd.draw_batch(20_000, (1, 1, 1), dmd.step_windows(2, 3.0), dmd.importance_density("c"),
                           torch.Generator().manual_seed(0))
    guided = (batch.student.sigma <= 0.96).float().mean().item()
    assert guided == pytest.approx(0.88, abs=0.01)
    assert batch.steps.float().mean().item() + 4 + 4 + 1 + guided + 1 == pytest.approx(12.4, abs=0.05)


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
    cond = torch.ones(4, 3, 5), torch.zeros(4, 2)
    velocity = dmd.gated_velocity(constant_model(calls), x, sigma, cond, UNCOND, guidance=7.0, alpha=0.96)
    assert velocity[:, 0, 0, 0].tolist() == [1.0, 1.0, 0.5 + 7 * 0.5, 0.5 + 7 * 0.5]  # σ = α is guided
    assert calls == [4 + 2]  # one call, whoever is guided: processes that share the network must call it alike


@pytest.mark.parametrize("guidance, alpha, passes", [(7.0, 1.0, 8), (7.0, 0.05, 4), (1.0, 1.0, 4)])
def test_no_unconditional_pass_where_none_is_needed(guidance, alpha, passes):
    calls, cond, sigma = [], (torch.ones(4, 3, 5), torch.zeros(4, 2)), torch.linspace(0.1, 1, 4)
    velocity = dmd.gated_velocity(constant_model(calls), torch.zeros(4, 1, 2, 2), sigma, cond, UNCOND, guidance, alpha)
    assert calls == [passes] and (velocity == 1).all() == (passes == 4)


def counting_gaussian(calls):
    def model(x, s, context, pooled):
        calls.append(len(x))
        return gaussian_velocity(x, s, 1.0, 0.5)
    return model


def test_rollout_stops_each_sample_at_its_step_on_the_way_that_sampling_goes():
    noise, nodes = torch.randn(6, 1, 2, 2), flow.student_sigmas(4, 3.0)
    steps, calls = torch.tensor([1, 1, 2, 0, 3, 4]), []
    cond = torch.zeros(6, 1, 1), torch.zeros(6, 1)
    x, v = dmd.rollout(counting_gaussian(calls), noise, nodes, steps, cond)
    assert calls == [5, 3, 2, 1] and len(x) == 5 and len(v) == 4  # step k runs for the samples with more than k steps
    for i, last in enumerate(steps.tolist()):
        for k in range(last + 1):
            expected = flow.sample(counting_gaussian([]), noise[i:i + 1], nodes[:k + 1], cond)
            assert torch.allclose(x[k, i:i + 1], expected, atol=1e-6)
        for k in range(last):
            assert torch.allclose(v[k, i], (x[k + 1, i] - x[k, i]) / (nodes[k + 1] - nodes[k]), atol=1e-5)


# ------------------------------------------------------------------------------------------------- one iteration

class Affine(torch.nn.Module):
    """A network of three numbers, which sees sample, level and text."""

    def __init__(self, *numbers):
        super().__init__()
        self.numbers, self.calls = torch.nn.Parameter(torch.tensor(numbers)), 0

    def forward(self, x, sigma, context, pooled):
        self.calls += len(x)
        a, b, c = self.numbers
        return a * x + b * sigma.reshape(-1, 1, 1, 1) + c * context[:, :1, :1, None]


def by_hand(student, fake, teacher, batch, windows, cond, uncond, w, alpha):
    """Sec. 3.2 and Eq. (4) for each sample alone, on all of the student's steps: the two losses, sample by sample."""
    for i in range(len(batch.noise)):
        nodes, end, words = windows.nodes, windows.end, [part[i:i + 1] for part in cond]
        x, v = [batch.noise[i:i + 1]], []
        with torch.no_grad():
            for k in range(len(nodes) - 1):
                v.append(student(x[k], nodes[k:k + 1], *words))
                x.append(x[k] + (nodes[k + 1] - nodes[k]) * v[k])
        k, s, e = batch.fake.k[i], batch.fake.sigma[i], batch.fake.noise[i:i + 1]
        x0, y = x[k] - nodes[k] * v[k], x[k] + (end[k] - nodes[k]) * v[k]
        z = flow.renoise(y, end[k], s, e)
        fake_loss = ((fake(z, s[None], *words) - (z - x0) / s) ** 2).mean()
        k, s, e = batch.student.k[i], batch.student.sigma[i], batch.student.noise[i:i + 1]
        y = x[k] + (end[k] - nodes[k]) * student(x[k], nodes[k:k + 1], *words)
        with torch.no_grad():
            z = flow.renoise(y, end[k], s, e)
            v_c, v_0 = teacher(z, s[None], *words), teacher(z, s[None], *uncond)
            real = z + (end[k] - s) * (v_0 + w * (v_c - v_0) if s <= alpha else v_c)
            faked = z + (end[k] - s) * fake(z, s[None], *words)
        yield fake_loss, dmd.student_loss(y, real, faked)


@pytest.mark.parametrize("steps, whole", [(1, False), (2, False), (4, False), (2, True)])
def test_an_iteration_is_the_formulas_sample_by_sample_and_the_student_meets_the_fake_score_that_moved(steps, whole):
    generator = torch.Generator().manual_seed(steps)
    student, fake, teacher = Affine(0.3, -0.2, 0.5), Affine(0.1, 0.4, 0.3), Affine(-0.3, 0.2, 0.1)
    windows = dmd.step_windows(steps, 3.0, whole)
    batch = dmd.draw_batch(16, (2, 4, 4), windows, dmd.importance_density("c"), generator)
    cond = torch.randn(16, 3, 5, generator=generator), torch.zeros(16, 2)
    inputs = batch, windows, cond, UNCOND, 7.0, 0.9
    iteration = dmd.iteration(student, fake, teacher, *inputs)

    fake_loss = next(iteration)
    expected = torch.stack([loss for loss, _ in by_hand(student, fake, teacher, *inputs)]).mean()
    assert torch.allclose(fake_loss, expected, rtol=1e-4)
    gradient, = torch.autograd.grad(fake_loss, fake.numbers)
    assert torch.allclose(gradient, torch.autograd.grad(expected, fake.numbers)[0], rtol=1e-3, atol=1e-5)
    fake.numbers.data -= 0.1 * gradient  # the fake score moves between the two losses

    before = {network: network.calls for network in (student, fake, teacher)}
    student_loss = next(iteration)
    calls = [network.calls - before[network] for network in (student, fake, teacher)]
    assert calls == [16, 16, 16 + (batch.student.sigma <= 0.9).sum().item()]
    expected = torch.stack([loss for _, loss in by_hand(student, fake, teacher, *inputs)]).mean()
    assert torch.allclose(student_loss, expected, rtol=1e-4)
    (gradient,), (by_formula,) = (torch.autograd.grad(loss, student.numbers) for loss in (student_loss, expected))
    assert torch.allclose(gradient, by_formula, rtol=1e-3, atol=1e-5)
    assert next(iteration, None) is None and teacher.numbers.grad is None


def test_no_sample_runs_further_than_its_losses_need():
    student, windows = Affine(0.3, -0.2, 0.5), dmd.step_windows(2, 3.0)
    batch = dmd.draw_batch(64, (1, 2, 2), windows, dmd.importance_density("c"), torch.Generator().manual_seed(0))
    iteration = dmd.iteration(student, Affine(0.1, 0.4, 0.3), Affine(-0.3, 0.2, 0.1), batch, windows,
                              (torch.randn(64, 3, 5), torch.zeros(64, 2)), UNCOND, 7.0, 0.9)
    next(iteration)
    assert student.calls == batch.steps.sum() < 2 * 64


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
    # Huber: its sign, over the 4 entries
    assert y.grad.flatten().tolist() == pytest.approx([0.25, -0.25, 0, 0], abs=1e-4)


def test_student_loss_weighs_each_sample_by_itself_and_survives_a_zero_weight():
    y = torch.randn(3, 2, 4, 4)
    real, fake = y + torch.randn_like(y), y + torch.randn_like(y)
    alone = torch.stack([dmd.student_loss(y[i:i + 1], real[i:i + 1], fake[i:i + 1]) for i in range(3)])
    assert dmd.student_loss(y, real, fake).item() == pytest.approx(alone.mean().item(), rel=1e-5)
    scaled = dmd.student_loss(y, y + 10 * (real - y), y + 10 * (fake - y))
    # noisy levels weigh no more
    assert scaled.item() == pytest.approx(dmd.student_loss(y, real, fake).item(), rel=1e-2)
    assert dmd.student_loss(y, y, y).item() == 0


@pytest.mark.parametrize("steps", [1, 2])
def test_distribution_matching_moves_a_students_mean_to_the_teachers(steps):
    """Data N(2, 1) for the teacher; the student's velocity is that of N(m, 1), and the fake score knows it exactly."""
    def gaussian(mean):
        return lambda x, s, c, p: gaussian_velocity(x, s, mean, 1.0)

    m, means = torch.tensor(0.0, requires_grad=True), []
    generator, cond, uncond = torch.Generator().manual_seed(0), (torch.zeros(64, 1, 1), torch.zeros(64, 1)), \
        (torch.zeros(1, 1, 1), torch.zeros(1, 1))
    windows, density = dmd.step_windows(steps, 3.0), dmd.importance_density("uniform")
    optimizer = torch.optim.SGD([m], lr=0.01)
    for _ in range(400):
        batch = dmd.draw_batch(64, (1, 8, 8), windows, density, generator)
        _, loss = dmd.iteration(gaussian(m), gaussian(m.detach()), gaussian(2.0), batch, windows, cond, uncond,
                                1.0, 1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        means.append(m.item())
    # the median, since a sample near σ = 0 may give a large step; of twelve seeds none is further off than 0.02
    assert means[0] < 0.2 and statistics.median(means[-100:]) == pytest.approx(2.0, abs=0.05)
