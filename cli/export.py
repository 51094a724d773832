"""The verbs that hand over to annotators and take back from them: export, import-labels."""

from __future__ import annotations

from cli.session import Session
from engine.verbs import ExportOptions, ImportLabelsOptions


def export(options: ExportOptions, flags: dict[str, bool]) -> None:
    """Hand a selection over to a labelling tool, a viewer or a trainer, in its own format; images stay where they are."""
    from engine.export import export as write

    ui = Session(flags)
    facts = write(options, ui.watch)
    done = [f"{facts['num_images']:,} images for {facts['format']}"]
    done += [f"{facts[key]:,} {what}" for key, what in (("num_copies", "copied"), ("num_links", "linked")) if facts.get(key)]
    done += [f"{facts['num_predictions']:,} with predictions"] if "num_predictions" in facts else []
    lines = [f"{facts['out']}: {', '.join(done)}", *(f"  {note}" for note in facts["notes"])]
    ui.result({"command": "export", **facts}, "\n".join(lines))


def import_labels(options: ImportLabelsOptions, flags: dict[str, bool]) -> None:
    """Take answers back from a labelling tool, as labels that `finetune --labels` and `rounds --oracle` read."""
    from engine.answers import import_labels as take

    ui = Session(flags)
    facts = take(options)
    what = "boxes" if facts["boxes"] else "labels"
    done = [f"{what} of {facts['num_answered']:,} of {facts['num_asked']:,} images"]
    done += [f"{facts['num_boxes']:,} boxes"] if facts["boxes"] else []
    lines = [f"{facts['out']}: {', '.join(done)}"]
    if facts["num_unanswered"]:
        shown = ", ".join(repr(name) for name in facts["unanswered"])
        more = ", ..." if facts["num_unanswered"] > len(facts["unanswered"]) else ""
        lines.append(f"  images without an answer: {facts['num_unanswered']:,}, {shown}{more}")
    if facts["num_strangers"]:
        lines.append(f"  answers for images not asked for: {facts['num_strangers']:,}, such as {facts['strangers'][0]!r}")
    lines += [f"  {note}" for note in facts["notes"]]
    ui.result({"command": "import-labels", **facts}, "\n".join(lines))
