"""The sanity check: can a model overfit a few batches?"""

import math
from typing import Any

from modeling.data.batches import training_steps
from modeling.data.images import Images
from modeling.engine import StepSettings, predict, train_step
from modeling.progress import Progress

ENOUGH, MAX_STEPS = 0.99, 2000


def sanity_check(
    args, accelerator, model, raw_model, optimizer, images: Images, objective: StepSettings
) -> dict[str, Any]:
    """Train on a few batches, without augmentation, until 99 % are right in eval mode. FloatingPointError: the loss is not finite."""
    objective = StepSettings(
        preprocessing=objective.preprocessing, clip_grad=objective.clip_grad, seed=objective.seed
    )
    limit, step, epoch, accuracy = args.max_steps or MAX_STEPS, 0, 0, 0.0
    share = dict(
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        accumulation=args.gradient_accumulation_steps,
    )
    print(
        f"Sanity check: {args.model} on {len(images)} images in batches of {args.batch_size}, at most {limit} steps"
    )
    with Progress(limit, "sanity check", unit=" steps") as progress:
        while step < limit and accuracy < ENOUGH:
            model.train()
            steps = training_steps(images, seed=args.seed, epoch=epoch, batch_size=args.batch_size, **share)
            for number, micro_batches in zip(range(limit - step), steps, strict=False):
                num_images = min(args.batch_size, len(images) - number * args.batch_size)
                where = dict(epoch=epoch, step=step, num_images=num_images)
                train_step(
                    accelerator, model, optimizer, micro_batches, **where, lr=args.lr, objective=objective
                )
                step += 1
                progress.update(1)
            epoch += 1
            predictions = predict(
                raw_model,
                images,
                objective.preprocessing,
                batch_size=args.batch_size,
                accelerator=accelerator,
            )
            loss = predictions.losses.mean().item()
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss was not finite by step {step}: use a lower --lr or --clip-grad 1"
                )
            accuracy = (predictions.predicted == images.labels).float().mean().item()
            progress.describe(f"sanity check, accuracy {accuracy:.3f}")
    passed = accuracy >= ENOUGH
    print(
        f"Sanity check {'passed' if passed else 'FAILED'}: training accuracy {accuracy:.4f}, loss {loss:.4f} after {step} steps"
    )
    return {"passed": passed, "accuracy": accuracy, "loss": loss, "steps": step}
