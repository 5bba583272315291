"""evaluate.py: the models' images and costs, side by side; judges of official images; time."""

import json
import sys
import time
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

import commandline
import costs
import evaluate
import pictures
import pipeline
import scores
import shapes
import train
import weights
from pipeline import TINY


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(*words) -> what evaluate.py wrote, {file name: text}."""
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words), "--out", str(tmp_path / "out")])
        evaluate.main()
        return {file.name: file.read_text() for file in (tmp_path / "out").glob("*.*") if file.suffix != ".png"}

    monkeypatch.setattr(shapes, "THOROUGH", {"captions": 6, "samples": 2, "renders": 64, "draws": 2})
    return call


# ------------------------------------------------------------------------------------------------------------ quality

def test_models_are_measured_side_by_side_and_nothing_is_drawn_twice(run, monkeypatch):
    words = ["quality", f"{TINY}@steps=2", f"{TINY}@steps=2,guidance=1,cache=2-5"]
    found = json.loads(run(*words)["quality.json"])["models"]
    teacher, cached = found["tiny-sd3@steps=2"], found["tiny-sd3@steps=2,guidance=1,cache=2-5"]
    assert teacher["cost"]["effective evaluations"][0] == 4
    assert cached["cost"]["effective evaluations"][0] == pytest.approx(2 - 1 / 3)
    assert 2.3 < teacher["cost"]["GFLOP an image"][0] / cached["cost"]["GFLOP an image"][0] < 2.5
    assert set(teacher) == {"cost", "adherence", "coverage", "distribution", "fidelity", "spectrum"}
    floor = found["true scenes, autoencoded"]
    assert "cost" not in floor and floor["fidelity"]["mean"][0] < teacher["fidelity"]["mean"][0]

    monkeypatch.setattr(pipeline, "generate", None)
    again = run(*words)
    assert json.loads(again["quality.json"])["models"] == found and "| adherence | mean |" in again["quality.md"]


def test_a_model_that_was_trained_further_is_drawn_anew(tmp_path):
    weights.write_safetensors(tmp_path / "m" / "a.safetensors", {"x": torch.zeros(1)})
    before = evaluate.folder_name(tmp_path / "m", "fp32")
    assert before == evaluate.folder_name(tmp_path / "m", "fp32")
    weights.write_safetensors(tmp_path / "m" / "a.safetensors", {"x": torch.zeros(2)})
    names = {before, evaluate.folder_name(tmp_path / "m", "fp32"), evaluate.folder_name(tmp_path / "m", "bf16"),
             evaluate.folder_name(f"{tmp_path / 'm'}@steps=2", "fp32")}
    assert len(names) == 4


def test_the_table_shows_errors_but_of_what_is_counted():
    rows = evaluate.table({"m": {"cost": {"steps": (2, 0)}, "a": {"b": (0.98765, 0.0123), "c": (0.5, float("nan"))}}})
    assert rows.splitlines()[2:] == ["| cost | steps | 2 |", "| a | b | 0.9877 ± 0.012 |", "|  | c | 0.5 ± nan |"]


def test_a_model_of_other_pictures_is_not_measured_as_the_tiny_world(run, monkeypatch):
    monkeypatch.setattr(pipeline, "generate", None)  # found out before anything is drawn
    monkeypatch.setattr(pipeline.Pipeline, "latent_shape", lambda pipeline, size=None: (4, 32, 32))
    with pytest.raises(commandline.UserError, match="give --prompts"):
        run("quality")


# ---------------------------------------------------------------------------------------- quality of official models

COLOURS = {"red": (250, 10, 10), "green": (10, 250, 10), "blue": (10, 10, 250)}


def mean_colour(images):
    return torch.stack([pictures.picture_bytes(image).float().mean((1, 2)) for image in images])


SEES_COLOURS = scores.Clip(lambda images: F.normalize(mean_colour(images), dim=1),
                           lambda words: F.normalize(torch.tensor([COLOURS[word] for word in words]).float(), dim=1),
                           20.0)


@pytest.mark.parametrize("kind", ["perfect", "ignores the prompt", "always the same picture", "other colours"])
def test_each_measure_of_pictures_finds_the_fault_that_it_is_for(kind, monkeypatch, tmp_path):
    random, prompts = np.random.default_rng(0), list(COLOURS) * 4

    def picture(colour):
        shade = 0.5 + 0.5 * random.random() if kind != "always the same picture" else 1
        return np.broadcast_to((np.array(colour) * shade).astype(np.uint8), (8, 8, 3))

    def draw_files(sampler, folder, jobs, seeds):
        for i, prompt in enumerate(jobs):
            others = {"ignores the prompt": prompts[random.integers(3)], "always the same picture": "red"}
            colour = (200, 200, 0) if kind == "other colours" else COLOURS[others.get(kind, prompt)]
            Image.fromarray(picture(colour)).save(folder / f"{i}.png")
        return [folder / f"{i}.png" for i in range(len(jobs))]

    monkeypatch.setattr(evaluate, "draw_files", draw_files)
    photographs = [torch.tensor(COLOURS[prompt]) * (0.5 + 0.5 * random.random()) for prompt in prompts * 4]
    seen = {"colours": (mean_colour, torch.stack(photographs).float())}
    judges = evaluate.Judges(prompts, SEES_COLOURS, SEES_COLOURS, seen, None)
    found = evaluate.judge_pictures(SimpleNamespace(samples=4), judges, "a model", None, tmp_path)
    value = {name: number for group in found.values() for name, (number, error) in group.items()}
    assert value["PickScore"] == pytest.approx(value["CLIP score"] / 5, rel=1e-5)
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
    """Small judges in the layouts of their makers: a CLIP, a DINOv2, a TorchScript Inception. Twelve photographs."""
    folder = tmp_path_factory.mktemp("judges")
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = AutoTokenizer.from_pretrained(TINY / "tokenizer")
    CLIPModel(CLIPConfig(text_config={**small, "vocab_size": len(tokenizer), "max_position_embeddings": 13,
                                      "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id},
                         vision_config={**small, "image_size": 32, "patch_size": 8},
                         projection_dim=16)).save_pretrained(folder / "clip")
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    CLIPProcessor(images, tokenizer).save_pretrained(folder / "clip")
    Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14,
                             mlp_ratio=2)).save_pretrained(folder / "dino")
    BitImageProcessor(size={"shortest_edge": 28}, crop_size=28).save_pretrained(folder / "dino")
    torch.jit.script(AverageNetwork()).save(str(folder / "inception.pt"))
    (folder / "photographs").mkdir()
    for i, image in enumerate(shapes.render(*shapes.draw_scenes(12, torch.Generator().manual_seed(0)))):
        pictures.to_picture(image).resize((50 + i, 40)).save(folder / "photographs" / f"{i}.jpg")
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
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=lambda **settings: Distance()))
    files = run("quality", f"{TINY}@steps=1,guidance=1", "--prompts", judges / "prompts.txt", "--samples", 2,
                "--clip", judges / "clip", "--pickscore", judges / "clip", "--vision-model", judges / "dino",
                "--inception", judges / "inception.pt", "--reference", judges / "photographs")
    found, = json.loads(files["quality.json"])["models"].values()
    assert {group: list(values) for group, values in found.items()} == {
        "cost": ["steps", "effective evaluations", "GFLOP an image"],
        "text": ["CLIP score", "PickScore"], "diversity": ["CLIP distance", "LPIPS"],
        "in features of dino": ["Fréchet distance", "precision", "recall"],
        "in features of Inception": ["FID", "precision", "recall"]}
    assert found["diversity"]["LPIPS"][0] > 0 and "as --reference and one image" in files["quality.md"]


def test_a_models_samples_serve_as_reference_and_a_model_is_nearer_itself_than_another(run, judges):
    one, other = f"{TINY}@steps=2,guidance=2", f"{TINY}@steps=1,guidance=1"
    files = run("quality", one, other, "--prompts", judges / "prompts.txt", "--samples", 4, "--clip", judges / "clip",
                "--vision-model", judges / "dino", "--reference", one)
    itself, another = (found["in features of dino"]["Fréchet distance"][0]
                       for found in json.loads(files["quality.json"])["models"].values())
    assert 0 < itself < another  # other seeds, so not the same images


class Distance(nn.Module):
    def forward(self, a, b):
        return (a - b).abs().mean()


def halves(mode, left, right, size=(40, 20)):
    """An image of one colour left and another right."""
    image = Image.new(mode, size, right)
    image.paste(left, (0, 0, size[0] // 2, size[1]))
    return image


def turned(picture, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return picture, {"exif": exif}


PALETTE = halves("P", 1, 0)
PALETTE.putpalette([0, 0, 255, 255, 0, 0])
SIXTEEN_BITS = Image.fromarray(np.uint16([[0x4080] * 20 + [0xC000] * 20] * 20))
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
PHOTOGRAPHS = {  # name: (picture, how it is saved), its top left and bottom right pixel
    "16 bits.png": ((SIXTEEN_BITS, {}), 3 * (64,), 3 * (191,)),
    "8 bits.png": ((halves("L", 64, 191), {}), 3 * (64,), 3 * (191,)),
    "1 bit.png": ((halves("1", 0, 1), {}), 3 * (0,), WHITE),
    "upright.jpg": ((halves("RGB", RED, BLUE), {}), RED, BLUE),
    "upside down.jpg": (turned(halves("RGB", RED, BLUE), 3), BLUE, RED),
    "mirrored.png": (turned(halves("RGB", RED, BLUE), 2), BLUE, RED),
    "on its side.jpg": (turned(halves("RGB", RED, BLUE), 6), RED, BLUE),
    "clear.png": ((halves("RGBA", (255, 0, 0, 255), (0, 0, 0, 0)), {}), RED, WHITE),
    "clear.webp": ((halves("RGBA", (255, 0, 0, 255), (0, 0, 0, 0)), {"lossless": True}), RED, WHITE),
    "half clear.png": ((halves("LA", (0, 255), (0, 128)), {}), 3 * (0,), 3 * (127,)),
    "clear colour.png": ((halves("RGB", RED, BLUE), {"transparency": BLUE}), RED, WHITE),
    "clear in a palette.png": ((PALETTE, {"transparency": 0}), RED, WHITE),
    "for print.jpg": ((halves("CMYK", (0, 255, 255, 0), (255, 255, 0, 0)), {}), RED, BLUE),
    "moves.webp": ((halves("RGB", RED, BLUE), {"save_all": True, "append_images": [Image.new("RGB", (40, 20))],
                                               "lossless": True}), RED, BLUE),
}


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs_are_seen_as_a_viewer_shows_them(tmp_path, name):
    (picture, how), first, last = PHOTOGRAPHS[name]
    picture.save(tmp_path / name, **how)
    seen = evaluate.open_picture(tmp_path / name)
    assert seen.size == ((20, 40) if "its side" in name else (40, 20)) and seen.mode == "RGB"
    corners = seen.getpixel((1, 1)), seen.getpixel((seen.width - 2, seen.height - 2))
    assert np.abs(np.subtract(corners, (first, last))).max() <= (3 if name.endswith("jpg") else 0), corners
    cropped = evaluate.open_picture(tmp_path / name, crop=True)
    assert cropped.size == (512, 512) and np.abs(np.subtract(cropped.getpixel((20, 20)), first)).max() <= 8


def test_what_is_no_photograph_is_named(tmp_path):
    Image.new("RGB", (64, 64), RED).save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    for content in (whole[:len(whole) - 60], b"", b"GIF89a", b"text"):
        (tmp_path / "a.jpg").write_bytes(content)
        with pytest.raises(commandline.UserError, match="a.jpg: cannot be read as PNG, JPEG or WebP"):
            evaluate.open_picture(tmp_path / "a.jpg")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    with pytest.raises(commandline.UserError, match="bomb.png: cannot be read"):
        evaluate.open_picture(tmp_path / "bomb.png")


# -------------------------------------------------------------------------------------------------------------- speed

def test_the_reuse_error_of_every_block_is_written_for_a_teacher_at_a_students_levels(run):
    text = run("reuse", TINY)["reuse.md"]
    assert "from σ = 1 to 0.75" in text and text.count("\n| ") == 13


def test_every_range_of_blocks_is_re_used_once_and_its_cost_compared_with_the_errors(run, monkeypatch, tmp_path):
    (tmp_path / "prompts.txt").write_text("a circle\n")
    words, calls = ["reuse", TINY, "--ranges", "--prompts", tmp_path / "prompts.txt"], []

    def measure(draw, recogniser, **settings):
        calls.append(draw.__self__.pipeline.cache.blocks)
        if len(calls) == 40:
            raise KeyboardInterrupt
        first, last = calls[-1]
        return {"adherence": {"mean": (1, 0)}, "fidelity": {"mean": (abs(first - 3) + 0.1 * last, 0)}}

    monkeypatch.setattr(shapes, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        run(*words)
    text = run(*words)["ranges.md"]
    assert len(calls) == 78 + 1  # what the first call measured is not measured again
    assert text.count("\n| ") == 77 + 2 + 10 and "\n| 4 |" in text and " | 3-6 | " in text


def test_functions_are_timed_in_turn_after_a_round_that_does_not_count():
    calls = []
    seconds = costs.clock({name: partial(calls.append, name) for name in "ab"}, torch.device("cpu"), rounds=2)
    assert calls == ["a", "b"] * 3 and {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}


def test_speed_compares_teacher_and_students(run, monkeypatch):
    monkeypatch.setattr(costs, "clock", lambda tasks, device: {name: [time_once(task)] for name, task in tasks.items()})
    files = run("speed", "--batch", 1)
    rows = [line for line in files["speed.md"].splitlines() if "steps |" in line or "teacher, 28" in line]
    assert [row.split("|")[2].strip() for row in rows] == ["56.00", "4.00", "2.00", "1.67"]
    measured = json.loads(files["speed.json"])
    assert measured["flops"]["teacher, 28 × 2"] == 28 * measured["flops"]["2 steps"]
    assert measured["seconds"]["1"].keys() == {"text", "VAE", *measured["flops"]}


def time_once(task):
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def test_random_weights_have_the_official_size_but_for_the_depth(monkeypatch):
    monkeypatch.setattr(costs, "T5", {**costs.T5, "d_ff": 64, "num_heads": 1})  # of T5 only the width is looked at
    with torch.device("meta"):
        whole = costs.MMDiT(24, 1536, 24, 4096, 2048, 192)
    sizes = {name.replace("joint_blocks.23.", "joint_blocks.0."): tensor.shape
             for name, tensor in whole.state_dict().items() if ".23." in name or "joint_blocks" not in name}
    random = costs.random_pipeline("sd3-medium", 1, torch.device("cpu"), torch.bfloat16)
    assert {name: tensor.shape for name, tensor in random.mmdit.state_dict().items()} == sizes
    context, pooled = random.text(["a cow"])
    assert context.shape == (1, 333, 4096) and pooled.shape == (1, 2048) and torch.isfinite(context.float()).all()


def test_the_cached_blocks_are_the_presets_where_one_is_as_deep_and_lie_inside_at_any_depth():
    depths = {"tiny": 12, **{name: depth for name, (depth, _) in costs.SIZES.items()}}
    for name, depth in depths.items():
        preset = {"cache": train.STAGE2["cache"][0], **train.PRESETS[name].get(2, {})}
        assert costs.cached_blocks(depth) == preset["cache"], name
    for depth in range(1, 50):
        first, last = costs.cached_blocks(depth)
        assert 0 <= first <= last < depth


# ---------------------------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("words, message", [
    ("", "required: command"),
    ("quality nowhere", "nowhere"),
    ("quality {tiny}@steps=0", "after the @ comes"),
    ("quality {tiny}@stepps=2", "after the @ comes"),
    ("quality --pickscore", "needs --prompts"),
    ("quality --samples 1", "at least 2"),
    ("quality --prompts {judges}/prompts.txt --vision-model {judges}/dino", "--reference"),
    ("quality --prompts {judges}/prompts.txt --samples 1 --reference {judges}/photographs", "too few"),
    ("quality --prompts nowhere.txt", "cannot be read"),
    ("quality --prompts {judges}/prompts.txt --clip nowhere", "nowhere"),
    ("quality --prompts {judges}/prompts.txt --clip {judges}/dino", "dino"),
    ("quality --prompts {judges}/prompts.txt --clip {judges}/clip --reference {judges}/clip", "0 images"),
    ("quality --prompts {judges}/prompts.txt --clip {judges}/clip --vision-model {judges}/dino --reference "
     "{judges}/photographs --inception {judges}/prompts.txt", "TorchScript"),
    ("speed --depth 2", "--preset"),
    ("speed --preset sd3-medium --depth 25", "has 24 blocks"),
    ("speed nowhere", "nowhere"),
    ("reuse nowhere", "nowhere"),
    ("swap {tiny}@steps=1", "makes one step"),
    ("reuse --out table.md", "table.md is the name of another file"),
    ("ablate --only everything", "invalid choice"),
])
def test_wrong_arguments_end_in_one_line(words, message, judges, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *words.format(judges=judges, tiny=TINY).split()])
    with pytest.raises(SystemExit) as end:
        commandline.run_script(evaluate.main)
    *before, error = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and error.startswith("error:") and message in error, error
    assert not [line for line in before if "error" in line.lower()]
    assert not [file for file in Path(tmp_path).rglob("*.*") if file.is_file()]
