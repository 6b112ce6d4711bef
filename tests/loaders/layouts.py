"""A file in every known layout, and what its authors' code makes of rows, stated in float64.

`LAYOUTS[name](folder, generator)` writes the files and returns the arguments to load them with, and the rule: a
function of rows `(N, D)` that gives dense codes `(N, n)` and reconstructions.
"""

import json

import numpy as np
import torch
from safetensors.torch import save_file

D, N, K = 6, 20, 9


def relu(v):
    return np.maximum(v, 0)


def topk(v, k=K):
    kept = np.zeros_like(v)
    for row, out in zip(v, kept, strict=True):
        chosen = np.argsort(-row, kind="stable")[:k]
        out[chosen] = row[chosen]
    return kept


def layer_norm(x):
    mean, deviation = x.mean(-1, keepdims=True), x.std(-1, ddof=1, keepdims=True)
    return (x - mean) / (deviation + 1e-5), mean, deviation


class Random:
    """Weights of an SAE, most of whose pre-activations are below 0, so that fewer than k are above."""

    def __init__(self, generator):
        def normal(*shape, std=1.0, mean=0.0):
            return mean + std * torch.randn(*shape, generator=generator)

        self.W, self.V = normal(N, D), normal(N, D)
        self.V /= self.V.norm(dim=1, keepdim=True)
        self.V *= 0.5 + torch.rand(N, 1, generator=generator)
        self.b, self.p = normal(N, mean=-1.5), normal(D)
        self.r, self.m = normal(N, std=0.3), normal(N, std=0.5)
        self.theta = 0.2 + torch.rand(N, generator=generator)

    def __getitem__(self, names):
        return [getattr(self, name).double().numpy() for name in names.split()]


def write(folder, tensors, config=None, file="sae.safetensors", config_name="config.json"):
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.clone().contiguous() if torch.is_tensor(v) else v for k, v in tensors.items()}
    if file.endswith(".safetensors"):
        save_file(tensors, folder / file)
    else:
        torch.save(tensors, folder / file)
    if config is not None:
        (folder / config_name).write_text(json.dumps(config))


def rule_of_unbox(g, decode_shift=1.0):
    W, V, b, p = g["W V b p"]
    return lambda x: ((z := relu(topk((x - p) @ W.T + b))), z @ V + decode_shift * p)


def sdxl_unbox(folder, g, **more):
    state = {"encoder.weight": g.W, "decoder.weight": g.V.T, "pre_bias": g.p, "latent_bias": g.b}
    state["stats_last_nonzero"] = torch.zeros(N, dtype=torch.long)
    config = {"n_dirs_local": N, "d_model": D, "k": K, "auxk": 256, "dead_steps_threshold": 2441, **more}
    write(folder, {"state_dict": state}, config, "state_dict.pth")
    return {}, rule_of_unbox(g)


def concept_steerers(folder, g):
    """Trained so that what their decoder gives stands for `x - pre_bias`: x is the pre_bias more than that."""
    sdxl_unbox(folder, g, auxk_coef=1 / 32)
    return {}, rule_of_unbox(g, decode_shift=2.0)


def sparsify(folder, g, **more):
    state = {"encoder.weight": g.W, "encoder.bias": g.b, "W_dec": g.V, "b_dec": g.p}
    config = {"expansion_factor": 16, "num_latents": 0, "k": K, "d_in": D, "activation": "topk", **more}
    write(folder, state, config, "sae.safetensors", "cfg.json")
    W, V, b, p = g["W V b p"]
    return {}, lambda x: ((z := topk(relu((x - p) @ W.T + b))), z @ V + p)


def saeuron(folder, g):
    return sparsify(folder, g, batch_topk=True, sample_topk=False, input_unit_norm=False, multi_topk=False)


def saeuron_unit_norm(folder, g):
    sparsify(folder, g, batch_topk=True, input_unit_norm=True)
    W, V, b, p = g["W V b p"]

    def rule(x):
        rows, mean, deviation = layer_norm(x)
        z = topk(relu((rows - p) @ W.T + b))
        return z, (z @ V + p) * deviation + mean

    return {}, rule


def daujotas(folder, g):
    state = {"encoder.weight": g.W, "enc_bias": g.b, "decoder.weight": g.V.T, "dec_bias": g.p}
    write(folder, {k: v.half() for k, v in state.items()}, None, "sparse_autoencoder_128.pth")
    W, V, b, p = (getattr(g, name).half().double().numpy() for name in "WVbp")
    return {}, lambda x: ((z := relu(x @ W.T + b)), z @ V + p)


