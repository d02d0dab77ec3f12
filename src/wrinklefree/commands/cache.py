"""`wf cache`: write a KD cache, which holds a teacher's predictions for each next token.

Text is packed into sequences as for training. The teacher reads each sequence once, and the logits of its likeliest
tokens are kept, in shards (`data/kd_cache/` has the format). An interrupted run continues with the first missing shard
and gives the same bytes as an uninterrupted one.
"""

import dataclasses
import itertools
import logging
import pickle
import shlex
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import NonNegativeInt, PositiveInt, TypeAdapter, ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from wrinklefree.config.base import first_problem
from wrinklefree.config.compose import load_config
from wrinklefree.config.schema import Config
from wrinklefree.config.values import setting
from wrinklefree.core.errors import UserError
from wrinklefree.core.files import read_json
from wrinklefree.core.fingerprint import fingerprint, model_fingerprint
from wrinklefree.data.kd_cache.manifest import IDENTITY, MANIFEST, Manifest, read_manifest
from wrinklefree.data.kd_cache.read import batch_of, sequences
from wrinklefree.data.kd_cache.write import append, begin, finish
from wrinklefree.data.open import heldout_batches, is_unwritten, training_stream
from wrinklefree.data.packing import BatchStream
from wrinklefree.data.preview import preview
from wrinklefree.data.sources import Split
from wrinklefree.data.tokenizer import tokenizer_fingerprint
from wrinklefree.distributed.world import join_world, leave_world
from wrinklefree.models.find import model_source, resolve_pretrained
from wrinklefree.models.load import load_pretrained, meta_model, open_tokenizer
from wrinklefree.objectives.language_model import SplitModel
from wrinklefree.objectives.losses import CHUNK, NEVER
from wrinklefree.runs import prerequisites, self_text
from wrinklefree.tracking.progress import Bar, Clock, Lines
from wrinklefree.tracking.terminal import short_size
from wrinklefree.training.plan import choose_dtype, choose_length

log = logging.getLogger("wrinklefree")

HOLDOUT_EVERY = 20  # one of so many imported sequences is held out

# The errors that `torch.load` raises for files that are damaged, or that torch did not write.
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
    dry_run: bool = False,
    force: bool = False,
    overrides: list[str] | None = None,
    **sizes: Any,
) -> None:
    """Write a cache into `out`, or convert the cache in `import_from`. `sizes` are fields of `Manifest`, and `length`.

    With `dry_run`, say what would be read and written.

    Raises UserError for anything that the user can fix.
    """
    if import_from is not None:
        finished = take_over(import_from, out, model, force)
        chosen = [setting("model", model or finished.tokenizer)]
    else:
        config = settings(model or "tiny", sizes.pop("length"), overrides or [])
        if dry_run:
            show(config, out, **sizes)
            return
        finished = write(config, out, force, **sizes)
        chosen = prerequisites.prerequisite(config, "fairy2_w2")
    total = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    print(
        f"wrote {out}/: {finished.count('train')} sequences, {finished.count('heldout')} held out, {short_size(total)}"
    )
    learn = ["training.objective=cached_kd", setting("distillation.cache", str(out))]
    print(f"next: {shlex.join(['wf', 'train', *chosen, *learn])}")


def settings(model: str, length: int | None, overrides: list[str]) -> Config:
    """The config of the teacher and its data. Raises UserError for an override that a cache does not use."""
    for override in overrides:
        if not override.startswith(("data", "task=", "seed=", "training.batch_size=", "training.precision=")):
            raise UserError(f"{override}: wf cache takes data.*, seed, training.batch_size and training.precision")
    sized = [f"training.max_seq_length={length}"] if length else []
    return load_config([f"model={model}", "training=full_precision", *sized, *overrides])


