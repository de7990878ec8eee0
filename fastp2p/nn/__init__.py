"""Fused layers to build with, and fuse(model) for models that exist."""

from fastp2p.nn.fuse import Fused, FuseReport, Left, fuse, unfuse
from fastp2p.nn.layers import ConvNormAct, PatchGANLoss, UpConvNormAct

__all__ = ["ConvNormAct", "FuseReport", "Fused", "Left", "PatchGANLoss", "UpConvNormAct", "fuse", "unfuse"]
