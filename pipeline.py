"""A whole SD3: load it, draw with it, save it. Prompt → text → noise → MMDiT steps → VAE → image.

Works on any SD3: Stability's single files, diffusers folders, Hugging Face repositories, the tiny SD3, and students
made by train.py, which carry their own noise levels and guidance in the header of their tensor file.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import flow
import weights
from cache import Cache, CachedSteps, check_blocks, load_cache, save_cache
from commandline import UserError
from mmdit import MMDiT, load_mmdit, save_mmdit
from text import TextEncoders, link_text_encoders, load_text_encoders, save_text_encoders
from vae import VAE, load_vae, save_vae

TINY = Path(__file__).parent / "tiny-sd3"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LATENTS_AT_ONCE = 4 * 128 * 128  # positions a batch: 4 images of 1024²


@dataclass
class Pipeline:
    """The networks of an SD3, and how it is sampled. `text`: prompts -> (context, pooled)."""

    mmdit: MMDiT
    vae: VAE
    text: TextEncoders
    shift: float                # of the noise levels (flow.shift_sigma)
    sigmas: torch.Tensor        # (n+1,): the noise levels of its n steps
    guidance: float             # w; 1 is none
    cache: Cache | None = None
    redraws: "Pipeline | None" = None   # Stage II's --redraw: whose images this one draws again

    @property
    def device(self):
        return self.mmdit.pos_embed.device

    def latent_shape(self, size=None):
        """(C, h, w) of the latents of an image of `size` (H, W), by default the model's own."""
        side = self.mmdit.metadata.get("sample_size") or min(128, self.mmdit.patch * self.mmdit.pos_max)
        h, w = (pixels // self.vae.factor for pixels in size) if size else (int(side), int(side))
        self.mmdit.grid_size(h, w)
        return self.mmdit.channels, h, w

    def sampled_with(self, steps=None, guidance=None, blocks=None):
        """The same networks, sampled in another way. None changes nothing; blocks (a, b): re-used without f; (): all run.

        A student takes the nodes of the paper for any number of steps, another model SD3's published schedule.
        """
        new = replace(self)
        if steps is not None:
            schedule = flow.student_sigmas if "sigmas" in self.mmdit.metadata else flow.sd3_sigmas
            new.sigmas = schedule(steps, self.shift).to(self.device)
        if guidance is not None:
            new.guidance = guidance
        if blocks is not None:
            new.cache = Cache(blocks) if blocks else None
        if new.cache is not None:
            check_blocks(new.cache.blocks, len(self.mmdit.joint_blocks), len(new.sigmas) - 1)
        return new

    def sample(self, noise, cond, uncond=None, progress=False):
        """Latents (B, C, h, w) from noise of that shape; uncond, of one prompt, is read if there is guidance."""
        x, sigmas, network = noise, self.sigmas, CachedSteps(self.mmdit, self.cache)
        if self.redraws:  # take the other's image back to the level in the middle of the steps (SDEdit, Meng et al. 2022)
            sigmas = sigmas[len(sigmas) // 2:]
            x = flow.add_noise(self.redraws.sample(noise, cond), noise, sigmas[0].expand(len(noise)))
        return flow.sample(network, x, sigmas, cond, uncond, self.guidance, progress)

    @torch.no_grad()
    def latents(self, prompts, seeds, size=None, progress=False):
        """One latent for each pair of prompt and seed, (N, C, h, w). Raises UserError for latents that are not finite.
        """
        shape, latents = self.latent_shape(size), []
        batch = self.batch(size)
        uncond = self.text([""]) if self.guidance != 1 else None
        for i in range(0, len(prompts), batch):
            distinct = list(dict.fromkeys(prompts[i:i + batch]))  # often many images of one prompt
            rows = [distinct.index(prompt) for prompt in prompts[i:i + batch]]
            cond = [part[rows] for part in self.text(distinct)]
            noise = flow.initial_noise(shape, seeds[i:i + batch]).to(self.device)
            latents.append(check_finite(self.sample(noise, cond, uncond, progress), "latents"))
        return torch.cat(latents)

    def images(self, prompts, seeds, size=None, progress=False):
        """One image for each pair of prompt and seed, (N, 3, H, W) in [-1, 1], fp32, on the CPU."""
        return decode(self.vae, self.latents(prompts, seeds, size, progress))

    def batch(self, size=None):
        """How many images of `size` are drawn at once."""
        _, h, w = self.latent_shape(size)
        return max(1, LATENTS_AT_ONCE // (h * w))


@torch.no_grad()
def decode(vae, latents):
    """Latents (N, C, h, w) -> images (N, 3, H, W) in [-1, 1], fp32, on the CPU. One image of 1024² at a time."""
    dtype = vae.decoder.conv_in.weight.dtype
    batch = max(1, LATENTS_AT_ONCE // (16 * latents.shape[2] * latents.shape[3]))
    images = (vae.decode(part.to(dtype)) for part in latents.split(batch))
    return torch.cat([check_finite(part, "images").float().clamp(-1, 1).cpu() for part in images])


def check_finite(tensor, name):
    """The tensor, or UserError if it is not finite: NaN would be drawn black."""
    if not tensor.isfinite().all():
        raise UserError(f"the {name} are not finite: try bf16 or fp32, or a lower guidance")
    return tensor


# ------------------------------------------------------------------------------------------------- load and save

def load_pipeline(path, device="cpu", dtype=torch.float32, mmdit=None, text=None):
    """All of an SD3, from one file, folder or Hugging Face repository id; except parts that are passed in."""
    path = weights.find_model(path)
    mmdit = load_mmdit(path, device, dtype) if mmdit is None else mmdit
    text = load_text_encoders(path, device, dtype) if text is None else text
    vae, cache = load_vae(path, device, dtype), load_cache(path, mmdit, device, dtype)
    scheduler = path / "scheduler" / "scheduler_config.json"
    settings = weights.read_json(scheduler) if scheduler.exists() else {}
    if settings.get("use_dynamic_shifting") or settings.get("shift_terminal"):
        raise UserError(f"{scheduler}: dynamic shifting makes other noise levels than SD3's; set it to false")
    with weights.library_errors(path, "be read: its noise levels or its guidance are damaged"):
        shift, guidance = float(settings.get("shift", 3.0)), float(mmdit.metadata.get("guidance", 7.0))
        sigmas = read_sigmas(mmdit.metadata["sigmas"]) if "sigmas" in mmdit.metadata else flow.sd3_sigmas(28, shift)
    return Pipeline(mmdit, vae, text, shift, sigmas.to(device), guidance, cache)


def read_sigmas(text):
    """A student's nodes, from its header -> (n+1,). Raises ValueError if they do not fall from at most 1 to 0."""
    levels = torch.tensor(json.loads(text))
    if len(levels) < 2 or levels[0] > 1 or levels[-1] != 0 or not (levels[:-1] > levels[1:]).all():
        raise ValueError(f"{text} do not fall from at most 1 to 0")
    return levels


def save_pipeline(pipeline, folder, metadata=None, dtype=None, text_folder=None):
    """Write all of an SD3 as a diffusers folder, which load_pipeline and diffusers both read.

    `dtype` is that of the transformer and the autoencoder in the files; the text encoders keep theirs. text_folder: a
    diffusers folder that has the same ones; links to it are written, because T5 takes 10 GB.
    """
    folder = Path(folder)
    (folder / "model_index.json").unlink(missing_ok=True)  # what is being overwritten does not count as finished
    save_mmdit(pipeline.mmdit, folder / "transformer", metadata, dtype, pipeline.latent_shape()[1])
    save_vae(pipeline.vae, folder / "vae", dtype)
    if text_folder:
        link_text_encoders(text_folder, folder)
    else:
        save_text_encoders(pipeline.text, folder)
    if pipeline.cache is not None:
        save_cache(pipeline.cache, folder)
    weights.write_json(folder / "scheduler" / "scheduler_config.json", {
        "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": pipeline.shift})
    t5 = (folder / "text_encoder_3").exists()
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
