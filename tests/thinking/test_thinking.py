"""LLM-TRM: the task, hidden pairs, the recursive network, soft tokens, reinforcement, and what compares them."""

import copy
import itertools
import json
import math
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny import llama
from torch import Tensor
from toyrun import rows
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from wrinklefree.cli import app
from wrinklefree.config.compose import config_yaml, load_config
from wrinklefree.config.schema import Config
from wrinklefree.config.thinking import GRPOConfig, NetworkConfig, PairsConfig
from wrinklefree.core.errors import UserError
from wrinklefree.data import chains, problems
from wrinklefree.data.packing import encode, make_batch, pack_whole
from wrinklefree.data.problems import Problem, same_answer
from wrinklefree.evaluate.paired import mcnemar, quantile
from wrinklefree.models.load import load_model
from wrinklefree.objectives.language_model import BodyAndHead
from wrinklefree.runs import launch, prerequisites
from wrinklefree.thinking import compare, hidden_pairs, loading, pairs, pairs_stage, stages, tags
from wrinklefree.thinking.grpo import GRPO, group_advantages, policy_loss
from wrinklefree.thinking.hidden_pairs import HiddenPairs, Pair
from wrinklefree.thinking.injection import RIDGE, fit_adapter
from wrinklefree.thinking.moments import Moments, tied_code
from wrinklefree.thinking.network import LatentThinker, RecursiveNetwork, ThinkerConfig, make_thinker
from wrinklefree.thinking.recursion import Recursion, prompt_of, read, read_out
from wrinklefree.thinking.reply import reply
from wrinklefree.thinking.speech import Speaker
from wrinklefree.training import checkpoint

pytestmark = pytest.mark.numeric

TOKENIZER = chains.tokenizer()
TOKENS = {"segments": "tokens", "segment_tokens": 2}


