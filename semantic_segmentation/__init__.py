"""Semantic segmentation on a BEiT backbone: UPerNet and SETR-PUP as mmsegmentation has them, without mmsegmentation."""
