"""Train a few-step student of an SD3 model.

    python train.py --stage 1      Stage I, distribution matching: a student of 2 steps (dmd.py)
    python train.py --stage 2      Stage II, adversarial, with cached blocks: 1.67 evaluations (adversarial.py, cache.py)

A run writes to --out: the student as a diffusers folder, log.jsonl, contact sheets, its state, from which --resume
continues, and, in the tiny world, metrics.json. On many GPUs: `torchrun --nproc_per_node=N train.py …` (parallel.py).
The file reads in the order of a run: settings, Stage I, Stage II, what both share.
"""

import commandline  # first: it sets how threads wait before torch is loaded

import argparse
import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import torch

import adversarial
import dmd
import parallel
import weights
from cache import CORRECTIONS, CachedSteps, check_blocks, effective_nfe, new_cache
from commandline import DEVICE, CommandLine, UserError, count, find_device, from_zero, number, positive
from loop import (Run, Sheet, adamw, autocast, fast_bf16, frozen_network, move_average, open_networks, optimizer_step,
                  seeded, trainable, whole)
from mmdit import save_mmdit
from pipeline import DTYPES, TINY, decode, is_finished, load_pipeline, read_sigmas, save_pipeline
from prompts import EncodedText, draw_prompts, read_prompts, sheet_prompts
from text import load_text_encoders
from tinyworld import measures, scenes


# ------------------------------------------------------------------------------------------------------- settings
# Defaults are the released configuration for SD3-Medium, except for the cached blocks: 2-7, 1.75 evaluations, are
# released; 8 blocks make the paper's 1.67, and their place is ours. SD3.5 has no release.

def shared_arguments(parser):
    add = parser.add_argument
    add("--model", help="the teacher: file, folder or Hugging Face id")
    add("--prompts", help="a file of prompts; without it captions of the tiny world")
    add("--text-cache", default="runs/text", metavar="DIR", help="where encoded prompts of official models are kept")
    add("--at-once", type=from_zero, default=1, help="samples per pass; gradients accumulate over the batch; 0: all")
    add("--recompute", action=argparse.BooleanOptionalAction, default=True,
        help="run each block again for its backward pass instead of keeping its activations")
    add("--seed", type=commandline.seed, default=0, help="random seed")
    add("--device", type=find_device, default=DEVICE, help="where it runs")
    add("--dtype", choices=["bf16", "fp32"], help="precision of the arithmetic; without it bf16 where it is faster")
    add("--out", type=Path, help="a folder; without it runs/stage1, runs/stage1-4steps, runs/stage2, …")
    add("--resume", action="store_true", help="continue the run in --out from its last saved state")
    add("--bare", action="store_true", help="draw no sheets and measure nothing at the end")


def stage1_arguments(parser):
    add = parser.add_argument
    add("--steps", type=int, choices=[1, 2, 4, 8], default=2, help="n, the student's number of steps")
    add("--guidance", type=number(0), default=7.0, help="w of Eq. (4), the teacher's guidance")
    add("--alpha", type=number(0), default=0.96, help="α of Eq. (4): guidance is on up to this noise level; 1: always")
    add("--density", choices=list(dmd.DENSITIES), default="c", help="how the student's noise levels are drawn (Fig. 10)")
    add("--windows", choices=["step", "whole"], default="step", help="levels at which a step is compared: its own "
        "window (TDM) or all (DMD)")
    add("--iterations", type=count, default=500, help="each updates the fake score, then the student")
    add("--batch", type=count, default=64, help="samples per update, over all processes")
    add("--student-lr", type=positive, default=5e-6, help="learning rate of G")
    add("--fake-lr", type=positive, default=4e-5, help="learning rate of F")
    add("--student-clip", type=positive, default=2.0, help="largest norm of G's gradient")
    add("--fake-clip", type=positive, default=1.0, help="largest norm of F's gradient")
    add("--average", action=argparse.BooleanOptionalAction, default=False,
        help="the student that is saved has the mean of G's weights, over about the last third of the run (an addition)")
    add("--start", metavar="DIR", help="a Stage I run whose student and fake score are trained further (an "
        "addition); without it both start as the teacher")
    add("--cache", type=commandline.blocks, default=(), metavar="A-B",
        help="blocks, from 0, that only the first step runs, corrected by f (an addition: the paper has it in Stage II)")
    add("--compensator-lr", type=positive, default=1e-3, help="learning rate of f")
    add("--lora", type=from_zero, default=0, help="train adapters of this rank, at three times the rates, over one "
        "frozen network that all three share (an addition, to save memory); 0: train all weights")


