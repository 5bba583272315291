"""Our SD3 against diffusers', in fp32, on random weights: every kind, odd sizes; every layout, with and without T5."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from safetensors.torch import load_file

import flow
import vae
from conftest import KINDS, randomise
from pictures import to_picture
from pipeline import load_pipeline, save_pipeline

PROMPTS = ["a striped red circle on a gray background", "Two words, ünknown; " * 4, ""]  # the second is cut
PARTS = ("mmdit", "vae", "text")


def error(ours, theirs):
    """Largest difference as a share of the largest value."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_velocity_is_that_of_diffusers(make_pair, kind):
    theirs, ours, _ = make_pair(kind, "folder")
    sigma, context, pooled = torch.tensor([0.97, 0.3]), randn(2, 27, 224), randn(2, 160)
    for size in ((6, 10), (16, 4)):
        x = randn(2, 16, *size)
        reference = theirs.transformer(x, context, pooled, 1000 * sigma).sample
        assert error(ours.mmdit(x, sigma, context, pooled), reference) <= 1e-5


@torch.no_grad()
def text_error(theirs, ours):
    context, _, pooled, _ = theirs.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False,
                                                 max_sequence_length=ours.text.t5_length)
    ours_context, ours_pooled = ours.text(PROMPTS)
    return max(error(ours_context, context), error(ours_pooled, pooled))


def latents_error(theirs, ours, **levels):
    """Of sampled latents; `levels` tells diffusers what ours knows."""
    height, width = 48, 80
    noise = flow.initial_noise((16, height // 8, width // 8), range(len(PROMPTS)))
    reference = theirs(PROMPTS, latents=noise, height=height, width=width, guidance_scale=ours.guidance,
                       output_type="latent", max_sequence_length=ours.text.t5_length, **levels).images
    return error(ours.latents(PROMPTS, range(len(PROMPTS)), (height, width)), reference)


def test_a_teachers_guided_latents_are_those_of_diffusers(make_pair):
    theirs, ours, _ = make_pair("SD3.5-Medium", "folder")
    assert latents_error(theirs, ours.sampled_with(28, 4.0), num_inference_steps=28) <= 2e-5


@pytest.mark.parametrize("kind, layout", [
    *((kind, "file") for kind in KINDS), ("SD3-Medium", "file without prefix"), ("SD3-Medium", "file without T5"),
    ("SD3-Medium", "folder without T5"), ("SD3.5-Medium", "shards in fp16")])
def test_every_layout_gives_the_same_bits(make_pair, kind, layout):
    pair, folder = make_pair(kind, layout), make_pair(kind, "folder").ours
    for part in PARTS:
        same_bits(getattr(pair.ours, part).state_dict(), {
            name: tensor for name, tensor in getattr(folder, part).state_dict().items()
            if "without T5" not in layout or not name.startswith("t5.")})
    for one in (pair.ours, folder):
        assert (one.vae.scale, one.vae.shift, one.shift) == (1.5305, 0.0609, 3.0)
    assert text_error(pair.theirs, pair.ours) <= 1e-5  # settings and tokenizers are none of the tensors


def same_bits(state, expected):
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


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
    assert latents_error(theirs, back, sigmas=evenly) <= 2e-5


def test_a_student_in_fp16_without_t5_opens_in_diffusers(make_pair, tmp_path):
    _, ours, _ = make_pair("SD3-Medium", "file without T5")
    save_pipeline(replace(ours, text=copy.deepcopy(ours.text).half()), tmp_path, dtype=torch.float16)
    for file in tmp_path.rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}, file
    theirs = open_in_diffusers(tmp_path, text_encoder_3=None, tokenizer_3=None)  # as diffusers wants its own, too
    assert text_error(theirs, load_pipeline(tmp_path)) <= 1e-5


def test_a_vae_of_any_size_encodes_and_decodes_as_that_of_diffusers(tmp_path):
    theirs = AutoencoderKL(
        block_out_channels=(16, 24, 40), layers_per_block=2, latent_channels=5, norm_num_groups=8,
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.7, shift_factor=-0.2)
    randomise(theirs.requires_grad_(False).eval(), 0)
    theirs.save_pretrained(tmp_path)
    ours, images = vae.load_vae(tmp_path), randn(1, 3, 16, 24)
    latents = (theirs.encode(images).latent_dist.mode() + 0.2) * 0.7
    assert error(ours.encode(images), latents) <= 1e-5
    assert error(ours.decode(latents), theirs.decode(latents / 0.7 - 0.2).sample) <= 1e-5


def test_diffusers_draws_the_same_picture_with_a_student_made_by_train(two_steps):
    ours, theirs = load_pipeline(two_steps), open_in_diffusers(two_steps)
    noise = flow.initial_noise(ours.latent_shape(), [0])
    picture = theirs("a striped red circle", latents=noise, guidance_scale=1.0, sigmas=[1.0, 0.5],
                     max_sequence_length=ours.text.t5_length).images[0]
    mine = to_picture(ours.images(["a striped red circle"], [0])[0])
    difference = np.asarray(picture, dtype=int) - np.asarray(mine, dtype=int)
    assert picture.size == mine.size and abs(difference).max() <= 1