def thinking_model() -> LlamaForCausalLM:
    """A small Llama that has learned the form of a thought, and little of its content.

    The rate falls to zero: at the end of a constant one, what it says first changes with every step, and so with every
    processor's rounding. It may then say one word alone, of which the tests below would learn nothing.
    """
    shape = {"vocab_size": len(TOKENIZER), "max_position_embeddings": 256, "tie_word_embeddings": False}
    ends = {"bos_token_id": TOKENIZER.bos_token_id, "eos_token_id": TOKENIZER.eos_token_id}
    model = llama(**shape, **ends).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=110)
    documents = encode(TOKENIZER, chains.examples("train")[:4000])
    blocks = pack_whole(documents, 128, TOKENIZER.eos_token_id)
    for step in range(110):
        batch = make_batch(blocks[8 * step % (len(blocks) - 8) :][:8])
        model(**batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a thinking model, a compressor and hidden pairs, all of an experiment named `toy`."""
    folder = tmp_path_factory.mktemp("thinking")
    model = thinking_model()
    model.save_pretrained(folder / "lm")
    TOKENIZER.save_pretrained(folder / "lm")
    compressor(folder, model)
    pairs_stage.make_pairs(resolved(folder, "trm_pairs"), force=False)
    return folder


def compressor(folder: Path, model: LlamaForCausalLM) -> None:
    config = resolved(folder, "trm_compressor")
    moments, decoder = Moments.zeros(64), BodyAndHead(model)
    documents = encode(TOKENIZER, chains.examples("train")[:200])
    with torch.no_grad():
        moments.add(decoder.states(make_batch(pack_whole(documents, 128, 0))).flatten(0, 1))
        thinker = make_thinker(model, loading.settings_of(config))
        thinker.compressor.weight.copy_(tied_code(moments, 32))
    checkpoint.save(Path(config.output_dir) / "final", thinker, TOKENIZER, config_yaml(config), None)


def resolved(folder: Path, training: str, *more: str) -> Config:
    return load_config(overrides(folder, training, *more))


def overrides(folder: Path, training: str, *more: str) -> list[str]:
    network = {"hidden_size": 32, "num_heads": 2, "max_thoughts": 6}
    made = {
        "num_problems": 120,
        "num_heldout": 40,
        "max_new_tokens": 20,
        "batch_size": 32,
        "keep_wrong": True,
        **TOKENS,
    }
    given = [
        f"training={training}",
        f"model={folder / 'lm'}",
        "experiment=toy",
        f"output_root={folder}",
        "training.precision=fp32",
        "thinking.d_compressed=32",
        *(f"thinking.network.{key}={value}" for key, value in network.items()),
        *(f"thinking.pairs.{key}={value}" for key, value in made.items()),
    ]
    if training in ("trm_recursion", "trm_injection", "trm_grpo"):
        steps = {"max_steps": 4, "batch_size": 4, "log_interval": 1, "eval_interval": 2, "eval_examples": 10}
        given += [f"training.{key}={value}" for key, value in steps.items()]
    return [*given, *more]


@pytest.fixture(scope="module")
def speaker(toy: Path) -> Speaker:
    model, tokenizer = load_model(toy / "lm", dtype=torch.float32)
    return Speaker(model.requires_grad_(False), tokenizer)


@pytest.fixture
def thinker(toy: Path) -> LatentThinker:
    """With the toy's compressor, a random network and a random adapter."""
    torch.manual_seed(0)
    before, _ = loading.load_thinker(toy / "toy_trm_compressor")
    return before.eval()


@pytest.fixture(scope="module")
def train(toy: Path) -> HiddenPairs:
    return HiddenPairs(toy / "toy_trm_pairs", "train")


def network(**values: Any) -> RecursiveNetwork:
    torch.manual_seed(0)
    return RecursiveNetwork(ThinkerConfig(**({"d_compressed": 8, "hidden_size": 32, "num_heads": 2} | values)))


def context_of(net: RecursiveNetwork, lengths: Sequence[int] = (5, 3)) -> Any:
    torch.manual_seed(1)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return net.context(torch.randn(len(lengths), max(lengths), 8) * mask[..., None], mask)


# The task.


def test_a_chain_is_worked_out_from_left_to_right() -> None:
    chain = chains.Chain(3, ("+2", "*4", "+6"))
    assert chain.results == [5, 6, 5]
    assert (chain.question, chain.thought, chain.answer) == ("3 +2 *4 +6 ?", "+2 5 *4 6 +6 5", "5")


def test_no_question_of_several_steps_is_on_both_sides() -> None:
    sides = [
        {c.question for c in chains.chains(split, 3000) if len(c.operations) > 1} for split in ("train", "heldout")
    ]
    assert all(len(side) > 1000 for side in sides)
    assert not sides[0] & sides[1]


def test_every_length_is_equally_likely_on_both_sides() -> None:
    for split in ("train", "heldout"):
        lengths = [len(c.operations) for c in chains.chains(split, 3000)]
        assert all(400 < lengths.count(n) < 600 for n in range(1, chains.LONGEST + 1))


def test_a_text_of_the_task_is_tokens_and_text_again() -> None:
    example = chains.examples("train")[0]
    text = example.prompt + example.answer
    ids = TOKENIZER(text).input_ids
    assert ids[0] == TOKENIZER.bos_token_id
    assert TOKENIZER.decode(ids[1:]) == text
    assert len(ids) == len(text.split()) + 1


# Problems and answers.


@pytest.mark.parametrize(
    ("said", "gold", "right"),
    [
        ("The answer is $1,200.", "1200", True),
        ("#### 72\n", "72", True),
        ("first 3, then 72", "72", True),
        ("72 apples, of which 3 are red", "72", False),
        ("0.5", "1/2", True),
        ("-4", "4", False),
        ("1.5/2", "3", False),
        ("nothing", "3", False),
        ("", "3", False),
        ("1/0", "0", False),
        ("9" * 6000, "9", False),
        ("Paris.", "paris", True),
        ("5", "1e999999999", False),
    ],
)
def test_an_answer_is_right_by_its_value(said: str, gold: str, right: bool) -> None:
    assert same_answer(said, gold) is right


def test_a_file_is_split_by_problem(tmp_path: Path) -> None:
    rows = [{"question": f"How much is {n % 30}?", "answer": f"it is\n#### {n % 30}"} for n in range(60)]
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    train, heldout = (problems.load(str(file), split, 100, 10) for split in ("train", "heldout"))
    assert (len(train), len(heldout)) == (20, 10)
    assert not {p.id for p in train} & {p.id for p in heldout}
    assert all(p.question == f"How much is {p.gold}?" for p in train)


def test_what_is_no_problem_is_named(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"question": "a", "answer": "1"}\n{"question": "b"}\n')
    with pytest.raises(UserError, match=r"p.jsonl, row 2: a problem needs a 'answer'"):
        problems.load(str(file), "train", 10, 1)
    with pytest.raises(UserError, match="no such file"):
        problems.load("nowhere.jsonl", "train", 10, 1)
    file.write_text('{"question": "a", "answer": "1"}\n')
    with pytest.raises(UserError, match="no problem for the heldout split"):
        problems.load(str(file), "heldout", 10, 1)


def test_a_model_without_the_tags_is_refused() -> None:
    from tiny import tokenizer

    with pytest.raises(UserError, match="no single tokens <think> and </think>"):
        tags.find_tags(tokenizer())


# Hidden pairs.


def test_the_states_are_those_that_the_model_had_while_it_thought(toy: Path, speaker: Speaker) -> None:
    """Teacher-forced states against those of generation itself: none is off by one, whatever the batch."""
    config = PairsConfig(**TOKENS, max_new_tokens=20)
    asked = [(Problem(c.question, c.answer), 0) for c in chains.chains("heldout", 6, seed=3)]
    records = pairs.Writer(speaker.model, speaker.tokenizer, config).write("heldout", asked, seed=0)
    records = [r for r in records if r["closed"] and r["thought_ids"] and r["answer_ids"]]
    assert len(records) > 2
    whole = LatentThinker(ThinkerConfig(width=64, d_compressed=64))  # nothing is lost
    reader = pairs.Reader(speaker.model, speaker.tokenizer, whole, config)
    for record, pair in zip(records, reader.read(records), strict=True):
        ids = torch.tensor([record["prompt_ids"]])
        out = speaker.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=20,
            output_hidden_states=True,
            return_dict_in_generate=True,
        )
        generated = [step[-1][0, -1] for step in out.hidden_states]  # the state that each new token came from
        places = [place - len(record["prompt_ids"]) + 1 for place in reader.places(record)]
        states = whole.compressor.decompress(pair.thoughts)
        torch.testing.assert_close(states, torch.stack([generated[place] for place in places]), atol=1e-4, rtol=1e-4)
        new = out.sequences[0, ids.shape[1] :]
        assert pair.tokens.tolist() == new[places].tolist()


def test_the_last_thought_is_where_the_answer_begins(thinker: LatentThinker, speaker: Speaker) -> None:
    reader = pairs.Reader(speaker.model, speaker.tokenizer, thinker, PairsConfig(**TOKENS))
    record = {"prompt_ids": [1, 7, 14, 5, 3], "thought_ids": [14, 9, 15, 8], "answer_ids": [8, 2]}
    assert reader.places(record) == [5, 9]  # 14 leads to 9; </think> at 9 leads to the answer
    long = record | {"thought_ids": [14, 9] * 10}
    found = reader.places(long)
    assert len(found) == thinker.config.max_thoughts
    assert found[-1] == 5 + 20


def test_segments_of_lines_end_before_the_break(thinker: LatentThinker, speaker: Speaker) -> None:
    class Lines:
        eos_token_id = 2

        def decode(self, ids: list[int]) -> str:
            return {0: "\n", 1: "a", 2: "b"}[ids[0]]

        def __call__(self, text: str, add_special_tokens: bool) -> Any:
            return type("Ids", (), {"input_ids": [{"<think>": 3, "</think>": 4}[text]]})

        unk_token_id = None

    reader = pairs.Reader(speaker.model, Lines(), thinker, PairsConfig())  # type: ignore[arg-type]
    record = {"prompt_ids": [1, 3], "thought_ids": [0, 1, 2, 0, 0, 1, 0, 2, 2], "answer_ids": [0, 0, 1]}
    assert reader.places(record) == [2 + 2 - 1, 2 + 5 - 1, 2 + 9 + 2]


