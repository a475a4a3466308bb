"""Audit results for the report's tests, computed with numpy from synthetic logits; no number is typed by hand."""

from dataclasses import replace

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.stats import beta

from trimtab.audit.result import AuditResult, ClassRow, Curve, Ranked, ShiftCell

BINS = (5, 10, 15, 20, 25, 50, 100, 200, 500)
SHIFTS = ("gaussian_noise", "motion_blur", "contrast")
ADAPTERS = {
    "Source": 0.0,
    "BatchNorm": 0.5,
    "Tent": 0.6,
    "EATA": 0.68,
    "ETA": 0.66,
    "CoTTA": 0.55,
    "RoTTA": 0.45,
    "LAME": -0.12,
}


def audit(
    *,
    seed: int = 0,
    n: int = 2000,
    c: int = 10,
    sharpness: float = 2.2,
    signal: float = 2.4,
    shifts: tuple[str, ...] = SHIFTS,
    kind: str = "model",
) -> AuditResult:
    """A whole audit of a synthetic model whose logits are `sharpness` times what they should be."""
    random = np.random.default_rng(seed)
    (fit, fit_labels), (kept, kept_labels), (test, labels) = (draw(random, n, c, sharpness, signal) for _ in range(3))
    temperature = best_temperature(fit, fit_labels)
    bias = np.log((np.bincount(fit_labels, minlength=c) + 1) / (softmax(fit / temperature).sum(0) + 1))
    calibrators = {
        "Uncalibrated": lambda z: softmax(z),
        "Temperature scaling": lambda z: softmax(z / temperature),
        "Ensemble temperature scaling": lambda z: 0.97 * softmax(z / (0.96 * temperature)) + 0.03 / c,
        "Vector scaling": lambda z: softmax(z / temperature + bias),
        "Matrix scaling": lambda z: softmax(z / (0.9 * temperature) + 2 * bias),
        "Platt scaling": lambda z: softmax(z / (1.08 * temperature)),
        "Beta calibration": lambda z: softmax(z / (1.12 * temperature)),
        "Isotonic calibration": lambda z: 0.9 * softmax(z / (0.8 * temperature)) + 0.1 / c,
        "Histogram binning": lambda z: 0.75 * softmax(z / temperature) + 0.25 / c,
    }
    complexity = {name: i for i, name in enumerate(calibrators)}
    held_out = {name: row_losses(f(kept), kept_labels) for name, f in calibrators.items()}
    ranked = sorted(held_out, key=lambda name: held_out[name].mean())
    folds = {name: held_out[name].reshape(5, -1).mean(1) for name in ranked}
    spread = lambda x: float(x.std(ddof=1) / np.sqrt(5))  # noqa: E731
    behind = {name: folds[name] - folds[ranked[0]] for name in ranked}
    pick = min((name for name in ranked if behind[name].mean() <= spread(behind[name])), key=complexity.__getitem__)
    before, after = softmax(test), calibrators[pick](test)
    heads = {name: headline(f(test), labels, random) for name, f in calibrators.items()}
    loss = row_losses(after, labels) - row_losses(before, labels)
    return AuditResult(
        title="small-cnn on handwritten digits" if kind == "model" else "scores.parquet",
        kind=kind,
        n=n,
        n_fit=n,
        c=c,
        classes=[f"class {i}" for i in range(c)],
        interval_method="Percentile bootstrap over the rows, 200 resamples; Clopper-Pearson for shares within a bin.",
        level=0.95,
        before=heads["Uncalibrated"],
        after=heads[pick],
        measures=measures(before, softmax(test / temperature), labels),
        reliability={"before": curve(before, labels), "after": curve(after, labels)},
        histogram={
            when: np.histogram(p.max(1), 20, (0, 1))[0].tolist() for when, p in (("before", before), ("after", after))
        },
        risk_coverage={"before": risks(before, labels), "after": risks(after, labels)},
        ranking=[
            Ranked(
                name=name,
                symbol="".join(word.capitalize() for word in name.split()),
                log_loss=float(held_out[name].mean()),
                standard_error=spread(folds[name]),
                difference_error=spread(behind[name]),
                test_log_loss=heads[name]["log_loss"],
                test_ece=heads[name]["ece"],
                test_accuracy=heads[name]["accuracy"],
                seconds=0.02 * (1 + complexity[name]) ** 2,
                chosen=name == pick,
            )
            for name in ranked
        ],
        shifts=shift_cells(random, shifts, n, c, sharpness, signal) if shifts else [],
        per_class=[class_row(f"class {i}", before[:, i], after[:, i], before, labels, i) for i in range(c)],
        steps=[
            ("collect test", 3.2),
            ("measure", 1.4),
            ("rank calibrators", 4.8),
            ("adapt to shifts", 96.0),
            ("in all", 106.0),
        ],
        versions={"trimtab": "0.1.0", "torch": "2.13.0", "python": "3.11.2"},
        settings={"seed": seed, "workers": 2, "folds": 5, "resamples": 200},
        notes=["Quantization was left out: it is not part of this version."],
        change={"log_loss": normal(loss)} if before is not after else {},
    )


