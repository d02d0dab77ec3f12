"""One training stage, from its config to its results. `wf train`, `wf fairy2` and `wf bitdistill` run it.

1. Evaluate the original model, or the teacher.
2. Quantize it, or load the model that an earlier stage made; evaluate.
3. Train; evaluate.
4. Pack, read the packed folder back, compare, and write samples.
5. Plot and report.
"""

import copy
import logging
import shlex
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wrinklefree.config.schema import Config
from wrinklefree.core import stored, surgery
from wrinklefree.core.batch import Batch
from wrinklefree.core.method import Batches, quant_layers
from wrinklefree.data.tokenizer import check_same_tokenizer
from wrinklefree.distributed.sharding import Sharded
from wrinklefree.distributed.world import ALONE, gather
from wrinklefree.evaluate.speed import decoding_speed
from wrinklefree.export.formats import packed as packed_format
from wrinklefree.export.formats.packed import export_packed
from wrinklefree.export.proof.certify import CERTIFY_TOKENS
from wrinklefree.generate.generate import complete
from wrinklefree.models.check import refuse_packed
from wrinklefree.models.find import at_hand
from wrinklefree.models.load import load_model, load_pretrained
from wrinklefree.objectives.language_model import LanguageObjective, find_objective
from wrinklefree.runs import folder, prerequisites, rebuilding, setup
from wrinklefree.runs.cards import card_of_run
from wrinklefree.runs.report import RESULTS, Results, first_words
from wrinklefree.runs.setup import Run, open_run
from wrinklefree.tracking.plotting import plot_runs
from wrinklefree.tracking.run_log import CSV_NAME, read_rows
from wrinklefree.tracking.terminal import spoken_time
from wrinklefree.training.budget import Budget

log = logging.getLogger("wrinklefree")


# The model card shows how the model continues the first tokens of this many held-out windows.
NUM_SAMPLES, PROMPT_TOKENS, SAMPLE_TOKENS = 3, 8, 96

CALIBRATION_BATCHES = 4

MEASURING = 0.2  # of a budget may go into measuring the model, before and after the training

# Packing, its proof and its samples take so long, and as long as a forward pass over so many tokens (LOG.md).
PACKING_SECONDS, PACKING_TOKENS = 10.0, 60_000

NAMES = {"full_precision": "original or teacher", "one_shot": "before training", "trained": "trained"}

# The contents of a finished run's folder, as the last lines of output describe them.
PARTS = {
    "final": "final/ (checkpoint)",
    "packed": "packed/ (small file)",
    "plots/loss.png": "plots/loss.png",
    RESULTS: RESULTS,
}


def train_stage(config: Config, force: bool) -> None:
    """Train one stage and report its results. Raises UserError for anything that the user can fix."""
    start = prerequisites.starting_folder(config)
    refuse_packed(start or at_hand(config.model.pretrained))
    with open_run(config, force) as run:
        train_opened(run, start)


def train_opened(run: Run, start: Path | None = None, made: PreTrainedModel | None = None) -> Results:
    """Train the stage of an opened run, and report its results.

    It trains `made` if that is given, which is quantized already; else a copy of the original, or of the model in the
    folder `start`. Raises UserError for anything that the user can fix.
    """
    config, original = run.config, run.model
    stream = run.stream()  # opened early, so that errors in the data are reported before the work begins
    teacher = choose_teacher(config, original, run.tokenizer)
    reference = original if teacher is None else teacher
    measured = Measured(run, reference)
    batches = calibration(config, run.tokenizer)
    student = made or prepare_student(config, original, batches, start, run.tokenizer)
    objective = choose_objective(config, student, teacher)
    objective.words = len(run.tokenizer)
    run.begin()
    # Blocks are rebuilt before a model is sharded. Those of a resumed run may be gone, and then nothing is one-shot.
    shows_start = config.method is not None or start is not None
    if config.rebuilds:
        rebuilt = made is not None or rebuilding.rebuild(run, original, student)
        shows_start = measured.results.rebuilt = rebuilt
    run.placement.place(reference)
    run.placement.place(student)
    measured.measure_state("full_precision", reference)
    if shows_start:
        measured.measure_state("one_shot", student)
    if run.budget is not None:
        run.budget.rebuilt = made is None and measured.results.rebuilt
        run.budget.reserved = measured.seconds_to_come()
    run.fit(student, objective, teacher=teacher, stream=stream, forecast=True)
    measured.measure_state("trained", student)
    if run.is_main:
        if isinstance(run.placement, Sharded):  # packing needs whole models, and these are sharded
            original, _ = load_pretrained(config.model)
            student, _ = load_model(run.out / "final", trust_remote_code=config.model.trust_remote_code)
        finish(measured, original, student)
    return measured.results


