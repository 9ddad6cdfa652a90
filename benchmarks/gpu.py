"""What a GPU gives, beside the CPU in the same run; where there is none, it says so.

    python benchmarks/gpu.py [--device cuda] [--layers 2] [--seconds 280]

The model has Llama-3.2-1B's shapes, few layers and random weights. A row is a step on the GPU and then on
the CPU; after the seconds given it stops where it is. `fast_hadamard_transform` is measured where it is
installed.
"""

from __future__ import annotations

import argparse
import gc
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from rolora_passes import Calibration, apply_passes
from rolora_passes.errors import DeviceError
from rolora_passes.graphs import capture, computing_on, run
from rolora_passes.graphs.devices import find_device
from rolora_passes.numerics import cuda_hadamard, hadamard

SIZES = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
VOCABULARY, LENGTH, STEPS, ROWS = 32_000, 512, 3, 8192
EXACT = ["fuse-norm", "rotate", "insert-hadamard", "fold-constants"]
GPTQ: list[Any] = ["fuse-norm", {"quantize-weights": {"method": "gptq", "head": None}}]
LEARNED: list[Any] = [
    "fuse-norm",
    "rotate",
    {"learn-rotation": {"steps": STEPS, "batch": 2, "under": "W4A8", "loss": "cross-entropy"}},
]


def measure(name: str, function: Callable[[torch.device], object], gpu: torch.device) -> None:
    """A row: seconds of a function on both devices, and the peak of the GPU's memory.

    Args:
        function: is given the device to compute on.
    """
    fast, peak = cost(function, gpu)
    slow, _ = cost(function, torch.device("cpu"))
    print(f"{name:<46}{slow:>10.2f}{fast:>10.3f}{slow / fast:>7.0f}x{peak:>14.0f}", flush=True)


def cost(function: Callable[[torch.device], object], device: torch.device) -> tuple[float, float]:
    """Seconds of a call, and the peak of a GPU's memory in MB, 0 where torch does not say."""
    gc.collect()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    function(device)
    synchronize(device)
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated(device) / 1e6 if cuda else 0.0


def synchronize(device: torch.device) -> None:
    """Wait until a device has computed all that it was given."""
    if device.type in ("cuda", "mps", "xpu"):
        torch.accelerator.synchronize(device)


def model(layers: int) -> Any:
    """A random llama of 1B's shapes, float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES, vocab_size=VOCABULARY, num_hidden_layers=layers, tie_word_embeddings=False, head_dim=64
    )
    return LlamaForCausalLM(config).eval()


def transforms(gpu: torch.device) -> None:
    """GB/s of the transform, read and written, with and without the kernel."""
    x, serves = torch.randn(ROWS, 8192).to(gpu), cuda_hadamard.serves
    for order in (8192, 2048):
        for name in ("our own", "fast_hadamard_transform"):
            if name != "our own" and cuda_hadamard._kernel() is None:
                print(f"transform of order {order}, {name}: not installed")
                continue
            cuda_hadamard.serves = serves if name != "our own" else lambda *_: False
            hadamard.transform(x, order)
            synchronize(gpu)
            start = time.perf_counter()
            for _ in range(10):
                hadamard.transform(x, order)
            synchronize(gpu)
            speed = 20 * x.nbytes / (time.perf_counter() - start) / 1e9
            print(f"transform of order {order}, {name}: {speed:.0f} GB/s", flush=True)
    cuda_hadamard.serves = serves


def steps(graph: fx.GraphModule, passes: list[Any], windows: int) -> Callable[[torch.device], object]:
    """Passes over a graph of the CPU, on a device."""
    tokens = torch.randint(0, VOCABULARY, (windows, LENGTH), generator=torch.Generator().manual_seed(0))
    return lambda device: apply_passes(
        graph, passes, calibration=Calibration(tokens), device=device, verify=False
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", help="the GPU (default: auto, the best there is)")
    parser.add_argument("--layers", type=int, default=2, help="decoder layers of the model (default: 2)")
    parser.add_argument("--seconds", type=float, default=280, help="stop after these (default: 280)")
    options = parser.parse_args()
    try:
        gpu = find_device(options.device)
    except DeviceError as error:
        print(f"nothing to measure: {error}")
        return
    if gpu.type == "cpu":
        print("nothing to measure: torch has no GPU here; on a CPU see hadamard.py, passes.py and gptq.py")
        return
    with at_most(options.seconds):
        compare(gpu, options.layers)


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Stop what takes longer."""

    def stop(*_: Any) -> None:
        sys.exit(f"stopped: {seconds:.0f} s are spent")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def compare(gpu: torch.device, layers: int) -> None:
    """Print the rows."""
    name = torch.cuda.get_device_name(gpu) if gpu.type == "cuda" else str(gpu)
    print(f"torch {torch.__version__}, {name}, {torch.get_num_threads()} threads")
    print(f"1B's shapes, {layers} layers, {VOCABULARY} tokens, float32")
    transforms(gpu)
    print(f"{'step':<46}{'CPU, s':>10}{'GPU, s':>10}{'ratio':>8}{'GPU peak, MB':>14}", flush=True)
    llama = model(layers)
    measure("capture, with its check", lambda device: capture(llama.to(device)), gpu)
    graph = capture(llama.to("cpu"))

    def forward(device: torch.device) -> None:
        with computing_on(device):
            run(graph, torch.ones(1, LENGTH, dtype=torch.int64))

    measure(f"forward of {LENGTH} tokens, with weights that travel", forward, gpu)
    measure("fuse, rotate, Hadamards, fold", steps(graph, EXACT, 1), gpu)
    measure(f"rotations learned, {STEPS} steps of 2 x {LENGTH}", steps(graph, LEARNED, 2), gpu)
    measure(f"GPTQ on 4 windows of {LENGTH}", steps(graph, GPTQ, 4), gpu)


if __name__ == "__main__":
    main()
