"""Objectives: what a batch is trained for. An objective yields one or more (loss, metrics) per batch.

Yielding more than once lets deep supervision and policy gradients share the one training loop.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from wrinklefree import losses
from wrinklefree.config import AttentionConfig, DistillationConfig, HiddenConfig
from wrinklefree.core import surgery
from wrinklefree.core.errors import UserError
from wrinklefree.core.method import compute_dtype
from wrinklefree.losses import CachedLosses, CachedTeacher, TokenLosses, cached_losses, shifted, token_losses

log = logging.getLogger("wrinklefree")

Batch = dict[str, Tensor]
Metrics = dict[str, Tensor]
Objective = Callable[[nn.Module, Batch], Iterator[tuple[Tensor, Metrics]]]


class Decoder:
    """A causal LM as its body and its head apart, so that losses can take the vocabulary in chunks."""

    def __init__(self, model: PreTrainedModel, compiled: bool = False) -> None:
        """Raises UserError where the logits are not simply the head's product with the last hidden state."""
        self.head: Any = model.get_output_embeddings()  # nn.Linear, QuantLinear or PackedLinear
        self.body = model.base_model
        _check_head(model, self)
        if compiled:
            self.body = torch.compile(self.body)

    def states(self, batch: Batch) -> Tensor:
        """Last hidden states [B, L, D]."""
        inputs = {k: batch[k] for k in ("input_ids", "position_ids") if k in batch}
        hidden: Tensor = self.body(**inputs, use_cache=False).last_hidden_state
        return hidden

    def project(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """The operands of the last product: states [N, D] as the head sees them, and the head's weight [V, D]."""
        dtype = compute_dtype(states)
        if type(self.head) is nn.Linear:
            return states.to(dtype), self.head.weight
        return self.head.inputs(states).to(dtype), self.head.effective_weight(dtype)


@torch.no_grad()
def _check_head(model: PreTrainedModel, decoder: Decoder) -> None:
    if decoder.head is None or decoder.head.bias is not None:
        raise UserError(f"{type(model).__name__}: not a causal language model with a plain output head")
    ids = torch.arange(4, device=model.device).unsqueeze(0) % model.config.vocab_size
    states, head = decoder.project(decoder.states({"input_ids": ids}))
    expected = model(input_ids=ids, use_cache=False).logits.float()
    if not torch.allclose((states @ head.to(states.dtype).T).float(), expected, atol=1e-2, rtol=1e-2):
        raise UserError(f"{type(model).__name__}: scales or caps its logits after the head, which is not supported yet")


class LanguageModelling:
    """Cross entropy, KL to a teacher, and what `config` adds: attention relations, hidden states."""

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        config: DistillationConfig,
        compiled: bool = False,
    ) -> None:
        """Raises UserError for a teacher that does not fit the student, and settings that need one without it."""
        self.student = Decoder(student, compiled)
        self.teacher = None if teacher is None else Decoder(teacher, compiled)
        self.config = config
        self.shares = Shares()
        self.hidden_share = config.hidden.initial_weight
        if teacher is not None:
            check_vocabulary(student, teacher)
        self.attention = self.hidden = None
        if config.attention.weight:
            self.attention = AttentionRelations(
                student, _needed(teacher, "attention.weight", compiled), config.attention
            )
        if config.hidden.enabled:
            self.hidden = HiddenStates(student, _needed(teacher, "hidden.enabled", compiled), config.hidden)

    def on_step(self, step: int, max_steps: int) -> None:
        """Set what follows a schedule, for optimizer step `step` (from 0) of `max_steps`."""
        self.hidden_share = hidden_share(self.config.hidden, step, max_steps)

    def __call__(self, model: nn.Module, batch: Batch) -> Iterator[tuple[Tensor, Metrics]]:
        parts = [part for part in (self.attention, self.hidden) if part is not None]
        with ExitStack() as stack:
            for part in parts:
                stack.enter_context(part.watching())
            result = compare(self.student, self.teacher, batch, self.config)
        metrics = {"ce": result.ce} | ({"kl": result.kl} if self.teacher else {})
        terms = self._vocabulary_terms(result)
        loss = result.loss
        if self.hidden is not None:
            distance = self.hidden(batch)
            terms = {name: (1 - self.hidden_share) * value for name, value in terms.items()}
            terms["hidden"] = self.hidden_share * distance.detach()
            loss = self.hidden_share * distance + (1 - self.hidden_share) * loss
            metrics["cosine"] = 1 - distance.detach() / 2
        if self.attention is not None:
            relation = self.attention(batch)
            terms["attention"] = self.config.attention.weight * relation.detach()
            loss = loss + self.config.attention.weight * relation
            metrics["attention"] = relation.detach()
        self.shares.add(terms)
        yield loss, metrics

    def _vocabulary_terms(self, result: TokenLosses) -> dict[str, Tensor]:
        """What cross entropy and KL add to the loss, each with its weight."""
        c = self.config
        terms = {"ce": c.ce_weight * result.ce} if c.ce_weight else {}
        return terms | ({"kl": c.weight * result.kl} if self.teacher and c.weight else {})


