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
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

import flow
import report
import shapes
import weights
from adversarial import ConvNeXt, normalise, save_backbone
from commandline import UserError
from mmdit import MMDiT
from networks import descend
from pipeline import TINY, Pipeline, Sampler, save_pipeline
from prompts import seeded
from text import ENCODERS, TextEncoders, load_tokenizer
from vae import VAE, ResBlock

CLIP_WIDTH, T5_WIDTH = 64, 128
WIDTH, DEPTH, POS_MAX = 128, 12, 16   # of the MMDiT; images up to 128×128
LATENT_NOISE = 0.05
# Latents of 4 channels, a quarter of the image a side; SD3's are of 16, an eighth. A token is so a patch of 8×8 pixels,
# not 16×16, which is coarse for 64 pixels a side; and what it holds, 16 numbers, fits a width of 128 well.
LATENT_CHANNELS = 4
VAE_WIDTHS, VAE_LAYERS, VAE_GROUPS = (24, 48, 96), 1, 8
BACKBONE_DEPTHS, BACKBONE_WIDTHS, BACKBONE_EMBEDDING = (1, 1, 2, 1), (48, 96, 128, 160), 64
BACKBONE_SCALE = 5   # of its maps, which are white but for it
SHIFT = 3.0
POOL = 65_536            # scenes whose latents the teacher is trained on; their captions are drawn afresh each time
ITERATIONS = {"text": 400, "recogniser": 800, "backbone": 1000, "vae": 1500, "decoder": 2000, "teacher": 8000}
AVERAGE = 0.999          # of the moving average of the weights
GUIDANCES = (1, 2, 3, 4, 5)              # tried for the teacher
STUDENT_STEPS, STUDENT_GUIDANCE = (1, 2, 4, 8), 7   # what students are distilled to, and from


# ------------------------------------------------------------------------------------------------- from nothing

def make(folder, seed, arithmetic, train_part):
    """Make a tiny SD3 in `folder`, part by part; what is finished there is not made again.

    train_part(name, networks, optimizers, iterate, iterations) is the training loop; iterate(step) makes one iteration.
    Raises UserError where the folder holds a whole one.
    """
    if shapes.measures_file(folder).exists():
        raise UserError(f"{folder} holds a finished tiny SD3; choose another --out")
    part = partial(make_part, folder, arithmetic, train_part)
    text = part("text", TinyText, text_loss, 2e-3, seed).encoders
    recogniser = part("recogniser", shapes.Recogniser, recogniser_loss, 1e-3, seed)
    backbone = amplify(part("backbone", TinyBackbone, backbone_loss, 1e-3, seed + 1000).backbone, BACKBONE_SCALE)
    vae = part("vae", new_vae, vae_loss, 2e-3, seed)
    with arithmetic.passes():
        latents, _ = encode_pool(vae, 2048, seed + 2)
    whiten(vae, latents.to(arithmetic.device))
    vae = part("decoder", partial(decoder_of, vae), vae_loss, 2e-3, seed + 3)
    with arithmetic.passes():
        latents, labels = encode_pool(vae, POOL, seed + 1)
    mmdit = part("teacher", new_mmdit, partial(teacher_loss, text, latents, labels), 1e-3, seed, muon=5e-3)
    mmdit.metadata["sample_size"] = shapes.SIZE // vae.factor

    weights.write_safetensors(shapes.recogniser_file(folder), recogniser.state_dict())
    save_backbone(backbone, folder, torch.float16)
    teacher = Pipeline(*(part.half().float() for part in (mmdit, vae, text)), SHIFT)  # as its files will have it
    samplers = teacher_samplers(teacher)
    with arithmetic.passes():
        samples = report.look_at_teacher(samplers[f"teacher, 28 steps, w = {STUDENT_GUIDANCE}"], recogniser.cpu())
        measured = report.measure(samplers, folder, samples)
    best = min(GUIDANCES, key=lambda w: measured[f"teacher, 28 steps, w = {w}"]["fidelity"]["mean"][0])
    save_pipeline(teacher, folder, {"guidance": str(float(best))}, dtype=torch.float16)
    for name in ENCODERS.values():
        shutil.copytree(TINY / name, folder / name, dirs_exist_ok=True)
    report.write_teacher(samples, folder)
    samplers = {report.AUTOENCODER: report.Reconstruction(teacher.vae), **samplers}
    keyed = {samplers[name].key(): measures for name, measures in measured.items()}
    report.write_measures(keyed, folder, folder)  # last: they name the model as it lies there
    print(f"{report.table(measured)}\n\ntiny SD3: {folder}, best guidance w = {best}")