def test_nothing_is_thought_about_twice(toy: Path, tmp_path: Path) -> None:
    """A crash in the middle of a line, then the same command: all problems once, the same pairs."""
    shutil.copytree(toy, tmp_path / "again")
    folder = tmp_path / "again" / "toy_trm_pairs"
    file = folder / "thoughts-000.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:50]) + lines[50][:30])
    (folder / "manifest.json").unlink()
    (folder / "train-00000.safetensors").unlink()
    with pytest.raises(UserError, match="no hidden pairs"):
        HiddenPairs(folder, "train")
    pairs_stage.make_pairs(resolved(tmp_path / "again", "trm_pairs", f"model.pretrained={toy / 'lm'}"), force=False)
    records = pairs.read_thoughts(folder)
    keys = [(r["split"], r["id"], r["sample"]) for r in records]
    assert len(set(keys)) == len(keys) == len(lines)
    before, after = (
        load_file(toy / "toy_trm_pairs" / "train-00000.safetensors"),
        load_file(folder / "train-00000.safetensors"),
    )
    assert all(torch.equal(before[name], after[name]) for name in before if not before[name].is_floating_point())
    torch.testing.assert_close(before["thoughts"], after["thoughts"], atol=1e-2, rtol=1e-2)


def test_other_settings_do_not_go_on_with_these_thoughts(toy: Path) -> None:
    with pytest.raises(UserError, match="begun with another model, compressor or"):
        pairs_stage.make_pairs(resolved(toy, "trm_pairs", "thinking.pairs.temperature=0.5"), force=False)


def test_what_is_not_kept_is_counted() -> None:
    def record(name: str, **values: Any) -> dict[str, Any]:
        whole = {"split": "train", "id": name, "sample": 0, "thought_ids": [1, 2], "answer_ids": [3]}
        return whole | {"closed": True, "correct": True} | values

    records = [
        record("good"),
        record("good", sample=1),
        record("open", closed=False),
        record("empty", thought_ids=[]),
        record("wrong", correct=False),
        record("long", thought_ids=[1] * 9),
        record("foreign"),
    ]
    order = [("train", name) for name in ("long", "wrong", "good", "open", "empty")]
    kept, dropped = pairs.select(records, PairsConfig(max_thought_tokens=8), order)
    assert [r["id"] for r in kept] == ["good"]
    assert dropped == {pairs.REPEATED: 1, pairs.UNCLOSED: 2, pairs.WRONG: 1, pairs.LONG: 1}


def test_an_empty_split_says_why(toy: Path, tmp_path: Path) -> None:
    shutil.copytree(toy / "toy_trm_compressor", tmp_path / "short_trm_compressor")
    with pytest.raises(UserError, match=r"no thought of the train split can be kept \(\d+ no closing tag"):
        pairs_stage.make_pairs(
            resolved(
                toy, "trm_pairs", "thinking.pairs.max_new_tokens=1", "experiment=short", f"output_root={tmp_path}"
            ),
            force=False,
        )


def some_pairs(count: int = 3) -> list[Pair]:
    torch.manual_seed(0)
    return [
        Pair(
            torch.arange(n + 2),
            torch.arange(2 * n),
            torch.arange(2),
            torch.randn(n + 2, 4),
            torch.randn(n, 4),
            torch.arange(n),
        )
        for n in range(1, count + 1)
    ]


def test_a_shard_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "train-00000.safetensors"
    hidden_pairs.write_shard(path, some_pairs(), "key")
    for wrote, found in zip(some_pairs(), hidden_pairs.read_shard(path, "key"), strict=True):
        assert all(torch.equal(a.half(), b.half()) for a, b in zip(wrote, found, strict=True))


def test_a_broken_or_foreign_shard_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train-00000.safetensors"
    hidden_pairs.write_shard(path, some_pairs(), "key")
    with pytest.raises(UserError, match="other pairs than its manifest"):
        hidden_pairs.read_shard(path, "another")
    tensors = load_file(path)
    save_file({**tensors, "tokens": tensors["tokens"][1:]}, path, metadata={"key": "key"})
    with pytest.raises(UserError, match="not as long as its counts say"):
        hidden_pairs.read_shard(path, "key")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="missing or broken"):
        hidden_pairs.read_shard(path, "key")


def test_states_that_fp16_does_not_hold_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="too large for fp16"):
        hidden_pairs.write_shard(tmp_path / "x", [some_pairs()[0]._replace(thoughts=torch.full((1, 4), 1e5))], "key")


def test_pairs_of_another_compressor_are_refused(toy: Path, thinker: LatentThinker, train: HiddenPairs) -> None:
    loading.check_pairs(train.manifest, toy, thinker, TOKENIZER)
    with torch.no_grad():
        thinker.compressor.weight.mul_(1.01)
    with pytest.raises(UserError, match="made with another compressor"):
        loading.check_pairs(train.manifest, toy, thinker, TOKENIZER)


# The network.


def test_the_order_of_the_prompt_matters() -> None:
    net = network()
    states, mask = torch.randn(1, 5, 8), torch.ones(1, 5, dtype=torch.bool)
    zero = torch.zeros(1, 8), torch.zeros(1, dtype=torch.long)
    thought, _ = net.step(net.context(states, mask), *zero)
    other, _ = net.step(net.context(states[:, [1, 0, 2, 3, 4]], mask), *zero)
    assert (thought - other).abs().max() > 1e-3


def test_padding_on_either_side_changes_nothing() -> None:
    net = network()
    states, zero = torch.randn(1, 4, 8), (torch.zeros(1, 8), torch.zeros(1, dtype=torch.long))
    plain, _ = net.step(net.context(states, torch.ones(1, 4, dtype=torch.bool)), *zero)
    for pad in ((0, 0, 0, 3), (0, 0, 3, 0)):
        mask = F.pad(torch.ones(1, 4, dtype=torch.bool), pad[2:])
        padded, _ = net.step(net.context(F.pad(states, pad, value=7.0), mask), *zero)
        torch.testing.assert_close(padded, plain, atol=1e-5, rtol=1e-5)


