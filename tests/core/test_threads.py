"""One thread inside, the old number outside, whatever happens."""

import threading

import pytest
import torch

from trimtab.core.threads import one_thread


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_the_number_is_restored():
    with one_thread(), one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    with pytest.raises(RuntimeError, match="inside"), one_thread():
        raise RuntimeError("inside")
    assert torch.get_num_threads() == 2
    assert one_thread()(torch.get_num_threads)() == 1
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_other_threads_keep_theirs():
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    with one_thread():
        thread.start()
        thread.join()
    assert found == [2]
