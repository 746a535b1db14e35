"""What is compared with what. Every function returns name -> record; the first arm of each is PEFT, or TRL."""

import contextlib
import copy
import json
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from statistics import median

import torch
from paired import Comparison, alternate, rounds_from, seconds

import lorakit
from lorakit._optional import quiet
from lorakit.cost.memory import peak_bytes, returning_memory
from lorakit.experiments.records import expand
from lorakit.experiments.sweep import sweep
from lorakit.layers import nf4
from lorakit.layers.bnb import prevent_repacking
from lorakit.merging.arithmetic import compress, linear
from lorakit.merging.updates import Update
from lorakit.models.quantize import quantize_model
from lorakit.speed.accelerated import accelerated
from lorakit.tasks.facts import encoded, facts
from lorakit.training.batch import collate
from lorakit.training.fit_many import Spec, fit_many
from lorakit.training.loss import completion_loss
from lorakit.training.reference_loop import plain_loop

with quiet():
    import bitsandbytes
    import peft
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

HERE = Path(__file__).parent
SQL = {"steps": 44, "lr": 3e-3, "batch_size": 8}  # lesson 00's training
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def peft_model(dtype=torch.float32, rank=16, alpha=32, name="smollm2", seed=0, **settings):
    model, tokenizer = lorakit.load_model(name, dtype=dtype)
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM", **settings)
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config).train(), tokenizer


def our_model(dtype=torch.float32, rank=16, alpha=32, name="smollm2", seed=0, layer=lorakit.LoRALinear):
    model, tokenizer = lorakit.load_model(name, dtype=dtype)
    torch.manual_seed(seed)
    lorakit.inject(model, rank, alpha, layer=layer)
    return model.train(), tokenizer


def random_batch(rows=4, length=128):
    """Every token is labelled, so that both sides do the same arithmetic."""
    ids = torch.randint(5, 49_000, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def stepper(model, loss_of, batch, settings):
    def step():
        loss_of(batch).backward()
        model.zero_grad(set_to_none=True)

    def second():
        with settings():
            step()  # as in the middle of a training, which has its memory already
            return seconds(step)

    return second


def as_fit(model):
    """What `fit` trains under."""
    return accelerated(model, 512, trains=True)


def step():
    """One LoRA step of the same arithmetic, rank 8, 4 x 128 tokens, all labelled; PEFT also with lorakit's settings."""
    found, batch = {}, random_batch()
    for name, dtype in DTYPES.items():
        (theirs, _), (ours, _) = peft_model(dtype, 8, 16), our_model(dtype, 8, 16)

        def settings(model=ours):
            return as_fit(model)

        arms = {
            "PEFT": stepper(theirs, lambda b, m=theirs: m(**b).loss, batch, contextlib.nullcontext),
            "PEFT, lorakit's settings": stepper(theirs, lambda b, m=theirs: m(**b).loss, batch, settings),
            "lorakit": stepper(ours, lambda b, m=ours: completion_loss(m, b), batch, settings),
        }
        found[f"LoRA step, {name}"] = alternate(arms, rounds_from(7)).record()
    return found


def memory():
    """By how much a step's peak exceeds what is resident before it."""
    return {f"memory a step adds, {dtype}": memory_of(dtype) for dtype in DTYPES}


def memory_of(dtype, dora=False):
    """The same of one model, LoRA or DoRA; each arm in a process of its own."""
    values = {}
    for arm in ("PEFT", "lorakit"):
        code = f"import cases; cases.print_memory({arm!r}, {dtype!r}, {dora!r})"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=HERE, env=returning_memory(), capture_output=True, text=True, check=True)
        values[arm] = json.loads(done.stdout.splitlines()[-1])
    return Comparison("MB", values).record()


def print_memory(arm, dtype, dora=False):
    """One arm of `memory_of`: prints MB as JSON."""
    batch, (theirs, ours) = random_batch(), models(DTYPES[dtype], dora)
    model = (ours if arm == "lorakit" else theirs)()

    def step():
        (completion_loss(model, batch) if arm == "lorakit" else model(**batch).loss).backward()
        model.zero_grad(set_to_none=True)

    with as_fit(model) if arm == "lorakit" else contextlib.nullcontext():
        step()
        print(json.dumps([peak_bytes(step) / 1e6 for _ in range(rounds_from(5))]))


