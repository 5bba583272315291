"""Weights on disk: what is damaged is named in one line, what is published is read, what is written is whole."""

import json
import os
import shutil
from unittest import mock

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import text
import weights
from commandline import UserError
from pipeline import load_pipeline

CLIP, T5 = (f"text_encoders.{name}.transformer." for name in ("clip_g", "t5xxl"))  # in a single file
MMDIT = "model.diffusion_model."
NETWORK, ENCODER = "diffusion_pytorch_model.safetensors", "model.safetensors"  # in a folder
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def model(make_pair, tmp_path):
    """A folder that is in order, to be damaged; its files are links, to be replaced and not written to."""
    return shutil.copytree(make_pair("SD3-Medium", "folder").path, tmp_path / "model", copy_function=os.link)


@pytest.fixture
def single_file(make_pair, tmp_path):
    """single_file(changes) -> a single file after `change`, with tokenizers beside it."""
    def write(changes=None):
        original = make_pair("SD3-Medium", "file").path
        file = shutil.copytree(original.parent, tmp_path / "single", dirs_exist_ok=True) / original.name
        change(file, changes or {})
        return file
    return write


def change(file, changes):
    """Write tensors anew. {name: None}: without it (or all "name."); number: its last value; else: in its place."""
    tensors = load_file(file)
    for name, value in changes.items():
        if value is None:
            tensors = {key: tensor for key, tensor in tensors.items()
                       if key != name and not (name.endswith(".") and key.startswith(name))}
        elif isinstance(value, float):
            tensors[name].view(-1)[-1] = value
        else:
            tensors[name] = value
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})


def put(file, content):
    """In place of a file or of a link."""
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())


def refusal(load, path):
    """The message of the one error that a user sees."""
    with pytest.raises(UserError) as error:
        load(path)
    return str(error.value)


# ------------------------------------------------------------------------------------------------ damaged tensors

CLIP_BIAS = "text_model.final_layer_norm.bias"


@pytest.mark.parametrize("part, name, value", [
    ("transformer", "pos_embed.pos_embed", None), ("transformer", "transformer_blocks.1.attn.to_v.bias", None),
    ("transformer", "transformer_blocks.1.attn.extra.weight", torch.zeros(3)),
    ("transformer", "transformer_blocks.1.attn.to_k.weight", torch.zeros(128, 100)),
    ("transformer", "context_embedder.weight", torch.zeros(128)),
    ("transformer", "transformer_blocks.0.ff.net.2.weight", NAN),
    ("vae", "decoder.conv_in.weight", None), ("vae", "decoder.conv_out.bias", torch.zeros(4)),
    ("text_encoder", CLIP_BIAS, None), ("text_encoder_2", CLIP_BIAS, torch.zeros(65)),
    ("text_encoder", "text_model.encoder.layers.1.mlp.extra.bias", torch.zeros(3)),
    ("text_encoder_3", "shared.weight", INF)])
def test_a_tensor_that_is_missing_left_over_wrong_shaped_or_not_finite_is_named(model, part, name, value):
    change(model / part / (ENCODER if "text" in part else NETWORK), {name: value})
    line = refusal(load_pipeline, model)
    assert name in line and str(model) in line and part in line


@pytest.mark.parametrize("changes, words", [
    ({MMDIT + "extra.weight": torch.zeros(3)}, f"tensor {MMDIT}extra.weight does not belong there"),
    ({CLIP + CLIP_BIAS: torch.zeros(65)}, f"tensor {CLIP}{CLIP_BIAS} has shape [65]"),
    ({T5 + "shared.weight": None}, "no tensor shared.weight"),
    ({T5: None, "text_encoders.t5xxl.shared.weight": torch.zeros(2)}, "belongs to no text encoder"),
    ({"text_encoders.": None}, "holds no text encoders"), ({MMDIT: None}, "holds no SD3 transformer")])
def test_what_is_wrong_in_a_single_file_is_named(single_file, changes, words):
    file = single_file(changes)
    line = refusal(load_pipeline, file)
    assert words in line and str(file) in line


def test_plain_fp8_text_is_read_and_fp8_with_scales_is_refused(make_pair, single_file):
    expected = make_pair("SD3-Medium", "file").ours.text.t5.state_dict()
    fp8 = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in expected.items() if name != text.AGAIN}
    read = text.load_text_encoders(single_file({T5 + name: tensor for name, tensor in fp8.items()})).t5.state_dict()
    assert all(torch.equal(read[name], fp8[name].float()) for name in fp8)
    for name in (f"{T5}scaled_fp8", f"{MMDIT}final_layer.linear.scale_weight"):
        line = refusal(load_pipeline, single_file({name: torch.ones(1)}))
        assert f"tensor {name} does not belong there: scaled fp8 cannot be read; take fp32" in line


# -------------------------------------------------------------------------------------------------- damaged files

