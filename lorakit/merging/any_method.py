"""What a saved adapter of any method changes: each layer is asked, not the method.

Whatever an adapter computes, if its layer is linear in its input, its answers to the unit vectors, less the base's, are
the change of the weight:

    dW = (f(I) - f(0) - W I)^T        and    f(0) = b

So LoHa, LoKr, VeRA, OFT, BOFT, IA3, HRA and PEFT's others need no formula here; nor do merges that they may lack.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorakit._optional import need, quiet
from lorakit._suggest import near_names
from lorakit._words import one_line
from lorakit.layers.bases import linear_shape
from lorakit.layers.embedding import LoRAEmbedding
from lorakit.layers.experts import LoRAExperts
from lorakit.layers.lora import LoRALinear
from lorakit.layers.tied import Tied
from lorakit.merging.serving import PEFT_KINDS
from lorakit.merging.updates import Update, updates_of
from lorakit.models.inject import adapters, named
from lorakit.models.peft_files import PLAIN_STARTS, AdapterError, as_config, check_finite, read_both
from lorakit.models.save_load import load_adapter

LINEAR = 1e-4  # of an update's answer: so far the answer to a sum may be from the sum of the answers


def put_on(model: nn.Module, folder: Path, layer: Callable[..., nn.Module] | None = None) -> dict[str, nn.Module]:
    """Puts a saved adapter of any method on a plain model: by lorakit if it knows the method, else by PEFT.

    Args:
        model: the base model, in eval mode.
        folder: holds `adapter_model.safetensors` and `adapter_config.json`.
        layer: the adapter's class, if it is one of the reader's own.

    Returns:
        the adapted layers by the names that the base's have.

    Raises:
        FileNotFoundError: one of the two files is missing.
        AdapterError: the files are damaged, or do not fit the model, or the method changes no layers.
        ImportError: it takes PEFT, which is not installed.
    """
    tensors, file, _ = read_both(folder)
    check_finite(tensors)
    found: dict[str, nn.Module]
    if layer is not None or _is_plain(file):
        load_adapter(model, folder, layer)
        kinds = (LoRALinear, LoRAExperts, *([layer] if isinstance(layer, type) else []))
        found = {
            name: each
            for name, each in adapters(model).items()
            if isinstance(each, kinds) or isinstance(getattr(each, "source", None), LoRAEmbedding)
        }  # of others `check_rest` tells
    else:
        found = _by_peft(model, folder, file, tensors)
    model.eval().requires_grad_(False)
    return found


def _is_plain(file: dict[str, Any]) -> bool:
    """True for LoRA, rsLoRA and DoRA that lorakit reads itself."""
    try:
        as_config(file)
    except (AdapterError, KeyError):
        return False
    return file["peft_type"] == "LORA" and file.get("init_lora_weights") in PLAIN_STARTS


def _by_peft(model: nn.Module, folder: Path, file: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, nn.Module]:
    kind = file.get("peft_type")
    if not isinstance(kind, str) or kind not in PEFT_KINDS:
        words = near_names(kind, sorted(PEFT_KINDS))
        raise AdapterError(f"expected a method of PEFT's, or the class of a layer of your own, {words}")
    with quiet():
        peft, tuners = need("peft", extra="course"), need("peft.tuners.tuners_utils", extra="course")
    try:
        with quiet():
            whole = peft.PeftModel.from_pretrained(model, str(folder)).eval()
            own = set(peft.get_peft_model_state_dict(whole, save_embedding_layers=False))
    except (OSError, ImportError):
        raise
    except Exception as error:  # whatever a library makes of a file that it cannot use
        words = f"{type(error).__name__}: {one_line(error)}"
        raise AdapterError(f"expected {kind} that fits the model, got {words}") from error
    strange = sorted(own ^ (tensors.keys() - (whole.state_dict().keys() - own)))
    if strange:
        raise AdapterError(f"expected {kind} of this model, got {strange[0]!r} on one side alone: another base?")
    inside = {name: each for name, each in model.named_modules() if isinstance(each, tuners.BaseTunerLayer)}
    if not inside:
        raise AdapterError(f"expected a method that changes layers, got {kind}")
    return inside


def check_rest(model: nn.Module, layers: dict[str, nn.Module], plain: nn.Module) -> None:
    """Refuses an adapter that changes more than its layers, such as whole heads, token rows, or biases elsewhere.

    Raises:
        ValueError: it does.
    """
    known, before = dict(plain.named_modules()), dict(plain.named_parameters())
    inside = tuple(f"{name}." for name in layers if name in known)
    for name, parameter in model.named_parameters():
        if not name.startswith(inside) and not (name in before and torch.equal(before[name], parameter)):
            raise ValueError(f"expected an adapter of layers and experts alone, got one that also changes {name}")


@torch.no_grad()
def changes_of(layer: nn.Module, base: nn.Module, name: str) -> dict[str, Update | Float[Tensor, "d_out d_in"]]:
    """What an adapted layer's answers add to the base's, in float64: its factors if it is LoRA, else the matrix.

    Returns:
        by the name of the layer, or those of the experts' parameters.

    Raises:
        ValueError: it changes the bias, is not linear in its input, or its base is no linear layer.
    """
    if type(layer) in (LoRALinear, LoRAEmbedding, LoRAExperts, Tied):
        return {key: Update(each.B.double(), each.A.double()) for key, each in updates_of(name, layer).items()}
    with named(name):
        d_in = linear_shape(base)[1]
        adapted, plain = (copy.deepcopy(each).double() for each in (layer, base))
        x = torch.eye(d_in + 1, d_in, dtype=torch.float64, device=next(plain.parameters()).device)  # the last is zero
        added = (adapted(x) - plain(x)).double()
        shift, change = added[-1], (added[:-1] - added[-1]).T
        if shift.norm() > LINEAR * change.norm():
            raise ValueError("expected a change of the weight alone, got one of the bias too, which LoRA cannot hold")
        probe = torch.linspace(-1, 1, 3 * d_in, dtype=x.dtype, device=x.device).sin().view(3, d_in)
        error = adapted(probe) - plain(probe) - probe @ change.T - shift
        if error.norm() > LINEAR * (probe @ change.T).norm():
            raise ValueError("expected a layer that is linear in its input, got one whose change depends on it")
        return {name: change}
