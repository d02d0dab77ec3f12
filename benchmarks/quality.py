"""Compare quality and cost of Fairy2i: our defaults, the paper's preset, and full precision, in one run.

    python benchmarks/quality.py [--quick] [--json] [--parts tiny,demo,story,cost] [--steps 1000] [--story FOLDER]

tiny   Held-out perplexity and KL of `-m tiny` after equal steps, for W1 and W2, with our defaults and with the paper's
       preset. The control is the full-precision model, trained for the same extra steps on the same data.
demo   The perplexity ratio of what `make demo` runs.
story  KL to the original after 250 steps of 12 x 128 tokens sampled from it, for three seeds. Needs --story.
cost   Time and peak memory of one training step, quantized against unquantized, measured alternately.

Finished runs are kept. Ratios come first in the JSON, before the raw numbers. LOG.md has the results.
"""

import argparse
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from wrinklefree.config.compose import load_config
from wrinklefree.core.batch import Batch
from wrinklefree.core.method import QuantMethod, quant_layers
from wrinklefree.models.load import load_model
from wrinklefree.objectives.kinds.language_modelling import Objective as LanguageModelling
from wrinklefree.runs import report
from wrinklefree.runs.setup import open_run
from wrinklefree.runs.stage import prepare_student, train_stage
from wrinklefree.training import optim

PAPER = ["method.preset=paper"]
# Peak rates of `mixed`, which resumes when 71 % of its schedule is over.
MIXED_LR = {"w2": "training.lr=7e-4", "w1": "training.lr=1.5e-3"}
W1 = ["training=fairy2_w1", "training.lr=1e-3"]  # one bit needs a higher rate than tiny's 4e-4 (LOG.md)

TINY = {
    "w2": ["training=fairy2_w2"],
    "w1": W1,
    "w2_paper": ["training=fairy2_w2", *PAPER],
    "w1_paper": [*W1, *PAPER],
    "control": ["training=full_precision"],
}

Figures = dict[str, Any]


def tiny(steps: int, out: Path) -> Figures:
    """Figures of our defaults, the paper's preset and the control after equal steps, on all of the held-out text."""
    length = [f"training.max_steps={steps}", "training.final_eval_tokens=1000000", "training.eval_interval=250"]
    results = {name: run(["model=tiny", *o, *length], out / f"{name}_{steps}") for name, o in TINY.items()}
    figures: Figures = {}
    for mode in ("w2", "w1"):
        figures[f"{mode}_ppl_ratio"] = ratio(results[mode])
        figures[f"{mode}_paper_ppl_ratio"] = ratio(results[f"{mode}_paper"])
        figures[f"{mode}_kl_over_paper"] = results[mode]["trained"]["kl"] / results[f"{mode}_paper"]["trained"]["kl"]
    figures["control_ppl_ratio"] = ratio(results["control"])
    for mode in ("w2", "w1"):
        results[f"{mode}_mixed"] = mixed(mode, steps, out)
        figures[f"{mode}_mixed_ppl_ratio"] = ratio(results[f"{mode}_mixed"])
    return figures | {f"tiny_{name}": summary(result) for name, result in results.items()}


def mixed(name: str, steps: int, out: Path) -> Figures:
    """Continue the run `name` for 0.4 times its steps, with labels and teacher in equal parts.

    The learning rate falls linearly to 0.
    """
    target = out / f"{name}_{steps}_mixed"
    if (target / "results.json").exists():
        return report.read_figures(target / "results.json")
    more = ["distillation.ce_weight=0.5", "distillation.weight=0.5", "training.scheduler.name=linear"]
    more += [MIXED_LR[name], f"training.max_steps={steps + 2 * steps // 5}", "training.final_eval_tokens=1000000"]
    more += ["training.eval_interval=1000000", f"output_dir={target}"]
    more += [f"training.resume_from={out / f'{name}_{steps}' / 'checkpoints' / f'step_{steps}'}"]
    train_stage(load_config(["model=tiny", *TINY[name], *more]), force=False)
    return report.read_figures(target / "results.json")


def demo(out: Path, overrides: list[str]) -> Figures:
    """The figures of the training that `make demo` runs."""
    result = run(["model=tiny", "training=fairy2_w2", *overrides], out / "demo")
    return {"demo_w2_ppl_ratio": ratio(result), "demo_w2": summary(result)}


