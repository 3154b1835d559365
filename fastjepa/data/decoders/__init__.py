"""Ways to decode: each gives the frames that `fastjepa.data.decode` counts, or is not chosen for a file."""
