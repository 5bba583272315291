"""Weights on disk: safetensors in, safetensors out, in both layouts in which SD3 is published. No pickle is opened.

The layouts are Stability's single file and the diffusers folder. Our modules use Stability's parameter names, so one
table, `diffusers_names`, serves loading and saving. A network is built without memory ("meta" device) and filled tensor
by tensor, each read only when its turn comes: the peak is the finished network plus one tensor.
"""

import itertools
import json
import os
import re
import tempfile
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from commandline import UserError, one_line


# ------------------------------------------------------------------------------------------------- finding files

COMPONENTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2",
              "tokenizer_3", "scheduler")  # folders of a model
MODEL_FILES = ["model_index.json", *(f"{name}/*" for name in COMPONENTS)]


def find_model(path, files=MODEL_FILES):
    """A local file or folder as it is. Any other `owner/name` is a Hugging Face repository, fetched into its cache.

    Of a repository only `files` are fetched: by default the folders of the components, in one variant, and no pickles.
    The same weights often lie beside them in another form.
    """
    if os.path.exists(path):
        return Path(path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise UserError(f"{path}: no such file or folder")
    with library_errors(path, "be found here, nor fetched from Hugging Face"):  # the network, the login, the licence
        return Path(huggingface_hub.snapshot_download(
            str(path), allow_patterns=files, ignore_patterns=["*.fp16*", "*.bin", "*.pt", "*.msgpack", "*.onnx*"]))


def find_component(path, name):
    """One component (`transformer`, `vae`, …) of a diffusers folder; a file, or a component itself, as it is."""
    path = find_model(path)
    if (path / name).is_dir():
        return path / name
    if (path / "model_index.json").exists():
        raise UserError(f"{path}: a diffusers folder without {name}/")
    return path


def find_shards(path):
    """The safetensors files that make up one network: a single file, or the parts in a folder, if need be in fp16."""
    if path.is_file():
        return [path]
    for variant in ("", ".fp16"):
        for stem in ("diffusion_pytorch_model", "model", "open_clip_model"):  # diffusers, transformers, OpenCLIP
            index = path / f"{stem}.safetensors.index{variant}.json"
            if index.exists():
                with library_errors(index, "be read as an index of tensors"):
                    shards = [path / name for name in sorted(set(read_json(index)["weight_map"].values()))]
                for shard in shards:
                    if not shard.exists():
                        raise UserError(f"{index}: lists {shard.name}, which is not in this folder")
                return shards
            if (path / f"{stem}{variant}.safetensors").exists():
                return [path / f"{stem}{variant}.safetensors"]
    others = sorted(path.glob("*.safetensors"))
    if len(others) != 1:
        raise UserError(f"{path}: holds {len(others)} .safetensors files, and none with the usual name of a network")
    return others


def read_json(path):
    with library_errors(path, "be read as JSON"):
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("not an object")
    return value


def open_safetensors(path):
    """`safe_open` whose failures are one clear line."""
    with library_errors(path, "be read as a complete safetensors file"):
        return safe_open(path, framework="pt")


@contextmanager
def library_errors(path, action, kinds=Exception):
    """One clear line, "PATH: cannot {action}", for what a library raises over a user's file.

    Only the library's own call belongs inside: a fault of ours keeps its traceback.
    """
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        raise UserError(f"{path}: cannot {action} ({one_line(str(error) or type(error).__name__, 200)})") from error


# ------------------------------------------------------------------------------------------------- both layouts

TRANSFORMER_NAMES = {  # Stability -> diffusers, `.weight` and `.bias` apart; after the blank line, names within a block
    "pos_embed": ["pos_embed.pos_embed"],
    "x_embedder.proj": ["pos_embed.proj"],
    "t_embedder.mlp.0": ["time_text_embed.timestep_embedder.linear_1"],
    "t_embedder.mlp.2": ["time_text_embed.timestep_embedder.linear_2"],
    "y_embedder.mlp.0": ["time_text_embed.text_embedder.linear_1"],
    "y_embedder.mlp.2": ["time_text_embed.text_embedder.linear_2"],
    "context_embedder": ["context_embedder"],
    "final_layer.linear": ["proj_out"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],

    "x_block.adaLN_modulation.1": ["norm1.linear"],
    "x_block.attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "x_block.attn.ln_q": ["attn.norm_q"],
    "x_block.attn.ln_k": ["attn.norm_k"],
    "x_block.attn.proj": ["attn.to_out.0"],
    "x_block.attn2.qkv": ["attn2.to_q", "attn2.to_k", "attn2.to_v"],
    "x_block.attn2.ln_q": ["attn2.norm_q"],
    "x_block.attn2.ln_k": ["attn2.norm_k"],
    "x_block.attn2.proj": ["attn2.to_out.0"],
    "x_block.mlp.fc1": ["ff.net.0.proj"],
    "x_block.mlp.fc2": ["ff.net.2"],

    "context_block.adaLN_modulation.1": ["norm1_context.linear"],
    "context_block.attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "context_block.attn.ln_q": ["attn.norm_added_q"],
    "context_block.attn.ln_k": ["attn.norm_added_k"],
    "context_block.attn.proj": ["attn.to_add_out"],
    "context_block.mlp.fc1": ["ff_context.net.0.proj"],
    "context_block.mlp.fc2": ["ff_context.net.2"],
}
VAE_PARTS = [  # pattern -> replacement, applied in turn; `up` is counted from the other end and handled apart
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"coder\.norm_out\.", "coder.conv_norm_out."),
]


