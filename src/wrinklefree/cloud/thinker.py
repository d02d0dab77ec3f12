"""What a stage of LLM-TRM will take. It reads and writes with a frozen language model, so `estimate.py` does not hold.

N, n, L, d, V and b are as there. P is PROMPT, and W the most tokens that a thought may have.
S is thinking.network.max_thoughts, A the most tokens of an answer, B a batch, H the width of the network, D' that of a
compressed state, m the parameters of the network's blocks, r = n_latent_steps + 1, T n_deep_recursions.

| operations | |
|---|---|
| read a token | 2 n, and 2 n more to go back through the frozen model to a soft token |
| look up the next word | 2 V d, thrice that with its gradient |
| think about a prompt | 2 m S (P + 1) r T |

| stage | operations, each times the problems or tokens that it sees |
|---|---|
| trm_compressor | moments of a token: read + 2 d^2; a trained token: read + 12 d D', with kl four look-ups |
| trm_pairs | write and read P + W tokens |
| trm_recursion | 2 m S (P + 1) r (T + 2), a thought once more after `sampled_from`, four look-ups a thought |
| trm_injection | think; read P + W + A; twice P + S + A, there and back; eight look-ups of A |
| trm_grpo | think 5 times; write a group of answers; read each there and back, and twice more; five look-ups of it |
| trm_eval | write P + W twice, and for each other way P + S + A |

Writing a word reads all weights and the keys of its batch: 4 N bytes, 8 N if they are cast to bf16, and 2 L k b for
each token before, with k the width of the keys. hours = (operations / operations a second + bytes / bytes a second)
/ EFFICIENCY. All problems are taken as the longest. What a GPU needs to start its kernels is left out, so a model of
a few million parameters takes longer than is said here. A sweep of compressors takes the training once for each width.
"""

import copy
import math
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedModel

from wrinklefree.cloud import places
from wrinklefree.cloud.estimate import CONTEXT, EFFICIENCY, ON_GPU, Estimate, fits, linear_parameters, norms_of, within
from wrinklefree.cloud.places import Cloud
from wrinklefree.config.base import LARGEST
from wrinklefree.config.schema import Config
from wrinklefree.config.thinking import ThinkingConfig
from wrinklefree.core import surgery
from wrinklefree.core.surgery import decoder_layers
from wrinklefree.families.architectures import SUB_NORMS, positions
from wrinklefree.objectives.losses import CHUNK
from wrinklefree.tracking.terminal import short_size
from wrinklefree.training.plan import choose_length, choose_minutes

PROMPT = 128  # tokens of a problem with its chat template; those of GSM8K have about as many

ANSWER = 64  # tokens of a right answer, as many as `thinking.grpo.max_answer_tokens` allows a sampled one

EVALUATED, TIMED = 250, 53  # problems of `wf trm eval`: in a batch, and answered one by one

BATCH, ACCUMULATION = "training.batch_size", "training.gradient_accumulation_steps"

PAIRS_BATCH = "thinking.pairs.batch_size"

FP32 = ("trm_pairs", "trm_eval")  # stages that compute in the weights' own dtype


class Work(NamedTuple):
    """What a stage does: tokens of the language model, operations, bytes that writing moves, and bytes of the GPU."""

    tokens: int
    steps: int
    operations: float
    moved: float
    memory: dict[str, float]
    counted: str  # how the tokens come about


