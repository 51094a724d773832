"""Exports read by the tools themselves, where they are installed: they are too large for the dev extra (0.5 and 1 GB)."""

import json

import pytest
from PIL import Image

from engine.export import export
from engine.verbs import ExportOptions


@pytest.fixture
def exported(tmp_path):
    """Return a function that exports three images, labelled by their folders, in a format."""
    for row, name in enumerate(("a/0.png", "b/0.png", "b/1.png")):
        (tmp_path / "pool" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + row, 10)).save(tmp_path / "pool" / name)
    (tmp_path / "rows.json").write_text("[2, 0]")

    def write(form, out, **given):
        told = {"selection": (str(tmp_path / "rows.json"),), "pool": str(tmp_path / "pool"), **given}
        export(ExportOptions(format=form, out=str(tmp_path / out), **told))
        return tmp_path / out

    return write


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("copy", [False, True], ids=["in place", "copied"])
def test_fiftyone_reads_it(exported, copy):
    importers = pytest.importorskip("fiftyone.utils.data.importers", reason="fiftyone is not installed")
    out = str(exported("fiftyone", "out", copy=copy))
    assert importers.FiftyOneDatasetImporter(dataset_dir=out)._is_legacy_format_data()  # and then reads it by this one:
    with importers.LegacyFiftyOneDatasetImporter(dataset_dir=out) as samples:
        found = list(samples)
    assert [(s["pool_id"], s.tags, s["ground_truth"].label) for s in found] == [
        ("b/1.png", ["picks"], "b"),
        ("a/0.png", ["picks"], "a"),
    ]
    assert [Image.open(sample.filepath).size for sample in found] == [(22, 10), (20, 10)]
    assert [sample.metadata.width for sample in found] == [22, 20]


@pytest.mark.filterwarnings("ignore")
def test_label_studio_takes_the_tasks(exported):
    sdk = pytest.importorskip("label_studio_sdk.label_interface", reason="label-studio-sdk is not installed")
    control = '<Choices name="choice" toName="image"><Choice value="a"/><Choice value="b"/></Choices>'
    setup = sdk.LabelInterface(f'<View><Image name="image" value="$image"/>{control}</View>')
    tasks = json.loads(exported("label-studio", "out.json").read_text())
    assert [setup.validate_task(task) for task in tasks] == [True, True]
