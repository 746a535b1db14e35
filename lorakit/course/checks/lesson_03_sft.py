"""The checks of lesson 03's exercises: masks, today's settings, target names, an adapter that acts, a project."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lorakit._optional import need, quiet
from lorakit.course.checks.exercise import Case, exercise, in_parts
from lorakit.course.checks.grading import as_tensor, ask, random_matrix, require, same
from lorakit.layers.lora import LoRALinear
from lorakit.training.batch import IGNORE, Example

TEXTS = [  # prompt, completion, length, pad_id; every completion ends with 2, the end token
    ([11, 2, 12, 13], [21, 2, 22, 2], 10, 2),
    ([11, 12, 13], [21, 22, 2], 9, 0),
    ([5, 7], [9, 0, 8, 2], 6, 0),
]
# an argument of old tutorials -> a field of today's SFTConfig
RENAMED = {"max_seq_length": "max_length", "evaluation_strategy": "eval_strategy"}
RENAMED |= {"no_cuda": "use_cpu", "warmup_ratio": "warmup_steps"}
GONE = ("overwrite_output_dir", "save_safetensors", "tokenizer")  # the last one to the trainer, as processing_class
SETTINGS: list[dict[str, Any]] = [
    {"output_dir": "out", "max_seq_length": 512, "learning_rate": 2e-4},
    {"evaluation_strategy": "steps", "eval_steps": 50, "no_cuda": True},
    {"warmup_ratio": 0.03, "dataset_text_field": "text", "tokenizer": "my tokenizer"},
    {"overwrite_output_dir": True, "save_safetensors": True, "num_train_epochs": 3},
    {"no_cuda": False, "warmup_ratio": 0.0, "max_seq_length": None},
    {"max_length": 256, "eval_strategy": "no", "use_cpu": True, "warmup_steps": 20},
]
Q_PROJ, XQ_PROJ = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.xq_proj"
NAMES = [  # a layer, target_modules, whether PEFT adapts it, and why
    (Q_PROJ, ["q_proj", "v_proj"], True, "the last part of the name is in the list"),
    (Q_PROJ, ["self_attn"], False, "a part in the middle does not count, the name must end with the target"),
    (XQ_PROJ, ["q_proj"], False, "xq_proj is another layer: parts agree as a whole, so a dot must stand before"),
    ("q_proj", ["q_proj"], True, "the name may be the target itself, without a dot before"),
    (Q_PROJ, ["0.self_attn.q_proj"], True, "a target may be several last parts, with their dots"),
    ("layers.1.qxproj", ["q.proj", ".*"], False, "what stands in a list is a name, not a regular expression"),
    (Q_PROJ, r".*\.(q|v)_proj", True, "a string is a regular expression"),
    (XQ_PROJ, ".*q_proj", True, "a regular expression says what it says, and this one takes any letters before q"),
    (Q_PROJ, r".*\.self_attn", False, "a regular expression must match up to the end: fullmatch, not match"),
    (Q_PROJ, r"self_attn\.q_proj", False, "a regular expression must match from the beginning: fullmatch, not search"),
]
UNUSED = "a trained adapter of an unused layer"
STATES = [  # an adapter, the size of B, alpha, in training mode, whether it acts, and why
    ("a trained adapter", 1.0, 4.0, False, True, "logits differ once it is off: `with model.disable_adapter():`"),
    ("a fresh adapter", 0.0, 4.0, False, False, "B is zero, and without it every logit stays the same"),
    ("a trained adapter, alpha = 0", 1.0, 0.0, False, False, "B is not zero, but the scale is: compare logits"),
    ("an adapter after one step", 1e-5, 4.0, False, True, "it acts, if weakly: is there a tolerance that hides it?"),
    ("a fresh adapter, in training mode", 0.0, 4.0, True, False, "dropout makes the difference: call model.eval()"),
    (UNUSED, 1.0, 4.0, False, False, "no logit passes through it: compare logits"),
]
FIELDS = ("trained", "seconds", "gradient_bytes", "optimizer_bytes", "first_loss", "final_loss")
EXAMPLES = [Example([1, k, *x, 2], [IGNORE] * 2 + [*x, 2]) for k in range(3, 11) for x in [[k] * (2 + k % 2)]]


@exercise(
    "right: the completion and its end are counted, nothing else is, also where pad_id is the end token",
    "input_ids, attention_mask, labels",
)
def check_mask() -> Iterator[Case]:
    """Checks `mask(prompt_ids, completion_ids, length, pad_id) -> (input_ids, attention_mask, labels)`."""
    for prompt, reply, length, pad in TEXTS:
        text, n, gap = prompt + reply, len(prompt), length - len(prompt + reply)
        padded, none, rest = text + [pad] * gap, [IGNORE] * n, [IGNORE] * gap
        ids = {
            "is padded on the left: generation wants that, training pads on the right": [pad] * gap + text,
            "is not padded to `length`": text,
        }
        seen = {
            "is 1 on the padding: only the text is seen": [1] * length,
            "goes by value: a token of the text may equal pad_id, go by position": [int(t != pad) for t in padded],
            "is 0 on the prompt: it has no labels, but it is read": [0] * n + [1] * len(reply) + [0] * gap,
        }
        want, by_value = none + reply + rest, [IGNORE if t == pad else t for t in padded]
        labels = {
            "is shifted: the model does that itself, label i is token i": [*want[1:], IGNORE],
            "goes by value: what equals pad_id may be the end, which is then never learned": none + by_value[n:],
            "counts the prompt: its labels are -100": text + rest,
            "counts prompt and padding: their labels are -100": padded,
            "counts the padding: its labels are -100": none + padded[n:],
            "counts the prompt, and goes by value: -100 belongs to places": by_value,
            "counts the prompt instead of the completion": prompt + [IGNORE] * (length - n),
            "leaves out the end token, so nobody learns to stop": none + reply[:-1] + [IGNORE, *rest],
        }
        three = (padded, ids), ([1] * len(text) + [0] * gap, seen), (want, labels)
        on = f"prompt {prompt}, completion {reply}, length {length}, pad_id {pad}"
        yield Case(on, (prompt, reply, length, pad), *in_parts(*three))


def check_modern(modern: Any) -> None:
    """Checks `modern(settings) -> settings`: arguments of old tutorials as today's SFTConfig takes them."""
    hints = {
        "use_cpu": "a new name, in the same sense",
        "warmup_steps": "below 1 it is a share of the steps, as before",
    }
    for settings in SETTINGS:
        on = f"dict({', '.join(f'{name}={value!r}' for name, value in settings.items())})"
        got = ask(modern, settings, on=on)
        require(isinstance(got, dict), on, f"expected a dict, got {type(got).__name__}")
        old = ", ".join(name for name in settings if name in got and (name in RENAMED or name in GONE))
        require(not old, on, f"{old} is still there: SFTConfig has it under a new name, or has no place for it")
        want = {RENAMED.get(name, name): value for name, value in settings.items() if name not in GONE}
        extra = ", ".join(map(str, got.keys() - want.keys()))
        where = f"; is it {extra}?" if extra else ": only what has no place any more goes; False, 0 and None are values"
        for name, value in want.items():
            require(name in got, on, f"the setting of {value!r} is lost{where}")
            equal = type(got[name]) in (type(value), int, float) and got[name] == value
            require(equal, on, f"{name} should be {value!r}: {hints.get(name, 'values stay as they are')}")
        require(not extra, on, f"nobody asked for {extra}, or it is no field of SFTConfig")
    print("right: four names are new, three arguments have no place, the rest is as it was")


