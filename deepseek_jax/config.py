"""The one schema of a run, read by both siblings; imports neither JAX nor PyTorch.

A config is a YAML file (a path, or the name of a preset in `configs/`) plus overrides of the form
`train.steps=200`. Fields of `ModelConfig` have the names that Hugging Face's `deepseek_v3` gives
them. Whatever is wrong raises `ConfigError`, whose text is one line: the field, what it holds and
what would be right. Quantities derived from these fields (YaRN's scale, head sizes) are computed in
each sibling, so that neither inherits the other's mistake.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deepseek_jax.errors import UserError

PRECISIONS = ("float64", "float32", "bfloat16", "fp8")
REMAT_CHOICES = ("none", "products", "full")
GROUPED_MATMULS = ("auto", "reference", "blocked", "megablox")
MOMENT_DTYPES = ("float32", "bfloat16")
EXCHANGES = ("auto", "rounds", "ragged")
MESH_AXES = ("pipe", "data", "fsdp", "expert")
"""Axes of the device mesh, slowest links first: neighbours along `expert` are the nearest devices."""
PHASE_SHAPES = ("constant", "linear", "cosine")


class ConfigError(UserError):
    """A config that cannot work; the message is one line that names the field and the remedy."""


@dataclass(frozen=True)
class RopeScaling:
    """YaRN (report 4.3): how rotary frequencies stretch beyond the length first trained on."""

    factor: float = 40.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """The architecture, in Hugging Face's field names, and how it is computed (the last group)."""

    vocab_size: int = 129280
    hidden_size: int = 7168
    num_hidden_layers: int = 61
    first_k_dense_replace: int = 3
    """How many of the first layers have a dense feed-forward instead of experts."""
    intermediate_size: int = 18432
    """Width of the dense feed-forward."""

    num_attention_heads: int = 128
    q_lora_rank: Optional[int] = 1536
    """Rank of the compressed query; null projects queries directly."""
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128

    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 2048
    """Width of one expert; the shared experts act as one of n_shared_experts times this width."""
    n_group: int = 8
    topk_group: int = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5

    num_nextn_predict_layers: int = 1
    """Depth of multi-token prediction: how many tokens beyond the next are predicted, >= 0."""
    mtp_hidden_after_norm: bool = True
    """Whether an MTP module reads the state before it after that state's final norm (report: open)."""

    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Optional[RopeScaling] = None
    max_position_embeddings: int = 4096
    initializer_range: float = 0.006
    tie_word_embeddings: bool = False

    precision: str = "float32"
    """Arithmetic of the products with weights; parameters stay float32 (float64 if so chosen). `fp8` (report 3.3)
    leaves embedding, head, routers and the attention core in bfloat16."""
    remat: str = "products"
    """What the backward pass recomputes: nothing (`none`), all but products with weights and attention (`products`),
    or every layer (`full`)."""
    grouped_matmul: str = "auto"
    """Implementation of the routed experts' product; `auto` takes the platform's best."""


@dataclass(frozen=True)
class DataConfig:
    """Which text, and how it becomes tokens."""

    input: list[str] = field(default_factory=list)
    """Text, .jsonl or .parquet files (the latter with a `text` column), directories or globs."""
    tokenizer: Optional[str] = None
    """A tokenizer.json; null trains a byte-level BPE of model.vocab_size on the training text."""
    held_out_fraction: float = 0.02
    seed: int = 0
    """Order of the documents and of the training sequences."""


@dataclass(frozen=True)
class Phase:
    """One stretch of a schedule: reach `to` by `until` tokens, along `shape` from the value before."""

    to: float = 0.0
    until: Optional[int] = None
    """Tokens since the start of the run; null means its end."""
    shape: str = "constant"


