"""With the switch on or off the results are the same; off is off; and the report says what was done and why."""

import copy
import json
from pathlib import Path

import pytest
import torch
from helpers.architectures import AUTO, CONFIGS, adapted, build
from helpers.parity import relative, snapshot, unchanged
from helpers.texts import TOKENIZER, examples

from lorakit import Example, Recipe, Spec, exact_match, fit, fit_many, greedy, inject
from lorakit.layers import shortcuts
from lorakit.layers.config import LoRAConfig
from lorakit.layers.fused import _LoRALinear
from lorakit.speed import activations, attention, cpu, frozen_prefix
from lorakit.speed.accelerated import TRICKS, accelerated, decisions, explain
from lorakit.training import fit as loop
from lorakit.training import objective
from lorakit.training.batch import IGNORE, collate
from lorakit.training.evaluate import log_probabilities, teacher_forced
from lorakit.training.loss import _TokenLosses, completion_loss

CAUSAL = sorted(set(CONFIGS) - set(AUTO))
REAL_TRIAL = cpu.onednn_trial


@pytest.fixture
def eager(monkeypatch):
    """Lets every trick pay for tiny models too: oneDNN for small products, which brings short attention."""
    monkeypatch.setattr(cpu, "MIN_TOKENS", 1)
    monkeypatch.setattr(cpu, "MIN_PRODUCT", 1)
    monkeypatch.setattr(cpu, "onednn_trial", lambda rows=512: (2.0, 1.0))


@pytest.fixture
def exact(eager, monkeypatch):
    """As `eager`, but oneDNN is left out where it computes in bfloat16 as soon as it may (AMX)."""
    if REAL_TRIAL()[1] > cpu.MAX_ERROR:
        monkeypatch.setattr(cpu, "onednn_trial", REAL_TRIAL)


@pytest.fixture
def taken(monkeypatch):
    """The names of the shortcuts that were taken, in the order of first use."""
    seen = {}

    def count(owner, name, what):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: seen.setdefault(what) or real(*args, **kwargs))

    for function in (_LoRALinear, activations._GatedDown, activations._RMSNorm, _TokenLosses):
        count(function, "apply", function.__name__)
    count(attention, "short_attention", "short attention")
    count(frozen_prefix.Below, "batch", "frozen prefix")
    count(objective, "pack", "packing")
    count(cpu, "_set", "kept memory")
    real = torch.set_float32_matmul_precision
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda p: seen.setdefault(f"precision {p}") or real(p))
    return seen


def texts():
    """One long text among short ones, so that packing pays."""
    return [Example([3, *range(4, 20)], [IGNORE, *range(4, 20)]), *examples(11)]


def run(name, accelerate, steps=6):
    """What training and answering come to, from the same start."""
    model = adapted(name)
    history = fit(model, texts(), Recipe(steps, warmup=0), lr=1e-5, accelerate=accelerate, show=False)
    answers = greedy(
        model, TOKENIZER, ["abc", "fghij"], stop="\x02", max_new_tokens=4, accelerate=accelerate, show=False
    )
    scored = teacher_forced(model, texts(), accelerate=accelerate, show=False)
    return model, history, answers, scored, log_probabilities(model, texts(), accelerate=accelerate)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("name", CAUSAL)
def test_training_and_answers_are_the_same_with_it_and_without(name):
    (ours, with_it, *answers), (theirs, without, *expected) = run(name, True), run(name, False)
    assert with_it.loss == pytest.approx(without.loss, abs=1e-5)
    assert answers[0] == expected[0]
    assert [exact for exact, _ in answers[1]] == [exact for exact, _ in expected[1]]
    assert [nats for _, nats in answers[1]] == pytest.approx([nats for _, nats in expected[1]], abs=1e-4)
    torch.testing.assert_close(answers[2], expected[2], rtol=1e-4, atol=1e-4)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)  # Adam moves by the rate, 6 times 1e-5 at most


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("name", CAUSAL)
def test_gradients_are_the_same_with_it_and_without(name):
    batch, found = collate(texts()), []
    for on in (True, False):
        model = adapted(name).train()
        with accelerated(model, 100, trains=True, on=on):
            loss = completion_loss(model, batch)
            found.append(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))
    # the plain formula itself is up to 8e-6 away from its value in float64
    assert all(relative(a, b) < 2e-5 for a, b in zip(*found, strict=True))


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("by", ["argument", "environment"])
def test_off_is_off(by, taken, monkeypatch):
    upper = build("llama")
    inject(upper, 3, 6, targets=r"model\.layers\.1\..*proj")
    fit(upper, texts(), steps=3, show=False)
    used = {"_LoRALinear", "_GatedDown", "_RMSNorm", "_TokenLosses", "short attention", "packing", "frozen prefix"}
    assert used | {"precision medium"} <= set(taken), "the counters see what is taken"
    taken.clear()
    if by == "environment":
        monkeypatch.setenv(shortcuts.ENVIRONMENT, "0")
    model, history, *_ = run("llama", accelerate=by == "environment")
    fit_many(
        build("llama"),
        examples(),
        [Spec(LoRAConfig(2, 4), 1e-3), Spec(LoRAConfig(3, 6), 1e-3)],
        steps=2,
        accelerate=by == "environment",
    )
    exact_match(model, examples(), accelerate=by == "environment", show=False)
    assert not taken
    words = "switched off" if by == "argument" else "LORAKIT_ACCELERATE=0"
    assert set(history.speed.values()) == {f"not used: {words}"}
    assert " with " not in str(history)


