"""Measure models: what their images are worth, what they cost, and whether the paper's claims hold in the tiny world.

    python evaluate.py quality --model runs/stage2 --against runs/stage1 tiny-sd3@steps=4,guidance=2
    python evaluate.py speed
    python evaluate.py memory
    python evaluate.py ablate

A model is a file, a folder or a Hugging Face id; PATH@steps=4,guidance=2,shift=3,cache=1-4 says how it is sampled.
"""

import argparse
import contextlib
import hashlib
import json
import math
import multiprocessing
import platform
import statistics
import time
import weakref
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageOps
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import AutoTokenizer, CLIPTextModelWithProjection, T5EncoderModel

import ablations
import flow
import metrics
import scores
import shapes
import tiny
import train
import weights
from adversarial import ConvNeXt, Heads
from cache import Cache, Compensator, effective_nfe, forward_flops, new_cache, sampling_flops
from mmdit import MMDiT
from sample import (DTYPES, LATENTS_AT_ONCE, TINY, CommandLine, Pipeline, decode, find_device, generate, image_size, open_model,
                    picture_bytes, positive_int, split_model, to_picture, write_picture)
from text import TextEncoders, read_prompts, silence_transformers
from vae import VAE

CLIP, VISION_MODEL = "openai/clip-vit-large-patch14", "facebook/dinov2-large"
PICKSCORE, PICKSCORE_PROCESSOR = "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
LEAST = 5  # images, of which each has three neighbours


# --------------------------------------------------------------------------------------------------- command line

def main():
    parser = CommandLine(description="Measure SD3 models and distilled students.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=CommandLine)
    add = partial(add_command, commands)
    one = add("quality", quality, "measure any number of models side by side, on the same prompts and seeds")
    one.add_argument("--model", default=str(TINY), help="PATH[@steps=…,guidance=…,shift=…,cache=…] (default: the tiny SD3)")
    one.add_argument("--against", nargs="+", default=[], metavar="MODEL")
    one.add_argument("--prompts", help="a file of prompts (default: captions of the tiny world, where the truth is known)")
    one.add_argument("--count", type=positive_int, help="so many prompts (default: all of the file; 1,024 captions)")
    one.add_argument("--samples", type=positive_int, help="images a prompt (default: 4; in the tiny world 128, for six prompts)")
    judges = one.add_argument_group("with --prompts")
    judges.add_argument("--clip", metavar="NAME", help=f"of the CLIP score and the CLIP distance (default: {CLIP})")
    judges.add_argument("--pickscore", nargs="?", const=PICKSCORE, metavar="NAME", help=f"default: {PICKSCORE}")
    judges.add_argument("--reference-images", metavar="DIR", help="photographs: adds Fréchet distance, precision, recall")
    judges.add_argument("--vision-model", metavar="NAME", help=f"whose features they are in (default: {VISION_MODEL}),")
    judges.add_argument("--inception", metavar="FILE", help="and a TorchScript Inception, for FID")
    judges.add_argument("--scores", nargs="+", default=[], choices=scores.PREFERENCES, help="through their own packages")
    two = add("speed", speed, "time teacher and students, part by part")
    two.add_argument("--model", help="a checkpoint (default: the tiny SD3)")
    two.add_argument("--preset", choices=SIZES, help="random weights of an official size instead")
    two.add_argument("--depth", type=positive_int, help="so many blocks of it and of each text encoder, for a small machine")
    two.add_argument("--size", type=image_size, help="H or HxW in pixels (default: the model's own)")
    two.add_argument("--batch", type=positive_int, default=32, help="at which the throughput is measured")
    four = add("memory", memory, "what an iteration takes at official sizes, all weights trained or adapters")
    four.add_argument("--stage", type=int, choices=MODES, default=1)
    four.add_argument("--preset", choices=SIZES, action="append", help="may be given several times (default: all)")
    four.add_argument("--at-once", type=positive_int, default=1, help="samples that the device works on at once")
    four.add_argument("--depth", type=positive_int, help="so many blocks of it, for a small machine")
    four.add_argument("--size", type=image_size, default=(1024, 1024), help="H or HxW in pixels (default: 1024)")
    three = add("ablate", ablate, "re-run the paper's ablations in the tiny world")
    three.set_defaults(preset="tiny")
    three.add_argument("--only", action="append", choices=ablations.ABLATIONS, help="may be given several times")
    three.add_argument("--seeds", type=positive_int, default=3, help="training runs of each kind: seeds 0, 1, …")
    args = parser.parse_args()
    args.device = find_device(args.device)
    bf16 = train.fast_bf16(args.device) if args.command == "ablate" else args.device.type != "cpu"  # as train.py, as sample.py
    args.dtype = args.dtype or ("bf16" if bf16 else "fp32")
    args.out = Path(args.out or f"runs/{args.command}")
    weights.check_writable(args.out / "x")
    args.run(args)


def add_command(commands, name, run, summary):
    parser = commands.add_parser(name, help=summary, description=summary)
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], help="of the arithmetic; default: as in "
                        + ("train.py" if name == "ablate" else "sample.py"))
    parser.add_argument("--out", help=f"default: runs/{name}")
    parser.set_defaults(run=run)
    return parser