class Measured:
    """Measures a model before and after training, always on the same held-out text and examples."""

    def __init__(self, run: Run, reference: PreTrainedModel) -> None:
        self.run, self.reference = run, reference
        self.heldout = run.heldout(run.config.training.final_eval_tokens)
        # With a budget: how long the last measurement took, one with KL, and a forward pass over one token.
        self.seconds = self.with_kl = self.per_token = 0.0
        self.examples = setup.examples(run.config, run.tokenizer)
        self.results = Results(context=run.plan.length)

    def measure_state(self, state: str, model: PreTrainedModel) -> None:
        """Measure `model` and store the figures in `results` under `state`, one of `report.STATES`.

        The figures include the KL to the reference, unless `model` is the reference. With a budget, the first
        measurement shortens the held-out text if measuring would take too much of it.
        """
        budget = self.run.budget
        if budget is not None and model is self.reference:
            self.heldout = self.affordable(model, budget)
        began = 0.0 if budget is None else budget.clock()
        quality = self.run.quality(model, self.heldout, None if model is self.reference else self.reference)
        setattr(self.results, state, quality)
        right = ""
        if self.examples:
            accuracy = self.results.accuracy[state] = self.run.accuracy(model, self.examples)
            right = f", accuracy {accuracy.value:.1%}"
        if budget is not None:
            self.seconds = budget.clock() - began
        log.info("%s: held-out perplexity %.2f%s", NAMES[state], quality.ppl, right)

    def affordable(self, model: PreTrainedModel, budget: Budget) -> list[Batch]:
        """The first held-out batches, as many as can be measured on in `MEASURING` of the budget.

        The original is measured once, and the model with the KL to it before and after the training.
        """
        first = self.heldout[:1]
        self.run.quality(model, first)  # warms up
        times = [budget.clock()]
        for reference in (None, model):
            self.run.quality(model, first, reference)
            times.append(budget.clock())
        plain, with_kl = gather([times[1] - times[0], times[2] - times[1]], self.run.world)[0]
        self.per_token = plain / first[0]["input_ids"].numel()
        seconds, allowed = plain + 2 * with_kl, MEASURING * 60 * budget.minutes
        number = max(1, min(len(self.heldout), int(allowed / max(seconds, 1e-9))))
        self.with_kl = with_kl * number
        if number < len(self.heldout):
            told = (100 * number / len(self.heldout), 100 * MEASURING, spoken_time(60 * budget.minutes))
            log.info("held-out text: %.0f %% of it, so that measuring takes %.0f %% of %s", *told)
        return self.heldout[:number]

    def seconds_to_come(self) -> float:
        """Forecast how long measuring and packing after the training take."""
        config = self.run.config
        packs = config.method is not None and config.training.pack
        packing = PACKING_SECONDS + PACKING_TOKENS * self.per_token if packs else 0.0
        return max(self.seconds, self.with_kl) + packing


