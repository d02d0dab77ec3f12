"""The work of the ANEMLL guide's scripts: train, convert, snap, generate text, and inspect layers."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qat_lora import evaluate_kd_loss, files, train_e2e
from qat_lora.files import Opened
from wrinklefree.config.compose import load_config, read_config
from wrinklefree.config.schema import Config as RunConfig
from wrinklefree.config.values import setting
from wrinklefree.core.errors import UserError
from wrinklefree.core.method import coverage, quant_layers
from wrinklefree.generate import generate
from wrinklefree.methods.anemll import Config, LutLinear, factored
from wrinklefree.models.find import model_folder
from wrinklefree.models.load import load_pretrained
from wrinklefree.runs import folder, launch, setup
from wrinklefree.runs.prerequisites import is_done
from wrinklefree.tracking.terminal import print_table
from wrinklefree.training.checkpoint import CONFIG, step_folders

PROMPTS = ("What is the capital of France?", "def fibonacci(n):", "What is 2+2?")
DEBUG_STEPS = 20

KEYS = ("bits", "rank", "attn_bits", "attn_rank")

Sizes = tuple[int, int, int, int]  # in the order of KEYS


def train(
    model_id: str, checkpoint: Path | None, output: Path, sizes: Sizes | None, overrides: list[str], force: bool
) -> None:
    """Train with the settings in `overrides`, from `checkpoint` or, if it is None, from the pretrained model.

    If `sizes` is None, bits and ranks are the checkpoint's. A `.pt` file is first converted to a checkpoint folder,
    `imported/` in the output folder. With frozen codes, the best model is also written as `BEST_FILE`.

    A run that the output folder holds is kept: a finished one in `earlier_1/` (or the next free number), and one that
    was interrupted goes on. `force` replaces it. Raises UserError for anything that the user can fix.
    """
    start: list[str] = []
    if checkpoint is not None:
        begun = starting_folder(checkpoint, model_id, output)
        start = [setting("training.start_from", [str(begun)])]
        sizes = sizes or sizes_of(begun)
    chosen = [f"method.{key}={value}" for key, value in zip(KEYS, sizes or (), strict=False)]
    settings = [f"model={model_id}", *chosen, *overrides, *start, setting("output_dir", str(output))]
    config = load_config(settings)
    with _beside_earlier(config, force) as resume:
        launch.run_stage([*settings, *resume], force=force)
    if config.method.view == "v2":
        best = files.open_checkpoint(output / files.BEST_FILE, model_id)
        files.save(best, output / files.BEST_FILE, force=True)
        print(f"wrote {output / files.BEST_FILE} (best model as a state dict)")


@contextmanager
def _beside_earlier(config: RunConfig, force: bool) -> Iterator[list[str]]:
    """Make room in the output folder, and yield the setting that resumes the run there if it was interrupted.

    A finished run is moved aside. It is moved back if the new one fails before it has written anything. If the new one
    starts from it, the training moves it later.
    """
    out = Path(config.output_dir)
    if force or not is_done(out) or folder.starts_within(config):
        begun = not force and not is_done(out) and step_folders(out / "checkpoints")
        yield ["training.resume_from=latest"] if begun else []
        return
    kept = folder.keep_earlier(out)
    try:
        yield []
    except BaseException:
        if not folder.outputs(out):
            for path in list(kept.iterdir()):
                path.rename(out / path.name)
            kept.rmdir()
        raise
    print(f"{out}: the run that was there is now in {kept}")


def sizes_of(folder: Path) -> Sizes:
    """The bits and ranks of a checkpoint folder. Raises UserError if its model has no lookup tables."""
    method = read_config(folder / CONFIG).method if (folder / CONFIG).is_file() else None
    if not isinstance(method, Config):
        raise UserError(f"{folder}: not trained with lookup tables; see `wf anemll`")
    return (method.bits, method.rank, method.attn_bits, method.attn_rank)


def starting_folder(checkpoint: Path, model_id: str, output: Path) -> Path:
    """The checkpoint folder to start from; a `.pt` file is converted to `output/imported`.

    Raises UserError if there is no checkpoint, or the file does not fit the model.
    """
    standing = files.standing_for(checkpoint)
    if standing.is_file():
        imported = output / "imported"
        files.save(files.open_state(checkpoint, model_id), imported, force=True)  # the same folder each time
        return imported
    found = model_folder(standing)
    if not (found / "config.json").is_file():
        raise UserError(f"{checkpoint}: no such file, and no run of ours in {found}")
    return found


def v1_to_v2(checkpoint: Path, output: Path, model_id: str, force: bool) -> None:
    """Freeze the codes of a V1 model, and print the largest difference of a logit before and after.

    Raises UserError if the model is V2 already.
    """
    files.check_free(output, force)
    opened = files.open_checkpoint(checkpoint, model_id)
    config = _method(opened)
    if config.view == "v2":
        raise UserError(f"{checkpoint}: is a V2 checkpoint already")
    _convert(opened, replace(config, view="v2", train="scales"), output, model_id)


def q4_to_q2(
    checkpoint: Path,
    output: Path,
    model_id: str,
    force: bool,
    ranks: tuple[int, int],
    bits: tuple[int, int],
    kmeans: bool,
    cache: Path | None,
) -> None:
    """Convert a trained model to other bits and ranks, each given as (MLP, attention).

    With `cache`, the held-out KD loss before and after is printed.
    """
    files.check_free(output, force)
    opened = files.open_checkpoint(checkpoint, model_id)
    sizes: dict[str, Any] = {"bits": bits[0], "attn_bits": bits[1], "rank": ranks[0], "attn_rank": ranks[1]}
    sizes["requantize"] = "kmeans" if kmeans else "refit"
    _convert(opened, replace(_method(opened), **sizes), output, model_id, cache)


def _method(opened: Opened) -> Config:
    assert isinstance(opened.config.method, Config)  # `open_checkpoint` has checked it
    return opened.config.method


@torch.no_grad()
def _convert(opened: Opened, config: Config, output: Path, model_id: str, cache: Path | None = None) -> None:
    """Prepare the model by another config, save it, and print a comparison of before and after."""
    ids = _some_ids(opened)
    losses = [_kd_loss(opened, cache)]
    before = opened.model(ids).logits
    size = _bits(opened)
    opened.config.method = config
    config.prepare(opened.model)
    after = opened.model.eval()(ids).logits
    files.save(opened, output, force=True)  # the caller has checked that `output` may be replaced
    kl = (before.softmax(-1) * (before.log_softmax(-1) - after.log_softmax(-1))).sum(-1).mean().item()
    losses.append(_kd_loss(opened, cache))
    rows = [["bits per quantized weight", f"{size:.3f}", f"{_bits(opened):.3f}"]]
    rows += [["of the blocks' weights, quantized", "", f"{coverage(opened.model).share:.1%}"]]
    rows += [["held-out KD loss", *losses]] if cache is not None else []
    rows += [["largest difference of a logit", "", f"{(after - before).abs().max().item():.2e}"]]
    rows += [["KL(before, after), random tokens", "", f"{kl:.2e}"]]
    print_table(["", "before", "after"], rows)
    print(f"\nwrote {output}; next:")
    print(f"python scripts/train_v2_simple.py --model-id {model_id} --v2-checkpoint {output} --cache-dir CACHE")


def _kd_loss(opened: Opened, cache: Path | None) -> str:
    """The loss on the held-out part of a KD cache, as text; empty without a cache."""
    if cache is None:
        return ""
    opened.config.distillation.cache = str(cache)
    value = setup.evaluator(opened.config, opened.tokenizer)(opened.model)["eval_kl"]
    opened.config.distillation.cache = None
    return f"{value:.4f}"


def _some_ids(opened: Opened) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, opened.model.config.vocab_size, (2, 64), generator=generator)


def _bits(opened: Opened) -> float:
    layers = quant_layers(opened.model).values()
    return sum(layer.encode().num_bits() for layer in layers) / sum(layer.weight.numel() for layer in layers)


@torch.no_grad()
def snap(
    checkpoint: Path,
    output: Path | None,
    model_id: str,
    force: bool,
    sizes: dict[str, int | None],
    fp16: bool,
    device: str,
    debug: bool,
) -> None:
    """Compare each layer's rank-by-rank product with its trained weight, save the model, and print a sample of text.

    `fp16` rounds every step of the product to fp16. `debug` prints every layer instead of the worst one.
    """
    if output is not None:
        files.check_free(output, force)
    place = _device(device)
    opened = files.open_checkpoint(checkpoint, model_id)
    _check_sizes(opened, sizes, checkpoint)
    opened.model.to(place)
    rows = []
    for fqn, layer in quant_layers(opened.model).items():
        assert isinstance(layer, LutLinear)
        x = torch.randn(16, layer.in_features, generator=torch.Generator().manual_seed(0)).to(opened.model.device)
        expected, by_rank = F.linear(x, layer.effective_weight(x.dtype), layer.bias), factored(layer, x, fp16)
        rows.append((((by_rank - expected).norm() / expected.norm()).item(), fqn, str(len(layer.scale_B))))
    shown = rows if debug else [max(rows)]
    head = ["" if debug else "worst layer", "rank", f"error rank by rank in {'fp16' if fp16 else 'fp32'}"]
    print_table(head, [[fqn, rank, f"{error:.1e}"] for error, fqn, rank in shown])
    if output is not None:
        files.save(opened, output, force=True)
        print(f"\nwrote {output}: table entries, A with its magnitudes, and B, all in fp16; config.json is beside it")
    answer = generate.reply(opened.model, opened.tokenizer, PROMPTS[0], 48, temperature=0, thinking=False)
    print(f"\n> {PROMPTS[0]}\n{answer}")


def _device(name: str) -> str:
    """The torch device for `--device`; `auto` is the GPU if there is one. Raises UserError for a missing device."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return "cuda" if there["cuda"] else "cpu"
    if not there[name]:
        raise UserError(f"--device {name}: this machine has none; leave it out")
    return name


