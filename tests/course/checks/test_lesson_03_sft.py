"""The checks of lesson 03, fine-tuning with libraries: what they say to answers that they do not know themselves."""

import dataclasses
import re

import peft
import pytest
import torch
from helpers.exercises import SOLVED, assert_refused, each_mistake, everything
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from lorakit import inject
from lorakit.course import checks
from lorakit.course.checks import lesson_03_sft
from lorakit.models.targets import is_named
from lorakit.training.batch import collate


def modern_but(change):
    """Right settings, changed by a function of them and of what was given."""

    def modern(settings):
        new = SOLVED["check_modern"](settings)
        changed = change(new, settings)
        return new if changed is None else changed

    return modern


def renamed(settings, **names):
    return {names.get(name, name): value for name, value in settings.items()}


def matching(in_list=is_named, in_string=re.fullmatch):
    def matches(name, targets):
        if isinstance(targets, str):
            return bool(in_string(targets, name))
        return any(in_list(name, target) for target in targets)

    return matches


def differing(different=lambda a, b: not torch.equal(a, b), mode=False, back=True, grad=False, switch=True):
    """A function that check_is_active refuses, for one reason."""

    def is_active(model, ids):
        was = model.training
        model.train(mode if mode is not None else was)
        with torch.set_grad_enabled(grad):
            on = model(ids).logits
            off = model.disable_adapter()
            off.__enter__()
            without = model(ids).logits
            if switch:
                off.__exit__(None, None, None)
        model.train(was if back else model.training)
        return different(on, without)

    return is_active


def compared(models=2, seed=0, adapt=True, thaw=False, spare=False, **wrong):
    """A comparison that check_compare refuses, for one reason; `wrong` makes other entries of the record."""

    def compare(make_model, examples):
        record, batch, bases = {}, collate(examples), [make_model() for _ in range(models)]
        for arm, model in zip(("LoRA", "full"), (bases * 2)[:2], strict=True):
            if seed is not None:
                torch.manual_seed(seed)
            if arm == "LoRA" and adapt:
                inject(model, rank=2, alpha=4)
            if arm == "full" or thaw:
                model.requires_grad_(True)
            if arm == "full" and spare:
                model.get_input_embeddings().requires_grad_(False)
            params = [p for p in model.parameters() if p.requires_grad]
            optimizer, losses = torch.optim.AdamW(params, lr=1e-2), []
            for _ in range(4):
                optimizer.zero_grad()
                losses.append(model(**batch).loss)
                losses[-1].backward()
                optimizer.step()
            n = sum(p.numel() for p in params)
            record[arm] = {"trained": n, "seconds": 1.0, "gradient_bytes": 4 * n, "optimizer_bytes": 8 * n}
            record[arm] |= {"first_loss": losses[0].item(), "final_loss": losses[-1].item()}
            record[arm] |= {name: make(record[arm], arm, model) for name, make in wrong.items()}
        return record

    return compare


def masked_by_value(prompt, reply, length, pad):
    ids, seen, labels = SOLVED["check_mask"](prompt, reply, length, pad)
    return ids, seen, [-100 if token == pad else label for token, label in zip(ids, labels, strict=True)]


