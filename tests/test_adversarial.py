"""Stage II: turns, gradients, losses and the discriminator of Sec. 3.3, against numbers worked out another way."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ConvNextConfig, ConvNextModel

import adversarial
import cache
import flow
import pipeline
import shapes
from commandline import UserError
from test_cache import random_inputs, random_network


# ----------------------------------------------------------------------------------------------------------- turns

def test_the_discriminator_begins_alone_and_then_has_two_turns_for_each_of_the_generator():
    turns = [adversarial.is_generator_turn(update, alone=50, ratio=2) for update in range(60)]
    assert [update for update, generator in enumerate(turns) if generator] == [50, 53, 56, 59]
    assert all(adversarial.is_generator_turn(update, alone=0, ratio=0) for update in range(5))


@pytest.mark.parametrize("alone, ratio", [(50, 2), (0, 0), (0, 1), (7, 3)])
def test_generator_turns_are_counted(alone, ratio):
    for updates in (0, 1, 7, 50, 51, 53, 54, 100):
        counted = sum(adversarial.is_generator_turn(update, alone, ratio) for update in range(updates))
        assert adversarial.generator_turns(updates, alone, ratio) == counted


def test_the_released_warm_up_of_1000_updates_is_317_of_the_compensators_own():
    assert adversarial.generator_turns(1000, alone=50, ratio=2) == 317


# ------------------------------------------------------------------------------------------------- gradients of a turn

def train_mode(blocks):
    student, used = random_network().requires_grad_(True), cache.new_cache(blocks, 128) if blocks else None
    student.pos_embed.requires_grad_(False)
    x, _, context, pooled = random_inputs()
    return student, used, x, (context, pooled)


@pytest.mark.parametrize("blocks", [(1, 3), (0, 4), None], ids=str)
@pytest.mark.parametrize("steps", [2, 4])
def test_no_gradient_from_the_first_step_none_in_cached_blocks_and_some_everywhere_else(blocks, steps):
    student, used, noise, cond = train_mode(blocks)
    calls = []
    student.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    x, _ = adversarial.refine(student, used, noise, flow.student_sigmas(steps, 3.0), cond)
    x.square().mean().backward()
    assert calls == [False] + [True] * (steps - 1)
    trained = {name for name, p in student.named_parameters() if p.grad is not None}
    inside = {name for name in dict(student.named_parameters()) if blocks
              for i in range(blocks[0], blocks[1] + 1) if name.startswith(f"joint_blocks.{i}.")}
    assert not trained & inside
    assert trained == {name for name, p in student.named_parameters() if p.requires_grad} - inside
    assert not used or all(p.grad is not None for p in used.compensator.parameters())


@torch.no_grad()
@pytest.mark.parametrize("blocks", [(1, 3), None], ids=str)
def test_training_draws_exactly_what_sampling_draws(blocks):
    student, used, noise, cond = train_mode(blocks)
    if used:
        torch.nn.init.normal_(used.compensator.image.fc2.weight, std=0.1)
    nodes = flow.student_sigmas(4, 3.0)
    x, steps = adversarial.refine(student, used, noise, nodes, cond)
    assert torch.equal(x, flow.sample(cache.CachedSteps(student, used), noise, nodes, cond)) and not steps


def test_distillation_compares_each_later_step_with_the_whole_of_the_students_own():
    student, used, noise, cond = train_mode((1, 3))
    torch.nn.init.normal_(used.compensator.image.fc2.weight, std=0.1)
    nodes = flow.student_sigmas(4, 3.0)
    x, steps = adversarial.refine(student, used, noise, nodes, cond, distil=True)
    assert len(steps) == 3
    first = flow.euler_step(noise, student(noise, nodes[0].expand(2), *cond), nodes[0], nodes[1])
    velocity, residual = student(first, nodes[1].expand(2), *cond, (1, 3))
    assert torch.allclose(steps[0].full_velocity, velocity, atol=1e-5) and not steps[0].full_velocity.requires_grad
    assert torch.allclose(steps[0].full_residual[1], residual[1], atol=1e-5)
    assert not steps[0].full_residual[0].requires_grad and steps[0].velocity.requires_grad


def test_feature_distillation_trains_the_compensators_prediction():
    student, used = pipeline.load_pipeline(pipeline.TINY).mmdit, cache.new_cache((5, 8), 128)
    noise, cond = torch.randn(4, student.channels, 8, 8), (torch.randn(4, 27, 128), torch.randn(4, 128))
    optimizer, losses = torch.optim.Adam(used.compensator.parameters(), lr=3e-2), []
    for _ in range(40):
        _, steps = adversarial.refine(student, used, noise, flow.student_sigmas(2, 3.0), cond, distil=True)
        loss = adversarial.feature_distillation(steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_distillation_terms_by_hand():
    one, two = torch.ones(2, 3, 4), torch.full((2, 5, 4), 2.0)
    step = adversarial.LaterStep(torch.full((2, 1, 2, 2), 3.0), (one, two),
                                 torch.ones(2, 1, 2, 2), (one * 2, two * 2.5))
    other = step._replace(velocity=torch.full((2, 1, 2, 2), 2.0))
    assert adversarial.output_distillation([step, other]).item() == pytest.approx((4 + 1) / 2)
    assert adversarial.feature_distillation([step, other]).item() == pytest.approx(1 + 9)


# ---------------------------------------------------------------------------------------------------------- losses

def bce(logit, label):
    p = 1 / (1 + math.exp(-logit))
    return -label * math.log(p) - (1 - label) * math.log(1 - p)


def fixed_discriminator(images):
    """Logits that depend on an image's mean alone: a map of two values, and one for the embedding."""
    mean = images.mean(dim=(1, 2, 3))
    return [torch.stack([mean, 2 * mean], dim=1).reshape(-1, 1, 1, 2), 3 * mean[:, None]]


