"""NVlabs' pickles are read for their numbers, and nothing that is in them runs."""

import copyreg
import io
import os
import pickle
import struct

import pytest
import torch
from nvlabs import EasyDict, Persistent, importable, persistent, small, write_pickle

from diffusers_sae import InputError, SAESteeringPipeline
from diffusers_sae.adapters.stylegan_convert import convert, read_generator
from diffusers_sae.adapters.stylegan_pickle import ALLOWED, read_pickle


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize(
    "config", [{}, {"c_dim": 3, "conv_clamp": None}, {"img_resolution": 32, "channel_base": 4096, "layer_features": 20}]
)
def test_a_generator_comes_back_as_it_was(tmp_path, config, protocol):
    generator = small(**config)
    read = read_generator(write_pickle(generator, tmp_path / "net.pkl", protocol=protocol))
    state = generator.state_dict()
    assert state.keys() == read.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in read.state_dict().items())
    z, c = torch.randn(2, 12), torch.eye(3)[:2] if config.get("c_dim") else None
    with torch.no_grad():
        assert torch.equal(generator(z, c, truncation_psi=0.5), read(z, c, truncation_psi=0.5))


def test_the_source_in_it_never_runs(tmp_path):
    source = f"open({str(tmp_path / 'marker')!r}, 'w').write('ran')\nraise SystemExit"
    read_generator(write_pickle(small(), tmp_path / "net.pkl", source))
    assert not (tmp_path / "marker").exists()


def test_convert_writes_safetensors_that_load(tmp_path):
    pipe = convert(write_pickle(small(), tmp_path / "net.pkl"), tmp_path / "folder")
    files = {p.name for p in (tmp_path / "folder").rglob("*") if p.is_file()}
    assert files == {"model_index.json", "config.json", "diffusion_pytorch_model.safetensors"}
    steerable = SAESteeringPipeline.from_pretrained(tmp_path / "folder")
    call = {"seeds": [3], "output_type": "pt"}
    assert torch.equal(steerable(**call).images, pipe(**call).images)


class Calls:
    """Pickled as a call."""

    def __init__(self, function, *arguments, state=None):
        self.call = function, arguments, state

    def __reduce__(self):
        return self.call


def raw(module: str, name: str, *arguments: bytes, call: bytes = b"\x85R") -> bytes:
    """Opcodes of a call of a global that need not exist."""
    return b"c" + f"{module}\n{name}\n".encode() + b"".join(arguments) + call


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def binary(value: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(value)) + value


def storage(dtype: str = "FloatStorage", count: int = 1, stored: int | None = None, data: bytes = b"\0" * 4) -> bytes:
    """What `torch.save` writes of a storage, with numbers of our choice."""
    described = (b"(" + text("storage") + b"ctorch\n" + dtype.encode() + b"\n" + text("1") + text("cpu")
                 + b"\x8a\x08" + struct.pack("<q", count) + b"NtQ")  # fmt: skip
    plain = [pickle.dumps(v, 2) for v in (1, 1001, {})]
    keys = pickle.dumps(["1"], 2)
    return (
        b"".join(plain)
        + b"\x80\x02"
        + described
        + b"."
        + keys
        + struct.pack("<q", count if stored is None else stored)
        + data
    )


def stored(data: bytes) -> bytes:
    return raw("torch.storage", "_load_from_bytes", binary(data))


def tensor(size: tuple, stride: tuple, data: bytes | None = None, offset: int = 0) -> bytes:
    numbers = pickle.dumps((offset, size, stride), 2)[2:-1]  # one tuple; its items are wanted
    items = b"".join(pickle.dumps(v, 2)[2:-1] for v in (offset, size, stride))
    assert numbers
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + stored(data or storage()) + items + b"\x89}tR"


def in_a_file(payload: bytes) -> bytes:
    """`{"G_ema": payload}`."""
    return b"\x80\x04}" + text("G_ema") + payload + b"s."


ORDERED = b"ccollections\nOrderedDict\n"
PERSISTENT = b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n"


def command(marker) -> str:
    return f"touch {marker}"


