"""The tiny world, its measures, its true score and Stage 0, each against what is counted or computed in another way."""

import itertools
import json
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import run_command
from safetensors.torch import load_file

import flow
from metrics import frechet_distance, gaussian
from pipeline import TINY, load_pipeline
from tinyworld import make, measures, scenes
from tinyworld.truth import posterior_mean, true_velocity


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_picture_has_the_colours_place_size_and_texture_of_its_caption():
    red, white = (torch.tensor(colour) / 127.5 - 1 for colour in ([220., 30, 40], [245., 245, 245]))
    places = {"on the left": (21, 32), "on the right": (43, 32), "on the top": (32, 21), "in the center": (32, 32)}
    for (place, (x, y)), (size, radius) in itertools.product(places.items(), {"small": 11, "large": 17}.items()):
        words = f"a {size} solid red circle {place} of a white background"
        image, = scenes.render(scenes.true_labels([words], [0]))
        assert torch.allclose(image[:, y, x], red) and torch.allclose(image[:, 0, 0], white)
        inside = ((image - white[:, None, None]) / (red - white)[:, None, None])[1]     # share of each pixel
        assert inside.sum() == pytest.approx(math.pi * radius**2, rel=0.005)
        assert (inside.sum(0) @ (torch.arange(64) + 0.5) / inside.sum()).item() == pytest.approx(x, abs=0.01)
        assert (inside.sum(1) @ (torch.arange(64) + 0.5) / inside.sum()).item() == pytest.approx(y, abs=0.01)
    image, = scenes.render(scenes.true_labels(["a large striped red square in the center of a white background"], [0]))
    stripes = image[:, 20:44, 20:44]
    assert torch.equal(stripes, stripes[:, :, :1].expand_as(stripes))
    assert torch.allclose(stripes.amin((1, 2)), 0.4 * (red + 1) - 1, atol=1e-6)


def test_a_caption_says_what_is_named_and_nothing_else():
    assert scenes.caption_of() == "a shape" and scenes.caption_of(position="center") == "a shape in the center"
    assert scenes.caption_of(colour="red", background="gray") == "a red shape on a gray background"
    everything = dict(zip(scenes.NAMES, "large striped red circle left gray".split()))
    assert scenes.caption_of(**everything) == "a large striped red circle on the left of a gray background"
    for text, row, told in zip(*scenes.draw_captions(200, seeded())):
        for i, values in enumerate(scenes.ATTRIBUTES.values()):
            assert [value for value in values if value in text.split()] == ([values[row[i]]] if told[i] else [])


def test_true_scenes_are_what_the_captions_say_and_uniform_in_the_rest():
    prompts, labels, named = scenes.draw_captions(1000, seeded(5))
    found = scenes.true_labels(prompts, range(1000))
    assert torch.equal(found[named], labels[named])
    for i, k in enumerate(scenes.CHOICES):
        assert measures.entropy(found[~named[:, i], i], k) > 0.98


def test_a_caption_allows_just_the_scenes_that_have_what_it_names():
    _, labels, named = scenes.draw_captions(50, seeded())
    for row, told, allowed in zip(labels, named, scenes.allowed(labels, named)):
        assert allowed.sum() == math.prod(k for k, tell in zip(scenes.CHOICES, told) if not tell)
        assert (scenes.LABELS[allowed][:, told] == row[told]).all()


def test_all_4800_scenes_are_different_pictures_and_read_back_also_under_noise():
    pictures = measures.world().pictures
    assert len({picture.numpy().tobytes() for picture in pictures}) == 4800 and pictures.abs().max() <= 1
    images = scenes.render(scenes.LABELS[::17])
    for noise in (0, 0.1):
        seen, distance = measures.world().nearest(images + noise * torch.randn(images.shape, generator=seeded()))
        assert torch.equal(seen, scenes.LABELS[::17])
        assert torch.allclose(distance, torch.tensor(noise / 2), rtol=0.05)  # of a range of 2


def draw(prompts, seeds, fault=None):
    labels = scenes.true_labels([""] * len(prompts) if fault == "ignores the prompt" else prompts,
                                [0] * len(prompts) if fault == "one picture a prompt" else [2**40 + s for s in seeds])
    images = scenes.render(0 * labels if fault == "one picture" else labels)
    return images + 0.2 * torch.randn(images.shape, generator=seeded()) if fault == "noise" else images


