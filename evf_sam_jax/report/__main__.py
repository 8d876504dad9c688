"""`python -m evf_sam_jax.report RUN [--against OTHER]`: an evaluation as one HTML file.

RUN is the directory of a finished evaluation. The file holds its pictures and asks for nothing
from elsewhere; pictures are drawn from the data that the run names, where that is still there.
"""

import argparse
from typing import NoReturn

from etils import epath

from evf_sam_jax.errors import UserError, run_command
from evf_sam_jax.report.build import build_report


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see `{self.prog} --help`)")


def main() -> None:
    """Parses the command line and writes the report."""
    run_command(_run)


def _run() -> None:
    parser = _Parser(prog="python -m evf_sam_jax.report", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="directory of a finished evaluation")
    parser.add_argument("--against", metavar="OTHER", help="another run to compare with")
    parser.add_argument("--out", metavar="FILE", help="to write; by default RUN/report.html")
    options = parser.parse_args()
    page = build_report(options.run, options.against)
    out = epath.Path(options.out) if options.out else epath.Path(options.run) / "report.html"
    try:
        out.write_bytes(page.encode())
    except OSError as error:
        raise UserError(f"--out: cannot write {out}: {error.strerror or error}") from None
    print(f"{out} ({len(page.encode()) / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
