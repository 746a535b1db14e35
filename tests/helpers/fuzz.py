"""Random tries for a stated time: FUZZ_SECONDS for each target (20), from FUZZ_SEED (another one each time)."""

import os
import random
import time
from collections.abc import Callable, Iterator

from hypothesis import HealthCheck, given, seed, settings
from hypothesis.strategies import SearchStrategy, tuples

SECONDS = float(os.environ.get("FUZZ_SECONDS", "20"))
SEED = int(os.environ.get("FUZZ_SEED", str(random.SystemRandom().getrandbits(32))))


def rounds(target: str) -> Iterator[random.Random]:
    """A generator of random numbers for each round until the time is up, one round at least; prints the seed."""
    print(f"\n{target}: FUZZ_SEED={SEED}, {SECONDS:g} s", flush=True)
    begin, n = time.monotonic(), 0
    while n == 0 or time.monotonic() - begin < SECONDS:
        yield random.Random(f"{SEED}/{target}/{n}")
        n += 1
    print(f"{target}: {n} rounds", flush=True)


def fuzz(target: str, check: Callable[..., object], *strategies: SearchStrategy, at_once: int = 20) -> None:
    """Calls `check` with examples of the strategies until the time is up; hypothesis makes a failing one small."""
    quick = settings(
        max_examples=at_once, deadline=None, database=None, print_blob=True, suppress_health_check=list(HealthCheck)
    )
    for random_numbers in rounds(target):
        seed(random_numbers.getrandbits(32))(quick(given(tuples(*strategies))(lambda example: check(*example))))()