def test_true_scenes_have_the_best_of_every_measure_also_where_images_are_drawn_in_bf16():
    world, other = measures.world(), scenes.render(scenes.draw_labels(256, seeded(1)))
    with torch.autocast("cpu", torch.bfloat16):
        found = measures.measure(draw, reference=other)
    assert found["adherence"] == found["whole prompt"] == 1 and found["coverage"] == pytest.approx(1, abs=0.02)
    assert found["distance"] == found["median"] == found["90 %"] == 0
    own, few = (gaussian(world.components(x)) for x in (draw(*measures.prompts_to_measure(256, 0)[:2]), other))
    assert found["Fréchet"] == pytest.approx(frechet_distance(own, world.gaussian), rel=1e-5)
    assert found["to reference"] == pytest.approx(frechet_distance(own, few), rel=1e-5)
    assert 0.4 < found["Fréchet"] / frechet_distance(few, world.gaussian) < 2.5  # not 0, for so few samples
    assert frechet_distance(world.gaussian, world.gaussian) == pytest.approx(0, abs=1e-4)
    assert world.gaussian[1].trace() > 0.9 * world.pictures.var(0).sum()  # of all variance


@pytest.mark.parametrize("fault, values", [
    ("ignores the prompt", {"adherence": sum(1 / k for k in scenes.CHOICES) / 6, "coverage": 1, "distance": 0}),
    ("one picture a prompt", {"adherence": 1, "coverage": 0}), ("one picture", {"coverage": 0, "distance": 0}),
    ("noise", {"adherence": 1, "distance": 0.1, "median": 0.1, "90 %": 0.1})])
def test_a_measure_finds_the_fault_that_it_is_for(fault, values):
    found = measures.measure(partial(draw, fault=fault), captions=128, samples=32)
    for measure, value in values.items():
        assert found[measure] == pytest.approx(value, abs=0.005 if value == 0.1 else 0.06), measure
    if fault == "one picture":
        assert found["Fréchet"] > 30 * measures.measure(draw, captions=128, samples=1)["Fréchet"]


def test_entropy_is_that_of_what_was_made_and_one_on_average_for_small_fair_samples():
    assert measures.entropy(torch.full((64,), 3), 4) == 0
    assert measures.entropy(torch.arange(600) % 3, 6) == pytest.approx(math.log(3) / math.log(6), abs=0.002)
    small = [measures.entropy(torch.randint(4, (64,), generator=generator), 4) for generator in map(seeded, range(300))]
    assert sum(small) / 300 == pytest.approx(1, abs=0.004)  # uncorrected, 0.983


def test_a_runs_measures_are_written_and_printed_below_those_of_the_model_beside_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measures, "measure", partial(measures.measure, captions=8, samples=2))
    (tmp_path / "measures.json").write_text('{"the teacher": {"adherence": 0.25}}')
    measures.write(tmp_path / "run", {"student": SimpleNamespace(images=draw)}, beside=tmp_path)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == {"student": measures.measure(draw)}
    printed = capsys.readouterr().out.splitlines()
    assert printed[2].startswith("| the teacher | 0.250 |") and printed[3].startswith("| student | 1.000 | 1.000 |")


def test_the_posterior_mean_is_that_of_gaussians_weighted_one_by_one_and_has_its_limits():
    latents, noise = torch.randn(2, 40, 2, 3, 3, generator=seeded(), dtype=torch.float64)
    allowed = torch.eye(40, dtype=torch.bool) | (torch.rand(40, 40, generator=seeded(1)) < 0.3)
    for level in (0.2, 0.6, 0.9):
        sigma, expected = torch.full((40,), level, dtype=torch.float64), torch.zeros_like(latents)
        x = (1 - level) * latents + level * noise
        for row in range(40):
            density = torch.distributions.Normal((1 - level) * latents, level).log_prob(x[row]).sum((1, 2, 3)).exp()
            expected[row] = sum(w * scene for w, scene in zip(density * allowed[row], latents))
            expected[row] /= (density * allowed[row]).sum()
        assert torch.allclose(posterior_mean(x, sigma, latents, allowed), expected, atol=1e-9)
        assert torch.allclose(true_velocity(x, sigma, latents, allowed), (x - expected) / level, atol=1e-9)
    little, means = torch.full((40,), 1e-3).double(), torch.stack([latents[row].mean(0) for row in allowed])
    assert torch.allclose(posterior_mean(0.999 * latents + 1e-3 * noise, little, latents, allowed), latents)
    assert torch.allclose(posterior_mean(noise, torch.ones(40).double(), latents, allowed), means)


