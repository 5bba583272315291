"""The prompts of a run: read from a file or drawn from the tiny world, and encoded beforehand where that takes long."""

import csv
import hashlib
import json
import shutil
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import parallel
import weights
from commandline import UserError
from text import load_text_encoders
from tinyworld import scenes

MOST = 100_000  # prompts of a file that are read: as many as the released training has


# --------------------------------------------------------------------------------------------------------- files

def read_prompts(path):
    """The first MOST prompts of a file in UTF-8. Raises UserError if it cannot be read.

    .txt: one a line. .jsonl: an object with `prompt` a line. .csv or .tsv: a table with a column named `prompt`; a .tsv
    has no quoting.
    """
    kind, prompts, number = Path(path).suffix.lower(), [], 0
    if kind not in (".txt", ".jsonl", ".csv", ".tsv"):
        raise UserError(f"{path}: prompts are read from .txt, .jsonl, .csv and .tsv files")
    try:
        with open(path, encoding="utf-8-sig", newline="" if kind in (".csv", ".tsv") else None) as file:
            for number, prompt in enumerate(records(file, kind), 1):
                prompt.encode()  # fails on half a character
                prompts += [prompt.strip()] if prompt.strip() else []
                if len(prompts) == MOST:
                    print(f"note: only the first {MOST:,} prompts of {path} are read", file=sys.stderr)
                    break
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as {kind} with text in `prompt`, after record {number} "
                        f"({type(error).__name__}: {error})") from error
    if not prompts:
        raise UserError(f"{path}: holds no prompt")
    return prompts


def records(file, kind):
    """The prompt of each line or row."""
    if kind == ".txt":
        yield from file
    elif kind == ".jsonl":
        yield from (json.loads(line)["prompt"] for line in file if line.strip())
    else:
        table = csv.reader(file, strict=True) if kind == ".csv" else \
            csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        columns = [name.strip().lower() for name in next(table, [])]
        if "prompt" not in columns:
            raise KeyError("no column `prompt`")
        yield from (row[columns.index("prompt")] for row in table if len(row) > columns.index("prompt"))


# ------------------------------------------------------------------------------------------------------- drawing

def draw_prompts(prompts, n, generator):
    """n prompts of the list or, if it is None, captions of the tiny world.

    Deviation: drawn with replacement. The released training draws without.
    """
    if prompts is None:
        return scenes.draw_captions(n, generator)[0]
    return [prompts[i] for i in torch.randint(len(prompts), (n,), generator=generator)]


def sheet_prompts(prompts):
    """The prompts of a run's contact sheets, the same at every time and in every run."""
    return draw_prompts(prompts, 8, torch.Generator().manual_seed(7))


# ------------------------------------------------------------------------------------------- encoded beforehand

class EncodedText:
    """Prompts that are encoded once and read from the disk from then on, so that the encoders do not stay in memory.

    Called like text.TextEncoders. A prompt is a safetensors file; each model and dtype has a folder of its own.
    """

    def __init__(self, folder, model, device, dtype):
        self.model, self.device, self.dtype = model, device, dtype
        name = f"{str(model).strip('/').replace('/', '--')}-{str(dtype).removeprefix('torch.')}"
        self.folder = Path(folder) / name

    def __call__(self, prompts):
        """B prompts -> context (B, 77 + 256, D), pooled (B, P)."""
        parts = []
        for prompt in prompts:
            with weights.open_safetensors(self.file(prompt)) as file:
                parts.append((file.get_tensor("context"), file.get_tensor("pooled")))
        return [torch.stack(part).to(self.device) for part in zip(*parts)]

    def file(self, prompt):
        return self.folder / f"{hashlib.sha256(prompt.encode()).hexdigest()[:32]}.safetensors"

    @torch.no_grad()
    def encode(self, prompts, batch=16):
        """Encode those of the prompts that are not there yet, each process its share. What is done stays done.

        Raises UserError if the disk is too small for them.
        """
        missing = [prompt for prompt in sorted(prompts) if not self.file(prompt).exists()]
        parallel.wait()  # until all processes have seen the same ones missing
        if not missing:
            return
        weights.check_writable(self.folder)
        encoders = load_text_encoders(self.model, self.device, self.dtype)
        needed = len(missing) * sum(part.numel() * self.dtype.itemsize for part in encoders([""])) / 1e9
        free = shutil.disk_usage(self.folder).free / 1e9
        if parallel.is_first():
            print(f"text: {len(missing)} prompts to encode, {needed:.3g} GB in {self.folder}")
        if needed > free:
            raise UserError(f"{self.folder}: {needed:.3g} GB of encoded prompts do not fit, {free:.3g} GB are free; "
                            "name another disk with --text-cache, or take fewer prompts or --iterations")
        own = missing[parallel.rank()::parallel.processes()]
        for i in tqdm(range(0, len(own), batch), desc="encoding text", disable=not parallel.is_first()):
            for prompt, *parts in zip(own[i:i + batch], *encoders(own[i:i + batch]), strict=True):
                context, pooled = (part.to("cpu", self.dtype).contiguous() for part in parts)
                weights.write_safetensors(self.file(prompt), {"context": context, "pooled": pooled})
        parallel.wait()
