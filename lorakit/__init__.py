"""lorakit: LoRA from the formula up. Small, exact, tested layers, and the helpers that a fine-tuning needs."""

from lorakit.adapter import load_adapter, save_adapter
from lorakit.adapter_files import AdapterError
from lorakit.batch import Example, encode
from lorakit.budget import Budget, budget
from lorakit.dora import DoRALinear
from lorakit.fold import folded
from lorakit.generate import exact_match, greedy
from lorakit.inject import Count, adapters, count, find_targets, inject, merge, remove
from lorakit.lora import LoRALinear
from lorakit.loraplus import loraplus_groups
from lorakit.many import Fitted, Spec, fit_many
from lorakit.models import load_model
from lorakit.nf4 import NF4Linear
from lorakit.pissa import PiSSALinear, olora_start, pissa_start
from lorakit.quantized import dequantize_model, quantize_model
from lorakit.repacking import prevent_repacking
from lorakit.sql import execution_accuracy, load_sql
from lorakit.train import History, fit

__version__ = "0.1.0"
__all__ = [
    "AdapterError",
    "Budget",
    "Count",
    "DoRALinear",
    "Example",
    "Fitted",
    "History",
    "LoRALinear",
    "NF4Linear",
    "PiSSALinear",
    "Spec",
    "adapters",
    "budget",
    "count",
    "dequantize_model",
    "encode",
    "exact_match",
    "execution_accuracy",
    "find_targets",
    "fit",
    "fit_many",
    "folded",
    "greedy",
    "inject",
    "load_adapter",
    "load_model",
    "load_sql",
    "loraplus_groups",
    "merge",
    "olora_start",
    "pissa_start",
    "prevent_repacking",
    "quantize_model",
    "remove",
    "save_adapter",
]
