"""The loop and the two ways to look at a model's answers, against transformers' own where it has them."""

import math

import pytest
import torch
from helpers.architectures import build
from helpers.parity import peft_model, snapshot, unchanged
from helpers.texts import TOKENIZER, Characters, examples
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from transformers import PreTrainedTokenizerFast, get_scheduler

from lorakit import (
    Example,
    Recipe,
    encode,
    exact_match,
    fit,
    greedy,
    inject,
    load_adapter,
    loraplus_groups,
    remove,
    save_adapter,
)
from lorakit._optional import quiet
from lorakit.models.inject import adapters
from lorakit.training.batch import IGNORE, collate
from lorakit.training.loss import completion_loss
from lorakit.training.recipe import SCHEDULES, batches, schedule_share
from lorakit.training.reference_loop import plain_loop


def test_encode_labels_the_completion_only():
    assert encode(TOKENIZER, "ab", "c\x02") == Example([3, 4, 5, 2], [IGNORE, IGNORE, 5, 2])


def test_a_text_that_is_too_long_loses_the_beginning_of_its_prompt():
    for bos, length, ids in [
        (None, 9, [3, 4, 5, 6, 7]),
        (None, 4, [4, 5, 6, 7]),
        (3, 4, [3, 5, 6, 7]),
        (4, 4, [4, 5, 6, 7]),
        (3, 3, [3, 6, 7]),
        (3, 2, [6, 7]),
    ]:
        tokenizer = Characters()
        tokenizer.bos_token_id = bos
        assert encode(tokenizer, "abc", "de", max_length=length) == Example(ids, [IGNORE] * (len(ids) - 2) + [6, 7])
    with pytest.raises(ValueError, match="1 more"):
        encode(TOKENIZER, "abc", "de", max_length=1)


def words_tokenizer(unknown, **declared):
    """Whole words, "a b c", and the token that stands for others."""
    words = Tokenizer(WordLevel({unknown: 0, "a": 1, "b": 2, "c": 3}, unk_token=unknown))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, **declared)


def test_words_that_the_tokenizer_gives_another_tokens_id_are_refused():
    tokenizer = words_tokenizer("<pad>", pad_token="<pad>")
    assert tokenizer.unk_token_id is None
    assert encode(tokenizer, "a <pad> b", "c").input_ids == [1, 0, 2, 3]  # the token by its own name
    for prompt, completion, named in [
        ("a d b d", "c", "'d'"),
        ("a", "d c <pad> e<pad>", "'d', 'e'"),
        ("a f", "<pad> g", "'f', 'g'"),
    ]:
        with pytest.raises(ValueError, match=f"expected words that the tokenizer knows, got {named}$"):
            encode(tokenizer, prompt, completion)


def test_a_declared_unknown_token_may_be_read_and_not_written():
    tokenizer = words_tokenizer("<unk>", unk_token="<unk>", pad_token="a")
    assert encode(tokenizer, "a d", "c").input_ids == [1, 0, 3]
    with pytest.raises(ValueError, match=r"got 'd'$"):
        encode(tokenizer, "a", "d")


def test_bytes_have_no_unknown_words():
    bytes_ = Tokenizer(BPE({mark: i for i, mark in enumerate([*ByteLevel.alphabet(), "<end>"])}, []))
    bytes_.pre_tokenizer, bytes_.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_, unk_token="<end>", eos_token="<end>")
    for text in ("a <end> ü", "漢字 🙂\t\x00", "<end>"):
        assert tokenizer.decode(encode(tokenizer, text, text).input_ids) == text + text


def test_collate_pads_on_the_right_and_hides_it():
    batch = collate([Example([5, 6, 7], [IGNORE, 6, 7]), Example([8, 9], [IGNORE, 9])])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORE, 6, 7], [IGNORE, 9, IGNORE]]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2", "phi", "gpt-neox"])
