"""Mutated files of every kind that WrinkleFree reads, and the readers: each mutant is read, or refused in a line.

    samples = make_samples(root)                                one whole folder of each kind, in seconds
    for kind, name, mutate in mutations(samples, 1000, seed=0):
        shutil.copytree(samples[kind], copy)
        mutate(copy)                                            in place, always the same for one seed
        outcome = attempt(READERS[kind], copy, samples, seconds=60)

`python -m benchmarks.hostile --count 1000` does this, and prints what was not read or refused.
"""

import argparse
import contextlib
import copy
import io
import json
import logging
import os
import random
import shutil
import signal
import struct
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from wrinklefree.commands import cache as cache_command
from wrinklefree.config.compose import config_yaml, load_config, read_config
from wrinklefree.config.schema import DistillationConfig, ModelConfig
from wrinklefree.core.errors import UserError
from wrinklefree.core.method import quant_layers
from wrinklefree.data import chains
from wrinklefree.data.kd_cache.read import KDCache
from wrinklefree.data.packing import encode, make_batch, pack_whole
from wrinklefree.data.template import as_chat
from wrinklefree.data.tokenizer import CHAT_TEMPLATE, train_tokenizer
from wrinklefree.distributed.world import World
from wrinklefree.evaluate.perplexity import measure
from wrinklefree.export.formats import bitnet, compressed_tensors, gguf
from wrinklefree.export.formats.anemll import write_state
from wrinklefree.export.formats.packed import export_packed
from wrinklefree.generate import generate
from wrinklefree.generate.open import open_engine
from wrinklefree.methods.bitdistill import Config as BitDistill
from wrinklefree.models.load import load_model, load_pretrained, open_tokenizer
from wrinklefree.objectives.kinds.cached_kd import Objective as CachedKD
from wrinklefree.runs.setup import open_run
from wrinklefree.runs.stage import choose_objective, prepare_student
from wrinklefree.thinking import gathering, hidden_pairs, loading
from wrinklefree.thinking.gathering import Gathered
from wrinklefree.thinking.hidden_pairs import HiddenPairs, Manifest, Pair
from wrinklefree.thinking.moments import Moments
from wrinklefree.thinking.network import make_thinker
from wrinklefree.training import checkpoint

TOKENIZER = chains.tokenizer()
TOKENIZER.chat_template = CHAT_TEMPLATE
CPU = World(0, 1, torch.device("cpu"))
KEY = "0123456789abcdef"  # of the sample's hidden pairs
OUTSIDE = "../outside"  # a file beside the mutant's folder, in many mutations
MOST_LINES = 8  # of a refusal: settings are checked all at once

Samples = Mapping[str, Path]
Reader = Callable[[Path, Samples], None]
Mutate = Callable[[Path], None]


class Mutant(NamedTuple):
    """What is done to a copy of the sample of one kind."""

    kind: str
    name: str
    mutate: Mutate


class HungError(BaseException):
    """A reader that was not done in time. No reader can catch it by mistake: it is no `Exception`."""


# Samples


def small_model() -> LlamaForCausalLM:
    """A random Llama of a few thousand parameters."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": TOKENIZER.bos_token_id, "eos_token_id": TOKENIZER.eos_token_id}
    return LlamaForCausalLM(
        LlamaConfig(**sizes, **ends, vocab_size=len(TOKENIZER), max_position_embeddings=64, tie_word_embeddings=False)
    ).eval()


def make_samples(root: Path) -> dict[str, Path]:
    """Write one whole folder of each kind into `root`, and return them by kind."""
    text = root / "text"
    text.mkdir(parents=True)
    for number in range(40):
        examples = chains.examples("train")[12 * number : 12 * number + 12]
        (text / f"{number:02}.txt").write_text(" ".join(example.prompt + example.answer for example in examples))
    model = small_model()
    for kind, size in (("model", "1GB"), ("sharded", "10KB")):
        model.save_pretrained(root / kind, max_shard_size=size)
        TOKENIZER.save_pretrained(root / kind)
    TOKENIZER.save_pretrained(root / "tokenizer")
    _gguf(root / "gguf")
    _integers(root, model)
    _trained(root, model)
    _cache(root)
    _thinking(root, model)
    kinds = [path.name for path in sorted(root.iterdir()) if path.name in READERS]
    return {kind: root / kind for kind in kinds}


def _gguf(folder: Path) -> None:
    """A GGUF file with four types of tensors, and a tokenizer of its own: the chains' is cut into words."""
    folder.mkdir()
    words = train_tokenizer(["def f(x): return x + 1\n" * 20], vocab_size=280)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=280, max_position_embeddings=64)).eval()
    ternary = BitDistill(norm_mode="none", granularity="row").prepare(model)
    gguf.write(ternary, words, folder, [], "q2_0", "q8_0")


