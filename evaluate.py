"""Measure models side by side, on the same prompts and seeds (Table 1).

    python evaluate.py quality runs/stage2 runs/stage1
    python evaluate.py quality tiny-sd3 --steps 4 --guidance 2
    python evaluate.py quality STUDENT --prompts coco.txt --reference TEACHER --inception inception-2015-12-05.pt

Without --prompts, models draw scenes of the tiny world, where the truth is known (tinyworld/measures.py). With them,
images are judged by networks (metrics.py): CLIP score, diversity as the CLIP distance between images of one prompt and,
beside a --reference, the Fréchet distance. The paper's FID has the *teacher's* samples for the same prompts as
reference, not photographs.
"""

import commandline  # first: it sets how threads wait before torch is loaded

from pathlib import Path

import torch
from PIL import Image, ImageOps
from tqdm import tqdm

import metrics
import weights
from cache import effective_nfe
from commandline import CommandLine, UserError, count, number
from pictures import picture_bytes, to_picture, write_picture
from pipeline import DTYPES, TINY, load_pipeline
from prompts import read_prompts
from tinyworld import measures, scenes

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
OTHER_SEEDS = 10**6  # first seed of a reference model's images


def main():
    parser = CommandLine(description="Measure SD3 models and distilled students.")
    add = parser.add_argument
    add("command", choices=["quality"])
    add("models", nargs="*", default=[str(TINY)], metavar="MODEL", help="file, folder or Hugging Face id")
    add("--steps", type=count, help="n; without it each model's own")
    add("--guidance", type=number(0), help="w; without it each model's own")
    add("--cache", type=commandline.blocks, metavar="A-B", help="blocks that only the first step runs, re-used plainly; "
        "none: all run; without it each model's own")
    add("--prompts", metavar="FILE", help="without it captions of the tiny world, where the truth is known")
    add("--captions", type=number(2, 10**7, int), default=1024, help="number of captions of the tiny world")
    add("--samples", type=count, help="images per prompt; without it 4 or, in the tiny world, 128 of each of six prompts")
    add("--reference", metavar="DIR|MODEL", help="a model whose samples for the same prompts are compared with, as in "
        "the paper, or a folder of pictures: adds the Fréchet distance")
    add("--clip", default="openai/clip-vit-large-patch14", metavar="NAME", help="computes the CLIP score, with --prompts")
    add("--vision-model", default="facebook/dinov2-large", metavar="NAME",
        help="gives the features of the Fréchet distance, with --prompts")
    add("--inception", metavar="FILE", help="a TorchScript Inception, for FID in place of the vision model's distance")
    add("--dtype", choices=["bf16", "fp32"], help="precision of the arithmetic; without it bf16 on GPUs")
    add("--device", type=commandline.find_device, default=commandline.DEVICE, help="where it runs")
    add("--out", type=Path, default=Path("runs/quality"), help="a folder")
    args = parser.parse_args()
    args.dtype = args.dtype or ("bf16" if args.device.type != "cpu" else "fp32")
    weights.check_writable(args.out)
    results = of_prompts(args) if args.prompts else of_tiny_world(args)
    weights.write_json(args.out / "quality.json", results)


def of_tiny_world(args):
    """{model: measures}, printed as a table."""
    reference = None
    if args.reference and is_pictures(args.reference):
        pictures = [picture_bytes(open_picture(file)) for file in pictures_of(args.reference)]
        if any(picture.shape[1:] != (scenes.SIZE, scenes.SIZE) for picture in pictures):
            raise UserError(f"{args.reference}: its pictures are not those of the tiny world, {scenes.SIZE} pixels a side")
        reference = torch.stack(pictures).float() / 127.5 - 1
    elif args.reference:
        pipeline = open_tiny(args, args.reference)
        prompts, seeds, *_ = measures.prompts_to_measure(args.captions, samples=0)
        reference = pipeline.images(prompts, [OTHER_SEEDS + seed for seed in seeds])
    results = {}
    for path in args.models:
        pipeline = open_tiny(args, path).sampled_with(args.steps, args.guidance, args.cache)
        results[path] = {"evaluations": evaluations(pipeline),
                         **measures.measure(pipeline.images, args.captions, args.samples or 128, reference)}
    print(measures.table(results), measures.MEANING, sep="\n\n")
    return results


