import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.core.checks import InputError
from trimtab.core.detections import Detections, GroundTruth

COCO = {
    "images": [{"id": 30}, {"id": 10}, {"id": 20}],
    "categories": [{"id": 7, "name": "boat"}, {"id": 3, "name": "anchor"}],
    "annotations": [
        {"image_id": 10, "category_id": 7, "bbox": [1, 2, 3, 4]},
        {"image_id": 30, "category_id": 3, "bbox": [0, 0, 5.5, 5], "iscrowd": 1},
    ],
}
FOUND = [
    {"image_id": 30, "category_id": 7, "bbox": [1, 2, 3, 4.5], "score": 0.25},
    {"image_id": 10, "category_id": 3, "bbox": [0, 0, 0, 0], "score": 1},
]


def written(folder, name, data):
    path = folder / name
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def changed(data, *way, to):
    data = json.loads(json.dumps(data))
    place = data
    for key in way[:-1]:
        place = place[key]
    if to is None:
        del place[way[-1]]
    else:
        place[way[-1]] = to
    return data


def test_a_pair_of_files_is_read_in_the_order_of_ids(tmp_path):
    truth = GroundTruth.read(written(tmp_path, "gt.json", COCO))
    assert truth.image_ids == (10, 20, 30)
    assert (truth.class_ids, truth.names) == ((3, 7), ("anchor", "boat"))
    assert truth.image.tolist() == [0, 2]
    assert truth.label.tolist() == [1, 0]
    assert truth.crowd.tolist() == [False, True]
    assert truth.boxes.tolist() == [[1, 2, 3, 4], [0, 0, 5.5, 5]]
    found = Detections.read(written(tmp_path, "det.json", FOUND), truth)
    assert (found.image.tolist(), found.label.tolist()) == ([2, 0], [1, 0])
    assert (found.images, found.classes) == (3, 2)
    found.write(tmp_path / "again.json", truth)
    assert json.loads((tmp_path / "again.json").read_text()) == FOUND


def test_images_without_anything_are_legal(tmp_path):
    truth = GroundTruth.read(written(tmp_path, "gt.json", {**COCO, "annotations": []}))
    assert (len(truth), truth.images) == (0, 3)
    found = Detections.read(written(tmp_path, "det.json", []), truth)
    assert len(found) == 0
    found.write(tmp_path / "again.json", truth)
    assert json.loads((tmp_path / "again.json").read_text()) == []


@given(st.lists(st.booleans(), min_size=3, max_size=3))
def test_images_can_be_picked(marks):
    truth = GroundTruth(
        torch.tensor([0, 2]), torch.tensor([0, 0]), torch.zeros(2, 4), torch.zeros(2).bool(), "abc", "x"
    )
    part = truth.within(torch.tensor(marks))
    assert part.image.tolist() == [i for i in (0, 2) if marks[i]]
    assert part.images == 3
    found = Detections(torch.tensor([1]), torch.tensor([0]), torch.zeros(1, 4), torch.ones(1), 3, 1)
    assert len(found.within(torch.tensor(marks))) == marks[1]


