"""The typed schema, and `load`: YAML composed by Hydra, then checked here, once, all mistakes together.

Every key of every YAML under `configs/` is a field of a dataclass below or of a method's `Config`; nothing else exists.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from wrinklefree.config.base import Auto, Fraction, Natural, Node, NonNegative, Positive, PositiveFloat
from wrinklefree.config.thinking import ThinkingConfig


@dataclass(kw_only=True)
class ArchitectureConfig(Node):
    """A Llama to build from scratch (`wf pretrain`)."""

    hidden_size: Positive = 256
    intermediate_size: Positive = 768
    num_hidden_layers: Positive = 6
    num_attention_heads: Positive = 4
    num_key_value_heads: Positive = 4
    vocab_size: Positive = 4096
    max_position_embeddings: Positive = 512
    dropout: Fraction = 0.0
    tie_word_embeddings: bool = True


@dataclass(kw_only=True)
class QuantizationConfig(Node):
    """Bits by their usual names, for whichever method is chosen; null leaves them to the method's own settings."""

    weight_bits: PositiveFloat | None = None  # checked: 1.58 is ternary, Fairy2i has 1, 2, 3, 4
    activation_bits: Literal[8, "none"] | None = None  # read: the method's activation_bits


@dataclass(kw_only=True)
class ModelConfig(Node):
    """Which model. `pretrained` is a hub id, a local folder, or `builtin:NAME` for one shipped in this package."""

    name: str
    pretrained: str
    trust_remote_code: bool = False
    auto_tokens: Positive | None = None  # what training.total_tokens=auto comes to; null goes by parameter count
    auto_tokens_slow: Positive | None = None  # on a CPU without bf16, where a step takes about four times as long
    architecture: ArchitectureConfig | None = None
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)


@dataclass(kw_only=True)
class DataConfig(Node):
    """Which text. See docs/configuration.md for what each source reads."""

    source: Literal["stdlib", "local", "hub", "downstream"]
    task: str | None = None  # downstream: sst2, mnli, qnli, cnn_dailymail, stdlib_kind or mod7_chains
    tests: bool = False  # stdlib: with the library's own tests, where this Python ships them
    path: str | None = None  # local: file or folder; hub: dataset id
    subset: str | None = None
    split: str = "train"
    text_column: str = "text"
    format: str = "plain"  # of a row: a file of data/formats/, or of data_formats/ where you stand
    enable_thinking: Literal[False, True, "both", "none", "all"] = False  # conversations with or without thoughts
    mask_prompt: bool = False  # learn the last answer of a conversation alone
    heldout_path: str | None = None  # local: a file; without it, every 20th document is held out
    heldout_split: str | None = None  # hub: a split; without it, the first documents are held out
    shuffle_buffer: Positive = 2048  # documents shuffled together
    document_mask: bool = True  # packed documents do not attend to each other


@dataclass(kw_only=True)
class OptimizerConfig(Node):
    """AdamW, or Muon for matrices with AdamW for everything else."""

    name: Literal["adamw", "muon"] = "adamw"
    lr: PositiveFloat | Auto = "auto"
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: NonNegative = 0.0
    muon_lr: PositiveFloat = 0.02  # matrices, where name is muon
    scale_lr: PositiveFloat = 5e-4  # of trained quantization scales, which are logarithms: a relative step (LOG.md)


@dataclass(kw_only=True)
class SchedulerConfig(Node):
    """Learning rate over real optimizer steps."""

    name: str = "wsd"  # a file of training/schedules/, or of schedules/ where you stand
    warmup_ratio: Fraction = 0.05
    decay_ratio: Fraction = 0.15  # wsd only
    min_lr_ratio: Fraction = 0.0


@dataclass(kw_only=True)
class WandbConfig(Node):
    """Weights & Biases; offline where no key is set."""

    enabled: bool = False
    project: str = "wrinklefree-fairy2"
    name: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class LoggingConfig(Node):
    wandb: WandbConfig = field(default_factory=WandbConfig)


