"""The analysis that people look at: its table, its JSON and its plot say what the model is."""

import json
import math
import sys
import types
from pathlib import Path

import matplotlib.image
import pytest
import torch
from torch import nn
from zoo import Shared, TiedHead, bert, llama, mlp, require_untouched, snapshot, trainables

import sarac
from sarac import CheckpointError, PlanError, SpectrumError, figures
from sarac.ir.record import record_of
from sarac.report import as_text


def cells(text: str) -> list[list[str]]:
    """The rows of a table that was printed with box-drawing characters."""
    lines = (line for line in text.splitlines() if "│" in line)
    return [[cell.strip() for cell in line.strip("│┃ ").split("│")] for line in lines]


def test_totals_are_the_sums_of_the_ranks() -> None:
    model = llama()
    analysis = sarac.analyze(model, threshold=0.6)
    assert analysis.trainable == sum(analysis.ranks().values()) > len(analysis.sites)
    adapted = sarac.transform(model, plan="threshold:0.6")
    assert analysis.trainable == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert sarac.analyze(model, threshold=0.9).trainable > analysis.trainable > sarac.analyze(model, threshold=0.3).trainable


def test_ranks_are_those_of_the_plan() -> None:
    model = bert()
    adapted = sarac.transform(model, plan="threshold:0.4")
    analysis = sarac.analyze(model)
    ranks = {name: adapter.rank for name, adapter in record_of(adapted).plan.sites.items()}
    assert analysis.ranks(0.4) == ranks
    assert analysis.ranks() != ranks
    assert analysis.ranks() == analysis.ranks(0.6)


def test_json_says_every_site_and_every_reason() -> None:
    model = llama()
    analysis = sarac.analyze(model, threshold=0.5)
    found = json.loads(analysis.to_json())
    assert found["threshold"] == 0.5
    assert found["trainable"] == sum(row["rank"] for row in found["sites"])
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert {row["site"]: row["rank"] for row in found["sites"]} == analysis.ranks()
    for row in found["sites"]:
        weight = model.get_parameter(row["site"])
        assert row["shape"] == list(weight.shape)
        values = torch.linalg.svdvals(weight.detach().double())
        assert row["sum"] == pytest.approx(float(values.sum()), rel=1e-9)
        assert row["largest"] == pytest.approx(float(values[0]), rel=1e-9)
        assert 1 <= row["ranks"]["0.3"] <= row["rank"] <= row["ranks"]["0.9"] <= row["full_rank"] == min(weight.shape)
    matrices = {name for name, parameter in model.named_parameters() if parameter.ndim == 2}
    assert {row["site"] for row in found["sites"]} | set(found["skipped"]) == matrices
    assert all(found["skipped"].values())


@pytest.mark.parametrize("by_site", [False, True])
def test_table_adds_up(by_site: bool) -> None:
    analysis = sarac.analyze(llama())
    rows = cells(as_text(analysis.table(by_site, width=400), width=400))
    *body, total = rows
    sizes = sum(site.shape[0] * site.shape[1] for site in analysis.sites)
    assert total[0] == "all"
    assert total[-2:] == [f"{analysis.trainable:,}", f"{sizes:,}"]
    assert by_site or total[1] == str(len(analysis.sites))
    for column in (-2, -1) if by_site else (1, -2, -1):
        assert sum(int(row[column].replace(",", "")) for row in body) == int(total[column].replace(",", ""))
    assert len(body) == (len(analysis.sites) if by_site else 7)


def test_table_tells_kinds_and_spans() -> None:
    model = mlp(4, 4, 4)
    model[0].weight.data = torch.eye(4)
    model[2].weight.data = torch.diag(torch.tensor([9.0, 1.0, 1e-3, 1e-3]))
    analysis = sarac.analyze(nn.ModuleDict({"block": nn.ModuleList([model[0], model[2]])}))
    row = cells(as_text(analysis.table(width=400), width=400))[0]
    assert row[:8] == ["block.*.weight", "2", "4 x 4", "call", "1–2", "1–3", "2–4", "0.50"]  # 9 of 10.002 is less than 0.9


def test_text_is_the_table() -> None:
    analysis = sarac.analyze(TiedHead(8))
    assert "TiedHead: 1 linear sites" in str(analysis)
    assert "inner.weight" in str(analysis)
    assert "\x1b" not in str(analysis)


