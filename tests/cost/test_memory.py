"""Peak memory of a call, as the system counts it."""

import subprocess
import sys

import pytest

from lorakit.cost.memory import resident_bytes, returning_memory

MEASURE = """
from lorakit.cost.memory import peak_bytes
print(peak_bytes(lambda: bytearray(b"x") * 50_000_000), peak_bytes(lambda: None))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_what_a_call_touches():
    # in a process of its own: memory that earlier tests have freed would be used again and hide the growth
    ran = subprocess.run([sys.executable, "-c", MEASURE], env=returning_memory(), capture_output=True, text=True)
    grown, idle = map(int, ran.stdout.split())
    assert 45e6 < grown < 70e6
    assert idle < 5e6
    assert resident_bytes() > 10e6
