"""How much each block changes from the first step to the second (Fig. 5a): which blocks to cache.

    python -m experiments.reuse runs/stage1

In the tiny world it also re-uses every range of --length blocks plainly and measures what that costs (Fig. 12).
"""

import commandline  # first: it sets how threads wait before torch is loaded

from pathlib import Path

import torch

import cache
import flow
import weights
from commandline import DEVICE, CommandLine, UserError, count, find_device
from pipeline import TINY, load_pipeline
from prompts import draw_prompts, read_prompts
from tinyworld import measures, scenes


def main():
    parser = CommandLine(description="The error of re-using each block of a student (Fig. 5a).")
    parser.add_argument("model", nargs="?", default=str(TINY), help="a student of at least 2 steps")
    parser.add_argument("--prompts", help="a file; without it captions of the tiny world")
    parser.add_argument("--length", type=count, default=4, help="blocks of each range whose plain re-use is measured")
    parser.add_argument("--device", type=find_device, default=DEVICE, help="where it runs")
    parser.add_argument("--out", type=Path, default=Path("runs/reuse"), help="a folder")
    args = parser.parse_args()
    weights.check_writable(args.out)
    pipeline = load_pipeline(args.model, args.device)
    if "sigmas" not in pipeline.mmdit.metadata:  # a teacher: look at the nodes of a student of two steps
        pipeline.sigmas, pipeline.guidance = flow.student_sigmas(2, pipeline.shift).to(pipeline.device), 1.0
    if len(pipeline.sigmas) < 3:
        raise UserError(f"{args.model} makes one step; re-use needs two")
    prompts = draw_prompts(read_prompts(args.prompts) if args.prompts else None, 64, torch.Generator().manual_seed(0))
    squares, batch = 0, pipeline.batch()
    for i in range(0, len(prompts), batch):
        some = prompts[i:i + batch]
        noise = flow.initial_noise(pipeline.latent_shape(), range(i, i + len(some))).to(pipeline.device)
        squares += len(some) * cache.reuse_errors(pipeline.mmdit, noise, pipeline.sigmas, pipeline.text(some)).square()
    errors = (squares / len(prompts)).sqrt()                                            # (blocks, 2)
    lines = [f"{args.model}, from σ = {pipeline.sigmas[0]:.3g} to {pipeline.sigmas[1]:.3g}", "",
             "| block | image | text |", "|---|---|---|"]
    lines += [f"| {block} | {image:.3f} | {text:.3f} |" for block, (image, text) in enumerate(errors.tolist())]
    print("\n".join(lines))
    if not args.prompts and pipeline.latent_shape()[1] * pipeline.vae.factor == scenes.SIZE:
        ranges = {}
        for first in range(len(errors) - args.length + 1):
            last = first + args.length - 1
            ranges[f"blocks {first}-{last}"] = measures.measure(
                pipeline.sampled_with(blocks=(first, last)).images, captions=256, samples=32)
        lines += ["", measures.table(ranges)]
        print(lines[-1])
    weights.write_text(args.out / "reuse.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    commandline.run_script(main)
