"""The commands and options of `wf`, and how errors are shown.

Keep heavy imports out of this file: a verb imports its module only when it runs, so that `wf --help` is instant.
"""

import functools
import importlib
import importlib.metadata
import inspect
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand, TyperGroup

from wrinklefree.core.errors import UserError
from wrinklefree.export.flags import formats, options
from wrinklefree.words.hints import no_such_verb, with_best_guess
from wrinklefree.words.models import UsageError, as_it_takes_it

HELP = """Quantize a pretrained causal language model to 1-2 bits per weight, and get a small model folder that runs.

\b
Example, offline and on a CPU:
  wf fairy2 -m tiny --mode w2
  wf generate outputs/fairy2_tiny_w2 --prompt 'def main('

A verb that takes a model takes it as -m NAME, as model=NAME and as its help says.
"""

SECTIONS = {
    "Quantize": ["fairy2", "bitdistill", "anemll", "train", "compare"],
    "Prepare": ["cache", "selftext", "pretrain"],
    "Use and share": ["generate", "serve", "eval", "export", "push"],
    "Look": ["runs", "plot", "config", "methods", "doctor"],
    "Elsewhere": ["plan", "logs", "cancel", "wandb-status"],
    "Think in latent vectors": ["trm"],
}

EXAMPLES = {  # one line for each section of the help
    "Quantize": "wf fairy2 -m FOLDER --mode w2 --budget 2h",
    "Prepare": "wf cache -m FOLDER --out caches/text data=local data.path=TEXTS",
    "Use and share": "wf generate outputs/RUN/packed --prompt 'Once upon a time'",
    "Look": "wf plot outputs/RUN outputs/OTHER -o compare.png",
    "Elsewhere": "wf plan -m qwen3_4b training=fairy2_w2 --gpus 8 --cloud gcp",
    "Think in latent vectors": "wf trm compressor model=tiny thinking.d_compressed=64",
}


class Named(TyperGroup):
    """A group whose verbs take their model as `-m NAME`, as `model=NAME` and in their own way."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UsageError as error:
            with_best_guess(error)
            raise

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in self.commands and not args[0].startswith("-") and not ctx.resilient_parsing:
            ctx.fail(no_such_verb(args[0], self.commands))
        name, command, rest = super().resolve_command(ctx, args)
        if isinstance(command, Launchable):
            rest = with_default_cloud(rest)  # first, or the model would be taken for the cloud's name
        return name, command, rest if command is None else as_it_takes_it(command, rest)


class Verbs(Named):
    """The command tree, whose help lists the verbs by what one does with them."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        width = max(map(len, self.commands))
        for title, verbs in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(f"{verb:{width}}", self.commands[verb].get_short_help_str(60)) for verb in verbs])
                formatter.write_text(f"$ {EXAMPLES[title]}")


# Help is plain text, because importing rich's help formatter takes longer than everything else together.
app = typer.Typer(
    name="wf",
    cls=Verbs,
    help=HELP,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"wrinklefree {importlib.metadata.version('wrinklefree')}")
        raise typer.Exit


