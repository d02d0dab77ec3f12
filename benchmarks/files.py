"""Sizes and quality of the files that `wf export` writes for others, beside a 4-bit file of the same model.

    python -m benchmarks.files [--model M] [--run RUN] [--text FILE] [--tokens 2048] [--quick] [--json]

A ternary model (one scale for 64 columns) is written as GGUF, in the smallest types and in those of older llama.cpp,
and as a packed folder. Each is opened again and compared with the model that it was made of, on the same text.

--model   a folder, a name such as `tiny`, or a GGUF file, which then is the 4-bit file, too; others get one in Q4_0
--run     a trained ternary run; by default the model is only rounded, which costs quality, and no file can mend that
--text    by default the held-out text of the model's config

| figure | meaning |
|---|---|
| `gguf_ternary_over_q4_bytes` | bytes of the smallest GGUF file over those of the 4-bit file |
| `gguf_top1` | how often the file's likeliest token is the trained model's, when this package runs the file |
| `NAME_bytes`, `NAME_bits` | of the whole file, and per parameter |
| `NAME_top1`, `NAME_perplexity` | with this package; the 4-bit file's `top1` is against the original |
| `llama_cpp_top1`, `llama_cpp_perplexity_ratio` | the smallest GGUF file in llama.cpp, against its exact values here |
"""

import argparse
import importlib.util
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import quality
from wrinklefree.config.compose import config_yaml, load_config
from wrinklefree.config.schema import Config
from wrinklefree.data.open import heldout_batches
from wrinklefree.export.formats import gguf
from wrinklefree.export.proof.agreement import compare
from wrinklefree.generate.open import open_model
from wrinklefree.methods.uniform import Config as Uniform
from wrinklefree.models.gguf import is_gguf
from wrinklefree.models.load import load_model, load_pretrained
from wrinklefree.packed.products.choose import exactly
from wrinklefree.runs.exporting import Opened, opened, write
from wrinklefree.training import checkpoint

LENGTH = 256  # tokens of a sequence
LLAMA_CPP_TOKENS = 512  # its Q2_0 reads few tokens a second
GROUP = 64

Figures = dict[str, Any]
Batches = list[Mapping[str, Tensor]]

# Exports of the ternary model: name -> (format, options, the file that counts).
TARGETS: dict[str, tuple[str, dict[str, Any], str]] = {
    "gguf": ("gguf", {"gguf_embedding": "q8_0"}, "model.gguf"),
    "gguf_tq2_0": ("gguf", {"gguf_type": "tq2_0", "gguf_embedding": "q8_0"}, "model.gguf"),
    "packed": ("hf", {"head_bits": 8}, "model.safetensors"),
}


def config_of(args: argparse.Namespace, out: Path) -> Config:
    """The settings of a ternary model of which the text is compared."""
    text = ["data=local", f"data.path={args.text}"] if args.text else []
    settings = [f"model={args.model}", "training=ternary", *text, "method.granularity=group"]
    settings += [f"method.group_size={GROUP}", f"training.max_seq_length={LENGTH}", f"output_dir={out}"]
    return load_config(settings)


def rounded_run(config: Config, folder: Path) -> Path:
    """A run folder whose model was made ternary and not trained."""
    model, tokenizer = load_pretrained(config.model)
    ternary = config.method.prepare(model)
    checkpoint.save(folder / "final", ternary, tokenizer, config_yaml(config), None)
    return folder


def four_bit_file(args: argparse.Namespace, config: Config, folder: Path) -> Path:
    """The model itself if it is a GGUF file, else its weights rounded to Q4_0 in groups of 32, embeddings in Q8_0."""
    if is_gguf(args.model):
        return Path(args.model)
    model, tokenizer = load_pretrained(config.model)
    method = Uniform(bits=4, granularity="group", group_size=32)
    folder.mkdir()
    gguf.write(method.prepare(model).eval(), tokenizer, folder, [], gguf_embedding="q8_0")
    return folder / "model.gguf"