def make_part(folder, arithmetic, train_part, name, build, loss, rate, seed, muon=None):
    """Train one network by one loss: AdamW, a short warm-up, then a cosine down to 0. Returns its moving average.

    muon: the rate of the matrices of the MMDiT's blocks, which Muon (Jordan et al. 2024) moves in AdamW's place; a
    transformer needs two thirds of the updates then.
    """
    torch.manual_seed(seed)  # for the initial weights alone
    network = build().to(arithmetic.device)
    file = folder / "parts" / f"{name}.safetensors"
    if file.exists():
        return weights.load_plain(network, file).requires_grad_(False).eval()
    averaged, iterations = copy.deepcopy(network), ITERATIONS[name]
    learning = {name: p for name, p in network.named_parameters() if p.requires_grad}
    matrices = {name: p for name, p in learning.items() if muon and "joint_blocks" in name and p.ndim == 2}
    others = [p for name, p in learning.items() if name not in matrices]
    optimizers, rates = {"adamw": torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.01, fused=True)}, [rate]
    if muon:
        optimizers["muon"] = torch.optim.Muon(matrices.values(), weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        rates.append(muon)

    def iterate(step):
        for optimizer, peak in zip(optimizers.values(), rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * min((step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * step / iterations))
        with arithmetic.passes():
            value = loss(network, seeded(seed, step))
        value.backward()
        norm = descend(optimizers.values(), {"loss": value.detach()}, max_norm=1.0)
        average = get_ema_multi_avg_fn(min(AVERAGE, (1 + step) / (10 + step)))
        average(list(averaged.parameters()), list(network.parameters()), step)
        return {"loss": value.detach(), "norm": norm}

    train_part(name, {"network": network, "averaged": averaged}, optimizers, iterate, iterations)
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
    vae = VAE(VAE_WIDTHS, VAE_LAYERS, LATENT_CHANNELS, VAE_GROUPS, scale=1.0, shift=0.0)
    for module in vae.modules():
        if isinstance(module, ResBlock):
            nn.init.zeros_(module.conv2.weight)
    nn.init.constant_(vae.encoder.conv_out.bias[vae.channels:], -10)  # log-variance
    return vae


@torch.no_grad()
def whiten(vae, latents):
    """Turn and stretch the latents' channels so that they are uncorrelated, of mean 0 and variance 1.

    Left alone, one direction (how bright a place is) has nine tenths of the variance, and edges drown in little noise.
    latents (N, C, h, w), of this autoencoder. The map goes into the encoder's last layer, its inverse into the
    decoder's first; that one's padding now means something else, which training the decoder mends. The posterior's
    deviation becomes LATENT_NOISE everywhere: the decoder learns to bear a generator's small faults.
    """
    mean = latents.mean(dim=(0, 2, 3))                                                  # (C,)
    cells = (latents.movedim(1, -1) - mean).flatten(0, 2)                               # (N h w, C)
    variances, directions = torch.linalg.eigh(cells.T @ cells / len(cells))
    forth = directions @ torch.diag(variances.rsqrt()) @ directions.T                   # (C, C), symmetric
    back = directions @ torch.diag(variances.sqrt()) @ directions.T
    out, into = vae.encoder.conv_out, vae.decoder.conv_in
    out.weight[:vae.channels] = torch.einsum("ij,jkyx->ikyx", forth, out.weight[:vae.channels])
    out.bias[:vae.channels] = forth @ (out.bias[:vae.channels] - mean)
    into.bias += into.weight.sum(dim=(2, 3)) @ mean
    into.weight.copy_(torch.einsum("kjyx,ji->kiyx", into.weight, back))
    out.weight[vae.channels:], out.bias[vae.channels:] = 0, 2 * math.log(LATENT_NOISE)


def decoder_of(vae):
    """The autoencoder once its latents are settled: from here on only the decoder learns."""
    vae.encoder.requires_grad_(False)
    vae.decoder.requires_grad_(True)
    return vae.train()


def new_mmdit():
    """An untrained MMDiT of SD3-Medium's kind, without QK norm. Its blocks start as identities (Peebles & Xie 2023)."""
    model = MMDiT(depth=DEPTH, width=WIDTH, heads=WIDTH // 64, context_dim=T5_WIDTH, pooled_dim=2 * CLIP_WIDTH,
                  pos_max=POS_MAX, channels=LATENT_CHANNELS)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and name != "pos_embed":
            nn.init.xavier_uniform_(parameter.flatten(1))
        if "adaLN" in name or "final_layer" in name or name.endswith("bias"):
            nn.init.zeros_(parameter)
    model.pos_embed.data.copy_(sincos_table(POS_MAX, WIDTH, shapes.SIZE // 2 ** len(VAE_WIDTHS)))
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
    """The discriminator's ConvNeXt, with linear probes that go later; it never meets the recogniser.

    The embedding is read for each attribute, the third feature map for what no caption tells, and every map, place by
    place, for how much an image is damaged there in three bands of frequency. The stem is not learned: its 48 kernels
    are the 16 waves of a 4×4 patch in 3 colours, each scaled to unit variance over renders.
    """

    def __init__(self):
        super().__init__()
        self.backbone = ConvNeXt(BACKBONE_DEPTHS, BACKBONE_WIDTHS, BACKBONE_EMBEDDING)
        self.probes = nn.ModuleList(nn.Linear(BACKBONE_EMBEDDING, k) for k in shapes.CHOICES)
        self.jitter = nn.Linear(BACKBONE_WIDTHS[2], 3)
        self.damage = nn.ModuleList(nn.Conv2d(width, 3, 1) for width in BACKBONE_WIDTHS[:3])
        stem = self.backbone.trunk["stem"][0].requires_grad_(False)
        u = math.pi / 4 * torch.outer(torch.arange(4), torch.arange(4) + 0.5)           # (wave, pixel)
        waves = torch.einsum("iy,jx->ijyx", u.cos(), u.cos()).flatten(0, 1)             # (16, 4, 4)
        stem.weight.data = torch.einsum("kyx,oc->kocyx", waves, torch.eye(3)).flatten(0, 1).contiguous()
        renders = shapes.render(*shapes.draw_scenes(256, torch.Generator().manual_seed(0)))
        seen = F.conv2d(normalise(renders), stem.weight, stride=4)                      # (256, 48, 16, 16)
        stem.weight.data /= seen.std(dim=(0, 2, 3))[:, None, None, None]
        stem.bias.data = -seen.mean(dim=(0, 2, 3)) / seen.std(dim=(0, 2, 3))


def backbone_loss(network, generator, batch=64):
    """What the probes read of damaged renders; and the maps are whitened: their covariance is pulled to the identity.

    Whitened, because what differs from scene to scene (colour, place) would else drown what differs from a render to a
    generated image, and heads under spectral norm cannot amplify it.
    """
    labels, jitter = shapes.draw_scenes(batch, generator)
    renders = shapes.render(labels, jitter)
    images = damage(renders, generator)
    harm = [local_power(images - renders, side) for side in (16, 8, 4)]
    images, labels, jitter, *harm = (t.to(device_of(network)) for t in (images, labels, jitter, *harm))
    maps, embedding = network.backbone(images)
    read = torch.stack([F.cross_entropy(probe(embedding), labels[:, i]) for i, probe in enumerate(network.probes)])
    placed = F.mse_loss(network.jitter(maps[2].mean(dim=(2, 3))).float(), jitter)
    found = sum(F.mse_loss(probe(m).float(), h) for probe, m, h in zip(network.damage, maps, harm, strict=True))
    return read.mean() + placed + found + sum(colouredness(m) for m in maps)


def damage(images, generator):
    """Faults as generators make them, each of a random strength: warped edges, places out of focus, spots, noise."""
    def strength(most):
        return most * ((torch.rand(len(images), 1, 1, 1, generator=generator) - 0.3) / 0.7).clamp(min=0)

    def cloud(channels, side, noise=torch.randn):
        return F.interpolate(noise(len(images), channels, side, side, generator=generator), shapes.SIZE, mode="bicubic")

    still = F.affine_grid(torch.eye(2, 3).expand(len(images), 2, 3), list(images.shape), align_corners=False)
    warp = (strength(0.04) * cloud(2, 8)).movedim(1, -1)
    images = F.grid_sample(images, still + warp, padding_mode="reflection", align_corners=False)
    images = torch.lerp(images, blur(images, 5), strength(1.0) * cloud(1, 8).sigmoid())
    for side in (8, 16, 32):
        images = images + strength(0.2) * cloud(3, side) * cloud(1, 8, torch.rand).clamp(0, 1) ** 3
    return roughen(images, 0.05, generator)


def local_power(error, side):
    """Power of an error (B, 3, 64, 64) in three bands, from fine to coarse, in decades, at each of side² places."""
    fine, coarse = blur(error, 3), blur(blur(error, 3), 7)
    bands = torch.stack([error - fine, fine - coarse, coarse], dim=1).square().mean(2)  # (B, 3, 64, 64)
    return (F.adaptive_avg_pool2d(bands, side) + 1e-4).log10()


def blur(images, size):
    return F.avg_pool2d(F.pad(images, (size // 2,) * 4, mode="reflect"), size, stride=1)


def colouredness(m):
    """How far a map's (B, C, h, w) channels are from white: from mean 0 and the identity as covariance."""
    cells = m.float().movedim(1, -1).flatten(0, 2)                                      # (B h w, C)
    mean, covariance = cells.mean(0), torch.cov(cells.T, correction=0)
    return ((covariance - torch.eye(len(mean), device=m.device)).square().sum() + mean.square().sum()) / len(mean)


@torch.no_grad()
def amplify(backbone, factor):
    """Scale the three maps, exactly: what enters a stage and what its blocks add grow, what these see stays.

    Norms stand before whatever comes next. So large, the maps suit heads under spectral norm, which cannot amplify.
    """
    for i, stage in enumerate(backbone.trunk["stages"][:3]):
        entry = stage.downsample[1] if i else backbone.trunk["stem"][1]
        entry.weight *= factor
        entry.bias *= factor
        for block in stage.blocks:
            block.conv_dw.weight /= factor
            block.gamma *= factor
    return backbone


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
    """Rectified flow: the velocity's mean squared error. σ: half logit-normal (Esser et al. 2024), half uniform.

    Both are spread evenly over the batch, so that the loss of one differs less from that of the next.
    """
    index = torch.randint(len(latents), (batch,), generator=generator)
    x0, named = latents[index], shapes.draw_named(batch, generator)
    captions = [shapes.caption(*pair) for pair in zip(labels[index], named)]
    for i in (torch.rand(batch, generator=generator) < drop).nonzero():
        captions[i] = ""  # for classifier-free guidance
    context, pooled = text(captions)

    u, uniform = (torch.arange(batch // 2) + torch.rand(2, batch // 2, generator=generator)) / (batch // 2)
    sigma = torch.cat([flow.shift_sigma(torch.special.ndtri(u).sigmoid(), SHIFT), uniform])
    noise = torch.randn(x0.shape, generator=generator)
    x0, noise, sigma = (tensor.to(device_of(model)) for tensor in (x0, noise, sigma))
    velocity = model(flow.add_noise(x0, noise, sigma), sigma, context, pooled)
    return F.mse_loss(velocity, noise - x0)


def device_of(network):
    return next(network.parameters()).device


@torch.no_grad()
def encode_pool(vae, n, seed, batch=256):
    """n scenes drawn from `seed` -> their latents, (n, 4, 16, 16), and labels, (n, 6)."""
    generator = torch.Generator().manual_seed(seed)
    labels, jitter = shapes.draw_scenes(n, generator)
    parts = tqdm(list(zip(labels.split(batch), jitter.split(batch))), desc="latents of scenes", leave=False)
    return torch.cat([vae.encode(shapes.render(*part).to(device_of(vae))).float().cpu() for part in parts]), labels
