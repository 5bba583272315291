"""What only the tiny world can tell: the true score, which a perfect network would answer; and which step decides what.

Not part of the paper. Scenes can be drawn and encoded at will, so the mean of all clean latents that may lie behind a
noisy one is a weighted mean over a pool of them. Beside it, teacher, guided teacher and fake score are measured, level
by level: where does guidance cease to point at the truth? That is what the paper's Figure 2 draws as a cartoon.
"""

import torch
import torch.nn.functional as F

import dmd
import flow
import shapes
from pipeline import decode

ERRORS = ("teacher", "guided", "guessed", "teacher there", "guided there", "fake score")
LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)


def optimal_velocity(x, sigma, pool):
    """The Bayes-optimal velocity v* = (x_σ - E[x0 | x_σ]) / σ, where x0 is as likely any latent of the pool.

        E[x0 | x_σ] = Σ_i w_i x0_i,    w = softmax(-|x_σ - (1 - σ) x0_i|² / 2σ²)

    x (B, C, H, W), sigma () in (0, 1], pool (N, C, H, W), of scenes that the caption allows -> v* like x, and the
    effective sample size 1 / Σ w², (B,): where it is small, the pool is too coarse for this level.
    """
    clean, noisy = pool.flatten(1).double(), x.flatten(1).double()                      # (N, D), (B, D)
    likely = (1 - sigma) * noisy @ clean.T - (1 - sigma) ** 2 / 2 * clean.square().sum(1)
    weights = (likely / sigma**2).softmax(1)                                            # (B, N); |x_σ|² cancels
    mean = (weights @ clean).view_as(x)
    return ((x - mean) / sigma).float(), 1 / weights.square().sum(1)


@torch.no_grad()
def compare(teacher, student, fake, captions, pool_size, batch, guidance, generator):
    """How far the networks' velocities are from the true one, level by level, a mean over captions.

    teacher     like the student a pipeline.Pipeline; fake: a network, the fake score of Stage I
    captions    how many to try, each with `batch` noisy latents
    pool_size   scenes that each caption's truth is a mean over
    -> {what: (levels,)}: root mean square errors of the velocity on noised true scenes ("teacher", "guided", "guessed":
    of no information but the pool's mean) and on the student's samples ("fake score", "teacher there", "guided there");
    cosines of the distribution-matching direction v_F - v_T with v_F - v*, gated off and on; effective sample sizes
    """
    windows, uncond = dmd.step_windows(len(student.sigmas()) - 1, teacher.shift), teacher.text([""])
    rows = []
    for prompt in shapes.draw_captions(captions, generator)[0]:
        seeds = torch.randint(2**31, (pool_size + batch,), generator=generator).tolist()
        latents = shapes.true_latents(teacher.vae, (pool_size + batch) * [prompt], seeds).float()
        x0, pool = latents.split([batch, pool_size])
        cond = [part.expand(batch, *part.shape[1:]) for part in teacher.text([prompt])]
        noise, start = torch.randn(2, *x0.shape, generator=generator).to(x0.device)
        steps = torch.full((batch,), len(windows.nodes) - 1)
        states, _ = dmd.rollout(student.mmdit, start, windows.nodes, steps, cond)       # x_{σ_k} of all steps
        rows.append([of_level(torch.tensor(level), x0, noise, states, pool, windows, teacher.mmdit, fake, cond, uncond,
                              guidance) for level in LEVELS])
    means = {name: torch.tensor([[level[name] for level in row] for row in rows]).mean(0) for name in rows[0][0]}
    return {name: mean.sqrt() if name in ERRORS else mean for name, mean in means.items()}


