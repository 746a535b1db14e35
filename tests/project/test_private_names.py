"""Private names of other packages that lorakit uses: each is here with what to do when it goes, and is still there.

A private name is one that begins with an underscore, or that is replaced in somebody's module for a while.
"""

import ast
import importlib
from functools import reduce
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "lorakit"
WATCHED = {  # name as the code writes it -> where it lives, and what to do
    "torch._C._autograd._top_saved_tensors_default_hooks": (
        "torch._C._autograd._top_saved_tensors_default_hooks",
        "layers/shortcuts.may_be_recomputed asks whether checkpointing runs: see torch.utils.checkpoint for its hooks",
    ),
    "torch._C._are_functorch_transforms_active": (
        "torch._C._are_functorch_transforms_active",
        "layers/shortcuts.is_transformed alone uses it: look for torch's public name, or give the autograd functions "
        "setup_context and a vmap rule, so that torch.func can follow them",
    ),
    **{
        f"module.{name}": (
            f"torch.nn.Module().{name}",
            "layers/bases.is_watched asks whether a layer has hooks: find where nn.Module keeps them now",
        )
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    },
    **{
        f"{layer}._parameters": (
            "torch.nn.Module()._parameters",
            "layers/bases and layers/trial ask whether a weight is a parameter: named_parameters(recurse=False) tells",
        )
        for layer in ("module", "layer")
    },
    "parent._modules": (
        "torch.nn.Module()._modules",
        "models/inject.replace: named_children passes over shared modules",
    ),
    "Tensor._make_wrapper_subclass": (
        "torch.Tensor._make_wrapper_subclass",
        "layers/read_weight describes a tensor without its memory: see 'Extending PyTorch' for how it is done now",
    ),
    "super()._apply": (
        "torch.nn.Module()._apply",
        "layers/nf4_linear keeps absmax in float32 through it: see Module.to",
    ),
    "model.config._name_or_path": (
        "transformers.LlamaConfig()._name_or_path",
        "merging/export asks where a model came from: model.name_or_path is public",
    ),
    "torch._subclasses.FakeTensorMode": (
        "torch._subclasses.FakeTensorMode",
        "cost/fake_step: torch's documentation of fake tensors imports it from here; look where that does now",
    ),
    **{
        name: (
            name,
            "the documented door for dispatch modes and trees of tensors: look where torch's own modes import it",
        )
        for name in (
            "torch.utils._python_dispatch.TorchDispatchMode",
            "torch.utils._pytree.tree_leaves",
            "torch.utils._pytree.tree_map_only",
        )
    },
    "func._overloadpacket": (
        "torch.ops.aten.mm.default._overloadpacket",
        "cost/ledger: FlopCounterMode finds its formulas by it; see torch.utils.flop_counter",
    ),
    **{
        f"aten.{name}": (
            f"torch.ops.aten.{name}",
            "cost/ledger counts its FLOPs: see which operator attention uses now",
        )
        for name in (
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_flash_attention_backward",
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_flash_attention_for_cpu_backward",
            "_grouped_mm",
        )
    },
    "find_packed_sequence_indices": (
        "transformers.masking_utils.find_packed_sequence_indices",
        "cost/fake_step replaces it: without, masks look at values that fake tensors do not have",
    ),
    "tqdm": (
        "transformers.modeling_gguf_pytorch_utils.tqdm",
        "models/download replaces it: without, converting the base model draws a bar of its own",
    ),
    "has_avx512bf16": (
        "bitsandbytes.nn.modules.has_avx512bf16",
        "layers/bnb replaces it, so that 4-bit weights are not repacked: see how Linear4bit decides now",
    ),
    "support_avx512bf16_for_cpu": (
        "bitsandbytes.nn.Linear4bit(64, 64).support_avx512bf16_for_cpu",
        "layers/bnb.keep_order sets it on each layer: see how Linear4bit.forward decides now",
    ),
}


def find(place):
    """The object of a dotted name; a call of a class in it is made."""
    parts = place.replace("64, 64", "64,64").split(".")
    for end in range(len(parts), 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue

        def get(owner, part):
            name, call, arguments = part.partition("(")
            found = getattr(owner, name)
            return found(*map(int, filter(None, arguments.rstrip(")").split(",")))) if call else found

        return reduce(get, parts[end:], module)
    raise ImportError(place)


def private_names(source):
    """Yields what a source reads of others that begins with an underscore."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            owner = ast.unparse(node.value)
            if owner not in ("self", "cls"):
                yield f"{owner}.{node.attr}"
        elif isinstance(node, ast.ImportFrom) and not node.module.startswith(("lorakit", "__")):
            for alias in node.names:
                if "._" in f".{node.module}.{alias.name}":
                    yield f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func).startswith("mock.patch"):
            target = next(arg.value for arg in node.args if isinstance(arg, ast.Constant))
            yield target.rpartition(".")[2]


@pytest.mark.parametrize(("place", "advice"), WATCHED.values(), ids=WATCHED)
def test_a_private_name_is_still_there(place, advice):
    try:
        find(place)
    except (ImportError, AttributeError):
        pytest.fail(f"{place} is gone. {advice}")


def test_a_name_that_is_gone_is_noticed():
    with pytest.raises(AttributeError):
        find("torch._C._no_such_thing")
    with pytest.raises(AttributeError):
        find("torch.nn.Module()._no_such_thing")


def test_every_private_name_is_watched():
    own = {
        "ByteAbsmax._fields",
        "torch._C",
        "torch._C._autograd",
    }  # a named tuple's fields are public; the module of another name here
    for path in sorted(PACKAGE.rglob("*.py")):
        strange = set(private_names(path.read_text(encoding="utf-8"))) - set(WATCHED) - own
        assert not strange, f"{path.name}: use a public name instead, or watch it here: {sorted(strange)}"


def test_no_watch_is_left_over():
    text = "\n".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    assert not [name for name in WATCHED if name.rpartition(".")[2] not in text]


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("x = torch._C._thing()", {"torch._C._thing", "torch._C"}),
        ("from torch._inner import thing", {"torch._inner.thing"}),
        ("from lorakit._optional import need\nself._own = 1", set()),
        ("mock.patch('other.module.thing', create=True)", {"thing"}),
    ],
)
def test_private_names_are_found(source, names):
    assert set(private_names(source)) == names
