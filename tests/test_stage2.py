"""`python train.py --stage 2`: what each turn runs and trains, exact resume, and the student it leaves behind."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file

import pipeline
import quick_train
import train
from conftest import read_state

SOON = "alone=2 warmup=1 turns=1 --objective adv+output+feature --lora 2".split()


@pytest.fixture
def stage2(two_steps, tmp_path):
    """stage2(out, *words) trains without sheets and measures, and returns the folder."""
    def run(out, *words):
        quick_train.run("--bare", "--stage", 2, "--student", two_steps, "--reference", two_steps,
                        "--out", tmp_path / out, *words)
        return tmp_path / out
    return run


@pytest.fixture(scope="module")
def refined(two_steps, tmp_path_factory):
    """A Stage II run of two turns of each side, warm-up included; its reference is the Stage I student.

    What that one scored is changed, in a copy of it: so it shows whether either is measured again.
    """
    runs = tmp_path_factory.mktemp("runs")
    shutil.copytree(two_steps, runs / "stage1")
    known = json.loads((two_steps / "measures.json").read_text())
    for measures in known["measures"].values():
        measures["coverage"]["mean"] = [0.125, 0.0]
    (runs / "stage1" / "measures.json").write_text(json.dumps(known))
    quick_train.run("--stage", 2, "--student", runs / "stage1", "--reference", runs / "stage1", "--iterations", 4,
                    "--out", runs / "stage2", "--cache", "2-5", *SOON, "alone=0")
    return runs / "stage2"


def test_a_run_leaves_log_sheets_metrics_and_a_student_that_carries_its_cache(refined, two_steps):
    entry = json.loads((refined / "log.jsonl").read_text().splitlines()[-1])
    assert entry["step"] == 4
    assert {"discriminator", "told apart", "adversarial", "output", "feature", "norm"} <= set(entry)
    assert (refined / "sheet-000004.png").exists()
    metrics = json.loads((refined / "metrics.json").read_text())
    assert list(metrics) == ["true scenes, autoencoded", "Stage I student", "Stage I, plain re-use", "student",
                             "reference"]
    again = {name for name, measures in metrics.items() if measures["coverage"]["mean"] != [0.125, 0.0]}
    assert again == {"true scenes, autoencoded", "Stage I, plain re-use", "student"}  # the other two were measured
    student = pipeline.load_pipeline(refined)
    assert student.sigmas().tolist() == [1, 0.75, 0] and student.guidance() == 1 and student.cache.blocks == (2, 5)
    names = "transformer/diffusion_pytorch_model.safetensors"
    assert load_file(refined / names).keys() == load_file(two_steps / names).keys()  # the adapters are merged
    assert SD3Transformer2DModel.from_pretrained(refined / "transformer").config.num_layers == 12
    assert not list(refined.rglob("*.part"))


def test_the_student_on_disk_is_the_one_that_was_trained(refined, two_steps):
    """Merged weights and compensator, read back, against the adapters in the run's state."""
    state, student = read_state(refined), pipeline.load_pipeline(refined)
    compensator = student.cache.compensator.state_dict()
    assert all(torch.equal(tensor, state[f"compensator/{name}"]) for name, tensor in compensator.items())
    assert any(tensor.abs().sum() > 0 for name, tensor in compensator.items() if "fc2" in name)
    before, after = (pipeline.load_pipeline(path).mmdit.state_dict() for path in (two_steps, refined))
    moved = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"0", "1", "6", "7", "8", "9", "10", "11"}  # not the cached blocks, and nothing outside the blocks


@pytest.mark.parametrize("words", [[*SOON, "decay=false"], [*SOON, "--lora", 0, "decay=false"]],
                         ids=["adapters", "all weights"])
def test_a_resumed_run_ends_with_the_same_bits_as_one_that_never_stopped(stage2, words):
    whole = stage2("whole", "--iterations", 6, *words)
    stage2("parts", "--iterations", 3, *words)
    parts = stage2("parts", "--iterations", 6, "--resume", *words)
    one, other = (read_state(out) for out in (whole, parts))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------------------------------------- turn by turn

