"""The library: lazy names, configurations from keywords, and what the functions refuse."""

import json
import subprocess
import sys

import numpy as np
import pytest

import jaxgpt
from jaxgpt.errors import UserError


def test_importing_the_library_imports_no_jax():
    """Nor does a configuration; and every name is there."""
    code = (
        "import sys, jaxgpt; jaxgpt.configure('tinygpt', steps=3); import jaxgpt.api; "
        "assert not {'jax', 'flax', 'orbax', 'datasets'} & set(sys.modules); "
        "assert set(jaxgpt.__all__) <= set(dir(jaxgpt)); print([getattr(jaxgpt, name) for name in jaxgpt.__all__])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        jaxgpt.trian  # noqa: B018


def test_configure_replaces_fields_of_the_preset_and_of_its_model():
    config = jaxgpt.configure("wikitext2", steps=7, n_layer=2)
    assert (config.steps, config.model.n_layer, config.model.n_embd, config.tokenizer) == (7, 2, 256, "gpt2")
    assert jaxgpt.configure() == jaxgpt.configure("minigpt")


@pytest.mark.parametrize(
    "preset, flags, message",
    [
        ("minigtp", {}, "--preset minigtp: unknown preset"),
        ("minigpt", {"stesp": 3}, "stesp: no such field; did you mean steps?"),
        ("minigpt", {"steps": 0}, "--steps 0"),
        ("minigpt", {"n_head": 3}, "--model.n-embd 64"),
    ],
)
def test_configure_refuses(preset, flags, message):
    with pytest.raises(UserError, match=message):
        jaxgpt.configure(preset, **flags)


@pytest.fixture(scope="module")
def model(trained):
    return jaxgpt.load(trained)


def test_a_loaded_model_evaluates_as_the_command_does(model, trained, cli):
    whole = json.loads(cli("evaluate", trained, "--json").stdout)
    found = jaxgpt.evaluate(model)
    assert (found.loss, found.perplexity, found.tokens) == (whole["loss"], whole["ppl"], whole["tokens"])
    assert model.step == 60 and model.config.model.n_embd == 16


@pytest.mark.slow
def test_logits_are_those_that_the_greedy_text_follows(model, text):
    prompt = text[:5]
    (found,) = jaxgpt.generate(model, prompt, max_new_tokens=3, temperature=0)
    ids = model.tokenizer.encode(prompt + found.text)
    logits_TV = jaxgpt.logits(model, prompt + found.text)
    assert logits_TV.shape == (8, model.tokenizer.vocab_size) and logits_TV.dtype == np.float32
    assert (logits_TV.argmax(1)[4:7] == ids[5:]).all()
    assert (jaxgpt.logits(model, ids) == logits_TV).all()
    batch = jaxgpt.logits(model, np.stack([ids, ids]))
    assert batch.shape == (2, *logits_TV.shape) and np.abs(batch - logits_TV).max() < 1e-5
    assert "".join(jaxgpt.stream(model, prompt, max_new_tokens=3, temperature=0)) == found.text


def test_what_the_functions_refuse(model):
    for ids in ([], [0] * 17, [[[0]]]):
        with pytest.raises(UserError, match="logits: the ids have the shape"):
            jaxgpt.logits(model, np.array(ids, np.int64))
    for ids in ([-1], [model.tokenizer.vocab_size], [0.5]):
        with pytest.raises(UserError, match="logits: the ids must be whole numbers from 0 to"):
            jaxgpt.logits(model, ids)
    with pytest.raises(UserError, match="generate: there is no temprature"):
        jaxgpt.generate(model, "la", temprature=1)
    with pytest.raises(UserError, match="--min-p 2"):
        jaxgpt.generate(model, "la", min_p=2)
    with pytest.raises(UserError, match="--stride 99"):
        jaxgpt.evaluate(model, stride=99)
    with pytest.raises(UserError, match="load ./nothing: "):
        jaxgpt.load("./nothing")


@pytest.mark.slow
def test_an_exported_model_is_loaded_without_a_run(model, text_file, tmp_path):
    """Hugging Face's folder of a run gives the run's logits and text; it has no data of its own to be evaluated on."""
    jaxgpt.export_run(model.run.path, tmp_path / "hf")
    again = jaxgpt.load(tmp_path / "hf")
    assert again.run is None and again.config.model.n_embd == 16
    assert np.abs(jaxgpt.logits(again, "la ti mo") - jaxgpt.logits(model, "la ti mo")).max() < 1e-5
    (text,), (expected,) = (list(jaxgpt.generate(m, "la ", max_new_tokens=20, temperature=0)) for m in (again, model))
    assert text == expected
    with pytest.raises(UserError, match="evaluate: the model is no run's"):
        jaxgpt.evaluate(again)
    whole, expected = jaxgpt.evaluate(again, dataset=f"file:{text_file}"), jaxgpt.evaluate(model)
    assert whole.tokens == expected.tokens and whole.loss == pytest.approx(expected.loss, rel=1e-6)
    run = jaxgpt.import_run(str(tmp_path / "hf"), tmp_path / "run")
    assert np.abs(jaxgpt.logits(jaxgpt.load(run), "la ti mo") - jaxgpt.logits(model, "la ti mo")).max() < 1e-5
