"""Eight CPU devices, a compilation cache and strict shapes for all tests."""

import gc
import importlib.metadata
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")
# Threads of XLA: an all-reduce that waits for the other devices holds one, and those of
# one device must not hold all that the others need to arrive.
os.environ.setdefault("NPROC", "32")
# Compiling takes the time of the tests: a quarter of it with XLA's older emitters and
# without LLVM's optimizations. .ci/run sets flags of its own, and newer versions of
# XLA, which have one kind of emitter, are tested as users compile.
if [int(n) for n in importlib.metadata.version("jaxlib").split(".")[:2]] < [0, 11]:
    os.environ.setdefault(
        "XLA_FLAGS",
        "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",
    )

# The number of programs decides the time of the tests, so small ones are kept, too. The
# notebooks, processes of their own, share the cache.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(pathlib.Path(__file__).parent.parent / ".cache" / "jax"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import pytest

MAPS = pathlib.Path("/proc/self/maps")  # Of Linux, which allows a process 65,530.

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_finish():
    """Tracing makes many small objects: what is there already is not searched again."""
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)


@pytest.fixture(autouse=True, scope="module")
def room_for_programs():
    """Each compiled program holds memory maps; a process without any left crashes."""
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()
