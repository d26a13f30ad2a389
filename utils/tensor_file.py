"""Writes a safetensors file piece by piece, so that a model passes through memory in bands of a few megabytes."""

import json
import math

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "U32": 4}


class TensorFile:
    """A safetensors file of known names, types and shapes whose rows are written in any order, then closed.

    layout: name -> (type as safetensors spells it, shape). `with TensorFile(path, layout) as file: file.write(...)`;
    leaving the block checks that every byte was written."""

    def __init__(self, path, layout):
        self.path, self.layout, self.starts = path, layout, {}
        header, end = {"__metadata__": {"format": "mlx"}}, 0
        for name, (kind, shape) in layout.items():
            start, end = end, end + math.prod(shape) * ITEM_BYTES[kind]
            header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
            self.starts[name] = start
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)                       # data begins at a multiple of 8
        self.data_bytes, self.written = end, 0
        self.data_start = 8 + len(text)
        self.file = open(path, "wb")
        self.file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name, first_row, rows):
        """Put the NumPy array `rows` (bfloat16 as uint16 bits) at row `first_row` of tensor `name`."""
        kind, shape = self.layout[name]
        row_bytes = math.prod(shape[1:]) * ITEM_BYTES[kind]
        assert rows.nbytes == len(rows) * row_bytes and first_row + len(rows) <= shape[0], (name, rows.shape, shape)
        self.file.seek(self.data_start + self.starts[name] + first_row * row_bytes)
        self.file.write(rows.tobytes())
        self.written += rows.nbytes

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        self.file.close()
        assert kind or self.written == self.data_bytes, (self.path, self.written, self.data_bytes)

