"""Stage 0: the tiny SD3 is made from nothing, and the one that ships is what the other stages need."""

import math
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import flow
import report
import shapes
import tiny
import train
from commandline import UserError
from networks import Arithmetic
from pipeline import TINY, Sampler, decode, generate, load_pipeline

FP32 = Arithmetic(torch.device("cpu"), torch.float32)


def loop(name, networks, optimizer, iterate, iterations):
    """What train.py passes in, without logs and states."""
    for step in range(iterations):
        values = iterate(step)
        assert set(values) == {"loss", "norm"} and all(math.isfinite(value) for value in values.values())


# ---------------------------------------------------------------------------------------------------------- making one

@pytest.mark.parametrize("name, build, loss", [
    ("text", tiny.TinyText, partial(tiny.text_loss, batch=32)),
    ("recogniser", shapes.Recogniser, partial(tiny.recogniser_loss, batch=32)),
    ("backbone", tiny.TinyBackbone, partial(tiny.backbone_loss, batch=16)),
    ("vae", tiny.new_vae, partial(tiny.vae_loss, batch=2)),
    ("decoder", lambda: tiny.decoder_of(tiny.new_vae()), partial(tiny.vae_loss, batch=2)),
    ("teacher", tiny.new_mmdit, None)])
def test_every_loss_of_stage_0_falls(name, build, loss):
    """A few steps on the same draws: the loss has a gradient that helps."""
    torch.manual_seed(0)
    network = build()
    if name == "teacher":
        latents, labels = tiny.encode_pool(tiny.new_vae(), 16, seed=0)
        loss = partial(tiny.teacher_loss, tiny.new_text_encoders(), latents, labels, batch=8)
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=1e-3)
    values = []
    for _ in range(6):
        value = loss(network, torch.Generator().manual_seed(0))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(value.item())
    assert values[-1] < values[0]


@torch.no_grad()
def test_whitening_turns_the_latents_white_and_decodes_them_as_before():
    torch.manual_seed(0)
    vae = tiny.new_vae()
    images = shapes.render(*shapes.draw_scenes(64, torch.Generator().manual_seed(0)))
    latents = vae.encode(images)
    inside = vae.decoder.conv_in(latents)[..., 1:-1, 1:-1]  # at the rim, padding means something else afterwards
    tiny.whiten(vae, latents)
    white = vae.encode(images)
    cells = white.movedim(1, -1).flatten(0, 2)
    assert torch.allclose(torch.cov(cells.T), torch.eye(len(cells.T)), atol=0.01) and cells.mean(0).abs().max() < 1e-3
    assert torch.allclose(vae.decoder.conv_in(white)[..., 1:-1, 1:-1], inside, atol=1e-3 * inside.abs().max())
    assert vae.moments(images)[1].unique().item() == pytest.approx(2 * math.log(tiny.LATENT_NOISE))


@torch.no_grad()
def test_amplified_maps_are_so_many_times_as_large_and_the_embedding_stays():
    torch.manual_seed(0)
    backbone = tiny.TinyBackbone().backbone
    images = shapes.render(*shapes.draw_scenes(4, torch.Generator().manual_seed(0)))
    maps, embedding = backbone(images)
    louder, same = tiny.amplify(backbone, 5)(images)
    assert all(torch.allclose(5 * m, loud, atol=1e-3 * loud.abs().max()) for m, loud in zip(maps, louder, strict=True))
    assert torch.allclose(embedding, same, atol=1e-4 * same.abs().max())


@torch.no_grad()
def test_the_backbones_stem_sees_every_wave_of_renders_at_the_same_scale():
    stem = tiny.TinyBackbone().backbone.trunk["stem"][0]
    renders = shapes.render(*shapes.draw_scenes(256, torch.Generator().manual_seed(1)))
    seen = stem(tiny.normalise(renders))
    assert ((seen.std(dim=(0, 2, 3)) - 1).abs() < 0.2).all() and not stem.weight.requires_grad
    assert torch.linalg.matrix_rank(stem.weight.flatten(1)) == 48


