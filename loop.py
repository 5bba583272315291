"""What every training loop shares: networks to train, one optimiser step, and a run that is logged, saved and resumed.

    run = Run(args, settings, "stage 1", networks, optimizers, …)  restores the saved state, if there is one
    for step in run.steps():
        …                                                         the iteration: losses, backward, optimizer_step
        run.end_step({"norm": norm}, loss=loss)                   logs, draws sheets, saves
"""

import json
import math
import signal
import time

import torch
from tqdm import tqdm

import parallel
import weights
from commandline import UserError
from lora import add_lora, merge_lora
from mmdit import load_mmdit
from pictures import contact_sheet, write_picture
from pipeline import DTYPES

LOG_EVERY, SHEET_EVERY, SAVE_SECONDS, SHEET_SEEDS = 10, 100, 60, (1, 2)
MOST_SKIPPED = 5    # updates in a row whose gradient is not finite, before the run stops


# ------------------------------------------------------------------------------------------------------- networks

def autocast(args):
    """The context of forward passes: bf16 over fp32 weights, or fp32.

    Autocast's weight cache stays off: it would hold a second copy of each network, and a copy made under no_grad would
    carry no gradient.
    """
    return torch.autocast(args.device.type, torch.bfloat16, enabled=args.dtype == "bf16", cache_enabled=False)


def fast_bf16(device):
    """Whether bf16 is faster than fp32 on a device: on GPUs, and on CPUs with instructions for it."""
    return device.type != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def open_networks(args, path, starts, everywhere=False):
    """-> the frozen transformer of `path`, the networks to train, and the module that holds each one's trained weights.

    Without --lora, all weights except the stored table of positions are trained, in fp32. With it, all share the frozen
    network, `starts` only gives their number, and each has its own adapters (lora.add_lora).
    """
    frozen = frozen_network(args, path)
    if args.lora:
        torch.manual_seed(args.seed)  # for the adapters' initial weights alone
        networks, learned = zip(*(add_lora(frozen, args.lora, everywhere) for _ in starts))
    else:
        networks = learned = [load_mmdit(start, loading_device(args)).train().requires_grad_(True)
                              for start in starts]
        for network in networks:
            network.pos_embed.requires_grad_(False)
            parallel.shard(network, DTYPES[args.dtype], args.device)
    for network in networks:
        network.recompute = args.recompute
    return frozen, networks, learned


def frozen_network(args, path):
    """A transformer that is not trained, in the dtype of the arithmetic (a student with adapters is saved with these
    rounded weights). With --lora, every process holds all of it."""
    dtype = DTYPES[args.dtype]
    if args.lora:
        return load_mmdit(path, args.device, dtype)
    return parallel.shard(load_mmdit(path, loading_device(args), dtype), dtype, args.device)


def loading_device(args):
    """Networks that will be sharded are loaded on the CPU."""
    return args.device if parallel.processes() == 1 else torch.device("cpu")


def whole(network, path):
    """A trained network as one that can be saved: adapters merged, shards put together. All processes must call it.

    path: of a model of the same shape. Only the first process has the result.
    """
    if any(isinstance(p, parallel.DTensor) for p in network.parameters()):
        return parallel.gather(load_mmdit(path) if parallel.is_first() else None, network)
    return merge_lora(network)


def trainable(network):
    return [p for p in network.parameters() if p.requires_grad]


def adamw(rates, betas):
    """AdamW over the trained parameters of (network, learning rate) pairs."""
    groups = [{"params": trainable(network), "lr": lr} for network, lr in rates]
    return torch.optim.AdamW(groups, betas=betas, weight_decay=1e-4, eps=1e-8, fused=True)


def optimizer_step(optimizers, max_norm):
    """One step along the accumulated gradients of all the optimisers, which are then cleared.

    Returns the norm of all gradients together, before it was clipped. If it is not finite, nothing moves.
    """
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    norm = parallel.clip_gradients(parameters, max_norm).item()
    for optimizer in optimizers:
        if math.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad()
    return norm


@torch.no_grad()
def move_average(mean, network, share):
    """Move the trained weights of `mean`, or the two factors of its adapters, this share of the way to `network`."""
    for average, weight in zip(trainable(mean), trainable(network), strict=True):
        average.lerp_(weight, share)


# ------------------------------------------------------------------------------------------------------------ run

def seeded(seed, step):
    """The generator of all randomness in one step. Draw prompts first: train.open_prompts repeats only that draw."""
    return torch.Generator().manual_seed(1_000_003 * seed + step)


