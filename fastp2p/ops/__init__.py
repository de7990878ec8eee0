"""The operators of the pix2pix step, one file each: reference, schema, fake, gradient, public function."""

from fastp2p.ops._library import operators, served_by
from fastp2p.ops.adam import adam, adam_ref
from fastp2p.ops.augment import augment, augment_ref
from fastp2p.ops.patch_loss import patch_loss, patch_loss_ref

__all__ = ["adam", "adam_ref", "augment", "augment_ref", "operators", "patch_loss", "patch_loss_ref", "served_by"]