@app.callback()
def options_of_all(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Hold the options that belong to no verb."""


def _completed(ctx: typer.Context, incomplete: str) -> list[str]:
    """What a shell may put for the beginning of a setting. A mistake in the user's files waits for the command."""
    from wrinklefree.config.keys import completions

    try:
        return completions(ctx.params.get("overrides") or [], incomplete)
    except UserError:
        return []


Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings; see `wf config`.", autocompletion=_completed),
]
Force = Annotated[bool, typer.Option("--force", help="Replace what is in the output folder.")]
Processes = Annotated[int | None, typer.Option("--nproc", min=1, help="Number of processes to train in.")]
Budget = Annotated[str | None, typer.Option("--budget", help="Time for all of it, such as 2h, 90m or 1h30m.")]
ModelFolder = Annotated[
    str,
    typer.Argument(metavar="PATH", help="A run, a model folder (here or gs://, s3://), a config's name or a hub id."),
]
EngineChoice = Annotated[
    Literal["auto", "native", "transformers"],
    typer.Option(help="auto is native for packed folders that allow it."),
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: one per core.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python that this folder or hub id brings.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be read and written, and stop.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Scale = Literal["dev", "small", "medium", "large", "xlarge"]

DEFAULT_CLOUD = "nebius"

# What the training verbs have in common, in the order of their help: where to run, and how large.
ELSEWHERE: dict[str, tuple[Any, Any, Any]] = {
    "scale": (Scale | None, None, typer.Option(help="Preset of batch size and number of GPUs.")),
    "cloud": (
        str | None,
        None,
        typer.Option("--cloud", "-c", help=f"Rent machines: {DEFAULT_CLOUD} (if no name follows), gcp, aws, hf, ..."),
    ),
    "nodes": (int, 1, typer.Option(min=1, help="With --cloud: number of machines.")),
    "spot": (bool, False, typer.Option("--spot", help="With --cloud: cheaper machines that may be taken away.")),
    "bucket": (
        str | None,
        None,
        typer.Option(envvar="WF_BUCKET", show_envvar=False, help="With --cloud: gs:// or s3:// for checkpoints."),
    ),
    "detach": (bool, True, typer.Option(help="With --cloud: return at once, or show the log.")),
    "background": (bool, False, typer.Option("--background", help="Run here, behind the terminal; see wf logs.")),
    "dry_run": (bool, False, typer.Option("--dry-run", help="Print the settings, or task and cost, and stop.")),
}


class Launchable(TyperCommand):
    """A command that can run elsewhere. `--cloud` without a name means DEFAULT_CLOUD."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, with_default_cloud(args))


def with_default_cloud(args: list[str]) -> list[str]:
    """`args` with a name behind each `--cloud` that has none."""
    named = list(args)
    for place, word in enumerate(args):
        following = args[place + 1] if place + 1 < len(args) else "-"
        if word in ("--cloud", "-c") and (following.startswith("-") or "=" in following):
            named[place] = f"--cloud={DEFAULT_CLOUD}"
    return named


def launchable(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command` the options in ELSEWHERE.

    It gets `scale` and `dry_run`, and if it is to run elsewhere, `elsewhere`: the fields of a `cloud.job.Request`.
    """

    @functools.wraps(command)
    def wrapped(context: typer.Context, **values: Any) -> None:
        chosen = {name: values.pop(name) for name in ELSEWHERE}
        kept = {name: chosen[name] for name in ("scale", "dry_run") if chosen[name]}
        command(**values, how=kept | _elsewhere(chosen, context))

    signature = inspect.signature(command)
    own = {name: p for name, p in signature.parameters.items() if name != "how"}
    more = {
        name: inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
        )
        for name, (kind, default, option) in ELSEWHERE.items()
    }
    last = {name: own.pop(name) for name in ("force", "overrides")}
    ordered = own | more | last
    own_context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    keywords = [own_context, *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in ordered.values())]
    wrapped.__signature__ = signature.replace(parameters=keywords)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in keywords}
    return wrapped


def _elsewhere(chosen: dict[str, Any], context: typer.Context) -> dict[str, Any]:
    """`{"elsewhere": ...}` if the command is to run elsewhere, or else nothing."""
    if chosen["cloud"] is None:
        idle = [name for name in ("nodes", "spot", "detach") if _was_given(context, name)]
        idle += ["bucket"] if str(context.get_parameter_source("bucket")).endswith("COMMANDLINE") else []
        if idle:
            raise typer.BadParameter(f"--{idle[0]}: has no effect without --cloud")
        if not chosen["background"] or chosen["dry_run"]:
            return {}
    elif chosen["background"]:
        raise typer.BadParameter("--background is for this machine; with --cloud, a job is detached anyway")
    fields = ("cloud", "scale", "nodes", "spot", "bucket", "detach")
    return {"elsewhere": {name: chosen[name] for name in fields} | {"words": _words(context)}}


