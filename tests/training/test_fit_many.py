"""Adapters trained together are the adapters trained apart."""

import math

import pytest
import torch
import transformers as tf
from helpers.architectures import TINY, build
from helpers.parity import snapshot, unchanged
from helpers.texts import examples

from lorakit import LoRAConfig, adapters, exact_match, fit, inject, load_adapter, remove, save_adapter
from lorakit.layers.multi_lora import LoRAStack
from lorakit.training.fit_many import Spec, fit_many

SPECS = [
    Spec(LoRAConfig(4, 8), 1e-4, seed=0),
    Spec(LoRAConfig(1, 2), 3e-4, seed=1),
    Spec(LoRAConfig(7, 3, scale_rule="rslora"), 1e-4, seed=2),
    Spec(LoRAConfig(2, 4, targets=("q_proj", "v_proj")), 2e-4, seed=3),
    Spec(LoRAConfig(3, 6, targets=r"layers\.1\..*(up|down)_proj"), 1e-4, seed=0),
]


def relative(a, b):
    return float((a.detach() - b.detach()).norm() / b.detach().norm().clamp_min(1e-30))


def apart(model, texts, spec, **settings):
    torch.manual_seed(spec.seed)
    inject(model, spec.config)
    history = fit(model, texts, lr=spec.lr, seed=spec.seed, show=False, **settings)
    layers = adapters(model)
    remove(model)
    return history, layers


@pytest.mark.parametrize("clip", [1.0, 0.01])
def test_each_is_its_own_run(clip):
    model, texts = build("llama"), examples()
    together = fit_many(model, texts, SPECS, steps=12, batch_size=4, clip=clip, show=False)
    for spec, fitted in zip(SPECS, together, strict=True):
        history, layers = apart(model, texts, spec, steps=12, batch_size=4, clip=clip)
        assert fitted.history.lr == pytest.approx(history.lr)
        assert fitted.history.tokens == history.tokens
        assert fitted.history.loss == pytest.approx(history.loss, rel=1e-5)
        assert fitted.layers.keys() == layers.keys()
        for name, layer in layers.items():
            assert relative(fitted.layers[name].B, layer.B) < 1e-3
            assert relative(fitted.layers[name].A, layer.A) < 1e-4


