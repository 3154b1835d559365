"""Decoders of whole batches, beside `fastjepa.data.decode` which reads one video at a time on the CPU."""
