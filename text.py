"""Text for SD3: prompts in, the context tokens and the pooled vector that condition the MMDiT out.

Source: Esser et al. 2024 (SD3), Sec. 4 and Fig. 2. Three encoders, run through transformers. CLIP-L and CLIP-G give the
tokens of their last but one layer, joined on the features and padded with zeros to T5's width. T5's tokens follow on
the token axis. The pooled vector joins the two CLIPs' projected end-of-text states. T5 is optional: zeros stand in its
place.
"""

import sys

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel
from transformers.utils import logging as transformers_logging

import weights
from commandline import UserError

HEAD_WIDTH = 64    # of both CLIPs; a single file does not tell
T5_LENGTH = 256    # tokens, as in diffusers and the paper; a tokenizer with a smaller maximum keeps its own
SHOWN = 3          # prompts too long for a reader, whose lost end is shown
ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", "text_encoder_3": "tokenizer_3"}  # L, G, T5


class TextEncoders(nn.Module):
    """CLIP-L, CLIP-G and, unless None, T5, each with its tokenizer. `context_width`: T5's, also where it is absent."""

    def __init__(self, clip_l, clip_g, t5, tokenizers, context_width):
        super().__init__()
        self.clip_l, self.clip_g, self.t5 = clip_l, clip_g, t5
        self.tokenizers = tokenizers  # three, the last None without T5
        self.context_width = context_width
        self.t5_length = min(T5_LENGTH, tokenizers[2].model_max_length) if t5 is not None else T5_LENGTH
        self.cut = {"CLIP": set(), "T5": set()}  # the prompts that were too long for each

    @property
    def widths(self):
        """Features of the context (D) and of the pooled text (P)."""
        return self.context_width, self.clip_l.config.projection_dim + self.clip_g.config.projection_dim

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
            t5 = self.t5(ids).last_hidden_state.to(clip.dtype)                           # (B, 256, D); padding counts
        return torch.cat([clip, t5], dim=1), torch.cat([l_pooled, g_pooled], dim=1)

    def encode_clip(self, model, tokenizer, prompts):
        """-> the last but one layer's tokens, without final norm, (B, 77, width); the projected EOS state, (B, P)."""
        length = min(tokenizer.model_max_length, model.config.max_position_embeddings)
        ids = self.token_ids(tokenizer, prompts, length, "CLIP")
        out = model(ids, output_hidden_states=True)  # no padding mask: SD3 was trained without
        return out.hidden_states[-2], out.text_embeds

    def token_ids(self, tokenizer, prompts, length, reader):
        """Padded, truncated token ids (B, length). stderr shows what the first prompts that are too long lose."""
        whole = tokenizer(prompts, padding="max_length", max_length=length, verbose=False).input_ids
        for prompt, ids in zip(prompts, whole, strict=True):
            if len(ids) > length and prompt not in self.cut[reader]:
                self.cut[reader].add(prompt)  # once, though training reads a prompt often and both CLIPs cut it alike
                if len(self.cut[reader]) <= SHOWN:
                    lost = tokenizer.decode(ids[length - 1:], skip_special_tokens=True).strip()
                    print(f"warning: {reader} reads {length} tokens of this prompt of {len(ids)}; cut off: \"{lost}\"",
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

    T5 may be absent. Raises UserError where anything else is missing, is damaged or does not fit the rest.
    """
    path = weights.find_model(path)
    silence_transformers()
    load = load_from_file if path.is_file() else load_from_folder
    models, tokenizers = zip(*(load(path, name, dtype) for name in ENCODERS))
    for model, tokenizer in zip(models, tokenizers):
        if model is not None:
            check_tokenizer(tokenizer, model)
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
    """No progress bars and no reports of several lines on stderr: `checked` says what is wrong with a file."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def load_from_folder(folder, name, dtype):
    """The encoder `name` of a diffusers folder and its tokenizer, or (None, None) for a T5 that is absent."""
    if name == "text_encoder_3" and not (folder / name).is_dir():
        return None, None
    for part in (name, ENCODERS[name]):
        if not (folder / part).is_dir():
            raise UserError(f"{folder}: a model without {part}/ cannot read prompts")
    kind = T5EncoderModel if name == "text_encoder_3" else CLIPTextModelWithProjection
    variant = "fp16" if "fp16" in weights.find_shards(folder / name)[0].name else None
    with weights.library_errors(folder / name, "be read as a text encoder"):
        model, report = kind.from_pretrained(folder / name, dtype=dtype, variant=variant, use_safetensors=True,
                                             ignore_mismatched_sizes=True, output_loading_info=True)
    return checked(model, report, folder / name), load_tokenizer(folder / ENCODERS[name])


# In a single file the encoders come without settings and tokenizers. Sizes are read off the tensors. The tokenizers are
# looked for beside the file and else fetched from the repositories of their makers.
IN_FILE = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}
MAKERS = {"text_encoder": "openai/clip-vit-large-patch14", "text_encoder_2": "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
          "text_encoder_3": "google/t5-v1_1-xxl"}


