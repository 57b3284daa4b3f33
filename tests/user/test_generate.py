"""`generate` of transformers on adapted models: greedy, beams, static cache, sampling; encoders with decoders too."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from user.methods import FOLDABLE, METHODS, adapted, base, batch, fresh
from zoo import close, differ, gpt2, llama, same, t5

import sarac

BUILDS = {"llama": llama, "gpt2": gpt2, "t5": t5}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "static": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "sampled": {"do_sample": True, "top_k": 8},
}


trained = functools.cache(lambda method, build: adapted(method, BUILDS[build]).eval())  # the tests here read it only
folded = functools.cache(lambda method, build: sarac.fold(trained(method, build)))
plain = functools.cache(lambda build: base(BUILDS[build]))


def generated(model: Any, **options: Any) -> Any:
    """Tokens and logits of a few steps, from a fixed seed."""
    start = batch(3, 4)
    fixed = {"pad_token_id": 0, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "output_logits": True}
    fixed |= {"decoder_start_token_id": 0} if model.config.is_encoder_decoder else {}
    torch.manual_seed(11)
    return model.generate(
        start, attention_mask=torch.ones_like(start), return_dict_in_generate=True, **{**fixed, **options}
    )  # fmt: skip


def logits(found: Any) -> list[Tensor]:
    return [step[step.isfinite().all(-1)] for step in found.logits]


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("method", METHODS)
def test_untrained_model_generates_what_its_base_does(build: str, method: str) -> None:
    found, expected = generated(fresh(method, BUILDS[build])), generated(plain(build))
    same(list(found.logits), list(expected.logits))
    assert torch.equal(found.sequences, expected.sequences)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("build", "method"), [(b, m) for b in BUILDS for m in FOLDABLE])
def test_trained_model_generates_what_the_folded_one_does(build: str, method: str, way: str) -> None:
    found, expected = generated(trained(method, build), **WAYS[way]), generated(folded(method, build), **WAYS[way])
    assert torch.equal(found.sequences, expected.sequences)
    close(logits(found), logits(expected))
    other = generated(plain(build), **WAYS[way])
    differ(found.logits[0], other.logits[0])
    assert not torch.equal(found.sequences, other.sequences)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "no cache"])
@pytest.mark.parametrize("build", BUILDS)
def test_routed_model_generates_alike_with_and_without_cache(build: str, way: str) -> None:
    model = trained("mosara", build)
    found = generated(model, **WAYS[way])
    expected = generated(model, **{**WAYS[way], "cache_implementation": None, "use_cache": False})
    assert torch.equal(found.sequences, expected.sequences)
    close(logits(found), logits(expected))
    other = generated(plain(build), **WAYS[way])
    differ(found.logits[0], other.logits[0])
    assert not torch.equal(found.sequences, other.sequences)


@pytest.mark.parametrize("method", METHODS)
def test_disabled_model_generates_as_its_base(method: str) -> None:
    model = trained(method, "llama")
    on = generated(model)
    with sarac.disabled(model):
        found = generated(model)
    assert torch.equal(found.sequences, generated(plain("llama")).sequences)
    assert not torch.equal(found.sequences, on.sequences)
