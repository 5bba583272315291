"""The paper's ablations, run again in the tiny world, where the truth is known (`python evaluate.py ablate`).

Not part of the method. An *arm* is a way to train and to sample. An *ablation* puts some arms side by side. A *claim*
of the paper says in which measure one arm is above another. Arms that train alike share their runs.
"""

import json
import math
import re
import time
from collections import deque
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from scipy import stats
from tqdm import tqdm

import shapes
import tiny
import train
import weights
from cache import effective_nfe
from commandline import UserError
from networks import Arithmetic
from pictures import contact_sheet, figure_for, write_picture
from pipeline import DTYPES, TINY, is_finished, load_pipeline, open_sampler
from prompts import sheet_prompts
from report import Reconstruction, known_teacher


class Arm(NamedTuple):
    train: str = ""           # the flags of train.py; none: the teacher as it ships
    options: str = ""         # how it is sampled, as after the @ of a model (pipeline.split_model)
    start: str = "--stage 1"  # of Stage II: the flags that made the student it goes on from


class Claim(NamedTuple):
    """`above` is better than `below` in a measure (group, name) of shapes.measure; sign -1: where lower is better."""

    text: str
    above: str
    below: str
    measure: tuple
    sign: int = 1


class Ablation(NamedTuple):
    title: str
    arms: dict
    claims: list
    axis: str = ""          # of a plot: what x is,
    curves: dict = {}       # and {curve: {arm: x}}
    seeds: int = 3          # training runs of each kind; more for the claims that the paper stands on


COVERAGE, ADHERENCE, FIDELITY = ("coverage", "mean"), ("adherence", "mean"), ("fidelity", "mean")
DISTANCE, TO_TEACHER = ("distribution", "Fréchet distance"), ("distribution", "to the teacher")
COLUMNS = {  # of a report's tables: measure, digits
    "adherence": (ADHERENCE, 3), "whole prompt": (("adherence", "whole prompt"), 3), "coverage": (COVERAGE, 3),
    "distance to a scene": (FIDELITY, 4), "clean": (("fidelity", "clean"), 3),
    "16-32 cycles, dB": (("spectrum", "16-32 cycles"), 2), "Fréchet distance": (DISTANCE, 1),
    "to the teacher": (TO_TEACHER, 1), "precision": (("distribution", "precision"), 3),
    "recall": (("distribution", "recall"), 3), "diversity": (("distribution", "diversity"), 3)}

OURS, OURS4, STAGE2 = Arm("--stage 1"), Arm("--stage 1 --steps 4"), Arm("--stage 2")
FLOOR = Arm(options="autoencoder")  # no model: true scenes that went through the autoencoder
ALWAYS = Arm("--stage 1 --alpha 1")
# the methods before ours, as settings of the same code: without gate and importance sampling; DMD also without windows
TDM, TDM4 = (Arm(f"{arm.train} --alpha 1 --density uniform") for arm in (OURS, OURS4))
HALF = "--student-lr 5e-5 --fake-lr 2e-4"
DMD, DMD4 = (Arm(f"{arm.train} --windows whole") for arm in (TDM, TDM4))
SFD4 = Arm("--stage 2 --cache none", start=OURS4.train)  # both stages, no cache
REFERENCES = {OURS.train: OURS4, OURS4.train: Arm("--stage 1 --steps 8")}  # of Stage II, by the student it starts from
DISTILLED = {name: Arm(f"--stage 2 --objective {name}") for name in ("output+feature", "output", "feature")}
RANGES = {name: tuple(map(int, name.split("-")))
          for name in ("2-5", "5-8", "8-11", "3-4", "2-7", "2-8", "2-10", "1-10")}
WHERE, HOW_MANY = ("2-5", "5-8", "8-11"), ("3-4", "2-5", "2-7", "2-8", "2-10", "1-10")
PLAIN = {f"{blocks} plain": Arm(OURS.train, f"cache={blocks}") for blocks in RANGES}
TRAINED = {f"{blocks} co-trained": Arm(f"--stage 2 --cache {blocks}") for blocks in RANGES} | {"2-5 co-trained": STAGE2}
# importance sampling is to make training faster: looked at while it is under way
DENSITIES = {name: Arm(f"--stage 1 --iterations 60 --density {name}") for name in ("c", "a", "b", "d", "uniform")}


