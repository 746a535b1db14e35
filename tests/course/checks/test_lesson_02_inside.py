"""The checks inside lesson 02: what they say to answers that they do not know themselves."""

import copy

import torch
from helpers.exercises import assert_refused, each_mistake
from torch import nn
from torch.nn import functional as F

from lorakit.course import checks


def injected(model, names, wrap, freeze="before", copied=False, chosen=None):
    """An injection with one fault."""
    if freeze == "before":
        model.requires_grad_(False)
    for name in chosen or names:
        parent, _, child = name.rpartition(".")
        module = model.get_submodule(parent)
        layer = getattr(module, child)
        setattr(module, child, wrap(copy.deepcopy(layer) if copied else layer))
    if freeze == "after":
        model.requires_grad_(False)
    return model


def stepped(model, batch, loss_of, optimizer, clip=1.0, says=lambda loss: loss.item()):
    optimizer.zero_grad()
    loss = loss_of(model, batch)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return says(loss)


def flat_loss(logits, labels):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


MISTAKES = {  # check -> a wrong answer, and the words of its hint
    "check_forward": [
        (lambda x, W, A, B, alpha: W @ x, "your code raised RuntimeError"),
        (lambda x, W, A, B, alpha: x @ W.T + x @ A.T @ B.T, "has no scale"),
        (lambda x, W, A, B, alpha: x @ W.T + alpha / len(B) * x @ A.T @ B.T, "is off by"),
        (lambda x, W, A, B, alpha: (x @ W.T + alpha / len(A) * x @ A.T @ B.T).T, "is it transposed?"),
    ],
    "check_inject": [
        (lambda model, names, wrap: injected(model, names, wrap, freeze="never"), "would train too: freeze"),
        (lambda model, names, wrap: injected(model, names, wrap, freeze="after"), "A and B do not train"),
        (lambda model, names, wrap: injected(model, names, wrap, copied=True), "has another layer inside"),
        (lambda model, names, wrap: injected(model, names, wrap, chosen=["head"]), "'blocks.0.up' is not wrapped"),
        (
            lambda model, names, wrap: injected(model, names, wrap, chosen=[*names, "blocks.1.up"]),
            "blocks.1.up should have no adapter",
        ),
        (lambda model, names, wrap: injected(copy.deepcopy(model), names, wrap), "has another layer inside"),
        (lambda model, names, wrap: injected(model, names, wrap) and None, "is there a `return` at the end?"),
        (lambda model, names, wrap: "model", "expected the model, got str"),
    ],
    "check_masked_loss": [
        (lambda logits, labels: F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "is not shifted"),
        (lambda logits, labels: 2 * flat_loss(logits, labels), "should be"),
        (lambda logits, labels: F.cross_entropy(logits[:, :-1], labels[:, 1:]), "your code raised"),
        (lambda logits, labels: logits, "should have shape ()"),
    ],
    "check_training_step": [
        (lambda *inputs: stepped(*inputs, clip=100.0), "moved by the whole gradient"),
        (lambda *inputs: stepped(*inputs, clip=0.5), "is off by"),
        (lambda *inputs: stepped(*inputs, says=lambda loss: 0.0), "the loss that step 1 returns should be"),
        (lambda *inputs: stepped(*inputs, says=lambda loss: None), "is there a `return` at the end?"),
        (lambda model, batch, loss_of, optimizer: loss_of(model, batch).item(), "has not moved"),
    ],
}


@each_mistake("02_inside", MISTAKES)
def test_a_mistake_is_refused_with_its_hint(check, answer, hint, capsys):
    assert_refused(check, answer, hint, capsys)


def test_a_step_may_clear_the_gradients_first(capsys):
    checks.check_training_step(stepped)
    checks.check_masked_loss(flat_loss)
    checks.check_inject(injected)
    assert capsys.readouterr().out.count("right: ") == 3


def test_a_tensor_is_a_loss_too():
    checks.check_training_step(lambda *inputs: stepped(*inputs, says=torch.clone))
