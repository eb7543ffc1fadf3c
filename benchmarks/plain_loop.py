"""What one writes by hand: a Hydra app whose job is the tutorial's DataLoader loop.

python benchmarks/plain_loop.py -m lr=0.01,0.1 batch_size=32,64
"""

import hydra
import torch
from omegaconf import DictConfig
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from experiments.data.mnist import load


@hydra.main(version_base="1.3", config_path=None)
def main(config: DictConfig) -> float:
    data = load()
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 10))
    )
    opt = torch.optim.SGD(model.parameters(), lr=config["lr"], momentum=0.9)
    loss_func = nn.CrossEntropyLoss()
    size = config["batch_size"]
    train_loader = DataLoader(TensorDataset(data.train.x, data.train.y), size, shuffle=True)
    valid_loader = DataLoader(TensorDataset(data.valid.x, data.valid.y), 2 * size)
    mean = 0.0
    for _ in range(config["epochs"]):
        model.train()
        for xb, yb in train_loader:
            loss = loss_func(model(xb), yb)
            loss.backward()
            opt.step()
            opt.zero_grad()
        model.eval()
        with torch.no_grad():
            losses, sizes = zip(
                *((loss_func(model(xb), yb).item(), len(xb)) for xb, yb in valid_loader),
                strict=True,
            )
        mean = sum(a * b for a, b in zip(losses, sizes, strict=True)) / sum(sizes)
    return mean


if __name__ == "__main__":
    main()
