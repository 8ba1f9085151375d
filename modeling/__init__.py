"""What the four scripts share. Nothing here imports a script.

The hour: read train.py, then these files in this order, and you have read the whole method.

recipes           one recipe for each model and size
data/batches      the steps of an epoch, the micro-batches of a step
data/augment      augmentation, mixup and CutMix, as functions of seed, epoch and image
engine            train_step, predict and evaluate_model: the numeric path
optim             optimizer, moving average, learning rate as a pure function of the step
randomness        the hash that every random number comes from
models/cnn, vit   SimpleCNN and SimpleViT, plain modules

The machinery:

setup, settings   from flags to frozen Settings, and to all that the loop works with
progression       what changes while a run goes on
data/             sources (names and folders -> splits and classes), images (which images, where their
                  pixels are), resize, decoding, store (decoded images on disk)
models/           build_model; timm backbones and the linear probe; weights; fast layers for a CPU
features          the features of a frozen backbone, kept on disk
run/              files (every file name of a run), lock (one owner), checkpoint, state (to resume from),
                  preemption (signals), tracking and events (metrics.jsonl, TensorBoard), launch (processes,
                  threads, precision), process (what a notebook gets back)
metrics           accuracy, F1 and the rest, as local `evaluate` modules
evaluation        the body of evaluate.py;  profiling: the body of profile.py;  report: tables, text and plots
compare           ranks, pairs and runs; answers, scores, suspects, fairness, cost and stats/ are its parts
comparison_files  what evaluate.py writes of a comparison; comparison_text, analysis, page and pages/ form it
sanity            can the model overfit a few batches?
cli, progress     argument types, exit status, progress bars
hub, files        downloads from the Hugging Face hub; atomic writes and safetensors
errors, shadow    UserError; how `import evaluate` and `import profile` find the real modules
environment       variables that libraries read when they are imported
"""

from modeling.environment import drop_bad_timeouts

drop_bad_timeouts()
