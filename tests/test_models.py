"""Architectures: parameter counts, references, freezing, weights from files."""

import dataclasses

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from modeling import models, recipes
from modeling.errors import UserError
from modeling.models.backbones import ViTLinearProbe
from modeling.models.cpu_layers import Conv3x3, Dropout
from modeling.models.tensors import head_keys
from modeling.models.vit import Block, SimpleViT
from modeling.optim import build_optimizer


def build(name, size, recipe="reference", num_classes=10, **kwargs):
    recipe = recipes.get_recipe(name, size, recipe)
    args = models.model_arguments(name, recipe, image_size=size, patch_size=None, head_dropout=None)
    return models.build_model(name, num_classes=num_classes, image_size=size, **args, **kwargs)


@pytest.mark.parametrize(
    "name, size, total, trainable",
    [
        ("cnn", 32, 6_799_882, 6_799_882),
        ("cnn", 224, 6_799_882, 6_799_882),
        ("cnn_small", 32, 545_098, 545_098),
        ("cnn_small", 224, 51_402_442, 51_402_442),
        ("cnn_fast", 32, 1_972_792, 1_971_328),
        ("vit_scratch", 32, 1_205_898, 1_205_898),
        ("vit_scratch", 224, 2_497_418, 2_497_418),
        ("vit", 224, 5_526_346, 1_930),
        ("deit", 224, 5_526_346, 5_526_346),
        ("resnet18", 224, 11_181_642, 11_181_642),
    ],
)
def test_parameter_counts(name, size, total, trainable):
    assert models.count_parameters(build(name, size)) == (total, trainable)


def test_cnn_fasts_first_layer_has_uncorrelated_outputs_of_variance_one():
    torch.manual_seed(0)
    images = torch.randn(40, 3, 20, 20)
    images[:, 1] += images[:, 0]
    images[:, :, 1:] += 2 * images[:, :, :-1]
    model = build("cnn_fast", 20)
    model.whiten(images)
    with torch.no_grad():
        outputs = model.whitening(images) - model.whitening.bias[:, None, None]
    outputs = outputs.transpose(0, 1).flatten(1).double()  # (24, N)
    products = outputs[:12] @ outputs[:12].T / outputs.shape[1]
    torch.testing.assert_close(products, torch.eye(12, dtype=torch.float64), rtol=0, atol=0.02)
    torch.testing.assert_close(outputs[12:], -outputs[:12], rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", [(1, 1), (3, 3), (5, 7), (8, 8)])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_the_3x3_convolution_has_torchs_outputs_and_gradients(side, memory_format):
    torch.manual_seed(0)
    ours = Conv3x3(5, 6).double().to(memory_format=memory_format)
    theirs = torch.nn.Conv2d(5, 6, 3, padding=1, bias=False).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 5, *side, dtype=torch.float64).contiguous(memory_format=memory_format)
    x.requires_grad_()
    out, expected = ours(x), theirs(x)
    torch.testing.assert_close(out, expected)
    gradient = torch.randn_like(out)
    pairs = zip(
        torch.autograd.grad(out, [x, ours.weight], gradient),
        torch.autograd.grad(expected, [x, theirs.weight], gradient),
        strict=True,
    )
    for actual, reference in pairs:
        torch.testing.assert_close(actual, reference)


def test_the_3x3_convolution_computes_in_the_precision_of_autocast():
    torch.manual_seed(0)
    convolution, x = Conv3x3(5, 6), torch.randn(4, 5, 3, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = convolution(x)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    gradients = x.grad, convolution.weight.grad
    exact = torch.autograd.grad(
        torch.nn.functional.conv2d(x, convolution.weight, padding=1).sum(), [x, convolution.weight]
    )
    for gradient, expected in zip(gradients, exact, strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, expected, rtol=0.02, atol=0.05)


@pytest.mark.parametrize(
    "name, size", [("cnn", 32), ("cnn", 96), ("cnn_small", 32), ("vit_scratch", 32), ("vit_scratch", 96)]
)
@pytest.mark.parametrize("num_classes", [2, 37])
def test_logits_have_the_shape_of_the_classes(name, size, num_classes):
    model = build(name, size, num_classes=num_classes).eval()
    assert model(torch.zeros(3, 3, size, size)).shape == (3, num_classes)


def test_any_timm_model():
    model = models.build_model("timm/resnet10t", num_classes=4, image_size=64).eval()
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 4)
    assert recipes.get_recipe("timm/resnet10t", 224) == recipes.get_recipe("deit", 224)
    with pytest.raises(ValueError, match="timm has no model 'resnet18x': did you mean resnet18"):
        models.check_model_name("timm/resnet18x")


