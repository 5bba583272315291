"""train.py on the shipped model: what moves when, stop and resume, gradients that are not finite, what a run leaves."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import flow
import loop
import train
import weights
from cache import CachedSteps, new_cache
from commandline import UserError
from conftest import read_state, run_command, run_train
from lora import add_lora
from mmdit import load_mmdit
from pipeline import TINY, is_finished, load_pipeline
from prompts import draw_prompts

WEIGHT = "x_embedder.proj.weight"
QUICK = "--bare --dtype fp32 --batch 4".split()
RUNS = {  # by the name of their fixture; the turns of the last: discriminator, f, discriminator, f and student
    "two_steps": "--stage 1 --iterations 2".split(), "adapted": "--stage 1 --iterations 2 --lora 2".split(),
    "refined": "--stage 2 --iterations 4 --reference truth --pool 8 --discriminator-warmup 1 --discriminator-updates 1 "
               "--student-warmup 1 --objective adv+output+feature".split()}


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A run of Stage I with adapters."""
    out = tmp_path_factory.mktemp("runs") / "adapted"
    run_train(*RUNS["adapted"], "--out", out)
    return out


def watch_training(*words):
    """Train -> after each update all that is trained, {name: tensor}, and the update's losses."""
    after = []

    def end_step(run, norms, end=loop.Run.end_step, **values):
        after.append(({f"{key}/{name}": tensor.clone() for key, network in run.networks.items()
                       for name, tensor in network.state_dict().items()}, values))
        end(run, norms, **values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Run, "end_step", end_step)
        run_train(*words)
    return after


@pytest.fixture(scope="module")
def watched(two_steps, tmp_path_factory):
    """A run of Stage II: its folder, and what was watched."""
    out = tmp_path_factory.mktemp("runs") / "refined"
    return out, watch_training(*RUNS["refined"], "--student", two_steps, "--out", out)


@pytest.fixture(scope="module")
def refined(watched):
    return watched[0]


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory):
    """A run of Stage I, of 4 steps that are compared at all levels, with a line of the log every 2 iterations."""
    out = tmp_path_factory.mktemp("runs") / "four"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "LOG_EVERY", 2)
        run_train("--stage", 1, "--iterations", 3, "--steps", 4, "--windows", "whole", "--out", out)
    return out


