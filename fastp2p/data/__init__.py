"""Folders and files -> pairs -> resident uint8 -> batches (real_A, real_B)."""

from fastp2p.data.dataset import PairDataset, PairFormat, batches_per_epoch, eval_batches, load_split, train_batches
from fastp2p.data.pairs import has_split, open_root

__all__ = [
    "PairDataset",
    "PairFormat",
    "batches_per_epoch",
    "eval_batches",
    "has_split",
    "load_split",
    "open_root",
    "train_batches",
]
