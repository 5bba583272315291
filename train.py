"""Train a few-step student of an SD3 model.

    python train.py --stage 1      Stage I, distribution matching: a student of 2 steps (dmd.py)
    python train.py --stage 2      Stage II, adversarial, with cached blocks: 1.67 steps (adversarial.py, cache.py)
    python train.py --stage 0      make the tiny SD3 that the other commands use by default (tiny.py, shapes.py)

A run writes to --out: the model in the diffusers folder layout, log.jsonl, contact sheets, metrics.json where the truth
is known (the tiny world), and its state, from which --resume goes on. On many GPUs: `torchrun --nproc_per_node=N
train.py …` (parallel.py). The file reads in the order of a run: settings, the three stages, the one loop, what the
stages share.
"""

import argparse
import contextlib
import hashlib
import json
import math
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import adversarial
import commandline
import dmd
import parallel
import report
import shapes
import tiny
import weights
from cache import CORRECTIONS, Cache, check_blocks, describe_cost, load_cache, new_cache
from commandline import CommandLine, UserError, count, number, positive
from mmdit import read_shapes, save_mmdit
from networks import (Arithmetic, NotFinite, adamw, descend, fast_bf16, frozen_network, open_networks, trainable,
                      whole)
from pictures import write_picture
from pipeline import DTYPES, TINY, Sampler, fake_folder, is_finished, load_pipeline, save_pipeline
from prompts import CachedText, draw_prompts, open_prompts, read_prompts, seeded, sheet_prompts

# ------------------------------------------------------------------------------------------------------- settings
# name: (default, type of its flag, meaning). Without a type there is no flag: the preset alone decides. The defaults
# are those of the released configuration for SD3-Medium, but for the cache: released are blocks 2-7, 1.75 evaluations;
# 8 blocks make the paper's 1.67, and where they lie is ours. The paper's symbols stand in the meanings.

