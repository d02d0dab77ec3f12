"""`wf train` and `wf fairy2`: from a pretrained model to a trained, packed, proved one.

Evaluate the original, quantize, evaluate, train, evaluate, pack, read back, certify, sample, plot, report.
"""

import copy
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from wrinklefree import config as configs
from wrinklefree import distributed, load, session
from wrinklefree.config import Config
from wrinklefree.core import surgery
from wrinklefree.core.errors import UserError
from wrinklefree.core.method import QuantMethod, quant_layers
from wrinklefree.data import Batch
from wrinklefree.distributed import World
from wrinklefree.export import hf
from wrinklefree.export.card import card
from wrinklefree.generate import complete
from wrinklefree.objectives import LanguageModelling
from wrinklefree.plotting import plot_runs
from wrinklefree.report import Results
from wrinklefree.trainer import fit

log = logging.getLogger("wrinklefree")

# The guide's table: processes, batch size, accumulation; `dev` is for trying out, on whatever there is.
SCALES = {"dev": (1, 8, 1), "small": (1, 8, 8), "medium": (2, 8, 4), "large": (4, 8, 2), "xlarge": (8, 8, 1)}

NUM_SAMPLES, PROMPT_TOKENS = 3, 8  # what the packed model writes after the first tokens of held-out text
CERTIFY_TOKENS = 8192
SPEED_TOKENS = 64

# What a run's folder holds in the end, as its last lines name it.
PARTS = {
    "final": "final/ (checkpoint)",
    "packed": "packed/ (small file)",
    "plots/loss.png": "plots/loss.png",
    "results.json": "results.json",
}


def run(overrides: list[str], *, dry_run: bool = False, force: bool = False, scale: str | None = None) -> None:
    """Train as the overrides say. Raises UserError for anything the user can mend."""
    processes = 1
    if scale is not None:
        processes, batch_size, accumulation = SCALES[scale]
        sizes = [f"training.batch_size={batch_size}", f"training.gradient_accumulation_steps={accumulation}"]
        overrides = [*overrides[:2], *sizes, *overrides[2:]]
    config = configs.load(overrides)
    if dry_run:
        show(config, processes)
        return
    if scale not in (None, "dev"):
        check_gpus(processes, f"--scale {scale}")
    if processes > 1 and "RANK" not in os.environ:
        launch(processes, overrides, force)
        return
    train(config, force)


def show(config: Config, processes: int) -> None:
    """`--dry-run`: the resolved config and, where the model is at hand, what `auto` means for it."""
    print(configs.to_yaml(config), end="")
    source = load.at_hand(config.model.pretrained)
    if source is None:
        log.info("%s is not at hand: what `auto` means depends on it", config.model.pretrained)
    else:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
        session.choose_length(config, model)
        session.make_plan(config, model, World(0, processes, torch.device("cpu")))
    log.info("dry run: nothing was trained or written")


def check_gpus(processes: int, what: str) -> None:
    found = torch.cuda.device_count()
    if found < processes:
        raise UserError(f"{what} needs {processes} GPU(s), this machine has {found}: use --scale dev, or leave it out")


