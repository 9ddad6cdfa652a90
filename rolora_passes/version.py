"""The version, alone, so that reading it imports nothing."""

__version__ = "0.2.0"


def versions() -> dict[str, str]:
    """The versions that travel with everything written: Python's, ours, and of what we stand on."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "rolora-passes": __version__}
    runtimes = ("executorch", "torchao", "onnx-ir", "onnxruntime", "onnxruntime-genai")
    for name in ("torch", "transformers", "tokenizers", *runtimes, "lm-eval", "datasets"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
