"""Official sizes: text encoded once, memory for compute, exports. On small models here."""

import shutil
import sys
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file

import flow
import mmdit
import pipeline
import prompts
import quick_train
import sample
import shapes
import text
import train
import weights
from commandline import UserError, run_script
from conftest import KINDS, check_gradients, read_state, stability_transformer, stability_vae
from networks import Arithmetic
from test_against_diffusers import TOLERANCE

PROMPTS = ["a red circle", "a blue square", "a dotted shape", "a circle"]


# --------------------------------------------------------------------------------------------- text, encoded beforehand

@pytest.fixture(scope="module")
def unknown(tmp_path_factory):
    """The shipped model as one that the tiny world does not know, and a file of prompts."""
    folder = tmp_path_factory.mktemp("unknown")
    shutil.copytree(pipeline.TINY, folder / "model")
    shapes.recogniser_file(folder / "model").unlink()
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder


def test_prompts_are_encoded_once_and_the_encoders_gone_before_the_networks_come(
        unknown, tmp_path, monkeypatch, capsys):
    order, load, networks = [], prompts.load_text_encoders, train.open_networks
    monkeypatch.setattr(prompts, "load_text_encoders", lambda *a: order.append("text") or load(*a))
    monkeypatch.setattr(train, "open_networks", lambda *a: order.append("networks") or networks(*a))

    def run(out):
        quick_train.run("--bare", "--stage", 1, "--model", unknown / "model", "--prompts", unknown / "prompts.txt",
                        "--text-cache", tmp_path / "text", "--iterations", 2, "--out", tmp_path / out, "--batch", 2)
        return tmp_path / out

    one = run("one")
    assert order == ["text", "networks", "text"]  # the last to write the student's folder
    files = list((tmp_path / "text").rglob("*.safetensors"))
    assert 2 <= len(files) <= 5  # what is drawn, and ""
    assert f"{len(files)} prompts to encode" in capsys.readouterr().out
    order.clear()
    two = run("two")
    assert order == ["networks", "text"]
    first, second = read_state(one), read_state(two)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert pipeline.load_pipeline(one).text.t5 is not None


@pytest.fixture
def cached(unknown):
    """cached(folder) -> text encoded beforehand, in that folder."""
    return lambda folder: prompts.CachedText(folder, unknown / "model", Arithmetic(torch.device("cpu"), torch.float32))


def test_cached_text_is_what_the_encoders_say_and_goes_on_where_it_stopped(cached, tmp_path, monkeypatch):
    calls, encode = [], text.TextEncoders.forward
    monkeypatch.setattr(text.TextEncoders, "forward",
                        lambda self, words: calls.append(list(words)) or encode(self, words))
    first, second = sorted(PROMPTS)[:2], sorted(PROMPTS)[2:]
    cached(tmp_path).encode_all(first)
    calls.clear()
    again = cached(tmp_path)
    again.encode_all(PROMPTS, batch=2)
    assert calls == [[""], second]  # the first tells the size
    for mine, theirs in zip(again(PROMPTS[::-1]), text.load_text_encoders(pipeline.TINY)(PROMPTS[::-1])):
        assert torch.allclose(mine, theirs, atol=1e-5)
    assert not list(tmp_path.rglob("*.part"))


def test_text_that_the_disk_cannot_hold_is_refused_before_it_is_encoded(cached, tmp_path, monkeypatch):
    monkeypatch.setattr(prompts.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="do not fit"):
        cached(tmp_path).encode_all(PROMPTS)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_two_runs_that_encode_the_same_prompt_do_not_write_one_file(tmp_path):
    with weights.replacing(tmp_path / "a") as one, weights.replacing(tmp_path / "a") as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


# ----------------------------------------------------------------------------------------------------- memory and work

STAGES = {1: ["--stage", 1, "--iterations", 2],
          2: "--stage 2 --iterations 2 --objective adv --lora 2 alone=1 warmup=0".split()}


@pytest.fixture(scope="module")
def plain(two_steps, tmp_path_factory):
    """plain(stage, lora) -> the run that the others are compared with, and its words."""
    folder = tmp_path_factory.mktemp("plain")

    @cache
    def make(stage, lora):
        runs = ["--student", two_steps, "--reference", two_steps] if stage == 2 else []
        words = STAGES[stage] + runs + ["--lora", lora]
        quick_train.run("--bare", *words, "--out", folder / f"{stage}-{lora}")
        return folder / f"{stage}-{lora}", words
    return make


@pytest.mark.parametrize("stage, lora, change", [
    (1, 0, ["--at-once", 2]), (1, 0, ["--offload"]), (1, 0, "recompute"), (1, 2, "recompute"),
    (2, 2, ["--at-once", 2]), (2, 2, ["--offload"]), (2, 2, "recompute")])
def test_what_saves_memory_changes_nothing(plain, tmp_path, monkeypatch, stage, lora, change):
    before, words = plain(stage, lora)
    if change == "recompute":
        monkeypatch.setitem(train.PRESETS["tiny"][stage], "recompute", True)
        again, forward = [], mmdit.checkpoint
        monkeypatch.setattr(mmdit, "checkpoint", lambda *a, **more: again.append(a) or forward(*a, **more))
    quick_train.run("--bare", *words, "--out", tmp_path / "out", *(change if change != "recompute" else []))
    assert change != "recompute" or again
    check_gradients(read_state(tmp_path / "out"), read_state(before), share=0.03)


# ------------------------------------------------------------------------------------------------------------- exports

