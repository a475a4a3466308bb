import base64
import gzip
import json
import os
import re
import shutil
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import fake_result as fake
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plotly.offline import get_plotlyjs

from trimtab.audit.report import render, tables, write
from trimtab.audit.report.heat import MEAN, heat_maps
from trimtab.audit.report.verdict import confidence_gap, verdict
from trimtab.audit.report.words import compare, coverage, decimal, interval, percent, plural, seconds
from trimtab.audit.result import AuditResult

FIFTEEN = tuple(f"shift_{i}" for i in range(15))
EVIL = ["<script>alert(1)</script>", "</script>", "a & b", '"quoted"', "<img src=x onerror=alert(1)>"]
EVIL += [f"a class whose name is far longer than anyone would wish {i}" for i in range(5)]
VOID = {"meta", "link", "input", "line", "circle", "br", "i", "path"}


class Page(HTMLParser):
    """What of the page matters to the tests: text, tags, ids, and whether the tags nest."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.ids, self.open, self.islands = [], [], [], [], {}
        self.feed(html)
        self.visible = re.sub(r"\s+", " ", " ".join(self.text))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("id")))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop()[0] == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data):
        tag, name = self.open[-1] if self.open else ("", None)
        if tag in ("script", "style"):
            self.islands[name] = data
        else:
            self.text.append(data)

    def count(self, tag, **attributes):
        return sum(t == tag and all(a.get(k) == v for k, v in attributes.items()) for t, a in self.tags)


CASES = {
    "model": lambda: fake.audit(),
    "table": lambda: fake.audit(shifts=(), kind="table", sharpness=0.5, seed=1),
    "binary": lambda: fake.audit(c=2, shifts=("night",), seed=2),
    "thousand": lambda: fake.audit(c=1000, n=1500, shifts=(), seed=3),
    "calibrated": lambda: fake.audit(sharpness=1.0, shifts=FIFTEEN, seed=4),
    "failed": lambda: fake.with_missing_measures(
        fake.with_a_failed_adapter(fake.with_a_failed_calibrator(fake.audit(seed=5)))
    ),
    "evil": lambda: fake.renamed(fake.audit(seed=6), EVIL, "</title><script>alert(2)</script>"),
    "tiny": lambda: fake.audit(n=40, seed=7, sharpness=1.4),
}


@pytest.fixture(scope="module")
def results():
    made = {}

    def get(name):
        if name not in made:
            made[name] = CASES[name]()
        return made[name]

    return get


@pytest.mark.parametrize("name", CASES)
def test_the_page_is_whole_and_survives_the_way_through_json(results, name, tmp_path):
    result = results(name)
    html = render(result)
    page = Page(html)
    assert page.open == []
    assert [x for x, n in Counter(page.ids).items() if n > 1] == []
    for word in ("nan", "None", "inf", "undefined"):
        assert not re.search(rf"(?<![\w-]){word}(?![\w-])", page.visible), word
    assert page.count("script") == 3
    result.write(tmp_path / "audit.json")
    again = AuditResult.from_dict(json.loads((tmp_path / "audit.json").read_text()))
    assert render(again) == html


@pytest.mark.parametrize("name", CASES)
def test_nothing_in_the_page_points_elsewhere(results, name):
    page = Page(render(results(name)))
    targets = [a[key] for _, a in page.tags for key in ("src", "href", "action", "data") if key in a]
    assert targets
    assert all(target.startswith(("#", "data:")) for target in targets)
    links = {a["href"][1:] for tag, a in page.tags if tag == "a"}
    assert links <= set(page.ids)
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy


def test_plotly_travels_whole_and_the_file_stays_small(results):
    html = render(results("model"))
    packed = Page(html).islands["plotly"]
    assert gzip.decompress(base64.b64decode(packed)).decode() == get_plotlyjs()
    assert len(html) < 2.6e6


def test_names_are_text_wherever_they_appear(results):
    html = render(results("evil"))
    page = Page(html)
    for name in EVIL:
        assert name in page.visible
    assert "<script>alert" not in html
    assert "<img" not in html
    failed = fake.with_a_failed_calibrator(results("model"))
    named = [replace(row, name=f"</script><b>{row.name}</b>") for row in failed.ranking]
    page = Page(render(replace(failed, ranking=named)))
    figures = json.loads(page.islands["figures"])
    assert not any("<b>" in label for label in figures["ranking"]["layout"]["yaxis"]["categoryarray"])


def test_writes_whole_or_not_at_all(results, tmp_path):
    write(results("table"), tmp_path / "out" / "report.html")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]
    assert (tmp_path / "out" / "report.html").read_text(encoding="utf-8") == render(results("table"))


# The verdict


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("model", r"Overconfident by [\d.]+ points\.", r"Temperature scaling corrects most of it\."),
        ("table", r"Underconfident by [\d.]+ points\.", r"\w+ scaling corrects most of it\."),
        ("calibrated", r"No miscalibration found\.", r"No correction is needed\."),
    ],
)
def test_headline(results, name, first, second):
    headline = verdict(results(name)).headline
    assert re.fullmatch(first, headline[0])
    assert re.fullmatch(second, headline[1])


@pytest.mark.parametrize("name", CASES)
def test_the_verdict_is_two_sentences_that_quote_the_numbers(results, name):
    result = results(name)
    sentences = verdict(result).sentences
    for sentence in sentences:
        assert re.fullmatch(r"[A-Z][^.]*(\.\d[^.]*)*\.", sentence), sentence
    assert percent(result.before["accuracy"][0]) in sentences[0]
    assert percent(result.before["mean_confidence"][0]) in sentences[0]


def test_the_gap_of_the_headline_is_confidence_less_accuracy(results):
    result = results("model")
    gap, low, high = confidence_gap(result.before)
    assert gap == pytest.approx(result.before["mean_confidence"][0] - result.before["accuracy"][0])
    assert low < gap < high
    assert decimal(100 * gap, 1) in verdict(result).headline[0]


def test_shift_sentence_names_the_worst_shift_and_the_cheapest_adapter_that_may_be_the_best(results):
    result = results("model")
    shifted = {
        adapter: [c.accuracy for c in result.shifts if c.adapter == adapter and c.shift != "none"]
        for adapter in fake.ADAPTERS
    }
    mean = {adapter: np.mean([accuracy[0] for accuracy in cells]) for adapter, cells in shifted.items()}
    top = max(mean, key=mean.__getitem__)
    as_good = [adapter for adapter in mean if mean[adapter] >= np.mean([low for _, low, _ in shifted[top]])]
    best = as_good[0]
    assert best != top, "the case would show nothing"
    plain = {c.shift: c.accuracy[0] for c in result.shifts if c.adapter == "Source"}
    worst = min(fake.SHIFTS, key=plain.__getitem__)
    sentence = verdict(result).sentences[1]
    assert f"adapting with {best} wins back {100 * (mean[best] - mean['Source']):.1f} of the" in sentence
    assert f"{percent(plain[worst])} under {worst.replace('_', ' ')}" in sentence
    assert "on every shift" in sentence


def test_adapters_that_do_not_help_are_not_praised(results):
    result = results("model")
    plain = {cell.shift: cell for cell in result.shifts if cell.adapter == "Source"}
    same = [replace(plain[cell.shift], adapter=cell.adapter) for cell in result.shifts]
    assert (
        "none of the 7 adapters tried clearly wins any of it back" in verdict(replace(result, shifts=same)).sentences[1]
    )


def test_a_shift_without_loss_is_called_so(results):
    result = results("model")
    home = next(cell for cell in result.shifts if cell.shift == "none")
    calm = [replace(home, shift=cell.shift, adapter=cell.adapter) for cell in result.shifts]
    assert "no clear loss of the unadapted model" in verdict(replace(result, shifts=calm)).sentences[1]


def test_overlapping_intervals_are_not_called_a_gain(results):
    result = results("model")
    wide = {k: (t[0], t[0] - 0.5, t[0] + 0.5) for k, t in result.after.items()}
    doubtful = verdict(replace(result, after=wide, change={}))
    assert "uncertain" in doubtful.headline[1]
    assert "within uncertainty" in doubtful.sentences[0]


def test_a_harmful_correction_is_not_recommended(results):
    result = results("model")
    swapped = verdict(replace(result, before=result.after, after=result.before, change={}))
    assert "does not correct it" in swapped.headline[1]
    assert "do not deploy" in swapped.sentences[0]


@pytest.mark.parametrize(("step", "words"), [(0.1, "and raises accuracy from"), (-0.1, "but lowers accuracy from")])
def test_a_change_of_accuracy_is_told(results, step, words):
    result = results("model")
    moved = tuple(x + step for x in result.after["accuracy"])
    assert words in verdict(replace(result, after=result.after | {"accuracy": moved})).sentences[0]


def test_without_any_correction_the_verdict_says_so(results):
    result = results("table")
    failed = [replace(row, failed="out of memory", chosen=False) for row in result.ranking]
    bare = replace(result, ranking=failed, after=result.before)
    assert verdict(bare).headline[1] == "No correction could be fitted."
    assert "out of memory" in Page(render(bare)).visible


def test_a_gap_that_nothing_mends_is_not_called_fine(results):
    result = results("model")
    rows = [replace(row, chosen=row.name == "Uncalibrated") for row in result.ranking]
    found = verdict(replace(result, ranking=rows, after=result.before, change={}))
    assert found.headline[0].startswith("Overconfident")
    assert found.headline[1] == "No correction tried helps."


def test_a_tiny_error_is_called_well_calibrated(results):
    result = results("table")
    tiny = result.before | {"ece": (0.004, 0.003, 0.005)}
    found = verdict(replace(result, before=tiny, after=result.after | {"ece": (0.001, 0.0005, 0.002)}))
    assert found.headline[0] == "Well calibrated, to within one point."
    assert found.headline[1].endswith("still improves it.")


def test_an_infinite_log_loss_is_left_out_of_the_picture(results):
    result = results("table")
    nowhere = replace(result.ranking[-1], log_loss=float("inf"), standard_error=float("nan"))
    figures = json.loads(Page(render(replace(result, ranking=[*result.ranking[:-1], nowhere]))).islands["figures"])
    assert len(figures["ranking"]["layout"]["yaxis"]["categoryarray"]) == len(result.ranking) - 1


def test_without_intervals_nothing_is_called_clear(results):
    result = results("table")
    bare = {when: {k: (t[0], np.nan, np.nan) for k, t in getattr(result, when).items()} for when in ("before", "after")}
    found = verdict(replace(result, **bare, change={}))
    assert "points apart" in found.headline[0]
    assert "without intervals to judge the change by" in found.sentences[1]
    assert "clearly" not in " ".join(found.sentences)


triples = st.tuples(*[st.floats(0, 1)] * 3).map(sorted).map(lambda t: (t[1], t[0], t[2]))


@given(triples, triples, st.sampled_from([-1, 1]))
def test_comparison_is_antisymmetric_and_hedged(a, b, better):
    opposite = {"better": "worse", "worse": "better"}
    found = compare(a, b, better)
    assert compare(b, a, better) == opposite.get(found, found)
    assert compare(a, b, -better) == opposite.get(found, found)
    if found == "better":
        assert better * (b[0] - a[0]) > 0
    if max(a[1], b[1]) <= min(a[2], b[2]):
        assert found in ("unclear", "same")


def test_a_paired_interval_decides_where_there_is_one():
    a, b = (0.5, 0.4, 0.6), (0.45, 0.35, 0.55)
    assert compare(a, b, -1) == "unclear"
    assert compare(a, b, -1, change=(-0.05, -0.06, -0.04)) == "better"
    assert compare(a, b, -1, change=(-0.05, -0.12, 0.02)) == "unclear"
    assert compare(a, b, 0, change=(-0.05, -0.06, -0.04)) == "moved"
    assert compare(a, (float("nan"),) * 3, -1) == "unknown"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (percent(0.8523), "85.2\u202f%"),
        (percent(-0.004, 0, signed=True), "0\u202f%"),
        (percent(float("nan")), "n/a"),
        (decimal(-1.2345), "\u22121.234"),
        (decimal(float("nan")), "n/a"),
        (interval((0.5, 0.4, 0.6), True), "40.0\u201360.0\u202f%"),
        (interval((0.0, -0.1, 0.1), False), "\u22120.100 to 0.100"),
        (interval((0.5, float("nan"), float("nan")), True), ""),
        (coverage(0.95), "95\u202f%"),
        (coverage(0.999), "99.9\u202f%"),
        (plural(1, "class"), "1 class"),
        (plural(1000, "class"), "1,000 classes"),
        (seconds(0.004), "under 0.01\u202fs"),
        (seconds(0.03), "0.03\u202fs"),
        (seconds(0.44), "0.4\u202fs"),
        (seconds(125), "2\u202fmin 5\u202fs"),
    ],
)
def test_numbers_have_one_format(text, expected):
    assert text == expected


# Pictures and tables


def test_every_bin_has_a_hover_text_with_its_numbers(results):
    result = results("model")
    figures = json.loads(Page(render(result)).islands["figures"])
    for when in ("before", "after"):
        texts = [t for trace in figures[f"reliability-{when}"]["data"] for t in trace.get("hovertext", [])]
        for n in result.reliability[when].count:
            assert any(re.match(rf"Of {n:,} predictions? made with \d+\u2013\d+\u202f% confidence", t) for t in texts)
        counts = [t for t in texts if "of 2,000 predictions" in t]
        assert len(counts) == len(result.histogram[when])


def test_each_picture_has_a_table_of_its_numbers(results):
    page = Page(render(results("model")))
    pictures = [a["id"] for tag, a in page.tags if a.get("role") == "img"]
    assert set(pictures) == set(json.loads(page.islands["figures"]))
    assert {"bins-before", "bins-after", "risks", "calibrators", "cells"} <= set(page.ids)


def test_all_measures_stand_side_by_side(results):
    result = results("model")
    assert len(result.measures) == 102
    table = tables.measures(result)
    assert len(table.rows) == 52
    row = next(row for row in table.rows if row[0].sort == "ECE_em_15")
    assert [float(row[i].sort) for i in (2, 3)] == [result.measures[f"{w}_ECE_em_15"][0] for w in ("pre", "post")]
    alone = next(row for row in table.rows if row[0].sort == "auc_svhn")
    assert alone[0].text == "AUROC against svhn"
    assert float(alone[2].sort) == result.measures["auc_svhn"][0]


def test_heat_map_puts_the_unadapted_model_first_and_differences_beside_it(results):
    result = results("calibrated")
    heats = heat_maps(result)
    assert [heat.key for heat in heats] == ["accuracy", "ece", "log_loss"]
    for heat in heats:
        assert heat.adapters == list(fake.ADAPTERS)
        assert [name for name, _ in heat.rows] == ["no shift", *(f"shift {i}" for i in range(15)), MEAN]
        for name, cells in heat.rows[:-1]:
            shift = {"no shift": "none"}.get(name, name.replace(" ", "_"))
            values = [getattr(c, heat.key)[0] for c in result.shifts if c.shift == shift]
            sign = 1 if heat.key == "accuracy" else -1
            assert [cell.best for cell in cells].index(True) == int(np.argmax(sign * np.array(values)))
            scale = 1 if heat.key == "log_loss" else 100
            for cell, value in zip(cells, values):
                assert float(cell.text) == pytest.approx(scale * value, abs=0.051)
            for cell, value in zip(cells[1:], values[1:]):
                delta = float(cell.delta.replace("\u2212", "-"))
                assert delta == pytest.approx(scale * (value - values[0]), abs=0.051)


def test_heat_map_names_what_failed_and_is_left_out_without_shifts(results):
    heat = heat_maps(results("failed"))[0]
    column = heat.adapters.index("Tent")
    assert {cells[column].text for _, cells in heat.rows} == {"failed"}
    assert all("no normalisation layer" in cells[column].tip for name, cells in heat.rows if name != MEAN)
    assert heat_maps(results("table")) == []
    assert "data shifts" not in Page(render(results("table"))).visible


def test_failed_calibrators_come_last_with_their_reason(results):
    rows = tables.ranking(results("failed")).rows
    assert rows[-1][0].text == "Beta calibration"
    assert "no optimum" in rows[-1][0].note
    assert [row[0].badge for row in rows].count("chosen") == 1


def test_a_thousand_classes_start_with_the_fifty_worst(results):
    result = results("thousand")
    page = Page(render(result))
    assert page.count("div", **{"data-limit": "50"}) == 1
    errors = [float(row[5].sort) for row in tables.per_class(result).rows]
    assert len(errors) == 1000
    assert errors == sorted(errors, reverse=True)


def test_the_rule_that_chose_is_the_rule_that_is_explained(results):
    result = results("model")
    best, pick = result.ranking[0], next(row for row in result.ranking if row.chosen)
    tied = [row for row in result.ranking if row.log_loss - best.log_loss <= row.difference_error]
    assert pick in tied
    trace = json.loads(Page(render(result)).islands["figures"])["ranking"]["data"]
    whisker = {x: error for mark in trace for x, error in zip(mark["x"], mark["error_x"]["array"])}
    assert whisker == {row.log_loss: row.difference_error for row in result.ranking}
    cells = {row[0].text: row[1].note for row in tables.ranking(result).rows}
    assert cells[best.name] == "the best"
    assert cells["Uncalibrated"].startswith("+")


def test_before_and_after_are_one_picture_when_nothing_was_corrected(results):
    page = Page(render(results("calibrated")))
    assert "reliability-after" not in page.ids
    assert "Measured" in page.visible


# In a browser


@pytest.fixture(scope="module")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        if os.environ.get("TRIMTAB_REQUIRE_BROWSER") == "1":
            pytest.fail(f"TRIMTAB_REQUIRE_BROWSER=1, but none of {', '.join(names)} is installed")
        pytest.skip(f"none of {', '.join(names)} is installed")
    sync_api = pytest.importorskip("playwright.sync_api")
    arguments = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def show(browser, results, tmp_path):
    """Opens a case; when the test is over, nothing must have been fetched and no error printed."""
    contexts, complaints = [], []

    def show(name, width=1280, scheme="light", **options):
        path = tmp_path / f"{name}.html"
        write(results(name), path)
        context = browser.new_context(
            viewport={"width": width, "height": 850}, color_scheme=scheme, reduced_motion="reduce", **options
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("request", lambda r: r.url.startswith(("file:", "data:")) or complaints.append(r.url[:200]))
        page.on("console", lambda m: m.type in ("error", "warning") and complaints.append(m.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(path.as_uri())
        if options.get("java_script_enabled", True):
            page.wait_for_selector("html[data-drawn]")
        return page

    yield show
    for context in contexts:
        context.close()
    assert complaints == []


def column(page, table, index):
    return page.locator(f"#{table} tbody tr:not([hidden]) > :nth-child({index})").all_text_contents()


@pytest.mark.browser
def test_hovering_a_bin_reads_out_its_numbers(show, results):
    page = show("model")
    curve = results("model").reliability["before"]
    point = page.locator("#reliability-before .scatterlayer .point").nth(8)
    point.scroll_into_view_if_needed()
    box = point.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    label = page.locator("#reliability-before .hoverlayer .hovertext")
    label.wait_for()
    firm = [i for i, n in enumerate(curve.count) if n >= 10][8]
    assert label.text_content().startswith(f"Of {curve.count[firm]:,} predictions made with")
    assert f"{percent(curve.accuracy[firm], 0)} were right" in label.text_content()


@pytest.mark.browser
def test_the_arrow_keys_go_from_point_to_point(show, results):
    page = show("failed")
    counts = [n for n in results("failed").reliability["after"].count if n >= 10]
    page.locator("#reliability-after").focus()
    for n in counts[:3]:
        page.keyboard.press("ArrowRight")
        page.locator("#reliability-after .hovertext", has_text=f"Of {n:,} predictions").wait_for()
        assert page.locator("#spoken").text_content().startswith(f"Of {n:,} predictions made with")
    page.keyboard.press("ArrowLeft")
    assert page.locator("#spoken").text_content().startswith(f"Of {counts[1]:,} predictions made with")
    for name in ("ranking", "risk"):
        page.locator(f"#{name}").focus()
        page.keyboard.press("ArrowRight")
        page.locator(f"#{name} .hovertext").wait_for()


@pytest.mark.browser
def test_tables_sort_by_pointer_and_by_keyboard(show):
    page = show("model")
    head = page.locator("#per-class th", has_text="Recall")
    number = lambda text: float(text.replace("\u202f%", ""))  # noqa: E731
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    recalls = [number(text) for text in column(page, "per-class", 5)]
    assert recalls == sorted(recalls)
    head.locator("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert [number(text) for text in column(page, "per-class", 5)] == sorted(recalls, reverse=True)
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Space")
    assert head.get_attribute("aria-sort") == "none"
    assert page.locator("#per-class th[aria-sort=ascending]").text_content().startswith("Mean probability")


@pytest.mark.browser
def test_missing_numbers_sort_last_either_way(show):
    page = show("failed")
    button = page.locator("#calibrators th", has_text="Test ECE").locator("button")
    for _ in range(2):
        button.click()
        assert column(page, "calibrators", 4)[-1].strip() == "n/a"


@pytest.mark.browser
def test_measures_can_be_searched(show):
    page = show("model")
    page.get_by_placeholder("Search measure").fill("kolmogorov")
    assert len(column(page, "measures", 1)) == 1
    assert page.locator("#all output").text_content() == "1 of 52 rows shown"
    page.get_by_placeholder("Search measure").fill("")
    assert len(column(page, "measures", 1)) == 52


@pytest.mark.browser
def test_a_thousand_classes_stay_usable(show):
    page = show("thousand")
    assert len(column(page, "per-class", 1)) == 50
    page.get_by_placeholder("Search class").fill("class 77")
    assert len(column(page, "per-class", 1)) == 11
    page.get_by_placeholder("Search class").fill("")
    page.get_by_role("button", name="Show all 1,000 rows").click()
    assert len(column(page, "per-class", 1)) == 1000


@pytest.mark.browser
def test_the_theme_button_repaints_page_and_pictures(show):
    page = show("model", scheme="dark")
    colours = lambda: page.evaluate(  # noqa: E731
        """[getComputedStyle(document.body).backgroundColor,
            document.querySelector("#ranking .point").style.stroke,
            document.querySelector("#ranking .xtick text").style.fill]"""
    )
    dark = colours()
    page.get_by_role("button", name="Switch to the light theme").click()
    light = colours()
    assert all(a != b for a, b in zip(dark, light))
    page.get_by_role("button", name="Switch to the dark theme").click()
    assert colours() == dark


@pytest.mark.browser
def test_the_heat_map_switches_and_tells_the_difference(show):
    page = show("model")
    shown = lambda: page.locator("[data-heat]:visible").evaluate_all("all => all.map(x => x.dataset.heat)")  # noqa: E731
    assert shown() == ["accuracy"]
    page.locator("[data-heat=accuracy] td").nth(11).hover()
    assert "the unadapted model's" in page.locator("#tip").text_content()
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()
    page.get_by_label("Accuracy", exact=True).focus()
    page.keyboard.press("ArrowRight")
    assert shown() == ["ece"]


@pytest.mark.browser
@pytest.mark.parametrize("name", ["model", "failed"])
def test_no_barrier_that_axe_can_find(show, name):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = show(name)
    page.evaluate("document.querySelectorAll('details').forEach(x => x.open = true)")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        found = axe.run(page).response["violations"]
        grave = [(v["id"], v["nodes"][0]["html"]) for v in found if v["impact"] in ("serious", "critical")]
        assert grave == [], scheme


@pytest.mark.browser
@pytest.mark.parametrize("name", ["model", "table", "thousand", "evil"])
def test_nothing_overflows_a_phone(show, name):
    page = show(name, width=360)
    page.evaluate("document.querySelectorAll('details').forEach(x => x.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


@pytest.mark.browser
def test_without_script_everything_but_the_pictures_is_there(show):
    page = show("model", java_script_enabled=False)
    assert page.locator("h1").is_visible()
    assert page.locator("#measures tbody tr").count() == 52
    assert page.locator("table.heat").first.is_visible()
    assert page.locator("noscript p").is_visible()
    assert page.locator(".plot").first.is_hidden()
