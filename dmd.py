"""Stage I: structure-focused distribution matching (1.x-Distill, Sec. 3.2 and 3.3).

Three networks of one shape: the teacher T (frozen), the student G, and the fake score F, which follows the distribution
that the student samples from at present. The student is moved along T - F: away from where its own samples are dense,
towards where the teacher's are. Each of its n steps owns a window of noise levels, (σ_{k+1}, σ_k], in which T and F are
compared (as in TDM, Luo et al. 2025); with one step this is plain DMD (Yin et al. 2024).

`iteration` is the whole algorithm; what it calls stands below it. Everything is a pure function: networks are passed
in, and so is all that is random. Step indices and noise levels stay on the CPU, where they decide what runs.
"""

from typing import NamedTuple

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d

import flow


class Levels(NamedTuple):
    """What is random in one of the two losses."""

    k: torch.Tensor         # (B,), int64: which of the student's steps, 0 … n-1
    sigma: torch.Tensor     # (B,): the level at which it is compared, in the window of step k
    noise: torch.Tensor     # (B, C, H, W): ε, which takes the student's sample up to that level


class Batch(NamedTuple):
    """What is random in one iteration, beside the prompts. k is drawn separately for the two losses."""

    noise: torch.Tensor     # (B, C, H, W): where the student's sampling starts
    steps: torch.Tensor     # (B,), int64: how many of its steps the two losses need
    fake: Levels
    student: Levels


def iteration(student, fake, teacher, batch, windows, cond, uncond, guidance, alpha):
    """One iteration of Stage I (Sec. 3.2): yields the fake score's loss, then the student's.

    Between the two, the caller moves the fake score along its loss, so that the student meets it as it is then.

    student, fake, teacher   called as network(x, sigma (B,), context, pooled) -> velocity like x
    batch, windows           what is random (draw_batch); the noise levels of each step (step_windows)
    cond, uncond             (context, pooled) of the B prompts, and of one empty prompt
    guidance, alpha          w and α of Eq. (4)
    """
    nodes, end = windows.nodes, windows.end
    x, v = rollout(student, batch.noise, nodes, batch.steps, cond)                      # x_{σ_k} and v_k of all steps k

    k, sigma, noise = batch.fake  # F learns the student's samples by flow matching
    x_k, v_k = of_step(k, x), of_step(k, v)
    x0 = flow.velocity_to_x0(x_k, v_k, nodes[k])                                        # the clean estimate x̂0
    z = flow.renoise(flow.euler_step(x_k, v_k, nodes[k], end[k]), end[k], sigma, noise)  # x_{σ_{k+1}}, noised up to x_σ
    target = (z - x0) / flow.per_sample(sigma, z)                                       # the velocity from x̂0 to x_σ
    yield (fake(z, sigma, *cond) - target).square().mean()

    k, sigma, noise = batch.student  # G learns where T and F, seeing its sample at x_σ, would each have it
    x_k = of_step(k, x)
    y = flow.euler_step(x_k, student(x_k, nodes[k], *cond), nodes[k], end[k])           # x_{σ_{k+1}}, the only gradient
    with torch.no_grad():
        z = flow.renoise(y, end[k], sigma, noise)                                       # x_σ
        v_real = gated_velocity(teacher, z, sigma, cond, uncond, guidance, alpha)
        y_real = flow.euler_step(z, v_real, sigma, end[k])
        y_fake = flow.euler_step(z, fake(z, sigma, *cond), sigma, end[k])
    yield student_loss(y, y_real, y_fake)


@torch.no_grad()
def rollout(student, noise, nodes, steps, cond):
    """The student's own sampling (Sec. 3.2), from noise (B, C, H, W) at σ = 1 down its nodes (n+1,).

    Sample i makes its first steps[i] steps and no more; after them its velocity is 0, so its state stays.
    -> the states x_{σ_k}, (max steps + 1, B, C, H, W), and the velocities v_k, (max steps, B, C, H, W).
    """
    x, v = [noise], []
    for k in range(int(steps.max())):
        on = (steps > k).nonzero().flatten().to(noise.device, non_blocking=True)
        velocity = student(x[k][on], nodes[k].expand(len(on)), *(part[on] for part in cond))
        v.append(torch.zeros_like(noise).index_copy(0, on, velocity))
        x.append(flow.euler_step(x[k], v[k], nodes[k], nodes[k + 1]))
    return torch.stack(x), torch.stack(v)


def of_step(k, states):
    """k (B,), states (n, B, …) -> that of step k for each sample, (B, …)."""
    k = k.to(states.device, non_blocking=True)
    return states[k, torch.arange(len(k), device=states.device)]


def gated_velocity(teacher, x, sigma, cond, uncond, guidance, alpha):
    """Gated teacher guidance, Eq. (4): v_∅ + w (v_c - v_∅) where σ ≤ α, and v_c where σ > α.

    At high noise, where structure forms, strong guidance pins all samples to the main mode and diversity collapses:
    there it is off. α is compared with the shifted σ. The unconditional pass runs for the guided samples only, in one
    batch with the others.
    x (B, C, H, W), sigma (B,), cond = (context, pooled) of B samples, uncond of one -> (B, C, H, W).
    """
    guided = ((sigma <= alpha) & (guidance != 1)).nonzero().flatten()                   # (U,), rows
    on = guided.to(x.device, non_blocking=True)
    both = (torch.cat([c, u.expand(len(on), *u.shape[1:])]) for c, u in zip(cond, uncond, strict=True))
    velocity = teacher(torch.cat([x, x[on]]), torch.cat([sigma, sigma[guided]]), *both)  # (B + U, C, H, W)
    velocity, uncond_velocity = velocity.split([len(x), len(on)])
    return velocity.index_copy(0, on, flow.guide(uncond_velocity, velocity[on], guidance))


