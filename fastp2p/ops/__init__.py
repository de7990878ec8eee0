"""The operators, one file each: reference, schema, fake, gradient, public function."""

from fastp2p.ops.adam import adam, adam_ref
from fastp2p.ops.advance import advance, advance_ref
from fastp2p.ops.augment import augment, augment_ref
from fastp2p.ops.batch_norm_act import batch_norm_act, batch_norm_act_ref
from fastp2p.ops.conv import conv, conv_ref
from fastp2p.ops.conv_transpose import conv_transpose, conv_transpose_ref
from fastp2p.ops.conv_wgrad import conv_wgrad, conv_wgrad_ref
from fastp2p.ops.conv_wgrad_adam import conv_wgrad_adam, conv_wgrad_adam_ref
from fastp2p.ops.library import operators, served_by
from fastp2p.ops.norm_act import norm_act, norm_act_backward_ref, norm_act_ref
from fastp2p.ops.norm_dx import norm_dx, norm_dx_ref
from fastp2p.ops.norm_stats import norm_stats, norm_stats_ref
from fastp2p.ops.patch_loss import patch_loss, patch_loss_ref
from fastp2p.ops.running_stats import running_stats, running_stats_ref
from fastp2p.ops.stack_pairs import stack_pairs, stack_pairs_ref

__all__ = [
    "adam",
    "adam_ref",
    "advance",
    "advance_ref",
    "augment",
    "augment_ref",
    "batch_norm_act",
    "batch_norm_act_ref",
    "conv",
    "conv_ref",
    "conv_transpose",
    "conv_transpose_ref",
    "conv_wgrad",
    "conv_wgrad_adam",
    "conv_wgrad_adam_ref",
    "conv_wgrad_ref",
    "norm_act",
    "norm_act_backward_ref",
    "norm_act_ref",
    "norm_dx",
    "norm_dx_ref",
    "norm_stats",
    "norm_stats_ref",
    "operators",
    "patch_loss",
    "patch_loss_ref",
    "running_stats",
    "running_stats_ref",
    "served_by",
    "stack_pairs",
    "stack_pairs_ref",
]
