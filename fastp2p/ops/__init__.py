"""The operators of the pix2pix step, one file each: reference, schema, fake, gradient, public function."""

from fastp2p.ops._library import operators, served_by
from fastp2p.ops.adam import adam, adam_ref
from fastp2p.ops.augment import augment, augment_ref
from fastp2p.ops.down import down, down_ref
from fastp2p.ops.norm_act import norm_act, norm_act_backward_ref, norm_act_ref
from fastp2p.ops.norm_stats import norm_stats, norm_stats_ref
from fastp2p.ops.patch_loss import patch_loss, patch_loss_ref
from fastp2p.ops.running_stats import running_stats, running_stats_ref
from fastp2p.ops.up import up, up_ref
from fastp2p.ops.wgrad import wgrad, wgrad_ref
from fastp2p.ops.wgrad_adam import wgrad_adam, wgrad_adam_ref

__all__ = [
    "adam",
    "adam_ref",
    "augment",
    "augment_ref",
    "down",
    "down_ref",
    "norm_act",
    "norm_act_backward_ref",
    "norm_act_ref",
    "norm_stats",
    "norm_stats_ref",
    "operators",
    "patch_loss",
    "patch_loss_ref",
    "running_stats",
    "running_stats_ref",
    "served_by",
    "up",
    "up_ref",
    "wgrad",
    "wgrad_adam",
    "wgrad_adam_ref",
    "wgrad_ref",
]
