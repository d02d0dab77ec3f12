"""Wheels for every platform from one machine: `make wheels`, or python native/wheels.py FOLDER.

One clang, the one in the package `ziglang`, builds the library for each target. The Python files come from one pure
wheel, so no Python of the target is needed. If a target is this machine's, the library is loaded and asked which
kernels it takes.
"""

import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INSIDE = Path("wrinklefree/packed/lib")


@dataclass(frozen=True)
class Target:
    """A platform as wheels, clang and CMake call it."""

    tag: str
    triple: str
    system: str
    processor: str
    library: str


TARGETS = [
    Target("manylinux_2_17_x86_64", "x86_64-linux-gnu.2.17", "Linux", "x86_64", "libwf.so"),
    Target("manylinux_2_17_aarch64", "aarch64-linux-gnu.2.17", "Linux", "aarch64", "libwf.so"),
    Target("macosx_11_0_arm64", "aarch64-macos.11.0", "Darwin", "arm64", "libwf.dylib"),
    Target("macosx_11_0_x86_64", "x86_64-macos.11.0", "Darwin", "x86_64", "libwf.dylib"),
    Target("win_amd64", "x86_64-windows-gnu", "Windows", "AMD64", "wf.dll"),
]


def run(*command: str | Path) -> None:
    """Run a command, in silence unless it fails."""
    done = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")


def python(*words: str | Path) -> None:
    run(sys.executable, "-m", *words)


def compiler(folder: Path, target: Target) -> Path:
    """A program that is clang for one target."""
    file = folder / f"c++-{target.tag}"
    file.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ziglang c++ -target {target.triple} "$@"\n')
    file.chmod(0o755)
    return file


def library(folder: Path, target: Target) -> Path:
    """Build the library of one target."""
    build = folder / target.tag
    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_SYSTEM_NAME": target.system,
        "CMAKE_SYSTEM_PROCESSOR": target.processor,
        "CMAKE_CXX_COMPILER": compiler(folder, target),
        "CMAKE_CXX_COMPILER_WORKS": "1",
        "CMAKE_SHARED_LINKER_FLAGS": "-s" if target.system == "Linux" else "",  # without symbols
    }
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}") or "cmake"
    run(cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *(f"-D{name}={value}" for name, value in settings.items()))
    run(cmake, "--build", build)
    return next(file for file in build.rglob(target.library) if file.is_file())


def pure_wheel(folder: Path) -> Path:
    python("pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, "-Cwheel.cmake=false", ROOT)
    return next(folder.glob("*.whl"))


def assemble(pure: Path, file: Path, target: Target, folder: Path, out: Path) -> Path:
    """The pure wheel with a library in it, named for its platform."""
    with tempfile.TemporaryDirectory(dir=folder) as unpacked:
        python("wheel", "unpack", "--dest", unpacked, pure)
        root = next(Path(unpacked).iterdir())
        (root / INSIDE).mkdir(parents=True)
        shutil.copy2(file, root / INSIDE / target.library)
        info = next(root.glob("*.dist-info")) / "WHEEL"
        text = info.read_text().replace("Root-Is-Purelib: true", "Root-Is-Purelib: false")
        info.write_text(text.replace("Tag: py3-none-any", f"Tag: py3-none-{target.tag}"))
        python("wheel", "pack", "--dest-dir", out, root)
    return next(out.glob(f"*{target.tag}.whl"))


ASK = "import ctypes, sys; f = ctypes.CDLL(sys.argv[1]).wf_isa; f.restype = ctypes.c_char_p; print(f().decode())"


def kernels(file: Path, target: Target) -> str:
    """What the library says of the machine it was loaded on, or why it was not loaded."""
    if (target.system, target.processor) != (platform.system(), platform.machine()):
        return "not loaded: built for another machine"
    done = subprocess.run([sys.executable, "-c", ASK, str(file)], capture_output=True, text=True, check=True)
    return f"loaded: {done.stdout.strip()}"


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "dist").resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pure = pure_wheel(folder)
        for target in TARGETS:
            file = library(folder, target)
            wheel = assemble(pure, file, target, folder, out)
            print(f"{wheel.name}  {wheel.stat().st_size / 1e6:.1f} MB  {kernels(file, target)}", flush=True)


if __name__ == "__main__":
    main()
