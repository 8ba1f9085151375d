"""From a dataset's name to the batches that a model sees, in this order.

known      the datasets that have a short name
choices    the flags that say how to read a dataset
folders    class folders -> splits, classes and what is left out (class_names: their names)
tables     a table of labels -> the same
parquet    parquet files -> the same, with columns and card (what README.md says)
sources    a name, a hub id, a folder or a table -> one of these
stratified, division   train and validation, and subsets
decoding   an encoded image -> pixels
store      decoded images on disk
images     which images a run uses, and where their pixels are
batches    the steps of an epoch, and the batches of a step
augment    augmentation sets, mixup and CutMix
resize     exact resampling of a batch, and normalising
"""
