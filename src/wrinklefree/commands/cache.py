"""`wf cache`: what a teacher thinks of each next token, written once (data/kd_cache.py says in which form).

Text is packed into sequences as for training, the teacher reads each once, and its likeliest words go into shards. What
is interrupted goes on at the first shard that is missing, and gives the same bytes.
"""

import dataclasses
import itertools
import json
import logging
import pickle
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt, PositiveInt, TypeAdapter, ValidationError
from torch import Tensor
from transformers import AutoTokenizer

from wrinklefree.config.compose import load_config
from wrinklefree.config.schema import Config
from wrinklefree.core.errors import UserError
from wrinklefree.core.fingerprint import fingerprint, model_fingerprint
from wrinklefree.data.kd_cache.manifest import Manifest
from wrinklefree.data.kd_cache.read import batch_of, sequences
from wrinklefree.data.kd_cache.write import append, begin, finish
from wrinklefree.data.open import heldout_batches, training_stream
from wrinklefree.data.packing import BatchStream
from wrinklefree.data.sources import Split
from wrinklefree.data.tokenizer import tokenizer_fingerprint
from wrinklefree.distributed.world import join_world, leave_world
from wrinklefree.models.find import resolve_pretrained
from wrinklefree.models.load import load_pretrained
from wrinklefree.objectives.language_model import BodyAndHead
from wrinklefree.objectives.losses import CHUNK, NEVER
from wrinklefree.tracking.progress import Bar, Clock, Lines
from wrinklefree.tracking.terminal import short_size
from wrinklefree.training.plan import choose_dtype, choose_length

log = logging.getLogger("wrinklefree")

HOLDOUT_EVERY = 20  # imported sequences, of which one is held out

# What torch's unpickler lets through of files that are damaged, or never were its own.
UNREADABLE = (
    *(RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError, AttributeError, AssertionError),
    *(pickle.UnpicklingError, struct.error),
)

Shard = dict[str, Tensor]


def run(
    out: Path,
    *,
    model: str | None = None,
    import_from: Path | None = None,
    force: bool = False,
    overrides: list[str] | None = None,
    **sizes: Any,
) -> None:
    """Write a cache into `out`, or take one over. `sizes` are fields of `kd_cache.Manifest`.

    Raises UserError for anything the user can mend.
    """
    if import_from is not None:
        finished = take_over(import_from, out, model, force)
    else:
        finished = write(settings(model or "tiny", sizes.pop("length"), overrides or []), out, force, **sizes)
    total = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    print(
        f"wrote {out}/: {finished.count('train')} sequences, {finished.count('heldout')} held out, {short_size(total)}"
    )
    print(f"next: wf train training.objective=cached_kd distillation.cache={out}")


def settings(model: str, length: int | None, overrides: list[str]) -> Config:
    """The config of the teacher and its text."""
    for override in overrides:
        if not override.startswith(("data", "task=", "seed=", "training.batch_size=", "training.precision=")):
            raise UserError(f"{override}: wf cache takes data.*, seed, training.batch_size and training.precision")
    sized = [f"training.max_seq_length={length}"] if length else []
    return load_config([f"model={model}", "training=full_precision", *sized, *overrides])