def _check_sizes(opened: Opened, sizes: dict[str, int | None], path: Path) -> None:
    """Raise UserError if bits or ranks that the user gave differ from the checkpoint's."""
    for fqn, layer in quant_layers(opened.model).items():
        assert isinstance(layer, LutLinear)
        prefix = "attn_" if _method(opened).is_attention(fqn) else ""
        for name, actual in (("lut_bits", layer.config.bits), ("scale_rank", len(layer.scale_B))):
            wanted = sizes.get(prefix + name)
            if wanted not in (None, actual):
                flag = f"--{prefix}{name}".replace("_", "-")
                raise UserError(f"{flag} {wanted}: {path} has {actual} ({fqn}); leave the flag out to use that")


def inference(
    checkpoint: Path,
    model_id: str,
    prompt: str | None,
    interactive: bool,
    sizes: dict[str, int | None],
    version: str | None,
    max_tokens: int,
    temperature: float,
    repetition_penalty: float,
    thinking: bool,
) -> None:
    """Answer `prompt`, lines from the terminal if `interactive`, or else PROMPTS.

    Raises UserError if `sizes` or `version` differ from the checkpoint's.
    """
    if temperature < 0 or repetition_penalty <= 0:
        raise UserError("--temperature is 0 or more, --repetition-penalty more than 0 (1 is none)")
    opened = files.open_checkpoint(checkpoint, model_id)
    _check_sizes(opened, sizes, checkpoint)
    if version not in (None, _method(opened).view):
        raise UserError(f"--version {version}: {checkpoint} is {_method(opened).view}; leave it out")
    print(
        f"{checkpoint}: {_method(opened).view}, {_bits(opened):.2f} bits per quantized weight; "
        f"{coverage(opened.model).words}"
    )
    model, tokenizer = opened.model, opened.tokenizer
    more: dict[str, Any] = {"repetition_penalty": repetition_penalty, "thinking": thinking}
    if interactive:
        generate.interactive(model, tokenizer, bool(tokenizer.chat_template), max_tokens, temperature, **more)
        return
    for each in PROMPTS if prompt is None else (prompt,):
        print(f"\n> {each}\n{generate.reply(model, tokenizer, each, max_tokens, temperature, **more)}")