def test_thresholds_keep_what_reaches_them_and_nan_keeps_all():
    label = torch.tensor([0, 0, 1, 2])
    scores = torch.tensor([0.5, 0.4, 0.0, 0.1], dtype=torch.float64)
    found = Detections(torch.zeros(4, dtype=torch.int64), label, torch.zeros(4, 4), scores, 1, 3)
    thresholds = torch.tensor([0.5, float("nan"), -1.0], dtype=torch.float64)
    assert found.above(thresholds).scores.tolist() == [0.5, 0.0, 0.1]
    assert found.above(0.4).scores.tolist() == [0.5, 0.4]


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", "cannot be read as JSON"),
        ([], "must be a COCO annotation file with a list 'images'"),
        (changed(COCO, "categories", to=None), "with a list 'categories'"),
        (changed(COCO, "images", to=[]), "ids of images must hold at least one"),
        (changed(COCO, "images", 0, "id", to=10), "ids of images must be distinct, found 10 twice"),
        (changed(COCO, "images", 0, "id", to="a"), "ids of images must all be integers or all be strings"),
        (changed(COCO, "images", 1, to={"name": "x"}), "images: entry 1 must have 'id'"),
        (changed(COCO, "categories", 0, "id", to=[1]), "ids of categories must all be integers"),
        (changed(COCO, "annotations", 1, "image_id", to=99), "entry 1: image_id 99 is not among the images"),
        (changed(COCO, "annotations", 1, "category_id", to=[3]), "entry 1: category_id [3] is not among the cat"),
        (changed(COCO, "annotations", 1, to=5), "annotations: entry 1 must have 'image_id', found 5"),
        (changed(COCO, "annotations", 0, "bbox", to=[1, 2, 3]), "entry 0: bbox must be [x, y, width, height], found"),
        (changed(COCO, "annotations", 0, "bbox", to=[1, 2, 3, "4"]), "entry 0: bbox must be"),
        (changed(COCO, "annotations", 1, "bbox", to=[1, 2, 3, -4]), "boxes must have height >= 0, found -4 at row 1"),
        (json.dumps(COCO).replace("5.5", "NaN"), "boxes must be finite, found nan at row 1, column 2"),
        (json.dumps(COCO).replace("5.5", "Infinity"), "boxes must be finite"),
    ],
)
def test_a_bad_ground_truth_file_is_refused_in_words(tmp_path, data, message):
    with pytest.raises(InputError) as error:
        GroundTruth.read(written(tmp_path, "gt.json", data))
    assert message in str(error.value)
    assert "gt.json" in str(error.value)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("nothing", "cannot be read as JSON"),
        ({"annotations": FOUND}, "must be a list of detections, found dict"),
        (changed(FOUND, 1, "score", to=None), "detections: entry 1 must have 'score'"),
        (changed(FOUND, 1, "score", to="0.9"), 'entry 1: score must be a number, found "0.9"'),
        (changed(FOUND, 1, "score", to=10**400), "entry 1: score must be a number, found 1000"),
        (changed(FOUND, 1, "score", to=True), "entry 1: score must be a number, found true"),
        (changed(FOUND, 1, "bbox", to=[0, 0, 1, 10**400]), "entry 1: bbox must be [x, y, width, height], found"),
        (json.dumps(FOUND).replace("0.25", "9" * 5000), "cannot be read as JSON"),
        (changed(FOUND, 1, "score", to=1.5), "scores must lie in [0, 1], found 1.5 at row 1"),
        (changed(FOUND, 0, "score", to=-0.5), "scores must lie in [0, 1], found -0.5 at row 0"),
        (json.dumps(FOUND).replace("0.25", "NaN"), "scores must be finite, found nan at row 0"),
        (changed(FOUND, 1, "category_id", to=4), "entry 1: category_id 4 is not among the categories"),
        (changed(FOUND, 0, "image_id", to="10"), 'entry 0: image_id "10" is not among the images'),
        (changed(FOUND, 0, "bbox", to=[0, 0, -1, 1]), "boxes must have width >= 0, found -1 at row 0"),
    ],
)
def test_bad_detections_are_refused_in_words(tmp_path, data, message):
    truth = GroundTruth.read(written(tmp_path, "gt.json", COCO))
    with pytest.raises(InputError) as error:
        Detections.read(written(tmp_path, "det.json", data), truth)
    assert message in str(error.value)
    assert "det.json" in str(error.value)


@pytest.mark.bad_input
def test_missing_files_and_folders_are_told(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        GroundTruth.read(tmp_path / "gt.json")
    with pytest.raises(InputError, match="cannot be read: "):
        GroundTruth.read(tmp_path)


GOOD = {
    "image": torch.tensor([0]),
    "label": torch.tensor([0]),
    "boxes": torch.zeros(1, 4),
    "scores": torch.ones(1),
    "images": 1,
    "classes": 1,
}


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("image", torch.tensor([1]), "image must lie in 0..0, found 1 at row 0"),
        ("label", torch.tensor([-1]), "label must lie in 0..0, found -1 at row 0"),
        ("label", torch.tensor([0, 0]), "label must have 1 entries"),
        ("boxes", torch.zeros(1, 3), "boxes must be floating point of shape (n, 4), got (1, 3)"),
        ("boxes", torch.zeros(1, 4, dtype=torch.int64), "boxes must be floating point"),
        ("scores", torch.ones(2), "scores must be 1 numbers, got (2,)"),
        ("images", 0, "images must be at least 1, got 0"),
    ],
)
def test_bad_tensors_are_refused_in_words(name, value, message):
    with pytest.raises(InputError) as error:
        Detections(**{**GOOD, name: value})
    assert message in str(error.value)


@pytest.mark.bad_input
def test_bad_names_and_crowds_are_refused():
    columns = {"image": GOOD["image"], "label": GOOD["label"], "boxes": GOOD["boxes"]}
    for crowd in (torch.zeros(2).bool(), torch.zeros(1)):
        with pytest.raises(InputError, match="crowd must be 1 booleans"):
            GroundTruth(**columns, crowd=crowd, image_ids=(1,), class_ids=(1,))
    with pytest.raises(InputError, match="names must have 1 entries"):
        GroundTruth(**columns, crowd=torch.zeros(1).bool(), image_ids=(1,), class_ids=(1,), names=("a", "b"))
