"""The budget of a step: what it says of fake tensors is what real ones do, for the same models, small."""

import json
from functools import cache

import bitsandbytes
import peft
import pytest
import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lorakit
from lorakit import cli
from lorakit._optional import quiet
from lorakit.cost.budget import OPTIMIZERS, budget, table
from lorakit.cost.configs import find_config
from lorakit.cost.ledger import Ledger
from lorakit.models.quantize import quantize_model
from lorakit.models.targets import find_targets

VOCAB, WIDTH, LAYERS, ROWS, TOKENS, RANK = 211, 64, 2, 3, 24, 4
SIZES = {
    **{"vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 160, "num_hidden_layers": LAYERS},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "use_cache": False},
}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, **ENDS, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, **ENDS),  # biases, and an output head of its own
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_positions=64, use_cache=False, **ENDS, **NO_DROPOUT
    ),
}
each_model = pytest.mark.parametrize("name", CONFIGS)


@cache
def predicted(name, method="full", **settings):
    return budget(CONFIGS[name](), method, **{"rank": RANK, "batch_size": ROWS, "tokens": TOKENS} | settings)


def real(name, method="full", dtype=torch.float32, **settings):
    """A real model of the same config, adapted by PEFT; and a batch."""
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=dtype, **settings).train()
    if method == "lora":
        config = peft.LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        config.fan_in_fan_out = name == "gpt2"
        model = peft.get_peft_model(model, config)
    ids = torch.randint(3, VOCAB, (ROWS, TOKENS))
    return model, {"input_ids": ids, "labels": ids}


def watched(model, batch):
    """A ledger of a real step, in which everything but the model's own tensors is new."""
    ledger = Ledger()
    for tensor in [*model.parameters(), *model.buffers()]:
        ledger.add(tensor, "model")
    with ledger:
        loss = model(**batch).loss
        kept = ledger.now["temporaries"]
        loss.backward()
    return ledger, kept


def sizes_of(tensors):
    """Bytes of the storages behind some tensors, each counted once."""
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


# ---- counts ----


@each_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_and_weights_are_the_real_models(name, dtype):
    model, _ = real(name, dtype=dtype)
    found = predicted(name, dtype=dtype)
    assert found.parameters == found.trained == lorakit.count(model).total
    assert found.peak["weights"] == sizes_of([*model.parameters(), *model.buffers()])
    assert found.peak["adapters"] == 0
    assert found.gradient_bytes == found.checkpoint_bytes == sizes_of(model.parameters())


@pytest.mark.long
@each_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_are_pefts(name, dtype):
    model, _ = real(name, "lora", dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    found = predicted(name, "lora", dtype=dtype)
    assert found.trained == sum(p.numel() for p in trained)
    assert found.peak["adapters"] == found.gradient_bytes == found.checkpoint_bytes == sizes_of(trained)
    assert found.peak["weights"] == predicted(name, dtype=dtype).peak["weights"]


def test_targets_are_chosen_as_inject_does():
    model, _ = real("llama")
    lorakit.inject(model, 2, 2, ["q_proj", "v_proj"])
    found = predicted("llama", "lora", rank=2, targets=("q_proj", "v_proj"))
    assert found.trained == lorakit.count(model).trainable
    assert found.parameters == lorakit.count(model).total - found.trained


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-13b", 13_015_864_320),
        ("llama-2-70b", 68_976_648_192),
        ("llama-65b", 65_285_660_672),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3-70b", 70_553_706_496),
        ("mistral-7b", 7_241_732_096),
        ("mixtral-8x7b", 46_702_792_704),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-8b", 8_190_735_360),
        ("gpt-3-175b", 174_600_000_000),  # table D.1 of the paper, in millions
    ],
)
def test_published_models_have_their_published_parameters(name, parameters):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(find_config(name)[1])
    assert lorakit.count(model).total == pytest.approx(parameters, rel=1e-4 if name.startswith("gpt") else 0)


# ---- memory of a step ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_real_step_of_experts_has_the_predicted_peak(dtype):
    config = transformers.MixtralConfig(**SIZES, **ENDS, num_local_experts=4, num_experts_per_tok=2)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    ids = torch.randint(3, VOCAB, (ROWS, TOKENS))
    ledger, kept = watched(model, {"input_ids": ids, "labels": ids})
    found = budget(config, "full", dtype=dtype, batch_size=ROWS, tokens=TOKENS)
    assert found.activation_bytes == pytest.approx(kept, rel=0.01)
    assert found.peak_bytes - found.peak["optimizer"] == pytest.approx(ledger.peak.total(), rel=0.01)
    assert found.forward_flops + found.backward_flops == ledger.flops