def _was_given(context: Any, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _words(context: Any) -> list[str]:
    """The command line behind `wf`, without the options that say where it runs; `--scale` stays."""
    verb = [context.info_name]
    parent = context.parent
    while parent is not None and parent.parent is not None:
        verb.insert(0, parent.info_name)
        parent = parent.parent
    options, settings = list[str](), list[str]()
    for parameter in context.command.params:
        name, value = parameter.name, context.params.get(parameter.name)
        if not _was_given(context, name) or (name in ELSEWHERE and name != "scale"):
            continue
        if parameter.param_type_name == "argument":
            settings += value
        elif parameter.is_flag:
            options.append(parameter.opts[0])
        else:
            options += [parameter.opts[0], str(value)]
    return [*verb, *options, *settings]


@app.command(cls=Launchable)
@launchable
def fairy2(
    model: Annotated[str, typer.Option("--model", "-m", help="A config's name, a local folder or a hub id.")],
    how: dict[str, Any],
    mode: Annotated[Literal["w1", "w2"], typer.Option(help="Bits per weight: 1 or 2.")] = "w2",
    nproc: Processes = None,
    budget: Budget = None,
    force: Force = False,
    overrides: Overrides = None,
) -> None:
    """Quantize a model with Fairy2i: train, evaluate, pack.

    \b
    Example:
      wf fairy2 -m tiny --mode w2
      wf fairy2 -m smollm2_135m --mode w2 --budget 2h
      wf fairy2 -m smollm2_135m training.max_steps=100 training.optimizer.lr=5e-5
      wf fairy2 -m smollm2_135m --cloud nebius --bucket gs://NAME --dry-run
    """
    chosen = [f"model={model}", f"training=fairy2_{mode}", *(overrides or [])]
    call("train", chosen, force=force, processes=nproc, budget=budget, **how)


@app.command(cls=Launchable)
@launchable
def bitdistill(
    model: Annotated[str, typer.Option("--model", "-m", help="A config's name, a local folder or a hub id.")],
    how: dict[str, Any],
    task: Annotated[
        str | None,
        typer.Option(help="A task, such as sst2, boolq or stdlib_kind; default: the model config's."),
    ] = None,
    stages: Annotated[str, typer.Option(help="Stages to run, of 0, 1, 1.9, 2 and 3.")] = "0,1,2,3",
    nproc: Processes = None,
    budget: Budget = None,
    force: Force = False,
    overrides: Overrides = None,
) -> None:
    """Make a model ternary with BitDistill, stage by stage.

    Finished stages are skipped, and an interrupted stage resumes.

    A setting applies to every stage that uses it. 3:KEY=VALUE applies to stage 3 only.

    \b
    Example:
      wf bitdistill -m tiny --task stdlib_kind
      wf bitdistill -m smollm2_135m --task sst2 --stages 0,1,3 3:training.lr=1e-4
    """
    chosen = {"task": task, "numbers": stages, "overrides": overrides or []}
    call("bitdistill", model, **chosen, force=force, processes=nproc, budget=budget, **how)


@app.command(cls=Launchable)
@launchable
def anemll(
    model: Annotated[str, typer.Option("--model", "-m", help="A config's name, a local folder or a hub id.")],
    how: dict[str, Any],
    workflow: Annotated[
        Literal["a", "b", "c"],
        typer.Option(help="a: train weights and scales, then scales; b: scales only; c: 4 bits, then 2."),
    ] = "a",
    cache: Annotated[
        str | None, typer.Option(help="Learn from a KD cache of `wf cache` instead of a running teacher.")
    ] = None,
    nproc: Processes = None,
    budget: Budget = None,
    force: Force = False,
    overrides: Overrides = None,
) -> None:
    """Quantize a model to lookup tables for the Neural Engine.

    Finished steps are skipped, and an interrupted step resumes.

    A setting applies to every step. v2:KEY=VALUE applies to step v2 only.

    \b
    Example:
      wf anemll -m tiny --workflow a
      wf anemll -m qwen3_0_6b --workflow c q2:training.max_steps=1000
    """
    call("anemll", model, workflow, cache, overrides or [], force, nproc, budget, **how)


@app.command(cls=Launchable)
@launchable
def train(
    how: dict[str, Any],
    overrides: Overrides = None,
    nproc: Processes = None,
    budget: Budget = None,
    force: Force = False,
) -> None:
    """Run any training stage; everything is chosen by settings.

    \b
    Example:
      wf train model=tiny training=fairy2_w2 training.max_steps=100
      wf train model=qwen3_4b training=stage2_pretrain auto_prereq=true \\
        distributed=fsdp_multi --nproc 8
    """
    call("train", overrides or [], force=force, processes=nproc, budget=budget, **how)


@app.command()
def pretrain(
    overrides: Overrides = None, nproc: Processes = None, dry_run: DryRun = False, force: Force = False
) -> None:
    """Train a small model from scratch, on Python's own text.

    \b
    Example:
      wf pretrain model=tiny training.max_steps=200
      wf pretrain model=tiny --dry-run
    """
    call("pretrain", overrides or [], force=force, processes=nproc, dry_run=dry_run)


trm = typer.Typer(
    help="""Let a model think in latent vectors instead of words.

\b
Example, offline and on a CPU:
  wf pretrain model=chains
  wf trm compressor model=chains
  wf trm pairs model=chains
  wf trm train model=chains
  wf trm inject model=chains
  wf trm eval model=chains
""",
    cls=Named,
    rich_markup_mode=None,
    no_args_is_help=True,
)
app.add_typer(trm, name="trm")


@trm.command("compressor", cls=Launchable)
@launchable
def trm_compressor(
    how: dict[str, Any],
    sweep: Annotated[
        str | None, typer.Option(help="Compare several widths, comma-separated, in a table and a plot.")
    ] = None,
    force: Force = False,
    overrides: Overrides = None,
) -> None:
    """Phase 1: make a compressor of hidden states, by PCA.

    training.max_steps=N then trains it for N steps.

    \b
    Example:
      wf trm compressor model=tiny thinking.d_compressed=64
      wf trm compressor model=tiny --sweep 16,32,64,128
    """
    call("trm", "compressor", overrides or [], force, sweep, **how)


@trm.command("pairs", cls=Launchable)
@launchable
def trm_pairs(how: dict[str, Any], force: Force = False, overrides: Overrides = None) -> None:
    """Phase 2: let the model think in words, and record it.

    They are kept as compressed hidden states. An interrupted run resumes.

    \b
    Example:
      wf trm pairs model=chains
      wf trm pairs model=smollm3_3b thinking.pairs.problems=gsm8k \\
        thinking.pairs.max_new_tokens=2048
    """
    call("trm", "pairs", overrides or [], force, **how)


@trm.command("train", cls=Launchable)
@launchable
def trm_train(how: dict[str, Any], force: Force = False, overrides: Overrides = None) -> None:
    """Phase 2: train a network to produce the recorded thoughts.

    \b
    Example:
      wf trm train model=chains training.max_steps=1000
      wf trm train model=chains thinking.network.mode=final \\
        experiment=chains_final
    """
    call("trm", "train", overrides or [], force, **how)


@trm.command("inject", cls=Launchable)
@launchable
def trm_inject(how: dict[str, Any], force: Force = False, overrides: Overrides = None) -> None:
    """Phase 2: train the adapter that gives thoughts to the model.

    The model stays frozen and reads the thoughts as soft tokens.

    \b
    Example:
      wf trm inject model=chains
    """
    call("trm", "inject", overrides or [], force, **how)


@trm.command("grpo", cls=Launchable)
@launchable
def trm_grpo(how: dict[str, Any], force: Force = False, overrides: Overrides = None) -> None:
    """Phase 3: improve the thinker by reinforcement learning.

    \b
    Example:
      wf trm grpo model=chains thinking.grpo.group_size=8
    """
    call("trm", "grpo", overrides or [], force, **how)


@trm.command("eval", cls=Launchable)
@launchable
def trm_eval(how: dict[str, Any], force: Force = False, overrides: Overrides = None) -> None:
    """Compare thinking in words, in latent vectors and not at all.

    Controls are measured as well, such as the thoughts of another problem.

    \b
    Example:
      wf trm eval model=chains
    """
    call("trm", "eval", overrides or [], force, **how)


@app.command()
def cache(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The teacher: a config's name, a local folder or a hub id.")
    ] = None,
    length: Annotated[int | None, typer.Option(min=2, help="Tokens per sequence; default: model's context.")] = None,
    topk: Annotated[int, typer.Option(min=1, help="Likeliest tokens to keep per position.")] = 32,
    rand_neg: Annotated[int, typer.Option(min=0, help="Random tokens to keep per position.")] = 0,
    sequences: Annotated[int, typer.Option(min=1, help="Most sequences to train on.")] = 20_000,
    heldout: Annotated[int, typer.Option(min=1, help="Most held-out sequences.")] = 128,
    shard_size: Annotated[int, typer.Option(min=1, help="Sequences per file.")] = 1024,
    import_from: Annotated[
        Path | None, typer.Option("--import", help="Convert a cache of .pt files; -m names its tokenizer.")
    ] = None,
    dry_run: DryRun = False,
    force: Force = False,
    overrides: Overrides = None,
) -> None:
    """Save a teacher's predictions, to learn from them later.

    Trainings with training.objective=cached_kd read them, and need no teacher. An interrupted cache resumes.
    Settings may be data.*, seed, training.batch_size and training.precision.

    \b
    Example:
      wf cache -m tiny --out caches/tiny --topk 64 --length 128 --sequences 2000
      wf cache -m qwen3_0_6b --out caches/alpaca \\
        data=hub data.path=tatsu-lab/alpaca data.format=alpaca_chat
      wf cache -m FOLDER --out caches/text data=local data.path=TEXTS --dry-run
      wf cache --import caches/their_cache --out caches/imported -m qwen3_0_6b
    """
    if import_from is not None:
        kept = ("out", "model", "import_from", "force")  # an imported cache has its own sizes, so no other option works
        sources = {name: context.get_parameter_source(name) for name in context.params if name not in kept}
        given = [name.replace("_", "-") for name, source in sources.items() if source and source.name == "COMMANDLINE"]
        if given:
            raise typer.BadParameter(f"{', '.join(given)}: no effect with --import")
        call("cache", out, import_from=import_from, model=model, force=force)
        return
    sizes = {"length": length, "topk": topk, "negatives": rand_neg, "num_train": sequences, "num_heldout": heldout}
    chosen: dict[str, Any] = {"overrides": overrides or [], "dry_run": dry_run, "shard_size": shard_size}
    call("cache", out, model=model, force=force, **chosen, **sizes)


