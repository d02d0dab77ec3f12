"""The typed schema of the settings.

Every key of every YAML file is a field of a dataclass below, or of a method's `Config`. There are no other keys.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from wrinklefree.config.base import (
    Auto,
    Beta,
    Fraction,
    LayerNumber,
    Natural,
    Node,
    NonNegative,
    Positive,
    PositiveFloat,
    Seed,
    Share,
    Tokens,
)
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
    """Bits by their usual names, whatever the method. null leaves them to the method's own settings."""

    weight_bits: PositiveFloat | None = None  # must be what the method has: 1.58 is ternary, Fairy2i has 1, 2, 3, 4
    activation_bits: Literal[8, "none"] | None = None  # replaces the method's activation_bits; none is its null


@dataclass(kw_only=True)
class ModelConfig(Node):
    """The model. `pretrained` is a hub id, a local folder, or `builtin:NAME` for a model inside this package."""

    name: str
    pretrained: str
    trust_remote_code: bool = False
    auto_tokens: Tokens | None = None  # training.total_tokens=auto without minutes; null goes by parameter count
    auto_minutes: PositiveFloat | None = None  # of a training on a CPU, if no steps, tokens or minutes are set
    architecture: ArchitectureConfig | None = None
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)


@dataclass(kw_only=True)
class DataConfig(Node):
    """The text to train on. docs/configuration.md says what each source reads."""

    source: Literal["stdlib", "local", "hub", "downstream", "self"]
    task: str | None = None  # downstream: a name in data/tasks.py, such as sst2
    tests: bool = False  # stdlib: with the library's own tests, if this Python has them
    path: str | None = (
        None  # local: file or folder; hub: dataset id; self: `auto`, or a file that the model wrote before
    )
    subset: str | None = None
    split: str = "train"  # or a part of it, such as train[:1000]
    text_column: str = "text"
    format: str = "plain"  # of a row: a file in data/formats/, or in data_formats/ of your working directory
    enable_thinking: Literal[False, True, "both", "none", "all"] = False  # conversations with or without thoughts
    mask_prompt: bool = False  # learn only the last answer of a conversation
    heldout_path: str | None = None  # local: a file; without it, every 20th document is held out
    heldout_split: str | None = None  # hub: a split; without it, the first documents are held out
    shuffle_buffer: Positive = 2048  # documents shuffled together
    document_mask: bool = True  # packed documents do not attend to each other
    # Of documents in a row; auto: packed, if the model keeps them apart (or need not), else one_document.
    rows: Literal["packed", "one_document"] | Auto = "auto"
    bad_rows: Literal["error", "skip"] = "error"  # a row that cannot be read ends the run, or is left out and counted
    allow_changes: bool = False  # resume although the data is not what the checkpoint was trained on
    max_passes: PositiveFloat = 4  # over the text; a number of tokens that needs more is refused
    self_tokens: Tokens = 200_000  # that the model writes before its training
    self_minutes: PositiveFloat | None = None  # at most, for writing; what there is by then is used
    self_length: Positive = 512  # tokens of a document, at most
    self_chat: Fraction = 0.5  # share of documents that are conversations, if the tokenizer has a chat template
    self_questions: str | None = None  # a file of questions, which all documents answer
    self_temperature: PositiveFloat = 1.0
    self_top_p: Share = 0.95
    self_seed: Seed = 0  # another one gives another text


@dataclass(kw_only=True)
class OptimizerConfig(Node):
    """AdamW, or Muon for matrices with AdamW for everything else."""

    name: Literal["adamw", "muon"] = "adamw"
    lr: PositiveFloat | Auto = "auto"
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    weight_decay: NonNegative = 0.0
    muon_lr: PositiveFloat = 0.02  # of matrices, if name is muon
    scale_lr: PositiveFloat = 5e-4  # of trained scales; they are logarithms, so this is a relative step (LOG.md)


@dataclass(kw_only=True)
class SchedulerConfig(Node):
    """The learning rate over optimizer steps."""

    name: str = "wsd"  # a file in training/schedules/, or in schedules/ of your working directory
    warmup_ratio: Fraction = 0.05
    decay_ratio: Fraction = 0.15  # wsd only
    min_lr_ratio: Fraction = 0.0


@dataclass(kw_only=True)
class WandbConfig(Node):
    """Logging to Weights & Biases, which records offline if WANDB_API_KEY is not set, or to Trackio."""

    enabled: bool = False
    service: Literal["wandb", "trackio"] = "wandb"  # trackio: on this machine, without an account
    project: str = "wrinklefree-fairy2"
    name: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class LoggingConfig(Node):
    """Loggers besides `training_log.csv`."""

    wandb: WandbConfig = field(default_factory=WandbConfig)


@dataclass(kw_only=True)
class BlockwiseConfig(Node):
    """Before the training, make each block's output equal to the original's, one block after the other."""

    enabled: bool = False
    passes: Positive = 2  # how often a block goes through its text, which is the same for all blocks
    max_seq_length: Positive = 256  # at most the training's
    batch_size: Positive = 2
    steps: Natural | Auto = "auto"  # for each block; auto: what a quarter of the minutes suffices for, or else 96
    lr: PositiveFloat = 0.02  # of weights, relative to the root mean square of their matrix
    scale_lr: PositiveFloat = 1e-3  # of trained scales and norms, relative as well


