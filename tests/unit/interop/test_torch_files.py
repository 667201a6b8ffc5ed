"""Files of torch.save: the values that torch wrote, the values that torch reads, and files that execute something."""

import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from jaxgpt.errors import UserError
from jaxgpt.interop import torch_files


def test_reads_what_torch_writes(tmp_path):
    matrix = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "bfloat16": matrix.bfloat16(),
        "float64": matrix.double(),
        "transposed": matrix.half().T,
        "part": matrix[1:, 1:3],
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "integers": torch.tensor([2**40, -1]),
        "parameter": torch.nn.Parameter(matrix),
    }
    plain = [1, -5, 300, 2**40, -(2**40), 1.5, "é", None, True, False, (1, (2,)), {"a": {0: []}}]
    torch.save({"tensors": tensors, "plain": plain, "model": torch.nn.Linear(2, 1).state_dict()}, tmp_path / "x.pt")
    found = torch_files.load(tmp_path / "x.pt", "--x")
    assert found["plain"] == plain and set(found["model"]) == {"weight", "bias"}
    for name, p in tensors.items():
        widened = p.detach().float() if p.dtype == torch.bfloat16 else p.detach()
        np.testing.assert_array_equal(found["tensors"][name], widened.numpy())
        assert found["tensors"][name].dtype == widened.numpy().dtype


def test_torch_reads_what_is_written(tmp_path):
    shared = np.random.default_rng(0).random((3, 4), np.float32)
    values = {
        "a": shared,
        "b": shared,
        "transposed": np.arange(6.0).reshape(2, 3).T,
        "empty": np.zeros((0, 3)),
        "scalar": np.array(3.0, np.float32),
        "plain": {0: [1, 300, -7, 2**40, -(2**40), 1.5, "é", None, True, False, (1,), {}]},
    }
    torch_files.save(tmp_path / "y.pt", values)
    found = torch.load(tmp_path / "y.pt", weights_only=True)
    assert found["plain"] == values["plain"] and found["a"].data_ptr() == found["b"].data_ptr()
    for name in ("a", "b", "transposed", "empty", "scalar"):
        np.testing.assert_array_equal(found[name].numpy(), values[name])
        assert found[name].numpy().dtype == values[name].dtype
    assert [path.name for path in tmp_path.iterdir()] == ["y.pt"]


class Executes:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def rewritten(path, **entries):
    """The file with other contents of some entries, given by the last part of their names."""
    with zipfile.ZipFile(path) as old:
        contents = {name: old.read(name) for name in old.namelist()}
    out = path.with_name("changed.pt")
    with zipfile.ZipFile(out, "w") as new:
        for name, content in contents.items():
            new.writestr(name, entries.get(name.split("/")[-1].replace(".", "_"), content))
    return out


@pytest.mark.parametrize(
    "function, args", [(os.system, ("touch executed",)), (eval, ("1",)), (exec, ("1",)), (open, ("x",))]
)
def test_a_file_that_executes_something_is_refused(tmp_path, monkeypatch, function, args):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Executes(function, *args)}, "evil.pt")
    with pytest.raises(UserError, match=r"--x evil.pt: its pickle calls \w+\.\w+"):
        torch_files.load(tmp_path.__class__("evil.pt"), "--x")
    assert [path.name for path in tmp_path.iterdir()] == ["evil.pt"]


def tensor_pickle(shape, stride, offset=0, numel=4, key="0"):
    """The pickle of one tensor of float32, of any shape and place."""

    class Storage:
        pass

    class Pickler(pickle._Pickler):  # writes what a hostile program could
        def save(self, obj, save_persistent_id=True):
            if isinstance(obj, Storage):
                parts = [b"(", b"X\x07\0\0\0storage", b"ctorch\nFloatStorage\n"]
                parts += [b"X" + len(key).to_bytes(4, "little") + key.encode(), b"X\x03\0\0\0cpu"]
                parts += [b"\x8a\x09" + numel.to_bytes(9, "little", signed=True), b"tQ"]
                self.write(b"".join(parts))
            elif obj is Pickler:
                self.write(b"ctorch._utils\n_rebuild_tensor_v2\n")
            else:
                super().save(obj, save_persistent_id)

    import io

    out = io.BytesIO()
    pickler = Pickler(out, 2)
    pickler.fast = True
    out.write(b"\x80\x02")
    pickler.save(Pickler)
    pickler.save((Storage(), offset, shape, stride, False, None))
    out.write(b"R.")
    return out.getvalue()


@pytest.mark.parametrize(
    "place",
    [
        dict(shape=(5,), stride=(1,)),
        dict(shape=(10**12,), stride=(0,)),
        dict(shape=(2, 2), stride=(3, 1)),
        dict(shape=(2,), stride=(1,), offset=3),
        dict(shape=(2,), stride=(1,), offset=-1),
        dict(shape=(-2, -2), stride=(1, 1)),
        dict(shape=(2,), stride=(-1,)),
        dict(shape=(4,), stride=(1,), numel=10**15),
        dict(shape=(4,), stride=(1,), key="../data.pkl"),
    ],
    ids=str,
)
def test_a_tensor_outside_of_its_storage_is_refused(tmp_path, place):
    torch.save(torch.zeros(4), tmp_path / "x.pt")
    assert torch_files.load(rewritten(tmp_path / "x.pt", data_pkl=tensor_pickle((2, 2), (2, 1))), "--x").shape == (2, 2)
    with pytest.raises(UserError, match="no sound file of torch.save"):
        torch_files.load(rewritten(tmp_path / "x.pt", data_pkl=tensor_pickle(**place)), "--x")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x02",
        b"\x80\x02.",
        b"\x80\x02K\x01K\x02.",
        b"\x80\x02e.",
        b"\x80\x02(K\x01u.",
        b"\x80\x02}]K\x01s.",
        b"\x80\x02h\x07.",
        b"\x80\x02X\xff\xff\xff\x7fa.",
        b"\x80\x02K\x01Q.",
        b"\x80\x02\x87.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        b"\x80\x02cos\nsystem\n)\x81.",
        b"\x80\x02ccollections\nOrderedDict\nK\x01R.",
        b"\x80\x02]r\xff\xff\xff\xffK\x01b.",
    ],
)
def test_a_pickle_that_makes_no_sense_is_refused(tmp_path, data):
    torch.save(torch.zeros(4), tmp_path / "x.pt")
    with pytest.raises(UserError, match="^--x .*changed.pt: .*; save "):
        torch_files.load(rewritten(tmp_path / "x.pt", data_pkl=data), "--x")


def test_a_compressed_archive_is_refused(tmp_path):
    """A bomb: a few bytes of which an archive makes gigabytes."""
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**24))
    with pytest.raises(UserError, match="data.pkl is compressed"):
        torch_files.load(tmp_path / "bomb.pt", "--x")
