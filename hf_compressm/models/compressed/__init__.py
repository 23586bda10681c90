"""Compressed forms of selective models; their classes are made when they are asked for."""

from .configuration_compressed import compressed_config_class
from .modeling_compressed import compressed_class_of, compressed_model_class, saves_itself, stock_class_of
from .registration import register_stock_family
from .stock_families import STOCK_FAMILIES, ScanCall, StockFamily

__all__ = [
    "STOCK_FAMILIES",
    "ScanCall",
    "StockFamily",
    "compressed_class_of",
    "compressed_config_class",
    "compressed_model_class",
    "register_stock_family",
    "saves_itself",
    "stock_class_of",
]
