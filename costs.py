"""What sampling takes: counted for any model, and timed (`evaluate.py speed`).

Official sizes can be timed with random weights: time does not depend on their values.
"""

import platform
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, CLIPTextModelWithProjection, T5EncoderModel

import flow
import weights
from cache import CachedSteps, effective_nfe, new_cache, sampling_flops
from commandline import UserError
from mmdit import MMDiT
from pipeline import DTYPES, TINY, Pipeline, load_pipeline
from text import TextEncoders, silence_transformers
from vae import VAE

TEACHER = "teacher, 28 × 2"
COLUMNS = ("sampler", "evaluations", "transformer, s", "of the teacher's", "by FLOPs", "text to pixels, s", "images/s")

SIZES = {  # of the official transformers: blocks, which are also the heads; and what else sets them apart
    "sd3-medium": (24, {"pos_max": 192}),
    "sd3.5-medium": (24, {"pos_max": 384, "qk_norm": True, "dual": range(13)}),
    "sd3.5-large": (38, {"pos_max": 192, "qk_norm": True}),
}
TOKENIZERS = (("tokenizer", 77), ("tokenizer_2", 77), ("tokenizer_3", 256))  # tokens that each encoder reads
CLIPS = ((768, 12, 12, "quick_gelu"), (1280, 32, 20, "gelu"))  # width, layers, heads, activation
T5 = {"d_model": 4096, "d_kv": 64, "num_heads": 64, "d_ff": 10240, "feed_forward_proj": "gated-gelu"}
T5_LAYERS = 24


# ----------------------------------------------------------------------------------------------------------- counted

def sampling_cost(sampler):
    """What an image takes, {of what: (value, 0)}, as shapes.measure has it. Operations are the transformer's."""
    pipeline, options, _ = sampler
    _, h, w = pipeline.latent_shape()
    steps = len(pipeline.sigmas(options.get("steps"))) - 1
    guided = options.get("guidance", pipeline.guidance()) > 1
    depth, tokens = len(pipeline.mmdit.joint_blocks), pipeline.text([""])[0].shape[1]
    blocks = pipeline.cache.blocks if pipeline.cache else None
    flops = sampling_flops(pipeline.mmdit, h, w, tokens, steps, pipeline.cache, guided)
    return {"steps": (steps, 0), "effective evaluations": (effective_nfe(depth, blocks, steps, guided), 0),
            "GFLOP an image": (flops / 1e9, 0)}


# ------------------------------------------------------------------------------------------------------------- speed

