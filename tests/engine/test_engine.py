"""The native loop: transformers' logits and tokens, the same bits however work is cut, mistakes that are refused."""

from collections.abc import Sequence
from ctypes import POINTER, c_uint32
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import VOCAB, batches, llama, qwen, shipped_methods, tokenizer, toy, with_toy_method
from transformers import (
    BitNetConfig,
    BitNetForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from wrinklefree.core import library
from wrinklefree.core.errors import UserError
from wrinklefree.core.method import QuantMethod, find, quant_layers
from wrinklefree.engine.assemble import assemble
from wrinklefree.engine.binding import Append, CSampling, Decoder, c_sampling, sample
from wrinklefree.engine.engine import CHUNK, SCORED, Engine, supports
from wrinklefree.engine.sampling import Sampling
from wrinklefree.engine.source import ModelSource
from wrinklefree.export.formats.packed import export_packed, pack_model
from wrinklefree.generate import generate
from wrinklefree.generate.open import open_engine
from wrinklefree.generate.text import TextStream
from wrinklefree.models.load import load_model
from wrinklefree.packed.products.choose import set_exact

pytestmark = [
    pytest.mark.numeric,
    pytest.mark.skipif(library.available() is not None, reason=str(library.available())),
]

torch.set_num_threads(1)
CONTEXT = 300
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
EXPERTS = {"num_local_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 22, "norm_topk_prob": True}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 75, "rope_theta": 1e4}


def build(model: type[PreTrainedModel], config: type[Any], **values: Any) -> PreTrainedModel:
    """A random toy of a family, with gains and biases that matter."""
    torch.manual_seed(0)
    shape = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 77, "num_hidden_layers": 4, "head_dim": 16}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT}
    ends = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": False}
    built = model(config(**(shape | ends | values))).eval()
    if built.config.model_type in ("qwen3_moe", "mixtral"):
        built.set_experts_implementation("eager")  # the fast one wants widths in steps of 16 bytes
    for name, parameter in built.named_parameters():
        if parameter.ndim == 1:
            gain = "norm" in name or name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight"))
            torch.nn.init.normal_(parameter, mean=1.0 if gain else 0.0, std=0.3)
    return built


FAMILY = {
    "llama": lambda: build(LlamaForCausalLM, LlamaConfig),
    "tied, one head of keys, odd width of a head": lambda: build(
        LlamaForCausalLM, LlamaConfig, tie_word_embeddings=True, num_key_value_heads=1, head_dim=18
    ),
    "llama3 positions": lambda: build(
        LlamaForCausalLM,
        LlamaConfig,
        rope_parameters=LLAMA3 | {"rope_theta": 1e4, "original_max_position_embeddings": 32},
    ),
    "yarn positions": lambda: build(LlamaForCausalLM, LlamaConfig, rope_parameters=YARN),
    "biases": lambda: build(LlamaForCausalLM, LlamaConfig, attention_bias=True, mlp_bias=True),
    "qwen2": lambda: build(Qwen2ForCausalLM, Qwen2Config),
    "qwen2 with windows": lambda: build(
        Qwen2ForCausalLM, Qwen2Config, use_sliding_window=True, sliding_window=70, max_window_layers=2
    ),
    "qwen3": lambda: build(Qwen3ForCausalLM, Qwen3Config, head_dim=32),
    "smollm3": lambda: build(SmolLM3ForCausalLM, SmolLM3Config),
    "mistral": lambda: build(MistralForCausalLM, MistralConfig, sliding_window=20),
    "bitnet": lambda: build(BitNetForCausalLM, BitNetConfig),
    "gemma3": lambda: build(
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        tie_word_embeddings=True,
        sliding_window=30,
        query_pre_attn_scalar=24,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        },
    ),
    "phi3": lambda: build(Phi3ForCausalLM, Phi3Config, sliding_window=30),
    "phi3, three quarters of a head rotated": lambda: build(
        Phi3ForCausalLM,
        Phi3Config,
        rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.75, "rope_theta": 1e4},
    ),
    "gpt2": lambda: build(
        GPT2LMHeadModel, GPT2Config, hidden_size=66, num_attention_heads=3, head_dim=22, tie_word_embeddings=True
    ),
    "qwen3_moe": lambda: build(Qwen3MoeForCausalLM, Qwen3MoeConfig, **EXPERTS),
    "qwen3_moe, some layers without experts, shares as they are": lambda: build(
        Qwen3MoeForCausalLM, Qwen3MoeConfig, **EXPERTS | {"norm_topk_prob": False, "mlp_only_layers": [1]}
    ),
    "mixtral": lambda: build(MixtralForCausalLM, MixtralConfig, num_local_experts=4),
}


