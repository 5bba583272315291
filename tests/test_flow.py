"""Section 3.1, rectified flow: each formula against a closed form, a published number or a Monte Carlo estimate."""

import pytest
import torch

import flow


def test_student_sigmas_are_the_papers_nodes():
    assert flow.student_sigmas(2, 3.0).tolist() == [1.0, 0.75, 0.0]
    assert flow.student_sigmas(4, 3.0).tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert flow.student_sigmas(2, 1.0).tolist() == [1.0, 0.5, 0.0]  # nothing is kept from the call before


@pytest.mark.parametrize("n, shift", [(1, 3.0), (3, 3.0), (7, 2.5), (8, 1.0)])
def test_student_sigmas_lie_on_the_teacher_grid_within_half_a_node(n, shift):
    grid, nodes = flow.teacher_grid(shift), flow.student_indices(n, shift)
    assert torch.equal(flow.student_sigmas(n, shift), grid[nodes])
    assert (nodes - torch.linspace(0, 1000, n + 1)).abs().max() <= 1


def test_teacher_grid_is_the_shifted_unit_interval():
    sigma = flow.teacher_grid(3.0).double()
    u = sigma / (3 - 2 * sigma)  # the shift, solved for u
    assert len(sigma) == 1001
    assert torch.allclose(u, 1 - torch.arange(1001, dtype=torch.float64) / 1000, atol=1e-6)


def test_sd3_sigmas_are_the_published_double_shift():
    sigmas = flow.sd3_sigmas(28, 3.0)
    assert sigmas[:5].tolist() == pytest.approx([1, 0.9873806, 0.9741077, 0.9601293, 0.9453875], abs=1e-6)
    assert sigmas[-3:].tolist() == pytest.approx([0.1109057, 0.0089286, 0], abs=1e-6)
    assert len(sigmas) == 29


@pytest.mark.parametrize("schedule", [flow.student_sigmas, flow.sd3_sigmas])
def test_no_schedule_without_a_step(schedule):
    with pytest.raises(ValueError, match="at least one step"):
        schedule(0, 3.0)


def test_velocity_gives_back_the_data_that_it_was_made_of():
    x0, noise, sigma = torch.randn(5, 2, 3, 3), torch.randn(5, 2, 3, 3), torch.rand(5)
    x = flow.add_noise(x0, noise, sigma)
    assert torch.allclose(flow.velocity_to_x0(x, noise - x0, sigma), x0, atol=1e-5)


def test_euler_step_is_exact_on_a_straight_path():
    x0, noise = torch.randn(4, 1, 2, 2), torch.randn(4, 1, 2, 2)
    s1, s2 = torch.rand(4), torch.rand(4)
    stepped = flow.euler_step(flow.add_noise(x0, noise, s1), noise - x0, s1, s2)
    assert torch.allclose(stepped, flow.add_noise(x0, noise, s2), atol=1e-6)


@pytest.mark.parametrize("s1, s2", [(0.0, 0.4), (0.3, 0.31), (0.75, 0.9), (0.75, 1.0)])
def test_renoised_samples_have_the_mean_and_variance_of_the_higher_level(s1, s2):
    generator = torch.Generator().manual_seed(0)
    x0 = torch.full((200_000, 1), 2.0)
    x = flow.add_noise(x0, torch.randn(x0.shape, generator=generator), torch.tensor(s1))
    z = flow.renoise(x, torch.tensor(s1), torch.tensor(s2), torch.randn(x0.shape, generator=generator))
    assert z.mean().item() == pytest.approx(2 * (1 - s2), abs=0.01)
    assert z.std().item() == pytest.approx(s2, abs=0.01)


def test_guidance_of_one_is_the_conditional_velocity_and_of_zero_the_unconditional():
    u, c = torch.randn(3), torch.randn(3)
    assert torch.allclose(flow.guide(u, c, 1.0), c) and torch.equal(flow.guide(u, c, 0.0), u)
    assert torch.allclose(flow.guide(u, c, 3.0), 3 * c - 2 * u, atol=1e-6)


def gaussian_velocity(x, sigma, mean, std):
    """E[ε - x0 | x_σ = x] for data N(mean, std²), the network that rectified flow would learn: a closed form."""
    s = flow.per_sample(sigma, x)
    gain = ((s - (1 - s) * std**2) / ((1 - s) ** 2 * std**2 + s**2))
    return gain * (x - (1 - s) * mean) - mean


def test_sampling_with_the_exact_velocity_reaches_the_data_distribution():
    noise = torch.randn(4000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    x = flow.sample(lambda x, s, c, p: gaussian_velocity(x, s, 1.5, 0.5), noise, flow.sd3_sigmas(500, 3.0),
                    (None, None))
    assert torch.allclose(x, 1.5 + 0.5 * noise, atol=0.03)  # the flow of a Gaussian is this affine map


def test_guided_sampling_steps_along_the_guided_velocity():
    def model(x, sigma, context, pooled):
        return context.expand_as(x)

    cond, uncond = ((torch.full((2, 1, 1, 1), value), torch.zeros(2, 1)) for value in (1.0, 0.25))
    x = flow.sample(model, torch.zeros(2, 3, 4, 4), torch.tensor([1.0, 0.0]), cond, uncond, guidance=4.0)
    assert torch.allclose(x, torch.full_like(x, -(0.25 + 4 * 0.75)))


def test_initial_noise_depends_on_the_seed_alone():
    both = flow.initial_noise((2, 3, 3), [5, 6])
    assert torch.equal(both[1], flow.initial_noise((2, 3, 3), [6])[0]) and not torch.equal(both[0], both[1])
