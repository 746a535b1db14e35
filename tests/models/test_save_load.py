"""Adapter files: exact ways there and back, and damage of every kind refused with the model untouched."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
import warnings

import pytest
import torch
from helpers.architectures import build, logits_of
from helpers.parity import peft_model, randomise, snapshot, unchanged
from safetensors.torch import load_file, save_file
from torch import nn

from lorakit import AdapterError, LoRALinear, adapters, inject, load_adapter, save_adapter
from lorakit.merging.updates import read_updates
from lorakit.models import peft_files
from lorakit.models.peft_files import CONFIG, WEIGHTS


@pytest.fixture
def saved(tmp_path):
    """A folder with an adapter of the tiny Llama, and the adapted model."""
    model = build("llama")
    inject(model, 3, 8, scale_rule="rslora", dropout=0.1)
    randomise(model)
    return save_adapter(model, tmp_path / "adapter"), model


def edit_config(folder, **changes):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, edit):
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)  # without a checksum, as PEFT writes


def test_there_and_back_is_exact(saved):
    folder, model = saved
    again = build("llama")
    load_adapter(again, folder)
    assert torch.equal(logits_of(again, "llama"), logits_of(model, "llama"))
    for name, layer in adapters(again).items():
        first = adapters(model)[name]
        assert (layer.rank, layer.scale, layer.dropout.p) == (first.rank, first.scale, 0.1)
    assert not [p for p in folder.iterdir() if p.name not in (WEIGHTS, CONFIG)]


def test_ranks_scales_and_rules_may_differ_between_layers(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    plain.load_state_dict(model.state_dict())
    inject(model, 2, 4, targets=["0", "1", "2"])
    model[1] = LoRALinear(model[1].base, 3, 5, scale_rule="rslora")
    model[2] = LoRALinear(model[2].base, 2, 7, scale_rule=lambda alpha, rank: alpha / rank**2)
    randomise(model)
    load_adapter(plain, save_adapter(model, tmp_path))
    x = torch.randn(3, 4)
    torch.testing.assert_close(plain(x), model(x))
    assert [a.rank for a in adapters(plain).values()] == [2, 3, 2]
    load_adapter(model, tmp_path)  # and into the model that it came from


def test_a_second_load_fills_the_same_parameters(saved):
    folder, model = saved
    again = build("llama")
    inject(again, 3, 8, scale_rule="rslora")
    parameters = [p for p in again.parameters() if p.requires_grad]
    load_adapter(again, folder)
    assert all(a is b for a, b in zip(parameters, [p for p in again.parameters() if p.requires_grad], strict=True))
    assert torch.equal(logits_of(again, "llama"), logits_of(model, "llama"))


@pytest.mark.parametrize(
    "settings",
    [{"rank": 4}, {"alpha": 4}, {"targets": ["q_proj"]}, {"scale_rule": "lora"}],
    ids=lambda s: next(iter(s)),
)
def test_loading_over_other_adapters_is_refused(saved, settings):
    folder, _ = saved
    other = build("llama")
    inject(other, **({"rank": 3, "alpha": 8, "scale_rule": "rslora"} | settings))
    before = snapshot(other)
    with pytest.raises(AdapterError):
        load_adapter(other, folder)
    assert unchanged(other, before)


def test_saving_over_an_adapter_keeps_other_files(saved):
    folder, model = saved
    (folder / "README.md").write_text("mine")
    randomise(model, seed=9)
    save_adapter(model, folder)
    assert (folder / "README.md").read_text() == "mine"
    again = build("llama")
    load_adapter(again, folder)
    assert torch.equal(logits_of(again, "llama"), logits_of(model, "llama"))


def test_what_the_files_cannot_hold_is_refused(saved, tmp_path):
    _, model = saved
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        save_adapter(model, tmp_path / "new")
    model.lm_head.weight.requires_grad_(False)
    next(iter(adapters(model).values())).B.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def nan(tensors):
    next(iter(tensors.values()))[0, 0] = float("nan")


def infinite(tensors):
    list(tensors.values())[-1][0, 0] = float("inf")


def fewer_rows(tensors):
    key = next(iter(tensors))
    tensors[key] = tensors[key][:-1].contiguous()


def integers(tensors):
    key = next(iter(tensors))
    tensors[key] = tensors[key].to(torch.int32)


def one_missing(tensors):
    tensors.pop(next(iter(tensors)))


def one_pair_missing(tensors):
    for key in [key for key in tensors if "layers.1.mlp.up_proj" in key]:
        tensors.pop(key)


def one_too_many(tensors):
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.zeros(3, 61)


def foreign_names(tensors):
    for key in list(tensors):
        tensors[key.replace("layers", "blocks")] = tensors.pop(key)


TENSOR_DAMAGE = [nan, infinite, fewer_rows, integers, one_missing, one_pair_missing, one_too_many, foreign_names]
CONFIG_DAMAGE = {
    "another rank": {"r": 4},
    "rank as text": {"r": "3"},
    "rank missing": {"r": None},
    "alpha missing": {"lora_alpha": None},
    "alpha as text": {"lora_alpha": "8"},
    "fewer targets": {"target_modules": ["q_proj"]},
    "no targets": {"target_modules": None},
    "a broken pattern": {"rank_pattern": {"q_proj(": 2}},
    "a rank pattern that is not true": {"rank_pattern": {"q_proj": 2}},
    "dora": {"use_dora": True},
    "an unknown method's setting": {"use_hyperlora": {"depth": 2}},
    "another method": {"peft_type": "LOHA"},
    "no method": {"peft_type": None},
    "dropout 2": {"lora_dropout": 2.0},
    "dropout as text": {"lora_dropout": "a lot"},
    "targets as a number": {"target_modules": 7},
}


def refused(folder, error=ValueError):
    model = build("llama")
    before = snapshot(model)
    with pytest.raises(error) as caught:
        load_adapter(model, folder)
    assert unchanged(model, before)
    assert all(p.requires_grad for p in model.parameters())
    return str(caught.value)


@pytest.mark.parametrize("damage", TENSOR_DAMAGE, ids=lambda f: f.__name__)
def test_damaged_tensors_are_refused(saved, damage):
    folder, _ = saved
    edit_tensors(folder, damage)
    assert "expected" in refused(folder, AdapterError)


@pytest.mark.parametrize("case", CONFIG_DAMAGE)
@pytest.mark.parametrize("checksum", [True, False])
def test_damaged_settings_are_refused(saved, case, checksum):
    folder, _ = saved
    if not checksum:
        edit_tensors(folder, lambda tensors: None)
    edit_config(folder, **CONFIG_DAMAGE[case])
    assert "expected" in refused(folder, AdapterError)


def test_a_changed_alpha_is_noticed_by_the_checksum(saved):
    folder, _ = saved
    edit_config(folder, lora_alpha=9)
    assert "checksum" in refused(folder, AdapterError)


def test_the_base_models_name_may_be_edited(saved):
    folder, _ = saved
    edit_config(folder, base_model_name_or_path="me/my-model", task_type="CAUSAL_LM")
    load_adapter(build("llama"), folder)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"r": ' + "9" * 5000 + "}", "\xff"])
def test_settings_that_no_parser_takes_are_refused(saved, text):
    folder, _ = saved
    (folder / CONFIG).write_text(text, encoding="latin-1")
    assert "expected JSON" in refused(folder, AdapterError)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_truncated_files_are_refused(saved, share, name):
    folder, _ = saved
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(share * len(data))])
    assert "expected" in refused(folder, AdapterError)


def test_a_flipped_bit_is_refused_or_harmless(saved):
    folder, model = saved
    path, draw = folder / WEIGHTS, random.Random(0)
    data, expected = path.read_bytes(), logits_of(model, "llama")
    header = int.from_bytes(data[:8], "little") + 8
    positions = [draw.randrange(header, len(data)) for _ in range(60)] + list(range(0, header, 23))
    for position in positions:
        damaged = bytearray(data)
        damaged[position] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        if position >= header:
            refused(folder, AdapterError)
            continue
        again = build("llama")
        before = snapshot(again)
        try:
            load_adapter(again, folder)  # a flip in the header may hit a name that nobody reads
        except AdapterError:
            assert unchanged(again, before)
        else:
            assert torch.equal(logits_of(again, "llama"), expected)


def test_missing_files_and_pickles_are_refused(saved):
    folder, _ = saved
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    assert "pickle" in refused(folder, FileNotFoundError)
    (folder / CONFIG).unlink()
    assert CONFIG in refused(folder, FileNotFoundError)
    refused(folder / "nowhere", FileNotFoundError)


ENDLESS = "(?:.|..|...)+[!?]"
WRONG_SETTINGS = {
    "an endless expression for targets": {"target_modules": ENDLESS},
    "an endless expression for ranks": {"rank_pattern": {ENDLESS: 3}},
    "a flag in the middle": {"rank_pattern": {"(?i)q_proj": 3}},
    "a repetition without bounds": {"target_modules": "a{99999999999999999999}"},
    "very deep groups": {"target_modules": "(" * 3000 + ")" * 3000},
    "targets as an object": {"target_modules": {"q_proj": 1}},
    "exclusions as a bool": {"exclude_modules": False},
    "ranks as a list": {"rank_pattern": []},
    "rslora as text": {"use_rslora": "false"},
    "dora as a number": {"use_dora": 0},
    "dropout as a bool": {"lora_dropout": False},
    "rank as a bool": {"r": True},
    "alpha as a bool": {"lora_alpha": True},
    "a huge rank": {"r": 10**400},
    "a huge alpha": {"lora_alpha": 10**400},
    "no rank": {"r": 0},
    "a start as a number": {"init_lora_weights": 1},
}


@pytest.mark.parametrize("case", WRONG_SETTINGS)
def test_wrong_settings_are_refused_by_load_and_read_alike(saved, case):
    folder, _ = saved
    edit_tensors(folder, lambda tensors: None)
    edit_config(folder, **WRONG_SETTINGS[case])
    begin = time.process_time()
    assert refused(folder, AdapterError).startswith("expected")
    with pytest.raises(AdapterError, match="expected"):
        read_updates(folder)
    assert time.process_time() - begin < 4


def test_what_is_refused_is_not_told_at_any_length(saved):
    folder, _ = saved
    edit_config(folder, init_lora_weights="x" * 100_000)
    assert len(refused(folder, AdapterError)) < 1100


def test_a_setting_that_is_there_twice_is_refused(saved):
    folder, _ = saved
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(text.replace('"r": 3', '"r": 4, "r": 3'))
    assert "'r' is there 2 times" in refused(folder, AdapterError)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bool, torch.complex64], ids=str)
def test_tensors_that_are_no_plain_floats_are_refused(saved, dtype):
    folder, _ = saved
    edit_tensors(folder, lambda tensors: tensors.update({key: each.to(dtype) for key, each in tensors.items()}))
    assert "expected tensors of F64" in refused(folder, AdapterError)
    with pytest.raises(AdapterError, match="expected tensors of F64"):
        read_updates(folder)


def test_numbers_that_the_parameters_cannot_hold_are_refused(saved):
    folder, _ = saved
    edit_tensors(folder, lambda tensors: tensors.update({key: each.double() + 1e300 for key, each in tensors.items()}))
    assert "finite" in refused(folder, AdapterError)


def test_factors_of_two_dtypes_are_read_in_the_wider(saved):
    folder, model = saved
    edit_tensors(folder, lambda tensors: tensors.update({k: t.double() for k, t in tensors.items() if "lora_A" in k}))
    for name, update in read_updates(folder).items():
        torch.testing.assert_close(update.matrix, adapters(model)[name].delta_weight().detach().double())


class Named(LoRALinear):
    """A layer of a reader's own."""