def ids(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def decoder(model: PreTrainedModel, mode: str = "exact", threads: int = 1, slots: int = 2) -> Decoder:
    weights = assemble(ModelSource(model), mode)
    return Decoder(library.Pool(threads), weights, context=CONTEXT, slots=slots, max_rows=CHUNK, mode=mode)


def read(native_decoder: Decoder, tokens: Sequence[int], sizes: Sequence[int], slot: int = 0) -> list[np.ndarray]:
    """Logits [vocab] after each piece of `tokens`."""
    found, start = [], 0
    for size in sizes:
        logits = np.zeros(VOCAB, np.float32)
        native_decoder.step([Append(slot, tokens[start : start + size], logits=logits)])
        found.append(logits)
        start += size
    return found


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILY)
def test_logits_are_those_of_transformers(name: str) -> None:
    model, tokens, sizes = FAMILY[name](), ids(200), (1, 1, 70, 1, 60, 5, 62)
    set_exact(model)
    expected = model(torch.tensor([tokens])).logits[0].numpy()
    for end, logits in zip(np.cumsum(sizes), read(decoder(model), tokens, sizes), strict=True):
        np.testing.assert_allclose(logits, expected[end - 1], rtol=0, atol=1e-5 * np.abs(expected).max())


def greedy(model: PreTrainedModel, prompt: Sequence[int], length: int, **more: Any) -> list[int]:
    """What transformers generates."""
    more |= {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": length}
    tokens = torch.tensor([list(prompt)])
    return model.generate(tokens, attention_mask=torch.ones_like(tokens), **more)[0, len(prompt) :].tolist()


@torch.no_grad()
def same(engine: Engine, model: PreTrainedModel, prompt: Sequence[int], length: int) -> bool:
    """Whether both generate the same, at least to where a difference of 1 % of a logit decides.

    Inputs rounded to 8 bits jump by a step where sums in another order end at the other side of a tie.
    """
    set_exact(model, engine.mode == "exact")
    expected, found = greedy(model, prompt, length), said(engine, prompt, length)
    first = next((i for i, pair in enumerate(zip(expected, found, strict=True)) if pair[0] != pair[1]), None)
    if first is None:
        return True
    logits = model(torch.tensor([[*prompt, *expected[:first]]])).logits[0, -1]
    best, second = logits.topk(2).values.tolist()
    return bool(best - second < 0.01 * logits.abs().max())


def said(engine: Engine, prompt: Sequence[int], length: int, **more: Any) -> list[int]:
    return list(engine.generate(prompt, Sampling(max_new_tokens=length, **more)))


@pytest.mark.parametrize("name", ["llama", "qwen3", "smollm3"])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_tokens_are_those_of_transformers(name: str, penalty: float) -> None:
    model = FAMILY[name]()
    engine = Engine.from_model(model, threads=2, mode="exact")
    expected = greedy(model, ids(40), 50, repetition_penalty=penalty)
    assert said(engine, ids(40), 50, repetition_penalty=penalty) == expected


def export(model: PreTrainedModel, out: Path, **options: Any) -> Path:
    method = next(iter(quant_layers(model).values())).config
    export_packed(model, tokenizer(), method, out, card="", force=False, batches=batches(), **options)
    return out


def read_exactly(folder: Path) -> PreTrainedModel:
    model = load_model(folder, dtype=torch.float32)[0]
    set_exact(model)
    return model


METHODS = {method.name: method for method in shipped_methods()}
PACKED = {f"{name} on {base.__name__}": (m, base) for name, m in METHODS.items() for base in (llama, qwen)}
PACKED |= {f"{name}, rotated, on llama": (replace(m, rotate_inputs=True), llama) for name, m in METHODS.items()}
PACKED["anemll, rotated, on qwen"] = (replace(METHODS["anemll"], rotate_inputs=True), qwen)
PACKED["norms in layers on qwen"] = (find("bitdistill")(name="bitdistill", norm_mode="per_linear"), qwen)


@pytest.mark.parametrize("head_bits", [None, 8, 4])
@pytest.mark.parametrize("name", PACKED)
def test_packed_folders_say_what_transformers_says(name: str, head_bits: Any, tmp_path: Path) -> None:
    method, base = PACKED[name]
    assert isinstance(method, QuantMethod)
    options = {"dense_dtype": "float32", "head_bits": head_bits}
    folder = export(method.prepare(base(initializer_range=0.3), batches()), tmp_path / "packed", **options)
    packed = read_exactly(folder)
    from_folder = Engine.from_folder(folder, threads=1, mode="exact")
    assert same(from_folder, packed, ids(20), 30)
    assert said(Engine.from_model(packed, threads=1, mode="exact"), ids(20), 30) == said(from_folder, ids(20), 30)


BEYOND_LLAMA = ("gemma3", "phi3", "gpt2", "qwen3_moe", "mixtral")


BEYOND = [(name, method) for name in BEYOND_LLAMA for method in METHODS]
QUICK = {(name, sorted(METHODS)[i % len(METHODS)]) for i, name in enumerate(BEYOND_LLAMA)}  # each family, each method


@pytest.mark.parametrize(
    ("name", "method"), [pytest.param(*both, marks=() if both in QUICK else pytest.mark.slow) for both in BEYOND]
)
def test_packed_folders_of_other_families_say_what_transformers_says(name: str, method: str, tmp_path: Path) -> None:
    base = FAMILY[name]()
    for parameter in base.parameters():
        if parameter.ndim > 1:
            parameter.data *= 10  # so that tokens differ
    head_bits = 8 if base.config.tie_word_embeddings else None
    chosen = METHODS[method]
    if "norm_mode" in vars(chosen):
        chosen = replace(chosen, norm_mode="none")  # SubLN is for layers that these do not have
    folder = export(chosen.prepare(base, batches()), tmp_path / "packed", dense_dtype="float32", head_bits=head_bits)
    packed = read_exactly(folder)
    from_folder = Engine.from_folder(folder, threads=1, mode="exact")
    assert same(from_folder, packed, ids(20), 30)
    assert said(Engine.from_model(packed, threads=1, mode="exact"), ids(20), 30) == said(from_folder, ids(20), 30)


@torch.no_grad()
@pytest.mark.parametrize("name", PACKED)
def test_int8_activations_stay_near(name: str) -> None:
    method, base = PACKED[name]
    model = pack_model(method.prepare(base(initializer_range=0.3), batches()), method, "float32")
    exact = read(decoder(model), ids(60), (60,))[0]
    near = read(decoder(model, "int8"), ids(60), (60,))[0]
    most = 0.08 if method.name == "residual_signs" else 0.06  # its weights have no form and are rounded to bytes, too
    assert 0 < np.linalg.norm(near - exact) < most * np.linalg.norm(exact)


def test_a_method_of_ones_own_runs(tmp_path: Path) -> None:
    with with_toy_method():
        folder = export(toy(int8=True).prepare(qwen(initializer_range=0.3)), tmp_path / "packed")
        packed = read_exactly(folder)
        assert same(Engine.from_folder(folder, mode="exact"), packed, ids(20), 30)


@pytest.mark.parametrize(
    "values", [{"name": "bitdistill"}, {"name": "bitdistill", "activation_bits": None}, {"name": "fairy2"}]
)
def test_the_embedded_model_says_the_same_quantized(values: dict[str, Any]) -> None:
    method = find(values["name"])(**values)
    assert isinstance(method, QuantMethod)
    trained, words = load_model("builtin:tiny", dtype=torch.float32)
    model = pack_model(method.prepare(trained), method, "float32")
    model = load_packed(model)
    engines = [Engine.from_model(model, threads=1, mode=mode) for mode in ("exact", "int8")]
    for text in ("def main(arguments):\n    return", "import ", "class A:\n    def ", "for i in "):
        assert all(same(engine, model, words(text).input_ids, 20) for engine in engines)


def test_a_half_cache_takes_half_the_memory_and_stays_near() -> None:
    model = FAMILY["llama"]()
    whole, half = (Engine.from_model(model, half_cache=half) for half in (False, True))
    logits = []
    for engine in (whole, half):
        before = engine.bytes()
        logits.append(read(engine._decoder, ids(200), (150, 50))[1])
        logits.append(np.float32(engine.bytes() - before))
    full, full_bytes, near, half_bytes = logits
    assert 0 < np.linalg.norm(near - full) < 0.02 * np.linalg.norm(full)
    assert half_bytes == full_bytes / 2


def load_packed(model: PreTrainedModel) -> PreTrainedModel:
    """`pack_model` leaves buffers that are not saved on the meta device."""
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    set_exact(model)
    return model.eval()


@pytest.mark.parametrize("mode", ["exact", "int8"])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_a_prompt_in_pieces_gives_the_same_bits(name: str, mode: str) -> None:
    model, tokens = FAMILY[name](), ids(150)
    whole = read(decoder(model, mode), tokens, (150,))[-1]
    assert np.array_equal(read(decoder(model, mode), tokens, [1] * 150)[-1], whole)
    assert np.array_equal(read(decoder(model, mode, threads=3), tokens, (63, 1, 2, 84))[-1], whole)


@pytest.mark.parametrize("mode", ["exact", "int8"])
def test_sequences_together_give_the_bits_of_each_alone(mode: str) -> None:
    model = FAMILY["llama"]()
    prompts = [ids(length, seed) for seed, length in enumerate((90, 3, 17))]
    alone = [said(Engine.from_model(model, mode=mode), p, 20, temperature=1.0, seed=i) for i, p in enumerate(prompts)]
    engine = Engine.from_model(model, threads=2, slots=3, mode=mode)
    slots = [engine.open(p, Sampling(20, temperature=1.0, seed=i)) for i, p in enumerate(prompts)]
    found: dict[int, list[int]] = {slot: [] for slot in slots}
    while tokens := engine.step():
        for slot, token in tokens.items():
            found[slot].append(token)
    assert [found[slot] for slot in slots] == alone
    assert [engine.finished(slot) for slot in slots] == ["length"] * 3


def test_long_prompts_are_read_in_pieces_while_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.from_model(FAMILY["llama"](), slots=3, mode="exact")
    talking = engine.open(ids(4), Sampling(50))
    engine.step()
    long, short = engine.open(ids(150, 1), Sampling(5)), engine.open(ids(30, 2), Sampling(5))
    assert engine.step().keys() == {talking}  # how long a step takes without a piece is measured first
    assert [len(engine._slots[slot].open.pending) for slot in (long, short)] == [150, 30]
    monkeypatch.setattr(engine._pace, "budget", lambda streams: 80)
    assert engine.step().keys() == {talking, short}  # which leaves the rest of its half to the other
    assert len(engine._slots[long].open.pending) == 100
    assert [engine.step().keys() for _ in range(2)] == [{talking, short}, {talking, short, long}]


def test_the_next_turn_reads_only_what_is_new() -> None:
    model = FAMILY["llama"]()
    engine, fresh = (Engine.from_model(model, slots=2, mode="exact") for _ in range(2))
    first = said(engine, ids(60), 10)
    turn = [*ids(60), *first, 5, 6, 7]
    slot = engine.open(turn, Sampling(10))
    assert len(engine.step()) == 1
    engine.close(slot)
    assert said(engine, turn, 10) == said(fresh, turn, 10)
    other = [*ids(30), *ids(30, 3)]  # leaves the known text in the middle
    assert said(engine, other, 10) == said(fresh, other, 10)


def test_memory_grows_with_the_text() -> None:
    small = decoder(FAMILY["llama"]())
    before = small.bytes()
    read(small, ids(200), (200,))
    pages = 4 * 4 * 2 * 64 * (16 + 16) * 4  # pages, layers, heads, positions, keys and values, bytes
    assert small.bytes() - before == pages
    small.clear(0)
    assert small.bytes() == before


def settings(**values: Any) -> CSampling:
    return CSampling(**({"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0} | values))


def draws(logits: torch.Tensor, count: int, **values: Any) -> torch.Tensor:
    """How often each token is drawn [vocab]."""
    tokens = [sample(logits.numpy(), [], settings(counter=i, **values)) for i in range(count)]
    return torch.bincount(torch.tensor(tokens), minlength=len(logits))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    logits, count = torch.randn(40, generator=torch.Generator().manual_seed(1)), 20000
    expected = count * (logits / temperature).softmax(0)
    statistic = ((draws(logits, count, temperature=temperature, seed=3) - expected) ** 2 / expected).sum()
    assert statistic < 39 + 4 * (2 * 39) ** 0.5  # mean and four deviations of chi-squared


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (0, 0.6), (7, 0.7), (0, 0.05), (200, 0.999), (1, 1.0)])
def test_the_same_tokens_are_left_as_in_transformers(top_k: int, top_p: float) -> None:
    for seed in range(3):
        logits = 2 * torch.randn(200, generator=torch.Generator().manual_seed(seed))
        scores = TopKLogitsWarper(top_k)(None, logits[None]) if top_k else logits[None]
        expected = TopPLogitsWarper(top_p)(None, scores)[0].softmax(0) if top_p < 1 else scores[0].softmax(0)
        found = draws(logits, 3000, top_k=top_k, top_p=top_p)
        assert not found[expected == 0].any()
        assert found[expected > 0.01].all()
        assert ((found / 3000 - expected).abs() < 0.05).all()


def test_ties_go_to_the_lowest_id() -> None:
    logits = np.zeros(100, np.float32)
    logits[[30, 31, 99]] = 2.0
    assert sample(logits, [], settings(temperature=0.0)) == 30
    assert sample(logits, [30], settings(temperature=0.0, repetition_penalty=1.5)) == 31


def test_same_seed_same_tokens() -> None:
    engine = Engine.from_model(FAMILY["llama"](), mode="int8")
    texts = [said(engine, ids(9), 30, temperature=1.0, top_k=40, top_p=0.9, seed=seed) for seed in (7, 7, 8, 2**70 + 7)]
    assert texts[0] == texts[1] == texts[3] != texts[2]


def test_it_ends_with_a_stop_token_the_length_and_the_context() -> None:
    engine = Engine.from_model(FAMILY["llama"](), mode="exact")
    free = said(engine, ids(9), 20)
    end = free[4]
    assert said(engine, ids(9), 20, stop_tokens=frozenset([end])) == free[: free.index(end) + 1]
    slot = engine.open(ids(CONTEXT - 4), Sampling(1000))
    count = 0
    while engine.finished(slot) is None:
        count += len(engine.step())
    assert (count, engine.finished(slot)) == (4, "length")


def test_mistakes_are_refused_in_one_line() -> None:
    engine = Engine.from_model(FAMILY["llama"](), mode="exact")
    for prompt, message in (
        ([], "empty"),
        ([0] * CONTEXT, f"context is {CONTEXT}"),
        ([0, VOCAB], f"token id {VOCAB}"),
        ([-1], "token id -1"),
    ):
        with pytest.raises(UserError, match=message):
            engine.open(prompt, Sampling())
    engine.open([1], Sampling())
    with pytest.raises(UserError, match="1 slots are taken"):
        engine.open([1], Sampling())
    with pytest.raises(UserError, match="nothing is open"):
        engine.finished(3)
    for field in ({"temperature": -1}, {"top_p": 0}, {"max_new_tokens": 0}, {"repetition_penalty": float("nan")}):
        with pytest.raises(UserError, match=next(iter(field))):
            Sampling(**field)


def test_the_other_side_refuses_what_it_cannot_do_and_goes_on() -> None:
    small = decoder(FAMILY["llama"]())
    read(small, ids(10), (10,))
    for appends, message in (
        ([Append(0, [VOCAB])], "vocabulary"),
        ([Append(0, [-1])], "vocabulary"),
        ([Append(2, [1])], "slot"),
        ([Append(0, [1]), Append(0, [1])], "slot"),
        ([Append(0, [])], "no tokens"),
        ([Append(0, [1] * (CONTEXT - 9))], "context"),
        ([Append(0, [1] * 250), Append(1, [1] * 250)], "max_rows"),
        ([Append(0, [1], settings(top_p=0.0))], "top_p"),
        ([], "append"),
    ):
        with pytest.raises(ValueError, match=message):
            small.step(appends)
    with pytest.raises(ValueError, match="length"):
        small.truncate(0, 11)
    assert small.length(0) == 10
    assert read(small, [1], (1,))[0].any()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope_type dynamic"),
        ({"head_dim": 512}, "heads of 512"),
        ({"quantization_config": {"quant_method": "bitnet"}}, "quant_method bitnet"),
    ],
)
def test_it_says_what_it_cannot_run(values: dict[str, Any], message: str) -> None:
    assert message in str(supports(LlamaConfig(**values)))
    assert supports(LlamaConfig()) is None


