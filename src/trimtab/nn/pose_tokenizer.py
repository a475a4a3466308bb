"""Pose tokens: a pose as a row of codes from a codebook of valid poses, and the head that predicts them.

A tokenizer is trained on valid poses to give them back through a small set of codes. A regressor that predicts
probabilities of codes, decoded by the frozen tokenizer, then hardly leaves what valid poses look like. Any pose in
rotations of six numbers a joint will do; the sizes of the paper are for the 21 body joints of SMPL.

Paper: Dwivedi, Sun, Patel, Feng, Black, "TokenHMR: Advancing Human Mesh Recovery with a Tokenized Pose Representation",
CVPR 2024 (arXiv:2404.16752); written anew from its description. The authors' loss also compares vertices and joints
of a body model, which is licensed apart and left out: `PoseTokenizer.loss` keeps rotations and commitment. So are their
input noise, which their code writes to a temporary copy, and the token cross-entropy, which is no part of their final
loss. Their regressor adds what is decoded to a mean pose, in the six numbers, before it makes rotations of them; the
root and the hands come from plain linear layers.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.nn.rotations import rot6d_to_matrix
from trimtab.nn.vector_quantizer import EMAResetQuantizer


class Tokenized(NamedTuple):
    """What `PoseTokenizer` returns.

    Attributes:
        poses: (n, joints, 6), as they are given back.
        commitment: the mean squared distance of the latents from their codes.
        perplexity: how many codes the batch uses.
        codes: (n, tokens).
    """

    poses: Float[Tensor, "n joints 6"]
    commitment: Float[Tensor, ""]
    perplexity: Float[Tensor, ""]
    codes: Int[Tensor, "n tokens"]


class PoseTokenizer(nn.Module):
    """An auto-encoder of poses with a codebook in the middle.

    The encoder stretches the joints, as a sequence, to `tokens` * 2^downs places and folds them to `tokens` latents;
    the decoder shrinks these to the joints again. The paper's optimizer is AdamW 2e-4 with betas 0.9 and 0.99 and
    weight decay 1e-5, over 150 000 batches of 256.

    Args:
        joints: joints of a pose; 21.
        tokens: codes a pose; 160. tokens * 2^(downs - doublings) must be an integer.
        codes: size of the codebook; 2048.
        dim: length of a code; 256.
        width: channels of the convolutions; 512.
        doublings: upsamplings by two in the encoder, after the first; 3.
        downs: halvings behind them; 1.
        depth: residual blocks at each halving, with dilations 3^(depth - 1) .. 1; 2.
        decay: of the codebook's moving averages; 0.99.

    Raises:
        InputError: a number is out of range, or the lengths do not fit.

    Example:
        >>> import torch
        >>> with torch.random.fork_rng(devices=[]):
        ...     tokenizer = PoseTokenizer(joints=5, tokens=8, codes=16, dim=4, width=8)
        >>> poses = torch.randn(32, 5, 6, generator=torch.Generator().manual_seed(0))
        >>> tokenizer(poses).poses.shape, tokenizer.encode(poses).shape
        (torch.Size([32, 5, 6]), torch.Size([32, 8]))

    Reference:
        Dwivedi et al., CVPR 2024, https://arxiv.org/abs/2404.16752
    """

    def __init__(
        self,
        *,
        joints: int = 21,
        tokens: int = 160,
        codes: int = 2048,
        dim: int = 256,
        width: int = 512,
        doublings: int = 3,
        downs: int = 1,
        depth: int = 2,
        decay: float = 0.99,
    ):
        super().__init__()
        self.joints = checks.integer(joints, "joints", low=1)
        self.tokens = checks.integer(tokens, "tokens", low=1)
        checks.integer(width, "width", low=1)
        checks.integer(doublings, "doublings", low=0)
        checks.integer(downs, "downs", low=0)
        checks.integer(depth, "depth", low=0)
        first, rest = divmod(tokens * 2**downs, 2**doublings)
        if first == 0 or rest:
            raise InputError(
                f"tokens must be a multiple of 2^(doublings - downs), {2 ** (doublings - downs):g}, got {tokens}"
            )
        self.encoder = nn.Sequential(
            *_convolved(6, width),
            nn.Upsample(first),
            *_convolved(width, width),
            *(layer for _ in range(doublings) for layer in (nn.Upsample(scale_factor=2), *_convolved(width, width))),
            *(layer for _ in range(downs) for layer in (nn.Conv1d(width, width, 4, 2, 1), _residual(width, depth))),
            nn.Conv1d(width, dim, 3, padding=1),
        )
        self.quantizer = EMAResetQuantizer(codes, dim, decay=decay)
        lengths = [joints + step * (tokens - joints) // (doublings + 1) for step in reversed(range(doublings + 1))]
        self.decoder = nn.Sequential(
            *_convolved(dim, width),
            *(layer for length in lengths for layer in (nn.Upsample(length), *_convolved(width, width))),
            *(
                layer
                for _ in range(downs)
                for layer in (_residual(width, depth), nn.Conv1d(width, width, 3, padding=1))
            ),
            nn.Conv1d(width, 6, 3, padding=1),
        )

    def forward(self, poses: Float[Tensor, "n joints 6"]) -> Tokenized:
        """Poses through the codebook and back; in train mode the codebook follows.

        Raises:
            InputError: another shape or type, or a value that is not finite.
        """
        output, commitment, perplexity, codes = self.quantizer(self.encoder(self._checked(poses)))
        return Tokenized(self.decoder(output).transpose(1, 2), commitment, perplexity, codes)

    def loss(self, poses: Float[Tensor, "n joints 6"], *, rotation_weight: float = 20.0) -> Float[Tensor, ""]:
        """rotation_weight x mean squared error of the rotation matrices + commitment; 20 as in the authors' code."""
        said = self(poses)
        error = (rot6d_to_matrix(said.poses) - rot6d_to_matrix(poses)).square().mean()
        return rotation_weight * error + said.commitment

    def encode(self, poses: Float[Tensor, "n joints 6"]) -> Int[Tensor, "n tokens"]:
        """The codes of poses."""
        return self.quantizer.quantize(self.encoder(self._checked(poses)))

    def decode(self, codes: Int[Tensor, "n tokens"]) -> Float[Tensor, "n joints 6"]:
        """The poses that codes stand for."""
        return self.decoder(self.quantizer.dequantize(codes)).transpose(1, 2)

    def soft_decode(self, probs: Float[Tensor, "n tokens codes"]) -> Float[Tensor, "n joints 6"]:
        """The poses of mixed codes: what a regressor with a `TokenHead` is trained through.

        Freeze the tokenizer before: ``tokenizer.eval().requires_grad_(False)``.
        """
        return self.decoder(self.quantizer.soft_dequantize(probs)).transpose(1, 2)

    def _checked(self, poses: Tensor) -> Tensor:
        if poses.shape[1:] != (self.joints, 6) or len(poses) == 0 or not poses.is_floating_point():
            raise InputError(
                f"poses must be floating point of shape (n, {self.joints}, 6), n >= 1, got {checks.described(poses)}"
            )
        return checks.finite(poses, "poses").transpose(1, 2)


