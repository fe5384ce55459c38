"""Memory of large tensors."""

from pathlib import Path

import pytest
import torch

from hpctrain.ps.huge_pages import HUGE_PAGE, zeros
from hpctrain.ps.partition.layout import Layout, Parameter
from hpctrain.ps.protocol.regions import Regions, region_bytes


@pytest.mark.parametrize("size", [0, 1, 1000, HUGE_PAGE - 1, HUGE_PAGE, 3 * HUGE_PAGE + 8])
def test_it_is_zero_and_can_be_written(size):
    memory = zeros(size)
    assert memory.dtype == torch.uint8 and memory.shape == (size,) and memory.is_contiguous()
    assert not memory.any()
    memory.fill_(7)
    assert int(memory.sum()) == 7 * size
    assert not zeros(size).any()  # another one is other memory


def flags_of(address):
    """Of the mapping that holds an address, as the kernel says them."""
    within = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            within = begin <= address < end
        elif within and first == "VmFlags:":
            return line.split()[1:]
    raise AssertionError("no such mapping")


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a system without huge pages"
)
def test_large_memory_asks_for_huge_pages():
    memory = zeros(2 * HUGE_PAGE)
    assert "hg" in flags_of(memory.data_ptr())
    part = memory[HUGE_PAGE:].view(torch.float32)
    del memory
    part.fill_(1.0)  # it lives as long as any view of it
    assert float(part.sum()) == HUGE_PAGE / 4


@pytest.mark.parametrize("common", [None, 0])
def test_a_server_in_the_worker_s_process_changes_no_version_that_the_worker_reads(common):
    # By their versions a worker tells whether the user changed its gradients.
    layout, _ = Layout.of([Parameter(torch.float32, 0, 24, 0)], 40)
    regions = Regions({0: zeros(2 * region_bytes(layout))}, common)
    regions.lay_out(layout)
    weights, gradients = (flats[0] for flats in regions.flats(0))
    before = gradients._version
    for piece in layout.slices:
        regions.gradient(0, piece).fill_(3.0)
        shared = regions.common(piece)
        if shared is not None:  # the server's own, updated in place
            shared.fill_(2.0)
        regions.put(0, piece, torch.full([piece.stop - piece.start], 2.0))
    assert gradients.eq(3).all() and weights.eq(2).all()  # the same memory
    assert gradients._version == before