def models(dtype, dora=False):
    """What makes PEFT's model and what makes lorakit's, rank 8."""
    return (
        lambda: peft_model(dtype, 8, 16, use_dora=dora)[0],
        lambda: our_model(dtype, 8, 16, layer=lorakit.DoRALinear if dora else lorakit.LoRALinear)[0],
    )


def dora():
    """A DoRA step of SmolLM2, and of one layer alone, 2048 x 2048 on 2048 tokens; the memory that each adds."""
    found, batch = {}, random_batch()
    for name, dtype in DTYPES.items():
        theirs, ours = (make() for make in models(dtype, dora=True))
        arms = {
            "PEFT": stepper(theirs, lambda b, m=theirs: m(**b).loss, batch, contextlib.nullcontext),
            "lorakit": stepper(ours, lambda b, m=ours: completion_loss(m, b), batch, lambda m=ours: as_fit(m)),
        }
        found[f"DoRA step, {name}"] = alternate(arms, rounds_from(7)).record()
        found[f"memory a DoRA step adds, {name}"] = memory_of(name, dora=True)
    arms = {arm: dora_layer(arm) for arm in ("PEFT", "lorakit")}
    found["step of one DoRA layer"] = alternate(arms, rounds_from(15)).record()
    values = {}
    for arm in arms:
        code = f"import cases, json; step = cases.dora_layer({arm!r}); step()"
        code += f"; print(json.dumps([cases.peak_bytes(step) / 1e6 for _ in range({rounds_from(5)})]))"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=HERE, env=returning_memory(), capture_output=True, text=True, check=True)
        values[arm] = json.loads(done.stdout.splitlines()[-1])
    found["memory that a step of one DoRA layer adds"] = Comparison("MB", values).record()
    return found


def dora_layer(arm):
    """A function that goes forward and backward through one layer in float32, its input's gradient included."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2048, 2048, bias=False))
    if arm == "PEFT":
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=["0"], use_dora=True))
    else:
        lorakit.inject(model, 8, 16, layer=lorakit.DoRALinear)
    x, dy = torch.randn(2048, 2048, requires_grad=True), torch.randn(2048, 2048)

    def step():
        x.grad = None
        model.zero_grad(set_to_none=True)
        model(x).backward(dy)

    return step


def gradients():
    """The largest relative difference from PEFT's gradients, tensor by tensor, float32."""
    (theirs, tokenizer), (ours, _) = peft_model(), our_model()
    items = lorakit.SQL.encode(tokenizer, lorakit.load_sql("train")[:8])
    generator = torch.Generator().manual_seed(1)
    pairs = []
    for name, layer in lorakit.adapters(ours).items():
        other = theirs.get_submodule(f"base_model.model.{name}")
        layer.B.data.normal_(0, 0.02, generator=generator)
        other.lora_A["default"].weight.data.copy_(layer.A)
        other.lora_B["default"].weight.data.copy_(layer.B)
        pairs += [(layer.A, other.lora_A["default"].weight), (layer.B, other.lora_B["default"].weight)]
    with as_fit(ours):
        completion_loss(ours, collate(items)).backward()
    theirs(**collate(items)).loss.backward()
    worst = max(((a.grad - b.grad).norm() / b.grad.norm()).item() for a, b in pairs)
    return {"gradients against PEFT": {"unit": "relative", "worst": worst}}


