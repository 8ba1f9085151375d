"""What the scripts share. Nothing here imports a script.

The hour: read train.py, then these files in this order. They are the whole method.

recipes           one recipe for each model and size, with its learning rate
data/batches      the steps of an epoch, the micro-batches of a step
data/augment      augmentation, mixup and CutMix, as functions of seed, epoch and image
engine            train_step, predict and evaluate_model: the numeric path
optim             optimizer, moving average, learning rate as a pure function of the step
randomness        the hash that every random number comes from
models/cnn, vit   SimpleCNN and SimpleViT, plain modules

The machinery:

setup             from flags to everything that the training loop needs: images, model, optimizer
settings          every value that a run uses, resolved once
progression       everything that changes during a run
data/             sources (names, folders and tables -> splits and classes), images (which images, where
                  their pixels are), resize, decoding, store (decoded images on disk)
models/           build_model; timm backbones and the linear probe; weights (where they are, their record),
                  tensors (reading and fitting them), positions, layout; fast layers for a CPU
features          the features of a frozen backbone, kept on disk
run/              files (every file name of a run), lock (one owner), checkpoint, header (what a checkpoint
                  says of itself, checked), state (to resume from), resume (what is checked before the
                  first step), preemption (Ctrl-C and signals), tracking (TensorBoard and metrics.jsonl),
                  pace (speed, gradient norm), pictures, curves, launch (processes, threads, precision),
                  environment (variables that are followed or refused), cores (how many, how busy),
                  process (what a notebook gets back)
metrics           accuracy, F1 and others, as local `evaluate` modules
evaluation        what evaluate.py runs
profiling         what profile.py runs. Its parts: step_profile (one row), trace, profile_page
report            tables, text and plots
compare           ranks models and compares pairs. Its parts: answers (predictions), scores, suspects
                  (labels), fairness, cost, stats/ (estimators)
comparison_files  writes the page and the CSV files of a comparison. Its parts: comparison_text, analysis,
                  page, pages/
sanity            can the model overfit a few batches?
cli               argument types; how an error becomes an exit status
progress          progress bars
hub               downloads from the Hugging Face hub
files             atomic writes and safetensors
errors            UserError, for which a script exits with status 2
shadow            how `import evaluate` and `import profile` find the real modules
timeouts          the hub's time limits, checked before a library reads them
"""

from modeling.timeouts import drop_bad_timeouts

drop_bad_timeouts()