def evaluations(kind):
    """{arm: effective evaluations} of 2 steps with more and more blocks cached, and without a cache."""
    return {"none": 2.0, **{f"{name} {kind}": effective_nfe(tiny.DEPTH, RANGES[name], 2) for name in HOW_MANY}}


def some(arms, names):
    """Those of the arms whose labels begin with one of the names of RANGES."""
    return {label: arm for label, arm in arms.items() if label.split()[0] in names}


ABLATIONS = {
    "gate": Ablation(
        "Guidance gate and importance sampling, with and without (Fig. 2, 4, 8)",
        {"both: ours": OURS, "the gate alone": Arm("--stage 1 --density uniform"),
         "importance sampling alone": ALWAYS, "neither: TDM": TDM},
        [Claim("the gate keeps diversity", "both: ours", "importance sampling alone", COVERAGE),
         Claim("the gate brings samples closer to the truth", "both: ours", "importance sampling alone", DISTANCE, -1),
         Claim("importance sampling brings samples closer to the truth", "both: ours", "the gate alone", DISTANCE, -1),
         Claim("and brings detail", "both: ours", "the gate alone", FIDELITY, -1),
         Claim("both are more diverse than TDM", "both: ours", "neither: TDM", COVERAGE),
         Claim("both are closer to the truth than TDM", "both: ours", "neither: TDM", DISTANCE, -1)],
        seeds=8),
    "headline": Ablation(
        "Few-step students side by side",
        {"true scenes, autoencoded": FLOOR,
         **{f"teacher, {steps} × 2, w = 2": Arm(options=f"steps={steps},guidance=2") for steps in (28, 4, 2)},
         "teacher, 28 × 2, w = 7": Arm(options="steps=28,guidance=7"),
         "DMD, 4": DMD4, "TDM, 4": TDM4, "ours, 4, Stage I": OURS4, "ours, 4 (SFD)": SFD4,
         "DMD, 2": DMD, "TDM, 2": TDM, "ours, 2": OURS, "ours, 1.67": STAGE2},
        [Claim("2 steps: ours is closer to the truth than DMD", "ours, 2", "DMD, 2", DISTANCE, -1),
         Claim("4 steps: Stage I is closer to the truth than TDM", "ours, 4, Stage I", "TDM, 4", DISTANCE, -1),
         Claim("4 steps: both stages are closer to the truth than DMD", "ours, 4 (SFD)", "DMD, 4", DISTANCE, -1),
         Claim("ours at 1.67 is closer to the truth than TDM at 2", "ours, 1.67", "TDM, 2", DISTANCE, -1),
         Claim("ours at 1.67 has the detail of ours at 2", "ours, 1.67", "ours, 2", FIDELITY, -1)],
        seeds=5),
    "baselines": Ablation(
        "TDM at other settings: guidance and rates",
        {"TDM": TDM, "TDM, w = 3": Arm(f"{TDM.train} --guidance 3"),
         "TDM, twice the rates": Arm(f"{TDM.train} --student-lr 2e-4 --fake-lr 8e-4"),
         "TDM, half the rates": Arm(f"{TDM.train} {HALF}"),
         "ours": OURS, "ours, half the rates": Arm(f"{OURS.train} {HALF}")},
        [Claim("ours is closer to the truth than TDM at half the rates", "ours", "TDM, half the rates", DISTANCE, -1),
         Claim("and more diverse", "ours", "TDM, half the rates", COVERAGE),
         Claim("both at half the rates: ours is closer to the truth than TDM", "ours, half the rates",
               "TDM, half the rates", DISTANCE, -1),
         Claim("and more diverse", "ours, half the rates", "TDM, half the rates", COVERAGE)]),
    "cache": Ablation(
        "Block cache (Fig. 11, Table 5)",
        {"none": OURS, "plain re-use": PLAIN["2-5 plain"], "compensated, co-trained": STAGE2,
         "co-trained without f": Arm("--stage 2 --correction none"),
         "pruned, co-trained": Arm("--stage 2 --correction prune")},
        [Claim("plain re-use hurts adherence", "none", "plain re-use", ADHERENCE),
         Claim("plain re-use hurts detail", "none", "plain re-use", FIDELITY, -1),
         Claim("co-training wins adherence back", "compensated, co-trained", "plain re-use", ADHERENCE),
         Claim("co-training wins detail back", "compensated, co-trained", "plain re-use", FIDELITY, -1),
         Claim("f wins detail", "compensated, co-trained", "co-trained without f", FIDELITY, -1),
         Claim("a cache has more detail than a step with these blocks left out", "compensated, co-trained",
               "pruned, co-trained", FIDELITY, -1)],
        seeds=5),
    "detail": Ablation(
        "Stage II without a cache: what adversarial training adds to Stage I",
        {"Stage I, 2": OURS, "Stages I and II, 2": Arm("--stage 2 --cache none"),
         "the same, true scenes as real images": Arm("--stage 2 --cache none --reference truth"),
         "Stage I, 4": OURS4, "Stages I and II (SFD), 4": SFD4},
        [Claim("2 steps: Stage II adds detail to Stage I", "Stages I and II, 2", "Stage I, 2", FIDELITY, -1),
         Claim("2 steps: with true scenes it does", "the same, true scenes as real images", "Stage I, 2", FIDELITY, -1),
         Claim("4 steps: Stage II adds detail to Stage I", "Stages I and II (SFD), 4", "Stage I, 4", FIDELITY, -1)],
        seeds=5),
    "objective": Ablation(
        "Objective of Stage II (Fig. 13)",
        {"plain re-use": PLAIN["2-5 plain"], "adversarial": STAGE2,
         "adversarial + output + feature": Arm("--stage 2 --objective adv+output+feature"),
         **{f"{name}, distilled": arm for name, arm in DISTILLED.items()}},
        [*(Claim(f"adversarial alone has more detail than {name} alone", "adversarial", f"{name}, distilled", FIDELITY,
                 -1) for name in DISTILLED),
         Claim("and than adversarial with both", "adversarial", "adversarial + output + feature", FIDELITY, -1)]),
    "guidance": Ablation(
        "The gate, or less guidance",
        {"w = 7, gated above α = 0.9": OURS, "w = 7, never gated": ALWAYS,
         "w = 3, gated above α = 0.9": Arm("--stage 1 --guidance 3"),
         "w = 3, never gated": Arm("--stage 1 --guidance 3 --alpha 1"),
         "w = 2, gated above α = 0.9": Arm("--stage 1 --guidance 2")},
        [Claim("strong guidance and the gate are more diverse than weak guidance without", "w = 7, gated above α = 0.9",
               "w = 3, never gated", COVERAGE),
         Claim("and follow the prompt better", "w = 7, gated above α = 0.9", "w = 3, never gated", ADHERENCE),
         Claim("at w = 3, too, the gate brings samples closer to the truth", "w = 3, gated above α = 0.9",
               "w = 3, never gated", DISTANCE, -1)]),
    "alpha": Ablation(
        "Where the gate lies (Fig. 9)",
        {"α = 0.5": Arm("--stage 1 --alpha 0.5"), "α = 0.8": Arm("--stage 1 --alpha 0.8"),
         "α = 0.9": OURS, "α = 1": ALWAYS},
        [Claim("a lower α is more diverse", "α = 0.5", "α = 1", COVERAGE),
         Claim("a higher α keeps closer to the prompt", "α = 1", "α = 0.5", ADHERENCE)],
        "α: guidance is on up to this noise level",
        {"2-step student": {"α = 0.5": 0.5, "α = 0.8": 0.8, "α = 0.9": 0.9, "α = 1": 1.0}}),
    "range": Ablation(
        "Which blocks (Fig. 12)",
        {"none": OURS, **some(PLAIN, WHERE), **some(TRAINED, WHERE)},
        [Claim("plain re-use: earlier blocks rather than the last", "2-5 plain", "8-11 plain", ADHERENCE),
         Claim("co-trained: earlier blocks rather than the last", "2-5 co-trained", "8-11 co-trained", ADHERENCE)]),
    "frontier": Ablation(
        "How many blocks: how far below two evaluations",
        {"none": OURS, **some(PLAIN, HOW_MANY), **some(TRAINED, HOW_MANY), "1 step": Arm("--stage 1 --steps 1")},
        [Claim("1.67 evaluations, co-trained, have more detail than one", "2-5 co-trained", "1 step", FIDELITY, -1),
         Claim("so have 1.17", "1-10 co-trained", "1 step", FIDELITY, -1)],
        "effective evaluations",
        {"plain re-use": evaluations("plain"), "compensated, co-trained": evaluations("co-trained"),
         "one step": {"1 step": 1.0}}),
    "density": Ablation(
        "Densities of noise levels (Fig. 10), at 60 iterations",
        DENSITIES,
        [Claim(f"c is closer to the truth than {other}", "c", other, DISTANCE, -1)
         for other in ("uniform", "a", "b", "d")]),
}


