"""What Pilotfish computes, once more, from the formulas in its documentation and with numpy alone.

Reads a JSON document from stdin and writes one to stdout: see `answers`. Nothing here was translated from the Rust code; where this and that
disagree, one of them is wrong.
"""

import json
import sys

import numpy as np


def shares(sets):
    weights = np.array([s["weight"] for s in sets], dtype=np.float64)
    return weights / weights.sum()


def rows(values, width):
    return np.asarray(values, dtype=np.float64).reshape(-1, width)


def mean_difference(sets, width):
    """v = sum of w (mean(x | +) - mean(x | -)) over the sets"""
    return sum(
        share * (rows(s["positive"], width).mean(axis=0) - rows(s["negative"], width).mean(axis=0))
        for share, s in zip(shares(sets), sets)
    )


def principal_difference(sets, width):
    """(u.v) u, u the leading eigenvector of the second moment of paired differences, v the difference of means"""
    moment = np.zeros((width, width))
    for share, s in zip(shares(sets), sets):
        d = rows(s["positive"], width) - rows(s["negative"], width)
        moment += share * d.T @ d / len(d)
    u = np.linalg.eigh(moment)[1][:, -1]
    return (u @ mean_difference(sets, width)) * u


def pooled(sets, width, balanced):
    """All rows, their classes (1 and 0) and their weights, which sum to 1"""
    x, y, w = [], [], []
    for share, s in zip(shares(sets), sets):
        classes = {1: rows(s["positive"], width), 0: rows(s["negative"], width)}
        size = sum(len(c) for c in classes.values())
        for label, c in classes.items():
            x.append(c)
            y += [label] * len(c)
            w += [share / (2 * len(c) if balanced else size)] * len(c)
    return np.concatenate(x), np.array(y), np.array(w)


def linear_discriminant(sets, width, shrinkage):
    """w = D^-1 S^-1 D^-1 (mean+ - mean-), S the covariance within classes in units of D, shrunk towards the mean variance"""
    x, y, w = pooled(sets, width, balanced=False)
    means = [np.average(x[y == label], axis=0, weights=w[y == label]) for label in (0, 1)]
    deviation = np.sqrt(np.average((x - np.average(x, axis=0, weights=w)) ** 2, axis=0, weights=w))
    within = np.stack([row - means[label] for row, label in zip(x, y)]) / deviation
    covariance = (within * w[:, None]).T @ within
    shrunk = (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / width * np.eye(width)
    return np.linalg.solve(shrunk, (means[1] - means[0]) / deviation) / deviation


def logistic_regression(sets, width, penalty):
    """Weights of least sum of w ln(1 + exp(-y (u.z + b))) + penalty / 2 |u|^2, z the standardized rows, by Newton's method with the intercept
    as one more column that costs nothing"""
    x, y, w = pooled(sets, width, balanced=True)
    mean = np.average(x, axis=0, weights=w)
    deviation = np.sqrt(np.average((x - mean) ** 2, axis=0, weights=w))
    z = np.hstack([(x - mean) / deviation, np.ones((len(x), 1))])
    cost = penalty * np.diag([1.0] * width + [0.0])

    def loss(u):
        return w @ np.logaddexp(0, np.where(y == 1, -1, 1) * (z @ u)) + u @ cost @ u / 2

    u = np.zeros(width + 1)
    for _ in range(200):
        p = 1 / (1 + np.exp(-(z @ u)))
        gradient = z.T @ (w * (p - y)) + cost @ u
        if np.abs(gradient).max() < 1e-12:
            break
        step = np.linalg.solve((z * (w * p * (1 - p))[:, None]).T @ z + cost, gradient)
        t = 1.0
        while t > 1e-6 and loss(u - t * step) > loss(u):
            t /= 2
        u = u - t * step
    return u[:-1] / deviation


def ridge(source, target, penalty):
    """W = (Zs' Zs + penalty n I)^-1 Zs' Zt, both sides standardized; rows of W are dimensions of the source"""
    zs = (source - source.mean(axis=0)) / source.std(axis=0)
    zt = (target - target.mean(axis=0)) / target.std(axis=0)
    return np.linalg.solve(zs.T @ zs + penalty * len(zs) * np.eye(zs.shape[1]), zs.T @ zt)


def autoencoder(a, x):
    """mu_t + s_t (W2 max(W1 (x - mu_s) / s_s + b1, 0) + b2)"""
    n = {key: np.asarray(value, dtype=np.float64) for key, value in a.items()}
    encoder = n["encoder"].reshape(len(n["encoder_bias"]), -1)
    decoder = n["decoder"].reshape(len(n["decoder_bias"]), -1)
    hidden = np.maximum((x - n["source_mean"]) / n["source_scale"] @ encoder.T + n["encoder_bias"], 0)
    return n["target_mean"] + n["target_scale"] * (hidden @ decoder.T + n["decoder_bias"])


def answers(q):
    out = {}
    for contrast in q["contrasts"]:
        sets, width, name = contrast["sets"], contrast["width"], contrast["name"]
        out[f"{name} mean"] = mean_difference(sets, width)
        if all(len(s["positive"]) == len(s["negative"]) for s in sets):
            out[f"{name} pca"] = principal_difference(sets, width)
        out[f"{name} lda"] = linear_discriminant(sets, width, contrast["shrinkage"])
        out[f"{name} logistic"] = logistic_regression(sets, width, contrast["penalty"])
    r = q["ridge"]
    source, target = rows(r["source"], r["source_width"]), rows(r["target"], r["target_width"])
    out["ridge"] = ridge(source, target, r["penalty"]).ravel()
    out["ridge direction"] = (np.asarray(r["direction"]) / source.std(axis=0)) @ ridge(source, target, r["penalty"]) * target.std(axis=0)
    a = q["autoencoder"]
    out["autoencoder"] = autoencoder(a["weights"], rows(a["rows"], len(a["weights"]["source_mean"]))).ravel()
    return {name: values.tolist() for name, values in out.items()}


if __name__ == "__main__":
    json.dump(answers(json.load(sys.stdin)), sys.stdout)
