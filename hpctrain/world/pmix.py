"""PMIx (https://pmix.org), by which a launcher and the processes of an MPI job know of each other.

Only where MPI has loaded the library into this process; where not, nothing here does anything.
"""

from __future__ import annotations

import ctypes
import os
import threading

from hpctrain.errors import PeerLost
from hpctrain.process import loaded

_BOOL = 1


class _Data(ctypes.Union):
    _fields_ = (("flag", ctypes.c_bool), ("largest", ctypes.c_void_p * 3))


class _Value(ctypes.Structure):
    _fields_ = (("type", ctypes.c_uint16), ("data", _Data))


class _Info(ctypes.Structure):
    """``pmix_info_t`` of the PMIx standard, section 3.2."""

    _fields_ = (("key", ctypes.c_char * 512), ("flags", ctypes.c_uint32), ("value", _Value))


_COLLECT = _Info(b"pmix.collect", 0, _Value(_BOOL, _Data(flag=True)))


def fence(timeout_seconds: float) -> None:
    """Wait until every process of this launch has called this; to be called right after MPI starts.

    Open MPI 5 ends ``MPI_Init`` with a fence, and readies its world only after it: who leaves the
    fence early and sends at once crashes who leaves it late (open-mpi/ompi issue 12495, pull
    request 13559). After this fence, which sends nothing over MPI, all are ready.

    Raises:
        PeerLost: The time is up.
    """
    pmix = loaded("libpmix.so")
    if pmix is None or not pmix.PMIx_Initialized():
        return
    arguments = (None, 0, ctypes.byref(_COLLECT), ctypes.c_size_t(1))
    thread = threading.Thread(target=pmix.PMIx_Fence, args=arguments, daemon=True)
    thread.start()
    thread.join(timeout_seconds)
    if thread.is_alive():
        raise PeerLost(
            f"a process on {os.uname().nodename} waited {timeout_seconds:.0f} s for the others of "
            "its launch to meet.",
            hint="did all of them start? Their own logs say more.",
        )


def leave() -> None:
    """Tell the launcher that this process ends in good order, though MPI is not ended.

    With fault tolerance whoever ends first looks lost to the others, and ``MPI_Finalize`` of Open
    MPI 5.0 may crash over that; ``mpirun`` in turn counts a spawned process that does not end its
    part in PMIx as failed.
    """
    pmix = loaded("libpmix.so")
    while pmix is not None and pmix.PMIx_Initialized():
        pmix.PMIx_Finalize(None, 0)
