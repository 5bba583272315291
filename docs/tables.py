"""Write the tables of README.md and docs/experiments.md from what `python evaluate.py ablate` measured.

    python docs/tables.py

The measures lie in docs/ablations/measured, a file an arm and seed. A table stands between `<!-- table NAME -->` and
`<!-- end -->`.
"""

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import ablations
from ablations import ABLATIONS, COVERAGE, DISTANCE, FIDELITY, TO_TEACHER

COLUMNS = {"adherence": (("adherence", "mean"), 3), "whole prompt": (("adherence", "whole prompt"), 3),
           "coverage": (COVERAGE, 3), "distance to a scene": (FIDELITY, 3), "Fréchet distance": (DISTANCE, 1),
           "to the teacher": (TO_TEACHER, 1)}
HEADLINE = {label: arm for ablation in ("headline", "cache") for label, arm in ABLATIONS[ablation].arms.items()}
ROWS = {  # table: {label in HEADLINE: (evaluations, as it is called there)}
    "README": {
        "true scenes, autoencoded": ("", "true scenes, through the autoencoder"),
        "teacher, 28 × 2, w = 2": ("56", "teacher, w = 2, its best"),
        "teacher, 28 × 2, w = 7": ("56", "teacher, w = 7, which students learn from"),
        "teacher, 4 × 2, w = 2": ("8", "teacher, 4 steps, w = 2"),
        "teacher, 2 × 2, w = 2": ("4", "teacher, 2 steps, w = 2"),
        "ours, 4, Stage I": ("4", "ours, Stage I: `train.py --stage 1 --steps 4`"),
        "TDM, 2": ("2", "TDM: `--alpha 1 --density uniform`"),
        "ours, 2": ("2", "**ours, Stage I: `train.py --stage 1`**"),
        "plain re-use": ("1.67", "the same, blocks 2–5 re-used as they are"),
        "ours, 1.67": ("1.67", "**ours, Stage II: `train.py --stage 2`**")},
}


def table(name, measured=HERE / "ablations"):
    """Markdown: a row an arm that was measured, mean ± standard deviation over its seeds."""
    lines = [f"| | evaluations | seeds | {' | '.join(COLUMNS)} |", "|" + "---|" * (3 + len(COLUMNS))]
    for label, (evaluations, called) in ROWS[name].items():
        arm, cells = HEADLINE[label], []
        for measure, digits in COLUMNS.values():
            values, error = ablations.numbers(measured, arm, 5, measure)
            if len(values):
                mean, deviation = ablations.spread(values, error)
                spread = f" ± {deviation:.{digits}f}" if len(values) > 1 else ""
                cells.append(f"{mean:.{digits}f}{spread}")
        if cells:
            seeds = len(values) if arm.train else ""
            lines.append(f"| {called} | {evaluations} | {seeds} | {' | '.join(cells)} |")
    return "\n".join(lines)


def claims(measured=HERE / "ablations"):
    """Markdown: all claims whose arms were measured."""
    found = ablations.judged(list(ABLATIONS), None, measured)
    return "\n".join([*ablations.HEAD_OF_CLAIMS, *(ablations.row_of_claim(claim, *values)
                                                   for (_, claim), values in found.items())])


def filled(text):
    """A document with its tables as they are now."""
    return re.sub(r"(<!-- table (\w+) -->\n).*?(\n<!-- end -->)",
                  lambda found: found[1] + (claims() if found[2] == "claims" else table(found[2])) + found[3], text,
                  flags=re.S)


if __name__ == "__main__":
    for file in (HERE.parent / "README.md", HERE / "experiments.md"):
        file.write_text(filled(file.read_text()))
