"""Stage I: structure-focused distribution matching (1.x-Distill, Sec. 3.2 and 3.3).

Three networks of one shape: the teacher T (frozen), the student G, and the fake score F, which follows the distribution
that the student samples from at present. The student is moved along T - F: away from where its own samples are dense,
towards where the teacher's are. Each of its n steps owns a window of noise levels, (σ_{k+1}, σ_k], in which T and F are
compared (as in TDM, Luo et al. 2025); with one step this is plain DMD (Yin et al. 2024).

Everything here is a pure function: networks are passed in, and so is all that is random (step index k, level σ, noise ε).
"""

import torch
from scipy.ndimage import gaussian_filter1d

import flow

# ---------------------------------------------------------------------------------- levels: density and windows

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

    Indexed by the *position* in the grid, not by σ, so it does not change with the shift. There is no 1/p correction: the
    objective is reweighted on purpose. Returns float64 (1001,) that sums to 1; raises KeyError for an unknown name.
    """
    index, value = torch.tensor(DENSITIES[name], dtype=torch.float64).T.contiguous()
    grid = torch.arange(flow.GRID_STEPS + 1, dtype=torch.float64)
    right = torch.searchsorted(index, grid).clamp(min=1)
    share = (grid - index[right - 1]) / (index[right] - index[right - 1])
    density = torch.lerp(value[right - 1], value[right], share)
    log_density = gaussian_filter1d(density.log().numpy(), SMOOTHING, mode="nearest")
    return torch.softmax(torch.from_numpy(log_density), dim=0)


def step_windows(n, shift, whole=False):
    """TDM's windows (Sec. 3.2): the levels that each of the student's n steps is trained on, as teacher-grid positions.

    Step k owns start[k] ≤ i < stop[k], that is σ in (σ_{k+1}, σ_k], and takes its sample down to the node end[k], σ_{k+1}.
    `whole`: every step goes to σ = 0 at once and is compared at all levels, which is DMD without TDM's windows.
    Returns start, stop, end, int64 (n,) each.
    """
    nodes = flow.student_nodes(n, shift)
    if whole:
        return torch.zeros_like(nodes[:-1]), torch.full_like(nodes[:-1], flow.GRID_STEPS), nodes[-1:].expand(n)
    return nodes[:-1], nodes[1:], nodes[1:]


def draw_index(density, start, stop, u):
    """Importance sampling inside a window (Sec. 3.3): draw from `density`, restricted to start ≤ i < stop and renormalised.

    By inverting the distribution function.

    density (1001,), start and stop int64 (B,), u uniform in [0, 1), (B,) -> int64 (B,).
    """
    cdf = torch.cat([density.new_zeros(1), density.cumsum(0)])                          # (1002,), cdf[i] = p(index < i)
    target = torch.lerp(cdf[start], cdf[stop], u.to(cdf))
    index = torch.searchsorted(cdf, target, right=True) - 1
    return torch.minimum(torch.maximum(index, start), stop - 1)  # rounding must not leave the window


# -------------------------------------------------------------------------------------------------------- the student

@torch.no_grad()
def rollout(student, noise, sigmas, k, cond, passes=None):
    """The states x_{σ_k} that the student's own sampling (Sec. 3.2) reaches before step k, a k for each sample.

    A sample goes no further than it must: the pass of step j is for those with k > j. `passes` (default: the largest k) are
    made whether or not a sample here needs them, since processes that share one network must call it equally often.
    noise (B, C, H, W), sigmas (n+1,), k a list of B integers in ascending order, cond = (context, pooled) -> (B, C, H, W).
    """
    x = noise
    for j in range(k[-1] if passes is None else passes):
        done = sum(step <= j for step in k)  # these stay as they are
        first = min(done, len(k) - 1)        # where all are done, one goes along for nothing
        velocity = student(x[first:], sigmas[j].expand(len(x) - first), *(part[first:] for part in cond))
        x = torch.cat([x[:done], flow.euler_step(x[first:], velocity, sigmas[j], sigmas[j + 1])[done - first:]])
    return x


def student_loss(y, real, fake):
    """The distribution-matching loss of samples y (B, C, H, W): the real and the fake score's ideas of where y should be.

    The target y* = y + real - fake is held constant, so the gradient with respect to y points along fake - real: the
    difference of two scores, which is the gradient of the Kullback-Leibler divergence (DMD, Eq. 3), whatever the loss's value.
    Pseudo-Huber, sqrt(d² + h²) - h, with h in proportion to the size of the latent; each sample divided by mean |y - real|
    over all of (C, H, W), so that noisy levels do not outweigh the others (the released code averages over two of the three
    axes, a leftover of token-shaped latents).
    """
    numel = y[0].numel()
    h = 1e-3 * (numel / (64 * 64 * 4)) ** 0.5
    with torch.no_grad():
        target = y + real - fake
        weight = (y - real).abs().mean(dim=(1, 2, 3)).clamp(min=1e-4)                   # (B,); the floor avoids 0 / 0
    huber = ((y - target) ** 2 + h**2).sqrt() - h
    return (huber.mean(dim=(1, 2, 3)) / weight).mean()


def student_objective(velocity, teacher, fake, x, sigma_k, sigma_end, sigma, noise, cond, uncond, guidance, guided):
    """The student's turn (Sec. 3.2): its step from x at σ_k, compared at level σ by teacher and fake score.

    velocity = G(x, σ_k, c), (B, C, H, W), with gradient; x is the state at σ_k that the student's own rollout reached;
    sigma_k, sigma_end, sigma are (B,); uncond and guided as in gated_velocity.
    """
    y = flow.euler_step(x, velocity, sigma_k, sigma_end)                                # x_{σ_{k+1}}, with gradient
    with torch.no_grad():
        z = flow.renoise(y, sigma_end, sigma, noise)                                    # x_σ
        real_velocity = gated_velocity(teacher, z, sigma, cond, uncond, guidance, guided)
        real = flow.euler_step(z, real_velocity, sigma, sigma_end)
        faked = flow.euler_step(z, fake(z, sigma, *cond), sigma, sigma_end)
    return student_loss(y, real, faked)


# --------------------------------------------------------------------------------------- real score, fake score

def guided_samples(sigma, alpha, guidance):
    """Gated teacher guidance, Eq. (4), the gate: which samples are guided, those with σ ≤ α. (B,) -> int64, ascending.

    At high noise, where structure forms, strong guidance pins all samples to the main mode and diversity collapses, so it is
    switched off there. α is compared with the shifted σ.
    """
    return (sigma <= alpha).nonzero().flatten() if guidance != 1 else torch.zeros(0, dtype=torch.int64)


def gated_velocity(model, x, sigma, cond, uncond, guidance, guided):
    """Gated teacher guidance, Eq. (4): v_∅ + w (v_c - v_∅) for the samples `guided`, where σ ≤ α, and v_c where σ > α.

    The unconditional pass runs for the samples that need it only, and in one batch with the others, so that processes that
    share one network all call it once.
    x (B, C, H, W), sigma (B,), cond = (context, pooled) of B samples, uncond of one -> (B, C, H, W).
    """
    both = (torch.cat([c, u.expand(len(guided), *u.shape[1:])]) for c, u in zip(cond, uncond, strict=True))
    velocity, uncond_velocity = model(torch.cat([x, x[guided]]), torch.cat([sigma, sigma[guided]]), *both).split(
        [len(x), len(guided)])
    return velocity.index_copy(0, guided, flow.guide(uncond_velocity, velocity[guided], guidance))


def fake_target(x, velocity, sigma_k, sigma_end, sigma, noise):
    """What the fake score learns: flow matching on the student's samples (Sec. 3.2).

    The student's step from x at σ_k gives its clean estimate x̂0 and, at σ_end, a sample that is noised up to σ.
    Returns z = x_σ and the velocity (z - x̂0) / σ that leads from x̂0 to it, (B, C, H, W) each.
    """
    x0 = flow.velocity_to_x0(x, velocity, sigma_k)
    z = flow.renoise(flow.euler_step(x, velocity, sigma_k, sigma_end), sigma_end, sigma, noise)
    return z, (z - x0) / flow.per_sample(sigma, z)


def fake_loss(fake, x, velocity, sigma_k, sigma_end, sigma, noise, cond):
    """The fake score's turn (Sec. 3.2): the mean squared error of its velocity."""
    z, target = fake_target(x, velocity, sigma_k, sigma_end, sigma, noise)
    return (fake(z, sigma, *cond) - target).square().mean()
