"""Settings that count only before the first import of Triton or transformers, or the first compilation."""

import os
import tempfile
from collections.abc import Callable, Iterator

import pytest
import torch

# Without a GPU, Triton's programs run in its interpreter.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

# transformers copies the loader of a packed folder into a shared folder, where two processes would write at once.
_MODULES = tempfile.TemporaryDirectory(prefix="wrinklefree-modules-")
os.environ["HF_MODULES_CACHE"] = _MODULES.name

# Jobs, downloads and converted folders of the person who runs the tests are not theirs.
_CACHE = tempfile.TemporaryDirectory(prefix="wrinklefree-cache-")
os.environ["WRINKLEFREE_CACHE"] = _CACHE.name

# torch.compile's cache does not ask for which instruction set it compiled: what an AVX-512 run left there gives wrong
# numbers in a run with AVX2 alone.
_COMPILED = f"wrinklefree-inductor-{torch.backends.cpu.get_cpu_capability()}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), _COMPILED))

Prove = Callable[..., None]


@pytest.fixture(scope="session", autouse=True)
def _prove_loader() -> Iterator[Prove]:
    """Leave out the process that proves each packed folder's loader, because it takes seconds; see `loader_proofs`."""
    from wrinklefree.export.proof import loader

    prove = loader.prove
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "prove", lambda *args: None)
        yield prove


@pytest.fixture(scope="session", autouse=True)
def _short_ends() -> Iterator[None]:
    """Let runs end with few tokens of speed and samples: of a run of seconds they would be most of the time."""
    from wrinklefree.evaluate import speed
    from wrinklefree.runs import stage

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "SPEED_TOKENS", 4)
        patch.setattr(stage, "SAMPLE_TOKENS", 4)
        yield


@pytest.fixture
def loader_proofs(_prove_loader: Prove, monkeypatch: pytest.MonkeyPatch) -> Prove:
    """Let the exports of a test prove their loaders."""
    monkeypatch.setattr("wrinklefree.export.proof.loader.prove", _prove_loader)
    return _prove_loader