def test_an_unknown_model_lists_the_choices():
    with pytest.raises(
        ValueError, match="'vgg'.*cnn, cnn_small, cnn_fast, vit_scratch, resnet18, vit, deit, or timm/NAME"
    ):
        models.build_model("vgg", num_classes=10, image_size=32)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="image size 30 is not a multiple of patch size 4"):
        SimpleViT(image_size=30)
    with pytest.raises(ValueError, match="dim 130 is not a multiple of num_heads 4"):
        SimpleViT(dim=130)
    with pytest.raises(ValueError, match="image size 4 is too small"):
        models.build_model("cnn", num_classes=10, image_size=4)
    with pytest.raises(ValueError, match="--patch-size is for vit_scratch"):
        models.model_arguments(
            "cnn", recipes.get_recipe("cnn", 32), image_size=32, patch_size=4, head_dropout=None
        )
    with pytest.raises(ValueError, match="vit cannot take image size 8"):
        models.build_model("vit", num_classes=10, image_size=8)
    with pytest.raises(UserError, match="gemma4_vit_167m_enc cannot be built as a classifier"):
        models.build_empty_model(
            1000, {"name": "timm/gemma4_vit_167m_enc", "num_classes": 10, "image_size": 224}
        )


def test_both_heads_of_a_distilled_model_are_known():
    with torch.device("meta"):
        keys = head_keys(timm.create_model("levit_384_s8"))
    assert [key for key in keys if key.endswith("weight")] == [
        "head.linear.weight",
        "head_dist.linear.weight",
    ]