def _integers(root: Path, model: LlamaForCausalLM) -> None:
    """Ternary models as BitNet stores them, and in the words of compressed-tensors."""
    for name, format in (("bitnet", bitnet), ("words", compressed_tensors)):
        ternary = BitDistill(norm_mode="none").prepare(copy.deepcopy(model)).eval()
        (root / name).mkdir()
        format.write(ternary, TOKENIZER, root / name, [{"input_ids": torch.arange(8)[None]}])


def settings(root: Path, out: Path, *more: str) -> list[str]:
    """Settings of a training of two steps on the samples in `root`."""
    values = {"max_steps": 2, "batch_size": 2, "max_seq_length": 16, "lr": 1e-3, "precision": "fp32"}
    values |= {"save_interval": 1, "eval_interval": 100, "eval_tokens": 64, "log_interval": 1}
    data = ["data=local", f"data.path={root / 'text'}", f"output_dir={out}"]
    return [
        f"model={root / 'model'}",
        "training=fairy2_w2",
        *data,
        *(f"training.{k}={v}" for k, v in values.items()),
        *more,
    ]


def train(root: Path, out: Path, *more: str) -> None:
    """Train in this process, as `wf train` does between loading and packing."""
    config = load_config(settings(root, out, *more))
    with open_run(config, world=CPU) as run:
        run.begin()
        student = prepare_student(config, run.model)
        run.fit(student, choose_objective(config, student, run.model), teacher=run.model)


def _trained(root: Path, model: LlamaForCausalLM) -> None:
    """A run with its state, a packed folder, and a `.pt` file with lookup tables."""
    train(root, root / "resume")
    shutil.copytree(root / "resume" / "final", root / "run")
    for path in (root / "resume").iterdir():  # of all its files, those of the newest checkpoint are read
        if path.is_dir() and path.name != "checkpoints":
            shutil.rmtree(path)
    shutil.rmtree(root / "resume" / "checkpoints" / "step_1")
    batch = make_batch(pack_whole(encode(TOKENIZER, chains.examples("train")[:20]), 16, 0)[:2])
    trained, _ = load_model(root / "run")
    method = read_config(root / "run" / checkpoint.CONFIG).method
    export_packed(trained, TOKENIZER, method, root / "packed", card="", force=True, batches=[batch], head_bits=8)
    tables = load_config(
        [f"model={root / 'model'}", "training=anemll_q2a4", "method.rank=4", "method.attn_rank=4"]
    ).method
    (root / "state").mkdir()
    write_state(tables.prepare(copy.deepcopy(model)), root / "state" / "state.pt")


def _cache(root: Path) -> None:
    given = ["data=local", f"data.path={root / 'text'}", "training.batch_size=4", "training.precision=fp32"]
    sizes = {"topk": 4, "negatives": 4, "num_train": 12, "num_heldout": 3, "shard_size": 8}
    cache_command.write(cache_command.settings(str(root / "model"), 16, given), root / "cache", False, **sizes)


