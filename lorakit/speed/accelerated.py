"""One switch for everything that makes a step faster or smaller without changing its result, and one report of it.

| trick           | what it does                                       | exact                                         |
|-----------------|----------------------------------------------------|-----------------------------------------------|
| kept memory     | freed memory stays with the process                | to the bit                                    |
| oneDNN          | multiplies float32 matrices where it is faster     | to float32 rounding: a trial, `cpu.MAX_ERROR` |
| short attention | a few plain products, weights made again           | in float32, rounded once                      |
| lean modules    | gated blocks and norms keep less                   | to rounding: trials to the bit                |
| fused LoRA      | an adapter's step is one function                  | to rounding                                   |
| frozen prefix   | blocks below the first that trains are asked once  | to rounding: trials to the bit                |
| packing         | short texts share a row                            | to rounding: a trial, `packing.TOLERANCE`     |

Off means off: `accelerated(..., on=False)`, or `LORAKIT_ACCELERATE=0` for the process. Which products are used is
decided by the clock, so that near the threshold two runs may differ in rounding; `LORAKIT_ONEDNN=0` or `1` pins it.
"""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lorakit.layers import shortcuts
from lorakit.layers.bases import frozen_weight
from lorakit.layers.lora import LoRALinear
from lorakit.layers.multi_lora import LoRAStack
from lorakit.speed import cpu
from lorakit.speed.activations import Forward, lean_forwards
from lorakit.speed.attention import MAX_TOKENS, attention
from lorakit.speed.decision import Decision
from lorakit.speed.frozen_prefix import Below, Span, below
from lorakit.speed.packing import packable
from lorakit.speed.patching import own_forwards, patched_forwards

TRICKS = ("kept memory", "oneDNN", "short attention", "lean modules", "fused LoRA", "frozen prefix", "packing")


@dataclass
class Report:
    """What was decided about each trick, by name; printed, a line each."""

    decisions: dict[str, Decision]
    model: nn.Module = field(repr=False)
    prefix: Below | None = field(default=None, repr=False)
    forwards: dict[nn.Module, Forward] = field(default_factory=dict, repr=False)

    def suspended(self) -> AbstractContextManager[None]:
        """What somebody else's code runs in, who may copy, fold or merge the model: no module has another forward."""
        return own_forwards(self.forwards)

    def packs(self) -> bool:
        """Whether texts of this model may share a row: tried once, when it is first asked."""
        if "packing" not in self.decisions:
            self.decisions["packing"] = packable(self.model)
        return self.decisions["packing"].used

    def known(self, keys: Sequence[Hashable], spans: Sequence[Span], shape: torch.Size) -> AbstractContextManager[None]:
        """What a forward pass of texts runs in, so that what is known about them is not computed again.

        Args:
            keys: name the texts.
            spans: where they lie in the batch: row, first column, length.
            shape: of the batch, (rows, columns).
        """
        return self.prefix.batch(keys, spans, shape) if self.prefix else nullcontext()

    def words(self) -> dict[str, str]:
        """The decisions as plain words, in the order of `TRICKS`."""
        made = {"packing": Decision(False, "no batch has room to save")} | self.decisions
        return {name: str(made[name]) for name in TRICKS}

    def __str__(self) -> str:
        return "\n".join(f"{name}: {words}" for name, words in self.words().items())


@contextmanager
def accelerated(
    model: nn.Module,
    tokens: float,
    *,
    trains: bool = False,
    texts: Sequence[Sequence[int]] = (),
    onednn: bool | None = None,
    on: bool = True,
) -> Iterator[Report]:
    """Applies what pays for this model here, and takes it back on any exit.

    Args:
        model: what will run; if it trains, in the mode in which it does.
        tokens: about how many it will see at a time.
        trains: whether there will be backward passes.
        texts: token ids of the training texts, if they will come more than once; a text's key, in `Report.known`, is
            free, as long as it is always the same.
        onednn: pins the use of oneDNN, as `LORAKIT_ONEDNN` does; None lets that or the clock decide.
        on: False for the plain formulas alone, also in whatever opens inside.

    Yields:
        the report.
    """
    with ExitStack() as stack:
        if not on or not shortcuts.allowed():
            stack.enter_context(shortcuts.forbidden())
            stack.enter_context(cpu.plain_products())
            why = "switched off" if shortcuts.by_environment() else f"{shortcuts.ENVIRONMENT}=0"
            yield Report(dict.fromkeys(TRICKS, Decision(False, why)), model)
            return
        decisions = stack.enter_context(cpu.fast(model, tokens, onednn))
        decisions["short attention"] = stack.enter_context(attention(model))
        decisions["fused LoRA"] = _fused(model)
        prefix, why = below(model, texts) if trains and texts else (None, "no text comes again")
        decisions["frozen prefix"] = Decision(prefix is not None, why if trains else "nothing trains")
        forwards = lean_forwards(model) if trains else {}
        words = (
            f"{len(forwards)} gated blocks and norms" if forwards else "no gated block over an adapter, no usual norm"
        )
        decisions["lean modules"] = Decision(bool(forwards), words if trains else "nothing trains")
        stack.enter_context(patched_forwards(forwards))
        yield Report(decisions, model, prefix, forwards)


def decisions(measure: bool = False) -> dict[str, Any]:
    """What this process decides alike for all models, as plain values for a record.

    Args:
        measure: whether to time oneDNN now if nothing has yet.

    Returns:
        `accelerate`: not switched off by the environment; `kept_memory`; `onednn`: used for large products, None if
        that was not asked yet; `onednn_gain`: how many times as fast, None if not measured; `onednn_pinned`.
    """
    pin = cpu.pinned()
    known = measure or pin is False or cpu.onednn_trial.cache_info().currsize > 0
    return {
        "accelerate": shortcuts.by_environment(),
        "kept_memory": cpu.available(),
        "onednn": cpu.judge_products(pin).used if known else None,
        "onednn_gain": round(cpu.onednn_trial()[0], 2) if cpu.onednn_trial.cache_info().currsize else None,
        "onednn_pinned": pin is not None,
    }


def explain() -> dict[str, str]:
    """What this machine decides for large models and why, in words; oneDNN is timed for it."""
    judged = cpu.judge_products(cpu.pinned())
    slow = "for half precision" + (", and for float32 by oneDNN" if judged.used else "")
    found = {
        "kept memory": cpu.judge_memory(),
        "oneDNN": judged,
        "short attention": Decision(True, f"{slow}, up to {MAX_TOKENS} tokens a text"),
        "the rest": Decision(True, "where a model's trials allow it: see the `speed` of `fit`'s history"),
    }
    if not shortcuts.by_environment():
        found = dict.fromkeys(found, Decision(False, f"{shortcuts.ENVIRONMENT}=0"))
    return {name: str(decision) for name, decision in found.items()}


def _fused(model: nn.Module) -> Decision:
    """How many adapters may take their step as one function."""
    layers = [module for module in model.modules() if isinstance(module, LoRALinear | LoRAStack)]
    stacked = {id(layer) for module in layers if isinstance(module, LoRAStack) for layer in module.layers}
    layers = [module for module in layers if id(module) not in stacked]
    like = next(model.parameters())
    can = [m for m in layers if frozen_weight(m.base, like) is not None and not getattr(m, "drops", False)]
    if not layers:
        return Decision(False, "no adapter of lorakit's")
    return Decision(bool(can), f"{len(can)} of {len(layers)} adapters")