def unknown_name():
    return {"x": {"dtype": "F32", "shape": [2**28], "data_offsets": [0, 2**30]}}


def another_shape():
    A = {"dtype": "F32", "shape": [2**25, 8], "data_offsets": [0, 2**30]}
    B = {"dtype": "F32", "shape": [8, 2**25], "data_offsets": [2**30, 2**31]}
    return {f"base_model.model.0.lora_{part}.weight": each for part, each in (("A", A), ("B", B))}


@pytest.mark.parametrize("header", [unknown_name(), another_shape()], ids=["an unknown name", "another shape"])
@pytest.mark.parametrize("layer", [LoRALinear, Named])
def test_names_and_shapes_are_refused_before_a_tensor_is_read(tmp_path, monkeypatch, header, layer):
    save_adapter(inject(nn.Sequential(nn.Linear(8, 8)), 2, 4, layer=layer), tmp_path)
    text, size = json.dumps(header).encode(), max(each["data_offsets"][1] for each in header.values())
    (tmp_path / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(tmp_path / WEIGHTS, 8 + len(text) + size)  # sparse: a few bytes on the disk
    for after in ("digest", "check_finite"):
        monkeypatch.setattr(peft_files, after, lambda *_: pytest.fail("the tensors were read"))
    plain = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(AdapterError, match="expected"):
        load_adapter(plain, tmp_path, layer=None if layer is LoRALinear else layer)
    assert all(p.requires_grad for p in plain.parameters())
    with pytest.raises(AdapterError, match="expected"):
        read_updates(tmp_path)


def test_a_file_for_some_of_the_adapters_is_refused(saved):
    folder, _ = saved
    save_adapter(inject(build("llama"), 3, 8, targets=["q_proj"], scale_rule="rslora"), folder / "less")
    full = inject(build("llama"), 3, 8, scale_rule="rslora")
    with pytest.raises(AdapterError, match="all adapters"):
        load_adapter(full, folder / "less")


@pytest.mark.parametrize("name", ["llama", "llama-biased-tied"])
@pytest.mark.parametrize("embeddings", ["auto", True])
def test_the_base_tensors_that_peft_writes_beside_an_adapted_head_are_compared(tmp_path, name, embeddings):
    theirs = peft_model(build(name), r=3, target_modules=["q_proj", "lm_head"], init_lora_weights=False).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path, save_embedding_layers=embeddings)
    assert any("base_layer" in key for key in load_file(tmp_path / WEIGHTS))
    ours = load_adapter(build(name), tmp_path)
    torch.testing.assert_close(logits_of(ours, name), logits_of(theirs, name))
    load_adapter(ours, tmp_path)  # and over the adapters that are there
    assert read_updates(tmp_path).keys() == adapters(ours).keys()
    wide = load_adapter(build(name).double(), tmp_path)
    torch.testing.assert_close(logits_of(wide, name).float(), logits_of(ours, name))
    edit_tensors(tmp_path, lambda tensors: tensors["base_model.model.lm_head.base_layer.weight"].add_(1e-3))
    with pytest.raises(AdapterError, match="this model's own values"):
        load_adapter(build(name), tmp_path)


