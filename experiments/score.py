"""How far teacher, guided teacher and fake score are from the true score, level by level (what Fig. 2 draws).

    python -m experiments.score runs/stage1

Where does guidance cease to point at the truth? Only the tiny world can tell: its true score is a closed form.
"""

import commandline  # first: it sets how threads wait before torch is loaded

import json
from pathlib import Path

import torch
import torch.nn.functional as F

import dmd
import flow
import weights
from cache import CachedSteps
from commandline import DEVICE, CommandLine, UserError, count, find_device
from experiments.explain import noised_sample
from mmdit import load_mmdit
from pipeline import TINY, load_pipeline
from tinyworld import scenes
from tinyworld.truth import true_velocity

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)


def main():
    parser = CommandLine(description="The networks of a Stage I run of the tiny world beside the true score.")
    parser.add_argument("run", help="a run of Stage I, which keeps its fake score")
    parser.add_argument("--teacher", default=str(TINY), help="the teacher that it was distilled from")
    parser.add_argument("--captions", type=count, default=256, help="to take the mean over")
    parser.add_argument("--device", type=find_device, default=DEVICE, help="where it runs")
    parser.add_argument("--out", type=Path, default=Path("runs/score"), help="a folder")
    args = parser.parse_args()
    weights.check_writable(args.out)
    if not (Path(args.run) / "fake").exists():
        raise UserError(f"{args.run}: holds no fake score; name a run of Stage I")
    teacher, student = load_pipeline(args.teacher, args.device), load_pipeline(args.run, args.device)
    found = compare(teacher, student, load_mmdit(Path(args.run) / "fake", args.device), args.captions)
    rows = [f"| {level:g} | {' | '.join(f'{value:.3g}' for value in row.values())} |"
            for level, row in zip(LEVELS, found)]
    text = "\n".join([f"| σ | {' | '.join(found[0])} |", "|" + "---|" * (1 + len(found[0])), *rows])
    print(text)
    weights.write_text(args.out / "score.md", text + "\n")


@torch.no_grad()
def compare(teacher, student, fake, captions, seed=0):
    """-> for each of LEVELS a row {what: number}, a mean over random captions with one noisy latent each.

    Root mean square errors of the velocity on noised true scenes (teacher, guided) and on the student's noised samples
    (teacher there, guided there, fake score). Cosines, there, of the direction of Stage I without and with guidance,
    v_F - v_T, with the true one, v_F - v*.
    """
    generator = torch.Generator().manual_seed(seed)
    training = json.loads(student.mmdit.metadata["training"])
    windows = dmd.step_windows(len(student.sigmas) - 1, teacher.shift, whole=training["windows"] == "whole")
    prompts, labels, named = scenes.draw_captions(captions, generator)
    latents = scenes.encode(teacher.vae, scenes.LABELS).float()                         # (4800, C, h, w)
    allowed = scenes.allowed(labels, named).to(latents.device)
    x0 = latents[(scenes.LABELS[None] == labels[:, None]).all(2).int().argmax(1)]
    cond, uncond = teacher.text(prompts), teacher.text([""])
    start, noise = torch.randn(2, *x0.shape, generator=generator).to(x0)
    states, velocities = dmd.rollout(CachedSteps(student.mmdit, student.cache), start, student.sigmas, cond)

    def seen(x, level):
        """The true, the teacher's and the guided teacher's velocity."""
        v_uncond, v_cond = flow.both_velocities(teacher.mmdit, x, level, cond, uncond)
        return true_velocity(x, level, latents, allowed), v_cond, flow.guide(v_uncond, v_cond, training["guidance"])

    def cosine(one, other):
        return F.cosine_similarity(one.flatten(1), other.flatten(1)).mean().item()

    rows = []
    for sigma in LEVELS:
        level = torch.full((captions,), sigma, device=x0.device)
        true, plain, guided = seen(flow.add_noise(x0, noise, level), level)
        z = noised_sample(states, velocities, windows, sigma, noise)
        true_there, plain_there, guided_there = seen(z, level)
        v_fake = fake(z, level, *cond)
        pairs = {"teacher": (plain, true), "guided": (guided, true), "teacher there": (plain_there, true_there),
                 "guided there": (guided_there, true_there), "fake score": (v_fake, true_there)}
        errors = {name: F.mse_loss(*pair).sqrt().item() for name, pair in pairs.items()}
        rows.append({**errors, "cosine": cosine(v_fake - plain_there, v_fake - true_there),
                     "cosine guided": cosine(v_fake - guided_there, v_fake - true_there)})
    return rows


if __name__ == "__main__":
    commandline.run_script(main)
