"""Stage I: structure-focused distribution matching (1.x-Distill, Sec. 3.2 and 3.3).

Three networks of one shape: the teacher T (frozen), the student G, and the fake score F, which follows the distribution
that the student samples from at present. The student is moved along T - F: away from where its own samples are dense,
towards where the teacher's are. Each of its n steps owns a window of noise levels, (σ_{k+1}, σ_k], in which T and F are
compared (as in TDM, Luo et al. 2025); with one step there is one window, as in DMD (Yin et al. 2024).

One iteration, which train.stage1 writes out:

    states, velocities = rollout(student, noise, nodes, cond)
    fake_loss(fake, states, velocities, levels, cond)                      then backward and a step of F's optimiser
    student_loss(student, fake, teacher, states, other_levels, cond, …)    then backward and a step of G's optimiser

Everything is a pure function: networks are passed in, and so is all that is random.
"""

from typing import NamedTuple

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from torch.nn.functional import mse_loss

import flow


@torch.no_grad()
def rollout(student, noise, nodes, cond):
    """The student's own sampling (Sec. 3.2), from noise (B, C, H, W) at σ = 1 down its nodes (n+1,).

    -> the states x_{σ_k}, (n + 1, B, C, H, W), and the velocities v_k, (n, B, C, H, W).
    """
    states, velocities = [noise], []
    for sigma, sigma_next in zip(nodes[:-1], nodes[1:]):
        velocities.append(student(states[-1], sigma.expand(len(noise)), *cond))
        states.append(flow.euler_step(states[-1], velocities[-1], sigma, sigma_next))
    return torch.stack(states), torch.stack(velocities)


def fake_loss(fake, states, velocities, levels, cond):
    """The fake score's loss (Sec. 3.2): F learns the student's present samples by flow matching.

    fake                 called as network(x, sigma (B,), context, pooled) -> velocity like x
    states, velocities   of `rollout`
    levels               Levels, drawn uniformly from each window
    cond                 (context, pooled) of the B prompts

    As published (and in TDM), the clean estimate x̂0 and the noise in x_{σ_{k+1}} depend on each other, except in the
    last step. So F is exactly a score only in the last step; in a linear Gaussian case with 2 steps, the fixed point of
    Stage I is 5 % too wide.
    """
    x, v = of_step(states, levels.k), of_step(velocities, levels.k)                     # x_{σ_k} and v_k
    x0 = flow.velocity_to_x0(x, v, levels.start)                                        # x̂0
    x_end = flow.euler_step(x, v, levels.start, levels.end)                             # x_{σ_{k+1}}
    z = flow.renoise(x_end, levels.end, levels.sigma, levels.noise)                     # x_σ
    target = (z - x0) / flow.per_sample(levels.sigma, z)                                # the velocity from x̂0 to x_σ
    return mse_loss(fake(z, levels.sigma, *cond), target)


def student_loss(student, fake, teacher, states, levels, cond, uncond, guidance, alpha, cached=None):
    """The student's loss (Sec. 3.2): G's sample moves towards T's estimate of it and away from F's.

    student, fake, teacher   called as network(x, sigma (B,), context, pooled) -> velocity like x
    states                   of `rollout`
    levels                   Levels, drawn from each window by importance (Sec. 3.3)
    cond, uncond             (context, pooled) of the B prompts, and of one empty prompt
    guidance, alpha          w and α of Eq. (4)
    cached                   the CachedSteps of `rollout`: it computes every step after the first (an addition)
    """
    x = of_step(states, levels.k)                                                       # x_{σ_k}
    v = student(x, levels.start, *cond)                                                 # with gradient
    if cached:
        v = torch.where(levels.k.view(-1, 1, 1, 1) == 0, v, cached(x, levels.start, *cond))
    y = flow.euler_step(x, v, levels.start, levels.end)                                 # x_{σ_{k+1}}
    with torch.no_grad():
        z = flow.renoise(y, levels.end, levels.sigma, levels.noise)                     # x_σ
        v_real = gated_velocity(teacher, z, levels.sigma, cond, uncond, guidance, alpha)
        y_real = flow.euler_step(z, v_real, levels.sigma, levels.end)
        y_fake = flow.euler_step(z, fake(z, levels.sigma, *cond), levels.sigma, levels.end)
    return matching_loss(y, y_real, y_fake)


def gated_velocity(teacher, x, sigma, cond, uncond, guidance, alpha):
    """Gated teacher guidance, Eq. (4): v_∅ + w (v_c - v_∅) where σ ≤ α, and v_c where σ > α.

    At high noise, where structure forms, strong guidance pins all samples to the main mode and diversity collapses:
    there it is off. α is compared with the shifted σ. Both passes run for all samples, in one batch, so that the
    processes of a sharded run do not need to agree on who runs how many.
    x (B, C, H, W), sigma (B,), cond = (context, pooled) of B samples, uncond of one -> (B, C, H, W).
    """
    v_uncond, v_cond = flow.both_velocities(teacher, x, sigma, cond, uncond)
    return torch.where(flow.per_sample(sigma, x) <= alpha, flow.guide(v_uncond, v_cond, guidance), v_cond)