from_zero = number(0, kind=int)
BOTH = {
    "model": (None, str, "the teacher: file, folder or Hugging Face id"),
    "prompts": (None, str, "a file of prompts (default: captions of the tiny world, drawn on the fly)"),
    "steps": (2, [1, 2, 4, 8], "n, of the student"),
    "student_clip": (2.0, None, "largest norm of the gradient"),
    "weight_decay": (1e-4, None, "of AdamW"),
    "at_once": (1, from_zero, "samples that a device works on at once, the rest of the batch is accumulated; 0: all"),
    "recompute": (True, None, "run each block again for its backward pass, instead of keeping its activations"),
    "offload": (False, bool, "keep the optimisers' states in the CPU's memory between updates"),
}
STAGE1 = {
    **BOTH,
    "iterations": (500, count, "of fake score and student, 1 : 1"),
    "batch": (64, count, "over all processes"),
    "student_lr": (5e-6, positive, "learning rate of G; three times that with --lora"),
    "fake_lr": (4e-5, positive, "learning rate of F; likewise"),
    "betas": ((0.0, 0.999), None, "of AdamW"),
    "fake_clip": (1.0, None, "largest norm of F's gradient"),
    "guidance": (7.0, number(0), "w of Eq. (4), the teacher's"),
    "alpha": (0.96, number(0), "α of Eq. (4): guidance is on up to this noise level; 1: always"),
    "density": ("c", list(dmd.DENSITIES), "how the student's noise levels are drawn (Fig. 10)"),
    "windows": ("step", ["step", "whole"], "levels that a step is compared at: its own window (TDM), or all (DMD)"),
    "lora": (0, from_zero, "rank of adapters over one frozen network that all three share; 0: all weights"),
}
OBJECTIVES = ["adv", "adv+output+feature", "output+feature", "output", "feature"]
STAGE2 = {
    **BOTH,
    "steps": (None, [2, 4, 8], "n; default: as many as the student has"),
    "student": (None, str, "to start from; default: this preset's Stage I run, of 2 steps or of --steps"),
    "reference": (None, str, "makes the real images; default: this preset's student of twice as many steps, the one "
                  "after both stages first, else the teacher; truth: true scenes (tiny world)"),
    "backbone": ("laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup", str, "the discriminator's ConvNeXt"),
    "cache": ((2, 9), commandline.blocks, "A-B: blocks, from 0, that only the first step runs (Fig. 12); slow: "
              "SD3-Medium's released 2-7; fast: its 2-9; or none"),
    "correction": ("mlp", list(CORRECTIONS), "of the cached residual Δ0: f, an MLP; none, as it is; prune, 0 instead"),
    "objective": ("adv", OBJECTIVES, "adversarial, distillation of output or feature, or several (Fig. 13)"),
    "output_weight": (1.0, None, "of the velocity's distillation"),
    "feature_weight": (1.0, None, "of the residual's distillation"),
    "iterations": (4000, count, "updates of either side"),
    "batch": (32, count, "over all processes"),
    "student_lr": (1e-5, positive, "learning rate of G"),
    "compensator_lr": (1e-3, positive, "learning rate of f"),
    "discriminator_lr": (1e-5, positive, "learning rate of the heads"),
    "betas": ((0.9, 0.95), None, "of AdamW"),
    "alone": (50, None, "updates of the discriminator before the generator's first"),
    "turns": (2, None, "updates of the discriminator for each of the generator"),
    "warmup": (317, None, "updates of f before G moves: what the released 1,000 of every kind come to"),
    "decay": (False, None, "let the generator's rates fall to zero"),
    "lora": (64, from_zero, "rank of the adapters that are trained; 0: all weights"),
}
STAGES = {0: {}, 1: STAGE1, 2: STAGE2}
FASTER = {"at_once": 0, "recompute": False}  # where memory is no matter
PRESETS = {  # what differs from these defaults; the number of cached blocks is the paper's, where they lie is ours
    "tiny": {"model": str(TINY),
             1: {**FASTER, "iterations": 200, "batch": 32, "student_lr": 1e-4, "fake_lr": 4e-4, "alpha": 0.90},
             2: {**FASTER, "iterations": 500, "student_lr": 2e-5, "discriminator_lr": 2e-3, "output_weight": 16.0,
                 "feature_weight": 0.02, "cache": (2, 5), "lora": 0, "alone": 200, "warmup": 10, "decay": True,
                 "backbone": str(TINY)}},
    "sd3-medium": {"model": "stabilityai/stable-diffusion-3-medium-diffusers"},
    "sd3.5-medium": {"model": "stabilityai/stable-diffusion-3.5-medium"},
    "sd3.5-large": {"model": "stabilityai/stable-diffusion-3.5-large", 2: {"cache": (3, 12)}},
}
TRUTH = "truth"             # the --reference that draws true scenes
GROUPS = {  # of the flags, in --help
    "networks and prompts": "model prompts student reference backbone",
    "the method": "steps guidance alpha density windows cache correction objective",
    "optimisation": "iterations batch student_lr fake_lr compensator_lr discriminator_lr lora",
    "memory": "at_once offload"}
SAVES_MEMORY = ("at_once", "recompute", "offload")  # and changes nothing
LORA_RATE = 3               # Stage I: how much faster adapters learn than all weights do, unless rates are given
LOG_EVERY, SHEET_EVERY, SAVE_SECONDS = 10, 100, 60
PATIENCE = 5                # iterations in a row that are not finite and are left out, before the run ends


