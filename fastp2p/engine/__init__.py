"""The engine: plans, buffers and graphs of steps on fused operators, without autograd."""

from fastp2p.engine.graph import GraphedStep
from fastp2p.engine.loss_scale import LossScale
from fastp2p.engine.plan import Plan, plan_network

__all__ = ["GraphedStep", "LossScale", "Plan", "plan_network"]
