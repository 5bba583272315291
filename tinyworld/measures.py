"""What a generator's images of the tiny world are worth. The world is finite, so most of it is exact.

Not part of the paper. An image is read by its nearest scene, in the mean square over pixels: one matrix product gives
both its attributes and its distance from anything this world can draw.
"""

import math
from functools import cache
from pathlib import Path

import torch
from tqdm import tqdm

import parallel
import weights
from metrics import frechet_distance, gaussian
from tinyworld import scenes

COMPONENTS = 64     # leading principal components of the 4,800 pictures, for the Fréchet distance
DIGITS = {"evaluations": 2, "adherence": 3, "whole prompt": 3, "coverage": 3, "distance": 4, "median": 4, "90 %": 4,
          "Fréchet": 0, "to reference": 0}
MEANING = """adherence     share of the named attributes that the image has; whole prompt: share of images that have all
coverage      how evenly images fill in what the prompt leaves open; 1 is the truth
distance      from an image to the nearest scene (RMS over pixels, share of the range): mean, median, 90 % of images
Fréchet       distance between the distributions of images and of all scenes; the truth has 0"""


class World:
    """All scenes as one matrix, and their principal components."""

    def __init__(self):
        self.pictures = torch.cat([scenes.render(part).flatten(1) for part in scenes.LABELS.split(480)])  # (4800, P)
        self.squares, self.mean = self.pictures.square().sum(1), self.pictures.mean(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # svd_lowrank starts from random vectors
            self.axes = torch.svd_lowrank(self.pictures - self.mean, COMPONENTS + 32, niter=3)[2][:, :COMPONENTS]
        self.gaussian = gaussian(self.components(self.pictures))

    def components(self, images):
        """images (N, …) -> (N, COMPONENTS)."""
        return (images.flatten(1) - self.mean) @ self.axes

    def nearest(self, images):
        """images (N, 3, 64, 64) in [-1, 1] -> the nearest scene's labels (N, 6), and the distance (N,).

        The distance is the root mean square over pixels, as a share of the range of values.
        """
        x = images.flatten(1)
        index = (self.squares - 2 * x @ self.pictures.T).argmin(1)                      # (N,), out of 4800
        return scenes.LABELS[index], (x - self.pictures[index]).square().mean(1).sqrt() / 2


world = cache(World)  # made once in a process: it takes some seconds and 240 MB


def prompts_to_measure(captions, samples):
    """What `measure` has drawn, the same at every call -> prompts, seeds, the captions' labels and named (N, 6).

    First `captions` random captions, once each; then, for every attribute, `samples` times a prompt that names only it.
    """
    prompts, labels, named = scenes.draw_captions(captions, torch.Generator().manual_seed(20_000))
    seeds = list(range(30_000, 30_000 + captions))
    for name, values in scenes.ATTRIBUTES.items():
        prompts += samples * [scenes.caption_of(**{name: values[0]})]
        seeds += range(40_000, 40_000 + samples)
    return prompts, seeds, labels, named


def measure(draw, captions=256, samples=64, reference=None):
    """Quality measures of a generator -> {measure: value}; MEANING explains them.

    draw(prompts, seeds) -> images (N, 3, 64, 64) in [-1, 1], on the CPU. reference: images of the random captions by
    another generator; adds the Fréchet distance to them, which is the paper's measure if they are the teacher's.
    Standard errors for 1,024 captions: about 0.001 of adherence, 0.003 of the whole prompt at 0.99, 2 % of a distance.
    """
    prompts, seeds, labels, named = prompts_to_measure(captions, samples)
    images = draw(prompts, seeds).float()
    with torch.autocast("cpu", enabled=False):  # images may be drawn in bf16, but are always read in fp32
        seen, distance = world().nearest(images)
        own = gaussian(world().components(images[:captions]))
        right, distance = (seen[:captions] == labels) | ~named, distance[:captions]
        of_prompts = seen[captions:].unflatten(0, (len(scenes.NAMES), samples))         # (6, S, 6)
        spread = [entropy(of_prompts[prompt, :, i], scenes.CHOICES[i]) for i in range(len(scenes.NAMES))
                  for prompt in range(len(scenes.NAMES)) if prompt != i]  # of what the prompt leaves open
        found = {"adherence": ((right & named).sum() / named.sum()).item(),
                 "whole prompt": right.all(1).float().mean().item(), "coverage": sum(spread) / len(spread),
                 "distance": distance.mean().item(), "median": distance.median().item(),
                 "90 %": distance.quantile(0.9).item(), "Fréchet": frechet_distance(own, world().gaussian)}
        if reference is not None:
            found["to reference"] = frechet_distance(own, gaussian(world().components(reference)))
    return found


def entropy(values, choices):
    """Normalised entropy of values (N,) int64 out of `choices` possible ones: 1 if uniform, 0 if always the same.

    It has the correction (K' - 1) / 2N for the bias of the plug-in entropy, K' values seen (Miller 1955), so that a
    uniform sampler scores 1 on average, and at times a little more.
    """
    counts = torch.bincount(values, minlength=choices).double()
    plug_in = torch.special.entr(counts / len(values)).sum()
    return (plug_in + (counts.count_nonzero() - 1) / (2 * len(values))).item() / math.log(choices)


# ------------------------------------------------------------------------------------------------ of models on disk

def is_tiny_world(model):
    """Whether a model is a teacher of the tiny world: Stage 0 leaves its measures in its folder."""
    return (Path(model) / "measures.json").exists()


def write(folder, pipelines, beside):
    """Measure pipelines, {name: Pipeline}, write metrics.json and print it below the measures of the model `beside`.

    All processes must call it: a sharded network needs all of them to run.
    """
    found = {name: measure(pipeline.images) for name, pipeline in tqdm(pipelines.items(), desc="measuring",
                                                                       disable=not parallel.is_first())}
    if parallel.is_first():
        weights.write_json(folder / "metrics.json", found)
        print(table({**weights.read_json(Path(beside) / "measures.json"), **found}), MEANING, sep="\n\n")


def table(measured):
    """{name: {measure: value}} as Markdown."""
    columns = [name for name in DIGITS if any(name in row for row in measured.values())]
    lines = [f"| | {' | '.join(columns)} |", "|" + "---|" * (1 + len(columns))]
    for name, row in measured.items():
        cells = " | ".join(f"{row[column]:.{DIGITS[column]}f}" if column in row else "" for column in columns)
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)
