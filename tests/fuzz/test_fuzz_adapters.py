"""Whatever an adapter's two files hold, they are refused in one line with the model as it was, or loaded exactly."""

import contextlib
import json
import resource
import struct
import time

import pytest
import torch
from helpers.fuzz import rounds
from helpers.parity import snapshot, unchanged
from safetensors.torch import load_file, save, save_file
from torch import nn

from lorakit import adapters, inject, load_adapter, save_adapter
from lorakit.merging.inspection import inspect_adapter
from lorakit.merging.inspection_report import as_record, describe
from lorakit.merging.updates import read_updates
from lorakit.models.peft_files import CONFIG, WEIGHTS

MAX_SECONDS, MAX_MEGABYTES = 2, 500
ENDLESS = [
    "(a+)+!",
    "(?:.|..|...|....)+[!?]",
    r"(.*)*\1x",
    "(a|t|te|en|n|.)*[!?]",
    "(" * 3000 + ")" * 3000,
    "a{99999999999999999999}",
]
PATTERNS = [
    *ENDLESS,
    "x|(y",
    "z)",
    "(?i)q",
    "[",
    "",
    ".*",
    "attention_of_letters",
    "q",
    "k",
    "q|k",
    r"\w+",
    "\ud800",
    "a\nb",
]
NUMBERS = [0, 1, -1, 2, 3, 10**9, 10**30, 10**400, 0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf")]
VALUES = [*NUMBERS, True, False, None, "4", "LORA", "none", [], {}, [[]], ["q"], [1], {"q": 4}, {"q": "4"}, {"q": None}]
KEYS = ["r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "target_modules"]
KEYS += ["exclude_modules", "layers_to_transform", "layers_pattern", "peft_type", "init_lora_weights", "bias"]
KEYS += ["modules_to_save", "fan_in_fan_out", "lora_bias", "loftq_config", "task_type", "revision", "unheard_of"]
DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool, torch.complex64]
SHAPES = [[], [0], [1], [2], [2, 0], [2, 6], [6, 2], [3, 6], [2, 6, 1], [2**31, 2**31], [2**63, 2], [-1, 2]]


def plain():
    torch.manual_seed(0)
    model = nn.Sequential()
    for name in ("attention_of_letters", "q", "k"):
        model.add_module(name, nn.Linear(6, 6))
    return model


@pytest.fixture
def files(tmp_path):
    model = inject(plain(), 2, 4, rank_pattern={"k": 3})
    for layer in adapters(model).values():
        nn.init.normal_(layer.B)
    save_adapter(model, tmp_path)
    return tmp_path, load_file(tmp_path / WEIGHTS), json.loads((tmp_path / CONFIG).read_text())


def changed_settings(draw, config):
    key = draw.choice(KEYS)
    kind = draw.randrange(5)
    if kind == 0:
        config.pop(key, None)
    elif kind == 1:
        config[key] = {draw.choice(PATTERNS): draw.choice([1, 2, 3, 4, *VALUES])}
    elif kind == 2:
        config[key] = draw.choice([draw.choice(PATTERNS), [draw.choice(PATTERNS) for _ in range(draw.randrange(4))]])
    else:
        config[key] = draw.choice(VALUES)


def changed_tensors(draw, tensors):
    key, kind = draw.choice(list(tensors)), draw.randrange(7)
    tensor = tensors[key]
    if kind == 0:
        tensors.pop(key)
    elif kind == 1:
        tensors[key] = tensor.to(draw.choice(DTYPES))
    elif kind == 2:
        tensors[key] = tensor.reshape(-1)[: draw.randrange(max(1, tensor.numel()))].clone()
    elif kind == 3:
        tensors[key] = torch.full_like(
            tensor, draw.choice([float("nan"), float("inf"), 1e300, 0.0]), dtype=torch.float64
        )
    elif kind == 4:
        tensors[key] = tensor.new_zeros([abs(n) % 7 for n in draw.choice(SHAPES)])
    elif kind == 5:
        tensors[draw.choice([key + ".x", key[:-1], "", "x" * 5000, "base_model.model.q.weight"])] = tensor.clone()
    else:
        step = draw.choice(["_orig_mod.", "module.", "_fsdp_wrapped_module.", "x.", "."])
        tensors[key.replace("base_model.model.", "base_model.model." + step)] = tensors.pop(key)


def changed_header(draw, data):
    size = struct.unpack("<Q", data[:8])[0]
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    key = draw.choice([key for key in header if key != "__metadata__"])
    kind = draw.randrange(6)
    if kind == 0:
        header[key]["shape"] = draw.choice([*SHAPES, "2", None, [2.5], ["2"]])
    elif kind == 1:
        header[key]["dtype"] = draw.choice(["F64", "F16", "F8_E4M3", "I8", "BOOL", "U64", "f32", "", None, 4])
    elif kind == 2:
        header[key]["data_offsets"] = draw.choice([[0, 0], [0, 2**63], [-1, 4], [4, 0], [0], None, "0", [0, 48]])
    elif kind == 3:
        header["__metadata__"] = draw.choice([None, {"a": 1}, {"lorakit_xxh3": ""}, [], "x", {"lorakit_config": "{}"}])
    text = json.dumps(header)
    if kind == 4:
        text = text[:-1] + ", " + json.dumps(key) + ": " + json.dumps(header[key]) + "}"
    size = draw.choice([len(text), 0, 2**40, len(text) - 1]) if kind == 5 else len(text)
    return struct.pack("<Q", size) + text.encode() + rest


def changed_bytes(draw, data):
    kind, at = draw.randrange(4), draw.randrange(len(data))
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :]
    if kind == 2:
        return data[:at] + data[at:] * 2
    return draw.choice(
        [b"", b"[" * 100_000, b'{"r": 2, "r": 4}', b"null", b"\xff", b"version https://git-lfs.github.com\n"]
    )


