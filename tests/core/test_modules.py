"""Choosing parameters, swapping layers, watching inputs, restoring modes."""

import pytest
import torch
from torch import nn

from trimtab.core import modules
from trimtab.core.checks import InputError


@pytest.fixture(autouse=True)
def _layers_are_initialised_apart():
    with torch.random.fork_rng(devices=[]):
        yield


def net():
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)),
        nn.GroupNorm(2, 4, affine=False),
        nn.Flatten(),
        nn.LayerNorm(16),
        nn.Linear(16, 5),
        nn.Linear(5, 2),
    )


def test_norm_parameters_by_name():
    model = net()
    chosen = modules.norm_parameters(model)
    assert set(chosen) == {"0.1.weight", "0.1.bias", "3.weight", "3.bias"}
    assert all(chosen[name] is dict(model.named_parameters())[name] for name in chosen)
    assert set(modules.norm_parameters(nn.BatchNorm1d(3))) == {"weight", "bias"}
    assert set(modules.all_parameters(model)) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2, affine=False)), nn.Identity()])
def test_a_model_without_affine_norms_is_refused(model):
    with pytest.raises(InputError, match="model must have a normalisation layer with affine parameters, found none"):
        modules.norm_parameters(model)


def test_layers_are_swapped_wherever_they_stand():
    model = net()
    conv = model[0][0]
    swapped = modules.replace(model, modules.BATCH_NORMS, lambda old: nn.Sequential(old))
    assert swapped is model
    assert isinstance(model[0][1], nn.Sequential)
    assert isinstance(model[0][1][0], nn.BatchNorm2d)
    assert model[0][0] is conv
    assert isinstance(modules.replace(nn.BatchNorm1d(3), modules.BATCH_NORMS, lambda _: nn.Identity()), nn.Identity)


def test_a_shared_layer_stays_shared():
    norm = nn.BatchNorm1d(3)
    model = nn.Sequential(norm, nn.Linear(3, 3), norm)
    built = []
    modules.replace(model, nn.BatchNorm1d, lambda old: built.append(old) or nn.LayerNorm(3))
    assert built == [norm]
    assert model[0] is model[2]
    assert isinstance(model[2], nn.LayerNorm)


def test_finding_layers():
    model = net()
    assert modules.last_linear(model) is model[5]
    assert modules.submodule(model, "0.1") is model[0][1]
    for name in ("0.9", ""):
        with pytest.raises(InputError, match=f"model has no module named '{name}'; the last ones are: .*5"):
            modules.submodule(model, name)
    with pytest.raises(InputError, match="found none; name a module instead"):
        modules.last_linear(nn.ReLU())


def test_the_watch_ends_with_its_block():
    model = net().eval()
    x = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    with modules.watch_input(model[4]) as seen:
        model(x)
        model(x)
    model(x)
    assert len(seen) == 2
    assert torch.equal(seen[0], model[:4](x))
    assert not seen[0].requires_grad

    def fails():
        with modules.watch_input(model[4]):
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fails()
    assert not model[4]._forward_pre_hooks


def test_every_modules_own_mode_comes_back():
    model = net().train()
    model[0][1].eval()
    modes = [module.training for module in model.modules()]

    def fails():
        with modules.evaluating(model) as inside:
            assert inside is model
            assert not any(module.training for module in model.modules())
            assert not torch.is_grad_enabled()
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fails()
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()


def test_the_device_of_a_model():
    assert modules.device_of(nn.Linear(2, 2, device="meta")) == torch.device("meta")
    assert modules.device_of(nn.BatchNorm1d(2, affine=False)) == torch.device("cpu")
    assert modules.device_of(nn.ReLU()) == torch.device("cpu")


class StandIn(modules.BatchNormStandIn):
    """Normalises by the source's statistics."""

    def _normalised(self, x):
        return self._normalise(x, self.source_mean, self.source_var)


class LikeTimm(nn.BatchNorm2d):
    """Drops and activates after it has normalised."""

    def __init__(self, width):
        super().__init__(width)
        self.act, self.drop = nn.ReLU(inplace=True), nn.Dropout2d(0.5)

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


def test_a_stand_in_does_what_follows_the_normalisation():
    x = torch.randn(4, 3, 2, 2)
    for layer in (LikeTimm(3), nn.BatchNorm2d(3), nn.SyncBatchNorm(3)):
        nn.init.normal_(layer.weight), nn.init.normal_(layer.running_mean)
        stand_in = StandIn(layer).eval()
        torch.testing.assert_close(stand_in(x), layer.eval()(x))
        assert {n for n, _ in stand_in.named_parameters()} == {n for n, _ in layer.named_parameters()}


@pytest.mark.bad_input
def test_a_layer_with_a_forward_pass_of_its_own_has_no_stand_in():
    class Ghost(nn.BatchNorm2d):
        def forward(self, x):
            return torch.cat([super(Ghost, self).forward(part) for part in x.split(2)])

    with pytest.raises(InputError, match="of torch or timm, Ghost has a forward pass of its own"):
        StandIn(Ghost(3))
    with pytest.raises(InputError, match="keep running statistics"):
        StandIn(nn.BatchNorm2d(3, track_running_stats=False))


def test_what_a_layer_remembers_of_an_evaluation_is_forgotten():
    class Remembering(StandIn):
        def forward(self, x):
            self.source_mean = x.mean(0)
            return self._normalised(x)

    model = modules.replace(nn.Sequential(nn.BatchNorm1d(3)), modules.BATCH_NORMS, Remembering)
    with modules.evaluating(model):
        model(torch.ones(4, 3))
        assert torch.equal(model[0].source_mean, torch.ones(3))
    assert torch.equal(model[0].source_mean, torch.zeros(3))
    assert list(model.state_dict()) == ["0.weight", "0.bias", "0.source_mean", "0.source_var"]