def check_matches(matches: Any) -> None:
    """Checks `matches(name, target_modules) -> bool`: PEFT's rule for a list of names, and for a string."""
    for name, targets, want, why in NAMES:
        on = f"{name!r}, target_modules = {targets!r}"
        got = _truth(ask(matches, name, targets, on=on), on)
        require(got == want, on, f"should be {want}: {why}")
    print("right: whole last parts in a list, the whole name in a string, as PEFT decides")


def check_is_active(is_active: Any) -> None:
    """Checks `is_active(model, ids) -> bool`: whether the logits with the adapter are others than without it."""
    ids, given = torch.tensor([[1, 5, 7, 2], [3, 3, 9, 10]], dtype=torch.long), []
    for on, size, alpha, training, want, why in STATES:
        model = _Adapted(size, alpha, used=on != UNUSED).train(training)
        got = _truth(ask(_watched(is_active, lambda model, _: given.append(model)), model, ids, on=on), on)
        require(got == want, on, f"should be {want}: {why}")
        mode = "eval" if training else "training"
        require(given[-1].training == training, on, f"the model is left in {mode} mode, and came in the other")
        require(given[-1].layer.scale == model.layer.scale, on, "the adapter is left switched off: use `with`")
        require(not given[-1].recorded, on, "the passes were recorded for a backward: use torch.no_grad()")
    print("right: fresh, weak, scaled to nothing, in either mode; and the model is left as it was")