def of_level(sigma, x0, noise, states, pool, windows, teacher, fake, cond, uncond, guidance):
    """The row of one level σ and one caption: see `compare`. Errors are means of squares, to be averaged."""
    level = sigma.expand(len(x0))

    def seen(x):
        """The true velocity, the teacher's, and the guided teacher's."""
        true, size = optimal_velocity(x, sigma, pool)
        return true, *(dmd.gated_velocity(teacher, x, level, cond, uncond, guidance, alpha) for alpha in (0, 1)), size

    def error(velocity, true):
        return (velocity - true).square().mean().item()

    def cosine(one, other):
        return F.cosine_similarity(one.flatten(1), other.flatten(1)).mean().item()

    x = flow.add_noise(x0, noise, sigma)
    true, plain, guided, size = seen(x)
    row = {"teacher": error(plain, true), "guided": error(guided, true), "effective scenes": size.median().item(),
           "guessed": error((x - pool.mean(0)) / sigma, true)}
    z = dmd.noised_sample(states, windows, sigma, noise)
    true, plain, guided, _ = seen(z)
    of_fake = fake(z, level, *cond)
    return {**row, "teacher there": error(plain, true), "guided there": error(guided, true),
            "fake score": error(of_fake, true), "cosine": cosine(of_fake - plain, of_fake - true),
            "cosine guided": cosine(of_fake - guided, of_fake - true)}


# ------------------------------------------------------------------------------------------- which step decides what

@torch.no_grad()
def swapped(pipeline, recogniser, nodes, k, n=512, seed=0):
    """Let the steps after the k-th go on from a state that is not theirs, and read who decides on each attribute.

    *Noise*: the clean estimate x̂0 of the first k steps is noised again, with the noise of another sample. Where the
    prompt leaves an attribute open and the two samples differ in it, is it as the estimate's sample or as the noise's?
    *Prompt*: the first k steps hear one prompt, those after them another. Where the two name different values, whose
    is it?

    nodes (steps + 1,) -> {of whom: shares (6,)}
    """
    generator = torch.Generator().manual_seed(seed)
    (one, labels, named), (two, other_labels, other_named) = (shapes.draw_captions(n, generator) for _ in range(2))
    noise, other_noise = torch.randn(2, n, *pipeline.latent_shape(), generator=generator).to(pipeline.device)
    cond, other_cond = pipeline.text(one), pipeline.text(two)

    def look(x, cond):
        return shapes.look(recogniser, decode(pipeline, flow.sample(pipeline.mmdit, x, nodes[k:], cond)))[1]

    before = flow.sample(pipeline.mmdit, noise, nodes[:k], cond)                        # x_{σ_{k-1}}
    x = flow.sample(pipeline.mmdit, before, nodes[k - 1:k + 1], cond)                   # x_{σ_k}
    estimate = flow.velocity_to_x0(before, (x - before) / (nodes[k] - nodes[k - 1]), nodes[k - 1])
    other_x = flow.sample(pipeline.mmdit, other_noise, nodes[:k + 1], cond)
    seen, other_seen, heard = look(x, cond), look(other_x, cond), look(x, other_cond)
    mixed = look(flow.add_noise(estimate, other_noise, nodes[k]), cond)
    open_ = ~named & (seen != other_seen)
    told = named & other_named & (labels != other_labels)

    def share(hits, among):
        return (hits & among).sum(0) / among.sum(0)

    return {"the clean estimate's sample": share(mixed == seen, open_),
            "the noise's sample": share(mixed == other_seen, open_),
            "the first prompt": share(heard == labels, told), "the second prompt": share(heard == other_labels, told)}


def relay(first, last, nodes, k, guidance):
    """A way to draw (prompts, seeds -> images): `first` makes the first k steps with `guidance`, `last` the others.

    Both run all their blocks in every step.
    """
    def images(prompts, seeds):
        noise, cond = flow.initial_noise(last.latent_shape(), seeds).to(last.device), last.text(prompts)
        uncond = [part.expand(len(noise), *part.shape[1:]) for part in first.text([""])]
        x = flow.sample(first.mmdit, noise, nodes[:k + 1], cond, uncond, guidance)
        return decode(last, flow.sample(last.mmdit, x, nodes[k:], cond))

    return images
