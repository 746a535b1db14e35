"""Put adapters into any model, count what trains, and take them out again: merged or removed."""

import sys
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from lorakit._random import alone
from lorakit.layers.adapter import is_adapter
from lorakit.layers.config import LoRAConfig
from lorakit.layers.lora import LoRALinear
from lorakit.models.beside import plan
from lorakit.models.coverage import USUAL, Kinds, by_kind, unusual
from lorakit.models.targets import named_modules

FIELDS = (  # of a LoRAConfig, by their names in `inject`
    *("dropout", "scale_rule", "rank_pattern", "alpha_pattern", "target_parameters"),
    *("exclude_modules", "layers_to_transform", "layers_pattern"),
    *("modules_to_save", "trainable_token_indices", "ensure_weight_tying"),
)


@dataclass(frozen=True)
class Count:
    """Numbers of parameters; a weight that two modules share counts once."""

    trainable: int
    total: int
    left_out: dict[str, int] = field(default_factory=dict, compare=False)  # kind -> its numbers without an adapter

    @property
    def percent(self) -> float:
        """Share of the parameters that train, in percent."""
        return 100 * self.trainable / self.total

    def __str__(self) -> str:
        rest = ", ".join(f"{kind} {n:,}" for kind, n in self.left_out.items() if kind not in (*USUAL, "linear layers"))
        words = f"trainable {self.trainable:,} of {self.total:,} parameters ({self.percent:.2f} %)"
        return f"{words}; without an adapter: {rest}" if rest else words


def check_module(model: nn.Module) -> None:
    """Refuses what is no module, such as a model's name."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a model, got {type(model).__name__}")


def count(model: nn.Module) -> Count:
    """Counts the trainable and all parameters of a model, adapters included, and what has no adapter, by kind."""
    check_module(model)
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    left = {kind: sum(of.values()) for kind, of in without_adapter(model).items()}
    return Count(sum(n for n, grad in sizes if grad), sum(n for n, _ in sizes), left)


def without_adapter(model: nn.Module) -> Kinds:
    """The parameters that no adapter changes, by kind; none in a model without adapters."""
    layers = adapters(model)

    def is_reached(name: str, key: str) -> bool:
        return name in layers and key in getattr(layers[name], "settings", (key,))

    return by_kind(model, is_reached) if layers else {}


def adapters(model: nn.Module) -> dict[str, Any]:
    """The adapters in a model by the name of the layer each one wraps, in the model's order."""
    check_module(model)
    found: dict[str, Any] = {}
    outer = None  # of an adapter that holds several, these are not found: it stands for the one that is chosen
    for name, module in named_modules(model):
        if is_adapter(module) and not (outer is not None and name.startswith(f"{outer}.")):
            found[name], outer = module, name
    return found


def shared_weights(model: nn.Module) -> set[int]:
    """The `id` of every parameter that several modules of the model have, as a tied head and its embedding do."""
    check_module(model)
    uses = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    return {place for place, times in uses.items() if times > 1}


def check_plain(model: nn.Module) -> None:
    """Refuses a model that carries an adapter, lorakit's or PEFT's."""
    if adapters(model):
        raise ValueError(
            "expected a plain model, got one with adapters: remove() takes them out, such as for another rank, "
            "and merge() puts what they have learned into the weights"
        )
    if hasattr(model, "peft_config") or any(name.endswith("lora_A") for name, _ in model.named_modules()):
        raise ValueError("expected a plain model, got one that PEFT has adapted: call its unload() first")


def replace(model: nn.Module, modules: dict[nn.Module, nn.Module]) -> None:
    """Puts each new module wherever the model has the old one, in place."""
    for parent, child, module in places(model, modules):
        setattr(parent, child, modules[module])


def places(model: nn.Module, modules: Container[nn.Module]) -> list[tuple[nn.Module, str, nn.Module]]:
    """Every place at which a model holds one of `modules`, as (parent, name in it, module).

    Raises:
        ValueError: one is what `torch.compile` was called with, which cannot be replaced under it.
    """
    found = []
    for parent in model.modules():
        if type(parent).__name__ == "OptimizedModule" and any(child in modules for child in parent.children()):
            raise ValueError("expected a layer inside of what is compiled, got one compiled alone: its code would stay")
        held = [(child, module) for child, module in parent._modules.items() if module is not None]
        found += [(parent, child, module) for child, module in held if module in modules]
    return found


