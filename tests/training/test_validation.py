"""Held-out examples: their loss, the end in time, the best weights; and the end that somebody asks for."""

import pytest
import torch
from helpers.architectures import build
from helpers.parity import snapshot, unchanged
from helpers.texts import examples

from lorakit import fit, inject
from lorakit.training.batch import collate
from lorakit.training.loss import completion_loss

HELD_OUT = examples(9, seed=1)


def train(**settings):
    """A model, its history, and its weights after every step."""
    model, weights = build("llama"), []
    torch.manual_seed(0)
    inject(model, 4, 8, dropout=0.3)

    def after_step(step):
        weights.append(snapshot(model))
        return "stop" if step.number == settings.get("stop") else step.number % 2  # anything else goes on

    settings = {"steps": 40, "lr": 0.1, "validation": HELD_OUT} | settings
    numbers = {name: value for name, value in settings.items() if name != "stop"}
    return model, fit(model, examples(8), after_step=after_step, show=False, **numbers), weights


def test_validation_is_the_mean_loss_in_eval_mode_and_changes_nothing():
    model, history, _ = train(steps=5, validate_every=2)
    assert [step for step, _ in history.validation] == [2, 4, 5]
    with torch.no_grad():
        assert history.validation[-1][1] == pytest.approx(completion_loss(model, collate(HELD_OUT)).item(), rel=1e-5)
    plain, alone, _ = train(steps=5, validation=None)
    assert unchanged(model, snapshot(plain))
    assert alone.loss == history.loss
    assert [step for step, _ in train(steps=3)[1].validation] == [3]
    assert history.best is None
    assert "held out" in str(history)


def test_patience_ends_the_training_and_the_best_weights_are_put_back():
    model, history, weights = train(validate_every=1, patience=4)
    losses = [loss for _, loss in history.validation]
    assert history.best == 1 + losses.index(min(losses)) == len(losses) - 4
    assert len(history.loss) == len(losses) < 40
    assert unchanged(model, weights[history.best - 1])
    assert f"weights of step {history.best}" in str(history)


def test_the_word_stop_ends_the_training_and_nothing_else_does():
    model, history, weights = train(stop=3, validation=None)
    assert len(history.loss) == len(history.seconds) == len(weights) == 3
    assert history.speed
    assert unchanged(model, weights[-1])


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"validation": None, "patience": 2}, "validation"),
        ({"validation": None, "validate_every": 2}, "validation"),
        ({"patience": 2}, "validate_every"),
        ({"validate_every": 0}, "validate_every"),
        ({"validate_every": 1, "patience": 0}, "patience"),
        ({"validation": []}, "example"),
        ({"schedule": "cosin"}, "cosine"),
        ({"accumulate": 9}, "accumulate"),
    ],
)
def test_what_makes_no_sense_is_refused(settings, word):
    with pytest.raises(ValueError, match=word):
        train(**settings)
