"""What the figures were measured on."""

import os
import platform
from importlib.metadata import version
from pathlib import Path


def processor() -> str:
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine(*packages: str) -> str:
    """The processor, its cores, and the versions of Python and these packages, in one line."""
    versions = {name: version(name) for name in packages}
    return f"{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}"


def resident_mb(process: int, field: str = "VmRSS") -> float:
    """Resident memory of a process in MB (10^6 bytes); `VmHWM` is the most it ever had. Linux only."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024 / 1e6


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and those it started. Linux only."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") + sum(cpu_seconds(int(c)) for c in children)
