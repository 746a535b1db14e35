"""Adapter arithmetic is that of the updates: exact sums, nearest compressions, TIES and DARE by their papers."""

import copy

import numpy as np
import pytest
import torch
from helpers.architectures import DIVERSE, build, logits_of
from helpers.parity import peft_model, randomise
from torch import nn

import lorakit
from lorakit._optional import quiet
from lorakit.merging.arithmetic import compress, dare, linear, ties
from lorakit.merging.updates import Update, attach, read_updates
from lorakit.models.peft_files import AdapterError

with quiet():
    import peft


def trained(base, seed, rank=4, alpha=8, **settings):
    """A copy of a model with adapters that have learnt something random."""
    model = copy.deepcopy(base)
    lorakit.inject(model, rank, alpha, **settings)
    random = torch.Generator().manual_seed(seed)
    for layer in lorakit.adapters(model).values():
        for part in (layer.A, layer.B):
            part.data = torch.randn(part.shape, generator=random) / 4
    return model


def matrices(model):
    return {name: layer.delta_weight().detach() for name, layer in lorakit.adapters(model).items()}


def off(got, want):
    return max(((got[name] - want[name]).norm() / want[name].norm()).item() for name in want)


def summed(models, weights):
    total = {}
    for model, weight in zip(models, weights, strict=True):
        for name, change in matrices(model).items():
            total[name] = total.get(name, 0) + weight * change
    return total


def as_matrices(updates):
    return {name: update.matrix for name, update in updates.items()}


@pytest.fixture
def two(tmp_path):
    """Two adapters of one base that differ in everything, as models and as folders."""
    base = build("llama")
    models = [trained(base, 1, rank=4, alpha=8), trained(base, 2, rank=3, alpha=5, scale_rule="rslora")]
    folders = [lorakit.save_adapter(model, tmp_path / str(k)) for k, model in enumerate(models)]
    return base, models, folders


@pytest.mark.parametrize("name", DIVERSE)
def test_a_sum_is_exact_and_fits_any_model(name, tmp_path):
    base = build(name)
    models = [trained(base, 1), trained(base, 2, rank=2, alpha=3, scale_rule="rslora")]
    total = linear([read_updates(model) for model in models], [0.7, -1.3])
    assert off(as_matrices(total), summed(models, [0.7, -1.3])) < 1e-6
    both = copy.deepcopy(base)
    attach(both, total)
    lorakit.save_adapter(both, tmp_path / "both")
    with quiet():
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "both")
    torch.testing.assert_close(logits_of(both, name), logits_of(theirs, name), rtol=1e-4, atol=1e-4)
    plain = copy.deepcopy(base)
    for layer, change in summed(models, [0.7, -1.3]).items():
        weight = plain.get_submodule(layer).weight
        weight.data += change if weight.shape == change.shape and name != "gpt2" else change.T
    torch.testing.assert_close(logits_of(both, name), logits_of(plain, name), rtol=1e-4, atol=1e-4)


def test_files_and_models_have_the_same_updates(two):
    _, models, folders = two
    for model, folder in zip(models, folders, strict=True):
        assert off(as_matrices(read_updates(folder)), matrices(model)) < 1e-6
        assert off(as_matrices(read_updates(model)), matrices(model)) < 1e-6


def test_layers_may_differ_in_rank_alpha_and_presence(tmp_path):
    base = build("llama")
    one, other = copy.deepcopy(base), trained(base, 2, targets=["q_proj", "down_proj"])
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"q_proj": 2},
        alpha_pattern={"v_proj": 9},
        init_lora_weights=False,
    )
    with quiet():
        theirs = peft.get_peft_model(one, config)
    theirs.save_pretrained(tmp_path)
    found = read_updates(tmp_path)
    assert {update.rank for name, update in found.items() if "q_proj" in name} == {2}
    total = linear([found, read_updates(other)], [1, 2])
    for name, update in total.items():
        want = 2 * matrices(other).get(name, torch.tensor(0.0))
        if not name.endswith("down_proj"):
            want = want + theirs.get_submodule(f"base_model.model.{name}").get_delta_weight("default").detach()
        torch.testing.assert_close(update.matrix, want)
    assert len(total) == 6


