"""One picture that explains a student's sample: what each step knew, and what Stage I, seeing the sample, would say.

    python -m experiments.explain runs/stage1 --prompt "a striped red circle"

Above, the student's clean estimate at each step: with all blocks and, for a Stage II student, with re-used and with
corrected ones. Below, the sample is noised up to some levels, as in Stage I: what the teacher, the guided teacher and
the fake score each take it for, and the difference, teacher minus fake score. The loss takes nearly its sign, in latents.
"""

import commandline  # first: it sets how threads wait before torch is loaded

import json
import sys
from pathlib import Path

import torch
from PIL import Image

import dmd
import flow
from cache import Cache, CachedSteps
from commandline import DEVICE, CommandLine, UserError, find_device
from mmdit import load_mmdit
from pictures import contact_sheet, write_picture
from pipeline import TINY, decode, load_pipeline

LEVELS = (0.95, 0.85, 0.7, 0.5, 0.3)
CONTRAST = 2  # of the direction's picture


def main():
    parser = CommandLine(description="Explain one sample of a student in one picture.")
    parser.add_argument("model", help="a student; its fake score is shown if it is of Stage I")
    parser.add_argument("--prompt", default="a striped red circle on a gray background")
    parser.add_argument("--seed", type=commandline.seed, default=0, help="of the noise")
    parser.add_argument("--teacher", default=str(TINY), help="the teacher that it was distilled from")
    parser.add_argument("--device", type=find_device, default=DEVICE, help="where it runs")
    parser.add_argument("--out", type=Path, default=Path("runs/explain.png"), help="FILE.png")
    args = parser.parse_args()
    student = load_pipeline(args.model, args.device)
    if "training" not in student.mmdit.metadata:
        raise UserError(f"{args.model}: is no student made by train.py")
    teacher = load_pipeline(args.teacher, args.device, text=student.text)
    if teacher.latent_shape() != student.latent_shape():
        raise UserError(f"{args.teacher}: its latents are not those of {args.model}; name its teacher with --teacher")
    file = Path(args.model) / "fake"
    if not file.exists():
        print(f"note: {args.model} has no fake score, which only Stage I leaves: it is not shown", file=sys.stderr)
    fake = load_mmdit(file, args.device) if file.exists() else None
    print(write_picture(explain(student, teacher, fake, args.prompt, args.seed), args.out))


@torch.no_grad()
def explain(student, teacher, fake, prompt, seed):
    """student and teacher: pipeline.Pipeline; fake: the fake score of Stage I, or None -> a PIL image."""
    nodes, noise = student.sigmas, flow.initial_noise(student.latent_shape(), [seed]).to(student.device)
    cond, uncond = student.text([prompt]), student.text([""])
    ways = {"all blocks": None}
    if student.cache:
        blocks = "blocks {}-{}".format(*student.cache.blocks)
        ways.update({f"{blocks} re-used": Cache(student.cache.blocks), f"{blocks} corrected": student.cache})
    runs = [dmd.rollout(CachedSteps(student.mmdit, cache), noise, nodes, cond) for cache in ways.values()]
    above = contact_sheet(decode(student.vae, torch.cat([x0 for run in runs for x0 in clean_estimates(*run, nodes)])),
                          list(ways),
                          [f"step {k + 1}: sigma {sigma:.2f}" for k, sigma in enumerate(nodes[:-1])], width=128)

    training = json.loads(student.mmdit.metadata["training"])
    guidance, alpha = training.get("guidance", 7.0), training.get("alpha", 1.0)  # Stage II has no gate
    windows = dmd.step_windows(len(nodes) - 1, student.shift, whole=training.get("windows") == "whole")
    states, velocities = runs[-1]  # as it samples
    again = flow.initial_noise(student.latent_shape(), [seed + 1]).to(student.device)
    seen = [judgements(noised_sample(states, velocities, windows, level, again), level, teacher.mmdit, fake, cond,
                       uncond, guidance) for level in LEVELS]
    rows = {who: decode(student.vae, torch.cat([column[who] for column in seen])) for who in seen[0]}
    if fake is not None:
        guided = torch.tensor(LEVELS)[:, None, None, None] <= alpha
        real = torch.where(guided, rows["teacher, guided"], rows["teacher"])
        rows["direction: gated teacher - fake"] = (CONTRAST * (real - rows["fake score"])).clamp(-1, 1)
    headings = [f"sigma {level:g}" + (", guidance off" if level > alpha else "") for level in LEVELS]
    below = contact_sheet(torch.cat(list(rows.values())), list(rows), headings, width=128)
    both = Image.new("RGB", (max(above.width, below.width), above.height + below.height), "white")
    both.paste(above, (0, 0))
    both.paste(below, (0, above.height))
    return both


def clean_estimates(states, velocities, nodes):
    """Of a dmd.rollout: the clean estimate x̂0 at each step, the last of which is the sample."""
    return [flow.velocity_to_x0(x, v, sigma) for x, v, sigma in zip(states, velocities, nodes)]


def noised_sample(states, velocities, windows, sigma, noise):
    """A student's sample as Stage I sees it at level σ: the result of the step that owns σ, noised up (Sec. 3.2)."""
    k = int((windows.nodes[1:] >= sigma).sum())                                         # σ in (σ_{k+1}, σ_k]
    end = flow.euler_step(states[k], velocities[k], windows.nodes[k], windows.end[k])
    return flow.renoise(end, windows.end[k], sigma, noise)


def judgements(z, sigma, teacher, fake, cond, uncond, guidance):
    """What the networks take the state z (B, C, H, W) at level σ for: {who: x̂0}."""
    level = torch.full((len(z),), sigma, device=z.device)
    v_uncond, v_cond = flow.both_velocities(teacher, z, level, cond, uncond)
    velocities = {"teacher": v_cond, "teacher, guided": flow.guide(v_uncond, v_cond, guidance)}
    if fake is not None:
        velocities["fake score"] = fake(z, level, *cond)
    return {name: flow.velocity_to_x0(z, velocity, sigma) for name, velocity in velocities.items()}


if __name__ == "__main__":
    commandline.run_script(main)
