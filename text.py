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
from transformers import AutoTokenizer, CLIPTextModelWithProjection, T5EncoderModel
from transformers.utils import logging as transformers_logging

import weights
from commandline import UserError, one_line

T5_LENGTH = 256    # tokens, as in diffusers and the paper; a tokenizer with a smaller maximum keeps its own
ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", "text_encoder_3": "tokenizer_3"}  # L, G, T5


class TextEncoders(nn.Module):
    """CLIP-L, CLIP-G and, unless None, T5, each with its tokenizer. `context_width`: T5's, also where it is absent."""

    def __init__(self, clip_l, clip_g, t5, tokenizers, context_width):
        super().__init__()
        self.clip_l, self.clip_g, self.t5 = clip_l, clip_g, t5
        self.tokenizers = tokenizers  # three, the last None without T5
        self.context_width = context_width
        self.clip_length = min(clip_l.config.max_position_embeddings, tokenizers[0].model_max_length,
                               clip_g.config.max_position_embeddings, tokenizers[1].model_max_length)
        self.t5_length = min(T5_LENGTH, tokenizers[2].model_max_length) if t5 is not None else T5_LENGTH
        self.warned = set()

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
            t5 = self.t5(ids).last_hidden_state.to(clip.dtype)                           # (B, 256, D); padding is not masked
        return torch.cat([clip, t5], dim=1), torch.cat([l_pooled, g_pooled], dim=1)

    def encode_clip(self, model, tokenizer, prompts):
        """-> the last but one layer's tokens, without final norm, (B, 77, width); the projected EOS state, (B, P)."""
        ids = self.token_ids(tokenizer, prompts, self.clip_length, "CLIP")
        out = model(ids, output_hidden_states=True)  # no padding mask: SD3 was trained without
        return out.hidden_states[-2], out.text_embeds

    def token_ids(self, tokenizer, prompts, length, reader):
        """Padded, truncated token ids (B, length). The first prompt that is too long for a reader is shown on stderr."""
        whole = tokenizer(prompts, padding="max_length", max_length=length, verbose=False).input_ids
        if max(map(len, whole)) > length:
            if reader not in self.warned:
                self.warned.add(reader)
                ids = next(ids for ids in whole if len(ids) > length)
                lost = tokenizer.decode(ids[length - 1:], skip_special_tokens=True)
                print(f"warning: {reader} reads {length} tokens of a prompt; of this one of {len(ids)} it ignores: "
                      f"\"{one_line(lost, 400)}\" (further prompts that are too long are cut silently)", file=sys.stderr)
            whole = tokenizer(prompts, padding="max_length", truncation=True, max_length=length).input_ids
        return torch.tensor(whole, device=next(self.parameters()).device)


# -------------------------------------------------------------------------------------------------------- load

def load_text_encoders(path, device="cpu", dtype=torch.float32):
    """The text encoders of a diffusers folder, of a Stability file that has them, or of a Hugging Face repository id.

    T5 may be absent. dtype None: each as it is stored. Raises UserError where anything else is missing or damaged.
    """
    path = weights.find_model(path)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # weights.py says what is wrong with a file, in one line
    source = weights.NetworkFiles(path, "transformer")
    context_width = source.shape("context_embedder.weight", dimensions=2)[1]  # T5 is as wide
    pooled_width = source.shape("y_embedder.mlp.0.weight", dimensions=2)[1]
    clip_l, clip_g, t5 = (load_encoder(path, name, dtype) for name in ENCODERS)
    tokenizers = [load_tokenizer(path, name, model) for name, model in zip(ENCODERS, (clip_l, clip_g, t5))]
    if t5 is not None and t5.config.d_model != context_width or \
            clip_l.config.hidden_size + clip_g.config.hidden_size > context_width or \
            clip_l.config.projection_dim + clip_g.config.projection_dim != pooled_width:
        raise UserError(f"{path}: its text encoders and its transformer do not go together")
    return TextEncoders(clip_l, clip_g, t5, tokenizers, context_width).to(device).requires_grad_(False).eval()


PARTS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}  # names in single files
AGAIN = "encoder.embed_tokens.weight"  # T5's `shared.weight` under another name
HARMLESS = (AGAIN, "logit_scale", "text_projection.weight", "text_model.embeddings.position_ids")  # in published files