def _thinking(root: Path, model: LlamaForCausalLM) -> None:
    """A compressor with its moments, and hidden pairs."""
    network = {"hidden_size": 16, "num_heads": 2, "max_thoughts": 3}
    sizes = ["thinking.d_compressed=8", *(f"thinking.network.{key}={value}" for key, value in network.items())]
    config = load_config(["training=trm_compressor", f"model={root / 'model'}", f"output_root={root}", *sizes])
    thinker = make_thinker(model, loading.settings_of(config))
    checkpoint.save(root / "thinker", thinker, TOKENIZER, config_yaml(config), None)
    moments, states = Moments.zeros(32), torch.randn(64, 32)
    moments.add(states)
    (root / "moments").mkdir()
    Gathered(moments, states.T.double() @ states.double()).save(root / "moments")
    manifest = Manifest(
        model="model", model_fingerprint=KEY, tokenizer_fingerprint=KEY, compressor_fingerprint=KEY,
        settings={}, width=32, d_compressed=8, counts={"train": 6, "heldout": 2},
    )  # fmt: skip
    (root / "pairs").mkdir()
    manifest.save(root / "pairs")
    for split, count in manifest.counts.items():
        pairs = [_pair(number) for number in range(count)]
        hidden_pairs.write_shard(hidden_pairs.shard_path(root / "pairs", split, 0), pairs, manifest.key)  # type: ignore[arg-type]


def _pair(number: int) -> Pair:
    length, thoughts = 3 + number, 1 + number % 3
    ids = torch.arange(length) % len(TOKENIZER)
    return Pair(ids, ids[:2], ids[:1], torch.randn(length, 8), torch.randn(thoughts, 8), ids[:thoughts])


# Readers: each does what a verb does with the folder, in this process


def read_model(folder: Path, samples: Samples) -> None:
    """Load, score and generate, as `wf eval` and `wf generate` do."""
    model, tokenizer = load_model(folder, dtype=torch.float32)
    measure(model, _text(tokenizer, model.config.vocab_size))
    model, tokenizer, _ = open_engine(str(folder), "auto", threads=1)
    with contextlib.redirect_stdout(io.StringIO()):
        generate.stream(model, tokenizer, "3 +2 *4 ?", 2, temperature=0.0, seed=0)


def read_gguf(folder: Path, samples: Samples) -> None:
    """Generate with a GGUF file, and load it to train from."""
    with own_cache(folder):
        say_something(folder / "model.gguf")
        load_pretrained(ModelConfig(name="x", pretrained=str(folder / "model.gguf")))


def read_integers(folder: Path, samples: Samples) -> None:
    """Generate with a folder of BitNet's or compressed-tensors' integers."""
    with own_cache(folder):
        say_something(folder)


def say_something(model: Path) -> None:
    """Two tokens, as `wf generate` writes them."""
    opened, tokenizer, _ = open_engine(str(model), "auto", threads=1)
    with contextlib.redirect_stdout(io.StringIO()):
        generate.stream(opened, tokenizer, "def f", 2, temperature=0.0, seed=0)


@contextlib.contextmanager
def own_cache(folder: Path) -> Iterator[None]:
    """What is cached stays in the mutant's folder."""
    before = os.environ.get("WRINKLEFREE_CACHE")
    os.environ["WRINKLEFREE_CACHE"] = str(folder / "cache")
    try:
        yield
    finally:
        os.environ.pop("WRINKLEFREE_CACHE")
        os.environ |= {} if before is None else {"WRINKLEFREE_CACHE": before}


def read_run(folder: Path, samples: Samples) -> None:
    """Load a checkpoint with its masters and encode its layers, as `wf export` does."""
    config = read_config(folder / checkpoint.CONFIG)
    model, tokenizer = load_model(folder)
    measure(model, _text(tokenizer, model.config.vocab_size))
    if config.method is not None:
        for layer in quant_layers(model).values():
            layer.decode(layer.encode())


def read_resume(folder: Path, samples: Samples) -> None:
    """Go on from the newest checkpoint for one step."""
    train(samples["model"].parent, folder, "training.resume_from=latest", "training.max_steps=3")


def read_cache(folder: Path, samples: Samples) -> None:
    """Check a cache and learn from every sequence in it."""
    cache = KDCache(folder)
    model, tokenizer = load_pretrained(load_config([f"model={samples['model']}"]).model)
    cache.check_tokenizer(tokenizer)
    objective = CachedKD(model, DistillationConfig(name="none", weight=1.0))
    for split in ("train", "heldout"):
        for row in range(cache.manifest.count(split)):
            list(objective(cache.batch(split, [row])))


