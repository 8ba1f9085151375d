"""What the environment asks for is done and said, or refused. The cores are those of the container."""

import socket
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import PrefixStore, TCPStore

from modeling.errors import UserError
from modeling.run import cores, environment, launch
from modeling.run.launch import make_accelerator

JOB = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def env(monkeypatch):
    """Set environment variables, of a process that no launcher started."""
    for name in (*JOB, "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", *environment.TASK_COUNTS):
        monkeypatch.delenv(name, raising=False)

    def set_variables(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return set_variables


@pytest.mark.parametrize(
    "variables, words",
    [
        ({"WORLD_SIZE": 2}, ["WORLD_SIZE is 2", "RANK, MASTER_ADDR, MASTER_PORT are not set", "unset WORLD"]),
        ({**JOB, "MASTER_ADDR": ""}, ["MASTER_ADDR is not set"]),
        ({"WORLD_SIZE": "two"}, ["WORLD_SIZE is 'two'", "accelerate launch"]),
        ({"WORLD_SIZE": 0}, ["WORLD_SIZE is '0'"]),
        ({**JOB, "RANK": 2}, ["RANK is '2'", "from 0 to 1"]),
        ({**JOB, "MASTER_PORT": "http"}, ["MASTER_PORT is 'http'"]),
        ({**JOB, "LOCAL_WORLD_SIZE": "x"}, ["LOCAL_WORLD_SIZE is 'x'"]),
        ({"SLURM_NTASKS": 2, "SLURM_STEP_NUM_TASKS": 2}, ["srun starts 2 copies", "accelerate launch"]),
        ({"SLURM_NTASKS": 3}, ["SLURM_NTASKS is 3", "srun --ntasks 1"]),
        ({"OMPI_COMM_WORLD_SIZE": 2}, ["mpirun starts 2 copies", "mpirun -n 1"]),
        ({"PMI_SIZE": 4, "WORLD_SIZE": 1}, ["PMI_SIZE is 4"]),
        ({"PMI_SIZE": "4x"}, ["PMI_SIZE is '4x'"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_launch_that_joins_no_processes_is_refused(variables, words, env):
    env(**variables)
    with pytest.raises(UserError) as refused:
        make_accelerator(mixed_precision=None, num_threads=None)
    assert "\n" not in str(refused.value)
    for word in words:
        assert word in str(refused.value)


def test_onednn_must_not_compute_float32_in_fewer_bits(env):
    env(DNNL_DEFAULT_FPMATH_MODE="strict")
    environment.check_accelerate(None)
    env(DNNL_DEFAULT_FPMATH_MODE="BF16")
    with pytest.raises(UserError, match="DNNL_DEFAULT_FPMATH_MODE=BF16 would change every float32 product"):
        environment.check_accelerate(None)


@pytest.mark.parametrize(
    "variables, count",
    [
        ({}, 1),
        ({"WORLD_SIZE": 1, "RANK": 0, "SLURM_NTASKS": 1}, 1),
        ({"SLURM_NTASKS": 4, "SLURM_STEP_NUM_TASKS": 1}, 1),  # srun --ntasks 1 in a larger job
        ({**JOB, "SLURM_NTASKS": 2, "SLURM_STEP_NUM_TASKS": 2}, 2),  # srun starts a launcher on two machines
    ],
)
def test_a_launch_that_is_right_is_taken(variables, count, env):
    env(**variables)
    assert environment.num_processes() == count


@pytest.mark.parametrize(
    "name, value, word",
    [
        ("ACCELERATE_USE_FSDP", "true", "FSDP is not supported"),
        ("ACCELERATE_USE_DEEPSPEED", "TRUE", "DeepSpeed is not supported"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "Megatron-LM is not supported"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "parallelism_config is not supported"),
        ("ACCELERATE_DYNAMO_BACKEND", "inductor", "--compile"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "precision fp8 is not supported"),
        ("ACCELERATE_USE_CPU", "maybe", "accelerate refuses this environment"),
    ],
)
def test_what_accelerate_would_take_up_unsaid_is_refused(name, value, word, env):
    env(**{name: value})
    with pytest.raises(UserError, match=word):
        make_accelerator(mixed_precision=None, num_threads=None)


def test_what_accelerate_cannot_do_on_this_hardware_is_one_line(env, monkeypatch):
    def refuse(**_):
        raise NotImplementedError("set NCCL_P2P_DISABLE=1")

    env()
    monkeypatch.setattr(launch.accelerate, "Accelerator", refuse)
    with pytest.raises(UserError, match="refuses this environment: set NCCL_P2P_DISABLE=1"):
        make_accelerator(mixed_precision=None, num_threads=None)


def test_the_environment_cannot_divide_the_gradient(env, capsys):
    env(ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4, ACCELERATE_DYNAMO_BACKEND="no", ACCELERATE_USE_FSDP="false")
    accelerator = make_accelerator(mixed_precision=None, num_threads=None)
    weight = torch.nn.Parameter(torch.ones(1))
    accelerator.backward(weight.sum())
    assert weight.grad == 1
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 has no effect" in capsys.readouterr().out


# ---- processes that are waited for ---------------------------------------------------------------


@pytest.fixture
def job(env, monkeypatch):
    """The environment of one of two processes, at a free port. Lines about waiting come at once."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    env(**JOB | {"MASTER_PORT": port})
    monkeypatch.setattr(launch, "WAIT_SECONDS", 0.1)
    return port


@pytest.mark.parametrize("use_cpu, backend", [(True, "gloo"), (False, "nccl")])
def test_a_line_says_who_is_waited_for_and_a_restart_uses_the_devices_backend(
    use_cpu, backend, job, env, monkeypatch, capfd
):
    env(TORCHELASTIC_RESTART_COUNT=3)
    used = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda name, **_: used.append(name))

    def come_late():
        store = TCPStore("127.0.0.1", job, 2, is_master=False, wait_for_workers=False)
        time.sleep(0.3)
        roll = PrefixStore("attempt_3", store)
        roll.set("here_1", "")
        roll.add("count", 1)

    other = threading.Thread(target=come_late)
    other.start()
    with launch.joined(2, use_cpu):
        assert used == [backend]
    other.join()
    assert f"Process 0 of 2 waits at 127.0.0.1:{job} for process 1\n" in capfd.readouterr().err


def test_a_process_that_nobody_hosts_gives_up_after_the_timeout(job, env, monkeypatch):
    env(RANK=1)
    monkeypatch.setattr(launch, "COLLECTIVE_TIMEOUT", launch.datetime.timedelta(seconds=0.2))
    with pytest.raises(UserError, match=f"did not come to 127.0.0.1:{job}: 0; start all of them"):
        with launch.joined(2, True):
            pass


def test_a_port_that_another_program_has_is_refused(job):
    with socket.create_server(("", job)):
        with pytest.raises(UserError, match="choose another port"):
            with launch.joined(2, True):
                pass


def test_a_config_for_the_cpu_is_followed_where_there_are_gpus(job, env, monkeypatch):
    env(ACCELERATE_USE_CPU="true")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = []

    def joined(world_size, use_cpu):
        asked.append(use_cpu)
        raise UserError("enough")

    monkeypatch.setattr(launch, "joined", joined)
    for value in ("true", "false"):
        env(ACCELERATE_USE_CPU=value)
        with pytest.raises(UserError, match="enough"):
            make_accelerator(mixed_precision=None, num_threads=None)
    assert asked == [True, False]


# ---- cores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "groups, files, quota",
    [
        ("0::/\n", {"cpu.max": "150000 100000"}, 1.5),  # a container of Docker, version 2
        ("0::/\n", {"cpu.max": "max 100000"}, None),
        ("0::/\n", {}, None),
        ("0::/job/step\n", {"job/cpu.max": "400000 100000", "job/step/cpu.max": "max 100000"}, 4),
        (
            "3:cpu,cpuacct:/docker/1f\n2:memory:/x\n0::/\n",  # version 1: only the root is seen
            {"cpu,cpuacct/cpu.cfs_quota_us": "200000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            2,
        ),
        ("3:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, None),
        ("2:cpuset:/a\n", {"cpuset/a/cpu.max": "100000 100000"}, None),
    ],
)
def test_the_quota_of_a_container_is_read(groups, files, quota, tmp_path):
    for name, text in {
        "proc/self/cgroup": groups,
        **{f"sys/fs/cgroup/{k}": v for k, v in files.items()},
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cores.cpu_quota(tmp_path) == quota


@pytest.mark.parametrize("quota, count", [(None, 8), (2.5, 2), (0.5, 1), (64, 8)])
def test_the_cores_are_those_of_the_affinity_and_of_the_quota(quota, count, monkeypatch):
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(cores, "cpu_quota", lambda: quota)
    assert cores.num_cores() == count


def test_a_busy_machine_is_said_with_what_to_set(monkeypatch):
    monkeypatch.setattr(cores, "_allowed_cores", lambda: set(range(8)))

    def advice(others, num_threads=8, processes_here=1):
        monkeypatch.setattr(cores, "_load", SimpleNamespace(look=lambda: others))
        return cores.busy_advice(num_threads=num_threads, processes_here=processes_here)

    assert "use 5.0 of the 8 cores" in advice(5.0)
    assert "--num-threads 3 or OMP_NUM_THREADS=3" in advice(5.0)
    assert "--num-threads 1 " in advice(12.0)
    assert advice(None) is None
    assert advice(0.5) is None
    assert advice(5.0, num_threads=2) is None, "there is room"
    assert "--num-threads 2 " in advice(5.0, num_threads=4, processes_here=2)


def test_the_load_is_that_of_other_processes(monkeypatch):
    load = cores.Load()
    assert load.look() is None, "too short a time"
    seconds, others = cores._usage()
    monkeypatch.setattr(cores, "_usage", lambda: (seconds + 10, others + 15))
    assert load.look() == pytest.approx(1.5, abs=0.2)
