"""Stage 0: make the tiny SD3 from nothing. Not part of the paper; it gives every command something to run on.

The result has the official architecture and the official diffusers folder layout, at 1/200 of the size: three text
encoders, an autoencoder, an MMDiT of 12 blocks. Beside them lie the tiny world's recogniser and the discriminator's
ConvNeXt. Each part is trained by one loss, in the order of `make`; train.py runs the loop. The tokenizers are those of
the tiny SD3 that ships: each word of the tiny world is one token.
"""

import copy
import math
import shutil
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

import flow
import report
import shapes
import weights
from adversarial import ConvNeXt, save_backbone
from commandline import UserError
from mmdit import MMDiT
from pipeline import TINY, Pipeline, Sampler, save_pipeline
from prompts import seeded
from text import ENCODERS, TextEncoders, load_tokenizer
from vae import VAE, ResBlock

CLIP_WIDTH, T5_WIDTH = 64, 128
WIDTH, DEPTH, POS_MAX = 128, 12, 16   # of the MMDiT; images up to 256×256
VAE_WIDTHS, VAE_LAYERS, VAE_GROUPS = (16, 64, 96, 96), 1, 8   # wide where it is cheap, narrow at full resolution
BACKBONE_DEPTHS, BACKBONE_WIDTHS, BACKBONE_EMBEDDING = (1, 1, 2, 1), (48, 96, 128, 160), 64
SHIFT = 3.0
POOL = 65_536            # scenes whose latents the teacher is trained on; their captions are drawn afresh each time
ITERATIONS = {"text": 400, "recogniser": 800, "backbone": 1200, "vae": 2400, "teacher": 12_000}
AVERAGE = 0.999          # of the moving average of the weights
GUIDANCES = (1, 2, 3, 4, 5)              # tried for the teacher
STUDENT_STEPS, STUDENT_GUIDANCE = (1, 2, 4, 8), 7   # what students are distilled to, and from


# ------------------------------------------------------------------------------------------------- from nothing

def make(folder, seed, arithmetic, train_part):
    """Make a tiny SD3 in `folder`, part by part; what is finished there is not made again.

    train_part(name, networks, optimizer, iterate, iterations) is the training loop; iterate(step) makes one iteration.
    Raises UserError where the folder holds a whole one.
    """
    if shapes.measures_file(folder).exists():
        raise UserError(f"{folder} holds a finished tiny SD3; choose another --out")
    part = partial(make_part, folder, arithmetic, train_part)
    text = part("text", TinyText, text_loss, 2e-3, seed).encoders
    recogniser = part("recogniser", shapes.Recogniser, recogniser_loss, 1e-3, seed)
    backbone = part("backbone", TinyBackbone, backbone_loss, 2e-3, seed + 1000).backbone
    vae = part("vae", new_vae, vae_loss, 2e-3, seed)
    with arithmetic.passes():
        latents, labels = encode_pool(vae, POOL, seed + 1)
    vae.shift, vae.scale = latents.mean().item(), 1 / latents.std().item()
    latents = (latents - vae.shift) * vae.scale
    mmdit = part("teacher", new_mmdit, partial(teacher_loss, text, latents, labels), 1e-3, seed)
    mmdit.metadata["sample_size"] = shapes.SIZE // vae.factor

    weights.write_safetensors(shapes.recogniser_file(folder), recogniser.state_dict())
    save_backbone(backbone, folder, torch.float16)
    teacher = Pipeline(*(part.half().float() for part in (mmdit, vae, text)), SHIFT)  # as its files will have it
    samplers = teacher_samplers(teacher)
    with arithmetic.passes():
        measured = report.measure(samplers, folder)
    best = max(GUIDANCES, key=lambda w: measured[f"teacher, 28 steps, w = {w}"]["adherence"]["mean"][0])
    save_pipeline(teacher, folder, {"guidance": str(float(best))}, dtype=torch.float16)
    for name in ENCODERS.values():
        shutil.copytree(TINY / name, folder / name, dirs_exist_ok=True)
    report.write_measures(samplers, measured, folder)  # last: they name the model as it lies there
    print(f"{report.table(measured)}\n\ntiny SD3: {folder}, best guidance w = {best}")


