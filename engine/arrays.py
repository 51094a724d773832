"""Names of the array types that pass between the modules."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


Ints = npt.NDArray[np.int64]


Keys = npt.NDArray[np.uint64]


Bools = npt.NDArray[np.bool_]
