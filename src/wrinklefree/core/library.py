"""Load the native library (`native/wf.h`, `native/train.h`) and call it through ctypes.

`available()` says why the library cannot be used. Tensors that go there must be on the CPU.
"""

import ctypes
import os
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

ABI = 8
NAMES = {"win32": "wf.dll", "darwin": "libwf.dylib"}
_FIRST_PROCESS = os.getpid()
FOLDER = Path(__file__).parents[1] / "packed" / "lib"

_int, _pointer, _text = ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p
SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "wf_abi": (_int, []),
    "wf_isa": (_text, []),
    "wf_error": (_text, []),
    "wf_pool_new": (_pointer, [_int]),
    "wf_pool_on_team": (_pointer, [_int, _pointer]),
    "wf_pool_free": (None, [_pointer]),
    "wf_matrix_table": (_pointer, [_int] * 3 + [_pointer] * 3 + [_int] * 3 + [_pointer] * 3),
    "wf_matrix_complex": (_pointer, [_int] * 3 + [_pointer] * 2 + [_int] * 2 + [_pointer] * 3),
    "wf_matrix_int8": (_pointer, [_int] * 2 + [_pointer] * 3),
    "wf_matrix_dense": (_pointer, [_int] * 2 + [_pointer] * 2 + [_int]),
    "wf_matrix_free": (None, [_pointer]),
    "wf_matrix_bytes": (ctypes.c_size_t, [_pointer]),
    "wf_matrix_kernel": (_text, [_pointer]),
    "wf_matrix_row": (_int, [_pointer, _int, _pointer]),
    "wf_norm": (_int, [_pointer, _pointer, ctypes.c_float, _int, _int, _pointer]),
    "wf_matmul": (_int, [_pointer, _pointer, _int, _pointer, _int, _pointer, _int]),
    "wf_complex_codes": (_int, [_pointer] * 4),
    "wf_complex_weight": (_int, [_pointer] * 4),
    "wf_complex_gradient": (_int, [_pointer] * 7),
    "wf_table_codes": (_int, [_pointer] * 4),
    "wf_table_weight": (_int, [_pointer] * 4),
    "wf_table_gradient": (_int, [_pointer] * 7),
    "wf_rounded": (_int, [_pointer] + [_int] * 3 + [_pointer] * 2),
}


def path() -> Path:
    """The file that the library is loaded from."""
    return FOLDER / NAMES.get(sys.platform, "libwf.so")


@cache
def load() -> ctypes.CDLL:
    """Load the library and declare its functions. Raises OSError with the reason if it cannot be used."""
    if not path().is_file():
        raise OSError(f"{path()}: not built; install a C++ compiler and wrinklefree again, or a wheel with the library")
    library = ctypes.CDLL(str(path()))
    if library.wf_abi() != ABI:  # check first: another version may lack the functions below
        raise OSError(f"{path()}: version {library.wf_abi()}, this wrinklefree needs {ABI}: build it again")
    declare(library, SIGNATURES)
    if library.wf_isa() is None:
        raise OSError(last_error(library))
    return library


def declare(library: ctypes.CDLL, signatures: Mapping[str, tuple[Any, list[Any]]]) -> None:
    """Tell ctypes the (result, arguments) of functions. Raises AttributeError if the library lacks one."""
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments


@cache
def available() -> str | None:
    """The reason why the library cannot be used, or None if it can."""
    try:
        load()
    except (OSError, AttributeError) as error:
        return str(error)
    return None


def isa() -> str:
    """The instruction set in use, such as "avx512-vnni"."""
    return str(load().wf_isa().decode())


def last_error(library: ctypes.CDLL) -> str:
    """The reason for the library's last failure."""
    return str(library.wf_error().decode())


def checked(handle: int | None) -> int:
    """Return a handle that the library made. Raises ValueError with the reason if it made none."""
    if handle is None:
        raise ValueError(last_error(load()))
    return handle


class Pool:
    """Threads that compute products. The calling thread is one of them, so 1 starts no other.

    With the address of a `team`, they are the threads of another library.
    """

    def __init__(self, threads: int, team: int | None = None) -> None:
        library = load()
        self.threads = threads
        new = library.wf_pool_new(threads) if team is None else library.wf_pool_on_team(threads, team)
        self.handle = checked(new)
        self._free = library.wf_pool_free

    def __del__(self) -> None:
        if "handle" in vars(self):
            self._free(self.handle)


@cache
def torch_team() -> int | None:
    """The address of a function that runs work on torch's own threads, or None if this torch has none that we know.

    Torch's idle threads spin for a while, as ours do. On a machine with as many cores as threads, one keeps the other
    from running. Torch for Linux brings GNU OpenMP, whose threads serve whoever calls GOMP_parallel.
    """
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return None
    files = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines() if "/libgomp" in line}
    of_torch = [file for file in files if Path(torch.__file__).parent.parent in Path(file).parents]
    if len(of_torch) != 1:
        return None
    return ctypes.cast(ctypes.CDLL(of_torch[0]).GOMP_parallel, _pointer).value


@cache
def _pool_of(process: int, threads: int) -> Pool:
    # Threads do not survive a fork, and GNU OpenMP does not notice that its own are gone.
    return Pool(threads, torch_team() if process == _FIRST_PROCESS else None)


def pool() -> Pool:
    """A pool with as many threads as torch uses, and on torch's own where that can be."""
    return _pool_of(os.getpid(), torch.get_num_threads())
