"""What a model learns from and meets: sources, corruptions, streams."""

from trimtab.data.corruptions import CORRUPTIONS, corrupt
from trimtab.data.partitions import dirichlet_partition
from trimtab.data.sources import Images, digits, fashion_mnist, image_folder, parquet_images
from trimtab.data.streams import batches, continual, dirichlet, iid, mixed, sorted_by_label

__all__ = [
    "CORRUPTIONS",
    "Images",
    "batches",
    "continual",
    "corrupt",
    "digits",
    "dirichlet",
    "dirichlet_partition",
    "fashion_mnist",
    "iid",
    "image_folder",
    "mixed",
    "parquet_images",
    "sorted_by_label",
]
