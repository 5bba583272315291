"""The paper's ablations and claims, run again in the tiny world, where the truth is known.

    python -m experiments.ablations                        all arms of all plans, five training runs of each
    python -m experiments.ablations --plan 1 --only "no gate" --seeds 1
    python -m experiments.ablations --seeds 0 --out experiments      the tables of the rows that are kept here

Each training run and each measurement is the command that one would type. Its row goes to --out/results.csv; what has a
row is not run again. The tables of arms and of claims are printed from these rows.
"""

import commandline  # first: it sets how threads wait before torch is loaded

import csv
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats

import weights
from commandline import CommandLine, UserError, from_zero
from pictures import to_picture, write_picture
from pipeline import TINY, is_finished, load_pipeline
from tinyworld import measures

OURS, OURS4 = "--stage 1", "--stage 1 --steps 4"
TDM, TDM4 = (f"{ours} --alpha 1 --density uniform" for ours in (OURS, OURS4))
BLOCKS = "--cache 1-4"
STAGE2, CACHED = (OURS, "--stage 2"), (OURS, f"{OURS} {BLOCKS} --student-lr 2e-4")
REDRAWN = "--stage 2 --redraw 10 --first-step --student-lr 5e-5"
RUNS = 5    # of each arm


class Claim(NamedTuple):
    """`better` is better than `worse` in a measure. Paired: the two start from the same runs of Stage I."""

    text: str
    paper: str
    better: str
    worse: str
    measure: str
    paired: bool = False


class Plan(NamedTuple):
    """What was written down before the first run that a claim looks at."""

    first_seed: int     # smaller ones were looked at before
    arms: dict          # {arm: (train.py's commands, each from the run of the one before; flags of evaluate.py)}
    claims: list


# TDM: no gate, and uniform levels; DMD: no windows of levels either. In Stage II without an f, G moves in its first
# 20 turns as well, so it has 200 turns and not 180. The paper's numbers are of SD3-Medium: FID to the guided teacher's
# samples, diversity as LPIPS between samples.
FIRST = Plan(100, {
    "ours, 2": ((OURS,), ""), "no gate": ((f"{OURS} --alpha 1",), ""),
    "no importance sampling": ((f"{OURS} --density uniform",), ""), "TDM, 2": ((TDM,), ""),
    "ours, 4": ((OURS4,), ""), "TDM, 4": ((TDM4,), ""), "DMD, 2": ((f"{TDM} --windows whole",), ""),
    "ours, 1": ((f"{OURS} --steps 1",), ""), "plain re-use": ((OURS,), BLOCKS), "ours, 1.67": (STAGE2, ""),
    "without f": ((OURS, "--stage 2 --correction none"), ""), "pruned": ((OURS, "--stage 2 --correction prune"), ""),
    "Stage I with the cache": (CACHED, "")}, [
    Claim("the gate keeps diversity", "Fig. 2, 3", "ours, 2", "no gate", "coverage"),
    Claim("the gate brings samples closer to the truth", "", "ours, 2", "no gate", "Fréchet"),
    Claim("importance sampling brings samples closer to the truth", "Fig. 10", "ours, 2", "no importance sampling",
          "Fréchet"),
    Claim("2 steps: ours is closer to the truth than TDM", "FID 16.7 (at 1.67) vs 19.3", "ours, 2", "TDM, 2", "Fréchet"),
    Claim("2 steps: ours is closer to the truth than DMD", "", "ours, 2", "DMD, 2", "Fréchet"),
    Claim("4 steps: ours is closer to the truth than TDM", "", "ours, 4", "TDM, 4", "Fréchet"),
    Claim("4 steps: ours is closer to the guided teacher than TDM", "FID 14.1 (both stages) vs 14.6", "ours, 4", "TDM, 4",
          "to reference"),
    Claim("plain re-use costs detail", "Fig. 12", "ours, 2", "plain re-use", "median", True),
    Claim("plain re-use costs prompts", "", "ours, 2", "plain re-use", "whole prompt", True),
    Claim("Stage II wins detail back", "Fig. 13", "ours, 1.67", "plain re-use", "median", True),
    Claim("Stage II wins prompts back", "", "ours, 1.67", "plain re-use", "whole prompt", True),
    Claim("f wins detail", "Sec. 3.4", "ours, 1.67", "without f", "median", True),
    Claim("a cache is better than leaving its blocks out", "", "ours, 1.67", "pruned", "median", True),
    Claim("1.67 evaluations are better than one step", "", "ours, 1.67", "ours, 1", "median"),
    Claim("Stage I's loss with the cache wins detail back", "ours", "Stage I with the cache", "plain re-use",
          "median", True)])
