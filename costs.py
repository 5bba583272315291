"""What models cost: the time of sampling, the memory and the work of a training iteration.

The two commands here, `evaluate.py speed` and `evaluate.py memory`, also take official sizes, with random weights: a cost does
not depend on values.
"""

import argparse
import contextlib
import json
import math
import platform
import statistics
import time
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import AutoTokenizer, CLIPTextModelWithProjection, T5EncoderModel

import flow
import tiny
import train
import weights
from adversarial import ConvNeXt, Heads
from cache import Cache, Compensator, effective_nfe, forward_flops, new_cache, sampling_flops
from mmdit import MMDiT
from sample import DTYPES, LATENTS_AT_ONCE, TINY, Pipeline, decode, generate, open_model
from text import TextEncoders, silence_transformers
from vae import VAE


# ---------------------------------------------------------------------------------------------------------------- speed

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


# --------------------------------------------------------------------------------------------------------------- memory

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
        tasks = {i: lambda turn=turn: turn(draw(train.seeded(0, 0))) for i, turn in enumerate(learn)}
        seconds = clock(tasks, args.device, rounds=3)
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


# --------------------------------------------------------------------------------------- official sizes, random weights

SIZES = {  # of the transformers: blocks, which are also the heads; and what else sets them apart
    "sd3-medium": (24, {"pos_max": 192}),
    "sd3.5-medium": (24, {"pos_max": 384, "qk_norm": True, "dual": range(13)}),
    "sd3.5-large": (38, {"pos_max": 192, "qk_norm": True})}
CLIPS = {"tokenizer": (768, 12, 12, "quick_gelu"), "tokenizer_2": (1280, 32, 20, "gelu")}  # width, layers, heads, activation
TOKENS = 77 + 256  # of text
CONVNEXT = {"depths": (3, 4, 30, 3), "widths": (384, 768, 1536, 3072), "embedding": 1024}  # convnext_xxlarge


def new_mmdit(preset, depth):
    blocks, more = SIZES[preset]
    return MMDiT(depth=depth or blocks, width=64 * blocks, heads=blocks, context_dim=4096, pooled_dim=2048, **more)


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


# --------------------------------------------------------------------------------------------------------- of a sampler

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


def batch_of(pipeline, most=32):
    _, h, w = pipeline.latent_shape()
    return max(1, min(most, LATENTS_AT_ONCE // (h * w)))


# ---------------------------------------------------------------------------------------------------------- the machine

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
