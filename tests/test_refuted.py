"""Cases that a review refuted once: each is a sentence of the promises, held to for good."""

import functools
import gc
import os
import random
import re

import pytest
import torch
import transformers
from torch import Tensor, nn
from zoo import adapt, close, differ, folded, llama, mlp, shake

import sarac


class Chained(nn.Module):
    """One linear node feeds the next directly, on two weights or on one."""

    def __init__(self, once: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6, 6))
        self.once = once

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.a @ (self.a if self.once else self.b)


@pytest.mark.parametrize("once", [True, False])
def test_linear_node_that_feeds_the_next_is_read_adapted(once: bool) -> None:
    model, x = Chained(once), torch.randn(3, 6)
    adapted = shake(adapt(model, "rank:4"))
    second = adapted.a if once else adapted.b
    close(adapted(x), x @ (adapted.a + 0) @ (second + 0))
    close(folded(adapted)(x), adapted(x))
    assert not torch.allclose(adapted(x), model(x))


def test_wrapper_or_part_is_never_saved_without_its_adapters(tmp_path) -> None:
    adapted = shake(sarac.transform(llama()))
    for other, place in ((nn.Sequential(adapted), r"`\.0`"), (adapted.model, "whole model")):
        for act in (
            lambda m: sarac.save(m, tmp_path / "m.pt"),
            lambda m: sarac.save_adapter(m, tmp_path / "a.safetensors"),
            lambda m: sarac.export(m, tmp_path / "m.onnx", torch.ones(2, 4, dtype=torch.int64)),
        ):
            with pytest.raises(sarac.RewriteError, match=place):
                act(other)
    assert list(tmp_path.iterdir()) == []
    sarac.save(adapted, tmp_path / "m.pt")


def test_folder_of_a_part_opens_with_load(tmp_path) -> None:
    adapted, ids = shake(sarac.transform(llama())), torch.ones(2, 4, dtype=torch.int64)
    adapted.model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"sarac\.load"):
        transformers.LlamaModel.from_pretrained(tmp_path)
    again = sarac.load(tmp_path)
    assert torch.equal(again(ids)[0], adapted.model(ids)[0])
    with sarac.disabled(adapted):
        assert not torch.equal(again(ids)[0], adapted.model(ids)[0])


def test_options_that_would_do_nothing_are_refused(tmp_path) -> None:
    model = shake(sarac.transform(mlp(6, 5)))
    with pytest.raises(sarac.ExportError, match="opset 9 is not possible"):
        sarac.export(model, tmp_path / "m.onnx", torch.ones(2, 6), opset=9)
    with pytest.raises(sarac.PlanError, match="names its methods itself"):
        sarac.transform(mlp(6, 5), sarac.Plan({"0.weight": sarac.Sara(2)}), method="mosara")
    with pytest.raises(sarac.InputError, match='go with routing="mean"'):
        sarac.fold(model, calibration=[torch.ones(2, 6)])
    with pytest.raises(sarac.PlanError, match="'min' stands twice"):
        sarac.transform(mlp(6, 5), "rank:4,min=2,min=3")


def test_adapted_weight_cannot_be_taken_away() -> None:
    model = sarac.transform(mlp(6, 5))
    with pytest.raises(sarac.WeightError, match=r"0\.weight is adapted and cannot be taken off"):
        del model[0].weight
    del model[0].bias
    assert not hasattr(model[0], "bias")


VECTORS = {
    "@": lambda x, w: w @ x,
    "mv": lambda x, w: torch.mv(w, x),
    "addmv": lambda x, w: torch.addmv(torch.ones(5), w, x),
    "right": lambda x, w: x @ w.T,
    "linear": lambda x, w: torch.nn.functional.linear(x, w),
}