def sft(model, tokenizer, split, seed, folder, steps=44, lr=3e-3):
    """TRL's trainer as fast as it goes on a CPU in float32: no checkpointing, no packing, nothing saved or logged."""
    with quiet():
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer
    columns = {"prompt": [i.prompt for i in split], "completion": [i.completion for i in split]}
    settings = {"use_cpu": True, "bf16": False, "activation_checkpointing": False, "report_to": "none"}
    config = SFTConfig(
        **settings, output_dir=folder, max_steps=steps, per_device_train_batch_size=8, learning_rate=lr, seed=seed,
        warmup_steps=0.1, lr_scheduler_type="linear", weight_decay=0.0, save_strategy="no", logging_strategy="no",
        disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    with quiet():
        trainer = SFTTrainer(
            model=model, args=config, train_dataset=Dataset.from_dict(columns), processing_class=tokenizer
        )
    return trainer


def training():
    """The whole training of the SQL task, 44 steps of 8, rank 16; accuracy on questions about new tables."""
    rounds, split = rounds_from(3), lorakit.load_sql("train")
    times, right = {}, {}
    for seed in range(rounds):
        for arm in ("TRL SFTTrainer", "PEFT, plain loop", "lorakit, float32", "lorakit, bfloat16"):
            dtype = DTYPES["bfloat16" if "bfloat16" in arm else "float32"]
            model, tokenizer = (our_model if "lorakit" in arm else peft_model)(dtype, seed=seed)
            items = lorakit.SQL.encode(tokenizer, split)
            if "TRL" in arm:
                folder = tempfile.mkdtemp()
                trainer = sft(model, tokenizer, split, seed, folder)
                took = seconds(trainer.train)
                shutil.rmtree(folder)
            elif "PEFT" in arm:
                took = seconds(lambda m=model, i=items, s=seed: plain_loop(m, i, **SQL, seed=s))
            else:
                took = seconds(lambda m=model, i=items, s=seed: lorakit.fit(m, i, **SQL, seed=s, show=False))
            test = lorakit.SQL.encode(tokenizer, lorakit.load_sql("tables")[:208])
            times.setdefault(arm, []).append(took)
            right.setdefault(arm, []).append(sum(lorakit.exact_match(model, test, show=False)) / len(test))
            print(f"    seed {seed}, {arm}: {took:.1f} s, {right[arm][-1]:.1%}", flush=True)
    record = Comparison("s", times).record()
    for arm, values in right.items():
        record["arms"][arm]["accuracy"] = values
    loops = {arm: values for arm, values in times.items() if "TRL" not in arm}
    return {"whole SQL training": record, "training, against the loop": Comparison("s", loops).record()}


def many():
    """Eight adapters of the tiny base at once, against PEFT one by one; ranks 1 to 16, 60 steps each."""
    specs = [
        Spec(lorakit.LoRAConfig(rank, 2 * rank), 1e-3, seed=i) for i, rank in enumerate((1, 2, 4, 4, 8, 8, 16, 16))
    ]
    model, tokenizer = lorakit.load_model("tiny")
    items = encoded(tokenizer, facts(48, 1))

    def one_by_one():
        for spec in specs:
            one = peft_model(rank=spec.rank, alpha=spec.alpha, name="tiny", seed=spec.seed)[0]
            plain_loop(one, items, steps=60, batch_size=8, lr=spec.lr, seed=spec.seed)

    arms = {"PEFT, one by one": one_by_one, "lorakit": lambda: fit_many(model, items, specs, steps=60, show=False)}
    return {"eight adapters of the tiny base": alternate(arms, rounds_from(5)).record()}


def sweeping():
    """Ten short trainings of the tiny base in a plain loop, and recorded by `sweep`: what recording costs."""
    model, tokenizer = lorakit.load_model("tiny")
    items = encoded(tokenizer, facts(48, 1))

    def run(lr, seed):
        torch.manual_seed(seed)
        lorakit.inject(model, 4, 8)
        loss = lorakit.fit(model, items, steps=10, lr=lr, seed=seed, show=False).loss
        lorakit.remove(model)
        return {"losses": loss}

    grid = expand({"lr": [1e-3, 1e-2], "seed": range(5)})

    def swept():
        with tempfile.TemporaryDirectory() as folder:
            sweep(run, grid, folder, show=False)

    arms = {"a loop": lambda: [run(**setting) for setting in grid], "sweep": swept}
    return {"sweep of ten short runs": alternate(arms, rounds_from(9)).record()}


def files():
    """Merging an adapter into SmolLM2, rank 16; saving and loading it."""
    (theirs, _), (ours, _) = peft_model(), our_model()
    plain, _ = lorakit.load_model("smollm2")
    other, _ = lorakit.load_model("smollm2")
    with tempfile.TemporaryDirectory() as folder:
        a, b = Path(folder, "peft"), Path(folder, "ours")

        def peft_io():
            with quiet():
                theirs.save_pretrained(a)
                peft.PeftModel.from_pretrained(plain, a).unload()

        def our_io():
            lorakit.save_adapter(ours, b)
            lorakit.load_adapter(other, b)
            lorakit.remove(other)

        io = alternate({"PEFT": peft_io, "lorakit": our_io}, rounds_from(7)).record()

    def peft_merge():
        theirs.merge_adapter()
        theirs.unmerge_adapter()

    def our_merge():
        with lorakit.folded(ours):
            pass

    merging = alternate({"PEFT": peft_merge, "lorakit": our_merge}, rounds_from(7)).record()
    return {"save + load": io, "merge + unmerge": merging}


def floor():
    """The matrix products of a LoRA step alone (4 N FLOP a token), as a share of the whole step."""
    found, batch = {}, random_batch()
    for name, dtype in DTYPES.items():
        model, _ = our_model(dtype, 8, 16)
        layers = [layer.base.weight for layer in lorakit.adapters(model).values()]
        layers.append(model.get_output_embeddings().weight)
        x = {w.shape: torch.randn(512, w.shape[1]).to(dtype) for w in layers}
        dy = {w.shape: torch.randn(512, w.shape[0]).to(dtype) for w in layers}

        def products(layers=layers, x=x, dy=dy, model=model):
            def once():
                for w in layers:
                    x[w.shape] @ w.T
                    dy[w.shape] @ w

            with torch.no_grad(), as_fit(model):
                once()
                return seconds(once)

        work = stepper(model, lambda b, m=model: completion_loss(m, b), batch, lambda m=model: as_fit(m))
        record = alternate({"lorakit's step": work, "its products alone": products}, rounds_from(7)).record()
        flop = 4 * 512 * sum(w.numel() for w in layers)
        record["GFLOP_per_s"] = flop / record["arms"]["its products alone"]["median"] / 1e9
        found[f"share of the products, {name}"] = record
    return found


def four_bits():
    """Rounding the weight of one layer to NF4, and reading it back, against bitsandbytes; double quantisation apart."""
    found, functional = {}, bitsandbytes.functional
    W = torch.randn(1536, 576, generator=torch.Generator().manual_seed(0)) * 0.02  # SmolLM2's up-projection
    codes, state = functional.quantize_4bit(W, quant_type="nf4")

    def theirs_quantize():
        return functional.quantize_4bit(W, quant_type="nf4")

    arms = {"bitsandbytes": theirs_quantize, "lorakit": lambda: nf4.quantize(W)}
    found["quantise to NF4"] = repeated(arms)
    for name, dtype in DTYPES.items():
        state.dtype = dtype
        arms = {
            "bitsandbytes": lambda: functional.dequantize_4bit(codes, state),
            "lorakit": lambda d=dtype: nf4.dequantize(codes.view(-1), state.absmax, W.shape, d),
        }
        found[f"dequantise from NF4, {name}"] = repeated(arms)
    return found


def arithmetic():
    """Two adapters of rank 16 of one 4096 x 4096 layer, added and cut to rank 16; the error is to the exact sum."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=["0"], init_lora_weights=False)
    with quiet():
        theirs = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4096, 4096, bias=False)), config, "a")
        theirs.add_adapter("b", config)
    layer = theirs.base_model.model[0]
    own = [{"0": Update(2 * layer.lora_B[name].weight, layer.lora_A[name].weight)} for name in "ab"]
    want, results = 0.7 * layer.get_delta_weight("a") + 0.3 * layer.get_delta_weight("b"), {}

    def peft_svd():
        if "c" in theirs.peft_config:
            theirs.delete_adapter("c")
        theirs.add_weighted_adapter(["a", "b"], [0.7, 0.3], "c", combination_type="svd", svd_rank=16)
        results["PEFT's svd"] = layer.get_delta_weight("c")

    def compressed():
        results["lorakit"] = compress(linear(own, [0.7, 0.3]), 16)["0"].matrix

    with torch.no_grad():
        found = alternate({"PEFT's svd": peft_svd, "lorakit": compressed}, rounds_from(3)).record()
        for arm, got in results.items():
            found["arms"][arm]["error"] = ((got - want).norm() / want.norm()).item()
    return {"two adapters to rank 16": found}


def serving():
    """Eight rows of SmolLM2 with eight adapters, or fewer: a pass of 8 x 128 tokens, and 16 tokens generated each."""
    model, _ = lorakit.load_model("smollm2")
    base, took, names = copy.deepcopy(model), [], [f"adapter {k}" for k in range(8)]
    with tempfile.TemporaryDirectory() as folder:
        for k, name in enumerate(names):
            torch.manual_seed(k)
            lorakit.inject(base, 16, 32)
            for layer in lorakit.adapters(base).values():
                layer.B.data.normal_(0, 0.02)
            path = lorakit.save_adapter(base, Path(folder, name))
            lorakit.remove(base)
            took.append(seconds(lambda n=name, p=path: lorakit.add_adapter(model, n, p)))
        with quiet():
            theirs = peft.PeftModel.from_pretrained(base, Path(folder, names[0]), adapter_name=names[0]).eval()
            for name in names[1:]:
                theirs.load_adapter(Path(folder, name), adapter_name=name)
    ids = random_batch(8)["input_ids"]
    greedily = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    works = {
        "a pass of eight rows": lambda m, **more: m(input_ids=ids, **more),
        "eight rows generated": lambda m, **more: m.generate(input_ids=ids[:, :16], **greedily, **more),
    }
    chosen = {"one adapter": names[0], "two adapters": names[:2] * 4, "eight adapters": names, "the base": None}

    @torch.no_grad()
    def ours(work, rows):
        with lorakit.using_adapters(model, rows):
            work(model)

    @torch.no_grad()
    def by_peft(work):
        work(theirs, adapter_names=names)

    found = {}
    for label, work in works.items():
        arms = {arm: lambda w=work, r=rows: ours(w, r) for arm, rows in chosen.items()}
        arms["PEFT, eight adapters"] = lambda w=work: by_peft(w)
        values = alternate(arms, rounds_from(7)).values
        found[f"{label}, against one adapter"] = Comparison("s", values).record()
        pair = {arm: values[arm] for arm in ("PEFT, eight adapters", "eight adapters")}
        found[f"{label}, against PEFT"] = Comparison("s", pair).record()
    numbers = sum(p.nbytes for layer in lorakit.named_adapters(model)[names[0]].values() for p in (layer.A, layer.B))
    found["one more adapter"] = {"unit": "MB and s", "megabytes": numbers / 1e6, "seconds": median(took)}
    return found


def repeated(arms, times=20):
    """Each round of an arm is so many calls: one takes less than a millisecond."""
    return alternate(
        {arm: lambda w=work: [w() for _ in range(times)] for arm, work in arms.items()}, rounds_from(15)
    ).record()


def qlora():
    """One QLoRA step of 4 x 128 tokens, rank 8, NF4 with double quantisation: lorakit against PEFT on bitsandbytes."""
    found, batch = {}, random_batch()
    prevent_repacking()
    folder = lorakit.load_model("smollm2")[0].name_or_path
    for name, dtype in DTYPES.items():
        with quiet():
            four = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
            theirs, base = (
                AutoModelForCausalLM.from_pretrained(folder, quantization_config=four, dtype=dtype) for _ in range(2)
            )
            torch.manual_seed(0)
            config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
            theirs = peft.get_peft_model(theirs, config).train()
        ours = quantize_model(lorakit.load_model("smollm2", dtype=dtype)[0])
        for model in (ours, base):
            lorakit.inject(model.train(), 8, 16)
        arms = {
            "PEFT on bitsandbytes": stepper(theirs, lambda b, m=theirs: m(**b).loss, batch, contextlib.nullcontext),
            "lorakit": stepper(ours, lambda b, m=ours: completion_loss(m, b), batch, lambda m=ours: as_fit(m)),
            "lorakit on bitsandbytes": stepper(
                base, lambda b, m=base: completion_loss(m, b), batch, lambda m=base: as_fit(m)
            ),
        }
        found[f"QLoRA step, {name}"] = alternate(arms, rounds_from(7)).record()
    return found


CASES = {
    f.__name__: f
    for f in (
        step,
        memory,
        gradients,
        floor,
        many,
        sweeping,
        files,
        four_bits,
        qlora,
        dora,
        arithmetic,
        serving,
        training,
    )
}
