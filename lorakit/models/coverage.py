"""What of a model has been reached and what has been left out, by kind: routers, norms, convolutions ..."""

from collections.abc import Callable, Iterable, Mapping

from torch import nn

from lorakit.layers.bases import is_conv1d
from lorakit.models.targets import expert_blocks, find_experts, is_router, output_heads, plain_modules

USUAL = ("embeddings", "output head", "norms", "biases")  # what nobody expects to be reached
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
Kinds = dict[str, dict[str, int]]  # kind -> parameter -> its numbers


def by_kind(model: nn.Module, is_reached: Callable[[str, str], bool]) -> Kinds:
    """The parameters of a model, without adapters', that are not reached.

    Args:
        model: plain or with adapters.
        is_reached: of a module's name and the name that a parameter has in it.
    """
    found, seen, kind_of = Kinds(), set[int](), _kinds(model)
    for name, module in plain_modules(model):
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen and not is_reached(name, key):
                found.setdefault(kind_of(name, module, key), {})[f"{name}.{key}"] = parameter.numel()
            seen.add(id(parameter))
    return found


def unusual(kinds: Mapping[str, Mapping[str, int]], without: Iterable[str] = ()) -> dict[str, int]:
    """How many numbers have been left out of each kind that one would not expect."""
    return {kind: sum(of.values()) for kind, of in kinds.items() if kind not in (*USUAL, *without)}


def _kinds(model: nn.Module) -> Callable[[str, nn.Module, str], str]:
    heads, experts, blocks = output_heads(model), find_experts(model), expert_blocks(model)

    def kind_of(name: str, module: nn.Module, key: str) -> str:
        cls = type(module).__name__.lower()
        matrices = [p for p in module.parameters(recurse=False) if p.ndim == 2]
        if any(module is head for head in heads):
            return "output head"
        if isinstance(module, nn.Embedding) or "embedding" in cls:
            return "embeddings"
        if "norm" in cls:
            return "norms"
        if any(is_router(name, len(p), blocks) for p in matrices):
            return "routers"
        if isinstance(module, CONVOLUTIONS):
            return "convolutions"
        if key in experts.get(name, ()):
            return "experts"
        if key.endswith("bias"):
            return "biases"
        return "linear layers" if isinstance(module, nn.Linear) or is_conv1d(module) else "other weights"

    return kind_of
