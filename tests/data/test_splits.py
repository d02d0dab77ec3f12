"""A split of a dataset may be a part of one, with exact positions, or it is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from wrinklefree.config.schema import DataConfig
from wrinklefree.core.errors import UserError
from wrinklefree.data.hub import load_hub
from wrinklefree.data.open import training_stream
from wrinklefree.data.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer([f"row {i}" for i in range(300)], 300)


@pytest.fixture(params=[True, False])
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """300 rows in three files, with a card that counts them or without."""
    for shard in range(3):
        rows = (json.dumps({"text": f"row {100 * shard + i}"}) for i in range(100))
        (tmp_path / f"train-{shard}.jsonl").write_text("\n".join(rows))
    if request.param:
        info = "dataset_info:\n  features:\n  - name: text\n    dtype: string\n  splits:\n  - name: train\n"
        card = f"---\n{info}    num_examples: 300\n    num_bytes: 3000\n---\n"
        (tmp_path / "README.md").write_text(card)
    return tmp_path


def shown(dataset: Path, split: str) -> list[int]:
    rows = load_hub("data.path=x", str(dataset), None, split, "")
    return [int(row["text"].removeprefix("row ")) for row in rows]


@pytest.mark.parametrize(
    ("split", "first", "last"),
    [("train", 0, 300), ("train[:10]", 0, 10), ("train[290:]", 290, 300), ("train[95:205]", 95, 205)],
)
def test_rows_by_number(split: str, first: int, last: int, dataset: Path) -> None:
    assert shown(dataset, split) == list(range(first, last))


@pytest.mark.parametrize(
    ("split", "first", "last"), [("train[:10%]", 0, 30), ("train[50%:]", 150, 300), ("train[10%:20%]", 30, 60)]
)
def test_a_share_of_the_rows(split: str, first: int, last: int, dataset: Path) -> None:
    if (dataset / "README.md").exists():
        assert shown(dataset, split) == list(range(first, last))
        return
    with pytest.raises(UserError, match=r"data\.split=train\[.*the dataset does not say how many rows it has"):
        shown(dataset, split)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("nope", "data.split=nope"),
        ("nope[:10]", r"data\.split=nope\[:10\]"),
        ("train+test", r"data\.split=train\+test: no split, and no part of one such as train\[:1000\]"),
        ("train[-10:]", "no split, and no part of one"),
        ("train[10:5]", "no row in this part"),
        ("train[", "no split, and no part of one"),
    ],
)
def test_other_splits_are_refused_by_name(split: str, message: str, dataset: Path) -> None:
    with pytest.raises(UserError, match=message):
        shown(dataset, split)


@pytest.mark.parametrize("before", [0, 7, 60])
def test_a_position_in_a_part_is_exact(before: int, dataset: Path) -> None:
    values: dict[str, Any] = {"split": "train[90:]", "heldout_split": "train[:90]", "shuffle_buffer": 16}
    config = DataConfig(source="hub", path=str(dataset), **values)
    whole, resumed = (training_stream(config, TOKENIZER, batch_size=1, length=32, seed=0) for _ in range(2))
    for _ in range(before):
        next(whole)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for _ in range(40):
        assert torch.equal(next(resumed)["input_ids"], next(whole)["input_ids"])