@pytest.mark.usefixtures("eager")
def test_off_inside_of_on_is_off_and_on_inside_of_off_too(taken):
    model, batch = adapted("llama").train(), collate(examples(6))
    with accelerated(model, 100, trains=True):
        completion_loss(model, batch).backward()
        assert len(taken) >= 6
        taken.clear()
        with accelerated(model, 100, on=False) as report:
            assert torch.get_float32_matmul_precision() == "highest"
            with accelerated(model, 100, trains=True):
                completion_loss(model, batch).backward()
        assert set(taken) <= {"precision highest", "precision medium"}
        assert torch.get_float32_matmul_precision() == "medium"
    assert not any(decision.used for decision in report.decisions.values())
    assert shortcuts.allowed()


@pytest.mark.usefixtures("eager")
def test_everything_is_taken_back_on_an_error():
    model = adapted("llama").train()

    def stop(_):
        raise KeyError

    for attempt in (
        lambda: fit(model, texts(), steps=4, after_step=stop, show=False),
        lambda: fit(model, texts(), steps=4, after_step=stop, accelerate=False, show=False),
    ):
        with pytest.raises(KeyError):
            attempt()
        assert shortcuts.allowed()
        assert torch.get_float32_matmul_precision() == "highest"
        assert not any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert cpu._users == 0


@pytest.mark.usefixtures("eager")
def test_a_copy_that_is_made_inside_is_a_plain_model():
    model = adapted("llama").train()
    with accelerated(model, 100, trains=True):
        patched = [name for name, module in model.named_modules() if "forward" in vars(module)]
        copied, block = copy.deepcopy(model), copy.deepcopy(model.model.layers[0].mlp)
        assert patched == [name for name, module in model.named_modules() if "forward" in vars(module)] != []
    for module in (copied, block, model):
        assert not any({"forward", "__deepcopy__"} & vars(each).keys() for each in module.modules())
    assert unchanged(copied, snapshot(model))


@pytest.mark.usefixtures("eager")
def test_the_report_says_what_was_used_and_why_not():
    model = adapted("llama")
    speed = fit(model, texts(), steps=2, show=False).speed
    assert tuple(speed) == TRICKS
    assert speed["oneDNN"] == "used: 2.0 times as fast"
    assert speed["lean modules"] == "used: 7 gated blocks and norms"
    assert speed["fused LoRA"] == "used: 14 of 14 adapters"
    assert speed["packing"].startswith("used: relative error")
    assert "first block trains" in speed["frozen prefix"]
    assert json.loads(json.dumps(speed)) == speed
    with accelerated(build("gpt2"), 100) as report:
        lines = str(report).splitlines()
    assert [line.split(":")[0] for line in lines] == list(TRICKS)
    assert "lean modules: not used: nothing trains" in lines
    assert "fused LoRA: not used: no adapter of lorakit's" in lines
    dropping = build("gpt2")
    inject(dropping, 2, 4, dropout=0.5)
    with accelerated(dropping.train(), 100, trains=True) as report:
        words = report.words()
    assert words["fused LoRA"] == "not used: 0 of 8 adapters"
    assert words["lean modules"] == "not used: no gated block over an adapter, no usual norm"


def test_it_asks_about_the_model_as_it_is_now():
    """Nothing that was tried in one training is believed in the next."""
    model, leaky = adapted("llama"), build("llama")
    assert fit(model, texts(), steps=2, show=False).speed["packing"].startswith("used")
    inner = type(leaky.model).forward
    model.model.forward = lambda position_ids=None, **inputs: inner(model.model, **inputs)  # positions are dropped
    history = fit(model, texts(), steps=2, show=False)
    assert "packed texts apart" in history.speed["packing"]


def test_decisions_are_plain_and_measure_only_if_asked(monkeypatch):
    monkeypatch.delenv(cpu.PIN, raising=False)
    cpu.onednn_trial.cache_clear()
    before = decisions()
    assert before["onednn"] is before["onednn_gain"] is None
    assert before["accelerate"] is True
    after = decisions(measure=True)
    assert json.loads(json.dumps(after)) == after
    assert set(after) == set(before)
    assert after["onednn_gain"] > 0
    monkeypatch.setenv(cpu.PIN, "0")
    assert (decisions()["onednn"], decisions()["onednn_pinned"]) == (False, True)
    assert explain()["oneDNN"] == "not used: pinned"
    monkeypatch.setenv(shortcuts.ENVIRONMENT, "0")
    assert decisions()["accelerate"] is False
    assert set(explain().values()) == {"not used: LORAKIT_ACCELERATE=0"}


def test_a_pinned_run_repeats_whatever_the_clock_says(monkeypatch):
    layer = torch.nn.Linear(576, 576)
    for pin in ("0", "1"):
        monkeypatch.setenv(cpu.PIN, pin)
        used = set()
        for gain in (0.5, 1.2, 1.3, 5.0):
            monkeypatch.setattr(cpu, "onednn_trial", lambda rows=512, gain=gain: (gain, 1.0))
            with accelerated(layer, 400) as report:
                used.add(report.decisions["oneDNN"].used)
        assert used == {pin == "1"}


def test_training_names_no_trick():
    imports = [
        line
        for path in Path(loop.__file__).parent.glob("*.py")
        if path.stem != "checkpoint"  # which keeps what was decided
        for line in path.read_text(encoding="utf-8").splitlines()
        if "lorakit.speed" in line and "import" in line
    ]
    assert len(imports) == 5, "fit, generate, evaluate; objective and validation hand the report on"
    assert all(line.startswith("from lorakit.speed.accelerated import") for line in imports)
