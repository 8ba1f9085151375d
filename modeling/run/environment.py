"""What stands in the environment: how many processes were started, and what accelerate would read.

A variable that would change what is computed is refused by name, never followed unsaid.
"""

import os

from modeling.errors import UserError

# srun and mpirun start several copies of a command, and say in these variables how many.
TASK_COUNTS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
# accelerate would take up these parts of its config file, or of the environment, by itself.
UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
# oneDNN would compute float32 products in fewer bits.
ONEDNN_PRECISION = ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE")
OFF = ("", "0", "false", "no", "off", "none")


def how_to_launch(count: int | str = "N") -> str:
    """The command that starts several processes which know of each other."""
    return (
        f"`accelerate launch --config_file accelerate_configs/multi_gpu.yaml --num_processes {count} "
        "train.py ...` for several (CPU: multi_cpu.yaml)"
    )


def integer(name: str, default: int, *, low: int = 0, high: int = 2**31 - 1) -> int:
    """The integer in an environment variable. UserError: it is none, or not from `low` to `high`."""
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        raise UserError(
            f"the environment variable {name} is {text!r}, not an integer from {low} to {high}: "
            f"unset it for one process, or use {how_to_launch()}"
        )
    return value


def is_set(name: str) -> bool:
    """Whether an environment variable switches something on."""
    return os.environ.get(name, "").strip().lower() not in OFF


def num_processes() -> int:
    """The processes that a launcher started together, 1 without a launcher.

    UserError: the variables are malformed or incomplete, or srun or mpirun started copies that do not know of
    each other.
    """
    world_size = integer("WORLD_SIZE", 1, low=1)
    if world_size == 1:
        _refuse_copies()
        return 1
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {world_size}, but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} "
            "not set, so no launcher set it: `unset WORLD_SIZE` for one process, or use "
            f"{how_to_launch(world_size)}"
        )
    integer("RANK", 0, high=world_size - 1)
    integer("MASTER_PORT", 0, low=1, high=65535)
    integer("LOCAL_RANK", 0)
    integer("LOCAL_WORLD_SIZE", 1, low=1, high=world_size)
    return world_size


def _refuse_copies() -> None:
    """UserError: srun or mpirun started several copies of this command, each a run of its own."""
    # A step of srun has its own number of tasks. The batch script around it may have more.
    in_step = "SLURM_STEP_NUM_TASKS" in os.environ
    for name in ("SLURM_STEP_NUM_TASKS" if in_step else TASK_COUNTS[0], *TASK_COUNTS[1:]):
        count = integer(name, 1)
        if count > 1:
            starter = "srun" if name.startswith("SLURM") else "mpirun"
            single = "srun --ntasks 1" if starter == "srun" else "mpirun -n 1"
            raise UserError(
                f"{name} is {count}: {starter} starts {count} copies of this command, each a run of its own. "
                f"Use `{single}` for one process, or {how_to_launch(count)}"
            )


def check_accelerate(mixed_precision: str | None) -> None:
    """UserError: accelerate would take up a setting that this program does not support.

    mixed_precision: what the user asked for; None: the environment decides.
    """
    for name, what in UNSUPPORTED.items():
        if is_set(name):
            raise UserError(
                f"{what} is not supported, but accelerate's config file or the environment asks for it "
                f"({name}={os.environ[name]}): launch with --config_file accelerate_configs/..., or unset it"
            )
    if is_set("ACCELERATE_DYNAMO_BACKEND"):
        raise UserError(
            f"accelerate's config file or the environment asks for torch.compile (ACCELERATE_DYNAMO_BACKEND="
            f"{os.environ['ACCELERATE_DYNAMO_BACKEND']}): unset it, or launch with --config_file "
            "accelerate_configs/...; train.py compiles with --compile"
        )
    for name in ONEDNN_PRECISION:
        if (os.environ.get(name) or "STRICT").upper() != "STRICT":
            raise UserError(
                f"{name}={os.environ[name]} would change every float32 product: unset it; for bfloat16 give "
                "--mixed-precision bf16"
            )
    precision = mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "") or "no"
    if precision.lower() not in ("no", "bf16", "fp16"):
        raise UserError(
            f"precision {precision} is not supported, but accelerate's config file or the environment asks "
            "for it (ACCELERATE_MIXED_PRECISION): give --mixed-precision no, bf16 or fp16"
        )


def ignored() -> str | None:
    """A line about a setting of accelerate that has no effect here; None: there is none."""
    count = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "").strip()
    if count in ("", "1"):
        return None
    return (
        f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={count} has no effect: "
        "train.py accumulates as --gradient-accumulation-steps says"
    )
