"""Many processes: two train what one trains on the same batch, and one goes on from their state."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch.distributed.checkpoint import HuggingFaceStorageReader, load

import parallel
from commandline import UserError
from conftest import run_train
from pipeline import TINY, load_pipeline


def tensors(run):
    """All tensors of a state, whoever wrote which part of them, and the last line of the log."""
    reader = HuggingFaceStorageReader(str(run / json.loads((run / "state.json").read_text())["tensors"]))
    found = {name: torch.zeros(meta.size, dtype=meta.properties.dtype)
             for name, meta in reader.read_metadata().state_dict_metadata.items()}
    load(found, storage_reader=reader)
    return found, json.loads((run / "log.jsonl").read_text().splitlines()[-1])


def check_alike(one, two):
    """Two runs saw the same batches, but for rounding. Their gradients are compared by Adam's squares of them: an
    update is their sign, and rounding may turn that of a small one."""
    (one, log_one), (two, log_two) = tensors(one), tensors(two)
    assert one.keys() == two.keys()
    for name in (name for name in one if name.endswith("exp_avg_sq")):
        assert (one[name] - two[name]).norm() <= 5e-3 * one[name].norm(), name
    weights = [name for name in one if name.startswith(("student/", "fake/"))]
    off = torch.cat([((one[name] - two[name]).abs() > 5e-5).flatten() for name in weights])  # updates: 1e-4 and 4e-4
    assert off.float().mean() < 1e-2
    for name in log_one.keys() - {"run", "seconds"}:
        assert log_one[name] == pytest.approx(log_two[name], rel=1e-3), name


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_two_processes_train_what_one_trains_and_one_goes_on_from_their_state(two_steps, tmp_path):
    """Stage I, with weights shared out by FSDP2, each process with a sample at once."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d",
               "--rdzv-endpoint=localhost:0", TINY.parent / "train.py", *"--bare --dtype fp32 --batch 4".split(),
               *"--stage 1 --iterations 2 --at-once 1 --out".split(), out]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("student:") == 1 and len(list((out / "state-000002").glob("*.safetensors"))) == 2
    check_alike(two_steps, out)
    trained = tensors(out)[0]
    assert all(torch.equal(tensor, trained[f"average/{name}"])
               for name, tensor in load_pipeline(out).mmdit.state_dict().items())

    alone = shutil.copytree(two_steps, tmp_path / "alone")
    for run in (alone, out):
        run_train("--stage", 1, "--iterations", 3, "--out", run, "--resume")
    check_alike(alone, out)


def test_each_process_takes_every_nth_row_of_the_batch_so_many_at_once_and_all_rows_are_taken(monkeypatch):
    assert [rows.tolist() for rows in parallel.micro_batches(3, at_once=0)] == [[0, 1, 2]]
    monkeypatch.setattr(parallel, "processes", lambda: 2)
    monkeypatch.setattr(parallel, "rank", lambda: 1)
    assert [rows.tolist() for rows in parallel.micro_batches(8, at_once=2)] == [[1, 3], [5, 7]]
    for batch, at_once, message in ((5, 0, "2 processes$"), (8, 3, "2 processes, 3 samples at once")):
        with pytest.raises(UserError, match=f"batch of {batch} cannot be divided among {message}"):
            parallel.micro_batches(batch, at_once)


def test_gradients_are_clipped_by_the_norm_of_all_together_and_small_ones_stay():
    def gradients(*values):
        parameters = [torch.nn.Parameter(torch.zeros(len(value))) for value in values]
        for parameter, value in zip(parameters, values):
            parameter.grad = torch.tensor(value)
        return [*parameters, torch.nn.Parameter(torch.zeros(2))]  # the last has no gradient

    large, small = gradients([3.0, 0.0], [4.0]), gradients([0.3, 0.0], [0.4])
    assert parallel.clip_gradients(large, 1.0).item() == pytest.approx(5)
    assert torch.cat([p.grad for p in large[:2]]).tolist() == pytest.approx([0.6, 0, 0.8], abs=1e-5)
    assert parallel.clip_gradients(small, 1.0).item() == pytest.approx(0.5)
    assert torch.cat([p.grad for p in small[:2]]).tolist() == pytest.approx([0.3, 0, 0.4])
    assert parallel.clip_gradients(large, float("inf")).item() == pytest.approx(1, abs=1e-5)  # only to measure
    assert large[0].grad.tolist() == pytest.approx([0.6, 0], abs=1e-5)
