"""The arena: parameters are views, other programs go on with them, gradients in one bucket, dead taps."""

import copy
import io
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.nets import Trained, batches, small_nets
from torch import nn

from fastp2p.errors import InputError
from fastp2p.nn.norm import take_statistics_of_samples

F64, SIZE = torch.float64, (16, 16)


def same(one: Trained, other: Trained) -> bool:
    found = other.tensors()
    return all(torch.equal(value, found[name]) for name, value in one.tensors().items())


def test_parameters_and_moments_are_views_of_flat_buffers():
    nets = small_nets(dtype=torch.float32)
    before = {name: value.clone() for name, value in nets.netG.state_dict().items()}
    step = nets.fused(SIZE, torch.bfloat16)
    for name, value in nets.netG.state_dict().items():
        assert torch.equal(value, before[name])
    for net, fused, optimizer in zip((nets.netG, nets.netD), (step.netG, step.netD), nets.optimizers, strict=True):
        arena = fused.arena
        for parameter in net.parameters():
            state = optimizer.state[parameter]
            buffers = (arena.param, arena.exp_avg, arena.exp_avg_sq)
            for view, flat in zip((parameter, state["exp_avg"], state["exp_avg_sq"]), buffers, strict=True):
                assert view.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
        assert sum(p.numel() for p in net.parameters()) <= arena.param.numel()
        assert arena.compute.dtype == torch.bfloat16


@pytest.mark.parametrize("first", ["fused", "reference"])
def test_engines_take_over_from_each_other(first: str):
    """Three steps of one, three of the other on the same objects, against six of the reference."""
    nets = small_nets(levels=3)
    twin = nets.twin()
    data = list(batches(2, SIZE, F64, steps=6))
    for batch in data:
        expected = nets.reference(*batch)
    halves = [data[:3], data[3:]]
    for engine, half in zip([first, "reference" if first == "fused" else "fused"], halves, strict=True):
        step = twin.reference if engine == "reference" else twin.fused(SIZE, F64)
        for batch in half:
            losses = step(*batch)
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=1e-10, atol=1e-12)
    steps = {float(value) for name, value in twin.tensors().items() if name.endswith(".step")}
    assert steps == {6.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_resume_through_files_is_bit_exact(dtype: torch.dtype):
    nets = small_nets(levels=4, dropout="paper", dtype=torch.float32)
    twin = nets.twin()
    data = list(batches(2, SIZE, torch.float32, steps=6))
    step = nets.fused(SIZE, dtype, seed=3)
    for batch in data:
        step(*batch)

    scale = torch.tensor([2.0**16, 0.0])
    step = twin.fused(SIZE, dtype, seed=3, loss_scale=scale)
    for batch in data[:4]:
        step(*batch)
    buffer = io.BytesIO()
    torch.save([(net.state_dict(), optimizer.state_dict()) for net, optimizer in zip(
        (twin.netG, twin.netD), twin.optimizers, strict=True)], buffer)  # fmt: skip
    buffer.seek(0)
    fresh = small_nets(levels=4, dropout="paper", dtype=torch.float32, seed=99)
    saved = torch.load(buffer, weights_only=True)
    for net, optimizer, (weights, state) in zip((fresh.netG, fresh.netD), fresh.optimizers, saved, strict=True):
        net.load_state_dict(weights)
        optimizer.load_state_dict(state)
    step = fresh.fused(SIZE, dtype, seed=3, step=4, loss_scale=scale)
    for batch in data[4:]:
        step(*batch)
    assert same(nets, fresh)


def test_learning_rate_is_read_at_every_step():
    nets = small_nets()
    twin = nets.twin()
    step = twin.fused(SIZE, F64)
    for lr, batch in zip((2e-3, 1e-3, 0.0), batches(2, SIZE, F64), strict=True):
        for optimizer in (*nets.optimizers, *twin.optimizers):
            optimizer.param_groups[0]["lr"] = lr
        weight = twin.netG.model.model[0].weight.clone()
        losses, expected = step(*batch), nets.reference(*batch)
        torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=1e-11, atol=1e-12)
    assert torch.equal(weight, twin.netG.model.model[0].weight)


