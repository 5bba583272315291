"""What a user gets wrong ends in one line that names it, with nothing written; what we got wrong has a traceback."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import adversarial
import commandline
import mmdit
import pictures
import pipeline
import prompts
import sample
import text
import train
import vae
from commandline import UserError

ROOT = Path(__file__).parent.parent
LOAD = {"transformer": mmdit.load_mmdit, "vae": vae.load_vae, "scheduler": pipeline.load_pipeline,
        **dict.fromkeys(("text_encoder", "text_encoder_3", "tokenizer", "tokenizer_3"), text.load_text_encoders)}
TENSORS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model",
           "text_encoder_3": "model"}


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
            commandline.run_script(sample.main)
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
    (["--colour", "red"], "--colour"),
    (["--guid", "3"], "--guid"),
    (["--size", "72"], "72"),
    (["--size", "64x"], "64x"),
    (["--size", "0"], "0"),
    (["--steps", "0"], "--steps"),
    (["--steps", "two"], "two"),
    (["--steps", "9999999999"], "--steps"),
    (["--guidance", "nan"], "--guidance"),
    (["--guidance", "inf"], "--guidance"),
    (["--seed", str(10**20)], "--seed"),
    (["--prompt", "half a character: \ud83d"], "--prompt"),
    (["--prompt", "x", "--negative", "y", "--guidance", "1"], "--negative does nothing"),
    (["--prompt", "x", "--out", "cat.jpg"], "give FILE.png or a folder"),
    (["--prompt", "x", "--out", "cat.safetensors"], "give FILE.png or a folder"),
    (["--export", "sd3.ckpt"], "give FILE.safetensors or a folder"),
    (["--export", "sd3", "--model", "sd3@steps=2"], "after the @"),
    (["--prompt", "x", "--device", "nonsense"], "nonsense"),
    (["--prompt", "x", "--device", "meta"], "meta"),
    (["--prompt", "x", "--device", "cpu:x"], "cpu:x"),
    (["--prompts", "nowhere.txt"], "nowhere.txt"),
    (["--prompt", "x", "--model", "/nowhere/sd3.safetensors"], "/nowhere/sd3.safetensors: no such file"),
    (["--prompt", "x", "--model", "sd3.safetensors"], "sd3.safetensors: no such file"),
    (["--prompt", "x", "--model", "sd3@guidance=nan"], "nan"),
    (["--prompt", "x", "--model", "sd3@cache=4"], "4 is not A-B"),
    (["--prompt", "x", "--model", "sd3@colour=red"], "colour"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_arguments_that_make_no_sense(fails, arguments, words):
    assert words in fails(*arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="cuda is there")
def test_cuda_where_there_is_none(fails):
    assert "device cuda" in fails("--prompt", "x", "--device", "cuda")


@pytest.mark.parametrize("options, flags, words", [
    ("@cache=2-1", [], "cached blocks 2-1"), ("@cache=1-3", [], "cached blocks 1-3"),
    ("@cache=1-2", ["--steps", "1"], "at least 2 steps"), ("", ["--size", "64x320"], "does not fit this model")])
def test_settings_that_do_not_fit_the_model(fails, model, options, flags, words):
    assert words in fails("--model", f"{model}{options}", "--prompt", "x", *flags)


@pytest.mark.parametrize("name", ["samples", "a.png"])
def test_output_below_a_file(fails, tmp_path, name):
    (tmp_path / "file").touch()
    assert "cannot be written" in fails("--prompt", "x", "--out", tmp_path / "file" / name)


def test_output_that_is_a_folder(fails, tmp_path):
    (tmp_path / "a.png").mkdir()
    assert "it is a folder" in fails("--prompt", "x", "--out", tmp_path / "a.png")


def test_a_script_of_its_own_says_the_same(tmp_path):
    run = subprocess.run([sys.executable, ROOT / "sample.py", "--prompt", "x", "--model", tmp_path / "none"],
                         capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1


def test_images_are_written_and_their_paths_said(model, tmp_path, monkeypatch, capfd):
    arguments = ["--model", model, "--prompt", "a cat", "--size", "32x48", "--steps", "2", "--count", "2",
                 "--out", tmp_path / "new" / "a.PNG"]
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
    sample.main()
    names = ["a-000.png", "a-001.png", "a.PNG"]
    assert capfd.readouterr().out.split() == [str(tmp_path / "new" / name) for name in names]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == names
    assert Image.open(tmp_path / "new" / "a-000.png").size == (48, 32)


def test_a_folder_with_a_name_like_a_files_is_taken_where_it_is_one(tmp_path):
    with pytest.raises(UserError, match="student.safetensors is the name of another file; give a folder"):
        train.parse_arguments(["--stage", "1", "--out", str(tmp_path / "student.safetensors")])
    (tmp_path / "cat.jpg").mkdir()
    for name in ("cat.jpg", "new", "v1.5", "exp.lr1e-4"):
        assert commandline.output()(tmp_path / name) == tmp_path / name


# ------------------------------------------------------------------------------------------ prompts of any form, sheets

ODD = {"line break": "a large striped yellow triangle on the bottom of a white\nbackground",
       "controls": "a\x00b\x1b[31m\r\x85\u2028c", "long": "circle " * 900, "very long": "x" * 1_000_000,
       "combining": "\u0301" * 50, "right to left": "שלום עולם",
       "emoji": "👩\u200d👩\u200d👧 🐈", "wide": "W" * 50, "empty": "", "blank": " \n "}


@pytest.mark.parametrize("prompt", ODD.values(), ids=list(ODD))
def test_a_sheet_stays_small_whatever_the_prompts_are(prompt):
    sheet = pictures.contact_sheet(torch.zeros(4, 3, 8, 8), ["a cat", prompt], ["x", ""])
    assert sheet.height == 20 + 2 * 132 and sheet.width < 700 + 2 * 132


def test_a_prompt_with_a_line_break_is_drawn_whole_and_shown_as_one_line(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text(json.dumps([ODD["line break"], "a cross"]))
    monkeypatch.setattr(sys, "argv", ["sample.py", "--prompts", str(tmp_path / "a.json"), "--steps", "1", "--guidance",
                                      "1", "--out", str(tmp_path / "out")])
    monkeypatch.setattr(pipeline, "LATENTS_AT_ONCE", 64)  # one image a batch
    sample.main()
    assert len(list((tmp_path / "out").iterdir())) == 3
    drawn, sheet = (Image.open(tmp_path / "out" / name) for name in ("000.png", "sheet.png"))
    expected, short = (pipeline.open_sampler(f"{pipeline.TINY}@steps=1,guidance=1").images([prompt], [0])[0]
                       for prompt in (ODD["line break"], commandline.one_line(ODD["line break"])))
    assert drawn.tobytes() == pictures.to_picture(expected).tobytes() != pictures.to_picture(short).tobytes()
    assert sheet.height == 20 + 2 * 132 and sheet.width < 500 + 132


@pytest.mark.parametrize("prompts, count, rows, columns", [(100, 2, 32, 2), (1, 100, 1, 64), (3, 50, 1, 50)])
def test_images_are_written_as_they_come_and_a_sheet_shows_the_first(tmp_path, capfd, prompts, count, rows, columns):
    jobs = [(f"{i}", seed) for i in range(prompts) for seed in range(count)]
    drawn = []
    images = (drawn.append(i) or torch.full((3, 8, 8), (i % 200) / 100 - 1) for i in range(len(jobs)))
    paths = pictures.write_images(images, tmp_path, jobs, count)
    assert next(paths) == tmp_path / "000.png" and drawn == [0]
    assert len(list(paths)) == len(jobs) and f"shows {rows * columns} of the {len(jobs)}" in capfd.readouterr().err
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.height == 20 + 132 * rows and 132 * columns < sheet.width < 132 * columns + 40
    last = Image.open(tmp_path / f"{(rows - 1) * count + columns - 1:03}.png").getpixel((0, 0))
    assert sheet.getpixel((sheet.width - 5, sheet.height - 5)) == last


# ------------------------------------------------------------------------------------------------------ model files

@pytest.fixture
def model(make_pair, tmp_path):
    """A folder that is in order, to be damaged; its files are links to the original's."""
    original = make_pair("SD3-Medium", "folder").path
    before = {file: file.stat().st_mtime_ns for file in original.rglob("*")}
    yield shutil.copytree(original, tmp_path / "model", copy_function=os.link)
    assert {file: file.stat().st_mtime_ns for file in original.rglob("*")} == before


