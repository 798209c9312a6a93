"""Every format of a ViT-Tiny on real photographs: by how much its library's features differ from ours. Prints the table (pytest -s)."""

import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from mae_core.data.decode import read_image
from mae_core.data.loader import stacked
from mae_core.data.transforms import centre_crop
from mae_core.exports.formats import FOLDERS
from mae_core.options import NormalizeConfig
from tests.torchvision_ops import import_torchvision
from tests.unit.core_fixtures import pretrain_spec
from tests.unit.test_exports import exported, run_card

import_torchvision()
import transformers  # noqa: E402  (needs the line above)

MODEL = {"arch": "vit_tiny_patch16", "image_size": 224}


@pytest.fixture(scope="module")
def photos(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    with tarfile.open(data_dir / "imagenet-500.tar") as archive:
        for member in [member for member in archive if member.isfile()][:8]:
            archive.extract(member, folder, filter="data")
    return folder


def by_their_processor(folder: Path, photos: Path, normalize: NormalizeConfig) -> tuple[Tensor, Tensor]:
    """What `AutoImageProcessor` makes of the photos, and what we do: both in steps of 255, (B, C, H, W)."""
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    paths = sorted(path for path in photos.rglob("*") if path.is_file())
    theirs = processor([Image.open(path) for path in paths], return_tensors="pt")["pixel_values"]
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (normalize.mean, normalize.std))
    ours_BHWC = stacked([centre_crop(read_image(path, 3), (224, 224)) for path in paths])
    return (theirs * std + mean) * 255, ours_BHWC.permute(0, 3, 1, 2).float()


@torch.no_grad()
def test_features_of_photographs_are_equal_in_every_library(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers.utils.logging.disable_progress_bar()
    spec = pretrain_spec(photos, model=MODEL, masking={"ratio": 0.75}, decoder={"depth": 2, "width": 128}, export={"formats": None})
    run, outcomes = exported(spec, tmp_path / "result")
    images = run._sample().images_BCHW
    features = run._whole.encoder.eval()(images)
    noise = torch.rand(len(images), run.model.num_patches, generator=torch.Generator().manual_seed(1))
    differences = {}
    for name, folder in FOLDERS.items():
        found = run_card(tmp_path / "result" / folder, images, monkeypatch)
        theirs, expected = found.get("features"), features
        if name == "torch":
            theirs = found["model"].eval().forward_features(images)
        elif name == "onnx":
            theirs = torch.from_numpy(found["output"])
        elif name == "hf-mae":
            theirs, expected = found["model"](images, noise=noise).logits, run._whole.eval()(images, noise, predict_all=True).prediction_VQP
        differences[name] = float((theirs - expected).abs().max())
        print(f"| {name} | {outcomes[name].difference:.1e} | {differences[name]:.1e} |")
    print(f"largest feature {float(features.abs().max()):.1f}")
    assert max(differences.values()) < 2e-5  # float32 sums of 197 tokens in another order, through 12 blocks

    theirs, ours = by_their_processor(tmp_path / "result/hf", photos, run.normalize)
    print(f"image processor, of 255: mean {float((theirs - ours).abs().mean()):.2f}, {theirs.shape}")
    assert float((theirs - ours).abs().mean()) < 4  # their sides are whole pixels, ours are not, so it is half a pixel of shift at most
