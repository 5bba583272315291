"""`python train.py`, Stage 0 and I: the loop, exact resume, what a run leaves behind, wrong arguments. On the shipped model."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import flow
import sample
import shapes
import tiny
import train
import weights
from conftest import read_state


def test_a_run_leaves_log_sheets_metrics_and_a_student_that_needs_no_flags(two_steps):
    assert [json.loads(line)["step"] for line in (two_steps / "log.jsonl").read_text().splitlines()] == [2]
    assert (two_steps / "sheet-000002.png").exists()
    assert set(json.loads((two_steps / "metrics.json").read_text())) == {
        "student", "teacher, 2 steps", f"teacher, 28 steps, w = {train.PRESETS[1]['tiny']['guidance']:g}"}
    student = sample.load_pipeline(two_steps)
    assert student.sigmas().tolist() == [1, 0.75, 0] and student.guidance() == 1
    assert not list(two_steps.rglob("*.part"))


def test_training_moves_student_and_fake_but_not_the_teacher(two_steps):
    state = read_state(two_steps)
    teacher = sample.load_pipeline(sample.TINY).mmdit.state_dict()
    for network in ("student", "fake"):
        moved = {name for name, tensor in teacher.items() if not torch.equal(tensor, state[f"{network}/{name}"])}
        still = set(teacher) - moved
        assert "pos_embed" in still and len(still) <= 3, still
    name = "joint_blocks.0.x_block.attn.qkv.weight"
    first = (state[f"student/{name}"] - teacher[name]).abs().max()
    assert 0 < first <= 2.5 * train.PRESETS[1]["tiny"]["student_lr"]  # AdamW: at most about lr an iteration


def test_a_resumed_run_ends_with_the_same_bits_as_one_that_never_stopped(train_run, two_steps, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_run("--stage", 1, "--iterations", 3, "--out", whole)
    train_run("--stage", 1, "--iterations", 1, "--out", parts)
    train_run("--stage", 1, "--iterations", 3, "--out", parts, "--resume")
    one, other = read_state(whole), read_state(parts)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("flags", ["--steps 1", "--steps 4 --windows whole --alpha 1 --density uniform", "--dtype bf16"])
def test_other_settings_run_through_the_same_code(train_run, flags, tmp_path):
    train_run("--stage", 1, "--iterations", 1, "--out", tmp_path / "out", *flags.split())
    assert torch.isfinite(sample.generate(sample.load_pipeline(tmp_path / "out"), ["a circle"], [0])).all()


def test_prompts_of_a_file_are_trained_on(train_run, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    seen = []
    original = train.draw_prompts
    monkeypatch.setattr(train, "draw_prompts", lambda *a: seen.append(original(*a)) or seen[-1])
    train_run("--stage", 1, "--iterations", 1, "--out", tmp_path / "out", "--prompts", tmp_path / "prompts.txt")
    assert set(sum(seen, [])) == {"a red circle", "a blue square"}


@pytest.mark.parametrize("arguments, message", [
    ("--stage 3", "invalid choice"),
    ("--stage 1 --stepps 2", "unrecognized arguments"),
    ("--stage 1 --iterations 0", "not a whole number"),
    ("--stage 1 --steps 3", "invalid choice"),
    ("--stage 1 --density e", "invalid choice"),
    ("--stage 1 --student-lr nan", "not a number above 0"),
    ("--stage 1 --device cuda:99", "is not there"),
    ("--stage 1 --model nowhere", "nowhere"),
    ("--stage 1 --prompts nowhere.txt", "cannot be read"),
    ("--stage 1 --out {file}/x", "cannot be written"),
    ("--stage 1 --out {file}", "cannot be written"),
    ("--stage 1 --out {full}", "holds a run already"),
    ("--stage 1 --seed x", "--seed"),
    ("--stage 1 --batch 5 --at-once 2", "a batch of 5 cannot be shared out"),
    ("--stage 1 --at-once 0", "not a whole number"),
    ("--stage 0 --lora 2", "--lora means nothing to --stage 0"),
    ("--stage 0 --at-once 2", "--at-once means nothing to --stage 0"),
    ("--stage 1 --cache 2-5", "--cache means nothing to --stage 1"),
    ("--stage 2 --alpha 0.9", "--alpha means nothing to --stage 2"),
    ("--stage 2", "run `python train.py --stage 1` first"),
    ("--stage 2 --student nowhere", "nowhere"),
    ("--stage 2 --student {tiny}", "no student of Stage I"),
    ("--stage 2 --student {student} --reference nowhere", "nowhere"),
    ("--stage 2 --student {student} --reference {other}", "another architecture"),
    ("--stage 2 --student {student} --objective adv --backbone {student}", "without backbone/"),
    ("--stage 2 --student {student} --cache 5", "not A-B"),
    ("--stage 2 --student {student} --cache 5-2", "cache range 5-2"),
    ("--stage 2 --student {student} --cache 8-12", "cache range 8-12"),
    ("--stage 2 --student {student} --steps 1", "at least 2 steps"),
    ("--stage 2 --student {student} --steps 1 --cache none", "at least 2 steps"),
    ("--stage 2 --student {student} --cache none --objective kd", "distil the student from itself"),
    ("--stage 2 --student {student} --objective kd --output-weight 0 --feature-weight 0", "nothing to train on"),
    ("--stage 2 --student {student} --objective gan", "invalid choice"),
    ("--stage 2 --student {student} --lora -1", "not a whole number"),
    ("--stage 2 --student {student} --output-weight -1", "not a number from 0 up"),
    ("--stage 2 --student {student} --lpips 1", "pip install lpips"),
])
def test_wrong_arguments_end_in_one_line(arguments, message, two_steps, make_pair, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # where there is no run
    monkeypatch.setitem(sys.modules, "lpips", None)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "log.jsonl").write_text("mine")
    (tmp_path / "other").symlink_to(make_pair("SD3.5-Medium", "folder").path)
    arguments = arguments.format(file=tmp_path / "file", full=tmp_path / "full", student=two_steps, tiny=sample.TINY,
                                 other=tmp_path / "other").split()
    if "--out" not in arguments:
        arguments += ["--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as end:
        weights.run_script(train.main)
    error = capsys.readouterr().err.strip()
    assert end.value.code == 2 and message in error and error.count("\n") == 0, error
    assert (tmp_path / "full" / "log.jsonl").read_text() == "mine"
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_resuming_with_other_settings_is_refused(train_run, two_steps):
    with pytest.raises(weights.UserError, match="other settings"):
        train_run("--stage", 1, "--iterations", 3, "--out", two_steps, "--resume", "--alpha", 0.5)


def test_train_as_a_program_reports_errors_without_a_traceback(tmp_path):
    script = Path(train.__file__)
    result = subprocess.run([sys.executable, script, "--stage", "1", "--model", tmp_path], capture_output=True, text=True,
                            cwd=tmp_path)
    assert result.returncode == 2 and "Traceback" not in result.stderr and result.stderr.startswith("error:")


# -------------------------------------------------------------------------------------------------------- stage 0

def test_every_loss_of_stage_0_falls(tmp_path):
    """A few steps on fresh networks: each loss has a gradient that helps."""
    torch.manual_seed(0)
    text = tiny.TinyText(tmp_path)
    latents, labels = tiny.encode_pool(tiny.new_vae(), 64, seed=0)
    losses = {"text": (text, tiny.text_loss), "recogniser": (shapes.Recogniser(), tiny.recogniser_loss),
              "vae": (tiny.new_vae(), tiny.vae_loss),
              "teacher": (tiny.new_mmdit(), partial(tiny.teacher_loss, text.encoders, latents, labels, batch=16))}
    for name, (network, loss) in losses.items():
        optimizer = torch.optim.Adam(train.trainable(network), lr=1e-3)
        values = []
        for _ in range(6):
            value = loss(network, torch.Generator().manual_seed(0))
            value.backward()
            train.descend(optimizer, 1.0)
            values.append(value.item())
        assert values[-1] < values[0], name


def test_a_finished_part_of_stage_0_is_not_made_again(tmp_path):
    arguments = SimpleNamespace(out=tmp_path, seed=0, device=torch.device("cpu"), dtype="fp32", preset="tiny")
    (tmp_path / "parts").mkdir()
    made = [train.make_part(arguments, "part", lambda: torch.nn.Linear(2, 2), lambda network, generator: loss(network), 2, 1e-3)
            for loss in (lambda network: network(torch.ones(2)).sum(), None)]
    assert torch.equal(made[0].weight, made[1].weight)


def test_each_word_of_the_tiny_world_is_one_token_and_the_longest_caption_fits():
    longest = "a large striped red circle on the bottom of a gray background"
    for tokenizer, ends in zip(sample.load_pipeline(sample.TINY).text.tokenizers, (2, 2, 1), strict=True):
        assert len(tokenizer(longest).input_ids) == len(longest.split()) + ends == tokenizer.model_max_length
        assert all(len(tokenizer(word).input_ids) == 1 + ends for word in shapes.VOCABULARY)


@torch.no_grad()
def test_the_shipped_teacher_follows_prompts():
    teacher = sample.load_pipeline(sample.TINY)
    prompts, labels, named = shapes.draw_captions(48, torch.Generator().manual_seed(77))
    images = sample.decode(teacher, sample.generate(teacher, prompts, range(48)))
    seen = shapes.recognise(shapes.load_recogniser(sample.TINY), images)
    assert shapes.adherence(seen, labels, named).mean() > 0.9


def test_the_shipped_teacher_alone_needs_many_steps():
    teacher = sample.load_pipeline(sample.TINY)
    prompts, seeds = ["a red circle"] * 4, range(4)
    fine = sample.generate(teacher, prompts, seeds, sigmas=flow.sd3_sigmas(28, 3.0))
    coarse = sample.generate(teacher, prompts, seeds, sigmas=flow.student_sigmas(2, 3.0))
    assert (fine - coarse).abs().mean() > 0.2
