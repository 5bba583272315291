"""For all tests: small random SD3s of diffusers with ours read from each published layout, and commands run in here."""

import copy
import json
import os
import re
import signal
import sys
from collections import namedtuple
from functools import cache
from pathlib import Path
from unittest import mock

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # or diffusers' import makes it speak behind the last line

import pytest  # noqa: E402
import torch  # noqa: E402
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler  # noqa: E402
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoTokenizer, CLIPTextConfig, T5Config, T5EncoderModel  # noqa: E402
from transformers import CLIPTextModelWithProjection  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent))

import adversarial  # noqa: E402
import commandline  # noqa: E402
import pipeline  # noqa: E402
import train  # noqa: E402

torch.set_num_threads(1)  # networks are small here, and threads that wait for each other take long on a busy machine

KINDS = {
    "SD3-Medium": {}, "SD3.5-Large": {"qk_norm": "rms_norm"},
    "SD3.5-Medium": {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}}
Pair = namedtuple("Pair", "theirs ours path")


@pytest.fixture(scope="session")
def make_pair(tmp_path_factory):
    """make_pair(kind, layout) -> diffusers' pipeline and ours, read from files of that layout."""
    root = tmp_path_factory.mktemp("models")

    @cache
    def make(kind, layout):
        theirs, folder = build(kind), root / f"{kind} {layout}"
        if "without T5" in layout:
            parts = {**theirs.components, "text_encoder_3": None, "tokenizer_3": None}
            theirs = StableDiffusion3Pipeline(**parts)
        path = write_file(theirs, folder, layout) if "file" in layout else folder
        if "shards" in layout:
            write_shards(theirs, folder)
        elif path == folder:
            theirs.save_pretrained(folder)
        return Pair(theirs, pipeline.load_pipeline(path), path)

    return make


# ------------------------------------------------------------------------------------------------------ commands

def run_train(*words):
    """What `python train.py WORDS` does, on few samples, in fp32, without sheets and measures."""
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        with mock.patch("sys.argv", ["train.py", *"--bare --dtype fp32 --batch 4".split(), *map(str, words)]):
            train.main()
    finally:
        signal.signal(signal.SIGINT, on_interrupt)  # a run takes Ctrl-C for itself


def run_command(main, *words, capsys):
    """What a script's main function does with these words -> (exit status, stdout, stderr)."""
    capsys.readouterr()
    try:
        with mock.patch("sys.argv", ["script.py", *map(str, words)]):
            commandline.run_script(main)
    except SystemExit as end:
        return end.code or 0, *capsys.readouterr()
    return 0, *capsys.readouterr()


@pytest.fixture(scope="session")
def two_steps(tmp_path_factory):
    """A Stage I run of two iterations: the folder of its student of two steps."""
    out = tmp_path_factory.mktemp("runs") / "stage1"
    run_train("--stage", 1, "--iterations", 2, "--out", out)
    return out


@pytest.fixture(scope="session")
def backbone(tmp_path_factory):
    """A small ConvNeXt with random weights, in OpenCLIP's layout: the folder of its file."""
    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(0)
    network = adversarial.ConvNeXt((1, 2, 1, 1), (8, 12, 16, 24), 10)
    state = {f"visual.{name}": tensor for name, tensor in network.state_dict().items()}
    save_file(state, folder / adversarial.BACKBONE_FILE)
    return folder


def read_state(run):
    """The tensors of a run's state, by name; written by one process."""
    (file,) = (run / json.loads((run / "state.json").read_text())["tensors"]).glob("*.safetensors")
    return load_file(file)


# --------------------------------------------------------------------------------------------- random pipelines

@cache
def build(kind):
    """A pipeline of diffusers: the official VAE's constants, odd sizes elsewhere, weights that fp16 holds exactly."""
    tokenizers = [AutoTokenizer.from_pretrained(pipeline.TINY / f"tokenizer{n}") for n in ("", "_2", "_3")]
    clips = [CLIPTextModelWithProjection(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, projection_dim=projection,
        num_hidden_layers=3, num_attention_heads=width // 64, max_position_embeddings=tokenizer.model_max_length,
        hidden_act=activation, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)) for tokenizer, width, projection, activation in (
            (tokenizers[0], 64, 64, "quick_gelu"), (tokenizers[1], 128, 96, "gelu"))]
    t5 = T5EncoderModel(T5Config(
        vocab_size=len(tokenizers[2]), d_model=224, d_kv=64, num_heads=2, d_ff=160, num_layers=2,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False))  # untied, as T5-XXL's config has it
    transformer = SD3Transformer2DModel(
        sample_size=8, num_layers=3, num_attention_heads=2, joint_attention_dim=224, caption_projection_dim=128,
        pooled_projection_dim=160, pos_embed_max_size=19, **KINDS[kind])
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 64, 96), layers_per_block=1, latent_channels=16, norm_num_groups=32,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609)
    for seed, network in enumerate((*clips, t5, transformer, vae)):
        randomise(network.requires_grad_(False).eval(), seed)
    clips[0].text_projection.weight.copy_(torch.eye(64))  # as published
    theirs = StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), vae, clips[0], tokenizers[0], clips[1], tokenizers[1],
        t5, tokenizers[2])
    theirs.set_progress_bar_config(disable=True)
    return theirs