def debug_layer(
    model_id: str,
    checkpoint: Path | None,
    bits: int,
    rank: int,
    group_size: int,
    number: int | None,
    grad: bool,
    cache: Path | None,
) -> None:
    """Print the quantized layers of a model, or layer `number` only, with their errors.

    `grad` adds the norm of a gradient. With `cache`, the scales of layer `number` are trained, and the KD loss before
    and after is printed. Raises UserError if there is no such layer.
    """
    model, tokenizer = _fitted(model_id, checkpoint, bits, rank, group_size)
    layers = list(quant_layers(model).items())
    if number is not None and not 0 <= number < len(layers):
        raise UserError(f"--layer {number}: the model has layers 0 to {len(layers) - 1}")
    chosen = enumerate(layers) if number is None else [(number, layers[number])]
    rows = [[str(i), fqn, *_described(layer, grad)] for i, (fqn, layer) in chosen if isinstance(layer, LutLinear)]
    head = ["", "layer", "bits", "rank", "weight error"] + ["gradient of A"] * grad
    print_table(head, rows)
    if cache is not None and number is not None:
        _train_alone(model, tokenizer, layers[number], cache)


def _fitted(model_id: str, checkpoint: Path | None, bits: int, rank: int, group_size: int) -> tuple[Any, Any]:
    """The model of `checkpoint`, or the pretrained model with lookup tables fitted now, and its tokenizer."""
    if checkpoint is not None:
        opened = files.open_checkpoint(checkpoint, model_id)
        return opened.model, opened.tokenizer
    sizes = {"bits": bits, "attn_bits": bits, "rank": rank, "attn_rank": rank, "group_size": group_size}
    settings = [f"method.{key}={value}" for key, value in sizes.items()]
    config = load_config([f"model={model_id}", "training=anemll_q2a4", "data=stdlib", *settings])
    model, tokenizer = load_pretrained(config.model)
    assert config.method is not None
    return config.method.prepare(model), tokenizer


