"""``solo-d2 errors``."""

import json

import pycocotools.mask as mask_util
import pytest

from solo_d2.tools import errors

BOXES = [[0, 0, 10, 10], [20, 0, 10, 10]]
CORNERS = [[x, y, x + w, y, x + w, y + h, x, y + h] for x, y, w, h in BOXES]
# 20 x 60 pixels, column by column: the first square
FIRST = {"size": [20, 60], "counts": [0, *[10, 10] * 9, 10, 1010]}


def result(image_id=7):
    rle = mask_util.frPyObjects(FIRST, 20, 60)
    rle["counts"] = rle["counts"].decode()
    return {"image_id": image_id, "category_id": 1, "score": 0.9, "segmentation": rle}


@pytest.fixture
def files(tmp_path):
    """(results, annotations)"""
    results, annotations = tmp_path / "results.json", tmp_path / "val.json"
    results.write_text(json.dumps([result()]))
    annotations.write_text(
        json.dumps(
            {
                "images": [{"id": 7, "file_name": "7.png", "height": 20, "width": 60}],
                "categories": [{"id": 1, "name": "cat"}],
                "annotations": [
                    {
                        **{"id": i, "image_id": 7, "category_id": 1, "iscrowd": 0, "area": 100},
                        **{"bbox": box, "segmentation": [corners]},
                    }
                    for i, (box, corners) in enumerate(zip(BOXES, CORNERS))
                ],
            }
        )
    )
    return results, annotations


def test_the_verb_prints_a_table_and_writes_json(files, tmp_path, capsys):
    output = tmp_path / "costs.json"
    words = [str(files[0]), "--data", str(files[1]), "--output", str(output)]
    assert errors.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["AP", "AP50"]
    (row,) = [line for line in lines if line.startswith("missed")]
    assert row.split()[1:4] == ["49.5", "49.5", "49.5"]
    assert json.loads(output.read_text())["missed"]["AP"] == pytest.approx(49.5, abs=0.05)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a list of COCO results"),
        ('[{"image_id": 7}]', "segmentation"),
        (json.dumps([result(image_id=3)]), "image 3, which the data set lacks"),
    ],
)
def test_a_wrong_file_gives_one_line(files, capsys, content, message):
    files[0].write_text(content)
    assert errors.main([str(files[0]), "--data", str(files[1])]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_an_unknown_data_set_gives_one_line(files, capsys):
    assert errors.main([str(files[0]), "--data", "no_such_set"]) == 2
    assert "no_such_set" in capsys.readouterr().err
