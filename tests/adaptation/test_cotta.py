from functools import partial

import pytest
import torch
from toynet import seeded_net, stream

from trimtab.adaptation import CoTTA
from trimtab.core.checks import InputError


def count_views(views, x, generator):
    views.append(x)
    return x


def test_views_are_drawn_only_where_the_anchor_is_unsure():
    for confidence, expected in ((0.0, 0), (1.0, 7)):
        views = []
        cotta = CoTTA(seeded_net(), confidence=confidence, augmentations=7, augment=partial(count_views, views))
        cotta(stream()[0])
        assert len(views) == expected
        assert 0 < float(cotta.anchor_confidence) < 1


def test_restoring_everything_leaves_the_source():
    cotta = CoTTA(seeded_net(), restore=1.0, confidence=0.0, teacher_momentum=0.0)
    for x in stream():
        cotta(x)
    net = dict(seeded_net().named_parameters())
    assert all(torch.equal(p, net[n]) for n, p in cotta.model.named_parameters())
    assert any(not torch.equal(p, net[n]) for n, p in cotta.teacher.named_parameters())


def test_the_share_that_is_put_back():
    cotta = CoTTA(seeded_net(), restore=0.3, confidence=0.0)
    before = {n: p.clone() for n, p in cotta.model.named_parameters()}
    cotta(stream()[0])
    back = torch.cat([(p == before[n]).flatten() for n, p in cotta.model.named_parameters()])
    assert 0.25 < float(back.double().mean()) < 0.35


def test_teacher_moves_slowly_and_speaks():
    cotta = CoTTA(seeded_net(), teacher_momentum=1.0, confidence=0.0, restore=0.0)
    x = stream()[0]
    first = cotta(x)
    for other in stream(seed=1):
        cotta(other)
    assert torch.equal(cotta(x), first)


def test_same_generator_same_numbers():
    xs = stream()
    runs = []
    for seed in (4, 4, 5):
        cotta = CoTTA(seeded_net(), augmentations=2, confidence=1.0, generator=torch.Generator().manual_seed(seed))
        runs.append(torch.stack([cotta(x) for x in xs]))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"confidence": 1.1}, "confidence must lie in"),
        ({"augmentations": 0}, "augmentations must be at least 1"),
        ({"teacher_momentum": -0.1}, "teacher_momentum must lie in"),
        ({"restore": 2.0}, "restore must lie in"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        CoTTA(seeded_net(), **options)


@pytest.mark.bad_input
def test_images_that_cannot_be_augmented_are_refused_at_the_first_batch():
    with pytest.raises(InputError, match="normalise inside the model"):
        CoTTA(seeded_net(), confidence=0.0)(5 * stream()[0])
