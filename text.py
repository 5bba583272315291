"""Text for SD3: prompts in, the context tokens and the pooled vector that condition the MMDiT out.

Source: Esser et al. 2024 (SD3), Sec. 4 and Fig. 2. Three encoders, run through transformers. CLIP-L and CLIP-G give the
tokens of their last but one layer, joined on the features and padded with zeros to T5's width. T5's tokens follow on
the token axis. The pooled vector joins the two CLIPs' projected end-of-text states. T5 is optional: zeros stand in its
place.
"""

import sys
from functools import reduce
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoTokenizer, CLIPTextModelWithProjection, T5EncoderModel
from transformers.utils import logging as transformers_logging

import weights
from commandline import UserError, one_line

T5_LENGTH = 256    # tokens, as in diffusers and the paper; a tokenizer with a smaller maximum keeps its own
EXTRA = 1000       # tokens beside a vocabulary, at most; T5 has 100
SHOWN = 3          # prompts too long for a reader, whose lost end is shown
ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", "text_encoder_3": "tokenizer_3"}  # L, G, T5


class TextEncoders(nn.Module):
    """CLIP-L, CLIP-G and, unless None, T5, each with its tokenizer. `context_width`: T5's, also where it is absent."""

    def __init__(self, clip_l, clip_g, t5, tokenizers, context_width):
        super().__init__()
        self.clip_l, self.clip_g, self.t5 = clip_l, clip_g, t5
        self.tokenizers = tokenizers  # three, the last None without T5
        self.context_width = context_width
        self.clip_length = min(length for clip, tokenizer in zip((clip_l, clip_g), tokenizers) for length in (
            clip.config.max_position_embeddings, tokenizer.model_max_length))
        self.t5_length = min(T5_LENGTH, tokenizers[2].model_max_length) if t5 is not None else T5_LENGTH
        self.cut = {"CLIP": set(), "T5": set()}  # the prompts that were too long for each

    @property
    def widths(self):
        """Features of the context (D) and of the pooled text (P)."""
        return self.context_width, self.clip_l.config.projection_dim + self.clip_g.config.projection_dim

    def forward(self, prompts):
        """A list of B prompts -> context (B, 77 + 256, D), pooled (B, P). The tiny SD3 has 14 + 13 tokens."""
        l_tokens, l_pooled = self.encode_clip(self.clip_l, self.tokenizers[0], prompts)  # (B, 77, D_L), (B, P_L)
        g_tokens, g_pooled = self.encode_clip(self.clip_g, self.tokenizers[1], prompts)  # (B, 77, D_G), (B, P_G)
        clip = torch.cat([l_tokens, g_tokens], dim=2)                                    # (B, 77, D_L + D_G)
        clip = F.pad(clip, (0, self.context_width - clip.shape[2]))                      # (B, 77, D)
        if self.t5 is None:
            t5 = clip.new_zeros(len(clip), self.t5_length, self.context_width)           # (B, 256, D)
        else:
            ids = self.token_ids(self.tokenizers[2], prompts, self.t5_length, "T5")      # (B, 256)
            t5 = self.t5(ids).last_hidden_state.to(clip.dtype)                           # (B, 256, D); padding counts
        return torch.cat([clip, t5], dim=1), torch.cat([l_pooled, g_pooled], dim=1)

    def encode_clip(self, model, tokenizer, prompts):
        """-> the last but one layer's tokens, without final norm, (B, 77, width); the projected EOS state, (B, P)."""
        ids = self.token_ids(tokenizer, prompts, self.clip_length, "CLIP")
        out = model(ids, output_hidden_states=True)  # no padding mask: SD3 was trained without
        return out.hidden_states[-2], out.text_embeds

    def token_ids(self, tokenizer, prompts, length, reader):
        """Padded, truncated token ids (B, length). stderr shows what the first prompts that are too long lose."""
        whole = tokenizer(prompts, padding="max_length", max_length=length, verbose=False).input_ids
        for prompt, ids in zip(prompts, whole, strict=True):
            if len(ids) > length and prompt not in self.cut[reader]:
                self.cut[reader].add(prompt)  # once, though training reads a prompt often and both CLIPs cut it alike
                if len(self.cut[reader]) <= SHOWN:
                    lost = tokenizer.decode(ids[length - 1:], skip_special_tokens=True)
                    print(f"warning: {reader} reads {length} tokens of this prompt of {len(ids)}; cut off: "
                          f"\"{one_line(lost, 400)}\"",
                          file=sys.stderr)
                elif len(self.cut[reader]) == SHOWN + 1:
                    print(f"warning: more prompts are too long for {reader}; they are cut and counted, but not shown",
                          file=sys.stderr)
        if any(len(ids) > length for ids in whole):
            whole = tokenizer(prompts, padding="max_length", truncation=True, max_length=length).input_ids
        return torch.tensor(whole, device=next(self.parameters()).device)


