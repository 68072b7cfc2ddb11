"""Constants of released language models, for the conversion and the doctor."""

DELTA_SCALE = 0.05  # RMSNorm scales of a model are of the order of 1, those of a delta below 0.01
PADDED_VOCABULARY = 64  # embeddings may be padded with unused rows to a multiple of this
