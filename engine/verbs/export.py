"""Options of `export` and `import-labels`: to the tools of annotators and trainers, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from engine.schema import Opt
from engine.verbs.shared import PoolOptions

FORMATS = ("label-studio", "cvat", "coco", "fiftyone", "huggingface", "imagefolder", "voc", "ids", "indices")
"""What `export` writes."""
ANSWERS = ("label-studio", "cvat", "coco", "fiftyone", "csv")
"""What `import-labels` reads."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions(PoolOptions):
    """Hand a selection over to a labelling tool, a viewer or a trainer, in its own format; images stay where they are."""

    selection: Annotated[
        tuple[str, ...],
        Opt(
            "Selection folders, a round's folder of `rounds --oracle`, ids (.txt), rows (.json, .npy); together, in order.",
            positional=True,
            repeat=True,
        ),
    ]
    format: Annotated[str, Opt("Whose format.", choices=FORMATS)]
    out: Annotated[str, Opt("File or folder to write, as the format has it; must not be there.", metavar="PATH", result=False)]
    which: Annotated[
        str,
        Opt(
            "Of a selection folder: its picks, what was labelled before, or that and then these.",
            choices=("picks", "labeled", "both"),
        ),
    ] = "picks"
    pool: Annotated[str | None, Opt("Where the pool is now. Default: where the features say that it was.", metavar="POOL")] = (
        None
    )
    features: Annotated[
        str | None, Opt("Where the features of the selection are now. Default: where it says that they were.", metavar="DIR")
    ] = None
    by_ids: Annotated[
        bool, Opt("Take a pool of another digest (a copied container has another time) whose rows are called the same.")
    ] = False
    predictions: Annotated[
        str | None,
        Opt("What `predict` wrote of the pool: for label-studio as pre-annotations, for fiftyone as a field.", metavar="DIR"),
    ] = None
    min_score: Annotated[float, Opt("Of --predictions: boxes below it are left out.", min=0, max=1)] = 0.3
    copy: Annotated[bool, Opt("Copy the images into the export: it is then a folder, or holds their bytes.")] = False
    uri_prefix: Annotated[
        tuple[str, ...],
        Opt(
            "Images at FROM... are at TO... for the tool: s3://bucket/=/data/local-files/?d=bucket/. Repeatable.",
            metavar="FROM=TO",
            repeat=True,
        ),
    ] = ()
    overwrite: Annotated[bool, Opt("Replace a file, or a folder that `export` wrote.", result=False)] = False


@dataclass(frozen=True, kw_only=True)
class ImportLabelsOptions:
    """Take answers back from a labelling tool, as labels that `finetune --labels` and `rounds --oracle` read."""

    answers: Annotated[tuple[str, ...], Opt("Files that the tool gave back; together.", positional=True, repeat=True)]
    format: Annotated[str, Opt("Whose: Label Studio JSON, CVAT for images 1.1, COCO, samples.json, a table.", choices=ANSWERS)]
    asked: Annotated[
        tuple[str, ...],
        Opt("What was asked for: the export, or a selection folder or ids (.txt). Repeatable.", repeat=True, metavar="PATH"),
    ]
    out: Annotated[
        str,
        Opt(
            "Labels to write: .csv (id,label); boxes as COCO .json or, for ids that are no file names, .jsonl.", metavar="FILE"
        ),
    ]
    on_conflict: Annotated[
        str,
        Opt("Of two answers for one image that differ: say so and stop, or take the later one.", choices=("error", "latest")),
    ] = "error"
    complete: Annotated[bool, Opt("Images without an answer are an error.")] = False
    empty_answers: Annotated[
        bool, Opt("cvat, coco, fiftyone: an image listed without a box holds none. Default: nobody has answered.")
    ] = False
    field: Annotated[str, Opt("fiftyone: the field of the answers.")] = "ground_truth"
    id_column: Annotated[str | None, Opt("csv: column of the ids or file names. Default: id, file_name, path or uri.")] = None
    label_column: Annotated[str | None, Opt("csv: column of the labels. Default: label, labels, class or category.")] = None
    overwrite: Annotated[bool, Opt("Replace --out.", result=False)] = False
