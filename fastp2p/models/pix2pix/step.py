"""The training step of pix2pix on fused operators: `fastp2p.models.pix2pix.reference.train_step` without autograd."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastp2p.engine.arena import Arena, Reduce, dead_taps_move
from fastp2p.engine.loss_scale import LossScale
from fastp2p.engine.network import FusedNetwork
from fastp2p.engine.operation import NONE, TANH
from fastp2p.engine.plan import INPUT, Plan, plan_network
from fastp2p.engine.ranges import part
from fastp2p.engine.record import about, net_on_meta
from fastp2p.engine.share_counts import share_counts
from fastp2p.engine.step import Batch, LossValues
from fastp2p.engine.supported import HINT, Supported, check_optimizer
from fastp2p.errors import InputError
from fastp2p.models.pix2pix.losses import Losses
from fastp2p.models.pix2pix.networks import UnetGenerator
from fastp2p.nn.block import Convolution
from fastp2p.nn.padding import reflect_pad_to_multiple
from fastp2p.ops.objectives import OBJECTIVES, GanMode, Target
from fastp2p.ops.patch_loss import KINDS

operators = torch.ops.fastp2p


DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
D_WEIGHT = 0.5  # the paper halves D's objective, to slow it down beside G (section 3.3)


def layer_names(net: nn.Module) -> list[str]:
    """What tables call the convolutions in the order in which they run: in a U-Net e1 ... e8, d8 ... d1, else c1 ..."""
    if isinstance(net, UnetGenerator):
        levels = range(1, net.levels + 1)
        return [f"e{i}" for i in levels] + [f"d{i}" for i in reversed(levels)]
    return [f"c{i}" for i in range(1, 1 + sum(isinstance(module, Convolution) for module in net.modules()))]


def _first_convolution(net: nn.Module) -> nn.Conv2d | nn.ConvTranspose2d:
    for module in net.modules():
        if isinstance(module, Convolution):
            return module
    raise InputError(f"engine: got a {type(net).__name__} without convolutions; expected a generator, a discriminator")


def _check_ends(G: Plan, D: Plan, size: tuple[int, int]) -> None:
    """Raise InputError where the networks begin or end otherwise than the step's gradients take for granted."""
    last = G.output_layer()
    if len(G.outputs) != 1 or last is None or not last.activation_in_conv or last.activation != TANH:
        raise InputError(f"engine: got a generator that does not end in a convolution and Tanh{HINT}")
    if last.out_size != size:
        raise InputError(f"engine: got a generator of {last.out_size} from an image of {size}; expected the same{HINT}")
    last = D.output_layer()
    if len(D.outputs) != 1 or last is None or not last.activation_in_conv or last.activation != NONE:
        raise InputError(f"engine: got a discriminator that does not end in a convolution of logits{HINT}")
    if [node for node in D.nodes if INPUT in node.sources] != D.layers[:1] or D.layers[0].transposed:
        raise InputError(f"engine: got a discriminator whose input something else reads than one convolution{HINT}")