@pytest.fixture
def watch(monkeypatch):
    """Notes, update by update, how often each network ran and which of them had a gradient."""
    updates, counts, networks = [], Counter(), {}

    def note(name, network):
        networks[name] = network
        network.register_forward_hook(lambda *_: counts.update([name]))
        return network

    def around(owner, name, look):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *arguments, **more: look(function(*arguments, **more)))

    def opened(found):
        original, (student,), learned = found
        return note("original", original), [note("student", student)], learned

    def caching(cache):
        note("compensator", cache.compensator)
        return cache

    def judged(discriminator):
        note("backbone", discriminator.backbone)
        note("heads", discriminator.heads)
        return discriminator

    def loaded(model):
        note("decoder", model.vae.decoder)
        return model

    def referred(model):
        note("reference", model.mmdit)
        return model

    around(train, "open_networks", opened)
    around(train, "load_pipeline", loaded)
    around(train, "load_reference", referred)
    around(train, "new_cache", caching)
    around(train.adversarial, "Discriminator", judged)
    descend = train.descend

    def watched_descend(*arguments):
        updates.append((dict(counts), {name for name, network in networks.items()
                                       if any(p.grad is not None for p in network.parameters())}))
        counts.clear()
        return descend(*arguments)

    monkeypatch.setattr(train, "descend", watched_descend)
    return updates


def test_each_turn_runs_what_it_needs_and_trains_what_it_should(watch, stage2):
    stage2("out", "--iterations", 6, "--objective", "adv", "--lora", 2, "alone=2", "warmup=1", "turns=2")
    discriminator = {"student": 2, "compensator": 1, "reference": 2, "decoder": 2, "backbone": 1, "heads": 1}
    generator = {"student": 2, "compensator": 1, "decoder": 1, "backbone": 1, "heads": 1}
    runs, gradients = zip(*watch)
    assert [dict(run) for run in runs[1:]] == [discriminator, generator, discriminator, discriminator, generator]
    assert gradients == ({"heads"}, {"heads"}, {"compensator"}, {"heads"}, {"heads"}, {"compensator", "student"})


def test_distillation_alone_decodes_nothing_and_needs_no_discriminator(watch, stage2):
    stage2("out", "--iterations", 3, "--lora", 2, "warmup=1", "--objective", "output+feature")
    runs, gradients = zip(*watch)
    assert [dict(run) for run in runs[1:]] == 2 * [{"student": 3, "compensator": 1}]
    assert gradients == ({"compensator"}, {"compensator", "student"}, {"compensator", "student"})


@pytest.mark.parametrize("words", ["--cache none --objective adv --reference truth",
                                   "--cache 8-11 --objective feature --steps 4",
                                   "--correction prune --objective adv", "--correction none --objective output",
                                   "--lora 0 --objective adv+output+feature --dtype bf16 --batch 2 --cache 1-1"])
def test_other_settings_run_through_the_same_code(words, stage2):
    student = pipeline.load_pipeline(stage2("out", "--iterations", 4, "warmup=0", "alone=2", *words.split()))
    assert torch.isfinite(pipeline.generate(student, ["a circle"], [0])).all()
    assert (student.cache is None) == ("--cache none" in words)
    assert len(student.sigmas()) == (5 if "--steps 4" in words else 3)


# ------------------------------------------------------------------------------------------------- where runs are found

def test_stage_2_finds_the_runs_before_it_and_says_what_the_teacher_as_reference_costs(
        two_steps, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(two_steps, tmp_path / "runs" / "stage1")
    adversarial = "--bare --stage 2 --iterations 1 --batch 1 --objective adv".split()
    quick_train.run(*adversarial)
    assert "56 network passes" in capsys.readouterr().out
    assert pipeline.is_finished(Path("runs/stage2"))
    quick_train.run("--bare", "--stage", 1, "--steps", 4, "--iterations", 1)
    assert pipeline.load_pipeline(Path("runs/stage1-4steps")).sigmas().tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    capsys.readouterr()
    quick_train.run(*adversarial, "--out", "runs/again")
    assert "passes" not in capsys.readouterr().out
