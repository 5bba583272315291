"""Sample images: prompt → text → noise → MMDiT steps → VAE → image.

    python sample.py --prompt "a striped red circle on a gray background"

Works on any SD3: Stability's single files, diffusers folders, Hugging Face repositories, the tiny SD3 (the default), and
students made by train.py, which carry their own noise levels and step count in their files. `--export` writes any of them in
another layout.
"""

import argparse
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import flow
import weights
from cache import Cache, check_ranges, load_cache, parse_ranges, save_cache
from mmdit import MMDiT, load_mmdit, save_mmdit
from text import TextEncoders, load_text_encoders, read_prompts, save_text_encoders, save_tokenizers, single_file_tensors
from vae import VAE, load_vae, save_vae

TINY = Path(__file__).parent / "tiny-sd3"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HEADER = ("sigmas", "guidance", "training")  # what a model's tensor file says beside the tensors
LATENTS_AT_ONCE = 4 * 128 * 128  # positions a batch: 4 images of 1024²


# --------------------------------------------------------------------------------------------------- command line

def main():
    parser = CommandLine(description="Sample images from an SD3 model or a distilled student.")
    parser.add_argument("--model", default=TINY, help="file, folder or Hugging Face id (default: the tiny SD3)")
    parser.add_argument("--prompt", type=utf8, action="append", default=[], help="may be given several times")
    parser.add_argument("--prompts", help="a file of prompts: .txt, .jsonl, .csv or .tsv")
    parser.add_argument("--negative", type=utf8, default="", help="the prompt that guidance moves away from")
    parser.add_argument("--steps", type=positive_int, help="default: the model's own, 28 for a teacher")
    parser.add_argument("--guidance", type=float, help="default: the model's own, 7 for a teacher")
    parser.add_argument("--shift", type=positive_float, help="of the noise levels (default: the model's own, 3)")
    parser.add_argument("--cache", type=block_ranges, metavar="A-B",
                        help="re-use blocks A to B, counted from 0, after the first step; none: run all (default: the model's own)")
    parser.add_argument("--size", type=image_size, help="H or HxW in pixels (default: the model's own)")
    parser.add_argument("--seed", type=seed_number, default=0, help="of each prompt's first image; the next ones count up")
    parser.add_argument("--count", type=positive_int, default=1, help="images per prompt")
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--out", default="samples", help="FILE.png, or a folder (default: samples)")
    parser.add_argument("--export", metavar="PATH", help="draw nothing, but write the model: to FILE.safetensors in "
                        "Stability's single-file layout (for ComfyUI), or to a folder in diffusers'")
    parser.add_argument("--latents", help="also save the final latents, to this .safetensors file")
    args = parser.parse_args()

    if args.export:
        export(args)
        return
    prompts = args.prompt + (read_prompts(args.prompts) if args.prompts else [])
    if not prompts:
        raise weights.UserError("nothing to draw: give --prompt TEXT or --prompts FILE")
    out = Path(args.out)
    weights.check_writable(out if out.suffix == ".png" else out / "sheet.png")
    if args.latents:
        weights.check_writable(args.latents)
    device = find_device(args.device)
    pipeline = load_pipeline(args.model, device, DTYPES[args.dtype or ("fp32" if device.type == "cpu" else "bf16")])
    if args.cache is not None:
        pipeline.cache = Cache(args.cache) if args.cache else None

    jobs = [(prompt, args.seed + i) for prompt in prompts for i in range(args.count)]
    latents = generate(pipeline, *zip(*jobs), size=args.size, negative=args.negative, steps=args.steps,
                       guidance=args.guidance, shift=args.shift, progress=True)
    images = decode(pipeline, latents)
    if args.latents:
        weights.write_safetensors(args.latents, {"latents": latents.cpu().contiguous()},
                                  {"prompts": json.dumps([p for p, _ in jobs]), "seeds": json.dumps([s for _, s in jobs])})
    for path in write_images(images, out, jobs, columns=args.count):
        print(path)


