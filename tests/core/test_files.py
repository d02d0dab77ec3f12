"""A folder that is written aside appears whole or not at all."""

from pathlib import Path

import pytest

from wrinklefree.core.files import written_aside


def test_a_checkpoint_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "best"
    for text in ("old", "new"):
        with written_aside(path) as aside:
            (aside / "file").write_text(text)
    with pytest.raises(IsADirectoryError), written_aside(path) as aside:
        aside.write_text("half")
    assert (path / "file").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["best"]
