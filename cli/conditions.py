"""What a selection's conditions came to, as a person reads it."""

from __future__ import annotations

from typing import Any

SHOWN = 12
"""Groups of a column that are shown, at most."""


def condition_lines(manifest: dict[str, Any]) -> list[str]:
    """Return the lines that a selection's manifest makes of its conditions, none where it has none."""
    said = manifest.get("constraints")
    if not said:
        return []
    lines = []
    asked = said["asked"]
    if "where" in asked:
        lines.append(f"--where left {said['num_where']:,} of {said['num_vectors']:,} images, {said['num_eligible']:,} eligible")
    for column, groups in said["groups"].items():
        if groups["num_groups"] > SHOWN:
            shown = f"{groups['num_picked_groups']:,} of {groups['num_groups']:,} values, {groups['largest']:,} of one at most"
        else:
            shown = ", ".join(f"{group['value']} {group['picked']:,}" for group in groups["listed"])
        lines.append(f"{column}: {shown}")
    if "cost_total" in said:
        lines.append(f"cost: {said['cost_total']:,g} of {float(asked['budget_cost']):,g}")
    if "quality" in said:
        with_them, without = said["quality"]["picked"], said["quality"]["unconditional"]
        parts = [
            f"{what} {with_them[key]:.4f} ({without[key]:.4f} without)"
            for key, what in (("mean_distance", "mean distance"), ("covering_radius", "covering radius"))
        ]
        lines.append(f"what the conditions cost: {', '.join(parts)}")
    return [f"  {line}" for line in lines]
