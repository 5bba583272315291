"""Stage 0: make the tiny SD3. Not part of the paper; it gives every command something to run on.

    python -m tinyworld.make --out runs/tiny-sd3                       from nothing
    python -m tinyworld.make --out runs/tiny-sd3 --start tiny-sd3      train the teacher of a tiny SD3 further

The result has the official architecture and the official diffusers folder layout, at 1/290 of the size: three text
encoders, an autoencoder, an MMDiT of 12 blocks. Each part is trained by one loss, in the order of `make`, and a run that
was stopped continues with the same command and --resume. The tokenizers are those of the tiny SD3 that ships: each word
of the tiny world is one token.
"""

import commandline  # first: it sets how threads wait before torch is loaded

import copy
import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

import flow
import weights
from commandline import DEVICE, CommandLine, UserError, count, find_device
from loop import Run, autocast, fast_bf16, move_average, optimizer_step, seeded
from mmdit import MMDiT
from pipeline import TINY, Pipeline, load_pipeline, save_pipeline
from text import ENCODERS, TextEncoders
from tinyworld import measures, scenes
from tinyworld.truth import true_velocity
from vae import VAE, ResBlock

CLIP_WIDTH, T5_WIDTH = 64, 128
WIDTH, DEPTH, POS_MAX = 128, 12, 16   # of the MMDiT; images up to 128×128
LATENT_NOISE = 0.05
# Latents of 4 channels, a quarter of the image a side; SD3's are of 16, an eighth. So a token is a patch of 8×8 pixels,
# not 16×16, which is coarse for 64 pixels a side, and the 16 numbers that it holds fit a width of 128 well.
LATENT_CHANNELS = 4
VAE_WIDTHS, VAE_LAYERS, VAE_GROUPS = (24, 48, 96), 1, 8
SHIFT = 3.0
UPDATES = {"text": 400, "vae": 1500, "decoder": 2000}
EMA = 0.9995             # of the moving average of the weights, which is what is kept
GUIDANCES = (1, 2, 3, 4, 7)              # tried for the teacher; students learn from the last


def main():
    parser = CommandLine(description="Make the tiny SD3 (Stage 0).")
    add = parser.add_argument
    add("--out", type=Path, required=True, help="a folder")
    add("--start", help="a tiny SD3 whose text encoders and autoencoder are kept and whose transformer is trained on")
    add("--updates", type=count, default=24_000, help="updates of the teacher")
    add("--fall", type=count, default=12_000, help="its last updates, during which its rates fall to zero")
    add("--batch", type=count, default=64, help="samples per update of the teacher, an even number")
    add("--captions", type=count, default=1024, help="to measure the teacher with")
    add("--seed", type=commandline.seed, default=0, help="random seed")
    add("--device", type=find_device, default=DEVICE, help="where it runs")
    add("--dtype", choices=["bf16", "fp32"], help="precision of the arithmetic; without it bf16 where it is faster")
    add("--resume", action="store_true", help="continue the run in --out")
    args = parser.parse_args()
    args.dtype = args.dtype or ("bf16" if fast_bf16(args.device) else "fp32")
    if args.batch % 2:
        raise UserError(f"--batch {args.batch}: the noise levels of a batch come in pairs; give an even number")
    weights.check_writable(args.out, new=not args.resume)
    make(args)


def make(args):
    """Train the parts one after the other; what is finished in --out is not made again."""
    torch.manual_seed(args.seed)  # for initial weights
    if args.start:
        start = load_pipeline(args.start, args.device)
        text, vae, mmdit = start.text, start.vae, start.mmdit
    else:
        text = train_part(args, "text", TinyText(), text_loss, {"adamw": 2e-3}).encoders
        vae = train_part(args, "vae", new_vae(), vae_loss, {"adamw": 2e-3})
        with autocast(args):
            latents = scenes.encode(vae, scenes.LABELS).float()
        whiten(vae, latents)
        vae.decoder.requires_grad_(True)  # the latents are settled: from here on only the decoder learns
        vae = train_part(args, "decoder", vae, vae_loss, {"adamw": 2e-3})
        mmdit = new_mmdit()
    data = encode_world(text, vae)
    mmdit.requires_grad_(True).pos_embed.requires_grad_(False)
    mmdit = train_part(args, "teacher", mmdit, partial(teacher_loss, *data, batch=args.batch),
                       {"adamw": 6e-4, "muon": 3e-3}, args.updates, args.fall)
    mmdit.metadata["sample_size"] = scenes.SIZE // vae.factor

    mmdit, vae = (part.half().float() for part in (mmdit, vae))  # as the files will have them
    teacher = Pipeline(mmdit, vae, text, SHIFT, flow.sd3_sigmas(28, SHIFT).to(args.device), 1.0)
    found = {"true scenes, autoencoded": measures.measure(
        lambda prompts, seeds: vae.decode(scenes.true_latents(vae, prompts, seeds)).cpu(), args.captions)}
    with autocast(args), torch.no_grad():
        for w in GUIDANCES:
            found[f"teacher, 28 steps, w = {w}"] = measures.measure(
                teacher.sampled_with(guidance=w).images, args.captions)
    best = min(GUIDANCES, key=lambda w: found[f"teacher, 28 steps, w = {w}"]["distance"])
    save_pipeline(teacher, args.out, {"guidance": str(float(best))}, dtype=torch.float16)
    weights.write_json(args.out / "measures.json", found)
    print(measures.table(found), f"\ntiny SD3: {args.out}; guidance w = {best} is nearest to true scenes")