def parse_arguments(words=None):
    """The settings of a run: those of its preset, but for what the command line (or a list of words) says."""
    first = CommandLine(add_help=False)
    first.add_argument("--stage", type=int, choices=STAGES, help="1, 2: to distil; 0: to make the tiny SD3")
    first.add_argument("--preset", choices=PRESETS, default="tiny", help="sets the other defaults (default: tiny)")
    stage, preset = vars(first.parse_known_args(words)[0]).values()
    defaults = {**{name: default for name, (default, *_) in STAGES.get(stage, {}).items()},
                **PRESETS[preset].get(stage, {}), **({"model": PRESETS[preset]["model"]} if stage else {})}

    parser = CommandLine(parents=[first], usage="train.py --stage {0,1,2} [--preset NAME] [--resume] [FLAG X ...]",
                         description="Distil an SD3 model into a few-step student. Each stage has flags of its own: "
                         "--stage 1 --help")
    titled = {title: parser.add_argument_group(title) for title in GROUPS}
    groups = {name: titled[title] for title, names in GROUPS.items() for name in names.split()}
    for name, (_, kind, meaning) in STAGES.get(stage, {}).items():
        if kind is not None:
            default = defaults[name]
            shown = "-".join(map(str, default)) if isinstance(default, tuple) else \
                str(default).removeprefix(f"{TINY.parent}/")
            parsed = {"action": "store_true"} if kind is bool else {"choices": kind, "type": type(kind[0])} \
                if isinstance(kind, list) else {"type": kind, "metavar": "X"}
            groups[name].add_argument(
                f"--{name.replace('_', '-')}", **parsed, default=argparse.SUPPRESS,
                help=meaning + ("" if default is None or default is False else f" (default: {shown})"))
    run = parser.add_argument_group("the run")
    if stage:
        run.add_argument("--text-cache", default="runs/text", metavar="DIR",
                         help="where the encoded prompts of official models go (default: runs/text)")
    run.add_argument("--seed", type=commandline.seed, default=0, help="of all that is random (default: 0)")
    run.add_argument("--device", help="default: cuda if there is one, else cpu")
    run.add_argument("--dtype", choices=["bf16", "fp32"], help="of the arithmetic; default: bf16 where it is faster")
    run.add_argument("--out", type=commandline.output(), help="a folder; default: runs/stage0, runs/stage1, "
                     "runs/stage1-4steps (for --steps 4), runs/stage2, …; of official models below runs/PRESET")
    run.add_argument("--resume", action="store_true", help="go on from where the run in --out stopped")
    args = parser.parse_args(words)
    if stage is None:
        raise UserError("--stage is missing: 1 or 2 to distil, 0 to make the tiny SD3")

    if stage == 1 and getattr(args, "lora", defaults["lora"]):
        defaults.update({name: LORA_RATE * defaults[name] for name in ("student_lr", "fake_lr")})
    for name, default in defaults.items():
        if not hasattr(args, name):
            setattr(args, name, default)
    args.device = commandline.find_device(args.device)
    args.dtype = args.dtype or ("bf16" if fast_bf16(args.device) else "fp32")
    args.out = Path(args.out or run_folder(preset, stage, getattr(args, "steps", None)))
    weights.check_writable(args.out / "log.jsonl")
    if any(args.out.glob("[!.]*")) and not args.resume:
        raise UserError(f"{args.out} holds a run already: go on with --resume, or choose another --out")
    return args


def run_folder(preset, stage, steps=None):
    """Where a run goes, and where Stage II looks for the runs before it."""
    folder = Path("runs") if preset == "tiny" else Path("runs") / preset
    return folder / (f"stage{stage}" + (f"-{steps}steps" if steps not in (None, 2) else ""))


def main():
    args = parse_arguments()
    if is_finished(args.out) and parallel.read_header(args.out) is None:
        raise UserError(f"{args.out} holds a model, but no run to go on with; choose another --out")
    args.device = parallel.start(args.device)
    args.arithmetic = Arithmetic(args.device, DTYPES[args.dtype])
    with weights.alone_in(args.out) if parallel.is_first() else contextlib.nullcontext():
        {0: stage0, 1: stage1, 2: stage2}[args.stage](args)
    parallel.stop()


# -------------------------------------------------------------------------------------------------------- Stage I

