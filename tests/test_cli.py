"""The command: results on stdout, one line of error on stderr, and the exit code."""

import io
import json
import os
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from cli import output, session
from cli.main import VERBS, run
from engine.schema import InputError, RunError, known_error

ROOT = Path(__file__).parents[1]
QUICK = "--linear-epochs 2 --emd-sample 30 --neighbors 1,3 --workers 0"
SHORT = "--seeds 1 --metrics coverage --emd-sample 30 --workers 0"


@pytest.fixture(scope="module")
def world(tmp_path_factory, digits):
    """Pools, stores, a selection, metrics, a comparison and unfinished folders, made through the command itself."""
    folder = tmp_path_factory.mktemp("world")
    x, y = digits
    np.savez(folder / "pool.npz", features=x[:200], labels=y[:200])
    np.savez(folder / "test.npz", features=x[200:260], labels=y[200:260])
    np.savez(folder / "unlabeled.npz", features=x[:50])
    np.save(folder / "narrow.npy", np.hstack([x[:60, :10], y[:60, None]]))
    np.save(folder / "nan.npy", np.where(np.arange(64) == 3, np.nan, x[:5]))
    (folder / "words").mkdir()
    (folder / "words" / "a.txt").write_text("no image")
    (folder / "empty").mkdir()
    (folder / "file").write_text("precious")
    for name in ("cat", "dog"):
        (folder / "images" / name).mkdir(parents=True)
    for index in range(6):
        Image.new("RGB", (9, 7), (40 * index, 0, 0)).save(folder / "images" / ("cat" if index < 4 else "dog") / f"{index}.png")
    shutil.copytree(folder / "images", folder / "damaged")
    (folder / "damaged" / "cat" / "0.png").write_bytes(b"")
    made = [
        "import {w}/pool.npz --out {w}/features --json",
        "import {w}/test.npz --out {w}/test --json",
        "import {w}/unlabeled.npz --out {w}/unlabeled --json",
        "import {w}/narrow.npy --label-column last --out {w}/narrow --json",
        "embed {w}/images --encoder pixels --workers 0 --out {w}/pixels --json",
        "select {w}/features --strategy coreset --budget 20 --workers 0 --out {w}/selection --json",
        "select {w}/features --strategy random --budget 5,10 --workers 0 --out {w}/several --json",
        f"evaluate {{w}}/features --selection {{w}}/selection --test {{w}}/test {QUICK} --out {{w}}/metrics --json",
        "compare {w}/features --strategies random --budget 5 --out {w}/compared --json " + SHORT,
    ]
    for line in made:
        assert run(words(line, folder)) == 0, line
    for name, finished in (("half-features", "pixels"), ("half-selection", "selection")):
        shutil.copytree(folder / finished, folder / name)
        (folder / name / "manifest.json").unlink()
    return folder


def words(line, world, tmp=None):
    return [word.format(w=world, t=tmp) for word in line.split()]


