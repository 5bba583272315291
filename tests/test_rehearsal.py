"""docs/official.md: its commands run as they stand there, on small random weights under the official names."""

import json

from conftest import run_command
from experiments import rehearsal


def test_the_commands_for_official_models_run_from_the_teacher_to_the_scores(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rehearsal, "SHORTER", {1: ["--iterations 1"], 2: ["--iterations 2 --discriminator-warmup 1"]})
    status, out, errors = run_command(rehearsal.main, "--out", tmp_path, capsys=capsys)
    assert status == 0, errors
    assert [row.split("`")[1].split()[0] for row in out.splitlines()[2:]] == 3 * ["train.py"] + ["sample.py", "evaluate.py"]
    student = tmp_path / "runs" / "sd3-medium" / "stage2"
    assert (student / "text_encoder_3").resolve() == (tmp_path / rehearsal.MODEL / "text_encoder_3").resolve()
    assert (student / "compensator" / "model.safetensors").exists() and (tmp_path / "samples" / "000.png").exists()
    scores, = json.loads((tmp_path / "runs" / "quality" / "quality.json").read_text()).values()
    assert scores.keys() == {"evaluations", "CLIP score", "FID"}
