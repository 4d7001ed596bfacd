"""What LaMDA must save on BART, counted by hand from the architecture, to hold the measurement against.

LoRA's gradient of A needs every adapted layer's input. Some are there anyway: the output projection
reads what fused attention keeps. What LoRA alone keeps, a token (h wide; layers of equal input share it):

    encoder layer    6 h    into query/key/value h, into fc1 h, into fc2 4 h
    decoder layer    7 h    the same, and h into the cross-attention's query
    once               h    the encoder's output, into all cross-attention keys and values

Besides, both keep A x, r numbers for each adapted layer: LoRA of its rank, LaMDA of its own.
"""

from __future__ import annotations

from benchmarks.suites.cases import LAMDA, LORA, Group
from benchmarks.suites.shapes import config_of

FLOAT = 4  # bytes


def saved_by_lamda(group: Group, scale: str) -> int:
    """Bytes that LoRA keeps for backward and LaMDA (B frozen) does not; BART in float32."""
    config = config_of(group.shape, scale)
    encoder, decoder = group.batch * group.length, group.batch * group.target  # tokens
    below, above = config.encoder_layers, config.decoder_layers
    inputs = config.d_model * (encoder * (6 * below + 1) + decoder * 7 * above)
    # q, k, v, out, fc1, fc2; of cross-attention q and out see the decoder's tokens, k and v the encoder's
    applied = encoder * (6 * below + 2 * above) + decoder * 8 * above
    ranks = LORA["adapter"]["r"] - LAMDA["adapter"]["r"]
    return FLOAT * (inputs + applied * ranks)
