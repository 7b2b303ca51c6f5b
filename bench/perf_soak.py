"""Resident memory of a daemon that is kept busy: after a little work, and after many times as much."""

from pathlib import Path
from typing import Any

import numpy as np
import psutil
from perf_base import Scale, checked, console, running
from perf_client import SPEC, Load
from rich.progress import track

from kvcached_client import Client

QUOTA_BYTES = 64 << 20  # soon full, so that the file and its mapping do not grow while memory is watched
N_WARM = 800  # blocks: 2.3 times what the store holds
N_SAMPLES = 20


def measure(scale: Scale, directory: Path) -> dict[str, Any]:
    """`rss_growth`: the last quarter's median over that of the first samples after warming, less 1."""
    n_each = scale.soak_blocks // N_SAMPLES
    with (
        running(directory, "--quota-bytes", str(QUOTA_BYTES)) as (target, pid),
        Client(SPEC, target=target) as client,
    ):
        load, process = Load(client, 0), psutil.Process(pid)
        for _ in range(N_WARM):
            load.turn()
        samples = [process.memory_info()]
        for _ in track(range(N_SAMPLES), "resident memory", console=console):
            for _ in range(n_each):
                load.turn()
            samples.append(process.memory_info())
    checked(not load.errors, f"{load.errors} calls failed")
    rss = [sample.rss for sample in samples]
    anonymous = [sample.rss - sample.shared for sample in samples]
    return {"rss_growth": growth(rss), "blocks": N_WARM + scale.soak_blocks, "rss": rss, "anonymous": anonymous}


def growth(samples: list[int]) -> float:
    return float(np.median(samples[-len(samples) // 4 :]) / np.median(samples[:3]) - 1)