def check_compare(compare: Any) -> None:
    """Checks `compare(make_model, examples) -> {"LoRA": record, "full": record}`: the bookkeeping of two trainings."""
    on, made = "a Llama of two layers", []

    def make_model() -> nn.Module:
        model = _small_llama()
        made.append((model, list(model.parameters())))
        return model

    rows = _rows(ask(compare, make_model, EXAMPLES, on=on), on)
    adapter = _adapter(made, on)
    base = made[0][1]
    total, own = (sum(p.numel() for p in tensors) for tensors in (base, adapter))
    for arm, case in zip(rows, _books.cases(total, own, base[0].numel(), len(base), len(adapter)), strict=True):
        row, here = rows[arm], f"{on}, {arm}"
        _books.judge((row["trained"], row["gradient_bytes"], row["optimizer_bytes"]), case)
        falls = f"the loss went from {row['first_loss']:.4g} to {row['final_loss']:.4g}: it should fall"
        require(bool(row["final_loss"] < row["first_loss"]), here, falls)
        require(bool(row["seconds"] > 0), here, "seconds should be more than 0")
    a, b = (rows[arm]["first_loss"] for arm in rows)
    require(same(a, b), on, f"first losses are {a:.4g} and {b:.4g}: same base, same data, B = 0, so they should agree")
    again = _rows(ask(_watched(compare, lambda *_: torch.manual_seed(1)), make_model, EXAMPLES, on=on), on)
    a, b = (each["LoRA"]["final_loss"] for each in (rows, again))
    hint = "A is random, so set the seed before get_peft_model"
    require(same(a, b), f"{on}, LoRA", f"of two calls one ends at {a:.6g} and one at {b:.6g}: {hint}")
    print("right: each arm from the same base, LoRA's base untouched, every byte accounted for")


@exercise("", "trained, gradient_bytes, optimizer_bytes")
def _books(
    total: int = 4272, own: int = 928, shared: int = 384, layers: int = 20, adapters: int = 28
) -> Iterator[Case]:
    """What a record has of `total` numbers in so many tensors, `shared` of them with the head, `own` of the adapter."""
    for arm, n, whole, tensors in (("LoRA", own, own + total, adapters), ("full", total, total, layers)):
        trained = {"counts what is frozen: ask for requires_grad": whole, "is that of the base": total}
        trained |= {"counts a shared weight twice": total + shared, "is that of the adapter": own}
        gradient = {"is a number of values: a float32 takes four bytes": n, "counts frozen parameters": 4 * whole}
        gradient |= {"is 0: measure before zero_grad takes the gradients away": 0, "has 8 bytes a number": 8 * n}
        moments = {"has one moment: AdamW keeps two for each number": 4 * n, "counts frozen parameters": 8 * whole}
        moments |= {"is a number of values: a float32 takes four bytes": 2 * n, "has the gradients as well": 12 * n}
        moments["has AdamW's step counters as well: take exp_avg and exp_avg_sq"] = 8 * n + 4 * tensors
        row = (n, trained), (4 * n, gradient), (8 * n, moments)
        yield Case(f"a Llama of two layers, {arm}", (), *in_parts(*row))