def stage2_arguments(parser):
    add = parser.add_argument
    add("--steps", type=int, choices=[2, 4, 8], help="n; without it as many as the student has")
    add("--student", help="the student to start from; without it this preset's Stage I run of 2 (or --steps) steps")
    add("--reference", help="the model that makes the real images; without it this preset's student of twice as many "
        "steps (of Stage II, or else I; released: I), or else the teacher; truth: true scenes of the tiny world")
    add("--first-step", action="store_true", help="let the gradient run through the first step, too (an addition)")
    add("--redraw", type=number(0), metavar="WEIGHT", help="real images: the reference draws the student's Stage I images "
        "again, from the middle of its steps on; WEIGHT is that of G's L1 distance to them, 0: none (an addition)")
    add("--backbone", default="laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup",
        help="the discriminator's ConvNeXt; none: it is three small networks, trained from scratch")
    add("--pool", type=from_zero, default=0, help="images of either kind that the discriminator learns from: drawn once, "
        "the student's replaced as it learns (an addition, to save time); 0: each update draws new ones")
    add("--cache", type=commandline.blocks, default="2-9", metavar="A-B",
        help="blocks, from 0, that only the first step runs (Fig. 12), or none")
    add("--correction", choices=list(CORRECTIONS), default="mlp",
        help="what corrects the cached residual Δ0: f, an MLP; none: plain re-use; prune: the blocks are left out")
    add("--objective", choices=["adv", "adv+output+feature", "output+feature", "output", "feature"], default="adv",
        help="adversarial, distillation of output or feature, or several (Fig. 13)")
    add("--output-weight", type=positive, default=1.0, help="weight of the output distillation")
    add("--feature-weight", type=positive, default=1.0, help="weight of the feature distillation")
    add("--iterations", type=count, default=4000, help="updates in all, of discriminator and generator (4,000 are 1,317 "
        "of the generator)")
    add("--batch", type=count, default=32, help="samples per update, over all processes")
    add("--student-lr", type=positive, default=1e-5, help="learning rate of G")
    add("--compensator-lr", type=positive, default=1e-3, help="learning rate of f")
    add("--discriminator-lr", type=positive, default=1e-5, help="learning rate of the heads")
    add("--student-clip", type=positive, default=2.0, help="largest norm of the gradients of G and f together")
    add("--decay", action=argparse.BooleanOptionalAction, default=False, help="let the rates of G and f fall linearly to zero")
    add("--discriminator-warmup", type=from_zero, default=50, help="updates of the discriminator before the generator's first")
    add("--discriminator-updates", type=from_zero, default=2, help="updates of the discriminator for each of the generator")
    add("--student-warmup", type=from_zero, default=317, help="turns of the generator that train only f, if there is "
        "one (317 of them lie in the released 1,000 updates)")
    add("--lora", type=from_zero, default=64, help="rank of the adapters that are trained; 0: all weights")


