"""Executes one notebook with this interpreter, and shows meanwhile where it is."""

import os
import re
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import zmq
from ipykernel.kernelspec import RESOURCES, get_kernel_dict
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

from lorakit._progress import MIME_METADATA
from lorakit.speed.cpu import THREAD_ENV

KERNEL_ENV = {
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONHASHSEED": "0",
} | THREAD_ENV
ECHO_SECONDS = 30.0  # how often an unfinished bar is printed where no line can be redrawn


class Screen:
    """Says which cell runs: in one line that is redrawn on a terminal, in a line for each section elsewhere."""

    def __init__(self, nb: NotebookNode, stem: str):
        self.live, self.stem = sys.stdout.isatty(), stem
        self.heading, self.source, self.number = "", "", 0
        self.total = sum(cell.cell_type == "code" for cell in nb.cells)
        self.bars: dict[str, str] = {}
        self.echoed = time.monotonic()

    def start_cell(self, cell: NotebookNode) -> None:
        """Counts a code cell, or takes over the heading of a text cell."""
        headings = re.findall(r"^#+ +(.+)", cell.source, re.MULTILINE) if cell.cell_type == "markdown" else []
        self.heading = headings[-1] if headings else self.heading
        if cell.cell_type == "code":
            self.number, self.source = self.number + 1, cell.source
        self._say(self.heading, keep=bool(headings))

    def bar(self, key: str, text: str) -> None:
        """Takes the new state of a progress bar."""
        self.bars[key] = text
        due = time.monotonic() - self.echoed > ECHO_SECONDS
        self.echoed = time.monotonic() if due else self.echoed
        self._say(text, keep=due)

    def end_cell(self) -> None:
        """Gives the last state of each bar of the cell."""
        for text in self.bars.values():
            self._say(text, keep=True)
        self.bars, self.echoed = {}, time.monotonic()

    def _say(self, text: str, keep: bool) -> None:
        line = f"[{self.stem}] cell {self.number}/{self.total}  {text}".rstrip()
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            print("\r" + line[:width].ljust(width), end="", flush=True)
        elif keep:
            print(line, flush=True)

    def close(self, text: str) -> None:
        """Replaces the line by a last one."""
        blank = "\r" + " " * (shutil.get_terminal_size().columns - 1) + "\r" if self.live else ""
        print(f"{blank}[{self.stem}] {text}", flush=True)


class _OwnKernel(KernelSpecManager):
    """Starts this very interpreter, whatever kernel specs a user has installed under the name python3."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        return KernelSpec(resource_dir=RESOURCES, **get_kernel_dict())


class Executor(NotebookClient):
    """Runs the cells of a notebook in order and stores their outputs in it.

    Args:
        nb: the notebook, changed in place.
        screen: is told about cells and bars.
    """

    def __init__(self, nb: NotebookNode, screen: Screen):
        super().__init__(nb, record_timing=False, coalesce_streams=True)
        self.screen, self.cpu_seconds = screen, 0.0

    def create_kernel_manager(self) -> AsyncKernelManager:
        self.km = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=_OwnKernel())
        if zmq.has("curve"):
            self.km.transport_encryption = "auto"  # otherwise each kernel warns on the terminal about plain TCP
        return self.km

    def run(self, folder: Path) -> None:
        """Executes all cells with `folder` as working directory; an exception in a cell ends it and is passed on."""
        env = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"} | KERNEL_ENV
        for cell in self.nb.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        with self.setup_kernel(cwd=str(folder), env=env):
            for index, cell in enumerate(self.nb.cells):
                self.screen.start_cell(cell)
                try:
                    self.execute_cell(cell, index)
                except KeyboardInterrupt:
                    self.shutdown_kernel = "immediate"  # a kernel asked politely finishes its cell and complains
                    raise
                finally:
                    self.screen.end_cell()
                    kernel = getattr(getattr(self.km, "provisioner", None), "pid", None)
                    with suppress(psutil.Error):
                        if kernel:
                            self.cpu_seconds = float(sum(psutil.Process(kernel).cpu_times()[:4]))

    def process_message(self, msg: dict[str, Any], cell: NotebookNode, cell_index: int) -> NotebookNode | None:
        content = msg["content"]
        if MIME_METADATA.items() <= content.get("metadata", {}).items():
            self.screen.bar(content["transient"]["display_id"], content["data"]["text/plain"])
        return super().process_message(msg, cell, cell_index)
