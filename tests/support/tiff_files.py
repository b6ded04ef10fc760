"""TIFF files with any tags, as other programs than Pillow write them."""

import struct
import zlib

_SIZES = {3: "H", 4: "I"}
_DEFLATE = 8


def tiff(
    pixels: bytes | list[bytes],
    size: tuple[int, int],
    bits: list[int],
    photometric: int | None,
    *,
    order: str = "<",
    compressed: bool = False,
    **tags: int | list[int],
) -> bytes:
    """A file of one strip, or of several where `pixels` is a list.

    Args:
        pixels: the strips, before compression.
        size: (width, height).
        bits: of every sample of a pixel.
        photometric: PhotometricInterpretation; None leaves the tag out.
        order: "<" or ">", of the numbers in the file.
        compressed: by Deflate.
        tags: further ones as t339=1.
    """
    strips = [pixels] if isinstance(pixels, bytes) else pixels
    strips = [zlib.compress(strip) if compressed else strip for strip in strips]
    values = {
        256: [size[0]],
        257: [size[1]],
        258: bits,
        259: [_DEFLATE if compressed else 1],
        277: [len(bits)],
        278: [size[1]],
        279: [len(strip) for strip in strips],
        **({} if photometric is None else {262: [photometric]}),
        **{int(tag[1:]): value if isinstance(value, list) else [value] for tag, value in tags.items()},
    }
    values[273] = [0] * len(strips)
    kinds = dict.fromkeys(values, 3) | dict.fromkeys((256, 257, 273, 278, 279), 4)

    def packed(tag: int) -> bytes:
        return struct.pack(f"{order}{len(values[tag])}{_SIZES[kinds[tag]]}", *values[tag])

    # What does not fit into its entry follows the directory, then come the strips.
    place = 8 + 2 + 12 * len(values) + 4
    places = {}
    for tag in sorted(values):
        if len(packed(tag)) > 4:
            places[tag] = place
            place += len(packed(tag))
    for number, strip in enumerate(strips):
        values[273][number] = place
        place += len(strip)
    entries = b""
    for tag in sorted(values):
        inside = struct.pack(f"{order}I", places[tag]) if tag in places else packed(tag).ljust(4, b"\0")
        entries += struct.pack(f"{order}HHI", tag, kinds[tag], len(values[tag])) + inside
    head = b"II*\0" if order == "<" else b"MM\0*"
    head += struct.pack(f"{order}IH", 8, len(values)) + entries + b"\0" * 4
    return head + b"".join(packed(tag) for tag in sorted(places)) + b"".join(strips)
