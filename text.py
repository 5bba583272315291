"""Text for SD3: prompts in, the context tokens and the pooled vector that condition the MMDiT out.

Source: Esser et al. 2024 (SD3), Sec. 4 and Fig. 2. Three encoders, run through transformers: CLIP-L and CLIP-G give their
last but one layer's tokens, joined on the features and padded with zeros to T5's width; T5's tokens follow on the token axis;
the pooled vector joins the two CLIPs' projected end-of-text states. T5 is optional: zeros stand in its place.
"""

import csv
import hashlib
import json
import shutil
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel
from transformers.utils import logging as transformers_logging

import parallel
import weights

T5_LENGTH = 256    # tokens, as in diffusers and the paper; a tokenizer with a smaller maximum keeps its own
T5_WIDTH = 4096    # of T5-XXL, where there is no T5 to tell
ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", "text_encoder_3": "tokenizer_3"}  # L, G, T5


class TextEncoders(nn.Module):
    """CLIP-L, CLIP-G and, unless None, T5, each with its tokenizer. `context_width` is T5's, given where there is no T5."""

    def __init__(self, clip_l, clip_g, t5, tokenizers, context_width=None):
        super().__init__()
        self.clip_l, self.clip_g, self.t5 = clip_l, clip_g, t5
        self.tokenizers = tokenizers  # three, the last None without T5
        self.warned = set()
        self.context_width = t5.config.d_model if t5 is not None else context_width or T5_WIDTH
        self.t5_length = min(T5_LENGTH, tokenizers[2].model_max_length) if tokenizers[2] is not None else T5_LENGTH

    def forward(self, prompts):
        """A list of B prompts -> context (B, 77 + 256, D), pooled (B, P)."""
        l_tokens, l_pooled = self.encode_clip(self.clip_l, self.tokenizers[0], prompts)  # (B, 77, D_L), (B, P_L)
        g_tokens, g_pooled = self.encode_clip(self.clip_g, self.tokenizers[1], prompts)  # (B, 77, D_G), (B, P_G)
        clip = torch.cat([l_tokens, g_tokens], dim=2)                                    # (B, 77, D_L + D_G)
        clip = F.pad(clip, (0, self.context_width - clip.shape[2]))                      # (B, 77, D)
        if self.t5 is None:
            t5 = clip.new_zeros(len(clip), self.t5_length, self.context_width)           # (B, 256, D)
        else:
            ids = self.token_ids(self.tokenizers[2], prompts, self.t5_length, "T5")      # (B, 256)
            t5 = self.t5(ids).last_hidden_state.to(clip.dtype)                           # (B, 256, D); padding is attended
        return torch.cat([clip, t5], dim=1), torch.cat([l_pooled, g_pooled], dim=1)

    def encode_clip(self, model, tokenizer, prompts):
        """-> the last but one layer's tokens, without the final norm, (B, 77, width); the projected EOS state, (B, P)."""
        ids = self.token_ids(tokenizer, prompts, tokenizer.model_max_length, "CLIP")
        out = model(ids, output_hidden_states=True)  # no padding mask: SD3 was trained without
        return out.hidden_states[-2], out.text_embeds

    def token_ids(self, tokenizer, prompts, length, reader):
        """Padded, truncated token ids (B, length). What is cut off a prompt is said on stderr."""
        whole = tokenizer(prompts, padding="max_length", max_length=length, verbose=False).input_ids
        for prompt, ids in zip(prompts, whole, strict=True):
            if len(ids) > length and (reader, prompt) not in self.warned:
                self.warned.add((reader, prompt))  # once, though training reads a prompt often and both CLIPs cut it alike
                cut = tokenizer.decode(ids[length - 1:], skip_special_tokens=True).strip()
                print(f"warning: {reader} reads {length} tokens of this prompt of {len(ids)}; cut off: \"{cut}\"",
                      file=sys.stderr)
        if any(len(ids) > length for ids in whole):
            whole = tokenizer(prompts, padding="max_length", truncation=True, max_length=length).input_ids
        return torch.tensor(whole, device=next(self.parameters()).device)