class Run:
    """One training run: its complete state is saved and restored, with the settings that decide how it goes.

    Random numbers need no place in the state: those of step i come from a generator seeded by (seed, i), prompts
    included, so that a resumed run draws what it would have drawn.

    args                    of the command line: device, dtype and out
    settings                {name: value}: those that must not change when the run is resumed
    name                    of the run in its log and state
    networks, optimizers    {name: …}, all that is trained
    iterations              how many steps it has in all
    sheet                   None, or a function that returns a contact sheet
    """

    def __init__(self, args, settings, name, networks, optimizers, iterations, sheet=None):
        self.args, self.name, self.networks, self.optimizers = args, name, networks, optimizers
        self.settings, self.iterations, self.sheet, self.step = settings, iterations, sheet, 0
        self.skipped, self.stop, self.values = {}, False, {}
        self.log, self.bar = args.out / "log.jsonl", None
        self.restore()
        self.saved = self.logged = time.monotonic()
        self.logged_step = self.step

    def restore(self):
        """Restore the saved state, if there is one. Raises UserError if it is that of another run."""
        header = parallel.read_header(self.args.out)
        if header is not None and header.get("name") == self.name:
            was = header.get("settings", {})
            changed = [f"{name} was {was.get(name)}, is now {value}" for name, value in self.settings.items()
                       if was.get(name) != value]
            if changed:
                raise UserError(f"{self.args.out}: made with other settings ({'; '.join(changed)}); choose another "
                                "--out")
            parallel.load(self.args.out, self.networks, self.optimizers)
            self.step = header["step"]
        if parallel.is_first() and self.log.exists():  # lines after the saved step will be written again
            lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in lines if line["run"] != self.name or line["step"] <= self.step]
            weights.write_text(self.log, "".join(json.dumps(line) + "\n" for line in kept))

    def steps(self):
        """The numbers of the steps that are left, under a progress bar. Ctrl-C finishes the present step and saves."""
        def ask(*_):
            self.stop = True
            signal.signal(signal.SIGINT, signal.default_int_handler)  # the second one stops at once

        signal.signal(signal.SIGINT, ask)
        self.bar = tqdm(range(self.step, self.iterations), initial=self.step, total=self.iterations, desc=self.name,
                        mininterval=1, disable=not parallel.is_first())
        yield from self.bar
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def end_step(self, norms, **values):
        """Log norms of gradients (numbers) and other values (tensors ()); every so often, and at the end, draw a sheet and
        save. A step whose norms are not finite moved nothing."""
        finite = all(map(math.isfinite, norms.values()))  # the same in all processes
        turn = tuple(norms)  # whose turn it was; its failures in a row count
        self.skipped[turn] = 0 if finite else self.skipped.get(turn, 0) + 1
        for name, value in ({**values, **norms} if finite else {"skipped": 1}).items():
            self.values.setdefault(name, []).append(value)
        if self.skipped[turn] == MOST_SKIPPED:
            raise UserError(f"{self.args.out}: {MOST_SKIPPED} updates in a row had gradients that are not finite, the "
                            f"last in step {self.step + 1}; start again with lower learning rates or with --dtype fp32")
        self.step += 1
        last = self.step == self.iterations
        flags = torch.tensor([float(self.stop), float(time.monotonic() - self.saved > SAVE_SECONDS)])
        parallel.average([flags])  # all processes decide alike
        stopped, late = flags.bool().tolist()
        if self.step % LOG_EVERY == 0 or last or stopped:
            self.write_log()
        if self.sheet and (self.step % SHEET_EVERY == 0 or last):
            with autocast(self.args):
                picture = self.sheet()
            if parallel.is_first():
                write_picture(picture, self.args.out / f"sheet-{self.step:06}.png")
        if last or stopped or late and self.step % LOG_EVERY == 0:
            header = {"name": self.name, "step": self.step, "settings": self.settings}
            parallel.save(self.args.out, self.networks, self.optimizers, header)
            self.saved = time.monotonic()
        if stopped and not last:
            raise KeyboardInterrupt(f"stopped at step {self.step}; continue with --resume")

    def write_log(self):
        """A line of log.jsonl: the mean of each value since the line before, seconds a step and, on a GPU, memory."""
        device, now = self.args.device, time.monotonic()
        means = torch.stack([torch.as_tensor(sum(found) / (1 if name == "skipped" else len(found)),
                                             dtype=torch.float32, device=device) for name, found in self.values.items()])
        parallel.average([means])
        line = dict(zip(self.values, means.tolist()))
        self.bar.set_postfix({name: f"{value:.4g}" for name, value in line.items()}, refresh=False)
        line["seconds"] = (now - self.logged) / (self.step - self.logged_step)
        if device.type == "cuda":
            line["peak GB"] = torch.cuda.max_memory_allocated(device) / 1e9
        if parallel.is_first():
            with open(self.log, "a") as file:
                file.write(json.dumps({"run": self.name, "step": self.step, **line}) + "\n")
        self.values, self.logged, self.logged_step = {}, now, self.step


class Sheet:
    """Contact sheets of the same prompts and seeds each time: one row per prompt, two images of each pipeline."""

    def __init__(self, pipelines, prompts):
        """pipelines: {name: pipeline.Pipeline}; all but the "student" never change and are drawn once."""
        self.pipelines, self.prompts, self.drawn = pipelines, prompts, {}

    def __call__(self):
        prompts, seeds = zip(*((prompt, seed) for prompt in self.prompts for seed in SHEET_SEEDS))
        for name, pipeline in self.pipelines.items():
            if name == "student" or name not in self.drawn:
                self.drawn[name] = pipeline.images(prompts, seeds).unflatten(0, (len(self.prompts), len(SHEET_SEEDS)))
        images = torch.cat(list(self.drawn.values()), dim=1)                            # (rows, columns, 3, H, W)
        headings = [name if j == 0 else "" for name in self.drawn for j in range(len(SHEET_SEEDS))]
        return contact_sheet(images.flatten(0, 1), self.prompts, headings, width=128)