class DataParallel(nn.Module):
    """Holds a module as torch's class of that name does, which looks for a GPU."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_inside(model):
    model.model.layers[1] = compiled(model.model.layers[1])
    return model


def both(model):
    return DataParallel(compiled(compiled_inside(model)))


@pytest.mark.parametrize("wrap", [compiled, compiled_inside, DataParallel, both])
def test_wrappers_leave_no_trace_in_the_names(saved, wrap, tmp_path):
    folder, model = saved
    expected = logits_of(model, "llama")
    save_adapter(wrap(model), tmp_path / "wrapped")
    assert load_file(tmp_path / "wrapped" / WEIGHTS).keys() == load_file(folder / WEIGHTS).keys()
    assert json.loads((tmp_path / "wrapped" / CONFIG).read_text()) == json.loads((folder / CONFIG).read_text())
    for again in (build("llama"), inject(build("llama"), 3, 8, scale_rule="rslora")):
        wrapped = load_adapter(wrap(again), tmp_path / "wrapped")
        assert all(torch.equal(each.B, adapters(model)[name].B) for name, each in adapters(wrapped).items())
        with torch.compiler.set_stance("force_eager"):  # tracing does not get along with the tests' type checker
            assert torch.equal(logits_of(again, "llama"), expected)
    assert read_updates(wrapped).keys() == read_updates(folder).keys()


@pytest.mark.parametrize("step", ["_orig_mod.", "_fsdp_wrapped_module.", "module."])
def test_files_that_were_written_from_inside_a_wrapper_load(saved, step):
    folder, model = saved

    def rename(tensors):
        for key in list(tensors):
            tensors[key.replace("base_model.model.", "base_model.model." + step)] = tensors.pop(key)

    edit_tensors(folder, rename)
    assert torch.equal(logits_of(load_adapter(build("llama"), folder), "llama"), logits_of(model, "llama"))


def test_a_share_of_an_adapter_is_not_saved(saved, tmp_path):
    _, model = saved
    layer = next(iter(adapters(model).values()))
    layer.A.data = layer.A.data[:0]  # as under ZeRO-3
    with pytest.raises(ValueError, match="expected floats of shape"):
        save_adapter(model, tmp_path / "share")


def test_another_models_adapter_is_refused(saved):
    folder, _ = saved
    gpt2 = build("gpt2")
    before = snapshot(gpt2)
    with pytest.raises(AdapterError, match="another model"):
        load_adapter(gpt2, folder)
    assert unchanged(gpt2, before)


def test_an_interrupted_save_leaves_the_old_adapter(saved, monkeypatch):
    folder, model = saved
    expected = logits_of(model, "llama")
    randomise(model, seed=9)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_adapter(model, folder)
    again = build("llama")
    load_adapter(again, folder)
    assert torch.equal(logits_of(again, "llama"), expected)
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG, WEIGHTS]


KILLED = """
import os, sys, torch
from lorakit import inject, load_adapter, save_adapter
from lorakit.merging.updates import read_updates
folder = sys.argv[1]
def model(rank):
    with torch.random.fork_rng():
        torch.manual_seed(rank)
        net = torch.nn.Sequential(torch.nn.Linear(6, 6))
        inject(net, rank, 4)
        torch.nn.init.normal_(net[0].B)
        return net