def re_n_y(folder, g):
    state = {"encoder.weight": g.W, "encoder.bias": g.b, "decoder.weight": g.V.T, "bias": g.p}
    write(folder, state, {"features": D, "pages": N, "k": K}, "model.safetensors")
    W, V, b, p = g["W V b p"]
    return {}, lambda x: ((z := topk(relu((x - p) @ W.T + b))), z @ V + p)


def stylegan(folder, g):
    write(folder, {"encoder.weight": g.W}, None, "sae.pth")
    (W,) = g["W"]
    return {}, lambda x: ((z := relu(x @ W.T)), z @ W)


def overcomplete(folder, g, **more):
    state = {
        "encoder.final_block.0.weight": g.W,
        "encoder.final_block.0.bias": g.b,
        "dictionary._weights": g.V,
        "dictionary.multiplier": torch.tensor(0.3),
    }
    write(folder, {**state, **more.pop("tensors", {})}, {"top_k": K, **more}, "model.pt")
    W, V, b = g["W V b"]
    D_unit = V / np.linalg.norm(V, axis=1, keepdims=True) * np.exp(np.float64(np.float32(0.3)))
    return W, D_unit, b


def overcomplete_topk(folder, g):
    W, V, b = overcomplete(folder, g)
    return {}, lambda x: ((z := topk(relu(x @ W.T + b))), z @ V)


def overcomplete_jump(folder, g):
    W, V, b = overcomplete(folder, g, tensors={"thresholds": g.theta.log()})
    theta = np.exp(g.theta.log().double().numpy())

    def rule(x):
        z = relu(x @ W.T + b)
        z = np.where(z < theta, 0, z)
        return z, z @ V

    return {}, rule


def overcomplete_batch_topk(folder, g):
    W, V, b = overcomplete(folder, g, threshold=0.4)
    return {}, lambda x: ((z := (c := relu(x @ W.T + b)) * (c >= 0.4)), z @ V)


def revelio(folder, g):
    state = {"W_enc": g.W.T, "b_enc": g.b, "W_dec": g.V, "b_dec": g.p}
    write(folder, state, None, "sae.safetensors")
    W, V, b, p = g["W V b p"]
    return {"config": {"format": "revelio", "k": K}}, lambda x: ((z := topk((x - p) @ W.T + b)), z @ V + p)


def sae_lens(folder, g, architecture="standard", tensors=None, **more):
    state = {"W_enc": g.W.T, "b_enc": g.b, "W_dec": g.V, "b_dec": g.p, **(tensors or {})}
    config = {
        "architecture": architecture,
        "d_in": D,
        "d_sae": N,
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "metadata": {"model_name": "m", "hook_name": "h", "sae_lens_version": "6.54.12"},
        **more,
    }
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    write(folder, state, config, "sae_weights.safetensors", "cfg.json")
    return g["W V b p"]


def sae_lens_standard(folder, g):
    W, V, b, p = sae_lens(folder, g)
    return {}, lambda x: ((z := relu((x - p) @ W.T + b)), z @ V + p)


def sae_lens_not_applied(folder, g):
    W, V, b, p = sae_lens(folder, g, apply_b_dec_to_input=False)
    return {}, lambda x: ((z := relu(x @ W.T + b)), z @ V + p)


def sae_lens_layer_norm(folder, g):
    W, V, b, p = sae_lens(folder, g, normalize_activations="layer_norm")

    def rule(x):
        rows, mean, deviation = layer_norm(x)
        z = relu((rows - p) @ W.T + b)
        return z, (z @ V + p) * deviation + mean

    return {}, rule


def sae_lens_constant_norm(folder, g):
    W, V, b, p = sae_lens(folder, g, normalize_activations="constant_norm_rescale")

    def rule(x):
        factor = np.sqrt(D) / np.linalg.norm(x, axis=-1, keepdims=True)
        z = relu((x * factor - p) @ W.T + b)
        return z, (z @ V + p) / factor

    return {}, rule


def sae_lens_average_norm(folder, g):
    W, V, b, p = sae_lens(folder, g, normalize_activations="expected_average_only_in", norm_scaling_factor=0.7)
    return {}, lambda x: ((z := relu((x - p / 0.7) @ (0.7 * W).T + b)), z @ (V / 0.7) + p / 0.7)


