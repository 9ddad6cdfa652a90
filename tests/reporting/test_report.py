"""What a report holds is what was measured, and the page needs nothing but itself."""

from __future__ import annotations

import base64
import gzip
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import captured, tokens_for
from tiny_checkpoint import TEXT, save_checkpoint
from torch import Tensor

from rolora_passes import (
    ObserveActivations,
    QuantizeActivations,
    QuantizeKVCache,
    QuantizeWeights,
    apply_passes,
)
from rolora_passes.cli import main
from rolora_passes.debugging import track_errors, with_float_twin
from rolora_passes.errors import MissingExtraError
from rolora_passes.graphs.accounting import weigh
from rolora_passes.graphs.evaluate import compute
from rolora_passes.graphs.graph import is_op, linears, site_names
from rolora_passes.graphs.running import values
from rolora_passes.recipes import load_recipe
from rolora_passes.reporting import gather, write_page
from rolora_passes.reporting.activations import activation_sites, measure
from rolora_passes.reporting.arrays import Arrays, bounds
from rolora_passes.reporting.errors import layer_kl
from rolora_passes.reporting.page import SCRIPTS
from rolora_passes.reporting.structure import sizes

KINDS = {f"{kind} input" for kind in ("attention", "output projection", "MLP", "down projection", "head")}
ROTATED, PLAIN = "quarot-rtn:W4A4KV4", "rtn:W4A8"
PAGE = Path(sys.modules["rolora_passes.reporting"].__path__[0]) / "page"


@pytest.fixture(scope="module")
def report() -> tuple[dict[str, Any], Arrays]:
    graph = captured("llama", torch.float32)
    return gather(graph, load_recipe(ROTATED), tokens_for(graph, 1, 40))


def decoded(entry: dict[str, Any], arrays: Arrays) -> Tensor:
    """An array as the page's script reads it."""
    size = torch.Size(entry["shape"]).numel()
    codes = torch.frombuffer(bytearray(bytes(arrays)), dtype=torch.uint8)[entry["at"] :][:size].double() / 255
    low, high = entry["low"], entry["high"]
    found = low * (high / low) ** codes if entry["log"] else low + codes * (high - low)
    return found.reshape(entry["shape"])


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi", "gemma2", "olmo2", "gpt_neox", "qwen3"])
def test_every_linear_reads_a_site_of_one_of_five_kinds(name: str) -> None:
    graph = captured(name)
    sites, names = activation_sites(graph), site_names(graph)
    readers = [r for s in sites.values() if not s.kind.startswith("residual") for r in s.readers]
    assert sorted(readers) == sorted(names.values())
    kinds = {site.kind for site in sites.values() if not site.kind.startswith("residual")}
    assert kinds == KINDS - (
        {"MLP input"} if name == "phi" else set()
    )  # its attention and MLP read one value
    assert len({(site.kind, site.layer, site.number) for site in sites.values()}) == len(sites)
    streams = [site for site in sites.values() if site.kind.startswith("residual")]
    norms = {n.args[0] for n in graph.graph.nodes if is_op(n, "rms_norm", "layer_norm")}
    assert len(streams) == {"olmo2": 1, "qwen3": 5, "gemma2": 5}.get(name, len(norms))
    for node, site in sites.items():
        assert site.layer is None if "head" in site.kind else site.layer in (0, 1)
        assert not site.kind.startswith("down") or not is_op(node, "attention", "linear")


