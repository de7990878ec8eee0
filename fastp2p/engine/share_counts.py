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
    norms: dict[Tensor, list[nn.BatchNorm2d]] = {}  # by their counter, which several may share
    gains: dict[Tensor, tuple[int, int]] = {}
    for network, passes in networks.items():
        for norm in network.batch_norms:
            counter = norm.num_batches_tracked
            if counter is not None:
                step, image = gains.get(counter, (0, 0))
                step, image = step + statistics_groups(norm, 0, passes), image + passes * statistics_groups(norm, 1, 0)
                norms.setdefault(counter, []).append(norm)
                gains[counter] = step, image
    arenas = [network.arena for network in networks]
    counts = Counts(
        [arena.steps for arena in arenas],
        [arena.betas for arena in arenas],
        [*rng, *norms],
        [(0, 0), (1, 0), *gains.values()],
    )
    for sharing, counter in zip(norms.values(), counts.counters[2:], strict=True):
        for norm in sharing:
            norm.num_batches_tracked = counter
    for number, network in enumerate(networks):
        network.arena.share_counts(counts, number)
        network.counts, network.rng = counts, counts.counters[:2]
    return counts
