"""What a run that is killed, full, bounded or not alone leaves behind, and how it goes on."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import captured, tokens_for
from torch import Tensor, fx

from rolora_passes import (
    FoldConstants,
    ObserveActivations,
    QuantizeWeights,
    SmoothQuant,
    apply_passes,
    history,
    ondisk,
)
from rolora_passes.errors import PassError, SourceError, SpillError, WorkError
from rolora_passes.files import holding
from rolora_passes.graphs.graph import copy_graph, linears, parameters, set_tensor
from rolora_passes.graphs.running import run
from rolora_passes.ondisk import Growing, is_on_disk, kept, on_disk, spilling
from rolora_passes.passes.base import Calibration
from rolora_passes.quantize import stages
from rolora_passes.quantize.stages import Stages

GPTQ = [QuantizeWeights(method="gptq", group_size=8, bits=4), FoldConstants()]


@pytest.fixture
def anything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of any size go to the spill folder."""
    monkeypatch.setattr(ondisk, "_SMALLEST", 1)


def bytes_of(graph: fx.GraphModule) -> dict[str, bytes]:
    return {n: v.detach().contiguous().numpy().tobytes() for n, v in parameters(graph).items()}


# Memory.


@pytest.mark.parametrize("steps", [GPTQ, [ObserveActivations(per="channel"), SmoothQuant()]])
def test_a_bound_of_memory_changes_no_byte(
    steps: list[Any], tmp_path: Path, anything_is_large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = captured("llama", torch.float32)
    tokens = tokens_for(graph, 4, 12)
    free = apply_passes(graph, steps, calibration=tokens)
    monkeypatch.setattr(ondisk, "resident", lambda: 0)
    monkeypatch.setattr(stages, "room_beside", lambda need, what: 0)
    monkeypatch.setattr("rolora_passes.quantize.gptq_linears.room_beside", lambda need, what: 0)
    monkeypatch.setattr("rolora_passes.quantize.observers.room_beside", lambda need, what: 0)
    parked: list[int] = []
    monkeypatch.setattr(stages, "kept", lambda value: parked.append(value.nbytes) or kept(value))
    with spilling(tmp_path, memory=1) as spill:
        bound = apply_passes(graph, steps, calibration=tokens)
        assert parked and spill.used >= 0
        assert bytes_of(bound) == bytes_of(free)


def test_windows_keep_in_memory_what_there_is_room_for(tmp_path: Path, anything_is_large: None) -> None:
    graph = captured("llama", torch.float32)
    tokens = tokens_for(graph, 4, 12)
    read = linears(graph)[3].args[0]
    assert isinstance(read, fx.Node)

    def held(room: int | None) -> tuple[int, list[Tensor], list[bool]]:
        with spilling(tmp_path) as spill:
            windows = Stages(graph, tokens, room)
            found = list(windows.advance(read))
            kept = [is_on_disk(v) for w in windows._windows for v in w.values() if isinstance(v, Tensor)]
            return spill.used, found, kept

    used, values, kept = held(0)
    assert used > 0 and all(kept)
    none, expected, free = held(None)
    assert none == 0 and not any(free)
    assert all(map(torch.equal, values, expected))
    half, _, some = held(used // 2)
    assert 0 < half < used and any(some) and not all(some)


def test_values_that_nothing_reads_any_more_leave_the_folder(tmp_path: Path, anything_is_large: None) -> None:
    graph = captured("llama", torch.float32)
    with spilling(tmp_path) as spill:
        windows = Stages(graph, tokens_for(graph, 4, 12), 0)
        most = 0
        for node in dict.fromkeys(n.args[0] for n in linears(graph)):
            assert isinstance(node, fx.Node)
            for value in windows.advance(node):
                del value
            most = max(most, spill.used)
        assert 0 < spill.used <= most
        del windows
        assert spill.used == 0
    assert not list(tmp_path.iterdir())


def test_too_little_memory_says_how_much_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = captured("llama", torch.float32)
    monkeypatch.setattr(ondisk, "resident", lambda: 10**9)
    with (
        spilling(tmp_path, memory=10**9 - 1),
        pytest.raises(PassError, match=r"gptq of .* needs about 0.0 GB of memory, found 0.0 GB left: raise"),
    ):
        apply_passes(graph, GPTQ, calibration=tokens_for(graph, 4, 12))


def test_results_go_to_the_folder(tmp_path: Path, anything_is_large: None) -> None:
    graph = captured("llama", torch.float32)
    tokens = tokens_for(graph, 4, 12)
    with spilling(tmp_path):
        found = apply_passes(graph, GPTQ[:1], calibration=tokens)
        integers = [v for n, v in parameters(found).items() if n.endswith("_q")]
        assert integers and all(map(is_on_disk, integers))
        assert torch.equal(run(found, tokens), run(apply_passes(graph, GPTQ[:1], calibration=tokens), tokens))


def test_the_outermost_folder_counts(tmp_path: Path, anything_is_large: None) -> None:
    with spilling(tmp_path / "outer", memory=5) as outer, spilling(tmp_path / "inner") as inner:
        assert inner is outer and is_on_disk(kept(torch.ones(3)))
    assert (tmp_path / "outer").is_dir() and not (tmp_path / "inner").exists()


# A work folder.

PROGRAM = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from helpers import captured, tokens_for
from test_work import GPTQ, bytes_of
from rolora_passes import apply_passes
from rolora_passes.passes.base import Calibration
def tell(name, done, total):
    print(done, flush=True)
    if done == {stop}:
        sys.stdin.read()
graph = captured("llama", torch.float32)
apply_passes(graph, GPTQ, calibration=Calibration(tokens_for(graph, 4, 12), Path({work!r}), tell))
"""


def started(work: Path, stop: int) -> subprocess.Popen[str]:
    """A process that rounds until a step, and waits there."""
    program = PROGRAM.format(tests=str(Path(__file__).parent), work=str(work), stop=stop)
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == str(stop):
            return process
    raise AssertionError("it ended before")


def test_a_run_that_is_killed_goes_on_to_the_same_bytes_and_a_second_is_kept_out(tmp_path: Path) -> None:
    graph = captured("llama", torch.float32)
    tokens, work = tokens_for(graph, 4, 12), tmp_path / "work"
    expected = apply_passes(graph, GPTQ, calibration=tokens)
    process = started(work, 5 * 4 + 2)
    try:
        with pytest.raises(
            WorkError, match=rf"another process \({process.pid} on .*\) works in .*work: wait"
        ):
            apply_passes(graph, GPTQ, calibration=Calibration(tokens, work))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (work / ".gptq-cut.safetensors.12345678").write_bytes(b"half")
    assert len(list(work.glob("gptq-*"))) == 4 and (work / ".lock").exists()
    found = apply_passes(graph, GPTQ, calibration=Calibration(tokens, work))
    assert sum(stage["resumed"] for stage in history(found)[0].report.notes["stages"]) == 4
    assert bytes_of(found) == bytes_of(expected)
    assert not list(work.iterdir())


def test_a_folder_is_held_by_one(tmp_path: Path) -> None:
    with holding(tmp_path):
        with pytest.raises(WorkError, match=f"another process \\({os.getpid()} on"), holding(tmp_path):
            pass
        assert (tmp_path / ".lock").exists()
    with holding(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("999999 on elsewhere")
    with holding(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"{os.getpid()} on ")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    graph = captured("llama", torch.float32)
    data = Calibration(tokens_for(graph, 4, 12), tmp_path / "file" / "work")
    with pytest.raises(WorkError, match=r"cannot work in .*work: Not a directory; give a folder"):
        apply_passes(graph, GPTQ, calibration=data)


def test_a_full_disk_of_the_work_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = captured("llama", torch.float32)
    tokens, work = tokens_for(graph, 4, 12), tmp_path / "work"
    written: list[Path] = []
    from rolora_passes.quantize import work as module

    save = module.save_file

    def full(tensors: Any, file: Path, **rest: Any) -> None:
        written.append(file)
        if len(written) == 3:
            file.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(tensors, file, **rest)

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(
        WorkError, match=r"cannot keep finished stages in .*work: No space left .*; make room"
    ):
        apply_passes(graph, GPTQ, calibration=Calibration(tokens, work))
    assert len(list(work.iterdir())) == 2
    found = apply_passes(graph, GPTQ, calibration=Calibration(tokens, work))
    assert bytes_of(found) == bytes_of(apply_passes(graph, GPTQ, calibration=tokens))


# The spill folder.


def test_a_full_disk_of_the_spill_folder(
    tmp_path: Path, anything_is_large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def __enter__(self) -> Full:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def write(self, data: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ondisk, "_unnamed", lambda folder: Full())
    graph = captured("llama", torch.float32)
    with (
        spilling(tmp_path),
        pytest.raises(
            SpillError, match=r"cannot write weights to .*: No space left .*; give a folder .*--spill"
        ),
    ):
        apply_passes(graph, GPTQ, calibration=tokens_for(graph, 4, 12))


def test_a_limit_of_the_spill_folder(tmp_path: Path, anything_is_large: None) -> None:
    graph = captured("llama", torch.float32)
    with (
        spilling(tmp_path, limit=1000),
        pytest.raises(SpillError, match=r"expected at most 1e-06 GB of weights in .* \(--spill-limit\)"),
    ):
        apply_passes(graph, GPTQ, calibration=tokens_for(graph, 4, 12))
    assert not list(tmp_path.iterdir())


def test_a_spill_folder_that_cannot_be_made(tmp_path: Path, anything_is_large: None) -> None:
    (tmp_path / "file").write_text("")
    with (
        spilling(tmp_path / "file" / "spill"),
        pytest.raises(SpillError, match="Not a directory; give a folder"),
    ):
        Growing((2,), torch.float32)


# Files of weights.


@pytest.mark.skipif(sys.platform == "win32", reason="a file that is mapped cannot be cut there")
def test_a_file_that_is_cut_after_it_was_opened_is_named(tmp_path: Path) -> None:
    file, graph = tmp_path / "model.safetensors", copy_graph(captured("llama", torch.float32))
    name, value = next((n, v) for n, v in parameters(graph).items() if v.dim() == 2)
    file.write_bytes(value.detach().numpy().tobytes())
    mapped = torch.from_file(str(file), size=value.numel(), dtype=value.dtype).view(value.shape)
    set_tensor(graph, name, on_disk(mapped, file))
    tokens = tokens_for(graph, 2)
    whole = run(graph, tokens)
    file.rename(tmp_path / "moved")  # it is there for who has it open
    assert torch.equal(run(graph, tokens), whole)
    (tmp_path / "moved").rename(file)
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(
        SourceError, match=rf"expected .*model.safetensors as it was .*, {value.nbytes} bytes, found"
    ):
        run(graph, tokens)
