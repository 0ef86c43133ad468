"""Whether a config's values can work, and work together: what can be said without a device."""

import re
from collections.abc import Sequence
from typing import Any

from deepseek_jax.config.schema import (
    ATTENTIONS,
    DATA_FORMATS,
    EXCHANGES,
    FEED_FORWARDS,
    GROUPED_MATMULS,
    HELD_OUT,
    MESH_AXES,
    MOMENT_DTYPES,
    MTP_FORMS,
    OPTIMIZERS,
    PHASE_SHAPES,
    PRECISIONS,
    REMAT_CHOICES,
    ROPE_TYPES,
    SCORING_FUNCS,
    TOPK_METHODS,
    Config,
    ConfigError,
    DataConfig,
    LoraConfig,
    ModelConfig,
    ParallelConfig,
    Phase,
    PrepareConfig,
    TrainConfig,
)


def validate(config: Config) -> None:
    """Check values and that sizes can work together.

    Raises:
        ConfigError: at the first field that cannot work.
    """
    _validate_model(config.model)
    _validate_data(config.data)
    _validate_train(config.train, config.model)
    _validate_lora(config.lora, config.train)
    _validate_parallel(config.parallel)
    _validate_prepare(config.prepare)


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
        "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "n_routed_experts",
        "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group", "max_position_embeddings", "moe_layer_freq",
    )  # fmt: skip
    _at_least("model", m, 2, "qk_rope_head_dim")
    _at_least("model", m, 0, "num_nextn_predict_layers", "first_k_dense_replace", "n_shared_experts")
    _above_zero("model", m, "rms_norm_eps", "rope_theta", "initializer_range", "routed_scaling_factor")
    _require(m.qk_rope_head_dim % 2 == 0, "model.qk_rope_head_dim", m.qk_rope_head_dim,
             "must be even, for RoPE turns pairs")  # fmt: skip
    _require(m.first_k_dense_replace <= m.num_hidden_layers, "model.first_k_dense_replace", m.first_k_dense_replace,
             f"must be at most num_hidden_layers={m.num_hidden_layers}")  # fmt: skip
    _choice("model.topk_method", m.topk_method, TOPK_METHODS)
    _validate_groups(m)
    _require(not m.shared_expert_gate or m.n_shared_experts > 1, "model.shared_expert_gate", "true",
             f"weighs several shared experts, and n_shared_experts is {m.n_shared_experts}; give 2 or more")  # fmt: skip
    if m.capacity_factor is not None:
        _above_zero("model", m, "capacity_factor")
    if m.rope_scaling is not None:
        _choice("model.rope_scaling.rope_type", m.rope_scaling.rope_type, ROPE_TYPES)
        _at_least("model.rope_scaling", m.rope_scaling, 1, "factor", "original_max_position_embeddings")
        _above_zero("model.rope_scaling", m.rope_scaling, "beta_fast", "beta_slow")
        _at_least("model.rope_scaling", m.rope_scaling, 0, "mscale", "mscale_all_dim")
    _choice("model.scoring_func", m.scoring_func, SCORING_FUNCS)
    _choice("model.feed_forward", m.feed_forward, FEED_FORWARDS)
    _choice("model.mtp_form", m.mtp_form, MTP_FORMS)
    _choice("model.precision", m.precision, PRECISIONS)
    _choice("model.remat", m.remat, REMAT_CHOICES)
    _choice("model.grouped_matmul", m.grouped_matmul, GROUPED_MATMULS)
    _choice("model.attention", m.attention, ATTENTIONS)


def _validate_groups(m: ModelConfig) -> None:
    """Of the experts among which tokens choose."""
    experts, groups = m.n_routed_experts, m.n_group
    if m.topk_method == "greedy":
        _require(m.num_experts_per_tok <= experts, "model.num_experts_per_tok", m.num_experts_per_tok,
                 f"must be at most n_routed_experts={experts}")  # fmt: skip
        return
    divisors = [n for n in range(1, experts + 1) if experts % n == 0]
    _require(experts % groups == 0, "model.n_group", groups,
             f"must divide n_routed_experts={experts}; nearest {min(divisors, key=lambda n: abs(n - groups))}")  # fmt: skip
    _require(m.topk_group <= groups, "model.topk_group", m.topk_group, f"must be at most n_group={groups}")
    scored_by = 2 if m.topk_method == "noaux_tc" else 1
    _require(m.topk_group == groups or experts // groups >= scored_by, "model.n_group", groups,
             f"a group is scored by its two best experts: at most {experts // 2} groups of {experts} experts")  # fmt: skip
    reachable = experts // groups * m.topk_group
    _require(m.num_experts_per_tok <= reachable, "model.num_experts_per_tok", m.num_experts_per_tok,
             f"must be at most {reachable}, the experts in topk_group={m.topk_group} of {groups} groups")  # fmt: skip


