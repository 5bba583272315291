"""train.py on the shipped model with small batches and sheets and quick measures: for tests, and for torchrun.

With --bare as first argument: without sheets and measures, and Stage II's discriminator is alone for one update only.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import shapes  # noqa: E402
import train  # noqa: E402
import weights  # noqa: E402

FLAGS = "--batch 4 --dtype fp32 --sheet-every 2".split()


def quick():
    """(owner, name, value) of what is made quick, as it is now."""
    return [(shapes, "measure", partial(shapes.measure, captions=8, samples=2, renders=64, draws=2)),
            (train, "Sheet", partial(train.Sheet, rows=1, seeds=(1,)))]


def bare():
    soon = {2: {**train.PRESETS[2], "tiny": {**train.PRESETS[2]["tiny"], "alone": 1}}}  # the student moves from the second update
    return [(train, "Sheet", lambda *args, **sizes: None), (train, "report", lambda *args: None),
            (train, "PRESETS", {**train.PRESETS, **soon})]


if __name__ == "__main__":
    for owner, name, value in bare() if sys.argv[1] == "--bare" else quick():
        setattr(owner, name, value)
    sys.argv[1:] = FLAGS + [word for word in sys.argv[1:] if word != "--bare"]
    weights.run_script(train.main)