PRESETS = {  # overrides of these defaults, for both stages and for each
    "tiny": ({"model": str(TINY), "at_once": 0, "recompute": False},
             {1: {"iterations": 140, "batch": 32, "student_lr": 1e-4, "fake_lr": 4e-4, "alpha": 0.90, "average": True},
              2: {"iterations": 1000, "discriminator_lr": 1e-3, "output_weight": 16.0, "feature_weight": 0.02,
                  "cache": "1-4", "lora": 0, "backbone": "none", "pool": 2048, "discriminator_warmup": 400,
                  "student_warmup": 20, "decay": True}}),
    "sd3-medium": ({"model": "stabilityai/stable-diffusion-3-medium-diffusers"}, {}),
    "sd3.5-medium": ({"model": "stabilityai/stable-diffusion-3.5-medium"}, {}),
    "sd3.5-large": ({"model": "stabilityai/stable-diffusion-3.5-large"}, {2: {"cache": "3-12"}}),
}
LORA_RATE = 3               # Stage I: how much faster adapters learn than all weights do
BETAS = {1: (0.0, 0.999), 2: (0.9, 0.95)}   # of AdamW
NOT_SETTINGS = ("out", "resume", "bare", "device", "text_cache", "at_once", "recompute")  # they do not change the result


def parse_arguments(words=None):
    """The settings of a run: the defaults, what the preset overrides, and what the command line says."""
    first = CommandLine(add_help=False)
    first.add_argument("--stage", type=int, choices=[1, 2], help="1: distribution matching; 2: adversarial, cached")
    first.add_argument("--preset", choices=PRESETS, default="tiny", help="sets the other defaults")
    known = first.parse_known_args(words)[0]
    parser = CommandLine(parents=[first], usage="train.py --stage {1,2} [--preset NAME] [--resume] [FLAG X ...]",
                         description="Distil an SD3 model into a few-step student. For the flags of a stage: "
                         "train.py --stage 1 --help")
    shared_arguments(parser)
    if known.stage:
        {1: stage1_arguments, 2: stage2_arguments}[known.stage](parser)
    shared, of_stage = PRESETS[known.preset]
    parser.set_defaults(**shared, **of_stage.get(known.stage, {}))
    args = parser.parse_args(words)
    if args.stage is None:
        raise UserError("--stage is missing: 1 or 2")
    args.dtype = args.dtype or ("bf16" if fast_bf16(args.device) else "fp32")
    args.out = args.out or run_folder(args.preset, args.stage, args.steps)
    if args.resume and (parallel.read_header(args.out) or {}).get("name") != f"stage {args.stage}":
        raise UserError(f"--resume: {args.out} holds no run of stage {args.stage}")
    weights.check_writable(args.out, new=not args.resume)
    return args


def run_folder(preset, stage, steps=None):
    """Where a run goes, and where Stage II looks for the runs before it."""
    folder = Path("runs") if preset == "tiny" else Path("runs") / preset
    return folder / (f"stage{stage}" + (f"-{steps}steps" if steps not in (None, 2) else ""))


def settings(args):
    """The arguments that decide the result, in JSON's types. A resumed run must have the same."""
    values = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    if not getattr(args, "decay", False):
        del values["iterations"]  # a run may be made longer, unless its rates depend on its length
    return json.loads(json.dumps(values))


def main():
    args = parse_arguments()
    args.device = parallel.start(args.device)
    {1: stage1, 2: stage2}[args.stage](args)
    parallel.stop()


# -------------------------------------------------------------------------------------------------------- Stage I

