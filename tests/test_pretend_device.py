"""The code for a GPU runs on a pretend device: no tensors of two devices meet, and no step waits for it."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from pretend_device import DEVICE, PretendDevice, PretendTensor
from torch import nn

from modeling import models
from modeling.data.batches import training_steps
from modeling.data.images import Images
from modeling.data.resize import Preprocessing
from modeling.engine import NonFiniteGuard, StepSettings, evaluate_model, predict, train_step
from modeling.features import ProbeFeatures
from modeling.optim import Ema
from modeling.run.state import RunState, States

PREPROCESSING = Preprocessing(32, (0.5,) * 3, (0.5,) * 3)


class Pretend(SimpleNamespace):
    """An accelerator of one process on a device."""

    process_index, num_processes, is_main_process, scaler, mixed_precision = 0, 1, True, None, "no"
    clip_grad_norm_ = staticmethod(nn.utils.clip_grad_norm_)

    def backward(self, loss):
        loss.backward()

    def no_sync(self, _):
        return contextlib.nullcontext()

    def gather(self, tensors):
        return tensors

    def wait_for_everyone(self):
        pass

    def autocast(self):
        return contextlib.nullcontext()


# torch warns that a copy to its own device "meta" has no effect. It has one here.
pytestmark = pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter")
GPU, CPU = Pretend(device=DEVICE), Pretend(device=torch.device("cpu"))


def images(n=24, side=32) -> Images:
    rows = torch.arange(n)
    pixels = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.manual_seed(1))
    return Images(pixels, rows, torch.full((n, 2), side), rows % 10, rows, list("abcdefghij"))


def build(name: str, accelerator) -> nn.Module:
    """A model with its first weights. Without dropout, which is another function on a CPU."""
    torch.manual_seed(0)
    args = {"depth": 2, "dropout": 0.0, "attention_dropout": 0.0} if name == "vit_scratch" else {}
    return models.build_model(name, num_classes=10, image_size=32, **args).to(accelerator.device)


def train(
    accelerator, model, optimizer, *, ema=None, augment="none", mixup=0.2, device=None, first=0, steps=2
):
    """Train some steps. Return the sums of each step, on the CPU."""
    settings = StepSettings(
        PREPROCESSING, augment=augment, mixup=0.2, cutmix=0.2, clip_grad=1.0, label_smoothing=0.1
    )
    batches = list(training_steps(images(), seed=0, epoch=0, batch_size=8, accumulation=2, mix=True))
    guard, totals = NonFiniteGuard(accelerator), []
    for step in range(first, first + steps):
        where = dict(epoch=0, step=step, lr=0.01, num_images=8)
        totals.append(
            train_step(accelerator, model, optimizer, batches[step], **where, step_settings=settings)
        )
        guard.watch(step, totals[-1][0])
        if ema:
            ema.update(model)
    if device:
        assert device.waits == [], "a step waits for the device"
    guard.check()
    return torch.stack([step_totals.cpu() for step_totals in totals])


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([value.detach().cpu().double().flatten() for value in model.state_dict().values()])


def test_the_device_refuses_what_a_gpu_refuses_and_sees_who_waits():
    with PretendDevice() as device:
        x = torch.arange(4.0).to(DEVICE)
        assert isinstance(x, PretendTensor)
        assert torch.tensor([1, 2], device=DEVICE).cpu().tolist() == [1, 2]
        with pytest.raises(RuntimeError, match="mixes"):
            x + torch.ones(4)
        y = (x * 2 + torch.tensor(1.0)).view(2, 2)
        y[0, 0] += 5
        assert device.waits == ["aten._to_copy"]
        assert y.cpu().tolist() == [[6, 3], [5, 7]]
        for wait in (
            lambda: x.sum().item(),
            lambda: bool(x.sum() > 1),
            lambda: x.nonzero(),
            lambda: x[x > 1],
        ):
            count = len(device.waits)
            wait()
            assert len(device.waits) > count
    with pytest.raises(AssertionError, match="outside"):
        x + x


@pytest.mark.parametrize(
    "name, augment",
    [
        ("cnn", "none"),
        ("cnn_small", "light"),
        ("cnn_small", "standard"),
        ("cnn_small", "randaugment"),
        ("vit_scratch", "none"),
    ],
)
def test_steps_on_the_device_never_wait_and_compute_what_the_cpu_computes(name, augment):
    results = []
    for accelerator in (CPU, GPU):
        with PretendDevice() as device:
            model = build(name, accelerator)
            optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
            ema = Ema(model, 0.9)
            device.waits.clear()
            totals = train(accelerator, model, optimizer, ema=ema, augment=augment, device=device)
            with ema.swapped_in(model):
                scores = evaluate_model(model, images(), PREPROCESSING, batch_size=7, accelerator=accelerator)
            results.append((totals, weights(model), scores))
    (totals, ours, scores), (gpu_totals, theirs, gpu_scores) = results
    assert torch.allclose(totals, gpu_totals)
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert scores == pytest.approx(gpu_scores, abs=1e-5)


def test_predictions_wait_once_at_their_end():
    with PretendDevice() as device:
        model = build("cnn_small", GPU)
        device.waits.clear()
        predictions = predict(model, images(), PREPROCESSING, batch_size=5, accelerator=GPU)
        assert device.waits == ["aten._to_copy"]
        assert type(predictions.logits) is torch.Tensor


def test_a_state_of_the_device_is_saved_and_resumed_on_it(tmp_path):
    def parts():
        model = build("cnn_small", GPU)
        optimizer = torch.optim.Adam(model.parameters())
        ema = Ema(model, 0.9)
        states = States(
            tmp_path,
            accelerator=GPU,
            model=model,
            optimizer=optimizer,
            ema=ema,
            arguments={"optimizer": "x", "momentum": 0.9},
            versions={},
        )
        return model, optimizer, ema, states

    with PretendDevice():
        model, optimizer, ema, states = parts()
        train(GPU, model, optimizer, ema=ema, steps=1)
        states.save(RunState(step=1), torch.zeros(2, dtype=torch.float64, device=DEVICE))
        train(GPU, model, optimizer, ema=ema, first=1)
        again, optimizer, again_ema, states = parts()
        run_state, totals = states.restore(force=False)
        assert run_state.step == 1 and isinstance(totals, PretendTensor)
        train(GPU, again, optimizer, ema=again_ema, first=1)
        assert torch.equal(weights(again), weights(model))
        for key, value in ema.average.items():
            assert torch.equal(again_ema.average[key].cpu(), value.cpu())


def test_kept_features_of_the_device_are_those_of_the_cpu(tmp_path, monkeypatch):
    """Over two epochs and validation, and in the steps that take them."""
    kept = []
    for accelerator in (CPU, GPU):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / str(accelerator.device))
        monkeypatch.setattr("modeling.features._environment", lambda _: [])
        with PretendDevice() as device:
            torch.manual_seed(0)
            probe = models.build_model("vit", num_classes=10, image_size=32).to(accelerator.device)
            splits = {"train": images(20), "validation": images(9)}
            options = dict(augment_name="standard", seed=0, batch_size=8, accumulation=1, num_views=0)
            features = ProbeFeatures(accelerator, probe, splits, PREPROCESSING, **options, mixes=False)
            views = [features.of_epoch(epoch, lambda: None) for epoch in range(2)]
            kept.append([*views, features.of_split("validation", 4)])
            optimizer = torch.optim.SGD(probe.head.parameters())
            batches = next(training_steps(splits["train"], seed=0, epoch=0, batch_size=8, features=views[0]))
            device.waits.clear()
            where = dict(epoch=0, step=0, lr=0.01, num_images=8, step_settings=StepSettings(PREPROCESSING))
            train_step(accelerator, probe, optimizer, batches, **where)
            assert device.waits == []
    for ours, theirs in zip(*kept, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