def open_tiny(args, path):
    """A pipeline that draws the tiny world."""
    pipeline = load_pipeline(path, args.device, DTYPES[args.dtype])
    if [side * pipeline.vae.factor for side in pipeline.latent_shape()[1:]] != [scenes.SIZE, scenes.SIZE]:
        raise UserError(f"{path}: does not draw the tiny world; give --prompts FILE")
    return pipeline


def evaluations(pipeline):
    """Effective network evaluations an image."""
    blocks = pipeline.cache.blocks if pipeline.cache else None
    return effective_nfe(len(pipeline.mmdit.joint_blocks), blocks, len(pipeline.sigmas) - 1, pipeline.guidance != 1)


# ------------------------------------------------------------------------------------------ with prompts of a file

def of_prompts(args):
    """{model: measures}; the images stay in --out."""
    prompts, samples = read_prompts(args.prompts), args.samples or 4
    embed_pictures, embed_prompts = metrics.load_clip(args.clip, args.device)
    features = real = None
    if args.reference:
        features = metrics.load_inception(args.inception, args.device) if args.inception else \
            metrics.load_vision_model(args.vision_model, args.device)
        real = metrics.gaussian(per_picture(features, reference_files(args, prompts, samples)))
    texts = torch.cat([embed_prompts(prompts[i:i + 16]) for i in range(0, len(prompts), 16)])      # (P, D)
    results = {}
    for path in args.models:
        pipeline = load_pipeline(path, args.device, DTYPES[args.dtype]).sampled_with(
            args.steps, args.guidance, args.cache)
        files = draw(pipeline, args.out / Path(path).name, prompts, samples, seed=0)
        pictures = per_picture(embed_pictures, files).unflatten(0, (len(prompts), samples))        # (P, S, D)
        found = {"evaluations": evaluations(pipeline),
                 "CLIP score": 100 * (pictures * texts[:, None]).sum(2).mean().item()}
        if samples > 1:
            cosines = ((pictures @ pictures.mT).sum((1, 2)) - samples) / (samples * (samples - 1))  # (P,)
            found["CLIP distance"] = 1 - cosines.mean().item()
        if real is not None:
            own = metrics.gaussian(per_picture(features, files))
            found["FID" if args.inception else "Fréchet distance"] = metrics.frechet_distance(own, real)
        results[path] = found
        print(path, *(f"{name} {value:.4g}" for name, value in found.items()), sep="  ")
    return results


def reference_files(args, prompts, samples):
    """The pictures of a folder, or a model's samples of the same prompts, of other seeds."""
    if is_pictures(args.reference):
        return pictures_of(args.reference)
    pipeline = load_pipeline(args.reference, args.device, DTYPES[args.dtype])
    return draw(pipeline, args.out / f"reference-{Path(args.reference).name}", prompts, samples, OTHER_SEEDS)


def is_pictures(path):
    """Whether a path is a folder of pictures, and not a model."""
    return Path(path).is_dir() and not (Path(path) / "model_index.json").exists()


def pictures_of(folder):
    files = sorted(file for file in Path(folder).rglob("*") if file.suffix.lower() in PICTURES and file.stem != "sheet")
    if len(files) < 2:
        raise UserError(f"{folder}: holds {len(files)} pictures ({', '.join(PICTURES)})")
    return files


def draw(pipeline, folder, prompts, samples, seed):
    """A PNG for each image, `samples` of each prompt. Returns the files."""
    jobs, files, batch = [(prompt, seed + i) for prompt in prompts for i in range(samples)], [], pipeline.batch()
    for i in tqdm(range(0, len(jobs), batch), desc=f"sampling {folder.name}"):
        for image in pipeline.images(*zip(*jobs[i:i + batch])):
            files.append(write_picture(to_picture(image), folder / f"{len(files):06}.png"))
    return files


def per_picture(network, files, batch=16):
    """A network's output for picture files, (N, D)."""
    return torch.cat([network([open_picture(file) for file in files[i:i + batch]])
                      for i in tqdm(range(0, len(files), batch), desc="judging", leave=False)])


def open_picture(file):
    """A PIL image in RGB, upright; photographs of other shapes are cropped to their centre square."""
    with weights.library_errors(file, "be read as a picture"):
        picture = ImageOps.exif_transpose(Image.open(file, formats=["PNG", "JPEG", "WEBP"]))
        if picture.mode.startswith("I"):
            raise UserError(f"{file}: has 16 bits a channel; save it with 8")
        picture = picture.convert("RGB")
    return ImageOps.fit(picture, (min(picture.size),) * 2, Image.Resampling.LANCZOS)


if __name__ == "__main__":
    commandline.run_script(main)
