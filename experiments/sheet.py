"""Models side by side on the same prompts and noise (Fig. 1, 6, 14-16): the picture of the README.

    python -m experiments.sheet runs/stage1 runs/stage2 --cache 1-4

Columns: a true scene of the prompt, the teacher with 28 guided steps, the first model and, with --cache, the same with
these blocks re-used plainly, the other models.
"""

import commandline  # first: it sets how threads wait before torch is loaded

from pathlib import Path

import torch

from commandline import DEVICE, CommandLine, count, find_device, number
from evaluate import evaluations
from pictures import contact_sheet, write_picture
from pipeline import TINY, load_pipeline
from tinyworld import scenes


def main():
    parser = CommandLine(description="Models of the tiny world side by side.")
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--cache", type=commandline.blocks, metavar="A-B", help="also re-use these blocks plainly")
    parser.add_argument("--guidance", type=number(0), default=7.0, help="w, the teacher's")
    parser.add_argument("--rows", type=count, default=8, help="prompts")
    parser.add_argument("--seed", type=commandline.seed, default=0, help="of the prompts")
    parser.add_argument("--device", type=find_device, default=DEVICE, help="where it runs")
    parser.add_argument("--out", type=Path, default=Path("runs/sheet.png"), help="FILE.png")
    args = parser.parse_args()
    prompts, labels, _ = scenes.draw_captions(args.rows, torch.Generator().manual_seed(args.seed))
    pipelines = {f"teacher, w = {args.guidance:g}": load_pipeline(TINY, args.device).sampled_with(28, args.guidance)}
    for path in args.models:
        pipelines[Path(path).name] = student = load_pipeline(path, args.device)
        if args.cache and path == args.models[0]:
            pipelines["plain re-use"] = student.sampled_with(blocks=args.cache)
    columns = {"a true scene": scenes.render(labels)}
    for name, pipeline in pipelines.items():
        columns[f"{name}: {evaluations(pipeline):.3g}"] = pipeline.images(prompts, range(args.rows))
    images = torch.stack(list(columns.values()), dim=1).flatten(0, 1)                   # (rows · columns, 3, H, W)
    print(write_picture(contact_sheet(images, prompts, list(columns)), args.out))


if __name__ == "__main__":
    commandline.run_script(main)
