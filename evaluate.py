"""Measure models: what their images are worth, what sampling takes, whether the paper's claims hold in the tiny world.

    python evaluate.py quality runs/stage2 runs/stage1 tiny-sd3@steps=4,guidance=2
    python evaluate.py speed
    python evaluate.py reuse runs/stage1
    python evaluate.py score runs/stage1
    python evaluate.py swap runs/stage1 --first tiny-sd3
    python evaluate.py ablate

A model is a file, a folder or a Hugging Face id; but for `speed`, PATH@steps=4,guidance=2,cache=1-4 says
how it is sampled.
"""

import hashlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from scipy import stats
from tqdm import tqdm

import ablations
import cache
import commandline
import costs
import flow
import metrics
import report
import scores
import shapes
import truth
import weights
from commandline import CommandLine, UserError
from mmdit import load_mmdit
from networks import fast_bf16
from pictures import figure_for, picture_bytes, to_picture, write_picture
from pipeline import DTYPES, TINY, Sampler, fake_folder, open_sampler, split_model
from prompts import read_prompts

CLIP, VISION_MODEL = "openai/clip-vit-large-patch14", "facebook/dinov2-large"
PICKSCORE, PICKSCORE_PROCESSOR = "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
LEAST = 5  # images, of which each has three neighbours
OTHER_SEEDS = 10**6  # than those of the models that are measured


# ------------------------------------------------------------------------------------------------------ command line

