"""Models and adapters as GGUF files, which llama.cpp and what is built on it serve.

Two things differ from transformers' folders. llama.cpp turns the entries 2i and 2i + 1 of a head together by its rotary
embedding, transformers i and i + d/2, so the rows of the query and key matrices are put into that order. And the
tokenizer goes into the file: its words, its merges, and the name of its way to split a text before the merges.
"""

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from lorakit._atomic import write_atomically
from lorakit._optional import need, quiet
from lorakit._paths import as_path
from lorakit.merging.updates import Updates, check_updates

KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
ENDS = ("token_embd", "output")  # an embedding's name there, and the output layer's
SPLITTERS = {("Digits", "ByteLevel"): "smollm", ("ByteLevel",): "gpt-2"}  # a pre-tokenizer's steps -> its name there


def write_gguf(folder: str | os.PathLike, path: str | os.PathLike, kind: str = "F32") -> Path:
    """Writes a model of the Llama architecture and its tokenizer as one GGUF file.

    Args:
        folder: config.json, safetensors and the tokenizer, as `save_pretrained` or `export_merged` leave them.
        path: the new file.
        kind: of the matrices, one of `KINDS`; vectors stay in float32. Q8_0 has 8 bits and one scale a block of 32,
            Q4_0 has 4 bits and one scale, Q4_1 a scale and a lowest value. With these two both ends of the model, which
            suffer more, have Q8_0.

    Returns:
        the path.

    Raises:
        FileExistsError: there is something at `path`; it stays as it is.
        FileNotFoundError: the folder has no safetensors.
        ValueError: another kind, another architecture, or a tokenizer that is no byte-level BPE known by
            name, or one that changes texts first.
    """
    folder = as_path("a model's folder", folder)
    if kind not in KINDS:
        raise ValueError(f"expected a kind of {', '.join(KINDS)}, got {kind!r}")
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise FileNotFoundError(f"expected model.safetensors in {str(folder)!r}")
    config = _llama_config(folder)
    out = _Draft(path)
    for key, value in _shape(config).items():
        getattr(out.writer, f"add_{key}")(value)
    _add_tokenizer(out.writer, folder, config.vocab_size)
    load = need("safetensors.torch").load_file
    for name, tensor in (pair for file in files for pair in load(file).items()):
        if not (name == "lm_head.weight" and config.tie_word_embeddings):
            layer, part = name.rsplit(".", 1)
            out.add(f"{_name_there(config, layer)}.{part}", _turned(tensor, layer, config), kind)
    return out.finish()


def write_lora_gguf(updates: Updates, folder: str | os.PathLike, path: str | os.PathLike, kind: str = "F32") -> Path:
    """Writes an adapter as a GGUF file, to be added to its base's by llama.cpp while it runs.

    Args:
        updates: what the adapter changes, from `read_updates` or `arithmetic`; the scale is in B already.
        folder: of the base, for its config.
        path, kind: as for `write_gguf`.

    Raises:
        FileExistsError, ValueError: as `write_gguf`; or a layer that the file of the base does not have, or whose
            weight is both ends of the model, to which llama.cpp cannot add.
    """
    config, gguf = _llama_config(as_path("a model's folder", folder)), need("gguf")
    check_updates(updates)
    if kind not in KINDS or not updates:
        raise ValueError(f"expected updates and a kind of {', '.join(KINDS)}, got {len(updates)} and {kind!r}")
    there = {name: _name_there(config, name) for name in updates}
    if shared := [name for name in updates if config.tie_word_embeddings and there[name] in ENDS]:
        raise ValueError(
            f"expected weights that no other layer has, got {shared[0]!r} of a model with tied ends: merge it with "
            "export_merged, then write_gguf"
        )
    out = _Draft(path)
    out.writer.add_type(gguf.GGUFType.ADAPTER)
    out.writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    out.writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)  # read as: no scale beside the factors
    for name, update in updates.items():
        A = update.A.T if there[name] == ENDS[0] else update.A  # rows are looked up in it
        out.add(f"{there[name]}.weight.lora_a", A, kind)
        out.add(f"{there[name]}.weight.lora_b", _turned(update.B, name, config), kind)
    return out.finish()


