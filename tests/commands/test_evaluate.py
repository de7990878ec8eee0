import json
import math
from pathlib import Path

import pytest

from fastp2p.commands.evaluate import evaluate, format_table, to_json
from fastp2p.data import PairDataset, PairFormat, eval_batches, load_split
from fastp2p.models.checkpoint import load_generator, save_generator
from fastp2p.models.generate import generate
from fastp2p.models.metrics import score
from fastp2p.models.pix2pix.generator import UnetGeneratorSpec


@pytest.fixture
def model(tmp_path: Path) -> Path:
    spec = UnetGeneratorSpec(levels=3, ngf=4, direction="BtoA", crop_size=32)
    save_generator(tmp_path / "netG.safetensors", spec.build().state_dict(), spec)
    return tmp_path / "netG.safetensors"


def test_scores_are_the_metrics_of_the_model_s_direction_and_size(model: Path, aligned: Path):
    result = evaluate(model, str(aligned))
    assert (result["direction"], result["size"], result["images"]) == ("BtoA", 32, 2)
    real_A, real_B = next(eval_batches(load_split(str(aligned), "val", PairFormat("BtoA", 32)))).values()
    expected = score(generate(load_generator(model)[0], real_A), real_B)
    for name, values in expected.items():
        assert result["metrics"][name]["mean"] == pytest.approx(values.mean().item())
        assert result["metrics"][name]["std"] == pytest.approx(values.std(correction=0).item(), abs=1e-6)
    assert set(result["per_image"]) == {"val/0.png", "val/1.png"}
    assert evaluate(model, str(aligned), direction="AtoB")["metrics"] != result["metrics"]


def test_statistics_and_dropout_are_options(model: Path, aligned: Path):
    plain = evaluate(model, str(aligned), "train")
    assert plain["images"] == 6
    for options in ({"norm_stats": "batch"}, {"norm_stats": "running"}):
        assert evaluate(model, str(aligned), "train", **options)["metrics"] != plain["metrics"]


def test_table(model: Path, aligned: Path):
    (aligned / "val" / "2.png").touch()
    text = format_table(evaluate(model, str(aligned), skip_bad=True))
    assert "2 images of" in text
    assert "skipped val/2.png: the file is empty" in text
    for name in ("L1", "PSNR", "SSIM", "mean", "std"):
        assert name in text


def test_what_is_passed_over_is_said(model: Path, aligned: Path):
    (aligned / "val" / "city").mkdir()
    (aligned / "val" / "city" / "0.png").touch()
    result = evaluate(model, str(aligned))
    assert result["passed_over"] == ["val/city/ (1 image)"]
    assert "passed over 1 entry" in format_table(result)
    assert "val/city/ (1 image)" in format_table(result)


def test_a_pair_that_vanishes_while_streaming_is_not_scored(
    model: Path, aligned: Path, monkeypatch: pytest.MonkeyPatch
):
    def load(*args: object, **options: object) -> PairDataset:
        dataset = load_split(*args, **options, stream="always")
        (aligned / "val" / "0.png").unlink()
        return dataset

    monkeypatch.setattr("fastp2p.commands.evaluate.load_split", load)
    result = evaluate(model, str(aligned), skip_bad=True)
    assert result["images"] == 1
    assert set(result["per_image"]) == {"val/1.png"}
    assert set(result["skipped"]) == {"val/0.png"}


def test_a_perfect_model_scores_perfectly(aligned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path):
    from PIL import Image

    for file in aligned.rglob("*.png"):
        image = Image.open(file)
        image.paste(image.crop((0, 0, 40, 40)), (40, 0))
        image.save(file)
    monkeypatch.setattr("fastp2p.models.metrics.generate", lambda netG, x, **options: x)
    result = evaluate(model, str(aligned))
    metrics = result["metrics"]
    assert metrics["L1"]["mean"] == 0
    assert metrics["SSIM"]["mean"] == pytest.approx(1)
    assert metrics["PSNR"]["mean"] == math.inf
    assert json.loads(to_json(result))["metrics"]["PSNR"] == {"mean": None, "std": None}