def stamps(folder):
    return {
        str(p.relative_to(folder)): (p.stat().st_ino, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()
    }


def fails(capsys, arguments, code, *told):
    """Run a command that must fail: nothing on stdout, one line of error that names what is wrong."""
    capsys.readouterr()
    assert run(arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    for word in told:
        assert word in err
    return err


def answers(capsys, arguments):
    """Run a command with --json; return the one line it prints."""
    capsys.readouterr()
    assert run([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    assert out.endswith("\n")
    assert out.count("\n") == 1
    assert err == ""
    return json.loads(out)


# --- results


def test_embed(world, tmp_path, capsys):
    line = words("embed {w}/images --encoder pixels --pixels-size 2 --workers 0 --out {t}/out", world, tmp_path)
    said = answers(capsys, line)
    assert said.pop("seconds") >= 0
    assert said.pop("rows_per_s") > 0
    assert len(said.pop("digest")) == 64
    assert said == {
        "command": "embed",
        "out": f"{tmp_path}/out",
        "already_done": False,
        "num_rows": 6,
        "num_vectors": 6,
        "num_rejected": 0,
        "num_labeled": 6,
        "dim": 12,
    }
    assert run(line) == 0
    assert f"{tmp_path}/out: " in capsys.readouterr().out


def test_keys_of_an_address_are_not_shown(world, tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.eye(3, dtype=np.float32))
    made = ["import", str(tmp_path / "x.npy"), "--out", "memory://k:SECRET@out"]
    for arguments in ([*made, "--json"], made, ["info", "memory://k:SECRET@out"], ["info", "memory://k:SECRET@out", "--json"]):
        capsys.readouterr()
        assert run(arguments) == 0
        shown = capsys.readouterr()
        assert "memory://***@out" in shown.out
        assert "SECRET" not in shown.out + shown.err
    for flags in ([], ["-v"]):
        capsys.readouterr()
        assert run(["embed", "s3://k:SECRET@b x/y", "--encoder", "pixels", "--out", str(tmp_path / "out"), *flags]) == 2
        shown = capsys.readouterr()
        assert "error: cannot open 's3://***@b x/y'" in shown.err
        assert ("Traceback" in shown.err) == bool(flags)
        assert "SECRET" not in shown.out + shown.err


def test_embed_with_several_encoders(world, tmp_path, capsys):
    network = "--backbone test_resnet --weights random --image-size 32"
    line = words(f"embed {{w}}/images --encoder pixels,embedding {network} --workers 0 --out {{t}}/out", world, tmp_path)
    said = answers(capsys, line)
    assert [(store["out"], store["dim"]) for store in said["stores"]] == [
        (f"{tmp_path}/out/pixels", 192),
        (f"{tmp_path}/out/embedding", 96),
    ]
    assert run(line) == 0
    shown = capsys.readouterr().out
    assert f"{tmp_path}/out/pixels: done before, 6 vectors of 192 floats" in shown
    assert f"{tmp_path}/out/embedding: done before, 6 vectors of 96 floats" in shown
    assert answers(capsys, words("info {t}/out", world, tmp_path))["stores"]["pixels"]["num_vectors"] == 6


def test_embed_with_bad_images_says_where_they_are(world, tmp_path, capsys):
    line = words("embed {w}/damaged --encoder pixels --workers 0 --max-rejected 1 --out {t}/out", world, tmp_path)
    assert run(line) == 0
    out = capsys.readouterr().out
    assert "5 vectors of 192 floats, 1 images rejected" in out
    assert f"{tmp_path}/out/rejected.parquet" in out


def test_import(world, tmp_path, capsys):
    said = answers(capsys, words("import {w}/narrow.npy --label-column last --dtype float16 --out {t}/out", world, tmp_path))
    assert (said["command"], said["num_vectors"], said["num_labeled"], said["dim"]) == ("import", 60, 60, 10)


def test_select(world, tmp_path, capsys):
    line = (
        "select {w}/features --strategy kmeans --option restarts=1 --option iterations=2 --budget 7 --workers 0 --out {t}/out"
    )
    said = answers(capsys, words(line, world, tmp_path))
    (only,) = said["selections"]
    assert (said["command"], said["strategy"], only["num_picks"], only["out"]) == ("select", "kmeans", 7, f"{tmp_path}/out")
    rows = json.loads((tmp_path / "out" / "indices.json").read_text())
    assert (tmp_path / "out" / "ids.txt").read_text().split() == [str(row) for row in rows]
    assert len(set(rows)) == 7


def test_select_several_budgets(world, tmp_path, capsys):
    line = words("select {w}/features --strategy random --budget 20,5,5% --workers 0 --out {t}/out", world, tmp_path)
    said = answers(capsys, line)
    assert [(s["out"], s["num_picks"]) for s in said["selections"]] == [(f"{tmp_path}/out/{n}", n) for n in (20, 5, 10)]
    picks = {n: json.loads((tmp_path / "out" / str(n) / "indices.json").read_text()) for n in (20, 10, 5)}
    assert picks[20][:10] == picks[10]
    assert picks[10][:5] == picks[5]


def test_evaluate(world, capsys):
    line = words(f"evaluate {{w}}/features --selection {{w}}/selection --test {{w}}/test {QUICK}", world)
    said = answers(capsys, line)
    assert (said["command"], said["selection"]) == ("evaluate", f"{world}/selection")
    values = {m["metric"]: m["value"] for m in said["metrics"]}
    assert list(values) == ["class_coverage", "mean_distance", "covering_radius", "emd", "knn_1", "knn_3", "linear"]
    assert 0 < values["mean_distance"] < values["covering_radius"] < 2
    assert 0 <= values["linear"] <= 100
    assert answers(capsys, [*line, "--out", f"{world}/metrics"])["metrics"] == said["metrics"]
    assert run(line) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in values)
    assert f"{values['covering_radius']:.4f}" in table


def test_compare_is_done_once(world, tmp_path, capsys):
    strategies = "random,kmeans:restarts=1:iterations=2"
    line = f"compare {{w}}/features --test {{w}}/test --strategies {strategies} --budget 10,5 --seeds 2 --out {{t}}/out {QUICK}"
    line = words(line, world, tmp_path)
    said = answers(capsys, line)
    assert (said["command"], said["out"]) == ("compare", f"{tmp_path}/out")
    rows = {(r["strategy"], r["budget"], r["metric"]): r for r in said["table"]}
    assert {key[0] for key in rows} == {"random", "kmeans:restarts=1:iterations=2"}
    assert {key[1] for key in rows} == {5, 10}
    assert {row["seeds"] for row in rows.values()} == {2}
    before = stamps(tmp_path / "out")
    assert answers(capsys, line) == said
    assert stamps(tmp_path / "out") == before
    assert run(line) == 0
    text = capsys.readouterr().out
    assert "5 labels, mean ± standard deviation over 2 seeds" in text
    assert f"{tmp_path}/out: 8 selections compared" in text
    assert stamps(tmp_path / "out") == before


def test_compare_goes_on_where_it_stopped(world, tmp_path, capsys):
    line = (
        f"compare {{w}}/features --test {{w}}/test --strategies random,coreset --budget 10,5 --seeds 2 --out {{t}}/out {QUICK}"
    )
    line = words(line, world, tmp_path)
    said = answers(capsys, line)
    cell = tmp_path / "out" / "cells" / "coreset" / "seed-1" / "5"
    assert (cell / "metrics" / "manifest.json").exists()
    before = stamps(tmp_path / "out" / "cells")
    (tmp_path / "out" / "manifest.json").unlink()
    shutil.rmtree(cell / "metrics")
    again = answers(capsys, line)
    after = stamps(tmp_path / "out" / "cells")
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {
        "coreset/seed-1/5/metrics/manifest.json",
        "coreset/seed-1/5/metrics/run.json",
    }
    without_time = [[row for row in table if row["metric"] != "seconds"] for table in (said["table"], again["table"])]
    assert without_time[0] == without_time[1]


def test_what_was_done_before_is_said_even_a_moment_later(world, tmp_path, capsys, monkeypatch):
    line = words("embed {w}/images --encoder pixels --workers 0 --out {t}/out", world, tmp_path)
    assert answers(capsys, line)["already_done"] is False
    published = json.loads((tmp_path / "out" / "manifest.json").read_text())["published"]
    later = datetime.fromisoformat(published).timestamp() + 0.9
    monkeypatch.setattr(session, "time", SimpleNamespace(time=lambda: later))
    assert answers(capsys, line)["already_done"] is True
    assert run(line) == 0
    assert "done before" in capsys.readouterr().out


def test_strategies_and_encoders(capsys):
    strategies = answers(capsys, ["strategies"])["strategies"]
    assert {"random", "uniform", "kmeans", "coreset"} <= {s["name"] for s in strategies}
    assert "restarts" in [o["name"] for s in strategies if s["name"] == "kmeans" for o in s["options"]]
    assert set(answers(capsys, ["encoders"])["encoders"]) >= {"embedding", "pixels"}
    assert run(["strategies"]) == 0
    assert "--option restarts=5" in capsys.readouterr().out
    assert run(["encoders"]) == 0
    assert "pixels: The image itself" in capsys.readouterr().out


def test_recipes(capsys):
    said = answers(capsys, ["recipes"])
    assert {"activeft-deit", "isal-fcos"} <= {recipe["name"] for recipe in said["recipes"]}
    assert {recipe["task"] for recipe in said["recipes"]} == said["training_options"].keys() - {"all"}
    assert run(["recipes"]) == 0
    out = capsys.readouterr().out
    assert "isal-fcos: FCOS" in out
    assert "arXiv 2108.09331" in out
    assert "--option repeats=1" in out
    assert "milestones=8,11" in out


def test_demo(tmp_path, capsys, monkeypatch):
    import sklearn.datasets

    from engine import compare, demo

    full = sklearn.datasets.load_digits()
    few = SimpleNamespace(images=full.images[:90], target=full.target[:90])
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: few)
    monkeypatch.setattr(demo, "NUM_TEST", 30)
    monkeypatch.setattr(demo, "BUDGETS", "12")
    monkeypatch.setattr(demo, "SEEDS", 1)
    monkeypatch.setattr(compare, "measure", lambda *arguments: iter([("emd", 0.5, "faked")]))
    said = answers(capsys, ["demo", "--out", str(tmp_path / "demo"), "--workers", "0", "--quiet"])
    assert (said["command"], said["out"]) == ("demo", str(tmp_path / "demo"))
    assert {row["strategy"] for row in said["table"]} >= {"random", "kmeans", "coreset"}
    assert {row["mean"] for row in said["table"] if row["metric"] == "emd"} == {0.5}
    assert answers(capsys, ["info", str(tmp_path / "demo" / "features" / "pool")])["num_vectors"] == 60


def test_every_verb_answers_in_json_here():
    tested = {
        "embed",
        "import",
        "dedup",
        "select",
        "evaluate",
        "compare",
        "info",
        "verify",
        "strategies",
        "encoders",
        "recipes",
        "demo",
    }
    elsewhere = {"finetune", "predict", "rounds", "curves"}  # test_finetune.py, test_predict.py, ...
    elsewhere |= {"run", "jobs", "plan", "submit", "status", "logs", "stop"}  # test_jobs_run.py, test_jobs_submit.py, ...
    elsewhere |= {"assess", "export", "import-labels", "report"}  # test_assess.py, test_export.py, test_answers.py
    assert set(VERBS) == tested | elsewhere


# --- verify


def test_verify(world, tmp_path, capsys):
    folder = tmp_path / "several"
    shutil.copytree(world / "several", folder)
    assert answers(capsys, ["verify", str(folder)])["bad"] == []
    assert run(["verify", str(folder)]) == 0
    assert "as written" in capsys.readouterr().out
    (folder / "5" / "ids.txt").write_text("other\n")
    fails(capsys, ["verify", str(folder)], 1, "5/ids.txt has 6 bytes")
    fails(capsys, ["verify", str(tmp_path / "none")], 2, "does not exist")


# --- info


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pixels", {"kind": "features", "state": "published", "num_vectors": 6, "dim": 192, "num_parts": 1}),
        ("pixels", {"label_balance": {"cat": 4, "dog": 2}}),
        ("unlabeled", {"kind": "features", "num_labeled": 0, "label_balance": {}}),
        ("selection", {"kind": "selection", "state": "published", "num_picks": 20, "num_rows": 200}),
        ("several/5", {"kind": "selection", "num_picks": 5}),
        ("metrics", {"kind": "metrics", "state": "published"}),
        ("compared", {"kind": "comparison", "state": "published", "num_cells": 1}),
        ("compared/cells/random/seed-0/5/metrics", {"kind": "metrics"}),
        ("half-features", {"kind": "features", "state": "unfinished", "parts_done": 1, "parts_missing": 0}),
        ("half-selection", {"kind": "selection", "state": "unfinished"}),
        ("images", {"kind": "pool", "source": "folder", "num_rows": 6, "class_names": ["cat", "dog"]}),
    ],
)
def test_info(world, capsys, name, expected):
    said = answers(capsys, ["info", f"{world}/{name}"])
    assert {key: said[key] for key in expected} == expected
    assert said["path"] == f"{world}/{name}"
    assert run(["info", f"{world}/{name}"]) == 0
    out, err = capsys.readouterr()
    assert str(said["kind"]) in out
    assert err == ""


