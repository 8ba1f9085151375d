"""Evaluate checkpoints: predictions -> metrics, plots, comparison.

    python evaluate.py --ckpt checkpoints/cnn_best.safetensors
    python evaluate.py --ckpt checkpoints/cnn_best.safetensors checkpoints/vit_best.safetensors --split test
    accelerate launch --config_file accelerate_configs/single_gpu_bf16.yaml evaluate.py \\
        --ckpt checkpoints/vit_best.safetensors

A checkpoint describes its own model, classes, preprocessing and dataset.
The results go to traces/ under --output-dir.
"""

# `import evaluate` means the package of that name, not this script: see modeling/shadow.py.
if __name__ == "evaluate":
    from modeling.shadow import load_real

    load_real("evaluate")

if __name__ == "__main__":
    import sys

    from modeling import cli, evaluation

    sys.exit(cli.run(lambda: evaluation.main(description=__doc__)))
