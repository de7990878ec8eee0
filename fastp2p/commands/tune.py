"""fastp2p tune: which kernels a training run takes, measured on this machine, as a table."""

import math

from fastp2p import terminal
from fastp2p.config import RunConfig
from fastp2p.device import describe_device, prepare
from fastp2p.errors import InputError
from fastp2p.ops import kernel_choices
from fastp2p.ops.kernel_choices import Table, name_of
from fastp2p.terminal import Say
from fastp2p.train.state import TrainState
from fastp2p.tuner.contest import why_not
from fastp2p.tuner.operations import Operation, operations
from fastp2p.tuner.store import candidates_of, tuned


def tune_networks(config: RunConfig, *, again: bool, say: Say = terminal.say) -> str:
    """Measure what a training run with this configuration takes.

    Returns:
        A table to read: each operation's candidates, the choice, and their sums.
    """
    device, resolved = prepare(config)
    step = TrainState.new(resolved, device, fingerprint="").engine_step(resolved)
    if (reason := why_not(device, step.dtype)) is not None:
        raise InputError(f"tune: there is nothing to choose from, {reason}")
    place = kernel_choices.place_of(device)
    wanted = operations(step, config.batch_size)
    compile_first = candidates_of(step, config.batch_size, device, say)
    choices = tuned(wanted, place, say, again=again, compile_first=compile_first)
    return f"{describe_device(device)}, {place.environment}\n{format_table(wanted, choices)}"


def format_table(wanted: list[Operation], choices: Table) -> str:
    """Each operation with its candidates' milliseconds, the fastest first, and the sums."""
    lines = [f"{'convolution':<34}{'problem':<48}{'chosen':<34}{'rule':>8} ms  candidates, ms"]
    sums = {"chosen": 0.0, "rule": 0.0}
    for operation in wanted:
        name, key = operation.name, operation.problem.key
        measured = choices.get(operation.problem)
        if measured is None:
            lines.append(f"{name:<34}{key:<48}by rule")
            continue
        chosen, rule_ms = name_of(measured.choice), measured.ms.get(measured.rule, math.nan)
        sums["chosen"] += measured.ms.get(chosen, math.nan)
        sums["rule"] += rule_ms
        times = sorted(measured.ms.items(), key=lambda item: item[1])[:4]
        candidates = ", ".join(f"{candidate} {ms:.3f}" for candidate, ms in times)
        mark = "" if chosen == measured.rule else " *"
        lines.append(f"{name:<34}{key:<48}{chosen + mark:<34}{rule_ms:8.3f}     {candidates}")
    lines.append(f"each once: {sums['chosen']:.2f} ms as chosen, {sums['rule']:.2f} by rule (* not the rule's choice)")
    return "\n".join(lines)
