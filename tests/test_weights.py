"""Weights on disk: little memory, exact inverses, and only safetensors from the Hugging Face hub."""

import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

import mmdit
import vae
import weights
from conftest import KINDS

ROOT = Path(__file__).parent.parent


# ----------------------------------------------------------------------------------------------------------- memory

BIG = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {root!r})
import mmdit, weights
folder, layout = Path(sys.argv[1]), sys.argv[2]
torch.manual_seed(0)
with torch.device("meta"):
    network = mmdit.MMDiT(depth=7, width=768, heads=12, context_dim=1024, pooled_dim=512, pos_max=48, qk_norm=True)
network = network.half().to_empty(device="cpu")
for tensor in network.state_dict().values():
    tensor.fill_(0.01)
if layout == "folder":
    mmdit.save_mmdit(network, folder)
else:
    weights.write_safetensors(folder / "sd3.safetensors",
                              {{"model.diffusion_model." + n: t for n, t in network.state_dict().items()}})
"""
LOAD = """
import sys, torch
sys.path.insert(0, {root!r})
import mmdit
network = mmdit.load_mmdit(sys.argv[1], dtype=torch.float16)
print(open("/proc/self/status").read())
"""


def python(script, *arguments):
    script = script.format(root=str(ROOT))
    return subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True,
                          check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}).stdout


def peak(path):
    """The most memory, in bytes, that a process which loads `path` has in use."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", python(LOAD, path))[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux' /proc")
@pytest.mark.parametrize("layout", ["folder", "file"])
def test_loading_takes_little_more_memory_than_the_file_is_long(make_pair, tmp_path, layout):
    python(BIG, tmp_path, layout)
    path = next(tmp_path.glob("*.safetensors"))
    size = path.stat().st_size
    assert size > 250e6
    python_and_torch = peak(make_pair("SD3-Medium", "folder").path)  # what loading a small network takes
    assert peak(tmp_path if layout == "folder" else path) - python_and_torch < 1.2 * size


# ---------------------------------------------------------------------------------------------------------- inverses

@pytest.mark.parametrize("kind", KINDS)
def test_saving_is_the_inverse_of_loading(make_pair, tmp_path, kind):
    folder = make_pair(kind, "folder").path
    for part, load, save in (("transformer", mmdit.load_mmdit, mmdit.save_mmdit), ("vae", vae.load_vae, vae.save_vae)):
        network = load(folder)
        save(network, tmp_path / part)
        before, after = (load_file(next((place / part).glob("*.safetensors"))) for place in (folder, tmp_path))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        again, ours = load(tmp_path / part).state_dict(), network.state_dict()
        assert again.keys() == ours.keys() and all(torch.equal(again[name], ours[name]) for name in ours)


@pytest.mark.parametrize("part, load, save", [("transformer", mmdit.load_mmdit, mmdit.save_mmdit),
                                              ("vae", vae.load_vae, vae.save_vae)], ids=["transformer", "vae"])
def test_both_layouts_give_the_same_network(make_pair, part, load, save):
    file, bare, folder = (load(make_pair("SD3.5-Medium", layout).path).state_dict()
                          for layout in ("file", "file without prefix", "folder"))
    assert all(torch.equal(file[name], bare[name]) and torch.equal(file[name], folder[name]) for name in folder)


def test_fp16_is_written_as_fp16(make_pair, tmp_path):
    network = mmdit.load_mmdit(make_pair("SD3-Medium", "folder").path)
    mmdit.save_mmdit(network, tmp_path, {"sigmas": "[1, 0]"}, torch.float16)
    written = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.float16}
    assert {tensor.dtype for tensor in network.state_dict().values()} == {torch.float32}
    assert mmdit.load_mmdit(tmp_path).settings["sigmas"] == "[1, 0]"


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.json"
    weights.write_text(file, "old")
    with pytest.raises(ValueError), weights.replacing(file) as part:
        part.write_text("half")
        raise ValueError
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_full_precision_is_preferred_to_an_fp16_variant(tmp_path):
    for name in ("a.fp16.safetensors", "a.safetensors"):
        (tmp_path / name).touch()
    assert weights.find_shards(tmp_path) == [tmp_path / "a.safetensors"]


# --------------------------------------------------------------------------------------------------- Hugging Face hub

def test_only_safetensors_are_fetched(make_pair, monkeypatch):
    pair, asked = make_pair("SD3-Medium", "folder"), {}

    def fetch(repository, **options):
        asked.update(options, repository=repository)
        return str(pair.path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert weights.find_model("owner/name-1.0") == pair.path
    assert asked["repository"] == "owner/name-1.0"
    patterns = asked["allow_patterns"]
    assert {"*.safetensors", "*.json", "*.txt", "*.model"} == set(patterns)


@pytest.mark.parametrize("failure", [OSError("no route\nto the hub"), ValueError(""), RuntimeError("gated")], ids=repr)
def test_a_hub_out_of_reach_is_said_in_one_line(monkeypatch, failure):
    def fetch(*_, **__):
        raise failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(weights.UserError, match="owner/name: .*" + (str(failure).split("\n")[0] or "ValueError")):
        mmdit.load_mmdit("owner/name")
