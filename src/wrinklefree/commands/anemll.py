"""`wf anemll`: run a whole workflow of the ANEMLL guide with one command.

| workflow | steps | choose it for |
|---|---|---|
| a | train latent weights and scales; then freeze the codes and train the scales | the best quality |
| b | freeze the codes from the start and train the scales | the simplest training |
| c | train with 4 bits everywhere; then 2 bits in the MLP, fitted to the 4-bit weights | a 4-bit model on the way |

A step that is done with the same settings is skipped, and an interrupted step resumes.
"""

import shlex
from pathlib import Path
from typing import Any, Literal

from wrinklefree.cloud.start import run_chain
from wrinklefree.config.compose import load_config
from wrinklefree.config.schema import Config
from wrinklefree.config.values import setting
from wrinklefree.core.errors import UserError
from wrinklefree.runs import exporting, report
from wrinklefree.tracking.terminal import print_table

Workflow = Literal["a", "b", "c"]

# The steps of each workflow: name and training config. A step starts from the model of the step before it.
STEPS: dict[Workflow, list[tuple[str, str]]] = {
    "a": [("v1", "anemll_q2a4"), ("v2", "anemll_v2")],
    "b": [("v2", "anemll_v2")],
    "c": [("q4", "anemll_q4a4"), ("q2", "anemll_q2a4")],
}


def run(
    model: str,
    workflow: Workflow,
    cache: str | None,
    overrides: list[str],
    force: bool,
    processes: int | None,
    budget: str | None = None,
    scale: str | None = None,
    dry_run: bool = False,
    elsewhere: dict[str, Any] | None = None,
) -> None:
    """Run the steps of a workflow, then write the folder `anemll/` for ANEMLL's converters.

    The steps share the time `budget`, such as `2h`. `scale`, `dry_run` and `elsewhere` are as for `wf train`, but a
    scale leaves the steps' batches as they are.
    """
    names = [name for name, _ in STEPS[workflow]]
    own = {name: _meant_for(name, names, overrides) for name in names}
    chain, before = list[list[str]](), None
    for name, training in STEPS[workflow]:
        chosen = [f"model={model}", f"training={training}", f"training.stage={workflow}_{name}"]
        if before is not None:
            chosen.append(setting("training.start_from", [before]))
        if cache is not None:
            chosen += ["training.objective=cached_kd", f"distillation.cache={cache}"]
        chain.append([*chosen, *own[name]])
        before = load_config(chain[-1]).output_dir
    finished = run_chain(
        chain, elsewhere, dry_run=dry_run, force=force, scale=scale, processes=processes, budget=budget
    )
    if not finished:
        return
    last = Path(finished[-1].output_dir)
    trained = exporting.opened(last, finished[-1].model.trust_remote_code)
    table = exporting.write(trained, "anemll", last / "anemll", {})
    summary(finished, table)
    print(f"\nwrote {last}/anemll/ (for ANEMLL's converters) and {last}/packed/ (for transformers)")
    packed, run_folder = shlex.quote(f"{last}/packed"), shlex.quote(str(last))
    words = report.first_words(finished[-1])
    print(f"next: wf generate {packed} --prompt {words}    wf export {run_folder} --format coreml")


def _meant_for(step: str, names: list[str], overrides: list[str]) -> list[str]:
    """The settings that apply to one step: `v2:KEY=VALUE` applies to step v2 only, others to every step.

    Raises UserError for a step that is not in `names`.
    """
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
    """Print a table of perplexity, KL and bits after each step, then the rows of `table`."""
    rows = []
    for config in finished:
        figures = report.read_figures(Path(config.output_dir) / report.RESULTS)
        kl = [f"{figures[state]['kl']:.4f}" for state in ("one_shot", "trained")]
        bits = f"{figures['bits_per_quantized_weight']:.3f}"
        share = f"{figures['quantized_share']:.1%}" if "quantized_share" in figures else ""  # not in those of 0.1
        rows.append([config.training.stage, f"{figures['trained']['ppl']:.2f}", *kl, bits, share])
    print_table(["step", "held-out perplexity", "KL before", "KL after", "bits", "of the blocks"], rows)
    print()
    print_table(["", "for ANEMLL"], table)
