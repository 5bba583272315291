"""What a training run survives: kills at any moment, losses that are not finite, a full disk, a second run."""

import json
import multiprocessing
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

import ablations
import adversarial
import commandline
import dmd
import evaluate
import quick_train
import report
import shapes
import tiny
import train
import weights
from ablations import Ablation, Arm
from commandline import UserError
from conftest import read_state
from networks import Arithmetic
from pipeline import TINY
from prompts import CachedText

STAGE1 = ("--stage", 1, "--iterations", 12, "--resume")
STAGE2 = ("--stage", 2, "--iterations", 12, "alone=1", "warmup=1", "--resume")


def busy(*words):
    """A small run that writes all the time: a state and a line of the log each iteration, a sheet every second."""
    train.SAVE_SECONDS, train.LOG_EVERY, train.SHEET_EVERY = 0, 1, 2
    report.write_metrics = lambda *arguments: None
    commandline.run_script(lambda: quick_train.run("--batch", 2, *words))


def killed_at_random(work, *words, kills, within=(0.5, 2), seed=0):
    """Call work(*words) again and again: it is killed after a random time, so many times, and then left to its end.

    Each is a fork of this process, which has all libraries loaded. Returns how many of them were killed at work.
    """
    moments, fork, killed = random.Random(seed), multiprocessing.get_context("fork"), 0
    for life in range(kills + 1):
        process = fork.Process(target=work, args=words)
        process.start()
        process.join(moments.uniform(*within) if life < kills else None)
        killed += process.is_alive()
        process.kill()
        process.join()
    assert process.exitcode == 0
    return killed


def files(run):
    """What a run leaves, but for the log and the form of its state: {name: bytes}."""
    return {str(file.relative_to(run)): file.read_bytes() for file in run.rglob("*")
            if file.is_file() and file.name not in ("log.jsonl", ".lock") and "state-" not in file.parent.name}


@pytest.mark.parametrize("words", [STAGE1, (*STAGE1, "--lora", 2), STAGE2, (*STAGE2, "--lora", 2)],
                         ids=["stage 1", "stage 1, adapters", "stage 2", "stage 2, adapters"])
def test_a_run_that_was_killed_again_and_again_leaves_the_bytes_of_one_that_was_not(words, two_steps, tmp_path):
    words += ("--student", two_steps, "--reference", two_steps) if "alone=1" in words else ()
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    killed_at_random(busy, *words, "--out", whole, kills=0)
    assert killed_at_random(busy, *words, "--out", killed, kills=3)
    one, other = files(whole), files(killed)
    assert one.keys() == other.keys() and [name for name in one if one[name] != other[name]] == []
    one, other = read_state(whole), read_state(killed)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert len(list(killed.glob("state-*"))) == 1 and (killed / "sheet-000012.png").exists()


def encode(folder, prompts):
    CachedText(folder, TINY, Arithmetic(torch.device("cpu"), torch.float32)).encode_all(prompts, batch=3)


def test_text_whose_encoding_was_killed_again_and_again_has_the_bytes_of_one_that_was_not(tmp_path):
    prompts = set(shapes.draw_captions(300, torch.Generator().manual_seed(0))[0])
    killed_at_random(encode, tmp_path / "whole", prompts, kills=0)
    assert killed_at_random(encode, tmp_path / "killed", prompts, kills=8, within=(0.1, 0.5))
    one, other = files(tmp_path / "whole"), files(tmp_path / "killed")
    assert len(one) == len(prompts) and one == other


def ablate(folder):
    """A small `evaluate.py ablate` of both stages; its own runs save each iteration."""
    few = "--iterations 3 --batch 2"
    arms = {"one": Arm(f"--stage 1 {few}"), "two": Arm(f"--stage 2 {few}", start=f"--stage 1 {few}")}
    for owner, name, value in (*quick_train.BARE, (train, "SAVE_SECONDS", 0), (train, "LOG_EVERY", 1),
                               (shapes, "THOROUGH", {"captions": 6, "samples": 2, "renders": 64, "draws": 2}),
                               (ablations, "REFERENCES", {f"--stage 1 {few}": arms["one"]}),
                               (ablations, "ABLATIONS", {"gate": Ablation("Small", arms, [])}),
                               (sys, "argv", f"evaluate.py ablate --seeds 1 --dtype fp32 --out {folder}".split())):
        setattr(owner, name, value)
    commandline.run_script(evaluate.main)


def test_ablations_that_were_killed_again_and_again_measure_what_others_do(tmp_path):
    killed_at_random(ablate, tmp_path / "whole", kills=0)
    assert killed_at_random(ablate, tmp_path / "killed", kills=4, within=(0.5, 4))
    one, other = ({file.relative_to(out): json.loads(file.read_text()) | {"took": None}
                   for file in out.glob("measured/*.json")} for out in (tmp_path / "whole", tmp_path / "killed"))
    assert len(one) == 2 and one == other
    one, other = files(tmp_path / "whole" / "runs"), files(tmp_path / "killed" / "runs")
    assert [name for name in one if one[name] != other.get(name)] == [] and one.keys() == other.keys()


def test_sheets_and_their_number_do_not_change_what_is_trained(tmp_path):
    killed_at_random(busy, *STAGE1[:3], 4, "--out", tmp_path / "sheets", kills=0)
    quick_train.run("--bare", "--batch", 2, *STAGE1[:3], 4, "--out", tmp_path / "none")
    one, other = read_state(tmp_path / "sheets"), read_state(tmp_path / "none")
    assert (tmp_path / "sheets" / "sheet-000004.png").exists() and not list((tmp_path / "none").glob("sheet*"))
    assert all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------------------------------------- not finite