def train_part(args, name, network, loss, rates, updates=None, fall=None):
    """Train one network by loss(network, generator). Returns the moving average of its weights.

    AdamW; with a rate for "muon", Muon (Jordan et al. 2024) moves the matrices of the MMDiT's blocks in its place. The
    rates rise over the first 100 updates, stay, and fall to zero over the last `fall` (by default all of them).
    """
    network = network.to(args.device).train()
    file = args.out / "parts" / f"{name}.safetensors"
    if file.exists():
        return weights.load_plain(network, file).requires_grad_(False).eval()
    averaged, updates = copy.deepcopy(network), updates or UPDATES[name]
    learning = {key: p for key, p in network.named_parameters() if p.requires_grad}
    names = [key for key, p in learning.items() if "muon" in rates and "joint_blocks" in key and p.ndim == 2]
    matrices, others = [learning[key] for key in names], [p for key, p in learning.items() if key not in names]
    optimizers = {"adamw": torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.01, fused=True)}
    if matrices:
        optimizers["muon"] = torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    settings = {"start": args.start, "seed": args.seed, "dtype": args.dtype, "updates": updates, "fall": fall,
                "batch": args.batch}
    run = Run(args, settings, name, {"network": network, "averaged": averaged}, optimizers, updates)
    for step in run.steps():
        for key, optimizer in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = rates[key] * min(1, (step + 1) / 100, (updates - step) / min(fall or updates, updates))
        with autocast(args):
            value = loss(network, seeded(args.seed, step))
        value.backward()
        norm = optimizer_step(optimizers.values(), max_norm=1.0)
        move_average(averaged, network, max(1 - EMA, 9 / (10 + step)))
        run.end_step({"norm": norm}, loss=value.detach())
    weights.write_safetensors(file, {key: t.detach().cpu().clone() for key, t in averaged.state_dict().items()})
    return averaged.requires_grad_(False).eval()


@torch.no_grad()
def encode_world(text, vae):
    """All scenes and all captions, encoded once.

    -> latents (4800, C, h, w), context (18900, L, D) and pooled (18900, P) in half precision, and both of the empty
    prompt. Caption i, in mixed radix with a digit for each attribute, names the value digit - 1, or none for 0.
    """
    told = torch.cartesian_prod(*(torch.arange(k + 1) for k in scenes.CHOICES))
    captions = [scenes.caption((row - 1).clamp(min=0), row > 0) for row in told]
    parts = [text(captions[i:i + 500]) for i in range(0, len(captions), 500)]
    context, pooled = (torch.cat([pair[i].half() for pair in parts]) for i in range(2))
    return scenes.encode(vae, scenes.LABELS).float(), context, pooled, text([""])


# ------------------------------------------------------------------------------------------------- new networks

def new_text_encoders(tokenizers, clips, t5, dtype=torch.float32):
    """Untrained encoders that fit three tokenizers. clips: width and depth of each; t5: width, hidden width, depth."""
    clips = [CLIPTextModelWithProjection._from_config(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, projection_dim=width,
        num_hidden_layers=depth, num_attention_heads=width // 64, max_position_embeddings=tokenizer.model_max_length,
        hidden_act=activation, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id), dtype=dtype)
        for tokenizer, (width, depth), activation in zip(tokenizers, clips, ("quick_gelu", "gelu"))]
    width, hidden, depth = t5
    t5 = T5EncoderModel._from_config(T5Config(
        vocab_size=len(tokenizers[2]), d_model=width, d_kv=64, num_heads=width // 64, d_ff=hidden, num_layers=depth,
        feed_forward_proj="gated-gelu", dropout_rate=0.0, tie_word_embeddings=False), dtype=dtype)
    return TextEncoders(*clips, t5, tokenizers, context_width=width)


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

    Left alone, one direction (how bright a place is) has most of the variance, and edges drown in little noise.
    latents (N, C, h, w), of this autoencoder. The map goes into the encoder's last layer, its inverse into the
    decoder's first, whose zero padding changes its meaning: further training corrects this. The posterior's
    deviation becomes LATENT_NOISE everywhere: the decoder learns to tolerate a generator's small errors.
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


