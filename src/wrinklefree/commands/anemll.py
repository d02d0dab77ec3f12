"""`wf anemll`: the workflows of the ANEMLL guide, each one command.

a   latent weights and scales, then the scales alone with frozen codes         best quality
b   frozen codes from the start                                                simplest
c   4 bits everywhere, then 2 bits in the MLP, fitted to the 4-bit weights     from a model that is good already

What is done already, with the same settings, is skipped; what was interrupted goes on.
"""

from pathlib import Path
from typing import Literal

from wrinklefree.config.schema import Config
from wrinklefree.core.errors import UserError
from wrinklefree.export.formats import anemll
from wrinklefree.models.load import load_model
from wrinklefree.runs import launch, report
from wrinklefree.tracking.terminal import print_table

Workflow = Literal["a", "b", "c"]

# Name of a step and its training; a step starts from the one before.
STEPS: dict[Workflow, list[tuple[str, str]]] = {
    "a": [("v1", "anemll_q2a4"), ("v2", "anemll_v2")],
    "b": [("v2", "anemll_v2")],
    "c": [("q4", "anemll_q4a4"), ("q2", "anemll_q2a4")],
}


def run(
    model: str, workflow: Workflow, cache: str | None, overrides: list[str], force: bool, processes: int | None
) -> None:
    """Run the steps of a workflow, then write what ANEMLL's converters read."""
    names = [name for name, _ in STEPS[workflow]]
    meant = {name: _meant_for(name, names, overrides) for name in names}
    finished: list[Config] = []
    for name, training in STEPS[workflow]:
        chosen = [f"model={model}", f"training={training}", f"training.stage={workflow}_{name}"]
        if finished:
            chosen.append(f"training.start_from=[{finished[-1].output_dir}]")
        if cache is not None:
            chosen += ["training.objective=cached_kd", f"distillation.cache={cache}"]
        finished.append(launch.run_once([*chosen, *meant[name]], force, processes))
    last = Path(finished[-1].output_dir)
    trained, tokenizer = load_model(last)
    table = anemll.write(trained, tokenizer, last / "anemll", [])
    summary(finished, table)
    print(f"\nwrote {last}/anemll/ (for ANEMLL's converters) and {last}/packed/ (for transformers)")
    print(f"next: wf generate {last}/packed --prompt 'def '    wf export {last} --format coreml")


def _meant_for(step: str, names: list[str], overrides: list[str]) -> list[str]:
    """Settings of one step: `v2:KEY=VALUE` is for v2 alone. Raises UserError for a step that is none of `names`."""
    chosen = []
    for override in overrides:
        start, colon, rest = override.partition(":")
        if not colon or "=" in start:
            chosen.append(override)
        elif start not in names:
            raise UserError(f"{override}: this workflow has no step {start}; its steps: {', '.join(names)}")
        elif start == step:
            chosen.append(rest)
    return chosen


def summary(finished: list[Config], table: list[list[str]]) -> None:
    """Perplexity, KL and bits after each step."""
    rows = []
    for config in finished:
        figures = report.read_figures(Path(config.output_dir) / "results.json")
        kl = [f"{figures[state]['kl']:.4f}" for state in ("one_shot", "trained")]
        bits = f"{figures['bits_per_quantized_weight']:.3f}"
        rows.append([config.training.stage, f"{figures['trained']['ppl']:.2f}", *kl, bits])
    print_table(["step", "held-out perplexity", "KL before", "KL after", "bits"], rows)
    print()
    print_table(["", "for ANEMLL"], table)