def run(overrides: list[str], out: Path) -> Figures:
    """The figures of one training, which is run or resumed first if it is not finished."""
    if not (out / "results.json").exists():
        resume = ["training.resume_from=latest"] if list(out.glob("checkpoints/step_*")) else []
        train_stage(load_config([*overrides, f"output_dir={out}", *resume]), force=False)
    return report.read_figures(out / "results.json")


def ratio(result: Figures) -> float:
    """Held-out perplexity after training, over that of the full-precision original."""
    return float(result["trained"]["ppl"] / result["full_precision"]["ppl"])


def summary(result: Figures) -> Figures:
    """Perplexity of each state of the model, final KL, and bits per quantized weight."""
    kept = {
        f"ppl_{state}": result[state]["ppl"] for state in ("full_precision", "one_shot", "trained") if result[state]
    }
    return kept | {"kl": result["trained"]["kl"], "bits": result["bits_per_quantized_weight"]}


def story(folder: Path, steps: int, seeds: list[int]) -> Figures:
    """Mean final KL over the seeds and bits per weight, for our defaults and the paper's preset."""
    figures: Figures = {}
    settings = {
        "w2": ["training=fairy2_w2", "training.lr=2.5e-3"],
        "w2_paper": ["training=fairy2_w2", "training.lr=2.5e-3", *PAPER],
        "w1": ["training=fairy2_w1", "training.lr=5e-3"],
        "w1_paper": ["training=fairy2_w1", "training.lr=5e-3", *PAPER],
    }
    teacher, tokenizer = load_model(folder, dtype=torch.float32)
    teacher.requires_grad_(False)
    heldout = sampled(teacher, batches=4, rows=12, length=256, seed=10_000)
    data = {seed: sampled(teacher, steps, rows=12, length=128, seed=seed) for seed in seeds}
    for name, overrides in settings.items():
        runs = [story_run(folder, overrides, teacher, tokenizer, data[s], heldout, s) for s in seeds]
        figures[f"story_{name}_kl"] = statistics.mean(run.kl for run in runs)
        figures[f"story_{name}_kl_seeds"] = [run.kl for run in runs]
        figures[f"story_{name}_bits"] = runs[0].bits
    for mode in ("w2", "w1"):
        figures[f"story_{mode}_kl_over_paper"] = figures[f"story_{mode}_kl"] / figures[f"story_{mode}_paper_kl"]
    return figures


@torch.no_grad()
def sampled(model: Any, batches: int, rows: int, length: int, seed: int) -> list[Batch]:
    """Batches [rows, length] of tokens that the model generates after its begin-of-sequence token."""
    torch.manual_seed(seed)
    start = torch.full((batches * rows, 1), model.config.bos_token_id)
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": length - 1, "min_new_tokens": length - 1}
    ids = torch.cat([model.generate(s, attention_mask=torch.ones_like(s), **settings) for s in start.split(256)])
    return [{"input_ids": part, "labels": part} for part in ids.split(rows)]


class Fixed(Iterator[Batch]):
    """An endless training stream that repeats a list of batches."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches, self.served = batches, 0

    def __next__(self) -> Batch:
        self.served += 1
        return self.batches[(self.served - 1) % len(self.batches)]

    @property
    def skipped(self) -> int:
        return 0

    def state_dict(self) -> dict[str, int]:
        return {"served": self.served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.served = state["served"]


class StoryRun(NamedTuple):
    """The figures of one `story` training."""

    kl: float  # to the original on held-out tokens, in nats per token
    bits: float  # per quantized weight, including the scales


def story_run(
    folder: Path,
    overrides: list[str],
    teacher: Any,
    tokenizer: Any,
    data: list[Batch],
    heldout: list[Batch],
    seed: int,
    method: QuantMethod | None = None,
) -> StoryRun:
    """Train once in fp32 with embeddings and head frozen. `method` replaces the config's."""
    recipe = [f"training.max_steps={len(data)}", f"seed={seed}", "training.precision=fp32", "training.batch_size=12"]
    recipe += ["training.max_seq_length=128", "training.eval_interval=1000000", "training.save_interval=1000000"]
    recipe += ["training.scheduler.warmup_ratio=0.08", "training.scheduler.decay_ratio=0.2"]
    recipe += ["training.freeze_names=[embed_tokens,lm_head]"]
    with tempfile.TemporaryDirectory() as out:
        config = load_config([f"model={folder}", *recipe, *overrides, f"output_dir={out}"])
        config.method = method or config.method
        run = open_run(config, load=lambda _: (teacher, tokenizer))
        student = prepare_student(config, teacher, data[:4])
        objective = LanguageModelling(student, config.distillation, teacher)
        run.fit(student, objective, stream=Fixed(data), evaluate=lambda model: {"eval_loss": math.nan})
        layers = quant_layers(student).values()
        bits = sum(layer.encode().num_bits() for layer in layers) / sum(layer.weight.numel() for layer in layers)
        return StoryRun(run.quality(student, heldout, teacher).kl, bits)


