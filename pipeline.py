"""A whole SD3: load it, draw with it, save it. Prompt → text → noise → MMDiT steps → VAE → image.

Works on any SD3: Stability's single files, diffusers folders, Hugging Face repositories, the tiny SD3, and students
made by train.py, which carry their own noise levels and guidance in the header of their tensor file.
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

import commandline
import flow
import weights
from cache import Cache, CachedSteps, check_blocks, load_cache, save_cache
from commandline import UserError
from mmdit import MMDiT, load_mmdit, save_mmdit
from text import (TextEncoders, check_widths, load_text_encoders, save_text_encoders, save_tokenizers,
                  single_file_settings, single_file_tensors)
from vae import VAE, load_vae, save_vae

TINY = Path(__file__).parent / "tiny-sd3"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HEADER = ("sigmas", "guidance", "training")  # what a model's tensor file says beside the tensors
LATENTS_AT_ONCE = 4 * 128 * 128  # positions a batch: 4 images of 1024²


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

    def sigmas(self, steps=None):
        """The noise levels to sample along: a student's own nodes, or SD3's published schedule for a teacher."""
        own = self.carried("sigmas")
        if own is not None and not falling(own):
            raise UserError(f"sigmas = {weights.in_short(own)}, in the model's header, do not fall from at most 1 to 0")
        if own and steps in (None, len(own) - 1):
            return torch.tensor(own)
        return flow.student_sigmas(steps, self.shift) if own else flow.sd3_sigmas(steps or 28, self.shift)

    def guidance(self):
        own = self.carried("guidance")
        return 7.0 if own is None else weights.parse_number(own, "guidance, in the model's header,")

    def carried(self, name):
        """What the model says of itself in its tensor file's header, or None. Raises UserError if it is no JSON."""
        text = self.mmdit.metadata.get(name, "null")
        return weights.parse_json(text, f"{name} = {weights.in_short(text)}, in the model's header,")

    def latent_shape(self, size=None):
        """(C, h, w) of the latents of an image of `size` (H, W), by default the model's own."""
        side = self.mmdit.metadata.get("sample_size")  # null, too, stands for the usual one
        side = min(128, self.mmdit.patch * self.mmdit.pos_max) if side is None else side
        side = int(weights.parse_number(side, "the model's sample_size", least=0))
        h, w = (pixels // self.vae.factor for pixels in size) if size else (side, side)
        self.mmdit.grid_size(h, w)
        return self.mmdit.channels, h, w

    @torch.no_grad()
    def sample(self, noise, cond, uncond=None, sigmas=None, guidance=None, progress=False):
        """Latents (B, C, h, w) from noise of that shape; uncond is of one prompt. What is None is the model's own."""
        sigmas = self.sigmas() if sigmas is None else sigmas
        guidance = self.guidance() if guidance is None else guidance
        uncond = [part.expand(len(noise), *part.shape[1:]) for part in uncond] if guidance > 1 else None
        return flow.sample(CachedSteps(self.mmdit, self.cache), noise, sigmas, cond, uncond, guidance, progress)

    def batch(self, size=None):
        """How many images of `size` are drawn at once."""
        _, h, w = self.latent_shape(size)
        return max(1, LATENTS_AT_ONCE // (h * w))


def falling(levels):
    """Whether noise levels from a file can be sampled along."""
    return (isinstance(levels, list) and len(levels) > 1 and all(isinstance(level, (int, float)) for level in levels)
            and levels[0] <= 1 and levels[-1] == 0 and all(a > b for a, b in zip(levels, levels[1:])))


# -------------------------------------------------------------------------------------------------------- drawing

@torch.no_grad()
def generate(pipeline, prompts, seeds, size=None, negative="", steps=None, guidance=None, sigmas=None, progress=False):
    """One latent for each pair of prompt and seed, (N, C, h, w). What is None is the model's own.

    Raises UserError for latents that are not finite, and for a `negative` prompt that nothing reads.
    """
    shape, batch = pipeline.latent_shape(size), pipeline.batch(size)
    sigmas = pipeline.sigmas(steps) if sigmas is None else sigmas
    guidance = pipeline.guidance() if guidance is None else guidance
    if negative and guidance <= 1:
        raise UserError(f"--negative does nothing at a guidance of {guidance:g}; leave it out, or give a --guidance "
                        "above 1")
    if pipeline.cache is not None:
        check_blocks(pipeline.cache.blocks, len(pipeline.mmdit.joint_blocks), steps=len(sigmas) - 1)
    uncond = pipeline.text([negative]) if guidance > 1 else None
    latents = []
    for i in range(0, len(prompts), batch):
        distinct = list(dict.fromkeys(prompts[i:i + batch]))  # images of one prompt stand side by side
        rows = [distinct.index(prompt) for prompt in prompts[i:i + batch]]
        cond = [part[rows] for part in pipeline.text(distinct)]
        noise = flow.initial_noise(shape, seeds[i:i + batch]).to(pipeline.device)
        part = pipeline.sample(noise, cond, uncond, sigmas, guidance, progress)
        latents.append(check_finite(part, "latents"))
    return torch.cat(latents)


@torch.no_grad()
def decode(pipeline, latents):
    """Latents (N, C, h, w) -> images (N, 3, H, W) in [-1, 1], fp32, on the CPU. One image of 1024² at a time.

    Raises UserError for images that are not finite.
    """
    dtype = pipeline.vae.decoder.conv_in.weight.dtype
    batch = max(1, LATENTS_AT_ONCE // (16 * latents.shape[2] * latents.shape[3]))
    images = (pipeline.vae.decode(part.to(dtype)) for part in latents.split(batch))
    return torch.cat([check_finite(part, "images").float().clamp(-1, 1).cpu() for part in images])


def check_finite(tensor, name):
    """The tensor, or UserError where it is not finite: NaN would be drawn black."""
    if not tensor.isfinite().all():
        raise UserError(f"the {name} are not finite: in fp16, take bf16 or fp32; at a large guidance, a lower one")
    return tensor


class Sampler(NamedTuple):
    """A model, and how it is sampled."""

    pipeline: Pipeline
    options: dict           # arguments of `generate`: steps, guidance, sigmas
    folder: str = None      # where the model lies as it is here; None: nowhere, it is being trained

    def key(self):
        """How it is sampled, as text: the levels, guidance and cached blocks that its options come to."""
        levels = self.options["sigmas"] if "sigmas" in self.options else self.pipeline.sigmas(self.options.get("steps"))
        cached = self.pipeline.cache and self.pipeline.cache.blocks
        guidance = float(self.options.get("guidance", self.pipeline.guidance()))
        return json.dumps({"sigmas": [round(x, 6) for x in levels.tolist()], "cache": cached, "guidance": guidance})

    def images(self, prompts, seeds):
        """One image for each pair, (N, 3, H, W) in [-1, 1], on the CPU."""
        return decode(self.pipeline, generate(self.pipeline, list(prompts), list(seeds), **self.options))


OPTIONS = {"steps": commandline.count, "guidance": commandline.number(0), "cache": commandline.blocks}


def split_model(text):
    """"PATH@steps=4,guidance=2,cache=1-4" -> the path, and {"steps": 4, …}. Without an @: as the model itself says."""
    path, _, words = str(text).rpartition("@") if re.search(r"@\w+=[^@/]*$", str(text)) else (text, "", "")
    options = {}
    for word in filter(None, words.split(",")):
        name, _, value = word.partition("=")
        try:
            options[name] = OPTIONS[name](value)
        except (KeyError, ValueError, commandline.argparse.ArgumentTypeError) as error:
            known = ", ".join(f"{key}=…" for key in OPTIONS)
            raise UserError(f"{text}: after the @ comes {known} ({error})") from error
    return path, options


def open_sampler(text, device="cpu", dtype=torch.float32):
    """A model and how it is sampled, in one word (split_model) -> Sampler."""
    path, options = split_model(text)
    pipeline = load_pipeline(path, device, dtype)
    if "cache" in options:
        blocks = options.pop("cache")
        pipeline = replace(pipeline, cache=Cache(blocks) if blocks else None)
    return Sampler(pipeline, options)


# ------------------------------------------------------------------------------------------------- load and save

def load_pipeline(path, device="cpu", dtype=torch.float32, mmdit=None, text=None):
    """All of an SD3, from one file, folder or Hugging Face repository id; but for a part that is there already."""
    path = weights.find_model(path)
    mmdit = load_mmdit(path, device, dtype) if mmdit is None else mmdit
    if text is None:
        text = load_text_encoders(path, device, dtype)
        check_widths(text, mmdit, path)
    vae, cache = load_vae(path, device, dtype), load_cache(path, mmdit, device, dtype)
    return Pipeline(mmdit, vae, text, find_shift(path, mmdit), cache)


def find_shift(path, mmdit):
    """Of a folder, as its scheduler says; of a single file, as its header says; else SD3's 3."""
    file = path / "scheduler" / "scheduler_config.json"
    settings, file = (weights.read_json(file), file) if file.exists() else (mmdit.metadata, path)
    for name in OTHER_LEVELS:
        if settings.get(name):
            raise UserError(f"{file}: {name} makes other noise levels than SD3's, which cannot be sampled along; "
                            "set it to false")
    return weights.parse_number(settings.get("shift", 3.0), f"{file}: shift", least=0)


OTHER_LEVELS = ("use_dynamic_shifting", "shift_terminal", "use_karras_sigmas", "use_exponential_sigmas",
                "use_beta_sigmas", "invert_sigmas", "stochastic_sampling")  # settings of diffusers' scheduler


def save_pipeline(pipeline, folder, metadata=None, dtype=None):
    """Write all of an SD3 as a diffusers folder, which load_pipeline and diffusers both read.

    `dtype` is that of the transformer and the autoencoder in the files; the text encoders keep theirs.
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


def is_finished(folder):
    """Whether a whole model stands in a folder: save_pipeline writes this file last."""
    return (Path(folder) / "model_index.json").exists()


def fake_folder(run):
    """Where a run of Stage I leaves its fake score."""
    return Path(run) / "fake"


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
    header = {"clip_l_projected": projected, "shift": pipeline.shift, "sample_size": pipeline.latent_shape()[1],
              "transformer.num_attention_heads": pipeline.mmdit.joint_blocks[0].x_block.attn.heads,
              "scaling_factor": vae.scale, "shift_factor": vae.shift,
              "norm_num_groups": vae.encoder.norm_out.num_groups, **single_file_settings(pipeline.text)}
    header = {name: str(value) for name, value in header.items()}
    weights.write_safetensors(file, tensors, {**header, **(metadata or {})})
    save_tokenizers(pipeline.text, file.parent)