def show(config: Config, out: Path, **sizes: Any) -> None:
    """Say what `write` would read and write, and how large it gets. The model's weights are not loaded."""
    source = model_source(config.model.pretrained)
    teacher = meta_model(source, config.model.trust_remote_code)
    tokenizer = open_tokenizer(source, config.model.trust_remote_code)
    length = choose_length(config.training.max_seq_length, teacher, None)
    _check_words(teacher, sizes)
    if is_unwritten(config.data):
        log.info("%s", self_text.describe(config, tokenizer))
    else:
        preview(config.data, tokenizer)
    num_train, num_heldout = sizes["num_train"], sizes["num_heldout"]
    tokens = (num_train + num_heldout) * length
    asked = _manifest(
        teacher=config.model.pretrained,
        teacher_fingerprint="",
        precision="",
        tokenizer=tokenizer.name_or_path,
        tokenizer_fingerprint="",
        data={},
        data_fingerprint="",
        vocab_size=teacher.config.vocab_size,
        length=length,
        tail="exact",
        seed=config.seed,
        **sizes,
    )
    log.info("reads %s (%s parameters)", config.model.pretrained, f"{teacher.num_parameters():,}")
    log.info(
        "asks it about at most %s tokens: %s sequences of %d to train on, %s held out, if there is so much text",
        *(f"{tokens:,}", f"{num_train:,}", length, f"{num_heldout:,}"),
    )
    size = short_size(asked.predicted_bytes(num_train, num_heldout))
    log.info("writes at most %s into %s/%s", size, out, _what_is_there(out))
    log.info("how long that takes is shown with the first sequences")
    log.info("dry run: nothing was written")


def _what_is_there(out: Path) -> str:
    if not (out / MANIFEST).exists():
        return ""
    present = read_manifest(out)
    there = present.count("train") + present.count("heldout")
    return f", where {there:,} sequences are already{'; it is complete' if present.complete else ''}"


def _check_words(teacher: PreTrainedModel, sizes: Mapping[str, int]) -> None:
    if sizes["topk"] + sizes["negatives"] > teacher.config.vocab_size:
        raise UserError(f"--topk, --rand-neg: more tokens than the {teacher.config.vocab_size} of the vocabulary")


def write(config: Config, out: Path, force: bool, **sizes: Any) -> Manifest:
    """Write a cache of the teacher `config.model` on `config.data`, or continue an unfinished one in `out`."""
    world = join_world()
    log.info("loading %s", config.model.pretrained)
    teacher, tokenizer = load_pretrained(config.model)
    teacher.to(world.device)
    self_text.write(config, teacher, tokenizer, world)
    length = choose_length(config.training.max_seq_length, teacher, None)
    size, wanted_tokens = config.training.batch_size, sizes["num_heldout"] * length
    held_out = heldout_batches(config.data, tokenizer, batch_size=size, length=length, max_tokens=wanted_tokens)
    heldout = _joined([sequences(batch) for batch in held_out])
    stream = training_stream(config.data, tokenizer, batch_size=1, length=length, seed=config.seed)
    _check_words(teacher, sizes)
    dtype = choose_dtype(config.training.precision, world.device)
    wanted = _manifest(
        teacher=config.model.pretrained,
        teacher_fingerprint=model_fingerprint(teacher.state_dict()),
        precision=str(dtype).removeprefix("torch."),
        tokenizer=tokenizer.name_or_path,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        data=dataclasses.asdict(config.data) | {IDENTITY: stream.identity},
        data_fingerprint=fingerprint([stream.identity, heldout["input_ids"].tolist()]),
        vocab_size=teacher.config.vocab_size,
        length=length,
        tail="exact",
        seed=config.seed,
        **(sizes | {"num_heldout": len(heldout["input_ids"])}),
    )
    with begin(out, wanted, force=force, allow_changes=config.data.allow_changes) as manifest:
        if manifest.complete:
            log.info("%s is complete; --force writes it again", out)
            return manifest
        log.info("precision %s on %s", manifest.precision, world.device)
        ask = Teacher(teacher, manifest, config.training.batch_size, dtype)
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
    """Write the missing shards: first the held-out sequences, then one pass over the training data.

    Returns the manifest after the last shard.
    """
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
    """The next sequences of the stream, at most `num`; None once the first pass over the data has ended."""
    rows = []
    for batch in itertools.islice(stream, num):
        if stream.state_dict()["epoch"]:  # this sequence contains text of the second pass
            break
        rows.append(sequences(batch))
    return _joined(rows) if rows else None