@each_model
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_real_step_has_the_predicted_peak(name, method, dtype):
    ledger, kept = watched(*real(name, method, dtype))
    found = predicted(name, method, dtype=dtype)
    assert found.activation_bytes == kept
    assert found.peak_bytes - found.peak["optimizer"] == ledger.peak.total()


@each_model
@pytest.mark.parametrize("method", ["full", "lora"])
def test_activations_are_the_tensors_that_autograd_saves(name, method):
    model, batch = real(name, method)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        loss = model(**batch).loss
    own = {each.untyped_storage().data_ptr() for each in [*model.parameters(), *model.buffers()]}
    saved = [each for each in saved if each.untyped_storage().data_ptr() not in own]
    assert loss.requires_grad
    assert predicted(name, method).activation_bytes == pytest.approx(sizes_of(saved), rel=0.01)


@each_model
@pytest.mark.parametrize("method", ["full", "lora"])
def test_checkpointing_keeps_less(name, method):
    model, batch = real(name, method)
    with quiet():
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ledger, kept = watched(model, batch)
    found = predicted(name, method, checkpointing=True)
    assert found.activation_bytes == kept < predicted(name, method).activation_bytes / 2
    assert found.peak_bytes - found.peak["optimizer"] == ledger.peak.total()


def test_checkpointing_computes_the_blocks_again_up_to_their_last_product():
    plain, found = predicted("llama"), predicted("llama", checkpointing=True)
    once = 2 * ROWS * TOKENS * WIDTH * (VOCAB + LAYERS * 160)  # the head, and the last layer of each block
    assert found.backward_flops - plain.backward_flops == plain.forward_flops - once


def test_what_grows_with_tokens_is_not_what_lora_saves():
    full, double = (predicted("llama", tokens=tokens) for tokens in (24, 48))
    lora, double_lora = (predicted("llama", "lora", tokens=tokens) for tokens in (24, 48))
    assert double.activation_bytes / full.activation_bytes == pytest.approx(2, rel=0.01)
    assert double_lora.activation_bytes / lora.activation_bytes == pytest.approx(2, rel=0.01)
    assert lora.activation_bytes > 0.8 * full.activation_bytes
    for kind in ("weights", "optimizer"):
        assert double.peak[kind] == full.peak[kind]
    assert double.gradient_bytes == full.gradient_bytes > 10 * lora.gradient_bytes


def test_eager_attention_keeps_tokens_squared():
    sdpa, eager = (predicted("llama", attention=each) for each in (None, "eager"))
    scores = LAYERS * ROWS * 4 * TOKENS**2 * 4  # heads, float32
    assert scores <= eager.activation_bytes - sdpa.activation_bytes <= 4 * scores
    ledger, kept = watched(*real("llama", attn_implementation="eager"))
    assert (eager.activation_bytes, eager.peak_bytes - eager.peak["optimizer"]) == (kept, ledger.peak.total())


def test_the_moment_of_the_peak_is_named():
    full, eager = predicted("llama"), predicted("llama", tokens=60, attention="eager", checkpointing=True)
    assert full.moment.startswith(("forward, ", "backward, "))
    at, share = eager.moment.split(", ")
    assert at == "backward"
    assert 0 <= int(share.removesuffix("%")) <= 100
    assert full.moment in full.table().splitlines()[4]


def test_a_short_context_is_no_obstacle():
    assert budget(CONFIGS["llama"](), "lora", rank=1).settings["tokens"] == SIZES["max_position_embeddings"]


def test_the_peak_is_made_of_its_kinds():
    found = predicted("llama", tokens=2, batch_size=1)  # so few that gradients are the most there is
    assert found.peak["gradients"] > 0.8 * found.gradient_bytes
    long = predicted("llama", tokens=64, batch_size=8)
    assert long.peak["logits"] == 3 * 8 * 64 * VOCAB * 4  # of log-softmax, its gradient, and the logits' gradient
    assert long.peak["activations"] + long.peak["logits"] // 3 == pytest.approx(long.activation_bytes, rel=0.01)
    assert long.peak_bytes == sum(long.peak.values())


# ---- stored in few bits ----