def test_replicas_that_average_their_buckets_are_one_batch():
    """Data-parallel training, with two threads for two processes: an image each, against both together."""
    whole = small_nets(levels=3)
    for net in (whole.netG, whole.netD):
        take_statistics_of_samples(net)
    whole = Trained(whole.netG, whole.netD)
    replicas = [whole.twin(), whole.twin()]
    barrier, buckets = threading.Barrier(2), {}

    def train(rank: int) -> None:
        def average(grad: torch.Tensor) -> None:
            buckets[rank] = grad.clone()
            barrier.wait()
            grad.copy_((buckets[0] + buckets[1]) / 2)
            barrier.wait()

        step = replicas[rank].fused(SIZE, F64, reduce=average)
        for real_A, real_B in batches(2, SIZE, F64):
            step(real_A[rank : rank + 1], real_B[rank : rank + 1])

    default = torch.get_default_device()  # which each thread has of its own
    with ThreadPoolExecutor(2, initializer=torch.set_default_device, initargs=(default,)) as pool:
        list(pool.map(train, range(2)))
    step = whole.fused(SIZE, F64)
    for batch in batches(2, SIZE, F64):
        step(*batch)
    for replica in replicas:
        for net, expected in ((replica.netG, whole.netG), (replica.netD, whole.netD)):
            for value, parameter in zip(net.parameters(), expected.parameters(), strict=True):
                # Adam divides by the gradient's size: where that is near 0 its rounding shows as a part of lr, 2e-3
                torch.testing.assert_close(value, parameter, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dead_taps_take_no_part(dtype: torch.dtype):
    """16 px through four levels: e4 and d4 have four taps of sixteen that ever meet a pixel. With the others or without
    them the results are the same, but for the order in which products add up, and the others keep every bit.
    """
    wide = torch.promote_types(dtype, torch.float32)
    nets = small_nets(levels=4, dtype=wide)
    twin = nets.twin()
    steps = [nets.fused(SIZE, dtype), twin.fused(SIZE, dtype, skip_dead_taps=False)]
    dead = [[layer.name for layer in step.netG.plan.layers if layer.taps.count == 2] for step in steps]
    assert dead == [["e4", "d4"], []]
    (e4,) = (layer.weight for layer in steps[0].netG.plan.layers if layer.name == "e4")
    before = e4.detach().clone()
    for batch in batches(1, SIZE, wide, steps=5):
        losses, expected = (step(*batch) for step in steps)
        tolerance = 20 * torch.finfo(dtype).eps  # a rounding or two in each of eleven layers
        torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=tolerance, atol=tolerance)
    (with_all_taps,) = (layer.weight for layer in steps[1].netG.plan.layers if layer.name == "e4")
    for weight in (e4, with_all_taps):
        unchanged = weight == before
        assert unchanged[:, :, [0, 3]].all()
        assert unchanged[:, :, :, [0, 3]].all()
        assert not unchanged[:, :, 1:3, 1:3].all()


def test_dead_taps_with_moments_are_not_skipped():
    """Trained at a larger size before, Adam still moves them."""
    nets = small_nets(levels=4)
    twin = nets.twin()
    for size, steps in (((32, 32), 2), (SIZE, 2)):
        step = twin.fused(size, F64)
        for batch in batches(1, size, F64, steps=steps):
            expected, losses = nets.reference(*batch), step(*batch)
            torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=1e-10, atol=1e-12)
    assert all(layer.taps.count == 4 for layer in step.netG.plan.layers)


