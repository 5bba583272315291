"""evaluate.py: the models' images and costs, side by side; judges of official images; time."""

import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import (AutoTokenizer, BitImageProcessor, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor,
                          Dinov2Config, Dinov2Model)

import costs
import evaluate
import sample
import scores
import shapes
import weights


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(*words) -> what evaluate.py wrote, {file name: text}."""
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words), "--out", str(tmp_path / "out")])
        evaluate.main()
        return {file.name: file.read_text() for file in (tmp_path / "out").glob("*.*")}

    monkeypatch.setattr(shapes, "measure", partial(shapes.measure, renders=64, draws=2))
    monkeypatch.setattr(costs, "clock", partial(costs.clock, rounds=2))
    return call


# -------------------------------------------------------------------------------------------------------- quality

def test_models_are_measured_side_by_side_and_nothing_is_drawn_twice(run, monkeypatch):
    words = ["quality", "--model", f"{sample.TINY}@steps=3", "--against", f"{sample.TINY}@steps=2,guidance=1,cache=2-5",
             "--count", 6, "--samples", 2]
    found = json.loads(run(*words)["quality.json"])["models"]
    teacher, cached = found["tiny-sd3@steps=3"], found["tiny-sd3@steps=2,guidance=1,cache=2-5"]
    assert teacher["cost"]["effective evaluations"][0] == 6
    assert cached["cost"]["effective evaluations"][0] == pytest.approx(2 - 1 / 3)
    assert 3.5 < teacher["cost"]["GFLOP an image"][0] / cached["cost"]["GFLOP an image"][0] < 3.7
    assert cached["cost"]["seconds an image"][0] > 0 and 0.1 < cached["cost"]["peak memory, GB"][0] < 5
    assert set(teacher) == {"cost", "adherence", "coverage", "total variation", "placement", "distribution"}

    monkeypatch.setattr(evaluate, "generate", None)
    monkeypatch.setattr(costs, "measure_cost", None)
    again = run(*words)
    assert json.loads(again["quality.json"])["models"] == found and "| adherence | mean |" in again["quality.md"]


def test_a_model_that_was_trained_further_is_drawn_anew(tmp_path):
    weights.write_safetensors(tmp_path / "m" / "a.safetensors", {"x": torch.zeros(1)})
    before = evaluate.fingerprint(str(tmp_path / "m"), "fp32")
    assert before == evaluate.fingerprint(str(tmp_path / "m"), "fp32")
    weights.write_safetensors(tmp_path / "m" / "a.safetensors", {"x": torch.zeros(2)})
    names = {before, evaluate.fingerprint(str(tmp_path / "m"), "fp32"), evaluate.fingerprint(str(tmp_path / "m"), "bf16"),
             evaluate.fingerprint(f"{tmp_path / 'm'}@steps=2", "fp32")}
    assert len(names) == 4


def test_numbers_are_shown_to_the_digits_that_their_errors_leave():
    assert evaluate.number(0.98765, 0.0123) == "0.988 ± 0.012"
    assert evaluate.number(217.62, 31.4) == "218 ± 31"
    assert evaluate.number(56, 0) == "56" and evaluate.number(0.5, float("nan")) == "0.5 ± nan"


def test_a_model_of_other_pictures_is_not_measured_as_the_tiny_world(run, monkeypatch):
    monkeypatch.setattr(evaluate, "generate", None)  # found out before anything is drawn
    monkeypatch.setattr(sample.Pipeline, "latent_shape", lambda pipeline, size=None: (16, 128, 128))
    with pytest.raises(weights.UserError, match="give --prompts"):
        run("quality")


# ------------------------------------------------------------------------------------- quality of official models

COLOURS = {"red": (250, 10, 10), "green": (10, 250, 10), "blue": (10, 10, 250)}


def mean_colour(pictures):
    return torch.stack([sample.picture_bytes(picture).float().mean((1, 2)) for picture in pictures])


SEES_COLOURS = scores.Clip(lambda pictures: F.normalize(mean_colour(pictures), dim=1),
                           lambda prompts: F.normalize(torch.tensor([COLOURS[p] for p in prompts]).float(), dim=1), 20.0)


@pytest.mark.parametrize("kind", ["perfect", "ignores the prompt", "always the same picture", "other colours"])
def test_each_measure_of_pictures_finds_the_fault_that_it_is_for(kind, monkeypatch, tmp_path):
    random, prompts = np.random.default_rng(0), list(COLOURS) * 4

    def picture(colour):
        shade = 0.5 + 0.5 * random.random() if kind != "always the same picture" else 1
        return np.broadcast_to((np.array(colour) * shade).astype(np.uint8), (8, 8, 3))

    def draw_files(args, model, folder, jobs, seeds):
        for i, prompt in enumerate(jobs):
            prompt = {"ignores the prompt": prompts[random.integers(3)], "always the same picture": "red"}.get(kind, prompt)
            colour = (200, 200, 0) if kind == "other colours" else COLOURS[prompt]
            Image.fromarray(picture(colour)).save(tmp_path / f"{i}.png")
        return [tmp_path / f"{i}.png" for i in range(len(jobs))]

    monkeypatch.setattr(evaluate, "draw_files", draw_files)
    real = torch.stack([torch.tensor(COLOURS[prompt]) * (0.5 + 0.5 * random.random()) for prompt in prompts * 4]).float()
    judges = evaluate.Judges(SEES_COLOURS, SEES_COLOURS, {"colours": (mean_colour, real)}, None,
                             {"liking": lambda prompt, pictures: [7.0] * len(pictures)})
    found = evaluate.measure_pictures(SimpleNamespace(samples=4), prompts, judges, "", tmp_path)
    value = {name: number for group in found.values() for name, (number, error) in group.items()}
    assert value["PickScore"] == pytest.approx(value["CLIP score"] / 5, rel=1e-5) and value["liking"] == 7
    follows, spread, near = value["CLIP score"], value["CLIP distance"], value["Fréchet distance"]
    if kind == "perfect":
        assert follows > 99 and value["precision"] > 0.9 and value["recall"] > 0.9 and near < 3000
    if kind == "ignores the prompt":
        assert 20 < follows < 60 and spread > 0.3 and value["recall"] > 0.9
    if kind == "always the same picture":
        assert follows == pytest.approx(100 * (1 + 2 * 0.081) / 3, abs=1.5) and spread == pytest.approx(0, abs=1e-5)
        assert value["recall"] < 0.2 and near > 10_000
    if kind == "other colours":
        assert value["precision"] == 0 and value["recall"] == 0 and near > 10_000


class AverageNetwork(nn.Module):
    """Called as NVIDIA's Inception: bytes in, features out."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, images, return_features: bool = False):
        return self.linear(images.float().mean((2, 3)))


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    """Small judges in the layouts of their makers: a CLIP, a DINOv2, a TorchScript Inception; and twelve photographs."""
    folder = tmp_path_factory.mktemp("judges")
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = AutoTokenizer.from_pretrained(sample.TINY / "tokenizer")
    CLIPModel(CLIPConfig(text_config={**small, "vocab_size": len(tokenizer), "max_position_embeddings": 13,
                                      "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id},
                         vision_config={**small, "image_size": 32, "patch_size": 8},
                         projection_dim=16)).save_pretrained(folder / "clip")
    CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32), tokenizer).save_pretrained(folder / "clip")
    Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14,
                             mlp_ratio=2)).save_pretrained(folder / "dino")
    BitImageProcessor(size={"shortest_edge": 28}, crop_size=28).save_pretrained(folder / "dino")
    torch.jit.script(AverageNetwork()).save(str(folder / "inception.pt"))
    (folder / "photographs").mkdir()
    for i, image in enumerate(shapes.render(*shapes.draw_scenes(12, torch.Generator().manual_seed(0)))):
        sample.to_picture(image).resize((50 + i, 40)).save(folder / "photographs" / f"{i}.jpg")
    (folder / "prompts.txt").write_text("a red circle\na blue square\na cross\n")
    return folder