@each_model
@pytest.mark.parametrize("double_quant", [True, False])
def test_four_bits_are_those_of_nf4_layers(name, double_quant):
    model, _ = real(name)
    found = predicted(name, "qlora", double_quant=double_quant)
    assert found.parameters == predicted(name).parameters
    quantize_model(model, double_quant=double_quant)
    assert found.peak["weights"] == sizes_of([*model.parameters(), *model.buffers()])


@pytest.mark.parametrize(
    ("method", "double_quant", "bits"), [("qlora", False, 4.5), ("qlora", True, 4.127), ("lora-8bit", True, 8.008)]
)
def test_bits_a_weight(method, double_quant, bits):
    config = transformers.LlamaConfig(
        **SIZES | {"hidden_size": 4096, "intermediate_size": 4096, "num_hidden_layers": 1}, head_dim=1024
    )
    plain = budget(config, "lora", tokens=8)
    found = budget(config, method, tokens=8, double_quant=double_quant)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    weights = sum(model.get_submodule(each).weight.numel() for each in find_targets(model))
    saved = plain.peak["weights"] - found.peak["weights"]
    assert 32 - 8 * saved / weights == pytest.approx(bits, abs=5e-4)


def test_a_quantised_weight_is_there_while_it_is_used():
    config = transformers.LlamaConfig(**SIZES | {"intermediate_size": 4096, "num_hidden_layers": 1})
    found = budget(config, "qlora", rank=1, batch_size=1, tokens=2)
    assert 4 * WIDTH * 4096 <= found.peak["temporaries"] <= 5 * WIDTH * 4096


# ---- optimisers ----


REAL_OPTIMIZERS = {
    "adamw": lambda params: torch.optim.AdamW(params, fused=True),
    "adafactor": torch.optim.Adafactor,
    "sgd": torch.optim.SGD,
    "sgd-momentum": lambda params: torch.optim.SGD(params, momentum=0.9),
    "adamw-8bit": bitsandbytes.optim.AdamW8bit,
    "adamw-paged": bitsandbytes.optim.AdamW32bit,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimizers_state_has_the_real_ones_size(name, dtype):
    tensors = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in [(70, 60), (5,), (4096,), (3, 4, 500)]]
    for each in tensors:
        each.grad = torch.zeros_like(each)
    optimizer = REAL_OPTIMIZERS[name](tensors)
    if name in ("adamw-8bit", "adamw-paged"):  # their steps may need a GPU
        for index, each in enumerate(tensors):
            optimizer.init_state(optimizer.param_groups[0], each, 0, index)
    else:
        optimizer.step()
    states = [each for state in optimizer.state.values() for key, each in state.items() if not key.startswith("qmap")]
    real_bytes = sum(each.nbytes for each in states if isinstance(each, torch.Tensor))
    assert sum(map(OPTIMIZERS[name], tensors)) == real_bytes


def test_a_budget_has_the_state_of_all_that_trains():
    model, _ = real("gpt2")
    for name, size in OPTIMIZERS.items():
        assert predicted("gpt2", optimizer=name).peak["optimizer"] == sum(map(size, model.parameters()))
    adapters = predicted("gpt2", "lora")
    assert adapters.peak["optimizer"] == 8 * adapters.trained + 4 * 2 * len(find_targets(model))


def test_mixed_precision_takes_sixteen_bytes_a_parameter():
    found = predicted("qwen2", dtype="bfloat16", master_weights=True)
    counters = 4 * len(list(real("qwen2")[0].parameters()))
    total = found.peak["weights"] + found.gradient_bytes + found.peak["optimizer"]
    assert (total - counters) / found.parameters == pytest.approx(16, rel=1e-3)
    for method, dtype in (("full", "float32"), ("lora", "bfloat16")):  # here what trains is float32 already
        plain, master = (predicted("qwen2", method, dtype=dtype, master_weights=each) for each in (False, True))
        assert plain.peak == master.peak


# ---- FLOPs ----


@each_model
@pytest.mark.parametrize("method", ["full", "lora"])
def test_flops_are_torchs_own_count(name, method):
    model, batch = real(name, method, attn_implementation="eager")
    found = predicted(name, method, attention="eager")
    with FlopCounterMode(display=False) as forward:
        loss = model(**batch).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert (found.forward_flops, found.backward_flops) == (forward.get_total_flops(), backward.get_total_flops())