def randomise(network, seed):
    """No tensor is left at zero or one, and signals keep their size through the layers."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in network.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim == 1:  # a norm's weight, around one, or a bias
            noise = 0.3 * noise + name.endswith("weight")
        elif tensor.ndim != 3:  # 3: the position table
            noise = noise / tensor[0].numel() ** 0.5
        tensor.copy_(noise.half())
    if hasattr(network, "shared"):  # T5 ties these two, whatever its config says
        network.encoder.embed_tokens.weight = network.shared.weight


# ------------------------------------------------------------------------------------------- the published layouts

def write_shards(pipeline, folder):
    """fp16 variants in shards, and a transformer/config.json that leaves out what the tensors show."""
    halves = StableDiffusion3Pipeline(**{n: copy.deepcopy(part) for n, part in pipeline.components.items()})
    halves.to(torch.float16).save_pretrained(folder, variant="fp16", max_shard_size="500KB")
    config = folder / "transformer" / "config.json"
    kept = {k: v for k, v in json.loads(config.read_text()).items() if k not in ("qk_norm", "dual_attention_layers")}
    config.write_text(json.dumps(kept))


def write_file(pipeline, folder, layout):
    """Stability's single file, with tokenizers beside it."""
    prefix = "" if "without prefix" in layout else "model.diffusion_model."
    tensors = {prefix + n: t for n, t in stability_transformer(pipeline.transformer.state_dict()).items()}
    tensors |= {"first_stage_model." + n: t for n, t in stability_vae(pipeline.vae.state_dict()).items()}
    texts = {"clip_l": pipeline.text_encoder, "clip_g": pipeline.text_encoder_2, "t5xxl": pipeline.text_encoder_3}
    for name, encoder in texts.items():
        state = encoder.state_dict() if encoder else {}
        state.pop("encoder.embed_tokens.weight", None)  # `shared.weight` again
        tensors |= {f"text_encoders.{name}.transformer.{n}": t for n, t in state.items()}
    tensors["text_encoders.clip_l.transformer.text_projection.weight"] = torch.randn(64, 64)  # to be ignored
    folder.mkdir()
    save_file({n: t.clone().contiguous() for n, t in tensors.items()}, folder / "sd3.safetensors")
    for name, part in pipeline.components.items():
        if name.startswith("tokenizer") and part is not None:
            part.save_pretrained(folder / name)
    return folder / "sd3.safetensors"


# Independent of weights.py: from diffusers' names to Stability's, by the published correspondence.
OUTSIDE = {
    "pos_embed.pos_embed": "pos_embed", "pos_embed.proj": "x_embedder.proj", "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0", "proj_out": "final_layer.linear",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm_out.linear": "final_layer.adaLN_modulation.1"}
INSIDE = {
    "attn.to_out.0": "x_block.attn.proj", "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj", "attn.norm_q": "x_block.attn.ln_q", "attn.norm_k": "x_block.attn.ln_k",
    "attn2.norm_q": "x_block.attn2.ln_q", "attn2.norm_k": "x_block.attn2.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q", "attn.norm_added_k": "context_block.attn.ln_k",
    "norm1.linear": "x_block.adaLN_modulation.1", "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2", "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2"}
QKV = {
    "attn.to_{}": "x_block.attn.qkv", "attn.add_{}_proj": "context_block.attn.qkv", "attn2.to_{}": "x_block.attn2.qkv"}


def stability_transformer(state):
    out = {}
    last = max(int(name.split(".")[1]) for name in state if name.startswith("transformer_blocks."))
    pairs = [*OUTSIDE.items()]
    for block in range(last + 1):
        here, there = f"transformer_blocks.{block}.", f"joint_blocks.{block}."
        pairs += [(here + theirs, there + ours) for theirs, ours in (*INSIDE.items(), *QKV.items())]
    for theirs, ours in pairs:
        for kind in ("", ".weight", ".bias"):
            names = dict.fromkeys(theirs.format(x) + kind for x in "qkv")
            if names.keys() <= state.keys():
                out[ours + kind] = torch.cat([state[name] for name in names])
    for name in ("final_layer.adaLN_modulation.1", f"joint_blocks.{last}.context_block.adaLN_modulation.1"):
        for kind in (".weight", ".bias"):
            out[name + kind] = torch.cat(out[name + kind].chunk(2)[::-1])  # (scale, shift) -> (shift, scale)
    assert sum(t.numel() for t in out.values()) == sum(t.numel() for t in state.values())
    return out


def stability_vae(state):
    out = {}
    for name, tensor in state.items():
        name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}", name)
        name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if "mid_block.attentions.0." in name:
            name = re.sub(r"to_([qkv])", r"\1", name.replace("mid_block.attentions.0", "mid.attn_1"))
            name = name.replace("group_norm", "norm").replace("to_out.0", "proj_out")
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        out[name] = tensor
    return out
