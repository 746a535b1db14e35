"""A saved adapter is told as it is: its layers, their updates, what is wrong with it, who serves it."""

import copy
import json
import warnings

import peft
import pytest
import torch
from helpers.architectures import build
from helpers.parity import randomise
from safetensors.torch import load_file, save_file

import lorakit
from lorakit import cli
from lorakit.experiments.adapter_figure import draw_adapter
from lorakit.layers.lowrank import effective_rank
from lorakit.layers.nf4 import dequantize, quantize
from lorakit.merging import against_base, serving
from lorakit.merging.against_base import compare_with_base
from lorakit.merging.inspection import inspect_adapter
from lorakit.merging.inspection_report import as_record, describe, is_broken
from lorakit.merging.inspection_report import warnings as notes_of
from lorakit.models.peft_files import AdapterError

PATTERNS = {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"v_proj": 24}}
LORA = {  # kind -> PEFT's settings, what it is called, the extra parts, who serves it beside PEFT
    "lora": ({}, "LoRA", set(), {"vLLM", "llama.cpp"}),
    "rslora": ({"use_rslora": True}, "rsLoRA", set(), {"vLLM"}),
    "dora": ({"use_dora": True}, "DoRA", set(), set()),
    "patterns": (PATTERNS, "LoRA", set(), set()),
    "whole layers": ({"modules_to_save": ["lm_head"]}, "LoRA", {"whole layer (modules_to_save)"}, set()),
    "tokens": ({"trainable_token_indices": {"embed_tokens": [3, 5]}}, "LoRA", {"token rows"}, set()),
    "bias": ({"lora_bias": True}, "LoRA", {"bias of B"}, set()),
    "embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, "LoRA", set(), {"vLLM", "llama.cpp"}),
}
OTHERS = {
    "LOHA": lambda: peft.LoHaConfig(r=2, target_modules=["q_proj"]),
    "VERA": lambda: peft.VeraConfig(r=2, target_modules=["q_proj"]),
    "IA3": lambda: peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


def by_peft(folder, config, base=None):
    """An adapter that PEFT has saved, and PEFT's model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(base) if base is not None else build("llama"), config)
        randomise(model)
        model.save_pretrained(folder, save_embedding_layers=False)
    return model


def lora(folder, **settings):
    targets = ["q_proj", "k_proj", "v_proj", "down_proj"]
    return by_peft(folder, peft.LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": targets} | settings))


def by_lorakit(folder, base, **settings):
    model = lorakit.inject(copy.deepcopy(base), 4, 8, **settings)
    randomise(model)
    lorakit.save_adapter(model, folder)
    return model


def change(folder, edit):
    """Rewrites an adapter's tensors."""
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("kind", LORA)
def test_each_update_of_pefts_is_measured_without_being_built(tmp_path, kind):
    settings, method, extra, engines = LORA[kind]
    model = lora(tmp_path, **settings)
    found = inspect_adapter(tmp_path)
    assert found.method == method
    assert found.saved_by.startswith("PEFT 0.")
    assert {part.kind for part in found.extra} == extra
    assert found.numbers == sum(t.numel() for t in load_file(tmp_path / "adapter_model.safetensors").values())
    assert not is_broken(found)
    assert {each.engine for each in found.served if each.able} == {"PEFT"} | engines
    assert all(each.source.startswith("https://") for each in found.served)
    layers = {layer.name: layer for layer in found.layers}
    theirs = {name: m for name, m in model.base_model.model.named_modules() if hasattr(m, "get_delta_weight")}
    assert layers.keys() == theirs.keys()
    for name, module in theirs.items():
        delta, layer = module.get_delta_weight("default").double(), layers[name]
        values = torch.linalg.svdvals(delta)
        assert sorted(layer.shape) == sorted(delta.shape)
        assert layer.rank == module.r["default"]
        assert layer.scale == pytest.approx(module.scaling["default"])
        assert layer.norm == pytest.approx(delta.norm().item(), rel=1e-6)
        assert layer.effective_rank == pytest.approx(lorakit.layers.lowrank.effective_rank(values), rel=1e-4)


@pytest.mark.parametrize("kind", OTHERS)
def test_of_other_methods_the_settings_and_numbers_are_told(tmp_path, kind):
    by_peft(tmp_path, OTHERS[kind]())
    found = inspect_adapter(tmp_path)
    assert (found.method, found.layers) == (kind, ())
    assert found.numbers > 0
    assert [each.able for each in found.served] == [True, False, False]
    text = describe(found)
    assert "layers, norms and ranks are told of LoRA only" in text
    assert "beside LoRA" not in text
    assert {each.value for each in peft.PeftType} == serving.PEFT_KINDS


def test_what_is_wrong_is_told(tmp_path):
    base = build("llama")
    by_lorakit(tmp_path, base)
    assert (inspect_adapter(tmp_path).saved_by, notes_of(inspect_adapter(tmp_path))) == ("lorakit", [])
    key = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"

    def spoil(tensors):
        tensors[key.format(0, "B")].zero_()
        tensors[key.format(1, "A")][0, 0] = torch.nan
        tensors["stray"] = torch.ones(3)
        del tensors[key.format(1, "A").replace("q_proj", "k_proj")]

    change(tmp_path, spoil)
    found = inspect_adapter(tmp_path)
    assert found.idle == ["model.layers.0.self_attn.q_proj"]
    assert found.not_finite == (key.format(1, "A"),)
    assert found.zero == (key.format(0, "B"),)
    assert next(each for each in found.layers if each.name == "model.layers.1.self_attn.q_proj").norm is None
    assert is_broken(found)
    text = "\n".join(notes_of(found))
    for words in (
        "k_proj has no pair of factors",
        "NaN or infinity in",
        "1 of 13 layers do nothing",
        "3 numbers in stray",
    ):
        assert words in text
    change(
        tmp_path, lambda tensors: tensors.update({key.format(0, "B"): torch.full((16, 4), 1e300, dtype=torch.float64)})
    )
    huge = as_record(inspect_adapter(tmp_path))
    assert json.dumps(huge, allow_nan=False)


@pytest.mark.parametrize(
    ("edit", "words"),
    [({"lora_alpha": 9}, "another checksum"), ({"r": 5}, "has rank 4, its settings say 5")],
)
def test_settings_that_were_altered_are_told(tmp_path, edit, words):
    by_lorakit(tmp_path, build("llama"))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | edit))
    assert words in "\n".join(inspect_adapter(tmp_path).problems)


