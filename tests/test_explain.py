"""sample.py --explain: one picture of what each step knew, with and without a fake score beside the student."""

import shutil
import sys

import pytest
import torch
from PIL import Image

import explain
import flow
import pipeline
import sample
from cache import new_cache
from commandline import UserError


@pytest.fixture
def draw(monkeypatch, tmp_path):
    def call(model, *words):
        words = ["--explain", "--model", model, "--prompt", "a red circle", "--out", tmp_path / "a.png", *words]
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, words)])
        sample.main()
        return Image.open(tmp_path / "a.png").size
    return call


def test_the_picture_has_a_row_less_where_the_fake_score_is_gone_and_says_so(draw, two_steps, tmp_path, capsys):
    whole = draw(two_steps)
    assert "note" not in capsys.readouterr().err
    shutil.copytree(two_steps, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "fake")
    assert draw(tmp_path / "run")[1] == whole[1] - 2 * 132  # fake score and direction
    assert "has no fake score" in capsys.readouterr().err


def test_only_one_sample_of_a_student_is_explained(draw, two_steps):
    with pytest.raises(UserError, match="is for a student"):
        draw(pipeline.TINY)
    with pytest.raises(UserError, match="one prompt and one seed"):
        draw(two_steps, "--count", 2)
    for words in (["--guidance", 2], ["--steps", 4]):
        with pytest.raises(UserError, match="leave out"):
            draw(two_steps, *words)
    with pytest.raises(UserError, match="leave out"):
        draw(f"{two_steps}@steps=4")


def test_the_last_clean_estimate_is_the_sample_also_with_a_cache(two_steps):
    student = pipeline.load_pipeline(two_steps)
    noise, cond = flow.initial_noise(student.latent_shape(), [3]), student.text(["a red circle"])
    for cache in (None, new_cache((1, 4), 128)):
        steps = explain.clean_estimates(student.mmdit, cache, noise, student.sigmas(), cond)
        student.cache = cache
        assert len(steps) == 2 and torch.allclose(steps[-1], student.sample(noise, cond), atol=1e-5)
