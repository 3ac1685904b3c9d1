import pytest
from detectron2.data import DatasetCatalog

from solo_d2.config import load_config
from solo_d2.data import setup_datasets


@pytest.fixture(scope="session", autouse=True)
def shapes_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOLO_D2_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def shapes_val():
    """(number of images) -> the records of shapes_val, registered with that many small images."""

    def make(count):
        options = ("DATASETS.SHAPES.VAL_IMAGES", count, "DATASETS.SHAPES.IMAGE_SIZE", (48, 64))
        setup_datasets(load_config(opts=options))
        return DatasetCatalog.get("shapes_val")

    return make