def write(config: Config, out: Path, force: bool, **sizes: Any) -> Manifest:
    """A cache of the teacher `config.model` on `config.data`; goes on where one was begun."""
    world = join_world()
    log.info("loading %s", config.model.pretrained)
    teacher, tokenizer = load_pretrained(config.model)
    length = choose_length(config.training.max_seq_length, teacher, None)
    size, wanted_tokens = config.training.batch_size, sizes["num_heldout"] * length
    held_out = heldout_batches(config.data, tokenizer, batch_size=size, length=length, max_tokens=wanted_tokens)
    heldout = _joined([sequences(batch) for batch in held_out])
    data = dataclasses.asdict(config.data)
    if sizes["topk"] + sizes["negatives"] > teacher.config.vocab_size:
        raise UserError(f"--topk, --rand-neg: more words than the {teacher.config.vocab_size} of the vocabulary")
    dtype = choose_dtype(config.training.precision, world.device)
    wanted = _manifest(
        teacher=config.model.pretrained,
        teacher_fingerprint=model_fingerprint(teacher.state_dict()),
        precision=str(dtype).removeprefix("torch."),
        tokenizer=tokenizer.name_or_path,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        data=data,
        data_fingerprint=fingerprint([data, heldout["input_ids"].tolist()]),
        vocab_size=teacher.config.vocab_size,
        length=length,
        tail="exact",
        seed=config.seed,
        **(sizes | {"num_heldout": len(heldout["input_ids"])}),
    )
    with begin(out, wanted, force=force) as manifest:
        if manifest.complete:
            log.info("%s is complete; --force writes it anew", out)
            return manifest
        log.info("precision %s on %s", manifest.precision, world.device)
        ask = Teacher(teacher.to(world.device), manifest, config.training.batch_size, dtype)
        stream = training_stream(config.data, tokenizer, batch_size=1, length=manifest.length, seed=config.seed)
        try:
            manifest = fill(out, manifest, ask, heldout, stream)
        finally:
            ask.progress.close()
        leave_world()
        return finish(out, manifest)


def _manifest(**values: Any) -> Manifest:
    try:
        return Manifest(**values)
    except ValueError as error:
        raise UserError(f"--topk, --rand-neg: {error}") from error


def fill(out: Path, manifest: Manifest, ask: "Teacher", heldout: Shard, stream: BatchStream) -> Manifest:
    """Write what is missing, shard by shard: first what is held out, then one pass over the data."""
    size = manifest.shard_size
    for start in range(manifest.count("heldout"), manifest.num_heldout, size):
        shard = {name: tensor[start : start + size] for name, tensor in heldout.items()}
        manifest = append(out, manifest, {"heldout": ask(shard, "heldout", start)}, None)
    if manifest.position is not None:
        stream.load_state_dict(manifest.position)
    while (done := manifest.count("train")) < manifest.num_train:
        read = read_shard(stream, min(size, manifest.num_train - done))
        if read is None:
            log.info("the data ends after %d sequences", done)
            break
        manifest = append(out, manifest, {"train": ask(read, "train", done)}, stream.state_dict())
    return manifest


def read_shard(stream: BatchStream, num: int) -> Shard | None:
    """The next sequences of the first pass over the data, `num` at most; None at its end."""
    found = []
    for batch in itertools.islice(stream, num):
        if stream.state_dict()["epoch"]:  # the sequence goes on in the second pass
            break
        found.append(sequences(batch))
    return _joined(found) if found else None


def _joined(parts: list[Shard]) -> Shard:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@dataclass(frozen=True, kw_only=True)
class Upstream:
    """What an import reads of `meta.json`."""

    format: Literal["qwen_kd_topk_cache_v1"]
    teacher_model: str
    tokenizer: str
    vocab_size: PositiveInt
    max_length: PositiveInt
    topk: PositiveInt
    num_sequences: PositiveInt
    rand_neg: NonNegativeInt = 0


