"""Put adapters into any model, count what trains, and take them out again: merged or removed."""

import difflib
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass

from torch import nn

from lorakit.lora import LoRALinear, linear_shape

HEAD_NAMES = ("score", "classifier")  # a classifier's output layer, as transformers names it


@dataclass(frozen=True)
class Count:
    """Numbers of parameters; a weight that two modules share counts once."""

    trainable: int
    total: int

    @property
    def percent(self) -> float:
        """Share of the parameters that train, in percent."""
        return 100 * self.trainable / self.total

    def __str__(self) -> str:
        return f"trainable {self.trainable:,} of {self.total:,} parameters ({self.percent:.2f} %)"


def count(model: nn.Module) -> Count:
    """Counts the trainable and all parameters of a model, adapters included."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return Count(sum(n for n, grad in sizes if grad), sum(n for n, _ in sizes))


def is_adapter(module: nn.Module) -> bool:
    """True for a module that wraps a `base` and can return it `merged()`: LoRALinear, or a reader's own layer."""
    return isinstance(getattr(module, "base", None), nn.Module) and callable(getattr(module, "merged", None))


def adapters(model: nn.Module) -> dict[str, nn.Module]:
    """The adapters in a model by the name of the layer each one wraps, in the model's order."""
    return {name: module for name, module in model.named_modules() if is_adapter(module)}


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All linear-like layers by name, in the model's order; a layer that is registered twice appears once."""
    found = {}
    for name, module in model.named_modules():
        try:
            linear_shape(module)
        except ValueError:
            continue
        if name:
            found[name] = module
    return found


def output_heads(model: nn.Module) -> list[nn.Module]:
    """The layers that turn hidden states into scores: the output embeddings, or a classifier."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    if head is not None:
        return [head]
    return [m for name, m in model.named_children() if name in HEAD_NAMES] if hasattr(model, "config") else []


def is_named(name: str, target: str) -> bool:
    """True if `target` is the layer's full name or the last parts of it: 'q_proj' names 'layers.0.attn.q_proj'."""
    return name == target or name.endswith("." + target)


def find_targets(model: nn.Module, targets: str | Iterable[str] = "all-linear") -> list[str]:
    """Names of the linear layers that `targets` chooses, in the model's order.

    Args:
        model: any module.
        targets: `"all-linear"` for every linear layer but the output head; a list of names, each a full name or its
            last parts (`"q_proj"`); or a string, a regular expression for the full name or its last parts.

    Raises:
        ValueError: a target chooses nothing (the message lists near names), or is not a valid expression.
    """
    layers = linear_layers(model)
    if isinstance(targets, str) and targets == "all-linear":
        heads = output_heads(model)
        chosen = [name for name, module in layers.items() if not any(module is head for head in heads)]
        if not chosen:
            raise ValueError(f"expected linear layers in the model, got none in {type(model).__name__}")
        return chosen
    if isinstance(targets, str):
        try:
            pattern = re.compile(rf"(.*\.)?({targets})")
        except re.error as error:
            raise ValueError(f"expected a regular expression, got {targets!r}: {error}") from None
        matches = {targets: [name for name in layers if pattern.fullmatch(name)]}
    else:
        matches = {target: [name for name in layers if is_named(name, target)] for target in targets}
    if not matches:
        raise ValueError("expected at least one target, got an empty list")
    for target, names in matches.items():
        if not names:
            raise ValueError(_no_match(model, target, layers))
    chosen = {name for names in matches.values() for name in names}
    return [name for name in layers if name in chosen]


def _no_match(model: nn.Module, target: str, layers: Iterable[str]) -> str:
    other = next((type(m).__name__ for name, m in model.named_modules() if name and is_named(name, target)), None)
    if other is not None:
        return f"expected targets that are linear layers, got {target!r}, which is a {other}"
    known = dict.fromkeys([*(name.rsplit(".", 1)[-1] for name in layers), *layers])
    near = difflib.get_close_matches(target, known, n=4, cutoff=0.4) or list(known)[:8]
    return f"expected targets that match a linear layer, got {target!r}; near names: {', '.join(near) or 'none'}"


def shared_weights(model: nn.Module) -> set[int]:
    """The `id` of every parameter that the model holds in more than one place."""
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return {place for place, times in uses.items() if times > 1}


