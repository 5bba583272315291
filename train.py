"""Train a few-step student of an SD3 model.

    python train.py --stage 1      Stage I, distribution matching: a student of 2 steps (dmd.py)
    python train.py --stage 2      Stage II, adversarial, with cached blocks: a student of 1.67 steps (adversarial.py, cache.py)
    python train.py --stage 0      make the tiny SD3 that the other commands use by default (tiny.py, shapes.py)

A run writes to --out: the model in the diffusers folder layout, log.jsonl, contact sheets, metrics.json where the truth is
known (the tiny world), and its state, from which --resume goes on. On many GPUs: `torchrun --nproc_per_node=N train.py …`
(parallel.py).
"""

import argparse
import contextlib
import copy
import json
import math
import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import dmd
import flow
import parallel
import shapes
import tiny
import weights
from adversarial import (Heads, discriminator_loss, feature_distillation, generator_loss, generator_turns, is_generator_turn,
                         load_backbone, load_lpips, output_distillation, refine, save_backbone)
from cache import Cache, check_ranges, effective_nfe, forward_flops, load_cache, new_cache, sampling_flops
from lora import add_lora, merge_lora
from mmdit import load_mmdit
from sample import (DTYPES, TINY, CommandLine, Pipeline, block_ranges, contact_sheet, decode, find_device, generate, load_pipeline,
                    positive_float, positive_int, save_pipeline, seed_number, write_picture)
from text import CachedText, load_text_encoders, read_prompts

# The numbers of the paper for SD3-Medium (Sec. 4.1). Stage I has alpha = 0.96 as in the released 2-step configuration (the
# paper says 0.94). Stage II warms the compensator up for as many updates of its own as the released schedule, which counts
# updates of every kind, comes to (the paper speaks of 500). The weights of the distillation terms are ours, and so is where the
# cached range lies: the paper gives the number of blocks, its released configuration 2-7. The tiny presets fit their world.
STAGE1 = {"steps": 2, "iterations": 500, "batch": 64, "student_lr": 5e-6, "fake_lr": 4e-5, "guidance": 7.0, "alpha": 0.96,
          "density": "c", "windows": "step", "lora": 0}
STAGE2 = {"steps": None, "iterations": 4000, "batch": 32, "student_lr": 1e-5, "compensator_lr": 1e-3, "discriminator_lr": 1e-5,
          "objective": "adv", "output_weight": 1.0, "feature_weight": 1.0, "lpips": 0.0, "cache": [(2, 9)], "lora": 64,
          "alone": 50, "turns": 2, "warmup": 317, "decay": False, "student": None, "reference": None,
          "backbone": "laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup"}
MODELS = {"tiny": TINY, "sd3-medium": "stabilityai/stable-diffusion-3-medium-diffusers",
          "sd3.5-medium": "stabilityai/stable-diffusion-3.5-medium", "sd3.5-large": "stabilityai/stable-diffusion-3.5-large"}
PRESETS = {
    0: dict.fromkeys(MODELS, {}),
    1: {**dict.fromkeys(MODELS, STAGE1),
        "tiny": {**STAGE1, "iterations": 200, "batch": 48, "student_lr": 1e-4, "fake_lr": 4e-4, "alpha": 0.80}},
    2: {**dict.fromkeys(MODELS, STAGE2),
        "tiny": {**STAGE2, "iterations": 1200, "batch": 48, "student_lr": 5e-4, "compensator_lr": 2e-3, "discriminator_lr": 1e-3,
                 "objective": "kd", "output_weight": 16.0, "feature_weight": 0.1, "cache": [(1, 4)], "lora": 0, "alone": 20,
                 "turns": 1, "warmup": 20, "decay": True, "backbone": TINY},
        "sd3.5-large": {**STAGE2, "cache": [(3, 12)]}},
}
NO_FLAGS = {"alone", "decay"}       # set by the preset only: the discriminator's updates at first; rates that fall to zero
SAVING = {"at_once", "recompute", "offload", "compile"}  # flags that save memory or time, in stages 1 and 2
LORA_RATE = 3                       # Stage I: how much faster adapters learn than all weights do, unless rates are given
LARGE = {"at_once": 1, "recompute": True}  # how the official sizes are trained: nothing of this changes the result
CLIP_STUDENT, CLIP_FAKE = 2.0, 1.0  # largest norm of the gradients; all of Stage II has the first
STAGE1_RUN, REFERENCE_RUN = Path("runs/stage1"), Path("runs/stage1-4steps")
LOG_EVERY, SAVE_SECONDS = 10, 60
TEACHER_ITERATIONS = 12_000         # of stage 0
GUIDANCES = (1.0, 2.0, 3.0, 4.0, 5.0)  # tried for the teacher that stage 0 makes


# --------------------------------------------------------------------------------------------------- command line

def main():
    args = parse_arguments()
    args.device = parallel.start(args.device)
    if args.stage:
        parallel.micro_batches(args.batch, args.at_once)  # what cannot be shared out is refused before anything is loaded
    if args.compile and not args.lora and parallel.processes() > 1:
        raise weights.UserError("--compile does not go with sharded weights: train adapters (--lora), or leave it out")
    sampling = {0: stage0, 1: stage1, 2: stage2}[args.stage](args)
    if sampling and is_tiny_world(args.model):
        report(args, args.model, sampling)
    parallel.stop()


