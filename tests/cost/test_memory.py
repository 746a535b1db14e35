"""Peak memory of a call, as the system counts it."""

import sys

import pytest

from lorakit.cost.memory import peak_bytes, resident_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_what_a_call_touches():
    grown = peak_bytes(lambda: bytearray(b"x") * 50_000_000)
    assert 45e6 < grown < 70e6
    assert peak_bytes(lambda: None) < 5e6
    assert resident_bytes() > 10e6
