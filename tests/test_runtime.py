"""The machine under a run. Devices, compilation and signals are tested where they are used."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from runtime.device import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def touch():  # as a step does: large blocks, more than one at a time, all freed in the end
    blocks = [torch.ones(16 << 20) for _ in range(3)]
for _ in range(5):
    touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
def test_freed_memory_is_not_mapped_anew() -> None:
    faults = {
        way: int(subprocess.check_output([sys.executable, "-c", FAULTS, way]))
        for way in ("kept", "as it comes")
    }
    assert faults["as it comes"] > 1000
    assert faults["kept"] < 0.1 * faults["as it comes"]
