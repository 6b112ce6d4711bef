"""Pickles as NVlabs' stylegan2-ada-pytorch writes them: persistent objects with their source text, EasyDict, NumPy."""

from __future__ import annotations

import pickle
import sys
import types
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from diffusers_sae.adapters.stylegan2 import StyleGAN2Generator
from diffusers_sae.adapters.stylegan2_networks import FullyConnected, SynthesisLayer, ToRGB


class EasyDict(dict):
    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def _reconstruct_persistent_obj(meta):
    raise AssertionError("never called")


EasyDict.__module__ = "dnnlib.util"
_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


class Persistent:
    """Pickled as NVlabs' `persistent_class` decorator has it."""

    def __init__(self, class_name, state, source):
        self.class_name, self.state, self.source = class_name, state, source

    def __reduce__(self):
        meta = {"type": "class", "version": 6, "module_src": self.source, "class_name": self.class_name}
        return _reconstruct_persistent_obj, ({**meta, "state": self.state},), None


@contextmanager
def importable():
    """NVlabs' modules by name, so that pickle can write references to them."""
    made = {
        name: types.ModuleType(name) for name in ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util")
    }
    made["torch_utils.persistence"]._reconstruct_persistent_obj = _reconstruct_persistent_obj
    made["dnnlib.util"].EasyDict = EasyDict
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]


def attributes_of(module: nn.Module) -> dict:
    """What NVlabs' classes set on themselves beside parameters."""
    match module:
        case StyleGAN2Generator():
            names = ("z_dim", "c_dim", "w_dim", "img_resolution", "img_channels")
            kwargs = EasyDict(mapping_kwargs=EasyDict(num_layers=2), synthesis_kwargs=EasyDict(num_fp16_res=4))
            return {name: getattr(module.config, name) for name in names} | {"_init_args": (), "_init_kwargs": kwargs}
        case FullyConnected():
            gain = np.float64(module.weight_gain)
            told = {"activation": "lrelu" if module.active else "linear", "weight_gain": gain}
            return told | {"bias_gain": module.bias_gain}
        case SynthesisLayer():
            return {"activation": "lrelu", "conv_clamp": module.conv_clamp, "act_gain": np.sqrt(2), "use_noise": True}
        case ToRGB():
            return {"conv_clamp": module.conv_clamp, "weight_gain": 1 / np.sqrt(module.weight.shape[1])}
    if hasattr(module, "num_layers"):
        return {"num_layers": module.num_layers, "w_avg_beta": 0.995}
    return {"architecture": "skip"} if hasattr(module, "conv1") else {}


def persistent(module: nn.Module, source: str = "") -> Persistent:
    """A module as NVlabs' class of the same kind would be pickled."""
    state = {key: module.__dict__[key] for key in ("training", "_parameters", "_buffers", "_backward_hooks")}
    state["_non_persistent_buffers_set"] = set()
    state["_modules"] = {n: persistent(m, source) for n, m in module.named_children() if n != "w"}
    names = {"StyleGAN2Generator": "Generator", "FullyConnected": "FullyConnectedLayer"}
    name = names.get(type(module).__name__, type(module).__name__)
    return Persistent(name, state | attributes_of(module), source)


def write_pickle(generator, path, source="", protocol=4, **others):
    """A file as the training loop writes it."""
    network = persistent(generator, source)
    augment = Persistent("AugmentPipe", {"_buffers": {"Hz_geom": torch.randn(3)}, "p": np.float32(0.1)}, source)
    data = {
        "training_set_kwargs": EasyDict(path="data.zip", xflip=np.array([1.0, 2.0])),
        "G": network,
        "D": persistent(nn.Sequential(nn.Linear(3, 3)), source),
        "G_ema": network,
        "augment_pipe": augment,
        **others,
    }
    with importable():
        path.write_bytes(pickle.dumps(data, protocol))
    return path


def small(seed: int = 0, **config) -> StyleGAN2Generator:
    """A small generator in which no parameter is what it is made as."""
    torch.manual_seed(seed)
    arguments = {"z_dim": 12, "w_dim": 16, "img_resolution": 16, "num_layers": 2, "channel_base": 64, "channel_max": 8}
    generator = StyleGAN2Generator(**{**arguments, **config})
    with torch.no_grad():
        for name, tensor in generator.state_dict().items():
            if name.endswith(("bias", "noise_strength", "w_avg")):
                scale = 10.0 if "mapping.fc" in name else 0.3
                tensor.add_(scale * torch.randn_like(tensor))
    return generator.eval()
