"""What is recorded of weights is used whole or refused: config.json, our own headers, prefixes, positions."""

import json
import math

import pytest
import safetensors.torch
import timm
import torch
from conftest import TINY, assert_refused, call, make_image_folder

from modeling import models
from modeling.errors import UserError
from modeling.files import read_tensors
from modeling.models.layout import set_memory_layout
from modeling.models.tensors import read_state
from modeling.models.vit import SimpleViT
from modeling.run import checkpoint

RECORD = {
    "input_size": [3, 64, 64],
    "mean": [0.1, 0.2, 0.3],
    "std": [0.4, 0.5, 0.6],
    "crop_pct": 0.9,
    "interpolation": "bilinear",
}


def timm_folder(folder, name="test_resnet", record=RECORD, **model_args):
    """A folder as timm pushes it to the hub."""
    torch.manual_seed(1)
    model = timm.create_model(name, num_classes=10, **model_args).eval()
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    config = {"architecture": name, "model_args": model_args, "pretrained_cfg": record}
    (folder / "config.json").write_text(json.dumps(config))
    return model, folder / "model.safetensors"


def test_the_arguments_of_a_timm_model_are_used_and_kept(tmp_path):
    for number, model_args in enumerate(
        ({}, {"global_pool": "max"}, {"act_layer": "gelu", "drop_rate": 0.1})
    ):
        reference, path = timm_folder(tmp_path / str(number), **model_args)
        model = models.build_model("timm/test_resnet", num_classes=10, image_size=64, weights=path).eval()
        x = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            torch.testing.assert_close(model(x), reference(x), rtol=1e-4, atol=1e-5)
    flags = ("--model", "timm/test_resnet", *TINY[2:], "--max-steps", 1, "--output-dir", tmp_path)
    result = call("train", *flags, "--weights", path)
    assert result.status == 0, result.err
    assert "input      64 px, crop 0.9, bilinear, mean 0.1 0.2 0.3, std 0.4 0.5 0.6" in result.out
    best = tmp_path / "checkpoints" / "timm_test_resnet_best.safetensors"
    loaded, header = checkpoint.load_model(best)
    assert header["model"]["timm_args"] == model_args
    assert type(loaded.act1).__name__ == "GELU"
    # A checkpoint of ours that is put on the hub is used as the same file is here.
    own = tmp_path / "own" / "model.safetensors"
    own.parent.mkdir()
    own.write_bytes(best.read_bytes())
    found = models.find_weights("timm/test_resnet", str(own))
    assert found.preprocessing == models.find_weights("timm/test_resnet", str(best)).preprocessing
    assert found.preprocessing.mean == (0.1, 0.2, 0.3)
    assert found.model_args == {"timm_args": model_args}


@pytest.mark.parametrize(
    "config, words",
    [
        ([], "it must be an object"),
        ({"architecture": "resnet18"}, "is a resnet18, not timm/test_resnet"),
        ({"pretrained_cfg": None}, "pretrained_cfg must be an object"),
        ({"pretrained_cfg": RECORD | {"crop_pct": 0}}, "crop's fraction"),
        ({"pretrained_cfg": RECORD | {"crop_pct": 2}}, "crop's fraction"),
        ({"pretrained_cfg": RECORD | {"std": [1, 1, 0]}}, "std must be 3 positive"),
        ({"pretrained_cfg": RECORD | {"crop_mode": "border"}}, "crop_mode 'border'"),
        ({"pretrained_cfg": RECORD | {"crop_mode": "squash"}}, "crop_mode 'squash' with crop_pct 0.9"),
        ({"pretrained_cfg": RECORD | {"input_size": [3, 64, 96]}}, "square image of 3 channels"),
        ({"pretrained_cfg": RECORD | {"input_size": [1, 64, 64]}}, "square image of 3 channels"),
        ({"pretrained_cfg": RECORD | {"interpolation": "lanczos"}}, "interpolation must be"),
        ({"model_args": {"checkpoint_path": "/tmp/x"}}, "model_args has checkpoint_path"),
        ({"model_args": {"in_chans": 1}}, "3 channels"),
        ({"model_args": {"global_pool": ""}}, "cannot take image size 64 with"),
        ({"model_args": {"hidden": 3}}, "cannot take image size 64 with"),
        ({"model_args": {"layers": [10**6, 1, 1, 1]}}, "far more than"),
        ({"model_args": {"channels": [10**6, 48, 48, 48]}}, "would have"),
        ({"model_args": {"channels": [10**12]}}, "too large"),
    ],
)
def test_a_record_that_cannot_be_used_is_refused(tmp_path, config, words):
    _, path = timm_folder(tmp_path / "model")
    if isinstance(config, dict):
        config = {"architecture": "test_resnet", "pretrained_cfg": RECORD} | config
    path.with_name("config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=words) as error:
        models.build_model("timm/test_resnet", num_classes=10, image_size=64, weights=path)
    assert len(str(error.value)) < 600


def test_squash_without_a_crop_is_our_resize(tmp_path):
    record = RECORD | {"crop_mode": "squash", "crop_pct": 1.0}
    _, path = timm_folder(tmp_path / "model", record=record)
    assert models.find_weights("timm/test_resnet", str(path)).preprocessing.crop_fraction is None


@pytest.mark.parametrize(
    "prefixes", [("module.",), ("_orig_mod.",), ("backbone.",), ("module.", "_orig_mod.")]
)
def test_the_prefixes_of_wrappers_are_removed(tmp_path, prefixes):
    reference, _ = timm_folder(tmp_path / "model")
    wrapped = tmp_path / "wrapped.safetensors"
    state = {"".join(prefixes) + key: value for key, value in reference.state_dict().items()}
    safetensors.torch.save_file(state, wrapped)
    model = models.build_model("timm/test_resnet", num_classes=10, image_size=64, weights=wrapped)
    loaded = model.state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in reference.state_dict().items())


