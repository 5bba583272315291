"""The docs are true: every function of docs/map.md exists and cites its label, every label in the code stands there;
tables are those of what was measured."""

import importlib
import inspect
import re
from operator import attrgetter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROWS = [[cell.strip() for cell in line.strip("|").split("|")]
        for line in (ROOT / "docs" / "map.md").read_text().splitlines() if re.match(r"\| (Sec|Eq|Fig|Table)", line)]
OTHERS = re.compile(r"Esser|Rombach|DMD, Eq\. 3")  # labels of other papers


def labels(text):
    """"Fig. 4, 10" and "Sec. 3.2 and 3.3" -> {"Fig. 4", "Fig. 10"}, {"Sec. 3.2", "Sec. 3.3"}."""
    found = re.findall(r"(Sec|Eq|Fig|Table)\w*\.? ((?:\(?\d+(?:\.\d+)*[ab]?\)?(?:, | and )?)+)", text)
    return {f"{kind} {number}" for kind, numbers in found for number in re.findall(r"\d+(?:\.\d+)*[ab]?", numbers)}


@pytest.mark.parametrize("row", [row for row in ROWS if "`" in row[2]], ids=lambda row: f"{row[0]}: {row[1]}")
def test_a_function_of_the_map_exists_and_one_of_the_row_cites_its_label(row):
    wanted, cited = labels(row[0]), set()
    for name in re.findall(r"`([\w.]+)`", row[2]):
        module, _, path = name.partition(".")
        owner = attrgetter(path)(importlib.import_module(module))
        is_code = inspect.isfunction(owner) or inspect.isclass(owner)
        source = inspect.getsource(owner if is_code else importlib.import_module(module))
        cited |= labels(source) | labels(inspect.getdoc(importlib.import_module(module)))
    assert wanted <= cited | {"Fig 1", "Fig 6", "Fig 14", "Fig 15", "Fig 16"}, wanted - cited  # pictures alone


@pytest.mark.parametrize("file", sorted(ROOT.glob("*.py")), ids=lambda file: file.name)
def test_a_label_in_the_code_stands_in_the_map(file):
    ours = "\n".join(line for line in file.read_text().splitlines() if not OTHERS.search(line))
    assert labels(ours) <= labels("\n".join(row[0] for row in ROWS)) | {"Sec 3", "Sec 4"}


@pytest.mark.parametrize("name", ["README.md", "docs/experiments.md"])
def test_the_tables_are_those_of_what_ablate_measured(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    text = (ROOT / name).read_text()
    assert importlib.import_module("tables").filled(text) == text and "<!-- table" in text