def cut(file):
    put(file, file.read_bytes()[:file.stat().st_size // 2])


def forget_words(folder):
    """A tokenizer without its vocabulary, of which transformers makes an empty one."""
    for file in folder.iterdir():
        if file.name != "tokenizer_config.json":
            file.unlink()


def says(**settings):
    return lambda file: put(file, json.dumps({**json.loads(file.read_text()), **settings}))


MMDIT_CONFIG, VAE_CONFIG, LEVELS = "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json"


@pytest.mark.parametrize("name, damage", [
    (f"transformer/{NETWORK}", cut), (f"text_encoder/{ENCODER}", cut), (MMDIT_CONFIG, "{no"),
    ("text_encoder/config.json", "{no"), ("tokenizer/tokenizer_config.json", "{no"),
    (f"transformer/{NETWORK}.index.json", "{}"),
    (f"transformer/{NETWORK}.index.json", '{"weight_map": {"proj_out.bias": "gone.safetensors"}}'),
    (MMDIT_CONFIG, "[]"), (MMDIT_CONFIG, says(num_attention_heads="two")), (VAE_CONFIG, says(norm_num_groups=7)),
    (VAE_CONFIG, says(scaling_factor=0)),
    (MMDIT_CONFIG, says(num_attention_heads=3)), (LEVELS, says(shift="three")),
    (LEVELS, says(use_dynamic_shifting=True)), ("vae", shutil.rmtree),
    ("text_encoder", shutil.rmtree), ("text_encoder_3", shutil.rmtree), ("tokenizer", shutil.rmtree),
    ("tokenizer", forget_words)])
def test_a_damaged_or_lost_part_of_a_folder_is_one_line_that_names_it(model, name, damage):
    damage(model / name) if callable(damage) else put(model / name, damage)
    line, part = refusal(load_pipeline, model), name.split("/")[0]
    assert str(model) in line and (part in line or part == "scheduler" and "noise levels" in line), line
    assert "gone" not in str(damage) or "lists gone.safetensors" in line


def test_a_file_or_folder_of_something_else_is_refused(make_pair, tmp_path):
    torch.save(range(3), tmp_path / "pickle.ckpt")  # never opened
    cut(shutil.copy(make_pair("SD3-Medium", "file").path, tmp_path / "half.safetensors"))
    save_file({"language_model.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    put(tmp_path / "empty.safetensors", "")
    (tmp_path / "empty folder").mkdir()
    for name in ("text.safetensors", "a folder/notes.txt", "text folder/model.safetensors", "two/a.safetensors",
                 "two/b.safetensors", "broken/model_index.json"):
        put(tmp_path / name, "Not tensors at all.\n" * 9)
    put(tmp_path / "UNet" / "model_index.json", "{}")
    for path in tmp_path.iterdir():
        assert str(path) in refusal(load_pipeline, path)
    assert "no such file" in refusal(load_pipeline, tmp_path / "nowhere.safetensors")


# -------------------------------------------------------------------------------------- which files, whose tokenizers

@pytest.mark.parametrize("files", [
    ["model.safetensors", "adapter.safetensors", "model.fp16.safetensors"], ["model.fp16.safetensors", "a.safetensors"],
    ["diffusion_pytorch_model.safetensors", "model.safetensors"], ["open_clip_model.safetensors", "a.safetensors"],
    ["a.safetensors"]], ids=" ".join)
def test_the_network_is_in_the_file_of_the_usual_name_in_full_precision_first(tmp_path, files):
    for name in files:
        put(tmp_path / name, b"")
    assert weights.find_shards(tmp_path) == [tmp_path / files[0]]


def test_of_a_repository_only_the_components_are_fetched_and_no_half_precision(tmp_path, monkeypatch):
    fetch = mock.Mock(return_value=str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert weights.find_model("owner/name-1.0") == tmp_path and fetch.call_args.args == ("owner/name-1.0",)
    wanted = [f"transformer/{NETWORK}", f"text_encoder_3/{ENCODER}", "tokenizer/merges.txt", "model_index.json",
              "scheduler/scheduler_config.json", "text_encoder_3/model-00001-of-00002.safetensors"]
    unwanted = ["sd3_medium.safetensors", "text_encoders/t5xxl_fp16.safetensors", "vae/diffusion_pytorch_model.bin",
                "transformer/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.fp16.safetensors",
                "text_encoder_3/model.fp16-00001-of-00002.safetensors", "comfy_example_workflows/a.json"]
    assert list(huggingface_hub.utils.filter_repo_objects(wanted + unwanted, **fetch.call_args.kwargs)) == wanted


def test_a_hub_out_of_reach_is_said_in_one_line(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", mock.Mock(side_effect=OSError("no route\nto the hub")))
    assert "owner/name: " in (line := refusal(load_pipeline, "owner/name")) and "no route to the hub" in line


def test_clip_g_is_padded_with_token_0_whatever_its_tokenizer_pads_with(make_pair, single_file):
    file, expected = single_file(), make_pair("SD3-Medium", "file").ours.text
    tokenizer = AutoTokenizer.from_pretrained(file.parent / "tokenizer_2")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(file.parent / "tokenizer_2")
    assert AutoTokenizer.from_pretrained(file.parent / "tokenizer_2").pad_token_id != 0
    read = text.load_text_encoders(file)
    assert read.tokenizers[1]("red", padding="max_length", max_length=14).input_ids[-1] == 0
    assert torch.equal(read(["red"])[0], expected(["red"])[0])


def test_a_single_file_without_tokenizers_takes_sd3_mediums(make_pair, single_file, monkeypatch):
    file, fetch = single_file(), mock.Mock(return_value=make_pair("SD3-Medium", "folder").path)
    for name in text.ENCODERS.values():
        shutil.rmtree(file.parent / name)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert len(text.load_text_encoders(file).tokenizers) == 3 and fetch.call_args.args == (text.TOKENIZERS,)
    assert fetch.call_args.kwargs["allow_patterns"] == ["tokenizer/*", "tokenizer_2/*", "tokenizer_3/*"]


# --------------------------------------------------------------------------------------------------------- writing

def test_a_write_that_fails_leaves_the_old_file_and_says_so(tmp_path):
    weights.write_text(tmp_path / "a.json", "old")
    for error in (KeyboardInterrupt, OSError("disk full")):
        with pytest.raises((KeyboardInterrupt, UserError)), weights.replacing(tmp_path / "a.json") as part:
            part.write_text("half")
            raise error
        assert (tmp_path / "a.json").read_text() == "old"
    assert f"{tmp_path / 'a.json' / 'b'}: cannot be written" in refusal(
        lambda path: weights.write_text(path, "new"), tmp_path / "a.json" / "b")