def _joined(parts: list[Shard]) -> Shard:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@dataclass(frozen=True, kw_only=True)
class Upstream:
    """The fields of a foreign cache's `meta.json` that an import reads."""

    format: Literal["qwen_kd_topk_cache_v1"]
    teacher_model: str
    tokenizer: str
    vocab_size: PositiveInt
    max_length: PositiveInt
    topk: PositiveInt
    num_sequences: PositiveInt
    rand_neg: NonNegativeInt = 0


class Teacher:
    """Runs the teacher on shards of sequences, and shows the progress."""

    def __init__(self, model: Any, manifest: Manifest, batch_size: int, dtype: torch.dtype) -> None:
        self.decoder, self.manifest, self.batch_size, self.dtype = SplitModel(model), manifest, batch_size, dtype
        total, done = manifest.num_train + manifest.num_heldout, manifest.count("train") + manifest.count("heldout")
        self.progress = Bar(total, done) if sys.stdout.isatty() else Lines(total, "sequence")
        self.clock, self.device = Clock(total, done), model.device
        self.done = done

    def __call__(self, shard: Shard, split: Split, start: int) -> Shard:
        """Return the shard with the teacher's predictions added. Its first sequence is number `start` of `split`."""
        # Each shard has its own random numbers, so that a resumed cache draws the same ones.
        draw = torch.Generator().manual_seed(int(fingerprint([self.manifest.seed, split, start]), 16) >> 1)
        parts = range(0, len(shard["input_ids"]), self.batch_size)
        answers = [self._batch({name: x[i : i + self.batch_size] for name, x in shard.items()}, draw) for i in parts]
        return shard | _joined(answers)

    @torch.no_grad()
    def _batch(self, rows: Shard, draw: torch.Generator) -> Shard:
        """The predictions for sequences [n, L]: tensors [n, L - 1, ...]."""
        batch = {name: tensor.to(self.device) for name, tensor in batch_of(rows).items()}
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            states, head = self.decoder.output(self.decoder.states(batch)[:, :-1].flatten(0, 1))
            leaves = head.leaves(states.dtype)
            answers = [self._answer(head.logits(part, leaves).float(), draw) for part in states.split(CHUNK)]
        num, places = len(rows["input_ids"]), self.manifest.length - 1
        self.done += num
        self.progress.show(self.done, f"ETA {self.clock.remaining(self.done)}")
        return {name: x.unflatten(0, (num, places)) for name, x in _joined(answers).items()}

    def _answer(self, logits: Tensor, draw: torch.Generator) -> Shard:
        """What the cache keeps of logits [n, V], on the CPU: top-k, random tokens, and log-sum-exp of all others."""
        likeliest, ids = logits.topk(self.manifest.topk, dim=-1)
        kept = {"topk_ids": ids, "topk_logits": likeliest.half()}
        others = logits.scatter(-1, ids, NEVER)
        if self.manifest.negatives:
            chosen = scattered(len(logits), self.manifest.negatives, logits.shape[-1], draw).to(logits.device)
            kept |= {"random_ids": chosen, "random_logits": others.gather(-1, chosen).half()}
            others = others.scatter(-1, chosen, NEVER)
        kept["rest"] = others.logsumexp(-1)
        types = self.manifest.shapes(1)
        return {name: tensor.to("cpu", types[name][0]) for name, tensor in kept.items()}


def scattered(num: int, per_row: int, vocab_size: int, draw: torch.Generator) -> Tensor:
    """Random token ids [num, per_row], distinct within a row.

    The vocabulary is divided into `per_row` equal parts, and each row draws one token from each part.
    """
    borders = torch.arange(per_row + 1) * vocab_size // per_row
    return borders[:-1] + (torch.rand(num, per_row, generator=draw, dtype=torch.float64) * borders.diff()).long()


