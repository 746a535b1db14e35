"""Gated blocks and norms with less memory compute the same; what is neither stays as it is."""

from contextlib import nullcontext

import pytest
import torch
from helpers.architectures import adapted, build
from helpers.parity import relative
from helpers.texts import examples

from lorakit import adapters, fit, inject
from lorakit.speed.activations import lean
from lorakit.training.batch import collate
from lorakit.training.loss import completion_loss

LEAN = {"llama": 7, "llama-biased-tied": 7, "mistral-gqa": 7, "qwen2": 7, "qwen3": 11, "phi3": 5}  # blocks and norms


def gradients(model, batch):
    loss = completion_loss(model, batch)
    return loss, torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("name", LEAN)
def test_loss_and_gradients_are_the_same(name):
    model, batch = adapted(name), collate(examples(6))
    with lean(model) as count:
        assert count == LEAN[name]
        ours = gradients(model, batch)
    theirs = gradients(model, batch)
    torch.testing.assert_close(ours[0], theirs[0])
    assert all(relative(a, b) < 1e-5 for a, b in zip(ours[1], theirs[1], strict=True))


@pytest.mark.parametrize("name", ["gemma", "gpt2", "opt", "phi", "gpt-neox"])
def test_other_modules_stay_as_they_are(name):
    model = adapted(name)
    before = [vars(module).get("forward") for module in model.modules()]
    with lean(model) as count:
        assert count == 0
        assert [vars(module).get("forward") for module in model.modules()] == before


def kept(model, batch):
    """Numbers that the forward pass keeps for the backward one, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes = {}

    def note(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = completion_loss(model, batch)
    del loss
    return sum(size for place, size in sizes.items() if place not in own)


def test_half_of_the_blocks_memory_and_the_residual_stream_are_not_kept():
    model, batch = adapted("llama"), collate(examples(20))
    tokens = batch["input_ids"].numel()
    wide, narrow = tokens * 24 * 4, tokens * 16 * 4  # bytes of one of a block's four wide tensors, of a norm's input
    plain = kept(model, batch)
    with lean(model):
        # two wide tensors a layer; inputs of norms: the first is the embeddings' output, the last norm's own is kept
        assert plain - kept(model, batch) == pytest.approx(2 * 2 * wide + 3 * narrow, rel=0.05)


def test_without_gradients_and_with_dropout_it_is_the_model():
    model, batch = adapted("llama"), collate(examples(4))
    with torch.no_grad():
        expected = completion_loss(model, batch)
        with lean(model):
            assert torch.equal(completion_loss(model, batch), expected)
    dropping, losses = build("llama"), []
    inject(dropping, 2, 4, dropout=0.5)
    dropping.train()
    for context in (lean(dropping), nullcontext()):
        with context:  # with B = 0 the probe cannot see the dropout; the step must
            torch.manual_seed(0)
            for layer in adapters(dropping).values():
                torch.nn.init.ones_(layer.B)
            losses.append(completion_loss(dropping, batch))
    assert torch.equal(*losses)


def test_hooks_are_respected():
    model, seen = adapted("llama"), []
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda *args: seen.append(1))
    with lean(model) as count:
        assert count == LEAN["llama"] - 1
        completion_loss(model, collate(examples(2)))
    assert seen


def test_a_norm_that_trains_or_is_zero_somewhere_stays_as_it_is():
    model = adapted("llama")
    model.model.norm.weight.requires_grad_()
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3] = 0
    with lean(model) as count:
        assert count == LEAN["llama"] - 2
        completion_loss(model, collate(examples(2))).backward()
    assert model.model.norm.weight.grad is not None


def test_a_norms_weight_that_a_wrapper_swaps_in_gets_its_gradient():
    model, batch = adapted("llama"), collate(examples(2))
    weight = model.model.norm.weight.detach().clone().requires_grad_()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with lean(model):
        torch.func.functional_call(model, {"model.norm.weight": weight}, (), inputs).logits.sum().backward()
    assert weight.grad is not None


def test_afterwards_nothing_is_left_behind():
    model = adapted("llama")
    with pytest.raises(KeyError), lean(model):
        raise KeyError
    fit(model, examples(), steps=2, show=False)
    assert not any("forward" in vars(module) for module in model.modules())
    assert len(adapters(model)) == 14
