"""The harness of examples/experiments: one quick run of every family, resumed and reported, on a tiny model made in code."""

import copy
import gc
import importlib
import json
import math
import multiprocessing.dummy
import queue
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sarac.ir import fused

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> Any:
    """A module of the experiments, which lie beside the package."""
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    return importlib.import_module(f"experiments.{name}")


bench, compiled, data, intervals, lines = map(load, ("bench", "compiled", "data", "intervals", "lines"))
making, methods, plots = map(load, ("making", "methods", "plots"))
report, routing, runner, scoring, search, sets = map(load, ("report", "routing", "runner", "scoring", "search", "sets"))
run, spec, training = map(load, ("run", "spec", "training"))
study_1, study_3, study_5 = map(load, ("study_1_ranks", "study_3_allocation", "study_5_routing"))
Spec = spec.Spec
QUICK: dict[str, Any] = {"task": "sums", "steps": 12, "batch": 8, "model": "tiny"}
BRIEF = {**QUICK, "steps": 3}  # where it does not matter how much is learnt


@pytest.fixture(scope="module")
def place() -> Any:
    return runner.Place.open("tiny", "tiny", "", "cpu")


@pytest.fixture(scope="module")
def untouched(place: Any) -> dict[str, Any]:
    line: dict[str, Any] = runner.run(Spec("untouched", **QUICK), place)
    return line


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of one whole call; its worker is a thread here, which spares the imports of a process."""
    path = tmp_path_factory.mktemp("experiments") / "results.jsonl"
    run.conduct(options(path), multiprocessing.dummy)
    return path


def options(path: Path, *words: str) -> Any:
    chosen = run.parsed(["3", "--model", "tiny", "--results", str(path), *words])
    chosen.device, chosen.processes, chosen.compile = "cpu", 1, bool(chosen.compile)
    return chosen


RUNS = [
    ("sara", "threshold:0.6", 0.3),
    ("sara-absolute", "threshold:0.6", 1.0),
    ("sara-factors-svd", "rank:2", 0.1),
    ("mosara-topk2", "threshold:0.5", 0.3),
    ("mosara-bottleneck", "threshold:0.5", 0.3),
    ("lora", "r=2,on=q_proj+v_proj", 0.1),
    ("pissa", "r=2", 0.01),
    ("adalora", "r=2", 0.1),
    ("ia3", "", 0.3),
    ("vera", "r=4", 0.3),
    ("full", "", 0.01),
]


@pytest.mark.parametrize(("method", "plan", "rate"), RUNS, ids=[name for name, _, _ in RUNS])
def test_every_family_starts_as_the_model_and_learns(
    method: str, plan: str, rate: float, place: Any, untouched: dict[str, Any]
) -> None:
    wanted = Spec(method, plan, lr=rate, **QUICK)
    start = runner.losses(wanted, place, place.prepared(wanted).made, ("test",))
    line = runner.run(wanted, place)
    assert start["nll"] == pytest.approx(untouched["nll"], abs=2e-5)
    assert line["nll_before"] == untouched["nll"]
    assert "valid_nll" not in line
    assert line["nll"] < line["nll_before"] - 0.005
    assert line["unrelated_nll"] != line["unrelated_nll_before"]
    assert (line["trained"], line["graph"], line["diverged"]) == (line["trained"] or math.nan, False, False)
    assert Spec.of(json.loads(json.dumps(line))) == Spec(method, plan, lr=rate, **QUICK)


def test_lora_trains_as_many_numbers_as_its_rank_says(place: Any) -> None:
    shapes = [tuple(place.bench.graph.sites[name].shape) for name in place.bench.graph.sites if "_proj" in name]
    line = runner.run(Spec("lora", "r=3", lr=1e-2, **{**QUICK, "steps": 1}), place)
    assert line["trained"] == 3 * sum(out + inner for out, inner in shapes)


def test_loss_without_a_mask_is_the_masked_one(place: Any) -> None:
    task, model = place.tokens["tasks"]["sums"], copy.deepcopy(place.bench.base)
    ids, bounds = task["test"]["ids"].long(), task["test"]["bounds"].long()
    column = torch.arange(ids.shape[1])
    labels = ids.masked_fill((column < bounds[:, :1]) | (column >= bounds[:, 1:]), -100)
    model.config._attn_implementation = "sdpa"
    wanted = model(input_ids=ids, attention_mask=(column < bounds[:, 1:]).long(), labels=labels).loss.item()
    model.config._attn_implementation = training.CAUSAL
    assert training.mean_nll(model, model, task["test"], task["width"]) == pytest.approx(wanted, abs=1e-5)
    fewer = {**task["test"], "bounds": bounds - torch.tensor([0, 1])}
    assert abs(training.mean_nll(model, model, fewer, task["width"]) - wanted) > 1e-3


def test_loop_is_plain_adamw(place: Any) -> None:
    program = place.prepared(Spec("sara", "threshold:0.6", lr=0.1, **QUICK))
    model = place.bench.adapted("threshold:0.6")
    task, rows = place.tokens["tasks"]["sums"], training.order([256], 8, 6, 0)
    losses, _ = program.train(rows, 0.1)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer, seen = torch.optim.AdamW(params, lr=1.0, weight_decay=0.0), []
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [*training.rates(0.1, 6), 0.0][step])
    for chosen in rows:
        ids, bounds = task["train"]["ids"][chosen].long(), task["train"]["bounds"][chosen]
        column = torch.arange(ids.shape[1])
        labels = ids.masked_fill((column < bounds[:, :1]) | (column >= bounds[:, 1:]), -100)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
        seen.append(loss.item())
    assert losses == pytest.approx(seen, abs=1e-5)
    for ours, theirs in zip(program.params, params, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        assert not torch.equal(ours, torch.zeros_like(ours))


def test_program_serves_again_after_a_reset(place: Any) -> None:
    program = place.prepared(Spec("lora", "r=2", lr=0.1, **QUICK))
    rows = training.order([256], 8, 5, 0)
    first, _ = program.train(rows, 0.1)
    program.reset()
    again, _ = program.train(rows, 0.1)
    program.reset()
    other, _ = program.train(training.order([256], 8, 5, 1), 0.1)
    assert first == again
    assert first != other


def test_step_that_cannot_be_captured_runs_as_it_is(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    program = place.prepared(Spec("sara", "threshold:0.6", lr=0.1, **QUICK))
    seen: list[str] = []

    class Capture:
        def __init__(self, *given: Any, **how: Any) -> None:
            assert (given, how["stream"]) == (("graph",), "the process's")

        def __enter__(self) -> None:
            seen.append("waited")  # as torch's does
            assert not gc.isenabled()

        def __exit__(self, *_: Any) -> None:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the process's")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append("waited again"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "graph")
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    program._set_rate(0.0)
    program._capture()
    assert seen == ["waited", "waited again"]
    assert gc.isenabled()
    assert program.graph is None
    assert program.why_eager == "operation not permitted when stream is capturing"
    assert all(torch.equal(now, then) for now, then in zip(program.params, program.first, strict=True))
    program.reset()
    losses, _ = program.train(training.order([256], 8, 5, 0), 0.3)
    assert losses[-1] != losses[0]
    place.program, place.key = None, ()


class Compiler:
    """A backend that runs the graph as it is, but in twice the numbers where it is told to; it counts its graphs."""

    def __init__(self) -> None:
        self.graphs, self.factor = 0, 1.0

    def __call__(self, module: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs += 1
        return lambda *args: [self.factor * one for one in module(*args)]


@pytest.fixture
def compiler() -> Iterator[Compiler]:
    torch._dynamo.reset()
    yield Compiler()
    compiled.remove()
    torch._dynamo.reset()


def test_compiled_chains_compute_what_all_methods_did(place: Any, compiler: Compiler) -> None:
    specs = [Spec(name, plan, lr=rate, **BRIEF) for name, plan, rate in RUNS if name in ("sara", "full")]
    plain = [runner.run(one, place) for one in specs]
    place.program, place.key, base = None, (), place.bench.base.config
    assert compiled.why_not() == "not asked for"
    assert compiled.install(base, torch.device("cpu"), compiler) == ""
    proven = compiler.graphs
    again = [runner.run(one, place) for one in specs]
    for old, new in zip(plain, again, strict=True):
        assert new["losses"] == pytest.approx(old["losses"], abs=2e-4)
        assert (new["nll"], new["unrelated_nll"]) == pytest.approx((old["nll"], old["unrelated_nll"]), abs=2e-4)
        assert (old["why_plain"], new["why_plain"]) == ("not asked for", "")
    taken = compiler.graphs
    assert proven == 2 * len(compiled.CHAINS)  # with gradients and without
    assert proven < taken
    model, task = place.bench.base, place.tokens["tasks"]["sums"]
    for rows in (3, 5, 6):  # other sizes are no reason to compile again
        part = {key: value[:rows, : 40 + rows] for key, value in task["test"].items()}
        training.row_nll(model, model, {**part, "bounds": task["test"]["bounds"][:rows]}, 4)
    assert compiler.graphs == taken
    compiler.factor = 2.0
    assert runner.run(specs[0], place)["nll"] != pytest.approx(again[0]["nll"], abs=0.1)
    prompts = {**task, "prompts": task["prompts"][:2]}
    texts = runner.scoring.generated(copy.deepcopy(model), prompts, place.words)
    compiled.remove()
    assert texts == runner.scoring.generated(copy.deepcopy(model), prompts, place.words)
    place.program, place.key = None, ()


def test_chains_that_cannot_be_trusted_are_not_taken(place: Any, compiler: Compiler) -> None:
    def broken(module: Any, inputs: Any) -> Any:
        raise RuntimeError("no such compiler")

    config, device = place.bench.base.config, torch.device("cpu")
    compiler.factor = 1.01
    assert compiled.install(config, device, compiler).startswith("ValueError: The compiled chain 'norm' is off by")
    assert "no such compiler" in compiled.install(config, device, broken)
    line = runner.run(Spec("sara", "threshold:0.5", lr=0.1, **BRIEF), place)
    compiled.remove()
    place.program, place.key = None, ()
    assert line["why_plain"]
    assert line["losses"] == runner.run(Spec("sara", "threshold:0.5", lr=0.1, **BRIEF), place)["losses"]
    place.program, place.key = None, ()


def test_losses_of_parts_are_those_of_a_step(place: Any) -> None:
    task, model = place.tokens["tasks"]["sums"], place.bench.base
    ids, bounds = task["test"]["ids"].long(), task["test"]["bounds"].long()
    with torch.no_grad():
        nll, inside = training.token_nll(model, ids, bounds, task["width"])
    sums, counts = training.row_nll(model, model, task["test"], task["width"])
    torch.testing.assert_close(sums.float(), nll.sum(1), atol=1e-5, rtol=1e-5)
    assert counts.tolist() == inside.sum(1).tolist()
    assert sums.unique().numel() > 1


class Asked(TorchDispatchMode):
    """The operations that bring a value of the device to Python, or whose result's size depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.partition(".")[0] in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "_unique2"):
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["sara", "sara-factors-svd", "mosara-topk2", "adalora", "vera", "full"])
def test_step_asks_the_device_for_no_value(method: str, place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = {"adalora": "r=2", "vera": "r=4", "full": ""}.get(method, "threshold:0.5")
    monkeypatch.setattr(training, "autocast", lambda _: torch.autocast("cpu", torch.bfloat16))
    place.program, place.key = None, ()
    program = place.prepared(Spec(method, plan, lr=0.1, **QUICK))
    monkeypatch.setattr(program.optimizer, "step", lambda: None)  # the CPU's counts its steps in Python
    program._step()  # sarac looks at its factors once
    monkeypatch.setattr(fused, "_asking", lambda *_: None)  # on a CPU it asks which shifts are near -1; on a GPU a kernel does
    with Asked() as asked:
        program._step()
    assert asked.names == []
    with asked:
        program.loss.item()
    assert asked.names == ["_local_scalar_dense.default"]
    place.program, place.key = None, ()


@pytest.mark.parametrize("options", ["", "train=factors"])
def test_shuffled_ranks_keep_the_total(options: str, place: Any) -> None:
    plan = place.bench.plan(f"threshold:0.3,{options}".rstrip(","))
    dealt = [place.bench.shuffled(plan, seed) for seed in (0, 0, 1, 2)]
    assert dealt[0] == dealt[1]
    assert len({tuple(one.sites[name].rank for name in one.sites) for one in [plan, *dealt]}) > 2
    for one in dealt:
        assert sum(one.trainable.values()) == sum(plan.trainable.values())
        assert sorted(a.rank for a in one.sites.values()) == sorted(a.rank for a in plan.sites.values())
        one.require_fits({name: site.full_shape for name, site in place.bench.graph.sites.items()})
    model = place.bench.adapted(f"threshold:0.3{bench.SHUFFLED}", options, shuffle_seed=1)
    assert {name: adapter.rank for name, adapter, _ in bench.slots(model)} == {n: a.rank for n, a in dealt[2].sites.items()}


def test_bench_adapts_as_transform_does(place: Any) -> None:
    import sarac

    ours = {name: tensors for name, _, tensors in bench.slots(place.bench.adapted("threshold:0.6"))}
    theirs = {name: tensors for name, _, tensors in bench.slots(sarac.transform(place.bench.base, "threshold:0.6"))}
    assert ours.keys() == theirs.keys()
    for name, tensors in ours.items():
        for role, tensor in tensors.items():
            torch.testing.assert_close(tensor, theirs[name][role], atol=1e-5, rtol=1e-5)
    assert len(bench.slots(place.bench.adapted("threshold:0.1"))[0][2]["shift"]) < len(next(iter(ours.values()))["shift"])


def test_fixed_rank_has_nearly_the_total(place: Any) -> None:
    adaptive, fixed = (place.bench.plan(rule) for rule in ("threshold:0.6", "uniform:like=threshold:0.6"))
    ours, theirs = sum(adaptive.trainable.values()), sum(fixed.trainable.values())
    assert theirs <= ours < theirs + len(fixed.sites)


def test_all_runs_are_made_and_none_twice(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run.read(results)
    assert not [line["error"] for line in found if "error" in line]
    assert len({line["id"] for line in found}) == len(found)
    before = results.read_bytes()
    run.conduct(options(results))  # nothing is left: no process is started
    assert results.read_bytes() == before
    assert "0 runs are left" in capsys.readouterr().out


def test_run_that_was_cut_off_is_made_again(results: Path, tmp_path: Path) -> None:
    texts = results.read_text().splitlines(keepends=True)
    cut = tmp_path / "cut.jsonl"
    cut.write_text("".join(texts[:-1]) + texts[-1][:100])
    kept = run.read(cut)
    assert len(kept) == len(texts) - 1
    gone = Spec.of(json.loads(texts[-1]))
    every = [Spec.of(json.loads(text)) for text in texts]
    assert spec.missing(every, kept) == [gone]
    assert spec.missing(every, run.read(results)) == []
    failed = [{**json.loads(texts[-1]), "error": "out of memory"}]
    assert spec.missing([gone], failed) == [gone]


def test_extra_that_a_line_lacks_is_a_reason_to_run_again(results: Path) -> None:
    line = run.read(results)[-1]
    more = Spec(**{**vars(Spec.of(line)), "extras": ("accuracy",)})
    assert spec.missing([more], [line]) == [more]
    assert spec.merged([Spec.of(line), more]) == [more]


def test_no_run_starts_when_the_time_is_over() -> None:
    inbox, outbox = queue.Queue(), queue.Queue()  # type: ignore[var-annotated]
    late = options(Path("nowhere"), "--seconds", "-1")
    for given in ([Spec("sara", "threshold:0.6", lr=0.1, **QUICK)], None):
        inbox.put(given)
    run.work(late, inbox, outbox)
    assert outbox.get() == (Spec("sara", "threshold:0.6", lr=0.1, **QUICK).identity, None)


def test_run_that_fails_is_a_line_and_those_after_it_are_as_anywhere(place: Any) -> None:
    inbox, outbox = queue.Queue(), queue.Queue()  # type: ignore[var-annotated]
    bad, good = Spec("sara", "threshold:7", lr=0.1, **BRIEF), [Spec("sara", "threshold:0.6", lr=0.3, **BRIEF)]
    good += [Spec("lora", "r=2", lr=0.1, seed=seed, **BRIEF) for seed in (0, 1)]
    for given in ([bad], *([one] for one in good), None):
        inbox.put(given)
    run.work(options(Path("nowhere")), inbox, outbox)
    assert "threshold" in outbox.get()[1]["error"]
    there = [without_times(outbox.get()[1]) for _ in good]
    assert there[::-1] == [without_times(runner.run(one, place)) for one in reversed(good)]  # in another order, after others
    assert len({line["nll"] for line in there}) == len(good)


def without_times(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in ("train_s", "total_s")}


class Idle:
    """A context whose processes are started and do nothing."""

    class Process:
        started = 0

        def __init__(self, target: Any, args: Any) -> None:
            self.daemon = False

        def start(self) -> None:
            Idle.Process.started += 1

        def is_alive(self) -> bool:
            return False

    Queue = queue.Queue


@pytest.mark.parametrize(("count", "dealt"), [(1, [3, 2, 1]), (2, [3, 2, 1]), (3, [2, 2, 1, 1]), (8, [1] * 6)])
def test_runs_of_one_program_go_to_one_process_where_there_are_enough(
    count: int, dealt: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Idle.Process, "started", 0)
    specs = [Spec("sara", "threshold:0.6", lr=0.1, seed=seed, **QUICK) for seed in range(5)]
    specs.insert(1, Spec("ia3", lr=0.1, **QUICK))
    crew = run.Crew(options(tmp_path / "none.jsonl"), Idle)
    crew.run(specs, count)
    groups = [crew.inbox.get_nowait() for _ in range(crew.inbox.qsize())]
    assert sorted(map(len, groups), reverse=True) == dealt
    assert [group[0] for group in groups][:2] == specs[:2] if dealt[0] > 1 else groups == [[one] for one in specs]
    assert {one.identity for group in groups for one in group} == {one.identity for one in specs}
    assert Idle.Process.started == count


@pytest.mark.parametrize(("cuda", "wanted"), [(True, ("cuda", 8, True)), (False, ("cpu", 1, False))])
def test_eight_processes_share_a_gpu(cuda: bool, wanted: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(sys, "argv", ["run", "3", "--results", str(tmp_path / "none.jsonl")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(run, "conduct", lambda given: seen.append((given.device, given.processes, given.compile)))
    run.main()
    assert seen == [wanted]


def test_process_that_lost_its_device_makes_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [Spec("lora", f"r={r}", lr=0.1, **QUICK) for r in (1, 2, 3)]
    for told, made_on in (("CUDA error: an illegal memory access", False), ("CUDA error: out of memory", True)):
        inbox, outbox = queue.Queue(), queue.Queue()  # type: ignore[var-annotated]

        def fail(*_: Any, told: str = told) -> Any:
            raise RuntimeError(told)

        monkeypatch.setattr(runner, "run", fail)
        for given in (specs[:2], specs[2:], None):
            inbox.put(given)
        run.work(options(Path("nowhere")), inbox, outbox)
        found = [outbox.get() for _ in range(outbox.qsize())]
        assert [identity for identity, _ in found] == [one.identity for one in (specs if made_on else specs[:2])]
        assert [line is None for _, line in found] == ([False] * 3 if made_on else [False, True])


def test_search_takes_the_best_rate_and_goes_on_at_its_edge() -> None:
    def line(rate: float, nll: float) -> dict[str, Any]:
        return {"id": str(rate), "spec": vars(Spec("lora", "r=8", seed=spec.SEARCH_SEED, lr=rate)), "valid_nll": nll}

    inner = search.Search([line(1e-3, 2.0), line(3e-3, 1.0), line(1e-2, math.nan)])
    assert (inner.best(("lora", "r=8")), inner.at_edge(("lora", "r=8")), inner.further()) == (3e-3, False, [])
    edge = search.Search([line(1e-3, 2.0), line(3e-3, 1.0)])
    assert [one.lr for one in edge.further()] == [1e-2]
    far = search.Search([line(rate, 1 / rate) for rate in methods.RATES[:6]])
    assert far.further() == []
    done, waiting = edge.resolved([Spec("lora", "r=32"), Spec("pissa", "r=8"), Spec("untouched")])
    assert [one.lr for one in done] == [3e-3, spec.BEST]
    assert [one.method for one in waiting] == ["pissa"]


def test_every_spec_of_the_studies_has_a_search_with_four_rates() -> None:
    for number in run.BY_VALUE:
        for one in run.study(number).specs("smollm2"):
            pair = methods.searched_by(one)
            if methods.METHODS[one.method].family != "untouched":
                assert len(methods.search_specs({pair}, "smollm2")) >= 4, one


def test_report_is_made_of_the_lines(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run.read(results)
    report.written(found, "tiny", tmp_path / "RESULTS.md")
    text = (tmp_path / "RESULTS.md").read_text()
    known = lines.Lines(found)
    module = run.study(3)
    for entry in next(iter(module.groups("tiny").values())):
        assert known.mean(entry.spec).text() in text
    assert (tmp_path / "plots" / "study_3.png").stat().st_size > 1000
    assert not (tmp_path / "plots" / "study_8.png").exists()
    assert "Not run, and made by the same command: 6 of 6 runs" in text
    changed = [{**line, "nll": line["nll"] + 1.0} if "nll" in line else line for line in found]
    monkeypatch.setattr(module.plots, "grouped", lambda *_: "")
    section = report.section(3, lines.Lines(changed), "tiny", tmp_path)
    for entry in next(iter(module.groups("tiny").values())):
        assert known.mean(entry.spec).text() not in section


def test_searches_that_are_missing_are_told_beside_the_runs(results: Path, tmp_path: Path) -> None:
    found = run.read(results)
    gone = next(line["id"] for line in found if line["spec"]["seed"] == spec.SEARCH_SEED)
    assert "Not run" not in report.section(3, lines.Lines(found), "tiny", tmp_path)
    text = report.section(3, lines.Lines([line for line in found if line["id"] != gone]), "tiny", tmp_path)
    assert "Not run, and made by the same command: " in text
    assert " 1 of 4 runs of the search: SARA, singular values" in text


def test_controls_of_the_allocation_say_how_much_they_move(tmp_path: Path) -> None:
    ranks = {"a": 10, "b": 30, "c": 20}
    each = [
        {"model": "smollm2", "site": name, "shape": [64, 64], "ranks": dict.fromkeys(("0.1", "0.3", "0.6"), k)}
        for name, k in ranks.items()
    ]
    (tmp_path / "ranks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    assert "| 0.3 | 16.7 |" in study_3.moves(tmp_path / "ranks.jsonl")  # 10 of 60 go from b to a
    dealt = bench.dealt({**ranks, "d": 7}, {**dict.fromkeys(ranks, (64, 64)), "d": (64, 32)}, 0)
    assert sorted(dealt.values()) == [7, 10, 20, 30]
    assert dealt["d"] == 7
    assert study_3.moves(tmp_path / "none.jsonl") == ""


def test_peaks_are_of_runs_like_each_other(tmp_path: Path) -> None:
    known = Spec("lora", "r=1", lr=0.1, **QUICK)
    line = {"trained": 5, "peak_gib": 9.0, "train_s": 1.0}
    beside = {**line, "id": known.identity, "spec": vars(known), "nll": 1.0, "unrelated_nll": 2.0}
    alone = Spec("lora", "r=1", lr=0.1, **{**QUICK, "kind": "timing", "steps": 20})
    timed = {**line, "id": alone.identity, "spec": vars(alone), "peak_gib": 3.0, "ms_step": 4.0, "why_plain": ""}

    def cells(*found: dict[str, Any]) -> list[str]:
        shown = lines.comparison(lines.Lines(found), [lines.Entry("LoRA", known)]).splitlines()[-1]
        return [text.strip() for text in shown.split("|")][-4:-1]

    assert cells({**beside, "why_plain": ""}, timed) == ["4.0", "9.0", "1"]
    assert cells(beside, timed) == ["4.0", "", "1"]  # its chains were not compiled: it kept more
    assert cells({**beside, "why_plain": ""}) == ["", "9.0", "1"]
    assert "| LoRA | r=1 | 5 | 4.0 | 3.0 | compiled |" in report.timings([beside, timed], "tiny")
    assert report.timings([beside], "tiny") == ""


def test_search_that_was_not_made_is_stood_in_for() -> None:
    def line(plan: str, rate: float, nll: float) -> dict[str, Any]:
        one = Spec("lora", plan, seed=spec.SEARCH_SEED, lr=rate)
        return {"id": one.identity, "spec": vars(one), "valid_nll": nll}

    wanted = Spec("lora", "r=4")
    pair = methods.searched_by(wanted)
    assert pair == ("lora", "r=4")
    others = [line("r=1", 1e-2, 1.0), line("r=1", 3e-2, 2.0), line("r=8", 1e-3, 0.5)]
    known = lines.Lines(others)
    assert (known.search.made(pair), known.search.best(pair), known.rate(wanted)) == (("lora", "r=1"), 1e-2, "0.01* (r=1)")
    own = lines.Lines([*others, *(line("r=4", rate, nll) for rate, nll in ((1e-3, 3.0), (3e-3, 1.0), (1e-2, 2.0)))])
    assert (own.search.made(pair), own.search.best(pair), own.rate(wanted)) == (pair, 3e-3, "0.003")
    assert lines.Lines([]).search.best(pair) is None
    # Runs that were made at the rate of the search that stood in are shown, and said to be, until there are some at their own.
    at = [Spec("lora", "r=4", lr=rate) for rate in (1e-2, 3e-3)]
    runs = [{"id": one.identity, "spec": vars(one), "nll": one.lr} for one in at]
    stood = lines.Lines([*own.all, runs[0]])
    assert (stood.of(wanted)[0], stood.rate(wanted)) == (runs[0], "0.01* (r=1; its own: 0.003)")
    both = lines.Lines([*own.all, *runs])
    assert (both.of(wanted)[0], both.rate(wanted)) == (runs[1], "0.003")
    assert lines.Lines([*others, runs[1]]).of(wanted) == {}


def test_sources_are_told_apart_by_what_they_hold(tmp_path: Path) -> None:
    files = [tmp_path / folder / "__init__.py" for folder in ("one", "other")]
    for number, file in enumerate(files):
        file.parent.mkdir()
        file.write_text(f"x = {number}")
    assert runner.digest(files) == runner.digest(reversed(files))
    before = runner.digest(files)
    files[0].write_text("x = 2")
    assert runner.digest(files) != before


def test_study_that_is_not_there_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.parsed(["9"])
    assert "There is no study 9" in capsys.readouterr().err
    assert run.parsed(["3"]).studies == [3]


def test_committed_lines_are_of_the_runs_that_are_wanted() -> None:
    found = run.read(report.RESULTS / "runs.jsonl")
    made_by = {line["id"]: Spec.of(line) for line in found}
    assert all(one.identity == name for name, one in made_by.items())
    assert len(made_by) == len(found)
    known = search.Search(found)
    specs = run.wanted(run.BY_VALUE, "smollm2")
    ready, waiting = known.resolved(specs)
    every = {one.identity for one in (*run.searching(specs, "smollm2"), *known.further(), *ready)}
    further = {one.identity for one in made_by.values() if one.seed == spec.SEARCH_SEED}
    cells = {one.cell for one in ready}
    before = {one.identity for one in made_by.values() if one.cell in cells}  # at a rate that was the best until a later search
    assert not waiting
    assert made_by.keys() <= every | further | before
    left = [one for one in spec.missing(ready, found) if one.identity not in made_by]  # some are there, and lack their accuracy
    assert len(left) + len(made_by.keys() & {one.identity for one in ready}) == len(ready)
    other = Spec(**{**vars(ready[0]), "steps": 121})
    assert other.identity not in every


def test_intervals_are_those_computed_by_hand() -> None:
    # Differences 1, 2, 3: mean 2, standard error 1/√3, t(0.975, 2) = 4.30265; t = 3.4641 has p = 0.07418 on two sides.
    gap = intervals.paired({0: 2.0, 1: 4.0, 2: 6.0, 7: 9.0}, {0: 1.0, 1: 2.0, 2: 3.0, 5: 0.0})
    assert (gap.value, gap.count) == (2.0, 3)
    assert gap.half == pytest.approx(2.48414, abs=1e-5)
    assert gap.p == pytest.approx(0.07418, abs=1e-5)
    assert intervals.mean([1.0, 2.0, 3.0, 4.0]).half != pytest.approx(gap.half, abs=0.1)
    assert math.isnan(intervals.mean([1.0]).half)
    assert intervals.paired({0: 1.0}, {1: 1.0}) is None


def test_routers_that_tell_tasks_apart_are_seen() -> None:
    draw, groups = torch.Generator().manual_seed(0), torch.tensor([0] * 12 + [1] * 12)
    noise = torch.rand(24, 3, 4, generator=draw, dtype=torch.float64)
    planted = noise + groups[:, None, None] * torch.tensor([0.4, 0.0, 0.0, -0.4])
    assert routing.permutation(planted, groups)[2] < 0.01
    seen, chance, p = routing.permutation(noise, groups)
    assert p > 0.05
    assert seen < 3 * chance


def test_what_tasks_differ_by_is_told_per_site_and_of_the_variance_between_rows() -> None:
    draw, groups = torch.Generator().manual_seed(0), torch.tensor([0] * 12 + [1] * 12)
    noise = 0.1 * torch.rand(24, 2, 2, generator=draw, dtype=torch.float64)
    swapped = torch.tensor([[0.2, -0.2], [-0.2, 0.2]])  # the mean over sites does not see it
    rows = noise + (2 * groups - 1)[:, None, None] * swapped
    seen, chance, _ = routing.permutation(rows, groups)
    found = {"between_tasks": seen, "between_by_chance": chance, "rows": 24, "use": [0.5] * 2, "entropy_by_site": [0.0] * 2}
    found["use_by_task"] = dict.fromkeys(("sums", "larger"))
    assert study_5.distance(found) == pytest.approx(0.2, abs=0.02)
    variance = float(((rows - rows.mean(0)) ** 2).sum()) / 24
    assert study_5.explained(found) == pytest.approx(seen / variance, rel=0.1)
    assert seen / variance > 0.9


def test_routing_figures_of_a_model(place: Any) -> None:
    quick = {**QUICK, "task": "sums+larger"}
    line = runner.run(Spec("mosara-soft", "threshold:0.5", lr=1.0, extras=("routing",), **quick), place)
    before, after = line["routing_before"], line["routing"]
    assert 0 < after["entropy"] < before["entropy"] <= 1
    assert 0 <= before["information"] <= 1
    assert sum(after["use"]) == pytest.approx(1.0)
    assert len(after["entropy_by_site"]) == 14
    assert set(line["nll_by_task"]) == {"sums", "larger"}
    uniform = runner.run(Spec("mosara-uniform", "threshold:0.5", lr=1.0, extras=("routing",), **{**quick, "steps": 1}), place)
    assert uniform["routing"] == {}


def test_accuracy_of_answers_and_choices(place: Any) -> None:
    line = runner.run(Spec("lora", "r=2", lr=0.1, extras=("accuracy",), **{**BRIEF, "task": "sums+larger"}), place)
    assert line["accuracy"]["sums"]["rows"] == line["accuracy"]["larger"]["rows"] == 8
    assert scoring.exact(["so 3+4 = 7\n#### 1,007", "it is 12.", "none"], [["#### 1007"], ["#### 12"], ["5"]]) == [
        True,
        True,
        False,
    ]
    assert scoring.exact(["#### 8"], [["#### 7"]]) == [False]


def test_texts_are_scored_against_their_references() -> None:
    references = [["the cat sat on the mat today", "a cat sat on a mat"], ["dogs bark loudly in the park at night"]]
    same = scoring.bleu_and_rouge([found[0] for found in references], references)
    other = scoring.bleu_and_rouge(["the cat ate a hat today", "dogs sleep"], references)
    assert same["bleu"] == pytest.approx(100.0)
    assert same["rouge_l"] == pytest.approx(100.0)
    assert other["bleu"] < 60
    assert other["rouge_l"] < 80


def test_rows_of_the_test_are_not_trained_on(tmp_path: Path) -> None:
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    rows = [{"question": f"How much is {i} and {i}?", "answer": f"#### {2 * i}"} for i in range(40)]
    for part, chosen in (
        ("train", [*(row for i, row in enumerate(rows) if i % 4), {"question": "how much is 36 and 36", "answer": "x"}]),
        ("test", rows[::4]),
    ):
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    train, test = (list(sets.gsm8k(tmp_path, part)) for part in ("train", "test"))
    made = data.task(train, test, 64, 4, load("tiny").Bytes(), (20, 5, 20, 20))
    assert made["counts"] == {"in the test too": 1}
    assert [len(made[part]["ids"]) for part in ("train", "valid", "test")] == [20, 5, 10]
    short = data.task(train, test, 47, 4, load("tiny").Bytes(), (20, 5, 20, 20))
    assert short["counts"]["too long"] == 30  # those of two digits have 48 bytes and an end token
    with pytest.raises(ValueError, match="no row for valid that fits into 20 tokens"):
        data.task(train, test, 20, 4, load("tiny").Bytes(), (20, 5, 20, 20))


def test_equations_become_infix() -> None:
    assert sets.infix("- * number0 number1 number2", ["3.0", "4", "5"]) == "((3 * 4) - 5)"
    assert sets.solved("( 76.0 - 25.0 )", 51.0) == "(76 - 25) = 51\n#### 51"


def test_ranks_that_rise_with_depth_are_seen() -> None:
    def rows(ranks: list[int]) -> list[dict[str, Any]]:
        each = dict.fromkeys(study_1.THRESHOLDS)
        return [
            {"model": "m", "kind": "q", "layer": layer, "full_rank": 50, "ranks": {**each, **dict.fromkeys(each, rank)}}
            for layer, rank in enumerate(ranks)
        ]

    ((_, count, rising),) = study_1.correlations(rows(list(range(1, 13))))
    ((_, _, flat),) = study_1.correlations(rows([5, 9, 6, 8, 7, 7, 8, 6, 9, 5, 7, 7]))
    assert count == 12
    assert rising[0][0] == pytest.approx(1.0)
    assert rising[0][1] < 1e-6
    assert abs(flat[0][0]) < 0.3
    assert flat[0][1] > 0.3


def test_what_is_far_above_or_uncertain_up_to_there_does_not_flatten_a_plot() -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    level = [(1.0 + 0.01 * number, 0.1) for number in range(30)]
    assert plots._cut(axes, level) == ""
    assert plots._cut(axes, [*level, (1.2, 5.0)]) == "\n(1 far above is not shown)"
    low, high = axes.get_ylim()
    assert 0.8 < low < 0.9
    assert 1.39 < high < 1.5