def read_thinker(folder: Path, samples: Samples) -> None:
    """Load a thinker and let it think."""
    thinker, _ = loading.load_thinker(folder)
    prompt = torch.zeros(1, 4, thinker.config.d_compressed)
    thinker.speak(thinker.think(prompt, torch.ones(1, 4, dtype=torch.bool))[0])


def read_pairs(folder: Path, samples: Samples) -> None:
    """Read all pairs of both splits."""
    for split in hidden_pairs.SPLITS:
        pairs = HiddenPairs(folder, split)
        list(pairs.batches(4))


def read_moments(folder: Path, samples: Samples) -> None:
    """Solve for the compressors."""
    found = gathering.read_gathered(folder)
    for objective in ("mse", *(["fisher"] if found.metric is not None else [])):
        found.solve(objective).mse(found.moments, 4)


def read_state(folder: Path, samples: Samples) -> None:
    """Open a `.pt` file with lookup tables, as the guide's tools do."""
    from qat_lora import files

    files.open_state(folder / "state.pt", str(samples["model"]))


def read_tokenizer(folder: Path, samples: Samples) -> None:
    """Encode, decode, and write a conversation."""
    tokenizer = open_tokenizer(str(folder))
    tokenizer.decode(tokenizer("3 +2 ?")["input_ids"])
    if tokenizer.chat_template is not None:
        as_chat(tokenizer, [{"role": "user", "content": "3 +2 ?"}], add_generation_prompt=True)


READERS: dict[str, Reader] = {
    "model": read_model,
    "sharded": read_model,
    "packed": read_model,
    "gguf": read_gguf,
    "bitnet": read_integers,
    "words": read_integers,
    "run": read_run,
    "resume": read_resume,
    "cache": read_cache,
    "thinker": read_thinker,
    "pairs": read_pairs,
    "moments": read_moments,
    "state": read_state,
    "tokenizer": read_tokenizer,
}


def _text(tokenizer: Any, vocabulary: int) -> list[dict[str, Tensor]]:
    ids = [index % vocabulary for index in tokenizer("3 +2 *4 ? <think> 5")["input_ids"]]
    tensor = torch.tensor([ids])
    return [{"input_ids": tensor, "labels": tensor, "position_ids": torch.arange(len(ids))[None]}]


# Mutations

ODD: list[Any] = [
    None, -1, 0, 1, 3, 0.5, 10**9, 2**31, 2**63, 10**30, 1e300, -1e300, float("nan"), float("inf"), True, False, "",
    "x",
    OUTSIDE, "/etc/hostname", "..\\outside", "a\nb", "\ud800", [], [1], [[]], {}, {"a": 1}, [None] * 3, "9" * 5000,
]  # fmt: skip

TEMPLATES = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ 'xxxxxxxxxxxxxxxx' }}{% endfor %}{% endfor %}",
    "{% set ns = namespace(x='x' * 1000) %}{% for a in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{{ 'x' * 9999999999 }}", "{{ 9 ** 9 ** 9 }}", "{{ '%999999999999d' % 1 }}", "{{ range(10 ** 12) | list }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ messages[7].content.x }}", "{% if %}",
    "{{ raise_exception('a\nb') }}",
    "{{ ''.__class__.__mro__ }}", "{% include 'x' %}", "{{ messages | map(attribute='x') | join }}", "\ud800",
]  # fmt: skip

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


def mutations(samples: Samples, count: int, seed: int, kinds: Sequence[str] = ()) -> Iterator[Mutant]:
    """Yield `count` mutations, kind after kind. Equal seeds give equal mutations."""
    chosen = list(kinds or samples)
    for number in range(count):
        kind = chosen[number % len(chosen)]
        draw = random.Random(f"{seed} {kind} {number}")
        files = [path.relative_to(samples[kind]) for path in sorted(samples[kind].rglob("*")) if path.is_file()]
        read = [file for file in files if file.suffix != ".py" and file.name not in ("README.md", "training_log.csv")]
        file = draw.choice(read)
        name, change = draw.choice([*ANY, *3 * list(BY_SUFFIX.get(file.suffix, ()))])
        yield Mutant(kind, f"{number}: {name} in {file}", _mutate(change, file, draw.random()))