@pytest.mark.parametrize("edit", [{"peft_type": None}, {"r": "four"}, {"lora_alpha": [1]}, {"modules_to_save": 3}])
def test_settings_out_of_range_are_refused(tmp_path, edit):
    by_lorakit(tmp_path, build("llama"))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | edit))
    with pytest.raises(AdapterError, match="expected"):
        inspect_adapter(tmp_path)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("layer", [lorakit.LoRALinear, lorakit.DoRALinear])
def test_an_update_is_compared_with_its_weight(tmp_path, monkeypatch, name, layer):
    base = build(name)
    base.save_pretrained(tmp_path / "base")
    model = by_lorakit(tmp_path / "adapter", base, layer=layer)
    loaded = []
    monkeypatch.setattr(against_base, "load_model", lambda folder: loaded.append(folder) or (base, None))
    found = inspect_adapter(tmp_path / "adapter")
    compared = compare_with_base(found, tmp_path / "base", k=3)
    assert bool(loaded) == (name == "gpt2"), "weights that lie the other way round come out of the model"
    assert compared.misfits == ()
    assert len(compared.layers) == len(found.layers)
    for each in compared.layers:
        adapter = model.get_submodule(each.name)
        W = lorakit.layers.bases.dense_weight(adapter.base, torch.float32)
        dW = lorakit.layers.bases.dense_weight(adapter.merged(), torch.float32).detach() - W
        assert each.relative_norm == pytest.approx((dW.norm() / W.norm()).item(), rel=1e-4)
        U, U0 = (torch.linalg.svd(matrix, full_matrices=False).U for matrix in (W + dW, W))
        assert each.intruders == int(((U[:, :3].T @ U0).abs().amax(1) < 0.5).sum())
        rounded = dequantize(*quantize(W.contiguous()), tuple(W.shape))
        assert each.nf4_error == pytest.approx((W - rounded).norm().item(), rel=1e-4)


def test_another_base_is_told_and_four_bits_are_warned_of(tmp_path, monkeypatch, capsys):
    base, other = build("llama"), build("mistral-gqa")
    base.save_pretrained(tmp_path / "base")
    model = lorakit.inject(copy.deepcopy(base), 4, 8)
    for adapter in lorakit.adapters(model).values():
        adapter.B.data = 1e-4 * torch.randn(adapter.B.shape)
    lorakit.save_adapter(model, tmp_path / "adapter")
    command = ["inspect", str(tmp_path / "adapter"), "--base", str(tmp_path / "base")]
    assert cli.main([*command, "--top", "0"]) == 0
    assert "before a merge into four bits: in 14 of 14 layers" in capsys.readouterr().out
    other.model.layers = other.model.layers[:1]
    other.model.layers[0].mlp.up_proj = torch.nn.Linear(16, 25, bias=False)
    monkeypatch.setattr(against_base, "_open", lambda folder, stack: {})
    monkeypatch.setattr(against_base, "load_model", lambda folder: (other, None))
    assert cli.main(command) == 1
    text = capsys.readouterr().out
    assert "broken: model.layers.0.mlp.up_proj is 25 x 16 in the base, 24 x 16 in the adapter" in text
    assert "broken: the base has no model.layers.1." in text