class Teacher:
    """A model that adds its answers to a shard's sequences."""

    def __init__(self, model: Any, manifest: Manifest, batch_size: int, dtype: torch.dtype) -> None:
        self.decoder, self.manifest, self.batch_size, self.dtype = BodyAndHead(model), manifest, batch_size, dtype
        total, done = manifest.num_train + manifest.num_heldout, manifest.count("train") + manifest.count("heldout")
        self.progress = Bar(total, done) if sys.stdout.isatty() else Lines(total, "sequence")
        self.clock, self.device = Clock(total, done), model.device
        self.done = done

    def __call__(self, shard: Shard, split: Split, start: int) -> Shard:
        """The whole shard, whose first sequence has the number `start` in its split."""
        draw = torch.Generator().manual_seed(int(fingerprint([self.manifest.seed, split, start]), 16) >> 1)
        parts = range(0, len(shard["input_ids"]), self.batch_size)
        answers = [self._batch({name: x[i : i + self.batch_size] for name, x in shard.items()}, draw) for i in parts]
        return shard | _joined(answers)

    @torch.no_grad()
    def _batch(self, rows: Shard, draw: torch.Generator) -> Shard:
        """The answers to some sequences [n, L]."""
        batch = {name: tensor.to(self.device) for name, tensor in batch_of(rows).items()}
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            states, head = self.decoder.project(self.decoder.states(batch)[:, :-1].flatten(0, 1))
        head = head.to(states.dtype)
        answers = [self._answer(F.linear(part, head).float(), draw) for part in states.split(CHUNK)]
        num, places = len(rows["input_ids"]), self.manifest.length - 1
        self.done += num
        self.progress.show(self.done, f"ETA {self.clock.remaining(self.done)}")
        return {name: x.unflatten(0, (num, places)) for name, x in _joined(answers).items()}

    def _answer(self, logits: Tensor, draw: torch.Generator) -> Shard:
        """What is kept of logits [n, V], on the CPU."""
        likeliest, ids = logits.topk(self.manifest.topk, dim=-1)
        found = {"topk_ids": ids, "topk_logits": likeliest.half()}
        others = logits.scatter(-1, ids, NEVER)
        if self.manifest.negatives:
            chosen = scattered(len(logits), self.manifest.negatives, logits.shape[-1], draw).to(logits.device)
            found |= {"random_ids": chosen, "random_logits": others.gather(-1, chosen).half()}
            others = others.scatter(-1, chosen, NEVER)
        found["rest"] = others.logsumexp(-1)
        types = self.manifest.shapes(1)
        return {name: tensor.to("cpu", types[name][0]) for name, tensor in found.items()}


def scattered(num: int, per_row: int, vocab_size: int, draw: torch.Generator) -> Tensor:
    """Random words [num, per_row], in each row one of each of `per_row` equal parts of the vocabulary: distinct."""
    borders = torch.arange(per_row + 1) * vocab_size // per_row
    return borders[:-1] + (torch.rand(num, per_row, generator=draw, dtype=torch.float64) * borders.diff()).long()


# Taking over


def take_over(source: Path, out: Path, model: str | None, force: bool) -> Manifest:
    """A cache of `.pt` shards in our format; every 20th sequence is held out. Goes on where it was begun.

    What the other words weigh is not in it, but estimated from its random ones, or else not known. Its teacher read
    each block as one document, and so does the student.
    """
    meta, data, files = _upstream(source)
    tokenizer = AutoTokenizer.from_pretrained(resolve_pretrained(_tokenizer_name(meta, model)))
    wanted = _manifest(
        teacher=meta.teacher_model,
        teacher_fingerprint="",  # not recorded, nor is the precision
        precision="",
        tokenizer=tokenizer.name_or_path,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        data=data,
        data_fingerprint=fingerprint(data),
        vocab_size=max(meta.vocab_size, len(tokenizer)),
        length=meta.max_length,
        topk=meta.topk,
        negatives=meta.rand_neg,
        tail="sampled" if meta.rand_neg else "unknown",
        seed=0,
        shard_size=1024,
        num_train=meta.num_sequences,
        num_heldout=0,
    )
    with begin(out, wanted, force=force) as manifest:
        return manifest if manifest.complete else _translate_all(files, out, manifest)


def _translate_all(files: list[Path], out: Path, manifest: Manifest) -> Manifest:
    first = manifest.position["file"] if manifest.position else 0
    progress = Bar(len(files), first) if sys.stdout.isatty() else Lines(len(files), "file")
    for number, file in enumerate(files[first:], start=first):
        shard = translated(_load(file, manifest), manifest)
        held = torch.arange(len(shard["input_ids"])) % HOLDOUT_EVERY == 0
        new: dict[Split, Shard] = {"heldout": _rows(shard, held), "train": _rows(shard, ~held)}
        kept = {split: part for split, part in new.items() if len(part["input_ids"])}
        manifest = append(out, manifest, kept, {"file": number + 1})
        progress.show(number + 1, file.name)
    progress.close()
    found = manifest.count("train") + manifest.count("heldout")
    if found != manifest.num_train:
        log.info("%d sequences, of %d that meta.json says", found, manifest.num_train)
    return finish(out, manifest)


def _rows(shard: Shard, kept: Tensor) -> Shard:
    return {name: tensor[kept] for name, tensor in shard.items()}


