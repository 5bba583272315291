"""What a set of images is worth, against closed forms and counting by hand."""

import numpy as np
import pytest
import torch
from scipy import linalg

import metrics


def normal(n, dim, seed=0):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distance(a, b):
    return metrics.frechet_distance(metrics.gaussian(a), metrics.gaussian(b))


def with_moments(mean, covariance, n=500, seed=0):
    """A sample that has exactly this mean and covariance."""
    x = normal(n, len(mean), seed)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T
    return x @ torch.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_two_gaussians_is_the_closed_form():
    mean_a, mean_b = torch.tensor([1.0, 0, 2]).double(), torch.tensor([0.0, 2, 2]).double()
    a, b = torch.tensor([4.0, 1, 9]).double(), torch.tensor([1.0, 1, 16]).double()
    expected = (1 + 4) + (2 - 1)**2 + (1 - 1)**2 + (3 - 4)**2  # commuting covariances: |μa - μb|² + Σ (√λa - √λb)²
    found = distance(with_moments(mean_a, a.diag()), with_moments(mean_b, b.diag(), seed=1))
    assert found == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_is_that_of_scipys_matrix_root_also_from_float32_features():
    a, b = normal(300, 8) @ normal(8, 8, 1), normal(200, 8, 2) @ normal(8, 8, 3) + 1
    cov_a, cov_b = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    between = float((a.mean(0) - b.mean(0)).square().sum())
    expected = between + np.trace(cov_a + cov_b - 2 * linalg.sqrtm(cov_a @ cov_b).real)
    assert distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert distance(a.float(), b.float()) == pytest.approx(expected, rel=1e-4)


def test_frechet_distance_stands_fewer_samples_than_dimensions():
    a, b = normal(10, 64), normal(12, 64, 1)
    assert distance(a, a) == pytest.approx(0, abs=1e-4)
    assert 0 < distance(a, b) < 200


def test_precision_and_recall_count_samples_inside_the_others_support():
    real = torch.tensor([[0.0], [1], [2], [3], [100], [101], [102], [103]])   # two clusters
    fake = torch.tensor([[0.5], [1.5], [2.5], [3.2], [50.0]])                 # all but one in the first
    inside, covered = metrics.precision_recall(fake, real, neighbours=2)
    assert inside.tolist() == [True, True, True, True, False]
    # radii of the fakes to their second neighbour: 2, 1, 1, 1.7, and 47.5 around 50, which does not reach 100
    assert covered.tolist() == [True, True, True, True, False, False, False, False]
    for x in metrics.precision_recall(real, real.flip(0)):
        assert x.all()


def test_entropy_of_constructed_samples():
    for k in (2, 4, 6):
        assert metrics.entropy(torch.full((64,), k - 1), k) == 0
        assert metrics.entropy(torch.arange(600) % k, k) == pytest.approx(1, abs=0.01)
        half = torch.arange(600) % (k // 2)  # half of the values
        assert metrics.entropy(half, k) == pytest.approx(np.log(k // 2) / np.log(k), abs=0.01)


def test_entropy_of_small_fair_samples_is_one_on_average():
    generator = torch.Generator().manual_seed(0)
    small = [metrics.entropy(torch.randint(4, (64,), generator=generator), 4) for _ in range(200)]
    assert sum(small) / 200 == pytest.approx(1, abs=0.003)  # without the correction for small samples, 0.983


def test_pairwise_distance_is_the_mean_over_pairs():
    assert metrics.pairwise_distance(torch.tensor([[[0.0], [1], [3]], [[2], [2], [2]]])).tolist() == [2, 0]


def test_bootstrap_finds_the_standard_error_of_a_mean():
    x = normal(400, 1)[:, 0]
    value, error = metrics.bootstrap(lambda index: {"mean": x[index].mean().item()}, 400, draws=400)["mean"]
    assert value == x.mean().item() and error == pytest.approx(x.std().item() / 20, rel=0.1)