def sae_lens_topk(folder, g):
    W, V, b, p = sae_lens(folder, g, "topk", k=K, rescale_acts_by_decoder_norm=False)
    return {}, lambda x: ((z := relu(topk((x - p) @ W.T + b))), z @ V + p)


def sae_lens_topk_rescaled(folder, g):
    W, V, b, p = sae_lens(folder, g, "topk", k=K, rescale_acts_by_decoder_norm=True)
    norms = np.linalg.norm(V, axis=1)
    return {}, lambda x: ((z := relu(topk(((x - p) @ W.T + b) * norms))), (z / norms) @ V + p)


def sae_lens_old_topk(folder, g):
    more = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "metadata": None}
    W, V, b, p = sae_lens(folder, g, **more)
    return {}, lambda x: ((z := relu(topk((x - p) @ W.T + b))), z @ V + p)


def sae_lens_finetuned(folder, g):
    """Old files: finetuning multiplied the codes by a factor of each latent, which their decoder gets at loading."""
    W, V, b, p = sae_lens(folder, g, tensors={"scaling_factor": g.theta}, finetuning_scaling_factor=True)
    (theta,) = g["theta"]
    return {}, lambda x: ((z := relu((x - p) @ W.T + b)), (z * theta) @ V + p)


def sae_lens_not_finetuned(folder, g):
    """They have factors of 1."""
    W, V, b, p = sae_lens(folder, g, tensors={"scaling_factor": torch.ones(N)})
    return {}, lambda x: ((z := relu((x - p) @ W.T + b)), z @ V + p)


def sae_lens_training_batch_topk(folder, g):
    """A checkpoint of a training: `save_inference_model` would have put the threshold into a JumpReLU SAE."""
    threshold = {"topk_threshold": torch.tensor(0.4, dtype=torch.float64)}
    W, V, b, p = sae_lens(folder, g, "batchtopk", threshold, k=float(K), rescale_acts_by_decoder_norm=True)
    norms, theta = np.linalg.norm(V, axis=1), np.float64(np.float32(0.4))
    return {}, lambda x: ((z := (v := relu(((x - p) @ W.T + b) * norms)) * (v > theta)), (z / norms) @ V + p)


def sae_lens_jump_relu(folder, g):
    theta = g.theta.clone()
    theta[3] = -0.1
    W, V, b, p = sae_lens(folder, g, "jumprelu", {"threshold": theta})
    theta = theta.double().numpy()
    return {}, lambda x: ((z := relu(v := (x - p) @ W.T + b) * (v > theta)), z @ V + p)


def sae_lens_gated(folder, g):
    more = {"b_enc": None, "b_gate": g.b, "r_mag": g.r, "b_mag": g.m}
    W, V, b, p = sae_lens(folder, g, "gated", more, apply_b_dec_to_input=False)
    r, m = g["r m"]
    return {}, lambda x: ((z := (x @ W.T + b > 0) * relu(x @ (W.T * np.exp(r)) + m)), z @ V + p)


def dl(folder, g, tensors, name=None):
    write(folder, tensors, {"trainer": {"dict_class": name}, "buffer": {}}, "ae.pt")
    return g["W V b p"]


def dl_autoencoder(folder, g):
    tensors = {"bias": g.p, "encoder.weight": g.W, "encoder.bias": g.b, "decoder.weight": g.V.T}
    W, V, b, p = dl(folder, g, tensors, "AutoEncoder")
    norms = np.linalg.norm(V, axis=1)
    return {}, lambda x: ((z := relu((x - p) @ W.T + b) * norms), (z / norms) @ V + p)


def dl_autoencoder_new(folder, g):
    tensors = {"encoder.weight": g.W, "encoder.bias": g.b, "decoder.weight": g.V.T, "decoder.bias": g.p}
    W, V, b, p = dl(folder, g, tensors, "AutoEncoderNew")
    return {}, lambda x: ((z := relu(x @ W.T + b)), z @ V + p)


def dl_gated(folder, g):
    tensors = {
        "decoder_bias": g.p, "encoder.weight": g.W, "r_mag": g.r, "gate_bias": g.b, "mag_bias": g.m,
        "decoder.weight": g.V.T,
    }  # fmt: skip
    W, V, b, p = dl(folder, g, tensors, "GatedAutoEncoder")
    r, m = g["r m"]
    return {}, lambda x: (
        (z := (((x - p) @ W.T + b) > 0) * relu(np.exp(r) * ((x - p) @ W.T) + m)),
        z @ V + p,
    )


