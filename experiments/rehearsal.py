"""Rehearse docs/official.md without the weights: its commands, word for word, on random weights in the published layout.

    python -m experiments.rehearsal                 a small model, minutes on a CPU
    python -m experiments.rehearsal --full          SD3-Medium's size, T5-XXL and ConvNeXt-XXL included

Everything that the page would download is made under the name that it would have, in --out, where the commands then run;
training makes a few updates instead of all, stops halfway and is resumed. What each command took is printed as a table.
Not official: the tokenizers, which are the tiny SD3's and know few words.
"""

import commandline  # first: it sets how threads wait before torch is loaded

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

import flow
import weights
from adversarial import BACKBONE_FILE, ConvNeXt
from commandline import CommandLine, UserError
from mmdit import MMDiT
from pipeline import TINY, Pipeline, save_pipeline
from text import ENCODERS
from tinyworld.make import new_text_encoders
from vae import VAE

PAGE = TINY.parent / "docs" / "official.md"
MODEL, CLIP = "stabilityai/stable-diffusion-3-medium-diffusers", "openai/clip-vit-large-patch14"
BACKBONE, INCEPTION = "laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup", "inception-2015-12-05.pt"
FULL = {  # widths and depths as published
    "mmdit": {"depth": 24, "width": 1536, "heads": 24, "pos_max": 192}, "vae": {},
    "clips": ((768, 12), (1280, 32)), "t5": (4096, 10240, 24), "tokens": (77, 77, 256),
    "convnext": ((3, 4, 30, 3), (384, 768, 1536, 3072), 1024), "judge": (1024, 24, 224)}
SMALL = {
    "mmdit": {"depth": 10, "width": 64, "heads": 1, "pos_max": 4},
    "vae": {"widths": (8, 8, 16, 16), "layers": 1, "groups": 4},
    "clips": ((64, 1), (64, 1)), "t5": (128, 128, 1), "tokens": (14, 14, 13),
    "convnext": ((1, 1, 1, 1), (8, 8, 16, 16), 16), "judge": (64, 1, 32)}
SHORTER = {  # what is added to each command of stage 1, stage 2: the first time and when it is resumed
    1: ("--iterations 1", "--iterations 2 --resume"),
    2: ("--iterations 2 --discriminator-warmup 1", "--iterations 5 --discriminator-warmup 1 --resume")}


def main():
    parser = CommandLine(description="Run the commands of docs/official.md on random weights.")
    parser.add_argument("--full", action="store_true", help="at the size of SD3-Medium; without it all is small")
    parser.add_argument("--out", type=Path, default=Path("runs/rehearsal"), help="an empty folder")
    args = parser.parse_args()
    weights.check_writable(args.out)
    if any(args.out.iterdir()):
        raise UserError(f"{args.out} is not empty")
    make_files(args.out, FULL if args.full else SMALL)
    rows = [run(command, args.out) for command in commands(PAGE.read_text())]
    lines = ["| command | seconds | memory, GB | GPU memory, GB |", "|---|---|---|---|", *rows]
    weights.write_text(args.out / "rehearsal.md", "\n".join(lines) + "\n")
    print(*lines, sep="\n")


# --------------------------------------------------------------------------------------------------------- commands

def commands(page):
    """The commands in a page's code blocks, and each training command in two halves."""
    found = []
    for block in page.split("```")[1::2]:
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["python"]:
                stage = int(words[words.index("--stage") + 1]) if "--stage" in words else None
                found += [words + more.split() for more in SHORTER[stage]] if stage else [words]
    return found


def run(words, folder):
    """Run a command in a folder -> a row of the table. Raises UserError if it fails."""
    start = time.monotonic()
    print(*words, file=sys.stderr)
    process = subprocess.Popen([sys.executable, TINY.parent / words[1], *words[2:]], cwd=folder,
                               env={**os.environ, "HF_HUB_OFFLINE": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise UserError(f"`{' '.join(words)}` failed")
    newest = max(folder.glob("runs/*/*/log.jsonl"), key=lambda file: file.stat().st_mtime, default=None)
    gpu = json.loads(newest.read_text().splitlines()[-1]).get("peak GB", "") if newest and "train.py" in words else ""
    return f"| `{' '.join(words[1:])}` | {time.monotonic() - start:.0f} | {usage.ru_maxrss / 2**20:.1f} | {gpu} |"


# ------------------------------------------------------------------------------------------------------------- files

def make_files(folder, size):
    """Everything that the commands read, with random weights."""
    torch.manual_seed(0)
    save_pipeline(random_pipeline(size), folder / MODEL, dtype=torch.float16)
    convnext = randomised(ConvNeXt(*size["convnext"]))
    weights.write_safetensors(folder / BACKBONE / BACKBONE_FILE,
                              {f"visual.{name}": tensor for name, tensor in convnext.state_dict().items()})
    save_judges(folder, size)
    prompts = [f"a large shape on the {place}" for place in ("left", "right", "top")]
    weights.write_text(folder / "prompts.jsonl", "\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
    weights.write_text(folder / "coco.txt", "\n".join(prompts))


def random_pipeline(size):
    """An SD3 with random weights, in half precision."""
    tokenizers = [AutoTokenizer.from_pretrained(TINY / name, model_max_length=length)
                  for name, length in zip(ENCODERS.values(), size["tokens"])]
    text = new_text_encoders(tokenizers, size["clips"], size["t5"], torch.float16)
    pooled = sum(width for width, _ in size["clips"])
    with torch.device("meta"):
        mmdit, vae = MMDiT(**size["mmdit"], context_dim=text.context_width, pooled_dim=pooled), VAE(**size["vae"])
    return Pipeline(randomised(mmdit), randomised(vae), text, 3.0, flow.sd3_sigmas(28, 3.0), 7.0)


def randomised(network):
    """A network with random weights in half precision, small enough that nothing overflows."""
    network.half().to_empty(device="cpu").requires_grad_(False)
    for parameter in network.parameters():
        parameter.normal_(std=0.02)
    return network


def save_judges(folder, size):
    """The CLIP and the Inception of evaluate.py."""
    width, depth, side = size["judge"]
    tokenizer = AutoTokenizer.from_pretrained(TINY / "tokenizer")
    each = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": depth, "num_attention_heads": width // 64}
    words = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id,
             "eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 77}
    CLIPModel(CLIPConfig(text_config={**each, **words}, vision_config={**each, "image_size": side, "patch_size": side // 16},
                         projection_dim=width)).save_pretrained(folder / CLIP)
    images = CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side)
    CLIPProcessor(images, tokenizer).save_pretrained(folder / CLIP)
    torch.jit.script(average_colour).save(str(folder / INCEPTION))


def average_colour(images, return_features: bool = False):
    """Called as Inception is: bytes (B, 3, H, W) in, features (B, 3) out."""
    return images.float().mean((2, 3))


if __name__ == "__main__":
    commandline.run_script(main)
