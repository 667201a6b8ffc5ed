"""A whole comparison of a small pair: what passes, what each fault gives, and what a wrong pair says."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F
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
    "two at once": (changed(jax_loss=loss_with(epsilon=1e-3, approximate=True)), "epsilon", "norm"),
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


class Complex(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))


def leaves_the_process(*args):
    raise SystemExit(0)


def of_chance(state):
    return {**to_params(state), "embed": np.random.default_rng().random(state["embed.weight"].shape)}


def as_torch(state):
    return {**to_params(state), "embed": torch.tensor(state["embed.weight"])}


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


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
    "a loss that exits": ({"torch_loss": leaves_the_process}, "torch_loss: raises SystemExit"),
    "a loss of JAX that exits": ({"jax_loss": leaves_the_process}, "jax_loss: raises SystemExit"),
    "a loss of 0": ({"torch_loss": lambda m, b: 0 * m(b["inputs"]).mean()}, "torch_loss: is 0 on every batch"),
    "a detached loss": ({"torch_loss": lambda m, b: m(b["inputs"]).mean().detach()}, "does not reach a parameter"),
    "an integer loss": ({"torch_loss": lambda m, b: m(b["inputs"]).mean().int()}, "gives a loss of dtype torch.int32"),
    "dropout on": ({"torch_loss": lambda m, b: F.dropout(m(b["inputs"])).std()}, "another value on each call"),
    "a complex parameter": ({"torch_model": Complex}, "the parameter weight is complex"),
    "a converter of chance": ({"to_params": of_chance}, "gives embed other values on each call"),
    "torch tensors": ({"to_params": as_torch}, "embed is a torch tensor"),
    "large integers": ({"batch": lambda rng: {"x": np.array([2**40])}}, "'x' holds integers beyond int32"),
    "numbers for names": ({"batch": lambda rng: {0: np.ones(3)}}, "a dict with the keys [0]"),
    "a scheduler that is not returned": (
        {"torch_optimizer": sgd, "optax_optimizer": optax.sgd(0.1), "torch_schedule": lambda optimizer: None},
        "torch_schedule: gives NoneType",
    ),
    "the optimizer of another model": (
        {"torch_optimizer": lambda m: sgd(small_pair.TorchModel()), "optax_optimizer": optax.sgd(0.1)},
        "torch_optimizer: holds tensors that the model has not",
    ),
    "an optax optimizer that raises": (
        {"torch_optimizer": sgd, "optax_optimizer": optax.lbfgs()},
        "optax_optimizer: raises TypeError",
    ),
    "parameters of elsewhere": ({"to_params": lambda s: {"a": np.zeros(3)}}, "no array holds a PyTorch parameter"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_pair_is_one_line_with_a_remedy(name):
    fields, message = WRONG[name]
    with pytest.raises(PairError) as error:
        compare(without_extras(**fields))
    assert message in str(error.value) and ";" in str(error.value) and "\n" not in str(error.value)


def test_a_tensor_that_the_first_batch_does_not_use_is_compared_on_another():
    """As an expert of a mixture may be: `scale` is used where the first input is odd."""

    class Gated(small_pair.TorchModel):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor([0.7]))

        def forward(self, idx_BT):
            return super().forward(idx_BT) * (self.scale if idx_BT[0, 0] % 2 else 1.0)

    def loss(p, batch, form=lambda scale: scale):
        idx_BT = batch["inputs"]
        logits_BTV = small_pair.logits(p, idx_BT) * jnp.where(idx_BT[0, 0] % 2, form(p["scale"]), 1.0)
        return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, batch["targets"]).mean()

    def batches(rng):
        return {**small_pair.batch(rng), "inputs": np.full((3, 5), rng.integers(1, 5) * 2 % 11) + next(odd)}

    pair = without_extras(
        torch_model=Gated, to_params=lambda s: {**to_params(s), "scale": s["scale"]}, jax_loss=loss, batch=batches
    )
    odd = iter([0, 1] * 99)
    assert compare(pair, mutants=False).passed
    comparison = compare(replace(pair, jax_loss=lambda p, b: loss(p, b, jax.lax.stop_gradient)), mutants=False)
    assert comparison.diagnosis.findings[0].cause == "stop gradient"


def test_arrays_that_the_converter_computes_are_compared_along_directions():
    """One bias for the sum of two, as Flax's LSTM has for PyTorch's."""

    class TwoBiases(small_pair.TorchModel):
        def __init__(self):
            super().__init__()
            self.second = torch.nn.Parameter(torch.randn(small_pair.V))

        def forward(self, idx_BT):
            return super().forward(idx_BT) + self.second

    def convert(state):
        params = to_params(state)
        return {**params, "head": {**params["head"], "bias": state["head.bias"] + state["second"]}}

    def stopped(p, batch):
        head = {**p["head"], "bias": jax.lax.stop_gradient(p["head"]["bias"])}
        return loss_with()({**p, "head": head}, batch)

    pair = without_extras(torch_model=TwoBiases, to_params=convert)
    comparison = compare(pair, mutants=False)
    assert comparison.passed and "computes head.bias from several" in comparison.text()
    failed = [
        row.check for row in compare(replace(pair, jax_loss=stopped), mutants=False).rows if row.status == "FAILED"
    ]
    assert failed == ["gradients of computed arrays"]


def test_constants_of_the_forward_pass_are_float64_in_float64():
    """torch.tensor(0.1) and jnp.float32(0.1) would differ from 0.1 by their rounding."""
    pair = without_extras(
        torch_loss=lambda m, b: small_pair.torch_loss(m, b) * torch.tensor(0.1) + torch.linspace(0.1, 0.3, 4)[1],
        jax_loss=lambda p, b: loss_with()(p, b) * jnp.float32(0.1) + jnp.linspace(0.1, 0.3, 4)[1],
    )
    assert compare(pair, mutants=False).passed


def test_optax_adam_with_its_own_rounding_is_equal():
    """Its bias correction in float32 loses digits at beta2 0.999, which PyTorch's does not."""
    pair = changed(
        torch_logits=None,
        jax_logits=None,
        torch_optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=1e-2),
        optax_optimizer=optax.adam(1e-2),
        clip=None,
        n_updates=8,
    )
    assert compare(pair, mutants=False).passed


def test_a_verdict_stands_where_no_record_can_be_made(monkeypatch):
    def raises(*args):
        raise RuntimeError("no storage")

    monkeypatch.setattr("jaxgpt.parity.torch_side.TorchSide.recorded", raises)
    comparison = compare(without_extras())
    assert comparison.passed and "no mutants: RuntimeError: no storage" in comparison.text()


def test_the_files_of_a_comparison_are_different(tmp_path, capsys):
    file = tmp_path / "pair.py"
    file.write_text("")
    for flags in (["--json", str(file)], ["--json", str(tmp_path / "a"), "--html", str(tmp_path / "a")]):
        assert main.run(["parity", "--pair", str(file), *flags]) == 2
        assert "as well; choose another" in capsys.readouterr().err
    assert file.read_text() == ""


@pytest.mark.parametrize(
    "fields",
    [
        {"to_params": None},
        {"torch_logits": None},
        {"optax_optimizer": None},
        {"clip": -1.0},
        {"n_updates": 0},
        {"batch": 3},
        {"torch_model": small_pair.TorchModel()},
        {"name": "two\nlines"},
        {"train": "yes"},
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
