"""evaluate.py, its judges, the experiments: numbers against closed forms, scipy, transformers or a perfect teacher."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run_command
from PIL import Image
from scipy import linalg, stats
from transformers import (AutoTokenizer, BitImageProcessor, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor,
                          Dinov2Config, Dinov2Model)

import dmd
import evaluate
import flow
import train
from cache import CachedSteps, new_cache
from experiments import ablations, explain, reuse, score, speed
from metrics import frechet_distance, gaussian
from mmdit import load_mmdit
from pictures import to_picture, write_picture
from pipeline import TINY, load_pipeline
from tinyworld import measures, scenes
from tinyworld.truth import true_velocity


def scipys_distance(a, b):
    (mean_a, cov_a), (mean_b, cov_b) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    return np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a + cov_b - 2 * linalg.sqrtm(cov_a @ cov_b).real)


def test_the_frechet_distance_is_that_of_a_closed_form_and_of_scipys_matrix_root():
    zero, one, other = torch.zeros(2).double(), torch.tensor([4., 1]).double(), torch.tensor([9., 16]).double()
    assert frechet_distance((zero, one.diag()), (zero + 2, other.diag())) == pytest.approx(8 + (2 - 3)**2 + (1 - 4)**2)
    random = np.random.default_rng(0)
    a, b = (random.normal(size=(n, 8)) @ random.normal(size=(8, 8)) + n / 200 for n in (300, 200))
    assert frechet_distance(*map(gaussian, map(torch.tensor, (a, b)))) == pytest.approx(scipys_distance(a, b), rel=1e-8)
    few = gaussian(torch.tensor(random.normal(size=(10, 64))))  # than dimensions
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("words, evaluations, how", [
    ("", 2, ()), ("--steps 1 --guidance 3", 2, (1, 3.0)), ("--cache 2-5", 2 - 1 / 3, (None, None, (2, 5)))])
def test_a_model_is_measured_as_the_flags_have_it(words, evaluations, how, two_steps, tmp_path, capsys):
    words = "--captions", 6, "--samples", 1, "--reference", two_steps, "--out", tmp_path, *words.split()
    status, out, _ = run_command(evaluate.main, "quality", two_steps, *words, capsys=capsys)
    found, = json.loads((tmp_path / "quality.json").read_text()).values()
    student, (prompts, seeds, *_) = load_pipeline(two_steps), measures.prompts_to_measure(6, 0)
    reference = student.images(prompts, [evaluate.OTHER_SEEDS + seed for seed in seeds])
    expected = measures.measure(student.sampled_with(*how).images, 6, 1, reference)
    assert status == 0 and found.pop("evaluations") == pytest.approx(evaluations)
    for i, image in enumerate(reference):
        write_picture(to_picture(image), tmp_path / "pictures" / f"{i}.png")
    again = [tmp_path / "pictures" if word == two_steps else word for word in words]  # the same images, from a folder
    assert run_command(evaluate.main, "quality", two_steps, *again, capsys=capsys)[0] == 0
    read, = json.loads((tmp_path / "quality.json").read_text()).values()
    assert read["to reference"] == pytest.approx(found["to reference"], rel=0.02)
    to_picture(reference[0, :, ::2, ::2]).save(tmp_path / "pictures" / "small.png")
    assert "64 pixels a side" in run_command(evaluate.main, "quality", two_steps, *again, capsys=capsys)[2]
    assert found == pytest.approx(expected, rel=1e-3) and f"| {evaluations:.2f} | {found['adherence']:.3f} |" in out


def average(images, return_features: bool = False):
    """Called as NVIDIA's Inception: bytes in, features out."""
    return images.float().mean((2, 3))


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    """Small judges in the layouts of their makers (CLIP, DINOv2, a TorchScript Inception), prompts and pictures."""
    folder = tmp_path_factory.mktemp("judges")
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = AutoTokenizer.from_pretrained(TINY / "tokenizer")
    words = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 14}
    CLIPModel(CLIPConfig(text_config={**small, **words}, vision_config={**small, "image_size": 32, "patch_size": 8},
                         projection_dim=16)).save_pretrained(folder / "clip")
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    CLIPProcessor(images, tokenizer).save_pretrained(folder / "clip")
    Dinov2Model(Dinov2Config(**small, image_size=28, patch_size=14)).save_pretrained(folder / "dino")
    BitImageProcessor(size={"shortest_edge": 28}, crop_size=28).save_pretrained(folder / "dino")
    torch.jit.script(average).save(str(folder / "inception.pt"))
    (folder / "pictures").mkdir()
    for i, image in enumerate(scenes.render(scenes.LABELS[::400])):
        to_picture(image).save(folder / "pictures" / f"{i:02}.png")
    (folder / "prompts.txt").write_text("a red circle\na large striped blue square\na cross\n")
    return folder