def student_loss(y, real, fake):
    """The distribution-matching loss of samples y (B, C, H, W), given where real and fake score would have them.

    The target y* = y + real - fake is held constant, so the gradient with respect to y points along fake - real: the
    difference of two scores, which is the gradient of the Kullback-Leibler divergence (DMD, Eq. 3), whatever the loss's
    value.
    Pseudo-Huber, sqrt(d² + h²) - h, with h in proportion to the size of the latent; each sample divided by mean
    |y - real| over all of (C, H, W), so that noisy levels do not outweigh the others (the released code averages over
    two of the three axes, a leftover of token-shaped latents).
    """
    numel = y[0].numel()
    h = 1e-3 * (numel / (64 * 64 * 4)) ** 0.5
    with torch.no_grad():
        target = y + real - fake
        weight = (y - real).abs().mean(dim=(1, 2, 3)).clamp(min=1e-4)                   # (B,); the floor avoids 0 / 0
    huber = ((y - target) ** 2 + h**2).sqrt() - h
    return (huber.mean(dim=(1, 2, 3)) / weight).mean()


# ------------------------------------------------------------------------------------ levels: windows and density

class Windows(NamedTuple):
    """The noise levels of each of the student's n steps. Step k owns grid[start[k]] … grid[stop[k] - 1]."""

    nodes: torch.Tensor     # (n+1,): σ_0 = 1 … σ_n = 0; step k starts at σ_k
    end: torch.Tensor       # (n,): the level at which step k's sample is compared, and from which it is noised up
    grid: torch.Tensor      # (1001,): the teacher's levels
    start: torch.Tensor     # (n,), int64: positions in the grid
    stop: torch.Tensor      # (n,), int64


def step_windows(n, shift, whole=False):
    """TDM's windows (Sec. 3.2): step k is compared at levels in (σ_{k+1}, σ_k], and ends at σ_{k+1}.

    `whole`: every step goes to σ = 0 at once and is compared at all levels, which is DMD without TDM's windows.
    """
    grid, index = flow.teacher_grid(shift), flow.student_indices(n, shift)
    nodes, start, stop = grid[index], index[:-1], index[1:]
    if whole:
        return Windows(nodes, torch.zeros(n), grid, torch.zeros_like(start), torch.full_like(stop, flow.GRID_STEPS))
    return Windows(nodes, nodes[1:], grid, start, stop)


def noised_sample(states, windows, sigma, noise):
    """A student's sample as Stage I sees it at level σ (): the state after the step that owns σ, noised up (Sec. 3.2).

    states: of `rollout` -> (B, C, H, W)
    """
    k = int((windows.nodes[1:] >= sigma).sum())                                         # σ in (σ_{k+1}, σ_k]
    return flow.renoise(states[k + 1], windows.end[k], sigma, noise)


def draw_batch(size, shape, windows, density, generator):
    """All that is random in an iteration (Sec. 3.2, 3.3) of `size` samples of `shape` (C, H, W), on the CPU -> Batch.

    k is uniform; the student's level is drawn from `density` inside the window of k, the fake score's always uniformly.
    The samples are in the order of the steps they need, so that neighbours run alike.
    """
    def draw_levels(density):
        k = torch.randint(len(windows.start), (size,), generator=generator)
        index = draw_index(density, windows.start[k], windows.stop[k], torch.rand(size, generator=generator))
        return Levels(k, windows.grid[index], torch.randn(size, *shape, generator=generator))

    noise = torch.randn(size, *shape, generator=generator)
    fake, student = draw_levels(importance_density("uniform")), draw_levels(density)
    steps = torch.maximum(fake.k + 1, student.k)  # F learns from the outcome of step k, G only starts from its state
    order = steps.argsort(stable=True)
    return of_each(lambda tensor: tensor[order], Batch(noise, steps, fake, student))


def of_each(function, batch):
    """A Batch with function(tensor) in place of each of its tensors."""
    if isinstance(batch, torch.Tensor):
        return function(batch)
    return type(batch)(*(of_each(function, part) for part in batch))


def draw_index(density, start, stop, u):
    """Importance sampling inside a window (Sec. 3.3): `density`, restricted to start ≤ i < stop and renormalised.

    By inverting the distribution function.
    density (1001,), start and stop int64 (B,), u uniform in [0, 1), (B,) -> int64 (B,).
    """
    cdf = torch.cat([density.new_zeros(1), density.cumsum(0)])                          # (1002,), cdf[i] = p(index < i)
    target = torch.lerp(cdf[start], cdf[stop], u.to(cdf))
    index = torch.searchsorted(cdf, target, right=True) - 1
    return torch.minimum(torch.maximum(index, start), stop - 1)  # rounding must not leave the window


DENSITIES = {  # anchors (index in the teacher grid, density): 0 is pure noise. Fig. 10; the paper uses (c), Fig. 4
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