# -------------------------------------------------------------------------------------------------------------- runs
# args: those of `evaluate.py ablate`, that is, seeds, device, dtype and out.

def run(names, args):
    """Train and measure all arms of the named ablations, seed after seed. Yields after each.

    What is finished is not done again, and a run that was stopped goes on. What another process is at is left for
    later, so that the same command may be started once for each core.
    """
    recogniser, teacher = shapes.load_recogniser(TINY), known_teacher(TINY)
    if teacher is None:
        raise UserError(f"{TINY}: {shapes.teacher_file(TINY).name} is of other files than lie there")
    jobs = deque(dict.fromkeys(
        (arm, seed) for seed in range(max(seeds_of(name, args.seeds) for name in names)) for name in names
        for arm in ABLATIONS[name].arms.values() if seed < (seeds_of(name, args.seeds) if arm.train else 1)))
    with tqdm(total=len(jobs), desc="ablations") as bar:
        while jobs:
            arm, seed = jobs.popleft()
            bar.set_postfix_str(f"seed {seed}: {arm.train or 'teacher'} {arm.options}")
            file = measured_file(args.out, arm, seed)
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                with FileLock(file.with_suffix(".lock"), blocking=False):
                    if not file.exists():
                        start = time.monotonic()
                        sampler = open_arm(arm, seed, args)
                        with arithmetic(args).passes():
                            found = shapes.measure(sampler.images, recogniser, **shapes.THOROUGH, teacher=teacher)
                        found["took"] = {"minutes": ((time.monotonic() - start) / 60, 0)}
                        weights.write_json(file, found)
            except (Timeout, weights.Busy):
                jobs.append((arm, seed))
                time.sleep(1)
                continue
            bar.update()
            yield