@app.command()
def selftext(
    model: Annotated[str, typer.Option("--model", "-m", help="A config's name, a local folder or a hub id.")],
    tokens: Annotated[str, typer.Option(help="How much to write, such as 50000, 200k or 2M.")] = "200k",
    minutes: Annotated[float | None, typer.Option(min=0, help="Stop after so many minutes of writing.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A .jsonl file that gets a copy.")] = None,
    dry_run: DryRun = False,
    force: Force = False,
    overrides: Overrides = None,
) -> None:
    """Let a model write the text that data=self trains on.

    The text is kept in outputs/self_text/, where later trainings of this model find it. An interrupted writing goes on.
    Settings may be data.self_* and output_root.

    \b
    Example:
      wf selftext -m tiny --tokens 20k
      wf selftext -m tiny --tokens 20k --dry-run
      wf selftext -m smollm2_135m --tokens 200k -o own.jsonl data.self_chat=0.8
    """
    chosen: dict[str, Any] = {"minutes": minutes, "out": out, "dry_run": dry_run}
    call("selftext", model, tokens, **chosen, force=force, overrides=overrides or [])


@app.command("eval")
def evaluate(
    path: ModelFolder,
    data: Annotated[Path | None, typer.Option(help="A text file; default: held-out text of Python's library.")] = None,
    context: Annotated[
        int | None, typer.Option(min=2, help="Tokens per window; default: 512, or the model's context if shorter.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Most tokens to evaluate.")] = 100_000,
    tasks: Annotated[str | None, typer.Option(help="Run these lm-eval tasks instead, comma-separated.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples per lm-eval task.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure perplexity on held-out text, or lm-eval tasks.

    \b
    Example:
      wf eval outputs/fairy2_tiny_w2/packed
      wf eval outputs/fairy2_tiny_w2 --data book.txt --context 256
      wf eval outputs/fairy2_tiny_w2 --tasks arc_easy,piqa --limit 100
    """
    chosen = {"data": data, "context": context, "tokens": tokens, "tasks": tasks, "limit": limit}
    call("evaluate", path, **chosen, as_json=json, trust_remote_code=trust_remote_code)


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run folders, or training_log.csv files.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="PNG to write; default: plots/loss.png in the first run.")
    ] = None,
) -> None:
    """Plot loss and learning rate of one or more runs.

    \b
    Example:
      wf plot outputs/fairy2_tiny_w1 outputs/fairy2_tiny_w2 -o compare.png
    """
    call("plot", runs, out)


@app.command()
def generate(
    path: ModelFolder,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Text to continue.")] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", "-i", help="Answer line by line, until Ctrl-D.")
    ] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Use the tokenizer's chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 always chooses the likeliest token.")] = 0.7,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="The same seed gives the same text.")] = 0,
    think: Annotated[
        Literal["latent", "words", "none"] | None,
        typer.Option(help="Think first, then answer; latent needs a run of `wf trm`."),
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="Choose among the K likeliest tokens; 0 means all.")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0, max=1, help="Choose among the likeliest tokens with this total probability.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    repetition_penalty: Annotated[
        float, typer.Option(min=0, help="Divide the logits of tokens that came before; 1 is off.")
    ] = 1.0,
    engine: EngineChoice = "auto",
    threads: Threads = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Generate text from a model.

    \b
    Example:
      wf generate outputs/fairy2_tiny_w2 --prompt 'def main('
      wf generate outputs/fairy2_tiny_w2/packed --prompt 'def main(' --stop 'def '
      wf generate outputs/fairy2_tiny_w2 --interactive
      wf generate outputs/chains_trm_injection --think latent --prompt '3 +2 *4 ?'
    """
    sampling: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    sampling |= {"top_k": top_k, "top_p": top_p, "repetition_penalty": repetition_penalty, "stop": stop}
    running: dict[str, Any] = {"think": think, "engine": engine, "threads": threads}
    running |= {"trust_remote_code": trust_remote_code, "as_json": as_json}
    call("generate", path, prompt=prompt, interactive=interactive, chat=chat, **sampling, **running)


@app.command()
def serve(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="Runs, model folders, names of configs or hub ids.")
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 means all of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 chooses a free port.")] = 8000,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Longer prompts are refused.")] = 4096,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 2048,
    max_concurrent: Annotated[int, typer.Option(min=1, help="Requests answered at the same time.")] = 8,
    max_waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait; more are refused.")] = 64,
    max_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory of open models, such as 4GB; idle ones are closed to keep it."),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="WF_API_KEY", help="Refuse requests without `Authorization: Bearer KEY`.")
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(help="A model's name in requests; once for each model; default: the folder's name."),
    ] = None,
    engine: EngineChoice = "auto",
    threads: Threads = None,
    half_cache: Annotated[
        bool, typer.Option("--half-cache", help="Keep keys and values in bf16: half the memory, nearly the same text.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_special: Annotated[
        bool, typer.Option("--allow-special", help="Read special tokens in the texts of requests as such.")
    ] = False,
    cors: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="Let pages of this origin ask; may be repeated; * is all."),
    ] = None,
    ui: Annotated[bool, typer.Option("--ui/--no-ui", help="A page to chat on at /.")] = True,
) -> None:
    """Serve models to OpenAI clients, with streaming.

    \b
    Example:
      wf serve outputs/fairy2_tiny_w2/packed
      wf serve outputs/fairy2_tiny_w2/packed --port 8080 --name tiny
      wf serve small/packed large/packed --max-memory 4GB
    """
    limits = {"max_prompt_tokens": max_prompt_tokens, "max_tokens": max_tokens}
    limits |= {"max_concurrent": max_concurrent, "max_waiting": max_waiting}
    more: dict[str, Any] = {"api_key": api_key, "name": name, "engine": engine, "threads": threads}
    more |= {"half_cache": half_cache, "trust_remote_code": trust_remote_code, "allow_special": allow_special}
    more |= {"cors": cors, "page": ui, "max_memory": max_memory}
    call("serve", paths, host=host, port=port, **limits, **more)


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run or checkpoint folder, here or in a store.")],
    format: Annotated[
        str, typer.Option("--format", help=f"{', '.join(formats())}, or all; hf is our packed folder.")
    ] = "hf",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Folder to write; default: RUN/FORMAT, RUN/packed for hf; for all, OUT/FORMAT."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and stop.")] = False,
    force: Force = False,
    trust_remote_code: TrustRemoteCode = False,
    **settings: str | int | None,
) -> None:
    """Write a run in another format, and verify the result.

    \b
    Example:
      wf export outputs/fairy2_tiny_w2 --format hf --out tiny-w2
      wf export outputs/bitdistill_tiny_stage2_pretrain --format gguf
      wf export outputs/bitdistill_tiny_stage2_pretrain --format all
    """
    if out is None and "://" in run:
        raise typer.BadParameter("a run in a store needs a folder here to write to", param_hint="--out")
    call("export", run, format, out, force, trust_remote_code, dry_run=dry_run, **settings)