def launch(processes: int, overrides: list[str], force: bool) -> None:
    """Start this very training under torchrun. Raises UserError when a process fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += ["-m", "wrinklefree.cli", "train", *overrides, *(["--force"] if force else [])]
    if subprocess.run(command, check=False).returncode:
        raise UserError("a training process failed; its message is above")


def train(config: Config, force: bool) -> None:
    """The whole pipeline of one run."""
    world = distributed.start()
    out = Path(config.output_dir)
    resume = session.claim(config, force) if world.is_main else None
    resume = distributed.gather(resume, world)[0]
    torch.manual_seed(config.seed)
    log.info("loading %s", config.model.pretrained)
    teacher, tokenizer = load.load_pretrained(config.model)
    session.choose_length(config, teacher)
    teacher = teacher.to(world.device).requires_grad_(False)
    plan = session.make_plan(config, teacher, world)
    heldout = session.heldout(config, tokenizer, config.training.final_eval_tokens)
    results = Results(context=session.length(config))
    results.full_precision = session.quality(teacher, heldout, plan)
    log.info("full precision: held-out perplexity %.2f", results.full_precision.ppl)

    student = prepare(config, teacher)
    if config.method is not None:
        results.one_shot = session.quality(student, heldout, plan, teacher)
        log.info("quantized, before training: %.2f", results.one_shot.ppl)
    fit(
        student,
        LanguageModelling(student, choose_teacher(config, teacher), config.distillation, config.training.compile),
        session.open_stream(config, tokenizer, world),
        config,
        plan,
        tokenizer=tokenizer,
        world=world,
        evaluate=session.evaluator(config, tokenizer),
        resume=resume,
        on_step=config.method.on_step if config.method is not None else lambda model, step: None,
    )
    if world.is_main:
        results.trained = session.quality(student, heldout, plan, teacher)
        log.info("trained: %.2f", results.trained.ppl)
        finish(config, teacher, student, tokenizer, heldout, results, out)
    distributed.stop()


def prepare(config: Config, teacher: PreTrainedModel) -> PreTrainedModel:
    """A trainable copy of the original, quantized by the method. Raises UserError for patterns that match nothing."""
    student = copy.deepcopy(teacher).requires_grad_(True)
    if config.method is not None:
        config.method.prepare(student)
        log.info("%s: %d linear layers quantized", config.method.name, len(quant_layers(student)))
    named = list(student.named_parameters(remove_duplicate=False))  # tied weights go by either name
    for pattern in config.training.freeze_names:
        frozen = [p for name, p in named if surgery.matches(name, [pattern])]
        if not frozen:
            raise UserError(f"training.freeze_names: {pattern!r} matches no parameter of {config.model.name}")
        for parameter in frozen:
            parameter.requires_grad_(False)
    return student


def choose_teacher(config: Config, original: PreTrainedModel) -> PreTrainedModel | None:
    """The model to distil from: none, the original, or the one that `distillation.teacher` names."""
    if config.distillation.name == "none":
        return None
    if config.distillation.teacher is None:
        return original
    teacher, _ = load.load(config.distillation.teacher, dtype=torch.float32)
    return teacher.to(original.device).requires_grad_(False)


def finish(
    config: Config,
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    heldout: list[Batch],
    results: Results,
    out: Path,
) -> None:
    """Pack, prove, sample, plot and report."""
    if config.training.max_steps != 0:
        plot_runs([out / "training_log.csv"], out / "plots" / "loss.png")
    if isinstance(config.method, QuantMethod):
        pack(config, teacher, student, tokenizer, heldout, results, out)
    results.save(out / "results.json")
    results.print()
    wrote = [text for name, text in PARTS.items() if (out / name).exists()]
    print(f"\nwrote {out}/: {', '.join(wrote)}")
    print(f"next: wf generate {out} --prompt 'def '    wf eval {out}{'/packed' * (out / 'packed').exists()}")


def pack(
    config: Config,
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    heldout: list[Batch],
    results: Results,
    out: Path,
) -> None:
    """The packed folder with its certificate, sizes, speeds and a sample of what it writes."""
    some = heldout[: max(1, CERTIFY_TOKENS // heldout[0]["input_ids"].numel())]
    samples = [f"{p}{complete(student, tokenizer, p, 96, 0.7, seed=1)}" for p in prompts(heldout, tokenizer)]
    fenced = "\n\n".join(f"~~~text\n{sample}\n~~~" for sample in samples)
    text = f"{card(config)}\n{results.markdown()}\n## Samples at temperature 0.7\n\n{fenced}\n"
    report = hf.export(student, tokenizer, config.method, out / "packed", card=text, force=True, batches=some)
    packed, _ = load.load(out / "packed", dtype=torch.float32)
    results.original_bytes = 2 * teacher.num_parameters()
    results.original_linear_bytes = 2 * report.num_quantized
    results.packed_bytes, results.packed_linear_bytes = report.file_bytes, report.linear_bytes
    results.bits_per_quantized_weight = report.bits_per_quantized_weight
    results.bits_per_weight = report.bits_per_weight
    for name, model in (("full_precision", teacher), ("packed", packed)):
        results.tokens_per_second[name] = speed(model, tokenizer)
    prompt = prompts(heldout, tokenizer)[0]
    print(f"sample of the packed model:\n\n{prompt}{complete(packed, tokenizer, prompt, 96, 0.7, seed=1)}\n")


def prompts(heldout: list[Batch], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The first tokens of some held-out windows, as text; a window may begin with nothing but special ones."""
    rows = torch.cat([batch["input_ids"] for batch in heldout])
    chosen = rows[:: max(1, len(rows) // NUM_SAMPLES)][:NUM_SAMPLES, :PROMPT_TOKENS]
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in chosen]
    return [text for text in texts if text] or [tokenizer.decode(chosen[0])]


def speed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Tokens per second of greedy decoding at batch 1, after a warm-up."""
    ids = tokenizer("def ", return_tensors="pt").input_ids.to(model.device)
    settings = {"do_sample": False, "min_new_tokens": SPEED_TOKENS, "max_new_tokens": SPEED_TOKENS}
    model.generate(ids, attention_mask=torch.ones_like(ids), **(settings | {"min_new_tokens": 2, "max_new_tokens": 2}))
    started = time.perf_counter()
    model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return SPEED_TOKENS / (time.perf_counter() - started)
