"""Pairs -> uint8 tensors, resident or streamed -> batches of named images."""

import contextlib
import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastp2p.data.crops import Crops
from fastp2p.data.format import PairFormat, levels_warning
from fastp2p.data.images import bad_files_message
from fastp2p.data.jitter import epoch_order, jitter
from fastp2p.data.sources.pairs import Pair, find_pairs, open_root
from fastp2p.device import memory_bytes
from fastp2p.errors import InputError, UnreadablePair, printable

DECODING_BYTES_PER_PIXEL = 20  # each thread's, for a pixel of load_size: both sides, their arrays, both joined


@dataclass
class PairDataset:
    """The usable pairs of one split: `resident` holds all as uint8; where it is None, `read` decodes on demand."""

    pairs: list[Pair]
    format: PairFormat
    resident: Tensor | None = None  # (P, load_size, load_size, C) uint8
    notes: Counter[str] = field(default_factory=Counter)  # a conversion or an oddity -> in how many pairs
    skipped: dict[str, str] = field(default_factory=dict)  # bad files left out -> reason
    ignored: list[str] = field(default_factory=list)  # sub-folders and files that are no images
    warnings: list[str] = field(default_factory=list)  # on the set as a whole
    checksums: list[int] = field(default_factory=list)  # each pair's array has one
    skip_bad: bool = False  # drop a pair that vanishes later, instead of raising
    say: Callable[[str], None] = lambda line: None  # prints a line for each pair that it drops later

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, indices: Sequence[int]) -> list[np.ndarray | str]:
        """These pairs, read anew: each an array of format.shape, or the reason why it cannot be read."""
        return [self.format.decode(self.pairs[i]) for i in indices]

    def assemble(self, indices: Sequence[int], results: list[np.ndarray | str], *, replace: bool) -> Tensor:
        """What `read` gave for these pairs as one tensor: (N, load_size, load_size, C) uint8.

        Args:
            indices, results: of `read`.
            replace: let the next pair that can be read stand in for one that cannot; if not, it is missing.

        Raises:
            UnreadablePair: when a pair cannot be read, unless skip_bad; or none that could stand in.
        """
        arrays = []
        for index, result in zip(indices, results, strict=True):
            if not isinstance(result, str):
                arrays.append(result)
                continue
            self._leave_out(self.pairs[index].name, result)
            if replace:
                arrays.append(self._stand_in(index))
        return torch.from_numpy(np.stack(arrays) if arrays else np.empty((0, *self.format.shape), np.uint8))

    def _leave_out(self, name: str, reason: str) -> None:
        if not self.skip_bad:
            remedy = "Bring it back; a run that is started with --skip-bad goes on without it."
            raise UnreadablePair(f"data: {printable(name)}: {printable(reason)}. {remedy}")
        if name not in self.skipped:
            self.skipped[name] = reason
            self.say(f"skipped {printable(name)}: {printable(reason)}")

    def _stand_in(self, index: int) -> np.ndarray:
        """The next pair that can be read."""
        n = len(self)
        for other in range(index + 1, index + n):
            [result] = self.read([other % n])
            if not isinstance(result, str):
                return result
        raise UnreadablePair(f"data: none of the {n} pairs can be read any more; bring them back")


