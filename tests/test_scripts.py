"""The commands as a user runs them: by path, from any folder, under the launcher; and what they refuse."""

import contextlib
import json
import os
import re
import resource
import shlex
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, assert_refused, call, command, make_image_folder, scripts

from modeling import cli
from modeling.run import checkpoint, launch
from modeling.run.launch import make_accelerator, num_cores
from modeling.timeouts import drop_bad_timeouts

TRAIN_FLAGS = """--augment --batch-size --best-metric --checkpoint-every --clip-grad --compile
--cutmix --dataset --deterministic --early-stop --ema --epochs --feature-views --force
--gradient-accumulation-steps --head-dropout --help --image-size --label-smoothing --limit-eval
--limit-train --lr --max-steps --mixed-precision --mixup --model --num-batches --num-threads
--num-workers --optimizer --output-dir --patch-size --recipe --report-to --resume --run-name --sanity-check
--seed --store-limit --val-fraction --warmup-epochs --weight-decay --weights"""
DATA_FLAGS = "--dataset-config --image-column --label-column --skip-bad-images --test-split --train-split"
FLAGS = {
    "train": f"{TRAIN_FLAGS} {DATA_FLAGS}",
    "evaluate": "--batch-size --ckpt --dataset --force --help --limit-eval --mixed-precision --num-threads "
    f"--num-workers --output-dir --split --store-limit {DATA_FLAGS}",
    "profile": "--batch-size --batch-sizes --dataset --help --image-size --mixed-precision --models "
    f"--num-steps --num-threads --num-workers --output-dir --precisions --recipe --store-limit {DATA_FLAGS}",
    "export_data": f"--dataset --help --num-workers --output-dir --seed --val-fraction --verify {DATA_FLAGS}",
    "sweep": f"{TRAIN_FLAGS} {DATA_FLAGS} --models --seeds",
}


@pytest.mark.parametrize("script", FLAGS)
def test_the_flags_are_these(script):
    parser = getattr(scripts, script).build_parser()
    flags = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
    assert sorted(flags) == sorted(FLAGS[script].split())
    for action in parser._actions:
        assert action.help, action.option_strings


# ---- the two names -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("-c", "import cProfile, evaluate; evaluate.combine; cProfile.run; import profile; profile.Profile"),
        (
            "-c",
            "import torch._dynamo, torchvision; import evaluate; assert 'site-packages' in evaluate.__file__",
        ),
        ("-m", "pytest", "--version"),
        ("-m", "cProfile", "-o", os.devnull, "train.py", "--help"),
        ("-m", "IPython", "--no-banner", "--quick", "-c", "import profile; print(profile.run)"),
    ],
    ids=["cProfile", "dynamo", "pytest", "cProfile train.py", "IPython"],
)
def test_the_real_modules_are_found_in_the_root(arguments):
    result = command(sys.executable, *arguments)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("script", FLAGS)
