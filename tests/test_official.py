"""Official sizes: text encoded once, memory for compute, the work of an iteration counted, exports. On small models here."""

import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file

import costs
import flow
import quick_train
import sample
import shapes
import text
import train
import weights
from conftest import KINDS, read_state, stability_transformer, stability_vae
from test_against_diffusers import TOLERANCE

PROMPTS = ["a red circle", "a blue square", "a dotted shape", "a circle"]


# --------------------------------------------------------------------------------------------- text, encoded beforehand

@pytest.fixture(scope="module")
def unknown(tmp_path_factory):
    """The shipped model as one that the tiny world does not know, and a file of prompts."""
    folder = tmp_path_factory.mktemp("unknown")
    shutil.copytree(sample.TINY, folder / "model")
    shapes.recogniser_file(folder / "model").unlink()
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder


@pytest.fixture
def train_unknown(train_run, unknown, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "Sheet", lambda *args, **sizes: None)

    def run(out, *flags):
        train_run("--stage", 1, "--model", unknown / "model", "--prompts", unknown / "prompts.txt", "--text-cache",
                  tmp_path / "text", "--iterations", 2, "--out", tmp_path / out, *flags)
        return tmp_path / out
    return run


def test_prompts_are_encoded_once_and_the_encoders_gone_before_the_networks_come(train_unknown, unknown, tmp_path, monkeypatch,
                                                                                  capsys):
    order, load, networks = [], train.load_text_encoders, train.open_networks
    monkeypatch.setattr(train, "load_text_encoders", lambda *a: order.append("text") or load(*a))
    monkeypatch.setattr(train, "open_networks", lambda *a, **how: order.append("networks") or networks(*a, **how))
    one = train_unknown("one", "--batch", 2)
    assert order == ["text", "networks", "text"]  # the last to write the student's folder
    files = list((tmp_path / "text").rglob("*.safetensors"))
    assert 2 <= len(files) <= 5 and f"{len(files)} prompts to encode" in capsys.readouterr().out  # what is drawn, and ""
    order.clear()
    two = train_unknown("two", "--batch", 2)
    assert order == ["networks", "text"]
    assert all(torch.equal(tensor, read_state(two)[name]) for name, tensor in read_state(one).items())
    assert sample.load_pipeline(one).text.t5 is not None


def cached(folder, calls):
    def load(device, dtype):
        encoders = text.load_text_encoders(sample.TINY, device, dtype)
        return lambda prompts: calls.append(list(prompts)) or encoders(prompts)
    return text.CachedText(folder, load, torch.device("cpu"), torch.float32)


def test_cached_text_is_what_the_encoders_say_and_goes_on_where_it_stopped(tmp_path):
    calls = []
    cached(tmp_path, calls).encode(PROMPTS[:2])
    calls.clear()
    again = cached(tmp_path, calls)
    again.encode(PROMPTS)
    assert sum(calls[1:], []) == PROMPTS[2:]  # after the first, which tells the size
    for mine, theirs in zip(again(PROMPTS[::-1]), text.load_text_encoders(sample.TINY)(PROMPTS[::-1])):
        assert torch.allclose(mine, theirs, atol=1e-5)
    assert not list(tmp_path.glob("*.part"))


def test_text_that_the_disk_cannot_hold_is_refused_before_it_is_encoded(tmp_path, monkeypatch):
    monkeypatch.setattr(text.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    calls = []
    with pytest.raises(weights.UserError, match="do not fit"):
        cached(tmp_path, calls).encode(PROMPTS)
    assert len(calls) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", ["--cache 8-12", "--reference nowhere", "--objective adv --backbone nowhere"])
def test_stage_2_refuses_what_it_can_before_text_is_encoded(train_run, two_steps, tmp_path, monkeypatch, flags):
    monkeypatch.setattr(train, "open_text", lambda *args: pytest.fail("text was encoded first"))
    with pytest.raises(weights.UserError):
        train_run("--stage", 2, "--student", two_steps, *flags.split(), "--out", tmp_path / "out")


# ----------------------------------------------------------------------------------------------------- memory and work

STAGES = {1: "--stage 1 --iterations 2", 2: "--stage 2 --iterations 2 --objective adv --warmup 0 --lora 2"}


@pytest.mark.parametrize("stage, flags", [
    (1, "--at-once 2"), (1, "--recompute"), (1, "--offload"), (1, "--recompute --lora 2"), (1, "--compile"),
    (2, "--at-once 2"), (2, "--recompute"), (2, "--offload")])
def test_what_saves_memory_or_time_changes_nothing(train_run, two_steps, tmp_path, monkeypatch, stage, flags):
    if "--compile" in flags:  # what inductor makes of it is measured, not tested: it takes a minute
        compile_block = torch.nn.Module.compile
        monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_block(self, backend="eager", fullgraph=True))
    for owner, name, value in quick_train.bare():
        monkeypatch.setattr(owner, name, value)
    common = [*STAGES[stage].split(), *(["--student", two_steps, "--reference", two_steps] if stage == 2 else []),
              *(["--lora", 2] if "--lora" in flags else [])]
    train_run(*common, "--out", tmp_path / "plain")
    train_run(*common, "--out", tmp_path / "other", *flags.split())
    plain, other = read_state(tmp_path / "plain"), read_state(tmp_path / "other")
    assert plain.keys() == other.keys()
    for name in plain:
        if name.endswith("exp_avg_sq"):
            assert torch.allclose(plain[name], other[name], rtol=2e-3, atol=1e-4 * plain[name].max().item()), name