def test_figures_are_those_of_the_values(report: tuple[dict[str, Any], Arrays]) -> None:
    data, arrays = report
    graph = captured("llama", torch.float32)
    tokens = tokens_for(graph, 1, 40)
    node = next(n for n, s in activation_sites(graph).items() if s.kind.startswith("down") and s.layer == 1)
    x = next(v for n, v in values(graph, tokens) if n is node)[0].double()
    entry = next(e for e in data["activations"] if e["kind"].startswith("down") and e["layer"] == 1)
    centred = x[1:] - x[1:].mean(-1, keepdim=True)
    assert entry["before"]["kurtosis"] == pytest.approx(
        float((centred**4).mean() / (centred**2).mean() ** 2), rel=1e-4
    )
    peaks = x[1:].abs().amax(-1) / x[1:].abs().median(-1).values
    assert entry["before"]["peak"] == pytest.approx(float(peaks.median()), rel=1e-4)
    assert entry["before"]["first"] == pytest.approx(float(x[0].abs().max()), rel=1e-5)
    assert entry["channels"] == x.shape[-1] and entry["readers"] == ("model.layers.1.mlp.down_proj",)
    found, scale = decoded(entry["before"]["surface"], arrays), entry["before"]["surface"]
    assert found.shape == x[1:].shape  # small enough to be shown as it is
    step = (scale["high"] / scale["low"]) ** (1 / 255)
    ratio = found / x[1:].abs().clamp(scale["low"], scale["high"])
    assert float(ratio.max()) < step and float(ratio.min()) > 1 / step
    largest = decoded(entry["before"]["channel_max"], arrays)
    assert torch.allclose(largest, x[1:].abs().amax(0), rtol=0.05)
    for part in ("surface", "channel_max", "channel_kurtosis"):
        assert {k: entry["before"][part][k] for k in ("low", "high")} == {
            k: entry["after"][part][k] for k in ("low", "high")
        }, "before and after share a scale"


def test_many_channels_are_pooled_and_pictures_stay_small() -> None:
    graph = captured("llama", torch.float32)
    (site, found), *_ = measure(graph, tokens_for(graph, 1, 40), 8).items()
    assert found.surface.shape == (8, found.channels) and site.layer == 0
    low, high = bounds(torch.tensor([0.0, 1.0, 2.0, float("inf")]))
    assert (low, high) == (2e-4, 2.0)
    assert bounds(torch.zeros(3)) == (1e-4, 1.0)


def test_rotation_takes_the_outliers_away() -> None:
    """A planted outlier channel is seen before, and is gone after."""
    from rolora_passes.graphs.graph import copy_graph, get_tensor, set_tensor

    graph = copy_graph(captured("llama", torch.float32))
    table = get_tensor(graph, "model.embed_tokens.weight").clone()
    table[:, 3] *= 100
    set_tensor(graph, "model.embed_tokens.weight", table)
    data, arrays = gather(graph, load_recipe(ROTATED), tokens_for(graph, 1, 40))
    entry = data["activations"][0]
    assert entry["kind"] == "residual stream, before attention" and entry["layer"] == 0
    assert int(decoded(entry["before"]["channel_max"], arrays).argmax()) == 3
    assert entry["before"]["kurtosis"] > 3 * entry["after"]["kurtosis"]
    row = next(row for row in data["headline"] if row["kind"] == entry["kind"])
    assert row["before"]["worst"] > 3 * row["after"]["worst"] and row["sites"] == 2


def test_what_moves_nothing_has_one_state() -> None:
    graph = captured("llama", torch.float32)
    data, _ = gather(graph, load_recipe(PLAIN), tokens_for(graph, 1, 12))
    assert all("after" not in entry for entry in data["activations"] + data["headline"])
    assert data["errors"] and len(data["weights"]) == 14 and len(data["quantizers"]) == 8
    exact, _ = gather(graph, load_recipe("float"), tokens_for(graph, 1, 12))
    assert exact["errors"] is None and not exact["weights"] and not exact["quantizers"]


def test_errors_by_layer_end_in_those_of_the_model(report: tuple[dict[str, Any], Arrays]) -> None:
    graph = captured("llama", torch.float32)
    tokens = tokens_for(graph, 1, 40)
    twin, quantized = with_float_twin(graph, load_recipe(ROTATED))
    trace = track_errors(quantized, twin, tokens)
    found = report[0]["errors"]
    assert found["kl"] == pytest.approx(trace.kl) and trace.kl > 1e-4
    assert [row["layer"] for row in found["lens"]] == [0, 1]
    assert found["lens"][-1]["kl"] == pytest.approx(trace.kl, rel=1e-4)
    assert layer_kl(twin, twin, tokens) == pytest.approx({0: 0.0, 1: 0.0}, abs=1e-6)
    series = {one["name"]: one for one in found["series"]}
    sqnr = {node.site: node.sqnr for node in trace.nodes if node.site}
    assert series["mlp.up_proj"]["sqnr"] == [
        pytest.approx(sqnr[f"model.layers.{i}.mlp.up_proj"]) for i in (0, 1)
    ]
    assert {"attention", "residual stream, sum 2 of the layer"} <= set(series)


