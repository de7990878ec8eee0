"""The engine: the training step on fused operators, without autograd."""

from fastp2p.engine.graph import GraphedStep
from fastp2p.engine.loss_scale import LossScale
from fastp2p.engine.network import kept_elements
from fastp2p.engine.plan import Plan, plan_network, plan_table
from fastp2p.engine.step import FusedStep

__all__ = ["FusedStep", "GraphedStep", "LossScale", "Plan", "kept_elements", "plan_network", "plan_table"]