def count(counted, *flags, stage=1, depth=4, at_once=1, size=512):
    args = SimpleNamespace(depth=depth, size=(size, size), device=torch.device("cpu"))
    settings = train.parse_arguments(["--stage", str(stage), "--preset", "sd3-medium", "--device", "cpu", "--dtype", "bf16",
                                      "--at-once", str(at_once), *flags])
    return counted(args, settings)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("flags, least, most", [(["--recompute"], 11, 11.5), (["--no-recompute"], 9, 9.5)])
def test_a_sample_of_stage_1_takes_no_more_work_than_it_must(elsewhere, flags, least, most):
    """In forward passes F; the released code takes 13 with recomputation and 11 without."""
    with torch.device("meta"):
        one = costs.forward_flops(costs.new_mmdit("sd3-medium", 4), 64, 64, costs.TOKENS)
    assert least < count(costs.count_flops, *flags) / 64 / one <= most


def test_an_iteration_reads_nothing_back_from_the_device_and_memory_goes_where_it_should(elsewhere):
    """Over fake tensors: reading a value would raise an error. Bytes for each weight that is trained, fp32: 16."""
    with torch.device("meta"):  # all but the stored table of positions is trained
        parameters = sum(p.numel() for name, p in costs.new_mmdit("sd3-medium", 4).named_parameters() if name != "pos_embed")
    full, offloaded, adapters = (count(costs.count_memory, *flags, size=256) for flags in ([], ["--offload"], ["--lora", "64"]))
    assert 2 * 16 + 2 < full / parameters < 2 * 16 + 6     # student, fake score; teacher in bf16; the rest is activations
    assert full - offloaded > 0.95 * 8 * parameters        # one of the two optimisers' states is elsewhere
    assert adapters < 0.2 * full
    four, recomputed = (count(costs.count_memory, flag, at_once=8, size=512)
                        for flag in ("--no-recompute", "--recompute"))
    assert recomputed - full < 0.6 * (four - full)


def test_an_update_of_stage_2_reads_nothing_back_either_and_recomputes_decoder_and_backbone_too(elsewhere):
    whole, recomputed = (count(costs.count_memory, flag, stage=2, size=1024) for flag in ("--no-recompute", "--recompute"))
    assert recomputed < 0.65 * whole


# ------------------------------------------------------------------------------------------------------------- exports

def export(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
    weights.run_script(sample.main)


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
    students = [sample.load_pipeline(path) for path in (two_steps, tmp_path / "student.safetensors", tmp_path / "back")]
    first, *others = (sample.generate(student, ["a red circle"], [0]) for student in students)
    assert all(torch.allclose(first, other, atol=1e-5) for other in others)  # the encoders' weights lie otherwise in memory
    for folder in (two_steps, tmp_path / "back"):
        theirs = StableDiffusion3Pipeline.from_pretrained(folder)
        theirs.set_progress_bar_config(disable=True)
        noise = flow.initial_noise(students[0].latent_shape(), [0])
        drawn = theirs("a red circle", latents=noise, guidance_scale=1.0, sigmas=[1.0, 0.5], output_type="latent",
                       max_sequence_length=students[0].text.t5_length).images  # diffusers shifts them to 1 and 0.75
        assert (drawn - first).abs().max() <= TOLERANCE["latents"] * first.abs().max()


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
