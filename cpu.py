"""What a CPU needs before and after torch is loaded: how its threads wait, the allocator, cores.

Every program imports this file first. OpenMP reads GOMP_SPINCOUNT once, when torch loads it, so the
variable has to be set before `import torch` anywhere. docs/speed.md has the measurements.
"""

import ctypes
import math
import os
from pathlib import Path

# OpenMP's threads wait for work in a busy loop. By default the loop is so long that another busy
# process on the same cores makes training many times slower; this value keeps it short.
SPIN_COUNT = "3000"
SPIN_COUNT_IS_OURS = "GOMP_SPINCOUNT" not in os.environ and "OMP_WAIT_POLICY" not in os.environ
if SPIN_COUNT_IS_OURS:
    os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT

# The miniature's number of threads. A constant, because sums in float32 depend on it: the same
# command has to print the same numbers whatever else the machine does.
MINIATURE_THREADS = 2

# Parameters of glibc's mallopt (malloc.h) and the values set here.
M_TRIM_THRESHOLD, M_MMAP_MAX, NEVER = -1, -4, -1


def cores() -> int:
    """Returns how many cores this process may use; a container's quota counts, rounded up."""
    try:
        visible = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        visible = os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except OSError:  # no such limit here
        return visible
    return visible if quota == "max" else min(visible, math.ceil(int(quota) / int(period)))


def chosen_threads(miniature: bool) -> int | None:
    """Returns the number of threads of this process, or None where the user has set it.

    The user's OMP_NUM_THREADS is kept. torchrun sets that variable to 1 itself when it starts
    several processes, so there 1 counts as not set. The processes of this machine share
    MINIATURE_THREADS if miniature is true, and otherwise all cores.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    own = os.environ.get("OMP_NUM_THREADS")
    if own and not (processes > 1 and own == "1"):
        return None
    return max(1, (MINIATURE_THREADS if miniature else cores()) // processes)


def has_amx() -> bool:
    """Returns whether this CPU has AMX for bfloat16, with which such matrix products are fast."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not on macOS
        return False


def begin_vector_mathematics():
    """Calls one of MKL's vector functions (cos, exp, ...) for the first time, on this thread alone.

    At the first call MKL finds out which CPU this is. Where two threads make that call at once, as
    in the first forward, one of them may compute its part with less accuracy: in one of ten runs
    on two threads the seventh digit was another.
    """
    import torch  # not before GOMP_SPINCOUNT is set

    torch.zeros(1).cos()


freed_memory_is_kept = False  # set by the function below, for the header


def keep_freed_memory():
    """Tells glibc's allocator to keep freed memory for this process.

    By default it gives each block of over 32 MB back to the system when it is freed, and the next
    operation pays for the same pages again. Nothing is changed if the user has set a MALLOC_
    variable or GLIBC_TUNABLES, or where the C library has no mallopt (macOS, musl).
    """
    global freed_memory_is_kept
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    freed_memory_is_kept = bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, NEVER))


def give_back_freed_memory():
    """Gives the freed memory that keep_freed_memory has kept back to the system, once."""
    if freed_memory_is_kept:
        ctypes.CDLL(None).malloc_trim(0)