def matching_loss(y, real, fake):
    """The distribution-matching loss of samples y, given the real and the fake score's estimates of them.

    The target y* = y + real - fake is held constant. The loss is a pseudo-Huber distance, sqrt(d² + h²) - h, with h in
    proportion to the root of the latent's size. Its value means little. With d = fake - real, its gradient is
    d / sqrt(d² + h²), and because h is tiny, this is practically the *sign* of d, element by element. (DMD's own gradient
    is d itself.)
    Each sample is divided by mean |y - real| over all of (C, H, W), so that noisy levels do not outweigh the others.
    Deviation: the released code averages over two of the three axes, a leftover of token-shaped latents.
    y, real, fake (B, C, H, W) -> ()
    """
    numel = y[0].numel()
    h = 1e-3 * (numel / (64 * 64 * 4)) ** 0.5
    with torch.no_grad():
        target = y + real - fake
        weight = (y - real).abs().mean(dim=(1, 2, 3)).clamp(min=1e-4)                   # (B,); the floor avoids 0 / 0
    huber = ((y - target) ** 2 + h**2).sqrt() - h
    return (huber.mean(dim=(1, 2, 3)) / weight).mean()


def of_step(states, k):
    """states (n, B, …), k (B,) -> the state of step k for each sample, (B, …)."""
    return states[k, torch.arange(len(k), device=k.device)]


# ------------------------------------------------------------------------------------ levels: windows and density

class Windows(NamedTuple):
    """The noise levels of each of the student's n steps. Step k owns grid[first[k]] … grid[stop[k] - 1]."""

    nodes: torch.Tensor     # (n+1,): σ_0 = 1 … σ_n = 0; step k starts at σ_k
    end: torch.Tensor       # (n,): the level at which step k's sample is compared, and from which it is noised up
    grid: torch.Tensor      # (1001,): the teacher's levels
    first: torch.Tensor     # (n,), int64: positions in the grid
    stop: torch.Tensor      # (n,), int64


def step_windows(n, shift, whole=False):
    """TDM's windows (Sec. 3.2): step k is compared at levels in (σ_{k+1}, σ_k], and ends at σ_{k+1}.

    `whole`: every step goes to σ = 0 at once and is compared at all levels, which is DMD's choice of levels.
    """
    grid, index = flow.teacher_grid(shift), flow.student_indices(n, shift)
    nodes, first, stop = grid[index], index[:-1], index[1:]
    if whole:
        return Windows(nodes, torch.zeros(n), grid, torch.zeros_like(first), torch.full_like(stop, flow.GRID_STEPS))
    return Windows(nodes, nodes[1:], grid, first, stop)


class Levels(NamedTuple):
    """What is random in one of the two losses, for each of B samples."""

    k: torch.Tensor         # (B,), int64: which of the student's steps, 0 … n-1
    start: torch.Tensor     # (B,): σ_k, where that step starts
    end: torch.Tensor       # (B,): σ_{k+1}, where it ends
    sigma: torch.Tensor     # (B,): the level at which its result is compared
    noise: torch.Tensor     # (B, C, H, W): ε, which takes the result up to that level


def draw_levels(windows, density, shape, generator):
    """Levels for a batch of `shape` (B, C, H, W): k uniform, σ from `density` inside the window of step k (Sec. 3.3)."""
    k = torch.randint(len(windows.first), shape[:1], generator=generator)
    index = draw_index(density, windows.first[k], windows.stop[k], torch.rand(shape[0], generator=generator))
    return Levels(k, windows.nodes[k], windows.end[k], windows.grid[index], torch.randn(shape, generator=generator))


def draw_index(density, start, stop, u):
    """Importance sampling inside a window (Sec. 3.3): `density`, restricted to start ≤ i < stop and renormalised.

    Inverts the cumulative distribution.
    density (1001,), start and stop int64 (B,), u uniform in [0, 1), (B,) -> int64 (B,).
    """
    cdf = torch.cat([density.new_zeros(1), density.cumsum(0)])                          # (1002,), cdf[i] = p(index < i)
    target = torch.lerp(cdf[start], cdf[stop], u.to(cdf))
    index = torch.searchsorted(cdf, target, right=True) - 1
    return torch.minimum(torch.maximum(index, start), stop - 1)  # rounding must not leave the window


# Fig. 10: anchors (index in the teacher grid, density); 0 is pure noise. (c) is as released; Fig. 4 draws a flatter one.
DENSITIES = {
    "a": [(0, 1.0), (250, 0.8), (400, 0.2), (1000, 0.001)],
    "b": [(0, 1.0), (100, 1.0), (250, 1.0), (500, 0.3), (750, 0.05), (1000, 0.001)],
    "c": [(0, 0.6), (300, 1.3), (500, 0.05), (1000, 0.001)],
    "d": [(0, 0.01), (300, 0.1), (500, 0.95), (1000, 1.0)],
    "uniform": [(0, 1.0), (1000, 1.0)],
}
SMOOTHING = 100  # indices, of the Gaussian that rounds the anchors off


def importance_density(name):
    """Importance sampling of noise levels (Sec. 3.3, Fig. 4 and 10): how often each node of the teacher grid is drawn.

    Indexed by the *position* in the grid, not by σ, so it does not change with the shift. There is no 1/p correction:
    the objective is reweighted on purpose. Returns float64 (1001,) that sums to 1; raises KeyError for an unknown name.
    """
    density = np.interp(np.arange(flow.GRID_STEPS + 1), *zip(*DENSITIES[name]))
    log_density = gaussian_filter1d(np.log(density), SMOOTHING, mode="nearest")
    return torch.softmax(torch.from_numpy(log_density), dim=0)