def stage1(args):
    """Stage I (Fig. 3), structure-focused distribution matching (Sec. 3.2, 3.3): teacher, fake score and student."""
    micro_batches = parallel.micro_batches(args.batch, args.at_once)
    if args.start and args.lora:
        raise UserError("--start trains all weights of a run further; leave --lora out")
    starts = [Path(args.start), Path(args.start) / "fake"] if args.start else [args.model] * 2
    check_blocks(args.cache, weights.NetworkFiles(starts[0], "transformer").blocks, args.steps)
    starts += [starts[0]] if args.average else []
    prompts, text = open_prompts(args)
    frozen, (student, fake, *averaged), learned = open_networks(args, args.model, starts, everywhere=True)
    teacher = load_pipeline(args.model, args.device, mmdit=frozen, text=text)
    windows = dmd.step_windows(args.steps, teacher.shift, whole=args.windows == "whole")
    nodes, uncond = windows.nodes.to(args.device), text([""])
    uniform, density = dmd.importance_density("uniform"), dmd.importance_density(args.density)
    rate = LORA_RATE if args.lora else 1
    networks = dict(zip(("student", "fake", "average"), learned))
    rates, cache = [(student, rate * args.student_lr)], None
    if args.cache:
        torch.manual_seed(args.seed)  # only f's initial weights use this
        cache = new_cache(args.cache, frozen.pos_embed.shape[2], device=args.device)
        networks["compensator"] = cache.compensator
        rates.append((cache.compensator, args.compensator_lr))
    of_student = replace(teacher, mmdit=averaged[0] if averaged else student, sigmas=nodes, guidance=1.0, cache=cache)
    averages = [(mean, student) for mean in averaged]
    if averaged and cache:
        of_student.cache = copy.deepcopy(cache)
        networks["average compensator"] = of_student.cache.compensator
        averages.append((of_student.cache.compensator, cache.compensator))
    student_adamw, fake_adamw = adamw(rates, BETAS[1]), adamw([(fake, rate * args.fake_lr)], BETAS[1])

    pipelines = {"student": of_student,
                 f"teacher, 28 steps, w = {args.guidance:g}": teacher.sampled_with(28, args.guidance),
                 f"teacher, {args.steps} steps": replace(teacher, sigmas=nodes, guidance=args.guidance)}
    sheet = None if args.bare else Sheet(pipelines, sheet_prompts(prompts))
    run = Run(args, settings(args), "stage 1", networks, {"student_adamw": student_adamw, "fake_adamw": fake_adamw},
              args.iterations, sheet)
    shape = args.batch, *teacher.latent_shape()

    for step in run.steps():
        generator = seeded(args.seed, step)
        words = draw_prompts(prompts, args.batch, generator)
        noise = torch.randn(shape, generator=generator)
        fake_levels = dmd.draw_levels(windows, uniform, shape, generator)
        student_levels = dmd.draw_levels(windows, density, shape, generator)
        fake_mean = student_mean = 0.0

        rollouts = []
        for rows in micro_batches:  # update the fake score on the student's present samples
            cond = text([words[row] for row in rows])
            sampler = CachedSteps(student, cache)
            with autocast(args):
                states, velocities = dmd.rollout(sampler, noise[rows].to(args.device), nodes, cond)
                loss = dmd.fake_loss(fake, states, velocities, rows_of(fake_levels, rows, args.device), cond)
            (loss / len(micro_batches)).backward()
            fake_mean += loss.detach() / len(micro_batches)
            rollouts.append((rows, states, cond, sampler if cache else None))
        fake_norm = optimizer_step([fake_adamw], args.fake_clip)

        for rows, states, cond, cached in rollouts:  # update the student: compare F and T on its samples
            with autocast(args):
                loss = dmd.student_loss(student, fake, teacher.mmdit, states,
                                        rows_of(student_levels, rows, args.device), cond, uncond, args.guidance,
                                        args.alpha, cached)
            (loss / len(micro_batches)).backward()
            student_mean += loss.detach() / len(micro_batches)
        student_norm = optimizer_step([student_adamw], args.student_clip)
        for mean, network in averages:  # the weight of step t grows as t² (power function of Karras et al. 2024)
            move_average(mean, network, 3 / (step + 3))

        guided = (student_levels.sigma <= args.alpha).float().mean()
        run.end_step({"fake_norm": fake_norm, "norm": student_norm}, fake=fake_mean, student=student_mean, guided=guided)

    finish(args, of_student, args.model, fake)
    if measures.is_tiny_world(args.model) and not args.bare:
        with autocast(args):
            measures.write(args.out, {"student": of_student}, beside=args.model)


def rows_of(levels, rows, device):
    """A micro-batch of dmd.Levels, on the device."""
    return dmd.Levels(*(part[rows].to(device) for part in levels))


# ------------------------------------------------------------------------------------------------------- Stage II

