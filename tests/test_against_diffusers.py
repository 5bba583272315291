"""Our SD3 against diffusers', in fp32, on random weights: every kind, odd sizes; every layout, with and without T5."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from safetensors.torch import load_file

import flow
import mmdit
import text
import vae
import weights
from conftest import KINDS, PAIRS, randomise
from pictures import to_picture
from pipeline import TINY, load_pipeline, save_pipeline

TOLERANCE = {"velocity": 1e-5, "encode": 1e-5, "decode": 1e-5, "text": 1e-5, "latents": 2e-5}
PROMPTS = ["a striped red circle on a gray background", "Two words, ünknown; " * 4, ""]  # the second is cut
PARTS = ("mmdit", "vae", "text")


def error(ours, theirs):
    """Largest difference as a share of the largest value."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def velocity_error(theirs, ours):
    sigma, worst = torch.tensor([0.97, 0.3]), 0
    context, pooled = randn(2, 27, 224), randn(2, 160)
    for size in ((6, 10), (16, 4)):
        x = randn(2, 16, *size)
        reference = theirs.transformer(x, context, pooled, 1000 * sigma).sample
        worst = max(worst, error(ours.mmdit(x, sigma, context, pooled), reference))
    return worst


@torch.no_grad()
def encode_error(theirs, ours):
    images = randn(2, 3, 48, 80).clamp(-1, 1)
    reference = theirs.vae.encode(images).latent_dist.mode()
    reference = (reference - theirs.vae.config.shift_factor) * theirs.vae.config.scaling_factor
    return error(ours.vae.encode(images), reference)


@torch.no_grad()
def decode_error(theirs, ours):
    latents = randn(2, 16, 6, 10)
    reference = theirs.vae.decode(latents / theirs.vae.config.scaling_factor + theirs.vae.config.shift_factor).sample
    return error(ours.vae.decode(latents), reference)


@torch.no_grad()
def text_error(theirs, ours):
    context, _, pooled, _ = theirs.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False,
                                                 max_sequence_length=ours.text.t5_length)
    ours_context, ours_pooled = ours.text(PROMPTS)
    return max(error(ours_context, context), error(ours_pooled, pooled))