def load_from_file(path, name, dtype):
    """The encoder `name` of a single file and its tokenizer, or (None, None) for a T5 that is absent."""
    prefix = weights.PREFIXES[IN_FILE[name]]
    with weights.open_safetensors(path) as file:
        names = [key.removeprefix(prefix) for key in file.keys() if key.startswith(prefix)]
    if not names and name == "text_encoder_3":
        return None, None
    if not names:
        raise UserError(f"{path}: holds no text encoders; use a file that includes them, or a diffusers folder")
    source = weights.NetworkFiles(path, IN_FILE[name])
    beside = path.parent / ENCODERS[name]
    tokenizer = load_tokenizer(beside if beside.is_dir() else MAKERS[name])
    state = {key: source.read(key) for key in names}
    if name == "text_encoder_3":
        kind, config = T5EncoderModel, t5_config(source)
    else:  # CLIP-L's pooled state is used as it is, whatever projection a published file carries
        projected = name == "text_encoder_2" or source.metadata.get("clip_l_projected") == "True"
        activation = "quick_gelu" if name == "text_encoder" else "gelu"
        kind, config = CLIPTextModelWithProjection, clip_config(source, tokenizer, activation, projected)
        if not projected:
            state["text_projection.weight"] = torch.eye(config.projection_dim)
    with weights.library_errors(path, f"be read as {IN_FILE[name]}"):
        model, report = kind.from_pretrained(None, config=config, state_dict=state, dtype=dtype,
                                             ignore_mismatched_sizes=True, output_loading_info=True)
    return checked(model, report, path), tokenizer


def clip_config(source, tokenizer, activation, projected):
    tokens = "text_model.embeddings.token_embedding.weight"
    vocabulary, width = source.shape(tokens, dimensions=2)
    check_heads(source, tokens, width, HEAD_WIDTH)
    return CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=width, num_attention_heads=width // HEAD_WIDTH, hidden_act=activation,
        projection_dim=source.shape("text_projection.weight", dimensions=2)[0] if projected else width,
        intermediate_size=source.shape("text_model.encoder.layers.0.mlp.fc1.weight", dimensions=2)[0],
        num_hidden_layers=source.depth("text_model.encoder.layers.{}.mlp.fc1.weight"),
        max_position_embeddings=source.shape("text_model.embeddings.position_embedding.weight", dimensions=2)[0],
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)


def t5_config(source):
    vocabulary, width = source.shape("shared.weight", dimensions=2)
    attention = "encoder.block.0.layer.0.SelfAttention."
    buckets, heads = source.shape(attention + "relative_attention_bias.weight", dimensions=2)
    rows, _ = source.shape(attention + "q.weight", dimensions=2)
    check_heads(source, attention + "q.weight", rows, heads)
    return T5Config(
        vocab_size=vocabulary, d_model=width, num_heads=heads, d_kv=rows // heads,
        num_layers=source.depth("encoder.block.{}.layer.0.SelfAttention.q.weight"),
        d_ff=source.shape("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", dimensions=2)[0],
        relative_attention_num_buckets=buckets, feed_forward_proj="gated-gelu")


def check_heads(source, name, size, parts):
    """Raise UserError where a size that was read off tensor `name` cannot be shared out among heads."""
    if size % parts:
        raise UserError(f"{source.path}: tensor {source.prefix}{name} has a size of {size}, no multiple of {parts}")


def load_tokenizer(source):
    """A tokenizer, from a folder or a Hugging Face repository."""
    with weights.library_errors(source, "be read as a tokenizer"):
        return AutoTokenizer.from_pretrained(source)


def check_tokenizer(tokenizer, model):
    """Raise UserError where a tokenizer isn't the encoder's own. Without its files, transformers makes an empty one."""
    size, known, longest = len(tokenizer), model.config.vocab_size, tokenizer.model_max_length
    if not known / 2 < size <= known or tokenizer.pad_token is None or not isinstance(longest, int) or longest < 2:
        raise UserError(f"{tokenizer.name_or_path}: no tokenizer of its encoder: {size} tokens, where that one knows "
                        f"{known}; {tokenizer.pad_token} as padding; at most {longest} tokens a prompt")


def checked(model, report, path):
    """A model that transformers loaded, if it found its tensors, of the right shapes, finite, and no other layers."""
    layers = ("text_model.encoder.layers.", "encoder.block.")
    left_over = [name for name in report["unexpected_keys"] if name.startswith(layers)]
    for problem, names in (("is missing", report["missing_keys"]), ("does not belong there", left_over)):
        if names:
            raise UserError(f"{path}: tensor {min(names)} {problem}")
    for name, found, expected in sorted(report["mismatched_keys"]):
        raise UserError(f"{path}: tensor {name} has shape {list(found)}, expected {list(expected)}")
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: tensor {name} is not finite (NaN or infinity)")
    return model


# -------------------------------------------------------------------------------------------------------- save

def single_file_tensors(text):
    """The encoders' tensors under the names of Stability's single file, without its prefix."""
    models = {"clip_l": text.clip_l, "clip_g": text.clip_g, "t5xxl": text.t5}
    again = "encoder.embed_tokens.weight"  # T5's `shared.weight` under another name
    return {f"{name}.transformer.{key}": tensor for name, model in models.items() if model is not None
            for key, tensor in model.state_dict().items() if key != again}


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
