"""One training step, and predictions. accelerate controls precision and gradient synchronisation."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn
from torch.nn import functional as F

from modeling import metrics, randomness
from modeling.data.augment import augment, mix
from modeling.data.batches import Batch
from modeling.data.images import Images
from modeling.data.resize import Preprocessing, preprocess
from modeling.errors import UserError

NOT_FINITE_HELP = "use a lower --lr, --warmup-epochs 1 or --clip-grad 1"


@dataclass(frozen=True)
class StepSettings:
    """What a training step does besides calling the model. 0 turns a number off."""

    preprocessing: Preprocessing
    augment: str = "none"
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    clip_grad: float = 0.0
    seed: int = 42

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0


def train_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[Batch],
    *,
    epoch: int,
    step: int,
    lr: float,
    num_images: int,
    step_settings: StepSettings,
    begin_phase: Callable[[str], None] = lambda phase: None,
) -> torch.Tensor:
    """Make one update from this process's micro-batches of a global batch of `num_images` images.

    Losses are summed, then divided by `num_images`. So every image has the same weight, also in a short
    batch, with accumulation, and on several processes. Returns (3,) float64 on the device: the sum of this
    process's losses, its number of correct images, and the norm of the whole gradient before it is clipped.
    The gradients stay until the next step, for the logs. begin_phase is called with "data", "forward",
    "backward" or "optimizer" where that part of the step begins.
    """
    # Dropout draws from torch's generator. Each step seeds it anew, so its state never has to be saved.
    torch.manual_seed(
        randomness.seed(step_settings.seed, randomness.DROPOUT, step, accelerator.process_index)
    )
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    totals = torch.zeros(2, dtype=torch.float64, device=accelerator.device)

    for number, batch in enumerate(micro_batches):
        begin_phase("data")
        batch = batch.to(accelerator.device)
        if batch.features is not None:  # a linear probe: its frozen backbone ran before
            x, targets = batch.features, [(1.0, batch.labels)]
        else:
            x, targets = make_inputs(batch, epoch=epoch, step=step, step_settings=step_settings)

        # Micro-batches add their gradients up locally. After the last one the processes exchange the sums.
        is_last = number == len(micro_batches) - 1
        with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
            begin_phase("forward")
            logits = forward(model, x)  # (B, num_classes)
            # (B,); with mixup or CutMix each image has two labels with weights
            losses = sum(
                weight
                * F.cross_entropy(
                    logits, labels, reduction="none", label_smoothing=step_settings.label_smoothing
                )
                for weight, labels in targets
            )
            loss_sum = (losses * batch.weights).sum()
            begin_phase("backward")
            # DDP averages the gradients of the processes. Their number turns the mean into a sum.
            accelerator.backward(loss_sum * (accelerator.num_processes / num_images))

        main_labels = max(targets, key=lambda target: target[0])[1]
        correct = ((logits.argmax(dim=1) == main_labels) * batch.weights).sum()
        totals += torch.stack([loss_sum.detach(), correct])

    begin_phase("optimizer")
    if step_settings.clip_grad:
        norm = accelerator.clip_grad_norm_(model.parameters(), step_settings.clip_grad)
    else:
        norm = gradient_norm(accelerator, model)
    optimizer.step()
    return torch.cat([totals, norm.double()[None]])


def gradient_norm(accelerator: Accelerator, model: nn.Module) -> torch.Tensor:
    """The norm of the whole gradient, on the device. In fp16 it is divided by the scale of the loss."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if accelerator.scaler is None:
        return norm
    return norm / accelerator.scaler.scale(torch.ones_like(norm))


def forward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return the logits (B, num_classes). UserError: batch normalisation has one value per channel."""
    try:
        return model(x)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            f"batch normalisation cannot train on {len(x)} image of {x.shape[-1]} px: "
            "use another --batch-size (no micro-batch may have one image) or a larger --image-size"
        ) from error


def make_inputs(
    batch: Batch, *, epoch: int, step: int, step_settings: StepSettings
) -> tuple[torch.Tensor, list[tuple[float, torch.Tensor]]]:
    """Augment, normalise and mix a batch.

    Returns the model's input (B, 3, S, S) float32, and a list of (weight, labels (B,)). The list has two
    entries with mixup or CutMix, otherwise one.
    """
    x = augment(
        batch.images,
        batch.sizes,
        step_settings.preprocessing,
        name=step_settings.augment,
        seed=step_settings.seed,
        epoch=epoch,
        indices=batch.indices,
    )
    if batch.own is None:
        return x, [(1.0, batch.labels)]
    x, weight = mix(
        x,
        batch.own,
        batch.partner,
        mixup=step_settings.mixup,
        cutmix=step_settings.cutmix,
        keys=(step_settings.seed, randomness.MIX, step),
    )
    return x, [(weight, batch.labels[batch.own]), (1 - weight, batch.labels[batch.partner])]


class NonFiniteGuard:
    """Notes the first step whose loss was not finite. The note stays on the device, so no step waits."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.first_bad_step = torch.tensor(-1, device=accelerator.device)

    def watch(self, step: int, loss_sum: torch.Tensor) -> None:
        is_first = (self.first_bad_step < 0) & ~loss_sum.isfinite()
        self.first_bad_step = torch.where(is_first, step, self.first_bad_step)

    def check(self) -> None:
        """All processes call this. FloatingPointError on all: one of them had a loss that was not finite."""
        step = int(self.accelerator.gather(self.first_bad_step[None]).max())
        if step >= 0:
            raise FloatingPointError(f"the loss was not finite at step {step}: {NOT_FINITE_HELP}")