def _upstream(source: Path) -> tuple[Upstream, dict[str, Any], list[Path]]:
    """The description, read and whole, and the shards of a cache of `.pt` files.

    Raises UserError where it is none, or shards are missing between others.
    """
    try:
        data = json.loads((source / "meta.json").read_text(encoding="utf-8"))
        meta = TypeAdapter(Upstream).validate_python(data)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise UserError(f"{source}/meta.json: {where}: {problem['msg']}: not a cache to import") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{source}/meta.json: missing or not JSON: not a cache to import") from error
    files = sorted(source.glob("shard_*.pt"))
    missing = [name for i, file in enumerate(files) if (name := f"shard_{i:05}.pt") != file.name]
    if missing or not files:
        raise UserError(f"{source}: no {missing[0] if missing else 'shard_*.pt'}")
    return meta, data, files


def _tokenizer_name(meta: Upstream, model: str | None) -> str:
    if model is None:
        return meta.tokenizer
    return load_config([f"model={model}"]).model.pretrained


def _load(file: Path, manifest: Manifest) -> Shard:
    """The tensors of one `.pt` shard. Raises UserError where it is broken, or not as described."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise UserError(f"{file}: truncated, or holds more than tensors") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{file}: truncated, or holds more than tensors")
    length, places = manifest.length, manifest.length - 1
    shapes = {"input_ids": (length,), "topk_idx": (places, manifest.topk), "topk_logits": (places, manifest.topk)}
    if manifest.negatives:
        shapes |= dict.fromkeys(("rand_idx", "rand_logits"), (places, manifest.negatives))
    for name, shape in shapes.items():
        if name not in found or not found[name].numel() or found[name].shape != (*found["input_ids"].shape[:1], *shape):
            raise UserError(f"{file}: no {name} of [n, {', '.join(map(str, shape))}], as meta.json says")
        if found[name].is_floating_point() != name.endswith("logits") or not found[name].isfinite().all():
            raise UserError(f"{file}: {name} are not numbers of their kind")
        if name.endswith(("ids", "idx")) and not 0 <= found[name].min() <= found[name].max() < manifest.vocab_size:
            raise UserError(f"{file}: {name} has ids outside of the {manifest.vocab_size} words of the tokenizer")
    return {name: found[name] for name in shapes}


def translated(old: Shard, manifest: Manifest) -> Shard:
    """An upstream shard in our names: positions and order are the same."""
    starts = torch.zeros_like(old["input_ids"], dtype=torch.uint8)
    starts[:, 0] = 1
    new = {"input_ids": old["input_ids"], "starts": starts, "learned": 1 - starts}
    new |= {"topk_ids": old["topk_idx"], "topk_logits": old["topk_logits"]}
    if manifest.negatives:
        new |= _random_words(old, manifest.vocab_size)
    return new


def _random_words(old: Shard, vocab_size: int) -> Shard:
    """Random words without those that are there already, and the log-sum-exp of all others that they let expect.

    Drawn with equal chances and replacement, the m of them outside of the top-k stand for all V - K words there:
    their sum of exponentials is (V - K) / m of the words' (an unbiased estimate).
    """
    topk, ids, logits = old["topk_idx"].long(), old["rand_idx"].long(), old["rand_logits"].float()
    ids, order = ids.sort(dim=-1)
    logits = logits.gather(-1, order)
    ordered = topk.sort(dim=-1).values
    place = torch.searchsorted(ordered, ids).clamp_max(topk.shape[-1] - 1)
    hit = ordered.gather(-1, place) == ids
    outside = logits.masked_fill(hit, NEVER).logsumexp(-1) - (~hit).sum(-1).clamp_min(1).log()
    tail = outside + torch.tensor(float(vocab_size - topk.shape[-1])).log()
    twice = torch.zeros_like(hit)
    twice[..., 1:] = ids[..., 1:] == ids[..., :-1]
    logits = logits.masked_fill(hit | twice, NEVER)
    share = (logits.logsumexp(-1) - tail).exp()  # of these words in that sum; the whole where all words were drawn
    rest = torch.where(share < 1, tail + torch.log1p(-share), NEVER)
    return {"random_ids": ids, "random_logits": logits.half(), "rest": rest}
