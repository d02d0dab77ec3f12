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

ABI = 7
NAMES = {"win32": "wf.dll", "darwin": "libwf.dylib"}
FOLDER = Path(__file__).parents[1] / "packed" / "lib"

_int, _pointer, _text = ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p
SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "wf_abi": (_int, []),
    "wf_isa": (_text, []),
    "wf_error": (_text, []),
    "wf_pool_new": (_pointer, [_int]),
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
    """Threads that compute products. The calling thread is one of them, so 1 starts no other."""

    def __init__(self, threads: int) -> None:
        library = load()
        self.threads = threads
        self.handle = checked(library.wf_pool_new(threads))
        self._free = library.wf_pool_free

    def __del__(self) -> None:
        if "handle" in vars(self):
            self._free(self.handle)


@cache
def _pool_of(process: int, threads: int) -> Pool:
    return Pool(threads)


def pool() -> Pool:
    """A pool with as many threads as torch uses."""
    return _pool_of(os.getpid(), torch.get_num_threads())  # one per process, because threads do not survive a fork
