"""What works with what: every way to adapt a tiny model tried with every base and use. Writes the README's table.

    python tests/works_with.py

A cell is "yes" where the trial is right, and "no" where lorakit refuses it in a sentence; whatever else happens is
raised.
"""

import copy
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from helpers.architectures import build, logits_of
from helpers.four_bits import LLAMA, by_bitsandbytes
from helpers.parity import peft_model, randomise, relative
from helpers.texts import examples
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import lorakit
from lorakit import LoRAConfig
from lorakit._optional import quiet
from lorakit.merging.gguf import write_lora_gguf
from lorakit.merging.updates import read_updates

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- works with: begin -->", "<!-- works with: end -->"
TEXTS = examples(6)


@dataclass(frozen=True)
class Way:
    """A way to adapt a model, and the architecture that it is tried on; `gpt2` is the same way for GPT-2's names."""

    config: LoRAConfig
    architecture: str = "llama"
    gpt2: LoRAConfig | None = None

    def base(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A plain model; Llamas are as wide as blocks of four-bit codes and GGUF's rows want them."""
        if self.architecture != "llama":
            return build(self.architecture, dtype)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return LlamaForCausalLM(copy.deepcopy(LLAMA)).to(dtype).eval()

    def adapted(self, seed: int = 3) -> nn.Module:
        """A model with adapters that do something."""
        model = lorakit.inject(self.base(), self.config)
        randomise(model, seed)
        return model


WAYS = {
    "LoRA": Way(LoRAConfig(2, 4)),
    "rsLoRA": Way(LoRAConfig(2, 4, scale_rule="rslora")),
    "DoRA": Way(LoRAConfig(2, 4, layer=lorakit.DoRALinear)),
    "PiSSA": Way(LoRAConfig(2, 4, layer=lorakit.PiSSALinear)),
    "ranks by layer": Way(LoRAConfig(2, 4, rank_pattern={r".*\.0\..*": 3})),
    "experts": Way(
        LoRAConfig(2, 4, targets=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"]), "mixtral"
    ),
    "whole norms (modules_to_save)": Way(
        LoRAConfig(2, 4, modules_to_save=["norm"]), gpt2=LoRAConfig(2, 4, modules_to_save=["ln_f"])
    ),
    "token rows": Way(LoRAConfig(2, 4, trainable_token_indices=[5, 7])),
    "embedding and head": Way(
        LoRAConfig(2, 4, targets=["embed_tokens", "lm_head"]), gpt2=LoRAConfig(2, 4, targets=["wte", "lm_head"])
    ),
    "a tied embedding": Way(
        LoRAConfig(2, 4, targets=["embed_tokens", "q_proj"], ensure_weight_tying=True),
        "llama-biased-tied",
        LoRAConfig(2, 4, targets=["wte", "c_attn"], ensure_weight_tying=True),
    ),
}


def trained(model: nn.Module, config: LoRAConfig, dtype: torch.dtype = torch.float32) -> None:
    before = logits_of(model, "llama")
    lorakit.inject(model, config)
    lorakit.fit(model, TEXTS, steps=3, batch_size=4, lr=0.05, show=False)
    assert relative(logits_of(model.eval(), "llama"), before) > 1e-3


def in_four_bits(way: Way, place: Path) -> nn.Module:
    way.base().save_pretrained(place / "base")
    model = by_bitsandbytes(place / "base")
    lorakit.prevent_repacking(model)
    return model


def on_conv1d(way: Way, place: Path) -> None:
    if way.architecture != "llama" and way.gpt2 is None:
        raise ValueError("expected a way that GPT-2 has")
    trained(build("gpt2"), way.gpt2 or way.config)


def merged(way: Way, place: Path) -> None:
    model = way.adapted()
    expected = logits_of(model, "llama")
    lorakit.merge(model).save_pretrained(place)
    again = AutoModelForCausalLM.from_pretrained(place)
    assert relative(logits_of(model, "llama"), expected) < 1e-5
    assert relative(logits_of(again.eval(), "llama"), expected) < 1e-5


def read_by_peft(way: Way, place: Path) -> None:
    ours = way.adapted()
    theirs = PeftModel.from_pretrained(way.base(), lorakit.save_adapter(ours, place / "ours"))
    assert relative(logits_of(theirs.eval(), "llama"), logits_of(ours, "llama")) < 1e-5


def read_from_peft(way: Way, place: Path) -> None:
    theirs = peft_model(way.base(), **way.config.to_peft())
    randomise(theirs)
    theirs.save_pretrained(place / "theirs")
    ours = lorakit.load_adapter(way.base(), place / "theirs")
    assert relative(logits_of(ours, "llama"), logits_of(theirs.eval(), "llama")) < 1e-5


def as_gguf(way: Way, place: Path) -> None:
    way.base().save_pretrained(place / "base")
    updates = read_updates(lorakit.save_adapter(way.adapted(), place / "ours"))
    write_lora_gguf(updates, place / "base", place / "adapter.gguf")


def many_at_once(way: Way, place: Path) -> None:
    specs = [lorakit.Spec(way.config, 0.05, seed) for seed in (0, 1)]
    found = lorakit.fit_many(way.base(), TEXTS, specs, steps=3, batch_size=4, show=False)
    torch.manual_seed(1)
    alone = lorakit.fit(
        lorakit.inject(way.base(), way.config), TEXTS, steps=3, batch_size=4, lr=0.05, seed=1, show=False
    )
    assert abs(found[1].history.loss[-1] - alone.loss[-1]) < 1e-4


def several_by_name(way: Way, place: Path) -> None:
    model, expected = way.base(), {}
    for seed, name in enumerate(("one", "other")):
        adapted = way.adapted(seed)
        expected[name] = logits_of(adapted, "llama")
        lorakit.add_adapter(model, name, lorakit.save_adapter(adapted, place / name))
    for name, logits in expected.items():
        with lorakit.using_adapters(model, name):
            assert relative(logits_of(model.eval(), "llama"), logits) < 1e-5


USES: dict[str, Callable[[Way, Path], None]] = {
    "float32": lambda way, place: trained(way.base(), way.config),
    "bfloat16": lambda way, place: trained(way.base(torch.bfloat16), way.config),
    "NF4": lambda way, place: trained(lorakit.quantize_model(way.base()), way.config),
    "bitsandbytes": lambda way, place: trained(in_four_bits(way, place), way.config),
    "Conv1D": on_conv1d,
    "merge": merged,
    "PEFT reads it": read_by_peft,
    "from PEFT": read_from_peft,
    "GGUF": as_gguf,
    "fit_many": many_at_once,
    "several": several_by_name,
}


def works(name: str, use: str) -> bool:
    """Tries a way with a use; False if it is refused."""
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        try:
            USES[use](WAYS[name], Path(place))
        except Exception as error:
            if isinstance(error, ValueError) and str(error).startswith("expected"):
                return False
            error.add_note(f"{name}, {use}")
            raise
    return True


def table() -> str:
    """The table as Markdown, from trials of all cells."""
    lines = [f"| | {' | '.join(USES)} |", f"|---|{'---|' * len(USES)}"]
    lines += [f"| {name} | {' | '.join('yes' if works(name, use) else 'no' for use in USES)} |" for name in WAYS]
    return "\n".join(lines)


if __name__ == "__main__":
    text, made = README.read_text(encoding="utf-8"), table()
    before, behind = text.split(BEGIN)[0], text.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n{made}\n{END}{behind}", encoding="utf-8")
    print(made)