def spoiled(monkeypatch, which, value, steps):
    """Stage I whose fake score (0) or student (1) has a loss of `value` more, at these of its iterations."""
    honest, calls = dmd.iteration, []

    def iteration(*inputs):
        calls.append(0)
        for i, loss in enumerate(honest(*inputs)):
            yield loss + value * loss if i == which and len(calls) - 1 in steps else loss

    monkeypatch.setattr(dmd, "iteration", iteration)


def stage1(out, iterations, *words):
    quick_train.run("--bare", "--stage", 1, "--iterations", iterations, "--out", out, *words)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("network", ["fake", "student"])
def test_a_loss_that_is_not_finite_is_never_applied_and_the_log_counts_it(network, value, tmp_path, monkeypatch):
    runs = []
    monkeypatch.setattr(train, "Run", lambda *inputs, make=train.Run: runs.append(make(*inputs)) or runs[-1])
    stage1(tmp_path / "one", 1)
    spoiled(monkeypatch, ["fake", "student"].index(network), value, steps=[1])
    stage1(tmp_path / "two", 2)
    one, two = (run.networks[network].state_dict() for run in runs)
    assert all(torch.equal(one[name], two[name]) for name in one)
    steps = [{state["step"].item() for state in run.optimizers[f"{network}_adamw"].state.values()} for run in runs]
    assert steps == [{1}, {1}]
    assert json.loads((tmp_path / "two" / "log.jsonl").read_text().splitlines()[-1])["skipped"] == 1
    monkeypatch.undo()
    assert train.parallel.read_header(tmp_path / "two") is None  # its state would be of weights that gave no loss


def test_a_run_ends_after_five_iterations_that_are_not_finite_and_says_where(tmp_path, monkeypatch):
    stage1(tmp_path / "run", 1)
    before = read_state(tmp_path / "run")
    spoiled(monkeypatch, 1, float("nan"), steps=range(100))
    with pytest.raises(UserError) as error:
        stage1(tmp_path / "run", 100, "--resume")
    for words in ("the last step 6", "σ 0", "prompts '", "Last good state: of stage 1, step 1", "lower learning rates"):
        assert words in str(error.value)
    after = read_state(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_stage_2_and_stage_0_skip_what_is_not_finite_too(two_steps, tmp_path, monkeypatch):
    monkeypatch.setattr(adversarial, "multilevel_loss", lambda logits, label: logits[0].sum() * float("nan"))
    with pytest.raises(UserError, match="5 iterations in a row"):
        quick_train.run("--bare", "--stage", 2, "--student", two_steps, "--reference", two_steps, "--out",
                        tmp_path / "run")
    monkeypatch.setattr(tiny, "text_loss", lambda network, generator: network.probes[0][0].weight.sum() / 0)
    with pytest.raises(UserError, match="5 iterations in a row"):
        monkeypatch.setattr(sys, "argv", f"train.py --stage 0 --dtype fp32 --out {tmp_path}/stage0".split())
        train.main()


# ------------------------------------------------------------------------------------ the disk, other runs, signals

@pytest.mark.parametrize("limit, what", [(40_000, "log.jsonl"), (10**6, "state")])
def test_a_full_disk_ends_in_one_line_and_the_state_before_is_whole(limit, what, tmp_path, capfd):
    """A disk on which no file may be larger than this."""
    out, fork = tmp_path / "run", multiprocessing.get_context("fork")
    stage1(out, 1)
    with open(out / "log.jsonl", "a") as log:
        log.write('{"run": "before", "step": 1}\n' * (39_900 // 29 - log.tell() // 29))

    def on_a_small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        busy(*STAGE1, "--batch", 4, "--out", out)

    process = fork.Process(target=on_a_small_disk)
    process.start()
    process.join()
    errors = [line for line in capfd.readouterr().err.splitlines() if "error: " in line]
    assert process.exitcode == 2 and len(errors) == 1 and what in errors[0], errors
    assert not list(out.rglob("*.part"))
    stage1(out, 2, "--resume")
    stage1(tmp_path / "whole", 2)
    whole, other = read_state(tmp_path / "whole"), read_state(out)
    assert all(torch.equal(whole[name], other[name]) for name in whole)


def test_two_runs_into_one_folder_are_refused_until_the_first_is_dead(tmp_path):
    out = tmp_path / "run"
    process = multiprocessing.get_context("fork").Process(target=busy, args=(*STAGE1[:3], 1000, "--out", out))
    process.start()
    wait_for(out / "log.jsonl")
    with pytest.raises(UserError, match="another run is writing there"):
        stage1(out, 1, "--resume")
    process.kill()
    process.join()
    with weights.alone_in(out):
        pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_also_before_the_first_save_and_says_how_to_go_on(number, tmp_path):
    process = subprocess.Popen([sys.executable, quick_train.__file__, "--bare", "--stage", "1", "--iterations", "1000",
                                "--out", tmp_path / "run"], stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "run" / "log.jsonl")
    process.send_signal(number)
    last = process.communicate(timeout=60)[1].splitlines()[-1]
    step = train.parallel.read_header(tmp_path / "run")["step"]
    assert process.returncode == 130 and last == f"stopped at step {step}; go on with --resume"


def wait_for(file, seconds=60):
    deadline = time.monotonic() + seconds
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_run_clears_away_its_own_unfinished_files_and_no_others(tmp_path):
    own = tmp_path / "fake" / f"model.safetensors.{'0f' * 8}.part", tmp_path / ".tmpAb12Cd"
    foreign = tmp_path / "film.part", tmp_path / ".tmp"
    (tmp_path / "fake").mkdir()
    for file in (*own, *foreign):
        file.write_text("")
    with weights.alone_in(tmp_path):
        assert not any(file.exists() for file in own) and all(file.exists() for file in foreign)
