"""The training step against the same arithmetic done plainly; predictions; the average of weights."""

import math

import accelerate
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from modeling import models, randomness
from modeling.data.augment import mix
from modeling.data.batches import Batch, training_steps
from modeling.data.images import decode
from modeling.data.resize import Preprocessing
from modeling.data.sources import load_source
from modeling.engine import StepSettings, evaluate_model, make_inputs, predict, train_step
from modeling.models.cnn import SimpleCNN
from modeling.models.vit import SimpleViT
from modeling.optim import Ema, build_optimizer

PREP = Preprocessing(image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.fixture(scope="module")
def accelerator():
    return accelerate.Accelerator(cpu=True)


@pytest.fixture(scope="module")
def images():
    return decode(load_source("digits"), "train", torch.arange(90), image_size=32, num_workers=1)


def small_cnn(**kwargs):
    torch.manual_seed(0)
    return SimpleCNN(
        channels=(8, 16),
        hidden=16,
        batch_norm=False,
        pool=None,
        kaiming=False,
        **{"head_dropout": 0.0, **kwargs},
    )


def run(
    accelerator,
    images,
    model,
    *,
    steps=None,
    step_settings=None,
    lr=0.05,
    batch_size=40,
    accumulation=1,
    optimizer="sgd",
    epochs=1,
):
    """Train and give the totals of each step."""
    step_settings = step_settings or StepSettings(PREP)
    prepared, optim = accelerator.prepare(model, build_optimizer(optimizer, model, lr=lr, weight_decay=0.0))
    prepared.train()
    totals, step = [], 0
    for epoch in range(epochs):
        batches = training_steps(
            images,
            seed=step_settings.seed,
            epoch=epoch,
            batch_size=batch_size,
            accumulation=accumulation,
            mix=step_settings.mixes,
        )
        for micro_batches in batches:
            n = min(batch_size, len(images) - batch_size * (step - epoch * -(-len(images) // batch_size)))
            kwargs = dict(epoch=epoch, step=step, lr=lr, num_images=n, step_settings=step_settings)
            totals.append(train_step(accelerator, prepared, optim, micro_batches, **kwargs)[:2])
            step += 1
            if step == steps:
                return torch.stack(totals)
    return torch.stack(totals)


def test_a_step_is_sgd_on_the_mean_loss(accelerator, images):
    ours, plain = small_cnn(), small_cnn()
    totals = run(accelerator, images, ours, steps=3, batch_size=40)  # the third batch has 10 images
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    order = randomness.permutation(90, 42, randomness.ORDER, 0)
    for positions, total in zip(order.split(40), totals, strict=True):
        x = (images.pixels[positions].float() / 255 - 0.5) / 0.5
        logits, labels = plain(x), images.labels[positions]
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert total[0].item() == pytest.approx(loss.item() * len(positions), rel=1e-4)
        assert total[1].item() == (logits.argmax(1) == labels).sum()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("accumulation", [2, 3, 7])
def test_accumulation_changes_nothing_not_even_in_a_short_last_batch(accelerator, images, accumulation):
    one, many = small_cnn(), small_cnn()
    step_settings = StepSettings(PREP, augment="light", mixup=0.4, cutmix=1.0, label_smoothing=0.1)
    a = run(accelerator, images, one, step_settings=step_settings, epochs=2)
    b = run(accelerator, images, many, step_settings=step_settings, epochs=2, accumulation=accumulation)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for p, q in zip(one.parameters(), many.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_an_image_of_weight_zero_has_no_part(accelerator, images):
    def gradients(batch):
        model = small_cnn()
        prepared, optimizer = accelerator.prepare(
            model, build_optimizer("sgd", model, lr=0.1, weight_decay=0.0)
        )
        totals = train_step(
            accelerator,
            prepared,
            optimizer,
            [batch],
            epoch=0,
            step=0,
            lr=0.1,
            num_images=4,
            step_settings=StepSettings(PREP),
        )
        return totals, [p.grad for p in model.parameters()]

    def batch(positions, weights):
        pixels, sizes = images.gather(positions)
        return Batch(pixels, sizes, images.labels[positions], images.rows[positions], torch.tensor(weights))

    totals, with_zero = gradients(batch(torch.arange(5), [1.0, 1.0, 1.0, 1.0, 0.0]))
    expected, without = gradients(batch(torch.arange(4), [1.0] * 4))
    torch.testing.assert_close(totals, expected)
    for a, b in zip(with_zero, without, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_dropout_is_a_function_of_seed_and_step(accelerator, images):
    def weights(seed, disturb):
        model = small_cnn(head_dropout=0.5)
        torch.manual_seed(disturb)  # what anything else drew must not matter
        run(accelerator, images, model, step_settings=StepSettings(PREP, seed=seed), steps=2)
        return torch.cat([p.flatten() for p in model.parameters()])

    assert torch.equal(weights(1, 10), weights(1, 20))
    assert not torch.equal(weights(1, 10), weights(2, 10))


def test_label_smoothing_and_mixing_are_the_soft_targets_of_their_papers(accelerator, images):
    step_settings = StepSettings(PREP, label_smoothing=0.2, mixup=0.8)
    batch = next(training_steps(images, seed=42, epoch=0, batch_size=16, mix=True))[0]
    x, targets = make_inputs(batch, epoch=0, step=5, step_settings=step_settings)
    weight = targets[0][0]
    assert 0 < weight < 1
    assert targets[1][0] == pytest.approx(1 - weight)
    plain = (batch.images.float() / 255 - 0.5) / 0.5
    torch.testing.assert_close(
        x, weight * plain[batch.own] + (1 - weight) * plain[batch.partner], rtol=1e-4, atol=1e-5
    )
    model = small_cnn()
    onehot = F.one_hot(batch.labels, 10).float()
    soft = weight * onehot[batch.own] + (1 - weight) * onehot[batch.partner]
    soft = soft * 0.8 + 0.2 / 10
    expected = -(soft * model(x).log_softmax(1)).sum().item()
    total = train_step(
        accelerator,
        *accelerator.prepare(model, build_optimizer("sgd", model, lr=0.1, weight_decay=0.0)),
        [batch],
        epoch=0,
        step=5,
        lr=0.1,
        num_images=16,
        step_settings=step_settings,
    )
    assert total[0].item() == pytest.approx(expected, rel=1e-4)


def test_mixup_and_cutmix_weights_have_their_beta_distribution():
    x = torch.stack([torch.zeros(3, 32, 32), torch.ones(3, 32, 32)])
    own, partner = torch.tensor([0]), torch.tensor([1])
    for mixup, cutmix in ((0.2, 0.0), (0.0, 1.0)):
        mixed = [mix(x, own, partner, mixup=mixup, cutmix=cutmix, keys=(1, 2, step)) for step in range(2000)]
        for image, weight in mixed[:200]:  # the label's weight is the share of pixels
            assert 1 - image.mean().item() == pytest.approx(weight, abs=1e-5)
        if mixup:
            weights = torch.tensor([weight for _, weight in mixed])
            assert weights.mean() == pytest.approx(0.5, abs=0.04)
            assert weights.var() == pytest.approx(0.25 / (2 * mixup + 1), abs=0.02)
    kinds = {
        len(mix(x, own, partner, mixup=0.2, cutmix=1.0, keys=(1, 2, step))[0].unique()) for step in range(50)
    }
    assert kinds >= {1, 2}  # both kinds are drawn: one value all over, or two in a box


def test_clipping_bounds_the_gradient(accelerator, images):
    norms = {}
    for clip in (0.0, 0.05):
        model = small_cnn()
        run(accelerator, images, model, steps=1, step_settings=StepSettings(PREP, clip_grad=clip))
        norms[clip] = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    assert norms[0.0] > 0.1
    assert norms[0.05] == pytest.approx(0.05, rel=1e-3)


def test_ema_is_the_recursion():
    model = nn.BatchNorm1d(3)
    ema = Ema(model, 0.7)
    expected = model.weight.detach().clone()
    for step in range(1, 20):
        with torch.no_grad():
            model.weight.uniform_()
            model.num_batches_tracked += 1
        ema.update(model)
        keep = min(0.7, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * model.weight.detach()
    torch.testing.assert_close(ema.average["weight"], expected)
    assert ema.average["num_batches_tracked"] == 19
    own = model.weight.detach().clone()
    with ema.swapped_in(model):
        torch.testing.assert_close(model.weight.detach(), expected)
    assert torch.equal(model.weight, own)


def test_predictions_do_not_depend_on_the_batch_size_and_leave_the_mode(images):
    torch.manual_seed(0)
    model = SimpleCNN(channels=(8, 16)).train()
    reference = predict(model, images, PREP, batch_size=90)
    assert model.training
    for batch_size in (1, 7, 89, 200):
        other = predict(model, images, PREP, batch_size=batch_size)
        torch.testing.assert_close(other.probabilities, reference.probabilities, rtol=1e-4, atol=1e-6)
        assert torch.equal(other.rows, images.rows)
    torch.testing.assert_close(reference.probabilities.sum(1), torch.ones(90))
    expected = -reference.probabilities[torch.arange(90), images.labels].log()
    torch.testing.assert_close(reference.losses, expected, rtol=1e-4, atol=1e-5)
    assert evaluate_model(model, images, PREP)["loss"] == pytest.approx(expected.mean().item(), rel=1e-4)


def test_bf16_is_autocast(images):
    def losses(precision):
        accelerate.state.AcceleratorState._reset_state(True)
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
        model = small_cnn()
        seen = []
        model.classifier[-1].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
        totals = run(accelerator, images, model, steps=3)
        assert all(p.dtype == torch.float32 for p in model.parameters())
        return totals, seen[0]

    (full, full_dtype), (half, half_dtype) = losses("no"), losses("bf16")
    accelerate.state.AcceleratorState._reset_state(True)
    assert (full_dtype, half_dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(half[:, 0], full[:, 0], rtol=0.02, atol=0.5)
    assert not torch.equal(half, full)


def test_the_seeded_loss_curve_is_golden(images):
    """A refactoring keeps these losses; a change that moves them on purpose says so and writes new ones."""
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(cpu=True)
    step_settings = StepSettings(PREP, augment="standard", mixup=0.2, label_smoothing=0.1)
    torch.manual_seed(7)
    model = SimpleViT(dim=32, depth=2, num_heads=2, mlp_dim=64)
    curve = (
        run(
            accelerator,
            images,
            model,
            step_settings=step_settings,
            optimizer="adamw",
            lr=1e-3,
            batch_size=30,
            epochs=2,
        )[:, 0]
        / 30
    )
    assert curve.tolist() == pytest.approx(GOLDEN, rel=1e-3)


GOLDEN = [2.54871, 2.54498, 2.65094, 2.51754, 2.46367, 2.46843]


class RecordingScaler(torch.amp.GradScaler):
    """torch's own scaler, on the CPU, that notes what is asked of it in which order."""

    def __init__(self, **kwargs):
        super().__init__(device="cpu", **kwargs)
        self.calls = []

    def scale(self, outputs):
        self.calls.append("scale")
        return super().scale(outputs)

    def unscale_(self, optimizer):
        self.calls.append("unscale")
        return super().unscale_(optimizer)

    def step(self, optimizer, *args, **kwargs):
        self.calls.append("step")
        return super().step(optimizer, *args, **kwargs)

    def update(self, *args):
        self.calls.append("update")
        return super().update(*args)


@pytest.fixture
def scaled(monkeypatch):
    """An accelerator that scales the loss as in fp16, though the CPU computes in fp32."""

    def make(init_scale):
        accelerator = accelerate.Accelerator(cpu=True)
        accelerator.scaler = RecordingScaler(init_scale=init_scale)
        accelerator.native_amp = True
        monkeypatch.setattr(accelerate.Accelerator, "mixed_precision", "fp16")
        return accelerator

    return make


def test_under_a_grad_scaler_gradients_are_clipped_unscaled_and_once_a_step(accelerator, images, scaled):
    step_settings = StepSettings(PREP, clip_grad=0.5)
    plain, ours = small_cnn(), small_cnn()
    expected = run(accelerator, images, plain, step_settings=step_settings, steps=2, accumulation=2)
    fp16 = scaled(1024.0)
    totals = run(fp16, images, ours, step_settings=step_settings, steps=2, accumulation=2)
    assert fp16.scaler.calls == ["scale", "scale", "unscale", "step", "update"] * 2
    # The losses that are logged and checked are not scaled.
    torch.testing.assert_close(totals, expected, rtol=1e-4, atol=1e-4)
    start, end, expected_end = (
        torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (small_cnn(), ours, plain)
    )
    assert (end - expected_end).norm() < 0.02 * (expected_end - start).norm()  # fp16 has 11 bits


def test_an_overflow_under_a_grad_scaler_skips_the_step_and_is_no_bad_loss(images, scaled):
    fp16, model = scaled(1e38), small_cnn()
    model.classifier[-1].weight.data *= 1e3  # gradients of this loss overflow at that scale
    before = [p.detach().clone() for p in model.parameters()]
    totals = run(fp16, images, model, steps=1)
    assert totals.isfinite().all(), "the loss was fine: only its scale was not, and the scaler lowers it"
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert fp16.scaler.get_scale() < 1e38
    run(fp16, images, model, steps=1)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_gradients_lie_in_memory_as_their_parameters(accelerator, images, accumulation):
    """Fused optimizers on a CPU take both as they lie, and would silently compute something else."""
    model = models.build_model("cnn", num_classes=10, image_size=32)
    run(accelerator, images, model, steps=1, accumulation=accumulation, optimizer="adam")
    assert any(not p.is_contiguous() for p in model.parameters())
    assert all(p.grad.stride() == p.stride() for p in model.parameters())


@pytest.mark.parametrize("clip_grad", [0.0, 0.1])
def test_the_step_gives_the_norm_of_the_gradient_before_it_is_clipped(accelerator, images, scaled, clip_grad):
    def norm(used) -> float:
        model = small_cnn()
        prepared, optimizer = used.prepare(model, build_optimizer("sgd", model, lr=0.1, weight_decay=0.0))
        totals = train_step(
            used,
            prepared,
            optimizer,
            next(training_steps(images, seed=1, epoch=0, batch_size=8)),
            epoch=0,
            step=0,
            lr=0.1,
            num_images=8,
            step_settings=StepSettings(PREP, clip_grad=clip_grad),
        )
        if not clip_grad and used is accelerator:
            gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
            assert totals[2].item() == pytest.approx(gradients.norm().item(), rel=1e-5)
        return totals[2].item()

    assert norm(accelerator) > 0.2  # so that clipping had an effect
    assert norm(scaled(2.0**10)) == pytest.approx(norm(accelerator), rel=1e-2)  # the loss is scaled, not this


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "muon"])
def test_a_first_step_that_fp16_skips_leaves_the_optimizer_as_new(images, scaled, name):
    """Two steps that overflow, then real ones: the weights are those of a run without the skipped steps."""

    def weights_after(num_skipped: int) -> torch.Tensor:
        fp16, model = scaled(2.0**10), small_cnn()
        optimizer = build_optimizer(name, model, lr=0.01, weight_decay=1e-3)
        model, optimizer = fp16.prepare(model, optimizer)
        batch_of_step = next(training_steps(images, seed=1, epoch=0, batch_size=8))
        for step in range(num_skipped + 3):
            before = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
            overflow = math.inf if step < num_skipped else 1.0
            hooks = [parameter.register_hook(lambda g, f=overflow: g * f) for parameter in model.parameters()]
            train_step(
                fp16,
                model,
                optimizer,
                batch_of_step,
                epoch=0,
                step=0,
                lr=0.01,
                num_images=8,
                step_settings=StepSettings(PREP),
            )
            after = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
            assert torch.equal(after, before) == (step < num_skipped)
            for hook in hooks:
                hook.remove()
        return after

    expected = weights_after(0)
    assert expected.isfinite().all()
    torch.testing.assert_close(weights_after(2), expected, rtol=1e-5, atol=1e-6)
