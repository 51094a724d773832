"""Learning curves of rounds: interpolation by hand, pairing by seed, what can't be compared."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cli.main import run
from engine.curves import FILE, Curve, curves, labels_for, picture, saved
from engine.folders import begin, publish
from engine.info import describe
from engine.places import Place
from engine.schema import InputError
from engine.store import table_bytes
from engine.verbs import CurvesOptions
from engine.verify import verify


def curve(values: list[float | None], name: str = "entropy", seed: int = 0, start: int = 100, add: int = 100) -> Curve:
    labeled = start + add * np.arange(len(values), dtype=np.float64)
    return Curve(name, seed, "runs/x", "top1", labeled, np.array(values, dtype=np.float64))


def finished(
    folder: Path,
    strategy: str,
    seed: int,
    values: list[float | None],
    subject: str = "p",
    criterion: str = "top1",
    test: str = "t",
) -> str:
    """Write what a finished `coresift rounds` leaves, as far as curves read it; return the folder."""
    place = Place(str(folder / f"{strategy}-{seed}-{subject}-{criterion}-{test}"))
    begin(place, "rounds", {"subject": subject, "test": test}, {}, overwrite=False)
    rows = [
        {"round": r, "labeled": 100 * (r + 1), "trained": 100 * (r + 1), "metric": name, "value": value, "seconds": 1.0}
        for r, of in enumerate(values)
        for name, value in ((criterion, of), ("top5", 99.0))
    ]
    place.at(FILE).write(table_bytes(pa.Table.from_pylist(rows)))
    facts = {
        "subject_digest": subject,
        "test_digest": test,
        "strategy": strategy,
        "seed": seed,
        "start": 100,
        "add": 100,
        "rounds": len(values),
        "criterion": criterion,
    }
    publish(place, facts)
    return place.uri


def test_labels_are_interpolated() -> None:
    line = curve([10, 20, 40])
    assert labels_for(line, 20) == 200
    assert labels_for(line, 30) == 250
    assert labels_for(line, 5) == 100
    assert labels_for(line, 41) is None


def test_first_place_counts_where_a_curve_dips() -> None:
    assert labels_for(curve([10, 30, 20, 40]), 20) == 150
    assert labels_for(curve([10, 30, 20, 40]), 35) == 375


def test_labels_saved_by_hand() -> None:
    """The rival ends at 40 with 300; ours passes 40 at 150, half way from 30 to 50."""
    found = saved(curve([30, 50, 60]), curve([20, 30, 40], "random"))
    assert found == {"level": 40, "labels": 150, "baseline_labels": 300, "saved": 50}


def test_a_worse_strategy_saves_less_than_nothing() -> None:
    found = saved(curve([20, 30, 40]), curve([30, 50, 60], "random"))
    assert found == {"level": 40, "labels": 300, "baseline_labels": 150, "saved": -100}
    assert saved(curve([10, 20]), curve([10, 20], "random"))["saved"] == 0


def test_runs_are_paired_by_seed(tmp_path: Path) -> None:
    runs = [
        finished(tmp_path, "random", 0, [20, 30, 40]),
        finished(tmp_path, "random", 1, [20, 30, 50]),
        finished(tmp_path, "entropy", 0, [30, 50, 60]),
        finished(tmp_path, "entropy", 1, [20, 50, 60]),
    ]
    manifest = curves(CurvesOptions(runs=tuple(runs), out=str(tmp_path / "out")))
    (row,) = manifest["saved"]
    share = [50.0, 100 / 3]
    assert row["strategy"] == "entropy"
    assert row["level"] == 45
    assert row["mean"] == pytest.approx(np.mean(share))
    assert row["std"] == pytest.approx(np.std(share, ddof=1))
    by_seed = pq.read_table(tmp_path / "out" / "saved.parquet").to_pylist()
    assert [entry["baseline_labels"] for entry in by_seed] == [300, 300]
    last = [entry for entry in manifest["table"] if entry["labeled"] == 300]
    assert [(entry["strategy"], entry["mean"], entry["seeds"]) for entry in last] == [("random", 45, 2), ("entropy", 60, 2)]
    every = pq.read_table(tmp_path / "out" / "curves.parquet")
    assert every.num_rows == 12
    assert curves(CurvesOptions(runs=tuple(runs), out=str(tmp_path / "out"))) == manifest
    assert describe(str(tmp_path / "out"))["saved"] == manifest["saved"]
    assert verify(str(tmp_path / "out"))["num_files"] == 3


def test_the_picture_needs_no_network(tmp_path: Path) -> None:
    runs = (finished(tmp_path, "random", 0, [20, 30]), finished(tmp_path, "margin", 0, [25, 35]))
    curves(CurvesOptions(runs=runs, out=str(tmp_path / "out")))
    page = (tmp_path / "out" / "curves.html").read_text()
    assert '"name":"margin"' in page
    assert 'src="http' not in page
    assert "<h3>Labels saved beside random</h3>" in page


def test_another_metric_and_no_baseline(tmp_path: Path) -> None:
    runs = (finished(tmp_path, "margin", 0, [25, 35]),)
    manifest = curves(CurvesOptions(runs=runs, out=str(tmp_path / "out"), metric="top5", baseline="none"))
    assert manifest["metric"] == "top5"
    assert manifest["saved"] == []
    assert [row["mean"] for row in manifest["table"]] == [99, 99]


def test_a_run_can_be_called_something_else(tmp_path: Path) -> None:
    first, second = finished(tmp_path, "influence", 0, [20, 30]), finished(tmp_path, "influence", 0, [20, 35], criterion="top1")
    again = finished(tmp_path / "more", "influence", 0, [20, 35])
    assert first == second
    runs = (finished(tmp_path, "random", 0, [20, 30]), first, f"expected={again}")
    manifest = curves(CurvesOptions(runs=runs, out=str(tmp_path / "out")))
    assert [row["strategy"] for row in manifest["saved"]] == ["influence", "expected"]


def test_what_can_not_be_compared(tmp_path: Path) -> None:
    random = finished(tmp_path, "random", 0, [20, 30])
    wrong = {
        "both random, seed 0": finished(tmp_path / "more", "random", 0, [20, 30]),
        "another subject": finished(tmp_path, "margin", 0, [20, 30], subject="q"),
        "another test": finished(tmp_path, "margin", 0, [20, 30], test="u"),
        "measures AP": finished(tmp_path, "margin", 0, [20, 30], criterion="AP"),
        "no run of random has": finished(tmp_path, "margin", 1, [20, 30]),
        "no value of top1 after round 1": finished(tmp_path, "margin", 2, [20, None]),
        "does not exist": str(tmp_path / "nowhere"),
        "not a folder that": str(tmp_path / "more"),
    }
    for words, run_of in wrong.items():
        with pytest.raises(InputError, match=words):
            curves(CurvesOptions(runs=(random, run_of), out=str(tmp_path / "out")))
    with pytest.raises(InputError, match=r"did you mean 'random'.*--baseline none"):
        curves(CurvesOptions(runs=(random,), out=str(tmp_path / "out"), baseline="randon"))
    with pytest.raises(InputError, match="--metric 'top2' is not measured"):
        curves(CurvesOptions(runs=(random,), out=str(tmp_path / "out"), metric="top2"))
    assert not (tmp_path / "out").exists()


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [finished(tmp_path, name, 0, values) for name, values in (("random", [20, 30]), ("margin", [25, 35]))]
    assert run(["curves", *runs, "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "labels saved %" in shown
    assert "margin" in shown
    assert run(["curves", *runs, "--out", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["saved"][0]["strategy"] == "margin"


def test_names_of_runs_and_metrics_are_text_in_the_picture() -> None:
    hostile = "</script><script>alert(1)</script>"
    rows = [{"strategy": hostile, "labeled": 10, "mean": 0.5, "std": None, "seeds": 1}]
    page = picture(rows, f"<img src=x onerror=alert(1)>{hostile}", [], "random").decode()
    assert hostile not in page
    assert "<img src=x" not in page
    assert "alert(1)" in page
