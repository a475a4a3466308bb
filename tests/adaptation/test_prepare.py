"""A preparation of a model that is wrapped for several processes is that of the model itself."""

import pytest
import torch
from builders import BUILDERS, source
from torch.nn.parallel import DistributedDataParallel
from toynet import seeded_net

PREPARED = [name for name, builder in BUILDERS.items() if builder.prepare is not None]


@pytest.fixture
def alone(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", PREPARED)
def test_a_wrapped_model_is_prepared_as_itself(name, alone):
    builder, net = BUILDERS[name], seeded_net()
    batches = source(net, (3, 8, 8))
    bare = builder.method.prepare(net, batches, **builder.prepare)
    wrapped = builder.method.prepare(DistributedDataParallel(net), batches, **builder.prepare)
    assert all(torch.equal(wrapped[key], value) for key, value in bare.items())
    assert wrapped.keys() == bare.keys()
    builder.method(DistributedDataParallel(net), prepared=wrapped, **builder.settings)