@torch.no_grad()
def speed(args):
    """Time teacher (28 × 2) and students (4, 2 and fewer), and their parts, in one run, at batch 1 and at --batch."""
    pipeline = open_pipeline(args)
    depth, shape = len(pipeline.mmdit.joint_blocks), pipeline.latent_shape(args.size)
    cache = pipeline.cache or new_cache(cached_blocks(depth), pipeline.mmdit.pos_embed.shape[2])
    cache.compensator.to(args.device, DTYPES[args.dtype])
    samplers = {  # name: steps, guidance, cache
        TEACHER: (28, 7.0, None),
        "4 steps": (4, 1.0, None),
        "2 steps": (2, 1.0, None),
        f"{effective_nfe(depth, cache.blocks, 2):.2f} steps": (2, 1.0, cache),
    }
    seconds = {batch: clock(tasks(pipeline, samplers, shape, batch), args.device) for batch in sorted({1, args.batch})}
    tokens = pipeline.text([""])[0].shape[1]
    flops = {name: sampling_flops(pipeline.mmdit, *shape[1:], tokens, steps, cached, guidance > 1)
             for name, (steps, guidance, cached) in samplers.items()}
    measured = {"machine": machine(args.device), "dtype": args.dtype, "seconds": seconds, "flops": flops}
    weights.write_json(args.out / "speed.json", measured)

    one, many = ({name: statistics.median(times) for name, times in seconds[batch].items()}
                 for batch in (1, args.batch))
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for name, (steps, guidance, cached) in samplers.items():
        texts = 2 if guidance > 1 else 1
        single, batched = (part[name] + part["VAE"] + texts * part["text"] for part in (one, many))
        cells = [
            name,
            f"{effective_nfe(depth, cached.blocks if cached else None, steps, guidance > 1):.2f}",
            f"{many[name]:.3g}",
            f"1/{many[TEACHER] / many[name]:.1f}",
            f"1/{flops[TEACHER] / flops[name]:.1f}",
            f"{single:.3g}",
            f"{args.batch / batched:.3g}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    model = f"random weights of {args.preset}, depth {depth}" if args.preset else args.model or TINY.name
    height, width = (pipeline.vae.factor * side for side in shape[1:])
    lines += ["", f"{model}, {height}×{width}; medians of rounds in which all take turns. Transformer and images/s: "
              f"batch {args.batch}. Text to pixels: batch 1, of which text {one['text']:.3g} s (twice for the teacher) "
              f"and VAE {one['VAE']:.3g} s. {machine(args.device)}, {args.dtype}."]
    weights.write_text(args.out / "speed.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


def open_pipeline(args):
    """The model that the command line names, or random weights of an official size."""
    if args.preset and args.model or args.depth and not args.preset:
        raise UserError("give a model, or else --preset, which --depth goes with")
    if args.preset is None:
        return load_pipeline(args.model or TINY, args.device, DTYPES[args.dtype])
    blocks, _ = SIZES[args.preset]
    if (args.depth or 1) > blocks:
        raise UserError(f"--depth {args.depth}: {args.preset} has {blocks} blocks")
    return random_pipeline(args.preset, args.depth or blocks, args.device, DTYPES[args.dtype])


def tasks(pipeline, samplers, shape, batch):
    """{name: a function that does this part of the work for a batch}: text, VAE and each sampler's transformer."""
    prompts = ["a circle"] * batch
    cond, uncond = pipeline.text(prompts), pipeline.text([""] * batch)
    noise = flow.initial_noise(shape, range(batch)).to(pipeline.device)                 # (batch, C, h, w)
    latents = noise.to(pipeline.mmdit.pos_embed.dtype)

    def sample(steps, guidance, cache):
        sigmas = flow.sd3_sigmas(steps, pipeline.shift)
        flow.sample(CachedSteps(pipeline.mmdit, cache), noise, sigmas, cond, uncond, guidance)

    return {"text": partial(pipeline.text, prompts), "VAE": partial(pipeline.vae.decode, latents),
            **{name: partial(sample, *options) for name, options in samplers.items()}}


def clock(tasks, device, rounds=5):
    """Seconds of each function, {name: [one a round]}. They take turns, after a round that does not count."""
    seconds = {name: [] for name in tasks}
    for i, name in tqdm([(i, name) for i in range(rounds + 1) for name in tasks], desc="timing", leave=False):
        synchronize(device)
        start = time.perf_counter()
        tasks[name]()
        synchronize(device)
        if i:
            seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cached_blocks(depth):
    """(first, last) of the blocks to cache in a network without a cache; a preset's, where one is as deep."""
    first = max(min(2, depth - 1), depth // 12)
    number = 10 if depth == 38 else max(1, depth // 3)  # 10 of 38 and 8 of 24 are the paper's
    return first, first + number - 1


# ------------------------------------------------------------------------------------ official sizes, random weights

@torch.no_grad()
def random_pipeline(preset, depth, device, dtype):
    """All of an SD3 in its true size, with random weights: `depth` blocks, and no text encoder of more layers."""
    silence_transformers()
    tokenizers = [AutoTokenizer.from_pretrained(TINY / name, model_max_length=length) for name, length in TOKENIZERS]
    build = partial(random_encoder, device, dtype)
    clips = [build(CLIPTextModelWithProjection, hidden_size=width, intermediate_size=4 * width, projection_dim=width,
                   num_hidden_layers=min(depth, layers), num_attention_heads=heads, hidden_act=activation,
                   bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                   pad_token_id=tokenizer.pad_token_id)
             for tokenizer, (width, layers, heads, activation) in zip(tokenizers, CLIPS)]
    t5 = build(T5EncoderModel, num_layers=min(depth, T5_LAYERS), **T5)
    text = TextEncoders(*clips, t5, tokenizers, T5["d_model"])
    blocks, more = SIZES[preset]
    with torch.device("meta"):
        mmdit = MMDiT(depth=depth, width=64 * blocks, heads=blocks, context_dim=4096, pooled_dim=2048, **more)
        vae = VAE()
    for network in (mmdit, vae):
        network.to(dtype).to_empty(device=device)
        for parameter in network.parameters():
            parameter.normal_(std=0.02)
    return Pipeline(*(network.requires_grad_(False).eval() for network in (mmdit, vae, text)))


def random_encoder(device, dtype, kind, **config):
    """A text encoder of transformers, made there and in `dtype` from the start: T5-XXL in fp32 takes 19 GB."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return kind(kind.config_class(**config)).eval()
    finally:
        torch.set_default_dtype(before)


# ------------------------------------------------------------------------------------------------------- the machine

def machine(device):
    """What the numbers were measured on."""
    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else \
        f"{threads} thread{'s' * (threads > 1)} of {cpu_name()}"
    return f"{name}, torch {torch.__version__.split('+')[0]}, Python {platform.python_version()}"


def cpu_name():
    info = Path("/proc/cpuinfo")  # platform.processor() says no more than x86_64 on Linux
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or platform.machine()])[0]
