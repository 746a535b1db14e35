"""A training that was killed goes on as if it had not been: all that its next steps depend on, in one file.

A file is torch's own format, read with `weights_only=True`, with a digest of its contents. What must be the same for a
training to go on is a fingerprint in it; what may change the rounding, such as the number of threads, is compared, and
a change warned of.
"""

import pickle
import platform
import re
import warnings
from array import array
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from xxhash import xxh3_128

from lorakit._atomic import remove_dead, write_atomically
from lorakit._numbers import check_integer
from lorakit._random import Stream
from lorakit._words import one_line
from lorakit.speed.accelerated import Report
from lorakit.speed.decision import Decision
from lorakit.training.batch import Example
from lorakit.training.history import History
from lorakit.training.loss import leave_to_formula, left_to_formula
from lorakit.training.validation import Validation, moving, restore

NAME = re.compile(r"step-(\d{8})\.pt")
SAMPLE = 64  # numbers of each frozen weight that its fingerprint reads


@dataclass(frozen=True)
class Checkpoints:
    """The files of one training in a folder of their own.

    Args:
        folder: made if it is not there.
        every: steps between two.
        keep: how many stay; older ones go when a new one is written.

    Raises:
        ValueError: a number is out of range.
    """

    folder: Path
    every: int
    keep: int

    def __post_init__(self):
        check_integer("checkpoint_every", self.every)
        check_integer("keep", self.keep)

    def newest(self, fingerprint: dict[str, Any]) -> dict[str, Any] | None:
        """What the newest whole file holds, None if there is none. Damaged ones are passed over with a warning.

        Raises:
            ValueError: it is of another training; says what differs.
        """
        remove_dead(self.folder)  # a training that is done writes no more
        for _, path in reversed(self._files()):
            try:
                found = _read(path)
                other = found["fingerprint"]
            except Exception as error:  # whatever torch makes of a damaged file
                warnings.warn(f"expected a whole checkpoint, passed over {path}: {one_line(error)}", stacklevel=4)
                continue
            names = [name for name in fingerprint | other if fingerprint.get(name) != other.get(name)]
            if names:
                what = ", ".join(_difference(name, fingerprint.get(name), other.get(name)) for name in names)
                raise ValueError(
                    f"expected the training of the checkpoints in {self.folder}, got another {what}: "
                    "remove them, or name another folder"
                )
            return found
        return None

    def write(self, step: int, state: dict[str, Any]) -> None:
        """Writes what a training is after so many steps; the oldest files go."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{step:08d}.pt"
        write_atomically({path: lambda draft: _write(state, draft)})
        older = [file for number, file in self._files() if number < step]  # a later one is damaged, and comes again
        for file in older[: max(0, len(older) - self.keep + 1)]:
            file.unlink(missing_ok=True)

    def _files(self) -> list[tuple[int, Path]]:
        names = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted((int(match[1]), path) for path in names if (match := NAME.fullmatch(path.name)))


@dataclass
class Training:
    """Everything that the next steps of a training depend on, apart from what its fingerprint says."""

    model: nn.Module
    optimizer: Optimizer
    schedule: LRScheduler
    stream: Stream
    validation: Validation
    history: History

    def state(self, fingerprint: dict[str, Any], speed: Report, done: bool = False) -> dict[str, Any]:
        """As plain values and tensors."""
        return {
            "fingerprint": fingerprint,
            "circumstances": _circumstances(self.model),
            "decisions": {name: tuple(decision) for name, decision in speed.decisions.items()},
            "formula": left_to_formula(self.model),
            "done": done,
            "weights": {name: value.detach() for name, value in moving(self.model).items()},
            "optimizer": self.optimizer.state_dict(),
            "random": self.stream.states,
            "best": self.validation.weights,
            "history": asdict(self.history),
        }

    def go_on(self, state: dict[str, Any], speed: Report | None = None) -> int:
        """Makes everything what it was; returns how many steps are done."""
        restore(self.model, state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.stream.states = state["random"]
        self.validation.weights = state["best"]
        vars(self.history).update(state["history"])
        self.schedule.last_epoch = len(self.history.loss)
        if state["formula"]:
            leave_to_formula(self.model)
        if speed is not None:
            decisions = {name: Decision(*words) for name, words in state["decisions"].items()}
            now = _circumstances(self.model) | {name: decision.used for name, decision in speed.decisions.items()}
            then = state["circumstances"] | {name: decision.used for name, decision in decisions.items()}
            changed = [f"{name} {then[name]}, now {now[name]}" for name in now if now[name] != then.get(name)]
            if changed:
                warnings.warn(f"the training goes on with other rounding: {'; '.join(changed)}", stacklevel=4)
            speed.decisions |= decisions
        return len(self.history.loss)


def pinned(state: dict[str, Any] | None) -> bool | None:
    """What a training that goes on must decide as before, whatever the clock says: who multiplies."""
    return None if state is None else state["decisions"]["oneDNN"][0]


def fingerprint(model: nn.Module, optimizer: Optimizer, validation: Validation, **settings: Any) -> dict[str, Any]:
    """What must be the same for a training to go on, as plain values.

    The examples are read whole, of frozen weights the first numbers of each. Functions are not compared.

    Args:
        settings: more of it; what is no number or word, such as examples, is hashed.
    """
    frozen = {name: p.detach().reshape(-1)[:SAMPLE] for name, p in model.named_parameters() if not p.requires_grad}
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    found = {
        "model": digest(re.sub(" at 0x[0-9a-f]+", "", repr(model))),
        "parameters": ", ".join(f"{name} {tuple(value.shape)} {value.dtype}" for name, value in moving(model).items()),
        "frozen weights": digest(frozen),
        "optimizer": f"{type(optimizer).__name__} {groups}",
        "validation": digest(validation.examples),
        "validate_every": validation.every,
        "patience": validation.patience,
        "torch": str(torch.__version__),
        "device": next(model.parameters()).device.type,
    }
    plain = (int, float, str, type(None))
    return found | {name: value if isinstance(value, plain) else digest(value) for name, value in settings.items()}


def digest(value: Any) -> str:
    """A hash of examples, or of whatever is made of mappings, sequences, tensors and values that can be pickled."""
    found = xxh3_128()
    _feed(found, value)
    return found.hexdigest()


def _feed(found: Any, value: Any) -> None:
    if isinstance(value, Example):
        _feed(found, [array("q", value.input_ids), array("q", value.labels)])
    elif isinstance(value, array):
        found.update(f"array {len(value)}".encode())
        found.update(value)
    elif isinstance(value, Tensor):
        found.update(f"tensor {tuple(value.shape)} {value.dtype}".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        found.update(f"mapping {len(value)}".encode())
        for name, inner in value.items():
            _feed(found, name)
            _feed(found, inner)
    elif isinstance(value, str | bytes | int | float | None):
        found.update(f"{value!r};".encode())
    elif hasattr(value, "__len__") and hasattr(value, "__getitem__") and not hasattr(value, "dtype"):
        found.update(f"sequence {len(value)}".encode())
        for i in range(len(value)):  # a data set need not end by itself
            _feed(found, value[i])
    else:
        found.update(pickle.dumps(value))


def _circumstances(model: nn.Module) -> dict[str, Any]:
    """What may change how sums are rounded."""
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    kind = torch.cuda.get_device_name(device) if on_gpu else torch.backends.cpu.get_cpu_capability()
    return {"threads": torch.get_num_threads(), "machine": platform.machine(), "processor": kind}


def _write(state: dict[str, Any], path: Path) -> None:
    try:
        with open(path, "wb") as file:
            torch.save(state | {"digest": digest(state)}, file)  # torch does not see damage to a tensor's bytes
    except RuntimeError as error:  # of torch's writer, behind which a full disk stands
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise
    try:
        _read(path)
    except pickle.UnpicklingError as error:  # better now than when it is needed
        raise ValueError(
            f"expected an optimizer that keeps tensors and plain values alone, got {one_line(error)}"
        ) from error


def _read(path: Path) -> dict[str, Any]:
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state.pop("digest") != digest(state):
        raise ValueError("its contents are not those that were written")
    return state


def _difference(name: str, ours: Any, theirs: Any) -> str:
    short = all(len(str(value)) < 24 for value in (ours, theirs))  # a hash says nothing
    return f"{name} ({ours}, there {theirs})" if short else name
