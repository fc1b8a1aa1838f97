"""Devices, precision, and several processes: the gradient of one process, equal weights, one run folder."""

import processes
import pytest
import torch
from make import generator, images_of, log_of, rand, randn, same_weights, tiny_magma

from common import random_mask
from plumbing.errors import UserError
from plumbing.processes import (
    agree,
    average,
    distribute,
    gather,
    on_rank_zero,
    pick_precision,
    start_distributed,
    synchronize_norms,
)


def test_pick_precision_is_bf16_only_where_the_processor_has_it(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert pick_precision("auto", cpu) == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
    assert pick_precision("auto", cpu) is None
    assert pick_precision("fp16", cpu) == torch.float16
    assert pick_precision("off", cpu) is None


# --- one process -----------------------------------------------------------------------------------------------------


def test_gather_is_the_identity_in_one_process():
    x = rand(3, 2)
    assert gather(x) is x


def test_cpu_is_always_there_and_an_unknown_device_is_refused(monkeypatch):
    assert start_distributed("cpu").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device 'cuda': this torch sees no GPU; try --device cpu"):
        start_distributed("cuda")
    with pytest.raises(UserError, match="device 'gpu' cannot be used here"):
        start_distributed("gpu")


def test_several_processes_do_not_share_a_gpu(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="device 'cuda:1' would be shared by all processes"):
        start_distributed("cuda:1")


def test_alone_a_process_talks_to_itself():
    x, layer = rand(3), torch.nn.Sequential(torch.nn.BatchNorm1d(3))
    assert average(x) is x and agree(5) == 5 and on_rank_zero(lambda: 7) == 7
    with pytest.raises(KeyError):
        on_rank_zero(lambda: {}["x"])
    assert distribute(layer, x.device) is layer
    assert synchronize_norms(layer, torch.device("cuda")) is layer


# --- two processes ---------------------------------------------------------------------------------------------------


def test_two_processes_hear_the_same_result_mistake_mean_and_number():
    first, second = processes.start(processes.talk)
    assert first["told"] == second["told"] == {"step": 7}
    assert (first["calls"], second["calls"]) == (1, 0)
    assert first["errors"] == ["UserError: a mistake", "KeyError: 'a fault'"]
    assert second["errors"] == ["UserError: a mistake", "OtherProcessFailed: process 0 failed: KeyError('a fault')"]
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


@pytest.mark.parametrize("fields", [{"gather": True}, {"gather": False}, {"gather": False, "accumulate": 2}])
def test_two_ranks_have_the_gradient_of_one_process(fields):
    """With --gather that of the whole batch; without, the mean of the gradients of each part on its own."""
    fields |= {"uniformity": 0.5}
    images, mask = images_of(8, 8), random_mask(8, 4, 0.5, generator(0))
    parts = 1 if fields["gather"] else 2 * fields.get("accumulate", 1)
    method = tiny_magma(**fields | {"gather": False})
    for part, hidden in zip(images.chunk(parts), mask.chunk(parts), strict=True):
        (method(part, mask=hidden)["loss"] / parts).backward()
    want = {name: p.grad for name, p in method.named_parameters()}
    for gradients in processes.start(processes.gradients_of_magma, fields, images, mask):
        assert gradients.keys() == want.keys()
        for name, gradient in gradients.items():
            assert (gradient - want[name]).norm() < 1e-4 * want[name].norm(), name


def test_fit_on_two_ranks_keeps_the_weights_equal_and_resumes(tmp_path):
    first, second = processes.start(processes.fit_tiny, tmp_path / "run", [])
    assert same_weights(first["weights"], second["weights"])
    assert first["rows"] == second["rows"] == 3
    assert [line["epoch"] for line in log_of(tmp_path / "run")[1:]] == [0, 1, 2, 3, 4]
    again, _ = processes.start(processes.fit_tiny, tmp_path / "run", ["--resume"])
    assert same_weights(first["weights"], again["weights"])