def new_mmdit():
    """An untrained MMDiT of SD3-Medium's kind, without QK norm. Its blocks start as identities (Peebles & Xie 2023)."""
    model = MMDiT(depth=DEPTH, width=WIDTH, heads=WIDTH // 64, context_dim=T5_WIDTH, pooled_dim=2 * CLIP_WIDTH,
                  pos_max=POS_MAX, channels=LATENT_CHANNELS)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and name != "pos_embed":
            nn.init.xavier_uniform_(parameter.flatten(1))
        if "adaLN" in name or "final_layer" in name or name.endswith("bias"):
            nn.init.zeros_(parameter)
    model.pos_embed.data.copy_(sincos_table(POS_MAX, WIDTH, scenes.SIZE // 8))  # 8 pixels a token
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

class TinyText(nn.Module):
    """The text encoders, with linear probes that read "which value, or none" of each attribute; these go later."""

    def __init__(self):
        super().__init__()
        tokenizers = [AutoTokenizer.from_pretrained(TINY / name) for name in ENCODERS.values()]
        self.encoders = new_text_encoders(tokenizers, 2 * [(CLIP_WIDTH, 2)], (T5_WIDTH, 2 * T5_WIDTH, 2))
        widths = (CLIP_WIDTH, CLIP_WIDTH, T5_WIDTH, T5_WIDTH)
        self.probes = nn.ModuleList(nn.ModuleList(nn.Linear(width, k + 1) for k in scenes.CHOICES) for width in widths)


def text_loss(text, generator, batch=128):
    """Each encoder must tell what a caption says: from CLIP's pooled state and mean token, and from T5's mean token."""
    captions, labels, named = scenes.draw_captions(batch, generator)
    context, pooled = text.encoders(captions)
    told = torch.where(named, labels + 1, 0).to(context.device)                         # (B, 6), 0 = not told
    clip, t5 = context.split([context.shape[1] - text.encoders.t5_length, text.encoders.t5_length], dim=1)
    states = (*pooled.split(CLIP_WIDTH, dim=1), clip.mean(1), t5.mean(1))
    losses = [F.cross_entropy(probe(state), told[:, i]) for probes, state in zip(text.probes, states, strict=True)
              for i, probe in enumerate(probes)]
    return torch.stack(losses).mean()


def vae_loss(vae, generator, batch=16, kl_weight=1e-5):
    """Reconstruction plus a slight pull of the posterior to N(0, 1) (Rombach et al. 2022).

    Three of four batches are quarter-size crops around the object, four times as many: what is hard to learn is there.
    """
    crops = torch.rand(1, generator=generator) < 0.75
    labels = scenes.draw_labels(4 * batch if crops else batch, generator)
    images = scenes.render(labels)
    if crops:
        images = crop_objects(images, labels, generator)
    images = images.to(vae.decoder.conv_in.weight.device)
    mean, log_variance = vae.moments(images)
    z = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=generator).to(mean.device)
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
    decoded = vae.decode(z)
    return 4 * F.mse_loss(decoded, images) + F.l1_loss(decoded, images) + kl_weight * kl


def crop_objects(images, labels, generator):
    """A 32×32 crop of each image that holds its object or most of it, aligned to the tokens' grid of 8 pixels."""
    centre = scenes.CENTRES[labels[:, scenes.NAMES.index("position")]]                  # (N, 2), (x, y)
    wanted = centre - 24 + 16 * torch.rand(centre.shape, generator=generator)
    corner = (wanted / 8).round().long().clamp(0, 4) * 8                                # (N, 2), (x, y)
    return torch.stack([image[:, y:y + 32, x:x + 32] for image, (x, y) in zip(images, corner.tolist())])


def teacher_loss(latents, context, pooled, empty, model, generator, batch=64, drop=0.1):
    """Rectified flow with the exact target: the velocity's mean squared error to that of the posterior mean.

    The usual target, ε - x0 of the one scene that was drawn, has the same expectation and much more variance. σ: half
    shifted logit-normal (Esser et al. 2024), half uniform, both spread evenly over the batch.
    """
    index = torch.randint(len(latents), (batch,), generator=generator)
    named, dropped = scenes.draw_named(batch, generator), torch.rand(batch, generator=generator) < drop
    u, uniform = (torch.arange(batch // 2) + torch.rand(2, batch // 2, generator=generator)) / (batch // 2)
    sigma = torch.cat([flow.shift_sigma(torch.special.ndtri(u).sigmoid(), SHIFT), uniform]).to(latents.device)
    x = flow.add_noise(latents[index], torch.randn(batch, *latents.shape[1:], generator=generator).to(latents), sigma)

    radix = torch.tensor([math.prod(k + 1 for k in scenes.CHOICES[i + 1:]) for i in range(len(scenes.CHOICES))])
    row = ((scenes.LABELS[index] + 1) * named * radix).sum(1)  # of its caption
    cond = [part[row].float() for part in (context, pooled)]
    for part, of_empty in zip(cond, empty):  # for classifier-free guidance
        part[dropped] = of_empty
    allowed = scenes.allowed(scenes.LABELS[index], named & ~dropped[:, None]).to(x.device)
    return F.mse_loss(model(x, sigma, *cond), true_velocity(x, sigma, latents, allowed))


if __name__ == "__main__":
    commandline.run_script(main)
