"""LoRAConfig: what an adapter is, in one place, and in PEFT's words."""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache, partial
from typing import Any

import regex
from torch import nn

from lorakit._suggest import near_names
from lorakit._words import one_line, short
from lorakit.layers.bases import is_conv1d, is_known
from lorakit.layers.dora import DoRALinear
from lorakit.layers.embedding import LoRAEmbedding
from lorakit.layers.experts import LoRAExperts
from lorakit.layers.lora import LoRALinear, ScaleRule, checked_scale
from lorakit.layers.pissa import PiSSALinear, olora_start, pissa_start
from lorakit.layers.settings import (
    TASK_HEADS,
    flag,
    ids_to_peft,
    integer,
    listed,
    number,
    optional_names,
    read_setting,
    several_names,
    text,
    token_ids,
)

# Settings of a peft.LoraConfig that leave LoRA plain, or that are read here; names follow PEFT 0.21.
PLAIN = {
    *("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"),
    *("peft_type", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout"),
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("fan_in_fan_out", "init_lora_weights", "loftq_config", "eva_config", "megatron_core", "qalora_group_size"),
    *("runtime_config", "ensure_weight_tying", "target_parameters", "modules_to_save", "trainable_token_indices"),
}
SECONDS = 0.02  # of the processor, for matching one name: others than those that never end take microseconds


@dataclass(frozen=True)
class LoRAConfig:
    """All settings of an adapter, checked when they are put together.

        config = lorakit.LoRAConfig(16, 32, scale_rule="rslora", targets=["q_proj", "v_proj"])
        lorakit.inject(model, config)
        peft.get_peft_model(model, peft.LoraConfig(**config.to_peft()))

    Args:
        rank: inner dimension of every adapter.
        alpha: numerator of the scale.
        dropout: probability in [0, 1) of zeroing an input of A during training.
        scale_rule: a name of `SCALE_RULES`, or a function (alpha, rank) -> s.
        targets: which layers, as in `find_targets`.
        layer: the adapter's class, called as `layer(base, rank, alpha, ...)` with what differs from the defaults.
        settings: further keywords of that class, such as PiSSA's `start` or DoRA's `detach_norm`.
        rank_pattern: expression for a layer's name or its last parts -> its rank; the first that matches counts.
        alpha_pattern: the same for alpha.
        exclude_modules: layers that get none although `targets` choose them: names, or an expression.
        layers_to_transform: numbers of the blocks whose layers get an adapter, such as `[0, 1]`; none for all. A
            layer that `targets` name in full is meant, whatever its block. A block's number is the first in a name.
        layers_pattern: what stands before that number, such as "layers"; none for anything.
        target_parameters: names of parameters that are no layer's weight, such as `"experts.gate_up_proj"`, each in
            full or its last parts; None for none, but beside `"all-linear"` for all experts. PEFT's own "all-linear"
            differs for experts: where it knows the architecture (Mixtral, Qwen-MoE and their like) it adapts routers
            too, gives `gate_up_proj` twice the rank, and passes over shared experts; elsewhere it leaves experts out.
        modules_to_save: modules that train whole beside the adapters, such as a classifier: each whose name ends with
            one of these, so that "norm" means every norm of a Llama, as in PEFT. Adapters leave them alone.
        trainable_token_indices: token ids whose rows of the input embedding train; or name of an embedding or output
            layer -> ids. Layers that share the weight follow, unless they are given other ids.
        ensure_weight_tying: where the input embedding or a layer that shares its weight is adapted or trains whole, one
            change for all of them. Without it each is what its own name says, and merging ends the sharing.

    Raises:
        ValueError: a setting is out of range, or the class does not know it.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    scale_rule: ScaleRule = "lora"
    targets: str | Iterable[str] = "all-linear"
    layer: Callable[..., nn.Module] = LoRALinear
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)
    exclude_modules: str | Iterable[str] = ()
    layers_to_transform: Iterable[int] = ()
    layers_pattern: str | Iterable[str] = ()
    target_parameters: Iterable[str] | None = None
    modules_to_save: Iterable[str] = ()
    trainable_token_indices: Iterable[int] | Mapping[str, Iterable[int]] = field(default=(), hash=False)
    ensure_weight_tying: bool = False

    def __post_init__(self):
        if not isinstance(self.targets, str):
            if not isinstance(self.targets, Iterable):
                raise ValueError(f"expected targets as names or one regular expression, got {self.targets!r}")
            object.__setattr__(self, "targets", tuple(self.targets))
        for name in ("settings", "rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(f"expected {name} as a dict, got {getattr(self, name)!r}")
            object.__setattr__(self, name, dict(getattr(self, name)))
        for name, read in READ.items():
            value = read_setting(name, vars(self), read)
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)
        pairs = [(self.rank, self.alpha)]
        pairs += [(rank, self.alpha) for rank in self.rank_pattern.values()]
        pairs += [(self.rank, alpha) for alpha in self.alpha_pattern.values()]
        for rank, alpha in pairs:
            checked_scale(rank, alpha, self.dropout, self.scale_rule)
        for pattern in [*self.rank_pattern, *self.alpha_pattern]:
            _compiled(pattern)
        if not callable(self.layer) or (isinstance(self.layer, nn.Module)):
            raise ValueError(f"expected an adapter's class as layer, got {self.layer!r}")
        try:
            known = inspect.signature(self.layer).parameters
        except ValueError:
            raise ValueError(f"expected an adapter's class as layer, got {self.layer!r}") from None
        if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
            for name in self._keywords():
                if name not in known:
                    who = getattr(self.layer, "__name__", "the layer")
                    others = [each.name for each in fields(self)]
                    raise ValueError(f"expected a setting of {who}, {near_names(name, [*list(known)[3:], *others])}")

    def _keywords(self) -> dict[str, Any]:
        """What the class is called with beside base, rank and alpha: only what is not its default anyway."""
        own: dict[str, Any] = {"dropout": self.dropout} if self.dropout else {}
        return own | ({} if self.scale_rule == "lora" else {"scale_rule": self.scale_rule}) | dict(self.settings)

    def at(self, name: str) -> tuple[int, float]:
        """Rank and alpha of the layer of that name."""
        return pattern_value(self.rank_pattern, name, self.rank), pattern_value(self.alpha_pattern, name, self.alpha)

    def keeps(self, name: str) -> bool:
        """Whether a layer that `targets` choose is neither excluded nor in a block that is left out."""
        if self.exclude_modules and matches(_expression(self.exclude_modules), name):
            return False
        named = not isinstance(self.targets, str) and name in self.targets
        return named or not self.layers_to_transform or self.block(name) in tuple(self.layers_to_transform)

    def block(self, name: str) -> int | None:
        """The number of the block that a layer is in, by `layers_pattern`; None if it is in none."""
        starts = [rf"(?:|.*?\.){each}" for each in self.layers_pattern] or [r".*?\.[^.]*"]
        found = next((match for start in starts if (match := _whole(rf"{start}\.(?P<block>\d+)\..*", name))), None)
        return int(found["block"]) if found else None

    def make(self, name: str, base: nn.Module, parameters: Sequence[str] = ()) -> nn.Module:
        """The adapter for one layer, or for these parameters of a module; a ValueError if the class takes neither."""
        try:
            return self._make(name, base, parameters)
        except (TypeError, RuntimeError, ArithmeticError, MemoryError) as error:  # of a reader's own class
            raise ValueError(f"expected settings for layers such as {name!r}, got {one_line(error)}") from error

    def _make(self, name: str, base: nn.Module, parameters: Sequence[str]) -> nn.Module:
        if not parameters:
            layer = LoRAEmbedding if self.layer is LoRALinear and isinstance(base, nn.Embedding) else self.layer
            return layer(base, *self.at(name), **self._keywords())
        if names_a_layer(base, parameters):
            return self.layer(base, *self.at(f"{name}.weight"), **self._keywords())
        if self.layer is not LoRALinear or self.dropout or self.settings:
            who = f"{getattr(self.layer, '__name__', self.layer)} with {self._keywords()}"
            raise ValueError(
                f"expected plain LoRA without dropout for parameters such as experts', got {who}: "
                "target_parameters=[] leaves them out"
            )
        return LoRAExperts(base, {key: self.at(f"{name}.{key}") for key in parameters}, self.scale_rule)

    def to_peft(self) -> dict[str, Any]:
        """The keywords of the `peft.LoraConfig` that means the same: `peft.LoraConfig(**config.to_peft())`.

        A scale rule of one's own becomes the alpha that gives the same scale. The answer is plain values, without PEFT.

        Raises:
            ValueError: PEFT has no such layer or setting.
        """
        rule = self.scale_rule if self.scale_rule in ("lora", "rslora") else None
        if rule is None and (self.rank_pattern or self.alpha_pattern):
            raise ValueError(
                "expected scale_rule 'lora' or 'rslora' beside patterns, got another: PEFT has no such rule"
            )
        if self.layers_to_transform and isinstance(self.targets, str):
            raise ValueError(
                f"expected targets by name with layers_to_transform, got {self.targets!r}: PEFT reads no numbers there"
            )
        return {
            "r": self.rank,
            "lora_alpha": self.alpha
            if rule
            else self.rank * checked_scale(self.rank, self.alpha, 0.0, self.scale_rule),
            "lora_dropout": self.dropout,
            "use_rslora": rule == "rslora",
            "target_modules": _whole_names(self.targets) if self.targets != "all-linear" else self.targets,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "exclude_modules": _whole_names(self.exclude_modules) or None,
            "layers_to_transform": list(self.layers_to_transform) or None,
            "layers_pattern": list(self.layers_pattern) or None,
            "target_parameters": None if self.target_parameters is None else list(self.target_parameters),
            "modules_to_save": list(self.modules_to_save) or None,
            "trainable_token_indices": ids_to_peft(self.trainable_token_indices),
            "ensure_weight_tying": self.ensure_weight_tying,
        } | _method_to_peft(self.layer, self.settings)

    @classmethod
    def from_peft(cls, config: Any) -> "LoRAConfig":
        """What a `peft.LoraConfig`, or its dict, means: plain LoRA, rsLoRA, DoRA, PiSSA or OLoRA.

        A `task_type` such as "SEQ_CLS" adds the heads that PEFT adds to `modules_to_save`.

        Raises:
            ValueError: it is another method, has a setting that is not read here, or one that is out of range.
        """
        config = config.to_dict() if hasattr(config, "to_dict") else config
        if not isinstance(config, Mapping):
            raise ValueError(f"expected a peft.LoraConfig or its dict, got {short(config)}")
        method = config.get("peft_type", "LORA")
        if method != "LORA":
            raise ValueError(f"expected plain LoRA (peft_type 'LORA'), got {getattr(method, 'value', method)!r}")
        for key, value in config.items():
            if key not in PLAIN and value not in (None, False, "none", [], {}):
                raise ValueError(f"expected plain LoRA, got {key} = {short(value)}")
        layer, settings = _method_from_peft(config)
        return cls(
            rank=read_setting("r", config, integer),
            alpha=read_setting("lora_alpha", config, number),
            dropout=read_setting("lora_dropout", config, lambda value: number(0.0 if value is None else value)),
            scale_rule="rslora" if read_setting("use_rslora", config, flag) else "lora",
            targets=_targets_from_peft(config),
            exclude_modules=_last_parts(read_setting("exclude_modules", config, _names)),
            layers_to_transform=_layers_from_peft(config),
            layers_pattern=read_setting("layers_pattern", config, READ["layers_pattern"]),
            layer=layer,
            settings=settings,
            rank_pattern=read_setting("rank_pattern", config, lambda value: _each(integer, value)),
            alpha_pattern=read_setting("alpha_pattern", config, lambda value: _each(number, value)),
            target_parameters=read_setting("target_parameters", config, optional_names),
            modules_to_save=[
                *read_setting("modules_to_save", config, several_names),
                *TASK_HEADS.get(str(getattr(config.get("task_type"), "value", config.get("task_type"))), ()),
            ],
            trainable_token_indices=read_setting("trainable_token_indices", config, token_ids),
            ensure_weight_tying=read_setting("ensure_weight_tying", config, flag),
        )


def names_a_layer(base: nn.Module, parameters: Sequence[str]) -> bool:
    """True if the parameters are a linear layer's weight, so that the layer itself is meant."""
    return tuple(parameters) == ("weight",) and is_known(base) and not is_conv1d(base)


def pattern_value(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first pattern that the layer's name, or its last parts, match (PEFT's `get_pattern_key`)."""
    return next((value for key, value in (patterns or {}).items() if matches(key, name)), default)


def matches(expression: str, name: str) -> bool:
    """True if a regular expression is that of a layer's full name or of its last parts.

    Raises:
        ValueError: it is none, or one such as `(a|aa)*[!?]`, which takes longer with every letter than anybody waits.
    """
    return _whole(_ending(expression), name) is not None


@lru_cache(maxsize=100_000)
def _whole(expression: str, name: str) -> regex.Match | None:
    """The match of an expression with all of a name."""
    try:
        return regex.fullmatch(_compiled(expression), name, timeout=SECONDS)
    except TimeoutError:
        raise ValueError(
            f"expected an expression that is quick to match, got {short(expression)} for {name!r}"
        ) from None
    except (regex.error, OverflowError, RecursionError) as error:
        raise ValueError(f"expected a regular expression, got {short(expression)}: {error}") from None


def _ending(expression: str) -> str:
    return rf"(.*\.)?({expression})"


def _method_to_peft(layer: Callable[..., nn.Module], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Which of PEFT's methods a layer is, in its settings."""
    if layer is LoRALinear and not settings:
        return {}
    if layer is DoRALinear and settings.get("detach_norm", True) and not set(settings) - {"detach_norm"}:
        return {"use_dora": True}
    start = settings.get("start", pissa_start)
    if layer is PiSSALinear and start in (pissa_start, olora_start):
        return {"init_lora_weights": "pissa" if start is pissa_start else "olora"}
    if layer is PiSSALinear and isinstance(start, partial) and start.func is pissa_start and not start.args:
        return {"init_lora_weights": f"pissa_niter_{start.keywords['niter']}"}
    who = getattr(layer, "__name__", layer)
    raise ValueError(f"expected a layer that PEFT has, got {who} with {dict(settings)}")


def _method_from_peft(config: Mapping[str, Any]) -> tuple[Callable[..., nn.Module], dict[str, Any]]:
    start, dora = config.get("init_lora_weights", True), read_setting("use_dora", config, flag)
    if start in (True, None):
        return (DoRALinear if dora else LoRALinear), {}
    quick = re.fullmatch(r"pissa_niter_(\d+)", str(start))
    if not dora and (start in ("pissa", "olora") or quick):
        if quick:
            return PiSSALinear, {"start": partial(pissa_start, niter=int(quick[1]))}
        return PiSSALinear, {} if start == "pissa" else {"start": olora_start}
    raise ValueError(f"expected LoRA's usual start, pissa or olora, got init_lora_weights = {start!r}")


def _targets_from_peft(config: Mapping[str, Any]) -> str | list[str]:
    """`find_targets`' way to say which layers a config adapts (PEFT's `check_target_module_exists`)."""
    targets = read_setting("target_modules", config, _names)
    if not targets:
        if config.get("target_parameters"):
            return []
        raise ValueError(f"expected a valid target_modules, got {short(targets)}")
    return targets if targets == "all-linear" else _last_parts(targets)


def _layers_from_peft(config: Mapping[str, Any]) -> list[int]:
    """Which blocks; PEFT does not look at them where targets are an expression."""
    numbers = read_setting("layers_to_transform", config, READ["layers_to_transform"])
    return [] if isinstance(config.get("target_modules"), str) else numbers


def _last_parts(names: str | list[str]) -> str | list[str]:
    """PEFT's expression, which is for whole names, as one that might also be for their last parts; lists are alike."""
    return (_between(r"(.*\.)?(", names, ")") or f"^(?:{names})") if names and isinstance(names, str) else names


def _whole_names(names: str | Iterable[str]) -> str | list[str]:
    """The other way round."""
    if not isinstance(names, str):
        return list(names)
    whole = _between("^(?:", names, ")")
    return rf"(.*\.)?({names})" if whole is None else whole


def _each(read: Callable[[Any], Any], patterns: Any) -> dict[str, Any]:
    if not isinstance(patterns, Mapping | None):
        raise TypeError(patterns)
    return {_compiled(key): read(value) for key, value in (patterns or {}).items()}


def _names(value: Any) -> str | list[str]:
    """A regular expression, or a list of names."""
    return _compiled(value) if isinstance(value, str) else listed(text, value)


READ: dict[str, Callable[[Any], Any]] = {  # how some settings are read, from PEFT or from somebody who types them
    "exclude_modules": _names,
    "layers_to_transform": lambda value: listed(integer, value),
    "layers_pattern": lambda value: listed(_compiled, value),
    "target_parameters": optional_names,
    "modules_to_save": several_names,
    "trainable_token_indices": token_ids,
}


def _expression(targets: str | Iterable[str]) -> str:
    """A regular expression for a name or its last parts: what a list of names means, or the one that there is."""
    return targets if isinstance(targets, str) else "|".join(map(re.escape, targets))


def _compiled(expression: str) -> str:
    """The expression itself, once it is seen to be one."""
    try:
        for form in (expression, _ending(expression)):  # a group must not end in the middle
            re.compile(form)
    except (re.error, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"expected a regular expression, got {short(expression)}: {error}") from None
    return expression


def _between(start: str, text: str, end: str) -> str | None:
    """What a group that is the whole text encloses, None if the text is no such group."""
    inner = text[len(start) : len(text) - len(end)]
    try:
        re.compile(inner)
    except re.error:
        return None
    return inner if text == start + inner + end else None
