"""The sanity check: can a model overfit a few batches? If not, it has a bug or a bad learning rate."""

import math
from dataclasses import dataclass

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from modeling.data.batches import training_steps
from modeling.data.images import Images
from modeling.engine import StepSettings, predict, train_step
from modeling.progress import Progress

ENOUGH_ACCURACY = 0.99
MAX_STEPS = 2000


@dataclass(frozen=True)
class SanityResult:
    """The result. passed: at least ENOUGH_ACCURACY of the images are classified correctly. loss: in nats."""

    passed: bool
    accuracy: float
    loss: float
    steps: int


def sanity_check(
    accelerator: Accelerator,
    model: nn.Module,
    raw_model: nn.Module,
    optimizer: Optimizer,
    images: Images,
    step_settings: StepSettings,
    *,
    model_name: str,
    batch_size: int,
    accumulation: int,
    lr: float,
    max_steps: int,
) -> SanityResult:
    """Train on a few batches, without augmentation, until 99 % are classified correctly in eval mode.

    `model` is the prepared model, `raw_model` the same one without DDP. max_steps 0 means MAX_STEPS.
    FloatingPointError: the loss is not finite.
    """
    step_settings = StepSettings(
        preprocessing=step_settings.preprocessing,
        clip_grad=step_settings.clip_grad,
        seed=step_settings.seed,
    )
    limit = max_steps or MAX_STEPS
    step, epoch, accuracy, loss = 0, 0, 0.0, math.nan
    print(
        f"Sanity check: {model_name} on {len(images)} images in batches of {batch_size}, "
        f"at most {limit} steps, at a constant lr {lr:g}; no augmentation, mixing, smoothing or averaging"
    )
    with Progress(limit, "sanity check", unit=" steps") as progress:
        while step < limit and accuracy < ENOUGH_ACCURACY:
            model.train()
            steps = training_steps(
                images,
                seed=step_settings.seed,
                epoch=epoch,
                batch_size=batch_size,
                accumulation=accumulation,
                rank=accelerator.process_index,
                world_size=accelerator.num_processes,
            )
            for number, micro_batches in enumerate(steps):
                if step == limit:
                    break
                train_step(
                    accelerator,
                    model,
                    optimizer,
                    micro_batches,
                    epoch=epoch,
                    step=step,
                    lr=lr,
                    num_images=min(batch_size, len(images) - number * batch_size),
                    step_settings=step_settings,
                )
                step += 1
                progress.update(1)
            epoch += 1
            predictions = predict(
                raw_model, images, step_settings.preprocessing, batch_size=batch_size, accelerator=accelerator
            )
            loss = predictions.losses.mean().item()
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss was not finite by step {step}: use a lower --lr or --clip-grad 1"
                )
            accuracy = (predictions.predicted == images.labels).float().mean().item()
            progress.describe(f"sanity check, accuracy {accuracy:.3f}")
    passed = accuracy >= ENOUGH_ACCURACY
    verdict = "passed" if passed else "FAILED"
    print(f"Sanity check {verdict}: training accuracy {accuracy:.4f}, loss {loss:.4f} after {step} steps")
    return SanityResult(passed=passed, accuracy=accuracy, loss=loss, steps=step)
