"""One answer to one question, after a thought in words, in latents, or after none."""

import logging
from pathlib import Path
from typing import Literal

import torch

from wrinklefree.core.errors import UserError
from wrinklefree.distributed.world import join_world
from wrinklefree.generate.open import open_model
from wrinklefree.models.find import resolve_pretrained
from wrinklefree.runs import prerequisites
from wrinklefree.thinking import loading, tags
from wrinklefree.thinking.network import LatentThinker
from wrinklefree.thinking.speech import Speaker

log = logging.getLogger("wrinklefree")

Think = Literal["latent", "words", "none"]


def reply(
    path: str,
    prompt: str,
    think: Think,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    trust_remote_code: bool = False,
) -> str:
    """What a language model answers, or that of a thinker; with `think` words its thought is part of the answer.

    Raises UserError if `think` is latent and `path` is not a thinker that has learned to speak.
    """
    if think == "latent":
        thinker, speaker = open_thinker(Path(path), trust_remote_code)
    else:
        thinker, speaker = None, Speaker(*open_model(_language_model(path), trust_remote_code))
    prefix = speaker.prefill([tags.prompt(speaker.tokenizer, prompt)])
    soft_tokens, soft_mask = prefix.states[:, :0], prefix.mask[:, :0]
    if thinker is not None:
        thoughts, soft_mask = speaker.think(thinker, prefix)
        soft_tokens = thinker.speak(thoughts).detach()
        log.info("%d latent thoughts", soft_mask.sum())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        closed = think != "words"
        (said,) = speaker.answer(prefix, soft_tokens, soft_mask, max_new_tokens, temperature=temperature, closed=closed)
    words = [i for i in said if i not in speaker.ends]
    return str(speaker.tokenizer.decode(words, skip_special_tokens=False)).strip()


def open_thinker(path: Path, trust_remote_code: bool = False) -> tuple[LatentThinker, Speaker]:
    """A thinker and its language model. Raises UserError if the adapter was not trained yet."""
    thinker, config = loading.load_thinker(path)
    if config.training.stage not in ("trm_injection", "trm_grpo"):
        first = prerequisites.command(config, "trm_injection")
        raise UserError(f"{path}: made by {config.training.stage}, it cannot speak yet: run `{first}` first")
    device = join_world().device
    config.model.trust_remote_code = trust_remote_code  # this user's; the thinker's own file gives no permission
    model, tokenizer = loading.load_language_model(config)
    return thinker.to(device), Speaker(model.to(device), tokenizer)


def _language_model(path: str) -> str:
    """The path of a thinker's language model; any other path is returned as it is."""
    if not loading.is_thinker(Path(path)):
        return path
    return resolve_pretrained(loading.load_thinker(Path(path))[1].model.pretrained)
