"""Profile the real training step of models, with random weights, and compare them.

    python profile.py --models cnn vit
    accelerate launch --config_file accelerate_configs/cpu.yaml profile.py \\
        --models cnn_small vit_scratch --dataset cifar10
    accelerate launch --config_file accelerate_configs/single_gpu_bf16.yaml profile.py \\
        --models resnet18 deit --batch-size 64

Each model gets a Chrome trace and a table of operators. The comparison is profile_comparison.txt and .csv.
All files go to traces/ under --output-dir.
"""

# `import profile` means the standard library's module, not this script: see modeling/shadow.py.
if __name__ == "profile":
    from modeling.shadow import load_real

    load_real("profile")

if __name__ == "__main__":
    import sys

    from modeling import cli, profiling

    sys.exit(cli.run(lambda: profiling.main(description=__doc__)))