def check_widths(text, mmdit, path):
    """Raise UserError where text encoders and transformer of a model do not go together."""
    wanted = mmdit.context_embedder.in_features, mmdit.y_embedder.mlp[0].in_features
    if text.widths != wanted:
        raise UserError(f"{path}: its text encoders give {text.widths[0]} and {text.widths[1]} features, "
                        f"its transformer reads {wanted[0]} and {wanted[1]}")


# -------------------------------------------------------------------------------------------------------- load

def load_text_encoders(path, device="cpu", dtype=torch.float32):
    """The text encoders of a diffusers folder, of a Stability file that has them, or of a Hugging Face repository id.

    T5 may be absent. dtype None: each as it is stored. Raises UserError where anything else is missing, is damaged or
    does not fit the rest.
    """
    path = weights.find_model(path)
    silence_transformers()
    models, tokenizers = zip(*(load_encoder(path, name, dtype) for name in ENCODERS))
    clip_l, clip_g, t5 = models
    if t5 is not None:
        width = t5.config.d_model
    else:  # the tokens that the transformer reads are as wide
        width = weights.NetworkFiles(path, "transformer").shape("context_embedder.weight", dimensions=2)[1]
    l_width, g_width = clip_l.config.hidden_size, clip_g.config.hidden_size
    if l_width + g_width > width:
        raise UserError(f"{path}: its two CLIPs give {l_width} + {g_width} features, more than T5's {width}")
    return TextEncoders(clip_l, clip_g, t5, tokenizers, width).to(device).requires_grad_(False).eval()


