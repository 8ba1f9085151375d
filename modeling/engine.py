"""The numeric path: train_step and predict. accelerate owns precision and the synchronisation of gradients."""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn
from torch.nn import functional as F

from modeling import metrics, randomness
from modeling.data.augment import augment, mix
from modeling.data.batches import Batch, training_steps
from modeling.data.images import Images
from modeling.data.resize import Preprocessing, preprocess
from modeling.errors import UserError
from modeling.features import FeatureCache


@dataclass(frozen=True)
class StepSettings:
    """What a step does to a batch besides the model: augmentation, mixing, label smoothing, clipping (0 turns each off), the seed."""

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
    objective: StepSettings,
    cache: FeatureCache | None = None,
) -> torch.Tensor:
    """One update from this process's micro-batches of a global batch of `num_images`.

    Losses are summed and divided by the images of the global batch, so that neither a short batch, nor accumulation, nor the
    number of processes changes an image's weight. With a cache the model takes features from it. Gives (2,) float64 on the
    device: the sum of this process's losses, and how many it had right. Gradients stay in place until the next step.
    """
    torch.manual_seed(randomness.seed(objective.seed, randomness.DROPOUT, step, accelerator.process_index))
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    totals = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for number, batch in enumerate(micro_batches):
        weights, batch = batch.weights, batch.to(accelerator.device)
        last = number == len(micro_batches) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            if cache:
                view = cache.view(epoch)
                make_input = functools.partial(augmented, batch, epoch=view, objective=objective)
                x = cache.get(f"view_{view}", batch.indices, weights, make_input)
                targets = [(1.0, batch.labels)]
            else:
                x, targets = make_inputs(batch, epoch=epoch, step=step, objective=objective)
            logits = forward(model, x)
            losses = sum(
                weight
                * F.cross_entropy(logits, labels, reduction="none", label_smoothing=objective.label_smoothing)
                for weight, labels in targets
            )
            loss_sum = (losses * batch.weights).sum()
            accelerator.backward(
                loss_sum * (accelerator.num_processes / num_images)
            )  # DDP averages over processes
        labels = max(targets, key=lambda target: target[0])[1]
        correct = ((logits.argmax(dim=1) == labels) * batch.weights).sum()
        totals += torch.stack([loss_sum.detach(), correct])
    if objective.clip_grad:
        accelerator.clip_grad_norm_(model.parameters(), objective.clip_grad)
    optimizer.step()
    return totals


def complete_view(
    accelerator: Accelerator,
    cache: FeatureCache,
    images: Images,
    epoch: int,
    objective: StepSettings,
    *,
    batch_size: int,
    accumulation: int,
) -> bool:
    """Whether the cache has every feature of the view that an epoch sees.

    A view is computed in the batches of the epoch of its number, as that comes by. Where a later epoch misses some, for the cache was
    lost, they are computed here in those batches: this process's own first, then what other machines keep elsewhere.
    """
    view, ranks = cache.view(epoch), accelerator.num_processes
    complete = cache.is_complete(f"view_{view}")
    for turn in range(ranks if epoch > view and not complete else 0):
        share = dict(
            rank=(accelerator.process_index + turn) % ranks, world_size=ranks, accumulation=accumulation
        )
        for micro_batches in training_steps(
            images, seed=objective.seed, epoch=view, batch_size=batch_size, **share
        ):
            for batch in micro_batches:
                make_input = functools.partial(
                    augmented, batch.to(accelerator.device), epoch=view, objective=objective
                )
                cache.get(f"view_{view}", batch.indices, batch.weights, make_input)
        complete = True
    return complete


def forward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The model's logits. UserError: a batch normalisation that is left with one number a channel."""
    try:
        return model(x)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            f"batch normalisation cannot train on {len(x)} image of {x.shape[-1]} px: use another --batch-size, so that no batch or "
            "micro-batch has one image, or a larger --image-size"
        ) from error


def augmented(batch: Batch, *, epoch: int, objective: StepSettings) -> torch.Tensor:
    """The images of a batch as training sees them: (U, 3, S, S) float32."""
    how = dict(name=objective.augment, seed=objective.seed, epoch=epoch, indices=batch.indices)
    return augment(batch.images, batch.sizes, objective.preprocessing, **how)


def make_inputs(
    batch: Batch, *, epoch: int, step: int, objective: StepSettings
) -> tuple[torch.Tensor, list[tuple[float, torch.Tensor]]]:
    """The model's input (B, 3, S, S) float32, and the labels (B,) with their weights: one, or two where the batch mixes."""
    x = augmented(batch, epoch=epoch, objective=objective)
    if batch.own is None:
        return x, [(1.0, batch.labels)]
    keys = (objective.seed, randomness.MIX, step)
    x, weight = mix(x, batch.own, batch.partner, mixup=objective.mixup, cutmix=objective.cutmix, keys=keys)
    return x, [(weight, batch.labels[batch.own]), (1 - weight, batch.labels[batch.partner])]


