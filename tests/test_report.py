"""The report: what it holds, texts that want to be markup, images that are gone, and the maths behind its sections."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pools import IMAGE
from test_curves import finished

from cli.main import run
from engine.compare import compare
from engine.curves import curves
from engine.embed import embed
from engine.evaluate import evaluate
from engine.ingest import import_features
from engine.page import TEMPLATES, Page, Section, number, render
from engine.page.charts import Line, lines, plain
from engine.page.curves import curves_section
from engine.report import report
from engine.report.balance import balance_of
from engine.report.copies import MOST_BITS, alike, copies_of_picks
from engine.report.neighbors import nearest_unlabelled
from engine.report.projection import group, project, sample_rows
from engine.report.provenance import command_of, of_features, of_selection
from engine.report.subjects import read_folders
from engine.schema import InputError, no_progress
from engine.select import select
from engine.shards import from_array
from engine.store import FeatureStore
from engine.verbs import (
    CompareOptions,
    CurvesOptions,
    DedupOptions,
    EmbedOptions,
    EvaluateOptions,
    ImportOptions,
    ReportOptions,
    SelectOptions,
)

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;"
HERE: dict[str, Any] = {"workers": 0, "draws": 2}


class Elements(HTMLParser):
    """Collects elements as (name, attributes), and the texts of scripts by id."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = {}
        self._script: str | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._script = dict(attrs).get("id") or f"script {len(self.scripts)}" if tag == "script" else None

    def handle_data(self, data: str) -> None:
        if self._script is not None:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def picture(value: int, side: int = 12) -> bytes:
    sink = io.BytesIO()
    pixels = np.random.default_rng(value).integers(0, 256, (side, side, 3), dtype=np.uint8)
    pixels[:, :, value % 3] = 255  # images of one class look alike
    Image.fromarray(pixels).save(sink, format="PNG")
    return sink.getvalue()