@contextmanager
def named(name: str) -> Iterator[None]:
    """While it is open, a layer that refuses something is named."""
    try:
        yield
    except ValueError as error:
        if type(error) is not ValueError or repr(name) in str(error):
            raise
        raise ValueError(f"{error}, for layer {name!r}") from error


def wrap(model: nn.Module, names: Iterable[str], make: Callable[[str, nn.Module], nn.Module]) -> nn.Module:
    """Replaces each named layer by `make(name, layer)`, freezes all but the new parameters, returns the model.

    All new modules are made before the first is put in, so that an error leaves the model as it was. A layer that is
    registered under several names gets one adapter, seen under all of them.
    """
    check_plain(model)
    modules, made = dict(named_modules(model)), dict[nn.Module, nn.Module]()
    with grads_kept(model):
        for name in names:
            if modules[name] not in made:
                with named(name):
                    made[modules[name]] = make(name, modules[name])
        held = places(model, made)
    model.requires_grad_(False)
    for parent, child, module in held:
        setattr(parent, child, made[module])
    return model


@contextmanager
def grads_kept(model: nn.Module) -> Iterator[None]:
    """If what is inside fails, each parameter requires a gradient as it did before."""
    grads = {p: p.requires_grad for p in model.parameters()}
    try:
        yield
    except BaseException:
        for parameter, grad in grads.items():
            if parameter.requires_grad != grad:  # an uninitialised one cannot be asked to
                parameter.requires_grad_(grad)
        raise


def inject(
    model: nn.Module,
    rank: int | LoRAConfig,
    alpha: float | None = None,
    targets: str | Iterable[str] = "all-linear",
    layer: Callable[..., nn.Module] = LoRALinear,
    **settings,
) -> nn.Module:
    """Wraps the chosen linear layers of a model in adapters and freezes the rest, in place.

        lorakit.inject(model, rank=16, alpha=32)
        lorakit.inject(model, lorakit.LoRAConfig(16, 32))  # the same
        lorakit.inject(bert, rank=16, alpha=32, modules_to_save=["classifier"])
        lorakit.inject(model, rank=16, alpha=32, trainable_token_indices=tokenizer.convert_tokens_to_ids(new_tokens))

    Args:
        model: any module: Llama-like, GPT-2 with its Conv1D, BERT, or the reader's own.
        rank: inner dimension of every adapter; or a LoRAConfig, which has all of the settings.
        alpha: numerator of the scale.
        targets: which layers, as in `find_targets`.
        layer: the adapter's class, called as `layer(base, rank, alpha, **settings)`.
        settings: more of a `LoRAConfig`, such as `dropout`, `scale_rule`, `rank_pattern`, `exclude_modules`,
            `layers_to_transform`, `target_parameters`, `modules_to_save` and `trainable_token_indices`; and what other
            classes have more.

    Returns:
        the same model; `count` says how many of its parameters train, and what has no adapter. Of "all-linear" that is
        printed as well, a line for each kind but embeddings, output head, norms and biases.

    Raises:
        ValueError: the model carries adapters, a target matches nothing, or a setting is out of range. The model is
            then as it was.
    """
    if not isinstance(rank, LoRAConfig):
        own = {name: settings.pop(name) for name in FIELDS if name in settings}
        config = LoRAConfig(rank, cast(float, alpha), targets=targets, layer=layer, settings=settings, **own)
    elif alpha is not None or settings or layer is not LoRALinear or targets != "all-linear":
        raise ValueError(
            "expected a LoRAConfig alone, got further settings beside it: dataclasses.replace makes another"
        )
    else:
        config = rank
    put_in(model, config)
    if config.targets == "all-linear":
        _tell(without_adapter(model))
    return model


def put_in(model: nn.Module, config: LoRAConfig) -> nn.Module:
    """As `inject`, without a word."""
    check_plain(model)
    lora, beside = plan(model, config)
    makers = lora | beside
    with alone:  # another thread's training has the random state while it draws
        return wrap(model, makers, lambda name, base: makers[name](base))


def _tell(left: Kinds) -> None:
    """Says what "all-linear" has left out, a line for each kind that one would not expect."""
    for kind, number in unusual(left, without=["linear layers"]).items():
        first, *others = left[kind]
        where = f"in {first} and {len(others)} more" if others else f"in {first}"
        print(f"lorakit: without an adapter: {kind}, {number:,} parameters {where}", file=sys.stderr)
