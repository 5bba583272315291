"""What a training run shows of itself: a log, contact sheets and, in the tiny world, a table of measures."""

import json
import time
from typing import NamedTuple

import torch
from tqdm import tqdm

import metrics
import parallel
import shapes
import weights
from pictures import contact_sheet
from pipeline import decode
from vae import VAE


class Log:
    """log.jsonl: the mean of each value since the line before, seconds an iteration and, on a GPU, peak memory."""

    def __init__(self, folder, run, step):
        """run, step: its name, and where it goes on. Lines of what is done again go, and so does one cut short."""
        self.file, self.run, self.sums, self.counts = folder / "log.jsonl", run, {}, {}
        self.step, self.start = step, time.monotonic()
        if parallel.is_first():
            lines = self.file.read_text().splitlines() if self.file.exists() else []
            entries = [entry for entry in map(read_line, lines) if entry]
            kept = [entry for entry in entries if entry["run"] != run or entry["step"] <= step]
            weights.write_text(self.file, "".join(json.dumps(entry) + "\n" for entry in kept))

    def add(self, values):
        """values: {name: number or tensor ()}, of one iteration; the names may change. No tensor is read back."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def skip(self):
        """One iteration left nothing to log."""
        self.sums["skipped"], self.counts["skipped"] = self.sums.get("skipped", 0) + 1, 1

    def write(self, step, device):
        """Write the line of `step`; returns its values."""
        names = list(self.sums)
        means = torch.stack([torch.as_tensor(self.sums[name] / self.counts[name], device=device) for name in names])
        parallel.average([means])
        values = dict(zip(names, means.tolist()))
        cost = {"seconds": (time.monotonic() - self.start) / (step - self.step)}
        if device.type == "cuda":
            cost["peak GB"] = torch.cuda.max_memory_allocated(device) / 1e9
        if parallel.is_first():
            with weights.disk_errors(self.file), open(self.file, "a") as file:
                file.write(json.dumps({"run": self.run, "step": step, **values, **cost}) + "\n")
        self.sums, self.counts, self.step, self.start = {}, {}, step, time.monotonic()
        return values


def read_line(line):
    """An entry of the log, or None for a line that was cut short."""
    try:
        return json.loads(line)
    except ValueError:
        return None


class Sheet:
    """Contact sheets of the same prompts and seeds each time: a row a prompt, two images of each sampler."""

    def __init__(self, samplers, prompts, seeds=(1, 2)):
        """samplers: {name: pipeline.Sampler}; all but the "student" never change and are drawn once."""
        self.samplers, self.prompts, self.seeds, self.drawn = samplers, prompts, seeds, {}

    def __call__(self):
        prompts, seeds = zip(*((prompt, seed) for prompt in self.prompts for seed in self.seeds))
        for name, sampler in self.samplers.items():
            if name == "student" or name not in self.drawn:
                self.drawn[name] = sampler.images(prompts, seeds).unflatten(0, (len(self.prompts), len(self.seeds)))
        images = torch.cat(list(self.drawn.values()), dim=1)                            # (rows, columns, 3, H, W)
        headings = [name if j == 0 else "" for name in self.drawn for j in range(len(self.seeds))]
        return contact_sheet(images.flatten(0, 1), self.prompts, headings)


# ------------------------------------------------------------------------------------------------------- measures

AUTOENCODER = "true scenes, autoencoded"


class Reconstruction(NamedTuple):
    """A sampler that draws true scenes and sends them through an autoencoder: the floor of what a model can reach."""

    vae: VAE
    folder: str = None

    def key(self):
        return "autoencoder"

    def images(self, prompts, seeds):
        return decode(self, shapes.true_latents(self.vae, prompts, seeds))


def measure(samplers, model, teacher, quiet=False):
    """shapes.measure of each sampler, and first of the autoencoder alone. teacher: as there, or None.

    The recogniser is that of the tiny SD3 `model`. What a model carries in its measures.json is not measured again.
    """
    recogniser, measured = shapes.load_recogniser(model), {}
    floor = Reconstruction(next(iter(samplers.values())).pipeline.vae, model)
    for name, sampler in tqdm({AUTOENCODER: floor, **samplers}.items(), desc="measuring", disable=quiet):
        known = known_measures(sampler.folder, model) if sampler.folder else {}
        measured[name] = known.get(sampler.key()) or shapes.measure(sampler.images, recogniser, teacher=teacher)
    return measured


def write_metrics(folder, samplers, model):
    """Measure the samplers, write it all beside the student and show the most of it. All processes must call it."""
    measured = measure(samplers, model, known_teacher(model), quiet=not parallel.is_first())
    if parallel.is_first():
        weights.write_json(folder / "metrics.json", measured)
        write_measures({samplers["student"].key(): measured["student"]}, folder, model)
        print(table(measured))


def known_measures(folder, teacher):
    """{Sampler.key: measures} of a model, from its own folder; empty where it or its teacher were changed since."""
    file = shapes.measures_file(folder)
    known = weights.read_json(file) if file.exists() else {}
    return known.get("measures", {}) if known.get("models") == identities(folder, teacher) else {}


def write_measures(measures, folder, teacher):
    """Keep what a model scores, {Sampler.key: measures}, in its folder, for `measure` to find again."""
    weights.write_json(shapes.measures_file(folder), {"models": identities(folder, teacher), "measures": measures})


def identities(*models):
    return [weights.identity(model) for model in models]


def look_at_teacher(sampler, recogniser, captions=1024):
    """metrics.gaussian of a teacher's samples, of other captions and seeds than those of shapes.measure."""
    prompts, _, _ = shapes.draw_captions(captions, torch.Generator().manual_seed(60_000))
    images = sampler.images(prompts, range(60_000, 60_000 + captions))
    with torch.autocast("cpu", enabled=False):
        return metrics.gaussian(shapes.look(recogniser, images)[0])


def write_teacher(teacher, model):
    """Keep what look_at_teacher found beside a model's files, for known_teacher to find again."""
    weights.write_safetensors(shapes.teacher_file(model), dict(zip(("mean", "covariance"), teacher)),
                              {"model": weights.identity(model)})


def known_teacher(model):
    """What write_teacher kept, (mean, covariance); None where there is none, or the files were changed since."""
    if not shapes.teacher_file(model).exists():
        return None
    with weights.open_safetensors(shapes.teacher_file(model)) as file:
        if file.metadata()["model"] == weights.identity(model):
            return file.get_tensor("mean"), file.get_tensor("covariance")


def table(measured):
    """What is shown on the screen of {sampler: measures}."""
    lines = []
    for group in next(iter(measured.values())):
        lines += ["", f"{group:28}" + "".join(f"{name:>17}" for name in next(iter(measured.values()))[group])]
        lines += [f"{name:28}" + "".join(f"{value:17.3f}" for value, _ in measures[group].values())
                  for name, measures in measured.items()]
    return "\n".join(lines)
