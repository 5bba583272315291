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
    seen = shapes.look(recogniser, shapes.render(labels, jitter))[1]
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
CLEAN = ("fidelity", "clean")
PRECISION, RECALL, DIVERSITY = (("distribution", name) for name in ("precision", "recall", "diversity"))
FAULTS = {  # kind of generator: what it scores in the measures that must find its fault
    "perfect": {ADHERENCE: 1, COVERAGE: 1, PRECISION: 1, RECALL: 1, DIVERSITY: 1, ("fidelity", "mean"): 0, CLEAN: 1},
    "ignores the prompt": {ADHERENCE: CHANCE, ("adherence", "colour"): 1 / 6},
    "the same picture for a prompt": {COVERAGE: 0, DIVERSITY: 0},
    "always one picture": {ADHERENCE: CHANCE, COVERAGE: 0, RECALL: 0, DIVERSITY: 0},
    "noise": {PRECISION: 0, CLEAN: 0},
    "moved": {},
}


@pytest.mark.parametrize("kind", FAULTS)
def test_each_measure_finds_the_fault_that_it_is_for(kind, recogniser, monkeypatch):
    monkeypatch.setattr(shapes, "GRIDS", ((1.0, 2),))  # a coarse fit is enough here
    measured = shapes.measure(draw_with_fault(kind), recogniser, captions=300, samples=64, renders=1024, draws=10)
    for (what, name), value in FAULTS[kind].items():
        found, error = measured[what][name]
        assert found == pytest.approx(value, abs=0.06), (what, name)
        assert error < 0.06
    distance = measured["distribution"]["Fréchet distance"][0]
    assert distance < 50 if kind in ("perfect", "ignores the prompt") else distance > 200


def draw_with_fault(kind):
    def draw(prompts, seeds):
        told = kind not in ("ignores the prompt", "always one picture")
        labels, jitter = shapes.true_scenes(prompts if told else [""] * len(prompts), [2**40 + seed for seed in seeds])
        if kind == "the same picture for a prompt":
            labels, jitter = shapes.true_scenes(prompts, [0] * len(prompts))
        if kind == "always one picture":
            labels, jitter = torch.zeros_like(labels), torch.zeros_like(jitter)
        images = shapes.render(labels, jitter)
        if kind == "noise":
            images = 2 * torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) - 1
        return images.roll(4, dims=3) if kind == "moved" else images

    return draw


def test_true_scenes_are_what_the_captions_say_and_uniform_in_the_rest():
    prompts, named_labels, named = shapes.draw_captions(600, torch.Generator().manual_seed(5))
    labels, _ = shapes.true_scenes(prompts, range(600))
    assert torch.equal(labels[named], named_labels[named])
    for i, k in enumerate(shapes.CHOICES):
        assert metrics.entropy(labels[~named[:, i], i], k) > 0.98


# ------------------------------------------------------------------------------------------------- detail

def test_fitting_finds_a_known_scene_to_a_tenth_of_a_pixel_and_tells_its_distance():
    labels, jitter = scenes(64, seed=7)
    labels[:32, shapes.NAMES.index("shape")] = 2  # triangles are the hardest: moved down or grown, they look alike
    images = shapes.render(labels, jitter)
    distance, found = shapes.nearest_scene(images, labels)
    assert ((found - jitter) * shapes.JITTER).abs().max() < 0.1 and distance.max() < 0.005
    noise = 0.2 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    distance, found = shapes.nearest_scene(images + noise, labels)
    assert distance.mean().item() == pytest.approx(0.1, rel=0.05)  # of a range of 2


def blurred(images, share=1.0):
    kernel = torch.tensor([1.0, 2, 1]) / 4
    soft = torch.nn.functional.conv2d(images.flatten(0, 1)[:, None], (kernel[:, None] * kernel)[None, None], padding=1)
    return images + share * (soft.view_as(images) - images)


def warped(images, pixels):
    """Rows shifted to and fro, as a wobbly outline is."""
    shift = (pixels * torch.sin(torch.arange(64) / 5)).round().long()
    columns = (torch.arange(64)[None] + shift[:, None]).clamp(0, 63)
    return images.gather(3, columns.expand(len(images), 3, 64, 64))


def spotted(images, count):
    images, generator = images.clone(), torch.Generator().manual_seed(0)
    for x, y in torch.randint(60, (count, 2), generator=generator).tolist():
        images[:, :, y:y + 3, x:x + 3] *= -1
    return images


def without_texture(images, share):
    labels, jitter = scenes(len(images), seed=7)
    labels[:, shapes.NAMES.index("texture")] = 0
    return images + share * (shapes.render(labels, jitter) - images)


@pytest.mark.parametrize("fault, strengths", [
    (blurred, (0.3, 0.6, 1.0)), (warped, (0.6, 1.5, 3)), (spotted, (2, 8, 30)), (without_texture, (0.2, 0.5, 1.0))],
    ids=["blur", "warp", "spots", "missing texture"])
def test_each_fault_of_detail_raises_the_distance_in_the_order_of_its_strength(fault, strengths):
    labels, jitter = scenes(48, seed=7)
    images = shapes.render(labels, jitter)
    distances = [shapes.nearest_scene(images, labels)[0].mean().item()]
    distances += [shapes.nearest_scene(fault(images, strength), labels)[0].mean().item() for strength in strengths]
    assert all(stronger > 1.2 * weaker + 0.002 for weaker, stronger in zip(distances, distances[1:])), distances


def test_blur_lowers_the_top_octave_most_and_noise_raises_it():
    images = shapes.render(*scenes(64))
    power = shapes.octave_power(images).mean(0)
    soft = 10 * (shapes.octave_power(blurred(images)).mean(0) / power).log10()
    assert soft[1] < 2 * soft[0] < -1
    noisy = images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    assert (shapes.octave_power(noisy).mean(0) > power).all()


def test_a_pure_wave_has_its_power_in_its_own_octave():
    x = torch.arange(64) / 64
    for cycles, octave in ((12, 0), (20, 1)):
        power = shapes.octave_power(torch.sin(2 * torch.pi * cycles * x).expand(1, 3, 64, 64))[0]
        assert power[octave] > 1000 * power[1 - octave]


def test_images_drawn_in_bf16_are_measured_in_fp32(recogniser):
    draw, sizes = draw_with_fault("perfect"), {"captions": 30, "samples": 4, "renders": 64, "draws": 2}
    expected = shapes.measure(draw, recogniser, **sizes)
    shapes.look_at_truth.cache_clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert shapes.measure(draw, recogniser, **sizes) == expected
