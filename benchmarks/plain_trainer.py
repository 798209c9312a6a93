"""The peer of `start_up`: a masked autoencoder trained as Ray Train's documentation shows it, for its first optimiser step.

Run by `ray job submit`, with the file that takes its stages, the number of workers and the batch size of each.
"""

import sys
import time

_STARTED_AT = time.time()

import ray.train  # noqa: E402  (the stamp above is of the process alone)
import ray.train.torch  # noqa: E402
import torch  # noqa: E402
from ray.train import RunConfig, ScalingConfig  # noqa: E402
from ray.train.torch import TorchTrainer  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from mae_core.mae import MaskedAutoencoder  # noqa: E402
from mae_core.options import DecoderConfig, MaskingConfig, ModelConfig, TargetConfig  # noqa: E402
from mae_core.vit import Encoder  # noqa: E402


def train_func(config: dict) -> None:  # type: ignore[type-arg]
    stages = {"driver_started_at": config["started_at"], "worker_started_at": time.time()}
    torch.manual_seed(0)
    encoder = Encoder(ModelConfig(arch="vit_tiny_patch4", image_size=8, in_chans=1))
    mae = MaskedAutoencoder(encoder, masking=MaskingConfig(ratio=0.5), decoder=DecoderConfig(depth=1, width=32), target=TargetConfig())
    model = ray.train.torch.prepare_model(mae)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    digits = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
    loader = ray.train.torch.prepare_data_loader(DataLoader(TensorDataset(digits), batch_size=config["batch_size"], shuffle=True))
    for (images,) in loader:
        numbers = torch.rand(len(images), mae.num_numbers)
        optimizer.zero_grad()
        model(images, numbers).loss.backward()
        optimizer.step()
        break
    stages["first_step_taken"] = time.time()
    if ray.train.get_context().get_world_rank() == 0:
        with open(config["stages"], "w") as file:
            file.writelines(f"{name} {at}\n" for name, at in stages.items())


if __name__ == "__main__":
    stages_file, num_workers, batch_size, storage = sys.argv[1:]
    TorchTrainer(
        train_func,
        train_loop_config={"stages": stages_file, "batch_size": int(batch_size), "started_at": _STARTED_AT},
        scaling_config=ScalingConfig(num_workers=int(num_workers)),
        run_config=RunConfig(storage_path=storage),
    ).fit()