def test_the_command_tells_it_for_people_and_programs_and_draws_it(tmp_path, capsys):
    by_lorakit(tmp_path / "adapter", build("llama"))
    command = ["inspect", str(tmp_path / "adapter")]
    assert cli.main([*command, "--figure", str(tmp_path / "new" / "it.png")]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) < 160
    assert "q_proj" in text
    assert (tmp_path / "new" / "it.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main([*command, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert len(record["layers"]) == 14
    assert {"name", "rank", "alpha", "scale", "norm", "effective_rank"} <= record["layers"][0].keys()
    assert cli.main([*command, "--figure", str(tmp_path / "it.pdf")]) == 2
    assert "expected a name that ends in .png" in capsys.readouterr().err


RANKS = [([8], 8), ([16], 16), ([17], 32), ([4, 300], 320), ([600], None)]


@pytest.mark.parametrize(("ranks", "needed"), RANKS)
def test_vllm_needs_a_rank_that_it_allows(ranks, needed):
    file = {"peft_type": "LORA", "r": ranks[-1], "lora_alpha": ranks[-1]}
    vllm = serving.served_by(file, ranks, [1.0] * len(ranks), [])[1]
    assert vllm.able == (needed is not None)
    assert (f"--max-lora-rank {needed}" in vllm.reason) == (needed is not None and needed > 16)


@pytest.mark.parametrize(("start", "able"), [(True, True), ("gaussian", True), ("pissa", False), ("olora", False)])
def test_an_adapter_that_needs_a_changed_base_is_pefts_alone(start, able):
    file = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "init_lora_weights": start}
    assert [each.able for each in serving.served_by(file, [4], [2.0], [])] == [True, able, able]


def test_experts_are_told_one_by_one(tmp_path, monkeypatch):
    base = build("deepseek-v3")
    base.save_pretrained(tmp_path / "base")
    model = lorakit.inject(copy.deepcopy(base), 2, 4, rank_pattern={"shared_experts.*": 3, "experts.*": 4})
    randomise(model)
    experts = lorakit.adapters(model)["model.layers.1.mlp.experts"]
    experts.B["down_proj"].data[2] = 0  # one that no token of the training has met
    found = inspect_adapter(lorakit.save_adapter(model, tmp_path / "adapter"))
    assert {each.rank for each in found.layers if "shared" in each.name} == {3}
    assert (found.extra, found.problems, found.idle) == ((), (), ["model.layers.1.mlp.experts.down_proj[2]"])
    own = {each.name: each for each in found.layers if each.expert is not None}
    assert len(own) == 2 * 4
    monkeypatch.setattr(against_base, "load_model", lambda folder: (base, None))
    against = {each.name: each for each in compare_with_base(found, tmp_path / "base", k=0).layers}
    for key in ("gate_up_proj", "down_proj"):
        for e, dW in enumerate(experts.delta_weight(key).detach().double()):
            name = f"model.layers.1.mlp.experts.{key}[{e}]"
            values = torch.linalg.svdvals(dW)
            assert (own[name].kind, own[name].rank, own[name].shape) == (f"experts.{key}", 4, tuple(dW.shape))
            assert own[name].norm == pytest.approx(dW.norm().item(), rel=1e-5)
            assert own[name].effective_rank == pytest.approx(effective_rank(values) if dW.any() else 0, rel=1e-4)
            assert against[name].weight_norm == pytest.approx(experts.base.get_parameter(key)[e].norm().item())
    figure = draw_adapter(found)
    (line,) = (line for line in figure.axes[0].lines if line.get_label() == "experts.gate_up_proj")
    assert line.get_ydata()[0] == pytest.approx(experts.delta_weight("gate_up_proj").norm().item(), rel=1e-5)
    text = describe(found)
    assert "1 of 24 layers do nothing (zero update): model.layers.1.mlp.experts.down_proj[2]" in text
    words = {each.engine: each.reason for each in found.served if not each.able}
    assert "is_3d_moe_weight" in words["vLLM"]
    assert "experts are parameters" in words["llama.cpp"]
