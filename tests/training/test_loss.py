"""The loss in chunks is the formula's, and no batch's logits ever exist at once."""

import pytest
import torch
from helpers.architectures import adapted, build
from helpers.parity import relative
from helpers.texts import examples
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lorakit import Example
from lorakit.layers.subspace import RandomSubspace
from lorakit.speed.packing import packable
from lorakit.training import loss
from lorakit.training.batch import IGNORE, collate, pack, rows_of
from lorakit.training.loss import completion_loss, labelled_logits, token_losses

FAMILIES = ["llama", "llama-biased-tied", "mistral-gqa", "qwen3", "gemma2", "phi", "gpt2", "opt", "gpt-neox"]


def plain(model, batch):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return F.cross_entropy(logits.float().flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORE)


def gradients(model, value):
    params = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(value, params, allow_unused=True)


@pytest.mark.parametrize("chunk", [1, 5, 256])
@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_the_formulas(name, chunk, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", chunk)
    model, batch = adapted(name), collate(examples(6))
    ours, theirs = completion_loss(model, batch), plain(model, batch)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(gradients(model, ours), gradients(model, theirs), strict=True):
        assert relative(a, b) < 1e-5


def test_capped_logits_are_not_taken_for_the_heads():
    model, batch = adapted("gemma2"), collate(examples(6))
    model.config.final_logit_softcapping = 0.5  # a cap that bites
    torch.testing.assert_close(completion_loss(model, batch), plain(model, batch))


def test_a_cap_that_comes_or_goes_is_seen():
    model, batch, found = adapted("gemma2"), collate(examples(6)), []
    model.get_output_embeddings().weight.data.mul_(30)
    for cap in (None, 0.5, None):
        model.config.final_logit_softcapping = cap
        found.append(completion_loss(model, batch))
        torch.testing.assert_close(found[-1], plain(model, batch))
    assert abs(found[0] - found[1]) > 0.01


def test_finding_a_cap_leaves_dropout_its_random_numbers():
    losses = []
    for _ in range(2):  # the first time the head is not known yet
        model = adapted("gemma2", dropout=0.5).train() if not losses else model
        torch.manual_seed(0)
        losses.append(completion_loss(model, collate(examples(6))))
    assert torch.equal(*losses)


def test_a_head_that_trains_or_is_adapted_gets_its_gradient():
    for targets in (["q_proj", "lm_head"], "all-linear"):
        model, batch = adapted("llama", targets=targets), collate(examples(6))
        if targets == "all-linear":
            model.lm_head.weight.requires_grad_(True)
        ours, theirs = completion_loss(model, batch), plain(model, batch)
        for a, b in zip(gradients(model, ours), gradients(model, theirs), strict=True):
            assert relative(a, b) < 1e-5


def test_a_wrapper_that_moves_the_heads_weight_is_seen():
    model, batch = build("llama"), collate(examples(6))
    wrapped = RandomSubspace(model, 200, seed=1)
    with torch.no_grad():
        wrapped.z.normal_(0, 3, generator=torch.Generator().manual_seed(0))
    ours, theirs = completion_loss(wrapped, batch), plain(wrapped, batch)
    torch.testing.assert_close(ours, theirs)
    assert relative(*(torch.autograd.grad(value, wrapped.z)[0] for value in (ours, theirs))) < 1e-5
    assert abs(completion_loss(wrapped.remove(), batch) - ours) > 0.01


class Widest(TorchDispatchMode):
    """Notes how many rows the tallest matrix over the vocabulary has."""

    rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor) and not function.is_view and output.ndim > 1 and output.shape[-1] == 61:
            self.rows = max(self.rows, output.numel() // 61)
        return output


def test_no_more_logits_exist_than_a_chunk(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 4)
    model, batch = adapted("llama"), collate(examples(12))
    completion_loss(model, batch)  # asks once what the head does
    with Widest() as widest:
        completion_loss(model, batch).backward()
    labelled = int((batch["labels"][:, 1:] != IGNORE).sum())
    assert widest.rows <= 4 < labelled
    with Widest() as widest:
        plain(model, batch).backward()
    assert widest.rows > labelled, "the measure sees them"


def test_token_losses_come_row_by_row_and_weights_are_free():
    model, batch = adapted("llama"), collate(examples(6))
    logits, targets = labelled_logits(model, batch)
    each = token_losses(model, batch)
    torch.testing.assert_close(each, F.cross_entropy(logits, targets, reduction="none"))
    weights = torch.linspace(0, 1, len(each))
    theirs = gradients(model, (F.cross_entropy(logits, targets, reduction="none") * weights).sum())
    for a, b in zip(gradients(model, (each * weights).sum()), theirs, strict=True):
        assert relative(a, b) < 1e-5


def test_bfloat16_stays_near():
    model, batch = adapted("llama", torch.bfloat16), collate(examples(6))
    assert completion_loss(model, batch).dtype == torch.float32
    torch.testing.assert_close(completion_loss(model, batch), plain(model, batch), rtol=2e-2, atol=2e-2)


def test_nothing_goes_backward_below_the_first_adapter():
    model, batch = adapted("llama", targets=["layers.1.self_attn.q_proj"]), collate(examples(6))
    seen = []
    model.model.layers[0].register_forward_hook(lambda _, __, output: seen.append(output))
    completion_loss(model, batch)
    hidden = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    assert not hidden.requires_grad


# ---- packing ----


def mixed():
    """One long text and many short ones."""
    long = Example([3, *range(4, 20)], [IGNORE, *range(4, 20)])
    return [long, *examples(9)]


def test_rows_hold_every_text_once_and_none_is_longer_than_the_longest():
    lengths = [17, 3, 9, 8, 8, 5, 1, 17, 2]
    rows = rows_of(lengths)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 17 for row in rows)
    assert len(rows) == 5  # 70 tokens need five rows of 17


@pytest.mark.parametrize("name", ["llama", "mistral-gqa", "qwen3", "gemma2", "phi", "gpt2", "gpt-neox"])
def test_packed_texts_do_not_see_each_other(name):
    model, texts = adapted(name), mixed()
    assert packable(model).used
    packed, padded = pack(texts), collate(texts)
    assert packed["input_ids"].numel() < 0.7 * padded["input_ids"].numel()
    ours, theirs = completion_loss(model, packed), completion_loss(model, padded)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(gradients(model, ours), gradients(model, theirs), strict=True):
        assert relative(a, b) < 2e-5


def test_a_first_token_is_nobodys_next():
    texts = [
        Example([5, 6, 7], [5, 6, 7]),
        Example([8, 9], [8, 9]),
        Example([3, 4], [3, 4]),
    ]
    labels = pack([*texts, Example([1, 2, 3, 4], [1, 2, 3, 4])])["labels"].tolist()
    assert labels == [[IGNORE, 2, 3, 4], [IGNORE, 6, 7, IGNORE], [IGNORE, 9, IGNORE, 4]]