def tried(load, source):
    """What loading returned, or the words with which it was refused; neither slow nor large."""
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        found = load(source)
    except (ValueError, OSError) as error:
        found = str(error)
    assert time.process_time() - begin < MAX_SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MAX_MEGABYTES * 1024
    assert not isinstance(found, str) or (found.startswith("expected") and "\n" not in found), found
    return found


def inspected(source):
    """What `lorakit inspect` says, as text and as JSON."""
    found = inspect_adapter(source)
    return describe(found), json.dumps(as_record(found))


def test_adapters(files):
    folder, tensors, config = files
    for draw in rounds("adapters"):
        now, settings = dict(tensors), json.loads(json.dumps(config))
        for _ in range(draw.randrange(3)):
            changed_settings(draw, settings)
        with contextlib.suppress(IndexError):  # nothing left to change
            for _ in range(draw.randrange(3)):
                changed_tensors(draw, now)
        save_file(now, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(settings))
        if draw.random() < 0.3 and now:
            (folder / WEIGHTS).write_bytes(changed_header(draw, save(now)))
        if draw.random() < 0.1:
            path = folder / draw.choice([WEIGHTS, CONFIG])
            path.write_bytes(changed_bytes(draw, path.read_bytes()))
        model = plain() if draw.random() < 0.7 else inject(plain(), 2, 4, rank_pattern={"k": 3})
        before, trains = snapshot(model), [p.requires_grad for p in model.parameters()]
        found = tried(lambda source, model=model: load_adapter(model, source), folder)
        updates = tried(read_updates, folder)
        tried(inspected, folder)
        if isinstance(found, str):
            assert unchanged(model, before), found
            assert [p.requires_grad for p in model.parameters()] == trains, found
            continue
        stored = load_file(folder / WEIGHTS)
        for name, layer in adapters(model).items():
            for part, value in layer.peft_tensors().items():
                (theirs,) = (t for key, t in stored.items() if key.endswith(f".{name}.{part}"))
                assert torch.equal(value, theirs.to(value.dtype))
            if not settings.get("use_dora") and not isinstance(updates, str):
                update = updates.get(name) or updates[f"module.{name}"]  # a wrapper's step, or a name: the model knows
                torch.testing.assert_close(update.matrix, layer.delta_weight(), check_dtype=False)