def stage1(args):
    """Stage I (Fig. 3), structure-focused distribution matching (Sec. 3.2, 3.3): teacher, fake score and student."""
    micro_batches = parallel.micro_batches(args.batch, args.at_once)
    prompts, text = open_prompts(args)
    frozen, (student, fake), learned = open_networks(args.model, 2, args.arithmetic, args.lora, True, args.seed)
    student.recompute = fake.recompute = args.recompute
    teacher = load_pipeline(args.model, args.device, mmdit=frozen, text=text)
    windows = dmd.step_windows(args.steps, teacher.shift, whole=args.windows == "whole")
    density, uncond = dmd.importance_density(args.density), text([""])
    optimizers = {"student_adamw": adamw([(student, args.student_lr)], args.betas, args.weight_decay),
                  "fake_adamw": adamw([(fake, args.fake_lr)], args.betas, args.weight_decay)}

    def iterate(step):
        """One iteration: the fake score learns and moves first; then the student meets it (dmd.iteration)."""
        generator = seeded(args.seed, step)
        words = draw_prompts(prompts, args.batch, generator)
        batch = dmd.draw_batch(args.batch, teacher.latent_shape(), windows, density, generator)
        parts = []
        for rows, everyone in micro_batches:
            part = dmd.of_each(lambda tensor: parallel.to_device(tensor[rows], args.device), batch)
            part.steps[-1] = batch.steps[everyone].max()  # processes that share weights must call them equally often
            cond = text([words[row] for row in rows])
            parts.append(dmd.iteration(student, fake, teacher.mmdit, part, windows, cond, uncond, args.guidance,
                                       args.alpha))
        fake_loss = accumulate(args, lambda part: {"fake": next(part)}, parts)
        descend([optimizers["fake_adamw"]], fake_loss, args.fake_clip, {"σ": batch.fake.sigma, "prompts": words},
                args.offload)
        student_loss = accumulate(args, lambda part: {"student": next(part)}, parts)
        norm = descend([optimizers["student_adamw"]], student_loss, args.student_clip,
                       {"σ": batch.student.sigma, "prompts": words}, args.offload)
        guided = (batch.student.sigma <= args.alpha).float().mean()  # of the samples of this iteration
        return {**fake_loss, **student_loss, "norm": norm, "guided": guided}

    of_teacher = partial(Sampler, teacher, folder=args.model)
    samplers = {
        "student": Sampler(replace(teacher, mmdit=student), {"sigmas": windows.nodes, "guidance": 1.0}),
        f"teacher, 28 steps, w = {args.guidance:g}": of_teacher({"steps": 28, "guidance": args.guidance}),
        f"teacher, {args.steps} steps": of_teacher({"sigmas": windows.nodes, "guidance": args.guidance})}
    run = Run(args, "stage 1", dict(zip(("student", "fake"), learned)), optimizers)
    distil(args, run, iterate, samplers, prompts, args.model, fake)


# ------------------------------------------------------------------------------------------------------- Stage II

def stage2(args):
    """Stage II (Fig. 3), adversarial refinement with cached blocks (Sec. 3.3, 3.4), trained as the student samples."""
    micro_batches = parallel.micro_batches(args.batch, args.at_once)
    check_stage2(args)
    backbone = adversarial.load_backbone(args.backbone, args.device) if "adv" in args.objective else None
    prompts, text = open_prompts(args)
    frozen, (student,), (learned,) = open_networks(args.student, 1, args.arithmetic, args.lora, False, args.seed)
    original = replace(load_pipeline(args.student, args.device, mmdit=frozen, text=text), cache=None)
    reference = load_reference(args, original) if backbone and args.reference != TRUTH else None
    nodes, uncond = original.sigmas(args.steps), text([""])
    torch.manual_seed(args.seed)  # for the initial weights alone
    cache = args.cache and new_cache(args.cache, frozen.pos_embed.shape[2], args.device, args.correction)
    discriminator = adversarial.Discriminator(backbone).to(args.device) if backbone else None
    for network in filter(None, (student, original.vae.decoder, backbone)):
        network.recompute = args.recompute

    learning, rates = {"student": learned}, [(student, args.student_lr)]
    if cache and args.correction == "mlp":
        learning["compensator"] = cache.compensator
        rates.append((cache.compensator, args.compensator_lr))
    optimizers = {"generator_adamw": adamw(rates, args.betas, args.weight_decay)}
    if discriminator:
        learning["heads"], heads = discriminator.heads, [(discriminator.heads, args.discriminator_lr)]
        optimizers["discriminator_adamw"] = adamw(heads, args.betas, args.weight_decay)
    distillation = [getattr(args, f"{name}_weight") if name in args.objective else 0
                    for name in ("output", "feature")]
    turns = (args.alone, args.turns) if discriminator else (0, 0)  # without one, every update is the generator's

    def iterate(step):
        """One update: the turn of one side (adversarial.py)."""
        generator = seeded(args.seed, step)
        words = draw_prompts(prompts, args.batch, generator)
        noise = torch.randn(args.batch, *original.latent_shape(), generator=generator)
        scenes = torch.randint(2**31, (args.batch,), generator=generator).tolist()  # seeds, for --reference truth
        generators_turn = adversarial.is_generator_turn(step, *turns)
        if discriminator:
            discriminator.heads.requires_grad_(not generators_turn).train(not generators_turn)

        def turn(part):
            *inputs, real = part
            inputs = student, cache, *inputs, original.vae.decode, discriminator
            if generators_turn:
                return adversarial.generator_losses(*inputs, *distillation)
            losses = adversarial.discriminator_loss(*inputs, real)
            discriminator.heads.eval()  # spectral norm: one power iteration an update, not a micro-batch
            return losses

        def real_of(rows):
            if reference:
                return partial(reference.sample, uncond=uncond)
            some, seeds = [words[row] for row in rows], [scenes[row] for row in rows]
            return lambda noise, cond: shapes.true_latents(original.vae, some, seeds)

        parts = [(parallel.to_device(noise[rows], args.device), nodes, text([words[row] for row in rows]),
                  real_of(rows)) for rows, _ in micro_batches]
        losses = accumulate(args, turn, parts)
        inputs = {"σ": nodes, "prompts": words}
        if not generators_turn:
            # released: not clipped
            descend([optimizers["discriminator_adamw"]], losses, math.inf, inputs, args.offload)
            return losses
        if "compensator" in learning and adversarial.generator_turns(step, *turns) < args.warmup:
            for parameter in trainable(student):  # at rest; requires_grad stays, FSDP2 would not notice its change
                parameter.grad = None
        for group, (_, lr) in zip(optimizers["generator_adamw"].param_groups, rates):
            group["lr"] = lr * (1 - step / args.iterations if args.decay else 1)
        norm = descend([optimizers["generator_adamw"]], losses, args.student_clip, inputs, args.offload)
        return {**losses, "norm": norm}

    options = {"sigmas": nodes, "guidance": 1.0}
    refined = replace(original, mmdit=student, cache=cache)
    plain = {"Stage I, plain re-use": Sampler(replace(original, cache=Cache(args.cache)), options)} if cache else {}
    samplers = {"Stage I student": Sampler(original, options, args.student), **plain,
                "student": Sampler(refined, options),
                **({"reference": Sampler(reference, {}, args.reference)} if reference else {})}
    distil(args, Run(args, "stage 2", learning, optimizers), iterate, samplers, prompts, args.student)
    parallel.say(describe_cost(student, *original.latent_shape()[1:], uncond[0].shape[1], len(nodes) - 1, cache))


