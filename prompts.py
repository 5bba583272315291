"""The prompts of a run: read from a file or drawn from the tiny world; encoded beforehand where that takes long."""

import codecs
import contextlib
import csv
import hashlib
import io
import json
import re
import shutil
from pathlib import Path

import torch
from tqdm import tqdm

import parallel
import shapes
import weights
from commandline import UserError, one_line
from mmdit import empty_mmdit
from text import check_widths, load_text_encoders


# --------------------------------------------------------------------------------------------------------- files

JSON_START, SPACE = re.compile(r'\s*({\s*"|\[\s*["{])'), re.compile(r"\s*")


def read_prompts(path):
    """Prompts of a file in UTF-8, or in UTF-16 with its mark. What can't be read raises UserError.

    .txt (one a line), .csv or .tsv (column `prompt`), .json, .jsonl or .ndjson (texts, or objects with `prompt`, else
    `ori_prompt`, in a list or one after another). JSON is known by how it starts, too.
    """
    path = Path(path)
    text, kind = read_text(path), path.suffix.lower()
    if kind in (".json", ".jsonl", ".ndjson") or JSON_START.match(text):
        prompts = prompts_of_json(path, text)
    elif kind in (".csv", ".tsv"):
        prompts = column_of_table(path, kind, text)
    elif kind in (".txt", ""):
        prompts = text.split("\n")
    else:
        raise UserError(f"{path}: prompts are read from .txt, .json, .jsonl, .csv and .tsv, not from {kind}")
    prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
    if not prompts:
        raise UserError(f"{path}: holds no prompt")
    return prompts


def read_text(path):
    """The text of a file, its lines ended by "\\n"."""
    try:
        data = path.read_bytes()
        text = data.decode("utf-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text, nor UTF-16 with its mark (byte {error.start})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if "\0" in text:
        raise UserError(f"{path}: not UTF-8 text, nor UTF-16 with its mark (holds NUL characters)")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def prompts_of_json(path, text):
    records, at, decoder = [], 0, json.JSONDecoder()
    try:
        while (at := SPACE.match(text, at).end()) < len(text):
            value, at = decoder.raw_decode(text, at)
            records += value if isinstance(value, list) else [value]
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
    return [prompt_of_record(path, number, record) for number, record in enumerate(records, 1)]


def prompt_of_record(path, number, record):
    try:
        prompt = record if isinstance(record, str) else record.get("prompt") or record["ori_prompt"]
        prompt.encode()  # fails where it is no text, or half a character
        return prompt
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path}, record {number}: neither text nor an object with a text `prompt` or `ori_prompt`"
                        ) from error