@torch.no_grad()
def test_damage_is_seen_where_it_is_and_in_its_band():
    images = torch.zeros(1, 3, 64, 64)
    fine, coarse = images.clone(), images.clone()
    fine[..., :16, :16] = torch.tensor([0.3, -0.3]).repeat(8)  # stripes of one pixel, in one corner
    coarse[..., :16, :16] = 0.3
    for error, band in ((fine, 0), (coarse, 2)):
        power = tiny.local_power(error, 4)[0]                                           # (3, 4, 4)
        assert power[:, 0, 0].argmax() == band and power[band, 0, 0] > -2
        assert power[:, 2:, 2:].max() == pytest.approx(-4)
    renders = shapes.render(*shapes.draw_scenes(32, torch.Generator().manual_seed(1)))
    harm = (tiny.damage(renders, torch.Generator().manual_seed(0)) - renders).square().mean(dim=(1, 2, 3)).sqrt()
    assert harm.min() < 0.03 and harm.max() > 0.1


def make_part(folder, loss, iterations, monkeypatch, train_part=loop):
    monkeypatch.setitem(tiny.ITERATIONS, "part", iterations)
    return tiny.make_part(folder, FP32, train_part, "part", lambda: torch.nn.Linear(2, 1), loss, rate=0.1, seed=0)


def test_a_part_is_trained_with_a_warm_up_and_a_cosine_and_averaged(tmp_path, monkeypatch):
    rates, networks = [], {}

    def watched_loop(name, both, optimizers, iterate, iterations):
        networks.update(both)
        for step in range(iterations):
            iterate(step)
            rates.append(optimizers["adamw"].param_groups[0]["lr"])

    def loss(network, generator):
        return network(torch.randn(4, 2, generator=generator)).square().mean()

    part = make_part(tmp_path, loss, 200, monkeypatch, watched_loop)
    assert rates[:3] == pytest.approx([0.001, 0.002, 0.003])
    assert rates[199] == pytest.approx(0.1 * (1 + math.cos(math.pi * 199 / 200)) / 2)
    assert part is networks["averaged"] and not part.weight.requires_grad
    assert 0 < (part.weight - networks["network"].weight).abs().max() < 0.5