def test_the_loss_is_that_of_transformers_and_padding_does_not_count(name):
    model, batch = build(name), collate(examples(6))
    ours, theirs = completion_loss(model, batch), model(**batch).loss
    torch.testing.assert_close(ours, theirs)
    parameters = list(model.parameters())
    for mine, yours in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-4, atol=1e-6)
    singles = [collate([example]) for example in examples(6)]
    counts = [int((single["labels"] != IGNORE).sum()) for single in singles]
    mean = sum(completion_loss(model, single) * n for single, n in zip(singles, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(ours, mean)
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_a_model_without_a_named_head_works_too():
    class Wrapped(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner = model

        def forward(self, **inputs):
            return self.inner(**inputs)

    model, batch = build("llama"), collate(examples(6))
    torch.testing.assert_close(completion_loss(Wrapped(model), batch), completion_loss(model, batch))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("steps", "warmup"), [(40, 4), (7, 0), (1, 0), (10, 9)])
def test_the_schedules_are_those_of_transformers(steps, warmup, name):
    parameter = torch.nn.Parameter(torch.zeros(1))
    theirs = get_scheduler(
        "constant_with_warmup" if name == "constant" else name,
        torch.optim.SGD([parameter], lr=1.0),
        num_warmup_steps=warmup,
        num_training_steps=steps,
    )
    for step in range(steps):
        assert schedule_share(step, steps, warmup, name) == pytest.approx(theirs.get_last_lr()[0])
        theirs.optimizer.step()
        theirs.step()


def test_batches_go_through_everything_before_anything_returns():
    found = batches(10, 4, 5, seed=1)
    flat = [i for batch in found for i in batch]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]
    assert found == batches(10, 4, 5, seed=1) != batches(10, 4, 5, seed=2)
    assert {len(batch) for batch in found} == {4}


def adapted(seed=0, **settings):
    model = build("llama")
    torch.manual_seed(seed)
    inject(model, 4, 8, **settings)
    return model


def test_fit_learns_and_touches_only_what_requires_a_gradient():
    model, data = build("llama"), examples()
    fit(model, data, steps=60, lr=1e-2, show=False)  # a base that is not random
    inject(model, 8, 16)
    frozen = {key: value.clone() for key, value in model.state_dict().items() if key.rpartition(".")[2] not in "AB"}
    before = exact_match(model, data, show=False)
    history = fit(model, data, steps=150, lr=1e-2, show=False)
    assert len(history.loss) == len(history.lr) == len(history.tokens) == len(history.seconds) == 150
    assert history.loss[-1] < 0.85 * history.loss[0]
    assert sum(exact_match(model, data, show=False)) > sum(before)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in frozen.items())
    assert all(p.grad is None for p in model.parameters())
    assert not model.training
    assert "150 steps" in str(history)


def test_fit_trains_whole_models_too():
    model = build("gpt2")
    history = fit(model, examples(), steps=30, lr=1e-2, show=False)
    assert history.loss[-1] < history.loss[0]


def test_fit_is_a_function_of_its_seeds_and_leaves_the_random_state():
    def weights(seed, **settings):
        model = adapted(dropout=0.3)
        state = torch.get_rng_state()
        fit(model, examples(), steps=5, seed=seed, show=False)
        assert torch.equal(torch.get_rng_state(), state)
        return torch.cat([p.flatten() for p in model.parameters() if p.requires_grad])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_the_learning_rate_in_the_history_is_the_one_used():
    history = fit(adapted(), examples(), steps=10, warmup=0.2, lr=1.0e-3, show=False)
    assert history.lr == pytest.approx([1e-3 * schedule_share(step, 10, 2) for step in range(10)])
    assert history.tokens[0] == sum(len(examples()[i].input_ids) for i in batches(24, 8, 1, 0)[0])


