import pytest
import torch
import torch.nn.functional as F

from trimtab.adaptation.rewards import ClipScoreReward, RewardEnsemble, advantages, bind, confidence_weights
from trimtab.core.checks import InputError


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_score_is_a_clamped_weighted_cosine():
    x, gallery = normal(3, 6), normal(5, 6, seed=1)
    index = torch.tensor([[0, 1], [4, 4], [2, 3]])
    reward = ClipScoreReward(torch.tanh, 3 * gallery)
    cosines = F.cosine_similarity(torch.tanh(x)[:, None], gallery[index], dim=-1)
    torch.testing.assert_close(reward(x, index), 2.5 * cosines.clamp_min(0))
    assert (reward(x, index) == 0).any()
    assert (reward(x, index) > 0).any()


def test_inputs_are_encoded_once_and_without_gradients():
    calls = []

    def encode(x):
        calls.append(torch.is_grad_enabled())
        return x

    x = normal(2, 4).requires_grad_()
    score = bind(ClipScoreReward(encode, torch.eye(4)), x)
    first = score(torch.tensor([[0, 1], [2, 3]]))
    score(torch.tensor([[0], [2]]))
    assert calls == [False]
    assert not first.requires_grad


def test_images_are_brought_to_the_judge_s_size():
    seen = []

    def encode(images):
        seen.append(images)
        return images.mean((2, 3))

    x = normal(2, 3, 8, 8)
    ClipScoreReward(encode, torch.eye(3), size=12)(x, torch.tensor([[0], [1]]))
    torch.testing.assert_close(seen[0], F.interpolate(x, size=(12, 12), mode="bicubic", align_corners=True))
    ClipScoreReward(encode, torch.eye(3), size=8)(x, torch.tensor([[0], [1]]))
    assert torch.equal(seen[1], x)


def test_an_ensemble_sums_by_weight_or_takes_the_mean():
    x, index = normal(2, 4), torch.tensor([[0, 1, 2], [3, 2, 1]])
    rewards = [ClipScoreReward(torch.tanh, normal(4, 4, seed=s)) for s in (1, 2)]
    one, two = (reward(x, index) for reward in rewards)
    torch.testing.assert_close(RewardEnsemble(rewards, [0.3, 0.8])(x, index), 0.3 * one + 0.8 * two)
    torch.testing.assert_close(RewardEnsemble(rewards)(x, index), (one + two) / 2)
    assert RewardEnsemble(rewards).classes == 4
    torch.testing.assert_close(RewardEnsemble([lambda x, i: 1.0 * i, rewards[0]], [1.0, 0.0])(x, index), 1.0 * index)


def test_scores_of_a_judge_in_half_precision_are_single():
    x, index = normal(2, 4), torch.tensor([[0, 1], [2, 3]])
    half = ClipScoreReward(lambda x: x.bfloat16(), normal(4, 4, seed=1).bfloat16())
    assert half(x, index).dtype == torch.float32
    torch.testing.assert_close(
        half(x, index), ClipScoreReward(lambda x: x, normal(4, 4, seed=1))(x, index), atol=0.03, rtol=0
    )


def test_the_authors_weights():
    assert confidence_weights(["ViT-L/14@336px", "RN50x64", "ViT-L/14"]) == [0.56, 0.17, 0.28]
    assert confidence_weights(["ViT-B/16"]) == [1.0]


def test_advantages():
    scores = normal(3, 4).double()
    rows = advantages(scores, amplify=True)
    torch.testing.assert_close(rows, (scores - scores.mean(1, True)) / (scores.std(1, keepdim=True) + 1e-5))
    torch.testing.assert_close(advantages(scores, across_views=True), scores - scores.mean())
    assert torch.equal(advantages(scores, baseline=False), scores)
    assert torch.equal(advantages(scores[:, :1]), scores[:, :1])
    torch.testing.assert_close(advantages(scores[:, :1], across_views=True), scores[:, :1] - scores[:, :1].mean())


@pytest.mark.bad_input
def test_bad_input_is_refused():
    with pytest.raises(InputError, match="gallery must be finite, found nan at row 0"):
        ClipScoreReward(torch.tanh, torch.full((2, 2), float("nan")))
    with pytest.raises(InputError, match="weight must lie in"):
        ClipScoreReward(torch.tanh, torch.eye(2), weight=0.0)
    with pytest.raises(InputError, match="width of the reward's features, 5, got 2"):
        ClipScoreReward(torch.tanh, torch.eye(2))(normal(1, 5), torch.tensor([[0]]))
    with pytest.raises(InputError, match="at least one reward"):
        RewardEnsemble([])
    with pytest.raises(InputError, match="one entry a reward, 1, got 2"):
        RewardEnsemble([ClipScoreReward(torch.tanh, torch.eye(2))], [1.0, 2.0])
    with pytest.raises(InputError, match=r"weights\[0\] must lie in"):
        RewardEnsemble([ClipScoreReward(torch.tanh, torch.eye(2))], [float("nan")])
    with pytest.raises(InputError, match=r"names must be among ViT-L/14@336px, .*, got 'RN50'"):
        confidence_weights(["ViT-L/14", "RN50"])
    with pytest.raises(InputError, match="what encode returns must be a numeric tensor"):
        ClipScoreReward(lambda x: object(), torch.eye(2))(normal(1, 2), torch.tensor([[0]]))
    with pytest.raises(InputError, match=r"same candidates, they know \[2, 3\]"):
        RewardEnsemble([ClipScoreReward(torch.tanh, torch.eye(n)) for n in (2, 3)])