def dl_jump_relu(folder, g):
    tensors = {"W_enc": g.W.T, "b_enc": g.b, "W_dec": g.V, "b_dec": g.p, "threshold": g.theta}
    W, V, b, p = dl(folder, g, tensors, "JumpReluAutoEncoder")
    (theta,) = g["theta"]
    return {}, lambda x: ((z := relu((v := x @ W.T + b) * (v > theta))), z @ V + p)


def dl_topk(folder, g):
    tensors = {
        "encoder.weight": g.W, "encoder.bias": g.b, "decoder.weight": g.V.T, "b_dec": g.p,
        "k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(-1.0),
    }  # fmt: skip
    W, V, b, p = dl(folder, g, tensors, "AutoEncoderTopK")
    return {}, lambda x: ((z := topk(relu((x - p) @ W.T + b))), z @ V + p)


def dl_batch_topk(folder, g):
    tensors = {
        "encoder.weight": g.W, "encoder.bias": g.b, "decoder.weight": g.V.T, "b_dec": g.p,
        "k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.4),
    }  # fmt: skip
    W, V, b, p = dl(folder, g, tensors, "BatchTopKSAE")
    theta = np.float64(np.float32(0.4))
    return {}, lambda x: ((z := (v := relu((x - p) @ W.T + b)) * (v > theta)), z @ V + p)


def dl_matryoshka(folder, g):
    tensors = {
        "W_enc": g.W.T, "b_enc": g.b, "W_dec": g.V, "b_dec": g.p, "k": torch.tensor(K, dtype=torch.int),
        "threshold": torch.tensor(0.4), "group_sizes": torch.tensor([4, 6, 10]),
    }  # fmt: skip
    W, V, b, p = dl(folder, g, tensors, "MatryoshkaBatchTopKSAE")
    theta = np.float64(np.float32(0.4))
    return {}, lambda x: ((z := (v := relu((x - p) @ W.T + b)) * (v > theta)), z @ V + p)


def saev(folder, g, cls="TopK", params=None, tensors=None):
    folder.mkdir(parents=True, exist_ok=True)
    activation = {"cls": cls, "params": {"top_k": K} if params is None else params}
    header = {"schema": 5, "cfg": {"d_model": D, "d_sae": N, "activation": activation}, "commit": "c", "lib": "1"}
    with (folder / "sae.pt").open("wb") as file:
        file.write(json.dumps(header).encode() + b"\n")
        torch.save({"W_enc": g.W.T, "b_enc": g.b, "W_dec": g.V, "b_dec": g.p, **(tensors or {})}, file)
    return g["W V b p"]


def saev_topk(folder, g):
    W, V, b, p = saev(folder, g)
    return {}, lambda x: ((z := topk(x @ W.T + b)), z @ V + p)


def saev_first(folder, g):
    """Release 0.1.0: a header without a schema, ReLU, and `b_dec` is subtracted."""
    folder.mkdir(parents=True, exist_ok=True)
    header = {
        "d_vit": D, "exp_factor": 4, "sparsity_coeff": 4e-4, "n_reinit_samples": 524288, "ghost_grads": False,
        "remove_parallel_grads": True, "normalize_w_dec": True, "seed": 0,
    }  # fmt: skip
    with (folder / "sae.pt").open("wb") as file:
        file.write(json.dumps(header).encode() + b"\n")
        torch.save({"W_enc": g.W.T, "b_enc": g.b, "W_dec": g.V, "b_dec": g.p}, file)
    W, V, b, p = g["W V b p"]
    return {}, lambda x: ((z := relu((x - p) @ W.T + b)), z @ V + p)


def saev_relu(folder, g):
    W, V, b, p = saev(folder, g, "Relu", {})
    return {}, lambda x: ((z := relu(x @ W.T + b)), z @ V + p)


def saev_batch_topk(folder, g):
    W, V, b, p = saev(folder, g, "BatchTopK", tensors={"activation.threshold": torch.tensor(0.4)})
    theta = np.float64(np.float32(0.4))
    return {}, lambda x: ((z := np.where((v := x @ W.T + b) > theta, v, 0)), z @ V + p)


def openai_buffers():
    """What OpenAI's `Autoencoder` holds beside its weights."""
    return {
        "stats_last_nonzero": torch.zeros(N, dtype=torch.long), "latents_activation_frequency": torch.ones(N),
        "latents_mean_square": torch.zeros(N),
    }  # fmt: skip