def parse_arguments(words=None):
    """The settings of a run: those of its preset, but for what the words of the command line (or a list of words) say."""
    parser = CommandLine(description="Distil an SD3 model into a few-step student.")
    parser.add_argument("--stage", type=int, choices=PRESETS, required=True)
    parser.add_argument("--preset", choices=MODELS, default="tiny", help="sets the defaults of what follows")
    parser.add_argument("--model", help="the teacher: file, folder or Hugging Face id")
    parser.add_argument("--prompts", help="a file of prompts (default: captions of the tiny world, drawn on the fly)")
    parser.add_argument("--steps", type=int, choices=[1, 2, 4, 8], help="of the student")
    parser.add_argument("--iterations", type=positive_int)
    parser.add_argument("--batch", type=positive_int)
    parser.add_argument("--student-lr", type=positive_float)
    parser.add_argument("--lora", type=whole_number, metavar="RANK",
                        help="train adapters over frozen weights, which stage 1's three networks share; 0: all weights")
    one = parser.add_argument_group("stage 1")
    one.add_argument("--guidance", type=float, help="w, of the teacher")
    one.add_argument("--alpha", type=float, help="guidance is on up to this noise level; 1: always")
    one.add_argument("--density", choices=dmd.DENSITIES, help="how the student's noise levels are drawn")
    one.add_argument("--windows", choices=["step", "whole"],
                     help="levels that a step is compared at: its own window (TDM), or all (DMD)")
    one.add_argument("--fake-lr", type=positive_float)
    two = parser.add_argument_group("stage 2")
    two.add_argument("--student", help="to start from (default: the Stage I run in runs/stage1)")
    two.add_argument("--reference", help="makes the real images (default: runs/stage1-4steps, else the teacher)")
    two.add_argument("--backbone", help="the discriminator's ConvNeXt: file, folder or Hugging Face id")
    two.add_argument("--cache", type=block_ranges, metavar="A-B", help="blocks that only the first step runs, from 0; or none")
    two.add_argument("--objective", choices=["adv", "adv+kd", "kd"], help="adversarial, distillation of the full step, or both")
    two.add_argument("--output-weight", type=weight, help="of the velocity's distillation, where there is kd")
    two.add_argument("--feature-weight", type=weight, help="of the residual's distillation, where there is kd")
    two.add_argument("--lpips", type=weight, help="weight of the LPIPS distance to the real image (needs the package lpips)")
    two.add_argument("--turns", type=positive_int, help="updates of the discriminator for each of the generator")
    two.add_argument("--warmup", type=whole_number, help="updates of the compensator before the student's own weights move")
    two.add_argument("--compensator-lr", type=positive_float)
    two.add_argument("--discriminator-lr", type=positive_float)
    memory = parser.add_argument_group("memory and speed: nothing of this changes the result")
    memory.add_argument("--at-once", type=positive_int, metavar="N",
                        help="samples that a device works on at once; the rest of the batch is accumulated (default: all of it; "
                             "official sizes: 1)")
    memory.add_argument("--recompute", action=argparse.BooleanOptionalAction,
                        help="run each block again for its backward pass (default: for official sizes)")
    memory.add_argument("--offload", action="store_const", const="cpu",
                        help="keep optimiser states in the CPU's memory between updates")
    memory.add_argument("--compile", action="store_true", default=None, help="torch.compile the transformer blocks")
    memory.add_argument("--text-cache", default="runs/text", metavar="DIR",
                        help="where the encoded prompts of official models go (default: runs/text)")
    parser.add_argument("--sheet-every", type=positive_int, default=100, help="iterations between contact sheets")
    parser.add_argument("--seed", type=seed_number, default=0)
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], help="of the arithmetic (autocast); weights are fp32")
    parser.add_argument("--out", help="default: runs/stage0, runs/stage1, runs/stage1-4steps (for --steps 4), runs/stage2")
    parser.add_argument("--resume", action="store_true", help="go on from where the run in --out stopped")
    args = parser.parse_args(words)

    preset = PRESETS[args.stage][args.preset]
    useless = {**STAGE1, **STAGE2}.keys() - preset.keys() - NO_FLAGS | (set() if args.stage else SAVING)
    for name in useless:
        if getattr(args, name) is not None:
            raise weights.UserError(f"--{name.replace('_', '-')} means nothing to --stage {args.stage}")
    large = LARGE if args.preset != "tiny" else {}
    if args.stage == 1 and args.lora:
        preset = {name: LORA_RATE * value if name.endswith("_lr") else value for name, value in preset.items()}
    for name, value in {"model": MODELS[args.preset], **large, **preset}.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.device = find_device(args.device)
    args.dtype = args.dtype or ("bf16" if fast_bf16(args.device) else "fp32")
    stage = f"runs/stage{args.stage}" + (f"-{args.steps}steps" if args.stage == 1 and args.steps != 2 else "")
    args.out = Path(args.out or stage)
    weights.check_writable(args.out / "log.jsonl")
    if any(args.out.iterdir()) and not args.resume:
        raise weights.UserError(f"{args.out} holds a run already: go on with --resume, or choose another --out")
    return args


