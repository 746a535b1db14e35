"""Which layers of a model get an adapter: all linear ones, or those that a name or an expression chooses."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from lorakit._suggest import near_names
from lorakit.layers.adapter import is_adapter
from lorakit.layers.bases import FLOATS, is_conv1d, is_known, linear_shape
from lorakit.layers.config import LoRAConfig, matches
from lorakit.layers.trial import check_embedding, check_linear

HEAD_NAMES = ("score", "classifier")  # a classifier's output layer, as transformers names it
WRAPPERS = {  # class -> the name under which it holds what it wraps
    "OptimizedModule": "_orig_mod",  # torch.compile's
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "DeepSpeedEngine": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
}


def wraps(module: nn.Module) -> str | None:
    """The name under which a wrapper, such as torch.compile's, holds what it wraps; None for other modules."""
    held = next((WRAPPERS[each.__name__] for each in type(module).__mro__ if each.__name__ in WRAPPERS), None)
    return held if held is not None and isinstance(getattr(module, held, None), nn.Module) else None


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, without the wrappers around it."""
    while (held := wraps(model)) is not None:
        model = getattr(model, held)
    return model


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As torch's, without wrappers and their names: a module is called the same whether or not its model is compiled,
    sharded or copied to several devices."""
    plain: dict[str, str] = {"": ""}
    held: dict[str, str | None] = {}
    for name, module in model.named_modules():
        parent, _, step = name.rpartition(".")
        if name:
            plain[name] = plain[parent] if held[parent] == step else f"{plain[parent]}.{step}".removeprefix(".")
        held[name] = wraps(module)
        if held[name] is None:
            yield plain[name], module


def plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As `named_modules`, with the bases of adapters in their places, and nothing that is inside of those."""
    adapted = set()
    for name, module in named_modules(model):
        if not any(each in adapted for each in parents(name)):
            if is_adapter(module):
                adapted.add(name)
            yield name, getattr(module, "base", module) if name in adapted else module


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All linear-like layers by name, in the model's order; a layer that is registered twice appears once."""
    return {name: m for name, m in named_modules(model) if name and (_is_linear(m) or not _refusal(_check_linear, m))}


def adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All layers that can have an adapter, by name, in the model's order: linear ones, and embeddings."""
    linear = linear_layers(model)
    modules = {name: m for name, m in named_modules(model) if name}
    return {name: m for name, m in modules.items() if name in linear or not _refusal(check_embedding, m)}


def _is_linear(module: nn.Module) -> bool:
    """True for one that is linear by its class: if nobody can compute with its weight, it is refused, not left out."""
    quantised = type(module).__module__.startswith("torch.ao.") and hasattr(module, "out_features")
    return type(module) in (nn.Linear, nn.LazyLinear) or is_conv1d(module) or quantised


def _check_linear(module: nn.Module) -> None:
    check_linear(module, *linear_shape(module))


def _refusal(check: Callable[[nn.Module], None], module: nn.Module) -> str | None:
    """What a check says against a module; None if it says nothing."""
    try:
        check(module)
    except ValueError as error:
        return str(error)
    return None


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


def is_target(name: str, targets: str | Iterable[str]) -> bool:
    """True if `targets`, names or a regular expression as for `find_targets`, choose a layer of that name."""
    if isinstance(targets, str):
        return matches(targets, name)
    return any(is_named(name, target) for target in targets)