def diffusers_names(name, blocks):
    """The diffusers names of our tensor `name`: three where they keep q, k and v apart, else one.

    `blocks` is the number of transformer blocks or of autoencoder levels.
    """
    if name.startswith(("encoder.", "decoder.")):
        up = re.match(r"decoder\.up\.(\d+)\.(block|upsample)\.(.*)", name)
        if up:
            part = "resnets" if up[2] == "block" else "upsamplers.0"
            name = f"decoder.up_blocks.{blocks - 1 - int(up[1])}.{part}.{up[3]}"
        for pattern, replacement in VAE_PARTS:
            name = re.sub(pattern, replacement, name)
        return [name]
    block, stem, kind = re.fullmatch(r"(joint_blocks\.\d+\.)?(.+?)(\.weight|\.bias)?", name).groups(default="")
    return [block.replace("joint_blocks", "transformer_blocks") + their + kind for their in TRANSFORMER_NAMES[stem]]


def swap_halves(name, tensor, blocks):
    """(shift, scale) ↔ (scale, shift): the two layouts differ in the last layer and in the last block's text side."""
    if re.match(rf"(final_layer|joint_blocks\.{blocks - 1}\.context_block)\.adaLN_modulation", name):
        return torch.cat(tensor.chunk(2)[::-1])
    return tensor


# ------------------------------------------------------------------------------------------------------- reading

FIRST_NAME = {"transformer": "x_embedder.proj.weight", "vae": "decoder.conv_in.weight",
              "backbone": "trunk.stem.0.weight", "clip_l": "text_model.embeddings.token_embedding.weight",
              "clip_g": "text_model.embeddings.token_embedding.weight", "t5xxl": "shared.weight"}
BLOCK = r"(?:joint_blocks|transformer_blocks|stages|\.up|\.up_blocks|layers|encoder\.block)\.(\d{1,3})\."  # or level
TEXT_PREFIX = "text_encoders."
PREFIXES = {"transformer": "model.diffusion_model.", "vae": "first_stage_model.",  # in Stability's files; may be absent
            "backbone": "visual.",                                                 # in OpenCLIP's
            **{name: f"{TEXT_PREFIX}{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl")}}


