"""Several adapters on one model answer as PEFT's do, by name or row by row, and come and go without a trace."""

import copy
import threading
import warnings

import peft
import pytest
import torch
from helpers.architectures import CONFIGS, build, logits_of
from helpers.four_bits import by_bitsandbytes
from helpers.hybrids import HYBRIDS
from helpers.layers import Gated
from helpers.parity import randomise, snapshot, unchanged
from helpers.texts import TOKENIZER
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import lorakit
from lorakit import AdapterError, add_adapter, delete_adapter, named_adapters, set_adapter, using_adapters
from lorakit.layers.named_adapters import NamedAdapters
from lorakit.models.inject import wrap

ONE, TWO = torch.arange(3, 17).view(2, 7), torch.arange(20, 41).view(3, 7)


def kinds_of(model):
    """The last parts of its linear layers' names."""
    return sorted({name.rsplit(".", 1)[-1] for name in lorakit.find_targets(model)})


def by_peft(base, folder):
    """PEFT's model with two adapters of other ranks, scales, layers and dtypes, which lie in the folder."""
    first, *others = kinds_of(base)
    settings = {
        "sql": {"r": 3, "lora_alpha": 6, "target_modules": [first, *others[:1]]},
        "json": {"r": 5, "lora_alpha": 20, "target_modules": others or [first], "use_rslora": True},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out of GPT-2
        for seed, (name, each) in enumerate(settings.items(), 1):
            one = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**each))
            randomise(one, seed)
            (one.to(torch.bfloat16) if name == "json" else one).save_pretrained(folder / name)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder / "sql", "sql").eval()
        theirs.load_adapter(folder / "json", "json")
    return theirs


def with_both(base, folder):
    ours = copy.deepcopy(base)
    for name in ("sql", "json"):
        add_adapter(ours, name, folder / name)
    return ours


def trained(base, seed=1, **settings):
    """The layers of an adapter outside of its model."""
    model = lorakit.inject(base, **{"rank": 3, "alpha": 6} | settings)
    randomise(model, seed)
    layers = lorakit.adapters(model)
    lorakit.remove(model)
    return layers


@torch.no_grad()
def answer(model, tokens, **more):
    return model(input_ids=tokens, **more).logits


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


FAMILIES = ["gpt2", "opt", "t5", *(pytest.param(n, marks=pytest.mark.long) for n in ("gemma2", "phi3", "bert"))]


@pytest.mark.parametrize("name", FAMILIES)
def test_it_answers_as_pefts_adapters_do(tmp_path, name):
    base = build(name)
    theirs, ours, plain = by_peft(base, tmp_path), with_both(base, tmp_path), logits_of(base, name)
    assert torch.equal(logits_of(ours, name), plain), "an adapter answers when it is chosen"
    alone = {None: plain}
    for each in ("sql", "json"):
        theirs.set_adapter(each)
        alone[each] = logits_of(theirs, name)
        close(logits_of(set_adapter(ours, each), name), alone[each])
        with using_adapters(ours, each), using_adapters(ours, None):
            assert torch.equal(logits_of(ours, name), plain)
    assert (alone["sql"] - alone["json"]).abs().max() > 1e-3
    for rows in (["json", "sql"], ["sql", None], ["json", "json"]):
        with using_adapters(ours, rows):
            close(logits_of(ours, name), torch.stack([alone[each][i] for i, each in enumerate(rows)]))
    if name not in ("opt", "t5"):  # of which PEFT refuses the first, and the second wants two inputs
        tokens = torch.randint(3, 61, (2, 7), generator=torch.Generator().manual_seed(1))
        with using_adapters(ours, ["json", None]):
            close(logits_of(ours, name), answer(theirs, tokens, adapter_names=["json", "__base__"]))