@dataclass
class Predictions:
    """What a model says of N images: rows, labels and predicted (N,) int64, probabilities (N, C) and losses (N,) float32, on the CPU."""

    rows: torch.Tensor
    labels: torch.Tensor
    predicted: torch.Tensor
    probabilities: torch.Tensor
    losses: torch.Tensor


def fix_ddp_bucket_order(accelerator: Accelerator, model: nn.Module, image_size: int) -> None:
    """Let DDP order its buckets now, and not after the first step: a run resumed there would add up in another order."""
    if accelerator.num_processes > 1:
        model.eval()
        for _ in range(2):
            model(torch.zeros(1, 3, image_size, image_size, device=accelerator.device)).sum().backward()
        model.zero_grad(set_to_none=True)


@torch.no_grad()
def predict(
    model: nn.Module,
    images: Images,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    accelerator: Accelerator | None = None,
    progress: Callable[[int], None] | None = None,
    cache: FeatureCache | None = None,
) -> Predictions:
    """Run the model in eval mode over all images, and leave it in the mode it was in.

    Processes take turns with the batches that one process would make; every one gets the predictions of all images, in order.
    progress(n) is called equally often on each, with the images that all have done. The model is not a DDP one, whose processes
    would wait for each other.
    """
    device = accelerator.device if accelerator else next(model.parameters()).device
    rank, world_size = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    was_training = model.training
    model.eval()
    for buffer in model.buffers() if world_size > 1 else ():
        buffer.copy_(
            broadcast(buffer.clone())
        )  # each process counted its own images in batch normalisation: the main one's serve
    batches = torch.arange(len(images)).split(batch_size)
    logits, positions = [], []
    for start in range(0, len(batches), world_size):
        turn = batches[start : start + world_size]
        if rank < len(turn):
            make_input = functools.partial(_eval_input, images, turn[rank], preprocessing, device)
            rows, weights = images.rows[turn[rank]], torch.ones(len(turn[rank]))
            x = cache.get(f"evaluation_{batch_size}", rows, weights, make_input) if cache else make_input()
            logits.append(model(x).float())
            positions.append(turn[rank].to(device))
        if progress:
            progress(sum(map(len, turn)))
    model.train(was_training)
    everything = _gather_in_order(accelerator, logits, positions, len(images), len(images.classes)).cpu()
    losses = F.cross_entropy(everything, images.labels, reduction="none")
    return Predictions(
        images.rows, images.labels, everything.argmax(dim=1), everything.softmax(dim=1), losses
    )


def _eval_input(
    images: Images, positions: torch.Tensor, preprocessing: Preprocessing, device: torch.device
) -> torch.Tensor:
    pixels, sizes = images.gather(positions)
    return preprocess(pixels.to(device), sizes, preprocessing)


def _gather_in_order(
    accelerator: Accelerator | None,
    logits: list[torch.Tensor],
    positions: list[torch.Tensor],
    num_images: int,
    num_classes: int,
) -> torch.Tensor:
    """All processes' logits (N, C) at their positions. Each sends as many rows; those that fill up have the position -1."""
    if accelerator is None or accelerator.num_processes == 1:
        return torch.cat(logits)
    device = accelerator.device
    own = torch.cat([torch.zeros(0, num_classes, device=device), *logits])
    where = torch.cat([torch.zeros(0, dtype=torch.int64, device=device), *positions])
    missing = int(accelerator.gather(torch.tensor([len(where)], device=device)).max()) - len(where)
    own, where = accelerator.gather((F.pad(own, (0, 0, 0, missing)), F.pad(where, (0, missing), value=-1)))
    kept = where >= 0
    return torch.zeros(num_images, num_classes, device=device).index_copy_(0, where[kept], own[kept])


def evaluate_model(
    model: nn.Module,
    images: Images,
    preprocessing: Preprocessing,
    *,
    batch_size: int = 64,
    accelerator: Accelerator | None = None,
    progress: Callable[[int], None] | None = None,
    cache: FeatureCache | None = None,
) -> dict[str, float]:
    """Loss, accuracy, balanced accuracy, top-5 accuracy, macro and weighted F1 of a model on images."""
    options = dict(batch_size=batch_size, accelerator=accelerator, progress=progress, cache=cache)
    return metrics.compute(predict(model, images, preprocessing, **options))
