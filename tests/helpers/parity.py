"""Models compared: with PEFT's, and with what they were before."""

import copy
import warnings

import peft
import torch

from helpers.architectures import logits_of


def randomise(model: torch.nn.Module, seed: int = 3) -> None:
    """Gives A and B values of the size that training gives them; B would be zero otherwise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def peft_model(base: torch.nn.Module, **settings) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out of GPT-2
        return peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings))


def gradients(model: torch.nn.Module, name: str) -> dict[str, torch.Tensor]:
    """Gradients of a scalar of the logits, by PEFT's names without its wrappers."""
    return gradients_of(model, logits_of(model, name, grad=True))


def gradients_of(model: torch.nn.Module, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same from logits of any model."""
    logits.float().log_softmax(-1)[..., -1].mean().backward()
    replaced = [("base_model.model.", ""), (".modules_to_save.default", ".trained"), (".default.weight", "")]
    replaced += [(f".lora_{part}", f".{part[-1].upper()}") for part in ("embedding_A", "embedding_B", "A", "B")]
    replaced += [("token_adapter.trainable_tokens_delta", "rows"), (".default", "")]
    found = {}
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            for old, new in replaced:
                key = key.replace(old, new)
            found[key] = parameter.grad
    return found


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def unchanged(model, before):
    after = model.state_dict()
    return list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
