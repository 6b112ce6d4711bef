"""Codes and edits with dense codes in numpy float64, as the papers write them."""

import numpy as np


def normalized(sae, x):
    """Rows as an SAE takes them, and what a reconstruction is multiplied by and moved by, in float64."""
    x = x.double().numpy()
    match sae.config.get("input_norm"):
        case "layer_norm":
            mean, deviation = x.mean(-1, keepdims=True), x.std(-1, ddof=1, keepdims=True)
            return (x - mean) / (deviation + 1e-5), deviation, mean
        case "constant_norm":
            scale = np.sqrt((x**2).sum(-1, keepdims=True) / x.shape[-1])
            return x / scale, scale, 0 * scale
    return x, np.ones((*x.shape[:-1], 1)), np.zeros((*x.shape[:-1], 1))


def codes(sae, x):
    """Dense codes in float64, as the papers write them."""
    p = {name: tensor.double().numpy() for name, tensor in sae.state_dict().items()}
    rows = normalized(sae, x)[0]
    pre = (rows - p["b_dec"]) @ p.get("W_enc", p["W_dec"]).T + p["b_enc"]
    match type(sae).__name__:
        case "ReLUSAE":
            return np.maximum(pre, 0)
        case "TopKSAE":
            rank = np.argsort(np.argsort(-pre, axis=-1), axis=-1)
            return np.where(rank < sae.k, np.maximum(pre, 0) if sae.relu else pre, 0)
        case "BatchTopKSAE" | "MatryoshkaSAE":
            return np.where(pre > p["threshold"], np.maximum(pre, 0), 0)
        case "JumpReLUSAE":
            return np.where(pre > p["threshold"], pre, 0)
        case "GatedSAE":
            w_mag = np.exp(p["r_mag"])[:, None] * p["W_enc"]
            return (pre > 0) * np.maximum((rows - p["b_dec"]) @ w_mag.T + p["b_mag"], 0)
    raise AssertionError(sae)


def edited(sae, x, features, strengths, mode, mask=1.0):
    """`x + M (dec(z') - dec(z))`; x `(B, P, d)`, strengths `(B, m)`."""
    z, w_dec = codes(sae, x), sae.W_dec.detach().double().numpy()
    after = z.copy()
    for column, j in enumerate(features):
        s = np.asarray(strengths, dtype=float)[:, None, column]
        old = z[..., j]
        after[..., j] = {
            "add": old + s,
            "set": s + 0 * old,
            "scale": s * old,
            "cap": np.minimum(old, s),
            "ablate": (1 - s) * old,
        }[mode]
    return x.double().numpy() + mask * normalized(sae, x)[1] * ((after - z) @ w_dec)
