"""The audit of a detector, from two files to a report."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_report import Page

from trimtab import cli
from trimtab.audit import audit_detections
from trimtab.audit.brief import brief
from trimtab.audit.detectors import CANDIDATES
from trimtab.audit.report import detection as report
from trimtab.audit.result import Curve
from trimtab.calibration import load
from trimtab.claims.calibration.detector_calibration import scene
from trimtab.core.checks import InputError
from trimtab.core.detections import Detections, GroundTruth
from trimtab.metrics import laece, lrp, match_detections

FILES = {"audit.json", "calibrator.json", "calibrator.safetensors", "detections_calibrated.json", "report.html"}
FAST = {"resamples": 20, "folds": 2}
EVIL = "</script><script>alert(1)</script>"


def pair(
    folder, name="", seed=0, images=120, classes=3, names=("boat", "anchor", "buoy"), keep=lambda truth, found: found
):
    """A ground truth and detections as files."""
    truth, found = scene(np.random.default_rng(seed), images=images, classes=classes)
    rows = zip(truth.image.tolist(), truth.label.tolist(), truth.boxes.tolist())
    data = {
        "images": [{"id": i} for i in range(images)],
        "categories": [{"id": k, "name": name} for k, name in enumerate(names)],
        "annotations": [{"image_id": i, "category_id": k, "bbox": box} for i, k, box in rows],
    }
    paths = folder / f"gt{name}.json", folder / f"dets{name}.json"
    paths[0].write_text(json.dumps(data))
    keep(truth, found).write(paths[1], truth)
    return paths


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detector")
    paths = pair(folder)
    return folder / "out", paths, audit_detections(*paths, folder / "out", **FAST)


def test_it_leaves_the_files_that_it_names_and_they_agree(audited):
    out, paths, result = audited
    assert {path.name for path in out.iterdir()} == FILES
    truth = GroundTruth.read(paths[0])
    calibrated = load(out / "calibrator.safetensors").transform(Detections.read(paths[1], truth))
    written = Detections.read(out / "detections_calibrated.json", truth)
    assert torch.equal(written.scores, calibrated.scores)
    assert torch.equal(written.boxes, calibrated.boxes)
    data = json.loads((out / "audit.json").read_text())
    assert data["after"]["laece"] == list(result.after["laece"])
    assert len(data["ranking"]) == len(CANDIDATES)


def test_numbers_are_those_of_the_measures_on_the_other_half(audited):
    out, paths, result = audited
    truth = GroundTruth.read(paths[0])
    shuffled = np.random.default_rng(0).permutation(120)
    half = torch.zeros(120, dtype=torch.bool)
    half[torch.from_numpy(shuffled[60:])] = True
    found = load(out / "calibrator.safetensors").transform(Detections.read(paths[1], truth).within(half))
    matches = match_detections(truth.within(half), found)
    assert (result.n, result.n_fit) == (60, 60)
    assert result.after["laece"][0] == pytest.approx(float(laece(matches)), abs=1e-12)
    assert result.after["lrp"][0] == pytest.approx(float(lrp(matches).mean["error"]), abs=1e-12)
    assert sum(result.histogram["after"]) == len(found) == result.passed["after"]
    assert sum(row.objects for row in result.per_class) == result.objects


def test_it_finds_and_corrects_the_scores_that_are_too_high(audited):
    _, _, result = audited
    words = report.verdict(result)
    assert re.match(r"Scores are [\d.]+ points too high\.", words.headline[0])
    assert "corrects" in words.headline[1]
    assert result.after["laece"][0] < 0.6 * result.before["laece"][0]
    assert all(low <= x <= high for x, low, high in (*result.before.values(), *result.after.values()))


def test_the_same_seed_gives_the_same_numbers(audited, tmp_path):
    out, paths, result = audited
    again = audit_detections(*paths, tmp_path, **FAST)
    assert replace(again, steps=result.steps, ranking=[]) == replace(result, ranking=[])
    assert (tmp_path / "detections_calibrated.json").read_bytes() == (out / "detections_calibrated.json").read_bytes()


def test_the_page_is_whole_and_fetches_nothing(audited):
    out, _, result = audited
    page = Page((out / "report.html").read_text())
    assert page.open == []
    assert len(set(page.ids)) == len(page.ids)
    for word in ("nan", "None", "inf", "undefined"):
        assert not re.search(rf"(?<![\w-]){word}(?![\w-])", page.visible), word
    targets = [a[key] for _, a in page.tags for key in ("src", "href", "action", "data") if key in a]
    assert all(target.startswith(("#", "data:")) for target in targets)
    assert {a["href"][1:] for tag, a in page.tags if tag == "a"} <= set(page.ids)
    figures = json.loads(page.islands["figures"])
    assert set(figures) == {"reliability-before", "reliability-after", "ranking"} <= set(page.ids)
    for sentence in report.verdict(result).sentences:
        assert re.sub(r"\s+", " ", sentence) in page.visible


def test_names_are_text(tmp_path):
    paths = pair(tmp_path, names=(EVIL, "a & b", "c"))
    audit_detections(*paths, tmp_path / "out", **FAST)
    page = (tmp_path / "out" / "report.html").read_text()
    assert EVIL not in page
    assert Page(page).count("script") == 3


def test_a_detector_that_needs_nothing_is_told_so(tmp_path):
    def honest(truth, found):
        matches = match_detections(truth, found)
        scores = found.scores.clone()
        scores[matches.row] = matches.iou
        return Detections(found.image, found.label, found.boxes, scores, found.images, found.classes)

    result = audit_detections(*pair(tmp_path, keep=honest), tmp_path / "out", **FAST)
    assert report.chosen(result).kind == "identity"
    assert report.verdict(result).headline == (
        "Scores match overlap, to within one point.",
        "No correction tried helps.",
    )
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert set(json.loads(page.islands["figures"])) == {"reliability-before", "ranking"}


def test_a_gap_that_no_digit_shows_contradicts_no_score(audited):
    _, _, result = audited
    n, score, overlap = [20, 20, 20], [0.0001, 0.5, 0.7], [0.0, 0.2, 0.9]
    curve = Curve([0.0, 0.48, 0.68], [0.04, 0.52, 0.72], n, score, overlap, overlap, overlap)
    text = report.reading(replace(result, reliability={"before": curve}), "before")
    assert text.startswith("1 of 3 bins, ")
    assert text.count("1 of 3 bins, ") == 2


def test_few_images_decide_nothing(tmp_path):
    result = audit_detections(*pair(tmp_path, images=12), tmp_path / "out", **FAST)
    head, cure = report.verdict(result).headline
    assert head == "Too few images to tell."
    assert cure.startswith(("Whether", "No correction"))


def test_another_pair_to_fit_on(tmp_path):
    measured, fitting = pair(tmp_path), pair(tmp_path, "-val", seed=1, images=80)
    result = audit_detections(*measured, tmp_path / "out", calibration=fitting, **FAST)
    assert (result.n, result.n_fit) == (120, 80)
    assert result.notes[0] == "The corrections were fitted on dets-val.json."


def test_classes_and_images_without_anything_are_legal(tmp_path):
    paths = pair(tmp_path, keep=lambda _, found: found.rows(found.label != 1))
    data = json.loads(paths[0].read_text())
    data["images"] += [{"id": i} for i in range(1000, 1020)]
    data["categories"] += [{"id": 9, "name": "ghost"}]
    paths[0].write_text(json.dumps(data))
    result = audit_detections(*paths, tmp_path / "out", **FAST)
    rows = {row.name: row for row in result.per_class}
    assert rows["anchor"].passed_before == 0
    assert rows["anchor"].lrp_before == 1
    assert np.isnan(rows["ghost"].lrp_before)
    assert any("ghost" in note for note in result.notes)
    page = Page((tmp_path / "out" / "report.html").read_text()).visible
    assert not re.search(r"(?<![\w-])(nan|None|inf)(?![\w-])", page)


@pytest.mark.bad_input
def test_what_cannot_be_audited_is_refused_and_leaves_nothing(tmp_path):
    truth, detections = pair(tmp_path)
    out = tmp_path / "out"
    nothing = tmp_path / "nothing.json"
    nothing.write_text("[]")
    with pytest.raises(InputError, match="the fitting images must hold detections, found none in 60 images"):
        audit_detections(truth, nothing, out)
    other = pair(tmp_path, "-other", names=("boat", "anchor", "buoy", "kite"))
    with pytest.raises(InputError, match=r"gt-other\.json must have the categories of .*gt\.json"):
        audit_detections(truth, detections, out, calibration=other)
    with pytest.raises(InputError, match="resamples must be at least 20, got 5"):
        audit_detections(truth, detections, out, resamples=5)
    single = json.loads(truth.read_text())
    single["images"] = single["images"][:1]
    single["annotations"] = []
    (tmp_path / "single.json").write_text(json.dumps(single))
    with pytest.raises(InputError, match="must hold at least two images"):
        audit_detections(tmp_path / "single.json", nothing, out)
    assert not out.exists()


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as left:
        cli.main([str(a) for a in arguments])
    return left.value.code, *capsys.readouterr()


def test_the_command_line(capsys, tmp_path):
    paths = pair(tmp_path, images=60)
    options = ("-o", tmp_path / "out", "--resamples", 20, "--folds", 2)
    code, out, _ = run(capsys, "audit", "--coco", *paths, *options)
    assert code == 0
    assert "LaECE" in out
    assert "images measured" in out
    code, out, _ = run(capsys, "audit", "--coco", *paths, *options, "--format", "json")
    assert json.loads(out)["title"] == "dets.json"
    fitting = pair(tmp_path, "-val", seed=1, images=60)
    code, out, _ = run(capsys, "audit", "--coco", *paths, "--coco-calibration", *fitting, *options, "-q")
    assert (code, out) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "audit needs a SOURCE or --coco GT.json DETS.json, one of the two"),
        (("scores.csv", "--coco", "a", "b"), "one of the two"),
        (("scores.csv", "--coco-calibration", "a", "b"), "--coco-calibration goes with --coco"),
        (("--coco", "a", "b", "--calibration", "c"), "--calibration goes with a table"),
        (("--coco", "a.json", "b.json"), "a.json: no such file"),
        (("--coco", "a.json"), "Option '--coco' requires 2 arguments"),
    ],
)
def test_a_wrong_call_is_one_line(capsys, tmp_path, arguments, message):
    code, out, err = run(capsys, "audit", "-o", tmp_path, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_the_brief_has_the_verdict(audited):
    out, _, result = audited
    assert report.verdict(result).headline[0] in str(brief(result, out).renderables[0])
