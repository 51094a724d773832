"""The selection engine: images -> features -> selection -> metrics.

For notebooks: `open_features`, `select_rows`, `evaluate_rows` (engine/api.py), loaded when they are asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.api import Features, evaluate_rows, open_features, select_rows

__version__ = "0.1.0"
__all__ = ["Features", "__version__", "evaluate_rows", "open_features", "select_rows"]


def __getattr__(name: str) -> Any:
    """Return one of the names for notebooks; `import engine` alone loads no numpy."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from engine import api

    return getattr(api, name)
