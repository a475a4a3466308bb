"""The pose tokenizer and its head (60-tokenhmr): lengths, what is differentiable, and that it learns."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.core.checks import InputError
from trimtab.nn import PoseTokenizer, TokenHead

SMALL = {"joints": 5, "tokens": 8, "codes": 16, "dim": 4, "width": 8}


def seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def poses(n=32, joints=5, seed=0):
    return torch.randn(n, joints, 6, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 9), st.integers(1, 3), st.integers(0, 3), st.integers(0, 2), st.integers(0, 3))
@settings(max_examples=25)
def test_every_length_that_is_accepted_fits(joints, folds, doublings, downs, depth):
    tokens = folds * 2 ** max(doublings - downs, 0)
    sizes = {**SMALL, "joints": joints, "tokens": tokens, "doublings": doublings, "downs": downs, "depth": depth}
    tokenizer = seeded(lambda: PoseTokenizer(**sizes))
    given_back = tokenizer(poses(40, joints))
    assert given_back.poses.shape == (40, joints, 6)
    assert given_back.codes.shape == (40, tokens)


def test_the_papers_sizes_are_the_defaults():
    with torch.device("meta"):
        tokenizer, head = PoseTokenizer(), TokenHead()
        latents = tokenizer.encoder(torch.zeros(2, 6, 21))
        assert latents.shape == (2, 256, 160)
        assert tokenizer.decoder(latents).shape == (2, 6, 21)
        assert tokenizer.quantizer.codebook.shape == (2048, 256)
        assert head(torch.zeros(2, 1024)).shape == (2, 160, 2048)


def test_codes_say_what_the_tokenizer_gives_back():
    tokenizer = seeded(lambda: PoseTokenizer(**SMALL))
    tokenizer(poses())
    tokenizer.eval()
    given_back = tokenizer(poses(seed=1))
    assert torch.equal(tokenizer.encode(poses(seed=1)), given_back.codes)
    torch.testing.assert_close(tokenizer.decode(given_back.codes), given_back.poses)
    certain = torch.nn.functional.one_hot(given_back.codes, 16).float()
    torch.testing.assert_close(tokenizer.soft_decode(certain), given_back.poses)


def test_it_learns_poses_from_few_kinds():
    tokenizer = seeded(lambda: PoseTokenizer(**SMALL))
    kinds = poses(4)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=5e-3)
    losses = []
    for _ in range(80):
        loss = tokenizer.loss(kinds[torch.randint(4, (32,), generator=generator)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_a_regressor_learns_through_the_frozen_tokenizer():
    tokenizer = seeded(lambda: PoseTokenizer(**SMALL))
    tokenizer(poses())
    tokenizer.eval().requires_grad_(False)
    head = seeded(lambda: TokenHead(7, tokens=8, codes=16, hidden=4))
    features = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    tokenizer.soft_decode(head(features)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())
    assert all(p.grad is None for p in tokenizer.parameters())


@pytest.mark.bad_input
def test_bad_input_is_refused():
    with pytest.raises(InputError, match=r"tokens must be a multiple of 2\^\(doublings - downs\), 4, got 6"):
        PoseTokenizer(tokens=6)
    with pytest.raises(InputError, match="joints must be at least 1"):
        PoseTokenizer(joints=0)
    with pytest.raises(InputError, match="codes must be at least 1"):
        TokenHead(codes=0)
    tokenizer = seeded(lambda: PoseTokenizer(**SMALL))
    with pytest.raises(InputError, match=r"poses must be floating point of shape \(n, 5, 6\), n >= 1, got float32 \(2"):
        tokenizer(torch.zeros(2, 4, 6))
    with pytest.raises(InputError, match="poses must be finite, found nan at axis 0 index 0"):
        tokenizer(torch.full((2, 5, 6), torch.nan))
    head = seeded(lambda: TokenHead(7, tokens=8, codes=16, hidden=4))
    with pytest.raises(InputError, match="x must have 7 columns, got 6"):
        head(torch.zeros(2, 6))
