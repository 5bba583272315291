"""Many processes: what two of them train is what one trains on the same batch; a state fits any number; a death ends
all."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageReader, load

import parallel
import pipeline
import quick_train
from commandline import UserError

FULL = "--stage 1 --iterations 2".split()
ADAPTERS = "--stage 1 --iterations 2 --lora 2".split()
REFINED = "--stage 2 --iterations 4 --objective adv+output+feature --lora 0 alone=1 warmup=1".split()
RUNS = {"full": FULL, "adapters": ADAPTERS, "refined": REFINED}


def torchrun(*words, wait=True):
    """Two processes of quick_train.py."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d",
               "--rdzv-endpoint=localhost:0", quick_train.__file__, "--bare", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    if wait:
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output
    return process


def alone(*words):
    """The same in this process."""
    quick_train.run("--bare", *words)


@pytest.fixture(scope="module")
def pairs(two_steps, tmp_path_factory):
    """Two folders, {what: run}: by one process with two samples at once, by two processes with one each."""
    folder = tmp_path_factory.mktemp("parallel")
    for name, flags in RUNS.items():
        flags = flags + (["--student", two_steps, "--reference", two_steps] if flags[1] == "2" else [])
        alone(*flags, "--at-once", 2, "--out", folder / "one" / name)
        torchrun(*flags, "--at-once", 1, "--out", folder / "two" / name)
    return folder


def losses(run):
    """What the log says last, but for the pairs told apart: those are of images that one process has."""
    entry = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    return {name: value for name, value in entry.items() if name not in ("run", "seconds", "told apart")}


def alike(one, two):
    """The losses to rounding; the norm is of a gradient after updates by Adam, which are signs at first: there rounding
    grows."""
    return one.pop("norm") == pytest.approx(two.pop("norm"), rel=1e-3) and one == pytest.approx(two, rel=1e-4)


def tensors(run):
    """All tensors of a state, whoever wrote which part of them."""
    reader = HuggingFaceStorageReader(str(run / json.loads((run / "state.json").read_text())["tensors"]))
    found = {name: torch.zeros(meta.size, dtype=meta.properties.dtype)
             for name, meta in reader.read_metadata().state_dict_metadata.items()}
    with parallel.quiet():
        load(found, storage_reader=reader)
    return found


def check_alike(one, two):
    """Two states of runs that saw the same batches, but for rounding."""
    one, two = tensors(one), tensors(two)
    assert one.keys() == two.keys()
    off = {}  # by name: which weights differ; where a gradient is next to nothing, its sign is a matter of rounding
    for name in one:
        difference = one[name] - two[name]
        if name.endswith("exp_avg_sq"):  # of the gradients; rounding grows, as in `alike`
            assert difference.norm() <= 0.03 * one[name].norm() + 1e-12, name
        elif not name.endswith(("step", "exp_avg")):
            off[name] = (difference.abs() > 5e-5).flatten()  # updates are of 2e-4 to 2e-3
            assert off[name].sum() <= max(1, 0.1 * len(off[name])), name  # of any tensor, most are the same;
    assert torch.cat(list(off.values())).float().mean() < 1e-3            # of all weights, all but one in a thousand


@pytest.mark.parametrize("what", RUNS)
def test_two_processes_train_what_one_trains_on_the_same_batch(pairs, what):
    one, two = pairs / "one" / what, pairs / "two" / what
    assert alike(losses(one), losses(two))
    check_alike(one, two)


def test_the_student_of_two_processes_is_whole_and_opens_like_any_other(pairs):
    one, two = (load_file(pairs / n / "full/transformer/diffusion_pytorch_model.safetensors") for n in ("one", "two"))
    assert {name: t.shape for name, t in one.items()} == {name: t.shape for name, t in two.items()}
    assert pipeline.load_pipeline(pairs / "two" / "full").sigmas().tolist() == [1, 0.75, 0]


def test_a_process_that_dies_ends_the_other_at_once_and_two_or_one_go_on_from_the_state(pairs, tmp_path):
    out, copy = tmp_path / "out", tmp_path / "copy"
    torchrun("--stage", 1, "--iterations", 1, "--out", out)
    assert len(list((out / "state-000001").iterdir())) == 2
    log = (out / "log.jsonl").read_text()
    process = torchrun("--stage", 1, "--iterations", 1000, "--out", out, "--resume", wait=False)
    try:
        deadline = time.monotonic() + 120
        while (out / "log.jsonl").read_text() == log:  # it trains
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        os.kill(children[-1], signal.SIGKILL)
        process.communicate(timeout=15)
        assert process.returncode != 0 and not any(Path(f"/proc/{child}").exists() for child in children)
    finally:
        process.kill()
    shutil.copytree(out, copy)
    torchrun(*FULL, "--out", out, "--resume")
    alone(*FULL, "--out", copy, "--resume")
    for run in (out, copy):
        check_alike(run, pairs / "one" / "full")


def test_the_batch_is_shared_out_whole_and_stays_in_order():
    parts = parallel.micro_batches(8, at_once=2)
    assert [own.tolist() for own, _ in parts] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert torch.equal(torch.cat([everyone for _, everyone in parts]), torch.arange(8))
    assert [own.tolist() for own, _ in parallel.micro_batches(3)] == [[0, 1, 2]]
    with pytest.raises(UserError, match="batch of 8 cannot be shared out among 1 processes, 3 samples at once"):
        parallel.micro_batches(8, at_once=3)
