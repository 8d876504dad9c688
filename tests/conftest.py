"""How every test runs: eight CPU devices, strict shapes, exact matrix products, and the tiers.

`pytest` runs what needs neither torch nor minutes; `pytest -m torch` compares with the PyTorch
originals; `pytest -m slow` runs full-size models and real training. A test marked with both
belongs to the slow tier. A test file of the torch tier imports torch inside its tests or fixtures,
so that the file can be collected without it.
"""

import os

# Before jax is imported, and for the commands that tests start as processes. Set it to something
# else to run the tests on an accelerator.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Threads of XLA's pool: a collective of virtual devices blocks one of each, and independent ones
# wait for each other for ever where there are no more threads than devices.
os.environ.setdefault("NPROC", "64")
# With a limit, whoever reads or writes compiled programs locks their directory.
os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2**33)

import tempfile
from pathlib import Path

import jax
import pytest

from tests.parity import originals

# Sharding is tested with eight devices; code that names none runs on the first, as fast as before.
jax.config.update("jax_num_cpu_devices", 8)
# [3] + [2, 3] is an error: a broadcast that was meant is written as such.
jax.config.update("jax_numpy_rank_promotion", "raise")
# Float32 products on accelerators are otherwise done in TF32 or bfloat16.
jax.config.update("jax_default_matmul_precision", "highest")

# Many tests compile the same tiny programs, each in functions of its own. Both test processes share
# what they have compiled; a directory that is given keeps it for the next time. It is no variable
# of jax's, so that a command which is killed, or runs out of disk, leaves nothing half there.
_CACHE = "EVF_SAM_TEST_CACHE"
if _CACHE not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="evf_sam_compiled_")
    os.environ[_CACHE] = _compiled.name
jax.config.update("jax_compilation_cache_dir", os.environ[_CACHE])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _is_slow_tier(config: pytest.Config) -> bool:
    return "slow" in config.option.markexpr.replace("not slow", "")


def pytest_configure(config: pytest.Config) -> None:
    """Compiles fast rather than well, but for slow tests, which compute more than they compile."""
    if not _is_slow_tier(config):
        # Not 0, with which coordinates of pixels are rounded otherwise.
        flags = [os.environ.get("XLA_FLAGS", ""), "--xla_backend_optimization_level=1"]
        # Without its emitters of fused loops XLA compiles a gradient in three quarters of the time.
        # jaxlib 0.12 knows no such flag, and ends the process.
        if jax.__version_info__ < (0, 11):
            flags.append("--xla_cpu_use_fusion_emitters=false")
        os.environ["XLA_FLAGS"] = " ".join(filter(None, flags))


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two processes for what mostly compiles; slow tests have the machine to themselves."""
    return 0 if _is_slow_tier(config) else 2


# Files that take minutes, the longest first. Processes are given them before all others, so that
# none is left for the end, when the other process has nothing more to do.
LONG_FILES = (
    "evf_sam_jax/test_train.py",
    "evf_sam_jax/test_predictor.py",
    "evf_sam_jax/test_train_step.py",
    "evf_sam_jax/test_resume.py",  # finds compiled what test_train.py has trained
    "evf_sam_jax/test_feature_cache.py",
    "evf_sam_jax/test_sharding.py",
    "evf_sam_jax/models/test_sam.py",
    "data_pipelines/test_pipelines.py",
    "evf_sam_jax/test_predict.py",
    "evf_sam_jax/models/test_sam2.py",
    "evf_sam_jax/models/test_efficient_sam.py",
    "configs/test_finetune.py",
    "evf_sam_jax/models/test_quantized.py",
)


def _turn(item: pytest.Item) -> int:
    name = item.path.relative_to(Path(__file__).parent).as_posix()
    return LONG_FILES.index(name) if name in LONG_FILES else len(LONG_FILES)


@pytest.fixture(scope="session")
def compiled() -> Path:
    """Where compiled programs are kept, for commands that tests start as processes."""
    return Path(os.environ[_CACHE])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps slow tests out of `-m torch`, and says why a torch test cannot run."""
    if not _is_slow_tier(config):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
    items.sort(key=_turn)
    missing = originals.missing_originals()
    if missing:
        reason = f"{', '.join(missing)} not installed: run tests/install_parity.sh"
        for item in items:
            if item.get_closest_marker("torch"):
                item.add_marker(pytest.mark.skip(reason=reason))
