"""Rectified flow: noise levels, the path between data and noise, and sampling along it.

Source: Esser et al. 2024 (SD3), Sec. 2 and 3.1; 1.x-Distill (arXiv 2604.04018), Sec. 3.1.

One time convention in the whole repository: the noise level σ runs from 1 (pure noise) to 0 (data). With a clean latent
x0 and Gaussian noise ε,

    x_σ = (1 - σ) x0 + σ ε,        v = ε - x0,        and the network predicts v from (x_σ, σ, text).

Every function takes σ as a tensor of shape (B,), or () for one level that all samples share.
"""

import torch
from tqdm import tqdm

GRID_STEPS = 1000  # the teacher grid has 1001 nodes, i = 0 (pure noise) ... 1000 (data)


# ------------------------------------------------------------------------------------------------ noise levels

def shift_sigma(u, shift):
    """σ(u) = s u / (1 + (s-1) u): spends more of the unit interval at high noise (Esser et al. 2024, Eq. 23)."""
    return shift * u / (1 + (shift - 1) * u)


def teacher_grid(shift):
    """The 1001 levels σ(1 - i/1000), i = 0 … 1000, from 1 down to 0. Returns float32 of shape (1001,)."""
    return shift_sigma(torch.linspace(1, 0, GRID_STEPS + 1, dtype=torch.float64), shift).float()


def student_indices(n, shift):
    """Positions of the student's nodes in the teacher grid: σ(linspace(1, 0, n+1)), snapped. Returns int64 (n+1,)."""
    wanted = shift_sigma(torch.linspace(1, 0, n + 1, dtype=torch.float64), shift).float()
    return (teacher_grid(shift)[None] - wanted[:, None]).abs().argmin(dim=1)


def student_sigmas(n, shift):
    """The student's nodes σ_0 = 1 > σ_1 > … > σ_n = 0; for n = 2, shift = 3: [1, 0.75, 0]. Returns float32 (n+1,)."""
    return teacher_grid(shift)[student_indices(n, shift)]


def sd3_sigmas(n, shift):
    """The published SD3 schedule with n steps. Returns float32 (n+1,), from 1 to 0.

    It shifts twice: the smallest level, σ(1/1000), is shifted already, and the levels spaced evenly down to it are then
    shifted again. Kept, because the teacher's published samples are made this way.
    """
    sigma_min = shift_sigma(1 / GRID_STEPS, shift)
    levels = shift_sigma(torch.linspace(1, sigma_min, n, dtype=torch.float64), shift)
    return torch.cat([levels, levels.new_zeros(1)]).float()


# ---------------------------------------------------------------------------------------------------- the path

def per_sample(sigma, x):
    """σ of shape (B,) or () as a tensor that multiplies x of shape (B, …)."""
    sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device)
    return sigma.reshape(-1, *[1] * (x.ndim - 1)) if sigma.ndim else sigma


def add_noise(x0, noise, sigma):
    """x_σ = (1 - σ) x0 + σ ε."""
    sigma = per_sample(sigma, x0)
    return (1 - sigma) * x0 + sigma * noise


def velocity_to_x0(x, velocity, sigma):
    """x̂0 = x_σ - σ v."""
    return x - per_sample(sigma, x) * velocity


def euler_step(x, velocity, sigma_from, sigma_to):
    """x_σ' = x_σ + (σ' - σ) v."""
    return x + (per_sample(sigma_to, x) - per_sample(sigma_from, x)) * velocity


def renoise(x, sigma_from, sigma_to, noise):
    """Noise x further, from σ1 = sigma_from up to σ2 = sigma_to ≥ σ1, with fresh Gaussian noise.

        x_σ2 = a x_σ1 + b ε,    a = (1 - σ2) / (1 - σ1),    b = sqrt(σ2² - (a σ1)²)

    a makes the share of x0 right and b the variance of the noise, so the result is distributed as x_σ2. σ1 < 1.
    """
    s1, s2 = per_sample(sigma_from, x), per_sample(sigma_to, x)
    a = (1 - s2) / (1 - s1)
    b = (s2**2 - (a * s1) ** 2).clamp(min=0).sqrt()
    return a * x + b * noise


# ---------------------------------------------------------------------------------------------------- sampling

def guide(uncond, cond, guidance):
    """Classifier-free guidance: v_∅ + w (v_c - v_∅). w = 1 is v_c, that is, no guidance."""
    return uncond + guidance * (cond - uncond)


def both_velocities(model, x, sigma, cond, uncond):
    """v_∅ and v_c of the states x (B, C, H, W), in one doubled batch.

    sigma (B,); cond = (context (B, L, D), pooled (B, P)); uncond likewise, of B prompts or of one for all.
    """
    conds = [torch.cat([u.expand_as(c), c]) for u, c in zip(uncond, cond, strict=True)]
    return model(torch.cat([x, x]), torch.cat([sigma, sigma]), *conds).chunk(2)


def initial_noise(shape, seeds):
    """One latent of `shape` (C, H, W) per seed, drawn on the CPU in fp32: a seed is the same noise on every device."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds])


@torch.no_grad()
def sample(model, noise, sigmas, cond, uncond=None, guidance=1.0, progress=False):
    """Euler sampling along `sigmas`, from noise to data.

    model     called as model(x, sigma (B,), context, pooled) -> velocity like x
    noise     (B, C, H, W)
    sigmas    (n+1,), decreasing, from 1 to 0
    cond      (context (B, L, D), pooled (B, P)); `uncond` likewise or of one prompt, used unless guidance is 1
    Returns the latents x_0, (B, C, H, W).
    """
    x = noise
    steps = list(zip(sigmas[:-1], sigmas[1:]))
    for sigma, sigma_next in tqdm(steps, desc="sampling", disable=not progress, leave=False):
        level = sigma.expand(len(x))
        if guidance != 1:
            velocity = guide(*both_velocities(model, x, level, cond, uncond), guidance)
        else:
            velocity = model(x, level, *cond)
        x = euler_step(x, velocity, sigma, sigma_next)
    return x
