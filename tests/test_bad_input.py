"""What a user can get wrong ends in one line on stderr and exit status 2, with nothing written."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sample
import text
import weights

ROOT = Path(__file__).parent.parent
TENSORS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.fixture
def model(make_pair, tmp_path):
    """A copy, to be damaged, of a folder that is in order."""
    return shutil.copytree(make_pair("SD3-Medium", "folder").path, tmp_path / "model")


@pytest.fixture
def fails(tmp_path, monkeypatch, capfd):
    """fails(*arguments) runs sample.py in an empty folder, checks that it fails well, and returns its one line."""
    def run(*arguments):
        here = tmp_path / "here"
        here.mkdir()
        monkeypatch.chdir(here)
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            weights.run_script(sample.main)
        out, err = capfd.readouterr()
        assert (end.value.code, out) == (2, "")
        assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
        assert "Traceback" not in err
        assert not [path for path in here.rglob("*") if path.is_file()]
        assert not list(tmp_path.rglob("*.part"))
        return err
    return run


# ---------------------------------------------------------------------------------------------------- the command line

@pytest.mark.parametrize("arguments, words", [
    ([], "nothing to draw"),
    (["--prompt", "x", "--colour", "red"], "--colour"),
    (["--prompt", "x", "--guid", "3"], "--guid"),
    (["--prompt"], "--prompt"),
    (["--prompt", "x", "--size", "72"], "72"),
    (["--prompt", "x", "--size", "64x"], "64x"),
    (["--prompt", "x", "--size", "0"], "0"),
    (["--prompt", "x", "--steps", "0"], "--steps"),
    (["--prompt", "x", "--steps", "two"], "two"),
    (["--prompt", "x", "--count", "-1"], "--count"),
    (["--prompt", "x", "--shift", "nan"], "--shift"),
    (["--prompt", "x", "--guidance", "much"], "much"),
    (["--prompt", "x", "--cache", "4"], "4 is not A-B"),
    (["--prompt", "x", "--cache", "7-4"], "cache range 7-4"),
    (["--prompt", "x", "--cache", "8-12"], "cache range 8-12"),
    (["--prompt", "x", "--cache", "1-4", "--steps", "1"], "at least 2 steps"),
    (["--prompt", "x", "--seed", str(10**20)], "--seed"),
    (["--prompt", "x", "--seed", "one"], "--seed"),
    (["--prompt", "x", "--dtype", "fp8"], "fp8"),
    (["--prompt", "half a character: \ud83d"], "--prompt"),
    (["--prompt", "x", "--device", "nonsense"], "nonsense"),
    (["--prompt", "x", "--device", "meta"], "meta"),
    (["--prompt", "x", "--device", "cpu:x"], "cpu:x"),
    (["--prompts", "nowhere.txt"], "nowhere.txt"),
    (["--prompt", "x", "--model", "/nowhere/sd3.safetensors"], "/nowhere/sd3.safetensors: no such file"),
    (["--prompt", "x", "--model", "sd3.safetensors"], "sd3.safetensors: no such file"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_arguments_that_make_no_sense(fails, arguments, words):
    assert words in fails(*arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="cuda is there")
def test_cuda_where_there_is_none(fails):
    assert "device cuda" in fails("--prompt", "x", "--device", "cuda")


@pytest.mark.parametrize("flag, name", [("--out", "samples"), ("--out", "a.png"), ("--latents", "z.safetensors")])
def test_output_below_a_file(fails, tmp_path, flag, name):
    (tmp_path / "file").touch()
    assert "cannot be written" in fails("--prompt", "x", flag, tmp_path / "file" / name)


def test_output_that_is_a_folder(fails, tmp_path):
    (tmp_path / "a.png").mkdir()
    assert "it is a folder" in fails("--prompt", "x", "--out", tmp_path / "a.png")


def test_size_larger_than_the_position_table(fails, model):
    assert "does not fit this model" in fails("--model", model, "--prompt", "x", "--size", "64x320")


def test_a_script_of_its_own_says_the_same(tmp_path):
    run = subprocess.run([sys.executable, ROOT / "sample.py", "--prompt", "x", "--model", tmp_path / "none"],
                         capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------------------ model files

def edit(model, part, change):
    """Write the tensors of one part anew after change(tensors)."""
    file = model / part / f"{TENSORS[part]}.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, *shape, value=0.0):
    return lambda tensors: tensors.update({name: torch.full(shape, value)})


def spoil(name, value):
    return lambda tensors: tensors[name].view(-1)[-1:].fill_(value)


CLIP_BIAS = "text_model.final_layer_norm.bias"
DAMAGE = {
    "missing": ("transformer", "transformer_blocks.1.attn.to_v.bias", drop),
    "missing, a whole kind": ("transformer", "pos_embed.pos_embed", drop),
    "missing, the first looked for": ("vae", "decoder.conv_in.weight", drop),
    "missing in text": ("text_encoder", CLIP_BIAS, drop),
    "left over": ("transformer", "transformer_blocks.1.attn.extra.weight", lambda n: put(n, 3)),
    "left over in VAE": ("vae", "encoder.extra.bias", lambda n: put(n, 3)),
    "wrong shape": ("transformer", "proj_out.bias", lambda n: put(n, 63)),
    "wrong shape of k": ("transformer", "transformer_blocks.1.attn.to_k.weight", lambda n: put(n, 128, 100)),
    "wrong shape in text": ("text_encoder", CLIP_BIAS, lambda n: put(n, 65)),
    "NaN": ("transformer", "transformer_blocks.0.ff.net.2.weight", lambda n: spoil(n, float("nan"))),
    "infinite in VAE": ("vae", "decoder.conv_out.bias", lambda n: spoil(n, float("inf"))),
    "NaN in text": ("text_encoder", CLIP_BIAS, lambda n: spoil(n, float("nan"))),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_tensor_is_named(fails, model, damage):
    part, name, change = DAMAGE[damage]
    edit(model, part, change(name))
    line = fails("--model", model, "--prompt", "x")
    assert name in line and str(model) in line


@pytest.mark.parametrize("part, name, shape", [
    ("transformer", "pos_embed.proj.weight", (128, 64)),
    ("transformer", "pos_embed.proj.weight", (100, 16, 2, 2)),
    ("transformer", "context_embedder.weight", (128,)),
    ("transformer", "transformer_blocks.0.attn.to_q.weight", ()),
    ("transformer", "pos_embed.pos_embed", (1, 10, 128)),
    ("vae", "encoder.down_blocks.0.resnets.0.conv2.weight", (33, 32, 3, 3)),
    ("vae", "decoder.conv_in.weight", (96,)),
], ids=str)
def test_a_shape_that_sizes_are_read_off_is_wrong(fails, model, part, name, shape):
    edit(model, part, put(name, *shape))
    assert str(model / part) in fails("--model", model, "--prompt", "x")


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


@pytest.mark.parametrize("part", TENSORS)
@pytest.mark.parametrize("damage", [
    cut_in_half, lambda path: path.write_text("Not tensors at all. " * 9), lambda path: path.write_bytes(b""),
    lambda path: path.rename(path.with_name("pytorch_model.bin"))], ids=["cut", "text", "empty", "only a pickle"])
def test_a_damaged_file_is_named(fails, model, part, damage):
    damage(model / part / f"{TENSORS[part]}.safetensors")
    assert str(model / part) in fails("--model", model, "--prompt", "x")


@pytest.mark.parametrize("kind", ["cut", "text", "empty"])
def test_a_damaged_single_file_is_named(fails, make_pair, tmp_path, kind):
    file = tmp_path / "sd3.safetensors"
    whole = make_pair("SD3-Medium", "file").path.read_bytes()
    file.write_bytes({"cut": whole[:len(whole) // 2], "text": b"Not tensors at all. " * 9, "empty": b""}[kind])
    assert str(file) in fails("--model", file, "--prompt", "x")


def test_a_pickle_is_never_opened(fails, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "opened"),)

    (tmp_path / "sd3.ckpt").write_bytes(pickle.dumps(Trap()))
    torch.save(Trap(), tmp_path / "sd3.safetensors")
    for name in ("sd3.ckpt", "sd3.safetensors"):
        with pytest.raises(weights.UserError, match=name):
            sample.load_pipeline(tmp_path / name)
    assert "sd3.ckpt" in fails("--model", tmp_path / "sd3.ckpt", "--prompt", "x")
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize("files, words", [
    ({}, "no .safetensors"),
    ({"model.safetensors": {"language_model.weight": torch.ones(2)}}, "holds no SD3 transformer"),
    ({"model_index.json": "{}", "unet/config.json": "{}"}, "without transformer/"),
    ({"diffusion_pytorch_model.safetensors": {"decoder.conv_in.weight": torch.ones(2)}}, "holds no SD3 transformer"),
    ({"model.safetensors.index.json": '{"weight_map": {"a": "gone.safetensors"}}'}, "gone.safetensors"),
    ({"model.safetensors.index.json": "{}"}, "model.safetensors.index.json"),
    ({"model.safetensors.index.json": "[not JSON"}, "model.safetensors.index.json"),
], ids=["empty", "language model", "UNet", "VAE", "shard gone", "empty index", "damaged index"])
def test_a_folder_of_another_model(fails, tmp_path, files, words):
    folder = tmp_path / "other"
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(content, folder / name) if isinstance(content, dict) else (folder / name).write_text(content)
    folder.mkdir(exist_ok=True)
    assert words in fails("--model", folder, "--prompt", "x")


@pytest.mark.parametrize("name", ["vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_3"])
def test_a_part_that_is_missing_is_named(fails, model, name):
    shutil.rmtree(model / name)
    assert f"without {name}/" in fails("--model", model, "--prompt", "x")


@pytest.mark.parametrize("name", ["transformer/config.json", "scheduler/scheduler_config.json",
                                  "text_encoder/config.json", "tokenizer/tokenizer_config.json"])
@pytest.mark.parametrize("content", ["{not JSON", "[]"])
def test_damaged_settings(fails, model, name, content):
    (model / name).write_text(content)
    assert str((model / name).parent) in fails("--model", model, "--prompt", "x")


@pytest.mark.parametrize("name, settings", [
    ("transformer/config.json", {"num_attention_heads": 3}),
    ("transformer/config.json", {"num_attention_heads": "two"}),
    ("vae/config.json", {"norm_num_groups": 7}), ("scheduler/scheduler_config.json", {"shift": "three"})], ids=str)
def test_settings_that_make_no_sense(fails, model, name, settings):
    (model / name).write_text(json.dumps(settings))
    assert str((model / name).parent) in fails("--model", model, "--prompt", "x")


@pytest.mark.parametrize("start, words", [
    ("text_encoders.", "holds no text encoders"),
    ("text_encoders.clip_g.transformer.text_model.embeddings.", "text_model.embeddings.token_embedding.weight"),
    ("text_encoders.clip_l.transformer.text_model.final_layer_norm.bias", CLIP_BIAS),
    ("text_encoders.t5xxl.transformer.shared.weight", "shared.weight"),
    ("first_stage_model.", "holds no SD3 vae"),
    ("model.diffusion_model.joint_blocks.2.x_block.mlp.fc1.bias", "joint_blocks.2.x_block.mlp.fc1.bias is missing"),
])
def test_a_single_file_that_lacks_something(fails, make_pair, tmp_path, start, words):
    whole = make_pair("SD3-Medium", "file").path
    folder = shutil.copytree(whole.parent, tmp_path / "model")
    save_file({n: t for n, t in load_file(whole).items() if not n.startswith(start)}, folder / whole.name)
    line = fails("--model", folder / whole.name, "--prompt", "x")
    assert words in line and whole.name in line


# ------------------------------------------------------------------------------------------------------ prompt files

@pytest.mark.parametrize("name, content, words", [
    ("a.txt", b"", "holds no prompt"),
    ("a.txt", b" \n\t\n", "holds no prompt"),
    ("a.txt", "café".encode("latin-1"), "not UTF-8"),
    ("a.txt", b"PK\x03\x04\xff\xfe", "not UTF-8"),
    ("a.jsonl", b'{"prompt": "a cat"}\n{"prompt": a dog}\n', "line 2"),
    ("a.jsonl", b'{"text": "a cat"}\n', "line 1"),
    ("a.jsonl", b'{"prompt": 7}\n', "line 1"),
    ("a.jsonl", b'["a cat"]\n', "line 1"),
    ("a.jsonl", b'{"prompt": "half a character: \\ud83d"}\n', "line 1"),
    ("a.csv", b"text,style\na cat,photo\n", "no column named prompt"),
    ("a.csv", b"", "no column named prompt"),
    ("a.csv", b"prompt\n", "holds no prompt"),
    ("a.csv", b"prompt\n" + 200_000 * b"x", "a.csv"),
    ("a.tsv", b"prompt,style\na cat,photo\n", "no column named prompt"),
])
def test_prompt_files_that_cannot_be_used(fails, tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    assert words in fails("--prompts", tmp_path / name)


def test_a_folder_as_prompt_file(fails, tmp_path):
    assert "cannot be read" in fails("--prompts", tmp_path)


@pytest.mark.parametrize("name, content", [
    ("a.txt", "\ufeffa \"red\" cat\n\n  two dogs, é \r\n"),
    ("a.jsonl", '{"prompt": "a \\"red\\" cat"}\n\n{"prompt": "", "ori_prompt": "two dogs, é", "id": 3}\n'),
    ("a.jsonl", '{"ori_prompt": "a \\"red\\" cat"}\n{"prompt": "two dogs, é", "ori_prompt": "dogs"}'),
    ("a.csv", 'id,Prompt\n1,"a ""red"" cat"\n2,"two dogs, é"\n3\n'),
    ("a.tsv", 'Prompt\tCategory\na "red" cat\tAnimals\ntwo dogs, é\tAnimals\n'),
])
def test_prompt_files_are_read(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert text.read_prompts(tmp_path / name) == ['a "red" cat', "two dogs, é"]


def test_only_line_ends_end_a_prompt(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "one\u2028line"}, ensure_ascii=False), encoding="utf-8")
    assert text.read_prompts(tmp_path / "a.jsonl") == ["one\u2028line"]
    (tmp_path / "a.csv").write_text('prompt\n"two\nlines"\n')
    assert text.read_prompts(tmp_path / "a.csv") == ["two\nlines"]


# --------------------------------------------------------------------------------------------------- what is no error

def test_a_prompt_that_is_too_long_is_cut_with_a_warning(make_pair, capfd):
    encoders = make_pair("SD3-Medium", "folder").ours.text
    start = "red circle " * 5 + "on a "  # 12 words, as many as CLIP and T5 both read
    context, pooled = encoders([start + "white background"])
    lines = capfd.readouterr().err.splitlines()
    assert lines and all(line.startswith("warning: ") and "white background" in line for line in lines)
    assert any("CLIP" in line for line in lines) and any("T5" in line for line in lines)
    short_context, short_pooled = encoders([start])
    assert torch.equal(context, short_context) and torch.equal(pooled, short_pooled)
    assert capfd.readouterr().err == ""


def test_images_and_latents_are_written(model, tmp_path, monkeypatch, capfd):
    arguments = ["--model", model, "--prompt", "a cat", "--size", "32x48", "--steps", "2", "--count", "2",
                 "--out", tmp_path / "new" / "a.png", "--latents", tmp_path / "z.safetensors"]
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
    sample.main()
    names = ["a-000.png", "a-001.png", "a.png"]
    assert capfd.readouterr().out.split() == [str(tmp_path / "new" / name) for name in names]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == names
    assert load_file(tmp_path / "z.safetensors")["latents"].shape == (2, 16, 4, 6)
    assert sample.Image.open(tmp_path / "new" / "a-000.png").size == (48, 32)