def test_clip_score_is_that_of_transformers(judges):
    pictures = [Image.open(file) for file in sorted((judges / "photographs").glob("*"))[:3]]
    prompts = ["a red circle", "a large striped blue square on the left of a pink background", "a cross"]
    clip = scores.load_clip(judges / "clip", "cpu")
    model, processor = CLIPModel.from_pretrained(judges / "clip"), CLIPProcessor.from_pretrained(judges / "clip")
    inputs = processor(text=prompts, images=pictures, return_tensors="pt", padding=True, truncation=True, max_length=13)
    expected = model(**inputs).logits_per_image
    assert torch.allclose(clip.scale * clip.pictures(pictures) @ clip.prompts(prompts).T, expected, atol=1e-5)


def test_pictures_are_judged_through_networks_from_files(run, judges, monkeypatch):
    monkeypatch.setattr(evaluate, "cost", lambda *a: {"steps": (2, 0)})
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=lambda **settings: Distance()))
    hpsv2 = SimpleNamespace(score=lambda pictures, prompt, hps_version: [0.25 + 0.01 * len(prompt) for _ in pictures])
    monkeypatch.setitem(sys.modules, "hpsv2", hpsv2)
    files = run("quality", "--model", f"{sample.TINY}@steps=2,guidance=1", "--prompts", judges / "prompts.txt", "--samples", 2,
                "--clip", judges / "clip", "--pickscore", judges / "clip", "--vision-model", judges / "dino", "--inception",
                judges / "inception.pt", "--reference-images", judges / "photographs", "--scores", "hpsv2")
    found, = json.loads(files["quality.json"])["models"].values()
    assert {group: list(values) for group, values in found.items()} == {
        "cost": ["steps"], "text": ["CLIP score", "PickScore", "hpsv2"], "diversity": ["CLIP distance", "LPIPS"],
        "in features of dino": ["Fréchet distance", "precision", "recall"],
        "in features of Inception": ["FID", "precision", "recall"]}
    assert found["text"]["hpsv2"][0] == pytest.approx(25 + (12 + 13 + 7) / 3, abs=0.01)
    assert found["diversity"]["LPIPS"][0] > 0 and "only with one image" in files["quality.md"]


