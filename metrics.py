"""What a set of images is worth, from features or labels of them. Pure functions of tensors; no network, no file."""

import math

import numpy as np
import torch
from scipy import linalg


def frechet_distance(a, b):
    """Fréchet distance between Gaussians of the mean and covariance of two sets of features, (N, D) and (M, D).

    |μa - μb|² + tr(Ca + Cb - 2 (Ca^½ Cb Ca^½)^½) (Heusel et al. 2017), in double precision. Roots are taken of eigenvalues of
    symmetric matrices: no complex parts, and singular covariances (fewer samples than dimensions) do no harm.
    """
    (mean_a, cov_a), (mean_b, cov_b) = ((x.mean(axis=0), np.cov(x, rowvar=False)) for x in
                                        (x.detach().cpu().double().numpy() for x in (a, b)))
    values, vectors = linalg.eigh(cov_a, driver="evd")
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    cross = np.sqrt(linalg.eigvalsh(root @ cov_b @ root, driver="evd").clip(min=0)).sum()
    return float(((mean_a - mean_b)**2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def precision_recall(fake, real, neighbours=3):
    """Improved precision and recall (Kynkäänniemi et al. 2019), sample by sample.

    fake (N, D), real (M, D) -> bool (N,): which samples lie in the support of the real ones, and bool (M,), the other way
    round. The support is the union of balls around samples that reach to their k-th nearest neighbour. The means are the two.
    """
    radius_fake, radius_real = (torch.cdist(x, x).kthvalue(neighbours + 1, dim=1).values for x in (fake, real))
    distance = torch.cdist(fake, real)                                                  # (N, M)
    return (distance <= radius_real).any(1), (distance <= radius_fake[:, None]).any(0)


def pairwise_distance(features):
    """Mean distance over all pairs, (…, N, D) -> (…). Of samples of one prompt: their diversity."""
    n = features.shape[-2]
    return torch.cdist(features, features).sum((-2, -1)) / (n * (n - 1))


def entropy(values, choices):
    """Normalised entropy of a sample of `choices` possible values: 1 if uniform, 0 if always the same. values (N,) int64.

    With the correction (K' - 1) / 2N for the bias of the plug-in entropy, K' values seen (Miller 1955), so that a uniform
    sampler scores 1 on average, and at times a little more.
    """
    counts = torch.bincount(values, minlength=choices).double()
    p = counts[counts > 0] / counts.sum()
    return ((-(p * p.log()).sum() + (len(p) - 1) / (2 * counts.sum())) / math.log(choices)).item()


def total_variation(values, choices):
    """Total variation distance of a sample from the uniform distribution, from 0 to 1 - 1/K. values (N,) int64.

    Not corrected: N values of a uniform sampler are at about sqrt(K / 2πN), 0.08 for 5 values and 128 samples.
    """
    return (torch.bincount(values, minlength=choices).double() / len(values) - 1 / choices).abs().sum().item() / 2


def bootstrap(statistic, n, draws=100, seed=0):
    """A statistic of n samples and its standard error, by resampling with replacement (Efron 1979).

    statistic(index) -> {name: float} of the samples at `index`, int64 (n,) -> {name: (value, standard error)}
    """
    generator = torch.Generator().manual_seed(seed)
    again = [statistic(torch.randint(n, (n,), generator=generator)) for _ in range(draws)]
    return {name: (value, float(np.std([other[name] for other in again], ddof=1)))
            for name, value in statistic(torch.arange(n)).items()}