def check_stage2(args):
    """Refuse what does not fit together before the first slow step. Fills in student, reference and steps."""
    start = run_folder(args.preset, 1, args.steps or 2)
    if args.student is None and not is_finished(start):
        steps = f" --steps {args.steps}" if args.steps not in (None, 2) else ""
        raise UserError(f"Stage II starts from a Stage I student: none in {start}; run `python train.py --stage 1"
                        f"{steps}` (with the same --preset) first, or name one with --student")
    args.student = weights.find_model(args.student or start)
    if args.reference == TRUTH and not shapes.is_tiny_world(args.model):
        raise UserError(f"--reference {TRUTH} is for the tiny world, where the truth is known; name a model")
    nodes = read_shapes(args.student)[1].get("sigmas")
    if nodes is None:
        raise UserError(f"{args.student}: no student of Stage I, since it carries no noise levels of its own")
    args.steps = args.steps or len(weights.parse_json(nodes, f"{args.student}: its noise levels")) - 1
    if args.steps < 2:
        raise UserError("Stage II trains the steps after the first: it needs a student of at least 2 steps")
    if args.reference != TRUTH:
        slower = filter(is_finished, (run_folder(args.preset, stage, 2 * args.steps) for stage in (2, 1)))
        args.reference = weights.find_model(args.reference or next(slower, args.model))
    shapes_of_model, _ = read_shapes(args.model)
    for path in (args.student, args.reference):
        if path != TRUTH and read_shapes(path)[0] != shapes_of_model:
            raise UserError(f"{path}: of another architecture than {args.model}")
    depth = len({name.split(".")[1] for name in shapes_of_model if name.startswith("joint_blocks.")})
    check_blocks(args.cache, depth, args.steps)
    if args.objective != "adv" and not args.cache:
        raise UserError(f"--objective {args.objective} without a --cache would distil the student from itself")
    if args.cache == (0, depth - 1) and args.lora and args.correction != "mlp":
        raise UserError(f"--cache 0-{depth - 1} --correction {args.correction}: nothing is left to train, for adapters "
                        "lie in the blocks")
    if args.correction != "mlp" and not args.cache:
        raise UserError(f"--correction {args.correction} without a --cache has nothing to correct")
    if "feature" in args.objective and args.correction != "mlp":
        raise UserError(f"--objective {args.objective} teaches f, the correction that --correction {args.correction} "
                        "leaves out")


