"""The name of this machine's processor, which a figure is worth nothing without."""

import os
import platform
from pathlib import Path

# Flags of a processor that decide how fast trainings and kernels run.
FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "bf16", "i8mm")

CPUINFO = Path("/proc/cpuinfo")


def processor() -> str:
    """The processor's name, its cores, and the flags that matter."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.is_file() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = facts.get("model name") or platform.processor() or platform.machine()
    flags = (facts.get("flags", "") + facts.get("Features", "")).split()
    return f"{name}, {os.cpu_count()} cores, {' '.join(flag for flag in FLAGS if flag in flags)}".rstrip(", ")
