"""`verify`: every file against what its manifest says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.compare import compare
from engine.ingest import import_features
from engine.schema import InputError
from engine.select import select
from engine.verbs import CompareOptions, ImportOptions, SelectOptions
from engine.verify import verify


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A folder with features, a selection of two budgets and a comparison."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "x.npz", features=rng.random((200, 5)).astype(np.float32), labels=rng.integers(0, 3, 200))
    features = str(tmp_path / "all" / "features")
    import_features(ImportOptions(file=str(tmp_path / "x.npz"), out=features))
    select(SelectOptions(features=features, out=str(tmp_path / "all" / "picks"), strategy="random", budget="5,9", workers=0))
    compare(
        CompareOptions(
            features=features,
            out=str(tmp_path / "all" / "compared"),
            strategies=("random",),
            budget="4",
            seeds=1,
            metrics=("coverage",),
            emd_sample=20,
            workers=0,
        )
    )
    return tmp_path / "all"


def test_what_was_published_is_found_as_it_was(world: Path) -> None:
    found = verify(str(world))
    assert found["bad"] == []
    assert found["num_folders"] == 6
    kept = [p for p in world.rglob("*") if p.is_file() and p.name not in ("run.json", "manifest.json")]
    assert found["num_files"] == len(kept)
    assert found["bytes"] == sum(p.stat().st_size for p in kept)
    assert verify(str(world / "picks" / "5"))["num_files"] == 5


@pytest.mark.parametrize(
    "name",
    ["features/parts/part-000000000000.arrow", "picks/5/labeled.json", "picks/9/ids.txt", "compared/results.parquet"],
)
def test_every_kind_of_damage_is_named(world: Path, name: str) -> None:
    file = world / name
    data = file.read_bytes()
    middle = len(data) // 2
    file.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    (bad,) = verify(str(world))["bad"]
    assert bad["file"] == name
    assert "sha256" in bad["problem"]
    file.write_bytes(data[:-1])
    (bad,) = verify(str(world))["bad"]
    assert bad == {"file": name, "problem": f"has {len(data) - 1:,} bytes, {len(data):,} were written"}
    file.unlink()
    assert verify(str(world))["bad"] == [{"file": name, "problem": "is missing"}]


def test_a_damaged_part_is_made_again_as_the_message_says(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((100, 3)).astype(np.float32))
    options = ImportOptions(file=str(tmp_path / "x.npy"), out=str(tmp_path / "features"))
    digest = import_features(options)["digest"]
    part = next((tmp_path / "features" / "parts").iterdir())
    part.write_bytes(b"nonsense")
    assert verify(str(tmp_path / "features"))["bad"]
    part.unlink()
    (tmp_path / "features" / "manifest.json").unlink()
    assert import_features(options)["digest"] == digest
    assert verify(str(tmp_path / "features"))["bad"] == []


def test_nothing_to_verify(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        verify(str(tmp_path / "none"))
    with pytest.raises(InputError, match="holds no folder"):
        verify(str(tmp_path))
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="holds no folder"):
        verify(str(tmp_path / "file"))
    (tmp_path / "run.json").write_text('{"kind": "features", "inputs": {}, "options": {}}')
    with pytest.raises(InputError, match="is unfinished"):
        verify(str(tmp_path))