def test_loraplus_trains_b_at_its_own_rate():
    model, texts = adapted(), examples()
    expected = adapted()
    optimizer = torch.optim.AdamW(loraplus_groups(expected, 1e-3, ratio=4.0), weight_decay=0.0)
    for step, indices in enumerate(batches(24, 8, 3, 0)):
        for group, rate in zip(optimizer.param_groups, (1e-3, 4e-3), strict=True):
            group["lr"] = rate * schedule_share(step, 3, 1)
        completion_loss(expected, collate([texts[i] for i in indices])).backward()
        torch.nn.utils.clip_grad_norm_([p for p in expected.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    history = fit(model, texts, steps=3, lr=1e-3, loraplus_ratio=4.0, show=False)
    assert history.lr == pytest.approx([0, 1e-3, 5e-4])
    for mine, yours in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-4, atol=1e-6)


def test_fit_takes_another_optimizer():
    """One step of SGD from B = 0 moves B by the rate times its gradient."""
    model, expected = adapted(), adapted()
    texts = examples(8)
    completion_loss(expected, collate(texts)).backward()
    settings = {"steps": 1, "lr": 0.5, "warmup": 0, "clip": math.inf, "show": False}
    fit(model, texts, **settings, optimizer=lambda groups: torch.optim.SGD(groups, momentum=0.9))
    for mine, yours in zip(adapters(model).values(), adapters(expected).values(), strict=True):
        torch.testing.assert_close(mine.B, -0.5 * yours.B.grad, rtol=1e-3, atol=1e-7)


def test_checkpoints_are_saved_on_the_way(tmp_path):
    def train(after_step):
        model = build("llama")
        torch.manual_seed(0)
        inject(model, 2, 4)
        fit(model, examples(), steps=4, after_step=after_step and after_step(model), show=False)
        return model

    seen = []

    def saving(model):
        def save(step):
            seen.append(step)
            save_adapter(model, tmp_path / str(step.number))

        return save

    model, plain = train(saving), train(None)
    assert [step.number for step in seen] == [1, 2, 3, 4]
    assert unchanged(model, snapshot(plain)), "saving changes nothing"
    again = build("llama")
    load_adapter(again, tmp_path / "4")
    assert unchanged(again, snapshot(model))
    remove(again)
    load_adapter(again, tmp_path / "2")
    assert not unchanged(again, snapshot(model))

    def stopping(model):
        def stop(step):
            if step.number == 2:
                raise RuntimeError("enough")

        return stop

    with pytest.raises(RuntimeError, match="enough"):
        train(stopping)


def test_loraplus_groups_are_those_of_peft():
    theirs = peft_model(build("llama"), r=4, lora_alpha=8, target_modules="all-linear")
    with quiet():
        from peft.optimizers import create_loraplus_optimizer
    made = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    expected = {id(p): group["lr"] for group in made.param_groups for p in group["params"]}
    groups = loraplus_groups(theirs, 1e-3)
    assert {id(p): group["lr"] for group in groups for p in group["params"]} == expected
    for ratio in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="ratio"):
            loraplus_groups(theirs, 1e-3, ratio)
    with pytest.raises(ValueError, match="inject"):
        loraplus_groups(build("llama"), 1e-3)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_stops_with_a_message_and_the_last_finite_weights(where):
    model = adapted()
    if where == "loss":
        model.lm_head.register_forward_hook(lambda m, i, o: o * float("nan") if next(calls) == 3 else o)
    else:
        model.lm_head.register_full_backward_hook(
            lambda m, i, o: tuple(g * math.inf for g in i) if next(calls) == 3 else i
        )
    calls = iter(range(100))
    with pytest.raises(FloatingPointError, match=r"step 3.*learning rate below 0\.001"):
        fit(model, examples(), steps=12, lr=1e-3, show=False)
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())
    assert not model.training


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"steps": 0}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"lr": 0.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"warmup": 1.0}, "warmup"),
        ({"examples": []}, "example"),
        ({"examples": [Example([3] * 33, [3] * 33)]}, "context"),
    ],
)
def test_bad_arguments_are_refused(settings, word):
    model = adapted()
    before = snapshot(model)
    with pytest.raises(ValueError, match=word):
        fit(model, **({"examples": examples(), "steps": 2, "show": False} | settings))
    assert unchanged(model, before)


@pytest.mark.parametrize(
    "numbers", [{"steps": 0}, {"batch_size": 0}, {"warmup": 1.0}, {"clip": 0.0}, {"weight_decay": -0.1}]
)
def test_a_recipe_is_checked_when_it_is_written(numbers):
    with pytest.raises(ValueError, match=next(iter(numbers))):
        Recipe(**({"steps": 2} | numbers))


def test_a_recipe_and_its_numbers_say_the_same():
    recipe = Recipe(steps=4, batch_size=3, warmup=0.5, weight_decay=0.1, clip=0.01)
    losses, weights = [], []
    for way in ((recipe,), ()):
        model = adapted()
        losses.append(fit(model, examples(), *way, lr=1e-2, show=False, **({} if way else vars(recipe))).loss)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]))
    assert losses[0] == losses[1]
    assert torch.equal(*weights)
    for wrong, word in (({"steps": 3}, "both"), ({"step": 3}, "step")):
        with pytest.raises((ValueError, TypeError), match=word):
            fit(adapted(), examples(), *((recipe,) if word == "both" else ()), show=False, **wrong)


