"""The tiny world and what measures it. Each measure must be able to fail."""

import pytest
import torch

import metrics
import shapes
from pipeline import TINY


@pytest.fixture(scope="module")
def recogniser():
    return shapes.load_recogniser(TINY)


def scenes(n=200, seed=0):
    return shapes.draw_scenes(n, torch.Generator().manual_seed(seed))


def test_every_attribute_is_uniform():
    labels, jitter = scenes(20_000)
    for i, k in enumerate(shapes.CHOICES):
        assert metrics.entropy(labels[:, i], k) == pytest.approx(1, abs=1e-3)
        assert labels[:, i].max() == k - 1
    assert jitter.abs().max() <= 1


def test_each_attribute_changes_the_picture_and_objects_stay_inside():
    labels, jitter = scenes(1)
    images = shapes.render(labels, jitter)
    assert images.shape == (1, 3, 64, 64) and images.abs().max() <= 1
    for i, k in enumerate(shapes.CHOICES):
        other = labels.clone()
        other[:, i] = (labels[:, i] + 1) % k
        assert (shapes.render(other, jitter) - images).abs().amax() > 0.2, shapes.NAMES[i]
    labels, jitter = scenes(500)
    edge = shapes.render(labels, jitter)[:, :, [0, -1], :]
    assert (edge != edge[..., :1]).float().mean() < 0.005  # background, but for the tips of a few large diamonds


def test_captions_say_what_is_named_and_nothing_else():
    assert shapes.caption_of(shape="circle") == "a circle"
    assert shapes.caption_of(colour="red", background="gray") == "a red shape on a gray background"
    everything = {"size": "large", "texture": "striped", "colour": "red", "shape": "circle", "position": "left",
                  "background": "gray"}
    assert shapes.caption_of(**everything) == "a large striped red circle on the left of a gray background"
    captions, labels, named = shapes.draw_captions(300, torch.Generator().manual_seed(0))
    for text, row, told in zip(captions, labels, named):
        words = text.split()
        for i, (name, values) in enumerate(shapes.ATTRIBUTES.items()):
            assert [value for value in values if value in words] == ([values[row[i]]] if told[i] else [])


def test_recogniser_reads_every_attribute_of_fresh_renders(recogniser):
    labels, jitter = scenes(500, seed=123)
    seen = shapes.recognise(recogniser, shapes.render(labels, jitter))
    assert ((seen == labels).float().mean(0) >= 0.98).all()


def test_adherence_counts_only_what_the_prompt_names():
    labels, named = torch.zeros(2, 6, dtype=torch.int64), torch.ones(2, 6, dtype=torch.bool)
    seen = labels.clone()
    seen[0, :3] = 1
    named[0, 0] = False
    assert shapes.adherence(seen, labels, named).tolist() == [1, 0.5, 0.5, 1, 1, 1]


# -------------------------------------------------------------------------------------------- measures and their faults

CHANCE = sum(1 / k for k in shapes.CHOICES) / 6
ADHERENCE, COVERAGE = ("adherence", "mean"), ("coverage", "mean")
PRECISION, RECALL, DIVERSITY = (("distribution", name) for name in ("precision", "recall", "diversity"))
FAULTS = {  # kind of generator: what it scores in the measures that must find its fault
    "perfect": {ADHERENCE: 1, COVERAGE: 1, PRECISION: 1, RECALL: 1, DIVERSITY: 1},
    "ignores the prompt": {ADHERENCE: CHANCE, ("adherence", "colour"): 1 / 6},
    "the same picture for a prompt": {COVERAGE: 0, DIVERSITY: 0},
    "always one picture": {ADHERENCE: CHANCE, COVERAGE: 0, RECALL: 0, DIVERSITY: 0},
    "noise": {PRECISION: 0},
    "moved": {},
}


@pytest.mark.parametrize("kind", FAULTS)
def test_each_measure_finds_the_fault_that_it_is_for(kind, recogniser):
    measured = shapes.measure(draw_with_fault(kind), recogniser, captions=300, samples=64, renders=1024, draws=10)
    for (what, name), value in FAULTS[kind].items():
        found, error = measured[what][name]
        assert found == pytest.approx(value, abs=0.06), (what, name)
        assert error < 0.06
    distance = measured["distribution"]["Fréchet distance"][0]
    assert distance < 50 if kind in ("perfect", "ignores the prompt") else distance > 200


def draw_with_fault(kind):
    words = {word: (i, j) for i, values in enumerate(shapes.ATTRIBUTES.values()) for j, word in enumerate(values)}

    def draw(prompts, seeds):
        labels, jitter = scenes(len(prompts), seed=sum(seeds))
        if kind in ("always one picture", "the same picture for a prompt"):
            labels, jitter = torch.zeros_like(labels), torch.zeros_like(jitter)
        if kind not in ("ignores the prompt", "always one picture"):
            for row, prompt in zip(labels, prompts):
                for i, j in (words[word] for word in prompt.split() if word in words):
                    row[i] = j
        images = shapes.render(labels, jitter)
        if kind == "noise":
            images = 2 * torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) - 1
        return images.roll(4, dims=3) if kind == "moved" else images

    return draw


def test_images_drawn_in_bf16_are_measured_in_fp32(recogniser):
    draw, sizes = draw_with_fault("perfect"), {"captions": 30, "samples": 4, "renders": 64, "draws": 2}
    expected = shapes.measure(draw, recogniser, **sizes)
    shapes.look_at_truth.cache_clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert shapes.measure(draw, recogniser, **sizes) == expected
