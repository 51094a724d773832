"""coresift as a user types it, and scikit-learn's digits as pools, for the benchmarks that run whole commands."""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from sklearn.datasets import load_digits

ROOT = Path(__file__).parents[1]


def coresift(*arguments: str) -> str:
    """Run one command and return what it printed; stop everything where it fails."""
    done = subprocess.run([sys.executable, "-m", "cli", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"coresift {' '.join(arguments)}\n{done.stderr}")
    return done.stdout


def digits(folder: Path, num_test: int = 0) -> tuple[str, str]:
    """Write scikit-learn's digits, 1,797 of 8 x 8 px, as a pool, and their last `num_test` as a test pool; return the files."""
    data = load_digits()
    rows = []
    for index, (pixels, label) in enumerate(zip(data.images, data.target.tolist(), strict=True)):
        buffer = io.BytesIO()
        Image.fromarray((pixels * 255 / 16).astype("uint8")).save(buffer, format="PNG")
        rows.append({"image": {"bytes": buffer.getvalue(), "path": f"{index}.png"}, "label": str(label)})
    files, cut = (folder / "pool.parquet", folder / "test.parquet"), len(rows) - num_test
    for file, some in zip(files, (rows[:cut], rows[cut:]), strict=True):
        pq.write_table(pa.Table.from_pylist(some, pa.Table.from_pylist(rows[:1]).schema), file)
    return str(files[0]), str(files[1])


def known_and_own(parser: argparse.ArgumentParser, arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse what stands before a lone `--`; return it, and what follows: the options of the commands that are run."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    return parser.parse_args(arguments[:cut]), arguments[cut + 1 :]


def begin(run: Callable[[list[str]], None], quick: Callable[[Path], list[str]]) -> None:
    """Run a benchmark on the arguments given, or, without any, on those that `quick` gives for a temporary folder."""
    if len(sys.argv) > 1:
        run(sys.argv[1:])
        return
    with tempfile.TemporaryDirectory() as folder:
        run(quick(Path(folder)))
