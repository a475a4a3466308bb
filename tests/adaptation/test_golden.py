"""Parity with the authors' own code for the slugs 00-tta-baselines and 24-eata, driven by the files that are there."""

import numpy as np
import pytest
import torch
from toynet import Golden, golden_files

from trimtab.adaptation import EATA, BatchNormAdapt, CoTTA, RoTTA, Source, Tent
from trimtab.adaptation.lame import affinity, smooth
from trimtab.adaptation.rotta import Item, offer

pytestmark = pytest.mark.golden
BASELINES, EATA_SLUG = "00-tta-baselines", "24-eata"
precisions = pytest.mark.parametrize("precision", ["f64", "f32"])


def read(path, precision):
    golden = Golden(path, precision)
    if not golden.precise:
        pytest.skip(f"{path.name} has no results in {precision}")
    return golden


@precisions
@pytest.mark.parametrize("path", golden_files(BASELINES, "bn1_weight_after"))
def test_tent(path, precision):
    golden = read(path, precision)
    tent = Tent(golden.net(), optimizer=golden.optimizer(), **golden.adapted())
    outputs, bn1 = [], []
    for x in golden.tensor("x"):
        outputs.append(tent(x))
        bn1.append(tent.model.bn1.weight.detach().clone())
    golden.check("outputs", torch.stack(outputs))
    golden.check("bn1_weight_after", torch.stack(bn1))
    golden.check_network("final", tent.model)
    golden.finish()


@precisions
@pytest.mark.parametrize("path", golden_files(BASELINES, "x", "out_*"))
def test_batch_norm_variants(path, precision):
    golden = read(path, precision)
    for name in golden.results("out_"):
        if name == "source":
            adapter = Source(golden.net())
        elif name.startswith("alpha_"):
            adapter = BatchNormAdapt(golden.net(), variant="mixed", alpha=float(name.removeprefix("alpha_")))
        else:
            adapter = BatchNormAdapt(golden.net(), variant={"bn_test": "batch", "bn_ema": "ema"}[name])
        golden.check(f"out_{name}", torch.stack([adapter(x) for x in golden.tensor("x")]))
    golden.finish()


@precisions
@pytest.mark.parametrize("path", golden_files(BASELINES, setting="n_aug"))
def test_cotta(path, precision):
    golden = read(path, precision)
    cfg = golden.cfg
    batch = 0
    cotta = CoTTA(
        golden.net(),
        confidence=cfg["ap"],
        restore=cfg["rst"],
        teacher_momentum=cfg["teacher_momentum"],
        augmentations=int(cfg["n_aug"]),
        symmetric=not cfg["one_sided_ce"],
        optimizer=golden.optimizer(),
        augment=golden.augment(),
        restore_mask=lambda name, parameter, generator: golden.tensor(f"mask.{batch}.{name}"),
    )
    outputs, confidence = [], []
    for batch, x in enumerate(golden.tensor("x")):  # noqa: B007
        outputs.append(cotta(x))
        confidence.append(cotta.anchor_confidence.clone())
    golden.check("outputs", torch.stack(outputs))
    golden.check("anchor_conf", torch.stack(confidence))
    golden.check_network("student", cotta.model)
    golden.check_network("teacher", cotta.teacher)
    golden.finish()


@precisions
@pytest.mark.parametrize("path", golden_files(BASELINES, "features", "logits", "knn"))
def test_lame(path, precision):
    golden = read(path, precision)
    for kernel in golden.results("kernel_"):
        weights = affinity(golden.tensor("features"), kernel, int(golden.arrays["knn"]))
        golden.check(f"kernel_{kernel}", weights)
        golden.check(f"out_{kernel}", smooth(golden.tensor("logits"), weights))
        golden.check(f"out_sym_{kernel}", smooth(golden.tensor("logits"), (weights + weights.T) / 2))
    golden.finish()


@pytest.mark.parametrize("path", golden_files(BASELINES, "*.mem_ids"))
def test_rotta_memory(path):
    arrays = dict(np.load(path))
    streams = sorted(name.removesuffix(".mem_ids") for name in arrays if name.endswith(".mem_ids"))
    for name in streams:
        get = {key: arrays[f"{name}.{key}"] for key in ("pred", "unc", "capacity", "num_class")}
        settings = {"capacity": int(get["capacity"]), "classes": int(get["num_class"])}
        for key in ("lambda_t", "lambda_u"):
            if f"{name}.{key}" in arrays:
                settings[{"lambda_t": "timeliness", "lambda_u": "uncertainty"}[key]] = float(arrays[f"{name}.{key}"])
        bank = {}
        for t, (label, entropy) in enumerate(zip(get["pred"].tolist(), get["unc"].tolist())):
            offer(bank, label, Item(t, t, entropy), **settings)
            held = [(item.row, t + 1 - item.born, c) for c in sorted(bank) for item in bank[c]]
            held += [(-1, -1, -1)] * (settings["capacity"] - len(held))
            for key, values in zip(("mem_ids", "mem_ages", "mem_cls"), zip(*held)):
                np.testing.assert_array_equal(values, arrays[f"{name}.{key}"][t], err_msg=f"{name}.{key} at {t}")
    assert streams


@precisions
@pytest.mark.parametrize("path", golden_files(BASELINES, setting="memory_size"))
def test_rotta(path, precision):
    golden = read(path, precision)
    cfg = golden.cfg
    rotta = RoTTA(
        golden.net(),
        capacity=int(cfg["memory_size"]),
        update_every=int(cfg["update_frequency"]),
        alpha=cfg["alpha"],
        nu=cfg["nu"],
        timeliness=cfg.get("lambda_t", 1.0),
        uncertainty=cfg.get("lambda_u", 1.0),
        optimizer=golden.optimizer(),
        augment=golden.augment(),
    )
    golden.check("outputs", torch.stack([rotta(x) for x in golden.tensor("x")]))
    golden.check_network("student", rotta.model)
    golden.check_network("teacher", rotta.teacher)
    golden.finish()


@precisions
@pytest.mark.parametrize("path", golden_files(EATA_SLUG, "cum_reliable"))
def test_eata(path, precision):
    golden = read(path, precision)
    cfg = golden.cfg
    net, adapted = golden.net(), golden.adapted()
    source = golden.tensor("x_src") if "x_src" in golden.arrays else []
    fishers = EATA.prepare(net, source, n=sum(map(len, source)), **adapted) if len(source) else None
    for name, value in (fishers or {}).items():
        golden.check(f"fisher.{name}", value)
    eata = EATA(
        net,
        prepared=fishers if cfg["use_fisher"] else None,
        fisher_weight=cfg["fisher_alpha"],
        e_margin=cfg["e_margin"],
        d_margin=cfg["d_margin"],
        optimizer=golden.optimizer(),
        **adapted,
    )
    steps = {"outputs": [], "cum_reliable": [], "cum_selected": [], "probs_ema": []}
    for x in golden.tensor("x"):
        steps["outputs"].append(eata(x))
        steps["cum_reliable"].append(eata.reliable.clone())
        steps["cum_selected"].append(eata.selected.clone())
        steps["probs_ema"].append(eata.mean_probs)
    for name, values in steps.items():
        golden.check(name, torch.stack(values))
    golden.check_network("final", eata.model)
    golden.finish()