class OneBlock(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.joint_blocks, self.out = torch.nn.ModuleList([torch.nn.Linear(4, 4)]), torch.nn.Linear(4, 1)

    def forward(self, x):
        return self.out(self.joint_blocks[0](x).tanh())


def test_a_part_that_muon_trains_goes_on_with_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setitem(tiny.ITERATIONS, "part", 8)

    def make(folder, stop=False):
        folder.mkdir(exist_ok=True)

        def train_part(name, networks, optimizers, iterate, iterations):
            run = train.Run(args, name, networks, optimizers)
            if stop:
                for run.step in range(3):
                    iterate(run.step)
                run.step = 3
                run.save()
                raise KeyboardInterrupt
            train.fit(args, run, iterate, iterations)

        def loss(network, generator):
            return network(torch.randn(4, 4, generator=generator)).square().mean()

        args = SimpleNamespace(stage=0, seed=0, dtype="fp32", out=folder, device=FP32.device)
        return tiny.make_part(folder, FP32, train_part, "part", OneBlock, loss, rate=0.01, seed=0,
                              muon=0.01).state_dict()

    whole = make(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "parts", stop=True)
    parts = make(tmp_path / "parts")
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


def test_a_finished_part_is_not_made_again(tmp_path, monkeypatch):
    first = make_part(tmp_path, lambda network, generator: network(torch.ones(2)).sum(), 2, monkeypatch)
    again = make_part(tmp_path, lambda *_: pytest.fail("it was trained again"), 2, monkeypatch)
    assert torch.equal(first.weight, again.weight)


def test_stage_0_leaves_a_pipeline_that_carries_its_best_guidance_and_its_measures(tmp_path, monkeypatch, capsys):
    distance = iter([0.0, 0.8, 0.1, 0.0, 0.0, 0.0])  # the autoencoder; w = 1, 3; w = 7: 28 steps and students' 1, 2

    def measure(draw, recogniser, teacher):
        brightness = draw(["a red circle"], [0]).mean().item()
        return {"fidelity": {"mean": (next(distance), 0)}, "coverage": {"mean": (brightness, 0)}, "distribution": {}}

    monkeypatch.setattr(shapes, "measure", measure)
    monkeypatch.setattr(report, "look_at_teacher", partial(report.look_at_teacher, captions=4))
    for name, value in {"ITERATIONS": dict.fromkeys(tiny.ITERATIONS, 1), "POOL": 64, "DEPTH": 1, "GUIDANCES": (1, 3),
                        "STUDENT_STEPS": (1, 2)}.items():
        monkeypatch.setattr(tiny, name, value)
    monkeypatch.setattr(sys, "argv", f"train.py --stage 0 --dtype fp32 --out {tmp_path} --resume".split())
    train.main()
    made, known = load_pipeline(tmp_path), report.known_measures(tmp_path, tmp_path)
    assert made.guidance() == 3 and "best guidance w = 3" in capsys.readouterr().out
    assert made.latent_shape() == (tiny.LATENT_CHANNELS, 16, 16) and made.shift == tiny.SHIFT
    assert len(known) == 6 and report.known_teacher(tmp_path)[1].shape == (128, 128)
    one_step = Sampler(made, {"sigmas": torch.tensor([1.0, 0.0]), "guidance": 7.0})  # the files hold what was measured
    brightness, _ = known[one_step.key()]["coverage"]["mean"]
    assert one_step.images(["a red circle"], [0]).mean().item() == pytest.approx(brightness, abs=1e-6)
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        assert all((tmp_path / name / file.name).read_bytes() == file.read_bytes() for file in (TINY / name).iterdir())
    with pytest.raises(UserError, match="holds a finished tiny SD3"):
        train.main()


# ------------------------------------------------------------------------------------------------------ the shipped one

def test_each_word_of_the_tiny_world_is_one_token_and_the_longest_caption_fits():
    words = {word for values in shapes.ATTRIBUTES.values() for word in values}
    words |= {"a", "shape", "on", "in", "the", "of", "background"}
    longest = "a large striped red circle on the bottom of a gray background"
    for tokenizer, ends in zip(tiny.new_text_encoders().tokenizers, (2, 2, 1), strict=True):
        assert len(tokenizer(longest).input_ids) == len(longest.split()) + ends == tokenizer.model_max_length
        assert all(len(tokenizer(word).input_ids) == 1 + ends for word in words)
        assert tokenizer.unk_token_id not in tokenizer("Any other word, too!").input_ids[1:-1]


def test_the_shipped_measures_are_of_the_shipped_model_and_of_what_training_compares_with():
    known = report.known_measures(TINY, TINY)
    assert known, "tiny-sd3/measures.json is of other files"
    teacher = load_pipeline(TINY)
    keys = {name: sampler.key() for name, sampler in tiny.teacher_samplers(teacher).items()}
    assert {*keys.values(), report.Reconstruction(None).key()} == set(known)
    best = min(tiny.GUIDANCES, key=lambda w: known[keys[f"teacher, 28 steps, w = {w}"]]["fidelity"]["mean"][0])
    assert teacher.guidance() == best


@torch.no_grad()
def test_the_shipped_teacher_follows_prompts():
    teacher = load_pipeline(TINY)
    prompts, labels, named = shapes.draw_captions(24, torch.Generator().manual_seed(77))
    images = decode(teacher, generate(teacher, prompts, range(24), steps=8))
    seen = shapes.look(shapes.load_recogniser(TINY), images)[1]
    assert shapes.adherence(seen, labels, named).mean() > 0.9


def test_the_shipped_teacher_alone_needs_many_steps():
    teacher = load_pipeline(TINY)
    prompts, seeds = ["a red circle"] * 4, range(4)
    fine = generate(teacher, prompts, seeds, sigmas=flow.sd3_sigmas(14, 3.0))
    coarse = generate(teacher, prompts, seeds, sigmas=flow.student_sigmas(2, 3.0))
    assert (fine - coarse).abs().mean() > 0.2
