"""`python train.py --stage 2`: what each turn runs and trains, exact resume, and the student it leaves behind."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sample
import train
from conftest import read_state

FAST = "--objective adv+kd --warmup 1 --lora 2 --turns 1".split()


@pytest.fixture(autouse=True)
def begin_at_once(monkeypatch):
    """The discriminator is alone for two updates only."""
    monkeypatch.setitem(train.PRESETS[2]["tiny"], "alone", 2)


@pytest.fixture
def stage2(train_run, two_steps, tmp_path, monkeypatch):
    """stage2(out, *flags) trains without sheets and measures, and returns the folder."""
    monkeypatch.setattr(train, "Sheet", lambda *args, **sizes: None)
    monkeypatch.setattr(train, "report", lambda *a: None)

    def run(out, *flags):
        train_run("--stage", 2, "--student", two_steps, "--reference", two_steps, "--out", tmp_path / out, *flags)
        return tmp_path / out
    return run


@pytest.fixture(scope="module")
def refined(train_run, two_steps, tmp_path_factory):
    """A Stage II run of two turns of each side, warm-up included; its reference is the Stage I student."""
    out = tmp_path_factory.mktemp("runs") / "stage2"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.PRESETS[2]["tiny"], "alone", 0)
        train_run("--stage", 2, "--student", two_steps, "--reference", two_steps, "--iterations", 4, "--out", out,
                  "--cache", "2-5", *FAST)
    return out


def test_a_run_leaves_log_sheets_metrics_and_a_student_that_carries_its_cache(refined, two_steps):
    entries = [json.loads(line) for line in (refined / "log.jsonl").read_text().splitlines()]
    assert entries[-1]["step"] == 4 and {"discriminator", "adversarial", "norm"} <= set(entries[-1])
    assert (refined / "sheet-000004.png").exists()
    assert list(json.loads((refined / "metrics.json").read_text())) == ["Stage I student", "Stage I, plain re-use", "student",
                                                                        "reference"]
    student = sample.load_pipeline(refined)
    assert student.sigmas().tolist() == [1, 0.75, 0] and student.guidance() == 1
    assert student.cache.ranges == [(2, 5)] and len(student.cache.compensators) == 1
    names = "transformer/diffusion_pytorch_model.safetensors"
    assert load_file(refined / names).keys() == load_file(two_steps / names).keys()  # the adapters are merged
    assert not list(refined.rglob("*.part"))


def test_the_student_on_disk_is_the_one_that_was_trained(refined, two_steps):
    """Merged weights and compensator, read back, against the adapters in the run's state."""
    state, student = read_state(refined), sample.load_pipeline(refined)
    compensators = student.cache.compensators.state_dict()
    assert all(torch.equal(tensor, state[f"compensators/{name}"]) for name, tensor in compensators.items())
    assert any(tensor.abs().sum() > 0 for name, tensor in compensators.items() if "fc2" in name)
    before, after = (sample.load_pipeline(path).mmdit.state_dict() for path in (two_steps, refined))
    moved = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"0", "1", "6", "7", "8", "9", "10", "11"}  # not the cached blocks, and nothing outside the blocks


def test_diffusers_opens_the_student(refined):
    from diffusers import SD3Transformer2DModel
    assert SD3Transformer2DModel.from_pretrained(refined / "transformer").config.num_layers == 12


def test_a_resumed_run_ends_with_the_same_bits_as_one_that_never_stopped(stage2, monkeypatch):
    whole = stage2("whole", "--iterations", 6, *FAST)
    turns, descend = iter(range(9)), train.descend

    def cut_short(*arguments):
        if next(turns) == 5:
            raise KeyboardInterrupt
        return descend(*arguments)

    monkeypatch.setattr(train, "LOG_EVERY", 2)
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    monkeypatch.setattr(train, "descend", cut_short)
    with pytest.raises(KeyboardInterrupt):
        stage2("parts", "--iterations", 6, *FAST)
    monkeypatch.setattr(train, "descend", descend)
    parts = stage2("parts", "--iterations", 6, "--resume", *FAST)
    assert [json.loads(line)["step"] for line in (parts / "log.jsonl").read_text().splitlines()] == [2, 4, 6]
    one, other = (read_state(out) for out in (whole, parts))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------------------------------------- turn by turn

