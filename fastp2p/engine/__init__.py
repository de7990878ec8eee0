"""The engine: the training step on fused operators, without autograd."""

from fastp2p.engine.ceilings import H200, Ceilings, measure_ceilings
from fastp2p.engine.cost import Cost, count_step, step_floor
from fastp2p.engine.graph import GraphedStep
from fastp2p.engine.loss_scale import LossScale
from fastp2p.engine.network import kept_elements
from fastp2p.engine.plan import Plan, plan_network, plan_table
from fastp2p.engine.step import FusedStep

__all__ = [
    "H200",
    "Ceilings",
    "Cost",
    "FusedStep",
    "GraphedStep",
    "LossScale",
    "Plan",
    "count_step",
    "kept_elements",
    "measure_ceilings",
    "plan_network",
    "plan_table",
    "step_floor",
]