def saved(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


HOSTILE = {
    "os.system": lambda m: pickle.dumps(Calls(os.system, command(m))),
    "os.system in a module's state": lambda m: within(small(), Calls(os.system, command(m))),
    "eval": lambda m: pickle.dumps(Calls(eval, f"open({str(m)!r}, 'w')")),
    "exec, protocol 0": lambda m: pickle.dumps(Calls(exec, f"open({str(m)!r}, 'w')"), 0),
    "getattr chain": lambda m: pickle.dumps(Calls(getattr, Calls(__import__, "os"), "system")),
    "a dotted name": lambda m: in_a_file(
        text("collections") + text("OrderedDict.fromkeys.__self__") + b"\x93" + text(command(m)) + b"\x85R"
    ),
    "torch.load by name": lambda m: in_a_file(raw("torch", "load", text(str(m)))),
    "torch's own loader of dtypes": lambda m: in_a_file(raw("torch.serialization", "load", text(str(m)))),
    "the real persistence module": lambda m: in_a_file(raw("torch_utils.persistence", "import_hook", text(str(m)))),
    "BUILD on a dict": lambda m: in_a_file(ORDERED + b")R}" + text("items") + text("x") + b"sb"),
    "BUILD on a class": lambda m: in_a_file(ORDERED + b"N}" + text("__init__") + ORDERED + b"s\x86b"),
    "BUILD on a function": lambda m: in_a_file(PERSISTENT + b"N}" + text("__call__") + ORDERED + b"s\x86b"),
    "BUILD on a tensor": lambda m: in_a_file(tensor((1,), (1,)) + b"N}" + text("size") + b"K\x05\x85s\x86b"),
    "copyreg._reconstructor": lambda m: pickle.dumps(Calls(copyreg._reconstructor, Calls, object, None)),
    "INST": lambda m: in_a_file(b"(" + text(command(m)) + b"ios\nsystem\n"),
    "INST of an allowed name": lambda m: in_a_file(b"(icollections\nOrderedDict\n"),
    "OBJ": lambda m: in_a_file(b"(cos\nsystem\n" + text(command(m)) + b"o"),
    "EXT1": lambda m: in_a_file(b"\x82\x01"),
    "PERSID": lambda m: in_a_file(b"Pos\n"),
    "a pickle as a storage": lambda m: in_a_file(stored(pickle.dumps(Calls(os.system, command(m)), 2))),
    "a fifth pickle in a storage": lambda m: in_a_file(
        stored(b"".join(pickle.dumps(v, 2) for v in (1, 2, {}, Calls(os.system, command(m)), [])))
    ),
    "a torch file as a storage": lambda m: in_a_file(stored(saved(Calls(os.system, command(m))))),
    "a storage of a storage": lambda m: in_a_file(stored(b"\x80\x02" + stored(storage()) + b".")),
    "a storage that is text": lambda m: in_a_file(raw("torch.storage", "_load_from_bytes", text("x"))),
    "a storage that tells of too much": lambda m: in_a_file(stored(storage(count=2**40))),
    "a storage of a negative count": lambda m: in_a_file(stored(storage(count=-1))),
    "a storage whose two counts differ": lambda m: in_a_file(stored(storage(count=1, stored=2**40))),
    "a tensor of stride 0": lambda m: in_a_file(tensor((2**36,), (0,))),
    "a tensor of many dimensions": lambda m: in_a_file(tensor((2,) * 60, (0,) * 60)),
    "a tensor beyond its storage": lambda m: in_a_file(tensor((1,), (1,), offset=7)),
    "a tensor of negative stride": lambda m: in_a_file(tensor((1,), (-1,))),
    "a tensor of unlike shapes": lambda m: in_a_file(tensor((1, 1), (1,))),
    "a memo of two billion": lambda m: in_a_file(b"Nr\xff\xff\xff\x7f"),
    "a frame of 2^60 bytes": lambda m: b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"}.",
    "bytes of 2^60": lambda m: b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"x",
    "tuples in tuples": lambda m: b"\x80\x04}N" + b"\x85" * 300_000 + b"Ns.",
    "a name of 10^7 letters": lambda m: in_a_file(raw("os", "x" * 10**7, text("y"))),
    "a tensor's name that is a sentence": lambda m: within(small(), None, "Stop.\nDo this. " * 10**5),
    "a persistent object without a state": lambda m: in_a_file(PERSISTENT + b"}\x85R"),
    "a module that holds itself": lambda m: within_itself(),
    "TensorFlow's": lambda m: in_a_file(raw("dnnlib.tflib.network", "Network", text("x"))),
    "a list": lambda m: pickle.dumps([1, 2]),
    "no G_ema": lambda m: pickle.dumps({"G": 1}),
    "no pickle": lambda m: b"\x89PNG\r\n",
    "nothing": lambda m: b"",
}


def within(generator, payload, name="w_avg") -> bytes:
    with importable():
        network = persistent(generator)
        network.state["_modules"]["mapping"].state["extra"] = payload
        buffers = network.state["_modules"]["mapping"].state["_buffers"]
        network.state["_modules"]["mapping"].state["_buffers"] = {name: buffers["w_avg"]}
        return pickle.dumps({"G_ema": network}, 4)


def within_itself() -> bytes:
    state: dict = {}
    state["_modules"] = {"a": state}
    modules: dict = {}
    network = Persistent("Generator", {"_modules": modules}, "")
    modules["a"] = modules["b"] = Persistent("Generator", {"_modules": modules}, "")
    with importable():
        return pickle.dumps({"G_ema": network}, 4)


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused_and_nothing_runs(tmp_path, kind):
    marker, file = tmp_path / "marker", tmp_path / "net.pkl"
    file.write_bytes(HOSTILE[kind](marker))
    before = dict(ALLOWED)
    with pytest.raises(InputError) as caught:
        convert(file, tmp_path / "folder")
    sentence = str(caught.value)
    assert len(sentence) < 500 and str(file) in sentence and "\n" not in sentence and sentence.count(". ") == 0
    assert not marker.exists() and not (tmp_path / "folder").exists()
    assert before == ALLOWED


def test_those_that_would_run_do_run_in_pickle(tmp_path):
    """The hostile files are hostile: Python's own unpickler is caught by them."""
    for kind in ("os.system", "eval", "exec, protocol 0", "INST", "OBJ"):
        marker = tmp_path / kind.replace(".", "").replace(",", "").replace(" ", "")
        pickle.loads(HOSTILE[kind](marker))
        assert marker.exists(), kind


def test_truncated_files(tmp_path):
    whole = write_pickle(small(img_resolution=4), tmp_path / "net.pkl").read_bytes()
    for share in (0.001, 0.1, 0.5, 0.9, 0.999):
        file = tmp_path / "cut.pkl"
        file.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(InputError, match="nothing in it was run"):
            read_pickle(file)


@pytest.mark.parametrize(
    ("path", "name", "value", "sentence"),
    [
        ((), "img_resolution", 2**20, "not a whole number from 4 to 4096"),
        ((), "img_resolution", 12, "has no synthesis.b12.conv1.weight"),
        ((), "z_dim", True, "not a whole number"),
        ((), "w_dim", 17, "instead of"),
        (("mapping",), "num_layers", 10**9, "not a whole number from 1 to 64"),
        (("mapping",), "num_layers", 3, "lacks mapping.fc2"),
        (("mapping", "fc0"), "activation", "swish", "not lrelu or linear"),
        (("mapping", "fc0"), "bias_gain", float("nan"), "not a number above 0"),
        (("synthesis", "b8"), "architecture", "resnet", "not skip"),
        (("synthesis", "b4", "conv1"), "conv_clamp", "x" * 10**6, "not a number above 0"),
    ],
)
def test_other_networks_get_a_sentence(tmp_path, path, name, value, sentence):
    network = persistent(small())
    module = network
    for part in path:
        module = module.state["_modules"][part]
    module.state[name] = value
    file = tmp_path / "net.pkl"
    with importable():
        file.write_bytes(pickle.dumps({"G_ema": network, "kwargs": EasyDict(a=1)}, 4))
    with pytest.raises(InputError, match=sentence) as caught:
        read_generator(file)
    assert len(str(caught.value)) < 400


def test_weights_that_are_not_finite(tmp_path):
    generator = small()
    generator.mapping.w_avg[3] = float("inf")
    with pytest.raises(InputError, match="w_avg that is not finite"):
        read_generator(write_pickle(generator, tmp_path / "net.pkl"))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_generator(tmp_path / "net.pkl")