def load_encoder(path, name, dtype):
    """The encoder `name` of a diffusers folder or a Stability file; None for a T5 that is absent.

    Sizes are those of config.json or, in a single file, of the tensors.
    """
    part, single = PARTS[name], path.is_file()
    if single:
        with weights.open_safetensors(path) as file:
            names = [key for key in file.keys() if key.startswith(weights.TEXT_PREFIX)]
        present = any(key.startswith(weights.PREFIXES[part]) for key in names)
        known = tuple(weights.PREFIXES[each] for each in PARTS.values())
        for key in names if not present else ():  # under another name, it would be left out without a word
            if not key.startswith(known) and not key.endswith("logit_scale"):
                raise UserError(f"{path}: tensor {key} belongs to no text encoder")
    else:  # a folder that was not copied whole still lists what it should have
        present = (path / name).is_dir() or any(weights.read_json(path / "model_index.json").get(name, ()))
    if not present and name == "text_encoder_3":
        return None
    if not present:
        raise UserError(f"{path}: holds no text encoders; use a file that includes them, or a diffusers folder")
    source = weights.NetworkFiles(weights.find_component(path, name), part)
    kind = T5EncoderModel if part == "t5xxl" else CLIPTextModelWithProjection
    with weights.library_errors(source.path, f"be read as {part}"):
        sizes = source.config or (t5_settings(source) if part == "t5xxl" else clip_settings(source, part))
        config = kind.config_class.from_dict(sizes)
        with torch.device("meta"):
            shapes = {key: list(tensor.shape) for key, tensor in kind(config).state_dict().items() if key != AGAIN}
    if single and part == "clip_l":  # SD3 uses its pooled state as it is, whatever projection is published with it
        del shapes["text_projection.weight"]
    weights.check_tensors(source, shapes, HARMLESS)
    state = {key: source.read(key) for key in shapes}
    stored = next((tensor.dtype for tensor in state.values() if tensor.itemsize > 1), torch.bfloat16)  # or fp8
    state = {key: tensor.to(dtype or stored, copy=True) for key, tensor in state.items()}
    for key, tensor in state.items():
        weights.check_finite(source.path, source.their_names(key)[0], tensor)
    if single and part == "clip_l":
        state["text_projection.weight"] = torch.eye(config.projection_dim, dtype=dtype or stored)
    return kind.from_pretrained(None, config=config, state_dict=state, dtype=dtype or stored)


def clip_settings(source, part):
    """What a CLIPTextConfig takes, read off the tensors."""
    vocabulary, width = source.shape("text_model.embeddings.token_embedding.weight", dimensions=2)
    return dict(
        vocab_size=vocabulary, hidden_size=width, num_attention_heads=source.heads(width),
        hidden_act="quick_gelu" if part == "clip_l" else "gelu",
        projection_dim=width if part == "clip_l" else source.shape("text_projection.weight", dimensions=2)[0],
        intermediate_size=source.shape("text_model.encoder.layers.0.mlp.fc1.weight", dimensions=2)[0],
        num_hidden_layers=source.blocks,
        max_position_embeddings=source.shape("text_model.embeddings.position_embedding.weight", dimensions=2)[0],
        bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1)


def t5_settings(source):
    """What a T5Config takes, read off the tensors."""
    vocabulary, width = source.shape("shared.weight", dimensions=2)
    attention = "encoder.block.0.layer.0.SelfAttention."
    buckets, heads = source.shape(attention + "relative_attention_bias.weight", dimensions=2)
    return dict(
        vocab_size=vocabulary, d_model=width, num_heads=heads, feed_forward_proj="gated-gelu",
        d_kv=source.shape(attention + "q.weight", dimensions=2)[0] // heads, num_layers=source.blocks,
        d_ff=source.shape("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", dimensions=2)[0],
        relative_attention_num_buckets=buckets)


TOKENIZERS = "stabilityai/stable-diffusion-3-medium-diffusers"  # for single files, which have none


def load_tokenizer(path, name, model):
    """The tokenizer of the encoder `name`: in a model's folder, beside a single file, or SD3-Medium's.

    SD3 pads CLIP-G with token 0, "!", wherever its tokenizer comes from: the one that CLIP-G was published with pads
    with its end token.
    """
    if model is None:
        return None
    folder = (path.parent if path.is_file() else path) / ENCODERS[name]
    if path.is_file() and not folder.is_dir():
        folder = weights.find_model(TOKENIZERS, [f"{each}/*" for each in ENCODERS.values()]) / ENCODERS[name]
    with weights.library_errors(folder, "be read as a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        words = len(tokenizer)
    known = model.config.vocab_size
    if not known / 2 < words <= known:  # without its files, transformers makes an empty one
        raise UserError(f"{folder}: a tokenizer of {words} tokens does not fit an encoder of {known}")
    if name == "text_encoder_2":
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    return tokenizer


# -------------------------------------------------------------------------------------------------------- save

def save_text_encoders(text, folder):
    """Write the encoders and tokenizers in the diffusers layout, `folder`/text_encoder, `folder`/tokenizer, …

    Each keeps its dtype in the file, but its settings say fp32: transformers opens it in that, as diffusers does the
    rest, and a mixture does not run.
    """
    for model, tokenizer, name in zip((text.clip_l, text.clip_g, text.t5), text.tokenizers, ENCODERS):
        if model is not None:
            with weights.library_errors(folder / name, "be written"):
                model.save_pretrained(folder / name)
                tokenizer.save_pretrained(folder / ENCODERS[name])
            config = folder / name / "config.json"
            weights.write_json(config, {**weights.read_json(config), "dtype": "float32"})


def link_text_encoders(source, folder):
    """Write links to the encoders and tokenizers of the diffusers folder `source`."""
    for name in (*ENCODERS, *ENCODERS.values()):
        if (source / name).exists() and not (folder / name).exists():
            (folder / name).symlink_to((source / name).resolve())