@each_model
def test_flops_follow_the_rule_of_two_a_weight_and_token(name):
    model, _ = real(name)
    linear = {each: model.get_submodule(each).weight.numel() for each in find_targets(model)}
    weights = sum(linear.values()) + VOCAB * WIDTH
    attention = 2 * LAYERS * 2 * TOKENS * WIDTH  # scores, and their sum of values, a token
    full, lora = predicted(name), predicted(name, "lora")
    assert full.forward_flops == ROWS * TOKENS * (2 * weights + attention)
    assert full.backward_flops == ROWS * TOKENS * (4 * weights + 2.5 * attention)  # attention scores are made again
    assert lora.forward_flops == full.forward_flops + ROWS * TOKENS * 2 * lora.trained
    first = [
        n for name, n in linear.items() if "0." in name and name.endswith(("q_proj", "k_proj", "v_proj", "c_attn"))
    ]
    untrained = weights + sum(first) + len(first) * RANK * WIDTH  # no dW; no dx where nothing below trains
    assert lora.backward_flops == full.backward_flops + ROWS * TOKENS * (4 * lora.trained - 2 * untrained)


# ---- models, errors, output ----


def test_experts_are_counted():
    config = transformers.Qwen3MoeConfig(
        **SIZES, **ENDS, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2
    )
    config.head_dim = 16
    found = budget(config, "full", dtype="bfloat16", batch_size=ROWS, tokens=TOKENS)
    active = LAYERS * (2 * WIDTH * (4 + 2) * 16 + 8 * WIDTH + 2 * 3 * WIDTH * 32) + VOCAB * WIDTH
    attention = 2 * LAYERS * 2 * TOKENS * 4 * 16
    assert found.forward_flops == ROWS * TOKENS * (2 * active + attention)
    rank, both = 8, {"dtype": "bfloat16", "batch_size": ROWS, "tokens": TOKENS}
    lora, qlora = budget(config, "lora", rank=rank, **both), budget(config, "qlora", rank=rank, **both)
    attention = rank * (4 * WIDTH + (4 + 2 * 2 + 4) * 16)
    one = rank * ((WIDTH + 2 * 32) + (32 + WIDTH))
    assert lora.trained == LAYERS * (attention + 8 * one)
    assert lora.forward_flops == found.forward_flops + ROWS * TOKENS * 2 * LAYERS * (attention + 2 * one)
    assert lora.backward_flops < found.backward_flops
    experts, routers = LAYERS * 8 * 3 * WIDTH * 32, LAYERS * 8 * WIDTH
    assert (lora.left_out, lora.not_quantised) == ({"routers": routers}, {})
    assert qlora.not_quantised == {"experts": experts, "routers": routers}
    assert qlora.peak["weights"] > 2 * experts
    rows = [line.split() for line in str(qlora).splitlines() if line.startswith("not quantised")]
    assert [row[2] for row in rows] == ["experts", "routers"]
    assert "not quantised" not in str(budget(CONFIGS["llama"](), "qlora", batch_size=1, tokens=4))


@pytest.mark.parametrize("kind", ["mamba", "gemma3"])
def test_code_that_a_model_without_values_confuses_is_refused(kind):
    small = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1}
    heads = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    sight = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {
        "mamba": lambda: transformers.MambaConfig(**small, state_size=4),
        "gemma3": lambda: transformers.Gemma3Config(
            text_config=small | heads, vision_config=sight | {"image_size": 28, "patch_size": 14}
        ),
    }[kind]()
    with pytest.raises(ValueError, match=f"expected shapes that follow from the config, got '{kind}'") as caught:
        budget(config, "qlora" if kind == "mamba" else "lora", tokens=16, batch_size=1)
    assert "\n" not in str(caught.value)


def test_a_config_is_found_wherever_it_is(tmp_path):
    config = CONFIGS["llama"]()
    config.use_cache = True
    config.save_pretrained(tmp_path / "mine")
    found = [budget(each, tokens=4) for each in (config, tmp_path / "mine", str(tmp_path / "mine" / "config.json"))]
    assert [each.settings["model"] for each in found] == ["llama", "mine", "mine"]
    assert len({each.peak_bytes for each in found}) == 1
    assert config.use_cache, "the caller's config has been changed"
    tiny, _ = lorakit.load_model("tiny")
    assert budget("tiny", tokens=4).parameters == lorakit.count(tiny).total


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "llama-2-70"}, "expected a model's name.*got 'llama-2-70'; near: llama-2-70b"),
        ({"model": "xyz"}, "known: smollm2, tiny, llama-65b"),
        ({"method": "qlra"}, "expected a method, got 'qlra'; near: qlora, lora"),
        ({"dtype": "float8"}, "expected a dtype, got 'float8'; near: float32"),
        ({"dtype": torch.float64}, "expected a dtype, got 'float64'"),
        ({"optimizer": "adam"}, "expected an optimizer, got 'adam'; near: adamw"),
        ({"tokens": 65}, "expected at most 64 tokens, the model.s context, got 65"),
        ({"batch_size": 0}, "expected batch_size as an integer >= 1"),
        ({"rank": 0}, "expected rank as an integer >= 1, got 0"),
        ({"targets": ["q_prj"]}, "got 'q_prj'; near.*: q_proj"),
        ({"model": transformers.WhisperConfig()}, "expected a causal language model, got 'whisper'"),
        ({"model": transformers.ViTConfig()}, "expected a causal language model, got 'vit'"),
    ],
)
def test_what_cannot_be_is_said(settings, message):
    settings = {"model": CONFIGS["llama"](), "method": "lora", "tokens": 4} | settings
    with pytest.raises(ValueError, match=message):
        budget(settings.pop("model"), **settings)