def _rows(record: Any, on: str) -> dict[str, dict[str, Tensor]]:
    """The two records as numbers."""
    require(isinstance(record, dict), on, f"expected a dict of two records, got {type(record).__name__}")
    rows = {arm: record.get(arm) for arm in ("LoRA", "full")}
    for arm, row in rows.items():
        require(isinstance(row, dict), on, f"expected a record, a dict, under {arm!r}, got {type(row).__name__}")
        rows[arm] = {name: as_tensor(row.get(name), f"{on}, {arm}", name) for name in FIELDS}
        odd = ", ".join(name for name, value in rows[arm].items() if value.ndim or not value.isfinite())
        require(not odd, f"{on}, {arm}", f"expected a finite number for {odd}")
    return rows


def _adapter(made: list, on: str) -> list[nn.Parameter]:
    """The parameters of the adapter, once every model is seen to be trained as its arm says."""
    require(bool(made), on, "make_model was never called: it gives each arm a base of its own")
    require(len(made) > 1, on, "one model was made and trained twice: full fine-tuning began where LoRA ended")
    base, full = list(_small_llama().parameters()), 0
    adapters: list[nn.Parameter] = []
    for model, old in made:
        moved = sum(
            not same(p.detach().cpu().double(), q.detach().double(), 0.0) for p, q in zip(old, base, strict=True)
        )
        new = [p for p in model.parameters() if all(p is not q for q in old)]
        require(not (new and moved), on, f"under LoRA {moved} tensors of the base changed: only the adapter may train")
        adapters, full = new or adapters, full if new else max(full, moved)
    require(bool(adapters), on, "no model has an adapter: give one to get_peft_model, and leave the adapter in it")
    require(full == len(base), on, f"full fine-tuning moved {full} of the model's {len(base)} tensors: it trains all")
    return adapters


class _Adapted(nn.Module):
    """A model with dropout of its own and one adapter, which is switched off as in PEFT's models."""

    def __init__(self, size: float, alpha: float, used: bool):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            self.embed = nn.Embedding(11, 8, dtype=torch.float32).requires_grad_(False)
            self.layer = LoRALinear(nn.Linear(8, 11, dtype=torch.float32), 2, alpha, dropout=0.5)
        for seed, p in enumerate(self.parameters()):
            p.data = random_matrix(*p.shape, seed=seed)
        self.layer.B.data *= size
        self.used, self.dropout, self.recorded = used, nn.Dropout(0.5), False

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        self.recorded |= torch.is_grad_enabled()
        layer = self.layer if self.used else self.layer.base
        return SimpleNamespace(logits=layer(self.dropout(self.embed(input_ids))))

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        scale, self.layer.scale = self.layer.scale, 0.0
        yield
        self.layer.scale = scale


def _small_llama() -> nn.Module:
    """A Llama of some thousand parameters with a tied head; every call makes the same."""
    transformers = need("transformers")
    sizes = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    config = transformers.LlamaConfig(**sizes, **heads)
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def _truth(answer: Any, on: str) -> bool:
    value = answer.item() if getattr(answer, "shape", None) == () else answer
    require(isinstance(value, bool), on, f"expected True or False, got {type(answer).__name__}")
    return value


def _watched(function: Any, note: Callable[..., Any]) -> Any:
    """The same function, if it is one, but `note` is called before with what it is given."""

    @wraps(function, updated=())
    def call(*inputs: Any) -> Any:
        note(*inputs)
        return function(*inputs)

    return call if callable(function) else function
