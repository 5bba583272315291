"""evaluate.py ablate: runs that can be stopped, and verdicts that can turn out either way."""

import json
import sys

import numpy as np
import pytest

import ablations
import evaluate
import sample
import shapes
import train
import weights
from ablations import Ablation, Arm, Claim


@pytest.mark.parametrize("above, below, sign, word", [
    ([0.9, 0.91, 0.92], [0.5, 0.52, 0.51], 1, "reproduced"),
    ([0.5, 0.52, 0.51], [0.9, 0.91, 0.92], 1, "not reproduced"),
    ([20, 21, 19], [50, 52, 49], -1, "reproduced"),               # a distance: lower is better
    ([0.9, 0.5, 0.7], [0.6, 0.8, 0.69], 1, "undecided"),
    ([0.9], [0.1], 1, "undecided"),                               # one seed decides nothing
])
def test_a_claim_is_judged_by_its_spread_over_seeds(above, below, sign, word):
    assert ablations.judge(np.array(above), np.array(below), sign)[2] == word


def test_the_interval_of_a_difference_is_that_of_student():
    """Differences 1, 2 and 3: mean 2, standard deviation 1, t(0.975, 2) = 4.3027."""
    mean, half, _ = ablations.judge(np.array([2.0, 4, 6]), np.array([1.0, 2, 3]), 1)
    assert mean == 2 and half == pytest.approx(4.3027 / 3**0.5, rel=1e-4)


def test_every_claim_names_arms_and_every_curve_its_arms():
    for ablation in ablations.ABLATIONS.values():
        assert all(claim.above in ablation.arms and claim.below in ablation.arms for claim in ablation.claims)
        assert all(arm in ablation.arms for points in ablation.curves.values() for arm in points)


def test_models_can_be_named_with_how_they_are_sampled():
    assert sample.split_model("a/b@steps=4,guidance=2.5,cache=1-2,4-7") == (
        "a/b", {"steps": 4, "guidance": 2.5, "cache": [(1, 2), (4, 7)]})
    assert sample.split_model("runs/x@home") == ("runs/x@home", {})
    pipeline, how = sample.open_model(f"{sample.TINY}@steps=2,cache=3-4")
    assert how == {"steps": 2} and pipeline.cache.ranges == [(3, 4)]


@pytest.fixture
def ablate(monkeypatch, tmp_path):
    """A small ablation: the teacher, and a student of one iteration. ablate() -> the report."""
    arms = {"teacher": Arm("", "steps=1,guidance=1"), "student": Arm("--stage 1 --iterations 1 --batch 2")}
    claims = [Claim("the student follows prompts", "student", "teacher", ("adherence", "mean"))]
    monkeypatch.setattr(ablations, "ABLATIONS", {"gate": Ablation("Small", arms, claims)})
    measure = shapes.measure
    monkeypatch.setattr(shapes, "measure", lambda draw, recogniser, *sizes: measure(draw, recogniser, 6, 2, 64, 2))
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "ablate", "--seeds", "2", "--dtype", "fp32", "--out", str(tmp_path / "out")])

    def run():
        evaluate.main()
        return (tmp_path / "out" / "ablate.md").read_text()

    return run


def test_what_is_finished_is_not_done_again(ablate, monkeypatch, tmp_path):
    report = ablate()
    assert "| teacher | 1 |" in report and "| student | 2 |" in report and "| undecided |" in report
    measured = json.loads((tmp_path / "out" / "measured" / "stage-1-iterations-1-batch-2-seed1.json").read_text())
    assert f"{measured['adherence']['mean'][0]:.3f}"[:3] in report and (tmp_path / "out" / "gate.png").exists()
    monkeypatch.setattr(train, "stage1", None)
    monkeypatch.setattr(shapes, "measure", None)
    assert ablate() == report


def test_runs_made_with_other_settings_are_refused(ablate, monkeypatch):
    ablate()
    monkeypatch.setitem(train.PRESETS[1]["tiny"], "student_lr", 1.0)
    with pytest.raises(weights.UserError, match="other settings"):
        ablate()


def test_differences_are_reported_in_the_units_of_the_measure(tmp_path):
    ablation = Ablation("T", {"a": Arm("--stage 1"), "b": Arm("--stage 2")}, [Claim("closer", "a", "b", ablations.DISTANCE, -1)])
    for arm, distances in zip(ablation.arms.values(), ([10.0, 11, 12], [30.0, 32, 34])):
        for seed, distance in enumerate(distances):
            found = {group: {} for group in ("adherence", "coverage", "distribution")}
            for group, name in ablations.COLUMNS.values():
                found[group][name] = (0.5, 0.1)
            found["distribution"]["Fréchet distance"] = (distance, 1.0)
            weights.write_json(ablations.measured_file(tmp_path, arm, seed), found)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablations, "ABLATIONS", {"t": ablation})
        report = ablations.report(["t"], 3, tmp_path)
    assert "| closer | Fréchet distance | -21.000 ± 2.484 | reproduced |" in report
    assert "| a | 3 |" in report and "| 11.0 ± 1.0 |" in report
