"""The report page, looked at in a browser: it runs without an error, sorts, filters, moves, fits a phone and the dark."""

import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from html import unescape
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from torch import nn
from zoo import llama, mlp

import sarac
from sarac import CheckpointError
from sarac.figures import budget, grid
from sarac.ir.adapters import Sara
from sarac.ir.graph import Site
from sarac.ir.plan import Plan
from sarac.ir.spectrum import Spectrum
from sarac.page import page, write
from sarac.report import Analysis

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync "
QUIET += "--disable-component-update --hide-scrollbars"
HOSTILE = "</script><img src=x onerror=alert(1)>.0.<!--<script>weight"
FIRST = """<head><script>
const faults = [];
onerror = (message) => { faults.push(String(message)); };
console.error = console.warn = (...words) => faults.push(words.join(" "));
addEventListener("securitypolicyviolation", event => faults.push("fetches " + event.blockedURI));
alert = () => faults.push("a name was run");
let tried = false;  // by the script at the page's end, which a name may swallow
addEventListener("load", () => setTimeout(() => { if (!tried) parent.postMessage({ faults }, "*"); }, 200));
</script>"""
LAST = """<script>
addEventListener("load", () => { tried = true; try {
  const texts = nth => [...document.querySelectorAll(`#rows td:nth-child(${nth})`)].map(cell => cell.textContent.trim());
  const heads = [...document.querySelectorAll("#heads th")];
  const column = word => 1 + heads.findIndex(head => head.textContent === word);
  const press = word => {
    const head = heads[column(word) - 1];
    head.firstChild.click();
    return [head.getAttribute("aria-sort"), texts(column(word))];
  };
  const lines = id => document.querySelectorAll(`#${id} .line`).length;
  const found = { width: innerWidth, wide: document.documentElement.scrollWidth };
  found.box = document.querySelector(".box").scrollWidth;
  found.names = texts(1); found.ranks = texts(column("k")); found.first = $("sum").textContent; found.title = document.title;
  found.up = press("n"); found.down = press("n");
  $("filter").value = "down_PROJ"; $("filter").oninput(); found.filtered = texts(1);
  $("filter").value = ""; $("filter").oninput();
  $("slider").value = steps.indexOf(0.9); move(+$("slider").value);
  found.moved = $("sum").textContent; found.names9 = texts(1); found.ranks9 = texts(column("k"));
  $("reset").click(); found.back = $("sum").textContent;
  found.drawn = [lines("shares"), lines("values")];
  document.querySelector("#rows tr:last-child")?.click(); found.drawn.push(lines("shares"), lines("values"));
  document.querySelector("#shares svg").focus();
  document.querySelector("#shares svg").dispatchEvent(new KeyboardEvent("keydown", { key: "End" }));
  found.said = $("said").textContent;
  found.parts = ["plan", "left", "notes"].filter(id => !$(id).hidden);
  found.plan = $("planrows").children.length; found.left = $("reasons").textContent; found.foot = $("versions").textContent;
  found.images = document.images.length; found.faults = faults; found.paper = getComputedStyle(document.body).backgroundColor;
  parent.postMessage(found, "*");
} catch (error) { parent.postMessage({ faults: [...faults, String(error)] }, "*"); } });
</script></body>"""
BOTH = """<body style="margin:0"><iframe src="tried.html" style="width:1280px;height:900px;border:0"></iframe>
<iframe src="tried.html" style="width:375px;height:900px;border:0"></iframe><pre id="found"></pre><script>
const all = [];
onmessage = event => { all.push(event.data); document.getElementById("found").textContent = JSON.stringify(all); };
</script></body>"""


