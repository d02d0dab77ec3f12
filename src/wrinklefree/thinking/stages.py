"""The stages of a thinker that train on hidden pairs, each from its config to its figures.

train_network    the network learns to think what the language model thought     thinking/recursion.py
train_adapter    the adapter learns to tell the language model                   thinking/injection.py
reinforce        what leads to right answers is reinforced                       thinking/grpo.py
"""

from pathlib import Path

from torch import nn

from wrinklefree.config.schema import Config
from wrinklefree.objectives.language_model import BodyAndHead
from wrinklefree.thinking import loading
from wrinklefree.thinking.grpo import GRPO
from wrinklefree.thinking.injection import Injection, fit_adapter, scale_adapter
from wrinklefree.thinking.recursion import Recursion, read_out
from wrinklefree.thinking.speech import Speaker
from wrinklefree.thinking.stage import Figures, StageSetup, open_stage, report_stage, spoken_accuracy, train_thinker


def train_network(config: Config, force: bool) -> Path:
    """Train the network, until the head reads the answer in its last thought; the folder of the thinker."""
    setup = open_stage(config, force, anew=True)
    with setup.run:
        return _train_network(setup)


def _train_network(setup: StageSetup) -> Path:
    config = setup.run.config
    decoder, thinker = BodyAndHead(setup.run.model), setup.thinker
    count = config.training.eval_examples

    def evaluate(model: nn.Module) -> Figures:
        figures = read_out(thinker, decoder, setup.heldout, count)
        return {
            "eval_loss": figures.kl,
            "eval_accuracy": figures.accuracy,
            "eval_cosine": figures.cosine,
            "eval_halted": figures.halted,
        }

    objective = Recursion(thinker, decoder, loading.settings_of(config).network)
    final = train_thinker(setup, objective, evaluate)
    figures = read_out(thinker, decoder, setup.heldout, count)._asdict()
    by_steps = figures.pop("by_steps")
    return report_stage(setup, final, figures, by_steps, "trm_injection")


def train_adapter(config: Config, force: bool) -> Path:
    """Train the adapter, until the language model answers from the thoughts; the folder of the thinker."""
    setup = open_stage(config, force)
    with setup.run:
        return _train_adapter(setup)


def _train_adapter(setup: StageSetup) -> Path:
    speaker, given = Speaker(setup.run.model, setup.run.tokenizer), loading.settings_of(setup.run.config).injection
    if setup.run.resume is None and given.init == "least_squares":
        fit_adapter(setup.thinker, speaker, setup.train, given.fitted_pairs)
    elif setup.run.resume is None:
        scale_adapter(setup.thinker, speaker, setup.train)
    final = train_thinker(setup, Injection(setup.thinker, speaker, given), spoken_accuracy(setup, speaker))
    return report_stage(setup, final, spoken_accuracy(setup, speaker)(setup.thinker), {}, "trm_grpo")


def reinforce(config: Config, force: bool) -> Path:
    """Reinforce what leads to right answers; the folder of the thinker, which is the start if nothing is better."""
    setup = open_stage(config, force)
    with setup.run:
        return _reinforce(setup)


def _reinforce(setup: StageSetup) -> Path:
    speaker, given = Speaker(setup.run.model, setup.run.tokenizer), loading.settings_of(setup.run.config).grpo
    if given.trains == "adapter":
        setup.thinker.network.requires_grad_(False)
    else:
        setup.thinker.keep_average()
    final = train_thinker(setup, GRPO(setup.thinker, speaker, given), spoken_accuracy(setup, speaker))
    return report_stage(setup, final, spoken_accuracy(setup, speaker)(setup.thinker), {}, "trm_eval")
