"""Stage 0: make the tiny SD3 from nothing. Not part of the paper; it gives every command something to run on.

The result has the official architecture and the official diffusers folder layout, at 1/200 of the size: three text encoders
with tokenizers, an autoencoder, an MMDiT of 12 blocks, and beside them the recogniser of the tiny world. Each part is trained
by one loss, in this order; train.py runs the loop.
"""

import json

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

import flow
import shapes
import weights
from adversarial import ConvNeXt
from mmdit import MMDiT
from text import TextEncoders, load_tokenizer
from vae import VAE, ResBlock

CLIP_LENGTH, T5_LENGTH = 14, 13   # tokens: the longest caption, its start (CLIP) and its end
CLIP_WIDTH, T5_WIDTH = 64, 128
WIDTH, DEPTH, POS_MAX = 128, 12, 16   # of the MMDiT; images up to 256×256
VAE_WIDTHS, VAE_LAYERS, VAE_GROUPS = (16, 64, 96, 96), 1, 8   # wide where it is cheap, narrow at full resolution
BACKBONE_DEPTHS, BACKBONE_WIDTHS, BACKBONE_EMBEDDING = (1, 1, 2, 1), (48, 96, 128, 160), 64
SHIFT = 3.0
POOL = 65_536  # scenes whose latents the teacher is trained on; their captions are drawn afresh each time


# ---------------------------------------------------------------------------------------------------- tokenizers

def write_clip_tokenizer(folder, pad):
    """A byte-level BPE tokenizer in CLIP's format, in which each word of the tiny world is one token."""
    letters = byte_letters()
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    learner.train_from_iterator(shapes.VOCABULARY, trainers.BpeTrainer(
        vocab_size=10_000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False))  # until each word is one token
    pairs = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in pairs),
              "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    weights.write_json(folder / "vocab.json", vocabulary)
    weights.write_text(folder / "merges.txt", "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in pairs))
    weights.write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": CLIP_LENGTH, "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": pad})
    return vocabulary


def byte_letters():
    """The 256 printable characters that stand for the 256 bytes in a byte-level tokenizer (Radford et al. 2019)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def write_t5_tokenizer(folder):
    """A unigram tokenizer in T5's format: the words of the tiny world, and single letters for any other."""
    letters = [chr(c) for c in range(33, 127)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in shapes.VOCABULARY),
                  ("▁", -10.0), *((letter, -10.0) for letter in letters)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    weights.write_text(folder / "tokenizer.json", tokenizer.to_str())
    weights.write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "T5TokenizerFast", "model_max_length": T5_LENGTH, "eos_token": "</s>", "pad_token": "<pad>",
        "unk_token": "<unk>", "extra_ids": 0})
    return len(vocabulary)


# ------------------------------------------------------------------------------------------------- new networks

def new_text_encoders(folder):
    """Tokenizers, written to `folder`, and three untrained encoders that fit them."""
    vocabulary = write_clip_tokenizer(folder / "tokenizer", pad="<|endoftext|>")
    write_clip_tokenizer(folder / "tokenizer_2", pad="!")
    t5_vocabulary = write_t5_tokenizer(folder / "tokenizer_3")
    clips = [CLIPTextModelWithProjection(CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=CLIP_WIDTH, intermediate_size=4 * CLIP_WIDTH, projection_dim=CLIP_WIDTH,
        num_hidden_layers=2, num_attention_heads=CLIP_WIDTH // 64, max_position_embeddings=CLIP_LENGTH, hidden_act=activation,
        bos_token_id=vocabulary["<|startoftext|>"], eos_token_id=vocabulary["<|endoftext|>"],
        pad_token_id=vocabulary[pad])) for activation, pad in (("quick_gelu", "<|endoftext|>"), ("gelu", "!"))]
    t5 = T5EncoderModel(T5Config(
        vocab_size=t5_vocabulary, d_model=T5_WIDTH, d_kv=64, num_heads=T5_WIDTH // 64, d_ff=2 * T5_WIDTH, num_layers=2,
        feed_forward_proj="gated-gelu", dropout_rate=0.0, tie_word_embeddings=False))
    return TextEncoders(*clips, t5, [load_tokenizer(folder, name) for name in ("tokenizer", "tokenizer_2", "tokenizer_3")])


