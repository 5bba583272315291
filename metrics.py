"""What a set of images is worth, from features or labels of them. Pure functions of tensors; no network, no file."""

import math

import numpy as np
import torch


def gaussian(features):
    """Mean (D,) and covariance (D, D) of features (N, D), in double precision."""
    features = features.cpu().double()
    return features.mean(0), torch.cov(features.T)


def frechet_distance(a, b):
    """Fréchet distance between two Gaussians, each a mean (D,) and a covariance (D, D).

    |μa - μb|² + tr(Ca + Cb - 2 (Ca^½ Cb Ca^½)^½) (Heusel et al. 2017). Roots are taken of eigenvalues of symmetric
    matrices: no complex parts, and singular covariances (few samples) do no harm.
    """
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T                             # (D, D)
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def precision_recall(fake, real, neighbours=3):
    """Improved precision and recall (Kynkäänniemi et al. 2019), sample by sample.

    fake (N, D), real (M, D) -> bool (N,): which samples lie in the support of the real ones, and bool (M,), the other
    way round; their means are precision and recall. The support is the union of balls around samples that reach to
    their k-th nearest neighbour.
    """
    radius_fake, radius_real = (torch.cdist(x, x).kthvalue(neighbours + 1, dim=1).values for x in (fake, real))
    distance = torch.cdist(fake, real)                                                  # (N, M)
    return (distance <= radius_real).any(1), (distance <= radius_fake[:, None]).any(0)


def pairwise_distance(features):
    """Mean distance over all pairs, (…, N, D) -> (…). Of samples of one prompt: their diversity."""
    n = features.shape[-2]
    return torch.cdist(features, features).sum((-2, -1)) / (n * (n - 1))


def entropy(values, choices):
    """Normalised entropy of values (N,) int64 out of `choices` possible ones: 1 if uniform, 0 if always the same.

    It has the correction (K' - 1) / 2N for the bias of the plug-in entropy, K' values seen (Miller 1955), so that a
    uniform sampler scores 1 on average, and at times a little more.
    """
    counts = torch.bincount(values, minlength=choices).double()
    plug_in = torch.special.entr(counts / len(values)).sum()
    return (plug_in + (counts.count_nonzero() - 1) / (2 * len(values))).item() / math.log(choices)


def bootstrap(statistic, n, draws=100, seed=0):
    """A statistic of n samples and its standard error, by resampling with replacement (Efron 1979).

    statistic(index) -> {name: float} of the samples at `index`, int64 (n,) -> {name: (value, standard error)}
    """
    generator = torch.Generator().manual_seed(seed)
    again = [statistic(torch.randint(n, (n,), generator=generator)) for _ in range(draws)]
    return {name: (value, float(np.std([other[name] for other in again], ddof=1)))
            for name, value in statistic(torch.arange(n)).items()}