@dataclass(frozen=True)
class Sizes:
    """A language model and the thinker of a config, in the letters of the tables above."""

    settings: ThinkingConfig
    N: int
    n: int
    L: int
    d: int
    V: int
    W: int  # tokens of a thought in words, at most
    b: int  # bytes of a number in products
    keys: float  # bytes of a token's keys and values in all layers
    kept: float  # bytes of a token that a frozen layer keeps for going back

    @property
    def look_up(self) -> float:
        """Operations for the logits of one token."""
        return 2.0 * self.V * self.d

    @property
    def block(self) -> int:
        """Parameters of one block of the network."""
        H = self.settings.network.hidden_size
        return 4 * H * H + 3 * H * inner_width(H)

    @property
    def network(self) -> int:
        """Parameters of the network."""
        s = self.settings.network
        ends = (3 * self.settings.d_compressed + s.max_thoughts + 1) * s.hidden_size + 1
        return s.num_layers * self.block + ends

    @property
    def compressor(self) -> int:
        """Parameters of the compressor; fisher has a decoder of its own."""
        return self.d * self.settings.d_compressed * (2 if self.settings.objective == "fisher" else 1)

    @property
    def adapter(self) -> int:
        """Parameters of the adapter and the pause tokens."""
        return self.d * (self.d + 1) + self.settings.network.max_thoughts * self.d

    @property
    def thinker(self) -> int:
        """Parameters of a thinker, with the mean of the network's weights."""
        copies = 2 if self.settings.network.ema_decay > 0 else 1
        return self.compressor + copies * self.network + self.adapter

    @property
    def one_pass(self) -> float:
        """Operations of all passes of the network's blocks over the places of one thought, forwards."""
        s = self.settings.network
        return 2.0 * s.num_layers * self.block * (PROMPT + 1) * (s.n_latent_steps + 1)

    @property
    def think(self) -> float:
        """Operations of thinking about one prompt."""
        s = self.settings.network
        return self.one_pass * s.n_deep_recursions * s.max_thoughts

    def written(self, words: int, before: int, batches: float, batch: int) -> float:
        """Bytes that are read to write `words` words after `before` tokens, in so many batches."""
        weights = 4 * self.N if self.b == 4 else 8 * self.N  # cast for each word: read, written, read
        return float(batches * words * (weights + batch * self.keys * (before + words / 2)))


def inner_width(H: int) -> int:
    """The width of the network's SwiGLU."""
    return math.ceil(8 * H / 3 / 64) * 64


def sizes_of(config: Config, model: PreTrainedModel) -> Sizes:
    """The sizes of the language model `model`, and of the thinker that `config` asks for."""
    assert config.thinking is not None
    text, block = model.config.get_text_config(), decoder_layers(model)[0]
    linears = [(name.rpartition(".")[2], linear) for name, linear in surgery.linears(block, [])]
    widths = {name: linear.out_features for name, linear in linears}
    b = 4 if config.training.precision == "fp32" or config.training.stage in FP32 else 2
    # A frozen layer keeps what attention and the gate work with; of its products only what comes out.
    inner = sum(linear.in_features if name in SUB_NORMS else linear.out_features for name, linear in linears)
    layers = len(decoder_layers(model))
    return Sizes(
        config.thinking,
        N=int(model.num_parameters()),
        n=linear_parameters(model),
        L=layers,
        d=text.hidden_size,
        V=text.vocab_size,
        W=min(config.thinking.pairs.max_new_tokens, max(1, (positions(model.config) or LARGEST) - PROMPT)),
        b=b,
        keys=float(b * layers * (widths.get("k_proj", text.hidden_size) + widths.get("v_proj", text.hidden_size))),
        kept=float(b * inner + 4 * norms_of(block)),
    )


def estimate_thinker(config: Config, model: PreTrainedModel, cloud: Cloud) -> Estimate:
    """Estimate one stage of LLM-TRM on a GPU of `cloud`. A thinker is trained in one process."""
    t, gpu, sizes = config.training, places.gpus()[cloud.gpu], sizes_of(config, model)
    work = STAGES[t.stage](config, sizes, model)
    rate = gpu.flops32 if sizes.b == 4 else gpu.flops
    busy = work.operations / rate + work.moved / gpu.bandwidth  # seconds
    minutes = choose_minutes(t, config.model, ON_GPU)
    limit = None if minutes is None else minutes.value
    hours = within(limit, (busy / max(EFFICIENCY) / 3600, busy / min(EFFICIENCY) / 3600), t.max_steps)
    memory = {"language model": 4.0 * sizes.N, "thinker": 4.0 * sizes.thinker, **work.memory, "CUDA": CONTEXT}
    moved = f" + {short_size(work.moved)} / {short_size(gpu.bandwidth)} a second" if work.moved else ""
    return Estimate(
        stage=t.stage,
        parameters=sizes.N,
        tokens=work.tokens,
        steps=work.steps,
        tokens_per_step=work.tokens // max(1, work.steps),
        flops_per_token=work.operations / max(1, work.tokens),
        memory=memory,
        traffic=0.0,
        hours=hours,
        efficiency=1.0,
        minutes=limit,
        tokens_from=work.counted,
        hours_from=f"({work.operations:.2g} operations / {rate:.3g} a second{moved}) / {EFFICIENCY[1]:.0%} to "
        f"{EFFICIENCY[0]:.0%}",
    )


