"""The tutorial does what it says: its blocks run in order, and print what is shown below them."""

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_architecture import ROOT

TUTORIAL = ROOT / "docs" / "tutorial.md"
BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SECONDS = 900  # for one block, however busy the machine


@dataclasses.dataclass(frozen=True)
class Block:
    """Code, and what the page shows of its output.

    Attributes:
      line: of the page where it begins.
      language: "sh" or "python".
      shown: "" if nothing is shown; "…" stands for anything.
    """

    line: int
    language: str
    code: str
    shown: str


@dataclasses.dataclass
class Reader:
    """Who follows the page, in a directory of their own, and how many sections they are through."""

    directory: Path
    done: int = 0


def blocks_of(text: str, first_line: int) -> list[Block]:
    """The blocks to run; one marked `not-run` is not, and a `text` block belongs to the one before.

    Raises:
      ValueError: a block is of no known kind, or shows the output of none.
    """
    blocks: list[Block] = []
    for found in BLOCK.finditer(text):
        kind, content = found.groups()
        line = first_line + text[: found.start()].count("\n")
        if kind in ("sh", "python"):
            blocks.append(Block(line, kind, content, ""))
        elif kind == "text" and blocks and not blocks[-1].shown:
            blocks[-1] = dataclasses.replace(blocks[-1], shown=content)
        elif kind != "sh not-run":
            raise ValueError(f"line {line}: expected code, or its output, found {kind!r}")
    return blocks


def sections() -> dict[str, list[Block]]:
    """Heading -> the blocks below it, for the headings that have any."""
    text = TUTORIAL.read_text()
    found = {}
    starts = [match.start() for match in re.finditer(r"^## ", text, re.MULTILINE)]
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        heading = text[start:].splitlines()[0].removeprefix("## ")
        found[heading] = blocks_of(text[start:end], text[:start].count("\n") + 1)
    return {heading: blocks for heading, blocks in found.items() if blocks}


def first_line_not_printed(shown: str, printed: str) -> str | None:
    """The first line shown that is not among the printed ones after those before it, or None."""
    lines = iter(printed.splitlines())
    for line in shown.splitlines():
        if line == "…":
            continue
        pattern = ".*".join(map(re.escape, line.split("…")))
        if not any(re.fullmatch(pattern, one) for one in lines):
            return line
    return None


def run_block(block: Block, directory: Path) -> None:
    """Runs a block as a reader would, and fails where it fails or prints something else."""
    program = {"sh": ["bash", "-euc"], "python": [sys.executable, "-c"]}[block.language]
    unset = ("NPROC", "XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")  # what tests set for themselves
    environment = {name: value for name, value in os.environ.items() if name not in unset} | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(directory / "cache"),
    }
    with subprocess.Popen(
        [*program, block.code],
        cwd=directory,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        try:
            printed, _ = process.communicate(timeout=SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):  # unless something is left of it
                os.killpg(process.pid, signal.SIGKILL)
    where = f"{TUTORIAL.name}, line {block.line}"
    assert process.returncode == 0, f"{where}: exit code {process.returncode}\n{printed[-3000:]}"
    missing = first_line_not_printed(block.shown, printed)
    assert missing is None, f"{where}: expected the line {missing!r} in\n{printed[-3000:]}"


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    directory = tmp_path_factory.mktemp("reader")
    (directory / "configs").symlink_to(ROOT / "configs")
    return Reader(directory)


@pytest.mark.slow
@pytest.mark.parametrize("heading", sections())
def test_blocks_run_and_print_what_is_shown(reader: Reader, heading: str):
    if heading == "Serve":
        pytest.importorskip("fastapi", reason="needs the extra `serve`")
    for index, (name, blocks) in enumerate(sections().items()):
        if index >= reader.done:
            for block in blocks:
                run_block(block, reader.directory)
            reader.done = index + 1
        if name == heading:
            break


def test_output_that_differs_is_found():
    shown = "…\nmask …: 3 pixels\ndone\n"
    assert first_line_not_printed(shown, "loading\nmask a (b): 3 pixels\nmore\ndone\n") is None
    assert first_line_not_printed(shown, "mask a: 4 pixels\ndone\n") == "mask …: 3 pixels"
    assert first_line_not_printed(shown, "done\nmask a: 3 pixels\n") == "done"


def test_blocks_are_told_apart():
    page = "```sh\na\n```\n```text\nb\n```\n```sh not-run\nc\n```\n```python\nd\n```\n"
    assert blocks_of(page, 1) == [Block(1, "sh", "a\n", "b\n"), Block(10, "python", "d\n", "")]
    with pytest.raises(ValueError, match="line 7: expected code, or its output, found 'shell'"):
        blocks_of("```shell\n```\n", 7)


@pytest.mark.parametrize(
    "target", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", TUTORIAL.read_text())))
)
def test_linked_files_exist(target: str):
    assert (TUTORIAL.parent / target).exists()
