"""An epoch of the same autoencoder's training in PyTorch, one for every line of input: `cargo bench --profile dev --bench autoencoder` starts it.

    python3 -m venv target/torch-env
    target/torch-env/bin/pip install torch
    cargo bench --profile dev --bench autoencoder -- target/torch-env/bin/python

As one would write it: two `Linear`s with a `ReLU` between, `MSELoss`, `AdamW` as it comes or, where `fused` is the fifth argument, its fused
step; all cores; rows gathered into batches by a random order. A fourth as many rows again are predicted after each epoch, as held-out ones are.
"""

import sys
import time

import torch
from torch import nn


def main():
    rows, source, target, batch = (int(argument) for argument in sys.argv[1:5])
    fused = sys.argv[5:] == ["fused"]
    torch.manual_seed(0)
    hidden = round((source * target) ** 0.5)
    model = nn.Sequential(nn.Linear(source, hidden), nn.ReLU(), nn.Linear(hidden, target))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused or None)
    mean_squared_error = nn.MSELoss()
    x, y = torch.randn(rows, source), torch.randn(rows, target)
    held_x, held_y = torch.randn(rows // 4, source), torch.randn(rows // 4, target)
    for _ in sys.stdin:
        start = time.perf_counter()
        total = 0.0
        for order in torch.randperm(rows).split(batch):
            optimizer.zero_grad()
            loss = mean_squared_error(model(x[order]), y[order])
            loss.backward()
            optimizer.step()
            total += loss.item() * len(order)
        with torch.no_grad():
            mean_squared_error(model(held_x), held_y).item()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