def test_files_that_are_no_config_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a folder with a config\.json"):
        budget(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"expected a readable config\.json"):
        budget(tmp_path)
    with pytest.raises(ConnectionError, match="the config of 'nobody/nothing' is not in the hub's cache"):
        budget("nobody/nothing")


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "x"},
        {"hidden_size": 0},
        {"num_attention_heads": 0},
        {"num_attention_heads": 3},
        {"num_key_value_heads": 0},
        {"pad_token_id": 99},
        {"dtype": "nothing"},
        {"model_type": "nothing"},
        {"quantization_config": 5},
        {"intermediate_size": float("nan")},
    ],
)
def test_an_impossible_config_is_one_line(tmp_path, capsys, change):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"model_type": "llama", "vocab_size": 16} | sizes | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli.main(["budget", str(tmp_path), "--tokens", "4"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lorakit: expected ")
    assert error.count("\n") == 1


def test_sizes_that_no_float_holds_are_refused():
    with pytest.raises(ValueError, match="expected rank as an integer from 1 to"):
        budget(CONFIGS["llama"](), rank=10**400, tokens=4)


@pytest.mark.long
def test_the_command_prints_a_column_for_each_method(capfd):
    assert cli.main(["budget", "tiny", "--tokens", "8", "--rank", "2"]) == 0
    text, errors = capfd.readouterr()
    assert errors == ""
    assert text.splitlines()[0] == "tiny, 8 x 8 tokens, float32, adamw"
    assert text.splitlines()[1].split() == ["full", "lora", "qlora"]
    lora = budget("tiny", "lora", rank=2, tokens=8)
    assert [line.split()[-2] for line in text.splitlines()[2:4]] == [f"{lora.parameters:,}", f"{lora.trained:,}"]
    assert str(lora) == lora.table() == table([lora])
    assert [line[25:42] for line in str(lora).splitlines()[2:]] == [line[42:59] for line in text.splitlines()[2:]]
    words = [
        "--exclude-modules",
        "up_proj",
        "--layers-to-transform",
        "1",
        "--rank-pattern",
        "q_proj=5",
        "--method",
        "lora",
    ]
    assert cli.main(["budget", "tiny", "--tokens", "8", *words, "--json"]) == 0
    (record,) = json.loads(capfd.readouterr().out)
    by_layer = {"exclude_modules": ["up_proj"], "layers_to_transform": [1], "rank_pattern": {"q_proj": 5}}
    model = lorakit.load_model("tiny")[0]
    assert record["trained"] == lorakit.count(lorakit.inject(model, 16, 32, **by_layer)).trainable
    assert {name: record["settings"][name] for name in by_layer} == by_layer
    arguments = [
        "--method",
        "lora",
        "lora-8bit",
        "--targets",
        "q_proj",
        "v_proj",
        "--batch",
        "2",
        "--dtype",
        "bfloat16",
    ]
    arguments += ["--optimizer", "sgd", "--checkpointing", "--master-weights", "--json"]
    assert cli.main(["budget", "tiny", "--tokens", "8", *arguments]) == 0
    first, second = json.loads(capfd.readouterr().out)
    settings = {"batch_size": 2, "checkpointing": True, "master_weights": True, "optimizer": "sgd", "rank": 16}
    assert second["settings"].items() >= {**settings, "method": "lora-8bit", "dtype": "bfloat16"}.items()
    assert first["settings"]["targets"] == ["q_proj", "v_proj"]
    assert first["peak_bytes"] == sum(first["peak"].values()) > second["peak_bytes"]