@dataclass(kw_only=True)
class TrainingConfig(Node):
    """One stage of training."""

    stage: str
    objective: str = "language_modelling"  # a file in objectives/kinds/, or in objectives/ of your working directory
    start: Literal["auto", "plain", "calibrated"] = "plain"  # calibrated: codes by the inputs; auto: if the method can
    blockwise: BlockwiseConfig = field(default_factory=BlockwiseConfig)
    start_from: list[str] = field(default_factory=list)  # earlier stages or folders; the first that exists is used
    total_tokens: Tokens | Auto = "auto"
    max_steps: Natural | None = None  # wins over total_tokens; 0 prepares and saves without training
    # Of the whole stage, and the steps are as many as fit; auto: on a CPU if neither steps nor tokens are set.
    max_minutes: PositiveFloat | Auto | None = "auto"
    budget_minutes: PositiveFloat | None = (
        None  # of the whole command: --budget sets it; a resume with it keeps its plan
    )
    budget_share: NonNegative = 1.0  # of the minutes of a command with several stages, in proportion to the others
    batch_size: Positive = 8
    max_seq_length: Positive | Auto = "auto"  # auto: as many as the model has positions, at most 2048
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
    save_minutes: PositiveFloat = 15.0  # after so many without one, a checkpoint is saved too: steps may be slow
    save_total_limit: Positive = 2
    pack: bool = True  # pack the trained model and prove the result equal, if a method quantizes it
    keep_best: bool = False  # final/ holds the model with the lowest held-out loss, not the last one
    eval_interval: Positive = 500
    eval_first: bool = False  # evaluate before the first step too, so that keep_best may keep the start
    patience: Natural = 0  # stop after this many evaluations without a better one; 0 never stops early
    eval_tokens: Positive = 16384  # per evaluation during training
    final_eval_tokens: Positive = 131072  # per evaluation before and after training
    eval_examples: Positive = 2000  # questions of a task, before and after training
    resume_from: str | None = None
    upload_to: str | None = None  # a copy of every checkpoint goes to this URL (gs://, s3://, ...)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def takes_time(self) -> bool:
        """Whether minutes can end this stage: it takes steps, or rebuilds blocks."""
        return self.max_steps != 0 or self.blockwise.enabled


@dataclass(kw_only=True)
class AttentionConfig(Node):
    """A loss that matches the attention relations of one layer to the teacher's (MiniLM, BitDistill)."""

    weight: NonNegative = 0.0  # gamma in the paper
    layer: LayerNumber = -1  # of the student; the teacher's layer is at the same depth
    split_heads: Positive = 8  # relation heads; must divide the widths of Q, K and V in both models
    temperature: PositiveFloat = 1.0


@dataclass(kw_only=True)
class HiddenConfig(Node):
    """A loss that matches the hidden states after every layer to the teacher's. Its share follows a schedule."""

    enabled: bool = False
    layer_weights: Literal["uniform", "progressive", "exponential"] | list[NonNegative] = "progressive"
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    initial_weight: Fraction = 0.5  # d: the loss is d x hidden + (1 - d) x the rest
    final_weight: Fraction = 0.0
    warmup_steps: Natural = 0  # steps at the initial weight before the schedule begins


@dataclass(kw_only=True)
class DistillationConfig(Node):
    """The loss: `ce_weight` x cross entropy + `weight` x KL to the teacher at `temperature`, plus the terms below."""

    name: str  # the preset: a file in configs/distillation/, the package's or your working directory's
    weight: NonNegative = 0.0
    ce_weight: NonNegative = 1.0
    temperature: PositiveFloat = 1.0
    tau_squared: bool = True  # multiply the KL by temperature^2, so that its gradient keeps its size
    teacher: str | None = None  # hub id, folder or earlier stage; null is the model itself in full precision
    cache: str | None = None  # a folder that `wf cache` wrote; batches and the teacher's answers are read from it
    # Cross entropy with the teacher's likeliest word as the label, for cached_kd:
    hard_top1: NonNegative = 0.0  # over the cached words
    hard_full: NonNegative = 0.0  # over the vocabulary, at the last position of each sequence
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    hidden: HiddenConfig = field(default_factory=HiddenConfig)


@dataclass(kw_only=True)
class DistributedConfig(Node):
    """How several processes share a model. The settings below `strategy` are for fsdp."""

    name: str = "single_gpu"
    strategy: Literal["replicate", "fsdp"] = "replicate"  # each process holds the model, or a share of each parameter
    reshard_after_forward: bool = True  # free a layer after its forward pass; false keeps it for the backward pass
    prefetch: Natural = 0  # how many layers to gather ahead; 0 leaves it to torch
    cpu_offload: bool = False  # keep masters, gradients and optimizer state in the CPU's memory


@dataclass(kw_only=True)
class ExportConfig(Node):
    """The packed folder that a run writes last."""

    head_bits: Literal[8, 4] | None = None  # store embedding and head as integers; null stores bf16
    snap_scales: bool = True  # move scales to the nearest values that fast kernels support, if the method has such


@dataclass(kw_only=True)
class Config(Node):
    """All settings of one run."""

    seed: Seed = 42
    output_root: str = "outputs"
    experiment: str = ""  # each stage of an experiment has its own folder: output_root/experiment_stage
    output_dir: str
    auto_prereq: bool = False  # run the earlier stages that are missing
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    distillation: DistillationConfig
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    method: Any = None  # the typed config of the method; null trains in full precision
    thinking: ThinkingConfig | None = None  # a thinker over the model (`wf trm`); excludes `method`

    @property
    def rebuilds(self) -> bool:
        """Whether the run begins with a calibration or with blocks that are rebuilt: if no stage came before it."""
        t = self.training
        return self.method is not None and not t.start_from and (t.start != "plain" or t.blockwise.enabled)
