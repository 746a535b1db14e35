"""Several adapters on one model: added by name, chosen for a call or for each row of a batch, deleted.

    lorakit.add_adapter(model, "sql", "sql-adapter")
    lorakit.add_adapter(model, "records", "records-adapter")
    with lorakit.using_adapters(model, ["sql", "records", None]):
        model.generate(**batch)  # of three rows, the last of which the base answers

The base is loaded once, and never touched. Adding and deleting change no answer of another adapter, nor of the base.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorakit._suggest import near_names
from lorakit.layers.named_adapters import Choice, Chosen, NamedAdapters, Rows
from lorakit.models.beside import BESIDE
from lorakit.models.inject import adapters, check_plain, grads_kept, replace
from lorakit.models.merge import remove
from lorakit.models.save_load import as_file, read_layers
from lorakit.models.targets import linear_layers, named_modules, unwrapped

Source = str | os.PathLike | nn.Module | Mapping[str, Any]
Layer = Callable[..., nn.Module]


def add_adapter(model: nn.Module, name: str, source: Source, layer: Layer | None = None) -> nn.Module:
    """Puts one more adapter on a model, under a name; it answers when it is chosen. The model is frozen.

    Args:
        model: plain, or with named adapters; quantised or not.
        name: a new one.
        source: a folder, as for `load_adapter`; a model of the same kind with adapters; or adapters outside of a model
            by the names of their layers, such as `adapters(model)` before `remove(model)`, or a `Fitted`'s `layers`.
            Values are copied. Rank, scale, layers and dtype are the adapter's own.
        layer: the adapter's class, if it is one of the reader's own and comes from a folder.

    Returns:
        the same model.

    Raises:
        FileNotFoundError, AdapterError: as `load_adapter`: the adapter is not there, damaged, or of another base.
        ValueError: the name is there already, or the model has adapters without a name. The model is as it was.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"expected an adapter's name, got {name!r}")
    present = _present(model)
    if not present:
        check_plain(model)
    if name in named_adapters(model):
        raise ValueError(f"expected a new name, got {name!r}, which is there: delete_adapter() it first")
    bases = {key: each.base for key, each in present.items()}
    inside = tuple(f"{key}." for key in present)
    bases |= {key: each for key, each in linear_layers(model).items() if not key.startswith(inside)}
    choice = next((each.choice for each in present.values()), Choice())
    with grads_kept(model):
        made, rows = read_layers(model, *_read(model, source, layer), bases)
        if rows or (odd := [key for key, each in made.items() if isinstance(each, BESIDE)]):
            what = "other rows of its vocabulary" if rows else f"{', '.join(odd)}, which train beside it"
            raise ValueError(
                f"expected an adapter of LoRA alone, got {what}: load_adapter takes it, on a model of its own"
            )
        experts = _experts(model)
        new = {key: NamedAdapters(bases[key], choice, key, key in experts) for key in made.keys() - present.keys()}
        replace(model, {each.base: each for each in new.values()})
    for key, each in made.items():
        (present | new)[key].put(name, each)
    choice.names.append(name)
    return model.requires_grad_(False)


def delete_adapter(model: nn.Module, name: str) -> nn.Module:
    """Takes one adapter off a model; with the last one the model is plain again, as after `remove`.

    Returns:
        the same model.

    Raises:
        ValueError: there is no such adapter, or it is in use: chosen, or named in a block that is open.
    """
    choice = _choice(model)
    check_known(model, [name])
    if name == choice.name or choice.uses[name]:
        raise ValueError(f"expected an adapter that is not in use, got {name!r}: choose another first, or None")
    if choice.names == [name]:
        return remove(model)
    choice.names.remove(name)
    for each in _present(model).values():
        each.drop(name)
    replace(model, {each: each.base for each in _present(model).values() if not each.names})
    return model


