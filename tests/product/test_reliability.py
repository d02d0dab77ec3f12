"""The promises of docs/reliability.md: each has a test that exists, and the benchmark tries them at random."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def promised() -> list[tuple[Path, str]]:
    """(file, test) for every test that the page names; an empty name for a whole file."""
    found = []
    for line in (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8").splitlines():
        file = ""
        for given in re.findall(r"`((?:tests|benchmarks)/[^`]*|::[^`]*)`", line):
            name, _, test = given.partition("::")
            file = name or file
            found.append((ROOT / file, test))
    return found


def test_every_promise_has_its_test() -> None:
    assert len(promised()) > 40
    for file, test in promised():
        names = [node.name for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if hasattr(node, "name")]
        assert not test or test in names, f"{file.name}::{test}"


def test_every_row_of_the_page_names_a_test() -> None:
    lines = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith("| promise")]
    assert all(re.search(r"`(tests|benchmarks)/", row) for row in rows)


@pytest.mark.slow
def test_the_benchmark_finds_nothing() -> None:
    command = [sys.executable, "-m", "benchmarks.reliability", "--quick", "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["kills_same_bits"] == figures["kills"] == 4
    assert figures["resumes_right"] == figures["resumes"] == 2
    assert figures["mutated"] == figures["read"] + figures["refused_in_one_line"] == 40
    assert figures["uploads_failed"] > 0
    assert figures["second_runs_refused"] == 2
    wrong = ("internal_errors", "hangs", "written_outside", "code_run", "runs_ended_by_upload", "uploads_missing")
    assert {name: figures[name] for name in wrong} == dict.fromkeys(wrong, 0)


@pytest.mark.slow
def test_a_lost_machine_is_followed_by_another_that_ends_with_the_same_bits() -> None:
    """Runs are killed and their folders removed, with an S3 server and a GCS emulator as the store."""
    for module in ("moto.server", "gcp_storage_emulator", "s3fs", "gcsfs"):
        pytest.importorskip(module)
    command = [sys.executable, "-m", "benchmarks.reliability", "--quick", "--parts", "stores", "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["store_kills_same_bits"] == figures["store_kills"] == 6
    assert figures["store_resumes"] > 0