def export(args):
    """Write the model in the layout that the name asks for."""
    path = Path(args.export)
    single = path.suffix == ".safetensors"
    weights.check_writable(path if single else path / "model_index.json")
    if path.exists() and (single or any(path.iterdir())):
        raise weights.UserError(f"{path}: is there already")
    pipeline = load_pipeline(args.model, dtype=DTYPES[args.dtype or "fp32"])
    if single and pipeline.cache is not None:
        print("note: a single file has no place for the compensator: all blocks run in every step", file=sys.stderr)
    header = {name: pipeline.mmdit.settings[name] for name in HEADER if name in pipeline.mmdit.settings}
    (save_single_file if single else save_pipeline)(pipeline, path, header)
    print(path)


class CommandLine(argparse.ArgumentParser):
    """argparse with one-line errors and no guessing at abbreviated flags."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message):
        raise weights.UserError(message)


def utf8(text):
    text.encode()  # fails on what a terminal of another encoding passed on
    return text


def positive_int(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def seed_number(text):
    if not 0 <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to 2^63 - 1")
    return int(text)


def positive_float(text):
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return float(text)


def block_ranges(text):
    """A-B, or several with commas between, or none -> a list of pairs, empty for none."""
    try:
        return parse_ranges(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(error) from error


def image_size(text):
    """H or HxW -> (H, W)."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdigit() and int(side) > 0 and int(side) % 16 == 0 for side in sides):
        raise argparse.ArgumentTypeError(f"{text} is not H or HxW with sides that are multiples of 16")
    return int(sides[0]), int(sides[-1])