def test_where_limits_the_work() -> None:
    model, seen = mlp(6, 8, 5), []
    analysis = sarac.analyze(model, where="2.*", progress=seen.append)
    assert [site.name for site in analysis.sites] == ["2.weight"] == seen
    assert "0.weight" in json.loads(analysis.to_json())["skipped"]
    with pytest.raises(PlanError, match=r"0\.weight"):
        sarac.analyze(model, where="0.weigth")


@pytest.mark.parametrize("threshold", [0.0, 1.01, -1.0, float("nan")])
def test_threshold_outside_its_range_is_told(threshold: float) -> None:
    with pytest.raises(sarac.SaracError, match=f"{threshold:g}"):
        sarac.analyze(mlp(6, 8), threshold=threshold)
    with pytest.raises(sarac.SaracError, match=f"{threshold:g}"):
        sarac.analyze(mlp(6, 8)).ranks(threshold)


def test_spectrum_goes_by_any_name() -> None:
    analysis = sarac.analyze(Shared(6))
    assert analysis.spectrum("second.weight") is analysis.spectrum("first.weight")
    with pytest.raises(sarac.TraceError, match="third"):
        analysis.spectrum("third.weight")


def test_spectrum_that_was_not_measured_is_told() -> None:
    with pytest.raises(sarac.SaracError, match=r"0\.weight"):
        sarac.analyze(mlp(6, 8, 5), where="2.weight").spectrum("0.weight")


def test_model_is_only_read() -> None:
    model = llama()
    before = snapshot(model)
    sarac.analyze(model)
    require_untouched(model, before)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(SpectrumError, match=r"model\.layers\.0\.mlp\.up_proj\.weight"):
        sarac.analyze(model)


def test_example_inputs_add_the_dataflow() -> None:
    model = mlp(6, 8, 5)
    assert sarac.analyze(model).graph.whole is None
    assert dict(sarac.analyze(model, example_inputs=torch.randn(2, 6)).graph.whole.calls) == {"0.weight": 1, "2.weight": 1}
    assert trainables(model) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def colours(path: Path) -> int:
    """How many different pixels an image has."""
    return len({tuple(pixel) for row in matplotlib.image.imread(path)[::3, ::3].round(3).tolist() for pixel in row})