def make_part(folder, arithmetic, train_part, name, build, loss, rate, seed):
    """Train one network by one loss: AdamW, a short warm-up, then a cosine down to 0. Returns its moving average."""
    torch.manual_seed(seed)  # for the initial weights alone
    network = build().to(arithmetic.device)
    file = folder / "parts" / f"{name}.safetensors"
    if file.exists():
        return weights.load_plain(network, file).requires_grad_(False).eval()
    averaged, iterations = copy.deepcopy(network), ITERATIONS[name]
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)

    def iterate(step):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * step / iterations))
        with arithmetic.passes():
            value = loss(network, seeded(seed, step))
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average = get_ema_multi_avg_fn(min(AVERAGE, (1 + step) / (10 + step)))
        average(list(averaged.parameters()), list(network.parameters()), step)
        return {"loss": value.detach(), "norm": norm}

    train_part(name, {"network": network, "averaged": averaged}, optimizer, iterate, iterations)
    weights.write_safetensors(file, {n: t.detach().cpu().clone() for n, t in averaged.state_dict().items()})
    return averaged.requires_grad_(False).eval()


def teacher_samplers(teacher):
    """The ways to sample a teacher that are measured once and for all -> {name: Sampler}."""
    of_guidance = {f"teacher, 28 steps, w = {w}": Sampler(teacher, {"steps": 28, "guidance": float(w)})
                   for w in (*GUIDANCES, STUDENT_GUIDANCE)}
    of_nodes = {f"teacher, {n} steps, w = {STUDENT_GUIDANCE}": Sampler(
        teacher, {"sigmas": flow.student_sigmas(n, SHIFT), "guidance": float(STUDENT_GUIDANCE)}) for n in STUDENT_STEPS}
    return {**of_guidance, **of_nodes}


# ------------------------------------------------------------------------------------------------- new networks

def new_text_encoders():
    """The tokenizers of the shipped model, and three untrained encoders that fit them."""
    tokenizers = [load_tokenizer(TINY / name) for name in ENCODERS.values()]
    clips = [CLIPTextModelWithProjection(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=CLIP_WIDTH, intermediate_size=4 * CLIP_WIDTH, projection_dim=CLIP_WIDTH,
        num_hidden_layers=2, num_attention_heads=CLIP_WIDTH // 64, max_position_embeddings=tokenizer.model_max_length,
        hidden_act=activation, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)) for tokenizer, activation in zip(tokenizers, ("quick_gelu", "gelu"))]
    t5 = T5EncoderModel(T5Config(
        vocab_size=len(tokenizers[2]), d_model=T5_WIDTH, d_kv=64, num_heads=T5_WIDTH // 64, d_ff=2 * T5_WIDTH,
        num_layers=2, feed_forward_proj="gated-gelu", dropout_rate=0.0, tie_word_embeddings=False))
    return TextEncoders(*clips, t5, tokenizers, context_width=T5_WIDTH)


def new_vae():
    """An untrained autoencoder. Its residual branches start at zero and its posterior narrow: it learns faster."""
    vae = VAE(widths=VAE_WIDTHS, layers=VAE_LAYERS, groups=VAE_GROUPS, scale=1.0, shift=0.0)
    for module in vae.modules():
        if isinstance(module, ResBlock):
            nn.init.zeros_(module.conv2.weight)
    nn.init.constant_(vae.encoder.conv_out.bias[vae.channels:], -10)  # log-variance
    return vae


