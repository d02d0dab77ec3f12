"""The task of chains: worked out from left to right, never the same question on both sides, text and tokens alike."""

from wrinklefree.data import chains

TOKENIZER = chains.tokenizer()


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
