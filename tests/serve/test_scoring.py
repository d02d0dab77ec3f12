"""Scores and several answers: what lm-eval and other clients ask for, on both engines, in this process."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from wrinklefree.core import library
from wrinklefree.engine.engine import Engine
from wrinklefree.models.find import resolve_pretrained
from wrinklefree.models.load import open_tokenizer
from wrinklefree.serve.app import Service
from wrinklefree.serve.fallback import TransformersEngine
from wrinklefree.serve.models import Limits, Model, Models, Offer, Opened

torch.set_num_threads(1)
CONTEXT = 320
PROMPT = "def main(arguments):\n    return"


@dataclass
class Served:
    """A service in this process, and the model behind it."""

    service: Service
    model: LlamaForCausalLM
    tokenizer: Any

    def ask(self, path: str = "completions", **fields: Any) -> httpx.Response:
        async def post() -> httpx.Response:
            transport = httpx.ASGITransport(self.service.app())
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                return await client.post(f"/v1/{path}", json={"model": "m", "temperature": 0, "max_tokens": 8} | fields)

        return asyncio.run(post())

    def choices(self, path: str = "completions", **fields: Any) -> list[dict[str, Any]]:
        answer = self.ask(path, **fields)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"]

    def events(self, **fields: Any) -> list[dict[str, Any]]:
        lines = self.ask(stream=True, **fields).text.split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]

    @torch.no_grad()
    def logprobs(self, tokens: list[int]) -> torch.Tensor:
        """What lm-eval works out in-process [length, vocab]."""
        return self.model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)


@pytest.fixture(scope="module", params=["native", "transformers"])
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    if request.param == "native" and library.available() is not None:
        pytest.skip(str(library.available()))
    words = open_tokenizer(resolve_pretrained("builtin:tiny"))
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(words), max_position_embeddings=CONTEXT, initializer_range=0.2, **shape)
    model = LlamaForCausalLM(config).eval()
    native = request.param == "native"
    engine = Engine.from_model(model, 1, slots=3, mode="exact") if native else TransformersEngine(model, CONTEXT, 3)
    offer = Offer("m", lambda: Opened(Model("m", words, frozenset()), engine))
    models = Models([offer], Limits(CONTEXT - 1, CONTEXT - 1), max_waiting=64)
    yield Served(Service(models), model, words)
    models.close()
    models.join()


def test_the_requests_of_lm_eval_are_answered_with_what_it_works_out_in_process(served: Served) -> None:
    """`local-completions` sends contexts with their continuations as token ids, in a list."""
    context = served.tokenizer(PROMPT).input_ids
    continuations = [served.tokenizer(text).input_ids for text in (" arguments", " None\n", "x")]
    best = int(served.logprobs(context)[-1].argmax())
    prompts = [context + more for more in [*continuations, [best]]]
    fields = {"prompt": prompts, "echo": True, "max_tokens": 1, "logprobs": 1, "seed": 1234}
    for choice, tokens in zip(served.choices(**fields), prompts, strict=True):
        told = choice["logprobs"]
        assert len(told["tokens"]) == len(told["token_logprobs"]) == len(told["top_logprobs"]) == len(tokens) + 1
        assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
        expected = served.logprobs(tokens)
        own = [float(expected[i - 1, tokens[i]]) for i in range(len(context), len(tokens))]
        assert told["token_logprobs"][len(context) : -1] == pytest.approx(own, abs=1e-3)
        pairs = zip(told["token_logprobs"][1:-1], told["top_logprobs"][1:-1], strict=True)
        greedy = [logprob == max(near.values()) for logprob, near in pairs]
        assert greedy == [int(expected[i].argmax()) == tokens[i + 1] for i in range(len(tokens) - 1)]
        assert greedy[-1] == (tokens == prompts[-1])


def test_an_echo_of_no_tokens_scores_the_prompt_alone(served: Served) -> None:
    (choice,) = served.choices(prompt=PROMPT, echo=True, max_tokens=0, logprobs=0)
    tokens = served.tokenizer(PROMPT).input_ids
    assert choice["text"] == PROMPT
    told = choice["logprobs"]
    assert len(told["token_logprobs"]) == len(tokens)
    pairs = zip(told["text_offset"], told["tokens"], strict=True)
    assert all(PROMPT[at:].startswith(text) for at, text in pairs)
    usage = served.ask(prompt=PROMPT, echo=True, max_tokens=0).json()["usage"]
    assert usage == {"prompt_tokens": len(tokens), "completion_tokens": 0, "total_tokens": len(tokens)}


def test_scores_of_an_answer_are_told_in_both_forms_whole_and_streamed(served: Served) -> None:
    (choice,) = served.choices(prompt=PROMPT, logprobs=2, max_tokens=4)
    tokens = served.tokenizer(PROMPT).input_ids
    told, expected = choice["logprobs"], served.logprobs(tokens)[-1]
    assert len(told["tokens"]) == 4
    assert told["token_logprobs"][0] == pytest.approx(float(expected.max()), abs=1e-3)
    assert sorted(told["top_logprobs"][0].values())[-2:] == pytest.approx(sorted(expected.tolist())[-2:], abs=1e-3)
    parts = [event["choices"][0] for event in served.events(prompt=PROMPT, logprobs=2, max_tokens=4)]
    streamed = [logprob for part in parts if part["logprobs"] for logprob in part["logprobs"]["token_logprobs"]]
    assert streamed == told["token_logprobs"]
    messages = [{"role": "user", "content": "hey"}]
    (chat,) = served.choices("chat/completions", messages=messages, logprobs=True, top_logprobs=3)
    first = chat["logprobs"]["content"][0]
    assert len(chat["logprobs"]["content"]) == 8
    assert [first["token"], first["logprob"]] == [first["top_logprobs"][0][name] for name in ("token", "logprob")]
    assert served.choices("chat/completions", messages=messages)[0]["logprobs"] is None


def test_several_answers_differ_and_belong_to_their_prompts(served: Served) -> None:
    hot = {"temperature": 1.5, "seed": 3}
    answer = served.ask(prompt=["def a", "x = 1"], n=3, **hot).json()
    texts = [choice["text"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert len(set(texts)) == 6
    assert texts[:3] == [choice["text"] for choice in served.choices(prompt="def a", n=3, **hot)]
    assert answer["usage"]["completion_tokens"] == 48
    assert answer["usage"]["prompt_tokens"] == sum(len(served.tokenizer(text).input_ids) for text in ("def a", "x = 1"))
    parts = [event["choices"][0] for event in served.events(prompt="def a", n=3, **hot)]
    assert ["".join(part["text"] for part in parts if part["index"] == i) for i in range(3)] == texts[:3]
    assert [part["finish_reason"] for part in parts if part["finish_reason"]] == ["length"] * 3


def test_the_best_answers_are_the_likeliest(served: Served) -> None:
    hot = {"prompt": "def a", "temperature": 1.5, "seed": 3}
    all_of_them = served.choices(n=4, logprobs=0, **hot)
    expected = sorted(all_of_them, key=lambda choice: sum(choice["logprobs"]["token_logprobs"]), reverse=True)[:2]
    best = served.choices(n=2, best_of=4, **hot)
    assert [choice["text"] for choice in best] == [choice["text"] for choice in expected]
    assert {choice["logprobs"] for choice in best} == {None}


def test_biases_and_penalties_reach_the_sampler(served: Served) -> None:
    token = served.tokenizer("Z").input_ids[-1]
    (choice,) = served.choices(prompt=PROMPT, logit_bias={str(token): 100}, logprobs=0)
    assert choice["logprobs"]["tokens"] == [served.tokenizer.decode([token])] * 8
    bias = {str(token): 50}
    (choice,) = served.choices(prompt=PROMPT, logit_bias=bias, frequency_penalty=2, logprobs=0, max_tokens=40)
    assert choice["logprobs"]["tokens"][:10] == [served.tokenizer.decode([token])] * 10
    assert set(choice["logprobs"]["tokens"]) != {served.tokenizer.decode([token])}
    plain, narrow = (served.choices(prompt=PROMPT, temperature=t, min_p=1)[0]["text"] for t in (0, 2))
    assert plain == narrow


def test_tokenize_gives_what_an_answer_reads(served: Served) -> None:
    def ask(**body: Any) -> httpx.Response:
        async def post() -> httpx.Response:
            transport = httpx.ASGITransport(served.service.app())
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                return await client.post("/tokenize", json=body)

        return asyncio.run(post())

    found = ask(prompt=PROMPT).json()
    assert found == {
        "tokens": served.tokenizer(PROMPT).input_ids,
        "count": len(found["tokens"]),
        "max_model_len": CONTEXT,
    }
    messages = [{"role": "user", "content": "hey"}]
    usage = served.ask("chat/completions", messages=messages).json()["usage"]
    assert ask(messages=messages).json()["count"] == usage["prompt_tokens"]
    assert ask(prompt="a", nonsense=1).json()["error"]["param"] == "nonsense"


def test_metrics_count_requests_and_tokens(served: Served) -> None:
    def values() -> dict[str, int]:
        async def get() -> str:
            transport = httpx.ASGITransport(served.service.app())
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                return (await client.get("/metrics")).text

        lines = [line.split() for line in asyncio.run(get()).splitlines() if not line.startswith("#")]
        return {name: int(value) for name, value in lines}

    before = values()
    served.choices(prompt=PROMPT, n=2, max_tokens=5)
    after = values()
    assert after["wf_requests_total"] == before["wf_requests_total"] + 2
    assert after["wf_generated_tokens_total"] == before["wf_generated_tokens_total"] + 10
    assert after["wf_slots"] == 3
    assert after["wf_engine_failures_total"] == after["wf_requests_open"] == 0


def test_embeddings_are_refused_by_name(served: Served) -> None:
    answer = served.ask("embeddings", input="a")
    assert answer.status_code == 501
    assert "makes no embeddings" in answer.json()["error"]["message"]
