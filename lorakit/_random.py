"""Random numbers of one's own: torch has one state for all threads, and a training needs a stream that is its alone."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

alone = threading.RLock()  # held by whoever draws from the global state for lorakit, or changes it for a while


@contextmanager
def seeded(seed: int | None = None) -> Iterator[None]:
    """While it is open, no other thread's training draws; the global random state is left as it was.

    Args:
        seed: what is drawn from, None for the state as it is.
    """
    with alone, torch.random.fork_rng():
        if seed is not None:
            torch.manual_seed(seed)
        yield


class Stream:
    """The random numbers of one training, from a seed on, whatever else is drawn between its steps.

    While nothing is drawn it costs nothing: after a first step that has left the state alone, the next ones neither
    wait for other threads nor touch the state, until `watch` is called.
    """

    def __init__(self, seed: int):
        self._seed, self._draws = seed, True
        self.states: list[Tensor] = []  # what the next step begins with, by device; empty before the first

    def watch(self) -> None:
        """Looks again whether something is drawn: somebody may have switched dropout on."""
        self._draws = True

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """While it is open, the global state is this stream's; afterwards it is what it was before."""
        if not self._draws:
            yield
            return
        with seeded(None if self.states else self._seed):
            _set(self.states)
            before = _states()
            yield
            self.states = _states()
            self._draws = not all(torch.equal(a, b) for a, b in zip(before, self.states, strict=False))


def _states() -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ())]


def _set(states: list[Tensor]) -> None:
    if states:
        torch.set_rng_state(states[0])
        for device, state in enumerate(states[1:]):
            torch.cuda.set_rng_state(state, device)