def column_of_table(path, kind, text):
    head = text.partition("\n")[0]
    style = {"delimiter": ";" if ";" in head and "," not in head else ","} if kind == ".csv" else \
        {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    try:
        header, *rows = list(csv.reader(io.StringIO(text), **style)) or [[]]
    except csv.Error as error:
        raise UserError(f"{path}: cannot be read as a table in {kind} format ({error})") from error
    columns = [name.strip().lower() for name in header]
    if "prompt" not in columns:
        raise UserError(f"{path}: no column named prompt (found: {one_line(', '.join(columns), 200) or 'nothing'})")
    return [row[columns.index("prompt")] for row in rows if len(row) > columns.index("prompt")]


# ------------------------------------------------------------------------------------------------------- drawing

def draw_prompts(prompts, n, generator):
    """n prompts of the list, or, without one, fresh captions of the tiny world."""
    if prompts is None:
        return shapes.draw_captions(n, generator)[0]
    return [prompts[i] for i in torch.randint(len(prompts), (n,), generator=generator)]


def seeded(seed, step):
    """The random numbers of one iteration; its prompts are drawn first."""
    return torch.Generator().manual_seed(1_000_003 * seed + step)


def sheet_prompts(prompts, rows=8):
    """Those of a run's contact sheets, the same at every time and in every run."""
    return draw_prompts(prompts, rows, torch.Generator().manual_seed(7))


# ------------------------------------------------------------------------------------------- encoded beforehand

def open_prompts(args):
    """The prompts of a training run, and what encodes them. None stands for captions of the tiny world.

    The tiny world's encoders are small and stay in memory. For other models, the text that the run will draw is encoded
    now, each process its share, and read from the disk from then on.
    """
    tiny = shapes.is_tiny_world(args.model)
    if args.prompts is None and not tiny:
        raise UserError(f"{args.model}: give --prompts FILE; only the tiny SD3 draws captions of its own")
    prompts = read_prompts(args.prompts) if args.prompts else None
    if tiny:
        return prompts, load_text_encoders(args.model, args.device)
    drawn = {"", *sheet_prompts(prompts)}
    for step in range(args.iterations):
        drawn.update(draw_prompts(prompts, args.batch, seeded(args.seed, step)))
    text = CachedText(args.text_cache, args.model, args.arithmetic)
    text.encode_all(drawn)
    return prompts, text


class CachedText:
    """Prompts encoded once, a safetensors file for each, and read from there. The encoders do not stay in memory.

    Called like text.TextEncoders. Each model and dtype has a folder of its own in `folder`.
    """

    def __init__(self, folder, model, arithmetic):
        self.model, (self.device, self.dtype) = weights.find_model(model), arithmetic
        self.folder = Path(folder) / f"{Path(model).name}-{weights.identity(model, self.dtype)}"

    def __call__(self, prompts):
        """B prompts -> context (B, 77 + 256, D), pooled (B, P). Raises UserError for one that was not encoded."""
        parts = []
        for prompt in prompts:
            with weights.open_safetensors(self.file(prompt)) as file:
                parts.append((file.get_tensor("context"), file.get_tensor("pooled")))
        return [torch.stack(part).to(self.device, non_blocking=True) for part in zip(*parts)]

    def file(self, prompt):
        return self.folder / f"{hashlib.sha256(prompt.encode()).hexdigest()[:32]}.safetensors"

    def open(self):
        """The encoders as they are stored, on the CPU."""
        return load_text_encoders(self.model, "cpu", None)

    def encode_all(self, prompts, batch=16):
        """Encode those of the prompts that are not there yet, each process its share.

        A batch of which some are missing is encoded whole: a prompt's last bits depend on those beside it, and a run
        that was stopped is to find what it would have found.
        """
        prompts = sorted(prompts)
        batches = [prompts[i:i + batch] for i in range(0, len(prompts), batch)]
        weights.check_writable(self.folder / "x")
        with weights.alone_in(self.folder, wait=True) if parallel.is_first() else contextlib.nullcontext():
            parallel.wait()  # until the folder is held against other runs
            missing = {prompt for prompt in prompts if not self.file(prompt).exists()}
            parallel.wait()  # until all processes have seen the same ones missing
            if missing:
                self.encode(parallel.share([some for some in batches if missing.intersection(some)]), missing)
            parallel.wait()

    @torch.no_grad()
    def encode(self, batches, missing):
        """Encode batches of prompts, this process's share, and write the `missing` ones, which are those of all.

        What is done stays done if it is stopped. Says how much there is to do before it starts; raises UserError where
        the disk is too small for it.
        """
        encoders = load_text_encoders(self.model, self.device, self.dtype)
        check_widths(encoders, empty_mmdit(weights.NetworkFiles(self.model, "transformer")), self.model)

        def encoded(prompts):
            return [part.to("cpu", self.dtype).contiguous() for part in encoders(prompts)]

        needed = len(missing) * sum(part.nbytes for part in encoded([""])) / 1e9
        free = shutil.disk_usage(self.folder).free / 1e9
        parallel.say(f"text: {len(missing)} prompts to encode, {needed:.3g} GB in {self.folder}")
        if needed > free:
            raise UserError(f"{self.folder}: {needed:.3g} GB of encoded prompts do not fit, {free:.3g} GB are free; "
                            "name another disk with --text-cache, or take fewer prompts or --iterations")
        for some in tqdm(batches, desc="encoding text", disable=not parallel.is_first()):
            for prompt, context, pooled in zip(some, *encoded(some), strict=True):
                if prompt in missing:
                    weights.write_safetensors(self.file(prompt), {"context": context, "pooled": pooled},
                                              {"prompt": prompt})
        for reader, cut in encoders.cut.items():
            if cut:
                parallel.say(f"text: {len(cut)} of these prompts are too long for {reader}: it reads the beginning")