MISTAKES = {  # check -> a wrong answer, and the words of its hint
    "check_mask": [
        (lambda prompt, reply, length, pad: prompt + reply, "input_ids, attention_mask, labels`, got list of 8"),
        (masked_by_value, "length 10, pad_id 2: labels goes by value: what equals pad_id may be the end"),
    ],
    "check_modern": [
        (lambda settings: settings, "max_seq_length is still there"),
        (modern_but(lambda new, old: {**new, **old}), "max_seq_length is still there"),
        (modern_but(lambda new, old: new | {k: v for k, v in old.items() if k == "tokenizer"}), "tokenizer is still"),
        (modern_but(lambda new, old: old.clear()), "an argument was changed in place"),
        (modern_but(lambda new, old: renamed(new, max_length="max_len")), "the setting of 512 is lost; is it max_len?"),
        (modern_but(lambda new, old: {k: v for k, v in new.items() if v}), "False, 0 and None are values"),
        (modern_but(lambda new, old: {k: v for k, v in new.items() if k != "dataset_text_field"}), "'text' is lost"),
        (
            modern_but(lambda new, old: new | {"use_cpu": not new["use_cpu"]} if "use_cpu" in new else new),
            "a new name, in the same sense",
        ),
        (
            modern_but(lambda new, old: new | {"warmup_steps": 0}),
            "nobody asked for warmup_steps",
        ),
        (
            modern_but(lambda new, old: new | ({"warmup_steps": 30} if "warmup_ratio" in old else {})),
            "below 1 it is a share",
        ),
        (modern_but(lambda new, old: new | {"processing_class": "x"}), "nobody asked for processing_class"),
        (modern_but(lambda new, old: new | {"learning_rate": 1e-4} if "learning_rate" in new else new), "as they are"),
        (modern_but(lambda new, old: list(new)), "expected a dict, got list"),
    ],
    "check_matches": [
        (matching(in_list=lambda name, target: target in name), "a part in the middle does not count"),
        (matching(in_list=lambda name, target: name.endswith(target)), "xq_proj is another layer"),
        (matching(in_list=lambda name, target: name.endswith("." + target)), "without a dot before"),
        (matching(in_list=lambda name, target: name.split(".")[-1] == target), "several last parts"),
        (
            matching(in_list=lambda name, target: re.search(rf"(^|\.){target}$", name)),
            "a name, not a regular",
        ),
        (matching(in_string=re.match), "fullmatch, not match"),
        (matching(in_string=re.search), "must match up to the end"),
        (matching(in_string=lambda target, name: re.search(f"{target}$", name)), "fullmatch, not search"),
        (matching(in_string=lambda target, name: is_named(name, target)), "a string is a regular expression"),
        (
            matching(in_string=lambda s, name: re.fullmatch(s, name) and ".xq" not in name),
            "this one takes any letters",
        ),
        (lambda name, targets: False, "should be True: the last part of the name is in the list"),
        (lambda name, targets: re.search("q", name), "expected True or False, got Match"),
    ],
    "check_is_active": [
        (lambda model, ids: bool(model.layer.B.any()), "alpha = 0: should be False: B is not zero, but the scale is"),
        (
            lambda model, ids: bool(model.layer.B.any()) and model.layer.scale > 0,
            "of an unused layer: should be False",
        ),
        (lambda model, ids: True, "a fresh adapter: should be False: B is zero"),
        (lambda model, ids: False, "a trained adapter: should be True: logits differ once it is off"),
        (differing(different=torch.equal), "a trained adapter: should be True"),
        (differing(different=lambda a, b: (a - b).abs().max() > 1e-2), "is there a tolerance that hides it?"),
        (differing(mode=None), "in training mode: should be False: dropout makes the difference"),
        (differing(back=False), "the model is left in eval mode"),
        (differing(mode=True), "a fresh adapter: should be False"),
        (differing(grad=True), "use torch.no_grad()"),
        (differing(switch=False), "the adapter is left switched off"),
        (differing(different=lambda a, b: a != b), "expected True or False, got Tensor"),
    ],
    "check_compare": [
        (
            lambda *given: {arm: dict.fromkeys(lesson_03_sft.FIELDS, 1) for arm in ("LoRA", "full")},
            "never called",
        ),
        (compared(models=1), "one model was made and trained twice"),
        (compared(adapt=False), "no model has an adapter"),
        (compared(thaw=True), "of the base changed: only the adapter may train"),
        (compared(spare=True), "full fine-tuning moved 19 of the model's 20 tensors"),
        (compared(trained=lambda row, arm, model: everything(model)), "LoRA: trained counts what is frozen"),
        (compared(gradient_bytes=lambda row, arm, model: 0), "LoRA: gradient_bytes is 0: measure before zero_grad"),
        (compared(optimizer_bytes=lambda row, arm, model: row["trained"]), "LoRA: optimizer_bytes should be 7,424"),
        (compared(seed=None), "set the seed before get_peft_model"),
        (compared(first_loss=lambda row, arm, model: row["first_loss"] + (arm == "full")), "so they should agree"),
        (compared(final_loss=lambda row, arm, model: row["first_loss"]), "it should fall"),
        (compared(seconds=lambda row, arm, model: 0), "seconds should be more than 0"),
        (compared(seconds=lambda row, arm, model: float("nan")), "expected a finite number for seconds"),
        (compared(final_loss=lambda row, arm, model: None), "final_loss should be a tensor or a number"),
        (lambda make_model, examples: {"LoRA": 3}, "expected a record, a dict, under 'LoRA', got int"),
        (lambda make_model, examples: [1, 2], "expected a dict of two records, got list"),
    ],
}


@each_mistake("03_sft", MISTAKES)
def test_a_mistake_is_refused_with_its_hint(check, answer, hint, capsys):
    assert_refused(check, answer, hint, capsys)


def test_a_comparison_may_use_adapters_of_any_library():
    checks.check_compare(compared())


@pytest.mark.parametrize(("name", "targets", "want"), [row[:3] for row in lesson_03_sft.NAMES])
def test_names_match_as_peft_has_it(name, targets, want):
    config = peft.LoraConfig(target_modules=targets)
    assert bool(check_target_module_exists(config, name)) == want


def test_an_adapter_of_peft_is_seen_to_act(capsys):
    is_active, ids = SOLVED["check_is_active"], torch.tensor([[1, 5, 7, 2]])
    config = peft.LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5, task_type="CAUSAL_LM")
    model = peft.get_peft_model(lesson_03_sft._small_llama(), config).train()
    assert not is_active(model, ids)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.constant_(p, 0.01)
    assert is_active(model, ids)
    assert model.training


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing")
def test_settings_are_those_of_the_installed_trl():
    import trl

    fields = {field.name for field in dataclasses.fields(trl.SFTConfig)}
    old = {*lesson_03_sft.RENAMED, *lesson_03_sft.GONE}
    assert not old & fields
    for settings in lesson_03_sft.SETTINGS:
        assert SOLVED["check_modern"](settings).keys() <= fields
    config = trl.SFTConfig(output_dir="unused", warmup_steps=0.03, use_cpu=True, bf16=False)
    assert config.get_warmup_steps(1000) == 30, "below 1 it is a share"