def table_pool(file: Path, count: int = 60, label: str = "cat") -> str:
    """A Parquet pool of noise in three classes, the last image broken, two the same; ids and texts that want to be markup."""
    data = [picture(value) for value in range(count - 2)] + [picture(0), b"no image"]
    table = {
        "image": pa.array([{"bytes": given, "path": f"{i}.png"} for i, given in enumerate(data)], IMAGE),
        "label": [f"{label}-{i % 3}" for i in range(count)],
        "id": [f"{HOSTILE}{i}" for i in range(count)],
        "scene": [f"{HOSTILE}{i % 2}" for i in range(count)],
        "exposure": [i / 7 for i in range(count)],
        "note": ["the same"] * count,
    }
    pq.write_table(pa.table(table), file, row_group_size=16)
    return str(file)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A hostile pool, its features, two selections, of which one goes on from ten labels, and near copies."""
    folder = tmp_path_factory.mktemp("world")
    pool, features = table_pool(folder / "pool.parquet", label=HOSTILE), str(folder / "features")
    embed(EmbedOptions(pool=pool, out=features, encoder="pixels", pixels_size=4, workers=0, max_rejected="2"))
    for strategy in ("kmeans", "random"):
        out = str(folder / strategy)
        select(SelectOptions(features=features, out=out, strategy=strategy, budget="8", workers=0))
    more = str(folder / "more")
    select(
        SelectOptions(features=features, out=more, strategy="coreset", budget="5", labeled=str(folder / "kmeans"), workers=0)
    )
    from engine.dedup import dedup

    dedup(DedupOptions(features=features, out=str(folder / "dedup"), eps=0.0001, workers=0))
    names = ("kmeans", "random", "more", "dedup", "features")
    return {name: str(folder / name) for name in names} | {"pool": pool, "folder": str(folder)}


def made(tmp_path: Path, *folders: str, **options: Any) -> tuple[str, dict[str, Any]]:
    out = tmp_path / "report.html"
    facts = report(ReportOptions(folders=folders, out=str(out), **{**HERE, **options}))
    return out.read_text(), facts


@pytest.fixture(scope="module")
def page(world: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    return made(tmp_path_factory.mktemp("page"), world["kmeans"], world["random"], dedup=world["dedup"])


def test_a_page_holds_every_section_and_fetches_nothing(page: tuple[str, dict[str, Any]]) -> None:
    text, facts = page
    elements = Elements(text)
    wanted = ["picks", "map", "coverage", "balance", "copies", "rejected", "provenance"]
    assert facts["sections"] == wanted
    assert [of["id"] for of in elements.named("section")] == wanted
    addresses = [of[key] for of in (a for _, a in elements.found) for key in ("src", "href") if of.get(key)]
    assert all(address.startswith(("data:", "#")) for address in addresses if address)
    assert facts["num_images"] == 59
    assert facts["num_unreadable"] == 0
    assert len(json.loads(elements.scripts["images"])) == 59
    assert "1 of 60 images could not be used" in text
    assert "2 of 59 images share their hash with another, in 1 groups." in text


def test_every_pick_is_a_named_button_with_its_image(page: tuple[str, dict[str, Any]]) -> None:
    elements = Elements(page[0])
    tiles = [of for of in elements.named("button") if of.get("class") == "tile"]
    titles = [of["data-title"] for of in tiles]
    assert sum(bool(title and title.startswith("kmeans, pick 8")) for title in titles) >= 1
    assert all(of.get("alt") for of in elements.named("img") if "width" in of)
    assert all(json.loads(of["data-facts"] or "")[0][0] == "id" for of in tiles)


def test_texts_are_no_markup(page: tuple[str, dict[str, Any]]) -> None:
    text, _ = page
    elements = Elements(text)
    assert "onerror" not in {key for _, attributes in elements.found for key in attributes}
    assert not any(of.get("src") == "x" for of in elements.named("img"))
    assert all(of.get("type") in (None, "application/json") for of in elements.named("script"))
    ours = (TEMPLATES / "page.js").read_text()
    code = [body for name, body in elements.scripts.items() if name.startswith("script ")]
    assert len(code) == 2, "plotly's script and ours"
    assert code[1].strip() == ours.strip()
    chart = json.loads(elements.scripts["the-map-data"])
    assert chart["points"][0]["facts"][0][1].startswith(HOSTILE), "the script sets texts as text"
    assert not any("<" in trace["name"] for trace in chart["data"])
    assert "alert(1)" in text


def test_plotly_gets_names_escaped() -> None:
    chart = lines([Line(HOSTILE, [1, 2], [1, 2], [0.1, None], "var(--series-1)")], "x", HOSTILE)
    assert "<" not in json.dumps(chart)
    assert plain("a < b & c") == "a &lt; b &amp; c"


def test_keys_are_masked() -> None:
    secret = "s3://AKIA:hush@bucket/x?secret_key=hush"
    section = Section("s", secret, "metrics", {"tables": [(secret, [{"metric": secret, "value": 1.0, "note": secret}])]})
    chart = curves_section("c", "c", {"m": [{"strategy": secret, "labeled": 1, "mean": 1.0, "std": None, "seeds": 1}]})
    text = render(Page(secret, secret, [section, chart], {}, [(secret, secret)], f"coresift report {secret}")).decode()
    assert "hush" not in text
    assert "s3://***@bucket" in text


def test_a_sample_is_said_and_bounds_the_page(world: dict[str, str], tmp_path: Path) -> None:
    text, facts = made(tmp_path, world["more"], map_images=10, thumbnails=3, neighbors=2, projection="pca")
    assert "a seeded sample of 10 of the 59 images" in text
    assert "the first two principal components" in text
    assert "The first 3 of 5 picks" in text
    elements = Elements(text)
    points = json.loads(elements.scripts["the-map-data"])["points"]
    assert {point["title"].split(":")[0].split(",")[0] for point in points} == {"pool", "labelled before", "coreset"}
    assert len(points) <= 10 + 8 + 5
    assert "labelled before" in text
    assert facts["num_images"] <= 59


def test_images_that_are_gone_are_grey_tiles(tmp_path: Path) -> None:
    for i in range(30):
        (tmp_path / "images" / f"c{i % 2}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / f"c{i % 2}" / f"{i:02d}.png").write_bytes(picture(i))
    features, chosen = str(tmp_path / "features"), str(tmp_path / "chosen")
    embed(EmbedOptions(pool=str(tmp_path / "images"), out=features, encoder="pixels", workers=0))
    select(SelectOptions(features=features, out=chosen, strategy="random", budget="6", workers=0))
    for name in ("c0/04.png", "c1/05.png"):
        (tmp_path / "images" / name).write_bytes(b"")
    _, facts = made(tmp_path, chosen)
    assert (facts["num_images"], facts["num_unreadable"], facts["why"]) == (28, 2, "empty file")
    shutil.move(tmp_path / "images", tmp_path / "moved")
    text, facts = made(tmp_path, chosen)
    assert facts["num_images"] == 0
    assert "6 of these images can't be read any more" in text
    assert "there is no such file" in text
    _, facts = made(tmp_path, chosen, pool=str(tmp_path / "moved"))
    assert (facts["num_images"], facts["num_unreadable"]) == (28, 2)


def test_a_container_that_is_gone(world: dict[str, str], tmp_path: Path) -> None:
    pool = table_pool(tmp_path / "pool.parquet")
    embed(EmbedOptions(pool=pool, out=str(tmp_path / "f"), encoder="pixels", workers=0, max_rejected="2"))
    select(SelectOptions(features=str(tmp_path / "f"), out=str(tmp_path / "s"), strategy="random", budget="3", workers=0))
    Path(pool).unlink()
    text, facts = made(tmp_path, str(tmp_path / "s"))
    assert facts["num_images"] == 0
    assert facts["num_unreadable"] == 59
    assert 'class="grey"' in text
    other = table_pool(tmp_path / "other.parquet")
    table = pq.read_table(other)
    pq.write_table(table.set_column(2, "id", pa.array([f"other {i}" for i in range(60)])), other)
    with pytest.raises(InputError, match="--pool has 'other"):
        made(tmp_path, str(tmp_path / "s"), pool=other)
    with pytest.raises(InputError, match="has 20 rows"):
        made(tmp_path, str(tmp_path / "s"), pool=table_pool(tmp_path / "short.parquet", 20))


def test_imported_features_have_no_images(feature_store: FeatureStore, tmp_path: Path) -> None:
    chosen = str(tmp_path / "chosen")
    select(SelectOptions(features=feature_store.place.uri, out=chosen, strategy="kmeans", budget="20", workers=0))
    text, facts = made(tmp_path, chosen, map_images=50, neighbors=0)
    assert facts["num_images"] == 0
    assert "give --pool" in facts["why"]
    assert "no perceptual hashes" in text
    assert "Nearest unlabelled neighbours" not in text
    assert text.count('scope="row" class="long"') >= 10, "ten digits, ten classes"


def test_other_folders_become_sections(tmp_path: Path, world: dict[str, str]) -> None:
    runs = [finished(tmp_path, name, 0, values) for name, values in (("random", [20, 30]), ("margin", [25, 35]))]
    curves(CurvesOptions(runs=tuple(runs), out=str(tmp_path / "curves")))
    evaluate(
        EvaluateOptions(subject=world["features"], selection=world["kmeans"], metrics=("coverage",), out=str(tmp_path / "m"))
    )
    text, facts = made(tmp_path, *runs, str(tmp_path / "curves"), str(tmp_path / "m"))
    assert facts["sections"] == ["rounds", "curves-1", "metrics", "provenance"]
    assert text.count("Labels saved beside random") == 2
    assert "mean_distance" in text


def test_compare_writes_its_page(feature_store: FeatureStore, tmp_path: Path) -> None:
    out = tmp_path / "comparison"
    options = {"budget": "5,10,20", "seeds": 2, "metrics": ("knn",), "neighbors": (1,), "workers": 0}
    uri = feature_store.place.uri
    compare(CompareOptions(features=uri, out=str(out), strategies=("random", "kmeans"), test=uri, **options))
    text = (out / "comparison.html").read_text()
    assert "Labels saved beside random" in text
    chart = json.loads(Elements(text).scripts["comparison-chart-1-data"])
    assert {trace.get("name") for trace in chart["data"]} >= {"random", "kmeans"}
    assert any(trace.get("fill") == "toself" for trace in chart["data"]), "the spread"
    page, facts = made(tmp_path, str(out))
    assert facts["sections"] == ["comparison-1", "provenance"]
    assert "Labels saved beside random" in page
    compare(CompareOptions(features=uri, out=str(tmp_path / "c2"), strategies=("kmeans",), test=uri, **options))
    assert "which is not among the strategies" in (tmp_path / "c2" / "comparison.html").read_text()


@pytest.mark.parametrize("largest", [3, 1000])
def test_neighbours_are_the_nearest_unlabelled(largest: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 5)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    picks, labelled = np.array([7, 3]), np.array([1, 3, 7, 9])
    found, distance = nearest_unlabelled(from_array(x, block_rows=8), picks, labelled, min(largest, 40))
    free = np.setdiff1d(np.arange(40), labelled)
    for row, of, far in zip(picks, found, distance, strict=True):
        exact = np.linalg.norm(x[free] - x[row], axis=1)
        assert of[of >= 0].tolist() == free[np.argsort(exact)][:largest].tolist()
        np.testing.assert_allclose(far[of >= 0], np.sort(exact)[:largest], atol=1e-6)


def test_copies_by_hash() -> None:
    hashes = np.array([5, 9, 5, 2**64 - 1, 4, 9, 5], dtype=np.uint64)
    rows = np.array([0, 2, 3, 5, 7, 8, 9])
    groups = alike(hashes, rows)
    assert (groups.num_groups, groups.num_images) == (2, 5)
    assert [(size, of.tolist()) for size, of in groups.largest] == [(3, [0, 3, 9]), (2, [2, 8])]
    found = copies_of_picks(hashes, rows, np.array([7, 5]))
    wanted = [
        (7, int(r), int(b))
        for r, b in zip(rows, np.bitwise_count(hashes ^ np.uint64(4)), strict=True)
        if r != 7 and b <= MOST_BITS
    ]
    assert sorted(zip(found.picks.tolist(), found.others.tolist(), found.bits.tolist(), strict=True)) == sorted(wanted)
    assert found.bits.tolist() == sorted(found.bits.tolist())
    none = copies_of_picks(hashes, rows, rows[:0])
    assert (len(none.picks), none.compared) == (0, 0)


def test_balance_by_hand(world: dict[str, str]) -> None:
    store = FeatureStore(world["features"])
    found = balance_of(store, np.array([0, 3]), [np.array([0, 1, 3, 4])], ["ours"], no_progress)
    classes, scene = found.categories
    assert (classes.column, scene.column) == ("label", "scene")
    shares = {share.name[-1]: share for share in classes.shares}
    assert shares["0"].pool == pytest.approx(20 / 59)
    assert (shares["0"].before, shares["0"].after) == (1.0, [0.5])
    assert classes.unseen == [1]
    numbers = {of.column: of.groups for of in found.numbers}
    assert numbers["exposure"][2] == ("ours", pytest.approx([0, 0.75 / 7, 2 / 7, 3.25 / 7, 4 / 7]))
    assert "note" in found.left_out


@pytest.mark.parametrize("how", ["tsne", "pca"])
@pytest.mark.parametrize("shape", [(1, 3), (2, 3), (4, 3), (9, 1), (80, 60)])
def test_projections_of_any_size_are_the_same_twice(how: str, shape: tuple[int, int]) -> None:
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    places = project(x, how, 0)
    assert places.shape == (shape[0], 2)
    assert np.isfinite(places).all()
    assert np.array_equal(places, project(x, how, 0))
    assert len(group(x, 0)) == shape[0]


def test_projection_of_equal_vectors() -> None:
    x = np.ones((12, 4), dtype=np.float32)
    assert np.isfinite(project(x, "tsne", 0)).all()
    assert set(group(x, 0)) == {0}


def test_a_sample_is_a_function_of_the_seed(feature_store: FeatureStore) -> None:
    few, more = sample_rows(feature_store, 20, 0), sample_rows(feature_store, 40, 0)
    assert set(few) < set(more)
    assert set(few) != set(sample_rows(feature_store, 20, 1))


def test_commands_make_the_folders_again(world: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    subjects, _ = read_folders([world["kmeans"], world["more"]])
    origins = [
        *(of_selection(subject, world["features"]) for subject in subjects),
        of_features(FeatureStore(world["features"])),
    ]
    for origin in origins:
        words = shlex.split(origin.command)
        more = ["--max-rejected", "2"] if words[1] == "embed" else []
        assert run([*words[1:], *more, "--workers", "0"]) == 0, origin.command
        said = capsys.readouterr().out
        assert "done before" in said or "-again" in origin.command
    again, first = (Path(world["more"] + end, "picks.parquet").read_bytes() for end in ("-again", ""))
    assert again == first
    given = {"folders": ("a b", "c"), "out": "o.html", "neighbors": 0, "seed": 0, "pool": "s3://k:s@b/x"}
    assert (
        command_of("report", ReportOptions, given) == "coresift report 'a b' c --out o.html --pool 's3://***@b/x' --neighbors 0"
    )


def test_what_is_refused(world: dict[str, str], tmp_path: Path) -> None:
    other = tmp_path / "x.html"
    other.write_text("<p>mine</p>")
    import_features_of = tmp_path / "v.npy"
    np.save(import_features_of, np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32))
    import_features(ImportOptions(file=str(import_features_of), out=str(tmp_path / "f")))
    select(SelectOptions(features=str(tmp_path / "f"), out=str(tmp_path / "s"), strategy="random", budget="3", workers=0))
    cases: list[tuple[tuple[str, ...], dict[str, Any], str]] = [
        ((), {}, "needs folders"),
        ((world["kmeans"], world["kmeans"]), {}, "given twice"),
        ((world["features"],), {}, "is a features folder"),
        ((world["dedup"],), {}, "pass it with --dedup"),
        ((world["kmeans"], str(tmp_path / "s")), {}, "different features"),
        ((world["kmeans"],), {"features": str(tmp_path / "f")}, "other features"),
        ((world["kmeans"],), {"dedup": world["random"]}, "not a finished dedup folder"),
        ((world["kmeans"],), {"out": str(other)}, "not a page that coresift wrote"),
        ((world["kmeans"],), {"out": str(tmp_path / "report")}, "not an .html file"),
        ((str(tmp_path),), {}, "not a finished selection folder"),
    ]
    for folders, more, words in cases:
        with pytest.raises(InputError, match=words):
            report(ReportOptions(folders=folders, **{"out": str(tmp_path / "report.html"), **HERE, **more}))
    assert not (tmp_path / "report.html").exists()
    shutil.rmtree(tmp_path / "f")
    with pytest.raises(InputError, match="say where it is with --features"):
        report(ReportOptions(folders=(str(tmp_path / "s"),), out=str(tmp_path / "report.html")))


def test_on_the_command_line(world: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "report",
        world["kmeans"],
        "--out",
        str(tmp_path / "r.html"),
        "--map-images",
        "0",
        "--draws",
        "2",
        "--workers",
        "0",
    ]
    assert run(command) == 0
    assert "MB, " in capsys.readouterr().out
    assert run([*command, "--json"]) == 0, "an older report is written over"
    facts = json.loads(capsys.readouterr().out)
    assert facts["bytes"] == (tmp_path / "r.html").stat().st_size
    assert "map" not in facts["sections"]
    assert run([*command, "--projection", "tsen"]) == 2
    assert "did you mean 'tsne'?" in capsys.readouterr().err


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_in_light_and_dark() -> None:
    """WCAG 2: 4.5 for texts, 3 for what charts draw."""
    light, dark = re.findall(r":root[^{]*\{([^}]*)\}", (TEMPLATES / "style.css").read_text())[:2]
    for css in (light, dark):
        of = dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6})", css))
        assert len(of) >= 19
        for back in ("back", "panel"):
            for text in ("text", "muted", "link", "bad", "good"):
                assert contrast(of[text], of[back]) >= 4.5, (text, back)
            for mark in ("baseline", "pool", *(f"series-{i}" for i in range(1, 7))):
                assert contrast(of[mark], of[back]) >= 3, (mark, back)
        assert contrast(of["note-text"], of["note"]) >= 4.5
        assert contrast(of["grey-text"], of["grey"]) >= 4.5
        assert contrast(of["text"], of["grey"]) >= 4.5


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (0.0, "0"), (0.123456, "0.123"), (1234567.0, "1,234,567"), (-3.14159, "-3.14")]
)
def test_figures(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.slow
def test_in_chromium(page: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    """Scripts run without an error, charts are drawn, hostile texts do nothing, and images are filled in."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium or google-chrome on the PATH")
    file = tmp_path / "page.html"
    file.write_text(page[0])
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=8000"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=390,800", "--dump-dom"]
    done = subprocess.run([browser, *flags, file.as_uri()], capture_output=True, text=True, timeout=180, check=True)
    assert "CONSOLE" not in done.stderr
    drawn = Elements(done.stdout)
    assert sum(of.get("class") == "main-svg" for of in drawn.named("svg")) >= 5
    filled = [of for of in drawn.named("img") if of.get("data-row")]
    assert filled
    assert all((of.get("src") or "").startswith("data:image/webp") for of in filled)