def save_own(path, name, size, **model_args):
    torch.manual_seed(0)
    model = models.build_model(name, num_classes=10, image_size=size, **model_args)
    safetensors.torch.save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    return model


def test_a_probe_and_the_whole_model_take_each_others_weights_at_any_size(tmp_path, capsys):
    path = tmp_path / "w.safetensors"
    whole = "timm/vit_tiny_patch16_224"
    for first, second in (("vit", whole), (whole, "vit")):
        one = save_own(path, first, 32)
        capsys.readouterr()
        other = models.build_model(second, num_classes=10, image_size=48, weights=path)
        assert "fitted to the image size: pos_embed" in capsys.readouterr().out
        assert torch.equal(one.head.weight, other.head.weight)
        one, other = (getattr(model, "backbone", model) for model in (one, other))
        assert torch.equal(one.cls_token, other.cls_token)
        expected = timm.layers.resample_abs_pos_embed(one.pos_embed, new_size=[3, 3], num_prefix_tokens=1)
        torch.testing.assert_close(other.pos_embed, expected)
    new = models.build_model("vit", num_classes=3, image_size=32, weights=path)
    assert new.head.weight.shape == (3, 192)
    assert capsys.readouterr().out == "weights    are loaded; new: head.weight, head.bias\n"


def test_vit_scratch_fits_its_positions_to_another_image_size(tmp_path, capsys):
    path = tmp_path / "w.safetensors"
    one = save_own(path, "vit_scratch", 32)
    other = models.build_model("vit_scratch", num_classes=10, image_size=48, weights=path)
    expected = timm.layers.resample_abs_pos_embed(one.positions, new_size=[12, 12], num_prefix_tokens=1)
    assert torch.equal(other.positions, expected)
    assert torch.equal(other.blocks[0].mlp[0].weight, one.blocks[0].mlp[0].weight)
    assert "fitted to the image size: positions" in capsys.readouterr().out
    assert isinstance(other, SimpleViT)


def test_a_head_of_other_classes_is_not_kept(tmp_path):
    make_image_folder(tmp_path / "data", {"train": {"cat": 8, "dog": 8}})
    make_image_folder(tmp_path / "other", {"train": {"ant": 8, "bee": 8}})
    flags = ("--model", "cnn_small", "--image-size", 16, "--batch-size", 8, "--max-steps", 1, "--lr", 1e-9)
    assert call("train", *flags, "--dataset", tmp_path / "data", "--output-dir", tmp_path).status == 0
    best = tmp_path / "checkpoints" / "cnn_small_best.safetensors"
    for dataset, is_new in (("data", False), ("other", True)):
        out = ("--output-dir", tmp_path / "second", "--weights", best)
        result = call("train", *flags, "--dataset", tmp_path / dataset, *out)
        assert result.status == 0, result.err
        assert ("new: classifier.4.weight, classifier.4.bias" in result.out) == is_new


def test_our_own_checkpoint_must_be_of_the_same_function(trained, tmp_path):
    flags = (*TINY, "--max-steps", 1, "--output-dir", tmp_path)
    assert_refused(
        call("train", *flags, "--weights", trained.best, "--model", "cnn"), "is a cnn_small, not cnn"
    )
    with pytest.raises(UserError, match="is of a model with pool None, not 3"):
        models.build_model("cnn_small", num_classes=10, image_size=8, pool=3, weights=trained.best)
    state, metadata = read_tensors(trained.best)
    state["classifier.4.bias"][0] += 1
    altered = tmp_path / "altered.safetensors"
    safetensors.torch.save_file(state, altered, metadata=metadata)
    with pytest.raises(UserError, match="were altered"):
        models.build_model("cnn_small", num_classes=10, image_size=8, weights=altered)
    state = {name: value.clone() for name, value in state.items()}
    state["classifier.4.bias"][0] = torch.nan
    safetensors.torch.save_file(state, altered)
    assert_refused(
        call("train", *flags, "--weights", altered), "NaN or infinite numbers in classifier.4.bias"
    )


def test_a_convolution_that_skips_pixels_stays_contiguous():
    """In channels-last layout torch 2.14 corrupts the heap in its weight gradient."""
    model = models.build_model("timm/repvgg_a0", num_classes=3, image_size=32).train()
    stem = model.stem.conv_1x1.conv
    assert stem.weight.stride() == (3, 1, 1, 1)
    seen = []
    stem.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    x = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    model(x).sum().backward()
    assert seen[0].is_contiguous()
    assert stem.weight.grad.isfinite().all()
    layers = set_memory_layout(
        torch.nn.Sequential(torch.nn.Conv2d(64, 8, 1, stride=2), torch.nn.Conv2d(3, 8, 3))
    )
    assert not any(layer._forward_pre_hooks for layer in layers)


def test_only_scalars_may_be_infinite(tmp_path):
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file({"bound": torch.tensor(math.inf), "weight": torch.ones(2)}, path)
    assert read_state(path)["bound"] == math.inf
    for bad in ({"bound": torch.tensor(math.nan)}, {"weight": torch.tensor([1.0, math.inf])}):
        safetensors.torch.save_file(bad, path)
        with pytest.raises(UserError, match="NaN or infinite"):
            read_state(path)