def embedded(text: str) -> dict[str, Any]:
    """What a page's script reads."""
    (inside,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return json.loads(inside)


def look(folder: Path, text: str, *, dark: bool) -> list[dict[str, Any]]:
    """What a page says of itself at 1280 and at 375 pixels; the picture of both is seen.png."""
    tried = text.replace("<head>", FIRST, 1).replace("</body>", LAST, 1)
    (folder / "tried.html").write_text(tried, encoding="utf-8")
    (folder / "both.html").write_text(BOTH, encoding="utf-8")
    look = [*QUIET.split(), f"--user-data-dir={folder / f'user{dark}'}", f"--blink-settings=preferredColorScheme={int(not dark)}"]
    show = ["--virtual-time-budget=5000", "--window-size=1700,950", f"--screenshot={folder / 'seen.png'}", "--dump-dom"]
    command = [str(CHROMIUM), *look, *show, (folder / "both.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, stdin=subprocess.DEVNULL)
    (found,) = re.findall(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)
    return sorted(json.loads(unescape(found)), key=lambda one: -one.get("width", 0))


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    torch.manual_seed(0)
    return sarac.analyze(llama())


@pytest.fixture(scope="module")
def hostile() -> Analysis:
    """One weight whose name is written to break out of a page."""
    site = sarac.analyze(nn.Linear(4, 4, dtype=torch.float64)).sites[0]
    found = Site(HOSTILE, (HOSTILE,), site.shape, site.dtype, "call", spectrum=site.spectrum)
    return Analysis((found,), 0.6, HOSTILE, 20, {HOSTILE + "2": HOSTILE})


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
def test_page_works_in_a_browser(analysis: Analysis, tmp_path: Path) -> None:
    plan = Plan({site.name: Sara(analysis.ranks()[site.name]) for site in analysis.sites}, "threshold:0.6")
    made = analysis.report(tmp_path / "a" / "b", plan=plan, command="sarac analyze llama")
    assert made == tmp_path / "a/b/index.html"
    text = made.read_text(encoding="utf-8")
    wide, phone = look(tmp_path, text, dark=False)
    names = [site.name for site in analysis.sites]
    for seen, width in ((wide, 1280), (phone, 375)):
        assert seen["faults"] == []
        assert (seen["width"], seen["wide"]) == (width, width)
        assert seen["names"] == names
        assert dict(zip(names, map(int, seen["ranks"]), strict=True)) == analysis.ranks()
        assert dict(zip(seen["names9"], map(int, seen["ranks9"]), strict=True)) == analysis.ranks(0.9) != analysis.ranks()
        assert seen["first"] == seen["back"] != seen["moved"]
        assert seen["first"].startswith(f"{analysis.trainable} numbers")
        sizes = sorted(min(site.shape) for site in analysis.sites)
        assert seen["up"] == ["ascending", [str(size) for size in sizes]]
        assert seen["down"] == ["descending", [str(size) for size in sizes[::-1]]]
        assert seen["filtered"] == [name for name in names if "down_proj" in name] != names
        assert seen["drawn"][2:] != seen["drawn"][:2] == [7, 7]
        assert re.search(r"k = (\d+) of \1, share 1\.0000", seen["said"])
        assert (seen["parts"], seen["plan"]) == (["plan", "left"], len(names))
        assert "the output head" in seen["left"]
        assert f"sarac {sarac.__version__} · torch {torch.__version__}" in seen["foot"]
    assert phone["box"] > 375 - 40  # the table scrolls in its box
    light = matplotlib.image.imread(tmp_path / "seen.png")
    (dark, _) = look(tmp_path, text, dark=True)
    assert dark["faults"] == []
    night = matplotlib.image.imread(tmp_path / "seen.png")
    assert light[:900].mean() > 0.8 > 0.4 > night[:900, :1280, :3].mean()
    assert all(len({tuple(p) for row in seen[::3, ::3].round(2).tolist() for p in row}) > 50 for seen in (light, night))


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
def test_hostile_names_are_text(hostile: Analysis, tmp_path: Path) -> None:
    plan = Plan({HOSTILE: Sara(2)}, HOSTILE)
    text = hostile.report(tmp_path, plan=plan, command=HOSTILE).read_text(encoding="utf-8")
    (wide, _) = look(tmp_path, text, dark=False)
    assert (wide["faults"], wide["images"], wide["names"]) == ([], 0, [HOSTILE])
    assert wide["title"].startswith(HOSTILE)
    (broken, *_) = look(tmp_path, text.replace("\\u003c", "<"), dark=False)
    assert "a name was run" in broken["faults"]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
def test_odd_weights_are_drawn(tmp_path: Path) -> None:
    def site(name: str, *values: list[float]) -> Site:
        parts = tuple(Spectrum(torch.tensor(one, dtype=torch.float64), 0.0) for one in values)
        whole = Spectrum(torch.stack([part.values for part in parts]), 0.0, parts) if len(parts) > 1 else parts[0]
        stack = len(parts) if len(parts) > 1 else 0
        return Site(name, (name,), (len(values[0]), 9), torch.float32, "call", parts=stack, spectrum=whole)

    sites = (site("zero", [0.0, 0.0]), site("one", [1.0]), site("equal", [2.0] * 3), site("stack", [4.0, 0.1], [1.0, 1.0]))
    made = Analysis(sites, 0.6, "Odd", 50).report(tmp_path)
    for seen in look(tmp_path, made.read_text(encoding="utf-8"), dark=False):
        assert (seen["faults"], seen["names"], seen["wide"]) == ([], [one.name for one in sites], seen["width"])
        assert dict(zip(seen["names"], seen["ranks"], strict=True)) == {"zero": "1", "one": "1", "equal": "2", "stack": "1–2"}
        assert dict(zip(seen["names9"], seen["ranks9"], strict=True))["equal"] == "3"
        assert (seen["filtered"], seen["parts"], seen["first"][:16]) == (
            [],
            ["plan", "notes"],
            "7 numbers train,",
        )  # a zero weight is told of
    made = Analysis((), 0.6, "Empty", 0).report(tmp_path)
    (seen, _) = look(tmp_path, made.read_text(encoding="utf-8"), dark=False)
    assert (seen["faults"], seen["names"], seen["first"][:16]) == ([], [], "0 numbers train,")


def test_data_cannot_end_its_script(hostile: Analysis) -> None:
    text = page(hostile._document(), hostile.sites, None, HOSTILE)
    (inside,) = re.findall(r'id="data">(.*)', text)
    assert inside.count("<") == 1  # the one that ends it
    assert embedded(text)["sites"][0]["site"] == embedded(text)["command"] == HOSTILE


def test_page_holds_exact_ranks(analysis: Analysis) -> None:
    data = embedded(page(analysis._document(), analysis.sites, None, ""))
    assert data["steps"] == grid(analysis.sites, 0.6)
    assert data["plan"] is None
    for index, step in enumerate(data["steps"]):
        assert {row["site"]: row["ks"][index] for row in data["sites"]} == analysis.ranks(step)
    totals = [sum(row.get("trains", row["ks"])[index] for row in data["sites"]) for index in range(len(data["steps"]))]
    assert totals == budget(analysis.sites, data["steps"])
    assert totals[0] < totals[-1]
    for row, site in zip(data["sites"], analysis.sites, strict=True):
        assert data["at"][str(row["full_rank"])] == list(range(1, min(site.shape) + 1))
        assert row["shares"] == pytest.approx(analysis.spectrum(site.name).shares().tolist(), abs=1e-5)
        assert row["values"] == pytest.approx(analysis.spectrum(site.name).values.tolist(), rel=1e-3)


def test_page_of_a_stack_tells_smallest_mean_and_what_trains(analysis: Analysis) -> None:
    parts = tuple(Spectrum(torch.tensor(values, dtype=torch.float64), 0.0) for values in ([4.0, 0.1], [1.0, 1.0]))
    stack = Spectrum(torch.stack([part.values for part in parts]), 0.0, parts)
    site = Site("experts", ("experts",), (2, 2), torch.float32, "call", parts=2, spectrum=stack)
    found = Analysis((site,), 0.6, "Experts", 8)
    data = embedded(page(found._document(), found.sites, None, ""))
    (row,), at = data["sites"], data["steps"].index(0.6)
    assert [row[name][at] for name in ("least", "mean", "ks", "trains")] == [1, 1.5, 2, 3]
    assert not {"least", "mean", "trains"} & set(embedded(page(analysis._document(), analysis.sites, None, ""))["sites"][0])


def test_page_of_a_large_model_is_small() -> None:
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 3
    torch.manual_seed(0)
    spectra = [Spectrum(torch.rand(4096, dtype=torch.float64).sort(descending=True).values, 0.0) for _ in range(4)]

    def site(index: int) -> Site:
        name = f"model.layers.{index // 7}.self_attn.projection_{index % 7}.weight"
        return Site(name, (name,), shapes[index % 7], torch.float16, "call", spectrum=spectra[index % 4])

    found = Analysis(tuple(site(index) for index in range(224)), 0.6, "Llama", 6_738_415_616)
    assert 300_000 < len(page(found._document(), found.sites, None, "").encode()) < 3_000_000


def test_page_needs_no_network(analysis: Analysis) -> None:
    text = page(analysis._document(), analysis.sites, None, "")
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}  # a name, and no address
    assert "default-src 'none'" in text
    assert not re.search(r"<(script|img|link)[^>]+(src|href)=\"(?!data:)", text)


def test_report_replaces_an_older_one(tmp_path: Path) -> None:
    small = sarac.analyze(mlp(4, 4))
    small.report(tmp_path, command="first")
    (tmp_path / "own.txt").touch()
    small.report(str(tmp_path), command="second")
    assert embedded((tmp_path / "index.html").read_text())["command"] == "second"
    assert {path.name for path in tmp_path.iterdir()} == {"index.html", "own.txt"}


def occupied(folder: Path) -> Mapping[str, Path]:
    (folder / "file").touch()
    (folder / "taken/index.html").mkdir(parents=True)
    return {"a file": folder / "file", "in a file": folder / "file/deeper", "a folder of the name": folder / "taken"}


@pytest.mark.parametrize("case", ["a file", "in a file", "a folder of the name"])
def test_folder_that_cannot_be_written_is_told(case: str, tmp_path: Path) -> None:
    small, folder = sarac.analyze(mlp(4, 4)), occupied(tmp_path)[case]
    with pytest.raises(CheckpointError, match=r"report cannot be written to .*index\.html: .*Name a folder"):
        write(folder, small._document(), small.sites, None, "")
    assert [path.name for path in tmp_path.rglob(".index*")] == []