def constant_generator(value):
    """A student of one step from any noise to a latent of this value."""
    return lambda x, sigma, context, pooled: x - value


def test_multilevel_losses_by_hand():
    """The student's image is -0.25 everywhere, the reference's 0.5; latents are images here."""
    inputs = (constant_generator(-0.25), None, torch.ones(1, 3, 4, 4), torch.tensor([1.0, 0.0]), (None, None),
              lambda z: z)
    expected_real = (bce(0.5, 0.8) + bce(1.0, 0.8)) / 2 + bce(1.5, 0.8)
    expected_fake = (bce(-0.25, 0) + bce(-0.5, 0)) / 2 + bce(-0.75, 0)
    values = adversarial.discriminator_loss(*inputs, fixed_discriminator, lambda noise, cond: 0.5 * noise)
    assert values["discriminator"].item() == pytest.approx(expected_real + expected_fake, rel=1e-5)
    assert values["told apart"] == 1
    losses = adversarial.generator_losses(*inputs, fixed_discriminator)
    assert list(losses) == ["adversarial"]
    expected = (bce(-0.25, 0.8) + bce(-0.5, 0.8)) / 2 + bce(-0.75, 0.8)
    assert losses["adversarial"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("logit, sign", [(1.3, -1), (math.log(4), 0), (1.5, 1)])
def test_the_generators_gradient_changes_its_sign_at_ln_4(logit, sign):
    logits = torch.tensor([[logit]], requires_grad=True)
    adversarial.multilevel_loss([logits], adversarial.REAL_LABEL).backward()
    assert logits.grad.item() == pytest.approx(0, abs=1e-6) if sign == 0 else logits.grad.item() * sign > 0


def test_pairs_told_apart_are_counted_over_all_pairs_and_averaged_over_levels():
    blind = torch.zeros(2, 1, 2, 2)
    real, fake = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [2.0]])
    assert adversarial.told_apart([real, blind], [fake, blind]) == (3 / 4 + 0) / 2


def test_only_the_heads_learn_in_the_discriminators_turn_and_only_the_student_in_the_generators():
    torch.manual_seed(0)
    model = pipeline.load_pipeline(pipeline.TINY)
    student, used, discriminator = model.mmdit.requires_grad_(True), cache.new_cache((1, 4), 128), \
        adversarial.Discriminator(adversarial.load_backbone(pipeline.TINY))
    cond = torch.randn(2, 27, 128), torch.randn(2, 128)
    inputs = (student, used, torch.randn(2, student.channels, 8, 8), torch.tensor([1.0, 0.75, 0.0]), cond,
              model.vae.decode, discriminator)

    def learned(*modules):
        return [any(p.grad is not None for p in module.parameters()) for module in modules]

    adversarial.discriminator_loss(*inputs, lambda noise, cond: noise)["discriminator"].backward()
    assert learned(discriminator.heads, student, used.compensator, discriminator.backbone,
                   model.vae) == [True] + 4 * [False]
    discriminator.heads.zero_grad(set_to_none=True)
    discriminator.heads.requires_grad_(False)
    losses = adversarial.generator_losses(*inputs)
    losses["adversarial"].backward()
    assert learned(student, used.compensator, discriminator.heads, discriminator.backbone,
                   model.vae) == 2 * [True] + 3 * [False]


