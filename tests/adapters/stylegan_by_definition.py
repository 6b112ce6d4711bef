"""StyleGAN2 restated in NumPy's float64 from the published equations, image by image, in another way than the package.

Feature maps are filtered *before* the up-sampling convolution, kernels are applied tap by tap, weights are modulated in
loops, and a layer of W+ is chosen by counting. Nothing here is shared with the package.
"""

import math

import numpy as np

FILTER = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64.0


def leaky(x, clamp=None):
    y = np.where(x >= 0, x, 0.2 * x) * math.sqrt(2)
    return y if clamp is None else np.clip(y, -clamp, clamp)


def unit_mean_square(x):
    return x / math.sqrt(np.mean(x**2) + 1e-8)


def dense(weights, name, x, multiplier=1.0):
    weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    scale = multiplier / math.sqrt(weight.shape[1])
    return np.array(
        [sum(weight[o, i] * scale * x[i] for i in range(len(x))) + multiplier * bias[o] for o in range(len(bias))]
    )


def mapped(weights, z, c, layers, multiplier):
    """w of one z."""
    x = unit_mean_square(z)
    if c is not None:
        x = np.concatenate([x, unit_mean_square(dense(weights, "mapping.embed", c))])
    for i in range(layers):
        x = leaky(dense(weights, f"mapping.fc{i}", x, multiplier))
    return x


def truncated(weights, w, num_ws, psi, cutoff):
    """W+ of one w, `(num_ws, w_dim)`."""
    average = weights["mapping.w_avg"]
    last = num_ws if cutoff is None else cutoff
    return np.stack([average + psi * (w - average) if i < last else w for i in range(num_ws)])


def convolution(x, kernel, before, after):
    """True convolution of a map `(H, W)` with a kernel, zeros before and after it: `y[p] = Σ_q kernel[q] x[p - q]`."""
    size = kernel.shape[0]
    padded = np.pad(x, ((before, after), (before, after)))
    height, width = padded.shape[0] - size + 1, padded.shape[1] - size + 1
    y = np.zeros((height, width))
    for a in range(size):
        for b in range(size):
            y += kernel[size - 1 - a, size - 1 - b] * padded[a : a + height, b : b + width]
    return y


def doubled(x, before, after):
    """Zeros after every pixel, then the filter with gain 4 (upfirdn)."""
    spread = np.zeros((2 * x.shape[0], 2 * x.shape[1]))
    spread[::2, ::2] = x
    return convolution(spread, 4 * FILTER, before, after)


def modulated(weight, style, demodulate):
    out, inputs = weight.shape[:2]
    kernel = np.empty_like(weight)
    for o in range(out):
        for i in range(inputs):
            kernel[o, i] = weight[o, i] * style[i]
        if demodulate:
            kernel[o] /= math.sqrt(np.sum(kernel[o] ** 2) + 1e-8)
    return kernel


def layer(weights, name, x, w, up, noise, clamp):
    kernel = modulated(weights[f"{name}.weight"], dense(weights, f"{name}.affine", w), True)
    if up:
        x = [doubled(m, 3, 2) for m in x]
    maps = []
    for o in range(len(kernel)):
        total = 0.0
        for i in range(len(x)):
            taps = kernel[o, i] if up else kernel[o, i][::-1, ::-1]  # a correlation where nothing is doubled
            total = total + convolution(x[i], taps, 0 if up else 1, 0 if up else 1)
        total = total + weights[f"{name}.noise_strength"] * noise + weights[f"{name}.bias"][o]
        maps.append(leaky(total, clamp))
    return maps


def colours(weights, name, x, w, clamp):
    style = dense(weights, f"{name}.affine", w) / math.sqrt(len(x))
    kernel = modulated(weights[f"{name}.weight"], style, False)[:, :, 0, 0]
    rgb = [sum(kernel[o, i] * x[i] for i in range(len(x))) + weights[f"{name}.bias"][o] for o in range(len(kernel))]
    return rgb if clamp is None else [np.clip(c, -clamp, clamp) for c in rgb]


def synthesised(weights, w, resolution, clamp, noise_of):
    """One image `(channels, R, R)` of W+; `noise_of(layer)` is the noise that a layer gets."""
    x, image, place = list(weights["synthesis.b4.const"]), None, 0
    for r in [2**i for i in range(2, int(math.log2(resolution)) + 1)]:
        block = f"synthesis.b{r}"
        if r > 4:
            x = layer(weights, f"{block}.conv0", x, w[place], True, noise_of(f"{block}.conv0"), clamp)
            place += 1
        x = layer(weights, f"{block}.conv1", x, w[place], False, noise_of(f"{block}.conv1"), clamp)
        place += 1
        rgb = colours(weights, f"{block}.torgb", x, w[place], clamp)
        image = rgb if image is None else [doubled(m, 2, 1) + c for m, c in zip(image, rgb, strict=True)]
    return np.stack(image)