def test_plot_is_a_picture_of_this_analysis(tmp_path: Path) -> None:
    sarac.analyze(llama()).plot(tmp_path / "k.png")
    sarac.analyze(llama(), threshold=0.2).plot(str(tmp_path / "other.png"))
    assert (tmp_path / "k.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert colours(tmp_path / "k.png") > 20
    assert (tmp_path / "k.png").read_bytes() != (tmp_path / "other.png").read_bytes()
    sarac.analyze(nn.Linear(4, 4)).plot(tmp_path / "one.svg")
    assert "<svg" in (tmp_path / "one.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["nowhere/k.png", "k.nothing", "."])
def test_plot_that_cannot_be_written_is_told(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be written"):
        sarac.analyze(nn.Linear(4, 4)).plot(tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    assert not tmp_path.with_suffix(".png").exists()


def test_every_view_has_the_same_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    analysis = sarac.analyze(llama(), threshold=0.5)
    rows, document = analysis.rows(), json.loads(analysis.to_json())
    assert document["sites"] == json.loads(json.dumps(rows))
    framed = cells(as_text(analysis.table(by_site=True, width=400), width=400))[:-1]
    shown = [(row["site"], *(str(k) for k in row["ranks"].values()), f"{row['trainable']:,}") for row in rows]
    assert [(line[0], *line[3:7], line[-2]) for line in framed] == shown
    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=list))
    frame = analysis.to_frame()
    assert [(one["site"], *(str(one[f"k at {t}"]) for t in row["ranks"])) for one, row in zip(frame, rows, strict=True)] == [
        line[:-1] for line in shown
    ]
    notebook = analysis._repr_html_()
    for kind in document["kinds"]:
        assert f"<td>{kind['weight']}</td>" in notebook
        assert f"<td>{kind['trainable']:,}</td>" in notebook
    assert sarac.analyze(llama(), threshold=0.6).rows() != rows


def test_frame_without_pandas_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(sarac.InputError, match="pip install pandas"):
        sarac.analyze(mlp(4, 4)).to_frame()


def test_names_are_escaped_in_a_notebook() -> None:
    shown = sarac.analyze(nn.ModuleDict({"<b>&": nn.Linear(4, 4)}))._repr_html_()
    assert "&lt;b&gt;&amp;.weight" in shown
    assert "<b>&" not in shown


def test_decay_and_condition_are_what_can_be_worked_out() -> None:
    model = nn.ModuleDict({str(i): nn.Linear(4, 4, bias=False) for i in range(4)})
    for layer, values in zip(model.values(), [[8.0, 4.0, 2.0, 1.0], [3.0] * 4, [5.0, 1.0, 0.0, 0.0], [0.0] * 4], strict=True):
        layer.weight.data = torch.diag(torch.tensor(values))
    rows = sarac.analyze(model).rows()
    assert [row["condition"] for row in rows] == [pytest.approx(8.0), pytest.approx(1.0), None, None]
    decays = [row["decay"] for row in rows]
    assert decays == [pytest.approx(math.log10(8)), pytest.approx(0, abs=1e-9), pytest.approx(math.log10(5)), 0.0]
    assert "∞" in str(sarac.analyze(model))


def test_what_needed_a_true_svd_is_said() -> None:
    model = mlp(50, 64)
    model[0].weight.data = torch.eye(64, 50)
    analysis = sarac.analyze(model, threshold=0.5)
    (row,) = analysis.rows()
    assert (row["how"], row["note"]) == ("svd", "k at 0.5 lies within the error of the values")
    assert "1 of the weights by SVD: k at 0.5 lies within the error" in str(analysis)
    assert "SVD" not in str(sarac.analyze(mlp(50, 64)))


@pytest.mark.parametrize("by_site", [False, True])
def test_table_fits_a_narrow_terminal(by_site: bool) -> None:
    analysis = sarac.analyze(llama())
    for width in (80, 130):
        lines = as_text(analysis.table(by_site, width=width), width=width).splitlines()
        assert max(map(len, lines)) <= width
        for row in analysis.rows():
            name = row["site"] if by_site else row["kind"]
            assert any(name.removeprefix("model.layers.").removesuffix(".weight").lstrip("*.") in line for line in lines), name


class Many(nn.Module):
    """A stack of experts, a weight of zeros, a number, and many kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 6, 5))
        self.zero, self.one = nn.Linear(4, 4, bias=False), nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.zero.weight)
        self.kinds = nn.ModuleDict({f"kind{i}": nn.Linear(3, 2 + i % 3) for i in range(30)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ebi,eoi->ebo", x, self.experts)


@pytest.mark.parametrize("where", ["*", "experts", "zero.*", "one.*"])
def test_picture_of_anything_can_be_drawn(where: str, tmp_path: Path) -> None:
    analysis = sarac.analyze(Many(), where=where)
    analysis.plot(tmp_path / "k.png")
    picture = matplotlib.image.imread(tmp_path / "k.png")
    assert picture.shape[1] > 2 * picture.shape[0]
    assert picture[..., :3].std() > 0.02
    assert analysis.report(tmp_path).stat().st_size > 10_000


def test_the_plan_of_an_analysis_is_that_of_its_threshold() -> None:
    model = llama()
    analysis = sarac.analyze(model, threshold=0.4)
    assert analysis.plan.diff(sarac.plan(model, "threshold:0.4")) == {}
    assert analysis.plan.diff(sarac.plan(model, "threshold:0.5"))
    adapted = sarac.transform(model, sarac.Plan.from_json(analysis.plan.to_json()))
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == analysis.trainable
    assert "zero.weight" not in sarac.analyze(Many(), where="*").plan.sites


def test_picture_without_a_file_is_a_figure() -> None:
    figure = sarac.analyze(llama()).plot()
    assert len(figure.axes) == 3
    assert [axes.get_title(loc="left")[:4] for axes in figure.axes] == ["Rank", "Cumu", "Budg"]


@pytest.mark.parametrize("values", [torch.ones(100), torch.zeros(4), 0.5 ** torch.arange(12.0), torch.rand(64), torch.eye(1)[0]])
def test_ranks_on_a_grid_are_those_of_the_rule(values: torch.Tensor) -> None:
    layer = nn.Linear(len(values), len(values), bias=False)
    layer.weight.data = torch.diag(values)
    (site,) = sarac.analyze(layer).sites
    shares = sorted({*(step / 100 for step in range(1, 101)), 0.875, 1e-3})
    assert figures.ranks_on(site, shares) == [[site.spectrum.rank_at(share)] for share in shares]
    assert len(values) < 4 or not values.any() or figures.ranks_on(site, shares)[0] != figures.ranks_on(site, shares)[-1]
