"""The README does not drift: its tree is what git tracks, and what it tells to type exists."""

import re
import tomllib
from pathlib import Path, PurePosixPath

import pytest

from tests.test_architecture import ROOT, tracked_files

README = (ROOT / "README.md").read_text()
PACKAGES = ("evf_sam_jax", "convert", "data_pipelines", "benchmarks")


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def shell_lines() -> list[str]:
    """Every command line of the README's shell blocks, continued lines joined, comments cut."""
    text = "\n".join(code_blocks("sh")).replace("\\\n", " ")
    return [line.split(" #")[0].strip() for line in text.splitlines() if line.strip()]


def tree() -> dict[str, str]:
    """Path -> comment of each file in the README's tree: two spaces a level, a folder ends in /."""
    (block,) = code_blocks("text")
    comments: dict[str, str] = {}
    folders: list[str] = []
    for line in block.splitlines():
        if not line.strip():
            continue
        name, _, comment = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name.rstrip("/"))
        else:
            path = str(PurePosixPath(*folders, name))
            assert path not in comments, f"{path} is in the tree twice"
            comments[path] = comment.strip()
    return comments


def test_the_tree_is_what_git_tracks():
    assert sorted(tree()) == sorted(map(str, tracked_files()))


def test_each_file_of_the_tree_has_a_comment():
    assert [path for path, comment in tree().items() if not comment] == []


def test_modules_and_files_of_commands_exist():
    for line in shell_lines():
        for module in re.findall(r"python -m ([\w.]+)", line):
            if module.split(".")[0] in PACKAGES:
                assert module_sources(module), line
        for file in re.findall(r"(?:^|\s)((?:configs|tests|benchmarks|\.ci)/[\w./]+)", line):
            assert (ROOT / file).exists(), line


def test_flags_of_commands_are_defined():
    for line in shell_lines():
        command = re.search(rf"python -m ((?:{'|'.join(PACKAGES)})[\w.]*)(.*)", line)
        if command is None:
            continue
        source = "".join(file.read_text() for file in module_sources(command[1]))
        for flag in re.findall(r"\s--(\w+)", command[2].split("&&")[0]):
            # absl takes the bare name, argparse the one with dashes.
            assert re.search(rf"""["'](--)?{flag}["']""", source), f"--{flag} of: {line}"


def test_subcommands_exist():
    parser = (ROOT / "convert" / "__main__.py").read_text()
    for line in shell_lines():
        for name in re.findall(r"python -m convert ([\w-]+)", line):
            assert f'"{name}"' in parser, line


def module_sources(module: str) -> list[Path]:
    """The files that can define a command's flags: the module, or all of a package."""
    path = ROOT.joinpath(*module.split("."))
    if path.with_suffix(".py").exists():
        main = ROOT / "evf_sam_jax" / "main.py"
        extra = ("processes.py", "plan_command.py") if path.with_suffix(".py") == main else ()
        return [path.with_suffix(".py"), *(main.with_name(name) for name in extra)]
    return sorted(path.glob("*.py")) if (path / "__main__.py").exists() else []


def test_test_commands_are_the_ones_of_continuous_integration():
    ci = (ROOT / ".ci" / "run").read_text()
    commands = [c.strip() for line in shell_lines() for c in line.split("&&")]
    for command in commands:
        if re.match(r"pytest( -m torch)?$|ruff|pyright|pip install .*dev|tests/", command):
            assert command in ci.replace(" -q", ""), command


def test_extras_named_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = set(re.findall(r"\"\.\[(\w+)\]\"", README))
    assert named and named <= set(project["optional-dependencies"])


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)\)", README))))
def test_linked_files_exist(target: str):
    assert (ROOT / target).exists()
