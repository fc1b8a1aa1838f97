"""Devices, precision, and several processes: the gradient of one process, equal weights, one run folder."""

import socket

import processes
import pytest
import torch
from make import generator, images_of, log_of, rand, randn, same_weights, tiny_finola, tiny_magma

from common import random_mask
from plumbing.errors import UserError
from plumbing.processes import (
    LAUNCHERS,
    agree,
    average,
    distribute,
    gather,
    on_every_rank,
    on_rank_zero,
    pick_precision,
    start_distributed,
    synchronize_norms,
    world_size,
)


def test_pick_precision_is_bf16_only_where_the_processor_has_it(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert pick_precision("auto", cpu) == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
    assert pick_precision("auto", cpu) is None
    assert pick_precision("fp16", cpu) == torch.float16
    assert pick_precision("off", cpu) is None


# --- how processes are started ---------------------------------------------------------------------------------------


def set_environment(monkeypatch, **given):
    """The variables that programs which start processes set, these and no others."""
    for name in [*LAUNCHERS, "SLURM_NTASKS", "SLURM_PROCID", "LOCAL_RANK", *TWO]:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, str(value))


TWO = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4", "SLURM_PROCID": "2"},
            "srun started 4 processes, but torchr",
        ),
        (
            {"OMPI_COMM_WORLD_SIZE": "2"},
            "mpirun started 2 processes, but torchrun's variables are missing: start by to",
        ),
        ({"PMI_SIZE": "8"}, "mpiexec started 8 processes"),
        (
            {"WORLD_SIZE": "x"},
            "WORLD_SIZE is 'x' in the environment, not 1 or more; mend or unset it, or start by torch",
        ),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0' in the environment, not 1 or more"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is '' in the environment, not 1 or more"),
        ({"LOCAL_RANK": "1e3"}, "LOCAL_RANK is '1e3' in the environment, not 0 or more"),
        (
            {"WORLD_SIZE": "2"},
            "WORLD_SIZE is 2, but there is no RANK and no MASTER_ADDR and no MASTER_PORT; start by tor",
        ),
        (TWO | {"MASTER_ADDR": ""}, "WORLD_SIZE is 2, but there is no MASTER_ADDR; start by torchrun"),
        (TWO | {"RANK": "two"}, "RANK is 'two' in the environment, not 0 to 1"),
        (TWO | {"RANK": "2"}, "RANK is '2' in the environment, not 0 to 1"),
        (TWO | {"MASTER_PORT": "65536"}, "MASTER_PORT is '65536' in the environment, not 0 to 65535"),
        (TWO | {"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1' in the environment, not 0 or more"),
    ],
)
def test_processes_that_cannot_find_each_other_are_refused(given, message, monkeypatch):
    set_environment(monkeypatch, **given)
    with pytest.raises(UserError) as error:
        start_distributed("cpu")
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"WORLD_SIZE": "1"},
        {"SLURM_NTASKS": "4"},  # an allocation, by salloc
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # a script, by sbatch
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # a shell on a node, or srun -n 1
        {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "WORLD_SIZE": "1"},  # four runs, as the message says
    ],
)
def test_one_process_in_an_allocation_of_many_runs_alone(given, monkeypatch):
    set_environment(monkeypatch, **given)
    assert start_distributed("cpu").type == "cpu"
    assert world_size() == 1