def load_reference(args, student):
    """The generator of the real images, beside the student's autoencoder and text: a few-step student, or the teacher.

    The teacher needs many more passes for an image. The user is told, and how to need fewer.
    """
    mmdit = frozen_network(args.reference, args.arithmetic)
    reference = replace(student, mmdit=mmdit, cache=load_cache(args.reference, mmdit, args.device))
    steps = len(reference.sigmas()) - 1
    passes = steps * (2 if reference.guidance() > 1 else 1)
    if passes > 8 and args.steps <= 4:
        parallel.say(f"reference: {args.reference}, {passes} network passes for each real image. A student of "
                     f"{2 * args.steps} steps needs {2 * args.steps}; `python train.py --stage 1 --steps "
                     f"{2 * args.steps}` makes one")
    return reference


# -------------------------------------------------------------------------------------------------------- Stage 0

def stage0(args):
    """The tiny SD3, made from nothing, part by part (tiny.py)."""
    if parallel.processes() > 1:
        raise UserError("stage 0 is for one process: python train.py --stage 0")
    def train_part(name, networks, optimizers, iterate, iterations):
        fit(args, Run(args, name, networks, optimizers), iterate, iterations)

    tiny.make(args.out, args.seed, args.arithmetic, train_part)


# --------------------------------------------------------------------------------------------------- the one loop

class Run:
    """All that training changes, saved and restored whole; and the recipe, all that decides how it goes.

    Random numbers need no place in it: those of step i come from a generator seeded by (seed, i), prompts included, so
    a run that goes on from step i draws what it would have drawn.
    """

    def __init__(self, args, name, networks, optimizers):
        self.folder, self.name, self.networks, self.optimizers, self.step = args.out, name, networks, optimizers, 0
        self.recipe, self.offload = recipe(args), getattr(args, "offload", False)

    def save(self):
        header = {"name": self.name, "step": self.step, "recipe": self.recipe}
        parallel.save(self.folder, self.networks, self.optimizers, header)

    def restore(self):
        """Take up the saved state, if there is one. Raises UserError where it is of another run."""
        header = parallel.read_header(self.folder)
        if header is None:
            return
        if header.get("recipe") != self.recipe:
            raise UserError(f"{self.folder}: made with other settings ({self.differences(header)}); choose another "
                            "--out")
        if header.get("name") != self.name:  # Stage 0's part before this one
            return
        parallel.load(self.folder, self.networks, self.optimizers, self.offload)
        self.step = int(weights.parse_number(header.get("step"), f"{self.folder}/state.json: step", least=-1))

    def differences(self, header):
        """What a saved run's settings were, where they are others now, in words."""
        was = weights.parse_json(header.get("recipe"), f"{self.folder}/state.json: recipe")
        now = json.loads(self.recipe)
        if not isinstance(was, dict) or was.keys() != now.keys():
            return f"of {header.get('name')}, now {self.name}"
        return "; ".join(f"{name} {was[name]}, now {now[name]}" for name in now if was[name] != now[name])

    def complaint(self, inputs):
        """What to tell the user where losses or gradients have not been finite. inputs: {name: what they are of}."""
        def in_words(value):
            return f"{value.min():.3g} to {value.max():.3g}" if isinstance(value, torch.Tensor) else \
                weights.in_short(", ".join(map(repr, value)))

        state = parallel.read_header(self.folder)
        good = f"of {state['name']}, step {state['step']}" if state else "none was saved yet"
        of = ", ".join(f"{name} {in_words(value)}" for name, value in inputs.items())
        return (f"{self.folder}: {PATIENCE} iterations in a row gave losses or gradients that are not finite, the last "
                f"step {self.step + 1} ({of}). They were not applied. Last good state: {good}. Start anew with lower "
                "learning rates, or with --dtype fp32")