def export(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
    run_script(sample.main)


@pytest.mark.parametrize("kind", KINDS)
def test_folder_and_single_file_are_exact_inverses(make_pair, tmp_path, monkeypatch, kind):
    theirs, _, folder = make_pair(kind, "folder")
    export(monkeypatch, "--model", folder, "--export", tmp_path / "file" / "student.safetensors")
    export(monkeypatch, "--model", tmp_path / "file" / "student.safetensors", "--export", tmp_path / "back")
    written = load_file(tmp_path / "file" / "student.safetensors")
    for prefix, expected in (("model.diffusion_model.", stability_transformer(theirs.transformer.state_dict())),
                             ("first_stage_model.", stability_vae(theirs.vae.state_dict()))):
        part = {name.removeprefix(prefix): tensor for name, tensor in written.items() if name.startswith(prefix)}
        assert part.keys() == expected.keys() and all(torch.equal(part[name], expected[name]) for name in part)
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        before, after = (load_file(next((path / part).glob("*.safetensors"))) for path in (folder, tmp_path / "back"))
        assert before.keys() - after.keys() <= {"encoder.embed_tokens.weight"}
        assert all(torch.equal(before[name], after[name]) for name in after)


def test_a_student_draws_the_same_from_each_layout_and_in_diffusers(two_steps, tmp_path, monkeypatch):
    export(monkeypatch, "--model", two_steps, "--export", tmp_path / "student.safetensors")
    export(monkeypatch, "--model", tmp_path / "student.safetensors", "--export", tmp_path / "back")
    students = [pipeline.load_pipeline(path)
                for path in (two_steps, tmp_path / "student.safetensors", tmp_path / "back")]
    first, *others = (pipeline.generate(student, ["a red circle"], [0]) for student in students)
    # the encoders' weights lie otherwise in memory
    assert all(torch.allclose(first, other, atol=1e-5) for other in others)
    for folder in (two_steps, tmp_path / "back"):
        theirs = StableDiffusion3Pipeline.from_pretrained(folder)
        theirs.set_progress_bar_config(disable=True)
        noise = flow.initial_noise(students[0].latent_shape(), [0])
        drawn = theirs("a red circle", latents=noise, guidance_scale=1.0, sigmas=[1.0, 0.5], output_type="latent",
                       max_sequence_length=students[0].text.t5_length).images  # diffusers shifts them to 1 and 0.75
        assert (drawn - first).abs().max() <= TOLERANCE["latents"] * first.abs().max()


def test_heads_of_any_width_come_back_from_a_single_file(make_pair, tmp_path):
    plain = make_pair("SD3-Medium", "folder")
    folder = shutil.copytree(plain.path, tmp_path / "model")
    for part, settings in (("transformer", {"num_attention_heads": 4}), ("text_encoder_2", {"num_attention_heads": 4}),
                           ("text_encoder", {"num_attention_heads": 2, "hidden_act": "gelu"})):
        config = folder / part / "config.json"
        weights.write_json(config, {**weights.read_json(config), **settings})
    pipeline.save_single_file(pipeline.load_pipeline(folder), tmp_path / "single" / "sd3.safetensors")
    ours, back = pipeline.load_pipeline(folder), pipeline.load_pipeline(tmp_path / "single" / "sd3.safetensors")
    for draw in (lambda p: p.text(["a red circle"])[1], lambda p: p.text(["a red circle"])[0][:, :14],
                 lambda p: p.sample(torch.ones(1, 16, 8, 8), plain.ours.text(["a"]), guidance=1)):
        first, again, other = draw(ours), draw(back), draw(plain.ours)
        assert torch.allclose(first, again, atol=1e-5) and not torch.allclose(first, other, atol=1e-2)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_the_encoders_of_a_student_are_those_of_its_teacher_whatever_the_arithmetic(unknown, tmp_path, stored):
    teacher, out = shutil.copytree(unknown / "model", tmp_path / "teacher"), tmp_path / "student"
    text.save_text_encoders(text.load_text_encoders(teacher, dtype=torch.float32).to(stored), teacher)
    quick_train.run("--bare", "--stage", 1, "--model", teacher, "--prompts", unknown / "prompts.txt", "--iterations", 1,
                    "--batch", 2, "--dtype", "bf16", "--text-cache", tmp_path / "text", "--out", out)
    for name in text.ENCODERS:
        before, after = (load_file(folder / name / "model.safetensors") for folder in (teacher, out))
        assert before.keys() == after.keys() and {tensor.dtype for tensor in after.values()} == {stored}
        assert all(torch.equal(before[name], after[name]) for name in before)
    theirs = StableDiffusion3Pipeline.from_pretrained(out)  # its other parts are in fp32
    theirs.set_progress_bar_config(disable=True)
    student = pipeline.load_pipeline(out)
    noise = flow.initial_noise(student.latent_shape(), [0])
    drawn = theirs("a red circle", latents=noise, guidance_scale=1.0, sigmas=[1.0, 0.5], output_type="latent",
                   max_sequence_length=student.text.t5_length).images
    ours = pipeline.generate(student, ["a red circle"], [0])
    assert (drawn - ours).abs().max() <= TOLERANCE["latents"] * ours.abs().max()


@pytest.mark.parametrize("arguments, words", [
    ("--export {tmp}/there", "is there already"), ("--export {tmp}/there.safetensors", "is there already"),
    ("--model nowhere --export {tmp}/new", "nowhere"), ("--export {tmp}/there.safetensors/x", "cannot be written")])
def test_an_export_overwrites_nothing(arguments, words, tmp_path, monkeypatch, capsys):
    (tmp_path / "there").mkdir()
    for file in (tmp_path / "there" / "mine", tmp_path / "there.safetensors"):
        file.write_text("mine")
    with pytest.raises(SystemExit):
        export(monkeypatch, *arguments.format(tmp=tmp_path).split())
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and (tmp_path / "there.safetensors").read_text() == "mine"