def load_split(
    data: str,
    split: str,
    format: PairFormat,
    *,
    skip_bad: bool = False,
    stream: Literal["auto", "always", "never"] = "auto",
    room: int | None = None,
    on_read: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> PairDataset:
    """Find, decode once and check all pairs of a split.

    Args:
        data: folder, .zip, or builtin:emoji.
        split: name of the folder in it, "train" or "val".
        format: what to make of each pair.
        skip_bad: leave bad files out (they are listed in `skipped`) instead of raising; later, too, when streaming.
        stream: whether to decode in every epoch anew; "auto" does when they would take more than `room`.
        room: bytes; None is half of the machine's memory.
        on_read: called with the number of pairs read so far, and of all.
        say: takes a line for each pair that cannot be read any more when it is streamed, and is left out.

    Raises:
        InputError: when there are no pairs, or with the list of everything that is wrong with them.
    """
    pairs, bad, ignored = find_pairs(open_root(data), split)
    # Streaming decodes every file here, too: the user learns of a truncated image now, not in an hour.
    arrays = _allocate(len(pairs), format, stream, room)
    good: list[Pair] = []
    notes: Counter[str] = Counter()
    checksums: list[int] = []
    levels = np.zeros((2, 256), bool)
    with _memory_told(format), ThreadPoolExecutor(os.cpu_count()) as pool:
        chunks = (pairs[i : i + 64] for i in range(0, len(pairs), 64))  # so that few arrays wait at a time
        decoded = (zip(chunk, pool.map(format.check, chunk), strict=True) for chunk in chunks)
        for done, (pair, result) in enumerate(itertools.chain.from_iterable(decoded), start=1):
            on_read(done, len(pairs))
            if isinstance(result, str):
                bad[pair.name] = result
                continue
            notes.update([result.note] if result.note else [])
            checksums.append(result.checksum)
            levels |= result.levels
            if arrays is not None:
                arrays[len(good)] = result.array
            good.append(pair)

    if bad and (not skip_bad or not good):
        remedy = f"Repair or remove them, or add --skip-bad to go on with the other {len(good)}."
        if not good:
            remedy = "Nothing is left to train on."
        raise InputError("data: " + bad_files_message(bad, of=len(good) + len(bad), remedy=remedy))
    resident = None if arrays is None else torch.from_numpy(arrays[: len(good)])
    warnings = [text for side, used in zip("AB", levels, strict=True) if (text := levels_warning(side, used))]
    return PairDataset(good, format, resident, notes, bad, ignored, warnings, checksums, skip_bad, say)


@contextlib.contextmanager
def _memory_told(format: PairFormat) -> Iterator[None]:
    """In the `with` block, raise an InputError for want of memory, which is no file's fault."""
    try:
        yield
    except MemoryError as error:
        raise InputError(
            f"data: there is not enough memory to resize pairs to {format.load_size}x{format.load_size} px; "
            "choose a smaller size"
        ) from error


def _allocate(pairs: int, format: PairFormat, stream: str, room: int | None) -> np.ndarray | None:
    """Memory for all pairs, or None where they are streamed. Raises InputError when the machine has too little."""
    there, held = memory_bytes(torch.device("cpu")), pairs * math.prod(format.shape)
    streamed = stream == "always" or (stream == "auto" and held > (there // 2 if room is None else room))
    decoding = (os.cpu_count() or 1) * DECODING_BYTES_PER_PIXEL * format.load_size**2
    need = decoding + (0 if streamed else held)
    try:
        if need > there:
            raise MemoryError
        return None if streamed else np.empty((pairs, *format.shape), np.uint8)
    except MemoryError as error:
        remedy = "choose a smaller size" + ("" if streamed else ", or --stream always")
        raise InputError(
            f"data: {pairs:,} pairs at {format.load_size}x{format.load_size} px take {need / 2**30:.1f} GiB, and there "
            f"are {there / 2**30:.1f} on this machine, or less for this process; {remedy}"
        ) from error


def batches_per_epoch(dataset: PairDataset, batch_size: int) -> int:
    """Batches in an epoch; the last one may be smaller, as upstream's."""
    return -(-len(dataset) // batch_size)


def train_crops(
    dataset: PairDataset, *, seed: int, epoch: int, batch_size: int, crop_size: int, flip: bool, first: int = 0
) -> Iterator[Crops]:
    """The jittered batches of one epoch, from batch number `first` on, yet to be cut out.

    The same for resident and streamed sets; a resident set's draws go to its device once an epoch. When streaming with
    skip_bad, another pair stands in for one that cannot be read any more, so that every epoch has as many steps.

    Raises:
        UnreadablePair: when a streamed pair cannot be read any more.
    """
    order = epoch_order(seed, epoch, len(dataset))[first * batch_size :].tolist()
    span = dataset.format.load_size - crop_size
    draws = [jitter(seed, epoch, i, span=span, flip=flip) for i in order]
    return _crops(dataset, order, draws, batch_size, crop_size, replace=True)


def eval_batches(
    dataset: PairDataset,
    *,
    indices: Sequence[int] | None = None,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
) -> Iterator[dict[str, Tensor]]:
    """These pairs (None: all) in order, whole and unflipped.

    Yields:
        A, B: (N, C, load_size, load_size) float32 in [-1, 1], on the device, contiguous. When streaming with
            skip_bad, without the pairs that cannot be read any more.

    Raises:
        UnreadablePair: when a streamed pair cannot be read any more, or none can.
    """
    wanted = list(range(len(dataset)) if indices is None else indices)
    draws = [(0, 0, False)] * len(wanted)
    crops = _crops(dataset, wanted, draws, batch_size, dataset.format.load_size, replace=False)
    left = 0
    for batch in crops:
        if len(batch):
            left += len(batch)
            yield {name: images.contiguous() for name, images in batch.cut(device).items()}
    if wanted and not left:
        raise UnreadablePair(f"data: none of the {len(wanted)} pairs can be read any more; bring them back")


def _crops(
    dataset: PairDataset,
    order: list[int],
    draws: list[tuple[int, int, bool]],
    batch_size: int,
    crop_size: int,
    *,
    replace: bool,
) -> Iterator[Crops]:
    """Batches of the pairs in this order; draws has (top, left, flip) of each.

    Without `replace` a streamed batch may be smaller than its draws, which must then be all alike.
    """
    where = "cpu" if dataset.resident is None else dataset.resident.device
    offset = torch.tensor([draw[:2] for draw in draws], dtype=torch.int64).to(where)
    flip = torch.tensor([draw[2] for draw in draws], dtype=torch.bool).to(where)
    parts = [slice(i, i + batch_size) for i in range(0, len(order), batch_size)]
    if dataset.resident is not None:
        index = torch.tensor(order, dtype=torch.int64).to(where)
        sources: Iterable[tuple[Tensor, Tensor]] = ((dataset.resident, index[part]) for part in parts)
    else:
        decoded = _decoded_ahead(dataset, [order[part] for part in parts], replace)
        sources = ((pairs, torch.arange(len(pairs))) for pairs in decoded)
    for part, (pairs, which) in zip(parts, sources, strict=True):
        n = len(which)
        yield Crops(pairs, which, offset[part][:n], flip[part][:n], crop_size, dataset.format.input_nc)


def _decoded_ahead(dataset: PairDataset, chosen: list[list[int]], replace: bool, ahead: int = 4) -> Iterator[Tensor]:
    """The pairs of each list, decoded by a pool of threads a few lists ahead."""
    with _memory_told(dataset.format), ThreadPoolExecutor(os.cpu_count()) as pool:
        pending = [pool.submit(dataset.read, indices) for indices in chosen[:ahead]]
        for number, indices in enumerate(chosen):
            results = pending.pop(0).result()
            if number + ahead < len(chosen):
                pending.append(pool.submit(dataset.read, chosen[number + ahead]))
            yield dataset.assemble(indices, results, replace=replace)