# Importing


def take_over(source: Path, out: Path, model: str | None, force: bool) -> Manifest:
    """Convert `.pt` shards into our cache format, and return the manifest. An unfinished conversion is continued.

    - Every 20th sequence is held out.
    - A sequence counts as one document, because its teacher read it as one.
    - The `.pt` files do not store how much weight the other tokens have in total. This is estimated from their random
      tokens; without these, it is unknown.
    """
    meta, data, files = _upstream(source)
    tokenizer = open_tokenizer(resolve_pretrained(_tokenizer_name(meta, model)))
    wanted = _manifest(
        teacher=meta.teacher_model,
        teacher_fingerprint="",  # the original cache records neither this nor the precision
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
    total = manifest.count("train") + manifest.count("heldout")
    if total != manifest.num_train:
        log.info("found %d sequences; meta.json says %d", total, manifest.num_train)
    return finish(out, manifest)


def _rows(shard: Shard, kept: Tensor) -> Shard:
    return {name: tensor[kept] for name, tensor in shard.items()}


def _upstream(source: Path) -> tuple[Upstream, dict[str, Any], list[Path]]:
    """Read a foreign cache's `meta.json`. Returns its checked fields, all its values, and the shards' paths.

    Raises UserError if this is no such cache, or a shard is missing.
    """
    try:
        data = read_json(source / "meta.json")
        meta = TypeAdapter(Upstream).validate_python(data)
    except ValidationError as error:
        raise UserError(f"{source}/meta.json: {first_problem(error)}: not a cache to import") from error
    except UserError as error:
        raise UserError(f"{source}/meta.json: missing or not JSON: not a cache to import ({error})") from error
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
    """The tensors of one `.pt` shard. Raises UserError if it is damaged, or does not match the manifest."""
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
    """A shard of the original tools, with our names for the tensors. Each sequence is one document."""
    starts = torch.zeros_like(old["input_ids"], dtype=torch.uint8)
    starts[:, 0] = 1
    new = {"input_ids": old["input_ids"], "starts": starts, "learned": 1 - starts}
    new |= {"topk_ids": old["topk_idx"], "topk_logits": old["topk_logits"]}
    if manifest.negatives:
        new |= _random_words(old, manifest.vocab_size)
    return new


def _random_words(old: Shard, vocab_size: int) -> Shard:
    """The distinct random tokens, and an estimate of the log-sum-exp of all tokens that a position does not store.

    The random tokens were drawn uniformly and with replacement. Of the V tokens, K are in the top-k; m random ones are
    not in it. The sum of exp(logit) over all V - K tokens outside is estimated as (V - K) / m times the sum over
    these m (unbiased). `rest` is the logarithm of that total minus the random tokens that are stored.
    """
    topk, ids, logits = old["topk_idx"].long(), old["rand_idx"].long(), old["rand_logits"].float()
    ids, order = ids.sort(dim=-1)
    logits = logits.gather(-1, order)
    ordered = topk.sort(dim=-1).values
    place = torch.searchsorted(ordered, ids).clamp_max(topk.shape[-1] - 1)
    hit = ordered.gather(-1, place) == ids  # random tokens that are in the top-k
    outside = logits.masked_fill(hit, NEVER).logsumexp(-1) - (~hit).sum(-1).clamp_min(1).log()
    tail = outside + torch.tensor(float(vocab_size - topk.shape[-1])).log()
    twice = torch.zeros_like(hit)  # random tokens that were drawn before; `ids` are sorted
    twice[..., 1:] = ids[..., 1:] == ids[..., :-1]
    logits = logits.masked_fill(hit | twice, NEVER)
    share = (logits.logsumexp(-1) - tail).exp()  # of the stored tokens in the total; 1 if every token is stored
    rest = torch.where(share < 1, tail + torch.log1p(-share), NEVER)
    return {"random_ids": ids, "random_logits": logits.half(), "rest": rest}
