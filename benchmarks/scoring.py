"""Compare lm-eval over `wf serve` with lm-eval on the same model in this process.

    pip install 'lm-eval[api]'
    python -m benchmarks.scoring FOLDER [--engine native|transformers] [--threads N] [--json]

| figure | what it is |
|---|---|
| `TASK_METRIC`, `TASK_METRIC_served` | in this process, and by `local-completions` with its defaults |
| `loglikelihoods_differ`, `texts_differ` | how many of all answers have other bits, or another text, over the server |

The tasks are made here, so that no data set is needed: `capitals` and `sums` are multiple choice, and
`capitals_written` lets the model write. In this process, `native` is an `Engine` without a server, and
`transformers` is lm-eval's own `HFLM`.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality import print_figures
from benchmarks.serving import served
from wrinklefree.core.errors import UserError
from wrinklefree.engine.engine import Engine
from wrinklefree.engine.sampling import Sampling
from wrinklefree.generate.open import open_model
from wrinklefree.models.load import open_tokenizer

CAPITALS = dict(
    line.split(": ")
    for line in """France: Paris
Germany: Berlin
Italy: Rome
Spain: Madrid
Japan: Tokyo
Russia: Moscow
China: Beijing
Egypt: Cairo
Greece: Athens
Austria: Vienna
Norway: Oslo
Sweden: Stockholm
Denmark: Copenhagen
Poland: Warsaw
Portugal: Lisbon
Ireland: Dublin
Cuba: Havana
Peru: Lima
Iran: Tehran
Iraq: Baghdad
India: New Delhi
Turkey: Ankara
Hungary: Budapest
Finland: Helsinki""".splitlines()
)
SUMS = 24  # questions
CHOICES = 4


def capitals(draw: random.Random) -> list[dict[str, Any]]:
    """A question for each capital, with three wrong answers."""
    rows = []
    for country, capital in CAPITALS.items():
        wrong = draw.sample([other for other in CAPITALS.values() if other != capital], CHOICES - 1)
        rows.append(question(f"The capital of {country} is", capital, wrong, draw))
    return rows


def sums(draw: random.Random) -> list[dict[str, Any]]:
    """Sums of two numbers below 60, with answers that are off by 1 or 10."""
    rows = []
    for _ in range(SUMS):
        a, b = draw.randrange(1, 60), draw.randrange(1, 60)
        wrong = [f"{a + b + off}." for off in draw.sample((-10, -1, 1, 10), CHOICES - 1)]
        rows.append(question(f"{a} plus {b} is", f"{a + b}.", wrong, draw))
    return rows


def question(text: str, right: str, wrong: Sequence[str], draw: random.Random) -> dict[str, Any]:
    choices = draw.sample([right, *wrong], CHOICES)
    return {"question": text, "choices": choices, "gold": choices.index(right), "answer": right}


def tasks(folder: Path) -> list[dict[str, Any]]:
    """Write the questions to `folder` and return lm-eval's settings of the tasks."""
    draw = random.Random(0)
    files: dict[str, list[dict[str, Any]]] = {"capitals": capitals(draw), "sums": sums(draw)}
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    choice: dict[str, Any] = {
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "output_type": "multiple_choice",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    written: dict[str, Any] = {
        "doc_to_target": " {{answer}}",
        "output_type": "generate_until",
        "generation_kwargs": {"until": ["\n", ".", ","], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match", "ignore_case": True, "ignore_punctuation": True}],
    }
    return [
        task(folder / "capitals.jsonl", "capitals", choice),
        task(folder / "sums.jsonl", "sums", choice),
        task(folder / "capitals.jsonl", "capitals_written", written),
    ]


def task(file: Path, name: str, more: dict[str, Any]) -> dict[str, Any]:
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test"}
    return {"task": name, "doc_to_text": "{{question}}", **source, **more}


def in_process(folder: Path, engine: str, threads: int | None) -> Any:
    """The model as one of lm-eval's, without a server."""
    if engine == "native":
        return engine_model(Engine.from_folder(folder, threads), open_tokenizer(str(folder)))
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = open_model(str(folder))
    return HFLM(pretrained=model, tokenizer=tokenizer, backend="causal")


def engine_model(engine: Engine, tokenizer: Any) -> Any:
    """An `Engine` as a model of lm-eval, whose classes are only there if it is installed."""
    from lm_eval.api.model import TemplateLM

    def encode(_: Any, text: str, add_special_tokens: bool | None = None) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=bool(add_special_tokens)).input_ids
        return ids

    def likelihoods(_: Any, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return [likelihood(engine, context, continuation) for _, context, continuation in requests]

    def texts(_: Any, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return [write(engine, tokenizer, *request.args) for request in requests]

    def rolling(_: Any, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError("no task here asks for it")

    members = {"tok_encode": encode, "_loglikelihood_tokens": likelihoods, "generate_until": texts}
    members |= {"loglikelihood_rolling": rolling, "eot_token_id": tokenizer.eos_token_id}
    return type("EngineLM", (TemplateLM,), members)()


def likelihood(engine: Engine, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    """The log-likelihood of a continuation, and whether greedy decoding would have written it."""
    tokens = [*context, *continuation]
    slot = engine.open(tokens, Sampling(max_new_tokens=1, logprobs=1, score_prompt=True))
    while not engine.step():
        pass
    scores = engine.scores(slot)[len(context) - 1 : len(tokens) - 1]
    engine.close(slot)
    greedy = all(score.likeliest[0][0] == token for score, token in zip(scores, continuation, strict=True))
    return sum(score.logprob for score in scores), greedy


def write(engine: Engine, tokenizer: Any, prompt: str, settings: dict[str, Any]) -> str:
    """Greedy text behind `prompt`, up to the first of the texts that end it."""
    sampling = Sampling(max_new_tokens=settings["max_gen_toks"], stop_tokens=frozenset([tokenizer.eos_token_id]))
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    text: str = tokenizer.decode(list(engine.generate(ids, sampling)), skip_special_tokens=True)
    return text[: min((text.find(end) for end in settings["until"] if end in text), default=len(text))]


def figures(args: argparse.Namespace) -> dict[str, Any]:
    """Run the tasks both ways. Raises UserError if lm-eval is not installed."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.openai_completions import LocalCompletionsAPI
    except ImportError as error:
        raise UserError("this benchmark needs lm-evaluation-harness: pip install 'lm-eval[api]'") from error
    options = ["--name", "bench", "--engine", args.engine]
    options += [] if args.threads is None else ["--threads", str(args.threads)]
    with tempfile.TemporaryDirectory() as folder, served(args.folder, *options) as server:
        made = tasks(Path(folder))
        url = f"http://{server.host}:{server.port}/v1/completions"
        client = LocalCompletionsAPI(model="bench", base_url=url, tokenizer=str(args.folder))
        over = simple_evaluate(client, tasks=made, log_samples=True)
        here = simple_evaluate(in_process(args.folder, args.engine, args.threads), tasks=made, log_samples=True)
    return {"engine": args.engine, **accuracies(here, ""), **accuracies(over, "_served"), **differences(here, over)}


def accuracies(results: dict[str, Any], suffix: str) -> dict[str, float]:
    """The figures of all tasks."""
    return {
        f"{name}_{metric.partition(',')[0]}{suffix}": value
        for name, metrics in results["results"].items()
        for metric, value in metrics.items()
        if metric.startswith(("acc", "exact_match")) and "stderr" not in metric
    }


def differences(here: dict[str, Any], over: dict[str, Any]) -> dict[str, int]:
    """How many answers differ."""
    counts = {"loglikelihoods_differ": 0, "texts_differ": 0}
    for name, samples in here["samples"].items():
        kind = "texts_differ" if name == "capitals_written" else "loglikelihoods_differ"
        counts[kind] += sum(a != b for a, b in zip(answers(samples), answers(over["samples"][name]), strict=True))
    return counts


def answers(samples: Iterable[dict[str, Any]]) -> list[Any]:
    """What the model gave, in the order of the questions: texts, or (log-likelihood, greedy) of each choice."""
    ordered = sorted(samples, key=lambda sample: int(sample["doc_id"]))
    return [answer for sample in ordered for answers in sample["resps"] for answer in answers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a packed folder, or a plain one")
    parser.add_argument("--engine", choices=("native", "transformers"), default="native")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    print_figures(parser.parse_args(), figures)


if __name__ == "__main__":
    main()