old, new = model(2), model(3)
states = [(net[0].rank, net[0].B.sum().item()) for net in (old, new)]
class Killer:
    def __init__(self, at): self.left = at
    def __call__(self, event, args):
        if event.startswith(("os.", "open", "shutil.")) and folder in str(args):
            self.left -= 1
            if not self.left: os.kill(os.getpid(), 9)
at, seen = 0, set()
while True:
    at += 1
    save_adapter(old, folder)
    if (pid := os.fork()) == 0:
        sys.addaudithook(Killer(at))
        save_adapter(new, folder)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    net = load_adapter(torch.nn.Sequential(torch.nn.Linear(6, 6)), folder)
    found = (net[0].rank, net[0].B.sum().item())
    assert found in states, (at, found)
    assert read_updates(folder)["0"].rank == found[0]
    seen.add(found)
    if status == 0:
        break
save_adapter(old, folder)
assert seen == set(states) and at > 5, (seen, at)
print(sorted(os.listdir(folder)))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_kill_before_any_call_leaves_the_old_adapter_or_the_new(tmp_path):
    run = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True)
    assert (run.stdout.strip(), run.returncode) == (str([CONFIG, WEIGHTS]), 0), run.stderr


def test_an_adapter_that_was_saved_over_another_one_is_guarded_as_well(saved):
    folder, _ = saved
    model = build("llama")
    inject(model, 3, 6)
    save_adapter(model, folder)
    edit_config(folder, lora_alpha=9)
    assert "checksum" in refused(folder, AdapterError)