def with_a_failed_calibrator(result: AuditResult) -> AuditResult:
    failed = Ranked(
        "Beta calibration", "BetaCalibration", *[np.nan] * 2, *[(np.nan,) * 3] * 3, 1.5, failed="no optimum"
    )
    rows = [row for row in result.ranking if row.name != failed.name]
    return replace(result, ranking=[*rows, failed])


def with_a_failed_adapter(result: AuditResult, adapter: str = "Tent") -> AuditResult:
    nothing = (np.nan,) * 3
    reason = "InputError: model has no normalisation layer"
    cells = [
        replace(cell, accuracy=nothing, ece=nothing, log_loss=nothing, failed=reason)
        if cell.adapter == adapter
        else cell
        for cell in result.shifts
    ]
    return replace(result, shifts=cells)


def with_missing_measures(result: AuditResult) -> AuditResult:
    nothing = (np.nan, np.nan, np.nan)
    return replace(
        result,
        measures=result.measures | {"pre_KDECE": nothing, "post_KDECE": nothing, "auc_svhn": (0.91, np.nan, np.nan)},
        before=result.before | {"aurc": nothing, "brier": (result.before["brier"][0], np.nan, np.nan)},
        after=result.after | {"aurc": nothing},
    )


def renamed(result: AuditResult, names: list[str], title: str) -> AuditResult:
    rows = [replace(row, name=name) for row, name in zip(result.per_class, names)]
    return replace(result, title=title, classes=names, per_class=rows)


def draw(random, n, c, sharpness, signal, damage=0.0):
    """Scores that know the truth up to `damage`, and labels drawn from the undamaged ones."""
    true = random.normal(0, signal, (n, c))
    labels = (true + random.gumbel(size=(n, c))).argmax(1)
    return sharpness * (true * (1 - 0.5 * damage) + random.normal(0, 0.05 + 2.5 * damage, (n, c))), labels


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def row_losses(p, y):
    return -np.log(p[np.arange(len(y)), y] + 1e-300)


def best_temperature(z, y):
    return float(minimize_scalar(lambda t: row_losses(softmax(z / t), y).mean(), bounds=(0.1, 10), method="bounded").x)


def normal(x):
    half = 1.96 * x.std() / np.sqrt(len(x))
    return float(x.mean()), float(x.mean() - half), float(x.mean() + half)


def bin_edges(x, bins, mass):
    return np.quantile(x, np.linspace(0, 1, bins + 1)) if mass else np.linspace(0, 1, bins + 1)


def gaps(x, right, bins, mass=False):
    """Weight and gap of every bin."""
    cell = np.clip(np.searchsorted(bin_edges(x, bins, mass), x, "left") - 1, 0, bins - 1)
    n = np.bincount(cell, minlength=bins)
    gap = np.bincount(cell, right, bins) - np.bincount(cell, x, bins)
    return n / len(x), np.abs(gap) / np.maximum(n, 1)


def ece(x, right, bins=15, mass=False):
    weight, gap = gaps(x, right, bins, mass)
    return float(weight @ gap)


def around(x, right, bins, mass=False, draws=20):
    """ECE with a bootstrap interval; the generator is local so that adding a measure moves no other."""
    random = np.random.default_rng(1)
    found = [ece(x[i], right[i], bins, mass) for i in random.integers(0, len(x), (draws, len(x)))]
    return ece(x, right, bins, mass), float(min(found)), float(max(found))


