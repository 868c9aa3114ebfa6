"""The files of a data set: what a folder or a zip holds, which names mean the same, which images can be taken.

Every reader and converter goes through here, so that all take the same files and refuse the rest in the same words.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import lzma
import os
import posixpath
import struct
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

import PIL.Image
import PIL.ImageOps

from .errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
NAME_SUFFIXES = (*IMAGE_SUFFIXES, ".tif", ".tiff", ".gif", ".exr", ".ppm", ".tga")  # that a name may have had
METADATA = "dataset.json"
ORIENTATION = 0x0112  # the EXIF tag; 1 is upright

# What Python, zipfile and Pillow raise on files that are damaged, hostile, or of a kind they do not know.
READ_ERRORS = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RuntimeError,  # RecursionError and NotImplementedError too
    MemoryError,
    struct.error,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
    PIL.Image.DecompressionBombError,
)


def reason(error: BaseException) -> str:
    """What an exception says, in one line."""
    if isinstance(error, PIL.UnidentifiedImageError):
        return "it is no image"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.rpartition("/")[2].startswith(".")  # "._": macOS's zips


def clean_name(name: str) -> str:
    """A name as a path from the root: in Unicode's composed form, with / between folders, without ./ and empty parts.

    Raises:
        UserError: It leaves the root.
    """
    parts = unicodedata.normalize("NFC", name).replace("\\", "/").split("/")
    if ".." in parts:
        raise UserError(f"the name {name} leaves the data set by '..': name images by their path inside it")
    return "/".join(part for part in parts if part not in ("", "."))


def name_key(name: str, tops: Iterable[str] = ()) -> str:
    """What of an image's name counts: its clean name, without an image's suffix and without one of the folders `tops`.

    Raises:
        UserError: It leaves the root.
    """
    name = clean_name(name)
    stem, suffix = os.path.splitext(name)
    key = stem if suffix.lower() in NAME_SUFFIXES else name
    return next((key[len(top) + 1 :] for top in tops if key.startswith(f"{top}/")), key)


def pair_names(images: Iterable[str], entries: Iterable[str], tops: Sequence[str] = ()) -> dict[str, str]:
    """Which entry of a .json belongs to which image: {image: entry}, in the order of the entries.

    They are paired by `name_key`. If that finds no pair, folders that all entries or all images share do not count (a
    top folder added, removed or renamed); on both sides at once only if then every name finds its partner.

    Args:
        images: Names of files. Of several with one key the one with the entry's suffix is meant.
        entries: The names in the .json.
        tops: See `name_key`.

    Raises:
        UserError: A name leaves the root, two entries name one image, or two images fit one entry.
    """
    ours: dict[str, list[str]] = {}
    for image in images:
        ours.setdefault(name_key(image, tops), []).append(image)
    theirs: dict[str, str] = {}
    for entry in entries:
        key = name_key(entry, tops)
        if key in theirs:
            raise UserError(f"{theirs[key]} and {entry} name the same image: remove one of them")
        theirs[key] = entry
    cut_ours, cut_theirs = _shared_folders(ours.keys(), theirs.keys())
    pairs = {}
    for key, entry in theirs.items():
        found = ours.get(cut_ours + key.removeprefix(cut_theirs), [])
        if len(found) > 1:
            found = [name for name in found if os.path.splitext(name)[1] == os.path.splitext(entry)[1]] or found
        if len(found) > 1:
            raise UserError(f"{found[0]} and {found[1]} both fit the name {entry}: remove or rename one of them")
        if found:
            pairs[found[0]] = entry
    return pairs


def _shared_folders(ours: Collection[str], theirs: Collection[str]) -> tuple[str, str]:
    """The leading folders, of our and of their keys, without which the keys meet; empty where they meet as they are."""

    def folders(keys: Collection[str]) -> list[str]:
        shared = posixpath.commonpath([posixpath.dirname(key) for key in keys]) if keys else ""
        return list(itertools.accumulate(f"{part}/" for part in shared.split("/") if part))

    def without(keys: Collection[str], folder: str) -> set[str]:
        return {key.removeprefix(folder) for key in keys}

    tries = [("", ""), *(("", folder) for folder in folders(theirs)), *((folder, "") for folder in folders(ours))]
    for a, b in tries:
        if without(ours, a) & without(theirs, b):
            return a, b
    for a, b in zip(folders(ours)[:1], folders(theirs)[:1], strict=False):
        if without(ours, a) == without(theirs, b):
            return a, b
    return "", ""


def walk(folder: Path) -> Iterator[Path]:
    """The files below a folder in order of name, those in linked folders too; a link back to a folder above is left.

    Raises:
        OSError: A folder cannot be read.
    """

    def below(folder: str, above: tuple[str, ...]) -> Iterator[str]:
        real = os.path.realpath(folder)
        if real in above:
            return
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.is_dir():
                yield from below(entry.path, (*above, real))
            elif entry.is_file() or entry.is_symlink():  # a broken link is not passed over in silence
                yield entry.path

    return map(Path, below(str(folder), ()))


class Files:
    """The files of a data set: a zip, a folder, or a .json with its images beside it.

    Args:
        path: Of the zip, the folder or the .json.

    Attributes:
        names: Of all files, relative to the zip or folder.
        metadata: The name of dataset.json (or of the .json), None if there is none: of several the one in the top-most
            folder, which then is the root of the images' names.
        tops: Folders that do not count at the head of a name: the root, and the set's own name.

    Raises:
        UserError: Nothing there, no zip and no folder, or two files of one name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._archive: tuple[int, zipfile.ZipFile] | None = None  # process id, its open file
        self.folder: Path | None = path if path.is_dir() else path.parent if path.suffix.lower() == ".json" else None
        if not path.exists():
            self.fail("there is no such file or folder")
        if self.folder is None:
            self.names = [name for name in self._zip().namelist() if not name.endswith(("/", "\\"))]
            twice = next((name for name, count in Counter(self.names).items() if count > 1), None)
            if twice is not None:
                self.fail(f"holds {twice} twice: pack it again")
        else:
            try:
                self.names = [file.relative_to(self.folder).as_posix() for file in walk(self.folder)]
            except READ_ERRORS as error:
                self.fail(f"cannot be listed ({reason(error)}): allow reading all of it, or move the set")
        self.metadata = path.name if path.suffix.lower() == ".json" and not path.is_dir() else self._find_metadata()
        own = {path.stem, path.name, path.resolve().stem, path.resolve().name} - {".."}
        with self.naming():
            self.tops = [top for top in (self._root(), *sorted(map(clean_name, own))) if top]

    def _find_metadata(self) -> str | None:
        found = [name for name in self.names if name.replace("\\", "/").rpartition("/")[2] == METADATA]
        depths = [name.replace("\\", "/").count("/") for name in found]
        shallow = [name for name, depth in zip(found, depths, strict=True) if depth == min(depths)]
        if len(shallow) > 1:
            self.fail(f"holds {shallow[0]} and {shallow[1]}: give one of the sets")
        return shallow[0] if shallow else None

    def _root(self) -> str:
        return clean_name(self.metadata).rpartition("/")[0] if self.metadata else ""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_archive": None}

    def fail(self, fault: str) -> NoReturn:
        raise UserError(f"{self.path}: {fault}")

    @contextlib.contextmanager
    def naming(self, what: str = "") -> Iterator[None]:
        """Puts the path, and what is looked at, before the faults of this block."""
        try:
            yield
        except UserError as error:
            self.fail(f"{what}{error}")

    def _zip(self) -> zipfile.ZipFile:
        # One handle per process: workers forked with an open one would move each other's file position.
        if self._archive is None or self._archive[0] != os.getpid():
            try:
                self._archive = os.getpid(), zipfile.ZipFile(self.path)
            except READ_ERRORS as error:
                self.fail(
                    f"is not a folder and not a readable zip ({reason(error)}): copy it again, or unpack it to a folder"
                )
        return self._archive[1]

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """A file to read from; whatever goes wrong in this block, as in decoding an image, is a fault of the file."""
        what, fix = f"image {name}" if is_image(name) else name, "replace it or remove it"
        try:
            file = self._zip().open(name) if self.folder is None else (self.folder / name).open("rb")
        except UserError:
            raise
        except READ_ERRORS as error:
            why = reason(error)
            if self.folder is None and isinstance(error, RuntimeError):  # a method or a flag it knows not, a password
                method = self._zip().getinfo(name).compress_type
                why = f"{why}, its method is {zipfile.compressor_names.get(method, method)}"
                fix = "repack with Deflate, without a password"
            self.fail(f"{what} cannot be read ({why}): {fix}")
        try:
            with file:
                yield file
        except UserError:
            raise
        except READ_ERRORS as error:
            self.fail(f"{what} cannot be read ({reason(error)}): {fix}")

    def read_metadata(self) -> dict[str, Any]:
        """The object in dataset.json (or in the .json)."""
        if self.metadata is None:
            self.fail(f"has no {METADATA}: add one with the camera_angles of the images (README, data format)")
        with self.open(self.metadata) as file:
            content = file.read()
        try:
            metadata = json.loads(content, object_pairs_hook=_unique)
        except READ_ERRORS as error:
            self.fail(f"{self.metadata} is not valid JSON ({reason(error)}): write it again")
        if not isinstance(metadata, dict):
            self.fail(f'{self.metadata} holds no object: write it as {{"camera_angles": {{...}}}}')
        return metadata

    @contextlib.contextmanager
    def image(self, name: str) -> Iterator[PIL.Image.Image]:
        """An image that is 8-bit and opaque, not decoded yet.

        Raises:
            UserError: It cannot be read, now or in this block, or is of another kind.
        """
        # Read to its end, where a zip compares checksums, before Pillow looks as far as it needs.
        with self.open(name) as file, PIL.Image.open(io.BytesIO(file.read())) as image:
            fault, fix = unusable(image), "save it as 8-bit RGB"
            if fault is None and is_transparent(image):
                fault, fix = "transparent", f"put it on its background colour and {fix}"
            if fault is None and is_deep(image):
                fault = f"of mode {image.mode} with 16 bits a channel"
            if fault:
                self.fail(f"image {name} is {fault}: {fix}")
            yield image


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, whose parser would keep the last of two equal names."""
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the name {twice!r} is there twice")
    return content


def is_transparent(image: PIL.Image.Image) -> bool:
    """Whether an image has an alpha channel or a transparent colour."""
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def is_deep(image: PIL.Image.Image) -> bool:
    """Whether the file has 16 bits a channel, whose upper 8 are all that Pillow decodes. Before it is decoded."""
    return any(str(tile[3]).endswith("16B") for tile in image.tile)


def unusable(image: PIL.Image.Image) -> str | None:
    """What makes an image no single picture in RGB or grey, None if nothing does. Before it is decoded."""
    if getattr(image, "is_animated", False) and image.format != "MPO":  # a photograph with others behind it
        return f"an animation of {image.n_frames} frames"
    if is_deep(image):
        return "of 16 bits a channel with a transparent colour" if "transparency" in image.info else None
    return None if image.mode in ("RGB", "L", "P", "1", "RGBA", "LA", "PA") else f"of mode {image.mode}"


def upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """The image as viewers show it, turned and mirrored as its EXIF orientation says."""
    return PIL.ImageOps.exif_transpose(image) if image.getexif().get(ORIENTATION, 1) != 1 else image


def upright_size(image: PIL.Image.Image) -> tuple[int, int]:
    """Width and height of `upright`."""
    turned = image.width != image.height and image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
    return image.size[::-1] if turned else image.size