def find_device(name):
    """The device asked for, or the best there is. Raises UserError where it isn't there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise weights.UserError(f"device {name} is not there ({str(error).splitlines()[0]})") from error
    return device


# -------------------------------------------------------------------------------------------------------- pipeline

@dataclass
class Pipeline:
    """The three networks of an SD3, the shift of its noise levels and, for a Stage II student, its block cache."""

    mmdit: MMDiT
    vae: VAE
    text: TextEncoders
    shift: float = 3.0
    cache: Cache | None = None

    @property
    def device(self):
        return self.mmdit.pos_embed.device

    def sigmas(self, steps=None, shift=None):
        """The noise levels to sample along: a student's own nodes, or SD3's published schedule for a teacher."""
        own = self.carried("sigmas")
        if own and shift is None and steps in (None, len(own) - 1):
            return torch.tensor(own)
        shift = shift or self.shift
        return flow.student_sigmas(steps or len(own) - 1, shift) if own else flow.sd3_sigmas(steps or 28, shift)

    def guidance(self):
        return float(self.carried("guidance") or 7.0)

    def carried(self, name):
        """What the model says of itself in the header of its tensor file, or None."""
        text = self.mmdit.settings.get(name, "null")
        with weights.explained(f"{name} = {text}, in the model's header,", "JSON"):
            return json.loads(text)

    def latent_shape(self, size=None):
        """(C, h, w) of the latents of an image of `size` (H, W), by default the model's own."""
        side = int(self.mmdit.settings.get("sample_size", min(128, self.mmdit.patch * self.mmdit.pos_max)))
        h, w = (pixels // self.vae.factor for pixels in size) if size else (side, side)
        self.mmdit.grid_size(h, w)
        return self.mmdit.channels, h, w


def load_pipeline(path, device="cpu", dtype=torch.float32, mmdit=None, text=None):
    """All of an SD3, from one file, folder or Hugging Face repository id; but for a part that is there already."""
    path = weights.find_model(path)
    scheduler = path / "scheduler" / "scheduler_config.json"
    with weights.explained(scheduler, "a scheduler's settings"):
        shift = float(weights.read_json(scheduler).get("shift", 3.0)) if scheduler.exists() else None
    mmdit = load_mmdit(path, device, dtype) if mmdit is None else mmdit
    text = load_text_encoders(path, device, dtype) if text is None else text
    shift = shift or float(mmdit.settings.get("shift", 3.0))  # of a folder, or as the header of a single file says
    return Pipeline(mmdit, load_vae(path, device, dtype), text, shift, load_cache(path, mmdit, device, dtype))


HOW = {"steps": positive_int, "guidance": float, "shift": positive_float, "cache": block_ranges}


def split_model(text):
    """"PATH@steps=4,guidance=2,cache=1-4" -> the path, and {"steps": 4, …}. Without an @: how the model itself says."""
    path, _, words = str(text).rpartition("@") if re.search(r"@\w+=[^@/]*$", str(text)) else (text, "", "")
    how = {}
    for word in filter(None, re.split(r",(?=[a-z])", words)):
        name, _, value = word.partition("=")
        try:
            how[name] = HOW[name](value)
        except (KeyError, ValueError, argparse.ArgumentTypeError) as error:
            raise weights.UserError(f"{text}: after the @ comes {', '.join(f'{key}=…' for key in HOW)} ({error})") from error
    return path, how


def open_model(text, device="cpu", dtype=torch.float32):
    """A model and how to sample it, in one word (split_model) -> a Pipeline, and arguments of `generate`."""
    path, how = split_model(text)
    pipeline = load_pipeline(path, device, dtype)
    if "cache" in how:
        ranges = how.pop("cache")
        pipeline.cache = Cache(ranges) if ranges else None
    return pipeline, how


def save_pipeline(pipeline, folder, metadata=None, dtype=None):
    """Write all of an SD3 as a diffusers folder, which load_pipeline and diffusers both read.

    `dtype` is that of the transformer and the autoencoder in the files. The text encoders keep theirs: transformers opens an
    encoder in the dtype of its file, diffusers the other parts in fp32, and a mixture does not run.
    """
    folder = Path(folder)
    sample_size = pipeline.latent_shape()[1]
    save_mmdit(pipeline.mmdit, folder / "transformer", metadata, dtype, sample_size)
    save_vae(pipeline.vae, folder / "vae", dtype)
    save_text_encoders(pipeline.text, folder)
    if pipeline.cache is not None:
        save_cache(pipeline.cache, folder)
    weights.write_json(folder / "scheduler" / "scheduler_config.json", {
        "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": pipeline.shift})
    t5 = pipeline.text.t5 is not None
    weights.write_json(folder / "model_index.json", {
        "_class_name": "StableDiffusion3Pipeline", "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", "SD3Transformer2DModel"], "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_3": ["transformers", "T5EncoderModel"] if t5 else [None, None],
        "tokenizer": ["transformers", "CLIPTokenizer"], "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "tokenizer_3": ["transformers", "T5TokenizerFast"] if t5 else [None, None]})


def save_single_file(pipeline, file, metadata=None):
    """Write all of an SD3 as one file in Stability's layout, text encoders included, and the tokenizers beside it.

    The layout has no place for settings: what is not SD3's own goes into the header, for load_pipeline. A block cache's
    compensator is left out.
    """
    file, vae = Path(file), pipeline.vae
    parts = {weights.PREFIXES["transformer"]: pipeline.mmdit.state_dict(), weights.PREFIXES["vae"]: vae.state_dict(),
             weights.TEXT_PREFIX: single_file_tensors(pipeline.text)}
    tensors = {prefix + name: tensor.detach().cpu().contiguous()
               for prefix, part in parts.items() for name, tensor in part.items()}
    projection = pipeline.text.clip_l.text_projection.weight  # the identity in SD3, not in the tiny SD3
    projected = not torch.equal(projection, torch.eye(*projection.shape).to(projection))
    said = {"clip_l_projected": projected, "shift": pipeline.shift, "sample_size": pipeline.latent_shape()[1],
            "scaling_factor": vae.scale, "shift_factor": vae.shift, "norm_num_groups": vae.encoder.norm_out.num_groups}
    weights.write_safetensors(file, tensors, {**{name: str(value) for name, value in said.items()}, **(metadata or {})})
    save_tokenizers(pipeline.text, file.parent)


@torch.no_grad()
def generate(pipeline, prompts, seeds, size=None, negative="", steps=None, guidance=None, shift=None, sigmas=None,
             progress=False):
    """One latent for each pair of prompt and seed, (N, C, h, w). What is None is the model's own."""
    shape = pipeline.latent_shape(size)
    sigmas = pipeline.sigmas(steps, shift) if sigmas is None else sigmas
    if pipeline.cache is not None:
        check_ranges(pipeline.cache.ranges, len(pipeline.mmdit.joint_blocks), steps=len(sigmas) - 1)
    guidance = pipeline.guidance() if guidance is None else guidance
    batch = max(1, LATENTS_AT_ONCE // (shape[1] * shape[2]))
    parts = []
    for i in range(0, len(prompts), batch):
        cond = pipeline.text(prompts[i:i + batch])
        uncond = pipeline.text([negative] * len(cond[0])) if guidance > 1 else None
        noise = flow.initial_noise(shape, seeds[i:i + batch]).to(pipeline.device)
        parts.append(flow.sample(pipeline.mmdit, noise, sigmas, cond, uncond, guidance, progress,
                                 pipeline.cache))
    return torch.cat(parts)


@torch.no_grad()
def decode(pipeline, latents):
    """Latents (N, C, h, w) -> images (N, 3, H, W) in [-1, 1], fp32, on the CPU."""
    dtype = pipeline.vae.decoder.conv_in.weight.dtype
    batch = max(1, LATENTS_AT_ONCE // (16 * latents.shape[2] * latents.shape[3]))
    return torch.cat([pipeline.vae.decode(part.to(dtype)).float().clamp(-1, 1).cpu() for part in latents.split(batch)])


# -------------------------------------------------------------------------------------------------------- pictures

def to_picture(image):
    """(3, H, W) in [-1, 1] -> a PIL image."""
    return Image.fromarray(((image / 2 + 0.5) * 255).round().byte().permute(1, 2, 0).numpy())


def picture_bytes(picture):
    """A PIL image -> uint8 (3, H, W); the other way of `to_picture`, but for the scale."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def contact_sheet(images, rows, columns, gap=4):
    """Images (R · C, 3, H, W), row by row, with a label for each row and a heading for each column -> a PIL image."""
    height, width = images.shape[2:]
    zoom = max(1, 128 // width)
    height, width = zoom * height, zoom * width
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = gap + max((int(draw.textlength(row)) for row in rows), default=0) + gap
    top = 20 if any(columns) else gap
    sheet = Image.new("RGB", (left + len(columns) * (width + gap), top + len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for j, column in enumerate(columns):
        draw.text((left + j * (width + gap), 4), column, fill="black")
    for i, row in enumerate(rows):
        draw.text((gap, top + i * (height + gap) + height // 2 - 6), row, fill="black")
        for j in range(len(columns)):
            picture = to_picture(images[i * len(columns) + j]).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (left + j * (width + gap), top + i * (height + gap)))
    return sheet


def write_images(images, out, jobs, columns):
    """Write each image and, for several, a contact sheet with a row per prompt. Yields the paths."""
    single = out.suffix == ".png"
    if single and len(images) == 1:
        yield write_picture(to_picture(images[0]), out)
        return
    for i, image in enumerate(images):
        name = f"{out.stem}-{i:03}.png" if single else f"{i:03}.png"
        yield write_picture(to_picture(image), (out.parent if single else out) / name)
    if len(images) > 1:
        rows = [prompt for prompt, _ in jobs[::columns]]
        headings = [f"seed {seed}" for _, seed in jobs[:columns]]
        yield write_picture(contact_sheet(images, rows, headings), out if single else out / "sheet.png")


def write_picture(picture, path):
    with weights.replacing(path) as part:
        picture.save(part, format="PNG")
    return path


if __name__ == "__main__":
    weights.run_script(main)
