"""The report's page, in a real browser: it draws itself without an error, sorts, filters, and its threshold moves every k."""

import html
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from torch import nn
from zoo import llama, mlp

import sarac
from sarac import page

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --virtual-time-budget=4000"
).split()
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium here: apt-get install chromium")
HOSTILE = "</script><img src=x onerror=alert(1)>"

# What is done on the page, and what is seen of it; the results are left in the document for --dump-dom.
SCRIPT = """
<script>const faults = []; window.onerror = (words) => { faults.push(String(words)); };
console.error = (...words) => faults.push(words.join(" "));</script>
"""
ACTS = """
<script>
const cells = (n) => [...document.querySelectorAll("#sites tbody tr")].map((row) => row.cells[n].textContent);
const press = (n) => document.querySelectorAll("#sites th button")[n].click();
const sorts = () => [...document.querySelectorAll("#sites th")].map((cell) => cell.getAttribute("aria-sort"));
const foot = (n) => document.querySelector("#sites tfoot").rows[0].cells[n].textContent;
const seen = { title: document.querySelector("h1").textContent, names: cells(0), k: cells(3), trainable: foot(7) };
seen.cards = [...document.querySelectorAll(".card b")].map((card) => card.textContent);
seen.charts = [...document.querySelectorAll("figure svg")].map((svg) => svg.querySelectorAll("path").length);
press(3); seen.up = [cells(3), sorts()]; press(3); seen.down = [cells(3), sorts()];
press(0);
const slider = document.getElementById("threshold");
slider.value = 0; slider.dispatchEvent(new Event("input")); seen.least = [cells(3), foot(7)];
slider.value = slider.max; slider.dispatchEvent(new Event("input")); seen.most = [cells(3), foot(7)];
const filter = document.getElementById("filter");
filter.value = "Q_PROJ"; filter.dispatchEvent(new Event("input")); seen.filtered = cells(0);
const before = document.querySelectorAll("#shares path").length;
document.querySelector("#sites tbody button")?.click();
seen.picked = [before, document.querySelectorAll("#shares path").length];
const svg = document.querySelector("#budget svg"), box = svg.getBoundingClientRect();
svg.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width / 2, clientY: box.top + box.height / 2 }));
seen.tip = document.querySelector("#budget").parentElement.querySelector(".tip").textContent;
seen.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
seen.faults = faults;
seen.images = document.images.length;
const told = document.createElement("pre"); told.id = "seen"; told.textContent = JSON.stringify(seen); document.body.append(told);
</script>
"""


