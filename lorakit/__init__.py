"""lorakit: LoRA from the formula up. Small, exact, tested layers, and the helpers that a fine-tuning needs."""

from typing import TYPE_CHECKING, Any

from lorakit._optional import need
from lorakit.cost.budget import Budget, budget
from lorakit.layers.bnb import prevent_repacking
from lorakit.layers.config import LoRAConfig
from lorakit.layers.dora import DoRALinear
from lorakit.layers.experts import LoRAExperts
from lorakit.layers.lora import LoRALinear
from lorakit.layers.nf4_linear import NF4Linear
from lorakit.layers.pissa import PiSSALinear, olora_start, pissa_start
from lorakit.merging.convert import convert_adapter
from lorakit.merging.inspection import inspect_adapter
from lorakit.models.inject import Count, adapters, count, inject, wrap
from lorakit.models.load import load_model
from lorakit.models.merge import folded, merge, remove
from lorakit.models.peft_files import AdapterError
from lorakit.models.quantize import dequantize_model, quantize_model
from lorakit.models.save_load import load_adapter, save_adapter
from lorakit.models.several import add_adapter, delete_adapter, named_adapters, set_adapter, using_adapters
from lorakit.models.targets import find_targets
from lorakit.tasks.sql.task import SQL, execution_accuracy, load_sql
from lorakit.tasks.task import ChatFormat, Task
from lorakit.training.audit import audit_data
from lorakit.training.batch import Example
from lorakit.training.encode import encode, encode_row
from lorakit.training.evaluate import exact_match
from lorakit.training.fit import fit
from lorakit.training.fit_many import Fitted, Spec, fit_many
from lorakit.training.generate import greedy
from lorakit.training.history import History, Step
from lorakit.training.optim import loraplus_groups
from lorakit.training.recipe import Recipe
from lorakit.training.rows import read_rows

if TYPE_CHECKING:
    from lorakit.experiments.sweep import sweep as sweep

__version__ = "0.1.0"
__all__ = [
    "SQL",
    "AdapterError",
    "Budget",
    "ChatFormat",
    "Count",
    "DoRALinear",
    "Example",
    "Fitted",
    "History",
    "LoRAConfig",
    "LoRAExperts",
    "LoRALinear",
    "NF4Linear",
    "PiSSALinear",
    "Recipe",
    "Spec",
    "Step",
    "Task",
    "adapters",
    "add_adapter",
    "audit_data",
    "budget",
    "convert_adapter",
    "count",
    "delete_adapter",
    "dequantize_model",
    "encode",
    "encode_row",
    "exact_match",
    "execution_accuracy",
    "find_targets",
    "fit",
    "fit_many",
    "folded",
    "greedy",
    "inject",
    "inspect_adapter",
    "load_adapter",
    "load_model",
    "load_sql",
    "loraplus_groups",
    "merge",
    "named_adapters",
    "olora_start",
    "pissa_start",
    "prevent_repacking",
    "quantize_model",
    "read_rows",
    "remove",
    "save_adapter",
    "set_adapter",
    "using_adapters",
    "wrap",
]


def __getattr__(name: str) -> Any:
    """`sweep`, which needs the extra of its name: imported when it is asked for (and so not in `__all__`)."""
    if name == "sweep":
        return need("lorakit.experiments.sweep", extra="sweep").sweep
    raise AttributeError(f"module 'lorakit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), "sweep"])