def test_rows_of_one_adapter_may_lie_apart_and_deleting_leaves_no_trace(tmp_path):
    base = build("llama")
    by_peft(base, tmp_path)
    before, rows = snapshot(base), ["sql", "json", None, "sql", "json", "json"]
    model, tokens = with_both(base, tmp_path), torch.arange(3, 45).view(6, 7)
    add_adapter(model, "v1.0, dora", trained(build("llama"), layer=lorakit.DoRALinear))
    rows[2] = "v1.0, dora"
    with using_adapters(model, rows):
        found = answer(model, tokens)
    for row, name in enumerate(rows):
        with using_adapters(model, name):
            close(found[row], answer(model, tokens)[row])
    assert list(named_adapters(model)) == ["sql", "json", "v1.0, dora"]
    assert not any(p.requires_grad for p in model.parameters())
    with using_adapters(model, "json"):
        kept = answer(model, tokens)
    delete_adapter(delete_adapter(model, "sql"), "v1.0, dora")
    held = [module for module in model.modules() if isinstance(module, NamedAdapters)]
    assert [each.names for each in held] == [["json"]] * len(named_adapters(model)["json"])
    with using_adapters(model, "json"):
        assert torch.equal(answer(model, tokens), kept)
    delete_adapter(model, "json")
    assert unchanged(model, before)
    assert lorakit.adapters(model) == {}
    assert lorakit.inject(model, 2, 4) is model


@pytest.mark.parametrize("layer", [lorakit.LoRALinear, lorakit.DoRALinear, lorakit.PiSSALinear])
def test_an_adapter_comes_from_memory_as_from_its_file(tmp_path, layer):
    model = lorakit.inject(build("gpt2"), 3, 6, layer=layer, scale_rule="rslora")
    randomise(model)
    lorakit.save_adapter(model, tmp_path)
    want = logits_of(model, "gpt2")
    served = add_adapter(add_adapter(build("gpt2"), "file", tmp_path), "model", model)
    add_adapter(served, "again", named_adapters(served)["file"])
    layers = lorakit.adapters(model)
    add_adapter(lorakit.remove(model), "itself", layers)
    for name in named_adapters(served):
        close(logits_of(set_adapter(served, name), "gpt2"), want)
    with using_adapters(served, ["model", "file"]):
        close(logits_of(served, "gpt2"), want)
    close(logits_of(set_adapter(model, "itself"), "gpt2"), want)


def test_those_of_fit_many_are_served_together():
    model, text = build("llama"), lorakit.Example([3, 4, 5], [3, 4, 5])
    specs = [lorakit.Spec(lorakit.LoRAConfig(rank, 8), 1e-1, seed=rank) for rank in (1, 4)]
    fitted, alone = lorakit.fit_many(model, [text], specs, steps=3, show=False), []
    for each in fitted:
        alone.append(logits_of(each.attach(model), "llama"))
        lorakit.remove(model)
    for k, each in enumerate(fitted):
        add_adapter(model, f"rank {k}", each.layers)
    with using_adapters(model, ["rank 1", "rank 0"]):
        close(logits_of(model, "llama"), torch.stack([alone[1][0], alone[0][1]]))


def test_a_layer_of_ones_own_serves_too(tmp_path):
    model = lorakit.inject(build("llama"), 3, 6, layer=Gated)
    randomise(model)
    want, folder = logits_of(model, "llama"), lorakit.save_adapter(model, tmp_path)
    served = add_adapter(add_adapter(build("llama"), "memory", model), "file", folder, layer=Gated)
    with using_adapters(served, ["file", "memory"]):
        close(logits_of(served, "llama"), want)
    with pytest.raises(AdapterError, match="expected plain LoRA"):
        add_adapter(served, "no class", folder)


