"""Stage II: turns, gradients, losses and the discriminator of Sec. 3.3, against numbers worked out another way."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ConvNextConfig, ConvNextModel

import adversarial
import cache
import flow
import pipeline
from commandline import UserError
from mmdit import Residual
from test_cache import random_inputs, random_network


@pytest.mark.parametrize("warmup, ratio, expected", [(50, 2, [50, 53, 56, 59]), (0, 0, [0, 1, 2])])
def test_the_discriminator_warms_up_alone_and_then_has_its_turns_between_the_generators(warmup, ratio, expected):
    turns = [adversarial.generator_turn(update, warmup, ratio) for update in range(expected[-1] + 1)]
    assert [update for update, turn in enumerate(turns) if turn is not None] == expected
    assert [turn for turn in turns if turn is not None] == list(range(len(expected)))


# ------------------------------------------------------------------------------------------ the student's sampling

def student_and_cache(blocks):
    """A student and a cache to train, with an f that is not the identity, and what they sample from."""
    student, used = random_network().requires_grad_(True), cache.new_cache(blocks, 128) if blocks else None
    student.pos_embed.requires_grad_(False)
    for mlp in (used.compensator.image, used.compensator.text) if used else ():
        torch.nn.init.normal_(mlp.fc2.weight, std=0.1)
    noise, _, *cond = random_inputs()
    return student, used, noise, cond


def gradients(loss, *modules):
    """Of all trained parameters, as "MODULE.NAME", None where the loss does not depend on one. Modules are numbered."""
    names, parameters = zip(*((f"{i}.{name}", p) for i, module in enumerate(modules)
                              for name, p in module.named_parameters() if p.requires_grad))
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True)))


@torch.no_grad()
def test_training_draws_exactly_what_sampling_draws():
    (student, used, noise, cond), nodes = student_and_cache((1, 3)), flow.student_sigmas(4, 3.0)
    x, later_steps = adversarial.refine(student, used, noise, nodes, cond)
    assert torch.equal(x, flow.sample(cache.CachedSteps(student, used), noise, nodes, cond)) and later_steps == []


@pytest.mark.parametrize("blocks", [(1, 3), None], ids=str)
def test_f_and_the_shared_blocks_learn_from_all_steps_but_the_first_and_cached_blocks_do_not(blocks):
    student, used, noise, cond = student_and_cache(blocks)
    with_gradient = []
    student.register_forward_hook(lambda *_: with_gradient.append(torch.is_grad_enabled()))
    x, _ = adversarial.refine(student, used, noise, flow.student_sigmas(4, 3.0), cond)
    assert with_gradient == [False, True, True, True]
    found = gradients(x.square().mean(), student, *([used.compensator] if used else []))
    cached = range(blocks[0], blocks[1] + 1) if blocks else ()
    assert {name for name, gradient in found.items() if gradient is None} == \
        {name for name in found if any(name.startswith(f"0.joint_blocks.{i}.") for i in cached)}


@pytest.mark.parametrize("first_step, recompute", [(False, False), (False, True), (True, False)])
def test_the_gradient_is_that_of_the_second_step_or_of_both_and_recomputation_does_not_change_it(first_step, recompute):
    student, used, noise, cond = student_and_cache((1, 3))
    nodes, first = flow.student_sigmas(2, 3.0), Residual((1, 3))
    with torch.set_grad_enabled(first_step):
        state = flow.euler_step(noise, student(noise, nodes[0].expand(2), *cond, first), *nodes[:2])
    second = Residual((1, 3), used.compensator(*first.streams))
    by_hand = flow.euler_step(state, student(state, nodes[1].expand(2), *cond, second), *nodes[1:])
    expected = gradients(by_hand.square().mean(), student, used.compensator)
    runs = []
    student.joint_blocks[5].x_block.mlp.register_forward_hook(lambda *_: runs.append(1))
    student.recompute = recompute
    x, _ = adversarial.refine(student, used, noise, nodes, cond, first_step=first_step)
    found = gradients(x.square().mean(), student, used.compensator)
    assert len(runs) == 2 + recompute  # without a gradient the first step is not run again
    for name, gradient in expected.items():
        assert gradient is None and found[name] is None or torch.allclose(found[name], gradient, atol=1e-6), name
    assert (found["0.joint_blocks.2.x_block.attn.proj.weight"] is not None) == first_step  # of a cached block


@torch.no_grad()
def test_a_redrawn_image_is_the_students_noised_to_the_middle_of_the_references_steps():
    teacher = pipeline.load_pipeline(pipeline.TINY)
    student, reference = teacher.sampled_with(2, 1.0), teacher.sampled_with(4, 3.0)
    noise, cond, uncond = torch.randn(2, *teacher.latent_shape()), teacher.text(["a circle", "a cross"]), teacher.text([""])
    _, _, middle, late, end = reference.sigmas
    x = (1 - middle) * student.sample(noise, cond) + middle * noise
    by_hand = flow.sample(teacher.mmdit, x, torch.stack([middle, late, end]), cond, uncond, 3.0)
    found = replace(reference, redraws=student).sample(noise, cond, uncond)
    torch.testing.assert_close(found, by_hand)
    assert not torch.allclose(found, reference.sample(noise, cond, uncond), atol=0.1)


# ------------------------------------------------------------------------------------------------- distillation

def test_each_later_step_is_compared_with_the_whole_of_the_students_own_from_the_same_state():
    (student, used, noise, cond), nodes = student_and_cache((1, 3)), flow.student_sigmas(4, 3.0)
    _, later_steps = adversarial.refine(student, used, noise, nodes, cond, distil=True)
    for k, step in zip((1, 2, 3), later_steps, strict=True):
        full = Residual((1, 3))
        with torch.no_grad():
            state = flow.sample(cache.CachedSteps(student, used), noise, nodes[:k + 1], cond)
            velocity = student(state, nodes[k].expand(2), *cond, full)
        for found, expected in zip((step.full_velocity, *step.full_residual), (velocity, *full.streams), strict=True):
            assert torch.allclose(found, expected, atol=1e-5) and not found.requires_grad


@pytest.mark.parametrize("distillation, learners", [("feature", {"1"}), ("output", {"0", "1"})])
def test_feature_distillation_trains_f_alone_and_output_distillation_the_student_as_well(distillation, learners):
    student, used, noise, cond = student_and_cache((1, 3))
    _, later_steps = adversarial.refine(student, used, noise, flow.student_sigmas(4, 3.0), cond, distil=True)
    found = gradients(getattr(adversarial, f"{distillation}_distillation")(later_steps), student, used.compensator)
    learned = {name[0] for name, gradient in found.items() if gradient is not None}
    assert learned == learners


def test_distillation_terms_are_mean_squares_over_steps_summed_over_streams():
    one, two, full = torch.ones(2, 3, 4), torch.full((2, 5, 4), 2.0), torch.ones(2, 1, 2, 2)
    step = adversarial.LaterStep(3 * full, (one, two), full, (2 * one, 2.5 * two))
    other = step._replace(velocity=2 * full, correction=(one, 2.5 * two))
    assert adversarial.output_distillation([step, other]).item() == pytest.approx((4 + 1) / 2)
    assert adversarial.feature_distillation([step, other]).item() == pytest.approx((1 + 9 + 1) / 2)


# ---------------------------------------------------------------------------------------------------------- losses

def bce(logit, label):
    p = 1 / (1 + math.exp(-logit))
    return -label * math.log(p) - (1 - label) * math.log(1 - p)


def test_losses_are_cross_entropies_with_labels_0_8_and_0_mean_over_a_level_and_summed_over_levels():
    def levels(value):
        return [torch.tensor([value, 2 * value]).reshape(1, 1, 1, 2), torch.tensor([[3 * value]])]

    def by_hand(value, label):
        return (bce(value, label) + bce(2 * value, label)) / 2 + bce(3 * value, label)

    real, fake = levels(0.5), levels(-0.25)
    assert adversarial.discriminator_loss(real, fake).item() == pytest.approx(by_hand(0.5, 0.8) + by_hand(-0.25, 0))
    assert adversarial.generator_loss(real).item() == pytest.approx(by_hand(0.5, 0.8))  # also of logits above ln 4


def test_auc_is_1_for_levels_told_apart_and_one_half_for_those_that_are_not():
    real, fake = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [2.0]])
    assert adversarial.auc([real + 4], [fake]) == 1 and adversarial.auc([fake], [real + 4]) == 0
    assert adversarial.auc([real], [fake]) == 3 / 4  # of all pairs
    assert adversarial.auc([real, torch.zeros(2, 1, 2, 2)], [fake, torch.zeros(2, 1, 2, 2)]) == (3 / 4 + 1 / 2) / 2


# ---------------------------------------------------------------------------------------------------- discriminator

def test_heads_halve_even_maps_twice_and_every_matrix_has_spectral_norm_one():
    torch.manual_seed(0)
    heads = adversarial.Heads((4, 6, 8, 10), hidden=16)
    maps = torch.randn(2, 4, 16, 24), torch.randn(2, 6, 8, 12), torch.randn(2, 8, 4, 8)
    for _ in range(30):  # power iterations
        logits = heads(maps, torch.randn(2, 10))
    assert [tuple(head[:2](x).shape[2:]) for head, x in zip(heads.maps, maps)] == [(8, 12), (4, 6), (2, 4)]
    assert [tuple(level.shape) for level in logits] == [(2, 1, 4, 6), (2, 1, 2, 3), (2, 1, 1, 2), (2, 1)]
    matrices = [m.weight for m in heads.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    norms = [torch.linalg.matrix_norm(weight.flatten(1), 2).item() for weight in matrices]
    assert norms == pytest.approx([1] * 8, abs=0.02)


def test_blur_spreads_a_point_by_its_kernel_and_removes_the_finest_pattern():
    blur, stripes = adversarial.BlurPool(), torch.tensor([1.0, -1.0]).repeat(4).expand(1, 2, 8, 8)
    point, row = torch.eye(128)[100].reshape(1, 2, 8, 8), torch.tensor([0, 0, 1, 3, 3, 1, 0, 0]) / 8  # at (1, 4, 4)
    assert torch.equal(blur(point), torch.stack([torch.zeros(8, 8), row[:, None] * row])[None])
    assert blur(stripes)[..., 1:-2, 1:-2].abs().max() < 1e-6
    assert blur(stripes).shape == (1, 2, 8, 8) and adversarial.BlurPool(rim=1)(stripes).shape == (1, 2, 10, 10)


OPEN_CLIP = [("embeddings.patch_embeddings.", "stem.0."), ("embeddings.layernorm.", "stem.1."),
             ("encoder.stages.", "stages."), ("downsampling_layer.", "downsample."), (".layers.", ".blocks."),
             (".dwconv.", ".conv_dw."), (".layernorm.", ".norm."), (".pwconv1.", ".mlp.fc1."),
             (".pwconv2.", ".mlp.fc2."), ("layer_scale_parameter", "gamma")]  # from transformers' names


@torch.no_grad()
def test_convnext_computes_what_transformers_computes_and_a_text_tower_beside_it_is_ignored(tmp_path):
    torch.manual_seed(0)
    config = ConvNextConfig(num_stages=4, depths=[1, 2, 3, 1], hidden_sizes=[8, 12, 16, 24], layer_norm_eps=1e-5)
    theirs, projection, state = ConvNextModel(config).eval(), torch.randn(10, 24), {}
    for module in filter(lambda module: hasattr(module, "eps"), theirs.modules()):
        module.eps = 1e-5  # OpenCLIP's
    for name, parameter in theirs.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.2)
        name = name.replace("layernorm.", "head.norm.") if name.startswith("layernorm.") else name
        for their_part, our_part in OPEN_CLIP:
            name = name.replace(their_part, our_part)
        state[f"visual.trunk.{name}"] = parameter.contiguous()
    state |= {"visual.head.proj.weight": projection, "transformer.resblocks.0.attn.in_proj_bias": torch.ones(3)}
    save_file(state, tmp_path / adversarial.BACKBONE_FILE)
    ours, images = adversarial.load_backbone(tmp_path), torch.rand(2, 3, 64, 96) * 2 - 1
    expected = theirs(adversarial.normalise(images), output_hidden_states=True)
    maps, embedding = ours(images)
    assert ours.widths == (8, 12, 16, 10)
    wanted_maps, wanted_embedding = expected.hidden_states[1:4], expected.pooler_output @ projection.T
    for found, wanted in zip((*maps, embedding), (*wanted_maps, wanted_embedding), strict=True):
        assert torch.allclose(found, wanted, atol=1e-4 * wanted.abs().max())


def test_images_are_normalised_with_clips_mean_and_deviation():
    images = torch.tensor([-1.0, 1.0])[:, None, None, None].expand(2, 3, 1, 1)
    expected = [[-1.7923, -1.7521, -1.4802], [1.9303, 2.0749, 2.1459]]  # of black and of white, as CLIP publishes them
    assert torch.allclose(adversarial.normalise(images).flatten(1), torch.tensor(expected), atol=1e-3)


def test_the_generators_loss_reaches_every_pixel_and_recomputation_changes_nothing(backbone):
    torch.manual_seed(0)
    images = (torch.rand(2, 3, 64, 64) * 2 - 1).requires_grad_()
    convnext = adversarial.Discriminator(adversarial.load_backbone(backbone))
    for discriminator, sides in ((convnext, [4, 2, 1]), (adversarial.PyramidDiscriminator(), [16, 8, 4])):
        found = []
        discriminator.heads.requires_grad_(False).eval()
        for recompute in (False, True):
            getattr(discriminator, "backbone", discriminator).recompute = recompute
            logits = discriminator(images)
            found += torch.autograd.grad(adversarial.generator_loss(logits), images)
        assert [level.shape[2] for level in logits if level.ndim == 4] == sides
        assert (found[0] != 0).all(dim=1).float().mean() > 0.9 and torch.allclose(*found, rtol=1e-4, atol=1e-8)
        assert not any(p.requires_grad for p in discriminator.parameters())


def test_fine_levels_of_the_pyramid_see_no_large_areas():
    discriminator = adversarial.PyramidDiscriminator()
    one, other = (discriminator(torch.full((1, 3, 64, 64), value)) for value in (-0.5, 0.5))
    assert [torch.allclose(a, b, atol=1e-6) for a, b in zip(one, other)] == [True, True, False]


def test_a_pool_keeps_its_real_images_and_the_newest_of_the_students():
    numbered = torch.arange(6.0)[:, None, None, None].expand(6, 3, 2, 2) / 10
    pool = adversarial.ImagePool(numbered, numbered - 1)
    pool.add(numbered[:2] + 2)  # too bright: clamped
    assert pool.fake[:, 0, 0, 0].tolist() == pytest.approx([-0.8, -0.7, -0.6, -0.5, 1, 1])
    real, fake = pool.draw(200, torch.Generator().manual_seed(0))
    assert set(real[:, 0, 0, 0].tolist()) == set(numbered[:, 0, 0, 0].tolist())
    assert set(fake[:, 0, 0, 0].tolist()) == set(pool.fake[:, 0, 0, 0].tolist())


@pytest.mark.parametrize("name, words", [
    ("stages.1.blocks.0.norm.bias", "stages.1.blocks.0.norm.bias is missing"), ("stem.0.weight", "holds no ConvNeXt")])
def test_a_backbone_without_a_tensor_is_refused(name, words, backbone, tmp_path):
    state = load_file(backbone / adversarial.BACKBONE_FILE)
    del state[f"visual.trunk.{name}"]
    save_file(state, tmp_path / adversarial.BACKBONE_FILE)
    with pytest.raises(UserError, match=words):
        adversarial.load_backbone(tmp_path)