def test_a_process_without_a_gpu_of_its_own_is_refused(monkeypatch):
    set_environment(monkeypatch, **TWO | {"RANK": "1", "LOCAL_RANK": "1"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for device in ("auto", "cuda"):
        with pytest.raises(
            UserError, match=r"LOCAL_RANK is 1, but this process sees 1 GPU\(s\): start one process for"
        ):
            start_distributed(device)


def test_a_port_that_is_taken_is_named(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        set_environment(monkeypatch, **TWO | {"MASTER_PORT": port})
        with pytest.raises(UserError, match=f"the processes cannot meet at localhost:{port} .*; give another MASTER_A"):
            start_distributed("cpu")
    assert world_size() == 1


# --- one process -----------------------------------------------------------------------------------------------------


def test_gather_is_the_identity_in_one_process():
    x = rand(3, 2)
    assert gather(x) is x


def test_cpu_is_always_there_and_an_unknown_device_is_refused(monkeypatch):
    assert start_distributed("cpu").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device 'cuda': this torch sees no GPU; try --device cpu"):
        start_distributed("cuda")
    for name in ("gpu", "meta"):  # which makes tensors, but computes nothing
        with pytest.raises(UserError, match=f"device '{name}' cannot be used here"):
            start_distributed(name)


def test_several_processes_do_not_share_a_gpu(monkeypatch):
    set_environment(monkeypatch, WORLD_SIZE=2, RANK=0, MASTER_ADDR="localhost", MASTER_PORT=29500)
    with pytest.raises(UserError, match="device 'cuda:1' would be shared by all processes"):
        start_distributed("cuda:1")


def test_alone_a_process_talks_to_itself():
    x, layer = rand(3), torch.nn.Sequential(torch.nn.BatchNorm1d(3))
    assert average(x) is x and agree(5) == 5 and on_rank_zero(lambda: 7) == 7
    assert on_every_rank(lambda: 7) == [7]
    with pytest.raises(KeyError):
        on_rank_zero(lambda: {}["x"])
    assert distribute(layer, x.device) is layer
    assert synchronize_norms(layer, torch.device("cuda")) is layer


# --- two processes ---------------------------------------------------------------------------------------------------


def test_two_processes_hear_the_same_result_mistake_mean_and_number():
    first, second = processes.start(processes.talk)
    assert first["told"] == second["told"] == {"step": 7}
    assert (first["calls"], second["calls"]) == (1, 0)
    assert first["each"] == second["each"] == [{"rank": 0}, {"rank": 1}]
    own, others = "KeyError: 'a fault'", "OtherProcessFailed: process {} failed: KeyError('a fault')"
    of_second = "UserError: of the second"
    assert first["errors"] == ["UserError: a mistake", own, of_second, others.format(1)]
    assert second["errors"] == ["UserError: a mistake", others.format(0), of_second, own]
    for part, x in ((first, [1.0, 3.0]), (second, [2.0, 6.0])):
        assert part["mean"].tolist() == [1.5, 4.5]
        assert part["x"].tolist() == x  # as it was
        assert part["numbers"] == [0, 15, 2]


@pytest.mark.parametrize("name", ["manifold", "uniformity", "contrastive", "vicreg", "sum"])
def test_gathered_loss_on_two_ranks_has_the_gradient_of_one_process(name):
    z = randn(2, 8, 5)
    whole = z.clone().requires_grad_()
    loss = processes.coupled_loss(name, *whole)
    loss.backward()
    for part in processes.start(processes.gradient_of_gathered_loss, name, z):
        torch.testing.assert_close(part["loss"], loss.detach())
        torch.testing.assert_close(part["gradient"], whole.grad, rtol=1e-9, atol=1e-12)


SIMCLR = {"gather": True, "ssl": "simclr", "lam": 0.0}


@pytest.mark.parametrize("fields", [{"gather": True}, {"gather": False}, {"gather": False, "accumulate": 2}, SIMCLR])
def test_two_ranks_have_the_gradient_of_one_process(fields):
    """With --gather that of the whole batch; without, the mean of the gradients of each part on its own."""
    fields = fields | {"uniformity": 0.5}
    images, mask = images_of(8, 8), random_mask(8, 4, 0.5, generator(0))
    images = torch.stack([images, images.flip(-1)], dim=1) if "ssl" in fields else images  # two views
    parts = 1 if fields["gather"] else 2 * fields.get("accumulate", 1)
    method = tiny_magma(**fields | {"gather": False})
    method.view = lambda views: views
    for part, hidden in zip(images.chunk(parts), mask.chunk(parts), strict=True):
        (method(part, mask=hidden)["loss"] / parts).backward()
    want = {name: p.grad for name, p in method.named_parameters()}
    for gradients in processes.start(processes.gradients_of_magma, fields, images, mask):
        assert gradients.keys() == want.keys()
        for name, gradient in gradients.items():
            assert (gradient - want[name]).norm() < 1e-4 * want[name].norm(), name


def test_with_a_graph_in_each_process_the_other_losses_are_gathered_alone():
    """--gather --no-gather-graph, the way of MAGMA's code."""
    images, mask = images_of(8, 8), random_mask(8, 4, 0.5, generator(0))
    want = {}
    for weight, parts, fields in ((1, 2, {}), (1, 1, {"lam": 0.0, "uniformity": 0.5}), (-1, 1, {"lam": 0.0})):
        method = tiny_magma(**fields)
        for part, hidden in zip(images.chunk(parts), mask.chunk(parts), strict=True):
            (method(part, mask=hidden)["loss"] / parts).backward()
        for name, p in method.named_parameters():
            want[name] = want.get(name, 0.0) + weight * p.grad
    fields = {"uniformity": 0.5, "gather": True, "gather_graph": False}
    for gradients in processes.start(processes.gradients_of_magma, fields, images, mask):
        for name, gradient in gradients.items():
            assert (gradient - want[name]).norm() < 1e-4 * want[name].norm(), name


def test_gradients_are_averaged_once_where_the_backward_pass_computes_again():
    """FINOLA with --recompute under DDP: the mean over the ranks, each with batch norms of its own."""
    fields, images = {"width": "micro4", "image_size": 16, "recompute": True}, images_of(6, 16).double()
    parts = [tiny_finola(**fields).double() for _ in range(2)]
    for method, part in zip(parts, images.chunk(2), strict=True):
        (method(part)["loss"] / 2).backward()
    for gradients in processes.start(processes.gradients_of_finola, images, fields):
        for (name, one), two in zip(parts[0].named_parameters(), parts[1].parameters(), strict=True):
            torch.testing.assert_close(gradients[name], one.grad + two.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_fit_on_two_ranks_keeps_the_weights_equal_and_resumes(tmp_path):
    first, second = processes.start(processes.fit_tiny, tmp_path / "run", [])
    assert same_weights(first["weights"], second["weights"])
    assert first["rows"] == second["rows"] == 3
    assert [line["epoch"] for line in log_of(tmp_path / "run")[1:]] == [0, 1, 2, 3, 4]
    again, _ = processes.start(processes.fit_tiny, tmp_path / "run", ["--resume"])
    assert same_weights(first["weights"], again["weights"])