def test_rotary_angles_turn_by_the_distance() -> None:
    from wrinklefree.thinking.network import rotate

    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8)
    speeds = torch.tensor([1.0, 0.5, 0.25, 0.1]).repeat(2)
    signs = torch.tensor([-1.0, 1.0]).repeat_interleave(4)

    def product(first: int, second: int) -> Tensor:
        at = [torch.full((1, 1, 1), float(place)) * speeds for place in (first, second)]
        return (rotate(q, at[0].cos(), signs * at[0].sin()) * rotate(k, at[1].cos(), signs * at[1].sin())).sum()

    torch.testing.assert_close(product(3, 1), product(12, 10))
    assert abs(product(3, 1) - product(3, 2)) > 1e-4


def test_only_the_last_deep_recursion_has_a_gradient() -> None:
    """T = 2 has the gradient of one recursion that begins where the first has ended."""
    two, one = network(n_deep_recursions=2, n_latent_steps=2), network(n_deep_recursions=1, n_latent_steps=2)
    context = context_of(two)
    y, _ = two.recurse(context, *two.begin(context))
    y.sum().backward()
    context = context_of(one)
    with torch.no_grad():
        begun = one.recurse(context, *one.begin(context))
    expected, _ = one.recurse(context, *begun)
    expected.sum().backward()
    torch.testing.assert_close(y, expected)
    mine, other = (dict(net.named_parameters()) for net in (two, one))
    for name in ("blocks.0.qkv.weight", "blocks.1.down.weight", "embed.weight"):
        torch.testing.assert_close(mine[name].grad, other[name].grad)


def test_the_slot_alone_is_the_slot_among_all_places() -> None:
    net = network(n_deep_recursions=2)
    context = context_of(net)
    whole, z = net.recurse(context, *net.begin(context))
    alone, other = net.recurse(context, *net.begin(context), slot_only=True)
    assert alone.shape[1] == 1
    torch.testing.assert_close(alone[:, 0], whole[:, -1])
    assert torch.equal(z, other)


def test_n_latent_steps_are_taken() -> None:
    net = network(n_latent_steps=2)
    context = context_of(net)
    y, z = net.begin(context)
    first = net.f(context.x + y + z, context)
    second = net.f(context.x + y + first, context)
    torch.testing.assert_close(net.recurse(context, y, z)[0], net.f(y + second, context))


@pytest.mark.parametrize("mode", ["trajectory", "final"])
def test_each_sample_halts_by_itself(mode: str) -> None:
    """Thinking in a batch and alone gives the same thoughts, and as many."""
    torch.manual_seed(0)
    shape = {"width": 12, "d_compressed": 8, "hidden_size": 32, "num_heads": 2, "max_thoughts": 5, "mode": mode}
    model = LatentThinker(ThinkerConfig(**shape)).eval()
    with torch.no_grad():
        model.average.halt.weight.copy_(torch.randn(1, 32))
    lengths = torch.tensor([4, 2, 3, 4, 3, 2, 4, 3])
    mask = torch.arange(4) < lengths[:, None]
    states = torch.randn(8, 4, 8)
    context = model.average.context(states, mask)
    begun = [model.average.step(context, torch.zeros(8, 8), torch.zeros(8, dtype=torch.long))[1]]
    begun += [model.average.read(model.average.recurse(context, *model.average.begin(context))[0])[1]]
    with torch.no_grad():  # some halt at once, the others later or never
        model.average.halt.bias.copy_(-begun[mode == "final"].sort().values[3:5].mean())
    thoughts, soft_mask = model.think(states, mask)
    counts = soft_mask.sum(1)
    assert len(set(counts.tolist())) > 1
    for i in range(8):
        alone, mask_alone = model.think(states[i : i + 1, : lengths[i]], mask[i : i + 1, : lengths[i]])
        assert mask_alone.sum() == counts[i]
        torch.testing.assert_close(alone[0, : counts[i]], thoughts[i, : counts[i]], atol=1e-5, rtol=1e-5)


def test_the_mean_of_the_weights_is_what_thinks(thinker: LatentThinker) -> None:
    before = copy.deepcopy(thinker.average.state_dict())
    with torch.no_grad():
        for parameter in thinker.network.parameters():
            parameter.add_(torch.randn_like(parameter))
    states, mask = torch.randn(2, 4, 32), torch.ones(2, 4, dtype=torch.bool)
    unmoved = thinker.think(states, mask)[0]
    thinker.update_average(0.75)
    for name, parameter in thinker.average.named_parameters():
        expected = 0.75 * before[name] + 0.25 * thinker.network.state_dict()[name]
        torch.testing.assert_close(parameter, expected)
    assert not torch.equal(thinker.think(states, mask)[0], unmoved)
    thinker.keep_average()
    torch.testing.assert_close(thinker.network.state_dict()["head.weight"], parameter_of(thinker, before))
    assert thinker.average is None


def parameter_of(thinker: LatentThinker, before: dict[str, Tensor]) -> Tensor:
    """What `head.weight` is once the mean is kept."""
    return thinker.network.head.weight.detach().clone()


# Training the network.