def seeds_of(name, wanted):
    """How many seeds an ablation has: so many as are `wanted`, or its own."""
    return wanted or ABLATIONS[name].seeds


def arithmetic(args):
    """That of a training run of the tiny preset."""
    return Arithmetic(args.device, DTYPES[args.dtype])


def open_arm(arm, seed, args):
    """An arm as a pipeline.Sampler. It is trained first, if it is not there yet."""
    if arm == FLOOR:
        return Reconstruction(load_pipeline(TINY, args.device).vae)
    if not arm.train:
        return open_sampler(f"{TINY}@{arm.options}", args.device)
    settings, folder = settings_of(arm, seed, args), folder_of(arm, seed, args.out)
    if not is_finished(folder):
        for before, its_seed in ((Arm(arm.start), seed), (reference_of(arm), 0)) if settings.stage == 2 else ():
            if before:
                open_arm(before, its_seed, args)
        with weights.alone_in(folder):
            {1: train.stage1, 2: train.stage2}[settings.stage](settings)
    if settings.stage == 2:
        train.check_stage2(settings)  # which fills in what the recipe names
    sampler = open_sampler(f"{folder}@{arm.options}" if arm.options else folder, args.device)
    if sampler.pipeline.carried("training") != json.loads(train.recipe(settings)):
        raise UserError(f"{folder}: made with other settings; remove it, or choose another --out")
    return sampler


def settings_of(arm, seed, args):
    """The settings of an arm's training run, as train.main has them."""
    words = [*arm.train.split(), "--seed", str(seed), "--out", str(folder_of(arm, seed, args.out)), "--resume",
             "--device", str(args.device), "--dtype", args.dtype]
    if "--stage 2" in arm.train:
        words += ["--student", str(folder_of(Arm(arm.start), seed, args.out))]
        if "--reference" not in arm.train:
            reference = reference_of(arm)
            words += ["--reference", str(folder_of(reference, 0, args.out) if reference else TINY)]
    settings = train.parse_arguments(words)
    settings.arithmetic = arithmetic(args)
    return settings


