"""Weights on disk: little memory, exact inverses, and only safetensors from the Hugging Face hub."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file

import mmdit
import vae
import weights
from commandline import UserError
from conftest import KINDS

ROOT = Path(__file__).parent.parent


# ----------------------------------------------------------------------------------------------------------- memory

PEAKS = """
import re, sys, torch
sys.path.insert(0, sys.argv[1])
import mmdit
torch.set_num_threads(1)
for path in sys.argv[2:]:
    mmdit.load_mmdit(path, dtype=torch.float16)
    print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux' /proc")
def test_loading_takes_little_more_memory_than_the_file_is_long(make_pair, tmp_path):
    with torch.device("meta"):
        network = mmdit.MMDiT(depth=4, width=768, heads=12, context_dim=1024, pooled_dim=512, pos_max=48, qk_norm=True)
    network = network.half().to_empty(device="cpu")
    for tensor in network.state_dict().values():
        tensor.fill_(0.01)
    mmdit.save_mmdit(network, tmp_path / "folder")
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in network.state_dict().items()}
    weights.write_safetensors(tmp_path / "sd3.safetensors", tensors)
    size = (tmp_path / "sd3.safetensors").stat().st_size
    assert size > 120e6
    paths = [make_pair("SD3-Medium", "folder").path, tmp_path / "folder", tmp_path / "sd3.safetensors"]
    run = subprocess.run([sys.executable, "-c", PEAKS, ROOT, *paths], capture_output=True, text=True, check=True)
    small, folder, file = (1024 * int(peak) for peak in run.stdout.split())  # the most memory in use up to then
    assert folder - small < 1.2 * size
    assert file - small < 1.2 * size


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


def test_fp16_is_written_as_fp16(make_pair, tmp_path):
    network = mmdit.load_mmdit(make_pair("SD3-Medium", "folder").path)
    mmdit.save_mmdit(network, tmp_path, {"sigmas": "[1, 0]"}, torch.float16)
    written = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.float16}
    assert {tensor.dtype for tensor in network.state_dict().values()} == {torch.float32}
    assert mmdit.load_mmdit(tmp_path).metadata["sigmas"] == "[1, 0]"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "a.json"
    weights.write_text(file, "old")
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), weights.replacing(file) as part:
            part.write_text("half")
            raise error
        assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_what_cannot_be_written_is_one_error_that_names_it(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "a.json", tmp_path / "folder"):
        with pytest.raises(UserError, match=f"{path}: cannot be written"):
            weights.write_text(path, "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("files", [
    ["model.safetensors", "adapter.safetensors", "model.bf16.safetensors", "model.fp16.safetensors", "ema.safetensors"],
    ["diffusion_pytorch_model.safetensors", "a.safetensors", "model.safetensors"],
    ["model.fp16.safetensors", "a.safetensors"], ["a.safetensors"], ["open_clip_model.safetensors", "a.safetensors"]])
def test_the_network_is_in_the_file_of_the_usual_name_in_full_precision_first(tmp_path, files):
    for name in files:
        (tmp_path / name).touch()
    assert weights.find_shards(tmp_path) == [tmp_path / files[0]]


def test_an_index_in_full_precision_comes_before_fp16_and_lists_files_of_its_folder_only(tmp_path):
    for variant, shards in ((".fp16", ["half"]), ("", ["b", "a"])):
        index = json.dumps({"weight_map": dict(enumerate(shards))})
        (tmp_path / f"model.safetensors.index{variant}.json").write_text(index)
    for name in ("a", "b", "half", "model.fp16.safetensors"):
        (tmp_path / name).touch()
    assert weights.find_shards(tmp_path) == [tmp_path / "a", tmp_path / "b"]
    for outside in ("../a", str(tmp_path / "a"), "a\0", "n" * 300, "."):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": outside}}))
        with pytest.raises(UserError, match="not in this folder"):
            weights.find_shards(tmp_path)


def test_files_of_which_none_has_a_usual_name_are_listed(tmp_path):
    for name in ("ema.safetensors", "bf16.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="bf16.safetensors, ema.safetensors"):
        weights.find_shards(tmp_path)


def test_a_model_is_known_again_wherever_it_lies_and_not_after_a_change(make_pair, tmp_path):
    original = make_pair("SD3-Medium", "folder").path
    copy, linked = shutil.copytree(original, tmp_path / "copy"), tmp_path / "linked"
    linked.mkdir()
    for part in original.iterdir():  # links to files, as in Hugging Face's cache, and to folders
        (linked / part.name).symlink_to(part)
    (copy / "notes.txt").write_text("not the model's")
    assert weights.identity(copy) == weights.identity(linked) == weights.identity(original)
    assert weights.identity(original, "bf16") != weights.identity(original)
    with open(copy / "vae" / "config.json", "a") as file:
        file.write(" ")
    assert weights.identity(copy) != weights.identity(original)


def test_parts_that_are_links_count_as_what_they_point_to(make_pair, tmp_path):
    first, other = make_pair("SD3-Medium", "folder").path, make_pair("SD3.5-Large", "folder").path
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "transformer").symlink_to(first / "transformer")
    before = weights.identity(tmp_path)
    (tmp_path / "transformer").unlink()
    (tmp_path / "transformer").symlink_to(other / "transformer")
    assert weights.identity(tmp_path) != before


def test_a_model_that_goes_without_its_t5_is_another(make_pair, tmp_path):
    folder = shutil.copytree(make_pair("SD3-Medium", "folder").path, tmp_path / "model")
    before = weights.identity(folder)
    weights.write_json(folder / "model_index.json", {**weights.model_index(folder), "text_encoder_3": [None, None]})
    assert weights.identity(folder) != before


def test_others_may_read_a_written_model_as_they_may_any_new_file(tmp_path):
    weights.write_safetensors(tmp_path / "new.safetensors", {"x": torch.zeros(1)})
    (tmp_path / "any").touch()
    assert (tmp_path / "new.safetensors").stat().st_mode == (tmp_path / "any").stat().st_mode


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


@pytest.mark.parametrize("failure", [
    OSError("no route\nto the hub"), ValueError(""), errors.HFValidationError("no name"), errors.HTTPError("cut off"),
    errors.LocalEntryNotFoundError("offline"), errors.XetDownloadError("half")], ids=repr)
def test_a_hub_out_of_reach_is_said_in_one_line(monkeypatch, failure):
    def fetch(*_, **__):
        raise failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    reason = " ".join(str(failure).split()) or "ValueError"
    with pytest.raises(UserError, match=f"owner/name: .*{reason}"):
        mmdit.load_mmdit("owner/name")


def test_a_mistake_of_ours_is_not_blamed_on_the_hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda: None)  # takes no arguments: a TypeError
    with pytest.raises(TypeError):
        weights.find_model("owner/name")