def browse(path: Path, folder: Path, *flags: str) -> str:
    command = [str(BROWSER), *FLAGS, f"--user-data-dir={folder / 'profile'}", *flags, path.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout


def acted(path: Path, folder: Path) -> dict[str, Any]:
    """What the script saw on a copy of the page."""
    copy = folder / "acted.html"
    text = path.read_text(encoding="utf-8")
    copy.write_text(text.replace("</style>", "</style>" + SCRIPT, 1).replace("</body>", ACTS + "</body>"), encoding="utf-8")
    shown = browse(copy, folder, "--dump-dom", "--window-size=1200,900")
    found = shown.partition('<pre id="seen">')[2].partition("</pre>")[0]
    assert found, shown[-2000:]
    seen: dict[str, Any] = json.loads(html.unescape(found))
    return seen


@needs_browser
def test_page_shows_what_the_analysis_says_and_moves(tmp_path: Path) -> None:
    model = llama()
    analysis = sarac.analyze(model)
    path = analysis.report(tmp_path / "report", plan=sarac.plan(model, "threshold:0.6"), command="sarac analyze <x>")
    assert path == tmp_path / "report" / "index.html"
    seen = acted(path, tmp_path)
    assert seen["faults"] == []
    assert seen["title"] == "LlamaForCausalLM"
    ranks = analysis.ranks()
    assert dict(zip(seen["names"], map(int, seen["k"]), strict=True)) == ranks
    assert seen["trainable"] == f"{analysis.trainable:,}" == seen["cards"][2]
    assert [int(k) for k in seen["up"][0]] == sorted(ranks.values())
    assert [int(k) for k in seen["down"][0]] == sorted(ranks.values(), reverse=True) != sorted(ranks.values())
    assert seen["up"][1][3] == "ascending"
    assert seen["down"][1][3] == "descending"
    assert set(seen["up"][1]) == {"ascending", "none"}
    least, most = (dict(zip(sorted(ranks), map(int, seen[name][0]), strict=True)) for name in ("least", "most"))
    assert least == {name: analysis.spectrum(name).rank_at(0.001) for name in ranks}
    assert most == {name: analysis.spectrum(name).rank_at(1.0) for name in ranks} != least
    assert seen["most"][1] == f"{sum(most.values()):,}"
    assert seen["filtered"] == [name for name in sorted(ranks) if "q_proj" in name]
    assert abs(seen["picked"][1] - seen["picked"][0]) == 1
    assert seen["charts"] == [7, 7, 7, 1]
    assert "numbers" in seen["tip"]
    assert seen["wide"] == 0


@needs_browser
def test_hostile_names_stay_words_and_a_phone_needs_no_sideways_scroll(tmp_path: Path) -> None:
    model = nn.ModuleDict({HOSTILE: nn.Linear(6, 5), "experts": nn.ModuleDict({"0": nn.Linear(4, 4)})})
    analysis = sarac.analyze(model)
    path = analysis.report(tmp_path)
    assert HOSTILE not in path.read_text(encoding="utf-8")
    narrow = tmp_path / "narrow.html"
    copy = path.read_text(encoding="utf-8").replace("</style>", "</style>" + SCRIPT, 1)
    tell = "<script>parent.postMessage(JSON.stringify({wide: document.documentElement.scrollWidth, faults}), '*')</script>"
    (tmp_path / "inner.html").write_text(copy.replace("</body>", tell + "</body>"), encoding="utf-8")
    narrow.write_text(
        "<iframe src=inner.html width=375 height=800></iframe><script>onmessage = (e) => { const told = "
        "document.createElement('pre'); told.id = 'seen'; told.textContent = e.data; document.body.append(told); }</script>"
    )
    shown = browse(narrow, tmp_path, "--dump-dom").partition('<pre id="seen">')[2].partition("</pre>")[0]
    seen = json.loads(html.unescape(shown))
    assert seen["faults"] == []
    assert 300 < seen["wide"] <= 375
    wide = acted(path, tmp_path)
    assert wide["faults"] == []
    assert f"{HOSTILE}.weight" in wide["names"]
    assert wide["images"] == 0


@needs_browser
def test_page_is_drawn_light_and_dark(tmp_path: Path) -> None:
    path = sarac.analyze(mlp(6, 8, 5)).report(tmp_path)
    light, dark = tmp_path / "light.png", tmp_path / "dark.png"
    browse(path, tmp_path, f"--screenshot={light}", "--window-size=900,700")
    browse(path, tmp_path, f"--screenshot={dark}", "--window-size=900,700", "--blink-settings=preferredColorScheme=0")
    pictures = [matplotlib.image.imread(file)[..., :3] for file in (light, dark)]
    for picture in pictures:
        assert picture.std() > 0.02  # not blank
    assert pictures[0].mean() > 0.8
    assert pictures[1].mean() < 0.4


def test_page_of_a_large_model_stays_small(tmp_path: Path) -> None:
    layers = nn.Sequential(*(nn.Linear(96, 96, bias=False) for _ in range(224)))
    path = sarac.analyze(layers).report(tmp_path)
    assert path.stat().st_size < 3_000_000
    content = path.read_text(encoding="utf-8")
    assert "http://" not in content.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in content


def test_page_has_stacks_zeros_and_what_needed_an_svd(tmp_path: Path) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 6, 5))
            self.flat = nn.Linear(50, 64, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.einsum("ebi,eoi->ebo", x, self.w)

    model = Experts()
    model.flat.weight.data = torch.eye(64, 50)
    model.w.data[1] = 0.0
    analysis = sarac.analyze(model, threshold=0.5)
    found = page.data(json.loads(analysis.to_json()), analysis.sites, None, "")
    stack = found["steps"][[row["site"] for row in found["sites"]].index("w")]
    at = found["grid"].index(0.5)
    parts = [part.rank_at(0.5) for part in analysis.spectrum("w").matrices]
    assert stack[at] == [min(parts), max(parts), sum(parts)]
    assert parts[1] == 1 < max(parts)
    assert any("within the error" in remark for remark in found["remarks"])
    assert analysis.report(tmp_path).is_file()


def test_page_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(sarac.CheckpointError, match=r"index\.html: .*Name another folder"):
        sarac.analyze(mlp(4, 4)).report(tmp_path / "file")