class CachedText:
    """Prompts encoded once, a safetensors file for each, and read from there: the encoders are in memory only while they work.

    Called like TextEncoders. load(device, dtype) gives the encoders.
    """

    def __init__(self, folder, load, device, dtype):
        self.folder, self.load, self.device, self.dtype = folder, load, device, dtype

    def __call__(self, prompts):
        """A list of B prompts -> context (B, 77 + 256, D), pooled (B, P). Raises UserError for one that was not encoded."""
        parts = []
        for prompt in prompts:
            with weights.open_safetensors(self.file(prompt)) as file:
                parts.append((file.get_tensor("context"), file.get_tensor("pooled")))
        return [torch.stack(part).to(self.device, non_blocking=True) for part in zip(*parts)]

    def file(self, prompt):
        return self.folder / f"{hashlib.sha256(prompt.encode()).hexdigest()[:32]}.safetensors"

    def open(self):
        """The encoders, on the CPU."""
        return self.load("cpu", self.dtype)

    def encode(self, prompts, batch=16):
        """Encode those of the prompts that are not there yet, each process its share. What is done is done if it is stopped.

        Says how much there is to do before it starts; raises UserError where the disk is too small for it.
        """
        missing = [prompt for prompt in prompts if not self.file(prompt).exists()]
        parallel.wait()  # until all processes have seen the same ones missing
        if missing:
            self.folder.mkdir(parents=True, exist_ok=True)
            encoders = self.load(self.device, self.dtype)
            probe = sum(part.nbytes for part in self.run(encoders, missing[:1]))
            room, free = len(missing) * probe / 1e9, shutil.disk_usage(self.folder).free / 1e9
            parallel.say(f"text: {len(missing)} prompts to encode, {room:.3g} GB in {self.folder}")
            if room > free:
                raise weights.UserError(f"{self.folder}: {room:.3g} GB of encoded prompts do not fit, {free:.3g} GB are free; "
                                        "name another disk with --text-cache, or take fewer prompts or --iterations")
            own = parallel.share(missing)
            for start in tqdm(range(0, len(own), batch), desc="encoding text", disable=not parallel.is_first()):
                part = own[start:start + batch]
                for prompt, context, pooled in zip(part, *self.run(encoders, part), strict=True):
                    weights.write_safetensors(self.file(prompt), {"context": context, "pooled": pooled}, {"prompt": prompt})
            del encoders  # before the networks are built
        parallel.wait()

    @torch.no_grad()
    def run(self, encoders, prompts):
        return [part.to("cpu", self.dtype).contiguous() for part in encoders(prompts)]


# ------------------------------------------------------------------------------------------------- prompt files

def read_prompts(path):
    """The prompts of a file: .txt (one a line), .jsonl (field `prompt`, else `ori_prompt`), .csv or .tsv (column `prompt`)."""
    path = Path(path)
    try:
        with path.open(encoding="utf-8-sig") as file:
            lines = list(file)
    except UnicodeDecodeError as error:
        raise weights.UserError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise weights.UserError(f"{path}: cannot be read ({error.strerror})") from error
    if path.suffix == ".jsonl":
        prompts = [prompt_of_json(path, i, line) for i, line in enumerate(lines, 1) if line.strip()]
    elif path.suffix in (".csv", ".tsv"):
        style = {"delimiter": ","} if path.suffix == ".csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        with weights.explained(path, f"a table in {path.suffix} format"):
            header, *rows = list(csv.reader(lines, **style)) or [[]]
        columns = [name.strip().lower() for name in header]
        if "prompt" not in columns:
            raise weights.UserError(f"{path}: no column named prompt (found: {', '.join(columns) or 'nothing'})")
        prompts = [row[columns.index("prompt")] for row in rows if len(row) > columns.index("prompt")]
    else:
        prompts = lines
    prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
    if not prompts:
        raise weights.UserError(f"{path}: holds no prompt")
    return prompts