@pytest.fixture
def watch(monkeypatch):
    """Notes, update by update, how often each network ran and which parameters had a gradient."""
    updates, counts, networks = [], Counter(), {}

    def count(name, network):
        networks[name] = network
        network.register_forward_hook(lambda *_: counts.update([name]))
        return network

    load, networks_of, backbone, heads = train.load_pipeline, train.open_networks, train.load_backbone, train.Heads
    original_refine, reference, descend = train.refine, train.load_reference, train.descend

    def open_networks(*arguments, **how):
        original, (student,), learning = networks_of(*arguments, **how)
        return count("original", original), [count("student", student)], learning

    def load_pipeline(*arguments, **parts):
        pipeline = load(*arguments, **parts)
        networks["vae"] = pipeline.vae
        count("decoder", pipeline.vae.decoder)
        return pipeline

    def load_reference(*arguments):
        pipeline = reference(*arguments)
        count("reference", pipeline.mmdit)
        return pipeline

    def refine(student, noise, sigmas, cond, cache, *rest):
        networks["compensators"] = cache.compensators
        return original_refine(student, noise, sigmas, cond, cache, *rest)

    def watched_descend(*arguments):
        gradients = {name: sum(p.grad is not None for p in network.parameters()) for name, network in networks.items()}
        updates.append((dict(counts), {name for name, n in gradients.items() if n}))
        counts.clear()
        return descend(*arguments)

    for name, value in (("load_pipeline", load_pipeline), ("open_networks", open_networks),
                        ("load_reference", load_reference), ("refine", refine),
                        ("load_backbone", lambda *a: count("backbone", backbone(*a))), ("descend", watched_descend),
                        ("Heads", lambda *a: count("heads", heads(*a)))):
        monkeypatch.setattr(train, name, value)
    return updates


def test_each_turn_runs_what_it_needs_and_trains_what_it_should(watch, stage2):
    stage2("out", "--iterations", 6, "--objective", "adv", "--lora", 2, "--warmup", 1, "--turns", 2)
    discriminator = {"student": 2, "reference": 2, "decoder": 2, "backbone": 1, "heads": 1}
    generator = {"student": 2, "decoder": 1, "backbone": 1, "heads": 1}
    runs, gradients = zip(*watch)
    assert [dict(run) for run in runs[1:]] == [discriminator, generator, discriminator, discriminator, generator]
    heads = {"heads"}
    assert gradients == (heads, heads, {"compensators"}, heads, heads, {"compensators", "student"})


def test_distillation_alone_decodes_nothing_and_needs_no_discriminator(watch, stage2):
    stage2("out", "--iterations", 3, "--lora", 2, "--warmup", 1, "--objective", "kd")
    runs, gradients = zip(*watch)
    assert [dict(run) for run in runs[1:]] == 2 * [{"student": 2, "original": 1}]
    assert gradients == ({"compensators"}, {"compensators", "student"}, {"compensators", "student"})


def test_terms_of_weight_zero_are_not_computed(monkeypatch, stage2):
    monkeypatch.setattr(train, "feature_distillation", lambda steps: pytest.fail("feature distillation computed"))
    stage2("kd", "--iterations", 1, "--objective", "kd", "--feature-weight", 0)
    monkeypatch.setattr(train, "output_distillation", lambda steps: pytest.fail("output distillation computed"))
    stage2("adv", "--iterations", 3, "--objective", "adv")


def test_lpips_compares_with_the_real_image_of_the_same_noise_and_prompt(monkeypatch, stage2):
    seen = []
    monkeypatch.setattr(train, "load_lpips", lambda device: lambda a, b: seen.append((a, b)) or (a - b).abs().mean())
    stage2("out", "--iterations", 2, "--objective", "kd", "--lpips", 1, "--cache", "2-5")
    (ours, real), *_ = seen
    assert ours.shape == real.shape == (4, 3, 64, 64) and ours.requires_grad and not real.requires_grad
    assert (ours - real).abs().mean() < 0.5 * (ours - real.roll(1, 0)).abs().mean()  # before any training: nearly the same


@pytest.mark.parametrize("flags", [
    "--cache none --objective adv+kd", "--cache 1-2,8-11 --objective kd", "--steps 4", "--lora 0 --objective adv+kd --dtype bf16"])
def test_other_settings_run_through_the_same_code(flags, stage2):
    student = sample.load_pipeline(stage2("out", "--iterations", 4, "--warmup", 0, *flags.split()))
    assert torch.isfinite(sample.generate(student, ["a circle"], [0])).all()
    assert (student.cache is None) == ("none" in flags)
    assert len(student.sigmas()) == (5 if "--steps 4" in flags else 3)


# ------------------------------------------------------------------------------------------------- where runs are found

def test_stage_2_finds_the_runs_before_it_and_says_what_the_teacher_as_reference_costs(train_run, two_steps, tmp_path,
                                                                                       monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(two_steps, tmp_path / "runs" / "stage1")
    monkeypatch.setattr(train, "report", lambda *a: None)
    monkeypatch.setattr(train, "Sheet", lambda *args, **sizes: None)
    adversarial = "--stage 2 --iterations 1 --batch 1 --objective adv".split()
    train_run(*adversarial)
    assert "56 network passes" in capsys.readouterr().out
    assert (tmp_path / "runs" / "stage2" / "model_index.json").exists()
    train_run("--stage", 1, "--steps", 4, "--iterations", 1)
    assert sample.load_pipeline(Path("runs/stage1-4steps")).sigmas().tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    capsys.readouterr()
    train_run(*adversarial, "--out", "runs/again")
    assert "passes" not in capsys.readouterr().out