def measured(name: str, file: Path, model: PreTrainedModel, reference: PreTrainedModel, batches: Batches) -> Figures:
    """Bytes and bits of a file, and how close `model`, made from it, is to the `reference`."""
    parameters = sum(p.numel() for p in reference.parameters())
    found = file.stat().st_size
    return {
        f"{name}_bytes": found,
        f"{name}_bits": 8 * found / parameters,
        f"{name}_top1": compare(reference, model, batches).same_top1,
        f"{name}_perplexity": perplexity(model, batches),
    }


@torch.no_grad()
def perplexity(model: PreTrainedModel, batches: Batches) -> float:
    """exp of the mean negative log-likelihood of all tokens but the first of each sequence."""
    losses = [model(input_ids=b["input_ids"], labels=b["input_ids"]).loss.item() for b in batches]
    return math.exp(sum(losses) / len(losses))


def llama_cpp(file: Path, batches: Batches) -> Figures:
    """Run the file in llama.cpp on the first tokens, beside its decoded weights in transformers."""
    ours, _ = open_model(str(file))
    loss = other_loss = 0.0
    same: list[Tensor] = []
    with _program(file) as program, exactly(ours), torch.no_grad():
        for ids in (batch["input_ids"][0] for batch in batches[: LLAMA_CPP_TOKENS // LENGTH]):
            expected = ours(ids.unsqueeze(0)).logits[0].log_softmax(-1)
            program.reset()
            program.eval(ids.tolist())
            found = torch.from_numpy(np.array(program.scores[: len(ids)])).log_softmax(-1)
            loss -= expected[:-1].gather(1, ids[1:, None]).mean().item()
            other_loss -= found[:-1].gather(1, ids[1:, None]).mean().item()
            same.append((expected.argmax(-1) == found.argmax(-1)).float())
    ratio = math.exp((other_loss - loss) / len(same))
    return {"llama_cpp_top1": torch.cat(same).mean().item(), "llama_cpp_perplexity_ratio": ratio}


@contextmanager
def _program(file: Path) -> Iterator[Any]:
    import llama_cpp as library

    program = library.Llama(str(file), n_ctx=LENGTH, logits_all=True, verbose=False, n_threads=torch.get_num_threads())
    yield program
    program.close()


def compute(args: argparse.Namespace) -> Figures:
    """All figures, ratios first."""
    tokens = 512 if args.quick else args.tokens
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        config = config_of(args, root / "run")
        source = opened(args.run or rounded_run(config, root / "run"), trust_remote_code=False)
        batches = text_of(config, source, tokens)
        for name, (format, options, file) in TARGETS.items():
            write(source, format, root / name, options)
            model, _ = open_model(str(root / name / file if format == "gguf" else root / name))
            figures |= measured(name, root / name / file, model, source.model, batches)
        figures["trained_perplexity"] = perplexity(source.model, batches)
        four = four_bit_file(args, config, root / "four")
        original, _ = load_model(config.model.pretrained, dtype=torch.float32)
        figures |= measured("q4", four, open_model(str(four))[0], original, batches)
        if importlib.util.find_spec("llama_cpp") is not None:
            figures |= llama_cpp(root / "gguf" / "model.gguf", batches)
    ratios = {"gguf_ternary_over_q4_bytes": figures["gguf_bytes"] / figures["q4_bytes"]}
    return ratios | {"gguf_top1": figures["gguf_top1"]} | figures


def text_of(config: Config, source: Opened, tokens: int) -> Batches:
    """Whole sequences of held-out text, one in a batch."""
    found = heldout_batches(config.data, source.tokenizer, batch_size=1, length=LENGTH, max_tokens=tokens)
    return [{"input_ids": batch["input_ids"]} for batch in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a folder, a name or a GGUF file")
    parser.add_argument("--run", type=Path, help="a trained ternary run of it")
    parser.add_argument("--text", type=Path, help="a text file or a folder of such")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--quick", action="store_true", help="512 tokens")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    quality.print_figures(parser.parse_args(), compute)


if __name__ == "__main__":
    main()
