"""The persistent compilation cache: where it is used, and damaged entries."""

import importlib.util
import os
import subprocess
import sys
import types
import warnings
import zlib
from importlib import metadata
from pathlib import Path

import jax
import pytest
from conftest import ROOT

from jaxgpt import compilation_cache

KEPT_ON_CPU = tuple(int(n) for n in metadata.version("jaxlib").split(".")[:2]) >= (0, 12)
needs_cache = pytest.mark.skipif(not KEPT_ON_CPU, reason="jaxlib before 0.12: no cache on CPU")

# A process that compiles or loads one program, and prints the result and the number of cache hits.
START = """
import sys
from pathlib import Path
import jax
import jax.numpy as jnp
from jaxgpt.compilation_cache import enable_compilation_cache

loaded = []
jax.monitoring.register_event_listener(lambda event, **_: loaded.append(event))
enable_compilation_cache(Path(sys.argv[1]))
print(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.linspace(0, 1, 24).reshape(4, 6).T @ jnp.ones((4, 6)))[0, 0].item().hex())
print(loaded.count("/jax/compilation_cache/cache_hits"))
"""


def begin(folder, **env):
    """A process with the cache below `folder`: the number computed, how many programs were loaded, and stderr."""
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
    kind = f"{compilation_cache._processor()}-{sys.version_info.major}.{sys.version_info.minor}"
    assert {path.parent.name for path in entries(tmp_path)} == {kind}


@needs_cache
@pytest.mark.slow
@pytest.mark.parametrize(
    "damage, filters",
    [("empty", ""), ("zeros", ""), ("a bit", ""), ("half", ""), ("half", "ignore"), ("half", "error::UserWarning")],
)
def test_a_damaged_program_is_compiled_again_without_a_message(tmp_path, damage, filters):
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
@pytest.mark.slow
def test_the_users_own_settings_take_precedence(tmp_path):
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


@pytest.mark.skipif(KEPT_ON_CPU, reason="jaxlib from 0.12 on caches CPU programs")
def test_no_cache_where_loading_can_hang(tmp_path):
    assert begin(tmp_path)[1] == 0 and not entries(tmp_path)


@needs_cache
@pytest.mark.slow
def test_a_folder_that_cannot_be_made_costs_only_the_cache(tmp_path):
    (tmp_path / "file").write_text("")
    assert begin(tmp_path / "file" / "xla")[1:] == (0, "")


def test_each_kind_of_processor_has_its_folder(tmp_path, monkeypatch):
    names = set()
    for flags in ("sse avx", "sse"):
        info = tmp_path / "cpuinfo"
        info.write_text(f"processor : 0\nmodel name : One\nflags : {flags}\n\nprocessor : 1\nflags : {flags}\n")
        monkeypatch.setattr(compilation_cache, "CPU_INFO", info)
        names.add(compilation_cache._processor())
    monkeypatch.setattr(compilation_cache, "CPU_INFO", tmp_path / "absent")
    names.add(compilation_cache._processor())
    assert len(names) == 3


def folder_of(tmp_path, **contents):
    for name, content in contents.items():
        (tmp_path / f"{name}-cache").write_bytes(content)
    return tmp_path


def names(folder):
    return sorted(path.name.removesuffix("-cache") for path in folder.glob("*-cache"))


def test_entries_that_cannot_be_decompressed_are_removed(tmp_path):
    sound = zlib.compress(b"a program" * 100)
    flipped = sound[:9] + bytes([sound[9] ^ 1]) + sound[10:]
    folder_of(tmp_path, sound=sound, empty=b"", zeros=bytes(50), half=sound[: len(sound) // 2], flipped=flipped)
    compilation_cache._remove_damaged_entries(tmp_path)
    assert names(tmp_path) == ["sound"]


def test_zstd_entries_are_checked_with_the_library_that_jax_uses(tmp_path, monkeypatch):
    def decompress(entry):
        if not entry.endswith(b"sound"):
            raise ValueError

    magic = compilation_cache.ZSTD_MAGIC
    library = types.SimpleNamespace(decompress=decompress, zstd=types.SimpleNamespace(decompress=decompress))
    monkeypatch.setitem(sys.modules, "compression" if sys.version_info >= (3, 14) else "zstandard", library)
    folder_of(tmp_path, sound=magic + b"sound", damaged=magic + b"half")
    compilation_cache._remove_damaged_entries(tmp_path)
    assert names(tmp_path) == ["sound"]


def test_only_entries_written_since_the_last_check_are_read(tmp_path, monkeypatch):
    folder_of(tmp_path, old=zlib.compress(b"old"))
    os.utime(tmp_path / "old-cache", (1, 1))
    compilation_cache._remove_damaged_entries(tmp_path)
    folder_of(tmp_path, new=zlib.compress(b"new"))
    read = []
    monkeypatch.setattr(compilation_cache, "_is_sound", lambda entry: read.append(zlib.decompress(entry)) or True)
    compilation_cache._remove_damaged_entries(tmp_path)
    assert read == [b"new"]


def test_only_warnings_about_the_cache_are_silenced(tmp_path, monkeypatch):
    monkeypatch.setattr(compilation_cache, "_jaxlib", lambda: compilation_cache.FIRST_FOR_CPU)
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("error")
        jax.config.update("jax_compilation_cache_dir", None)
        try:
            compilation_cache.enable_compilation_cache(tmp_path)
        finally:
            jax.config.update("jax_compilation_cache_dir", before[0])
            jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])
        warnings.warn("Error writing persistent compilation cache entry for 'jit_f': OSError: full", stacklevel=1)
        with pytest.raises(UserWarning, match="another"):
            warnings.warn("another", stacklevel=1)
    assert not shown


@needs_cache
@pytest.mark.slow
def test_loaded_programs_give_the_same_bits_over_devices_under_jit_and_pmap(tmp_path):
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    line = [sys.executable, ROOT / "tests/integration/device_losses.py", "float32", "0.2", tmp_path]
    logs = {"JAX_LOGGING_LEVEL": "DEBUG", "JAX_DEBUG_LOG_MODULES": "jax._src.compiler"}
    first, second = (
        subprocess.run(line, env={**env, **logs}, capture_output=True, text=True, check=True) for _ in range(2)
    )
    assert first.stdout == second.stdout
    assert second.stderr.count("cache hit for 'jit_program'") > first.stderr.count("cache hit for 'jit_program'")
