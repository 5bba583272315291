"""evaluate.py ablate: runs that can be stopped, and verdicts that can turn out either way."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock
from scipy import stats

import ablations
import evaluate
import quick_train
import shapes
import train
import weights
from ablations import Ablation, Arm, Claim
from commandline import UserError


@pytest.mark.parametrize("above, below, sign, word", [
    ([0.9, 0.91, 0.92], [0.5, 0.52, 0.51], 1, "reproduced"),
    ([0.5, 0.52, 0.51], [0.9, 0.91, 0.92], 1, "not reproduced"),
    ([20, 21, 19], [50, 52, 49], -1, "reproduced"),               # a distance: lower is better
    ([0.9, 0.5, 0.7], [0.6, 0.8, 0.69], 1, "undecided"),
    ([0.9], [0.1], 1, "undecided"),                               # one seed decides nothing
])
def test_a_claim_is_judged_by_its_spread_over_seeds(above, below, sign, word):
    mean, _, p = ablations.difference(np.array(above), np.array(below), sign)
    assert ablations.verdict(mean, p) == word


def test_the_p_of_a_claim_is_scipys_and_many_are_corrected_as_by_hand():
    above, below = np.array([2.0, 4, 7]), np.array([1.0, 2, 3])
    assert ablations.difference(above, below, 1)[2] == pytest.approx(stats.ttest_rel(above, below).pvalue)
    assert ablations.holm([0.04, 0.01, 0.03, 0.5]) == pytest.approx([0.09, 0.04, 0.09, 0.5])  # 3 · .03; and no less


def test_stage_2s_real_images_are_those_of_our_student_of_twice_as_many_steps():
    assert ablations.reference_of(ablations.STAGE2) == ablations.OURS4
    assert ablations.SFD4.start == ablations.OURS4.train and "steps 8" in ablations.reference_of(ablations.SFD4).train
    assert ablations.reference_of(Arm("--stage 2 --reference truth")) is None


def test_the_interval_of_a_difference_is_that_of_student():
    """Differences 1, 2 and 3: mean 2, standard deviation 1, t(0.975, 2) = 4.3027."""
    mean, half, _ = ablations.difference(np.array([2.0, 4, 6]), np.array([1.0, 2, 3]), 1)
    assert mean == 2 and half == pytest.approx(4.3027 / 3**0.5, rel=1e-4)


def test_every_claim_names_arms_and_every_curve_its_arms():
    for ablation in ablations.ABLATIONS.values():
        assert all(claim.above in ablation.arms and claim.below in ablation.arms for claim in ablation.claims)
        assert all(arm in ablation.arms for points in ablation.curves.values() for arm in points)


# --------------------------------------------------------------------------------------------------------------- runs

FEW = "--iterations 1 --batch 2"
ARMS = {"teacher": Arm("", "steps=1,guidance=1"), "student": Arm(f"--stage 1 {FEW}"),
        "refined": Arm(f"--stage 2 {FEW}", start=f"--stage 1 {FEW}")}
CLAIMS = [Claim("the student follows prompts", "student", "teacher", ("adherence", "mean"))]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder of a small ablation in fp32, made by evaluate.py as it is called in `sys.argv` from then on."""
    folder = tmp_path_factory.mktemp("ablate")
    with pytest.MonkeyPatch.context() as patch:
        for owner, name, value in quick_train.BARE:
            patch.setattr(owner, name, value)
        patch.setattr(shapes, "THOROUGH", {"captions": 6, "samples": 2, "renders": 64, "draws": 2})
        patch.setattr(ablations, "REFERENCES", {f"--stage 1 {FEW}": Arm(f"--stage 1 {FEW} --steps 4")})
        patch.setattr(ablations, "ABLATIONS", {"gate": Ablation("Small", ARMS, CLAIMS)})
        patch.setattr(sys, "argv", ["evaluate.py", "ablate", "--seeds", "1", "--dtype", "fp32", "--out", str(folder)])
        evaluate.main()
        yield folder


def test_each_arm_is_trained_from_the_runs_before_it_measured_and_reported(out):
    assert {folder.name for folder in (out / "runs").iterdir()} == {
        "stage-1-iterations-1-batch-2-seed0", "stage-1-iterations-1-batch-2-steps-4-seed0",
        "stage-2-iterations-1-batch-2-from-stage-1-iterations-1-batch-2-seed0"}
    measured = json.loads((out / "measured" / "stage-1-iterations-1-batch-2-seed0.json").read_text())
    report = (out / "ablate.md").read_text()
    assert f"| student | 1 | {measured['adherence']['mean'][0]:.3f}" in report and "| undecided |" in report
    assert "| teacher |  |" in report and "| refined | 1 |" in report and (out / "gate.png").exists()


def test_what_is_finished_is_not_done_again(out, monkeypatch):
    report = (out / "ablate.md").read_text()
    for owner, name in ((train, "stage1"), (train, "stage2"), (shapes, "measure")):
        monkeypatch.setattr(owner, name, None)
    evaluate.main()
    assert (out / "ablate.md").read_text() == report


def test_what_another_process_is_at_is_left_for_later(out, tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(ablations, "open_arm", lambda arm, *more, honest=ablations.open_arm:
                        order.append(arm) or honest(arm, *more))
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], str(tmp_path)])
    first, last = ARMS["teacher"], ARMS["student"]
    busy = FileLock(ablations.measured_file(tmp_path, first, 0).with_suffix(".lock"))
    busy.lock_file and ablations.measured_file(tmp_path, first, 0).parent.mkdir()
    monkeypatch.setattr(ablations.time, "sleep", lambda seconds: busy.release())
    busy.acquire()
    evaluate.main()
    assert order.index(last) < order.index(first) and ablations.measured_file(tmp_path, first, 0).exists()


def test_runs_made_with_other_settings_are_refused(out, monkeypatch):
    monkeypatch.setitem(train.PRESETS["tiny"][1], "student_lr", 1.0)
    with pytest.raises(UserError, match="other settings"):
        ablations.open_arm(ARMS["student"], 0, SimpleNamespace(out=out, device=torch.device("cpu"), dtype="fp32"))


# ------------------------------------------------------------------------------------------------------------- report

def test_differences_are_reported_in_the_units_of_the_measure(tmp_path):
    arms, claim = {"a": Arm("--stage 1"), "b": Arm("--stage 2")}, Claim("closer", "a", "b", ablations.DISTANCE, -1)
    ablation = Ablation("T", arms, [claim])
    for arm, distances in zip(ablation.arms.values(), ([10.0, 11, 12], [30.0, 32, 34])):
        for seed, distance in enumerate(distances):
            found = {}
            for (group, name), _ in ablations.COLUMNS.values():
                found.setdefault(group, {})[name] = (0.5, 0.1)
            found["took"] = {"minutes": (30, 0)}
            found["distribution"]["Fréchet distance"] = found["distribution"]["to the teacher"] = (distance, 1.0)
            weights.write_json(ablations.measured_file(tmp_path, arm, seed), found)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablations, "ABLATIONS", {"t": ablation})
        report = ablations.report(["t"], tmp_path)
    assert "| closer | Fréchet distance | -21.000 ± 2.484 | 0.001 | reproduced | -21.000 ± 2.484, agrees |" in report
    assert "took 3.0 hours" in report and "| a | 3 |" in report and "| 11.0 ± 1.0 |" in report
