"""A thousand mutated inputs (fuzz.py): each is read, or refused in one line."""

from pathlib import Path

import pytest

import fuzz


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux' /proc")
def test_whatever_is_in_a_file_it_is_read_or_refused(tmp_path):
    found = fuzz.failures(1000, 0, tmp_path)
    assert not found, "\n".join(found)