def stage2(args):
    """Stage II (Fig. 3), adversarial refinement with cached blocks (Sec. 3.3, 3.4), trained as the student samples."""
    micro_batches = parallel.micro_batches(args.batch, args.at_once)
    find_models(args)
    backbone = discriminator = pool = None
    if "adv" in args.objective and args.backbone != "none":
        backbone = adversarial.load_backbone(args.backbone, args.device)
        backbone.recompute = args.recompute
    prompts, text = open_prompts(args)
    frozen, (student,), (learned,) = open_networks(args, args.student, [args.student])
    start = load_pipeline(args.student, args.device, mmdit=frozen, text=text)
    original = start.sampled_with(blocks=())
    reference = load_reference(args, original) if "adv" in args.objective and args.reference != "truth" else None
    nodes, uncond, vae = original.sigmas, text([""]), original.vae
    torch.manual_seed(args.seed)  # for the initial weights alone
    cache = None
    if args.cache:
        cache = new_cache(args.cache, frozen.pos_embed.shape[2], args.correction, args.device)
        if start.cache and start.cache.blocks == cache.blocks and args.correction == "mlp":  # its f is trained further
            cache.compensator.load_state_dict(start.cache.compensator.state_dict())
    if "adv" in args.objective:
        discriminator = adversarial.Discriminator(backbone) if backbone else adversarial.PyramidDiscriminator()
        discriminator.to(args.device)
    vae.decoder.recompute = args.recompute

    networks, rates = {"student": learned}, [(student, args.student_lr)]
    if cache and trainable(cache.compensator):
        networks["compensator"] = cache.compensator
        rates.append((cache.compensator, args.compensator_lr))
    generator_adamw = adamw(rates, BETAS[2])
    optimizers = {"generator_adamw": generator_adamw}
    warmup, ratio = 0, 0  # without a discriminator, every update is the generator's
    if discriminator:
        networks["heads"] = discriminator.heads
        discriminator_adamw = adamw([(discriminator.heads, args.discriminator_lr)], BETAS[2])
        optimizers["discriminator_adamw"] = discriminator_adamw
        warmup, ratio = args.discriminator_warmup, args.discriminator_updates

    of_student = replace(original, mmdit=student, cache=cache)
    if discriminator and args.pool:
        words, seeds = draw_prompts(prompts, args.pool, seeded(args.seed, -1)), range(args.pool)  # before step 0
        with autocast(args):
            real = reference.images(words, seeds) if reference else decode(vae, scenes.true_latents(vae, words, seeds))
            pool = networks["pool"] = adversarial.ImagePool(real, of_student.images(words, seeds)).to(args.device)
    pipelines = {"Stage I student": original, "student": of_student}
    if cache:
        pipelines["Stage I, plain re-use"] = original.sampled_with(blocks=args.cache)
    shown = {**pipelines, "reference": reference} if reference else pipelines
    sheet = None if args.bare else Sheet(shown, sheet_prompts(prompts))
    run = Run(args, settings(args), "stage 2", networks, optimizers, args.iterations, sheet)

    for step in run.steps():
        generator = seeded(args.seed, step)
        words = draw_prompts(prompts, args.batch, generator)
        noise = torch.randn(args.batch, *original.latent_shape(), generator=generator)
        turn, means = adversarial.generator_turn(step, warmup, ratio), {}
        if discriminator:
            discriminator.heads.requires_grad_(turn is None).train(turn is None)
        if pool and turn is None:
            pool_real, pool_fake = pool.draw(args.batch, generator)

        for rows in micro_batches:
            if turn is not None or not pool:  # a pool has its images already
                x, cond = noise[rows].to(args.device), text([words[row] for row in rows])
            with autocast(args):
                if turn is not None:  # generator: make its image look real
                    latents, later_steps = adversarial.refine(student, cache, x, nodes, cond, args.objective != "adv",
                                                              args.first_step)
                    losses = {}
                    if discriminator:
                        image = vae.decode(latents)
                        losses["adversarial"] = adversarial.generator_loss(discriminator(image))
                        if args.redraw:  # not in the paper: L1 to the real image of the same noise and prompt
                            with torch.no_grad():
                                real = reference.sample(x, cond, uncond)
                            losses["redraw"] = args.redraw * (latents - real).abs().mean()
                        if pool:
                            pool.add(image)
                    if "output" in args.objective:
                        losses["output"] = args.output_weight * adversarial.output_distillation(later_steps)
                    if "feature" in args.objective:
                        losses["feature"] = args.feature_weight * adversarial.feature_distillation(later_steps)
                else:  # discriminator: tell the student's images from the reference's
                    if pool:
                        real, fake = pool_real[rows], pool_fake[rows]
                    else:
                        with torch.no_grad():
                            fake = vae.decode(adversarial.refine(student, cache, x, nodes, cond)[0])
                            real = vae.decode(reference.sample(x, cond, uncond))
                    logits = discriminator(torch.cat([real, fake]))
                    of_real, of_fake = zip(*(level.chunk(2) for level in logits))
                    losses = {"discriminator": adversarial.discriminator_loss(of_real, of_fake)}
                    discriminator.heads.eval()  # one power iteration of spectral norm an update; released: two a pass
                    means["AUC"] = means.get("AUC", 0) + adversarial.auc(of_real, of_fake) / len(micro_batches)
            (sum(losses.values()) / len(micro_batches)).backward()
            for name, loss in losses.items():
                means[name] = means.get(name, 0) + loss.detach() / len(micro_batches)

        if turn is None:
            norm = optimizer_step([discriminator_adamw], math.inf)  # as released, not clipped
            run.end_step({"discriminator_norm": norm}, **means)
            continue
        if "compensator" in networks and turn < args.student_warmup:
            for parameter in trainable(student):  # G is frozen for now; released: its gradient still enters the norm
                parameter.grad = None
        if args.decay:
            for group, (_, rate) in zip(generator_adamw.param_groups, rates, strict=True):
                group["lr"] = rate * (args.iterations - step) / (args.iterations - warmup)
        run.end_step({"norm": optimizer_step([generator_adamw], args.student_clip)}, **means)

    finish(args, of_student, args.student)
    if parallel.is_first():
        nfe = effective_nfe(len(frozen.joint_blocks), args.cache, len(nodes) - 1)
        print(f"an image takes {nfe:.2f} effective evaluations, counted in blocks; f is not counted")
    if measures.is_tiny_world(args.model) and not args.bare:
        with autocast(args):
            measures.write(args.out, pipelines, beside=args.model)


