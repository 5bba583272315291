"""The true score of the tiny world, in closed form: what a perfect network would answer. Not part of the paper."""

import torch


def posterior_mean(x, sigma, latents, allowed):
    """E[x0 | x_σ, caption], where x0 is as likely any latent that the caption allows.

        E[x0 | x_σ] = Σ_i w_i x0_i,    w = softmax(-|x_σ - (1 - σ) x0_i|² / 2σ²)

    x (B, C, h, w), sigma (B,) in (0, 1], latents (4800, C, h, w) of all scenes, allowed bool (B, 4800) -> like x
    """
    clean, noisy, s = latents.flatten(1).double(), x.flatten(1).double(), sigma.double()[:, None]
    likely = (1 - s) * noisy @ clean.T - (1 - s) ** 2 / 2 * clean.square().sum(1)       # |x_σ|² cancels
    weights = (likely / s**2).masked_fill(~allowed, -torch.inf).softmax(1)              # (B, 4800)
    return (weights @ clean).view_as(x).to(x.dtype)


def true_velocity(x, sigma, latents, allowed):
    """v* = (x_σ - E[x0 | x_σ, caption]) / σ; as above."""
    return (x - posterior_mean(x, sigma, latents, allowed)) / sigma.view(-1, 1, 1, 1)
