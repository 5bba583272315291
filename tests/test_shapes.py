"""The tiny world and what measures it. Each measure must be able to fail."""

import math

import pytest
import torch

import sample
import shapes


def scenes(n=200, seed=0):
    return shapes.draw_scenes(n, torch.Generator().manual_seed(seed))


def test_every_attribute_is_uniform():
    labels, jitter = scenes(20_000)
    for i, k in enumerate(shapes.CHOICES):
        assert shapes.coverage(labels[:, i], i) == pytest.approx(1, abs=1e-3)
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


def test_coverage_is_zero_for_one_value_and_one_for_a_fair_sampler():
    assert shapes.coverage(torch.full((64,), 2), attribute=1) == 0
    assert shapes.coverage(torch.arange(400) % 4, attribute=1) == pytest.approx(1, abs=0.01)
    assert shapes.coverage(torch.arange(400) % 2, attribute=1) == pytest.approx(0.5, abs=0.01)  # two of four values
    generator = torch.Generator().manual_seed(0)
    small = [shapes.coverage(torch.randint(4, (64,), generator=generator), 1) for _ in range(200)]
    assert sum(small) / 200 == pytest.approx(1, abs=0.003)  # without the correction for small samples, 0.983


@pytest.mark.parametrize("kind, low", [("ignores the prompt", "adherence"), ("always the same", "coverage"), ("perfect", None)])
def test_measure_tells_a_bad_generator_from_a_perfect_one(kind, low):
    recogniser = shapes.load_recogniser(sample.TINY)
    words = {word: (i, j) for i, values in enumerate(shapes.ATTRIBUTES.values()) for j, word in enumerate(values)}

    def draw(prompts, seeds):
        labels, jitter = scenes(len(prompts), seed=sum(seeds))
        if kind == "always the same":
            labels = torch.zeros_like(labels)
        for row, prompt in zip(labels, prompts):
            for i, j in (words[word] for word in prompt.split() if word in words and kind != "ignores the prompt"):
                row[i] = j
        return shapes.render(labels, jitter)

    measured = shapes.measure(draw, recogniser)
    for what in ("adherence", "coverage"):
        mean = measured[what]["mean"]
        assert mean < 0.5 if what == low else mean > 0.97
    if kind == "ignores the prompt":
        assert measured["adherence"]["colour"] == pytest.approx(1 / 6, abs=0.1)


def test_entropy_is_normalised_by_each_attributes_own_number_of_values():
    assert shapes.CHOICES == (2, 4, 6, 5, 5, 4)
    half = torch.arange(1000) % 2
    for i, k in enumerate(shapes.CHOICES):
        assert shapes.coverage(half, i) == pytest.approx(math.log(2) / math.log(k), abs=0.01)