def test_every_script_runs_by_path_from_any_folder(script, tmp_path):
    result = command(sys.executable, ROOT / f"{script}.py", "--help", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "--output-dir" in result.stdout
    assert not list(tmp_path.iterdir())


# ---- as a user runs them -------------------------------------------------------------------------


@pytest.mark.parametrize("config, precision", [("cpu", "no"), ("cpu_bf16", "bf16")])
def test_the_launcher_trains_and_the_checkpoint_evaluates(config, precision, tmp_path):
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        ROOT / "accelerate_configs" / f"{config}.yaml",
    ]
    result = command(*launch, ROOT / "train.py", *TINY, "--max-steps", 4, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    # the launcher's OMP_NUM_THREADS=1 is nobody's choice
    assert f"hardware   cpu, 1 process of {num_cores()} threads, precision {precision}" in result.stdout
    assert "Traceback" not in result.stderr
    result = call(
        "evaluate",
        "--ckpt",
        tmp_path / "checkpoints" / "cnn_small_best.safetensors",
        "--output-dir",
        tmp_path,
    )
    assert result.status == 0, result.err
    assert re.search(r"accuracy 0\.\d{4}, macro F1 0\.\d{4}", result.out)
    assert (tmp_path / "traces" / "metrics.csv").exists()


def test_evaluate_as_a_command(trained, tmp_path):
    result = command(sys.executable, ROOT / "evaluate.py", "--ckpt", trained.best, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "traces" / "metrics.csv").exists()


@pytest.mark.parametrize(
    "config", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_accelerate_config_is_one_that_accelerate_reads(config):
    from accelerate.commands.config.config_args import load_config_from_file

    loaded = load_config_from_file(str(config))
    assert loaded.num_processes == {
        "multi_cpu": 2,
        "multi_gpu": 2,
        "multi_gpu_bf16": 2,
        "multi_node": 16,
    }.get(config.stem, 1)
    assert loaded.use_cpu == ("cpu" in config.stem)
    assert loaded.mixed_precision == (
        "bf16"
        if "bf16" in config.stem or config.stem == "multi_node"
        else "fp16"
        if "fp16" in config.stem
        else "no"
    )
    assert config.read_text().startswith("#")
    readme = (ROOT / "README.md").read_text()
    assert f"`{config.stem}`" in readme, "the README's table has every file"


def test_processes_that_do_not_see_each_other_are_refused(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "::1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "joined", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(launch.accelerate, "Accelerator", lambda **options: SimpleNamespace(num_processes=1))
    assert_refused(call("train", *TINY), "2 processes were launched, but each sees only 1")
    for script in ("profile", "export_data"):
        assert_refused(call(script), "this script supports only one process")
    monkeypatch.delenv("RANK")
    for script in ("profile", "export_data"):
        assert_refused(call(script), "WORLD_SIZE is 2, but RANK is not set")
    assert_refused(call("evaluate", "--ckpt", "x"), "WORLD_SIZE is 2, but RANK is not set")


def test_one_thread_under_the_launcher_is_nobodys_choice(monkeypatch):
    def threads(*flags, **environment):
        for name in ("ACCELERATE_MIXED_PRECISION", "OMP_NUM_THREADS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        torch.set_num_threads(7)
        args = scripts.train.build_parser().parse_args(flags)
        make_accelerator(mixed_precision=args.mixed_precision, num_threads=args.num_threads)
        return torch.get_num_threads()

    assert threads() == num_cores()
    assert threads(OMP_NUM_THREADS="1", ACCELERATE_MIXED_PRECISION="no") == num_cores()
    assert threads(OMP_NUM_THREADS="1") == 7, (
        "without the launcher it is the user's, and torch's since it was imported"
    )
    assert threads(OMP_NUM_THREADS="7", ACCELERATE_MIXED_PRECISION="no") == 7
    assert threads("--num-threads", "3", OMP_NUM_THREADS="7") == 3


def test_the_launchers_precision_is_the_default(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert make_accelerator(mixed_precision=None, num_threads=None).mixed_precision == "bf16"
    assert make_accelerator(mixed_precision="no", num_threads=None).mixed_precision == "no"
    monkeypatch.undo()
    assert make_accelerator(mixed_precision=None, num_threads=None).mixed_precision == "no"


def test_an_interrupted_command_ends_with_130_in_one_line(monkeypatch):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(scripts.train, "run_training", interrupt)
    result = call("train")
    assert result.status == 130
    assert "Traceback" not in result.err


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(scripts.train, "run_training", lambda args: torch.zeros(2).view(3))
    with pytest.raises(RuntimeError, match="shape"):
        call("train")
    # A library's ValueError is no UserError.
    monkeypatch.setattr(scripts.train, "run_training", lambda args: json.loads("{"))
    with pytest.raises(ValueError, match="Expecting property name"):
        call("train")


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--model", "vgg"), ("unknown model 'vgg'", "cnn_small")),
        (("--model", "timm/nonesuch"), ("timm has no model 'nonesuch'",)),
        (("--dataset", "./absent"), ("no dataset './absent'",)),
        (("--dataset", "not a name"), ("no dataset 'not a name'",)),
        (("--batch-size", "0"), ("--batch-size", "0 is not an integer from 1 to 2147483647")),
        (("--batch-size", "99999999999999999999"), ("--batch-size",)),
        (("--batch-size", "many"), ("--batch-size", "'many'")),
        (("--val-fraction", "1.5"), ("--val-fraction", "1.5 is not a number in (0, 1)")),
        (("--epochs", "-1"), ("--epochs", "-1")),
        (("--lr", "nan"), ("--lr", "nan")),
        (("--lr", "inf"), ("--lr", "inf")),
        (("--augment", "heavy"), ("--augment", "'heavy'", "randaugment")),
        (("--mixed-precision", "fp16"), ("fp16 needs a GPU",)),
        (("--weights", "absent.safetensors"), ("absent.safetensors", "no such file")),
        (("--run-name", "../x"), ("--run-name '../x'",)),
        (("--run-name", ""), ("--run-name",)),
        (("--patch-size", "4"), ("--patch-size is for vit_scratch",)),
        (
            ("--model", "vit_scratch", "--image-size", "30"),
            ("image size 30 is not a multiple of patch size 4",),
        ),
        (("--model", "cnn", "--image-size", "4"), ("image size 4 is too small",)),
        (("--model", "vit", "--weights", "none", "--image-size", "8"), ("vit cannot take image size 8",)),
        (("--epoch", "1"), ("unrecognized arguments: --epoch",)),
        (("--val-fraction", "0.0001"), ("split 'validation' of digits is empty", "--val-fraction")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) and value[0].startswith("--") else "",
)
def test_train_refuses_in_one_line_and_what_is_on_disk_stays(flags, words, trained):
    before = {path: path.stat().st_mtime_ns for path in trained.folder.rglob("*")}
    result = call("train", *TINY, "--output-dir", trained.folder, *flags)
    assert_refused(result, *words)
    assert {
        path: path.stat().st_mtime_ns for path in trained.folder.rglob("*") if path.parent != trained.folder
    } == {path: time for path, time in before.items() if path.parent != trained.folder}


def test_train_refuses_bad_folders(tmp_path):
    (tmp_path / "empty").mkdir()
    assert_refused(call("train", "--dataset", tmp_path / "empty"), "empty", "one folder per class")
    assert_refused(
        call("train", "--dataset", make_image_folder(tmp_path / "one", {"train": {"cat": 5}})), "one", "class"
    )
    broken = make_image_folder(tmp_path / "broken", {"train": {"a": 10, "b": 10}, "test": {"a": 2, "b": 2}})
    bad = broken / "test" / "b" / "1.png"
    bad.write_bytes(b"\x89PNG\r\n\x1a\n rubbish")
    result = call("train", "--model", "cnn", "--dataset", broken, "--output-dir", tmp_path / "out")
    assert_refused(result, "cannot decode image", str(bad))
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_a_batch_of_one_that_batch_normalisation_cannot_train_on(tmp_path):
    flags = (
        "--model",
        "resnet18",
        "--weights",
        "none",
        "--image-size",
        32,
        "--limit-train",
        33,
        "--output-dir",
        tmp_path,
    )
    assert_refused(
        call("train", *TINY, *flags), "batch normalisation cannot train on 1 image", "--batch-size"
    )


def test_an_unwritable_output_folder_is_refused_before_anything_is_spent(tmp_path):
    (tmp_path / "file").write_text("x")
    for script, flags in (("train", TINY), ("profile", ()), ("export_data", ("--dataset", "digits"))):
        result = call(script, *flags, "--output-dir", tmp_path / "file" / "out")
        assert_refused(result, "file/out", statuses=(1, 2))
    assert (tmp_path / "file").read_text() == "x"


def test_a_full_disk_is_one_line_and_the_old_checkpoint_stays(trained, tmp_path, monkeypatch):
    import shutil

    shutil.copytree(trained.folder, tmp_path / "out")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "x_best.safetensors")

    monkeypatch.setattr(scripts.train.checkpoint, "save_checkpoint", full)
    result = call("train", *TINY, "--max-steps", 1, "--output-dir", tmp_path / "out")
    assert_refused(result, "No space left on device", statuses=(1,))
    (old,) = (tmp_path / "out" / "previous").iterdir()
    assert (old / "checkpoints" / "cnn_small_best.safetensors").read_bytes() == trained.best.read_bytes()


def test_a_checkpoint_that_the_system_does_not_take_is_named_and_the_run_can_be_resumed(tmp_path):
    """The short form of benchmarks/faults.py: a file may have 1 MB."""
    flags = (*TINY, "--max-steps", 1, "--output-dir", tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, before[1]))
    try:
        result = call("train", *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_refused(result, "File too large", "cnn_small_best.safetensors", statuses=(1,))
    assert not list(tmp_path.rglob("*.tmp"))
    assert call("train", *flags, "--resume").status == 0


def test_closed_and_ascii_streams_and_a_bad_timeout_are_no_obstacle(tmp_path):
    """2>&- closes standard error: the next file that is opened must not get its number."""
    flags = [*TINY, "--max-steps", 1, "--run-name", "é", "--output-dir", tmp_path]
    line = shlex.join([sys.executable, str(ROOT / "train.py"), *map(str, flags)])
    env = {"PYTHONIOENCODING": "ascii", "HF_HUB_DOWNLOAD_TIMEOUT": "abc"}
    result = command("sh", "-c", f"{line} 2>&-", env=env)
    assert result.returncode == 0, result.stdout
    assert f"{tmp_path}/checkpoints/\\xe9_best.safetensors" in result.stdout
    assert checkpoint.load_model(tmp_path / "checkpoints" / "é_best.safetensors")


@pytest.mark.parametrize("value", ["abc", "0", "-1", "2.5", ""])
def test_a_timeout_that_huggingface_hub_cannot_read_is_ignored_with_a_line(value, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", value)
    drop_bad_timeouts()
    assert "HF_HUB_DOWNLOAD_TIMEOUT" not in os.environ
    assert f"HF_HUB_DOWNLOAD_TIMEOUT={value} is ignored" in capsys.readouterr().err
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "20")
    drop_bad_timeouts()
    assert os.environ["HF_HUB_DOWNLOAD_TIMEOUT"] == "20"


def test_an_error_without_a_file_says_where_it_was_raised(monkeypatch, capsys):
    def main():
        os.write(os.open("/dev/full", os.O_WRONLY), b"x")

    assert cli.run(main) == 1
    assert f"No space left on device (in main of {__file__}" in capsys.readouterr().err


def test_an_error_reaches_the_shell_as_status_2(tmp_path):
    result = command(sys.executable, ROOT / "train.py", "--lr", "nan", cwd=tmp_path)
    assert_refused(result, "train.py: error: ", "--lr")
    assert not list(tmp_path.iterdir())
