"""Text generation: repeatable, within the context, and a conversation that ends when told, and only then."""

import io
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from wrinklefree.commands.generate import _allow_any_terminal
from wrinklefree.core.errors import UserError
from wrinklefree.data.tokenizer import train_tokenizer
from wrinklefree.generate import generate
from wrinklefree.generate.generate import SamplingOptions, answer, complete, interactive, stream

pytestmark = pytest.mark.numeric

CONTEXT = 64


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(["def main():\n    return 0\n"], 300)


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=300, max_position_embeddings=CONTEXT, **sizes)).eval()


def lines(*texts: str) -> Callable[[str], str]:
    """A reader that gives `texts`, then the end of input."""
    left: Iterator[str] = iter(texts)

    def read(prompt: str) -> str:
        for line in left:
            return line
        raise EOFError

    return read


def test_same_seed_same_text_and_no_trace_in_the_random_state(model, tokenizer) -> None:
    before = torch.get_rng_state()
    texts = [complete(model, tokenizer, "def", 12, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(before, torch.get_rng_state())


def test_greedy_ignores_the_seed(model, tokenizer) -> None:
    assert complete(model, tokenizer, "def", 12, seed=1) == complete(model, tokenizer, "def", 12, seed=2)


def test_stream_prints_the_prompt_and_what_complete_returns(model, tokenizer, capsys) -> None:
    text = stream(model, tokenizer, "def", 12)
    assert text == complete(model, tokenizer, "def", 12)
    assert capsys.readouterr().out == f"def{text}\n"


def test_further_settings_reach_the_model(model, tokenizer) -> None:
    plain = complete(model, tokenizer, "def", 24)
    assert complete(model, tokenizer, "def", 24, repetition_penalty=8.0) != plain
    assert complete(model, tokenizer, "def", 24, temperature=1.0, top_k=1) == plain


def test_text_ends_with_the_context(model, tokenizer) -> None:
    prompt = "z" * (CONTEXT - 4)
    three, four, most = (complete(model, tokenizer, prompt, length) for length in (3, 4, 1000))
    assert three != four == most
    with pytest.raises(UserError, match="context is 64"):
        complete(model, tokenizer, "z" * CONTEXT, 1)


def test_an_empty_prompt_is_an_error(model, tokenizer) -> None:
    with pytest.raises(UserError, match="empty"):
        complete(model, tokenizer, "")


def test_interactive_answers_until_exit_or_end_of_input(model, tokenizer, capsys) -> None:
    sampling = {"max_new_tokens": 5, "temperature": 0.0}
    interactive(model, tokenizer, read=lines("def", "", "/exit", "never"), **sampling)
    out = capsys.readouterr().out
    assert complete(model, tokenizer, "def", 5) in out
    interactive(model, tokenizer, read=lines("def"), **sampling)
    assert complete(model, tokenizer, "def", 5) in capsys.readouterr().out


def test_chat_goes_on_past_the_context(model, tokenizer, capsys) -> None:
    interactive(model, tokenizer, chat=True, max_new_tokens=8, read=lines(*["def main"] * 6))
    help_line, replies, end = 1, 6, 1
    assert capsys.readouterr().out.count("\n") >= help_line + replies + end


def test_chat_needs_a_template(model, tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(UserError, match="no chat template"):
        interactive(model, tokenizer, chat=True, read=lines())


@pytest.mark.parametrize(("prompt", "options"), [("z" * CONTEXT, {}), ("", {}), ("def", {"top_p": 0.0})])
def test_nothing_is_printed_before_the_request_is_checked(model, tokenizer, capsys, prompt: str, options: dict) -> None:
    with pytest.raises(UserError):
        stream(model, tokenizer, prompt, 5, **options)
    with pytest.raises(UserError):
        interactive(model, tokenizer, read=lines("def"), repetition_penalty=0.0)
    assert capsys.readouterr().out == ""


def test_an_answer_says_why_it_ended(model, tokenizer) -> None:
    free = answer(model, tokenizer, "def", SamplingOptions(9))
    assert (free.tokens, free.finish, free.prompt_tokens) == (9, "length", len(tokenizer("def").input_ids))
    text = free.text
    said = answer(model, tokenizer, "def", SamplingOptions(9, stop=[text[-2:]]))
    assert (said.finish, said.text) == ("stop", text[: text.index(text[-2:])])


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("odd", ["z" * CONTEXT, "a\udcff"])
def test_a_line_that_cannot_be_answered_does_not_end_the_session(
    model, tokenizer, capsys, chat: bool, odd: str
) -> None:
    sampling = {"max_new_tokens": 5, "temperature": 0.0, "chat": chat}
    interactive(model, tokenizer, read=lines("def"), **sampling)
    expected = capsys.readouterr().out
    interactive(model, tokenizer, read=lines(odd, "def"), **sampling)
    captured = capsys.readouterr()
    assert captured.out == expected
    assert captured.err.startswith("error: ")


def test_ctrl_c_ends_an_answer_and_another_signal_the_session(model, tokenizer, monkeypatch, capsys) -> None:
    sampling = {"max_new_tokens": 5, "temperature": 0.0}
    shown = generate._show

    def interrupting(*signals: int) -> Callable[[str], None]:
        pieces = 0

        def show(piece: str) -> None:
            nonlocal pieces
            pieces += 1
            if pieces == 3:
                raise KeyboardInterrupt(*signals)
            shown(piece)

        return show

    monkeypatch.setattr(generate, "_show", interrupting())
    interactive(model, tokenizer, read=lines("def", "def"), **sampling)
    assert capsys.readouterr().out.endswith(complete(model, tokenizer, "def", 5) + "\n\n")
    monkeypatch.setattr(generate, "_show", interrupting(15))
    with pytest.raises(KeyboardInterrupt):
        interactive(model, tokenizer, read=lines("def", "def"), **sampling)


def test_a_terminal_of_ascii_shows_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    out, source = io.BytesIO(), io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii"))
    monkeypatch.setattr(sys, "stdin", source)
    _allow_any_terminal()
    print("caf\u00e9", flush=True)
    assert out.getvalue() == b"caf\\xe9\n"
    assert source.readline() == "\udcff\n"
