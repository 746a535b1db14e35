"""The checks of lesson 03, fine-tuning with libraries: what they say to answers that they do not know themselves."""

import peft
import torch
from helpers.exercises import SOLVED, assert_refused, each_mistake, everything
from torch import nn

from lorakit import inject
from lorakit.course import checks
from lorakit.course.checks import lesson_03_sft
from lorakit.training.batch import collate


def accumulated(share=lambda batch, batches: labels_in(batch) / sum(map(labels_in, batches)), at_once=False, keep=True):
    """An accumulation that check_accumulate refuses, for one reason."""

    def accumulate(model, batches):
        losses = []
        for batch in batches:
            losses.append(model(**batch).loss * share(batch, batches))
            if not at_once:
                losses[-1].backward()
        if at_once:
            sum(losses).backward()
        if not keep:
            model.zero_grad()
        return sum(losses).item()

    return accumulate


def labels_in(batch):
    return (batch["labels"][:, 1:] != -100).sum().item()


def packed(**wrong):
    """A packed row that check_pack_row refuses, for one reason."""

    def pack_row(texts):
        names = "input_ids", "position_ids", "labels", "visible"
        right = dict(zip(names, SOLVED["check_pack_row"](texts), strict=True))
        return tuple(wrong.get(name, lambda texts, value: value)(texts, right[name]) for name in names)

    return pack_row


def cut_at(percentile):
    return lambda lengths, most_cut: (percentile(sorted(p + c for p, c in lengths), most_cut), 0.0)


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
    "check_padding_share": [
        (lambda lengths, _: 1 - sum(lengths) / (len(lengths) * max(lengths)), "pads all batches to one length"),
        (lambda lengths, size: SOLVED["check_padding_share"](sorted(lengths), size), "sorts first"),
        (lambda lengths, size: 1 - SOLVED["check_padding_share"](lengths, size), "is the share of text"),
    ],
    "check_mask": [
        (lambda prompt, reply, length, pad: prompt + reply, "input_ids, attention_mask, labels`, got list of 8"),
        (masked_by_value, "length 10, pad_id 2: labels goes by value: what equals pad_id may be the end"),
    ],
    "check_choose_length": [
        (cut_at(lambda totals, most: (totals[-1] + 7) // 8 * 8), "max_length is that of the longest text"),
        (cut_at(lambda totals, most: 512), "201 texts, of which a share of 0.05 may be cut: max_length should be"),
        (
            lambda lengths, most: (SOLVED["check_choose_length"](lengths, most)[0], most),
            "lost should be",
        ),
        (lambda lengths, most: 128, "expected `return max_length, lost`, got int"),
    ],
    "check_accumulate": [
        (accumulated(share=lambda batch, batches: 1 / len(batches)), "the loss is the mean of the batches' means"),
        (accumulated(share=lambda batch, batches: 1), "the loss is the sum of the batches' means"),
        (accumulated(share=lambda batch, batches: labels_in(batch)), "the loss is the sum over the tokens"),
        (accumulated(at_once=True), "call it batch by batch"),
        (accumulated(keep=False), "no gradient has arrived in p.grad"),
        (lambda model, batches: model(**batches[0]).loss, "no gradient has arrived in p.grad"),
        (
            lambda model, batches: accumulated()(model, batches) + accumulated(lambda *_: 1)(model, batches),
            "the loss should be",
        ),
        (
            lambda model, batches: (accumulated()(model, batches) + accumulated()(model, batches)) / 2,
            "the gradient is off by exactly the factor 2",
        ),
    ],
    "check_pack_row": [
        (packed(position_ids=lambda texts, places: list(range(len(places)))), "position_ids go on from text to text"),
        (packed(labels=lambda texts, _: [label for _, labels in texts for label in labels]), "labels count the first"),
        (packed(visible=lambda texts, seen: torch.ones_like(seen).tril()), "visible shows a text those before it"),
        (packed(visible=lambda texts, seen: seen | seen.T), "visible shows what is still to come"),
        (packed(visible=lambda texts, seen: seen.T), "visible is turned round"),
        (packed(input_ids=lambda texts, ids: ids[1:]), "input_ids should have shape"),
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


def test_a_packed_row_answers_as_its_texts_do_alone():
    model = lesson_03_sft._small_llama()
    for texts in lesson_03_sft.PACKS:
        given = [(prompt + reply, [-100] * len(prompt) + reply) for prompt, reply in texts]
        ids, places, labels, visible = SOLVED["check_pack_row"](given)
        mask = torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))[None, None]
        row = {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([places]), "attention_mask": mask}
        alone = [model(torch.tensor([text]), labels=torch.tensor([label])) for text, label in given]
        out = model(**row, labels=torch.tensor([labels]))
        torch.testing.assert_close(out.logits[0], torch.cat([each.logits[0] for each in alone]))
        counts = [sum(label != -100 for label in each[1:]) for _, each in given]
        by_tokens = sum(n * each.loss for n, each in zip(counts, alone, strict=True)) / sum(counts)
        torch.testing.assert_close(out.loss, by_tokens)


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