class CachedKD:
    """KL to the teacher whose answers come with the batches (`data.kd_cache`), cross entropy, and hard terms."""

    def __init__(self, student: PreTrainedModel, config: DistillationConfig, compiled: bool = False) -> None:
        self.student, self.config, self.shares = Decoder(student, compiled), config, Shares()

    def on_step(self, step: int, max_steps: int) -> None:
        """No term follows a schedule."""

    def __call__(self, model: nn.Module, batch: Batch) -> Iterator[tuple[Tensor, Metrics]]:
        c = self.config
        result = self.compare(batch)
        hard = {"hard": result.hard} if c.hard_top1 or c.hard_full else {}
        weighted = {"ce": (c.ce_weight, result.ce), "kl": (c.weight, result.kl)}
        self.shares.add({name: weight * value for name, (weight, value) in weighted.items() if weight} | hard)
        yield result.loss, {"ce": result.ce, "kl": result.kl, **hard}

    def compare(self, batch: Batch) -> CachedLosses:
        """Losses of one batch of `KDCache`."""
        c, kept = self.config, batch["labels"][:, 1:] != -100
        hidden, targets = shifted(self.student.states(batch), batch["labels"])
        states, head = self.student.project(hidden)
        rest = batch["kd_rest"][kept] if "kd_rest" in batch else None
        last = kept & (kept.flip(1).cumsum(1).flip(1) == 1)
        teacher = CachedTeacher(batch["kd_ids"][kept], batch["kd_logits"][kept], rest, last[kept])
        return cached_losses(
            states,
            head,
            targets,
            teacher,
            ce_weight=c.ce_weight,
            kl_weight=c.weight,
            temperature=c.temperature,
            tau_squared=c.tau_squared,
            hard_top1=c.hard_top1,
            hard_full=c.hard_full,
        )


