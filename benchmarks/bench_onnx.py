"""Measure ONNX language models on onnxruntime-genai beside each other, ExecuTorch programs and llama.cpp.

    python benchmarks/bench_onnx.py builder=DIR ours=DIR pte=DIR llama=model.gguf --threads 1 --rounds 5

What a path is decides the runtime: a folder with `genai_config.json` is run by onnxruntime-genai, a
`.pte` (or a folder with `model.pte` and no `genai_config.json`) by ExecuTorch as in `bench_executorch.py`,
a `.gguf` by llama.cpp's Python binding (`peer_llamacpp.py` says how to install it). Only the runtimes'
own calls are timed; genai's decode call includes its choice of the next token, which the others leave
to us, outside the time. Caches hold 512 tokens, in float16 in llama.cpp (its default). Sizes are of what
is needed to run, without the tokenizer, which a `.gguf` contains (2 MB). How rounds are made and what the
table says: see `rounds.py`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import os
from collections.abc import Sequence
from importlib import util
from pathlib import Path
from typing import Any

import bench_executorch
from rounds import (
    Generate,
    Measure,
    Result,
    Stopwatch,
    Times,
    Workload,
    add_options,
    report_speed,
    timed,
    write_json,
)

# Inside a worker process


def measure_genai(folder: str, workload: Workload) -> Result:
    """Load a folder with onnxruntime-genai and time it. Runs in a fresh process."""
    import numpy as np
    import onnxruntime_genai as og

    def load() -> Generate:
        config = og.Config(folder)
        if workload.threads is not None:
            session = {"intra_op_num_threads": workload.threads}
            config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        model = og.Model(config)

        return lambda prompt, count: generate_genai(
            og, model, np.array(prompt, np.int32), count, workload.context
        )

    result = timed(load, workload)
    # genai does not say how many threads it has.
    return {**result, "file_mb": genai_bytes(Path(folder)) / 1e6, "threads": result["busy_threads"]}


def genai_bytes(folder: Path) -> int:
    """The size of what genai reads to run, tokenizer apart: configuration, graph, the graph's data."""
    import onnx
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    config = folder / "genai_config.json"
    graph = folder / json.loads(config.read_text())["model"]["decoder"]["filename"]
    tensors = onnx.load(graph, load_external_data=False).graph.initializer
    data = {graph.parent / ExternalDataInfo(t).location for t in tensors if uses_external_data(t)}
    return sum(file.stat().st_size for file in {config, graph, *data})


def generate_genai(og: Any, model: Any, prompt: Any, count: int, context: int) -> tuple[list[int], Times]:
    """Prefill the prompt, int32 [S], and decode `count` tokens greedily."""
    parameters = og.GeneratorParams(model)
    # The least length is the greatest, so that no end-of-text token stops it.
    parameters.set_search_options(do_sample=False, min_length=context, max_length=context)
    generator, call = og.Generator(model, parameters), Stopwatch()
    call(generator.append_tokens, prompt)
    generator.generate_next_token()  # only takes the prompt's token: the model runs in the calls after it
    for _ in range(count):
        call(generator.generate_next_token)
    return list(generator.get_sequence(0)[len(prompt) :]), call.times


def measure_llamacpp(path: str, workload: Workload) -> Result:
    """Load a `.gguf` with llama.cpp and time it. Runs in a fresh process."""
    import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # the binding's; it prints all it does
    context: Any = None

    def load() -> Generate:
        nonlocal context
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = workload.context
        if workload.threads is not None:
            options.n_threads = options.n_threads_batch = workload.threads
        context = llama_cpp.llama_init_from_model(model, options)
        if not context:
            raise RuntimeError(f"llama.cpp does not load {path}")
        return lambda prompt, count: generate_llamacpp(llama_cpp, model, context, prompt, count)

    result = timed(load, workload)
    threads = llama_cpp.llama_n_threads(context)
    return {**result, "file_mb": os.path.getsize(path) / 1e6, "threads": threads}


def generate_llamacpp(
    llama: Any, model: Any, context: Any, prompt: Sequence[int], count: int
) -> tuple[list[int], Times]:
    """Prefill the prompt and decode `count` tokens greedily, with an emptied cache."""
    import numpy as np

    llama.llama_memory_clear(llama.llama_get_memory(context), True)
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    call = Stopwatch()

    def step(tokens: Sequence[int]) -> int:
        array = (ctypes.c_int32 * len(tokens))(*tokens)  # the batch points to it
        batch = llama.llama_batch_get_one(array, len(tokens))
        failed = call(llama.llama_decode, context, batch)
        if failed:
            raise RuntimeError(f"llama_decode returned {failed}")
        logits = llama.llama_get_logits_ith(context, -1)
        return int(np.ctypeslib.as_array(logits, (vocabulary,)).argmax())

    tokens = [step(prompt)]
    for _ in range(count):
        tokens.append(step(tokens[-1:]))
    return tokens, call.times


# In the parent process


def program_at(path: Path) -> tuple[Measure, Path]:
    """How what lies there is measured, and what is handed to it."""
    if (path / "genai_config.json").is_file():
        return measure_genai, path
    if (path / "model.pte").is_file():
        return bench_executorch.measure, path / "model.pte"
    if path.suffix == ".pte" and path.is_file():
        return bench_executorch.measure, path
    if path.suffix == ".gguf" and path.is_file():
        if util.find_spec("llama_cpp") is None:
            raise argparse.ArgumentTypeError(
                f"{path} needs llama_cpp: peer_llamacpp.py says how to install it"
            )
        return measure_llamacpp, path
    raise argparse.ArgumentTypeError(
        f"expected a folder with genai_config.json or model.pte, a .pte or a .gguf, not {path}"
    )


def named_program(argument: str) -> tuple[str, Path, Measure]:
    """Parse `NAME=PATH`."""
    name, separator, path = argument.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"expected NAME=PATH, not {argument!r}")
    measure, found = program_at(Path(path))
    return name, found, measure


def find_tokenizer(paths: Sequence[Path]) -> str | None:
    """The first `tokenizer.json` in or beside what is measured; they all must read the same tokens."""
    folders = [path if path.is_dir() else path.parent for path in paths]
    return next((str(f / "tokenizer.json") for f in folders if (f / "tokenizer.json").is_file()), None)


def main() -> None:
    """Measure the programs on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("programs", nargs="+", type=named_program, metavar="NAME=PATH")
    add_options(parser)
    options = parser.parse_args()
    programs = {name: (measure, str(path)) for name, path, measure in options.programs}
    tokenizer = find_tokenizer([path for _, path, _ in options.programs])
    write_json(options.json, report_speed(programs, options, tokenizer))


if __name__ == "__main__":
    main()