def weight(text):
    if not 0 <= float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 up")
    return float(text)


def whole_number(text):
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 up")
    return int(text)


def fast_bf16(device):
    """Whether bf16 is faster than fp32 there: on GPUs, and on CPUs with instructions for it."""
    return device.type != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def arithmetic(args):
    """The context in which networks run: autocast, and the attention kernel."""
    stack = contextlib.ExitStack()
    # no cache of weights in bf16: it would hold a second copy of each network, and what was cached without gradient stays so
    stack.enter_context(torch.autocast(args.device.type, torch.bfloat16, enabled=args.dtype == "bf16", cache_enabled=False))
    stack.enter_context(attention_kernel(args))
    return stack


def attention_kernel(args):
    """On a CPU, a short sequence's backward pass takes a third of the time of the flash kernel's."""
    short = args.device.type == "cpu" and args.preset == "tiny"
    return sdpa_kernel(SDPBackend.MATH) if short else contextlib.nullcontext()


# --------------------------------------------------------------------------------------------------- the one loop

class Run:
    """Everything that training changes, in one object that is saved and restored whole.

    Random numbers need no place in it: those of step i come from a generator seeded by (seed, i), prompts included, so a run
    that goes on from step i draws what it would have drawn.
    """

    def __init__(self, folder, name, networks, optimizers, settings=""):
        self.folder, self.name, self.networks, self.optimizers, self.step = folder, name, networks, optimizers, 0
        self.settings = settings

    def save(self):
        tensors = {f"{key}/{name}": tensor for key, network in self.networks.items()
                   for name, tensor in network.state_dict().items()}
        for key, optimizer in self.optimizers.items():
            for i, state in optimizer.state_dict()["state"].items():
                tensors.update({f"{key}/{i}/{name}": value for name, value in state.items()})
        parallel.save(tensors, self.folder, {"name": self.name, "step": self.step, "settings": self.settings})

    def restore(self):
        """Take up the saved state, if there is one of this name. Raises UserError if it was made with other settings."""
        header = parallel.read_header(self.folder)
        if header is None or header["name"] != self.name:
            return
        if header["settings"] != self.settings:
            raise weights.UserError(f"{self.folder}: made with other settings, {header['settings']}; these are {self.settings}")
        parameters = {f"{key}/{i}/": parameter for key, optimizer in self.optimizers.items()
                      for i, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"])}

        def places(saved):
            """Where each saved tensor goes: into a network as it is, or into an empty state of an optimiser."""
            tensors = {f"{key}/{name}": tensor for key, network in self.networks.items()
                       for name, tensor in network.state_dict().items()}
            for prefix, parameter in parameters.items():
                for name in ("step", "exp_avg", "exp_avg_sq"):
                    if prefix + name in saved:
                        tensors[prefix + name] = torch.zeros(()) if name == "step" else torch.zeros_like(parameter).detach()
            return tensors

        tensors = parallel.load(self.folder, places)
        for key, optimizer in self.optimizers.items():
            states = {}
            for name in tensors:
                if name.startswith(key + "/"):
                    i, what = name.removeprefix(key + "/").split("/")
                    states.setdefault(int(i), {})[what] = tensors[name]
            optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
        self.step = header["step"]


def seeded(seed, step):
    """The random numbers of one iteration; its prompts are drawn first."""
    return torch.Generator().manual_seed(1_000_003 * seed + step)


def fit(run, update, iterations, sheet=None, sheet_every=None):
    """The one training loop. update(run) makes one iteration and returns what to log; sheet(run) draws a contact sheet."""
    run.restore()
    first = parallel.is_first()
    log_file = run.folder / "log.jsonl"
    old = [json.loads(line) for line in log_file.read_text().splitlines()] if first and log_file.exists() else []
    old = [entry for entry in old if entry["run"] != run.name or entry["step"] <= run.step]  # what is done again goes
    if first:
        weights.write_text(log_file, "".join(json.dumps(entry) + "\n" for entry in old))
    saved = time.monotonic()
    with (tqdm(total=iterations, initial=run.step, desc=run.name, mininterval=1, disable=not first) as bar,
          open(log_file if first else os.devnull, "a") as log):
        while run.step < iterations:
            values = update(run)
            run.step += 1
            bar.update()
            last = run.step == iterations
            if run.step % LOG_EVERY == 0 or last:
                # the mean over the processes, the time as well, so that all decide alike
                numbers = torch.stack([*values.values(), torch.tensor(time.monotonic() - saved).to(values["norm"])])
                parallel.average([numbers])
                *numbers, elapsed = numbers.tolist()
                values = dict(zip(values, numbers))
                if not all(map(math.isfinite, values.values())):
                    raise weights.UserError(f"{run.name}: not finite at step {run.step} ({values}); try a lower learning rate")
                bar.set_postfix({name: f"{value:.4f}" for name, value in values.items()}, refresh=False)
                log.write(json.dumps({"run": run.name, "step": run.step, **values}) + "\n")
                log.flush()
                if last or elapsed > SAVE_SECONDS:  # what was just seen to be finite
                    run.save()
                    saved = time.monotonic()
            if sheet and (run.step % sheet_every == 0 or last):
                sheet(run)


def backward(args, loss):
    """Add to the gradients. Returns the loss, without its graph."""
    with attention_kernel(args):  # for blocks that run again
        loss.backward()
    return loss.detach()


def descend(optimizer, max_norm, offload=None):
    """One optimiser step along the accumulated gradients. Returns their norm, before it was clipped.

    offload: the device where the optimiser's states wait between steps.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = parallel.clip_gradients(parameters, max_norm)
    if offload:
        move_states(optimizer, parameters[0].device)
    optimizer.step()
    if offload:
        move_states(optimizer, offload)
    optimizer.zero_grad()
    return norm


def move_states(optimizer, device):
    for state in optimizer.state.values():
        state.update({name: tensor.to(device) for name, tensor in state.items()})


# -------------------------------------------------------------------------------------------------------- stage I

def stage1(args):
    """Stage I, structure-focused distribution matching (Sec. 3.2 and 3.3): teacher, fake and student make one loss.

    Returns what there is to compare: by name, a pipeline and how it is sampled (see sample.generate). So does stage2.
    """
    prompts = prompts_to_draw(args)
    text = open_text(args, prompts)
    mmdit, (student, fake), learned = open_networks(args, partial(load_mmdit, args.model), trained=2)
    teacher = load_pipeline(args.model, args.device, mmdit=mmdit, text=text)
    sigmas, draw, learn, optimizers = distribution_matching(args, teacher, student, fake, prompts)
    run = Run(args.out, "stage 1", dict(zip(("student", "fake"), learned)), optimizers, settings(args))

    distilled = replace(teacher, mmdit=student)
    sampling = {"student": (distilled, {"sigmas": sigmas, "guidance": 1.0}),
                f"teacher, 28 steps, w = {args.guidance:g}": (teacher, {"steps": 28, "guidance": args.guidance}),
                f"teacher, {args.steps} steps": (teacher, {"sigmas": sigmas, "guidance": args.guidance})}
    fit(run, lambda run: learn(draw(seeded(args.seed, run.step))), args.iterations, Sheet(args, prompts, sampling),
        args.sheet_every)
    save_student(args, args.model, distilled, {"sigmas": json.dumps(sigmas.tolist()), "guidance": "1.0", "training": run.settings})
    return sampling


def distribution_matching(args, teacher, student, fake, prompts):
    """Stage I: the student's nodes, draw(generator) and learn(draws), which make one iteration, and the optimisers.

    teacher is a whole pipeline; student and fake are networks.
    """
    adamw = partial(torch.optim.AdamW, betas=(0.0, 0.999), weight_decay=1e-4, eps=1e-8, fused=True)
    optimizers = {"student_adamw": adamw(trainable(student), lr=args.student_lr),
                  "fake_adamw": adamw(trainable(fake), lr=args.fake_lr)}
    shape, parts = teacher.latent_shape(), parallel.micro_batches(args.batch, args.at_once)
    grid = flow.teacher_grid(teacher.shift)
    start, stop, end = dmd.step_windows(args.steps, teacher.shift, whole=args.windows == "whole")
    nodes = flow.student_sigmas(args.steps, teacher.shift)
    sigmas = nodes.to(args.device)
    uniform, density = dmd.importance_density("uniform"), dmd.importance_density(args.density)
    uncond = teacher.text([""])

    def draw(generator):
        """All that is random in an iteration, on the CPU, where it also decides what runs: a dictionary for each micro-batch."""
        words = draw_prompts(prompts, args.batch, generator)
        k = torch.randint(args.steps, (args.batch,), generator=generator).sort().values  # sorted: micro-batches of one k
        noise = torch.randn(args.batch, *shape, generator=generator)
        levels = {}  # of the student's turn and the fake score's: σ in the window of k, and noise to reach it
        for turn, p in (("student", density), ("fake", uniform)):
            sigma = grid[dmd.draw_index(p, start[k], stop[k], torch.rand(args.batch, generator=generator))]
            levels[turn] = sigma, torch.randn(args.batch, *shape, generator=generator)
        return [{"prompts": [words[row] for row in rows], "k": k[rows].tolist(), "passes": int(k[everyone].max()),
                 "noise": noise[rows], "step": (nodes[k[rows]], grid[end[k[rows]]]),
                 "guided": dmd.guided_samples(levels["student"][0][rows], args.alpha, args.guidance),
                 **{turn: [part[rows] for part in pair] for turn, pair in levels.items()}} for rows, everyone in parts]

    def move(*tensors):
        return [tensor.to(args.device, non_blocking=True) for tensor in tensors]

    def learn(draws):
        """One iteration: both losses of each micro-batch; then both networks move.

        The order is ours: the student's one pass with gradient also makes the sample that the fake score learns from, so the
        fake score that the student meets has learned from the samples of the iterations before. The released code makes a
        rollout for each of the two and lets the fake score move first: 13 forward passes a sample, here 11.4.
        """
        losses = {"student": 0, "fake": 0}
        for part in draws:
            cond, (x, guided) = teacher.text(part["prompts"]), move(part["noise"], part["guided"])
            step, to_compare, to_learn = (move(*part[name]) for name in ("step", "student", "fake"))
            with arithmetic(args):
                x = dmd.rollout(student, x, sigmas, part["k"], cond, part["passes"])
                velocity = student(x, step[0], *cond)
                loss = dmd.student_objective(velocity, teacher.mmdit, fake, x, *step, *to_compare, cond, uncond, args.guidance,
                                             guided)
            losses["student"] += backward(args, loss / len(draws))
            with arithmetic(args):
                loss = dmd.fake_loss(fake, x, velocity.detach(), *step, *to_learn, cond)
            losses["fake"] += backward(args, loss / len(draws))
        norm = descend(optimizers["student_adamw"], CLIP_STUDENT, args.offload)
        descend(optimizers["fake_adamw"], CLIP_FAKE, args.offload)
        return {**losses, "norm": norm}

    return sigmas, draw, learn, optimizers


# ------------------------------------------------------------------------------------------------------- stage II

def stage2(args):
    """Stage II, adversarial refinement of details with cached blocks (Sec. 3.3 and 3.4), trained as the student samples."""
    prompts = prompts_to_draw(args)
    path = find_student(args)
    lpips = load_lpips(args.device) if args.lpips else None
    backbone = load_backbone(args.backbone, args.device) if "adv" in args.objective else None
    text = open_text(args, prompts)  # may take hours: what can be refused was refused before
    mmdit, (student,), (learned,) = open_networks(args, partial(load_mmdit, path), trained=1)
    initial = load_pipeline(path, args.device, mmdit=mmdit, text=text)
    initial.cache = None
    reference = load_reference(args, initial)
    sigmas = initial.sigmas(args.steps).to(args.device)
    torch.manual_seed(args.seed)  # for the initial weights alone
    cache = new_cache(args.cache, mmdit.pos_embed.shape[2], args.device)
    heads = Heads(backbone.widths).to(args.device) if backbone else None
    draw, learn, optimizers = refinement(args, initial, reference, student, cache, sigmas, prompts, backbone, heads, lpips)
    learning = {"student": learned, "compensators": cache.compensators, **({"heads": heads} if heads else {})}
    run = Run(args.out, "stage 2", learning, optimizers, settings(args))

    how = {"sigmas": sigmas, "guidance": 1.0}
    refined = replace(initial, mmdit=student, cache=cache if args.cache else None)
    sampling = {"Stage I student": (initial, how)}
    if args.cache:
        sampling["Stage I, plain re-use"] = replace(initial, cache=Cache(args.cache)), how
    sampling.update({"student": (refined, how), "reference": (reference, {})})
    fit(run, lambda run: learn(run.step, draw(seeded(args.seed, run.step))), args.iterations, Sheet(args, prompts, sampling),
        args.sheet_every)

    save_student(args, path, refined, {"sigmas": json.dumps(sigmas.tolist()), "guidance": "1.0", "training": run.settings})
    size, steps = (*initial.latent_shape()[1:], text([""])[0].shape[1]), len(sigmas) - 1
    by_blocks = effective_nfe(len(student.joint_blocks), args.cache, steps)
    by_flops = sampling_flops(student, *size, steps, refined.cache) / forward_flops(student, *size)
    parallel.say(f"{by_blocks:.2f} evaluations by the blocks that run, {by_flops:.2f} by FLOPs")
    return sampling


def refinement(args, initial, reference, student, cache, sigmas, prompts, backbone=None, heads=None, lpips=None):
    """Stage II: draw(generator) and learn(update, draws), which make one update of either side, and the optimisers.

    initial and reference are whole pipelines, the other parts networks; backbone and heads make the discriminator, if there is
    to be one.
    """
    adversarial, distilling = backbone is not None, "kd" in args.objective
    turns = (args.alone, args.turns) if adversarial else (0, 0)  # else every update is the generator's
    warmup, feature_weight = (args.warmup, args.feature_weight) if args.cache else (0, 0.0)
    own, adamw = trainable(student), partial(torch.optim.AdamW, betas=(0.9, 0.95), weight_decay=1e-4, fused=True)
    optimizers = {"generator_adamw": adamw([{"params": own, "lr": args.student_lr},
                                            {"params": trainable(cache.compensators), "lr": args.compensator_lr}])}
    if adversarial:
        optimizers["discriminator_adamw"] = adamw(heads.parameters(), lr=args.discriminator_lr)
    shape, parts = initial.latent_shape(), parallel.micro_batches(args.batch, args.at_once)
    reference_sigmas, reference_guidance, uncond = reference.sigmas(), reference.guidance(), reference.text([""])

    def real_images(noise, cond):
        """Decoded samples of the reference generator from the same noise and prompts."""
        nothing = [part.expand(len(noise), *part.shape[1:]) for part in uncond]
        latents = flow.sample(reference.mmdit, noise, reference_sigmas, cond, nothing, reference_guidance, cache=reference.cache)
        with torch.no_grad():
            return initial.vae.decode(latents)

    def discriminator_terms(noise, cond):
        with torch.no_grad():
            fake = initial.vae.decode(refine(student, noise, sigmas, cond, cache)[0])
        return {"discriminator": discriminator_loss(backbone, heads, fake, real_images(noise, cond))}

    def generator_terms(noise, cond):
        terms = {}
        latents, steps = refine(student, noise, sigmas, cond, cache, initial.mmdit if distilling else None)
        images = initial.vae.decode(latents, args.recompute) if adversarial or lpips else None
        if adversarial:
            terms["adversarial"] = generator_loss(backbone, heads, images, args.recompute)
        if distilling and args.output_weight:
            terms["output"] = args.output_weight * output_distillation(steps)
        if distilling and feature_weight:
            terms["feature"] = feature_weight * feature_distillation(steps)
        if lpips:
            terms["lpips"] = args.lpips * lpips(images, real_images(noise, cond))
        return terms

    def draw(generator):
        """All that is random in an update, on the CPU: prompts and noise for each micro-batch."""
        words = draw_prompts(prompts, args.batch, generator)
        noise = torch.randn(args.batch, *shape, generator=generator)
        return [([words[row] for row in rows], noise[rows]) for rows, _ in parts]

    losses = {}  # the latest of every kind, for the log

    def learn(update, draws):
        generators = is_generator_turn(update, *turns)
        if generators:
            rate = 1 - update / args.iterations if args.decay else 1
            for group, lr in zip(optimizers["generator_adamw"].param_groups, (args.student_lr, args.compensator_lr)):
                group["lr"] = rate * lr
        found = {}
        for i, (words, noise) in enumerate(draws):
            if adversarial:
                heads.requires_grad_(not generators).train(i == 0)  # spectral norm: one power iteration an update, not a pass
            cond = reference.text(words)
            with arithmetic(args):
                terms = (generator_terms if generators else discriminator_terms)(noise.to(args.device, non_blocking=True), cond)
            backward(args, sum(terms.values()) / len(draws))
            for name, value in terms.items():
                found[name] = found.get(name, 0) + value.detach() / len(draws)
        if generators and generator_turns(update, *turns) < warmup:
            for parameter in own:  # still at rest. They keep requires_grad: FSDP2 would not notice a change of it
                parameter.grad = None
        norm = descend(optimizers["generator_adamw" if generators else "discriminator_adamw"], CLIP_STUDENT, args.offload)
        losses.update(found, **({"norm": norm} if generators or "norm" not in losses else {}))
        return losses

    return draw, learn, optimizers


def check_refinement(args, depth, steps):
    """Raise UserError for settings of Stage II that make no sense together. depth: blocks of the student."""
    check_ranges(args.cache, depth, steps)
    if steps < 2:
        raise weights.UserError("Stage II trains the steps after the first: it needs a student of at least 2 steps")
    if args.objective == "kd" and not args.cache:
        raise weights.UserError("--objective kd without a --cache would distil the student from itself")
    if args.objective == "kd" and not (args.output_weight or args.feature_weight or args.lpips):
        raise weights.UserError("--objective kd with all its weights at zero leaves nothing to train on")


def find_student(args):
    """Where the Stage I student is that Stage II starts from. Raises UserError if it is none, or does not go with the settings."""
    if args.student is None and not is_finished(STAGE1_RUN):
        raise weights.UserError("Stage II starts from a Stage I student: run `python train.py --stage 1` first, or name one "
                                "with --student")
    path = weights.find_model(args.student or STAGE1_RUN)
    files = weights.NetworkFiles(path, "transformer")
    if "sigmas" not in files.metadata:
        raise weights.UserError(f"{path}: no student of Stage I, since it carries no noise levels of its own")
    with weights.explained(path, "a student: its noise levels are no JSON list"):
        steps = args.steps or len(json.loads(files.metadata["sigmas"])) - 1
    check_refinement(args, files.blocks, steps)
    if args.reference:
        weights.find_model(args.reference)
    return path


def load_reference(args, student):
    """The generator of the real images, beside the student's autoencoder and text: a few-step student, or else the teacher.

    The teacher needs many more passes for an image: that is said, with the way out.
    """
    path = weights.find_model(args.reference or (REFERENCE_RUN if is_finished(REFERENCE_RUN) else args.model))
    mmdit = frozen_network(args, partial(load_mmdit, path))
    sizes, own = ({name: tensor.shape for name, tensor in network.state_dict().items()} for network in (mmdit, student.mmdit))
    if sizes != own:
        raise weights.UserError(f"{path}: a reference of another architecture than the student's")
    reference = replace(student, mmdit=mmdit, cache=load_cache(path, mmdit, args.device))
    steps = len(reference.sigmas()) - 1
    passes = steps * (2 if reference.guidance() > 1 else 1)
    if passes > 8:
        parallel.say(f"reference: {path}, {passes} network passes for each real image. A 4-step student needs 4: "
                     "make one with `python train.py --stage 1 --steps 4`")
    return reference


def is_finished(folder):
    return (folder / "model_index.json").exists()


# --------------------------------------------------------------------------------------------- what the stages share

def open_networks(args, load, trained):
    """The network of load(device, dtype) as it is, `trained` copies that learn, and what of each of them is trained, as modules.

    All weights are trained: so many networks beside the frozen one, shared out if there are many processes. With adapters
    (--lora): one frozen network that all share, which every process has whole, and a set of adapters for each.
    """
    if args.lora:
        frozen = load(args.device, DTYPES[args.dtype])
        torch.manual_seed(args.seed)  # for the adapters' initial weights alone
        networks, learning = zip(*(add_lora(frozen, args.lora, everywhere=args.stage == 1) for _ in range(trained)))
    else:
        networks = learning = [trainable_network(args, load) for _ in range(trained)]
        frozen = frozen_network(args, load)
    for network in networks:
        network.recompute = bool(args.recompute)
        for block in network.joint_blocks if args.compile else ():
            block.compile()
    return frozen, networks, learning


def trainable_network(args, load):
    """A network whose weights are all trained, in fp32, but for the stored table of positions."""
    network = load(home(args), torch.float32).train().requires_grad_(True)
    network.pos_embed.requires_grad_(False)
    return parallel.shard(network, DTYPES[args.dtype], args.device)


def frozen_network(args, load):
    """A network that is only run, in the dtype of the arithmetic: bf16 is what autocast would make of its weights."""
    return parallel.shard(load(home(args), DTYPES[args.dtype]), DTYPES[args.dtype], args.device)


def home(args):
    """Where a network is loaded: on the CPU if it is to be shared out."""
    return "cpu" if parallel.processes() > 1 else args.device


def open_text(args, prompts):
    """The text encoders; outside the tiny world, whose are small, text that is encoded beforehand and read from the disk."""
    if is_tiny_world(args.model):
        return load_text_encoders(args.model, args.device)
    path = weights.find_model(args.model)
    folder = Path(args.text_cache) / f"{Path(args.model).name}-{weights.fingerprint(path, args.dtype)}"
    text = CachedText(folder, partial(load_text_encoders, path), args.device, DTYPES[args.dtype])
    drawn = {"", *sheet_prompts(prompts)}
    for step in range(args.iterations):
        drawn.update(draw_prompts(prompts, args.batch, seeded(args.seed, step)))
    text.encode(sorted(drawn))
    return text


def save_student(args, path, pipeline, header):
    """Write a student in the diffusers layout: its adapters merged, or the shards of all processes put together.

    path: of a model of the same shape.
    """
    mmdit = pipeline.mmdit
    if parallel.processes() > 1 and not args.lora:
        mmdit = parallel.fill_whole(load_mmdit(path), mmdit)
    if parallel.is_first():
        mmdit = merge_lora(mmdit) if args.lora else mmdit
        text = pipeline.text.open() if isinstance(pipeline.text, CachedText) else pipeline.text
        save_pipeline(replace(pipeline, mmdit=mmdit, text=text), args.out, header, dtype=torch.float32)
        print(f"student: {args.out}")
    parallel.wait()


def trainable(network):
    return [p for p in network.parameters() if p.requires_grad]


def is_tiny_world(model):
    return shapes.recogniser_file(model).exists()


def settings(args):
    """All that decides how a run goes, as JSON; its length only where the rates depend on it."""
    names = {"model", "prompts", "seed", "dtype", *PRESETS[args.stage][args.preset]}
    names -= set() if PRESETS[args.stage][args.preset].get("decay") else {"iterations"}
    return json.dumps({name: getattr(args, name) for name in names}, default=str, sort_keys=True)


def prompts_to_draw(args):
    """The prompts of --prompts; None stands for captions of the tiny world."""
    if args.prompts is None and not is_tiny_world(args.model):
        raise weights.UserError(f"{args.model}: give --prompts FILE; only the tiny SD3 draws captions of its own")
    return read_prompts(args.prompts) if args.prompts else None


def draw_prompts(prompts, n, generator):
    """n prompts of the list, or, without one, fresh captions of the tiny world."""
    if prompts is None:
        return shapes.draw_captions(n, generator)[0]
    return [prompts[i] for i in torch.randint(len(prompts), (n,), generator=generator)]


def sheet_prompts(prompts, rows=8):
    return draw_prompts(prompts, rows, torch.Generator().manual_seed(7))


class Sheet:
    """Draws the same prompts and seeds each time: a row a prompt, two images of each sampler side by side."""

    def __init__(self, args, prompts, sampling, rows=8, seeds=(1, 2)):
        self.args, self.sampling, self.seeds = args, sampling, seeds
        self.prompts = sheet_prompts(prompts, rows)
        self.drawn = {}  # the teacher's images do not change: drawn once

    def __call__(self, run):
        jobs = [(prompt, seed) for prompt in self.prompts for seed in self.seeds]
        for name, (pipeline, how) in self.sampling.items():
            if name == "student" or name not in self.drawn:
                images = draw(self.args, pipeline, how, *zip(*jobs))
                self.drawn[name] = images.unflatten(0, (len(self.prompts), len(self.seeds)))
        images = torch.cat(list(self.drawn.values()), dim=1)                            # (rows, samplers · seeds, 3, H, W)
        headings = [name if j == 0 else "" for name in self.drawn for j in range(len(self.seeds))]
        picture = contact_sheet(images.flatten(0, 1), self.prompts, headings)
        if parallel.is_first():
            write_picture(picture, run.folder / f"sheet-{run.step:06}.png")


def draw(args, pipeline, how, prompts, seeds):
    """Images (N, 3, H, W) of a pipeline sampled as `how` says (see sample.generate)."""
    with arithmetic(args):
        return decode(pipeline, generate(pipeline, list(prompts), list(seeds), **how))


def report(args, model, sampling):
    """Measure samplers in the tiny world, where the truth is known, print a table and write metrics.json (with errors)."""
    recogniser = shapes.load_recogniser(model)
    measured = {name: shapes.measure(partial(draw, args, pipeline, how), recogniser)
                for name, (pipeline, how) in tqdm(sampling.items(), desc="measuring", disable=not parallel.is_first())}
    if parallel.is_first():
        weights.write_json(args.out / "metrics.json", measured)
    for what in ("adherence", "coverage", "distribution"):
        headings = next(iter(measured.values()))[what]
        parallel.say(f"\n{what:28}" + "".join(f"{name:>17}" for name in headings))
        for name, values in measured.items():
            parallel.say(f"{name:28}" + "".join(f"{value:17.3f}" for value, error in values[what].values()))
    return measured


# -------------------------------------------------------------------------------------------------------- stage 0

def stage0(args):
    """Make the tiny SD3 from nothing, part by part: each has one loss (tiny.py), and a finished part is not made again."""
    if parallel.processes() > 1:
        raise weights.UserError("stage 0 is for one process: python train.py --stage 0")
    if is_tiny_world(args.out):
        raise weights.UserError(f"{args.out} holds a finished tiny SD3; choose another --out")
    make = partial(make_part, args)
    text = make("text", partial(tiny.TinyText, args.out), tiny.text_loss, 400, 2e-3).encoders
    recogniser = make("recogniser", shapes.Recogniser, tiny.recogniser_loss, 800, 1e-3)
    backbone = make("backbone", tiny.TinyBackbone, tiny.backbone_loss, 1200, 2e-3, seed=args.seed + 1000).backbone
    vae = make("vae", tiny.new_vae, tiny.vae_loss, 2400, 2e-3)
    with arithmetic(args):
        latents, labels = tiny.encode_pool(vae, tiny.POOL, args.seed + 1)
    vae.shift, vae.scale = latents.mean().item(), 1 / latents.std().item()
    latents = (latents - vae.shift) * vae.scale
    mmdit = make("teacher", tiny.new_mmdit, partial(tiny.teacher_loss, text, latents, labels), TEACHER_ITERATIONS, 1e-3)

    # as shipped: fp16, under the guidance that prompts are followed best at
    pipeline = Pipeline(mmdit.half().float(), vae.half().float(), text.half().float(), tiny.SHIFT)
    mmdit.settings["sample_size"] = shapes.SIZE // vae.factor
    weights.write_safetensors(shapes.recogniser_file(args.out), recogniser.state_dict())
    save_backbone(backbone, args.out, torch.float16)
    measured = report(args, args.out, {f"teacher, 28 steps, w = {w:g}": (pipeline, {"steps": 28, "guidance": w})
                                       for w in GUIDANCES})
    best = max(GUIDANCES, key=lambda w: measured[f"teacher, 28 steps, w = {w:g}"]["adherence"]["mean"][0])
    save_pipeline(pipeline, args.out, {"guidance": str(best)}, dtype=torch.float16)
    print(f"\ntiny SD3: {args.out}, best guidance w = {best:g}")


def make_part(args, name, build, loss, iterations, rate, average=0.999, seed=None):
    """Train one network by one loss: AdamW, a short warm-up, then a cosine down to 0. Returns its moving average."""
    seed = args.seed if seed is None else seed
    torch.manual_seed(seed)  # for the initial weights alone
    network = build().to(args.device)
    file = args.out / "parts" / f"{name}.safetensors"
    if file.exists():
        return weights.load_plain(network, file).requires_grad_(False).eval()
    averaged = copy.deepcopy(network)
    optimizer = torch.optim.AdamW(trainable(network), lr=rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)

    def update(run):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((run.step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * run.step / iterations))
        with arithmetic(args):
            value = loss(network, seeded(seed, run.step))
        value.backward()
        norm = descend(optimizer, max_norm=1.0)
        decay = min(average, (1 + run.step) / (10 + run.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), list(network.parameters()), 1 - decay)
        return {"loss": value.detach(), "norm": norm}

    fit(Run(args.out, name, {"network": network, "averaged": averaged}, {"adamw": optimizer}), update, iterations)
    weights.write_safetensors(file, {n: t.detach().cpu().clone() for n, t in averaged.state_dict().items()})
    return averaged.requires_grad_(False).eval()


if __name__ == "__main__":
    weights.run_script(main)
