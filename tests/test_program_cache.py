"""Compiled programs are kept between starts where that is sound, and a damaged one costs time only."""

import importlib.util
import os
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path

import pytest

from jaxgpt import program_cache

KEPT_ON_CPU = tuple(int(n) for n in metadata.version("jaxlib").split(".")[:2]) >= (0, 12)
needs_cache = pytest.mark.skipif(not KEPT_ON_CPU, reason="jaxlib before 0.12: no cache on CPU")

# A start: compiles or loads one program, and tells how often it found one in the cache.
START = """
import sys
from pathlib import Path
import jax
import jax.numpy as jnp
from jaxgpt.program_cache import keep_programs

loaded = []
jax.monitoring.register_event_listener(lambda event, **_: loaded.append(event))
keep_programs(Path(sys.argv[1]))
print(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.linspace(0, 1, 24).reshape(4, 6).T @ jnp.ones((4, 6)))[0, 0].item().hex())
print(loaded.count("/jax/compilation_cache/cache_hits"))
"""


def begin(folder, **env):
    """One start with the cache below `folder`: the number computed, how many programs were loaded, and stderr."""
    own = {k: v for k, v in os.environ.items() if not k.startswith("JAX")}
    line = [sys.executable, "-c", START, str(folder)]
    done = subprocess.run(line, env={**own, "JAX_PLATFORMS": "cpu", **env}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    number, hits = done.stdout.split()
    return number, int(hits), done.stderr


def entries(folder):
    return sorted(path for path in folder.rglob("*-cache"))


@needs_cache
def test_a_second_start_loads_what_the_first_compiled(tmp_path):
    first, second = begin(tmp_path), begin(tmp_path)
    assert first[1] == 0 and second[1] == len(entries(tmp_path)) > 1
    assert first[0] == second[0] and first[2] == second[2] == ""
    kind = f"{program_cache._processor()}-{sys.version_info.major}.{sys.version_info.minor}"
    assert {path.parent.name for path in entries(tmp_path)} == {kind}


@needs_cache
@pytest.mark.parametrize(
    "damage, filters",
    [("empty", ""), ("zeros", ""), ("a bit", ""), ("half", ""), ("half", "ignore"), ("half", "error::UserWarning")],
)
def test_a_damaged_program_is_made_anew_without_a_word(tmp_path, damage, filters):
    if damage == "a bit" and any(map(importlib.util.find_spec, ("zstandard", "compression"))):
        pytest.skip("JAX then compresses without a checksum")
    sound = begin(tmp_path)[0]
    for path in entries(tmp_path):
        whole = path.read_bytes()
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        damaged = {"empty": b"", "zeros": b"\x00" * 50, "half": whole[:middle], "a bit": flipped}
        path.write_bytes(damaged[damage])
    number, hits, stderr = begin(tmp_path, PYTHONWARNINGS=filters)
    assert (number, hits, stderr) == (sound, 0, "")
    assert begin(tmp_path)[1] == len(entries(tmp_path))


@needs_cache
def test_the_users_own_settings_go_before(tmp_path):
    begin(tmp_path / "ours", JAX_ENABLE_COMPILATION_CACHE="0")
    assert not entries(tmp_path)
    theirs = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "theirs"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    begin(tmp_path / "ours", **theirs)
    assert not entries(tmp_path / "ours") and entries(tmp_path / "theirs")
    begin(tmp_path / "ours", JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="60")
    assert not entries(tmp_path / "ours")


@needs_cache
def test_a_folder_that_others_can_write_to_is_not_trusted(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    assert begin(shared / "xla")[1] == 0 and not entries(shared)


@needs_cache
def test_the_commands_use_it(trained, user_env):
    """`trained` ran train.py."""
    assert len(entries(Path(user_env["HOME"]) / ".cache" / "jaxgpt" / "xla")) > 10


@pytest.mark.skipif(KEPT_ON_CPU, reason="jaxlib from 0.12 on keeps CPU programs")
def test_nothing_is_kept_where_loading_can_hang(tmp_path):
    assert begin(tmp_path)[1] == 0 and not entries(tmp_path)


@needs_cache
def test_a_folder_that_cannot_be_made_costs_only_the_cache(tmp_path):
    (tmp_path / "file").write_text("")
    assert begin(tmp_path / "file" / "xla")[1:] == (0, "")


def test_each_kind_of_processor_has_its_folder(tmp_path, monkeypatch):
    names = set()
    for flags in ("sse avx", "sse"):
        info = tmp_path / "cpuinfo"
        info.write_text(f"processor : 0\nmodel name : One\nflags : {flags}\n\nprocessor : 1\nflags : {flags}\n")
        monkeypatch.setattr(program_cache, "CPU_INFO", info)
        names.add(program_cache._processor())
    monkeypatch.setattr(program_cache, "CPU_INFO", tmp_path / "absent")
    names.add(program_cache._processor())
    assert len(names) == 3


def test_only_complaints_about_the_cache_are_kept_quiet(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *rest: shown.append(message))
    for name in ("jit_f-1-cache", "jit_fg-1-cache"):
        (tmp_path / name).write_text("")
    program_cache._mend(tmp_path)
    warnings.showwarning("another", UserWarning, "file.py", 1)
    complaint = UserWarning("Error reading persistent compilation cache entry for 'jit_f': ValueError: damaged")
    warnings.showwarning(complaint, UserWarning, "file.py", 1)
    assert shown == ["another"] and [path.name for path in tmp_path.iterdir()] == ["jit_fg-1-cache"]


@needs_cache
@pytest.mark.slow
def test_loaded_programs_give_the_same_bits_over_devices_under_jit_and_pmap(tmp_path):
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    line = [sys.executable, Path(__file__).with_name("device_losses.py"), "float32", "0.2", tmp_path]
    logs = {"JAX_LOGGING_LEVEL": "DEBUG", "JAX_DEBUG_LOG_MODULES": "jax._src.compiler"}
    first, second = (
        subprocess.run(line, env={**env, **logs}, capture_output=True, text=True, check=True) for _ in range(2)
    )
    assert first.stdout == second.stdout
    assert second.stderr.count("cache hit for 'jit_program'") > first.stderr.count("cache hit for 'jit_program'")