class TokenHead(nn.Module):
    """Probabilities over codes for each token, from a feature vector: linear, four mixers, linear, softmax.

    Args:
        features: length of the feature vector; 1024.
        tokens, codes: those of the tokenizer; 160 and 2048.
        hidden: channels of a token; 64.
        layers: mixers; 4.
        token_hidden, channel_hidden: width of a mixer's two perceptrons; 64 and 256.

    Raises:
        InputError: a number is out of range.

    Example:
        >>> import torch
        >>> with torch.random.fork_rng(devices=[]):
        ...     head = TokenHead(6, tokens=8, codes=16, hidden=4)
        >>> probs = head(torch.randn(2, 6, generator=torch.Generator().manual_seed(0)))
        >>> probs.shape, bool((probs.sum(-1) - 1).abs().max() < 1e-6)
        (torch.Size([2, 8, 16]), True)

    Reference:
        Dwivedi et al., CVPR 2024, https://arxiv.org/abs/2404.16752
    """

    def __init__(
        self,
        features: int = 1024,
        *,
        tokens: int = 160,
        codes: int = 2048,
        hidden: int = 64,
        layers: int = 4,
        token_hidden: int = 64,
        channel_hidden: int = 256,
    ):
        super().__init__()
        sizes = {
            "features": features,
            "tokens": tokens,
            "codes": codes,
            "hidden": hidden,
            "token_hidden": token_hidden,
            "channel_hidden": channel_hidden,
        }
        for name, size in sizes.items():
            checks.integer(size, name, low=1)
        checks.integer(layers, "layers", low=0)
        self.layers = nn.Sequential(
            nn.Linear(features, tokens * hidden),
            nn.LayerNorm(tokens * hidden),
            nn.ReLU(),
            nn.Unflatten(1, (tokens, hidden)),
            *(_Mixer(tokens, hidden, token_hidden, channel_hidden) for _ in range(layers)),
            nn.Linear(hidden, hidden),
            nn.LayerNorm(hidden),
            nn.ReLU(),
            nn.Linear(hidden, codes),
        )

    def forward(self, x: Float[Tensor, "n features"]) -> Float[Tensor, "n tokens codes"]:
        """Probabilities (n, tokens, codes), for `PoseTokenizer.soft_decode`.

        Raises:
            InputError: another shape or type, or a value that is not finite.
        """
        first = self.layers[0]
        assert isinstance(first, nn.Linear)
        return self.layers(checks.matrix(x, "x", columns=first.in_features)).softmax(-1)


class _Mixer(nn.Module):
    """x + y + z, with y mixing the tokens of x and z the channels of x + y."""

    def __init__(self, tokens: int, hidden: int, token_hidden: int, channel_hidden: int):
        super().__init__()
        self.token_norm, self.channel_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.tokens, self.channels = _perceptron(tokens, token_hidden), _perceptron(hidden, channel_hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.token_norm(x).transpose(1, 2)).transpose(1, 2)
        out: Tensor = x + self.channels(self.channel_norm(x))
        return out


def _perceptron(size: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(size, hidden), nn.GELU(), nn.Linear(hidden, size))


def _convolved(inputs: int, outputs: int) -> tuple[nn.Conv1d, nn.ReLU]:
    return nn.Conv1d(inputs, outputs, 3, padding=1), nn.ReLU()


class _Residual(nn.Module):
    """x + a dilated and a plain convolution of x."""

    def __init__(self, width: int, dilation: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(),
            nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation),
            nn.ReLU(),
            nn.Conv1d(width, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.layers(x)
        return out


def _residual(width: int, depth: int) -> nn.Sequential:
    return nn.Sequential(*(_Residual(width, 3**power) for power in reversed(range(depth))))