def test_layers_are_read_off_where_the_head_needs_the_number_of_tokens() -> None:
    graph = captured("opt", torch.float32)
    tokens = tokens_for(graph, 1, 20)
    twin, quantized = with_float_twin(graph, load_recipe("rtn:W3A4"))
    expected = track_errors(quantized, twin, tokens).kl
    assert layer_kl(quantized, twin, tokens)[1] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("recipe", [ROTATED, "rtn:W2A8", "rtn:W8A16"])
def test_grids_are_what_values_are_rounded_to(recipe: str) -> None:
    graph = captured("llama", torch.float32)
    tokens = tokens_for(graph, 1, 12)
    passes = load_recipe(recipe.replace("W2A8", "W2A8G8"))
    data, arrays = gather(graph, passes, tokens)
    quantized = apply_passes(graph, passes)
    weights = {name: node.args[1] for node, name in site_names(quantized).items()}
    entry = next(e for e in data["weights"] if e["layer"] == 1 and e["name"].endswith("down_proj"))
    (rounded,) = compute(quantized, [weights[entry["name"]]])
    for sample in entry["samples"]:
        place = [int(number) for number in re.findall(r"\d+", sample["where"])]
        row = rounded[place[0]]
        group = row.unflatten(0, (-1, entry["group"]))[place[1]] if len(place) > 1 else row
        levels = sample["levels"]
        grid = torch.linspace(levels["first"], levels["last"], levels["count"])
        assert float((group[:, None] - grid).abs().min(1).values.max()) < 1e-4 * float(grid.abs().max())
        assert levels["count"] >= 2 ** entry["bits"] - 1
        counts = decoded(sample["counts"], arrays)
        assert float(counts.sum()) == pytest.approx(entry["group"], rel=0.02)
    errors = [sample["error"] for sample in entry["samples"]]
    assert errors == sorted(errors, reverse=True)
    kinds = {quantizer["name"] for quantizer in data["quantizers"]}
    cache = {"keys", "values"} if "KV4" in recipe else set()
    assert kinds == (set() if "A16" in recipe else (KINDS - {"head input"}) | cache)


def test_codebooks_and_static_grids() -> None:
    """NormalFloat's levels are not evenly spaced; a static quantizer has one grid for all tokens."""
    graph = captured("llama", torch.float32)
    tokens = tokens_for(graph, 1, 12)
    recipe = [
        QuantizeWeights(4, 8, grid="nf"),
        ObserveActivations(),
        QuantizeActivations(8, static=True),
        QuantizeKVCache(per="token"),
    ]
    data, _ = gather(graph, recipe, tokens, calibration=tokens_for(graph))
    levels = data["weights"][0]["samples"][0]["levels"]
    assert len(levels) == 16 and 0.0 in levels and levels == sorted(levels)
    samples = next(q for q in data["quantizers"] if q["name"] == "MLP input")["samples"]
    assert samples[0]["levels"] == samples[1]["levels"] and samples[0]["levels"]["count"] == 256
    assert next(q for q in data["quantizers"] if q["name"] == "keys")["group"] == 16


def test_sizes_bases_and_passes(report: tuple[dict[str, Any], Arrays]) -> None:
    data, _ = report
    quantized = apply_passes(captured("llama", torch.float32), load_recipe(ROTATED))
    assert sum(s["mb"] for s in data["sizes"]["sites"]) == pytest.approx(weigh(quantized).megabytes, rel=0.01)
    assert len(data["sizes"]["sites"]) == len(linears(quantized)) + 1
    bits = {site["name"]: (site["bits"], site["reads"]) for site in data["sizes"]["sites"]}
    assert bits["model.layers.0.mlp.up_proj"] == (4, 4) and bits["lm_head"] == (32, None)
    classes = {one["name"]: (i, one) for i, one in enumerate(data["bases"]["classes"])}
    place, residual = classes["residual"]
    assert residual["free"] and residual["turned"] == "hadamard" and residual["blocked"] is None
    rows = {row["name"]: row for row in data["bases"]["rows"]}
    up = rows["model.layers.*.mlp.up_proj.weight"]
    assert up["count"] == 2 and up["cells"][place] == ["axis 1 reads"]
    turning, query = classes["query-key, 2 alike"]
    assert "rotary" in query["blocked"] and not query["free"] and query["turned"] is None
    assert rows["model.layers.*.self_attn.q_proj.weight"]["cells"][turning] == ["axis 0 as 4x8 writes"]
    names = [step["name"] for step in data["pipeline"]]
    assert names[:3] == ["fuse-norm", "rotate", "insert-hadamard"] and names[-1] == "quantize-kv-cache"
    left = data["pipeline"][4]["left"]
    table = "a table that an embedding reads: quantize-embedding rounds it"
    assert left == [
        {"reason": "left in floating point by the options", "count": 1, "sites": ["lm_head"]},
        {"reason": table, "count": 1, "sites": ["model.embed_tokens.weight"]},
    ]