def find_targets(model: nn.Module, targets: str | Iterable[str] = "all-linear") -> list[str]:
    """Names of the linear layers, and embeddings, that `targets` chooses, in the model's order.

    Args:
        model: any module.
        targets: `"all-linear"` for every linear layer but the output head and routers; a list of names, each a full
            name or its last parts (`"q_proj"`, `"embed_tokens"`); or a string, a regular expression for the full name
            or its last parts, which may name embeddings, too.

    Raises:
        ValueError: a target chooses nothing (the message lists near names), is not a valid expression, or takes long to
            match.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a model, got {type(model).__name__}")
    if not isinstance(targets, str):
        names: list[Any] = (
            list(targets) if isinstance(targets, Iterable) and not isinstance(targets, Mapping | bytes) else [targets]
        )
        if any(not isinstance(name, str) for name in names):
            raise ValueError(f"expected targets as names or one regular expression, got {targets!r}")
        targets = names
    if isinstance(targets, str) and targets == "all-linear":
        layers = linear_layers(model)
        heads, blocks = output_heads(model), expert_blocks(model)
        chosen = [name for name, module in layers.items() if not any(module is head for head in heads)]
        chosen = [name for name in chosen if not (blocks and is_router(name, linear_shape(layers[name])[0], blocks))]
        if not chosen:
            raise ValueError(f"expected linear layers in the model, got none in {type(model).__name__}")
        return chosen
    layers = adaptable_layers(model)
    if isinstance(targets, str):
        found = {targets: [name for name in layers if is_target(name, targets)]}
    else:
        found = {target: [name for name in layers if is_named(name, target)] for target in targets}
    if not found:
        raise ValueError("expected at least one target, got an empty list")
    for target, names in found.items():
        if not names:
            raise ValueError(_no_match(model, target, layers))
    named = {name for names in found.values() for name in names}
    return [name for name in layers if name in named]


def chosen_layers(model: nn.Module, config: LoRAConfig) -> dict[str, tuple[str, ...]]:
    """The layers that a config gives an adapter -> (), and the modules of which it adapts parameters -> their names.

    Exclusions and blocks by number hold for layers, and for experts beside "all-linear"; `target_parameters` that are
    named are meant, as in PEFT.

    Raises:
        ValueError: as `find_targets`; a name or a number to exclude or to keep is none of the model's; a weight is
            chosen twice; or nothing is left.
    """
    parameters = find_parameters(model, config.target_parameters or ())
    experts = find_experts(model) if config.target_parameters is None and config.targets == "all-linear" else {}
    layers = find_targets(model, config.targets) if config.targets or not parameters else []
    for name in layers:
        if twice := [each for each in [*parents(name), name] if each in parameters]:
            raise ValueError(f"expected each weight once, got targets with {name!r}, target_parameters {twice[0]!r}")
    stacks = [f"{name}.{key}" for name, keys in experts.items() for key in keys]
    if not isinstance(config.exclude_modules, str):
        known = [*(name for name, _ in named_modules(model)), *stacks]
        for target in config.exclude_modules:
            if not any(is_named(name, target) for name in known):
                last = dict.fromkeys(name.rsplit(".", 1)[-1] for name in [*layers, *stacks])
                raise ValueError(f"expected exclude_modules that match a layer, {near_names(target, last)}")
    blocks = {config.block(name) for name in [*layers, *stacks]}
    if strange := [number for number in config.layers_to_transform if number not in blocks]:
        numbers = sorted(number for number in blocks if number is not None)
        raise ValueError(f"expected layers_to_transform in {numbers}, got {strange[0]}")
    left = {name: tuple(k for k in keys if config.keeps(f"{name}.{k}")) for name, keys in experts.items()}
    kept = {name: () for name in layers if config.keeps(name)} | parameters
    kept |= {name: keys for name, keys in left.items() if keys and config.keeps(name)}
    if not kept:
        chosen = ", ".join([*layers, *stacks][:3])
        raise ValueError(f"expected layers that are not excluded, got none of {chosen} and the like")
    heads = output_heads(model)
    if isinstance(config.targets, str):
        modules = {name: model.get_submodule(name) for name in kept if name.rsplit(".", 1)[-1] not in config.targets}
        ends = {name: "the output head" for name, module in modules.items() if any(module is head for head in heads)}
        ends |= {name: "an embedding" for name, module in modules.items() if isinstance(module, nn.Embedding)}
        for name, what in ends.items():
            warnings.warn(
                f"{config.targets!r} chooses {what}, too: exclude_modules={[name]} leaves it out", stacklevel=4
            )
    return kept


def find_experts(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The parameters that hold a mixture's experts as a stack, (E, ., .), by the name of the module that has them.

    Told by the word "expert" in the module's name or class, or by a `num_experts` that is E.
    """
    found = {}
    for name, module in plain_modules(model):
        stacks = {key: p for key, p in module.named_parameters(recurse=False) if p.ndim == 3 and p.dtype in FLOATS}
        says_so = "expert" in f"{name} {type(module).__name__}".lower()
        if chosen := [k for k, p in stacks.items() if says_so or getattr(module, "num_experts", None) == len(p)]:
            found[name] = tuple(chosen)
    return found


def find_parameters(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The parameters that `names` choose, each a full name or its last parts, by the name of the module that has them.

    Source: the `target_parameters` of PEFT 0.21.

    Raises:
        ValueError: a name chooses nothing; the message lists near names.
    """
    there = {name: _parameters(module) for name, module in plain_modules(model) if name}
    for target in names:
        if not any(is_named(f"{name}.{key}", target) for name, keys in there.items() for key in keys):
            known = dict.fromkeys(f"{name.rsplit('.', 1)[-1]}.{key}" for name, keys in there.items() for key in keys)
            raise ValueError(f"expected target_parameters that match a parameter, {near_names(target, known)}")
    found = {name: tuple(k for k in keys if is_target(f"{name}.{k}", list(names))) for name, keys in there.items()}
    return {name: keys for name, keys in found.items() if keys}


def _parameters(module: nn.Module) -> list[str]:
    """Names of a module's own parameters; a quantised linear layer's weight is one as well."""
    own = dict(module.named_parameters(recurse=False))
    return [*own, *(["weight"] if "weight" not in own and is_known(module) else [])]


def expert_blocks(model: nn.Module) -> dict[str, tuple[str, int]]:
    """The blocks that are mixtures, by name: the name of the experts in it, and how many they are."""
    modules = dict(plain_modules(model))
    experts = {name: len(modules[name].get_parameter(keys[0])) for name, keys in find_experts(model).items()}
    for name, module in modules.items():
        if isinstance(module, nn.ModuleList) and "expert" in name.rsplit(".", 1)[-1]:
            experts[name] = len(module)
    return {name.rpartition(".")[0]: (name, number) for name, number in experts.items()}


def is_router(name: str, outputs: int, blocks: Mapping[str, tuple[str, int]]) -> bool:
    """True for a layer that chooses among experts: in a block with them, with one output for each."""
    around = parents(name)
    return any(
        outputs == number and experts not in (*around, name)
        for experts, number in (blocks[each] for each in around if each in blocks)
    )


def parents(name: str) -> list[str]:
    """The names of all modules that have the module of this name in them."""
    steps = name.split(".")
    return [".".join(steps[:end]) for end in range(len(steps))]


def _no_match(model: nn.Module, target: str, layers: Iterable[str]) -> str:
    other = next((m for name, m in named_modules(model) if name and is_named(name, target)), None)
    if other is not None:
        check = check_embedding if isinstance(other, nn.Embedding) else _check_linear
        why = f": {_refusal(check, other)}" if check is check_embedding or hasattr(other, "out_features") else ""
        return f"expected targets that are linear layers, got {target!r}, which is a {type(other).__name__}{why}"
    known = dict.fromkeys(name.rsplit(".", 1)[-1] for name in layers)
    return f"expected targets that match a linear layer, {near_names(target, known)}"
