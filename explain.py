"""One picture that explains a student's sample (`python sample.py --explain`): what each step knew, and what Stage I,
seeing the sample, would have told it.

Above, the student's clean estimate at each step, with all blocks, with re-used ones, and with corrected ones. Below,
the sample is noised up to some levels, as in Stage I with its windows: what the teacher, the guided teacher and the
fake score each take it for, and the direction along which the student would be moved.
"""

import torch
from PIL import Image

import dmd
import flow
from cache import Cache, CachedSteps, Compensator, Pruned
from pictures import contact_sheet
from pipeline import decode

LEVELS = (0.95, 0.85, 0.7, 0.5, 0.3)
CONTRAST = 2  # of the direction's picture


@torch.no_grad()
def explain(student, teacher, fake, prompt, seed):
    """student and teacher: pipeline.Pipeline; fake: the fake score of Stage I, or None -> a PIL image."""
    nodes, noise = student.sigmas(), flow.initial_noise(student.latent_shape(), [seed]).to(student.device)
    cond, uncond = student.text([prompt]), student.text([""])
    ways = {"all blocks": None}
    if student.cache:
        blocks = "blocks {}-{}".format(*student.cache.blocks)
        ways[f"{blocks} re-used"] = Cache(student.cache.blocks)
        correction = {Compensator: "corrected", Pruned: "left out"}.get(type(student.cache.compensator))
        if correction:
            ways[f"{blocks} {correction}"] = student.cache
    runs = [clean_estimates(student.mmdit, cache, noise, nodes, cond) for cache in ways.values()]
    above = contact_sheet(decode(student, torch.cat([x0 for run in runs for x0 in run])), list(ways),
                          [f"step {k + 1}: sigma {sigma:.2f}" for k, sigma in enumerate(nodes[:-1])])

    recipe = student.carried("training") or {}
    guidance, alpha = recipe.get("guidance", 7.0), recipe.get("alpha", 1.0)  # Stage II has no gate
    windows = dmd.step_windows(len(nodes) - 1, student.shift)
    states, _ = dmd.rollout(student.mmdit, noise, nodes, torch.tensor([len(nodes) - 1]), cond)
    again = flow.initial_noise(student.latent_shape(), [seed + 1]).to(student.device)
    seen = [judgements(torch.tensor(level), states, windows, again, teacher.mmdit, fake, cond, uncond, guidance)
            for level in LEVELS]
    rows = {who: decode(student, torch.cat([column[who] for column in seen])) for who in seen[0]}
    if fake is not None:
        guided = torch.tensor(LEVELS)[:, None, None, None] <= alpha
        real = torch.where(guided, rows["teacher, guided"], rows["teacher"])
        rows["direction: gated teacher - fake"] = (CONTRAST * (real - rows["fake score"])).clamp(-1, 1)
    headings = [f"sigma {level:g}" + (", gate shut" if level > alpha else "") for level in LEVELS]
    return one_above_the_other(above, contact_sheet(torch.cat(list(rows.values())), list(rows), headings))


def clean_estimates(model, cache, noise, nodes, cond):
    """The student's own sampling: its clean estimate x̂0 at each step, the last of which is the sample."""
    steps, x, found = CachedSteps(model, cache), noise, []
    for sigma, sigma_next in zip(nodes[:-1], nodes[1:]):
        velocity = steps(x, sigma.expand(len(x)), *cond)
        found.append(flow.velocity_to_x0(x, velocity, sigma))
        x = flow.euler_step(x, velocity, sigma, sigma_next)
    return found


def judgements(sigma, states, windows, noise, teacher, fake, cond, uncond, guidance):
    """What the networks take the student's sample for once it is noised up to σ (), as Stage I does: {who: x̂0}."""
    level = sigma.expand(states.shape[1])
    z = dmd.noised_sample(states, windows, sigma, noise)
    velocities = {"teacher": dmd.gated_velocity(teacher, z, level, cond, uncond, guidance, alpha=0),
                  "teacher, guided": dmd.gated_velocity(teacher, z, level, cond, uncond, guidance, alpha=1)}
    if fake is not None:
        velocities["fake score"] = fake(z, level, *cond)
    return {name: flow.velocity_to_x0(z, velocity, sigma) for name, velocity in velocities.items()}


def one_above_the_other(above, below):
    both = Image.new("RGB", (max(above.width, below.width), above.height + below.height), "white")
    both.paste(above, (0, 0))
    both.paste(below, (0, above.height))
    return both
