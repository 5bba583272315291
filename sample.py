"""Sample images from an SD3 or a distilled student.

    python sample.py --prompt "a striped red circle on a gray background"
    python sample.py --model runs/stage1 --prompts prompts.txt --count 4 --out pictures
"""

import commandline  # first: it sets how threads wait before torch is loaded

from pathlib import Path

import torch

import weights
from commandline import DEVICE, CommandLine, UserError, blocks, count, find_device, image_size, number, run_script, seed
from pictures import contact_sheet, to_picture, write_picture
from pipeline import DTYPES, TINY, load_pipeline
from prompts import read_prompts

ON_A_SHEET = 64  # images: at 1024² as many megapixels, and viewers refuse larger ones


def main():
    parser = CommandLine(description="Sample images from an SD3 model or a distilled student.")
    add = parser.add_argument
    add("--model", default=str(TINY), help="file, folder or Hugging Face id")
    add("--prompt", action="append", default=[], help="may be given several times")
    add("--prompts", metavar="FILE", help="prompts: .txt, .jsonl, .csv or .tsv")
    add("--count", type=count, default=1, help="images of each prompt")
    add("--seed", type=seed, default=0, help="of a prompt's first image; the next one has the next seed")
    add("--steps", type=count, help="n; without it the model's own number, 28 for a teacher")
    add("--guidance", type=number(0), help="w; without it the model's own, 7 for a teacher")
    add("--cache", type=blocks, metavar="A-B", help="blocks from 0 that only the first step runs, re-used plainly; "
        "none: all blocks run; without it the model's own")
    add("--size", type=image_size, help="H or HxW in pixels; without it the model's own")
    add("--dtype", choices=DTYPES, help="without it fp32 on a CPU, bf16 on a GPU")
    add("--device", type=find_device, default=DEVICE, help="where it runs")
    add("--out", type=Path, default=Path("samples"), help="FILE.png for one image, or a folder")
    args = parser.parse_args()

    prompts = args.prompt + (read_prompts(args.prompts) if args.prompts else [])
    jobs = [(prompt, args.seed + i) for prompt in prompts for i in range(args.count)]
    if not jobs:
        raise UserError("nothing to draw: give --prompt TEXT or --prompts FILE")
    single = bool(args.out.suffix) and not args.out.is_dir()
    if single and (args.out.suffix.lower() != ".png" or len(jobs) > 1):
        raise UserError(f"--out {args.out}: give FILE.png for one image, or a folder")
    weights.check_writable(args.out.parent if single else args.out)
    dtype = DTYPES[args.dtype or ("fp32" if args.device.type == "cpu" else "bf16")]
    pipeline = load_pipeline(args.model, args.device, dtype).sampled_with(args.steps, args.guidance, args.cache)

    if not single and (args.out / "sheet.png").exists():  # the images of an older run, perhaps a longer one
        for old in args.out.glob("*.png"):
            if old.stem.isdecimal() or old.stem == "sheet":
                old.unlink()
    shown, batch = [], pipeline.batch(args.size)
    for i in range(0, len(jobs), batch):
        images = pipeline.images(*zip(*jobs[i:i + batch]), size=args.size, progress=True)
        for index, image in enumerate(images, i):
            print(write_picture(to_picture(image), args.out if single else args.out / f"{index:03}.png"))
        shown += images[:max(0, ON_A_SHEET - len(shown))]
    if len(jobs) > 1:
        columns = min(args.count, len(shown))
        shown = shown[:len(shown) // columns * columns]
        rows = [prompt for prompt, _ in jobs[:len(shown):columns]]
        sheet = contact_sheet(torch.stack(shown), rows, [f"seed {args.seed + j}" for j in range(columns)])
        print(write_picture(sheet, args.out / "sheet.png"))


if __name__ == "__main__":
    run_script(main)
