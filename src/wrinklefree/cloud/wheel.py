"""This package as it is here, for a machine elsewhere."""

import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path

import wrinklefree
from wrinklefree.core.errors import UserError
from wrinklefree.core.text import first_line

CHECKOUT = Path(wrinklefree.__file__).parents[2]

# Without the native library: that is built for this machine's processor and system, and serves CPUs alone.
PLAIN = "wheel.cmake=false"


def is_checkout() -> bool:
    """Whether this package runs from its sources."""
    return (CHECKOUT / "pyproject.toml").is_file()


def released() -> str:
    """The requirement that installs this version from a registry."""
    return f"wrinklefree=={importlib.metadata.version('wrinklefree')}"


def wheel_name() -> str:
    """The file's name that `build` gives."""
    return f"wrinklefree-{importlib.metadata.version('wrinklefree')}-py3-none-any.whl"


def build(folder: Path) -> Path:
    """Build a wheel of the checkout in `folder`, as it is now. Raises UserError if that fails."""
    uv = shutil.which("uv")
    options = ["--config-settings" if uv is None else "--config-setting", PLAIN]
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder)]
    if uv is not None:
        command = [uv, "build", "--quiet", "--wheel", "--out-dir", str(folder)]
    done = subprocess.run([*command, *options, str(CHECKOUT)], capture_output=True, text=True, check=False)
    if done.returncode or not (folder / wheel_name()).is_file():
        reason = first_line(RuntimeError(done.stderr or done.stdout))
        raise UserError(f"{CHECKOUT}: no wheel could be built of it: {reason}")
    return folder / wheel_name()
