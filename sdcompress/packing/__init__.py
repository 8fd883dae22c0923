"""A bundle in one file, as small as its numbers allow: the format `.sdz`, version 1.

    offset 0    8 bytes     magic "\\x89SDZ\\r\\n\\x1a\\n"
           8    u32         version of the format, 1
          12    chunks      one after the other, without gaps (`coding` says what is in one)
         ...    index       JSON, one zstd frame (`index.Index`)
     end - 56   u64, u64    bytes of the index, stored and raw
                32 bytes    sha256 of all above: of the first 12 bytes, the stored index and its two
                            sizes
                8 bytes     the magic again

Integers are little-endian. The index lists the files, `manifest.json` first, and of each file its
parts from its first byte to its last: tensors, and what lies between them. A part is cut into
chunks of `step` bytes; the index says where they begin and how long each is, and of a tensor its
name, type, shape and the sha256 of its bytes. So any tensor can be read alone (`read_tensor`), and
neither packing nor unpacking holds more than a few chunks.

The index holds the sha256 of the manifest, which is the digest of the bundle, and the manifest that
of every other file: what `unpack` puts in place is the bundle that was packed, bit for bit, or
nothing.

A pack may come from anybody. Before a file is written every name is found to stay inside the
bundle, every size to be one that the stored bytes can hold (at most 1024 raw bytes to a stored one,
chunks of at most 8 MiB) and to agree with the manifest, and the disk to have room. Index and
manifest may hold 2^18 values each, so that reading them takes no more than memory for these.
"""

from sdcompress.packing.reader import Pack, read_tensor, unpack
from sdcompress.packing.writer import FileSizes, Packed, pack

__all__ = ["FileSizes", "Pack", "Packed", "pack", "read_tensor", "unpack"]