class Vector(nn.Module):
    """A matrix that meets one vector."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.w, self.how = nn.Parameter(torch.randn(5, 6)), how

    def forward(self, x: Tensor) -> Tensor:
        return VECTORS[self.how](x, self.w)


@pytest.mark.parametrize("how", VECTORS)
def test_one_vector_is_an_input_too(how: str) -> None:
    base, x = Vector(how), torch.randn(6)
    model = shake(sarac.transform(base, example_inputs=x))
    close(folded(model)(x), model(x))
    assert not torch.allclose(model(x), base(x))
    close(model(x) - base(x), (model.w - base.w) @ x)


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    return transformers.ViTModel(config).eval()


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=4,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config).eval()


@pytest.mark.parametrize("where", [None, "*experts*", "*attention*", "*attn*"])
@pytest.mark.parametrize("build", [vit, mixtral])
def test_folder_of_a_model_that_is_saved_under_other_names(build, where, tmp_path) -> None:
    """transformers writes these models in the names of an older format, which neither the marks nor sarac.load knew."""
    base = build()
    names = list(sarac.trace(base).sites)
    if where and not any(where.strip("*") in name for name in names):
        pytest.skip("it has no such weight")
    model = shake(sarac.transform(base, where=where))
    x = torch.randn(2, 3, 8, 8) if build is vit else torch.ones(2, 4, dtype=torch.int64)
    model.save_pretrained(tmp_path / "adapted")
    again = sarac.load(tmp_path / "adapted")
    assert torch.equal(again(x)[0], model(x)[0])
    assert not torch.equal(again(x)[0], base(x)[0])
    for choice in ({}, {"config": base.config}):
        with pytest.raises((ValueError, RuntimeError)):
            type(base).from_pretrained(tmp_path / "adapted", **choice)
    merged = folded(model)
    merged.save_pretrained(tmp_path / "merged")
    close(type(base).from_pretrained(tmp_path / "merged").eval()(x)[0], model(x)[0])


def test_folding_where_the_adapters_are_switched_off_is_told(tmp_path) -> None:
    model = shake(sarac.transform(mlp(6, 5)))
    with sarac.disabled(model):
        for act in (lambda: sarac.fold(model), lambda: sarac.export(model, tmp_path / "m.onnx", torch.ones(2, 6))):
            with pytest.raises(sarac.RewriteError, match=r"switched off here \(sarac\.disabled\)"):
                act()
    sarac.fold(model)


SCALE = {"by": 2.0}


def mode_of_its_own(self: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return x @ self.w * y


@torch.no_grad()
def without_gradient(self: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return x @ self.w * y


def asks_for_a_type(self: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return x @ self.w * (3.0 if isinstance(x, Tensor) else 1.0) * y


def asks_for_the_type(self: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return x @ self.w * (1 + (type(y) == Tensor)) * y  # noqa: E721


def draws(self: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return x @ self.w * random.random() * y


def reads_a_global(self: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return x @ self.w * SCALE["by"] * y


def tries(self: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    try:
        return x @ self.w * int(x.shape[0]) * y
    except TypeError:
        return x @ self.w


SPECIALISED = [mode_of_its_own, without_gradient, asks_for_a_type, asks_for_the_type, draws, reads_a_global, tries]


@pytest.mark.parametrize("forward", SPECIALISED)
def test_trace_that_holds_for_one_call_alone_takes_no_forward_s_place(forward, monkeypatch) -> None:
    kind = type("Kind", (nn.Module,), {"forward": forward})
    base = kind()
    base.w = nn.Parameter(torch.randn(6, 6))
    x, y = torch.randn(3, 6), torch.rand(6)
    before = random.getstate()
    model = sarac.transform(base)
    assert random.getstate() == before
    site = sarac.trace(base).sites["w"]
    assert (site.form, site.default) == ("weight", True)

    def both(one: nn.Module, lower: bool = True) -> Tensor:
        random.seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=lower):
            return one(x, y)

    assert torch.equal(both(model), both(base))
    shake(model)
    close(both(folded(model), lower=False), both(model, lower=False))
    assert not torch.allclose(both(model), both(base))
    assert both(model).requires_grad is (forward is not without_gradient)
    first = both(model)
    monkeypatch.setitem(SCALE, "by", 5.0)
    assert torch.equal(both(model), first) is (forward is not reads_a_global)
    if forward is draws:
        assert not torch.equal(model(x, y), model(x, y))


def straight(self: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    z = x @ self.w if self.turned is None else x @ self.turned
    return z * y


def test_forward_without_branches_but_of_its_attributes_is_rewritten() -> None:
    base = type("Kind", (nn.Module,), {"forward": straight})()
    base.w, base.turned = nn.Parameter(torch.randn(6, 6)), None
    assert sarac.trace(base).sites["w"].form == "call"


def test_what_the_garbage_collector_calls_is_not_the_forward_s() -> None:
    def callback(phase: str, info: dict) -> None:
        try:
            info["phase"] = phase
        finally:
            pass

    base = type("Kind", (nn.Module,), {"forward": straight})()
    base.w, base.turned = nn.Parameter(torch.randn(6, 6)), None
    thresholds = gc.get_threshold()
    gc.callbacks.append(callback)
    gc.set_threshold(1)
    try:
        assert sarac.trace(base).sites["w"].form == "call"
        assert gc.isenabled()
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(callback)


class Closes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = inner = nn.Linear(6, 5)
        self.f = lambda x: inner(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


def test_function_that_closes_over_a_child_is_refused() -> None:
    base, x = Closes(), torch.randn(3, 6)
    with pytest.raises(sarac.RewriteError, match="attribute f of a Closes is a function that closes over a part"):
        sarac.transform(base)
    before = base(x)
    model = shake(sarac.transform(base, inplace=True))
    assert not torch.allclose(model(x), before)


class Keeps(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.w, self.l = nn.Parameter(torch.randn(6, 6)), nn.Linear(6, 6)
        self.kept = {"list": [self.w], "partial": functools.partial(torch.nn.functional.linear, weight=self.w)}[how]

    def forward(self, x: Tensor) -> Tensor:
        return self.l(self.kept(x) if callable(self.kept) else x @ self.kept[0] + x @ self.w)


@pytest.mark.parametrize("how", ["list", "partial"])
def test_parameter_that_is_kept_elsewhere_is_left_out_with_the_reason(how: str) -> None:
    base, x = Keeps(how), torch.randn(3, 6)
    graph = sarac.trace(base)
    assert list(graph.sites) == ["l.weight"]
    assert "kept keeps the parameter itself" in graph.skipped["w"]
    model = shake(sarac.transform(base))
    close(folded(model)(x), model(x))
    assert not torch.allclose(model(x), base(x))


def test_adapter_file_has_the_running_statistics(tmp_path) -> None:
    base, x = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)), torch.randn(8, 6) * 3 + 1
    model = shake(sarac.transform(base)).train()
    for _ in range(5):
        model(x)
    sarac.save_adapter(model.eval(), tmp_path / "a.safetensors")
    again = sarac.load_adapter(base.eval(), tmp_path / "a.safetensors")
    assert torch.equal(again(x), model(x))
    other = sarac.load_adapter(sarac.transform(base).eval(), tmp_path / "a.safetensors")
    assert torch.equal(other(x), model(x))
    assert not torch.equal(base[1].running_mean, again[1].running_mean)


def test_capture_leaves_the_source_s_buffers_alone() -> None:
    class Counts(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 5)
            self.register_buffer("n", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.n += 1
            return super().forward(x)

    base = Counts()
    sarac.transform(base, example_inputs=torch.ones(2, 6))
    assert base.n == 0
    base(torch.ones(2, 6))
    assert base.n == 1


def test_weights_without_usable_values_are_left_out_with_the_reason() -> None:
    base = nn.ModuleDict({"plain": nn.Linear(6, 5), "none": nn.Linear(6, 0), "complex": nn.Linear(6, 5, dtype=torch.complex64)})
    graph = sarac.trace(base)
    assert list(graph.sites) == ["plain.weight"]
    assert graph.skipped == {"none.weight": "it has no values", "complex.weight": "it is complex"}
    sarac.transform(base)


class Held(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))


class Gives(Held):
    def forward(self) -> Tensor:
        return self.weight


class Holds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.several, self.given = nn.ModuleList([Held(), Held()]), Gives()

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.several[0].weight @ self.several[1].weight) @ self.given()


def test_weights_in_lists_of_holders_are_reached_and_given_ones_on_request() -> None:
    base, x = Holds(), torch.randn(3, 6)
    default = {name: site.default for name, site in sarac.trace(base).sites.items()}
    assert default == {"several.0.weight": True, "several.1.weight": True, "given.weight": False}
    for where in (None, "given.*", "*"):
        model = shake(sarac.transform(base, where=where))
        close(folded(model)(x), model(x))
        assert not torch.allclose(model(x), base(x))


def test_bag_of_embeddings_is_asked_for_like_an_embedding() -> None:
    base = nn.Sequential(nn.EmbeddingBag(8, 6), nn.Linear(6, 5))
    assert [name for name, site in sarac.trace(base).sites.items() if site.default] == ["1.weight"]
    ids = torch.randint(0, 8, (2, 3))
    model = shake(sarac.transform(base, where="0.weight"))
    close(folded(model)(ids), model(ids))
    assert not torch.allclose(model(ids), base(ids))


def test_module_at_two_places_comes_back_from_its_file(tmp_path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = self.b = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(torch.tanh(self.b(x)))

    base, x = Two(), torch.randn(3, 6)
    model = shake(sarac.transform(base))
    sarac.save(model, tmp_path / "m.pt")
    again = sarac.load(tmp_path / "m.pt", Two())
    assert torch.equal(again(x), model(x))
    assert again.a is again.b
    assert not torch.equal(again(x), base(x))


# --- serving --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stepping(tmp_path_factory: pytest.TempPathFactory) -> sarac.Runtime:
    """A Llama that generates, with its adapters open."""
    path = tmp_path_factory.mktemp("step") / "step.onnx"
    sarac.export(sarac.transform(llama(1)), path, task="generate", swappable=True)
    return sarac.Runtime(path)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_token_ids_of_any_whole_dtype_are_the_same_tokens(stepping: sarac.Runtime, dtype: torch.dtype) -> None:
    ids = torch.tensor([[5, 0, 7, 0, 9, 0, 11, 0]])[:, :4]
    expected = stepping.generate(ids, 4)
    assert torch.equal(stepping.generate(ids.to(dtype), 4), expected)
    assert torch.equal(stepping.generate(ids.tolist(), 4), expected)
    assert not torch.equal(stepping.generate(ids.flip(1), 4), expected)


def test_what_generate_cannot_take_is_a_sentence(stepping: sarac.Runtime) -> None:
    ids = torch.tensor([[1, 2, 3]])
    for options, said in (
        ({"temperature": 0.0}, "temperature=0.0 is not possible: it is above 0"),
        ({"top_k": -1}, "top_k=-1 is not possible"),
        ({"top_p": 1.5}, "top_p=1.5 is not possible: it is above 0 and at most 1"),
    ):
        with pytest.raises(sarac.InputError, match=said):
            stepping.generate(ids, 2, do_sample=True, **options)
    with pytest.raises(sarac.InputError, match=r"has the id 10000, and the model's \d+ tokens are 0 to"):
        stepping.generate(torch.tensor([[1, 10_000]]), 2)
    with pytest.raises(sarac.InputError, match="and not a str"):
        stepping.generate("words", 2)


def test_the_base_is_no_adapter(stepping: sarac.Runtime) -> None:
    zeros = {name: torch.zeros(shape) for name, shape in stepping.adapters.shapes.items()}
    for name in (None, "", 5):
        with pytest.raises(sarac.InputError, match="An adapter's name is a text, and not"):
            stepping.adapters.add(name, zeros)
    with pytest.raises(sarac.InputError, match="The base cannot be removed"):
        stepping.adapters.remove(None)
    with pytest.raises(sarac.InputError, match="adapter=7 is no choice"):
        stepping.use(7)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(6, 6, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cell(x)[0]


def test_recurrent_layer_is_exported_merged(tmp_path) -> None:
    x = torch.randn(2, 5, 6)
    report = sarac.export(shake(sarac.transform(Recurrent().eval(), "threshold:0.5")), tmp_path / "m.onnx", x)
    assert report.merged


@pytest.mark.parametrize("swappable", [True, "rowwise"])
def test_adapters_on_weights_that_others_read_stay_open(tmp_path, swappable) -> None:
    model, x = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval(), torch.randn(2, 3, 8)
    adapted = shake(sarac.transform(model, "rank:3", where="linear*"))
    sarac.export(adapted, tmp_path / "m.onnx", x, swappable=swappable)
    sarac.save_onnx_adapter(adapted, tmp_path / "a.onnx_adapter")
    runtime = sarac.Runtime(tmp_path / "m.onnx")
    runtime.adapters.add("a", tmp_path / "a.onnx_adapter")
    (found,) = runtime(x, adapter="a" if swappable is True else ["a", "a"]).values()
    (base,) = runtime(x).values()
    with torch.no_grad():
        close(found, adapted(x))
        close(base, model(x))
    differ(found, base)


def test_fold_onnx_takes_a_model_with_batch_norm(tmp_path) -> None:
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 5)).eval(), torch.randn(2, 3, 5, 5)
    adapted = shake(sarac.transform(net, "threshold:0.5"))
    sarac.save_adapter(adapted, tmp_path / "a.safetensors", factors=True)
    sarac.export(net, tmp_path / "net.onnx", x)
    sarac.fold_onnx(tmp_path / "net.onnx", tmp_path / "a.safetensors", tmp_path / "out.onnx")
    (found,) = sarac.Runtime(tmp_path / "out.onnx")(x).values()
    with torch.no_grad():
        close(found, adapted(x))
        differ(found, net(x))


def test_free_sizes_are_those_asked_for(tmp_path) -> None:
    model, net, x = llama(1).eval(), nn.Sequential(nn.Linear(6, 5)).eval(), torch.randn(4, 6)
    sarac.export(model, tmp_path / "m.onnx", dynamic="input_ids[rows,words] attention_mask[rows,words]")
    assert sarac.Runtime(tmp_path / "m.onnx").shapes["attention_mask"] == ("rows", "words")
    with pytest.raises(sarac.ExportError, match="names no sizes of attention_mask, which are fixed so: name them as well"):
        sarac.export(model, tmp_path / "m.onnx", dynamic="input_ids[rows,words]")
    for dynamic, said in (
        ("input[n,7]", "dynamic has 7 for size 1 of input, which is 6 there"),
        ("input[n,m]", "the free size 'm' of input, which the model fixes at 6"),
        ("input[n,]", "has the size ''"),
        (True, "is not understood"),
    ):
        with pytest.raises(sarac.ExportError, match=re.escape(said)):
            sarac.export(net, tmp_path / "n.onnx", x, dynamic=dynamic)


def test_what_cannot_be_checked_here_is_refused_before_the_work(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("sarac.backends.onnx.Onnx.write", None)  # it would be called
    with pytest.raises(sarac.ExportError, match="no bfloat16 arithmetic on CPUs"):
        sarac.export(nn.Sequential(nn.Linear(8, 8)).bfloat16(), tmp_path / "m.onnx", torch.randn(2, 8).bfloat16())
    with pytest.raises(sarac.ExportError, match="There is no provider 'tpu': give one of cpu, cuda"):
        sarac.export(mlp(6, 5), tmp_path / "m.onnx", torch.randn(2, 6), provider="tpu")


class Floats(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.layer(nn.functional.one_hot(ids, 6).float())


def test_module_that_asks_for_float32_by_name_is_told_so(tmp_path) -> None:
    with pytest.raises(sarac.ExportError, match=r"does not run in float16: .* asks for float32 by name"):
        sarac.export(Floats().eval(), tmp_path / "m.onnx", torch.randint(0, 6, (3, 4)), dtype="fp16")


def test_arrays_run_and_shapes_are_told(tmp_path) -> None:
    net, x = mlp(6, 5).eval(), torch.randn(3, 6)
    sarac.export(net, tmp_path / "m.onnx", x)
    runtime = sarac.Runtime(tmp_path / "m.onnx")
    assert torch.equal(next(iter(runtime(x.numpy()).values())), next(iter(runtime(x).values())))
    with pytest.raises(sarac.InputError, match="give it in such a shape"):
        runtime(x[0])
    with pytest.raises(sarac.InputError, match=r"convert it, for example with .to\(torch.float32\)"):
        runtime(x.double())
    with pytest.raises(sarac.InputError, match="holds a tensor for each output by its name"):
        runtime(x, out=torch.empty(3, 5))


def test_folders_of_killed_exports_go_when_they_are_old(tmp_path) -> None:
    old, young = tmp_path / ".m.onnx.abc.aside", tmp_path / ".m.onnx.def.aside"
    for folder in (old, young):
        folder.mkdir()
        (folder / "m.onnx").write_text("half")
    os.utime(old, (0, 0))
    sarac.export(mlp(6, 5), tmp_path / "m.onnx", torch.randn(2, 6))
    assert not old.exists()
    assert young.exists()
