"""Episodes: as asked, disjoint, reproducible."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from trimtab.core.checks import InputError
from trimtab.losses import EpisodeSampler


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.integers(2, 6), st.integers(1, 3), st.integers(1, 4), st.integers(0, 3))
def test_an_episode_is_what_was_asked_for(seed, way, shot, queries, more):
    generator = torch.Generator().manual_seed(seed)
    labels = 3 * torch.arange(way + more).repeat(shot + queries + more)
    labels = labels[torch.randperm(len(labels), generator=generator)]
    sampler = EpisodeSampler(labels, way=way, shot=shot, queries=queries, episodes=4, seed=seed)
    episodes = list(sampler)
    assert len(episodes) == len(sampler) == 4
    for rows in episodes:
        assert len(set(rows)) == len(rows) == way * (shot + queries)
        support, asked = labels[rows[: way * shot]].view(way, shot), labels[rows[way * shot :]].view(way, queries)
        assert (support == support[:, :1]).all()
        assert (asked == support[:, :1]).all()
        assert len(set(support[:, 0].tolist())) == way


def test_every_example_and_class_comes_up():
    labels = np.arange(40) % 4
    sampler = EpisodeSampler(labels, way=2, shot=1, queries=2, episodes=200)
    counts = np.bincount([row for rows in sampler for row in rows], minlength=40)
    assert counts.min() > 10
    assert counts.max() < 60


def test_a_seed_gives_the_same_passes_and_a_pass_other_episodes():
    labels = torch.arange(60) % 6
    first, second = (EpisodeSampler(labels, way=3, shot=1, queries=2, episodes=5, seed=3) for _ in range(2))
    passes = [list(first), list(first)]
    assert passes == [list(second), list(second)]
    assert passes[0] != passes[1]


def test_it_drives_a_loader():
    labels = torch.arange(60) % 6
    sampler = EpisodeSampler(labels, way=3, shot=1, queries=2, episodes=5)
    loader = DataLoader(
        TensorDataset(torch.arange(60.0)[:, None], labels), batch_sampler=sampler, generator=torch.Generator()
    )
    assert [len(y.unique()) for _, y in loader] == [3] * 5


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"way": 7}, "labels must have at least way = 7 classes, got 6"),
        ({"way": 1}, "way must be at least 2"),
        ({"queries": 10}, r"shot \+ queries = 11 examples of every class, got 10 of class 0"),
        ({"shot": 0}, "shot must be at least 1"),
        ({"episodes": 0}, "episodes must be at least 1"),
        ({"labels": torch.zeros(3)}, "labels must be integer class indices"),
        ({"labels": torch.zeros((), dtype=torch.int64)}, r"labels must have shape \(n,\)"),
    ],
)
def test_bad_input_is_refused(options, message):
    settings_ = {"labels": torch.arange(60) % 6, "way": 3, "shot": 1, "queries": 2, "episodes": 5, **options}
    with pytest.raises(InputError, match=message):
        EpisodeSampler(settings_.pop("labels"), **settings_)