def test_other_architectures_are_left_to_transformers() -> None:
    from transformers import OPTConfig, OPTForCausalLM

    assert "model_type opt" in str(supports(OPTConfig()))
    model = OPTForCausalLM(OPTConfig(num_hidden_layers=1, num_attention_heads=2, hidden_size=8, vocab_size=VOCAB))
    with pytest.raises(UserError, match="cannot run this model: model_type opt"):
        Engine.from_model(model)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (GPT2Config(add_cross_attention=True), "add_cross_attention"),
        (Gemma3TextConfig(final_logit_softcapping=30.0), "final_logit_softcapping"),
        (LlamaConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "rope_type dynamic"),
        (Qwen3MoeConfig(num_experts_per_tok=9, num_local_experts=8), "num_experts_per_tok"),
    ],
)
def test_what_the_loop_does_not_compute_is_named(config: Any, word: str) -> None:
    assert word in str(supports(config))


def test_a_folder_that_is_not_what_it_says_is_refused(tmp_path: Path) -> None:
    with with_toy_method():
        folder = export(toy().prepare(llama()), tmp_path / "packed")
        config = (folder / "config.json").read_text()
        (folder / "config.json").write_text(config.replace('"hidden_size": 64', '"hidden_size": 128'))
        with pytest.raises(UserError, match="has the shape"):
            Engine.from_folder(folder)
        (folder / "config.json").write_text(config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
        with pytest.raises(UserError, match="missing"):
            Engine.from_folder(folder)
        (folder / "config.json").write_text(config)
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(UserError, match="damaged"):
            Engine.from_folder(folder)
    with pytest.raises(UserError, match="no model"):
        Engine.from_folder(tmp_path / "nothing")


def test_text_is_generated_alike_by_both_engines(capsys: pytest.CaptureFixture[str]) -> None:
    model, words = llama(initializer_range=0.3), tokenizer()
    engine = Engine.from_model(model, mode="exact")
    texts = [generate.stream(each, words, "w1 w2 w3", 20) for each in (model, engine)]
    assert texts[0] == texts[1] != ""
    assert capsys.readouterr().out == f"w1 w2 w3{texts[0]}\nw1 w2 w3{texts[1]}\n"
    end = texts[0][len(texts[0]) // 2 :][:5]  # somewhere in the middle of words
    for each in (model, engine):
        assert generate.complete(each, words, "w1 w2 w3", 20, stop=[end]) == texts[0][: texts[0].index(end)]
    with pytest.raises(UserError, match="context is 64"):
        generate.complete(engine, words, "w1 " * 64)


def test_the_command_says_which_engine_runs(tmp_path: Path) -> None:
    folder = export(METHODS["bitdistill"].prepare(llama()), tmp_path / "packed", dense_dtype="float32")
    engine, words, line = open_engine(str(folder), "auto", threads=1)
    assert isinstance(engine, Engine)
    assert line == f"engine: native, {library.isa()}, 1 thread"
    assert generate.complete(engine, words, "w1 w2", 3)
    assert open_engine(str(folder), "transformers")[2] == "engine: transformers (asked for)"
    assert open_engine("tiny", "auto")[2] == "engine: transformers (not a packed folder)"
    assert open_engine("tiny", "native", threads=2)[2] == f"engine: native, {library.isa()}, 2 threads"
    with pytest.raises(UserError, match="no such folder"):
        open_engine("./nowhere", "native")


class Letters:
    """A tokenizer whose tokens are bytes."""

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")


@pytest.mark.parametrize("stops", [(), ("zz",), ("END", "cd"), ("\u20ac!", "x"), ("abcdé",)])
def test_pieces_are_the_text_up_to_the_first_stop(stops: tuple[str, ...]) -> None:
    whole = "abcdé \u20ac 10 ENEND of it"
    expected = min((whole[: whole.find(stop)] for stop in stops if stop in whole), key=len, default=whole)
    stream, shown = TextStream(Letters(), stops), ""
    for token in whole.encode():
        shown += stream.add(token)
        assert expected.startswith(shown)
        if stream.stopped:
            break
    shown += stream.end()
    assert (shown, stream.text, stream.stopped) == (expected, expected, expected != whole)


def test_after_a_reset_nothing_is_open_and_nothing_remembered() -> None:
    engine = Engine.from_model(FAMILY["llama"](), mode="exact", slots=2)
    empty, expected = engine.bytes(), said(engine, ids(9), 5)
    engine.open(ids(9), Sampling())
    engine.step()
    engine.reset()
    assert engine.bytes() == empty
    assert said(engine, ids(9), 5) == expected


@pytest.mark.parametrize("values", [{"min_p": 0.2}, {"min_p": 0.1, "top_k": 5}, {"min_p": 0.3, "top_p": 0.8}])
def test_min_p_leaves_what_transformers_leaves(values: dict[str, Any]) -> None:
    logits = 2 * torch.randn(200, generator=torch.Generator().manual_seed(0))
    scores = TopKLogitsWarper(values["top_k"])(None, logits[None]) if "top_k" in values else logits[None]
    scores = TopPLogitsWarper(values["top_p"])(None, scores) if "top_p" in values else scores
    expected = MinPLogitsWarper(values["min_p"])(None, scores)[0].softmax(0)
    found = draws(logits, 3000, **values)
    assert not found[expected == 0].any()
    assert ((found / 3000 - expected).abs() < 0.05).all()


def test_biases_and_penalties_change_the_logits_before_the_choice() -> None:
    logits = np.zeros(100, np.float32)
    logits[[3, 4, 5]] = [3.0, 2.0, 1.9]
    answer = [4, 4, 3]  # after a prompt of one token, 3
    cold = {"temperature": 0.0}
    for sampling, expected in (
        (Sampling(**cold), 3),
        (Sampling(**cold, logit_bias={3: -5, 5: 0.5}), 5),
        (Sampling(**cold, presence_penalty=1.5), 5),
        (Sampling(**cold, presence_penalty=1.05), 3),
        (Sampling(**cold, frequency_penalty=1.0), 3),
        (Sampling(**cold, frequency_penalty=1.2), 5),
    ):
        assert sample(logits, [3, *answer], c_sampling(sampling, 1)) == expected
    assert sample(logits, [3], c_sampling(Sampling(**cold, presence_penalty=2.0), 1)) == 3  # the prompt does not count
    allowed = np.zeros(4, np.uint32)
    allowed[2] = 1 << 9
    masked = settings(temperature=0.0, allowed=allowed.ctypes.data_as(POINTER(c_uint32)))
    assert sample(logits, [], masked) == 2 * 32 + 9


@pytest.mark.parametrize("values", [{"min_p": 1.5}, {"presence_penalty": float("inf")}, {"num_biases": 1}])
def test_the_other_side_refuses_odd_settings(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"min_p|penalty|biases"):
        sample(np.zeros(9, np.float32), [], settings(**values))


def test_scores_are_the_log_softmax_of_the_model_however_a_prompt_is_cut() -> None:
    model, prompt = FAMILY["llama"](), ids(SCORED + 20)
    engine = Engine.from_model(model, mode="exact", slots=2)
    said(engine, prompt, 3)  # the prompt's keys are known, and yet its tokens are scored
    slots = [engine.open(prompt, Sampling(4, logprobs=2, score_prompt=whole)) for whole in (True, False)]
    while any(engine.finished(slot) is None for slot in slots):
        engine.step()
    tokens = [*engine._slots[slots[0]].tokens, *engine._slots[slots[0]].open.pending]
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    whole, answer = (engine.scores(slot) for slot in slots)
    assert (len(whole), len(answer), engine.scores(slots[0])) == (len(tokens) - 1, 4, [])
    assert whole[-4:] == answer
    for i, one in enumerate(whole):
        torch.testing.assert_close(one.logprob, float(expected[i, tokens[i + 1]]), atol=1e-3, rtol=0)
        assert one.likeliest[0][0] == int(expected[i].argmax())
        assert len(one.likeliest) == 2
    assert [one.likeliest[0][1] for one in answer] == [one.logprob for one in answer]  # greedy


def rows_of(engine: Engine) -> list[int]:
    """Steps the engine until nothing is left to do. Returns how many tokens each step read."""
    rows, own = [], engine._decoder.step
    engine._decoder.step = lambda appends: (rows.append(sum(len(a.tokens) for a in appends)), own(appends))[1]
    while engine.step() or any(slot.open and not slot.open.finished for slot in engine._slots):
        pass
    engine._decoder.step = own
    return rows


def test_a_beginning_that_several_prompts_share_is_read_once() -> None:
    """Opened together, before any of it has been read."""
    model, shared = FAMILY["llama"](), ids(150)
    prompts = [[*shared, *ids(12, seed)] for seed in (1, 2, 3)] + [ids(40, 9), shared]
    engine, fresh = Engine.from_model(model, slots=5, mode="exact"), Engine.from_model(model, mode="exact")
    slots = [engine.open(prompt, Sampling(1)) for prompt in prompts]
    assert sum(rows_of(engine)) <= 150 + 4 * 12 + 40
    for slot, prompt in zip(slots, prompts, strict=True):
        assert engine._slots[slot].tokens == prompt
        (expected,) = said(fresh, prompt, 1)
        assert engine._slots[slot].open.pending == [expected]


def test_who_waits_for_another_goes_on_without_it() -> None:
    model, shared = FAMILY["llama"](), ids(CHUNK + 20)
    engine, fresh = Engine.from_model(model, slots=2, mode="exact"), Engine.from_model(model, mode="exact")
    leader = engine.open([*shared, 1], Sampling(1))
    other = engine.open([*shared, 2, 3], Sampling(4))
    engine.step()
    engine.close(leader)
    taken = engine.open(ids(20, 7), Sampling(1))  # the slot has another text now
    assert taken == leader
    found = []
    while engine.finished(other) is None:
        found += [token for slot, token in engine.step().items() if slot == other]
    assert found == said(fresh, [*shared, 2, 3], 4)


def test_what_a_slot_knows_serves_another_even_while_it_is_open() -> None:
    engine, fresh = (Engine.from_model(FAMILY["llama"](), mode="exact", slots=2) for _ in range(2))
    first = engine.open(ids(100), Sampling(50))
    engine.step()
    second = engine.open([*ids(90), 3, 4, 5], Sampling(6))
    assert engine._slots[second].open.pending == [3, 4, 5]
    found = []
    while engine.finished(second) is None:
        found += [token for slot, token in engine.step().items() if slot == second]
    assert found == said(fresh, [*ids(90), 3, 4, 5], 6)
    engine.close(second)
    while engine.finished(first) is None:
        engine.step()
    engine.close(first)
    assert engine._slots[engine.open(ids(70), Sampling(1))].open.pending == [ids(70)[-1]]