def fitting_cut(config: Config, model: PreTrainedModel, cloud: Cloud) -> list[str] | None:
    """Settings with which a stage fits into a GPU of `cloud`: the same problems in smaller batches. None if none do."""
    other = copy.deepcopy(config)
    t, setting = other.training, PAIRS_BATCH if other.training.stage == "trm_pairs" else BATCH
    assert other.thinking is not None
    size = other.thinking.pairs.batch_size if setting == PAIRS_BATCH else t.batch_size
    for parts in (2**power for power in range(1, size.bit_length()) if size % 2**power == 0):
        if setting == PAIRS_BATCH:
            other.thinking.pairs.batch_size = size // parts
        else:
            t.batch_size = size // parts
            t.gradient_accumulation_steps = config.training.gradient_accumulation_steps * parts
        if fits(estimate_thinker(other, model, cloud), places.gpus()[cloud.gpu]):
            own = [f"{setting}={size // parts}"]
            return own if setting == PAIRS_BATCH else [*own, f"{ACCUMULATION}={t.gradient_accumulation_steps}"]
    return None


def trained(parameters: int) -> dict[str, float]:
    """Bytes of gradients and AdamW's moments."""
    return {"gradients and moments": 12.0 * parameters}


def network_keeps(sizes: Sizes, thoughts: int) -> float:
    """Bytes that the last recursion keeps of so many thoughts; the last block works on the slot alone."""
    s, b = sizes.settings.network, sizes.b
    H, inner = s.hidden_size, inner_width(s.hidden_size)
    blocks = (s.n_latent_steps + 1) * s.num_layers - 1
    return float(thoughts * (PROMPT + 1) * (blocks * (b * (8 * H + 4 * inner) + 8 * H) + b * 6 * H))


def compressor(config: Config, z: Sizes, model: PreTrainedModel) -> Work:
    t, length = config.training, choose_length(config.training.max_seq_length, model, None)
    per_step = t.batch_size * length * t.gradient_accumulation_steps
    steps, moments = t.max_steps or 0, z.settings.moment_tokens
    solved = 2 * z.n + 2 * z.d**2 + (2 * z.look_up + 2 * z.d**2 if z.settings.objective == "fisher" else 0)
    step = 2 * z.n + 12 * z.d * z.settings.d_compressed + (4 * z.look_up if z.settings.objective == "kl" else 0)
    batch = t.batch_size * length
    memory = {"states": 16.0 * batch * z.d + batch * z.kept, "logits": 24.0 * z.V * min(CHUNK, batch)}
    if steps:
        memory |= trained(z.compressor)
    return Work(
        moments + steps * per_step,
        steps,
        moments * solved + steps * per_step * step,
        0.0,
        memory,
        f"{moments:,} for the moments + {steps:,} steps x {per_step:,} tokens",
    )


def pairs(config: Config, z: Sizes, model: PreTrainedModel) -> Work:
    s = z.settings.pairs
    problems = s.num_problems * s.samples_per_problem + s.num_heldout
    longest, batches = PROMPT + z.W, math.ceil(problems / s.batch_size)
    operations = problems * (2 * longest * 2 * z.n + z.W * z.look_up)
    return Work(
        2 * problems * longest,
        batches,
        operations,
        z.written(z.W, PROMPT, batches, s.batch_size),
        {"keys": s.batch_size * longest * z.keys, "a layer": s.batch_size * longest * z.kept},
        f"{problems:,} problems x ({PROMPT} of a prompt + at most {z.W} written), written and read",
    )


def recursion(config: Config, z: Sizes, model: PreTrainedModel) -> Work:
    t, s = config.training, z.settings.network
    problems, steps = t.batch_size * t.gradient_accumulation_steps, t.max_steps or 0
    thoughts = s.max_thoughts if s.mode == "trajectory" else 1  # of a problem in one step
    own = (1 - s.sampled_from) * s.n_deep_recursions if s.mode == "trajectory" else 0
    operations = problems * thoughts * (z.one_pass * (s.n_deep_recursions + 2 + own) + 4 * z.look_up)
    kept = t.batch_size * thoughts
    return Work(
        steps * problems * (PROMPT + thoughts),
        steps,
        steps * operations,
        0.0,
        {
            **trained(z.network),
            "activations": network_keeps(z, kept),
            "logits": 24.0 * z.V * min(CHUNK, kept),
        },
        f"{steps:,} steps x {problems} problems x ({PROMPT} compressed states + at most {thoughts} thoughts)",
    )