def check_plain(model: nn.Module) -> None:
    """Refuses a model that carries an adapter, lorakit's or PEFT's."""
    if adapters(model):
        raise ValueError("expected a plain model, got one with adapters: call merge() or remove() first")
    if hasattr(model, "peft_config") or any(name.endswith("lora_A") for name, _ in model.named_modules()):
        raise ValueError("expected a plain model, got one that PEFT has adapted: call its unload() first")


def replace(model: nn.Module, modules: dict[nn.Module, nn.Module]) -> None:
    """Puts each new module wherever the model has the old one, in place."""
    for parent, child, module in places(model, modules):
        setattr(parent, child, modules[module])


def places(model: nn.Module, modules: Container[nn.Module]) -> list[tuple[nn.Module, str, nn.Module]]:
    """Every place at which a model holds one of `modules`, as (parent, name in it, module)."""
    found = []
    for parent in model.modules():
        found += [(parent, child, module) for child, module in parent._modules.items() if module in modules]
    return found


def wrap(model: nn.Module, names: Iterable[str], make: Callable[[str, nn.Module], nn.Module]) -> Count:
    """Replaces each named layer by `make(name, layer)` and freezes everything but the new parameters.

    All new modules are made before the first is put in, so that an error leaves the model as it was. A layer that is
    registered under several names gets one adapter, seen under all of them.
    """
    check_plain(model)
    grads = {p: p.requires_grad for p in model.parameters()}
    made: dict[nn.Module, nn.Module] = {}
    try:
        for name in names:
            base = model.get_submodule(name)
            if base not in made:
                made[base] = make(name, base)
    except BaseException:
        for parameter, grad in grads.items():
            parameter.requires_grad_(grad)
        raise
    model.requires_grad_(False)
    replace(model, made)
    return count(model)


def inject(
    model: nn.Module,
    rank: int,
    alpha: float,
    targets: str | Iterable[str] = "all-linear",
    layer: Callable[..., nn.Module] = LoRALinear,
    **settings,
) -> Count:
    """Wraps the chosen linear layers of a model in adapters and freezes the rest, in place.

    Args:
        model: any module: Llama-like, GPT-2 with its Conv1D, BERT, or the reader's own.
        rank: inner dimension of every adapter.
        alpha: numerator of the scale.
        targets: which layers, as in `find_targets`.
        layer: the adapter's class, called as `layer(base, rank, alpha, **settings)`.
        settings: passed on, for LoRALinear `dropout` and `scaling`.

    Returns:
        how many parameters train, and of how many.

    Raises:
        ValueError: the model carries adapters, a target matches nothing, or a setting is out of range. The model is
            then as it was.
    """
    check_plain(model)
    return wrap(model, find_targets(model, targets), lambda _, base: layer(base, rank, alpha, **settings))


def merge(model: nn.Module) -> nn.Module:
    """Adds every adapter's update to the weight it wraps and returns the plain model, which is the same object.

    Every floating-point parameter requires a gradient afterwards, as after loading a model. An output layer that shared
    its weight with the input embedding and was adapted is its own weight from here on.

    Raises:
        ValueError: the model carries no adapter, or a base is quantised.
    """
    found = adapters(model)
    if not found:
        raise ValueError("expected a model with adapters, got a plain one")
    if shared_weights(model) & {id(getattr(layer.base, "weight", None)) for layer in found.values()}:
        _untie(model)
    return _unwrap(model, lambda layer: layer.merged())


def remove(model: nn.Module) -> nn.Module:
    """Takes the adapters out and returns the plain model, which is the same object with the base's weights."""
    return _unwrap(model, lambda layer: layer.removed() if isinstance(layer, LoRALinear) else layer.base)


def _unwrap(model: nn.Module, plain_of: Callable[[nn.Module], nn.Module]) -> nn.Module:
    plain: dict[nn.Module, nn.Module] = {}
    for parent, child, layer in places(model, set(adapters(model).values())):
        if layer not in plain:
            plain[layer] = plain_of(layer)
        setattr(parent, child, plain[layer])  # one by one: never more than one layer in memory twice
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return model


def _untie(model: nn.Module) -> None:
    """Tells a transformers model that its output layer no longer is its input embedding, so that saving keeps both."""
    for config in [getattr(model, "config", None), getattr(getattr(model, "config", None), "text_config", None)]:
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