# Our additions to Stage II, chosen on seed 0. Stage I again, on another CPU; one 4-step student is all runs' reference.
SECOND = Plan(100, {
    "ours, 2": ((OURS,), ""), "plain re-use": ((OURS,), BLOCKS),
    "redrawn": ((OURS, f"{REDRAWN} --reference runs/stage1-4steps"), "")}, [
    Claim("redrawn Stage II wins detail back", "ours", "redrawn", "plain re-use", "median", True),
    Claim("redrawn Stage II wins prompts back", "ours", "redrawn", "plain re-use", "whole prompt", True),
    Claim("redrawn Stage II keeps diversity", "ours", "redrawn", "plain re-use", "coverage", True),
    Claim("redrawn 1.67 evaluations have the detail of 2", "ours", "redrawn", "ours, 2", "median", True)])
# Both additions one after the other, on fresh seeds. The 4-step student is again the same one for all runs.
WITH, BOTH = "Stage I with the cache", "… then redrawn"
THIRD = Plan(200, {
    "ours, 2": ((OURS,), ""), "plain re-use": ((OURS,), BLOCKS), WITH: (CACHED, ""),
    BOTH: ((*CACHED, f"{REDRAWN} --reference runs/stage1-4steps"), "")}, [
    Claim("Stage I's loss with the cache wins prompts back", "ours", WITH, "plain re-use", "whole prompt", True),
    Claim("Stage I's loss with the cache wins diversity", "ours", WITH, "plain re-use", "coverage", True),
    Claim("redrawn Stage II after it wins more detail", "ours", BOTH, WITH, "median", True),
    Claim("both together win prompts back", "ours", BOTH, "plain re-use", "whole prompt", True),
    Claim("both together have the detail of 2 evaluations", "ours", BOTH, "ours, 2", "median", True),
    Claim("both together have the prompts of 2 evaluations", "ours", BOTH, "ours, 2", "whole prompt", True)])
PLANS = {1: FIRST, 2: SECOND, 3: THIRD}
HIGHER = ("adherence", "whole prompt", "coverage")  # is better; of the other measures lower
MEASURES = ("adherence", "whole prompt", "coverage", "distance", "median", "90 %", "Fréchet", "to reference")
SHOWN = ("whole prompt", "coverage", "median", "Fréchet", "to reference")


def main():
    parser = CommandLine(description="Run the paper's ablations in the tiny world.")
    arms = list(dict.fromkeys(arm for plan in PLANS.values() for arm in plan.arms))
    parser.add_argument("--plan", action="append", type=int, choices=PLANS, help="may be given several times; default: all")
    parser.add_argument("--only", action="append", choices=arms, metavar="ARM", help="likewise; default: all of a plan")
    parser.add_argument("--seeds", type=from_zero, default=RUNS, help="training runs of each arm; 0: only print the tables")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"), help="a folder")
    args = parser.parse_args()
    args.out = args.out.resolve()
    weights.check_writable(args.out)
    for number in args.plan or PLANS:
        plan = PLANS[number]
        for seed in range(plan.first_seed, plan.first_seed + args.seeds):
            for arm in plan.arms:
                if arm in (args.only or arms) and seed not in values(read_rows(args.out, number), arm, "median"):
                    measure(args.out, number, arm, seed)
    for number in args.plan or PLANS:
        rows = read_rows(args.out, number)
        print(*table(rows), "", *claims(rows, PLANS[number].claims), "", sep="\n")


# ------------------------------------------------------------------------------------------------------------- runs

def measure(out, plan, arm, seed):
    """Train an arm, if need be, measure it, and add its row to results.csv."""
    train, evaluate = PLANS[plan].arms[arm]
    start, quality = time.monotonic(), out / "quality" / f"{plan}-{arm}-{seed}"
    run("evaluate.py", "quality", trained(out, train, seed), *evaluate.split(), "--reference", guided_teacher(out),
        "--out", quality)
    found, = json.loads((quality / "quality.json").read_text()).values()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    row = {"plan": plan, "arm": arm, "seed": seed, **{name: round(found[name], 5) for name in MEASURES},
           "train": "; ".join(train), "evaluate": evaluate, "commit": commit, "machine": machine,
           "date": time.strftime("%Y-%m-%d"), "minutes": round((time.monotonic() - start) / 60, 1)}
    file = out / "results.csv"
    new = not file.exists()
    with open(file, "a", newline="") as opened:
        writer = csv.DictWriter(opened, row)
        if new:
            writer.writeheader()
        writer.writerow(row)