@pytest.mark.parametrize("four_bits", ["NF4Linear", "bitsandbytes"])
def test_a_base_in_four_bits_serves_several(llama_folder, four_bits):
    def load():
        if four_bits == "bitsandbytes":
            return by_bitsandbytes(llama_folder)
        return lorakit.quantize_model(AutoModelForCausalLM.from_pretrained(llama_folder))

    lorakit.prevent_repacking()
    model, alone = load(), {}
    for name, rank in (("sql", 2), ("json", 4)):
        one = lorakit.inject(load(), rank, 8)
        randomise(one, rank)
        alone[name] = answer(one, TWO)
        add_adapter(model, name, one)
    with using_adapters(model, ["json", None, "sql"]):
        found = answer(model, TWO)
    close(found[0], alone["json"][0])
    close(found[2], alone["sql"][2])
    with using_adapters(model, None):
        close(found[1], answer(model, TWO)[1])
    delete_adapter(delete_adapter(model, "sql"), "json")
    close(answer(model, TWO), answer(load(), TWO))


PROMPTS = ["abc", "b", "fghij", "cd"]


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_each_row_is_generated_by_its_adapter_with_a_cache(name):
    model, rows = build(name), ["sql", None, "json", "sql"]
    for seed, each in enumerate(("sql", "json")):
        add_adapter(model, each, trained(build(name), seed + 1, rank=2, alpha=40))
    settings = {"max_new_tokens": 12, "show": False}
    alone = {}
    for each in rows:
        with using_adapters(model, each):
            alone[each] = lorakit.greedy(model, TOKENIZER, PROMPTS, **settings)
    want = [alone[each][i] for i, each in enumerate(rows)]
    assert lorakit.greedy(model, TOKENIZER, PROMPTS, adapters=rows, **settings) == want
    assert lorakit.greedy(model, TOKENIZER, PROMPTS, adapters=rows, batch_size=3, accelerate=False, **settings) == want
    assert len({*want, *alone[None]}) > len(PROMPTS), "the adapters answer otherwise than the base"
    with using_adapters(model, ["sql", "sql", "json", "json"]):  # two beams a prompt
        both = model.generate(ONE, num_beams=2, max_new_tokens=5, do_sample=False, pad_token_id=0)
    for i, each in enumerate(("sql", "json")):
        with using_adapters(model, each):
            one = model.generate(ONE[i : i + 1], num_beams=2, max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert both[i, : one.shape[1]].tolist() == one[0].tolist()


def test_the_chosen_one_is_merged_folded_and_read(tmp_path):
    model, one = build("llama-biased-tied"), build("llama-biased-tied")
    by_peft(one, tmp_path)
    for name in ("sql", "json"):
        add_adapter(model, name, tmp_path / name)
    want = logits_of(lorakit.merge(lorakit.load_adapter(one, tmp_path / "json")), "llama")
    with pytest.raises(ValueError, match=r"expected an adapter to merge, got none chosen"):
        lorakit.merge(model)
    set_adapter(model, "json")
    layer = next(iter(named_adapters(model)["json"]))
    assert torch.equal(model.get_submodule(layer).weight + 0, one.get_submodule(layer).weight)
    with lorakit.folded(model):
        assert lorakit.adapters(model) == {}
        close(logits_of(model, "llama"), want)
    tied = model.config.tie_word_embeddings
    close(logits_of(lorakit.merge(model), "llama"), want)
    assert (lorakit.adapters(model), model.config.tie_word_embeddings) == ({}, tied)


def test_a_model_under_adapters_is_put_into_four_bits_and_copied(tmp_path):
    base = build("llama")
    by_peft(base, tmp_path)
    model = with_both(base, tmp_path)
    twin = copy.deepcopy(model)
    with using_adapters(model, ["sql", "json"]):
        assert torch.equal(logits_of(twin, "llama"), logits_of(base, "llama")), "a copy has a choice of its own"
    lorakit.quantize_model(model)
    quantised = with_both(lorakit.quantize_model(base, lorakit.find_targets(base)), tmp_path)
    with using_adapters(model, ["sql", "json"]), using_adapters(quantised, ["sql", "json"]):
        assert not torch.equal(logits_of(model, "llama"), logits_of(twin, "llama"))
        covered = {layer for each in named_adapters(model).values() for layer in each}
        assert all(isinstance(model.get_submodule(layer).base, lorakit.NF4Linear) for layer in covered)


def test_threads_choose_for_themselves(tmp_path):
    base = build("llama")
    by_peft(base, tmp_path)
    model, found, both = with_both(base, tmp_path), {}, threading.Barrier(2, timeout=30)

    def serve(name, tokens):
        with using_adapters(model, [name] * len(tokens)), using_adapters(model, [*[name] * (len(tokens) - 1), None]):
            both.wait()
            found[name] = answer(model, tokens)
            both.wait()

    threads = [threading.Thread(target=serve, args=each) for each in (("sql", ONE), ("json", TWO))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, tokens in (("sql", ONE), ("json", TWO)):
        close(found[name][:-1], answer(set_adapter(model, name), tokens)[:-1])


def test_rows_train_their_own_adapters():
    model = build("llama")
    for seed, name in enumerate(("sql", "json")):
        add_adapter(model, name, trained(build("llama"), seed + 1, dropout=0.5))
    layers = named_adapters(model)
    for name in layers:
        for layer in layers[name].values():
            layer.A.requires_grad_(True)
            layer.B.requires_grad_(True)

    def gradients(names):
        model.zero_grad(set_to_none=True)
        with using_adapters(model, names):
            logits = model(input_ids=ONE).logits
        logits[0].log_softmax(-1)[..., 5].sum().backward()
        return [p.grad for layer in layers["sql"].values() for p in (layer.A, layer.B)]

    for a, b in zip(gradients("sql"), gradients(["sql", "json"]), strict=True):
        close(a, b)
    assert all(p.grad is None or not p.grad.any() for each in layers["json"].values() for p in (each.A, each.B))


def test_a_classifiers_pooler_sees_one_row_for_each_text():
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(CONFIGS["bert"]()).eval()
    copy_of = copy.deepcopy(model)
    targets = [*kinds_of(model.bert.encoder), "dense"]
    for seed, name in enumerate(("sql", "json")):
        add_adapter(model, name, trained(copy.deepcopy(copy_of), seed + 1, targets=targets))
    with using_adapters(model, ["json", "sql", "json"]):
        found = answer(model, TWO)
    assert "bert.pooler.dense" in named_adapters(model)["sql"]
    for i, name in enumerate(["json", "sql", "json"]):
        with using_adapters(model, name):
            close(found[i], answer(model, TWO)[i])


def test_whoever_watches_the_base_sees_its_own_answer():
    model, seen = served(), []
    layer = next(each for each in model.modules() if isinstance(each, NamedAdapters))
    layer.base.register_forward_hook(lambda module, args, output: seen.append(output))
    x = torch.randn(2, 3, layer.base.in_features)
    with using_adapters(model, ["sql", "json"]):
        y = layer(x)
    assert torch.equal(seen[0], layer.base(x))
    assert not torch.equal(seen[0], y)


class Expert(nn.Module):
    """Two experts, each of which sees every second token."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x):
        flat = x.flatten(0, 1)
        return torch.stack([expert(flat[k::2]) for k, expert in enumerate(self.experts)], 1).view_as(x)


def test_experts_are_refused_row_by_row_and_serve_as_a_whole():
    model = Expert()
    layers = trained(model)
    add_adapter(model, "sql", layers)
    x = torch.randn(2, 2, 4)
    with using_adapters(model, ["sql", None]), pytest.raises(ValueError, match="an expert's tokens are in no order"):
        model(x)
    plain = model(x)
    with using_adapters(model, "sql"):
        assert not torch.equal(model(x), plain)


def served():
    model = build("llama")
    for seed, name in enumerate(("sql", "json")):
        add_adapter(model, name, trained(build("llama"), seed + 1))
    return model


def rows(names):
    def call(model):
        with using_adapters(model, names):
            logits_of(model, "llama")

    return call


def inside(names, act):
    def call(model):
        with using_adapters(model, names):
            act(model)

    return call


REFUSED = {
    "an unknown name": (rows("sqk"), "expected an adapter of the model, got 'sqk'; near: sql"),
    "an unknown name in a row": (rows(["sql", "x"]), "expected an adapter of the model, got 'x'; known: sql, json"),
    "too few rows": (rows(["sql"]), "expected a row for each of 1 names, got 2"),
    "too many rows": (rows(["sql"] * 4), "expected a row for each of 4 names, got 2"),
    "set_adapter": (lambda m: set_adapter(m, "x"), "expected an adapter of the model, got 'x'"),
    "a name that is there": (lambda m: add_adapter(m, "sql", served()), "expected a new name, got 'sql'"),
    "no name": (lambda m: add_adapter(m, "", trained(build("llama"))), "expected an adapter's name, got ''"),
    "another base": (lambda m: add_adapter(m, "x", trained(build("gpt2"))), "another model's file"),
    "other shapes": (lambda m: add_adapter(m, "x", trained(build("qwen3"))), "expected floats of shape"),
    "no adapter": (lambda m: add_adapter(m, "x", build("llama")), "expected a model with adapters, got a plain one"),
    "nothing": (lambda m: add_adapter(m, "x", {}), "expected a model with adapters, got a plain one"),
    "one that is not finite": (
        lambda m: add_adapter(m, "x", spoilt(trained(build("llama")))),
        "expected finite values, got NaN or infinity",
    ),
    "deletion of what is chosen": (lambda m: delete_adapter(set_adapter(m, "sql"), "sql"), "not in use, got 'sql'"),
    "deletion of what a block uses": (inside([None, "json"], lambda m: delete_adapter(m, "json")), "not in use"),
    "deletion of what is not there": (lambda m: delete_adapter(m, "x"), "expected an adapter of the model, got 'x'"),
    "merge of rows": (inside(["sql", None], lorakit.merge), "expected one adapter for all rows, got one for each"),
    "inject": (lambda m: lorakit.inject(m, 2, 4), "expected a plain model, got one with adapters"),
    "greedy inside of rows": (
        inside(["sql", None], lambda m: lorakit.greedy(m, TOKENIZER, ["a", "b"], show=False)),
        "expected one adapter for all texts",
    ),
    "exact_match inside of rows": (
        inside(["sql", None], lambda m: lorakit.exact_match(m, [lorakit.Example([3, 4], [3, 4])] * 2, show=False)),
        "expected one adapter for all texts",
    ),
    "greedy with another number": (
        lambda m: lorakit.greedy(m, TOKENIZER, ["a", "b"], adapters=["sql"], show=False),
        "expected an adapter for each of 2 prompts",
    ),
    "greedy with an unknown name": (
        lambda m: lorakit.greedy(m, TOKENIZER, ["a"], adapters=["x"], show=False),
        "expected an adapter of the model, got 'x'",
    ),
}


def spoilt(layers):
    next(iter(layers.values())).A.data[0, 0] = torch.nan
    return layers


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_meant_is_refused_and_changes_nothing(case):
    act, message = REFUSED[case]
    model = served()
    before, names = snapshot(model), list(named_adapters(model))
    with pytest.raises(ValueError, match=r"\Aexpected[^\n]*\Z") as caught:
        act(model)
    assert message in str(caught.value)
    assert unchanged(model, before)
    assert list(named_adapters(model)) == names
    with using_adapters(model, None):
        assert torch.equal(logits_of(model, "llama"), logits_of(build("llama"), "llama"))


def test_one_of_several_is_saved_by_its_name(tmp_path):
    base = build("llama")
    for seed, (name, settings) in enumerate({"sql": {}, "json": {"targets": ["q_proj"]}}.items()):
        model = lorakit.inject(copy.deepcopy(base), 3, 6, **settings)
        randomise(model, seed)
        lorakit.save_adapter(model, tmp_path / name)
    model = with_both(base, tmp_path)
    for name in ("sql", "json"):
        folder = lorakit.save_adapter(model, tmp_path / "again" / name, name)
        tensors, there = (load_file(each / "adapter_model.safetensors") for each in (folder, tmp_path / name))
        assert tensors.keys() == there.keys()
        assert all(torch.equal(tensors[key], there[key]) for key in there)
        settings = "adapter_config.json"
        assert (folder / settings).read_bytes() == (tmp_path / name / settings).read_bytes()
    for name in (None, "sqll"):
        with pytest.raises(ValueError, match="expected the name of one of the model's adapters"):
            lorakit.save_adapter(model, tmp_path / "none", name)
    with pytest.raises(ValueError, match="got 'sql'; known: none"):
        lorakit.save_adapter(lorakit.inject(build("llama"), 3, 6), tmp_path / "none", "sql")
    assert not (tmp_path / "none").exists()


def test_a_model_without_named_adapters_says_how_to_get_them(tmp_path):
    plain, unnamed = build("llama"), lorakit.inject(build("llama"), 2, 4)
    for act in (lambda m: set_adapter(m, None), lambda m: delete_adapter(m, "x"), rows(None)):
        for model in (plain, unnamed):
            with pytest.raises(ValueError, match=r"expected a model with named adapters, got none: add_adapter\(\)"):
                act(model)
    with pytest.raises(ValueError, match="expected a plain model, got one with adapters"):
        add_adapter(unnamed, "x", trained(build("llama")))
    with pytest.raises(FileNotFoundError, match="expected an adapter's"):
        add_adapter(plain, "x", tmp_path / "nowhere")
    assert [p.requires_grad for p in plain.parameters()] == [True] * len(list(plain.parameters()))


@pytest.mark.parametrize("name", ["bamba", "granite-moe-hybrid", "llama4"])
def test_models_whose_blocks_are_not_the_usual_ones_serve_rows(name):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(HYBRIDS[name]()).eval()
    model = add_adapter(base, "sql", trained(copy.deepcopy(base), target_parameters=[]))
    plain = answer(model, TWO)
    with using_adapters(model, "sql"):
        want = answer(model, TWO)
    with using_adapters(model, [None, "sql", None]):
        close(answer(model, TWO), torch.stack([plain[0], want[1], plain[2]]))
    assert (want - plain).abs().max() > 1e-3


def test_experts_adapters_are_chosen_for_all_rows():
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(HYBRIDS["llama4"]()).eval()
    other, third = trained(copy.deepcopy(base)), trained(copy.deepcopy(base), seed=2)
    want = answer(wrap(copy.deepcopy(base), third, lambda name, _: third[name]), TWO)
    model = add_adapter(add_adapter(base, "sql", other), "records", third)
    with using_adapters(model, "records"):
        close(answer(model, TWO), want)
    expected = r"at layer model\.layers\.0\.feed_forward\.experts: an expert's tokens are in no order of rows"
    with using_adapters(model, ["sql", "records", None]), pytest.raises(ValueError, match=expected):
        answer(model, TWO)


def test_code_that_reads_weights_gets_those_of_one_adapter_or_hears_that_there_are_several():
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(HYBRIDS["mamba"]()).eval()
    layers = trained(base)
    want = answer(wrap(base, layers, lambda name, _: layers[name]), TWO)
    lorakit.remove(base)
    close(answer(set_adapter(add_adapter(base, "sql", layers), "sql"), TWO), want)
    with using_adapters(base, ["sql", None, None]), pytest.raises(ValueError, match=r"one for each at layer .*dt_proj"):
        answer(base, TWO)
