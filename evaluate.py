"""Measure models: what their images are worth, what they cost, and whether the paper's claims hold in the tiny world.

    python evaluate.py quality --model runs/stage2 --against runs/stage1 tiny-sd3@steps=4,guidance=2
    python evaluate.py speed
    python evaluate.py ablate
"""

import platform
from functools import partial
from pathlib import Path

import torch

import ablations
import shapes
import train
import weights
from sample import TINY, CommandLine, find_device, positive_int


# --------------------------------------------------------------------------------------------------- command line

def main():
    parser = CommandLine(description="Measure SD3 models and distilled students.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=CommandLine)
    add = partial(add_command, commands)
    three = add("ablate", ablate, "re-run the paper's ablations in the tiny world")
    three.add_argument("--only", action="append", choices=ablations.ABLATIONS, help="may be given several times")
    three.add_argument("--seeds", type=positive_int, default=3, help="training runs of each kind: seeds 0, 1, …")
    args = parser.parse_args()
    args.device = find_device(args.device)
    args.dtype = args.dtype or ("bf16" if train.fast_bf16(args.device) else "fp32")
    args.out = Path(args.out or f"runs/{args.command}")
    weights.check_writable(args.out / "x")
    args.run(args)


def add_command(commands, name, run, summary):
    parser = commands.add_parser(name, help=summary, description=summary)
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], help="of the arithmetic (autocast); default: the faster one")
    parser.add_argument("--out", help=f"default: runs/{name}")
    parser.set_defaults(run=run)
    return parser


def machine(device):
    """What the numbers were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads of {cpu_name()}"
    return f"{name}, torch {torch.__version__.split('+')[0]}, Python {platform.python_version()}"


def cpu_name():
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.exists() else []
    return (names or [platform.processor() or platform.machine()])[0]


# ------------------------------------------------------------------------------------------------------ ablations

def ablate(args, captions=1024, samples=128):
    """Train, measure and report all arms of the ablations (ablations.py). The report is written anew after each."""
    names = args.only or list(ablations.ABLATIONS)
    recogniser = shapes.load_recogniser(TINY)
    draw = partial(train.draw, args)

    def measure(pipeline, how):
        return shapes.measure(partial(draw, pipeline, how), recogniser, captions, samples)

    for _ in ablations.run(names, args.seeds, args.out, args.device, args.dtype, measure):
        text = (f"`python evaluate.py ablate{''.join(f' --only {name}' for name in args.only or ())} --seeds {args.seeds}`; "
                f"{captions} captions, {samples} images a prompt; {machine(args.device)}, {args.dtype}.\n\n"
                + ablations.report(names, args.seeds, args.out))
        weights.write_text(args.out / "ablate.md", text)
    for name in names:
        ablations.sheet(name, args.out, args.device, args.dtype, draw)
        if ablations.ABLATIONS[name].curves:
            ablations.plot(name, args.seeds, args.out)
    print(text)


if __name__ == "__main__":
    weights.run_script(main)
