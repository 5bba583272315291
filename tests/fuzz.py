"""Mutated inputs: each is read, or ends in a UserError. No traceback, no hang, little memory, nothing written.

    python tests/fuzz.py 5000 0     5,000 cases from seed 0 on; each failure comes with the seed that repeats it

A case copies a small input that is in order, damages one or two of its files, and uses it in this process.
"""

import json
import math
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import traceback
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
from torch import nn  # noqa: E402

import adversarial  # noqa: E402
import cache  # noqa: E402
import parallel  # noqa: E402
import pipeline  # noqa: E402
import prompts  # noqa: E402
import shapes  # noqa: E402
import weights  # noqa: E402
from commandline import UserError  # noqa: E402
from mmdit import MMDiT, load_mmdit  # noqa: E402
from text import TextEncoders, load_encoder, load_text_encoders  # noqa: E402
from vae import VAE, load_vae  # noqa: E402

SECONDS, MEMORY = 10, 2**26  # the most that a case may take, and need beyond what is in use


class Input(NamedTuple):
    """Files in order, what uses a copy of their folder, and how many of the cases are its."""

    folder: Path
    use: object
    share: int


def write_inputs(root):
    """{name: Input}, below `root`."""
    torch.manual_seed(0)
    encoders = load_text_encoders(pipeline.TINY)
    network = MMDiT(2, 64, 1, *encoders.widths, pos_max=8, qk_norm=True, dual=[0]).requires_grad_(False)
    network.metadata = {"sample_size": 8}
    model = pipeline.Pipeline(network, VAE((8, 8, 8, 8), 1, groups=4), encoders, cache=cache.new_cache((0, 1), 64))
    header = {"sigmas": "[1.0, 0.75, 0.0]", "guidance": "1.0"}
    pipeline.save_pipeline(model, root / "folder", header)
    pipeline.save_single_file(model, root / "file" / "sd3.safetensors", header)
    shutil.copytree(root / "folder" / "transformer", root / "shards")
    write_shards(root / "shards")
    for name, parts in {"clip": ["text_encoder", "tokenizer"], "t5": ["text_encoder_3", "tokenizer_3"],
                        "cache": ["compensator"], "judge": ["recogniser"], "backbone": ["backbone"]}.items():
        for part in parts:
            source = root / "folder" / part
            shutil.copytree(source if source.exists() else pipeline.TINY / part, root / name / part)
    parallel.save(root / "run", *run_parts(), {"step": 1, "name": "stage 1", "recipe": "{}"})
    (root / "prompts").mkdir()
    for kind, content in PROMPTS.items():
        (root / "prompts" / f"prompts.{kind}").write_text(content)

    def draw(model):
        return pipeline.decode(model, pipeline.generate(model, ["a red circle"], [0]))

    def read(path, place, name):
        models, tokenizers = [encoders.clip_l, encoders.clip_g, encoders.t5], [*encoders.tokenizers]
        models[place], tokenizers[place] = load_encoder(path, name, torch.float32)
        TextEncoders(*models, tokenizers, encoders.context_width)(["a red circle"])

    return {
        "transformer": Input(root / "folder/transformer", lambda path: draw(replace(model, mmdit=load_mmdit(path))), 8),
        "shards": Input(root / "shards", load_mmdit, 5),
        "vae": Input(root / "folder/vae", lambda path: load_vae(path).decode(torch.zeros(1, 16, 2, 2)), 6),
        "clip": Input(root / "clip", lambda path: read(path, 0, "text_encoder"), 8),
        "t5": Input(root / "t5", lambda path: read(path, 2, "text_encoder_3"), 8),
        "folder": Input(root / "folder", lambda path: (draw(pipeline.load_pipeline(path)), weights.identity(path)), 1),
        "file": Input(root / "file", lambda path: draw(pipeline.load_pipeline(path / "sd3.safetensors")), 1),
        "cache": Input(root / "cache", lambda path: cache.load_cache(path, network), 5),
        "backbone": Input(root / "backbone", adversarial.load_backbone, 2),
        "judge": Input(root / "judge", shapes.load_recogniser, 2),
        "run": Input(root / "run", read_run, 6),
        "prompts": Input(root / "prompts", lambda path: [prompts.read_prompts(file) for file in path.iterdir()], 8)}


PROMPTS = {"txt": "a cat\n\na dog\n", "csv": 'id,prompt\n1,"a ""red"" cat"\n2,a dog\n', "tsv": "prompt\tn\na cat\t1\n",
           "jsonl": '{"prompt": "a cat"}\n{"ori_prompt": "a dog"}\n'}