def headline(p, y, random):
    conf, right = p.max(1), (p.argmax(1) == y).astype(float)
    one = np.eye(p.shape[1])[y]
    class_wise = float(np.mean([ece(p[:, i], one[:, i]) for i in range(min(10, p.shape[1]))]))
    ranks = np.argsort(np.argsort(conf + 1e-9 * random.random(len(conf))))
    n1 = right.sum()
    auroc = float((ranks[right == 1].sum() - n1 * (n1 - 1) / 2) / max(1, n1 * (len(y) - n1)))
    area = float(np.mean([risk for _, risk in risks(p, y)]))
    _, gap = gaps(conf, right, 15)
    return {
        "accuracy": normal(right),
        "ece": around(conf, right, 15),
        "ece_em": around(conf, right, 15, mass=True),
        "mce": (float(gap.max()),) * 3,
        "cw_ece": (class_wise, 0.8 * class_wise, 1.2 * class_wise),
        "log_loss": normal(row_losses(p, y)),
        "brier": normal(((p - one) ** 2).sum(1)),
        "auroc": (auroc, auroc - 0.01, min(1.0, auroc + 0.01)),
        "aurc": (area, 0.9 * area, 1.1 * area),
        "mean_confidence": normal(conf),
    }


def curve(p, y, bins=15):
    conf, right = p.max(1), p.argmax(1) == y
    cell = np.clip(np.ceil(conf * bins).astype(int) - 1, 0, bins - 1)
    rows = []
    for b in np.unique(cell):
        inside = cell == b
        n, k = int(inside.sum()), int(right[inside].sum())
        low = float(beta.ppf(0.025, k, n - k + 1)) if k else 0.0
        high = float(beta.ppf(0.975, k + 1, n - k)) if k < n else 1.0
        rows.append((b / bins, (b + 1) / bins, n, float(conf[inside].mean()), k / n, low, high))
    return Curve(*(list(column) for column in zip(*rows)))


def risks(p, y, points=200):
    wrong = (p.argmax(1) != y)[np.argsort(-p.max(1), kind="stable")]
    running = np.cumsum(wrong) / np.arange(1, len(y) + 1)
    chosen = np.unique(np.linspace(0, len(y) - 1, points).astype(int))
    return [((i + 1) / len(y), float(running[i])) for i in chosen]


def measures(before, after, y):
    """All names of the suite; class-wise ones over at most ten classes, so that a thousand classes stay fast."""
    found = {}
    for when, p in (("pre", before), ("post", after)):
        conf, right = p.max(1), (p.argmax(1) == y).astype(float)
        classes = range(min(10, p.shape[1]))
        for bins in BINS:
            found[f"{when}_ECE_{bins}"] = around(conf, right, bins)
            found[f"{when}_ECE_em_{bins}"] = around(conf, right, bins, mass=True)
            for name, mass in (("cwCE", False), ("cwCE_em", True)):
                value = float(np.mean([ece(p[:, i], (y == i).astype(float), bins, mass) for i in classes]))
                found[f"{when}_{name}_{bins}"] = (value, 0.9 * value, 1.1 * value)
            found[f"{when}_MCE_{bins}"] = (float(gaps(conf, right, bins)[1].max()),) * 3
        order = np.argsort(conf)
        running = float(np.abs(np.cumsum((conf - right)[order])).max() / len(y))
        some = slice(None, None, max(1, len(y) // 500))
        gap, x = (right - conf)[some], conf[some]
        kernel = np.exp(-2.5 * np.abs(x[:, None] - x))
        found[f"{when}_KSCE"] = (running, 0.9 * running, 1.1 * running)
        found[f"{when}_KDECE"] = around(conf, right, 12)
        found[f"{when}_MMCE"] = (float(np.sqrt(gap @ kernel @ gap)) / len(gap),) * 3
        found[f"{when}_NLL"] = normal(row_losses(p, y))
        found[f"{when}_Brier"] = normal(((p - np.eye(p.shape[1])[y]) ** 2).sum(1))
    return found | {"auc_cifar10c": (0.81, 0.79, 0.83), "auc_svhn": (0.92, 0.91, 0.93)}


def shift_cells(random, shifts, n, c, sharpness, signal):
    cells = []
    for i, shift in enumerate(("none", *shifts)):
        damage = 0.0 if shift == "none" else 0.25 + 0.55 * ((i * 7) % 5) / 4
        for adapter, help_ in ADAPTERS.items():
            left = damage * (1 - help_) + (0.05 if help_ and shift == "none" else 0.0)
            z, y = draw(random, n, c, sharpness, signal, left)
            p = softmax(z)
            conf, right = p.max(1), (p.argmax(1) == y).astype(float)
            loss = normal(row_losses(p, y))
            cells.append(
                ShiftCell(shift, adapter, n, normal(right), around(conf, right, 15), loss, 2.0 + 9 * abs(help_))
            )
    return cells


def class_row(name, before, after, p, y, i):
    true = (y == i).astype(float)
    found = (p.argmax(1) == i)[y == i]
    recall = float(found.mean()) if len(found) else float("nan")
    return ClassRow(name, int(true.sum()), recall, float(before.mean()), ece(before, true), ece(after, true))