@pytest.fixture
def single_file(make_pair, tmp_path):
    """single_file(change) -> a single file that is in order but for change(tensors), with tokenizers beside it."""
    original = make_pair("SD3-Medium", "file").path

    def write(change):
        folder = shutil.copytree(original.parent, tmp_path / "single", ignore=lambda *_: [original.name])
        tensors = load_file(original)
        change(tensors)
        save_file(tensors, folder / original.name)
        return folder / original.name
    return write


def refusal(load, path):
    """The message of the one error that a user sees."""
    with pytest.raises(UserError) as error:
        load(path)
    return str(error.value)


def put_file(path, content):
    """In place of the link to the original's file."""
    path.unlink()
    path.write_bytes(content)


def edit(model, part, change):
    """Write the tensors of one part anew after change(tensors)."""
    file = model / part / f"{TENSORS[part]}.safetensors"
    tensors = load_file(file)
    change(tensors)
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})


def drop(name):
    return lambda tensors: tensors.pop(name)


def drop_all(start):
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(start)]


def put(name, *shape):
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


def spoil(name, value):
    return lambda tensors: tensors[name].view(-1)[-1:].fill_(value)


CLIP_BIAS = "text_model.final_layer_norm.bias"
DAMAGE = {
    "missing": ("transformer", "transformer_blocks.1.attn.to_v.bias", drop),
    "missing, a whole kind": ("transformer", "pos_embed.pos_embed", drop),
    "missing, what blocks are counted by": ("transformer", "transformer_blocks.0.attn.to_out.0.weight", drop),
    "missing, what levels are counted by": ("vae", "encoder.down_blocks.0.resnets.0.conv2.weight", drop),
    "missing, the first looked for": ("vae", "decoder.conv_in.weight", drop),
    "missing in text": ("text_encoder", CLIP_BIAS, drop),
    "left over": ("transformer", "transformer_blocks.1.attn.extra.weight", lambda n: put(n, 3)),
    "left over in VAE": ("vae", "encoder.extra.bias", lambda n: put(n, 3)),
    "left over in text": ("text_encoder", "text_model.encoder.layers.1.mlp.extra.bias", lambda n: put(n, 3)),
    "wrong shape": ("transformer", "proj_out.bias", lambda n: put(n, 63)),
    "wrong shape of k": ("transformer", "transformer_blocks.1.attn.to_k.weight", lambda n: put(n, 128, 100)),
    "wrong shape in text": ("text_encoder", CLIP_BIAS, lambda n: put(n, 65)),
    "NaN": ("transformer", "transformer_blocks.0.ff.net.2.weight", lambda n: spoil(n, float("nan"))),
    "infinite in VAE": ("vae", "decoder.conv_out.bias", lambda n: spoil(n, float("inf"))),
    "NaN in text": ("text_encoder", CLIP_BIAS, lambda n: spoil(n, float("nan"))),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_tensor_is_named(model, damage):
    part, name, change = DAMAGE[damage]
    edit(model, part, change(name))
    line = refusal(LOAD[part], model)
    assert name in line and str(model / part) in line


@pytest.mark.parametrize("part, name, shape", [
    ("transformer", "pos_embed.proj.weight", (128, 64)),
    ("transformer", "pos_embed.proj.weight", (100, 16, 2, 2)),
    ("transformer", "pos_embed.proj.weight", (128, 16, 0, 2)),
    ("transformer", "context_embedder.weight", (128,)),
    ("transformer", "transformer_blocks.0.attn.to_q.weight", ()),
    ("transformer", "pos_embed.pos_embed", (1, 10, 128)),
    ("vae", "encoder.down_blocks.0.resnets.0.conv2.weight", (33, 32, 3, 3)),
    ("vae", "encoder.down_blocks.0.resnets.0.conv2.weight", (0, 32, 3, 3)),
    ("vae", "decoder.conv_in.weight", (96,)),
], ids=str)
def test_a_shape_that_sizes_are_read_off_is_wrong(model, part, name, shape):
    edit(model, part, put(name, *shape))
    assert str(model / part) in refusal(LOAD[part], model)


@pytest.mark.parametrize("part, start, scale", [
    ("text_encoder", "text_model.encoder.layers.0.mlp.fc1.", "scale_weight"),
    ("text_encoder_3", "encoder.block.1.layer.0.SelfAttention.q.", "scale_weight"),
    ("text_encoder_3", "", "scaled_fp8"),
    ("text_encoder_3", "encoder.block.1.layer.0.SelfAttention.q.", "weight_scale"),
    ("text_encoder_3", "encoder.block.1.layer.0.SelfAttention.q.", "SCB"),
    ("text_encoder_3", "shared.", "comfy_quant"),
    ("transformer", "transformer_blocks.0.attn.to_q.", "scale_weight"),
    ("vae", "encoder.conv_in.", "weight_scale")])
def test_weights_with_scales_beside_them_are_not_read_without(model, part, start, scale):
    edit(model, part, put(start + scale, 1))
    assert re.search(f"{part}: tensor {start}{scale} does not belong there: quantised .* plain fp8", refusal(
        LOAD[part], model))


@pytest.mark.parametrize("start", ["model.diffusion_model.", "text_encoders.t5xxl.transformer."])
def test_weights_with_scales_beside_them_are_not_read_without_from_a_single_file(single_file, start):
    line = refusal(pipeline.load_pipeline, single_file(put(start + "scaled_fp8", 1)))
    assert f"{start}scaled_fp8 does not belong there: quantised" in line


def test_weights_that_are_integers_are_not_taken_for_numbers(model):
    edit(model, "text_encoder_3", lambda tensors: tensors.update({"shared.weight": tensors["shared.weight"].char()}))
    assert "tensor shared.weight holds I8" in refusal(text.load_text_encoders, model)


def test_plain_fp8_and_what_published_files_have_beside_their_weights_are_read(make_pair, model, single_file):
    def change(tensors, t5="", clip=None):
        for name in [name for name in tensors if name.startswith(t5)]:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{t5}encoder.embed_tokens.weight"] = torch.zeros(131, 224)
        tensors[f"{t5}logit_scale"] = torch.tensor(4.6)
        if clip:
            tensors[f"{clip}text_model.embeddings.position_ids"] = torch.arange(14)[None]
            tensors["text_encoders.clip_l.logit_scale"] = torch.tensor(4.6)

    edit(model, "text_encoder_3", change)
    file = single_file(lambda tensors: change(tensors, T5, "text_encoders.clip_l.transformer."))
    original = make_pair("SD3-Medium", "folder").ours.text
    original = {name: tensor.to(torch.float8_e4m3fn).float() if name.startswith("t5.") else tensor
                for name, tensor in original.state_dict().items()}
    for path in (model, file):
        state = text.load_text_encoders(path).state_dict()
        assert state.keys() == original.keys() and all(torch.equal(state[name], original[name]) for name in state)


def test_a_t5_that_is_lost_is_missed_but_one_can_go_without(make_pair, model, single_file):
    words, without = ["a red circle"], make_pair("SD3-Medium", "folder without T5").ours.text
    shutil.rmtree(model / "text_encoder_3")
    assert re.search('without text_encoder_3/.*"text_encoder_3": .null, null.', refusal(LOAD["text_encoder"], model))
    lost = single_file(lambda tensors: [tensors.update({name.replace("xxl.transformer.", "xxl."): tensors.pop(name)})
                                        for name in list(tensors) if name.startswith(T5)])
    assert re.search("tensor text_encoders.t5xxl.encoder.* go without T5", refusal(LOAD["text_encoder"], lost))

    index = json.loads((model / "model_index.json").read_text())
    (model / "text_encoder_3").symlink_to(pipeline.TINY / "text_encoder_3")  # of another model, and not to be read
    put_file(model / "model_index.json", json.dumps({**index, "text_encoder_3": [None, None]}).encode())
    for ours, expected in zip(text.load_text_encoders(model)(words), without(words), strict=True):
        assert torch.equal(ours, expected)


CLIP, T5 = "text_encoders.clip_g.transformer.text_model.", "text_encoders.t5xxl.transformer."


@pytest.mark.parametrize("name, shape", [
    (CLIP + "embeddings.token_embedding.weight", (627,)),
    (CLIP + "embeddings.token_embedding.weight", (0, 128)),
    (CLIP + "embeddings.position_embedding.weight", ()),
    (CLIP + "encoder.layers.0.mlp.fc1.weight", (384, 0)),
    ("text_encoders.clip_g.transformer.text_projection.weight", (96,)),
    (T5 + "shared.weight", (131, 224, 1)),
    (T5 + "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 0)),
    (T5 + "encoder.block.0.layer.0.SelfAttention.q.weight", (127, 224)),
    (T5 + "encoder.block.0.layer.1.DenseReluDense.wi_0.weight", (160,)),
    (T5 + "encoder.block.1.layer.1.DenseReluDense.wi_0.weight", (160,)),
], ids=str)
def test_a_shape_that_a_text_encoder_is_read_off_is_wrong(single_file, name, shape):
    file = single_file(put(name, *shape))
    line = refusal(text.load_text_encoders, file)
    assert name.split("transformer.")[1] in line and str(file) in line


@pytest.mark.parametrize("load, start, words", [
    (text.load_text_encoders, "text_encoders.", "holds no text encoders"),
    (text.load_text_encoders, CLIP + "embeddings.", "text_model.embeddings.token_embedding.weight"),
    (text.load_text_encoders, CLIP + "encoder.layers.0.mlp.fc1.weight", "layers.0.mlp.fc1.weight is missing"),
    (text.load_text_encoders, "text_encoders.clip_l.transformer." + CLIP_BIAS, CLIP_BIAS),
    (text.load_text_encoders, "text_encoders.clip_g.transformer.text_projection", "text_projection.weight is missing"),
    (text.load_text_encoders, T5 + "shared.weight", "shared.weight"),
    (vae.load_vae, "first_stage_model.", "holds no SD3 vae"),
    (mmdit.load_mmdit, "model.diffusion_model.joint_blocks.2.x_block.mlp.fc1.bias", "x_block.mlp.fc1.bias is missing"),
])
def test_a_single_file_that_lacks_something(single_file, load, start, words):
    file = single_file(drop_all(start))
    line = refusal(load, file)
    assert words in line and str(file) in line


@pytest.mark.parametrize("change, words", [
    (drop("visual.trunk.stages.1.blocks.0.gamma"), "stages.1.blocks.0.gamma is missing"),
    (drop_all("visual.trunk.stages.3."), "3 stages"),
    (put("visual.head.proj.weight", 64), "visual.head.proj.weight has shape"),
    (put("visual.trunk.stages.0.blocks.0.gamma", 0), "stages.0.blocks.0.gamma has shape"),
    (drop_all("visual."), "holds no ConvNeXt"),
], ids=["counted tensor", "stage", "shape", "size", "all"])
def test_a_damaged_backbone_is_named(tmp_path, change, words):
    tensors = load_file(pipeline.TINY / "backbone" / adversarial.BACKBONE_FILE)
    change(tensors)
    save_file(tensors or {"a": torch.zeros(1)}, tmp_path / adversarial.BACKBONE_FILE)
    line = refusal(adversarial.load_backbone, tmp_path)
    assert words in line and str(tmp_path) in line


FILE_DAMAGE = {"cut": lambda whole: whole[:len(whole) // 2], "text": lambda whole: b"Not tensors at all. " * 9,
               "empty": lambda whole: b""}


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
@pytest.mark.parametrize("kind", [*FILE_DAMAGE, "only a pickle"])
def test_a_damaged_file_is_named(model, part, kind):
    file = model / part / f"{TENSORS[part]}.safetensors"
    if kind in FILE_DAMAGE:
        put_file(file, FILE_DAMAGE[kind](file.read_bytes()))
    else:
        file.rename(file.with_name("pytorch_model.bin"))
    assert str(model / part) in refusal(LOAD[part], model)


@pytest.mark.parametrize("kind", FILE_DAMAGE)
def test_a_damaged_single_file_is_named(fails, make_pair, tmp_path, kind):
    file = tmp_path / "sd3.safetensors"
    file.write_bytes(FILE_DAMAGE[kind](make_pair("SD3-Medium", "file").path.read_bytes()))
    assert str(file) in fails("--model", file, "--prompt", "x")


def test_a_pickle_is_never_opened(fails, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "opened"),)

    (tmp_path / "sd3.ckpt").write_bytes(pickle.dumps(Trap()))
    torch.save(Trap(), tmp_path / "sd3.safetensors")
    for name in ("sd3.ckpt", "sd3.safetensors"):
        assert name in refusal(pipeline.load_pipeline, tmp_path / name)
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


@pytest.mark.parametrize("name", [
    "transformer/config.json", "scheduler/scheduler_config.json", "text_encoder/config.json",
    "tokenizer/tokenizer_config.json", "tokenizer_3/tokenizer.json"])
@pytest.mark.parametrize("content", ["{not JSON", "[]"])
def test_damaged_settings(model, name, content):
    put_file(model / name, content.encode())
    part = name.split("/")[0]
    assert str(model / part) in refusal(LOAD[part], model)


@pytest.mark.parametrize("name, settings", [
    ("transformer/config.json", {"num_attention_heads": 3}),
    ("transformer/config.json", {"num_attention_heads": "two"}),
    ("text_encoder_3/config.json", {"relative_attention_max_distance": 8}),  # of 32 buckets, 8 lie below
    ("vae/config.json", {"norm_num_groups": 7}),
    ("vae/config.json", {"scaling_factor": 0}),
    ("vae/config.json", {"scaling_factor": 10**400}),
    ("vae/config.json", {"shift_factor": [1]}),
    *(("scheduler/scheduler_config.json", settings) for settings in (
        {"shift": "three"}, {"shift": -1}, {"shift": 0}, {"shift": None}, {"shift": float("nan")},
        {"use_dynamic_shifting": True}, {"use_karras_sigmas": True}, {"shift_terminal": 0.1})),
    ("text_encoder/config.json", {"num_attention_heads": 0}),
    ("tokenizer/tokenizer_config.json", {"model_max_length": "long"}),
    ("tokenizer/tokenizer_config.json", {"pad_token": None}),
    ("tokenizer/tokenizer_config.json", {"eos_token": "of another model"}),
    ("tokenizer_3/tokenizer_config.json", {"extra_ids": 10**9}),
], ids=str)
def test_settings_that_make_no_sense(model, name, settings):
    file, part = model / name, name.split("/")[0]
    put_file(file, json.dumps({**json.loads(file.read_text()), **settings}).encode())
    assert str(model / part) in refusal(LOAD[part], model)


@pytest.mark.parametrize("settings, side", [
    ({"sample_size": None}, 38), ({}, 38), ({"sample_size": 12}, 12), ({"sample_size": [64, 64]}, None),
    ({"sample_size": -8}, None), ({"sample_size": 40}, None), ({"sample_size": 10**9}, None)], ids=str)
def test_the_size_of_images_is_the_models_own_or_refused(fails, model, settings, side):
    file = model / "transformer" / "config.json"
    put_file(file, json.dumps({name: value for name, value in json.loads(file.read_text()).items()
                               if name != "sample_size"} | settings).encode())
    if side is None:
        assert re.search("sample_size|does not fit", fails("--model", model, "--prompt", "x"))
    else:
        assert pipeline.load_pipeline(model).latent_shape() == (16, side, side)


@pytest.mark.parametrize("sizes", [{"num_hidden_layers": 10**6}, {"hidden_size": 10**9}, {"vocab_size": "wide"},
                                   {"quantization_config": {}, "auto_map": {"AutoConfig": "x.y"}}], ids=str)
def test_sizes_are_those_of_the_tensors_whatever_the_settings_say(make_pair, model, sizes):
    file = model / "text_encoder" / "config.json"
    put_file(file, json.dumps({**json.loads(file.read_text()), **sizes}).encode())
    words, expected = ["a red circle"], make_pair("SD3-Medium", "folder").ours.text
    assert torch.equal(text.load_text_encoders(model)(words)[1], expected(words)[1])


def test_both_clips_read_as_many_tokens_as_either_tokenizer_gives(model):
    file = model / "tokenizer" / "tokenizer_config.json"
    put_file(file, json.dumps({**json.loads(file.read_text()), "model_max_length": 5}).encode())
    assert text.load_text_encoders(model)(["a red circle"])[0].shape == (1, 5 + 13, 224)


def test_a_tokenizer_without_its_vocabulary_is_not_taken_for_an_empty_one(model):
    for file in (model / "tokenizer").iterdir():
        if file.name != "tokenizer_config.json":
            file.unlink()
    assert str(model / "tokenizer") in refusal(text.load_text_encoders, model)


def test_text_encoders_of_another_model_are_named(model):
    edit(model, "transformer", put("context_embedder.weight", 128, 230))
    network, encoders = mmdit.load_mmdit(model), text.load_text_encoders(model)
    with pytest.raises(UserError, match="give 224 and 160 features, its transformer reads 230 and 160"):
        text.check_widths(encoders, network, model)


def test_clips_that_are_wider_than_the_context_are_refused(single_file):
    def narrow(tensors):
        drop_all(T5)(tensors)
        put("model.diffusion_model.context_embedder.weight", 128, 190)(tensors)  # CLIP-L and CLIP-G: 64 + 128
    assert "64 + 128" in refusal(text.load_text_encoders, single_file(narrow))


# ---------------------------------------------------------------------------------------------------- our own mistakes

@pytest.mark.parametrize("owner", [mmdit.MMDiT, mmdit.JointBlock, vae.VAE, text.TextEncoders, adversarial.ConvNeXt])
@pytest.mark.parametrize("mistake", [NameError, TypeError, AttributeError])
def test_a_mistake_in_our_code_is_not_blamed_on_the_files(make_pair, monkeypatch, owner, mistake):
    def init(self, *arguments, **more):
        raise mistake("a typo")

    path = make_pair("SD3-Medium", "folder").path
    monkeypatch.setattr(owner, "__init__", init)
    with pytest.raises(mistake, match="a typo"):
        if owner is adversarial.ConvNeXt:
            adversarial.load_backbone(pipeline.TINY)
        pipeline.load_pipeline(path)


# ------------------------------------------------------------------------------------------------------ prompt files

@pytest.mark.parametrize("name, content, words", [
    ("a.txt", b"", "holds no prompt"),
    ("a.txt", b" \n\t\n", "holds no prompt"),
    ("a.txt", "café".encode("latin-1"), "not UTF-8"),
    ("a.txt", b"PK\x03\x04\xff\xfe", "not UTF-8"),
    ("a.jsonl", b'{"prompt": "a cat"}\n{"prompt": a dog}\n', "line 2"),
    ("a.jsonl", b'{"text": "a cat"}\n', "record 1"),
    ("a.jsonl", b'{"prompt": 7}\n', "record 1"),
    ("a.jsonl", b'{"prompt": "half a character: \\ud83d"}\n', "record 1"),
    ("a.json", b'[\n"a cat",\n"a dog",,\n]', "line 3"),
    ("a.json", b'["a cat", ["a dog"]]', "record 2"),
    ("a.json", b'{"prompts": {"a": "cat"}}', "record 1"),
    ("a.json", b"[" * 200_000, "cannot be read as JSON"),
    ("a.json", b"[]", "holds no prompt"),
    ("a.txt", b'[\n  {"prompt": "a cat"},\n', "cannot be read as JSON"),
    ("a.yaml", b"- a cat\n", "not from .yaml"),
    ("a.txt", "a cat".encode("utf-16-le"), "not UTF-8 text"),
    ("a.txt", "a cat".encode("utf-32"), "not UTF-8 text"),
    ("a.txt", "a cat".encode("utf-16") + b"x", "not UTF-8 text"),
    ("a.txt", "猫の写真".encode("utf-16-le"), "not UTF-8 text"),
    ("a.parquet", b"PAR1\x15\x04\x15\x00", "not UTF-8 text"),
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
    ("a.JSONL", '{"prompt": "a \\"red\\" cat"}\r\n"two dogs, é"\r\n'),
    ("a.ndjson", '{"prompt": "a \\"red\\" cat"}\n{"prompt": "two dogs, é"}'),
    ("a.json", '[\n  "a \\"red\\" cat",\n  "two dogs, é"\n]'),
    ("a.Json", '[{"id": 1, "prompt": "a \\"red\\" cat"}, {"prompt": null, "ori_prompt": "two dogs, é"}]'),
    ("a.json", '{"prompt": "a \\"red\\" cat"}\n{"prompt": "two dogs, é"}'),
    ("a.txt", ' [\n  {"prompt": "a \\"red\\" cat"},\n  {"prompt": "two dogs, é"}\n]'),
    ("a.CSV", 'prompt;id\n"a ""red"" cat";1\ntwo dogs, é;2\n'),
    ("prompts", 'a "red" cat\rtwo dogs, é'),
])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_prompt_files_are_read(tmp_path, name, content, encoding):
    (tmp_path / name).write_bytes(content.removeprefix("\ufeff" * (encoding == "utf-16")).encode(encoding))
    assert prompts.read_prompts(tmp_path / name) == ['a "red" cat', "two dogs, é"]


def test_brackets_alone_make_no_json(tmp_path):
    (tmp_path / "a.txt").write_text("[1] a cat\n{a|b} dog\n[photo], a cow\n")
    assert prompts.read_prompts(tmp_path / "a.txt") == ["[1] a cat", "{a|b} dog", "[photo], a cow"]


def test_only_line_ends_end_a_prompt(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "one\u2028line"}, ensure_ascii=False), encoding="utf-8")
    assert prompts.read_prompts(tmp_path / "a.jsonl") == ["one\u2028line"]
    (tmp_path / "a.csv").write_text('prompt\n"two\nlines"\n')
    assert prompts.read_prompts(tmp_path / "a.csv") == ["two\nlines"]