def machine(device):
    """What the numbers were measured on."""
    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else \
        f"{threads} thread{'s' * (threads > 1)} of {cpu_name()}"
    return f"{name}, torch {torch.__version__.split('+')[0]}, Python {platform.python_version()}"


def cpu_name():
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.exists() else []
    return (names or [platform.processor() or platform.machine()])[0]


# -------------------------------------------------------------------------------------------------------- quality

def quality(args):
    """Images of every model, drawn once and kept; then what they are worth and what they cost, in one table."""
    refuse_judges(args)
    models = list(dict.fromkeys([args.model, *args.against]))
    folders = {model: args.out / "images" / fingerprint(model, args.dtype) for model in models}
    measure = (partial(measure_truth, args, shapes.load_recogniser(TINY)) if args.prompts is None
               else partial(measure_pictures, args, read_prompts(args.prompts)[:args.count], open_judges(args)))
    results = {}
    for model in models:
        label, found = model.replace(str(TINY), TINY.name), measure(model, folders[model])
        results[label] = {"cost": cost(args, model, folders[model] / "cost.json"), **found}
        weights.write_json(args.out / "quality.json", {"machine": machine(args.device), "dtype": args.dtype, "models": results})
    text = f"{table(results)}\n\n{notes(results)}{machine(args.device)}, {args.dtype}.\n"
    weights.write_text(args.out / "quality.md", text)
    print(text)


def refuse_judges(args):
    """Raise UserError for flags that would do nothing, or cannot do what they ask."""
    names = ("clip", "pickscore", "reference_images", "vision_model", "inception", "scores")
    given = [name for name in names if getattr(args, name)]
    if args.prompts is None and given:
        raise weights.UserError(f"--{given[0].replace('_', '-')} needs --prompts; without it, the tiny world's measures serve")
    if (args.inception or args.vision_model) and not args.reference_images:
        raise weights.UserError("--inception and --vision-model need --reference-images DIR, the images to compare with")
    if args.prompts is None and ((args.count or LEAST) < LEAST or args.samples == 1):
        raise weights.UserError(f"the tiny world's measures need a --count of at least {LEAST} and --samples of at least 2")


def fingerprint(model, dtype):
    """A folder's name for a model, how it is sampled and its files as they are now."""
    path, how = split_model(model)
    return f"{ablations.slug(Path(model).name)}-{weights.fingerprint(weights.find_model(path), how, dtype)}"


def draw_files(args, model, folder, prompts, seeds):
    """A PNG for each pair of prompt and seed. What is there already is not drawn again."""
    files = [folder / f"{hashlib.sha256(f'{seed} {prompt}'.encode()).hexdigest()[:20]}.png"
             for prompt, seed in zip(prompts, seeds, strict=True)]
    missing = [i for i, file in enumerate(files) if not file.exists()]
    if missing:
        pipeline, how = open_model(model, args.device, DTYPES[args.dtype])
        batch = batch_of(pipeline)
        sides = {side * pipeline.vae.factor for side in pipeline.latent_shape()[1:]}
        if args.prompts is None and sides != {shapes.SIZE}:
            raise weights.UserError(f"{model}: draws no scenes of the tiny world; give --prompts FILE")
        with tqdm(total=len(files), initial=len(files) - len(missing), desc=f"sampling {Path(model).name}") as bar:
            for start in range(0, len(missing), batch):
                part = missing[start:start + batch]
                latents = generate(pipeline, [prompts[i] for i in part], [seeds[i] for i in part], **how)
                for i, image in zip(part, decode(pipeline, latents), strict=True):
                    write_picture(to_picture(image), files[i])
                bar.update(len(part))
    return files


