"""How much the system has written to disks for this process: what wears an SSD, whatever LMDB does with its pages."""

import ctypes
import os
import sys
from pathlib import Path

_RUSAGE_INFO_V2 = 2
_UUID_BYTES, _N_NUMBERS, _BYTES_WRITTEN = 16, 18, 17  # struct rusage_info_v2: ri_uuid, 18 u64, the last of them


def written_bytes() -> int | None:
    """Since the process started; None where the system does not tell."""
    if sys.platform == "darwin":
        return _written_on_darwin()
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("write_bytes:")), None)


def _written_on_darwin() -> int | None:
    buffer = ctypes.create_string_buffer(_UUID_BYTES + 8 * _N_NUMBERS)
    if ctypes.CDLL(None).proc_pid_rusage(os.getpid(), _RUSAGE_INFO_V2, buffer):
        return None
    return int.from_bytes(buffer.raw[_UUID_BYTES + 8 * _BYTES_WRITTEN :], sys.byteorder)