def test_weights_changed_from_outside_are_seen():
    """A bfloat16 step computes with rounded copies: they follow load_state_dict, and steps of the reference."""
    nets = small_nets(levels=3, dtype=torch.float32)
    twin = nets.twin()
    data = list(batches(2, SIZE, torch.float32, steps=4))
    step = nets.fused(SIZE, torch.bfloat16)
    step(*data[0])
    nets.reference(*data[1])
    losses = step(*data[2])
    twin.fused(SIZE, torch.bfloat16)(*data[0])
    twin.reference(*data[1])
    expected = twin.fused(SIZE, torch.bfloat16, step=1)(*data[2])  # makes its copies anew
    assert torch.equal(torch.stack(losses), torch.stack(expected))
    other = small_nets(levels=3, dtype=torch.float32, seed=9)
    nets.netG.load_state_dict(other.netG.state_dict())
    twin.netG.load_state_dict(other.netG.state_dict())
    losses, expected = step(*data[3]), twin.fused(SIZE, torch.bfloat16, step=2)(*data[3])
    assert torch.equal(torch.stack(losses), torch.stack(expected))


@pytest.mark.parametrize("how", ["another step", "to", "load_state_dict", "optimizer", "batches"])
def test_a_step_whose_buffers_were_left_says_so(how: str):
    """Otherwise it would train what nobody reads any more."""
    nets = small_nets(levels=3)
    step = nets.fused(SIZE, F64)
    batch = next(batches(1, SIZE, F64))
    step(*batch)
    match how:
        case "another step":
            nets.fused(SIZE, F64)
        case "to":
            nets.netG.to(memory_format=torch.contiguous_format)
        case "load_state_dict":
            nets.netD.load_state_dict(copy.deepcopy(nets.netD.state_dict()), assign=True)
        case "optimizer":
            nets.optimizers[0].load_state_dict(copy.deepcopy(nets.optimizers[0].state_dict()))
        case "batches":
            nets.netG.get_submodule("model.model.1.model.2").num_batches_tracked = torch.tensor(1)
    with pytest.raises(InputError, match=r"were replaced since this step was made|was changed after the step was made"):
        step(*batch)
    if how == "load_state_dict":  # which leaves the optimizer behind as well
        nets = Trained(nets.netG, nets.netD)
    nets.fused(SIZE, F64)(*batch)


def test_a_learning_rate_may_be_a_tensor():
    nets = small_nets(levels=3)
    step = nets.fused(SIZE, F64)
    for optimizer in nets.optimizers:
        optimizer.param_groups[0]["lr"] = torch.tensor(1e-3, dtype=F64)
    batch = next(batches(1, SIZE, F64))
    step(*batch)
    for optimizer in nets.optimizers:
        optimizer.param_groups[0]["lr"].fill_(0.0)
    before = nets.netG.model.model[0].weight.clone()
    step(*batch)
    assert torch.equal(before, nets.netG.model.model[0].weight)


def test_adams_of_different_counts():
    """Each has the powers of its own: D's Adam was at its fourth step when G's began."""
    nets = small_nets(levels=3)
    twin = nets.twin()
    data = list(batches(2, SIZE, F64, steps=4))
    for one in (nets, twin):
        one.reference(*data[0])
        for state in one.optimizers[1].state.values():
            state["step"] += 3
    step = twin.fused(SIZE, F64)
    for batch in data[1:]:
        losses, expected = step(*batch), nets.reference(*batch)
        torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=1e-10, atol=1e-12)
    for optimizer, count in zip(twin.optimizers, (4.0, 7.0), strict=True):
        assert {float(state["step"]) for state in optimizer.state.values()} == {count}