class NetworkFiles:
    """The tensors of one network on disk, asked for by our (Stability's) names, whichever layout the files have.

    `config` is what config.json says beside them, and `metadata` the headers of the files. `blocks` is how many
    transformer blocks, levels or stages they have.
    """

    def __init__(self, path, component):
        self.path = find_component(path, component)
        self.files, self.shapes, self.metadata = {}, {}, {}  # the first two by the tensors' names
        for shard in find_shards(self.path):
            with open_safetensors(shard) as file:
                self.metadata.update(file.metadata() or {})
                self.files.update(dict.fromkeys(file.keys(), shard))
                self.shapes.update({name: file.get_slice(name).get_shape() for name in file.keys()})
        config = self.path / "config.json"  # none beside a single file: its path is not a folder
        self.config = read_json(config) if config.exists() else {}
        self.prefix = PREFIXES[component] if PREFIXES[component] + FIRST_NAME[component] in self.files else ""
        found = (re.search(BLOCK, name) for name in self.own_names())
        self.blocks = max((int(number[1]) + 1 for number in found if number), default=0)
        self.diffusers = any(n.startswith(("transformer_blocks.", "decoder.up_blocks.")) for n in self.files)
        if FIRST_NAME[component] not in self or not self.blocks:
            what = "ConvNeXt of OpenCLIP" if component == "backbone" else f"SD3 {component}"
            raise UserError(f"{self.path}: holds no {what} "
                            f"(no tensor {self.their_names(FIRST_NAME[component])[0]}, or no blocks)")

    def their_names(self, name):
        """The names in the files of what makes up our tensor `name`."""
        return diffusers_names(name, self.blocks) if self.diffusers else [self.prefix + name]

    def own_names(self):
        """The names in the files that belong to this network and not to another in the same file."""
        others = (*PREFIXES.values(), TEXT_PREFIX) if not self.prefix else ()
        return {name for name in self.files if name.startswith(self.prefix) and not name.startswith(others)}

    def __contains__(self, name):
        return all(their in self.files for their in self.their_names(name))

    def count(self, pattern):
        """How many of the tensors pattern.format(0), pattern.format(1), … there are, up to the first missing one."""
        return next(n for n in itertools.count() if pattern.format(n) not in self)

    def shape(self, name, dimensions=None):
        """The shape of our tensor `name`. Raises UserError if it is missing or does not have so many dimensions."""
        parts = []
        for their in self.their_names(name):
            if their not in self.files:
                raise UserError(f"{self.path}: tensor {their} is missing")
            parts.append(self.shapes[their])
            if parts[-1] != parts[0]:  # queries, keys and values are alike
                raise UserError(f"{self.path}: tensor {their} has shape {parts[-1]}, expected {parts[0]}")
        if dimensions is not None and (len(parts[0]) != dimensions or 0 in parts[0]):
            raise UserError(f"{self.path}: tensor {their} has shape {parts[0]}, not {dimensions} sizes above 0")
        return [len(parts) * n for n in parts[0][:1]] + parts[0][1:]

    def heads(self, width):
        """How many heads a `width` is divided into. The tensors do not show it; in SD3 each has 64 channels."""
        heads = self.config.get("num_attention_heads", max(1, width // 64))
        if heads not in range(1, width + 1) or width % heads:
            raise UserError(f"{self.path}: a width of {width} cannot be divided into {heads} heads")
        return heads

    def read(self, name):
        parts = []
        for their in self.their_names(name):
            with open_safetensors(self.files[their]) as file:  # one at a time, so that no map of a large file stays
                parts.append(file.get_tensor(their))
            if not parts[-1].is_floating_point():
                raise UserError(f"{self.path}: tensor {their} holds {parts[-1].dtype}, not weights")
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        return swap_halves(name, tensor, self.blocks) if self.diffusers else tensor


def check_tensors(source, shapes, harmless=()):
    """Raise UserError that names a tensor that is left over, missing, or of another shape than in {our name: shape}."""
    wanted = {their for name in shapes for their in source.their_names(name)}
    missing = wanted - set(source.files)
    left_over = source.own_names() - wanted - {source.prefix + name for name in harmless}
    for problem, names in (("does not belong there", left_over), ("is missing", missing)):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            more += ": scaled fp8 cannot be read; take fp32, fp16, bf16 or plain fp8" if "scale" in str(names) else ""
            raise UserError(f"{source.path}: tensor {min(names)} {problem}{more}")
    for name, shape in shapes.items():
        found = source.shape(name)
        if found != shape and found + [1, 1] != shape:  # a 1×1 convolution may be stored as a linear map
            raise UserError(f"{source.path}: tensor {source.their_names(name)[0]} has shape {found}, expected {shape}")


def check_finite(path, name, tensor):
    if not torch.isfinite(tensor).all():
        raise UserError(f"{path}: tensor {name} is not finite (NaN or infinity, read as {tensor.dtype})")


def load_tensors(module, source, device, dtype):
    """Move `module`, built on the meta device, to `device` and fill it with all tensors of `source`, a NetworkFiles.

    Raises UserError that names the tensor that is missing, left over, of another shape, or not finite.
    """
    check_tensors(source, {name: list(tensor.shape) for name, tensor in module.state_dict().items()})
    module.to(dtype).to_empty(device=device)
    for name, tensor in module.state_dict().items():
        tensor.copy_(source.read(name).reshape(tensor.shape))
        check_finite(source.path, source.their_names(name)[0], tensor)
    return module


def load_plain(module, path):
    """Fill a module of ours from a file of exactly its own tensors."""
    with library_errors(path, "be read as this network"):
        module.load_state_dict(load_file(path))
    for name, tensor in module.state_dict().items():
        check_finite(path, name, tensor)
    return module


# ------------------------------------------------------------------------------------------------------- writing

def save_network(module, folder, config, metadata=None, dtype=None):
    """Write a network in the diffusers layout: `folder`/diffusion_pytorch_model.safetensors and its config.json."""
    state = module.state_dict()
    numbers = (re.search(r"(?:joint_blocks|\.up)\.(\d+)\.", name) for name in state)
    blocks = max(int(number[1]) + 1 for number in numbers if number)
    tensors = {}
    for name, tensor in state.items():
        theirs = diffusers_names(name, blocks)
        tensor = swap_halves(name, tensor.detach().to("cpu", dtype), blocks)
        if ".mid.attn_1." in name and tensor.ndim == 4:
            tensor = tensor.flatten(1)  # 1×1 convolution -> linear
        tensors.update(zip(theirs, (part.contiguous() for part in tensor.chunk(len(theirs))), strict=True))
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", tensors, metadata)
    write_json(folder / "config.json", config)


def write_safetensors(path, tensors, metadata=None):
    with replacing(path) as part:
        save_file(tensors, part, metadata={"format": "pt", **(metadata or {})})


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path, text):
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path):
    """A temporary path beside `path` that takes its place at the end: a file is there whole, or as it was before."""
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    with library_errors(path, "be written", (OSError, SafetensorError)):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def check_writable(folder, new=False):
    """Raise UserError now, before hours of work, if nothing could be written to `folder` then; `new`: or if it has files."""
    with library_errors(folder, "be written to"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    if new and any(Path(folder).iterdir()):
        raise UserError(f"{folder} is not empty: continue its run with --resume, or choose another --out")
