"""One progress bar for terminals and notebooks that leaves no litter in a saved notebook."""

import sys
import time

from tqdm import tqdm

MIME_METADATA = {"lorakit": "progress"}  # marks the display messages that a notebook runner may echo to its terminal
REDRAW_SECONDS = 0.2


def _in_kernel() -> bool:
    """True inside a Jupyter kernel, where a bar is a display that is redrawn in place."""
    if "IPython" not in sys.modules:
        return False
    shell = sys.modules["IPython"].get_ipython()
    return shell is not None and getattr(shell, "kernel", None) is not None


class Progress:
    """A bar over `total` units of work, used as a context manager.

    In a terminal it is tqdm on stderr. In a notebook it is a single line of text that is redrawn in place, so that the
    saved notebook keeps only its last state: no control characters, no path, no widget.

    Args:
        total: units of work.
        label: what is being done, shown in front.
        unit: name of one unit, for example ``"step"`` or ``"B"`` (bytes are scaled).
        show: False draws nothing.
    """

    def __init__(self, total: int, label: str, unit: str = "step", show: bool = True):
        self.total, self.label, self.unit, self.done, self.note = total, label, unit, 0, ""
        self._bar = self._handle = None
        self._start = self._drawn = time.perf_counter()
        if not show:
            return
        if _in_kernel():
            from IPython.display import display

            self._handle = display(self._bundle(), raw=True, display_id=True, metadata=MIME_METADATA)
        else:
            self._bar = tqdm(total=total, desc=label, unit=unit, unit_scale=unit == "B", dynamic_ncols=True)

    def _bundle(self) -> dict[str, str]:
        share = self.done / max(self.total, 1)
        bar = "█" * round(20 * share) + "·" * (20 - round(20 * share))
        if self.unit == "B":
            count = f"{self.done / 1e6:.0f}/{self.total / 1e6:.0f} MB"
        else:
            count = f"{self.done}/{self.total} {self.unit}s"
        seconds = time.perf_counter() - self._start
        return {"text/plain": f"{self.label} {bar} {count}, {seconds:.0f} s{', ' if self.note else ''}{self.note}"}

    def update(self, n: int = 1, note: str = "") -> None:
        """Adds `n` finished units; `note` (say, the loss) is shown behind the bar."""
        self.done, self.note = self.done + n, note
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(n)
        elif self._handle is not None and time.perf_counter() - self._drawn > REDRAW_SECONDS:
            self._drawn = time.perf_counter()
            self._handle.update(self._bundle(), raw=True, metadata=MIME_METADATA)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._handle is not None:
            self._handle.update(self._bundle(), raw=True, metadata=MIME_METADATA)


def duration(seconds: float) -> str:
    """A time span for people: "12 s", "3 min", "1.5 h"."""
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )
