"""Runs the whole product on one small model, and checks from outside what it says of itself.

train       prepare, train 4 steps, pack, read back, certify
resume      go on from step 2: the same weights as without a stop
final       read the trained model back; generate
packed      read the packed folder back; the same tokens, alone and in a left-padded batch
export      wf export, as a packed folder and as GGUF if the architecture has one
checks      what nobody says: layers that are never called, documents that see each other, another loss
"""

import contextlib
import copy
import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from benchmarks.families.small import WORDS, small_model
from wrinklefree.commands import export as export_command
from wrinklefree.config.compose import load_config
from wrinklefree.config.schema import Config
from wrinklefree.core.batch import Batch, places
from wrinklefree.core.errors import UserError
from wrinklefree.core.method import quant_layers
from wrinklefree.core.surgery import language_part
from wrinklefree.distributed.world import World
from wrinklefree.evaluate import speed
from wrinklefree.export.proof import loader
from wrinklefree.generate.generate import complete
from wrinklefree.gguf.architectures import WRITTEN_AS
from wrinklefree.models.load import load_model
from wrinklefree.objectives.documents import keeps_apart
from wrinklefree.objectives.language_model import SplitModel, vocabulary_losses
from wrinklefree.packed.products.choose import exactly
from wrinklefree.runs import stage
from wrinklefree.runs.setup import open_run

CPU = World(0, 1, torch.device("cpu"))
STEPS, LENGTH = 4, 32
SCALE = 30.0  # the size of logits at which caps and scales show
CLOSE = 1e-3  # relative to the largest


@dataclass
class Result:
    """What came of one family. `where` is the step that did not end well, `reason` says why."""

    family: str
    verdict: str = "whole"  # whole, partial, refused, traceback or silent
    where: str = ""
    reason: str = ""
    share: float = 0.0  # of block weights that are quantized
    silent: list[str] = field(default_factory=list)
    unreadable: bool = False  # whether what a training left could not be read
    exports: list[str] = field(default_factory=list)
    loader: bool = False  # whether the packed folder's own loader was tried
    seconds: float = 0.0


def run_family(family: str, folder: Path, result: Result) -> None:
    """Run everything on one family, and fill in `result`. Raises whatever the product raises."""
    speed.SPEED_TOKENS, stage.NUM_SAMPLES = 4, 1
    result.where = "make"
    model = small_model(family)
    write_toy(folder, model)
    result.where = "train"
    config = settings(folder)
    stage.train_stage(config, force=True)
    result.unreadable = True
    result.where = "resume"
    check_resume(folder, result)
    result.where = "final"
    trained, tokenizer = load_model(folder / "run" / "final")
    complete(trained, tokenizer, "w5 w6 w7", max_new_tokens=4)
    result.share = quantized_share(trained)
    result.where = "packed"
    packed, _ = load_model(folder / "run" / "packed", dtype=torch.float32)
    complete(packed, tokenizer, "w5 w6 w7", max_new_tokens=4)
    result.unreadable = False
    check_tokens(model, trained, packed, result)
    result.where = "export"
    export_all(folder, trained, result)
    result.where = "checks"
    check_layers(trained, result)
    check_documents(config, trained, result)
    check_loss(config, result)
    result.where = ""


def write_toy(folder: Path, model: PreTrainedModel) -> None:
    """Write the model with a tokenizer of one token a character, and text longer than a row."""
    model.save_pretrained(folder / "toy")
    tokenizer().save_pretrained(folder / "toy")
    (folder / "text").mkdir()
    for number in range(40):
        words = (f"w{(7 * number + place) % 90 + 10}" for place in range(11))
        (folder / "text" / f"{number:02}.txt").write_text(" ".join(words))


def tokenizer() -> PreTrainedTokenizerBase:
    """One token a character of ASCII; ids 0 to 3 are special."""
    # Byte-level BPE, since transformers gives the models of some families their own class, and that is one.
    letters = [chr(code) for code in range(33, 127)] + ["\u0120"]  # a space
    words = {name: number for number, name in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *letters])}
    inner = Tokenizer(models.BPE(words, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    names = {"unk_token": "<unk>", "eos_token": "<eos>", "pad_token": "<pad>", "bos_token": "<bos>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def settings(folder: Path, *more: str) -> Config:
    """The settings of a run of seconds."""
    values = {"max_steps": STEPS, "batch_size": 2, "max_seq_length": LENGTH, "lr": 1e-3, "precision": "fp32"}
    values |= {"start": "plain", "blockwise.enabled": "false", "save_interval": 2, "save_total_limit": 4}
    values |= {"log_interval": 1, "eval_interval": 4, "eval_tokens": 64, "final_eval_tokens": 64}
    paths = [f"model={folder / 'toy'}", "data=local", f"data.path={folder / 'text'}", f"output_dir={folder / 'run'}"]
    return load_config(
        [
            *paths,
            "training=fairy2_w2",
            "export.snap_scales=false",
            *(f"training.{k}={v}" for k, v in values.items()),
            *more,
        ]
    )


def check_resume(folder: Path, result: Result) -> None:
    """Go on from step 2, and compare the weights."""
    whole = load_file(folder / "run" / "final" / "model.safetensors")
    other = folder / "resumed"
    more = [f"output_dir={other}", f"training.resume_from={folder / 'run/checkpoints/step_2'}", "training.pack=false"]
    stage.train_stage(settings(folder, *more), force=True)
    again = load_file(other / "final" / "model.safetensors")
    if whole.keys() != again.keys() or not all(torch.equal(whole[name], again[name]) for name in whole):
        result.silent.append("a resumed training ends in other weights")


def quantized_share(model: PreTrainedModel) -> float:
    """The share of block weights that is quantized.

    Block weights are all parameters of two or more dimensions, but those of embeddings, of the output head, and of
    what is for images or sounds.
    """
    head, part = model.get_output_embeddings(), language_part(model)[1]
    outside = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    outside |= set() if head is None else {id(head.weight)}
    layers = quant_layers(model).values()
    quantized = {id(layer.weight) for layer in layers}
    outside |= {id(p) for layer in layers for p in layer.parameters()} - quantized  # scales
    blocks = {id(p): p.numel() for p in part.parameters() if p.ndim >= 2 and id(p) not in outside}
    return sum(n for key, n in blocks.items() if key in quantized) / max(1, sum(blocks.values()))


def tokens_of(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> list[list[int]]:
    """Eight greedy tokens after each row."""
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        return model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :].tolist()


def check_tokens(original: PreTrainedModel, trained: PreTrainedModel, packed: PreTrainedModel, result: Result) -> None:
    """Compare tokens of the packed model with the trained one's: alone, and in a batch padded on the left."""
    long, short = torch.arange(20, 32), torch.arange(40, 47)
    padded = torch.stack([long, torch.cat([torch.zeros(5, dtype=torch.int64), short])])
    mask = torch.ones_like(padded)
    mask[1, :5] = 0
    trained = as_stored(trained, packed)
    with exactly(packed):
        alone = [tokens_of(m, long[None], torch.ones(1, 12, dtype=torch.int64)) for m in (trained, packed)]
        batches = [tokens_of(m, padded, mask) for m in (trained, packed)]
    if alone[0] != alone[1]:
        result.silent.append("the packed model generates other tokens")
    if batches[0] != batches[1]:
        result.silent.append("the packed model generates other tokens in a left-padded batch")


def as_stored(trained: PreTrainedModel, packed: PreTrainedModel) -> PreTrainedModel:
    """The trained model with what is not quantized rounded as the packed folder stores it."""
    trained = copy.deepcopy(trained)
    stored = dict(packed.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, parameter in trained.named_parameters(remove_duplicate=False):
            if name in stored:
                parameter.copy_(stored[name])
    return trained.eval()


def export_all(folder: Path, trained: PreTrainedModel, result: Result) -> None:
    """Write every format that the model's architecture has."""
    formats = ["hf", *(["gguf"] if type(trained).__name__ in WRITTEN_AS else [])]
    for name in formats:
        try:
            export_command.run(folder / "run", name, folder / name, force=True)
        except UserError as error:
            if name == "hf":
                raise
            result.exports.append(f"no {name}: {error}")
        else:
            result.exports.append(name)


def check_layers(model: PreTrainedModel, result: Result) -> None:
    """Name quantized layers that the model does not call, and output heads that are quantized."""
    called: set[str] = set()
    layers = quant_layers(model)
    handles = [
        layer.register_forward_hook(lambda module, inputs, output, fqn=fqn: called.add(fqn))
        for fqn, layer in layers.items()
    ]
    ids = torch.arange(4, 124).view(4, 30)
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
        for handle in handles:
            handle.remove()
        never = sorted({role(fqn) for fqn in layers} - {role(fqn) for fqn in called})
        for fqn, layer in layers.items():
            if role(fqn) in never:
                layer.weight.neg_()
        if torch.equal(model(input_ids=ids, use_cache=False).logits, before):
            never = []  # nothing else uses them either, so it does not matter what they are
        for fqn, layer in layers.items():
            if role(fqn) in never:
                layer.weight.neg_()
    result.silent += [f"quantized, but never called: {name}" for name in never]
    result.silent += [f"the output head is quantized: {n}" for n, m in layers.items() if m.out_features == WORDS]


def role(fqn: str) -> str:
    """A name without its numbers: layers with the same role do the same work."""
    return ".".join("*" if part.isdigit() else part for part in fqn.split("."))


def check_documents(config: Config, model: PreTrainedModel, result: Result) -> None:
    """Change the first document of a training row, and see whether a later one changes."""
    with quiet(), open_run(settings(Path(config.output_dir).parent), force=True, world=CPU) as run:
        row = one_row(next(run.stream()), 1)  # a document is longer than the first row, and ends in the second
    starts = ((places(row) == 0)[0, 1:] & row["labels"][0, 1:].eq(-100)).nonzero().flatten() + 1
    long = [start for start in starts.tolist() if row["labels"][0, start + 1 : start + 2].ne(-100).any()]
    if not long:
        return
    changed = {name: tensor.clone() for name, tensor in row.items()}
    changed["input_ids"][0, : long[0]] = 4 + (changed["input_ids"][0, : long[0]] + 11) % (WORDS - 8)
    with torch.no_grad():
        body = SplitModel(model)
        before, after = (body.states(batch)[0, long[0] :] for batch in (row, changed))
    if not torch.allclose(before, after, atol=1e-5, rtol=1e-4):
        result.silent.append("documents in one row see each other")


def one_row(batch: Batch, number: int) -> Batch:
    return {name: tensor[number : number + 1] for name, tensor in batch.items()}


def check_loss(config: Config, result: Result) -> None:
    """Compare the objective's loss with the model's own logits, which are as large as those of real models."""
    model, _ = load_model(config.model.pretrained, dtype=torch.float32)
    ids = torch.arange(4, 4 + LENGTH)[None]
    head = model.get_output_embeddings()
    with torch.no_grad():
        largest = model(input_ids=ids, use_cache=False).logits.abs().max()
        if head is not None:
            head.weight.mul_(SCALE / largest)
        logits = model(input_ids=ids, use_cache=False).logits
        own = F.cross_entropy(logits[0, :-1].float(), ids[0, 1:])
        positions = "position_ids" if keeps_apart(model) else "places"
        batch = {"input_ids": ids, "labels": ids, positions: torch.arange(LENGTH)[None]}
        loss = vocabulary_losses(SplitModel(model), None, batch, config.distillation).ce
    if not torch.allclose(own, loss, rtol=CLOSE, atol=CLOSE):
        result.silent.append(f"the loss is {loss:.3f}, by the model's own logits {own:.3f}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide what the product prints."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def without_loader() -> list[tuple[Path, Tensor, Tensor]]:
    """Leave out the process that proves a folder's own loader; return the list of proofs that are due."""
    due: list[tuple[Path, Tensor, Tensor]] = []
    loader.prove = lambda folder, ids, expected: due.append((folder, ids, expected))
    logging.getLogger("wrinklefree").setLevel(logging.ERROR)
    return due