def run_parts():
    """Networks and optimisers of a small run."""
    network = nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    return {"network": network}, {"adamw": optimizer}


def read_run(path):
    if parallel.read_header(path) is not None:
        parallel.load(path, *run_parts(), offload=False)


def write_shards(folder):
    """Two shards and their index in place of a folder's one file."""
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors, listed = weights.load_file(file), {}
    for i in range(2):
        names = sorted(tensors)[i::2]
        weights.write_safetensors(folder / f"part-{i}.safetensors", {name: tensors[name] for name in names})
        listed.update(dict.fromkeys(names, f"part-{i}.safetensors"))
    weights.write_json(folder / f"{file.name}.index.json", {"weight_map": listed})
    file.unlink()


# -------------------------------------------------------------------------------------------------------- damage

WORDS = ["", "x", "0", "nan", "../x", "/etc/passwd", "a\0b", "\ud83d", "é" * 300, "1e999", "[" * 2000, "relu",
         "__init__"]
NUMBERS = [0, 1, -1, 2, 3, 0.5, -0.0, 64, 2**31, 2**63, 10**9, 10**18, 10**400, 1e308, 1e-308, float("nan"),
           float("inf"), float("-inf")]
NESTED = '{"a":' * 50_000
KEYS = ["quantization_config", "auto_map", "use_return_dict", "torch_dtype", "dtype", "_attn_implementation",
        "tokenizer_class", "model_type", "pad_token", "added_tokens_decoder", "shift", "sigmas", "weight_map"]
DTYPES = "F64 F32 F16 BF16 F8_E4M3 F8_E5M2 F8_E8M0 F4 I64 I32 I8 U8 U16 BOOL C64 X".split()


def any_value(rng, depth=0):
    """A JSON value that is probably none that is expected."""
    kind = rng.randrange(8 if depth < 3 else 5)
    if kind < 2:
        return rng.choice(NUMBERS)
    if kind < 4:
        return rng.choice(WORDS)
    if kind == 4:
        return rng.choice([None, True, False])
    values = [any_value(rng, depth + 1) for _ in range(rng.randrange(3))]
    return values if kind < 7 else dict(zip(KEYS, values))