@pytest.mark.parametrize("name", ["llama", "llama-biased-tied", "gpt2", "phi3", "opt"])
def test_gradients_are_exact(name):
    model, texts, caught = build(name), examples(8), []
    specs = [Spec(LoRAConfig(rank, alpha), 1e-3, seed) for seed, (rank, alpha) in enumerate(((2, 4), (5, 4), (3, 9)))]

    def catch(_, params, *args):
        caught.append([p.grad.clone() for p in params])
        return torch.tensor(1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.utils.clip_grad_norm_", lambda params, clip: catch(None, params))
        fit_many(model, texts, specs, steps=2, batch_size=4, show=False)
        together = caught[3:]  # of the second step: in the first one B alone has a gradient
        caught.clear()
        for spec in specs:
            apart(model, texts, spec, steps=2, batch_size=4)
    for ours, theirs in zip(together, caught[1::2], strict=True):
        assert all(relative(a, b) < 1e-5 for a, b in zip(ours, theirs, strict=True))


def test_data_of_its_own_for_each():
    model, some, others = build("llama"), examples(seed=1), examples(seed=2)
    specs = [Spec(LoRAConfig(4, 8), 1e-3), Spec(LoRAConfig(4, 8), 1e-3)]
    one, two = fit_many(model, [some, others], specs, steps=4, batch_size=4, show=False)
    assert one.history.loss != two.history.loss
    history, _ = apart(model, others, specs[1], steps=4, batch_size=4)
    assert two.history.loss == pytest.approx(history.loss, rel=1e-5)


def test_rows_beyond_a_rank_stay_zero():
    model = build("llama")
    layers = []
    for rank in (1, 4):
        inject(model, rank, 8)
        layers.append(adapters(model)["model.layers.0.mlp.up_proj"])
        remove(model)
    stack = LoRAStack(layers)
    x = torch.randn(4, 3, 16)
    optimizer = torch.optim.AdamW([layers[0].A, layers[0].B], lr=0.1, weight_decay=0.1)
    for _ in range(3):
        stack(x).square().sum().backward()
        optimizer.step()
    assert layers[0].B.any()
    assert not stack.A[0, 1:].any()
    assert not stack.Bt[0, 1:].any()


def test_one_that_diverges_says_so_and_leaves_the_others_alone():
    model, texts = build("llama"), examples()
    calm, wild = Spec(LoRAConfig(4, 8), 1e-3), Spec(LoRAConfig(4, 8), 1e30)
    with_wild = fit_many(model, texts, [calm, wild], steps=6, batch_size=4, show=False)
    alone = fit_many(model, texts, [calm], steps=6, batch_size=4, show=False)
    assert "try a learning rate below" in with_wild[1].error
    assert not with_wild[0].error
    assert with_wild[0].history.loss == pytest.approx(alone[0].history.loss, rel=1e-5)
    assert all(math.isfinite(loss) for loss in with_wild[1].history.loss)
    assert all(layer.B.isfinite().all() for layer in with_wild[1].layers.values())


def test_the_model_is_as_before_and_an_adapter_can_be_attached_scored_and_saved(tmp_path):
    model, texts = build("llama"), examples()
    model.lm_head.weight.requires_grad_(False)
    before, state = snapshot(model), torch.random.get_rng_state()
    fitted = fit_many(model, texts, SPECS[:3], steps=3, batch_size=4, show=False)
    assert unchanged(model, before)
    assert torch.equal(torch.random.get_rng_state(), state)
    fitted[2].attach(model)
    logits = model(input_ids=torch.tensor([[3, 4, 5]])).logits
    assert len(exact_match(model, texts, show=False)) == len(texts)
    save_adapter(model, tmp_path)
    remove(model)
    fitted[0].attach(model)
    remove(model)
    load_adapter(model, tmp_path)
    torch.testing.assert_close(model(input_ids=torch.tensor([[3, 4, 5]])).logits, logits)


def test_a_saved_or_fitted_adapter_shares_no_memory_with_the_others():
    model = build("llama")
    one, two = fit_many(model, examples(), SPECS[:2], steps=2, batch_size=4, show=False)
    places = [
        p.untyped_storage().data_ptr() for f in (one, two) for layer in f.layers.values() for p in (layer.A, layer.B)
    ]
    assert len(set(places)) == len(places)


def mixture():
    config = tf.Qwen2MoeConfig(**TINY, num_experts=4, num_experts_per_tok=1, moe_intermediate_size=8)
    return tf.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("specs", "texts", "expected"),
    [
        ([], examples(4), "expected specs"),
        (SPECS[:2], [examples(4)], "as many lists of examples"),
        ([SPECS[0], Spec(LoRAConfig(2, 8, dropout=0.1), 1e-3)], examples(4), "without dropout"),
        ([SPECS[0], Spec(LoRAConfig(2, 8, targets=("q_prj",)), 1e-3)], examples(4), "q_proj"),
        ([SPECS[0], Spec(LoRAConfig(2, 8), math.nan)], examples(4), "lr > 0"),
        (SPECS[:2], [], "as many lists of examples"),
    ],
)
def test_bad_input_is_refused_and_loses_nothing(specs, texts, expected):
    model = build("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match=expected):
        fit_many(model, texts, specs, steps=2, show=False)
    assert unchanged(model, before)


def test_a_model_with_an_adapter_is_refused():
    model = build("llama")
    inject(model, 2, 4)
    with pytest.raises(ValueError, match="plain model"):
        fit_many(model, examples(), SPECS[:2], steps=2, show=False)
    assert len(adapters(model)) == 14


def test_dropout_cannot_be_stacked():
    model = build("llama")
    inject(model, 2, 4, dropout=0.1)
    layer = next(iter(adapters(model).values()))
    with pytest.raises(ValueError, match="without dropout"):
        LoRAStack([layer])


def test_an_odd_base_is_called_by_each():
    model = build("llama")
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda *args: None)
    texts = examples()
    (fitted,) = fit_many(model, texts, SPECS[:1], steps=3, batch_size=4, show=False)
    history, _ = apart(model, texts, SPECS[0], steps=3, batch_size=4)
    assert fitted.history.loss == pytest.approx(history.loss, rel=1e-5)
