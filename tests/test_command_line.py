"""What a user gets wrong ends in one line that says so, and pictures go where they should."""

import io
import os
import subprocess
import sys

import pytest
from PIL import Image

import commandline
import evaluate
import sample
import train
from conftest import run_command
from experiments import ablations, explain, reuse, score, sheet, speed
from pipeline import TINY
from tinyworld import make

ROOT = TINY.parent
PROMPT = ["--prompt", "a circle"]


@pytest.fixture
def fails(two_steps, tmp_path, monkeypatch, capsys):
    """fails(main, words, what) runs a command in a folder without runs; it ends in one line that holds `what`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "log.jsonl").write_text("mine")
    (tmp_path / "prompts.txt").write_text("a circle\n")

    def run(main, words, what):
        words = [word.format(student=two_steps, tiny=TINY) for word in words.split()]
        status, out, error = run_command(main, *words, capsys=capsys)
        assert status == 2 and error.startswith("error: ") and error.count("\n") == 1 and what in error, error
        assert (tmp_path / "file").read_text() == (tmp_path / "full" / "log.jsonl").read_text() == "mine"
        assert len(list((tmp_path / "full").iterdir())) == 1
    return run


@pytest.mark.parametrize("words, what", [
    ("--preset tiny", "--stage is missing"),
    ("--stage 3", "invalid choice"),
    ("--stage 1 --colour red", "unrecognized arguments: --colour"),
    ("--stage 1 --iter 5", "unrecognized arguments: --iter"),
    ("--stage 1 --cache 8-12", "counted from 0 to 11"),
    ("--stage 1 --start nowhere", "nowhere: no such file or folder"),
    ("--stage 1 --start {tiny}", "tiny-sd3/fake: no such file or folder"),
    ("--stage 1 --start {student} --lora 2", "leave --lora out"),
    ("--stage 2 --alpha 0.9", "unrecognized arguments: --alpha"),
    ("--stage 1 --student-lr nan", "nan is not a number"),
    ("--stage 1 --student-lr 0", "0 is not a number"),
    ("--stage 1 --guidance -1", "-1 is not a number from 0"),
    ("--stage 1 --alpha inf", "inf is not a number"),
    ("--stage 1 --iterations 0", "0 is not a number from 1"),
    ("--stage 1 --batch 2.5", "2.5"),
    ("--stage 1 --seed -1", "-1 is not a number from 0"),
    ("--stage 1 --seed 100000000000000", "is not a number from 0 to"),
    ("--stage 1 --device cuda:99", "device cuda:99 is not available"),
    ("--stage 1 --device nonsense", "device nonsense is not available"),
    ("--stage 1 --resume --out nowhere", "nowhere holds no run"),
    ("--stage 1 --resume --out full", "full holds no run"),
    ("--stage 1 --out full", "full is not empty"),
    ("--stage 1 --out file", "file: cannot be written to"),
    ("--stage 1 --out file/run", "file/run: cannot be written to"),
    ("--stage 1 --model nowhere --prompts prompts.txt", "nowhere: no such file or folder"),
    ("--stage 1 --model {tiny}/transformer", "give --prompts FILE"),
    ("--stage 1 --prompts nowhere.txt", "nowhere.txt: cannot be read"),
    ("--stage 1 --batch 5 --at-once 2", "a batch of 5 cannot be divided"),
    ("--stage 2", "there is none in runs/stage1: run `python train.py --stage 1` "),
    ("--stage 2 --steps 4", "run `python train.py --stage 1 --steps 4` "),
    ("--stage 2 --student nowhere", "nowhere: no such file or folder"),
    ("--stage 2 --student {tiny}", "be read as a student of Stage I"),
    ("--stage 2 --student {student} --steps 4", "makes 2 steps"),
    ("--stage 2 --student {student} --cache 5", "5 is not A-B"),
    ("--stage 2 --student {student} --cache 5-2", "cached blocks 5-2"),
    ("--stage 2 --student {student} --cache 8-12", "counted from 0 to 11"),
    ("--stage 2 --student {student} --cache none --objective output", "need a --cache"),
    ("--stage 2 --student {student} --cache none --correction prune", "need a --cache"),
    ("--stage 2 --student {student} --correction none --objective feature", "has none"),
    ("--stage 2 --student {student} --correction none --cache 0-11 --lora 4", "there is nothing to train"),
    ("--stage 2 --student {student} --backbone nowhere", "nowhere: no such file or folder"),
    ("--stage 2 --student {student} --backbone {tiny}", "holds no open_clip_model.safetensors"),
    ("--stage 2 --student {student} --reference truth --model {tiny}/transformer", "truth is for the tiny world"),
    ("--stage 2 --student {student} --reference truth --pool 0", "truth needs a --pool"),
    ("--stage 2 --student {student} --reference truth --redraw 1", "--redraw needs a model"),
    ("--stage 2 --student {student} --pool 8", "holds at least a --batch"),
])
def test_train_refuses_what_makes_no_sense_in_one_line(words, what, fails):
    fails(train.main, words, what)


@pytest.mark.parametrize("words, what", [
    ("", "nothing to draw"),
    ("--colour red", "unrecognized arguments: --colour"),
    ("--prompt x --size 72", "72 is not H or HxW"),
    ("--prompt x --size 64x0", "64x0 is not H or HxW"),
    ("--prompt x --steps 0", "0 is not a number from 1"),
    ("--prompt x --guidance nan", "nan is not a number"),
    ("--prompt x --seed -1", "-1 is not a number"),
    ("--prompt x --dtype int8", "invalid choice"),
    ("--prompt x --out photo.jpg", "give FILE.png for one image"),
    ("--prompt x --prompt y --out both.png", "give FILE.png for one image"),
    ("--prompt x --count 2 --out both.png", "give FILE.png for one image"),
    ("--prompt x --out file/a.png", "cannot be written"),
    ("--prompt x --out file", "cannot be written"),
    ("--prompts nowhere.txt", "nowhere.txt: cannot be read"),
    ("--prompts file", "prompts are read from .txt"),
    ("--prompt x --model nowhere", "nowhere: no such file or folder"),
    ("--prompt x --cache 5-2", "cached blocks 5-2"),
    ("--prompt x --cache 2-5 --steps 1", "at least 2 steps"),
])
def test_sample_refuses_what_makes_no_sense_in_one_line(words, what, fails):
    fails(sample.main, words, what)


@pytest.mark.parametrize("main, words, what", [
    (evaluate.main, "", "command"),
    (evaluate.main, "beauty", "invalid choice"),
    (evaluate.main, "quality nowhere", "nowhere: no such file or folder"),
    (evaluate.main, "quality --captions 1 --samples 1 --steps 1 --guidance 1", "1 is not a number from 2"),
    (evaluate.main, "quality --cache 8-12", "counted from 0 to 11"),
    (evaluate.main, "quality --reference nowhere", "nowhere: no such file or folder"),
    (evaluate.main, "quality --prompts nowhere.txt", "nowhere.txt: cannot be read"),
    (evaluate.main, "quality --out file", "file: cannot be written to"),
    (make.main, "", "required: --out"),
    (make.main, "--out full", "full is not empty"),
    (make.main, "--out new --updates 0", "0 is not a number from 1"),
    (make.main, "--out new --start nowhere", "nowhere: no such file or folder"),
    (ablations.main, "--only beauty", "invalid choice"),
    (ablations.main, "--out file", "file: cannot be written to"),
    (explain.main, "nowhere", "nowhere: no such file or folder"),
    (explain.main, "{tiny}", "no student made by train.py"),
    (reuse.main, "nowhere", "nowhere: no such file or folder"),
    (score.main, "nowhere", "nowhere: holds no fake score"),
    (sheet.main, "nowhere", "nowhere: no such file or folder"),
    (speed.main, "--cache 8-12", "counted from 0 to 11"),
    (speed.main, "--cache none --rounds 1", "--cache"),
])
def test_the_other_commands_refuse_what_makes_no_sense_in_one_line(main, words, what, fails):
    fails(main, words, what)


# ----------------------------------------------------------------------------------------- consoles and launchers

def test_a_launcher_that_sets_a_local_rank_alone_gets_one_process_and_a_program_has_no_traceback(tmp_path):
    words = sys.executable, "train.py", "--stage", "1", "--prompts", "nowhere.txt", "--out", tmp_path
    ended = subprocess.run(words, capture_output=True, cwd=ROOT, env={**os.environ, "LOCAL_RANK": "0"})
    assert (ended.returncode, ended.stdout) == (2, b"")
    assert ended.stderr == b"error: nowhere.txt: cannot be read (No such file or directory)\n"


def test_a_reader_that_goes_away_leaves_no_traceback():
    """`python sample.py --help | head -1`, where head is gone before the first line."""
    read, write = os.pipe()
    os.close(read)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    ended = subprocess.run([sys.executable, "sample.py", "--help"], stdout=write, stderr=subprocess.PIPE, cwd=ROOT,
                           env=buffered)
    os.close(write)
    assert not ended.stderr


def test_help_with_the_defaults_of_the_preset_is_shown_on_a_console_that_has_ascii_alone(monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", console)
    monkeypatch.setattr(sys, "argv", "train.py --stage 1 --help".split())
    with pytest.raises(SystemExit) as end:
        commandline.run_script(train.main)
    console.flush()
    shown = " ".join(console.buffer.getvalue().decode("ascii").split())
    assert end.value.code == 0 and "--alpha" in shown and "--backbone" not in shown and "(default: 0.9)" in shown


# ------------------------------------------------------------------------------------------------------ pictures

def test_pictures_are_numbered_the_same_for_a_seed_and_replace_those_of_an_older_longer_run(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red circle\n\na blue square\n")
    out = tmp_path / "out"
    words = "--prompts", tmp_path / "prompts.txt", "--steps", 1, "--guidance", 1
    assert run_command(sample.main, *words, "--count", 2, "--seed", 3, "--out", out, capsys=capsys)[0] == 0
    assert sorted(file.name for file in out.iterdir()) == ["000.png", "001.png", "002.png", "003.png", "sheet.png"]
    of_seed_4 = (out / "001.png").read_bytes()
    for name in ("cat.png", "1st.png", "notes.txt", "1000.png"):  # the last is of a run of more than 1,000
        (out / name).write_text("old")
    status, said, _ = run_command(sample.main, *words, "--seed", 4, "--out", out, capsys=capsys)
    assert status == 0 and said.split() == [str(out / name) for name in ("000.png", "001.png", "sheet.png")]
    assert sorted(file.name for file in out.iterdir()) == ["000.png", "001.png", "1st.png", "cat.png", "notes.txt",
                                                           "sheet.png"]
    assert (out / "000.png").read_bytes() == of_seed_4 != (out / "001.png").read_bytes()
    assert Image.open(out / "000.png").size == (64, 64)


def test_one_picture_goes_to_a_file_of_any_size(tmp_path, capsys):
    file = tmp_path / "new" / "a.PNG"
    words = *PROMPT, "--steps", 1, "--guidance", 1, "--size", "32x48", "--out", file
    assert run_command(sample.main, *words, capsys=capsys)[:2] == (0, f"{file}\n")
    assert Image.open(file).size == (48, 32) and [*file.parent.iterdir()] == [file]


def test_a_mistake_of_ours_is_not_taken_for_one_of_the_user():
    with pytest.raises(KeyError):
        commandline.run_script(lambda: {}["a typo"])