def reference_of(arm):
    """The arm that makes Stage II's real images: our student of twice as many steps. None: no other arm does.

    Its run of seed 0 serves all seeds: what differs between them is the student.
    """
    return None if "--reference" in arm.train else REFERENCES.get(arm.start)


def slug(text):
    return re.sub(r"[^\w.+-]+", "-", text.replace("--", "")).strip("-")


def origin(arm):
    return f" from {arm.start}" if arm.start != OURS.train else ""


def folder_of(arm, seed, out):
    return out / "runs" / f"{slug(arm.train + origin(arm))}-seed{seed}"


def measured_file(out, arm, seed):
    name = slug(f"{arm.train or 'teacher'}{origin(arm)} {arm.options}")
    return out / "measured" / f"{name}-seed{seed}.json"


# ------------------------------------------------------------------------------------------------------------ report

def numbers(out, arm, measure):
    """A measure of an arm, of all seeds that were measured -> {seed: (value, its standard error by bootstrap)}."""
    files, (group, name) = measured_file(out, arm, "*"), measure
    return {int(file.stem.rpartition("seed")[2]): json.loads(file.read_text())[group][name]
            for file in files.parent.glob(files.name)}


def spread(found):
    """Mean and standard deviation over seeds, of `numbers`; of a single one, its standard error."""
    values, errors = np.array([*found.values()]).T
    return values.mean(), values.std(ddof=1) if len(values) > 1 else errors[0]


def difference(above, below, sign):
    """Of the same seeds, (n,) and (n,): mean difference, half its 95 % t-interval, and its p (Student's, two-sided)."""
    found, n = sign * (above - below), len(above)
    if n < 2:
        return found.mean() if n else float("nan"), float("nan"), 1.0
    error = found.std(ddof=1) / n**0.5
    p = 2 * stats.t.sf(abs(found.mean()) / max(error, 1e-12), n - 1)
    return found.mean(), stats.t.ppf(0.975, n - 1) * error, p


def holm(ps):
    """p-values corrected for their number (Holm 1979): if all claims were false, one or more pass in 5 of 100 cases."""
    order, corrected, least = np.argsort(ps), np.empty(len(ps)), 0.0
    for rank, i in enumerate(order):
        least = corrected[i] = max(least, min(1.0, (len(ps) - rank) * ps[i]))
    return corrected


def verdict(mean, p):
    return "undecided" if p >= 0.05 else "reproduced" if mean > 0 else "not reproduced"


def judged(names, out):
    """{(ablation, claim): (mean difference, half its interval, p corrected for their number, the first two in the
    distance to the teacher, or None)}, of the claims whose arms were measured. Of one seed, p is 1.
    """
    def measured(name, claim, measure):
        above, below = (numbers(out, ABLATIONS[name].arms[arm], measure) for arm in (claim.above, claim.below))
        seeds = above.keys() & below.keys()
        return difference(*(np.array([found[seed][0] for seed in seeds]) for found in (above, below)), claim.sign)

    found = {(name, claim): measured(name, claim, claim.measure) for name in names for claim in ABLATIONS[name].claims}
    found = {key: values for key, values in found.items() if not math.isnan(values[0])}
    tested = {key: p for key, (_, half, p) in found.items() if not math.isnan(half)}
    corrected = dict(zip(tested, holm(list(tested.values()))))
    return {(name, claim): (mean, half, corrected.get((name, claim), 1.0),
                            measured(name, claim, TO_TEACHER)[:2] if claim.measure == DISTANCE else None)
            for (name, claim), (mean, half, _) in found.items()}