def prepare_student(
    config: Config,
    original: PreTrainedModel,
    batches: Batches = (),
    start: Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> PreTrainedModel:
    """The model to train: a copy of `original`, or the model in the folder `start`, quantized by the method.

    A method may calibrate on `batches`. Raises UserError if `freeze_names` match no parameter, or if the model in
    `start` has another tokenizer than `tokenizer`.
    """
    if start is None:
        student = stored.shared(original) if stored.is_stored(original) else copy.deepcopy(original)
    else:
        student, theirs = load_model(start, trust_remote_code=config.model.trust_remote_code)
        student.to(original.device)
        if tokenizer is not None:
            check_same_tokenizer(tokenizer, theirs, f"training.start_from: the model in {start}")
    student.requires_grad_(True)
    if config.method is not None:
        student = config.method.prepare(student, batches, initialize=not rebuilding.fits_scales(config))
        log.info("%s: %d linear layers quantized", config.method.name, len(quant_layers(student)))
        if config.method.rotate_inputs:
            log.info("checkpoints need wrinklefree: plain transformers would not rotate the inputs")
        config.method.check_coverage(student)
    surgery.freeze(student, config.training.freeze_names)
    return student


def calibration(config: Config, tokenizer: PreTrainedTokenizerBase) -> Iterator[Batch]:
    """The first training batches, for calibration. They are read lazily, from a stream of their own."""
    yield from islice(setup.open_stream(config, tokenizer, ALONE), CALIBRATION_BATCHES)


def choose_teacher(
    config: Config, original: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel | None:
    """The model to distil from: `distillation.teacher`, by default the original. None if the objective needs none.

    Raises UserError if the teacher's tokenizer is not `tokenizer`.
    """
    if not find_objective(config.training.objective).needs_teacher(config.distillation):
        return None
    name, source = config.distillation.teacher, prerequisites.teacher(config)
    if source is None:
        if name is not None:
            made_by = prerequisites.command(config, name)
            log.warning("no %s: the teacher is the original model. To fine-tune one first: %s", name, made_by)
        return original
    teacher, theirs = load_model(
        source,
        dtype=torch.float32,
        trust_remote_code=config.model.trust_remote_code,
    )
    check_same_tokenizer(tokenizer, theirs, f"distillation.teacher={name}")
    return teacher.to(original.device).requires_grad_(False)


def choose_objective(config: Config, student: PreTrainedModel, teacher: PreTrainedModel | None) -> LanguageObjective:
    """Make the objective that `training.objective` names."""
    objective = find_objective(config.training.objective)
    return objective(student, config.distillation, teacher, config.training.compile)


def finish(measured: Measured, original: PreTrainedModel, student: PreTrainedModel) -> None:
    """Plot the losses, pack the model, and print and save the results."""
    run, results, out = measured.run, measured.results, measured.run.out
    results.training = training_facts(run)
    if run.plan.max_steps:
        plot_runs([out / "training_log.csv"], out / "plots" / "loss.png")
    if run.config.method is not None and run.config.training.pack:
        pack(measured, original, student)
    results.minutes = (run.clock() - run.started) / 60
    results.save(out / RESULTS)
    shutil.rmtree(out / folder.BLOCKS, ignore_errors=True)  # only an unfinished run needs them
    results.print()
    wrote = [text for name, text in PARTS.items() if (out / name).exists()]
    print(f"\nwrote {out}/: {', '.join(wrote)}")
    best = shlex.quote(str(out / "packed" if (out / "packed").exists() else out))
    print(f"next: wf generate {best} --prompt {first_words(run.config)}    wf eval {best}")


def pack(measured: Measured, original: PreTrainedModel, student: PreTrainedModel) -> None:
    """Write the packed folder and check it. Add sizes and speeds to the results, and samples to the folder's card."""
    run, results, heldout = measured.run, measured.results, measured.heldout
    config, tokenizer, folder = run.config, run.tokenizer, run.out / "packed"
    some = heldout[: max(1, CERTIFY_TOKENS // heldout[0]["input_ids"].numel())]
    use = packed_format.USE.format(name=folder.name, prompt=first_words(config))
    report = export_packed(
        student,
        tokenizer,
        config.method,
        folder,
        card=card_of_run(config, student, results).beginning(use),
        force=True,
        batches=some,
        head_bits=config.export.head_bits,
        snap_scales=config.export.snap_scales,
    )
    packed, _ = load_model(folder, dtype=torch.float32)
    results.original_bytes = 2 * original.num_parameters()
    results.original_linear_bytes = 2 * report.num_quantized
    results.packed_bytes, results.packed_linear_bytes = report.file_bytes, report.linear_bytes
    results.bits_per_quantized_weight = report.bits_per_quantized_weight
    results.quantized_share = report.coverage.share
    results.bits_per_weight = report.bits_per_weight
    for name, model in (("full_precision", original), ("packed", packed)):
        results.tokens_per_second[name] = decoding_speed(model, tokenizer)
    samples = [f"{p}{complete(packed, tokenizer, p, SAMPLE_TOKENS, 0.7, seed=1)}" for p in prompts(heldout, tokenizer)]
    fenced = "\n\n".join(f"~~~text\n{sample}\n~~~" for sample in samples)
    with (folder / "README.md").open("a", encoding="utf-8") as readme:
        readme.write(f"\n## Samples at temperature 0.7\n\n{fenced}\n")
    print(f"sample of the packed model:\n\n{samples[0]}\n")


def training_facts(run: Run) -> dict[str, Any]:
    """What `results.json` and the card tell of the training, besides the settings; nothing if nothing was trained."""
    plan, steps = run.plan, run.plan.max_steps
    if not steps and not run.config.rebuilds:
        return {}
    losses = [row["train_loss"] for row in read_rows(run.out / CSV_NAME) if row["train_loss"]] if steps else []
    return {
        "steps": steps,
        "tokens": steps * plan.tokens_per_step,
        "length": plan.length,
        "lr": plan.lr,
        "schedule": run.config.training.scheduler.name,
        "precision": str(plan.dtype).removeprefix("torch."),
        "loss": float(losses[-1]) if losses else None,
    }


def prompts(heldout: list[Batch], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Text prompts: the first tokens in some held-out windows."""
    rows = torch.cat([batch["input_ids"] for batch in heldout])
    chosen = rows[:: max(1, len(rows) // NUM_SAMPLES)][:NUM_SAMPLES, :PROMPT_TOKENS]
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in chosen]
    # A window may begin with nothing but special tokens, which decode to no text.
    return [text for text in texts if text] or [tokenizer.decode(chosen[0])]