def test_the_teacher_learns_the_true_velocity_under_the_caption_that_it_is_given(monkeypatch):
    monkeypatch.setattr(scenes, "CHOICES", (1, 2, 3, 1, 2, 1))  # a smaller world
    monkeypatch.setattr(scenes, "LABELS", torch.cartesian_prod(*map(torch.arange, scenes.CHOICES)))
    tiny, seen = load_pipeline(TINY), []
    latents, *texts = make.encode_world(tiny.text, tiny.vae)
    loss = make.teacher_loss(latents, *texts, lambda *inputs: seen.extend(inputs) or 0 * inputs[0], seeded(), 64, 0.2)
    x, sigma, context, pooled = seen
    told = torch.tensor([*itertools.product(*(range(k + 1) for k in scenes.CHOICES))])
    labels, named = (told - 1).clamp(min=0), told > 0
    with torch.no_grad():
        contexts, pooleds = tiny.text(["", *map(scenes.caption, labels, named)])
    given = torch.cdist(pooled, pooleds).argmin(1)
    assert torch.allclose(context, contexts[given], atol=0.01) and torch.allclose(pooled, pooleds[given], atol=0.01)
    allowed = torch.cat([torch.ones(1, 12, dtype=torch.bool), scenes.allowed(labels, named)])[given]
    assert loss.item() == pytest.approx(true_velocity(x, sigma, latents, allowed).square().mean().item(), rel=1e-4)
    nearest = torch.cdist((x / (1 - sigma.view(-1, 1, 1, 1))).flatten(1), latents.flatten(1)).argmin(1)
    assert allowed[torch.arange(64), nearest][sigma < 0.5].all() and (sigma < 0.5).sum() > 10
    assert 4 < (given == 0).sum() < 25 and given.unique().numel() > 20  # some prompts are dropped


@torch.no_grad()
def test_whitening_turns_the_latents_white_and_decodes_them_as_before():
    torch.manual_seed(0)
    vae, images = make.new_vae(), scenes.render(scenes.draw_labels(32, seeded()))
    latents = vae.encode(images)
    inside = vae.decoder.conv_in(latents)[..., 1:-1, 1:-1]  # at the rim, padding means something else afterwards
    make.whiten(vae, latents)
    cells = vae.encode(images).movedim(1, -1).flatten(0, 2)
    assert torch.allclose(torch.cov(cells.T), torch.eye(4), atol=0.01) and cells.mean(0).abs().max() < 1e-3
    again = vae.decoder.conv_in(vae.encode(images))[..., 1:-1, 1:-1]
    assert torch.allclose(again, inside, atol=1e-3 * inside.abs().max())


@pytest.mark.parametrize("start", [("--start", TINY), ()], ids=["from the shipped one", "from nothing"])
def test_stage_0_leaves_a_tiny_sd3_of_its_best_guidance_and_trains_nothing_twice(start, tmp_path, monkeypatch, capsys):
    sizes = (4800, 4, 16, 16), (18900, 27, 128), (18900, 128)  # to encode the world takes long
    for owner, name, value in (
            (make, "encode_world", lambda text, vae: (*map(torch.ones, sizes), text([""]))),
            (make, "GUIDANCES", (1, 7)), (make, "UPDATES", dict.fromkeys(make.UPDATES, 1)),
            (flow, "sd3_sigmas", lambda n, shift, honest=flow.sd3_sigmas: honest(min(n, 2), shift)),
            (scenes, "encode", lambda vae, labels, honest=scenes.encode: honest(vae, labels[:32])),
            (measures, "measure", partial(measures.measure, samples=1))):
        monkeypatch.setattr(owner, name, value)
    words = *start, *f"--updates 2 --fall 1 --batch 8 --captions 8 --dtype fp32 --out {tmp_path}".split()
    status, out, _ = run_command(make.main, *words, capsys=capsys)
    made, found = load_pipeline(tmp_path), json.loads((tmp_path / "measures.json").read_text())
    assert status == 0 and measures.is_tiny_world(tmp_path) and made.latent_shape() == (4, 16, 16)
    assert list(found) == ["true scenes, autoencoded", "teacher, 28 steps, w = 1", "teacher, 28 steps, w = 7"]
    best = min((1, 7), key=lambda w: found[f"teacher, 28 steps, w = {w}"]["distance"])
    assert made.guidance == best and f"guidance w = {best} is nearest" in out and measures.table(found) in out
    teacher = load_file(tmp_path / "parts" / "teacher.safetensors")
    assert all(torch.equal(tensor.half(), teacher[name].half()) for name, tensor in made.mmdit.state_dict().items())
    for name, tensor in load_pipeline(TINY).mmdit.state_dict().items():
        assert name == "pos_embed" or not torch.equal(tensor, teacher[name]), f"{name} was not trained"
    assert "is not empty" in run_command(make.main, *words, capsys=capsys)[2]
    monkeypatch.setattr(make, "optimizer_step", lambda *_, **__: pytest.fail("it was trained again"))
    monkeypatch.setattr(measures, "measure", lambda *_: {"distance": 0.0})
    assert run_command(make.main, *words, "--resume", capsys=capsys)[0] == 0