class Distance(nn.Module):
    def forward(self, a, b):
        return (a - b).abs().mean()


# ------------------------------------------------------------------------------------------------- speed, bad input

def test_speed_times_teacher_and_students_in_one_run(run):
    files = run("speed", "--batch", 2)
    rows = [line for line in files["speed.md"].splitlines() if "steps |" in line or "teacher, 28" in line]
    assert [row.split("|")[2].strip() for row in rows] == ["56.00", "4.00", "2.00", "1.67"]
    measured = json.loads(files["speed.json"])
    assert measured["flops"]["teacher, 28 × 2"] == 28 * measured["flops"]["2 steps"]
    assert all(len(times) == 2 and min(times) > 0 for batch in measured["seconds"].values() for times in batch.values())


def test_random_weights_have_the_official_size_but_for_the_depth():
    with torch.device("meta"):
        whole = costs.MMDiT(24, 1536, 24, 4096, 2048, 192)
    sizes = {name.replace("joint_blocks.23.", "joint_blocks.0."): tensor.shape for name, tensor in whole.state_dict().items()
             if ".23." in name or "joint_blocks" not in name}
    pipeline = costs.random_pipeline("sd3-medium", 1, torch.device("cpu"), torch.bfloat16)
    assert {name: tensor.shape for name, tensor in pipeline.mmdit.state_dict().items()} == sizes
    context, pooled = pipeline.text(["a cow"])
    assert context.shape == (1, 333, 4096) and pooled.shape == (1, 2048) and torch.isfinite(context.float()).all()


@pytest.mark.parametrize("preset, blocks, ranges", [
    ("sd3-medium", 24, [(2, 9)]), ("sd3-medium", 6, [(2, 3)]), ("sd3.5-large", 1, [(0, 0)]),
    (None, 12, [(1, 4)]), (None, 24, [(2, 9)]), (None, 38, [(3, 12)]), (None, 3, [(2, 2)])])
def test_the_cached_share_is_the_presets_at_any_depth(preset, blocks, ranges):
    assert costs.cached_share(preset, blocks) == ranges


@pytest.mark.parametrize("words, message", [
    ("", "required: command"),
    ("quality --model nowhere", "nowhere"),
    ("quality --against {tiny}@steps=0", "after the @ comes"),
    ("quality --against {tiny}@stepps=2", "after the @ comes"),
    ("quality --pickscore", "needs --prompts"),
    ("quality --clip {judges}/clip", "needs --prompts"),
    ("quality --count 4", "at least 5"),
    ("quality --samples 1", "at least 2"),
    ("quality --prompts {judges}/prompts.txt --vision-model {judges}/dino", "--reference-images"),
    ("quality --prompts {judges}/prompts.txt --clip {judges}/clip --vision-model {judges}/dino --reference-images "
     "{judges}/photographs --samples 1", "too few"),
    ("quality --prompts nowhere.txt", "cannot be read"),
    ("quality --prompts {judges}/prompts.txt --clip nowhere", "nowhere"),
    ("quality --prompts {judges}/prompts.txt --clip {judges}/dino", "dino"),
    ("quality --prompts {judges}/prompts.txt --clip {judges}/clip --inception {judges}/inception.pt", "--reference-images"),
    ("quality --prompts {judges}/prompts.txt --clip {judges}/clip --reference-images {judges}/clip", "0 images"),
    ("quality --prompts {judges}/prompts.txt --clip {judges}/clip --vision-model {judges}/dino --reference-images "
     "{judges}/photographs --inception {judges}/prompts.txt", "TorchScript"),
    ("quality --prompts {judges}/prompts.txt --clip {judges}/clip --scores hpsv2", "pip install hpsv2"),
    ("speed --depth 2", "--preset"),
    ("speed --preset sd3-medium --depth 25", "has 24 blocks"),
    ("speed --model nowhere", "nowhere"),
    ("speed --size 65", "multiples of 16"),
    ("ablate --only everything", "invalid choice"),
    ("ablate --seeds 0", "not a whole number"),
])
def test_wrong_arguments_end_in_one_line(words, message, judges, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "hpsv2", None)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *words.format(judges=judges, tiny=sample.TINY).split()])
    with pytest.raises(SystemExit) as end:
        weights.run_script(evaluate.main)
    *before, error = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and error.startswith("error:") and message in error, error
    assert not [line for line in before if "error" in line.lower()]
    assert not [file for file in Path(tmp_path).rglob("*.*") if file.is_file()]
