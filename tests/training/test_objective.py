"""What a step minimises: in portions, by a loss of one's own, in half precision, and with activations made again."""

import math

import pytest
import torch
import transformers as tf
from helpers.architectures import TINY, build
from helpers.heads import build_head, rows
from helpers.texts import UNEVEN, examples

from lorakit import LoRAConfig, Spec, fit, fit_many, inject

BERT = {name: value for name, value in TINY.items() if name != "bos_token_id"}
LOSS = {"loss_fn": lambda model, batch: model(**batch).loss}


def moved(model, texts=None, **settings):
    """How one step of plain descent moves what trains: its gradient; and the history."""
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    plain = {"steps": 1, "batch_size": 8, "lr": 1.0, "warmup": 0, "clip": math.inf, "optimizer": torch.optim.SGD}
    history = fit(model, texts or UNEVEN, show=False, **(plain | settings))
    after = [p.detach() for p in model.parameters() if p.requires_grad]
    return torch.cat([(a - b).flatten().float() for a, b in zip(after, before, strict=True)]), history


def adapted(name="llama", dtype=torch.float32, checkpointing=False, **settings):
    model = build(name, dtype)
    torch.manual_seed(0)
    inject(model, 4, 8, **settings)
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model


def same(a, b, rounding=1e-5):
    return bool((a - b).norm() <= rounding * b.norm()) and bool(b.norm() > 0)


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_portions_have_the_gradient_of_the_whole(name, packs):
    whole, history = moved(adapted(name), accelerate=packs)
    for portions in (2, 3, 8):
        found, other = moved(adapted(name), accelerate=packs, accumulate=portions)
        assert same(found, whole)
        assert other.loss == pytest.approx(history.loss, rel=1e-5)
        assert other.tokens == history.tokens
    assert history.speed["packing"].startswith("used") == packs


def test_many_adapters_in_portions():
    specs = [Spec(LoRAConfig(rank, 4), 1e-3, seed) for seed, rank in enumerate((2, 3))]
    whole, parts = (
        fit_many(build("llama"), examples(), specs, steps=3, batch_size=5, accumulate=n, show=False) for n in (1, 3)
    )
    for one, other in zip(whole, parts, strict=True):
        assert other.history.loss == pytest.approx(one.history.loss, rel=1e-4)


def classifier():
    return tf.BertForSequenceClassification(tf.BertConfig(**BERT, num_labels=3))


def seq2seq():
    model = build("t5")
    model.config.decoder_start_token_id = 0
    return model


def vision():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    return tf.ViTForImageClassification(tf.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3))


def rows_for(make):
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 61, (12, 7), generator=draw)
    if make is vision:
        pictures = torch.randn(12, 3, 8, 8, generator=draw)
        return [{"pixel_values": picture, "labels": i % 3} for i, picture in enumerate(pictures)]
    if make is seq2seq:
        return [{"input_ids": row, "labels": row[:4]} for row in ids]
    return [{"input_ids": row.tolist(), "attention_mask": [1] * 7, "labels": i % 3} for i, row in enumerate(ids)]


@pytest.mark.parametrize("make", [classifier, seq2seq, vision])
def test_other_models_train_by_their_own_loss(make):
    torch.manual_seed(0)
    model, rows = make().eval(), rows_for(make)
    trained = inject(model, 4, 8, targets="all-linear").train()
    history = fit(
        trained, rows, steps=12, batch_size=6, accumulate=2, lr=3e-2, validation=rows, validate_every=6, show=False,
        **LOSS,
    )  # fmt: skip
    assert history.validation[-1][1] < history.loss[0]
    assert history.tokens[0] == (0 if make is vision else 42)
    model.eval()
    for wrong in (rows, examples(4)):
        with pytest.raises(ValueError, match="loss_fn"):
            fit(model, wrong, steps=1, show=False)


def test_a_loss_of_ones_own_is_the_mean_over_the_step():
    model = torch.nn.Linear(3, 2)
    rows = [{"x": [float(i), 1.0, i % 5], "y": i % 2} for i in range(5)]

    def loss(model, batch):
        return torch.nn.functional.cross_entropy(model(batch["x"]), batch["y"])

    start = {name: value.clone() for name, value in model.state_dict().items()}
    settings = {"batch_size": 5, "loss_fn": loss, "lr": 0.1}
    whole, _ = moved(model, rows, **settings)
    model.load_state_dict(start)
    found, _ = moved(model, rows, accumulate=2, **settings)
    assert same(found, whole)
    for wrong, word in (
        ({"loss_fn": lambda model, batch: model(batch["x"])}, "scalar"),
        ({"loss_fn": None, "collate": list}, "with collate"),
        ({"loss_fn": loss, "collate": lambda rows: {}}, None),
    ):
        with pytest.raises(ValueError if word else KeyError, match=word):
            fit(model, rows, steps=1, show=False, **wrong)
    with pytest.raises(ValueError, match="one shape"):
        fit(model, [{"x": [1.0]}, {"x": [1.0, 2.0]}], steps=1, loss_fn=loss, show=False)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_made_again_give_the_same_gradient(name, dtype):
    expected, _ = moved(adapted(name, dtype))
    found, _ = moved(adapted(name, dtype, checkpointing=True))
    assert same(found, expected, 1e-5 if dtype == torch.float32 else 0.05)


def test_adapters_of_a_bf16_base_train_in_float32():
    model = adapted(dtype=torch.bfloat16)
    kinds = {p.dtype for p in model.parameters() if p.requires_grad}
    assert kinds == {torch.float32}
    found, _ = moved(model)
    expected, _ = moved(adapted())
    assert same(found, expected, 0.1)
    history = fit(model, examples(), steps=30, lr=1e-2, accumulate=2, show=False)
    assert history.loss[-1] < history.loss[0]
    assert {p.dtype for p in model.parameters() if p.requires_grad} == kinds


HEADS = {
    "bert": {"modules_to_save": ["classifier"]},
    "vit": {"modules_to_save": ["classifier"]},
    "llama": {"modules_to_save": ["score"]},
    "whisper": {"trainable_token_indices": [3, 5]},
}


@pytest.mark.parametrize("name", HEADS)
def test_a_model_with_a_head_learns_with_a_loss_of_ones_own(name):
    model = inject(build_head(name), 2, 4, **HEADS[name])
    history = fit(model, rows(name), steps=15, batch_size=4, lr=2e-2, show=False, **LOSS)
    assert history.loss[-1] < 0.98 * history.loss[0]
    with pytest.raises(ValueError, match=r"loss_fn for others, got dict"):
        fit(model, rows(name), steps=1, show=False)
