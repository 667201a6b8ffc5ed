"""A whole comparison of a small pair: what passes, what each fault gives, and what a wrong pair says."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from unit.parity import small_pair
from unit.parity.small_pair import PAIR, changed, loss_with, optimizer, to_params, without_extras

from jaxgpt import strict_json
from jaxgpt.cli import main
from jaxgpt.errors import UserError
from jaxgpt.parity.comparison import compare
from jaxgpt.parity.page import html
from jaxgpt.parity.pair import PairError, load_pair


def test_an_equal_pair_passes_at_every_level_and_its_mutants_are_caught():
    comparison = compare(PAIR)
    assert comparison.passed, comparison.text()
    assert all(not row.not_run for row in comparison.rows)
    levels = {row.check.partition(",")[0] for row in comparison.rows}
    assert levels == {"parameters", "forward", "loss", "gradients", "updates"}
    assert len(comparison.mutants) > 8 and all(mutant.caught for mutant in comparison.mutants)
    values = json.loads(strict_json.dumps(comparison.to_json()))
    assert {"level", "precision", "error", "torch_error", "ratio", "status"} <= set(values["rows"][0])
    assert values["diagnosis"] == [] and {"name", "caught", "signal"} <= set(values["mutants"][0])
    page = html(comparison)
    assert "small: equal" in page and "learning rate: times 1.01" in page and "http" not in page


FAULTS = {
    "epsilon": (changed(jax_loss=loss_with(epsilon=1e-6)), "epsilon", "norm"),
    "transposed": (
        changed(to_params=lambda s: {**to_params(s), "inner": {"kernel": s["inner.weight"], "bias": s["inner.bias"]}}),
        "kernel transposed",
        "inner",
    ),
    "stopped": (changed(jax_loss=loss_with(inner=jax.lax.stop_gradient)), "stop gradient", "inner"),
    "learning rate": (changed(optax_optimizer=optimizer(1.01e-3)), "learning rate", "optimizer"),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "epsilon")) for n in FAULTS])
def test_a_fault_is_diagnosed(name):
    pair, cause, layer = FAULTS[name]
    comparison = compare(pair)
    assert not comparison.passed and not comparison.mutants
    first = comparison.diagnosis.findings[0]
    assert (first.cause, first.layer) == (cause, layer) and first.left < 1e-7 < first.error
    values = json.loads(strict_json.dumps(comparison.to_json()))["diagnosis"][0]
    assert {"layer", "cause", "error_with_cause_removed"} <= set(values)
    assert cause in comparison.text() and cause in html(comparison)


@pytest.mark.slow
def test_a_converter_is_derived_and_printed():
    pair = without_extras(to_params=None, jax_params=lambda: to_params(random_state()))
    comparison = compare(pair)
    assert comparison.passed, comparison.text()
    names = {}
    exec(comparison.converter, names)
    state = random_state()
    equal = jax.tree.map(lambda a, b: bool((a == b).all()), names["to_params"](state), to_params(state))
    assert all(jax.tree.leaves(equal))
    kept = changed(
        to_params=names["to_params"], jax_params=pair.jax_params, torch_optimizer=None, optax_optimizer=None, clip=None
    )
    assert compare(kept, mutants=False).passed


def random_state() -> dict[str, np.ndarray]:
    torch.manual_seed(1)
    return {name: tensor.numpy() for name, tensor in small_pair.TorchModel().state_dict().items()}


def never_finite(p, batch):
    return jnp.log(-jnp.square(p["head"]["bias"][0]))


WRONG = {
    "loss of a vector": ({"torch_loss": lambda m, b: m(b["inputs"]).mean((0, 1))}, "torch_loss: gives a tensor"),
    "loss of JAX, a vector": ({"jax_loss": lambda p, b: p["head"]["bias"]}, "jax_loss: gives an array of shape (11,)"),
    "loss not finite": ({"torch_loss": lambda m, b: m(b["inputs"]).sum() * float("nan")}, "torch_loss: is not finite"),
    "loss of JAX not finite": ({"jax_loss": never_finite}, "jax_loss: is not finite"),
    "batch no dict": ({"batch": lambda rng: [1, 2]}, "batch: gives list"),
    "batch of words": ({"batch": lambda rng: {"x": np.array(["a"])}}, "batch: 'x' has dtype"),
    "a function that raises": ({"torch_loss": lambda m, b: m(b["input"])}, "raises KeyError: 'input' (test_pair"),
    "a loss of JAX that raises": ({"jax_loss": lambda p, b: p["tail"]}, "jax_loss: raises KeyError: 'tail' (test_pair"),
    "no model": ({"torch_model": lambda: 3}, "torch_model: gives int"),
    "no parameters": ({"to_params": lambda s: {"a": 1}}, "to_params: gives dict without an array"),
    "an array too few": ({"jax_params": lambda: {**to_params(random_state()), "z": np.zeros(2)}}, "to_params: lacks z"),
    "parameters of elsewhere": ({"to_params": lambda s: {"a": np.zeros(3)}}, "no array holds a PyTorch parameter"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_pair_is_one_line_with_a_remedy(name):
    fields, message = WRONG[name]
    with pytest.raises(PairError) as error:
        compare(without_extras(**fields))
    assert message in str(error.value) and ";" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"to_params": None},
        {"torch_logits": None},
        {"optax_optimizer": None},
        {"clip": -1.0},
        {"n_updates": 0},
        {"batch": 3},
    ],
)
def test_fields_that_do_not_go_together_are_refused(fields):
    with pytest.raises(UserError, match="^Pair "):
        replace(PAIR, **fields)


FILES = {
    "raises.py": ("1 / 0", "raises ZeroDivisionError: division by zero in line 1"),
    "syntax.py": ("def", "raises SyntaxError"),
    "missing.py": ("import no_such_package", "imports no_such_package, which is not installed"),
    "empty.py": ("", "has 0 pairs; define one"),
    "no_pair.txt": ("", "is no Python file"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_without_a_pair_is_one_line_with_a_remedy(tmp_path, name):
    text, message = FILES[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        load_pair(str(tmp_path / name))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_pair_is_found_by_its_name(tmp_path):
    file = tmp_path / "two.py"
    file.write_text("from unit.parity.small_pair import PAIR, changed\none, two = PAIR, changed(name='second')\n")
    assert load_pair(f"{file}:two").name == "second"
    with pytest.raises(UserError, match="no Pair named three; the file has"):
        load_pair(f"{file}:three")
    with pytest.raises(UserError, match="name one"):
        load_pair(str(file))


def test_torch_missing_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main.run(["parity", "--pair", "x.py"]) == 2
    assert "PyTorch is not installed" in capsys.readouterr().err
