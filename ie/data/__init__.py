"""Data: records, published layouts, instruction templates, dataset building, tokenised batches."""
