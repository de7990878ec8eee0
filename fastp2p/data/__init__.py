"""Folders and files -> pairs -> resident uint8 -> batches of named images."""

from fastp2p.data.crops import Crops
from fastp2p.data.feed import (
    PairDataset,
    batches_per_epoch,
    eval_batches,
    load_split,
    train_crops,
)
from fastp2p.data.format import PairFormat

__all__ = [
    "Crops",
    "PairDataset",
    "PairFormat",
    "batches_per_epoch",
    "eval_batches",
    "load_split",
    "train_crops",
]
