"""The true score: against a closed form, and what the command makes of it."""

import sys
from functools import partial

import pytest
import torch

import commandline
import evaluate
import flow
import shapes
import truth
from pipeline import TINY, decode, generate, load_pipeline


def test_the_optimal_velocity_is_that_of_a_gaussian_where_the_pool_is_one():
    """x0 ~ N(m, s²) has E[x0 | x_σ] = m + g (x_σ - (1 - σ) m) with g = (1 - σ) s² / ((1 - σ)² s² + σ²)."""
    mean, deviation, generator = 0.5, 0.7, torch.Generator().manual_seed(0)
    pool = mean + deviation * torch.randn(200_000, 1, 1, 2, generator=generator)
    for sigma in (0.3, 0.7, 1.0):
        x = flow.add_noise(pool[:5], torch.randn(5, 1, 1, 2, generator=generator), sigma)
        gain = (1 - sigma) * deviation**2 / ((1 - sigma) ** 2 * deviation**2 + sigma**2)
        clean = mean + gain * (x - (1 - sigma) * mean)
        found, size = truth.optimal_velocity(x, torch.tensor(sigma), pool)
        assert torch.allclose(found, (x - clean) / sigma, atol=0.03) and (size > 1000).all()


def test_at_next_to_no_noise_the_truth_is_the_scene_itself():
    pool = torch.randn(100, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(100, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    found, size = truth.optimal_velocity(0.95 * pool + 0.05 * noise, torch.tensor(0.05), pool)
    assert torch.allclose(found, noise - pool, atol=1e-3) and torch.allclose(size, torch.ones_like(size), atol=1e-3)


def test_the_command_writes_table_and_figure_of_a_stage_1_run(two_steps, tmp_path, monkeypatch, capsys):
    words = ["evaluate.py", "score", two_steps, "--captions", 1, "--pool", 32, "--out", tmp_path]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    evaluate.main()
    lines = (tmp_path / "score.md").read_text().splitlines()
    assert "w = 7" in lines[0] and len(lines) == 4 + len(truth.LEVELS) and lines[2] in capsys.readouterr().out


def test_the_steps_decide_that_make_the_most_of_the_way():
    """Of eight steps of the teacher the last changes next to nothing, and the first alone leaves all open."""
    pipeline, recogniser = load_pipeline(TINY), shapes.load_recogniser(TINY)
    early, late = (truth.swapped(pipeline, recogniser, flow.student_sigmas(8, 3.0), k, n=64) for k in (1, 7))
    assert late["the first prompt"].mean() > 0.9 > 0.1 > late["the second prompt"].mean()
    assert late["the clean estimate's sample"].mean() > 0.9
    assert early["the second prompt"].mean() > 0.7 > 0.3 > early["the first prompt"].mean()


def test_which_step_decides_is_written_as_a_table(two_steps, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(truth, "swapped", partial(truth.swapped, n=16))
    monkeypatch.setattr(shapes, "measure", lambda *_, honest=shapes.measure, **__: honest(*_, captions=8, samples=2))
    monkeypatch.setattr(sys, "argv", f"evaluate.py swap {two_steps} --first {TINY} --out {tmp_path}".split())
    evaluate.main()
    table = (tmp_path / "swap.md").read_text()
    assert table.count("| 1 + 1 |") == 6 and capsys.readouterr().out in table


def test_a_relay_of_a_student_and_itself_is_the_student_and_a_guided_first_step_is_another():
    pipeline, nodes = load_pipeline(TINY), flow.student_sigmas(2, 3.0)
    expected = decode(pipeline, generate(pipeline, ["a red circle"], [3], sigmas=nodes, guidance=1.0))
    same, other = (truth.relay(pipeline, pipeline, nodes, 1, w)(["a red circle"], [3]) for w in (1.0, 4.0))
    assert torch.allclose(same, expected, atol=1e-4) and (other - expected).abs().max() > 0.1


def test_a_run_without_its_fake_score_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", f"evaluate.py score {evaluate.TINY} --out {tmp_path}".split())
    with pytest.raises(SystemExit):
        commandline.run_script(evaluate.main)
    assert "fake" in capsys.readouterr().err.splitlines()[-1]