def _validate_data(d: DataConfig) -> None:
    _choice("data.format", d.format, DATA_FORMATS)
    _require(d.format == "text" or not d.path, "data.path", d.path, "conversations are given as data.input")
    _require(d.format == "chat" or d.chat_template is None, "data.chat_template", d.chat_template,
             "renders conversations; give data.format=chat")  # fmt: skip
    _require(0 < d.held_out_fraction < 1, "data.held_out_fraction", d.held_out_fraction, "must be between 0 and 1")
    _at_least("data", d, 0, "seed")
    _require(not (d.path and d.input), "data.path", d.path, "give either data.path or data.input, not both")
    _require(not d.weights or len(d.weights) == len(d.path), "data.weights", d.weights,
             f"give one for each of the {len(d.path)} sets of data.path")  # fmt: skip
    for name, paths in d.eval.items():
        _require(re.fullmatch(r"[A-Za-z0-9_-]+", name) is not None and name != HELD_OUT, f"data.eval.{name}", paths,
                 f"name it by letters, digits, _ and -, and not {HELD_OUT}")  # fmt: skip
        _require(len(paths) > 0, f"data.eval.{name}", paths, "give a file")
    for i, weight in enumerate(d.weights):
        _require(weight >= 0.001 * sum(d.weights), f"data.weights.{i}", weight,
                 "must be at least a thousandth of their sum; leave the set out instead")  # fmt: skip


def _validate_prepare(p: PrepareConfig) -> None:
    _at_least("prepare", p, 0, "seed")
    _at_least("prepare", p, 1, "max_repetition", "tokens", "workers")
    _at_least("prepare", p, 1000, "shard_bytes")
    _at_least("prepare", p, 261, "vocab_size")
    _at_least("prepare.mix", p.mix, 0, "general", "code", "math", "multilingual")
    _require(p.mix.general + p.mix.code + p.mix.math + p.mix.multilingual > 0, "prepare.mix", 0, "give some domain a share")
    _require(0 < p.held_out_fraction < 1, "prepare.held_out_fraction", p.held_out_fraction, "must be between 0 and 1")
    for name in ("near_duplicate_threshold", "quality_threshold", "fim_rate"):
        _require(0 <= getattr(p, name) <= 1, f"prepare.{name}", getattr(p, name), "must be from 0 to 1")
    _require(p.near_duplicate_threshold >= 0.5, "prepare.near_duplicate_threshold", p.near_duplicate_threshold,
             "must be at least 0.5: less alike are no copies")  # fmt: skip


def _validate_train(t: TrainConfig, m: ModelConfig) -> None:
    _at_least("train", t, 1, "steps", "sequence_length", "batch_size", "batch_size_start",
              "gradient_accumulation_steps", "loss_chunk_tokens", "eval_every", "eval_sequences",
              "checkpoint_every", "local_checkpoint_every", "keep_checkpoints", "keep_every", "max_skips")  # fmt: skip
    _at_least("train", t, 0, "warmup_steps", "weight_decay", "sequence_balance_weight", "batch_size_ramp_tokens", "seed",
              "hang_after", "checkpoint_minutes")  # fmt: skip
    if t.profile is not None:
        steps = re.fullmatch(r"([1-9]\d*)-([1-9]\d*)", t.profile)
        _require(steps is not None and int(steps[1]) <= int(steps[2]), "train.profile", t.profile,
                 "write it as first-last, two numbers of steps")  # fmt: skip
    _above_zero("train", t, "learning_rate", "adam_eps", "gradient_clip")
    if t.qk_clip is not None:
        _above_zero("train", t, "qk_clip")
        _require(t.trainable is None, "train.qk_clip", t.qk_clip,
                 "scales weights of queries and keys, which train.trainable may hold fast; give one of the two")  # fmt: skip
    _require(not t.ema_decay or t.local_checkpoint_dir is None, "train.ema_decay", t.ema_decay,
             "local checkpoints hold no average of the weights; give train.local_checkpoint_dir=null")  # fmt: skip
    _choice("train.optimizer", t.optimizer, OPTIMIZERS)
    _choice("train.adam_moment_dtype", t.adam_moment_dtype, MOMENT_DTYPES)
    for name in ("beta1", "beta2", "muon_momentum", "ema_decay"):
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


def _validate_lora(lora: LoraConfig, train: TrainConfig) -> None:
    """What can be said without the model's names; `checkpoint.adapters` says the rest."""
    _at_least("lora", lora, 0, "rank")
    _above_zero("lora", lora, "alpha")
    _require(bool(lora.modules), "lora.modules", "[]", "give names of Linears, such as self_attn.*")
    _require(not lora.rank or train.optimizer == "adamw", "lora.rank", lora.rank,
             f"adapters learn by train.optimizer=adamw, and here it is {train.optimizer}")  # fmt: skip
    _require(not lora.rank or train.qk_clip is None, "lora.rank", lora.rank,
             "train.qk_clip changes weights that adapters leave as they are; give train.qk_clip=null")  # fmt: skip
    _require(not lora.rank or not train.ema_decay, "lora.rank", lora.rank,
             "train.ema_decay averages whole weights, and adapters learn beside them; give train.ema_decay=0")  # fmt: skip


def _validate_parallel(p: ParallelConfig) -> None:
    """What can be said without the devices; `parallel.mesh.resolve` says the rest."""
    sizes = {axis: getattr(p, axis) for axis in MESH_AXES}
    for axis, size in sizes.items():
        _require(size == -1 or size >= 1, f"parallel.{axis}", size, "must be at least 1, or -1 for what remains")
    open_axes = [f"parallel.{axis}" for axis, size in sizes.items() if size == -1]
    _require(len(open_axes) <= 1, " and ".join(open_axes), -1, "only one axis may be -1; give the other a size")
    _at_least("parallel", p, 1, "pipe_interleave", "microbatch_size", "exchange_room", "exchange_groups", "exchange_parts")
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