def fix_ddp_bucket_order(accelerator: Accelerator, model: nn.Module, image_size: int) -> None:
    """Make DDP choose the order of its gradient buckets now.

    By default DDP reorders the buckets after the first step. A resumed run would reorder them at another
    step, add gradients in another order, and differ in the last bits.
    """
    if accelerator.num_processes > 1:
        model.eval()
        for _ in range(2):
            x = torch.zeros(1, 3, image_size, image_size, device=accelerator.device)
            model(x).sum().backward()
        model.zero_grad(set_to_none=True)


@dataclass
class Predictions:
    """A model's answers for N images, on the CPU.

    rows (N,) int64: each image's row in its split. labels and predicted (N,) int64: class numbers.
    logits and probabilities (N, C) float32. losses (N,) float32, in nats.
    """

    rows: torch.Tensor
    labels: torch.Tensor
    predicted: torch.Tensor
    logits: torch.Tensor
    losses: torch.Tensor

    @property
    def probabilities(self) -> torch.Tensor:
        return self.logits.softmax(dim=1)

    @property
    def log_probabilities(self) -> torch.Tensor:
        return self.logits.log_softmax(dim=1)


@torch.no_grad()
def predict(
    model: nn.Module,
    images: Images,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    accelerator: Accelerator | None = None,
    progress: Callable[[int], None] | None = None,
    features: torch.Tensor | None = None,
) -> Predictions:
    """Run the model in eval mode over all images, then restore its former mode.

    The batches are the same as on one process. Process r of P takes batches r, r + P, r + 2 P, and so on.
    Every process returns the predictions of all images, in order. features (N, D): if given, the model takes
    these instead of pixels. progress(n) is called equally often on every process; n counts the images that
    all processes did in one turn. The model must not be wrapped by DDP: its processes would wait for each
    other, and some have one batch fewer.
    """
    device = accelerator.device if accelerator else next(model.parameters()).device
    rank, world_size = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    was_training = model.training
    model.eval()
    if world_size > 1:
        # Batch normalisation saw other images on each process: take the main process's running averages.
        for buffer in model.buffers():
            buffer.copy_(broadcast(buffer.clone()))

    batches = torch.arange(len(images)).split(batch_size)
    logits: list[torch.Tensor] = []
    positions: list[torch.Tensor] = []
    for start in range(0, len(batches), world_size):
        turn = batches[start : start + world_size]
        if rank < len(turn):
            if features is not None:
                x = features[turn[rank]].to(device)
            else:
                pixels, sizes = images.gather(turn[rank])
                x = preprocess(pixels.to(device), sizes, preprocessing)
            logits.append(model(x).float())
            positions.append(turn[rank].to(device))
        if progress:
            progress(sum(len(batch) for batch in turn))
    model.train(was_training)

    all_logits = _gather_in_order(accelerator, logits, positions, len(images), len(images.classes)).cpu()
    return Predictions(
        rows=images.rows,
        labels=images.labels,
        predicted=all_logits.argmax(dim=1),
        logits=all_logits,
        losses=F.cross_entropy(all_logits, images.labels, reduction="none"),
    )


def _gather_in_order(
    accelerator: Accelerator | None,
    logits: list[torch.Tensor],
    positions: list[torch.Tensor],
    num_images: int,
    num_classes: int,
) -> torch.Tensor:
    """Return the logits (N, C) of all processes, in the order of the images.

    A gather needs equally many rows on each process. Missing rows are filled in with position -1, then
    dropped.
    """
    if accelerator is None or accelerator.num_processes == 1:
        return torch.cat(logits)
    device = accelerator.device
    own_logits = torch.cat([torch.zeros(0, num_classes, device=device), *logits])
    own_positions = torch.cat([torch.zeros(0, dtype=torch.int64, device=device), *positions])
    most_rows = int(accelerator.gather(torch.tensor([len(own_positions)], device=device)).max())
    num_missing = most_rows - len(own_positions)
    own_logits = F.pad(own_logits, (0, 0, 0, num_missing))
    own_positions = F.pad(own_positions, (0, num_missing), value=-1)
    all_logits, all_positions = accelerator.gather((own_logits, own_positions))
    is_image = all_positions >= 0
    in_order = torch.zeros(num_images, num_classes, device=device)
    return in_order.index_copy_(0, all_positions[is_image], all_logits[is_image])


def check_finite(predictions: Predictions, split: str) -> None:
    """FloatingPointError, which names `split`, on every process: the loss of an image is not finite."""
    if not predictions.losses.isfinite().all():
        raise FloatingPointError(f"the {split} loss was not finite: {NOT_FINITE_HELP}")


def evaluate_model(
    model: nn.Module,
    images: Images,
    preprocessing: Preprocessing,
    *,
    batch_size: int = 64,
    accelerator: Accelerator | None = None,
    progress: Callable[[int], None] | None = None,
    features: torch.Tensor | None = None,
    split: str = "evaluation",
) -> dict[str, float]:
    """Return the metrics (metrics.NAMES) of a model on images. For the other arguments see predict.

    FloatingPointError: see check_finite.
    """
    predictions = predict(
        model,
        images,
        preprocessing,
        batch_size=batch_size,
        accelerator=accelerator,
        progress=progress,
        features=features,
    )
    check_finite(predictions, split)
    return metrics.compute(predictions)
