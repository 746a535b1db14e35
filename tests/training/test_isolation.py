"""A training is its own: other threads, contexts around it and code that it calls do not reach into it, nor it out."""

import copy
import threading

import pytest
import torch
from helpers.architectures import adapted, build, logits_of
from helpers.texts import examples

from lorakit import adapters, fit, folded, inject, merge, quantize_model
from lorakit._random import Stream, seeded
from lorakit.speed import cpu
from lorakit.speed.accelerated import accelerated


def losses(model, **settings):
    return fit(model, examples(), **({"steps": 6, "lr": 1e-2, "batch_size": 4, "show": False} | settings)).loss


def dropping():
    model = build("llama")
    with seeded(0):
        inject(model, 3, 6, dropout=0.3)
    return model


def test_under_autocast_it_learns():
    with torch.autocast("cpu", torch.bfloat16):
        found = losses(adapted("llama"), steps=20)
    assert found[-1] < found[0] - 0.05
    assert found == pytest.approx(losses(adapted("llama"), steps=20), abs=0.1)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_around_it_trains_all_the_same(mode):
    expected, model = losses(adapted("llama")), adapted("llama")
    with mode():
        assert losses(model) == pytest.approx(expected, abs=1e-6)
    with torch.inference_mode():
        model = adapted("llama")
    with pytest.raises(ValueError, match="inference_mode"):
        losses(model)


def test_trainings_in_threads_are_those_alone():
    expected = {seed: losses(dropping(), seed=seed) for seed in range(3)}
    found, models = {}, {seed: dropping() for seed in range(3)}
    state = torch.get_rng_state()
    work = [threading.Thread(target=lambda s=seed: found.update({s: losses(models[s], seed=s)})) for seed in range(3)]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert found.keys() == expected.keys()
    for seed, alone in expected.items():
        assert found[seed] == pytest.approx(alone, abs=1e-5)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_drawn_between_steps_changes_nothing():
    expected = losses(dropping())
    assert losses(dropping(), after_step=lambda _: torch.rand(3)) == pytest.approx(expected, abs=1e-6)


def test_a_stream_that_draws_nothing_leaves_the_state_alone_until_it_is_watched():
    stream = Stream(0)
    with stream.drawing():
        pass
    with stream.drawing():
        torch.manual_seed(5)  # of somebody else
    assert torch.initial_seed() == 5
    stream.watch()
    with stream.drawing():
        first = torch.rand(())
    with stream.drawing():
        second = torch.rand(())
    torch.manual_seed(0)
    assert [first, second] == [torch.rand(()), torch.rand(())]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradient_checkpointing_gives_the_same(dtype, monkeypatch):
    monkeypatch.setattr(cpu, "MIN_TOKENS", 1)
    monkeypatch.setattr(cpu, "MIN_PRODUCT", 1)
    monkeypatch.setattr(cpu, "onednn_trial", lambda rows=512: (2.0, 1.0))
    expected, model = losses(adapted("llama", dtype), batch_size=2), adapted("llama", dtype)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert losses(model, batch_size=2) == pytest.approx(expected, rel=1e-2)
    batch = {"input_ids": torch.tensor([[3, 4, 5]]), "labels": torch.tensor([[3, 4, 5]])}
    with accelerated(model.train(), 100, trains=True):
        loss = model(**batch).loss
    loss.backward()  # what is computed again is computed outside of the block


def patched(model):
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_what_is_called_after_a_step_sees_the_model_alone():
    model, seen = adapted("llama"), []

    def look(step):
        assert patched(model) == []
        other = copy.deepcopy(model)
        expected = logits_of(model, "llama")
        with folded(model):
            torch.testing.assert_close(logits_of(model, "llama"), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits_of(merge(other), "llama"), expected, rtol=1e-4, atol=1e-4)
        seen.append(other)

    history = fit(model, examples(), steps=3, lr=1e-3, after_step=look, show=False)
    assert history.speed["lean modules"].startswith("used")
    assert len(seen) == 3
    assert [patched(each) for each in [model, *seen]] == [[]] * 4


def test_a_model_may_be_folded_and_changed_while_its_modules_are_patched():
    model = adapted("llama")
    with accelerated(model.train(), 100, trains=True):
        expected = logits_of(model, "llama", grad=True)
        with folded(model):
            torch.testing.assert_close(logits_of(model, "llama", grad=True), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits_of(merge(model), "llama", grad=True), expected, rtol=1e-4, atol=1e-4)
    assert patched(model) == []


def test_what_trains_must_stay_in_the_model():
    with pytest.raises(ValueError, match="stay in the model, got others after step 1"):
        losses(model := adapted("llama"), after_step=lambda _: merge(model))
    model = adapted("llama")
    losses(model, after_step=lambda step: quantize_model(model) if step == 1 else None)
    assert adapters(model)


def test_precisions_of_threads_close_in_any_order():
    before = torch.get_float32_matmul_precision()
    first, second = cpu._matmul_precision("medium"), cpu._matmul_precision("highest")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.get_float32_matmul_precision() == "highest"
    second.__exit__(None, None, None)
    assert torch.get_float32_matmul_precision() == before
