"""Which models the programs for Apple's devices can express (`coreml`, `coreai`), and the sizes that they need."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from wrinklefree.core.errors import UserError
from wrinklefree.export.views.settings import refuse_settings
from wrinklefree.families.architectures import FAMILIES, FIXED_ROPES, head_dim

ARCHITECTURES = tuple(family.causal_lm for family in FAMILIES if family.coreml)
CONTEXT = 2048  # ids in the cache, if the model has so many positions


@dataclass(frozen=True)
class Sizes:
    """Sizes of the attention and of its cache."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int  # ids in the cache


def attention_sizes(model: PreTrainedModel) -> Sizes:
    """Return the sizes of the model's attention and of its cache."""
    c = model.config
    context = min(c.max_position_embeddings, CONTEXT)
    return Sizes(c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads, head_dim(c.to_dict()), context)


def refuse_other_decoders(model: PreTrainedModel, target: str) -> None:
    """Raises UserError if the program would not compute what the model does."""
    name, config = type(model).__name__, model.config
    if name not in ARCHITECTURES:
        raise UserError(f"--format {target}: {name} is none of {', '.join(ARCHITECTURES)}: use --format dense or hf")
    if config.hidden_act != "silu":
        raise UserError(f"--format {target}: activation {config.hidden_act}; the program has silu: use --format dense")
    if config.rope_parameters["rope_type"] not in FIXED_ROPES:
        raise UserError(
            f"--format {target}: rotary positions of type {config.rope_parameters['rope_type']} depend on the length "
            f"of the text: use --format dense"
        )
    # The rotary tables are the model's own, whatever made them.
    refuse_settings(model, target, ("attention_bias", "mlp_bias"), rope=config.rope_parameters)