def test_terms_of_weight_zero_are_not_computed(monkeypatch):
    student, used, noise, cond = train_mode((1, 3))
    inputs = student, used, noise, flow.student_sigmas(2, 3.0), cond, lambda latents: pytest.fail("decoded")
    for name in ("output", "feature"):
        monkeypatch.setattr(adversarial, f"{name}_distillation", lambda steps, name=name: torch.tensor(1.0))
    assert list(adversarial.generator_losses(*inputs, None, 1.0, 1.0)) == ["output", "feature"]
    for name, weights in (("output", (0.0, 1.0)), ("feature", (1.0, 0.0))):
        with monkeypatch.context() as patch:
            patch.setattr(adversarial, f"{name}_distillation", lambda steps: pytest.fail("computed"))
            assert len(adversarial.generator_losses(*inputs, None, *weights)) == 1


def test_heads_alone_soon_tell_true_scenes_from_samples_that_look_alike():
    """The frozen tiny backbone sees detail, and heads under spectral norm can use it: at two levels at least.

    Samples of the teacher in 4 steps are a little further from true scenes than a student's.
    """
    torch.manual_seed(0)
    teacher, n = pipeline.load_pipeline(pipeline.TINY), 288
    discriminator = adversarial.Discriminator(adversarial.load_backbone(pipeline.TINY))
    prompts, *_ = shapes.draw_captions(n, torch.Generator().manual_seed(5))
    with torch.no_grad():
        fake = pipeline.generate(teacher, prompts, range(n), sigmas=flow.student_sigmas(4, 3.0), guidance=7.0)
        seen = [discriminator.backbone(teacher.vae.decode(latents))
                for latents in (shapes.true_latents(teacher.vae, prompts, range(1000, 1000 + n)), fake)]
    (real, real_embedding), (fake, fake_embedding) = seen
    heads, generator = discriminator.heads, torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=1e-3, betas=(0.9, 0.95))
    for _ in range(100):
        i, j = torch.randint(n - 96, (2, 32), generator=generator)
        loss = (adversarial.multilevel_loss(heads([m[i] for m in real], real_embedding[i]), adversarial.REAL_LABEL)
                + adversarial.multilevel_loss(heads([m[j] for m in fake], fake_embedding[j]), 0.0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        of_real = heads.eval()([m[-96:] for m in real], real_embedding[-96:])
        of_fake = heads([m[-96:] for m in fake], fake_embedding[-96:])
    shares = sorted(adversarial.told_apart([x], [y]).item() for x, y in zip(of_real, of_fake))
    assert shares[-2] > 0.68  # blind: 0.5


# ------------------------------------------------------------------------------------------------------ the networks

def test_head_logits_have_a_quarter_of_the_maps_sides_and_each_matrix_has_norm_one():
    torch.manual_seed(0)
    heads = adversarial.Heads((4, 6, 8, 10), hidden=16)
    for _ in range(30):  # the power iterations of spectral norm
        logits = heads([torch.randn(2, 4, 16, 16), torch.randn(2, 6, 8, 8), torch.randn(2, 8, 4, 4)],
                       torch.randn(2, 10))
    assert [tuple(level.shape) for level in logits] == [(2, 1, 4, 4), (2, 1, 2, 2), (2, 1, 1, 1), (2, 1)]
    matrices = [m for m in heads.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert len(matrices) == 8
    for m in matrices:
        assert torch.linalg.matrix_norm(m.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.02)


def test_blur_keeps_constants_but_at_the_rim_and_removes_the_finest_pattern():
    blur = adversarial.BlurPool()
    assert torch.allclose(blur(torch.ones(1, 2, 8, 8))[..., 1:-2, 1:-2], torch.ones(1, 2, 5, 5))
    stripes = torch.tensor([1.0, -1.0]).repeat(4).expand(1, 1, 8, 8)
    assert blur(stripes)[..., 1:-2, 1:-2].abs().max() < 1e-6
    assert blur(stripes).shape == (1, 1, 8, 8) and adversarial.BlurPool(rim=1)(stripes).shape == (1, 1, 10, 10)


def their_convnext(depths, widths):
    """transformers' ConvNeXt with random weights, with the eps that timm and OpenCLIP use."""
    theirs = ConvNextModel(ConvNextConfig(num_stages=4, depths=depths, hidden_sizes=widths, layer_norm_eps=1e-5)).eval()
    for module in theirs.modules():
        if hasattr(module, "eps"):
            module.eps = 1e-5
    for name, parameter in theirs.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.2)
    return theirs


def open_clip_names(state):
    """Their tensors under the names of open_clip's file."""
    names = {}
    for name, tensor in state.items():
        for theirs, ours in (("embeddings.patch_embeddings.", "stem.0."), ("embeddings.layernorm.", "stem.1."),
                             ("encoder.stages.", "stages."), ("downsampling_layer.", "downsample."),
                             (".layers.", ".blocks."),
                             (".dwconv.", ".conv_dw."), (".layernorm.", ".norm."), (".pwconv1.", ".mlp.fc1."),
                             (".pwconv2.", ".mlp.fc2."), ("layer_scale_parameter", "gamma"),
                             ("layernorm.", "head.norm.")):
            if not (theirs == "layernorm." and not name.startswith("layernorm.")):
                name = name.replace(theirs, ours)
        names[f"visual.trunk.{name}"] = tensor.contiguous()
    return names


@torch.no_grad()
@pytest.mark.parametrize("place", ["file", "folder", "component"])
def test_convnext_computes_what_transformers_computes_and_leaves_a_text_tower_alone(place, tmp_path):
    torch.manual_seed(0)
    theirs = their_convnext([1, 2, 3, 1], [8, 12, 16, 24])
    projection = torch.randn(10, 24)
    state = {**open_clip_names(theirs.state_dict()), "visual.head.proj.weight": projection,
             "transformer.resblocks.0.attn.in_proj_bias": torch.ones(3), "logit_scale": torch.ones(1)}
    folder = tmp_path / ("backbone" if place == "component" else "")
    folder.mkdir(exist_ok=True)
    save_file(state, folder / adversarial.BACKBONE_FILE)
    ours = adversarial.load_backbone(folder / adversarial.BACKBONE_FILE if place == "file" else tmp_path)
    assert ours.widths == (8, 12, 16, 10)
    images = torch.rand(2, 3, 64, 96) * 2 - 1
    mean, std = (torch.tensor(v)[:, None, None] for v in (adversarial.CLIP_MEAN, adversarial.CLIP_STD))
    expected = theirs((((images + 1) / 2) - mean) / std, output_hidden_states=True)
    maps, embedding = ours(images)
    for ours_map, their_map in zip(maps, expected.hidden_states[1:4], strict=True):
        assert torch.allclose(ours_map, their_map, atol=1e-4 * their_map.abs().max())
    expected_embedding = expected.pooler_output @ projection.T
    assert torch.allclose(embedding, expected_embedding, atol=1e-4 * expected_embedding.abs().max())


@pytest.mark.parametrize("change, words", [
    (lambda s: s.pop("visual.trunk.stages.1.blocks.0.norm.bias"),
     "visual.trunk.stages.1.blocks.0.norm.bias is missing"),
    (lambda s: s.pop("visual.trunk.stem.0.weight"), "holds no ConvNeXt"),
    (lambda s: s.update({"visual.trunk.extra": torch.ones(1)}), "visual.trunk.extra does not belong there"),
    (lambda s: s.update({"visual.head.proj.weight": torch.ones(64, 7)}), "has shape"),
    (lambda s: s["visual.head.proj.weight"].fill_(float("nan")), "not finite"),
    (lambda s: s.clear() or s.update({"weight": torch.ones(1)}), "holds no ConvNeXt"),
])
def test_a_damaged_backbone_is_named(change, words, tmp_path):
    state = load_file(pipeline.TINY / "backbone" / adversarial.BACKBONE_FILE)
    change(state)
    save_file(state, tmp_path / adversarial.BACKBONE_FILE)
    with pytest.raises(UserError, match=words):
        adversarial.load_backbone(tmp_path)


def test_saving_the_backbone_is_the_inverse_of_loading(tmp_path):
    network = adversarial.load_backbone(pipeline.TINY)
    adversarial.save_backbone(network, tmp_path)
    again = adversarial.load_backbone(tmp_path).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in network.state_dict().items())