def test_nothing_to_train_or_to_learn_is_refused():
    with pytest.raises(ValueError, match="inject"):
        fit(build("llama").requires_grad_(False), examples(), steps=1, show=False)
    with pytest.raises(ValueError, match="labelled"):
        Example([3, 4], [IGNORE, IGNORE])
    with pytest.raises(ValueError, match="one label"):
        Example([3, 4], [4])


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen3"])
def test_greedy_in_batches_equals_one_by_one_and_exact_match_predicts_it(name):
    model = build(name)
    fit(model, examples(), steps=100, lr=1e-2, show=False)
    prompts = ["abc", "fghij", "ab", "klmnopq", "tsr"]
    together = greedy(model, TOKENIZER, prompts, stop="\x02", max_new_tokens=6, batch_size=3, show=False)
    alone = [greedy(model, TOKENIZER, [p], stop="\x02", max_new_tokens=6, show=False)[0] for p in prompts]
    assert together == alone
    assert any(together)
    for prompt, answer in zip(prompts, together, strict=True):
        if len(answer) < 6:  # it ended by itself
            assert exact_match(model, [encode(TOKENIZER, prompt, answer + "\x02")], show=False) == [True]
        assert exact_match(model, [encode(TOKENIZER, prompt, answer + "z\x02")], show=False) == [False]


def test_a_stop_of_several_tokens_ends_an_answer():
    model = build("llama")
    fit(model, [encode(TOKENIZER, "abc", "defghij\x02")], steps=60, lr=1e-2, show=False)
    free = greedy(model, TOKENIZER, ["abc"], stop="\x02", max_new_tokens=8, show=False)[0]
    assert len(free) >= 5
    assert (
        greedy(model, TOKENIZER, ["abc"], stop=free[2:4], max_new_tokens=8, show=False)[0] == free.split(free[2:4])[0]
    )


OWN_SETTINGS = {
    "a penalty": {"repetition_penalty": 9.0},
    "no pair twice": {"no_repeat_ngram_size": 1},
    "forbidden words": {"bad_words_ids": [[k] for k in range(3, 50)]},
    "suppressed tokens": {"suppress_tokens": list(range(3, 50))},
    "a first token": {"forced_bos_token_id": 7, "begin_suppress_tokens": list(range(3, 50))},
    "a shortest answer": {"min_new_tokens": 8},
    "ends of its own": {"eos_token_id": list(range(3, 50))},
    "several answers": {"num_beams": 2, "num_return_sequences": 2, "return_dict_in_generate": True},
    "no time": {"max_time": 0.0},
}


@pytest.mark.parametrize("own", OWN_SETTINGS.values(), ids=OWN_SETTINGS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_models_generation_config_has_no_say_and_stays(own, wrapped):
    model = build("llama")
    fit(model, [encode(TOKENIZER, "abc", "ddeffg\x02")], steps=80, lr=1e-2, show=False)
    asked = peft_model(model, r=2, target_modules=["q_proj"]) if wrapped else model
    inner = asked.get_base_model() if wrapped else model
    assert greedy(asked, TOKENIZER, ["abc"], max_new_tokens=9, show=False) == ["ddeffg"]
    config = inner.generation_config
    config.update(**own)
    assert greedy(asked, TOKENIZER, ["abc"], max_new_tokens=9, show=False) == ["ddeffg"]
    assert inner.generation_config is config
    assert all(getattr(config, key) == value for key, value in own.items())


def test_a_stop_is_not_looked_for_in_the_prompt():
    model = build("llama")
    fit(model, [encode(TOKENIZER, "abc", "defghij\x02")], steps=60, lr=1e-2, show=False)
    free = greedy(model, TOKENIZER, ["abc"], max_new_tokens=8, show=False)
    assert free[0].startswith("d")
    assert greedy(model, TOKENIZER, ["abc"], stop="bc", max_new_tokens=8, show=False) == free
    assert greedy(model, TOKENIZER, ["abc"], stop="cd", max_new_tokens=8, show=False) == free


def test_generation_keeps_the_models_mode_and_takes_no_prompts():
    model = build("llama").train()
    assert greedy(model, TOKENIZER, [], show=False) == []
    greedy(model, TOKENIZER, ["abc"], max_new_tokens=2, show=False)
    assert model.training


def test_the_plain_loop_is_fits_recipe():
    texts = [Example([1, k, k + 1, 2], [IGNORE, IGNORE, k + 1, 2]) for k in range(3, 15)]
    settings = {"steps": 30, "batch_size": 4, "lr": 1e-2, "seed": 5}
    losses, weights = [], []
    for train in (plain_loop, lambda *args, **kwargs: fit(*args, **kwargs, show=False).loss):
        torch.manual_seed(0)
        model = build("llama")
        inject(model, 2, 4)
        losses.append(train(model, texts, **settings))
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]))
    assert losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    torch.testing.assert_close(*weights, rtol=1e-2, atol=1e-4)