def batch_of(pipeline, most=32):
    _, h, w = pipeline.latent_shape()
    return max(1, min(most, LATENTS_AT_ONCE // (h * w)))


def measure_truth(args, recogniser, model, folder):
    """shapes.measure of a model that draws the tiny world."""
    def draw(prompts, seeds):
        files = draw_files(args, model, folder, prompts, seeds)
        return torch.stack([picture_bytes(Image.open(file)) for file in files]) / 127.5 - 1

    return shapes.measure(draw, recogniser, args.count or 1024, args.samples or 128)


# ------------------------------------------------------------------------------------- quality of official models

class Judges(NamedTuple):
    clip: scores.Clip
    pickscore: scores.Clip      # or None
    features: dict              # {name: (function of pictures, features of the reference images (M, D))}
    lpips: callable             # or None
    preferences: dict           # {name: function of a prompt and pictures}


def open_judges(args):
    pickscore = None
    if args.pickscore:
        own = any((Path(args.pickscore) / name).exists() for name in ("preprocessor_config.json", "processor_config.json"))
        pickscore = scores.load_clip(args.pickscore, args.device, None if own else PICKSCORE_PROCESSOR)
    features = {}
    if args.reference_images:
        files = find_pictures(args.reference_images)
        vision_model = args.vision_model or VISION_MODEL
        networks = {Path(vision_model).name: scores.load_vision_model(vision_model, args.device)}
        if args.inception:
            networks["Inception"] = scores.load_inception(args.inception, args.device)
        features = {name: (network, per_picture(network, files, crop=True)) for name, network in networks.items()}
    return Judges(scores.load_clip(args.clip or CLIP, args.device), pickscore, features, scores.load_diversity(args.device),
                  {name: scores.PREFERENCES[name](args.device) for name in args.scores})


def find_pictures(folder):
    files = sorted(file for file in Path(folder).rglob("*") if file.suffix.lower() in PICTURES)
    if len(files) < LEAST:
        raise weights.UserError(f"{folder}: holds {len(files)} images ({', '.join(PICTURES)}); at least {LEAST} are needed")
    return files


def per_picture(network, files, batch=16, crop=False):
    """A network's output for picture files, (N, …). `crop`: the centre square of each, 512 pixels a side."""
    def open_picture(file):
        with weights.explained(file, "an image"):
            picture = Image.open(file).convert("RGB")
        return ImageOps.fit(picture, (512, 512), Image.Resampling.LANCZOS) if crop else picture

    parts = [files[i:i + batch] for i in range(0, len(files), batch)]
    return torch.cat([network([open_picture(file) for file in part]) for part in tqdm(parts, desc="looking", leave=False)])


def measure_pictures(args, prompts, judges, model, folder):
    """{measure: {of what: (value, standard error)}} as in shapes.measure; errors by bootstrap over prompts."""
    count, samples = len(prompts), args.samples or 4
    if judges.features and count * samples < LEAST:
        raise weights.UserError(f"{count * samples} images are too few to compare with others; at least {LEAST} are needed")
    jobs = [(prompt, seed) for prompt in prompts for seed in range(samples)]
    files = draw_files(args, model, folder, *zip(*jobs))
    of_prompts = [files[i:i + samples] for i in range(0, len(files), samples)]

    def boot(name, values):  # one number a prompt, (P,)
        return metrics.bootstrap(lambda index: {name: values[index].mean().item()}, count)

    def embed(network):
        return per_picture(network, files).unflatten(0, (count, samples))                   # (P, S, D)

    def followed(clip, pictures, scale):
        texts = torch.cat([clip.prompts(prompts[i:i + 16]) for i in range(0, count, 16)])   # (P, D)
        return scale * (pictures * texts[:, None]).sum(2).mean(1)                           # (P,)

    seen = embed(judges.clip.pictures)
    result = {"text": boot("CLIP score", followed(judges.clip, seen, 100))}
    if judges.pickscore:
        preferred = followed(judges.pickscore, embed(judges.pickscore.pictures), judges.pickscore.scale)
        result["text"] |= boot("PickScore", preferred)
    for name, score in judges.preferences.items():
        values = [score(prompt, [Image.open(file).convert("RGB") for file in part])
                  for prompt, part in tqdm(list(zip(prompts, of_prompts)), desc=name, leave=False)]
        result["text"] |= boot(name, torch.tensor(values).mean(1))
    if samples > 1:
        cosine = (seen @ seen.mT).sum((1, 2)) - samples                                     # over pairs, without the diagonal
        result["diversity"] = boot("CLIP distance", 1 - cosine / (samples * (samples - 1)))
        if judges.lpips:
            values = [judges.lpips([Image.open(file) for file in part]) for part in tqdm(of_prompts, desc="LPIPS", leave=False)]
            result["diversity"] |= boot("LPIPS", torch.tensor(values))
    for name, (network, real) in judges.features.items():
        fake = embed(network)
        inside, covered = metrics.precision_recall(fake.flatten(0, 1), real)
        distance = "FID" if name == "Inception" else "Fréchet distance"
        result[f"in features of {name}"] = {  # its bootstrap is slow, and biased, but of about the right spread
            **metrics.bootstrap(lambda index: {distance: metrics.frechet_distance(fake[index].flatten(0, 1), real)}, count,
                                draws=20),
            **boot("precision", inside.unflatten(0, (count, samples)).double().mean(1)),
            **metrics.bootstrap(lambda index: {"recall": covered[index].double().mean().item()}, len(real))}
    return result


# ------------------------------------------------------------------------------------------------- table and notes

NOTES = {  # by the name of a row
    "CLIP score": "CLIP score: 100 cos. The paper does not name its CLIP: compare models here.",
    "PickScore": "PickScore: as the paper's, given the same prompts.",
    **{name: f"{name}: by its own package; as the paper's, given the same prompts." for name in scores.PREFERENCES},
    "Fréchet distance": "Fréchet distance, precision, recall: compare at the same number of images, and in the same features.",
    "FID": "FID: falls as images are added, and depends on how photographs are resized (here to centre squares of 512 pixels); "
           "near the paper's only with one image (--samples 1) for each of its COCO prompts.",
    "LPIPS": "LPIPS: AlexNet, mean over pairs of one prompt, at the images' own size; the paper's network is not known.",
    "CLIP distance": "CLIP distance: 1 - cos, mean over pairs of one prompt; not in the paper.",
    "peak memory, GB": "Time and memory: of a process of its own, text to pixels, batches of up to 32; memory of the GPU if "
                       "there is one, else of the process. FLOPs: of the transformer.",
}


def table(results):
    """Markdown: a row a measure, a column a model. {model: {group: {name: (value, error)}}}"""
    rows = dict.fromkeys((group, name) for groups in results.values() for group, values in groups.items() for name in values)
    lines = [f"| | | {' | '.join(results)} |", "|" + "---|" * (2 + len(results))]
    before = None
    for group, name in rows:
        cells = [number(*groups[group][name]) for groups in results.values()]
        lines.append(f"| {group if group != before else ''} | {name} | {' | '.join(cells)} |")
        before = group
    return "\n".join(lines)


def number(value, error):
    """A value to the two digits that its error leaves it; an exact one, or one of unknown error, to four."""
    if not error or not math.isfinite(error):
        return f"{value:.4g}" + (f" ± {error}" if error else "")
    digits = min(6, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def notes(results):
    names = {name for groups in results.values() for values in groups.values() for name in values}
    return "".join(f"{text}\n\n" for name, text in NOTES.items() if name in names)


# --------------------------------------------------------------------------------------------------------- costs

def cost(args, model, file):
    """What an image of a model costs, measured once for a machine, in a process that does nothing else."""
    where = machine(args.device)
    if file.exists() and weights.read_json(file).get("machine") == where:
        return weights.read_json(file)["cost"]
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            found = pool.submit(measure_cost, model, str(args.device), args.dtype).result()
    except BrokenProcessPool as error:
        raise weights.UserError(f"{model}: the process that measures its cost died, perhaps for want of memory") from error
    weights.write_json(file, {"machine": where, "cost": found})
    return found


@torch.no_grad()
def measure_cost(model, device, dtype):
    pipeline, how = open_model(model, device, DTYPES[dtype])
    batch, (_, h, w) = batch_of(pipeline), pipeline.latent_shape()
    steps = len(pipeline.sigmas(how.get("steps"), how.get("shift"))) - 1
    guided = how.get("guidance", pipeline.guidance()) > 1
    flops = sampling_flops(pipeline.mmdit, h, w, pipeline.text([""])[0].shape[1], steps, pipeline.cache, guided)
    ranges = pipeline.cache.ranges if pipeline.cache else []
    draw = partial(generate, pipeline, ["a circle"] * batch, range(batch), **how)
    times = clock({"image": lambda: decode(pipeline, draw())}, pipeline.device)["image"]
    return {"steps": (steps, 0),
            "effective evaluations": (effective_nfe(len(pipeline.mmdit.joint_blocks), ranges, steps, guided), 0),
            "GFLOP an image": (flops / 1e9, 0),
            "seconds an image": (statistics.median(times) / batch, statistics.stdev(times) / batch),
            "peak memory, GB": (peak_memory(pipeline.device) / 1e9, 0)}


def clock(tasks, device, rounds=5):
    """Seconds that each of the functions takes, {name: [one a round]}. They take turns, after a round that does not count."""
    times = {name: [] for name in tasks}
    for i, name in tqdm([(i, name) for i in range(rounds + 1) for name in tasks], desc="timing", leave=False):
        synchronize(device)
        start = time.perf_counter()
        tasks[name]()
        synchronize(device)
        if i:
            times[name].append(time.perf_counter() - start)
    return times


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device):
    """Bytes: of the GPU's memory, or of the process's, which Linux tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # starts anew with a program, which getrusage does not
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), math.nan)


# --------------------------------------------------------------------------------------------------------- speed

@torch.no_grad()
def speed(args):
    """Time teacher (28 × 2) and students (4, 2 and fewer), and their parts, in one run, at batch 1 and at --batch."""
    device, dtype = args.device, DTYPES[args.dtype]
    if args.preset and args.model or args.depth and not args.preset:
        raise weights.UserError("give --model, or else --preset, which --depth goes with")
    if args.preset and (args.depth or 1) > SIZES[args.preset][0]:
        raise weights.UserError(f"--depth {args.depth}: {args.preset} has {SIZES[args.preset][0]} blocks")
    pipeline = random_pipeline(args.preset, args.depth, device, dtype) if args.preset \
        else open_model(args.model or TINY, device, dtype)[0]
    mmdit, blocks = pipeline.mmdit, len(pipeline.mmdit.joint_blocks)
    cache = pipeline.cache
    if cache is None or cache.compensators is None:
        cache = new_cache(cached_share(args.preset, blocks), mmdit.pos_embed.shape[2], device)
        cache.compensators.to(dtype)
    shape = pipeline.latent_shape(args.size)
    tokens = pipeline.text([""])[0].shape[1]
    arms = {"teacher, 28 × 2": (28, True, None), "4 steps": (4, False, None), "2 steps": (2, False, None),
            f"{effective_nfe(blocks, cache.ranges, 2):.2f} steps": (2, False, cache)}
    flops = {name: sampling_flops(mmdit, *shape[1:], tokens, steps, cached, guided)
             for name, (steps, guided, cached) in arms.items()}

    measured = {}
    for batch in sorted({1, args.batch}):
        prompts = ["a circle"] * batch
        cond, uncond = pipeline.text(prompts), pipeline.text([""] * batch)
        noise = flow.initial_noise(shape, range(batch)).to(device)
        tasks = {"text": partial(pipeline.text, prompts), "VAE": partial(pipeline.vae.decode, noise.to(dtype))}
        for name, (steps, guided, cached) in arms.items():
            tasks[name] = partial(flow.sample, mmdit, noise, flow.sd3_sigmas(steps, pipeline.shift), cond, uncond,
                                  7.0 if guided else 1.0, cache=cached)
        measured[batch] = clock(tasks, device)
    weights.write_json(args.out / "speed.json", {"machine": machine(device), "dtype": args.dtype, "seconds": measured,
                                                 "flops": flops})

    lines = ["| sampler | evaluations | transformer, s | of the teacher's | by FLOPs | text to pixels, s | images/s, batch "
             f"{args.batch} |", "|" + "---|" * 7]
    one, many = ({name: statistics.median(times) for name, times in measured[batch].items()} for batch in (1, args.batch))
    for name, (steps, guided, cached) in arms.items():
        whole, rate = (part[name] + part["VAE"] + part["text"] * (2 if guided else 1) for part in (one, many))
        evaluations = effective_nfe(blocks, cached.ranges if cached else [], steps, guided)
        lines.append(f"| {name} | {evaluations:.2f} | {many[name]:.3g} | 1/{many['teacher, 28 × 2'] / many[name]:.1f} "
                     f"| 1/{flops['teacher, 28 × 2'] / flops[name]:.1f} | {whole:.3g} | {args.batch / rate:.3g} |")
    what = f"random weights of {args.preset}" + (f", {blocks} blocks deep" if args.depth else "") if args.preset \
        else str(args.model or TINY.name)
    text = "\n".join(lines) + (
        f"\n\n{what}, {8 * shape[1]}×{8 * shape[2]}; medians of 5 rounds in turn; transformer: batch {args.batch}, text to "
        f"pixels: batch 1, of which text {one['text']:.3g} s (twice for the teacher) and VAE {one['VAE']:.3g} s; "
        f"{machine(device)}, {args.dtype}.\n")
    weights.write_text(args.out / "speed.md", text)
    print(text)


SIZES = {  # of the transformers: blocks, which are also the heads; and what else sets them apart
    "sd3-medium": (24, {"pos_max": 192}),
    "sd3.5-medium": (24, {"pos_max": 384, "qk_norm": True, "dual": range(13)}),
    "sd3.5-large": (38, {"pos_max": 192, "qk_norm": True})}
CLIPS = {"tokenizer": (768, 12, 12, "quick_gelu"), "tokenizer_2": (1280, 32, 20, "gelu")}  # width, layers, heads, activation


@torch.no_grad()
def random_pipeline(preset, depth, device, dtype):
    """All of an SD3 in its true size, with random weights; `depth` blocks of the transformer and of each text encoder."""
    def build(kind, **config):
        return kind.from_pretrained(None, config=kind.config_class(**config), state_dict={}, dtype=dtype)

    silence_transformers()
    text_depth = partial(min, depth or 100)
    tokenizers = [AutoTokenizer.from_pretrained(TINY / name, model_max_length=length)
                  for name, length in (("tokenizer", 77), ("tokenizer_2", 77), ("tokenizer_3", 256))]
    clips = [build(CLIPTextModelWithProjection, hidden_size=width, intermediate_size=4 * width, projection_dim=width,
                   num_hidden_layers=text_depth(layers), num_attention_heads=heads, hidden_act=activation,
                   **{f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")})
             for tokenizer, (width, layers, heads, activation) in zip(tokenizers, CLIPS.values())]
    t5 = build(T5EncoderModel, d_model=4096, d_kv=64, num_heads=64, d_ff=10240, num_layers=text_depth(24),
               feed_forward_proj="gated-gelu")
    with torch.device("meta"):
        mmdit = new_mmdit(preset, depth)
        vae = VAE()
    for network in (mmdit, vae):
        network.to(dtype).to_empty(device=device)
        for parameter in network.parameters():
            parameter.normal_(std=0.02)
    text = TextEncoders(*clips, t5, tokenizers).to(device)
    return Pipeline(*(network.requires_grad_(False).eval() for network in (mmdit, vae, text)))


def cached_share(preset, blocks):
    """The cached range of a preset, or of the one with so many blocks; in a network of other depth, the same share of them."""
    depths = {"tiny": tiny.DEPTH, **{name: depth for name, (depth, _) in SIZES.items()}}
    preset = preset or next((name for name, depth in depths.items() if depth == blocks), "sd3-medium")
    (first, last), = train.PRESETS[2][preset]["cache"]
    whole = depths[preset]
    count = max(1, round((last - first + 1) * blocks / whole))
    first = min(first, blocks - count)
    return [(first, first + count - 1)]


# --------------------------------------------------------------------------------------------------------- memory

MODES = {1: {"all weights": [], "all weights, --offload": ["--offload"], "--lora 64": ["--lora", "64"]},
         2: {"all weights, --offload": ["--lora", "0", "--offload"], "--lora 64": []}}


def memory(args):
    """Peak memory and work of an iteration (train.distribution_matching, train.refinement), with random weights of true size.

    On a GPU it runs and is timed. On a CPU nothing is computed: the same code goes over fake tensors, and what it would hold
    and multiply is counted.
    """
    lines = ["| preset | what is trained | peak memory, GB | F a sample | PFLOP an iteration | s an iteration | hours |",
             "|" + "---|" * 7]
    for preset in args.preset or SIZES:
        for name, flags in MODES[args.stage].items():
            settings = train.parse_arguments([
                "--stage", str(args.stage), "--preset", preset, "--device", str(args.device), "--dtype", "bf16",
                "--at-once", str(args.at_once), "--out", str(args.out / "run"), *flags])
            if args.device.type == "cuda":
                peak, seconds = run_iterations(args, settings)
            else:
                peak, seconds = count_memory(args, settings), 0
            flops, hours = count_flops(args, settings), seconds * settings.iterations / 3600
            with torch.device("meta"):
                one = forward_flops(new_mmdit(preset, args.depth), args.size[0] // 8, args.size[1] // 8, TOKENS)
            row = [preset, name, f"{peak / 1e9:.1f}" if peak else "does not fit", f"{flops / settings.batch / one:.2f}",
                   f"{flops / 1e15:.2f}", *(f"{x:.3g}" if x else "unmeasured" for x in (seconds, hours))]
            lines.append(f"| {' | '.join(row)} |")
            weights.write_text(args.out / "memory.md", "\n".join(lines) + "\n")
            print(lines[-1])
    text = (f"Stage {'I' * args.stage}, random weights{f', {args.depth} blocks deep' if args.depth else ''}, "
            f"{args.size[0]}×{args.size[1]}, a batch of "
            f"{settings.batch}, {args.at_once} at once, bf16; hours for {settings.iterations} iterations; memory "
            + ("as torch's allocator measured it; " if args.device.type == "cuda" else
               "of all tensors at their peak, counted, not measured: what the allocator and the kernels need comes on top; ")
            + f"{machine(args.device)}.\n")
    weights.write_text(args.out / "memory.md", "\n".join([*lines, "", text]))
    print("\n" + "\n".join([*lines, "", text]))


TOKENS = 77 + 256


def new_mmdit(preset, depth):
    blocks, more = SIZES[preset]
    return MMDiT(depth=depth or blocks, width=64 * blocks, heads=blocks, context_dim=4096, pooled_dim=2048, **more)


def random_networks(args, settings):
    """What an iteration needs beside its settings, of true size: the first arguments of `updates`. Their values do not matter."""
    def load(device, dtype):
        with torch.device(device), default_dtype(dtype):
            network = new_mmdit(settings.preset, args.depth).requires_grad_(False)
        network.settings["sample_size"] = args.size[0] // 8
        return network

    def text(prompts):  # encoded beforehand
        shapes = (len(prompts), TOKENS, 4096), (len(prompts), 2048)
        return [torch.zeros(shape, dtype=torch.bfloat16, device=settings.device) for shape in shapes]

    frozen, trained, _ = train.open_networks(settings, load, trained=3 - settings.stage)
    with torch.device(settings.device):
        pipeline = Pipeline(frozen, VAE().requires_grad_(False), text)
        if settings.stage == 1:
            return pipeline, *trained
        reference = replace(pipeline, mmdit=train.frozen_network(settings, load))
        backbone = ConvNeXt(**CONVNEXT).requires_grad_(False)
        ranges = cached_share(settings.preset, len(frozen.joint_blocks))
        cache = Cache(ranges, nn.ModuleList(Compensator(frozen.pos_embed.shape[2]) for _ in ranges))
        return pipeline, reference, *trained, cache, backbone, Heads(backbone.widths)


CONVNEXT = {"depths": (3, 4, 30, 3), "widths": (384, 768, 1536, 3072), "embedding": 1024}  # convnext_xxlarge


def updates(settings, first, *others):
    """draw(generator), and what to make of its draws, in turn: in Stage II one update of the generator, then the discriminator's."""
    if settings.stage == 1:
        _, draw, learn, _ = train.distribution_matching(settings, first, *others, ["a prompt"])
        return draw, [learn]
    reference, student, cache, backbone, heads = others
    reference.mmdit.settings.update(sigmas=json.dumps(flow.student_sigmas(4, first.shift).tolist()), guidance="1.0")
    sigmas = flow.student_sigmas(2, first.shift).to(settings.device)
    draw, learn, _ = train.refinement(settings, first, reference, student, cache, sigmas, ["a prompt"], backbone, heads)
    start = settings.alone + (1 + settings.turns) * settings.warmup  # past the warm-up: all that learns moves
    return draw, [partial(learn, start + i) for i in range(1 + settings.turns)]


def run_iterations(args, settings):
    """Bytes at the peak, and seconds of an iteration; zeros where memory does not suffice."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(args.device)
    try:
        draw, learn = updates(settings, *random_networks(args, settings))
        seconds = clock({i: lambda turn=turn: turn(draw(train.seeded(0, 0))) for i, turn in enumerate(learn)}, args.device, rounds=3)
    except torch.OutOfMemoryError:
        return 0, 0
    return torch.cuda.max_memory_allocated(args.device), statistics.mean(map(statistics.median, seconds.values()))


def count_iterations(args, settings, counter):
    """Two iterations of each kind over fake tensors: nothing is computed, but `counter` sees every operation. Returns how many."""
    settings = argparse.Namespace(**{**vars(settings), "device": torch.device("cpu"), "offload": settings.offload and "meta"})
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, counter:
        networks = random_networks(args, settings)
    draw, learn = updates(settings, *networks)
    draws = [draw(train.seeded(0, i)) for i in range(2)]
    with fake, counter:
        for part in draws:
            for turn in learn:
                turn(part)
    return len(draws) * len(learn)


def count_memory(args, settings):
    """Bytes of all tensors that are there at once, at their peak, with two micro-batches an iteration."""
    memory = PeakMemory()
    count_iterations(args, argparse.Namespace(**{**vars(settings), "batch": 2 * settings.at_once}), memory)
    return memory.peak


def count_flops(args, settings):
    """Floating-point operations of an iteration, the mean of two; in Stage II, of an update of either side."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH):  # the one whose products torch counts on a CPU
        count = count_iterations(args, argparse.Namespace(**{**vars(settings), "at_once": None}), counter)
    return counter.get_total_flops() / count


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the storages that are alive."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.remove, key, size)

    def remove(self, key, size):
        self.known.remove(key)
        self.now -= size


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# ------------------------------------------------------------------------------------------------------ ablations

def ablate(args, captions=1024, samples=128):
    """Train, measure and report all arms of the ablations (ablations.py). The report is written anew after each."""
    names = args.only or list(ablations.ABLATIONS)
    recogniser = shapes.load_recogniser(TINY)
    draw = partial(train.draw, args)

    def measure(pipeline, how):
        return shapes.measure(partial(draw, pipeline, how), recogniser, captions, samples)

    def write():
        text = (f"`python evaluate.py ablate{''.join(f' --only {name}' for name in args.only or ())} --seeds {args.seeds}`; "
                f"{captions} captions, {samples} images a prompt; {machine(args.device)}, {args.dtype}.\n\n"
                + ablations.report(names, args.seeds, args.out))
        weights.write_text(args.out / "ablate.md", text)
        return text

    for _ in ablations.run(names, args.seeds, args.out, args.device, args.dtype, measure):
        write()
    for name in names:
        ablations.sheet(name, args.out, args.device, args.dtype, draw)
        if ablations.ABLATIONS[name].curves:
            ablations.plot(name, args.seeds, args.out)
    print(write())


if __name__ == "__main__":
    weights.run_script(main)