def openai_topk_state():
    """What its `state_dict()` tells of TopK: in the state of the activation, and once more among the tensors."""
    return {
        "activation.k": K, "activation.postact_fn": "ReLU", "activation": "TopK",
        "activation_state_dict": {"k": K, "postact_fn": "ReLU"},
    }  # fmt: skip


def openai(folder, g, **more):
    state = {"pre_bias": g.p, "latent_bias": g.b, **openai_buffers()}
    state |= {"encoder.weight": g.W, "decoder.weight": g.V.T, **openai_topk_state(), **more}
    write(folder, state, None, "autoencoder.pt")
    W, V, b, p = g["W V b p"]

    def rule(x):
        rows, mean, deviation = layer_norm(x)
        z = relu(topk((rows - p) @ W.T + b))
        return z, (z @ V + p) * deviation + mean

    return {}, rule


def openai_k_as_tensor(folder, g):
    return openai(folder, g, **{"activation.k": torch.tensor(K), "activation_state_dict": None})


def openai_relu(folder, g):
    state = {"pre_bias": g.p, "encoder.weight": g.W, "latent_bias": g.b, "decoder.weight": g.V.T, "activation": "ReLU"}
    write(folder, {**state, **openai_buffers(), "activation_state_dict": {}}, None, "autoencoder.pt")
    W, V, b, p = g["W V b p"]
    return {}, lambda x: ((z := relu((x - p) @ W.T + b)), z @ V + p)


def openai_tied(folder, g):
    state = {"pre_bias": g.p, "encoder.weight": g.W, "latent_bias": g.b, "decoder.linear.weight": g.W}
    write(folder, {**state, **openai_buffers(), "activation": "ReLU"}, None, "autoencoder.pt")
    W, b, p = g["W b p"]
    return {}, lambda x: ((z := relu((x - p) @ W.T + b)), z @ W + p)


def vit_prisma(folder, g):
    state = {"W_enc": g.W.T, "b_enc": g.b, "W_dec": g.V, "b_dec": g.p}
    config = {"hook_point_layer": 9, "normalize_activations": "layer_norm", "architecture": "standard"}
    write(folder, state, config, "weights.pt")
    W, V, b, p = g["W V b p"]

    def rule(x):
        rows, mean, deviation = layer_norm(x)
        z = relu((rows - p) @ W.T + b)
        return z, (z @ V + p) * deviation + mean

    return {}, rule


def vit_prisma_gated(folder, g):
    state = {"W_enc": g.W.T, "b_gate": g.b, "r_mag": g.r, "b_mag": g.m, "W_dec": g.V, "b_dec": g.p}
    write(folder, state, {"hook_point_layer": 9, "architecture": "gated"}, "weights.pt")
    W, V, b, p = g["W V b p"]
    r, m = g["r m"]
    return {}, lambda x: ((z := (((x - p) @ W.T + b) > 0) * relu((x - p) @ (W.T * np.exp(r)) + m)), z @ V + p)


LAYOUTS = {
    f.__name__: f
    for f in (
        sdxl_unbox, concept_steerers, sparsify, saeuron, saeuron_unit_norm, daujotas, re_n_y, stylegan,
        overcomplete_topk, overcomplete_jump, overcomplete_batch_topk, revelio, sae_lens_standard,
        sae_lens_not_applied, sae_lens_layer_norm, sae_lens_constant_norm, sae_lens_average_norm, sae_lens_topk,
        sae_lens_topk_rescaled, sae_lens_old_topk, sae_lens_finetuned, sae_lens_not_finetuned,
        sae_lens_training_batch_topk, sae_lens_jump_relu, sae_lens_gated, dl_autoencoder,
        dl_autoencoder_new, dl_gated, dl_jump_relu, dl_topk, dl_batch_topk, dl_matryoshka, saev_topk, saev_first,
        saev_relu, saev_batch_topk, openai, openai_k_as_tensor, openai_relu, openai_tied, vit_prisma, vit_prisma_gated,
    )
}  # fmt: skip


def random(seed=0):
    return Random(torch.Generator().manual_seed(seed))


def rows(count=64, seed=7):
    """Rows that are neither centred nor of norm 1."""
    return 1.5 * torch.randn(count, D, generator=torch.Generator().manual_seed(seed)) + 0.8