def _train_alone(model: Any, tokenizer: Any, named: tuple[str, Any], cache: Path) -> None:
    """Train the scales of one layer for a few steps, and print the KD loss before and after. No run is kept."""
    fqn, layer = named
    model.requires_grad_(False)
    for factor in (layer.scale_A, layer.scale_B):
        factor.requires_grad_(True)
    before = evaluate_kd_loss(model, tokenizer, cache)
    with tempfile.TemporaryDirectory() as folder:
        after = train_e2e(model, tokenizer, cache, folder, max_steps=DEBUG_STEPS, lr=1e-4, batch_size=2)
    print_table([fqn, "before", f"after {DEBUG_STEPS} steps"], [["held-out KD loss", f"{before:.6f}", f"{after:.6f}"]])


def _described(layer: LutLinear, grad: bool) -> list[str]:
    """Bits, rank and weight error of a layer, with `grad` also a gradient norm, as cells of a table."""
    codes = layer.encode()
    error = (layer.decode(codes) - layer.weight).norm() / layer.weight.norm()
    figures = [str(codes.bits), str(len(layer.scale_B)), f"{error.item():.4f}"]
    if grad:
        layer.zero_grad()
        layer(torch.randn(1, 10, layer.in_features, generator=torch.Generator().manual_seed(0))).sum().backward()
        gradient = layer.scale_A.grad
        figures.append("none" if gradient is None else f"{gradient.norm().item():.3e}")
    return figures
