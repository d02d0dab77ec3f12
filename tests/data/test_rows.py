"""Every kind of file is read right or refused by name, in bounded memory, and never read as text if it is none."""

import csv
import gzip
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from wrinklefree.core.errors import UserError
from wrinklefree.data import rows
from wrinklefree.data.local_files import find_files
from wrinklefree.data.rows import BadRowError, read_rows

ROWS = [{"text": f'Zeile {i} für 🙂, "quoted"\nand more', "n": str(i)} for i in range(150)]


def lines() -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def as_csv(delimiter: str) -> str:
    from io import StringIO

    text = StringIO()
    writer = csv.DictWriter(text, ["text", "n"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue()


def arrow_stream(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=40)


def arrow_file(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=40)


def written(text: Callable[[], str], encoding: str = "utf-8") -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(text().encode(encoding))


def zipped(text: Callable[[], str]) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(gzip.compress(text().encode()))


KINDS: dict[str, Callable[[Path], Any]] = {
    "a.jsonl": written(lines),
    "a.ndjson": written(lines),
    "A.JSONL": written(lines),
    "a.json": written(lines),
    "array.json": written(lambda: json.dumps(ROWS)),
    "newline.json": written(lambda: "\n\n " + json.dumps(ROWS, indent=2)),
    "mark.json": written(lambda: "\n" + json.dumps(ROWS), "utf-8-sig"),
    "spaces.json": written(lambda: " " * (rows.HEAD + 10) + json.dumps(ROWS) + "\n \n"),
    "a.jsonl.gz": zipped(lines),
    "A.Json.GZ": zipped(lambda: json.dumps(ROWS)),
    "a.csv.gz": zipped(lambda: as_csv(",")),
    "utf16.jsonl": written(lines, "utf-16"),
    "utf16.json": written(lambda: json.dumps(ROWS, ensure_ascii=False), "utf-16"),
    "utf16.csv": written(lambda: as_csv(","), "utf-16"),
    "utf32.jsonl": written(lines, "utf-32"),
    "a.csv": written(lambda: as_csv(",")),
    "A.CSV": written(lambda: as_csv(","), "utf-8-sig"),
    "a.tsv": written(lambda: as_csv("\t")),
    "a.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
    "a.arrow": arrow_stream,
    "feather.arrow": arrow_file,
}


@pytest.mark.parametrize("name", KINDS)
def test_rows_come_out_as_they_went_in(name: str, tmp_path: Path) -> None:
    KINDS[name](tmp_path / name)
    assert find_files("data.path", str(tmp_path)) == [tmp_path / name]
    assert list(read_rows(tmp_path / name)) == ROWS


@pytest.mark.parametrize(("name", "encoding"), [("a.txt", "utf-8"), ("A.TXT", "utf-16"), ("a.md", "utf-32")])
def test_text_comes_out_as_it_went_in(name: str, encoding: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(lines().encode(encoding))
    assert "".join(map(str, read_rows(tmp_path / name, piece=100))) == lines()


def test_a_saved_dataset_gives_its_rows(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    whole = Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "one", num_shards=3)
    files = find_files("data.path", str(tmp_path / "one"))
    assert [row for file in files for row in read_rows(file)] == ROWS
    DatasetDict(train=whole, test=whole).save_to_disk(tmp_path / "two")
    with pytest.raises(UserError, match=r"data\.path=.*two: a dataset with the splits test, train: name one"):
        find_files("data.path", str(tmp_path / "two"))
    with pytest.raises(UserError, match="is a folder of save_to_disk: name it alone"):
        find_files("data.path", str(tmp_path))
    whole.shuffle(seed=1).save_to_disk(tmp_path / "shuffled")
    again = [row for file in find_files("data.path", str(tmp_path / "shuffled")) for row in read_rows(file)]
    assert again == whole.shuffle(seed=1).to_list()


REFUSED = {
    "zipped.jsonl": (gzip.compress(lines().encode()), "compressed by gzip: end its name in .gz"),
    "a.jsonl.zst": (b"\x28\xb5\x2f\xfd" + bytes(range(256)), r"\.zst is not read: unpack or convert it"),
    "zst.jsonl": (b"\x28\xb5\x2f\xfd" + bytes(range(256)), "compressed by zstd: decompress it"),
    "a.xlsx": (b"PK\x03\x04 and more", r"\.xlsx is not read"),
    "book.docx": (b"PK\x03\x04 and more", "a zip archive"),
    "book.pdf": (b"%PDF-1.7\n%", "a PDF: take its text out"),
    "table.csv": (b"PAR1" + bytes(40), "a Parquet file: end its name in .parquet"),
    "unmarked.txt": ("some text".encode("utf-16-le"), "not text, since it has zero bytes; if it is UTF-16"),
    "picture.txt": (b"\x89PNG\r\n\x1a\n" + bytes(100), "not text, since it has zero bytes"),
    "noise.txt": (bytes(range(1, 256)) * 10, "not text but bytes of another kind"),
    "half.jsonl.gz": (gzip.compress(lines().encode())[:300], "not a whole gzip file"),
    "other.jsonl.gz": (lines().encode(), "not a whole gzip file"),
    "half.txt": ("some text".encode("utf-16")[:-1], "not whole UTF-16"),
    "two.csv": (b"a,a\n1,2\n", "two columns of one name in the first line: a, a"),
    "open.csv": (b'text,n\n"never closed,1\n2,3\n', "not CSV: unexpected end of data"),
    "open.json": (b'[{"text": "a"},\n', "not JSON: Expecting value in row 2"),
    "end.json": (b'[{"text": "a"}', "not JSON: the array has no end"),
    "more.json": (b'[{"text": "a"}] {"text": "b"}', "not JSON: more text after the array"),
    "comma.json": (b'[{"text": "a"} {"text": "b"}]', "not JSON: no comma before row 2"),
    "cut.arrow": (b"ARROW1 and no more", "not a whole Arrow file"),
    "latin.json": ('[{"text": "café"}]'.encode("latin1"), "not UTF-8: convert the file, for example: iconv"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_named_with_what_to_do(name: str, tmp_path: Path) -> None:
    content, message = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        list(read_rows(tmp_path / name))
    told = str(caught.value)
    assert "\n" not in told
    assert told.startswith(str(tmp_path / name))
    assert ("iconv" in told) == (name == "latin.json")


def test_a_folder_does_not_leave_out_data_in_silence(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines())
    (tmp_path / "b.jsonl.zst").write_bytes(b"x")
    with pytest.raises(UserError, match=r"data\.path=.*b\.jsonl\.zst: \.zst is not read"):
        find_files("data.path", str(tmp_path))


BAD_ROWS = {
    "a.jsonl": (b'{"text": "good"}\n\n{"text": \n{"text": "good"}\n', "line 3: not JSON: Expecting value"),
    "b.jsonl": (b'{"text": "good"}\n["text"]\n{"text": "good"}', "line 2: not an object with named columns but list"),
    "c.jsonl": (b'{"text": "good"}\n{"text": "caf\xe9"}\n{"text": "good"}\n', "line 2: not UTF-8.*iconv"),
    "d.jsonl": (b'{"text": "good"}\n' + b"[" * 100_000 + b'\n{"text": "good"}\n', "line 2: not JSON"),
    "e.json": (b'[{"text": "good"}, 3, {"text": "good"}]', "row 2: not an object with named columns but int"),
    "f.csv": (b"text\ngood\n1,2\ngood\n", "row 2: 2 fields, and the first line names 1 columns"),
    "g.csv": (b"text\ngood\ncaf\xe9\ngood\n", "row 2: not UTF-8"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_one_row(name: str, tmp_path: Path) -> None:
    content, message = BAD_ROWS[name]
    (tmp_path / name).write_bytes(content)
    first, bad, last = read_rows(tmp_path / name)
    assert first == last == {"text": "good"}
    assert isinstance(bad, BadRowError)
    with pytest.raises(BadRowError, match=f"{name}, {message}"):
        raise bad


def test_an_object_over_several_lines_is_said_to_be_no_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"text": "a"}, indent=2))
    first = next(read_rows(tmp_path / "a.json"))
    with pytest.raises(BadRowError, match="one object per line, or is one array of objects"):
        raise first  # type: ignore[misc]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.arrow"])
def test_a_row_that_is_too_long_is_left_out_unread(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_ROW", 1 << 20)
    texts = [{"text": "good"}, {"text": "x" * (3 << 20)}, {"text": "good"}]
    if name == "a.jsonl":
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in texts))
    elif name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(texts), tmp_path / name)
    else:
        table = pa.Table.from_pylist(texts)
        with pa.ipc.new_stream(tmp_path / name, table.schema) as writer:
            writer.write_table(table)
    first, bad, last = read_rows(tmp_path / name)
    assert first == last == {"text": "good"}
    with pytest.raises(BadRowError, match=r"(line|row) 2: longer than 1 MB"):
        raise bad  # type: ignore[misc]


@pytest.mark.parametrize("name", ["a.json", "a.csv"])
def test_a_row_without_end_is_not_read_to_the_end(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_ROW", 1 << 20)
    start = '[{"text": "' if name == "a.json" else 'text\n"'
    line = "x" * 1024 + "\n" * (name == "a.csv")
    (tmp_path / name).write_text(start + line * 8192)
    with pytest.raises(UserError, match="longer than 1 MB"):
        list(read_rows(tmp_path / name))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.jsonl.gz"])
def test_a_huge_row_takes_bounded_memory(name: str, tmp_path: Path) -> None:
    """200 MB in one row, read in a process of its own that may take 150 MB more than it has."""
    start = {"a.json": b'[{"text": "', "a.csv": b'text\n"', "a.txt": b""}.get(name, b'{"text": "')
    parts = [start, *[b"x" * (1 << 20)] * 200]
    with (tmp_path / name).open("wb") as file:
        file.writelines(gzip.compress(part, 1) if name.endswith(".gz") else part for part in parts)
    program = (
        "import resource, sys; from pathlib import Path\n"
        "from wrinklefree.core.errors import UserError\n"
        "from wrinklefree.data.rows import read_rows\n"
        "def held(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = held()\n"
        "try:\n"
        "    for row in read_rows(Path(sys.argv[1])): pass\n"
        "except UserError as error: assert 'longer than 32 MB' in str(error), error\n"
        "print(held() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / name)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 150_000  # kB


def test_a_folder_is_no_file_to_evaluate_on(tmp_path: Path) -> None:
    from conversing import chatty

    from wrinklefree.data.open import file_batches

    with pytest.raises(UserError, match="a folder, not a file"):
        file_batches(tmp_path, chatty(), batch_size=1, length=8)
    with pytest.raises(UserError, match="no such file"):
        file_batches(tmp_path / "x", chatty(), batch_size=1, length=8)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "good"}\n{oops'))
    with pytest.raises(UserError, match=r"a\.jsonl\.gz, line 2: not JSON"):
        file_batches(tmp_path / "a.jsonl.gz", chatty(), batch_size=1, length=8)


@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_gives_rows_bad_rows_or_a_line(name: str, tmp_path: Path) -> None:
    """Bytes changed, left out, doubled, cut off: nothing but a UserError of one line comes of it."""
    KINDS[name](tmp_path / name)
    whole, draw = (tmp_path / name).read_bytes(), random.Random(name)
    for _ in range(60):
        content = bytearray(whole)
        for _ in range(draw.choice((1, 3, 40))):
            start = draw.randrange(len(content))
            content[start : start + draw.choice((0, 1, 9))] = draw.randbytes(draw.choice((0, 1, 9)))
        del content[draw.choice((len(content), draw.randrange(len(content)))) :]
        (tmp_path / name).write_bytes(content)
        try:
            found = [str(row) for row in read_rows(tmp_path / name) if isinstance(row, BadRowError)]
        except UserError as error:
            found = [str(error)]
        assert all("\n" not in message and message.startswith(str(tmp_path)) for message in found)