def read_log(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def same(one, other):
    one, other = read_state(one), read_state(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------------------------------------------- stop and resume

@pytest.mark.parametrize("which", ["adapted", "refined"])
def test_a_run_that_was_stopped_and_resumed_ends_with_the_bits_and_the_log_of_one_that_was_not(
        which, two_steps, request, tmp_path, monkeypatch, capsys):
    """A stopped run reads all that is frozen again: a teacher that moved would show here, too."""
    whole, words = request.getfixturevalue(which), [*RUNS[which], *["--student", two_steps] * (which == "refined")]
    half = read_log(whole)[-1]["step"] // 2

    def interrupted(run, norms, end=loop.Run.end_step, **values):
        if run.step + 1 == half:
            signal.raise_signal(signal.SIGINT)
        end(run, norms, **values)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "end_step", interrupted)
        status, _, error = run_command(train.main, *QUICK, *words, "--out", tmp_path / "run", capsys=capsys)
    assert status == 130 and error.splitlines()[-1] == f"stopped at step {half}; continue with --resume"
    with open(tmp_path / "run" / "log.jsonl", "a") as log:
        log.write('{"run": "cut sh')  # by a machine that went off
    shutil.move(tmp_path / "run", tmp_path / "moved")
    run_train(*words, "--out", tmp_path / "moved", "--resume")
    assert same(whole, tmp_path / "moved")
    first, second = read_log(tmp_path / "moved")
    entry, = read_log(whole)
    assert (first["step"], second["step"]) == (half, 2 * half)
    for name in entry.keys() - {"run", "step", "seconds"}:  # a line has the mean since the line before
        assert entry[name] == pytest.approx((first[name] + second[name]) / 2, rel=1e-5), name


def test_a_run_that_was_killed_ends_with_the_same_bits(tmp_path):
    """Killed at any moment, by a signal that it cannot see, while it saves all the time."""
    program = "import loop, train; loop.SAVE_SECONDS, loop.LOG_EVERY = 0, 1; train.main()"
    words = [*QUICK, "--stage", "1", "--out", str(tmp_path / "killed")]
    process = subprocess.Popen([sys.executable, "-c", program, *words], stderr=subprocess.DEVNULL,
                               cwd=TINY.parent, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / "state.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(torch.rand(()).item())
    process.kill()
    process.wait()
    steps = json.loads((tmp_path / "killed" / "state.json").read_text())["step"] + 1
    run_train("--stage", 1, "--iterations", steps, "--out", tmp_path / "killed", "--resume")
    run_train("--stage", 1, "--iterations", steps, "--out", tmp_path / "whole")
    assert same(tmp_path / "whole", tmp_path / "killed")
    assert len(list((tmp_path / "killed").glob("state-*"))) == 1
    assert read_log(tmp_path / "killed")[-1]["step"] == steps


def test_a_finished_run_does_not_count_as_finished_while_its_files_are_overwritten(two_steps, tmp_path, monkeypatch):
    run = shutil.copytree(two_steps, tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(weights, "write_safetensors", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        run_train(*RUNS["two_steps"], "--out", run, "--resume")
    assert is_finished(two_steps) and not is_finished(run)


def test_ctrl_c_stops_at_once_what_comes_after_the_last_update(two_steps, tmp_path, capsys):
    run, before = shutil.copytree(two_steps, tmp_path / "run"), signal.getsignal(signal.SIGINT)
    run_command(train.main, *QUICK, *RUNS["two_steps"], "--resume", "--out", run, capsys=capsys)
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_a_run_is_not_resumed_with_other_settings_which_the_message_names_nor_by_the_other_stage(two_steps):
    with pytest.raises(UserError, match="seed was 0, is now 1; alpha was 0.9, is now 0.5"):
        run_train("--stage", 1, "--iterations", 3, "--alpha", 0.5, "--seed", 1, "--resume", "--out", two_steps)
    with pytest.raises(UserError, match="holds no run of stage 2"):
        run_train(*RUNS["refined"], "--student", two_steps, "--resume", "--out", two_steps)


# -------------------------------------------------------------------------------------------------- what moves when

def test_stage_1_moves_all_weights_of_student_and_fake_score_but_not_the_positions(two_steps):
    state, teacher = read_state(two_steps), load_mmdit(TINY).state_dict()
    for network in ("student", "fake"):
        still = {name for name, tensor in teacher.items() if torch.equal(tensor, state[f"{network}/{name}"])}
        assert "pos_embed" in still and len(still) <= 3, still  # the last block's text has a bias that nothing reads


def test_the_fake_score_moves_before_the_student_looks_at_it_and_in_the_average_late_steps_weigh_more(tmp_path):
    """Without guidance G's first loss is 0 for as long as F is the teacher that it starts from."""
    (first, losses), (second, _) = watch_training("--stage", 1, "--iterations", 2, "--alpha", 0, "--out", tmp_path)
    assert losses["student"] > 0.01
    first, second, average = first[f"student/{WEIGHT}"], second[f"student/{WEIGHT}"], second[f"average/{WEIGHT}"]
    torch.testing.assert_close(average, (1 * first + 3 * second) / 4)  # shares of 1 and 3/4
    assert not torch.equal(first, second)


def test_each_turn_of_stage_2_moves_what_it_should(watched):
    after = [tensors for tensors, _ in watched[1]]
    moved = [{name for name in now if not torch.equal(before[name], now[name])}
             for before, now in zip(after[:-1], after[1:])]
    networks = [{name.split("/")[0] for name in names} for names in moved]
    assert networks == [{"compensator", "pool"}, {"heads"}, {"compensator", "pool", "student"}]
    blocks = {name.split(".")[1] for name in moved[2] if name.startswith("student/joint_blocks")}
    assert blocks == {"0", "5", "6", "7", "8", "9", "10", "11"}  # 1-4 run in the first step alone, without gradient
    assert f"student/{WEIGHT}" in moved[2] and "student/pos_embed" not in moved[2]


def test_at_once_and_recompute_change_nothing_but_rounding(refined, two_steps, tmp_path):
    """Gradients are compared by Adam's squares of them: an update is their sign, and rounding may turn a small one. For
    Stage I this is test_parallel.py's."""
    run_train(*RUNS["refined"], "--student", two_steps, "--at-once", 2, "--recompute", "--out", tmp_path)
    one, other = read_state(refined), read_state(tmp_path)
    for name in (name for name in one if name.endswith("exp_avg_sq")):
        assert (one[name] - other[name]).norm() <= 5e-3 * one[name].norm(), name
    (one,), (other,) = read_log(refined), read_log(tmp_path)
    for name in one.keys() - {"run", "seconds", "AUC"}:  # the last is of pairs within a micro-batch
        assert one[name] == pytest.approx(other[name], rel=1e-3), name


# ------------------------------------------------------------------------------------------------------- not finite

def test_gradients_that_are_not_finite_move_nothing_are_counted_and_end_the_run_when_five_come_in_a_row(tmp_path):
    """After a first update with a rate of 1e30 the student's samples are not finite."""
    words = "--stage", 1, "--student-lr", 1e30, "--batch", 1, "--out", tmp_path
    run_train(*words, "--iterations", 3)
    entry, = read_log(tmp_path)
    assert entry["step"] == 3 and entry["skipped"] == 2
    state = read_state(tmp_path)
    assert all(tensor == 1 for name, tensor in state.items() if name.endswith("/step"))
    assert all(tensor.isfinite().all() for tensor in state.values())
    with pytest.raises(UserError, match="5 updates in a row .* the last in step 8; start again with lower"):
        run_train(*words, "--iterations", 100, "--resume")


# ------------------------------------------------------------------------------------------------- what a run leaves

def test_the_log_has_a_line_every_so_often_and_at_the_end(four_steps, refined):
    names = {"run", "step", "fake", "student", "fake_norm", "norm", "guided", "seconds"}
    assert [(entry["step"], entry.keys()) for entry in read_log(four_steps)] == [(2, names), (3, names)]
    entry, = read_log(refined)
    assert entry.keys() == {"run", "step", "discriminator", "AUC", "discriminator_norm", "adversarial", "output",
                            "feature", "norm", "seconds"}


@torch.no_grad()
@pytest.mark.parametrize("which", RUNS)
def test_the_written_student_needs_no_flags_and_samples_what_the_trained_network_does(which, request):
    run = request.getfixturevalue(which)
    state, network, cache, key = read_state(run), load_mmdit(TINY), None, "student" if which == "refined" else "average"
    if which == "adapted":
        network, adapters = add_lora(network, 2, everywhere=True)
        for i, adapter in enumerate(adapters):
            adapter.copy_(state[f"{key}/{i}"])
    else:
        network.load_state_dict({name: state[f"{key}/{name}"] for name in network.state_dict()})
    if which == "refined":
        cache = new_cache((1, 4), 128)
        cache.compensator.load_state_dict({name: state[f"compensator/{name}"]
                                           for name in cache.compensator.state_dict()})
    student = load_pipeline(run)
    assert student.sigmas.tolist() == [1, 0.75, 0] and student.guidance == 1
    prompts = ["a red circle", "a large shape"]
    noise = flow.initial_noise(student.latent_shape(), [1, 2])
    sampled = flow.sample(CachedSteps(network, cache), noise, student.sigmas, student.text(prompts))
    torch.testing.assert_close(student.latents(prompts, [1, 2]), sampled, atol=1e-4, rtol=1e-4)


def test_stage_1_goes_on_from_a_run_with_a_cache_whose_f_and_later_steps_learn(two_steps, tmp_path):
    run_train("--stage", 1, "--iterations", 1, "--start", two_steps, "--cache", "1-4", "--out", tmp_path)
    before, after = read_state(two_steps), read_state(tmp_path)
    moved = {name for name in after if name.startswith(("student/", "fake/")) and not torch.equal(before[name], after[name])}
    assert {name.split("/")[0] for name in moved} == {"student", "fake"}
    assert after["compensator/image.fc2.weight"].any() and after["compensator/text.fc2.weight"].any()
    difference = before[f"average/{WEIGHT}"] - after[f"student/{WEIGHT}"]
    assert difference.abs().max() < 1.1e-4  # one update from where the other run ended
    student = load_pipeline(tmp_path)
    assert student.cache.blocks == (1, 4) and student.images(["a circle"], [0]).isfinite().all()
    f = student.cache.compensator.image.fc2.weight
    assert torch.equal(f, after["average compensator/image.fc2.weight"])
    run_train("--stage", 2, "--student", tmp_path, "--iterations", 1, "--objective", "output", "--compensator-lr", 1e-9,
              "--out", tmp_path / "refined")
    assert (load_pipeline(tmp_path / "refined").cache.compensator.image.fc2.weight - f).abs().max() < 1e-6 < f.abs().max()


def test_the_prompts_of_a_pool_are_among_those_that_are_encoded_beforehand(tmp_path, monkeypatch):
    words = [f"prompt {i}" for i in range(100)]
    (tmp_path / "prompts.txt").write_text("\n".join(words))
    encoded = set()
    monkeypatch.setattr(train.EncodedText, "encode", lambda _, prompts: encoded.update(prompts))
    train.open_prompts(SimpleNamespace(model="an/official-model", prompts=tmp_path / "prompts.txt", text_cache=tmp_path,
                                       iterations=1, batch=2, pool=50, seed=3, device=torch.device("cpu"), dtype="fp32"))
    assert set(draw_prompts(words, 50, loop.seeded(3, -1))) <= encoded


def test_stage_2_takes_a_student_of_four_steps_and_a_model_as_reference_and_a_convnext(four_steps, two_steps, backbone, tmp_path):
    run_train("--stage", 2, "--iterations", 2, "--discriminator-warmup", 1, "--student-warmup", 0, "--student",
              four_steps, "--reference", two_steps, "--cache", "8-11", "--lora", 2, "--pool", 0, "--redraw", 3,
              "--first-step", "--backbone", backbone, "--out", tmp_path)
    assert 0 < read_log(tmp_path)[0]["redraw"] < 3
    student = load_pipeline(tmp_path)
    assert student.sigmas.tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0]) and student.cache.blocks == (8, 11)
    assert student.images(["a circle"], [0]).isfinite().all()


def test_distillation_alone_reads_neither_backbone_nor_reference(two_steps, tmp_path):
    run_train("--stage", 2, "--iterations", 1, "--objective", "output", "--backbone", "nowhere", "--reference",
              "nowhere", "--student", two_steps, "--out", tmp_path)
    entry, = read_log(tmp_path)
    assert entry.keys() == {"run", "step", "output", "norm", "seconds"} and is_finished(tmp_path)
