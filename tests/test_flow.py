"""Rectified flow (Sec. 3.1): each formula against a closed form, a published number or a Monte Carlo estimate."""

import pytest
import torch

import flow


def test_students_nodes_are_the_papers_and_those_of_other_schedules_the_nearest_of_the_teachers_grid():
    assert flow.student_sigmas(2, 3.0).tolist() == [1.0, 0.75, 0.0]
    assert flow.student_sigmas(4, 3.0).tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    index, grid = flow.student_indices(7, 2.5), flow.teacher_grid(2.5)
    assert index.tolist() == [0, 143, 286, 429, 571, 714, 857, 1000]  # sevenths, before the shift
    assert torch.equal(flow.student_sigmas(7, 2.5), grid[index])


def test_velocity_leads_along_the_straight_path_and_back_to_the_data():
    x0, noise, (s1, s2) = torch.randn(5, 2, 3, 3), torch.randn(5, 2, 3, 3), torch.rand(2, 5)
    x = flow.add_noise(x0, noise, s1)
    assert torch.allclose(flow.velocity_to_x0(x, noise - x0, s1), x0, atol=1e-5)
    assert torch.allclose(flow.euler_step(x, noise - x0, s1, s2), flow.add_noise(x0, noise, s2), atol=1e-5)


@pytest.mark.parametrize("s1, s2", [(0.0, 0.4), (0.75, 0.9)])
def test_renoised_samples_have_the_mean_and_variance_of_the_higher_level(s1, s2):
    generator = torch.Generator().manual_seed(0)
    x0 = torch.full((200_000, 1), 2.0)
    x = flow.add_noise(x0, torch.randn(x0.shape, generator=generator), s1)
    z = flow.renoise(x, torch.tensor(s1), torch.tensor(s2), torch.randn(x0.shape, generator=generator))
    assert z.mean().item() == pytest.approx(2 * (1 - s2), abs=0.01)
    assert z.std().item() == pytest.approx(s2, abs=0.01)


@pytest.mark.parametrize("guidance, expected", [(4.0, 0.25 + 4 * 0.75), (1.0, 1.0)])
def test_sampling_steps_along_the_guided_velocity_with_one_empty_prompt_for_all(guidance, expected):
    cond, uncond = (torch.ones(2, 1, 1, 1), torch.zeros(2, 1)), (torch.full((1, 1, 1, 1), 0.25), torch.zeros(1, 1))
    nodes, noise = torch.tensor([1.0, 0.3, 0.0]), torch.zeros(2, 3, 4, 4)
    x = flow.sample(lambda x, s, context, pooled: context.expand_as(x), noise, nodes, cond, uncond, guidance)
    assert torch.allclose(x, torch.full_like(x, -expected))


def test_initial_noise_depends_on_the_seed_alone():
    both = flow.initial_noise((2, 3, 3), [5, 6])
    assert torch.equal(both[1], flow.initial_noise((2, 3, 3), [6])[0]) and not torch.equal(both[0], both[1])