def cost(repeats: int, quantized: str = "fairy2_w2") -> Figures:
    """Median step time and peak memory of a training, over those of the unquantized model, at the default batch."""
    times: dict[str, list[float]] = {"full_precision": [], quantized: []}
    steppers = {name: stepper(name) for name in times}
    for i in range(repeats + 2):
        for name, step in steppers.items():
            started = time.perf_counter()
            step()
            if i >= 2:
                times[name].append(time.perf_counter() - started)
    median = {name: statistics.median(values) for name, values in times.items()}
    memory = {name: peak_memory(name) for name in times}
    return {
        "step_time_ratio": median[quantized] / median["full_precision"],
        "step_memory_ratio": memory[quantized] / memory["full_precision"],
        "step_seconds": median,
        "step_peak_bytes": memory,
    }


def stepper(name: str) -> Any:
    """A function that does one optimizer step of `-m tiny` with the config `training=name`, without a teacher."""
    config = load_config(["model=tiny", f"training={name}", "distillation=none"])
    run = open_run(config, force=True)
    model, stream = prepare_student(config, run.model).train(), run.stream()
    objective = LanguageModelling(model, config.distillation)
    o = dataclasses.asdict(config.training.optimizer) | {"lr": run.plan.lr}
    optimizers = optim.build(model, **o)

    def step() -> None:
        with run.plan.autocast(model.device):
            loss, _ = next(objective(next(stream)))
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.training.gradient_clipping)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def peak_memory(name: str) -> int:
    """Peak resident bytes that three training steps add to a process with all modules imported."""
    code = f"import benchmarks.quality as q; q.print_peak({name!r})"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def print_peak(name: str) -> None:
    """Print the bytes that `peak_memory` asks for. It calls this in a process of its own."""
    before = resident()
    step = stepper(name)
    for _ in range(3):
        step()
    print(resident() - before)


def resident() -> int:
    """Peak resident bytes of this process so far."""
    # `getrusage` would include the peak of the parent process before the fork.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps and one seed, in about a minute")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--parts", default="tiny,demo,cost", help="comma-separated, of tiny, demo, story and cost")
    parser.add_argument("--steps", type=int, default=1000, help="training steps in tiny")
    parser.add_argument("--story", type=Path, help="folder with a small pretrained model, for story")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmark"), help="folder for the runs")
    print_figures(parser.parse_args(), measure)


def print_figures(args: argparse.Namespace, compute: Callable[[argparse.Namespace], Figures]) -> None:
    """Measure and print the figures. With `--json`, standard output has one JSON object and nothing else."""
    stdout = sys.stdout
    if args.json:
        sys.stdout = sys.stderr  # for the progress and tables of the runs
    figures = compute(args)
    text = json.dumps(figures, indent=2) if args.json else "\n".join(f"{k}: {v}" for k, v in figures.items())
    print(text, file=stdout)


def measure(args: argparse.Namespace) -> Figures:
    """The figures of all chosen parts."""
    parts = args.parts.split(",") + (["story"] if args.story and "story" not in args.parts else [])
    quick = args.quick
    figures: Figures = {}
    if "tiny" in parts:
        figures |= tiny(5 if quick else args.steps, args.out)
    if "demo" in parts:
        figures |= demo(args.out / ("quick" if quick else "full"), ["training.max_steps=5"] if quick else [])
    if "story" in parts:
        if args.story is None:
            sys.exit("--parts story needs --story FOLDER")
        figures |= story(args.story, 20 if quick else 250, [0] if quick else [0, 1, 2])
    if "cost" in parts:
        figures |= cost(3 if quick else 15)
    return figures


if __name__ == "__main__":
    main()
