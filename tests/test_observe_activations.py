"""ObserveActivations sees what it says: ranges by hand, one pass over the windows, nothing changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import CONFIGS, chosen
from helpers import captured, count, difference, tokens_for
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from rolora_passes import FoldConstants, apply_passes, history
from rolora_passes.errors import PassError
from rolora_passes.graphs.evaluate import call
from rolora_passes.graphs.facts import facts
from rolora_passes.graphs.graph import finish, linears, parameters, set_tensor, site_names
from rolora_passes.graphs.info import set_info
from rolora_passes.graphs.running import values
from rolora_passes.graphs.text import graph_text
from rolora_passes.passes.base import Calibration, Report
from rolora_passes.passes.observe_activations import ObserveActivations
from rolora_passes.quantize import stages
from rolora_passes.quantize.observers import Histogram, MinMax, Observer, Percentile, observations

aten = torch.ops.aten
WINDOWS = torch.tensor([[0, 1], [2, 3]])
TABLE = torch.tensor([[1.0, -2, 3], [4, 5, -6], [-7, 8, 9], [0.5, 0.25, 0]], dtype=torch.float64)


def tiny(table: Tensor = TABLE) -> fx.GraphModule:
    """Two linears that read an embedding, and one that reads their sum: y = W3 (W1 x + W2 x)."""
    module = fx.GraphModule(torch.nn.Module(), fx.Graph())
    graph, width = module.graph, table.shape[1]
    eye = torch.eye(width, dtype=table.dtype)
    weights = {"table": table, "a.weight": eye, "b.weight": 2 * eye, "c.weight": eye}
    for name, value in weights.items():
        set_tensor(module, name, value)
    nodes = [graph.create_node("get_attr", name) for name in weights]
    numbers, _ = graph.placeholder("tokens"), graph.placeholder("positions")
    x = graph.call_function(aten.embedding.default, (nodes[0], numbers))
    a, b = (graph.call_function(aten.linear.default, (x, node)) for node in nodes[1:3])
    both = graph.call_function(aten.add.Tensor, (a, b))
    graph.output(graph.call_function(aten.linear.default, (both, nodes[3])))
    set_info(module, config={"vocab_size": len(table)})
    return finish(module)


def observe(graph: fx.GraphModule, windows: Tensor = WINDOWS, **options: object) -> fx.GraphModule:
    return apply_passes(graph, [ObserveActivations(**options)], calibration=windows)  # type: ignore[arg-type]


def ranges(graph: fx.GraphModule) -> dict[str, tuple[list[float], list[float]]]:
    return {node.name: (low.tolist(), high.tolist()) for node, (low, high) in observations(graph).items()}


def report_of(graph: fx.GraphModule) -> Report:
    return history(graph)[-1].report


# What is written.


def test_a_value_that_two_linears_read_has_one_observer() -> None:
    graph = observe(tiny())
    assert graph_text(graph).splitlines()[-8:] == [
        "embedding_default = embedding(table, tokens)",
        "observed_default = observed(embedding_default, a.input_low, a.input_high)",
        "linear_default = linear(observed_default, a.weight)",
        "linear_default_1 = linear(observed_default, b.weight)",
        "add_tensor = add(linear_default, linear_default_1)",
        "observed_default_1 = observed(add_tensor, c.input_low, c.input_high)",
        "linear_default_2 = linear(observed_default_1, c.weight)",
        "return linear_default_2",
    ]
    assert report_of(graph).changed == ["a", "b", "c"]
    assert "activations observed" in facts(graph)


def test_ranges_by_hand_per_tensor_and_per_channel() -> None:
    assert ranges(observe(tiny())) == {"embedding_default": ([-7], [9]), "add_tensor": ([-21], [27])}
    assert ranges(observe(tiny(), per="channel")) == {
        "embedding_default": ([-7, -2, -6], [4, 8, 9]),
        "add_tensor": ([-21, -6, -18], [12, 24, 27]),
    }


def test_only_what_was_seen_counts() -> None:
    assert ranges(observe(tiny(), WINDOWS[:1], targets="a")) == {"embedding_default": ([-6], [5])}


def test_percentiles_by_hand() -> None:
    expected = [sorted(column)[0] * 0.75 + sorted(column)[1] * 0.25 for column in TABLE.T.tolist()]
    found = ranges(observe(tiny(), per="channel", method="percentile", percentile=100 * (1 - 1 / 12)))
    assert found["embedding_default"][0] == pytest.approx(expected)


def test_a_histograms_range_loses_less_than_the_whole() -> None:
    table = torch.randn(400, 250, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 5
    windows = torch.arange(400).reshape(4, 100)

    def loss(method: str) -> float:
        low, high = (e[0] for e in ranges(observe(tiny(table), windows, method=method))["embedding_default"])
        assert low < 0 < high
        step = (high - low) / 255
        rounded = ((table - low) / step).round().clamp(0, 255) * step + low
        return float((rounded - table).square().mean())

    assert loss("histogram") < 0.9 * loss("minmax")


@pytest.mark.parametrize("name", chosen(CONFIGS))
def test_models_are_observed_and_keep_their_function(name: str) -> None:
    graph = captured(name)
    windows = tokens_for(graph, 3, 7)
    done = observe(graph, windows, per="channel")
    assert history(done)[-1].error == 0 and difference(done, graph) == 0
    names = site_names(graph)
    assert report_of(done).changed and set(report_of(done).changed) == set(names.values())
    inputs = {n.args[0] for n in linears(graph)}
    assert count(done, "observed") == len(inputs)
    seen = {node.name: ends for node, ends in observations(done).items()}
    for node, value in values(graph, windows):
        if node in inputs:
            rows = value.reshape(-1, value.shape[-1])
            low, high = seen[node.name]
            assert torch.allclose(low, rows.amin(0)) and torch.allclose(high, rows.amax(0))


def test_folding_keeps_observers() -> None:
    graph = apply_passes(observe(tiny(), per="channel"), [FoldConstants()])
    assert ranges(graph)["embedding_default"] == ([-7, -2, -6], [4, 8, 9])


def test_targets_and_what_is_left() -> None:
    graph = observe(tiny(), targets=("b",))
    assert report_of(graph).changed == ["b"]
    assert dict(report_of(graph).left) == dict.fromkeys("ac", "not observed by the options")
    assert count(graph, "observed") == 1
    more = observe(graph, targets=("b", "c"))
    assert report_of(more).changed == ["c"]
    assert dict(report_of(more).left)["b"] == "its input is observed already"
    again = observe(more, targets=("b", "c"))
    assert not report_of(again).modified and graph_text(again) == graph_text(more)


def test_ranges_of_half_precision_are_float32() -> None:
    graph = observe(tiny(TABLE.bfloat16()), method="percentile")
    kept = {n: p.dtype for n, p in parameters(graph).items() if "input" in n}
    assert set(kept.values()) == {torch.float32} and len(kept) == 4


# How the windows are run.


def test_progress_counts_windows_of_every_site_and_only_one_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[torch.Size] = []
    monkeypatch.setattr(MinMax, "see", lambda self, rows: (shapes.append(rows.shape), _see(self, rows))[1])
    progress: list[tuple[str, int, int]] = []
    calibration = Calibration(WINDOWS.repeat(3, 1), on_progress=lambda *step: progress.append(step))
    apply_passes(tiny(), [ObserveActivations(per="channel")], calibration=calibration)
    assert progress == [("observe-activations", i + 1, 12) for i in range(12)]
    assert shapes == [(2, 3)] * 12


_see = MinMax.see


def test_what_follows_the_last_observer_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []

    def recorded(node: fx.Node, *rest: Any) -> Any:
        computed.append(node.name)
        return call(node, *rest)

    monkeypatch.setattr(stages, "call", recorded)
    observe(tiny(), WINDOWS[:1], targets="a")
    assert computed[-1] == "embedding_default"


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per": "token"}, "per must be 'tensor' or 'channel', found 'token'"),
        ({"method": "max"}, "method must be 'minmax', 'percentile' or 'histogram', found 'max'"),
        ({"method": "histogram", "per": "channel"}, "'histogram' is per tensor"),
        ({"percentile": 50.0}, "more than 50 and at most 100, found 50"),
        ({"percentile": 100.5}, "found 100.5"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(PassError, match=message):
        ObserveActivations(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["minmax", "percentile", "histogram"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_names_the_site_and_the_window(method: str, bad: float) -> None:
    table = TABLE.clone()
    table[2, 1] = bad
    with pytest.raises(PassError, match="observe-activations: the input of a is NaN or infinite in window 1"):
        observe(tiny(table), method=method)


def test_what_was_never_seen_names_the_site() -> None:
    graph = tiny()
    (add,) = [n for n in graph.graph.nodes if n.name == "add_tensor"]
    with graph.graph.inserting_after(add):
        none = graph.graph.call_function(aten.slice.Tensor, (add, 1, 0, 0))
    add.replace_all_uses_with(none, delete_user_cb=lambda user: user is not none)
    graph.recompile()
    with pytest.raises(PassError, match="the input of c was empty in all 2 windows"):
        observe(graph)


def test_no_windows_and_no_match() -> None:
    with pytest.raises(PassError, match="looks at data and was given none"):
        apply_passes(tiny(), [ObserveActivations()])
    with pytest.raises(PassError, match="a was empty in all 0 windows"):
        ObserveActivations().calibrate(tiny(), Calibration(torch.zeros(0, 3, dtype=torch.int64)))
    with pytest.raises(PassError, match="no linear matches 'd'; there are a, b, c"):
        observe(tiny(), targets="d")


# The observers themselves.


def shown(observer: Observer, parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    for part in parts:
        observer.see(part)
    found = observer.range()
    assert found is not None
    return found


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 40),
    channels=st.integers(1, 5),
    times=st.integers(1, 4),
    percentile=st.floats(50.5, 100),
    seed=st.integers(0, 1000),
)
def test_percentiles_are_quantiles(
    rows: int, channels: int, times: int, percentile: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(rows, channels, generator=generator, dtype=torch.float64) for _ in range(times)]
    low, high = shown(Percentile(percentile, times), parts)
    whole = torch.cat(parts)
    assert torch.allclose(high, whole.quantile(percentile / 100, dim=0), atol=1e-12)
    assert torch.allclose(low, whole.quantile(1 - percentile / 100, dim=0), atol=1e-12)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(rows=st.integers(2, 30), channels=st.integers(1, 4), cut=st.floats(0, 1), seed=st.integers(0, 1000))
def test_minima_do_not_depend_on_the_windows(rows: int, channels: int, cut: float, seed: int) -> None:
    whole = torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed))
    place = min(max(1, int(cut * rows)), rows - 1)
    found = shown(MinMax(), [whole[:place], whole[place:]])
    assert all(map(torch.equal, found, (whole.amin(0), whole.amax(0))))


def test_percentiles_keep_only_the_tails() -> None:
    observer = Percentile(99, times=50)
    for seed in range(50):
        observer.see(torch.randn(40, 3, generator=torch.Generator().manual_seed(seed)))
    assert [t.shape for t in observer._tails] == [(3, 21), (3, 21)]


def test_a_histogram_of_one_number() -> None:
    for number in (0.0, -3.0, 2.0):
        low, high = shown(Histogram(), [torch.full((5, 1), number)] * 2)
        assert low <= number + 1e-2 and high >= number - 1e-2 and low <= 0 <= high
