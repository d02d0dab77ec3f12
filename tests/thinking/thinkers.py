"""A language model of a few thousand parameters that thinks, its compressor, and the settings of stages on it."""

from pathlib import Path

import torch
from tiny import llama
from transformers import LlamaForCausalLM

from wrinklefree.config.compose import config_yaml, load_config
from wrinklefree.config.schema import Config
from wrinklefree.core.files import write_json
from wrinklefree.data import chains
from wrinklefree.data.packing import encode, make_batch, pack_whole
from wrinklefree.objectives.language_model import BodyAndHead
from wrinklefree.thinking import loading
from wrinklefree.thinking.moments import Moments, tied_code
from wrinklefree.thinking.network import make_thinker
from wrinklefree.training import checkpoint

TOKENIZER = chains.tokenizer()
TOKENS = {"segments": "tokens", "segment_tokens": 2}


def thinking_model() -> LlamaForCausalLM:
    """A small Llama that has learned the form of a thought, and little of its content.

    The rate falls to zero: at the end of a constant one, what it says first changes with every step, and so with every
    processor's rounding. It may then say one word alone, of which the tests below would learn nothing.
    """
    shape = {"vocab_size": len(TOKENIZER), "max_position_embeddings": 256, "tie_word_embeddings": False}
    ends = {"bos_token_id": TOKENIZER.bos_token_id, "eos_token_id": TOKENIZER.eos_token_id}
    model = llama(**shape, **ends).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=110)
    documents = encode(TOKENIZER, chains.examples("train")[:4000])
    blocks = pack_whole(documents, 128, TOKENIZER.eos_token_id)
    for step in range(110):
        batch = make_batch(blocks[8 * step % (len(blocks) - 8) :][:8])
        model(**batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def compressor(folder: Path, model: LlamaForCausalLM) -> None:
    config = resolved(folder, "trm_compressor")
    moments, decoder = Moments.zeros(64), BodyAndHead(model)
    documents = encode(TOKENIZER, chains.examples("train")[:200])
    with torch.no_grad():
        moments.add(decoder.states(make_batch(pack_whole(documents, 128, 0))).flatten(0, 1))
        thinker = make_thinker(model, loading.settings_of(config))
        thinker.compressor.weight.copy_(tied_code(moments, 32))
    checkpoint.save(Path(config.output_dir) / "final", thinker, TOKENIZER, config_yaml(config), None)
    write_json(Path(config.output_dir) / "results.json", {})  # so the stage is done


def resolved(folder: Path, training: str, *more: str) -> Config:
    return load_config(overrides(folder, training, *more))


def overrides(folder: Path, training: str, *more: str) -> list[str]:
    network = {"hidden_size": 32, "num_heads": 2, "max_thoughts": 6}
    made = {
        "num_problems": 120,
        "num_heldout": 40,
        "max_new_tokens": 20,
        "batch_size": 32,
        "keep_wrong": True,
        **TOKENS,
    }
    given = [
        f"training={training}",
        f"model={folder / 'lm'}",
        "experiment=toy",
        f"output_root={folder}",
        "training.precision=fp32",
        "thinking.d_compressed=32",
        *(f"thinking.network.{key}={value}" for key, value in network.items()),
        *(f"thinking.pairs.{key}={value}" for key, value in made.items()),
    ]
    if training in ("trm_recursion", "trm_injection", "trm_grpo"):
        steps = {"max_steps": 4, "batch_size": 4, "log_interval": 1, "eval_interval": 2, "eval_examples": 10}
        given += [f"training.{key}={value}" for key, value in steps.items()]
    return [*given, *more]
