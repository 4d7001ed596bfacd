"""Peak memory of a block."""

import pytest
import torch

from leantune.measure import PeakMemory, peak, peak_rss

MIB = 2**20


def fill(mib):
    """Touch fresh memory and let it go again."""
    block = bytearray(mib * MIB)
    block[::4096] = b"\x01" * len(block[::4096])


def resettable():
    return peak.reset_peak_rss()


def test_sees_memory_that_was_let_go_within_the_block():
    before = peak_rss()
    with PeakMemory() as measured:
        fill(256)
    assert measured.kind == "cpu_rss" and measured.reserved_bytes is None
    assert measured.bytes >= 256 * MIB
    assert measured.since_start_of_process or measured.bytes < before + 600 * MIB


@pytest.mark.skipif(not resettable(), reason="this system does not let the high-water mark be set back")
def test_does_not_see_what_was_before_the_block():
    with PeakMemory() as large:
        fill(512)
    with PeakMemory() as small:
        fill(1)
    assert not small.since_start_of_process
    assert small.bytes < large.bytes - 256 * MIB


@pytest.mark.skipif(not resettable(), reason="this system does not let the high-water mark be set back")
def test_nested_blocks_know_their_own_peaks():
    with PeakMemory() as outer:
        fill(512)
        with PeakMemory() as inner:
            fill(1)
        so_far = outer.bytes
    assert inner.bytes < outer.bytes - 256 * MIB
    assert so_far <= outer.bytes
    with PeakMemory() as outer, PeakMemory() as inner:
        fill(256)
    assert abs(outer.bytes - inner.bytes) < 64 * MIB


def test_a_block_that_fails_is_measured_and_closed():
    with pytest.raises(RuntimeError, match="out of luck"), PeakMemory() as measured:
        raise RuntimeError("out of luck")
    assert measured.bytes > 0
    assert PeakMemory._open == []


def test_where_the_mark_cannot_be_set_back_the_figure_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(peak, "_CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    with PeakMemory() as measured:
        pass
    assert measured.since_start_of_process and measured.bytes > 0


def test_units_of_getrusage(monkeypatch, tmp_path):
    monkeypatch.setattr(peak, "_STATUS", tmp_path / "missing")
    linux = peak_rss()
    monkeypatch.setattr("sys.platform", "darwin")
    assert linux == peak_rss() * 1024
    assert linux > 10 * MIB


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_peak_is_the_allocators():
    torch.ones(64 * MIB, dtype=torch.uint8, device="cuda")
    with PeakMemory("cuda") as measured:
        base = torch.cuda.memory_allocated()
        block = torch.ones(16 * MIB, dtype=torch.uint8, device="cuda")
        del block
    assert measured.kind == "cuda_allocated"
    assert measured.bytes == base + 16 * MIB
    assert measured.reserved_bytes >= measured.bytes
