"""What a training run survives: kills at any moment, losses that are not finite, a full disk, a second run beside it."""

import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

import adversarial
import commandline
import dmd
import pipeline
import quick_train
import report
import train
import weights
from commandline import UserError
from conftest import read_state

STAGE1 = ("--stage", 1, "--iterations", 12, "--resume")
STAGE2 = ("--stage", 2, "--iterations", 12, "alone=1", "warmup=1", "--resume")


def busy(*words):
    """A small run that writes all the time: a state and a line of the log each iteration, a sheet every second."""
    train.SAVE_SECONDS, train.LOG_EVERY, train.SHEET_EVERY = 0, 1, 2
    report.write_metrics = lambda *arguments: None
    commandline.run_script(lambda: quick_train.run("--batch", 2, *words))


def killed_at_random(out, words, kills, seed=0):
    """Start a run as often as it takes: it is killed after a random time, so many times, and then left to its end.

    Each is a fork of this process, which has all libraries loaded. Returns how many of them were killed at work.
    """
    moments, fork, killed = random.Random(seed), multiprocessing.get_context("fork"), 0
    for life in range(kills + 1):
        process = fork.Process(target=busy, args=(*words, "--out", out))
        process.start()
        process.join(moments.uniform(0.5, 2) if life < kills else None)
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
    killed_at_random(whole, words, kills=0)
    assert killed_at_random(killed, words, kills=3)
    one, other = files(whole), files(killed)
    assert one.keys() == other.keys() and [name for name in one if one[name] != other[name]] == []
    one, other = read_state(whole), read_state(killed)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert len(list(killed.glob("state-*"))) == 1 and (killed / "sheet-000012.png").exists()