def test_cat_and_svd_are_pefts_or_better(two):
    base, models, folders = two
    with quiet():
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folders[0], adapter_name="a")
        theirs.load_adapter(folders[1], adapter_name="b")
        theirs.add_weighted_adapter(["a", "b"], [0.6, 1.1], "cat", combination_type="cat")
        theirs.add_weighted_adapter(["a", "b"], [0.6, 1.1], "svd", combination_type="svd", svd_rank=3)
        theirs.add_weighted_adapter(["a", "b"], [0.6, 1.1], "c3", combination_type="cat")
    total = linear([read_updates(folder) for folder in folders], [0.6, 1.1])
    small = compress(total, 3)
    for name, want in summed(models, [0.6, 1.1]).items():
        layer = theirs.get_submodule(f"base_model.model.{name}")
        torch.testing.assert_close(total[name].matrix, layer.get_delta_weight("cat"), rtol=1e-5, atol=1e-6)
        error = (layer.get_delta_weight("svd") - want).norm()
        assert small[name].rank == 3
        assert (small[name].matrix - want).norm() <= error * (1 + 1e-5)
        U, S, Vh = torch.linalg.svd(want)
        torch.testing.assert_close(small[name].matrix, (U[:, :3] * S[:3]) @ Vh[:3], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(small[name].A.norm(dim=1), small[name].B.norm(dim=0))


@pytest.mark.parametrize(("d_out", "d_in", "rank"), [(5, 9, 20), (9, 5, 20), (6, 6, 6), (1, 7, 3)])
def test_compression_of_ranks_beyond_the_matrix(d_out, d_in, rank):
    update = Update(torch.randn(d_out, rank), torch.randn(rank, d_in))
    for k in (1, 3, min(d_out, d_in), rank, rank + 5):
        found = compress({"x": update}, k)["x"]
        assert found.rank <= k
        U, S, Vh = torch.linalg.svd(update.matrix, full_matrices=False)
        torch.testing.assert_close(found.matrix, (U[:, :k] * S[:k]) @ Vh[:k], rtol=1e-4, atol=1e-4)


def test_a_model_minus_its_adapter_is_its_base(two):
    base, models, _ = two
    own = read_updates(models[0])
    nothing = linear([own, own], [1.0, -1.0])
    assert max(update.matrix.abs().max() for update in nothing.values()) < 1e-6
    zero = compress(nothing, 2)
    assert all(update.matrix.isfinite().all() for update in zero.values())
    negative = copy.deepcopy(base)
    attach(negative, linear([own], [-1.0]))
    assert off(matrices(negative), {name: -change for name, change in matrices(models[0]).items()}) < 1e-6


def ties_by_hand(changes, density):
    """The paper's three steps in plain numpy."""
    kept = []
    for change in changes:
        order = np.argsort(-np.abs(change), axis=None)[: max(1, round(density * change.size))]
        mask = np.zeros(change.size)
        mask[order] = 1
        kept.append(change * mask.reshape(change.shape))
    sign = np.sign(sum(kept))
    agree = [(np.sign(each) == sign) & (each != 0) for each in kept]
    return sum(each * a for each, a in zip(kept, agree, strict=True)) / np.maximum(sum(a.astype(int) for a in agree), 1)


@pytest.mark.parametrize("density", [1.0, 0.5, 0.1])
def test_ties_is_that_of_the_paper(two, density):
    _, models, folders = two
    found = ties([read_updates(folder) for folder in folders], [1.0, 0.5], density, rank=24)
    for name, update in found.items():
        changes = [w * matrices(model)[name].double().numpy() for w, model in zip([1.0, 0.5], models, strict=True)]
        np.testing.assert_allclose(update.matrix, ties_by_hand(changes, density), atol=1e-5)


def test_dare_is_the_sum_on_average_and_its_own_seed(two):
    _, models, folders = two
    own = [read_updates(folder) for folder in folders]
    state = torch.random.get_rng_state()
    draws = [dare(own, [1.0, 0.5], 0.5, rank=24, seed=seed) for seed in range(200)]
    assert torch.equal(torch.random.get_rng_state(), state)
    again = dare(own, [1.0, 0.5], 0.5, rank=24, seed=7)
    for name, want in summed(models, [1.0, 0.5]).items():
        mean = torch.stack([draw[name].matrix for draw in draws]).mean(0)
        assert (mean - want).norm() / want.norm() < 0.15
        torch.testing.assert_close(again[name].matrix, draws[7][name].matrix)
    whole = dare(own, [1.0, 0.5], 1.0, rank=24)
    assert off(as_matrices(whole), summed(models, [1.0, 0.5])) < 1e-5


@pytest.mark.parametrize("make", [ties, dare])
def test_a_result_without_a_rank_is_whole(two, make):
    own = [read_updates(folder) for folder in two[2]]
    whole, cut = (make(own, [1.0, 0.5], 0.5, rank) for rank in (None, 100))
    for name, update in whole.items():
        assert update.shape == cut[name].shape
        torch.testing.assert_close(update.matrix, cut[name].matrix, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [ties, dare])
def test_a_dense_result_is_cut_to_the_rank(two, make):
    own = [read_updates(folder) for folder in two[2]]
    large, small = (make(own, [1.0, 1.0], 0.5, rank) for rank in (24, 2))
    assert {update.rank for update in small.values()} == {2}
    for name, update in small.items():
        U, S, Vh = torch.linalg.svd(large[name].matrix)
        torch.testing.assert_close(update.matrix, (U[:, :2] * S[:2]) @ Vh[:2], rtol=1e-4, atol=1e-4)


def test_pissa_is_an_update_of_its_base_and_dora_is_refused(tmp_path):
    base = build("llama")
    pissa = trained(base, 1, layer=lorakit.PiSSALinear)
    found = read_updates(pissa)
    for name, layer in lorakit.adapters(pissa).items():
        want = layer.merged().weight - base.get_submodule(name).weight
        torch.testing.assert_close(found[name].matrix, want, rtol=1e-3, atol=1e-5)
    dora = trained(base, 1, layer=lorakit.DoRALinear)
    with pytest.raises(ValueError, match=r"got DoRALinear for layer 'model\.layers\.0\.self_attn\.q_proj'"):
        read_updates(dora)
    with pytest.raises(ValueError, match="got DoRA in dora"):
        read_updates(lorakit.save_adapter(dora, tmp_path / "dora"))


def test_what_does_not_fit_is_refused_and_nothing_changes(two, tmp_path):
    base, models, folders = two
    own = [read_updates(folder) for folder in folders]
    for updates, weights in (([], []), (own, [1.0]), (own, [1.0, float("nan")])):
        with pytest.raises(ValueError, match="expected a finite weight for each adapter"):
            linear(updates, weights)
    name = next(iter(own[0]))
    with pytest.raises(ValueError, match="expected adapters of one model"):
        linear([own[0], {name: Update(torch.ones(3, 1), torch.ones(1, 3))}], [1, 1])
    with pytest.raises(ValueError, match="expected rank as an integer >= 1"):
        compress(own[0], 0)
    for density, rank, what in ((0, 2, "density in"), (1.5, 2, "density in"), (0.5, 0, "rank as")):
        with pytest.raises(ValueError, match=f"expected {what}"):
            ties(own, [1, 1], density, rank)
    with pytest.raises(ValueError, match="expected adapters, got none"):
        read_updates(base)
    with pytest.raises(FileNotFoundError):
        read_updates(tmp_path / "nothing")
    before = [id(module) for module in base.modules()]
    for wrong in ({"nothing.here": own[0][name]}, {name: Update(torch.ones(3, 1), torch.ones(1, 3))}):
        with pytest.raises(ValueError, match="expected"):
            attach(base, wrong)
    assert [id(module) for module in base.modules()] == before
    with pytest.raises(ValueError, match="expected a plain model"):
        attach(models[0], own[0])


def test_files_of_other_layers_are_refused(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    with quiet():
        theirs = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="expected lora_A and lora_B of linear layers or embeddings, got"):
        read_updates(tmp_path)


ENDS = {"targets": ["embed_tokens", "lm_head", "q_proj"]}
TIED = {"targets": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}


@pytest.mark.parametrize("by_peft", [False, True])
@pytest.mark.parametrize(("name", "settings"), [("llama", ENDS), ("llama-biased-tied", ENDS), ("gemma2", TIED)])
def test_both_ends_are_read_and_attached(tmp_path, name, settings, by_peft):
    config = lorakit.LoRAConfig(3, 6, **settings)
    model = peft_model(build(name), **config.to_peft()) if by_peft else lorakit.inject(build(name), config)
    randomise(model)
    with quiet():
        model.save_pretrained(tmp_path) if by_peft else lorakit.save_adapter(model, tmp_path)
    found, own = read_updates(tmp_path), read_updates(lorakit.load_adapter(build(name), tmp_path))
    assert {"lm_head", "model.embed_tokens"} <= found.keys() == own.keys()
    for key, update in found.items():
        torch.testing.assert_close(update.matrix, own[key].matrix, rtol=0, atol=0)
    assert found["model.embed_tokens"].shape == (16, 61)
    want = logits_of(model.eval(), name)
    torch.testing.assert_close(logits_of(attach(build(name), found), name), want, rtol=1e-5, atol=1e-6)
    half = logits_of(attach(build(name), compress(linear([found, found], [0.5, 0.5]), 3)), name)
    torch.testing.assert_close(half, want, rtol=1e-4, atol=1e-5)


EXPERTS_BY_PEFT = {
    "both, the later one first": ("mixtral", ["experts.down_proj", "experts.gate_up_proj"], {}),
    "stored the other way round": ("gpt-oss", ["experts.gate_up_proj", "experts.down_proj"], {}),
    "without saying so": ("llama4", ["experts.gate_up_proj", "experts.down_proj"], {}),
    "one": ("gpt-oss", ["down_proj"], {}),
    "ranks": ("olmoe", ["experts.gate_up_proj", "experts.down_proj"], {"rank_pattern": {"gate_up_proj": 5}}),
}


@pytest.mark.parametrize("case", EXPERTS_BY_PEFT)
def test_experts_in_pefts_files_are_told_apart_without_their_model(tmp_path, case):
    name, parameters, more = EXPERTS_BY_PEFT[case]
    theirs = peft_model(build(name), r=2, target_modules=["q_proj"], target_parameters=parameters, **more)
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    found, own = read_updates(tmp_path), read_updates(lorakit.load_adapter(build(name), tmp_path))
    assert found.keys() == own.keys()
    assert {key.rsplit(".", 1)[-1] for key in found} == {"q_proj", *(each.rsplit(".", 1)[-1] for each in parameters)}
    for key, update in found.items():
        torch.testing.assert_close(update.matrix, own[key].matrix, rtol=0, atol=0)


def test_a_parameter_that_may_be_a_layer_is_left_to_the_model(tmp_path):
    model = lorakit.inject(build("qwen3-moe"), 2, 4, targets=["q_proj"], target_parameters=["gate.weight"])
    lorakit.save_adapter(model, tmp_path)
    with pytest.raises(AdapterError, match=r"got 'model.layers.0.mlp.gate'.*read_updates\(load_adapter\(model, folder"):
        read_updates(tmp_path)
    assert "model.layers.0.mlp.gate.weight" in read_updates(lorakit.load_adapter(build("qwen3-moe"), tmp_path))


def test_a_sum_is_served_beside_its_parts(two):
    base, models, folders = two
    total, served = linear([read_updates(folder) for folder in folders], [1.0, 0.5]), copy.deepcopy(base)
    want = {"sum": logits_of(attach(copy.deepcopy(base), total), "llama")}
    for k, (model, folder) in enumerate(zip(models, folders, strict=True)):
        want[f"part {k}"] = logits_of(model, "llama")
        lorakit.add_adapter(served, f"part {k}", folder)
    attach(served, total, "sum")
    with lorakit.using_adapters(served, ["sum", "part 1"]):
        found = logits_of(served, "llama")
    torch.testing.assert_close(found, torch.stack([want["sum"][0], want["part 1"][1]]), rtol=0, atol=1e-5)
    for name, words in ((None, "expected a plain model"), ("sum", "expected a new name, got 'sum'")):
        with pytest.raises(ValueError, match=words):
            attach(served, total, name)
    for name, logits in want.items():
        torch.testing.assert_close(logits_of(lorakit.set_adapter(served, name), "llama"), logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_experts_add_up_and_shrink_one_by_one(name, tmp_path):
    plain, one, two = (build(name) for _ in range(3))
    for seed, model in enumerate((one, two)):
        randomise(lorakit.inject(model, 2 + seed, 4), seed)
    first, second = read_updates(one), read_updates(two)
    expert = "model.layers.1.mlp.experts.down_proj"
    assert first[expert].shape[0] == 4
    both = attach(copy.deepcopy(plain), linear([first, second], [1.0, -0.5]))
    delta = [
        lorakit.adapters(model)["model.layers.1.mlp.experts"].delta_weight("down_proj") for model in (both, one, two)
    ]
    torch.testing.assert_close(delta[0], delta[1] - 0.5 * delta[2], rtol=1e-5, atol=1e-6)
    close = compress(read_updates(both), 3)[expert]
    for e in range(4):
        values = torch.linalg.svdvals(read_updates(both)[expert].matrix[e])
        torch.testing.assert_close(torch.linalg.svdvals(close.matrix[e])[:3], values[:3], rtol=1e-4, atol=1e-6)
        assert torch.linalg.matrix_rank(close.matrix[e], rtol=1e-4) == 3
    assert ties([first, second], [1, 1], 0.5, rank=2)[expert].shape == first[expert].shape
    lorakit.save_adapter(both, tmp_path)
    again = attach(copy.deepcopy(plain), read_updates(tmp_path))
    torch.testing.assert_close(logits_of(again, name), logits_of(both, name), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="expected an update of shape"):
        attach(build("llama4"), {"model.layers.1.feed_forward.experts.down_proj": first[expert]})
