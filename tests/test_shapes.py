"""The tiny world and what measures it. Each measure must be able to fail."""

import pytest
import torch

import metrics
import sample
import shapes


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
    assert (shapes.caption_of(size="large", texture="striped", colour="red", shape="circle", position="left", background="gray")
            == "a large striped red circle on the left of a gray background")
    captions, labels, named = shapes.draw_captions(300, torch.Generator().manual_seed(0))
    for text, row, told in zip(captions, labels, named):
        words = text.split()
        for i, (name, values) in enumerate(shapes.ATTRIBUTES.items()):
            assert [value for value in values if value in words] == ([values[row[i]]] if told[i] else [])


def test_recogniser_reads_every_attribute_of_fresh_renders():
    labels, jitter = scenes(500, seed=123)
    seen = shapes.recognise(shapes.load_recogniser(sample.TINY), shapes.render(labels, jitter))
    assert ((seen == labels).float().mean(0) >= 0.98).all()


def test_adherence_counts_only_what_the_prompt_names():
    labels, named = torch.zeros(2, 6, dtype=torch.int64), torch.ones(2, 6, dtype=torch.bool)
    seen = labels.clone()
    seen[0, :3] = 1
    named[0, 0] = False
    assert shapes.adherence(seen, labels, named).tolist() == [1, 0.5, 0.5, 1, 1, 1]


PERFECT = {("adherence", "mean"): 1, ("coverage", "mean"): 1, ("total variation", "mean"): 0, ("distribution", "precision"): 1,
           ("distribution", "recall"): 1, ("distribution", "diversity"): 1}
FAULTS = {  # kind of generator: what it scores in the measures that must find its fault
    "perfect": {},
    "ignores the prompt": {("adherence", "mean"): sum(1 / k for k in shapes.CHOICES) / 6, ("adherence", "colour"): 1 / 6},
    "the same picture for a prompt": {
        ("coverage", "mean"): 0, ("total variation", "mean"): sum(1 - 1 / k for k in shapes.CHOICES) / 6,
        ("distribution", "diversity"): 0},
    "always one picture": {
        ("adherence", "mean"): sum(1 / k for k in shapes.CHOICES) / 6, ("coverage", "mean"): 0,
        ("total variation", "mean"): sum(1 - 1 / k for k in shapes.CHOICES) / 6, ("distribution", "recall"): 0,
        ("distribution", "diversity"): 0},
    "noise": {("distribution", "precision"): 0},
    "moved": {},
}


@pytest.mark.parametrize("kind", FAULTS)
def test_each_measure_finds_the_fault_that_it_is_for(kind):
    recogniser = shapes.load_recogniser(sample.TINY)
    words = {word: (i, j) for i, values in enumerate(shapes.ATTRIBUTES.values()) for j, word in enumerate(values)}

    def draw(prompts, seeds):
        labels, jitter = scenes(len(prompts), seed=sum(seeds))
        if kind == "always one picture" or kind == "the same picture for a prompt":
            labels, jitter = torch.zeros_like(labels), torch.zeros_like(jitter)
        for row, prompt in zip(labels, prompts):
            for i, j in (words[word] for word in prompt.split() if word in words):
                if kind not in ("ignores the prompt", "always one picture"):
                    row[i] = j
        images = shapes.render(labels, jitter)
        if kind == "noise":
            images = 2 * torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) - 1
        return images.roll(4, dims=3) if kind == "moved" else images

    measured = shapes.measure(draw, recogniser, captions=512, samples=64, draws=20)
    for (what, name), value in {**PERFECT, **FAULTS[kind]}.items():
        found, error = measured[what][name]
        if (what, name) in FAULTS[kind]:
            assert found == pytest.approx(value, abs=0.08), (what, name)
        elif kind == "perfect":
            assert found == pytest.approx(value, abs=0.10 if what == "total variation" else 0.05), (what, name)
            assert error < 0.03
    distance, placed = measured["distribution"]["Fréchet distance"][0], measured["placement"]["position"][0]
    assert distance < 40 if kind in ("perfect", "ignores the prompt") else distance > 200
    if kind in ("perfect", "ignores the prompt", "moved"):
        assert placed == pytest.approx(2 if kind == "moved" else 0, abs=1)  # 4 pixels to the right: 2 in the mean of x and y


def test_placement_is_read_off_the_picture():
    labels = torch.tensor([[1, 0, 0, 1, 4, 1], [0, 0, 0, 1, 4, 1]])  # squares in the center, large and small, on gray
    x, y, size = shapes.object_placement(shapes.render(labels, torch.zeros(2, 3)), labels).T
    assert x == pytest.approx([32, 32], abs=0.5) and y == pytest.approx([32, 32], abs=0.5) and size[0] > 1.3 * size[1] > 13