def report(names, out):
    """Markdown: for each ablation a table of its arms, one of its claims, and what pictures there are."""
    found = judged(names, out)
    rows = {name: [row_of_claim(claim, *values) for (owner, claim), values in found.items() if owner == name]
            for name in names}
    tested = sum(not math.isnan(half) for _, half, *_ in found.values())
    lines = [f"A claim is reproduced, or not, where its p is below 0.05, corrected for their number, {tested} "
             "(Holm); else it is undecided. Differences have their own 95 % intervals.", ""]
    took = sum(minutes for arm in {arm for name in names for arm in ABLATIONS[name].arms.values()}
               for minutes, _ in numbers(out, arm, ("took", "minutes")).values())
    lines[0] += f" All of it took {took / 60:.1f} hours of one process."
    for name in names:
        ablation = ABLATIONS[name]
        lines += [f"### {ablation.title}", "", *table(ablation.arms, out), ""]
        lines += [*HEAD_OF_CLAIMS, *rows[name], ""] if rows[name] else []
        for picture in (f"{name}.png", f"{name}-curve.png"):
            if (out / picture).exists():
                lines += [f"![{ablation.title}]({picture})", ""]
    return "\n".join(lines)


def table(arms, out, columns=COLUMNS, head=""):
    """Markdown: a row for each arm that was measured, mean ± standard deviation over training runs."""
    lines = [f"|{head} | seeds | {' | '.join(columns)} |", "|" + "---|" * (2 + head.count("|") + len(columns))]
    for label, arm in arms.items():
        found = {name: numbers(out, arm, measure) for name, (measure, _) in columns.items()}
        runs = len(found["adherence"])
        if runs:
            cells = [label, str(runs) if arm.train else ""]
            for name, (_, digits) in columns.items():
                mean, deviation = spread(found[name])
                cells.append(f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if runs > 1 else ""))
            lines.append(f"| {' | '.join(cells)} |")
    return lines


HEAD_OF_CLAIMS = ("| claim | measure | difference | p, corrected | verdict | in the distance to the teacher |",
                  "|---|---|---|---|---|---|")


def row_of_claim(claim, mean, half, p, there):
    """there: mean difference and half interval in the paper's own measure, the distance to the teacher, or None."""
    measure = " ".join(claim.measure).replace("distribution ", "").replace(" mean", "")
    digits = 4 if claim.measure == FIDELITY else 3

    def shown(mean, half):
        return f"{claim.sign * mean:+.{digits}f}" + (", one seed" if math.isnan(half) else f" ± {half:.{digits}f}")

    agrees = f"{shown(*there)}, {'agrees' if there[0] * mean > 0 else 'does not'}" if there else ""
    return f"| {claim.text} | {measure} | {shown(mean, half)} | {p:.3f} | {verdict(mean, p)} | {agrees} |"


def sheet(name, args, rows=6):
    """A contact sheet of an ablation: a row a prompt, a column an arm, all of seed 0 and of the same noise."""
    arms = ABLATIONS[name].arms
    prompts = sheet_prompts(None, rows)
    samplers = [open_arm(arm, 0, args) for arm in arms.values()]
    with arithmetic(args).passes():
        columns = [sampler.images(prompts, range(1, rows + 1)) for sampler in samplers]
    images = torch.stack(columns, dim=1).flatten(0, 1)                                  # (rows · arms, 3, H, W)
    headings = [arm.replace("×", "x").replace("α", "alpha") for arm in arms]            # PIL's own font is without
    write_picture(contact_sheet(images, prompts, headings), args.out / f"{name}.png")


def plot(name, out):
    """Four measures along an ablation's axis, of the arms that were measured, where matplotlib is installed."""
    ablation = ABLATIONS[name]
    measures = {"adherence": ADHERENCE, "coverage": COVERAGE, "distance to a scene": FIDELITY,
                "Fréchet distance": DISTANCE}
    with figure_for(out / f"{name}-curve.png", size=(16, 3.5)) as figure:
        if figure is None:
            return
        for axes, (title, measure) in zip(figure.subplots(1, len(measures)), measures.items()):
            for curve, points in ablation.curves.items():
                found = {arm: numbers(out, ablation.arms[arm], measure) for arm in points}
                known = {arm: spread(values) for arm, values in found.items() if values}
                means, errors = zip(*known.values())
                axes.errorbar([points[arm] for arm in known], means, errors, fmt="o", capsize=3, label=curve)
                for arm, mean in zip(known, means):
                    label = re.sub(" (plain|co-trained)$", "", arm)  # as the legend has it
                    axes.annotate(label, (points[arm], mean), (4, 3), textcoords="offset points", fontsize=6)
            axes.set(xlabel=ablation.axis, ylabel=title)
            axes.grid(alpha=0.3)
        axes.legend()