def test_scores_of_pictures_are_those_of_transformers_and_scipy(judges, two_steps, tmp_path, capsys):
    words = ("quality", two_steps, "--prompts", judges / "prompts.txt", "--samples", 2, "--clip", judges / "clip",
             "--reference", judges / "pictures", "--inception", judges / "inception.pt", "--out", tmp_path)
    assert run_command(evaluate.main, *words, capsys=capsys)[0] == 0
    found, = json.loads((tmp_path / "quality.json").read_text()).values()
    folders = tmp_path / two_steps.name, judges / "pictures"
    own, real = ([Image.open(file) for file in sorted(folder.iterdir())] for folder in folders)
    model, prompts = CLIPModel.from_pretrained(judges / "clip"), (judges / "prompts.txt").read_text().splitlines()
    processor = CLIPProcessor.from_pretrained(judges / "clip")
    out = model(**processor(text=prompts, images=own, return_tensors="pt", padding=True))
    cosines = out.logits_per_image / model.logit_scale.exp()                            # (6 pictures, 3 prompts)
    right = torch.stack([cosines[i, i // 2] for i in range(6)]).mean().item()
    one, other = out.image_embeds.unflatten(0, (3, 2)).unbind(1)
    means = (np.array([np.array(picture).mean((0, 1)) for picture in pictures]) for pictures in (own, real))
    assert found == pytest.approx({"evaluations": 2, "CLIP score": 100 * right, "FID": scipys_distance(*means),
                                   "CLIP distance": 1 - (one * other).sum(1).mean().item()}, rel=1e-3)
    for flag, wrong, message in (("--clip", "dino", "tensor logit_scale is"), ("--reference", "dino", "0 pictures"),
                                 ("--inception", "prompts.txt", "cannot be read as a TorchScript network")):
        status, _, errors = run_command(evaluate.main, *words, flag, judges / wrong, capsys=capsys)
        assert status == 2 and all(text in errors.splitlines()[-1] for text in (f"{wrong}: ", message))


def test_a_models_samples_are_compared_with_anothers_in_a_vision_models_features(judges, two_steps, tmp_path, capsys):
    words = ("quality", two_steps, "--prompts", judges / "prompts.txt", "--clip", judges / "clip", "--samples", 3,
             "--vision-model", judges / "dino", "--reference", two_steps, "--out", tmp_path, "--steps", 1)
    found = float(run_command(evaluate.main, *words, capsys=capsys)[1].split("Fréchet distance ")[1])
    network, processor = (kind.from_pretrained(judges / "dino") for kind in (Dinov2Model, BitImageProcessor))
    seen = [[Image.open(file) for file in sorted((tmp_path / f"{which}{two_steps.name}").iterdir())]
            for which in ("", "reference-")]
    own, other = (gaussian(network(**processor(some, return_tensors="pt")).pooler_output) for some in seen)
    assert found == pytest.approx(frechet_distance(own, other), rel=1e-3) and found > 0.01


def test_reuse_writes_an_error_for_every_block_and_the_cost_of_every_range(two_steps, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reuse, "draw_prompts", lambda *_, honest=reuse.draw_prompts: honest(*_)[:2])
    monkeypatch.setattr(measures, "measure", lambda draw, **_: {"distance": draw.__self__.cache.blocks[0] / 10})
    assert run_command(reuse.main, two_steps, "--length", 5, "--out", tmp_path, capsys=capsys)[0] == 0
    text = (tmp_path / "reuse.md").read_text()
    assert "from σ = 1 to 0.75" in text and "| blocks 0-4 | 0.0000 |" in text and "| blocks 7-11 | 0.7000 |" in text
    assert sum(line.count("|") == 4 for line in text.splitlines()) == 2 + 12


def test_score_finds_no_error_in_a_teacher_that_knows_the_truth(two_steps, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scenes, "CHOICES", (1, 2, 3, 1, 2, 1))  # a smaller world
    monkeypatch.setattr(scenes, "LABELS", torch.cartesian_prod(*map(torch.arange, scenes.CHOICES)))
    assert run_command(score.main, two_steps, "--captions", 2, "--out", tmp_path, capsys=capsys)[0] == 0
    assert (tmp_path / "score.md").read_text().count("|") == 9 * (2 + len(score.LEVELS))
    student = load_pipeline(two_steps)
    latents = scenes.encode(student.vae, scenes.LABELS)
    allowed = scenes.allowed(*scenes.draw_captions(6, torch.Generator().manual_seed(3))[1:])
    both = torch.cat([torch.ones_like(allowed), allowed])  # without and with the captions
    perfect = SimpleNamespace(shift=3.0, vae=student.vae, text=student.text,
                              mmdit=lambda x, sigma, *_: true_velocity(x, sigma, latents, both))
    for row in score.compare(perfect, student, load_mmdit(two_steps / "fake"), captions=6, seed=3):
        assert row["teacher"] == pytest.approx(0, abs=1e-6) and row["teacher there"] == pytest.approx(0, abs=1e-6)
        assert row["cosine"] == pytest.approx(1) and -1 < row["cosine guided"] < 1 and row["fake score"] > 0.01


def test_an_explained_sample_lacks_two_rows_without_the_fake_score_and_ends_in_the_sample(two_steps, tmp_path, capsys):
    shutil.copytree(two_steps, tmp_path / "run", ignore=shutil.ignore_patterns("fake", "state*"))
    status, _, note = run_command(explain.main, tmp_path / "run", "--out", tmp_path / "a.png", capsys=capsys)
    assert status == 0 and "has no fake score" in note
    assert run_command(explain.main, two_steps, "--out", tmp_path / "b.png", capsys=capsys)[::2] == (0, "")
    assert Image.open(tmp_path / "b.png").height == Image.open(tmp_path / "a.png").height + 2 * 132
    student = load_pipeline(two_steps)
    noise, cond = flow.initial_noise(student.latent_shape(), [3]), student.text(["a red circle"])
    student.cache = new_cache((1, 4), 128)
    run = dmd.rollout(CachedSteps(student.mmdit, student.cache), noise, student.sigmas, cond)
    steps = explain.clean_estimates(*run, student.sigmas)
    assert len(steps) == 2 and torch.allclose(steps[-1], student.sample(noise, cond), atol=1e-5)


def test_speed_counts_evaluations_and_flops(two_steps, tmp_path, capsys):
    assert run_command(speed.main, two_steps, "--rounds", 1, "--out", tmp_path, capsys=capsys)[0] == 0
    rows = [line.split("|")[2:-1] for line in (tmp_path / "speed.md").read_text().splitlines()[2:6]]
    names, seconds, _, flops = zip(*([cell.strip() for cell in row] for row in rows))
    assert names == ("56.00", "4.00", "2.00", "1.67") and flops[:3] == ("1/1.0", "1/14.0", "1/28.0")
    assert 28 < float(flops[3][2:]) < 56 / 1.6 and min(map(float, seconds)) > 0


def test_claims_are_judged_by_scipys_tests_with_holms_correction(monkeypatch):
    assert ablations.holm([0.04, 0.01, 0.03, 0.5]) == pytest.approx([0.09, 0.04, 0.09, 0.5])  # 3 · .03; and no less
    claim, arms = ablations.Claim, {"A": [2., 4, 6], "B": [1., 2, 3], "C": [8., 9, 12, 13], "D": [1., 2]}
    monkeypatch.setattr(ablations, "RUNS", 3)
    rows = [{"arm": arm, "seed": seed, **dict.fromkeys(ablations.MEASURES, value)}
            for arm, values in arms.items() for seed, value in enumerate(values)]
    plan = [claim("", "", "A", "B", "coverage", True), claim("", "", "A", "C", "median"),
            claim("", "", "A", "C", "coverage", True), claim("", "", "A", "D", "coverage")]
    tests = (stats.ttest_rel(arms["A"], arms["B"]), stats.ttest_ind(arms["A"], arms["C"], equal_var=False),
             stats.ttest_rel(arms["A"], arms["C"][:3]))
    p = [f"{value:.3f}" for value in ablations.holm([*(test.pvalue for test in tests), 1])]  # D lacks a run
    first, second, third = (line.split(" | ")[2:] for line in ablations.claims(rows, plan)[2:])
    assert first == ["coverage 4.000 vs 2.000", "2.000 (-0.484 to 4.484)", p[0], "undecided |"]  # t(0.975, 2) = 4.3027
    assert second[0] == "median 4.0000 vs 10.5000" and second[1].startswith("-6.5000 (") and second[2:] == [p[1], "holds |"]
    assert third[2:] == [p[2], "the opposite holds |"]
    assert ablations.table(rows)[2].startswith("| A | 3 | 4.000 ± 2.000 | ")


def test_the_documents_show_what_the_stored_rows_say():
    lines = []
    for number, plan in ablations.PLANS.items():
        rows = ablations.read_rows(TINY.parent / "experiments", number)
        lines += ablations.table(rows) + ablations.claims(rows, plan.claims)
    readme, experiments = ((TINY.parent / name).read_text().splitlines() for name in ("README.md", "docs/experiments.md"))
    assert set(lines) <= set(experiments)
    claims = [claim.text for plan in ablations.PLANS.values() for claim in plan.claims]
    shown = [line for line in readme if line.startswith(tuple(f"| {claim} |" for claim in claims))]
    assert shown and set(shown) <= set(lines)


def test_the_guided_teachers_pictures_are_drawn_once_and_again_if_some_are_missing(tmp_path, monkeypatch):
    few = measures.prompts_to_measure(2, samples=0)
    monkeypatch.setattr(measures, "prompts_to_measure", lambda *_, **__: few)
    folder = ablations.guided_teacher(tmp_path)
    assert [file.name for file in sorted(folder.iterdir())] == ["0000.png", "0001.png"]
    (folder / "0001.png").unlink()
    ablations.guided_teacher(tmp_path)
    assert len(list(folder.iterdir())) == 2
    monkeypatch.setattr(ablations, "load_pipeline", lambda *_: pytest.fail("drawn again"))
    ablations.guided_teacher(tmp_path)


def test_an_arm_is_trained_from_the_runs_of_its_seed_and_what_has_a_row_is_not_run_again(tmp_path, monkeypatch, capsys):
    calls = []

    def run(*words):
        out = words[words.index("--out") + 1]
        calls.extend([train.parse_arguments([str(word) for word in words[1:]])] if words[0] == "train.py" else [])
        out.mkdir(parents=True, exist_ok=True)
        (out / "model_index.json").touch()
        (out / "quality.json").write_text(json.dumps({"a model": dict.fromkeys(ablations.MEASURES, 0.5)}))

    monkeypatch.setattr(ablations, "run", run)
    monkeypatch.setattr(ablations, "guided_teacher", lambda out: out / "teacher")
    assert run_command(ablations.main, "--seeds", 2, "--out", tmp_path, capsys=capsys)[0] == 0
    runs = {(plan.first_seed, words[:i + 1]) for plan in ablations.PLANS.values() for words, _ in plan.arms.values()
            for i in range(len(words))}
    assert len({call.out for call in calls}) == len(calls) >= 2 * len(runs)  # and 4-step runs that are only references
    for call in calls:
        before = Path((call.student if call.stage == 2 else call.start) or "").name
        assert before == "" if call.stage == 1 and not call.cache else before.startswith("stage-1-")
        assert not before or before.endswith(f"-seed{call.seed}") and call.out.name.startswith(before.split("-seed")[0])
        of_seed = str(tmp_path / "runs" / f"stage-1-steps-4-seed{call.seed}")
        assert call.stage == 1 or call.reference in (of_seed, "runs/stage1-4steps")
    for plan in ablations.PLANS.values():
        assert all({claim.better, claim.worse} <= plan.arms.keys() for claim in plan.claims)
    monkeypatch.setattr(ablations, "run", lambda *_: pytest.fail("run again"))
    status, out, _ = run_command(ablations.main, "--seeds", 2, "--out", tmp_path, capsys=capsys)
    assert status == 0 and out.count("| 2 | 0.500 ± 0.000 |") == sum(len(plan.arms) for plan in ablations.PLANS.values())