@dataclass(frozen=True)
class TrainConfig:
    """Optimization (report 4.2). Schedules run on tokens, so a growing batch does not distort them."""

    steps: int = 1000
    sequence_length: int = 4096
    batch_size: int = 16
    """Sequences per optimizer step, over all devices and accumulation steps."""
    batch_size_start: Optional[int] = None
    """Where the batch starts, growing by multiples of itself over batch_size_ramp_tokens."""
    batch_size_ramp_tokens: int = 0
    gradient_accumulation_steps: int = 1

    learning_rate: float = 2.2e-4
    warmup_steps: int = 0
    learning_rate_decay: list[Phase] = field(default_factory=lambda: [Phase(0.1, shape="cosine")])
    """After the warm-up; `to` is a multiple of learning_rate."""
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-8
    adam_moment_dtype: str = "float32"
    """How both of Adam's moments are kept between steps: float32 (or wider, as the parameters), or bfloat16 (report
    3.3.3), which halves their memory. bfloat16 rounds to 1/256, so that beta1 and beta2 should stay below 0.99."""
    weight_decay: float = 0.1
    gradient_clip: float = 1.0

    bias_update_speed: list[Phase] = field(default_factory=lambda: [Phase(1e-3)])
    """Gamma of the auxiliary-loss-free balancing (report 2.1.2)."""
    sequence_balance_weight: float = 1e-4
    """Alpha of the sequence-wise balance loss (report 2.1.2)."""
    mtp_loss_weight: list[Phase] = field(default_factory=lambda: [Phase(0.3)])
    """Lambda of the multi-token-prediction loss (report 2.2)."""
    loss_chunk_tokens: int = 1024
    """Tokens whose logits exist at one time."""

    seed: int = 0
    eval_every: int = 100
    eval_sequences: int = 64
    checkpoint_every: int = 200
    keep_checkpoints: int = 2


@dataclass(frozen=True)
class ParallelConfig:
    """How a run is divided over devices, whose number is the product of the four axes; one axis may be -1, the rest."""

    pipe: int = 1
    """Stages of the stack of mixture-of-experts layers."""
    data: int = -1
    """Replicas that divide the batch, the master weights and Adam's moments (ZeRO-1)."""
    fsdp: int = 1
    """Replicas that also divide the weights themselves, gathered layer by layer (ZeRO-3)."""
    expert: int = 1
    """Replicas that divide the routed experts; tokens travel to them."""

    pipe_interleave: int = 1
    """Chunks of layers in each pipeline stage: more shrink the bubble and pass activations on oftener."""
    microbatch_size: int = 1
    """Sequences that a pipeline stage computes at once."""
    exchange_parts: int = 1
    """Parts of a device's tokens that travel to experts one after the other. There is room for all tokens of all devices
    along `expert` to meet on one: that many times fewer, and messages that much smaller."""
    exchange: str = "auto"
    """How tokens travel to experts: `ragged` (TPU, GPU) or in `rounds` of equal parts (anywhere); `auto` chooses."""


@dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    run_dir: str = "runs/default"


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a preset or YAML file, apply `a.b=c` overrides, check it whole.

    Args:
        source: a path to a YAML file, or a preset's name such as `quickstart`.
        overrides: command-line words of the form `section.field=value`.

    Raises:
        ConfigError: one line naming the file or field at fault.
    """
    path = find_config(source)
    return from_mapping(_read_yaml(path), overrides, where=str(path))


def from_mapping(content: Mapping[str, Any], overrides: Sequence[str] = (), where: str = "config") -> Config:
    """Build a checked `Config` from nested mappings; see `load_config`."""
    content = OmegaConf.to_container(OmegaConf.create(dict(content)))
    for override in overrides:
        _apply_override(content, override)
    content = _canonical(Config, content, "", where)
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), content))
    except OmegaConfBaseException as error:
        name = getattr(error, "full_key", None) or "config"
        raise ConfigError(f"{where}: {name}: {str(error).splitlines()[0]}") from None
    validate(config)
    return config


def to_yaml(config: Config) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal `Config`."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def presets() -> dict[str, Path]:
    """Names of the presets that come with the package, and their files."""
    package = Path(__file__).resolve().parent
    folder = next((d for d in (package / "configs", package.parent / "configs") if d.is_dir()), package)
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_config(source: str | Path) -> Path:
    """The file that `source`, a path or a preset's name, stands for."""
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        raise ConfigError(f"config {path} is a directory; give a .yaml file in it")
    named = presets()
    # `configs/quickstart.yaml` names the preset from any working directory.
    is_name = path.parent in (Path("."), Path("configs")) and path.suffix in ("", ".yaml")
    if is_name and path.stem in named:
        return named[path.stem]
    raise ConfigError(f"no config {source}: give a .yaml file or one of the presets {', '.join(named)}")


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not YAML: {getattr(error, 'problem', None) or 'unreadable'}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {getattr(error, 'strerror', None) or error}") from None
    if content is not None and not isinstance(content, dict):
        raise ConfigError(f"{path}: holds a {type(content).__name__}; sections such as `model:` are expected")
    return content or {}


