"""A GPU does what a CPU does. Skipped where there is none: `pytest -n0 tests/test_gpu.py` on a machine that has one."""

import json

import pytest
import torch

import quick_train
from conftest import check_gradients, read_state
from pipeline import TINY, Sampler, load_pipeline, open_sampler
from shapes import draw_captions

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

STAGES = {
    "stage 1": ["--stage", 1],
    "stage 1, adapters": ["--stage", 1, "--lora", 2],
    "stage 2": ["--stage", 2, "alone=1", "warmup=1"],
    "stage 2, adapters": ["--stage", 2, "--lora", 2, "alone=1", "warmup=1"]}


def start(words, two_steps):
    return [*words, "--student", two_steps, "--reference", two_steps] if 2 in words[:2] else words


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("options", [{"steps": 4, "guidance": 2.0}, {"steps": 2, "guidance": 1.0}])
def test_a_gpu_draws_the_pictures_that_a_cpu_draws(options):
    prompts, _, _ = draw_captions(8, torch.Generator().manual_seed(0))
    mine, theirs = (Sampler(load_pipeline(TINY, device), options).images(prompts, range(8))
                    for device in ("cuda", "cpu"))
    assert (mine - theirs).abs().max() < 1e-3


@pytest.mark.parametrize("words", STAGES.values(), ids=STAGES)
def test_a_gpu_trains_what_a_cpu_trains(words, two_steps, tmp_path):
    words = [*start(words, two_steps), "--bare", "--iterations", 6]
    for device in ("cuda", "cpu"):
        quick_train.run(*words, "--device", device, "--out", tmp_path / device)
    mine, theirs = (read_state(tmp_path / device) for device in ("cuda", "cpu"))
    check_gradients(mine, theirs, share=0.05)
    *_, last = map(json.loads, (tmp_path / "cuda" / "log.jsonl").read_text().splitlines())
    assert last["peak GB"] > 0


@pytest.mark.parametrize("words", STAGES.values(), ids=STAGES)
def test_bf16_a_run_gone_on_with_on_a_gpu_and_its_measures(words, two_steps, tmp_path):
    words = [*start(words, two_steps), "--dtype", "bf16", "--device", "cuda"]
    for iterations in (3, 6):  # without decay, for rates that fall depend on the length
        quick_train.run(*words, "decay=false", "--iterations", iterations, "--resume", "--out", tmp_path)
    measures = json.loads((tmp_path / "metrics.json").read_text())["student"]
    assert all(value == value for group in measures.values() for value, _ in group.values())
    images = open_sampler(str(tmp_path), "cuda", torch.bfloat16).images(["a red circle"] * 2, [1, 2])
    assert images.std() > 0.1
