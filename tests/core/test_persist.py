"""Files appear whole or not at all, whatever happens while they are written."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.core import persist, tables
from trimtab.core.checks import InputError


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_file_is_there_only_when_the_block_has_ended(tmp_path):
    target = tmp_path / "deep" / "er" / "a.txt"
    with persist.atomic(target) as draft:
        draft.write_text("new")
        assert not target.exists()
        assert draft.suffix == ".txt"
    assert target.read_text() == "new"
    assert left_in(target.parent) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt(), SystemExit(3)])
def test_what_was_there_stays_when_the_block_breaks_off(tmp_path, error):
    target = tmp_path / "a.txt"
    target.write_text("old")

    def break_off():
        with persist.atomic(target) as draft:
            draft.write_text("half of the ne")
            raise error

    with pytest.raises(type(error)):
        break_off()
    assert target.read_text() == "old"
    assert left_in(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("call", ["write_text", "fsync"])
def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch, call):
    if call == "fsync":
        monkeypatch.setattr(os, "fsync", no_space)
    else:
        monkeypatch.setattr("pathlib.Path.write_text", no_space)
    (tmp_path / "a.json").write_bytes(b"old")
    with pytest.raises(InputError, match=r"a\.json cannot be written: No space left on device"):
        persist.write_json(tmp_path / "a.json", {"a": 1})
    assert left_in(tmp_path) == ["a.json"]
    assert (tmp_path / "a.json").read_bytes() == b"old"


FULL = "/dev/full"


@pytest.mark.skipif(not os.path.exists(FULL), reason="a device that is always full is needed")
@pytest.mark.parametrize("ending", ["parquet", "feather", "csv", "npz", "safetensors"])
def test_every_writer_says_that_the_disk_is_full(tmp_path, monkeypatch, ending):
    """The draft is a link to a device that takes nothing, so that the real error of each writer is seen."""
    real = persist.tempfile.mkstemp

    def full(dir, prefix, suffix):
        handle, name = real(dir=dir, prefix=prefix, suffix=suffix)
        if suffix != ".json":
            os.unlink(name)
            os.symlink(FULL, name)
        return handle, name

    monkeypatch.setattr(persist.tempfile, "mkstemp", full)
    target = tmp_path / f"a.{ending}"
    write = persist.save if ending == "safetensors" else lambda path, fields, _: tables.write(path, fields)
    with pytest.raises(InputError, match=rf"a\.{ending} cannot be written: .*No space left on device"):
        write(target, {"logits": torch.zeros(1000, 10)}, {})
    assert left_in(tmp_path) == (["a.json"] if ending == "safetensors" else [])


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written: "):
        persist.write_text(tmp_path / "file" / "a.txt", "new")


WRITER = """
import sys
from trimtab.core import persist
i = 0
while True:
    persist.write_text(sys.argv[1], str(i % 10) * 300_000)
    i += 1
    if i == 1:
        print("ready", flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path):
    target = tmp_path / "a.txt"
    for wait in (0.0, 0.02):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(target)], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        text = target.read_text()
        assert len(text) == 300_000
        assert len(set(text)) == 1


def test_the_usual_permissions(tmp_path):
    (tmp_path / "plain.txt").write_text("")
    persist.write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "plain.txt").stat().st_mode


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(PLAIN)
def test_json_comes_back(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("json") / "a.json"
    persist.write_json(path, value)
    assert json.loads(path.read_text(encoding="utf-8")) == value


def test_json_of_what_is_not_plain(tmp_path):
    value = {1: np.float32(0.5), "t": torch.tensor([1, 2]), "bad": [float("nan"), np.inf], "pair": (1, "é")}
    persist.write_json(tmp_path / "a.json", value)
    found = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert found == {"1": 0.5, "t": [1, 2], "bad": [None, None], "pair": [1, "é"]}


def test_tensors_come_back_with_their_description(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"a": base.T, "b": base[1:], "c": torch.tensor(3), "d": torch.zeros(0), "e": base.bfloat16()}
    tensors["f"] = nn_parameter = torch.nn.Parameter(base)
    persist.save(tmp_path / "a.safetensors", tensors, {"kind": "x"})
    found, meta = persist.load(tmp_path / "a.safetensors")
    assert meta == {"kind": "x"}
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], value.detach()) for name, value in tensors.items())
    assert nn_parameter.requires_grad


@pytest.mark.parametrize("damage", ["missing", "truncated", "no json", "bad json", "binary json"])
def test_a_damaged_pair_is_refused(tmp_path, damage):
    path = tmp_path / "a.safetensors"
    persist.save(path, {"a": torch.zeros(100)}, {"kind": "x"})
    beside = path.with_suffix(".json")
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-50])
    elif damage == "no json":
        beside.unlink()
    elif damage == "bad json":
        beside.write_text('{"kind": ')
    else:
        beside.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"a\.safetensors and its \.json cannot be read"):
        persist.load(path)


def test_the_fingerprint_sees_names_and_all_tensors_in_any_order():
    tensors = {"a": torch.ones(2), "b": torch.zeros((), dtype=torch.int64), "c": torch.ones(2, dtype=torch.bfloat16)}
    changes = (
        {"a": torch.full((2,), 2.0)},
        {"b": torch.ones((), dtype=torch.int64)},
        {"c": torch.ones(2)},
        {"d": tensors["a"]},
    )
    seen = {persist.fingerprint(tensors | change) for change in changes} | {persist.fingerprint(tensors)}
    assert len(seen) == 5
    assert persist.fingerprint(dict(reversed(tensors.items()))) == persist.fingerprint(tensors)
