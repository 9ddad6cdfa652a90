"""Tensors in files: the same values, memory given back, and a folder that is bounded and left clean."""

from __future__ import annotations

import errno
import gc
import sys
from pathlib import Path

import pytest
import torch

from rolora_passes import ondisk
from rolora_passes.errors import SpillError
from rolora_passes.ondisk import Growing, is_on_disk, kept, rest, spilling

KINDS = [torch.float32, torch.bfloat16, torch.int8, torch.uint8, torch.bool]


def values(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    drawn = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(0))
    return drawn % 2 == 0 if dtype == torch.bool else drawn.to(dtype)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("large", [False, True])
def test_a_tensor_grows_by_rows(dtype: torch.dtype, large: bool, tmp_path: Path) -> None:
    expected = values((1030 if large else 10, 1024), dtype)
    with spilling(tmp_path):
        growing = Growing(expected.shape, dtype)
        for part in expected.split(7):
            growing.append(part)
        found = growing.finish()
    assert is_on_disk(found) == large
    assert found.dtype == dtype and torch.equal(found, expected)
    assert not list(tmp_path.iterdir())  # the file has no name


def test_without_a_folder_tensors_stay_in_memory() -> None:
    expected = values((1030, 4096), torch.float32)
    assert not is_on_disk(kept(expected))
    growing = Growing(expected.shape, torch.float32)
    growing.append(expected)
    assert not is_on_disk(growing.finish())
    scalar = Growing((), torch.float64)
    scalar.append(torch.tensor(3.0))
    assert scalar.finish() == 3.0


@pytest.mark.skipif(sys.platform != "linux", reason="the system gives memory back by itself")
def test_what_rests_is_read_again(tmp_path: Path) -> None:
    def resident() -> int:
        (line,) = [text for text in Path("/proc/self/status").read_text().splitlines() if "RssFile" in text]
        return int(line.split()[1])

    with spilling(tmp_path):
        tensor = kept(values((8 << 20,), torch.uint8))
    total = int(tensor.sum())
    before = resident()
    rest(tensor)
    assert before - resident() > 6 << 10  # KB
    assert int(tensor.sum()) == total
    rest(tensor, tensor[: 4 << 20])
    assert int(tensor.sum()) == total


def test_what_is_not_on_disk_does_not_rest() -> None:
    tensor = values((1 << 21,), torch.uint8)
    rest(tensor)
    assert torch.equal(tensor, values((1 << 21,), torch.uint8))


def test_the_limit_is_of_what_lies_there_at_once(tmp_path: Path) -> None:
    with spilling(tmp_path, limit=5 << 20) as spill:
        first = kept(values((4 << 20,), torch.uint8))
        with pytest.raises(SpillError, match=r"at most 0.00524 GB of .*, found 0.00839 GB: raise the limit"):
            kept(values((4 << 20,), torch.uint8))
        assert spill.used == 4 << 20
        del first
        gc.collect()
        assert spill.used == 0
        assert is_on_disk(kept(values((4 << 20,), torch.uint8)))


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ondisk, "_unnamed", lambda folder: Full())
    with (
        spilling(tmp_path),
        pytest.raises(SpillError, match=r"No space left.*give a folder on a disk"),
    ):
        kept(values((4 << 20,), torch.uint8))


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with spilling(tmp_path / "file"), pytest.raises(SpillError, match="cannot write weights to"):
        kept(values((4 << 20,), torch.uint8))