def find_models(args):
    """Fill in Stage II's student, reference and steps; refuse what does not fit together before the first slow step."""
    start = run_folder(args.preset, 1, args.steps)
    if args.student is None and not is_finished(start):
        steps = f" --steps {args.steps}" if args.steps not in (None, 2) else ""
        raise UserError(f"Stage II starts from a Stage I student, and there is none in {start}: run `python train.py "
                        f"--stage 1{steps}` (with the same --preset) first, or name one with --student")
    args.student = str(args.student or start)
    source = weights.NetworkFiles(args.student, "transformer")
    with weights.library_errors(args.student, "be read as a student of Stage I with noise levels of its own"):
        steps = len(read_sigmas(source.metadata["sigmas"])) - 1
    if args.steps not in (None, steps) or steps < 2:
        raise UserError(f"{args.student} makes {steps} steps; Stage II needs a student of {args.steps or 'at least 2'}")
    args.steps = steps
    if args.reference == "truth" and not measures.is_tiny_world(args.model):
        raise UserError("--reference truth is for the tiny world, where the truth is known; name a model")
    if args.redraw is not None and (args.reference == "truth" or "adv" not in args.objective):
        raise UserError("--redraw needs a model as --reference, and an --objective with a discriminator")
    if args.reference == "truth" and not args.pool:
        raise UserError("--reference truth needs a --pool of images")
    if args.pool and (parallel.processes() > 1 or args.pool < args.batch):
        raise UserError(f"--pool {args.pool}: works with one process and holds at least a --batch of images; 0: no pool")
    slower = [folder for folder in (run_folder(args.preset, stage, 2 * steps) for stage in (2, 1))
              if is_finished(folder)]
    args.reference = str(args.reference or (slower or [args.model])[0])
    check_blocks(args.cache, source.blocks, steps)
    if not args.cache and (args.objective != "adv" or args.correction != "mlp"):
        raise UserError("--objective and --correction need a --cache: without one there is nothing to distil or correct")
    if "feature" in args.objective and args.correction != "mlp":
        raise UserError(f"--objective {args.objective} trains f, and --correction {args.correction} has none")
    if args.cache == (0, source.blocks - 1) and args.lora and args.correction != "mlp":
        raise UserError("with all blocks cached and no f there is nothing to train: the adapters lie in the blocks")