def with_format_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command` the options that the export formats define, in addition to its own."""
    stated = {name: spec for name, (_, spec) in options().items()}
    words = {name: {str(choice): choice for choice in spec.get("choices", [])} for name, spec in stated.items()}

    @functools.wraps(command)
    def wrapped(**values: Any) -> None:
        command(**{name: words.get(name, {}).get(value, value) for name, value in values.items()})

    signature = inspect.signature(command)
    kept = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    more = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                (Literal[tuple(words[name])] if words[name] else int) | None,
                typer.Option(help=spec["help"], min=spec.get("min")),
            ],
        )
        for name, spec in stated.items()
    ]
    wrapped.__signature__ = signature.replace(parameters=[*kept, *more])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in [*kept, *more]}
    return wrapped


app.command()(with_format_options(export))


@app.command()
def push(
    repo: Annotated[str, typer.Argument(metavar="ORG/NAME", help="The model's name on the hub.")],
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A folder that `wf export` wrote, or a run.")],
    private: Annotated[bool, typer.Option("--private", help="If it is new, only you can see it.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files and stop.")] = False,
    message: Annotated[str | None, typer.Option("--message", help="What the commit says.")] = None,
) -> None:
    """Upload an exported folder with its card to a hub of models.

    \b
    Example:
      wf push me/tiny-w2 outputs/fairy2_tiny_w2 --dry-run
      wf push me/tiny-w2 outputs/fairy2_tiny_w2/packed --private
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0")  # uploads take minutes
    call("push", repo, path, private=private, dry_run=dry_run, message=message)


@app.command()
def compare(
    model: Annotated[str, typer.Option("--model", "-m", help="A config's name, a local folder or a hub id.")],
    methods: Annotated[
        str | None,
        typer.Option(help="Methods or trainings; default: fairy2_w2,fairy2_w1,bitdistill,anemll_q2a4."),
    ] = None,
    references: Annotated[
        str | None, typer.Option(help="Models without training, or none; default: those whose packages are installed.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method.")] = 1,
    steps: Annotated[int | None, typer.Option(min=0, help="Steps of each run.")] = None,
    budget: Annotated[str | None, typer.Option("--budget", help="Time of each run, such as 2h or 90m.")] = None,
    fit_bytes: Annotated[
        str | None, typer.Option("--fit-bytes", help="Mix bits by layer so that the whole file has such a size: 60MB.")
    ] = None,
    bits: Annotated[
        float | None, typer.Option(min=0, help="Mix bits by layer to so many per quantized weight, such as 1.8.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder; default: outputs/compare_MODEL.")] = None,
    nproc: Processes = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs and stop.")] = False,
    as_json: AsJson = False,
    force: Force = False,
    overrides: Overrides = None,
) -> None:
    """Compare methods on one model, on equal terms.

    Finished runs are kept, and an interrupted comparison goes on.

    \b
    Example:
      wf compare -m tiny --budget 4m
      wf compare -m FOLDER --methods fairy2_w2,bitdistill --budget 2h --seeds 3
      wf compare -m FOLDER --fit-bytes 60MB --budget 2h
    """
    chosen: dict[str, Any] = {"methods": methods, "references_named": references, "seeds": seeds, "steps": steps}
    chosen |= {"fit_bytes": fit_bytes, "bits": bits, "processes": nproc, "dry_run": dry_run, "as_json": as_json}
    call("compare", model, **chosen, budget=budget, out=out, force=force, overrides=overrides or [])


@app.command()
def config(overrides: Overrides = None) -> None:
    """Print all settings, as YAML.

    \b
    Example:
      wf config model=smollm2_135m training=fairy2_w1 training.lr=5e-5
    """
    call("show_config", overrides or [])


@app.command()
def methods(as_json: AsJson = False) -> None:
    """List all methods, objectives, schedules and formats.

    \b
    Example:
      wf methods
    """
    call("methods", as_json)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check this machine: devices, compiler, extras, disk, hub.

    \b
    Example:
      wf doctor
    """
    call("doctor", as_json=as_json)


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the runs are.")] = Path("outputs"),
    as_json: AsJson = False,
) -> None:
    """List the runs in a folder with their last figures.

    \b
    Example:
      wf runs
      wf runs /data/outputs
    """
    call("runs", folder, as_json)


@app.command()
def plan(
    model: Annotated[str, typer.Option("--model", "-m", help="A config's name, a local folder or a hub id.")],
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of one machine.")] = 1,
    nodes: Annotated[int, typer.Option(min=1, help="Number of machines.")] = 1,
    cloud: Annotated[str, typer.Option("--cloud", "-c", help="Whose GPUs, links and prices.")] = DEFAULT_CLOUD,
    spot: Annotated[bool, typer.Option("--spot", help="Machines that may be taken away.")] = False,
    as_json: AsJson = False,
    overrides: Overrides = None,
) -> None:
    """Estimate hours, memory, links and cost of a training.

    \b
    Example:
      wf plan -m qwen3_4b training=fairy2_w2 distributed=fsdp_multi \\
        --gpus 8 --nodes 4
    """
    chosen: dict[str, Any] = {"cloud": cloud, "gpus": gpus, "nodes": nodes, "spot": spot, "as_json": as_json}
    call("plan", [f"model={model}", *(overrides or [])], **chosen)


@app.command()
def logs(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A job, or wf-VERB-train for the newest of a verb.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
) -> None:
    """Show what a job has written, here or on a cloud.

    \b
    Example:
      wf logs wf-fairy2-train
      wf logs wf-fairy2-tiny-w2-3f2a -f
    """
    call("logs", name, follow)


@app.command()
def cancel(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A job, or wf-VERB-train for the newest of a verb.")],
) -> None:
    """End a job; one on this machine saves a checkpoint first.

    \b
    Example:
      wf cancel wf-fairy2-tiny-w2-3f2a
    """
    call("cancel", name)


@app.command("wandb-status")
def wandb_status(
    project: Annotated[str, typer.Option("--project", "-p", help="A W&B project.")] = "wrinklefree-fairy2",
    entity: Annotated[
        str | None, typer.Option("--entity", "-e", envvar="WANDB_ENTITY", show_envvar=False, help="Whose project.")
    ] = None,
    number: Annotated[int, typer.Option("-n", min=1, help="How many runs.")] = 5,
) -> None:
    """Show the newest runs of a Weights & Biases project.

    \b
    Example:
      wf wandb-status -p wrinklefree-fairy2
    """
    call("wandb_status", project, entity, number)


def call(command: str, *args: Any, **kwargs: Any) -> None:
    """Import `wrinklefree.commands.<command>` and call its `run`. Errors are shown as by `reported`.

    An address such as gs://bucket/run among `args` becomes the path of its copy.
    """

    def work() -> None:
        given = [here(arg) for arg in args]
        importlib.import_module(f"wrinklefree.commands.{command}").run(*given, **kwargs)

    reported(work)


def here(argument: Any) -> Any:
    """`argument`, with the paths of copies in place of addresses."""
    if "://" not in str(argument):
        return argument  # without an import of torch
    from wrinklefree.training import storage

    return storage.local_copies(argument)


def reported(work: Callable[[], None]) -> None:
    """Call `work`. An error becomes a message on standard error and an exit code.

    | code | meaning |
    |---|---|
    | 1 | a defect in this package; WF_DEBUG=1 shows the traceback |
    | 2 | a mistake that the user can fix (UserError) |
    | 130, 143, 129 | Ctrl-C, SIGTERM, SIGHUP |
    """
    debug = os.environ.get("WF_DEBUG") == "1"
    try:
        _quiet(debug)
        work()
    except UserError as error:
        _fail("\n".join(f"error: {line}" for line in str(error).splitlines()), 2, debug)
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT
        _fail("interrupted", 128 + number, debug=False)
    except BrokenPipeError:
        raise  # the reader has gone, as in `wf runs | head`: Typer then ends without a message
    except Exception as error:  # the only place that catches everything: a traceback tells a user nothing
        text = f"internal error: {type(error).__name__}: {error}"
        _fail(f"{text}\nrerun with WF_DEBUG=1 for the traceback", 1, debug)


def _fail(message: str, code: int, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    print(message, file=sys.stderr)
    raise typer.Exit(code)


def _quiet(debug: bool) -> None:
    """Show log lines of this package only: no warnings or progress bars of libraries, unless the environment asks."""
    from wrinklefree.tracking.terminal import show_log_lines

    show_log_lines()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not debug and not sys.warnoptions:
        warnings.simplefilter("ignore")


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt(number)


def _end_as_by_ctrl_c() -> None:
    """Let SIGTERM and SIGHUP unwind the stack: half-written folders are removed, and what was set aside is put back.

    A process of torchrun dies at once instead: it may wait for the others in C, where no handler runs. A signal that is
    ignored stays so, as SIGHUP is under nohup.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if "RANK" not in os.environ and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _interrupt)


def main(args: list[str] | None = None) -> None:
    """Run `wf` with `args`, by default the command line, and exit with its exit code."""
    _end_as_by_ctrl_c()
    try:
        app(args, prog_name="wf")
    except SystemExit as ended:
        # A process of torchrun whose last work was sharded may abort inside torch while it exits: skip the clean-up.
        if "RANK" in os.environ:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(int(ended.code or 0))
        raise


if __name__ == "__main__":
    main()
