"""Write the tables of README.md and docs/experiments.md, the report of all arms (docs/ablations/ablate.md) and the
frontier's plot, from what `python evaluate.py ablate` measured.

    python docs/tables.py

The measures lie in docs/ablations/measured, a file an arm and seed. A table stands between `<!-- table NAME -->` and
`<!-- end -->`; NAME is README, claims, or an ablation.
"""

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import ablations
import weights
from ablations import ABLATIONS

COLUMNS = {name: ablations.COLUMNS[name] for name in (
    "adherence", "whole prompt", "coverage", "distance to a scene", "Fréchet distance", "to the teacher")}
README = {  # {label of an arm: as it is called there, and its evaluations}
    "true scenes, autoencoded": "true scenes, autoencoded | ",
    "teacher, 28 × 2, w = 2": "teacher, w = 2, its best | 56",
    "teacher, 28 × 2, w = 7": "teacher, w = 7, as students learn from | 56",
    "teacher, 4 × 2, w = 2": "teacher, 4 steps, w = 2 | 8",
    "teacher, 2 × 2, w = 2": "teacher, 2 steps, w = 2 | 4",
    "ours, 4, Stage I": "ours, Stage I: `train.py --stage 1 --steps 4` | 4",
    "DMD, 2": "DMD: TDM and `--windows whole` | 2",
    "TDM, 2": "TDM: `--alpha 1 --density uniform` | 2",
    "ours, 2": "**ours, Stage I: `train.py --stage 1`** | 2",
    "plain re-use": "the same, blocks 2–5 re-used as they are | 1.67",
    "ours, 1.67": "**ours, Stage II: `train.py --stage 2`** | 1.67",
    "1 step": "ours, Stage I: `train.py --stage 1 --steps 1` | 1"}


def table(name, measured=HERE / "ablations"):
    """Markdown, of the README or of an ablation."""
    if name != "README":
        return "\n".join(ablations.table(ABLATIONS[name].arms, measured, COLUMNS))
    columns = {words: measure for words, measure in COLUMNS.items() if words != "whole prompt"}
    arms = {label: arm for one in ("headline", "cache", "frontier") for label, arm in ABLATIONS[one].arms.items()}
    chosen = {words: arms[label] for label, words in README.items()}
    return "\n".join(ablations.table(chosen, measured, columns, " | evaluations"))


def claims(measured=HERE / "ablations"):
    """Markdown: all claims whose arms were measured."""
    found = ablations.judged(list(ABLATIONS), measured)
    return "\n".join([*ablations.HEAD_OF_CLAIMS, *(ablations.row_of_claim(claim, *values)
                                                   for (_, claim), values in found.items())])


def filled(text):
    """A document with its tables as they are now."""
    def fill(found):
        return f"{found[1]}\n{claims() if found[2] == 'claims' else table(found[2])}\n{found[3]}"

    return re.sub(r"(<!-- table (\w+) -->).*?(<!-- end -->)", fill, text, flags=re.S)


if __name__ == "__main__":
    for file in (HERE.parent / "README.md", HERE / "experiments.md"):
        file.write_text(filled(file.read_text()))
    head = ("`python evaluate.py ablate`; 1,024 captions, 128 images a prompt; bf16; an Intel Xeon core a run, "
            "or, for seeds from 8 on (of TDM from 11 on), a sixteenth of an H100.")
    report = ablations.report(list(ABLATIONS), HERE / "ablations")
    weights.write_text(HERE / "ablations" / "ablate.md", f"{head}\n\n{report}")
    ablations.plot("frontier", HERE / "ablations")
