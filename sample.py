"""Sample images from an SD3 or a distilled student.

    python sample.py --prompt "a striped red circle on a gray background"

`--explain` draws one picture of what each step knew and what Stage I would have told the student (explain.py).
`--export` draws nothing, but writes the model in another layout.
"""

import sys

import commandline
import explain
import weights
from commandline import CommandLine, UserError, find_device
from mmdit import load_mmdit
from pictures import sheet_path, write_images, write_picture
from pipeline import (DTYPES, HEADER, TINY, fake_folder, load_pipeline, open_sampler, save_pipeline, save_single_file,
                      split_model)
from prompts import read_prompts


def main():
    parser = CommandLine(description="Sample images from an SD3 model or a distilled student.")
    add = parser.add_argument_group("what to draw").add_argument
    add("--model", default=str(TINY), help="file, folder or Hugging Face id (default: the tiny SD3); behind it "
        "@cache=4-7: blocks 4 to 7, from 0, run in the first step only")
    add("--prompt", type=commandline.utf8, action="append", default=[], help="may be given several times")
    add("--prompts", metavar="FILE", help="prompts: .txt, .json, .jsonl, .csv or .tsv")
    add("--negative", type=commandline.utf8, default="", metavar="TEXT", help="what guidance moves away from")
    add("--count", type=commandline.count, default=1, help="images of each prompt (default: 1)")
    add("--seed", type=commandline.seed, default=0, help="of a prompt's first image; the next count up (default: 0)")
    add = parser.add_argument_group("how").add_argument
    add("--steps", type=commandline.count, help="n; default: the model's own, 28 for a teacher")
    add("--guidance", type=commandline.number(0), help="w; default: the model's own, 7 for a teacher")
    add("--size", type=commandline.image_size, help="H or HxW in pixels (default: the model's own)")
    add("--dtype", choices=DTYPES, help="default: fp32 on a CPU, bf16 on a GPU")
    add("--device", help="default: cuda if there is one, else cpu")
    add = parser.add_argument_group("what to write").add_argument
    add("--out", type=commandline.output(".png"), default="samples", help="FILE.png, or a folder (default: samples)")
    add("--explain", action="store_true", help="one picture that explains the sample of one prompt and seed")
    add("--teacher", default=str(TINY), metavar="MODEL", help="of --explain (default: the tiny SD3)")
    add("--export", type=commandline.output(".safetensors"), metavar="PATH", help="draw nothing, but write the model: "
        "to FILE.safetensors in Stability's single-file layout (for ComfyUI), or to a folder in diffusers'")
    args = parser.parse_args()
    if args.export:
        export(args)
        return

    prompts = args.prompt + (read_prompts(args.prompts) if args.prompts else [])
    if not prompts:
        raise UserError("nothing to draw: give --prompt TEXT or --prompts FILE")
    weights.check_writable(sheet_path(args.out))
    device = find_device(args.device)
    dtype = DTYPES[args.dtype or ("fp32" if device.type == "cpu" else "bf16")]
    sampler = open_sampler(args.model, device, dtype)
    if args.explain:
        print(draw_explanation(args, sampler, prompts, device, dtype))
        return
    given = {name: value for name in ("steps", "guidance") if (value := getattr(args, name)) is not None}
    sampler.options.update(given, size=args.size, negative=args.negative, progress=True)

    jobs = [(prompt, args.seed + i) for prompt in prompts for i in range(args.count)]
    batch = sampler.pipeline.batch(args.size)
    images = (image for i in range(0, len(jobs), batch) for image in sampler.images(*zip(*jobs[i:i + batch])))
    for path in write_images(images, args.out, jobs, columns=args.count):
        print(path)


def draw_explanation(args, sampler, prompts, device, dtype):
    """Write the picture of explain.py; returns its path."""
    student = sampler.pipeline
    if len(prompts) > 1 or args.count > 1:
        raise UserError("--explain is for one prompt and one seed")
    if args.steps or args.guidance is not None or args.size or args.negative or sampler.options:
        raise UserError("--explain shows a student as it samples by itself: leave out steps, guidance, size and "
                        "negative prompt")
    if student.carried("sigmas") is None:
        raise UserError(f"{args.model}: --explain is for a student, which carries noise levels of its own")
    fake = fake_folder(split_model(args.model)[0])
    if not fake.exists():
        print(f"note: {args.model} has no fake score, which Stage I leaves: the sheet is without", file=sys.stderr)
    teacher = load_pipeline(args.teacher, device, dtype, text=student.text)
    if teacher.latent_shape() != student.latent_shape():
        raise UserError(f"{args.teacher} has other latents than {args.model}: name its teacher with --teacher")
    picture = explain.explain(student, teacher, load_mmdit(fake, device, dtype) if fake.exists() else None, prompts[0],
                              args.seed)
    return write_picture(picture, sheet_path(args.out))


def export(args):
    """Write the model in the layout that the name asks for."""
    path, (model, options) = args.export, split_model(args.model)
    single = path.suffix.lower() == ".safetensors"
    if options:
        raise UserError(f"{args.model}: --export writes the model as it is; leave out what comes after the @")
    weights.check_writable(path if single else path / "model_index.json")
    if path.exists() and (single or any(path.iterdir())):
        raise UserError(f"{path}: is there already")
    pipeline = load_pipeline(model, dtype=DTYPES[args.dtype or "fp32"])
    if single and pipeline.cache is not None:
        print("note: a single file has no place for the compensator: all blocks run in every step", file=sys.stderr)
    header = {name: pipeline.mmdit.metadata[name] for name in HEADER if name in pipeline.mmdit.metadata}
    (save_single_file if single else save_pipeline)(pipeline, path, header)
    print(path)


if __name__ == "__main__":
    commandline.run_script(main)
