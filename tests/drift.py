"""Finds what the course asks of transformers, peft, trl, bitsandbytes or datasets and the installed version lacks.

    python tests/drift.py             what the installed libraries do not know; exit code 1 if there is anything
    python tests/drift.py --newest    what the newest releases would not know; exit code 0

Sources are read, not run. A name is followed if it means one thing in its scope: an import, `need`, an instance, a dict
behind `**`, keywords that a function of the same source passes on. Whatever else only a run can tell is skipped.

A name has to be there. A keyword has to be a parameter of the callable. If this takes `**kwargs`, it may also be
- a parameter of its base classes' version, or of what the keywords are handed on to (`HANDED_ON`),
- a key that a module of one of these reads from a dictionary with a name in "kwargs",
- what a transformers config lets be set; models are taken to be Llamas, as they are in this course.
So a wrong keyword passes where the same module reads it for another callable. A flag after `trl sft` has to be one of
its parser, or of `accelerate launch`, which gets the rest.
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
from collections import defaultdict
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from lorakit._optional import quiet

LIBRARIES = ("transformers", "peft", "trl", "bitsandbytes", "datasets")
PROJECT = Path(__file__).resolve().parents[1]
SOURCES = ("notebooks/**/*.ipynb", "lorakit/**/*.py", "tests/**/*.py", "data/*/*.py")
MEANT = {("notebooks/03_sft_with_peft_and_trl.ipynb", "trl.SFTConfig(max_seq_length)")}  # the lesson shows the error
DEPRECATED = {"torch_dtype": "dtype"}
HANDED_ON = {
    "transformers.*For*.from_*": ("transformers.PreTrainedModel.from_pretrained", "transformers.LlamaConfig"),
    "transformers.*.from_pretrained": ("transformers.PreTrainedConfig.from_pretrained",),
    "transformers.AutoConfig.*": ("transformers.LlamaConfig",),
    "transformers.AutoTokenizer.*": ("transformers.PreTrainedTokenizerFast",),
    "*.generate": ("transformers.GenerationMixin.generate", "transformers.GenerationConfig"),
    "peft.AutoPeft*": ("transformers.AutoModelForCausalLM.from_pretrained", "peft.PeftModel.from_pretrained"),
    "peft.*.from_pretrained": ("huggingface_hub.hf_hub_download",),
    "datasets.load_dataset": tuple(f"datasets.packaged_modules.{x}Config" for x in ("json.json.Json", "csv.csv.Csv")),
}
SCOPES = (ast.FunctionDef, ast.Lambda, ast.ClassDef, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
COMMAND = re.compile(r"!?(?:.*-m )?(?:trl(?:\.cli)? (?:trl )?|trl\.scripts\.)([a-z]\w*)")
MAGIC = re.compile(r"\A%%(?!time|capture)(?:.|\n)*|^ *(?:!(?!=)|%%?(?=\w))(?:.*\\\n)*.*", re.MULTILINE)
KEYS = re.compile(r"""kwargs(?:\.\w+\(|\[)\s*["'](\w+)["']|["'](\w+)["'] (?:not )?in \w*kwargs\b""")
IMPORTERS = {"need", "import_module", "importorskip"}


# ---- what a source uses ----


class Source:
    """The names of a source: `bound` has what is assigned to them, by scope, or the parts of an imported name."""

    def __init__(self, text):
        self.scope, self.value, self.paths, self.inside = {}, {}, {}, {}
        self.bound, self.added = defaultdict(list), defaultdict(list)
        tree = ast.parse(text)
        self._enter(tree, tree)

    def _enter(self, node, scope):
        for child in ast.iter_child_nodes(node):
            self.scope[child] = scope
            self._bind(child, scope)
            self._enter(child, child if isinstance(child, SCOPES) else scope)

    def _bind(self, node, scope):
        match node:
            case ast.Import(names=names):
                for parts, alias in ((tuple(each.name.split(".")), each.asname) for each in names):
                    self.bound[scope, alias or parts[0]].append(parts if alias else parts[:1])
            case ast.ImportFrom(module=str(module), names=names, level=0):
                for each in names:
                    self.bound[scope, each.asname or each.name].append((*module.split("."), each.name))
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
                self.bound[scope, name].append(node)
            case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Tuple(elts=values)):
                self.value.update(zip(names, values, strict=False))
            case ast.Assign(targets=[target]) | ast.AnnAssign(target=target) | ast.NamedExpr(target=target):
                self.value[target] = node.value
            case ast.AugAssign(target=ast.Name(id=name) as target, value=value):
                self.value[target] = None
                self.added[scope, name].append(value)
            case ast.Name(id=name, ctx=ast.Store()):  # itself, not followed, if a loop, `with` or unpacking binds it
                self.bound[scope, name] += filter(None, [self.value.get(node, node)])

    def meanings(self, name):
        """What a name is bound to where it is used, and what `|=` or `+=` add to it."""
        scope = self.scope[name]
        while (scope, name.id) not in self.bound and scope in self.scope:
            scope = self.scope[scope]
        return self.bound.get((scope, name.id), []), self.added.get((scope, name.id), [])

    def path(self, node):
        """The parts of the library's name that an expression stands for, "()" for a call; None if it is not clear."""
        if node not in self.paths:
            self.paths[node] = None  # meanwhile: a name that is made from itself is not clear
            self.paths[node] = self._path(node)
        return self.paths[node]

    def _path(self, node):
        match node:
            case tuple():
                return node if node[0] in LIBRARIES else None
            case ast.Name():
                found = {self.path(each) for each in self.meanings(node)[0]}
                return found.pop() if len(found) == 1 else None
            case ast.Attribute(value=value, attr=attr):
                return (path := self.path(value)) and (*path, attr)
            case ast.Call(func=func, args=[ast.Constant(str(name))]) if last(func) in IMPORTERS:
                return self.path(tuple(name.split(".")))
            case ast.Call(func=func):
                return (path := self.path(func)) and (*path, "()")

    def parts(self, node):
        """The keywords behind `**` or the words of a command, each with its line, as far as they are clear."""
        if node not in self.inside:
            self.inside[node] = []
            self.inside[node] = self._parts(node)
        return self.inside[node]

    def _parts(self, node):
        inside = []
        match node:
            case ast.keyword(arg=str(word), value=ast.expr(lineno=line)) | ast.Constant(value=str(word), lineno=line):
                return [(word, line)]
            case ast.keyword(value=value) | ast.Starred(value=value) | ast.Subscript(value=value, slice=ast.Slice()):
                inside = [value]
            case ast.Dict(keys=names, values=values):
                inside = [value if name is None else name for name, value in zip(names, values, strict=True)]
            case ast.Call(func=ast.Name(id="dict"), args=args, keywords=keywords):
                inside = [*args, *keywords]
            case ast.BinOp(left=left, op=ast.BitOr() | ast.Add(), right=right) | ast.IfExp(body=left, orelse=right):
                inside = [left, right]
            case ast.List(elts=elements) | ast.Tuple(elts=elements):
                inside = elements
            case ast.Name() if len((found := self.meanings(node))[0]) == 1:
                inside = [*found[0], *found[1]]
            case ast.arg() if getattr(function := self.scope[node], "args", None) and function.args.kwarg is node:
                calls = [each for each in self.scope if isinstance(getattr(each, "func", None), ast.Name)]
                calls = [call for call in calls if self.meanings(call.func)[0] == [function]]
                named = {each.arg for each in function.args.args + function.args.kwonlyargs}
                passed = [part for call in calls for each in call.keywords for part in self.parts(each)]
                return [part for part in passed if part[0] not in named]
        return [part for each in inside for part in self.parts(each)]

    def uses(self):
        """Every use of a library, as (line, path, keyword), and every flag, as (line, ("trl", command), flag)."""
        for node in self.scope:
            paths, keywords, commands, text = [self.path(node)], [], [], ""
            match node:
                case ast.Import(names=names):
                    paths = [self.path(tuple(each.name.split("."))) for each in names]
                case ast.ImportFrom(module=str(module), names=names, level=0):
                    paths = [self.path((*module.split("."), each.name)) for each in names]
                case ast.Call(func=func, args=[first, *_]) if last(func) == "partial":
                    paths, keywords = [self.path(first)], node.keywords
                case ast.Call(func=func):
                    paths, keywords = [self.path(func) or paths[0]], node.keywords
                case ast.Constant(value=str(text)):
                    pass
                case ast.JoinedStr(values=values):
                    text = "".join(each.value if isinstance(each, ast.Constant) else "?" for each in values)
                case ast.List() | ast.Tuple() | ast.Name():
                    commands = [self.parts(node)]
            for path in filter(None, paths):
                yield node.lineno, path, ""
                yield from ((line, path, name) for each in keywords for name, line in self.parts(each))
            lines = text.replace("\\\n", " ").splitlines()
            for words in commands + [[(word, node.lineno) for word in line.split()] for line in lines]:
                if command := COMMAND.match(" ".join(word for word, _ in words)):
                    yield from ((n, ("trl", command[1]), w.split("=")[0]) for w, n in words if w.startswith("--"))


def last(node):
    """The last part of a dotted name, such as `partial` of `functools.partial`."""
    return getattr(node, "attr", getattr(node, "id", ""))


def read(path):
    """The code of a file, and where each line stands; a notebook's magics and shell lines become strings."""
    name, text = path.relative_to(PROJECT).as_posix(), path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text, [f"{name}:{number + 1}" for number in range(text.count("\n") + 1)]
    cells = ["".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    cells = [MAGIC.sub(lambda found: literal(found[0]), cell) for cell in cells]
    return "\n".join(cells), [f"{name}:cell {i + 1}" for i, cell in enumerate(cells) for _ in cell.split("\n")]


def literal(text):
    """A string literal as deep and with as many lines as a text."""
    return text[: len(text) - len(text.lstrip(" "))] + repr(text.lstrip(" ")) + "\n" * text.count("\n")


# ---- what the libraries know ----


def find(path):
    """What a path leads to, and the class if that is an instance's; (None, None) if only a run can tell."""
    if "()" in path:
        i = path.index("()")
        cls, names = find(path[:i])[0], path[i + 1 :]
        if not inspect.isclass(cls) or len(names) != 1:
            return None, None
        if not any(hasattr(cls, name) for name in ("__getattr__", *names)) and not sets(cls, *names):
            raise LookupError(dotted(path))
        return getattr(cls, *names, None), cls
    value = importlib.import_module(path[0])
    for i, name in enumerate(path[1:], 2):
        try:
            value = getattr(value, name) if hasattr(value, name) else importlib.import_module(".".join(path[:i]))
        except (ImportError, RuntimeError) as error:  # the latter from what transformers imports late
            raise LookupError(dotted(path[:i])) from error
    return value, None


@functools.cache
def keywords(path):
    """The keywords that a callable takes, None if only a run can tell."""
    value, cls = find(path)
    try:
        signature = inspect.signature(value).parameters
    except (TypeError, ValueError):
        return None
    known, cls = set(signature), value if inspect.isclass(value) else getattr(value, "__self__", cls)
    if not any(each.kind is each.VAR_KEYWORD for each in signature.values()) and not hasattr(value, "attribute_map"):
        return known
    name = "__init__" if cls is value else value.__name__
    classes = [each for each in ours(cls) if name in vars(each)]
    for each in classes:
        known |= set(inspect.signature(getattr(each, name)).parameters)
    for each in [inspect.unwrap(value), *classes]:
        known |= {key for pair in KEYS.findall(source(each.__module__)) for key in pair}
    known |= set(getattr(cls, "SPECIAL_TOKENS_ATTRIBUTES", ()))
    if hasattr(value, "attribute_map"):
        known |= {*value.attribute_map, *(key for key in dir(value) if getattr(getattr(value, key), "fset", None))}
    further = [each for pattern in HANDED_ON if fnmatch.fnmatch(dotted(path), pattern) for each in HANDED_ON[pattern]]
    return known.union(*(keywords(tuple(each.split("."))) or () for each in further if each != dotted(path)))


@functools.cache
def options(command):
    """The flags that a command of TRL takes."""
    launch = find(("accelerate", "commands", "launch", "launch_command_parser"))[0]()
    parser = find(("trl", "scripts", command, "make_parser"))[0]()
    return {"--config", "--accelerate_config", *parser._option_string_actions, *launch._option_string_actions}


@functools.cache
def source(module):
    return inspect.getsource(importlib.import_module(module))


def sets(cls, name):
    """Whether a class gives its instances an attribute itself."""
    return any(re.search(rf"\bself\.{name}\b", source(each.__module__)) for each in ours(cls))


def ours(cls):
    """The classes of the libraries that a class consists of."""
    return [each for each in getattr(cls, "__mro__", ()) if each.__module__.split(".")[0] in LIBRARIES]


def dotted(path):
    return ".".join(path).replace(".()", "()")


def check(text):
    """Returns (line, what is unknown) -> a hint, then (line, what is deprecated), then how many keywords were known."""
    unknown, deprecated, count = {}, set(), 0
    for line, path, name in set(Source(text).uses()):
        flag = name.startswith("--")
        what = f"{dotted(path)} {name}".replace(".", " ") if flag else f"{dotted(path)}({name})"
        try:
            known = options(path[1]) if flag else keywords(path) if name else find(path) and None
        except LookupError as error:
            unknown[line, str(error.args[0])] = ""
            continue
        if name and known is not None:
            count += name in known
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                unknown[line, what] = f"; there is {near[0]}" if near else ""
            elif name in DEPRECATED:
                deprecated.add((line, f"{what} is deprecated; write {DEPRECATED[name]}"))
    return unknown, deprecated, count


# ---- the two commands ----


def examine():
    """Returns one line for each problem in the project, one for each deprecated keyword, and how many were known."""
    problems, notes, total = [], [], 0
    paths = {path for pattern in SOURCES for path in PROJECT.glob(pattern) if ".ipynb_checkpoints" not in path.parts}
    for path in sorted(paths):
        name, (text, places) = path.relative_to(PROJECT).as_posix(), read(path)
        unknown, deprecated, count = check(text)
        meant = {what for where, what in MEANT if where == name}
        problems += [f"{name}: expected {what} to be unknown" for what in meant - {what for _, what in unknown}]
        problems += [
            f"{places[n - 1]}: {what}{hint}" for (n, what), hint in sorted(unknown.items()) if what not in meant
        ]
        notes += [f"{places[n - 1]}: {what}" for n, what in sorted(deprecated)]
        total += count
    return problems, notes, total


def installed():
    """Prints what the installed libraries do not know; returns the exit code."""
    with quiet():
        versions = ", ".join(f"{name} {importlib.import_module(name).__version__}" for name in LIBRARIES)
        problems, notes, total = examine()
    print(*problems, *notes, f"{len(problems)} unknown, {total} keywords known to {versions}", sep="\n")
    return int(bool(problems))


def newest():
    """Prints what the newest releases do not know: put into a folder of their own, beside this environment's torch."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "--quiet", "--retries=1", "--timeout=20", "install", "--only-binary=:all:"]
        wanted, tried = set(LIBRARIES), set()
        while wanted - tried:
            command = [*pip, "--no-deps", "--upgrade", f"--target={folder}", *sorted(wanted - tried)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print("pip cannot get the newest releases:", (done.stderr.strip() or "no reason").splitlines()[-1])
                return
            tried |= wanted
            wanted = unmet(folder)
        places = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
        command = [sys.executable, __file__]
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": places}, capture_output=True, text=True)
    print("With the newest releases:", done.stdout.strip() or (done.stderr.strip() or "no reason").splitlines()[-1])


def unmet(folder):
    """What the packages in a folder need and neither it nor this environment has, torch aside."""
    wanted = set()
    for package in metadata.distributions(path=[folder]):
        for need in map(Requirement, package.requires or []):
            if need.name != "torch" and (not need.marker or need.marker.evaluate({"extra": ""})):
                have = next(iter(metadata.distributions(name=need.name, path=[folder, *sys.path])), None)
                if not have or not need.specifier.contains(have.version, prereleases=True):
                    wanted.add(f"{need.name}{need.specifier}")
    return wanted


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--newest"]):
        sys.exit(f"expected nothing or --newest, got {' '.join(sys.argv[1:])}")
    sys.exit(newest() if sys.argv[1:] else installed())