# ---------------------------------------------------------------------------------------------------- long prompts

def test_a_prompt_that_is_too_long_is_cut_with_a_warning(make_pair, capfd):
    encoders = text.load_text_encoders(make_pair("SD3-Medium", "folder").path)
    start = "red circle " * 5 + "on a "  # 12 words, as many as CLIP and T5 both read
    context, pooled = encoders([start + "white background"])
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("warning: ") and "white background" in line for line in lines)
    assert any("CLIP" in line for line in lines) and any("T5" in line for line in lines)
    short_context, short_pooled = encoders([start])
    assert torch.equal(context, short_context) and torch.equal(pooled, short_pooled)
    assert capfd.readouterr().err == ""


def test_the_warning_of_a_long_prompt_is_one_short_line(make_pair, capfd):
    text.load_text_encoders(make_pair("SD3-Medium", "folder").path)(["red\n" * 5000])
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("warning: ") and len(line) < 500 for line in lines)


def test_long_prompts_after_the_third_are_counted_and_not_shown(make_pair, capfd):
    encoders = text.load_text_encoders(make_pair("SD3-Medium", "folder").path)
    for _ in range(2):
        encoders([f"{'red ' * 12}{word}" for word in ("circle", "square", "cross", "diamond", "triangle", "shape")])
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 * (3 + 1) and sum("counted" in line for line in lines) == 2
    assert {reader: len(cut) for reader, cut in encoders.cut.items()} == {"CLIP": 6, "T5": 6}
