"""A user's mistake is one line on standard error and exit code 2; a defect keeps its traceback."""

import subprocess
import sys

import pytest

from evf_sam_jax.errors import UserError, run_command

COMMAND = """
from absl import flags
from evf_sam_jax.errors import UserError, run_app
flags.DEFINE_integer("number", 1, "A number.")
def main(argv):
    if flags.FLAGS.number == 3:
        raise UserError("--number: expected another, found 3")
    print(flags.FLAGS.number, argv[1:])
run_app(main)
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments], capture_output=True, text=True
    )


def test_a_user_error_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]):
    def main(value: int) -> None:
        raise UserError(f"expected 1, found {value}")

    with pytest.raises(SystemExit) as exit_:
        run_command(main, 2)
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "error: expected 1, found 2\n"


def test_other_exceptions_are_not_hidden():
    def main() -> None:
        raise KeyError("a defect")

    with pytest.raises(KeyError):
        run_command(main)


def test_flags_and_arguments_reach_the_command():
    result = run("--number", "2", "word")
    assert (result.returncode, result.stdout, result.stderr) == (0, "2 ['word']\n", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nmber=2"], "Unknown command line flag 'nmber'"),
        (["--number=two"], "flag --number=two"),
        (["--number=3"], "--number: expected another"),
    ],
)
def test_wrong_flags_are_one_line_and_exit_code_2(arguments: list[str], words: str):
    result = run(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and words in result.stderr
    assert "Traceback" not in result.stderr and result.stdout == ""