def test_counts_are_loaded_and_copied():
    """Numbers of batches go with state_dict and deepcopy, and load_state_dict writes into those that count."""
    nets = small_nets(levels=3)
    name, batch = "model.model.1.model.2.num_batches_tracked", next(batches(1, SIZE, F64))
    step = nets.fused(SIZE, F64)
    step(*batch)
    copied, saved = copy.deepcopy(nets.netG), copy.deepcopy(nets.netG.state_dict())
    step(*batch)
    assert [net.state_dict()[name] for net in (nets.netG, copied)] == [2, 1]
    nets.netG.load_state_dict(saved | {name: torch.tensor(7)})
    step(*batch)
    assert nets.netG.state_dict()[name] == 8
    assert {int(norm.num_batches_tracked) for norm in step.netD.batch_norms} == {9}


def test_a_parameter_of_both_networks_is_refused():
    """Each arena would move it into its own buffer, and G's would train what nobody reads."""
    norm = [nn.BatchNorm2d(4) for _ in range(2)]
    norm[1].bias = norm[0].bias
    G = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), norm[0], nn.ReLU(), nn.Conv2d(4, 3, 3, 1, 1), nn.Tanh()).double()
    D = nn.Sequential(nn.Conv2d(6, 4, 3, 1, 1), norm[1], nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 3, 1, 1)).double()
    norm[1].bias = norm[0].bias
    with pytest.raises(InputError, match="were replaced since this step was made"):
        Trained(G, D).fused(SIZE, F64)


def test_a_step_that_is_given_up_counts_nothing():
    """An exception of `reduce` in D's backward pass, caught; then the same bits as without it."""
    raises = [True]

    def reduce(gradients: torch.Tensor) -> None:
        if raises.pop() if raises else False:
            raise MemoryError("once")

    nets = small_nets(levels=4, dropout="paper", norm="instance")
    twin = nets.twin()
    step, other = nets.fused(SIZE, F64, reduce=reduce), twin.fused(SIZE, F64, reduce=lambda gradients: None)
    data = list(batches(1, SIZE, F64, steps=2))
    with pytest.raises(MemoryError):
        step(*data[0])
    for batch in data:
        assert torch.equal(torch.stack(step(*batch)), torch.stack(other(*batch)))
    assert torch.equal(step.rng, other.rng)
    for optimizer in nets.optimizers:
        assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}


def test_norms_may_share_a_counter():
    nets = small_nets(levels=4)
    first, second, *_ = [m for m in nets.netG.modules() if isinstance(m, nn.BatchNorm2d)]
    second.num_batches_tracked = first.num_batches_tracked
    step = nets.fused(SIZE, F64)
    step(*next(batches(1, SIZE, F64)))
    assert first.num_batches_tracked is second.num_batches_tracked
    assert first.num_batches_tracked == 2


def test_a_step_that_is_no_whole_number_is_refused():
    nets = small_nets(levels=3)
    with pytest.raises(InputError, match=r"got seed 0 and step 2\.0, expected whole numbers"):
        nets.fused(SIZE, F64, step=2.0)
    nets.fused(SIZE, F64, step=2)(*next(batches(1, SIZE, F64)))


def test_unequal_steps_are_refused():
    nets = small_nets(levels=3)
    nets.reference(*next(batches(1, SIZE, F64)))
    nets.optimizers[1].state[nets.netD.model[0].weight]["step"] += 1
    with pytest.raises(InputError, match="got Adam states of 2 different step counts, expected one for all"):
        nets.fused(SIZE, F64)


@pytest.mark.parametrize("option", ["weight_decay", "amsgrad", "maximize"])
def test_other_optimizers_are_refused(option: str):
    nets = small_nets()
    nets.optimizers[0].param_groups[0][option] = 0.1
    with pytest.raises(InputError, match=f"got Adam with {option}=0.1, expected it off"):
        nets.fused(SIZE, F64)


def test_parameters_in_several_groups_are_refused():
    nets = small_nets()
    weight, *rest = nets.netD.parameters()
    nets.optimizers[1] = torch.optim.Adam([{"params": [weight]}, {"params": rest}])
    with pytest.raises(InputError, match="must have exactly its networks' parameters, each once, in one group"):
        nets.fused(SIZE, F64)
