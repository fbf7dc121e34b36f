"""What benches/mapping.rs does, in numpy: `numpy_ridge.py pairs` and `numpy_ridge.py wide`, SCALE as there. Prints seconds.

The same work: standardise by the training rows, Gram and cross products in float32, one eigendecomposition a source layer, the
penalty from the same grid by held-out error, figures on held-out rows, and a refit on all rows. One source layer serves all target
layers side by side, as one wide matrix. What judges is float32, the solution float64.
"""

import os
import sys
import time

import numpy as np

SHAPES = {"pairs": ((30, 576), (18, 640), 15_000), "wide": ((1, 2048), (1, 4096), 100_000)}
LAMBDAS = [1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0]
ROWS_A_DOCUMENT, FACTORS = 40, 32


def activations(generator, factors, width):
    values = generator.uniform(-1, 1, (len(factors), width)).astype(np.float32)
    values += 0.3 * (factors @ generator.uniform(-1, 1, (FACTORS, width)).astype(np.float32))
    return values


def moments(rows):
    return rows.mean(0, dtype=np.float64).astype(np.float32), rows.std(0, dtype=np.float64).astype(np.float32)


def solve_positive_definite(system, right):
    # numpy has no triangular solve; its general solver is what there is without scipy.
    return np.linalg.solve(system, right)


def fit_all(documents, source, target):
    generator = np.random.default_rng(0)
    names = np.unique(documents)
    heldout_documents = generator.permutation(names)[: round(len(names) / 5)]
    held = np.isin(documents, heldout_documents)
    order = np.concatenate([np.flatnonzero(~held), np.flatnonzero(held)])
    n, n_train = len(order), int((~held).sum())
    width = target[0].shape[1]
    # Side by side, in training rows' units and in all rows'.
    stacked = np.empty((n, width * len(target)), np.float32)
    shifts, stretches = [], []
    for index, rows in enumerate(target):
        rows = rows[order]
        mean, scale = moments(rows[:n_train])
        all_mean, all_scale = moments(rows)
        stacked[:, index * width : (index + 1) * width] = (rows - mean) / scale
        shifts.append((all_mean - mean) / scale)
        stretches.append(all_scale / scale)
    target_shift, target_stretch = np.concatenate(shifts), np.concatenate(stretches)
    total = 0.0
    for rows in source:
        rows = rows[order]
        mean, scale = moments(rows[:n_train])
        all_mean, all_scale = moments(rows)
        shift, stretch = ((all_mean - mean) / scale).astype(np.float64), (all_scale / scale).astype(np.float64)
        rows = (rows - mean) / scale
        train, heldout = rows[:n_train], rows[n_train:]
        gram, heldout_gram = train.T @ train, heldout.T @ heldout
        cross, heldout_cross = train.T @ stacked[:n_train], heldout.T @ stacked[n_train:]
        eigenvalues, vectors = np.linalg.eigh(gram.astype(np.float64))
        eigenvalues = np.maximum(eigenvalues, 0).astype(np.float32)
        vectors = vectors.astype(np.float32)
        rotated, heldout_rotated = vectors.T @ cross, vectors.T @ heldout_cross
        heldout_gram_rotated = vectors.T @ heldout_gram @ vectors
        weight = np.empty_like(rotated)
        chosen = []
        for index in range(len(target)):
            columns = slice(index * width, (index + 1) * width)
            b = rotated[:, columns]
            quadratic = (b @ b.T) * heldout_gram_rotated
            linear = np.einsum("ij,ij->i", b, heldout_rotated[:, columns])
            losses = []
            for penalty in LAMBDAS:
                shrinkage = 1 / (eigenvalues + penalty * n_train)
                losses.append(shrinkage @ quadratic @ shrinkage - 2 * shrinkage @ linear)
            best = LAMBDAS[int(np.argmin(losses))]
            chosen.append(best)
            weight[:, columns] = b / (eigenvalues + best * n_train)[:, None]
        weight = vectors @ weight
        for index in range(len(target)):
            columns = slice(index * width, (index + 1) * width)
            predicted, actual = heldout @ weight[:, columns], stacked[n_train:, columns]
            unexplained = np.square(predicted - actual).sum() / np.square(actual).sum()
            norms = np.linalg.norm(predicted, axis=1) * np.linalg.norm(actual, axis=1)
            cosine = np.mean(np.einsum("ij,ij->i", predicted, actual) / norms)
            total += float(unexplained)
            assert np.isfinite(cosine)
        # The refit on all rows, standardised by all of them.
        gram = gram.astype(np.float64) + heldout_gram
        gram = (gram - n * np.outer(shift, shift)) / np.outer(stretch, stretch)
        cross = cross.astype(np.float64) + heldout_cross
        cross -= n * np.outer(shift, target_shift)
        cross /= stretch[:, None]
        cross /= target_stretch
        for penalty in sorted(set(chosen)):
            which = np.concatenate([np.arange(i * width, (i + 1) * width) for i, c in enumerate(chosen) if c == penalty])
            system = gram + penalty * n * np.eye(len(gram))
            whole = len(which) == cross.shape[1]
            solution = solve_positive_definite(system, cross if whole else cross[:, which])
            solution.astype(np.float32)
    return total / (len(source) * len(target))


def main():
    name = sys.argv[1] if len(sys.argv) > 1 else "pairs"
    (source_layers, source_width), (target_layers, target_width), rows = SHAPES[name]
    rows = int(rows * float(os.environ.get("SCALE", "1")))
    generator = np.random.default_rng(1)
    documents = np.arange(rows) // ROWS_A_DOCUMENT
    factors = generator.uniform(-1, 1, (rows, FACTORS)).astype(np.float32)
    source = [activations(generator, factors, source_width) for _ in range(source_layers)]
    target = [activations(generator, factors, target_width) for _ in range(target_layers)]
    start = time.perf_counter()
    unexplained = fit_all(documents, source, target)
    print(f"{time.perf_counter() - start:.3f} s, mean unexplained {unexplained:.4f}")


main()
