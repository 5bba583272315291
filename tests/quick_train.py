"""train.py on the shipped model, quickly: for tests, and as a program for torchrun.

Small batches, sheets and measures; with --bare, no sheets and no measures. A word NAME=VALUE sets what has no flag, in
the preset of Stage II.
"""

import contextlib
import json
import sys
from functools import partial
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import commandline  # noqa: E402
import report  # noqa: E402
import shapes  # noqa: E402
import train  # noqa: E402

FLAGS = "--batch 4 --dtype fp32".split()
SMALL = [(shapes, "measure", partial(shapes.measure, captions=8, samples=2, renders=64, draws=2)),
         (train, "sheet_prompts", partial(train.sheet_prompts, rows=1)),
         (report, "Sheet", partial(report.Sheet, seeds=(1,)))]
BARE = [(report, "Sheet", lambda *arguments: None), (report, "write_metrics", lambda *arguments: None)]


def run(*words):
    """What `python train.py WORDS` does."""
    words = list(map(str, words))
    preset = {name: json.loads(value) for name, value in (word.split("=") for word in words if is_setting(word))}
    with contextlib.ExitStack() as stack:
        for owner, name, value in BARE if "--bare" in words else SMALL:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(mock.patch.dict(train.PRESETS["tiny"][2], preset))
        stack.enter_context(mock.patch("sys.argv", [
            "train.py", *FLAGS, *(word for word in words if word != "--bare" and not is_setting(word))]))
        train.main()


def is_setting(word):
    return "=" in word and word.split("=")[0] in train.STAGE2


if __name__ == "__main__":
    commandline.run_script(partial(run, *sys.argv[1:]), "go on with --resume")
