"""Who serves an adapter as it was saved: PEFT, vLLM and llama.cpp, by the limits that they document.

Read in September 2026: vLLM's `LoRAConfig` and `PEFTHelper`, llama.cpp's `convert_lora_to_gguf.py`. Both take one
`lora_alpha` for the whole adapter and pass over `alpha_pattern`, so that an adapter with several scales would load
without a word and answer wrongly.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.layers.lora import scale_of

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be
VLLM_DEFAULT_RANK = 16
PEFT_KINDS = {  # `peft.PeftType` of PEFT 0.21
    *("ADALORA", "ADAMSS", "ADAPTION_PROMPT", "BEFT", "BOFT", "C3A", "CARTRIDGE", "CPT", "DEFT", "DELORA", "FOURIERFT"),
    *("FROD", "GLORA", "GRALORA", "HIRA", "HRA", "IA3", "LILY", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS"),
    *("MULTITASK_PROMPT_TUNING", "OFT", "OSF", "PEANUT", "POLY", "PREFIX_TUNING", "PROMPT_TUNING", "PSOFT", "PVERA"),
    *("P_TUNING", "RANDLORA", "ROAD", "SHADOW", "SHIRA", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA"),
    *("VBLORA", "VERA", "WAVEFT", "XLORA"),
}

VLLM, LLAMA_CPP = "https://github.com/vllm-project/vllm", "https://github.com/ggml-org/llama.cpp"
PEFT_PAGE = "https://huggingface.co/docs/peft/developer_guides/checkpoint"
VLLM_RANK_PAGE = "https://docs.vllm.ai/en/v0.14.0/api/vllm/config/lora/"
VLLM_HELPER = f"{VLLM}/blob/main/vllm/lora/peft_helper.py"
CONVERTER = f"{LLAMA_CPP}/blob/master/convert_lora_to_gguf.py"
VLLM_EXPERTS = "https://huggingface.co/docs/peft/main/en/developer_guides/lora#moe-expert-parameters-and-vllm"
EXPERTS = "factors of experts"  # the kind of what LoRA holds of parameters
LLAMA_SCALE = f"{LLAMA_CPP}/pull/8332"


@dataclass(frozen=True)
class Served:
    """Whether an engine serves the adapter as it is, how or why not, and the page that says so."""

    engine: str
    able: bool
    reason: str
    source: str


@dataclass(frozen=True)
class Extra:
    """A tensor of the file that is no factor of an update: its key, what it is, how many numbers it has."""

    key: str
    kind: str
    numbers: int


def served_by(
    file: Mapping[str, Any], ranks: Sequence[int], scales: Sequence[float], extra: Sequence[Extra]
) -> list[Served]:
    """What PEFT, vLLM and llama.cpp can do with an adapter's two files.

    Args:
        file: adapter_config.json.
        ranks, scales: of each LoRA layer, both in one order.
        extra: the file's other parts.
    """
    return [_peft(file), _vllm(file, ranks, scales, extra), _llama_cpp(file, ranks, scales, extra)]


def _peft(file: Mapping[str, Any]) -> Served:
    kind = file["peft_type"]
    if kind not in PEFT_KINDS:
        return Served("PEFT", False, f"{kind} is none of its methods", PEFT_PAGE)
    return Served("PEFT", True, _start_note(file), PEFT_PAGE)


def _vllm(file: Mapping[str, Any], ranks: Sequence[int], scales: Sequence[float], extra: Sequence[Extra]) -> Served:
    no = next(_vllm_objections(file, ranks, scales, extra), None) or next(_shared_objections(file), None)
    if no is not None:
        return Served("vLLM", False, *no)
    needed = next(rank for rank in VLLM_RANKS if rank >= max(ranks, default=1))
    how = f"--enable-lora --max-lora-rank {needed}" if needed > VLLM_DEFAULT_RANK else "--enable-lora"
    return Served("vLLM", True, how, VLLM_RANK_PAGE)


def _vllm_objections(
    file: Mapping[str, Any], ranks: Sequence[int], scales: Sequence[float], extra: Sequence[Extra]
) -> Iterator[tuple[str, str]]:
    if file["peft_type"] != "LORA":
        yield f"{file['peft_type']} is no LoRA", VLLM_HELPER
    if file.get("use_dora"):
        yield "DoRA is refused", f"{VLLM}/issues/10849"
    if file.get("modules_to_save"):
        yield "modules_to_save is refused", f"{VLLM}/issues/9280"
    if file.get("bias", "none") != "none" or file.get("lora_bias"):
        yield "trained biases are refused", VLLM_HELPER
    if rows := [part for part in extra if part.kind == "token rows"]:
        yield f"{rows[0].key} is an unsupported weight", f"{VLLM}/issues/36501"
    if any(part.kind == EXPERTS for part in extra):
        yield "experts of one parameter fit those of its models that say is_3d_moe_weight, and no others", VLLM_EXPERTS
    if extra:
        yield f"{extra[0].key} is an unsupported weight", f"{VLLM}/issues/9280"
    if ranks and max(ranks) > VLLM_RANKS[-1]:
        yield f"rank {max(ranks)} is above {VLLM_RANKS[-1]}", VLLM_RANK_PAGE
    if ranks and (one := _file_scale(file)) is not None and any(not math.isclose(s, one) for s in scales):
        yield f"it takes one scale, {one:g}, for all layers, and the adapter has several", VLLM_HELPER


def _llama_cpp(
    file: Mapping[str, Any], ranks: Sequence[int], scales: Sequence[float], extra: Sequence[Extra]
) -> Served:
    objections = (*_llama_objections(file, ranks, scales, extra), *_shared_objections(file))
    if objections:
        return Served("llama.cpp", False, *objections[0])
    return Served("llama.cpp", True, "after convert_lora_to_gguf.py, for an architecture that it knows", CONVERTER)


def _llama_objections(
    file: Mapping[str, Any], ranks: Sequence[int], scales: Sequence[float], extra: Sequence[Extra]
) -> Iterator[tuple[str, str]]:
    if file["peft_type"] != "LORA":
        yield f"{file['peft_type']} is no LoRA", CONVERTER
    if file.get("use_dora"):
        yield "DoRA's magnitudes are refused", f"{LLAMA_CPP}/issues/6536"
    if any(part.kind == EXPERTS for part in extra):
        yield "it takes layers, and experts are parameters", CONVERTER
    if strange := [part for part in extra if "norm" not in part.key]:  # norms are kept
        yield f"{strange[0].key} is neither lora_A nor lora_B", f"{LLAMA_CPP}/issues/11554"
    alpha = file.get("lora_alpha") or 0
    for rank, scale in zip(ranks, scales, strict=True):
        if not math.isclose(alpha / rank, scale):
            yield (
                f"the converter's scale is lora_alpha / rank, {alpha / rank:g} for {scale:g}; "
                "lorakit.merging.gguf.write_lora_gguf writes the right one",
                LLAMA_SCALE,
            )


def _shared_objections(file: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What an engine that adds `s B A` to the base would do wrongly without a word."""
    if note := _start_note(file):
        yield f"{note}: save it as plain LoRA first", "https://huggingface.co/docs/peft/developer_guides/lora"


def _start_note(file: Mapping[str, Any]) -> str:
    """Said of a start that takes a part out of the base, which has to be taken out again wherever it is served."""
    start = str(file.get("init_lora_weights", True)).lower()
    changed = file["peft_type"] == "LORA" and start.startswith(("pissa", "olora", "corda", "loftq", "lora_ga"))
    return f"it fits the base less the start of {start}" if changed else ""


def _file_scale(file: Mapping[str, Any]) -> float | None:
    """The scale that the settings have for layers without a pattern."""
    rank, alpha = file.get("r"), file.get("lora_alpha")
    if not rank or alpha is None:
        return None
    return scale_of(file)