def recipe(args):
    """All that decides how a run goes, as JSON. Models and prompts stand in it as what they are, not where they lie."""
    table = {name: getattr(args, name) for name in STAGES[args.stage] if name not in SAVES_MEMORY}
    if args.stage != 2 or not args.decay:
        table.pop("iterations", None)  # a run may be made longer, but where the rates depend on its length
    for name in ("model", "student", "reference", "backbone"):
        if table.get(name) and table[name] != TRUTH:
            table[name] = weights.identity(table[name])
    if table.get("prompts"):
        table["prompts"] = hashlib.sha256("\n".join(read_prompts(args.prompts)).encode()).hexdigest()[:12]
    return json.dumps({**table, "seed": args.seed, "dtype": args.dtype}, sort_keys=True)


def fit(args, run, iterate, iterations, sheet=None):
    """The one training loop. iterate(step) makes an iteration, and returns what to log; sheet() draws a sheet.

    An iteration whose loss or gradient is not finite is skipped. Raises UserError after PATIENCE of them in a row.
    """
    run.restore()
    saved, first = time.monotonic(), parallel.is_first()
    skipped = 0  # in a row
    with (tqdm(total=iterations, initial=run.step, desc=run.name, mininterval=1, disable=not first) as bar,
          commandline.asked_to_stop() as stop):
        log = report.Log(run.folder, run.name, run.step)
        while run.step < iterations:
            try:
                log.add(iterate(run.step))
                skipped = 0
            except NotFinite as error:
                log.skip()
                skipped += 1
                for optimizer in run.optimizers.values():
                    optimizer.zero_grad()
                if skipped == PATIENCE:
                    raise UserError(run.complaint(*error.args)) from error
            run.step += 1
            bar.update()
            last, stopped = run.step == iterations, parallel.any_of(stop)
            due = run.step % LOG_EVERY == 0 or last or stopped
            if due:
                means = log.write(run.step, args.device)
                bar.set_postfix({name: f"{value:.4g}" for name, value in means.items()}, refresh=False)
            if sheet and (run.step % SHEET_EVERY == 0 or last):
                with args.arithmetic.passes():
                    picture = sheet()
                if first:
                    write_picture(picture, run.folder / f"sheet-{run.step:06}.png")
            late = due and parallel.any_of([last or stopped or time.monotonic() - saved > SAVE_SECONDS])
            if late and not skipped:  # after log and sheet, for a run that is killed goes on from here
                run.save()
                saved = time.monotonic()
            if stopped and not last:
                raise KeyboardInterrupt(f"stopped at step {run.step}")


def accumulate(args, losses_of, parts):
    """Add up the gradients of losses_of(part) -> {name: loss}, mean over the batch's parts. Returns {name: mean}.

    What has no gradient is only reported.
    """
    means = {}
    for part in parts:
        with args.arithmetic.passes():
            losses = losses_of(part)
        (sum(loss for loss in losses.values() if loss.requires_grad) / len(parts)).backward()
        for name, value in losses.items():
            means[name] = means.get(name, 0) + value.detach() / len(parts)
    return means


# --------------------------------------------------------------------------------------------- what the stages share

def distil(args, run, iterate, samplers, prompts, path, fake=None):
    """Stages I and II once all is set up: train, write the student as a model that needs no flags, and measure it.

    samplers: {name: Sampler}, of the "student" and what it is compared with. path: of a model of the student's shape.
    fake: Stage I's fake score, kept for `evaluate.py score` and `sample.py --explain`; nothing samples with it.
    """
    fit(args, run, iterate, args.iterations, report.Sheet(samplers, sheet_prompts(prompts)))
    pipeline, options, _ = samplers["student"]
    mmdit, fake = whole(pipeline.mmdit, path), fake and whole(fake, path)
    if parallel.is_first():
        if fake:
            save_mmdit(fake, fake_folder(args.out), sample_size=pipeline.latent_shape()[1])
        text = pipeline.text.open() if isinstance(pipeline.text, CachedText) else pipeline.text
        header = {"sigmas": json.dumps(options["sigmas"].tolist()), "guidance": "1.0", "training": run.recipe}
        save_pipeline(replace(pipeline, mmdit=mmdit, text=text), args.out, header, dtype=torch.float32)
        print(f"student: {args.out}")
    parallel.wait()
    if shapes.is_tiny_world(args.model):  # where the truth is known
        with args.arithmetic.passes():
            report.write_metrics(args.out, samplers, args.model)


if __name__ == "__main__":
    commandline.run_script(main, "go on with --resume")