class _Draft:
    """A GGUF file that gets its name when it is whole."""

    def __init__(self, path: str | os.PathLike):
        self.path = as_path("a new file", path)
        if self.path.exists() or self.path.is_symlink():
            raise FileExistsError(f"expected a new file, got {str(self.path)!r}, which exists")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.gguf = need("gguf")
        self.writer = self.gguf.GGUFWriter(self.path, "llama")

    def add(self, name: str, tensor: Tensor, kind: str) -> None:
        if kind.startswith("Q4") and name.split(".")[0] in ENDS:
            kind = "Q8_0"
        chosen = self.gguf.GGMLQuantizationType[kind if tensor.ndim > 1 else "F32"]
        values = tensor.detach().float().contiguous().cpu().numpy()
        if chosen.name.startswith("Q") and values.shape[-1] % 32:
            raise ValueError(
                f"expected rows of whole blocks of 32 for {chosen.name}, got {tuple(values.shape)} for {name}"
            )
        self.writer.add_tensor(name, self.gguf.quantize(values, chosen), raw_dtype=chosen)

    def finish(self) -> Path:
        write_atomically({self.path: self._write})
        return self.path

    def _write(self, draft: Path) -> None:
        self.writer.write_header_to_file(draft)
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()


def _llama_config(folder: Path) -> Any:
    with quiet():
        config = need("transformers").AutoConfig.from_pretrained(folder)
    rope = getattr(config, "rope_parameters", None) or {}
    if config.model_type != "llama" or rope.get("rope_type", "default") != "default":
        raise ValueError(f"expected a Llama with plain rotary embeddings, got {config.model_type} with {rope}")
    return config


def _shape(config: Any) -> dict[str, int | float]:
    """What GGUFWriter has an `add_` for."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "key_length": head,
        "value_length": head,
        "rope_dimension_count": head,
        "rope_freq_base": config.rope_parameters["rope_theta"],
        "layer_norm_rms_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
    }


def _name_there(config: Any, layer: str) -> str:
    gguf = need("gguf")
    found = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers).get_name(layer)
    if found is None:
        raise ValueError(f"expected a layer of a Llama, got {layer!r}, which the file has no place for")
    return found


def _turned(tensor: Tensor, layer: str, config: Any) -> Tensor:
    """Rows of queries and keys, head by head, from the order 0 1 2 ... to 0 d/2 1 d/2+1 ...; others as they are."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(layer.rsplit(".", 1)[-1])
    if heads is None:
        return tensor
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)


def _add_tokenizer(writer: Any, folder: Path, size: int) -> None:
    gguf = need("gguf")
    with quiet():
        tokenizer = need("transformers").AutoTokenizer.from_pretrained(folder)
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    before = spec["pre_tokenizer"] or {"type": "none"}
    steps = tuple(step["type"] for step in before.get("pretokenizers", [before]))
    if spec["model"]["type"] != "BPE" or steps not in SPLITTERS:
        raise ValueError(f"expected a byte-level BPE tokenizer, got {spec['model']['type']} after {', '.join(steps)}")
    if spec["normalizer"]:
        raise ValueError(f"expected a tokenizer without a normalizer, got {spec['normalizer']['type']}")
    if any(step.get("add_prefix_space") for step in before.get("pretokenizers", [before])):
        raise ValueError("expected a tokenizer that puts no space before a text, got add_prefix_space")
    special = {token["id"]: token["special"] for token in spec["added_tokens"]}
    kinds = {True: gguf.TokenType.CONTROL, False: gguf.TokenType.USER_DEFINED, None: gguf.TokenType.NORMAL}
    tokens = tokenizer.convert_ids_to_tokens(list(range(size)))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(SPLITTERS[steps])
    writer.add_token_list([token or f"[PAD{i}]" for i, token in enumerate(tokens)])
    writer.add_token_types([kinds[special.get(i)] if t else gguf.TokenType.UNUSED for i, t in enumerate(tokens)])
    writer.add_token_merges([" ".join(pair) for pair in spec["model"]["merges"]])
    for name in ("bos", "eos"):
        if (token := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    writer.add_add_bos_token(False)  # prompts bring their own
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