def change_json(rng, value):
    """The value with one node changed, somewhere."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.9:
        value = dict(value) if isinstance(value, dict) else dict(enumerate(value))
        key, how = rng.choice(list(value)), rng.randrange(6)
        if how == 0:
            del value[key]
        elif how == 1 and isinstance(key, str):
            value[rng.choice(KEYS + WORDS + [key + rng.choice(WORDS)])] = any_value(rng)
        else:
            value[key] = change_json(rng, value[key])
        return value if isinstance(key, str) else list(value.values())
    return any_value(rng)


def change_bytes(rng, content):
    """Cut, overwritten, doubled, of another encoding, or something else altogether."""
    at = rng.randrange(len(content) + 1)
    noise = rng.choice([rng.randbytes(rng.randrange(1, 64)), bytes(64), b"\xff\xfe", b'"', b",", b"\n", b"[", b"9"])
    return rng.choice([
        lambda: content[:at], lambda: content[at:], lambda: content[:at] + noise + content[at + len(noise):],
        lambda: content[:at] + noise + content[at:], lambda: content + content, lambda: noise, lambda: b"",
        lambda: content.decode("utf-8", "replace").encode(rng.choice(["utf-16", "utf-16-le", "utf-8-sig"])),
        lambda: NESTED.encode()])()


def change_tensors(rng, content):
    """A safetensors file whose header says something else, or whose tensors are others."""
    length, = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8:8 + length]), bytearray(content[8 + length:])
    notes = header.setdefault("__metadata__", {})
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry, how = header[name], rng.randrange(12)
    begin, end = entry["data_offsets"]

    def put(name, begin, shape):  # as the last tensor
        entry = {"dtype": "F32", "shape": shape, "data_offsets": [begin, begin + 4 * math.prod(shape)]}
        header[name], data[begin:] = entry, bytes(4 * math.prod(shape))

    if how == 0:
        del header[name]  # leaves a hole, which safetensors refuses
    elif how in (1, 2):
        header[rename(rng, name, header)] = header.pop(name)
    elif how == 3:
        entry["dtype"] = rng.choice(DTYPES)
    elif how == 4:
        header[name] = change_json(rng, entry)
    elif how == 5:  # another shape of as many numbers
        entry["shape"] = rng.choice([entry["shape"][::-1], [*entry["shape"], 1], [-1, -1], [10**10, 0], [2**32, 2**32]])
    elif how == 6:  # a dtype of as many bytes
        entry["dtype"], entry["shape"] = "U8", [end - begin]
    elif how == 7:
        data[begin:end] = rng.choice([b"\xff", b"\x7f", b"\0", rng.randbytes(1)]) * (end - begin)
    elif how == 8:
        put(rename(rng, name, header), len(data), [rng.randrange(1, 5)])
    elif how == 9:  # the last one gets another size
        begin, last = max((entry["data_offsets"][0], name) for name, entry in header.items() if "shape" in entry)
        put(last, begin, [rng.randrange(5) for _ in range(rng.randrange(5))])
    else:
        notes[rng.choice([*notes, *KEYS])] = rng.choice([json.dumps(any_value(rng)), rng.choice(WORDS), NESTED])
    text = json.dumps(header).encode()
    length = rng.choice([2**63, 10**9, 0, len(text) - 1]) if rng.random() < 0.03 else len(text)
    return struct.pack("<Q", length) + text + data


def rename(rng, name, header):
    """A name that is new, or in use, or counts on."""
    number = rng.choice(["0", "1", "2", "7", "999999999", "9" * 5000, "-1", "٣", "x"])
    others = [".".join(number if part.isdecimal() and rng.random() < 0.5 else part for part in name.split("."))]
    return rng.choice([*others * 4, name + ".scale_weight", "x", "", name + "x", rng.choice(list(header)), name[:-1]])


def damage(rng, file):
    """Damage a file. Links to it, or from it, stay as they are."""
    content, how = file.read_bytes(), rng.random()
    file.unlink()
    if how < 0.03:
        rng.choice([lambda: None, file.mkdir, lambda: file.symlink_to(file.name), lambda: file.symlink_to(".")])()
    elif how < 0.2:
        file.write_bytes(change_bytes(rng, content))
    elif file.suffix == ".safetensors":
        file.write_bytes(change_tensors(rng, content))
    elif file.suffix in (".json", ".jsonl"):
        lines = content.splitlines() if file.suffix == ".jsonl" else [content]
        lines[0] = json.dumps(change_json(rng, json.loads(lines[0])), ensure_ascii=rng.random() < 0.9).encode(
            "utf-8", "surrogatepass")
        file.write_bytes(b"\n".join(lines))
    else:
        file.write_bytes(change_bytes(rng, content))


# --------------------------------------------------------------------------------------------------------- cases

def case(inputs, seed, root):
    """What is wrong with how the case of this seed ends, as text, or None."""
    rng = random.Random(seed)
    name, = rng.choices(list(inputs), [one.share for one in inputs.values()])
    folder = shutil.copytree(inputs[name].folder, root / "case", copy_function=os.link)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    damaged = sorted({rng.choice(files) for _ in range(rng.choice([1, 1, 1, 2]))})
    for file in damaged:
        damage(rng, file)
    before, wrong = listing(root), None
    try:
        with limits():
            inputs[name].use(folder)
    except UserError as error:
        if "alloc" in str(error) or isinstance(error.__cause__, MemoryError):
            wrong = str(error)
    except (Exception, Hang) as error:
        wrong = "".join(traceback.format_exception(error))
    if listing(root) != before:
        wrong = f"wrote into its folder; {wrong}"
    shutil.rmtree(folder)
    what = ", ".join(str(file.relative_to(folder)) for file in damaged)
    return wrong and f"seed {seed}, {name}, {what}: {wrong}"


class Hang(BaseException):
    """A case took too long."""


@contextmanager
def limits():
    """So many seconds, and so much more memory than there is now."""
    def stop(number, frame):
        raise Hang

    known = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, known[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, known)


def listing(root):
    """What lies below a folder, and since when."""
    return {(path, path.lstat().st_mtime_ns) for path in root.rglob("*")}


def failures(cases, first, root):
    """Run so many cases, from seed `first` on -> the texts of those that end badly."""
    inputs = write_inputs(root / "inputs")
    for one in inputs.values():
        one.use(one.folder)  # in order
    (root / "cases").mkdir()
    return list(filter(None, (case(inputs, seed, root / "cases") for seed in range(first, first + cases))))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = failures(int(sys.argv[1]), int(sys.argv[2]), Path(folder))
    print(*found[:20], f"{len(found)} of {sys.argv[1]} cases end badly", sep="\n\n")
    sys.exit(bool(found))
