"""The house rules that imports, names and sizes can show: who may know Flax, torch and devices."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from evf_sam_jax.models.families import ENCODERS, SEGMENTERS

ROOT = Path(__file__).parents[1]
PACKAGES = ("evf_sam_jax", "convert", "data_pipelines", "configs")


def tracked_files() -> list[Path]:
    """What git tracks, relative to the root."""
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [Path(name) for name in listing.stdout.split("\0") if name and (ROOT / name).exists()]


def sources(*folders: str) -> list[Path]:
    """The tracked Python files of some folders of the root."""
    return [f for f in tracked_files() if f.suffix == ".py" and f.parts[0] in folders]


def imported_modules(file: Path) -> set[str]:
    """Full names of what a file imports: `from a import b` gives `a.b`."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def test_flax_modules_are_known_to_the_models_only():
    outside = [
        f for f in sources(*PACKAGES, "benchmarks") if f.parts[:2] != ("evf_sam_jax", "models")
    ]
    offences = {
        str(file): name
        for file in outside
        for name in imported_modules(file)
        if is_within(name, "flax") and not is_within(name, "flax.struct")
    }
    assert not offences


def test_nothing_but_the_builders_knows_which_families_of_towers_there_are():
    """Sizes are chosen in configs, benchmarks and converters; the rest asks the configuration."""
    families = {*ENCODERS, *SEGMENTERS}
    modules = [f"evf_sam_jax.models.{family}" for family in families]
    builders = {"families.py", "released.py"}
    builders |= {"evf_sam.py"}  # the sizes of the tests' model
    offences = {
        str(file): name
        for file in sources("evf_sam_jax", "data_pipelines")
        if file.parts[:2] != ("evf_sam_jax", "models") or len(file.parts) == 3
        if file.name not in builders and file.stem not in families
        for name in imported_modules(file)
        if any(is_within(name, module) for module in modules)
    }
    assert not offences


@pytest.mark.parametrize("framework", ["torch", "torchvision", "tensorflow"])
def test_the_core_needs_no_other_framework(framework: str):
    offences = [
        str(file)
        for file in sources(*PACKAGES)
        if any(is_within(name, framework) for name in imported_modules(file))
    ]
    assert not offences


def test_data_pipelines_know_jax_as_a_container_of_batches_only():
    offences = [
        str(file)
        for file in sources("data_pipelines")
        if file.name != "batch.py"
        and any(is_within(n, "jax") or is_within(n, "flax") for n in imported_modules(file))
    ]
    assert not offences


def test_data_pipelines_touch_no_device_when_imported():
    modules = [".".join(f.with_suffix("").parts) for f in sources("data_pipelines")]
    importable = [m for m in modules if not m.endswith(("__init__", "__main__"))]
    code = f"import importlib\nfor name in {importable!r}: importlib.import_module(name)"
    # With a platform that does not exist, whatever asks jax for a device fails.
    environment = {**os.environ, "JAX_PLATFORMS": "no_such_platform"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


def test_no_name_says_nothing():
    empty_names = {"utils", "util", "common", "misc", "helpers", "helper"}
    offences = [str(f) for f in tracked_files() if empty_names & {Path(p).stem for p in f.parts}]
    assert not offences


def test_every_python_file_says_its_purpose_first():
    offences = [
        str(file)
        for file in tracked_files()
        if file.suffix == ".py" and not ast.get_docstring(ast.parse((ROOT / file).read_text()))
    ]
    assert not offences


def test_no_tracked_file_is_over_two_megabytes():
    offences = [str(f) for f in tracked_files() if (ROOT / f).stat().st_size > 2_000_000]
    assert not offences


def test_main_only_starts_what_others_do():
    main = ROOT / "evf_sam_jax" / "main.py"
    assert len(main.read_text().splitlines()) <= 80
