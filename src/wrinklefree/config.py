"""The typed schema, and `load`: YAML composed by Hydra, then checked here, once, all mistakes together.

Every key of every YAML under `configs/` is a field of a dataclass below or of a method's `Config`; nothing else exists.
"""

import dataclasses
import difflib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from wrinklefree.core import method as methods
from wrinklefree.core.errors import UserError

Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Auto = Literal["auto"]

CONFIGS = Path(__file__).parent / "configs"


@dataclass(kw_only=True)
class Node:
    """Base of every config section: unknown keys are errors."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


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
    format: Literal["plain", "alpaca_chat", "openhermes", "sharegpt", "dolly"] = "plain"  # of a row
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

    name: Literal["wsd", "cosine", "linear"] = "wsd"
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
    objective: Literal["language_modelling", "cached_kd"] = "language_modelling"  # cached_kd: distillation.cache
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

    name: Literal["none", "logits", "layerwise", "classification", "summarization"]
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


def defaults(cls: type) -> dict[str, Any]:
    """Field defaults as plain values, `???` where a value is required: Hydra then knows every key."""
    return {f.name: _default(f) for f in dataclasses.fields(cls)}


def _default(f: dataclasses.Field[Any]) -> Any:
    if f.default is not dataclasses.MISSING:
        return list(f.default) if isinstance(f.default, tuple) else f.default
    if f.default_factory is dataclasses.MISSING:
        return "???"
    value = f.default_factory()
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def options(group: str) -> list[str]:
    """The choices of a group: its YAML files, or every method found."""
    if group == "method":
        return methods.available()
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def resolve_model(override: str) -> list[str]:
    """`model=NAME` for a name without a YAML is a local folder or a hub id; `task=NAME` is short for `data.task`."""
    key, _, value = override.partition("=")
    if key == "task":
        return [f"data.task={value}"]
    if key != "model" or value in options("model") or not _names_a_model(value):
        return [override]
    return ["model=pretrained", f"model.name={Path(value).resolve().name}", f"model.pretrained={value}"]


def _names_a_model(value: str) -> bool:
    """Whether it looks like a path or a hub id, not like a misspelt config."""
    return "/" in value or value.startswith((".", "~")) or Path(value).is_dir()


def load(overrides: list[str], config_name: str = "config") -> Config:
    """Compose the YAML with `a.b=c` overrides and check it. Raises UserError naming every mistake, one line each."""
    values = compose(overrides, config_name)
    return validate(values)


def compose(overrides: list[str], config_name: str = "config") -> dict[str, Any]:
    """The resolved values as plain dictionaries, unchecked."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    store = ConfigStore.instance()
    sections = {
        "model": ModelConfig,
        "training": TrainingConfig,
        "data": DataConfig,
        "distillation": DistillationConfig,
        "distributed": DistributedConfig,
        "export": ExportConfig,
    }
    plain = {f.name: f.default for f in dataclasses.fields(Config) if f.default is not dataclasses.MISSING}
    store.store("schema", {**plain, **{name: defaults(cls) for name, cls in sections.items()}})
    for name in methods.available():
        store.store(name, defaults(methods.find(name)), group="method")
    try:
        with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
            everything = [*local_overrides(overrides), *overrides]
            given = [_soften(resolved) for o in everything for resolved in resolve_model(o)]
            composed = hydra_compose(config_name, given + _search_path())
        values = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_one_line(error)) from error
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _search_path() -> list[str]:
    """A folder `configs/` where the user stands adds groups of their own."""
    mine = Path.cwd() / "configs"
    return [f"hydra.searchpath=[file://{mine}]"] if mine.is_dir() else []


def local_overrides(given: list[str]) -> list[str]:
    """The settings of `local.yaml` where the user stands, as overrides, but for keys that are `given`.

    A name for a group chooses (`model: smollm2_135m`), a mapping sets (`training: {batch_size: 4}`).
    Raises UserError where the file is not such a mapping.
    """
    file = Path("local.yaml")
    if not file.is_file():
        return []
    values = _read_yaml(file)
    taken = {override.partition("=")[0].lstrip("+~") for override in given}
    flat = [(key, value) for key, value in _flatten(values) if key not in taken]
    return [f"{key}={json.dumps(value) if not isinstance(value, str) else value}" for key, value in flat]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read_yaml(path: Path) -> dict[str, Any]:
    """Raises UserError where the file is not a YAML mapping."""
    from omegaconf import OmegaConf
    from yaml import YAMLError

    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable YAML file ({error.__class__.__name__})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a wrinklefree config")
    return {str(key): value for key, value in values.items()}


def _soften(override: str) -> str:
    """Let Hydra take any key, so that our own check reports all wrong ones together; group choices stay as they are."""
    key, equals, value = override.partition("=")
    if not equals:
        raise UserError(f"override {override!r} is not key=value")
    if key == "method" and value == "null":
        raise UserError("method=null: choose a training without a method, such as training=full_precision")
    if (CONFIGS / key.lstrip("+~")).is_dir() or key == "method":
        return override
    if "=" in value and not value.startswith(("'", '"', "[", "{")):
        value = f"'{value}'"
    return f"++{key.lstrip('+')}={value}"