def prompt_of_json(path, number, line):
    try:
        record = json.loads(line)
        prompt = record["prompt"] if record.get("prompt") else record["ori_prompt"]
        prompt.encode()  # fails where it is no text, or half a character
        return prompt
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise weights.UserError(f"{path}, line {number}: no JSON object with a text `prompt` or `ori_prompt`") from error


# -------------------------------------------------------------------------------------------------------- load

def load_text_encoders(path, device="cpu", dtype=torch.float32, t5=True):
    """The text encoders of a diffusers folder, of a Stability file that includes them, or of a Hugging Face repository id.

    `t5=False`, or a model without T5, leaves it out. Raises UserError where a part is missing or damaged.
    """
    path = weights.find_model(path)
    silence_transformers()
    load = load_from_file if path.is_file() else load_from_folder
    with weights.explained(path, "text encoders"):
        text = load(path, dtype, t5)
    return text.to(device).requires_grad_(False).eval()


def silence_transformers():
    """No progress bars and no reports of several lines on stderr: `checked` says what is wrong with a file."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def load_from_folder(folder, dtype, t5):
    models, tokenizers = [], []
    for kind, (name, tokenizer_name) in zip((CLIPTextModelWithProjection,) * 2 + (T5EncoderModel,), ENCODERS.items()):
        if kind is T5EncoderModel and not (t5 and (folder / name).is_dir()):
            models, tokenizers = [*models, None], [*tokenizers, None]
            continue
        for part in (name, tokenizer_name):
            if not (folder / part).is_dir():
                raise weights.UserError(f"{folder}: a model without {part}/ cannot read prompts")
        variant = "fp16" if "fp16" in weights.find_shards(folder / name)[0].name else None
        with weights.explained(folder / name, "a text encoder"):
            model, report = kind.from_pretrained(folder / name, dtype=dtype, variant=variant, use_safetensors=True,
                                                 ignore_mismatched_sizes=True, output_loading_info=True)
        models.append(checked(model, report, folder / name))
        with weights.explained(folder / tokenizer_name, "a tokenizer"):
            tokenizers.append(AutoTokenizer.from_pretrained(folder / tokenizer_name))
    config = folder / "transformer" / "config.json"
    width = weights.read_json(config).get("joint_attention_dim") if config.exists() else None
    return TextEncoders(*models, tokenizers, context_width=width)


# In a single file the encoders come without settings and tokenizers: sizes are read off the tensors, and the tokenizers are
# looked for beside the file and else fetched from the repositories of their makers.
TOKENIZERS = {"tokenizer": "openai/clip-vit-large-patch14", "tokenizer_2": "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
              "tokenizer_3": "google/t5-v1_1-xxl"}


def load_from_file(path, dtype, t5):
    with weights.open_safetensors(path) as file:
        states = {}
        for name in ("clip_l", "clip_g", "t5xxl"):
            prefix = f"{weights.TEXT_PREFIX}{name}.transformer."
            states[name] = {n.removeprefix(prefix): file.get_tensor(n) for n in file.keys() if n.startswith(prefix)}
        projected = (file.metadata() or {}).get("clip_l_projected") == "True"
        width = [file.get_slice(n).get_shape()[1] for n in file.keys() if n.endswith("context_embedder.weight")]
    if not states["clip_l"] or not states["clip_g"]:
        raise weights.UserError(f"{path}: holds no text encoders; use a file that includes them, or a diffusers folder")
    folder = path.parent
    tokenizers = [load_tokenizer(folder, "tokenizer"), load_tokenizer(folder, "tokenizer_2"), None]
    if not projected:  # CLIP-L's pooled state is used as it is, whatever projection a published file carries
        states["clip_l"]["text_projection.weight"] = torch.eye(states["clip_l"]["text_model.final_layer_norm.weight"].numel())
    clip_l = fill_encoder(CLIPTextModelWithProjection, clip_config(states["clip_l"], tokenizers[0], "quick_gelu"),
                          states["clip_l"], path, dtype)
    clip_g = fill_encoder(CLIPTextModelWithProjection, clip_config(states["clip_g"], tokenizers[1], "gelu"),
                          states["clip_g"], path, dtype)
    t5_model = None
    if t5 and states["t5xxl"]:
        tokenizers[2] = load_tokenizer(folder, "tokenizer_3")
        t5_model = fill_encoder(T5EncoderModel, t5_config(states["t5xxl"]), states["t5xxl"], path, dtype)
    return TextEncoders(clip_l, clip_g, t5_model, tokenizers, context_width=width[0] if width else None)


def clip_config(state, tokenizer, activation):
    vocabulary, width = state["text_model.embeddings.token_embedding.weight"].shape
    return CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=width, projection_dim=state["text_projection.weight"].shape[0],
        intermediate_size=state["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=len({n.split(".")[3] for n in state if n.startswith("text_model.encoder.layers.")}),
        num_attention_heads=width // 64, hidden_act=activation,
        max_position_embeddings=state["text_model.embeddings.position_embedding.weight"].shape[0],
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)


def t5_config(state):
    vocabulary, width = state["shared.weight"].shape
    buckets, heads = state["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"].shape
    return T5Config(
        vocab_size=vocabulary, d_model=width, num_heads=heads, relative_attention_num_buckets=buckets,
        d_kv=state["encoder.block.0.layer.0.SelfAttention.q.weight"].shape[0] // heads,
        d_ff=state["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"].shape[0],
        num_layers=len({n.split(".")[2] for n in state if n.startswith("encoder.block.")}), feed_forward_proj="gated-gelu")


def fill_encoder(kind, config, state, path, dtype):
    """A transformers encoder with the tensors of `state`; all of its own must be there."""
    model, report = kind.from_pretrained(None, config=config, state_dict=state, dtype=dtype,
                                         ignore_mismatched_sizes=True, output_loading_info=True)
    return checked(model, report, path)


def load_tokenizer(folder, name):
    source = folder / name if (folder / name).is_dir() else TOKENIZERS[name]
    with weights.explained(source, f"the {name} of a model in a single file; put it beside the file"):
        return AutoTokenizer.from_pretrained(source)


def checked(model, report, path):
    """A model that transformers loaded, if it found all tensors, of the right shapes, and all are finite."""
    if report["missing_keys"]:
        raise weights.UserError(f"{path}: tensor {min(report['missing_keys'])} is missing")
    for name, found, expected in sorted(report["mismatched_keys"]):
        raise weights.UserError(f"{path}: tensor {name} has shape {list(found)}, expected {list(expected)}")
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise weights.UserError(f"{path}: tensor {name} is not finite (NaN or infinity)")
    return model


# -------------------------------------------------------------------------------------------------------- save

def single_file_tensors(text):
    """The encoders' tensors under the names of Stability's single file, without its prefix."""
    models = {"clip_l": text.clip_l, "clip_g": text.clip_g, "t5xxl": text.t5}
    return {f"{name}.transformer.{key}": tensor for name, model in models.items() if model is not None
            for key, tensor in model.state_dict().items() if key != "encoder.embed_tokens.weight"}  # `shared.weight` again


def save_tokenizers(text, folder):
    for tokenizer, name in zip(text.tokenizers, ENCODERS.values()):
        if tokenizer is not None:
            tokenizer.save_pretrained(folder / name)


def save_text_encoders(text, folder):
    """Write the encoders and tokenizers in the diffusers layout, `folder`/text_encoder, `folder`/tokenizer, …"""
    silence_transformers()
    for model, name in zip((text.clip_l, text.clip_g, text.t5), ENCODERS):
        if model is not None:
            model.save_pretrained(folder / name)
    save_tokenizers(text, folder)