def test_teacher_forcing_is_one_step_at_a_time(
    toy: Path, thinker: LatentThinker, speaker: Speaker, train: HiddenPairs
) -> None:
    """All thoughts at once have the loss of each by itself, after the true one before it."""
    objective = Recursion(thinker, speaker.decoder, NetworkConfig(noise=0.0, mse_weight=1.0, halt_weight=0.0))
    batch = train.batch(range(5))
    loss, metrics = next(objective(batch))
    targets, net = thinker.whiten(batch["thoughts"]), thinker.network
    errors, kls = [], []
    for i, n in enumerate(batch["num_thoughts"].tolist()):
        states, mask = prompt_of(thinker, {name: t[i : i + 1] for name, t in batch.items()})
        context = net.context(states, mask)
        before = torch.zeros(1, 32)
        for j in range(n):
            thought, _ = net.step(context, before, torch.tensor([j]))
            before = targets[i, j : j + 1]
            errors.append((thought - before).square().mean())
            said, meant = (read(speaker.decoder, thinker, x).log_softmax(-1) for x in (thought, before))
            kls.append((meant.exp() * (meant - said)).sum())
    torch.testing.assert_close(metrics["mse"], torch.stack(errors).mean(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(metrics["kl"], torch.stack(kls).mean(), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(loss, metrics["kl"] + metrics["mse"], atol=1e-4, rtol=1e-4)


def test_sampled_thoughts_are_those_of_thinking_freely(
    thinker: LatentThinker, speaker: Speaker, train: HiddenPairs
) -> None:
    objective = Recursion(thinker, speaker.decoder, NetworkConfig(sampled_from=0.5))
    objective.on_step(4, 10)
    assert not objective.sampling
    objective.on_step(5, 10)
    assert objective.sampling
    thinker.keep_average()  # one network for both
    thinker.config.max_thoughts = 6
    batch = train.batch(range(4))
    with torch.no_grad():
        thinker.network.halt.bias.fill_(-9.0)
        free, _ = thinker.think(*prompt_of(thinker, batch))
    own = objective._own(batch, batch["thoughts"].shape[1])
    torch.testing.assert_close(own, free[:, : own.shape[1]], atol=1e-5, rtol=1e-5)


def test_deep_supervision_is_a_step_a_round(speaker: Speaker, train: HiddenPairs, toy: Path) -> None:
    """Mode final yields a loss for every round, each from where the last one ended, without a gradient into it."""
    torch.manual_seed(0)
    shape = {"width": 64, "d_compressed": 32, "hidden_size": 32, "num_heads": 2, "mode": "final", "max_thoughts": 3}
    model = LatentThinker(ThinkerConfig(**shape))
    objective = Recursion(model, speaker.decoder, NetworkConfig(mode="final", max_thoughts=3))
    values = []
    for loss, _ in objective(train.batch(range(4))):
        loss.backward()  # would fail where it reached into the round before
        values.append(loss.item())
    assert len(values) == 3
    assert len(set(values)) == 3


def test_read_out_of_true_thoughts_is_the_model_itself(
    thinker: LatentThinker, speaker: Speaker, train: HiddenPairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thinker that thinks what the model thought has no error, halts right, and its mean does not."""
    batches = iter(list(train.batches(8, 16)))

    def perfect(states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        batch = next(batches)
        return thinker.whiten(batch["thoughts"]), torch.arange(batch["thoughts"].shape[1]) < batch["num_thoughts"][
            :, None
        ]

    monkeypatch.setattr(thinker, "think", perfect)
    figures = read_out(thinker, speaker.decoder, train, 16, batch_size=8)
    assert (figures.halted, round(figures.cosine, 5), round(figures.r2, 5)) == (1.0, 1.0, 1.0)
    assert figures.kl < 1e-6
    assert figures.mean_cosine < 0.999


# Speech.


def test_a_written_thought_as_embeddings_is_the_written_thought(speaker: Speaker, train: HiddenPairs) -> None:
    """The answer after a prefix, its cache and embedded words is that of generating from the text."""
    prompts = [pair.prompt_ids.tolist() for pair in train.pairs[:5]]
    thoughts = [speaker.embed(pair.thought_ids.long()) for pair in train.pairs[:5]]
    masks = [torch.ones(len(thought), dtype=torch.bool) for thought in thoughts]
    soft_tokens, soft_mask = (torch.nn.utils.rnn.pad_sequence(part, batch_first=True) for part in (thoughts, masks))
    said = speaker.answer(speaker.prefill(prompts), soft_tokens, soft_mask, 6)
    for pair, answer in zip(train.pairs[:5], said, strict=True):
        ids = torch.cat([pair.prompt_ids, pair.thought_ids, torch.tensor([speaker.tags.close])]).long()[None]
        out = speaker.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6, pad_token_id=0
        )
        assert answer == out[0, ids.shape[1] :].tolist()


def test_thinking_in_words_is_generation(speaker: Speaker, train: HiddenPairs) -> None:
    prompts = [pair.prompt_ids.tolist() for pair in train.pairs[:4]]
    prefix = speaker.prefill(prompts)
    said = speaker.answer(prefix, prefix.states[:, :0], prefix.mask[:, :0], 12, closed=False)
    for prompt, answer in zip(prompts, said, strict=True):
        ids = torch.tensor([prompt])
        out = speaker.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, pad_token_id=0
        )
        assert answer == out[0, ids.shape[1] :].tolist()


def test_a_prefix_serves_again_and_many_times(speaker: Speaker, train: HiddenPairs) -> None:
    prefix = speaker.prefill([pair.prompt_ids.tolist() for pair in train.pairs[:3]])
    empty = prefix.states[:, :0], prefix.mask[:, :0]
    once = speaker.answer(prefix, *empty, 5)
    copies = speaker.answer(prefix, *empty, 5, copies=3)
    assert copies == [answer for answer in once for _ in range(3)]
    torch.manual_seed(0)
    hot = speaker.answer(prefix, *empty, 5, copies=50, temperature=3.0)
    assert len({tuple(answer) for answer in hot[:50]}) > 5


def test_forced_states_are_those_of_a_plain_pass(speaker: Speaker, train: HiddenPairs) -> None:
    some = train.pairs[:4]
    prompts, answers = ([getattr(pair, name).long() for pair in some] for name in ("prompt_ids", "answer_ids"))
    thoughts = [speaker.embed(pair.thought_ids.long()) for pair in some]
    states = speaker.states(prompts, thoughts, answers)
    expected = []
    for pair in some:
        ids = torch.cat([pair.prompt_ids, pair.thought_ids, torch.tensor([speaker.tags.close]), pair.answer_ids]).long()
        hidden = speaker.decoder.states({"input_ids": ids[None]})[0]
        expected.append(hidden[-len(pair.answer_ids) - 1 : -1])
    torch.testing.assert_close(states, torch.cat(expected), atol=1e-5, rtol=1e-5)


def test_the_adapter_begins_at_the_embeddings_of_what_states_predict(
    thinker: LatentThinker, speaker: Speaker, train: HiddenPairs
) -> None:
    """The ridge regression to them, and nearer to them than any map is to the same embeddings in another order.

    Some 420 thoughts: the 33 dimensions of the states explain a tenth of an order that has nothing to do with them.
    """
    fit_adapter(thinker, speaker, train, len(train))
    batch = train.batch(range(len(train)))
    there = batch["tokens"] >= 0
    whitened = thinker.whiten(batch["thoughts"])
    spoken, wanted = thinker.speak(whitened)[there], speaker.embed(batch["tokens"][there])
    states = F.pad(thinker.states(whitened)[there].double(), (0, 1), value=1.0)
    ridge = RIDGE * states.square().sum(0).mean()

    def nearest(targets: Tensor, ridge: Tensor) -> Tensor:
        rows = torch.cat([states, ridge.sqrt() * torch.eye(states.shape[1])])
        sides = F.pad(targets.double(), (0, 0, 0, states.shape[1]))
        return states @ torch.linalg.lstsq(rows, sides, driver="gelsd").solution

    torch.testing.assert_close(spoken.double(), nearest(wanted, ridge), atol=1e-5, rtol=0)
    shuffled = wanted[torch.randperm(len(wanted), generator=torch.Generator().manual_seed(0))]
    errors = [(x - y).square().sum() for x, y in ((spoken, wanted), (nearest(shuffled, 0 * ridge), shuffled))]
    assert errors[0] < 0.75 * errors[1]


# Reinforcement.


class Bandit:
    """A language model of one-token answers: its logits are the soft token itself."""

    def __init__(self, width: int) -> None:
        self.width = width


def test_the_estimate_is_the_exact_gradient() -> None:
    """One-token answers: the gradient of the mean reward is known; the loss has it on average, scaled as documented."""
    torch.manual_seed(0)
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    exact = torch.autograd.grad((logits.softmax(-1) * rewards).sum(), logits)[0]
    groups, size = 20_000, 8
    config = GRPOConfig(advantage="dr_grpo", max_answer_tokens=1, kl_weight=0.0)
    chosen = torch.multinomial(logits.detach().softmax(-1).expand(groups, -1), size, replacement=True)
    advantages, _ = group_advantages(rewards[chosen], "dr_grpo")
    new = logits.log_softmax(-1)[chosen].flatten()
    loss, _ = policy_loss(new, new.detach(), new.detach(), torch.arange(new.numel()), advantages.flatten(), config)
    estimate = torch.autograd.grad(-loss, logits)[0] * size / (size - 1)  # the baseline contains the sample itself
    assert (estimate - exact).norm() < 0.05 * exact.norm()


def test_clipping_stops_at_the_edge_and_only_where_it_would_go_on() -> None:
    config = GRPOConfig(clip=(0.2, 0.28))
    old = torch.zeros(4)
    new = torch.tensor([math.log(1.5), math.log(1.5), math.log(0.5), math.log(0.5)], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss, _ = policy_loss(new, old, new.detach(), torch.arange(4), advantages, config)
    loss.backward()
    assert new.grad is not None
    torch.testing.assert_close(new.grad, torch.tensor([0.0, 1.5, -0.5, 0.0]) / 4)
    assert loss.item() == pytest.approx(-(1.28 - 1.5 + 0.5 - 0.8) / 4)


def test_k3_is_an_unbiased_divergence() -> None:
    torch.manual_seed(0)
    p, q = torch.randn(2, 6).log_softmax(-1)
    config = GRPOConfig()
    chosen = torch.multinomial(p.exp(), 200_000, replacement=True)
    _, k3 = policy_loss(p[chosen], p[chosen], q[chosen], torch.arange(len(chosen)), torch.zeros(len(chosen)), config)
    assert k3.item() == pytest.approx(((p - q) * p.exp()).sum().item(), rel=0.03)


def test_a_group_is_judged_against_itself() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0]])
    advantages, kept = group_advantages(rewards, "grpo")
    assert kept.tolist() == [True, False, True]
    torch.testing.assert_close(advantages[0], torch.tensor([1.0, -1.0, -1.0, 1.0]), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(advantages.mean(1), torch.zeros(3), atol=1e-6, rtol=0)
    plain, _ = group_advantages(rewards, "dr_grpo")
    assert plain[2].tolist() == [-0.25, -0.25, -0.25, 0.75]


def test_long_answers_count_as_one_answer_or_by_their_length() -> None:
    new, answer_of = torch.zeros(5), torch.tensor([0, 1, 1, 1, 1])
    advantages = torch.tensor([1.0, -1.0])
    grpo, _ = policy_loss(new, new, new, answer_of, advantages, GRPOConfig())
    assert grpo.item() == 0  # one mean each
    plain, _ = policy_loss(new, new, new, answer_of, advantages, GRPOConfig(advantage="dr_grpo", max_answer_tokens=10))
    assert plain.item() == pytest.approx(3 / 20)


def test_a_rollout_is_what_the_policy_says(thinker: LatentThinker, speaker: Speaker, train: HiddenPairs) -> None:
    """Log-probabilities of sampled answers sum to frequencies: the most sampled one is the likeliest, and so on."""
    config = GRPOConfig(group_size=200, max_answer_tokens=1, temperature=1.3)
    objective = GRPO(thinker, speaker, config)
    batch = train.batch([0])
    torch.manual_seed(0)
    rollout = objective.roll_out(batch)
    if not rollout.answers:
        pytest.skip("all of one reward")
    log_probs, answer_of = objective.log_probs(thinker, batch, rollout)
    assert answer_of.tolist() == list(range(200))
    said = torch.cat(rollout.answers)
    for token in said.unique():
        probability = log_probs[said == token][0].exp().item()
        share = (said == token).float().mean().item()
        assert abs(share - probability) < 5 * math.sqrt(probability / 200) + 0.01


def test_groups_without_spread_are_dropped(
    thinker: LatentThinker, speaker: Speaker, train: HiddenPairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = GRPO(thinker, speaker, GRPOConfig(group_size=4, max_answer_tokens=2, anchor_weight=0.5))
    judged = itertools.cycle([1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    monkeypatch.setattr(objective, "_reward", lambda said, right: next(judged))
    rollout = objective.roll_out(train.batch([0, 1]))
    assert set(rollout.samples) == {1}
    assert (rollout.reward.item(), rollout.kept.item()) == (5 / 8, 0.5)
    monkeypatch.setattr(objective, "_reward", lambda said, right: 1.0)
    loss, metrics = next(objective(train.batch([0, 1])))
    assert loss.item() == pytest.approx(0.5 * metrics["anchor"].item())


def test_the_format_counts_where_it_is_asked_for(thinker: LatentThinker, speaker: Speaker) -> None:
    objective = GRPO(thinker, speaker, GRPOConfig(format_reward=0.25))
    five, end = TOKENIZER.convert_tokens_to_ids(["5", "<eos>"])
    assert [objective._reward(said, [five, end]) for said in ([five, end], [five], [end])] == [1.0, 0.75, 0.25]


# Whole stages.


@pytest.fixture(scope="module")
def trained(toy: Path) -> Path:
    """The toy after recursion, injection and grpo, a few steps each."""
    stages.train_network(resolved(toy, "trm_recursion"), force=False)
    stages.train_adapter(resolved(toy, "trm_injection"), force=False)
    stages.reinforce(
        resolved(toy, "trm_grpo", "thinking.grpo.group_size=4", "thinking.grpo.max_answer_tokens=3"), force=False
    )
    return toy


def test_each_stage_trains_its_own_part(trained: Path) -> None:
    names = ("toy_trm_compressor", "toy_trm_recursion", "toy_trm_injection", "toy_trm_grpo")
    kept = [load_file(trained / name / "final" / "model.safetensors") for name in names]
    parts = ("compressor", "network", "adapter", "pause")
    changed = [
        {part for part in parts for key in a if key.startswith(part) and not torch.equal(a[key], b[key])}
        for a, b in itertools.pairwise(kept)
    ]
    assert changed[0] >= {"network"}
    assert "compressor" not in changed[0]
    assert changed[1:] == [{"adapter", "pause"}, {"adapter"}] or changed[2] == set()  # the start may have been the best


def test_a_stage_leaves_a_log_a_plot_and_figures(trained: Path) -> None:
    for name in ("toy_trm_recursion", "toy_trm_injection", "toy_trm_grpo"):
        assert (trained / name / "plots" / "loss.png").stat().st_size > 1000
        assert json.loads((trained / name / "results.json").read_text())
        header = (trained / name / "training_log.csv").read_text().splitlines()[0]
        assert "eval_accuracy" in header


def test_grpo_never_ends_below_its_start(trained: Path) -> None:
    """The start is measured and kept."""
    rows = (trained / "toy_trm_grpo" / "training_log.csv").read_text().splitlines()
    columns = rows[0].split(",")
    losses = [dict(zip(columns, row.split(","), strict=True)) for row in rows[1:]]
    measured = [float(row["eval_loss"]) for row in losses if row["eval_loss"]]
    assert losses[0]["step"] == "0"
    final = json.loads((trained / "toy_trm_grpo" / "results.json").read_text())
    assert final["eval_loss"] == min(measured) <= measured[0]


@pytest.mark.parametrize("stage", ["recursion", "injection", "grpo"])
def test_an_interrupted_stage_resumes_to_the_same_bits(trained: Path, tmp_path: Path, stage: str) -> None:
    more = ["training.save_interval=2", "thinking.grpo.group_size=4", "thinking.grpo.max_answer_tokens=3"]
    more += ["training.keep_best=false", "training.patience=0"]
    run = {"recursion": stages.train_network, "injection": stages.train_adapter, "grpo": stages.reinforce}[stage]
    whole, again = tmp_path / "whole", tmp_path / "again"
    run(resolved(trained, f"trm_{stage}", *more, f"output_dir={whole}"), False)
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "step_4")
    shutil.rmtree(again / "final")
    run(resolved(trained, f"trm_{stage}", *more, f"output_dir={again}", "training.resume_from=latest"), False)
    weights = [load_file(folder / "final" / "model.safetensors") for folder in (whole, again)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


BOTH = """
import json, os, sys
import torch.distributed as dist
from wrinklefree.cli import app
end, dist.destroy_process_group = dist.destroy_process_group, lambda: None
for words in json.loads(sys.argv[1]):
    code = app(words, prog_name="wf", standalone_mode=False)
    assert not code, code
end()
sys.stderr.flush()
os._exit(0)  # as `wf` does it, and why
"""  # two commands in one group of processes, for to start them takes longer than what they do


def test_two_processes_make_the_pairs_of_one_and_train_alike(toy: Path, tmp_path: Path) -> None:
    """Each of two processes writes half of the thoughts, and sees half of every batch."""
    for name in ("lm", "toy_trm_compressor"):
        shutil.copytree(toy / name, tmp_path / name)
    program, lines = tmp_path / "both.py", []
    program.write_text(BOTH)
    for training, more in (("trm_pairs", ()), ("trm_recursion", ("training.batch_size=2",))):
        words = [*prerequisites.VERBS[training].split(), *overrides(tmp_path, training, *more)]
        words.remove(f"training={training}")
        lines.append(words)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*command, program, json.dumps(lines)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made, expected = tmp_path / "toy_trm_pairs", toy / "toy_trm_pairs"
    assert len(list(made.glob("thoughts-*.jsonl"))) == 2
    for shard in sorted(expected.glob("*.safetensors")):
        one, two = load_file(shard), load_file(made / shard.name)
        for name, tensor in one.items():  # states in batches of other sizes, which may round otherwise
            close = {"atol": 1e-2, "rtol": 1e-2} if tensor.is_floating_point() else {"atol": 0, "rtol": 0}
            torch.testing.assert_close(two[name], tensor, **close)
    stages.train_network(resolved(tmp_path, "trm_recursion", f"output_dir={tmp_path / 'one'}"), False)
    for mine, one in zip(rows(tmp_path / "toy_trm_recursion"), rows(tmp_path / "one"), strict=True):
        assert float(mine["train_loss"]) == pytest.approx(float(one["train_loss"]), rel=0.02)  # noise is each one's own


def test_every_way_to_think_is_measured(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = compare.compare_ways(resolved(trained, "trm_eval", "training.eval_examples=12"), force=False)
    values = json.loads((out / "results.json").read_text())
    assert list(values["ways"]) == ["words", "nothing", "pause", "shuffled", "latent", "grpo", "oracle"]
    assert all(len(way["right"]) == values["problems"] for way in values["ways"].values())
    assert all(way["p50"] <= way["p95"] for name, way in values["ways"].items() if name != "oracle")
    assert (out / "plots" / "thinking.png").stat().st_size > 1000
    assert max(map(len, capsys.readouterr().out.splitlines()[:9])) <= 80


def test_a_thinker_answers_a_question(trained: Path) -> None:
    for folder in ("toy_trm_injection", "toy_trm_grpo"):
        assert isinstance(reply(str(trained / folder), "3 +2 ?", "latent", 4, 0.0, 0), str)
    words = reply(str(trained / "toy_trm_injection"), "3 +2 ?", "words", 12, 0.0, 0)
    assert words == reply(str(trained / "lm"), "3 +2 ?", "words", 12, 0.0, 0)
    with pytest.raises(UserError, match="cannot speak yet"):
        reply(str(trained / "toy_trm_recursion"), "3 +2 ?", "latent", 4, 0.0, 0)
    with pytest.raises(UserError, match="no thinker here"):
        reply(str(trained / "lm"), "3 +2 ?", "latent", 4, 0.0, 0)


def test_settings_that_an_earlier_stage_fixed_are_taken_over_or_refused(trained: Path) -> None:
    config = resolved(trained, "trm_injection", "thinking.d_compressed=256")
    loading.inherit(config, trained / "toy_trm_recursion")
    assert loading.settings_of(config).d_compressed == 32
    with pytest.raises(UserError, match=r"thinking.d_compressed: .* was made with 32"):
        loading.inherit(resolved(trained, "trm_injection", "thinking.d_compressed=16"), trained / "toy_trm_recursion")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "method.pairs.shard_size=1",
            "method.pairs.shard_size: unknown key (did you mean 'thinking.pairs.shard_size'?)",
        ),
        ("method.d_compressed=64", "method.d_compressed: unknown key (did you mean 'thinking.d_compressed'?)"),
        ("method.init=pca", "method.init: unknown key (did you mean 'thinking.init'?)"),
        ("method.grpo.updatez=4", "method.grpo.updatez: unknown key (did you mean 'thinking.grpo.updates'?)"),
        ("method=fairy2", "method=fairy2: a thinker has no method; name a quantized model by model=FOLDER"),
        (
            "thinking=x",
            "thinking=x: a training chooses this section; give its settings, as in thinking.d_compressed=64",
        ),
    ],
)
def test_settings_in_the_section_of_methods_are_one_line(override: str, message: str) -> None:
    result = CliRunner().invoke(app, ["trm", "pairs", "model=chains", override])
    assert (result.exit_code, result.stderr) == (2, f"error: {message}\n")


@pytest.mark.parametrize("training", ["fairy2_w2", "full_precision"])
def test_settings_of_a_thinker_are_refused_by_other_trainings(training: str) -> None:
    with pytest.raises(UserError, match=r"^thinking\.d_compressed: has no effect, .* no section 'thinking'$"):
        load_config([f"training={training}", "thinking.d_compressed=64"])
    with pytest.raises(UserError, match="a stage of LLM-TRM, which `wf trm` runs"):
        launch.run_stage(["model=chains", "training=trm_recursion"])


def test_a_thinker_of_version_0_1_is_read(toy: Path, tmp_path: Path) -> None:
    """Its settings were the method's, and there was no other section for them."""
    shutil.copytree(toy / "toy_trm_compressor" / "final", tmp_path / "old")
    file = tmp_path / "old" / checkpoint.CONFIG
    lines = [line for line in file.read_text().splitlines() if line != "method: null"]
    file.write_text("\n".join("method:" if line == "thinking:" else line for line in lines))
    assert "\nthinking:" not in file.read_text()
    (thinker, config), (_, today) = map(loading.load_thinker, (tmp_path / "old", toy / "toy_trm_compressor"))
    assert config == today
    assert loading.settings_of(config).d_compressed == len(thinker.compressor.weight) == 32


def test_a_broken_thinker_is_one_line(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "toy_trm_injection" / "final", tmp_path / "broken")
    file = tmp_path / "broken" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated"):
        loading.load_thinker(tmp_path / "broken")


def test_stages_name_what_has_to_come_first(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="trm_pairs needs trm_compressor"):
        pairs_stage.make_pairs(resolved(toy, "trm_pairs", f"output_root={tmp_path}"), force=False)
    with pytest.raises(UserError, match=r"trm_grpo needs trm_injection, and .* run `wf trm inject model=[^`]*`$"):
        stages.reinforce(resolved(toy, "trm_grpo", f"output_root={tmp_path}"), force=False)


@pytest.mark.slow
def test_the_whole_chain_thinks_in_latents_what_it_thought_in_words(tmp_path: Path) -> None:
    """From nothing, with the settings as they are shipped: `runs/trm_cpu.sh` without GRPO."""
    from wrinklefree.commands import pretrain
    from wrinklefree.thinking import compressor as phase1

    given = ["model=chains", f"output_root={tmp_path}"]
    pretrain.run(given)
    phase1.make_compressor(load_config([*given, "training=trm_compressor"]), False)
    chain = {"pairs": pairs_stage.make_pairs, "recursion": stages.train_network, "injection": stages.train_adapter}
    for name, stage in {**chain, "eval": compare.compare_ways}.items():
        stage(load_config([*given, f"training=trm_{name}"]), False)
    values = json.loads((tmp_path / "chains_trm_eval" / "results.json").read_text())
    right = {name: way["accuracy"] for name, way in values["ways"].items()}
    assert right["words"] > 0.95
    assert max(right[name] for name in ("nothing", "pause", "shuffled")) < 0.4
    assert values["readout"] > 0.9
    assert right["latent"] > 0.8


# Statistics.


def test_mcnemar_is_the_binomial_test_of_the_differences() -> None:
    assert mcnemar([True] * 10, [True] * 10) == 1
    assert mcnemar([True] * 6 + [False] * 4, [False] * 6 + [False] * 4) == pytest.approx(2 / 64)
    assert mcnemar([True] * 5 + [False] * 5, [False] * 5 + [True] * 5) == 1
    generator = random.Random(0)
    first, second = ([generator.random() < p for _ in range(200)] for p in (0.5, 0.6))
    assert mcnemar(first, second) == mcnemar(second, first)


def test_quantiles_lie_in_between() -> None:
    assert [quantile([3.0, 1.0, 2.0], share) for share in (0, 0.5, 0.75, 1)] == [1.0, 2.0, 2.5, 3.0]
    assert quantile([4.0], 0.95) == 4.0
