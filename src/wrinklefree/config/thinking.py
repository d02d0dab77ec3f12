"""Settings of a thinker (LLM-TRM, `wf trm`), one class per stage."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from wrinklefree.config.base import Beta, Fraction, Node, NonNegative, Positive, PositiveFloat, Tokens


@dataclass(kw_only=True)
class NetworkConfig(Node):
    """The network that thinks, and how it is trained."""

    mode: Literal["trajectory", "final"] = "trajectory"
    hidden_size: Positive = 256
    num_layers: Positive = 2
    num_heads: Positive = 8
    dropout: Fraction = 0.0
    n_latent_steps: Positive = 1  # n; upstream 6
    n_deep_recursions: Positive = 1  # T; upstream 3
    max_thoughts: Positive = 8  # N_sup of mode final
    mse_weight: NonNegative = 0.1  # the KL of the head's predictions from a thought has weight 1
    halt_weight: NonNegative = 0.3
    noise: NonNegative = 0.1  # standard deviation of the noise on the previous thought
    sampled_from: Fraction = 0.5  # after this share of the training, thoughts follow the network's own; 1 is never
    ema_decay: Beta = 0.99  # averages the weights that are evaluated and kept; 0 is off


@dataclass(kw_only=True)
class PairsConfig(Node):
    """The problems to think about, and the thoughts to keep (`wf trm pairs`)."""

    problems: str = "mod7_chains"  # or gsm8k, or a JSONL file with `question` and `answer`
    num_problems: Positive = 8000
    num_heldout: Positive = 1000
    samples_per_problem: Positive = 1
    max_new_tokens: Positive = 512
    temperature: NonNegative = 0.0
    batch_size: Positive = 64
    max_thought_tokens: Positive = 2048
    keep_wrong: bool = False  # keep thoughts with a wrong answer too
    segments: Literal["lines", "tokens"] = "lines"  # the pieces that a thought is cut into
    segment_tokens: Positive = 2  # tokens per piece, if segments is tokens
    shard_size: Positive = 2048


@dataclass(kw_only=True)
class InjectionConfig(Node):
    """How the adapter learns to speak to the frozen language model (`wf trm inject`)."""

    init: Literal["least_squares", "random"] = "least_squares"
    fitted_pairs: Positive = 1024  # used by init=least_squares
    kl_weight: NonNegative = 1.0  # KL to the model that reads the written thought; cross entropy has weight 1


@dataclass(kw_only=True)
class GRPOConfig(Node):
    """Reinforcement learning: an answer is rewarded if it is correct (`wf trm grpo`)."""

    trains: Literal["adapter", "all"] = "adapter"  # all trains the network too
    group_size: Annotated[int, Field(gt=1, lt=2**31)] = 16
    temperature: PositiveFloat = 1.0
    max_answer_tokens: Positive = 64
    advantage: Literal["grpo", "dr_grpo"] = "grpo"
    clip: tuple[NonNegative, NonNegative] = (0.2, 0.28)
    kl_weight: NonNegative = 0.02  # KL to the model before this stage (estimator k3)
    anchor_weight: NonNegative = 0.3  # cross entropy with the right answer
    format_reward: Fraction = 0.0  # for an answer that ends within max_answer_tokens
    updates: Positive = 1  # optimizer steps per group of answers


@dataclass(kw_only=True)
class ThinkingConfig(Node):
    """Settings for all stages of a thinker. The setting `training` chooses which stage a run is."""

    name: Literal["trm"] = "trm"
    d_compressed: Positive = 256  # D', the width of a compressed state
    init: Literal["pca", "orthogonal"] = "pca"
    objective: Literal["mse", "kl", "fisher"] = "mse"  # of the compressor
    moment_tokens: Tokens = 1_000_000  # tokens that PCA's moments are taken over
    thought_share: Fraction = 0.5  # stage 1b: weight of its moments; those of stage 1a have the rest
    network: NetworkConfig = field(default_factory=NetworkConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    injection: InjectionConfig = field(default_factory=InjectionConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
