"""`coresift plan`: a job's plan as tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cli import output
from cli.session import Session
from jobs.plan_options import PlanOptions

MOST_ROWS = 24
"""Steps that are told one by one; of more, the passes of a loop are told together."""
DASH = "-"


def clock(seconds: float) -> str:
    """Return a time as people say it: 12 s, 3.4 min, 5.2 h, 2.1 d."""
    for unit, size, most in (("s", 1.0, 120.0), ("min", 60.0, 7200.0), ("h", 3600.0, 172_800.0)):
        if seconds < most:
            value = seconds / size
            return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"
    return f"{seconds / 86_400:,.1f} d"


def size(count: float) -> str:
    """Return bytes as people say them; a dash for none."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return DASH if not value else f"{value:.1f} {unit}" if value < 10 and unit != "B" else f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:,.1f} TiB"


def _plan(options: PlanOptions, flags: dict[str, bool]) -> None:
    from jobs.plan import plan

    ui = Session(flags)
    found = plan(options, ui.watch)
    ui.watch.close()
    if ui.json:
        output.print_json({"command": "plan", **found})
        return
    steps = found["steps"] if len(found["steps"]) <= MOST_ROWS else _together(found["steps"])
    total = [found["total"]] if found["total"]["times"] else []
    header = [
        f"{found['job']}: workers",
        *(f"{n:,}" for n in options.workers),
        f"one of {max(options.workers):,} holds",
        "the driver",
        "writes",
    ]
    output.table(f"time, memory, storage ({found['out']})", header, [_row(step, options) for step in [*steps, *total]])
    if options.price is not None or options.spot_price is not None:
        _costs(found["total"]["times"])
    output.table("how it is known", ["step", "more stops helping at", "because", "figures"], [_why(step) for step in steps], 1)
    taken = [[one["name"], one["value"], one["source"]] for one in found["assumptions"]]
    output.table("taken for granted", ["what", "is", "by"], taken, 0)
    for warning in found["warnings"]:
        output.say(f"warning: {warning}")
    if found["not_planned"]:
        output.say(f"not in the sums: {', '.join(dict.fromkeys(name.split('/')[0] for name in found['not_planned']))}")


def _row(step: dict[str, Any], options: PlanOptions) -> list[str]:
    times = [clock(line["seconds_s"]) for line in step["times"]] or [DASH] * len(options.workers)
    held = max(step["times"], key=lambda line: int(line["workers"]))["worker_bytes"] if step["times"] else 0
    return [step["step"], *times, size(held), size(step["driver_bytes"]), size(step["storage_bytes"])]


def _why(step: dict[str, Any]) -> list[str]:
    if step["why_not"]:
        done = step["why_not"] == "done before"
        return [step["step"], DASH, DASH, "done before" if done else f"not planned: {step['why_not']}"]
    enough = step.get("enough_workers")
    return [step["step"], DASH if enough is None else f"{enough:,}", step.get("bound") or DASH, step["basis"]]


def _costs(times: list[dict[str, Any]]) -> None:
    kinds = [name for name in ("cost", "spot_cost") if times and name in times[0]]
    rows = [[f"{line['workers']:,}", clock(line["seconds_s"]), *(f"{line[name]:,.2f}" for name in kinds)] for line in times]
    output.table("cost of the job", ["workers", "time", *(name.replace("_", " ") for name in kinds)], rows)


def _together(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for all passes of a step, its times and sizes summed."""
    passes: dict[str, list[dict[str, Any]]] = {}
    for step in steps:
        passes.setdefault(f"{step['step'].split('/')[0]}{' (not planned)' if step['why_not'] else ''}", []).append(step)
    return [_sum(name, own) for name, own in passes.items()]


def _sum(name: str, own: list[dict[str, Any]]) -> dict[str, Any]:
    if len(own) == 1:
        return own[0]
    first = own[0]
    times = [
        {
            **line,
            "seconds_s": sum(step["times"][at]["seconds_s"] for step in own),
            "worker_bytes": max(step["times"][at]["worker_bytes"] for step in own),
        }
        for at, line in enumerate(first["times"])
    ]
    summed = {"storage_bytes": sum(s["storage_bytes"] for s in own), "driver_bytes": max(s["driver_bytes"] for s in own)}
    bounds = list(dict.fromkeys(step["bound"] for step in own if "bound" in step))
    enough = max((step["enough_workers"] for step in own if "enough_workers" in step), default=None)
    told = {"bound": "; ".join(bounds[:2]) or None, "enough_workers": enough}
    return {**first, **summed, **told, "step": f"{name}, {len(own)} passes", "times": times}


VERBS: dict[str, tuple[type[Any], Callable[[Any, dict[str, bool]], None]]] = {"plan": (PlanOptions, _plan)}
