"""The jaxlibs that compute wrong are refused, and the one installed computes the known case right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import versions
from jaxgpt.errors import UserError


def test_the_reduction_that_wrong_jaxlibs_get_wrong():
    """With jaxlib 0.10.2 and 0.11.0 the jitted sums are wrong, by about the values themselves, without any error."""
    with jax.enable_x64(True):
        rows = jnp.asarray(np.random.default_rng(0).standard_normal((16385, 3)))

        def square_sums(rows):
            return jax.vmap(lambda r: jnp.sum((jnp.eye(3) @ r) ** 2))(rows)

        right = (np.asarray(rows) ** 2).sum(axis=1)
        np.testing.assert_allclose(square_sums(rows), right, rtol=1e-14)
        np.testing.assert_allclose(jax.jit(square_sums)(rows), right, rtol=1e-14)


@pytest.mark.parametrize("version", ["0.10.2", "0.11.0", "0.11.0+local"])
def test_wrong_versions_are_named(monkeypatch, version):
    monkeypatch.setattr(versions.metadata, "version", lambda name: version)
    with pytest.raises(UserError, match="wrong sums"):
        versions.require_sound_jaxlib()


@pytest.mark.parametrize("version", ["0.10.1", "0.11.1", "0.12.0.1"])
def test_sound_versions_pass(monkeypatch, version):
    monkeypatch.setattr(versions.metadata, "version", lambda name: version)
    versions.require_sound_jaxlib()


@pytest.mark.parametrize("name", ["train", "generate", "evaluate"])
def test_commands_refuse_a_wrong_jaxlib(cli, monkeypatch, name):
    monkeypatch.setattr(versions.metadata, "version", lambda package: "0.10.2")
    done = cli(name, "--out-dir", "x")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "jaxlib 0.10.2" in done.stderr and "pip install" in done.stderr
