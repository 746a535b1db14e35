"""Finds what the course asks of transformers, peft, trl, bitsandbytes or datasets and the installed version lacks.

    python tests/drift.py             what the installed libraries do not know; exit code 1 if there is anything
    python tests/drift.py --newest    what the newest releases would not know; exit code 0

Sources are read, not run. A name is followed if it means one thing in its scope: an import, `need`, an instance, a dict
behind `**`, keywords that a function of the same source passes on. Whatever else a program alone knows is skipped.

A name has to be there. A keyword has to be a parameter of the callable. If this takes `**kwargs`, it may also be
- a parameter of its base classes' version, or of what the keywords are handed on to (`HANDED_ON`),
- a key that a module of one of these reads from a dictionary with a name in "kwargs",
- what a transformers config lets be set; `Auto` classes are taken to load a Llama, as they do in this course.
So a wrong keyword passes where the same module reads it for another callable. A flag of `trl sft` is its parser's.
"""

import ast
import difflib
import fnmatch
import functools
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import typing
from collections import defaultdict
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement

from lorakit.libraries import quiet

LIBRARIES = ("transformers", "peft", "trl", "bitsandbytes", "datasets")
PROJECT = Path(__file__).resolve().parents[1]
SOURCES = ("notebooks/**/*.ipynb", "lorakit/*.py", "tests/**/*.py", "data/*/*.py")
MEANT = {("notebooks/03_sft_with_peft_and_trl.ipynb", "trl.SFTConfig(max_seq_length)")}  # a lesson shows the error
DEPRECATED = {"torch_dtype": "dtype"}
CONFIG, MODEL = "transformers.PreTrainedConfig", "transformers.PreTrainedModel.from_pretrained"
HANDED_ON = {
    "transformers.AutoModel*.from_*": (MODEL, "transformers.AutoConfig.from_pretrained"),
    "transformers.*For*.from_pretrained": (f"{CONFIG}.from_pretrained", CONFIG),
    "transformers.AutoConfig.from_pretrained": (f"{CONFIG}.from_pretrained", "transformers.LlamaConfig"),
    "transformers.AutoTokenizer.from_pretrained": (
        "transformers.PreTrainedTokenizerBase.from_pretrained",
        "transformers.PreTrainedTokenizerFast",
    ),
    "*.generate": ("transformers.GenerationMixin.generate", "transformers.GenerationConfig"),
    "peft.AutoPeft*.from_pretrained": ("transformers.AutoModel.from_pretrained", "peft.PeftModel.from_pretrained"),
    "peft.*.from_pretrained": ("huggingface_hub.hf_hub_download",),
    "datasets.load_dataset": tuple(f"datasets.packaged_modules.{x}Config" for x in ("json.json.Json", "csv.csv.Csv")),
}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
SCOPES = (*FUNCTIONS, ast.Lambda, ast.ClassDef, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
COMMAND = re.compile(r"(?:^|-m )(?:trl(?:\.cli)? (?:trl )?|trl\.scripts\.)(\w+)")


class Use(NamedTuple):
    """A name of a library, `("trl", "SFTTrainer", "()", "train")`; with a keyword for it, or a flag."""

    line: int
    path: tuple[str, ...]
    keyword: str = ""


class Source:
    """The names of one source, and what of the libraries it uses."""

    def __init__(self, text: str):
        self.tree = ast.parse(text)
        self.scope, self.outer, self.busy = {}, {}, set()
        self.bound, self.added = defaultdict(list), defaultdict(list)  # (scope, name) -> nodes or paths; -> `|=`, `+=`
        self._enter(self.tree, self.tree)
        self.calls = [node for node in self.scope if isinstance(node, ast.Call)]

    def _enter(self, node, scope):
        for child in ast.iter_child_nodes(node):
            self.scope[child] = scope
            self._bind(child, scope)
            inner = child if isinstance(child, SCOPES) else scope
            self.outer.setdefault(inner, scope)
            self._enter(child, inner)

    def _bind(self, node, scope):
        def bind(name, value):
            self.bound[scope, name].append(value)

        match node:
            case ast.Import(names=names):
                for name, alias in ((each.name, each.asname) for each in names):
                    bind(alias or name.split(".")[0], tuple(name.split(".")[: None if alias else 1]))
            case ast.ImportFrom(module=module, names=names, level=0):
                for each in names:
                    bind(each.asname or each.name, (*module.split("."), each.name))
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                bind(name, node)
            case ast.arg(arg=name):
                bind(name, node)
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    self._assign(target, value)
            case ast.AnnAssign(target=target, value=value) | ast.NamedExpr(target=target, value=value) if value:
                self._assign(target, value)
            case ast.AugAssign(target=ast.Name(id=name) as target, value=value):
                self.busy.add(target)
                self.added[scope, name].append(value)
            case ast.Name(id=name, ctx=ast.Store()):
                if node not in self.busy:
                    bind(name, node)  # by a loop, `with` or unpacking

    def _assign(self, target, value):
        ...
