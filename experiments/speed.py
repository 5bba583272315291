"""What sampling takes: teacher (28 × 2) and students (4, 2 and fewer evaluations), timed and counted in one run.

    python -m experiments.speed
    python -m experiments.speed MODEL --cache 2-9
"""

import commandline  # first: it sets how threads wait before torch is loaded

import platform
import statistics
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import flow
import weights
from cache import CachedSteps, check_blocks, effective_nfe, new_cache
from commandline import DEVICE, CommandLine, UserError, count, find_device, image_size
from pipeline import DTYPES, TINY, load_pipeline


def main():
    parser = CommandLine(description="Time teacher and students.")
    parser.add_argument("model", nargs="?", default=str(TINY))
    parser.add_argument("--size", type=image_size, help="H or HxW in pixels; without it the model's own")
    parser.add_argument("--batch", type=count, default=1)
    parser.add_argument("--cache", type=commandline.blocks, default="1-4", metavar="A-B", help="blocks to cache")
    parser.add_argument("--rounds", type=count, default=5, help="of timing; their medians are shown")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], help="without it fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--device", type=find_device, default=DEVICE, help="where it runs")
    parser.add_argument("--out", type=Path, default=Path("runs/speed"), help="a folder")
    args = parser.parse_args()
    args.dtype = args.dtype or ("fp32" if args.device.type == "cpu" else "bf16")
    weights.check_writable(args.out)
    if not args.cache:
        raise UserError("--cache: name the blocks A-B to cache")
    text = "\n".join(speed(args))
    print(text)
    weights.write_text(args.out / "speed.md", text + "\n")


@torch.no_grad()
def speed(args):
    """-> the lines of a table."""
    pipeline = load_pipeline(args.model, args.device, DTYPES[args.dtype])
    mmdit, vae, shape, blocks = pipeline.mmdit, pipeline.vae, pipeline.latent_shape(args.size), args.cache
    cond = [part.expand(args.batch, *part.shape[1:]) for part in pipeline.text([""])]
    depth = len(mmdit.joint_blocks)
    check_blocks(blocks, depth, steps=2)
    cache = new_cache(blocks, mmdit.pos_embed.shape[2], device=args.device)
    cache.compensator.to(DTYPES[args.dtype])
    noise = torch.randn(args.batch, *shape, device=args.device)
    samplers = {"teacher, 28 × 2": (28, 7.0, None), "4 steps": (4, 1.0, None), "2 steps": (2, 1.0, None),
                "2 steps, blocks {}-{} cached".format(*blocks): (2, 1.0, cache)}

    def run(name):
        """Seconds that a sampler or the VAE takes."""
        start = time.perf_counter()
        if name == "VAE":
            out = vae.decode(noise.to(DTYPES[args.dtype]))
        else:
            steps, guidance, cache = samplers[name]
            sigmas = flow.sd3_sigmas(steps, 3.0).to(args.device)
            out = flow.sample(CachedSteps(mmdit, cache), noise, sigmas, cond, cond, guidance)
        out.sum().item()  # waits until a GPU is done
        return time.perf_counter() - start

    flops = {}
    for name in (*samplers, "VAE"):  # the first round, which is not timed
        with FlopCounterMode(display=False) as counter:
            run(name)
        flops[name] = counter.get_total_flops()
    rounds = [{name: run(name) for name in flops} for _ in range(args.rounds)]  # all take turns
    seconds = {name: statistics.median(times[name] for times in rounds) for name in flops}
    teacher = next(iter(samplers))
    lines = ["| sampler | evaluations | seconds | time / teacher's | FLOPs / teacher's |", "|---|---|---|---|---|"]
    for name, (steps, guidance, cache_) in samplers.items():
        nfe = effective_nfe(depth, cache_ and cache_.blocks, steps, guidance > 1)
        lines.append(f"| {name} | {nfe:.2f} | {seconds[name]:.3g} | 1/{seconds[teacher] / seconds[name]:.1f} | "
                     f"1/{flops[teacher] / flops[name]:.1f} |")
    machine = torch.cuda.get_device_name() if args.device.type == "cuda" else \
        f"{torch.get_num_threads()} CPU threads"
    height, width = (vae.factor * side for side in shape[1:])
    return [*lines, "", f"{args.model}, {depth} blocks, {height}×{width}, batch {args.batch}; without text "
            f"and VAE, which takes {seconds['VAE']:.3g} s. FLOPs on a CPU leave attention out. {machine}, {args.dtype}, torch "
            f"{torch.__version__}, Python {platform.python_version()}."]


if __name__ == "__main__":
    commandline.run_script(main)