def silence_transformers():
    """No progress bars and no reports of several lines on stderr: `weights` says what is wrong with a file."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


IN_FILE = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}
MAKERS = {"text_encoder": "openai/clip-vit-large-patch14", "text_encoder_2": "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
          "text_encoder_3": "google/t5-v1_1-xxl"}  # of tokenizers, if a single file has none beside it
AGAIN = "encoder.embed_tokens.weight"  # T5's `shared.weight` under another name
HARMLESS = (AGAIN, "logit_scale", "text_projection.weight", "text_model.embeddings.position_ids")  # in published files


def load_encoder(path, name, dtype):
    """The encoder `name` and its tokenizer, or (None, None) for a T5 that is absent. Sizes are read off the tensors."""
    if not has_encoder(path, name):
        return None, None
    part, single = IN_FILE[name], path.is_file()
    source = weights.NetworkFiles(path if single else path / name, part)
    beside = (path.parent if single else path) / ENCODERS[name]
    tokenizer = load_tokenizer(MAKERS[name] if single and not beside.is_dir() else beside)
    # in a single file, CLIP-L's pooled state is used as it is, whatever projection is published with it
    projected = not single or part != "clip_l" or source.metadata.get("clip_l_projected") == "True"
    kind = T5EncoderModel if part == "t5xxl" else CLIPTextModelWithProjection
    settings = t5_settings(source) if part == "t5xxl" else clip_settings(source, part, tokenizer, projected)
    with weights.library_errors(source.path, f"be read as {part}"):
        config = kind.config_class(**settings)
        with torch.device("meta"):
            shapes = {key: list(tensor.shape) for key, tensor in kind(config).state_dict().items() if key != AGAIN}
    if not projected:
        del shapes["text_projection.weight"]
    weights.check_tensors(source, shapes, HARMLESS)
    state = {key: source.read(key).to(dtype=dtype, copy=True) for key in shapes}  # or the file would stay mapped, often
    stored = reduce(torch.promote_types, (t.dtype if t.itemsize > 1 else torch.bfloat16 for t in state.values()))
    if not projected:
        state["text_projection.weight"] = torch.eye(config.projection_dim)
    with weights.library_errors(source.path, f"be read as {part}"):
        model = kind.from_pretrained(None, config=config, state_dict=state, dtype=dtype or stored)
    for key, tensor in model.state_dict().items():
        weights.check_finite(source.path, key, tensor)
    check_tokenizer(tokenizer, config.vocab_size)
    return model if dtype else model.to(stored), tokenizer  # transformers keeps some of T5 in fp32


def has_encoder(path, name):
    """Whether a model has the encoder `name`: False for T5 only, and not where it should have one."""
    part, is_t5 = IN_FILE[name], name == "text_encoder_3"
    if path.is_file():
        with weights.open_safetensors(path) as file:
            names = [key for key in file.keys() if key.startswith(weights.TEXT_PREFIX)]
        known = tuple(weights.PREFIXES[each] for each in IN_FILE.values())
        lost = [key for key in names if not key.startswith(known) and not key.endswith("logit_scale")]
        if any(key.startswith(weights.PREFIXES[part]) for key in names):
            return True
        if not is_t5:
            raise UserError(f"{path}: holds no text encoders; use a file that includes them, or a diffusers folder")
        if lost:
            raise UserError(f"{path}: tensor {min(lost)} is of no text encoder, since T5's begin with "
                            f"{weights.PREFIXES[part]}; to go without T5, take a file that has nothing of it")
        return False
    index = weights.model_index(path)
    if is_t5 and (index[name] == weights.ABSENT if name in index else not (path / name).is_dir()):
        return False
    for folder in (name, ENCODERS[name]):
        if not (path / folder).is_dir():
            raise UserError(f"{path}: a model without {folder}/ cannot read prompts" + is_t5 * (
                '; to go without T5, let model_index.json say "text_encoder_3": [null, null]'))
    return True


def clip_settings(source, part, tokenizer, projected):
    """What a CLIPTextConfig takes."""
    vocabulary, width = source.shape("text_model.embeddings.token_embedding.weight", dimensions=2)
    return dict(
        vocab_size=vocabulary, hidden_size=width, num_attention_heads=source.heads(width),
        hidden_act=source.config.get("hidden_act", "quick_gelu" if part == "clip_l" else "gelu"),
        layer_norm_eps=source.number("layer_norm_eps", 1e-5, least=0),
        projection_dim=source.shape("text_projection.weight", dimensions=2)[0] if projected else width,
        intermediate_size=source.shape("text_model.encoder.layers.0.mlp.fc1.weight", dimensions=2)[0],
        num_hidden_layers=source.depth("text_model.encoder.layers.{}.mlp.fc1.weight"),
        max_position_embeddings=source.shape("text_model.embeddings.position_embedding.weight", dimensions=2)[0],
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)


def t5_settings(source):
    """What a T5Config takes."""
    vocabulary, width = source.shape("shared.weight", dimensions=2)
    attention = "encoder.block.0.layer.0.SelfAttention."
    buckets, heads = source.shape(attention + "relative_attention_bias.weight", dimensions=2)
    rows, _ = source.shape(attention + "q.weight", dimensions=2)
    if rows % heads:
        raise UserError(f"{source.path}: tensor {source.prefix}{attention}q.weight has {rows} rows, no multiple of "
                        f"{heads} heads")
    return dict(
        vocab_size=vocabulary, d_model=width, num_heads=heads, d_kv=rows // heads,
        feed_forward_proj=source.config.get("feed_forward_proj", "gated-gelu"),
        layer_norm_epsilon=source.number("layer_norm_epsilon", 1e-6, least=0),
        num_layers=source.depth("encoder.block.{}.layer.0.SelfAttention.q.weight"),
        d_ff=source.shape("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", dimensions=2)[0],
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=int(source.number("relative_attention_max_distance", 128, least=buckets // 4)))


def load_tokenizer(source):
    """A tokenizer, from a folder or a Hugging Face repository."""
    file = Path(source) / "tokenizer_config.json"
    extra = weights.read_json(file).get("extra_ids") if file.exists() else 0  # of T5, for which it makes a list
    if isinstance(extra, int) and extra > EXTRA:
        raise UserError(f"{file}: extra_ids = {extra}, more than {EXTRA}")
    with weights.library_errors(source, "be read as a tokenizer"):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


def check_tokenizer(tokenizer, known):
    """Raise UserError where a tokenizer isn't that of an encoder of so many `known` tokens.

    Without its files, transformers makes an empty one.
    """
    longest, words = tokenizer.model_max_length, tokenizer.get_vocab()
    with weights.library_errors(tokenizer.name_or_path, "be used as a tokenizer"):
        largest = max(*words.values(), *tokenizer("a").input_ids)
    if (not known / 2 < len(words) <= known or largest >= known or not isinstance(longest, int) or longest < 2
            or None in (tokenizer.pad_token, tokenizer.eos_token)):
        raise UserError(f"{tokenizer.name_or_path}: no tokenizer of its encoder: {len(words)} tokens up to {largest}, "
                        f"where that one knows {known}; {tokenizer.pad_token} as padding, {tokenizer.eos_token} as the "
                        f"end; at most {longest} tokens a prompt")


# -------------------------------------------------------------------------------------------------------- save

def single_file_tensors(text):
    """The encoders' tensors under the names of Stability's single file, without its prefix."""
    models = {"clip_l": text.clip_l, "clip_g": text.clip_g, "t5xxl": text.t5}
    return {f"{name}.transformer.{key}": tensor for name, model in models.items() if model is not None
            for key, tensor in model.state_dict().items() if key != AGAIN}


def single_file_settings(text):
    """What the tensors do not show of the encoders, for the header of a single file."""
    names = {"clip_l": ("hidden_act", "layer_norm_eps", "num_attention_heads"),
             "clip_g": ("hidden_act", "layer_norm_eps", "num_attention_heads"),
             "t5xxl": ("feed_forward_proj", "layer_norm_epsilon", "relative_attention_max_distance")}
    models = {"clip_l": text.clip_l, "clip_g": text.clip_g, "t5xxl": text.t5}
    return {f"{part}.{name}": getattr(model.config, name)
            for part, model in models.items() if model is not None for name in names[part]}


def save_tokenizers(text, folder):
    for tokenizer, name in zip(text.tokenizers, ENCODERS.values()):
        if tokenizer is not None:
            tokenizer.save_pretrained(folder / name)


def save_text_encoders(text, folder):
    """Write the encoders and tokenizers in the diffusers layout, `folder`/text_encoder, `folder`/tokenizer, …

    Each keeps its dtype in the file, but its settings say fp32: transformers opens it in that, as diffusers does the
    rest, and a mixture does not run.
    """
    silence_transformers()
    for model, name in zip((text.clip_l, text.clip_g, text.t5), ENCODERS):
        if model is not None:
            model.save_pretrained(folder / name)
            config = folder / name / "config.json"
            weights.write_json(config, {**weights.read_json(config), "dtype": "float32"})
    save_tokenizers(text, folder)
