"""A whole SD3: what a model says of itself, text that is encoded once, and measures that are not made twice."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch

import flow
import mmdit
import pipeline
import report
import sample
import shapes
import weights
from cache import Cache
from commandline import UserError


@pytest.fixture(scope="module")
def tiny():
    return pipeline.load_pipeline(pipeline.TINY)


def test_guidance_that_a_model_carries_is_taken_as_it_is_zero_too(tiny, monkeypatch):
    for stored, expected in (("0.0", 0), ("3.5", 3.5), (None, 7)):
        monkeypatch.setattr(tiny.mmdit, "metadata", {} if stored is None else {"guidance": stored})
        assert tiny.guidance() == expected
    monkeypatch.setattr(tiny.mmdit, "metadata", {"sigmas": "[1.0, 0.75"})
    with pytest.raises(UserError, match="cannot be read as JSON"):
        tiny.sigmas()
    for wrong in ("1", "{}", "[]", "[0]", "[1, NaN, 0]", "[1.5, 0]", "[1, 0.5]", "[0.5, 0.7, 0]", '["1", 0]', "[null]"):
        monkeypatch.setattr(tiny.mmdit, "metadata", {"sigmas": wrong, "guidance": "[1]"})
        with pytest.raises(UserError, match="do not fall"):
            tiny.sigmas()
    with pytest.raises(UserError, match="guidance, .* is no number"):
        tiny.guidance()


def test_images_and_latents_are_the_same_with_gradient_and_without(tiny):
    latents = flow.initial_noise(tiny.latent_shape(), [0, 1])
    with_gradient = tiny.vae.decode(latents), tiny.vae.encode(tiny.vae.decode(latents))
    with torch.no_grad():
        without = tiny.vae.decode(latents), tiny.vae.encode(tiny.vae.decode(latents))
    for one, other in zip(with_gradient, without, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_attention_written_out_for_its_gradient_gives_what_pytorchs_gives():
    inputs = torch.randn(3, 2, 4, 17, 8, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    theirs = torch.nn.functional.scaled_dot_product_attention(*inputs).transpose(1, 2).flatten(2)
    mine = mmdit.attention(*inputs)
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(out.sin().sum(), inputs)[0] for out in (mine, theirs)))


def test_models_can_be_named_with_how_they_are_sampled():
    assert pipeline.split_model("a/b@steps=4,guidance=2.5,cache=1-2") == (
        "a/b", {"steps": 4, "guidance": 2.5, "cache": (1, 2)})
    assert pipeline.split_model("runs/x@home") == ("runs/x@home", {})
    sampler = pipeline.open_sampler(f"{pipeline.TINY}@steps=2,cache=3-4")
    assert sampler.options == {"steps": 2} and sampler.pipeline.cache.blocks == (3, 4)
    for wrong in ("m@steps=0", "m@stepps=2", "m@guidance=nan", "m@cache=4"):
        with pytest.raises(UserError, match="after the @ comes"):
            pipeline.split_model(wrong)


def test_each_distinct_prompt_of_a_batch_is_encoded_once_and_every_image_is_that_of_its_own_prompt(tiny, monkeypatch):
    encoded, forward = [], type(tiny.text).forward
    monkeypatch.setattr(pipeline, "LATENTS_AT_ONCE", 2 * 256)  # two images a batch
    prompts = ["a circle", "a circle", "a circle", "a cross", "a circle"]
    separate = [pipeline.generate(tiny, [prompt], [seed], steps=2) for seed, prompt in enumerate(prompts)]
    monkeypatch.setattr(type(tiny.text), "forward", lambda self, words: encoded.extend(words) or forward(self, words))
    together = pipeline.generate(tiny, prompts, range(5), steps=2)
    assert torch.allclose(together, torch.cat(separate), atol=1e-4)
    assert encoded == ["", "a circle", "a circle", "a cross", "a circle"]  # the first: for the guidance


@pytest.mark.parametrize("tensor, scale, what", [
    ("vae.decoder.conv_in.weight", 1e4, "images"), ("vae.decoder.conv_out.weight", 1e6, "images"),
    ("mmdit.joint_blocks.3.x_block.mlp.fc1.weight", 1e5, "latents")])
def test_what_overflows_in_fp16_is_an_error_and_an_image_in_bf16(tensor, scale, what):
    part, name = tensor.split(".", 1)
    for dtype in (torch.bfloat16, torch.float16):
        sampler = pipeline.open_sampler(f"{pipeline.TINY}@steps=1,guidance=1", dtype=dtype)
        getattr(sampler.pipeline, part).state_dict()[name].mul_(scale)
        if dtype == torch.bfloat16:
            assert sampler.images(["a circle"], [0]).isfinite().all()
        else:
            with pytest.raises(UserError, match=f"the {what} are not finite: in fp16, take bf16 or fp32"):
                sampler.images(["a circle"], [0])


def test_a_guidance_that_overflows_writes_no_black_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sample.py", "--prompt", "x", "--steps", "2", "--guidance", "1e30", "--out",
                                      str(tmp_path / "out")])
    with pytest.raises(UserError, match="the latents are not finite.*at a large guidance, a lower one"):
        sample.main()
    assert not list((tmp_path / "out").iterdir())


def test_a_plain_image_is_no_error_and_a_negative_prompt_that_nothing_reads_is_one(tiny, monkeypatch):
    monkeypatch.setattr(tiny.vae, "decode", lambda latents: torch.full((1, 3, 64, 64), -2.0))
    assert pipeline.decode(tiny, torch.zeros(1, *tiny.latent_shape())).unique().tolist() == [-1]
    monkeypatch.setattr(tiny.mmdit, "metadata", {"sigmas": "[1.0, 0.75, 0.0]", "guidance": "1.0"})
    with pytest.raises(UserError, match="does nothing at a guidance of 1"):
        pipeline.generate(tiny, ["a circle"], [0], negative="a cross")
    plain, away = (pipeline.generate(tiny, ["a circle"], [0], negative=words, guidance=2) for words in ("", "a cross"))
    assert not torch.allclose(plain, away, atol=0.1)


def test_true_scenes_are_autoencoded_in_the_dtype_of_the_model(tiny):
    halves = pipeline.load_vae(pipeline.TINY, dtype=torch.bfloat16)
    fine, coarse = (report.Reconstruction(vae).images(["a circle"], [0]) for vae in (tiny.vae, halves))
    assert coarse.dtype == torch.float32 and (fine - coarse).abs().mean() < 0.02


def test_a_transformer_that_reads_other_text_than_its_encoders_give_is_refused(tiny, make_pair, tmp_path):
    shutil.copytree(make_pair("SD3-Medium", "folder").path, tmp_path / "model")
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        shutil.rmtree(tmp_path / "model" / name)
        shutil.copytree(pipeline.TINY / name, tmp_path / "model" / name)
    with pytest.raises(UserError, match="text encoders give 128 and 128 features, its transformer reads 224 and 160"):
        pipeline.load_pipeline(tmp_path / "model")


def test_what_the_teacher_scores_ships_with_it_and_is_measured_anew_only_if_it_changed(tiny, tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(shapes, "measure", lambda *inputs, **more: measured.append(inputs) or "anew")
    nodes = flow.student_sigmas(2, tiny.shift)
    copied = tmp_path / "model"
    shutil.copytree(pipeline.TINY, copied)
    cached = replace(tiny, cache=Cache((2, 5)))

    def samplers(folder):
        return {"28 steps": pipeline.Sampler(tiny, {"steps": 28, "guidance": 7.0}, folder),
                "as it says itself": pipeline.Sampler(tiny, {}, folder),
                "2 steps": pipeline.Sampler(tiny, {"sigmas": nodes, "guidance": 7.0}, folder),
                "3 steps": pipeline.Sampler(tiny, {"steps": 3, "guidance": 7.0}, folder),
                "cached": pipeline.Sampler(cached, {"sigmas": nodes, "guidance": 7.0}, folder),
                "in training": pipeline.Sampler(tiny, {"steps": 28, "guidance": 7.0})}

    found = report.measure(samplers(copied), pipeline.TINY, None, quiet=True)
    assert [name for name, measures in found.items() if measures == "anew"] == ["3 steps", "cached", "in training"]
    shipped = json.loads((copied / "measures.json").read_text())
    assert found["2 steps"] in shipped["measures"].values() and found["2 steps"] != found["28 steps"]
    weights.write_json(copied / "transformer" / "config.json", {"num_attention_heads": 2, "changed": True})
    assert set(report.measure(samplers(copied), copied, None, quiet=True).values()) == {"anew"}