def test_info_of_imported_features_has_no_times(world, capsys):
    said = answers(capsys, ["info", f"{world}/features"])
    assert "time" not in said
    assert sum(said["label_balance"].values()) == 200
    assert said["versions"].keys() >= {"torch", "coresift"}


@pytest.mark.parametrize("name", ["nowhere", "empty", "words", "file"])
def test_info_of_anything_else(world, capsys, name):
    fails(capsys, ["info", f"{world}/{name}"], 2, f"{world}/{name}")


@pytest.mark.parametrize("name", ["run [1]", "[bold]x", "a[/b]", ":cat:"])
def test_names_are_printed_as_they_are(world, tmp_path, capsys, name):
    shutil.copytree(world / "images" / "cat", tmp_path / name / f"class {name}")
    assert run(["info", str(tmp_path / name)]) == 0
    shown = "".join(capsys.readouterr().out.split())
    assert f"/{name}".replace(" ", "") in shown
    assert f"class{name}".split("/")[0].replace(" ", "") in shown
    fails(capsys, ["info", f"{tmp_path}/none/{name}"], 2, name)


# --- wrong input

WRONG = {
    "missing pool": ("embed {w}/nowhere --out {t}/out", "{w}/nowhere"),
    "empty pool": ("embed {w}/empty --out {t}/out", "{w}/empty"),
    "pool without images": ("embed {w}/words --out {t}/out", "{w}/words"),
    "pool that is a file": ("embed {w}/file --out {t}/out", "{w}/file"),
    "unknown encoder": ("embed {w}/images --encoder pixel --out {t}/out", "'pixel', did you mean 'pixels'?"),
    "unknown backbone": (
        "embed {w}/images --workers 0 --backbone resnet_18 --out {t}/out",
        "'resnet_18', did you mean 'resnet18'?",
    ),
    "missing weights": ("embed {w}/images --workers 0 --weights {t}/no.pth --out {t}/out", "{t}/no.pth"),
    "wrong mean": ("embed {w}/images --workers 0 --backbone test_vit --weights random --mean 0.1,0.2 --out {t}/out", "0.1,0.2"),
    "wrong limit": ("embed {w}/images --encoder pixels --max-rejected many --out {t}/out", "'many'"),
    "no workers": ("embed {w}/images --encoder pixels --workers -1 --out {t}/out", "workers is -1: it must be at least 0"),
    "missing file": ("import {w}/nowhere.npy --out {t}/out", "{w}/nowhere.npy"),
    "not a feature file": ("import {w}/file --out {t}/out", "{w}/file"),
    "features with NaN": ("import {w}/nan.npy --out {t}/out", "row 0"),
    "missing features": ("select {w}/nowhere --strategy random --budget 5 --out {t}/out", "{w}/nowhere"),
    "unfinished features": (
        "select {w}/half-features --strategy random --budget 5 --out {t}/out",
        "half-features is unfinished",
    ),
    "features of another kind": ("select {w}/selection --strategy random --budget 5 --out {t}/out", "selection folder"),
    "budget 0": ("select {w}/features --strategy random --budget 0 --out {t}/out", "'0'"),
    "budget -5": ("select {w}/features --strategy random --budget -5 --out {t}/out", "'-5'"),
    "budget abc": ("select {w}/features --strategy random --budget abc --out {t}/out", "'abc'"),
    "budget too large": (
        "select {w}/features --strategy random --budget 201 --out {t}/out",
        "'201' is more than the 200 images",
    ),
    "budget too small": ("select {w}/features --strategy random --budget 0.1% --out {t}/out", "'0.1%'"),
    "unknown strategy": ("select {w}/features --strategy kmean --budget 5 --out {t}/out", "'kmean', did you mean 'kmeans'?"),
    "unknown option": (
        "select {w}/features --strategy kmeans --option restart=2 --budget 5 --out {t}/out",
        "'restart' for strategy 'kmeans', did you mean 'restarts'?",
    ),
    "option of none": ("select {w}/features --strategy random --option x=2 --budget 5 --out {t}/out", "'x'"),
    "option out of range": (
        "select {w}/features --strategy kmeans --option restarts=0 --budget 5 --out {t}/out",
        "restarts is 0: it must be 1 to 1000",
    ),
    "option of no number": ("select {w}/features --strategy kmeans --option restarts=x --budget 5 --out {t}/out", "'x'"),
    "option of no choice": (
        "select {w}/features --strategy kmeans --option seeding=d3 --budget 5 --out {t}/out",
        "'d3', did you mean 'd2'?",
    ),
    "option without value": ("select {w}/features --strategy kmeans --option restarts --budget 5 --out {t}/out", "'restarts'"),
    "seed of no number": ("select {w}/features --strategy random --budget 5 --seed seven --out {t}/out", "'seven'"),
    "seed below zero": ("select {w}/features --strategy random --budget 5 --seed -1 --out {t}/out", "seed is -1"),
    "missing labeled": ("select {w}/features --strategy random --budget 5 --labeled {t}/no.txt --out {t}/out", "{t}/no.txt"),
    "uniform without labels": ("select {w}/unlabeled --strategy uniform --workers 0 --budget 5 --out {t}/out", "uniform"),
    "test of another dimension": (
        "evaluate {w}/features --selection {w}/selection --test {w}/narrow --workers 0",
        "{w}/narrow has vectors of 10 floats, {w}/features of 64",
    ),
    "test without labels": (
        "evaluate {w}/features --selection {w}/selection --test {w}/unlabeled --workers 0",
        "{w}/unlabeled has 50 images without a label",
    ),
    "no test": ("evaluate {w}/features --selection {w}/selection --workers 0", "--test"),
    "unknown metric": ("evaluate {w}/features --selection {w}/selection --metrics knm", "'knm', did you mean 'knn'?"),
    "no selection": ("evaluate {w}/features --selection {w}/nowhere --metrics coverage", "{w}/nowhere"),
    "several selections": ("evaluate {w}/features --selection {w}/several --metrics coverage", "{w}/several/10"),
    "selection of other features": ("evaluate {w}/test --selection {w}/selection --metrics coverage", "{w}/test"),
    "strategy named twice": (
        "compare {w}/features --strategies random,random --budget 5 --metrics coverage --out {t}/out",
        "random",
    ),
    "compare an unknown strategy": (
        "compare {w}/features --strategies random,best --budget 5 --metrics coverage --out {t}/out",
        "'best'",
    ),
    "compare a wrong option": (
        "compare {w}/features --strategies kmeans:restarts=0 --budget 5 --metrics coverage --out {t}/out",
        "restarts is 0",
    ),
    "out is a file": ("import {w}/pool.npz --out {w}/file", "{w}/file"),
    "out is below a file": ("import {w}/pool.npz --out {w}/file/out", "{w}/file"),
    "out holds other files": ("import {w}/pool.npz --out {w}/words", "{w}/words"),
    "out of another pool": (
        "embed {w}/damaged --encoder pixels --workers 0 --out {w}/pixels",
        "{w}/pixels is published with other inputs",
    ),
    "out of other options": (
        "embed {w}/images --encoder pixels --pixels-size 3 --out {w}/pixels",
        "options.pixels_size 8 -> 3",
    ),
    "out of another budget": (
        "select {w}/features --strategy coreset --budget 21 --out {w}/selection",
        "options.count 20 -> 21",
    ),
    "out of another verb": ("import {w}/pool.npz --out {w}/selection", '"selection" -> "features"'),
    "out of another comparison": (
        "compare {w}/features --strategies random --budget 6 --out {w}/compared " + SHORT,
        'options.budget "5" -> "6"',
    ),
    "rounds of too much": (
        "rounds {w}/features --strategy random --oracle column --test {w}/test --start 100 --add 60 --rounds 3 --out {t}/out",
        "want 220 labels, and there are 200 images: at most --rounds 2",
    ),
    "rounds without an oracle": (
        "rounds {w}/features --strategy random --oracle {t}/none --test {w}/test --out {t}/out",
        "--oracle '{t}/none' does not exist",
    ),
    "rounds that read labels": (
        "rounds {w}/features --strategy uniform --oracle column --test {w}/test --out {t}/out",
        "nobody has paid for",
    ),
    "rounds on vectors with a recipe": (
        "rounds {w}/features --strategy random --oracle column --test {w}/test --recipe isal-fcos --out {t}/out",
        "--recipe: for pools of images",
    ),
    "unknown verb": ("selct {w}/features", "'selct', did you mean 'select'?"),
    "unknown flag": ("select {w}/features --strategi random --budget 5 --out {t}/out", "--strategi"),
    "missing flag": ("select {w}/features --strategy random --out {t}/out", "--budget"),
    "missing argument": ("select --strategy random --budget 5 --out {t}/out", "FEATURES"),
    "flag without value": ("select {w}/features --strategy random --out {t}/out --budget", "--budget"),
    "one argument too many": ("info {w}/features {w}/test", "{w}/test"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_line_and_exit_code_2(world, tmp_path, capsys, name):
    line, told = WRONG[name]
    before = stamps(world)
    verb, *rest = words(line, world, tmp_path)
    for flags in ([], ["--json"]):
        fails(capsys, [verb, *flags, *rest], 2, told.format(w=world, t=tmp_path))
    assert stamps(world) == before


@pytest.mark.parametrize("name", ["uniform without labels", "features with NaN"])
def test_a_mended_command_can_use_the_same_folder(world, tmp_path, capsys, name):
    fails(capsys, words(WRONG[name][0], world, tmp_path), 2)
    mended = {
        "uniform without labels": "select {w}/unlabeled --strategy random --workers 0 --budget 5 --out {t}/out",
        "features with NaN": "import {w}/pool.npz --out {t}/out",
    }
    assert run(words(mended[name], world, tmp_path)) == 0


@pytest.mark.parametrize(
    "line",
    [
        "select {t}/features --strategy random --budget 5 --workers 0 --out {t}/features --overwrite",
        "evaluate {t}/features --selection {t}/selection --metrics coverage --workers 0 --out {t}/selection --overwrite",
        "evaluate {t}/features --selection {t}/selection --metrics coverage --workers 0 --out {t}/features --overwrite",
        "compare {t}/features --strategies random --budget 5 --metrics coverage --workers 0 --out {t}/features --overwrite",
        "select {t}/features --strategy random --budget 5 --labeled {t}/selection --workers 0 --out {t}/selection --overwrite",
    ],
)
def test_overwrite_never_empties_what_the_command_reads(world, tmp_path, capsys, line):
    for name in ("features", "selection"):
        shutil.copytree(world / name, tmp_path / name)
    before = stamps(tmp_path)
    fails(capsys, words(line, world, tmp_path), 2, "--out")
    assert stamps(tmp_path) == before


# --- failures


def test_too_many_rejected_images_are_exit_code_1(world, tmp_path, capsys):
    line = words("embed {w}/damaged --encoder pixels --workers 0 --out {t}/out", world, tmp_path)
    fails(capsys, line, 1, "1 of 6 images are bad", "--max-rejected 1%", f"{tmp_path}/out/rejected.parquet")
    assert run([*line, "--max-rejected", "20%"]) == 0


LOST = "embed {w}/images --backbone test_resnet --weights random --image-size 32 --std 1e-42 --out {t}/out --workers "


def test_a_vector_that_is_not_finite_is_exit_code_1(world, tmp_path, capsys):
    fails(capsys, words(LOST + "0", world, tmp_path), 1, "not finite as float32 for image 'cat/0.png' (row 0)")


def test_what_fails_on_a_ray_actor_is_one_line_too(world, tmp_path, capfd, ray_session):
    fails(capfd, words(LOST + "1", world, tmp_path), 1, "not finite as float32 for image 'cat/0.png' (row 0)")


def test_our_errors_are_found_behind_what_wraps_them():
    ours = InputError("ours")
    wrapped = ValueError("by ray")
    wrapped.cause = ours
    around = RuntimeError("outer")
    around.__cause__ = wrapped
    assert known_error(around) is ours
    assert known_error(RunError("x")).args == ("x",)
    assert known_error(KeyError("x")) is None


def test_what_nobody_expected_is_a_traceback_and_exit_code_1(monkeypatch, capsys):
    def broken(*arguments):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("engine.info.describe", broken)
    assert run(["info", "x"]) == 1
    assert "ZeroDivisionError: a bug" in capsys.readouterr().err


def test_an_interrupt_is_exit_code_130(monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("engine.info.describe", interrupted)
    fails(capsys, ["info", "x"], 130, "interrupted; run the same command again to go on")


def test_verbose_shows_the_traceback_of_a_known_error(world, capsys):
    from engine import session

    try:
        assert run(["evaluate", f"{world}/nowhere", "--selection", "x", "--metrics", "coverage", "-v"]) == 2
    finally:
        session.verbose = False
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("error: ")


# --- progress and help


@pytest.fixture
def impatient(monkeypatch):
    """Progress is shown at once."""
    monkeypatch.setattr(output, "SHOW_AFTER_S", -1.0)
    monkeypatch.setattr(output, "LINE_EVERY_S", 0.0)


def test_progress_goes_to_stderr_and_quiet_keeps_it_away(world, tmp_path, capsys, impatient):
    line = words("embed {w}/images --encoder pixels --workers 0 --out {t}/loud", world, tmp_path)
    assert run(line) == 0
    out, err = capsys.readouterr()
    assert "embed: 6 of 6" in err
    assert out.count("\n") == 1
    assert run([*line[:-1], f"{tmp_path}/soft", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith(f"{tmp_path}/soft: 6 vectors of 192 floats")
    assert out.count("\n") == 1


def test_json_stays_one_line_while_progress_is_shown(world, tmp_path, capsys, impatient):
    line = words("select {w}/features --strategy random --budget 5 --workers 0 --out {t}/out --json", world, tmp_path)
    assert run(line) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["command"] == "select"
    assert out.count("\n") == 1
    assert "select: 1 of 1" in err


@pytest.mark.parametrize(
    ("done", "left", "elapsed", "expected"),
    [
        (0, 10, 5.0, ""),
        (10, 0, 5.0, "2.0/s"),
        (10, 250, 5.0, "2.0/s, 2:05 left"),
        (1, 7265, 1.0, "1.0/s, 2:01:05 left"),
        (5000, 5000, 2.0, "2,500.0/s, 0:02 left"),
    ],
)
def test_rate_and_rest(done, left, elapsed, expected):
    assert output.rate_and_rest(done, left, elapsed) == expected


def test_help_names_every_verb_and_option(capsys):
    assert run(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {verb} " in text for verb in VERBS)
    assert run(["select", "--help"]) == 0
    text = capsys.readouterr().out
    for flag in (
        "--strategy",
        "--budget",
        "--labeled",
        "--seed",
        "--option",
        "--workers",
        "--address",
        "--json",
        "--quiet",
        "-v",
    ):
        assert flag in text


def test_no_verb_at_all_shows_the_help(capsys):
    code = run([])
    out, err = capsys.readouterr()
    assert code in (0, 2)
    assert "Commands:\n" in out + err


def test_help_loads_nothing_heavy():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "cli", "embed", "--help"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert {"typer", "engine", "cli"} <= loaded
    assert not {"torch", "ray", "numpy", "pyarrow", "timm", "PIL", "sklearn", "faiss"} & loaded
    assert "--backbone" in done.stdout


def test_the_process_ends_with_the_exit_code():
    arguments = [sys.executable, "-m", "cli", "selct", "x"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "'selct', did you mean 'select'?" in done.stderr


def test_errors_of_several_lines_are_told_in_one(capsys):
    output.error("first\n   second\tthird")
    assert capsys.readouterr().err == "error: first second third\n"
    output.error("x" * 500)
    assert capsys.readouterr().err == f"error: {'x' * 500}\n"


def test_a_table_is_whole_where_no_terminal_cuts_it(capsys):
    output.table("t", ["what", "value"], [["a" * 30, "b" * 80]], figures=0)
    out = capsys.readouterr().out
    assert "a" * 30 in out
    assert "b" * 80 in out
    assert io.StringIO(out).readline().strip() == "t"
