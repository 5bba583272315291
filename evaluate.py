"""Measure models: what their images are worth, what they cost, and whether the paper's claims hold in the tiny world.

    python evaluate.py quality --model runs/stage2 --against runs/stage1 tiny-sd3@steps=4,guidance=2
    python evaluate.py speed
    python evaluate.py memory
    python evaluate.py ablate

A model is a file, a folder or a Hugging Face id; PATH@steps=4,guidance=2,shift=3,cache=1-4 says how it is sampled.
"""

import hashlib
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageOps
from tqdm import tqdm

import ablations
import costs
import metrics
import scores
import shapes
import train
import weights
from sample import (DTYPES, TINY, CommandLine, decode, find_device, generate, image_size, open_model, picture_bytes, positive_int,
                    split_model, to_picture, write_picture)
from text import read_prompts

CLIP, VISION_MODEL = "openai/clip-vit-large-patch14", "facebook/dinov2-large"
PICKSCORE, PICKSCORE_PROCESSOR = "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
LEAST = 5  # images, of which each has three neighbours


# --------------------------------------------------------------------------------------------------------- command line

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
    two = add("speed", costs.speed, "time teacher and students, part by part")
    two.add_argument("--model", help="a checkpoint (default: the tiny SD3)")
    two.add_argument("--preset", choices=costs.SIZES, help="random weights of an official size instead")
    two.add_argument("--depth", type=positive_int, help="so many blocks of it and of each text encoder, for a small machine")
    two.add_argument("--size", type=image_size, help="H or HxW in pixels (default: the model's own)")
    two.add_argument("--batch", type=positive_int, default=32, help="at which the throughput is measured")
    four = add("memory", costs.memory, "what an iteration takes at official sizes, all weights trained or adapters")
    four.add_argument("--stage", type=int, choices=costs.MODES, default=1)
    four.add_argument("--preset", choices=costs.SIZES, action="append", help="may be given several times (default: all)")
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


# -------------------------------------------------------------------------------------------------------------- quality

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
        weights.write_json(args.out / "quality.json", {"machine": costs.machine(args.device), "dtype": args.dtype, "models": results})
    text = f"{table(results)}\n\n{notes(results)}{costs.machine(args.device)}, {args.dtype}.\n"
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
        batch = costs.batch_of(pipeline)
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


def measure_truth(args, recogniser, model, folder):
    """shapes.measure of a model that draws the tiny world."""
    def draw(prompts, seeds):
        files = draw_files(args, model, folder, prompts, seeds)
        return torch.stack([picture_bytes(Image.open(file)) for file in files]) / 127.5 - 1

    return shapes.measure(draw, recogniser, args.count or 1024, args.samples or 128)


# ------------------------------------------------------------------------------------------- quality of official models

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


# ------------------------------------------------------------------------------------------------------ table and notes

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


# ---------------------------------------------------------------------------------------------------------------- costs

def cost(args, model, file):
    """What an image of a model costs, measured once for a machine, in a process that does nothing else."""
    where = costs.machine(args.device)
    if file.exists() and weights.read_json(file).get("machine") == where:
        return weights.read_json(file)["cost"]
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            found = pool.submit(costs.measure_cost, model, str(args.device), args.dtype).result()
    except BrokenProcessPool as error:
        raise weights.UserError(f"{model}: the process that measures its cost died, perhaps for want of memory") from error
    weights.write_json(file, {"machine": where, "cost": found})
    return found


# ------------------------------------------------------------------------------------------------------------ ablations

def ablate(args, captions=1024, samples=128):
    """Train, measure and report all arms of the ablations (ablations.py). The report is written anew after each."""
    names = args.only or list(ablations.ABLATIONS)
    recogniser = shapes.load_recogniser(TINY)
    draw = partial(train.draw, args)

    def measure(pipeline, how):
        return shapes.measure(partial(draw, pipeline, how), recogniser, captions, samples)

    def write():
        text = (f"`python evaluate.py ablate{''.join(f' --only {name}' for name in args.only or ())} --seeds {args.seeds}`; "
                f"{captions} captions, {samples} images a prompt; {costs.machine(args.device)}, {args.dtype}.\n\n"
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
