"""From a dataset's name to the batches that a model sees, in this order.

sources    names, hub ids and folders -> splits and classes
decoding   an encoded image -> pixels
store      decoded images on disk
images     which images a run uses, and where their pixels are
batches    the steps of an epoch, and the batches of a step
augment    augmentation sets, mixup and CutMix
resize     exact resampling of a batch, and normalising
"""