def set_adapter(model: nn.Module, name: str | None) -> nn.Module:
    """Chooses the adapter that answers from now on, outside of `using_adapters`; None for the base, as at first.

    `merge`, `folded` and the like take the model for one with this adapter alone.

    Returns:
        the same model.

    Raises:
        ValueError: there is no such adapter.
    """
    check_known(model, [name])
    _choice(model).name = name
    return model


@contextmanager
def using_adapters(model: nn.Module, names: str | Sequence[str | None] | None) -> Iterator[nn.Module]:
    """While it is open, these adapters answer in this thread.

    Args:
        model: with named adapters.
        names: one for all rows, or a list with one for each row of the batch; None is the base. Where `generate`
            repeats rows, as for beams, the list has each name as often.

    Raises:
        ValueError: there is no such adapter; or, when the model is called, the batch has another number of rows, or a
            layer's input does not show which tokens are of which row, as an expert's.
    """
    chosen = names if names is None or isinstance(names, str) else Rows(tuple(names))
    check_known(model, chosen.names if isinstance(chosen, Rows) else [chosen])
    choice = _choice(model)
    with choice.of(chosen), _told(model, choice, chosen):
        yield model


def named_adapters(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The adapters of a model by name, each as its layers by theirs, in the order in which they came."""
    present = _present(model)
    names = _choice(model).names if present else []
    return {name: {key: each.get(name) for key, each in present.items() if name in each.names} for name in names}


def check_known(model: nn.Module, names: Iterable[str | None]) -> None:
    """Refuses a name that is no adapter's of the model.

    Raises:
        ValueError: there is one.
    """
    known = _choice(model).names
    for name in names:
        if name is not None and name not in known:
            raise ValueError(f"expected an adapter of the model, {near_names(str(name), known)}")


def _present(model: nn.Module) -> dict[str, NamedAdapters]:
    return {key: each for key, each in adapters(model).items() if isinstance(each, NamedAdapters)}


def _choice(model: nn.Module) -> Choice:
    for each in _present(model).values():
        return each.choice
    raise ValueError("expected a model with named adapters, got none: add_adapter() first")


def _read(model: nn.Module, source: Source, layer: Layer | None) -> tuple[Path | tuple[dict, dict], Layer | None]:
    """What `read_layers` reads, and the layers' class if it is one of the reader's own."""
    if isinstance(source, str | os.PathLike):
        return Path(source), layer
    if not isinstance(source, Mapping | nn.Module):
        raise ValueError(f"expected a folder, a model or layers by name, got {type(source).__name__}")
    layers = source if isinstance(source, Mapping) else adapters(source)
    file = as_file(model, layers) if isinstance(source, Mapping) else as_file(source)
    own = type(next(iter(layers.values())))
    return file, layer or (None if file[1]["peft_type"] == "LORA" else own)


def _experts(model: nn.Module) -> set[str]:
    """Names of the modules in a list within a list, or in one of experts."""
    found, lists = set(), {"": 0}  # how many lists each module is in
    for name, module in named_modules(model):
        parent, _, step = name.rpartition(".")
        lists[name] = lists.get(parent, 0) + isinstance(module, nn.ModuleList) + (step == "experts")
        if lists[name] > 1:
            found.add(name)
    return found


@contextmanager
def _told(model: nn.Module, choice: Choice, rows: Chosen) -> Iterator[None]:
    """While it is open, each call of the model is seen to have the rows, and says how many tokens they have."""
    if not isinstance(rows, Rows):
        yield
        return

    def tell(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if choice.now() is not rows:  # another thread's call, or a block within this one
            return
        inputs = [*args[:1], *(kwargs.get(key) for key in ("input_ids", "inputs_embeds", "decoder_input_ids"))]
        for x in inputs:
            if isinstance(x, Tensor) and x.ndim > 1:
                rows.tokens = x.shape[1]
                if len(x) != len(rows.names):
                    raise ValueError(f"expected a row for each of {len(rows.names)} names, got {len(x)}")

    hook = unwrapped(model).register_forward_pre_hook(tell, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
