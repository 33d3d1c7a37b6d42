"""The safetensors header of a patch; read by `ie.header`, which loads no torch."""

from ie.header import MAX_HEADER_BYTES, Metadata, Tensors, factor_shapes, read_document, read_header

__all__ = ["MAX_HEADER_BYTES", "Metadata", "Tensors", "factor_shapes", "read_document", "read_header"]