def check_vocabulary(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Raises UserError where the two cannot have the same tokenizer."""
    mine, other = student.config.vocab_size, teacher.config.vocab_size
    if mine != other:
        raise UserError(
            f"distillation.teacher: vocabulary of {other} tokens, the model's has {mine}: "
            f"distillation needs the same tokenizer"
        )


def _needed(teacher: PreTrainedModel | None, setting: str, compiled: bool) -> PreTrainedModel:
    if teacher is None:
        raise UserError(f"distillation.{setting}: needs a teacher, and distillation=none has none")
    if compiled:
        raise UserError(f"distillation.{setting}: watches layers inside of the model; set training.compile=false")
    return teacher


class Shares:
    """Which share of the loss each term has, over the first batches; says once where one is next to nothing."""

    BATCHES, LEAST = 20, 1e-3

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.seen = 0

    def add(self, terms: dict[str, Tensor]) -> None:
        if self.seen == self.BATCHES or len(terms) < 2:
            return
        self.seen += 1
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.item()
        if self.seen == self.BATCHES:
            self._report()

    def _report(self) -> None:
        total = sum(self.sums.values())
        for name, value in self.sums.items():
            if value < self.LEAST * total:
                log.warning(
                    "the %s term is %.2g %% of the loss: raise its weight under distillation, or leave it out",
                    name,
                    100 * value / total,
                )


class Watched:
    """The outputs of some modules during a forward pass."""

    def __init__(self, modules: list[Any]) -> None:
        self.modules = modules
        self.outputs: list[Tensor] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Collect `outputs`, one a module, while the block runs."""
        self.outputs = [torch.empty(0)] * len(self.modules)

        def keep(index: int, module: nn.Module, inputs: Any, output: Any) -> None:
            self.outputs[index] = output if isinstance(output, Tensor) else output[0]

        handles = [m.register_forward_hook(partial(keep, i)) for i, m in enumerate(self.modules)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class Pair:
    """Modules of student and teacher whose outputs are compared."""

    def __init__(self, student: list[Any], teacher: list[Any]) -> None:
        self.student, self.teacher = Watched(student), Watched(teacher)

    @contextmanager
    def watching(self) -> Iterator[None]:
        with self.student.watching(), self.teacher.watching():
            yield

    def outputs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(student's, teacher's), and forget them."""
        pairs = list(zip(self.student.outputs, self.teacher.outputs, strict=True))
        self.student.outputs, self.teacher.outputs = [], []
        return iter(pairs)


class AttentionRelations(Pair):
    """`losses.attention_relation`, summed over Q, K and V of one layer, before rotary positions."""

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, config: AttentionConfig) -> None:
        """Raises UserError where the layer is not there, has no separate projections, or does not split."""
        self.config = config
        mine, other = surgery.decoder_layers(student), surgery.decoder_layers(teacher)
        if not -len(mine) <= config.layer < len(mine):
            raise UserError(f"distillation.attention.layer={config.layer}: the model has {len(mine)} layers")
        depth = config.layer % len(mine) + 1
        super().__init__(_projections(mine[depth - 1]), _projections(other[round(depth * len(other) / len(mine)) - 1]))
        for module in [*self.student.modules, *self.teacher.modules]:
            if module.out_features % config.split_heads:
                raise UserError(
                    f"distillation.attention.split_heads={config.split_heads}: does not divide a projection to "
                    f"{module.out_features} features"
                )

    def __call__(self, batch: Batch) -> Tensor:
        mask = losses.same_document(batch["position_ids"])
        c = self.config
        terms = [losses.attention_relation(s, t, mask, c.split_heads, c.temperature) for s, t in self.outputs()]
        return torch.stack(terms).sum()


def _projections(layer: nn.Module) -> list[Any]:
    """The projections to Q, K and V in a decoder layer."""
    named = {name.rpartition(".")[2]: module for name, module in layer.named_modules()}
    if not {"q_proj", "k_proj", "v_proj"} <= named.keys():
        raise UserError("distillation.attention.weight: this architecture has no separate q_proj, k_proj, v_proj")
    return [named["q_proj"], named["k_proj"], named["v_proj"]]


class HiddenStates(Pair):
    """`losses.hidden_alignment` after every decoder layer, weighted by layer."""

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, config: HiddenConfig) -> None:
        """Raises UserError where the two models have other depths or widths, or `layer_weights` another length."""
        mine, other = surgery.decoder_layers(student), surgery.decoder_layers(teacher)
        shapes = [(len(x), m.config.hidden_size) for x, m in ((mine, student), (other, teacher))]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"distillation.hidden: the teacher has {shapes[1][0]} layers of {shapes[1][1]}, the model "
                f"{shapes[0][0]} of {shapes[0][1]}: hidden states need equal shapes"
            )
        super().__init__(list(mine), list(other))
        self.weights = layer_weights(config.layer_weights, len(mine))

    def __call__(self, batch: Batch) -> Tensor:
        kept = losses.same_document(batch["position_ids"]).sum(-1) > 1  # padding stands alone
        terms = [losses.hidden_alignment(s, t, kept) for s, t in self.outputs()]
        return torch.stack([w * term for w, term in zip(self.weights, terms, strict=True)]).sum()


def layer_weights(given: str | list[float], num_layers: int) -> list[float]:
    """Weights of the layers, first to last, that sum to 1. Raises UserError for a list of another length, or zeros."""
    if isinstance(given, str):
        rules = {"uniform": lambda i: 1.0, "progressive": lambda i: i + 1.0, "exponential": lambda i: 2.0**i}
        given = [rules[given](i) for i in range(num_layers)]
    if len(given) != num_layers or not sum(given):
        raise UserError(f"distillation.hidden.layer_weights={given}: needs {num_layers} numbers, not all 0")
    return [weight / sum(given) for weight in given]


def hidden_share(config: HiddenConfig, step: int, max_steps: int) -> float:
    """The share d of the hidden states in the loss of `step`: constant at first, then along its schedule to the end."""
    if config.schedule == "constant" or step < config.warmup_steps:
        return config.initial_weight
    progress = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
    left = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.final_weight + (config.initial_weight - config.final_weight) * left


def compare(student: Decoder, teacher: Decoder | None, batch: Batch, config: DistillationConfig) -> TokenLosses:
    """Losses of one batch, in fp32 sums over chunks of the vocabulary's logits."""
    other = None
    if teacher is not None:
        with torch.no_grad():
            hidden, _ = shifted(teacher.states(batch), batch["labels"])
            states, head = teacher.project(hidden)
            other = states, head.to(states.dtype)
    hidden, targets = shifted(student.states(batch), batch["labels"])
    states, head = student.project(hidden)
    return token_losses(
        states,
        head,
        targets,
        teacher=other,
        ce_weight=config.ce_weight,
        kl_weight=config.weight,
        temperature=config.temperature,
        tau_squared=config.tau_squared,
    )