def _mutate(change: Callable[[Path, random.Random], None], file: Path, seed: float) -> Mutate:
    def mutate(folder: Path) -> None:
        change(folder / file, random.Random(seed))

    return mutate


def _truncate(file: Path, draw: random.Random) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: draw.choice([0, 1, 7, 8, 9, len(data) // 2, len(data) - 1, draw.randrange(len(data) + 1)])])


def _flip(file: Path, draw: random.Random) -> None:
    data = bytearray(file.read_bytes())
    for _ in range(min(draw.choice([1, 3, 50]), len(data))):
        data[draw.randrange(len(data))] = draw.choice([draw.randrange(256), *b'0123456789[]{},:"\n'])
    file.write_bytes(bytes(data))


def _folder(file: Path, draw: random.Random) -> None:
    file.unlink()
    file.mkdir()


def _linked(file: Path, draw: random.Random) -> None:
    file.unlink()
    file.symlink_to("nowhere")


def _longer(file: Path, draw: random.Random) -> None:
    file.write_bytes(file.read_bytes() + draw.choice([b"\0", b"}", b"x" * 1000]))


ANY = [
    ("truncated", _truncate),
    ("bytes changed", _flip),
    ("missing", lambda file, draw: file.unlink()),
    ("a folder", _folder),
    ("a broken link", _linked),
    ("longer", _longer),
    ("no UTF-8", lambda file, draw: file.write_bytes(b"\xff\xfe\x00\xd8" * 9)),
]


def places(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value in nested lists and dictionaries."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def _changed(values: Any, draw: random.Random) -> Any:
    """A copy with one or two values of another kind, or removed."""
    values = copy.deepcopy(values)
    for _ in range(draw.choice([1, 1, 2])):
        short = [way for way in places(values) if len(way) <= draw.choice([1, 2, 9])]
        if not short:
            return draw.choice(ODD)
        *way, last = draw.choice(short)
        place = values
        for key in way:
            place = place[key]
        if draw.random() < 0.2:
            del place[last]
        else:
            place[last] = _odd(place[last], draw)
    return values


def _odd(value: Any, draw: random.Random) -> Any:
    if type(value) in (int, float) and draw.random() < 0.5:
        return draw.choice([-value, 2 * value, value + 1, value / 3, value * 10**6, str(value)])
    return copy.deepcopy(draw.choice(ODD))


def _json_value(file: Path, draw: random.Random) -> None:
    file.write_text(json.dumps(_changed(json.loads(file.read_text()), draw)))


def _json_deep(file: Path, draw: random.Random) -> None:
    depth, around = draw.choice([70, 900, 99_999]), draw.choice(["[]", '{"a":}'])
    deep = around[:-1] * depth + "1" + around[-1] * depth
    values = json.loads(file.read_text())
    if isinstance(values, dict) and values and draw.random() < 0.7:
        values[draw.choice(list(values))] = "DEEP"
        deep = json.dumps(values).replace('"DEEP"', deep)
    file.write_text(deep)


def _json_whole(file: Path, draw: random.Random) -> None:
    file.write_text(json.dumps(draw.choice(ODD)))


def _yaml_value(file: Path, draw: random.Random) -> None:
    file.write_text(yaml.safe_dump(_changed(yaml.safe_load(file.read_text()), draw)))


def _yaml_whole(file: Path, draw: random.Random) -> None:
    file.write_text(
        draw.choice(
            [LAUGHS, "[" * 9999, "a: &a [*a]", "? [a]\n: b", "- 1", "a: !!python/none", "a: ${b}", "x" * 999_999]
        )
    )


def _template(file: Path, draw: random.Random) -> None:
    file.write_text(draw.choice(TEMPLATES), errors="surrogatepass")


def _tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name).clone() for name in opened.keys()}, opened.metadata()  # noqa: SIM118


def _tensor(tensors: dict[str, Tensor], draw: random.Random) -> None:
    """Change one tensor in place."""
    name = draw.choice(sorted(tensors))
    tensor = tensors[name]
    kinds = [torch.int16, torch.int64, torch.uint8, torch.bool, torch.float16, torch.bfloat16, torch.float64]
    how = draw.choice(["value", "value", "dtype", "dtype", "shape", "missing", "more", "random"])
    if how == "value" and tensor.numel():
        odd = draw.choice([float("nan"), float("inf"), -1.0, 1e30] if tensor.is_floating_point() else [-1, 0, 127])
        tensor.view(-1)[:: draw.choice([1, 7])] = odd
    elif how == "dtype":
        tensors[name] = tensor.to(draw.choice(kinds))
    elif how == "shape":
        flat = tensor.reshape(-1)
        tensors[name] = draw.choice([flat, flat[:0], flat[:1], tensor[None], torch.cat([flat, flat])]).clone()
    elif how == "missing":
        del tensors[name]
    elif how == "more":
        tensors[draw.choice([f"{name}.more", OUTSIDE, "", "x" * 999])] = torch.ones(3)
    elif tensor.is_floating_point():
        tensors[name] = torch.randn(tensor.shape).to(tensor.dtype) * 100
    else:
        tensors[name] = torch.randint(0, 100, tensor.shape).to(tensor.dtype)


def _stored_tensor(file: Path, draw: random.Random) -> None:
    tensors, metadata = _tensors(file)
    torch.manual_seed(draw.randrange(2**30))
    _tensor(tensors, draw)
    save_file(tensors, file, metadata if draw.random() < 0.9 else {})


def _header(file: Path, draw: random.Random) -> None:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    if draw.random() < 0.3:
        size = draw.choice([0, 1, length - 9, 2**31, 2**63, 2**64 - 1, 10**8])
        file.write_bytes(size.to_bytes(8, "little") + data[8:])
        return
    header = json.dumps(_changed(json.loads(data[8 : 8 + length]), draw)).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def _number_in_header(file: Path, draw: random.Random) -> None:
    """Put a number anywhere into the header: a count, a length, a type, a size or a text."""
    data = bytearray(file.read_bytes())
    end = data.index(b"ffn_up.weight") + 2000  # beyond most of the tensors' places
    for _ in range(draw.choice([1, 1, 3])):
        code = draw.choice(["<Q", "<I", "<B"])
        most = 2 ** (8 * struct.calcsize(code))
        number = draw.choice([0, 1, 3, 7, 42, most // 2, most - 1, most // 3, len(data), draw.randrange(most)]) % most
        place = draw.choice([4, 8, 16, 24, draw.randrange(end), draw.randrange(end)])
        data[place : place + struct.calcsize(code)] = struct.pack(code, number)
    file.write_bytes(bytes(data))


def _type_in_header(file: Path, draw: random.Random) -> None:
    """Give a tensor another type, size or place, or a setting another number or type."""
    data = bytearray(file.read_bytes())
    names = [b"ffn_up.weight", b"token_embd.weight", b"attn_norm.weight", b"block_count", b"head_count_kv",
             b"freq_base", b"layer_norm_rms_epsilon", b"token_type", b"merges", b"eos_token_id"]  # fmt: skip
    name = draw.choice(names)
    place = data.index(name) + len(name) + 4 * draw.randrange(8)
    data[place : place + 4] = struct.pack(
        "<I", draw.choice([0, 1, 2, 8, 9, 30, 34, 41, 42, 64, 10**6, 2**31, 2**32 - 1])
    )
    file.write_bytes(bytes(data))


def _pickled(file: Path, draw: random.Random) -> None:
    tree = torch.load(file, weights_only=True)
    torch.manual_seed(draw.randrange(2**30))
    flat = {way: value for way, value in _leaves(tree) if isinstance(value, Tensor)}
    if flat and draw.random() < 0.6:
        changed = {str(number): value.clone() for number, value in enumerate(flat.values())}
        _tensor(changed, draw)
        for number, way in enumerate(flat):
            _put(tree, way, changed.get(str(number)))
    else:
        tree = _changed(tree, draw)
    torch.save(tree, file)


def _leaves(tree: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    for way in places(tree):
        value = tree
        for key in way:
            value = value[key]
        yield way, value


def _put(tree: Any, way: tuple[Any, ...], value: Any) -> None:
    *before, last = way
    for key in before:
        tree = tree[key]
    tree[last] = value


BY_SUFFIX: dict[str, Sequence[tuple[str, Callable[[Path, random.Random], None]]]] = {
    ".json": [("another value", _json_value)] * 4 + [("deep nesting", _json_deep), ("another whole", _json_whole)],
    ".yaml": [("another value", _yaml_value)] * 2 + [("another whole", _yaml_whole)],
    ".jinja": [("another template", _template)] * 2,
    ".safetensors": [("another tensor", _stored_tensor)] * 2 + [("another header", _header)],
    ".pt": [("another value", _pickled)] * 2,
    ".gguf": [("another number in the header", _number_in_header)] * 4 + [("another type", _type_in_header)],
}


# Attempts


class Outcome(NamedTuple):
    """What came of one mutant, the message, and the seconds it took.

    The verdict is `read`, `refused`, `internal error`, `hang` or `wrote outside`.
    """

    verdict: str
    message: str
    seconds: float


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise HungError in the block after `seconds`. This interrupts Python code alone, in the main thread."""

    def give_up(number: int, frame: object) -> None:
        raise HungError

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def attempt(reader: Reader, folder: Path, samples: Samples, seconds: int = 60) -> Outcome:
    """Read a mutated folder. A refusal of many lines, or of none, counts as an internal error."""
    start = time.monotonic()
    verdict, message = "read", ""
    try:
        with limited(seconds), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader(folder, samples)
    except UserError as error:
        lines = str(error).split("\n")
        verdict = "refused" if all(lines) and len(lines) <= MOST_LINES else "internal error"
        message = str(error)
    except HungError:
        verdict, message = "hang", f"no answer in {seconds} s"
    except Exception as error:
        verdict, message = "internal error", f"{type(error).__name__}: {error}"
    return Outcome(verdict, message, time.monotonic() - start)


def run(
    samples: Samples, mutants: Iterator[Mutant], scratch: Path, seconds: int = 60
) -> Iterator[tuple[Mutant, Outcome]]:
    """Attempt all mutants, each in a copy of its own. Beside the copy lies `outside`, which no mutant may change."""
    outside = scratch / "outside"
    for mutant in mutants:
        copied = scratch / "mutant"
        shutil.copytree(samples[mutant.kind], copied)
        outside.write_text("untouched")
        mutant.mutate(copied)
        outcome = attempt(READERS[mutant.kind], copied, samples, seconds)
        beside = sorted(set(os.listdir(scratch)) - {"mutant", "outside"})
        if beside or outside.read_text() != "untouched":
            outcome = Outcome("wrote outside", ", ".join(beside) or "outside", outcome.seconds)
        for name in ("mutant", *beside):  # what one mutant wrote must not count against the next
            shutil.rmtree(scratch / name, ignore_errors=True)
            (scratch / name).unlink(missing_ok=True)
        yield mutant, outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=60, help="time for each")
    parser.add_argument("--kinds", default="", help=f"of {', '.join(READERS)}; default: all")
    parser.add_argument("--verbose", action="store_true", help="print refusals too")
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    counts: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        root, scratch = Path(folder) / "samples", Path(folder) / "scratch"
        scratch.mkdir()
        samples = make_samples(root)
        mutants = mutations(samples, args.count, args.seed, args.kinds.split(",") if args.kinds else ())
        for mutant, outcome in run(samples, mutants, scratch, args.seconds):
            counts[outcome.verdict] = counts.get(outcome.verdict, 0) + 1
            if args.verbose or outcome.verdict not in ("read", "refused") or outcome.seconds > 10:
                print(
                    f"{outcome.verdict}: {mutant.kind} {mutant.name}: {outcome.message[:300]} ({outcome.seconds:.1f} s)"
                )
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
