"""Tiny random models of every type that the installed transformers knows, and inputs that they run on.

The sizes of a type's own config class are cut by the names of its fields (`Fixed`), or, where relations between them break, all
widths are divided by one number (`Divided`); sub-configs likewise. What neither rule can build is in `special`. Inputs
follow the signature of `forward`: candidates are tried until the model runs.
"""

import copy
import dataclasses
import importlib
import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from benchmarks import special
from benchmarks.judge import outputs
from benchmarks.special import VOCABULARY, WIDTH
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import model_type_to_module_name

from sarac import SaracError
from sarac.ir import check
from sarac.ir.inputs import Inputs

LEAST = 1e-3  # relative: what the outputs move by, at least, where all weights move by a third
LARGEST = 15_000_000  # parameters: 60 MB in float32
TOKENS = 12
BATCH = 2
HEADS, HEAD = 4, 8
_NOTHING: Mapping[str, Any] = {}
_HEADS_FIRST = ("MODEL_MAPPING_NAMES", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_BACKBONE_MAPPING_NAMES")


class CannotBuild(Exception):
    """No rule builds this type, or no inputs make it run: the last error of every attempt."""


def types() -> list[str]:
    """Every model type that transformers knows."""
    return sorted(CONFIG_MAPPING.keys())


@cache
def _classes() -> dict[str, list[str]]:
    """The names of the model classes of every type, the base model first."""
    names = [n for n in vars(modeling_auto) if n.endswith("_MAPPING_NAMES") and n != "CONFIG_MAPPING_NAMES"]
    names.sort(key=lambda n: _HEADS_FIRST.index(n) if n in _HEADS_FIRST else len(_HEADS_FIRST))
    found: dict[str, list[str]] = {}
    for name in names:
        for kind, classes in getattr(modeling_auto, name).items():
            found.setdefault(kind, []).extend([classes] if isinstance(classes, str) else classes)
    return found


def model_classes(kind: str) -> list[type[PreTrainedModel]]:
    """The classes to try for a type: those of the auto mappings, else those of its module that take this very config."""
    config = CONFIG_MAPPING[kind]
    home = config.__module__.rpartition(".")[0]
    modules = [f"transformers.models.{model_type_to_module_name(kind)}", home]
    found = []
    for name in dict.fromkeys(special.CLASSES.get(kind, []) + _classes().get(kind, [])):
        for module in modules:
            try:
                found.append(getattr(importlib.import_module(module), name))
                break
            except (AttributeError, ImportError):
                continue
        else:  # some are named there and do not exist
            found += [one] if (one := getattr(importlib.import_module("transformers"), name, None)) else []
    return found or list(_own_classes(config, home))


def _own_classes(config: type, home: str) -> Iterator[type[PreTrainedModel]]:
    last = home.rpartition(".")[2]
    try:
        module = importlib.import_module(f"{home}.modeling_{last}")
    except ImportError:
        return
    for value in list(vars(module).values()):
        own = isinstance(value, type) and issubclass(value, PreTrainedModel) and value.__module__ == module.__name__
        if own and not value.__name__.endswith("PreTrainedModel") and _config_of(value) is config:
            yield value


def _config_of(model: type) -> Any:
    declared = inspect.get_annotations(model).get("config") or model.config_class  # type: ignore[attr-defined]
    module = importlib.import_module(model.__module__)
    return getattr(module, declared, None) if isinstance(declared, str) else declared


# Sizes: the rules by name. The first that matches decides.


@dataclass(frozen=True)
class Fixed:
    """Every width becomes 32, every head 8 wide, every stack two layers deep; `sections`: rotary axes, where none are named."""

    layers: int = 2
    sections: bool = False

    def __call__(self, name: str, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(_listed(name, list(value)))
        for pattern, size in _SIZES:
            if re.search(pattern, name):
                limit = self.layers if isinstance(size, str) else size
                small = limit(value) if callable(limit) else min(limit, value)
                return type(value)(small) if isinstance(value, int | float) else small
        return value


_FILLED = {
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "head_dim": HEAD, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
    "sliding_window": 8, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts": 4, "prediction_length": 4,
    "pad_token_id": 0, "attention_head_dim": HEAD, "num_local_experts": 4, "moe_topk": 2, "attention_chunk_size": 8,
    "image_token_id": 10, "image_token_index": 10, "video_token_id": 11, "audio_token_id": 12, "attn_head_dim": HEAD,
    "block_auto_adjust_ff_dim": False, "n_shared_experts": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Filled(Fixed):
    """As fixed, and sizes that the class leaves open are given."""


@dataclass(frozen=True)
class Divided:
    """Depths and vocabularies as by the fixed rule, every width divided by one number, heads as they are."""

    by: int
    layers: int = 2

    def __call__(self, name: str, value: Any) -> Any:
        if _WIDTHS.search(name) and not _NO_WIDTHS.search(name):
            if isinstance(value, list | tuple):
                return type(value)(self._one(item) for item in value)
            return self._one(value)
        if isinstance(value, list | tuple) and "channels" in name:
            return type(value)(self._one(item) for item in value)
        if re.search(r"heads?$|head_dim|head_size|d_kv|groups|intermediate|patch|image_size", name):
            return value
        return Fixed(self.layers)(name, value)

    def _one(self, value: Any) -> Any:
        return value // self.by if isinstance(value, int) and value % self.by == 0 and value // self.by >= 4 else value


RULES: tuple[Any, ...] = (
    *(Fixed(), Filled(), Fixed(2, True), Filled(2, True), Fixed(4), Filled(4)),
    *(Divided(by, layers) for layers in (2, 4) for by in (16, 8, 4, 2, 1)),
)
_WIDTHS = re.compile(r"size|dim|channels|width|hidden|n_embd|d_model|d_ff|filters|rank|units|inner|features|planes|d_")
_NO_WIDTHS = re.compile(
    r"vocab|image|patch|window|kernel|stride|token|position|_ids?$|chunk|block|batch|codebook_size|merge|pool|buckets|"
    r"cache|_max_|^max_|head|input_size|sampling|num_|layers|_k$|_dims?_ratio|context|temperature|grid|in_channels|state"
)
_SIZES: list[tuple[str, int | str | Callable[[Any], Any]]] = [
    (r"(^|_)(type_)?vocab_size|vocabulary|vocab_size$|vocab_size_", VOCABULARY),
    (r"label|loss|coefficient|cost|temperature|theta|sampling_rate|_ids?$|_index$|seed|frequency|bins|buckets", lambda v: v),
    (r"max_window_layers|nextn|num_mtp|skip_layers|kv_shared_layers", lambda v: min(v, 1)),
    (r"first_k_dense|dense_layers|num_shared_layers", lambda v: min(v, 1)),
    (r"(_layers?|^depth|_depth|n_layer|num_blocks|_blocks|n_blocks|num_layers|layer_num)$", "layers"),
    (r"(interval|_period|sparse_step|layer_freq|every_n|_pattern)", lambda v: min(v, 2) if isinstance(v, int) else v),
    (r"experts_per_tok|top_?k$|moe_k$|num_selected|topk_experts|num_experts_per|moe_topk", lambda v: min(v, 2)),
    (r"rotary_dim|rotary_ndims", lambda v: min(v, HEAD // 2)),
    (r"_offset$", lambda v: min(v, 1)),
    (r"mamba_n_heads|mamba_num_heads", lambda v: min(v, 8)),
    (r"mamba_d_ssm", lambda v: min(v, 2 * WIDTH)),
    (r"topk_group|topk_groups", lambda v: min(v, 1)),
    (r"n_group|num_expert_groups", lambda v: min(v, 2)),
    (r"n_shared_experts|num_shared_expert", lambda v: min(v, 1)),
    (r"experts?$|num_experts|n_routed|experts", lambda v: min(v, 4)),
    (r"head_dim|d_kv|dim_head|attention_head_size|head_size|d_head|head_width|size_per_head|kv_channels", lambda v: min(v, HEAD)),
    (r"(key_value|kv)_heads|num_kv|n_kv|num_key_value|n_head_kv|_kv_head", lambda v: min(v, 2)),
    (r"key_heads|num_k_heads|_heads_k", lambda v: min(v, 2)),
    (r"heads?$|n_heads|num_heads|attention_heads|_nheads", lambda v: min(v, HEADS)),
    (r"lora_rank|low_rank|_rank$|lora_dim", lambda v: min(v, 16)),
    (r"moe_.*intermediate|expert.*intermediate|expert.*_dim|shared_intermediate", lambda v: min(v, 16)),
    (r"intermediate|ffn|d_ff|mlp_dim|d_inner|inner|feedforward|feed_forward|mlp_hidden", lambda v: min(v, 2 * WIDTH)),
    (r"image_size|img_size|input_size|crop_size", lambda v: min(v, 32) if v > 16 else v),
    (r"patch_size", lambda v: min(v, 8)),
    (r"sliding_window|attention_window|local_window|window_len|local_attn|chunk_length", lambda v: min(v, 8)),
    (r"window_size|window", lambda v: 32 if v > 64 else min(v, 4)),  # in pixels, or in patches
    (r"max_source_positions|max_length_input", lambda v: min(v, 16)),
    (r"max_position|n_positions|n_ctx|positions|max_seq|seq_len|context_len|position_embeddings|max_.*length", 128),
    (
        r"num_queries|num_query_tokens|query_num|num_latents|num_object|resampler_n|num_proposals|num_denoising",
        lambda v: min(v, 8),
    ),
    (r"chunk_size|block_size|chunk", lambda v: min(v, 8)),
    (r"mel|input_feat|feature_size|num_freq|n_fft", lambda v: v),
    (r"kernel|stride|dilation|num_channels|in_chan|input_channels|groups|factor|rate|ratio|merge|scale", lambda v: v),
    (r"state_size|d_state|ssm_state|conv_dim", lambda v: min(v, 8)),
    (r"codebook_size|codebooks$|quantizers", lambda v: min(v, 16)),
    (r"size|dim|hidden|width|channels|d_model|n_embd|units|filters|features|planes|embd|d_", lambda v: min(v, WIDTH)),
]


def _listed(name: str, values: list[Any]) -> list[Any]:
    if not values or not all(isinstance(item, int) and not isinstance(item, bool) for item in values):
        return values
    if re.search(r"^depths?$|_depths?$|num_hidden_layers|^layers$|num_layers|num_blocks|depth", name):
        return [min(item, 1) for item in values]
    if re.search(r"heads", name):
        return [min(item, 2) for item in values]
    if re.search(r"image_size|img_size|input_size", name):
        return [min(item, 32) for item in values]
    if re.search(r"window|attention_window", name):
        return [min(item, 4) for item in values]
    if re.search(r"kernel|stride|dilation|rate|ratio|patch|_ids?$|index|pad|group|layer|stage|merge|pool|expan", name):
        return values
    if max(values) > 64 and re.search(r"size|dim|channels|width|filters|hidden|planes|feat", name):
        by = 2 ** math.ceil(math.log2(max(values) / 64))
        return [max(8, item // by // 8 * 8) if item >= 8 else item for item in values]
    return values


_TOKENS: dict[str, int] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _token(name: str, value: Any) -> Any:
    """A number of its own, below the random ids, for every special token."""
    if isinstance(value, list | tuple):
        return type(value)(_token(f"{name}{i}" if i else name, item) for i, item in enumerate(value))
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        return value
    alias = name.replace("_index", "_id")
    return _TOKENS.setdefault(alias, 3 + len(_TOKENS) % (special.FIRST_ID - 4))


def shrunk(config: PreTrainedConfig, rule: Callable[[str, Any], Any], over: Mapping[str, Any] = _NOTHING) -> PreTrainedConfig:
    """The config of the same class with small sizes; what the class derives from other fields is derived again.

    `over`: fields that are set in any case, with dots where they are a sub-config's.
    """
    kind = type(config)
    over = {**special.CONFIGS.get(kind.model_type, {}), **over}
    changed: dict[str, Any] = {}
    try:
        fresh = kind()
    except Exception:  # noqa: BLE001  some need arguments
        fresh = None
    for field in dataclasses.fields(kind):
        value = read(config, field.name)
        if isinstance(value, PreTrainedConfig):
            below = {name.partition(".")[2]: item for name, item in over.items() if name.startswith(f"{field.name}.")}
            changed[field.name] = shrunk(value, rule, below)
            continue
        if value is None and isinstance(field.default, int):  # it differs from layer to layer
            value = field.default
        if isinstance(value, dict):
            if field.name == "rope_parameters" and getattr(rule, "sections", False):
                value = {"mrope_section": [16, 24, 24], **value}
            sections = _sections(value)
            if sections is not value or not _equal(value, read(fresh, field.name)):
                changed[field.name] = sections
            continue
        derived = field.default is None and fresh is not None and _equal(read(fresh, field.name), value)
        if value is None and isinstance(rule, Filled) and field.name in _FILLED:
            changed[field.name] = _FILLED[field.name]
            continue
        if value is None or isinstance(value, bool | str) or derived or field.name in _KEPT:
            if not derived and not _equal(value, field.default):
                changed[field.name] = value
            continue
        token = re.search(r"token_ids?$|token_index$|tokens?_id$|_token$", field.name)
        small = _token(field.name, value) if token else rule(field.name, value)
        changed[field.name] = small
    old, layers = read(config, "num_hidden_layers"), changed.get("num_hidden_layers")
    for name, value in changed.items():
        if isinstance(value, list | tuple) and isinstance(old, int) and isinstance(layers, int) and len(value) == old:
            changed[name] = type(value)(_few(list(value), layers))
    changed |= _taps(config, fresh, changed)
    if {"kv_lora_rank", "qk_nope_head_dim"} & changed.keys() and "num_key_value_heads" in changed:
        changed["num_key_value_heads"] = changed["num_attention_heads"]  # latent attention has no fewer
    return kind(**changed | {name: value for name, value in over.items() if "." not in name})


def _taps(config: Any, fresh: Any, changed: dict[str, Any]) -> dict[str, Any]:
    """The stages that a backbone gives away: the same ones, or the last ones where there are fewer layers now."""
    given = read(config, "out_features")
    if not given or (_equal(given, read(fresh, "out_features")) and len(given) == 1):
        return {}
    layers = changed.get("num_hidden_layers")
    if not isinstance(layers, int):
        return {"out_features": list(given)}
    return {"out_indices": list(range(layers + 1))[-len(given) :]} if len(given) <= layers else {}


def _sections(value: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters whose sections fit the small heads."""
    if not isinstance(value.get("mrope_section"), list | tuple):
        return value
    half = int(HEAD * value.get("partial_rotary_factor", 1.0)) // 2
    return {**value, "mrope_section": [half - 2 * (half // 3), half // 3, half // 3] if half > 2 else [1, half - 1, 0]}


_KEPT = {"dtype", "id2label", "label2id", "problem_type", "transformers_version", "chunk_size_feed_forward", "architectures"}


def _few(kinds: list[Any], count: int) -> list[Any]:
    """`count` layers with as many different kinds as fit."""
    different = [kind for i, kind in enumerate(kinds) if kind not in kinds[:i]]
    return (different + kinds)[:count]


def read(config: Any, name: str) -> Any:
    """A field's value; None where it is not there or differs from layer to layer."""
    try:
        return getattr(config, name, None)
    except Exception:  # noqa: BLE001
        return None


def _equal(one: Any, two: Any) -> bool:
    try:
        return bool(one == two)
    except Exception:  # noqa: BLE001
        return False


# Building


@dataclass
class Tiny:
    """A model that runs on these inputs, and what is given to `transform` besides."""

    model: nn.Module
    inputs: Any
    rule: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def build(kind: str) -> Tiny:
    """A tiny model of this type with inputs that it runs on; CannotBuild with the last errors."""
    errors: list[str] = []
    classes = model_classes(kind)
    if not classes:
        raise CannotBuild(f"{CONFIG_MAPPING[kind].__name__} has no model class of its own in transformers")
    if all(inspect.getattr_static(one, "forward", None) is nn.Module.forward for one in classes):
        raise CannotBuild(f"{classes[0].__name__} has no forward")
    for rule in RULES:
        for model_class in classes[:4]:
            try:
                model = _instance(kind, model_class, rule)
            except Exception as error:  # noqa: BLE001  anything may be wrong with invented sizes
                errors.append(f"{model_class.__name__}, {rule}: {_said(error)}")
                continue
            try:
                inputs = runnable(model, kind)
                return Tiny(model, inputs, f"{rule}{lively(model, inputs)}", special.OPTIONS.get(kind, {}))
            except Exception as error:  # noqa: BLE001
                errors.append(f"{model_class.__name__}, {rule}, forward: {_said(error)}")
    first = [error for error in errors if "forward" in error] or errors
    raise CannotBuild(first[0])


def _instance(kind: str, model_class: Any, rule: Any) -> nn.Module:
    config = shrunk(CONFIG_MAPPING[kind](), rule)
    for _ in range(6):
        try:
            with torch.device("meta"):
                model_class(config)
            break
        except AttributeError as error:
            if not _given(config, str(error)):
                raise
    for name in ("_attn_implementation", "_experts_implementation"):
        if kind in special.EAGER:
            setattr(config, name, "eager")
    with torch.device("meta"):
        count = sum(p.numel() for p in model_class(config).parameters())
    if count > LARGEST:
        raise CannotBuild(f"{count / 1e6:.0f} M parameters")
    torch.manual_seed(0)
    model = model_class(config)
    return liven(model.float().eval())


_MISSING = {
    "num_key_value_heads": 2, "num_attention_heads": HEADS, "hidden_size": WIDTH, "rope_theta": 1e4, "initializer_range": 0.02,
    "dropout_rate": 0.0, "shared_expert_intermediate_size": 16, "intermediate_size": 2 * WIDTH, "max_position_embeddings": 128,
    "vision_start_token_id": 13, "vision_end_token_id": 14, "attention_dropout": 0.0, "num_hidden_layers": 2, "embed_dim": WIDTH,
    "spatial_merge_size": 2,
}  # fmt: skip


def _given(config: Any, message: str) -> bool:
    """Whether an attribute that a config lacks could be given to it."""
    found = re.search(r"'(\w+)' object has no attribute '(\w+)'", message)
    if found is None or found[2] not in _MISSING:
        return False
    parts, done = [config], False
    for part in parts:
        parts += [value for value in vars(part).values() if isinstance(value, PreTrainedConfig)]
        if type(part).__name__ == found[1] and found[2] not in vars(part):
            setattr(part, found[2], _MISSING[found[2]])
            done = True
    return done


def liven(model: nn.Module) -> nn.Module:
    """The model without weights of zeros or nothing, and without gates and layer scales that shut a branch."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                continue
            if not bool(torch.isfinite(parameter).all()) or (parameter.ndim >= 2 and float(parameter.double().std()) < 1e-3):
                nn.init.normal_(parameter, std=0.05)
            elif parameter.ndim < 2 and not name.endswith("bias") and float(parameter.abs().amax()) < 1e-2:
                parameter.fill_(0.5)
    return model


def lively(model: nn.Module, example: Any) -> str:
    """What was done to the model so that its weights move its outputs; CannotBuild where nothing could be judged.

    In deep stacks with first values all numbers vanish: then norms take the statistics of a batch, then weights grow.
    """
    inputs = Inputs.of(example)
    for done, mend in (("", None), (", normed", _normed), *[(", grown", _grown)] * 3):
        if mend:
            mend(model, inputs)
        if _responds(model, inputs):
            return done
    raise CannotBuild(f"no weight of the {type(model).__name__} has an effect on what it gives")


def _matrices(model: nn.Module) -> list[Tensor]:
    return [p.data for p in model.parameters() if p.ndim >= 2 and p.is_floating_point()]


def _responds(model: nn.Module, inputs: Inputs) -> bool:
    before, kept = outputs(model, inputs), [weight.clone() for weight in _matrices(model)]
    for weight in _matrices(model):
        weight += 0.3 * float(weight.std()) * torch.randn_like(weight)
    try:
        found = check.difference(outputs(model, inputs), before)
    except SaracError:  # another form: a size that follows from the numbers
        return True
    finally:
        for weight, value in zip(_matrices(model), kept, strict=True):
            weight.copy_(value)
    return not found.identical and (not found.finite or found.error > LEAST)


def _normed(model: nn.Module, inputs: Inputs) -> None:
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    with torch.no_grad():
        model(*copy.deepcopy(inputs.args), **copy.deepcopy(dict(inputs.kwargs)))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum


def _grown(model: nn.Module, _: Inputs) -> None:
    for weight in _matrices(model):
        weight *= 3


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"


def runnable(model: nn.Module, kind: str) -> dict[str, Any]:
    """The first candidate of inputs on which the model runs and gives finite numbers."""
    errors = []
    for candidate in candidates(model, kind):
        inputs = candidate
        for _ in range(4):
            try:
                torch.manual_seed(7)
                with torch.no_grad(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found = model(**_typed(model, inputs))
                if any(bool(tensor.isnan().any()) for _, tensor in check.leaves(found) if tensor.is_floating_point()):
                    raise ValueError("the model gives NaN")
                return _typed(model, inputs)
            except Exception as error:  # noqa: BLE001  that is how it is found out
                errors.append(error)
                if isinstance(error, AttributeError) and _given(model.config, str(error)):
                    continue
                again = _mended(model, inputs, str(error))
                if again is None or all(again[name] is inputs.get(name) for name in again):
                    break
                inputs = again
    raise errors[0] if "match" not in str(errors[0]) else errors[min(1, len(errors) - 1)]


def _typed(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs with the type of every token beside the tokens, where the model wants it."""
    if "mm_token_type_ids" not in inspect.signature(model.forward).parameters or "input_ids" not in inputs:
        return inputs
    ids = inputs["input_ids"]
    types = torch.zeros_like(ids)
    for number, name in enumerate(("image_token_id", "video_token_id"), 1):
        token = read(model.config, name)
        types[ids == (-1 if token is None else token)] = number
    return {**inputs, "mm_token_type_ids": types}


def _mended(model: nn.Module, inputs: dict[str, Any], message: str) -> dict[str, Any] | None:
    """The inputs with the argument that the model misses, or with as many placeholders as it has features, where it says so."""
    config: Any = model.config
    for name in re.findall(r"[a-z_]{4,}", message):  # it says which argument it misses
        if name in inspect.signature(model.forward).parameters and name not in inputs:
            return {**inputs, name: _by_name(config, name)}
    found = re.search(r"(image|video|audio|speech|multimodal)?.*tokens.*?(\d+).*features\D*(\d+)", message, re.I | re.S)
    if not found or "input_ids" not in inputs or "match" not in message:
        return None
    kind, wanted = (found[1] or "image").lower(), int(found[3])
    names = [
        n
        for n in (f"{kind}_token_id", f"{kind}_token_index", "image_token_id", "media_token_id", "audio_token_id")
        if hasattr(config, n)
    ]
    if not names or wanted % BATCH:
        wanted = wanted // WIDTH if wanted % BATCH else wanted
    if not names or wanted % BATCH or wanted <= 0:
        return None
    token = getattr(config, names[0])
    if int(found[2]) and wanted > int(found[2]) * 4 and wanted % WIDTH == 0:
        wanted //= WIDTH
    each = wanted // BATCH
    old = inputs["input_ids"]
    rest = old[:, (old[0] == token).sum() :] if bool((old == token).any()) else old
    ids = torch.cat([torch.full((BATCH, each), int(token)), rest], 1)
    return {**inputs, "input_ids": ids, **{n: torch.ones_like(ids) for n in ("attention_mask",) if n in inputs}}


# Inputs


def find(config: Any, *names: str, default: Any = None) -> Any:
    """The first of these fields that the config or a sub-config has."""
    stack = [config]
    while stack:
        now = stack.pop(0)
        for name in names:
            value = read(now, name)
            if value is not None and not isinstance(value, PreTrainedConfig | dict):
                return value
        stack += [value for value in vars(now).values() if isinstance(value, PreTrainedConfig)]
    return default


def ids(config: Any, tokens: int = TOKENS, batch: int = BATCH) -> Tensor:
    top = find(config, "vocab_size", "src_vocab_size", "n_words", default=VOCABULARY)
    top = top if isinstance(top, int) else VOCABULARY
    return torch.randint(min(special.FIRST_ID, top // 2), top, (batch, tokens))


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, dict):
        return int(size["height"]), int(size["width"])
    return (int(size[0]), int(size[-1])) if isinstance(size, list | tuple) else (int(size), int(size))


def _images(config: Any, size: int | None = None) -> Tensor:
    height, width = _pair(size or find(config, "image_size", "img_size", "input_size", default=64))
    channels = find(config, "num_channels", "in_channels", "in_chans", default=3)
    return torch.randn(BATCH, channels if isinstance(channels, int) else 3, height, width)


def candidates(model: nn.Module, kind: str) -> Iterator[dict[str, Any]]:
    """Inputs to try, the most complete first."""
    torch.manual_seed(1)
    config = model.config
    names = dict(inspect.signature(model.forward).parameters)
    extra = {"use_cache": False} if "use_cache" in names else {}
    given = special.INPUTS.get(kind)
    if given is not None:
        yield {**extra, **given(config)}
        return
    required = [n for n, p in names.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    text = _text(config, names)
    for vision in _vision(config, names):
        for audio in _audio(config, names):
            rest = _rest(config, names, required, {**text, **vision, **audio})
            yield {**extra, **text, **vision, **audio, **rest}
            if text and (vision or audio):
                yield {**extra, **vision, **audio, **_rest(config, names, required, {**vision, **audio})}
    if text:
        yield {**extra, **text, **_rest(config, names, required, text)}


def _text(config: Any, names: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "input_ids" in names:
        found["input_ids"] = ids(config)
        if "attention_mask" in names:
            found["attention_mask"] = torch.ones(BATCH, TOKENS, dtype=torch.long)
    if "decoder_input_ids" in names:
        found["decoder_input_ids"] = ids(config, 6)
    if "bbox" in names:
        low = torch.randint(0, 50, (BATCH, TOKENS, 2))
        found["bbox"] = torch.cat([low, low + torch.randint(0, 50, (BATCH, TOKENS, 2))], -1)
    return found


def _vision(config: Any, names: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if "pixel_values" not in names:
        if "pixel_values_videos" in names:
            images = _images(config)
            yield {"pixel_values_videos": torch.stack([images] * (find(config, "num_frames", "frames_per_clip", default=2)), 1)}
        yield {}
        return
    images = _images(config)
    if "image_grid_thw" in names or "grid_thw" in names:
        yield _patches(config, "image_grid_thw" if "image_grid_thw" in names else "grid_thw")
    if "pixel_attention_mask" in names and "spatial_shapes" in names:
        patch = find(config, "patch_size", default=8)
        yield {
            "pixel_values": torch.randn(BATCH, 16, 3 * patch * patch),
            "pixel_attention_mask": torch.ones(BATCH, 16, dtype=torch.long),
            "spatial_shapes": torch.tensor([[4, 4]] * BATCH),
        }
    yield {"pixel_values": images}
    frames = find(config, "num_frames", default=2)
    yield {"pixel_values": images.unsqueeze(1).repeat(1, frames if isinstance(frames, int) else 2, 1, 1, 1)}
    yield {"pixel_values": images[:, None]}
    for size in (64, 128, 224):
        yield {"pixel_values": _images(config, size)}
    yield {"pixel_values": torch.randn(BATCH, 1, 32, 32)}


def _patches(config: Any, grid: str) -> dict[str, Any]:
    patch, merge = find(config, "patch_size", default=8), find(config, "spatial_merge_size", "merge_size", default=2)
    patch, merge = _pair(patch)[0], _pair(merge)[0]
    time, channels = (
        find(config, "temporal_patch_size", default=1),
        find(config, "in_channels", "num_channels", "in_chans", default=3),
    )
    side = 2 * merge
    pixels = torch.randn(BATCH * side * side, channels * time * patch * patch)
    return {"pixel_values": pixels, grid: torch.tensor([[1, side, side]] * BATCH)}


def _audio(config: Any, names: dict[str, Any]) -> Iterator[dict[str, Any]]:
    mels = find(config, "num_mel_bins", "feature_size", "input_feat_per_channel", "n_mels", "num_mels", "input_dim", default=80)
    if "input_features" in names:
        for frames in dict.fromkeys((2 * find(config, "max_source_positions", default=32), 64, 128)):
            yield {"input_features": torch.randn(BATCH, mels, frames)} | _audio_masks(names, frames)
            yield {"input_features": torch.randn(BATCH, frames, mels)} | _audio_masks(names, frames)
            yield {"input_features": torch.randn(BATCH, 1, frames, mels)}
            yield {"input_features": torch.randn(BATCH, 1, mels, frames)}
        return
    if "input_values" in names:
        yield {"input_values": torch.randn(BATCH, 4000)}
        yield {"input_values": torch.randn(BATCH, 1, 4000)}
        yield {"input_values": torch.randn(BATCH, find(config, "max_length", default=32), mels)}
        yield {"input_values": torch.randn(BATCH, 1, 64, mels)}
        yield {"input_values": torch.randn(BATCH, 1, 7680)}
        yield {"input_values": ids(config)}
        return
    if "audio_values" in names:
        yield {"audio_values": torch.randn(BATCH, 1, 4000)}
    yield {}


def _audio_masks(names: dict[str, Any], frames: int) -> dict[str, Any]:
    masks = ("feature_attention_mask", "input_features_mask", "audio_attention_mask")
    return {name: torch.ones(BATCH, frames, dtype=torch.long) for name in masks if name in names}


def _rest(config: Any, names: dict[str, Any], required: list[str], have: dict[str, Any]) -> dict[str, Any]:
    """What `forward` needs besides: by name, a hidden state where nothing better is known."""
    found: dict[str, Any] = {}
    wanted = [name for name in required if name not in have]
    if not have and "inputs_embeds" in names and not wanted:
        wanted = ["inputs_embeds"]
    if not have and not wanted and names:
        wanted = [next(iter(names))]
    if "grid_thw" in names and "pixel_values" not in have:
        patches = _patches(config, "grid_thw")
        found |= {wanted[0] if wanted else next(iter(names)): patches["pixel_values"], "grid_thw": patches["grid_thw"]}
    for name in wanted:
        found.setdefault(name, _by_name(config, name))
    if "task_inputs" in names:
        found["task_inputs"] = ids(config)
    return found


def _by_name(config: Any, name: str) -> Any:
    width = find(config, "hidden_size", "d_model", "embed_dim", "dim", "n_embd", default=WIDTH)
    width = width if isinstance(width, int) else width[0]
    if "mask" in name:
        return torch.ones(BATCH, TOKENS, dtype=torch.long)
    if name == "past_values":
        return torch.rand(
            BATCH,
            find(config, "context_length", default=TOKENS) + max(find(config, "lags_sequence", default=[0])),
            find(config, "num_input_channels", default=1),
        ).squeeze(-1)
    if name == "cu_seqlens":
        return torch.tensor([0, TOKENS])
    if name.endswith("_ids") or name in ("tokens", "codes", "audio_codes"):
        return ids(config)
    if "pixel" in name or "image" in name:
        return _images(config)
    if "timestep" in name:
        return torch.rand(BATCH)
    if "grid_thw" in name:
        return torch.tensor([[1, 4, 4]] * BATCH)
    return torch.randn(BATCH, TOKENS, width)
