"""How the C library handles the memory that a step frees and the next one needs again.

By default glibc gives blocks of megabytes back to the kernel, which clears them page by page when they are asked for once more: up to a
quarter of a step on CPUs (benchmarks/README.md, `train_step`). A process that trains keeps them, in large pages. Other C libraries do not
read the variable.
"""

import os
import sys

KEEPS_MEMORY = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1000000000000"}


def keep_memory() -> None:
    """Starts this process once more where glibc, which reads the variable when a process starts, was not told. What is set stays."""
    if missing := {name: value for name, value in KEEPS_MEMORY.items() if name not in os.environ}:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **missing})