@dataclass(kw_only=True)
class TrainingConfig(Node):
    """One stage of training."""

    stage: str
    objective: str = "language_modelling"  # a file of objectives/kinds/, or of objectives/ where you stand
    start_from: list[str] = field(default_factory=list)  # earlier stages or folders; the first that is there
    total_tokens: Positive | Auto = "auto"
    max_steps: Natural | None = None  # wins over total_tokens; 0 prepares and saves
    batch_size: Positive = 8
    max_seq_length: Positive | Auto = "auto"  # auto: the model's positions, at most 2048
    gradient_accumulation_steps: Positive = 1
    gradient_clipping: PositiveFloat = 1.0
    gradient_checkpointing: bool = False
    lr: PositiveFloat | Auto = "auto"
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False
    freeze_names: list[str] = field(default_factory=list)
    log_interval: Positive = 10
    save_interval: Positive = 1000
    save_total_limit: Positive = 2
    pack: bool = True  # pack and prove the trained model, where a method quantizes
    keep_best: bool = False  # final/ is the model of the lowest held-out loss
    eval_interval: Positive = 500
    eval_first: bool = False  # also before the first step: the start is kept where nothing is better
    patience: Natural = 0  # evaluations in a row without a better one after which training ends; 0 goes on
    eval_tokens: Positive = 16384  # during training
    final_eval_tokens: Positive = 131072  # before and after
    eval_examples: Positive = 2000  # of a task, before and after
    resume_from: str | None = None
    upload_to: str | None = None  # gs://, s3:// or another URL that gets a copy of every checkpoint
    logging: LoggingConfig = field(default_factory=LoggingConfig)


@dataclass(kw_only=True)
class AttentionConfig(Node):
    """Relations among the queries, keys and values of one layer, as the teacher has them (MiniLM, BitDistill)."""

    weight: NonNegative = 0.0  # gamma
    layer: int = -1  # of the student; the teacher's at the same depth
    split_heads: Positive = 8  # relation heads; divides the widths of Q, K and V in both models
    temperature: PositiveFloat = 1.0


@dataclass(kw_only=True)
class HiddenConfig(Node):
    """Hidden states after every layer, as the teacher has them; its share of the loss follows a schedule."""

    enabled: bool = False
    layer_weights: Literal["uniform", "progressive", "exponential"] | list[NonNegative] = "progressive"
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    initial_weight: Fraction = 0.5  # d: the loss is d x hidden + (1 - d) x the rest
    final_weight: Fraction = 0.0
    warmup_steps: Natural = 0  # at the initial weight


@dataclass(kw_only=True)
class DistillationConfig(Node):
    """The loss: `ce_weight` x cross entropy + `weight` x KL to the teacher at `temperature`, and what is below."""

    name: str  # the preset: a file of configs/distillation/, the package's or where you stand
    weight: NonNegative = 0.0
    ce_weight: NonNegative = 1.0
    temperature: PositiveFloat = 1.0
    tau_squared: bool = True  # multiply the KL by temperature^2, so that its gradient keeps its size
    teacher: str | None = None  # hub id, folder or earlier stage; null is the model itself in full precision
    cache: str | None = None  # a folder that `wf cache` wrote: batches and the teacher's answers come from there
    hard_top1: NonNegative = 0.0  # cached_kd: cross entropy with the teacher's likeliest word over the cached words
    hard_full: NonNegative = 0.0  # cached_kd: the same over the vocabulary, at the last position of each sequence
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    hidden: HiddenConfig = field(default_factory=HiddenConfig)


@dataclass(kw_only=True)
class DistributedConfig(Node):
    """How several processes share a model; the settings below `strategy` are for fsdp."""

    name: str = "single_gpu"
    strategy: Literal["replicate", "fsdp"] = "replicate"  # the whole model on each, or a share of every parameter
    reshard_after_forward: bool = True  # let a layer go after its forward; false gathers it once, and keeps it
    prefetch: Natural = 0  # layers gathered ahead of their turn; 0 leaves it to torch
    cpu_offload: bool = False  # masters, gradients and optimizer state stay in the CPU's memory


@dataclass(kw_only=True)
class ExportConfig(Node):
    """The packed folder that ends a run."""

    head_bits: Literal[8, 4] | None = None  # embedding and head as integers; null leaves them in bf16
    snap_scales: bool = True  # scales on the grid of the fast kernels, where a method has one


@dataclass(kw_only=True)
class Config(Node):
    """One run, resolved."""

    seed: int = 42
    output_root: str = "outputs"
    experiment: str = ""  # the stages of one experiment stand side by side: output_root/experiment_stage
    output_dir: str
    auto_prereq: bool = False  # run the earlier stages that are missing
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    distillation: DistillationConfig
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    method: Any = None  # the typed config of the method; null trains in full precision
    thinking: ThinkingConfig | None = None  # a thinker over the model (`wf trm`), which then has no method here
