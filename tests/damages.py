"""Ways in which a file is damaged: by a crash, a full disk, a failing one, or a hand."""

from pathlib import Path


def flip_a_byte(file: Path) -> None:
    """Change one bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "flipped": flip_a_byte,
    "zeroed": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "empty": lambda file: file.write_bytes(b""),
    "deleted": Path.unlink,
}
