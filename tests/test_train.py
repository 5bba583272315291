"""`python train.py --stage 1`: the loop, exact resume, what a run leaves behind, wrong arguments. On the shipped
model."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import commandline
import pipeline
import quick_train
import report
import train
from cache import effective_nfe
from commandline import UserError
from conftest import read_state


def stage1(out, *words):
    quick_train.run("--stage", 1, "--out", out, "--bare", *words)
    return out


def log_steps(run):
    return [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]


def same(one, other):
    one, other = read_state(one), read_state(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# -------------------------------------------------------------------------------------------------- what a run leaves

def test_a_run_leaves_log_sheets_metrics_and_a_student_that_needs_no_flags(two_steps):
    entry, = map(json.loads, (two_steps / "log.jsonl").read_text().splitlines())
    assert entry["step"] == 2 and {"student", "fake", "norm", "guided", "seconds"} <= set(entry)
    assert (two_steps / "sheet-000002.png").exists()
    metrics = json.loads((two_steps / "metrics.json").read_text())
    assert set(metrics) == {"true scenes, autoencoded", "student", "teacher, 2 steps", "teacher, 28 steps, w = 7"}
    student = pipeline.load_pipeline(two_steps)
    assert report.known_measures(two_steps, pipeline.TINY) == {pipeline.Sampler(student, {}).key(): metrics["student"]}
    assert student.sigmas().tolist() == [1, 0.75, 0] and student.guidance() == 1
    assert not list(two_steps.rglob("*.part"))


def test_training_moves_student_and_fake_but_not_the_teacher(two_steps):
    state = read_state(two_steps)
    teacher = pipeline.load_pipeline(pipeline.TINY).mmdit.state_dict()
    for network in ("student", "fake"):
        moved = {name for name, tensor in teacher.items() if not torch.equal(tensor, state[f"{network}/{name}"])}
        still = set(teacher) - moved
        assert "pos_embed" in still and len(still) <= 3, still
    name = "joint_blocks.0.x_block.attn.qkv.weight"
    first = (state[f"student/{name}"] - teacher[name]).abs().max()
    assert 0 < first <= 2.5 * train.PRESETS["tiny"][1]["student_lr"]  # AdamW: at most about lr an iteration


def test_a_student_says_what_it_was_made_of_and_not_where(two_steps):
    header = pipeline.load_pipeline(two_steps).mmdit.metadata
    recipe = json.loads(header["training"])
    assert recipe["alpha"] == 0.9 and recipe["betas"] == [0.0, 0.999] and recipe["weight_decay"] == 1e-4
    assert "/" not in header["training"]


def test_the_published_order_is_kept_in_the_loop(monkeypatch, tmp_path):
    """Of each iteration the fake score's loss comes first, then its step, then the student's loss and step."""
    events, descend, iteration = [], train.descend, train.dmd.iteration

    def watched(*arguments):
        for name, loss in zip(("fake loss", "student loss"), iteration(*arguments)):
            events.append(name)
            yield loss

    monkeypatch.setattr(train.dmd, "iteration", watched)
    monkeypatch.setattr(train, "descend", lambda part, *more: events.append(part[0].param_groups[0]["lr"])
                        or descend(part, *more))
    stage1(tmp_path / "out", "--iterations", 1, "--student-lr", 1, "--fake-lr", 2, "--at-once", 2)
    assert events == ["fake loss", "fake loss", 2, "student loss", "student loss", 1]


# -------------------------------------------------------------------------------------------------------- going on

@pytest.mark.parametrize("flags", [[], ["--lora", 2], ["--offload"]], ids=str)
def test_a_resumed_run_ends_with_the_same_bits_as_one_that_never_stopped(flags, tmp_path, monkeypatch):
    offloaded, load = [], train.parallel.load
    monkeypatch.setattr(train.parallel, "load", lambda *inputs: offloaded.append(inputs[-1]) or load(*inputs))
    whole = stage1(tmp_path / "whole", "--iterations", 3, *flags)
    parts = stage1(tmp_path / "parts", "--iterations", 1, *flags)
    shutil.copytree(parts, tmp_path / "moved")  # a run does not care where it lies, nor about a line cut short
    with open(tmp_path / "moved" / "log.jsonl", "a") as log:
        log.write('{"run": "stage 1", "st')
    moved = stage1(tmp_path / "moved", "--iterations", 3, "--resume", *flags)
    assert same(whole, moved) and log_steps(moved) == [1, 3]
    assert offloaded == ["--offload" in flags]  # the states do not pass through the device's memory


def test_ctrl_c_ends_an_iteration_saves_and_says_how_to_go_on(tmp_path, monkeypatch):
    whole, add, steps = stage1(tmp_path / "whole", "--iterations", 3), report.Log.add, []

    def interrupted(log, values):
        steps.append(add(log, values))
        if len(steps) == 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(report.Log, "add", interrupted)
        with pytest.raises(KeyboardInterrupt, match="stopped at step 2"):
            stage1(tmp_path / "parts", "--iterations", 3)
    assert same(whole, stage1(tmp_path / "parts", "--iterations", 3, "--resume"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_log_has_the_mean_of_all_iterations_since_the_line_before(tmp_path):
    log = report.Log(tmp_path, "a run", 0)
    for values in ({"generator": 1.0}, {"discriminator": 5.0}, {"generator": 3.0}):
        log.add({name: torch.tensor(value) for name, value in values.items()})
    assert log.write(3, torch.device("cpu")) == {"generator": 2, "discriminator": 5}
    log.skip()
    log.skip()
    assert log.write(5, torch.device("cpu")) == {"skipped": 2}
    assert log_steps(tmp_path) == [3, 5]


@pytest.mark.parametrize("words, change", [(["--alpha", 0.5], "alpha 0.9, now 0.5"), (["--seed", 1], "seed 0, now 1")])
def test_resuming_with_other_settings_is_refused(two_steps, words, change):
    with pytest.raises(UserError, match=f"other settings .{change}.;"):
        stage1(two_steps, "--iterations", 3, "--resume", *words)


def test_a_model_is_not_overwritten_by_resuming_a_run_that_never_was_there(two_steps, tmp_path, monkeypatch):
    run = shutil.copytree(two_steps, tmp_path / "run")

    args = train.parse_arguments(["--stage", "2", "--out", str(run), "--resume"])
    args.student = args.reference = str(two_steps)
    with pytest.raises(UserError, match="other settings .of stage 1, now stage 2"):
        train.Run(args, "stage 2", {}, {}).restore()

    for file in (run / "state.json", *run.glob(".lock")):
        file.unlink(missing_ok=True)
    before = sorted(run.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["train.py", "--stage", "1", "--out", str(run), "--resume"])
    with pytest.raises(UserError, match="holds a model, but no run"):
        train.main()
    assert sorted(run.rglob("*")) == before


def test_resuming_with_a_prompt_file_that_was_changed_is_refused_and_one_that_moved_is_not(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    run = stage1(tmp_path / "run", "--iterations", 1, "--prompts", tmp_path / "prompts.txt")
    (tmp_path / "prompts.txt").rename(tmp_path / "moved.txt")
    stage1(run, "--iterations", 2, "--prompts", tmp_path / "moved.txt", "--resume")
    (tmp_path / "moved.txt").write_text("a red circle\n")
    with pytest.raises(UserError, match="other settings"):
        stage1(run, "--iterations", 3, "--prompts", tmp_path / "moved.txt", "--resume")


# -------------------------------------------------------------------------------------------------------- settings

@pytest.mark.parametrize("flags", ["--steps 1", "--steps 4 --windows whole --alpha 1 --density uniform",
                                   "--dtype bf16 --batch 2"])
def test_other_settings_run_through_the_same_code(flags, tmp_path):
    student = pipeline.load_pipeline(stage1(tmp_path / "out", "--iterations", 1, *flags.split()))
    assert torch.isfinite(pipeline.generate(student, ["a circle"], [0])).all()


def test_prompts_of_a_file_are_trained_on(tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    seen, draw = [], train.draw_prompts
    monkeypatch.setattr(train, "draw_prompts", lambda *a: seen.append(draw(*a)) or seen[-1])
    stage1(tmp_path / "out", "--iterations", 1, "--prompts", tmp_path / "prompts.txt")
    assert set(sum(seen, [])) == {"a red circle", "a blue square"}


def test_each_preset_has_run_folders_of_its_own_and_the_released_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny, medium, large = (train.parse_arguments(words.split()) for words in (
        "--stage 1 --steps 4", "--stage 1 --preset sd3-medium", "--stage 2 --preset sd3.5-large"))
    assert [str(args.out) for args in (tiny, medium, large)] == [
        "runs/stage1-4steps", "runs/sd3-medium/stage1", "runs/sd3.5-large/stage2"]
    assert (medium.alpha, medium.guidance, medium.student_lr, medium.fake_lr, medium.betas) == (
        0.96, 7, 5e-6, 4e-5, (0, 0.999))
    assert (medium.batch, medium.iterations, medium.student_clip, medium.fake_clip) == (64, 500, 2, 1)
    assert (large.cache, large.lora, large.objective, large.warmup, large.turns, large.alone) == (
        (3, 12), 64, "adv", 317, 2, 50)
    slow, fast = (train.parse_arguments(f"--stage 2 --preset sd3-medium --cache {name} --out {name}".split()).cache
                  for name in ("slow", "fast"))
    assert effective_nfe(24, slow, 2) == 1.75 and effective_nfe(24, fast, 2) == pytest.approx(1.67, abs=0.01)
    assert str(train.parse_arguments("--stage 2 --steps 4".split()).out) == "runs/stage2-4steps"


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_help_shows_the_flags_of_the_stage_with_their_defaults(stage, capsys):
    with pytest.raises(SystemExit):
        train.parse_arguments(["--stage", str(stage), "--help"])
    shown = capsys.readouterr().out
    assert ("--alpha" in shown, "--cache" in shown) == (stage == 1, stage == 2)
    assert stage != 1 or "(default: 0.9)" in " ".join(shown.split())


@pytest.mark.parametrize("arguments, message", [
    ("--preset tiny", "--stage is missing"),
    ("--stage 1 --iterations 0", "not a number from 1"),
    ("--stage 1 --student-lr nan", "not a number"),
    ("--stage 1 --guidance nan", "not a number"),
    ("--stage 1 --alpha inf", "not a number"),
    ("--stage 1 --seed 20000000000000", "not a number from 0 to"),
    ("--stage 1 --device cuda:99", "is not there"),
    ("--stage 1 --model nowhere", "nowhere"),
    ("--stage 1 --model {tiny}/transformer", "only the tiny SD3 draws captions of its own"),
    ("--stage 1 --prompts nowhere.txt", "cannot be read"),
    ("--stage 1 --out {file}/x", "cannot be written"),
    ("--stage 1 --out {file}", "cannot be written"),
    ("--stage 1 --out {full}", "holds a run already"),
    ("--stage 1 --batch 5 --at-once 2", "a batch of 5 cannot be shared out"),
    ("--stage 0 --prompts x.txt", "unrecognized arguments: --prompts"),
    ("--stage 0 --model x", "unrecognized arguments: --model"),
    ("--stage 1 --cache 2-5", "unrecognized arguments: --cache"),
    ("--stage 2 --alpha 0.9", "unrecognized arguments: --alpha"),
    ("--stage 2", "run `python train.py --stage 1`"),
    ("--stage 2 --preset sd3-medium --prompts p.txt", "none in runs/sd3-medium/stage1"),
    ("--stage 2 --student nowhere", "nowhere"),
    ("--stage 2 --student {tiny}", "no student of Stage I"),
    ("--stage 2 --student {student} --reference nowhere", "nowhere"),
    ("--stage 2 --student {student} --reference {other}", "another architecture"),
    ("--stage 2 --student {student} --model {other} --prompts {prompts}", "another architecture"),
    ("--stage 2 --student {student} --objective adv --backbone {student}", "without backbone/"),
    ("--stage 2 --student {student} --cache 5", "not A-B"),
    ("--stage 2 --steps 4", "run `python train.py --stage 1 --steps 4`"),
    ("--stage 2 --student {student} --reference truth --model {other} --prompts {prompts}", "is for the tiny world"),
    ("--stage 2 --student {student} --cache 8-12", "cached blocks 8-12"),
    ("--stage 2 --student {student} --cache none --objective output", "distil the student from itself"),
    ("--stage 2 --student {student} --correction prune --objective output+feature", "leaves out"),
    ("--stage 2 --student {student} --correction none --cache 0-11 --lora 4", "nothing is left to train"),
    ("--stage 2 --student {student} --correction prune --cache none", "nothing to correct"),
])
def test_wrong_arguments_end_in_one_line(arguments, message, two_steps, make_pair, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # where there is no run
    monkeypatch.setattr(train, "open_networks", lambda *arguments: pytest.fail("the first slow step was taken"))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "prompts.txt").write_text("a circle")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "log.jsonl").write_text("mine")
    places = {"file": tmp_path / "file", "full": tmp_path / "full", "student": two_steps, "tiny": pipeline.TINY,
              "other": make_pair("SD3.5-Medium", "folder").path, "prompts": tmp_path / "prompts.txt"}
    words = [word.format(**places) for word in arguments.split()]
    if "--out" not in words and "nowhere" != message and "none in" not in message:
        words += ["--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    with pytest.raises(SystemExit) as end:
        commandline.run_script(train.main)
    error = capsys.readouterr().err.strip()
    assert end.value.code == 2 and message in error and error.count("\n") == 0, error
    assert (tmp_path / "full" / "log.jsonl").read_text() == "mine"
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file() and path.name != ".lock"]


def test_train_as_a_program_reports_errors_without_a_traceback(tmp_path):
    script = Path(train.__file__)
    result = subprocess.run([sys.executable, script, "--stage", "1", "--model", tmp_path],
                            capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2 and "Traceback" not in result.stderr and result.stderr.startswith("error:")
