"""What several test files share: one Ray session, real data, and small pools and stores."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine import session
from engine.ingest import import_features
from engine.store import FeatureStore
from engine.verbs import ImportOptions

torch.set_num_threads(1)  # small products all over: threads that wait for one another cost more than they save


@pytest.fixture(scope="session")
def ray_session():
    """One local Ray session for the whole test process."""
    import ray

    session.connect(None)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def shared():
    """The folder of real images and weights that lies beside the checkout."""
    path = Path(__file__).parents[2] / "shared" / "data"
    if not path.exists():
        pytest.skip(f"{path} does not exist: this test needs its real images and weights")
    return path


@pytest.fixture
def image_folder(tmp_path):
    """Six images, PNG and JPEG of several sizes, in the class folders cat and dog."""
    folder = tmp_path / "images"
    rng = np.random.default_rng(7)
    for index, (name, suffix) in enumerate((n, s) for n in ("cat", "dog") for s in ("png", "jpg", "png")):
        (folder / name).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (20 + index, 30 - index, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name / f"{index}.{suffix}")
    return folder


@pytest.fixture(scope="session")
def digits():
    """scikit-learn's handwritten digits: L2-normalised float32 vectors (1797, 64) and their labels (1797,)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = data.data / np.linalg.norm(data.data, axis=1, keepdims=True)
    return x.astype(np.float32), data.target.astype(np.int64)


@pytest.fixture(scope="session")
def feature_store(tmp_path_factory, digits):
    """The digits as a feature store, ids digit-0000 to digit-1796."""
    folder = tmp_path_factory.mktemp("digits")
    x, y = digits
    np.savez(folder / "digits.npz", features=x, labels=y, ids=np.array([f"digit-{row:04d}" for row in range(len(x))]))
    import_features(ImportOptions(file=str(folder / "digits.npz"), out=str(folder / "features")))
    return FeatureStore(str(folder / "features"))
