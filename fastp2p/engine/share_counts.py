"""One launch for what a step's networks and their arenas count."""

from collections.abc import Mapping

from torch import Tensor, nn

from fastp2p.engine.counts import Counts
from fastp2p.engine.network import FusedNetwork
from fastp2p.nn.norm import statistics_groups


def share_counts(networks: Mapping[FusedNetwork, int], rng: Tensor) -> Counts:
    """Let one launch count what networks and their arenas count; a step calls `advance` before all else.

    Batch norms' num_batches_tracked, the networks' rng and Adam's steps become views of the counts.

    Args:
        networks: each with an arena of its own -> the batches that it sees in a step, each of the step's images.
        rng: (2,) int64, (seed, step) of the step before the first.
    """
    gains: dict[nn.BatchNorm2d, tuple[int, int]] = {}
    for network, passes in networks.items():
        for norm in network.batch_norms:
            step, image = gains.get(norm, (0, 0))
            gains[norm] = step + statistics_groups(norm, 0, passes), image + passes * statistics_groups(norm, 1, 0)
    counters = {norm: norm.num_batches_tracked for norm in gains if norm.num_batches_tracked is not None}
    arenas = [network.arena for network in networks]
    counts = Counts(
        [arena.steps for arena in arenas],
        [arena.betas for arena in arenas],
        [*rng, *counters.values()],
        [(0, 0), (1, 0), *(gains[norm] for norm in counters)],
    )
    for norm, counter in zip(counters, counts.counters[2:], strict=True):
        norm.num_batches_tracked = counter
    for number, network in enumerate(networks):
        network.arena.share_counts(counts, number)
        network.counts, network.rng = counts, counts.counters[:2]
    return counts