def test_a_tied_table_counts_once() -> None:
    graph = captured("llama-tied", torch.float32)
    found = sizes(graph)
    assert sum(site["mb"] for site in found["sites"]) == pytest.approx(found["megabytes"], rel=0.05)
    assert len(found["sites"]) == 15


ABOUT: dict[str, Any] = {
    "model": "</title><script>alert(1)</script>&.gguf", "recipe": ROTATED, "yaml": "passes: []", "seed": 3,
    "text": "a text.txt", "beginning": "</script><b>x", "tokens": 40, "versions": {"torch": "2"},
    "seconds": 1.0,
}  # fmt: skip


def test_page_is_whole_and_holds_the_data(report: tuple[dict[str, Any], Arrays], tmp_path: Path) -> None:
    data, arrays = report
    write_page(data | {"about": ABOUT}, arrays, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    for section in ("outliers", "errors", "grids", "bases", "pipeline", "sizes", "about"):
        assert f'<section id="{section}">' in text
    islands = dict(re.findall(r'<script type="text/plain" id="(\w+)">([\w+/=]*)</script>', text))
    unpacked = {name: gzip.decompress(base64.b64decode(packed)) for name, packed in islands.items()}
    assert set(islands) == {"data", "arrays", "library"}
    assert unpacked["arrays"] == bytes(arrays) and b"plotly.js" in unpacked["library"][:100]
    found = json.loads(unpacked["data"])
    assert found["about"] == ABOUT
    assert found["activations"][0]["before"]["kurtosis"] == data["activations"][0]["before"]["kurtosis"]
    assert "alert(1)</script>" not in text and "&lt;/title&gt;&lt;script&gt;alert(1)" in text
    assert text.count("</script>") == 4 and "<b>x" not in text


def test_page_asks_for_nothing_from_elsewhere() -> None:
    files = ["page.html", "page.css", *(f"{name}.js" for name in SCRIPTS)]
    assert sorted(files) == sorted(path.name for path in PAGE.iterdir())
    for name in files:
        text = (PAGE / name).read_text()
        assert not re.search(r"https?:|//[\w.]+\.\w+/|@import|\bsrc=|url\(", text), name
    assert "default-src 'none'" in (PAGE / "page.html").read_text()


def test_plotly_is_an_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(MissingExtraError, match=r"rolora-passes\[report\]"):
        write_page({"about": ABOUT}, Arrays(), tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, text, page = (
        save_checkpoint(tmp_path / "tiny"),
        tmp_path / "words.txt",
        tmp_path / "out" / "page.html",
    )
    text.write_text(TEXT)
    known = ["inspect", str(model), "--html", str(page)]
    assert main([*known, "--recipe", "8da4w"]) == 2
    assert "give --recipe and --text" in capsys.readouterr().err
    asked = [*known, "--recipe", "8da4w", "--text", str(text)]
    assert main([*asked, "--bases"]) == 2 and "leave --bases out" in capsys.readouterr().err
    assert main([*asked, "--window", "4"]) == 2 and "at least 8 tokens" in capsys.readouterr().err
    assert not page.exists()
    assert main([*asked, "--seed", "2"]) == 0
    said = capsys.readouterr().err
    assert "quantize-weights" in said and "open it in a browser" in said
    packed = re.search(r'id="data">([\w+/=]*)<', page.read_text())
    assert packed
    about = json.loads(gzip.decompress(base64.b64decode(packed[1])))["about"]
    assert (about["model"], about["text"], about["seed"]) == ("tiny", "words.txt", 2)
    assert about["beginning"].startswith("The quick brown fox") and "quantize-weights" in about["yaml"]
    assert str(tmp_path) not in json.dumps(about), "names of folders are nobody's business"