def _one_line(error: Exception) -> str:
    """Hydra's message without its stack of hints."""
    text = str(error)
    choice = re.search(r"Could not find '(\w+)/([^']+)'", text)
    if choice:
        group, name = choice.groups()
        known = options(group)
        return f"{group}={name}: no such option{methods.did_you_mean(name, known)}; available: {', '.join(known)}"
    missing = re.search(r"Missing mandatory value: (\S+)", text)
    if missing:
        return f"{missing.group(1)}: a value is required"
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def validate(values: Mapping[str, Any]) -> Config:
    """Check plain values against the schema. Raises UserError with one line per mistake."""
    problems: list[str] = []
    config: Config = _check(Config, dict(values) | {"method": None}, "", problems)
    method = values.get("method")
    if method is not None:
        checked = _check(methods.find(method["name"]), method, "method.", problems)
    if not problems:
        problems += _cached_kd(config)
    if not problems:
        config.method = None if method is None else _quantization(checked, config.model.quantization, problems)
    if problems:
        raise UserError("\n".join(problems))
    return config


def _cached_kd(config: Config) -> Iterator[str]:
    """What does not go together with `training.objective`."""
    d, hard = (
        config.distillation,
        {"hard_top1": config.distillation.hard_top1, "hard_full": config.distillation.hard_full},
    )
    if config.training.objective != "cached_kd":
        for key, value in {"cache": d.cache, **hard}.items():
            if value:
                yield f"distillation.{key}={value}: has no effect without training.objective=cached_kd"
        return
    if d.cache is None:
        yield "distillation.cache: training.objective=cached_kd needs a folder that `wf cache` wrote"
    if not d.weight and not any(hard.values()):
        yield "distillation.weight=0: training.objective=cached_kd has nothing to learn from the cache; try 1"
    running = {"teacher": d.teacher, "attention.weight": d.attention.weight, "hidden.enabled": d.hidden.enabled}
    for key, value in running.items():
        if value:
            yield f"distillation.{key}={value}: needs a running teacher, and training.objective=cached_kd has none"


def _quantization(method: Any, given: QuantizationConfig, problems: list[str]) -> Any:
    """The method with `model.quantization` applied, which must name what the method can do."""
    own = {f.name for f in dataclasses.fields(method)}
    if given.weight_bits is not None and given.weight_bits != method.weight_bits:
        problems.append(f"model.quantization.weight_bits={given.weight_bits:g}: {method.name} has {method.weight_bits}")
    if given.activation_bits is None:
        return method
    if "activation_bits" not in own:
        problems.append(
            f"model.quantization.activation_bits={given.activation_bits}: {method.name} has no such setting"
        )
        return method
    bits = None if given.activation_bits == "none" else given.activation_bits
    return dataclasses.replace(method, activation_bits=bits)


def _check(cls: type, values: Any, prefix: str, problems: list[str]) -> Any:
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        lines = [_describe(cls, prefix, e) for e in error.errors()]
        problems += {line.partition(":")[0]: line for line in reversed(lines)}.values()  # one a path: unions give two
        return None


def _describe(cls: type, prefix: str, error: Any) -> str:
    where = [str(part) for part in error["loc"] if not str(part).startswith(("function-", "constrained", "literal"))]
    where = [part for part in where if part not in ("int", "float", "str")]
    path = prefix + ".".join(where)
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = dict(_paths(cls, prefix))
        return f"{path}: unknown key{_closest(path, list(known))}"
    if error["type"] == "missing" or error["input"] == "???":
        return f"{path}: a value is required"
    if error["type"] == "value_error" and not where:  # two settings that do not go together
        return f"{prefix.rstrip('.')}: {error['msg'].removeprefix('Value error, ')}"
    return f"{path}: {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"


def _closest(path: str, known: list[str]) -> str:
    elsewhere = [k for k in known if k.rpartition(".")[2] == path.rpartition(".")[2]]
    close = difflib.get_close_matches(path, elsewhere, n=1, cutoff=0) or difflib.get_close_matches(path, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _paths(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of the schema with its full path."""
    for f in dataclasses.fields(cls):
        path = f"{prefix}{f.name}"
        yield path, f
        for inner in (f.type, *_union_members(f.type)):
            if isinstance(inner, type) and dataclasses.is_dataclass(inner):
                yield from _paths(inner, path + ".")


def _union_members(annotation: Any) -> tuple[Any, ...]:
    """The members of a union annotation."""
    from typing import get_args

    return get_args(annotation)


def to_yaml(config: Config) -> str:
    """The resolved config as YAML; `from_yaml` gives the same config back."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def from_yaml(path: Path) -> Config:
    """Read a `wrinklefree.yaml`. Raises UserError where it is not one of ours."""
    return validate(_read_yaml(path))
