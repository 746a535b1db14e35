"""An adapter of any method becomes the nearest LoRA, and its certificate says what is true."""

import copy
import json
import warnings

import peft
import pytest
import torch
from helpers.architectures import build, logits_of
from helpers.chat import byte_tokenizer
from helpers.parity import peft_model, randomise
from safetensors.torch import load_file

import lorakit
from lorakit import AdapterError, cli
from lorakit.layers.bases import dense_weight
from lorakit.merging.convert import CERTIFICATE, convert_adapter
from lorakit.merging.updates import read_updates

TARGETS = ["q_proj", "v_proj", "down_proj"]
SMALL = {"target_modules": TARGETS, "r": 2}
METHODS = {  # config -> the largest rank of its update, None if it has none but that of the weight
    "lora": (lambda: peft.LoraConfig(**SMALL), 2),
    "dora": (lambda: peft.LoraConfig(**SMALL, use_dora=True), None),
    "pissa": (lambda: peft.LoraConfig(**SMALL, init_lora_weights="pissa"), 4),
    "adalora": (lambda: peft.AdaLoraConfig(target_modules=TARGETS, init_r=3, target_r=2, total_step=10), 3),
    "loha": (lambda: peft.LoHaConfig(**SMALL), 4),
    "lokr": (lambda: peft.LoKrConfig(**SMALL), None),
    "vera": (lambda: peft.VeraConfig(r=2, target_modules=["q_proj", "o_proj"], d_initial=1.0), 2),
    "oft": (lambda: peft.OFTConfig(oft_block_size=4, target_modules=TARGETS), None),
    "boft": (lambda: peft.BOFTConfig(boft_block_size=4, target_modules=TARGETS), None),
    "ia3": (lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]), None),
    "hra": (lambda: peft.HRAConfig(**SMALL), 2),
    "miss": (lambda: peft.MissConfig(**SMALL), 2),
}
TEXTS = ["one plus two is", "ab ab", "What is a cat?"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a tiny Llama and a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer, model = byte_tokenizer(), build("llama")
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.max_position_embeddings = 512
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def saved(base, folder, config, times=1.0):
    """An adapter of PEFT's in the folder, so many times as large as others, and the model that has it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = peft.get_peft_model(lorakit.load_model(base)[0], config).eval()
        randomise(model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data *= times
        model.save_pretrained(folder, save_embedding_layers=False)
        return peft.PeftModel.from_pretrained(lorakit.load_model(base)[0], folder).eval()


def change(theirs, base):
    """What merging makes of each weight, in float64."""
    plain = lorakit.load_model(base)[0]
    merged = dict(copy.deepcopy(theirs).double().merge_and_unload().named_parameters())
    return {
        name: (merged[name] - before.double()).detach()
        for name, before in plain.named_parameters()
        if not torch.equal(merged[name].float(), before)
    }


LONG = ("lora", "adalora", "lokr", "vera", "boft", "hra", "miss")


@pytest.mark.parametrize("method", [pytest.param(m, marks=pytest.mark.long if m in LONG else ()) for m in METHODS])
def test_an_update_of_any_method_is_cut_to_the_nearest_of_a_rank(base, tmp_path, method):
    config, largest = METHODS[method]
    theirs = saved(base, tmp_path / "adapter", config())
    want, logits = change(theirs, base), logits_of(theirs, "llama")
    whole = convert_adapter(tmp_path / "adapter", base, tmp_path / "whole", rank=largest or 16)
    by_peft = peft.PeftModel.from_pretrained(lorakit.load_model(base)[0], tmp_path / "whole").eval()
    by_us = lorakit.load_adapter(lorakit.load_model(base)[0], tmp_path / "whole")
    for model in (by_peft, by_us):
        torch.testing.assert_close(logits_of(model, "llama"), logits, rtol=0, atol=1e-5)
    assert whole.energy == pytest.approx(1)
    assert 0 <= whole.kl < 1e-7 < whole.effect
    assert {f"{each.name}.weight" for each in whole.layers} == want.keys()

    cut = convert_adapter(tmp_path / "adapter", base, tmp_path / "cut", rank=1)
    layers = lorakit.adapters(lorakit.load_adapter(lorakit.load_model(base)[0], tmp_path / "cut"))
    for each in cut.layers:
        values = torch.linalg.svdvals(dW := want[f"{each.name}.weight"])
        assert each.norm == pytest.approx(dW.norm().item(), rel=1e-5)
        assert each.energy == pytest.approx((values[0] ** 2 / values.square().sum()).item(), abs=1e-6)
        error = (layers[each.name].delta_weight().double() - dW).norm() / dW.norm()
        assert error.square().item() == pytest.approx(1 - each.energy, abs=1e-6)


def test_each_layer_gets_the_smallest_rank_that_keeps_the_share(base, tmp_path):
    theirs = saved(base, tmp_path / "adapter", METHODS["lokr"][0]())
    want = {name.removesuffix(".weight"): torch.linalg.svdvals(dW) for name, dW in change(theirs, base).items()}
    for share in (0.5, 0.9, 1.0):
        found = convert_adapter(tmp_path / "adapter", base, tmp_path / str(share), energy=share)
        for each in found.layers:
            kept = want[each.name].square().cumsum(0) / want[each.name].square().sum()
            assert each.energy >= share - 1e-9
            assert each.rank == 1 or kept[each.rank - 2] < share - 1e-9, "a smaller rank would do"
        assert found.energy >= share - 1e-9
    _, theirs_too = peft.convert_to_lora(theirs, rank=0.9)
    ours = load_file(tmp_path / "0.9" / "adapter_model.safetensors")
    assert {key: value.shape for key, value in theirs_too.items()} == {key: value.shape for key, value in ours.items()}


@pytest.mark.parametrize("layer", [lorakit.LoRALinear, lorakit.DoRALinear, lorakit.PiSSALinear])
@pytest.mark.parametrize("name", ["gpt2", pytest.param("llama", marks=pytest.mark.long)])
def test_lorakits_own_adapters_are_converted_without_peft(tmp_path, monkeypatch, name, layer):
    model = build(name)
    model.save_pretrained(tmp_path / "base")
    monkeypatch.setattr("lorakit.merging.convert.load_model", lambda base: (build(name), None))
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    lorakit.inject(model, 3, 6, layer=layer)
    randomise(model)
    lorakit.save_adapter(model, tmp_path / "adapter")
    found = convert_adapter(tmp_path / "adapter", tmp_path / "base", tmp_path / "out", rank=16)
    converted = lorakit.load_adapter(build(name), tmp_path / "out")
    torch.testing.assert_close(logits_of(converted, name), logits_of(model, name), rtol=0, atol=1e-5)
    assert found.energy == pytest.approx(1)
    half = convert_adapter(tmp_path / "adapter", tmp_path / "base", tmp_path / "half", rank=2)
    layers = lorakit.adapters(lorakit.load_adapter(build(name), tmp_path / "half"))
    for each in half.layers:
        merged, plain = model.get_submodule(each.name).merged(), build(name).get_submodule(each.name)
        dW = dense_weight(merged, torch.float32) - dense_weight(plain, torch.float32)
        error = (layers[each.name].delta_weight() - dW).norm() / dW.norm()
        assert error.square().item() == pytest.approx(1 - each.energy, abs=1e-4)


WEIGHTS = {
    "experts": ("mixtral", {"targets": "all-linear", "rank_pattern": {"gate_up_proj": 4}}),
    "both ends": ("llama", {"targets": ["embed_tokens", "lm_head", "q_proj"]}),
    "one for both ends": ("llama-biased-tied", {"targets": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_experts_and_both_ends_are_converted(tmp_path, monkeypatch, case):
    name, settings = WEIGHTS[case]
    monkeypatch.setattr("lorakit.merging.convert.load_model", lambda base: (build(name), None))
    model = lorakit.inject(build(name), lorakit.LoRAConfig(3, 6, **settings))
    randomise(model)
    lorakit.save_adapter(model, tmp_path / "adapter")
    whole = convert_adapter(tmp_path / "adapter", tmp_path, tmp_path / "whole", rank=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(build(name), tmp_path / "whole").eval()
    torch.testing.assert_close(logits_of(theirs, name), logits_of(model, name), rtol=0, atol=1e-5)
    assert whole.energy == pytest.approx(1)
    cut = convert_adapter(tmp_path / "adapter", tmp_path, tmp_path / "cut", energy=0.6)
    before, after = read_updates(model), read_updates(tmp_path / "cut")
    assert {each.name for each in cut.layers} == before.keys() == after.keys()
    for each in cut.layers:
        dW = before[each.name].matrix
        share = 1 - ((after[each.name].matrix - dW).norm() / dW.norm()) ** 2
        assert each.energy == pytest.approx(share.item(), abs=1e-4)
        assert each.energy >= 0.6
        assert each.norm == pytest.approx(dW.norm().item(), rel=1e-5)
    assert cut.energy < 1


def test_the_certificate_says_what_is_true(base, tmp_path, capsys):
    theirs = saved(base, tmp_path / "adapter", peft.LoHaConfig(**SMALL), times=6)
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n\n")
    command = ["convert", str(tmp_path / "adapter"), str(tmp_path / "out"), "--base", str(base)]
    assert cli.main([*command, "--rank", "2", "--texts", str(tmp_path / "texts.txt"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "out" / CERTIFICATE).read_text())
    plain, tokenizer = lorakit.load_model(base)
    ours = lorakit.load_adapter(lorakit.load_model(base)[0], tmp_path / "out")

    def divergence(model):
        kl, tokens = 0.0, 0
        for text in TEXTS:
            ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
            with torch.no_grad():
                p, q = (m(input_ids=ids).logits[0, :-1].double().log_softmax(-1) for m in (theirs, model))
            kl, tokens = kl + (p.exp() * (p - q)).sum().item(), tokens + len(p)
        return kl / tokens

    assert found["kl"] == pytest.approx(divergence(ours), rel=1e-2)
    assert found["effect"] == pytest.approx(divergence(plain), rel=1e-3)
    answers = [lorakit.greedy(m, tokenizer, TEXTS, show=False) for m in (theirs.get_base_model(), ours)]
    assert found["equal_answers"] == sum(a == b for a, b in zip(*answers, strict=True)) / 3
    assert found["texts"] == 3


def test_the_command_reads_texts_and_speaks_for_people(base, tmp_path, capsys):
    saved(base, tmp_path / "adapter", peft.LoHaConfig(**SMALL))
    rows = [
        {"prompt": "one plus two", "completion": " is three"},
        {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["convert", str(tmp_path / "adapter"), "--base", str(base), "--energy", "0.9", str(tmp_path / "out")]
    assert cli.main([*command, "--texts", str(tmp_path / "rows.jsonl")]) == 0
    text = capsys.readouterr().out
    assert "energy kept 9" in text
    assert "on 2 texts" in text
    assert "greedy answers equal to the original's:" in text
    assert max(map(len, text.splitlines())) < 160 + len(str(tmp_path))


TOO_MUCH = {
    "lora_bias": (lambda: peft.LoraConfig(**SMALL, lora_bias=True), "the bias too"),
    "a head": (lambda: peft.LoraConfig(**SMALL, modules_to_save=["lm_head"]), "that also changes lm_head"),
    "token rows": (
        lambda: peft.LoraConfig(**SMALL, trainable_token_indices={"embed_tokens": [3]}),
        "that also changes",
    ),
    "norms": (lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]), "a linear-like module"),
    "a prompt": (
        lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "a method that changes layers, got PROMPT_TUNING",
    ),
    "a router": (lambda: peft.LilyConfig(**SMALL), "linear in its input"),
}


@pytest.mark.parametrize("case", TOO_MUCH)
def test_what_lora_cannot_hold_is_refused_and_leaves_nothing(base, tmp_path, case):
    config, words = TOO_MUCH[case]
    saved(base, tmp_path / "adapter", config())
    with pytest.raises(ValueError, match=rf"\Aexpected.*{words}.*\Z"):
        convert_adapter(tmp_path / "adapter", base, tmp_path / "deep" / "out", rank=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def another_base(folder):
    peft_model(build("gpt2"), r=2, target_modules=["c_attn"]).save_pretrained(folder, save_embedding_layers=False)


def another_base_of_lohas(folder):
    model = build("llama")
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))
    peft.get_peft_model(model, peft.LoHaConfig(**SMALL)).save_pretrained(folder)


def untrained(folder):
    peft_model(build("llama"), **SMALL).save_pretrained(folder, save_embedding_layers=False)


def edited(key, value):
    def make(folder):
        another_base_of_lohas(folder)
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))

    return make


REFUSED = {
    "no adapter": (lambda folder: None, ["--rank", "2"], "expected an adapter's adapter_config.json"),
    "another base": (another_base, ["--rank", "2"], "another model's file"),
    "another base of LoHa's": (another_base_of_lohas, ["--rank", "2"], "another base"),
    "an unknown method": (edited("peft_type", "LOHO"), ["--rank", "2"], "got 'LOHO'; near: LOHA"),
    "zero": (untrained, ["--rank", "2"], "expected an adapter that changes something"),
    "rank 0": (untrained, ["--rank", "0"], "expected rank"),
    "energy 2": (untrained, ["--energy", "2"], "expected a share of the energy in (0, 1], got 2.0"),
    "neither": (untrained, [], "expected a rank or a share of the energy"),
    "both": (untrained, ["--rank", "1", "--energy", "1"], "expected a rank or a share of the energy"),
    "no texts": (untrained, ["--rank", "1", "--texts", "nowhere.txt"], "nowhere.txt"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_command_refuses_in_one_line(base, tmp_path, capsys, case):
    make, options, words = REFUSED[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make(tmp_path / "adapter")
    out = tmp_path / "out"
    assert cli.main(["convert", str(tmp_path / "adapter"), "--base", str(base), *options, str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lorakit: ")
    assert words in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_a_place_that_is_taken_stays_as_it_is(base, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="expected a new folder"):
        convert_adapter(tmp_path / "adapter", base, tmp_path / "out", rank=1)
    assert issubclass(AdapterError, ValueError)