@pytest.mark.parametrize("shape", [(1000, 1001), (7, 3, 11)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_its_share_scales_the_rest_and_lets_gradients_through_the_same_ones(shape, dtype):
    torch.manual_seed(0)
    dropout, x = Dropout(0.1), torch.ones(shape, dtype=dtype, requires_grad=True)
    out, other = dropout(x), dropout(x)
    out.sum().backward()
    assert torch.equal(x.grad, out)
    assert not torch.equal(out, other)
    torch.testing.assert_close(
        out.unique(),
        torch.tensor([0, 1 / 0.9], dtype=dtype),
        rtol=1e-2 if dtype == torch.bfloat16 else 1e-4,
        atol=0,
    )
    if out.numel() > 1000:
        n, dropped = out.numel(), out == 0
        assert abs(float(dropped.float().mean()) - 0.1) < 5 * (0.09 / n) ** 0.5
        for step in (1, 2, 3, 4, 1001):  # neighbours, those of one draw of 64 bits, those below
            both = (dropped.flatten()[step:] & dropped.flatten()[:-step]).float().mean()
            assert abs(float(both) - 0.01) < 5 * (0.0099 / n) ** 0.5
    torch.manual_seed(0)
    assert torch.equal(Dropout(0.1)(x), out)
    assert Dropout(0.1).eval()(x) is x and torch.equal(Dropout(0.0)(x), x) and not Dropout(1.0)(x).any()


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("pre_norm", [False, True])
def test_a_block_is_pytorchs_encoder_layer(pre_norm, activation):
    torch.manual_seed(0)
    ours = Block(
        dim=32,
        num_heads=4,
        mlp_dim=64,
        activation=activation,
        pre_norm=pre_norm,
        attention_dropout=0.0,
        dropout=0.0,
    )
    theirs = nn.TransformerEncoderLayer(
        32, 4, 64, dropout=0.0, activation=activation, batch_first=True, norm_first=pre_norm
    )
    theirs.self_attn.in_proj_weight.data = ours.attention.qkv.weight.data
    theirs.self_attn.in_proj_bias.data = ours.attention.qkv.bias.data
    theirs.self_attn.out_proj.load_state_dict(ours.attention.proj.state_dict())
    for mine, other in (
        (ours.mlp[0], theirs.linear1),
        (ours.mlp[3], theirs.linear2),
        (ours.norm1, theirs.norm1),
        (ours.norm2, theirs.norm2),
    ):
        nn.init.normal_(mine.weight, std=0.3)
        other.load_state_dict(mine.state_dict())
    x = torch.randn(3, 11, 32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_vit_scratch_attends_over_tokens_and_not_over_the_batch():
    torch.manual_seed(0)
    model = build("vit_scratch", 224).eval()
    for block in model.blocks:  # as large as after some training
        block.attention.qkv.weight.data *= 5
        block.attention.proj.weight.data *= 5
    images = torch.randn(3, 3, 224, 224)
    with torch.no_grad():
        together, alone = model(images), torch.cat([model(image[None]) for image in images])
        images[0, :, -16:, -16:] += 3  # the last patch alone
        changed = model(images)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert (changed[0] - together[0]).abs().max() > 1e-3
    torch.testing.assert_close(changed[1:], together[1:], rtol=1e-4, atol=1e-5)


def test_class_token_and_positions_are_standard_normal():
    torch.manual_seed(0)
    model = SimpleViT()
    assert abs(model.positions.std() - 1) < 0.05
    assert model.positions.shape == (1, 65, 128)
    assert abs(model.class_token.std() - 1) < 0.2


def test_cnn_weights_are_kaimings_for_relu():
    torch.manual_seed(0)
    model = build("cnn", 32)
    for layer in (model.features[4], model.classifier[1]):
        fan_in = layer.weight[0].numel()
        assert abs(layer.weight.std() * (fan_in / 2) ** 0.5 - 1) < 0.02
        assert not layer.bias.any()


def test_the_probe_trains_its_head_and_nothing_else():
    torch.manual_seed(0)
    probe = ViTLinearProbe(image_size=32, head_dropout=0.1).train()
    assert probe.training
    assert probe.dropout.training
    assert not any(module.training for module in probe.backbone.modules())
    optimizer = build_optimizer("sgd", probe, lr=0.1, weight_decay=1e-4)
    assert [p.shape for g in optimizer.param_groups for p in g["params"]] == [(10, 192), (10,)]
    before = {k: v.clone() for k, v in probe.state_dict().items()}
    nn.functional.cross_entropy(probe(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
    assert all(p.grad is None for p in probe.backbone.parameters())
    optimizer.step()
    changed = {k for k, v in probe.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"head.weight", "head.bias"}


def timm_file(tmp_path, name, **kwargs):
    torch.manual_seed(1)
    model = timm.create_model(name, pretrained=False, **kwargs).eval()
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    return model, path


@pytest.mark.parametrize(
    "name, timm_name",
    [("vit", "vit_tiny_patch16_224"), ("deit", "deit_tiny_patch16_224"), ("resnet18", "resnet18")],
)
def test_a_timm_file_with_an_imagenet_head_gives_timms_features(tmp_path, name, timm_name):
    reference, path = timm_file(tmp_path, timm_name)
    model = models.build_model(name, num_classes=7, image_size=224, weights=path).eval()
    backbone = getattr(model, "backbone", model)
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(
            backbone.forward_features(x), reference.forward_features(x), rtol=1e-4, atol=1e-5
        )  # layouts round
        assert model(x).shape == (2, 7)


def test_position_embeddings_fit_another_image_size(tmp_path):
    reference, path = timm_file(tmp_path, "vit_tiny_patch16_224")
    for name in ("vit", "deit"):
        model = models.build_model(name, num_classes=10, image_size=96, weights=path)
        backbone = getattr(model, "backbone", model)
        assert backbone.pos_embed.shape == (1, 37, 192)
        expected = timm.layers.resample_abs_pos_embed(
            reference.pos_embed, new_size=[6, 6], num_prefix_tokens=1
        )
        torch.testing.assert_close(backbone.pos_embed, expected)


def test_our_own_weights_load_whole_or_with_a_new_head(tmp_path):
    path = tmp_path / "w.safetensors"
    torch.manual_seed(0)
    for name in ("cnn", "vit"):
        original = models.build_model(name, num_classes=10, image_size=32)
        safetensors.torch.save_file(
            {key: value.contiguous() for key, value in original.state_dict().items()}, path
        )
        same = models.build_model(name, num_classes=10, image_size=32, weights=path).state_dict()
        assert all(torch.equal(value, same[key]) for key, value in original.state_dict().items())
        other = models.build_model(name, num_classes=3, image_size=32, weights=path).state_dict()
        differing = {key for key, value in original.state_dict().items() if other[key].shape != value.shape}
        assert differing == (
            {"classifier.4.weight", "classifier.4.bias"} if name == "cnn" else {"head.weight", "head.bias"}
        )
        assert all(
            torch.equal(value, other[key])
            for key, value in original.state_dict().items()
            if key not in differing
        )


def test_a_distilled_model_has_two_heads(tmp_path):
    reference, path = timm_file(tmp_path, "deit_tiny_distilled_patch16_224")
    model = models.build_model(
        "timm/deit_tiny_distilled_patch16_224", num_classes=3, image_size=224, weights=path
    )
    assert torch.equal(model.blocks[0].mlp.fc1.weight, reference.blocks[0].mlp.fc1.weight)
    assert model.head.weight.shape == model.head_dist.weight.shape == (3, 192)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    _, path = timm_file(tmp_path, "resnet18")
    with pytest.raises(ValueError, match="does not fit the model: it lacks"):
        models.build_model("deit", num_classes=10, image_size=224, weights=path)
    with pytest.raises(ValueError, match="is not a file"):
        models.build_model("deit", num_classes=10, image_size=224, weights=tmp_path / "absent.safetensors")
    pickle = tmp_path / "weights.pth"
    torch.save({"x": torch.zeros(1)}, pickle)
    with pytest.raises(ValueError, match="pickled checkpoints can run code"):
        models.build_model("deit", num_classes=10, image_size=224, weights=pickle)


def test_backbones_take_their_preprocessing_from_timm():
    recipe = recipes.get_recipe("deit", 224)
    deit = models.preprocessing("deit", recipe, 224)
    assert (deit.crop_fraction, deit.interpolation, deit.mean) == (0.9, "bicubic", (0.485, 0.456, 0.406))
    vit = models.preprocessing("vit", recipe, 224)
    assert (vit.crop_fraction, vit.interpolation, vit.mean) == (0.9, "bicubic", (0.5, 0.5, 0.5))
    resnet = models.preprocessing("resnet18", recipe, 224)
    assert (resnet.crop_fraction, resnet.interpolation, resnet.std) == (
        0.875,
        "bilinear",
        (0.229, 0.224, 0.225),
    )
    assert models.preprocessing("cnn_small", recipes.get_recipe("cnn_small", 32), 32).crop_fraction is None
    assert [models.default_image_size(n) for n in ("vit", "deit", "resnet18", "cnn")] == [224, 224, 224, None]


def test_the_reference_recipes_are_the_notebooks():
    def brief(name, size):
        r = recipes.get_recipe(name, size, "reference")
        return r.optimizer, r.lr, r.weight_decay, r.schedule, r.epochs, r.batch_size, r.augment

    assert brief("cnn", 224) == brief("cnn", 32) == ("adam", 1e-3, 1e-4, "cosine", 20, 32, "light")
    assert brief("vit", 224) == ("sgd", 0.01, 1e-4, "cosine", 20, 32, "light")
    assert (
        brief("cnn_small", 32) == brief("vit_scratch", 32) == ("adam", 1e-3, 0.0, "constant", 10, 64, "none")
    )
    assert (
        brief("cnn_small", 224)
        == brief("vit_scratch", 224)
        == ("adam", 1e-3, 0.0, "constant", 5, 64, "randaugment")
    )
    assert brief("resnet18", 224) == ("adam", 1e-3, 0.0, "constant", 3, 64, "none")
    assert brief("deit", 224) == ("adamw", 3e-4, 0.01, "constant", 3, 64, "none")


def test_tuned_recipes_keep_the_epochs_and_the_parameters_of_the_reference():
    for name in models.MODELS:
        for size in (32, 96, 224):
            tuned = recipes.get_recipe(name, size, "tuned")
            reference = recipes.get_recipe(name, size, "reference")
            assert tuned.epochs == reference.epochs
            assert tuned.feature_views == (4 if name == "vit" else 0)
            if name in ("cnn", "vit_scratch") or (name == "cnn_small" and size < 128):
                assert (tuned.optimizer, tuned.schedule, tuned.augment) == ("muon", "cosine", "crop")
            else:
                assert dataclasses.replace(tuned, feature_views=0) == reference
    for name, size in (("cnn", 32), ("cnn_small", 32), ("vit_scratch", 32), ("vit_scratch", 224)):
        counts = [models.count_parameters(build(name, size, recipe))[0] for recipe in ("tuned", "reference")]
        assert counts[0] <= counts[1]


def test_a_backbone_with_random_weights_has_a_tuned_recipe_of_its_own():
    for name in ("resnet18", "deit", "timm/resnet10t"):
        scratch = recipes.get_recipe(name, 128, random_weights=True)
        assert (scratch.optimizer, scratch.lr, scratch.min_steps) == ("adamw", 1e-3, 1000)
        reference = recipes.get_recipe(name, 128, "reference")
        assert recipes.get_recipe(name, 128, "reference", random_weights=True) == reference
        assert recipes.get_recipe(name, 128) == reference
    for name in ("vit", "cnn"):
        assert recipes.get_recipe(name, 128, random_weights=True) == recipes.get_recipe(name, 128)


def test_mean_pooling_and_small_embeddings():
    torch.manual_seed(0)
    vit = SimpleViT(pre_norm=True, mean_pooling=True, embedding_std=0.02).eval()
    assert vit.class_token is None and vit.positions.shape == (1, 64, 128)
    assert 0.018 < float(vit.positions.detach().std()) < 0.022
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        vit.positions.zero_()  # without positions the mean does not know the order of the patches
        halves = torch.cat([x[..., 16:, :], x[..., :16, :]], dim=2)  # the upper half below the lower one
        torch.testing.assert_close(vit(x), vit(halves), atol=1e-5, rtol=1e-4)
        tokens = vit.blocks(vit.patch_embed(x).flatten(2).transpose(1, 2))
        assert torch.equal(vit(x), vit.head(vit.norm(tokens).mean(dim=1)))