def injection(config: Config, z: Sizes, model: PreTrainedModel) -> Work:
    t, S, W = config.training, z.settings.network.max_thoughts, z.W
    problems, steps = t.batch_size * t.gradient_accumulation_steps, t.max_steps or 0
    words, soft = PROMPT + W + ANSWER, PROMPT + S + ANSWER
    operations = problems * (z.think + 2 * z.n * words + 2 * 4 * z.n * soft + 8 * ANSWER * z.look_up)
    return Work(
        steps * problems * (words + 2 * soft),
        steps,
        steps * operations,
        0.0,
        {
            **trained(z.adapter),
            "activations": 2.0 * t.batch_size * soft * z.kept * z.L,
            "a layer of the written": t.batch_size * words * z.kept,
            "cast weights": 2 * 2.0 * z.n if z.b == 2 else 0.0,
            "logits": 24.0 * z.V * min(CHUNK, t.batch_size * ANSWER),
        },
        f"{steps:,} steps x {problems} problems x ({words} with the thought in words + twice {soft} without)",
    )


def grpo(config: Config, z: Sizes, model: PreTrainedModel) -> Work:
    t, s, S, A = config.training, z.settings.grpo, z.settings.network.max_thoughts, z.settings.grpo.max_answer_tokens
    problems, steps = t.batch_size * t.gradient_accumulation_steps, t.max_steps or 0
    rounds = steps / s.updates  # each samples anew
    answers, soft, right = problems * s.group_size, PROMPT + S + A, PROMPT + S + ANSWER
    sampled = problems * (2 * z.think + 2 * z.n * (PROMPT + S)) + answers * (2 * z.n * (A + soft) + 2 * A * z.look_up)
    anchored = problems * (3 * z.think + 4 * z.n * right + 3 * ANSWER * z.look_up)
    learned = answers * (6 * z.n * soft + 3 * A * z.look_up)
    batch, trains, thoughts = t.batch_size * s.group_size, z.adapter, 0.0
    if s.trains == "all":
        learned += 4 * problems * z.one_pass * S  # back through the network, from the anchor and from the answers
        trains, thoughts = z.adapter + z.network, 2 * network_keeps(z, t.batch_size * S)
    return Work(
        round(rounds * answers * (A + soft)) + steps * (2 * answers * soft + problems * right),
        steps,
        rounds * sampled + steps * (anchored + learned),
        z.written(A, PROMPT + S, rounds * t.gradient_accumulation_steps, batch),
        {
            **trained(trains),
            "reference": 4.0 * z.thinker,
            "activations": (batch * soft + t.batch_size * right) * z.kept * z.L + thoughts,
            "cast weights": 2 * 2.0 * z.n if z.b == 2 else 0.0,
            "logits": 16.0 * batch * A * z.V,
        },
        f"{steps:,} steps x {problems} problems x {s.group_size} answers x {soft} tokens, sampled and read three times",
    )


def evaluation(config: Config, z: Sizes, model: PreTrainedModel) -> Work:
    problems, S, W = config.training.eval_examples, z.settings.network.max_thoughts, z.W
    words, soft, batches = PROMPT + W + ANSWER, PROMPT + S + ANSWER, math.ceil(problems / EVALUATED)
    silent = 5  # ways without written words: nothing, pause, shuffled, latent, grpo
    told = problems + TIMED
    operations = (problems * 3 + TIMED) * words * 2 * z.n + silent * told * (soft * 2 * z.n + z.think)
    moved = (
        z.written(W + ANSWER, PROMPT, 2 * batches, EVALUATED)
        + z.written(W + ANSWER, PROMPT, TIMED, 1)
        + silent * (z.written(ANSWER, PROMPT + S, batches, EVALUATED) + z.written(ANSWER, PROMPT + S, TIMED, 1))
    )
    return Work(
        (problems * 3 + TIMED) * words + silent * told * soft,
        0,
        operations,
        moved,
        {"keys": EVALUATED * words * z.keys, "a layer": EVALUATED * words * z.kept},
        f"{problems:,} problems and {TIMED} one by one: {words} in words, {soft} in {silent} other ways",
    )


STAGES = {
    "trm_compressor": compressor,
    "trm_pairs": pairs,
    "trm_recursion": recursion,
    "trm_injection": injection,
    "trm_grpo": grpo,
    "trm_eval": evaluation,
}
