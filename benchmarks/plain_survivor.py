"""The peer of `recover`: the model of `plain_trainer`, trained on and on as Ray Train's documentation shows it, with its failures handled.

Every step's time goes to a file, every tenth step's state to a checkpoint, and a worker group that is started again takes up the newest.
Run by `ray job submit`, with the file that takes the steps' times, the number of workers, the batch size of each and the storage.
"""

import sys
import tempfile
import time
from pathlib import Path

import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from mae_core.mae import MaskedAutoencoder
from mae_core.options import DecoderConfig, MaskingConfig, ModelConfig, TargetConfig
from mae_core.vit import Encoder

_STEPS_PER_CHECKPOINT = 10


def train_func(config: dict) -> None:  # type: ignore[type-arg]
    torch.manual_seed(0)
    encoder = Encoder(ModelConfig(arch="vit_tiny_patch4", image_size=8, in_chans=1))
    mae = MaskedAutoencoder(encoder, masking=MaskingConfig(ratio=0.5), decoder=DecoderConfig(depth=1, width=32), target=TargetConfig())
    model = ray.train.torch.prepare_model(mae)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    step = 0
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / "state.pt", weights_only=True)
        mae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    digits = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
    loader = ray.train.torch.prepare_data_loader(DataLoader(TensorDataset(digits), batch_size=config["batch_size"], shuffle=True))
    leads = ray.train.get_context().get_world_rank() == 0
    while True:
        for (images,) in loader:
            numbers = torch.rand(len(images), mae.num_numbers)
            optimizer.zero_grad()
            model(images, numbers).loss.backward()
            optimizer.step()
            step += 1
            if leads:
                with open(config["steps"], "a") as file:
                    file.write(f"{step} {time.time()}\n")
            if step % _STEPS_PER_CHECKPOINT == 0:
                with tempfile.TemporaryDirectory() as folder:
                    if leads:
                        state = {"model": mae.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                        torch.save(state, Path(folder) / "state.pt")
                    ray.train.report({"step": step}, checkpoint=Checkpoint.from_directory(folder) if leads else None)


if __name__ == "__main__":
    steps_file, num_workers, batch_size, storage = sys.argv[1:]
    TorchTrainer(
        train_func,
        train_loop_config={"steps": steps_file, "batch_size": int(batch_size)},
        scaling_config=ScalingConfig(num_workers=int(num_workers)),
        run_config=RunConfig(
            storage_path=storage, failure_config=FailureConfig(max_failures=3), checkpoint_config=CheckpointConfig(num_to_keep=2)
        ),
    ).fit()