def trained(out, commands, seed):
    """The folder of a training run, made now if it is not there. Each command but the first trains the run of those before
    it further. Stage II's real images come from the 4-step run of its seed."""
    name = "-".join(commands).replace("--", "").replace(" ", "-").replace("/", "-")
    folder, (*before, last) = out / "runs" / f"{name}-seed{seed}", commands
    if not is_finished(folder):
        words = last.split()
        if before:
            words += ["--student" if "--stage 2" in last else "--start", trained(out, before, seed)]
        if "--stage 2" in last and "--reference" not in words:
            words += ["--reference", trained(out, [OURS4], seed)]
        if folder.exists() and not (folder / "state.json").exists():
            shutil.rmtree(folder)  # it ended before its first state
        run("train.py", *words, "--bare", "--seed", seed, "--out", folder, *(["--resume"] if folder.exists() else []))
    return folder


def guided_teacher(out):
    """A folder of pictures by the teacher with w = 7, which students learn from: the paper's reference. Made once."""
    folder = out / "teacher"
    prompts, seeds, *_ = measures.prompts_to_measure(1024, samples=0)
    if len(list(folder.glob("*.png"))) < len(prompts):
        teacher = load_pipeline(TINY).sampled_with(28, 7.0)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            images = teacher.images(prompts, [10**6 + seed for seed in seeds])
        for i, image in enumerate(images):
            write_picture(to_picture(image), folder / f"{i:04}.png")
    return folder


def run(*words):
    words = [str(word) for word in words]
    print("python", *words, file=sys.stderr)
    if subprocess.run([sys.executable, *words], cwd=TINY.parent).returncode:
        raise UserError(f"`python {' '.join(words)}` failed")


# ------------------------------------------------------------------------------------------------------------ tables

def read_rows(out, plan):
    """The rows of a plan."""
    file = out / "results.csv"
    if not file.exists():
        return []
    with open(file, newline="") as opened:
        return [row for row in csv.DictReader(opened) if row["plan"] == str(plan)]


def values(rows, arm, measure):
    """{seed: value} of an arm."""
    return {int(row["seed"]): float(row[measure]) for row in rows if row["arm"] == arm}


def table(rows):
    """Markdown: a row for each arm, mean ± standard deviation over its training runs."""
    lines = [f"| | runs | {' | '.join(SHOWN)} |", "|" + "---|" * (2 + len(SHOWN))]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        cells = []
        for measure in SHOWN:
            found, digits = np.array([*values(rows, arm, measure).values()]), measures.DIGITS[measure]
            cells.append(f"{found.mean():.{digits}f}" + (f" ± {found.std(ddof=1):.{digits}f}" if len(found) > 1 else ""))
        lines.append(f"| {arm} | {len(found)} | {' | '.join(cells)} |")
    return lines


def claims(rows, plan):
    """Markdown: a row for each of a plan's claims whose two arms have all their runs.

    p is corrected for the number of the plan's claims; one that is not here yet counts as p = 1. So a verdict that is here
    today, other than "undecided", stays when the others have been run.
    """
    found = []
    for claim in plan:
        better, worse = (values(rows, arm, claim.measure) for arm in (claim.better, claim.worse))
        if claim.paired:
            seeds = better.keys() & worse.keys()
            better, worse = ({seed: arm[seed] for seed in seeds} for arm in (better, worse))
        if min(len(better), len(worse)) >= RUNS:
            a, b = np.array([*better.values()]), np.array([*worse.values()])
            test = stats.ttest_rel(a, b) if claim.paired else stats.ttest_ind(a, b, equal_var=False)  # Welch
            found.append((claim, a, b, test))
    corrected = holm([test.pvalue for *_, test in found] + [1.0] * (len(plan) - len(found)))
    lines = ["| claim | paper | here | difference, 95 % interval | p, corrected | verdict |", "|---|---|---|---|---|---|"]
    for (claim, a, b, test), p in zip(found, corrected):
        low, high = test.confidence_interval()
        good = (a.mean() > b.mean()) == (claim.measure in HIGHER)
        verdict = "undecided" if p >= 0.05 else "holds" if good else "the opposite holds"
        ours, theirs, difference, low, high = (f"{number:.{measures.DIGITS[claim.measure]}f}" for number in (
            a.mean(), b.mean(), a.mean() - b.mean(), low, high))
        p = f"{p:.3f}" if p >= 0.001 else "< 0.001"
        lines.append(f"| {claim.text} | {claim.paper} | {claim.measure} {ours} vs {theirs} | "
                     f"{difference} ({low} to {high}) | {p} | {verdict} |")
    return lines


def holm(ps):
    """p-values corrected for their number (Holm 1979)."""
    order = np.argsort(ps)
    scaled = np.minimum(1, np.take(ps, order) * np.arange(len(ps), 0, -1))
    return np.maximum.accumulate(scaled)[np.argsort(order)]


if __name__ == "__main__":
    commandline.run_script(main)
