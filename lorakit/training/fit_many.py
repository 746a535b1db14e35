"""Train many adapters at once over one frozen model: the same runs as one by one, in a fraction of the time."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from lorakit._numbers import check_integer, check_list, check_positive
from lorakit._random import seeded
from lorakit._words import short
from lorakit.layers.config import LoRAConfig
from lorakit.layers.experts import LoRAExperts
from lorakit.layers.lora import LoRALinear
from lorakit.layers.multi_lora import LoRAStack
from lorakit.models.inject import adapters, check_plain, put_in, replace, wrap
from lorakit.models.merge import remove
from lorakit.models.targets import named_modules
from lorakit.training.batch import Example, check_examples
from lorakit.training.fit import Run, train
from lorakit.training.history import History
from lorakit.training.recipe import Recipe


@dataclass(frozen=True)
class Spec:
    """What one adapter is and how it learns."""

    config: LoRAConfig  # of plain LoRA without dropout
    lr: float
    seed: int = 0  # of the start of A and of the data's order


@dataclass
class Fitted:
    """A trained adapter outside of the model, and its training."""

    spec: Spec
    history: History
    layers: dict[str, LoRALinear]  # by the name of the layer that each wraps
    error: str  # why it stopped before the end, "" if it did not

    def attach(self, model: nn.Module) -> nn.Module:
        """Puts the adapter into its model, as `inject` and `fit` would have left it, and returns the model.

        Raises:
            ValueError: the model carries adapters, or is not the one that it was trained on.
        """
        modules = dict(named_modules(model))
        for name, layer in self.layers.items():
            if modules.get(name) is not layer.base:
                raise ValueError(f"expected the model on which the adapter was trained, got another at {name}")
        return wrap(model, self.layers, lambda name, _: self.layers[name])


def fit_many(
    model: nn.Module,
    examples: Sequence[Example] | Sequence[Sequence[Example]],
    specs: Iterable[Spec],
    recipe: Recipe | None = None,
    *,
    accelerate: bool = True,
    show: bool = True,
    **numbers: Any,
) -> list[Fitted]:
    """Trains an adapter for every spec, all at once, on one frozen model.

    Each is what `torch.manual_seed(seed)`, `inject(model, config)` and `fit(..., lr=lr, seed=seed)` would have made of
    it: the gradients agree to rounding, which training amplifies at large learning rates. It pays for small models,
    whose steps are overhead; a large one takes as long as one by one, and the memory of all. Dropout of the base draws
    other masks.

    Args:
        model: a plain model; it is plain again afterwards, with the same weights.
        examples: for all; or a list of lists, the examples of each spec.
        specs: the adapters.
        recipe: for each; or give its numbers by name.
        accelerate, show: as in `fit`.
        numbers: those of a `Recipe`, as in `fit`; gradients are clipped adapter by adapter.

    Returns:
        a `Fitted` for each spec, in their order. One that diverged says so in `error`, and does not disturb the others.

    Raises:
        ValueError: as `inject` and `fit`; or a layer does not see every token in order, as in a mixture of experts.
    """
    check_list("examples", examples)
    if not isinstance(specs, Iterable):
        raise ValueError(f"expected Specs, got {short(specs)}")
    specs, recipe = list(specs), Recipe.of(recipe, numbers)
    own: list[Any] = [examples] * len(specs) if len(examples) and isinstance(examples[0], Example) else list(examples)
    if any(not isinstance(spec, Spec) for spec in specs):
        raise ValueError("expected Specs, got something else")
    for texts, spec in zip(own, specs, strict=False):
        check_positive("lr", spec.lr)
        check_integer("seed", spec.seed, -(2**63), 2**64 - 1)
        check_examples(model, texts)
    if not specs or len(own) != len(specs):
        raise ValueError(f"expected specs, and as many lists of examples if several, got {len(specs)} and {len(own)}")
    check_plain(model)
    grads = {p: p.requires_grad for p in model.parameters()}
    try:
        made = [_make(model, spec) for spec in specs]
        names = dict.fromkeys(name for layers in made for name in layers)
        stacks = {name: LoRAStack([layers.get(name) for layers in made], name) for name in names}
        model.requires_grad_(False)
        replace(model, {stack.base: stack for stack in stacks.values()})
        runs = [
            Run([p for layer in layers.values() for p in (layer.A, layer.B)], texts, spec.lr, spec.seed)
            for layers, texts, spec in zip(made, own, specs, strict=True)
        ]
        with _counting(model, stacks.values()):
            train(model, runs, recipe, accelerate, show)
    finally:
        replace(model, {module: module.base for module in model.modules() if isinstance(module, LoRAStack)})
        for parameter, grad in grads.items():
            parameter.requires_grad_(grad)
    for stack in stacks.values():
        stack.release()
    return [Fitted(spec, run.history, layers, run.error) for spec, run, layers in zip(specs, runs, made, strict=True)]


def _make(model: nn.Module, spec: Spec) -> dict[str, Any]:
    """The adapters that `inject` makes with this seed, taken out of the model again."""
    with seeded(spec.seed):
        put_in(model, spec.config)
    layers = adapters(model)
    remove(model)
    if experts := [name for name, layer in layers.items() if isinstance(layer, LoRAExperts)]:
        raise ValueError(
            f"expected adapters of linear layers, got one of {experts[0]}: target_parameters=[] leaves experts out, or "
            "train one adapter after the other"
        )
    return layers


@contextmanager
def _counting(model: nn.Module, stacks: Iterable[LoRAStack]) -> Iterator[None]:
    """Tells every stack how many tokens a forward pass has, so that it notices if it does not see them all."""

    def tell(_, args, kwargs):
        for stack in stacks:
            stack.tokens = kwargs["input_ids"].numel()

    hook = model.register_forward_pre_hook(tell, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
