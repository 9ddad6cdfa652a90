"""A recipe's passes on a checkpoint of a real size: seconds and peak memory of each, and what came out.

python benchmarks/real_sizes.py MODEL --recipe rotated-gptq-8da4w --windows 16 --length 512 --spill FOLDER
"""

from __future__ import annotations

import argparse
import hashlib
import time
from pathlib import Path

import torch
from torch import fx

from rolora_passes import history
from rolora_passes.cli.parser import byte_size
from rolora_passes.graphs.graph import parameters
from rolora_passes.graphs.info import Record, info
from rolora_passes.memory import peak_mb
from rolora_passes.ondisk import rest, spilling
from rolora_passes.passes.base import Calibration
from rolora_passes.passes.manager import apply_passes
from rolora_passes.recipes.opening import open_source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of a checkpoint")
    parser.add_argument("--recipe", default="rotated-gptq-8da4w")
    parser.add_argument("--windows", type=int, default=16, help="of random tokens")
    parser.add_argument("--length", type=int, default=512, help="tokens in a window")
    parser.add_argument("--spill", type=Path, required=True, help="folder for weights that passes make")
    parser.add_argument("--memory", type=byte_size, help="bound of what the process takes, such as 8GB")
    parser.add_argument("--work", type=Path, help="keep finished stages there, and go on from them")
    parser.add_argument("--no-verify", action="store_true")
    options = parser.parse_args()
    clock = [time.process_time()]

    def tell(record: Record) -> None:
        clock.append(time.process_time())
        wall, cpu = record.seconds + record.verify_seconds, clock[-1] - clock[-2]
        print(f"{record.name:22}{wall:9.1f} s {cpu:9.1f} CPU-s {peak_mb() / 1e3:7.2f} GB", flush=True)

    start = time.perf_counter()
    with spilling(options.spill, memory=options.memory):
        opened = open_source(options.model, options.recipe, calibration=Calibration(torch.empty(0)))
        vocabulary = info(opened.graph).config["vocab_size"]
        random = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, vocabulary, (options.windows, options.length), generator=random)
        clock.append(time.process_time())
        graph = apply_passes(
            opened.graph,
            opened.passes,
            verify=not options.no_verify,
            calibration=Calibration(tokens, options.work),
            on_pass=tell,
        )
        report(graph)
    print(
        f"whole: {time.perf_counter() - start:.1f} s, {time.process_time():.1f} CPU-s, "
        f"{peak_mb() / 1e3:.2f} GB, {torch.get_num_threads()} threads"
    )


def report(graph: fx.GraphModule) -> None:
    """GPTQ's parts, and one hash of all parameters."""
    for record in history(graph):
        if stages := record.report.notes.get("stages"):
            forward, solve = (sum(stage[k] for stage in stages) for k in ("forward", "solve"))
            resumed = sum(stage["resumed"] for stage in stages)
            print(f"GPTQ: forward {forward:.1f} s, solve {solve:.1f} s, {resumed} of {len(stages)} resumed")
    digest = hashlib.sha256()
    for name, value in sorted(parameters(graph).items()):
        digest.update(name.encode())
        digest.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().data)
        rest(value)
    print(f"parameters: {digest.hexdigest()[:16]}")


if __name__ == "__main__":
    main()