def new_mmdit():
    """An untrained MMDiT of SD3-Medium's kind, without QK norm. Its blocks start as identities (Peebles & Xie 2023)."""
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

    `base` is the side in tokens of the images it is made for: positions count from the corner of that centre crop.
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
    """The text encoders, with linear probes that read "which value, or none" of each attribute; these go later."""

    def __init__(self):
        super().__init__()
        self.encoders = new_text_encoders()
        widths = (CLIP_WIDTH, CLIP_WIDTH, T5_WIDTH, T5_WIDTH)
        self.probes = nn.ModuleList(nn.ModuleList(nn.Linear(width, k + 1) for k in shapes.CHOICES) for width in widths)


def text_loss(text, generator, batch=128):
    """Each encoder must tell what a caption says: from CLIP's pooled state and mean token, and from T5's mean token."""
    captions, labels, named = shapes.draw_captions(batch, generator)
    context, pooled = text.encoders(captions)
    told = torch.where(named, labels + 1, 0).to(context.device)                         # (B, 6), 0 = not told
    clip, t5 = context.split([context.shape[1] - text.encoders.t5_length, text.encoders.t5_length], dim=1)
    states = (*pooled.split(CLIP_WIDTH, dim=1), clip.mean(1), t5.mean(1))
    losses = [F.cross_entropy(probe(state), told[:, i]) for probes, state in zip(text.probes, states, strict=True)
              for i, probe in enumerate(probes)]
    return torch.stack(losses).mean()


def recogniser_loss(recogniser, generator, batch=128):
    """Cross-entropy on fresh renders, roughened a little so that a generator's small faults do not confuse it."""
    labels, jitter = shapes.draw_scenes(batch, generator)
    images = roughen(shapes.render(labels, jitter), 0.1, generator)
    logits, labels = recogniser(images.to(device_of(recogniser))), labels.to(device_of(recogniser))
    return torch.stack([F.cross_entropy(values, labels[:, i]) for i, values in enumerate(logits)]).mean()


def roughen(images, most, generator):
    """Noise on each image, of its own deviation from 0 to `most`."""
    deviation = most * torch.rand(len(images), 1, 1, 1, generator=generator)
    return images + deviation * torch.randn(images.shape, generator=generator)


class TinyBackbone(nn.Module):
    """The discriminator's ConvNeXt, with linear probes that go later.

    On the embedding they read each attribute, on the third feature map what no caption tells. It never meets the
    recogniser: its scenes, weights and layers are others.
    """

    def __init__(self):
        super().__init__()
        self.backbone = ConvNeXt(BACKBONE_DEPTHS, BACKBONE_WIDTHS, BACKBONE_EMBEDDING)
        self.probes = nn.ModuleList(nn.Linear(BACKBONE_EMBEDDING, k) for k in shapes.CHOICES)
        self.jitter = nn.Linear(BACKBONE_WIDTHS[2], 3)


def backbone_loss(network, generator, batch=128):
    """Cross-entropy of each attribute, and the squared error of position and radius, on fresh renders with noise."""
    labels, jitter = shapes.draw_scenes(batch, generator)
    images = roughen(shapes.render(labels, jitter), 0.05, generator)
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
    decoded = vae.decode(z)
    return 4 * F.mse_loss(decoded, images) + F.l1_loss(decoded, images) + kl_weight * kl


def crop_objects(images, labels, generator):
    """A 32×32 crop of each image that holds its object or most of it, aligned to the latents' grid of 8 pixels."""
    centre = shapes.CENTRES[labels[:, shapes.NAMES.index("position")]]                  # (N, 2), (x, y)
    wanted = centre - 24 + 16 * torch.rand(centre.shape, generator=generator)
    corner = (wanted / 8).round().long().clamp(0, 4) * 8                                # (N, 2), (x, y)
    return torch.stack([image[:, y:y + 32, x:x + 32] for image, (x, y) in zip(images, corner.tolist())])


def teacher_loss(text, latents, labels, model, generator, batch=64, drop=0.1):
    """Rectified flow: the velocity's mean squared error. σ: half logit-normal (Esser et al. 2024), half uniform."""
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