@pytest.mark.skipif(sys.platform == "win32", reason="a limit on files' sizes, as a full disk")
def test_a_full_disk_is_an_oserror_with_place_and_reason(saved):
    folder, model = saved
    expected = logits_of(model, "llama")
    randomise(model, seed=9)
    resource = pytest.importorskip("resource")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limit[1]))
    try:
        with pytest.raises(OSError, match=f"File too large.*{WEIGHTS}") as caught:
            save_adapter(model, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert caught.value.filename == str(folder / WEIGHTS)
    again = build("llama")
    load_adapter(again, folder)
    assert torch.equal(logits_of(again, "llama"), expected)
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG, WEIGHTS]


@pytest.mark.long
def test_killed_saves_never_leave_a_file_that_loads_wrong(tmp_path):
    script = (
        "import sys, torch; from torch import nn; from lorakit import inject, save_adapter\n"
        "model = nn.Sequential(nn.Linear(300, 300)); inject(model, 64, 8)\n"
        "while True:\n    nn.init.normal_(model[0].B); save_adapter(model, sys.argv[1]); print('saved', flush=True)\n"
    )
    target = tmp_path / "killed"
    for milliseconds in (30, 70, 110):
        process = subprocess.Popen([sys.executable, "-c", script, str(target)], stdout=subprocess.PIPE)
        process.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(milliseconds / 1000)
        process.kill()
        process.wait()
        process.stdout.close()
        model = nn.Sequential(nn.Linear(300, 300))
        load_adapter(model, target)
        shutil.rmtree(target)