def new_vae():
    """An untrained autoencoder whose residual branches start at zero and whose posterior starts narrow: it learns faster."""
    vae = VAE(widths=VAE_WIDTHS, layers=VAE_LAYERS, groups=VAE_GROUPS, scale=1.0, shift=0.0)
    for module in vae.modules():
        if isinstance(module, ResBlock):
            nn.init.zeros_(module.conv2.weight)
    nn.init.constant_(vae.encoder.conv_out.bias[vae.channels:], -10)  # log-variance
    return vae


def new_mmdit():
    """An untrained MMDiT of SD3-Medium's kind (no QK norm). Its blocks start as identities (DiT, Peebles & Xie 2023)."""
    model = MMDiT(depth=DEPTH, width=WIDTH, heads=WIDTH // 64, context_dim=T5_WIDTH, pooled_dim=2 * CLIP_WIDTH,
                  pos_max=POS_MAX)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and name != "pos_embed":
            nn.init.xavier_uniform_(parameter.flatten(1))
        if "adaLN" in name or "final_layer" in name or name.endswith("bias"):
            nn.init.zeros_(parameter)
    model.pos_embed.data.copy_(sincos_table(POS_MAX, WIDTH, shapes.SIZE // 16))
    return model


def sincos_table(pos_max, width, base):
    """The position table a new MMDiT starts from, (1, pos_max², width): 2-D sines and cosines (Vaswani et al. 2017).

    `base` is the side in tokens of the images it is made for: positions are scaled to it and centred on the table's crop.
    """
    positions = torch.arange(pos_max, dtype=torch.float64) - (pos_max - base) // 2
    frequencies = 10_000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = positions[:, None] * frequencies                                           # (pos_max, width / 4)
    side = torch.cat([angles.sin(), angles.cos()], dim=1)                               # (pos_max, width / 2)
    across = side[None].expand(pos_max, -1, -1)
    down = side[:, None].expand(-1, pos_max, -1)
    return torch.cat([across, down], dim=2).flatten(0, 1)[None].float()


# ------------------------------------------------------------------------------------------------------- losses
# Each is loss(network, generator) once its first arguments are bound. Scenes are drawn on the CPU, for any device.

class TinyText(nn.Module):
    """The text encoders, with linear probes that read "which value, or none" of each attribute and are dropped later."""

    def __init__(self, folder):
        super().__init__()
        self.encoders = new_text_encoders(folder)
        widths = (CLIP_WIDTH, CLIP_WIDTH, T5_WIDTH, T5_WIDTH)
        self.probes = nn.ModuleList(nn.ModuleList(nn.Linear(width, k + 1) for k in shapes.CHOICES) for width in widths)


def text_loss(text, generator, batch=128):
    """Each encoder must tell what a caption says: from CLIP's pooled state and mean token, and from T5's mean token."""
    captions, labels, named = shapes.draw_captions(batch, generator)
    context, pooled = text.encoders(captions)
    said = torch.where(named, labels + 1, 0).to(context.device)                         # (B, 6), 0 = not said
    states = (*pooled.split(CLIP_WIDTH, dim=1), context[:, :CLIP_LENGTH].mean(1), context[:, CLIP_LENGTH:].mean(1))
    losses = [F.cross_entropy(probe(state), said[:, i]) for probes, state in zip(text.probes, states, strict=True)
              for i, probe in enumerate(probes)]
    return torch.stack(losses).mean()


def recogniser_loss(recogniser, generator, batch=128):
    """Cross-entropy on fresh renders, roughened a little so that a generator's small faults do not confuse it."""
    labels, jitter = shapes.draw_scenes(batch, generator)
    images = shapes.render(labels, jitter)
    images = images + 0.1 * torch.rand(batch, 1, 1, 1, generator=generator) * torch.randn(images.shape, generator=generator)
    logits, labels = recogniser(images.to(device_of(recogniser))), labels.to(device_of(recogniser))
    return torch.stack([F.cross_entropy(values, labels[:, i]) for i, values in enumerate(logits)]).mean()


class TinyBackbone(nn.Module):
    """The discriminator's ConvNeXt, with linear probes that are dropped later: on the embedding, for each attribute, and on
    the third feature map, for what no caption tells. It never meets the recogniser: other scenes, weights and layers."""

    def __init__(self):
        super().__init__()
        self.backbone = ConvNeXt(BACKBONE_DEPTHS, BACKBONE_WIDTHS, BACKBONE_EMBEDDING)
        self.probes = nn.ModuleList(nn.Linear(BACKBONE_EMBEDDING, k) for k in shapes.CHOICES)
        self.jitter = nn.Linear(BACKBONE_WIDTHS[2], 3)


def backbone_loss(network, generator, batch=128):
    """Cross-entropy of each attribute, and the squared error of position and radius, on fresh renders, slightly noisy."""
    labels, jitter = shapes.draw_scenes(batch, generator)
    images = shapes.render(labels, jitter)
    images = images + 0.05 * torch.rand(batch, 1, 1, 1, generator=generator) * torch.randn(images.shape, generator=generator)
    images, labels, jitter = (tensor.to(device_of(network)) for tensor in (images, labels, jitter))
    maps, embedding = network.backbone(images)
    read = torch.stack([F.cross_entropy(probe(embedding), labels[:, i]) for i, probe in enumerate(network.probes)])
    return read.mean() + F.mse_loss(network.jitter(maps[2].mean(dim=(2, 3))).float(), jitter)


def vae_loss(vae, generator, batch=16, kl_weight=1e-5):
    """Reconstruction plus a slight pull of the posterior to N(0, 1) (Rombach et al. 2022).

    Three of four batches are quarter-size crops around the object, four times as many: what is hard to learn is there.
    """
    crops = torch.rand(1, generator=generator) < 0.75
    labels, jitter = shapes.draw_scenes(4 * batch if crops else batch, generator)
    images = shapes.render(labels, jitter)
    if crops:
        images = crop_objects(images, labels, generator)
    images = images.to(device_of(vae))
    mean, log_variance = vae.moments(images)
    z = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=generator).to(mean.device)
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
    error = vae.decode(z) - images
    return 4 * error.square().mean() + error.abs().mean() + kl_weight * kl


def crop_objects(images, labels, generator):
    """A 32×32 crop of each image that holds its object or most of it, aligned to the latents' grid of 8 pixels."""
    centre = shapes.CENTRES[labels[:, shapes.NAMES.index("position")]]                  # (N, 2), (x, y)
    wanted = centre - 24 + 16 * torch.rand(centre.shape, generator=generator)
    corner = (wanted / 8).round().long().clamp(0, 4) * 8                                # (N, 2), (x, y)
    return torch.stack([image[:, y:y + 32, x:x + 32] for image, (x, y) in zip(images, corner.tolist())])


def teacher_loss(text, latents, labels, model, generator, batch=64, drop=0.1):
    """Rectified flow: the mean squared error of the velocity. σ: half logit-normal (Esser et al. 2024), half uniform."""
    index = torch.randint(len(latents), (batch,), generator=generator)
    x0, named = latents[index], shapes.draw_named(batch, generator)
    captions = [shapes.caption(*pair) for pair in zip(labels[index], named)]
    for i in (torch.rand(batch, generator=generator) < drop).nonzero():
        captions[i] = ""  # for classifier-free guidance
    context, pooled = text(captions)

    u = torch.rand(batch, generator=generator)
    u = torch.where(torch.arange(batch) < batch // 2, torch.randn(batch, generator=generator).sigmoid(), u)
    sigma = flow.shift_sigma(u, SHIFT)
    noise = torch.randn(x0.shape, generator=generator)
    x0, noise, sigma = (tensor.to(device_of(model)) for tensor in (x0, noise, sigma))
    velocity = model(flow.add_noise(x0, noise, sigma), sigma, context, pooled)
    return F.mse_loss(velocity, noise - x0)


def device_of(network):
    return next(network.parameters()).device


@torch.no_grad()
def encode_pool(vae, n, seed, batch=256):
    """n scenes drawn from `seed` -> their latents, (n, 16, 8, 8), and labels, (n, 6)."""
    generator = torch.Generator().manual_seed(seed)
    labels, jitter = shapes.draw_scenes(n, generator)
    images = (shapes.render(*pair) for pair in zip(labels.split(batch), jitter.split(batch)))
    return torch.cat([vae.encode(part.to(device_of(vae))).float().cpu() for part in images]), labels
