"""What the four scripts share. Leaves first; nothing here imports a script.

cli          argument types and groups, progress, hardware; the one place where an error becomes an exit status
randomness   every random number, as a pure function of where it stands
recipes      the training recipe of each model at each size
cnn, vit     SimpleCNN and SimpleViT, plain modules
pretrained   timm backbones: a new head, freezing, hub or local weights
models       build_model: from a name to a module
transforms   augmentation, resizing and normalising of a uint8 batch
hub          downloads from the Hugging Face hub, and its cache
decoding     from an encoded image to pixels, by threads
store        decoded images on disk, built once, mapped into memory
data         a dataset's name or folder -> splits -> images -> batches
features     what a frozen backbone computes, kept on disk
schedule     the learning rate as a pure function of the step
engine       train_step and predict: the numeric path
sanity       the sanity check: can the model overfit a few batches?
preemption   signals that ask a run to end, on all processes at the same step
resume       the state to resume from
metrics      accuracy, F1 and the rest, as local `evaluate` modules
checkpoint   one self-describing safetensors file, written atomically
tracking     TensorBoard and metrics.jsonl
profiling    times and traces engine.train_step
report       tables, reports and plots
shadow       lets `import evaluate` and `import profile` find the real modules beside our scripts of those names
"""
