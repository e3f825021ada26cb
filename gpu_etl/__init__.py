"""Raw Criteo days to a data set of 160-byte records, and from there to batches. Knows nothing of torch models."""

import os
import resource

if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
    # Arrow's allocator reserves 1 GiB of addresses at a time, which a limit of them (ulimit -v) counts: in KiB, less.
    os.environ.setdefault("MIMALLOC_ARENA_RESERVE", str(64 << 10))
