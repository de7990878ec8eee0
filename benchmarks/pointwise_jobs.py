"""Everything that is no GEMM, at pix2pix's shapes, against eager PyTorch and torch.compile."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from jobs import EAGER, OURS, UNET_256_PARAMETERS, Job, Runner, comparison, image, size
from torch import Tensor

from fastp2p.ops import adam_ref, augment_ref, norm_act, norm_stats, running_stats_ref
from fastp2p.ops._activation import ACTIVATIONS
from fastp2p.ops.patch_loss import KINDS

# Normalised maps (channels, side): after e2, e4 and e7, and after D's layer of stride 1
MAPS = {"e2": (128, 64), "e4": (512, 16), "e7": (512, 2), "D4": (512, 31)}
operators = torch.ops.fastp2p


def pointwise_jobs(rehearse: bool) -> Iterator[Job]:
    dtype = torch.float32 if rehearse else torch.bfloat16
    for batch in (1,) if rehearse else (1, 16):
        for name, (channels, side) in {"e2": (8, 4)}.items() if rehearse else MAPS.items():
            yield from norm_jobs(name, (batch, channels, side, side), dtype)
        yield from loss_jobs(batch, 6 if rehearse else 30, 8 if rehearse else 256, dtype)
        yield from augment_jobs(batch, *((10, 8) if rehearse else (286, 256)))
    yield from adam_jobs(5000 if rehearse else UNET_256_PARAMETERS)
    yield from running_stats_jobs(8 if rehearse else 512)


def norm_jobs(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Job]:
    """norm_stats alone; norm and LeakyReLU with their statistics, forward, both ways, and the gradient alone."""
    batch, once = shape[0], size((shape, dtype.itemsize))
    vector = shape[1] * 4  # of one float32 a channel: mean, var, weight, bias and the gradients of these two

    def tensors(requires_grad: bool) -> tuple[Tensor, ...]:
        parameters = (torch.randn(shape[1]).requires_grad_(requires_grad) for _ in range(2))
        return image(*shape, dtype=dtype).requires_grad_(requires_grad), *parameters, image(*shape, dtype=dtype)

    facts = {"map": name, "batch": batch, "dtype": str(dtype).removeprefix("torch."), "shape": list(shape)}
    yield from comparison(
        f"norm_stats {name} batch {batch}",
        "norm_stats",
        partial(norm_stats, stat_groups=1),
        _plain_stats,
        lambda: (image(*shape, dtype=dtype),),
        n_bytes=once + 2 * vector,
        input_bytes=once,
        **facts,
    )
    # Forward x is read for the statistics, then read and written; backward x and dy are read twice and dx is written
    case, inputs = f"norm_act {name} forward batch {batch}", partial(tensors, False)
    moved = {"n_bytes": 3 * once + 6 * vector, "input_bytes": once + 2 * vector}
    yield from comparison(case, "norm_act", _norm_act, _plain_norm_act, inputs, **moved, **facts)
    case, inputs = f"norm_act {name} both ways batch {batch}", partial(tensors, True)
    moved = {"n_bytes": 8 * once + 12 * vector, "input_bytes": 2 * once + 2 * vector}
    yield from comparison(case, "norm_act", _norm_act, _plain_norm_act, inputs, wrap=_both_ways, **moved, **facts)
    case = f"norm_act {name} backward batch {batch}"
    moved = {"n_bytes": 5 * once + 6 * vector, "input_bytes": 2 * once + 4 * vector}
    yield Job(case, "norm_act", OURS, lambda: _backward(*tensors(False)), **moved, facts=facts)
    yield Job(case, "norm_act", EAGER, lambda: _plain_backward(*tensors(True)), **moved, facts=facts)


def _plain_stats(x: Tensor) -> tuple[Tensor, ...]:
    return torch.var_mean(x.float(), dim=(0, 2, 3), correction=0)


def _norm_act(x: Tensor, weight: Tensor, bias: Tensor, _: Tensor) -> Tensor:
    return norm_act(x, *norm_stats(x, stat_groups=1), weight, bias, activation="leaky_relu")[0]


def _plain_norm_act(x: Tensor, weight: Tensor, bias: Tensor, _: Tensor) -> Tensor:
    return F.leaky_relu(F.batch_norm(x, None, None, weight, bias, training=True), 0.2)


def _both_ways(forward: Callable[..., Tensor]) -> Callable[..., object]:
    return lambda *tensors: torch.autograd.grad(forward(*tensors), tensors[:3], tensors[3])


def _backward(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> Runner:
    settings = (1e-5, ACTIVATIONS.index("leaky_relu"), 0.2, -1, 0.0, 0, False)
    mean, var = norm_stats(x, stat_groups=1)
    return lambda _: operators.norm_act_backward(dy, None, x, mean, var, weight, bias, None, *settings)


def _plain_backward(*tensors: Tensor) -> Runner:
    y = _plain_norm_act(*tensors)
    return lambda _: torch.autograd.grad(y, tensors[:3], tensors[3], retain_graph=True)


def loss_jobs(batch: int, map_side: int, image_side: int, dtype: torch.dtype) -> Iterator[Job]:
    """D's loss on its map of logits, and G's L1 on the image, with their gradients."""

    def ours(x: Tensor, target: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
        return operators.patch_loss(x.detach(), target, KINDS.index(kind), 1.0, 1.0, False)

    def plain(x: Tensor, target: Tensor | None, kind: str) -> Tensor:
        if kind == "l1":
            return F.l1_loss(x.float(), target)
        return F.binary_cross_entropy_with_logits(x.float(), torch.ones_like(x, dtype=torch.float32))

    def with_gradient(forward: Callable[..., Tensor]) -> Callable[..., object]:
        return forward if forward is ours else lambda x, *rest: torch.autograd.grad(forward(x, *rest), x)

    def tensors(kind: str) -> tuple[Tensor | str | None, ...]:
        channels, side = (3, image_side) if kind == "l1" else (1, map_side)
        x = image(batch, channels, side, side, dtype=dtype).requires_grad_()
        return x, image(batch, 3, side, side, dtype=torch.float32) if kind == "l1" else None, kind

    for kind, elements, read in (
        ("bce", batch * map_side**2, dtype.itemsize),
        ("l1", batch * 3 * image_side**2, dtype.itemsize + 4),  # and the target
    ):
        yield from comparison(
            f"patch_loss {kind} batch {batch}",
            "patch_loss",
            ours,
            plain,
            partial(tensors, kind),
            wrap=with_gradient,
            n_bytes=elements * (read + dtype.itemsize),  # dx written
            input_bytes=elements * read,
            kind=kind,
            batch=batch,
        )


def augment_jobs(batch: int, load_size: int, crop_size: int) -> Iterator[Job]:
    """A batch out of 32 resident pairs, against the reference, which reads indices back and cannot be captured."""

    def tensors() -> tuple[Tensor, ...]:
        pairs = torch.randint(0, 256, (32, load_size, load_size, 6), dtype=torch.uint8)
        index = torch.randperm(32)[:batch]  # no pair twice, so that no byte is read twice
        return pairs, index, torch.randint(0, load_size - crop_size + 1, (batch, 2)), index % 2 == 0

    values = batch * crop_size**2 * 6  # uint8 read, float32 written
    yield from comparison(
        f"augment batch {batch}",
        "augment",
        lambda *t: operators.augment(*t, crop_size, 3, torch.float32),
        lambda *t: augment_ref(*t, crop_size, 3),
        tensors,
        n_bytes=values * (1 + 4),
        input_bytes=values,
        compiled=False,
        capturable_plain=False,
        batch=batch,
    )


def adam_jobs(parameters: int) -> Iterator[Job]:
    """One step over all of unet_256, without a low-precision copy, against torch.optim.Adam's ways."""

    def tensors() -> tuple[Tensor, ...]:
        param, grad, exp_avg, exp_avg_sq = (torch.randn(parameters) for _ in range(4))
        powers = torch.tensor([0.5, 0.999], dtype=torch.float64)
        return param, grad, exp_avg, exp_avg_sq.square_(), torch.tensor(2e-4), powers

    def ours(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, lr: Tensor, powers: Tensor) -> None:
        operators.adam(param, grad, exp_avg, exp_avg_sq, lr, powers, 0.5, 0.999, 1e-8)

    def plain(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, lr: Tensor, powers: Tensor) -> None:
        adam_ref(param, grad, exp_avg, exp_avg_sq, lr, powers, 0.5, 0.999, 1e-8)

    def optimizer(**way: bool) -> Runner:
        parameter = torch.nn.Parameter(torch.randn(parameters))
        parameter.grad = torch.randn(parameters)
        capturable = parameter.is_cuda  # the step count on the device, as a graph needs it
        step = torch.optim.Adam([parameter], lr=2e-4, betas=(0.5, 0.999), capturable=capturable, **way).step
        return lambda _: step()

    case, facts = "adam", {"parameters": parameters}
    moved = {"n_bytes": parameters * 28, "input_bytes": parameters * 16}  # 16 read, 12 written
    ours_alone, _, by_compile = comparison(case, "adam", ours, plain, tensors, **moved, **facts)
    yield from (ours_alone, by_compile)
    for provider, way in ((EAGER, {"foreach": True}), ("eager, fused", {"fused": True})):
        yield Job(case, "adam", provider, partial(optimizer, **way), **moved, facts=facts)


def running_stats_jobs(channels: int) -> Iterator[Job]:
    """One group's update, against the four operations of eager PyTorch, two per buffer."""

    def plain(running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor) -> None:
        running_stats_ref(running_mean, running_var, mean, var, 1024, 0.1)

    yield from comparison(
        f"running_stats of {channels}",
        "running_stats",
        lambda *t: operators.running_stats(*t, 1024, 0.1),
        plain,
        lambda: (torch.randn(channels), torch.rand(channels), torch.randn(1, channels), torch.rand(1, channels)),
        n_bytes=channels * 6 * 4,  # four vectors read, two written
        input_bytes=channels * 4 * 4,
        channels=channels,
    )