def load_reference(args, student):
    """The generator of the real images, with the student's autoencoder and text: a few-step student, or the teacher."""
    mmdit = frozen_network(args, args.reference)
    reference = replace(load_pipeline(args.reference, args.device, mmdit=mmdit, text=student.text), vae=student.vae,
                        redraws=None if args.redraw is None else student)
    if reference.latent_shape() != student.latent_shape():
        raise UserError(f"{args.reference}: its latents are not those of {args.student}")
    if reference.redraws and len(reference.sigmas) < 3:
        raise UserError(f"{args.reference}: makes one step, and --redraw draws again from the middle of several")
    if parallel.is_first():
        print(f"reference: {args.reference}, {len(reference.sigmas) - 1} steps, w = {reference.guidance:g}")
    return reference


# --------------------------------------------------------------------------------------------- what the stages share

def open_prompts(args):
    """-> the prompts of a run, None for captions of the tiny world, and what encodes them.

    The tiny world's encoders are small and stay in memory. For other models, all prompts that the run will draw are
    encoded now, and read from the disk from then on.
    """
    tiny = measures.is_tiny_world(args.model)
    if args.prompts is None and not tiny:
        raise UserError(f"{args.model}: give --prompts FILE; only the tiny SD3 draws captions of its own")
    prompts = read_prompts(args.prompts) if args.prompts else None
    if tiny:
        return prompts, load_text_encoders(args.model, args.device)
    drawn = {"", *sheet_prompts(prompts)}
    for step in range(args.iterations):
        drawn.update(draw_prompts(prompts, args.batch, seeded(args.seed, step)))
    drawn.update(draw_prompts(prompts, getattr(args, "pool", 0), seeded(args.seed, -1)))
    text = EncodedText(args.text_cache, args.model, args.device, DTYPES[args.dtype])
    text.encode(drawn)
    return prompts, text


def finish(args, student, path, fake=None):
    """Write the student as a model that needs no flags, and Stage I's fake score beside it. All processes call it.

    path: of a model of the student's shape. Nothing samples with the fake score; experiments look at it. With --average,
    it followed the student's last weights, not the mean that is written.
    """
    mmdit, fake = whole(student.mmdit, path), fake and whole(fake, path)
    if parallel.is_first():
        paths = ("model", "prompts", "student", "reference", "backbone")
        training = {name: value for name, value in settings(args).items() if name not in paths}
        header = {"sigmas": json.dumps(student.sigmas.tolist()), "guidance": "1.0", "training": json.dumps(training)}
        text, model = student.text, weights.find_model(args.model)
        if isinstance(text, EncodedText) and model.is_file():
            text = load_text_encoders(model, "cpu", None)
        (args.out / "model_index.json").unlink(missing_ok=True)  # until save_pipeline is done, this is no whole model
        if fake:
            save_mmdit(fake, args.out / "fake", sample_size=student.latent_shape()[1])
        save_pipeline(replace(student, mmdit=mmdit, text=text), args.out, header, torch.float32,
                      text_folder=model if isinstance(text, EncodedText) else None)
        print(f"student: {args.out}")
    parallel.wait()


if __name__ == "__main__":
    commandline.run_script(main)