def main():
    parser = CommandLine(description="Measure SD3 models and distilled students.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=CommandLine)

    one = add_command(commands, quality, "measure any number of models side by side, on the same prompts and seeds")
    one.add_argument("models", nargs="*", default=[str(TINY)], metavar="MODEL",
                     help="PATH[@steps=…,guidance=…,cache=…] (default: the tiny SD3)")
    one.add_argument("--prompts", help="a file (default: captions of the tiny world, where the truth is known)")
    one.add_argument("--samples", type=commandline.count,
                     help="images a prompt (default: 4; in the tiny world 128, for six prompts)")
    judges = one.add_argument_group("with --prompts")
    judges.add_argument("--clip", metavar="NAME", help=f"of the CLIP score and the CLIP distance (default: {CLIP})")
    judges.add_argument("--pickscore", nargs="?", const=PICKSCORE, metavar="NAME", help=f"default: {PICKSCORE}")
    judges.add_argument("--reference", metavar="DIR|MODEL", help="photographs, or a model whose samples for the same "
                        "prompts serve, as the paper has it: adds Fréchet distance, precision and recall")
    judges.add_argument("--vision-model", metavar="NAME", help=f"whose features they are in (default: {VISION_MODEL}),")
    judges.add_argument("--inception", metavar="FILE", help="and a TorchScript Inception, for FID")

    two = add_command(commands, costs.speed, "time teacher and students, part by part")
    two.add_argument("model", nargs="?", metavar="MODEL", help="default: the tiny SD3")
    two.add_argument("--preset", choices=costs.SIZES, help="random weights of an official size instead")
    two.add_argument("--depth", type=commandline.count, help="so many blocks of it, for a small machine")
    two.add_argument("--size", type=commandline.image_size, help="H or HxW in pixels (default: the model's own)")
    two.add_argument("--batch", type=commandline.count, default=32, help="of the throughput (default: 32)")

    four = add_command(commands, reuse, "how much each block changes from the first step to the second (Fig. 5a)")
    four.add_argument("model", nargs="?", default=str(TINY), metavar="MODEL", help="a student (default: the tiny SD3)")
    four.add_argument("--prompts", help="a file (default: captions of the tiny world)")
    four.add_argument("--ranges", action="store_true", help="tiny world: also re-use every range of blocks, and say "
                      "whether the errors foretell what that costs")

    five = add_command(commands, score, "how far teacher and fake score are from the true one, level by level")
    five.add_argument("model", metavar="RUN", help="a run of Stage I in the tiny world; it keeps its fake score")
    five.add_argument("--captions", type=commandline.count, default=16, help="to take the mean over (default: 16)")
    five.add_argument("--pool", type=commandline.count, default=4096, help="scenes behind each (default: 4096)")

    six = add_command(commands, swap, "which step decides what: states change hands between the steps")
    six.add_argument("model", metavar="MODEL", help="a student of the tiny world, of at least 2 steps")
    six.add_argument("--first", action="append", default=[], metavar="MODEL", help="also measure the student "
                     "after this model's first steps instead of its own; may be given several times")

    three = add_command(commands, ablate, "re-run the paper's ablations in the tiny world")
    three.add_argument("--only", action="append", choices=ablations.ABLATIONS, help="may be given several times")
    three.add_argument("--seeds", type=commandline.count, help="training runs of each kind, seeds 0, 1, … (default: 8 "
                       "for gate and importance sampling, 5 for other claims that the paper stands on, 3 for the rest)")

    args = parser.parse_args()
    args.device = commandline.find_device(args.device)
    bf16 = fast_bf16(args.device) if args.command == "ablate" else args.device.type != "cpu"
    args.dtype = args.dtype or ("bf16" if bf16 else "fp32")
    args.out = Path(args.out or f"runs/{args.command}")
    weights.check_writable(args.out / "x")
    args.run(args)


def add_command(commands, run, summary):
    name = run.__name__
    parser = commands.add_parser(name, help=summary, description=summary)
    group = parser.add_argument_group("the run")
    group.add_argument("--device", help="default: cuda if there is one, else cpu")
    group.add_argument("--dtype", choices=["bf16", "fp32"], help="of the arithmetic; default: as in "
                       + ("train.py" if name == "ablate" else "sample.py"))
    group.add_argument("--out", type=commandline.output(), help=f"a folder; default: runs/{name}")
    parser.set_defaults(run=run)
    return parser


# ----------------------------------------------------------------------------------------------------------- quality

def quality(args):
    """Images of every model, drawn once and kept; then what they are worth and what they take (Table 1)."""
    check_quality(args)
    models = list(dict.fromkeys(args.models))
    folders = {model: args.out / "images" / folder_name(model, args.dtype) for model in models}
    judge = partial(judge_pictures, args, open_judges(args)) if args.prompts else \
        partial(judge_scenes, args, shapes.load_recogniser(TINY))
    results = {}
    for model in models:
        sampler = open_sampler(model, args.device, DTYPES[args.dtype])
        if not args.prompts and not results:
            floor = report.Reconstruction(sampler.pipeline.vae)
            results[report.AUTOENCODER] = shapes.measure(floor.images, shapes.load_recogniser(TINY), **sizes(args))
        label = model.replace(str(TINY), TINY.name)
        results[label] = {"cost": costs.sampling_cost(sampler), **judge(model, sampler, folders[model])}
        measured = {"machine": costs.machine(args.device), "dtype": args.dtype, "models": results}
        weights.write_json(args.out / "quality.json", measured)
    text = f"{table(results)}\n\n{notes(results)}{costs.machine(args.device)}, {args.dtype}.\n"
    weights.write_text(args.out / "quality.md", text)
    print(text)


def check_quality(args):
    """Raise UserError for flags that would do nothing, or cannot do what they ask."""
    flags = ("clip", "pickscore", "reference", "vision_model", "inception")
    given = [name for name in flags if getattr(args, name)]
    if given and not args.prompts:
        raise UserError(f"--{given[0].replace('_', '-')} needs --prompts; without it, the tiny world's measures serve")
    if (args.inception or args.vision_model) and not args.reference:
        raise UserError("--inception and --vision-model need --reference, the images to compare with")
    if not args.prompts and args.samples == 1:
        raise UserError("the tiny world's measures need --samples of at least 2")


def folder_name(model, dtype):
    """A name for the images of a model: of its files as they are now, and how it is sampled."""
    path, options = split_model(model)
    return f"{Path(path).name}-{weights.identity(path, options, dtype)}"


def draw_files(sampler, folder, prompts, seeds):
    """A PNG for each pair of prompt and seed. What is there already is not drawn again."""
    files = [folder / f"{hashlib.sha256(f'{seed} {prompt}'.encode()).hexdigest()[:20]}.png"
             for prompt, seed in zip(prompts, seeds, strict=True)]
    missing = [i for i, file in enumerate(files) if not file.exists()]
    batch = sampler.pipeline.batch()
    with tqdm(total=len(files), initial=len(files) - len(missing), desc=f"sampling {folder.name}") as bar:
        for start in range(0, len(missing), batch):
            part = missing[start:start + batch]
            images = sampler.images([prompts[i] for i in part], [seeds[i] for i in part])
            for i, image in zip(part, images, strict=True):
                write_picture(to_picture(image), files[i])
            bar.update(len(part))
    return files


def judge_scenes(args, recogniser, model, sampler, folder):
    """shapes.measure of a model that draws scenes of the tiny world."""
    check_scenes(model, sampler.pipeline, "; give --prompts FILE")

    def draw(prompts, seeds):
        files = draw_files(sampler, folder, prompts, seeds)
        return torch.stack([picture_bytes(open_picture(file)) for file in files]) / 127.5 - 1     # (N, 3, 64, 64)

    return shapes.measure(draw, recogniser, **sizes(args), teacher=report.known_teacher(TINY))


def check_scenes(model, pipeline, advice=""):
    """Raise UserError for a model that draws no scenes of the tiny world."""
    if {side * pipeline.vae.factor for side in pipeline.latent_shape()[1:]} != {shapes.SIZE}:
        raise UserError(f"{model}: draws no scenes of the tiny world{advice}")


def sizes(args):
    return shapes.THOROUGH | ({"samples": args.samples} if args.samples else {})


# ----------------------------------------------------------------------------------------- quality of official models

class Judges(NamedTuple):
    prompts: list
    clip: scores.Clip
    pickscore: scores.Clip      # or None
    features: dict              # {name: (function of pictures, features of the reference images (M, D))}
    lpips: callable             # or None


def open_judges(args):
    prompts, samples = read_prompts(args.prompts), args.samples or 4
    if args.reference and len(prompts) * samples < LEAST:
        raise UserError(f"{len(prompts) * samples} images are too few to compare with others; {LEAST} are needed")
    clip = scores.load_clip(args.clip or CLIP, args.device)
    pickscore = None
    if args.pickscore:
        own = any((Path(args.pickscore) / name).exists() for name in PROCESSOR_FILES)
        pickscore = scores.load_clip(args.pickscore, args.device, None if own else PICKSCORE_PROCESSOR)
    features = {}
    if args.reference:
        files, crop = reference_files(args, prompts, samples)
        vision_model = args.vision_model or VISION_MODEL
        networks = {Path(vision_model).name: scores.load_vision_model(vision_model, args.device)}
        if args.inception:
            networks["Inception"] = scores.load_inception(args.inception, args.device)
        features = {name: (network, per_picture(network, files, crop)) for name, network in networks.items()}
    return Judges(prompts, clip, pickscore, features, scores.load_lpips(args.device))


def reference_files(args, prompts, samples):
    """The pictures of --reference, and whether they are to be cropped to squares: photographs in a folder, or a model's
    samples for the same prompts, of other seeds (Table 1, where it is the teacher)."""
    folder = Path(args.reference)
    if folder.is_dir() and not (folder / "model_index.json").exists():
        return find_pictures(folder), True
    sampler = open_sampler(args.reference, args.device, DTYPES[args.dtype])
    jobs = [(prompt, OTHER_SEEDS + i) for prompt in prompts for i in range(samples)]
    return draw_files(sampler, args.out / "images" / folder_name(args.reference, args.dtype), *zip(*jobs)), False


def find_pictures(folder):
    files = sorted(file for file in Path(folder).rglob("*") if file.suffix.lower() in PICTURES)
    if len(files) < LEAST:
        raise UserError(f"{folder}: holds {len(files)} images ({', '.join(PICTURES)}); at least {LEAST} are needed")
    return files


def open_picture(file, crop=False):
    """A PIL image in RGB, as viewers show it, on white. `crop`: its centre square, 512 pixels a side."""
    with weights.library_errors(file, "be read as PNG, JPEG or WebP"):
        picture = ImageOps.exif_transpose(Image.open(file, formats=["PNG", "JPEG", "WEBP"]))
    if picture.mode.startswith("I"):  # 16 bits of grey, which PIL would clip to 8
        picture = Image.fromarray((np.array(picture) / 257).round().astype(np.uint8))
    if picture.has_transparency_data:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
    picture = picture.convert("RGB")
    return ImageOps.fit(picture, (512, 512), Image.Resampling.LANCZOS) if crop else picture


def per_picture(network, files, crop=False, batch=16):
    """A network's output for picture files, (N, …)."""
    parts = [files[i:i + batch] for i in range(0, len(files), batch)]
    return torch.cat([network([open_picture(file, crop) for file in part])
                      for part in tqdm(parts, desc="looking", leave=False)])


def judge_pictures(args, judges, model, sampler, folder):
    """{measure: {of what: (value, standard error)}} as in shapes.measure. Diversity by LPIPS is Table 3's."""
    samples = args.samples or 4
    jobs = [(prompt, seed) for prompt in judges.prompts for seed in range(samples)]
    files = draw_files(sampler, folder, *zip(*jobs))

    def embed(network):
        return per_picture(network, files).unflatten(0, (len(judges.prompts), samples))     # (P, S, D)

    pictures = embed(judges.clip.pictures)
    result = {"text": over_prompts("CLIP score", 100 * agreement(judges.clip, judges.prompts, pictures))}
    if judges.pickscore:
        liked = agreement(judges.pickscore, judges.prompts, embed(judges.pickscore.pictures))
        result["text"] |= over_prompts("PickScore", judges.pickscore.scale * liked)
    if samples > 1:
        cosine = (pictures @ pictures.mT).sum((1, 2)) - samples                             # (P,), without the diagonal
        result["diversity"] = over_prompts("CLIP distance", 1 - cosine / (samples * (samples - 1)))
    if samples > 1 and judges.lpips:
        parts = [files[i:i + samples] for i in range(0, len(files), samples)]
        distances = [judges.lpips([open_picture(file) for file in part])
                     for part in tqdm(parts, desc="LPIPS", leave=False)]
        result["diversity"] |= over_prompts("LPIPS", torch.tensor(distances))
    for name, (network, real) in judges.features.items():
        distance = "FID" if name == "Inception" else "Fréchet distance"
        result[f"in features of {name}"] = compare(embed(network), real, distance)
    return result


def over_prompts(name, values):
    """The mean of one number a prompt (P,), its error by bootstrap over prompts."""
    return metrics.bootstrap(lambda index: {name: values[index].mean().item()}, len(values))


def agreement(clip, prompts, pictures, batch=16):
    """Mean cosine of each prompt with its pictures (P, S, D) -> (P,)."""
    texts = torch.cat([clip.prompts(prompts[i:i + batch]) for i in range(0, len(prompts), batch)])  # (P, D)
    return (pictures * texts[:, None]).sum(2).mean(1)


def compare(fake, real, distance):
    """Fréchet distance (called `distance`), precision and recall of features (P, S, D) against others' (M, D)."""
    inside, covered = metrics.precision_recall(fake.flatten(0, 1), real)                    # (P · S,), (M,)

    of_real = metrics.gaussian(real)

    def frechet(index):
        return {distance: metrics.frechet_distance(metrics.gaussian(fake[index].flatten(0, 1)), of_real)}

    return {**metrics.bootstrap(frechet, len(fake), draws=20),  # slow; biased, but of about the right spread
            **over_prompts("precision", inside.unflatten(0, fake.shape[:2]).double().mean(1)),
            **metrics.bootstrap(lambda index: {"recall": covered[index].double().mean().item()}, len(real))}


# --------------------------------------------------------------------------------------------------- table and notes

NOTES = {  # by the name of a row
    "CLIP score": "CLIP score: 100 cos. The paper does not name its CLIP: compare models here.",
    "PickScore": "PickScore: as the paper's, given the same prompts.",
    "Fréchet distance": "Fréchet distance, precision, recall: compare at the same number of images, in the same "
                        "features.",
    "FID": "FID: falls as images are added, and depends on how photographs are resized (here to centre squares of 512 "
           "pixels). Near the paper's only with the teacher as --reference and one image (--samples 1) for each of its "
           "COCO prompts.",
    "LPIPS": "LPIPS: AlexNet, mean over pairs of one prompt, at the images' own size; the paper's network is unknown.",
    "CLIP distance": "CLIP distance: 1 - cos, mean over pairs of one prompt; not in the paper.",
    "GFLOP an image": "Cost: counted, of the transformer. `python evaluate.py speed` takes the time.",
}


def table(results):
    """Markdown: a row a measure, a column a model. {model: {group: {name: (value, error)}}}"""
    rows = dict.fromkeys((group, name) for groups in results.values()
                         for group, values in groups.items() for name in values)
    lines = [f"| | | {' | '.join(results)} |", "|" + "---|" * (2 + len(results))]
    before = None
    for group, name in rows:
        pairs = [groups.get(group, {}).get(name) for groups in results.values()]
        cells = [f"{pair[0]:.4g}" + (f" ± {pair[1]:.2g}" if pair[1] else "") if pair else "" for pair in pairs]
        lines.append(f"| {group if group != before else ''} | {name} | {' | '.join(cells)} |")
        before = group
    return "\n".join(lines)


def notes(results):
    names = {name for groups in results.values() for values in groups.values() for name in values}
    return "".join(f"{text}\n\n" for name, text in NOTES.items() if name in names)


# ------------------------------------------------------------------------------------------------------ re-use error

def reuse(args, n=64):
    """The reuse error of every block for both streams, as a table and, where matplotlib is installed, as a plot."""
    pipeline, options, _ = open_sampler(args.model, args.device, DTYPES[args.dtype])
    prompts = read_prompts(args.prompts)[:n] if args.prompts else \
        shapes.draw_captions(n, torch.Generator().manual_seed(0))[0]
    nodes = pipeline.sigmas(options.get("steps"))
    if len(nodes) > 9:  # a teacher's: those of a student of two steps
        nodes = flow.student_sigmas(2, pipeline.shift)
    sums, batch = 0, pipeline.batch()
    for i in range(0, len(prompts), batch):
        some = prompts[i:i + batch]
        noise = flow.initial_noise(pipeline.latent_shape(), range(i, i + len(some))).to(pipeline.device)
        sums = sums + len(some) * cache.reuse_errors(pipeline.mmdit, noise, nodes, pipeline.text(some)).square()
    errors = (sums / len(prompts)).sqrt()                                               # (blocks, 2)
    rows = [f"| {block} | {image:.3f} | {text:.3f} |" for block, (image, text) in enumerate(errors.tolist())]
    table = "\n".join(["| block | image | text |", "|---|---|---|", *rows])
    levels = f"from σ = {nodes[0]:.3g} to {nodes[1]:.3g}"
    weights.write_text(args.out / "reuse.md", f"{args.model}, {levels}, {len(prompts)} prompts\n\n{table}\n")
    print(f"{table}\n\n{levels}; the last block leaves the text as it is")
    if args.ranges:
        check_scenes(args.model, pipeline)
        every_range(args, pipeline, nodes, errors)
    with figure_for(args.out / "reuse.png", size=(6, 3)) as figure:
        if figure:
            axes = figure.subplots()
            axes.plot(errors, marker="o", label=("image", "text"))
            axes.set(xlabel="block", ylabel="reuse error", yscale="log")
            axes.legend()


def every_range(args, pipeline, nodes, errors):
    """Plain re-use of every range of blocks in a row: what it costs in quality, and whether `errors` foretell it.

    The paper picks blocks whose own errors are low (Fig. 5a, 12). errors (blocks, 2), of `reuse`.
    """
    recogniser, depth = shapes.load_recogniser(TINY), len(errors)
    file = args.out / f"ranges-{folder_name(args.model, args.dtype)}.json"  # what is measured, for a second call
    measured = weights.read_json(file) if file.exists() else {}
    lines, found = ["| blocks | evaluations | errors, summed | adherence | fidelity |", "|---|---|---|---|---|"], {}
    for first, last in tqdm([(a, b) for a in range(depth) for b in range(a, depth)], desc="ranges"):
        name = f"{first}-{last}"
        if name not in measured:
            sampler = Sampler(replace(pipeline, cache=cache.Cache((first, last))), {"sigmas": nodes, "guidance": 1.0})
            groups = shapes.measure(sampler.images, recogniser, samples=2, draws=2)  # coverage is not shown
            measured[name] = [groups[group]["mean"][0] for group in ("adherence", "fidelity")]
            weights.write_json(file, measured)
        adherence, distance = measured[name]
        row = errors[first:last + 1, 0].sum().item(), adherence, distance
        found.setdefault(last + 1 - first, {})[name] = row
        cost = cache.effective_nfe(depth, (first, last), len(nodes) - 1)
        lines.append(f"| {name} | {cost:.2f} | {row[0]:.2f} | {row[1]:.3f} | {row[2]:.4f} |")
    lines += ["", "| blocks in a row | lowest errors | least distance | rank correlation of errors and distance |",
              "|---|---|---|---|"]
    for length, rows in found.items():
        if len(rows) > 2:
            foretold, best = min(rows, key=lambda name: rows[name][0]), min(rows, key=lambda name: rows[name][2])
            summed, _, distance = zip(*rows.values())
            lines.append(f"| {length} | {foretold} | {best} | {stats.spearmanr(summed, distance).statistic:+.2f} |")
    text = "\n".join(lines)
    weights.write_text(args.out / "ranges.md", text + "\n")
    print(text)


# -------------------------------------------------------------------------------------------------------- true score

def score(args):
    """Teacher, guided teacher and fake score beside the truth (truth.py), as a table and a plot."""
    dtype = DTYPES[args.dtype]
    teacher, student = (open_sampler(path, args.device, dtype).pipeline for path in (TINY, args.model))
    check_scenes(args.model, student)
    fake, recipe = load_mmdit(fake_folder(args.model), args.device, dtype), student.carried("training")
    found = truth.compare(teacher, student, fake, args.captions, args.pool, 16, recipe["guidance"],
                          torch.Generator().manual_seed(0))
    rows = [f"| {level:g} | {' | '.join(f'{value:.3g}' for value in row)} |"
            for level, *row in zip(truth.LEVELS, *(values.tolist() for values in found.values()))]
    table = "\n".join([f"| σ | {' | '.join(found)} |", "|" + "---|" * (1 + len(found)), *rows])
    weights.write_text(args.out / "score.md", f"{args.model}, w = {recipe['guidance']:g}, {args.captions} captions, "
                       f"{args.pool} scenes each\n\n{table}\n")
    print(table)
    with figure_for(args.out / "score.png", size=(12, 3.6)) as figure:
        if figure:
            panels = {"error on true scenes": ("guessed", "guided", "teacher"),
                      "error on the student's samples": ("guided there", "teacher there", "fake score"),
                      "cosine with the true direction": ("cosine guided", "cosine")}
            for axes, (title, names) in zip(figure.subplots(1, 3), panels.items()):
                for name in names:
                    axes.plot(truth.LEVELS, found[name], marker="o", label=name)
                axes.axvline(recipe["alpha"], color="gray", linestyle=":", label="α of the run")
                axes.set(xlabel="σ", title=title)
                axes.legend(fontsize=7)


# ------------------------------------------------------------------------------------------- which step decides what

def swap(args):
    """Which attributes follow the steps up to the k-th, which those after it, for each k, as a table."""
    pipeline, options, _ = open_sampler(args.model, args.device, DTYPES[args.dtype])
    nodes = pipeline.sigmas(options.get("steps"))
    check_scenes(args.model, pipeline)
    if len(nodes) < 3:
        raise UserError(f"{args.model}: makes one step; between two of them states can change hands")
    others = {name: open_sampler(name, args.device, DTYPES[args.dtype])
              for name in [args.model, *args.first] if args.first}
    for name, (first, *_) in others.items():
        check_scenes(name, first)
    recogniser, names = shapes.load_recogniser(TINY), (*shapes.NAMES, "mean")
    lines = [f"| steps | as | {' | '.join(names)} |", "|" + "---|" * (2 + len(names))]
    for k in range(1, len(nodes) - 1):
        for label, shares in truth.swapped(pipeline, recogniser, nodes, k).items():
            cells = " | ".join(f"{share:.2f}" for share in (*shares, shares.mean()))
            lines.append(f"| {k} + {len(nodes) - 1 - k} | {label} | {cells} |")
    measures = {"adherence": "adherence", "coverage": "coverage", "fidelity": "distance to a scene"}
    if others:
        lines += ["", f"| steps | the first by | {' | '.join(measures.values())} |", "|" + "---|" * (2 + len(measures))]
    for name, (first, own, _) in others.items():
        for k in range(1, len(nodes) - 1):
            images = truth.relay(first, pipeline, nodes, k, own.get("guidance", first.guidance()))
            found = shapes.measure(images, recogniser, captions=1024, samples=64)
            cells = " | ".join("{:.3f} ± {:.3f}".format(*found[measure]["mean"]) for measure in measures)
            lines.append(f"| {k} + {len(nodes) - 1 - k} | {name} | {cells} |")
    text = "\n".join(lines)
    weights.write_text(args.out / "swap.md", f"{args.model}, all blocks run in every step\n\n{text}\n")
    print(text)


# --------------------------------------------------------------------------------------------------------- ablations

def ablate(args):
    """Train, measure and report all arms of the ablations (ablations.py). The report is written anew after each."""
    names = args.only or list(ablations.ABLATIONS)
    only = "".join(f" --only {name}" for name in args.only or ())
    command = f"python evaluate.py ablate{only}" + (f" --seeds {args.seeds}" if args.seeds else "")
    sizes = "{captions} captions, {samples} images a prompt".format(**shapes.THOROUGH)
    header = f"`{command}`; {sizes}; {costs.machine(args.device)}, {args.dtype}.\n\n"

    def write():
        text = header + ablations.report(names, args.out)
        weights.write_text(args.out / "ablate.md", text)
        return text

    for _ in ablations.run(names, args):
        write()
    for name in names:
        ablations.sheet(name, args)
        if ablations.ABLATIONS[name].curves:
            ablations.plot(name, args.out)
    print(write())


if __name__ == "__main__":
    commandline.run_script(main, "give the same command again; images and runs that are finished stay")