class FusedStep:
    """One step of D, then one of G through the D just updated: (real_A, real_B) -> losses.

    The networks and optimizers stay what they were: their parameters and states become views of the step's arenas, so
    checkpoints, and the reference step, go on from wherever this one has come to.

    Args:
        netG, netD: in training mode, on one device; their parameters are in float32, in float64 to compute in it.
        optimizer_G, optimizer_D: torch.optim.Adam over them; their learning rate is read at every step.
        size: (height, width) of the images, in pixels.
        dtype: of activations, compute weights and activation gradients: bfloat16, float16, float32, or float64 for
            proofs. Masters, statistics, reductions and losses are in float32 or float64.
        gan_mode, lambda_L1: the objective.
        seed, step: of the dropouts' masks; step is that of the first call, counted from 0.
        loss_scale: (2,) float32 on the device, `LossScale.new_state` or what became of it: for float16, and updated.
        reduce: called with the flat gradients of netD, and later of netG, before they are used: for an all-reduce.
        skip_dead_taps: leave out the taps of a kernel that meet padding alone, which changes no result.

    Raises:
        InputError: on networks in eval mode, on several devices or in another dtype; on networks that do what the
            engine does not compute (the text names the module); on shared or frozen parameters, networks that do not
            fit each other or are too deep for the size. On an optimizer that is not Adam itself, over exactly one
            network's parameters in one group; on its hooks, other options than lr, betas and eps, or states of unequal
            steps. On another dtype to compute in; on a seed or step that is no whole number.
    """

    def __init__(
        self,
        netG: nn.Module,
        netD: nn.Module,
        optimizer_G: torch.optim.Adam,
        optimizer_D: torch.optim.Adam,
        *,
        size: tuple[int, int],
        dtype: torch.dtype = torch.float32,
        gan_mode: GanMode = "vanilla",
        lambda_L1: float = 100.0,
        seed: int = 0,
        step: int = 0,
        loss_scale: Tensor | None = None,
        reduce: Reduce | None = None,
        skip_dead_taps: bool = True,
    ):
        self.nets, self.optimizers = (netG, netD), (optimizer_G, optimizer_D)
        for optimizer in self.optimizers:
            check_optimizer(optimizer)
        self._check_training()
        for net in self.nets:
            Supported(net)
        if dtype not in DTYPES:
            raise InputError(f"engine: got dtype {dtype}, expected one of {', '.join(map(str, DTYPES))}")
        self.dtype, self.size, self.lambda_L1 = dtype, size, lambda_L1
        self.gan_mode, self.objective = gan_mode, OBJECTIVES[gan_mode]
        self.reduce = reduce
        device = next(netG.parameters()).device
        if not isinstance(seed, int) or not isinstance(step, int):
            raise InputError(f"engine: got seed {seed!r} and step {step!r}, expected whole numbers")
        rng = torch.tensor([seed, step - 1], device=device)  # a step counts itself first
        self.loss_scale: LossScale | None = None
        if dtype == torch.float16:
            self.loss_scale = LossScale(LossScale.new_state(device) if loss_scale is None else loss_scale)

        self.multiple = 2**netG.levels if isinstance(netG, UnetGenerator) else 1  # G's sides are padded to multiples
        missing = [-side % self.multiple for side in size]
        self.padding = [(n // 2, n - n // 2) for n in missing]  # (before, after)
        sizes = ((size[0] + missing[0], size[1] + missing[1]), size)
        plans = self._plans(sizes, skip_dead_taps and reduce is None and self.loss_scale is None)
        _check_ends(plans[0], plans[1], sizes[0])
        unscale = None if self.loss_scale is None else self.loss_scale.unscale
        self.netG, self.netD = (
            FusedNetwork(plan, Arena([net], optimizer, [plan], dtype, reduce=reduce, unscale=unscale), rng)
            for plan, net, optimizer in zip(plans, self.nets, self.optimizers, strict=True)
        )
        self.counts = share_counts({self.netG: 1, self.netD: 3}, rng)  # D sees fake, real, and fake again
        self.rng = self.netG.rng
        self.supported = [Supported(net) for net in self.nets]  # as they are from now on

    def _check_training(self) -> None:
        if not all(net.training for net in self.nets):
            raise InputError("engine: got a network in eval mode, expected training mode: call .train() first")

    def _plans(self, sizes: Sequence[tuple[int, int]], skip_dead_taps: bool) -> list[Plan]:
        """Both networks' plans, with all taps where Adam still moves those that could be left out."""
        netG, netD = self.nets
        input_nc = _first_convolution(netG).in_channels
        G = plan_network(netG, input_nc, sizes[0], names=layer_names(netG), skip_dead_taps=skip_dead_taps)
        self.channels = (input_nc, G.out_channels[0])  # real_A's, real_B's
        seen, expected = _first_convolution(netD).in_channels, sum(self.channels)
        if seen != expected:
            raise InputError(
                f"engine: got a discriminator of {seen} channels, expected {expected}: it sees the generator's input "
                "and output"
            )
        plans = [G, plan_network(netD, expected, sizes[1], names=layer_names(netD), skip_dead_taps=skip_dead_taps)]
        self.skips_dead_taps = skip_dead_taps and not any(map(dead_taps_move, plans, self.optimizers))
        return plans if self.skips_dead_taps == skip_dead_taps else self._plans(sizes, False)

    @property
    def networks(self) -> dict[str, FusedNetwork]:
        """Each network by the name that tables give it."""
        return {"netG": self.netG, "netD": self.netD}

    @property
    def arenas(self) -> dict[str, Arena]:
        """Each network's parameters, by the network's name."""
        return {name: net.arena for name, net in self.networks.items()}

    def on_meta(self) -> "FusedStep":
        """Make a twin that calls the same operators, on networks whose tensors have no values."""
        netG, netD = map(net_on_meta, self.nets)
        optimizers = (
            torch.optim.Adam(net.parameters(), betas=(of.arena.beta1, of.arena.beta2), eps=of.arena.eps)
            for net, of in zip((netG, netD), self.networks.values(), strict=True)
        )
        return FusedStep(
            *(netG, netD, *optimizers),
            size=self.size,
            dtype=self.dtype,
            gan_mode=self.gan_mode,
            lambda_L1=self.lambda_L1,
            reduce=None if self.reduce is None else lambda gradients: None,
            skip_dead_taps=self.skips_dead_taps,
        )

    def __call__(self, real_A: Tensor, real_B: Tensor) -> Losses[Tensor]:
        """Train both networks on one batch.

        Args:
            real_A, real_B: (N, C, H, W) in [-1, 1] of the size that the step was made for, any floating dtype and
                layout, on the networks' device.

        Returns:
            The four losses, () float32 (float64 for float64), on the device. Reading them synchronises.

        Raises:
            InputError: when they do not fit each other, the networks or the size.
        """
        return Losses(**self.train({"A": real_A, "B": real_B}))

    def train(self, batch: Batch) -> LossValues:
        """`__call__` on the named images A and B."""
        images = real_A, _ = (batch["A"], batch["B"])
        expected = [(max(1, len(real_A)), channels, *self.size) for channels in self.channels]
        fit = [tuple(x.shape) for x in images] == expected and {x.device for x in images} == {self.rng.device}
        if not fit or not all(x.is_floating_point() for x in images):
            got = " and ".join(f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}" for x in images)
            raise InputError(
                f"engine: got real_A, real_B {got}; this step was made for floating {expected[0]} and {expected[1]} on "
                f"{self.rng.device}"
            )
        self.prepare()
        losses = self.launch(batch)
        self.conclude()
        return losses

    @property
    def image_dtypes(self) -> dict[str, torch.dtype]:
        """Both networks read A in the dtype of computing; fake_B is compared with B in float32."""
        return {"A": self.dtype}

    @property
    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """(C, H, W) of the images that the step takes, by name."""
        return {name: (channels, *self.size) for name, channels in zip("AB", self.channels, strict=True)}

    def prepare(self) -> None:
        """Before `launch`, and on the host: take over learning rates, and parameters changed in between.

        Raises:
            InputError: when the networks or optimizers are no longer what the step was made of.
        """
        self._check_training()
        for supported, optimizer in zip(self.supported, self.optimizers, strict=True):
            supported.check_again()
            check_optimizer(optimizer)
        for net in (self.netG, self.netD):
            net.arena.prepare()

    def conclude(self) -> None:
        """After `launch`, and on the host: the parameters have changed."""
        for net in (self.netG, self.netD):
            net.arena.conclude()

    @property
    def device(self) -> torch.device:
        """Where the step computes."""
        return self.rng.device

    def launch(self, batch: Batch) -> LossValues:
        """The step's work on the device, nothing else, so that a CUDA graph can hold it."""
        # Below autograd, since the operators' autograd layer, in Python, costs as much as a launch
        device_type = self.rng.device.type
        has_autocast = torch.amp.is_autocast_available(device_type)  # the meta device has none
        autocast = torch.autocast(device_type, enabled=False) if has_autocast else nullcontext()
        with torch._C._AutoDispatchBelowAutograd(), autocast:
            try:
                return self._step(batch["A"], batch["B"])._asdict()
            except BaseException:  # such as one of `reduce`'s, or want of memory: the caller may go on
                self.counts.take_back()
                raise

    def _step(self, real_A: Tensor, real_B: Tensor) -> Losses[Tensor]:
        """Isola et al., section 3.3 and equation 4, in upstream's order."""
        n, netG, netD = len(real_A), self.netG, self.netD
        if self.loss_scale is not None:
            self.loss_scale.begin()

        with part("netG forward"):
            self.counts.advance(self, n)
            real_A = real_A.to(self.dtype, memory_format=torch.channels_last)
            kept_G = netG.forward(reflect_pad_to_multiple(real_A, self.multiple))
            fake_B = self._crop(*netG.outputs(kept_G))

        # D: fake and real in one pass, as two batches with statistics of their own
        with part("netD forward"):
            about(netD, None, "pairs", 2 * n)
            pairs = operators.stack_pairs(real_A, fake_B, real_B)
            kept = netD.forward(pairs, batches=2)
            (logits,) = netD.outputs(kept)
            targets = self.objective.D_fake, self.objective.D_real
            losses, dlogits, sums = self._loss(netD, logits, *targets, dx_weight=D_WEIGHT, sums=True)
            loss_D_fake, loss_D_real = losses.unbind()
        with part("netD backward and Adam"):
            netD.backward_and_adam(kept, dlogits, seed_sums=[sums])

        # G: D's weights are fixed, its gradient flows through to fake_B, and on through fake_B's tanh
        with part("netD forward and backward for netG"):
            kept = netD.forward(pairs[:n])  # moves D's running averages once more, as upstream's third pass does
            (logits,) = netD.outputs(kept)
            loss_G_GAN, dlogits, _ = self._loss(netD, logits, self.objective.G)
            dz = netD.input_gradient(kept, dlogits, first_channel=real_A.shape[1], gate=fake_B, activation=TANH)
            L1 = Target("l1", real_B)
            loss_G_L1, dz, sums = self._loss(
                netG, fake_B, L1, weight=self.lambda_L1, through_tanh=True, addend=dz, sums=True
            )
        with part("netG backward and Adam"):
            netG.backward_and_adam(kept_G, self._pad(dz), seed_sums=[sums])

        if self.loss_scale is not None:
            self.loss_scale.update()
        return Losses(loss_G_GAN, loss_G_L1, loss_D_real, loss_D_fake)

    def _loss(
        self,
        net: FusedNetwork,
        x: Tensor,
        target: Target,
        second: Target | None = None,
        *,
        weight: float = 1.0,
        dx_weight: float = 1.0,
        through_tanh: bool = False,
        addend: Tensor | None = None,
        sums: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the operator patch_loss gives of a network's output.

        The gradient, and not the loss, is multiplied by dx_weight, and in float16 by the loss scale.
        """
        tensor, value = (target.value, 0.0) if isinstance(target.value, Tensor) else (None, target.value)
        halves = {} if second is None else {"second_kind": KINDS.index(second.kind), "second_value": second.value}
        loss: Tensor
        about(net, None, "loss", len(x))
        loss, dx, channels = operators.patch_loss(
            *(x, tensor, KINDS.index(target.kind), value, weight, through_tanh),
            **halves,
            dx_weight=dx_weight,
            dx_scale=None if self.loss_scale is None else self.loss_scale.scale,
            addend=addend,
            sums=sums,
        )
        return loss, dx, channels

    def _crop(self, padded: Tensor) -> Tensor:
        (top, _), (left, _) = self.padding
        height, width = self.size
        cropped = padded[..., top : top + height, left : left + width]
        return cropped.contiguous(memory_format=torch.channels_last)

    def _pad(self, dz: Tensor) -> Tensor:
        """The gradient at the size that G works at: what was cropped away has none."""
        (top, bottom), (left, right) = self.padding
        if not (top or bottom or left or right):
            return dz
        return F.pad(dz, (left, right, top, bottom)).contiguous(memory_format=torch.channels_last)