def latents_error(theirs, ours, **levels):
    """Of sampled latents, 28 guided steps where `levels` says nothing else to diffusers."""
    height, width = 48, 80
    noise = flow.initial_noise((16, height // 8, width // 8), range(len(PROMPTS)))
    if not levels:
        levels, ours = {"num_inference_steps": 28}, ours.sampled_with(28, 4.0)
    reference = theirs(PROMPTS, latents=noise, height=height, width=width, guidance_scale=ours.guidance,
                       output_type="latent", max_sequence_length=ours.text.t5_length, **levels).images
    return error(ours.latents(PROMPTS, range(len(PROMPTS)), (height, width)), reference)


MEASURES = {"velocity": velocity_error, "encode": encode_error, "decode": decode_error, "text": text_error,
            "latents": latents_error}


@pytest.mark.parametrize("what", MEASURES)
@pytest.mark.parametrize("kind", KINDS)
def test_we_compute_what_diffusers_computes(make_pair, kind, what):
    pair = make_pair(kind, "folder")
    assert MEASURES[what](pair.theirs, pair.ours) <= TOLERANCE[what]


@pytest.mark.parametrize("kind, layout", [pair for pair in PAIRS if pair[1] != "folder"])
def test_every_layout_gives_the_same_bits(make_pair, kind, layout):
    pair, folder = make_pair(kind, layout), make_pair(kind, "folder").ours
    for part in PARTS:
        same_bits(getattr(pair.ours, part).state_dict(), {
            name: tensor for name, tensor in getattr(folder, part).state_dict().items()
            if "without T5" not in layout or not name.startswith("t5.")})
    for one in (pair.ours, folder):
        assert (one.vae.scale, one.vae.shift, one.shift) == (1.5305, 0.0609, 3.0)
    assert text_error(pair.theirs, pair.ours) <= TOLERANCE["text"]  # settings and tokenizers are none of the tensors


def same_bits(state, expected):
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


# ---------------------------------------------------------------------------- would these comparisons see a mistake?

def top_left_crop(self, h, w):
    return self.pos_embed.unflatten(1, (self.pos_max, self.pos_max))[:, :h, :w].flatten(1, 2)


def last_clip_state(self, model, tokenizer, prompts):
    out = model(self.token_ids(tokenizer, prompts, tokenizer.model_max_length, "CLIP"), output_hidden_states=True)
    return out.hidden_states[-1], out.text_embeds


features = mmdit.timestep_features
MISTAKES = {
    "exact GELU": ("velocity", mmdit.MLP, "forward", lambda self, x: self.fc2(F.gelu(self.fc1(x)))),
    "scale and shift not swapped": ("velocity", weights, "swap_halves", lambda name, tensor, blocks: tensor),
    "position table cropped at its corner": ("velocity", mmdit.MMDiT, "crop_pos_embed", top_left_crop),
    "timestep not times 1000": ("velocity", mmdit, "timestep_features", lambda t: features(t / 1000)),
    "VAE shift ignored": ("decode", vae.VAE, "decode", lambda self, z: self.decoder(z / self.scale)),
    "symmetric padding": ("encode", torch.nn.ZeroPad2d, "forward", lambda self, x: F.pad(x, (1, 1, 1, 1))),
    "CLIP's last state": ("text", text.TextEncoders, "encode_clip", last_clip_state),
    "guidance off by one": ("latents", flow, "guide", lambda u, c, w: c + w * (c - u)),
    "schedule shifted once": ("latents", flow, "sd3_sigmas", flow.student_sigmas),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_shows(make_pair, monkeypatch, mistake):
    what, owner, name, wrong = MISTAKES[mistake]
    theirs, _, path = make_pair("SD3.5-Medium", "folder")
    monkeypatch.setattr(owner, name, wrong)
    assert MEASURES[what](theirs, load_pipeline(path)) > TOLERANCE[what]


# --------------------------------------------------------------------------------------------- saving, students

def open_in_diffusers(folder, **parts):
    theirs = StableDiffusion3Pipeline.from_pretrained(folder, **parts)
    theirs.set_progress_bar_config(disable=True)
    return theirs


@pytest.mark.parametrize("kind, steps", [*zip(KINDS, (1, 2, 4))])
def test_a_written_student_opens_in_diffusers_and_draws_the_same_latents(make_pair, tmp_path, kind, steps):
    original, ours, _ = make_pair(kind, "file")
    sigmas = flow.student_sigmas(steps, ours.shift)
    save_pipeline(replace(ours, sigmas=sigmas), tmp_path, {"sigmas": str(sigmas.tolist()), "guidance": "1"})
    back, theirs = load_pipeline(tmp_path), open_in_diffusers(tmp_path)
    for part in PARTS:
        same_bits(getattr(back, part).state_dict(), getattr(ours, part).state_dict())
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        same_bits(getattr(theirs, name).state_dict(), getattr(original, name).state_dict())
    assert torch.equal(back.sigmas, sigmas) and back.guidance == 1 and theirs.scheduler.config.shift == 3.0
    evenly = torch.linspace(1, 0, steps + 1)[:-1].tolist()  # diffusers shifts them itself
    assert latents_error(theirs, back, sigmas=evenly) <= TOLERANCE["latents"]


def test_a_student_without_t5_and_with_encoders_in_fp16_opens_in_diffusers(make_pair, tmp_path):
    _, ours, _ = make_pair("SD3-Medium", "file without T5")
    save_pipeline(replace(ours, text=copy.deepcopy(ours.text).half()), tmp_path)
    assert all(t.dtype == torch.float16 for t in load_file(tmp_path / "text_encoder" / "model.safetensors").values())
    theirs = open_in_diffusers(tmp_path, text_encoder_3=None, tokenizer_3=None)  # as diffusers wants its own, too
    assert text_error(theirs, load_pipeline(tmp_path)) <= TOLERANCE["text"]


def test_vae_constants_are_read_off_its_config(tmp_path):
    theirs = AutoencoderKL(
        block_out_channels=(16, 24, 40), layers_per_block=2, latent_channels=5, norm_num_groups=8,
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.7, shift_factor=-0.2)
    randomise(theirs.requires_grad_(False).eval(), 0)
    theirs.save_pretrained(tmp_path)
    ours, images = vae.load_vae(tmp_path), randn(1, 3, 16, 24)
    latents = (theirs.encode(images).latent_dist.mode() + 0.2) * 0.7
    assert error(ours.encode(images), latents) <= TOLERANCE["encode"]
    assert error(ours.decode(latents), theirs.decode(latents / 0.7 - 0.2).sample) <= TOLERANCE["decode"]


@pytest.mark.parametrize("trained", [False, True], ids=["the shipped teacher", "a trained student"])
def test_diffusers_draws_the_same_picture(two_steps, trained):
    ours, theirs = (load(two_steps if trained else TINY) for load in (load_pipeline, open_in_diffusers))
    ours = ours if trained else ours.sampled_with(8)
    levels = {"sigmas": [1.0, 0.5]} if trained else {"num_inference_steps": 8}
    noise = flow.initial_noise(ours.latent_shape(), [0])
    picture = theirs("a striped red circle", latents=noise, guidance_scale=ours.guidance,
                     max_sequence_length=ours.text.t5_length, **levels).images[0]
    mine = to_picture(ours.images(["a striped red circle"], [0])[0])
    difference = np.asarray(picture, dtype=int) - np.asarray(mine, dtype=int)
    assert picture.size == mine.size and abs(difference).max() <= 1
