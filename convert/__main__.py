"""`python -m convert COMMAND ...`: PyTorch checkpoints to model directories and back."""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

import jax
from absl import logging

from convert import beit3, clip, efficient_sam, evf_sam, sam, sam2, vilt
from convert.inspect_model import inspect_model
from convert.to_model_dir import DTYPES, Conversion, write_conversion
from convert.to_torch import write_torch
from evf_sam_jax.errors import UserError, run_command
from evf_sam_jax.models.evf_sam import PROFILES

# Command -> its module, what it converts, and what it reads; the size follows from the shapes.
_TOWERS = {
    "sam": (sam, "a Segment Anything checkpoint, ViT-B, L or H", "FILE"),
    "sam2": (sam2, "a SAM 2 or SAM 2.1 checkpoint, Hiera T, S, B+ or L", "FILE"),
    "efficient-sam": (efficient_sam, "an EfficientSAM checkpoint, T or S", "FILE"),
    "beit3": (beit3, "a BEiT-3 checkpoint, base or large", "FILE"),
    "clip": (clip, "a CLIP of transformers or open_clip, L/14 or H/14", "SOURCE"),
    "vilt": (vilt, "a ViLT directory of transformers, B/32", "SOURCE_DIR"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see `{self.prog} --help`)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m convert",
        description="Converts PyTorch checkpoints to model directories and back. PyTorch is not "
        "needed, and nothing that a checkpoint may contain besides tensors is run.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser(
        "evf-sam",
        help="an EVF-SAM directory as published on Hugging Face",
        description="Converts a directory with config.json, the weights (model.safetensors or "
        "pytorch_model.bin, whole or sharded with an index) and, if it has them, tokenizer files.",
    )
    command.add_argument("source", metavar="SOURCE_DIR", type=Path)
    _add_target(command)

    command.add_argument(
        "--profile",
        choices=PROFILES,
        help="of preprocessing and decoding; by default what the released checkpoint needs",
    )
    for name, (tower, help_text, metavar) in _TOWERS.items():
        command = commands.add_parser(name, help=help_text, description=tower.__doc__)
        command.add_argument("source", metavar=metavar, type=Path)
        if name == "beit3":
            command.add_argument(
                "--image_size",
                type=int,
                metavar="PIXELS",
                help="side of the images that the encoder shall take; another size than the "
                "checkpoint's interpolates the positions of the patches (bicubic)",
            )
        if name == "vilt":
            command.add_argument(
                "--readout",
                choices=vilt.READOUTS,
                default=vilt.READOUTS[0],
                help="what the encoder gives unless a run asks for something else; the pooler can "
                "be asked for only where it is said here (default: %(default)s)",
            )
        _add_target(command)

    command = commands.add_parser(
        "to-torch",
        help="a model directory back to PyTorch's names",
        description="Writes OUT_DIR/model.safetensors under the original's names, with "
        "config.json and the tokenizer files. What was converted without --dtype comes back "
        "bit-identical.",
    )
    command.add_argument("source", metavar="MODEL_DIR", type=Path)
    command.add_argument("target", metavar="OUT_DIR", type=Path, help="must not exist")

    command = commands.add_parser(
        "inspect",
        help="what a model directory holds",
        description="Prints a table: module, parameters, dtype, bytes.",
    )
    command.add_argument("source", metavar="MODEL_DIR", type=Path)
    return parser


def _add_target(command: argparse.ArgumentParser) -> None:
    command.add_argument("target", metavar="MODEL_DIR", type=Path, help="must not exist")
    command.add_argument(
        "--dtype",
        choices=sorted(DTYPES),
        help="cast every parameter (default: each keeps the source's dtype); what the cast rounds "
        "cannot go back bit-identical",
    )


def _open(args: argparse.Namespace) -> Conversion:
    if args.command == "evf-sam":
        return evf_sam.convert(args.source, args.profile)
    if args.command == "beit3":
        return beit3.convert(args.source, args.image_size)
    if args.command == "vilt":
        return vilt.convert(args.source, args.readout)
    return _TOWERS[args.command][0].convert(args.source)


def main(argv: list[str]) -> None:
    """Runs one command; prints what it wrote and what the user should know."""
    args = _parser().parse_args(argv)
    # Conversion moves bytes: it shall not take an accelerator from whoever computes on it.
    jax.config.update("jax_platforms", "cpu")
    if args.command == "inspect":
        print(inspect_model(args.source))
        return
    if args.command == "to-torch":
        notes = write_torch(args.source, args.target)
        print(f"wrote {args.target / 'model.safetensors'}")
    else:
        manifest, notes = write_conversion(_open(args), args.target, args.dtype)
        total = manifest.parameter_counts["total"]
        print(f"wrote {args.target}: {manifest.variant}, {total:,} parameters")
    for note in notes:
        print(f"note: {note}")


if __name__ == "__main__":
    logging.set_verbosity(logging.FATAL)  # what Orbax logs of an error is said in one sentence
    run_command(main, sys.argv[1:])
