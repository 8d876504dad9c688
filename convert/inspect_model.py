"""A table of what a model directory holds: module, parameters, dtype, bytes."""

from collections.abc import Sequence
from pathlib import Path

from evf_sam_jax.model_dir import describe, read_manifest, read_passthrough


def inspect_model(model_dir: Path) -> str:
    """Returns the table, with a total and what else there is to know."""
    manifest = read_manifest(model_dir)
    counts: dict[str, int] = {}
    sizes: dict[str, int] = {}
    dtypes: dict[str, set[str]] = {}
    for path, leaf in describe(model_dir).items():
        module = "/".join(path.split("/")[:2])
        counts[module] = counts.get(module, 0) + leaf.size
        sizes[module] = sizes.get(module, 0) + leaf.size * leaf.dtype.itemsize
        dtypes.setdefault(module, set()).add(leaf.dtype.name)
    rows = [
        (module, f"{counts[module]:,}", " ".join(sorted(dtypes[module])), f"{sizes[module]:,}")
        for module in sorted(counts)
    ]
    total = (
        "total",
        f"{sum(counts.values()):,}",
        " ".join(sorted(set().union(*dtypes.values()))),
        f"{sum(sizes.values()):,}",
    )
    aside = read_passthrough(model_dir)
    return "\n".join(
        [
            f"{model_dir}: {manifest.variant}, profile {manifest.profile}, "
            f"{'with' if manifest.has_tokenizer else 'without'} a tokenizer",
            *_table([("module", "parameters", "dtype", "bytes"), *rows, total]),
            *(
                f"kept aside: {key} {list(array.shape)} {array.dtype}, {manifest.passthrough[key]}"
                for key, array in sorted(aside.items())
            ),
            *(
                f"converted from: {name} sha256 {digest}"
                for name, digest in manifest.source.items()
            ),
        ]
    )


def _table(rows: Sequence[tuple[str, str, str, str]]) -> list[str]:
    """Aligns names to the left and numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return [
        "  ".join(
            cell.rjust(width) if column in (1, 3) else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
