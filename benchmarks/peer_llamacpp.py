"""Make llama.cpp's baseline: the packaged SmolLM2-135M-Instruct in Q4_0, through llama.cpp's own quantizer.

Q4_0 is int4 in symmetric groups of 32, and llama.cpp multiplies it by int8 activations. Embedding and head,
which are one table, are Q4_0 too, as in what it is compared with; llama.cpp's own choice (`--keep-head`) for
this model is 8 bits.

    python benchmarks/peer_llamacpp.py -o FILE.gguf [--keep-head]

It needs llama.cpp's Python binding, which comes as source and is built (half an hour with one job) for the
machine's own instructions:

    CMAKE_ARGS="-DGGML_NATIVE=ON -DGGML_BLAS=OFF -DLLAVA_BUILD=OFF" \\
        pip install -c constraints.txt --no-binary llama-cpp-python llama-cpp-python==0.3.36
"""

from __future__ import annotations

import argparse
import ctypes
from pathlib import Path

import common  # noqa: F401  puts the examples on the path
from packaged_model import packaged_model

from rolora_passes.files import writing


def quantize(source: Path, target: Path, keep_head: bool) -> None:
    """Write `source`, a `.gguf`, in Q4_0."""
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    options.allow_requantize = True  # the packaged file is Q4_1
    options.pure = not keep_head
    with writing(target) as path:
        failed = llama_cpp.llama_model_quantize(
            str(source).encode(), str(path).encode(), ctypes.byref(options)
        )
        if failed:
            raise SystemExit(f"llama.cpp does not quantize {source}: error {failed}")


def main() -> None:
    """Make the file, and print its size."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, required=True, help="file to write")
    parser.add_argument("--keep-head", action="store_true", help="let llama.cpp choose the head's type")
    options = parser.parse_args()
    quantize(packaged_model(), options.out, options.keep_head)
    print(f"file_mb {options.out.stat().st_size / 1e6:.1f}")


if __name__ == "__main__":
    main()
