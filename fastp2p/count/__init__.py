"""What a training step must do, counted before it runs."""

from fastp2p.count.ceilings import H200, Ceilings, measure_ceilings
from fastp2p.count.cost import Cost, count_step, step_floor
from fastp2p.count.tables import plan_table

__all__ = ["H200", "Ceilings", "Cost", "count_step", "measure_ceilings", "plan_table", "step_floor"]