def _apply_override(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: write it as section.field=value")
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not YAML; quote it") from None
    *sections, name = key.split(".")
    node = content
    for depth, section in enumerate(sections):
        if node.get(section) is None:
            node[section] = {}
        node = node[section]
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {'.'.join(sections[: depth + 1])} has no fields")
    node[name] = value


def _canonical(kind: Any, value: Any, name: str, where: str) -> Any:
    """`value` with shorthands written out and every key and type checked against the schema `kind`.

    A single value stands for a list of one, and a number for a `Phase` that is constant.
    """
    optional = typing.get_origin(kind) in (typing.Union, types.UnionType)
    if optional:
        if value is None:
            return None
        kind = next(arg for arg in typing.get_args(kind) if arg is not type(None))
    if dataclasses.is_dataclass(kind):
        if kind is Phase and _is_number(value):
            return {"to": float(value)}
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: {name or 'config'} is {value!r}; it has fields: {_field_names(kind)}")
        hints = typing.get_type_hints(kind)
        for key in value:
            if key not in hints:
                raise ConfigError(f"{where}: unknown field {_join(name, key)}; {_nearest(key, kind)}")
        return {key: _canonical(hints[key], item, _join(name, key), where) for key, item in value.items()}
    if typing.get_origin(kind) is list:
        items = value if isinstance(value, list) else [value]
        (item_kind,) = typing.get_args(kind)
        return [_canonical(item_kind, item, f"{name}.{i}", where) for i, item in enumerate(items)]
    return _scalar(kind, value, name, where)


def _scalar(kind: type, value: Any, name: str, where: str) -> Any:
    if kind in (int, float) and isinstance(value, str):
        try:  # YAML reads 1e-3 as text, for want of a dot.
            value = float(value)
        except ValueError:
            pass
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if kind is float and _is_number(value):
        return float(value)
    if kind is str and _is_number(value):
        return str(value)
    if type(value) is not kind:
        expected = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
        raise ConfigError(f"{where}: {name} is {value!r}; it must be {expected}")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _join(section: str, key: Any) -> str:
    return f"{section}.{key}" if section else str(key)


def _field_names(kind: Any) -> str:
    return ", ".join(f.name for f in dataclasses.fields(kind))


def _nearest(key: Any, kind: Any) -> str:
    close = difflib.get_close_matches(str(key), [f.name for f in dataclasses.fields(kind)], n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"the fields here are {_field_names(kind)}"


def validate(config: Config) -> None:
    """Check values and that sizes can work together.

    Raises:
        ConfigError: at the first field that cannot work.
    """
    _validate_model(config.model)
    _validate_data(config.data)
    _validate_train(config.train, config.model)
    _validate_parallel(config.parallel)


def _require(condition: bool, name: str, value: Any, remedy: str) -> None:
    if not condition:
        raise ConfigError(f"{name}={value}: {remedy}")


def _choice(name: str, value: str, choices: Sequence[str]) -> None:
    _require(value in choices, name, value, f"choose one of {', '.join(choices)}")


def _at_least(section: str, config: Any, minimum: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value is None or value >= minimum, f"{section}.{name}", value, f"must be at least {minimum}")


def _above_zero(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value > 0, f"{section}.{name}", value, "must be greater than 0")


def _validate_model(m: ModelConfig) -> None:
    _at_least(
        "model", m, 1, "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads",
        "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "n_routed_experts", "n_shared_experts",
        "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group", "max_position_embeddings",
    )  # fmt: skip
    _at_least("model", m, 2, "qk_rope_head_dim")
    _at_least("model", m, 0, "num_nextn_predict_layers", "first_k_dense_replace")
    _above_zero("model", m, "rms_norm_eps", "rope_theta", "initializer_range", "routed_scaling_factor")
    _require(m.qk_rope_head_dim % 2 == 0, "model.qk_rope_head_dim", m.qk_rope_head_dim,
             "must be even, for RoPE turns pairs")  # fmt: skip
    _require(m.first_k_dense_replace <= m.num_hidden_layers, "model.first_k_dense_replace", m.first_k_dense_replace,
             f"must be at most num_hidden_layers={m.num_hidden_layers}")  # fmt: skip
    experts, groups = m.n_routed_experts, m.n_group
    divisors = [n for n in range(1, experts + 1) if experts % n == 0]
    _require(experts % groups == 0, "model.n_group", groups,
             f"must divide n_routed_experts={experts}; nearest {min(divisors, key=lambda n: abs(n - groups))}")  # fmt: skip
    _require(m.topk_group <= groups, "model.topk_group", m.topk_group, f"must be at most n_group={groups}")
    _require(m.topk_group == groups or experts // groups >= 2, "model.n_group", groups,
             f"a group is scored by its two best experts: at most {experts // 2} groups of {experts} experts")  # fmt: skip
    reachable = experts // groups * m.topk_group
    _require(m.num_experts_per_tok <= reachable, "model.num_experts_per_tok", m.num_experts_per_tok,
             f"must be at most {reachable}, the experts in topk_group={m.topk_group} of {groups} groups")  # fmt: skip
    if m.rope_scaling is not None:
        _at_least("model.rope_scaling", m.rope_scaling, 1, "factor", "original_max_position_embeddings")
        _above_zero("model.rope_scaling", m.rope_scaling, "beta_fast", "beta_slow")
        _at_least("model.rope_scaling", m.rope_scaling, 0, "mscale", "mscale_all_dim")
    _choice("model.precision", m.precision, PRECISIONS)
    _choice("model.remat", m.remat, REMAT_CHOICES)
    _choice("model.grouped_matmul", m.grouped_matmul, GROUPED_MATMULS)


def _validate_data(d: DataConfig) -> None:
    _require(0 < d.held_out_fraction < 1, "data.held_out_fraction", d.held_out_fraction, "must be between 0 and 1")
    _at_least("data", d, 0, "seed")


def _validate_train(t: TrainConfig, m: ModelConfig) -> None:
    _at_least("train", t, 1, "steps", "sequence_length", "batch_size", "batch_size_start",
              "gradient_accumulation_steps", "loss_chunk_tokens", "eval_every", "eval_sequences",
              "checkpoint_every", "keep_checkpoints")  # fmt: skip
    _at_least("train", t, 0, "warmup_steps", "weight_decay", "sequence_balance_weight", "batch_size_ramp_tokens", "seed")
    _above_zero("train", t, "learning_rate", "adam_eps", "gradient_clip")
    _choice("train.adam_moment_dtype", t.adam_moment_dtype, MOMENT_DTYPES)
    for name in ("beta1", "beta2"):
        _require(0 <= getattr(t, name) < 1, f"train.{name}", getattr(t, name), "must be in [0, 1)")
    _require(t.sequence_length <= m.max_position_embeddings, "train.sequence_length", t.sequence_length,
             f"must be at most model.max_position_embeddings={m.max_position_embeddings}")  # fmt: skip
    accumulation = t.gradient_accumulation_steps
    for name in ("batch_size", "batch_size_start"):
        size = getattr(t, name)
        _require(size is None or size % accumulation == 0, f"train.{name}", size,
                 f"must be a multiple of gradient_accumulation_steps={accumulation}")  # fmt: skip
    start = t.batch_size_start
    _require(start is None or t.batch_size % start == 0, "train.batch_size_start", start,
             f"must divide batch_size={t.batch_size}")  # fmt: skip
    for name in ("learning_rate_decay", "bias_update_speed", "mtp_loss_weight"):
        _validate_phases(f"train.{name}", getattr(t, name))


def _validate_parallel(p: ParallelConfig) -> None:
    """What can be said without the devices; `parallel.mesh.resolve` says the rest."""
    sizes = {axis: getattr(p, axis) for axis in MESH_AXES}
    for axis, size in sizes.items():
        _require(size == -1 or size >= 1, f"parallel.{axis}", size, "must be at least 1, or -1 for what remains")
    open_axes = [f"parallel.{axis}" for axis, size in sizes.items() if size == -1]
    _require(len(open_axes) <= 1, " and ".join(open_axes), -1, "only one axis may be -1; give the other a size")
    _at_least("parallel", p, 1, "pipe_interleave", "microbatch_size", "exchange_parts")
    _choice("parallel.exchange", p.exchange, EXCHANGES)


def _validate_phases(name: str, phases: Sequence[Phase]) -> None:
    _require(len(phases) > 0, name, "[]", "give at least one phase, such as [{to: 0.1}]")
    before = 0
    for i, phase in enumerate(phases):
        _choice(f"{name}.{i}.shape", phase.shape, PHASE_SHAPES)
        _require(phase.to >= 0, f"{name}.{i}.to", phase.to, "must be at least 0")
        if phase.until is None:
            _require(i == len(phases) - 1, f"{name}.{i}.until", "null", "only the last phase may be open")
        else:
            _require(phase.until > before, f"{name}.{i}.until", phase.until, f"must be greater than {before} tokens")
            before = phase.until
